"""The main job as a reader of its run directory sees it: every file, every number recomputed, every way to stop it."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile
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
from pneumoscope import catalog as catalogs
from pneumoscope import figures as drawings
from pneumoscope import inference, phantom, pipeline
from pneumoscope.catalog import Catalog
from pneumoscope.errors import DataError, RunError, StoppedEarly
from pneumoscope.narration import Narration
from pneumoscope.runs import Run
from pneumoscope.specs import Spec
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
    top = {"spec.toml", "manifest.json", "catalog.csv", "run.log", "metrics.json", "metrics.csv"}
    models = {f"models/{model}.keras" for model in MODELS}
    tables = {f"tables/{model}_{table}.csv" for model in MODELS for table in TABLES}
    figures = {f"figures/{name}" for name in DATA_FIGURES | MODEL_FIGURES}
    assert files_under(smoke.folder) == top | models | tables | figures
    assert {path.name for path in smoke.folder.iterdir() if path.is_dir()} == {"models", "tables", "figures"}


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
            point = figures["operating_point"]
            assert set(point) >= AT_THRESHOLD | {"name", "threshold"}
            assert figures["operating_points"] == {point["name"]: point}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("model", MODELS)
def test_every_figure_follows_from_the_table_of_scores(smoke: Finished, model: str, split: str) -> None:
    figures, table = smoke.figures(model, split), smoke.table(model, f"{split}_yscores")
    sick = table["y_true"] == 1
    assert (figures["n"], figures["n_positive"], figures["n_negative"]) == (len(table), sick.sum(), (~sick).sum())
    assert figures["auc"] == pytest.approx(roc_auc_score(table["y_true"], table["y_scores"]), abs=1e-12)
    of_truth = table["y_scores"].where(sick, 1 - table["y_scores"])
    assert figures["loss"] == pytest.approx(-np.log(of_truth).mean(), rel=1e-6)
    for found in (figures, figures["operating_point"]):
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
    long = pd.read_csv(smoke.folder / "metrics.csv")
    assert list(long.columns) == ["model", "split", "metric", "value"]
    assert not long.duplicated(["model", "split", "metric"]).any()
    held = long.set_index(["model", "split", "metric"])["value"]
    for model, split in itertools.product(MODELS, SPLITS):
        figures = smoke.figures(model, split)
        point = figures["operating_point"]
        assert {name: held[model, split, name] for name in FIGURES} == {name: figures[name] for name in FIGURES}
        assert {name: held[model, split, f"youden.{name}"] for name in AT_THRESHOLD} == {
            name: point[name] for name in AT_THRESHOLD
        }


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
    assert "Results on validation - SYNTHETIC DATA" in said
    assert "Results on test - SYNTHETIC DATA" in said
    assert said[-1] == "Research use only, not a medical device. SYNTHETIC DATA."
    assert "SYNTHETIC DATA" in (smoke.folder / "run.log").read_text(encoding="utf-8")


def test_off_a_terminal_a_run_is_quiet_plain_and_unwrapped(smoke: Finished) -> None:
    assert smoke.stderr == ""
    assert smoke.stdout.isascii()
    assert not {"\x1b", "\r", "\b"} & set(smoke.stdout)
    assert max(len(line) for line in smoke.stdout.splitlines()) > 100  # in a window of 40
    for model in MODELS:
        assert sum(line.startswith(f"  {model} epoch") for line in smoke.stdout.splitlines()) == 1
    assert not any(f"{model} test:" in smoke.stdout for model in MODELS)  # a short pass needs no progress line


# --- what must be said -----------------------------------------------------------------------------------------------


def test_random_weights_are_named_in_every_output(data: Path, tmp_path: Path) -> None:
    spec = spec_of("backbone.weights=none", "models=tl", "image.size_px=32")
    stream = io.StringIO()
    run = pipeline.run(spec, data, tmp_path / "run", narration=Narration("plain", stream=stream))
    note = "SYNTHETIC DATA, tl and ft on RANDOM WEIGHTS"
    assert read_json(run.metrics_path)["note"] == note
    assert read_json(run.manifest_path)["note"] == note
    assert f"Results on test - {note}" in stream.getvalue()
    assert f"Warning: {note}: the figures say nothing about real radiographs." in stream.getvalue()
    assert note in run.log_path.read_text(encoding="utf-8")


def zipped(data: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(data.rglob("*.jpeg")):
            archive.write(path, path.relative_to(data))
    return target


def listed(data: Path, target: Path) -> Path:
    rows = [f"{path},{path.parent.name},{path.parts[-3]}" for path in sorted(data.rglob("*.jpeg"))]
    target.write_text("\n".join(["path,label,split", *rows]), encoding="utf-8")
    return target


def unnamed(data: Path, target: Path) -> Path:
    shutil.copytree(data, target, ignore=shutil.ignore_patterns(phantom.NOTICE_NAME, "phantom.json"))
    return target


@pytest.mark.parametrize(("kind", "name"), [(zipped, "set.zip"), (listed, "set.csv"), (unnamed, "set")])
def test_synthetic_images_are_known_in_whatever_they_come(
    data: Path, tmp_path: Path, kind: Callable[[Path, Path], Path], name: str
) -> None:
    given = kind(data, tmp_path / name)
    assert pipeline.note_of(spec_of(), given, catalog=Catalog.scan(given)) == "SYNTHETIC DATA"


def test_a_list_that_mixes_synthetic_images_in_is_called_synthetic(data: Path, tmp_path: Path) -> None:
    given = tmp_path / "set"
    for split, label in itertools.product(("train", "test"), ("NORMAL", "PNEUMONIA")):
        for number in range(3):
            (given / split / label).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([number, len(label), len(split)]).integers(0, 255, (40, 40), dtype=np.uint8)
            Image.fromarray(pixels).save(given / split / label / f"{split}-{number}.jpeg")
    assert pipeline.note_of(spec_of(), given, catalog=Catalog.scan(given)) == ""
    rows = [f"{path},{path.parent.name},{path.parts[-3]}" for path in sorted(given.rglob("train/*/*.jpeg"))]
    rows += [f"{path},{path.parent.name},test" for path in sorted((data / "test").rglob("*.jpeg"))]
    manifest = tmp_path / "set.csv"
    manifest.write_text("\n".join(["path,label,split", *rows]), encoding="utf-8")
    assert pipeline.note_of(spec_of(), manifest, catalog=Catalog.scan(manifest)) == "SYNTHETIC DATA"


def test_random_weights_are_named_only_for_the_approaches_that_use_them(data: Path) -> None:
    spec, catalog = spec_of("backbone.weights=none"), Catalog.scan(data)
    random = "SYNTHETIC DATA, tl and ft on RANDOM WEIGHTS"
    assert pipeline.note_of(spec, data, catalog=catalog) == random
    assert pipeline.note_of(spec, data, catalog=catalog, models_used=["ft"]) == random
    assert pipeline.note_of(spec, data, catalog=catalog, models_used=["cnn"]) == "SYNTHETIC DATA"
    assert pipeline.note_of(spec.with_overrides(["models=cnn"]), data, catalog=catalog) == "SYNTHETIC DATA"


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
    next(iter(sorted(other.rglob("train/PNEUMONIA/*.jpeg")))).unlink()
    before = everything_in(stopped_copy)
    with pytest.raises(RunError) as refusal:
        pipeline.run(spec_of("models=cnn,tl"), other, stopped_copy, resume=True)
    assert str(refusal.value) == (
        f"{stopped_copy} was begun with other images than {other} holds now; "
        "give the same ones to go on, or choose a new folder with -o."
    )
    after = everything_in(stopped_copy)
    assert {name for name in after if after[name] != before[name]} == {"manifest.json", "run.log"}
    manifest = read_json(stopped_copy / "manifest.json")
    assert manifest["data"] == str(data)
    assert manifest["error"] == str(refusal.value)


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


# --- inspect, evaluate -----------------------------------------------------------------------------------------------


def test_the_distributions_and_grids_are_drawn_from_all_images(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, object]] = []

    def noting(draw: Callable[..., Any], *, key: str = "") -> Callable[..., Any]:
        def and_draw(content: Any, **options: Any) -> Any:
            drawn.append((options["title"], options[key] if key else content))
            return draw(content, **options)

        return and_draw

    monkeypatch.setattr(drawings, "class_bars", noting(drawings.class_bars))
    monkeypatch.setattr(drawings, "class_pie", noting(drawings.class_pie))
    monkeypatch.setattr(drawings, "sample_grid", noting(drawings.sample_grid, key="captions"))
    pipeline.inspect(data, tmp_path / "look", spec=spec_of())
    for split in ("train", "test"):
        names = {label: {path.name for path in (data / split / label).iterdir()} for label in ("NORMAL", "PNEUMONIA")}
        counts = {label: len(found) for label, found in names.items()}
        title = {"train": "Training images", "test": "Test images"}[split]
        assert [content for said, content in drawn if said == title] == [counts, counts]  # bars and pie
        for label, found in names.items():
            (captions,) = (content for said, content in drawn if said == f"{label}, {split} images")
            assert isinstance(captions, list)
            assert len(set(captions)) == min(12, len(found))
            assert set(captions) <= found


def test_inspect_lists_and_draws_the_images_and_trains_nothing(data: Path, tmp_path: Path) -> None:
    stream = io.StringIO()
    spec = spec_of("backbone.weights=none")
    catalog = pipeline.inspect(data, tmp_path / "look", spec=spec, narration=Narration("plain", stream=stream))
    assert files_under(tmp_path / "look") == {"catalog.csv"} | {f"figures/{name}" for name in DATA_FIGURES}
    counts = catalog.counts()
    on_disk = {
        (split, label): len(list((data / split / label).glob("*.jpeg")))
        for split, label in itertools.product(("train", "test"), ("NORMAL", "PNEUMONIA"))
    }
    for label in ("NORMAL", "PNEUMONIA"):
        assert counts.loc[["train", "validation"], label].sum() == on_disk["train", label]
        assert counts.loc["test", label] == on_disk["test", label]
    said = [line.split() for line in stream.getvalue().splitlines()]
    assert ["test", *(str(count) for count in counts.loc["test"])] in said
    assert ["all", str(on_disk["train", "NORMAL"] + on_disk["test", "NORMAL"]), *said_total(on_disk)] in said
    assert "RANDOM" not in stream.getvalue()


def said_total(on_disk: dict[tuple[str, str], int]) -> list[str]:
    sick = on_disk["train", "PNEUMONIA"] + on_disk["test", "PNEUMONIA"]
    return [str(sick), str(sum(on_disk.values()))]


@pytest.fixture
def with_cnn_only(smoke: Finished, tmp_path: Path) -> Run:
    """A copy of the smoke run from which the two large models were taken away."""
    folder = shutil.copytree(smoke.folder, tmp_path / "run")
    for model in ("tl", "ft"):
        (folder / "models" / f"{model}.keras").unlink()
    return Run.open(folder)


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
    roc = pd.read_csv(path.parent / "tables" / "cnn_test_roc.csv")
    assert list(roc.columns) == ["fpr", "tpr", "thresholds"]
    assert roc.empty


def test_other_images_are_called_synthetic_or_not_by_what_they_are(with_cnn_only: Run, tmp_path: Path) -> None:
    other = tmp_path / "site"
    for label, number in itertools.product(("NORMAL", "PNEUMONIA"), range(3)):
        (other / label).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([number, len(label)]).integers(0, 255, (40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(other / label / f"{number}.png")
    path = pipeline.evaluate_run(with_cnn_only, data=other)
    assert read_json(path)["note"] == ""
    assert read_json(with_cnn_only.metrics_path)["note"] == "SYNTHETIC DATA"
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
    assert list(evaluation.operating_points) == ["youden"]
    for figure in (curve, roc):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        assert buffer.getvalue().startswith(b"\x89PNG")
