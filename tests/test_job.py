"""What runs inside a Slurm job, here as a process by itself: the exit status it passes on, and the note it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pneumoscope._job import end_path

JOB = "import sys; from pneumoscope._job import Command; Command(tuple(sys.argv[1:]), warning='USR2', requeue=True)()"


def run_as_job(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"SUBMITIT_FOLDER": str(folder), "SLURM_JOB_ID": "7"} | variables
    words = [sys.executable, "-c", JOB, *command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def noted(folder: Path, job_id: str = "7") -> int:
    return int(json.loads(end_path(folder, job_id).read_text())["exit_status"])


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print('fine')", 0),
        ("import sys; sys.exit('It broke.')", 1),
        ("import sys; sys.exit(75)", 75),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143),  # not told to stop by us
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_the_exit_status_of_the_command_is_that_of_the_job_and_is_noted(tmp_path: Path, code: str, status: int) -> None:
    end_path(tmp_path, "7").write_text('{"schema_version": 1, "exit_status": 99}')  # of an earlier life
    assert run_as_job(tmp_path, sys.executable, "-c", code).returncode == status
    assert noted(tmp_path) == status


def test_while_the_command_runs_no_end_is_noted(tmp_path: Path) -> None:
    end_path(tmp_path, "7").write_text('{"schema_version": 1, "exit_status": 99}')
    code = f"import os; print(os.path.exists({str(end_path(tmp_path, '7'))!r}))"
    assert run_as_job(tmp_path, sys.executable, "-c", code).stdout == "False\n"


def test_a_copy_notes_its_end_by_its_own_number(tmp_path: Path) -> None:
    run_as_job(tmp_path, "true", SLURM_ARRAY_JOB_ID="6", SLURM_ARRAY_TASK_ID="3")
    assert noted(tmp_path, "6_3") == 0
    assert not end_path(tmp_path, "7").exists()


def test_a_program_that_is_not_there_ends_the_job_as_in_a_shell(tmp_path: Path) -> None:
    done = run_as_job(tmp_path, "no-such-program")
    assert (done.returncode, noted(tmp_path)) == (127, 127)
    assert done.stderr == (
        "Cannot start 'no-such-program': No such file or directory; expected a program on the PATH or a full path.\n"
    )


ENDED = """
import signal, sys
from pneumoscope._job import Command
try:
    Command(tuple(sys.argv[1:]), warning="USR2", requeue=True)()
finally:
    print(signal.getsignal(signal.SIGUSR2).name)  # what stays in force when Python drops its handlers at the end
"""


@pytest.mark.parametrize("program", ["true", "no-such-program"])
def test_a_warning_after_the_command_has_ended_does_not_kill_what_is_done(tmp_path: Path, program: str) -> None:
    environment = os.environ | {"SUBMITIT_FOLDER": str(tmp_path), "SLURM_JOB_ID": "7"}
    words = [sys.executable, "-c", ENDED, program]
    assert subprocess.run(words, env=environment, capture_output=True, text=True, check=False).stdout == "SIG_IGN\n"


@pytest.mark.parametrize(("status", "passed_on"), [(75, 0), (3, 3), (0, 0)])
def test_beside_the_first_node_a_stop_is_no_failure_and_nothing_is_noted(
    tmp_path: Path, status: int, passed_on: int
) -> None:
    code = f"import sys; sys.exit({status})"
    assert run_as_job(tmp_path, sys.executable, "-c", code, SLURM_PROCID="1").returncode == passed_on
    assert list(tmp_path.iterdir()) == []


WARNED = """
import signal, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()  # blocks no signal, as numpy's threads
from pneumoscope._job import Command
command = Command(tuple(sys.argv[1:]), warning="USR2", requeue=True)
def warned(number, frame):
    print("warned", flush=True)
    command.checkpoint()
    sys.exit(9)
signal.signal(signal.SIGUSR2, warned)
command()
"""
KEEPS = """
import os, signal, sys, time
def keep(number, frame):
    os.kill(os.getppid(), signal.SIGUSR2)  # once more, while this one keeps its state
    time.sleep(0.5)
    sys.exit(75)
signal.signal(signal.SIGTERM, keep)
os.kill(os.getppid(), signal.SIGUSR2)
time.sleep(60)
"""


def test_a_second_warning_while_the_command_keeps_its_state_changes_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"SUBMITIT_FOLDER": str(tmp_path), "SLURM_JOB_ID": "7"}
    words = [sys.executable, "-c", WARNED, sys.executable, "-c", KEEPS]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (9, "warned\n", "")


def test_a_note_that_cannot_be_written_does_not_change_the_exit_status(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "jobs"
    folder.mkdir()
    code = f"import os, sys; os.rmdir({str(folder)!r}); os.symlink('file', {str(folder)!r}); sys.exit(3)"
    assert run_as_job(folder, sys.executable, "-c", code).returncode == 3
