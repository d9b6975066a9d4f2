"""Evidence maps as arrays: where their cells lie, how they look on the image, and whether to believe them.

Owns the `Grid`, a map drawn over its image (arrays only; bars and titles are for `figures`), how much of a map lies
where no lung is, and the checks that change images and watch the score. Knows nothing of networks: whatever scores
images is a function here. Where maps come from is in `explainer`.

A map is signed and in units of the logit: above 0 speaks for PNEUMONIA, below for NORMAL. It shows what the model used,
which need not be where the illness is (Saporta et al. 2022, https://doi.org/10.1038/s42256-022-00536-x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata

from pneumoscope.errors import UsageError

Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

Score = Callable[[Images], npt.NDArray[Any]]
"""Scores images: uint8 ``(n, H, W)`` to ``(n,)``, the score or the logit; called with at most `BATCH` at a time."""

BATCH: Final = 32
"""Changed images in memory at a time."""

CORNERS: Final = ("top left", "top right", "bottom left", "bottom right")
"""Where `marker_changes` pastes the letter, in the order of its columns."""

FOR: Final = (178, 24, 43)
"""Red: evidence for PNEUMONIA. With `AGAINST`, the ends of ColorBrewer's RdBu, told apart by the colour-blind too."""

AGAINST: Final = (33, 102, 172)
"""Blue: evidence for NORMAL."""

OPACITY: Final = 0.65
"""Of the colour at full strength; the image stays visible under it."""

_DARK_SHARE: Final = 0.15  # of the image's brightest grey; what is darker may be air around the body
_LINE_SHARE: Final = 0.1  # of a row's or column's pixels must be brighter, which a marker's are not
_BLUR_SHARE: Final = 0.1  # sigma of the blur that hides a place, as a share of the image's side
_STROKES: Final = {  # right and down, in heights of the letter
    "L": [[(0.0, 0.0), (0.0, 1.0), (0.6, 1.0)]],
    "R": [
        [(0.0, 1.0), (0.0, 0.0), (0.45, 0.0), (0.6, 0.12), (0.6, 0.38), (0.45, 0.5), (0.0, 0.5)],
        [(0.28, 0.5), (0.65, 1.0)],
    ],
}


@dataclass(frozen=True)
class Grid:
    """Where the cells of a square evidence map lie in a square image, the same along both axes.

    Attributes
    ----------
    first_px : float
        Centre of the first cell, pixels from the centre of the first pixel.
    step_px : float
        From one cell's centre to the next, pixels.
    """

    first_px: float
    step_px: float

    def cell_of(self, n_pixels: int, n_cells: int) -> npt.NDArray[np.intp]:
        """Return the number of the nearest cell for each pixel along an axis.

        Parameters
        ----------
        n_pixels, n_cells : int
            Along the axis.

        Returns
        -------
        ndarray of intp, shape (n_pixels,)
        """
        nearest = np.rint((np.arange(n_pixels) - self.first_px) / self.step_px)
        return np.asarray(np.clip(nearest, 0, n_cells - 1), dtype=np.intp)


def enlarged(maps: npt.NDArray[Any], *, size_px: int, grid: Grid) -> Floats:
    """Interpolate maps to the image's size, bilinearly between the centres of cells, constant outside the outer ones.

    Parameters
    ----------
    maps : ndarray, shape (..., h, w)
        Evidence.
    size_px : int
        Side of the image.
    grid : Grid
        Of the model that made the maps.

    Returns
    -------
    ndarray of float64, shape (..., size_px, size_px)
        Evidence at each pixel, in units of the logit per cell.
    """

    def weights(cells: int) -> Floats:
        """Share of each cell in each pixel, shape (size_px, cells)."""
        at = np.clip((np.arange(size_px) - grid.first_px) / grid.step_px, 0, cells - 1)
        return np.asarray(np.clip(1 - np.abs(at[:, None] - np.arange(cells)), 0, None), dtype=np.float64)

    height, width = maps.shape[-2:]
    return np.asarray(weights(height) @ maps.astype(np.float64) @ weights(width).T)


def overlay(image: Images, evidence: npt.NDArray[Any], *, grid: Grid, scale: float) -> Images:
    """Colour an image by its evidence: red for PNEUMONIA, blue for NORMAL, the stronger the less see-through.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, H)
        Grey.
    evidence : ndarray, shape (h, h)
        Its map.
    grid : Grid
        Of the model that made the map.
    scale : float
        Evidence per cell that gets full colour, above 0; the same for all pictures that are compared.

    Returns
    -------
    ndarray of uint8, shape (H, H, 3)
        Red, green, blue.

    Raises
    ------
    UsageError
        Where `scale` is not above 0.
    """
    if not scale > 0:
        raise UsageError(f"The scale of the overlay is {scale}; pass the evidence that gets full colour, above 0.")
    strength = np.clip(enlarged(evidence, size_px=len(image), grid=grid) / scale, -1, 1)[..., None]
    colour = np.where(strength > 0, FOR, AGAINST)
    opacity = OPACITY * np.abs(strength)
    return np.asarray(np.rint(image[..., None] * (1 - opacity) + colour * opacity), dtype=np.uint8)


def body_box(image: Images) -> tuple[slice, slice]:
    """Find the rectangle that holds the body: rows and columns that are not nearly all dark.

    A pixel counts as body where it is brighter than 0.15 of the image's 99th percentile; a row or column where more
    than a tenth of its pixels are, so that the letter of a marker does not count.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W)
        Air dark, bone bright.

    Returns
    -------
    rows, columns : slice
        The whole image where nothing in it is bright.
    """
    bright = image > _DARK_SHARE * np.percentile(image, 99)

    def span(lines: npt.NDArray[np.bool_]) -> slice:
        at = np.flatnonzero(lines)
        return slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, len(lines))

    return span(bright.mean(axis=1) > _LINE_SHARE), span(bright.mean(axis=0) > _LINE_SHARE)


@dataclass(frozen=True, eq=False)
class Shares:
    """How much of each map's absolute evidence lies where no lung is, beside how much of the image that is.

    Attributes
    ----------
    border, corners, outside : ndarray of float64, shape (n,)
        Share of the evidence in the border, in the four corners and outside the body's box, in [0, 1]; NaN where a map
        is all zero. Evidence spread evenly would have the share of the area.
    border_area, corners_area : float
        Share of the image, in [0, 1].
    outside_area : ndarray of float64, shape (n,)
        Share of each image, in [0, 1].
    """

    border: Floats
    corners: Floats
    outside: Floats
    border_area: float
    corners_area: float
    outside_area: Floats


def shares(images: Images, maps: npt.NDArray[Any], *, grid: Grid, border_px: int, corner_px: int) -> Shares:
    """Measure how much of each map lies in the border, in the corners and outside the body.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, H, H)
        Grey.
    maps : ndarray, shape (n, h, h)
        Their evidence.
    grid : Grid
        Of the model that made the maps.
    border_px : int
        Width of the border, for example `appearance.border_px`; at least 1 and less than half of H.
    corner_px : int
        Side of the squares in the corners, where markers are; likewise.

    Returns
    -------
    Shares

    Raises
    ------
    UsageError
        Where the border or the corners do not fit into the image.
    """
    size_px = images.shape[1]
    for name, width in (("border", border_px), ("corner", corner_px)):
        if not 1 <= width < size_px / 2:
            raise UsageError(
                f"The {name} is {width} px wide in images of {size_px} px; pass at least 1 and less than half the side."
            )
    edge, ends = np.ones((size_px, size_px), dtype=bool), np.zeros(size_px, dtype=bool)
    edge[border_px:-border_px, border_px:-border_px] = False
    ends[:corner_px] = ends[-corner_px:] = True
    corner = ends[:, None] & ends
    outside = np.ones(images.shape, dtype=bool)
    for at, image in enumerate(images):
        outside[(at, *body_box(image))] = False
    strength = np.abs(np.stack([enlarged(each, size_px=size_px, grid=grid) for each in maps]))
    total = strength.sum(axis=(1, 2))
    total[total == 0] = np.nan
    border, corners, beyond = ((strength * where).sum(axis=(1, 2)) / total for where in (edge, corner, outside))
    return Shares(border, corners, beyond, float(edge.mean()), float(corner.mean()), outside.mean(axis=(1, 2)))


def similarity(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> Floats:
    """Compare maps pair by pair: Spearman's rank correlation over their cells, signs kept.

    Parameters
    ----------
    first, second : ndarray, shape (n, h, w)
        Maps of the same images.

    Returns
    -------
    ndarray of float64, shape (n,)
        In [-1, 1]; NaN where either map has the same value everywhere.
    """
    ranks = [rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (first, second)]
    one, two = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    length = np.sqrt((one**2).sum(axis=1) * (two**2).sum(axis=1))
    length[length == 0] = np.nan
    return np.asarray((one * two).sum(axis=1) / length, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Curves:
    """The score while an image is taken apart and put together in the order of its evidence.

    Attributes
    ----------
    share : ndarray of float64, shape (k,)
        Of the pixels that are changed, from 0 to 1.
    deletion : ndarray of float64, shape (k,)
        The score when that share, strongest evidence for PNEUMONIA first, is hidden.
    insertion : ndarray of float64, shape (k,)
        The score when only that share is shown.
    """

    share: Floats
    deletion: Floats
    insertion: Floats

    @property
    def deletion_area(self) -> float:
        """Mean score over the deletion curve; lower where the map finds what the score stands on."""
        return float(np.trapezoid(self.deletion, self.share))

    @property
    def insertion_area(self) -> float:
        """Mean score over the insertion curve; higher where the map finds what the score stands on."""
        return float(np.trapezoid(self.insertion, self.share))


def perturbation(score: Score, image: Images, evidence: npt.NDArray[Any], *, grid: Grid, steps: int = 49) -> Curves:
    """Hide and show an image cell by cell in the order of its evidence, and score it each time.

    Deletion and insertion of Petsiuk, Das and Saenko (2018), "RISE", https://arxiv.org/abs/1806.07421; a hidden pixel
    has the value of the blurred image (Gaussian, sigma a tenth of the side), which leaves no edges to be seen. An area
    means little alone: compare it with that of the same map with its cells in random order.

    Parameters
    ----------
    score : callable
        See `Score`.
    image : ndarray of uint8, shape (H, H)
        Grey.
    evidence : ndarray, shape (h, h)
        Its map.
    grid : Grid
        Of the model that made the map.
    steps : int
        Into how many parts the cells are divided, 1 or more; at most as many as there are cells.

    Returns
    -------
    Curves
        With at most ``steps + 1`` points.
    """
    order = np.argsort(-evidence.ravel(), kind="stable")
    rank = np.empty(evidence.size, dtype=np.intp)
    rank[order] = np.arange(evidence.size)
    down, across = (grid.cell_of(len(image), cells) for cells in evidence.shape)
    rank_of_pixel = rank.reshape(evidence.shape)[np.ix_(down, across)]
    counts = np.linspace(0, evidence.size, min(steps, evidence.size) + 1).round().astype(int)
    chosen = [rank_of_pixel < count for count in counts]
    hidden = _blurred(image)
    deleted = _scored(score, (np.where(where, hidden, image) for where in chosen))
    inserted = _scored(score, (np.where(where, image, hidden) for where in chosen))
    return Curves(np.array([where.mean() for where in chosen]), deleted, inserted)


def occlusion(score: Score, image: Images, *, cell_px: int) -> Floats:
    """Measure without the model's help how much each place matters: the score lost when it is hidden.

    Occlusion of Zeiler and Fergus (2014), "Visualizing and Understanding Convolutional Networks", section 4.2; hidden
    pixels have the value of the blurred image, as in `perturbation`.

    Parameters
    ----------
    score : callable
        See `Score`.
    image : ndarray of uint8, shape (H, W)
        Grey.
    cell_px : int
        Side of the square that is hidden, 1 or more; squares lie side by side, those at the right and lower edge may be
        smaller.

    Returns
    -------
    ndarray of float64, shape (ceil(H / cell_px), ceil(W / cell_px))
        Score of the image less that with the square hidden: above 0 where the square speaks for PNEUMONIA.

    Raises
    ------
    UsageError
        Where `cell_px` is below 1.
    """
    if cell_px < 1:
        raise UsageError(f"The square to hide is {cell_px} px wide; pass 1 or more.")
    hidden = _blurred(image)
    tops, lefts = (range(0, side, cell_px) for side in image.shape)

    def changed() -> Iterator[Images]:
        yield image
        for top in tops:
            for left in lefts:
                square = slice(top, top + cell_px), slice(left, left + cell_px)
                copy = image.copy()
                copy[square] = hidden[square]
                yield copy

    whole, *others = _scored(score, changed())
    return np.asarray(whole - np.reshape(others, (len(tops), len(lefts))), dtype=np.float64)


def marker_changes(score: Score, images: Images, *, letter: str = "R") -> Floats:
    """Paste the letter that marks a side into each corner and measure what the score makes of it.

    The letter is 6 % of the side high, light grey, 4 % from the edges. A model that looks at lungs does not care.

    Parameters
    ----------
    score : callable
        See `Score`.
    images : ndarray of uint8, shape (n, H, W)
        Grey.
    letter : {"L", "R"}
        Which.

    Returns
    -------
    ndarray of float64, shape (n, 4)
        Score with the letter less that without, in the order of `CORNERS`.

    Raises
    ------
    UsageError
        For another letter.
    """
    if letter not in _STROKES:
        raise UsageError(f"There is no marker {letter!r}; choose one of {', '.join(_STROKES)}.")

    def changed() -> Iterator[Images]:
        for image in images:
            yield image
            for corner in CORNERS:
                yield _marked(image, letter, corner)

    values = _scored(score, changed()).reshape(len(images), 1 + len(CORNERS))
    return values[:, 1:] - values[:, :1]


def _marked(image: Images, letter: str, corner: str) -> Images:
    height, width = image.shape
    size, inset = 0.06 * height, 0.04 * height
    left = width - 1 - inset - 0.65 * size if "right" in corner else inset
    top = height - 1 - inset - size if "bottom" in corner else inset
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    for stroke in _STROKES[letter]:
        points = [(left + size * right, top + size * down) for right, down in stroke]
        pen.line(points, fill=225, width=max(1, round(size / 7)), joint="curve")
    return np.asarray(picture)


def _blurred(image: Images) -> Images:
    blurred = gaussian_filter(image.astype(np.float64), sigma=_BLUR_SHARE * len(image))
    return np.asarray(np.rint(blurred), dtype=np.uint8)


def _scored(score: Score, images: Iterable[Images]) -> Floats:
    """Score images as they come, `BATCH` at a time."""
    values: list[npt.NDArray[Any]] = []
    waiting: list[Images] = []
    for image in images:
        waiting.append(image)
        if len(waiting) == BATCH:
            values.append(score(np.stack(waiting)))
            waiting = []
    if waiting:
        values.append(score(np.stack(waiting)))
    return np.concatenate([np.empty(0), *values]).astype(np.float64)
