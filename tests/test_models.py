"""The approaches against the tutorial's text, the cut, batches and listings."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pneumoscope import backbones, models
from pneumoscope._backend import keras
from pneumoscope.errors import SpecError
from pneumoscope.specs import ImageSpec, Spec

SMALL = Spec.preset_named("smoke").with_overrides(["image.size_px=32"])
TUTORIAL = Spec.preset_named("tutorial").with_overrides(["backbone.weights=none"])
RANDOM = SMALL.with_overrides(["backbone.weights=none"])
MOBILENET = RANDOM.with_overrides(["backbone.name=mobilenetv2"])
PIXELS = np.random.default_rng(5).integers(0, 256, (6, 32, 32, 1), dtype=np.uint8)

Images = npt.NDArray[np.float32]


_BUILT: dict[tuple[str, str], Any] = {}


def built(approach: str, spec: Spec) -> Any:
    """A model that no test changes, built once."""
    key = approach, spec.hash
    if key not in _BUILT:
        _BUILT[key] = models.build(approach, spec)
    return _BUILT[key]


def fetch(positions: slice) -> npt.NDArray[np.uint8]:
    return PIXELS[positions]


def outputs_of(network: Any, inputs: Any = PIXELS) -> npt.NDArray[Any]:
    """Run a network once; uncompiled, which takes less time than to trace it."""
    return np.asarray(keras.ops.convert_to_numpy(network(inputs, training=False)))


def weights_of(model: Any) -> list[npt.NDArray[Any]]:
    return [np.array(weight) for weight in model.get_weights()]


# --- The tutorial's text ----------------------------------------------------------------------------------------------


def test_tutorial_cnn_is_the_published_one_layer_by_layer() -> None:
    model = built("cnn", TUTORIAL)
    assert [(row.kind, row.output_shape, row.parameters) for row in models.listing(model)] == [
        ("InputLayer", "224 x 224 x 1", 0),
        ("Concatenate", "224 x 224 x 3", 0),
        ("Rescaling", "224 x 224 x 3", 0),
        ("Conv2D", "222 x 222 x 16", 448),
        ("BatchNormalization", "222 x 222 x 16", 64),
        ("ReLU", "222 x 222 x 16", 0),
        ("MaxPooling2D", "111 x 111 x 16", 0),
        ("Dropout", "111 x 111 x 16", 0),
        ("Conv2D", "109 x 109 x 32", 4_640),
        ("BatchNormalization", "109 x 109 x 32", 128),
        ("ReLU", "109 x 109 x 32", 0),
        ("MaxPooling2D", "54 x 54 x 32", 0),
        ("Dropout", "54 x 54 x 32", 0),
        ("Conv2D", "52 x 52 x 64", 18_496),
        ("Conv2D", "50 x 50 x 64", 36_928),
        ("BatchNormalization", "50 x 50 x 64", 256),
        ("ReLU", "50 x 50 x 64", 0),
        ("MaxPooling2D", "25 x 25 x 64", 0),
        ("Dropout", "25 x 25 x 64", 0),
        ("Flatten", "40000", 0),
        ("Dense", "64", 2_560_064),
        ("Dropout", "64", 0),
        ("Dense", "1", 65),
        ("Activation", "1", 0),
    ]
    assert models.count_parameters(model) == model.count_params() == 2_621_089
    assert models.count_parameters(model, trainable_only=True) == 2_620_865


def test_tutorial_cnn_has_the_published_settings() -> None:
    model = built("cnn", TUTORIAL)

    def of_kind(kind: str) -> list[Any]:
        return [layer for layer in model.layers if type(layer).__name__ == kind]

    assert [layer.rate for layer in of_kind("Dropout")] == [0.2, 0.2, 0.4, 0.5]
    assert {layer.momentum for layer in of_kind("BatchNormalization")} == {0.99}
    assert {(layer.kernel_size, layer.strides, layer.padding) for layer in of_kind("Conv2D")} == {
        ((3, 3), (1, 1), "valid")
    }
    assert {layer.activation.__name__ for layer in of_kind("Conv2D")} == {"linear"}  # relu comes after the BatchNorm
    assert {layer.pool_size for layer in of_kind("MaxPooling2D")} == {(2, 2)}
    assert of_kind("Rescaling")[0].scale == 1 / 255
    assert [layer.activation.__name__ for layer in of_kind("Dense")] == ["relu", "linear"]
    assert of_kind("Activation")[0].activation.__name__ == "sigmoid"


def test_tutorial_fine_tuning_trains_the_last_13_layers_and_the_head() -> None:
    model = models.build("ft", TUTORIAL)  # some seconds: the only build of this backbone here
    assert models.count_parameters(model, trainable_only=True) == 4_731_137
    assert models.count_parameters(model) == 58_331_648 + 2048 * 128 + 128 + 128 + 1
    own = backbones.layers_of(model, "resnet152v2")
    assert [layer.trainable for layer in own] == [False] * (len(own) - 13) + [True] * 13
    assert own[-13].name == "conv5_block3_preact_bn"
    assert models.cut(model) == "conv5_block2_out"
    prefix, tail = models.split_at(model, "conv5_block2_out")
    assert prefix.output.shape == tail.input.shape == (None, 7, 7, 2048)
    assert not set(map(id, prefix.weights)) & set(map(id, tail.weights))
    assert models.count_parameters(tail, trainable_only=True) == 4_731_137
    assert model.get_layer("scaling").scale == [1 / 255] * 3  # plain [0, 1], as the tutorial has it


@pytest.mark.parametrize("spec", [SMALL, MOBILENET], ids=["efficientnet_lite0", "mobilenetv2"])
def test_transfer_learning_puts_the_published_head_on_a_frozen_backbone(spec: Spec) -> None:
    model = built("tl", spec)
    pool, head, dropout, logit, score = model.layers[-5:]
    assert [type(layer).__name__ for layer in (pool, head, dropout, logit, score)] == [
        "GlobalAveragePooling2D",
        "Dense",
        "Dropout",
        "Dense",
        "Activation",
    ]
    assert (head.units, head.activation.__name__, dropout.rate, logit.units) == (128, "relu", 0.1, 1)
    assert score.activation.__name__ == "sigmoid"
    assert [row.name for row in models.listing(model) if row.trainable] == ["head", "logit"]
    assert models.count_parameters(model, trainable_only=True) == 1280 * 128 + 128 + 128 + 1
    assert models.cut(model) == "pool"


# --- Every approach ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approach", ["cnn", "tl", "ft"])
def test_scores_are_the_sigmoid_of_the_logit_whatever_the_type_of_the_pixels(approach: str) -> None:
    model = built(approach, SMALL)
    assert (model.name, model.input.name, model.output.shape) == (approach, "image", (None, 1))
    score = outputs_of(model).astype(np.float64)
    logit = outputs_of(keras.Model(model.input, model.get_layer("logit").output)).astype(np.float64)
    assert score.shape == (6, 1)
    assert score.min() >= 0
    assert score.max() <= 1
    assert len(np.unique(score)) == 6
    assert np.allclose(score, 1 / (1 + np.exp(-logit)), atol=1e-6)
    assert np.array_equal(outputs_of(model, PIXELS.astype(np.float32)), outputs_of(model))


@pytest.mark.parametrize("approach", ["cnn", "ft"])
def test_the_seed_alone_decides_the_initial_weights(approach: str) -> None:
    first = weights_of(models.build(approach, RANDOM))
    models.build("cnn", RANDOM.with_overrides(["seed=7"]))
    again = weights_of(models.build(approach, RANDOM))
    other = weights_of(models.build(approach, RANDOM.with_overrides(["seed=43"])))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_both_approaches_on_one_seed_share_their_frozen_weights() -> None:
    """Stored features serve both, also those of a backbone with random weights."""
    tl, ft = built("tl", RANDOM), built("ft", RANDOM)
    for ours, theirs in zip(backbones.layers_of(tl, "efficientnet_lite0"), ft.layers[3:], strict=False):
        assert all(np.array_equal(a, b) for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True))


def test_unknown_approach_is_refused() -> None:
    with pytest.raises(SpecError, match=r"^There is no approach 'svm'; choose one of cnn, tl, ft, best\.$"):
        models.build("svm", SMALL)


def test_more_trainable_layers_than_the_backbone_has_are_refused() -> None:
    n = len(backbones.layers_of(built("tl", RANDOM), "efficientnet_lite0"))
    with pytest.raises(
        SpecError, match=rf"^ft\.trainable_layers is {n}, efficientnet_lite0 has {n} layers; choose fewer\.$"
    ):
        models.build("ft", RANDOM.with_overrides([f"ft.trainable_layers={n}"]))


def test_images_too_small_for_the_cnn_are_refused() -> None:
    tiny = TUTORIAL.model_copy(update={"image": ImageSpec.model_construct(size_px=24)})  # smaller than a Spec allows
    with pytest.raises(SpecError, match=r"^The image is too small for the cnn; choose image\.size_px of 32 or more\.$"):
        models.build("cnn", tiny)


# --- Prefix and tail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("approach", "spec", "expected"),
    [
        ("tl", SMALL, "pool"),
        ("ft", SMALL, "block7a_project_conv"),
        ("ft", SMALL.with_overrides(["ft.trainable_layers=13"]), "block6c_add"),  # block6d's shortcut goes around it
        ("tl", MOBILENET, "pool"),
        ("ft", MOBILENET.with_overrides(["ft.trainable_layers=13"]), "block_14_add"),
    ],
    ids=["tl", "ft", "ft into a block", "tl mobilenetv2", "ft mobilenetv2 into a block"],
)
def test_tail_of_prefix_is_the_full_model(approach: str, spec: Spec, expected: str) -> None:
    model = built(approach, spec)
    name = models.cut(model)
    assert name == expected
    prefix, tail = models.split_at(model, name)
    assert not prefix.trainable_weights
    assert list(map(id, tail.trainable_weights)) == list(map(id, model.trainable_weights))
    assert np.allclose(outputs_of(tail, outputs_of(prefix)), outputs_of(model), rtol=0, atol=1e-6)


def test_a_cnn_has_no_frozen_part() -> None:
    assert models.cut(built("cnn", SMALL)) is None


def test_a_cut_that_a_shortcut_goes_around_is_refused() -> None:
    with pytest.raises(
        SpecError,
        match=r"^The network tl cannot be cut at block6d_project_conv: a shortcut goes around it; "
        r"choose a layer that every path passes, such as the end of a block\.$",
    ):
        models.split_at(built("tl", RANDOM), "block6d_project_conv")


def test_training_the_tail_trains_the_full_model() -> None:
    model = models.build("tl", RANDOM)
    before = outputs_of(model)
    prefix, tail = models.split_at(model, "pool")
    features = outputs_of(prefix)
    tail.compile(optimizer=keras.optimizers.SGD(1.0), loss="binary_crossentropy")
    tail.train_on_batch(features, np.array([[0.0], [1], [0], [1], [0], [1]]))
    after = outputs_of(model)
    assert not np.allclose(after, before, rtol=0, atol=1e-4)
    assert np.allclose(outputs_of(tail, features), after, rtol=0, atol=1e-6)


# --- Batches and listings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_batches_give_what_one_pass_gives(batch_size: int) -> None:
    model = built("cnn", SMALL)
    scores = models.scores(model, fetch, 6, batch_size=batch_size)
    assert scores.dtype == np.float32
    assert scores.shape == (6,)
    assert np.allclose(scores, outputs_of(model)[:, 0], rtol=0, atol=1e-6)


def test_batches_cover_every_position_once_with_all_outputs() -> None:
    model = built("cnn", SMALL)
    both = keras.Model(model.input, [model.get_layer("head").output, model.output])
    seen = list(models.in_batches(both, fetch, 6, batch_size=4))
    assert [positions for positions, _ in seen] == [slice(0, 4), slice(4, 6)]
    assert [[output.shape for output in outputs] for _, outputs in seen] == [[(4, 16), (4, 1)], [(2, 16), (2, 1)]]
    assert list(models.in_batches(both, fetch, 0, batch_size=4)) == []


@pytest.mark.parametrize("approach", ["cnn", "tl", "ft"])
def test_the_listing_numbers_and_counts_every_layer(approach: str) -> None:
    model = built(approach, SMALL)
    rows = models.listing(model)
    assert [(row.number, row.name) for row in rows] == [(n, layer.name) for n, layer in enumerate(model.layers, 1)]
    assert sum(row.parameters for row in rows) == models.count_parameters(model) == model.count_params()
    trained = {layer.name: sum(int(np.prod(w.shape)) for w in layer.trainable_weights) for layer in model.layers}
    assert models.count_parameters(model, trainable_only=True) == sum(trained.values())
    assert [row.name for row in rows if row.trainable] == [name for name, count in trained.items() if count]
    assert (rows[0].output_shape, rows[-1].output_shape) == ("32 x 32 x 1", "1")
