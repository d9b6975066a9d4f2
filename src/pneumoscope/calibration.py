"""How far a score can be read as a probability: proper scores, calibration, temperature, decision curve.

Takes labels (0 NORMAL, 1 PNEUMONIA) and probabilities of PNEUMONIA as arrays. Knows nothing of Predictions, of how a
split was made, of files or pictures: that a temperature comes from other images than those it is measured on is the
caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import expit, logit

from pneumoscope.curves import Labels, Scores
from pneumoscope.errors import DataError, UsageError
from pneumoscope.intervals import Interval, wilson
from pneumoscope.specs import LABELS

BINS = 10
"""Bins of equal width that the reliability curve and the expected calibration error use."""

TEMPERATURES = (1.0, 100.0)
"""The temperatures between which one is sought. One below 1 would make scores surer; where classes are nearly apart, it
hangs on one or two images (0.34 from 458 images made the loss of 651 others 1.7 times as large)."""

_CLIP = 1e-7  # as Keras clips probabilities in its binary cross-entropy; logits of 0 and 1 stay finite
_STEPS = 100  # Newton's method needs about 10


# --- proper scores ---------------------------------------------------------------------------------------------------


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
    p = _clipped(scores)
    return float(-np.where(labels == 1, np.log(p), np.log1p(-p)).mean())


def brier_loss(labels: npt.NDArray[Any], scores: npt.NDArray[Any]) -> float:
    """Return the mean squared difference between probability and label (Brier 1950, of one class).

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        0 or 1.
    scores : ndarray of float, shape (n,)
        Probabilities of label 1.

    Returns
    -------
    float
        In [0, 1]; a constant 0.5 has 0.25.
    """
    return float(np.square(np.asarray(scores, dtype=np.float64) - labels).mean())


# --- calibration -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReliabilityBin:
    """Images whose probabilities fall between two bounds.

    Attributes
    ----------
    low, high : float
        The bounds: above `low`, up to `high`; the first bin holds 0 too.
    n : int
        Images, 1 or more.
    mean_probability : float
        What was said, in [0, 1].
    share_positive : float
        What was so: the share of PNEUMONIA, in [0, 1].
    interval : Interval or None
        Wilson's, of `share_positive`.
    """

    low: float
    high: float
    n: int
    mean_probability: float
    share_positive: float
    interval: Interval | None


@dataclass(frozen=True)
class Calibration:
    """How well probabilities fit what was so.

    Attributes
    ----------
    loss : float
        Mean binary cross-entropy in nats, 0 or more.
    brier : float
        Mean squared error in [0, 1].
    slope, intercept : float or None
        ``b`` and ``a`` of the logistic regression ``logit P(PNEUMONIA) = a + b logit(probability)`` (Cox 1958): 1 and 0
        are perfect, a slope below 1 means too sure of itself. None where it has no solution.
    intercept_in_the_large : float or None
        ``a`` with ``b`` held at 1, in logits: above 0 means that probabilities are too low altogether. None where a
        class is missing.
    expected_calibration_error : float
        Mean distance of `mean_probability` and `share_positive` over the bins, weighted by images, in [0, 1] (Naeini,
        Cooper and Hauskrecht 2015, of the probability of PNEUMONIA). With few images it is above 0 by chance alone.
    bins : tuple of ReliabilityBin
        The reliability curve, from low to high; bins without images are left out.
    undefined : mapping of str to str
        Why each figure that is None is so.
    """

    loss: float
    brier: float
    slope: float | None
    intercept: float | None
    intercept_in_the_large: float | None
    expected_calibration_error: float
    bins: tuple[ReliabilityBin, ...]
    undefined: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return every field but `undefined` under its name, bins as a list of dictionaries."""
        shown = {name: value for name, value in asdict(self).items() if name != "undefined"}
        return {**shown, "bins": list(shown["bins"])}


def calibrate(labels: Labels, probabilities: Scores) -> Calibration:
    """Measure how well probabilities fit what was so.

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        0 or 1.
    probabilities : ndarray of float64, shape (n,)
        Of PNEUMONIA, in [0, 1]; clipped to [1e-7, 1 - 1e-7] where a logarithm is taken.

    Returns
    -------
    Calibration

    Raises
    ------
    DataError
        Where there is no image.
    """
    _check_any(labels)
    bins = reliability_curve(labels, probabilities)
    distance = sum(part.n * abs(part.mean_probability - part.share_positive) for part in bins)
    slope, intercept, large, undefined = _recalibrated(labels, logit(_clipped(probabilities)))
    return Calibration(
        loss=log_loss(labels, probabilities),
        brier=brier_loss(labels, probabilities),
        slope=slope,
        intercept=intercept,
        intercept_in_the_large=large,
        expected_calibration_error=distance / len(labels),
        bins=bins,
        undefined=undefined,
    )


def reliability_curve(labels: Labels, probabilities: Scores, *, bins: int = BINS) -> tuple[ReliabilityBin, ...]:
    """Compare what was said with what was so, in bins of equal width (Murphy and Winkler 1977).

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        0 or 1.
    probabilities : ndarray of float64, shape (n,)
        Of PNEUMONIA, in [0, 1].
    bins : int
        How many, 1 or more.

    Returns
    -------
    tuple of ReliabilityBin
        From low to high, those without images left out.

    Raises
    ------
    UsageError
        Where `bins` is below 1.
    """
    if bins < 1:
        raise UsageError(f"A reliability curve of {bins} bins was asked for; give 1 or more, usually {BINS}.")
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], probabilities, side="left")
    n = np.bincount(place, minlength=bins)
    sums = np.bincount(place, weights=probabilities, minlength=bins)
    sick = np.bincount(place, weights=labels == 1, minlength=bins)
    return tuple(
        ReliabilityBin(
            low=float(edges[at]),
            high=float(edges[at + 1]),
            n=int(n[at]),
            mean_probability=float(sums[at] / n[at]),
            share_positive=float(sick[at] / n[at]),
            interval=wilson(int(sick[at]), int(n[at])),
        )
        for at in np.flatnonzero(n).tolist()
    )


def _recalibrated(labels: Labels, logits: Scores) -> tuple[float | None, float | None, float | None, dict[str, str]]:
    """Return slope, intercept, intercept in the large, and why those that are None are so."""
    sick, well = logits[labels == 1], logits[labels == 0]
    if not len(sick) or not len(well):
        reason = f"There is no {LABELS[1] if not len(sick) else LABELS[0]} image."
        return None, None, None, dict.fromkeys(("slope", "intercept", "intercept_in_the_large"), reason)
    share = len(sick) / len(labels)
    # both logits are bounded, so that the mean of the shifted probabilities reaches the share between these ends
    large = float(brentq(lambda shift: expit(logits + shift).mean() - share, -60.0, 60.0, xtol=1e-12))
    if sick.min() >= well.max() or well.min() >= sick.max():
        reason = "The probabilities of the two labels do not overlap, so that logistic regression has no solution."
        return None, None, large, dict.fromkeys(("slope", "intercept"), reason)
    intercept, slope = _logistic_fit(labels, logits)
    return slope, intercept, large, {}


def _logistic_fit(labels: Labels, x: Scores) -> tuple[float, float]:
    """Return intercept and slope of a logistic regression by Newton's method, halving steps that do not go down."""
    truth = (labels == 1).astype(np.float64)

    def loss(at: Scores) -> float:
        line = at[0] + at[1] * x
        return float((np.logaddexp(0, line) - truth * line).mean())

    found = np.array([logit(truth.mean()), 0.0])
    for _ in range(_STEPS):
        p = expit(found[0] + found[1] * x)
        wrong, weight = p - truth, p * (1 - p)
        cross = (weight * x).mean()
        curvature = np.array([[weight.mean(), cross], [cross, (weight * x * x).mean()]])
        step = np.linalg.solve(curvature, [wrong.mean(), (wrong * x).mean()])
        start = loss(found)
        while loss(found - step) > start + 1e-12:  # rounding alone may lift it near the end
            step /= 2
        found = found - step
        if np.abs(step).max() < 1e-10:
            break
    return float(found[0]), float(found[1])


# --- temperature -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Temperature:
    """What fitting a temperature gave.

    Attributes
    ----------
    value : float or None
        Divides logits: 1 or more, which makes a model less sure; None where none could be fitted or none is needed.
    reason : str or None
        Why there is none, in one sentence.
    """

    value: float | None
    reason: str | None = None


def fit_temperature(labels: Labels, scores: Scores) -> Temperature:
    """Find the temperature, 1 or more, that makes the mean cross-entropy least (Guo, Pleiss, Sun and Weinberger 2017).

    Fit it on images that the model was not trained on and that are not test images. One number moves no score past
    another: AUC and the best threshold's calls stay as they are.

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        0 or 1.
    scores : ndarray of float64, shape (n,)
        Uncalibrated probabilities of PNEUMONIA in [0, 1], clipped to [1e-7, 1 - 1e-7].

    Returns
    -------
    Temperature
        Between the ends of `TEMPERATURES`; without a value where a class is missing, where the scores are not too sure
        as they are, or where they do not rise with the label.
    """
    sick = labels == 1
    if sick.all() or not sick.any():
        return Temperature(None, f"There is no {LABELS[0] if sick.any() else LABELS[1]} image to fit a temperature on.")
    logits = logit(_clipped(scores))
    truth = sick.astype(np.float64)

    def slope_of_loss(log_inverse: float) -> float:  # rises with the inverse temperature: the loss is convex in it
        return float((logits * (expit(math.exp(log_inverse) * logits) - truth)).mean())

    hottest = -math.log(TEMPERATURES[1])
    if slope_of_loss(hottest) >= 0:
        return Temperature(
            None,
            f"The loss still falls at a temperature of {TEMPERATURES[1]:g}, because the scores do not rise with the "
            "label; train the model again.",
        )
    if slope_of_loss(0.0) <= 0:
        return Temperature(None, "The scores are not too sure as they are, and none makes them surer: they stand.")
    return Temperature(math.exp(-brentq(slope_of_loss, hottest, 0.0, xtol=1e-13)))


def apply_temperature(scores: Scores, temperature: float) -> Scores:
    """Return calibrated probabilities: the sigmoid of the logit divided by the temperature.

    Parameters
    ----------
    scores : ndarray of float64, shape (n,)
        Uncalibrated probabilities in [0, 1], clipped to [1e-7, 1 - 1e-7].
    temperature : float
        Above 0 and finite.

    Returns
    -------
    ndarray of float64, shape (n,)
        Above 0 and below 1, in the order of the scores; 0.5 stays 0.5.

    Raises
    ------
    UsageError
        Where the temperature is not a finite number above 0.
    """
    if not 0 < temperature < math.inf:
        raise UsageError(
            f"The temperature is {temperature}; give a finite number above 0, as fit_temperature returns it."
        )
    calibrated: Scores = expit(logit(_clipped(scores)) / temperature)
    return calibrated


# --- decisions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecisionCurve:
    """What acting on a model is worth, beside treating everybody and nobody.

    Attributes
    ----------
    thresholds : ndarray of float64, shape (k,)
        Probabilities of PNEUMONIA, between 0 and 1, above which one would act.
    net_benefit : ndarray of float64, shape (k,)
        Of acting where ``probability > threshold``, in true positives per image, up to the share of PNEUMONIA.
    treat_all : ndarray of float64, shape (k,)
        Of acting always. Of acting never it is 0.
    """

    thresholds: Scores
    net_benefit: Scores
    treat_all: Scores

    def as_dict(self) -> dict[str, Any]:
        """Return the three curves, and ``treat_none``, as lists under their names."""
        return {
            "thresholds": self.thresholds.tolist(),
            "net_benefit": self.net_benefit.tolist(),
            "treat_all": self.treat_all.tolist(),
            "treat_none": [0.0] * len(self.thresholds),
        }


def decision_curve(labels: Labels, probabilities: Scores, *, thresholds: Scores | None = None) -> DecisionCurve:
    """Compute the net benefit TP/n - FP/n t/(1 - t) over thresholds t (Vickers and Elkin 2006).

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        0 or 1.
    probabilities : ndarray of float64, shape (n,)
        Of PNEUMONIA, in [0, 1]; calibrated, or the curve means little.
    thresholds : ndarray of float64, shape (k,), optional
        Between 0 and 1; 0.01, 0.02 to 0.99 where not given.

    Returns
    -------
    DecisionCurve

    Raises
    ------
    DataError
        Where there is no image.
    UsageError
        Where a threshold is not from 0 to below 1.
    """
    _check_any(labels)
    at = np.arange(1, 100) / 100 if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    if not ((at >= 0) & (at < 1)).all():
        raise UsageError("A threshold of a decision curve is not from 0 to below 1; give probabilities to act on.")
    sick, well = np.sort(probabilities[labels == 1]), np.sort(probabilities[labels == 0])
    odds = at / (1 - at)
    true_positives = len(sick) - np.searchsorted(sick, at, side="right")
    false_positives = len(well) - np.searchsorted(well, at, side="right")
    n = len(labels)
    return DecisionCurve(at, (true_positives - odds * false_positives) / n, (len(sick) - odds * len(well)) / n)


def _clipped(probabilities: npt.NDArray[Any]) -> Scores:
    return np.clip(np.asarray(probabilities, dtype=np.float64), _CLIP, 1 - _CLIP)


def _check_any(labels: Labels) -> None:
    if not len(labels):
        raise DataError("There is no image whose probability could be measured; give one labelled image or more.")
