"""How images look: plain measures of each, which have the same pixels, which look alike, which stand turned.

Owns the measures that need no network, taken from files' headers and packed images; an original is decoded only to
prove that two are equal. Knows nothing of leaks, and does not say what is good or bad: that is for `audit`.

Beside the table, a picture of 32 x 32 (1 kB) is held for each image, never all packed images. The search for
near-duplicates looks at all pairs: about a second for 5,000 images, some minutes for 100,000.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

from pneumoscope import _files, images
from pneumoscope._backend import available_cores
from pneumoscope.catalog import Catalog
from pneumoscope.errors import DataError, ImageError
from pneumoscope.specs import LABELS
from pneumoscope.store import ImageStore

MEASURES: Final = (
    "path", "image_id", "width_px", "height_px", "aspect", "file_bytes", "jpeg_quality", "mean", "contrast",
    "border_mean", "border_std", "frames", "orientation",
)  # fmt: skip
"""Columns of `Looks.measures`, in order."""

BORDER_SHARE: Final = 0.08
"""Width of the border, as a share of the packed image's side; see `border_px`."""

ORIENTATIONS: Final = (
    "upright", "turned-270", "turned-180", "turned-90",
    "inverted", "inverted-turned-270", "inverted-turned-180", "inverted-turned-90",
)  # fmt: skip
"""How an image stands: turned by so many degrees clockwise; inverted where black and white are exchanged."""

TURN_MARGIN: Final = 0.1
"""By how much a turned or inverted mean image must correlate better than the upright one. Of 5,206 real images, all
upright, none passes 0.065; where a tenth of them is turned by 90 or 270 degrees or inverted, 997 in 1,000 of these are
found, where it is turned upside down five in six."""

TURN_IMAGES: Final = 20
"""With fewer images there is no mean image to judge by."""

HASH_DISTANCE: Final = 12
"""Near-duplicates differ in at most so many of the 64 bits of `perceptual_hashes` ..."""

DETAIL_CORRELATION: Final = 0.8
"""... and their fine structure correlates at least so. Copies of real images pass that were compressed, resized, made
brighter or darker, cropped by 1 % on each side or turned by 1 degree (at 2 % three in four, at 2 degrees seven in
eight, at 3 hardly any). Of the 13.5 million pairs of 5,206 real images two pass: one child under two numbers, as it
seems, and two children whose chests are alike."""

MAX_PAIRS: Final = 1000
"""Near-duplicates listed: those that are most alike."""

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""

_BLOCK: Final = 64  # images between two reports of progress
_THUMB_PX: Final = 32
_TILE: Final = 1024  # images whose pairs with as many others are looked at in one piece

# ITU-T T.81 (1992), table K.1: the luminance table that the Independent JPEG Group's encoders scale by the quality
_LUMINANCE: Final = np.array([
    16, 11, 10, 16,  24,  40,  51,  61,
    12, 12, 14, 19,  26,  58,  60,  55,
    14, 13, 16, 24,  40,  57,  69,  56,
    14, 17, 22, 29,  51,  87,  80,  62,
    18, 22, 37, 56,  68, 109, 103,  77,
    24, 35, 55, 64,  81, 104, 113,  92,
    49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103,  99,
])  # fmt: skip


@dataclass(frozen=True, eq=False)
class Looks:
    """What was seen of a Catalog's usable images.

    Attributes
    ----------
    rows : DataFrame
        The usable rows of the Catalog, in its order, with further columns: all of `MEASURES`; ``format`` (as in
        `images.Header`); ``content``, one name for all files with the same decoded pixels (an ``image_id`` of them).
    thumbs : ndarray of uint8, shape (n, 32, 32)
        The distinct images, in the order in which their ``image_id`` first stands in `rows`, antialiased.
    """

    rows: pd.DataFrame
    thumbs: npt.NDArray[np.uint8]

    @property
    def measures(self) -> pd.DataFrame:
        """The columns `MEASURES`.

        ``width_px``, ``height_px`` and ``aspect`` (width / height) of the original; ``file_bytes``; ``jpeg_quality``
        (float, 1 to 100, NaN where the file is no JPEG); ``mean`` and ``contrast`` (standard deviation) of the packed
        image, ``border_mean`` and ``border_std`` of its border (`border_px` wide), in grey levels 0 to 255; ``frames``
        (pages in the file); ``orientation``, one of `ORIENTATIONS`, empty where it cannot be judged.
        """
        return self.rows[list(MEASURES)]


def look(catalog: Catalog, store: ImageStore, *, progress: Progress | None = None) -> Looks:
    """Look at every usable image of a Catalog once.

    Parameters
    ----------
    catalog : Catalog
        Without the images that `store` rejected.
    store : ImageStore
        Its images, packed.
    progress : callable, optional
        Called with (images done, images in all).

    Returns
    -------
    Looks

    Raises
    ------
    DataError
        Where a file that was listed cannot be read any more, or has changed.
    StoreError
        Where an image is not in the store.
    """
    rows = catalog.rows()
    distinct = rows.drop_duplicates("image_id").reset_index(drop=True)
    paths, ids = distinct["path"].tolist(), distinct["image_id"].tolist()
    at = store.rows_of(distinct) if ids else np.empty(0, np.intp)
    thumbs = np.empty((len(distinct), _THUMB_PX, _THUMB_PX), dtype=np.uint8)
    facts: list[dict[str, Any]] = []

    def work(row: int) -> dict[str, Any]:
        pixels = store.images[at[row]]
        thumbs[row] = images.resize(pixels, _THUMB_PX)
        return _facts(_bytes_of(catalog, paths[row], ids[row]), pixels)

    with ThreadPoolExecutor(available_cores()) as pool:  # reading waits for the disk
        for start in range(0, len(paths), _BLOCK):  # a block at a time, because originals are large
            facts += pool.map(work, range(start, min(start + _BLOCK, len(paths))))
            if progress is not None:
                progress(len(facts), len(paths))
    names = ["format", "frames", "jpeg_quality", "mean", "contrast", "border_mean", "border_std", "pixels"]
    seen = pd.DataFrame(facts, columns=names).astype({"jpeg_quality": "float64"})
    seen["orientation"] = pd.Series(orientations(thumbs, distinct["label"].to_numpy()), dtype="str")
    seen["content"] = pd.Series(_contents(catalog, paths, ids, packed=seen.pop("pixels").tolist()), dtype="str")
    table = rows.join(seen.set_index(distinct["image_id"]), on="image_id")
    return Looks(table.assign(aspect=table["width_px"] / table["height_px"]), thumbs)


def border_px(size_px: int) -> int:
    """Return how wide the border of a packed image is on each side: `BORDER_SHARE` of its side, at least 1 pixel."""
    return max(1, round(BORDER_SHARE * size_px))


def jpeg_quality(data: bytes) -> int | None:
    """Estimate the quality setting that a JPEG file was saved with from its luminance quantisation table.

    The Independent JPEG Group's encoders scale table K.1 of ITU-T T.81 (1992) by 5000 / quality per cent under a
    quality of 50 and by 200 - 2 quality per cent from there. The estimate is the quality whose table is nearest in the
    sum of absolute differences: exact for files of such encoders, a likeness for others.

    Parameters
    ----------
    data : bytes
        The whole file.

    Returns
    -------
    int or None
        1 (smallest file) to 100 (best picture); None where the file is no JPEG or has no such table.
    """
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b"\xd9", b""):  # pixels, end
        if data[at + 1] == 0xFF:  # a fill byte
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xDB and (table := _luminance_of(data[at + 4 : at + 2 + length])) is not None:
            return int(np.abs(_IJG_TABLES - table).sum(axis=1).argmin()) + 1
        at += 2 + length
    return None


def perceptual_hashes(thumbs: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Compute 64 bits of each image that small changes of size, brightness and compression hardly touch.

    They say which of 8 x 8 low frequencies of the discrete cosine transform (the lowest but the constant ones) exceed
    their median: Zauner (2010), "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1.

    Parameters
    ----------
    thumbs : ndarray of uint8, shape (n, 32, 32)
        Grey images, antialiased.

    Returns
    -------
    ndarray of uint64, shape (n,)
        To be compared by the number of bits that differ.
    """
    waves = dctn(thumbs.astype(np.float32), axes=(1, 2), norm="ortho")[:, 1:9, 1:9].reshape(len(thumbs), 64)
    bits = np.packbits(waves > np.median(waves, axis=1, keepdims=True), axis=1)
    return bits.view(np.uint64).reshape(len(thumbs))


def orientations(thumbs: npt.NDArray[np.uint8], labels: npt.NDArray[np.int8]) -> list[str]:
    """Tell how each image stands: which turn, or negative, of the mean image it correlates with best.

    Parameters
    ----------
    thumbs : ndarray of uint8, shape (n, 32, 32)
        Most of them upright.
    labels : ndarray of int8, shape (n,)
        0 or 1; either label weighs half in the mean image.

    Returns
    -------
    list of str
        Of `ORIENTATIONS`; another than ``upright`` only where it fits better by `TURN_MARGIN`. Empty for an image of
        one grey, and for all where there are fewer than `TURN_IMAGES`.
    """
    if len(thumbs) < TURN_IMAGES:
        return [""] * len(thumbs)
    tiles = [slice(start, start + _TILE) for start in range(0, len(thumbs), _TILE)]
    sums = np.zeros((len(LABELS), _THUMB_PX**2))
    for tile in tiles:
        units = _units(thumbs[tile])
        for label in range(len(LABELS)):
            sums[label] += units[labels[tile] == label].sum(axis=0)
    mean = _units(sums).sum(axis=0).reshape(_THUMB_PX, _THUMB_PX)
    turned = _units(np.stack([np.rot90(mean, turns) for turns in range(4)]))  # rot90 turns anticlockwise
    names: list[str] = []
    for tile in tiles:
        fits = _units(thumbs[tile]) @ turned.T
        fits = np.hstack([fits, -fits])
        best = np.where(fits.max(axis=1) > fits[:, 0] + TURN_MARGIN, fits.argmax(axis=1), 0)
        names += [ORIENTATIONS[at] if fit.any() else "" for at, fit in zip(best, fits, strict=True)]
    return names


def near_duplicates(looks: Looks) -> tuple[pd.DataFrame, int]:
    """Find pairs of images with different pixels that look alike; candidates for people to look at.

    Parameters
    ----------
    looks : Looks
        Of a Catalog.

    Returns
    -------
    pairs : DataFrame
        At most the `MAX_PAIRS` that are most alike; those in different splits first, then by falling correlation.
        ``first`` and ``second`` (paths), ``distance`` (int, bits), ``correlation`` (float, at most 1), ``same_group``
        and ``same_split`` (bool).
    count : int
        How many pairs there are in all.
    """
    distinct = looks.rows.drop_duplicates("image_id")
    hashes, content = perceptual_hashes(looks.thumbs), pd.factorize(distinct["content"])[0]
    best = np.empty((0, 4))  # first, second, distance, correlation
    count = 0
    for top in range(0, len(hashes), _TILE):
        first = slice(top, top + _TILE)
        detail = _details(looks.thumbs[first])
        for left in range(top, len(hashes), _TILE):
            second = slice(left, left + _TILE)
            distance = np.bitwise_count(hashes[first, None] ^ hashes[second])
            correlation = detail @ _details(looks.thumbs[second]).T
            alike = (distance <= HASH_DISTANCE) & (correlation >= DETAIL_CORRELATION)
            alike &= content[first, None] != content[second]
            rows, columns = np.nonzero(np.triu(alike) if left == top else alike)
            count += len(rows)
            new = np.column_stack([rows + top, columns + left, distance[rows, columns], correlation[rows, columns]])
            best = np.concatenate([best, new])
            best = best[np.argsort(-best[:, 3], kind="stable")][:MAX_PAIRS]
    one, two = (distinct.iloc[best[:, side].astype(np.intp)].reset_index(drop=True) for side in (0, 1))
    pairs = pd.DataFrame({"first": one["path"], "second": two["path"]})
    pairs["distance"], pairs["correlation"] = best[:, 2].astype(np.int64), best[:, 3]
    pairs["same_group"], pairs["same_split"] = one["group"] == two["group"], one["split"] == two["split"]
    return pairs.sort_values("same_split", kind="stable").reset_index(drop=True), count


def _bytes_of(catalog: Catalog, path: str, image_id: str) -> bytes:
    try:
        data = catalog.read_bytes(path)
    except ImageError as error:
        raise DataError(f"{path} was listed but is {error.reason} now; make it readable and run again.") from error
    if not _files.sha256_of(data).startswith(image_id):
        raise DataError(f"{path} changed since it was listed; wait until it is complete and run again.")
    return data


def _facts(data: bytes, pixels: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """Return what one file's header and its packed pixels tell, and a hash of the latter."""
    header = images.read_header(data)
    width = border_px(len(pixels))
    border = np.ones(pixels.shape, dtype=np.bool_)
    border[width:-width, width:-width] = False
    return {
        "format": header.format,
        "frames": header.frames,
        "jpeg_quality": jpeg_quality(data),
        "mean": float(pixels.mean()),
        "contrast": float(pixels.std()),
        "border_mean": float(pixels[border].mean()),
        "border_std": float(pixels[border].std()),
        "pixels": _files.sha256_of(pixels.tobytes()),
    }


def _contents(catalog: Catalog, paths: list[str], ids: list[str], *, packed: list[str]) -> list[str]:
    """Name each image after the first with the same pixels; where packed pixels are equal, the originals decide."""
    times = Counter(packed)
    proved: dict[tuple[tuple[int, ...], str], str] = {}
    names = []
    for path, image_id, digest in zip(paths, ids, packed, strict=True):
        name = image_id
        if times[digest] > 1:
            pixels = images.decode(_bytes_of(catalog, path, image_id))
            name = proved.setdefault((pixels.shape, _files.sha256_of(pixels.tobytes())), image_id)
        names.append(name)
    return names


def _luminance_of(tables: bytes) -> npt.NDArray[np.int64] | None:
    """Return table 0 of a DQT segment (ITU-T T.81, section B.2.4.1) in zigzag order; None where it is not in it."""
    while tables:
        wide, number = tables[0] >> 4, tables[0] & 15
        size = 128 if wide else 64
        if number == 0 and len(tables) > size:
            return np.frombuffer(tables[1 : 1 + size], dtype=">u2" if wide else "u1").astype(np.int64)
        tables = tables[1 + size :]
    return None


def _ijg_tables() -> npt.NDArray[np.int64]:
    """Return the luminance tables of the qualities 1 to 100, shape (100, 64), in zigzag order."""
    quality = np.arange(1, 101)
    percent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    down, across = np.indices((8, 8)).reshape(2, 64)
    diagonal = down + across
    zigzag = np.lexsort((np.where(diagonal % 2, down, across), diagonal))  # every other diagonal runs upwards
    return np.asarray(np.clip((np.outer(percent, _LUMINANCE[zigzag]) + 50) // 100, 1, 255), dtype=np.int64)


_IJG_TABLES: Final = _ijg_tables()


def _units(pictures: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return each picture as a vector of mean 0 and length 1, whose products are correlations; 0 where constant."""
    flat = pictures.reshape(len(pictures), -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return (flat / np.where(length > 1e-6, length, np.inf)).astype(np.float32)


def _details(thumbs: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the fine structure of each picture (ribs and vessels, not the outline that all chests share) as units."""
    wide = thumbs.astype(np.float64)
    return _units(wide - gaussian_filter(wide, sigma=(0, 1, 1)))
