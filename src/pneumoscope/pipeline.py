"""The main job: images in, a complete run directory out, in this process or in several.

Owns the order of the stages, and further folds and seeds. What a stage does is in `stages`; batch jobs are in `batch`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pneumoscope import _backend, _files, _stopping, appearance, card, jobs, repeats, report, survey, tracking
from pneumoscope.catalog import Catalog
from pneumoscope.errors import DataError, PneumoscopeError, RunError, StoppedEarly, UsageError
from pneumoscope.evaluation import Examiner
from pneumoscope.narration import Narration, seconds_text
from pneumoscope.runs import Run
from pneumoscope.scorecard import Choice
from pneumoscope.specs import INDIFFERENT, RESEARCH_USE, Spec
from pneumoscope.stages import Job, memory_to_judge, own_images, stages_of, status_of
from pneumoscope.tasks import State, Task, run_local

Executor = Literal["inline", "local"]

MEMORY_PER_TRAINING = 3 * 2**30
"""What one approach's process may need, bytes: bounds how many train at the same time on one machine."""


def run(
    spec: Spec,
    data: Path,
    folder: Path,
    *,
    folds: int = 0,
    seeds: int = 1,
    executor: Executor = "inline",
    resume: bool = False,
    narration: Narration | None = None,
    stop: Callable[[], bool] | None = None,
) -> Run:
    """Do the whole job: look at the images, train every approach, measure it, leave figures and tables.

    Parameters
    ----------
    spec : Spec
        What to do.
    data : Path
        Images, as `Catalog.scan` takes them.
    folder : Path
        The run directory to make.
    folds : int
        Where 2 or more, so many further runs in ``folds/1``, ``folds/2`` ... each hold out another part of the training
        groups; what they say together is in ``repeats.json``, their scores in ``tables/M_out_of_fold_yscores.csv``.
    seeds : int
        Where 2 or more, further runs with the next seeds in ``seeds/N``, so that there are so many in all; what they
        say together is in ``repeats.json``.
    executor : {"inline", "local"}
        ``inline``: one stage after the other in this process. ``local``: the approaches train at the same time, in
        processes of their own, as many as cores and memory allow. `batch.submit` does each stage as a batch job.
    resume : bool
        Go on with an earlier, unfinished run in `folder`; starts fresh where there is none.
    narration : Narration, optional
        Who speaks; silent where not given.
    stop : callable, optional
        Asked before each training step; where it returns True the state is kept and `StoppedEarly` raised.

    Returns
    -------
    Run

    Raises
    ------
    PneumoscopeError
        Any of its kinds: what is wrong with the data, the Spec, the weights or the disk.
    """
    voice = narration or Narration("silent")
    parts = parts_of(spec, folder, folds=folds, seeds=seeds)
    for part in parts:
        _run_once(part, data, executor=executor, resume=resume, voice=voice, stop=stop)
    _conclude(parts, voice)
    return parts[0].run


def perform(
    folder: Path,
    stage: str,
    *,
    threads: int = 0,
    shard: tuple[int, int] | None = None,
    narration: Narration | None = None,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Do one stage of a run that has been begun: what a batch job does.

    Parameters
    ----------
    folder : Path
        The run directory.
    stage : str
        One of `stages.stages_of`, or ``repeats`` for what further folds and seeds say together.
    threads : int
        CPU threads where the Spec leaves the number open; 0 takes all cores.
    shard : tuple of int, optional
        For ``features``: which part, from 0, of how many.
    narration : Narration, optional
        Who speaks; silent where not given.
    stop : callable, optional
        Asked before each training step.

    Raises
    ------
    PneumoscopeError
        As `run`.
    """
    voice, target = narration or Narration("silent"), Run.open(folder)
    manifest, spec = target.read_manifest(), target.read_spec()
    if stage == "repeats":
        _conclude(parts_of(spec, folder, folds=manifest["folds"], seeds=manifest["seeds"]), voice)
        return
    if stage not in stages_of(spec):
        raise UsageError(f"There is no stage {stage!r} in {folder}; choose from {', '.join(stages_of(spec))}.")
    if target.status == "finished":
        voice.say(f"{folder} is finished already.")
        return
    job = Job(target, spec, Path(manifest["data"]), voice, stop=stop, threads=threads)
    alone = shard is None and not stage.startswith("train-")  # the manifest has one writer at a time
    with _reported(target, voice, status=alone):
        job.perform(stage, shard=shard)
        if stage == "evaluate":
            _finish(target, voice, note=target.read_manifest()["note"])


def evaluate_run(target: Run, *, data: Path | None = None, narration: Narration | None = None) -> Path:
    """Score a run's models again, on its own images or on others.

    Parameters
    ----------
    target : Run
        Finished.
    data : Path, optional
        Other labelled images, all of which are scored but those that the run's models were made with; the run's own
        validation and test images where not given.
    narration : Narration, optional
        Who speaks; silent where not given.

    Returns
    -------
    Path
        The ``metrics.json`` that was written: the run's own, or for other data one under ``evaluations``, in a folder
        named for them and their content. Thresholds chosen on the run's validation images are carried over unchanged.

    Raises
    ------
    PneumoscopeError
        Where the run is not finished, or the images cannot be used.
    """
    voice = narration or Narration("silent")
    if target.status != "finished":
        raise RunError(
            f"The run in {target.folder} is {target.status}, not finished; run its command again with --resume first."
        )
    spec = target.read_spec()
    _backend.prepare(threads=spec.train.threads)
    if data is None:
        catalog, store = own_images(target, spec, voice)
        try:
            measured = appearance.look(catalog, store).measures
        except PneumoscopeError as error:  # scores need the packed images only
            voice.warn(f"There are no baselines beside the models: {error}")
            measured = None
        note = target.read_manifest()["note"]
        with memory_to_judge():
            Examiner(spec, target, catalog, store, (catalog, store), measured, voice, note).examine()
        _show(target, voice)
        return target.metrics_path
    catalog, store = survey.read_images(spec, data, voice, divide=False)
    catalog = _unseen(catalog, target, data, voice)
    other = Run(target.folder / "evaluations" / f"{data.resolve().stem}-{catalog.content_hash[:8]}")
    try:
        reference = own_images(target, spec, voice)
    except PneumoscopeError:  # a model may be judged where its training images are not
        reference = None
    note = survey.note_of(spec, data, catalog=catalog)
    of_run = _files.read_json(target.metrics_path)
    choices = {name: Choice.of_dict(of_run["models"][name]["validation"]) for name in target.trained()}
    with memory_to_judge():
        Examiner(spec, other, catalog, store, reference, None, voice, note).examine(
            models_of=target, choices=choices, chosen_on=of_run["chosen_on"]
        )
    card.write_card(target)  # it says how often other images were asked
    return other.metrics_path


def _unseen(catalog: Catalog, target: Run, data: Path, voice: Narration) -> Catalog:
    """Make test images of a set, without what the run's models have seen: there they look better than they are."""
    own = Catalog.read(target.catalog_path, root=catalog.root).rows()
    usable, used = catalog.rows()["image_id"], own.loc[own["split"] != "test", "image_id"]
    seen = usable[usable.isin(used)]
    if 0 < len(usable) == len(seen):
        raise DataError(
            f"Every usable image of {data} ({len(seen):,} in all) was used to train, steer or calibrate the models of "
            f"{target.folder}; give images that had no part in that run."
        )
    if len(seen):
        voice.warn(
            f"{len(seen):,} of {len(usable):,} images are left out: the run's models were trained, steered or "
            "calibrated with them."
        )
    found = catalog.quarantine(dict.fromkeys(seen, "seen in training"))
    found.require_usable()
    return replace(found, table=found.table.assign(split="test"))


# --- one run, and its repeats ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One run of a job: the first has no `kind`, the others are its folds and further seeds.

    Attributes
    ----------
    spec : Spec
        Its own: a fold's names the fold, a seed's the seed.
    run : Run
        Its directory.
    kind : {"", "folds", "seeds"}
        What it repeats the first run for.
    """

    spec: Spec
    run: Run
    kind: Literal["", "folds", "seeds"] = ""

    @property
    def prefix(self) -> str:
        """Before the names of its jobs."""
        return f"{self.kind}-{self.run.folder.name}-" if self.kind else ""


def parts_of(spec: Spec, folder: Path, *, folds: int, seeds: int) -> list[Part]:
    """Return the runs of a job: the first, then one for each fold, then one for each further seed.

    Parameters
    ----------
    spec, folder, folds, seeds
        As for `run`.

    Returns
    -------
    list of Part

    Raises
    ------
    SpecError
        For a number of folds that cannot be.
    """
    main = Run(folder)
    by_fold = [
        Part(
            spec.with_overrides([f"split.folds={folds}", f"split.fold={fold}"], source=f"--folds {folds}"),
            Run(main.repeat_folder("folds", fold)),
            "folds",
        )
        for fold in range(1, folds + 1)
    ]
    by_seed = [
        Part(spec.with_overrides([f"seed={seed}"]), Run(main.repeat_folder("seeds", seed)), "seeds")
        for seed in range(spec.seed + 1, spec.seed + seeds)
    ]
    return [Part(spec, main), *by_fold, *by_seed]


def begin(part: Part, *, resume: bool) -> Run:
    """Make a run directory or take up an earlier one, without changing anything in one that does not fit.

    Parameters
    ----------
    part : Part
        Which run.
    resume : bool
        As for `run`.

    Returns
    -------
    Run

    Raises
    ------
    RunError
        Where the folder cannot be used, batch jobs work on it, or it was begun with another configuration.
    """
    tracking.require(part.spec)
    target = Run.create(part.run.folder, resume=resume)
    living = [state for state in jobs.states_if_any(target.jobs_folder) if not state.ended]
    if living and all(state.state == "UNKNOWN" for state in living):
        raise RunError(
            f"Whether the batch jobs of {target.folder} still run cannot be asked here ({living[0].reason}); go on "
            f"where they were submitted, or, where they are gone for certain, delete {target.jobs_folder}."
        )
    if living:
        raise RunError(
            f"{target.folder} has batch jobs in the queue; 'pneumoscope jobs {target.folder} --wait' waits for them, "
            f"'pneumoscope jobs {target.folder} cancel' takes them back."
        )
    if target.catalog_path.exists():
        _check_same(target, part.spec)
    return target


def _run_once(
    part: Part,
    data: Path,
    *,
    executor: Executor,
    resume: bool,
    voice: Narration,
    stop: Callable[[], bool] | None,
) -> None:
    """Do the job once, in one folder."""
    target = begin(part, resume=resume)
    if target.status == "finished":
        voice.say(f"{target.folder} is finished already.")
        return
    with target.lock():
        earlier = target.read_manifest().get("data", str(data.absolute()))
        target.update_manifest(started=now(), data=earlier)
        with _reported(target, voice):
            job = Job(target, part.spec, data, voice, stop=stop)
            *before, last = (stage for stage in stages_of(part.spec) if not stage.startswith("train-"))
            for stage in before:
                job.perform(stage)
            _train_all(job, part.spec, target, executor=executor, voice=voice, stop=stop)
            job.perform(last)
            _finish(target, voice, note=target.read_manifest()["note"])


def _train_all(
    job: Job, spec: Spec, target: Run, *, executor: Executor, voice: Narration, stop: Callable[[], bool] | None
) -> None:
    """Train every approach; one that fails leaves the others alone."""
    if executor == "local":
        _train_side_by_side(spec, target, voice=voice, stop=stop)
        return
    for name in spec.models:
        try:
            job.perform(f"train-{name}")
        except StoppedEarly:
            raise
        except PneumoscopeError as error:
            if len(spec.models) == 1:
                raise
            voice.warn(f"{name}: {error}")


def _train_side_by_side(spec: Spec, target: Run, *, voice: Narration, stop: Callable[[], bool] | None) -> None:
    """Train the approaches at the same time, each in a process of its own."""
    cores, free = _backend.available_cores(), _files.free_memory()
    threads = spec.train.threads or max(1, cores // len(spec.models))
    at_once = max(1, min(len(spec.models), cores // threads, free // MEMORY_PER_TRAINING))
    voice.say(
        f"  Training {', '.join(spec.models)} in processes of their own, {at_once} at the same time, {threads} "
        f"thread{'s' * (threads > 1)} each ({cores} cores, {_files.size_text(free)} of memory free)."
    )
    tasks = [
        replace(
            task_of(target, f"train-{name}"), command=(*command_of(target, f"train-{name}"), "--threads", str(threads))
        )
        for name in spec.models
    ]
    with _stopping.patient():  # the processes keep their state, and are waited for
        ended = run_local(
            tasks,
            folder=target.jobs_folder,
            at_once=at_once,
            on_change=lambda state: say_state(state, voice),
            stop=stop,
        )
    if StoppedEarly.exit_status in ended.values():
        raise StoppedEarly("Stopped on request; run the same command with --resume.")


@contextmanager
def _reported(target: Run, voice: Narration, *, status: bool = True) -> Iterator[None]:
    """Keep in the log what is said, and where `status` is true, in the manifest how the work inside ends."""
    try:
        voice.log_to(target.log_path)
        if status:
            target.update_manifest(status="running", error=None)
        yield
    except BaseException as error:
        voice.end(error)
        if status:
            target.update_manifest(status=status_of(error), error=str(error) or type(error).__name__)
            if target.metrics_path.exists():  # what was measured can be looked at
                _show(target, voice)
        raise
    finally:
        voice.close()


def _finish(target: Run, voice: Narration, *, note: str) -> None:
    target.discard_checkpoints()
    seconds = (datetime.now(UTC) - datetime.fromisoformat(target.read_manifest()["started"])).total_seconds()
    target.update_manifest(status="finished", error=None, finished=now(), seconds=seconds)
    _show(target, voice)
    voice.say(
        f"Finished in {seconds_text(seconds)}. Everything is in {target.folder}; open {target.report_path.name} there, "
        f"or read the figures of merit in {target.metrics_path.name}."
    )
    voice.say(f"{RESEARCH_USE}." + (f" {note}." if note else ""))


def _show(target: Run, voice: Narration) -> None:
    """Write the page that people read; whatever is wrong with it, the run stands."""
    try:
        report.write_report(target)
    except PneumoscopeError as error:
        voice.warn(f"There is no report: {error}")


def _conclude(parts: Sequence[Part], voice: Narration) -> None:
    """Put together what folds and seeds say that one run cannot."""
    main = parts[0]
    folds, seeds = ([part.run for part in parts if part.kind == kind] for kind in ("folds", "seeds"))
    said: dict[str, Any] = {}
    if folds:
        pooled = repeats.out_of_fold(folds)
        said["folds"] = repeats.cross_validated(folds, pooled, spec=main.spec.evaluation, seed=main.spec.seed)
        repeats.write_out_of_fold(main.run, pooled)
    if seeds:
        said["seeds"] = repeats.over_seeds([main.run, *seeds])
    if not said:
        return
    _files.write_json(main.run.repeats_path, said)
    card.write_card(main.run)
    _show(main.run, voice)
    voice.log_to(main.run.log_path)
    for part in said.values():
        for sentence in part["sentences"]:
            voice.say(f"  {sentence}")
    voice.close()


def concluded(parts: Sequence[Part]) -> bool:
    """Return whether what these folds and further seeds say together is written; where there are none, it is.

    Parameters
    ----------
    parts : sequence of Part
        From `parts_of`.

    Returns
    -------
    bool

    Raises
    ------
    StoreError
        Where what was written is damaged.
    """
    main, folds = parts[0], sum(part.kind == "folds" for part in parts)
    seeds = [main.spec.seed, *(part.spec.seed for part in parts if part.kind == "seeds")]
    said = _files.read_json(main.run.repeats_path) if len(parts) > 1 and main.run.repeats_path.exists() else {}
    return (not folds or said.get("folds", {}).get("folds") == folds) and (
        len(seeds) == 1 or said.get("seeds", {}).get("seeds") == seeds
    )


def _check_same(target: Run, spec: Spec) -> None:
    earlier = target.read_spec()
    if earlier.hash != spec.hash:
        before, now = (part.model_dump(mode="json", exclude=set(INDIFFERENT)) for part in (earlier, spec))
        changed = sorted(key for key in now if now[key] != before[key])
        raise RunError(
            f"{target.folder} was begun with another configuration (different: {', '.join(changed)}); "
            "use the same one to go on, or choose a new folder with -o."
        )


def task_of(target: Run, stage: str, prefix: str = "") -> Task:
    """Return one stage of a run as a command line with a name.

    Parameters
    ----------
    target : Run
        Which run.
    stage : str
        One of `stages.stages_of`, or ``repeats``.
    prefix : str
        Before the name.

    Returns
    -------
    Task
    """
    return Task(f"{prefix}{stage}", command_of(target, stage))


def command_of(target: Run, stage: str) -> tuple[str, ...]:
    """Return the command line that does one stage of a run, in any process.

    Parameters
    ----------
    target : Run
        Which run.
    stage : str
        One of `stages.stages_of`, or ``repeats``.

    Returns
    -------
    tuple of str
        Program and arguments.
    """
    return (sys.executable, "-m", "pneumoscope", "stage", str(target.folder.absolute()), stage)


def say_state(state: State, voice: Narration) -> None:
    """Say that a job began or ended; of one that failed, where its log is and how it ends.

    Parameters
    ----------
    state : State
        How it stands with the job.
    voice : Narration
        Who speaks.
    """
    text = f"  {state.name}: {state.state.lower()}"
    if state.reason:
        text += f" ({state.reason})"
    if state.tail:
        text += f"; its log {state.log} ends: " + " | ".join(state.tail)
    voice.event("job", text, name=state.name, id=state.job_id, state=state.state)


def now() -> str:
    """Return the time as the manifest keeps it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
