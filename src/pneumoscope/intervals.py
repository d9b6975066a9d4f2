"""How sure a figure is: confidence intervals, paired tests, and the bootstrap that resamples whole groups.

Owns Wilson's interval of a share, DeLong's interval and test of the area under the ROC curve, McNemar's test, and
percentile intervals over resampled groups. Where a method would give an interval of no width, the interval is ``None``
with the reason, for a width of 0 claims a certainty that nobody has. Knows nothing of Predictions, models or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from time import perf_counter
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pneumoscope.errors import DataError, UsageError

Floats = npt.NDArray[np.float64]

Statistics = Callable[[Floats], Mapping[str, float | None]]
"""Takes a weight of 0 or more per row (float64, shape (n,), whole numbers: how often the row was drawn) and returns
figures by name, the same names each time, ``None`` where one is undefined."""

LEVEL: Final = 0.95
"""Share of intervals that hold the truth, unless another is asked for."""

NO_BOOTSTRAP: Final = (
    "The bootstrap over groups gives no interval: the figure never varied between resamples, or more than half of them "
    "left it undefined."
)
"""Why `bootstrap_by_group` returns None for a figure."""

_EXACT_BELOW: Final = 25  # discordant images; the usual bound from which chi-squared is near enough to the binomial
_COST_SAMPLE: Final = 3  # resamples timed for an estimate, after one that warms up
_NO_WIDTH: Final = 1e-12  # narrower than this is rounding, not uncertainty


@dataclass(frozen=True)
class Interval:
    """A confidence interval.

    Attributes
    ----------
    low, high : float
        Its ends, in the unit of the figure; `low` is never above `high`.
    method : str
        ``wilson``, ``wilson by group``, ``delong`` or ``bootstrap by group``.
    level : float
        Share of such intervals that hold the truth, between 0 and 1.
    """

    low: float
    high: float
    method: str
    level: float = LEVEL

    def as_dict(self) -> dict[str, Any]:
        """Return ``low``, ``high``, ``method`` and ``level`` as ``metrics.json`` holds them."""
        return asdict(self)


@dataclass(frozen=True)
class AucEstimate:
    """The area under a ROC curve and how sure it is.

    Attributes
    ----------
    auc : float
        In [0, 1]: the share of (PNEUMONIA, NORMAL) pairs in the right order, a tie counting half.
    standard_error : float or None
        0 or more; None where a class has one image only.
    interval : Interval or None
        Clipped to [0, 1]; None where there is no standard error, or where it is 0.
    reason : str or None
        Why there is no interval, in one sentence.
    """

    auc: float
    standard_error: float | None
    interval: Interval | None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields under their names, the interval as a dictionary or None."""
        return asdict(self)


@dataclass(frozen=True)
class PairedTest:
    """A test of two models on the same images.

    Attributes
    ----------
    method : str
        ``delong``, ``mcnemar exact`` or ``mcnemar chi-squared``.
    first, second : float or None
        Each model's figure in [0, 1]: the AUC for DeLong, the accuracy for McNemar; None where it is undefined.
    difference : float or None
        The first less the second.
    p_value : float or None
        Two-sided, in [0, 1]; None where the test is undefined.
    standard_error : float or None
        Of the difference (DeLong only).
    interval : Interval or None
        Of the difference (DeLong only), clipped to [-1, 1].
    only_first, only_second : int or None
        Images that only the first, or only the second, model called right (McNemar only).
    reason : str or None
        Why the p value or DeLong's interval is missing, in one sentence.
    """

    method: str
    first: float | None = None
    second: float | None = None
    difference: float | None = None
    p_value: float | None = None
    standard_error: float | None = None
    interval: Interval | None = None
    only_first: int | None = None
    only_second: int | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that the method has under their names, the interval as a dictionary or None."""
        foreign = {"only_first", "only_second"} if self.method == "delong" else {"standard_error", "interval"}
        return {name: value for name, value in asdict(self).items() if name not in foreign}


def check_level(level: float) -> None:
    """Refuse a level that is no share.

    Parameters
    ----------
    level : float
        Of an interval.

    Raises
    ------
    UsageError
        Where it is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise UsageError(f"The level of an interval is {level}; give a share between 0 and 1, for example 0.95.")


# --- one share -------------------------------------------------------------------------------------------------------


def wilson(successes: float, n: float, *, level: float = LEVEL) -> Interval | None:
    """Return the score interval of a share (Wilson 1927), which holds its level even near 0 and 1.

    Parameters
    ----------
    successes : float
        From 0 to `n`; whole, but where images are worth fewer than there are (`counts.wilson_by_group`).
    n : float
        Trials, 0 or more; each is taken as independent of the others.
    level : float
        Between 0 and 1.

    Returns
    -------
    Interval or None
        In [0, 1]; None where `n` is 0.

    Raises
    ------
    UsageError
        Where `successes` is not from 0 to `n`, or `level` is not between 0 and 1.
    """
    if not 0 <= successes <= n:
        raise UsageError(f"There are {successes} successes in {n} trials; give a number from 0 to {n}.")
    z = _quantile(level)
    if not n:
        return None
    middle = (successes + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(successes * (n - successes) / n + z**2 / 4)
    # at the ends the formula gives 0 and 1 but for rounding
    low = max(0.0, middle - half) if successes else 0.0
    high = min(1.0, middle + half) if successes < n else 1.0
    return Interval(low, high, "wilson", level)


# --- the area under the ROC curve ------------------------------------------------------------------------------------


def delong(labels: npt.ArrayLike, scores: npt.ArrayLike, *, level: float = LEVEL) -> AucEstimate | None:
    """Estimate the AUC with its standard error and interval (DeLong, DeLong and Clarke-Pearson 1988).

    The placement values come from sorting, in O(n log n) steps as Sun and Xu (2014) showed. Each image is taken as
    independent of the others; where patients have several images, `bootstrap_by_group` is the honest interval.

    Parameters
    ----------
    labels : array_like of int, shape (n,)
        0 NORMAL, 1 PNEUMONIA.
    scores : array_like of float, shape (n,)
        Higher means PNEUMONIA; finite.
    level : float
        Between 0 and 1.

    Returns
    -------
    AucEstimate or None
        None where a class is missing. Without an interval where a class has one image only, and where the standard
        error is 0, as with perfect separation.

    Raises
    ------
    DataError
        Where the lengths differ, a label is not 0 or 1, or a score is not a finite number.
    UsageError
        Where `level` is not between 0 and 1.
    """
    z = _quantile(level)
    truth, (values,) = _checked(labels, scores)
    sick, well = _placements(truth, values)
    if not len(sick) or not len(well):
        return None
    auc, error = _area(sick, well), _error(sick, well)
    if not error:
        return AucEstimate(auc, error, None, _no_interval(len(sick), len(well)))
    interval = Interval(max(0.0, auc - z * error), min(1.0, auc + z * error), "delong", level)
    return AucEstimate(auc, error, interval)


def delong_test(
    labels: npt.ArrayLike, first: npt.ArrayLike, second: npt.ArrayLike, *, level: float = LEVEL
) -> PairedTest:
    """Test whether two models have the same AUC on the same images (DeLong, DeLong and Clarke-Pearson 1988).

    Parameters
    ----------
    labels : array_like of int, shape (n,)
        0 NORMAL, 1 PNEUMONIA.
    first, second : array_like of float, shape (n,)
        Scores of the two models for the same images in the same order; finite.
    level : float
        Between 0 and 1, of the interval of the difference.

    Returns
    -------
    PairedTest
        Models that put every pair in the same order have p value 1. Where the standard error is 0 although the areas
        differ, or a class has fewer than two images, the p value is None with the reason.

    Raises
    ------
    DataError
        Where the lengths differ, a label is not 0 or 1, or a score is not a finite number.
    UsageError
        Where `level` is not between 0 and 1.
    """
    z = _quantile(level)
    truth, (one, two) = _checked(labels, first, second)
    (sick_1, well_1), (sick_2, well_2) = _placements(truth, one), _placements(truth, two)
    sick, well = sick_1 - sick_2, well_1 - well_2
    if not len(sick) or not len(well):
        return PairedTest("delong", reason=_no_interval(len(sick), len(well)))
    areas = _area(sick_1, well_1), _area(sick_2, well_2)
    difference, error = _area(sick, well), _error(sick, well)
    if not error:
        alike = not sick.any() and not well.any()
        reason = _no_interval(len(sick), len(well), alike=alike)
        return PairedTest("delong", *areas, difference, 1.0 if alike else None, error, reason=reason)
    interval = Interval(max(-1.0, difference - z * error), min(1.0, difference + z * error), "delong", level)
    p_value = math.erfc(abs(difference) / error / math.sqrt(2))  # both tails of the normal distribution
    return PairedTest("delong", *areas, difference, p_value, error, interval)


def weighted_auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> Callable[[Floats], float | None]:
    """Sort once and return a function that computes the AUC of weighted images in O(n) steps, exact with ties.

    Parameters
    ----------
    labels : array_like of int, shape (n,)
        0 NORMAL, 1 PNEUMONIA.
    scores : array_like of float, shape (n,)
        Higher means PNEUMONIA; finite.

    Returns
    -------
    callable
        Takes weights of 0 or more (float64, shape (n,)) and returns the AUC in [0, 1]; None where a class has no
        weight. Whole-numbered weights give the very AUC of the repeated rows.

    Raises
    ------
    DataError
        Where the lengths differ, a label is not 0 or 1, or a score is not a finite number.
    """
    truth, (values,) = _checked(labels, scores)
    distinct, place = np.unique(values, return_inverse=True)
    sick, well = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
    place_sick, place_well = place[sick], place[well]

    def auc(weights: Floats) -> float | None:
        positive = np.bincount(place_sick, weights=weights[sick], minlength=len(distinct))
        negative = np.bincount(place_well, weights=weights[well], minlength=len(distinct))
        pairs = float(positive.sum()) * float(negative.sum())
        if not pairs:
            return None
        return float(positive @ (np.cumsum(negative) - negative / 2)) / pairs

    return auc


# --- right and wrong calls -------------------------------------------------------------------------------------------


def mcnemar(right_first: npt.ArrayLike, right_second: npt.ArrayLike) -> PairedTest:
    """Test whether two models call the same share of the same images right (McNemar 1947).

    Only the images that one model calls right and the other wrong tell the two apart. With fewer than 25 of them the
    p value is the exact binomial one; with more it is that of chi-squared with one degree of freedom and Edwards's
    (1948) continuity correction. Each image is taken as independent of the others.

    Parameters
    ----------
    right_first, right_second : array_like of bool, shape (n,)
        Whether each model called each image right.

    Returns
    -------
    PairedTest
        Without standard error and interval; undefined, with the reason, where there is no image.

    Raises
    ------
    DataError
        Where the lengths differ.
    """
    first, second = np.asarray(right_first, dtype=bool), np.asarray(right_second, dtype=bool)
    if first.ndim != 1 or first.shape != second.shape:
        raise DataError(
            f"The calls of two models have the shapes {first.shape} and {second.shape}; give one call per image and "
            "model, for the same images."
        )
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    if not len(first):
        return PairedTest("mcnemar exact", only_first=0, only_second=0, reason="There is no image.")
    if discordant < _EXACT_BELOW:
        method = "mcnemar exact"
        tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
        p_value = min(1.0, 2 * tail / 2**discordant)
    else:
        method = "mcnemar chi-squared"
        squared = max(0, abs(only_first - only_second) - 1) ** 2 / discordant
        p_value = math.erfc(math.sqrt(squared / 2))  # upper tail of chi-squared with one degree of freedom
    difference = (only_first - only_second) / len(first)
    shares = float(first.mean()), float(second.mean())
    return PairedTest(method, *shares, difference, p_value, only_first=only_first, only_second=only_second)


# --- whole groups ----------------------------------------------------------------------------------------------------


def bootstrap_by_group(
    statistics: Statistics, groups: npt.ArrayLike, *, resamples: int = 1000, seed: int = 0, level: float = LEVEL
) -> dict[str, Interval | None]:
    """Return percentile intervals from resampled groups (Efron 1979; groups as in Field and Welsh 2007).

    Images of one patient are alike, so that drawing images one by one would count the same evidence several times:
    whole groups are drawn. With few groups such intervals are too narrow.

    Parameters
    ----------
    statistics : callable
        See `Statistics`; called once per resample. A drawn row is a weight, so that no row is copied.
    groups : array_like of str or int, shape (n,)
        The group of each row.
    resamples : int
        1 or more.
    seed : int
        0 or more; the same seed draws the same groups.
    level : float
        Between 0 and 1.

    Returns
    -------
    dict of str to (Interval or None)
        None as `percentile_interval` says; `NO_BOOTSTRAP` is the reason.

    Raises
    ------
    DataError
        Where there is no row.
    UsageError
        Where `resamples` is below 1 or `level` is not between 0 and 1.
    """
    check_level(level)
    drawn = resample_by_group(statistics, groups, resamples=resamples, seed=seed)
    return {name: percentile_interval(values, level=level) for name, values in drawn.items()}


def resample_by_group(
    statistics: Statistics, groups: npt.ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Floats]:
    """Compute figures on resampled groups; as many groups are drawn as there are, with replacement.

    Parameters
    ----------
    statistics, groups, resamples, seed
        As in `bootstrap_by_group`.

    Returns
    -------
    dict of str to ndarray of float64, shape (resamples,)
        Each figure in each resample, NaN where it is undefined.

    Raises
    ------
    DataError
        Where there is no row.
    UsageError
        Where `resamples` is below 1.
    """
    drawn: dict[str, list[float]] = {}
    for weights in _weights(groups, resamples=resamples, seed=seed):
        for name, value in statistics(weights).items():
            drawn.setdefault(name, []).append(math.nan if value is None else value)
    return {name: np.array(values, dtype=np.float64) for name, values in drawn.items()}


def percentile_interval(values: Floats, *, level: float = LEVEL) -> Interval | None:
    """Return the interval between two percentiles of resampled figures (Efron 1979).

    Parameters
    ----------
    values : ndarray of float64, shape (resamples,)
        From `resample_by_group`; those that are not finite are left out.
    level : float
        Between 0 and 1; half of the rest is cut off at either end.

    Returns
    -------
    Interval or None
        None where fewer than half of the values are finite, or where the interval has no width.

    Raises
    ------
    UsageError
        Where `level` is not between 0 and 1.
    """
    check_level(level)
    defined = values[np.isfinite(values)]
    if not len(defined) or 2 * len(defined) < len(values):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return None if high - low <= _NO_WIDTH * max(1.0, abs(low)) else Interval(low, high, "bootstrap by group", level)


def bootstrap_cost(statistics: Statistics, groups: npt.ArrayLike, *, resamples: int = 1000) -> float:
    """Estimate how long a bootstrap will take, from a few resamples, so that it can be said before it starts.

    Parameters
    ----------
    statistics, groups, resamples
        As in `bootstrap_by_group`.

    Returns
    -------
    float
        Seconds, on this machine as busy as it is now.

    Raises
    ------
    DataError
        Where there is no row.
    UsageError
        Where `resamples` is below 1.
    """
    _checked_resamples(resamples)
    spent = []
    start = perf_counter()
    for weights in _weights(groups, resamples=1 + _COST_SAMPLE, seed=0):
        statistics(weights)
        now = perf_counter()
        spent.append(now - start)
        start = now
    return resamples * float(np.median(spent[1:]))


def _weights(groups: npt.ArrayLike, *, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield, for each resample, how often each row's group was drawn."""
    _checked_resamples(resamples)
    named, group = np.unique(np.asarray(groups), return_inverse=True)
    if not len(named):
        raise DataError("There is no group to resample; give one group per image.")
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = np.bincount(random.integers(len(named), size=len(named)), minlength=len(named))
        yield drawn.astype(np.float64)[group]


def _checked_resamples(resamples: int) -> None:
    if resamples < 1:
        raise UsageError(f"A bootstrap of {resamples} resamples was asked for; give 1 or more, usually 1000.")


# --- what DeLong's interval and test share ---------------------------------------------------------------------------


def _quantile(level: float) -> float:
    """Return the normal deviate that a two-sided interval of this level reaches to."""
    check_level(level)
    return NormalDist().inv_cdf((1 + level) / 2)


def _checked(labels: npt.ArrayLike, *scores: npt.ArrayLike) -> tuple[npt.NDArray[Any], list[Floats]]:
    truth, columns = np.asarray(labels), [np.asarray(column, dtype=np.float64) for column in scores]
    for column in columns:
        if truth.ndim != 1 or column.shape != truth.shape:
            raise DataError(
                f"Labels have the shape {truth.shape} and scores the shape {column.shape}; give one of each per image."
            )
        if not np.isfinite(column).all():
            raise DataError("A score is not a finite number; score the images anew.")
    if not ((truth == 0) | (truth == 1)).all():
        raise DataError("A label is neither 0 nor 1; give 0 for NORMAL and 1 for PNEUMONIA.")
    return truth, columns


def _placements(labels: npt.NDArray[Any], scores: Floats) -> tuple[Floats, Floats]:
    """Count the right-ordered pairs of each PNEUMONIA image and of each NORMAL image, ties half.

    Counts instead of shares: halves of whole numbers are exact, so that a variance of 0 is exactly 0.
    """
    sick, well = scores[labels == 1], scores[labels == 0]
    return _below(sick, well), len(sick) - _below(well, sick)


def _below(values: Floats, others: Floats) -> Floats:
    ordered = np.sort(others)
    below: Floats = (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2
    return below


def _area(sick: Floats, well: Floats) -> float:
    return float(sick.sum()) / (len(sick) * len(well))


def _error(sick: Floats, well: Floats) -> float | None:
    """Return DeLong's standard error of the area; None where a class has one image."""
    m, n = len(sick), len(well)
    if m < 2 or n < 2:
        return None
    return math.sqrt(float(sick.var(ddof=1)) / (m * n**2) + float(well.var(ddof=1)) / (n * m**2))


def _no_interval(n_positive: int, n_negative: int, *, alike: bool = False) -> str:
    images = {"PNEUMONIA": n_positive, "NORMAL": n_negative}
    if missing := [name for name, n in images.items() if n == 0]:
        return f"There is no {missing[0]} image."
    if alike:
        return "Both models put every pair of images in the same order, so that the difference has no variance."
    if single := [name for name, n in images.items() if n == 1]:
        return f"There is one {single[0]} image only, and one image has no variance."
    return "DeLong's variance is 0, as with perfect separation, and an interval of no width would claim certainty."
