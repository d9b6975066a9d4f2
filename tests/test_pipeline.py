"""The main job as a reader of its run directory sees it: every file, every number recomputed, every way to stop it."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import pneumoscope
from pneumoscope import appearance, inference, ledger, metrics, phantom, pipeline, scorecard, shortcut, stages
from pneumoscope import catalog as catalogs
from pneumoscope.catalog import Catalog
from pneumoscope.errors import DataError, RunError, StoppedEarly
from pneumoscope.ledger import Ledger
from pneumoscope.narration import Narration
from pneumoscope.predictions import Predictions
from pneumoscope.runs import Run
from pneumoscope.specs import Spec, TrainSpec
from pneumoscope.store import ImageStore

MODELS = ("cnn", "tl", "ft")
SPLITS = ("validation", "test")
TABLES = {
    "accuracy_per_epoch": ["epoch", "train_accuracy", "val_accuracy"],
    "loss_per_epoch": ["epoch", "train_loss", "val_loss"],
    "validation_yscores": ["y_true", "y_scores", "image_id", "path"],
    "test_yscores": ["y_true", "y_scores", "image_id", "path"],
    "validation_roc": ["fpr", "tpr", "thresholds"],
    "test_roc": ["fpr", "tpr", "thresholds"],
}
DATA_FIGURES = {
    f"{split}_{what}.png"
    for split in ("train", "test")
    for what in ("samples_normal", "samples_pneumonia", "data_dist_barplot", "data_dist_pieplot")
}
MODEL_FIGURES = {
    f"{model}_{what}.png"
    for model in MODELS
    for what in ("learning_curve_accuracy", "learning_curve_loss", "roc_curve_validation", "roc_curve_testing")
}
SHORTCUTS = ("file-and-grey", "border-only")
POINTS = ["youden", "sensitivity-0.95", "cost"]
FIGURES = {"n", "loss", "accuracy", "auc", "false_negatives", "false_positives", "sensitivity", "specificity"}
AT_THRESHOLD = FIGURES - {"n", "loss", "auc"}


@dataclass(frozen=True)
class Finished:
    """A run that ended: where it is, what it learned from, what it said."""

    folder: Path
    data: Path
    stdout: str
    stderr: str

    def table(self, model: str, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / "tables" / f"{model}_{name}.csv")

    def figures(self, model: str, split: str) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.folder / "metrics.json")["models"][model][split]
        return found

    @property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.folder / "manifest.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read JSON as strictly as other people's readers do: NaN and infinity are no JSON."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{path} holds {text}, which is no JSON")

    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return content


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def made_under(folder: Path) -> set[str]:
    """All files but those of locks, which stay where they are for ever."""
    return {name for name in files_under(folder) if not name.startswith("locks/")}


def spec_of(*settings: str, preset: str = "smoke") -> Spec:
    return Spec.preset_named(preset).with_overrides(settings)


def scores_of(folder: Path) -> dict[str, list[float]]:
    return {path.name: list(pd.read_csv(path)["y_scores"]) for path in sorted(folder.glob("tables/*_yscores.csv"))}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom.write_dataset(tmp_path_factory.mktemp("data") / "chest", n_train=44, n_test=16, size_px=96)


@pytest.fixture(scope="module")
def smoke(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The smoke preset with all three approaches, as a user starts it, in a narrow window."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    environment = os.environ | {"PNEUMOSCOPE_CACHE": str(folder.parent / "cache"), "COLUMNS": "40"}
    command = [sys.executable, "-m", "pneumoscope", "run", str(data), "-o", str(folder), "--preset", "smoke"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Finished(folder, data, done.stdout, done.stderr)


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_run_leaves_exactly_the_files_of_the_contract(smoke: Finished) -> None:
    top = {"spec.toml", "manifest.json", "catalog.csv", "audit.json", "run.log", "metrics.json", "metrics.csv"}
    models = {f"models/{model}.keras" for model in MODELS}
    tables = {f"tables/{model}_{table}.csv" for model in MODELS for table in TABLES}
    figures = {f"figures/{name}" for name in DATA_FIGURES | MODEL_FIGURES}
    if read_json(smoke.folder / "audit.json")["pairs"]:
        figures.add("figures/near_duplicates.png")
    stages = {f"stages/{name}.json" for name in ("images", "features", *(f"train-{m}" for m in MODELS), "evaluate")}
    top |= {"report.html", "model_card.md"}
    made = made_under(smoke.folder)
    gallery = {name for name in made if name.startswith("gallery/")}
    assert "gallery/gallery.json" in gallery
    assert all(re.fullmatch(r"gallery/[\w-]+\.(json|jpg)", name) for name in gallery)
    assert made - gallery == top | models | tables | figures | stages
    assert not (smoke.folder / "checkpoints").exists()


@pytest.mark.parametrize("model", MODELS)
def test_tables_have_the_columns_of_the_contract(smoke: Finished, model: str) -> None:
    for name, columns in TABLES.items():
        table = smoke.table(model, name)
        assert list(table.columns) == columns, name
        assert len(table), name
        assert np.isfinite(table.select_dtypes("number").to_numpy()).all(), name
    for kind in ("accuracy", "loss"):
        assert list(smoke.table(model, f"{kind}_per_epoch")["epoch"]) == [1]


def test_metrics_have_the_keys_of_the_contract_for_validation_and_test(smoke: Finished) -> None:
    metrics = read_json(smoke.folder / "metrics.json")
    assert metrics["schema_version"] == 1
    assert list(metrics["models"]) == list(MODELS)
    for model in MODELS:
        assert list(metrics["models"][model]) == list(SPLITS)
        for figures in metrics["models"][model].values():
            assert set(figures) >= FIGURES | {"operating_point", "operating_points"}
            assert figures["threshold"] == 0.5
            assert list(figures["operating_points"]) == POINTS
            assert figures["operating_point"] == figures["operating_points"]["youden"]
            for name, point in figures["operating_points"].items():
                assert set(point) >= AT_THRESHOLD | {"name", "threshold"}
                assert point["name"] == name


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("model", MODELS)
def test_every_figure_follows_from_the_table_of_scores(smoke: Finished, model: str, split: str) -> None:
    figures, table = smoke.figures(model, split), smoke.table(model, f"{split}_yscores")
    sick = table["y_true"] == 1
    assert (figures["n"], figures["n_positive"], figures["n_negative"]) == (len(table), sick.sum(), (~sick).sum())
    assert figures["auc"] == pytest.approx(roc_auc_score(table["y_true"], table["y_scores"]), abs=1e-12)
    of_truth = table["y_scores"].where(sick, 1 - table["y_scores"])
    assert figures["loss"] == pytest.approx(-np.log(of_truth).mean(), rel=1e-6)
    for found in (figures, *figures["operating_points"].values()):
        called = table["y_scores"] > found["threshold"]
        counts = pd.crosstab(table["y_true"], called).reindex(index=[0, 1], columns=[False, True], fill_value=0)
        assert found["true_negatives"] == counts.loc[0, False]
        assert found["false_positives"] == counts.loc[0, True]
        assert found["false_negatives"] == counts.loc[1, False]
        assert found["true_positives"] == counts.loc[1, True]
        assert found["accuracy"] == pytest.approx((called == sick).mean())
        assert found["sensitivity"] == pytest.approx(called[sick].mean())
        assert found["specificity"] == pytest.approx((~called[~sick]).mean())


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("model", MODELS)
def test_each_row_of_a_roc_table_is_what_its_threshold_gives(smoke: Finished, model: str, split: str) -> None:
    roc, table = smoke.table(model, f"{split}_roc"), smoke.table(model, f"{split}_yscores")
    assert np.isfinite(roc.to_numpy()).all()
    assert tuple(roc.iloc[0][["fpr", "tpr"]]) == (0, 0)
    assert tuple(roc.iloc[-1][["fpr", "tpr"]]) == (1, 1)
    assert (roc["thresholds"].diff().dropna() < 0).all()
    for row in roc.itertuples():
        called = table["y_scores"] > row.thresholds
        assert called[table["y_true"] == 0].mean() == pytest.approx(row.fpr)
        assert called[table["y_true"] == 1].mean() == pytest.approx(row.tpr)


@pytest.mark.parametrize("model", MODELS)
def test_the_operating_point_is_the_best_on_validation_and_carried_to_test_unchanged(
    smoke: Finished, model: str
) -> None:
    validation, test = (smoke.figures(model, split)["operating_point"] for split in SPLITS)
    assert validation["name"] == test["name"] == "youden"
    assert validation["threshold"] == test["threshold"]
    table = smoke.table(model, "validation_yscores")
    scores = np.unique(table["y_scores"])
    between = [(low + high) / 2 for low, high in itertools.pairwise([-1.0, *scores, 1.0])]

    def youden(threshold: float) -> float:
        called = table["y_scores"] > threshold
        return float(called[table["y_true"] == 1].mean() - called[table["y_true"] == 0].mean())

    assert youden(validation["threshold"]) == pytest.approx(max(youden(threshold) for threshold in between))
    assert validation["sensitivity"] + validation["specificity"] - 1 == pytest.approx(youden(validation["threshold"]))
    assert not np.isin(validation["threshold"], scores)  # midway between two, so that no score stands on the line


def test_the_long_table_holds_the_figures_of_the_json(smoke: Finished) -> None:
    content = read_json(smoke.folder / "metrics.json")
    assert content.pop("schema_version") == 1
    long = pd.read_csv(smoke.folder / "metrics.csv", dtype=str, keep_default_na=False)
    assert list(long.columns) == ["model", "split", "metric", "value"]
    assert not long.duplicated(["model", "split", "metric"]).any()
    rows = scorecard.as_rows(content)
    assert list(long[["model", "split", "metric"]].itertuples(index=False, name=None)) == [row[:3] for row in rows]
    for text, (*_, value) in zip(long["value"], rows, strict=True):
        assert text == ("" if value is None else str(value)) or float(text) == value
    held = long.set_index(["model", "split", "metric"])["value"]
    for model, split in itertools.product(MODELS, SPLITS):
        figures = smoke.figures(model, split)
        assert {name: float(held[model, split, name]) for name in FIGURES} == {name: figures[name] for name in FIGURES}
        point = figures["operating_point"]
        assert {name: float(held[model, split, f"youden.{name}"]) for name in AT_THRESHOLD} == {
            name: point[name] for name in AT_THRESHOLD
        }


def own_images(smoke: Finished) -> tuple[Catalog, ImageStore]:
    catalog = Catalog.read(smoke.folder / "catalog.csv", root=smoke.data)
    return catalog, ImageStore.pack(catalog, size_px=Spec.from_toml(smoke.folder / "spec.toml").image.size_px)


def test_what_can_be_had_without_a_lung_stands_beside_the_models(smoke: Finished) -> None:
    catalog, store = own_images(smoke)
    scored = {
        "file-and-grey": shortcut.baseline(catalog.rows(), measured=appearance.look(catalog, store).measures),
        "border-only": shortcut.border_probe(catalog.rows(), store=store),
    }
    content = read_json(smoke.folder / "metrics.json")["shortcuts"]
    assert list(content) == list(SHORTCUTS) == list(scored)
    for name, split in itertools.product(SHORTCUTS, SPLITS):
        part = scored[name].of_split(split)
        points = metrics.choose_operating_points(scored[name].of_split("validation"))
        expected = metrics.evaluate(part, operating_points=points).as_dict()
        found = content[name][split]
        assert {key: found[key] for key in FIGURES} == pytest.approx({key: expected[key] for key in FIGURES})
        assert {at: point["threshold"] for at, point in found["operating_points"].items()} == pytest.approx(points)


def test_every_model_is_compared_with_every_other_and_with_what_sees_no_lung(smoke: Finished) -> None:
    content = read_json(smoke.folder / "metrics.json")
    assert list(content["comparisons"]) == list(SPLITS)
    for split, compared in content["comparisons"].items():
        pairs = itertools.combinations((*MODELS, *SHORTCUTS), 2)
        assert [(one["first"], one["second"]) for one in compared] == list(pairs)
        for one in compared:
            areas = [(content["models"] | content["shortcuts"])[one[key]][split]["auc"] for key in ("first", "second")]
            assert [one["auc"]["first"], one["auc"]["second"]] == pytest.approx(areas)
            assert one["verdict"] in ("better", "worse", "cannot be told apart at this n")
            assert one["comparisons"] == 10


def test_the_shift_is_told_by_label_with_its_numbers_or_a_reason(smoke: Finished) -> None:
    counts = Catalog.read(smoke.folder / "catalog.csv", root=smoke.data).counts()
    found = read_json(smoke.folder / "metrics.json")["shift"]
    assert list(found) == ["NORMAL", "PNEUMONIA"]
    for label, one in found.items():
        assert one["names"] == ["train", "test"]
        assert one["n"] == [counts.loc["train", label], counts.loc["test", label]]
        assert (one["p_value"] is None) == (one["auc"] is None) == (one["reason"] is not None)
        assert (one["verdict"] == "not tested") == (one["p_value"] is None)
    assert found["PNEUMONIA"]["p_value"] is not None  # eight groups or more in either set


def test_every_look_at_the_test_images_is_in_the_ledger_and_said(smoke: Finished) -> None:
    rows = Catalog.read(smoke.folder / "catalog.csv", root=smoke.data).rows("test")
    test_set = ledger.test_set_of(rows["image_id"].tolist())
    book = Ledger(smoke.folder.parent / "cache" / "ledger.jsonl")
    looks = book.looks(test_set)
    assert [look.model for look in looks] == list(MODELS)
    for look in looks:
        figures = smoke.figures(look.model, "test")
        assert (look.n, look.auc, look.accuracy) == (figures["n"], figures["auc"], figures["accuracy"])
        model = (smoke.folder / "models" / f"{look.model}.keras").read_bytes()
        assert look.model_hash == sha256(model).hexdigest()
        assert look.spec_hash == smoke.manifest["spec_hash"]
    found = read_json(smoke.folder / "metrics.json")["test_set"]
    assert found == book.summary(test_set)
    assert (found["looks"], found["models"], found["specs"]) == (3, 3, 1)


def test_one_table_per_split_is_shown_with_the_verdicts_under_it(smoke: Finished) -> None:
    content, said = read_json(smoke.folder / "metrics.json"), smoke.stdout.splitlines()
    for split in SPLITS:
        n = smoke.figures("cnn", split)["n"]
        at = said.index(f"Results on {split}, {n} images - SYNTHETIC DATA")
        heads = re.split(r" {2,}", said[at + 1])
        assert heads == list(scorecard.TABLE_HEAD)
        cells = [re.split(r" {2,}", line) for line in said[at + 2 : at + 2 + len(MODELS) + len(SHORTCUTS)]]
        assert [row[0] for row in cells] == [*MODELS, *SHORTCUTS]
        for model, row in zip(MODELS, cells, strict=False):
            figures = smoke.figures(model, split)
            low, high = (figures["auc_interval"][end] for end in ("low", "high"))
            assert row[1] == f"{figures['auc']:.4f} ({low:.3f}-{high:.3f})"
            assert row[2:5] == [
                f"{figures['accuracy']:.4f}", str(figures["false_negatives"]), str(figures["false_positives"])
            ]  # fmt: skip
            assert row[-2:] == [str(figures["operating_point"][f"false_{kind}s"]) for kind in ("negative", "positive")]
        under = said[at + 2 + len(cells) :]
        among = [one["sentence"] for one in content["comparisons"][split] if {one["first"], one["second"]} <= {*MODELS}]
        assert under[: len(among)] == [f"  {sentence}" for sentence in among]
    for model in MODELS:
        assert f"  {model}: {content['moved'][model]['sentence']}" in said
    for one in (*content["shift"].values(), content["not_assessable"], content["test_set"]):
        assert f"  {one['sentence']}" in said
    assert any("without looking at a lung" in line or "those see no lung" in line for line in said)


def test_what_flatters_and_what_it_costs_is_said(smoke: Finished) -> None:
    said = smoke.stdout.splitlines()
    assert read_json(smoke.folder / "metrics.json")["chosen_on"] == "validation"
    assert (
        "  Thresholds and temperature come from the validation images, which also steered the training; "
        "split.calibration keeps images apart for them."
    ) in said
    (cost,) = (at for at, line in enumerate(said) if line.startswith("  Bootstrap by group, 100 resamples: about "))
    assert said.index("Measuring ...") < cost < said.index(next(line for line in said if "Measuring: done" in line))


def test_the_audit_is_said_and_kept_before_any_training(smoke: Finished) -> None:
    content, said = read_json(smoke.folder / "audit.json"), smoke.stdout.splitlines()
    assert content["passed"] is True
    assert content["n_images"] == 60
    at = [said.index(f"  {finding['name']}: {finding['sentence']}") for finding in content["findings"]]
    assert at
    assert max(at) < said.index("Training cnn (CNN from scratch) ...")


def test_the_catalog_keeps_the_test_folder_as_test_and_cuts_no_group(smoke: Finished) -> None:
    table = pd.read_csv(smoke.folder / "catalog.csv", dtype=str, keep_default_na=False)
    assert list(table.columns) == list(catalogs.COLUMNS)
    on_disk = {path.relative_to(smoke.data).as_posix() for path in smoke.data.rglob("*.jpeg")}
    assert set(table["path"]) == on_disk
    assert set(table.loc[table["split"] == "test", "path"]) == {name for name in on_disk if name.startswith("test/")}
    assert set(table["split"]) == {"train", "validation", "test"}
    assert (table.groupby("group")["split"].nunique() == 1).all()
    assert set(table["status"]) == {"ok"}


@pytest.mark.parametrize("model", MODELS)
def test_scores_are_of_the_catalogs_images_each_once(smoke: Finished, model: str) -> None:
    table = pd.read_csv(smoke.folder / "catalog.csv", dtype=str, keep_default_na=False)
    for split in SPLITS:
        scored = smoke.table(model, f"{split}_yscores")
        wanted = table[table["split"] == split]
        assert list(scored["path"]) == list(wanted["path"])
        assert list(scored["y_true"]) == list(wanted["label"].astype(int))
        for row in scored.itertuples():
            assert sha256((smoke.data / str(row.path)).read_bytes()).hexdigest()[:16] == row.image_id
            assert row.y_true == ("PNEUMONIA" in str(row.path))
        assert scored["y_scores"].between(0, 1).all()


def test_the_saved_models_give_the_tables_scores(smoke: Finished) -> None:
    spec = Spec.from_toml(smoke.folder / "spec.toml")
    catalog = Catalog.read(smoke.folder / "catalog.csv", root=smoke.data)
    store = ImageStore.pack(catalog, size_px=spec.image.size_px)
    for model in MODELS:
        network = inference.load_model(smoke.folder / "models" / f"{model}.keras", approach=model, spec=spec)
        scored = inference.score(network, store, catalog.rows("test")).scores
        assert scored == pytest.approx(smoke.table(model, "test_yscores")["y_scores"].to_numpy(), abs=1e-6)


def test_the_learning_curve_ends_where_the_cnn_is_measured(smoke: Finished) -> None:
    last = smoke.table("cnn", "accuracy_per_epoch").iloc[-1]
    assert last["val_accuracy"] == pytest.approx(smoke.figures("cnn", "validation")["accuracy"])
    last = smoke.table("cnn", "loss_per_epoch").iloc[-1]
    assert last["val_loss"] == pytest.approx(smoke.figures("cnn", "validation")["loss"], rel=1e-5)


def test_every_picture_opens_is_large_and_not_blank(smoke: Finished) -> None:
    for name in sorted(DATA_FIGURES | MODEL_FIGURES):
        with Image.open(smoke.folder / "figures" / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 600, (name, picture.size)
            grey = np.asarray(picture.convert("L"))
        assert grey.std() > 5, name
        assert len(np.unique(grey)) > 50, name


def test_the_spec_file_gives_the_spec_back(smoke: Finished) -> None:
    spec = Spec.from_toml(smoke.folder / "spec.toml")
    assert spec == Spec.preset_named("smoke")
    assert smoke.manifest["spec_hash"] == spec.hash


def test_the_manifest_says_finished_on_what_and_from_what(smoke: Finished) -> None:
    import keras  # heavy: loaded by the tests that need it

    manifest = smoke.manifest
    assert manifest["schema_version"] == 1
    assert manifest["status"] == "finished"
    assert manifest["error"] is None
    assert manifest["data"] == str(smoke.data)
    split = Catalog.scan(smoke.data).split(spec_of().split, seed=42)
    assert manifest["data_hash"] == split.content_hash
    machine = manifest["machine"]
    assert machine["versions"]["python"] == sys.version.split()[0]
    assert machine["versions"]["keras"] == keras.__version__
    assert machine["backend"] in machine["versions"]
    assert machine["devices"]
    assert machine["threads"] >= 1
    took = datetime.fromisoformat(manifest["finished"]) - datetime.fromisoformat(manifest["started"])
    assert 0 < manifest["seconds"] == pytest.approx(took.total_seconds(), abs=1.5)


def test_everything_said_is_in_the_log_with_its_time(smoke: Finished) -> None:
    lines = [line.partition(" ") for line in (smoke.folder / "run.log").read_text(encoding="utf-8").splitlines()]
    assert all(datetime.fromisoformat(time).tzinfo for time, _, _ in lines)
    assert [text.rstrip() for _, _, text in lines] == [line.rstrip() for line in smoke.stdout.splitlines()]


def test_synthetic_images_are_called_so_everywhere(smoke: Finished) -> None:
    assert read_json(smoke.folder / "metrics.json")["note"] == "SYNTHETIC DATA"
    assert smoke.manifest["note"] == "SYNTHETIC DATA"
    said = smoke.stdout.splitlines()
    assert "Warning: SYNTHETIC DATA: the figures say nothing about real radiographs." in said
    assert "Results on test, 16 images - SYNTHETIC DATA" in said
    assert said[-1] == "Research use only, not a medical device. SYNTHETIC DATA."
    assert "SYNTHETIC DATA" in (smoke.folder / "run.log").read_text(encoding="utf-8")


def test_off_a_terminal_a_run_is_quiet_plain_and_unwrapped(smoke: Finished) -> None:
    assert smoke.stderr == ""
    assert smoke.stdout.isascii()
    assert not {"\x1b", "\r", "\b"} & set(smoke.stdout)
    assert max(len(line) for line in smoke.stdout.splitlines()) > 100  # in a window of 40
    for model in MODELS:
        assert sum(line.startswith(f"  {model} 1/1  loss") for line in smoke.stdout.splitlines()) == 1
    assert not any(f"{model} test:" in smoke.stdout for model in MODELS)  # a short pass needs no progress line


# --- what must be said -----------------------------------------------------------------------------------------------


def test_random_weights_are_named_in_every_output(data: Path, tmp_path: Path) -> None:
    spec = spec_of("backbone.weights=none", "models=tl", "image.size_px=32")
    stream = io.StringIO()
    run = pipeline.run(spec, data, tmp_path / "run", narration=Narration("plain", stream=stream))
    note = "SYNTHETIC DATA, tl on RANDOM WEIGHTS"
    assert read_json(run.metrics_path)["note"] == note
    assert read_json(run.manifest_path)["note"] == note
    assert f"Results on test, 16 images - {note}" in stream.getvalue()
    assert f"Warning: {note}: the figures say nothing about real radiographs." in stream.getvalue()
    assert note in run.log_path.read_text(encoding="utf-8")


# --- what is refused before any training -----------------------------------------------------------------------------


def first_of(folder: Path) -> Path:
    return min(folder.iterdir())


def leak_an_image(given: Path) -> None:
    shutil.copy(first_of(given / "train" / "PNEUMONIA"), given / "test" / "PNEUMONIA" / "person9000_virus_1.jpeg")


def cut_a_patient(given: Path) -> None:
    name = first_of(given / "train" / "PNEUMONIA").stem
    grey = np.random.default_rng(0).integers(0, 255, (80, 96), dtype=np.uint8)
    Image.fromarray(grey).save(given / "test" / "PNEUMONIA" / f"{name}9.jpeg")


def label_twice(given: Path) -> None:
    shutil.copy(first_of(given / "train" / "PNEUMONIA"), given / "train" / "NORMAL" / "IM-9000-0001.jpeg")


@pytest.mark.parametrize(
    ("plant", "names"),
    [
        (leak_an_image, ["content-across-test", "group-across-test"]),
        (cut_a_patient, ["group-across-test"]),
        (label_twice, ["two-labels"]),
    ],
)
def test_a_planted_fault_is_refused_before_any_training(
    data: Path, tmp_path: Path, plant: Callable[[Path], None], names: list[str]
) -> None:
    given, folder = shutil.copytree(data, tmp_path / "set"), tmp_path / "run"
    plant(given)

    def trained() -> bool:
        raise AssertionError("a step of training began")

    with pytest.raises(DataError) as refusal:
        pipeline.run(spec_of("models=cnn", "image.size_px=32"), given, folder, stop=trained)
    assert refusal.value.exit_status == 1
    found = read_json(folder / "audit.json")
    errors = [finding for finding in found["findings"] if finding["severity"] == "error"]
    assert [finding["name"] for finding in errors] == names
    assert str(refusal.value) == "The audit refuses these data. " + " ".join(
        f"{finding['name']}: {finding['sentence']}" for finding in errors
    )
    manifest = read_json(folder / "manifest.json")
    assert (manifest["status"], manifest["error"]) == ("failed", str(refusal.value))
    made = {"manifest.json", "audit.json", "run.log", "stages/images.json"}
    assert made_under(folder) - {"figures/near_duplicates.png"} == made


# --- stopped, failed, taken up again ---------------------------------------------------------------------------------


def stopping_after(calls: int) -> Callable[[], bool]:
    counter = itertools.count(1)
    return lambda: next(counter) > calls


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of cnn and tl that was stopped after the first of the three steps that tl takes in its epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PNEUMOSCOPE_CACHE", str(folder / "cache"))
        message = "^Stopped in epoch 1, step 1, on request; run the same command with --resume.$"
        with pytest.raises(StoppedEarly, match=message):
            pipeline.run(spec_of("models=cnn,tl"), data, folder / "run", stop=stopping_after(4))
    return folder / "run"


@pytest.fixture
def stopped_copy(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def test_a_stopped_run_says_so_and_keeps_what_was_done(stopped: Path) -> None:
    manifest = read_json(stopped / "manifest.json")
    assert manifest["status"] == "stopped"
    assert manifest["error"] == "Stopped in epoch 1, step 1, on request; run the same command with --resume."
    assert (stopped / "models" / "cnn.keras").exists()
    assert not (stopped / "models" / "tl.keras").exists()
    assert (stopped / "checkpoints" / "tl.npz").exists()
    assert not (stopped / "metrics.json").exists()


def test_a_resumed_run_trains_only_what_is_left_and_ends_with_the_same_scores(
    smoke: Finished, data: Path, stopped_copy: Path
) -> None:
    trained = (stopped_copy / "models" / "cnn.keras").stat().st_mtime_ns
    said = len((stopped_copy / "run.log").read_text(encoding="utf-8"))
    pipeline.run(spec_of("models=cnn,tl"), data, stopped_copy, resume=True)
    assert (stopped_copy / "models" / "cnn.keras").stat().st_mtime_ns == trained
    log = (stopped_copy / "run.log").read_text(encoding="utf-8")[said:]
    assert "Training tl" in log
    assert "Training cnn" not in log
    assert read_json(stopped_copy / "manifest.json")["status"] == "finished"
    assert not (stopped_copy / "checkpoints").exists()
    resumed, alone = scores_of(stopped_copy), scores_of(smoke.folder)
    assert set(resumed) == {f"{model}_{split}_yscores.csv" for model in ("cnn", "tl") for split in SPLITS}
    for name, scores in resumed.items():
        assert scores == pytest.approx(alone[name], abs=1e-6), name


def test_what_was_stopped_is_not_judged_beside_the_others(data: Path, stopped_copy: Path) -> None:
    job = stages.Job(Run.open(stopped_copy), spec_of("models=cnn,tl"), data, Narration("silent"))
    with pytest.raises(StoppedEarly, match=r"^tl was stopped before the end; run the same command with --resume\.$"):
        job.perform("evaluate")  # as Slurm does, whatever became of the jobs before it
    assert not (stopped_copy / "metrics.json").exists()


def everything_in(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(files_under(folder))}


def test_going_on_with_another_setting_is_refused_and_changes_nothing(data: Path, stopped_copy: Path) -> None:
    before = everything_in(stopped_copy)
    with pytest.raises(RunError) as refusal:
        pipeline.run(spec_of("models=cnn,tl", "train.epochs=2", "seed=1"), data, stopped_copy, resume=True)
    assert str(refusal.value) == (
        f"{stopped_copy} was begun with another configuration (different: seed, train); "
        "use the same one to go on, or choose a new folder with -o."
    )
    assert everything_in(stopped_copy) == before


def test_going_on_with_other_images_is_refused_and_keeps_what_was_done(
    data: Path, stopped_copy: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    gone = min(other.rglob("train/PNEUMONIA/*.jpeg"))
    gone.unlink()
    before = everything_in(stopped_copy)
    with pytest.raises(RunError) as refusal:
        pipeline.run(spec_of("models=cnn,tl"), other, stopped_copy, resume=True)
    assert str(refusal.value).startswith(
        f"{stopped_copy} was begun with other images than {other} holds now: 1 removed ({gone.relative_to(other)})"
    )
    assert str(refusal.value).endswith("; give the same ones to go on, or choose a new folder with -o.")
    after = everything_in(stopped_copy)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name for name in changed if not name.startswith("locks/")} == {
        "manifest.json", "run.log", "stages/images.json"
    }  # fmt: skip
    manifest = read_json(stopped_copy / "manifest.json")
    assert manifest["data"] == str(data)
    assert manifest["error"] == str(refusal.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"machine": {"backend": "jax"}},
            "was begun with the backend jax, and this is tensorflow; set KERAS_BACKEND=jax",
        ),
        ({"weights_hash": "0" * 64}, "was begun with other pretrained weights than imagenet holds now; put the same"),
    ],
)
def test_going_on_with_another_library_or_other_weights_is_refused(
    data: Path, stopped_copy: Path, change: dict[str, Any], sentence: str
) -> None:
    Run.open(stopped_copy).update_manifest(**change)
    with pytest.raises(RunError, match=re.escape(sentence)):
        pipeline.run(spec_of("models=cnn,tl"), data, stopped_copy, resume=True)


def test_a_failed_run_says_why_and_starts_again_once_that_is_mended(tmp_path: Path, data: Path) -> None:
    given, folder = tmp_path / "images", tmp_path / "run"
    given.mkdir()
    with pytest.raises(DataError) as failure:
        pipeline.run(spec_of("models=cnn"), given, folder)
    manifest = read_json(folder / "manifest.json")
    assert manifest["status"] == "failed"
    assert manifest["error"] == str(failure.value)
    assert str(given) in manifest["error"]
    shutil.copytree(data, given, dirs_exist_ok=True)
    with pytest.raises(StoppedEarly):  # as far as training: the data were taken
        pipeline.run(spec_of("models=cnn"), given, folder, resume=True, stop=lambda: True)


def test_an_interruption_from_the_keyboard_counts_as_stopped(tmp_path: Path, data: Path) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(spec_of("models=cnn"), data, tmp_path / "run", stop=interrupt)
    manifest = read_json(tmp_path / "run" / "manifest.json")
    assert (manifest["status"], manifest["error"]) == ("stopped", "KeyboardInterrupt")


def test_a_finished_run_is_taken_up_without_a_change(smoke: Finished, data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in smoke.folder.rglob("*") if path.is_file()}
    stream = io.StringIO()
    run = pipeline.run(spec_of(), data, smoke.folder, resume=True, narration=Narration("plain", stream=stream))
    assert run.folder == smoke.folder
    assert stream.getvalue() == f"{smoke.folder} is finished already.\n"
    assert {path: path.stat().st_mtime_ns for path in smoke.folder.rglob("*") if path.is_file()} == before


# --- images kept apart for choices; no backbone here ------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A cnn with a calibration part, on a machine that lacks the backbone's weights, which a cnn does not need."""
    folder, stream = tmp_path_factory.mktemp("calibrated"), io.StringIO()
    settings = ("models=cnn", "image.size_px=32", "split.calibration=0.5", f"backbone.weights={folder / 'none.h5'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PNEUMOSCOPE_CACHE", str(folder / "cache"))
        pipeline.run(spec_of(*settings), data, folder / "run", narration=Narration("plain", stream=stream))
    return Finished(folder / "run", data, stream.getvalue(), "")


@pytest.fixture
def calibrated_copy(calibrated: Finished, own_cache: Path, tmp_path: Path) -> Run:
    """A copy of that run, with a copy of the ledger that its looks are in."""
    own_cache.mkdir()
    shutil.copy(calibrated.folder.parent / "cache" / "ledger.jsonl", own_cache)
    return Run.open(shutil.copytree(calibrated.folder, tmp_path / "run"))


def test_choices_come_from_the_part_kept_apart_for_them(calibrated: Finished) -> None:
    content = read_json(calibrated.folder / "metrics.json")
    assert content["chosen_on"] == "calibration"
    assert list(content["models"]["cnn"]) == ["validation", "calibration", "test"]
    table = calibrated.table("cnn", "calibration_yscores")
    rows = table.rename(columns={"y_true": "label"}).assign(split="calibration")
    choice = scorecard.Choice.on(Predictions.of(rows, rows["y_scores"]), spec=spec_of().evaluation)
    for split in ("validation", "calibration", "test"):
        found = scorecard.Choice.of_dict(calibrated.figures("cnn", split))
        assert found.points == pytest.approx(choice.points, abs=1e-6)
        assert found.conformal == choice.conformal
    assert (calibrated.folder / "figures" / "cnn_roc_curve_calibration.png").exists()
    assert "Thresholds and temperature come from the validation images" not in calibrated.stdout


def test_without_the_backbone_the_shift_has_a_reason_and_the_run_ends_well(calibrated: Finished) -> None:
    assert calibrated.manifest["status"] == "finished"
    content = read_json(calibrated.folder / "metrics.json")
    assert list(content["shift"]) == ["reason"]
    assert "none.h5" in content["shift"]["reason"]
    assert f"  {content['shift']['reason']}" in calibrated.stdout.splitlines()
    assert "not_assessable" not in content


def test_other_images_are_measured_with_the_choices_of_the_run(
    calibrated: Finished, calibrated_copy: Run, data: Path
) -> None:
    run = calibrated_copy
    before = run.metrics_path.read_bytes()
    path = pipeline.evaluate_run(run, data=data / "test")  # the very images that the run was tested on
    content = read_json(path)
    assert path.name == "metrics.json"
    assert path.parent.parent == run.folder / "evaluations"
    assert re.fullmatch("test-[0-9a-f]{8}", path.parent.name)
    assert run.metrics_path.read_bytes() == before
    assert content["chosen_on"] == "calibration"
    assert list(content["models"]["cnn"]) == ["test"]
    again, first = content["models"]["cnn"]["test"], calibrated.figures("cnn", "test")
    assert scorecard.Choice.of_dict(again) == scorecard.Choice.of_dict(first)
    assert "Test on external data: 1 set(s)" in run.card_path.read_text(encoding="utf-8")
    for key in ("n", "accuracy", "false_negatives", "false_positives", "operating_points", "subgroups"):
        assert again[key] == first[key]
    assert again["loss"] == pytest.approx(first["loss"])
    assert content["shortcuts"] == {}
    assert content["test_set"]["test_set"] == read_json(run.metrics_path)["test_set"]["test_set"]
    looks = Ledger.in_cache().looks(content["test_set"]["test_set"])
    assert [(look.model, look.auc) for look in looks] == [("cnn", first["auc"]), ("cnn", again["auc"])]
    assert (content["test_set"]["looks"], content["test_set"]["models"]) == (2, 1)


def test_images_that_the_models_were_made_with_are_no_test_of_them(
    calibrated_copy: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pipeline.evaluate_run(calibrated_copy, data=data, narration=Narration("plain"))  # all that it was made with
    assert read_json(path)["models"]["cnn"]["test"]["n"] == 16  # its own test images
    said = "44 of 60 images are left out: the run's models were trained, steered or calibrated with them."
    assert said in "".join(capsys.readouterr())
    again = Path(shutil.copytree(data / "train", tmp_path / "again"))
    with pytest.raises(DataError) as refusal:
        pipeline.evaluate_run(calibrated_copy, data=again)
    assert str(refusal.value) == (
        f"Every usable image of {again} (44 in all) was used to train, steer or calibrate the models of "
        f"{calibrated_copy.folder}; give images that had no part in that run."
    )


def test_too_little_memory_to_score_is_told(calibrated_copy: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    job = stages.Job(calibrated_copy, calibrated_copy.read_spec(), data, Narration("silent"))
    monkeypatch.setattr(inference, "score", exhausted)
    for scoring in (
        lambda: job.perform("evaluate"),
        lambda: pipeline.evaluate_run(calibrated_copy),
        lambda: pipeline.evaluate_run(calibrated_copy, data=data / "test"),
    ):
        with pytest.raises(RunError, match=r"^There is not enough memory to score and measure the images; choose a "):
            scoring()


def test_a_set_without_a_readable_image_measures_nothing(calibrated_copy: Run, tmp_path: Path) -> None:
    for label in ("NORMAL", "PNEUMONIA"):
        (tmp_path / "broken" / label).mkdir(parents=True)
        (tmp_path / "broken" / label / "a.jpeg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(DataError, match=r"^No image in .* can be used \(damaged: 2\); "):
        pipeline.evaluate_run(calibrated_copy, data=tmp_path / "broken")
    assert not (calibrated_copy.folder / "evaluations").exists()


def test_a_fold_is_judged_by_what_it_held_out_and_looks_at_the_test_images_only_when_asked(
    data: Path, tmp_path: Path
) -> None:
    settings = ("models=cnn", "image.size_px=32", "evaluation.bootstrap=0", "split.folds=2")
    run = pipeline.run(spec_of(*settings, f"backbone.weights={tmp_path / 'none.h5'}"), data, tmp_path / "run")
    content = read_json(run.metrics_path)
    assert list(content["models"]["cnn"]) == ["validation"]
    assert "test_set" not in content
    assert not Ledger.in_cache().path.exists()
    content = read_json(pipeline.evaluate_run(run, data=data / "test"))
    assert content["models"]["cnn"]["test"]["n"] == 16
    assert content["test_set"]["looks"] == 1


def test_an_image_that_proves_damaged_has_nothing_packed_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PNEUMOSCOPE_CACHE", str(tmp_path / "cache"))
    given = shutil.copytree(data, tmp_path / "set")
    first = next(iter(sorted((given / "train" / "NORMAL").iterdir())))
    first.write_bytes(first.read_bytes()[:-200])
    run = pipeline.run(spec_of("models=cnn", "image.size_px=32", "evaluation.bootstrap=0"), given, tmp_path / "run")
    pipeline.evaluate_run(run)
    assert len(list((tmp_path / "cache").glob("images-*"))) == 1
    assert "truncated" in set(Catalog.read(run.catalog_path, root=given).table["status"])


# --- evaluated again -------------------------------------------------------------------------------------------------


@pytest.fixture
def with_cnn_only(smoke: Finished, tmp_path: Path) -> Run:
    """A copy of the smoke run from which the two large models were taken away."""
    folder = shutil.copytree(smoke.folder, tmp_path / "run")
    for model in ("tl", "ft"):
        (folder / "models" / f"{model}.keras").unlink()
    return Run.open(folder)


def test_a_run_that_is_scored_again_has_the_same_figures_and_one_look_more(
    calibrated: Finished, calibrated_copy: Run
) -> None:
    assert pipeline.evaluate_run(calibrated_copy) == calibrated_copy.metrics_path
    again, first = (read_json(folder / "metrics.json") for folder in (calibrated_copy.folder, calibrated.folder))
    assert set(again) == set(first)
    assert (again["note"], again["chosen_on"]) == ("SYNTHETIC DATA", "calibration")
    for split, before in first["models"]["cnn"].items():
        found = again["models"]["cnn"][split]
        assert {key: found[key] for key in FIGURES} == pytest.approx({key: before[key] for key in FIGURES})
        assert scorecard.Choice.of_dict(found).points == pytest.approx(scorecard.Choice.of_dict(before).points)
    assert again["shortcuts"] == first["shortcuts"]
    assert list(again["comparisons"]) == list(first["comparisons"])
    assert (first["test_set"]["looks"], again["test_set"]["looks"], again["test_set"]["models"]) == (1, 2, 1)


def test_a_run_without_its_models_is_not_evaluated(calibrated_copy: Run) -> None:
    calibrated_copy.model_path("cnn").unlink()
    with pytest.raises(DataError, match=r"^There is no model to measure; "):
        pipeline.evaluate_run(calibrated_copy)


def test_a_run_of_an_earlier_version_is_scored_anew_before_other_images(calibrated_copy: Run, data: Path) -> None:
    content = read_json(calibrated_copy.metrics_path)
    for figures in content["models"]["cnn"].values():
        del figures["conformal"]
    calibrated_copy.metrics_path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RunError, match=r"\('conformal'\), as where an earlier version wrote it; score the run again"):
        pipeline.evaluate_run(calibrated_copy, data=data / "test")


def test_figures_that_one_class_leaves_undefined_are_null(with_cnn_only: Run, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "sick.v1"
    shutil.copytree(data / "test" / "PNEUMONIA", other / "PNEUMONIA")
    path = pipeline.evaluate_run(with_cnn_only, data=other)
    assert path.parent.parent == with_cnn_only.folder / "evaluations"
    content = read_json(path)
    assert list(content["models"]) == ["cnn"]
    assert list(content["models"]["cnn"]) == ["test"]
    figures = content["models"]["cnn"]["test"]
    assert figures["n"] == figures["n_positive"] == len(list(other.rglob("*.jpeg")))
    assert figures["auc"] is None
    assert figures["specificity"] is None
    assert figures["operating_point"]["specificity"] is None
    assert figures["sensitivity"] is not None
    for key in ("auc", "specificity", "youden.specificity"):
        assert figures["undefined"][key] == "There is no NORMAL image."
    assert content["shift"]["PNEUMONIA"]["n"][1] == figures["n"]  # against the run's own training images
    assert content["shift"]["NORMAL"]["verdict"] == "not tested"
    assert content["not_assessable"]["whole"] == figures["n"]
    roc = pd.read_csv(path.parent / "tables" / "cnn_test_roc.csv")
    assert list(roc.columns) == ["fpr", "tpr", "thresholds"]
    assert roc.empty


def test_other_images_are_called_synthetic_or_not_by_what_they_are(calibrated_copy: Run, tmp_path: Path) -> None:
    other = tmp_path / "site"
    for label, number in itertools.product(("NORMAL", "PNEUMONIA"), range(3)):
        (other / label).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([number, len(label)]).integers(0, 255, (40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(other / label / f"{number}.png")
    path = pipeline.evaluate_run(calibrated_copy, data=other)
    assert read_json(path)["note"] == ""
    assert read_json(calibrated_copy.metrics_path)["note"] == "SYNTHETIC DATA"
    assert read_json(path)["models"]["cnn"]["test"]["n"] == 6


def test_an_unfinished_run_is_not_evaluated(stopped_copy: Path) -> None:
    with pytest.raises(RunError) as refusal:
        pipeline.evaluate_run(Run.open(stopped_copy))
    assert str(refusal.value) == (
        f"The run in {stopped_copy} is stopped, not finished; run its command again with --resume first."
    )


# --- in Python -------------------------------------------------------------------------------------------------------


def test_the_steps_compose_in_a_dozen_lines(data: Path) -> None:
    from pneumoscope import ImageStore, Spec, build, choose_operating_points, evaluate, figures, score, train

    spec = Spec.preset_named("smoke").with_overrides(["train.epochs=2"])
    catalog = pneumoscope.Catalog.scan(data).split(spec.split, seed=spec.seed)
    store = ImageStore.pack(catalog, size_px=spec.image.size_px)
    model = build("cnn", spec)
    history = train(model, store, catalog, spec=spec)
    points = choose_operating_points(score(model, store, catalog.rows("validation")))
    predictions = score(model, store, catalog.rows("test"))
    evaluation = evaluate(predictions, operating_points=points)
    curve = figures.loss_curve(history.epochs, title="cnn", best_epoch=history.best_epoch)
    roc = figures.roc_curve(evaluation.roc, title="cnn on test", note="SYNTHETIC DATA")

    assert list(history.epochs["epoch"]) == [1, 2]
    assert evaluation.n == len(predictions) == 16
    assert evaluation.roc.auc == pytest.approx(roc_auc_score(predictions.labels, predictions.scores))
    assert list(evaluation.operating_points) == POINTS
    for figure in (curve, roc):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        assert buffer.getvalue().startswith(b"\x89PNG")


def test_the_bar_counts_the_steps_of_teachers_and_of_the_model_as_one_training() -> None:
    bar = Narration("silent").bar("best", unit="steps")
    spec = TrainSpec(epochs=2, teachers=1)
    seen = []
    with bar as shown:
        epochs = stages._Epochs(shown, spec)
        for teachers, epoch in ((0, 1), (1, 0)):  # the teacher is taken up again after its first epoch
            epochs.begin(teachers, epoch)
            for step in [1, 2, 3] * (spec.epochs - epoch):
                epochs(step, 3)
                seen.append((shown.task.note, shown.task.done, shown.task.total))
    assert [done for _, done, _ in seen] == [4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert {total for *_, total in seen} == {12}
    assert list(dict.fromkeys(note for note, *_ in seen)) == ["teacher 1/1, epoch 2/2", "epoch 1/2", "epoch 2/2"]
