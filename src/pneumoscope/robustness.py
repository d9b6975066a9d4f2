"""How far scores hold on the same images as another machine, another hand or another copy would give them.

Owns a fixed set of changes, none of them random, so that two models are always asked the same; what a training draws
is in `augmentation` and is something else. Images go in and come out as they are packed. Knows nothing of networks:
whoever asks brings a function that scores.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

from pneumoscope import intervals

Picture = npt.NDArray[np.uint8]
Change = Callable[[Picture], Picture]

_REFERENCE_PX = 224
"""Blur is given in pixels of images of this side."""


def _values(change: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> Change:
    """Make a change of grey values in [0, 1] one of images."""

    def apply(picture: Picture) -> Picture:
        return _grey(change(picture / 255) * 255)

    return apply


def _grey(values: npt.NDArray[Any]) -> Picture:
    return np.asarray(np.clip(np.rint(values), 0, 255), dtype=np.uint8)


def _contrast(factor: float) -> Change:
    return _values(lambda values: values.mean() + (values - values.mean()) * factor)


def _blur(sigma_px: float) -> Change:
    def apply(picture: Picture) -> Picture:
        return _grey(ndimage.gaussian_filter(picture.astype(np.float64), sigma_px * len(picture) / _REFERENCE_PX))

    return apply


def _noise(deviation: float) -> Change:
    def apply(picture: Picture) -> Picture:
        seed = np.frombuffer(picture.tobytes()[:4096], dtype=np.uint8).sum()  # its own pattern, always the same
        return _grey(picture + 255 * deviation * np.random.default_rng(int(seed)).standard_normal(picture.shape))

    return apply


def _jpeg(quality: int) -> Change:
    def apply(picture: Picture) -> Picture:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "JPEG", quality=quality)
        with Image.open(stream, formats=["JPEG"]) as image:
            return np.asarray(image.convert("L"))

    return apply


def _through(side: float) -> Change:
    """Make an image smaller and bring it back to its size."""

    def apply(picture: Picture) -> Picture:
        height, width = picture.shape
        small = Image.fromarray(picture).resize((round(width * side), round(height * side)), Image.Resampling.BILINEAR)
        return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))

    return apply


def _placed(*, across: float = 1.0, along: float = 1.0, degrees: float = 0.0) -> Change:
    """Enlarge an image about its centre by two factors and turn it counter-clockwise; the outside repeats the edge."""

    def apply(picture: Picture) -> Picture:
        turn = np.deg2rad(degrees)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])  # rows, then columns
        matrix = np.diag([1 / along, 1 / across]) @ rotation
        centre = (np.array(picture.shape) - 1) / 2
        moved = ndimage.affine_transform(
            picture.astype(np.float64), matrix, centre - matrix @ centre, order=1, mode="nearest"
        )
        return _grey(moved)

    return apply


def _marker(picture: Picture) -> Picture:
    """Burn a letter into the upper left corner, as a side marker would stand there."""
    image = Image.fromarray(picture)
    side = len(picture)
    ImageDraw.Draw(image).text((side * 0.06, side * 0.05), "L", fill=255, font_size=side * 0.12)
    return np.asarray(image)


CHANGES: Mapping[str, Change] = MappingProxyType(
    {
        "gamma-0.7": _values(lambda values: values**0.7),
        "gamma-1.4": _values(lambda values: values**1.4),
        "contrast-0.7": _contrast(0.7),
        "contrast-1.3": _contrast(1.3),
        "blur-1": _blur(1),
        "blur-2": _blur(2),
        "noise-5": _noise(0.05),
        "noise-10": _noise(0.10),
        "jpeg-30": _jpeg(30),
        "half-size": _through(0.5),
        "crop-0.85": _placed(across=1 / 0.85, along=1 / 0.85),
        "aspect-0.85": _placed(across=0.85),
        "aspect-1.15": _placed(across=1.15),
        "rotation-left-10": _placed(degrees=10),
        "rotation-right-10": _placed(degrees=-10),
        "marker": _marker,
    }
)
"""By name, what is done to an image, uint8 (H, W) to uint8 (H, W)."""


def changed(images: Picture, name: str) -> Picture:
    """Apply one change to every image.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, H, W)
        As packed.
    name : str
        One of `CHANGES`.

    Returns
    -------
    ndarray of uint8, shape (n, H, W)

    Raises
    ------
    KeyError
        For an unknown name.
    """
    change = CHANGES[name]
    return np.stack([change(image) for image in images])


@dataclass(frozen=True)
class Robustness:
    """How a model does on changed images.

    Attributes
    ----------
    auc : mapping of str to float
        By change.
    sensitivity, specificity : mapping of str to float
        By change, at one threshold that was chosen on unchanged images.
    """

    auc: Mapping[str, float]
    sensitivity: Mapping[str, float]
    specificity: Mapping[str, float]

    @property
    def mean_auc(self) -> float:
        """Mean over the changes; the unchanged images are none of them."""
        return float(np.mean(list(self.auc.values())))

    @property
    def mean_specificity(self) -> float:
        """Mean over the changes."""
        return float(np.mean(list(self.specificity.values())))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "mean_auc": self.mean_auc,
            "auc": dict(self.auc),
            "sensitivity": dict(self.sensitivity),
            "specificity": dict(self.specificity),
        }


def assess(
    score: Callable[[Picture], npt.NDArray[Any]], images: Picture, labels: npt.NDArray[Any], *, threshold: float
) -> Robustness:
    """Score the same images under every change.

    Parameters
    ----------
    score : callable
        Takes uint8 (n, H, W), returns scores (n,) in [0, 1].
    images : ndarray of uint8, shape (n, H, W)
        As packed.
    labels : ndarray of int, shape (n,)
        0 or 1, both present.
    threshold : float
        Chosen on other, unchanged images; PNEUMONIA is called where a score is above it.

    Returns
    -------
    Robustness
    """
    found: dict[str, tuple[float, float, float]] = {}
    for name in CHANGES:
        scores = score(changed(images, name))
        called = scores > threshold
        estimate = intervals.delong(labels, scores)
        found[name] = (
            estimate.auc if estimate else float("nan"),
            float(called[labels == 1].mean()),
            float((~called[labels == 0]).mean()),
        )
    return Robustness(*({name: values[index] for name, values in found.items()} for index in range(3)))
