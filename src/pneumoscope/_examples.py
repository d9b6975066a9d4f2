"""What a training learns from, one batch after the other: images as they are packed, or stored features of them.

Owns which random change, or which stored view, an example shows in an epoch: a pure function of (seed, epoch). Knows
nothing of networks or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from pneumoscope import augmentation, models
from pneumoscope.specs import AugmentSpec
from pneumoscope.store import ImageStore

Labels = npt.NDArray[np.float32]
Positions = npt.NDArray[np.intp] | slice


class Source(Protocol):
    """Training examples by position."""

    labels: Labels

    def batch(self, positions: Positions, epoch: int) -> Any:
        """Return a network's inputs."""


class Images:
    """Packed images, and where asked for the transforms that this epoch's augmentation applies."""

    def __init__(self, store: ImageStore, table: pd.DataFrame, augment: AugmentSpec | None, seed: int) -> None:
        self._images, self._rows = store.images, store.rows_of(table)
        self.labels = table["label"].to_numpy(dtype=np.float32)
        self._augment, self._seed = augment, seed
        self._drawn: tuple[int, npt.NDArray[Any]] = (-1, np.empty(0))

    def batch(self, positions: Positions, epoch: int) -> Any:
        """Return images, and how each is changed in this epoch where any is."""
        pixels = self._images[self._rows[positions], ..., None]
        if self._augment is None:
            return pixels
        if self._drawn[0] != epoch:
            seed = (self._seed, models.TRANSFORMS, epoch)
            self._drawn = epoch, augmentation.draw(self._augment, len(self._rows), seed=seed)
        return [pixels, self._drawn[1][positions]]


class Features:
    """Stored features; with augmented views, a random one of each image, the clean one among them, in each epoch."""

    def __init__(
        self,
        clean: npt.NDArray[Any],
        rows: npt.NDArray[np.intp],
        labels: Labels,
        *,
        augmented: Sequence[npt.NDArray[Any]] = (),
        augmented_rows: npt.NDArray[np.intp] | None = None,
        seed: int = 0,
    ) -> None:
        self._clean, self._rows, self.labels, self._seed = clean, rows, labels, seed
        self._augmented, self._augmented_rows = augmented, rows if augmented_rows is None else augmented_rows
        self._chosen: tuple[int, npt.NDArray[Any]] = (-1, np.empty(0))

    def batch(self, positions: Positions, epoch: int) -> Any:
        """Return the stored features that each image shows in this epoch, as float32."""
        return self._stored(positions, epoch).astype(np.float32)  # backends know float16 badly on CPUs

    def _stored(self, positions: Positions, epoch: int) -> npt.NDArray[Any]:
        stored = self._clean[self._rows[positions]]
        if not self._augmented:
            return stored
        if self._chosen[0] != epoch:
            generator = np.random.default_rng([self._seed, models.VIEW_CHOICE, epoch])
            self._chosen = epoch, generator.integers(0, 1 + len(self._augmented), len(self._rows))
        chosen, rows = self._chosen[1][positions], self._augmented_rows[positions]
        for view, features_ in enumerate(self._augmented, start=1):
            stored[chosen == view] = features_[rows[chosen == view]]
        return stored
