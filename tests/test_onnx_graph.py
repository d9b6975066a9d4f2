"""The ONNX graph gives what Keras gives: score, logit, bias, evidence and features, for every layer and backbone."""

from __future__ import annotations

import logging
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from pneumoscope import _onnxruntime, backbones, evidence, explainer, models, onnx_graph, phantom, training
from pneumoscope._backend import keras
from pneumoscope.errors import UsageError
from pneumoscope.specs import Spec

layers = keras.layers
Outputs = dict[str, npt.NDArray[np.float32]]

SMOKE = Spec.preset_named("smoke")
RANDOM = SMOKE.with_overrides(["backbone.weights=none"])
LARGE = ("resnet152v2", "resnet50v2", "densenet121", "efficientnetv2b0")

_BUILT: dict[str, Any] = {}


def pixels(size_px: int, n: int) -> npt.NDArray[np.uint8]:
    """Half synthetic radiographs, half noise."""
    children = [phantom.draw(at % 2, seed=at, width_px=size_px, height_px=size_px) for at in range(n // 2)]
    noise = np.random.default_rng(1).integers(0, 256, (n - n // 2, size_px, size_px), dtype=np.uint8)
    return np.concatenate([np.stack(children), noise])


def livened(model: Any) -> Any:
    """Give a new model weights that a mistake would show in: running means as data make them, no bias that is 0."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.trainable, layer.momentum = True, 0.0  # its next batch becomes its memory
            weights = layer.get_weights()
            for at in range(len(weights) - 2):  # gamma and beta, where it has them; then mean and variance
                weights[at] = weights[at] + rng.uniform(-0.3, 0.3, weights[at].shape)
            layer.set_weights(weights)
        elif getattr(layer, "use_bias", False):  # a convolution or a dense layer
            kernel, bias = layer.get_weights()
            layer.set_weights([kernel, bias + rng.uniform(-0.5, 0.5, bias.shape)])
    model(pixels(model.input.shape[1], 8)[..., None], training=True)
    return model


def pretrained(approach: str) -> Any:
    """A model with ImageNet's weights, 64 px, whose biases are not 0; no test changes it."""
    if approach not in _BUILT:
        model = models.build(approach, SMOKE)
        rng = np.random.default_rng(0)
        for name in ("head", "logit"):
            kernel, bias = model.get_layer(name).get_weights()
            model.get_layer(name).set_weights([kernel, bias + rng.uniform(-0.5, 0.5, bias.shape)])
        _BUILT[approach] = model
    return _BUILT[approach]


def session_of(proto: onnx.ModelProto) -> Any:
    onnxruntime = _onnxruntime.load()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(proto: onnx.ModelProto, images: npt.NDArray[np.uint8]) -> Outputs:
    session = session_of(proto)
    return dict(
        zip([output.name for output in session.get_outputs()], session.run(None, {"image": images}), strict=True)
    )


def run_keras(model: Any, images: npt.NDArray[np.uint8]) -> Outputs:
    outputs = explainer.build(model)(images[..., None], training=False)
    return dict(zip(explainer.OUTPUTS, map(keras.ops.convert_to_numpy, outputs), strict=True))


def assert_alike(model: Any, *, n: int = 8, atol: float = 1e-4) -> onnx.ModelProto:
    """Both give the same outputs, and such that a wrong one would be seen."""
    proto = onnx_graph.build(model)
    onnx.checker.check_model(proto, full_check=True)
    images = pixels(model.input.shape[1], n)
    theirs, ours = run_keras(model, images), run(proto, images)
    assert list(ours) == list(explainer.OUTPUTS)
    for name, expected in theirs.items():
        assert ours[name].dtype == np.float32
        assert ours[name].shape == expected.shape
        assert np.allclose(ours[name], expected, rtol=1e-3, atol=atol), (name, np.abs(ours[name] - expected).max())
    assert np.abs(ours["score"] - theirs["score"]).max() <= atol / 10
    assert np.abs(theirs["bias"]).min() > 1e-3
    assert theirs["logit"].std() > 1e-2
    assert (np.abs(theirs["evidence"]).max(axis=(1, 2)) > 1e-3).all()
    assert np.allclose(ours["evidence"].sum(axis=(1, 2)) + ours["bias"], ours["logit"], rtol=1e-4, atol=1e-4)
    return proto


def sizes(proto: onnx.ModelProto) -> tuple[int, int]:
    """Nodes and bytes."""
    return len(proto.graph.node), len(proto.SerializeToString())


# --- The approaches ---------------------------------------------------------------------------------------------------


def test_the_small_cnn_scores_alike_on_64_images() -> None:
    assert_alike(livened(models.build("cnn", SMOKE)), n=64)


def test_the_tutorials_cnn_scores_alike_at_full_size() -> None:
    model = livened(models.build("cnn", Spec.preset_named("tutorial")))
    proto = assert_alike(model)
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Conv") == 4
    assert "BatchNormalization" not in kinds  # all three stand behind a convolution


@pytest.mark.parametrize("approach", ["tl", "ft"])
def test_a_pretrained_backbone_scores_alike_on_64_images(approach: str) -> None:
    proto = assert_alike(pretrained(approach), n=64)
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Conv") == 49
    assert "BatchNormalization" not in kinds


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in backbones.BACKBONES]
)
def test_every_backbone_can_be_written(name: str) -> None:
    """At 96 px, so that the map has 3 x 3 cells; random weights carry roundings further than trained ones."""
    spec = RANDOM.with_overrides([f"backbone.name={name}", "image.size_px=96"])
    assert_alike(livened(models.build("tl", spec)), atol=1e-3)


def test_the_graph_says_what_goes_in_and_comes_out() -> None:
    model = pretrained("tl")
    proto = onnx_graph.build(model)
    session = session_of(proto)
    assert [(one.name, one.type, one.shape) for one in session.get_inputs()] == [
        ("image", "tensor(uint8)", ["batch", 64, 64])
    ]
    assert [(one.name, one.type, one.shape) for one in session.get_outputs()] == [
        ("score", "tensor(float)", ["batch"]),
        ("logit", "tensor(float)", ["batch"]),
        ("bias", "tensor(float)", ["batch"]),
        ("evidence", "tensor(float)", ["batch", 2, 2]),
        ("features", "tensor(float)", ["batch", 1280]),
    ]
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", onnx_graph.OPSET)]
    assert proto.ir_version == 8  # onnx's newest is read by its newest runtimes only
    metadata = session.get_modelmeta().custom_metadata_map
    grid = evidence.Grid(float(metadata["first_px"]), float(metadata["step_px"]))
    assert grid == explainer.grid(model)


def test_each_image_is_scored_by_itself_whatever_the_batch() -> None:
    proto, images = onnx_graph.build(pretrained("tl")), pixels(64, 6)
    together = run(proto, images)
    for at in range(6):
        alone = run(proto, images[at : at + 1])
        for name, values in together.items():
            assert np.allclose(alone[name][0], values[at], rtol=1e-4, atol=1e-5), name


def test_the_same_model_gives_the_same_bytes_and_is_not_changed() -> None:
    model = livened(models.build("cnn", SMOKE))
    before = [np.array(array) for array in model.get_weights()]
    first, second = (onnx_graph.build(model).SerializeToString() for _ in range(2))
    assert first == second
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_a_model_trained_in_bfloat16_is_written_in_float32() -> None:
    model = livened(models.build("cnn", SMOKE.with_overrides(["train.precision=bfloat16"])))
    twin = models.build("cnn", SMOKE)
    twin.set_weights(model.get_weights())
    images = pixels(64, 6)
    assert np.allclose(run(onnx_graph.build(model), images)["logit"], run_keras(twin, images)["logit"], atol=1e-4)


# --- Shorter weights --------------------------------------------------------------------------------------------------


def test_float16_halves_the_file_and_hardly_moves_the_scores() -> None:
    model, images = pretrained("ft"), pixels(64, 16)
    whole, half = onnx_graph.build(model), onnx_graph.build(model, weights="float16")
    onnx.checker.check_model(half, full_check=True)
    assert sizes(half)[1] < 0.52 * sizes(whole)[1]
    one, other = run(whole, images), run(half, images)
    assert not np.array_equal(one["score"], other["score"])
    for name in ("score", "logit", "features"):  # bias and map jump, against each other, where a hidden unit goes out
        assert np.abs(other[name] - one[name]).max() < 0.01 * (1 + np.abs(one[name]).max()), name
    assert np.allclose(other["evidence"].sum(axis=(1, 2)) + other["bias"], other["logit"], atol=1e-4)


def test_kernels_that_training_rounded_lose_nothing_in_float16() -> None:
    model = livened(models.build("best", SMOKE))
    training.halve(model)
    whole, half = onnx_graph.build(model), onnx_graph.build(model, weights="float16")
    assert half.ByteSize() < 0.65 * whole.ByteSize()
    images = pixels(64, 6)
    first, second = (session_of(proto).run(["score", "evidence"], {"image": images}) for proto in (whole, half))
    assert np.abs(first[0] - second[0]).max() < 1e-5
    assert np.abs(first[1] - second[1]).max() < 1e-4
    stored = {constant.name: constant.data_type for constant in half.graph.initializer}
    assert stored["head/kernel/float16"] == onnx.TensorProto.FLOAT16
    frozen = next(layer for layer in model.layers if isinstance(layer, layers.Conv2D))
    assert stored[f"{frozen.name}/kernel"] == onnx.TensorProto.FLOAT  # rounding it would move every score


def test_a_kernel_that_float16_cannot_hold_stays_whole() -> None:
    model = livened(models.build("cnn", SMOKE))
    head, logit = model.get_layer("head"), model.get_layer("logit")
    head.set_weights([head.get_weights()[0] * 1e6, head.get_weights()[1] * 1e6])
    logit.set_weights([logit.get_weights()[0] / 1e6, logit.get_weights()[1]])
    proto, images = onnx_graph.build(model, weights="float16"), pixels(64, 6)
    stored = {constant.name: constant.data_type for constant in proto.graph.initializer}
    assert stored["head/kernel"] == onnx.TensorProto.FLOAT  # too large
    assert stored["logit/kernel"] == onnx.TensorProto.FLOAT  # too small
    assert stored["block1_conv1/kernel/float16"] == onnx.TensorProto.FLOAT16
    assert np.allclose(run(proto, images)["logit"], run_keras(model, images)["logit"], atol=0.02)


def test_another_precision_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^Weights cannot be stored as 'int4'; choose one of float32, float16\.$"):
        onnx_graph.build(models.build("cnn", SMOKE), weights=cast(Any, "int4"))


def test_8_bit_convolutions_keep_the_sum_exact_and_the_order_of_scores(caplog: pytest.LogCaptureFixture) -> None:
    model, images = pretrained("tl"), pixels(64, 24)
    proto = onnx_graph.build(model)
    before = proto.SerializeToString()
    with caplog.at_level(logging.WARNING):
        small = onnx_graph.quantized(proto, images[::2])
    assert caplog.messages == []
    assert proto.SerializeToString() == before
    assert sizes(small)[1] < 0.4 * sizes(proto)[1]
    assert {prop.key: prop.value for prop in small.metadata_props} == {"first_px": "31.0", "step_px": "32.0"}
    one, other = run(proto, images), run(small, images)
    assert {name: values.shape for name, values in one.items()} == {
        name: values.shape for name, values in other.items()
    }
    assert np.corrcoef(one["logit"], other["logit"])[0, 1] > 0.9
    assert not np.allclose(one["logit"], other["logit"], atol=1e-4)
    assert np.allclose(other["evidence"].sum(axis=(1, 2)) + other["bias"], other["logit"], atol=1e-4)


def test_8_bit_convolutions_need_whole_weights_and_typical_images() -> None:
    model = models.build("cnn", SMOKE)
    with pytest.raises(
        UsageError,
        match=r"^Weights stored as float16 cannot be made 8-bit integers; build the graph with float32 first\.$",
    ):
        onnx_graph.quantized(onnx_graph.build(model, weights="float16"), pixels(64, 4))
    with pytest.raises(
        UsageError,
        match=r"^There is no image to take the range of activations from; pass 50 or more typical ones\.$",
    ):
        onnx_graph.quantized(onnx_graph.build(model), np.empty((0, 64, 64), dtype=np.uint8))


# --- Layers one by one ------------------------------------------------------------------------------------------------


def small(stack: Any, *, side: int = 33, flat: bool = False) -> Any:
    """A network of three channels, some layers and the head that `models` gives."""
    image = keras.Input((side, side, 1), name="image")
    x = layers.Rescaling([1 / 255, 1 / 128, 1 / 64], [0.1, -0.2, 0.3])(layers.Concatenate()([image] * 3))
    x = stack(x)
    x = layers.Flatten(name="flatten")(x) if flat else layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(6, activation="relu", name="head")(x)
    logit = layers.Dense(1, name="logit")(x)
    return keras.Model(image, layers.Activation("sigmoid", name="score")(logit), name="small")


def squeeze_and_excite(x: Any) -> Any:
    x = layers.Conv2D(8, 3)(x)
    gate = layers.Reshape((1, 1, 8))(layers.GlobalAveragePooling2D()(x))
    gate = layers.Conv2D(2, 1, activation="silu")(gate)
    return layers.Multiply()([x, layers.Conv2D(8, 1, activation="sigmoid")(gate)])


def two_readers(x: Any) -> Any:
    """A convolution whose output is read beside its normalization too, which therefore cannot be folded."""
    x = layers.Conv2D(4, 3, use_bias=False)(x)
    return layers.Add()([x, layers.BatchNormalization()(x)])


def normed_after_activation(x: Any) -> Any:
    return layers.BatchNormalization()(layers.Conv2D(4, 3, activation="relu")(x))


STACKS = {
    "conv same, stride 2": lambda x: layers.Conv2D(4, 3, 2, "same")(x),
    "conv of even size": lambda x: layers.Conv2D(4, (4, 2), 1, "same")(x),
    "conv of unequal strides": lambda x: layers.Conv2D(4, (3, 5), (2, 1), "same")(x),
    "conv dilated": lambda x: layers.Conv2D(4, 3, dilation_rate=2, padding="same")(x),
    "conv in groups": lambda x: layers.Conv2D(6, 3, groups=3, use_bias=False)(x),
    "depthwise": lambda x: layers.DepthwiseConv2D(5, 2, "same", depth_multiplier=2)(x),
    "depthwise folded": lambda x: layers.BatchNormalization()(layers.DepthwiseConv2D(3, depth_multiplier=2)(x)),
    "folded with bias": lambda x: layers.BatchNormalization(epsilon=0.1)(layers.Conv2D(4, 3)(x)),
    "norm without scale": lambda x: layers.BatchNormalization(scale=False)(layers.Conv2D(4, 3)(x)),
    "norm without centre": lambda x: layers.BatchNormalization(center=False)(layers.Conv2D(4, 3)(x)),
    "norm alone": lambda x: layers.BatchNormalization()(layers.MaxPooling2D()(x)),
    "norm after activation": normed_after_activation,
    "norm beside": two_readers,
    "max pooling same": lambda x: layers.MaxPooling2D(3, 2, "same")(layers.Conv2D(4, 3)(x)),
    "average pooling same": lambda x: layers.AveragePooling2D(3, 2, "same")(x),
    "zero padding": lambda x: layers.Conv2D(4, 3, 2)(layers.ZeroPadding2D(((0, 1), (2, 3)))(x)),
    "relu": lambda x: layers.ReLU()(layers.Conv2D(4, 3)(x)),
    "relu of at most 1": lambda x: layers.ReLU(1.0)(layers.Conv2D(4, 3)(x)),
    "silu": lambda x: layers.Activation("swish")(layers.Conv2D(4, 3)(x)),
    "squeeze and excite": squeeze_and_excite,
    "joined channels": lambda x: layers.Concatenate(axis=3)([x, layers.Conv2D(4, 1)(x)]),
}


@pytest.mark.parametrize("flat", [False, True], ids=["pooled", "flat"])
@pytest.mark.parametrize("name", STACKS)
def test_a_layer_gives_what_it_gives_in_keras(name: str, flat: bool) -> None:
    keras.utils.set_random_seed(1)
    model, images = livened(small(STACKS[name], flat=flat)), pixels(33, 6)
    head = model.get_layer("head")
    kernel = head.get_weights()[0]
    seen = keras.ops.convert_to_numpy(keras.Model(model.input, head.input)(images[..., None], training=False))
    head.set_weights([kernel, -np.median(seen @ kernel, axis=0)])  # each unit is on for half of the images
    ours, theirs = run(onnx_graph.build(model), images), run_keras(model, images)
    for output, expected in theirs.items():
        spread = expected.std(axis=0).max()  # between images; a map divided by its 961 cells is small
        assert spread > 1e-5, output
        assert np.abs(ours[output] - expected).max() < 1e-2 * spread, output


KNOWN = (
    "known are convolutions and Activation, Add, AveragePooling2D, BatchNormalization, Concatenate, Dense, Dropout, "
    "Flatten, GlobalAveragePooling2D, MaxPooling2D, Multiply, ReLU, Rescaling, Reshape, ZeroPadding2D: build the "
    "network of these, or add a function for it in onnx_graph.py."
)
REFUSED = {
    "kind": (lambda x: layers.LeakyReLU(name="odd")(x), "LeakyReLU", "its kind is not known"),
    "activation": (
        lambda x: layers.Activation("gelu", name="odd")(x),
        "Activation",
        "its activation gelu is not known",
    ),
    "conv activation": (
        lambda x: layers.Conv2D(2, 3, activation="elu", name="odd")(x),
        "Conv2D",
        "its activation elu is not known",
    ),
    "slope": (
        lambda x: layers.ReLU(negative_slope=0.1, name="odd")(x),
        "ReLU",
        "it has a slope below 0 or a threshold",
    ),
    "threshold": (lambda x: layers.ReLU(threshold=0.5, name="odd")(x), "ReLU", "it has a slope below 0 or a threshold"),
    "norm of rows": (
        lambda x: layers.BatchNormalization(axis=1, name="odd")(x),
        "BatchNormalization",
        "it does not work on channels",
    ),
    "joined rows": (
        lambda x: layers.Concatenate(axis=1, name="odd")([x, x]),
        "Concatenate",
        "it does not join channels",
    ),
    "three summands": (
        lambda x: layers.Add(name="odd")([x, x, x]),
        "Add",
        "it has 3 inputs where 2 are known",
    ),
    "reshape": (
        lambda x: layers.Reshape((11, 99, 3), name="odd")(x),
        "Reshape",
        "its shape (11, 99, 3) is not that of one pixel",
    ),
    "pooling": (
        lambda x: layers.GlobalAveragePooling2D(keepdims=True, name="odd")(x),
        "GlobalAveragePooling2D",
        "it keeps the pooled axes",
    ),
    "dense": (
        lambda x: layers.Dense(3, name="odd")(x),
        "Dense",
        "its input is not a vector, or it has no bias",
    ),
    "channels first": (
        lambda x: layers.Conv2D(3, 3, data_format="channels_first", name="odd")(x),
        "Conv2D",
        "its channels are not last",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_that_would_be_guessed_is_refused(case: str) -> None:
    stack, kind, why = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        onnx_graph.build(small(stack))
    assert str(caught.value) == f"The layer odd ({kind}) cannot be written to ONNX ({why}); {KNOWN}"


@pytest.mark.parametrize("kind", ["MaxPooling2D", "ZeroPadding2D"])
def test_channels_that_are_not_last_are_refused_everywhere(kind: str) -> None:
    with pytest.raises(UsageError) as caught:
        onnx_graph.build(small(lambda x: getattr(layers, kind)(data_format="channels_first", name="odd")(x), flat=True))
    assert str(caught.value).startswith(
        f"The layer odd ({kind}) cannot be written to ONNX (its channels are not last);"
    )
