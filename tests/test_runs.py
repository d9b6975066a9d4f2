"""The Run: every file name that people's scripts stand on, and a folder that is never mistaken for a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pneumoscope import _files
from pneumoscope.errors import RunError, SpecError, StoreError
from pneumoscope.runs import Run
from pneumoscope.specs import Spec

SPEC = Spec.preset_named("smoke")


def begun(folder: Path, *, status: str = "running") -> Run:
    """A run as the first stage leaves it."""
    run = Run.create(folder)
    run.update_manifest(status=status)
    _files.write_text(run.spec_path, SPEC.to_toml())
    _files.write_text(run.catalog_path, "")
    return run


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- making ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_or_empty_folder_becomes_a_run(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "deep" / "er" / "new", tmp_path / "empty"):
        run = Run.create(folder, resume=resume)
        assert run.folder == folder
        assert run.status == "new"
        assert names_in(folder) == []  # nothing says so before there is something to say


def test_an_earlier_run_is_taken_up_only_on_request(tmp_path: Path) -> None:
    begun(tmp_path / "run", status="stopped")
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    with pytest.raises(RunError) as caught:
        Run.create(tmp_path / "run")
    assert str(caught.value) == (
        f"{tmp_path / 'run'} already holds a run (stopped); go on with --resume, or choose a new folder with -o."
    )
    again = Run.create(tmp_path / "run", resume=True)
    assert again.status == "stopped"
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "zebra").mkdir()
    with pytest.raises(RunError) as caught:
        Run.create(tmp_path, resume=resume)
    assert str(caught.value) == (
        f"{tmp_path} is not empty and holds no run (found 'thesis.tex'); choose a new folder with -o."
    )
    assert names_in(tmp_path) == ["thesis.tex", "zebra"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("below", ["", "run", "deep/er/run"])
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / below
    with pytest.raises(RunError) as caught:
        Run.create(folder)
    reason = os.strerror(20) if below else os.strerror(17)  # ENOTDIR, EEXIST
    assert str(caught.value) == f"Cannot write the run to {folder}: {reason}; choose a folder you may write to with -o."
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder where nobody, root included, can write")
def test_an_existing_folder_that_cannot_be_written_is_told() -> None:
    with pytest.raises(RunError, match=r"^Cannot write the run to /proc/self: .*; choose a folder you may write to"):
        Run.create(Path("/proc/self"))


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_run_is_opened_for_reading(tmp_path: Path) -> None:
    begun(tmp_path / "run", status="finished")
    opened = Run.open(tmp_path / "run")
    assert opened.status == "finished"
    assert opened.read_spec() == SPEC


def test_what_is_no_run_does_not_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(RunError) as caught:
            Run.open(folder)
        assert str(caught.value) == (
            f"{folder} is not a run directory (it holds no manifest.json); give the folder that -o named."
        )


def test_a_missing_or_damaged_spec_is_told(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.spec_path.write_text("seed = ")
    with pytest.raises(SpecError, match=r"spec\.toml is not a TOML file"):
        run.read_spec()
    run.spec_path.unlink()
    with pytest.raises(SpecError, match=r"There is no configuration file .*spec\.toml"):
        run.read_spec()


# --- file names ------------------------------------------------------------------------------------------------------

CONTRACT = """
spec.toml manifest.json catalog.csv run.log metrics.json metrics.csv
models/cnn.keras models/tl.keras models/ft.keras
tables/M_accuracy_per_epoch.csv tables/M_loss_per_epoch.csv
tables/M_validation_yscores.csv tables/M_test_yscores.csv tables/M_validation_roc.csv tables/M_test_roc.csv
figures/M_learning_curve_accuracy.png figures/M_learning_curve_loss.png
figures/M_roc_curve_validation.png figures/M_roc_curve_testing.png
figures/train_samples_normal.png figures/test_samples_pneumonia.png
figures/train_data_dist_barplot.png figures/test_data_dist_pieplot.png
"""  # the part of DESIGN 4.3 that a run writes by now; M is an approach


def test_every_path_is_the_one_that_scripts_rely_on(tmp_path: Path) -> None:
    run = Run(tmp_path)
    paths = [
        run.spec_path, run.manifest_path, run.catalog_path, run.log_path, run.metrics_path, run.metrics_csv_path,
        *(run.model_path(model) for model in ("cnn", "tl", "ft")),
        *(run.table_path("tl", name) for name in (
            "accuracy_per_epoch", "loss_per_epoch", "validation_yscores", "test_yscores", "validation_roc", "test_roc"
        )),
        *(run.figure_path(f"tl_{name}") for name in (
            "learning_curve_accuracy", "learning_curve_loss", "roc_curve_validation", "roc_curve_testing"
        )),
        *(run.figure_path(name) for name in (
            "train_samples_normal", "test_samples_pneumonia", "train_data_dist_barplot", "test_data_dist_pieplot"
        )),
    ]  # fmt: skip
    expected = [name.replace("/M_", "/tl_") for name in CONTRACT.split()]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == expected


def test_checkpoints_lie_apart_from_what_a_run_delivers(tmp_path: Path) -> None:
    assert Run(tmp_path).checkpoint_path("ft") == tmp_path / "checkpoints" / "ft.npz"


# --- the manifest ----------------------------------------------------------------------------------------------------


def test_the_manifest_keeps_what_is_not_changed(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    assert run.read_manifest() == {}
    run.update_manifest(status="running", data="/images", machine={"threads": 2})
    run.update_manifest(status="finished", seconds=1.5)
    assert json.loads(run.manifest_path.read_text()) == {
        "schema_version": 1, "status": "finished", "data": "/images", "machine": {"threads": 2}, "seconds": 1.5
    }  # fmt: skip
    assert run.read_manifest()["status"] == run.status == "finished"


def test_a_manifest_that_cannot_be_written_leaves_the_old_one_whole(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    before = run.manifest_path.read_bytes()
    with pytest.raises(TypeError):
        run.update_manifest(status="finished", bad=object())
    assert run.manifest_path.read_bytes() == before
    assert names_in(run.folder) == ["catalog.csv", "manifest.json", "spec.toml"]  # and no half-written file beside it


def test_a_reader_never_sees_half_a_manifest(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    with run.manifest_path.open() as earlier:
        run.update_manifest(status="finished", filler="x" * 100_000)
        assert json.load(earlier)["status"] == "running"  # the old file, whole, while the name shows the new one
    assert run.status == "finished"


@pytest.mark.parametrize("status", ["running", "stopped", "failed", "finished"])
def test_the_status_is_what_the_manifest_says(tmp_path: Path, status: str) -> None:
    assert begun(tmp_path / "run", status=status).status == status


def test_a_damaged_manifest_is_told(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.manifest_path.write_text('{"schema_version": 1, "status": "run')
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read as JSON \(.*\); delete it and make it anew"):
        _ = Run.open(run.folder).status


# --- stages ----------------------------------------------------------------------------------------------------------


def test_each_stage_keeps_a_record_of_its_own(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    assert run.read_stages() == {}
    run.update_stage("train-tl", status="running", host="node7", epoch=3, val_loss=float("nan"))
    run.update_stage("train-cnn", status="finished", seconds=12.5, error=None)
    run.update_stage("train-tl", epoch=4, val_loss=0.25)
    assert run.read_stages() == {
        "train-cnn": {"status": "finished", "seconds": 12.5, "error": None},
        "train-tl": {"status": "running", "host": "node7", "epoch": 4, "val_loss": 0.25},
    }
    assert list(run.read_stages()) == ["train-cnn", "train-tl"]
    assert run.stage_path("train-cnn") == run.folder / "stages" / "train-cnn.json"
    assert json.loads(run.stage_path("train-cnn").read_text())["schema_version"] == 1
    assert run.jobs_folder == run.folder / "jobs"


def test_a_stages_record_that_cannot_be_written_leaves_the_old_one_whole(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.update_stage("train-tl", status="running")
    with pytest.raises(TypeError):
        run.update_stage("train-tl", status="finished", error=object())
    assert run.read_stages() == {"train-tl": {"status": "running"}}
    assert names_in(run.folder / "stages") == ["train-tl.json"]


def test_a_damaged_record_of_a_stage_is_told(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.stage_path("train-tl").parent.mkdir()
    run.stage_path("train-tl").write_text("{")
    for call in (run.read_stages, lambda: run.update_stage("train-tl", status="running")):
        with pytest.raises(
            StoreError, match=r"stages/train-tl\.json cannot be read as JSON \(.*\); delete it and make"
        ):
            call()


def test_a_folder_that_was_only_locked_is_still_a_new_run(tmp_path: Path) -> None:
    with Run.create(tmp_path).lock():
        assert Run.create(tmp_path).status == "new"
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"is not empty and holds no run \(found 'thesis\.tex'\)"):
        Run.create(tmp_path)


# --- models and checkpoints ------------------------------------------------------------------------------------------


def test_trained_approaches_are_listed_in_the_order_of_the_spec(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    assert run.trained() == []
    for model in ("ft", "cnn"):
        _files.write_bytes(run.model_path(model), b"weights")
    assert run.trained() == ["cnn", "ft"]
    _files.write_text(run.spec_path, SPEC.with_overrides(["models=ft,tl"]).to_toml())
    assert run.trained() == ["ft"]  # the cnn is not of this Spec


def test_checkpoints_are_discarded_and_nothing_else(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.discard_checkpoints()  # where there are none, too
    _files.write_bytes(run.model_path("cnn"), b"weights")
    for path in (run.checkpoint_path("cnn"), run.checkpoint_path("cnn").with_suffix(".previous.npz")):
        _files.write_bytes(path, b"state")
    run.discard_checkpoints()
    assert names_in(run.folder) == ["catalog.csv", "manifest.json", "models", "spec.toml"]
    assert run.model_path("cnn").read_bytes() == b"weights"
