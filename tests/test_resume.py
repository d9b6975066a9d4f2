"""A training that is killed dozens of times, at any moment, ends as the one that was left alone, bit for bit.

Each life of it is a process that SIGKILL ends. Because loading TensorFlow takes longer than the lives themselves, they
are forked by one process, run from this file, that has loaded it and computed nothing with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pneumoscope import _backend, models, training
from pneumoscope.catalog import Catalog
from pneumoscope.errors import StoppedEarly
from pneumoscope.specs import Spec
from pneumoscope.store import ImageStore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills and forks processes as POSIX does"),
]

KILLS = 32
STEPS = 10  # an epoch: 38 images, 4 in each step
WRITE_POINTS = ("tempfile.mkstemp", "open", "os.rename", "os.chmod", "os.rename")
"""What Python says that it does, in this order, while a checkpoint is written over an earlier one."""

COMMON = [
    "image.size_px=32", "train.epochs=40", "train.batch_size=4", "train.class_weights=true", "train.threads=1",
    "augment.zoom=0.1", "augment.translation=0.1",
]  # fmt: skip
SPECS = {
    "cnn": [*COMMON, "cnn.learning_rate=0.0003", "train.patience=5", "train.plateau_patience=2", "seed=1"],
    "tl": [*COMMON, "tl.learning_rate=0.0005", "train.patience=9", "train.plateau_patience=1", "features.views=2"],
}


def spec_of(approach: str) -> Spec:
    return Spec.preset_named("smoke").with_overrides(SPECS[approach])


# --- Lives ------------------------------------------------------------------------------------------------------------


def nursery() -> None:
    """Fork a process for each line that comes in, and say how it ended."""
    _backend.prepare(threads=1)
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if not child:
            status = 1
            try:
                status = live(**task)
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def live(approach: str, folder: str, data: list[str], kind: str, at: int, after: float) -> int:
    """Train until the end that was chosen; one who reaches the training's end writes down what came of it."""
    spec, root = spec_of(approach), Path(folder)
    catalog = Catalog.read(Path(data[0]), root=Path(data[1]))
    store = ImageStore.open(Path(data[2]))
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    steps = count(1)

    def progress(done: int, total: int) -> None:
        if total != STEPS:
            return  # features
        step = next(steps)
        if kind == "step" and step == at:
            die()
        if kind == "term" and step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        if kind == "time" and step == 1:
            threading.Timer(after, die).start()

    if kind == "write":
        sys.addaudithook(dying_while_writing(root, at))
    model = models.build(approach, spec)
    try:
        history = training.train(
            model, store, catalog, spec=spec, checkpoint=root / "state.npz", progress=progress, stop=lambda: bool(told)
        )
    except StoppedEarly as error:
        return error.exit_status
    np.savez(root / "weights.npz", *model.get_weights())
    history.epochs.to_pickle(root / "epochs.pickle")
    (root / "history.json").write_text(json.dumps([history.best_epoch, history.stopped_early, history.diverged]))
    return 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_while_writing(folder: Path, at: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Die just before what a write to the folder does as its `at`-th, counting only what `WRITE_POINTS` lists."""
    done = count()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in WRITE_POINTS and str(args[0]).startswith(str(folder)):
            writes = event != "open" or args[2] & os.O_CREAT
            if writes and next(done) == at:
                die()

    return hook


# --- The test ---------------------------------------------------------------------------------------------------------


class Nursery:
    """The process that forks lives."""

    def __init__(self, cache: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PNEUMOSCOPE_CACHE": str(cache)},
        )

    def life(self, **task: Any) -> int:
        """Return how one ended: an exit status, or minus the signal that killed it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"at": 0, "after": 0.0} | task) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def nurse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nurse = Nursery(tmp_path_factory.mktemp("cache"))
    yield nurse
    nurse.close()


@pytest.fixture(scope="module")
def data(packed: tuple[Catalog, ImageStore], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Where a process finds the catalog, the images and the store."""
    catalog, store = packed
    path = tmp_path_factory.mktemp("split") / "catalog.csv"
    catalog.write(path)
    return [str(path), str(catalog.root), str(store.folder)]


def fates(seed: int) -> Iterator[dict[str, Any]]:
    """Return ends to come to, in turn: in a step, in a write, at any time, and on request."""
    rng = np.random.default_rng(seed)
    for at in count():
        yield {"kind": "step", "at": int(rng.integers(1, STEPS + 2))}
        yield {"kind": "write", "at": at % len(WRITE_POINTS) + (len(WRITE_POINTS) if rng.random() < 0.25 else 0)}
        yield {"kind": "time", "after": float(rng.uniform(0, 0.15))}
        yield {"kind": "write", "at": int(rng.integers(0, 2 * len(WRITE_POINTS)))}
        yield {"kind": "term", "at": int(rng.integers(1, STEPS))}


def whole(folder: Path) -> list[dict[str, Any]]:
    """Return the states that stand in a folder whole, the newest first."""
    found = []
    for name in ("state.npz", "state.previous.npz"):
        content = (folder / name).read_bytes() if (folder / name).exists() else b""
        if sha256(content[:-64]).hexdigest().encode() == content[-64:]:
            with np.load(folder / name) as archive:
                found.append(json.loads(archive["state"].tobytes()))
    return found


def assert_same_arrays(first: Path, second: Path, *, but: str = "") -> None:
    with np.load(first) as one, np.load(second) as other:
        assert one.files == other.files
        for name in one.files:
            assert one[name].dtype == other[name].dtype
            assert name == but or np.array_equal(one[name], other[name]), name


def tear(
    nurse: Nursery, approach: str, folder: Path, data: list[str]
) -> tuple[Counter[str], set[int], tuple[int, int]]:
    """Let a training die again and again; return how often of what, at which points of a write, and how far it came."""
    ends: Counter[str] = Counter()
    points: set[int] = set()
    reached, fate = (1, 0), fates(len(approach))
    while ends.total() - ends["term"] < KILLS:
        chosen = next(fate)
        end = nurse.life(approach=approach, folder=str(folder), data=data, **chosen)
        assert end == (75 if chosen["kind"] == "term" else -signal.SIGKILL), (chosen, reached)
        ends[chosen["kind"]] += 1
        states = whole(folder)
        assert states or reached == (1, 0)  # once a state stood, one always does
        if states:
            now = (states[0]["epoch"], states[0]["step"])
            assert now >= reached  # and nothing that was kept is lost again
            reached = now
            if chosen["kind"] == "write":
                points.add(chosen["at"] % len(WRITE_POINTS))
    return ends, points, reached


@pytest.mark.parametrize("approach", ["cnn", "tl"])
def test_a_training_killed_dozens_of_times_ends_as_the_one_left_alone(
    approach: str, nurse: Nursery, data: list[str], tmp_path: Path
) -> None:
    alone, torn = tmp_path / "alone", tmp_path / "torn"
    for folder in (alone, torn):
        folder.mkdir()
    assert nurse.life(approach=approach, folder=str(alone), data=data, kind="none") == 0
    ends, points, reached = tear(nurse, approach, torn, data)
    assert min(ends.values()) >= 6
    assert points == set(range(len(WRITE_POINTS)))
    assert nurse.life(approach=approach, folder=str(torn), data=data, kind="none") == 0
    assert sorted(path.name for path in torn.iterdir()) == sorted(path.name for path in alone.iterdir())
    one, other = (pd.read_pickle(folder / "epochs.pickle").drop(columns="seconds") for folder in (alone, torn))
    assert one.equals(other)
    assert_same_arrays(alone / "weights.npz", torn / "weights.npz")
    assert_same_arrays(alone / "state.npz", torn / "state.npz", but="state")
    assert (alone / "history.json").read_bytes() == (torn / "history.json").read_bytes()
    best_epoch, stopped_early, diverged = json.loads((alone / "history.json").read_text())
    assert (stopped_early, diverged) == (True, False)
    assert 3 < best_epoch < len(one) == one["epoch"].max() < 40
    lower = one["learning_rate"] < one["learning_rate"].max()
    assert one["epoch"][lower].min() < reached[0]  # killed after the plateau as well as before it


if __name__ == "__main__":
    nursery()
