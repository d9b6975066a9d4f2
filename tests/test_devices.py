"""Several devices train one model: simulated ones in one process, and processes that find one another on loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pneumoscope.catalog import Catalog
from pneumoscope.store import ImageStore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="jax not installed"),
]

# Trains as a run does to the end, scores, stores features; then trains again, is stopped and taken up again. The 38
# images leave a last batch of 6.
PROGRAM = """
import json, sys
from pathlib import Path
data, cache, out, devices, stops = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5]
from pneumoscope import _backend
from pneumoscope.specs import Spec
spec = Spec.preset_named("smoke").with_overrides([
    "image.size_px=32", "augment.zoom=0.1", "augment.translation=0.1", "train.epochs=2", "train.batch_size=8",
    "train.class_weights=true", "train.devices=" + devices,
])
_backend.prepare(threads=1)
_backend.distribute(spec.train.devices, batch_size=spec.train.batch_size)
import jax
import numpy as np
from pneumoscope import features, inference, models, training
from pneumoscope._backend import keras
from pneumoscope.catalog import Catalog
from pneumoscope.errors import StoppedEarly
from pneumoscope.specs import SplitSpec
from pneumoscope.store import ImageStore

seen = set()

class Scaling(keras.layers.Rescaling):  # every image passes it, in training and in scoring
    def call(self, inputs):
        if isinstance(inputs, jax.core.Tracer):
            note = lambda sharding, n=inputs.shape[0]: seen.add((n, sharding.shard_shape(inputs.shape)[0]))
            jax.debug.inspect_array_sharding(inputs, callback=note)
        return super().call(inputs)

keras.layers.Rescaling = Scaling
catalog = Catalog.scan(data).split(SplitSpec(), seed=42)
store = ImageStore.pack(catalog, size_px=32, cache=cache)

def weights(model):
    return {weight.path: keras.ops.convert_to_numpy(weight) for weight in model.weights}

def train(**options):
    model = models.build("cnn", spec)
    return model, training.train(model, store, catalog, spec=spec, **options)

index, count = _backend.process(spec.train.devices)
model, history = train()
rows = history.epochs.drop(columns="seconds").to_dict("list")
scores = inference.score(model, store, catalog.rows("test"), batch_size=8).table["score"].to_numpy()
model.save(out / f"{index}.keras")
again = inference.load_model(out / f"{index}.keras", approach="cnn", spec=spec)
assert all(np.array_equal(a, b) for a, b in zip(weights(model).values(), weights(again).values(), strict=True))

def extracted(cache):
    rows, fresh = store.rows_of(catalog.rows("test")), models.build("cnn", spec)
    found = features.extract(fresh, ["block1_pool"], store=store, rows=rows, learned=rows, spec=spec, cache=cache)
    return np.array(found["block1_pool"].views[0])

stored = extracted(out / "features")
if count > 1:  # one of them has it already, the other not
    assert np.array_equal(stored, extracted(out / ("features" if index else "other")))

def leave(**more):
    placed = model.weights[0].value.sharding.num_devices
    np.savez(out / f"{index}.npz", scores=scores, features=stored, **weights(model))
    (out / f"{index}.json").write_text(json.dumps({"rows": rows, "seen": sorted(seen), "placed": placed, **more}))
    sys.exit()

if stops == "-1":
    leave(stopped="", written=False)
asked, checkpoint = [], out / f"checkpoint-{index}.npz"
def stop():
    asked.append(None)
    return stops == str(index) and len(asked) == 8  # in the second epoch
try:
    train(checkpoint=checkpoint, stop=stop)
    raise SystemExit("not stopped")
except StoppedEarly as error:
    stopped = str(error)
written = checkpoint.exists()
with _backend.in_turn():  # on a cluster they see one file; here each looks for its own
    if not index:
        for other in range(1, count):
            (out / f"checkpoint-{other}.npz").write_bytes(checkpoint.read_bytes())
resumed, resumed_history = train(checkpoint=checkpoint)
assert resumed_history.epochs.drop(columns="seconds").to_dict("list") == rows
assert all(np.array_equal(a, b) for a, b in zip(weights(model).values(), weights(resumed).values(), strict=True))
leave(stopped=stopped, written=written)
"""

STOPPED = "Stopped in epoch 2, step 2, on request; run the same command with --resume."


@dataclass(frozen=True)
class Outcome:
    """What one process of `PROGRAM` left."""

    rows: dict[str, list[float]]
    seen: list[list[int]]
    stopped: str
    written: bool
    placed: int
    arrays: dict[str, npt.NDArray[Any]]

    @classmethod
    def of(cls, folder: Path, index: int) -> Outcome:
        with np.load(folder / f"{index}.npz") as archive:
            arrays = {name: archive[name] for name in archive.files}
        return cls(arrays=arrays, **json.loads((folder / f"{index}.json").read_text(encoding="utf-8")))


class Place:
    """Where `PROGRAM` finds its images and leaves what it did."""

    def __init__(self, data: Path, cache: Path, folder: Path) -> None:
        self._data, self._cache, self._folder = data, cache, folder

    def run(self, name: str, *environments: dict[str, str], devices: int, stops: int) -> list[Outcome]:
        """Start one process for each environment, `stops` of which is asked to stop; return what each left."""
        out = self._folder / name
        out.mkdir()
        arguments = [str(self._data), str(self._cache), str(out), str(devices), str(stops)]
        # what one training compiles, the next need not
        kept = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        started = [start(PROGRAM, *arguments, **kept, **environment) for environment in environments]
        ended = [finish(process) for process in started]
        assert ended == [(0, "", "")] * len(started), ended
        return [Outcome.of(out, index) for index in range(len(started))]


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start Python on JAX, without what the surroundings say of clusters."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("KERAS", "SLURM", "JAX", "XLA"))}
    return subprocess.Popen(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kept | {"KERAS_BACKEND": "jax"} | environment,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        output, errors = process.communicate(timeout=900)
    finally:
        process.kill()
    return process.returncode, output, errors


def simulated(devices: int) -> dict[str, str]:
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def processes(index: int, count: int, address: str | None = None) -> dict[str, str]:
    """Return what tells a process by hand where it belongs."""
    numbers = {"KERAS_DISTRIBUTION_PROCESS_ID": str(index), "KERAS_DISTRIBUTION_NUM_PROCESSES": str(count)}
    return numbers if address is None else numbers | {"KERAS_DISTRIBUTION_JOB_ADDRESSES": address}


def tasks(count: int) -> list[dict[str, str]]:
    """Return what ``srun`` tells each of its tasks on this machine; JAX takes the port from the job's number."""
    ports = range(61440, 65536)
    job = ports.index(next(port for port in ports if is_free(port)))
    shared = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_TASKS": count}
    own = ({"SLURM_NTASKS": count, "SLURM_PROCID": index, "SLURM_LOCALID": index} for index in range(count))
    return [{name: str(value) for name, value in (shared | one).items()} for one in own]


def is_free(port: int) -> bool:
    with closing(socket.socket()) as listening:
        try:
            listening.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_address() -> str:
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(scope="module")
def place(tiny_set: Path, packed: tuple[Catalog, ImageStore], tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("devices")
    return Place(tiny_set, folder / "cache", folder)


@pytest.fixture(scope="module")
def alone(place: Place) -> Outcome:
    """What one device does."""
    (outcome,) = place.run("alone", {}, devices=1, stops=-1)
    return outcome


def assert_same_training(one: Outcome, other: Outcome) -> None:
    """Equal but for the order in which numbers are added.

    The bias of a convolution before a BatchNormalization has no gradient but rounding, which Adam blows up to whole
    steps; the running mean follows it and takes it away again.
    """
    assert one.arrays.keys() == other.arrays.keys()
    for name, expected in one.arrays.items():
        drifting = ("conv" in name and "bias" in name) or "moving_mean" in name
        tolerance = 1e-2 if drifting else 1e-3 if name in ("scores", "features") else 2e-6
        np.testing.assert_allclose(other.arrays[name], expected, rtol=0, atol=tolerance, err_msg=name)
    for name, column in one.rows.items():
        np.testing.assert_allclose(other.rows[name], column, rtol=0, atol=1e-3 if "val" in name else 1e-6, err_msg=name)


def test_devices_of_one_process_share_every_batch_and_train_as_one_does(place: Place, alone: Outcome) -> None:
    (outcome,) = place.run("together", simulated(4), devices=4, stops=0)
    assert_same_training(alone, outcome)
    assert (alone.placed, outcome.placed) == (1, 4)
    # of a batch, a device sees: 38 images to learn from and 10 to validate with, by 8, leave 6 and 2, which 4 devices
    # cannot share; features are of 16 at once
    assert alone.seen == [[2, 2], [6, 6], [8, 8], [16, 16]]
    assert outcome.seen == [[2, 2], [6, 6], [8, 2], [16, 4]]
    assert outcome.stopped == STOPPED


def test_tasks_of_slurm_find_one_another_and_train_as_one_device_does(place: Place, alone: Outcome) -> None:
    first, second = place.run("tasks", *tasks(2), devices=2, stops=1)
    assert_same_training(alone, first)
    assert first.rows == second.rows
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)
    assert first.placed == second.placed == 2
    assert first.seen == [[2, 1], [6, 3], [8, 4], [16, 8]]
    assert first.stopped == second.stopped == STOPPED  # though only the second was asked to
    assert (first.written, second.written) == (True, False)


REFUSED = """
import sys
from pneumoscope import _backend
from pneumoscope.errors import UsageError
_backend.prepare(threads=1)
if "started" in sys.argv:
    _backend.keras.ops.ones(3) + 1
try:
    _backend.distribute(4, batch_size=8)
except UsageError as error:
    print(error)
"""


def test_too_few_devices_are_refused() -> None:
    sentence = (
        "train.devices is 4, JAX finds 2 (CPU); set train.devices=2 or give the job more GPUs "
        "(JAX sees them with 'pneumoscope[cuda]' only).\n"
    )
    assert finish(start(REFUSED, **simulated(2))) == (0, sentence, "")


def test_too_few_devices_in_one_of_several_processes_are_refused_in_all() -> None:
    address = free_address()
    started = [start(REFUSED, **processes(index, 2, address), **simulated(2 - index)) for index in range(2)]
    sentence = (
        "train.devices is 4, JAX finds 1 (CPU) in one of 2 processes; set train.devices=2 or give the job more GPUs "
        "(JAX sees them with 'pneumoscope[cuda]' only).\n"
    )
    assert [finish(process) for process in started] == [(0, sentence, "")] * 2


@pytest.mark.parametrize("address", ["", "node1"])
def test_processes_that_do_not_know_where_the_first_is_are_refused(address: str) -> None:
    sentence = (
        f"2 processes train one model, KERAS_DISTRIBUTION_JOB_ADDRESSES is {address!r}; "
        "set it to HOST:PORT of the first of them.\n"
    )
    assert finish(start(REFUSED, **processes(0, 2, address))) == (0, sentence, "")


def test_processes_cannot_join_once_they_compute() -> None:
    ended = finish(start(REFUSED, "started", **processes(0, 2, "127.0.0.1:1")))
    assert ended == (0, "JAX has started already, 2 processes cannot join now; start a new Python process.\n", "")
