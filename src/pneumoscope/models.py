"""The approaches as Keras models, and the cut between what is frozen and what trains.

Every model takes ``image``, ``(B, H, W, 1)`` with grey values 0 to 255, repeats the channel and rescales inside, and
returns ``score``, ``(B, 1)``, the sigmoid of ``logit``. Knows nothing of data, schedules or files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pneumoscope import _backend, backbones
from pneumoscope._backend import keras
from pneumoscope.errors import SpecError
from pneumoscope.specs import Spec

layers, ops = keras.layers, keras.ops

ORDER, TRANSFORMS, VIEWS, VIEW_CHOICE, TEACHERS = range(5)
"""What a random stream is for: ``default_rng([seed, purpose, number])``, so that no two streams are alike."""

Model = Any
"""A ``keras.Model`` (Keras ships no types)."""


def build(approach: str, spec: Spec) -> Model:
    """Build one approach, its trainable layers marked.

    Parameters
    ----------
    approach : {"cnn", "tl", "ft", "best"}
        Which.
    spec : Spec
        Image size, backbone and seeds.

    Returns
    -------
    keras.Model
        Named `approach`; input ``image`` (B, H, W, 1) of 0 to 255, output ``score`` (B, 1) in [0, 1].

    Raises
    ------
    SpecError
        For an unknown approach, or images too small for the network.
    WeightsError
        Where the backbone's weights cannot be had.
    """
    if approach not in _BUILDERS:
        raise SpecError(f"There is no approach {approach!r}; choose one of {', '.join(_BUILDERS)}.")
    _backend.seed(spec.seed)  # initial weights and dropout; the same whatever was built before
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16" if spec.train.precision == "bfloat16" else "float32")
    try:
        return _BUILDERS[approach](spec)
    finally:
        keras.config.set_dtype_policy(before)


def cnn(spec: Spec) -> Model:
    """Build the network from scratch: three blocks of convolutions, then a dense layer.

    Parameters
    ----------
    spec : Spec
        ``image.size_px`` and ``cnn``.

    Returns
    -------
    keras.Model
        At 224 x 224 the tutorial's 2,621,089 parameters.

    Raises
    ------
    SpecError
        Where the image is too small.
    """
    momentum = spec.cnn.momentum
    image, x = _input(spec)
    x = layers.Rescaling(1 / 255, name="scaling")(x)
    if spec.cnn.layers == "tiny":
        x = _block(x, [8], dropout=0.2, momentum=momentum, number=1, strides=2)
        x = _block(x, [16], dropout=0.2, momentum=momentum, number=2, strides=2)
        units = 16
    else:
        x = _block(x, [16], dropout=0.2, momentum=momentum, number=1)
        x = _block(x, [32], dropout=0.2, momentum=momentum, number=2)
        x = _block(x, [64, 64], dropout=0.4, momentum=momentum, number=3)
        units = 64
    x = layers.Flatten(name="flatten")(x)
    return _head(image, x, units=units, dropout=0.5, name="cnn")


def tl(spec: Spec) -> Model:
    """Build transfer learning: a frozen backbone, average pooling and a new head.

    Parameters
    ----------
    spec : Spec
        ``image.size_px`` and ``backbone``.

    Returns
    -------
    keras.Model
        Only the head trains.

    Raises
    ------
    WeightsError
        Where the backbone's weights cannot be had.
    """
    return _on_backbone(spec, trainable=0, name="tl")


def ft(spec: Spec) -> Model:
    """Build fine-tuning: as `tl`, and the backbone's last layers train too.

    Parameters
    ----------
    spec : Spec
        ``image.size_px``, ``backbone`` and ``ft.trainable_layers``.

    Returns
    -------
    keras.Model
        The head and the last layers of the backbone train.

    Raises
    ------
    SpecError
        Where more layers are asked for than the backbone has.
    WeightsError
        Where the backbone's weights cannot be had.
    """
    return _on_backbone(spec, trainable=spec.ft.trainable_layers, name="ft")


def best(spec: Spec) -> Model:
    """Build deep fine-tuning: as `ft`, with layers of its own number.

    Parameters
    ----------
    spec : Spec
        ``image.size_px``, ``backbone`` and ``best.trainable_layers``.

    Returns
    -------
    keras.Model
        The head and most of the backbone train.

    Raises
    ------
    SpecError
        Where more layers are asked for than the backbone has.
    WeightsError
        Where the backbone's weights cannot be had.
    """
    return _on_backbone(spec, trainable=spec.best.trainable_layers, name="best")


_BUILDERS = {"cnn": cnn, "tl": tl, "ft": ft, "best": best}


def _input(spec: Spec) -> tuple[Any, Any]:
    size = spec.image.size_px
    image = keras.Input((size, size, 1), name="image")
    return image, layers.Concatenate(name="rgb")([image, image, image])


def _block(x: Any, filters: Sequence[int], *, dropout: float, momentum: float, number: int, strides: int = 1) -> Any:
    for index, count in enumerate(filters, start=1):
        if min(x.shape[1:3]) < 4:
            raise SpecError("The image is too small for the cnn; choose image.size_px of 32 or more.")
        x = layers.Conv2D(count, 3, strides=strides, name=f"block{number}_conv{index}")(x)
    x = layers.BatchNormalization(momentum=momentum, name=f"block{number}_bn")(x)
    x = layers.ReLU(name=f"block{number}_relu")(x)
    x = layers.MaxPooling2D(name=f"block{number}_pool")(x)
    return layers.Dropout(dropout, name=f"block{number}_dropout")(x)


def _on_backbone(spec: Spec, *, trainable: int, name: str) -> Model:
    image, x = _input(spec)
    features = backbones.extend(x, spec.backbone)
    frozen = backbones.layers_of(keras.Model(image, features), spec.backbone.name)
    if trainable >= len(frozen):
        raise SpecError(
            f"{name}.trainable_layers is {trainable}, {spec.backbone.name} has {len(frozen)} layers; choose fewer."
        )
    for layer in frozen[: len(frozen) - trainable]:
        layer.trainable = False
    pooled = layers.GlobalAveragePooling2D(name="pool")(features)
    return _head(image, pooled, units=128, dropout=0.1, name=name)


def _head(image: Any, x: Any, *, units: int, dropout: float, name: str) -> Model:
    x = layers.Dense(units, activation="relu", name="head")(x)
    x = layers.Dropout(dropout, name="head_dropout")(x)
    logit = layers.Dense(1, name="logit", dtype="float32")(x)
    return keras.Model(image, layers.Activation("sigmoid", name="score", dtype="float32")(logit), name=name)


def cut(model: Model) -> str | None:
    """Name the layer where the frozen prefix ends and the training tail begins.

    Parameters
    ----------
    model : keras.Model
        From `build`.

    Returns
    -------
    str or None
        The last layer that every path passes before the first layer with trainable weights; None where nothing up to
        it has weights at all (there is no frozen part worth keeping).
    """
    first = next(index for index, layer in enumerate(model.layers) if layer.trainable_weights)
    for last in reversed(range(first)):
        if not any(layer.weights for layer in model.layers[: last + 1]):
            return None
        with contextlib.suppress(SpecError):  # a shortcut goes around it: look further up
            split_at(model, model.layers[last].name)
            return str(model.layers[last].name)
    return None


def split_at(model: Model, name: str) -> tuple[Model, Model]:
    """Divide a model in two at a layer; both parts share its weights, so training the tail trains the model.

    Parameters
    ----------
    model : keras.Model
        From `build`.
    name : str
        The layer whose output is handed over; every path through the model must pass it.

    Returns
    -------
    prefix, tail : keras.Model
        ``tail(prefix(image)) == model(image)``.

    Raises
    ------
    SpecError
        Where some path goes around the layer.
    """
    handover = model.get_layer(name).output
    try:
        return keras.Model(model.input, handover, name="prefix"), keras.Model(handover, model.output, name=model.name)
    except ValueError as error:
        raise SpecError(
            f"The network {model.name} cannot be cut at {name}: a shortcut goes around it; "
            "choose a layer that every path passes, such as the end of a block."
        ) from error


def in_batches(
    network: Model, fetch: Callable[[slice], Any], n: int, *, batch_size: int
) -> Iterator[tuple[slice, list[npt.NDArray[Any]]]]:
    """Run a network over n examples without ever holding them all.

    Parameters
    ----------
    network : keras.Model
        With one output or several.
    fetch : callable
        Returns the network's inputs for a slice of positions.
    n : int
        Number of examples.
    batch_size : int
        Examples in a step.

    Yields
    ------
    positions : slice
        Which examples.
    outputs : list of ndarray
        One array per output, first axis the examples.
    """
    _backend.split(network)
    if not network.compiled:  # once: each compilation traces the whole network anew
        network.compile(jit_compile=_backend.compiles())
    for start in range(0, n, batch_size):
        positions = slice(start, min(start + batch_size, n))
        outputs = network.predict_on_batch(fetch(positions))
        yield positions, outputs if isinstance(outputs, list) else [outputs]


def scores(network: Model, fetch: Callable[[slice], Any], n: int, *, batch_size: int) -> npt.NDArray[np.float32]:
    """Score n examples.

    Parameters
    ----------
    network : keras.Model
        With the single output ``score`` (B, 1).
    fetch : callable
        Returns the network's inputs for a slice of positions.
    n : int
        Number of examples.
    batch_size : int
        Examples in a step.

    Returns
    -------
    ndarray of float32, shape (n,)
        In [0, 1].
    """
    result = np.empty(n, dtype=np.float32)
    for positions, (output,) in in_batches(network, fetch, n, batch_size=batch_size):
        result[positions] = output[:, 0]
    return result


@dataclass(frozen=True)
class LayerRow:
    """One line of a model's listing.

    Attributes
    ----------
    number : int
        From 1, in the model's own order.
    name : str
        The layer's name.
    kind : str
        Its Keras class.
    output_shape : str
        Without the batch, for example ``"7 x 7 x 2048"``.
    parameters : int
        All weights it holds.
    trainable : bool
        Whether any of them train.
    """

    number: int
    name: str
    kind: str
    output_shape: str
    parameters: int
    trainable: bool


def listing(model: Model) -> list[LayerRow]:
    """List every layer of a model.

    Parameters
    ----------
    model : keras.Model
        From `build`.

    Returns
    -------
    list of LayerRow
    """
    return [
        LayerRow(
            number=number,
            name=layer.name,
            kind=type(layer).__name__,
            output_shape=" x ".join(str(side) for side in layer.output.shape[1:]),
            parameters=int(layer.count_params()),
            trainable=bool(layer.trainable_weights),
        )
        for number, layer in enumerate(model.layers, start=1)
    ]


def count_parameters(model: Model, *, trainable_only: bool = False) -> int:
    """Count the numbers a model holds.

    Parameters
    ----------
    model : keras.Model
        From `build`.
    trainable_only : bool
        Leave out the frozen ones and running statistics.

    Returns
    -------
    int
    """
    weights = model.trainable_weights if trainable_only else model.weights
    return int(sum(np.prod(weight.shape) for weight in weights))
