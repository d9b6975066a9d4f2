"""Command lines that need one another, and running them as processes of this machine.

Owns what a task is, how it stands with one, and how local processes are bounded, watched and stopped. Knows nothing of
what the commands do, nor of batch systems. All that is asked of a command is that it can be run again: it goes on
where it was, does nothing twice, and on SIGTERM keeps its state and exits with `STOPPED`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from pneumoscope.errors import PneumoscopeError, StoppedEarly, UsageError

STOPPED = StoppedEarly.exit_status
"""Exit status of a command that kept its state; run again, it goes on."""

CANNOT_START = 127
"""Exit status of a command that is not there, as a shell has it."""

STOPPED_REASON = "stopped early; run it again to go on"

UNFINISHED = frozenset(
    {"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"}
    | {"RESIZING", "RESV_DEL_HOLD", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "UNKNOWN"}
)
"""Slurm's words for a job of which more may be heard; all others are ends."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # is a file's name as well
_TAIL_LINES = 10
_LOOK_S = 0.05


@dataclass(frozen=True)
class Task:
    """A command line, and what must have ended before it runs.

    Attributes
    ----------
    name : str
        Unique; letters, digits, dots, dashes and underscores.
    command : tuple of str
        Program and arguments; ``{copy}`` stands for the copy's number.
    after : tuple of str
        Names of earlier tasks that must have ended well; where one did not, this task never runs.
    after_any : tuple of str
        Names of earlier tasks that must have ended, well or not, or can never run.
    gpus : bool
        Whether it needs the GPUs that a cluster's Spec asks for.
    nodes : int
        Nodes of a cluster that it runs on, one process on each; the first one's process decides how the job ends, and
        is the only one that is told to stop.
    copies : int
        How many times it runs, with ``{copy}`` from 0; on a cluster the copies are one job array.
    """

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    after_any: tuple[str, ...] = ()
    gpus: bool = False
    nodes: int = 1
    copies: int = 1

    def each(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return (name, command) of each copy; a single one has the task's name, others ``name.0``, ``name.1`` ..."""
        names = [f"{self.name}.{copy}" for copy in range(self.copies)] if self.copies > 1 else [self.name]
        return [
            (name, tuple(word.replace("{copy}", str(copy)) for word in self.command)) for copy, name in enumerate(names)
        ]


@dataclass(frozen=True)
class State:
    """How it stands with one task, or with one copy of it.

    Attributes
    ----------
    name : str
        The task's, with the copy's number where there are several.
    job_id : str
        Slurm's id (``123_0`` for a copy), or the number of the local process; empty where it never began.
    state : str
        Slurm's word: ``PENDING``, ``RUNNING``, ``COMPLETED``, ``FAILED``, ``TIMEOUT``, ``CANCELLED``, ``NODE_FAIL``,
        ``OUT_OF_MEMORY`` ...; ``UNKNOWN`` where Slurm cannot be asked and the job left nothing.
    log : Path
        What it says goes here; there once it runs.
    reason : str
        Why, as far as anyone says; may be empty.
    exit_status : int or None
        The command's, 0 to 255, once it has ended by itself; 128 + N where signal N ended it.
    tail : tuple of str
        The log's last lines, where it did not end well.
    """

    name: str
    job_id: str
    state: str
    log: Path
    reason: str = ""
    exit_status: int | None = None
    tail: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state not in UNFINISHED

    @property
    def well(self) -> bool:
        """Whether it ended as it should."""
        return self.state == "COMPLETED"


OnChange = Callable[[State], None]
"""Called with each new State."""


def check(tasks: Sequence[Task]) -> None:
    """Refuse tasks that cannot be run in the order they are listed.

    Raises
    ------
    UsageError
        Where there is none, a name is taken twice or unfit for a file, a command is empty, or a task waits for one
        that is not listed before it.
    """
    if not tasks:
        raise UsageError("There is no task to run; expected at least one.")
    listed: set[str] = set()
    taken: set[str] = set()
    for task in tasks:
        if not _NAME.fullmatch(task.name):
            raise UsageError(f"The task name {task.name!r} does not fit a file; use letters, digits, '.', '-' and '_'.")
        if not task.command or task.nodes < 1 or task.copies < 1:
            raise UsageError(
                f"The task {task.name!r} has {len(task.command)} words of command, {task.nodes} nodes and "
                f"{task.copies} copies; expected at least 1 of each."
            )
        names = {task.name, *(name for name, _ in task.each())}
        if taken & names:
            raise UsageError(f"The task name {min(taken & names)!r} is taken twice; give each task its own.")
        for needed in (*task.after, *task.after_any):
            if needed not in listed:
                raise UsageError(f"The task {task.name!r} waits for {needed!r}, which is not listed before it.")
        listed.add(task.name)
        taken |= names


def run_local(
    tasks: Sequence[Task],
    *,
    folder: Path,
    at_once: int,
    environment: Mapping[str, str] | None = None,
    on_change: OnChange | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, int]:
    """Run tasks as processes of this machine, some of them at a time.

    A task that fails leaves the others running; those that wait for its good end never run. When `stop` says so, and on
    SIGTERM or Ctrl-C where the caller has no handler of its own for them, nothing new begins, the running ones get
    SIGTERM and are waited for. A second Ctrl-C kills them.

    Parameters
    ----------
    tasks : sequence of Task
        In an order in which they can run.
    folder : Path
        ``NAME.log`` goes here, one for each task; an earlier one is added to.
    at_once : int
        How many processes may run at a time, at least 1.
    environment : mapping of str to str, optional
        Variables set for the processes, besides this process's own.
    on_change : callable, optional
        Called with the State of a task when it begins, ends, or is found never to run.
    stop : callable, optional
        Asked many times a second.

    Returns
    -------
    dict of str to int
        Task name -> exit status, 0 to 255, each copy by itself; one that never ran is not in it.

    Raises
    ------
    UsageError
        Where `check` refuses the tasks, or `at_once` is less than 1.
    PneumoscopeError
        Where the folder cannot be written.
    """
    check(tasks)
    if at_once < 1:
        raise UsageError(f"at_once is {at_once}, expected at least 1 process at a time.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PneumoscopeError(
            f"Cannot write logs to {folder}: {error.strerror or error}; choose a folder you may write to."
        ) from error
    with _signals_as_a_wish() as wished:
        processes = _Processes(
            waiting=[(task, name, command) for task in tasks for name, command in task.each()],
            folder=folder,
            at_once=at_once,
            environment={**os.environ, **(environment or {})},
            say=on_change or (lambda state: None),
            stop=lambda: wished() or (stop is not None and stop()),
        )
        return processes.run()


@dataclass
class _Processes:
    """The processes of one call of `run_local`."""

    waiting: list[tuple[Task, str, tuple[str, ...]]]
    folder: Path
    at_once: int
    environment: dict[str, str]
    say: OnChange
    stop: Callable[[], bool]
    running: dict[str, tuple[Task, subprocess.Popen[bytes]]] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    """Tasks of which a copy did not end well, or that never run."""
    told_to_stop: bool = False

    def run(self) -> dict[str, int]:
        try:
            while self.waiting or self.running:
                if not self.told_to_stop and self.stop():
                    self._stop()
                self._notice_ends()
                self._begin_what_can()
                if self.running:
                    time.sleep(_LOOK_S)
        except BaseException as error:  # nothing runs on when an error, or a second Ctrl-C, leaves here
            for _, process in self.running.values():
                if isinstance(error, KeyboardInterrupt):
                    process.kill()
                else:
                    process.terminate()
            for _, process in self.running.values():
                process.wait()
            raise
        return self.statuses

    def _stop(self) -> None:
        self.told_to_stop = True
        for _, process in self.running.values():
            process.terminate()
        for task, name, _ in self.waiting:
            self._drop(task, name, "stopped before it began")
        self.waiting = []

    def _drop(self, task: Task, name: str, reason: str) -> None:
        self.failed.add(task.name)
        self.say(State(name, "", "CANCELLED", self._log(name), reason))

    def _notice_ends(self) -> None:
        for name, (task, process) in list(self.running.items()):
            returncode = process.poll()
            if returncode is not None:
                del self.running[name]
                self._end(task, name, str(process.pid), exit_status(returncode, told_to_stop=self.told_to_stop))

    def _end(self, task: Task, name: str, job_id: str, status: int) -> None:
        self.statuses[name] = status
        log = self._log(name)
        if status:
            self.failed.add(task.name)
            reason = STOPPED_REASON if status == STOPPED else ""
            self.say(State(name, job_id, "FAILED", log, reason, status, tail(log)))
        else:
            self.say(State(name, job_id, "COMPLETED", log, "", status))

    def _begin_what_can(self) -> None:
        still: list[tuple[Task, str, tuple[str, ...]]] = []
        for task, name, command in self.waiting:
            # those still to run, of the tasks listed before: whoever is dropped here is over for the later ones
            open_tasks = {other.name for other, _, _ in still} | {other.name for other, _ in self.running.values()}
            bad = [needed for needed in task.after if needed in self.failed]
            if bad:
                self._drop(task, name, f"{bad[0]} did not end well")
            elif open_tasks.isdisjoint((*task.after, *task.after_any)) and len(self.running) < self.at_once:
                self._begin(task, name, command)
            else:
                still.append((task, name, command))
        self.waiting = still

    def _begin(self, task: Task, name: str, command: tuple[str, ...]) -> None:
        try:
            with self._log(name).open("ab") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    start_new_session=True,  # a Ctrl-C in the terminal reaches it once, from here
                )
        except OSError as error:
            if error.filename == str(self._log(name)):
                raise PneumoscopeError(f"Cannot write {error.filename}: {error.strerror}; free the place.") from error
            with self._log(name).open("a", encoding="utf-8") as log_text:
                log_text.write(cannot_start(command, error))
            self._end(task, name, "", CANNOT_START)
            return
        self.running[name] = task, process
        self.say(State(name, str(process.pid), "RUNNING", self._log(name)))

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


@contextmanager
def _signals_as_a_wish() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and the first Ctrl-C into a wish to stop, where the caller did not say what they shall do."""
    wished = False

    def wish(number: int, _: FrameType | None) -> None:
        nonlocal wished
        if wished and number == signal.SIGINT:
            raise KeyboardInterrupt
        wished = True

    before = {}
    if threading.current_thread() is threading.main_thread():  # the only one that may
        defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        before = {number: default for number, default in defaults.items() if signal.getsignal(number) is default}
    try:
        for number in before:
            signal.signal(number, wish)
        yield lambda: wished
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_status(returncode: int, *, told_to_stop: bool) -> int:
    """Return a process's exit status as a shell has it: 128 + N where signal N ended it.

    A command that SIGTERM ended before it could listen lost nothing: told to stop, it counts as `STOPPED`.

    Parameters
    ----------
    returncode : int
        As `subprocess` gives it: negative where a signal ended the process.
    told_to_stop : bool
        Whether it had been sent SIGTERM.

    Returns
    -------
    int
        0 to 255.
    """
    if told_to_stop and returncode == -signal.SIGTERM:
        return STOPPED
    return returncode if returncode >= 0 else 128 - returncode


def cannot_start(command: Sequence[str], error: OSError) -> str:
    """Return the line that a log gets in place of the command's own words.

    Parameters
    ----------
    command : sequence of str
        Program and arguments.
    error : OSError
        Why it did not start.

    Returns
    -------
    str
    """
    return f"Cannot start {command[0]!r}: {error.strerror or error}; expected a program on the PATH or a full path.\n"


def tail(log: Path) -> tuple[str, ...]:
    """Return the last lines of a log that say anything, at most 10; none where there is no log."""
    if not log.exists():
        return ()
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return tuple([line.rstrip() for line in lines if line.strip()][-_TAIL_LINES:])
