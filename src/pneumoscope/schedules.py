"""Schedules: how the learning rate moves through a training, which epoch is kept, and when it is enough.

Owns that arithmetic alone. Knows nothing of networks, images or files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pneumoscope.specs import TrainSpec


@dataclass
class Schedule:
    """EarlyStopping and ReduceLROnPlateau on the validation loss, as Keras defines them, with nothing hidden.

    Attributes
    ----------
    learning_rate : float
        In force.
    best_loss, best_epoch, wait
        EarlyStopping's.
    plateau_loss, plateau_wait
        ReduceLROnPlateau's.
    """

    learning_rate: float
    best_loss: float = float("inf")
    best_epoch: int = 0
    wait: int = 0
    plateau_loss: float = float("inf")
    plateau_wait: int = 0

    def update(self, val_loss: float, *, epoch: int, spec: TrainSpec) -> bool:
        """Take in one epoch's validation loss.

        Parameters
        ----------
        val_loss : float
            In nats; a NaN is never an improvement.
        epoch : int
            From 1.
        spec : TrainSpec
            Patience, smallest gains and the factor.

        Returns
        -------
        bool
            Whether this epoch is the best so far. `exhausted` tells whether to stop.
        """
        improved = val_loss < self.best_loss - spec.min_delta
        if spec.schedule == "cosine":
            improved = math.isfinite(val_loss)  # the last epoch is the one that counts, unless it went wrong
        if improved:
            self.best_loss, self.best_epoch, self.wait = val_loss, epoch, 0
        else:
            self.wait += 1
        if spec.schedule == "cosine":
            return improved
        if val_loss < self.plateau_loss - spec.plateau_min_delta:
            self.plateau_loss, self.plateau_wait = val_loss, 0
        else:
            self.plateau_wait += 1
            if self.plateau_wait >= spec.plateau_patience:
                self.learning_rate *= spec.plateau_factor
                self.plateau_wait = 0
        return improved

    def exhausted(self, spec: TrainSpec) -> bool:
        """Whether early stopping ends the training now."""
        return spec.schedule == "plateau" and self.wait >= spec.patience


def cosine(progress: float, *, warmup: float) -> float:
    """Return which part of the full learning rate holds at some point of a training.

    Parameters
    ----------
    progress : float
        Steps done as a share of all, in [0, 1].
    warmup : float
        The share over which the rate rises linearly, in (0, 1).

    Returns
    -------
    float
        In [0, 1]; after the rise, half a cosine down to 0 (Loshchilov and Hutter 2017, without restarts,
        https://arxiv.org/abs/1608.03983).
    """
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
