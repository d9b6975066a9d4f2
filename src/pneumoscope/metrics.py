"""Numbers from Predictions: curves, counts, operating points, gathered in a frozen Evaluation.

An image is called PNEUMONIA when ``score > threshold``. Undefined figures are ``None``, never a pleasant number. Knows
nothing of networks, files or pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn import metrics as sk

from pneumoscope.errors import DataError
from pneumoscope.predictions import Predictions

HALF = 0.5
"""The threshold that the tutorial and most publications use."""

_CLIP = 1e-7  # as Keras clips probabilities in its binary cross-entropy

Scores = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int8]


@dataclass(frozen=True)
class RocCurve:
    """The receiver operating characteristic.

    Attributes
    ----------
    fpr, tpr : ndarray of float64, shape (k,)
        False and true positive rate, each rising from 0 to 1; empty where a class is missing.
    thresholds : ndarray of float64, shape (k,)
        Falling; at each, ``score > threshold`` gives the rates beside it. They lie midway between scores.
    auc : float or None
        Area under the curve in [0, 1]; None where a class is missing.
    n_positive, n_negative : int
        Images of each label.
    """

    fpr: Scores
    tpr: Scores
    thresholds: Scores
    auc: float | None
    n_positive: int
    n_negative: int


@dataclass(frozen=True)
class Confusion:
    """Counts at one threshold.

    Attributes
    ----------
    threshold : float
        Images with a score above it are called PNEUMONIA.
    true_negatives, false_positives, false_negatives, true_positives : int
        A false negative is a PNEUMONIA image called NORMAL, a false positive a NORMAL image called PNEUMONIA.
    """

    threshold: float
    true_negatives: int
    false_positives: int
    false_negatives: int
    true_positives: int

    @property
    def n(self) -> int:
        """Number of images."""
        return self.true_negatives + self.false_positives + self.false_negatives + self.true_positives

    @property
    def accuracy(self) -> float | None:
        """Share of right calls in [0, 1]; None without images."""
        return _share(self.true_negatives + self.true_positives, self.n)

    @property
    def sensitivity(self) -> float | None:
        """Share of PNEUMONIA images called so in [0, 1]; None where there are none."""
        return _share(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def specificity(self) -> float | None:
        """Share of NORMAL images called so in [0, 1]; None where there are none."""
        return _share(self.true_negatives, self.true_negatives + self.false_positives)

    def as_dict(self) -> dict[str, Any]:
        """Return the threshold, the counts and the shares under the names that ``metrics.json`` uses."""
        return {
            "threshold": self.threshold,
            "accuracy": self.accuracy,
            "false_negatives": self.false_negatives,
            "false_positives": self.false_positives,
            "true_negatives": self.true_negatives,
            "true_positives": self.true_positives,
            "sensitivity": self.sensitivity,
            "specificity": self.specificity,
        }


@dataclass(frozen=True)
class Evaluation:
    """All figures of one model on one split.

    Attributes
    ----------
    n, n_positive, n_negative : int
        Images, all and of each label.
    loss : float or None
        Mean binary cross-entropy in nats, 0 or more.
    roc : RocCurve
        With the AUC.
    at_half : Confusion
        Counts at threshold 0.5.
    operating_points : mapping of str to Confusion
        Counts at thresholds chosen elsewhere, by name; the first is the default one.
    """

    n: int
    n_positive: int
    n_negative: int
    loss: float | None
    roc: RocCurve
    at_half: Confusion
    operating_points: Mapping[str, Confusion]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as ``metrics.json`` holds them (curves are in the tables)."""
        points = {name: {"name": name, **point.as_dict()} for name, point in self.operating_points.items()}
        return {
            "n": self.n,
            "n_positive": self.n_positive,
            "n_negative": self.n_negative,
            "loss": self.loss,
            "auc": self.roc.auc,
            **self.at_half.as_dict(),
            "operating_point": next(iter(points.values()), None),
            "operating_points": points,
        }


def evaluate(predictions: Predictions, *, operating_points: Mapping[str, float] | None = None) -> Evaluation:
    """Compute every figure of one split from its Predictions.

    Parameters
    ----------
    predictions : Predictions
        The rows of one split.
    operating_points : mapping of str to float, optional
        Thresholds chosen on another split, by name; see `choose_operating_points`.

    Returns
    -------
    Evaluation

    Raises
    ------
    DataError
        Where there is no row at all.
    """
    labels, scores = predictions.labels, predictions.scores
    if not len(labels):
        raise DataError("There are no predictions to evaluate; score at least one labelled image first.")
    roc = roc_curve(labels, scores)
    return Evaluation(
        n=len(labels),
        n_positive=roc.n_positive,
        n_negative=roc.n_negative,
        loss=log_loss(labels, scores),
        roc=roc,
        at_half=confusion(labels, scores, threshold=HALF),
        operating_points={
            name: confusion(labels, scores, threshold=threshold) for name, threshold in (operating_points or {}).items()
        },
    )


def choose_operating_points(predictions: Predictions) -> dict[str, float]:
    """Choose thresholds on data that are not the test split.

    Parameters
    ----------
    predictions : Predictions
        Usually the validation rows.

    Returns
    -------
    dict of str to float
        ``{"youden": threshold}``; empty where a class is missing.
    """
    threshold = youden_threshold(roc_curve(predictions.labels, predictions.scores))
    return {} if threshold is None else {"youden": threshold}


def roc_curve(labels: Labels, scores: Scores) -> RocCurve:
    """Compute the ROC curve with thresholds midway between neighbouring scores.

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        0 or 1.
    scores : ndarray of float64, shape (n,)
        Higher means PNEUMONIA, in [0, 1].

    Returns
    -------
    RocCurve
        Points on straight pieces are left out, as scikit-learn does, whose rates these are.
    """
    n_positive = int((labels == 1).sum())
    n_negative = len(labels) - n_positive
    if not n_positive or not n_negative:
        empty = np.empty(0)
        return RocCurve(empty, empty, empty, None, n_positive, n_negative)
    fpr, tpr, at_least = sk.roc_curve(labels, scores)
    distinct = np.unique(scores)
    lower = np.concatenate([[-1.0], distinct])[np.searchsorted(distinct, at_least[1:])]
    thresholds = np.concatenate([[(distinct[-1] + 1) / 2], (lower + at_least[1:]) / 2])
    return RocCurve(fpr, tpr, thresholds, float(sk.auc(fpr, tpr)), n_positive, n_negative)


def youden_threshold(curve: RocCurve) -> float | None:
    """Return the threshold with the greatest sensitivity + specificity - 1 (Youden 1950).

    Where several are equally good, the one with the higher sensitivity; None where a class is missing.
    """
    if curve.auc is None:
        return None
    gain = curve.tpr - curve.fpr
    best = np.flatnonzero(np.isclose(gain, gain.max(), rtol=0, atol=1e-12))[-1]
    return float(curve.thresholds[best])


def confusion(labels: Labels, scores: Scores, *, threshold: float) -> Confusion:
    """Count right and wrong calls at a threshold.

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        0 or 1.
    scores : ndarray of float64, shape (n,)
        Scores in [0, 1].
    threshold : float
        A score above it is called PNEUMONIA; a score equal to it is not.

    Returns
    -------
    Confusion
    """
    called, sick = scores > threshold, labels == 1
    return Confusion(
        threshold=float(threshold),
        true_negatives=int((~called & ~sick).sum()),
        false_positives=int((called & ~sick).sum()),
        false_negatives=int((~called & sick).sum()),
        true_positives=int((called & sick).sum()),
    )


def log_loss(labels: npt.NDArray[Any], scores: npt.NDArray[Any]) -> float:
    """Return the mean binary cross-entropy in nats, probabilities clipped to [1e-7, 1 - 1e-7] as Keras does.

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        0 or 1.
    scores : ndarray of float, shape (n,)
        Probabilities of label 1.

    Returns
    -------
    float
        0 or more.
    """
    p = np.clip(np.asarray(scores, dtype=np.float64), _CLIP, 1 - _CLIP)
    return float(-np.where(labels == 1, np.log(p), np.log1p(-p)).mean())


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
