"""Baselines that see no lung: how much of a model's figure could be had for free.

Owns the measures of a file that no diagnosis should need (size, quality, brightness, border) and two classifiers made
of them, whose Predictions stand beside every model's. Knows nothing of networks, and computes no figure of merit.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pneumoscope import images
from pneumoscope._backend import available_cores
from pneumoscope.errors import DataError, ImageError
from pneumoscope.predictions import Predictions
from pneumoscope.specs import LABELS
from pneumoscope.store import ImageStore

MEASURES: Final = (
    "width_px", "height_px", "aspect", "file_bytes", "jpeg_quality", "mean", "contrast", "border_mean", "border_std"
)  # fmt: skip
"""Columns of `measures` that `baseline` learns from."""

COLUMNS: Final = ("path", "image_id", *MEASURES, "frames", "orientation")
"""Columns of `measures`, in order."""

BORDER_SHARE: Final = 0.08
"""Width of the border, as a share of the packed image's side."""

_BLOCK = 64  # files or packed images in memory at a time
_ORIENTATION = 0x0112  # the EXIF tag
# ITU-T T.81 (1992), table K.1: the luminance quantisation that libjpeg scales with its quality setting
_LUMINANCE = np.array([
    16, 11, 10, 16,  24,  40,  51,  61,
    12, 12, 14, 19,  26,  58,  60,  55,
    14, 13, 16, 24,  40,  57,  69,  56,
    14, 17, 22, 29,  51,  87,  80,  62,
    18, 22, 37, 56,  68, 109, 103,  77,
    24, 35, 55, 64,  81, 104, 113,  92,
    49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103,  99,
])  # fmt: skip

ReadBytes = Callable[[str], bytes]
"""Gives the bytes of the image at a Catalog's ``path``, as `Catalog.read_bytes`; called from several threads."""

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


def measures(
    rows: pd.DataFrame, *, store: ImageStore, read_bytes: ReadBytes, progress: Progress | None = None
) -> pd.DataFrame:
    """Measure what can be known of each image without looking at the lung.

    Sizes and quality come from the files' headers, grey values from the packed images, which every model sees.

    Parameters
    ----------
    rows : DataFrame
        Usable rows of a Catalog, with the columns ``path, image_id, width_px, height_px, file_bytes``.
    store : ImageStore
        Holds these images.
    read_bytes : callable
        Path -> bytes; `Catalog.read_bytes`.
    progress : callable, optional
        Called with (done, total) images.

    Returns
    -------
    DataFrame, n rows in the order of `rows`, numbered from 0
        ``path``; ``image_id``; ``width_px``, ``height_px`` (of the file, its EXIF orientation applied); ``aspect``
        (width / height); ``file_bytes``; ``jpeg_quality`` (1 to 100, see `jpeg_quality_of`; NaN for other formats);
        of the packed image, in grey levels from 0 to 255: ``mean`` and ``contrast`` (standard deviation) over all
        pixels, ``border_mean`` and ``border_std`` over the frame of the outer `BORDER_SHARE`; ``frames`` (pages);
        ``orientation`` (EXIF, 1 to 8; 1, upright, where the file says nothing).

    Raises
    ------
    DataError
        Where a file cannot be read any more.
    StoreError
        Where an image is not in the store.
    """
    grey = _grey_values(rows, store)
    paths = rows["path"].tolist()
    headers: list[dict[str, float]] = []
    with ThreadPoolExecutor(available_cores()) as pool:  # reading waits for the disk
        for start in range(0, len(paths), _BLOCK):  # a block at a time: originals are large
            headers += _headers(paths[start : start + _BLOCK], pool.map(read_bytes, paths[start : start + _BLOCK]))
            if progress is not None:
                progress(len(headers), len(paths))
    table = rows[["path", "image_id", "width_px", "height_px", "file_bytes"]].reset_index(drop=True)
    table["aspect"] = table["width_px"] / table["height_px"]
    told = pd.DataFrame(headers, columns=["jpeg_quality", "frames", "orientation"], dtype=np.float64)
    told = told.astype({"frames": "int64", "orientation": "int64"})
    return pd.concat([table, told, grey], axis="columns")[list(COLUMNS)]


def jpeg_quality_of(table: npt.ArrayLike) -> int:
    """Estimate the quality setting that a JPEG was saved with.

    libjpeg scales table K.1 of ITU-T T.81 by 5000 / quality per cent below 50 and by 200 - 2 quality per cent from
    there, rounds, and keeps each step from 1 to 255. The estimate is the quality whose table is nearest in the sum of
    absolute differences; of several equally near, the lowest. Files of other makers' tables get the nearest setting.

    Parameters
    ----------
    table : array_like of int, shape (64,)
        The luminance quantisation table, row by row, as Pillow gives it.

    Returns
    -------
    int
        From 1 to 100.
    """
    return int(np.abs(_TABLES - np.asarray(table, dtype=np.int64)).sum(axis=1).argmin()) + 1


def _tables() -> npt.NDArray[np.int64]:
    """Return libjpeg's luminance tables for the qualities 1 to 100, shape (100, 64)."""
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.asarray(np.clip((_LUMINANCE * scale[:, None] + 50) // 100, 1, 255), dtype=np.int64)


_TABLES = _tables()


def _headers(paths: Sequence[str], contents: Iterator[bytes]) -> list[dict[str, float]]:
    found = []
    for path in paths:
        try:
            found.append(_header(next(contents)))
        except ImageError as error:
            raise DataError(
                f"{path} was listed but cannot be used now ({error.reason}); make it readable and run again."
            ) from error
    return found


def _header(data: bytes) -> dict[str, float]:
    """Return what a file's header tells beside its size; no pixel is decoded."""
    header = images.read_header(data)  # refuses what must not be opened
    if header.format == "NPY":
        return {"jpeg_quality": np.nan, "frames": 1, "orientation": 1}
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        tables = getattr(image, "quantization", None)
        orientation = image.getexif().get(_ORIENTATION, 1)
    return {
        "jpeg_quality": jpeg_quality_of(tables[min(tables)]) if tables else np.nan,
        "frames": header.frames,
        "orientation": orientation if orientation in range(1, 9) else 1,
    }


def _grey_values(rows: pd.DataFrame, store: ImageStore) -> pd.DataFrame:
    """Return mean and spread of the packed images and of their borders, in grey levels."""
    border = _border_px(store.size_px)
    frame = np.ones((store.size_px, store.size_px), dtype=np.bool_)
    frame[border:-border, border:-border] = False
    found = np.empty((len(rows), 4))
    for block, pictures in _blocks(rows, store):
        edges = pictures[:, frame]
        found[block] = np.column_stack(
            [pictures.mean(axis=(1, 2)), pictures.std(axis=(1, 2)), edges.mean(axis=1), edges.std(axis=1)]
        )
    return pd.DataFrame(found, columns=["mean", "contrast", "border_mean", "border_std"])


def _blocks(rows: pd.DataFrame, store: ImageStore) -> Iterator[tuple[slice, npt.NDArray[np.uint8]]]:
    """Yield (which rows, their packed images), so many at a time that memory does not grow with the data."""
    at = store.rows_of(rows) if len(rows) else np.empty(0, dtype=np.intp)
    for start in range(0, len(at), _BLOCK):
        block = slice(start, start + _BLOCK)
        yield block, store.images[at[block]]


def _border_px(size_px: int) -> int:
    return max(1, round(BORDER_SHARE * size_px))


# --- two classifiers that see no lung --------------------------------------------------------------------------------


def baseline(rows: pd.DataFrame, *, measured: pd.DataFrame) -> Predictions:
    """Score images by their files' measures alone.

    The classifier is a logistic regression on `MEASURES`: what is missing is filled with the median of the train rows,
    and a column of 0 and 1 says where it was missing; each column is standardised; then scikit-learn's
    ``LogisticRegression`` with its own defaults (L2, C = 1). All of it is fitted on the train rows only; nothing is
    tuned. ``mean`` and ``contrast`` are of the whole picture, lungs included, but know no place in it; so is
    ``file_bytes`` where all files were saved at one size and quality, for then it tells how much texture they hold.

    Parameters
    ----------
    rows : DataFrame
        Usable rows of a Catalog, with the columns ``path, image_id, split, label``; those whose split is ``train`` are
        learned from, all others are scored.
    measured : DataFrame
        What `measures` gave for the same rows, in the same order.

    Returns
    -------
    Predictions
        Of the rows outside train, in their order; ``score`` is the probability of PNEUMONIA, float32 in [0, 1].

    Raises
    ------
    DataError
        Where `measured` is of other images, or the train rows lack a class.
    """
    if measured["path"].tolist() != rows["path"].tolist():
        raise DataError(
            f"The {len(measured):,} measured images are not the {len(rows):,} images to score, in their order; "
            "measure these images first."
        )
    return _learn_and_score(rows, measured[list(MEASURES)].to_numpy(dtype=np.float64))


def border_probe(rows: pd.DataFrame, *, store: ImageStore) -> Predictions:
    """Score images by the border of the packed image alone, with nothing of its middle.

    The border is the frame of the outer `BORDER_SHARE` of the side (18 of 224 px, at least 1 px). It is cut into cells
    about as long as it is wide, the four corners among them (44 cells at 224 px), and each cell's mean grey value is
    one column for the classifier that `baseline` describes. In tightly collimated pictures the border may touch the
    shoulders, the belly and the lungs' outer edge; it never holds their middle.

    Parameters
    ----------
    rows : DataFrame
        As for `baseline`.
    store : ImageStore
        Holds these images.

    Returns
    -------
    Predictions
        As `baseline`.

    Raises
    ------
    DataError
        Where the train rows lack a class.
    StoreError
        Where an image is not in the store.
    """
    cells = _border_cells(store.size_px)
    values = np.empty((len(rows), len(cells)))
    for block, pictures in _blocks(rows, store):
        for at, (down, across) in enumerate(cells):
            values[block, at] = pictures[:, down, across].mean(axis=(1, 2))
    return _learn_and_score(rows, values)


def _border_cells(size_px: int) -> list[tuple[slice, slice]]:
    """Return (rows, columns) of each cell of the border, in reading order."""
    width = _border_px(size_px)
    inner = np.linspace(width, size_px - width, max(round(size_px / width) - 1, 2)).astype(int).tolist()
    edges = [0, *inner, size_px]
    sides = [slice(first, last) for first, last in pairwise(edges)]
    ends = (sides[0], sides[-1])
    return [(down, across) for down in sides for across in sides if down in ends or across in ends]


def _learn_and_score(rows: pd.DataFrame, values: npt.NDArray[np.float64]) -> Predictions:
    """Fit the classifier on the train rows, shape (n, columns), and score the others."""
    train = (rows["split"] == "train").to_numpy()
    labels = rows["label"].to_numpy(dtype=np.int8)
    counts = np.bincount(labels[train], minlength=2)
    if not counts.all():
        raise DataError(
            f"The train rows hold {counts[0]:,} {LABELS[0]} and {counts[1]:,} {LABELS[1]} images, but a baseline "
            "learns from both classes; split the images so that train holds both."
        )
    classifier = make_pipeline(
        SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True),
        StandardScaler(),
        LogisticRegression(max_iter=10_000),
    )
    classifier.fit(values[train], labels[train])
    held = rows[~train]
    scores = classifier.predict_proba(values[~train])[:, 1] if len(held) else np.empty(0)
    return Predictions.of(held, scores)
