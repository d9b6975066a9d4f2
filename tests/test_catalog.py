"""The Catalog: every layout it takes, every file it survives, and the groups it finds."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import pickle
import random
import shutil
import stat
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pneumoscope import _files, images
from pneumoscope._sources import KAGGLE_VAL_IMAGES, Reader
from pneumoscope.catalog import COLUMNS, Catalog
from pneumoscope.errors import DataError, ImageError
from pneumoscope.specs import SplitSpec


def picture(seed: int | str, suffix: str = ".png", *, width_px: int = 7, height_px: int = 5) -> bytes:
    """A tiny grey image whose bytes differ for every seed."""
    shades = np.frombuffer(sha256(str(seed).encode()).digest() * 40, np.uint8)[: width_px * height_px]
    buffer = io.BytesIO()
    kind = {".png": "PNG", ".bmp": "BMP", ".gif": "GIF", ".tif": "TIFF"}.get(suffix.lower(), "JPEG")
    Image.fromarray(shades.reshape(height_px, width_px)).save(buffer, kind)
    return buffer.getvalue()


def vast_png(side_px: int) -> bytes:
    """A PNG of a few bytes whose header claims a large square."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side_px, side_px, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    framed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def plant(root: Path, names: Iterable[str]) -> Path:
    """Write one distinct image under each name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(name, path.suffix))
    return root


def zipped(path: Path, content: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def kaggle_names(n: int = 4) -> list[str]:
    names = []
    for split, start in (("train", 100), ("test", 1)):
        for at in range(start, start + n):
            names += [f"{split}/NORMAL/IM-{at:04}-0001.jpeg", f"{split}/NORMAL/NORMAL2-IM-{at:04}-0001.jpeg"]
            names += [f"{split}/PNEUMONIA/person{at}_{kind}_{at + 3}.jpeg" for kind in ("bacteria", "virus")]
    return names


def column(catalog: Catalog, name: str) -> dict[str, object]:
    return dict(zip(catalog.table["path"], catalog.table[name], strict=True))


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_the_kaggle_layout_is_read_with_its_splits_labels_and_sizes(tmp_path: Path) -> None:
    root = plant(tmp_path / "chest_xray", kaggle_names())
    catalog = Catalog.scan(root)
    assert tuple(catalog.table.columns) == COLUMNS
    assert catalog.root == root
    assert catalog.counts().to_dict("index") == {
        "train": {"NORMAL": 8, "PNEUMONIA": 8, "total": 16},
        "test": {"NORMAL": 8, "PNEUMONIA": 8, "total": 16},
    }
    assert list(catalog.counts().index) == ["train", "test"]
    row = catalog.table.set_index("path").loc["test/PNEUMONIA/person1_virus_4.jpeg"]
    data = picture("test/PNEUMONIA/person1_virus_4.jpeg", ".jpeg")
    assert row.to_dict() == {
        "image_id": sha256(data).hexdigest()[:16], "split": "test", "label": 1, "group": "virus/1", "subtype": "virus",
        "width_px": 7, "height_px": 5, "file_bytes": len(data), "status": "ok",
    }  # fmt: skip
    assert catalog.table["label"].dtype == np.int8
    assert (catalog.ignored, catalog.notes) == ({}, ())
    assert catalog.read_bytes("test/PNEUMONIA/person1_virus_4.jpeg") == data
    catalog.require_learnable()


def test_names_of_splits_and_classes_are_read_in_any_case(tmp_path: Path) -> None:
    names = ["Training/normal/a.PNG", "Training/Pneumonia/b.JPG", "TESTING/Normal/c.Jpeg", "TESTING/PNEUMONIA/d.png"]
    assert list(Catalog.scan(plant(tmp_path / "set", names)).counts()["total"]) == [2, 2]


def test_a_val_folder_of_at_most_16_images_joins_train(tmp_path: Path) -> None:
    val = [f"val/{label}/v{at}.png" for at in range(KAGGLE_VAL_IMAGES // 2) for label in ("NORMAL", "PNEUMONIA")]
    catalog = Catalog.scan(plant(tmp_path / "set", [*kaggle_names(), *val]))
    assert list(catalog.counts()["total"]) == [32, 16]
    assert catalog.notes[0] == (
        "The validation folder's 16 images are too few to steer training; they were added to train."
    )


def test_a_larger_validation_folder_stays_what_it_is(tmp_path: Path) -> None:
    val = [f"valid/{label}/v{at}.png" for at in range(9) for label in ("NORMAL", "PNEUMONIA")]
    catalog = Catalog.scan(plant(tmp_path / "set", [*kaggle_names(), *val]))
    assert list(catalog.counts().index) == ["train", "validation", "test"]
    assert list(catalog.counts()["total"]) == [16, 18, 16]


def test_one_data_set_below_the_folder_given_is_found(tmp_path: Path) -> None:
    plant(tmp_path / "download/archive/chest_xray", kaggle_names())
    catalog = Catalog.scan(tmp_path / "download")
    assert "archive/chest_xray/train/NORMAL/IM-0100-0001.jpeg" in set(catalog.table["path"])
    assert list(catalog.counts()["total"]) == [16, 16]


def test_the_nested_copy_in_the_kaggle_download_is_read_once_and_said(tmp_path: Path) -> None:
    for folder in ("chest_xray", "chest_xray/chest_xray"):
        plant(tmp_path / "download" / folder, kaggle_names())
    macosx = tmp_path / "download/chest_xray/__MACOSX/chest_xray/train/NORMAL"
    macosx.mkdir(parents=True)
    (macosx / "._IM-0100-0001.jpeg").write_bytes(b"resource fork")
    (tmp_path / "download/chest_xray/train/.DS_Store").write_bytes(b"x")
    (tmp_path / "download/chest_xray/train/NORMAL/Thumbs.db").write_bytes(b"x")
    (tmp_path / "download/chest_xray/train/NORMAL/._a.jpeg").write_bytes(b"x")
    (tmp_path / "download/chest_xray/.git").mkdir()
    (tmp_path / "download/chest_xray/.git/a.png").write_bytes(b"x")
    (tmp_path / "download/chest_xray/README.md").write_text("x")
    for given in ("download", "download/chest_xray"):
        catalog = Catalog.scan(tmp_path / given)
        assert list(catalog.counts()["total"]) == [16, 16]
        assert catalog.ignored == {
            "nested copy": 32, "__MACOSX": 1, ".DS_Store": 1, "Thumbs.db": 1, "._*": 1, "hidden files": 1,
            "other files": 1,
        }  # fmt: skip
        assert catalog.notes == ("32 files of a nested copy of the data were left out.",)


def test_two_data_sets_in_one_folder_are_refused(tmp_path: Path) -> None:
    plant(tmp_path / "data/a", kaggle_names())
    plant(tmp_path / "data/b", ["NORMAL/x.png", "PNEUMONIA/y.png"])
    with pytest.raises(DataError) as caught:
        Catalog.scan(tmp_path / "data")
    assert str(caught.value) == f"{tmp_path / 'data'} holds 2 data sets, in 'a', 'b'; give the folder of one of them."


def test_a_zip_gives_the_same_catalog_as_its_folder_and_is_never_unpacked(tmp_path: Path) -> None:
    root = plant(tmp_path / "plain/chest_xray", kaggle_names())
    content = {f"chest_xray/{name}": (root / name).read_bytes() for name in kaggle_names()}
    archive = zipped(tmp_path / "kaggle.zip", content | {"__MACOSX/chest_xray/train/NORMAL/._x.jpeg": b"x"})
    before = sorted(tmp_path.rglob("*"))
    catalog, plain = Catalog.scan(archive), Catalog.scan(tmp_path / "plain")
    assert catalog.ignored == {"__MACOSX": 1}
    assert set(catalog.table["path"]) == {f"kaggle.zip!/{path}" for path in plain.table["path"]}
    shared = [name for name in COLUMNS if name != "path"]
    pd.testing.assert_frame_equal(catalog.table[shared], plain.table[shared])
    paths = list(catalog.table["path"]) * 5
    with ThreadPoolExecutor(8) as pool:
        read = dict(zip(paths, pool.map(catalog.read_bytes, paths), strict=True))
    assert read == {f"kaggle.zip!/{name}": data for name, data in content.items()}
    assert sorted(tmp_path.rglob("*")) == before


def test_an_archive_is_opened_anew_in_each_thread_and_when_it_was_replaced(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"NORMAL/a.png": picture(1)})
    reader = Reader()
    mine = reader.archive(path)
    assert reader.archive(path) is mine
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(reader.archive, path).result() is not mine
    zipped(path, {"NORMAL/b.png": picture(2), "NORMAL/a.png": picture(3)})
    assert reader.read(tmp_path, "a.zip!/NORMAL/a.png") == picture(3)


def test_mendeley_names_tell_patient_and_subtype(tmp_path: Path) -> None:
    names = ["NORMAL-1049278-0001", "BACTERIA-1008087-0001", "BACTERIA-1008087-0002", "VIRUS-30629-0001"]
    folders = ["NORMAL", "PNEUMONIA", "PNEUMONIA", "PNEUMONIA"]
    root = plant(tmp_path / "set", [f"train/{folder}/{name}.jpeg" for folder, name in zip(folders, names, strict=True)])
    table = Catalog.scan(root).table.sort_values("label", kind="stable")
    assert list(table["group"]) == ["NORMAL/1049278", "bacteria/1008087", "bacteria/1008087", "virus/30629"]
    assert list(table["subtype"]) == ["", "bacteria", "bacteria", "virus"]


@pytest.mark.parametrize(
    ("name", "group", "subtype"),
    [
        ("person12_virus_34", "virus/12", "virus"),
        ("person012_bacteria_34", "bacteria/12", "bacteria"),
        ("person447_virus_921_1", "virus/447", "virus"),
        ("person100_bacteria_475", "bacteria/100", "bacteria"),
        ("IM-0115-0001", "IM/115", ""),
        ("IM-0439-0001-0001", "IM/439", ""),
        ("NORMAL2-IM-0383-0001", "NORMAL2-IM/383", ""),
        ("NORMAL2-IM-1440-0001-0002", "NORMAL2-IM/1440", ""),
        ("scan 7", "file/PNEUMONIA/scan 7.png", ""),
        ("person12", "file/PNEUMONIA/person12.png", ""),
    ],
)
def test_the_group_is_the_patient_as_far_as_the_name_tells(tmp_path: Path, name: str, group: str, subtype: str) -> None:
    root = plant(tmp_path / "set", [f"PNEUMONIA/{name}.png", "NORMAL/n.png"])
    row = Catalog.scan(root).table.set_index("path").loc[f"PNEUMONIA/{name}.png"]
    assert (row["group"], row["subtype"]) == (group, subtype)


def test_a_long_run_of_digits_in_an_archive_is_a_group_like_any_other(tmp_path: Path) -> None:
    digits = "9" * 5000  # more than int() takes
    archive = zipped(tmp_path / "a.zip", {f"NORMAL/IM-{digits}-1.png": picture(1), "PNEUMONIA/a.png": picture(2)})
    assert f"IM/{digits}" in set(Catalog.scan(archive).table["group"])


def test_unknown_names_are_their_own_groups_and_are_counted_in_a_note(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", ["NORMAL/a.png", "NORMAL/IM-0001-0001.png", "PNEUMONIA/b.png"])
    assert Catalog.scan(root).notes == ("2 of 3 names tell no patient; each of these images is its own group.",)


def test_a_data_set_may_be_named_like_a_class_and_hold_its_splits_inside_the_classes(tmp_path: Path) -> None:
    plain = plant(tmp_path / "x/pneumonia", ["NORMAL/a.png", "PNEUMONIA/b.png", "PNEUMONIA/virus/c.png"])
    assert column(Catalog.scan(plain.parent), "label") == {
        "pneumonia/NORMAL/a.png": 0, "pneumonia/PNEUMONIA/b.png": 1, "pneumonia/PNEUMONIA/virus/c.png": 1,
    }  # fmt: skip
    inner = plant(tmp_path / "y", ["NORMAL/train/a.png", "NORMAL/test/b.png", "PNEUMONIA/train/c.png"])
    assert list(Catalog.scan(inner).table["split"]) == ["test", "train", "train"]
    deep = plant(tmp_path / "z", ["train/NORMAL/no pneumonia/a.png", "train/NORMAL/pneumonia/b.png"])
    assert list(Catalog.scan(deep).table["label"]) == [0, 0]


# --- manifests and arrays --------------------------------------------------------------------------------------------


def manifest(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_manifest_gives_labels_splits_and_groups(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", ["images/a.png", "images/person5_virus_1.png", "images/c.png"])
    plant(tmp_path, ["elsewhere/d.png"])
    text = "\ufeffPath,Label,split,group,remark\nimages/a.png,normal,train,anna,x\n"
    text += f"images/person5_virus_1.png,1,Val,\n{root / 'images/c.png'},PNEUMONIA,test,carl\n"
    text += f"{tmp_path / 'elsewhere/d.png'},sick,,dora\nimages/gone.png,0,test,\n"
    catalog = Catalog.scan(manifest(root / "list.csv", text), classes={"Sick": "PNEUMONIA"})
    table = catalog.table
    outside = f"{tmp_path}/elsewhere/d.png"
    assert list(table["path"]) == [
        "images/a.png",
        "images/person5_virus_1.png",
        "images/c.png",
        outside,
        "images/gone.png",
    ]
    assert list(table["label"]) == [0, 1, 1, 1, 0]
    assert list(table["split"]) == ["train", "validation", "test", "train", "test"]
    assert list(table["group"]) == ["anna", "virus/5", "carl", "dora", "file/images/gone.png"]
    assert list(table["status"]) == ["ok"] * 4 + ["missing"]
    assert [len(catalog.read_bytes(path)) for path in catalog.rows()["path"]] == list(catalog.rows()["file_bytes"])
    with pytest.raises(ImageError, match=r"There is no 'images/gone\.png' in "):
        catalog.read_bytes("images/gone.png")


def test_a_manifest_wins_over_names_and_a_guarded_cell_is_freed(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", ["person5_virus_1.png", "person6_virus_1.png"])
    text = "path,label,group\nperson5_virus_1.png,NORMAL,'=x\nperson6_virus_1.png,PNEUMONIA,\n"
    table = Catalog.scan(manifest(root / "list.csv", text)).table
    assert list(table["group"]) == ["=x", "virus/6"]
    assert list(table["subtype"]) == ["", "virus"]


def test_bad_rows_of_a_manifest_are_named_with_their_lines(tmp_path: Path) -> None:
    text = 'path,label,split\na.png,NORMAL,train\n,NORMAL,train\n\nb.png,ill,train\n"c\nd.png",1,later\n./a.png,1,\n'
    path = manifest(tmp_path / "list.csv", text)
    with pytest.raises(DataError) as caught:
        Catalog.scan(path)
    assert str(caught.value) == (
        f"{path} has bad rows: line 3 has no path; line 5 has the label 'ill'; line 7 has the split 'later'; "
        "line 8 repeats the path of line 2; each needs a path of its own, the label NORMAL, PNEUMONIA, 0, 1 or a name "
        "in data.classes, and the split train, validation, calibration, test or none."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with ''; the columns path,label[,split,group] were expected."),
        (b"file;class\n", "begins with 'file;class'; the columns path,label[,split,group] were expected."),
        (b"path,label\n", "lists no images; add rows with the columns path,label[,split,group]."),
        (b"path,label\n\xff,0\n", "cannot be read as a UTF-8 CSV file"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError) as caught:
        Catalog.scan(tmp_path / "list.csv")
    assert message in str(caught.value)


def medmnist(path: Path, **changes: object) -> Path:
    rng = np.random.RandomState(0)
    arrays: dict[str, object] = {}
    for short, n in (("train", 12), ("val", 4), ("test", 6)):
        arrays[f"{short}_images"] = rng.randint(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{short}_labels"] = (np.arange(n) % 2).astype(np.uint8).reshape(n, 1)
    np.savez_compressed(path, **(arrays | changes))  # type: ignore[arg-type]
    return path


def test_medmnist_keeps_its_own_splits_and_labels(tmp_path: Path) -> None:
    path = medmnist(tmp_path / "pneumoniamnist.npz")
    catalog = Catalog.scan(path)
    assert list(catalog.counts()["total"]) == [12, 4, 6]
    assert list(catalog.counts()["PNEUMONIA"]) == [6, 2, 3]
    assert catalog.table["path"].iloc[11] == "pneumoniamnist.npz#train/11"
    with np.load(path) as arrays:
        for row in ("train", "val", "test"):
            name = {"val": "validation"}.get(row, row)
            data = catalog.read_bytes(f"pneumoniamnist.npz#{name}/3")
            assert (images.decode(data) == arrays[f"{row}_images"][3]).all()
    assert column(catalog.split(SplitSpec(), seed=0), "split") == column(catalog, "split")
    copy = pickle.loads(pickle.dumps(catalog))
    assert copy.read_bytes("pneumoniamnist.npz#test/0") == catalog.read_bytes("pneumoniamnist.npz#test/0")
    with pytest.raises(ImageError, match=r"There is no 'pneumoniamnist\.npz#test/6'"):
        catalog.read_bytes("pneumoniamnist.npz#test/6")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.full(12, 3)}, "with 12 labels of the values [3]; uint8 (n, height, width) with n labels"),
        ({"val_images": np.zeros((3, 28, 28), np.uint8)}, "holds val_images uint8 (3, 28, 28) with 4 labels"),
        ({"test_images": np.zeros((6, 28, 28))}, "the array test_images claims float64 (6, 28, 28); integers"),
        ({"test_images": np.asarray([{}] * 6)}, "the array test_images claims object (6,); integers"),
    ],
)
def test_array_files_of_another_kind_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError) as caught:
        Catalog.scan(medmnist(tmp_path / "x.npz", **changes))
    assert message in str(caught.value)


def test_an_array_that_claims_more_than_the_file_holds_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 28, 28)})
    path = zipped(tmp_path / "x.npz", {"train_images.npy": header.getvalue()})
    with pytest.raises(
        DataError, match=r"train_images claims uint8 \(1000000000, 28, 28\); integers that the file real"
    ):
        Catalog.scan(path)


@pytest.mark.parametrize(
    ("kind", "shape"), [("()", "(2, 8, 8)"), ("'|u1'", "(True, 8, 8)"), ("'|u1'", f"({10**30}, 0, 8)")]
)
def test_an_array_whose_header_numpy_stumbles_over_is_refused(tmp_path: Path, kind: str, shape: str) -> None:
    words = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(words)) + words.encode() + bytes(128)
    path = zipped(tmp_path / "x.npz", {"train_images.npy": array})
    with pytest.raises(DataError, match=r"x\.npz cannot be read as an array file \(.*\); get it again\."):
        Catalog.scan(path)


def test_the_array_that_was_looked_at_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    path = medmnist(tmp_path / "x.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_images", b"what numpy would give under the shorter name")
    assert len(Catalog.scan(path).table) == 22


@pytest.mark.parametrize("content", [b"", b"no array file"])
def test_a_broken_array_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz cannot be read as an array file \(.*\); get it again\."):
        Catalog.scan(tmp_path / "x.npz")


def test_an_array_file_without_the_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", pixels=np.zeros(3))
    with pytest.raises(DataError, match="has no array train_images; train, val and test images and labels were exp"):
        Catalog.scan(tmp_path / "x.npz")


# --- what is refused, and how it is said -----------------------------------------------------------------------------


def refusal(data: Path | str, classes: Mapping[str, str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        Catalog.scan(data, classes=classes)
    return str(caught.value)


EXPECTED = "train/ and test/ that each hold NORMAL/ and PNEUMONIA/, or those two folders alone, were expected."


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == f"There is no file or folder '{tmp_path}/nowhere'; check the path."


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = manifest(tmp_path / "data.tar", "x")
    assert refusal(path) == f"{path} is neither a folder nor a .zip, .csv or .npz file; {EXPECTED}"


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    assert refusal(tmp_path / "set") == (
        f"{tmp_path}/set holds no images (found nothing; linked folders are not entered); {EXPECTED}"
    )
    (tmp_path / "set/list.txt").write_text("x")
    assert "(found 1 other files; linked" in refusal(tmp_path / "set")
    (tmp_path / "set/chest.zip").write_bytes(b"x")
    assert refusal(tmp_path / "set") == f"{tmp_path}/set holds no images but 'chest.zip'; give that file."


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", ["a.png", "train/b.png"])
    assert refusal(root) == f"{root} has no class folder for its 2 images; {EXPECTED}"


def test_a_class_folder_alone_is_refused(tmp_path: Path) -> None:
    root = plant(tmp_path / "set/Normal", ["a.png"])
    assert refusal(root) == f"{root} is the class folder Normal alone for its 1 images; {EXPECTED}"


def test_the_train_folder_of_a_larger_set_is_refused_and_its_test_folder_is_test(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", kaggle_names())
    assert refusal(root / "train") == (
        f"{root}/train is only the train part of a data set that has 'test' too; give the folder above it, {root}."
    )
    catalog = Catalog.scan(root / "test")
    assert catalog.notes == ("test is a test folder: its images are the test split.",)
    assert list(catalog.counts().index) == ["test"]
    shutil.rmtree(root / "test")
    assert list(Catalog.scan(root / "train").counts().index) == ["train"]


def test_an_unknown_folder_is_named_not_guessed(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", ["NORMAL/a.png", "PNEUMONIA/b.png", "COVID 19/c.png", "COVID 19/d.png"])
    assert refusal(root) == (
        f"{root} holds images in folders of unknown class: 'COVID 19' (2 images); NORMAL and PNEUMONIA are known, so "
        "say what the others mean with --set 'data.classes.COVID 19=NORMAL' (or =PNEUMONIA)."
    )
    catalog = Catalog.scan(root, classes={"covid 19": "PNEUMONIA"})
    assert catalog.counts().loc["train"].to_dict() == {"NORMAL": 1, "PNEUMONIA": 3, "total": 4}


def test_other_peoples_class_folders_are_mapped(tmp_path: Path) -> None:
    names = [f"{split}/{name}/{at}.png" for split in ("train", "test") for name in ("healthy", "sick") for at in (1, 2)]
    root = plant(tmp_path / "set", names)
    assert "'healthy' (4 images), 'sick' (4 images); NORMAL and" in refusal(root)
    assert "--set data.classes.healthy=NORMAL" in refusal(root)
    assert "'sick' (4 images)" in refusal(root, {"healthy": "NORMAL"})
    catalog = Catalog.scan(root, classes={"Healthy": "NORMAL", "SICK": "PNEUMONIA"})
    assert catalog.counts().to_numpy().tolist() == [[2, 2, 4], [2, 2, 4]]
    assert column(catalog, "label")["test/sick/1.png"] == 1
    assert refusal(root, {"healthy": "WELL"}) == "data.classes.healthy is 'WELL'; NORMAL or PNEUMONIA was expected."


def test_six_unknown_folders_are_named_in_part(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", [f"class{at}/a.png" for at in range(6)])
    assert "'class4' (1 images) and 1 more; NORMAL" in refusal(root)


def test_pictures_beside_the_class_folders_are_counted_and_said(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", [*kaggle_names(), "docs/figure.png", "cover.png", "train/loose.png"])
    catalog = Catalog.scan(root)
    assert catalog.ignored == {"images outside class folders": 3}
    assert catalog.notes == ("3 images lie in no class folder and were left out.",)


def test_one_class_or_no_readable_image_cannot_be_learned_from(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", ["NORMAL/a.png", "NORMAL/b.png"])
    (root / "PNEUMONIA").mkdir()
    with pytest.raises(DataError) as caught:
        Catalog.scan(root).require_learnable()
    assert str(caught.value) == (
        f"The train images of {root} hold no usable PNEUMONIA image (2 images in all), but a model learns from both "
        "classes; add images, or name their folder in data.classes."
    )
    for name in ("a", "b"):
        (root / f"NORMAL/{name}.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        Catalog.scan(root).require_learnable()
    found = "can be used (empty file: 2)"
    assert str(caught.value) == f"No image in {root} {found}; JPEG, PNG and DICOM images are expected."


def test_a_test_split_alone_or_an_empty_class_in_validation_cannot_be_learned_from(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", ["test/NORMAL/a.png", "test/PNEUMONIA/b.png"])
    with pytest.raises(DataError, match=r"^The train images of .* hold no usable NORMAL image \(0 images in all\)"):
        Catalog.scan(root).require_learnable()
    lines = ["path,label,split"] + [f"test/NORMAL/a.png,{label},{split}" for label, split in ((0, "val"),)]
    plant(root, ["c.png", "d.png"])
    path = manifest(root / "list.csv", "\n".join([*lines, "c.png,0,train", "d.png,1,train"]))
    with pytest.raises(DataError, match=r"^The validation images of .* hold no usable PNEUMONIA image \(1 images"):
        Catalog.scan(path).require_learnable()


def test_folders_that_cannot_be_read_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = plant(tmp_path / "set", ["NORMAL/a.png", "NORMAL/locked/b.png", "PNEUMONIA/c.png"])
    listed = os.scandir

    def guarded(path: Path) -> object:  # root may read every folder, so the refusal is made here
        if path.name in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", guarded)
    closed = {"locked"}
    catalog = Catalog.scan(root)
    assert len(catalog.table) == 2
    assert (catalog.ignored, catalog.notes[0]) == ({"unreadable folders": 1}, "1 folders could not be read.")
    closed = {"set"}
    assert refusal(root).endswith(f"Permission denied: '{root}'); check the path and its permissions.")


# --- hostile archives and files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../NORMAL/a.png", "/NORMAL/a.png", "C:/NORMAL/a.png", "NORMAL/../../a.png"])
def test_an_archive_whose_names_climb_out_is_refused(tmp_path: Path, name: str) -> None:
    archive = zipped(tmp_path / "a.zip", {name: picture(1), "PNEUMONIA/b.png": picture(2)})
    assert refusal(archive) == f"{archive} holds the entry {name!r}, which points outside it; do not use this archive."


def test_an_archive_with_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("NORMAL/a.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert "holds the symbolic link 'NORMAL/a.png'; unpack it yourself" in refusal(tmp_path / "a.zip")


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    assert "a.zip cannot be read as a .zip (File is not a zip file); get it again." in refusal(
        manifest(tmp_path / "a.zip", "no archive")
    )


def test_an_archive_with_an_entry_of_a_later_zip_version_is_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {"NORMAL/a.png": picture(1), "PNEUMONIA/b.png": picture(2)})
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\x01\x02") + 6] = 99  # the version that it takes to unpack the first
    archive.write_bytes(data)
    assert refusal(archive) == f"{archive} cannot be read as a .zip (zip file version 9.9); get it again."


def test_damaged_and_encrypted_members_are_quarantined(tmp_path: Path) -> None:
    good, bad = picture("good"), picture("bad")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:  # stored, so that the bytes can be found
        archive.writestr("NORMAL/good.png", good)
        archive.writestr("PNEUMONIA/bad.png", bad)
        archive.writestr("PNEUMONIA/locked.png", picture("locked"))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(bad) + 30] ^= 0xFF
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # set the encryption bit of the third member
        at = -1
        for _ in range(3):
            at = data.index(signature, at + 1)
        data[at + flags] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    assert column(Catalog.scan(tmp_path / "a.zip"), "status") == {
        "a.zip!/NORMAL/good.png": "ok",
        "a.zip!/PNEUMONIA/bad.png": "unreadable",
        "a.zip!/PNEUMONIA/locked.png": "unsupported archive",
    }


def test_an_entry_named_twice_is_read_once(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("NORMAL/a.png", picture(1))
        archive.writestr("PNEUMONIA/b.png", picture(2))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("NORMAL/a.png", picture(3))
    catalog = Catalog.scan(tmp_path / "a.zip")
    assert len(catalog.table) == 2
    assert catalog.ignored == {"repeated entries": 1}


def test_a_huge_member_is_quarantined_without_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "MAX_MEMBER_BYTES", 1000)
    archive = zipped(tmp_path / "a.zip", {"NORMAL/a.png": b"\0" * 1001, "PNEUMONIA/b.png": picture(1)})
    assert list(Catalog.scan(archive).table["status"]) == ["too large", "ok"]


def test_every_unusable_file_is_quarantined_with_its_reason(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", ["NORMAL/ok.jpeg", "NORMAL/foreign.bmp", "NORMAL/foreign.gif", "PNEUMONIA/ok.png"])
    (root / "NORMAL/empty.jpeg").write_bytes(b"")
    (root / "NORMAL/page.jpeg").write_text("<html>not found</html>")
    (root / "NORMAL/paper.jpg").write_bytes(b"%PDF-1.7")
    (root / "NORMAL/film.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 100)
    (root / "NORMAL/cut.png").write_bytes(picture(1)[:20])
    (root / "NORMAL/vast.png").write_bytes(vast_png(30_000))
    with (root / "NORMAL/huge.png").open("wb") as file:
        file.truncate(_files.MAX_MEMBER_BYTES + 1)  # sparse: takes no room
    os.mkfifo(root / "NORMAL/fifo.jpeg")
    catalog = Catalog.scan(root)
    assert {path.rpartition("/")[2]: status for path, status in column(catalog, "status").items()} == {
        "ok.jpeg": "ok", "ok.png": "ok",
        "foreign.bmp": "unsupported format BMP", "foreign.gif": "unsupported format GIF",
        "empty.jpeg": "empty file", "page.jpeg": "not an image", "paper.jpg": "unsupported format PDF",
        "film.dcm": "no pixels", "cut.png": "damaged", "vast.png": "too large",
        "huge.png": "too large", "fifo.jpeg": "not a regular file",
    }  # fmt: skip
    assert len(catalog.quarantined()) == 10
    pd.testing.assert_frame_equal(catalog.quarantine({"": "never read, so never decoded"}).table, catalog.table)
    assert list(catalog.rows()["path"]) == ["NORMAL/ok.jpeg", "PNEUMONIA/ok.png"]
    for name, reason in (("fifo.jpeg", "not a regular file"), ("huge.png", "too large")):
        with pytest.raises(ImageError, match=reason):
            catalog.read_bytes(f"NORMAL/{name}")


def test_what_decoding_finds_is_quarantined_by_content(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", kaggle_names())
    whole = picture("large", ".jpeg", width_px=30, height_px=30)
    for name in ("a", "b"):
        (root / f"train/NORMAL/{name}.jpeg").write_bytes(whole[:-60])
    catalog = Catalog.scan(root)
    row = catalog.table.set_index("path").loc["train/NORMAL/a.jpeg"]
    assert row["status"] == "ok"
    with pytest.raises(ImageError) as caught:
        images.decode(catalog.read_bytes("train/NORMAL/a.jpeg"))
    after = catalog.quarantine({str(row["image_id"]): caught.value.reason, "": "never", "0" * 16: "unknown"})
    assert list(after.quarantined()["path"]) == ["train/NORMAL/a.jpeg", "train/NORMAL/b.jpeg"]
    assert set(after.quarantined()["status"]) == {"truncated"}
    assert after.counts().loc["train", "total"] == 16
    assert after.content_hash != catalog.content_hash
    assert len(catalog.quarantined()) == 0


def test_content_decides_and_a_misleading_name_is_noted(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", ["NORMAL/IM-1-1.jpeg", "PNEUMONIA/person1_virus_1.png"])
    (root / "NORMAL/IM-2-1.jpeg").write_bytes(picture(1, ".png"))
    catalog = Catalog.scan(root)
    assert set(catalog.table["status"]) == {"ok"}
    assert catalog.notes == ("1 files hold another format than their name says; they were read by their content.",)


def test_links_out_of_the_folder_and_loops_are_never_followed(tmp_path: Path) -> None:
    plant(tmp_path, ["outside/NORMAL/secret.png"])
    root = plant(tmp_path / "set", ["NORMAL/a.png", "PNEUMONIA/b.png"])
    (root / "NORMAL/inside.png").symlink_to(root / "NORMAL/a.png")
    (root / "NORMAL/out.png").symlink_to(tmp_path / "outside/NORMAL/secret.png")
    (root / "NORMAL/gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "NORMAL/self.png").symlink_to("self.png")
    (root / "NORMAL/up").symlink_to(root, target_is_directory=True)
    (root / "more").symlink_to(tmp_path / "outside", target_is_directory=True)
    (tmp_path / "alias").symlink_to(root, target_is_directory=True)
    for given in (root, tmp_path / "alias"):
        catalog = Catalog.scan(given)
        assert column(catalog, "status") == {
            "NORMAL/a.png": "ok", "NORMAL/inside.png": "ok", "PNEUMONIA/b.png": "ok",
            "NORMAL/out.png": "link out of the folder",
            "NORMAL/gone.png": "broken link", "NORMAL/self.png": "broken link",
        }  # fmt: skip
        assert catalog.ignored == {"linked folders": 2}
        assert "2 folders are links and were not entered." in catalog.notes
    (tmp_path / "loop").symlink_to("loop")
    assert "There is no file or folder" in refusal(tmp_path / "loop")


HOSTILE = [
    "line\nbreak.png", "return\r\nfeed.png", "\x1b[31mred\x1b[0m.png", "<script>alert(1)</script>.png", 'quo"te,.png',
    "'apostrophe.png", "back\\udc80slash.png", "x" * 251 + ".png",
    b"not-utf8-\xff\xfe.png".decode("utf-8", "surrogateescape"),
]  # fmt: skip
FORMULAS = ["=1+1", "+cmd", "-2", "@sum", "'quoted", "\ttab"]


def test_hostile_names_are_read_written_as_utf8_and_read_back(tmp_path: Path) -> None:
    names = [f"{folder}/{name}" for folder in ("NORMAL", "PNEUMONIA") for name in HOSTILE]
    root = tmp_path / "set"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(repr(name)))
    catalog = Catalog.scan(root)
    assert set(catalog.table["status"]) == {"ok"}
    assert {catalog.read_bytes(path) for path in catalog.table["path"]} == {picture(repr(name)) for name in names}
    assert "NORMAL/not-utf8-\\udcff\\udcfe.png" in set(catalog.table["path"])
    catalog.write(tmp_path / "catalog.csv")
    (tmp_path / "catalog.csv").read_bytes().decode("utf-8")
    again = Catalog.read(tmp_path / "catalog.csv", root=root)
    pd.testing.assert_frame_equal(again.table, catalog.table)
    assert again.content_hash == catalog.content_hash
    assert all(again.read_bytes(path) for path in again.table["path"])


def test_names_that_look_like_formulas_stay_readable_and_no_spreadsheet_runs_them(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", [f"{name}.png" for name in FORMULAS])
    with (root / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group"])
        writer.writerows([f"{name}.png", at % 2, name] for at, name in enumerate(FORMULAS))
    catalog = Catalog.scan(root / "list.csv")
    assert set(catalog.table["status"]) == {"ok"}
    assert list(catalog.table["path"]) == [f"./{name}.png" for name in FORMULAS]
    catalog.write(tmp_path / "catalog.csv")
    with (tmp_path / "catalog.csv").open(newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    again = Catalog.read(tmp_path / "catalog.csv", root=root)
    pd.testing.assert_frame_equal(again.table, catalog.table)
    assert list(again.table["group"]) == [name.strip() for name in FORMULAS]


@pytest.mark.parametrize("change", ["header", "cells", "number", "range"])
def test_a_table_that_is_no_catalog_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "catalog.csv"
    Catalog.scan(plant(tmp_path / "set", kaggle_names())).write(path)
    text = path.read_text()
    path.write_text({
        "header": text.replace("image_id", "id", 1), "cells": text + "a,b\n", "number": text.replace(",7,5,", ",7,x,"),
        "range": text.replace(",train,0,", ",train,1000,"),
    }[change])  # fmt: skip
    with pytest.raises(DataError, match=r"is not a catalog.*; scan the data anew\."):
        Catalog.read(path, root=tmp_path)
    with pytest.raises(DataError, match="cannot be read as a UTF-8 CSV file"):
        Catalog.read(tmp_path / "none.csv", root=tmp_path)


def test_progress_is_told_once_for_each_file(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    Catalog.scan(plant(tmp_path / "set", kaggle_names(2)), progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 16) for done in range(1, 17)]


# --- groups, order, memory -------------------------------------------------------------------------------------------


def test_groups_that_share_an_identical_image_are_one_named_by_the_smallest(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", kaggle_names(3))
    same, other = picture("same", ".jpeg"), picture("other", ".jpeg")
    for name, data in {
        "NORMAL2-IM-0095-0001": same,
        "NORMAL2-IM-0096-0001": same,
        "NORMAL2-IM-0096-0002": other,
    }.items():
        (root / f"train/NORMAL/{name}.jpeg").write_bytes(data)
    (root / "train/NORMAL/NORMAL2-IM-0097-0001.jpeg").write_bytes(other)
    for name in ("IM-0900-0001", "IM-0901-0001"):
        (root / f"train/NORMAL/{name}.jpeg").write_bytes(b"")  # empty files are alike, which says nothing of patients
    catalog = Catalog.scan(root)
    groups = column(catalog, "group")
    joined = [groups[f"train/NORMAL/NORMAL2-IM-00{name}.jpeg"] for name in ("95-0001", "96-0001", "96-0002", "97-0001")]
    assert joined == ["NORMAL2-IM/95"] * 4
    assert groups["train/NORMAL/IM-0901-0001.jpeg"] == "IM/901"
    assert catalog.notes == ("2 groups share identical images with another group and were joined to it.",)


def test_files_are_read_in_blocks_and_every_row_keeps_its_own_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = plant(tmp_path / "set", kaggle_names())
    (root / "train/NORMAL/empty.png").write_bytes(b"")
    whole = Catalog.scan(root)
    monkeypatch.setattr("pneumoscope.catalog._BLOCK", 7)  # 33 files: four blocks and a part of one
    told: list[tuple[int, int]] = []
    blocks = Catalog.scan(root, progress=lambda done, total: told.append((done, total)))
    pd.testing.assert_frame_equal(blocks.table, whole.table)
    assert told == [(done, 33) for done in range(1, 34)]
    for row in blocks.rows().itertuples():
        assert sha256((root / str(row.path)).read_bytes()).hexdigest().startswith(str(row.image_id))


def test_a_scan_takes_little_more_memory_than_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pneumoscope.catalog._BLOCK", 64)

    def peak(n: int) -> int:
        pixels = np.arange(n * 4, dtype=np.uint64).view(np.uint8).reshape(n, 8, 4)
        changes = {"train_images": pixels, "train_labels": np.arange(n, dtype=np.uint8) % 2}
        path = medmnist(tmp_path / f"{n}.npz", **changes)
        peaks = []
        for _ in range(2):  # now and then the interpreter enlarges a table of its own
            tracemalloc.start()
            try:
                assert set(Catalog.scan(path).table["status"]) == {"ok"}
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
        return min(peaks)

    # measured: 570 bytes an image, 300 of them the table; a Future and a dictionary for each image take 2,200
    assert (peak(800) - peak(200)) / 600 < 1000


def test_marking_images_leaves_the_catalog_it_began_with_as_it_was(tmp_path: Path) -> None:
    catalog = Catalog.scan(plant(tmp_path / "set", kaggle_names()))
    before = catalog.table.copy()
    bad = str(catalog.table["image_id"].iloc[3])
    marked = catalog.quarantine({bad: "truncated"})
    divided = catalog.split(SplitSpec(), seed=1)
    assert list(marked.quarantined()["image_id"]) == [bad]
    assert "validation" in set(divided.table["split"])
    pd.testing.assert_frame_equal(catalog.table, before)
    assert [str(kind) for kind in marked.table.dtypes] == [str(kind) for kind in before.dtypes]


def test_the_scan_does_not_depend_on_the_order_of_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = plant(tmp_path / "set", kaggle_names())
    catalog = Catalog.scan(root)
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: shuffled(listed(path)))
    pd.testing.assert_frame_equal(Catalog.scan(root).table, catalog.table)


@contextlib.contextmanager
def shuffled(entries: Iterable[os.DirEntry[str]]) -> Iterator[list[os.DirEntry[str]]]:
    found = sorted(entries, key=lambda entry: entry.name)
    random.Random(5).shuffle(found)
    yield found


# --- the real data ---------------------------------------------------------------------------------------------------


def test_the_real_x_rays_are_counted_and_grouped(real_data: Path) -> None:
    catalog = Catalog.scan(real_data / "chest_xray")
    assert catalog.counts().to_dict("index") == {
        "train": {"NORMAL": 1080, "PNEUMONIA": 3501, "total": 4581},
        "test": {"NORMAL": 269, "PNEUMONIA": 382, "total": 651},
    }
    assert (set(catalog.table["status"]), catalog.ignored) == ({"ok"}, {})
    assert not catalog.table["group"].str.startswith("file/").any()
    assert set(catalog.table["width_px"]) == set(catalog.table["height_px"]) == {224}
    assert catalog.table.groupby("image_id")["group"].nunique().max() == 1
    catalog.require_learnable()


def test_the_originals_come_without_splits_and_in_every_size(real_data: Path) -> None:
    catalog = Catalog.scan(real_data / "full_resolution")
    assert catalog.counts()["total"].to_dict() == {"train": 109}
    assert catalog.table["width_px"].max() > 2000
