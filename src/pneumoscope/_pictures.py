"""PNGs of one answer: the image, its evidence, and both together.

Owns their size and encoding. What evidence looks like is in `evidence`. Knows nothing of HTTP.
"""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from pneumoscope import evidence, images
from pneumoscope.predictor import Description

SMALLEST_PX: Final = 448
"""Pictures with evidence have at least this side: whole multiples of what the network sees."""

LARGEST_PX: Final = 1024
"""Longest side of the image alone."""

_EFFORT: Final = 3  # zlib's; 6 takes three times as long and saves a tenth

Grey = npt.NDArray[np.uint8]


def grey_png(data: bytes, *, header: images.Header | None = None) -> bytes:
    """Decode a file and return it as a grey PNG of at most `LARGEST_PX`; raises ImageError as `images.decode`."""
    del header  # only for those who ask before they decode
    picture = Image.fromarray(images.decode(data, at_least_px=LARGEST_PX))
    picture.thumbnail((LARGEST_PX, LARGEST_PX), Image.Resampling.BILINEAR)
    return _png(picture)


def overlay_png(pixels: Grey, cells: npt.NDArray[Any], known: Description) -> bytes:
    """Return what the network saw (H, H) with its evidence (h, h) laid over it."""
    times, grid = _larger(known)
    side = times * known.size_px
    large = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))
    return _png(Image.fromarray(evidence.overlay(large, cells, grid=grid, scale=known.evidence_scale)))


def evidence_png(pixels: Grey, cells: npt.NDArray[Any], known: Description) -> bytes:
    """Return the evidence (h, h) alone, to be laid over the image (H, H): opaque where it has full colour."""
    times, grid = _larger(known)
    side = times * len(pixels)
    strength = np.clip(evidence.enlarged(cells, size_px=side, grid=grid) / known.evidence_scale, -1, 1)
    colour = np.where(strength[..., None] > 0, evidence.FOR, evidence.AGAINST)
    alpha = np.rint(255 * np.abs(strength))[..., None]
    return _png(Image.fromarray(np.concatenate([colour, alpha], axis=-1).astype(np.uint8)))


def _larger(known: Description) -> tuple[int, evidence.Grid]:
    """Return how many pixels one becomes along an axis, and where the cells lie then."""
    times = -(-SMALLEST_PX // known.size_px)
    first = known.grid.first_px * times + (times - 1) / 2  # centres of pixels, not their edges
    return times, evidence.Grid(first, known.grid.step_px * times)


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=_EFFORT)
    return out.getvalue()
