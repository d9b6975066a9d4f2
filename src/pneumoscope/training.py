"""Training: one loop for every approach, whose whole state can be written down and taken up again exactly.

Owns the order of images, the schedule (early stopping, learning rate) and what makes up its state. The order of images
and every random change of them are pure functions of (seed, epoch), so a resumed run sees what an uninterrupted one
sees. Knows nothing of run directories, figures or test data.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pneumoscope import _backend, augmentation, features, metrics, models
from pneumoscope._backend import keras
from pneumoscope._examples import Features, Images, Labels, Source
from pneumoscope.catalog import Catalog
from pneumoscope.checkpoints import Arrays, Checkpoint
from pneumoscope.errors import RunError, SpecError, StoppedEarly, StoreError
from pneumoscope.schedules import Schedule, cosine
from pneumoscope.specs import Spec
from pneumoscope.store import ImageStore

HISTORY_COLUMNS: tuple[str, ...] = (
    "epoch",
    "train_accuracy",
    "val_accuracy",
    "train_loss",
    "val_loss",
    "learning_rate",
    "seconds",
)


@dataclass(frozen=True)
class History:
    """What one training did.

    Attributes
    ----------
    epochs : DataFrame
        One row per epoch: ``epoch`` (from 1), ``train_accuracy``, ``val_accuracy`` (in [0, 1], at threshold 0.5),
        ``train_loss``, ``val_loss`` (binary cross-entropy in nats), ``learning_rate``, ``seconds``.
    best_epoch : int
        The epoch whose weights the model holds, the one with the lowest ``val_loss``.
    stopped_early : bool
        Whether early stopping ended it before the last epoch.
    diverged : bool
        Whether a loss that is no number ended it; the epoch in which that came is no row of `epochs`, unless only its
        validation loss was none.
    """

    epochs: pd.DataFrame
    best_epoch: int
    stopped_early: bool
    diverged: bool = False


@dataclass
class _State:
    """Where a training stands between two steps; with the arrays of the checkpoint it is the whole of it."""

    schedule: Schedule
    epoch: int = 1
    step: int = 0
    images_seen: int = 0
    loss_sum: float = 0.0
    right_sum: float = 0.0
    seconds: float = 0.0
    rows: list[list[float]] = field(default_factory=list)
    diverged: bool = False
    updates: int = 0


def train(
    model: models.Model,
    store: ImageStore,
    catalog: Catalog,
    *,
    spec: Spec,
    checkpoint: Path | None = None,
    on_begin: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] | None = None,
) -> History:
    """Train one approach; the model ends with the weights of its best epoch.

    With ``train.teachers`` as many networks like it are trained first, each from its own seed and on its own augmented
    views; the model then learns half from the labels and half from the mean of their scores for the very same input
    (distillation, Hinton et al. 2015, https://arxiv.org/abs/1503.02531, of an ensemble into a network of its size).

    Where the model has a frozen part and ``features.cache`` is on, that part runs once per image and only the tail is
    trained, on the stored outputs; the tail shares its weights with `model`.

    Parameters
    ----------
    model : keras.Model
        From `models.build`.
    store : ImageStore
        The images of `catalog`.
    catalog : Catalog
        Split: ``train`` is learned from, ``validation`` steers the schedule, ``test`` is not touched.
    spec : Spec
        The schedule, the seed and the approach's learning rate.
    checkpoint : Path, optional
        A file to keep the state in after each epoch and when stopped; where it exists, training goes on from it.
        Teachers have files of their own beside it.
    on_begin : callable, optional
        Called before the first step of each network with how many teachers are done, and how many of its epochs.
    on_epoch : callable, optional
        Called with each finished row of the history; teachers have none.
    progress : callable, optional
        Called with (done, total) steps of the epoch, or passes while features are computed.
    stop : callable, optional
        Asked before each step; where it returns True the state is kept and `StoppedEarly` raised.
    say : callable, optional
        Called with a sentence where a checkpoint is damaged.

    Returns
    -------
    History

    Raises
    ------
    StoppedEarly
        Where `stop` asked for it.
    RunError
        Where the loss is not finite before any epoch was good, or the checkpoint belongs to another run, cannot be
        read or cannot be written.
    SpecError
        Where teachers would not share the frozen part.
    StoreError
        Where the images were compressed in another way than `spec` says.
    """
    if store.jpeg_quality != spec.image.jpeg_quality:
        raise StoreError(
            f"The images were packed with jpeg_quality {store.jpeg_quality}, image.jpeg_quality is "
            f"{spec.image.jpeg_quality}; pack them with jpeg_quality=spec.image.jpeg_quality."
        )
    begin = on_begin or _silent
    finish = functools.partial(_trained, catalog=catalog, progress=progress, stop=stop, say=say)
    teachers = []
    for number, own in enumerate(_specs_of_teachers(model, spec)):
        teacher = _prepared(models.build(model.name, own), store, catalog, spec=own, progress=progress)
        beside = checkpoint and checkpoint.with_name(f"{checkpoint.stem}-teacher-{number + 1}{checkpoint.suffix}")
        finish(teacher, checkpoint=beside, begin=functools.partial(begin, number))
        teachers.append(teacher.network)
    loop = _prepared(model, store, catalog, spec=spec, progress=progress)
    loop.teachers = teachers
    finish(loop, checkpoint=checkpoint, begin=functools.partial(begin, spec.train.teachers), on_epoch=on_epoch)
    if spec.train.half_kernels:
        halve(model)  # not the network that trains: where images are augmented, the model is one layer of that
    return loop.history()


def _silent(teachers_done: int, epochs_done: int) -> None:
    """Tell nobody."""


def _specs_of_teachers(model: models.Model, spec: Spec) -> list[Spec]:
    """Return the Spec of each teacher: its own seed, unlike those of repeated runs, and no teachers."""
    teachers = spec.train.teachers
    if teachers and models.cut(model) is not None and spec.features.cache and spec.backbone.weights == "none":
        raise SpecError(
            "train.teachers needs a frozen part that all networks share, and backbone.weights=none gives each its own; "
            "set backbone.weights=imagenet, or features.cache=false."
        )
    seeds = [int(np.random.default_rng([spec.seed, models.TEACHERS, n]).integers(2**31)) for n in range(teachers)]
    return [spec.with_overrides([f"seed={seed}", "train.teachers=0"]) for seed in seeds]


def _prepared(
    model: models.Model,
    store: ImageStore,
    catalog: Catalog,
    *,
    spec: Spec,
    progress: Callable[[int, int], None] | None,
) -> _Loop:
    """Make everything ready for the first step."""
    network, scorer, learn, check = _arrange(model, store, catalog, spec=spec, progress=progress)
    rate = getattr(spec, model.name).learning_rate
    _backend.split(network)
    network.compile(
        optimizer=_optimizer(spec, rate=rate),
        loss=keras.losses.BinaryCrossentropy(label_smoothing=spec.train.label_smoothing),
        metrics=[_Accuracy(name="accuracy")],
        jit_compile=_backend.compiles(),
    )
    network.optimizer.build(network.trainable_variables)
    return _Loop(network, scorer, learn, check, spec=spec, rate=rate)


def _trained(
    loop: _Loop,
    *,
    catalog: Catalog,
    checkpoint: Path | None,
    begin: Callable[[int], None],
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    progress: Callable[[int, int], None] | None,
    stop: Callable[[], bool] | None,
    say: Callable[[str], None] | None,
) -> None:
    """Run a loop from where its checkpoint stands to its end."""
    keeper = Checkpoint(checkpoint, signature=f"{loop.network.name} {loop.spec.hash} {catalog.content_hash}")
    with _backend.in_turn():  # it drops what is damaged
        found = keeper.load(say)
    if found is not None:
        loop.take_up(*found)
    if _backend.process(loop.spec.train.devices)[0]:  # the first writes for all
        keeper = Checkpoint(None, signature="")
    begin(loop.state.epoch - 1)
    try:
        loop.run(keeper, on_epoch=on_epoch, progress=progress, stop=stop)
    finally:
        loop.restore_best()


class _Accuracy(keras.metrics.BinaryAccuracy):  # type: ignore[misc]  # Keras ships no types
    """The share of right calls, where what is aimed at may lie between the labels: the nearer one counts."""

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Take a batch in."""
        return super().update_state(keras.ops.cast(y_true > metrics.HALF, "float32"), y_pred, sample_weight)


def halve(model: models.Model) -> None:
    """Round the kernels that train to the nearest numbers of half precision; biases and norms stay as they are.

    Parameters
    ----------
    model : keras.Model
        From `models.build`; changed in place.
    """
    for layer in model.layers:
        if layer.trainable and getattr(layer, "kernel", None) is not None:
            values = keras.ops.convert_to_numpy(layer.kernel)
            _backend.assign(layer.kernel, values.astype(np.float16).astype(values.dtype))


def _optimizer(spec: Spec, *, rate: float) -> Any:
    decay = spec.train.weight_decay
    if not decay:
        return keras.optimizers.Adam(rate)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=decay)
    optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])  # as usual: only kernels shrink
    return optimizer


def _arrange(
    model: models.Model, store: ImageStore, catalog: Catalog, *, spec: Spec, progress: Callable[[int, int], None] | None
) -> tuple[models.Model, models.Model, Source, Source]:
    """Return the network to train, the network to validate with, and the examples for each."""
    learn, check = catalog.rows("train"), catalog.rows("validation")
    cut = models.cut(model)
    if cut is None or not spec.features.cache:
        changed = spec.augment if spec.augment.active else None
        network = augmentation.augmented(model, changed) if changed else model
        return network, model, Images(store, learn, changed, spec.seed), Images(store, check, None, spec.seed)
    stored = extract_features([model], store, catalog, spec=spec, progress=progress)[cut]
    _, tail = models.split_at(model, cut)
    clean, *augmented = stored.views
    clean_rows, learned_rows = _distinct(store, *_known(catalog)), _distinct(store, learn)
    return (
        tail,
        tail,
        Features(
            clean,
            np.searchsorted(clean_rows, store.rows_of(learn)),
            learn["label"].to_numpy(dtype=np.float32),
            augmented=augmented,
            augmented_rows=np.searchsorted(learned_rows, store.rows_of(learn)),
            seed=spec.seed,
        ),
        Features(clean, np.searchsorted(clean_rows, store.rows_of(check)), check["label"].to_numpy(dtype=np.float32)),
    )


def _known(catalog: Catalog) -> list[pd.DataFrame]:
    """Return all images that are not test images: computed together, they serve every fold and seed."""
    return [catalog.rows(split) for split in ("train", "validation", "calibration")]


def _distinct(store: ImageStore, *tables: pd.DataFrame) -> npt.NDArray[np.intp]:
    """Return the rows of the store that some tables' images stand in, each once, sorted."""
    return np.unique(np.concatenate([store.rows_of(table) for table in tables]))


def extract_features(
    built: Sequence[models.Model],
    store: ImageStore,
    catalog: Catalog,
    *,
    spec: Spec,
    shard: tuple[int, int] | None = None,
    parts: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, features.FeatureStore]:
    """Run the frozen part of several models over all images that are not test images, in one pass.

    `train` does this by itself for one model; called before, with all of them, it spares the others the pass.

    Parameters
    ----------
    built : sequence of keras.Model
        From `models.build`, all on the same backbone.
    store : ImageStore
        The images of `catalog`.
    catalog : Catalog
        Split.
    spec : Spec
        ``features``, ``augment``, ``backbone`` and ``seed``.
    shard : tuple of int, optional
        Compute only one part of the images and return nothing: which, from 0, of how many.
    parts : int
        Where 2 or more, put together the parts that other processes have stored.
    progress : callable, optional
        Called with (done, total) images.

    Returns
    -------
    dict of str to FeatureStore
        By the name of the layer where each model is cut, of the model's own views (those of its teachers are stored
        too); rows are the distinct images, sorted by their row in `store`: of training, validation and calibration in
        the clean view, of training in the augmented ones.
    """
    cuts = {cut: model for model in built if (cut := models.cut(model)) is not None}
    if not cuts or not spec.features.cache:
        return {}
    rows, learned = _distinct(store, *_known(catalog)), _distinct(store, catalog.rows("train"))
    specs = [*_specs_of_teachers(built[0], spec), spec]
    for number, own in enumerate(specs):

        def report(done: int, total: int, before: int = number) -> None:
            if progress is not None:
                progress(before * total + done, len(specs) * total)

        found = features.extract(
            built[0],
            list(cuts),
            store=store,
            rows=rows,
            learned=learned,
            spec=own,
            part=shard,
            parts=parts,
            progress=report,
        )
    return found


class _Loop:
    """The epochs of one training."""

    def __init__(
        self, network: models.Model, scorer: models.Model, learn: Source, check: Source, *, spec: Spec, rate: float
    ) -> None:
        self.network, self.scorer, self.learn, self.check, self.spec = network, scorer, learn, check, spec
        self.state, self._rate = _State(Schedule(rate)), rate
        self.weights = _changing(network)
        self.best: list[npt.NDArray[Any]] = []
        self.average: list[Any] = []
        self.teachers: list[models.Model] = []
        self._label_weights = _label_weights(learn.labels) if spec.train.class_weights else None

    def run(
        self,
        keeper: Checkpoint,
        *,
        on_epoch: Callable[[dict[str, float]], None] | None,
        progress: Callable[[int, int], None] | None,
        stop: Callable[[], bool] | None,
    ) -> None:
        state, spec = self.state, self.spec.train
        while state.epoch <= spec.epochs and not state.schedule.exhausted(spec) and not state.diverged:
            started = time.perf_counter() - state.seconds
            for step, positions in self._steps():
                if stop is not None and _backend.agree(stop()):
                    state.seconds = time.perf_counter() - started
                    keeper.save(*self.kept())
                    raise StoppedEarly(
                        f"Stopped in epoch {state.epoch}, step {step}, on request; run the same command with --resume."
                    )
                self._step(positions)
                state.step = step + 1
                if not math.isfinite(state.loss_sum):
                    state.diverged = True
                    break
                if progress is not None:
                    progress(step + 1, -(-len(self.learn.labels) // spec.batch_size))
            if state.diverged:
                self.restore_best()
                keeper.save(*self.kept())  # taken up again, it ends here again
                break
            row = self._end_epoch(started)
            keeper.save(*self.kept())
            if on_epoch is not None:
                on_epoch(row)
        if not self.best:
            raise RunError(
                f"No epoch of {self.network.name} ended with a loss that is a number; "
                f"lower {self.network.name}.learning_rate (now {self._rate:g}) and run again."
            )

    def _steps(self) -> list[tuple[int, npt.NDArray[np.intp]]]:
        """Return the steps of this epoch that are still to do."""
        n, size = len(self.learn.labels), self.spec.train.batch_size
        order = np.random.default_rng([self.spec.seed, models.ORDER, self.state.epoch]).permutation(n)
        return [(start // size, order[start : start + size]) for start in range(self.state.step * size, n, size)]

    def _step(self, positions: npt.NDArray[np.intp]) -> None:
        labels = self.learn.labels[positions]
        weights = None if self._label_weights is None else self._label_weights[labels.astype(np.intp)]
        inputs = self.learn.batch(positions, self.state.epoch)
        self._set_rate()
        self.network.reset_metrics()  # sums are kept here, where they can be written down
        targets = (labels + self._taught(inputs, len(labels))) / 2 if self.teachers else labels
        logs = self.network.train_on_batch(inputs, targets[:, None], sample_weight=weights, return_dict=True)
        self._average_weights()
        self.state.images_seen += len(labels)
        self.state.loss_sum += float(logs["loss"]) * len(labels)
        self.state.right_sum += float(logs["accuracy"]) * len(labels)

    def _taught(self, inputs: Any, n: int) -> Labels:
        """Return the mean of the teachers' scores."""
        scores = [models.scores(teacher, lambda _: inputs, n, batch_size=n) for teacher in self.teachers]
        return np.asarray(np.mean(scores, axis=0), dtype=np.float32)

    def _set_rate(self) -> None:
        """Give the optimizer the rate of this step."""
        spec, state = self.spec.train, self.state
        if spec.schedule == "cosine":
            steps = -(-len(self.learn.labels) // spec.batch_size)
            done = (state.epoch - 1 + (state.step + 0.5) / steps) / spec.epochs
            state.schedule.learning_rate = self._rate * cosine(done, warmup=1 / (spec.epochs + 1))
            self.network.optimizer.learning_rate = state.schedule.learning_rate

    def _average_weights(self) -> None:
        """Take the weights after a step into their running mean, which forgets its first steps quickly."""
        if not self.spec.train.weight_average:
            return
        self.state.updates += 1
        keep = min(self.spec.train.weight_average, self.state.updates / (self.state.updates + 9))
        now = [keras.ops.convert_to_tensor(weight) for weight in self.weights]
        before = self.average or now
        self.average = [
            keep * old + (1 - keep) * new if "float" in keras.backend.standardize_dtype(new.dtype) else new
            for old, new in zip(before, now, strict=True)  # what is no weight is dropout's random state
        ]

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Let the network have the averaged weights for a while, where there are any."""
        if not self.average:
            yield
            return
        own = [keras.ops.convert_to_numpy(weight) for weight in self.weights]
        self._give(keras.ops.convert_to_numpy(value) for value in self.average)
        yield
        self._give(own)

    def _give(self, values: Iterable[npt.NDArray[Any]]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            _backend.assign(weight, value)

    def _end_epoch(self, started: float) -> dict[str, float]:
        state, n = self.state, len(self.check.labels)
        with self._averaged():
            scores = models.scores(
                self.scorer, lambda positions: self.check.batch(positions, 0), n, batch_size=self.spec.train.batch_size
            )
            reached = [keras.ops.convert_to_numpy(weight) for weight in self.weights]
        val_loss = metrics.log_loss(self.check.labels, scores)
        row = [
            state.epoch,
            state.right_sum / state.images_seen,
            float(((scores > metrics.HALF) == (self.check.labels == 1)).mean()),
            state.loss_sum / state.images_seen,
            val_loss,
            state.schedule.learning_rate,
            time.perf_counter() - started,
        ]
        state.rows.append(row)
        if state.schedule.update(val_loss, epoch=state.epoch, spec=self.spec.train):
            self.best = reached
        self.network.optimizer.learning_rate = state.schedule.learning_rate
        state.epoch, state.step, state.images_seen = state.epoch + 1, 0, 0
        state.loss_sum = state.right_sum = state.seconds = 0.0
        return dict(zip(HISTORY_COLUMNS, row, strict=True))

    def restore_best(self) -> None:
        """Give the model the weights of its best epoch, where there is one."""
        for weight, value in zip(self.weights, self.best, strict=False):
            _backend.assign(weight, value)

    def history(self) -> History:
        state = self.state
        table = pd.DataFrame(state.rows, columns=list(HISTORY_COLUMNS)).astype({"epoch": int})
        diverged = state.diverged or bool(table["val_loss"].tail(1).isna().any())
        stopped = len(table) < self.spec.train.epochs and not diverged
        return History(table, state.schedule.best_epoch, stopped, diverged)

    def kept(self) -> tuple[dict[str, Any], Arrays]:
        """Return the whole state: plain values, and arrays by name."""
        arrays = {f"weight-{index}": keras.ops.convert_to_numpy(value) for index, value in enumerate(self.weights)}
        arrays |= {
            f"optimizer-{index}": keras.ops.convert_to_numpy(value)
            for index, value in enumerate(self.network.optimizer.variables)
        }
        arrays |= {f"average-{index}": keras.ops.convert_to_numpy(value) for index, value in enumerate(self.average)}
        return asdict(self.state), arrays | {f"best-{index}": value for index, value in enumerate(self.best)}

    def take_up(self, state: dict[str, Any], arrays: Arrays) -> None:
        """Go back to a state that `kept` returned."""
        n, size = len(self.learn.labels), self.spec.train.batch_size
        if state["step"] and n - state["step"] * size < size:
            # TensorFlow rounds otherwise where the first batch that it ever sees is an epoch's last, smaller one; so
            # it sees a whole one first, as in every other training, and what that changes is overwritten below
            self._step(np.arange(size))
        for index, weight in enumerate(self.weights):
            _backend.assign(weight, arrays[f"weight-{index}"])
        for index, variable in enumerate(self.network.optimizer.variables):
            _backend.assign(variable, arrays[f"optimizer-{index}"])
        self.best, self.average = (
            [arrays[f"{kind}-{index}"] for index in range(len(self.weights)) if f"{kind}-{index}" in arrays]
            for kind in ("best", "average")
        )
        self.state = _State(**state | {"schedule": Schedule(**state["schedule"])})


def _changing(network: models.Model) -> list[Any]:
    """Return every variable that training can change: weights and running statistics, not the frozen ones."""
    found: dict[int, Any] = {}

    def visit(layer: Any) -> None:
        for child in getattr(layer, "layers", []):
            visit(child)
        if not getattr(layer, "layers", []) and layer.trainable:
            found.update((id(variable), variable) for variable in layer.variables)

    visit(network)
    return list(found.values())


def _label_weights(labels: Labels) -> npt.NDArray[np.float32]:
    counts = np.array([(labels == 0).sum(), (labels == 1).sum()])
    return np.asarray(len(labels) / (2 * counts), dtype=np.float32)
