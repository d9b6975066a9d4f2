"""The evidence map adds up to the logit, is gradient times activation, and lies where its cells look."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from pneumoscope import backbones, evidence, explainer, models
from pneumoscope._backend import keras
from pneumoscope.errors import UsageError
from pneumoscope.specs import Spec

layers = keras.layers
Floats = npt.NDArray[np.float32]

SMOKE = Spec.preset_named("smoke")
SPECS = {
    "cnn tiny": ("cnn", SMOKE),
    "cnn tutorial": ("cnn", Spec.preset_named("tutorial").with_overrides(["image.size_px=64"])),
    "tl": ("tl", SMOKE),
    "ft": ("ft", SMOKE),
}
PIXELS = np.random.default_rng(5).integers(0, 256, (5, 64, 64, 1), dtype=np.uint8)
LABELS = np.array([[0.0], [1], [0], [1], [1]])

_BUILT: dict[str, Any] = {}


def trained(name: str) -> Any:
    """A model after three steps of training, so that no bias is 0 any more; no test changes it."""
    if name not in _BUILT:
        model = models.build(*SPECS[name])
        model.compile(optimizer=keras.optimizers.Adam(3e-3), loss="binary_crossentropy", run_eagerly=True)
        for _ in range(3):
            model.train_on_batch(PIXELS, LABELS)
        _BUILT[name] = model
    return _BUILT[name]


def explained(model: Any, pixels: npt.NDArray[Any] = PIXELS) -> dict[str, Floats]:
    outputs = explainer.build(model)(pixels, training=False)
    return dict(zip(explainer.OUTPUTS, map(keras.ops.convert_to_numpy, outputs), strict=True))


def assert_adds_up(parts: dict[str, Floats], tolerance: float = 1e-5) -> None:
    """The invariant, relative to the size of what is summed."""
    assert all(array.dtype == np.float32 for array in parts.values())
    size = 1 + np.abs(parts["evidence"]).sum(axis=(1, 2)) + np.abs(parts["bias"])
    error = np.abs(parts["evidence"].sum(axis=(1, 2)) + parts["bias"] - parts["logit"])
    assert (error / size).max() < tolerance


# --- The sum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_evidence_and_bias_add_up_to_the_logit_of_each_image(name: str) -> None:
    model = trained(name)
    parts = explained(model)
    assert_adds_up(parts)
    score = keras.ops.convert_to_numpy(model(PIXELS, training=False))
    assert np.allclose(parts["score"], score[:, 0], rtol=0, atol=1e-6)
    assert np.allclose(parts["score"], 1 / (1 + np.exp(-parts["logit"])), atol=1e-6)
    assert np.abs(parts["bias"]).min() > 1e-4  # the sum would not notice a bias that is left out
    assert (np.abs(parts["evidence"]).sum(axis=(1, 2)) > 1e-2).all()
    assert len(np.unique(parts["logit"])) == len(PIXELS)


@pytest.mark.parametrize("name", ["cnn tiny", "tl"])
def test_the_shapes_and_names_are_those_of_the_bundle(name: str) -> None:
    model = trained(name)
    cells, channels = {"cnn tiny": (3, 16), "tl": (2, 1280)}[name]
    assert {key: array.shape for key, array in explained(model).items()} == {
        "score": (5,),
        "logit": (5,),
        "bias": (5,),
        "evidence": (5, cells, cells),
        "features": (5, channels),
    }


@pytest.mark.parametrize("name", SPECS)
def test_features_are_the_means_of_the_last_feature_map(name: str) -> None:
    model = trained(name)
    names = [layer.name for layer in model.layers]
    maps = model.get_layer("flatten" if "flatten" in names else "pool").input
    means = keras.ops.convert_to_numpy(keras.Model(model.input, maps)(PIXELS, training=False)).mean(axis=(1, 2))
    assert np.allclose(explained(model)["features"], means, atol=1e-5)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="takes the gradient with TensorFlow")
@pytest.mark.parametrize("name", SPECS)
def test_the_map_is_gradient_times_activation_summed_over_channels(name: str) -> None:
    model = trained(name)
    layer = model.get_layer("flatten" if name.startswith("cnn") else "pool")
    maps = keras.Model(model.input, layer.input)(PIXELS, training=False)
    tail = keras.Model(layer.input, model.get_layer("logit").output)
    with tf.GradientTape() as tape:
        tape.watch(maps)
        logit = tail(maps, training=False)
    product = (tape.gradient(logit, maps) * maps).numpy().sum(axis=-1)
    assert np.allclose(explained(model)["evidence"], product, rtol=1e-4, atol=1e-5)


def test_the_explainer_shares_the_models_weights() -> None:
    model = models.build("cnn", SMOKE)
    network = explainer.build(model)
    assert {id(weight) for weight in network.weights} == {id(weight) for weight in model.weights}
    before = explained(model)
    model.get_layer("head").kernel.assign(-model.get_layer("head").kernel)
    after = dict(zip(explainer.OUTPUTS, map(keras.ops.convert_to_numpy, network(PIXELS)), strict=True))
    assert not np.allclose(before["evidence"], after["evidence"])
    assert_adds_up(after)


def test_in_bfloat16_the_parts_add_up_to_its_rounding() -> None:
    model = models.build("cnn", SMOKE.with_overrides(["train.precision=bfloat16"]))
    assert_adds_up(explained(model), tolerance=0.02)


def test_a_network_without_our_head_is_refused() -> None:
    model = models.build("tl", SMOKE)
    _, tail = models.split_at(model, "pool")
    for refused in (explainer.build, explainer.grid):
        with pytest.raises(
            UsageError,
            match=r"^The network tl has no head that an evidence map could be taken from; give a model that "
            r"pneumoscope built \(cnn, tl or ft\), whole\.$",
        ):
            refused(tail)


# --- A network whose eyes are known -----------------------------------------------------------------------------------


def one_eyed() -> Any:
    """The small cnn with a head that reads the first of its 3 x 3 cells only."""
    model = models.build("cnn", SMOKE)
    head = model.get_layer("head")
    kernel = np.array(keras.ops.convert_to_numpy(head.kernel)).reshape(3, 3, 16, -1)
    kernel[1:], kernel[:, 1:] = 0, 0
    kernel[0, 0] = np.abs(kernel[0, 0])
    head.kernel.assign(kernel.reshape(9 * 16, -1))
    final = model.get_layer("logit")
    final.kernel.assign(np.abs(keras.ops.convert_to_numpy(final.kernel)))
    return model


def test_a_network_that_looks_at_one_corner_has_all_its_evidence_there() -> None:
    model = one_eyed()
    parts = explained(model)
    assert_adds_up(parts)
    assert (parts["evidence"][:, 0, 0] > 1e-3).all()
    assert np.count_nonzero(parts["evidence"]) == len(PIXELS)
    grid = explainer.grid(model)
    shares = evidence.shares(PIXELS[..., 0], parts["evidence"], grid=grid, border_px=10, corner_px=30)
    assert (shares.corners > 0.9).all()  # the cell's neighbours begin 26 px from the edge


def test_hiding_the_corner_that_a_network_looks_at_drops_its_logit() -> None:
    model = one_eyed()
    network = explainer.build(model)

    def logit(images: npt.NDArray[np.uint8]) -> Floats:
        return np.asarray(keras.ops.convert_to_numpy(network(images[..., None])[1]), dtype=np.float32)

    image, grid = PIXELS[0, ..., 0], explainer.grid(model)
    found = explained(model)["evidence"][0]
    curves = evidence.perturbation(logit, image, found, grid=grid)
    drop = curves.deletion[0] - curves.deletion[-1]
    assert drop > 1e-3
    assert curves.deletion[0] - curves.deletion[1] > 0.6 * drop  # 18 of 21 px of its field are in the first cell
    lost = evidence.occlusion(logit, image, cell_px=16)
    assert lost.argmax() == 0
    assert np.allclose(lost[2:], 0, atol=1e-6)
    assert np.allclose(lost[:, 2:], 0, atol=1e-6)


# --- Where cells lie --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("approach", "changes", "expected"),
    [
        ("cnn", ["cnn.layers=tutorial", "image.size_px=224"], (14.5, 8)),
        ("cnn", [], (10, 16)),
        ("tl", ["image.size_px=224"], (31, 32)),
        ("tl", ["backbone.name=mobilenetv2", "image.size_px=224"], (31, 32)),
        ("tl", ["backbone.name=mobilenetv2", "image.size_px=225"], (0, 32)),
    ],
)
def test_the_grid_of_each_network_is_the_one_its_padding_makes(
    approach: str, changes: list[str], expected: tuple[float, float]
) -> None:
    model = models.build(approach, SMOKE.with_overrides(["backbone.weights=none", *changes]))
    assert explainer.grid(model) == evidence.Grid(*expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet152v2", (0, 32)),
        ("resnet50v2", (0, 32)),
        ("densenet121", (14, 32)),
        ("efficientnetv2b0", (31, 32)),
        ("mobilenetv2", (31, 32)),
        ("efficientnet_lite0", (31, 32)),
    ],
)
def test_the_grid_of_every_backbone_is_known(name: str, expected: tuple[float, float]) -> None:
    changes = [f"backbone.name={name}", "backbone.weights=none", "image.size_px=224"]
    assert explainer.grid(models.build("tl", SMOKE.with_overrides(changes))) == evidence.Grid(*expected)
    assert set(backbones.BACKBONES) == {
        "resnet152v2",
        "resnet50v2",
        "densenet121",
        "efficientnetv2b0",
        "mobilenetv2",
        "efficientnet_lite0",
    }


def with_head(side: int, *stack: Any) -> Any:
    """A network of some layers with the head that `models` gives."""
    image = keras.Input((side, side, 1), name="image")
    x = image
    for layer in stack:
        x = layer(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(4, activation="relu", name="head")(x)
    logit = layers.Dense(1, name="logit")(x)
    return keras.Model(image, layers.Activation("sigmoid", name="score")(logit), name="small")


@pytest.mark.parametrize("side", [47, 48])
@pytest.mark.parametrize(
    "stack",
    [
        lambda: [layers.Conv2D(2, 3, 2, "same"), layers.DepthwiseConv2D(5, 2, "same")],
        lambda: [layers.Conv2D(2, 5, 2, "valid"), layers.MaxPooling2D(), layers.Conv2D(2, 2, 1, "same")],
        lambda: [layers.ZeroPadding2D(3), layers.Conv2D(2, 7, 2), layers.ZeroPadding2D(1), layers.MaxPooling2D(3, 2)],
        lambda: [layers.ZeroPadding2D(((0, 1), (0, 1))), layers.Conv2D(2, 3, 2), layers.AveragePooling2D(2)],
        lambda: [layers.Conv2D(2, 3, dilation_rate=3, padding="same"), layers.MaxPooling2D(3, 2, "same")],
    ],
    ids=["same", "valid", "resnet", "mobilenet", "dilated"],
)
def test_a_cells_place_is_the_middle_of_the_pixels_that_change_it(side: int, stack: Any) -> None:
    model = with_head(side, *stack())
    for (
        layer
    ) in model.layers:  # nothing negative, so that nothing cancels out and any rise shows, also behind a maximum
        layer.set_weights([np.abs(array) + 0.1 for array in layer.get_weights()])
    maps = keras.Model(model.input, model.get_layer("pool").input)
    images = np.zeros((side, side, side, 1), dtype=np.float32)
    images[np.arange(side), np.arange(side), :] = 1  # one bright row in each
    found = keras.ops.convert_to_numpy(maps(images))[:, :, 2].sum(axis=-1)  # (bright row, row of cells)
    cell = found.shape[1] // 2  # its field does not reach the edge
    rows = np.flatnonzero(found[:, cell] > found[:, cell].min())
    assert 0 < rows.min() < rows.max() < side - 1
    grid = explainer.grid(model)
    assert grid.first_px + cell * grid.step_px == (rows.min() + rows.max()) / 2


# --- Shuffled weights -------------------------------------------------------------------------------------------------


def test_maps_lose_their_likeness_when_weights_are_shuffled_from_the_top_down() -> None:
    model = trained("cnn tutorial")
    before = [np.array(array) for array in model.get_weights()]
    found = explainer.randomisation(model, PIXELS[..., 0], depth=5, seed=1, batch_size=2)
    assert [name for name, _ in found] == ["logit", "head", "block3_bn", "block3_conv2", "block3_conv1"]
    assert all(values.shape == (5,) for _, values in found)
    assert all((np.abs(values) <= 1 + 1e-9).all() for _, values in found)
    assert np.abs(found[1][1].mean()) < 0.5
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_the_seed_alone_decides_how_weights_are_shuffled() -> None:
    model = trained("cnn tiny")
    first, again, other = (
        explainer.randomisation(model, PIXELS[..., 0], depth=2, seed=seed)[1][1] for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_shuffling_what_is_all_the_same_changes_no_map() -> None:
    model = models.build("cnn", SMOKE)
    final = model.get_layer("logit")
    final.kernel.assign(np.full(final.kernel.shape, 0.25, dtype=np.float32))
    (name, values), (_, changed) = explainer.randomisation(model, PIXELS[..., 0], depth=2, seed=0)
    assert name == "logit"
    assert values.tolist() == pytest.approx([1] * 5)
    assert (changed < 0.99).all()


# --- Other backends ---------------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys
import numpy as np
from pneumoscope import _backend, _onnxruntime, explainer, models, onnx_graph
from pneumoscope.specs import Spec
assert _backend.prepare() == sys.argv[1]
pixels = np.random.default_rng(5).integers(0, 256, (5, 64, 64), dtype=np.uint8)
for approach in ("cnn", "tl", "ft"):
    model = models.build(approach, Spec.preset_named("smoke"))
    rng = np.random.default_rng(0)
    for layer in model.layers[-5:]:
        layer.set_weights([array + 0.05 * rng.normal(size=array.shape) for array in layer.get_weights()])
    (_, ours), = models.in_batches(explainer.build(model), lambda at: pixels[at, ..., None], 5, batch_size=5)
    score, logit, bias, evidence, features = ours
    assert np.abs(bias).max() > 1e-3
    assert np.allclose(evidence.sum((1, 2)) + bias, logit, rtol=1e-4, atol=1e-4), (approach, logit)
    session = _onnxruntime.load().InferenceSession(onnx_graph.build(model).SerializeToString())
    for name, one, other in zip(explainer.OUTPUTS, ours, session.run(None, {"image": pixels}), strict=True):
        assert np.allclose(one, other, rtol=1e-3, atol=1e-4), (approach, name, np.abs(one - other).max())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jax", "torch"])
def test_every_backend_explains_and_writes_the_same_graph(name: str) -> None:
    pytest.importorskip(name)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, name],
        env=os.environ | {"KERAS_BACKEND": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
