"""A run as batch jobs: which jobs it makes, and on a real Slurm that it ends as a run in one process does."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pneumoscope import _backend, _files, batch, doctor, jobs, models, pipeline, stages
from pneumoscope.errors import PneumoscopeError, RunError, UsageError
from pneumoscope.jobs import Submitted
from pneumoscope.narration import Narration
from pneumoscope.runs import Run
from pneumoscope.specs import Spec
from pneumoscope.tasks import Task

pytest_plugins = "slurm_local"


def alive(folder: Path) -> bool:
    return not all(state.ended for state in jobs.states_if_any(folder))


SETTINGS = ["backbone.weights=none", "train.threads=1", "cluster.cpus=1", "cluster.mem_gb=2", "cluster.time_min=10"]
SPEC = Spec.preset_named("smoke").with_overrides(SETTINGS)


def needs(scripts: dict[str, str]) -> dict[str, str | None]:
    found = {name: re.search("--dependency=(.*)", script) for name, script in scripts.items()}
    return {name: match[1].strip("'") if match else None for name, match in found.items()}


# --- which jobs -------------------------------------------------------------------------------------------------------


def test_approaches_wait_for_the_features_and_the_evaluation_for_all_of_them_however_they_end(tmp_path: Path) -> None:
    scripts = batch.scripts(SPEC, tmp_path, tmp_path / "run")
    assert needs(scripts) == {
        "images": None,
        "features": "afterok:images",
        "train-cnn": "afterok:features",
        "train-tl": "afterok:features",
        "train-ft": "afterok:features",
        "evaluate": "afterany:train-cnn:train-tl:train-ft",
    }
    assert not (tmp_path / "run").exists()


def test_without_stored_features_the_approaches_wait_for_the_images(tmp_path: Path) -> None:
    uncached = SPEC.with_overrides(["features.cache=false", "models=tl,ft"])
    assert needs(batch.scripts(uncached, tmp_path, tmp_path / "run")) == {
        "images": None,
        "train-tl": "afterok:images",
        "train-ft": "afterok:images",
        "evaluate": "afterany:train-tl:train-ft",
    }


def test_features_in_shards_are_a_job_array_and_a_job_that_puts_them_together(tmp_path: Path) -> None:
    sharded = SPEC.with_overrides(["cluster.shards=4", "models=tl"])
    scripts = batch.scripts(sharded, tmp_path, tmp_path / "run")
    assert needs(scripts)["features"] == "afterok:features-shards"
    assert "--array=0-3%4" in scripts["features-shards"]


def test_gpus_are_asked_for_where_a_network_runs(tmp_path: Path) -> None:
    scripts = batch.scripts(SPEC.with_overrides(["cluster.gpus=1", "cluster.shards=2"]), tmp_path, tmp_path / "run")
    asking = {name for name, script in scripts.items() if "--gpus-per-node=1" in script}
    assert asking == set(scripts) - {"images"}


def test_only_training_spreads_over_several_nodes(tmp_path: Path) -> None:
    scripts = batch.scripts(SPEC.with_overrides(["cluster.nodes=2"]), tmp_path, tmp_path / "run")
    assert {name for name, script in scripts.items() if "--nodes=2" in script} == {"train-cnn", "train-tl", "train-ft"}


def test_folds_and_seeds_wait_for_the_packed_images_and_are_put_together_at_the_end(tmp_path: Path) -> None:
    found = needs(batch.scripts(SPEC.with_overrides(["models=cnn"]), tmp_path, tmp_path / "run", folds=2, seeds=2))
    assert list(found) == [
        *("images", "train-cnn", "evaluate"),
        *("folds-1-images", "folds-1-train-cnn", "folds-1-evaluate"),
        *("folds-2-images", "folds-2-train-cnn", "folds-2-evaluate"),
        *("seeds-43-images", "seeds-43-train-cnn", "seeds-43-evaluate"),
        "repeats",
    ]
    assert {found[f"{part}-images"] for part in ("folds-1", "folds-2", "seeds-43")} == {"afterok:images"}
    assert found["folds-2-train-cnn"] == "afterok:folds-2-images"
    assert found["repeats"] == "afterok:evaluate:folds-1-evaluate:folds-2-evaluate:seeds-43-evaluate"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "folds", "seeds", "submitted"),
    [
        (None, 2, 1, True),
        ({"folds": {"folds": 2}}, 2, 1, False),
        ({"folds": {"folds": 2}}, 2, 2, True),
        ({"seeds": {"seeds": [42, 43]}}, 2, 2, True),
        ({"seeds": {"seeds": [42, 43]}}, 0, 3, True),
        ({"folds": {"folds": 2}, "seeds": {"seeds": [42, 43]}}, 2, 2, False),
        ({"folds": {"folds": 2}, "seeds": {"seeds": [42, 43]}}, 2, 1, False),
    ],
)
def test_where_only_the_sum_of_these_folds_and_seeds_is_missing_it_alone_is_submitted(
    tiny_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, Any] | None,
    folds: int,
    seeds: int,
    submitted: bool,
) -> None:
    for part in pipeline.parts_of(SPEC, tmp_path / "run", folds=folds, seeds=seeds):
        run = Run.create(part.run.folder, resume=False)
        _files.write_text(run.spec_path, part.spec.to_toml())
        run.update_manifest(status="finished")
    asked: list[Task] = []

    def submit(tasks: Sequence[Task], **_: object) -> list[Submitted]:
        asked.extend(tasks)
        return []

    monkeypatch.setattr(doctor, "require", lambda *_, **__: None)  # there need be no Slurm
    monkeypatch.setattr(jobs, "submit", submit)
    if said is not None:
        _files.write_json(Run(tmp_path / "run").repeats_path, said)
    batch.submit(SPEC, tiny_set, tmp_path / "run", folds=folds, seeds=seeds, resume=True)
    assert [(task.name, task.after) for task in asked] == [("repeats", ())] * submitted


def test_without_slurm_nothing_is_begun(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        PneumoscopeError, match=r"^There is no Slurm here \(sbatch, srun and squeue are not on the PATH"
    ):
        batch.submit(SPEC, tiny_set, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", [batch.show_jobs, batch.follow, batch.cancel])
def test_a_run_without_jobs_is_told(tmp_path: Path, verb: Callable[..., None]) -> None:
    message = f"^No batch jobs were submitted for {tmp_path}; that is what run --executor slurm does.$"
    with pytest.raises(RunError, match=message):
        verb(tmp_path, narration=Narration("silent"))


def test_jobs_that_cannot_be_asked_for_here_are_not_taken_for_gone(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run = begun(tmp_path / "run", tiny_set)
    job = {"name": "images", "job_id": "1", "log": "1/1_0_log.out", "submitted_at": pipeline.now()}
    _files.write_json(run.jobs_folder / "jobs.json", {"jobs": [job]})
    message = (
        f"^Whether the batch jobs of {run.folder} still run cannot be asked here \\(squeue is not on the PATH\\); go "
        f"on where they were submitted, or, where they are gone for certain, delete {run.jobs_folder}.$"
    )
    with pytest.raises(RunError, match=message):
        pipeline.run(SPEC, tiny_set, run.folder, resume=True)


def test_a_stage_that_there_is_not_is_told(tmp_path: Path) -> None:
    begun(tmp_path, tmp_path)
    message = (
        f"^There is no stage 'train-vit' in {tmp_path}; choose from images, features, train-cnn, train-tl, train-ft, "
        "evaluate.$"
    )
    with pytest.raises(UsageError, match=message):
        pipeline.perform(tmp_path, "train-vit")


def begun(folder: Path, data: Path, spec: Spec = SPEC) -> Run:
    """A run directory as a submission leaves it."""
    run = Run.create(folder)
    _files.write_text(run.spec_path, spec.to_toml())
    run.update_manifest(status="queued", started=pipeline.now(), data=str(data), folds=0, seeds=1)
    return run


# --- stages by themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["images", "features"])
def test_what_failed_now_is_said_and_not_that_a_training_was_once_stopped(tmp_path: Path, stage: str) -> None:
    run = begun(tmp_path, tmp_path, SPEC.with_overrides(["models=tl"]))
    run.update_stage("train-tl", status="stopped", error="Stopped in epoch 1, step 1, on request.")
    run.update_stage(stage, status="failed", error="There is no space.")
    message = rf"^tl was not trained\. {stage}: There is no space\. Mend that and run the same command with --resume\.$"
    with pytest.raises(RunError, match=message):
        pipeline.perform(run.folder, "evaluate")
    assert run.status == "failed"


def exhausted(*_: object, **__: object) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("stage", "index", "sentence"),
    [
        ("features", 0, "to run the frozen layers; choose a smaller image.size_px in a new folder"),
        ("train-tl", 0, "to train with batches of 16 images; choose a smaller train.batch_size or image.size_px in a"),
        ("train-tl", 1, "to train with batches of 16 images; choose a smaller train.batch_size or image.size_px in a"),
    ],
)
def test_too_little_memory_is_told_in_every_stage_with_a_network_and_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, index: int, sentence: str
) -> None:
    run = begun(tmp_path, tmp_path, SPEC.with_overrides(["models=tl", "train.batch_size=16"]))
    monkeypatch.setattr(_backend, "process", lambda _: (index, 2))
    monkeypatch.setattr(_backend, "distribute", lambda *_, **__: None)
    monkeypatch.setattr(models, "build", exhausted)
    with pytest.raises(RunError, match=f"^There is not enough memory {sentence}"):
        stages.Job(run, run.read_spec(), tmp_path, Narration("silent")).perform(stage)


def test_a_log_that_cannot_be_opened_fails_the_run_instead_of_leaving_it_running(tmp_path: Path) -> None:
    run = begun(tmp_path, tmp_path)
    run.log_path.mkdir()
    with pytest.raises(RunError, match=f"^Cannot write {run.log_path}: ") as failure:
        pipeline.perform(run.folder, "images")
    assert (run.status, run.read_manifest()["error"]) == ("failed", str(failure.value))


def test_where_the_manifest_cannot_be_written_the_log_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, voice = begun(tmp_path, tmp_path), Narration("silent")

    def full(*_: object, **__: object) -> None:
        raise PneumoscopeError("There is no space.")

    monkeypatch.setattr(Run, "update_manifest", full)
    with pytest.raises(PneumoscopeError, match=r"^There is no space\.$"):
        pipeline.perform(run.folder, "images", narration=voice)
    voice.say("Something else.")
    assert "Something else" not in run.log_path.read_text(encoding="utf-8")


def test_stages_in_turn_make_a_run_and_done_again_change_nothing(tiny_set: Path, tmp_path: Path) -> None:
    spec = SPEC.with_overrides(["models=cnn", "image.size_px=32"])
    run = begun(tmp_path / "run", tiny_set, spec)
    for stage in ("images", "train-cnn"):
        pipeline.perform(run.folder, stage)
        assert run.read_stages()[stage]["status"] == "finished"
    assert run.status == "running"
    model = run.model_path("cnn").read_bytes()
    pipeline.perform(run.folder, "train-cnn")
    assert run.model_path("cnn").read_bytes() == model
    pipeline.perform(run.folder, "evaluate")
    assert run.status == "finished"
    stream = io.StringIO()
    pipeline.perform(run.folder, "evaluate", narration=Narration("plain", stream=stream))
    assert stream.getvalue() == f"{run.folder} is finished already.\n"


def test_an_approach_that_fails_leaves_the_others_measured_and_can_be_mended(tiny_set: Path, tmp_path: Path) -> None:
    spec = SPEC.with_overrides(["models=cnn,tl", "image.size_px=32"])
    folder = tmp_path / "run"
    in_the_way = Run(folder).table_path("cnn", "loss_per_epoch")

    def stand_in_the_way() -> bool:
        in_the_way.mkdir(parents=True, exist_ok=True)
        return False

    with pytest.raises(RunError) as failure:  # a folder stands where a table belongs
        pipeline.run(spec, tiny_set, folder, stop=stand_in_the_way)
    assert str(failure.value).startswith(f"cnn was not trained. train-cnn: Cannot write {in_the_way}")
    assert str(failure.value).endswith(
        f". tl stands measured in {folder}/metrics.json. Mend that and run the same command with --resume."
    )
    assert list(_files.read_json(folder / "metrics.json")["models"]) == ["tl"]
    assert Run(folder).status == "failed"
    assert "CNN from scratch (cnn) was not measured" in Run(folder).report_path.read_text(encoding="utf-8")
    in_the_way.rmdir()
    pipeline.run(spec, tiny_set, folder, resume=True)
    assert list(_files.read_json(folder / "metrics.json")["models"]) == ["cnn", "tl"]
    assert Run(folder).status == "finished"


@pytest.mark.slow
def test_approaches_in_processes_of_their_own_end_as_one_after_the_other(
    inline: Path, tiny_set: Path, tmp_path: Path
) -> None:
    command(tmp_path, "run", str(tiny_set), "-o", str(tmp_path / "run"), "--executor", "local", *settings())
    assert_same_figures(tmp_path / "run", inline)


# --- on a real Slurm --------------------------------------------------------------------------------------------------


def on_slurm(test: Callable[..., None]) -> Callable[..., None]:
    marked: Callable[..., None] = pytest.mark.slow(pytest.mark.slurm(pytest.mark.usefixtures("slurm")(test)))
    return marked


def settings() -> list[str]:
    return ["--preset", "smoke", *(word for setting in SETTINGS for word in ("--set", setting))]


def command(place: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Call the program with a cache of its own."""
    environment = os.environ | {"PNEUMOSCOPE_CACHE": str(place / "cache")}
    call = [sys.executable, "-m", "pneumoscope", *words]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def inline(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke preset in one process, one stage after the other."""
    place = tmp_path_factory.mktemp("inline")
    command(place, "run", str(tiny_set), "-o", str(place / "run"), *settings())
    return place / "run"


def assert_alike(found: Any, expected: Any, where: str = "metrics.json") -> None:
    """The same but for rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_alike(found[key], expected[key], f"{where}: {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_alike(found[index], value, f"{where}: {index}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-6), where
    else:
        assert found == expected, where


def assert_same_figures(folder: Path, expected: Path) -> None:
    found, wanted = (_files.read_json(run / "metrics.json") for run in (folder, expected))
    for content in (found, wanted):
        for moment in ("first", "last"):  # when the test images were looked at
            del content["test_set"][moment]
    assert_alike(found, wanted)
    tables = sorted(path.name for path in expected.glob("tables/*_yscores.csv"))
    assert len(tables) == 6
    for name in tables:
        scores = [pd.read_csv(run / "tables" / name)["y_scores"] for run in (folder, expected)]
        assert list(scores[0]) == pytest.approx(list(scores[1]), abs=1e-6), name


def span(run: Run, stage: str) -> tuple[datetime, datetime]:
    record = run.read_stages()[stage]
    return datetime.fromisoformat(record["started"]), datetime.fromisoformat(record["finished"])


@on_slurm
def test_a_run_as_batch_jobs_ends_as_in_one_process(inline: Path, tiny_set: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ["--set", "cluster.shards=2", "--executor", "slurm", "--wait"]
    done = command(tmp_path, "run", str(tiny_set), "-o", str(folder), *settings(), *more)
    assert "  evaluate: completed" in done.stdout.splitlines()
    assert Run(folder).status == "finished"
    assert_same_figures(folder, inline)
    spans = [span(Run(folder), f"train-{name}") for name in ("cnn", "tl", "ft")]
    assert max(start for start, _ in spans) < min(end for _, end in spans), "the approaches trained at the same time"
    shown = command(tmp_path, "jobs", str(folder)).stdout
    assert re.search(r"^train-cnn +\d+ +COMPLETED +1/1 +0\.\d{4} +\S+\.out$", shown, re.MULTILINE)
    again = command(tmp_path, "run", str(tiny_set), "-o", str(folder), *settings(), "--resume", "--executor", "slurm")
    assert again.stdout == f"{folder} is finished already.\n"


@on_slurm
def test_a_job_that_fails_leaves_the_other_approaches_measured_and_its_reason_on_the_screen(
    inline: Path, tiny_set: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    in_the_way = Run(folder).table_path("cnn", "loss_per_epoch")
    more = ["--models", "cnn,tl", "--executor", "slurm", "--wait"]
    words = ["run", str(tiny_set), "-o", str(folder), *settings(), *more]
    begun(folder, tiny_set, SPEC.with_overrides(["models=cnn,tl"]))
    in_the_way.mkdir(parents=True)
    done = command(tmp_path, *words, status=1)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("  train-cnn: failed")]
    assert re.search(r"its log \S+\.out ends: .*Cannot write .*cnn_loss_per_epoch\.csv", line)
    assert f"The run in {folder} is failed: cnn was not trained. train-cnn: Cannot write {in_the_way}" in done.stderr
    assert list(_files.read_json(folder / "metrics.json")["models"]) == ["tl"]
    in_the_way.rmdir()
    command(tmp_path, *words, "--resume")
    tables = sorted(folder.glob("tables/*_yscores.csv"))
    assert len(tables) == 4
    for path in tables:
        scores = [pd.read_csv(run / "tables" / path.name)["y_scores"] for run in (folder, inline)]
        assert list(scores[0]) == pytest.approx(list(scores[1]), abs=1e-6), path.name


LONG = ["models=cnn", "image.size_px=32", "train.epochs=1000", "train.patience=1000", "train.plateau_patience=1000"]


def history(folder: Path) -> list[str]:
    return [(folder / "tables" / f"cnn_{kind}_per_epoch.csv").read_text() for kind in ("loss", "accuracy")]


@on_slurm
def test_a_job_at_its_time_limit_goes_back_into_the_queue_and_ends_with_the_history_of_one_left_alone(
    tiny_set: Path, tmp_path: Path
) -> None:
    words = [*settings(), *(word for setting in LONG for word in ("--set", setting))]
    alone, limited = tmp_path / "alone", tmp_path / "limited"
    limit = ["--time", "1", "--set", "cluster.signal_delay_s=35", "--executor", "slurm", "--wait"]
    command(tmp_path, "run", str(tiny_set), "-o", str(alone), *words)
    command(tmp_path, "run", str(tiny_set), "-o", str(limited), *words, *limit)
    (log,) = [state.log for state in jobs.states(limited / "jobs") if state.name == "train-cnn"]
    assert "Stopped in epoch" in log.read_text(), "the job was warned at least once"
    assert history(limited) == history(alone)
    assert_alike(
        _files.read_json(limited / "metrics.json")["models"], _files.read_json(alone / "metrics.json")["models"]
    )


@on_slurm
def test_jobs_in_the_queue_keep_others_from_the_run_until_they_are_cancelled(tiny_set: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["run", str(tiny_set), "-o", str(folder), *settings(), "--models", "cnn", "--resume"]
    command(tmp_path, *words, "--executor", "slurm", "--set", 'cluster.extra.begin="now+1hour"')
    assert Run(folder).status == "queued"
    for executor in ("inline", "slurm"):
        refused = command(tmp_path, *words, "--executor", executor, status=1)
        assert f"{folder} has batch jobs in the queue" in refused.stderr
    done = command(tmp_path, "jobs", str(folder), "cancel")
    assert done.stdout == f"Cancelled. The run in {folder} goes on with the same command and --resume.\n"
    until = time.monotonic() + 30
    while alive(folder / "jobs") and time.monotonic() < until:
        time.sleep(0.2)
    assert Run(folder).status == "stopped"
    command(tmp_path, *words)
    assert Run(folder).status == "finished"


@on_slurm
def test_in_an_allocation_the_run_is_done_in_place(tiny_set: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = [sys.executable, "-m", "pneumoscope", "run", str(tiny_set), "-o", str(folder), *settings(), "--models", "cnn"]
    held = ["srun", "--cpus-per-task=1", "--mem=2G", "--time=10", *run, "--executor", "slurm", "--interactive"]
    environment = os.environ | {"PNEUMOSCOPE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(held, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Run(folder).status == "finished"
    assert Run(folder).read_stages()["train-cnn"]["job"]
    assert not (folder / "jobs").exists()


def test_outside_an_allocation_there_is_nothing_to_run_in(tiny_set: Path, tmp_path: Path) -> None:
    words = ["run", str(tiny_set), "-o", str(tmp_path / "run"), "--executor", "slurm", "--interactive"]
    done = command(tmp_path, *words, status=2)
    assert done.stderr == (
        "pneumoscope: This process is in no Slurm job; get an allocation with salloc or srun --pty, or leave "
        "--interactive away.\n"
    )
    assert not (tmp_path / "run").exists()


@on_slurm
def test_the_script_of_the_documentation_goes_on_after_a_warning(tiny_set: Path, tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "cluster.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    folder, log = tmp_path / "run", tmp_path / "job.log"
    run = shlex.join([sys.executable, "-m", "pneumoscope", "run", str(tiny_set), "-o", str(folder), *settings()])
    long = shlex.join(word for setting in [*LONG, "train.epochs=200"] for word in ("--set", setting))
    for shown, real in {
        "source ~/pneumoscope/bin/activate\n": "",
        "/scratch/$USER/pneumoscope KERAS_BACKEND=jax": str(tmp_path / "cache"),
        'pneumoscope run "$XRAYS" -o runs/mine': f"{run} {long}",
        "--cpus-per-task=8": "--cpus-per-task=1",
        "--mem=32G": "--mem=2G",
        "#SBATCH --gpus=1\n": "",
        "pneumoscope-%j.log": str(log),
    }.items():
        assert script.count(shown) == 1, shown
        script = script.replace(shown, real)
    (tmp_path / "own.sbatch").write_text(script)
    job = subprocess.run(
        ["sbatch", "--parsable", tmp_path / "own.sbatch"], capture_output=True, text=True, check=True
    ).stdout.strip()
    wait_until(lambda: Run(folder).read_stages().get("train-cnn", {}).get("epoch", 0) >= 2, what=log)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)  # what Slurm does before the limit
    wait_until(lambda: "Stopped in epoch" in log.read_text(), what=log)
    wait_until(lambda: Run(folder).status == "finished", what=log)


def wait_until(true: Callable[[], bool], *, what: Path) -> None:
    until = time.monotonic() + 200
    while not true():
        assert time.monotonic() < until, what.read_text() if what.exists() else f"{what} was never written"
        time.sleep(0.5)
