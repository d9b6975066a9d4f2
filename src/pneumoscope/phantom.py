"""Synthetic chest radiographs for the demo and the tests, in the layout and under the names of the Kaggle set.

Owns how a made-up child's chest is drawn and how a whole data set of them is written and recognised. They let every
step run without a download and are never reported as a result: each file says SYNTHETIC, and so must every output.
Knows nothing of catalogs, stores or models.

A picture is drawn as attenuation added up on a grid: tissue, lungs, heart, spine, ribs, clavicles, then (for
PNEUMONIA) opacities inside the lungs, then exposure and grain. Anatomy and illness come from one random stream, pose
and exposure from another, so that one child can be taken several times and the same seed gives the same child with
and without pneumonia. What could tell the classes apart by accident (exposure, size, marker, grain) is drawn from
the same distributions for both.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pneumoscope._files import build_folder, read_json, sha256_of, sha256_of_file, write_json, write_text
from pneumoscope.errors import DataError, StoreError, UsageError

PHANTOM_VERSION = 1
"""Raised whenever the same seed gives other pixels; sets written by another version are not reused."""

NOTICE_NAME = "SYNTHETIC.txt"
"""Stands at the root of every synthetic data set."""

_MANIFEST_NAME = "phantom.json"
_COMMENT = b"SYNTHETIC chest radiograph made by pneumoscope"
_COMMENT_WITHIN_BYTES = 1024
_NOTICE = (
    "SYNTHETIC\n\n"
    "These are synthetic images made by pneumoscope. They show no patient, were made from no patient's image, and\n"
    "nothing measured on them says anything about real radiographs. They are for demonstrations and tests.\n"
)
_NORMAL_SHARE = 1 / 3.5  # about 1 NORMAL to 2.5 PNEUMONIA, as in the Kaggle training set
_BACTERIA_SHARE = 0.65
_JPEG_QUALITY = 90
_WIDEST = 0.55  # the height at which the rib cage is widest, in half image heights below the centre

Field = NDArray[np.floating[Any]]  # float32, (height_px, width_px): half the time of float64


@dataclass(frozen=True)
class _Anatomy:
    """One child; lengths in half image heights, x to the right of the picture, y downwards, (0, 0) the centre."""

    chest_width: float
    apex: float
    diaphragm: float
    heart_size: float
    heart_x: float
    mediastinum: float
    rib_spacing: float
    rib_phase: float
    rib_strength: float
    lung_darkness: float
    vessels: float
    fat: float
    stomach: float

    @classmethod
    def sample(cls, rng: Generator) -> _Anatomy:
        return cls(
            chest_width=rng.uniform(0.80, 0.95),
            apex=rng.uniform(-0.80, -0.66),
            diaphragm=rng.uniform(0.32, 0.52),
            heart_size=rng.uniform(0.33, 0.43),
            heart_x=rng.uniform(0.09, 0.19),
            mediastinum=rng.uniform(0.13, 0.22),
            rib_spacing=rng.uniform(0.165, 0.20),
            rib_phase=rng.uniform(0, 1),
            rib_strength=rng.uniform(0.09, 0.17),
            lung_darkness=rng.uniform(0.32, 0.46),
            vessels=rng.uniform(0.006, 0.016),
            fat=rng.uniform(0.04, 0.14),
            stomach=rng.uniform(0, 1),
        )


def draw(label: int, *, subtype: str = "", seed: int, width_px: int = 320, height_px: int = 256) -> NDArray[np.uint8]:
    """Draw one synthetic anterior-posterior chest radiograph of a child.

    Parameters
    ----------
    label : int
        0 for NORMAL, 1 for PNEUMONIA. The same seed gives the same child in the same pose either way.
    subtype : str
        ``"bacteria"`` (one or two focal consolidations), ``"virus"`` (diffuse, around the hila, on both sides), or
        ``""``: for PNEUMONIA one of the two by chance, for NORMAL the only choice.
    seed : int
        At least 0; equal arguments give equal pixels.
    width_px, height_px : int
        Size of the picture, each 32 to 4,096.

    Returns
    -------
    ndarray of uint8, shape (height_px, width_px)
        Grey values, bone bright and air dark.

    Raises
    ------
    UsageError
        For another label or subtype, a negative seed, or a size out of range.

    Examples
    --------
    >>> draw(1, subtype="virus", seed=7).shape
    (256, 320)
    """
    if label not in (0, 1):
        raise UsageError(f"The label is {label!r}; pass 0 for NORMAL or 1 for PNEUMONIA.")
    if subtype not in ("", "bacteria", "virus") or (subtype and label == 0):
        raise UsageError(
            f"The subtype is {subtype!r} for label {label}; "
            'pass "bacteria", "virus" or "" for PNEUMONIA (1), and "" for NORMAL (0).'
        )
    if seed < 0 or not (32 <= width_px <= 4096 and 32 <= height_px <= 4096):
        raise UsageError(
            f"A picture of {width_px} x {height_px} pixels with seed {seed} cannot be drawn; "
            "pass sizes from 32 to 4,096 pixels and a seed of at least 0."
        )
    child, view = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    return _expose(child, view, label=label, subtype=subtype, width_px=width_px, height_px=height_px)


def write_dataset(folder: Path, *, n_train: int = 480, n_test: int = 120, seed: int = 42, size_px: int = 256) -> Path:
    """Write a synthetic data set in the Kaggle layout, or find that it is there already.

    About one image in 3.5 is NORMAL. A child has one to three images, all in one split, and the lowest numbers are
    the test set, as in the Kaggle set. Widths and heights vary by a few percent, alike for both classes.

    Parameters
    ----------
    folder : Path
        Appears whole or not at all, with ``train`` and ``test``, each with ``NORMAL`` and ``PNEUMONIA``.
    n_train, n_test : int
        Number of images, each at least 4.
    seed : int
        At least 0; equal arguments give equal images.
    size_px : int
        The usual height, 32 to 2,048; the usual width is 1.25 times that.

    Returns
    -------
    Path
        `folder`.

    Raises
    ------
    UsageError
        For numbers out of range.
    DataError
        Where `folder` holds anything else than this very data set.
    StoreError
        Where the place cannot be written.
    """
    if n_train < 4 or n_test < 4 or seed < 0 or not 32 <= size_px <= 2048:
        raise UsageError(
            f"A synthetic set of {n_train} + {n_test} images of {size_px} px with seed {seed} cannot be made; "
            "pass at least 4 images for each split, 32 to 2,048 px and a seed of at least 0."
        )
    wanted = {"version": PHANTOM_VERSION, "n_train": n_train, "n_test": n_test, "seed": seed, "size_px": size_px}

    def fill(temporary: Path) -> None:
        write_text(temporary / NOTICE_NAME, _NOTICE)
        hashes = {}
        for name, data in _dataset(n_train=n_train, n_test=n_test, seed=seed, size_px=size_px):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(data)
            hashes[name] = sha256_of(data)
        write_json(temporary / _MANIFEST_NAME, {**wanted, "files": hashes})

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        build_folder(folder, fill)
    _require_same(folder, wanted)
    return folder


def is_synthetic(folder: Path) -> bool:
    """Tell whether a data set was made here, so that every output can say so.

    Parameters
    ----------
    folder : Path
        A folder of images at any depth, or a ``.zip`` archive of one.

    Returns
    -------
    bool
        True where the notice file is there, or the first image found carries the comment; False for anything else,
        also where `folder` cannot be read.
    """
    try:
        if zipfile.is_zipfile(folder):
            with zipfile.ZipFile(folder) as archive:
                names = archive.namelist()
                if any(name.rpartition("/")[2] == NOTICE_NAME for name in names):
                    return True
                first = next((name for name in names if name.endswith(".jpeg")), None)
                return first is not None and is_synthetic_image(archive.open(first).read(_COMMENT_WITHIN_BYTES))
        if (folder / NOTICE_NAME).is_file():
            return True
        image = next((path for path in folder.rglob("*.jpeg") if path.is_file()), None)
        return image is not None and is_synthetic_image(image.read_bytes())
    except (OSError, zipfile.BadZipFile, RuntimeError):  # RuntimeError: an encrypted member
        return False


def is_synthetic_image(data: bytes) -> bool:
    """Tell whether the bytes of a JPEG file carry the comment that every synthetic image has."""
    return _COMMENT in data[:_COMMENT_WITHIN_BYTES]


@dataclass(frozen=True)
class _Child:
    """One synthetic person of a data set and the names of the images taken."""

    number: int
    label: int
    subtype: str
    names: tuple[str, ...]


def _dataset(*, n_train: int, n_test: int, seed: int, size_px: int) -> Iterator[tuple[str, bytes]]:
    """Yield each file's name inside the data set and its JPEG bytes; the lowest numbers are the test set."""
    rng = np.random.default_rng([seed, 0])
    number = 1
    for split, n_images in (("test", n_test), ("train", n_train)):
        n_normal = max(1, round(n_images * _NORMAL_SHARE))
        for label, wanted in ((0, n_normal), (1, n_images - n_normal)):
            for child in _children(rng, label=label, n_images=wanted, first_number=number):
                number = child.number + 1
                for index, name in enumerate(child.names):
                    data = _photograph(child, seed=seed, index=index, size_px=size_px)
                    yield f"{split}/{('NORMAL', 'PNEUMONIA')[label]}/{name}", data


def _children(rng: Generator, *, label: int, n_images: int, first_number: int) -> Iterator[_Child]:
    """Yield children with one to three images each until `n_images` are named."""
    number, left = first_number, n_images
    while left > 0:
        taken = min(left, int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15])))
        if label:
            subtype = "bacteria" if rng.random() < _BACTERIA_SHARE else "virus"
            names = [f"person{number}_{subtype}_{3 * number + index}.jpeg" for index in range(taken)]
        else:
            subtype = ""
            series = "IM" if rng.random() < 0.5 else "NORMAL2-IM"
            further = ["", "-0001", "-0002"][:taken]
            names = [f"{series}-{number:04d}-0001{ending}.jpeg" for ending in further]
        yield _Child(number=number, label=label, subtype=subtype, names=tuple(names))
        number, left = number + 1, left - taken


def _photograph(child: _Child, *, seed: int, index: int, size_px: int) -> bytes:
    """Return the JPEG bytes of a child's image: the same anatomy and illness each time, another pose and exposure."""
    body, view = np.random.default_rng([seed, 1, child.number]), np.random.default_rng([seed, 2, child.number, index])
    height_px = round(size_px * view.uniform(0.92, 1.08))
    width_px = round(1.25 * size_px * view.uniform(0.92, 1.08))
    pixels = _expose(body, view, label=child.label, subtype=child.subtype, width_px=width_px, height_px=height_px)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=_JPEG_QUALITY, comment=_COMMENT)
    return buffer.getvalue()


def _require_same(folder: Path, wanted: dict[str, int]) -> None:
    """Refuse a folder that is not this data set, whole and unchanged."""
    try:
        manifest = read_json(folder / _MANIFEST_NAME)
    except (StoreError, NotADirectoryError):
        manifest = {}
    hashes = manifest.get("files")
    if any(manifest.get(key) != value for key, value in wanted.items()) or not isinstance(hashes, dict):
        raise DataError(
            f"{folder} holds something else than the synthetic set asked for; choose a folder that is empty or does "
            "not exist, or delete this one."
        )
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.jpeg")}
    changed = [name for name in sorted(there & set(hashes)) if sha256_of_file(folder / name) != hashes[name]]
    for name in [*sorted(there ^ set(hashes)), *changed]:
        raise DataError(
            f"{folder / name} was added, removed or changed since the synthetic set was made; "
            f"delete {folder} and make it anew."
        )


def _expose(
    child: Generator, view: Generator, *, label: int, subtype: str, width_px: int, height_px: int
) -> NDArray[np.uint8]:
    return _develop(view, _attenuation(child, view, (height_px, width_px), label=label, subtype=subtype))


def _attenuation(child: Generator, view: Generator, shape: tuple[int, int], *, label: int, subtype: str) -> Field:
    """Return how much of the beam the body holds back at each pixel, about 0 (air) to 1."""
    anatomy = _Anatomy.sample(child)
    x, y = _pose(view, shape)
    lungs, dense = _lungs(anatomy, x, y)
    texture = _vessels(anatomy, child, x, y)
    opacity = _opacity(child, subtype, lungs, x, y) if label else np.zeros(shape, dtype=np.float32)
    outline, tissue = _body(anatomy, x, y)
    air = lungs * (1 - dense) * (1 - opacity)
    inside = (
        tissue
        - anatomy.lung_darkness * air
        + texture * air
        + _skeleton(anatomy, x, y, lungs) * (1 - 0.35 * lungs * opacity)
        - _gas(anatomy, x, y)
    )
    return np.asarray(outline * inside, dtype=np.float32)


def _pose(view: Generator, shape: tuple[int, int]) -> tuple[Field, Field]:
    """Return the anatomical coordinates of each pixel under a small shift, rotation, scale and tilt."""
    height, width = shape
    angle = math.radians(view.normal(0, 2.5))
    scale_x, scale_y = view.normal(1, 0.05), view.normal(1, 0.05)
    shift_x, shift_y = view.normal(0, 0.05), view.normal(0, 0.05)
    cosine, sine = math.cos(angle), math.sin(angle)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    # Real pictures are cropped to the chest whatever their shape, so the width is fitted, not cut.
    x = (columns / (width - 1) * 2 - 1) * 1.12 - shift_x
    y = (rows / (height - 1) * 2 - 1) - shift_y
    return (x * cosine - y * sine) / scale_x, (x * sine + y * cosine) / scale_y


def _cage(anatomy: _Anatomy, y: Field) -> Field:
    """Half width of the rib cage at height y: a dome above, straight below."""
    t = np.clip((_WIDEST - y) / (_WIDEST - anatomy.apex), 0, 1)
    return np.asarray(anatomy.chest_width * np.clip(1 - t**1.7, 0, None) ** 0.54, dtype=np.float32)


def _lungs(anatomy: _Anatomy, x: Field, y: Field) -> tuple[Field, Field]:
    """Return the lung fields and what hides them in the middle (heart, mediastinum), each in [0, 1]."""
    side = np.abs(x)
    # The left half of the picture is the patient's right: there the liver lifts the diaphragm.
    dome = anatomy.diaphragm + 0.07 * _step(x, 0.15) + 1.5 * np.clip(side - 0.42, 0, None) ** 2
    lungs = _step(_cage(anatomy, y) - 0.025 - side, 0.014) * _step(dome - y, 0.016) * _step(y - anatomy.apex, 0.03)
    heart_y = anatomy.diaphragm - 0.24
    cosine, sine = math.cos(0.45), math.sin(0.45)  # the heart points to the patient's left
    across = (x - anatomy.heart_x) * cosine + (y - heart_y) * sine
    along = -(x - anatomy.heart_x) * sine + (y - heart_y) * cosine
    radius = np.sqrt((across / (anatomy.heart_size * 1.05)) ** 2 + (along / (anatomy.heart_size * 0.92)) ** 2)
    heart = _step(1 - radius, 0.06)
    # Wide at the top (thymus, great vessels), narrow at the level of the hila.
    band = anatomy.mediastinum * (1 + 0.45 * np.exp(-(((y + 0.38) / 0.18) ** 2)))
    middle = _step(band - np.abs(x - 0.02), 0.03)
    return lungs, np.asarray(1 - (1 - 0.97 * heart) * (1 - 0.95 * middle), dtype=np.float32)


def _body(anatomy: _Anatomy, x: Field, y: Field) -> tuple[Field, Field]:
    """Return the outline of shoulders and trunk in [0, 1], and the thickness of tissue inside it."""
    trunk = anatomy.chest_width + 0.05 + anatomy.fat * (0.6 + 0.4 * y)
    shoulders = 0.45 * np.logaddexp(0, -(y + 0.40) / 0.16)  # bends outwards smoothly below the armpit
    outline = np.asarray(trunk + shoulders, dtype=np.float32)
    above = _step(y + 1.12 - 0.20 * np.abs(x), 0.05)
    roundness = np.sqrt(np.clip(1 - (x / (outline + 0.03)) ** 2, 0, None))
    belly = 0.10 * _step(y - anatomy.diaphragm - 0.03, 0.08)
    centre = 0.11 * np.exp(-((x / 0.34) ** 2))
    jaw = 0.16 * _step(0.36 - np.sqrt(x**2 + ((y + 1.22) / 1.1) ** 2), 0.03)
    tissue = 0.24 + 0.36 * roundness + belly + centre + jaw
    return _step(outline - np.abs(x), 0.012) * above, np.asarray(tissue, dtype=np.float32)


def _skeleton(anatomy: _Anatomy, x: Field, y: Field, lungs: Field) -> Field:
    side = np.abs(x)
    cage = np.maximum(_cage(anatomy, y), 0.05)
    reach = side / cage
    inside = _step(1.0 - reach, 0.02) * _step(y - anatomy.apex + 0.02, 0.03)
    back = _bands(y - 0.34 * reach**2.4 + 0.05 * reach, anatomy, 0.0) * _step(side - 0.08, 0.02)
    front = _bands(y - 0.42 + 0.30 * (1 - reach), anatomy, 0.45) * _step(reach - 0.5, 0.06)
    ribs = anatomy.rib_strength * inside * (back + 0.55 * front) * (0.75 + 0.9 * np.clip(reach, 0, 1) ** 6)
    wall = 0.8 * anatomy.rib_strength * np.exp(-(((side - cage) / 0.022) ** 2)) * _step(y - anatomy.apex - 0.1, 0.05)
    column = _step(0.085 - side, 0.012)
    vertebrae = 0.5 + 0.5 * np.cos(2 * np.pi * (y / (anatomy.rib_spacing * 0.98) + anatomy.rib_phase))
    spine = column * (0.07 + 0.06 * vertebrae**0.6)
    windpipe = -0.07 * np.exp(-(((x + 0.01) / 0.045) ** 2)) * _step(-0.3 - y, 0.06)
    line = anatomy.apex + 0.05 - 0.16 * (side - 0.1) + 0.035 * np.sin(7 * side)
    clavicles = 0.13 * np.exp(-(((y - line) / 0.028) ** 2)) * _step(side - 0.12, 0.02) * _step(0.85 - side, 0.03)
    arm = 0.12 * np.exp(-(((side - 1.06 + 0.35 * (y + 0.75)) / 0.075) ** 2)) * _step(-0.50 - y, 0.05)
    fade = 1 - 0.6 * (1 - lungs)  # bone stands out less where much tissue lies before it
    return np.asarray((ribs + wall) * fade + spine + windpipe + clavicles + arm, dtype=np.float32)


def _bands(height: Field, anatomy: _Anatomy, offset: float) -> Field:
    """Ribs as one periodic profile, brighter at their rims, so that all cost as much as one."""
    phase = height / anatomy.rib_spacing + anatomy.rib_phase + offset
    distance = np.abs(phase - np.round(phase))
    return np.asarray(_step(0.20 - distance, 0.022) * (0.45 + 3.2 * distance), dtype=np.float32)


def _vessels(anatomy: _Anatomy, child: Generator, x: Field, y: Field) -> Field:
    """Fine branching shadows, strongest around the hila."""
    near = np.exp(-(((np.abs(x) - 0.27) / 0.30) ** 2) - ((y - 0.0) / 0.40) ** 2)
    hilum = np.exp(-(((np.abs(x) - 0.25) / 0.07) ** 2) - ((y - 0.0) / 0.13) ** 2)
    fine, coarse = _noise(child, x.shape, 90), _noise(child, x.shape, 45)
    return np.asarray(anatomy.vessels * (0.45 + 1.3 * near) * (fine + coarse) + 0.06 * hilum, dtype=np.float32)


def _gas(anatomy: _Anatomy, x: Field, y: Field) -> Field:
    """The stomach's air below the left diaphragm, in some children."""
    if anatomy.stomach < 0.5:
        return np.zeros_like(x)
    size = 0.08 + 0.18 * (anatomy.stomach - 0.5)
    distance = ((x - 0.42) / (1.5 * size)) ** 2 + ((y - anatomy.diaphragm - 0.14 - size) / size) ** 2
    return np.asarray(0.16 * _step(1 - distance, 0.12), dtype=np.float32)


def _opacity(child: Generator, subtype: str, lungs: Field, x: Field, y: Field) -> Field:
    """Return how much of the lung's air is replaced, in [0, 1): soft-edged, uneven, sometimes faint."""
    subtype = subtype or ("bacteria" if child.random() < _BACTERIA_SHARE else "virus")
    strength = 0.30 + 0.65 * child.beta(1.8, 1.3)
    uneven = _noise(child, x.shape, 9)
    if subtype == "bacteria":
        opacity = np.zeros_like(x)
        for _ in range(1 + int(child.random() < 0.4)):
            side = -1 if child.random() < 0.5 else 1
            centre_x, centre_y = side * child.uniform(0.28, 0.62), child.uniform(-0.30, 0.38)
            radius_x, radius_y = child.uniform(0.18, 0.38), child.uniform(0.18, 0.38)
            distance = np.sqrt(((x - centre_x) / radius_x) ** 2 + ((y - centre_y) / radius_y) ** 2)
            opacity = np.maximum(opacity, _step(1 + 0.22 * uneven - distance, 0.14))
        return np.asarray(strength * opacity, dtype=np.float32)
    net = _noise(child, x.shape, 44) + _noise(child, x.shape, 20)
    near = np.exp(-(((np.abs(x) - 0.30) / 0.36) ** 2) - ((y - child.uniform(-0.05, 0.2)) / 0.48) ** 2)
    haze = np.clip(0.46 + 0.20 * uneven + 0.10 * net, 0, 1) * (0.25 + 0.75 * near)
    return np.asarray(np.clip(1.5 * strength * haze, 0, 0.95), dtype=np.float32)


def _develop(view: Generator, attenuation: Field) -> NDArray[np.uint8]:
    """Exposure, contrast, fog, uneven field, grain, a marker and sometimes a dark rim: alike for both classes."""
    gamma, bright, contrast = view.uniform(0.8, 1.35), view.uniform(0.40, 0.58), view.uniform(0.95, 1.35)
    grain, fog = view.uniform(0.002, 0.010), view.uniform(0, 0.06)
    value = np.clip(attenuation, 0, None) ** gamma
    middle = value[value > 0.15].mean() if (value > 0.15).any() else np.float32(0.5)
    # The machine meters each exposure, so that the mean says little about what is in the picture.
    value = value * (bright + 0.10) / middle
    value = fog + (1 - fog) * (bright + contrast * (value - bright))
    value += 0.025 * _noise(view, value.shape, 4)
    speckle = view.standard_normal(value.shape, dtype=np.float32)
    value += grain * (speckle + np.roll(speckle, 1, axis=0) + np.roll(speckle, 1, axis=1))
    value -= 0.06 * np.logaddexp(0, (value - 0.92) / 0.06)  # film saturates softly
    picture = Image.fromarray(np.uint8(np.clip(value, 0, 1) * 255))
    if view.random() < 0.7:
        _mark(picture, view)
    return np.asarray(picture)


def _mark(picture: Image.Image, view: Generator) -> None:
    """Draw the letter R that tells the patient's right side, in strokes (fonts differ between machines)."""
    size = picture.height * view.uniform(0.035, 0.05)
    left, top = picture.width * view.uniform(0.02, 0.10), picture.height * view.uniform(0.05, 0.45)
    strokes = [
        [(0.0, 1.0), (0.0, 0.0), (0.45, 0.0), (0.6, 0.12), (0.6, 0.38), (0.45, 0.5), (0.0, 0.5)],
        [(0.28, 0.5), (0.65, 1.0)],
    ]
    pen = ImageDraw.Draw(picture)
    for stroke in strokes:
        points = [(left + size * a, top + size * b) for a, b in stroke]
        pen.line(points, fill=int(view.integers(200, 250)), width=max(1, round(size / 7)), joint="curve")


def _step(distance: Field, softness: float) -> Field:
    """A soft step: 0 outside (negative distance), 1 inside."""
    return np.asarray(0.5 + 0.5 * np.tanh(distance / np.float32(2 * softness)), dtype=np.float32)


def _noise(rng: Generator, shape: tuple[int, ...], cells: int) -> Field:
    """Smooth noise of about unit variance with `cells` bumps across the picture's height."""
    height, width = shape
    coarse = rng.standard_normal((cells, round(cells * 1.25)), dtype=np.float32)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture, dtype=np.float32) * np.float32(1.3)
