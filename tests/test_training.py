"""Training against Keras's own callbacks and `fit`, exact resume, damaged checkpoints, losses that are no number."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from pneumoscope import _backend, metrics, models, training
from pneumoscope._backend import keras
from pneumoscope.catalog import Catalog
from pneumoscope.errors import RunError, SpecError, StoppedEarly, StoreError
from pneumoscope.specs import Spec
from pneumoscope.store import ImageStore

resource = pytest.importorskip("resource")  # limits a file's size, as POSIX systems can

Packed = tuple[Catalog, ImageStore]
State = tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]

SPEC = Spec.preset_named("smoke").with_overrides(
    ["image.size_px=32", "train.epochs=3", "backbone.weights=none", "features.dtype=float32"]
)
CHANGING = SPEC.with_overrides(["augment.zoom=0.1", "augment.translation=0.1", "train.class_weights=true"])
"""Everything random at once: 38 training images, so 3 steps an epoch and 9 in all."""

VIEWS = CHANGING.with_overrides(["features.views=2", "features.dtype=float16", "backbone.weights=imagenet"])


@pytest.fixture(scope="module", autouse=True)
def deterministic() -> None:
    _backend.prepare()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(autouse=True)
def one_cache(own_cache: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let these tests share stored features, which none of them changes."""
    monkeypatch.setenv("PNEUMOSCOPE_CACHE", str(cache))


def train(approach: str, packed: Packed, spec: Spec, **options: Any) -> tuple[Any, training.History]:
    catalog, store = packed
    model = models.build(approach, spec)
    return model, training.train(model, store, catalog, spec=spec, **options)


def after(steps: int) -> Callable[[], bool]:
    """A `stop` that asks for it before the step after so many."""
    asked = itertools.count()
    return lambda: next(asked) >= steps


def state_in(checkpoint: Path) -> State:
    """All that a checkpoint holds, but for how long it took."""
    with np.load(io.BytesIO(checkpoint.read_bytes())) as archive:
        arrays = dict(archive)
    state = json.loads(arrays.pop("state").tobytes())
    state.pop("seconds")
    state["rows"] = [row[:-1] for row in state["rows"]]
    return state, arrays


def assert_same(first: State, second: State) -> None:
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    for name, array in first[1].items():
        assert array.dtype == second[1][name].dtype
        assert np.array_equal(array, second[1][name]), name


def same_weights(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one.get_weights(), other.get_weights(), strict=True))


def validation_scores(model: Any, packed: Packed) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    catalog, store = packed
    rows = catalog.rows("validation")
    images = store.images[store.rows_of(rows)][..., None]
    return rows["label"].to_numpy(), models.scores(model, lambda at: images[at], len(rows), batch_size=16)


# --- The same numbers as Keras's own loop -----------------------------------------------------------------------------


def comparable(model: Any) -> Any:
    """Take out what no two loops can share: dropout, and biases before a BatchNormalization.

    Those biases have no gradient but rounding, which Adam turns into steps of full length.
    """
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
        if isinstance(layer, keras.layers.Conv2D) and layer.use_bias and model.name == "cnn":
            layer.bias.trainable = False
    return model


def fitted(approach: str, packed: Packed, spec: Spec) -> tuple[list[Any], list[Any]]:
    """The plain procedure: `fit` on the whole network, epoch by epoch in the order that `train` takes.

    Returns the weights and the figures after each epoch.
    """
    catalog, store = packed
    model = comparable(models.build(approach, spec))
    model.compile(
        optimizer=keras.optimizers.Adam(getattr(spec, approach).learning_rate),
        loss="binary_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,
    )
    rows = catalog.rows("train")
    images, labels = store.images[store.rows_of(rows)][..., None], rows["label"].to_numpy(np.float32)[:, None]
    n_normal = int((labels == 0).sum())
    weights, logs = [], []
    for epoch in range(1, spec.train.epochs + 1):
        order = np.random.default_rng([spec.seed, models.ORDER, epoch]).permutation(len(rows))
        history = model.fit(
            images[order],
            labels[order],
            batch_size=spec.train.batch_size,
            shuffle=False,
            class_weight={0: len(rows) / (2 * n_normal), 1: len(rows) / (2 * (len(rows) - n_normal))},
            verbose=0,
        ).history
        weights.append(model.get_weights())
        logs.append([history["accuracy"][0], history["loss"][0]])
    return weights, logs


@pytest.mark.parametrize("approach", ["cnn", "ft"])
def test_train_is_plain_training_of_the_full_network(approach: str, packed: Packed) -> None:
    """On stored outputs of the frozen part as without, class weights included."""
    spec = SPEC.with_overrides(["train.epochs=2", "train.class_weights=true"])
    plain, logs = fitted(approach, packed, spec)
    for changed in [spec, spec.with_overrides(["features.cache=false"])][: 1 if approach == "cnn" else 2]:
        model = comparable(models.build(approach, changed))
        history = training.train(model, packed[1], packed[0], spec=changed)
        for ours, theirs in zip(model.get_weights(), plain[history.best_epoch - 1], strict=True):
            assert np.allclose(ours, theirs, rtol=0, atol=1e-6)
        assert np.allclose(history.epochs[["train_accuracy", "train_loss"]], logs, rtol=0, atol=1e-6)
        labels, scores = validation_scores(model, packed)
        best = history.epochs.iloc[history.best_epoch - 1]
        assert best["val_loss"] == pytest.approx(metrics.log_loss(labels, scores), abs=1e-6)
        assert best["val_accuracy"] == ((scores > 0.5) == labels).mean()


class Recorded(np.ndarray[Any, np.dtype[np.uint8]]):
    """Packed images that note which rows are read."""

    touched: ClassVar[set[int]] = set()

    def __getitem__(self, key: Any) -> Any:
        self.touched.update(key[0].tolist())
        return np.asarray(self)[key]


@pytest.mark.parametrize("approach", ["cnn", "tl"])
def test_training_reads_train_and_validation_images_and_no_other(
    approach: str, packed: Packed, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PNEUMOSCOPE_CACHE", str(own_cache))  # features are computed here, not found
    catalog, store = packed
    Recorded.touched.clear()
    train(approach, (catalog, replace(store, images=store.images.view(Recorded))), SPEC)
    allowed = [row for split in ("train", "validation") for row in store.rows_of(catalog.rows(split))]
    assert set(allowed) == Recorded.touched
    assert len(catalog.rows("test")) == 16


# --- What an epoch sees -----------------------------------------------------------------------------------------------


def test_an_epochs_transforms_depend_on_the_seed_and_the_epoch_alone(packed: Packed) -> None:
    catalog, store = packed

    def source(spec: Spec) -> Any:
        network, scorer, learn, check = training._arrange(
            models.build("cnn", spec), store, catalog, spec=spec, progress=None
        )
        assert [tuple(part.shape[1:]) for part in network.inputs] == [(32, 32, 1), (12,)]
        assert not isinstance(check.batch(slice(0, 4), 1), list)  # validation images stay as they are
        assert scorer.name == "cnn"
        return learn

    first, again = source(CHANGING), source(CHANGING)
    there, back = np.array([5, 0, 7]), np.array([7, 5])
    pixels, fifth = first.batch(there, 5)
    assert np.array_equal(pixels[..., 0], store.images[store.rows_of(catalog.rows("train"))[there]])
    again.batch(back, 2)
    assert np.array_equal(again.batch(back, 5)[1], fifth[[2, 0]])
    assert not np.array_equal(first.batch(there, 6)[1], fifth)
    assert not np.array_equal(source(CHANGING.with_overrides(["seed=7"])).batch(there, 5)[1], fifth)
    assert np.abs(fifth[:, :3] - [1, 0, 0]).max() <= 0.1 + 1e-6


def test_stored_views_take_turns_and_stay_beside_their_labels(packed: Packed) -> None:
    catalog, store = packed
    model = models.build("tl", VIEWS)
    prefix, _ = models.split_at(model, "pool")
    _, _, learn, check = training._arrange(model, store, catalog, spec=VIEWS, progress=None)
    for source, split in ((learn, "train"), (check, "validation")):
        rows = catalog.rows(split)
        clean = prefix.predict_on_batch(store.images[store.rows_of(rows)][..., None])
        epochs = np.stack([source.batch(slice(0, len(rows)), epoch) for epoch in range(1, 31)]).astype(np.float32)
        found = [len(np.unique(epochs[:, image], axis=0)) for image in range(len(rows))]
        assert found == [3 if split == "train" else 1] * len(rows)
        is_clean = np.abs(epochs - clean).max(axis=2) < 2e-3 * np.abs(clean).max()
        assert is_clean.any(axis=0).all()  # the clean image is one of them, and the right one
        assert is_clean.mean() == pytest.approx(1 / 3 if split == "train" else 1, abs=0.05)
        assert np.array_equal(source.labels, rows["label"])
        assert source.labels.dtype == np.float32
    at = np.array([9, 3])
    assert np.array_equal(learn.batch(at, 4), learn.batch(slice(0, 38), 4)[at])


# --- One training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(packed: Packed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One uninterrupted training of the cnn, its last checkpoint and all that it said."""
    checkpoint = tmp_path_factory.mktemp("alone") / "cnn.npz"
    said: list[dict[str, float]] = []
    steps: list[tuple[int, int]] = []
    model, history = train(
        "cnn",
        packed,
        CHANGING,
        checkpoint=checkpoint,
        on_epoch=said.append,
        progress=lambda done, total: steps.append((done, total)),
    )
    return {"model": model, "history": history, "checkpoint": checkpoint, "said": said, "steps": steps}


def test_history_holds_every_value_of_every_epoch(alone: dict[str, Any]) -> None:
    history = alone["history"]
    assert list(history.epochs.columns) == [
        "epoch",
        "train_accuracy",
        "val_accuracy",
        "train_loss",
        "val_loss",
        "learning_rate",
        "seconds",
    ]
    assert history.epochs["epoch"].tolist() == [1, 2, 3]
    assert history.epochs["epoch"].dtype == np.int64
    assert (history.epochs["learning_rate"] == 1e-3).all()
    assert (history.epochs["seconds"] > 0).all()
    assert history.epochs.notna().all(axis=None)
    assert alone["said"] == history.epochs.to_dict("records")
    assert alone["steps"] == [(1, 3), (2, 3), (3, 3)] * 3
    assert not history.stopped_early
    assert not history.diverged


def test_the_same_seed_gives_the_same_bits(alone: dict[str, Any], packed: Packed) -> None:
    keras.utils.set_random_seed(5)  # what ran before has no say
    model, history = train("cnn", packed, CHANGING)
    assert same_weights(model, alone["model"])
    pair = [each.epochs.drop(columns="seconds") for each in (history, alone["history"])]
    assert pair[0].equals(pair[1])


def test_early_stopping_leaves_the_weights_of_the_best_epoch(packed: Packed) -> None:
    spec = SPEC.with_overrides(["cnn.learning_rate=0.05", "train.epochs=12", "train.patience=2", "seed=3"])
    model, history = train("cnn", packed, spec)
    losses = history.epochs["val_loss"]
    assert history.stopped_early
    assert history.best_epoch == losses.argmin() + 1 == len(losses) - 2 < 10
    labels, scores = validation_scores(model, packed)
    assert metrics.log_loss(labels, scores) == pytest.approx(losses.min(), abs=1e-6)
    assert losses.iloc[-1] != pytest.approx(losses.min(), abs=1e-3)


# --- Stopped, killed, damaged -----------------------------------------------------------------------------------------


def resumed(approach: str, packed: Packed, spec: Spec, checkpoint: Path, stops: Sequence[int]) -> tuple[Any, Any]:
    """Train in a new model each time: stop after so many steps, go on, stop again ..., and go on to the end."""
    for steps in stops:
        with pytest.raises(StoppedEarly):
            train(approach, packed, spec, checkpoint=checkpoint, stop=after(steps))
    return train(approach, packed, spec, checkpoint=checkpoint)


def test_a_stop_is_said_and_leaves_a_checkpoint(packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(
        StoppedEarly, match=r"^Stopped in epoch 1, step 1, on request; run the same command with --resume\.$"
    ) as caught:
        train("cnn", packed, SPEC, checkpoint=tmp_path / "deep" / "cnn.npz", stop=after(1))
    assert caught.value.exit_status == 75
    state, _ = state_in(tmp_path / "deep" / "cnn.npz")
    assert (state["epoch"], state["step"], state["images_seen"]) == (1, 1, 16)
    with pytest.raises(StoppedEarly, match="epoch 1, step 0"):
        train("cnn", packed, SPEC, stop=lambda: True)  # nothing to write to: stopped all the same


@pytest.mark.parametrize(
    "stops", [(0, 1), (2,), (3,), (4, 0, 3)], ids=lambda stops: "+".join(str(steps) for steps in stops)
)
def test_a_resumed_training_is_the_uninterrupted_one(
    stops: tuple[int, ...], alone: dict[str, Any], packed: Packed, tmp_path: Path
) -> None:
    model, history = resumed("cnn", packed, CHANGING, tmp_path / "cnn.npz", stops)
    assert_same(state_in(tmp_path / "cnn.npz"), state_in(alone["checkpoint"]))
    assert same_weights(model, alone["model"])
    assert history.epochs.drop(columns="seconds").equals(alone["history"].epochs.drop(columns="seconds"))
    assert (history.best_epoch, history.stopped_early) == (alone["history"].best_epoch, False)


def test_a_resumed_training_on_stored_views_is_the_uninterrupted_one(packed: Packed, tmp_path: Path) -> None:
    model, _ = train("tl", packed, VIEWS, checkpoint=tmp_path / "alone.npz")
    again, _ = resumed("tl", packed, VIEWS, tmp_path / "tl.npz", (4,))
    assert_same(state_in(tmp_path / "tl.npz"), state_in(tmp_path / "alone.npz"))
    assert same_weights(again, model)


RECIPE = VIEWS.with_overrides(
    ["train.schedule=cosine", "train.weight_average=0.9", "train.weight_decay=0.1", "train.label_smoothing=0.1"]
)


def test_a_resumed_training_by_cosine_with_averaged_weights_is_the_uninterrupted_one(
    packed: Packed, tmp_path: Path
) -> None:
    spec = RECIPE.with_overrides(["augment.gamma=0.4", "augment.blur=0.03", "augment.noise=0.1"])
    model, history = train("tl", packed, spec, checkpoint=tmp_path / "alone.npz")
    assert history.best_epoch == spec.train.epochs
    again, _ = resumed("tl", packed, spec, tmp_path / "tl.npz", (2, 5))
    assert_same(state_in(tmp_path / "tl.npz"), state_in(tmp_path / "alone.npz"))
    assert same_weights(again, model)


def test_the_weights_kept_are_the_running_mean_over_all_steps(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[npt.NDArray[Any]]] = []
    plain = training._Loop._average_weights

    def watched(loop: Any) -> None:
        seen.append([np.array(keras.ops.convert_to_numpy(weight)) for weight in loop.weights])
        plain(loop)

    monkeypatch.setattr(training._Loop, "_average_weights", watched)
    catalog, store = packed
    model = models.build("tl", RECIPE)
    training.train(model, store, catalog, spec=RECIPE)
    mean = seen[0]
    assert len({value.dtype for value in mean}) == 2  # dropout's random state is among them, and stays what it is
    for step, now in enumerate(seen, start=1):
        keep = min(0.9, step / (step + 9))
        mean = [keep * old + (1 - keep) * new for old, new in zip(mean, now, strict=True)]
    kept = [np.array(weight) for name in ("head", "logit") for weight in model.get_layer(name).variables]
    mean = [value for value in mean if value.dtype == np.float32]
    assert len(seen) == 9
    for value, expected in zip(kept, mean, strict=True):
        assert np.allclose(value, expected, rtol=0, atol=1e-6)
    last = [value for value in seen[-1] if value.dtype == np.float32]
    assert any(np.abs(value - one).max() > 1e-4 for value, one in zip(kept, last, strict=True))


def test_the_mean_of_weights_is_validated_and_the_training_goes_on_from_its_own(packed: Packed) -> None:
    model, history = train("tl", packed, RECIPE)
    labels, scores = validation_scores(model, packed)
    assert history.epochs["val_loss"].iloc[-1] == pytest.approx(metrics.log_loss(labels, scores), rel=1e-4)
    other, _ = train("tl", packed, RECIPE.with_overrides(["train.weight_average=0.2"]))
    assert not same_weights(other, model)


def test_weight_decay_shrinks_kernels_and_leaves_biases_and_norms(packed: Packed) -> None:
    network = models.build("cnn", SPEC)
    optimizer = training._optimizer(SPEC.with_overrides(["train.weight_decay=0.5"]), rate=0.1)
    before = [np.array(weight) for weight in network.trainable_weights]
    optimizer.build(network.trainable_weights)
    optimizer.apply_gradients([(keras.ops.zeros_like(weight), weight) for weight in network.trainable_weights])
    for weight, old in zip(network.trainable_weights, before, strict=True):
        factor = 1 - 0.1 * 0.5 if weight.name == "kernel" else 1.0
        assert np.allclose(np.array(weight), old * factor, atol=1e-6), weight.path


def test_kernels_are_rounded_to_half_precision_where_asked_and_nothing_else_is(packed: Packed) -> None:
    model, _ = train("tl", packed, RECIPE.with_overrides(["train.half_kernels=true"]))
    whole, _ = train("tl", packed, RECIPE)
    for name in ("head", "logit"):
        kernel, before = (np.array(one.get_layer(name).kernel) for one in (model, whole))
        assert np.array_equal(kernel, before.astype(np.float16).astype(np.float32))
        assert not np.array_equal(kernel, before)
        assert np.array_equal(np.array(model.get_layer(name).bias), np.array(whole.get_layer(name).bias))


def test_kernels_are_rounded_behind_augmentation_too(packed: Packed) -> None:
    model, _ = train("cnn", packed, CHANGING.with_overrides(["train.half_kernels=true", "train.epochs=1"]))
    kernels = [np.array(layer.kernel) for layer in model.layers if getattr(layer, "kernel", None) is not None]
    assert len(kernels) == 4
    assert all(np.array_equal(kernel, kernel.astype(np.float16)) for kernel in kernels)


def test_a_resumed_training_in_bfloat16_is_the_uninterrupted_one(packed: Packed, tmp_path: Path) -> None:
    spec = CHANGING.with_overrides(["train.precision=bfloat16"])
    model, _ = train("cnn", packed, spec, checkpoint=tmp_path / "alone.npz")
    again, _ = resumed("cnn", packed, spec, tmp_path / "cnn.npz", (4,))
    assert_same(state_in(tmp_path / "cnn.npz"), state_in(tmp_path / "alone.npz"))
    assert same_weights(again, model)


def test_a_finished_training_is_not_trained_again(alone: dict[str, Any], packed: Packed, tmp_path: Path) -> None:
    shutil.copy(alone["checkpoint"], tmp_path)
    said: list[Any] = []
    model, history = train("cnn", packed, CHANGING, checkpoint=tmp_path / "cnn.npz", on_epoch=said.append)
    assert said == []
    assert history.epochs.equals(alone["history"].epochs)
    assert same_weights(model, alone["model"])


@pytest.fixture(scope="module")
def stopped(packed: Packed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of a training stopped in its third epoch, and the one before it."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(StoppedEarly):
        train("cnn", packed, CHANGING, checkpoint=folder / "cnn.npz", stop=after(8))
    assert sorted(path.name for path in folder.iterdir()) == ["cnn.npz", "cnn.previous.npz"]
    return folder


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def test_a_training_resumed_from_the_checkpoint_before_is_the_uninterrupted_one(
    stopped: Path, alone: dict[str, Any], packed: Packed, tmp_path: Path
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "copy")
    flip_a_bit(folder / "cnn.npz")
    said: list[str] = []
    train("cnn", packed, CHANGING, checkpoint=folder / "cnn.npz", say=said.append)
    assert said == [f"{folder / 'cnn.npz'} is damaged; the training goes on from the state before it."]
    assert_same(state_in(folder / "cnn.npz"), state_in(alone["checkpoint"]))


def test_where_both_checkpoints_are_damaged_training_begins_anew(stopped: Path, packed: Packed, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "copy")
    for path in folder.iterdir():
        flip_a_bit(path)
    said: list[str] = []
    with pytest.raises(StoppedEarly, match="epoch 1, step 0"):
        train("cnn", packed, CHANGING, checkpoint=folder / "cnn.npz", stop=after(0), say=said.append)
    assert said == [f"{folder / 'cnn.npz'} and {folder / 'cnn.previous.npz'} are damaged; the training starts afresh."]


def test_a_disk_that_fills_up_stops_the_training_and_what_was_kept_serves(
    alone: dict[str, Any], packed: Packed, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "cnn.npz"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(row: dict[str, float]) -> None:
        if row["epoch"] == 2:  # Python ignores the signal for too large a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (checkpoint.stat().st_size // 2, hard))

    try:
        with pytest.raises(
            RunError, match=r"^The state of the training \(.* kB\) cannot be written to .*/cnn\.npz: File"
        ):
            train("cnn", packed, CHANGING, checkpoint=checkpoint, on_epoch=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert state_in(checkpoint)[0]["epoch"] == 3
    model, _ = train("cnn", packed, CHANGING, checkpoint=checkpoint)
    assert_same(state_in(checkpoint), state_in(alone["checkpoint"]))
    assert same_weights(model, alone["model"])


@pytest.mark.parametrize(
    ("approach", "override"), [("cnn", "seed=1"), ("tl", "features.cache=true"), ("ft", "features.cache=false")]
)
def test_all_that_a_step_changes_is_kept(approach: str, override: str, packed: Packed, tmp_path: Path) -> None:
    """Weights, running statistics, the optimizer, and what dropout draws from; what a step leaves alone is not kept."""
    catalog, store = packed
    spec = CHANGING.with_overrides([override])
    model = models.build(approach, spec)
    network, scorer, learn, check = training._arrange(model, store, catalog, spec=spec, progress=None)
    network.compile(optimizer=keras.optimizers.Adam(1e-3), loss="binary_crossentropy", metrics=["accuracy"])
    network.optimizer.build(network.trainable_variables)
    loop = training._Loop(network, scorer, learn, check, spec=spec, rate=1e-3)
    watched = [*model.variables, *network.variables, *network.optimizer.variables]
    before = [np.array(variable) for variable in watched]
    loop._step(np.arange(16))
    changed = {
        id(variable)
        for variable, value in zip(watched, before, strict=True)
        if not np.array_equal(np.array(variable), value)
    }
    counted = {id(variable) for metric in network.metrics for variable in metric.variables}  # reset in each step
    kept = {id(variable) for variable in [*loop.weights, *network.optimizer.variables]}
    assert changed - counted <= kept
    draws = [variable for variable in loop.weights if "int" in variable.dtype]
    assert draws
    assert {id(variable) for variable in draws} <= changed


def test_images_that_were_compressed_otherwise_are_refused(packed: Packed) -> None:
    with pytest.raises(
        StoreError,
        match=r"^The images were packed with jpeg_quality 0, image\.jpeg_quality is 75; "
        r"pack them with jpeg_quality=spec\.image\.jpeg_quality\.$",
    ):
        train("cnn", packed, CHANGING.with_overrides(["image.jpeg_quality=75"]))


def test_a_checkpoint_of_another_run_is_refused(stopped: Path, packed: Packed) -> None:
    checkpoint = stopped / "cnn.npz"
    catalog, store = packed
    message = (
        rf"^{checkpoint} belongs to a run with another configuration or other images; "
        r"use the same ones to go on, or a new run directory\.$"
    )
    with pytest.raises(RunError, match=message):
        train("cnn", packed, CHANGING.with_overrides(["cnn.learning_rate=0.002"]), checkpoint=checkpoint)
    fewer = replace(catalog, table=catalog.table.iloc[1:])
    with pytest.raises(RunError, match=message):
        train("cnn", (fewer, store), CHANGING, checkpoint=checkpoint)
    with pytest.raises(RunError, match=message):
        train("tl", packed, CHANGING, checkpoint=checkpoint)


# --- Losses that are no number ----------------------------------------------------------------------------------------

NO_NUMBER = (
    r"^No epoch of cnn ended with a loss that is a number; lower cnn\.learning_rate \(now 0\.001\) and run again\.$"
)


def poison(model: Any) -> None:
    model.get_layer("logit").bias.assign([math.nan])


@pytest.mark.parametrize("after_step", [1, 3])
def test_a_loss_that_is_no_number_from_the_start_is_an_error(after_step: int, packed: Packed) -> None:
    """The training loss, or, where the last step ruins the weights, the validation loss alone."""
    catalog, store = packed
    spec = SPEC.with_overrides(["train.epochs=1"])
    model = models.build("cnn", spec)

    def ruin(done: int, total: int) -> None:
        if done == after_step:
            poison(model)

    with pytest.raises(RunError, match=NO_NUMBER):
        training.train(model, store, catalog, spec=spec, progress=ruin)


def test_a_loss_that_is_no_number_later_ends_training_with_the_best_epoch(packed: Packed, tmp_path: Path) -> None:
    catalog, store = packed
    model = models.build("cnn", SPEC)
    kept: list[Any] = []

    def ruin(row: dict[str, float]) -> None:
        kept.extend(model.get_weights())
        poison(model)

    history = training.train(model, store, catalog, spec=SPEC, checkpoint=tmp_path / "cnn.npz", on_epoch=ruin)
    assert history.epochs["epoch"].tolist() == [1]
    assert (history.best_epoch, history.stopped_early, history.diverged) == (1, False, True)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), kept, strict=True))
    again = models.build("cnn", SPEC)
    # taken up again, it ends where it ended: nobody is asked to stop, because no step is left
    resumed = training.train(again, store, catalog, spec=SPEC, checkpoint=tmp_path / "cnn.npz", stop=lambda: True)
    assert resumed.epochs.equals(history.epochs)
    assert (resumed.best_epoch, resumed.stopped_early, resumed.diverged) == (1, False, True)
    assert same_weights(again, model)


def test_a_loss_that_is_no_number_ends_the_training_at_its_step(packed: Packed, tmp_path: Path) -> None:
    catalog, store = packed
    model = models.build("cnn", SPEC)
    steps: list[int] = []

    def ruin(done: int, total: int) -> None:
        steps.append(done)
        poison(model)

    for _ in range(2):
        with pytest.raises(RunError, match=NO_NUMBER):
            training.train(model, store, catalog, spec=SPEC, checkpoint=tmp_path / "cnn.npz", progress=ruin)
        assert steps == [1]  # the second step's loss is none, and resumed there is nothing to do


def test_a_validation_loss_that_is_no_number_is_never_the_best(packed: Packed) -> None:
    """The last step of the last epoch ruins the weights: its own loss was still a number."""
    catalog, store = packed
    model = models.build("cnn", SPEC)
    said: list[dict[str, float]] = []
    kept: list[list[Any]] = []

    def ruin(done: int, total: int) -> None:
        if len(said) == 2 and done == total:
            poison(model)

    def on_epoch(row: dict[str, float]) -> None:
        said.append(row)
        kept.append(model.get_weights())

    history = training.train(model, store, catalog, spec=SPEC, progress=ruin, on_epoch=on_epoch)
    assert history.epochs["train_loss"].notna().all()
    assert history.epochs["val_loss"].isna().tolist() == [False, False, True]
    assert history.best_epoch == history.epochs["val_loss"].argmin() + 1 < 3
    assert (history.stopped_early, history.diverged) == (False, True)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), kept[history.best_epoch - 1], strict=True))


def test_a_network_with_teachers_learns_half_from_their_mean_score_for_the_same_input(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = VIEWS.with_overrides(["train.teachers=2", "train.epochs=1"])
    aimed: list[npt.NDArray[Any]] = []
    sources: list[Any] = []
    plain = training._Loop._taught

    def watched(loop: Any, inputs: Any, n: int) -> npt.NDArray[np.float32]:
        one, two = (np.array(teacher(inputs))[:, 0] for teacher in loop.teachers)
        assert not np.allclose(one, two, atol=1e-4)  # two networks, not one twice
        aimed.append(plain(loop, inputs, n))
        assert np.allclose(aimed[-1], (one + two) / 2, atol=1e-6)
        return aimed[-1]

    def stepping(loop: Any) -> Any:
        sources.append(loop.learn)
        return steps(loop)

    monkeypatch.setattr(training._Loop, "_taught", watched)
    steps = training._Loop._steps
    monkeypatch.setattr(training._Loop, "_steps", stepping)
    begun: list[tuple[int, int]] = []
    model, history = train("tl", packed, spec, on_begin=lambda *done: begun.append(done))
    assert begun == [(0, 0), (1, 0), (2, 0)]
    assert len(aimed) == 3  # steps
    views = [source.batch(np.arange(30), 1) for source in sources]
    assert len(views) == 3
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(views, 2))
    alone, before = train("tl", packed, spec.with_overrides(["train.teachers=0"]))
    assert not same_weights(model, alone)
    assert len(history.epochs) == len(before.epochs) == 1
    assert history.epochs["train_loss"][0] != before.epochs["train_loss"][0]


def test_teachers_need_a_frozen_part_that_all_share(packed: Packed) -> None:
    spec = VIEWS.with_overrides(["train.teachers=2", "backbone.weights=none"])
    with pytest.raises(SpecError, match=r"^train\.teachers needs a frozen part that all networks share, "):
        train("tl", packed, spec)


def test_views_of_teachers_are_stored_in_the_same_pass_as_the_models_own(packed: Packed) -> None:
    catalog, store = packed
    spec = VIEWS.with_overrides(["train.teachers=2", "seed=5"])
    told: list[tuple[int, int]] = []
    found = training.extract_features(
        [models.build("tl", spec)], store, catalog, spec=spec, progress=lambda *done: told.append(done)
    )
    assert told[-1][0] == told[-1][1]
    assert len({total for _, total in told}) == 1
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(found["pool"].views) == 3
    asked: list[tuple[int, int]] = []
    train("tl", packed, spec, progress=lambda *done: asked.append(done))
    assert {total for _, total in asked} == {3}  # steps alone: nothing was left to compute


def test_training_accuracy_counts_labels_not_what_teachers_made_of_them() -> None:
    accuracy = training._Accuracy()
    aims = np.array([[0.5 + 0.01], [1.0], [0.49], [0.5], [0.0]])  # of labels 1, 1, 0, 0, 0
    accuracy.update_state(aims, np.array([[0.9], [0.2], [0.1], [0.4], [0.8]]))
    assert float(accuracy.result()) == pytest.approx(3 / 5)


@pytest.mark.parametrize("approach", ["tl", "cnn"])
def test_a_resumed_training_with_teachers_is_the_uninterrupted_one(
    packed: Packed, tmp_path: Path, approach: str
) -> None:
    spec = (VIEWS if approach == "tl" else CHANGING).with_overrides(["train.teachers=2", "train.epochs=2"])
    model, history = train(approach, packed, spec, checkpoint=tmp_path / "alone.npz")
    again, other = resumed(approach, packed, spec, tmp_path / "state.npz", (2, 3, 5))
    assert_same(state_in(tmp_path / "state.npz"), state_in(tmp_path / "alone.npz"))
    assert same_weights(again, model)
    assert other.epochs.drop(columns="seconds").equals(history.epochs.drop(columns="seconds"))
