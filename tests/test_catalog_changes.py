"""What changed between two Catalogs of one data set, said in words."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pneumoscope.catalog import Catalog
from pneumoscope.phantom import write_dataset
from pneumoscope.specs import SplitSpec


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    data = write_dataset(tmp_path_factory.mktemp("data") / "tiny", n_train=24, n_test=8, seed=1, size_px=64)
    return scanned(data)


def scanned(data: Path) -> Catalog:
    return Catalog.scan(data).split(SplitSpec(), seed=42)


def altered(catalog: Catalog, rows: list[int], **cells: Any) -> Catalog:
    table = catalog.table.copy()
    for name, value in cells.items():
        table.loc[rows, name] = value
    return replace(catalog, table=table)


def test_the_same_images_differ_in_nothing(before: Catalog, tmp_path: Path) -> None:
    before.write(tmp_path / "catalog.csv")
    read = Catalog.read(tmp_path / "catalog.csv", root=before.root)
    shuffled = replace(before, table=before.table.sample(frac=1, random_state=0))
    for other in (before, scanned(before.root), read, shuffled):
        assert before.changes_from(other) == other.changes_from(before) == ""


def test_images_that_came_or_went_are_counted_and_the_first_is_named(before: Catalog) -> None:
    paths = list(before.table["path"])
    fewer = replace(before, table=before.table.drop(index=[0, 7, 9]))
    assert before.changes_from(fewer) == f"3 added ({paths[0]})"
    assert fewer.changes_from(before) == f"3 removed ({paths[0]})"
    renamed = altered(before, [4], path="train/NORMAL/new.jpeg")
    assert renamed.changes_from(before) == f"1 added (train/NORMAL/new.jpeg), 1 removed ({paths[4]})"
    many = replace(
        before, table=pd.concat([before.table.assign(path=before.table["path"] + str(n)) for n in range(50)])
    )
    assert many.changes_from(before) == f"{50 * len(paths):,} added ({paths[0]}0), {len(paths)} removed ({paths[0]})"


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("image_id", "0" * 16, "with another content"),
        ("split", "calibration", "with another split"),
        ("group", "virus/999", "with another group"),
        ("status", "truncated", "with another status"),
    ],
)
def test_images_that_became_something_else_are_counted(before: Catalog, column: str, value: str, said: str) -> None:
    now = altered(before, [3, 5], **{column: value})
    path = before.table["path"][3]
    assert now.changes_from(before) == before.changes_from(now) == f"2 {said} ({path})"


def test_every_difference_is_in_one_line(before: Catalog) -> None:
    paths, labels = before.table["path"], before.table["label"]
    now = altered(altered(before, [2], label=1 - labels[2]), [6], image_id="f" * 16)
    now = replace(now, table=now.table.drop(index=1))
    assert now.changes_from(before) == (
        f"1 removed ({paths[1]}), 1 with another content ({paths[6]}), 1 with another label ({paths[2]})"
    )


def test_whatever_changes_the_hash_is_said_and_nothing_else(before: Catalog) -> None:
    for column in before.table.columns:
        value = {"label": 1 - before.table["label"][0], "width_px": 9, "height_px": 9, "file_bytes": 9}.get(column, "x")
        now = altered(before, [0], **{column: value})
        assert (now.changes_from(before) == "") == (now.content_hash == before.content_hash)
        assert not now.table.equals(before.table)


def test_changed_files_are_found_by_a_scan(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "tiny", n_train=24, n_test=8, seed=1, size_px=64)
    before = Catalog.scan(data)
    first, second, third = sorted((data / "train" / "NORMAL").iterdir())[:3]
    first.unlink()
    second.write_bytes(third.read_bytes() + b"\0")
    third.rename(data / "train" / "PNEUMONIA" / "person900_virus_1.jpeg")
    assert Catalog.scan(data).changes_from(before) == (
        f"1 added (train/PNEUMONIA/person900_virus_1.jpeg), 2 removed (train/NORMAL/{first.name}), "
        f"1 with another content (train/NORMAL/{second.name})"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_names_that_are_not_utf_8_are_the_same_after_they_were_written(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "tiny", n_train=24, n_test=8, seed=1, size_px=64)
    first = min((data / "train" / "NORMAL").iterdir())
    first.rename(first.parent / os.fsdecode(b"IM-\xe9-0001.jpeg"))
    catalog = Catalog.scan(data)
    catalog.write(tmp_path / "catalog.csv")
    read = Catalog.read(tmp_path / "catalog.csv", root=data)
    assert catalog.changes_from(read) == read.changes_from(catalog) == ""
    fewer = replace(read, table=read.table[~read.table["path"].str.contains("udce9")])
    assert catalog.changes_from(fewer) == r"1 added (train/NORMAL/IM-\udce9-0001.jpeg)"
