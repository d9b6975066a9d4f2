"""Baselines that see no lung: how much of a model's figure could be had for free.

Owns two classifiers made of what no diagnosis should need (size, quality, brightness, border), whose Predictions stand
beside every model's. How an image looks is measured in `appearance`. Knows nothing of networks, and computes no figure
of merit.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pneumoscope import appearance
from pneumoscope.errors import DataError
from pneumoscope.predictions import Predictions
from pneumoscope.specs import LABELS
from pneumoscope.store import ImageStore

_LEFT_OUT: Final = ("path", "image_id", "frames", "orientation")  # names, and what has a finding in `audit`

MEASURES: Final = tuple(name for name in appearance.MEASURES if name not in _LEFT_OUT)
"""Columns of `appearance.Looks.measures` that `baseline` learns from."""

_BLOCK: Final = 64  # packed images in memory at a time


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
        `appearance.Looks.measures` of the same images, in the same order.

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

    The border is `appearance.border_px` wide (18 of 224 px). It is cut into cells about as long as it is wide, the four
    corners among them (44 cells at 224 px), and each cell's mean grey value is one column for the classifier that
    `baseline` describes. In tightly collimated pictures the border may touch the shoulders, the belly and the lungs'
    outer edge; it never holds their middle.

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


def _blocks(rows: pd.DataFrame, store: ImageStore) -> Iterator[tuple[slice, npt.NDArray[np.uint8]]]:
    """Yield (which rows, their packed images), so many at a time that memory does not grow with the data."""
    at = store.rows_of(rows) if len(rows) else np.empty(0, dtype=np.intp)
    for start in range(0, len(at), _BLOCK):
        block = slice(start, start + _BLOCK)
        yield block, store.images[at[block]]


def _border_cells(size_px: int) -> list[tuple[slice, slice]]:
    """Return (rows, columns) of each cell of the border, in reading order."""
    width = appearance.border_px(size_px)
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
