"""The ROC curve, the thresholds chosen on it, and the average precision.

Owns what follows from the order of scores alone, and where thresholds lie: midway between neighbouring scores, so that
no score stands on the line. An image is called PNEUMONIA when ``score > threshold``. Whether a score is also a good
probability is the business of `calibration`. Knows nothing of Predictions, files or pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn import metrics as sk

from pneumoscope.errors import UsageError

Scores = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int8]

SENSITIVITY = 0.95
"""What the operating point ``sensitivity-0.95`` reaches at least, on the images that it is chosen on."""

COST_RATIO = 5.0
"""How many false positives a false negative weighs in the operating point ``cost``."""


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


# --- thresholds ------------------------------------------------------------------------------------------------------


def youden_threshold(curve: RocCurve) -> float | None:
    """Return the threshold with the greatest sensitivity + specificity - 1 (Youden 1950).

    Where several are equally good, the one with the higher sensitivity; None where a class is missing.
    """
    if curve.auc is None:
        return None
    gain = curve.tpr - curve.fpr
    return _most_sensitive(curve, np.isclose(gain, gain.max(), rtol=0, atol=1e-12))


def cost_threshold(curve: RocCurve, *, ratio: float = COST_RATIO) -> float | None:
    """Return the threshold at which errors cost least, a false negative as much as `ratio` false positives.

    The costs are those of the images of the curve, with their share of PNEUMONIA (Metz 1978): where that share is
    another, another threshold is the cheapest.

    Parameters
    ----------
    curve : RocCurve
        From the images to choose on.
    ratio : float
        Above 0 and finite.

    Returns
    -------
    float or None
        Where several are equally cheap, the one with the higher sensitivity; None where a class is missing.

    Raises
    ------
    UsageError
        Where `ratio` is not a finite number above 0.
    """
    if not 0 < ratio < math.inf:
        raise UsageError(
            f"The cost ratio is {ratio}; give a finite number above 0, for example 5 where a missed pneumonia weighs "
            "as much as five false alarms."
        )
    if curve.auc is None:
        return None
    false_negatives = np.rint((1 - curve.tpr) * curve.n_positive)
    false_positives = np.rint(curve.fpr * curve.n_negative)
    cost = ratio * false_negatives + false_positives
    return _most_sensitive(curve, cost <= cost.min() * (1 + 1e-12))


def sensitivity_threshold(labels: Labels, scores: Scores, *, at_least: float = SENSITIVITY) -> float | None:
    """Return the highest threshold that reaches a wanted sensitivity.

    It is sought among all scores and not on the RocCurve, which leaves points on straight pieces out.

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        0 or 1.
    scores : ndarray of float64, shape (n,)
        Scores in [0, 1].
    at_least : float
        The sensitivity, above 0 and up to 1.

    Returns
    -------
    float or None
        Midway between the score of the last PNEUMONIA image needed and the next lower score of any image; below 0 where
        every image is called. None where there is no PNEUMONIA image.

    Raises
    ------
    UsageError
        Where `at_least` is not above 0 and up to 1.
    """
    if not 0 < at_least <= 1:
        raise UsageError(f"The wanted sensitivity is {at_least}; give a share above 0 and up to 1, for example 0.95.")
    sick = np.sort(scores[labels == 1])[::-1]
    if not len(sick):
        return None
    last = sick[smallest_count(at_least, len(sick)) - 1]
    return float((last + scores[scores < last].max(initial=-1.0)) / 2)


def smallest_count(share: float, n: int) -> int:
    """Return the smallest count that is at least a share of `n`, safe from rounding (0.07 of 100 is 7, not 8).

    Parameters
    ----------
    share : float
        From 0 to 1.
    n : int
        0 or more.

    Returns
    -------
    int
        From 0 to `n`.
    """
    return math.ceil(round(share * n, 9))


def _most_sensitive(curve: RocCurve, best: npt.NDArray[np.bool_]) -> float:
    """Return the last, thus the most sensitive, of equally good thresholds."""
    return float(curve.thresholds[np.flatnonzero(best)[-1]])


# --- precision -------------------------------------------------------------------------------------------------------


def average_precision(labels: Labels, scores: Scores) -> float | None:
    """Return the mean precision over the PNEUMONIA images, steps and not trapezes (Davis and Goadrich 2006).

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        0 or 1.
    scores : ndarray of float64, shape (n,)
        Higher means PNEUMONIA.

    Returns
    -------
    float or None
        Above 0 and up to 1; for scores that tell nothing it is the share of PNEUMONIA, not 0.5. None where a class is
        missing: without NORMAL images it is 1 whatever the scores are.
    """
    return weighted_average_precision(labels, scores)(np.ones(len(labels)))


def weighted_average_precision(labels: Labels, scores: Scores) -> Callable[[Scores], float | None]:
    """Sort once and return a function that computes the average precision of weighted images in O(n) steps.

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        0 or 1.
    scores : ndarray of float64, shape (n,)
        Higher means PNEUMONIA.

    Returns
    -------
    callable
        Takes weights of 0 or more (float64, shape (n,)) and returns what `average_precision` does; None where a class
        has no weight.
    """
    distinct, place = np.unique(-scores, return_inverse=True)  # highest score first; equal scores share a place
    sick, well = np.flatnonzero(labels == 1), np.flatnonzero(labels != 1)
    place_sick, place_well = place[sick], place[well]

    def precision(weights: Scores) -> float | None:
        gained = np.bincount(place_sick, weights=weights[sick], minlength=len(distinct))
        positive = np.cumsum(gained)
        negative = np.cumsum(np.bincount(place_well, weights=weights[well], minlength=len(distinct)))
        if not len(distinct) or not positive[-1] or not negative[-1]:
            return None
        steps = gained > 0
        return float(gained[steps] @ (positive[steps] / (positive + negative)[steps])) / float(positive[-1])

    return precision
