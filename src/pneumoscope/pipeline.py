"""The main job, stage by stage: images in, a complete run directory out.

Owns the order of the stages and what each leaves in the Run. Every stage's work lives in the module named for it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from pneumoscope import (
    _backend,
    _files,
    backbones,
    figures,
    inference,
    metrics,
    models,
    phantom,
    training,
)
from pneumoscope.catalog import Catalog
from pneumoscope.errors import PneumoscopeError, RunError, StoppedEarly
from pneumoscope.metrics import Evaluation
from pneumoscope.narration import Narration, seconds_text
from pneumoscope.predictions import Predictions
from pneumoscope.runs import Run
from pneumoscope.specs import LABELS, Spec
from pneumoscope.store import ImageStore

SCORED = ("validation", "test")
TITLES: Mapping[str, str] = {
    "cnn": "CNN from scratch",
    "tl": "Transfer learning",
    "ft": "Fine-tuning",
}
SAMPLES = 12
WHOLE_LOSS_TOLERANCE = 0.005
"""Between the loss of the trained tail on stored float16 features and that of the whole saved model, in nats."""


def run(
    spec: Spec,
    data: Path,
    folder: Path,
    *,
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
        evaluations = job.evaluate()
        job.finish(evaluations, seconds=(datetime.now(UTC) - started).total_seconds())
    except BaseException as error:
        stopped = isinstance(error, (StoppedEarly, KeyboardInterrupt))
        target.update_manifest(status="stopped" if stopped else "failed", error=str(error) or type(error).__name__)
        raise
    finally:
        voice.close()
    return target


def inspect(data: Path, folder: Path, *, spec: Spec, narration: Narration | None = None) -> Catalog:
    """Look at a set of images without training: counts, sample grids, class distributions.

    Parameters
    ----------
    data : Path
        Images, as `Catalog.scan` takes them.
    folder : Path
        Where ``catalog.csv`` and ``figures/`` are written.
    spec : Spec
        Classes, split and image size.
    narration : Narration, optional
        Who speaks; silent where not given.

    Returns
    -------
    Catalog

    Raises
    ------
    PneumoscopeError
        Where the images cannot be used or the folder cannot be written.
    """
    voice = narration or Narration("silent")
    catalog, store = read_images(spec, data, voice)
    paths = Run(folder)
    catalog.write(paths.catalog_path)
    _draw_data(catalog, store, paths, note=note_of(spec, data, catalog=catalog, models_used=()), seed=spec.seed)
    voice.say(f"Pictures are in {folder / 'figures'}, the list of images in {paths.catalog_path}.")
    return catalog


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
    own = Path(manifest["data"])
    if data is None:
        catalog = Catalog.read(target.catalog_path, root=own if own.is_dir() else own.parent)
        job = _Job(spec, target, catalog, _pack(catalog, spec, voice), voice, manifest["note"], None)
        job.write_metrics(job.evaluate())
        return target.metrics_path
    catalog, store = read_images(spec, data, voice, divide=False)
    table = catalog.table.assign(split="test")
    other = Run(target.folder / "evaluations" / data.resolve().stem)
    note = note_of(spec, data, catalog=catalog)
    job = _Job(spec, other, replace(catalog, table=table), store, voice, note, None)
    points = _files.read_json(target.metrics_path)["models"]
    evaluations = {}
    for model in target.trained():
        chosen = {name: point["threshold"] for name, point in points[model]["validation"]["operating_points"].items()}
        predictions = job.score(model, target.model_path(model), "test")
        evaluations[model] = {"test": metrics.evaluate(predictions, operating_points=chosen)}
        job.write_scores(model, predictions, evaluations[model]["test"])
    job.write_metrics(evaluations)
    return other.metrics_path


def read_images(spec: Spec, data: Path, voice: Narration, *, divide: bool = True) -> tuple[Catalog, ImageStore]:
    """List, decode and divide a set of images, saying what was found.

    Parameters
    ----------
    spec : Spec
        Classes, split and image size.
    data : Path
        Images, as `Catalog.scan` takes them.
    voice : Narration
        Who speaks.
    divide : bool
        Make the splits.

    Returns
    -------
    Catalog
        Without the images that could not be decoded.
    ImageStore

    Raises
    ------
    PneumoscopeError
        Where the images cannot be used.
    """
    with voice.stage(f"Reading {data}"), voice.bar("files", unit="files") as progress:
        catalog = Catalog.scan(data, classes=spec.data.classes, progress=progress)
    store = _pack(catalog, spec, voice)
    catalog = catalog.quarantine(store.rejected)
    if divide:
        catalog = catalog.split(spec.split, seed=spec.seed)
        catalog.require_learnable()
    for note in catalog.notes:
        voice.say(f"  {note}")
    if catalog.ignored:
        counts = ", ".join(f"{count} {kind}" for kind, count in catalog.ignored.items())
        voice.say(f"  Ignored: {counts}.")
    _say_quarantined(catalog, voice)
    counted = catalog.counts()
    rows = [[str(split), *(f"{count:,}" for count in counted.loc[split])] for split in counted.index]
    rows.append(["all", *(f"{count:,}" for count in counted.sum())])
    voice.table("Images", ["split", *counted.columns], rows)
    return catalog, store


def note_of(spec: Spec, data: Path, *, catalog: Catalog, models_used: Sequence[str] | None = None) -> str:
    """Return what must stand on every output: synthetic data, random weights; empty where nothing must.

    Parameters
    ----------
    spec : Spec
        Names the weights.
    data : Path
        The images.
    catalog : Catalog
        Their list: a manifest may name synthetic images wherever they lie.
    models_used : sequence of str, optional
        The approaches concerned; those of `spec` where not given.

    Returns
    -------
    str
    """
    marks = []
    first = catalog.rows().drop_duplicates(["split", "label"])["path"]  # of each part, because lists can be mixed
    if phantom.is_synthetic(data) or any(phantom.is_synthetic_image(catalog.read_bytes(path)) for path in first):
        marks.append("SYNTHETIC DATA")
    if spec.backbone.weights == "none" and {"tl", "ft"} & set(spec.models if models_used is None else models_used):
        marks.append("tl and ft on RANDOM WEIGHTS")
    return ", ".join(marks)


@dataclass(frozen=True)
class _Job:
    """Everything the stages share."""

    spec: Spec
    run: Run
    catalog: Catalog
    store: ImageStore
    voice: Narration
    note: str
    stop: Callable[[], bool] | None

    def look(self) -> None:
        with self.voice.stage("Drawing the data"):
            _draw_data(self.catalog, self.store, self.run, note=self.note, seed=self.spec.seed)

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

    def evaluate(self) -> dict[str, dict[str, Evaluation]]:
        evaluations: dict[str, dict[str, Evaluation]] = {}
        for name in self.spec.models:
            with self.voice.stage(f"Scoring {name}"):
                parts = {split: self.score(name, self.run.model_path(name), split) for split in SCORED}
                points = metrics.choose_operating_points(parts["validation"])
                evaluations[name] = {
                    split: metrics.evaluate(part, operating_points=points) for split, part in parts.items()
                }
                for split, part in parts.items():
                    self.write_scores(name, part, evaluations[name][split])
                self._check_whole(name, evaluations[name]["validation"])
        return evaluations

    def _check_whole(self, name: str, validation: Evaluation) -> None:
        """Refuse a saved model that does not score as it did, or as its tail on stored features did, in training."""
        rows = _files.read_csv(self.run.table_path(name, "loss_per_epoch"))
        losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]  # one that was not a number stands empty
        found = float("nan") if validation.loss is None else validation.loss
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
        shown = {"validation": "validation", "test": "testing"}[split]
        point = next(iter(evaluation.operating_points.items()), None)
        marker = None
        if point is not None and point[1].specificity is not None and point[1].sensitivity is not None:
            marker = (1 - point[1].specificity, point[1].sensitivity, point[0])
        figure = figures.roc_curve(
            roc, title=f"{TITLES[name]} ({name}): ROC, {shown} images", note=self.note, point=marker
        )
        figures.save(figure, self.run.figure_path(f"{name}_roc_curve_{shown}"))

    def write_metrics(self, evaluations: Mapping[str, Mapping[str, Evaluation]]) -> None:
        content = {name: {split: e.as_dict() for split, e in parts.items()} for name, parts in evaluations.items()}
        _files.write_json(self.run.metrics_path, {"note": self.note, "models": content})
        _files.write_csv(self.run.metrics_csv_path, ["model", "split", "metric", "value"], _long(content))
        for split in SCORED:
            rows = [_table_row(name, parts[split]) for name, parts in evaluations.items() if split in parts]
            if rows:
                title = f"Results on {split}" + (f" - {self.note}" if self.note else "")
                self.voice.table(title, _TABLE_HEAD, rows)

    def finish(self, evaluations: Mapping[str, Mapping[str, Evaluation]], *, seconds: float) -> None:
        self.write_metrics(evaluations)
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


def _prepare(spec: Spec, data: Path, target: Run, voice: Narration, stop: Callable[[], bool] | None) -> _Job:
    """Read the images and write down what this run is, before any training."""
    if {"tl", "ft"} & set(spec.models):
        backbones.weights_hash(spec.backbone)  # missing weights are said now, not after an hour
    catalog, store = read_images(spec, data, voice)
    if target.read_manifest().get("data_hash", catalog.content_hash) != catalog.content_hash:
        raise RunError(
            f"{target.folder} was begun with other images than {data} holds now; "
            "give the same ones to go on, or choose a new folder with -o."
        )
    note = note_of(spec, data, catalog=catalog)
    if note:
        voice.warn(f"{note}: the figures say nothing about real radiographs.")
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
    return _Job(spec, target, catalog, store, voice, note, stop)


def _pack(catalog: Catalog, spec: Spec, voice: Narration) -> ImageStore:
    with voice.stage("Packing the images"), voice.bar("images") as progress:
        return ImageStore.pack(catalog, size_px=spec.image.size_px, progress=progress)


def _check_same(target: Run, spec: Spec) -> None:
    earlier = target.read_spec()
    if earlier.hash != spec.hash:
        before, now = earlier.model_dump(mode="json"), spec.model_dump(mode="json")
        changed = sorted(key for key in now if now[key] != before[key])
        raise RunError(
            f"{target.folder} was begun with another configuration (different: {', '.join(changed)}); "
            "use the same one to go on, or choose a new folder with -o."
        )


def _say_quarantined(catalog: Catalog, voice: Narration) -> None:
    bad = catalog.quarantined()
    if not len(bad):
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in bad["status"].value_counts().items())
    voice.warn(f"{len(bad)} files are left out ({reasons}); catalog.csv lists them.")


def _draw_data(catalog: Catalog, store: ImageStore, target: Run, *, note: str, seed: int) -> None:
    """Draw the class distributions and sample grids of the training images (all that are not test) and of test."""
    usable = catalog.rows()
    is_test = usable["split"] == "test"
    for name, part in (("train", usable[~is_test]), ("test", usable[is_test])):
        counts = {label: int((part["label"] == index).sum()) for index, label in enumerate(LABELS)}
        title = {"train": "Training images", "test": "Test images"}[name]
        bars = figures.class_bars(counts, title=title, note=note)
        figures.save(bars, target.figure_path(f"{name}_data_dist_barplot"))
        figures.save(figures.class_pie(counts, title=title, note=note), target.figure_path(f"{name}_data_dist_pieplot"))
        for index, label in enumerate(LABELS):
            grid = _sample_grid(
                part[part["label"] == index], store, title=f"{label}, {name} images", note=note, seed=seed
            )
            figures.save(grid, target.figure_path(f"{name}_samples_{label.lower()}"))


def _sample_grid(rows: pd.DataFrame, store: ImageStore, *, title: str, note: str, seed: int) -> Figure:
    chosen = rows.sample(min(SAMPLES, len(rows)), random_state=seed).sort_values("path") if len(rows) else rows
    pixels: list[npt.NDArray[np.uint8]] = [store.images[row] for row in store.rows_of(chosen)] if len(chosen) else []
    captions = [Path(path).name for path in chosen["path"]]
    return figures.sample_grid(pixels, captions=captions, title=title, note=note)


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


_TABLE_HEAD = (
    "model",
    "n",
    "loss",
    "AUC",
    "accuracy",
    "FN",
    "FP",
    "sensitivity",
    "specificity",
    "at Youden: accuracy",
    "FN",
    "FP",
)


def _table_row(name: str, evaluation: Evaluation) -> list[str]:
    half = evaluation.at_half
    point = next(iter(evaluation.operating_points.values()), None)
    chosen = [_figure(point.accuracy), str(point.false_negatives), str(point.false_positives)] if point else ["-"] * 3
    return [
        name,
        f"{evaluation.n:,}",
        _figure(evaluation.loss),
        _figure(evaluation.roc.auc),
        _figure(half.accuracy),
        str(half.false_negatives),
        str(half.false_positives),
        _figure(half.sensitivity),
        _figure(half.specificity),
        *chosen,
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _long(content: Mapping[str, Mapping[str, Mapping[str, object]]]) -> list[tuple[str, str, str, object]]:
    """Flatten metrics.json into (model, split, metric, value); an operating point's figures get its name in front."""
    rows: list[tuple[str, str, str, object]] = []
    for model, parts in content.items():
        for split, figures_ in parts.items():
            for metric, value in figures_.items():
                if metric == "operating_points" and isinstance(value, Mapping):
                    rows += [
                        (model, split, f"{name}.{key}", item)
                        for name, point in value.items()
                        for key, item in point.items()
                        if key != "name"
                    ]
                elif metric != "operating_point":
                    rows.append((model, split, metric, value))
    return rows
