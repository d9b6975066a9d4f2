"""The evaluation of a split as a whole: each figure from its own module, under its name, on the right scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pneumoscope import calibration, counts, curves, intervals, metrics
from pneumoscope._backend import keras
from pneumoscope.counts import FIGURES, intervals_by_group
from pneumoscope.errors import DataError, UsageError
from pneumoscope.metrics import Evaluation
from pneumoscope.predictions import Predictions

Labels = npt.NDArray[np.int8]
Scores = npt.NDArray[np.float64]
Case = tuple[Labels, Scores]

AT_THRESHOLD = {
    "threshold", "false_negatives", "false_positives", "true_negatives", "true_positives", "intervals", *FIGURES
}  # fmt: skip
POINTS = {"youden": 0.375, "sensitivity-0.95": 0.125}
SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1, width=32, allow_subnormal=False)
CASES = st.lists(st.tuples(st.integers(0, 1), SCORES), min_size=1, max_size=40).map(
    lambda rows: (np.array([label for label, _ in rows], np.int8), np.array([score for _, score in rows], np.float64))
)
exhaustively = settings(derandomize=True, deadline=None, max_examples=150, database=None)


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


# --- operating points ------------------------------------------------------------------------------------------------


def test_operating_points_are_chosen_by_name_and_only_where_both_classes_are() -> None:
    chosen = metrics.choose_operating_points(predictions([0, 1], [0.25, 0.75]))
    assert list(chosen.items()) == [("youden", 0.5), ("sensitivity-0.95", 0.5), ("cost", 0.5)]
    assert metrics.choose_operating_points(predictions([1, 1], [0.25, 0.75])) == {}
    assert metrics.choose_operating_points(predictions([0, 0], [0.25, 0.75])) == {}
    assert metrics.choose_operating_points(predictions([], [])) == {}


def test_each_operating_point_is_chosen_by_its_own_rule() -> None:
    labels, scores = random_case(400, 3)
    table = predictions(labels.tolist(), scores.tolist())
    curve = curves.roc_curve(table.labels, table.scores)
    assert metrics.choose_operating_points(table) == {
        "youden": curves.youden_threshold(curve),
        "sensitivity-0.95": curves.sensitivity_threshold(table.labels, table.scores, at_least=0.95),
        "cost": curves.cost_threshold(curve, ratio=5.0),
    }
    dear = metrics.choose_operating_points(table, cost_ratio=50.0)["cost"]
    cheap = metrics.choose_operating_points(table, cost_ratio=0.02)["cost"]
    assert dear == curves.cost_threshold(curve, ratio=50.0)
    assert dear < cheap
    with pytest.raises(UsageError, match=r"^The cost ratio is 0; give a finite number above 0"):
        metrics.choose_operating_points(table, cost_ratio=0)


def test_a_threshold_is_carried_unchanged_from_one_split_to_another() -> None:
    chosen = metrics.choose_operating_points(predictions([0, 0, 1, 1], [0.1, 0.3, 0.2, 0.9]))
    evaluation = metrics.evaluate(predictions([0, 1], [0.9, 0.1]), operating_points=chosen)
    assert {name: point.threshold for name, point in evaluation.operating_points.items()} == chosen


# --- what metrics.json holds -----------------------------------------------------------------------------------------


def evaluated(case: Case, **options: Any) -> Evaluation:
    return metrics.evaluate(predictions(case[0].tolist(), case[1].tolist()), **options)


def nones_in(shown: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys of everything that is None, an operating point's with its name in front."""
    for key, value in shown.items():
        if value is None:
            yield prefix + key
        elif key == "operating_points":
            for name, point in value.items():
                yield from nones_in(point, f"{prefix}{name}.")
        elif isinstance(value, dict) and key not in ("undefined", "subgroups", "operating_point"):
            yield from nones_in(value, f"{prefix}{key}.")


def test_an_evaluation_holds_what_metrics_json_promises() -> None:
    labels, scores = random_case(400, 7)
    shown = evaluated((labels, scores), operating_points=POINTS).as_dict()
    assert set(shown) == AT_THRESHOLD | {
        "n", "n_positive", "n_negative", "loss", "auc", "auc_interval", "average_precision", "brier", "operating_point",
        "operating_points", "group_intervals", "calibration", "calibration_raw", "decision_curve", "subgroups",
        "bootstrap", "undefined",
    }  # fmt: skip
    assert set(shown["operating_point"]) == AT_THRESHOLD | {"name", "group_intervals"}
    assert list(shown["operating_points"]) == list(POINTS)
    assert shown["operating_point"] == shown["operating_points"]["youden"]
    assert (shown["n"], shown["n_positive"]) == (400, int(labels.sum()))
    assert shown["n_negative"] == 400 - shown["n_positive"]
    half = counts.confusion(labels, scores, threshold=0.5).as_dict()
    assert {name: shown[name] for name in AT_THRESHOLD} == half
    for name, threshold in POINTS.items():
        point = counts.confusion(labels, scores, threshold=threshold).as_dict()
        assert shown["operating_points"][name] == {"name": name, **point, "group_intervals": {}}
        assert point != half
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown


def test_each_figure_comes_from_its_module() -> None:
    labels, scores = random_case(400, 8)
    found = evaluated((labels, scores))
    shown = found.as_dict()
    assert shown["loss"] == calibration.log_loss(labels, scores)
    assert shown["brier"] == pytest.approx(sk.brier_score_loss(labels, scores), abs=1e-12)
    assert shown["auc"] == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    assert shown["average_precision"] == pytest.approx(sk.average_precision_score(labels, scores), abs=1e-12)
    estimate = intervals.delong(labels, scores)
    assert estimate is not None
    assert estimate.interval is not None
    assert found.auc == estimate
    assert estimate.auc == pytest.approx(shown["auc"], abs=1e-12)
    assert shown["auc_interval"] == estimate.interval.as_dict()
    assert shown["decision_curve"] == calibration.decision_curve(labels, scores).as_dict()


def test_the_names_that_scripts_import_from_here_are_still_here() -> None:
    assert metrics.RocCurve is curves.RocCurve
    assert metrics.roc_curve is curves.roc_curve
    assert metrics.youden_threshold is curves.youden_threshold
    assert metrics.Confusion is counts.Confusion
    assert metrics.confusion is counts.confusion
    assert metrics.log_loss is calibration.log_loss
    assert metrics.HALF == 0.5
    assert [name for name in metrics.__all__ if not hasattr(metrics, name)] == []


def test_without_operating_points_there_is_none() -> None:
    shown = evaluated((np.array([0, 1], np.int8), np.array([0.25, 0.75]))).as_dict()
    assert (shown["operating_point"], shown["operating_points"]) == (None, {})
    assert shown["undefined"]["operating_point"] == "No operating point was given."
    assert shown["undefined"]["bootstrap"] == "No bootstrap was asked for."


# --- what is undefined -----------------------------------------------------------------------------------------------


@exhaustively
@given(CASES, st.booleans(), st.sampled_from([0, 5]))
def test_each_none_has_a_reason_and_each_reason_a_none(case: Case, whole: bool, bootstrap: int) -> None:
    n = len(case[0])
    division = {"half": np.where(np.arange(n) < n / 2, "first", "second")}
    options: dict[str, Any] = {"operating_points": POINTS, "temperature": 2.0, "subgroups": division} if whole else {}
    shown = evaluated(case, bootstrap=bootstrap, groups=np.arange(n) // 2, **options).as_dict()
    assert set(nones_in(shown)) == set(shown["undefined"])
    parts = [part for values in shown["subgroups"].values() for part in values.values()]
    assert len(parts) == (min(n, 2) if whole else 0)
    for part in parts:
        assert set(nones_in(part)) == set(part["undefined"])
    reasons = [reason for undefined in (shown, *parts) for reason in undefined["undefined"].values()]
    assert all(reason.endswith(".") for reason in reasons)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown  # no NaN, no infinity, no type that JSON lacks


@pytest.mark.parametrize("label", [0, 1])
def test_one_image_is_evaluated_as_far_as_figures_are_defined(label: int) -> None:
    shown = evaluated((np.array([label], np.int8), np.array([0.75])), operating_points={"youden": 0.9}).as_dict()
    assert (shown["n"], shown["auc"], shown["accuracy"]) == (1, None, float(label))
    assert shown["sensitivity"] == (1.0 if label else None)
    assert shown["specificity"] == (None if label else 0.0)
    assert shown["operating_point"]["sensitivity"] == (0.0 if label else None)
    missing = "There is no NORMAL image." if label else "There is no PNEUMONIA image."
    assert {shown["undefined"][key] for key in ("auc", "auc_interval", "average_precision", "mcc")} == {missing}
    assert shown["undefined"]["youden.specificity" if label else "youden.sensitivity"] == missing
    assert shown["undefined"]["calibration.slope"] == shown["undefined"]["calibration_raw.slope"] == missing


def test_perfect_separation_gets_no_interval_of_no_width() -> None:
    case = np.array([0, 0, 1, 1], np.int8), np.array([0.1, 0.2, 0.8, 0.9])
    shown = evaluated(case, bootstrap=20, groups=[1, 2, 3, 4]).as_dict()
    assert (shown["auc"], shown["average_precision"], shown["mcc"]) == (1, 1, 1)
    assert shown["auc_interval"] is None
    assert "variance is 0" in shown["undefined"]["auc_interval"]
    assert shown["group_intervals"]["auc"] is None
    assert shown["undefined"]["group_intervals.auc"] == intervals.NO_BOOTSTRAP
    assert shown["intervals"]["accuracy"]["low"] < 0.6  # four right calls of four show little
    assert shown["intervals"]["mcc"] is None


def test_no_predictions_are_refused() -> None:
    message = "There are no predictions to evaluate; score at least one labelled image first."
    with pytest.raises(DataError) as caught:
        metrics.evaluate(predictions([], []))
    assert str(caught.value) == message
    with pytest.raises(DataError) as caught:
        metrics.bootstrap_seconds(predictions([], []), groups=[])
    assert str(caught.value) == message


# --- temperature -----------------------------------------------------------------------------------------------------


def test_with_a_temperature_calibration_and_decisions_are_of_calibrated_probabilities_and_calls_are_not() -> None:
    labels, scores = random_case(400, 9)
    raw = evaluated((labels, scores), operating_points=POINTS).as_dict()
    shown = evaluated((labels, scores), operating_points=POINTS, temperature=2.5).as_dict()
    calm = calibration.apply_temperature(scores, 2.5)
    assert shown["calibration"] == {"temperature": 2.5, **calibration.calibrate(labels, calm).as_dict()}
    assert shown["decision_curve"] == calibration.decision_curve(labels, calm).as_dict()
    assert shown["calibration_raw"] == calibration.calibrate(labels, scores).as_dict()
    assert shown["calibration"]["slope"] == pytest.approx(2.5 * shown["calibration_raw"]["slope"], rel=1e-6)
    changed = {key for key in shown if shown[key] != raw[key]}
    assert changed == {"calibration", "decision_curve", "undefined"}
    assert raw["calibration"] == {"temperature": None, **raw["calibration_raw"]}
    assert raw["undefined"]["calibration.temperature"] == (
        "No temperature was given: the figures are those of the raw scores."
    )


def test_a_temperature_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^The temperature is 0; give a finite number above 0"):
        evaluated(random_case(200, 1), temperature=0)


# --- subgroups -------------------------------------------------------------------------------------------------------


def test_a_subgroup_has_the_figures_of_its_rows() -> None:
    labels, scores = random_case(600, 11)
    values = np.random.default_rng(0).choice(["bacteria", "none", "virus"], len(labels))
    shown = evaluated(
        (labels, scores), operating_points=POINTS, subgroups={"subtype": values, "one": ["all"] * 600}
    ).as_dict()
    assert {name: list(parts) for name, parts in shown["subgroups"].items()} == {
        "subtype": ["bacteria", "none", "virus"], "one": ["all"]
    }  # fmt: skip
    for name, part in shown["subgroups"]["subtype"].items():
        rows = values == name
        alone = evaluated((labels[rows], scores[rows]), operating_points=POINTS).as_dict()
        assert part["n"] == rows.sum()
        assert part["auc"] == pytest.approx(alone["auc"], abs=1e-12)
        assert part["auc_interval"] == alone["auc_interval"]
        same = (AT_THRESHOLD | {"n_positive", "n_negative"}) - {"auc"}
        assert {key: part[key] for key in same} == {key: alone[key] for key in same}
        for point, figures in part["operating_points"].items():
            expected = {k: v for k, v in alone["operating_points"][point].items() if k != "group_intervals"}
            assert figures == expected
    whole = shown["subgroups"]["one"]["all"]
    assert {key: whole[key] for key in AT_THRESHOLD} == {key: shown[key] for key in AT_THRESHOLD}


def test_a_subgroup_of_one_label_says_what_it_lacks() -> None:
    labels, scores = np.array([0, 1, 1], np.int8), np.array([0.2, 0.8, 0.4])
    found = evaluated((labels, scores), subgroups={"subtype": ["none", "virus", "virus"]}).subgroups["subtype"]
    assert (found["virus"].n_positive, found["virus"].n_negative) == (2, 0)
    assert found["virus"].at_half.sensitivity == 0.5
    assert found["virus"].undefined["auc"] == "There is no NORMAL image."
    assert found["none"].undefined["sensitivity"] == "There is no PNEUMONIA image."


def test_a_division_without_one_value_per_image_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        evaluated((np.array([0, 1], np.int8), np.array([0.2, 0.8])), subgroups={"subtype": ["virus"]})
    assert str(caught.value) == "There are (1,) entries for 2 images; give one value of subtype per image."


# --- bootstrap -------------------------------------------------------------------------------------------------------


def test_the_bootstrap_is_that_of_copied_rows() -> None:
    labels, scores = random_case(150, 13)
    groups = np.array([f"person{at}" for at in np.random.default_rng(1).integers(0, 60, len(labels))])
    points = {"youden": float(np.median(scores)), "sensitivity-0.95": 0.125}
    assert points["youden"] in scores  # a score on the line is not called

    def by_copying(weights: Scores) -> dict[str, float | None]:
        rows = np.repeat(np.arange(len(labels)), weights.astype(int))
        y, score = labels[rows], scores[rows]
        found: dict[str, float | None] = {
            "auc": sk.roc_auc_score(y, score),
            "average_precision": sk.average_precision_score(y, score),
            "brier": sk.brier_score_loss(y, score),
        }
        for prefix, threshold in {"": 0.5, **{f"{name}.": at for name, at in points.items()}}.items():
            call = score > threshold
            found |= {
                f"{prefix}accuracy": sk.accuracy_score(y, call),
                f"{prefix}sensitivity": sk.recall_score(y, call),
                f"{prefix}specificity": sk.recall_score(y, call, pos_label=0),
                f"{prefix}positive_predictive_value": sk.precision_score(y, call),
                f"{prefix}negative_predictive_value": sk.precision_score(y, call, pos_label=0),
                f"{prefix}f1": sk.f1_score(y, call),
                f"{prefix}mcc": sk.matthews_corrcoef(y, call),
            }
        return found

    expected = intervals.bootstrap_by_group(by_copying, groups, resamples=40, seed=5)
    shown = evaluated((labels, scores), operating_points=points, groups=groups, bootstrap=40, seed=5).as_dict()
    assert shown["bootstrap"] == {"resamples": 40, "seed": 5, "groups": len(set(groups))}
    found = dict(shown["group_intervals"])
    for name, point in shown["operating_points"].items():
        assert list(point["group_intervals"]) == list(FIGURES)
        found |= {f"{name}.{key}": interval for key, interval in point["group_intervals"].items()}
    assert list(found) == list(expected)
    by_formula = {
        f"{prefix}{name}": interval
        for prefix, at in {"": 0.5, **{f"{name}.": at for name, at in points.items()}}.items()
        for name, interval in intervals_by_group(labels, scores, groups, threshold=at).items()
    }
    assert set(by_formula) == {key for key in expected if key.rpartition(".")[2] in set(FIGURES) - {"mcc"}}
    for key, interval in (expected | by_formula).items():
        assert interval is not None
        assert found[key] == {
            "low": pytest.approx(interval.low, abs=1e-12),
            "high": pytest.approx(interval.high, abs=1e-12),
            "method": "wilson by group" if key in by_formula else "bootstrap by group",
            "level": 0.95,
        }


def test_images_of_one_patient_do_not_count_as_many() -> None:
    labels, scores = random_case(100, 17)
    people = np.arange(100)
    once = evaluated((labels, scores), groups=people, bootstrap=200).as_dict()
    # the same hundred people, nine images each: Wilson's interval shrinks, that of the people stays
    nine = np.repeat(people, 9)
    often = evaluated((labels[nine], scores[nine]), groups=nine, bootstrap=200).as_dict()
    for name in ("accuracy", "mcc"):
        for end in ("low", "high"):
            assert often["group_intervals"][name][end] == pytest.approx(once["group_intervals"][name][end], abs=5e-3)

    def width(shown: dict[str, Any], kind: str) -> float:
        return float(shown[kind]["accuracy"]["high"] - shown[kind]["accuracy"]["low"])

    assert width(often, "intervals") < 0.4 * width(once, "intervals")
    assert width(often, "group_intervals") > 2 * width(often, "intervals")


def test_a_seed_repeats_the_bootstrap_and_another_does_not() -> None:
    case = random_case(100, 19)
    one, same, other = (
        evaluated(case, groups=np.arange(100), bootstrap=30, seed=seed).as_dict()["group_intervals"]
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_a_bootstrap_without_groups_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        evaluated(random_case(100, 1), bootstrap=1000)
    assert str(caught.value) == (
        "A bootstrap of 1000 resamples was asked for without groups; give the patient of every image, because images "
        "of one patient are not independent."
    )
    for ask in (
        lambda: evaluated(random_case(100, 1), bootstrap=10, groups=["a"] * 99),
        lambda: metrics.bootstrap_seconds(predictions([0] * 100, [0.5] * 100), groups=["a"] * 99),
    ):
        with pytest.raises(DataError) as refused:
            ask()
        assert str(refused.value) == "There are (99,) entries for 100 images; give one group per image."
    with pytest.raises(UsageError, match=r"^A bootstrap of -1 resamples was asked for"):
        evaluated(random_case(100, 1), bootstrap=-1, groups=np.arange(100))


def test_the_cost_of_a_bootstrap_is_told_before_it_starts() -> None:
    labels, scores = random_case(2000, 23)
    table = predictions(labels.tolist(), scores.tolist())
    cost = metrics.bootstrap_seconds(table, groups=np.arange(2000), operating_points=POINTS, resamples=1000)
    assert 0.01 < cost < 600  # a thousand resamples of 2,000 images: neither nothing nor an hour
