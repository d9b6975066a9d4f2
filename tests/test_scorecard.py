"""The scorecard: where each choice comes from, who is compared with whom, and what a reader of the figures is told."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from scipy.special import expit
from statsmodels.stats.proportion import proportion_confint

from pneumoscope import _files, calibration, intervals, metrics, scorecard, shift
from pneumoscope.catalog import Catalog
from pneumoscope.comparison import BETTER, UNDECIDED
from pneumoscope.conformal import Conformal
from pneumoscope.errors import DataError, RunError
from pneumoscope.predictions import Predictions
from pneumoscope.scorecard import TABLE_HEAD, Choice, Scorecard, Scored, as_rows, divisions, measure
from pneumoscope.specs import EvaluationSpec

Rows = dict[str, pd.DataFrame]

N = {"validation": 90, "calibration": 80, "test": 100}
MODELS = {"cnn": 2.0, "ft": 3.5}  # name -> how far apart the mean logits of the two labels are
SURE = 8.0  # times as far from 0 as a logit should be, so that there is a temperature to fit
SHORTCUTS = {"file-and-grey": 0.5, "border-only": 0.0}
NAMES = (*MODELS, *SHORTCUTS)
SPEC = EvaluationSpec(bootstrap=100)
PLAIN = EvaluationSpec(bootstrap=0)


def catalog_rows(split: str, labels: Sequence[int] | npt.NDArray[np.int8]) -> pd.DataFrame:
    """Rows as a Catalog holds them: two images to a patient of the same label, sizes from 500 px up."""
    label = np.asarray(labels, dtype=np.int8)
    patient = np.arange(len(label)) // 2
    series = [
        (("IM", "NORMAL2-IM"), ("bacteria", "virus"))[sick][at % 2] for sick, at in zip(label, patient, strict=True)
    ]
    n = len(label)
    return pd.DataFrame({
        "path": [f"{split}/{at}.jpeg" for at in range(n)],
        "image_id": [f"{len(split):02x}{at:014x}" for at in range(n)],
        "split": split,
        "label": label,
        "group": [f"{name}/{split}{at}" for name, at in zip(series, patient, strict=True)],
        "subtype": [name if sick else "" for name, sick in zip(series, label, strict=True)],
        "width_px": 1000 + np.arange(n),
        "height_px": 500 + np.arange(n),
        "file_bytes": 1000,
        "status": "ok",
    })  # fmt: skip


def all_rows(*splits: str) -> Rows:
    """Labels that come in pairs, as patients do; PNEUMONIA twice as often."""
    return {split: catalog_rows(split, (np.arange(N[split]) % 6 >= 2).astype(np.int8)) for split in splits or N}


def scored(rows: Rows, gains: Mapping[str, float], *, seed: int = 0) -> dict[str, dict[str, Predictions]]:
    def scores(name: str, split: str, label: pd.Series[int]) -> npt.NDArray[np.float64]:
        random = np.random.default_rng([seed, *name.encode(), *split.encode()])
        logits = gains[name] * (label - 0.5) + random.normal(size=len(label))
        return np.asarray(expit(SURE * logits), dtype=np.float64)

    return {
        name: {split: Predictions.of(part, scores(name, split, part["label"])) for split, part in rows.items()}
        for name in gains
    }


@pytest.fixture(scope="module")
def rows() -> Rows:
    return all_rows()


@pytest.fixture(scope="module")
def card(rows: Rows) -> Scorecard:
    return measure(scored(rows, MODELS), scored(rows, SHORTCUTS), rows=rows, spec=SPEC, seed=3)


def through_json(content: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(content, allow_nan=False))


# --- where choices come from -----------------------------------------------------------------------------------------


def test_choices_come_from_the_calibration_part_where_there_is_one(card: Scorecard, rows: Rows) -> None:
    assert card.chosen_on == card.as_dict()["chosen_on"] == "calibration"
    for name, parts in (scored(rows, MODELS) | scored(rows, SHORTCUTS)).items():
        part = parts["calibration"]
        choice = {**card.models, **card.shortcuts}[name].choice
        assert choice == Choice.on(part, spec=SPEC) != Choice.on(parts["validation"], spec=SPEC)
        assert choice.points == metrics.choose_operating_points(part)
        assert choice.temperature == calibration.fit_temperature(part.labels, part.scores)
        assert choice.conformal == Conformal.fit(part.labels, part.scores, coverage=0.9)


def test_choices_come_from_validation_where_there_is_no_calibration_part() -> None:
    rows = all_rows("validation", "test")
    models = scored(rows, MODELS)
    card = measure(models, {}, rows=rows, spec=PLAIN)
    assert card.chosen_on == "validation"
    assert card.models["ft"].choice == Choice.on(models["ft"]["validation"], spec=PLAIN)


@pytest.mark.parametrize("splits", [("validation", "test"), ("validation", "calibration", "test")])
def test_no_choice_depends_on_the_test_images(splits: tuple[str, ...]) -> None:
    rows = all_rows(*splits)
    models = scored(rows, MODELS)
    turned = {
        name: parts | {"test": Predictions.of(rows["test"], 1 - parts["test"].scores)} for name, parts in models.items()
    }
    one, other = (measure(found, {}, rows=rows, spec=PLAIN).as_dict()["models"] for found in (models, turned))
    for name in MODELS:
        assert one[name]["test"]["auc"] == pytest.approx(1 - other[name]["test"]["auc"])
        for split in splits[:-1]:
            assert one[name][split] == other[name][split]
        for key in ("threshold", "name"):
            points = [found[name]["test"]["operating_points"] for found in (one, other)]
            assert [point[key] for point in points[0].values()] == [point[key] for point in points[1].values()]
        for path in (("calibration", "temperature"), ("conformal", "rule")):
            first, second = (found[name]["test"][path[0]][path[1]] for found in (one, other))
            assert first == second is not None


def test_choices_do_not_depend_on_validation_where_there_is_a_calibration_part(card: Scorecard, rows: Rows) -> None:
    models = scored(rows, MODELS)
    for parts in models.values():
        parts["validation"] = Predictions.of(rows["validation"], 1 - parts["validation"].scores)
    again = measure(models, {}, rows=rows, spec=PLAIN)
    assert {name: model.choice for name, model in again.models.items()} == {
        name: model.choice for name, model in card.models.items()
    }


def test_one_choice_is_carried_to_every_split(card: Scorecard) -> None:
    for name, model in card.as_dict()["models"].items():
        made = [Choice.of_dict(content) for content in model.values()]
        assert len(made) == 3
        assert made == [card.models[name].choice] * 3


def test_the_spec_sets_the_cost_ratio_and_the_coverage(rows: Rows) -> None:
    part = scored(rows, MODELS)["cnn"]["calibration"]
    usual, dear = (
        Choice.on(part, spec=EvaluationSpec(cost_ratio=ratio, coverage=coverage))
        for ratio, coverage in ((5.0, 0.9), (500.0, 0.6))
    )
    assert dear.points == metrics.choose_operating_points(part, cost_ratio=500.0)
    assert dear.points["cost"] < usual.points["cost"]
    assert dear.conformal == Conformal.fit(part.labels, part.scores, coverage=0.6)
    assert dear.conformal.coverage == 0.6


@pytest.mark.parametrize("labels", [[0, 1] * 20, [1] * 30, [0]], ids=["both labels", "one label", "one image"])
def test_a_choice_comes_back_from_the_file_as_it_was(labels: list[int]) -> None:
    rows = {"validation": catalog_rows("validation", labels), "test": catalog_rows("test", [0, 1, 1])}
    made = measure(scored(rows, {"cnn": 1.0}), {}, rows=rows, spec=PLAIN)
    content = through_json(made.as_dict())["models"]["cnn"]
    choice = made.models["cnn"].choice
    assert Choice.of_dict(content["validation"]) == Choice.of_dict(content["test"]) == choice
    assert bool(choice.points) == (choice.temperature.value is not None) == (len(set(labels)) == 2)
    assert type(choice.conformal.coverage) is float


def test_other_images_are_measured_with_the_choices_that_are_given(card: Scorecard, rows: Rows) -> None:
    elsewhere = {"test": rows["test"]}
    models = {name: {"test": parts["test"]} for name, parts in scored(rows, MODELS).items()}
    content = through_json(card.as_dict())["models"]
    choices = {name: Choice.of_dict(content[name]["validation"]) for name in MODELS}
    again = measure(models, {}, rows=elsewhere, spec=SPEC, choices=choices, chosen_on=card.chosen_on, seed=3)
    assert again.chosen_on == "calibration"
    assert again.splits == ["test"]
    for name in MODELS:
        assert again.models[name].as_dict() == {"test": card.models[name].as_dict()["test"]}
        assert again.models[name].moved is None  # the images that it moved from are not here
    assert again.as_dict()["moved"] == {"cnn": None, "ft": None}


def without(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    *above, last = keys
    part = content
    for key in above:
        part = part[key]
    del part[last]
    return content


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (("conformal",), "'conformal'"),
        (("conformal", "rule"), "'rule'"),
        (("conformal", "rule", "normal_up_to"), "'normal_up_to'"),
        (("operating_points",), "'operating_points'"),
        (("calibration",), "'calibration'"),
        (("undefined",), "'undefined'"),
    ],
)
def test_what_an_earlier_version_wrote_is_refused(card: Scorecard, keys: tuple[str, ...], named: str) -> None:
    content = through_json(card.as_dict())["models"]["cnn"]["validation"]
    with pytest.raises(RunError) as refusal:
        Choice.of_dict(without(content, *keys))
    assert str(refusal.value) == (
        f"The run's metrics.json does not say what was chosen for its models ({named}), as where an earlier version "
        "wrote it; score the run again with pneumoscope evaluate RUN."
    )


def test_a_choice_that_is_null_is_refused_too(card: Scorecard) -> None:
    content = through_json(card.as_dict())["models"]["cnn"]["validation"] | {"conformal": None}
    with pytest.raises(RunError, match=r"^The run's metrics\.json does not say what was chosen for its models \("):
        Choice.of_dict(content)


# --- what is measured ------------------------------------------------------------------------------------------------


def test_each_split_holds_all_figures_with_its_groups_divisions_and_choices(card: Scorecard, rows: Rows) -> None:
    content = card.as_dict()
    assert list(content["models"]) == list(MODELS)
    assert list(content["shortcuts"]) == list(SHORTCUTS)
    for kind, gains in (("models", MODELS), ("shortcuts", SHORTCUTS)):
        for name, parts in scored(rows, gains).items():
            assert list(content[kind][name]) == card.splits == list(N)
            choice = Choice.on(parts["calibration"], spec=SPEC)
            for split, part in parts.items():
                expected = metrics.evaluate(
                    part,
                    operating_points=choice.points,
                    groups=rows[split]["group"].to_numpy(dtype=str),
                    subgroups=divisions(rows[split]),
                    bootstrap=100,
                    seed=3,
                    temperature=choice.temperature.value,
                )
                found = dict(content[kind][name][split])
                assert found.pop("conformal")
                assert found == expected.as_dict()
                assert set(found["subgroups"]) == {"subtype", "series", "size"}
                assert found["bootstrap"] == {"resamples": 100, "seed": 3, "groups": N[split] // 2}


def test_prediction_sets_stand_with_their_rule_and_with_what_they_did(card: Scorecard, rows: Rows) -> None:
    part = scored(rows, MODELS)["cnn"]["test"]
    found = card.as_dict()["models"]["cnn"]["test"]["conformal"]
    rule = found["rule"]
    assert rule["coverage"] == 0.9
    assert (rule["n_normal"], rule["n_pneumonia"]) == (28, 52)
    held = np.where(part.labels == 1, part.scores >= rule["pneumonia_from"], part.scores <= rule["normal_up_to"])
    assert (found["coverage"]["part"], found["coverage"]["whole"]) == (held.sum(), 100)
    assert found["coverage"]["value"] == pytest.approx(held.mean())
    assert found["coverage_by_label"]["PNEUMONIA"]["part"] == held[part.labels == 1].sum()


def test_how_far_the_default_operating_point_moved_to_test_is_said_of_every_model(card: Scorecard, rows: Rows) -> None:
    for name, parts in scored(rows, MODELS).items():
        expected = shift.moved(
            parts["calibration"],
            parts["test"],
            threshold=card.models[name].choice.points["youden"],
            point="youden",
            names=("calibration", "test"),
        )
        assert card.models[name].moved == expected
        assert card.as_dict()["moved"][name] == expected.as_dict()
    assert set(card.as_dict()["moved"]) == set(MODELS)


def test_everything_is_ready_for_json_and_comes_back_as_it_was(card: Scorecard, tmp_path: Path) -> None:
    content = card.as_dict()
    json.dumps(content, allow_nan=False)  # no NaN, no infinity, no array: nothing for the writer to mend
    _files.write_json(tmp_path / "metrics.json", content)
    assert _files.read_json(tmp_path / "metrics.json") == {"schema_version": 1, **through_json(content)}


def test_the_cost_of_the_bootstrap_is_said_before_it_starts(rows: Rows) -> None:
    class EnoughError(Exception):
        pass

    def stop(seconds: float) -> None:
        raise EnoughError(seconds)

    models = scored(rows, MODELS)
    with pytest.raises(EnoughError) as said:  # the bootstrap itself would take minutes
        measure(models, {}, rows=rows, spec=EvaluationSpec(bootstrap=100_000), announce=stop)
    assert said.value.args[0] > 1
    heard: list[float] = []
    measure(models, {}, rows=rows, spec=SPEC, announce=heard.append)
    assert len(heard) == 1
    measure(models, {}, rows=rows, spec=PLAIN, announce=heard.append)
    assert len(heard) == 1


# --- one class, few images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "missing"), [(0, "PNEUMONIA"), (1, "NORMAL")])
def test_test_images_of_one_class_leave_figures_undefined_with_reasons(label: int, missing: str) -> None:
    rows = all_rows("validation") | {"test": catalog_rows("test", [label] * 12)}
    card = measure(scored(rows, MODELS), scored(rows, SHORTCUTS), rows=rows, spec=SPEC)
    content = card.as_dict()
    json.dumps(content, allow_nan=False)
    reason = f"There is no {missing} image."
    share = "sensitivity" if label == 0 else "specificity"
    for name in MODELS:
        figures = content["models"][name]["test"]
        assert figures["n"] == 12
        for key in ("auc", "average_precision", share):
            assert figures[key] is None
            assert figures["undefined"][key] == reason
        assert figures["undefined"][f"youden.{share}"] == reason
        sets = figures["conformal"]
        assert sets["coverage_by_label"][missing]["value"] is None
        assert sets["undefined"] == {f"coverage_by_label.{missing}": reason}
        moved = content["moved"][name]
        assert moved[share]["verdict"] == "undefined"
        assert moved[share]["difference"] is None
    assert [one["verdict"] for one in content["comparisons"]["test"]] == [UNDECIDED] * 6
    assert all(reason in one["sentence"] for one in content["comparisons"]["test"])
    assert [row[1] for row in card.table("test")] == ["-"] * 4
    at = TABLE_HEAD.index("at Youden: sensitivity") + (label == 1)
    assert [row[at] for row in card.table("test")] == ["-"] * 4
    assert any("their AUC is undefined" in sentence for sentence in card.verdicts("test"))
    assert not any(sentence.startswith("Every model is better") for sentence in card.verdicts("test"))


def test_without_both_labels_to_choose_on_there_is_no_operating_point() -> None:
    rows = {"validation": catalog_rows("validation", [1] * 12), "test": all_rows("test")["test"]}
    card = measure(scored(rows, MODELS), {}, rows=rows, spec=SPEC)
    content = card.as_dict()
    for name in MODELS:
        figures = content["models"][name]["test"]
        assert figures["operating_point"] is None
        assert figures["operating_points"] == {}
        assert figures["calibration"]["temperature"] is None
        assert figures["undefined"]["operating_point"] == "No operating point was given."
        assert figures["undefined"]["calibration.temperature"] == "There is no NORMAL image to fit a temperature on."
        assert figures["auc"] > 0.5
    assert content["moved"] == {"cnn": None, "ft": None}
    assert [row[5:] for row in card.table("test")] == [["-"] * 4] * 2
    (compared,) = card.comparisons["test"]
    assert (compared.threshold_first, compared.threshold_second) == (0.5, 0.5)  # there is none better


def test_the_reason_for_a_missing_temperature_is_that_of_the_fit() -> None:
    rows = {split: catalog_rows(split, [0, 0, 1, 1]) for split in ("validation", "test")}
    models = {"cnn": {split: Predictions.of(part, [0.1, 0.2, 0.8, 0.9]) for split, part in rows.items()}}
    figures = measure(models, {}, rows=rows, spec=PLAIN).as_dict()["models"]["cnn"]["test"]
    assert figures["undefined"]["calibration.temperature"] == (
        "The scores are not too sure as they are, and none makes them surer: they stand."
    )


# --- divisions -------------------------------------------------------------------------------------------------------


def divided(**columns: Any) -> dict[str, list[str]]:
    base = {"label": 0, "group": "IM/1", "subtype": "", "width_px": 900, "height_px": 700}
    n = max(len(values) for values in columns.values())
    return {name: values.tolist() for name, values in divisions(pd.DataFrame(base | columns, index=range(n))).items()}


def test_images_are_divided_by_subtype_and_where_none_is_known_by_label() -> None:
    found = divided(label=[0, 1, 1, 1], subtype=["", "bacteria", "virus", ""])
    assert found["subtype"] == ["NORMAL", "bacteria", "virus", "PNEUMONIA"]


def test_images_are_divided_by_the_series_of_their_names() -> None:
    found = divided(group=["IM/115", "NORMAL2-IM/115", "bacteria/1", "IM/7", "file/train/NORMAL/x.png"])
    assert found["series"] == ["IM", "NORMAL2-IM", "bacteria", "IM", "unknown"]


def test_groups_named_by_a_manifest_are_no_series_each() -> None:
    assert "series" not in divided(group=[f"patient {at}" for at in range(50)])
    assert divided(group=["patient 1", "A/1", "A/2"])["series"] == ["unknown", "A", "A"]


def test_images_are_divided_into_thirds_by_their_shorter_side() -> None:
    found = divided(width_px=[900, 100, 300, 1200, 2000, 900], height_px=[400, 800, 800, 600, 2000, 500])
    small, middle, large = "up to 300 px", "301 to 500 px", "over 500 px"
    assert found["size"] == [middle, small, small, large, large, middle]


def test_thirds_name_every_size_once_where_many_are_alike() -> None:
    assert divided(width_px=[100] * 8 + [2100])["size"] == ["up to 100 px"] * 8 + ["over 100 px"]
    assert divided(height_px=[100] * 4 + [700] * 5)["size"] == ["up to 100 px"] * 4 + ["101 to 700 px"] * 5
    assert "size" not in divided(height_px=[100] + [700] * 8)  # one small image is no third


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 100])
def test_thirds_are_as_equal_as_can_be(n: int) -> None:
    sides = 5000 + np.random.default_rng(n).permutation(n)
    found = divided(width_px=sides + 1000, height_px=sides).get("size", [""])
    sizes = pd.Series(found).value_counts()
    assert sizes.sum() == n
    assert sizes.max() - sizes.min() <= 1
    assert len(sizes) == min(n, 3)


def test_a_division_of_one_value_is_left_out() -> None:
    assert divided(label=[1, 1, 1], subtype=["virus", "virus", "virus"]) == {}
    assert set(divided(label=[0, 1])) == {"subtype"}
    assert divisions(catalog_rows("test", [])) == {}


def test_the_synthetic_set_is_divided_in_all_three_ways(packed: tuple[Catalog, object]) -> None:
    table = packed[0].rows("test")
    found = divisions(table)
    assert set(found) == {"subtype", "series", "size"}
    assert set(found["subtype"]) == {"NORMAL", "bacteria", "virus"}
    assert set(found["series"]) <= {"IM", "NORMAL2-IM", "bacteria", "virus"}
    assert all(len(values) == len(table) for values in found.values())


# --- comparisons and what they mean ----------------------------------------------------------------------------------


def test_each_model_and_baseline_is_compared_with_each_after_it_on_every_split(card: Scorecard) -> None:
    assert set(card.comparisons) == set(N)
    for split, compared in card.comparisons.items():
        assert [(one.first, one.second) for one in compared] == list(itertools.combinations(NAMES, 2))
        assert {one.n for one in compared} == {N[split]}
        assert {one.n_groups for one in compared} == {N[split] // 2}
        assert {one.comparisons for one in compared} == {6}
        for one in compared:
            of = [{**card.models, **card.shortcuts}[name] for name in (one.first, one.second)]
            assert [one.threshold_first, one.threshold_second] == [model.choice.points["youden"] for model in of]
            assert [one.auc.first, one.auc.second] == pytest.approx([m.evaluations[split].roc.auc for m in of])
    assert card.as_dict()["comparisons"]["test"] == [one.as_dict() for one in card.comparisons["test"]]


def test_without_a_bootstrap_nothing_is_compared(rows: Rows) -> None:
    card = measure(scored(rows, MODELS), scored(rows, SHORTCUTS), rows=rows, spec=PLAIN)
    assert card.comparisons == card.as_dict()["comparisons"] == {}
    assert card.verdicts("validation") == []
    assert [sentence.partition(": ")[0] for sentence in card.verdicts("test")] == list(MODELS)


def test_one_model_alone_is_compared_with_none(rows: Rows) -> None:
    assert measure(scored(rows, {"cnn": 3.0}), {}, rows=rows, spec=SPEC).comparisons == {}


def test_few_resamples_still_decide_where_the_difference_is_plain(rows: Rows) -> None:
    card = measure(scored(rows, MODELS), scored(rows, SHORTCUTS), rows=rows, spec=EvaluationSpec(bootstrap=1))
    verdicts = {(one.first, one.second): one.verdict for one in card.comparisons["test"]}
    assert verdicts["ft", "border-only"] == BETTER


def test_models_that_all_beat_the_shortcuts_are_said_to(card: Scorecard) -> None:
    first, second, *moved = card.verdicts("test")
    (pair,) = (one for one in card.comparisons["test"] if (one.first, one.second) == ("cnn", "ft"))
    assert first == pair.sentence
    best = max(model.evaluations["test"].roc.auc or 0 for model in card.shortcuts.values())
    assert second == (
        "Every model is better than what can be had without looking at a lung (file-and-grey and border-only: "
        f"AUC up to {best:.3f})."
    )
    assert moved == [f"{name}: {model.moved.sentence}" for name, model in card.models.items() if model.moved]
    assert len(moved) == 2
    assert len(card.verdicts("validation")) == len(card.verdicts("calibration")) == 2


def test_a_model_that_does_not_beat_a_shortcut_is_named(rows: Rows) -> None:
    card = measure(scored(rows, {"cnn": 0.5, "ft": 6.0}), scored(rows, SHORTCUTS), rows=rows, spec=SPEC)
    said = card.verdicts("validation")
    assert not any(sentence.startswith("Every model is better") for sentence in said)
    (named,) = said[1:]
    auc = {name: model.evaluations["validation"].roc.auc for name, model in {**card.models, **card.shortcuts}.items()}
    assert named == (
        f"cnn (AUC {auc['cnn']:.3f}) is not shown to be better than file-and-grey (AUC {auc['file-and-grey']:.3f}) or "
        f"border-only (AUC {auc['border-only']:.3f}): those see no lung."
    )


def test_only_the_shortcuts_that_a_model_does_not_beat_are_held_against_it(rows: Rows) -> None:
    clever = scored(rows, {"file-and-grey": 2.0, "border-only": 0.0})
    card = measure(scored(rows, {"cnn": 2.0, "ft": 8.0}), clever, rows=rows, spec=SPEC)
    (named,) = (sentence for sentence in card.verdicts("validation") if "see no lung" in sentence)
    assert re.fullmatch(
        r"cnn \(AUC 0\.\d{3}\) is not shown to be better than file-and-grey \(AUC 0\.\d{3}\): those see no lung\.",
        named,
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_row_holds_auc_counts_and_the_default_operating_point_with_intervals() -> None:
    labels = [0] * 10 + [1] * 20
    rows = {split: catalog_rows(split, labels) for split in ("validation", "test")}
    models = {
        "cnn": {
            "validation": Predictions.of(rows["validation"], [0.25] * 10 + [0.5] * 20),  # youden: 0.375
            "test": Predictions.of(rows["test"], [0.0] * 7 + [0.45] * 2 + [0.75] + [0.125] + [0.4] * 4 + [0.875] * 15),
        }
    }
    card = measure(models, {}, rows=rows, spec=PLAIN)
    (row,) = card.table("test")
    found = dict(zip(TABLE_HEAD[:5], row[:5], strict=True))
    auc = intervals.delong(models["cnn"]["test"].labels, models["cnn"]["test"].scores)
    assert auc is not None
    assert auc.interval is not None
    assert found == {
        "model": "cnn",
        "AUC": f"{auc.auc:.4f} ({auc.interval.low:.3f}-{auc.interval.high:.3f})",
        "at 0.5: accuracy": "0.8000",  # 24 of 30
        "FN": "5",
        "FP": "1",
    }

    def with_wilson(part: int, whole: int) -> str:
        low, high = proportion_confint(part, whole, method="wilson")
        return f"{part / whole:.4f} ({low:.3f}-{high:.3f})"

    assert row[5:] == [with_wilson(19, 20), with_wilson(7, 10), "1", "3"]
    assert len(row) == len(TABLE_HEAD) == 9


def test_a_perfect_auc_has_no_interval_in_the_table() -> None:
    rows = {"validation": catalog_rows("validation", [0, 0, 1, 1])}
    models = {"cnn": {"validation": Predictions.of(rows["validation"], [0.1, 0.2, 0.8, 0.9])}}
    (row,) = measure(models, {}, rows=rows, spec=PLAIN).table("validation")
    assert row[1] == "1.0000"


def test_the_table_shows_the_shortcuts_after_the_models(card: Scorecard) -> None:
    for split in card.splits:
        assert [row[0] for row in card.table(split)] == list(NAMES)


def leaves(content: Any) -> Iterator[Any]:
    if isinstance(content, (dict, list)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from leaves(value)
    else:
        yield content


@pytest.fixture(scope="module")
def written(card: Scorecard) -> dict[str, Any]:
    """What a run writes: the scorecard with what the pipeline adds."""
    return {
        "note": "SYNTHETIC DATA",
        **card.as_dict(),
        "shift": {"NORMAL": {"auc": 0.5, "names": ["train", "test"]}, "PNEUMONIA": {"auc": None, "names": ("a", "b")}},
        "test_set": {"test_set": "0" * 16, "looks": 3, "first": None},
    }


def test_the_long_table_holds_every_figure_once(written: dict[str, Any]) -> None:
    rows = as_rows(written)
    assert not any(isinstance(value, (Mapping, list, tuple, np.ndarray)) for *_, value in rows)
    keys = [row[:3] for row in rows]
    assert len(set(keys)) == len(keys)
    content = through_json(written)
    for part in ("models", "shortcuts"):
        for splits in content[part].values():
            for figures in splits.values():
                del figures["operating_point"]  # the first of the operating points, which the table has by name
    expected = sorted(map(repr, leaves(content)))
    assert sorted(repr(value) for *_, value in rows) == expected
    assert len(rows) == len(expected)


def test_the_long_table_names_each_figure_by_where_it_stands(card: Scorecard, written: dict[str, Any]) -> None:
    held = {row[:3]: row[3] for row in as_rows(written)}
    figures = card.as_dict()["models"]["cnn"]["test"]
    for metric, value in {
        "auc": figures["auc"],
        "auc_interval.low": figures["auc_interval"]["low"],
        "threshold": 0.5,
        "intervals.accuracy.high": figures["intervals"]["accuracy"]["high"],
        "youden.accuracy": figures["operating_points"]["youden"]["accuracy"],
        "youden.intervals.mcc.low": figures["operating_points"]["youden"]["intervals"]["mcc"]["low"],
        "sensitivity-0.95.threshold": card.models["cnn"].choice.points["sensitivity-0.95"],
        "cost.group_intervals.f1.low": figures["operating_points"]["cost"]["group_intervals"]["f1"]["low"],
        "group_intervals.auc.low": figures["group_intervals"]["auc"]["low"],
        "calibration.slope": figures["calibration"]["slope"],
        "calibration.bins.0.n": figures["calibration"]["bins"][0]["n"],
        "decision_curve.net_benefit.9": figures["decision_curve"]["net_benefit"][9],
        "subgroups.subtype.virus.sensitivity": figures["subgroups"]["subtype"]["virus"]["sensitivity"],
        "conformal.rule.coverage": 0.9,
        "conformal.coverage.value": figures["conformal"]["coverage"]["value"],
    }.items():
        assert held["cnn", "test", metric] == value is not None, metric
    assert ("cnn", "test", "operating_point.accuracy") not in held
    assert held["border-only", "validation", "n"] == 90
    (pair, *_) = card.comparisons["test"]
    assert held["cnn and ft", "test", "verdict"] == pair.verdict
    assert held["cnn and ft", "test", "auc.difference"] == pair.auc.difference
    assert held["cnn and ft", "calibration", "n"] == 80
    moved = card.models["ft"].moved
    assert moved is not None
    assert held["ft", "test", "moved.sensitivity.here"] == moved.sensitivity.here
    assert held["ft", "test", "moved.names.0"] == "calibration"
    assert held["", "", "shift.NORMAL.names.1"] == "test"
    assert held["", "", "shift.PNEUMONIA.auc"] is None
    assert held["", "", "test_set.looks"] == 3
    assert held["", "", "chosen_on"] == "calibration"
    assert held["", "", "note"] == "SYNTHETIC DATA"


def test_a_point_that_did_not_move_and_a_test_that_was_not_made_take_no_more_than_their_row() -> None:
    content = {"moved": {"cnn": None}, "shift": {"reason": "There are none."}, "comparisons": {}, "chosen_on": "test"}
    assert as_rows(content) == [("", "", "shift.reason", "There are none."), ("", "", "chosen_on", "test")]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_no_model_is_refused(rows: Rows) -> None:
    with pytest.raises(DataError) as refusal:
        measure({}, scored(rows, SHORTCUTS), rows=rows, spec=PLAIN)
    assert str(refusal.value) == "There is no model to measure; score at least one on labelled images first."


def test_nothing_to_choose_on_is_refused() -> None:
    rows = all_rows("test")
    with pytest.raises(DataError) as refusal:
        measure(scored(rows, MODELS), {}, rows=rows, spec=PLAIN)
    assert str(refusal.value) == (
        "There is no validation image to choose thresholds on; hold some out, or give the choices."
    )


@pytest.mark.parametrize("spec", [PLAIN, SPEC], ids=["without bootstrap", "with bootstrap"])
def test_a_split_without_an_image_is_refused(spec: EvaluationSpec) -> None:
    rows = all_rows("validation") | {"test": catalog_rows("test", [])}
    with pytest.raises(DataError, match=r"^There are no predictions to evaluate; score at least one labelled image"):
        measure(scored(rows, MODELS), {}, rows=rows, spec=spec)


def test_scores_in_another_order_than_the_rows_are_refused() -> None:
    rows = all_rows("validation", "test")
    models: Scored = scored(rows, MODELS)
    turned = rows | {"test": rows["test"].iloc[::-1].reset_index(drop=True)}
    with pytest.raises(DataError) as refusal:
        measure(models, {}, rows=turned, spec=PLAIN)
    assert str(refusal.value) == (
        "The test scores of cnn are not those of the catalog's test rows in their order; score it on these rows again."
    )


def test_a_model_that_was_not_scored_on_a_split_is_refused() -> None:
    rows = all_rows("validation", "test")
    models = scored(rows, MODELS)
    del models["ft"]["test"]
    with pytest.raises(DataError, match=r"^The test scores of ft are not those of the catalog's test rows in"):
        measure(models, {}, rows=rows, spec=PLAIN)
    baselines = {"border-only": scored(all_rows(), SHORTCUTS)["border-only"]}
    with pytest.raises(DataError, match=r"^The calibration scores of border-only are not those of the catalog"):
        measure({"cnn": models["cnn"]}, baselines, rows=rows, spec=PLAIN)


def test_splits_stand_in_the_order_in_which_they_are_shown(rows: Rows) -> None:
    backwards = dict(reversed(rows.items()))
    card = measure(scored(backwards, MODELS), {}, rows=backwards, spec=PLAIN)
    assert card.splits == list(scorecard.SCORED) == ["validation", "calibration", "test"]
    assert replace(card, models={"cnn": card.models["cnn"]}).splits == card.splits
