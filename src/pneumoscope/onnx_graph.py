"""A Keras network written as an ONNX graph, with its evidence map, from any backend's run.

Owns one function for each kind of layer that `models` and `backbones` use; a layer that it does not know is refused,
not guessed. Keras's own exporters each need one backend. Knows nothing of files, bundles or what scores mean.

ONNX has channels before rows and columns. The image has one channel, so nothing is transposed at the entrance; where
Keras flattens, the graph goes back to Keras's order once, so that the weights behind stay as they are. What stands in
inference for BatchNormalization behind a convolution is multiplied into its kernel, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from pneumoscope import _onnxruntime, explainer, models
from pneumoscope._backend import keras
from pneumoscope.errors import UsageError

OPSET = 17
"""Version of the ONNX operators; every onnxruntime since 1.12 runs it."""

Precision = Literal["float32", "float16"]
Array = npt.NDArray[Any]

layers = keras.layers


def build(model: models.Model, *, weights: Precision = "float32") -> onnx.ModelProto:
    """Write a model and its evidence map as one ONNX graph.

    Parameters
    ----------
    model : keras.Model
        From `models.build` or `inference.load_model`, on any backend.
    weights : {"float32", "float16"}
        How kernels are stored. float16 halves the file; they are widened when it is loaded, and all arithmetic is
        float32 either way. Rounding them moves scores: on 300 real images, those of ImageNet's `efficientnet_lite0`
        with a trained head by 0.0004 on average and 0.014 at most, which changed one call. Where a training has rounded
        its kernels itself (``train.half_kernels``), those are written so and the others whole: nothing moves.

    Returns
    -------
    onnx.ModelProto
        Input ``image``, uint8 ``(batch, H, W)``; outputs as `explainer.build` describes them, float32: ``score``,
        ``logit`` and ``bias`` ``(batch,)``, ``evidence`` ``(batch, h, w)``, ``features`` ``(batch, c)``. Its metadata
        hold the `evidence.Grid`: ``first_px`` and ``step_px``. The same model gives the same bytes.

    Raises
    ------
    UsageError
        For a model that `models.build` did not make, a layer that is not known here, or another precision.
    """
    if weights not in get_args(Precision):
        raise UsageError(f"Weights cannot be stored as {weights!r}; choose one of {', '.join(get_args(Precision))}.")
    network = explainer.build(model)
    half = weights == "float16"
    graph = _Graph(half=half, only_exact=half and any(_is_half(layer) for layer in network.layers))
    names = {id(network.input): _entrance(graph)}
    norms = _norms_behind_convolutions(network)
    folded = {id(norm) for norm in norms.values()}
    for layer in network.layers:
        if isinstance(layer, layers.InputLayer):
            continue
        if getattr(layer, "data_format", "channels_last") != "channels_last":
            raise _unknown(layer, "its channels are not last")
        sources = [names[id(tensor)] for tensor in keras.tree.flatten(layer.input)]
        if id(layer) in folded:  # its convolution has done it
            names[id(layer.output)] = sources[0]
        elif isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D)):
            names[id(layer.output)] = _convolution(graph, layer, sources[0], norms.get(id(layer)))
        elif isinstance(layer, explainer.Explanation):
            _explanation(graph, layer, sources)
        else:
            writer = _WRITERS.get(type(layer).__name__)
            if writer is None:
                raise _unknown(layer, "its kind is not known")
            names[id(layer.output)] = writer(graph, layer, sources)
    return _model(graph, model, [tensor.shape[1:] for tensor in network.outputs])


def quantized(proto: onnx.ModelProto, images: npt.NDArray[np.uint8]) -> onnx.ModelProto:
    """Write a graph's convolutions in 8-bit integers, for processors that are quicker with them.

    The head and the evidence map stay float32 and read the same features, so that the map still sums to the logit. On
    300 real images, ImageNet's `efficientnet_lite0` with a trained head had a third of the size and scores up to 0.4
    apart. On a processor without instructions for it (VNNI) it is slower than float32, five times on one. Measure it
    before you use it, and choose thresholds anew.

    Parameters
    ----------
    proto : onnx.ModelProto
        From `build`, with float32 weights; not changed.
    images : ndarray of uint8, shape (n, H, W)
        Typical ones, not from the test split; the range of each activation is taken from them. 50 to 200 are usual.

    Returns
    -------
    onnx.ModelProto
        With the same input, outputs and metadata.

    Raises
    ------
    UsageError
        Where `proto` has float16 weights, or there is no image.
    """
    quantization = _onnxruntime.load("onnxruntime.quantization")  # here because few need it: it loads in a second
    if any(constant.data_type == TensorProto.FLOAT16 for constant in proto.graph.initializer):
        raise UsageError("Weights stored as float16 cannot be made 8-bit integers; build the graph with float32 first.")
    if not len(images):
        raise UsageError("There is no image to take the range of activations from; pass 50 or more typical ones.")
    prepared = onnx.ModelProto()
    prepared.CopyFrom(proto)  # the quantizer moves weights out of what it is given
    # Its advice to fold and infer shapes first is followed already; this keeps it from logging that advice.
    prepared.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    reader = _Reader(images)
    with TemporaryDirectory() as folder:
        target = Path(folder) / "quantized.onnx"
        quantization.quantize_static(
            prepared,
            target,
            reader,
            op_types_to_quantize=["Conv", "Clip", "Relu"],  # activations too, or ranges cover what they cut off
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            # Unsigned: where x86 has no VNNI, products of signed weights are added in 16 bits, which overflow. Biases
            # stay float32, because only signed weights are scaled so that 32 bits hold them.
            weight_type=quantization.QuantType.QUInt8,
            extra_options={"QuantizeBias": False},
        )
        result = onnx.load(target)
    del result.metadata_props[:]
    result.metadata_props.extend(proto.metadata_props)
    return result


class _Reader:
    """Hands images to onnxruntime's calibration one by one, so that memory does not grow with their number."""

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, Array] | None:
        image = next(self._images, None)
        return None if image is None else {"image": image[None]}


class _Graph:
    """Nodes and constants in the making; every tensor is named for the layer it comes from."""

    def __init__(self, *, half: bool, only_exact: bool) -> None:
        self.half, self.only_exact = half, only_exact
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def add(self, kind: str, sources: list[str], name: str, **attributes: Any) -> str:
        """Add a node and return the name of its one output."""
        self.nodes.append(helper.make_node(kind, sources, [name], name=name, **attributes))
        return name

    def constant(self, name: str, values: Any, dtype: npt.DTypeLike = np.float32) -> str:
        """Add a small constant (a bias, a shape), never shortened."""
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(values, dtype=dtype), name)
        return name

    def kernel(self, name: str, values: Array, *, gain: Array | None = None) -> str:
        """Add a kernel in the chosen precision, times `gain`; whole where float16 cannot hold its largest values."""
        whole = values if gain is None else values * gain
        short, exact = _shortened(values)
        if self.half and exact:  # the gain apart, so that nothing is rounded
            self.constant(f"{name}/float16", short, np.float16)
            if gain is None:
                return self.add("Cast", [f"{name}/float16"], name, to=TensorProto.FLOAT)
            cast = self.add("Cast", [f"{name}/float16"], f"{name}/float32", to=TensorProto.FLOAT)
            return self.add("Mul", [cast, self.constant(f"{name}/gain", gain)], name)
        short, _ = _shortened(whole)
        error = np.abs(short - whole).max(initial=0)
        if not self.half or self.only_exact or error > 2**-11 * np.abs(whole).max(initial=0):  # half of its last bit
            return self.constant(name, whole)
        self.constant(f"{name}/float16", short, np.float16)
        return self.add("Cast", [f"{name}/float16"], name, to=TensorProto.FLOAT)


def _shortened(values: Array) -> tuple[Array, bool]:
    """Round to float16, and tell whether nothing was lost; what is too large becomes infinite."""
    with np.errstate(over="ignore", under="ignore"):
        short = values.astype(np.float16)
    return short, bool((short == values).all())


def _is_half(layer: Any) -> bool:
    """Whether float16 holds a layer's kernel as it is."""
    kernel = getattr(layer, "kernel", None)
    return kernel is not None and _shortened(_array(kernel))[1]


def _entrance(graph: _Graph) -> str:
    """Make ``image`` float32 and give it a channel axis."""
    graph.constant("image/channel", [1], np.int64)
    pixels = graph.add("Cast", ["image"], "image/float", to=TensorProto.FLOAT)
    return graph.add("Unsqueeze", [pixels, "image/channel"], "image/grey")


def _model(graph: _Graph, model: models.Model, shapes: list[tuple[int, ...]]) -> onnx.ModelProto:
    height, width = model.input.shape[1:3]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", height, width])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in zip(explainer.OUTPUTS, shapes, strict=True)
    ]
    body = helper.make_graph(graph.nodes, model.name, [image], outputs, list(graph.constants.values()))
    opsets = [helper.make_opsetid("", OPSET)]
    # An ir_version that onnx takes for granted may be newer than what runtimes read.
    ir_version = helper.find_min_ir_version_for(opsets)
    proto = helper.make_model(body, opset_imports=opsets, ir_version=ir_version, producer_name="pneumoscope")
    grid = explainer.grid(model)
    helper.set_model_props(proto, {"first_px": str(grid.first_px), "step_px": str(grid.step_px)})
    return proto


def _unknown(layer: Any, why: str) -> UsageError:
    return UsageError(
        f"The layer {layer.name} ({type(layer).__name__}) cannot be written to ONNX ({why}); known are convolutions "
        f"and {', '.join(sorted(_WRITERS))}: build the network of these, or add a function for it in onnx_graph.py."
    )


def _array(weight: Any) -> npt.NDArray[np.float64]:
    return np.asarray(keras.ops.convert_to_numpy(weight), dtype=np.float64)


# --- Convolutions -----------------------------------------------------------------------------------------------------


def _norms_behind_convolutions(network: models.Model) -> dict[int, Any]:
    """Find, by a convolution's id, the BatchNormalization that alone reads its output."""
    made_by = {id(layer.output): layer for layer in network.layers if not isinstance(layer.output, list)}
    read = [id(tensor) for layer in network.layers for tensor in keras.tree.flatten(layer.input)]
    norms: dict[int, Any] = {}
    for layer in network.layers:
        if isinstance(layer, layers.BatchNormalization):
            source = made_by[id(layer.input)]
            convolves = isinstance(source, (layers.Conv2D, layers.DepthwiseConv2D))
            if convolves and source.activation is keras.activations.linear and read.count(id(layer.input)) == 1:
                norms[id(source)] = layer
    return norms


def _convolution(graph: _Graph, layer: Any, source: str, norm: Any | None) -> str:
    if isinstance(layer, layers.DepthwiseConv2D):  # (h, w, c, m): m filters for each channel by itself
        kernel, groups = _array(layer.kernel).transpose(2, 3, 0, 1), layer.input.shape[-1]
        kernel = kernel.reshape(-1, 1, *kernel.shape[2:])
    else:  # (h, w, in, out)
        kernel, groups = _array(layer.kernel).transpose(3, 2, 0, 1), layer.groups
    bias = _array(layer.bias) if layer.use_bias else np.zeros(len(kernel))
    gain = None
    if norm is not None:
        factor, shift = _gain_and_shift(norm)
        gain, bias = factor[:, None, None, None], bias * factor + shift
    constants = [graph.kernel(f"{layer.name}/kernel", kernel, gain=gain), graph.constant(f"{layer.name}/bias", bias)]
    window = _window(layer, layer.kernel_size, layer.dilation_rate)
    name = graph.add(
        "Conv", [source, *constants], f"{layer.name}/out", group=groups, dilations=list(layer.dilation_rate), **window
    )
    return _activated(graph, layer, name)


def _window(layer: Any, size: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> dict[str, list[int]]:
    """Return what ONNX calls the sides, steps and padding of a sliding window."""
    pads = [
        explainer.padding(side, (length - 1) * gap, stride, layer.padding)
        for side, length, gap, stride in zip(layer.input.shape[1:3], size, dilation, layer.strides, strict=True)
    ]
    (top, bottom), (left, right) = pads
    return {"kernel_shape": list(size), "strides": list(layer.strides), "pads": [top, left, bottom, right]}


def _gain_and_shift(norm: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return by what BatchNormalization multiplies each channel in inference, and what it adds."""
    if norm.axis not in (-1, len(norm.input.shape) - 1):
        raise _unknown(norm, "it does not work on channels")
    gain = 1 / np.sqrt(_array(norm.moving_variance) + norm.epsilon)
    if norm.scale:
        gain = gain * _array(norm.gamma)
    shift = -_array(norm.moving_mean) * gain
    return gain, shift + _array(norm.beta) if norm.center else shift


# --- Every other kind -------------------------------------------------------------------------------------------------


def _activated(graph: _Graph, layer: Any, source: str) -> str:
    """Add a layer's activation behind what it computes."""
    kind, name = layer.activation.__name__, f"{layer.name}/{layer.activation.__name__}"
    if kind == "linear":
        return source
    if kind in ("relu", "sigmoid"):
        return graph.add(kind.capitalize(), [source], name)
    if kind == "silu":
        gate = graph.add("Sigmoid", [source], f"{layer.name}/gate")
        return graph.add("Mul", [source, gate], name)
    raise _unknown(layer, f"its activation {kind} is not known")


def _activation(graph: _Graph, layer: Any, sources: list[str]) -> str:
    return _activated(graph, layer, sources[0])


def _relu(graph: _Graph, layer: Any, sources: list[str]) -> str:
    if layer.negative_slope or layer.threshold:
        raise _unknown(layer, "it has a slope below 0 or a threshold")
    if layer.max_value is None:
        return graph.add("Relu", sources, f"{layer.name}/out")
    limits = [graph.constant(f"{layer.name}/least", 0), graph.constant(f"{layer.name}/most", layer.max_value)]
    return graph.add("Clip", [*sources, *limits], f"{layer.name}/out")


def _rescaling(graph: _Graph, layer: Any, sources: list[str]) -> str:
    scale, offset = (np.reshape(number, (1, -1, 1, 1)) for number in (layer.scale, layer.offset))
    scaled = graph.add("Mul", [*sources, graph.constant(f"{layer.name}/scale", scale)], f"{layer.name}/scaled")
    return graph.add("Add", [scaled, graph.constant(f"{layer.name}/offset", offset)], f"{layer.name}/out")


def _normalization(graph: _Graph, layer: Any, sources: list[str]) -> str:
    gain, shift = _gain_and_shift(layer)  # in one pass; Mul and Add take a tenth longer on whole networks
    numbers = {"gain": gain, "shift": shift, "mean": np.zeros(len(gain)), "variance": np.ones(len(gain))}
    constants = [graph.constant(f"{layer.name}/{name}", values) for name, values in numbers.items()]
    return graph.add("BatchNormalization", [*sources, *constants], f"{layer.name}/out", epsilon=0.0)


def _zero_padding(graph: _Graph, layer: Any, sources: list[str]) -> str:
    (top, bottom), (left, right) = layer.padding
    pads = graph.constant(f"{layer.name}/pads", [0, 0, top, left, 0, 0, bottom, right], np.int64)
    return graph.add("Pad", [*sources, pads], f"{layer.name}/out")


def _max_pooling(graph: _Graph, layer: Any, sources: list[str]) -> str:
    return graph.add("MaxPool", sources, f"{layer.name}/out", **_window(layer, layer.pool_size))


def _average_pooling(graph: _Graph, layer: Any, sources: list[str]) -> str:
    return graph.add("AveragePool", sources, f"{layer.name}/out", **_window(layer, layer.pool_size))


def _global_pooling(graph: _Graph, layer: Any, sources: list[str]) -> str:
    if layer.keepdims:
        raise _unknown(layer, "it keeps the pooled axes")
    return _means(graph, sources[0], f"{layer.name}/out")


def _means(graph: _Graph, maps: str, name: str) -> str:
    """Add each channel's mean over all cells, ``(B, c)``."""
    return graph.add("Flatten", [graph.add("GlobalAveragePool", [maps], f"{name}/means")], name)


def _concatenate(graph: _Graph, layer: Any, sources: list[str]) -> str:
    if layer.axis not in (-1, 3) or len(layer.output.shape) != 4:
        raise _unknown(layer, "it does not join channels")
    return graph.add("Concat", sources, f"{layer.name}/out", axis=1)


def _add(graph: _Graph, layer: Any, sources: list[str]) -> str:
    return _pairwise(graph, "Add", layer, sources)


def _multiply(graph: _Graph, layer: Any, sources: list[str]) -> str:
    return _pairwise(graph, "Mul", layer, sources)


def _pairwise(graph: _Graph, kind: str, layer: Any, sources: list[str]) -> str:
    if len(sources) != 2:
        raise _unknown(layer, f"it has {len(sources)} inputs where 2 are known")
    return graph.add(kind, sources, f"{layer.name}/out")


def _reshape(graph: _Graph, layer: Any, sources: list[str]) -> str:
    """Make a vector an image of one pixel, as squeeze-and-excitation does; other shapes would need Keras's order."""
    channels = layer.target_shape[-1]
    if len(layer.input.shape) != 2 or layer.target_shape != (1, 1, channels):
        raise _unknown(layer, f"its shape {layer.target_shape} is not that of one pixel")
    shape = graph.constant(f"{layer.name}/shape", [-1, layer.output.shape[-1], 1, 1], np.int64)
    return graph.add("Reshape", [*sources, shape], f"{layer.name}/out")


def _flatten(graph: _Graph, layer: Any, sources: list[str]) -> str:
    if len(layer.input.shape) == 4:
        sources = [graph.add("Transpose", sources, f"{layer.name}/channels_last", perm=[0, 2, 3, 1])]
    return graph.add("Flatten", sources, f"{layer.name}/out")


def _dense(graph: _Graph, layer: Any, sources: list[str]) -> str:
    if len(layer.input.shape) != 2 or not layer.use_bias:
        raise _unknown(layer, "its input is not a vector, or it has no bias")
    constants = [
        graph.kernel(f"{layer.name}/kernel", _array(layer.kernel)),
        graph.constant(f"{layer.name}/bias", _array(layer.bias)),
    ]
    return _activated(graph, layer, graph.add("Gemm", [*sources, *constants], f"{layer.name}/out"))


def _nothing(_graph: _Graph, _layer: Any, sources: list[str]) -> str:
    return sources[0]


def _explanation(graph: _Graph, layer: Any, sources: list[str]) -> None:
    """Write `explainer.Explanation`: the graph's outputs."""
    score, logit, units, maps = sources
    height, width, channels = layer.input[3].shape[1:]
    zero, one = graph.constant("explanation/zero", 0), graph.constant("explanation/one", [1], np.int64)
    graph.add("Squeeze", [score, one], "score")
    graph.add("Squeeze", [logit, one], "logit")
    on = graph.add(
        "Cast", [graph.add("Greater", [units, zero], "explanation/positive")], "explanation/on", to=TensorProto.FLOAT
    )
    final, hidden = layer.final, layer.hidden
    row = graph.add("Transpose", [f"{final.name}/kernel"], "explanation/row")  # (u, 1) to (1, u)
    slope = graph.add("Mul", [on, row], "explanation/slope")
    column = graph.constant("explanation/column", _array(hidden.bias)[:, None])
    bias = graph.add("Gemm", [slope, column, f"{final.name}/bias"], "explanation/bias")
    graph.add("Squeeze", [bias, one], "bias")
    per_input = graph.add("Gemm", [slope, f"{hidden.name}/kernel"], "explanation/per_input", transB=1)
    if layer.flat:
        maps_last = graph.add("Transpose", [maps], "explanation/channels_last", perm=[0, 2, 3, 1])
        shape, axis = [-1, height, width, channels], 3
    else:
        cells = graph.constant("explanation/cells", height * width)
        per_input = graph.add("Div", [per_input, cells], "explanation/per_cell")
        maps_last, shape, axis = maps, [-1, channels, 1, 1], 1
    wanted = graph.constant("explanation/shape", shape, np.int64)
    gradient = graph.add("Reshape", [per_input, wanted], "explanation/gradient")
    product = graph.add("Mul", [maps_last, gradient], "explanation/product")
    along = graph.constant("explanation/axis", [axis], np.int64)
    graph.add("ReduceSum", [product, along], "evidence", keepdims=0)
    _means(graph, maps, "features")


_WRITERS: dict[str, Callable[[_Graph, Any, list[str]], str]] = {
    "Activation": _activation,
    "Add": _add,
    "AveragePooling2D": _average_pooling,
    "BatchNormalization": _normalization,
    "Concatenate": _concatenate,
    "Dense": _dense,
    "Dropout": _nothing,
    "Flatten": _flatten,
    "GlobalAveragePooling2D": _global_pooling,
    "MaxPooling2D": _max_pooling,
    "Multiply": _multiply,
    "ReLU": _relu,
    "Rescaling": _rescaling,
    "Reshape": _reshape,
    "ZeroPadding2D": _zero_padding,
}
