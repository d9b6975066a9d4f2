"""Mirrors: what TensorBoard and MLflow hold is read back with their own readers, and no mirror can spoil a run."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pneumoscope import _files, pipeline, tracking
from pneumoscope.errors import PneumoscopeError, RunError, SpecError, StoppedEarly, UsageError
from pneumoscope.narration import Narration
from pneumoscope.runs import Run
from pneumoscope.specs import RESEARCH_USE, Spec
from pneumoscope.tracking import Mirrors

HAS = {name: importlib.util.find_spec(name) is not None for name in ("tensorboard", "mlflow")}
needs_tensorboard = pytest.mark.skipif(not HAS["tensorboard"], reason="tensorboard is not installed (extra tracking)")
needs_mlflow = pytest.mark.skipif(not HAS["mlflow"], reason="mlflow is not installed (extra tracking)")

# MLflow 3.17 on SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


def spec_of(*settings: str) -> Spec:
    return Spec.preset_named("smoke").with_overrides(settings)


def row(epoch: int, **changes: float) -> dict[str, float]:
    values = {"train_accuracy": 0.5, "val_accuracy": 0.25, "train_loss": 1 / epoch, "val_loss": 2 / epoch}
    return {"epoch": epoch, **values, "learning_rate": 0.125, "seconds": 2.0} | changes


def rows(*epochs: int) -> list[dict[str, float]]:
    return [row(epoch) for epoch in epochs]


@pytest.fixture
def target(tmp_path: Path) -> Run:
    """A run whose images have been read."""
    run = Run.create(tmp_path / "first")
    machine = {"versions": {"python": "3.11", "keras": "3.15"}}
    run.update_manifest(data="/data/of/somebody", data_hash="d" * 64, note="SYNTHETIC DATA", machine=machine)
    return run


def finish(run: Run, *names: str, epochs: Sequence[int] = (1, 2)) -> None:
    """Leave what a training and a measurement leave."""
    _files.write_text(run.spec_path, spec_of().to_toml())
    for name in names:
        losses = [[one, 1 / one, 2 / one] for one in epochs]
        _files.write_csv(run.table_path(name, "loss_per_epoch"), ["epoch", "train_loss", "val_loss"], losses)
        right = [[one, 0.5, 0.25] for one in epochs]
        head = ["epoch", "train_accuracy", "val_accuracy"]
        _files.write_csv(run.table_path(name, "accuracy_per_epoch"), head, right)
        for figure in ("learning_curve_loss", "roc_curve_testing"):
            _files.write_bytes(run.figure_path(f"{name}_{figure}"), b"png")
    for figure in ("train_samples_normal", "near_duplicates", "train_data_dist_barplot"):
        _files.write_bytes(run.figure_path(figure), b"png")
    part: dict[str, Any] = {"n": 8, "auc": 0.75, "accuracy": 0.5, "f1": None, "false_negatives": 3}
    part |= {"operating_point": {"name": "youden", "threshold": 0.3, "accuracy": 0.625}}
    models = {name: {"validation": part, "test": part | {"auc": 0.625}} for name in names}
    _files.write_json(run.metrics_path, {"models": models})
    _files.write_text(run.metrics_csv_path, "model,split,metric,value\n")


def voice_and_words() -> tuple[Narration, Callable[[], list[str]]]:
    stream = io.StringIO()
    return Narration("plain", stream=stream), lambda: stream.getvalue().splitlines()


# --- the Spec --------------------------------------------------------------------------------------------------------


def test_no_figure_depends_on_a_mirror() -> None:
    asked = spec_of("tracking.tensorboard=true", "tracking.mlflow=sqlite:///m.db", "tracking.mlflow_experiment=other")
    assert asked.hash == spec_of().hash
    assert asked != spec_of()


@pytest.mark.parametrize("uri", ["sqlite:///m.db", "sqlite:////a/b@c.db", "https://host:5000/x", "postgresql://h/db"])
def test_stores_that_mlflow_takes(uri: str) -> None:
    assert spec_of(f"tracking.mlflow={uri}").tracking.mlflow == uri


@pytest.mark.parametrize(
    "uri", ["./mlruns", "file:///a", "mlruns.db", "sqlite://m.db", "sqlite:///", "https://me:secret@host", "ftp://h"]
)
def test_stores_that_cannot_be_are_refused_with_what_can(uri: str) -> None:
    with pytest.raises(SpecError, match=r"local store as sqlite:///mlruns\.db .* MLFLOW_TRACKING_PASSWORD instead"):
        spec_of(f"tracking.mlflow={uri}")


# --- what every mirror has in common ---------------------------------------------------------------------------------


class Recorder:
    """A mirror that keeps what it was told, and fails where it shall."""

    title = "Recorder"

    def __init__(self, fails_at: str = "", hangs_at: str = "") -> None:
        self.told: list[str] = []
        self.fails_at, self.hangs_at, self.released = fails_at, hangs_at, threading.Event()

    def __getattr__(self, name: str) -> Callable[..., None]:
        def tell(*values: Any) -> None:
            self.told.append(name)
            if name == self.fails_at:
                raise OSError("//me:secret@host is gone\nand more")
            if name == self.hangs_at:
                self.released.wait(30)

        return tell

    def how_to_look(self) -> str:
        return "here"


def mirrors_of(target: Run, mirror: Recorder, voice: Narration) -> Mirrors:
    made = Mirrors(target, spec_of(), voice)
    made._mirrors.append(mirror)
    return made


def test_where_nothing_is_asked_for_nothing_is_done(target: Run) -> None:
    before, threads = sorted(target.folder.rglob("*")), threading.active_count()
    voice, words = voice_and_words()
    mirrors = Mirrors(target, spec_of(), voice)
    mirrors.open()
    with mirrors.during("evaluate"):
        mirrors.begin()
        mirrors.epoch("cnn", row(1))
        mirrors.trained("cnn", rows(1))
        mirrors.measured()
    assert words() == []
    assert (sorted(target.folder.rglob("*")), threading.active_count()) == (before, threads)


def test_a_mirror_is_told_in_order_and_the_thread_ends_with_the_stage(target: Run) -> None:
    mirror, (voice, words) = Recorder(), voice_and_words()
    mirrors, threads = mirrors_of(target, mirror, voice), threading.active_count()
    mirrors.open()
    with mirrors.during("train-cnn"):
        mirrors.begin()
        mirrors.epoch("cnn", row(1))
        mirrors.trained("cnn", rows(1))
    assert mirror.told == ["open", "begin", "epoch", "trained", "ended"]
    assert words() == ["  Recorder: here"]
    assert threading.active_count() == threads


@pytest.mark.parametrize("moment", ["open", "begin", "epoch", "measured", "ended"])
def test_a_mirror_that_fails_is_named_once_and_left(target: Run, moment: str) -> None:
    mirror, (voice, words) = Recorder(fails_at=moment), voice_and_words()
    mirrors = mirrors_of(target, mirror, voice)
    mirrors.open()
    for stage in ("images", "train-cnn", "evaluate"):
        with mirrors.during(stage):
            mirrors.begin()
            mirrors.epoch("cnn", row(1))
            mirrors.measured()
    assert mirror.told.count(moment) == 1
    assert mirror.told[-1] == moment
    kept = f"nothing is lost: {target.folder} holds everything."
    assert words()[1:] == [f"Warning: Recorder is left out from here on (//host is gone); {kept}"]


def test_a_mirror_that_does_not_answer_is_waited_for_once(target: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.05)
    mirror, (voice, words) = Recorder(hangs_at="epoch"), voice_and_words()
    mirrors = mirrors_of(target, mirror, voice)
    try:
        for stage in ("train-cnn", "evaluate"):
            with mirrors.during(stage):
                mirrors.epoch("cnn", row(1))
                mirrors.measured()
        assert mirror.told == ["epoch"]
        assert [line for line in words() if "no answer in" in line] == words()
        assert len(words()) == 1
    finally:
        mirror.released.set()


@pytest.mark.parametrize("error", [StoppedEarly("x"), RunError("x"), KeyboardInterrupt(), ValueError("x")])
def test_an_error_of_the_run_passes_by_unchanged(target: Run, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, mirrors_of(target, Recorder(), Narration("silent")).during("train-cnn"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("settings", "lacking", "message"),
    [
        (["tracking.tensorboard=true"], ["tensorboard"], "tracking.tensorboard cannot work: tensorboard is not"),
        (["tracking.mlflow=sqlite:///a.db"], ["alembic"], "tracking.mlflow cannot work: alembic is not"),
        (["tracking.mlflow=http://h:1"], ["mlflow", "alembic"], "tracking.mlflow cannot work: mlflow is not"),
        (
            ["tracking.mlflow=sqlite:///a.db", "tracking.tensorboard=true"],
            ["mlflow", "tensorboard"],
            "tracking.tensorboard and tracking.mlflow cannot work: tensorboard, mlflow are not",
        ),
    ],
)
def test_a_missing_package_is_named_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, settings: list[str], lacking: list[str], message: str
) -> None:
    monkeypatch.setattr(tracking, "_installed", lambda name: name not in lacking)
    with pytest.raises(UsageError) as caught:
        tracking.require(spec_of(*settings))
    assert str(caught.value) == (
        f"{message} installed here; pip install 'pneumoscope[tracking]', or leave it off (--resume can switch it on "
        "later)."
    )
    tracking.require(spec_of())


def test_a_run_with_a_missing_package_ends_at_its_start(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_installed", lambda name: False)
    spec = spec_of("models=cnn", "tracking.tensorboard=true")
    with pytest.raises(UsageError, match=r"pip install 'pneumoscope\[tracking\]'"):
        pipeline.run(spec, tiny_set, tmp_path / "run")
    assert not Run(tmp_path / "run").catalog_path.exists()


def test_a_folder_is_not_taken_for_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "surely_no_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.util.find_spec("surely_no_package") is not None
    assert not tracking._installed("surely_no_package")
    assert tracking._installed("json")


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def scalars(run: Run, name: str) -> dict[str, list[tuple[int, float]]]:
    """Return every series of an approach, as TensorBoard's own reader has it."""
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    reader = module.EventAccumulator(str(run.folder / "tensorboard" / name))
    reader.Reload()
    return {tag: [(one.step, one.value) for one in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def mirrored(target: Run, *did: Callable[[Mirrors], None], stage: str = "train-cnn", spec: Spec | None = None) -> None:
    """Do something with mirrors of a process of its own."""
    voice, words = voice_and_words()
    mirrors = Mirrors(target, spec or spec_of("tracking.tensorboard=true"), voice)
    with mirrors.during(stage):
        for do in did:
            do(mirrors)
    assert words() == []


def epochs(*numbers: int) -> Callable[[Mirrors], None]:
    def tell(mirrors: Mirrors) -> None:
        for number in numbers:
            mirrors.epoch("cnn", row(number))

    return tell


def whole(*numbers: int) -> Callable[[Mirrors], None]:
    return lambda mirrors: mirrors.trained("cnn", rows(*numbers))


@needs_tensorboard
def test_tensorboard_has_every_epoch_and_the_final_figures(target: Run) -> None:
    mirrored(target, epochs(1, 2), whole(1, 2))
    finish(target, "cnn")
    mirrored(target, Mirrors.measured, stage="evaluate")
    assert scalars(target, "cnn") == {
        "loss/train": [(1, 1.0), (2, 0.5)],
        "loss/validation": [(1, 2.0), (2, 1.0)],
        "accuracy/train": [(1, 0.5), (2, 0.5)],
        "accuracy/validation": [(1, 0.25), (2, 0.25)],
        "learning_rate": [(1, 0.125), (2, 0.125)],
        "seconds": [(1, 2.0), (2, 2.0)],
    } | {
        f"final_{split}/{name}": [(0, value)]
        for split, auc in (("validation", 0.75), ("test", 0.625))
        for name, value in (
            ("n", 8.0),
            ("auc", auc),
            ("accuracy", 0.5),
            ("false_negatives", 3.0),
            ("accuracy_at_youden", 0.625),
        )
    }


@needs_tensorboard
@pytest.mark.parametrize(
    "processes",
    [
        [[epochs(1, 2)], [epochs(3, 4), whole(1, 2, 3, 4)]],  # stopped after an epoch, and resumed
        [[epochs(1, 2, 3)], [epochs(3, 4), whole(1, 2, 3, 4)]],  # an epoch twice
        [[epochs(1)], [epochs(3, 4), whole(1, 2, 3, 4)]],  # killed before it was mirrored
        [[epochs(1, 2, 3)], [epochs(1, 2, 3, 4), whole(1, 2, 3, 4)]],  # a damaged checkpoint: begun anew
        [[epochs(3, 4), whole(1, 2, 3, 4)]],  # switched on later
        [[epochs(1)], [epochs(2)], [epochs(3, 4), whole(1, 2, 3, 4)]],  # stopped often
    ],
)
def test_a_resumed_training_has_each_step_once(target: Run, processes: list[list[Callable[[Mirrors], None]]]) -> None:
    for did in processes:
        mirrored(target, *did)
    for tag in ("loss/train", "accuracy/validation", "learning_rate"):
        assert [step for step, _ in scalars(target, "cnn")[tag]] == [1, 2, 3, 4]


@needs_tensorboard
def test_a_training_that_was_not_mirrored_is_brought_in_from_the_tables(target: Run) -> None:
    finish(target, "cnn", "tl", epochs=(1, 2, 3))
    for _ in range(2):  # measured twice, nothing is doubled
        mirrored(target, Mirrors.measured, stage="evaluate")
    for name in ("cnn", "tl"):
        found = scalars(target, name)
        assert [step for step, _ in found["loss/validation"]] == [1, 2, 3]
        assert found["final_test/auc"] == [(0, 0.625)]


@needs_tensorboard
def test_what_is_no_number_is_left_out(target: Run) -> None:
    mirrored(target, lambda mirrors: mirrors.epoch("cnn", row(1, val_loss=float("nan"))))
    found = scalars(target, "cnn")
    assert "loss/validation" not in found
    assert found["loss/train"] == [(1, 1.0)]


@needs_tensorboard
def test_tensorboard_has_the_settings_as_hyperparameters(target: Run) -> None:
    finish(target, "cnn")
    mirrored(target, Mirrors.measured, stage="evaluate")
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    reader = module.EventAccumulator(str(target.folder / "tensorboard" / "cnn"))
    reader.Reload()
    plugin = importlib.import_module("tensorboard.plugins.hparams.plugin_data_pb2").HParamsPluginData
    content = reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = plugin.FromString(content).session_start_info.hparams
    assert found["train.batch_size"].number_value == 16
    assert found["backbone.name"].string_value == "efficientnet_lite0"
    assert not [key for key in found if key.startswith(("cluster", "tracking"))]


@needs_tensorboard
def test_tensorflow_is_not_loaded_for_tensorboard(target: Run) -> None:
    finish(target, "cnn")
    program = f"""
import sys
from pathlib import Path
from pneumoscope.narration import Narration
from pneumoscope.runs import Run
from pneumoscope.specs import Spec
from pneumoscope.tracking import Mirrors
spec = Spec.preset_named("smoke").with_overrides(["tracking.tensorboard=true"])
mirrors = Mirrors(Run(Path({str(target.folder)!r})), spec, Narration())
with mirrors.during("evaluate"):
    mirrors.epoch("cnn", {row(1)})
    mirrors.measured()
print([name for name in ("tensorflow", "keras", "jax", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert list((target.folder / "tensorboard" / "cnn").glob("*.final"))


@needs_tensorboard
def test_a_folder_that_cannot_be_written_costs_one_warning(target: Run) -> None:
    _files.write_text(target.folder / "tensorboard", "in the way")
    voice, words = voice_and_words()
    mirrors = Mirrors(target, spec_of("tracking.tensorboard=true"), voice)
    mirrors.open()
    with mirrors.during("train-cnn"):
        mirrors.epoch("cnn", row(1))
    with mirrors.during("train-tl"):
        mirrors.epoch("tl", row(1))
    assert [line for line in words() if line.startswith("Warning")] == words()[1:]
    assert len(words()) == 2
    assert "TensorBoard is left out from here on" in words()[1]


# --- MLflow ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store as MLflow makes it, which takes it seconds; never write into it."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    importlib.import_module("mlflow").MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> str:
    _files.write_bytes(tmp_path / "runs.db", empty_store.read_bytes())
    return f"sqlite:///{tmp_path / 'runs.db'}"


def client_of(store: str) -> Any:
    return importlib.import_module("mlflow").MlflowClient(store)


def runs_in(store: str) -> dict[str, Any]:
    """Return the runs of the experiment by their names."""
    client = client_of(store)
    experiment = client.get_experiment_by_name("pneumoscope")
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def steps(store: str, run: Any, tag: str) -> list[int]:
    return [one.step for one in client_of(store).get_metric_history(run.info.run_id, tag)]


@needs_mlflow
@pytest.mark.slow
def test_mlflow_has_a_run_for_each_approach_under_one(target: Run, store: str) -> None:
    spec = spec_of(f"tracking.mlflow={store}")
    mirrored(target, Mirrors.begin, stage="images", spec=spec)
    mirrored(target, epochs(1, 2), whole(1, 2), spec=spec)
    finish(target, "cnn", "tl")
    for _ in range(2):
        mirrored(target, Mirrors.measured, stage="evaluate", spec=spec)
    found = runs_in(store)
    assert sorted(found) == ["first", "first cnn", "first tl"]
    parent = found["first"]
    for name in ("cnn", "tl"):
        run = found[f"first {name}"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (run.data.tags["approach"], run.data.tags["data_hash"]) == (name, "d" * 64)
        assert run.data.tags["version.keras"] == "3.15"
        assert run.data.tags["mlflow.note.content"] == f"{RESEARCH_USE}. SYNTHETIC DATA."
        assert run.data.params["train.batch_size"] == "16"
        assert run.data.metrics["final_test/auc"] == 0.625
        assert run.data.metrics["final_validation/accuracy_at_youden"] == 0.625
        assert "final_test/f1" not in run.data.metrics
        assert sorted(steps(store, run, "loss/validation")) == [1, 2]
        assert steps(store, run, "final_test/auc") == [0]
    assert steps(store, found["first cnn"], "learning_rate") == [1, 2]
    assert parent.data.metrics["cnn/final_test/auc"] == 0.625
    assert not [key for key in parent.data.params if key.startswith(("cluster", "tracking"))]


@needs_mlflow
@pytest.mark.slow
def test_no_radiograph_and_no_path_leaves(target: Run, store: str, tmp_path: Path) -> None:
    finish(target, "cnn")
    mirrored(target, Mirrors.begin, Mirrors.measured, stage="evaluate", spec=spec_of(f"tracking.mlflow={store}"))
    sent = {path.name for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()}
    curves = {"cnn_learning_curve_loss.png", "cnn_roc_curve_testing.png", "train_data_dist_barplot.png"}
    assert sent == curves | {"metrics.json", "metrics.csv", "spec.toml"}
    for run in runs_in(store).values():
        assert "/data/of/somebody" not in json.dumps(run.to_dictionary())


@needs_mlflow
@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_mlflow_run(target: Run, store: str) -> None:
    spec = spec_of(f"tracking.mlflow={store}")

    def stopped(mirrors: Mirrors) -> None:
        epochs(1, 2)(mirrors)
        raise StoppedEarly("x")

    mirrored(target, Mirrors.begin, stage="images", spec=spec)
    with pytest.raises(StoppedEarly):
        mirrored(target, stopped, spec=spec)
    before = runs_in(store)
    assert {name: run.info.status for name, run in before.items()} == {"first": "KILLED", "first cnn": "KILLED"}
    mirrored(target, epochs(2, 3), whole(1, 2, 3), spec=spec)
    after = runs_in(store)
    assert {name: run.info.run_id for name, run in after.items()} == {
        name: run.info.run_id for name, run in before.items()
    }
    assert after["first cnn"].info.status == "RUNNING"
    assert steps(store, after["first cnn"], "loss/train") == [1, 2, 3]
    with pytest.raises(RunError):
        mirrored(target, lambda mirrors: (_ for _ in ()).throw(RunError("x")), stage="evaluate", spec=spec)
    assert runs_in(store)["first"].info.status == "FAILED"


@needs_mlflow
@pytest.mark.slow
def test_a_run_that_was_deleted_in_the_store_or_another_store_makes_a_new_one(target: Run, store: str) -> None:
    spec = spec_of(f"tracking.mlflow={store}")
    mirrored(target, Mirrors.begin, epochs(1), spec=spec)
    for run in runs_in(store).values():
        client_of(store).delete_run(run.info.run_id)
    mirrored(target, epochs(2), whole(1, 2), spec=spec)
    assert sorted(steps(store, runs_in(store)["first cnn"], "loss/train")) == [1, 2]
    other = store.replace("runs.db", "other.db")
    mirrored(target, whole(1, 2), spec=spec_of(f"tracking.mlflow={other}"))
    assert sorted(runs_in(other)) == ["first", "first cnn"]


@needs_mlflow
@pytest.mark.slow
def test_a_fold_stands_under_the_run_that_it_repeats(target: Run, store: str) -> None:
    spec = spec_of(f"tracking.mlflow={store}")
    mirrored(target, Mirrors.begin, stage="images", spec=spec)
    fold = Run.create(target.repeat_folder("folds", 2))
    mirrored(fold, Mirrors.begin, epochs(1), spec=spec)
    found = runs_in(store)
    assert sorted(found) == ["first", "first folds 2", "first folds 2 cnn"]
    assert found["first folds 2"].data.tags["mlflow.parentRunId"] == found["first"].info.run_id
    assert found["first folds 2 cnn"].data.tags["mlflow.parentRunId"] == found["first folds 2"].info.run_id


@needs_mlflow
@pytest.mark.slow
@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://127.0.0.1:9", r"\[Errno \d+\] Connection refused"),
        ("sqlite:////proc/no/such/place.db", r"\[Errno 2\] No such file or directory: '/proc/no.*'"),
    ],
)
def test_a_store_that_cannot_be_reached_costs_one_warning(target: Run, uri: str, reason: str) -> None:
    voice, words = voice_and_words()
    mirrors = Mirrors(target, spec_of(f"tracking.mlflow={uri}"), voice)
    mirrors.open()
    for stage in ("images", "train-cnn"):
        with mirrors.during(stage):
            mirrors.begin()
            epochs(1, 2)(mirrors)
    assert len(words()) == 2
    assert re.fullmatch(rf"Warning: MLflow is left out from here on \({reason}\); nothing is lost: .+", words()[1])


# --- a real run ------------------------------------------------------------------------------------------------------


@needs_tensorboard
@needs_mlflow
@pytest.mark.slow
def test_a_real_run_is_stopped_resumed_and_mirrored_whole(tiny_set: Path, tmp_path: Path, store: str) -> None:
    settings = ["image.size_px=32", "evaluation.bootstrap=0", "train.epochs=4", "models=cnn"]
    asked = spec_of(*settings, f"tracking.mlflow={store}", "tracking.tensorboard=true")
    calls = iter(range(10_000))
    with pytest.raises(StoppedEarly):
        pipeline.run(asked, tiny_set, tmp_path / "run", stop=lambda: next(calls) == 7)
    first = {name: run.info.run_id for name, run in runs_in(store).items()}
    stream = io.StringIO()
    run = pipeline.run(asked, tiny_set, tmp_path / "run", resume=True, narration=Narration("plain", stream=stream))
    assert "Warning: MLflow" not in stream.getvalue()
    assert "Warning: TensorBoard" not in stream.getvalue()
    assert {name: one.info.run_id for name, one in runs_in(store).items()} == first
    cnn = runs_in(store)["run cnn"]
    table = _files.read_csv(run.table_path("cnn", "loss_per_epoch"))
    losses = [float(cells["val_loss"]) for cells in table]
    assert [step for step, _ in scalars(run, "cnn")["loss/validation"]] == [1, 2, 3, 4]
    assert [value for _, value in scalars(run, "cnn")["loss/validation"]] == pytest.approx(losses, rel=1e-6)
    history = client_of(store).get_metric_history(cnn.info.run_id, "loss/validation")
    assert [(one.step, one.value) for one in history] == list(enumerate(losses, start=1))
    figures = _files.read_json(run.metrics_path)["models"]["cnn"]["test"]
    assert cnn.data.metrics["final_test/auc"] == figures["auc"]
    assert cnn.info.status == "FINISHED"


@needs_tensorboard
@pytest.mark.slow
def test_a_resumed_run_may_switch_a_mirror_on(tiny_set: Path, tmp_path: Path) -> None:
    settings = ["image.size_px=32", "evaluation.bootstrap=0", "train.epochs=3", "models=cnn"]
    calls = iter(range(10_000))
    with pytest.raises(PneumoscopeError):
        pipeline.run(spec_of(*settings), tiny_set, tmp_path / "run", stop=lambda: next(calls) == 4)
    run = pipeline.run(spec_of(*settings, "tracking.tensorboard=true"), tiny_set, tmp_path / "run", resume=True)
    assert [step for step, _ in scalars(run, "cnn")["loss/train"]] == [1, 2, 3]
