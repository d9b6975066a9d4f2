"""Stored features: what decides their key, that they are right, computed once, and resumed after a kill."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from pneumoscope import augmentation, backbones, features, models, store, training
from pneumoscope._backend import keras
from pneumoscope.catalog import Catalog
from pneumoscope.errors import StoreError
from pneumoscope.specs import Spec
from pneumoscope.store import ImageStore

Packed = tuple[Catalog, ImageStore]

SPEC = Spec.preset_named("smoke").with_overrides(
    ["image.size_px=32", "backbone.weights=none", "features.dtype=float32", "augment.zoom=0.1"]
)
VIEWS = SPEC.with_overrides(["features.views=2"])
CUTS = ("map", "pool")
ROWS = np.tile(np.arange(64), 10)  # 640 images, 20 batches: marks after 256, 512 and 640


@pytest.fixture(scope="module")
def network() -> Any:
    """A frozen network as small as can be, with two places to cut it."""
    keras.utils.set_random_seed(1)
    image = keras.Input((32, 32, 1), name="image")
    x = keras.layers.Conv2D(3, 5, strides=4, activation="relu", name="map")(image)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, keras.layers.Dense(1, activation="sigmoid")(x))


class Extraction:
    """Extract with everything at its usual value but for what a test changes."""

    def __init__(self, network: Any, store: ImageStore, folder: Path) -> None:
        self.network, self.store, self._folder, self._calls = network, store, folder, itertools.count()

    def __call__(self, *cuts: str, spec: Spec = SPEC, **changes: Any) -> dict[str, features.FeatureStore]:
        arguments: dict[str, Any] = {"store": self.store, "rows": ROWS[:40], "spec": spec} | changes
        return features.extract(self.network, cuts or ("pool",), **{"learned": arguments["rows"]} | arguments)

    def stored(self, *cuts: str, **changes: Any) -> dict[str, bytes]:
        """Extract into a cache of its own and return what stands there: folder -> features."""
        cache = self._folder / str(next(self._calls))
        self(*cuts, cache=cache, **changes)
        return content_of(cache)

    def expected(self, cut: str, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        part = keras.Model(self.network.input, self.network.get_layer(cut).output)
        return np.asarray(keras.ops.convert_to_numpy(part(self.store.images[rows][..., None], training=False)))


def content_of(cache: Path) -> dict[str, bytes]:
    """Folder -> features, for every finished store; there must be nothing else."""
    assert {path.name for folder in cache.iterdir() for path in folder.iterdir()} <= {
        "features.npy", "manifest.json", "done.json"
    }  # fmt: skip
    assert all(path.name.startswith("features-") for path in cache.iterdir())
    return {folder.name: (folder / "features.npy").read_bytes() for folder in cache.iterdir()}


@pytest.fixture
def extract(network: Any, packed: Packed, tmp_path: Path) -> Extraction:
    return Extraction(network, packed[1], tmp_path / "stored")


# --- What they are ----------------------------------------------------------------------------------------------------


def test_features_are_what_the_network_makes_of_each_image(extract: Extraction, own_cache: Path) -> None:
    rows = np.array([5, 0, 63, 5])
    found = extract(*CUTS, rows=rows)
    assert list(found) == ["map", "pool"]
    for cut, shape in (("map", (4, 7, 7, 3)), ("pool", (4, 3))):
        (view,) = found[cut].views
        assert view.shape == shape
        assert view.dtype == np.float32
        assert not view.flags.writeable
        assert np.allclose(view, extract.expected(cut, rows), rtol=1e-6, atol=1e-5)
    assert len(np.unique(found["pool"].views[0], axis=0)) == 3
    assert len(content_of(own_cache)) == 2


def test_half_precision_takes_half_the_room_and_changes_little(extract: Extraction) -> None:
    half = extract(spec=SPEC.with_overrides(["features.dtype=float16"]))["pool"].views[0]
    full = extract()["pool"].views[0]
    assert half.dtype == np.float16
    assert np.array_equal(half, full.astype(np.float16))
    assert np.abs(half - full).max() / np.abs(full).max() < 1e-3


def test_views_are_the_clean_images_and_changed_ones(extract: Extraction) -> None:
    clean, *changed = extract(spec=VIEWS)["pool"].views
    assert len(changed) == 2
    assert np.array_equal(clean, extract()["pool"].views[0])
    prefix = keras.Model(extract.network.input, extract.network.get_layer("pool").output)
    for number, view in enumerate(changed, start=1):
        drawn = augmentation.draw(VIEWS.augment, 40, seed=(VIEWS.seed, models.VIEWS, number))
        images = extract.store.images[ROWS[:40]][..., None]
        expected = keras.ops.convert_to_numpy(
            augmentation.augmented(prefix, VIEWS.augment)([images, drawn], training=False)
        )
        assert np.allclose(view, expected, rtol=1e-5, atol=1e-4)
    assert (np.abs(changed[0] - clean).max(axis=1) > 1e-3).mean() > 0.9
    assert (np.abs(changed[0] - changed[1]).max(axis=1) > 1e-3).mean() > 0.9


def test_only_images_that_are_learned_from_are_augmented(extract: Extraction) -> None:
    calls: list[tuple[int, int]] = []
    learned = np.array([3, 8, 21])
    clean, *changed = extract(spec=VIEWS, learned=learned, progress=lambda *step: calls.append(step))["pool"].views
    assert len(clean) == 40
    assert [len(view) for view in changed] == [3, 3]
    assert np.array_equal(changed[0], extract(spec=VIEWS, rows=learned)["pool"].views[1])
    assert calls[-1] == (46, 46)


def test_values_too_large_for_half_precision_are_refused(network: Any, extract: Extraction) -> None:
    layer = network.get_layer("map")
    before = layer.get_weights()
    layer.set_weights([weight * 1e6 for weight in before])
    try:
        with pytest.raises(
            StoreError,
            match=r"^The frozen layers gave values that float16 cannot hold \(the largest is [\de+.]+\); "
            r"set features\.dtype=float32 and check the weights\.$",
        ):
            extract(spec=SPEC.with_overrides(["features.dtype=float16"]))
        assert np.abs(extract()["pool"].views[0]).max() > 65_504
    finally:
        layer.set_weights(before)


def test_bfloat16_arithmetic_is_stored_as_it_is(packed: Packed) -> None:
    catalog, store = packed
    spec = SPEC.with_overrides(["train.precision=bfloat16", "features.dtype=float16", "backbone.weights=imagenet"])
    model = models.build("tl", spec)
    found = training.extract_features([model], store, catalog, spec=spec)["pool"].views[0]
    rows = np.unique(store.rows_of(catalog.rows("train")))[:5]
    everything = np.unique(store.rows_of(pd.concat([catalog.rows("train"), catalog.rows("validation")])))
    prefix, tail = models.split_at(model, "pool")
    images = store.images[rows][..., None]
    stored = found[np.searchsorted(everything, rows)].astype(np.float32)
    assert np.allclose(stored, keras.ops.convert_to_numpy(prefix(images)).astype(np.float32), rtol=0.02, atol=0.02)
    assert np.allclose(tail(stored), model(images), atol=0.02)


def test_several_cuts_in_one_pass_are_the_same_as_one_by_one(extract: Extraction) -> None:
    together = extract.stored(*CUTS, spec=VIEWS)
    assert together == extract.stored("map", spec=VIEWS) | extract.stored("pool", spec=VIEWS)
    assert len(together) == 2 * 3


def test_one_pass_over_real_models_serves_both_approaches(packed: Packed) -> None:
    catalog, store = packed
    spec = SPEC.with_overrides(["backbone.weights=imagenet"])
    tl, ft = models.build("tl", spec), models.build("ft", spec)
    calls: list[tuple[int, int]] = []
    found = training.extract_features([tl, ft], store, catalog, spec=spec, progress=lambda *step: calls.append(step))
    assert {cut: store.views[0].shape for cut, store in found.items()} == {
        "pool": (48, 1280),
        "block7a_project_conv": (48, 1, 1, 320),
    }
    assert calls == [(32, 48), (48, 48)]
    for model, cut in ((tl, "pool"), (ft, "block7a_project_conv")):
        _, tail = models.split_at(model, cut)
        both = np.concatenate([store.rows_of(catalog.rows(split)) for split in ("train", "validation")])
        full = model(store.images[np.sort(both)][..., None], training=False)
        part = tail(found[cut].views[0], training=False)
        assert np.allclose(keras.ops.convert_to_numpy(part), keras.ops.convert_to_numpy(full), rtol=0, atol=1e-5)
    assert training.extract_features([models.build("cnn", spec)], store, catalog, spec=spec) == {}
    uncached = spec.with_overrides(["features.cache=false"])
    assert training.extract_features([tl, ft], store, catalog, spec=uncached) == {}


# --- The key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "backbone.name=mobilenetv2",
        "backbone.weights=imagenet",
        "backbone.scaling=unit",
        "features.dtype=float16",
        "train.precision=bfloat16",
        "seed=7",  # of the random weights
    ],
)
def test_whatever_decides_a_value_is_in_the_key(change: str, extract: Extraction) -> None:
    usual, changed = extract.stored(), extract.stored(spec=SPEC.with_overrides([change]))
    assert len(usual) == len(changed) == 1
    assert usual.keys() != changed.keys()


def test_images_rows_and_the_content_of_weights_are_in_the_key(extract: Extraction, tmp_path: Path) -> None:
    usual = extract.stored().keys()
    assert extract.stored().keys() == usual
    assert extract.stored(rows=ROWS[:39]).keys() != usual
    assert extract.stored(rows=ROWS[:40][::-1]).keys() != usual
    assert extract.stored(store=replace(extract.store, key="other")).keys() != usual
    assert extract.stored("map").keys() != usual
    published = backbones.weights_path("efficientnet_lite0")
    assert published is not None
    copy = Path(shutil.copy(published, tmp_path / "copy.pth"))
    own, imagenet = (SPEC.with_overrides([f"backbone.weights={weights}"]) for weights in (copy, "imagenet"))
    assert extract.stored(spec=own).keys() == extract.stored(spec=imagenet).keys()  # wherever the file lies
    with copy.open("ab") as file:
        file.write(b"more")
    assert extract.stored(spec=own).keys() != extract.stored(spec=imagenet).keys()


@pytest.mark.parametrize("change", ["augment.zoom=0.2", "augment.translation=0.1", "seed=7"])
def test_augmentation_is_in_the_keys_of_changed_views_only(change: str, extract: Extraction) -> None:
    imagenet = VIEWS.with_overrides(["backbone.weights=imagenet"])
    before, after = (extract.stored(spec=spec) for spec in (imagenet, imagenet.with_overrides([change])))
    (clean,) = before.keys() & after.keys()
    assert extract.stored(spec=imagenet.with_overrides(["features.views=0", change])) == {clean: before[clean]}
    assert len(before) == len(after) == 3


def test_what_only_training_uses_is_not_in_the_key(extract: Extraction) -> None:
    other = VIEWS.with_overrides(
        ["train.epochs=9", "tl.learning_rate=0.5", "train.batch_size=3", "ft.trainable_layers=9", "train.patience=1"]
    )
    assert extract.stored(spec=other) == extract.stored(spec=VIEWS)


# --- Computed once, resumed, never half -------------------------------------------------------------------------------


def test_what_is_there_is_not_computed_again(extract: Extraction, own_cache: Path) -> None:
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))

    extract(spec=VIEWS, rows=ROWS[:70], progress=progress)
    assert calls == [(done, 210) for done in (32, 64, 70, 102, 134, 140, 172, 204, 210)]
    before = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")}
    calls.clear()
    extract(spec=VIEWS, rows=ROWS[:70], progress=progress)
    assert calls == []
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")} == before
    extract(spec=VIEWS.with_overrides(["features.views=3"]), rows=ROWS[:70], progress=progress)
    assert calls == [(242, 280), (274, 280), (280, 280)]  # one view more


class Killed(BaseException):
    """Ends an extraction between two steps, as a kill would."""


def killed_at(passes: int, calls: list[int]) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        calls.append(done)
        if done == passes:
            raise Killed

    return progress


def test_a_killed_extraction_goes_on_from_its_mark_and_gives_the_same_bytes(
    extract: Extraction, tmp_path: Path
) -> None:
    alone = extract.stored(*CUTS, spec=VIEWS, rows=ROWS)
    starts, whole = [], []
    # before the first mark; in the second view; after the last batch, before the last stroke; never
    for passes in (96, 640 + 320, 1280 + 640, -1):
        calls: list[int] = []
        with contextlib.suppress(Killed):
            extract(*CUTS, spec=VIEWS, rows=ROWS, cache=tmp_path / "killed", progress=killed_at(passes, calls))
        starts.append(calls[0] - 32)
        whole.append(len(list((tmp_path / "killed").glob("features-*"))))
    assert starts == [0, 0, 640 + 256, 1280 + 512]
    assert whole == [0, 2, 4, 6]
    assert content_of(tmp_path / "killed") == alone


def test_cuts_that_got_differently_far_go_on_together(extract: Extraction, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        extract("pool", rows=ROWS, cache=tmp_path / "killed", progress=killed_at(384, []))
    extract(*CUTS, rows=ROWS, cache=tmp_path / "killed")
    assert content_of(tmp_path / "killed") == extract.stored(*CUTS, rows=ROWS)


def test_a_store_whose_deletion_was_interrupted_is_made_anew(extract: Extraction, own_cache: Path) -> None:
    extract(*CUTS)
    for folder in own_cache.iterdir():
        (folder / "manifest.json").unlink()
    extract(*CUTS)
    assert content_of(own_cache) == extract.stored(*CUTS)


def test_where_another_process_is_quicker_its_store_stays(extract: Extraction, own_cache: Path) -> None:
    def other(done: int, total: int) -> None:
        if done == 640:
            shutil.copytree(extract._folder / "0", own_cache, dirs_exist_ok=True)

    expected = extract.stored(rows=ROWS)
    extract(rows=ROWS, progress=other)
    assert content_of(own_cache) == expected


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:100])])
def test_a_damaged_store_is_named(damage: Callable[[Path], None], extract: Extraction, own_cache: Path) -> None:
    extract()
    (folder,) = own_cache.iterdir()
    damage(folder / "features.npy")
    with pytest.raises(StoreError, match=rf"^{folder} is damaged \(.+\); delete it and run again\.$"):
        extract()


# --- No room, no right ------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_said(extract: Extraction, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        StoreError,
        match=rf"^Cannot write to {tmp_path}/file: Not a directory; "
        r"set PNEUMOSCOPE_CACHE to a folder you may write to\.$",
    ):
        extract(cache=tmp_path / "file")


def test_too_little_space_is_said_before_anything_is_written(
    extract: Extraction, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(own_cache.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        StoreError,
        match=rf"^Storing the features needs 1\.4 kB in {own_cache}, but only 1\.0 kB is free; "
        r"free some space, or set PNEUMOSCOPE_CACHE to a larger disk\.$",
    ):
        extract(rows=ROWS[:120])  # 3 float32 each
    assert not own_cache.exists()


def test_what_an_unfinished_extraction_has_reserved_is_not_asked_for_twice(
    extract: Extraction, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = extract.stored(*CUTS, rows=ROWS)
    with pytest.raises(Killed):
        extract(*CUTS, rows=ROWS, progress=killed_at(384, []))
    usage = shutil.disk_usage(own_cache)._replace(free=1000)  # all there was lies in what is unfinished
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    extract(*CUTS, rows=ROWS)
    assert content_of(own_cache) == alone


def test_a_mark_without_its_array_counts_for_nothing(extract: Extraction, own_cache: Path) -> None:
    with pytest.raises(Killed):
        extract(*CUTS, rows=ROWS, progress=killed_at(384, []))
    for folder in own_cache.glob(".features-*.partial"):
        (folder / "features.npy").unlink()  # as where a deletion was interrupted
    extract(*CUTS, rows=ROWS)
    assert content_of(own_cache) == extract.stored(*CUTS, rows=ROWS)


# --- A real kill ------------------------------------------------------------------------------------------------------

_CHILD = """
import os, signal, sys
import numpy as np
from pathlib import Path
from pneumoscope import features, models
from pneumoscope.specs import Spec
from pneumoscope.store import ImageStore

folder, cache, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
spec = Spec.preset_named("smoke").with_overrides(["image.size_px=32", "features.dtype=float32"])

def progress(done, total):
    print(done, flush=True)
    if done == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

features.extract(
    models.build("tl", spec), ["pool"], store=ImageStore.open(folder), rows=np.tile(np.arange(64), 10), spec=spec,
    learned=np.arange(0), cache=cache, progress=progress,
)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this platform has no SIGKILL")
def test_an_extraction_killed_by_the_system_is_resumed(packed: Packed, tmp_path: Path) -> None:
    def run(cache: str, kill_at: int) -> tuple[int, list[int]]:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(packed[1].folder), str(tmp_path / cache), str(kill_at)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ,
        )
        return done.returncode, [int(line) for line in done.stdout.split()]

    assert run("alone", -1) == (0, list(range(32, 641, 32)))
    assert run("killed", 416) == (-signal.SIGKILL, list(range(32, 417, 32)))
    assert not list((tmp_path / "killed").glob("features-*"))
    assert run("killed", -1) == (0, list(range(288, 641, 32)))
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "alone")


def test_a_cache_that_is_cleaned_during_an_extraction_leaves_no_store_without_its_array(
    extract: Extraction, own_cache: Path
) -> None:
    def cleaned(done: int, total: int) -> None:
        if done == 384:
            for folder in own_cache.glob(".features-*"):
                shutil.rmtree(folder)

    with pytest.raises(StoreError, match="was deleted while features were written to it; run the same again"):
        extract(rows=ROWS, progress=cleaned)
    extract(rows=ROWS)
    assert content_of(own_cache) == extract.stored(rows=ROWS)


# --- In parts, by several processes -----------------------------------------------------------------------------------


def test_what_is_computed_in_parts_is_the_same_bit_for_bit(extract: Extraction) -> None:
    arguments: dict[str, Any] = {"rows": ROWS[:150], "learned": ROWS[:80], "spec": VIEWS}
    alone = extract.stored(*CUTS, **arguments)
    for parts in (2, 3, 30):  # 5 and 3 batches: some of the 30 parts are empty
        assert extract.stored(*CUTS, parts=parts, **arguments) == alone


def test_parts_that_other_processes_stored_are_put_together_and_not_computed_again(
    extract: Extraction, own_cache: Path
) -> None:
    arguments: dict[str, Any] = {"rows": ROWS[:150], "learned": ROWS[:80], "spec": VIEWS}
    for index in range(3):
        assert extract(part=(index, 3), **arguments) == {}
    for folder in own_cache.iterdir():  # what stands there is taken, whatever it is
        stored = np.lib.format.open_memmap(folder / "features.npy", mode="r+")
        stored[:] = 7
        stored.flush()
    views = extract(parts=3, **arguments)["pool"].views
    assert [view.shape for view in views] == [(150, 3), (80, 3), (80, 3)]
    assert all((view == 7).all() for view in views)
    assert len(content_of(own_cache)) == 3, "the parts are gone once they are put together"


def test_parts_that_another_job_put_together_and_deleted_meanwhile_are_not_missed(
    extract: Extraction, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(3):
        extract(rows=ROWS[:150], part=(index, 3))
    kept = store.open_array
    opened: list[Path] = []

    def late(path: Path) -> Any:
        opened.append(path)
        if len(opened) == 2:
            with monkeypatch.context() as patch:
                patch.setattr(features, "open_array", kept)
                extract(rows=ROWS[:150], parts=3)  # the other job, from beginning to end
        return kept(path)

    monkeypatch.setattr(features, "open_array", late)
    extract(rows=ROWS[:150], parts=3)
    assert len(opened) > 1
    assert content_of(own_cache) == extract.stored(rows=ROWS[:150])


def test_a_part_that_is_missing_is_computed(extract: Extraction) -> None:
    whole = extract(rows=ROWS[:150])["pool"].views[0].copy()
    cache = Path(os.environ["PNEUMOSCOPE_CACHE"]) / "other"
    for index in (0, 2):
        extract(rows=ROWS[:150], part=(index, 3), cache=cache)
    done: list[tuple[int, int]] = []
    found = extract(rows=ROWS[:150], parts=3, cache=cache, progress=lambda *counts: done.append(counts))
    assert np.array_equal(found["pool"].views[0], whole)
    assert done[-1] == (150, 150)
    assert done == sorted(done)


def test_a_part_of_a_store_that_is_whole_is_not_computed(extract: Extraction, own_cache: Path) -> None:
    extract(rows=ROWS[:150])
    extract(rows=ROWS[:150], part=(1, 3))
    assert len(content_of(own_cache)) == 1
