"""Prediction sets: the promise checked by leaving each image out, crepes, and counts by hand."""

from __future__ import annotations

import json
from fractions import Fraction
from math import ceil

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from pneumoscope.conformal import Conformal, Share
from pneumoscope.errors import DataError, UsageError

Labels = npt.NDArray[np.int8]
Scores = npt.NDArray[np.float64]
Case = tuple[Labels, Scores]

SCORES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32, allow_subnormal=False)
CASES = st.lists(st.tuples(st.integers(0, 1), SCORES), min_size=1, max_size=40).map(
    lambda rows: (np.array([label for label, _ in rows], np.int8), np.array([score for _, score in rows], np.float64))
)
COVERAGES = st.sampled_from([0.5, 0.8, 0.9, 0.95, 1 / 3])
exhaustively = settings(derandomize=True, deadline=None, max_examples=150, database=None)


def random_case(n: int, seed: int, *, share: float = 0.7) -> Case:
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < share).astype(np.int8)
    return labels, np.clip(rng.normal(0.3 + 0.4 * labels, 0.2), 0, 1)


# --- the cuts --------------------------------------------------------------------------------------------------------


def test_the_cuts_by_hand() -> None:
    # of 9 NORMAL images the 9th lowest (0.9 of 10), of 19 PNEUMONIA images the 18th highest (0.9 of 20)
    labels = np.array([0] * 9 + [1] * 19, np.int8)
    scores = np.concatenate([np.arange(9) / 16, np.arange(32 - 19, 32) / 32])
    fitted = Conformal.fit(labels, scores)
    assert fitted == Conformal(0.9, normal_up_to=8 / 16, pneumonia_from=14 / 32, n_normal=9, n_pneumonia=19)
    assert fitted.sets(np.array([14 / 32 - 0.001, 14 / 32, 8 / 16, 8 / 16 + 0.001])).tolist() == [
        [True, False],
        [True, True],
        [True, True],
        [False, True],
    ]
    assert json.loads(json.dumps(fitted.as_dict(), allow_nan=False)) == {
        "coverage": 0.9, "normal_up_to": 0.5, "pneumonia_from": 0.4375, "n_normal": 9, "n_pneumonia": 19
    }  # fmt: skip


@pytest.mark.parametrize(("coverage", "enough"), [(0.9, 9), (0.95, 19), (0.5, 1), (0.8, 4)])
def test_with_too_few_images_of_a_label_it_is_in_every_set(coverage: float, enough: int) -> None:
    scores = np.linspace(0.25, 0.75, enough)
    few = Conformal.fit(np.zeros(enough - 1, np.int8), scores[1:], coverage=coverage) if enough > 1 else None
    just = Conformal.fit(np.zeros(enough, np.int8), scores, coverage=coverage)
    assert just.normal_up_to < 1
    assert just.pneumonia_from == 0  # of PNEUMONIA there is none
    if few is not None:
        assert few.normal_up_to == 1
        assert few.sets(np.array([0.0, 0.5, 1.0])).all()
    sick = Conformal.fit(np.ones(enough, np.int8), scores, coverage=coverage)
    assert (sick.normal_up_to, sick.n_normal) == (1, 0)
    assert sick.pneumonia_from > 0


@exhaustively
@given(CASES, COVERAGES)
def test_left_out_images_of_each_label_are_covered_as_promised(case: Case, coverage: float) -> None:
    labels, scores = case
    for label in (0, 1):
        rows = np.flatnonzero(labels == label)
        if not len(rows):
            continue
        held = 0
        for left_out in rows:
            rest = np.delete(np.arange(len(labels)), left_out)
            if not len(rest):
                return
            fitted = Conformal.fit(labels[rest], scores[rest], coverage=coverage)
            held += int(fitted.sets(scores[[left_out]])[0, label])
        # exchangeable images: this average is what the promise is about, and it holds without any luck
        assert held >= ceil(Fraction(coverage).limit_denominator(1000) * len(rows))
        if len(set(scores[rows].tolist())) == len(rows):  # without ties it is kept with nothing to spare
            assert held == ceil(Fraction(coverage).limit_denominator(1000) * len(rows))


@exhaustively
@given(CASES, CASES, COVERAGES)
def test_the_sets_are_those_of_crepes(case: Case, new: Case, coverage: float) -> None:
    crepes = pytest.importorskip("crepes")
    labels, scores = case
    found = Conformal.fit(labels, scores, coverage=coverage).sets(new[1])
    for label, sign in ((0, 1), (1, -1)):
        strange = sign * scores[labels == label]  # the stranger, the less the image looks like its label
        if not len(strange):
            assert found[:, label].all()
            continue
        fitted = crepes.ConformalClassifier().fit(strange)
        p_values = fitted.predict_p((sign * new[1])[:, None], smoothing=False)[:, 0]
        np.testing.assert_array_equal(found[:, label], p_values > 1 - coverage + 1e-12)


def test_temperature_changes_the_cuts_and_not_the_sets() -> None:
    labels, scores = random_case(300, 1)
    new = random_case(200, 2)[1]
    before, after = Conformal.fit(labels, scores), Conformal.fit(labels, scores**2)
    assert before.normal_up_to != after.normal_up_to
    np.testing.assert_array_equal(before.sets(new), after.sets(new**2))


# --- what the sets did -----------------------------------------------------------------------------------------------


def test_coverage_and_sizes_by_hand() -> None:
    fitted = Conformal(0.9, normal_up_to=0.375, pneumonia_from=0.625, n_normal=50, n_pneumonia=50)
    labels = np.array([0, 0, 0, 1, 1, 1, 1], np.int8)
    found = fitted.measure(labels, np.array([0.1, 0.375, 0.9, 0.5, 0.625, 0.9, 0.2]))
    assert found.coverage == Share(4, 7)
    assert found.coverage_by_label == {"NORMAL": Share(2, 3), "PNEUMONIA": Share(2, 4)}
    assert (found.single, found.both, found.empty) == (Share(6, 7), Share(0, 7), Share(1, 7))
    wide = Conformal(0.9, normal_up_to=0.625, pneumonia_from=0.375, n_normal=50, n_pneumonia=50)
    found = wide.measure(labels, np.array([0.1, 0.375, 0.9, 0.5, 0.625, 0.9, 0.2]))
    assert (found.single, found.both, found.empty) == (Share(4, 7), Share(3, 7), Share(0, 7))


def test_coverage_holds_on_new_images_of_each_label_even_at_another_share() -> None:
    fitted = Conformal.fit(*random_case(2000, 3, share=0.75), coverage=0.9)
    found = fitted.measure(*random_case(20_000, 4, share=0.3))
    for share in found.coverage_by_label.values():
        assert share.value == pytest.approx(0.9, abs=0.03)


def test_a_measure_is_ready_for_json_with_the_intervals_of_statsmodels() -> None:
    labels, scores = random_case(200, 5)
    fitted = Conformal.fit(labels, scores)
    shown = fitted.measure(*random_case(100, 6)).as_dict()
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert list(shown) == ["coverage", "coverage_by_label", "single", "both", "empty", "undefined"]
    assert shown["undefined"] == {}
    for share in (
        shown["coverage"],
        *shown["coverage_by_label"].values(),
        shown["single"],
        shown["both"],
        shown["empty"],
    ):
        assert share["value"] == share["part"] / share["whole"]
        expected = proportion_confint(share["part"], share["whole"], method="wilson")
        assert (share["interval"]["low"], share["interval"]["high"]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("label", "missing"), [(0, "PNEUMONIA"), (1, "NORMAL")])
def test_coverage_of_a_label_without_images_is_undefined(label: int, missing: str) -> None:
    fitted = Conformal.fit(*random_case(100, 7))
    shown = fitted.measure(np.array([label], np.int8), np.array([0.5])).as_dict()
    assert shown["coverage_by_label"][missing] == {"value": None, "part": 0, "whole": 0, "interval": None}
    assert shown["undefined"] == {f"coverage_by_label.{missing}": f"There is no {missing} image."}
    assert json.dumps(shown, allow_nan=False)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coverage", [0.0, 1.0, -1.0, float("nan")])
def test_a_coverage_out_of_range_is_refused(coverage: float) -> None:
    with pytest.raises(UsageError) as caught:
        Conformal.fit(np.array([0, 1], np.int8), np.array([0.1, 0.9]), coverage=coverage)
    assert str(caught.value) == (f"The wanted coverage is {coverage}; give a share between 0 and 1, for example 0.9.")


def test_no_images_are_refused() -> None:
    none = np.array([], np.int8), np.array([])
    message = "There is no image to take or measure prediction sets on; give one labelled image or more."
    with pytest.raises(DataError) as caught:
        Conformal.fit(*none)
    assert str(caught.value) == message
    with pytest.raises(DataError) as caught:
        Conformal.fit(*random_case(50, 8)).measure(*none)
    assert str(caught.value) == message
