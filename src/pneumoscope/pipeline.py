"""The main job, stage by stage: images in, a complete run directory out.

Owns the order of the stages and what each leaves in the Run. Every stage's work lives in the module named for it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pneumoscope import (
    _backend,
    _files,
    appearance,
    backbones,
    features,
    figures,
    inference,
    ledger,
    metrics,
    models,
    repeats,
    scorecard,
    shift,
    shortcut,
    survey,
    training,
)
from pneumoscope.catalog import Catalog
from pneumoscope.conformal import Share
from pneumoscope.errors import DataError, PneumoscopeError, RunError, StoppedEarly, WeightsError
from pneumoscope.familiarity import Familiarity
from pneumoscope.ledger import Ledger, Look
from pneumoscope.metrics import Evaluation
from pneumoscope.narration import Narration, seconds_text
from pneumoscope.predictions import Predictions
from pneumoscope.repeats import HELD_OUT
from pneumoscope.runs import Run
from pneumoscope.scorecard import SCORED, Choice, Scorecard
from pneumoscope.specs import Spec
from pneumoscope.store import ImageStore

TITLES: Mapping[str, str] = {
    "cnn": "CNN from scratch",
    "tl": "Transfer learning",
    "ft": "Fine-tuning",
}
WHOLE_LOSS_TOLERANCE = 0.005
"""Between the loss of the trained tail on stored float16 features and that of the whole saved model, in nats."""

SHIFT_IMAGES = 1000
"""At most so many images of a label and split are compared with those of another; more would cost, not tell, more."""


def run(
    spec: Spec,
    data: Path,
    folder: Path,
    *,
    folds: int = 0,
    seeds: int = 1,
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
    if folds:  # a number that cannot be is said before anything is done
        spec.with_overrides([f"split.folds={folds}"])
    target = _run_once(spec, data, folder, resume=resume, voice=voice, stop=stop)
    said: dict[str, Any] = {}
    if folds:
        parts = [
            _run_once(
                spec.with_overrides([f"split.folds={folds}", f"split.fold={fold}"]),
                data,
                target.repeat_folder("folds", fold),
                resume=resume,
                voice=voice,
                stop=stop,
            )
            for fold in range(1, folds + 1)
        ]
        said["folds"] = repeats.cross_validated(parts, spec=spec.evaluation, seed=spec.seed)
        repeats.write_out_of_fold(target, repeats.out_of_fold(parts))
    if seeds > 1:
        others = [
            _run_once(
                spec.with_overrides([f"seed={seed}"]),
                data,
                target.repeat_folder("seeds", seed),
                resume=resume,
                voice=voice,
                stop=stop,
            )
            for seed in range(spec.seed + 1, spec.seed + seeds)
        ]
        said["seeds"] = repeats.over_seeds([target, *others])
    if said:
        _files.write_json(target.repeats_path, said)
        voice.log_to(target.log_path)
        for part in said.values():
            for sentence in part["sentences"]:
                voice.say(f"  {sentence}")
        voice.close()
    return target


def _run_once(
    spec: Spec, data: Path, folder: Path, *, resume: bool, voice: Narration, stop: Callable[[], bool] | None
) -> Run:
    """Do the job once, in one folder."""
    target = Run.create(folder, resume=resume)
    if target.spec_path.exists():
        _check_same(target, spec)  # before anything is written: a refusal leaves the earlier run as it was
    if target.status == "finished":
        voice.say(f"{folder} is finished already.")
        return target
    started = datetime.now(UTC)
    earlier = target.read_manifest().get("data", str(data.absolute()))
    target.update_manifest(status="running", started=started.isoformat(timespec="seconds"), data=earlier)
    voice.log_to(target.log_path)
    try:
        _backend.prepare(threads=spec.train.threads)
        job = _prepare(spec, data, target, voice, stop)
        job.look()
        job.train()
        job.write_metrics(*job.evaluate())
        job.finish(seconds=(datetime.now(UTC) - started).total_seconds())
    except BaseException as error:
        stopped = isinstance(error, (StoppedEarly, KeyboardInterrupt))
        target.update_manifest(status="stopped" if stopped else "failed", error=str(error) or type(error).__name__)
        raise
    finally:
        voice.close()
    return target


def evaluate_run(target: Run, *, data: Path | None = None, narration: Narration | None = None) -> Path:
    """Score a run's models again, on its own images or on others.

    Parameters
    ----------
    target : Run
        Finished.
    data : Path, optional
        Other labelled images, all of which are scored; the run's own validation and test images where not given.
    narration : Narration, optional
        Who speaks; silent where not given.

    Returns
    -------
    Path
        The ``metrics.json`` that was written: the run's own, or one in ``evaluations/NAME`` for other data. Thresholds
        chosen on the run's validation images are carried over unchanged.

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
    manifest = target.read_manifest()
    if data is None:
        catalog, store = _own_images(target, spec, voice)
        try:
            measured = appearance.look(catalog, store).measures
        except PneumoscopeError as error:  # scores need the packed images only
            voice.warn(f"There are no baselines beside the models: {error}")
            measured = None
        job = _Job(spec, target, catalog, store, (catalog, store), measured, voice, manifest["note"], None)
        job.write_metrics(*job.evaluate())
        return target.metrics_path
    catalog, store = survey.read_images(spec, data, voice, divide=False)
    catalog = replace(catalog, table=catalog.table.assign(split="test"))
    other = Run(target.folder / "evaluations" / data.resolve().stem)
    try:
        reference = _own_images(target, spec, voice)
    except PneumoscopeError:  # a model may be judged where its training images are not
        reference = None
    note = survey.note_of(spec, data, catalog=catalog)
    job = _Job(spec, other, catalog, store, reference, None, voice, note, None)
    of_run = _files.read_json(target.metrics_path)
    choices = {name: Choice.of_dict(of_run["models"][name]["validation"]) for name in target.trained()}
    job.write_metrics(*job.evaluate(models_of=target, choices=choices, chosen_on=of_run["chosen_on"]))
    return other.metrics_path


def _own_images(target: Run, spec: Spec, voice: Narration) -> tuple[Catalog, ImageStore]:
    """Return the images that a run was made with."""
    own = Path(target.read_manifest()["data"])
    catalog = Catalog.read(target.catalog_path, root=own if own.is_dir() else own.parent)
    store = survey.pack(catalog, spec, voice)
    return catalog.quarantine(store.rejected), store


@dataclass(frozen=True)
class _Job:
    """Everything the stages share.

    `reference` holds the training images, None where they are gone; `measured` are the files' measures that the
    shortcut baseline learns from, None where there is nothing to learn from.
    """

    spec: Spec
    run: Run
    catalog: Catalog
    store: ImageStore
    reference: tuple[Catalog, ImageStore] | None
    measured: pd.DataFrame | None
    voice: Narration
    note: str
    stop: Callable[[], bool] | None

    def look(self) -> None:
        with self.voice.stage("Drawing the data"):
            survey.draw_data(self.catalog, self.store, self.run, note=self.note, seed=self.spec.seed)

    def train(self) -> None:
        waiting = [model for model in self.spec.models if not self.run.model_path(model).exists()]
        built = {model: models.build(model, self.spec) for model in waiting}
        on_backbone = {name: model for name, model in built.items() if models.cut(model)}
        if self.spec.features.cache and on_backbone:
            self._say_views(list(on_backbone))
            built_on = list(on_backbone.values())
            with self.voice.stage("Running the frozen layers once"), self.voice.bar("features") as progress:
                training.extract_features(built_on, self.store, self.catalog, spec=self.spec, progress=progress)
        for name in waiting:
            self._train_one(name, built.pop(name))

    def _say_views(self, names: list[str]) -> None:
        if self.spec.augment.active and not self.spec.features.views:
            self.voice.say(
                f"  {' and '.join(names)}: trained on stored features of the clean images, without augmentation; "
                "features.views=K adds K augmented copies of each, features.cache=false draws fresh ones in each step."
            )

    def _train_one(self, name: str, model: models.Model) -> None:
        spec, title = self.spec, TITLES[name]
        with self.voice.stage(f"Training {name} ({title})"), self.voice.bar(name, unit="steps") as progress:
            history = training.train(
                model,
                self.store,
                self.catalog,
                spec=spec,
                checkpoint=self.run.checkpoint_path(name),
                on_epoch=lambda row: self._say_epoch(name, row),
                progress=progress,
                stop=self.stop,
            )
        if history.stopped_early:
            self.voice.say(f"  {name}: stopped early, the weights of epoch {history.best_epoch} are kept.")
        self._warn_if_fragile(name, history)
        for kind in ("accuracy", "loss"):
            columns = ["epoch", f"train_{kind}", f"val_{kind}"]
            _files.write_csv(
                self.run.table_path(name, f"{kind}_per_epoch"), columns, history.epochs[columns].itertuples(index=False)
            )
            draw = figures.accuracy_curve if kind == "accuracy" else figures.loss_curve
            figure = draw(
                history.epochs, title=f"{title} ({name}): {kind}", note=self.note, best_epoch=history.best_epoch
            )
            figures.save(figure, self.run.figure_path(f"{name}_learning_curve_{kind}"))
        _save_model(model, self.run.model_path(name))

    def _say_epoch(self, name: str, row: dict[str, float]) -> None:
        self.voice.event(
            "epoch",
            f"  {name} epoch {row['epoch']:>2.0f}/{self.spec.train.epochs}: "
            f"loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.4f}, "
            f"val_loss {row['val_loss']:.4f}, val_accuracy {row['val_accuracy']:.4f}, "
            f"rate {row['learning_rate']:.1e}, {seconds_text(row['seconds'])}",
            model=name,
            **row,
        )

    def _warn_if_fragile(self, name: str, history: training.History) -> None:
        if name == "cnn" and history.stopped_early and history.best_epoch == 1:
            self.voice.warn(
                "cnn kept its very first epoch: with this BatchNormalization momentum the validation loss rises at "
                "first, and early stopping took that for the end; preset default mends it (cnn.momentum=0.9)."
            )

    def evaluate(
        self,
        *,
        models_of: Run | None = None,
        choices: Mapping[str, Choice] | None = None,
        chosen_on: str | None = None,
    ) -> tuple[Scorecard, dict[str, Any]]:
        """Score every model once, measure everything, and note that the test images were looked at."""
        source = models_of or self.run
        # a fold is judged by what it held out: its look at the test images would be one more
        held_back = self.spec.split.folds and models_of is None
        wanted = [split for split in SCORED if not (held_back and split == "test")]
        rows = {split: part for split in wanted if len(part := self.catalog.rows(split))}
        models: dict[str, dict[str, Predictions]] = {}
        for name in source.trained():
            with self.voice.stage(f"Scoring {name}"):
                models[name] = {split: self.score(name, source.model_path(name), split) for split in rows}
                if models_of is None:
                    self._check_whole(name, models[name]["validation"])
        with self.voice.stage("Measuring"):
            card = scorecard.measure(
                models,
                self._shortcuts(rows),
                rows=rows,
                spec=self.spec.evaluation,
                choices=choices,
                chosen_on=chosen_on,
                seed=self.spec.seed,
                announce=self._say_cost,
            )
            looked = self._note_look(card, rows, source)  # before anything that could fail: the images were seen
            for name, parts in models.items():
                for split, predictions in parts.items():
                    self.write_scores(name, predictions, card.models[name].evaluations[split])
        return card, self._unlike(rows) | looked

    def _say_cost(self, seconds: float) -> None:
        self.voice.say(
            f"  Bootstrap by group, {self.spec.evaluation.bootstrap:,} resamples: about {seconds_text(seconds)} "
            "(evaluation.bootstrap)."
        )

    def _shortcuts(self, rows: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, Predictions]]:
        """Score the baselines that see no lung; there are none for data without training images."""
        if self.measured is None:
            return {}
        usable = self.catalog.rows()
        found = {
            "file-and-grey": shortcut.baseline(usable, measured=self.measured),
            "border-only": shortcut.border_probe(usable, store=self.store),
        }
        return {name: {split: part.of_split(split) for split in rows} for name, part in found.items()}

    def _unlike(self, rows: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
        """Ask whether test images differ from the training images, as sets and one by one, to a frozen backbone."""
        if self.reference is None or "test" not in rows:
            return {"shift": {"reason": "There are no training images, or no test images, to compare."}}
        catalog, store = self.reference
        train = _sampled(catalog.rows("train"), seed=self.spec.seed)
        test = _sampled(rows["test"], seed=self.spec.seed)
        held = next(part for split in reversed(HELD_OUT) if len(part := catalog.rows(split)))
        known = pd.concat(map(catalog.rows, ("train", *HELD_OUT))) if self.spec.features.cache else None
        with self.voice.stage("Comparing test with training images"), self.voice.bar("features") as progress:
            try:
                of_train, of_held = (
                    features.frozen(part, store, spec=self.spec, among=known, progress=progress)
                    for part in (train, _sampled(held, seed=self.spec.seed))
                )
                of_test = features.frozen(test, self.store, spec=self.spec, progress=progress)
                found = shift.two_sample_by_label(
                    _as_sample("train", train, of_train), _as_sample("test", test, of_test), seed=self.spec.seed
                )
            except (WeightsError, DataError) as error:  # no backbone here, or the same patients in both
                return {"shift": {"reason": str(error)}}
            labels = {"shift": {label: one.as_dict() for label, one in found.items()}}
            try:
                usual = Familiarity.fit(of_train, held_out=of_held)
            except DataError as error:  # random weights may tell no image from another
                return labels | {"not_assessable": {"sentence": str(error)}}
        expected = max(1 - usual.quantile, 1 / (usual.n_held_out + 1))  # few images cannot show a small share
        unlike = Share(int((~usual.assess(of_test)[1]).sum()), len(test))
        sentence = (
            f"{unlike.part:,} of {unlike.whole:,} test images are unlike the training images (of held-out images, "
            f"{expected:.0%} would be): what a model says of those cannot be assessed."
        )
        return labels | {"not_assessable": {**unlike.as_dict(), "threshold": usual.threshold, "sentence": sentence}}

    def _note_look(self, card: Scorecard, rows: Mapping[str, pd.DataFrame], source: Run) -> dict[str, Any]:
        """Write every scoring of the test images into the ledger, and return how often they were looked at."""
        if "test" not in rows:
            return {}
        book, test_set = Ledger.in_cache(), ledger.test_set_of(rows["test"]["image_id"].tolist())
        for name, model in card.models.items():
            seen = model.evaluations["test"]
            model_hash = _files.sha256_of_file(source.model_path(name))
            book.append(Look(test_set, self.spec.hash, model_hash, name, seen.n, seen.roc.auc, seen.at_half.accuracy))
        return {"test_set": book.summary(test_set)}

    def _check_whole(self, name: str, validation: Predictions) -> None:
        """Refuse a saved model that does not score as it did, or as its tail on stored features did, in training."""
        rows = _files.read_csv(self.run.table_path(name, "loss_per_epoch"))
        losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]  # one that was not a number stands empty
        found = metrics.log_loss(validation.labels, validation.scores)
        # the kept epoch is not always that of the lowest loss: a gain below train.min_delta does not count
        nearest = min(losses, key=lambda loss: abs(loss - found), default=float("nan"))
        if not abs(nearest - found) <= WHOLE_LOSS_TOLERANCE:
            raise RunError(
                f"The saved model {self.run.model_path(name)} has a validation loss of {found}, while training saw "
                f"{nearest}; the stored features do not fit it: run pneumoscope cache --clean and train it again."
            )

    def score(self, name: str, path: Path, split: str) -> Predictions:
        model = inference.load_model(path, approach=name, spec=self.spec)
        with self.voice.bar(f"{name} {split}") as progress:
            return inference.score(
                model,
                self.store,
                self.catalog.rows(split),
                batch_size=self.spec.train.batch_size,
                progress=progress,
            )

    def write_scores(self, name: str, predictions: Predictions, evaluation: Evaluation) -> None:
        split = str(predictions.table["split"].iloc[0])
        table = predictions.table
        _files.write_csv(
            self.run.table_path(name, f"{split}_yscores"),
            ["y_true", "y_scores", "image_id", "path"],
            zip(table["label"].tolist(), table["score"].tolist(), table["image_id"], table["path"], strict=True),
        )
        roc = evaluation.roc
        _files.write_csv(
            self.run.table_path(name, f"{split}_roc"),
            ["fpr", "tpr", "thresholds"],
            zip(roc.fpr.tolist(), roc.tpr.tolist(), roc.thresholds.tolist(), strict=True),
        )
        shown = "testing" if split == "test" else split
        point = next(iter(evaluation.operating_points.items()), None)
        marker = None
        if point is not None and point[1].specificity is not None and point[1].sensitivity is not None:
            marker = (1 - point[1].specificity, point[1].sensitivity, point[0])
        figure = figures.roc_curve(
            roc, title=f"{TITLES[name]} ({name}): ROC, {shown} images", note=self.note, point=marker
        )
        figures.save(figure, self.run.figure_path(f"{name}_roc_curve_{shown}"))

    def write_metrics(self, card: Scorecard, further: Mapping[str, Any]) -> None:
        """Write ``metrics.json`` and ``metrics.csv``, and show one table per split with the verdicts under it."""
        content = {"note": self.note, **card.as_dict(), **further}
        _files.write_json(self.run.metrics_path, content)
        _files.write_csv(self.run.metrics_csv_path, ["model", "split", "metric", "value"], scorecard.as_rows(content))
        for split in card.splits:
            n = next(iter(card.models.values())).evaluations[split].n
            title = f"Results on {split}, {n:,} images" + (f" - {self.note}" if self.note else "")
            self.voice.table(title, scorecard.TABLE_HEAD, card.table(split))
            for sentence in card.verdicts(split):
                self.voice.say(f"  {sentence}")
        for found in further["shift"].values():
            self.voice.say(f"  {found['sentence'] if isinstance(found, Mapping) else found}")
        for key in ("not_assessable", "test_set"):
            if key in further:
                self.voice.say(f"  {further[key]['sentence']}")
        if card.chosen_on == "validation" and "validation" in card.splits:
            self.voice.say(
                "  Thresholds and temperature come from the validation images, which also steered the training; "
                "split.calibration keeps images apart for them."
            )

    def finish(self, *, seconds: float) -> None:
        self.run.discard_checkpoints()
        self.run.update_manifest(
            status="finished",
            error=None,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
        )
        self.voice.say(
            f"Finished in {seconds_text(seconds)}. Everything is in {self.run.folder}; "
            f"the figures of merit are in {self.run.metrics_path}."
        )
        self.voice.say(f"{figures.RESEARCH_USE}." + (f" {self.note}." if self.note else ""))


def _sampled(rows: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Return at most `SHIFT_IMAGES` images of each label, in the order of `rows`."""
    parts = [part.sample(min(SHIFT_IMAGES, len(part)), random_state=seed) for _, part in rows.groupby("label")]
    return pd.concat(parts).sort_index().reset_index(drop=True)


def _as_sample(name: str, rows: pd.DataFrame, values: npt.NDArray[np.float32]) -> shift.Sample:
    return shift.Sample(name, values, rows["group"].to_numpy(dtype=str), rows["label"].to_numpy(dtype=np.int8))


def _prepare(spec: Spec, data: Path, target: Run, voice: Narration, stop: Callable[[], bool] | None) -> _Job:
    """Read the images and write down what this run is, before any training."""
    if {"tl", "ft"} & set(spec.models):
        backbones.weights_hash(spec.backbone)  # missing weights are said now, not after an hour
    catalog, store = survey.read_images(spec, data, voice)
    if target.read_manifest().get("data_hash", catalog.content_hash) != catalog.content_hash:
        raise RunError(
            f"{target.folder} was begun with other images than {data} holds now; "
            "give the same ones to go on, or choose a new folder with -o."
        )
    note = survey.note_of(spec, data, catalog=catalog)
    if note:
        voice.warn(f"{note}: the figures say nothing about real radiographs.")
    audited = survey.examine(catalog, store, spec, voice, target=target, note=note)
    audited.require_passed()
    machine = _backend.describe()
    _files.write_text(target.spec_path, spec.to_toml())
    catalog.write(target.catalog_path)
    target.update_manifest(
        data=str(data.absolute()),
        note=note,
        spec_hash=spec.hash,
        data_hash=catalog.content_hash,
        machine={
            "backend": machine.backend,
            "versions": machine.versions,
            "devices": list(machine.devices),
            "threads": machine.threads,
            "platform": platform.platform(),
        },
    )
    voice.say(f"  Computing with {machine.backend} on {', '.join(machine.devices)}, {machine.threads} threads.")
    return _Job(spec, target, catalog, store, (catalog, store), audited.measures, voice, note, stop)


def _check_same(target: Run, spec: Spec) -> None:
    earlier = target.read_spec()
    if earlier.hash != spec.hash:
        before, now = earlier.model_dump(mode="json"), spec.model_dump(mode="json")
        changed = sorted(key for key in now if now[key] != before[key])
        raise RunError(
            f"{target.folder} was begun with another configuration (different: {', '.join(changed)}); "
            "use the same one to go on, or choose a new folder with -o."
        )


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
