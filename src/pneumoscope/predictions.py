"""The Predictions table: one row per scored image, from which every count, curve and table is computed.

Owns the table's columns and its reading and writing. Computes no figure of merit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from pneumoscope.errors import DataError

COLUMNS: tuple[str, ...] = ("path", "image_id", "split", "label", "score", "probability")


@dataclass(frozen=True)
class Predictions:
    """Scores of one model on labelled images.

    Attributes
    ----------
    table : DataFrame
        Columns ``path, image_id, split, label, score, probability``: ``label`` int8 0 or 1, ``score`` float32 in
        [0, 1] (the uncalibrated sigmoid), ``probability`` float32 in [0, 1] or NaN where none was fitted.
    """

    table: pd.DataFrame

    @classmethod
    def of(cls, rows: pd.DataFrame, scores: npt.ArrayLike) -> Self:
        """Join a Catalog's rows with their scores.

        Parameters
        ----------
        rows : DataFrame
            With the columns ``path, image_id, split, label``.
        scores : array_like of float32, shape (n,)
            In the order of `rows`, each in [0, 1].

        Returns
        -------
        Predictions

        Raises
        ------
        DataError
            Where the lengths differ or a score is not a number in [0, 1].
        """
        values = np.asarray(scores, dtype=np.float32)
        if values.shape != (len(rows),):
            raise DataError(f"There are {values.shape} scores for {len(rows)} images; give one score per image.")
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise DataError("A score is not a number from 0 to 1; the model is damaged, train it again.")
        table = rows.loc[:, ["path", "image_id", "split", "label"]].reset_index(drop=True)
        table["label"] = table["label"].astype(np.int8)
        table["score"] = values
        table["probability"] = np.float32(np.nan)
        return cls(table.loc[:, list(COLUMNS)])

    @classmethod
    def concat(cls, parts: Iterable[Predictions]) -> Self:
        """Put several tables under one another."""
        return cls(pd.concat([part.table for part in parts], ignore_index=True))

    def __len__(self) -> int:
        return len(self.table)

    def of_split(self, split: str) -> Predictions:
        """Return the rows of one split."""
        return Predictions(self.table[self.table["split"] == split].reset_index(drop=True))

    @property
    def labels(self) -> npt.NDArray[np.int8]:
        """Labels, int8 of shape (n,), 0 NORMAL and 1 PNEUMONIA."""
        return self.table["label"].to_numpy(dtype=np.int8)

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """Scores, float64 of shape (n,) holding the exact float32 values, in [0, 1]."""
        return self.table["score"].to_numpy(dtype=np.float64)
