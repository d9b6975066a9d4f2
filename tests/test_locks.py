"""Locks between real processes: living, killed, suspended, on another machine, and where the kernel knows no locks."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pneumoscope import _locks
from pneumoscope.errors import RunError
from pneumoscope.runs import Run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills and suspends processes as POSIX does")

TIMES = {"beat_s": 0.05, "patience_s": 2.0}

BEGIN = """
import ctypes, errno, json, os, platform, resource, signal, socket, struct, sys, time
from pathlib import Path
from pneumoscope import _locks
from pneumoscope.errors import RunError

options, times = json.loads(sys.argv[1]), json.loads(sys.argv[2])

def without_kernel_locks():
    '''Let the kernel itself refuse flock to this process, as some file systems do.'''
    flock = {"x86_64": 73, "aarch64": 32}[platform.machine()]
    rules = [(0x20, 0, 0, 0), (0x15, 0, 1, flock), (0x06, 0, 0, 0x50000 | errno.ENOLCK), (0x06, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program)))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(header), 0, 0) == 0

def at_once(seconds):
    raise AssertionError("waited")

if options.get("no_kernel"):
    without_kernel_locks()
if machine := options.get("machine"):
    _locks._machine = lambda: machine
    socket.gethostname = lambda: machine
if options.get("at_once"):
    time.sleep = at_once
if options.get("full_disk"):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""

HOLD = """
try:
    with _locks.hold(Path(options["folder"]), options.get("name", "run"), what="The run in R", **times) as lease:
        print("held", flush=True)
        for line in sys.stdin:
            if line.strip() == "lost":
                print(lease.lost, flush=True)
            if line.strip() == "fork":
                if not os.fork():
                    sys.exit(0)  # leaves the block in the copy
                os.wait()
                print("forked", flush=True)
            if line.strip() == "fill":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
except RunError as error:
    print(error, flush=True)
"""


def command(folder: Path, options: dict[str, Any], program: str = HOLD) -> list[str]:
    return [sys.executable, "-c", BEGIN + program, json.dumps({"folder": str(folder), **options}), json.dumps(TIMES)]


class Other:
    """Another process that holds a lock until told otherwise, or says why it could not."""

    begun: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, folder: Path, *, program: str = HOLD, **options: Any) -> None:
        self.process = subprocess.Popen(
            command(folder, options, program), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.begun.append(self.process)
        self.said = self.hear()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, word: str) -> str:
        self.tell(word)
        return self.hear()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def end(self) -> int:
        """Leave the block in good order."""
        self.process.communicate()
        return self.process.returncode


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder of locks; processes that a test leaves behind are ended."""
    yield tmp_path / "locks"
    while Other.begun:
        process = Other.begun.pop()
        process.kill()
        process.communicate()


def hold(folder: Path) -> Any:
    return _locks.hold(folder, "run", what="The run in R", **TIMES)


def refusal(pid: int, host: str = r"\S+") -> str:
    return (
        rf"^The run in R is in use by process {pid} on {host} since \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00; "
        r"wait until it ends, then run it again\.$"
    )


def assert_refused(said: str, pid: int, host: str = r"\S+") -> None:
    assert re.search(refusal(pid, host), said), said


def never(seconds: float) -> None:
    raise AssertionError("waited")


seccomp = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="forbids a process its kernel locks as Linux can",
)
both_ways = pytest.mark.parametrize("no_kernel", [False, pytest.param(True, marks=seccomp)])


# --- one machine ------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_told_by_whom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", never)
    other = Other(folder)
    assert other.said == "held"
    with pytest.raises(RunError, match=refusal(other.process.pid, re.escape(platform.node()))), hold(folder):
        pass
    assert other.end() == 0
    with hold(folder), pytest.raises(RunError, match=refusal(os.getpid())), hold(folder):
        pass  # nor twice in one process


@both_ways
def test_a_killed_process_holds_nothing_from_that_moment(no_kernel: bool, folder: Path) -> None:
    for _ in range(3):
        other = Other(folder, no_kernel=no_kernel, at_once=True)
        assert other.said == "held"
        other.signal(signal.SIGKILL)
    assert Other(folder, no_kernel=no_kernel, at_once=True).said == "held"


@both_ways
def test_a_suspended_process_still_holds(no_kernel: bool, folder: Path) -> None:
    other = Other(folder, no_kernel=no_kernel)
    other.signal(signal.SIGSTOP)
    assert_refused(Other(folder, no_kernel=no_kernel, at_once=True).said, other.process.pid)
    other.signal(signal.SIGCONT)
    assert other.ask("lost") == "False"


@both_ways
def test_a_block_that_ends_or_fails_gives_the_lock_back(no_kernel: bool, folder: Path) -> None:
    other = Other(folder, no_kernel=no_kernel)
    assert (other.said, other.end()) == ("held", 0)
    with pytest.raises(ZeroDivisionError), hold(folder):
        _ = 1 / 0
    assert Other(folder, no_kernel=no_kernel, at_once=True).said == "held"


def test_a_forked_copy_of_the_holder_gives_nothing_back(folder: Path) -> None:
    other = Other(folder)
    assert other.ask("fork") == "forked"
    assert_refused(Other(folder).said, other.process.pid)
    assert other.end() == 0
    assert Other(folder, at_once=True).said == "held"


def test_locks_of_different_names_do_not_hinder_each_other(folder: Path) -> None:
    others = [Other(folder, name=name) for name in ("run", "train-cnn", "train-tl", "run.1")]
    assert [other.said for other in others] == ["held"] * 4
    assert_refused(Other(folder, name="train-tl").said, others[2].process.pid)


@seccomp
def test_a_later_process_of_the_same_number_is_not_taken_for_the_holder(folder: Path) -> None:
    other = Other(folder, no_kernel=True)
    other.signal(signal.SIGKILL)
    lease = folder / "run.1.json"
    lease.write_text(json.dumps(json.loads(lease.read_text()) | {"pid": os.getpid()}))
    assert Other(folder, no_kernel=True, at_once=True).said == "held"


@both_ways
def test_a_process_of_another_container_is_judged_by_the_kernel_or_by_its_beats(no_kernel: bool, folder: Path) -> None:
    Other(folder, no_kernel=no_kernel).signal(signal.SIGKILL)
    lease = folder / "run.1.json"
    lease.write_text(json.dumps(json.loads(lease.read_text()) | {"process": "pid:[1] 55"}))
    if no_kernel:
        assert "waited" in crash(folder, no_kernel=True, at_once=True)
    assert Other(folder, no_kernel=no_kernel, at_once=not no_kernel).said == "held"


def crash(folder: Path, **options: Any) -> str:
    return subprocess.run(command(folder, options), capture_output=True, text=True, check=False, input="").stderr


# --- another machine --------------------------------------------------------------------------------------------------


@both_ways
def test_a_process_on_another_machine_is_known_to_live_by_its_beats(no_kernel: bool, folder: Path) -> None:
    other = Other(folder, machine="node7", no_kernel=True)  # as where the kernel's lock does not reach us
    assert_refused(Other(folder, no_kernel=no_kernel).said, other.process.pid, "node7")
    assert other.ask("lost") == "False"


def test_a_machine_that_was_suspended_still_holds_where_its_kernel_lock_reaches(folder: Path) -> None:
    other = Other(folder, machine="node7")
    other.signal(signal.SIGSTOP)
    assert_refused(Other(folder, at_once=True).said, other.process.pid, "node7")


@seccomp
def test_what_another_machine_gave_back_is_free_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Other(folder, machine="node7", no_kernel=True).end() == 0
    monkeypatch.setattr(time, "sleep", never)
    with hold(folder):
        pass


@both_ways
def test_a_process_killed_on_another_machine_is_waited_for_and_then_dead(no_kernel: bool, folder: Path) -> None:
    Other(folder, machine="node7", no_kernel=no_kernel).signal(signal.SIGKILL)
    assert "waited" in crash(folder, at_once=True)
    with hold(folder) as lease:
        assert not lease.lost


@seccomp
def test_what_was_taken_over_from_a_suspended_machine_stays_taken(folder: Path) -> None:
    first = Other(folder, machine="node7", no_kernel=True)
    first.signal(signal.SIGSTOP)
    second = Other(folder, machine="node8", no_kernel=True)
    assert second.said == "held"
    first.signal(signal.SIGCONT)
    for _ in range(600):
        if first.ask("lost") == "True":
            break
        time.sleep(0.05)
    assert first.ask("lost") == "True"
    assert first.end() == 0
    assert_refused(Other(folder, machine="node7", no_kernel=True).said, second.process.pid, "node8")
    assert second.ask("lost") == "False"


def test_a_half_written_lease_holds_only_while_something_happens(folder: Path) -> None:
    folder.mkdir()
    (folder / "run.4.json").write_text('{"schema_version": 1, "host": "no')
    with hold(folder):
        assert [path.name for path in sorted(folder.iterdir())] == ["run.5.json", "run.lock"]


# --- many at once -----------------------------------------------------------------------------------------------------

CROWD = """
inside = Path(options["folder"]).parent / "inside"
print("ready", flush=True)
sys.stdin.readline()
won = refused = 0
while won < 20:
    try:
        with _locks.hold(Path(options["folder"]), "run", what="R", **times):
            inside.open("x").close()  # fails where somebody else is in here
            time.sleep(0.001)
            inside.unlink()
            won += 1
    except RunError:
        refused += 1
    time.sleep(0.001)
print(refused)
"""


@both_ways
def test_of_many_processes_one_at_a_time_is_inside(no_kernel: bool, folder: Path) -> None:
    crowd = [Other(folder, no_kernel=no_kernel, program=CROWD) for _ in range(6)]
    assert [other.said for other in crowd] == ["ready"] * 6
    for other in crowd:
        other.tell("go")
    assert sum(int(other.hear()) for other in crowd) > 0
    assert [other.end() for other in crowd] == [0] * 6
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".lock"]


def test_who_looked_long_ago_yields_to_those_who_came_since(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number is free again, because the lease that bore it was given back and cleared away."""
    with hold(folder):
        pass

    def meanwhile(*args: Any, **options: Any) -> bool:
        (folder / "run.1.json").unlink()
        (folder / "run.3.json").write_text('{"released": true}')
        return False

    monkeypatch.setattr(_locks, "_lives", meanwhile)
    with pytest.raises(RunError, match=r"in use by another process, which has only just begun; wait"), hold(folder):
        pass
    assert [path.name for path in sorted(folder.iterdir())] == ["run.3.json", "run.lock"]


# --- disks ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_leaves_the_lock_free(folder: Path) -> None:
    assert Other(folder, full_disk=True).said == (
        f"The run in R cannot be locked with a file in {folder}: File too large; "
        "free space or choose a folder you may write to."
    )
    assert Other(folder, at_once=True).said == "held"


def test_a_lock_given_back_on_a_full_disk_is_free_all_the_same(folder: Path) -> None:
    other = Other(folder)
    other.tell("fill")
    assert other.end() == 0
    assert Other(folder, at_once=True).said == "held"


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("in the way")
    with pytest.raises(
        RunError, match=rf"^The run in R cannot be locked with a file in {tmp_path}/locks: File exists; free"
    ):
        hold(tmp_path / "locks").__enter__()


# --- of a run ---------------------------------------------------------------------------------------------------------


def test_a_run_and_each_of_its_stages_has_a_lock(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    with run.lock(), run.lock("train-cnn") as lease:
        assert not lease.lost
        with pytest.raises(RunError, match=rf"^The run in {run.folder} is in use by process {os.getpid()} on"):
            run.lock().__enter__()
        with pytest.raises(RunError, match=rf"^The stage train-cnn of the run in {run.folder} is in use by process"):
            run.lock("train-cnn").__enter__()
    with run.lock(), run.lock("train-cnn"):
        pass
    assert sorted(path.name for path in (run.folder / "locks").iterdir()) == [
        "run.2.json", "run.lock", "train-cnn.2.json", "train-cnn.lock"
    ]  # fmt: skip
