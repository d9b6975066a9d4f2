"""Checkpoints: whole at every instant, whatever dies, fills up or rots."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pneumoscope.checkpoints import Checkpoint
from pneumoscope.errors import RunError

resource = pytest.importorskip("resource")  # limits a file's size, as POSIX systems can

ARRAYS: dict[str, npt.NDArray[Any]] = {
    "weight": np.arange(3000, dtype=np.float32).reshape(3, 1000) / 7,
    "steps": np.array(5, dtype=np.int64),
    "none": np.empty((0, 2), dtype=np.uint8),
}


def checkpoint(folder: Path, signature: str = "cnn of this run") -> Checkpoint:
    return Checkpoint(folder / "state.npz", signature=signature)


def numbered(number: int) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    return {"number": number, "loss": 1 / 3, "worst": float("inf")}, {
        name: array + number for name, array in ARRAYS.items()
    }


def number_in(folder: Path, say: Callable[[str], None] | None = None) -> int | None:
    found = checkpoint(folder).load(say)
    if found is None:
        return None
    state, arrays = found
    expected, expected_arrays = numbered(state["number"])
    assert state == expected
    assert arrays.keys() == expected_arrays.keys()
    for name, array in expected_arrays.items():
        assert arrays[name].dtype == array.dtype
        assert np.array_equal(arrays[name], array)
    return int(state["number"])


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder after three saves, the last two of which stand."""
    for number in (1, 2, 3):
        checkpoint(tmp_path).save(*numbered(number))
    return tmp_path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- kept and taken up ------------------------------------------------------------------------------------------------


def test_what_was_saved_last_is_loaded_to_the_bit(three: Path) -> None:
    assert number_in(three) == 3
    assert names_in(three) == ["state.npz", "state.previous.npz"]
    (three / "state.npz").unlink()
    assert number_in(three) == 2


def test_without_a_path_nothing_is_kept() -> None:
    Checkpoint(None, signature="").save(*numbered(1))
    assert Checkpoint(None, signature="").load() is None


def test_a_folder_that_is_not_there_yet_holds_no_state_and_is_made(tmp_path: Path) -> None:
    assert number_in(tmp_path / "deep" / "er") is None
    checkpoint(tmp_path / "deep" / "er").save(*numbered(4))
    assert number_in(tmp_path / "deep" / "er") == 4


def test_a_state_of_other_work_is_refused_and_left_alone(three: Path) -> None:
    with pytest.raises(RunError) as caught:
        checkpoint(three, "tl of this run").load()
    assert str(caught.value) == (
        f"{three / 'state.npz'} belongs to a run with another configuration or other images; "
        "use the same ones to go on, or a new run directory."
    )
    assert number_in(three) == 3


def test_a_state_that_cannot_be_read_for_now_is_not_dropped(three: Path) -> None:
    (three / "state.npz").unlink()
    (three / "state.npz").mkdir()
    with pytest.raises(RunError) as caught:
        checkpoint(three).load()
    assert str(caught.value) == (
        f"{three / 'state.npz'} cannot be read (Is a directory); see to the disk or the rights, then run the same "
        "command with --resume."
    )
    assert names_in(three) == ["state.npz", "state.previous.npz"]


# --- damage -----------------------------------------------------------------------------------------------------------


def rotten(content: bytes) -> Iterator[bytes]:
    """Yield what a file may have become: shorter, longer, with a bit flipped anywhere, or zeros at its end."""
    yield b""
    for length in (1, 63, 64, 65, len(content) // 2, len(content) - 64, len(content) - 1):
        yield content[:length]
    yield content + b"\0"
    yield content[:-512] + bytes(512)
    for at in np.linspace(0, len(content) - 1, 40).astype(int):
        yield content[:at] + bytes([content[at] ^ 1 << int(at) % 8]) + content[at + 1 :]
    directory = content.rindex(b"weight.npy")  # an archive's own checksums do not cover the names
    yield content[:directory] + b"Weight.npy" + content[directory + 10 :]


def test_where_the_newest_is_damaged_the_one_before_it_serves(three: Path, tmp_path: Path) -> None:
    newest = (three / "state.npz").read_bytes()
    for number, content in enumerate(rotten(newest)):
        folder = shutil.copytree(three, tmp_path / f"copy-{number}", ignore=shutil.ignore_patterns("copy-*"))
        (folder / "state.npz").write_bytes(content)
        said: list[str] = []
        assert number_in(folder, said.append) == 2
        assert said == [f"{folder / 'state.npz'} is damaged; the training goes on from the state before it."]
        checkpoint(folder).save(*numbered(9))
        (folder / "state.npz").unlink()
        assert number_in(folder) == 2  # the damaged one did not take its place


def test_where_both_are_damaged_the_work_starts_afresh_and_says_so(three: Path, tmp_path: Path) -> None:
    newest, before = three / "state.npz", three / "state.previous.npz"
    contents = list(zip(rotten(newest.read_bytes()), reversed(list(rotten(before.read_bytes()))), strict=True))
    for one, other in contents:
        newest.write_bytes(one)
        before.write_bytes(other)
        said: list[str] = []
        assert number_in(three, said.append) is None
        assert said == [f"{newest} and {before} are damaged; the training starts afresh."]
        assert names_in(three) == []
    newest.write_bytes(b"")
    assert number_in(three, said.append) is None
    assert said[1:] == [f"{newest} is damaged; the training starts afresh."]


def test_where_nothing_is_damaged_nothing_is_said(three: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert number_in(three, said.append) == 3
    (three / "state.npz").unlink()
    assert number_in(three, said.append) == 2
    assert number_in(tmp_path / "nothing", said.append) is None
    assert said == []


# --- death ------------------------------------------------------------------------------------------------------------

DYING = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_checkpoints import checkpoint, numbered

done = 0
def hook(event, args):
    global done
    at_work = event in ("tempfile.mkstemp", "open", "os.rename", "os.chmod") and str(args[0]).startswith(sys.argv[1])
    if at_work and (event != "open" or args[2] & os.O_CREAT):
        done += 1
        if done == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
checkpoint(Path(sys.argv[1])).save(*numbered(4))
"""


def test_at_every_instant_of_a_save_a_whole_state_stands(three: Path) -> None:
    found: list[int] = []
    leftovers = 0
    while not found or found[-1] != 4:
        assert len(found) < 6
        command = [sys.executable, "-c", DYING, str(three), str(len(found) + 1), str(Path(__file__).parent)]
        killed = subprocess.run(command, check=False).returncode
        whole = (three / "state.npz").exists() + (three / "state.previous.npz").exists()
        leftovers += len(list(three.glob(".state.npz.*.tmp")))
        number = number_in(three)
        assert number is not None
        found.append(number)
        assert (killed, whole) in ((-9, 2), (-9, 1), (0, 2))
        assert len(names_in(three)) == whole  # what killed processes left is cleared away
        if whole == 1:
            checkpoint(three).save(*numbered(3))
    assert found == [3, 3, 3, 3, 3, 4]  # before each of five points, and past the last
    assert leftovers == 3


# --- a full disk ------------------------------------------------------------------------------------------------------


@contextmanager
def full_after(n_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a disk that is full; Python ignores the signal for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("n_bytes", [0, 5000, 12_900])
def test_a_full_disk_leaves_both_states_whole_and_is_said(three: Path, n_bytes: int) -> None:
    before = {path.name: path.read_bytes() for path in three.iterdir()}
    assert len(before["state.npz"]) > 12_900
    with full_after(n_bytes), pytest.raises(RunError) as caught:
        checkpoint(three).save(*numbered(4))
    assert str(caught.value) == (
        f"The state of the training (13.1 kB) cannot be written to {three / 'state.npz'}: File too large; what was "
        "kept before it is whole, so free space there and run the same command with --resume."
    )
    assert {path.name: path.read_bytes() for path in three.iterdir()} == before
    checkpoint(three).save(*numbered(4))  # there is space again
    assert number_in(three) == 4
