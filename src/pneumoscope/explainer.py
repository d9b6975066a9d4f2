"""The explainer of a model: its score and the evidence map behind it, from one forward pass without gradients.

Owns where a model's last feature map is, the map's formula (`Explanation`), where its cells lie in the image, and the
check that shuffles weights. Knows nothing of drawing, files or data sets; what maps mean as arrays is in `evidence`.

The map is HiResCAM (Draelos and Carin 2020, https://arxiv.org/abs/2011.08891): gradient times activation at the last
feature map, summed over channels. Behind that map stand only linear layers and one hidden relu layer, so the gradient
is a product of their weights in which the units that are off are left out: ordinary operations of the forward pass,
the same on every backend and in ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pneumoscope import evidence, models
from pneumoscope._backend import keras
from pneumoscope.errors import UsageError

layers, ops = keras.layers, keras.ops

OUTPUTS: tuple[str, ...] = ("score", "logit", "bias", "evidence", "features")
"""What `build` returns, in order."""


class Explanation(keras.layers.Layer):  # type: ignore[misc]  # Keras ships no types
    """Divide each logit among the cells of the last feature map.

    Called with ``[score (B, 1), logit (B, 1), units (B, u), maps (B, h, w, c)]``, returns a list as `OUTPUTS` names it.

    Parameters
    ----------
    hidden : keras.layers.Dense
        The relu layer that makes ``units``; shared with the model.
    final : keras.layers.Dense
        The linear layer that makes ``logit``; shared with the model.
    flat : bool
        Whether `hidden` sees every cell (after Flatten) or only each channel's mean (after average pooling).
    **options
        As for any Keras layer, such as ``name``.
    """

    def __init__(self, hidden: Any, final: Any, *, flat: bool, **options: Any) -> None:
        super().__init__(dtype="float32", **options)
        self.hidden, self.final, self.flat = hidden, final, flat

    def call(self, inputs: Sequence[Any]) -> list[Any]:
        """Return score, logit and bias ``(B,)``, evidence ``(B, h, w)``, features ``(B, c)``."""
        score, logit, units, maps = inputs
        height, width, channels = maps.shape[1:]
        slope = ops.cast(units > 0, "float32") * self.final.kernel[:, 0]  # of the logit, by hidden unit
        per_input = ops.matmul(slope, ops.transpose(self.hidden.kernel))  # of the logit, by input of `hidden`
        if self.flat:
            gradient = ops.reshape(per_input, (-1, height, width, channels))
        else:
            gradient = ops.reshape(per_input, (-1, 1, 1, channels)) / (height * width)
        bias = ops.matmul(slope, self.hidden.bias[:, None])[:, 0] + self.final.bias
        return [score[:, 0], logit[:, 0], bias, ops.sum(maps * gradient, axis=-1), ops.mean(maps, axis=(1, 2))]


def build(model: models.Model) -> models.Model:
    """Build the network that explains a model; it shares the model's weights, so it follows when they change.

    Parameters
    ----------
    model : keras.Model
        From `models.build` or `inference.load_model`.

    Returns
    -------
    keras.Model
        Takes ``image`` as the model does and returns the list that `OUTPUTS` names, all float32: ``score`` (B,) in
        [0, 1]; ``logit`` (B,); ``bias`` (B,), the part of the logit that belongs to no place; ``evidence`` (B, h, w),
        signed, in units of the logit, above 0 for PNEUMONIA; ``features`` (B, c), each channel's mean over the last
        feature map. ``evidence.sum((1, 2)) + bias == logit`` up to the rounding of float32 (with
        ``train.precision`` bfloat16: of bfloat16).

    Raises
    ------
    UsageError
        Where the model was not built by `models.build`.
    """
    maps, flat = _last_maps(model)
    hidden, final = model.get_layer("head"), model.get_layer("logit")
    explanation = Explanation(hidden, final, flat=flat, name="explanation")
    outputs = explanation([model.output, final.output, hidden.output, maps])
    return keras.Model(model.input, outputs, name=f"{model.name}_explainer")


def _last_maps(model: models.Model) -> tuple[Any, bool]:
    """Return the last feature map (B, h, w, c), and whether the head sees its cells one by one."""
    names = {layer.name for layer in model.layers}
    if not {"head", "logit", "score"} <= names or not names & {"flatten", "pool"}:
        raise UsageError(
            f"The network {model.name} has no head that an evidence map could be taken from; give a model that "
            "pneumoscope built (cnn, tl or ft), whole."
        )
    flat = "flatten" in names
    return model.get_layer("flatten" if flat else "pool").input, flat


def grid(model: models.Model) -> evidence.Grid:
    """Compute where the cells of a model's evidence map lie in its image: the centres of their receptive fields.

    Padding moves them: with "same" padding and stride 2 on even sides, nothing is added before the first pixel, so
    that at 224 px the cells of `efficientnet_lite0` are centred on pixels 31, 63, ... 223, those of ResNetV2 on 0, 32,
    ... 192, and those of the tutorial's cnn, which pads nothing, on 14.5, 22.5, ... 206.5. A map that is stretched over
    the whole image lies up to half a cell off, or more. The arithmetic is that of Araujo, Norris and Sim (2019),
    "Computing Receptive Fields of Convolutional Neural Networks", https://doi.org/10.23915/distill.00021. Trained
    weights may lean to one side of their field: what a spot in the image moves in the features of ImageNet's
    `efficientnet_lite0` lies about 7 px behind the place this says, where stretching is 8 px off the other way.

    Parameters
    ----------
    model : keras.Model
        From `models.build`.

    Returns
    -------
    evidence.Grid

    Raises
    ------
    UsageError
        Where the model was not built by `models.build`.
    """
    target, _ = _last_maps(model)
    places = {id(model.input): (0.0, 1.0)}  # first centre and step, by tensor
    for layer in model.layers:
        if isinstance(layer, layers.InputLayer):
            continue
        widest = max(keras.tree.flatten(layer.input), key=lambda tensor: tensor.shape[1])  # not a gate of 1 x 1
        places[id(layer.output)] = _moved(layer, widest, *places[id(widest)])
        if layer.output is target:
            break
    return evidence.Grid(*places[id(target)])


def _moved(layer: Any, source: Any, first: float, step: float) -> tuple[float, float]:
    """Return the first centre and the step of a layer's output cells from those of its input cells."""
    if isinstance(layer, layers.ZeroPadding2D):
        return first - step * layer.padding[0][0], step
    size = getattr(layer, "kernel_size", None) or getattr(layer, "pool_size", None)
    if size is None:
        return first, step
    stride = layer.strides[0]
    reach = (size[0] - 1) * getattr(layer, "dilation_rate", (1, 1))[0]
    return first + step * (reach / 2 - padding(source.shape[1], reach, stride, layer.padding)[0]), step * stride


def padding(side: int, reach: int, stride: int, kind: str) -> tuple[int, int]:
    """Return how many zeros Keras sets before and behind `side` cells for a window that reaches over `reach` more.

    Parameters
    ----------
    side : int
        Cells along the axis.
    reach : int
        Length of the window less one, gaps of dilation included.
    stride : int
        Cells between two windows.
    kind : {"valid", "same"}
        As the layer was given.

    Returns
    -------
    before, behind : int
        The odd one stands behind.
    """
    if kind == "valid":
        return 0, 0
    total = max((-(-side // stride) - 1) * stride + reach + 1 - side, 0)
    return total // 2, total - total // 2


def randomisation(
    model: models.Model, images: npt.NDArray[np.uint8], *, depth: int, seed: int, batch_size: int = 32
) -> list[tuple[str, npt.NDArray[np.float64]]]:
    """Check that the maps depend on what the model learned: shuffle its weights from the top down and compare.

    The cascading randomisation of Adebayo et al. (2018), "Sanity Checks for Saliency Maps",
    https://arxiv.org/abs/1810.03292; a layer's arrays are each put in random order, which keeps their distribution.
    The maps of a method that shows what the model computes lose their likeness; those of one that traces edges stay.

    Parameters
    ----------
    model : keras.Model
        From `models.build`; not changed.
    images : ndarray of uint8, shape (n, H, W)
        Of the model's size.
    depth : int
        How many layers with weights are shuffled, 1 or more: ``logit``, ``head``, then the backbone's last.
    seed : int
        At least 0; the same seed gives the same order.
    batch_size : int
        Images in a step.

    Returns
    -------
    list of (str, ndarray of float64 of shape (n,))
        The layer shuffled last, and `evidence.similarity` of each image's map with that of the trained model.

    Raises
    ------
    UsageError
        Where the model was not built by `models.build`.
    """
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    network = build(copy)

    def maps() -> npt.NDArray[Any]:
        batches = models.in_batches(network, lambda at: images[at, ..., None], len(images), batch_size=batch_size)
        return np.concatenate([outputs[OUTPUTS.index("evidence")] for _, outputs in batches])

    rng, before, result = np.random.default_rng(seed), maps(), []
    for layer in [layer for layer in reversed(copy.layers) if layer.weights][:depth]:
        layer.set_weights([rng.permutation(array.ravel()).reshape(array.shape) for array in layer.get_weights()])
        result.append((str(layer.name), evidence.similarity(before, maps())))
    return result
