"""The ImageStore: each image decoded once, exactly as `images.load` does, and a store that is whole or absent."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pneumoscope import _files, images
from pneumoscope.catalog import Catalog
from pneumoscope.errors import StoreError
from pneumoscope.store import ImageStore

SIZE = 32


def picture(seed: int, suffix: str = ".png", *, width_px: int = 40, height_px: int = 30) -> bytes:
    """A small picture of noise, smoothed by nothing: a wrong row or a second resizing would show."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height_px, width_px), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG" if suffix == ".png" else "JPEG")
    return buffer.getvalue()


def truncated(seed: int) -> bytes:
    """A JPEG with a whole header and half of its pixels."""
    data = picture(seed, ".jpeg", width_px=200, height_px=150)
    return data[: len(data) // 2]


def plant(root: Path, content: Mapping[str, bytes]) -> Catalog:
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return Catalog.scan(root)


def names(n: int) -> list[str]:
    return [f"{('NORMAL', 'PNEUMONIA')[at % 2]}/{at:03}{('.png', '.jpeg')[at // 2 % 2]}" for at in range(n)]


def content_of(paths: Iterable[str]) -> dict[str, bytes]:
    return {path: picture(at, Path(path).suffix) for at, path in enumerate(paths)}


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Eight different images, half of them JPEG."""
    return plant(tmp_path / "data", content_of(names(8)))


def assert_holds(store: ImageStore, catalog: Catalog) -> None:
    """Every usable row of the Catalog stands in the store as `images.load` gives it."""
    rows = catalog.rows()
    for path, row in zip(rows["path"], store.rows_of(rows), strict=True):
        np.testing.assert_array_equal(store.images[row], images.load(catalog.read_bytes(path), store.size_px))


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- what is packed --------------------------------------------------------------------------------------------------


def test_every_image_is_packed_as_it_is_loaded(catalog: Catalog, own_cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    store = ImageStore.pack(catalog, size_px=SIZE, progress=lambda done, total: seen.append((done, total)))
    assert store.images.shape == (8, SIZE, SIZE)
    assert store.images.dtype == np.uint8
    assert store.size_px == SIZE
    assert store.image_ids.tolist() == sorted(catalog.table["image_id"])
    assert store.rejected == {}
    assert_holds(store, catalog)
    assert seen == [(8, 8)]
    assert store.folder.parent == own_cache
    assert store.folder.name == f"images-{store.key}"
    assert entries(store.folder) == ["images.npy", "manifest.json"]
    assert entries(own_cache) == [store.folder.name]


def test_the_real_images_are_packed_as_they_are_loaded(real_data: Path, tmp_path: Path) -> None:
    originals = sorted((real_data / "full_resolution").rglob("*.jpeg"))[:4]
    content = {f"{('NORMAL', 'PNEUMONIA')[at % 2]}/{at}.jpeg": path.read_bytes() for at, path in enumerate(originals)}
    catalog = plant(tmp_path / "data", content)
    store = ImageStore.pack(catalog, size_px=224)
    assert len(store.images) == len(originals) == 4
    assert_holds(store, catalog)


def test_progress_is_told_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    catalog = plant(
        tmp_path / "data", {path: picture(at, width_px=5, height_px=5) for at, path in enumerate(names(70))}
    )
    seen: list[tuple[int, int]] = []
    store = ImageStore.pack(catalog, size_px=8, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 70), (70, 70)]
    assert_holds(store, catalog)


def test_images_with_the_same_content_are_packed_once(tmp_path: Path) -> None:
    content = content_of(names(4))
    content["NORMAL/copy.png"] = content["NORMAL/000.png"]
    catalog = plant(tmp_path / "data", content)
    store = ImageStore.pack(catalog, size_px=SIZE)
    assert len(catalog.rows()) == 5
    assert len(store.images) == len(store.image_ids) == 4
    assert_holds(store, catalog)


def test_rows_are_found_in_the_order_asked_for(catalog: Catalog) -> None:
    store = ImageStore.pack(catalog, size_px=SIZE)
    rows = catalog.rows()
    asked = rows.iloc[[5, 2, 2, 7]]
    found = store.rows_of(asked)
    assert found.dtype == np.intp
    assert store.image_ids[found].tolist() == asked["image_id"].tolist()
    assert store.rows_of(rows.iloc[:0]).shape == (0,)


def test_an_array_file_is_packed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = {}
    for split, n in (("train", 6), ("val", 3), ("test", 2)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n, dtype=np.uint8) % 2)[:, None]
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)  # type: ignore[arg-type]
    catalog = Catalog.scan(tmp_path / "pneumoniamnist.npz")
    store = ImageStore.pack(catalog, size_px=28)
    assert len(store.images) == 11
    train = store.images[store.rows_of(catalog.rows("train"))]
    np.testing.assert_array_equal(train, arrays["train_images"])  # of its own size: nothing is resized
    assert_holds(ImageStore.pack(catalog, size_px=SIZE), catalog)


def test_an_archive_is_packed_to_the_same_store_as_its_folder(catalog: Catalog, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in catalog.table["path"]:
            archive.write(catalog.root / path, f"data/{path}")
    inside = Catalog.scan(tmp_path / "data.zip")
    store = ImageStore.pack(inside, size_px=SIZE)
    assert len(store.images) == 8
    assert_holds(store, inside)
    assert store.key == ImageStore.pack(catalog, size_px=SIZE).key


def test_a_truncated_image_is_rejected_with_its_reason_and_the_others_are_right(tmp_path: Path) -> None:
    content = content_of(names(7))
    for at in (2, 5):
        content[names(7)[at]] = truncated(at)
    catalog = plant(tmp_path / "data", content)
    assert len(catalog.rows()) == 7  # their headers are whole
    bad = catalog.rows()["image_id"][[names(7).index(path) in (2, 5) for path in catalog.rows()["path"]]]
    store = ImageStore.pack(catalog, size_px=SIZE)
    assert store.rejected == dict.fromkeys(bad, "truncated")
    assert len(store.images) == len(store.image_ids) == 5
    assert entries(store.folder) == ["images.npy", "manifest.json"]
    left = catalog.quarantine(store.rejected)
    assert sorted(left.quarantined()["path"]) == sorted(names(7)[at] for at in (2, 5))
    assert_holds(store, left)
    with pytest.raises(StoreError, match=r"^2 of 7 images are not in "):
        store.rows_of(catalog.rows())


def test_a_set_without_one_good_image_is_an_empty_store(tmp_path: Path) -> None:
    catalog = plant(tmp_path / "data", {"NORMAL/a.jpeg": truncated(1), "PNEUMONIA/b.jpeg": truncated(2)})
    store = ImageStore.pack(catalog, size_px=SIZE)
    assert store.images.shape == (0, SIZE, SIZE)
    assert set(store.rejected.values()) == {"truncated"}
    with pytest.raises(StoreError) as caught:
        store.rows_of(catalog.rows())
    assert str(caught.value) == f"{store.folder} holds no image; pack the images again."


# --- packing again ---------------------------------------------------------------------------------------------------


def test_packing_again_reads_and_writes_nothing(catalog: Catalog) -> None:
    first = ImageStore.pack(catalog, size_px=SIZE)
    before = {path.name: path.stat().st_mtime_ns for path in [first.folder, *first.folder.iterdir()]}
    shutil.rmtree(catalog.root)  # so that no image can be read

    def refuse(done: int, total: int) -> None:
        raise AssertionError(f"packed again: {done} of {total}")

    again = ImageStore.pack(catalog, size_px=SIZE, progress=refuse)
    assert (again.folder, again.key) == (first.folder, first.key)
    np.testing.assert_array_equal(again.images, first.images)
    assert {path.name: path.stat().st_mtime_ns for path in [first.folder, *first.folder.iterdir()]} == before


def test_another_order_or_label_of_the_same_images_is_the_same_store(catalog: Catalog) -> None:
    shuffled = Catalog(catalog.root, catalog.table.iloc[::-1].assign(label=1).reset_index(drop=True))
    assert ImageStore.pack(shuffled, size_px=SIZE).folder == ImageStore.pack(catalog, size_px=SIZE).folder


def test_another_size_packs_anew(catalog: Catalog) -> None:
    stores = [ImageStore.pack(catalog, size_px=size_px) for size_px in (SIZE, SIZE + 1)]
    assert stores[0].folder != stores[1].folder
    assert [store.size_px for store in stores] == [SIZE, SIZE + 1]
    assert_holds(stores[1], catalog)


def test_another_compression_packs_anew(catalog: Catalog) -> None:
    plain, compressed = (ImageStore.pack(catalog, size_px=SIZE, jpeg_quality=quality) for quality in (0, 75))
    assert plain.folder != compressed.folder
    assert (plain.jpeg_quality, compressed.jpeg_quality) == (0, 75)
    rows = catalog.rows()
    for path, row in zip(rows["path"], compressed.rows_of(rows), strict=True):
        expected = images.load(catalog.read_bytes(path), SIZE, jpeg_quality=75)
        np.testing.assert_array_equal(compressed.images[row], expected)


def test_a_changed_image_packs_anew(catalog: Catalog) -> None:
    first = ImageStore.pack(catalog, size_px=SIZE)
    changed = plant(catalog.root, {"NORMAL/000.png": picture(99)})
    second = ImageStore.pack(changed, size_px=SIZE)
    assert second.folder != first.folder
    assert_holds(second, changed)


def test_another_decoder_packs_anew_and_refuses_the_old_store(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ImageStore.pack(catalog, size_px=SIZE)
    monkeypatch.setattr(images, "DECODER_VERSION", 999)
    second = ImageStore.pack(catalog, size_px=SIZE)
    assert second.folder != first.folder
    with pytest.raises(StoreError) as caught:
        ImageStore.open(first.folder)
    assert str(caught.value) == f"{first.folder} was packed by decoder 1, this is 999; pack the images again."


def test_the_images_cannot_be_changed_through_the_store(catalog: Catalog) -> None:
    store = ImageStore.pack(catalog, size_px=SIZE)
    assert isinstance(store.images, np.memmap)
    assert not store.images.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        store.images[0, 0, 0] = 1


# --- whole or absent -------------------------------------------------------------------------------------------------


def test_a_pack_that_fails_in_the_middle_leaves_nothing(catalog: Catalog, own_cache: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyError(done)

    with pytest.raises(KeyError):
        ImageStore.pack(catalog, size_px=SIZE, progress=fail)
    assert entries(own_cache) == []
    assert_holds(ImageStore.pack(catalog, size_px=SIZE), catalog)


def test_a_killed_pack_leaves_nothing_that_opens_and_the_next_one_succeeds(catalog: Catalog, own_cache: Path) -> None:
    # killed where all pixels are written and only the manifest is missing
    program = """
import sys, time
from pathlib import Path
from pneumoscope.catalog import Catalog
from pneumoscope.store import ImageStore
def wait(done, total):
    print(done, flush=True)
    time.sleep(600)
ImageStore.pack(Catalog.scan(sys.argv[1]), size_px=int(sys.argv[2]), cache=Path(sys.argv[3]), progress=wait)
"""
    arguments = [sys.executable, "-c", program, str(catalog.root), str(SIZE), str(own_cache)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as packing:
        assert packing.stdout is not None
        assert packing.stdout.readline() == "8\n"
        packing.kill()
    assert packing.returncode == -signal.SIGKILL
    (left,) = entries(own_cache)
    assert left.endswith(".partial")
    with pytest.raises(StoreError, match=r"manifest\.json does not exist"):
        ImageStore.open(own_cache / left)
    store = ImageStore.pack(catalog, size_px=SIZE)
    assert store.folder.name in entries(own_cache)
    assert_holds(store, catalog)


def test_what_an_interrupted_deletion_left_is_packed_anew(catalog: Catalog) -> None:
    folder = ImageStore.pack(catalog, size_px=SIZE).folder
    (folder / "manifest.json").unlink()
    assert_holds(ImageStore.pack(catalog, size_px=SIZE), catalog)
    assert entries(folder) == ["images.npy", "manifest.json"]


def test_of_two_packs_at_once_the_quicker_one_stays_and_both_are_right(catalog: Catalog, own_cache: Path) -> None:
    quicker: list[ImageStore] = []

    def overtake(done: int, total: int) -> None:
        quicker.append(ImageStore.pack(catalog, size_px=SIZE))

    slower = ImageStore.pack(catalog, size_px=SIZE, progress=overtake)
    assert slower.folder == quicker[0].folder
    assert entries(own_cache) == [slower.folder.name]
    for store in (slower, *quicker):
        assert_holds(store, catalog)


def test_an_image_that_changes_after_it_was_listed_is_told(catalog: Catalog, own_cache: Path) -> None:
    (catalog.root / "NORMAL/000.png").write_bytes(picture(99))
    with pytest.raises(StoreError) as caught:
        ImageStore.pack(catalog, size_px=SIZE)
    assert str(caught.value) == ("NORMAL/000.png changed while it was read; wait until it is complete and run again.")
    assert entries(own_cache) == []


def test_an_image_that_vanishes_after_it_was_listed_is_told(catalog: Catalog, own_cache: Path) -> None:
    (catalog.root / "NORMAL/000.png").unlink()
    with pytest.raises(StoreError) as caught:
        ImageStore.pack(catalog, size_px=SIZE)
    assert str(caught.value) == "NORMAL/000.png was listed but is missing now; make it readable and run again."
    assert entries(own_cache) == []


def test_too_little_space_is_told_before_anything_is_written(
    catalog: Catalog, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 8 * SIZE**2  # enough for the pixels, but not for the 5 % above them
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    with pytest.raises(StoreError) as caught:
        ImageStore.pack(catalog, size_px=SIZE)
    assert str(caught.value) == (
        f"Packing the images needs 8.2 kB in {own_cache}, but only 8.2 kB is free; "
        "free some space, or set PNEUMOSCOPE_CACHE to a larger disk."
    )
    assert not own_cache.exists()


def test_a_disk_that_fills_up_all_the_same_is_told(catalog: Catalog, tmp_path: Path) -> None:
    # a quota, or another job, may leave less than the system says is free: a memory map would die of it without a word
    place = tmp_path / "small"
    place.mkdir()
    program = """
import shutil, sys
from pathlib import Path
from types import SimpleNamespace
from pneumoscope.catalog import Catalog
from pneumoscope.errors import StoreError
from pneumoscope.store import ImageStore
shutil.disk_usage = lambda place: SimpleNamespace(free=10**12)
try:
    ImageStore.pack(Catalog.scan(sys.argv[1]), size_px=224, cache=Path(sys.argv[2]))
except StoreError as error:
    print(error, [path.name for path in Path(sys.argv[2]).iterdir()])
"""
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=128k none "$1" && shift && exec "$@"'
    if (
        shutil.which("unshare") is None
        or subprocess.run([*own_mounts, mount, "sh", str(place), "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this system lets a test mount no small disk")
    done = subprocess.run(
        [*own_mounts, mount, "sh", str(place), sys.executable, "-c", program, str(catalog.root), str(place)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Cannot write {place / 'images-'}")
    assert done.stdout.endswith(
        ": No space left on device; free space, or set PNEUMOSCOPE_CACHE to a folder you may write to. []\n"
    )


def test_a_cache_that_cannot_be_written_is_told(catalog: Catalog, own_cache: Path) -> None:
    own_cache.write_text("a file in the way")
    with pytest.raises(StoreError, match=r"^Cannot write .*images-[0-9a-f]{16}: .*; free space, or set PNEUMOSCOPE"):
        ImageStore.pack(catalog, size_px=SIZE)
    assert own_cache.read_text() == "a file in the way"


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_store_without_a_manifest_does_not_open(catalog: Catalog, tmp_path: Path) -> None:
    folder = ImageStore.pack(catalog, size_px=SIZE).folder
    (folder / "manifest.json").unlink()
    for place in (folder, tmp_path / "nowhere"):
        with pytest.raises(StoreError) as caught:
            ImageStore.open(place)
        manifest = place / "manifest.json"
        assert str(caught.value) == f"{manifest} does not exist; run the step that writes it first."


def test_the_manifest_of_something_else_does_not_open(tmp_path: Path) -> None:
    _files.write_json(tmp_path / "manifest.json", {"kind": "features", "views": 1})
    with pytest.raises(StoreError) as caught:
        ImageStore.open(tmp_path)
    assert str(caught.value) == f"{tmp_path} was packed by decoder None, this is 1; pack the images again."


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "other bytes", "header", "archive", "pickle"])
def test_damaged_pixels_do_not_open(catalog: Catalog, damage: str) -> None:
    folder = ImageStore.pack(catalog, size_px=SIZE).folder
    file = folder / "images.npy"
    data = file.read_bytes()
    file.unlink()
    if damage == "pickle":
        np.save(file, np.array([{"code": "could run"}], dtype=object), allow_pickle=True)
    elif damage == "archive":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("images.npy", data)
    elif damage != "missing":
        bad = {"empty": b"", "half": data[: len(data) // 2], "other bytes": b"x" * len(data)}
        file.write_bytes((bad | {"header": data.replace(b"}", b" ", 1)})[damage])
    with pytest.raises(StoreError) as caught:
        ImageStore.open(folder)
    assert str(caught.value).startswith(f"{folder} is damaged (")
    assert str(caught.value).endswith("); delete it and run again.")


@pytest.mark.parametrize(
    ("array", "found"),
    [(np.zeros((7, SIZE, SIZE), np.uint8), "(7, 32, 32)"), (np.zeros((8, SIZE, SIZE), np.float32), "(8, 32, 32)")],
)
def test_pixels_of_another_shape_or_type_do_not_open(
    catalog: Catalog, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], found: str
) -> None:
    folder = ImageStore.pack(catalog, size_px=SIZE).folder
    (folder / "images.npy").unlink()
    np.save(folder / "images.npy", array)
    with pytest.raises(StoreError) as caught:
        ImageStore.open(folder)
    assert str(caught.value) == f"{folder} holds {found} where (8, 32, 32) belongs; delete it and run again."


def test_an_unknown_image_is_told(catalog: Catalog) -> None:
    store = ImageStore.pack(catalog, size_px=SIZE)
    last = "f" * 16  # sorts behind all others
    for strangers in (["0" * 16], [last, "0" * 16]):
        table = pd.concat([catalog.rows()[["image_id"]], pd.DataFrame({"image_id": strangers})])
        with pytest.raises(StoreError) as caught:
            store.rows_of(table)
        assert str(caught.value) == (
            f"{len(strangers)} of {8 + len(strangers)} images are not in {store.folder}; pack this set of images first."
        )


def test_the_manifest_says_what_the_store_holds(catalog: Catalog) -> None:
    store = ImageStore.pack(catalog, size_px=SIZE)
    assert json.loads((store.folder / "manifest.json").read_text()) == {
        "schema_version": 1, "kind": "images", "key": store.key, "size_px": SIZE, "jpeg_quality": 0,
        "decoder": images.DECODER_VERSION,
        "image_ids": store.image_ids.tolist(), "rejected": {},
    }  # fmt: skip
    opened = ImageStore.open(store.folder)
    assert (opened.folder, opened.key, opened.rejected) == (store.folder, store.key, store.rejected)
    np.testing.assert_array_equal(opened.images, store.images)
