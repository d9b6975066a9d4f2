"""The stages of a run: what each does, leaves in the Run, and says of itself in its record.

Every stage can be done by a process of its own, and done again: it does what is still to do. Knows nothing of the order
of stages between processes.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from pneumoscope import (
    _backend,
    _files,
    _stopping,
    appearance,
    backbones,
    figures,
    models,
    survey,
    tracking,
    training,
)
from pneumoscope.catalog import Catalog
from pneumoscope.errors import PneumoscopeError, RunError, StoppedEarly
from pneumoscope.evaluation import Examiner, speed
from pneumoscope.narration import Bar, Narration, seconds_text
from pneumoscope.runs import Run, Status
from pneumoscope.specs import PRETRAINED, TITLES, Spec, TrainSpec
from pneumoscope.store import ImageStore

_NEEDS_MEMORY = "train.batch_size or image.size_px"
"""What decides how much memory training and scoring take."""


def stages_of(spec: Spec) -> list[str]:
    """Return the stages of one run, in order: ``images``, ``features``, ``train-M`` for each approach, ``evaluate``."""
    cached = spec.features.cache and set(PRETRAINED) & set(spec.models)
    return ["images", *(["features"] if cached else []), *(f"train-{name}" for name in spec.models), "evaluate"]


@dataclass(frozen=True)
class _Images:
    """The images of a run.

    Attributes
    ----------
    catalog : Catalog
        Divided, without what could not be decoded.
    store : ImageStore
        Packed.
    measured : DataFrame, optional
        The files' measures, for the baselines that see no lung.
    note : str
        What must stand on every output.
    """

    catalog: Catalog
    store: ImageStore
    measured: pd.DataFrame | None
    note: str


_LEAP = 64
"""Images between two reports of progress; more at once were not computed but stored before."""


class _Pace:
    """Counts what is computed between two reports of progress, and passes the reports on.

    The first step, in which a network is compiled, does not count, nor does a leap over what was stored before.
    """

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report, self._last = report, (-1, 0.0)
        self.images, self.seconds = 0, 0.0

    def __call__(self, done: int, total: int) -> None:
        before, since = self._last
        now = time.perf_counter()
        if before >= 0 and 0 < done - before <= _LEAP:
            self.images, self.seconds = self.images + done - before, self.seconds + now - since
        self._last = done, now
        self._report(done, total)


class _Epochs:
    """Shows the steps of all epochs, of teachers first and then of the model, as steps of one training."""

    def __init__(self, bar: Bar, spec: TrainSpec) -> None:
        self._bar, self._epochs, self._teachers = bar, spec.epochs, spec.teachers
        self._before, self._ended = 0, 0

    def begin(self, teachers_done: int, epochs_done: int) -> None:
        """Show the steps of the next network from here on."""
        self._before, self._ended = teachers_done, epochs_done

    def __call__(self, done: int, total: int) -> None:
        who = f"teacher {self._before + 1}/{self._teachers}, " if self._before < self._teachers else ""
        self._bar.note(f"{who}epoch {min(self._ended + 1, self._epochs)}/{self._epochs}")
        before, whole = self._before * self._epochs + self._ended, (self._teachers + 1) * self._epochs
        self._bar(before * total + done, whole * total)
        self._ended += done == total


class Job:
    """The stages of one run; in one process they share the images, in several each opens them again.

    Parameters
    ----------
    target : Run
        Where everything goes.
    spec : Spec
        What to do.
    data : Path
        The images.
    voice : Narration
        Who speaks.
    stop : callable, optional
        Asked before each training step.
    threads : int
        CPU threads where the Spec leaves the number open; 0 takes all cores.
    """

    def __init__(
        self,
        target: Run,
        spec: Spec,
        data: Path,
        voice: Narration,
        *,
        stop: Callable[[], bool] | None = None,
        threads: int = 0,
    ) -> None:
        self.run, self.spec, self.data, self.voice, self._stop = target, spec, data, voice, stop
        self._threads = spec.train.threads or threads
        self._mirrors = tracking.Mirrors(target, spec, voice)
        self._spent = "", datetime.now(UTC), 0.0  # which stage, since when, and its seconds before that

    def perform(self, stage: str, *, shard: tuple[int, int] | None = None) -> None:
        """Do one stage, and keep in its record when, where and how it ended.

        Parameters
        ----------
        stage : str
            One of `stages_of`.
        shard : tuple of int, optional
            For ``features``: which part of the images, from 0, of how many; the whole where not given.

        Raises
        ------
        PneumoscopeError
            Of any kind: what is wrong with the data, the Spec, the weights or the disk.
        """
        name, _, approach = stage.partition("-")
        work = {"images": self._images, "features": self._features, "evaluate": self._evaluate}.get(name)
        recorded = stage if shard is None else f"{stage}-{shard[0]}"
        devices = self.spec.train.devices if approach else 1
        if _backend.process(devices)[0]:  # of several processes that train one model, the first one writes
            self._train_beside(approach)
            return
        with self.run.lock(recorded), self._mirrors.during(stage), self._recorded(recorded):
            _backend.prepare(threads=self._threads)
            _backend.distribute(devices, batch_size=self.spec.train.batch_size)
            if shard is not None:
                self._features(shard)
            elif work is not None:
                work()
            else:
                self._train(approach)

    @contextmanager
    def _recorded(self, stage: str) -> Iterator[None]:
        started = datetime.now(UTC)
        earlier = self.run.read_stage(stage)
        begun = {"started": _stamp(started), "finished": None, "error": None, "parts": earlier.get("parts", 0) + 1}
        where = {"host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID")}
        # what was spent on it before counts; of a part that was killed, only what its last word says is known
        self._spent = stage, started, float(earlier.get("seconds") or 0)
        self.run.update_stage(stage, status="running", seconds=self._spent[2], **begun, **where)
        try:
            yield
        except BaseException as error:
            self._close_record(status=status_of(error), error=str(error) or type(error).__name__)
            raise
        self._close_record(status="finished")

    def _close_record(self, **changes: Any) -> None:
        self._note(finished=_stamp(datetime.now(UTC)), **changes)

    def _note(self, **changes: Any) -> None:
        """Add to the record of the stage that is being done, with the seconds of all its parts so far."""
        stage, started, before = self._spent
        self.run.update_stage(stage, seconds=before + (datetime.now(UTC) - started).total_seconds(), **changes)

    @cached_property
    def _seen(self) -> _Images:
        """The images as an earlier stage, perhaps in another process, left them."""
        catalog, store = own_images(self.run, self.spec, self.voice)
        return _Images(catalog, store, None, self.run.read_manifest()["note"])

    def _images(self) -> None:
        """Read the images and write down what this run is, before any training."""
        self._mirrors.open()
        _ = self._weights_hash  # missing weights are said now, not after an hour
        catalog, store = survey.read_images(self.spec, self.data, self.voice)
        self._check_same_images(catalog)
        self._check_same_origin()
        note = survey.note_of(self.spec, self.data, catalog=catalog)
        if note:
            self.voice.warn(f"{note}: the figures say nothing about real radiographs.")
        audited = survey.examine(catalog, store, self.spec, self.voice, target=self.run, note=note)
        audited.require_passed()
        _files.write_text(self.run.spec_path, self.spec.to_toml())
        catalog.write(self.run.catalog_path)
        self._say_machine()
        self.run.update_manifest(
            data=str(self.data.absolute()),
            note=note,
            spec_hash=self.spec.hash,
            data_hash=catalog.content_hash,
            store_key=store.key,
            weights_hash=self._weights_hash,
            machine=_machine(),
        )
        self._mirrors.begin()
        self._seen = _Images(catalog, store, audited.measures, note)
        with self.voice.stage("Drawing the data"):
            survey.draw_data(catalog, store, self.run, note=note, seed=self.spec.seed)

    def _check_same_images(self, catalog: Catalog) -> None:
        if not self.run.catalog_path.exists():
            return
        changes = catalog.changes_from(Catalog.read(self.run.catalog_path, root=catalog.root))
        if changes:
            raise RunError(
                f"{self.run.folder} was begun with other images than {self.data} holds now: {changes}; "
                "give the same ones to go on, or choose a new folder with -o."
            )

    @property
    def _weights_hash(self) -> str | None:
        """What the pretrained weights are, whatever their file is called; None where none are used."""
        return backbones.weights_hash(self.spec.backbone) if set(PRETRAINED) & set(self.spec.models) else None

    def _check_same_origin(self) -> None:
        """Refuse to go on with another library or other pretrained weights: approaches could not be compared."""
        manifest = self.run.read_manifest()
        backend = manifest.get("machine", {}).get("backend")
        if backend is not None and backend != _machine()["backend"]:
            raise RunError(
                f"{self.run.folder} was begun with the backend {backend}, and this is {_machine()['backend']}; set "
                f"KERAS_BACKEND={backend} to go on, or choose a new folder with -o."
            )
        if "weights_hash" in manifest and manifest["weights_hash"] != self._weights_hash:
            raise RunError(
                f"{self.run.folder} was begun with other pretrained weights than {self.spec.backbone.weights} holds "
                "now; put the same file there to go on, or choose a new folder with -o."
            )

    def _say_machine(self) -> None:
        machine = _backend.describe()
        self.voice.say(
            f"  Computing with {machine.backend} on {', '.join(machine.devices)}, {machine.threads} threads."
        )

    @_backend.memory_told("run the frozen layers", change="image.size_px")  # their batches are always the same
    def _features(self, shard: tuple[int, int] | None = None) -> None:
        """Run the frozen layers once, for all approaches that still have to be trained on them."""
        waiting = [name for name in self.spec.models if not self.run.model_path(name).exists()]
        built = {name: models.build(name, self.spec) for name in waiting if name != "cnn"}
        if not built:
            return
        self._say_views(list(built))
        with self.voice.stage("Running the frozen layers once"), self.voice.bar("features") as progress:
            pace = _Pace(progress)
            try:
                training.extract_features(
                    list(built.values()),
                    self._seen.store,
                    self._seen.catalog,
                    spec=self.spec,
                    shard=shard,
                    parts=self.spec.cluster.shards,
                    progress=pace,
                )
            finally:
                self._note_features(pace)

    def _note_features(self, pace: _Pace) -> None:
        """Keep how fast images went through the frozen layers, in all parts; where all were stored, nothing is new."""
        if pace.images:
            earlier = self.run.read_stage(self._spent[0]).get("speed") or {"images": 0, "seconds": 0.0}
            both = speed(earlier["images"] + pace.images, earlier["seconds"] + pace.seconds)
            self._note(speed=both, machine=_machine())

    def _say_views(self, names: list[str]) -> None:
        if self.spec.augment.active and not self.spec.features.views:
            self.voice.say(
                f"  {' and '.join(names)}: trained on stored features of the clean images, without augmentation; "
                "features.views=K adds K augmented copies of each, features.cache=false draws fresh ones in each step."
            )

    def _train(self, name: str) -> None:
        if self.run.model_path(name).exists():
            return
        spec, title = self.spec, TITLES[name]
        with (
            self.voice.stage(f"Training {name} ({title})"),
            self.voice.bar(name, unit="steps") as bar,
            _stopping.patient(),
            self._memory_to_train(),
        ):
            model = models.build(name, spec)
            progress = _Epochs(bar, spec.train)
            history = training.train(
                model,
                self._seen.store,
                self._seen.catalog,
                spec=spec,
                checkpoint=self.run.checkpoint_path(name),
                on_begin=lambda teachers, epochs: self._begin(name, teachers, epochs, progress),
                on_epoch=lambda row: self._end_epoch(name, row),
                progress=progress,
                stop=self._stop,
                say=self.voice.warn,
            )
        self._mirrors.trained(name, history.epochs.to_dict("records"))
        self._note_training(model, history)
        if history.diverged:
            self.voice.warn(
                f"{name} ended with a loss that is no number; the weights of epoch {history.best_epoch}, the best "
                f"before, are kept; a smaller {name}.learning_rate helps."
            )
        if history.stopped_early:
            self.voice.say(f"  {name}: stopped early, the weights of epoch {history.best_epoch} are kept.")
        self._warn_if_fragile(name, history)
        self._draw_history(name, history)
        _save_model(model, self.run.model_path(name))

    def _memory_to_train(self) -> AbstractContextManager[None]:
        work = f"train with batches of {self.spec.train.batch_size} images"
        return _backend.memory_told(work, change=_NEEDS_MEMORY)

    def _note_training(self, model: models.Model, history: training.History) -> None:
        """Keep what the network is and what its epochs cost, those of earlier parts among them."""
        cached = models.cut(model) is not None and self.spec.features.cache
        images = len(history.epochs) * len(self._seen.catalog.rows("train"))
        self._note(
            parameters={
                "total": models.count_parameters(model),
                "trainable": models.count_parameters(model, trainable_only=True),
            },
            best_epoch=history.best_epoch,
            stopped_early=history.stopped_early,
            diverged=history.diverged,
            speed=speed(images, float(history.epochs["seconds"].sum()), of="stored features" if cached else "images"),
            machine=_machine(),
        )

    def _train_beside(self, name: str) -> None:
        """Train along with the first process of several, which keeps what comes of it."""
        _backend.prepare(threads=self._threads)
        _backend.distribute(self.spec.train.devices, batch_size=self.spec.train.batch_size)
        if self.run.model_path(name).exists():
            return
        with self._memory_to_train():
            model, checkpoint = models.build(name, self.spec), self.run.checkpoint_path(name)
            training.train(
                model, self._seen.store, self._seen.catalog, spec=self.spec, checkpoint=checkpoint, stop=self._stop
            )

    def _draw_history(self, name: str, history: training.History) -> None:
        for kind in ("accuracy", "loss"):
            columns = ["epoch", f"train_{kind}", f"val_{kind}"]
            _files.write_csv(
                self.run.table_path(name, f"{kind}_per_epoch"), columns, history.epochs[columns].itertuples(index=False)
            )
            draw = figures.accuracy_curve if kind == "accuracy" else figures.loss_curve
            title = f"{TITLES[name]} ({name}): {kind}"
            figure = draw(history.epochs, title=title, note=self._seen.note, best_epoch=history.best_epoch)
            figures.save(figure, self.run.figure_path(f"{name}_learning_curve_{kind}"))

    def _begin(self, name: str, teachers_done: int, epochs_done: int, progress: _Epochs) -> None:
        """Say which network comes next, where there are several."""
        progress.begin(teachers_done, epochs_done)
        teachers = self.spec.train.teachers
        if teachers_done < teachers and epochs_done < self.spec.train.epochs:
            number = teachers_done + 1
            self.voice.event(
                "teacher", f"  {name}: teacher {number}/{teachers}", model=name, number=number, of=teachers
            )

    def _end_epoch(self, name: str, row: dict[str, float]) -> None:
        """Say and keep how an epoch ended; its record knows the best one before, also of an earlier process."""
        epoch, schedule = int(row["epoch"]), self.spec.train
        earlier = self.run.read_stage(f"train-{name}") if epoch > 1 else {}
        best, lowest = earlier.get("best_epoch") or 0, earlier.get("best_val_loss")
        steered = schedule.schedule == "plateau"  # by the validation loss; else the last epoch counts
        if not steered or row["val_loss"] < (float("inf") if lowest is None else lowest - schedule.min_delta):
            best, lowest = epoch, row["val_loss"]
        kept = {"epochs": schedule.epochs, "best_epoch": best, "best_val_loss": lowest}
        self._note(epoch=epoch, val_loss=row["val_loss"], learning_rate=row["learning_rate"], **kept)
        rate = earlier.get("learning_rate", row["learning_rate"])
        if steered and row["learning_rate"] != rate:
            text = f"  {name}: learning rate {rate:.1e} -> {row['learning_rate']:.1e}"
            self.voice.event("learning-rate", text, model=name, epoch=epoch, before=rate, now=row["learning_rate"])
        wait = epoch - best
        standing = ("  best" if not wait else f"  wait {wait}/{schedule.patience}") if steered else ""
        self.voice.event(
            "epoch",
            f"  {name} {epoch:>{len(str(schedule.epochs))}}/{schedule.epochs}"
            f"  loss {row['train_loss']:.4f} val {row['val_loss']:.4f}"
            f"  acc {row['train_accuracy']:.3f} val {row['val_accuracy']:.3f}  {seconds_text(row['seconds'])}"
            f"{standing}",
            model=name,
            **row | kept | {"wait": wait, "patience": schedule.patience},
        )
        self._mirrors.epoch(name, row)

    def _warn_if_fragile(self, name: str, history: training.History) -> None:
        if name == "cnn" and history.stopped_early and history.best_epoch == 1:
            self.voice.warn(
                "cnn kept its very first epoch: with this BatchNormalization momentum the validation loss rises at "
                "first, and early stopping took that for the end; preset default mends it (cnn.momentum=0.9)."
            )

    def _evaluate(self) -> None:
        """Measure what was trained; where an approach is missing, say why once the others are measured."""
        missing = [name for name in self.spec.models if not self.run.model_path(name).exists()]
        self._require_none_stopped(missing)
        if len(missing) < len(self.spec.models):
            seen = self._seen
            if seen.measured is None:
                seen = self._seen = replace(seen, measured=appearance.look(seen.catalog, seen.store).measures)
            own = (seen.catalog, seen.store)
            with memory_to_judge():
                speeds = Examiner(self.spec, self.run, *own, own, seen.measured, self.voice, seen.note).examine()
            self._mirrors.measured()
            self._note(speeds=speeds, machine=_machine())
        if missing:
            raise RunError(self._why_missing(missing))

    def _require_none_stopped(self, missing: Sequence[str]) -> None:
        """Leave the test images alone while an approach is only half trained, as where Slurm's time was over."""
        records = self.run.read_stages()
        if _failed_before_training(records):  # that a training was once stopped is not why it does not go on
            return
        halted = [name for name in missing if records.get(f"train-{name}", {}).get("status") == "stopped"]
        if halted:
            were = "was" if len(halted) == 1 else "were"
            raise StoppedEarly(
                f"{', '.join(halted)} {were} stopped before the end; run the same command with --resume."
            )

    def _why_missing(self, missing: Sequence[str]) -> str:
        records = self.run.read_stages()
        stages = _failed_before_training(records) or ["images", "features", *(f"train-{name}" for name in missing)]
        causes = [f"{stage}: {records[stage]['error']}" for stage in stages if records.get(stage, {}).get("error")]
        measured = [name for name in self.spec.models if name not in missing]
        stand = "stands" if len(measured) == 1 else "stand"
        others = f"{', '.join(measured)} {stand} measured in {self.run.metrics_path}. " if measured else ""
        were = "was" if len(missing) == 1 else "were"
        return (
            f"{', '.join(missing)} {were} not trained. {' '.join(causes) or 'Its job left no reason.'} {others}"
            "Mend that and run the same command with --resume."
        )


def memory_to_judge() -> AbstractContextManager[None]:
    """Return what turns too little memory for the `Examiner` inside into a sentence, as a RunError."""
    return _backend.memory_told("score and measure the images", change=_NEEDS_MEMORY)


def own_images(target: Run, spec: Spec, voice: Narration) -> tuple[Catalog, ImageStore]:
    """Return the images that a run was made with, as they were divided.

    Parameters
    ----------
    target : Run
        Whose images have been read.
    spec : Spec
        ``image.size_px``.
    voice : Narration
        Who speaks.

    Returns
    -------
    Catalog
    ImageStore

    Raises
    ------
    PneumoscopeError
        Where they are gone or cannot be read.
    """
    manifest = target.read_manifest()
    own = Path(manifest["data"])
    catalog = Catalog.read(target.catalog_path, root=own if own.is_dir() else own.parent)
    # an image that proved damaged is in the key of what was packed, and in this list no more
    packed = ImageStore.folder_of(manifest.get("store_key", ""))
    store = ImageStore.open(packed) if (packed / "manifest.json").exists() else survey.pack(catalog, spec, voice)
    return catalog.quarantine(store.rejected), store


def _failed_before_training(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the stages that failed before any training: what the records of trainings say is older then."""
    return [stage for stage in ("images", "features") if records.get(stage, {}).get("status") == "failed"]


def _machine() -> dict[str, Any]:
    """Return what this process computes with and on, as manifest and records keep it."""
    machine = _backend.describe()
    return {
        "backend": machine.backend,
        "versions": machine.versions,
        "devices": list(machine.devices),
        "threads": machine.threads,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": machine.cpu,
        "cores": machine.cores,
        "memory_bytes": machine.memory_bytes,
        "gpus": list(machine.gpus),
    }


def status_of(error: BaseException) -> Status:
    """Return what an error that ends some work makes of it: ``stopped``, which can go on, or ``failed``."""
    return "stopped" if isinstance(error, (StoppedEarly, KeyboardInterrupt)) else "failed"


def _stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _save_model(model: models.Model, path: Path) -> None:
    """Write a model whole or not at all; its presence says that the approach is trained."""
    temporary = path.with_name(f".{path.stem}.tmp.keras")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise PneumoscopeError(
            f"Cannot write the model to {path}: {error.strerror or error}; free some space and go on with --resume."
        ) from error
