"""Right and wrong calls at one threshold, the shares that follow from the four counts, and how sure each share is.

An image is called PNEUMONIA when ``score > threshold``. Undefined figures are ``None`` with a reason. Knows nothing of
how a threshold is chosen, nor of Predictions, files or pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from pneumoscope.intervals import LEVEL, Interval, check_level, wilson

FIGURES: tuple[str, ...] = (
    "accuracy",
    "sensitivity",
    "specificity",
    "positive_predictive_value",
    "negative_predictive_value",
    "f1",
    "mcc",
)
"""The figures that a `Confusion` gives, under the names that ``metrics.json`` uses."""

_NO_POSITIVE = "There is no PNEUMONIA image."
_NO_NEGATIVE = "There is no NORMAL image."
_NONE_CALLED = "No image is called PNEUMONIA at this threshold."
_ALL_CALLED = "No image is called NORMAL at this threshold."


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
        return _share(*self._parts()["accuracy"])

    @property
    def sensitivity(self) -> float | None:
        """Share of PNEUMONIA images called so in [0, 1]; None where there are none."""
        return _share(*self._parts()["sensitivity"])

    @property
    def specificity(self) -> float | None:
        """Share of NORMAL images called so in [0, 1]; None where there are none."""
        return _share(*self._parts()["specificity"])

    @property
    def positive_predictive_value(self) -> float | None:
        """Share of images called PNEUMONIA that are so in [0, 1]; moves with a set's prevalence; None where none is."""
        return _share(*self._parts()["positive_predictive_value"])

    @property
    def negative_predictive_value(self) -> float | None:
        """Share of images called NORMAL that are so in [0, 1]; moves with a set's prevalence; None where none is."""
        return _share(*self._parts()["negative_predictive_value"])

    @property
    def f1(self) -> float | None:
        """Harmonic mean of sensitivity and positive predictive value in [0, 1]; None where only true negatives are."""
        errors = self.false_positives + self.false_negatives
        return _share(2 * self.true_positives, 2 * self.true_positives + errors)

    @property
    def mcc(self) -> float | None:
        """Correlation of calls and labels in [-1, 1] (Matthews 1975); None where a label or a call is missing."""
        margins = self._margins()
        if not all(margins):
            return None
        product = self.true_positives * self.true_negatives - self.false_positives * self.false_negatives
        if product**2 == math.prod(margins):  # in whole numbers: the root may be off by a bit, and 1 must be 1
            return math.copysign(1.0, product)
        return product / math.sqrt(math.prod(margins))

    def figures(self) -> dict[str, float | None]:
        """Return every figure by its name, in the order of `FIGURES`; undefined ones are None."""
        return {name: getattr(self, name) for name in FIGURES}

    def intervals(self, *, level: float = LEVEL) -> dict[str, Interval | None]:
        """Return an interval of every figure, each image taken as independent of the others.

        Shares have Wilson's interval. So has F1, through the share TP / (TP + FP + FN), of which it is a rising
        function. The MCC is no share: it has the interval of a phi coefficient, by Fisher's z and the large-sample
        variance (Bishop, Fienberg and Holland 1975).

        Parameters
        ----------
        level : float
            Between 0 and 1.

        Returns
        -------
        dict of str to (Interval or None)
            In the order of `FIGURES`; None where the figure is undefined, or where the MCC is -1 or 1 and its variance
            is 0. `undefined` has the reasons.

        Raises
        ------
        UsageError
            Where `level` is not between 0 and 1.
        """
        shares = {name: wilson(part, whole, level=level) for name, (part, whole) in self._parts().items()}
        overlap = wilson(self.true_positives, self.n - self.true_negatives, level=level)
        return {**shares, "f1": _carried_to_f1(overlap), "mcc": self._mcc_interval(level)}

    @property
    def undefined(self) -> dict[str, str]:
        """Why each undefined figure, and each missing interval (``intervals.NAME``), is None."""
        reasons = {name: reason for name, reason in self._reasons().items() if getattr(self, name) is None}
        without = {f"intervals.{name}": reason for name, reason in reasons.items()}
        if self.mcc is not None and self._mcc_interval(LEVEL) is None:
            without["intervals.mcc"] = "The MCC is at its end, so that its large-sample variance is 0."
        return reasons | without

    def as_dict(self) -> dict[str, Any]:
        """Return the threshold, counts, figures and intervals under the names that ``metrics.json`` uses."""
        return {
            "threshold": self.threshold,
            "false_negatives": self.false_negatives,
            "false_positives": self.false_positives,
            "true_negatives": self.true_negatives,
            "true_positives": self.true_positives,
            **self.figures(),
            "intervals": intervals_as_dict(self.intervals()),
        }

    def _parts(self) -> dict[str, tuple[int, int]]:
        """Return each figure that is a plain share as its part and its whole."""
        sick, well, called, spared = self._margins()
        return {
            "accuracy": (self.true_negatives + self.true_positives, self.n),
            "sensitivity": (self.true_positives, sick),
            "specificity": (self.true_negatives, well),
            "positive_predictive_value": (self.true_positives, called),
            "negative_predictive_value": (self.true_negatives, spared),
        }

    def _margins(self) -> tuple[int, int, int, int]:
        """Return the numbers of PNEUMONIA and NORMAL images, and of those called so."""
        return (
            self.true_positives + self.false_negatives,
            self.true_negatives + self.false_positives,
            self.true_positives + self.false_positives,
            self.true_negatives + self.false_negatives,
        )

    def _reasons(self) -> dict[str, str]:
        """Return why each figure would be undefined, were it so."""
        lacks = (_NO_POSITIVE, _NO_NEGATIVE, _NONE_CALLED, _ALL_CALLED)
        missing = [reason for reason, count in zip(lacks, self._margins(), strict=True) if not count]
        return {
            "accuracy": "There is no image.",
            "sensitivity": _NO_POSITIVE,
            "specificity": _NO_NEGATIVE,
            "positive_predictive_value": _NONE_CALLED,
            "negative_predictive_value": _ALL_CALLED,
            "f1": "There is no PNEUMONIA image and none is called so at this threshold.",
            "mcc": missing[0] if missing else "",
        }

    def _mcc_interval(self, level: float) -> Interval | None:
        mcc = self.mcc
        if mcc is None or abs(mcc) == 1:
            return None
        sick, well, called, spared = self._margins()
        of_labels, of_calls = (sick - well) / math.sqrt(sick * well), (called - spared) / math.sqrt(called * spared)
        skew = (mcc + mcc**3 / 2) * of_labels * of_calls - 0.75 * mcc**2 * (of_labels**2 + of_calls**2)
        variance = max(0.0, 1 - mcc**2 + skew) / self.n
        half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(variance) / (1 - mcc**2)
        middle = math.atanh(mcc)
        return Interval(math.tanh(middle - half), math.tanh(middle + half), "fisher z", level)


def confusion(labels: npt.NDArray[np.int8], scores: npt.NDArray[np.float64], *, threshold: float) -> Confusion:
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


def wilson_by_group(
    successes: npt.ArrayLike, counted: npt.ArrayLike, groups: npt.ArrayLike, *, level: float = LEVEL
) -> Interval | None:
    """Return Wilson's interval of a share whose images come in groups, from as many images as they are worth.

    Images of one patient are alike, so that n of them say as much as n / d independent ones; the design effect d comes
    from how the groups differ (Rao and Scott 1992, https://doi.org/10.2307/2532311). It is taken as 1 where it would be
    less, so that the interval is never narrower than `wilson`'s. A share of 0 or 1 does not tell how alike the images
    of a group are: each group then counts as one image.

    Parameters
    ----------
    successes : array_like of bool, shape (n,)
        Which images belong to the part.
    counted : array_like of bool, shape (n,)
        Which belong to the whole.
    groups : array_like of str or int, shape (n,)
        The group of each image.
    level : float
        Between 0 and 1.

    Returns
    -------
    Interval or None
        In [0, 1]; None where no image is counted.

    Raises
    ------
    UsageError
        Where `level` is not between 0 and 1.
    """
    check_level(level)
    whole = np.asarray(counted, dtype=bool)
    part = np.asarray(successes, dtype=bool)[whole]
    n = len(part)
    if not n:
        return None
    named, place = np.unique(np.asarray(groups)[whole], return_inverse=True)
    share, m = float(part.mean()), len(named)
    if 0 < share < 1 and m > 1:
        differing = np.bincount(place, weights=part - share)  # of each group: its successes less those of the mean
        effect = float(differing @ differing) * m / (m - 1) / (n * share * (1 - share))
        worth = n / max(1.0, effect)
    else:
        worth = float(m)
    found = wilson(share * worth, worth, level=level)
    return found and replace(found, method="wilson by group")


def intervals_by_group(
    labels: npt.NDArray[np.int8],
    scores: npt.NDArray[np.float64],
    groups: npt.NDArray[Any],
    *,
    threshold: float,
    level: float = LEVEL,
) -> dict[str, Interval | None]:
    """Return an interval of every figure but the MCC, the images of a group taken as alike as they turn out to be.

    Parameters
    ----------
    labels, scores, threshold
        As for `confusion`.
    groups : ndarray of str or int, shape (n,)
        The patient of each image.
    level : float
        Between 0 and 1.

    Returns
    -------
    dict of str to (Interval or None)
        From `wilson_by_group`, that of F1 as in `Confusion.intervals`; None where the figure is undefined.

    Raises
    ------
    UsageError
        Where `level` is not between 0 and 1.
    """
    called, sick = scores > threshold, labels == 1
    parts = {
        "accuracy": (called == sick, np.full(len(labels), True)),
        "sensitivity": (called & sick, sick),
        "specificity": (~called & ~sick, ~sick),
        "positive_predictive_value": (called & sick, called),
        "negative_predictive_value": (~called & ~sick, ~called),
        "f1": (called & sick, called | sick),
    }
    found = {name: wilson_by_group(part, whole, groups, level=level) for name, (part, whole) in parts.items()}
    return found | {"f1": _carried_to_f1(found["f1"])}


def intervals_as_dict(intervals: Mapping[str, Interval | None]) -> dict[str, dict[str, Any] | None]:
    """Return intervals by name as ``metrics.json`` holds them: dictionaries, or None where there is none."""
    return {name: None if interval is None else interval.as_dict() for name, interval in intervals.items()}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _carried_to_f1(overlap: Interval | None) -> Interval | None:
    """Carry the interval of the share J = TP / (TP + FP + FN) to F1 = 2 J / (1 + J)."""
    if overlap is None:
        return None
    low, high = (2 * end / (1 + end) for end in (overlap.low, overlap.high))
    return Interval(low, high, overlap.method, overlap.level)
