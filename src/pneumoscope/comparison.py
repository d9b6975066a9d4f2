"""Which of two models is better on the same images, and whether this many images can tell.

Owns the rule behind the verdict and the words for it. The verdict is about the area under the ROC curve, which needs
no threshold. It is "better" or "worse" only where two tests agree: DeLong's, which is sharp but takes each image as
independent, and the bootstrap by group, which knows that images of one patient are alike but is too sure of itself
where groups are few. Each covers the other's weakness, so the larger of their p values counts, adjusted for how many
pairs of models were looked at. Knows nothing of how a model came about: a baseline that sees no lung is one more
Predictions table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pneumoscope.errors import DataError, UsageError
from pneumoscope.intervals import (
    LEVEL,
    NO_BOOTSTRAP,
    Floats,
    Interval,
    PairedTest,
    Statistics,
    bootstrap_cost,
    check_level,
    delong_test,
    mcnemar,
    percentile_interval,
    resample_by_group,
    weighted_auc,
)
from pneumoscope.predictions import Predictions

BETTER: Final = "better"
"""Verdict: the first model's AUC is higher, beyond what chance explains."""

WORSE: Final = "worse"
"""Verdict: the first model's AUC is lower, beyond what chance explains."""

UNDECIDED: Final = "cannot be told apart at this n"
"""Verdict: chance explains the difference, or it could not be tested; never "equal"."""

_ROW: Final = ("path", "image_id", "label")  # what two tables must agree on, row by row


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images.

    Attributes
    ----------
    first, second : str
        Names of the models; every difference is the first less the second.
    n, n_groups : int
        Images, and groups that they belong to.
    threshold_first, threshold_second : float
        Above which each model calls an image PNEUMONIA.
    auc : PairedTest
        DeLong's test of the AUC difference; it also holds both areas.
    auc_by_group : Interval or None
        Bootstrap interval of the AUC difference, at `level`, not adjusted; None as `percentile_interval` says.
    calls : PairedTest
        McNemar's test of the calls at the two thresholds. It describes, and has no say in the verdict: it depends on
        how well each threshold was chosen.
    accuracy_by_group : Interval or None
        Bootstrap interval of the accuracy difference at the two thresholds, likewise.
    p_value : float or None
        The larger of DeLong's p value and that of the bootstrap by group; None where one of them is undefined.
    level : float
        The verdict needs a `p_adjusted` below 1 - level.
    p_adjusted, calls_p_adjusted : float or None
        `p_value` and McNemar's p value after Holm's adjustment over the `comparisons` made together.
    comparisons : int
        Pairs of models whose `p_value` is defined, among those compared together.
    """

    first: str
    second: str
    n: int
    n_groups: int
    threshold_first: float
    threshold_second: float
    auc: PairedTest
    auc_by_group: Interval | None
    calls: PairedTest
    accuracy_by_group: Interval | None
    p_value: float | None
    level: float = LEVEL
    p_adjusted: float | None = None
    calls_p_adjusted: float | None = None
    comparisons: int = 1

    @property
    def verdict(self) -> str:
        """`BETTER`, `WORSE` or `UNDECIDED`, said of the first model."""
        if self.p_adjusted is None or not self.auc.difference or self.p_adjusted >= _error_rate(self.level):
            return UNDECIDED
        return BETTER if self.auc.difference > 0 else WORSE

    @property
    def sentence(self) -> str:
        """The verdict with the figures behind it, for a person."""
        said = (
            f"{self.first} and {self.second} {UNDECIDED}"
            if self.verdict == UNDECIDED
            else f"{self.first} is {self.verdict} than {self.second}"
        )
        said += f" ({_counted(self.n, 'image')} of {_counted(self.n_groups, 'group')})"
        if self.auc.difference is None:
            return f"{said}: their AUC is undefined. {self.auc.reason}"
        said += f": AUC {self.auc.first:.3f} against {self.auc.second:.3f}, difference {self.auc.difference:+.3f}"
        if self.p_adjusted is None:
            return f"{said}. {self.undefined['p_value']}"
        by_group = self.auc_by_group
        span = f"{100 * self.level:g}% by group {by_group.low:+.3f} to {by_group.high:+.3f}; " if by_group else ""
        small = "p < 0.001" if self.p_adjusted < 0.001 else f"p = {self.p_adjusted:.3f}"
        family = f", adjusted for {self.comparisons} comparisons" if self.comparisons > 1 else ""
        return f"{said} ({span}{small}{family})."

    @property
    def undefined(self) -> dict[str, str]:
        """Why each figure of the comparison itself that is None is so; the tests hold their own reasons."""
        untested = self.auc.reason if self.auc.p_value is None else NO_BOOTSTRAP
        reasons = {
            "auc_by_group": self.auc.reason if self.auc.difference is None else NO_BOOTSTRAP,
            "accuracy_by_group": NO_BOOTSTRAP,
            "p_value": untested,
            "p_adjusted": untested,
        }
        return {name: str(reason) for name, reason in reasons.items() if getattr(self, name) is None}

    def as_dict(self) -> dict[str, Any]:
        """Return every figure, the verdict and the sentence as ``metrics.json`` holds them."""
        return {
            **asdict(self),
            "auc": self.auc.as_dict(),
            "calls": self.calls.as_dict(),
            "verdict": self.verdict,
            "sentence": self.sentence,
            "undefined": self.undefined,
        }


def compare(
    first: Predictions,
    second: Predictions,
    *,
    groups: npt.ArrayLike,
    names: tuple[str, str],
    thresholds: tuple[float, float],
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> Comparison:
    """Compare two models on the same images.

    Parameters
    ----------
    first, second : Predictions
        The same images in the same order.
    groups : array_like of str or int, shape (n,)
        The group of each image.
    names, thresholds : tuple of str, tuple of float
        Of the first and of the second model; an image is called PNEUMONIA when its score is above the threshold.
    resamples, seed, level
        As in `compare_all`.

    Returns
    -------
    Comparison
        With nothing to adjust for: `p_adjusted` is `p_value`.

    Raises
    ------
    DataError, UsageError
        As `compare_all`; UsageError also where both names are the same.
    """
    if names[0] == names[1]:
        raise UsageError(f"Two models are both named {names[0]}; give each a name of its own.")
    return compare_all(
        dict(zip(names, (first, second), strict=True)),
        groups=groups,
        thresholds=dict(zip(names, thresholds, strict=True)),
        resamples=resamples,
        seed=seed,
        level=level,
    )[0]


def compare_all(
    predictions: Mapping[str, Predictions],
    *,
    groups: npt.ArrayLike,
    thresholds: Mapping[str, float],
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
    announce: Callable[[float], object] | None = None,
) -> list[Comparison]:
    """Compare each model with each that comes after it, adjusting for the number of pairs.

    Every pair is judged on the same resampled groups.

    Parameters
    ----------
    predictions : mapping of str to Predictions
        By name of model, with the same images in the same order.
    groups : array_like of str or int, shape (n,)
        The group of each image.
    thresholds : mapping of str to float
        By name of model; an image is called PNEUMONIA when its score is above it. Chosen on another split.
    resamples : int
        Of the bootstrap; at least ``2 * pairs / (1 - level)``, for fewer could never decide.
    seed : int
        0 or more; the same seed draws the same groups.
    level : float
        Between 0 and 1: of the intervals, and 1 - level is how often the verdicts together may be wrong by chance.
    announce : callable, optional
        Called once, before the bootstrap starts, with the seconds that it will take about.

    Returns
    -------
    list of Comparison
        In the order of the names; empty for fewer than two models.

    Raises
    ------
    DataError
        Where there is no image, the models were not scored on the same images in the same order, or there is not one
        group per image.
    UsageError
        Where a model has no threshold, `level` is not between 0 and 1, or `resamples` are too few.
    """
    pairs = list(combinations(predictions, 2))
    if not pairs:
        return []
    check_level(level)
    _check_rows(predictions, groups=np.asarray(groups), thresholds=thresholds)
    _check_resamples(resamples, pairs=len(pairs), level=level)
    statistics = _figures(predictions, thresholds)
    if announce is not None:
        announce(bootstrap_cost(statistics, groups, resamples=resamples))
    drawn = resample_by_group(statistics, groups, resamples=resamples, seed=seed)
    n_groups = len(np.unique(np.asarray(groups)))
    found = [_compared(pair, predictions, thresholds, drawn, n_groups=n_groups, level=level) for pair in pairs]
    p_values, of_calls = holm([one.p_value for one in found]), holm([one.calls.p_value for one in found])
    comparisons = sum(p is not None for p in p_values)
    return [
        replace(one, p_adjusted=p, calls_p_adjusted=q, comparisons=comparisons)
        for one, p, q in zip(found, p_values, of_calls, strict=True)
    ]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p values of several tests so that one false finding among all is as rare as asked (Holm 1979).

    Parameters
    ----------
    p_values : sequence of (float or None)
        In [0, 1]; None for a test that could not be made, which does not count.

    Returns
    -------
    list of (float or None)
        In the same order, each at least as large as given and at most 1; None stays None.
    """
    ordered = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, at) in enumerate(ordered):
        largest = max(largest, min(1.0, p * (len(ordered) - rank)))
        adjusted[at] = largest
    return adjusted


def _figures(predictions: Mapping[str, Predictions], thresholds: Mapping[str, float]) -> Statistics:
    """Return a function of row weights that computes each model's AUC and accuracy, the rows sorted once."""
    auc_of = {name: weighted_auc(table.labels, table.scores) for name, table in predictions.items()}
    right_of = {name: _right(table, thresholds[name]).astype(np.float64) for name, table in predictions.items()}

    def figures(weights: Floats) -> dict[str, float | None]:
        total = weights.sum()
        areas = {_key("auc", name): auc(weights) for name, auc in auc_of.items()}
        return areas | {_key("accuracy", name): float(weights @ right / total) for name, right in right_of.items()}

    return figures


def _key(figure: str, name: str) -> str:
    return f"{figure} of {name}"


def _right(table: Predictions, threshold: float) -> npt.NDArray[np.bool_]:
    right: npt.NDArray[np.bool_] = (table.scores > threshold) == (table.labels == 1)
    return right


def _compared(
    pair: tuple[str, str],
    predictions: Mapping[str, Predictions],
    thresholds: Mapping[str, float],
    drawn: Mapping[str, Floats],
    *,
    n_groups: int,
    level: float,
) -> Comparison:
    """Test one pair, with nothing adjusted yet."""
    one, two = (predictions[name] for name in pair)
    auc = delong_test(one.labels, one.scores, two.scores, level=level)
    gain = {of: drawn[_key(of, pair[0])] - drawn[_key(of, pair[1])] for of in ("auc", "accuracy")}
    by_group = {of: percentile_interval(values, level=level) for of, values in gain.items()}
    return Comparison(
        first=pair[0],
        second=pair[1],
        n=len(one),
        n_groups=n_groups,
        threshold_first=float(thresholds[pair[0]]),
        threshold_second=float(thresholds[pair[1]]),
        auc=auc,
        auc_by_group=by_group["auc"],
        calls=mcnemar(*(_right(predictions[name], thresholds[name]) for name in pair)),
        accuracy_by_group=by_group["accuracy"],
        p_value=_larger_p_value(auc, by_group["auc"], gain["auc"]),
        level=level,
    )


def _larger_p_value(auc: PairedTest, by_group: Interval | None, gain: Floats) -> float | None:
    """Return the larger p value of DeLong's test and of the bootstrap by group (Davison and Hinkley 1997, section 4.4).

    The bootstrap's is twice the share of resamples on the wrong side of 0, so that it is small just where the interval
    leaves 0 out; one is added above and below, for a finite number of resamples never proves a p value of 0.
    """
    if auc.p_value is None or auc.p_value == 1.0:
        return auc.p_value  # undefined, or nothing can be larger
    if by_group is None:
        return None
    gain = gain[np.isfinite(gain)]
    wrong_side = min(int((gain <= 0).sum()), int((gain >= 0).sum()))
    return max(auc.p_value, min(1.0, 2 * (1 + wrong_side) / (1 + len(gain))))


def _error_rate(level: float) -> float:
    """Return 1 - level without the rounding that makes 1 - 0.95 a little more than 0.05."""
    return round(1 - level, 12)


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


# --- what is refused -------------------------------------------------------------------------------------------------


def _check_resamples(resamples: int, *, pairs: int, level: float) -> None:
    fewest = math.floor(2 * pairs / _error_rate(level))
    if resamples < fewest:
        raise UsageError(
            f"A bootstrap of {resamples} resamples can never tell {_counted(pairs, 'pair')} of models apart at level "
            f"{level:g}; give {fewest} or more, usually 1000."
        )


def _check_rows(
    predictions: Mapping[str, Predictions], *, groups: npt.NDArray[Any], thresholds: Mapping[str, float]
) -> None:
    if missing := [name for name in predictions if name not in thresholds]:
        raise UsageError(f"There is no threshold for {', '.join(missing)}; give one for each model, for example 0.5.")
    (first, table), *others = predictions.items()
    if not len(table):
        raise DataError("There are no predictions to compare; score at least one labelled image first.")
    if groups.shape != (len(table),):
        raise DataError(f"Groups of the shape {groups.shape} came for {_counted(len(table), 'image')}; give one each.")
    for name, other in others:
        if len(other) != len(table):
            found = f"{len(table):,} and {len(other):,} images"
        elif len(rows := np.flatnonzero(_rows_differ(table, other))):
            found = f"they first differ in row {rows[0]}, {table.table['path'].iloc[rows[0]]}"
        else:
            continue
        raise DataError(
            f"{first} and {name} were not scored on the same images in the same order ({found}); score both on the "
            "same rows of one catalog."
        )


def _rows_differ(one: Predictions, two: Predictions) -> npt.NDArray[np.bool_]:
    columns = [one.table[name].to_numpy() != two.table[name].to_numpy() for name in _ROW]
    differ: npt.NDArray[np.bool_] = np.logical_or.reduce(columns)
    return differ
