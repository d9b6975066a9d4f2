"""Tasks as Slurm jobs: what Slurm is asked for, and, on a real Slurm, what becomes of the jobs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest

from pneumoscope import jobs
from pneumoscope.errors import PneumoscopeError, SpecError, UsageError
from pneumoscope.surroundings import ClusterSpec
from pneumoscope.tasks import STOPPED, State, Task

if TYPE_CHECKING:
    from slurm_local import LocalSlurm

pytest_plugins = "slurm_local"


def alive(folder: Path) -> bool:
    return not all(state.ended for state in jobs.states_if_any(folder))


SMALL = ClusterSpec(time_min=5, cpus=1, mem_gb=0.25)

# Goes on where it was kept, else says that it runs and waits to be told to stop. Notes each signal that it hears.
RESUMABLE = """
import os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
rank = os.environ["SLURM_PROCID"]
def keep(number, frame):
    with open(here / f"heard-{rank}", "a") as file:
        print(signal.Signals(number).name, file=file)
    if number == signal.SIGTERM:
        time.sleep(1)
        (here / "kept").touch()
        sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, keep)
if (here / "kept").exists():
    print("goes on")
    sys.exit()
print("begins")
(here / f"ready-{rank}").touch()
time.sleep(300)
"""


def program(name: str, code: str, *words: str, **needs: Any) -> Task:
    return Task(name, (sys.executable, "-c", code, *words), **needs)


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def said(log: Path) -> list[str]:
    """What the command itself said: without submitit's lines and Slurm's."""
    lines = log.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not re.match(r"submitit |srun: |slurmstepd", line)]


def scancel(*words: str) -> None:
    subprocess.run(["scancel", *words], check=True)


def followed(folder: Path) -> dict[str, State]:
    """The last state of each job, once all have ended."""
    until(lambda: not alive(folder))
    return {state.name: state for state in jobs.states(folder)}


# --- what Slurm is asked for -----------------------------------------------------------------------------------------


def sbatch_lines(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}


def test_the_scripts_ask_for_what_the_cluster_spec_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # as on a machine without Slurm
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "HUP")  # what the Spec says counts
    assert not jobs.available()
    cluster = ClusterSpec(
        partition="long", account="radiology", time_min=90, cpus=3, mem_gb=1.5, gpus=2, signal="USR1",
        signal_delay_s=120, setup=("module load python",), extra={"qos": "high", "cpus-per-task": 4},
    )  # fmt: skip
    tasks = [
        program("pack", "print(1)", "--out", "a b"),
        program("features", "print({copy})", after=("pack",), copies=3, gpus=True),
        program("train", "print(2)", after=("pack", "features"), after_any=("features",), gpus=True, nodes=2),
    ]
    folder = tmp_path / "a run"
    found = jobs.scripts(tasks, folder=folder, cluster=cluster)
    assert not folder.exists()  # nothing is written
    assert list(found) == ["pack", "features", "train"]
    shared = {
        "account=radiology", "cpus-per-task=4", "nodes=1", "ntasks-per-node=1", "mem=1536MB", "open-mode=append",
        "partition=long", "qos=high", "requeue", "signal=USR1@120", "time=90",
    }  # fmt: skip
    assert sbatch_lines(found["pack"]) == shared | {"job-name=pack", f"output='{folder}/1/%j_0_log.out'"}
    assert sbatch_lines(found["features"]) == shared | {
        "job-name=features", f"output='{folder}/1/%A_%a_0_log.out'", "array=0-2%3", "gpus-per-node=2",
        "dependency=afterok:pack", "kill-on-invalid-dep=yes",
    }  # fmt: skip
    assert sbatch_lines(found["train"]) == (shared - {"nodes=1"}) | {
        "job-name=train", f"output='{folder}/1/%j_0_log.out'", "nodes=2", "gpus-per-node=2",
        "dependency=afterok:pack:features,afterany:features", "kill-on-invalid-dep=yes",
    }  # fmt: skip
    assert f"# runs {shlex.join(tasks[2].command)}" in found["train"].splitlines()
    python = f"{sys.executable} -u -m submitit.core._submit '{folder}/1'"
    commands = [line for line in found["train"].splitlines() if line and not line.startswith("#")]
    assert commands == [
        "module load python",
        "export SUBMITIT_PREEMPT_SIGNAL=USR1",
        "export SUBMITIT_EXECUTOR=slurm",
        f"srun --unbuffered --output '{folder}/1/%j_%t_log.out' --cpus-per-task=4 --kill-on-bad-exit=1 {python}",
    ]


def test_a_command_of_several_lines_stays_a_comment_of_the_script(tmp_path: Path) -> None:
    task = program("a", "print(1)\ntouch('x')\r\n", "b\nc")
    script = jobs.scripts([task], folder=tmp_path, cluster=ClusterSpec())["a"]
    lines = [line for line in script.splitlines() if line and not line.startswith("#")]
    assert [line.split()[0] for line in lines] == ["export", "export", "srun"]
    assert f"# runs {sys.executable} -c 'print(1)\\ntouch('\"'\"'x'\"'\"')\\n' 'b\\nc'" in script.splitlines()


def test_what_is_not_said_is_left_to_the_cluster(tmp_path: Path) -> None:
    cluster = ClusterSpec(mem_gb=0, requeue=False)
    script = jobs.scripts([program("a", "", gpus=True)], folder=tmp_path, cluster=cluster)["a"]
    assert sbatch_lines(script) == {
        "cpus-per-task=2", "job-name=a", "no-requeue", "nodes=1", "ntasks-per-node=1", "open-mode=append",
        f"output={tmp_path}/1/%j_0_log.out", "signal=USR2@90", "time=240",
    }  # fmt: skip


def test_each_submission_has_a_folder_of_its_own(tmp_path: Path) -> None:
    for name in ("1", "9", "10", "logs", "jobs.json"):
        (tmp_path / name).mkdir()
    script = jobs.scripts([program("a", "")], folder=tmp_path, cluster=SMALL)["a"]
    assert f"output={tmp_path}/11/%j_0_log.out" in sbatch_lines(script)


@pytest.mark.parametrize(("key", "name"), [("array", "array"), ("no-requeue", "no_requeue"), ("time", "time")])
def test_further_parameters_do_not_undo_what_jobs_stand_on(tmp_path: Path, key: str, name: str) -> None:
    with pytest.raises(SpecError) as caught:
        jobs.scripts([program("a", "")], folder=tmp_path, cluster=ClusterSpec(extra={"qos": "x", key: 1}))
    assert str(caught.value) == f"cluster.extra sets {name!r}, which comes from the other keys of cluster; remove it."


def test_a_path_that_slurm_would_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        jobs.scripts([program("a", "")], folder=tmp_path / "50%job", cluster=SMALL)
    assert str(caught.value) == (
        f"{tmp_path}/50%job holds '%', which Slurm replaces in the names of logs; choose a folder without it."
    )


@pytest.mark.parametrize("call", [jobs.scripts, jobs.submit])
def test_tasks_out_of_order_are_refused_before_anything_is_done(tmp_path: Path, call: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=r"^The task 'a' waits for 'b', which is not listed before it\.$"):
        call([program("a", "", after=("b",))], folder=tmp_path / "run", cluster=SMALL)
    assert not (tmp_path / "run").exists()


# --- without Slurm ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


RECORD = {
    "schema_version": 1,
    "jobs": [
        {"name": "good", "job_id": "7", "log": "1/7_0_log.out", "submitted_at": "2026-01-02T03:04:05+00:00"},
        {"name": "bad.0", "job_id": "8_0", "log": "1/8_0_0_log.out", "submitted_at": "2026-01-02T03:04:05+00:00"},
        {"name": "open", "job_id": "9", "log": "1/9_0_log.out", "submitted_at": "2026-01-02T03:04:05+00:00"},
    ],
}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A folder of jobs, two of which noted their ends; of the third, nothing is known."""
    folder = tmp_path / "jobs"
    (folder / "1").mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps(RECORD))
    (folder / "1" / "7_end.json").write_text('{"schema_version": 1, "exit_status": 0}')
    (folder / "1" / "8_0_end.json").write_text('{"schema_version": 1, "exit_status": 3}')
    (folder / "1" / "8_0_0_log.out").write_text("It broke.\n")
    return folder


@pytest.mark.parametrize(
    ("told", "exit_status", "state", "well"),
    [("TIMEOUT", 0, "COMPLETED", True), ("TIMEOUT", STOPPED, "TIMEOUT", False), ("FAILED", 0, "FAILED", False)],
)
def test_a_job_that_was_done_when_its_time_was_over_ended_well(
    told: str, exit_status: int, state: str, well: bool, tmp_path: Path
) -> None:
    (tmp_path / "7_end.json").write_text(json.dumps({"schema_version": 1, "exit_status": exit_status}))
    job = jobs.Submitted("train", "7", tmp_path / "7_0_log.out", "2026-11-28T18:00:00+00:00")
    found = jobs._state(job, (told, ""), "")
    assert (found.state, found.well) == (state, well)


@pytest.mark.usefixtures("no_slurm")
def test_without_slurm_nothing_is_submitted(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        jobs.submit([program("a", "")], folder=tmp_path / "run", cluster=SMALL)
    assert str(caught.value) == (
        "There is no Slurm here (sbatch is not on the PATH); go to a node of the cluster from which jobs are "
        "submitted, or run the tasks as local processes."
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_slurm")
def test_without_slurm_the_files_tell_what_they_can(earlier: Path) -> None:
    good, bad, unknown = jobs.states(earlier)
    assert (good.state, good.exit_status, good.tail) == ("COMPLETED", 0, ())
    assert (bad.state, bad.exit_status, bad.tail) == ("FAILED", 3, ("It broke.",))
    assert (unknown.state, unknown.reason, unknown.ended) == ("UNKNOWN", "squeue is not on the PATH", False)
    assert unknown.log == earlier / "1" / "9_0_log.out"
    assert alive(earlier)  # as far as anyone can tell


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")  # so far it is not called
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PneumoscopeError) as caught:
        jobs.submit([program("a", "")], folder=tmp_path / "file", cluster=SMALL)
    assert str(caught.value) == (
        f"Cannot write jobs to {tmp_path / 'file'}: {os.strerror(20)}; choose a folder you may write to."
    )


@pytest.mark.usefixtures("no_slurm")
def test_without_slurm_nothing_is_cancelled(earlier: Path) -> None:
    with pytest.raises(PneumoscopeError) as caught:
        jobs.cancel(earlier)
    assert str(caught.value) == (
        "Slurm did not cancel the jobs 9 (scancel is not on the PATH); try again, or use scancel."
    )


def test_a_folder_without_jobs_says_so(tmp_path: Path) -> None:
    assert not alive(tmp_path)
    for call in (jobs.states, jobs.cancel, jobs.wait):
        with pytest.raises(PneumoscopeError) as caught:
            call(tmp_path)
        assert str(caught.value) == f"{tmp_path} has no jobs (there is no jobs.json in it); submit them first."


ALLOCATION = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "16"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (ALLOCATION, jobs.Allocation("12", nodes=2, cpus=16, gpus=0)),
        (ALLOCATION | {"SLURM_GPUS_ON_NODE": "4"}, jobs.Allocation("12", nodes=2, cpus=16, gpus=4)),
        (ALLOCATION | {"SLURM_JOB_GPUS": "0,3"}, jobs.Allocation("12", nodes=2, cpus=16, gpus=2)),
        ({"SLURM_JOB_ID": "12"}, jobs.Allocation("12", nodes=1, cpus=os.cpu_count() or 1, gpus=0)),
    ],
)
def test_a_process_knows_the_allocation_that_it_is_in(
    variables: dict[str, str], expected: jobs.Allocation | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert jobs.inside() == expected


# --- on a real Slurm -------------------------------------------------------------------------------------------------


@pytest.fixture
def limited() -> Iterator[None]:
    """End a test that waits for a job which never ends."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise AssertionError("waited in vain")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(150)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def on_slurm(test: Callable[..., None]) -> Callable[..., None]:
    marked: Callable[..., None] = pytest.mark.slow(pytest.mark.slurm(pytest.mark.usefixtures("slurm", "limited")(test)))
    return marked


@on_slurm
def test_jobs_run_in_order_and_a_failed_one_holds_back_only_those_that_need_it(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    tasks = [
        program("first", "from pneumoscope import jobs; print(jobs.inside())"),
        program("bad", "import sys; sys.exit('It broke.')", after=("first",)),
        program("stopped", "import sys; sys.exit(75)"),
        Task("nowhere", ("no-such-program",)),
        program("parts", "print({copy} * 10)", after=("first",), copies=3),
        program("child", "print('never')", after=("parts", "bad")),
        program("later", "print('never')", after_any=("parts",), after=("stopped",)),
        program("last", "print('anyway')", after=("parts",), after_any=("bad", "child", "stopped")),
    ]
    dry = jobs.scripts(tasks, folder=folder, cluster=SMALL)
    submitted = jobs.submit(tasks, folder=folder, cluster=SMALL)
    told: list[State] = []
    assert alive(folder)
    with pytest.raises(PneumoscopeError) as caught:
        jobs.submit(tasks, folder=folder, cluster=SMALL)
    assert re.fullmatch(
        rf"{folder} has jobs that have not ended \(\w+ is [A-Z]+, job \d+\); wait for them, or cancel them first\.",
        str(caught.value),
    )
    ends = {state.name: state for state in jobs.wait(folder, every_s=0.3, on_change=told.append)}
    assert not alive(folder)

    names = ["first", "bad", "stopped", "nowhere", "parts.0", "parts.1", "parts.2", "child", "later", "last"]
    assert [job.name for job in submitted] == names == list(ends)
    assert {name: (state.state, state.exit_status) for name, state in ends.items()} == {
        "first": ("COMPLETED", 0),
        "bad": ("FAILED", 1),
        "stopped": ("FAILED", STOPPED),
        "nowhere": ("FAILED", 127),
        "parts.0": ("COMPLETED", 0),
        "parts.1": ("COMPLETED", 0),
        "parts.2": ("COMPLETED", 0),
        "child": ("CANCELLED", None),
        "later": ("CANCELLED", None),
        "last": ("COMPLETED", 0),
    }
    assert ends["child"].reason == "DependencyNeverSatisfied"
    assert ends["stopped"].reason == "stopped early; run it again to go on"
    assert "It broke." in ends["bad"].tail
    assert not ends["child"].log.exists()
    assert said(ends["parts.2"].log) == ["20"]
    assert said(ends["last"].log) == ["anyway"]
    assert said(ends["nowhere"].log)[0].startswith("Cannot start 'no-such-program': No such file or directory;")
    first = submitted[0].job_id
    assert said(ends["first"].log) == [f"Allocation(job_id={first!r}, nodes=1, cpus=1, gpus=0)"]
    heard = [state.state for state in told if state.name == "last"]
    assert (heard[0], heard[-1]) == ("PENDING", "COMPLETED")

    ids = {job.name.split(".")[0]: job.job_id.split("_")[0] for job in submitted}
    for name, text in dry.items():
        for other, job_id in ids.items():  # in dependencies only: a job's own name stays
            text = re.sub(rf"^(#SBATCH --dependency=.*:){other}\b", rf"\g<1>{job_id}", text, flags=re.MULTILINE)
        assert (folder / "1" / f"{ids[name]}_submission.sh").read_text() == text


@on_slurm
def test_a_warned_job_keeps_its_state_and_goes_on(tmp_path: Path) -> None:
    for copy in range(2):
        (tmp_path / str(copy)).mkdir()
    cluster = SMALL.model_copy(update={"signal": "USR1"})
    tasks = [
        program("train", RESUMABLE, f"{tmp_path}/{{copy}}", copies=2),
        program("next", "print('after all')", after=("train",)),
    ]
    submitted = jobs.submit(tasks, folder=tmp_path / "jobs", cluster=cluster)
    until(lambda: all((tmp_path / str(copy) / "ready-0").exists() for copy in range(2)))
    scancel("--signal=USR1", submitted[0].job_id)  # as Slurm itself does before the time limit
    until((tmp_path / "0" / "heard-0").exists)
    scancel("--signal=USR1", submitted[0].job_id)  # and once more, while the command keeps its state
    until((tmp_path / "0" / "kept").exists)
    assert not (tmp_path / "1" / "kept").exists()
    subprocess.run(["scontrol", "requeue", submitted[1].job_id], check=True)  # as after the loss of a node
    (tmp_path / "1" / "kept").touch()
    ends = followed(tmp_path / "jobs")
    assert {name: (state.state, state.exit_status) for name, state in ends.items()} == {
        "train.0": ("COMPLETED", 0),
        "train.1": ("COMPLETED", 0),
        "next": ("COMPLETED", 0),
    }
    assert said(ends["train.0"].log) == ["begins", "goes on"]
    assert said(ends["train.1"].log) == ["begins", "goes on"]
    assert (tmp_path / "0" / "heard-0").read_text() == "SIGTERM\n"  # once, and nothing else


@on_slurm
@pytest.mark.parametrize(
    ("cluster", "added"),
    [({"requeue": False}, []), ({"requeues": 0}, ["Job not requeued because: timed-out too many times."])],
    ids=["no_requeue", "no_requeue_left"],
)
def test_a_warned_job_that_may_not_go_on_by_itself_ends_as_stopped(
    tmp_path: Path, cluster: dict[str, Any], added: list[str]
) -> None:
    tasks = [program("train", RESUMABLE, str(tmp_path)), program("next", "print('never')", after=("train",))]
    submitted = jobs.submit(tasks, folder=tmp_path / "jobs", cluster=SMALL.model_copy(update=cluster))
    until((tmp_path / "ready-0").exists)
    scancel("--signal=USR2", submitted[0].job_id)
    ends = followed(tmp_path / "jobs")
    assert (ends["train"].state, ends["train"].exit_status) == ("FAILED", STOPPED)
    assert ends["train"].reason == "stopped early; run it again to go on"
    why = "The command was stopped, but the job does not go back into the queue: "
    assert said(ends["train"].log) == ["begins", *(why + reason for reason in added)]
    assert ends["next"].state == "CANCELLED"
    assert (tmp_path / "heard-0").read_text() == "SIGTERM\n"
    again = jobs.submit(tasks, folder=tmp_path / "jobs", cluster=SMALL)  # what a person does then
    assert again[0].log.parent == tmp_path / "jobs" / "2"
    ends = followed(tmp_path / "jobs")
    assert (ends["train"].state, ends["next"].state) == ("COMPLETED", "COMPLETED")
    assert said(ends["train"].log) == ["goes on"]


STOPS_OTHERWISE = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(int(sys.argv[2])))
(pathlib.Path(sys.argv[1]) / f"ready-{sys.argv[2]}").touch()
time.sleep(300)
"""


@on_slurm
def test_a_warned_command_that_ends_otherwise_than_stopped_ends_its_job(tmp_path: Path) -> None:
    tasks = [program(f"status-{status}", STOPS_OTHERWISE, str(tmp_path), status) for status in ("0", "3")]
    submitted = jobs.submit(tasks, folder=tmp_path / "jobs", cluster=SMALL)
    until(lambda: (tmp_path / "ready-0").exists() and (tmp_path / "ready-3").exists())
    scancel("--signal=USR2", *(job.job_id for job in submitted))
    ends = followed(tmp_path / "jobs")
    assert {name: (state.state, state.exit_status) for name, state in ends.items()} == {
        "status-0": ("COMPLETED", 0),
        "status-3": ("FAILED", 3),
    }


@on_slurm
def test_a_job_on_two_nodes_makes_way_for_an_urgent_one_and_goes_on(tmp_path: Path) -> None:
    whole = SMALL.model_copy(update={"cpus": 4})
    jobs.submit([program("train", RESUMABLE, str(tmp_path), nodes=2)], folder=tmp_path / "jobs", cluster=whole)
    until(lambda: (tmp_path / "ready-0").exists() and (tmp_path / "ready-1").exists())
    urgent = whole.model_copy(update={"partition": "urgent"})
    jobs.submit([program("urgent", "print('first')")], folder=tmp_path / "urgent", cluster=urgent)
    assert followed(tmp_path / "urgent")["urgent"].state == "COMPLETED"
    assert set((tmp_path / "heard-0").read_text().split()) == {"SIGTERM"}, "Slurm may say it more than once"
    end = followed(tmp_path / "jobs")["train"]
    assert (end.state, end.exit_status) == ("COMPLETED", 0)
    lines = said(end.log)
    assert (lines[0], lines[-1]) == ("begins", "goes on")
    assert "does not go back" not in end.log.read_text(), "Slurm may put it back first"


PUT_BACK = """
import os, pathlib, signal, subprocess, sys, time
here = pathlib.Path(sys.argv[1])
def stop(number, frame):
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    (here / "kept").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if (here / "kept").exists():
    print("goes on")
    sys.exit()
(here / "ready").touch()
time.sleep(300)
"""


@on_slurm
def test_a_job_that_slurm_has_put_back_before_it_could_ask_goes_on(tmp_path: Path) -> None:
    """As at the end of a preempted job's grace time, on a machine too slow for it."""
    submitted = jobs.submit([program("train", PUT_BACK, str(tmp_path))], folder=tmp_path / "jobs", cluster=SMALL)
    until((tmp_path / "ready").exists)
    scancel("--signal=USR2", submitted[0].job_id)
    end = followed(tmp_path / "jobs")["train"]
    assert (end.state, end.exit_status) == ("COMPLETED", 0)
    # before these, scontrol's own line
    assert said(end.log)[-2:] == ["Slurm has put the job back into the queue itself.", "goes on"]


@on_slurm
def test_cancelled_jobs_end_and_none_that_waits_for_them_begins(tmp_path: Path) -> None:
    tasks = [
        program("train", RESUMABLE, str(tmp_path)),
        program("parts", "print('never')", after=("train",), copies=2),
        program("report", "print('never')", after_any=("train",)),
    ]
    jobs.submit(tasks, folder=tmp_path / "jobs", cluster=SMALL)
    until((tmp_path / "ready-0").exists)
    cancelled = jobs.cancel(tmp_path / "jobs")
    assert {state.name: state.state for state in cancelled} == {
        "train": "RUNNING", "parts.0": "PENDING", "parts.1": "PENDING", "report": "PENDING",
    }  # fmt: skip
    ends = followed(tmp_path / "jobs")
    assert {state.state for state in ends.values()} == {"CANCELLED"}
    assert not ends["report"].log.exists()
    assert jobs.cancel(tmp_path / "jobs") == []


@on_slurm
def test_where_slurm_refuses_a_job_those_before_it_are_cancelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [
        program("first", "import time; time.sleep(300)"),
        program("train", "print('never')", after=("first",), gpus=True),
    ]
    cluster = SMALL.model_copy(update={"gpus": 1})  # this Slurm has none
    with pytest.raises(PneumoscopeError) as caught:
        jobs.submit(tasks, folder=tmp_path, cluster=cluster)
    assert str(caught.value) == (
        "Slurm did not take the job 'train' (Invalid generic resource (gres) specification); no job of this "
        "submission is left; mend what it names, then run the same command again."
    )
    assert capsys.readouterr() == ("", "")  # said once, by whoever catches it
    assert followed(tmp_path)["first"].state == "CANCELLED"
    jobs.submit([program("first", "print(1)")], folder=tmp_path, cluster=SMALL)
    assert followed(tmp_path)["first"].state == "COMPLETED"


INNER = """
import sys
from pathlib import Path
from pneumoscope import jobs
from pneumoscope.surroundings import ClusterSpec
from pneumoscope.tasks import Task
cluster = ClusterSpec(time_min=5, cpus=2, mem_gb=0)
jobs.submit([Task("inner", (sys.executable, "-c", "print('deep')"))], folder=Path(sys.argv[1]), cluster=cluster)
"""


@on_slurm
def test_a_job_may_submit_jobs(tmp_path: Path) -> None:
    jobs.submit([program("outer", INNER, str(tmp_path / "inner"))], folder=tmp_path / "outer", cluster=SMALL)
    assert followed(tmp_path / "outer")["outer"].state == "COMPLETED"
    end = followed(tmp_path / "inner")["inner"]
    assert (end.state, said(end.log)) == ("COMPLETED", ["deep"])


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.usefixtures("limited")
def test_how_jobs_ended_is_known_when_slurm_has_forgotten_them(
    tmp_path: Path, own_slurm: LocalSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [
        program("good", "print('fine')"),
        program("bad", "import sys; sys.exit('It broke.')"),
        program("parts", "import sys; sys.exit(2 * {copy})", copies=2),
        program("cancelled", RESUMABLE, str(tmp_path)),
        program("never", "print('never')", after=("bad",)),
        program("killed", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"),
    ]
    ids = [job.job_id for job in jobs.submit(tasks, folder=tmp_path / "jobs", cluster=SMALL)]
    jobs.submit([tasks[-1]], folder=tmp_path / "alone", cluster=SMALL)  # squeue has other words about a single id
    assert followed(tmp_path / "alone")["killed"].state == "FAILED"
    until((tmp_path / "ready-0").exists)
    scancel(ids[4])
    remembered = {name: state.state for name, state in followed(tmp_path / "jobs").items()}
    assert remembered == {
        "good": "COMPLETED", "bad": "FAILED", "parts.0": "COMPLETED", "parts.1": "FAILED", "cancelled": "CANCELLED",
        "never": "CANCELLED", "killed": "FAILED",
    }  # fmt: skip

    own_slurm.forget()
    unknown = subprocess.run(["squeue", "-h", "-t", "all"], capture_output=True, text=True, check=True)
    assert unknown.stdout == ""
    accounted = {state.name: state for state in jobs.states(tmp_path / "jobs")}
    assert {name: state.state for name, state in accounted.items()} == remembered
    assert accounted["killed"].reason == ""  # told by the accounts, not guessed

    (own_slurm.stand_in / "sacct").unlink()  # Debian's own is left, which fails without a database
    assert subprocess.run(["sacct"], capture_output=True, check=False).returncode == 1
    left = {state.name: state for state in jobs.states(tmp_path / "jobs")}
    assert {name: state.state for name, state in left.items()} == remembered
    assert {name: state.exit_status for name, state in left.items() if state.exit_status is not None} == {
        "good": 0, "bad": 1, "parts.0": 0, "parts.1": 2, "cancelled": STOPPED,
    }  # fmt: skip
    assert left["never"].reason == "it never began"
    assert left["killed"].reason == "it left no word: it was killed, or its node was lost"
    (alone,) = jobs.states(tmp_path / "alone")
    assert (alone.state, alone.reason) == ("FAILED", left["killed"].reason)

    own_slurm.stop()
    end = tmp_path / "jobs" / "1" / f"{ids[0]}_end.json"
    shutil.move(end, tmp_path)
    silent = {state.name: state for state in jobs.states(tmp_path / "jobs")}
    assert (silent["good"].state, silent["good"].ended) == ("UNKNOWN", False)
    assert silent["good"].reason.startswith("slurm_load_jobs error: Unable to contact slurm controller")
    assert silent["bad"].state == "FAILED"
