"""From stored values to greys: the steps by which DICOM shows a picture, as one table.

Owns windows, lookup tables, inversion, padding, and the ramp that is used where a file has no window. Knows nothing of
files: it is given numbers. Stored values have 16 bits at most, so that all that happens to them is a table of at most
65,536 greys, and a picture needs no copy in floating point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pneumoscope.errors import ImageError

PERCENTILES = (0.5, 99.5)
"""Between which values the ramp lies that stands in for a missing window."""

_BAND_ROWS = 256  # greys are looked up in bands, because NumPy makes eight bytes of each index

Floats = npt.NDArray[np.float64]
Map = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Tone:
    """What is made of stored values, in this order.

    Attributes
    ----------
    modality : callable, optional
        Stored values to the values that windows are given in; none where they are the same.
    voi : callable, optional
        These to greys from 0 to 255; a ramp between `PERCENTILES` where not given.
    inverted : bool
        Whether high greys are dark.
    padding : (int, int), optional
        First and last stored value that is no part of the picture.
    """

    modality: Map | None
    voi: Map | None
    inverted: bool
    padding: tuple[int, int] | None


def as_it_is(values: Floats) -> Floats:
    """Return the values: they are greys already."""
    return values


def window(center: float, width: float, function: str) -> Map | None:
    """Return the greys of a window.

    Parameters
    ----------
    center, width : float
        In values after the modality step.
    function : str
        ``LINEAR``, ``LINEAR_EXACT`` or ``SIGMOID`` (DICOM PS3.3 C.11.2.1.2.1, C.11.2.1.3.2 and C.11.2.1.3.1).

    Returns
    -------
    callable or None
        None for a window that nothing can be seen through: its width too small, a number not finite, a function
        unknown.
    """
    if not np.isfinite([center, width]).all() or width <= 0:
        return None
    if function == "LINEAR" and width >= 1:
        return lambda values: _ramp(values - (center - 0.5), width - 1)
    if function == "LINEAR_EXACT":
        return lambda values: _ramp(values - center, width)
    if function == "SIGMOID":
        return lambda values: 255 / (1 + np.exp(np.clip(-4 * ((values - center) / width), -700, 700)))
    return None


def lookup(table: Floats, first: int) -> Map:
    """Return the outputs of a lookup table (DICOM PS3.3 C.11.1.1).

    Parameters
    ----------
    table : ndarray of float64, shape (n,)
    first : int
        The input that the first entry is for; lower ones get it too, and those beyond the end the last.
    """
    return lambda values: table[np.clip(np.rint(values) - first, 0, len(table) - 1).astype(np.int64)]


def show(stored: npt.NDArray[np.unsignedinteger], meanings: npt.NDArray[np.int64], tone: Tone) -> npt.NDArray[np.uint8]:
    """Show a picture.

    Parameters
    ----------
    stored : ndarray of uint8 or uint16, shape (H, W)
        Bit patterns.
    meanings : ndarray of int, shape (256,) or (65536,)
        The stored value that each pattern stands for.
    tone : Tone

    Returns
    -------
    ndarray of uint8, shape (H, W)
        0 is black, 255 white; padding is black.

    Raises
    ------
    ImageError
        Where the window makes a picture that is not of one grey all black or all white.
    """
    padded = np.zeros(len(meanings), dtype=np.bool_)
    if tone.padding is not None:
        padded = (meanings >= tone.padding[0]) & (meanings <= tone.padding[1])
    values = meanings.astype(np.float64)
    with np.errstate(over="ignore"):  # of a window as far away as numbers go: all is black or white then
        if tone.modality is not None:
            values = tone.modality(values)
        voi = tone.voi or _spread(stored, values, padded)
        table = np.clip(np.rint(voi(values)), 0, 255).astype(np.uint8)
    if tone.inverted:
        table = 255 - table
    table[padded] = 0
    pixels = np.empty(stored.shape, np.uint8)
    for band in _bands(stored):
        pixels[band] = table[stored[band]]
    if tone.voi is not None and pixels.min() == pixels.max() and stored.min() != stored.max():
        raise ImageError(
            "window shows nothing",
            "The DICOM file's window makes all pixels black or all white; export it with a window that fits.",
        )
    return pixels


def _ramp(distance: Floats, width: float) -> Floats:
    """Return 0 to 255 over `width`, with 127.5 at a distance of 0."""
    if width == 0:
        return np.where(distance > 0, 255.0, 0.0)
    return 255 * np.clip(distance / width + 0.5, 0, 1)


def _bands(stored: npt.NDArray[np.unsignedinteger]) -> list[slice]:
    return [slice(row, row + _BAND_ROWS) for row in range(0, len(stored), _BAND_ROWS)]


def _spread(stored: npt.NDArray[np.unsignedinteger], values: Floats, padded: npt.NDArray[np.bool_]) -> Map:
    """Return a ramp between two percentiles of the picture without its padding."""
    counts = np.zeros(len(values), np.int64)
    for band in _bands(stored):
        counts += np.bincount(stored[band].reshape(-1), minlength=len(values))
    counts[padded] = 0
    order = np.argsort(values, kind="stable")
    order = order[counts[order] > 0]
    if not len(order):
        return np.zeros_like
    reached = np.cumsum(counts[order])
    low, high = (values[order[np.searchsorted(reached, reached[-1] * share / 100)]] for share in PERCENTILES)
    if low == high:
        low, high = values[order[0]], values[order[-1]]
    return lambda found: _ramp(found - (low + high) / 2, high - low)
