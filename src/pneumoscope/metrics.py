"""All figures of one model on one split, from its Predictions, gathered in a frozen Evaluation.

Owns what is measured, on which scores, and under which name it stands in ``metrics.json``; the figures themselves come
from `curves`, `counts`, `calibration` and `intervals`. An image is called PNEUMONIA when ``score > threshold``.
Undefined figures are ``None`` with a reason, never a pleasant number. Knows nothing of networks, files or pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pneumoscope import calibration, intervals
from pneumoscope.calibration import Calibration, DecisionCurve, log_loss
from pneumoscope.counts import FIGURES, Confusion, confusion, intervals_as_dict, intervals_by_group
from pneumoscope.curves import (
    COST_RATIO,
    SENSITIVITY,
    Labels,
    RocCurve,
    Scores,
    average_precision,
    cost_threshold,
    roc_curve,
    sensitivity_threshold,
    weighted_average_precision,
    youden_threshold,
)
from pneumoscope.errors import DataError, UsageError
from pneumoscope.intervals import AucEstimate, Interval, Statistics
from pneumoscope.predictions import Predictions

__all__ = [
    "HALF",
    "Bootstrap",
    "Confusion",
    "Evaluation",
    "Labels",
    "RocCurve",
    "Scores",
    "Subgroup",
    "bootstrap_seconds",
    "choose_operating_points",
    "confusion",
    "evaluate",
    "log_loss",
    "roc_curve",
    "youden_threshold",
]

HALF = 0.5
"""The threshold that the tutorial and most publications use."""


# --- what an evaluation holds ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bootstrap:
    """Intervals that take whole groups for what is independent: of shares by formula, of all else by resampling.

    Attributes
    ----------
    resamples, seed, groups : int
        How many resamples, drawn with which seed, from how many groups.
    of_split : mapping of str to (Interval or None)
        By figure: ``auc``, ``average_precision``, ``brier`` (of the raw scores), and `counts.FIGURES` at threshold 0.5.
    of_points : mapping of str to (mapping of str to (Interval or None))
        By operating point, then by figure: `counts.FIGURES` there.
    """

    resamples: int
    seed: int
    groups: int
    of_split: Mapping[str, Interval | None]
    of_points: Mapping[str, Mapping[str, Interval | None]]

    @property
    def undefined(self) -> dict[str, str]:
        """Why each missing interval is so, by its key in `Evaluation.as_dict`."""
        by_prefix = {"": self.of_split, **{f"{name}.": found for name, found in self.of_points.items()}}
        return {
            f"{prefix}group_intervals.{key}": intervals.NO_BOOTSTRAP
            for prefix, found in by_prefix.items()
            for key, interval in found.items()
            if interval is None
        }

    def as_dict(self) -> dict[str, Any]:
        """Return ``resamples``, ``seed`` and ``groups``; the intervals stand beside their figures."""
        return {"resamples": self.resamples, "seed": self.seed, "groups": self.groups}


@dataclass(frozen=True)
class Subgroup:
    """Figures of one part of a split, for example of the virus images.

    Attributes
    ----------
    n_positive, n_negative : int
        Images of each label.
    auc : AucEstimate or None
        With DeLong's interval; None where a class is missing.
    at_half : Confusion
        Counts at threshold 0.5.
    operating_points : mapping of str to Confusion
        Counts at the thresholds of the whole split, by name.
    """

    n_positive: int
    n_negative: int
    auc: AucEstimate | None
    at_half: Confusion
    operating_points: Mapping[str, Confusion]

    @property
    def undefined(self) -> dict[str, str]:
        """Why each figure that is None is so; an operating point's figures have its name in front."""
        return _why_no_auc(self.auc, self.n_positive) | _why_no_figures(self.at_half, self.operating_points)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures under the names that ``metrics.json`` uses, with `undefined`."""
        return {
            "n": self.n_positive + self.n_negative,
            "n_positive": self.n_positive,
            "n_negative": self.n_negative,
            "auc": self.auc and self.auc.auc,
            "auc_interval": _interval_of(self.auc),
            **self.at_half.as_dict(),
            "operating_points": {name: {"name": name, **at.as_dict()} for name, at in self.operating_points.items()},
            "undefined": self.undefined,
        }


@dataclass(frozen=True)
class Evaluation:
    """All figures of one model on one split.

    Attributes
    ----------
    n, n_positive, n_negative : int
        Images, all and of each label.
    loss : float or None
        Mean binary cross-entropy of the raw scores in nats, 0 or more.
    roc : RocCurve
        With the AUC.
    at_half : Confusion
        Counts at threshold 0.5.
    operating_points : mapping of str to Confusion
        Counts at thresholds chosen elsewhere, by name; the first is the default one. Thresholds are of raw scores.
    auc : AucEstimate or None
        The AUC with DeLong's interval; None where a class is missing.
    average_precision : float or None
        In [0, 1]; None where a class is missing.
    temperature : float or None
        What turned raw scores into probabilities; None where raw scores stand for them.
    calibration : Calibration
        Of the probabilities: calibrated where there is a temperature, else the raw scores.
    calibration_raw : Calibration
        Of the raw scores.
    decision : DecisionCurve
        Of the probabilities.
    subgroups : mapping of str to (mapping of str to Subgroup)
        By the name of a division, then by its values.
    bootstrap : Bootstrap or None
        Intervals from resampled groups, where asked for.
    """

    n: int
    n_positive: int
    n_negative: int
    loss: float | None
    roc: RocCurve
    at_half: Confusion
    operating_points: Mapping[str, Confusion]
    auc: AucEstimate | None
    average_precision: float | None
    temperature: float | None
    calibration: Calibration
    calibration_raw: Calibration
    decision: DecisionCurve
    subgroups: Mapping[str, Mapping[str, Subgroup]]
    bootstrap: Bootstrap | None

    @property
    def undefined(self) -> dict[str, str]:
        """Why each figure that is None in `as_dict` is so, by key.

        An operating point's figures have its name in front (``youden.mcc``), nested ones the key that they stand under
        (``calibration.slope``). Subgroups have reasons of their own.
        """
        reasons = _why_no_auc(self.auc, self.n_positive) | _why_no_figures(self.at_half, self.operating_points)
        if self.average_precision is None:
            reasons["average_precision"] = reasons["auc"]
        if not self.operating_points:
            reasons["operating_point"] = "No operating point was given."
        if self.temperature is None:
            reasons["calibration.temperature"] = "No temperature was given: the figures are those of the raw scores."
        for name, part in (("calibration", self.calibration), ("calibration_raw", self.calibration_raw)):
            reasons |= {f"{name}.{key}": reason for key, reason in part.undefined.items()}
        drawn = {"bootstrap": "No bootstrap was asked for."} if self.bootstrap is None else self.bootstrap.undefined
        return reasons | drawn

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as ``metrics.json`` holds them (the ROC curve is in the tables).

        ``brier`` and ``loss`` at the top are those of the raw scores. ``intervals`` take images as independent (DeLong,
        Wilson); ``group_intervals`` take whole groups so, and are empty without a bootstrap.
        """
        drawn = self.bootstrap
        points = {
            name: {
                "name": name,
                **point.as_dict(),
                "group_intervals": intervals_as_dict(drawn.of_points[name]) if drawn else {},
            }
            for name, point in self.operating_points.items()
        }
        return {
            "n": self.n,
            "n_positive": self.n_positive,
            "n_negative": self.n_negative,
            "loss": self.loss,
            "auc": self.roc.auc,
            "auc_interval": _interval_of(self.auc),
            "average_precision": self.average_precision,
            "brier": self.calibration_raw.brier,
            **self.at_half.as_dict(),
            "group_intervals": intervals_as_dict(drawn.of_split) if drawn else {},
            "operating_point": next(iter(points.values()), None),
            "operating_points": points,
            "calibration": {"temperature": self.temperature, **self.calibration.as_dict()},
            "calibration_raw": self.calibration_raw.as_dict(),
            "decision_curve": self.decision.as_dict(),
            "subgroups": {
                name: {value: part.as_dict() for value, part in parts.items()} for name, parts in self.subgroups.items()
            },
            "bootstrap": drawn and drawn.as_dict(),
            "undefined": self.undefined,
        }


# --- computing one ---------------------------------------------------------------------------------------------------


def evaluate(
    predictions: Predictions,
    *,
    operating_points: Mapping[str, float] | None = None,
    groups: npt.ArrayLike | None = None,
    subgroups: Mapping[str, npt.ArrayLike] | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    temperature: float | None = None,
) -> Evaluation:
    """Compute every figure of one split from its Predictions.

    Parameters
    ----------
    predictions : Predictions
        The rows of one split.
    operating_points : mapping of str to float, optional
        Thresholds chosen on another split, by name; see `choose_operating_points`.
    groups : array_like of str or int, shape (n,), optional
        The patient of each row; what the bootstrap draws.
    subgroups : mapping of str to (array_like of str, shape (n,)), optional
        Divisions by name, each with the value of every row; each value gets figures of its own.
    bootstrap : int
        How many resamples of whole groups to draw, 0 for none; see `bootstrap_seconds` for what it costs.
    seed : int
        Of the bootstrap; 0 or more.
    temperature : float, optional
        From `calibration.fit_temperature` on another split; above 0. Calibration and decision curve are then measured
        on calibrated probabilities. Thresholds, calls, ``loss`` and ``brier`` stay those of the raw scores.

    Returns
    -------
    Evaluation

    Raises
    ------
    DataError
        Where there is no row at all, or the groups or a division do not have one value per row.
    UsageError
        Where a bootstrap is asked for without groups, or a number is out of its range.
    """
    labels, scores = predictions.labels, predictions.scores
    points = dict(operating_points or {})
    _require_rows(len(labels))
    probabilities = scores if temperature is None else calibration.apply_temperature(scores, temperature)
    raw = calibration.calibrate(labels, scores)
    roc = roc_curve(labels, scores)
    whole = _part(labels, scores, points)
    return Evaluation(
        n=len(labels),
        n_positive=roc.n_positive,
        n_negative=roc.n_negative,
        loss=raw.loss,
        roc=roc,
        at_half=whole.at_half,
        operating_points=whole.operating_points,
        auc=whole.auc,
        average_precision=average_precision(labels, scores),
        temperature=temperature,
        calibration=raw if temperature is None else calibration.calibrate(labels, probabilities),
        calibration_raw=raw,
        decision=calibration.decision_curve(labels, probabilities),
        subgroups={name: _divided(labels, scores, points, name, of) for name, of in (subgroups or {}).items()},
        bootstrap=_bootstrapped(labels, scores, points, groups, bootstrap, seed) if bootstrap else None,
    )


def bootstrap_seconds(
    predictions: Predictions,
    *,
    groups: npt.ArrayLike,
    operating_points: Mapping[str, float] | None = None,
    resamples: int = 1000,
) -> float:
    """Estimate what the bootstrap of `evaluate` will cost, so that it can be said before it starts.

    Parameters
    ----------
    predictions, groups, operating_points
        As `evaluate` will get them.
    resamples : int
        1 or more.

    Returns
    -------
    float
        Seconds, from a few resamples on this machine as busy as it is now.

    Raises
    ------
    DataError
        Where there is no row, or not one group per row.
    UsageError
        Where `resamples` is below 1.
    """
    labels, scores = predictions.labels, predictions.scores
    _require_rows(len(labels))
    of_rows = _one_per_row(groups, len(labels), name="group")
    return intervals.bootstrap_cost(_statistics(labels, scores, operating_points or {}), of_rows, resamples=resamples)


def choose_operating_points(predictions: Predictions, *, cost_ratio: float = COST_RATIO) -> dict[str, float]:
    """Choose thresholds on data that are not the test split.

    Parameters
    ----------
    predictions : Predictions
        Usually the rows of the calibration part, or of validation.
    cost_ratio : float
        How many false positives a false negative weighs; above 0.

    Returns
    -------
    dict of str to float
        ``youden``, the default and first: greatest sensitivity + specificity. ``sensitivity-0.95``: the highest
        threshold with a sensitivity of 0.95 or more. ``cost``: the cheapest errors at `cost_ratio` and these images'
        share of PNEUMONIA. Empty where a class is missing.

    Raises
    ------
    UsageError
        Where `cost_ratio` is not a finite number above 0.
    """
    labels, scores = predictions.labels, predictions.scores
    curve = roc_curve(labels, scores)
    chosen = {
        "youden": youden_threshold(curve),
        f"sensitivity-{SENSITIVITY:g}": sensitivity_threshold(labels, scores),
        "cost": cost_threshold(curve, ratio=cost_ratio),
    }
    return {name: at for name, at in chosen.items() if at is not None} if curve.auc is not None else {}


def _part(labels: Labels, scores: Scores, points: Mapping[str, float]) -> Subgroup:
    """Compute what a part of a split and the whole have in common."""
    n_positive = int((labels == 1).sum())
    return Subgroup(
        n_positive=n_positive,
        n_negative=len(labels) - n_positive,
        auc=intervals.delong(labels, scores),
        at_half=confusion(labels, scores, threshold=HALF),
        operating_points={name: confusion(labels, scores, threshold=at) for name, at in points.items()},
    )


def _divided(
    labels: Labels, scores: Scores, points: Mapping[str, float], name: str, values: npt.ArrayLike
) -> dict[str, Subgroup]:
    of_rows = _one_per_row(values, len(labels), name=f"value of {name}").astype(str)
    named, place, counts = np.unique(of_rows, return_inverse=True, return_counts=True)
    rows_of = np.split(np.argsort(place, kind="stable"), np.cumsum(counts)[:-1])
    return {
        value: _part(labels[rows], scores[rows], points) for value, rows in zip(named.tolist(), rows_of, strict=True)
    }


def _bootstrapped(
    labels: Labels,
    scores: Scores,
    points: Mapping[str, float],
    groups: npt.ArrayLike | None,
    resamples: int,
    seed: int,
) -> Bootstrap:
    if groups is None:
        raise UsageError(
            f"A bootstrap of {resamples} resamples was asked for without groups; give the patient of every image, "
            "because images of one patient are not independent."
        )
    of_rows = _one_per_row(groups, len(labels), name="group")
    statistics = _statistics(labels, scores, points)
    drawn = intervals.bootstrap_by_group(statistics, of_rows, resamples=resamples, seed=seed)

    def of_figures(prefix: str, threshold: float) -> dict[str, Interval | None]:
        found = intervals_by_group(labels, scores, of_rows, threshold=threshold)
        return {name: found[name] if name in found else drawn[prefix + name] for name in FIGURES}

    return Bootstrap(
        resamples=resamples,
        seed=seed,
        groups=len(np.unique(of_rows)),
        of_split={key: drawn[key] for key in ("auc", "average_precision", "brier")} | of_figures("", HALF),
        of_points={name: of_figures(f"{name}.", threshold) for name, threshold in points.items()},
    )


def _statistics(labels: Labels, scores: Scores, points: Mapping[str, float]) -> Statistics:
    """Return the function that computes every bootstrapped figure of weighted rows, all sorting done once."""
    area, precision = intervals.weighted_auc(labels, scores), weighted_average_precision(labels, scores)
    squares = np.square(scores - labels)
    thresholds = {"": HALF, **{f"{name}.": at for name, at in points.items()}}
    cells = {prefix: 2 * (scores > at) + labels for prefix, at in thresholds.items()}  # tn, fn, fp, tp

    def figures(weights: Scores) -> dict[str, float | None]:
        found = {
            "auc": area(weights),
            "average_precision": precision(weights),
            "brier": float(weights @ squares / weights.sum()),
        }
        for prefix, cell in cells.items():
            tn, fn, fp, tp = np.bincount(cell, weights=weights, minlength=4).astype(int).tolist()
            found[f"{prefix}mcc"] = Confusion(thresholds[prefix], tn, fp, fn, tp).mcc
        return found

    return figures


def _interval_of(auc: AucEstimate | None) -> dict[str, Any] | None:
    return None if auc is None or auc.interval is None else auc.interval.as_dict()


def _why_no_auc(auc: AucEstimate | None, n_positive: int) -> dict[str, str]:
    if auc is None:
        return dict.fromkeys(("auc", "auc_interval"), f"There is no {'NORMAL' if n_positive else 'PNEUMONIA'} image.")
    return {"auc_interval": auc.reason} if auc.reason else {}


def _why_no_figures(at_half: Confusion, points: Mapping[str, Confusion]) -> dict[str, str]:
    at_points = {f"{name}.{key}": why for name, point in points.items() for key, why in point.undefined.items()}
    return at_half.undefined | at_points


def _require_rows(n: int) -> None:
    if not n:
        raise DataError("There are no predictions to evaluate; score at least one labelled image first.")


def _one_per_row(values: npt.ArrayLike, n: int, *, name: str) -> npt.NDArray[Any]:
    found = np.asarray(values)
    if found.shape != (n,):
        raise DataError(f"There are {found.shape} entries for {n} images; give one {name} per image.")
    return found
