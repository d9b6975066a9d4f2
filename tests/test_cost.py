"""What the work cost, as the stages' records tell it: all parts of an interrupted stage, and no part twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pneumoscope import _backend, pipeline
from pneumoscope.catalog import Catalog
from pneumoscope.errors import RunError, StoppedEarly
from pneumoscope.evaluation import speed
from pneumoscope.narration import Narration
from pneumoscope.runs import Run
from pneumoscope.specs import Spec
from pneumoscope.stages import Job, _Pace

SETTINGS = ["models=cnn", "image.size_px=32", "evaluation.bootstrap=0", "backbone.weights=/nowhere", "train.epochs=3"]


def job_of(folder: Path) -> Job:
    return Job(Run(folder), Spec.preset_named("smoke"), folder, Narration("silent"))


def test_a_stage_that_is_done_again_counts_what_it_took_before(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    job.run.update_stage("features", seconds=100.0, parts=2, speed={"images": 7})
    with job._recorded("features"):
        assert job.run.read_stage("features")["seconds"] == 100.0  # also while it runs: a kill loses nothing of it
    record = job.run.read_stage("features")
    assert 100.0 < record["seconds"] < 130.0
    assert (record["parts"], record["status"], record["speed"]) == (3, "finished", {"images": 7})


def test_a_stage_that_fails_counts_too(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    job.run.update_stage("features", seconds=None)  # as an older version left a killed one
    with pytest.raises(RunError), job._recorded("features"):
        raise RunError("no")
    record = job.run.read_stage("features")
    assert (record["status"], record["error"], record["parts"]) == ("failed", "no", 1)
    assert 0 < record["seconds"] < 30


def test_the_pace_leaves_out_the_first_step_and_what_was_stored_before(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0, 6.0, 7.0, 9.0])
    monkeypatch.setattr("pneumoscope.stages.time.perf_counter", lambda: next(times))
    said: list[tuple[int, int]] = []
    pace = _Pace(lambda done, total: said.append((done, total)))
    for done in (1032, 1064, 1096, 5000, 5020):  # taken up at 1000; a leap where another view was stored whole
        pace(done, 6000)
    assert said == [(done, 6000) for done in (1032, 1064, 1096, 5000, 5020)]
    assert (pace.images, pace.seconds) == (32 + 32 + 20, 5.0 + 1.0 + 2.0)


def test_no_time_gives_no_speed() -> None:
    assert speed(3, 0.0)["images_per_second"] is None
    assert speed(30, 2.0, of="stored features") == {
        "of": "stored features", "images": 30, "seconds": 2.0, "images_per_second": 15.0
    }  # fmt: skip


def test_the_machine_says_what_it_is(tmp_path: Path) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor : 0\nmodel name\t: Some   CPU @ 2.00GHz\nprocessor : 1\nmodel name : Other\n")
    assert _backend._processor(listing) == "Some CPU @ 2.00GHz"
    assert isinstance(_backend._processor(tmp_path / "none"), str)
    one = _backend.Machine("jax", {}, ("GPU: NVIDIA H100", "GPU: NVIDIA H100"), 2, "", 2, None)
    assert one.gpus == ("NVIDIA H100", "NVIDIA H100")
    assert _backend.Machine("jax", {}, ("CPU",), 2, "", 2, None).gpus == ()


def after(steps: int) -> Callable[[], bool]:
    """Ask to stop before the step after so many."""
    asked = iter(range(1_000_000))
    return lambda: next(asked) >= steps


def test_an_interrupted_training_tells_the_epochs_of_all_its_parts(tiny_set: Path, tmp_path: Path) -> None:
    spec, folder = Spec.preset_named("smoke").with_overrides(SETTINGS), tmp_path / "run"
    with pytest.raises(StoppedEarly):
        pipeline.run(spec, tiny_set, folder, stop=after(4))  # 38 images in steps of 16: in the second epoch
    stopped = Run(folder).read_stage("train-cnn")
    run = pipeline.run(spec, tiny_set, folder, resume=True)
    record = run.read_stage("train-cnn")
    n = len(Catalog.read(run.catalog_path, root=tiny_set).rows("train"))
    assert (stopped["status"], record["status"], record["parts"]) == ("stopped", "finished", 2)
    assert record["seconds"] > stopped["seconds"] > 0
    assert (record["speed"]["of"], record["speed"]["images"]) == ("images", 3 * n)
    assert 0 < record["speed"]["seconds"] < record["seconds"]
    assert record["parameters"]["total"] > record["parameters"]["trainable"] > 0
    machine = run.read_manifest()["machine"]
    assert record["machine"] == machine
    assert (machine["cores"], machine["gpus"]) == (_backend.available_cores(), list(_backend.describe().gpus))
    assert machine["memory_bytes"] > 2**28
    scored = run.read_stage("evaluate")["speeds"]["cnn"]
    assert scored["images"] == sum(
        len(Catalog.read(run.catalog_path, root=tiny_set).rows(s)) for s in ("validation", "test")
    )
    assert scored["images_per_second"] > 0
    said = run.card_path.read_text(encoding="utf-8")
    assert "in 2 part(s)" in said
    assert f"{record['parameters']['total']:,}" in said
