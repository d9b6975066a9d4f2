"""Counts at a threshold, their shares and intervals: by hand, scikit-learn, statsmodels, a published example."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn import metrics as sk
from statsmodels.stats.proportion import proportion_confint

from pneumoscope import counts, intervals
from pneumoscope.counts import FIGURES, Confusion
from pneumoscope.errors import UsageError

Cells = tuple[int, int, int, int]

# true negatives, false positives, false negatives, true positives: every pattern of empty cells, and larger ones
SIZES = (0, 1, 7)
EVERY: list[Cells] = list(itertools.product(SIZES, SIZES, SIZES, SIZES))
USUAL: list[Cells] = [(230, 4, 12, 378), (3, 1, 2, 4), (0, 5, 1, 9), (40, 40, 40, 40), (1, 90, 3, 6), (9, 0, 3, 5)]
MCC_AT_ITS_END = "The MCC is at its end, so that its large-sample variance is 0."


def rows_of(cells: Cells) -> tuple[list[int], list[int]]:
    """Return labels and calls, one per image."""
    labels = np.repeat([0, 0, 1, 1], cells).tolist()
    return labels, np.repeat([0, 1, 0, 1], cells).tolist()


# --- counts ----------------------------------------------------------------------------------------------------------


def test_a_score_equal_to_the_threshold_is_not_called() -> None:
    labels, scores = np.array([0, 1, 0, 1], np.int8), np.array([0.5, 0.5, 0.5 + 2**-24, 0.5 + 2**-24])
    assert counts.confusion(labels, scores, threshold=0.5) == Confusion(
        threshold=0.5, true_negatives=1, false_positives=1, false_negatives=1, true_positives=1
    )


def test_counts_and_figures_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1], np.int8)
    scores = np.array([0.1, 0.2, 0.6, 0.3, 0.9, 0.4, 0.8, 0.7, 0.6, 0.1])
    counted = counts.confusion(labels, scores, threshold=0.5)
    assert counted == Confusion(0.5, true_negatives=3, false_positives=1, false_negatives=2, true_positives=4)
    assert counted.n == 10
    shown = counted.as_dict()
    assert {key: shown[key] for key in shown if key not in ("intervals", "mcc")} == {
        "threshold": 0.5, "accuracy": 7 / 10, "false_negatives": 2, "false_positives": 1, "true_negatives": 3,
        "true_positives": 4, "sensitivity": 4 / 6, "specificity": 3 / 4, "positive_predictive_value": 4 / 5,
        "negative_predictive_value": 3 / 5, "f1": 8 / 11,
    }  # fmt: skip
    assert shown["mcc"] == pytest.approx((4 * 3 - 1 * 2) / math.sqrt(5 * 6 * 4 * 5), abs=1e-15)
    assert list(shown["intervals"]) == list(FIGURES)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown


@pytest.mark.parametrize("cells", EVERY + USUAL)
def test_defined_figures_are_those_of_scikit_learn(cells: Cells) -> None:
    counted = Confusion(0.5, *cells)
    labels, calls = rows_of(cells)
    if not labels:
        assert set(counted.figures().values()) == {None}
        return
    expected = {
        "accuracy": sk.accuracy_score(labels, calls),
        "sensitivity": sk.recall_score(labels, calls, zero_division=0),
        "specificity": sk.recall_score(labels, calls, pos_label=0, zero_division=0),
        "positive_predictive_value": sk.precision_score(labels, calls, zero_division=0),
        "negative_predictive_value": sk.precision_score(labels, calls, pos_label=0, zero_division=0),
        "f1": sk.f1_score(labels, calls, zero_division=0),
        "mcc": sk.matthews_corrcoef(labels, calls) if len({*labels, *calls}) == 2 else 0,  # of one label it warns
    }
    for name, value in counted.figures().items():
        if value is None:
            assert expected[name] == 0  # what scikit-learn says instead
        else:
            assert value == pytest.approx(expected[name], abs=1e-12), name


# --- what is undefined -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", EVERY)
def test_a_figure_is_none_where_what_it_divides_by_is_0_and_only_there(cells: Cells) -> None:
    tn, fp, fn, tp = cells
    counted = Confusion(0.5, *cells)
    defined = {
        "accuracy": tn + fp + fn + tp > 0,
        "sensitivity": tp + fn > 0,
        "specificity": tn + fp > 0,
        "positive_predictive_value": tp + fp > 0,
        "negative_predictive_value": tn + fn > 0,
        "f1": tp + fp + fn > 0,
        "mcc": min(tp + fn, tn + fp, tp + fp, tn + fn) > 0,
    }
    assert {name: value is not None for name, value in counted.figures().items()} == defined


@pytest.mark.parametrize("cells", EVERY + USUAL)
def test_each_none_has_a_reason_and_each_reason_a_none(cells: Cells) -> None:
    counted = Confusion(0.5, *cells)
    shown = counted.as_dict()
    nones = {key for key, value in shown.items() if value is None}
    nones |= {f"intervals.{key}" for key, value in shown["intervals"].items() if value is None}
    assert set(counted.undefined) == nones
    assert all(reason.endswith(".") for reason in counted.undefined.values())


def test_the_reasons_in_words() -> None:
    only_sick = Confusion(0.5, 0, 0, 0, 3).undefined
    assert only_sick["specificity"] == "There is no NORMAL image."
    assert only_sick["negative_predictive_value"] == "No image is called NORMAL at this threshold."
    assert only_sick["mcc"] == only_sick["intervals.mcc"] == "There is no NORMAL image."
    only_well = Confusion(0.5, 3, 0, 0, 0).undefined
    assert only_well["sensitivity"] == "There is no PNEUMONIA image."
    assert only_well["positive_predictive_value"] == "No image is called PNEUMONIA at this threshold."
    assert only_well["f1"] == "There is no PNEUMONIA image and none is called so at this threshold."
    assert Confusion(0.5, 3, 0, 3, 0).undefined["mcc"] == "No image is called PNEUMONIA at this threshold."
    assert Confusion(0.5, 0, 0, 0, 0).undefined["accuracy"] == "There is no image."
    assert Confusion(0.5, 3, 0, 0, 3).undefined == {"intervals.mcc": MCC_AT_ITS_END}


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.95, 0.8])
@pytest.mark.parametrize("cells", EVERY + USUAL)
def test_shares_have_the_wilson_interval_of_statsmodels(cells: Cells, level: float) -> None:
    tn, fp, fn, tp = cells
    found = Confusion(0.5, *cells).intervals(level=level)
    parts = {
        "accuracy": (tn + tp, tn + fp + fn + tp),
        "sensitivity": (tp, tp + fn),
        "specificity": (tn, tn + fp),
        "positive_predictive_value": (tp, tp + fp),
        "negative_predictive_value": (tn, tn + fn),
    }
    for name, (part, whole) in parts.items():
        interval = found[name]
        if not whole:
            assert interval is None
            continue
        assert interval is not None
        expected = proportion_confint(part, whole, alpha=1 - level, method="wilson")
        assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-9)
        assert (interval.method, interval.level) == ("wilson", level)


@pytest.mark.parametrize("cells", EVERY + USUAL)
def test_f1_has_the_interval_of_the_share_that_it_rises_with(cells: Cells) -> None:
    _, fp, fn, tp = cells
    counted = Confusion(0.5, *cells)
    interval = counted.intervals()["f1"]
    if not tp + fp + fn:
        assert interval is None
        return
    assert interval is not None
    assert counted.f1 is not None
    low, high = proportion_confint(tp, tp + fp + fn, method="wilson")
    assert (interval.low, interval.high) == pytest.approx((2 * low / (1 + low), 2 * high / (1 + high)), abs=1e-9)
    assert interval.low <= counted.f1 <= interval.high


def test_the_interval_of_the_mcc_is_that_of_a_published_phi() -> None:
    # example of ci.phi in Bonett's R package statpsych (its documentation), after Bishop, Fienberg and Holland (1975)
    counted = Confusion(0.5, true_negatives=229, false_positives=28, false_negatives=96, true_positives=24)
    interval = counted.intervals()["mcc"]
    assert interval is not None
    assert counted.mcc == pytest.approx(0.1229976, abs=5e-8)
    assert (interval.low, interval.high) == pytest.approx((0.01462398, 0.2285149), abs=5e-8)
    assert interval.method == "fisher z"


def mcc_of(cells: npt.NDArray[np.float64]) -> float:
    tn, fp, fn, tp = (float(cell) for cell in cells)
    return (tp * tn - fp * fn) / math.sqrt((tp + fn) * (tn + fp) * (tp + fp) * (tn + fn))


@pytest.mark.parametrize("cells", USUAL)
def test_the_interval_of_the_mcc_is_that_of_the_delta_method(cells: Cells) -> None:
    p = np.array(cells, dtype=np.float64) / sum(cells)
    step = 1e-6
    gradient = np.array([(mcc_of(p + at) - mcc_of(p - at)) / (2 * step) for at in np.eye(4) * step])
    variance = (gradient**2 @ p - (gradient @ p) ** 2) / sum(cells)  # of a multinomial sample
    mcc = mcc_of(p)
    half = norm.ppf(0.975) * math.sqrt(variance) / (1 - mcc**2)
    interval = Confusion(0.5, *cells).intervals()["mcc"]
    assert interval is not None
    expected = math.tanh(math.atanh(mcc) - half), math.tanh(math.atanh(mcc) + half)
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-6)
    assert interval.low < mcc < interval.high


@pytest.mark.parametrize(
    ("cells", "mcc"), [((7, 0, 0, 13), 1.0), ((0, 7, 13, 0), -1.0), ((12119275, 0, 0, 979475621), 1.0)]
)
def test_an_mcc_at_its_end_is_exactly_there_and_has_no_interval(cells: Cells, mcc: float) -> None:
    counted = Confusion(0.5, *cells)
    assert counted.mcc == mcc
    assert counted.intervals()["mcc"] is None
    assert counted.undefined["intervals.mcc"] == MCC_AT_ITS_END


def test_one_error_in_many_millions_keeps_the_mcc_off_its_end() -> None:
    interval = Confusion(0.5, 40_000_000, 1, 0, 60_000_000).intervals()["mcc"]
    assert interval is not None
    assert 0.999999 < interval.low < interval.high < 1


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_level_out_of_range_is_refused(level: float) -> None:
    with pytest.raises(UsageError) as caught:
        Confusion(0.5, 1, 1, 1, 1).intervals(level=level)
    assert str(caught.value) == (
        f"The level of an interval is {level}; give a share between 0 and 1, for example 0.95."
    )


# --- Wilson, by group ------------------------------------------------------------------------------------------------


def by_group(part: Any, groups: Any, **more: Any) -> intervals.Interval:
    found = counts.wilson_by_group(part, np.full(len(part), True), groups, **more)
    assert found is not None
    return found


def test_images_that_are_all_of_one_patient_each_have_the_interval_of_wilson() -> None:
    part = np.arange(100) < 40
    found, plain = by_group(part, np.arange(100)), intervals.wilson(40, 100)
    assert plain is not None
    # the groups' variance has 99 in its denominator where the binomial one has 100
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=1e-3)
    assert found.method == "wilson by group"


def test_copies_of_an_image_tell_nothing_new() -> None:
    part = np.arange(50) % 5 > 0
    alone, copied = by_group(part, np.arange(50)), by_group(np.repeat(part, 8), np.repeat(np.arange(50), 8))
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high), abs=1e-12)


def test_the_design_effect_is_that_of_the_linearised_ratio() -> None:
    # Rao and Scott 1992: v = m / (m - 1) * sum((x - share * size)^2) / n^2, d = n v / (share (1 - share))
    x, sizes = np.array([3, 0, 2, 1]), np.array([3, 2, 2, 4])
    part = np.concatenate([np.arange(size) < successes for successes, size in zip(x, sizes, strict=True)])
    share, n = 6 / 11, 11
    v = 4 / 3 * ((x - share * sizes) ** 2).sum() / n**2
    worth = share * (1 - share) / v
    z = 1.959963984540054
    middle = (share * worth + z**2 / 2) / (worth + z**2)
    half = z / (worth + z**2) * math.sqrt(worth * share * (1 - share) + z**2 / 4)
    found = by_group(part, np.repeat(list("abcd"), sizes))
    assert worth < n
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=1, max_size=60))
def test_by_group_is_never_narrower_than_by_image(rows: list[tuple[bool, int]]) -> None:
    part, groups = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    found, plain = by_group(part, groups), intervals.wilson(int(part.sum()), len(part))
    assert plain is not None
    assert 0 <= found.low <= part.mean() <= found.high <= 1
    assert found.high - found.low >= plain.high - plain.low - 1e-12


def test_a_perfect_share_counts_each_group_once() -> None:
    found, plain = by_group(np.full(30, True), np.repeat(np.arange(10), 3)), intervals.wilson(10, 10)
    assert plain is not None
    assert (found.low, found.high) == (plain.low, plain.high)


def test_a_share_of_no_image_has_no_interval() -> None:
    assert counts.wilson_by_group([True], [False], ["a"]) is None
