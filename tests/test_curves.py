"""The ROC curve, its thresholds and the average precision: brute force in exact fractions, and scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pneumoscope import curves
from pneumoscope.errors import UsageError

Labels = npt.NDArray[np.int8]
Scores = npt.NDArray[np.float64]
Case = tuple[Labels, Scores]

# float32 values, as models give them: the ends, neighbours one bit apart, and few values so that many are tied
TIED = st.sampled_from([0.0, 2.0**-149, 0.25, 0.5, 0.5 + 2.0**-24, 1 - 2.0**-24, 1.0])
ROWS = st.tuples(st.integers(0, 1), TIED | st.floats(0, 1, width=32, allow_subnormal=False))
exhaustively = settings(derandomize=True, deadline=None, max_examples=150, database=None)


def case_of(rows: Sequence[tuple[int, float]]) -> Case:
    return np.array([label for label, _ in rows], np.int8), np.array([score for _, score in rows], np.float64)


TWO_CLASSES = st.lists(ROWS, min_size=0, max_size=40).flatmap(
    lambda rows: st.tuples(TIED, TIED).map(lambda two: case_of([*rows, (0, two[0]), (1, two[1])]))
)


def rates(labels: Labels, scores: Scores, threshold: float) -> tuple[Fraction, Fraction]:
    """(false, true) positive rate by counting one image after the other."""
    called = [score > threshold for score in scores.tolist()]
    share = [
        Fraction(sum(call for call, label in zip(called, labels.tolist(), strict=True) if label == wanted),
                 int((labels == wanted).sum()))
        for wanted in (0, 1)
    ]  # fmt: skip
    return share[0], share[1]


def midpoints(scores: Scores) -> list[float]:
    return [(low + high) / 2 for low, high in pairwise([-1.0, *sorted(set(scores.tolist())), 1.0])]


# --- the curve -------------------------------------------------------------------------------------------------------


@exhaustively
@given(TWO_CLASSES)
def test_rates_and_area_are_those_of_scikit_learn(case: Case) -> None:
    labels, scores = case
    curve = curves.roc_curve(labels, scores)
    fpr, tpr, _ = sk.roc_curve(labels, scores)
    np.testing.assert_array_equal(curve.fpr, fpr)
    np.testing.assert_array_equal(curve.tpr, tpr)
    assert curve.auc == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    assert (curve.n_positive, curve.n_negative) == (int(labels.sum()), int((1 - labels).sum()))


@exhaustively
@given(TWO_CLASSES)
def test_the_area_is_the_share_of_pairs_in_the_right_order(case: Case) -> None:
    labels, scores = case
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    u = (pairs > 0).sum() + 0.5 * (pairs == 0).sum()  # Mann and Whitney's U: a tie counts half
    assert curves.roc_curve(labels, scores).auc == pytest.approx(u / pairs.size, abs=1e-12)


@exhaustively
@given(TWO_CLASSES)
def test_each_threshold_gives_the_rates_beside_it(case: Case) -> None:
    labels, scores = case
    curve = curves.roc_curve(labels, scores)
    for fpr, tpr, threshold in zip(curve.fpr, curve.tpr, curve.thresholds, strict=True):
        assert rates(labels, scores, threshold) == (
            Fraction(fpr).limit_denominator(100),
            Fraction(tpr).limit_denominator(100),
        )
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)


@exhaustively
@given(TWO_CLASSES)
def test_thresholds_fall_and_lie_midway_between_neighbouring_scores(case: Case) -> None:
    labels, scores = case
    thresholds = curves.roc_curve(labels, scores).thresholds
    assert np.isfinite(thresholds).all()
    assert (np.diff(thresholds) < 0).all()
    assert thresholds[0] >= scores.max()  # equal only where the highest score is 1; nothing is called there
    assert thresholds[-1] < scores.min()
    for threshold in thresholds[1:-1]:
        above, below = scores[scores > threshold].min(), scores[scores <= threshold].max()
        assert below < threshold < above
        assert threshold == (above + below) / 2


def test_scores_one_bit_apart_are_told_apart() -> None:
    low = float(np.float32(0.5))
    high = float(np.nextafter(np.float32(0.5), np.float32(1)))
    curve = curves.roc_curve(np.array([0, 1], np.int8), np.array([low, high]))
    assert curve.auc == 1.0
    threshold = curves.youden_threshold(curve)
    assert threshold is not None
    assert low < threshold < high


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_curve(label: int) -> None:
    curve = curves.roc_curve(np.full(3, label, np.int8), np.array([0.1, 0.5, 0.9]))
    assert curve.auc is None
    assert len(curve.fpr) == len(curve.tpr) == len(curve.thresholds) == 0
    assert (curve.n_positive, curve.n_negative) == (3 * label, 3 * (1 - label))


def test_perfect_separation() -> None:
    curve = curves.roc_curve(np.array([0, 0, 1, 1], np.int8), np.array([0.0, 0.25, 0.75, 1.0]))
    assert curve.auc == 1.0
    assert curves.youden_threshold(curve) == 0.5


def test_scores_that_are_all_the_same_tell_nothing() -> None:
    labels, scores = np.array([0, 1, 1], np.int8), np.full(3, 0.75)
    curve = curves.roc_curve(labels, scores)
    assert curve.auc == 0.5
    assert (curve.fpr.tolist(), curve.tpr.tolist()) == ([0, 1], [0, 1])
    threshold = curves.youden_threshold(curve)
    assert threshold is not None
    assert threshold < 0.75  # all choices are equally good: nobody is missed


# --- thresholds ------------------------------------------------------------------------------------------------------


@exhaustively
@given(TWO_CLASSES)
def test_youden_is_the_best_of_all_midpoints(case: Case) -> None:
    labels, scores = case

    def worth(threshold: float) -> tuple[Fraction, Fraction]:
        fpr, tpr = rates(labels, scores, threshold)
        return tpr - fpr, tpr  # of equally good ones, the more sensitive

    assert curves.youden_threshold(curves.roc_curve(labels, scores)) == max(midpoints(scores), key=worth)


def test_of_equally_good_thresholds_the_more_sensitive_is_chosen() -> None:
    # at 0.8125 sensitivity 1/2 and specificity 1, at 0.25 sensitivity 1 and specificity 1/2: both gain 1/2
    labels, scores = np.array([0, 1, 0, 1], np.int8), np.array([0.125, 0.375, 0.75, 0.875])
    assert curves.youden_threshold(curves.roc_curve(labels, scores)) == 0.25


@exhaustively
@given(TWO_CLASSES, st.sampled_from([0.2, 1.0, 5.0, 1e6, 1e-6]))
def test_the_cheapest_threshold_is_the_best_of_all_midpoints(case: Case, ratio: float) -> None:
    labels, scores = case
    n_positive, n_negative = int((labels == 1).sum()), int((labels == 0).sum())

    def worth(threshold: float) -> tuple[Fraction, Fraction]:
        fpr, tpr = rates(labels, scores, threshold)
        return -(Fraction(ratio) * (1 - tpr) * n_positive + fpr * n_negative), tpr

    assert curves.cost_threshold(curves.roc_curve(labels, scores), ratio=ratio) == max(midpoints(scores), key=worth)


def test_a_dearer_false_negative_moves_the_threshold_down() -> None:
    labels, scores = np.array([0, 1, 0, 0, 1, 0, 1], np.int8), np.array([0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875])
    curve = curves.roc_curve(labels, scores)
    # missing one image is as dear as `ratio` alarms: letting go of 0.25 saves two of them, of 0.625 one
    found = [curves.cost_threshold(curve, ratio=ratio) for ratio in (0.5, 1.5, 2.5)]
    assert found == [0.8125, 0.5625, 0.1875]
    assert curves.cost_threshold(curve) == 0.1875  # 5 where nothing is said


def test_of_equally_cheap_thresholds_the_more_sensitive_is_chosen_whatever_rounding_says() -> None:
    # at a ratio of 0.3, missing 10 of 12 more images costs as much as 3 alarms, but 0.3 * 12 < 0.3 * 2 + 3 in floats
    labels = np.array([1] + [1] * 10 + [0] * 3 + [1] * 2 + [0] * 20, np.int8)
    scores = np.repeat([0.875, 0.5, 0.125], [1, 13, 22])
    assert 0.3 * 12 < 0.3 * 2 + 3
    assert curves.cost_threshold(curves.roc_curve(labels, scores), ratio=0.3) == 0.3125


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cost_ratio_out_of_range_is_refused(ratio: float) -> None:
    curve = curves.roc_curve(np.array([0, 1], np.int8), np.array([0.25, 0.75]))
    with pytest.raises(UsageError) as caught:
        curves.cost_threshold(curve, ratio=ratio)
    assert str(caught.value) == (
        f"The cost ratio is {ratio}; give a finite number above 0, for example 5 where a missed pneumonia weighs as "
        "much as five false alarms."
    )


@exhaustively
@given(TWO_CLASSES, st.sampled_from([0.05, 0.5, 0.9, 0.95, 1.0]))
def test_the_sensitive_threshold_is_the_highest_midpoint_that_reaches_it(case: Case, at_least: float) -> None:
    labels, scores = case
    wanted = Fraction(str(at_least))
    reaching = [at for at in midpoints(scores) if rates(labels, scores, at)[1] >= wanted]
    assert curves.sensitivity_threshold(labels, scores, at_least=at_least) == max(reaching)


def test_the_sensitive_threshold_is_found_where_the_curve_left_its_point_out() -> None:
    # twenty PNEUMONIA images above all NORMAL ones: the curve rises in one straight piece, so it keeps only its ends
    labels, scores = np.array([0] * 5 + [1] * 20, np.int8), np.arange(25) / 32
    threshold = curves.sensitivity_threshold(labels, scores)
    assert threshold == 5.5 / 32  # 19 of 20 above it
    assert threshold not in curves.roc_curve(labels, scores).thresholds


def test_without_pneumonia_no_threshold_is_sensitive_and_without_a_class_none_is_cheapest() -> None:
    well, sick = np.zeros(2, np.int8), np.ones(2, np.int8)
    scores = np.array([0.25, 0.75])
    assert curves.sensitivity_threshold(well, scores) is None
    assert curves.sensitivity_threshold(sick, scores) == -0.375  # midway between -1 and 0.25: all are called
    assert curves.cost_threshold(curves.roc_curve(well, scores)) is None
    assert curves.cost_threshold(curves.roc_curve(sick, scores)) is None
    assert curves.youden_threshold(curves.roc_curve(sick, scores)) is None


@pytest.mark.parametrize("share", [0.0, 1.01, -0.5, float("nan")])
def test_a_sensitivity_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(UsageError) as caught:
        curves.sensitivity_threshold(np.array([1], np.int8), np.array([0.5]), at_least=share)
    assert str(caught.value) == (
        f"The wanted sensitivity is {share}; give a share above 0 and up to 1, for example 0.95."
    )


@pytest.mark.parametrize("share", ["0.07", "0.55", "0.9", "0.95", "1"])
def test_a_count_is_not_one_too_high_by_rounding(share: str) -> None:
    for n in range(0, 2000, 20):
        assert curves.smallest_count(float(share), n) == math.ceil(Fraction(share) * n)


# --- precision -------------------------------------------------------------------------------------------------------


@exhaustively
@given(TWO_CLASSES)
def test_the_average_precision_is_that_of_scikit_learn(case: Case) -> None:
    labels, scores = case
    expected = sk.average_precision_score(labels, scores)
    assert curves.average_precision(labels, scores) == pytest.approx(expected, abs=1e-12)


@exhaustively
@given(TWO_CLASSES, st.integers(0, 1000))
def test_the_average_precision_of_weighted_images_is_that_of_scikit_learn(case: Case, seed: int) -> None:
    labels, scores = case
    weights = np.random.default_rng(seed).integers(0, 4, len(labels)).astype(np.float64)
    found = curves.weighted_average_precision(labels, scores)(weights)
    if weights[labels == 1].any() and weights[labels == 0].any():
        expected = sk.average_precision_score(labels, scores, sample_weight=weights)
        assert found == pytest.approx(expected, abs=1e-12)
    else:
        assert found is None


def test_average_precision_by_hand() -> None:
    # ranks 1 and 3 of 4 are PNEUMONIA: precisions 1 and 2/3
    labels, scores = np.array([0, 1, 0, 1], np.int8), np.array([0.1, 0.4, 0.6, 0.9])
    assert curves.average_precision(labels, scores) == pytest.approx((1 + 2 / 3) / 2, abs=1e-15)
    # all tied: what a coin gives is the share of PNEUMONIA
    assert curves.average_precision(np.array([0, 0, 0, 1], np.int8), np.full(4, 0.5)) == 0.25


@pytest.mark.parametrize("labels", [[], [0], [1], [0, 0], [1, 1]])
def test_average_precision_of_one_class_is_undefined(labels: list[int]) -> None:
    assert curves.average_precision(np.array(labels, np.int8), np.linspace(0.1, 0.9, len(labels))) is None
