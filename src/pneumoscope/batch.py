"""The main job as batch jobs of a cluster: one job for each stage, chained by what it needs.

Owns which jobs a run makes and what a person sees of them. How jobs are submitted is in `jobs`, what a stage does in
`stages`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pneumoscope import _files, doctor, jobs
from pneumoscope.errors import PneumoscopeError, RunError, StoppedEarly
from pneumoscope.narration import Narration
from pneumoscope.pipeline import Part, begin, command_of, concluded, now, parts_of, say_state, task_of
from pneumoscope.runs import Run
from pneumoscope.specs import Spec
from pneumoscope.stages import stages_of
from pneumoscope.tasks import State, Task


def submit(
    spec: Spec,
    data: Path,
    folder: Path,
    *,
    folds: int = 0,
    seeds: int = 1,
    resume: bool = False,
    narration: Narration | None = None,
) -> Run:
    """Put every stage of a run into the queue, chained by what it needs, and return.

    Parameters
    ----------
    spec, data, folder, folds, seeds, resume, narration
        As for `pipeline.run`.

    Returns
    -------
    Run

    Raises
    ------
    PneumoscopeError
        Where something is missing that a job would miss, the run cannot be taken up, or Slurm refuses.
    """
    voice = narration or Narration("silent")
    parts = parts_of(spec, folder, folds=folds, seeds=seeds)
    main = parts[0].run
    doctor.require(spec, data, executor="slurm", folder=folder)
    Run.create(main.folder, resume=resume)
    with main.lock():
        begun = [part for part in parts if begin(part, resume=resume).status != "finished"]
        if not begun and concluded(parts):
            voice.say(f"{main.folder} is finished already.")
            return main
        for part in begun:
            _files.write_text(part.run.spec_path, part.spec.to_toml())
            part.run.update_manifest(status="queued", started=now(), error=None, data=str(data.absolute()))
        folds, seeds = (sum(part.kind == kind for part in parts) for kind in ("folds", "seeds"))
        main.update_manifest(folds=folds, seeds=seeds + 1)
        tasks = _tasks(begun, repeats_of=parts)
        try:
            submitted = jobs.submit(tasks, folder=main.jobs_folder, cluster=spec.cluster)
        except PneumoscopeError as error:
            for part in begun:
                part.run.update_manifest(status="failed", error=str(error))
            raise
    voice.table("Submitted", ["job", "id"], [[job.name, job.job_id] for job in submitted])
    voice.say(f"Follow them with: pneumoscope jobs {shlex.quote(str(main.folder))} --wait")
    return main


def scripts(spec: Spec, data: Path, folder: Path, *, folds: int = 0, seeds: int = 1) -> dict[str, str]:
    """Return what `submit` would submit, and submit nothing.

    Parameters
    ----------
    spec, data, folder, folds, seeds
        As for `pipeline.run`.

    Returns
    -------
    dict of str to str
        The ``sbatch`` script of each job, by the job's name, in order.

    Raises
    ------
    SpecError
        For a number of folds that cannot be.
    """
    parts = parts_of(spec, folder, folds=folds, seeds=seeds)
    return jobs.scripts(_tasks(parts), folder=parts[0].run.jobs_folder, cluster=spec.cluster)


def show_jobs(folder: Path, *, narration: Narration) -> None:
    """Show a run's batch jobs: state, progress, log; of those that failed, the reason.

    Parameters
    ----------
    folder : Path
        The run directory.
    narration : Narration
        Who speaks.

    Raises
    ------
    RunError
        Where no jobs were submitted for it.
    """
    states = _states(Run(folder))
    rows = [[one.name, one.job_id, one.state, *_progress_of(folder, one.name), str(one.log)] for one in states]
    narration.table(f"Jobs of {folder}", ["job", "id", "state", "epoch", "val_loss", "log"], rows)
    for one in states:
        if one.tail:
            say_state(one, narration)


def follow(folder: Path, *, narration: Narration) -> None:
    """Follow a run's batch jobs until the last has ended.

    Parameters
    ----------
    folder : Path
        The run directory.
    narration : Narration
        Who speaks.

    Raises
    ------
    RunError
        Where no jobs were submitted for it, or the run did not come to its end.
    """
    target = Run(folder)
    _states(target)
    ended = jobs.wait(target.jobs_folder, on_change=lambda state: say_state(state, narration))
    failed = [state.name for state in ended if not state.well]
    if target.status == "finished" and failed:  # of its folds or further seeds
        raise RunError(
            f"The run in {folder} is finished, but {', '.join(failed)} did not end well; 'pneumoscope jobs {folder}' "
            "shows why; mend that and run the same command with --resume."
        )
    if target.status == "finished":
        narration.say(f"Everything is in {folder}; the figures of merit are in {target.metrics_path}.")
        return
    reason = target.read_manifest().get("error") or "its last job left no reason"
    kind = StoppedEarly if target.status == "stopped" else RunError
    raise kind(
        f"The run in {folder} is {target.status}: {reason} 'pneumoscope jobs {folder}' shows every job; "
        "the same command with --resume goes on."
    )


def cancel(folder: Path, *, narration: Narration) -> None:
    """Take back a run's batch jobs; what was done stays, and the run can be taken up again.

    Parameters
    ----------
    folder : Path
        The run directory.
    narration : Narration
        Who speaks.

    Raises
    ------
    RunError
        Where no jobs were submitted for it.
    """
    target = Run(folder)
    _states(target)
    jobs.cancel(target.jobs_folder)
    if target.status in ("queued", "running"):
        target.update_manifest(status="stopped", error="Its jobs were cancelled.")
    narration.say(f"Cancelled. The run in {folder} goes on with the same command and --resume.")


def _states(target: Run) -> list[State]:
    if not (target.jobs_folder / "jobs.json").exists():
        raise RunError(f"No batch jobs were submitted for {target.folder}; that is what run --executor slurm does.")
    return jobs.states(target.jobs_folder)


def _progress_of(folder: Path, name: str) -> tuple[str, str]:
    """Return how far a training is: its epoch of how many and its last validation loss."""
    prefix, _, approach = name.rpartition("train-")
    part = folder.joinpath(*prefix.rstrip("-").split("-")) if prefix else folder
    record = Run(part).read_stages().get(f"train-{approach}", {})
    if "epoch" not in record:
        return "-", "-"
    loss = record["val_loss"]  # None where it was no number
    return f"{record['epoch']}/{record['epochs']}", "-" if loss is None else f"{loss:.4f}"


def _tasks(parts: Sequence[Part], *, repeats_of: Sequence[Part] | None = None) -> list[Task]:
    """Return the jobs of some parts: images -> features -> approaches at the same time -> evaluation; then repeats."""
    tasks: list[Task] = []
    for part in parts:
        first = f"{parts[0].prefix}images"
        tasks += _tasks_of(part, after=(first,) if tasks else ())
    everything = repeats_of or parts
    if len(everything) > 1:
        judged = tuple(task.name for task in tasks if task.name.endswith("evaluate"))
        tasks.append(replace(task_of(everything[0].run, "repeats"), after=judged))
    return tasks


def _tasks_of(part: Part, *, after: tuple[str, ...]) -> list[Task]:
    cluster = part.spec.cluster
    names = stages_of(part.spec)
    found = [replace(task_of(part.run, "images", part.prefix), after=after)]
    if "features" in names:
        if cluster.shards > 1:
            command = (*command_of(part.run, "features"), "--shard", f"{{copy}}/{cluster.shards}")
            sharded = Task(f"{part.prefix}features-shards", command, gpus=True, copies=cluster.shards)
            found.append(replace(sharded, after=(found[-1].name,)))
        found.append(replace(task_of(part.run, "features", part.prefix), after=(found[-1].name,), gpus=True))
    last = found[-1].name
    trained = [
        replace(task_of(part.run, f"train-{name}", part.prefix), after=(last,), gpus=True, nodes=cluster.nodes)
        for name in part.spec.models
    ]
    judged = replace(
        task_of(part.run, "evaluate", part.prefix), after_any=tuple(task.name for task in trained), gpus=True
    )
    return [*found, *trained, judged]
