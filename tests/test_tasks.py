"""Tasks as local processes: their order, their bound, their logs, and how they are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pneumoscope.errors import PneumoscopeError, UsageError
from pneumoscope.tasks import CANNOT_START, STOPPED, State, Task, check, run_local, tail

# Says that it runs, waits to be told to stop, takes its time to keep its state, and says so.
PATIENT = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
def stop(number, frame):
    with open(here / "heard", "a") as file:
        print(signal.Signals(number).name, file=file)
    time.sleep(0.3)
    with open(here / "heard", "a") as file:
        print("kept", file=file)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
(here / "ready").touch()
time.sleep(60)
"""


def program(name: str, code: str, *words: str, **needs: Any) -> Task:
    return Task(name, (sys.executable, "-c", code, *words), **needs)


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


# --- what a task may be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        ([], "There is no task to run; expected at least one."),
        ([Task("a/b", ("x",))], "The task name 'a/b' does not fit a file; use letters, digits, '.', '-' and '_'."),
        ([Task("", ("x",))], "The task name '' does not fit a file; use letters, digits, '.', '-' and '_'."),
        ([Task("a", ("x",)), Task("a", ("y",))], "The task name 'a' is taken twice; give each task its own."),
        (
            [Task("a.1", ("x",)), Task("a", ("y",), copies=2)],
            "The task name 'a.1' is taken twice; give each task its own.",
        ),
        (
            [Task("a", ())],
            "The task 'a' has 0 words of command, 1 nodes and 1 copies; expected at least 1 of each.",
        ),
        (
            [Task("a", ("x",), nodes=0)],
            "The task 'a' has 1 words of command, 0 nodes and 1 copies; expected at least 1 of each.",
        ),
        (
            [Task("a", ("x",), copies=0)],
            "The task 'a' has 1 words of command, 1 nodes and 0 copies; expected at least 1 of each.",
        ),
        (
            [Task("a", ("x",), after=("b",)), Task("b", ("x",))],
            "The task 'a' waits for 'b', which is not listed before it.",
        ),
        ([Task("a", ("x",), after_any=("a",))], "The task 'a' waits for 'a', which is not listed before it."),
        (
            [Task("a", ("x",), copies=2), Task("b", ("x",), after=("a.1",))],
            "The task 'b' waits for 'a.1', which is not listed before it.",
        ),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_run_in_their_order_are_refused(tasks: list[Task], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(tasks)
    assert str(caught.value) == sentence


def test_a_copy_has_its_number_in_its_name_and_in_its_command() -> None:
    assert Task("a", ("x", "--part", "{copy}/3"), copies=3).each() == [
        ("a.0", ("x", "--part", "0/3")),
        ("a.1", ("x", "--part", "1/3")),
        ("a.2", ("x", "--part", "2/3")),
    ]
    assert Task("a", ("x", "{copy}")).each() == [("a", ("x", "0"))]


@pytest.mark.parametrize(
    ("state", "ended", "well"),
    [("PENDING", False, False), ("UNKNOWN", False, False), ("COMPLETED", True, True), ("TIMEOUT", True, False)],
)
def test_a_state_says_whether_more_will_come(tmp_path: Path, state: str, ended: bool, well: bool) -> None:
    found = State("a", "1", state, tmp_path / "log")
    assert (found.ended, found.well) == (ended, well)


def test_the_tail_of_a_log_is_its_last_lines_that_say_something(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == ()
    log.write_bytes(b"x" * 9000 + b"\n\n" + b"".join(b"line %d \n\n" % number for number in range(12)) + b"\xff last")
    assert tail(log) == (*(f"line {number}" for number in range(3, 12)), "\N{REPLACEMENT CHARACTER} last")


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one_s", "part_s"), [("0.1", "0.5"), ("0.5", "0.1")])
def test_tasks_wait_for_those_they_need(tmp_path: Path, one_s: str, part_s: str) -> None:
    note = "import sys, time; time.sleep(float(sys.argv[2])); print(sys.argv[1], file=open('order', 'a'))"
    code = f"import os; os.chdir({str(tmp_path)!r})\n{note}"
    statuses = run_local(
        [
            program("one", code, "one", one_s),
            program("parts", code, "part", part_s, copies=2),
            program("last", code, "last", "0", after=("one",), after_any=("parts",)),
        ],
        folder=tmp_path / "logs",
        at_once=4,
    )
    assert statuses == {"one": 0, "parts.0": 0, "parts.1": 0, "last": 0}
    *before, last = lines(tmp_path / "order")
    assert (sorted(before), last) == (["one", "part", "part"], "last")


def test_a_failed_task_leaves_the_others_running_and_holds_back_those_that_need_it(tmp_path: Path) -> None:
    told: list[State] = []
    statuses = run_local(
        [
            program("good", "print('fine')"),
            program("bad", "import sys; print('so far', flush=True); sys.exit('It broke.')"),
            program("parts", "import sys; sys.exit({copy})", copies=2),
            program("child", "print('never')", after=("good", "bad")),
            program("grandchild", "print('never')", after=("child",)),
            program("of_parts", "print('never')", after=("parts",)),
            program("anyway", "print('anyway')", after=("good",), after_any=("bad", "child", "parts")),
        ],
        folder=tmp_path,
        at_once=1,
        on_change=told.append,
    )
    assert statuses == {"good": 0, "bad": 1, "parts.0": 0, "parts.1": 1, "anyway": 0}
    ends = {state.name: state for state in told if state.ended}
    assert {name: state.state for name, state in ends.items()} == {
        "good": "COMPLETED",
        "bad": "FAILED",
        "parts.0": "COMPLETED",
        "parts.1": "FAILED",
        "child": "CANCELLED",
        "grandchild": "CANCELLED",
        "of_parts": "CANCELLED",
        "anyway": "COMPLETED",
    }
    assert ends["bad"].tail == ("so far", "It broke.")
    assert (ends["good"].exit_status, ends["bad"].exit_status, ends["child"].exit_status) == (0, 1, None)
    assert (ends["child"].reason, ends["grandchild"].reason) == ("bad did not end well", "child did not end well")
    began = [(state.name, state.state) for state in told if state.name == "good"]
    assert began == [("good", "RUNNING"), ("good", "COMPLETED")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "anyway.log", "bad.log", "good.log", "parts.0.log", "parts.1.log",
    ]  # fmt: skip
    assert lines(tmp_path / "anyway.log") == ["anyway"]


@pytest.mark.parametrize("at_once", [1, 2])
def test_no_more_run_at_once_than_allowed(tmp_path: Path, at_once: int) -> None:
    running: set[str] = set()
    most = 0

    def follow(state: State) -> None:
        nonlocal most
        (running.add if state.state == "RUNNING" else running.discard)(state.name)
        most = max(most, len(running))

    task = program("part", "import time; time.sleep(0.2)", copies=4)
    assert set(run_local([task], folder=tmp_path, at_once=at_once, on_change=follow).values()) == {0}
    assert most == at_once


def test_processes_get_the_environment_and_add_to_their_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "from here")
    task = program("a", "import os, sys; print(os.environ['INHERITED'], os.environ['GIVEN'], repr(sys.stdin.read()))")
    for given in ("one", "two"):
        run_local([task], folder=tmp_path, at_once=1, environment={"GIVEN": given})
    assert lines(tmp_path / "a.log") == ["from here one ''", "from here two ''"]


def test_a_program_that_is_not_there_fails_as_in_a_shell(tmp_path: Path) -> None:
    told: list[State] = []
    tasks = [Task("a", ("no-such-program", "x")), program("b", "print(1)")]
    assert run_local(tasks, folder=tmp_path, at_once=1, on_change=told.append) == {"a": CANNOT_START, "b": 0}
    sentence = (
        "Cannot start 'no-such-program': No such file or directory; expected a program on the PATH or a full path."
    )
    assert lines(tmp_path / "a.log") == [sentence]
    assert (told[0].state, told[0].exit_status, told[0].tail) == ("FAILED", 127, (sentence,))


def test_a_process_that_a_signal_ends_has_the_status_of_a_shell(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIG{})"
    tasks = [program("killed", code.format("KILL")), program("ended", code.format("TERM"))]
    assert run_local(tasks, folder=tmp_path, at_once=2) == {"killed": 137, "ended": 143}  # nobody told them to stop


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PneumoscopeError) as caught:
        run_local([program("a", "")], folder=tmp_path / "file", at_once=1)
    assert str(caught.value) == (
        f"Cannot write logs to {tmp_path / 'file'}: {os.strerror(17)}; choose a folder you may write to."
    )
    (tmp_path / "a.log").mkdir()
    with pytest.raises(PneumoscopeError) as caught:
        run_local([program("a", "")], folder=tmp_path, at_once=1)
    assert str(caught.value) == f"Cannot write {tmp_path / 'a.log'}: {os.strerror(21)}; free the place."


def test_at_least_one_must_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run_local([program("a", "")], folder=tmp_path, at_once=0)
    assert str(caught.value) == "at_once is 0, expected at least 1 process at a time."


# --- stopping --------------------------------------------------------------------------------------------------------


def test_a_wish_to_stop_reaches_the_running_and_nothing_new_begins(tmp_path: Path) -> None:
    told: list[State] = []
    statuses = run_local(
        [
            program("patient", PATIENT, str(tmp_path)),
            # ended by SIGTERM before it could listen: nothing was lost, so it can go on as well
            program("deaf", f"import time; open({str(tmp_path / 'deaf')!r}, 'w'); time.sleep(60)"),
            program("next", "print('never')"),
            program("child", "print('never')", after_any=("patient",)),
        ],
        folder=tmp_path / "logs",
        at_once=2,
        on_change=told.append,
        stop=lambda: (tmp_path / "ready").exists() and (tmp_path / "deaf").exists(),
    )
    assert statuses == {"patient": STOPPED, "deaf": STOPPED}
    assert lines(tmp_path / "heard") == ["SIGTERM", "kept"]
    ends = {state.name: (state.state, state.reason) for state in told if state.ended}
    assert ends == {
        "patient": ("FAILED", "stopped early; run it again to go on"),
        "deaf": ("FAILED", "stopped early; run it again to go on"),
        "next": ("CANCELLED", "stopped before it began"),
        "child": ("CANCELLED", "stopped before it began"),
    }


CALLER = """
import pathlib, sys
from pneumoscope.tasks import Task, run_local
here = pathlib.Path(sys.argv[1])
print(run_local([Task("a", (sys.executable, "-c", sys.argv[2], str(here)))], folder=here / "logs", at_once=1))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_processes_are_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", CALLER, str(tmp_path), PATIENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as caller:
        until((tmp_path / "ready").exists)
        os.killpg(caller.pid, number)  # all of the terminal's processes, as Ctrl-C does
        out, _ = caller.communicate(timeout=30)
    assert (out, caller.returncode) == ("{'a': 75}\n", 0)
    assert lines(tmp_path / "heard") == ["SIGTERM", "kept"]


STUBBORN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(pathlib.Path(sys.argv[1]) / "pid").write_text(str(os.getpid()))
(pathlib.Path(sys.argv[1]) / "ready").touch()
time.sleep(60)
"""


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CALLER, str(tmp_path), STUBBORN]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as caller:
        until((tmp_path / "ready").exists)
        caller.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            caller.wait(0.5)
        caller.send_signal(signal.SIGINT)
        _, err = caller.communicate(timeout=30)
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_an_error_of_the_caller_leaves_no_process_behind(tmp_path: Path) -> None:
    def follow(state: State) -> None:
        until((tmp_path / "ready").exists)
        raise ZeroDivisionError(state.job_id)

    with pytest.raises(ZeroDivisionError) as caught:
        run_local([program("a", PATIENT, str(tmp_path))], folder=tmp_path / "logs", at_once=1, on_change=follow)
    assert lines(tmp_path / "heard") == ["SIGTERM", "kept"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(caught.value)), 0)


def test_handlers_of_the_caller_stay_and_those_taken_are_given_back(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        tasks = [program("a", f"import os, signal; os.kill({os.getpid()}, signal.SIGTERM)")]
        assert run_local(tasks, folder=tmp_path, at_once=1) == {"a": 0}
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run_local([program("a", "")], folder=tmp_path, at_once=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (
        signal.default_int_handler,
        signal.SIG_DFL,
    )


def test_a_thread_may_run_tasks(tmp_path: Path) -> None:
    found: list[dict[str, int]] = []
    tasks = [program("a", "")]
    thread = threading.Thread(target=lambda: found.append(run_local(tasks, folder=tmp_path, at_once=1)))
    thread.start()
    thread.join()
    assert found == [{"a": 0}]
