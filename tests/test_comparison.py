"""Verdicts: right where models differ, silent where they do not, and not fooled by many images of one patient."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from pneumoscope import comparison, intervals
from pneumoscope.comparison import BETTER, UNDECIDED, WORSE, Comparison
from pneumoscope.errors import DataError, UsageError
from pneumoscope.intervals import NO_BOOTSTRAP, Interval, PairedTest
from pneumoscope.predictions import Predictions

ALIKE = "Both models put every pair of images in the same order, so that the difference has no variance."
exhaustively = settings(derandomize=True, deadline=None, max_examples=60, database=None)


def predictions(labels: Sequence[int], scores: npt.ArrayLike) -> Predictions:
    rows = pd.DataFrame({"path": [f"{at}.png" for at in range(len(labels))], "label": list(labels)})
    return Predictions.of(rows.assign(image_id="0" * 16, split="test"), scores)


def model(labels: npt.NDArray[np.int8], *, gap: float, seed: int) -> Predictions:
    """Scores whose classes lie `gap` apart, with a spread of 0.2 and ties."""
    spread = np.random.default_rng(seed).normal(0, 0.2, len(labels))
    return predictions(labels.tolist(), np.round(np.clip(0.5 + (labels - 0.5) * gap + spread, 0, 1), 3))


LABELS = (np.random.default_rng(0).random(400) < 0.6).astype(np.int8)
GROUPS = np.array([f"person{at // 2}" for at in range(400)])
GOOD, POOR, OTHER = model(LABELS, gap=0.5, seed=1), model(LABELS, gap=0.15, seed=2), model(LABELS, gap=0.5, seed=3)


def compared(first: Predictions, second: Predictions, *, groups: npt.ArrayLike = GROUPS) -> Comparison:
    return comparison.compare(first, second, groups=groups, names=("ft", "cnn"), thresholds=(0.5, 0.4), resamples=400)


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_a_model_that_ranks_better_is_better_and_the_other_way_round_worse() -> None:
    one, two = compared(GOOD, POOR), compared(POOR, GOOD)
    assert (one.verdict, two.verdict) == (BETTER, WORSE) == ("better", "worse")
    for found, sign in ((one, 1), (two, -1)):
        assert found.auc.difference is not None
        assert found.auc_by_group is not None
        assert found.p_adjusted is not None
        assert found.auc.difference * sign > 0.1
        assert min(found.auc_by_group.low * sign, found.auc_by_group.high * sign) > 0
        assert found.p_adjusted < 0.05


def test_models_of_the_same_worth_cannot_be_told_apart() -> None:
    found = compared(GOOD, OTHER)
    assert found.verdict == UNDECIDED == "cannot be told apart at this n"
    assert found.auc_by_group is not None
    assert found.auc_by_group.low < 0 < found.auc_by_group.high


def test_a_model_cannot_be_told_apart_from_itself() -> None:
    found = comparison.compare(GOOD, GOOD, groups=GROUPS, names=("a", "b"), thresholds=(0.5, 0.5))
    assert (found.verdict, found.p_value, found.p_adjusted, found.calls.p_value) == (UNDECIDED, 1.0, 1.0, 1.0)
    assert (found.auc.difference, found.calls.difference, found.auc.reason) == (0.0, 0.0, ALIKE)
    assert (found.auc_by_group, found.accuracy_by_group) == (None, None)
    assert found.undefined == {"auc_by_group": NO_BOOTSTRAP, "accuracy_by_group": NO_BOOTSTRAP}


def test_two_perfect_models_cannot_be_told_apart() -> None:
    labels = [0, 0, 0, 1, 1, 1]
    one, two = predictions(labels, [0.1, 0.2, 0.3, 0.7, 0.8, 0.9]), predictions(labels, [0.3, 0.2, 0.1, 0.9, 0.6, 0.7])
    found = compared(one, two, groups=range(6))
    assert (found.auc.first, found.auc.second, found.verdict, found.p_value) == (1.0, 1.0, UNDECIDED, 1.0)


def test_perfect_separation_against_no_order_at_all_is_left_undecided_with_the_reason() -> None:
    labels = [0, 0, 1, 1]
    found = compared(predictions(labels, [0.1, 0.2, 0.8, 0.9]), predictions(labels, [0.5] * 4), groups=range(4))
    assert (found.auc.difference, found.p_value, found.verdict) == (0.5, None, UNDECIDED)
    assert found.undefined["p_value"].startswith("DeLong's variance is 0, as with perfect separation")
    assert found.sentence == (
        "ft and cnn cannot be told apart at this n (4 images of 4 groups): AUC 1.000 against 0.500, difference +0.500. "
        + found.undefined["p_value"]
    )


@pytest.mark.parametrize(("label", "missing"), [(0, "PNEUMONIA"), (1, "NORMAL")])
@pytest.mark.parametrize("n", [1, 5])
def test_one_class_leaves_the_areas_undefined_but_not_the_calls(label: int, missing: str, n: int) -> None:
    low, high = predictions([label] * n, [0.1] * n), predictions([label] * n, [0.9] * n)
    found = compared(low, high, groups=range(n))
    reason = f"There is no {missing} image."
    assert (found.auc.first, found.auc.second, found.p_value, found.verdict) == (None, None, None, UNDECIDED)
    assert found.undefined["auc_by_group"] == found.undefined["p_value"] == found.undefined["p_adjusted"] == reason
    assert found.calls.difference == (-1 if label else 1)
    images = "1 image of 1 group" if n == 1 else "5 images of 5 groups"
    assert found.sentence == f"ft and cnn cannot be told apart at this n ({images}): their AUC is undefined. {reason}"


def test_one_image_of_a_class_decides_nothing() -> None:
    labels = [1, 0, 0, 0, 0, 0]
    first, second = (
        predictions(labels, [0.9, 0.1, 0.2, 0.3, 0.4, 0.5]),
        predictions(labels, [0.1, 0.5, 0.6, 0.7, 0.8, 0.9]),
    )
    found = compared(first, second, groups=range(6))
    assert (found.auc.difference, found.p_value, found.verdict) == (1.0, None, UNDECIDED)
    assert found.undefined["p_value"] == "There is one PNEUMONIA image only, and one image has no variance."


def test_one_patient_of_each_class_decides_nothing_however_many_images_there_are() -> None:
    groups = np.where(LABELS == 1, "sick", "well")
    found = compared(GOOD, POOR, groups=groups)
    assert found.auc.p_value is not None
    assert found.auc.p_value < 1e-6  # takes 400 images for 400 patients
    assert (found.auc_by_group, found.p_value, found.verdict) == (None, None, UNDECIDED)
    assert found.undefined["p_value"] == NO_BOOTSTRAP
    assert found.sentence.endswith(f". {NO_BOOTSTRAP}")


# --- what it rests on ------------------------------------------------------------------------------------------------


def test_each_figure_is_that_of_its_own_test() -> None:
    found = compared(GOOD, POOR)
    assert found.auc == intervals.delong_test(LABELS, GOOD.scores, POOR.scores)
    right = (GOOD.scores > 0.5) == (LABELS == 1), (POOR.scores > 0.4) == (LABELS == 1)
    assert found.calls == intervals.mcnemar(*right)
    assert (found.threshold_first, found.threshold_second, found.n, found.n_groups) == (0.5, 0.4, 400, 200)
    aucs = [intervals.weighted_auc(LABELS, table.scores) for table in (GOOD, POOR)]

    def differences(weights: npt.NDArray[np.float64]) -> dict[str, float | None]:
        one, two = (auc(weights) for auc in aucs)
        gained = np.average(right[0], weights=weights) - np.average(right[1], weights=weights)
        return {"auc": None if one is None or two is None else one - two, "accuracy": float(gained)}

    expected = intervals.bootstrap_by_group(differences, GROUPS, resamples=400)
    for interval, name in ((found.auc_by_group, "auc"), (found.accuracy_by_group, "accuracy")):
        known = expected[name]
        assert interval is not None
        assert known is not None
        assert (interval.low, interval.high) == pytest.approx((known.low, known.high), abs=1e-12)


def test_a_score_at_the_threshold_is_called_normal() -> None:
    table = predictions([0, 1], [0.5, 0.5])
    found = comparison.compare(table, table, groups=[1, 2], names=("a", "b"), thresholds=(0.5, 0.4))
    assert (found.calls.only_first, found.calls.only_second) == (1, 1)  # NORMAL right by a, PNEUMONIA right by b


@pytest.mark.parametrize("groups", [np.arange(400), np.arange(400) // 8], ids=["many groups", "few groups"])
@pytest.mark.parametrize("gap", [0.4, 0.45])
def test_the_larger_of_both_p_values_counts(groups: npt.NDArray[np.int_], gap: float) -> None:
    second = model(LABELS, gap=gap, seed=5)
    found = compared(GOOD, second, groups=groups)
    random, gains = np.random.default_rng(0), []
    named = np.unique(groups)
    for _ in range(400):  # row by row, nothing weighted
        drawn = named[random.integers(len(named), size=len(named))]
        rows = np.concatenate([np.flatnonzero(groups == group) for group in drawn])
        gain = intervals.delong_test(LABELS[rows], GOOD.scores[rows], second.scores[rows]).difference
        assert gain is not None
        gains.append(gain)
    wrong = min(sum(gain <= 0 for gain in gains), sum(gain >= 0 for gain in gains))
    assert found.auc.p_value is not None
    assert found.p_value == max(found.auc.p_value, min(1.0, 2 * (1 + wrong) / 401))


def test_resamples_without_a_class_do_not_count() -> None:
    labels = [1, 1, *[0] * 10]
    first = predictions(labels, [0.95, 0.6, *np.linspace(0.05, 0.9, 10)])
    second = predictions(labels, [0.7, 0.55, *np.linspace(0.05, 0.9, 10)])
    found = compared(first, second, groups=range(12))
    aucs = [intervals.weighted_auc(labels, table.scores) for table in (first, second)]
    drawn = [
        intervals.resample_by_group(lambda w, auc=auc: {"auc": auc(w)}, range(12), resamples=400)["auc"]  # type: ignore[misc]
        for auc in aucs
    ]
    gains = (drawn[0] - drawn[1])[~np.isnan(drawn[0])]
    assert 0 < len(gains) < 400
    assert found.auc.p_value is not None
    expected = 2 * (1 + int((gains <= 0).sum())) / (1 + len(gains))
    assert found.p_value == expected > found.auc.p_value


def test_copies_of_images_inside_their_groups_do_not_make_a_verdict() -> None:
    labels = LABELS[:80]
    one, two = model(labels, gap=0.5, seed=1), model(labels, gap=0.45, seed=6)
    copied = np.repeat(np.arange(80), 12)
    many = [predictions(labels[copied].tolist(), table.scores[copied]) for table in (one, two)]
    once, by_patient = compared(one, two, groups=range(80)), compared(*many, groups=copied)
    as_if_independent = compared(*many, groups=range(960))
    assert (once.verdict, by_patient.verdict, as_if_independent.verdict) == (UNDECIDED, UNDECIDED, BETTER)
    assert once.auc_by_group is not None
    assert by_patient.auc_by_group is not None
    assert by_patient.auc_by_group.low == pytest.approx(once.auc_by_group.low, abs=1e-12)
    assert by_patient.auc.p_value is not None
    assert by_patient.auc.p_value < 0.05 < once.auc.p_value  # type: ignore[operator]


def test_of_equal_models_few_pairs_get_a_verdict_even_where_patients_have_many_images() -> None:
    # 200 sets of 40 patients with 6 images each; what a model thinks of a patient is common to the images
    random = np.random.default_rng(7)
    groups = np.repeat(np.arange(40), 6)
    labels = np.repeat(np.arange(40) % 2, 6)
    naive = verdicts = 0
    for seed in range(200):
        thought = np.repeat(random.normal(0, 0.2, (2, 40)), 6, axis=1) + random.normal(0, 0.05, (2, 240))
        first, second = (predictions(labels.tolist(), np.clip(0.4 + 0.2 * labels + row, 0, 1)) for row in thought)
        found = comparison.compare(
            first, second, groups=groups, names=("a", "b"), thresholds=(0.5, 0.5), resamples=100, seed=seed
        )
        assert found.auc.p_value is not None
        naive += found.auc.p_value < 0.05
        verdicts += found.verdict != UNDECIDED
    assert naive > 60  # DeLong alone is wrong in more than 30 % of sets
    assert verdicts <= 20  # 5 % are allowed; 40 groups are few, which makes the bootstrap a little too sure


# --- several models --------------------------------------------------------------------------------------------------

NAMED = {"cnn": POOR, "tl": OTHER, "ft": GOOD}
AT_HALF = dict.fromkeys(NAMED, 0.5)


def test_each_model_is_compared_with_each_that_comes_after_it() -> None:
    found = comparison.compare_all(NAMED, groups=GROUPS, thresholds=AT_HALF)
    assert [(one.first, one.second) for one in found] == [("cnn", "tl"), ("cnn", "ft"), ("tl", "ft")]
    assert [one.verdict for one in found] == [WORSE, WORSE, UNDECIDED]
    p_values, of_calls = [one.p_value for one in found], [one.calls.p_value for one in found]
    assert [one.p_adjusted for one in found] == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)
    assert [one.calls_p_adjusted for one in found] == pytest.approx(
        multipletests(of_calls, method="holm")[1], abs=1e-12
    )
    for one in found:
        alone = comparison.compare(
            NAMED[one.first], NAMED[one.second], groups=GROUPS, names=(one.first, one.second), thresholds=(0.5, 0.5)
        )
        assert (alone.comparisons, one.comparisons) == (1, 3)
        assert (alone.p_adjusted, alone.calls_p_adjusted) == (one.p_value, one.calls.p_value)
        assert replace(
            one, p_adjusted=alone.p_adjusted, calls_p_adjusted=alone.calls_p_adjusted, comparisons=1
        ) == alone  # fmt: skip


def test_looking_at_more_pairs_asks_for_more_evidence() -> None:
    close = model(LABELS, gap=0.42, seed=8)
    alone = comparison.compare_all({"ft": GOOD, "tl": close}, groups=GROUPS, thresholds={"ft": 0.5, "tl": 0.5})
    many = {"ft": GOOD, "tl": close, **{f"seed{at}": model(LABELS, gap=0.5, seed=at) for at in range(10, 14)}}
    among = comparison.compare_all(many, groups=GROUPS, thresholds=dict.fromkeys(many, 0.5))
    assert (alone[0].second, among[0].second) == ("tl", "tl")
    assert alone[0].p_value == among[0].p_value
    assert (alone[0].verdict, among[0].verdict) == (BETTER, UNDECIDED)


def test_a_pair_that_could_not_be_tested_does_not_count() -> None:
    labels = [0, 0, 0, 1, 1, 1]
    scores = {"perfect": [0.1, 0.2, 0.3, 0.7, 0.8, 0.9], "constant": [0.5] * 6, "fair": [0.1, 0.2, 0.8, 0.3, 0.7, 0.9]}
    models = {name: predictions(labels, column) for name, column in scores.items()}
    found = comparison.compare_all(models, groups=range(6), thresholds=dict.fromkeys(models, 0.5))
    assert [one.p_value is None for one in found] == [True, False, False]
    assert [one.comparisons for one in found] == [2, 2, 2]


def test_fewer_than_two_models_leave_nothing_to_compare() -> None:
    assert comparison.compare_all({}, groups=[], thresholds={}) == []
    assert comparison.compare_all({"cnn": POOR}, groups=GROUPS, thresholds={"cnn": 0.5}) == []


def test_the_cost_is_announced_once_before_the_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def watched(*args: object, **more: object) -> object:
        order.append("started")
        return intervals.resample_by_group(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(comparison, "resample_by_group", watched)

    def announce(seconds: float) -> None:
        assert 0 < seconds < math.inf
        order.append("announced")

    comparison.compare_all(NAMED, groups=GROUPS, thresholds=AT_HALF, resamples=200, announce=announce)
    assert order == ["announced", "started"]


@exhaustively
@given(st.lists(st.sampled_from([0.0, 0.01, 0.02, 1.0]) | st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_that_of_statsmodels(p_values: list[float]) -> None:
    assert comparison.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)


def test_a_test_that_could_not_be_made_does_not_count() -> None:
    assert comparison.holm([0.04, None, 0.01]) == [0.04, None, 0.02]
    assert comparison.holm([None]) == [None]
    assert comparison.holm([]) == []


# --- what is said and written ----------------------------------------------------------------------------------------

FOUND = Comparison(
    first="ft",
    second="cnn",
    n=1651,
    n_groups=480,
    threshold_first=0.5,
    threshold_second=0.4,
    auc=PairedTest("delong", 0.9812, 0.9623, 0.0189, 0.001, 0.005, Interval(0.009, 0.029, "delong")),
    auc_by_group=Interval(0.0071, 0.0305, "bootstrap by group"),
    calls=PairedTest("mcnemar exact", 0.95, 0.94, 0.01, 0.3, only_first=9, only_second=5),
    accuracy_by_group=None,
    p_value=0.004,
    p_adjusted=0.012,
    calls_p_adjusted=0.9,
    comparisons=3,
)


def test_the_sentence_holds_the_verdict_and_its_figures() -> None:
    size, figures = "(1,651 images of 480 groups)", "AUC 0.981 against 0.962, difference +0.019"
    start, span = f"ft is better than cnn {size}: {figures}", "95% by group +0.007 to +0.030"
    assert FOUND.sentence == f"{start} ({span}; p = 0.012, adjusted for 3 comparisons)."
    assert replace(FOUND, p_adjusted=0.0004, comparisons=1).sentence == f"{start} ({span}; p < 0.001)."
    assert replace(FOUND, level=0.975, comparisons=1).sentence == f"{start} (97.5{span[2:]}; p = 0.012)."
    assert replace(FOUND, p_adjusted=0.2, auc_by_group=None, comparisons=1).sentence == (
        f"ft and cnn cannot be told apart at this n {size}: {figures} (p = 0.200)."
    )
    worse = replace(FOUND, auc=replace(FOUND.auc, first=0.9623, second=0.9812, difference=-0.0189), comparisons=1)
    assert worse.sentence.startswith(f"ft is worse than cnn {size}: AUC 0.962 against 0.981, difference -0.019 (95%")


@pytest.mark.parametrize(
    ("p_adjusted", "level", "verdict"),
    [
        (0.0499, 0.95, BETTER),
        (0.05, 0.95, UNDECIDED),
        (0.0499, 0.99, UNDECIDED),
        (0.0099, 0.99, BETTER),
        (None, 0.95, UNDECIDED),
    ],
)
def test_the_verdict_needs_a_p_value_below_one_less_the_level(
    p_adjusted: float | None, level: float, verdict: str
) -> None:
    assert replace(FOUND, p_adjusted=p_adjusted, level=level).verdict == verdict


@pytest.mark.parametrize("second", [POOR, OTHER, GOOD])
def test_a_comparison_becomes_json(second: Predictions) -> None:
    found = compared(GOOD, second)
    shown = found.as_dict()
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert set(shown) == {
        "first", "second", "n", "n_groups", "threshold_first", "threshold_second", "auc", "auc_by_group", "calls",
        "accuracy_by_group", "p_value", "level", "p_adjusted", "calls_p_adjusted", "comparisons", "verdict", "sentence",
        "undefined",
    }  # fmt: skip
    assert (shown["auc"], shown["calls"]) == (found.auc.as_dict(), found.calls.as_dict())
    assert (shown["verdict"], shown["sentence"]) == (found.verdict, found.sentence)
    assert {name for name, value in shown.items() if value is None} == set(shown["undefined"])


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(error: type[Exception], first: Predictions, second: Predictions, **changed: object) -> str:
    call: dict[str, object] = {"groups": range(len(first)), "names": ("ft", "cnn"), "thresholds": (0.5, 0.5)}
    with pytest.raises(error) as caught:
        comparison.compare(first, second, **(call | changed))  # type: ignore[arg-type]
    return str(caught.value)


def test_other_images_are_refused() -> None:
    table = predictions([0, 1, 1], [0.1, 0.5, 0.9])
    start = "ft and cnn were not scored on the same images in the same order ("
    end = "); score both on the same rows of one catalog."
    shorter = Predictions(table.table.iloc[:2])
    assert refusal(DataError, table, shorter) == f"{start}3 and 2 images{end}"
    turned = Predictions(table.table.iloc[[0, 2, 1]].reset_index(drop=True))
    for other in (
        turned,
        Predictions(table.table.assign(path=["0.png", "x.png", "2.png"])),
        Predictions(table.table.assign(image_id=["0" * 16, "f" * 16, "0" * 16])),
        Predictions(table.table.assign(label=np.array([0, 0, 1], np.int8))),
    ):
        assert refusal(DataError, table, other) == f"{start}they first differ in row 1, 1.png{end}"
    same_rows_other_index = Predictions(table.table.set_index(pd.Index([7, 8, 9])))
    assert comparison.compare(
        table, same_rows_other_index, groups=range(3), names=("a", "b"), thresholds=(0.5, 0.5)
    ).p_value == 1.0  # fmt: skip


def test_no_images_are_refused() -> None:
    empty = predictions([], [])
    assert refusal(DataError, empty, empty) == (
        "There are no predictions to compare; score at least one labelled image first."
    )


def test_groups_that_do_not_fit_are_refused() -> None:
    table = predictions([0, 1, 1], [0.1, 0.5, 0.9])
    assert refusal(DataError, table, table, groups=["a"]) == (
        "Groups of the shape (1,) came for 3 images; give one each."
    )


def test_a_name_given_twice_is_refused() -> None:
    assert refusal(UsageError, GOOD, POOR, names=("ft", "ft")) == (
        "Two models are both named ft; give each a name of its own."
    )


def test_a_model_without_a_threshold_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        comparison.compare_all(NAMED, groups=GROUPS, thresholds={"tl": 0.5})
    assert str(caught.value) == "There is no threshold for cnn, ft; give one for each model, for example 0.5."


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_is_a_share(level: float) -> None:
    assert refusal(UsageError, GOOD, POOR, level=level) == (
        f"The level of an interval is {level}; give a share between 0 and 1, for example 0.95."
    )


def test_too_few_resamples_to_ever_decide_are_refused() -> None:
    assert refusal(UsageError, GOOD, POOR, resamples=39) == (
        "A bootstrap of 39 resamples can never tell 1 pair of models apart at level 0.95; give 40 or more, usually "
        "1000."
    )
    enough = comparison.compare(GOOD, POOR, groups=GROUPS, names=("a", "b"), thresholds=(0.5, 0.5), resamples=40)
    assert enough.verdict == BETTER
    with pytest.raises(UsageError, match=r"100 resamples can never tell 3 pairs of models apart .* give 120 or more"):
        comparison.compare_all(NAMED, groups=GROUPS, thresholds=AT_HALF, resamples=100)
