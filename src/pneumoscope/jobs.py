"""Tasks as Slurm jobs: handing them over in order, seeing how they go, cancelling them.

Owns what Slurm is asked for, the record of what was submitted, and how a job's state is found out on sites that keep
no accounts. Knows nothing of what the commands do. submitit does the submitting; see `pneumoscope._job` for what runs
inside a job.

A folder of jobs::

    FOLDER/jobs.json           the latest submission: name, job id and log of each job
           1/, 2/ ...          one for each submission: submitit's files, logs, and how each job ended
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pneumoscope import _files, _job
from pneumoscope.errors import PneumoscopeError, SpecError, StoreError, UsageError
from pneumoscope.surroundings import ClusterSpec
from pneumoscope.tasks import STOPPED, STOPPED_REASON, UNFINISHED, OnChange, State, Task, check, tail

_ANSWER_S = 60  # a busy controller may take its time
_SET_BY_US = frozenset(
    {"array", "dependency", "error", "job_name", "kill_on_invalid_dep", "no_requeue", "open_mode", "output"}
    | {"requeue", "signal", "time"}
)
_BEGINNING = " - Starting with JobEnvironment("  # submitit's first line of each life of a job
# what Slurm writes into the log of a job that it ends, and the state that means
_LAST_WORDS = re.compile(r"\*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]*[A-Z]))? \*\*\*")
_STATE_FOR = {"": "CANCELLED", "TIME LIMIT": "TIMEOUT", "NODE FAILURE": "NODE_FAIL", "PREEMPTION": "PREEMPTED"}


@dataclass(frozen=True)
class Submitted:
    """One job that Slurm took, or one copy of a job array.

    Attributes
    ----------
    name : str
        The task's, with the copy's number where there are several.
    job_id : str
        Slurm's; ``123_0`` for a copy.
    log : Path
        What it says goes here; there once it runs.
    submitted_at : str
        UTC, ISO 8601.
    """

    name: str
    job_id: str
    log: Path
    submitted_at: str


@dataclass(frozen=True)
class Allocation:
    """What Slurm has given to the job that this process runs in.

    Attributes
    ----------
    job_id : str
        Slurm's.
    nodes : int
        All of them.
    cpus, gpus : int
        On this node.
    """

    job_id: str
    nodes: int
    cpus: int
    gpus: int


def available() -> bool:
    """Return whether jobs can be submitted from here: ``sbatch`` is on the PATH."""
    return shutil.which("sbatch") is not None


def inside() -> Allocation | None:
    """Return the allocation that this process holds, from the variables that Slurm sets; None outside any job."""
    job_id = os.environ.get("SLURM_JOB_ID")
    if not job_id:
        return None

    def number(name: str, otherwise: int) -> int:
        text = os.environ.get(name, "")
        return int(text) if text.isdecimal() else otherwise

    listed = [gpu for gpu in os.environ.get("SLURM_JOB_GPUS", "").split(",") if gpu]
    return Allocation(
        job_id,
        nodes=number("SLURM_JOB_NUM_NODES", 1),
        cpus=number("SLURM_CPUS_ON_NODE", os.cpu_count() or 1),
        gpus=number("SLURM_GPUS_ON_NODE", len(listed)),
    )


# --- to Slurm ---------------------------------------------------------------------------------------------------------


def scripts(tasks: Sequence[Task], *, folder: Path, cluster: ClusterSpec) -> dict[str, str]:
    """Return what `submit` would hand to ``sbatch``, without submitting; no Slurm is needed.

    Parameters
    ----------
    tasks : sequence of Task
        In an order in which they can run.
    folder : Path
        As for `submit`; nothing is written.
    cluster : ClusterSpec
        What each job asks for.

    Returns
    -------
    dict of str to str
        Task name -> script, exactly, but that dependencies show the tasks' names in place of job ids.

    Raises
    ------
    UsageError
        Where `check` refuses the tasks, or the folder's path holds ``%``.
    SpecError
        Where ``cluster.extra`` sets what is set here.
    """
    check(tasks)
    target = _next_submission(folder)
    names = {task.name: task.name for task in tasks}
    return {task.name: _script(task, target=target, cluster=cluster, ids=names) for task in tasks}


def submit(tasks: Sequence[Task], *, folder: Path, cluster: ClusterSpec) -> list[Submitted]:
    """Hand tasks to Slurm, chained by their dependencies.

    Each job starts its command in the folder that this process works in, with this process's environment. Before the
    time limit, and at preemption, the command gets SIGTERM and is waited for; then the job goes back into the queue
    where ``cluster.requeue`` is true, and ends with status 75 else.

    Parameters
    ----------
    tasks : sequence of Task
        In an order in which they can run.
    folder : Path
        Where jobs are recorded and logs go; on a disk that the nodes share.
    cluster : ClusterSpec
        What each job asks for.

    Returns
    -------
    list of Submitted
        In the order of the tasks; each copy by itself.

    Raises
    ------
    UsageError
        Where there is no Slurm here, `check` refuses the tasks, or the folder's path holds ``%``.
    SpecError
        Where ``cluster.extra`` sets what is set here.
    PneumoscopeError
        Where Slurm refuses a job (those before it are cancelled), the folder cannot be written, or its earlier jobs
        have not ended.
    """
    check(tasks)
    if not available():
        raise UsageError(
            "There is no Slurm here (sbatch is not on the PATH); go to a node of the cluster from which jobs are "
            "submitted, or run the tasks as local processes."
        )
    living = [state for state in states_if_any(folder) if not state.ended]
    if living:
        raise PneumoscopeError(
            f"{folder} has jobs that have not ended ({living[0].name} is {living[0].state}, job {living[0].job_id}); "
            "wait for them, or cancel them first."
        )
    target = _next_submission(folder)
    try:
        target.mkdir(parents=True)
    except OSError as error:
        raise PneumoscopeError(
            f"Cannot write jobs to {folder}: {error.strerror or error}; choose a folder you may write to."
        ) from error
    submitted: list[Submitted] = []
    ids: dict[str, str] = {}
    try:
        with _as_outside_a_job():
            for task in tasks:
                submitted += _sbatch(task, target=target, cluster=cluster, ids=ids)
                ids[task.name] = submitted[-1].job_id.split("_")[0]
                _record(folder, submitted)
    except BaseException:
        if ids:
            _ask("scancel", *reversed(ids.values()))  # those that wait for others first
        raise
    return submitted


def _next_submission(folder: Path) -> Path:
    """A folder of its own for each submission: ids that a new cluster gives again would find an older job's files."""
    folder = folder.absolute()
    if "%" in str(folder):
        raise UsageError(f"{folder} holds '%', which Slurm replaces in the names of logs; choose a folder without it.")
    numbers = [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()] if folder.is_dir() else []
    return folder / str(max(numbers, default=0) + 1)


def _executor(task: Task, *, target: Path, cluster: ClusterSpec, ids: Mapping[str, str]) -> Any:
    """Submitit's executor for one task, with everything that Slurm is asked for."""
    from submitit import SlurmExecutor  # late: only where there are jobs; Slurm is not for every system

    class Executor(SlurmExecutor):  # type: ignore[misc]
        @classmethod
        def affinity(cls) -> int:
            return 1  # texts are wanted where there is no Slurm; `submit` looks for it by itself

    kinds = (("afterok", task.after), ("afterany", task.after_any))
    dependency = ",".join(":".join((kind, *(ids[name] for name in names))) for kind, names in kinds if names)
    extra = {key.replace("-", "_"): value for key, value in cluster.extra.items()}
    if refused := sorted(_SET_BY_US & set(extra)):
        raise SpecError(f"cluster.extra sets {refused[0]!r}, which comes from the other keys of cluster; remove it.")
    ours = {
        "signal": f"{cluster.signal}@{cluster.signal_delay_s}",
        ("requeue" if cluster.requeue else "no_requeue"): True,
    }
    if dependency:
        ours["kill_on_invalid_dep"] = "yes"  # else a job whose parent failed waits for ever
    executor = Executor(target, max_num_timeout=cluster.requeues)
    executor.update_parameters(
        job_name=task.name,
        partition=cluster.partition or None,
        account=cluster.account or None,
        time=cluster.time_min,
        nodes=task.nodes,
        ntasks_per_node=1,
        cpus_per_task=cluster.cpus,
        mem=f"{round(cluster.mem_gb * 1024)}MB" if cluster.mem_gb else None,
        gpus_per_node=(cluster.gpus if task.gpus else 0) or None,
        dependency=dependency or None,
        wckey=None,
        stderr_to_stdout=True,
        additional_parameters=ours | extra,
        # srun of Slurm 22.05 to 23.02 does not take the cores over from the job
        srun_args=[f"--cpus-per-task={extra.get('cpus_per_task', cluster.cpus)}", "--kill-on-bad-exit=1"],
        # the script starts submitit, which starts the command: the comment tells a reader which
        setup=[
            *cluster.setup,
            f"export SUBMITIT_PREEMPT_SIGNAL={cluster.signal}",
            f"# runs {_one_line(shlex.join(task.command))}",
        ],
    )
    return executor


def _one_line(text: str) -> str:
    """Keep a comment of the script one: what stood after a line's end would be run by the shell."""
    return "\\n".join(text.splitlines())


def _script(task: Task, *, target: Path, cluster: ClusterSpec, ids: Mapping[str, str]) -> str:
    executor = _executor(task, target=target, cluster=cluster, ids=ids)
    if task.copies > 1:
        executor.parameters["map_count"] = task.copies  # as its submit_array does
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def _sbatch(task: Task, *, target: Path, cluster: ClusterSpec, ids: Mapping[str, str]) -> list[Submitted]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = _executor(task, target=target, cluster=cluster, ids=ids)
    calls = [_job.Command(command, warning=cluster.signal, requeue=cluster.requeue) for _, command in task.each()]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats there what it raises
            jobs = executor.submit_array(calls)
    except (FailedJobError, FailedSubmissionError) as error:
        words = "; ".join(re.sub(r"^sbatch: (error|fatal): ", "", line.strip()) for line in str(error).splitlines())
        raise PneumoscopeError(
            f"Slurm did not take the job {task.name!r} ({words}); no job of this submission is left; "
            "mend what it names, then run the same command again."
        ) from error
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return [
        Submitted(name, job.job_id, target / f"{job.job_id}_0_log.out", now)
        for (name, _), job in zip(task.each(), jobs, strict=True)
    ]


@contextlib.contextmanager
def _as_outside_a_job() -> Iterator[None]:
    """Hide what Slurm set for the job that this process runs in: a new job would take it for its own wishes."""
    hidden = {}
    if "SLURM_JOB_ID" in os.environ:
        hidden = {name: os.environ.pop(name) for name in list(os.environ) if _belongs_to_a_job(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _belongs_to_a_job(name: str) -> bool:
    return name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")) and name not in ("SLURM_CONF", "SLURM_CLUSTERS")


def _record(folder: Path, submitted: list[Submitted]) -> None:
    jobs = [vars(job) | {"log": job.log.relative_to(folder.absolute()).as_posix()} for job in submitted]
    _files.write_json(folder / "jobs.json", {"jobs": jobs})


def _recorded(folder: Path) -> list[Submitted]:
    jobs = _files.read_json(folder / "jobs.json")["jobs"]
    return [Submitted(**job | {"log": folder / job["log"]}) for job in jobs]


# --- how jobs go ------------------------------------------------------------------------------------------------------


def states(folder: Path) -> list[State]:
    """Return how it stands with each job of the latest submission.

    Slurm's queue is asked first, then its accounts, which not every site keeps; for jobs that both have forgotten,
    what they left on the disk tells.

    Parameters
    ----------
    folder : Path
        As for `submit`.

    Returns
    -------
    list of State
        In the order of the tasks.

    Raises
    ------
    PneumoscopeError
        Where no job was ever submitted for this folder, or its record is damaged.
    """
    if not (folder / "jobs.json").exists():
        raise PneumoscopeError(f"{folder} has no jobs (there is no jobs.json in it); submit them first.")
    submitted = _recorded(folder)
    ids = {job.job_id for job in submitted}
    told, silence = _squeue(ids)
    if forgotten := ids - told.keys():
        told |= _sacct(forgotten)
    return [_state(job, told.get(job.job_id), silence) for job in submitted]


def states_if_any(folder: Path) -> list[State]:
    """Return the same as `states`, and nothing where no job was ever submitted.

    Parameters
    ----------
    folder : Path
        As for `submit`.

    Returns
    -------
    list of State
        In the order of the tasks.
    """
    return states(folder) if (folder / "jobs.json").exists() else []


def wait(folder: Path, *, every_s: float = 10.0, on_change: OnChange | None = None) -> list[State]:
    """Follow the jobs of the latest submission until all have ended.

    Parameters
    ----------
    folder : Path
        As for `submit`.
    every_s : float
        How often Slurm is asked, seconds.
    on_change : callable, optional
        Called with the State of each job at first, and whenever its state or reason is another one.

    Returns
    -------
    list of State
        The last ones.

    Raises
    ------
    PneumoscopeError
        As `states`.
    """
    seen: dict[str, tuple[str, str]] = {}
    while True:
        current = states(folder)
        for state in current:
            if on_change and seen.get(state.job_id) != (state.state, state.reason):
                on_change(state)
            seen[state.job_id] = (state.state, state.reason)
        if all(state.ended for state in current):
            return current
        time.sleep(every_s)


def cancel(folder: Path) -> list[State]:
    """Cancel the jobs of the latest submission that have not ended.

    Parameters
    ----------
    folder : Path
        As for `submit`.

    Returns
    -------
    list of State
        How it stood with those that were cancelled.

    Raises
    ------
    PneumoscopeError
        As `states`, and where Slurm does not cancel them.
    """
    living = [state for state in states(folder) if not state.ended]
    ids = sorted({state.job_id.split("_")[0] for state in living})
    # those that wait go first: the end of another must not start them
    for only in (["--state=PENDING"], []):
        answer = _ask("scancel", *only, *ids) if ids else None
        if answer is not None and answer.returncode:
            raise PneumoscopeError(
                f"Slurm did not cancel the jobs {', '.join(ids)} ({_words(answer)}); try again, or use scancel."
            )
    return living


def _state(job: Submitted, told: tuple[str, str] | None, silence: str) -> State:
    exit_status = _noted(job)
    if told is None:
        told = ("UNKNOWN", silence) if silence and exit_status is None else _left_behind(job, exit_status)
    elif told[0] in ("TIMEOUT", "PREEMPTED") and exit_status == 0:
        told = "COMPLETED", ""  # it was done with its work within the seconds that Slurm leaves a job it has warned
    state = State(job.name, job.job_id, told[0], job.log, told[1])
    if state.ended:
        state = replace(state, exit_status=0 if state.well else exit_status)
    if state.exit_status == STOPPED:
        state = replace(state, reason=STOPPED_REASON)
    return replace(state, tail=tail(job.log)) if state.ended and not state.well else state


def _noted(job: Submitted) -> int | None:
    """The exit status that the job wrote down when it ended."""
    try:
        return int(_files.read_json(_job.end_path(job.log.parent, job.job_id))["exit_status"])
    except StoreError:
        return None


def _left_behind(job: Submitted, exit_status: int | None) -> tuple[str, str]:
    """Tell from its files how a job ended that Slurm does not know any more."""
    if exit_status == 0:
        return "COMPLETED", ""
    if job.log.exists():
        text = job.log.read_text(encoding="utf-8", errors="replace")
        said = _LAST_WORDS.findall(text.rpartition(_BEGINNING)[2])
        if said and said[-1] in _STATE_FOR:
            return _STATE_FOR[said[-1]], ""
    elif exit_status is None:
        return "CANCELLED", "it never began"
    return "FAILED", "" if exit_status else "it left no word: it was killed, or its node was lost"


def _squeue(ids: set[str]) -> tuple[dict[str, tuple[str, str]], str]:
    """Return job id -> (state, reason) of the jobs in Slurm's memory, and why it cannot be asked, else empty."""
    plain = sorted({job_id.split("_")[0] for job_id in ids})
    answer = _ask("squeue", "--all", "-h", "-r", "-t", "all", "-o", "%i|%T|%r", "-j", ",".join(plain))
    if answer.returncode and "Invalid job id" not in answer.stderr:  # what it says where it knows none of them
        return {}, _words(answer)
    rows = [line.split("|", 2) for line in answer.stdout.splitlines() if line.count("|") >= 2]
    return {job_id: (state, "" if reason == "None" else reason) for job_id, state, reason in rows}, ""


def _sacct(ids: set[str]) -> dict[str, tuple[str, str]]:
    """Return job id -> (state, "") of ended jobs in Slurm's accounts; nothing where it keeps none."""
    plain = sorted({job_id.split("_")[0] for job_id in ids})
    answer = _ask("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(plain))
    rows = [line.split("|", 1) for line in answer.stdout.splitlines() if "|" in line]
    # "CANCELLED by 1000"; one that is said to run, and that the queue does not know, is not yet booked
    told = {job_id: state.split()[0] for job_id, state in rows if state.strip()}
    return {job_id: (state, "") for job_id, state in told.items() if job_id in ids and state not in UNFINISHED}


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs; one that is not here or does not answer is a failed one."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not on the PATH")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} did not answer within {_ANSWER_S} s")


def _words(answer: subprocess.CompletedProcess[str]) -> str:
    return " ".join(answer.stderr.split()) or f"{answer.args[0]} ended with status {answer.returncode}"
