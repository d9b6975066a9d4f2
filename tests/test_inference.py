"""Trained models come back bit for bit from their Spec and arrays alone, and nothing in a model file is ever run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pneumoscope import images, inference, models
from pneumoscope._backend import keras
from pneumoscope.catalog import Catalog
from pneumoscope.errors import RunError, StoreError, WeightsError
from pneumoscope.specs import Spec
from pneumoscope.store import ImageStore

ops = keras.ops

SIZE = 32
SPEC = Spec.preset_named("smoke").with_overrides([f"image.size_px={SIZE}", "backbone.weights=none"])
WEIGHTS = "model.weights.h5"
Pixels = npt.NDArray[np.uint8]


def pictures(n: int) -> Pixels:
    """Noise of rising brightness, so that no two images score the same."""
    rng = np.random.default_rng(0)
    dark = rng.integers(0, 60, (n, SIZE, SIZE))
    return np.asarray(dark + (np.arange(n) * 190 // n)[:, None, None], dtype=np.uint8)


def trained(approach: str) -> models.Model:
    """A model as training leaves it: no weight is what `build` made it, and an optimizer goes with it."""
    weights = "imagenet" if approach != "cnn" else "none"  # on random ones, all images would look alike
    model = models.build(approach, SPEC.with_overrides([f"backbone.weights={weights}"]))
    model.compile(optimizer=keras.optimizers.Adam())
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(ops.convert_to_numpy(weight) * rng.uniform(0.95, 1.05, weight.shape))
    return model


def arrays_of(model: models.Model) -> list[tuple[str, bytes]]:
    return [(weight.path, ops.convert_to_numpy(weight).tobytes()) for weight in model.weights]


@pytest.fixture(scope="module")
def cnn_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a trained cnn."""
    path = tmp_path_factory.mktemp("models") / "whole.keras"
    trained("cnn").save(path)
    return path.read_bytes()


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """The nine pictures as files, one of them twice."""
    for at, pixels in enumerate([*pictures(9), pictures(9)[3]]):
        path = tmp_path / "data" / ("NORMAL", "PNEUMONIA")[at % 2] / f"{at:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return Catalog.scan(tmp_path / "data")


def with_weights(whole: bytes, weights: bytes | None) -> bytes:
    """The same archive with other weights inside, or none."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            if name != WEIGHTS:
                target.writestr(name, source.read(name))
        if weights is not None:
            target.writestr(WEIGHTS, weights)
    return buffer.getvalue()


def weights_of(whole: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return archive.read(WEIGHTS)


def changed_hdf5(data: bytes, change: Callable[[h5py.File], None]) -> bytes:
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "r+") as file:
        change(file)
    return buffer.getvalue()


def refusal(path: Path, *, approach: str = "cnn", spec: Spec = SPEC) -> str:
    """Return why a file is not loaded, after holding the sentence around it."""
    with pytest.raises(RunError) as caught:
        inference.load_model(path, approach=approach, spec=spec)
    message = str(caught.value)
    before, after = f"The model {path} cannot be loaded (", "); train it again, or give the run it came from."
    assert message.startswith(before)
    assert message.endswith(after)
    assert "\n" not in message
    return message.removeprefix(before).removesuffix(after)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approach", ["cnn", "tl", "ft"])
def test_a_loaded_model_is_the_saved_one_bit_for_bit_and_needs_no_pretrained_weights(
    tmp_path: Path, approach: str
) -> None:
    model = trained(approach)
    model.save(tmp_path / "model.keras")
    elsewhere = SPEC.with_overrides(["backbone.weights=/nowhere/imagenet.weights"])
    if approach != "cnn":
        with pytest.raises(WeightsError):
            models.build(approach, elsewhere)
    loaded = inference.load_model(tmp_path / "model.keras", approach=approach, spec=elsewhere)
    assert arrays_of(loaded) == arrays_of(model)
    pixels = pictures(9)[..., None]
    scores, expected = (ops.convert_to_numpy(each(pixels, training=False)) for each in (loaded, model))
    assert scores.tobytes() == expected.tobytes()
    assert len(set(expected[:, 0].tolist())) == 9  # these tell the images apart


# --- files that are not what they seem -------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "reason"), [(0.0, "not a zip file"), (0.5, "not a zip file"), (0.99, "not a zip")])
def test_a_truncated_file_is_refused(cnn_bytes: bytes, tmp_path: Path, share: float, reason: str) -> None:
    path = tmp_path / "cnn.keras"
    path.write_bytes(cnn_bytes[: int(share * len(cnn_bytes))])
    assert reason in refusal(path)


def test_a_flipped_bit_in_the_weights_is_refused(cnn_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cnn.keras"
    start = cnn_bytes.index(weights_of(cnn_bytes))
    for at in (start + 8, start + 20_000, len(cnn_bytes) - 3000):
        flipped = bytearray(cnn_bytes)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        assert "CRC" in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert os.strerror(2) in refusal(tmp_path / "nowhere.keras")
    (tmp_path / "folder.keras").mkdir()
    assert os.strerror(21) in refusal(tmp_path / "folder.keras")


def _without(path: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[path]

    return change


def _linked(file: h5py.File) -> None:
    del file["layers/dense/vars/0"]
    file["layers/dense/vars/0"] = h5py.ExternalLink("/etc/hostname", "x")


@pytest.mark.parametrize("change", [_without("layers"), _without("layers/dense/vars/0"), _linked])
def test_weights_that_are_not_all_there_are_refused(
    cnn_bytes: bytes, tmp_path: Path, change: Callable[[h5py.File], None]
) -> None:
    path = tmp_path / "cnn.keras"
    path.write_bytes(with_weights(cnn_bytes, changed_hdf5(weights_of(cnn_bytes), change)))
    assert refusal(path) == "its weights do not fit the Spec"


@pytest.mark.filterwarnings("default:Skipping:UserWarning")  # as in daily use, where it stops nothing
@pytest.mark.parametrize(
    ("override", "approach"), [("image.size_px=48", "cnn"), ("cnn.layers=tutorial", "cnn"), ("seed=42", "tl")]
)
def test_weights_of_another_network_are_refused(cnn_bytes: bytes, tmp_path: Path, override: str, approach: str) -> None:
    path = tmp_path / "cnn.keras"
    path.write_bytes(cnn_bytes)
    spec = SPEC.with_overrides(["image.size_px=64", override])  # the tutorial's cnn needs 64
    assert refusal(path, approach=approach, spec=spec) == "its weights do not fit the Spec"


def test_an_archive_of_something_else_is_refused(cnn_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cnn.keras"
    path.write_bytes(with_weights(cnn_bytes, None))
    assert WEIGHTS in refusal(path)
    path.write_bytes(with_weights(cnn_bytes, b"no HDF5 at all"))
    assert "file signature not found" in refusal(path)
    path.write_bytes(with_weights(cnn_bytes, weights_of(cnn_bytes)[:20_000]))
    assert "truncated file" in refusal(path)


def test_bare_hdf5_is_refused(cnn_bytes: bytes, tmp_path: Path) -> None:
    for name in ("cnn.keras", "cnn.h5"):
        (tmp_path / name).write_bytes(weights_of(cnn_bytes))
        assert refusal(tmp_path / name)


class Trap:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self._marker),)


@pytest.mark.parametrize("name", ["cnn.keras", "cnn.pkl", "cnn.joblib"])
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    marker, path = tmp_path / "opened", tmp_path / name
    path.write_bytes(pickle.dumps(Trap(marker)))
    assert refusal(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # the trap is live
    assert marker.exists()


def test_code_in_a_model_file_is_never_run(cnn_bytes: bytes, tmp_path: Path) -> None:
    marker, trapped = tmp_path / "ran", tmp_path / "cnn.keras"
    image = keras.Input((SIZE, SIZE, 1))
    place = str(marker)
    code = keras.layers.Lambda(lambda x: (__import__("pathlib").Path(place).touch(), x)[1])
    keras.Model(image, code(image)).save(trapped)
    with zipfile.ZipFile(trapped) as archive:
        config = archive.read("config.json")
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(cnn_bytes)) as good, zipfile.ZipFile(buffer, "w") as archive:
        for name in good.namelist():  # our weights under somebody else's network
            archive.writestr(name, config if name == "config.json" else good.read(name))
    trapped.write_bytes(buffer.getvalue())
    marker.unlink(missing_ok=True)

    model = inference.load_model(trapped, approach="cnn", spec=SPEC)
    pixels = pictures(9)
    fetch = lambda positions: pixels[positions, ..., None]  # noqa: E731
    (tmp_path / "good.keras").write_bytes(cnn_bytes)
    good_model = inference.load_model(tmp_path / "good.keras", approach="cnn", spec=SPEC)
    assert models.scores(model, fetch, 9, batch_size=9).tobytes() == (
        models.scores(good_model, fetch, 9, batch_size=9).tobytes()
    )
    assert not marker.exists()
    keras.saving.load_model(trapped, safe_mode=False)
    assert marker.exists()  # the trap is live


# --- scoring ---------------------------------------------------------------------------------------------------------


def brightness() -> models.Model:
    """A model whose score is an image's mean grey value, so that every row's score is known beforehand."""
    image = keras.Input((SIZE, SIZE, 1), name="image")
    mean = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(image))
    return keras.Model(image, mean)


def test_scores_come_in_the_order_of_the_rows_each_image_once(catalog: Catalog) -> None:
    store = ImageStore.pack(catalog, size_px=SIZE)
    rows = catalog.rows().sample(frac=1, random_state=1)  # neither the catalog's order nor the store's
    assert len(rows) == 10
    assert len(store.images) == 9
    done: list[tuple[int, int]] = []
    predictions = inference.score(
        brightness(), store, rows, batch_size=4, progress=lambda now, total: done.append((now, total))
    )
    assert predictions.table["path"].tolist() == rows["path"].tolist()
    assert predictions.table["image_id"].tolist() == rows["image_id"].tolist()
    assert predictions.labels.tolist() == rows["label"].tolist()
    expected = [images.load(catalog.read_bytes(path), SIZE).mean() / 255 for path in rows["path"]]
    np.testing.assert_allclose(predictions.scores, expected, rtol=1e-5)
    assert done == [(4, 10), (8, 10), (10, 10)]


def test_scores_are_those_of_the_model_itself(cnn_bytes: bytes, catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "cnn.keras").write_bytes(cnn_bytes)
    model = inference.load_model(tmp_path / "cnn.keras", approach="cnn", spec=SPEC)
    store, rows = ImageStore.pack(catalog, size_px=SIZE), catalog.rows()
    predictions = inference.score(model, store, rows, batch_size=4)
    pixels = np.stack([images.load(catalog.read_bytes(path), SIZE) for path in rows["path"]])
    expected = models.scores(model, lambda at: pixels[at, ..., None], len(rows), batch_size=4)
    assert predictions.table["score"].to_numpy().tobytes() == expected.tobytes()


def test_no_rows_give_no_scores(catalog: Catalog) -> None:
    store = ImageStore.pack(catalog, size_px=SIZE)
    assert len(inference.score(brightness(), store, catalog.rows().iloc[:0])) == 0


def test_an_image_that_was_not_packed_is_told(catalog: Catalog) -> None:
    store = ImageStore.pack(catalog, size_px=SIZE)
    rows = catalog.rows().assign(image_id="f" * 16)
    with pytest.raises(StoreError) as caught:
        inference.score(brightness(), store, rows)
    assert str(caught.value) == f"10 of 10 images are not in {store.folder}; pack this set of images first."
