"""What runs inside a Slurm job: a command as a child process that is stopped in time and can go on later.

Owns how the warning before a time limit, or at preemption, reaches the command, and how the job ends. Knows nothing of
what the command does, nor of how the job was submitted. submitit calls it; see `submitit.core.job_environment`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from pneumoscope import _files
from pneumoscope.errors import PneumoscopeError
from pneumoscope.tasks import CANNOT_START, STOPPED, cannot_start, exit_status


class Command:
    """The command that a job runs; what submitit keeps on the disk and calls in the job.

    Parameters
    ----------
    command : tuple of str
        Program and arguments.
    warning : str
        The signal that Slurm sends before it ends the job, without ``SIG``.
    requeue : bool
        Whether a job that was warned goes back into the queue; else it ends with status 75.
    """

    def __init__(self, command: tuple[str, ...], *, warning: str, requeue: bool) -> None:
        self.command = command
        self.warning = warning
        self.requeue = requeue
        self._child: subprocess.Popen[bytes] | None = None
        self._handler: Any = signal.SIG_DFL
        self._held_back = False

    def __call__(self) -> NoReturn:
        """Run the command to its end and leave with its exit status.

        Raises
        ------
        SystemExit
            Always: submitit would turn anything else into status 0 or 1.
        """
        _note(None)
        # The child is born with the warning held back, and keeps it so: where Slurm signals every process of a job,
        # only this one shall hear it. Here it comes through again as soon as there is a child to stop.
        self._heed(False)
        try:
            self._child = subprocess.Popen(self.command)
        except OSError as error:
            sys.stderr.write(cannot_start(self.command, error))
            self._leave(CANNOT_START)
        try:
            self._heed(True)
            # not Popen.wait, whose lock would be held while the warning calls `checkpoint` in the midst of this line
            os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
            self._heed(False)  # nothing is left to stop
        except Exception as error:  # after `checkpoint`: no requeue was left, or Slurm refused it
            if _is_put_back():
                sys.stderr.write("Slurm has put the job back into the queue itself.\n")
                raise SystemExit(STOPPED) from None  # nothing to note: the job has not ended
            sys.stderr.write(f"The command was stopped, but the job does not go back into the queue: {error}\n")
            self._leave(STOPPED)
        self._leave(exit_status(self._child.wait(), told_to_stop=False))

    def checkpoint(self) -> Any:
        """Stop the command; submitit calls this when the job is warned.

        Returns
        -------
        submitit.helpers.DelayedSubmission
            What runs after the requeue.

        Raises
        ------
        SystemExit
            Where the job shall not go back into the queue, or the command ended otherwise than stopped.
        """
        from submitit.core.utils import DelayedSubmission  # late: Slurm is not for every system

        self._heed(False)  # a second warning in the midst of this would wait for the child's lock for ever
        status = STOPPED
        if self._child is not None:
            self._child.terminate()
            status = exit_status(self._child.wait(), told_to_stop=True)
        if status != STOPPED or not self.requeue:
            self._leave(status)
        return DelayedSubmission(Command(self.command, warning=self.warning, requeue=self.requeue))

    def _leave(self, status: int) -> NoReturn:
        # Nothing is left to stop. Python drops its handlers before it ends, and a warning would kill what is done.
        signal.signal(self._number, signal.SIG_IGN)
        if not _is_first() and status == STOPPED:
            status = 0  # the first node's process says how the job ends: an exit status here would have srun kill it
        _note(status)
        raise SystemExit(status)

    @property
    def _number(self) -> signal.Signals:
        return signal.Signals[f"SIG{self.warning}"]

    def _heed(self, heeding: bool) -> None:
        """Let the warning through, or hold it back until then.

        Blocking it keeps it from the child only. Here it may reach a thread that does not block it, such as those that
        numpy starts, and Python would still call the handler, in the midst of whatever the main thread is at.
        """
        number = self._number
        if not heeding:
            signal.pthread_sigmask(signal.SIG_BLOCK, {number})
            self._handler = signal.signal(number, self._hold_back)
            return
        signal.signal(number, self._handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        if self._held_back:
            self._held_back = False
            signal.raise_signal(number)

    def _hold_back(self, number: int, frame: object) -> None:
        del number, frame
        self._held_back = True


def end_path(submission: Path, job_id: str) -> Path:
    """Return where a job notes its exit status when it ends."""
    return submission / f"{job_id}_end.json"


def _note(status: int | None) -> None:
    """Write down how the job ended, or that it has not: Slurm forgets, and not every site keeps accounts."""
    if not _is_first():
        return
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job_id = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    path = end_path(Path(os.environ["SUBMITIT_FOLDER"]), job_id)
    if status is None:
        path.unlink(missing_ok=True)
    else:
        with contextlib.suppress(PneumoscopeError):  # a full disk must not change the exit status
            _files.write_json(path, {"exit_status": status})


def _is_put_back() -> bool:
    """Whether Slurm has put this job back by itself, as at the end of a preempted job's grace time."""
    command = ("scontrol", "show", "job", "--oneliner", os.environ["SLURM_JOB_ID"])
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    restarts = re.search(r"\bRestarts=(\d+)", told)
    return restarts is not None and int(restarts[1]) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _is_first() -> bool:
    return os.environ.get("SLURM_PROCID", "0") == "0"
