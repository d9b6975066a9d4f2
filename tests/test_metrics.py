"""Every figure against its definition: brute force in exact fractions, scikit-learn, Keras."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pneumoscope import metrics
from pneumoscope._backend import keras
from pneumoscope.errors import DataError
from pneumoscope.metrics import Confusion
from pneumoscope.predictions import Predictions

Labels = npt.NDArray[np.int8]
Scores = npt.NDArray[np.float64]
Case = tuple[Labels, Scores]

# float32 values, as models give them: the ends, neighbours one bit apart, and few values so that many are tied
TIED = st.sampled_from([0.0, 2.0**-149, 0.25, 0.5, 0.5 + 2.0**-24, 1 - 2.0**-24, 1.0])
ROWS = st.tuples(st.integers(0, 1), TIED | st.floats(0, 1, width=32, allow_subnormal=False))
exhaustively = settings(derandomize=True, deadline=None, max_examples=150, database=None)


def case_of(rows: Sequence[tuple[int, float]]) -> Case:
    return np.array([label for label, _ in rows], np.int8), np.array([score for _, score in rows], np.float64)


CASES = st.lists(ROWS, min_size=1, max_size=40).map(case_of)
TWO_CLASSES = st.lists(ROWS, min_size=0, max_size=40).flatmap(
    lambda rows: st.tuples(TIED, TIED).map(lambda two: case_of([*rows, (0, two[0]), (1, two[1])]))
)


def random_case(n: int, seed: int) -> Case:
    """Overlapping classes with ties, and with scores of exactly 0 and 1."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.7).astype(np.int8)
    scores = np.clip(np.round(rng.normal(0.35 + 0.3 * labels, 0.3), 2), 0, 1).astype(np.float32)
    assert {0.0, 1.0} <= set(scores.tolist())
    return labels, scores.astype(np.float64)


def predictions(labels: Sequence[int], scores: Sequence[float]) -> Predictions:
    rows = pd.DataFrame({"path": [f"{at}.png" for at in range(len(labels))], "label": list(labels)})
    return Predictions.of(rows.assign(image_id="0" * 16, split="validation"), list(scores))


def rates(labels: Labels, scores: Scores, threshold: float) -> tuple[Fraction, Fraction]:
    """(false, true) positive rate by counting one image after the other."""
    called = [score > threshold for score in scores.tolist()]
    share = [
        Fraction(sum(call for call, label in zip(called, labels.tolist(), strict=True) if label == wanted),
                 int((labels == wanted).sum()))
        for wanted in (0, 1)
    ]  # fmt: skip
    return share[0], share[1]


# --- the curve -------------------------------------------------------------------------------------------------------


@exhaustively
@given(TWO_CLASSES)
def test_rates_and_area_are_those_of_scikit_learn(case: Case) -> None:
    labels, scores = case
    curve = metrics.roc_curve(labels, scores)
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
    assert metrics.roc_curve(labels, scores).auc == pytest.approx(u / pairs.size, abs=1e-12)


@exhaustively
@given(TWO_CLASSES)
def test_each_threshold_gives_the_rates_beside_it(case: Case) -> None:
    labels, scores = case
    curve = metrics.roc_curve(labels, scores)
    for fpr, tpr, threshold in zip(curve.fpr, curve.tpr, curve.thresholds, strict=True):
        counted = metrics.confusion(labels, scores, threshold=threshold)
        assert counted.false_positives / curve.n_negative == fpr
        assert counted.true_positives / curve.n_positive == tpr
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)


@exhaustively
@given(TWO_CLASSES)
def test_thresholds_fall_and_lie_midway_between_neighbouring_scores(case: Case) -> None:
    labels, scores = case
    thresholds = metrics.roc_curve(labels, scores).thresholds
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
    curve = metrics.roc_curve(np.array([0, 1], np.int8), np.array([low, high]))
    assert curve.auc == 1.0
    threshold = metrics.youden_threshold(curve)
    assert threshold is not None
    assert low < threshold < high


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_curve(label: int) -> None:
    curve = metrics.roc_curve(np.full(3, label, np.int8), np.array([0.1, 0.5, 0.9]))
    assert curve.auc is None
    assert len(curve.fpr) == len(curve.tpr) == len(curve.thresholds) == 0
    assert (curve.n_positive, curve.n_negative) == (3 * label, 3 * (1 - label))


def test_perfect_separation() -> None:
    curve = metrics.roc_curve(np.array([0, 0, 1, 1], np.int8), np.array([0.0, 0.25, 0.75, 1.0]))
    assert curve.auc == 1.0
    assert metrics.youden_threshold(curve) == 0.5


def test_scores_that_are_all_the_same_tell_nothing() -> None:
    labels, scores = np.array([0, 1, 1], np.int8), np.full(3, 0.75)
    curve = metrics.roc_curve(labels, scores)
    assert curve.auc == 0.5
    assert (curve.fpr.tolist(), curve.tpr.tolist()) == ([0, 1], [0, 1])
    threshold = metrics.youden_threshold(curve)
    assert threshold is not None
    assert threshold < 0.75  # all choices are equally good: nobody is missed


# --- thresholds ------------------------------------------------------------------------------------------------------


def test_a_score_equal_to_the_threshold_is_not_called() -> None:
    labels, scores = np.array([0, 1, 0, 1], np.int8), np.array([0.5, 0.5, 0.5 + 2**-24, 0.5 + 2**-24])
    assert metrics.confusion(labels, scores, threshold=0.5) == Confusion(
        threshold=0.5, true_negatives=1, false_positives=1, false_negatives=1, true_positives=1
    )


@exhaustively
@given(TWO_CLASSES)
def test_youden_is_the_best_of_all_midpoints(case: Case) -> None:
    labels, scores = case
    distinct = sorted(set(scores.tolist()))
    edges = [-1.0, *distinct, 1.0]
    midpoints = [(low + high) / 2 for low, high in pairwise(edges)]

    def worth(threshold: float) -> tuple[Fraction, Fraction]:
        fpr, tpr = rates(labels, scores, threshold)
        return tpr - fpr, tpr  # of equally good ones, the more sensitive

    assert metrics.youden_threshold(metrics.roc_curve(labels, scores)) == max(midpoints, key=worth)


def test_of_equally_good_thresholds_the_more_sensitive_is_chosen() -> None:
    # at 0.8125 sensitivity 1/2 and specificity 1, at 0.25 sensitivity 1 and specificity 1/2: both gain 1/2
    labels, scores = np.array([0, 1, 0, 1], np.int8), np.array([0.125, 0.375, 0.75, 0.875])
    assert metrics.youden_threshold(metrics.roc_curve(labels, scores)) == 0.25


def test_operating_points_are_chosen_by_name_and_only_where_both_classes_are() -> None:
    assert metrics.choose_operating_points(predictions([0, 1], [0.25, 0.75])) == {"youden": 0.5}
    assert metrics.choose_operating_points(predictions([1, 1], [0.25, 0.75])) == {}
    assert metrics.choose_operating_points(predictions([], [])) == {}
    assert metrics.youden_threshold(metrics.roc_curve(np.array([1], np.int8), np.array([0.5]))) is None


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_that_of_keras(seed: int) -> None:
    labels, scores = random_case(500, seed)
    # in its float32, 1 - 1e-7 is 1 - 1.2e-7: of the images that are wholly wrong, only those with score 0 are compared
    kept = (labels == 1) | (scores < 1)
    assert {0.0, 1.0} <= set(scores[kept].tolist())
    keras_loss = keras.losses.BinaryCrossentropy()(labels[kept][:, None], scores[kept][:, None].astype(np.float32))
    assert metrics.log_loss(labels[kept], scores[kept]) == pytest.approx(float(keras_loss), rel=1e-5)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="other backends compute this loss in float32")
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_that_of_keras_in_double_precision(seed: int) -> None:
    labels, scores = random_case(500, seed)
    keras_loss = keras.losses.BinaryCrossentropy(dtype="float64")(labels[:, None], scores[:, None])
    assert metrics.log_loss(labels, scores) == pytest.approx(float(keras_loss), rel=1e-9)


@exhaustively
@given(CASES)
def test_the_loss_is_that_of_scikit_learn_on_clipped_scores(case: Case) -> None:
    labels, scores = case
    expected = sk.log_loss(labels, np.clip(scores, 1e-7, 1 - 1e-7), labels=[0, 1])
    assert metrics.log_loss(labels, scores) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_loss_of_a_wholly_wrong_score_is_finite() -> None:
    wrong = metrics.log_loss(np.array([1, 0]), np.array([0.0, 1.0]))
    assert wrong == pytest.approx(-np.log(1e-7), rel=1e-9)
    assert metrics.log_loss(np.array([0, 1]), np.array([0.0, 1.0])) == pytest.approx(1e-7, rel=1e-6)
    assert metrics.log_loss(np.array([0, 1]), np.array([0.5, 0.5], np.float32)) == pytest.approx(np.log(2))


# --- counts ----------------------------------------------------------------------------------------------------------


def test_counts_and_shares_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1], np.int8)
    scores = np.array([0.1, 0.2, 0.6, 0.3, 0.9, 0.4, 0.8, 0.7, 0.6, 0.1])
    counted = metrics.confusion(labels, scores, threshold=0.5)
    assert counted == Confusion(0.5, true_negatives=3, false_positives=1, false_negatives=2, true_positives=4)
    assert (counted.n, counted.accuracy, counted.sensitivity, counted.specificity) == (10, 7 / 10, 4 / 6, 3 / 4)
    assert counted.as_dict() == {
        "threshold": 0.5, "accuracy": 7 / 10, "false_negatives": 2, "false_positives": 1, "true_negatives": 3,
        "true_positives": 4, "sensitivity": 4 / 6, "specificity": 3 / 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "shares"),
    [
        ((0, 0, 0, 0), (None, None, None)),
        ((1, 0, 0, 0), (1.0, None, 1.0)),
        ((0, 1, 0, 0), (0.0, None, 0.0)),
        ((0, 0, 1, 0), (0.0, 0.0, None)),
        ((0, 0, 0, 1), (1.0, 1.0, None)),
    ],
)
def test_an_undefined_share_is_none(
    counts: tuple[int, int, int, int], shares: tuple[float | None, float | None, float | None]
) -> None:
    counted = Confusion(0.5, *counts)
    assert (counted.accuracy, counted.sensitivity, counted.specificity) == shares


# --- the evaluation --------------------------------------------------------------------------------------------------

FIGURES = {
    "threshold", "accuracy", "false_negatives", "false_positives", "true_negatives", "true_positives", "sensitivity",
    "specificity",
}  # fmt: skip


def test_an_evaluation_holds_what_metrics_json_promises() -> None:
    labels, scores = random_case(400, 7)
    shown = metrics.evaluate(
        predictions(labels.tolist(), scores.tolist()), operating_points={"youden": 0.375, "sensitive": 0.125}
    ).as_dict()
    assert set(shown) == FIGURES | {
        "n", "n_positive", "n_negative", "loss", "auc", "operating_point", "operating_points"
    }  # fmt: skip
    assert set(shown["operating_point"]) == FIGURES | {"name"}
    assert list(shown["operating_points"]) == ["youden", "sensitive"]
    assert shown["operating_point"] == shown["operating_points"]["youden"]
    assert (shown["n"], shown["n_positive"]) == (400, int(labels.sum()))
    assert shown["n_negative"] == 400 - shown["n_positive"]
    assert shown["loss"] == metrics.log_loss(labels, scores)
    assert shown["auc"] == metrics.roc_curve(labels, scores).auc
    half = metrics.confusion(labels, scores, threshold=0.5).as_dict()
    assert {name: shown[name] for name in FIGURES} == half
    for name, threshold in (("youden", 0.375), ("sensitive", 0.125)):
        point = metrics.confusion(labels, scores, threshold=threshold).as_dict()
        assert shown["operating_points"][name] == {"name": name, **point}
        assert point != half
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown


def test_a_threshold_is_carried_unchanged_from_one_split_to_another() -> None:
    chosen = metrics.choose_operating_points(predictions([0, 0, 1, 1], [0.1, 0.3, 0.2, 0.9]))
    evaluation = metrics.evaluate(predictions([0, 1], [0.9, 0.1]), operating_points=chosen)
    assert {name: point.threshold for name, point in evaluation.operating_points.items()} == chosen


def test_without_operating_points_there_is_none() -> None:
    shown = metrics.evaluate(predictions([0, 1], [0.25, 0.75])).as_dict()
    assert (shown["operating_point"], shown["operating_points"]) == (None, {})


@pytest.mark.parametrize("label", [0, 1])
def test_one_image_is_evaluated_as_far_as_figures_are_defined(label: int) -> None:
    shown = metrics.evaluate(predictions([label], [0.75]), operating_points={"youden": 0.9}).as_dict()
    assert (shown["n"], shown["auc"], shown["accuracy"]) == (1, None, float(label))
    assert shown["sensitivity"] == (1.0 if label else None)
    assert shown["specificity"] == (None if label else 0.0)
    assert shown["operating_point"]["sensitivity"] == (0.0 if label else None)
    assert "NaN" not in json.dumps(shown, allow_nan=False)


def test_no_predictions_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        metrics.evaluate(predictions([], []))
    assert str(caught.value) == "There are no predictions to evaluate; score at least one labelled image first."
