"""Random changes of training images: where the child lay, how the picture was taken, what the scanner made of it.

Owns what a change is, how it is drawn and how it is applied to a batch inside a network. A change is a row of plain
numbers, drawn from a seed by NumPy, so that any epoch can be drawn again, on every machine; what is random about it is
decided by who draws it. Knows nothing of data sets, approaches or schedules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pneumoscope._backend import keras
from pneumoscope.specs import AugmentSpec

ops = keras.ops

COLUMNS: tuple[str, ...] = (
    "zoom", "right", "down", "angle", "stretch", "gamma", "contrast", "brightness", "blur", "noise", "noise_row",
    "noise_column",
)  # fmt: skip
"""What the numbers of one change mean, in order; see `draw`."""

IDENTITY: tuple[float, ...] = (1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0)
"""The change that changes nothing."""

_ROOM = 64
"""How far the pattern of noise can be shifted, pixels."""


def draw(spec: AugmentSpec, n: int, *, seed: Sequence[int], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Draw random changes for `Augment`.

    Parameters
    ----------
    spec : AugmentSpec
        How far they may go.
    n : int
        How many.
    seed : sequence of int
        The same numbers give the same changes, on every machine.
    dtype : dtype
        Of the result.

    Returns
    -------
    ndarray, shape (n, 12)
        Columns as `COLUMNS` names them. ``zoom`` (1 keeps the scale, 1.1 shows things 10 % larger), ``right`` and
        ``down`` (shares of the side), ``angle`` (radians, counter-clockwise) and ``brightness`` (grey values of 255)
        are uniform in their ranges; ``stretch`` (width over height), ``gamma`` (exponent) and ``contrast`` (factor
        about the image's mean) are uniform in their logarithms, so that half of them are below 1. ``blur`` (standard
        deviation, share of the side) and ``noise`` (standard deviation, grey values) are 0 for half of the images and
        uniform up to their limit for the others. The last two say which part of a fixed pattern the noise is, in
        [0, 1).
    """
    generator = np.random.default_rng(list(seed))
    placed, taken = generator.uniform(-1, 1, (n, 3)), generator.uniform(-1, 1, (n, 9))
    turn, stretch, gamma, contrast, brightness, blur, noise, row, column = taken.T
    zoom, right, down = placed.T * np.array([[spec.zoom], [spec.translation], [spec.translation]])
    drawn = [
        1 + zoom,
        right,
        down,
        turn * math.radians(spec.rotation),
        (1 + spec.stretch) ** stretch,
        (1 + spec.gamma) ** gamma,
        (1 + spec.contrast) ** contrast,
        brightness * spec.brightness * 255,
        np.maximum(blur, 0) * spec.blur,
        np.maximum(noise, 0) * spec.noise * 255,
        (row + 1) / 2 % 1,
        (column + 1) / 2 % 1,
    ]
    return np.stack(drawn, axis=1).astype(dtype)


@keras.saving.register_keras_serializable("pneumoscope")
class Augment(keras.layers.Layer):  # type: ignore[misc]  # Keras ships no types
    """Apply one change to each image.

    Called with ``[image, change]``: images ``(B, H, W, 1)`` of 0 to 255 and ``(B, 12)`` float32 from `draw`. Zoom,
    shift, rotation and stretch are one bilinear resampling, the outside mirrored; then come gamma, contrast,
    brightness, blur and noise, in the order in which a picture comes about. Kinds that `spec` does not ask for cost
    nothing, and leave the values as they are.

    Parameters
    ----------
    spec : AugmentSpec
        Which kinds of change there are.
    **options
        As for any Keras layer, such as ``name``.
    """

    def __init__(self, spec: AugmentSpec, **options: Any) -> None:
        super().__init__(**options)
        self.spec = spec

    def call(self, inputs: Sequence[Any]) -> Any:
        """Return float32 images of the same shape, 0 to 255."""
        image, change = inputs
        by_name = {name: change[:, index] for index, name in enumerate(COLUMNS)}
        image, spec = ops.cast(image, "float32"), self.spec
        if spec.zoom or spec.translation or spec.rotation or spec.stretch:
            image = _placed(image, by_name)
        if spec.gamma:
            image = 255 * ops.power(ops.clip(image / 255, 1e-6, 1), _each(by_name["gamma"]))
        if spec.contrast:
            mean = ops.mean(image, axis=(1, 2, 3), keepdims=True)
            image = mean + (image - mean) * _each(by_name["contrast"])
        if spec.brightness:
            image = image + _each(by_name["brightness"])
        if spec.blur:
            image = _blurred(image, by_name["blur"], reach=math.ceil(2 * spec.blur * image.shape[1]))
        if spec.noise:
            image = image + _each(by_name["noise"]) * _pattern(image, by_name["noise_row"], by_name["noise_column"])
        return ops.clip(image, 0, 255) if spec.of_values else image


def _each(column: Any) -> Any:
    """Shape one number for each image so that it meets all its pixels."""
    return ops.reshape(column, (-1, 1, 1, 1))


def _placed(image: Any, change: dict[str, Any]) -> Any:
    """Zoom about the centre, stretch, turn and shift in one resampling: where each pixel of the result comes from."""
    height, width = image.shape[1:3]
    across = 1 / (change["zoom"] * ops.sqrt(change["stretch"]))
    along = ops.sqrt(change["stretch"]) / change["zoom"]
    cosine, sine = ops.cos(change["angle"]), ops.sin(change["angle"])
    a, b, c, d = cosine * across, -sine * across, sine * along, cosine * along
    x, y = (width - 1) / 2, (height - 1) / 2
    right, down = x + change["right"] * width, y + change["down"] * height
    x0, y0 = x - a * right - b * down, y - c * right - d * down
    zero = ops.zeros_like(a)
    matrix = ops.stack([a, b, x0, c, d, y0, zero, zero], axis=1)
    return ops.image.affine_transform(image, matrix, interpolation="bilinear", fill_mode="reflect")


def _blurred(image: Any, sigma: Any, *, reach: int) -> Any:
    """Blur each image by a Gaussian of its own, standard deviation `sigma` in shares of the side, cut at `reach`."""
    pixels = ops.maximum(sigma * image.shape[1], 1e-3)
    taps = [ops.exp(-0.5 * ops.square(offset / pixels)) for offset in range(reach + 1)]
    total = taps[0] + 2 * sum(taps[1:])
    weights = [_each(tap / total) for tap in taps]
    for axis in (1, 2):
        side = image.shape[axis]
        room = [(0, 0)] * 4
        room[axis] = (reach, reach)
        padded = ops.pad(image, room, mode="reflect")

        def shifted(offset: int, padded: Any = padded, axis: int = axis, side: int = side) -> Any:
            part: list[slice] = [slice(None)] * 4
            part[axis] = slice(reach + offset, reach + offset + side)
            return padded[tuple(part)]

        image = weights[0] * image
        for offset in range(1, reach + 1):
            image = image + weights[offset] * (shifted(offset) + shifted(-offset))
    return image


def _pattern(image: Any, row: Any, column: Any) -> Any:
    """Return noise of mean 0 and deviation 1 for each image: a part of one fixed pattern."""
    height, width = image.shape[1:3]
    fixed = np.random.default_rng(0).standard_normal((height + _ROOM, width + _ROOM)).astype(np.float32)
    top, left = (ops.cast(place * _ROOM, "int32") for place in (row, column))
    rows = top[:, None] + np.arange(height, dtype=np.int32)
    columns = left[:, None] + np.arange(width, dtype=np.int32)
    places = rows[:, :, None] * np.int32(width + _ROOM) + columns[:, None, :]
    return ops.take(ops.convert_to_tensor(fixed.ravel()), places)[..., None]


def augmented(model: Any, spec: AugmentSpec) -> Any:
    """Put `Augment` in front of a model, sharing its weights.

    Parameters
    ----------
    model : keras.Model
        Takes ``image``.
    spec : AugmentSpec
        Which kinds of change there are.

    Returns
    -------
    keras.Model
        Takes ``[image (B, H, W, 1), change (B, 12)]``.
    """
    image = keras.Input(model.input.shape[1:], name="image")
    change = keras.Input((len(COLUMNS),), name="change")
    return keras.Model([image, change], model(Augment(spec, name="augment")([image, change])), name=model.name)
