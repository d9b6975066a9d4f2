"""The backend: chosen by name, started quietly, with the threads that were asked for; the main job on each of them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pneumoscope import _backend
from pneumoscope.errors import RunError, UsageError

OTHERS = ("jax", "torch")
needs_backend = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"{name} not installed"))
        for name in OTHERS
    ],
)
HIDE = """
from importlib.machinery import PathFinder

def without(find=PathFinder.find_spec):
    return lambda name, *rest: None if name.partition(".")[0] in {HIDDEN} else find(name, *rest)

PathFinder.find_spec = without()
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a new Python process; a backend starts once in a process's life."""
    kept = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=kept | environment,
    )


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pretend that Keras was not imported yet: what is loaded decides before what is asked for."""
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    return monkeypatch


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)


# --- Which one --------------------------------------------------------------------------------------------------------


def test_the_environment_chooses_else_the_first_installed(unloaded: pytest.MonkeyPatch) -> None:
    installed(unloaded, "jax", "torch")
    assert _backend.chosen() == "jax"
    unloaded.setenv("KERAS_BACKEND", "torch")
    assert _backend.chosen() == "torch"
    installed(unloaded, "tensorflow", "jax")
    unloaded.setenv("KERAS_BACKEND", "")
    assert _backend.chosen() == "tensorflow"


def test_an_unknown_backend_is_refused(unloaded: pytest.MonkeyPatch) -> None:
    installed(unloaded, "tensorflow", "torch")
    unloaded.setenv("KERAS_BACKEND", "theano")
    with pytest.raises(
        UsageError, match=r"^KERAS_BACKEND is 'theano', installed are: tensorflow, torch; choose one of them\.$"
    ):
        _backend.chosen()


@pytest.mark.parametrize(("name", "package"), [("jax", r"pneumoscope\[jax\]"), ("tensorflow", "pneumoscope")])
def test_a_backend_that_is_not_installed_is_refused(name: str, package: str, unloaded: pytest.MonkeyPatch) -> None:
    installed(unloaded, "torch")
    unloaded.setenv("KERAS_BACKEND", name)
    with pytest.raises(
        UsageError,
        match=rf"^KERAS_BACKEND is '{name}', installed are: torch; pip install '{package}' or choose another\.$",
    ):
        _backend.chosen()


def test_what_is_loaded_already_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = _backend.keras.config.backend()
    monkeypatch.setenv("KERAS_BACKEND", "theano")
    assert _backend.chosen() == loaded


def test_there_is_nothing_else_to_load() -> None:
    with pytest.raises(AttributeError, match=r"^module 'pneumoscope\._backend' has no attribute 'tensorflow'$"):
        _backend.tensorflow  # noqa: B018


def test_too_little_memory_is_one_sentence_and_other_errors_pass() -> None:
    import tensorflow as tf

    def fails(error: Exception | None) -> None:
        with _backend.memory_told("look at 256 images", change="image.size_px"):
            if error is None:
                np.empty(1 << 60, np.uint8)
            else:
                raise error

    for error in (
        None,
        tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"),
        tf.errors.InternalError(None, None, "Dst tensor is not initialized."),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),  # JAX's
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ):
        with pytest.raises(RunError) as failure:
            fails(error)
        assert str(failure.value) == (
            "There is not enough memory to look at 256 images; choose a smaller image.size_px in a new folder, or a "
            "machine with more memory."
        )
    for other in (ValueError("another"), tf.errors.InternalError(None, None, "another"), RuntimeError("another")):
        with pytest.raises(type(other), match=r"^another$"):
            fails(other)


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= _backend.available_cores() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        try:
            assert _backend.available_cores() == 1
        finally:
            os.sched_setaffinity(0, allowed)


# --- How it starts ----------------------------------------------------------------------------------------------------


def test_tensorflow_starts_quietly_and_says_what_it_runs_on() -> None:
    done = python("""
import sys
from pneumoscope import _backend
from pneumoscope._backend import keras
assert sys.modules["keras"] is keras
from pneumoscope._backend import keras as again
assert again is keras
assert _backend.prepare(threads=1) == "tensorflow"
for width in range(1, 9):  # many models in one process: TensorFlow would warn of retracing
    model = keras.Sequential([keras.Input((width,)), keras.layers.Dense(1)])
    model.predict_on_batch(keras.ops.ones((2, width)))
machine = _backend.describe()
assert machine.backend == "tensorflow" == _backend.chosen(), machine
assert sorted(machine.versions) == ["keras", "python", "tensorflow"], machine
assert machine.versions["keras"] == keras.__version__
assert machine.devices and all(isinstance(device, str) for device in machine.devices)
assert machine.threads == 1, machine
assert _backend.compiles() == (machine.devices != ("CPU",))
from tensorflow.python.framework import config
assert config.is_op_determinism_enabled()
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_another_number_of_threads_after_the_start_is_refused() -> None:
    done = python("""
from pneumoscope import _backend
from pneumoscope._backend import keras
from pneumoscope.errors import RunError, UsageError
keras.ops.ones(3)  # starts with every core
cores = _backend.available_cores()
_backend.prepare()
_backend.prepare(threads=cores)
assert _backend.describe().threads == cores
try:
    _backend.prepare(threads=cores + 1)
except UsageError as error:
    assert str(error) == (
        f"TensorFlow already runs with {cores} threads, {cores + 1} were asked for; start a new Python process."
    ), error
else:
    raise SystemExit("not refused")
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
@needs_backend
def test_other_backends_start_quietly_and_say_what_they_run_on(name: str) -> None:
    done = python(
        """
import sys
from pneumoscope import _backend
name = sys.argv[1]
assert _backend.prepare(threads=1) == name == _backend.chosen()
from pneumoscope._backend import keras
assert keras.config.backend() == name
keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).predict_on_batch(keras.ops.ones((2, 2)))
machine = _backend.describe()
assert machine.backend == name and sorted(machine.versions) == sorted(["keras", "python", name]), machine
assert machine.devices, machine
if name == "torch":
    assert machine.threads == 1, machine
assert _backend.compiles() == (name == "jax")
""",
        name,
        KERAS_BACKEND=name,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- Several devices (tests/test_devices.py trains on them) -----------------------------------------------------------


@pytest.fixture
def unplaced(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Forget what the surroundings say of clusters."""
    for name in list(os.environ):
        if name.startswith(("KERAS_DISTRIBUTION", "SLURM")):
            monkeypatch.delenv(name)
    return monkeypatch


def placed(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_process_is_alone_unless_told_otherwise(unplaced: pytest.MonkeyPatch) -> None:
    assert _backend.process(4) == (0, 1)
    placed(unplaced, SLURM_PROCID="0", SLURM_NTASKS="2")  # a batch script before any srun: nobody else runs it
    assert _backend.process(4) == (0, 1)


def test_srun_says_which_of_its_tasks_this_is(unplaced: pytest.MonkeyPatch) -> None:
    placed(unplaced, SLURM_PROCID="1", SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="2")
    assert _backend.process(4) == (1, 2)
    assert _backend.process(1) == (0, 1)  # tasks that train a model each
    placed(unplaced, KERAS_DISTRIBUTION_PROCESS_ID="2", KERAS_DISTRIBUTION_NUM_PROCESSES="3")
    assert _backend.process(6) == (2, 3)  # who says it by hand is believed


@pytest.mark.parametrize(("index", "count"), [("", "2"), ("2", "2"), ("-1", "2"), ("one", "2"), ("0", "0")])
def test_processes_that_cannot_be_counted_are_refused(index: str, count: str, unplaced: pytest.MonkeyPatch) -> None:
    placed(unplaced, KERAS_DISTRIBUTION_PROCESS_ID=index, KERAS_DISTRIBUTION_NUM_PROCESSES=count)
    with pytest.raises(
        UsageError,
        match=rf"^KERAS_DISTRIBUTION_PROCESS_ID is '{index}', KERAS_DISTRIBUTION_NUM_PROCESSES is '{count}'; "
        r"set both, the first from 0 to below the other\.$",
    ):
        _backend.process(2)


@pytest.mark.usefixtures("unplaced")
def test_one_device_is_nothing_to_distribute() -> None:
    _backend.distribute(1, batch_size=7)
    assert _backend.keras.distribution.distribution() is None
    network = _backend.keras.Sequential([_backend.keras.Input((2,)), _backend.keras.layers.Dense(1)])
    before = dict(vars(network))
    _backend.split(network)
    assert vars(network) == before
    assert (_backend.agree(3), _backend.agree(3, of=min)) == (3, 3)


@pytest.mark.usefixtures("unplaced")
@pytest.mark.parametrize("name", ["tensorflow", "torch"])
def test_a_backend_that_cannot_train_on_several_devices_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "chosen", lambda: name)
    with pytest.raises(
        UsageError,
        match=rf"^train\.devices is 2, the backend {name} trains on one device only; set KERAS_BACKEND=jax "
        r"\(pip install 'pneumoscope\[jax\]', for GPUs 'pneumoscope\[cuda\]'\) or train\.devices=1\.$",
    ):
        _backend.distribute(2, batch_size=8)


@pytest.mark.usefixtures("unplaced")
def test_a_batch_that_devices_cannot_share_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^train\.batch_size is 30, which 4 devices cannot share; use a multiple of 4\.$"
    ):
        _backend.distribute(4, batch_size=30)


def test_devices_that_processes_cannot_share_are_refused(unplaced: pytest.MonkeyPatch) -> None:
    placed(unplaced, KERAS_DISTRIBUTION_PROCESS_ID="0", KERAS_DISTRIBUTION_NUM_PROCESSES="2")
    with pytest.raises(
        UsageError, match=r"^train\.devices is 3, which 2 processes cannot share; use a multiple of 2\.$"
    ):
        _backend.distribute(3, batch_size=6)


# --- The main job on each ---------------------------------------------------------------------------------------------


def assert_complete(folder: Path, *, backend: str) -> None:
    content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert list(content["models"]) == ["cnn", "tl", "ft"]
    for model, splits in content["models"].items():
        assert {split: figures["n"] for split, figures in splits.items()} == {"validation": 10, "test": 16}
        for figures in splits.values():
            for key in ("loss", "accuracy", "auc", "sensitivity", "specificity"):
                assert math.isfinite(figures[key]), (model, key)
            assert figures["false_negatives"] + figures["false_positives"] <= figures["n"]
            assert figures["operating_point"]["name"] == "youden"
        assert (folder / "models" / f"{model}.keras").stat().st_size > 1000
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "finished"
    assert manifest["machine"]["backend"] == backend


@pytest.mark.slow
@needs_backend
def test_the_main_job_runs_where_tensorflow_is_not_installed(name: str, tiny_set: Path, tmp_path: Path) -> None:
    """The backend is the one that is there, without KERAS_BACKEND."""
    hidden = ("tensorflow", "tensorboard", *(other for other in OTHERS if other != name))
    code = HIDE.replace("{HIDDEN}", repr(hidden)) + "import sys; from pneumoscope.cli import main; sys.exit(main())"
    done = python(code, "run", str(tiny_set), "-o", str(tmp_path / "run"), "--preset", "smoke")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert_complete(tmp_path / "run", backend=name)
