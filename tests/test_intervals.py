"""Intervals and paired tests against statsmodels, scikit-learn, SciPy, published examples and DeLong's own sums."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.proportion import proportion_confint

from pneumoscope import intervals
from pneumoscope.errors import DataError, UsageError
from pneumoscope.intervals import Interval, PairedTest

Floats = npt.NDArray[np.float64]
Rows = list[tuple[int, float, float]]

# few values, so that many are tied, beside any others
VALUES = st.sampled_from([0.0, 0.25, 0.5, 0.5 + 2.0**-24, 1.0]) | st.floats(0, 1, width=32, allow_subnormal=False)
ROWS = st.lists(st.tuples(st.integers(0, 1), VALUES, VALUES), min_size=0, max_size=30)
TWO_OF_EACH = st.tuples(ROWS, *[st.tuples(VALUES, VALUES)] * 4).map(
    lambda drawn: drawn[0] + [(at % 2, *values) for at, values in enumerate(drawn[1:])]
)
NO_VARIANCE = "DeLong's variance is 0, as with perfect separation, and an interval of no width would claim certainty."
exhaustively = settings(derandomize=True, deadline=None, max_examples=150, database=None)


def columns(rows: Rows) -> tuple[npt.NDArray[np.int8], Floats, Floats]:
    label, first, second = zip(*rows, strict=True)
    return np.array(label, np.int8), np.array(first), np.array(second)


def random_case(n: int, seed: int) -> tuple[npt.NDArray[np.int8], Floats, Floats]:
    """Two correlated models with ties."""
    random = np.random.default_rng(seed)
    labels = (random.random(n) < 0.6).astype(np.int8)
    common = random.normal(0.35 + 0.25 * labels, 0.25)
    noise = random.normal(0, 0.15, (2, n))
    first, second = np.round(np.clip(common + noise, 0, 1), 2)
    return labels, first, second


def delong_by_definition(labels: Sequence[int], *models: Sequence[float]) -> tuple[list[float], list[list[float]]]:
    """Areas and their covariances by comparing each pair of images, equations 5 to 8 of DeLong et al. (1988)."""

    def psi(sick: float, well: float) -> float:
        return 1.0 if sick > well else 0.5 if sick == well else 0.0

    areas, v10, v01 = [], [], []
    for scores in models:
        sick = [score for score, label in zip(scores, labels, strict=True) if label == 1]
        well = [score for score, label in zip(scores, labels, strict=True) if label == 0]
        v10.append([sum(psi(x, y) for y in well) / len(well) for x in sick])
        v01.append([sum(psi(x, y) for x in sick) / len(sick) for y in well])
        areas.append(sum(psi(x, y) for x in sick for y in well) / len(sick) / len(well))

    def covariance(components: list[list[float]], r: int, s: int) -> float:
        pairs = zip(components[r], components[s], strict=True)
        return sum((a - areas[r]) * (b - areas[s]) for a, b in pairs) / (len(components[0]) - 1)

    span = range(len(models))
    return areas, [
        [covariance(v10, r, s) / len(v10[0]) + covariance(v01, r, s) / len(v01[0]) for s in span] for r in span
    ]


# --- Wilson ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("n", [1, 2, 7, 624, 1_000_000])
def test_wilson_is_that_of_statsmodels(n: int, level: float) -> None:
    for successes in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        interval = intervals.wilson(successes, n, level=level)
        assert interval is not None
        expected = proportion_confint(successes, n, alpha=1 - level, method="wilson")
        assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-12)
        assert (interval.method, interval.level) == ("wilson", level)
        assert 0 <= interval.low < interval.high <= 1


def test_wilson_is_that_of_published_examples() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, n), ends in published.items():
        interval = intervals.wilson(successes, n)
        assert interval is not None
        assert (round(interval.low, 4), round(interval.high, 4)) == ends


@pytest.mark.parametrize("n", [1, 3, 20, 624])
def test_wilson_ends_exactly_at_0_and_1_where_nothing_or_everything_succeeds(n: int) -> None:
    none, every = intervals.wilson(0, n), intervals.wilson(n, n)
    assert none is not None
    assert every is not None
    assert (none.low, every.high) == (0, 1)
    assert none.high == pytest.approx(1 - every.low)


def test_wilson_without_trials_is_none() -> None:
    assert intervals.wilson(0, 0) is None


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (1, 0), (0, -1)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(UsageError) as caught:
        intervals.wilson(successes, n)
    assert str(caught.value) == f"There are {successes} successes in {n} trials; give a number from 0 to {n}."


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, math.nan])
@pytest.mark.parametrize(
    "call",
    [
        lambda level: intervals.wilson(1, 2, level=level),
        lambda level: intervals.delong([0, 1], [0.1, 0.9], level=level),
        lambda level: intervals.delong_test([0, 1], [0.1, 0.9], [0.2, 0.8], level=level),
        lambda level: intervals.bootstrap_by_group(lambda weights: {}, ["a"], level=level),
        lambda level: intervals.percentile_interval(np.arange(9.0), level=level),
    ],
    ids=["wilson", "delong", "delong_test", "bootstrap_by_group", "percentile_interval"],
)
def test_a_level_is_a_share(call: Callable[[float], object], level: float) -> None:
    with pytest.raises(UsageError) as caught:
        call(level)
    assert str(caught.value) == (
        f"The level of an interval is {level}; give a share between 0 and 1, for example 0.95."
    )


# --- DeLong, one model -----------------------------------------------------------------------------------------------


@exhaustively
@given(TWO_OF_EACH)
def test_delong_is_that_of_comparing_each_pair(rows: Rows) -> None:
    labels, scores, _ = columns(rows)
    (area,), ((variance,),) = delong_by_definition(labels.tolist(), scores.tolist())
    found = intervals.delong(labels, scores)
    assert found is not None
    assert found.auc == pytest.approx(area, abs=1e-12)
    assert found.standard_error == pytest.approx(math.sqrt(variance), abs=1e-9)
    if found.interval is None:
        assert variance == pytest.approx(0, abs=1e-15)
        assert found.standard_error == 0
    else:
        half = stats.norm.ppf(0.975) * math.sqrt(variance)
        expected = (max(0, area - half), min(1, area + half))
        assert (found.interval.low, found.interval.high) == pytest.approx(expected, abs=1e-9)


def test_delong_is_that_of_a_published_example() -> None:
    # CT readings of 58 normal and 51 abnormal patients on a scale from 1 to 5: Hanley and McNeil, Radiology 143 (1982)
    # 29, table I; area, standard error and interval as Stata's manual prints them for `roctab` on the same table
    normal = np.repeat([1, 2, 3, 4, 5], [33, 6, 6, 11, 2])
    abnormal = np.repeat([1, 2, 3, 4, 5], [3, 2, 2, 11, 33])
    found = intervals.delong([0] * len(normal) + [1] * len(abnormal), [*normal, *abnormal])
    assert found is not None
    assert found.interval is not None
    assert (found.auc, found.standard_error) == pytest.approx((0.8932, 0.0307), abs=5e-5)
    assert (found.interval.low, found.interval.high) == pytest.approx((0.83295, 0.95339), abs=5e-6)


def test_delong_at_another_level_is_as_much_wider_as_the_normal_distribution_says() -> None:
    labels, scores, _ = random_case(300, 1)
    found, wide = intervals.delong(labels, scores), intervals.delong(labels, scores, level=0.99)
    assert found is not None
    assert wide is not None
    assert found.interval is not None
    assert wide.interval is not None
    assert (found.interval.method, found.interval.level, wide.interval.level) == ("delong", 0.95, 0.99)
    ratio = (wide.interval.high - wide.interval.low) / (found.interval.high - found.interval.low)
    assert ratio == pytest.approx(stats.norm.ppf(0.995) / stats.norm.ppf(0.975), abs=1e-9)


def test_delong_stays_within_0_and_1() -> None:
    labels, scores = [0, 0, 0, 1, 1, 1], np.array([0.1, 0.2, 0.8, 0.7, 0.9, 0.95])
    best, worst = intervals.delong(labels, scores), intervals.delong(labels, -scores)
    assert best is not None
    assert worst is not None
    assert best.interval is not None
    assert worst.interval is not None
    assert (best.interval.high, worst.interval.low) == (1, 0)
    assert best.interval.low == pytest.approx(1 - worst.interval.high)


@pytest.mark.parametrize("labels", [[], [0], [1], [0, 0, 0], [1, 1, 1]])
def test_without_both_classes_there_is_no_area(labels: list[int]) -> None:
    assert intervals.delong(labels, [0.5] * len(labels)) is None


@pytest.mark.parametrize(
    ("scores", "auc"), [([0.1, 0.2, 0.8, 0.9], 1.0), ([0.8, 0.9, 0.1, 0.2], 0.0), ([0.5] * 4, 0.5)]
)
def test_where_the_variance_is_0_there_is_a_reason_instead_of_an_interval(scores: list[float], auc: float) -> None:
    found = intervals.delong([0, 0, 1, 1], scores)
    assert found is not None
    assert found.as_dict() == {
        "auc": auc,
        "standard_error": 0.0,
        "interval": None,
        "reason": NO_VARIANCE,
    }


@pytest.mark.parametrize(("well", "sick"), [(3, 7), (49, 11), (1000, 3)])
def test_areas_that_differ_without_any_variance_have_no_p_value(well: int, sick: int) -> None:
    perfect, constant = [0.1] * well + [0.9] * sick, [0.5] * (well + sick)
    tested = intervals.delong_test([0] * well + [1] * sick, perfect, constant)
    assert (tested.difference, tested.standard_error, tested.p_value, tested.interval) == (0.5, 0.0, None, None)
    assert tested.reason == NO_VARIANCE


@pytest.mark.parametrize(("label", "name"), [(1, "PNEUMONIA"), (0, "NORMAL")])
def test_one_image_of_a_class_has_no_variance(label: int, name: str) -> None:
    labels, scores = [label, 1 - label, 1 - label], [0.5, 0.2, 0.7]
    found = intervals.delong(labels, scores)
    assert found is not None
    reason = f"There is one {name} image only, and one image has no variance."
    assert (found.auc, found.standard_error, found.interval, found.reason) == (0.5, None, None, reason)
    tested = intervals.delong_test(labels, scores, [0.9, 0.2, 0.7])
    assert (tested.p_value, tested.standard_error, tested.interval, tested.reason) == (None, None, None, reason)
    assert tested.difference == (-0.5 if label else 0.5)


# --- DeLong, two models ----------------------------------------------------------------------------------------------


@exhaustively
@given(TWO_OF_EACH)
def test_the_paired_test_is_that_of_comparing_each_pair(rows: Rows) -> None:
    labels, first, second = columns(rows)
    areas, s = delong_by_definition(labels.tolist(), first.tolist(), second.tolist())
    difference, variance = areas[0] - areas[1], s[0][0] + s[1][1] - 2 * s[0][1]
    found = intervals.delong_test(labels, first, second)
    assert found.difference == pytest.approx(difference, abs=1e-12)
    assert [found.first, found.second] == pytest.approx(areas, abs=1e-12)
    if found.standard_error == 0:
        assert variance == pytest.approx(0, abs=1e-15)
        assert found.interval is None
        assert found.p_value in {1.0, None}
        return
    error = math.sqrt(variance)
    assert found.standard_error == pytest.approx(error, abs=1e-7)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(difference) / error), abs=1e-6)
    half = stats.norm.ppf(0.975) * error
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx(
        (max(-1, difference - half), min(1, difference + half)), abs=1e-7
    )


@pytest.mark.parametrize("seed", range(3))
def test_swapping_the_models_turns_the_sign_and_nothing_else(seed: int) -> None:
    labels, first, second = random_case(200, seed)
    one, two = intervals.delong_test(labels, first, second), intervals.delong_test(labels, second, first)
    assert one.difference is not None
    assert one.interval is not None
    assert two.interval is not None
    assert (two.first, two.second) == (one.second, one.first)
    assert (two.difference, two.p_value, two.standard_error) == (-one.difference, one.p_value, one.standard_error)
    assert (two.interval.low, two.interval.high) == (-one.interval.high, -one.interval.low)


def test_a_worse_model_has_a_negative_difference_and_a_small_p_value() -> None:
    labels, good, _ = random_case(500, 3)
    poor = np.random.default_rng(4).random(500)
    found = intervals.delong_test(labels, poor, good)
    assert found.difference is not None
    assert found.p_value is not None
    assert found.interval is not None
    assert found.difference < -0.1
    assert found.p_value < 1e-6
    assert found.interval.high < 0


@pytest.mark.parametrize("labels", [[0, 1], [0, 0, 1, 1], [0, 1, 0, 1, 1]])
def test_models_that_order_every_pair_alike_have_p_1(labels: list[int]) -> None:
    scores = np.random.default_rng(0).random(len(labels))
    for other in (scores, scores**3):  # another scale is the same order
        auc = roc_auc_score(labels, scores)
        assert intervals.delong_test(labels, scores, other) == PairedTest(
            "delong", auc, auc, 0.0, 1.0, 0.0 if len(labels) > 2 else None, None,
            reason="Both models put every pair of images in the same order, so that the difference has no variance.",
        )  # fmt: skip


def test_two_perfect_models_cannot_be_told_apart() -> None:
    found = intervals.delong_test([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], [0.3, 0.1, 0.9, 0.6])
    assert (found.difference, found.p_value, found.interval) == (0.0, 1.0, None)


@pytest.mark.parametrize(("labels", "name"), [([1, 1], "NORMAL"), ([0, 0], "PNEUMONIA"), ([], "PNEUMONIA")])
def test_one_class_leaves_the_paired_test_undefined(labels: list[int], name: str) -> None:
    scores = [0.1, 0.9][: len(labels)]
    assert intervals.delong_test(labels, scores, scores).as_dict() == {
        "method": "delong", "first": None, "second": None, "difference": None, "p_value": None, "standard_error": None,
        "interval": None, "reason": f"There is no {name} image.",
    }  # fmt: skip


@pytest.mark.parametrize("call", [intervals.delong, intervals.weighted_auc])
def test_labels_and_scores_that_do_not_fit_are_refused(call: Callable[..., object]) -> None:
    for labels, scores, message in [
        ([0, 1], [0.1], "Labels have the shape (2,) and scores the shape (1,); give one of each per image."),
        (
            [[0, 1]],
            [[0.1, 0.2]],
            "Labels have the shape (1, 2) and scores the shape (1, 2); give one of each per image.",
        ),
        ([0, 1], [0.1, math.nan], "A score is not a finite number; score the images anew."),
        ([0, 2], [0.1, 0.2], "A label is neither 0 nor 1; give 0 for NORMAL and 1 for PNEUMONIA."),
    ]:
        with pytest.raises(DataError) as caught:
            call(labels, scores)
        assert str(caught.value) == message


def test_a_second_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"scores the shape \(3,\); give one of each per image"):
        intervals.delong_test([0, 1], [0.1, 0.2], [0.1, 0.2, 0.3])


def test_a_large_set_gives_the_area_of_scikit_learn() -> None:
    labels, scores, other = random_case(200_000, 5)
    found, tested = intervals.delong(labels, scores), intervals.delong_test(labels, scores, other)
    assert found is not None
    assert found.auc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert tested.difference == pytest.approx(roc_auc_score(labels, scores) - roc_auc_score(labels, other), abs=1e-12)


# --- the area with weights -------------------------------------------------------------------------------------------


@exhaustively
@given(TWO_OF_EACH, st.randoms(use_true_random=False))
def test_the_weighted_area_is_that_of_scikit_learn(rows: Rows, random: np.random.RandomState) -> None:
    labels, scores, _ = columns(rows)
    auc = intervals.weighted_auc(labels, scores)
    for high in (1, 3, 1000):
        weights = np.array([random.randint(0, high) for _ in rows], np.float64)
        found = auc(weights)
        if not weights[labels == 1].any() or not weights[labels == 0].any():
            assert found is None
        else:
            assert found == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights), abs=1e-12)


def test_whole_weights_are_repeated_rows() -> None:
    labels, scores, _ = random_case(80, 6)
    times = np.random.default_rng(7).integers(0, 4, 80)
    found = intervals.weighted_auc(labels, scores)(times.astype(np.float64))
    repeated = intervals.delong(np.repeat(labels, times), np.repeat(scores, times))
    assert repeated is not None
    assert found == repeated.auc


def test_perfect_separation_has_area_1_for_any_weights() -> None:
    auc = intervals.weighted_auc([0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.7, 0.8])
    weights = np.random.default_rng(8).integers(1, 50, (20, 5)).astype(np.float64)
    assert [auc(row) for row in weights] == [1.0] * 20


@pytest.mark.parametrize("labels", [[], [1], [0, 0]])
def test_the_weighted_area_of_one_class_is_none(labels: list[int]) -> None:
    assert intervals.weighted_auc(labels, [0.5] * len(labels))(np.ones(len(labels))) is None


# --- McNemar ---------------------------------------------------------------------------------------------------------


def calls(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    counts = (both, only_first, only_second, neither)
    pairs = [(True, True), (True, False), (False, True), (False, False)]
    rows = [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
    return [row[0] for row in rows], [row[1] for row in rows]


@pytest.mark.parametrize(
    ("only_first", "only_second", "exact"),
    [(0, 1, True), (0, 5, True), (3, 9, True), (12, 12, True), (5, 19, True), (24, 0, True), (12, 13, False),
     (13, 12, False), (25, 0, False), (20, 20, False), (40, 90, False), (700, 500, False)],
)  # fmt: skip
def test_mcnemar_is_that_of_statsmodels(only_first: int, only_second: int, exact: bool) -> None:
    found = intervals.mcnemar(*calls(30, only_first, only_second, 7))
    expected = statsmodels_mcnemar([[30, only_first], [only_second, 7]], exact=exact, correction=True)
    assert found.method == ("mcnemar exact" if exact else "mcnemar chi-squared")
    if only_first == only_second and not exact:
        assert found.p_value == 1.0  # the correction never makes equal counts look different
    else:
        assert found.p_value == pytest.approx(expected.pvalue, abs=1e-12)
    assert (found.only_first, found.only_second) == (only_first, only_second)
    assert found.difference == pytest.approx((only_first - only_second) / (37 + only_first + only_second))
    assert (found.standard_error, found.interval, found.reason) == (None, None, None)


def test_the_exact_test_is_the_binomial_one() -> None:
    found = intervals.mcnemar(*calls(0, 2, 8, 0))
    assert found.p_value == pytest.approx(stats.binomtest(2, 10, 0.5).pvalue, abs=1e-12)


def test_the_same_calls_have_p_1() -> None:
    found = intervals.mcnemar([True, False, True], [True, False, True])
    assert (found.difference, found.p_value, found.method) == (0.0, 1.0, "mcnemar exact")


@pytest.mark.parametrize("right", [True, False])
def test_one_image_tells_nothing(right: bool) -> None:
    found = intervals.mcnemar([right], [not right])
    assert (found.difference, found.p_value) == (1.0 if right else -1.0, 1.0)


def test_mcnemar_is_written_with_its_counts_alone() -> None:
    assert intervals.mcnemar(*calls(1, 1, 0, 2)).as_dict() == {
        "method": "mcnemar exact", "first": 0.5, "second": 0.25, "difference": 0.25, "p_value": 1.0, "only_first": 1,
        "only_second": 0, "reason": None,
    }  # fmt: skip


def test_no_image_leaves_mcnemar_undefined() -> None:
    found = intervals.mcnemar([], [])
    assert (found.difference, found.p_value, found.reason) == (None, None, "There is no image.")


def test_calls_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        intervals.mcnemar([True, False], [True])
    assert str(caught.value) == (
        "The calls of two models have the shapes (2,) and (1,); give one call per image and model, for the same images."
    )


# --- the bootstrap by group ------------------------------------------------------------------------------------------


def width(interval: Interval | None) -> float:
    assert interval is not None
    return interval.high - interval.low


def mean_of(values: npt.ArrayLike) -> intervals.Statistics:
    column = np.asarray(values, dtype=np.float64)
    return lambda weights: {"mean": float(weights @ column / weights.sum())}


def test_singleton_groups_give_the_bootstrap_of_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=150)
    found = intervals.bootstrap_by_group(mean_of(values), np.arange(150), resamples=4000)["mean"]
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found is not None
    error = values.std() / math.sqrt(150)
    # a percentile of 4,000 draws has a Monte Carlo error of about 0.04 standard errors
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.2 * error)


def test_singleton_groups_give_the_width_of_delong() -> None:
    labels, scores, _ = random_case(500, 9)
    auc = intervals.weighted_auc(labels, scores)
    found = intervals.bootstrap_by_group(lambda w: {"auc": auc(w)}, np.arange(500), resamples=3000)["auc"]
    estimate = intervals.delong(labels, scores)
    assert estimate is not None
    assert width(found) == pytest.approx(width(estimate.interval), rel=0.07)


def test_groups_give_the_width_of_the_analytic_error_of_group_means() -> None:
    random = np.random.default_rng(2)
    patients, images = 200, 5
    values = (random.normal(size=(patients, 1)) + random.normal(size=(patients, images)) / 2).ravel()
    groups = np.repeat(np.arange(patients), images)
    found = intervals.bootstrap_by_group(mean_of(values), groups, resamples=3000)["mean"]
    of_groups = values.reshape(patients, images).mean(axis=1)
    assert width(found) == pytest.approx(2 * 1.96 * of_groups.std() / math.sqrt(patients), rel=0.07)


def test_rows_repeated_inside_their_group_do_not_narrow_the_interval() -> None:
    labels, scores, _ = random_case(120, 10)
    groups = np.array([f"person{at}" for at in range(120)])

    def interval(times: int, by: npt.NDArray[np.str_]) -> Interval | None:
        auc = intervals.weighted_auc(np.repeat(labels, times), np.repeat(scores, times))
        return intervals.bootstrap_by_group(lambda w: {"auc": auc(w)}, by, resamples=1000)["auc"]

    once, grouped = interval(1, groups), interval(4, np.repeat(groups, 4))
    rows = interval(4, np.array([f"row{at}" for at in range(480)]))
    assert grouped == once
    assert width(rows) == pytest.approx(width(once) / 2, rel=0.15)  # what drawing rows one by one would have claimed


def test_a_group_is_drawn_whole_and_as_many_are_drawn_as_there_are() -> None:
    groups = ["b", "a", "b", "c", "c", "c", "d"]
    seen: list[list[float]] = []

    def watch(weights: Floats) -> dict[str, float | None]:
        assert weights.dtype == np.float64
        seen.append(weights.tolist())
        return {}

    assert intervals.bootstrap_by_group(watch, groups, resamples=50) == {}
    assert len(seen) == 50
    assert len({tuple(weights) for weights in seen}) > 20
    for b1, a, b2, c1, c2, c3, d in seen:
        assert (b1, c1) == (b2, c2)
        assert c2 == c3
        assert a + b1 + c1 + d == 4


def test_the_seed_decides() -> None:
    values, groups = np.arange(30.0), np.arange(30)
    draw = [intervals.resample_by_group(mean_of(values), groups, resamples=20, seed=seed)["mean"] for seed in (3, 3, 4)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()
    assert draw[0].shape == (20,)
    known = intervals.bootstrap_by_group(mean_of(values), groups, resamples=20, seed=3)["mean"]
    assert known == intervals.percentile_interval(draw[0])


def test_resamples_that_leave_a_figure_undefined_are_left_out() -> None:
    labels = [1, 0, 0, 0, 0, 0]  # a third of the resamples have no PNEUMONIA image
    auc = intervals.weighted_auc(labels, [0.5, 0.1, 0.2, 0.6, 0.7, 0.8])
    drawn = intervals.resample_by_group(lambda w: {"auc": auc(w)}, range(6), resamples=500)["auc"]
    assert np.isnan(drawn).mean() == pytest.approx((5 / 6) ** 6, abs=0.07)
    found = intervals.percentile_interval(drawn)
    assert found is not None
    kept = drawn[~np.isnan(drawn)]
    assert (found.low, found.high) == pytest.approx(np.percentile(kept, [2.5, 97.5]))


@pytest.mark.parametrize(("undefined", "given"), [(50, True), (51, False), (100, False)])
def test_fewer_than_half_defined_give_no_interval(undefined: int, given: bool) -> None:
    values = np.arange(100.0)
    values[:undefined] = [math.nan, math.inf][undefined % 2]
    assert (intervals.percentile_interval(values) is not None) == given


@pytest.mark.parametrize("groups", [["a", "b", "c", "d"], ["a"] * 4])
def test_a_figure_that_never_varies_has_no_interval(groups: list[str]) -> None:
    auc = intervals.weighted_auc([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
    third = mean_of([1 / 3] * 4)  # rounding makes it differ by a bit
    found = intervals.bootstrap_by_group(lambda w: {"auc": auc(w), **third(w)}, groups, resamples=200)
    assert found == {"auc": None, "mean": None}


def test_the_percentiles_are_those_of_the_level() -> None:
    found = intervals.percentile_interval(np.arange(101.0), level=0.8)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((10, 90))
    assert (found.method, found.level) == ("bootstrap by group", 0.8)


@pytest.mark.parametrize("resamples", [0, -5])
@pytest.mark.parametrize("call", [intervals.bootstrap_by_group, intervals.resample_by_group, intervals.bootstrap_cost])
def test_no_resamples_are_refused(call: Callable[..., object], resamples: int) -> None:
    with pytest.raises(UsageError) as caught:
        call(mean_of([1.0]), ["a"], resamples=resamples)
    assert str(caught.value) == f"A bootstrap of {resamples} resamples was asked for; give 1 or more, usually 1000."


@pytest.mark.parametrize("call", [intervals.bootstrap_by_group, intervals.resample_by_group, intervals.bootstrap_cost])
def test_no_groups_are_refused(call: Callable[..., object]) -> None:
    with pytest.raises(DataError) as caught:
        call(mean_of([]), [])
    assert str(caught.value) == "There is no group to resample; give one group per image."


def test_the_cost_is_measured_on_a_few_resamples() -> None:
    asked = []

    def slow(weights: Floats) -> dict[str, float | None]:
        asked.append(len(weights))
        time.sleep(0.005)
        return {"n": float(weights.sum())}

    cost = intervals.bootstrap_cost(slow, ["a", "b", "b"], resamples=1000)
    assert asked == [3] * 4
    assert cost >= 5  # 1,000 times 5 ms; a busy machine may make it more


# --- what is written -------------------------------------------------------------------------------------------------


def test_results_become_json_without_nan() -> None:
    labels, first, second = random_case(60, 11)
    estimate, tested = intervals.delong(labels, first), intervals.delong_test(labels, first, second)
    assert estimate is not None
    for result in (estimate, tested, intervals.mcnemar(first > 0.5, second > 0.5)):
        shown = result.as_dict()
        assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert estimate.interval is not None
    assert estimate.as_dict()["interval"] == estimate.interval.as_dict()
    assert set(estimate.interval.as_dict()) == {"low", "high", "method", "level"}
