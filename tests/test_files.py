"""Files that are whole or absent, archives that stay inside themselves, cells that no spreadsheet runs."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumoscope import _files
from pneumoscope.errors import DataError, PneumoscopeError, StoreError


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- atomic writes


def test_a_block_that_ends_well_replaces_the_file(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "file"
    _files.write_bytes(target, b"old")
    _files.write_bytes(target, b"new")
    assert target.read_bytes() == b"new"
    assert names_in(target.parent) == ["file"]


def test_a_block_that_raises_leaves_the_old_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def write_half() -> None:
        with _files.replacing(target, "w") as file:
            file.write("half of the new")
            file.flush()
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_the_old_file_stands_until_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with _files.replacing(target, "w") as file:
        file.write("new")
        file.flush()
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_a_full_disk_leaves_the_old_file_whole_and_says_so(tmp_path: Path) -> None:
    # a limit on the size of files fails as a full disk does: write() returns an error in the middle
    target = tmp_path / "file"
    target.write_text("old")
    program = """
import resource, signal, sys
from pathlib import Path
from pneumoscope import _files
from pneumoscope.errors import PneumoscopeError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    _files.write_bytes(Path(sys.argv[1]), bytes(1_000_000))
except PneumoscopeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"Cannot write {target}: File too large; "
        "free space or choose a folder you may write to, then run the same command again.\n"
    )
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PneumoscopeError, match=r"Cannot write .*: (Not a directory|File exists); free space or choose"):
        _files.write_text(tmp_path / "file" / "below", "text")


def test_a_written_file_may_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        _files.write_text(tmp_path / "file", "text")
        _files.build_folder(tmp_path / "folder", lambda folder: None)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_text_is_utf8_with_its_newlines_kept(tmp_path: Path) -> None:
    _files.write_text(tmp_path / "file", "ü\r\n→\n")
    assert (tmp_path / "file").read_bytes() == "ü\r\n→\n".encode()


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("a")
        assert not (tmp_path / "store").exists()

    _files.build_folder(tmp_path / "store", fill)
    assert (tmp_path / "store" / "a").read_text() == "a"
    assert names_in(tmp_path) == ["store"]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("a")
        raise KeyError

    with pytest.raises(KeyError):
        _files.build_folder(tmp_path / "store", fill)
    assert names_in(tmp_path) == []


def test_the_quicker_of_two_folders_stays(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("mine")
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "a").write_text("theirs")

    _files.build_folder(tmp_path / "store", fill)
    assert (tmp_path / "store" / "a").read_text() == "theirs"
    assert names_in(tmp_path) == ["store"]


def test_a_full_disk_while_a_folder_is_made_is_told(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        with Path("/dev/full").open("wb") as full:  # the system's own full disk
            full.write(b"x")

    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(StoreError, match=r"Cannot write .*store: No space left on device; free space, or set PNEUMO"):
        _files.build_folder(tmp_path / "store", fill)
    assert names_in(tmp_path) == []


def test_a_folder_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"Cannot write .*; free space, or set PNEUMOSCOPE_CACHE to a folder"):
        _files.build_folder(tmp_path / "file" / "store", lambda folder: None)


# --- space, sizes, hashes, the cache


def test_what_fits_is_allowed_and_what_does_not_is_told(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    _files.require_space(tmp_path / "not" / "yet", free // 2, what="Packing")
    with pytest.raises(StoreError) as caught:
        _files.require_space(tmp_path / "not" / "yet", 10**18, what="Packing 9 images")
    message = str(caught.value)
    assert message.startswith(f"Packing 9 images needs 1000000.0 TB in {tmp_path / 'not' / 'yet'}, but only ")
    assert message.endswith("is free; free some space, or set PNEUMOSCOPE_CACHE to a larger disk.")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (5e9, "5.0 GB"), (7.2e12, "7.2 TB")],
)
def test_size_for_people(n_bytes: float, text: str) -> None:
    assert _files.size_text(n_bytes) == text


def test_hashes_are_sha256(tmp_path: Path) -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "file").write_bytes(b"")
    assert _files.sha256_of(b"") == _files.sha256_of_file(tmp_path / "file") == empty
    assert _files.hash_of({"a": 1, "b": (2, None)}) == _files.hash_of({"b": [2, float("nan")], "a": np.int64(1)})
    assert _files.hash_of({"a": 1}) != _files.hash_of({"a": 2})


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PNEUMOSCOPE_CACHE", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _files.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("PNEUMOSCOPE_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _files.cache_dir() == tmp_path / "xdg" / "pneumoscope"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _files.cache_dir() == tmp_path / ".cache" / "pneumoscope"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _files.cache_dir() == tmp_path / "Library" / "Caches" / "pneumoscope"
    assert names_in(tmp_path) == []


# --- JSON


def test_json_comes_back_with_undefined_figures_as_null(tmp_path: Path) -> None:
    content = {
        "auc": np.float32(0.5),
        "undefined": float("nan"),
        "infinite": np.array([1.0, np.inf]),
        "path": Path("a/b"),
        "label": ("ü", 1),
    }
    _files.write_json(tmp_path / "file.json", content)
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert next(iter(json.loads(text))) == "schema_version"
    assert "NaN" not in text
    assert "Infinity" not in text
    assert _files.read_json(tmp_path / "file.json") == {
        "schema_version": 1,
        "auc": 0.5,
        "undefined": None,
        "infinite": [1.0, None],
        "path": "a/b",
        "label": ["ü", 1],
    }


def test_a_file_name_that_is_not_utf8_comes_back_from_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"person1_\xff.jpeg")
    _files.write_json(tmp_path / "file.json", {"path": name})
    assert _files.read_json(tmp_path / "file.json")["path"] == name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"file\.json does not exist; run the step that writes it first\."),
        ("{", r"file\.json cannot be read as JSON \(.*\); delete it and make it anew\."),
        ("[]", r"file\.json has schema_version None, this version reads 1; install the version of pneumoscope that"),
        ('{"schema_version": 2}', r"file\.json has schema_version 2, this version reads 1; install the version"),
    ],
)
def test_json_that_cannot_be_used_is_told(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "file.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        _files.read_json(tmp_path / "file.json")


# --- CSV


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r"])
def test_a_cell_that_a_spreadsheet_would_run_is_quoted(first: str) -> None:
    assert _files.csv_cell(f"{first}cmd|' /C calc'!A0") == f"'{first}cmd|' /C calc'!A0"
    assert _files.csv_cell(Path("=x")) == "'=x"


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (None, ""),
        (float("nan"), ""),
        (np.float32("nan"), ""),
        (-1, "-1"),
        (-0.1, "-0.1"),
        (0.1 + 0.2, "0.30000000000000004"),
        (np.float64(-0.1), "-0.1"),
        (np.float32(0.1), "0.1"),
        (np.int64(-3), "-3"),
        (True, "True"),
        ("person1-x", "person1-x"),
        ("", ""),
    ],
)
def test_a_harmless_cell_stays_as_it_is(value: object, cell: str) -> None:
    assert _files.csv_cell(value) == cell


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(allow_nan=False), st.text(st.characters(codec="utf-8"), max_size=8)), max_size=4))
def test_numbers_and_text_survive_a_csv_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, str]]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "file.csv"
    _files.write_csv(path, ["x", "name"], [(x, "_" + name) for x, name in rows])
    back = _files.read_csv(path)
    assert [(float(row["x"]), row["name"]) for row in back] == [(x, "_" + name) for x, name in rows]


def test_names_with_newlines_colour_codes_and_foreign_bytes_stay_one_row(tmp_path: Path) -> None:
    names = ["two\nlines", "a\r=1+1", "\x1b[31mred", os.fsdecode(b"\xff.jpeg"), 'quote",comma']
    _files.write_csv(tmp_path / "file.csv", ["name"], [[name] for name in names])
    back = [row["name"] for row in _files.read_csv(tmp_path / "file.csv")]
    assert back == ["two\nlines", "a\r=1+1", "\x1b[31mred", "\\udcff.jpeg", 'quote",comma']


def test_a_short_row_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "file.csv").write_bytes(b"\xef\xbb\xbfpath,label\r\na.jpeg\r\n")
    assert _files.read_csv(tmp_path / "file.csv") == [{"path": "a.jpeg", "label": ""}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"file\.csv cannot be read as a UTF-8 CSV file \(.*No such file.*\); save it as CSV UTF-8\."),
        (b"path\n\xff\xfe", r"file\.csv cannot be read as a UTF-8 CSV file \(.*\); save it"),
        (b"path\n" + b"x" * 200_000, r"file\.csv cannot be read as a UTF-8 CSV file \(field larger.*\); save it"),
        (
            b"a,b\n1,2\n1,2,3\n",
            r"file\.csv: row 2 has more cells than the header; mend it, or quote cells with commas\.",
        ),
    ],
)
def test_a_csv_file_that_cannot_be_used_is_told(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "file.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        _files.read_csv(tmp_path / "file.csv")


# --- archives


def archive_of(*names: str, mode: int = 0o100644) -> zipfile.ZipFile:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo("placeholder")
            entry.filename = name  # the constructor would mend it
            entry.external_attr = mode << 16
            archive.writestr(entry, b"content")
    return zipfile.ZipFile(buffer)


def test_the_files_of_an_archive_are_listed_and_read() -> None:
    with archive_of("train/", "train/a.jpeg", "train/..b.jpeg") as archive:
        members = _files.archive_members(archive, name="x.zip")
        assert [entry.filename for entry in members] == ["train/a.jpeg", "train/..b.jpeg"]
        assert _files.read_member(archive, "train/a.jpeg") == b"content"


@pytest.mark.parametrize("name", ["../up", "a/../../up", "/etc/passwd", "..\\up", "C:up", "a/.."])
def test_an_archive_that_points_outside_itself_is_refused(name: str) -> None:
    with archive_of("fine.jpeg", name) as archive, pytest.raises(DataError) as caught:
        _files.archive_members(archive, name="x.zip")
    assert str(caught.value) == (f"x.zip holds the entry {name!r}, which points outside it; do not use this archive.")


def test_a_symbolic_link_in_an_archive_is_refused() -> None:
    with archive_of("link.jpeg", mode=0o120777) as archive, pytest.raises(DataError) as caught:
        _files.archive_members(archive, name="x.zip")
    assert str(caught.value) == "x.zip holds the symbolic link 'link.jpeg'; unpack it yourself and give the folder."


def test_an_archive_with_too_many_entries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "MAX_ARCHIVE_ENTRIES", 2)
    with archive_of("a", "b", "c") as archive, pytest.raises(DataError) as caught:
        _files.archive_members(archive, name="x.zip")
    assert str(caught.value) == ("x.zip lists 3 entries, at most 2 are read; unpack it yourself and give the folder.")


def test_a_zip_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "MAX_MEMBER_BYTES", 1_000_000)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpeg", bytes(50_000_000))
        archive.writestr("just.jpeg", bytes(1_000_000))
    assert len(buffer.getvalue()) < 100_000
    with zipfile.ZipFile(buffer) as archive:
        assert len(_files.read_member(archive, "just.jpeg")) == 1_000_000
        with pytest.raises(ValueError, match=r"^larger than 1\.0 MB$"):
            _files.read_member(archive, "bomb.jpeg")


def test_a_damaged_member_is_not_returned() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jpeg", b"content of the image")
    damaged = buffer.getvalue().replace(b"content", b"CONTENT")
    with zipfile.ZipFile(io.BytesIO(damaged)) as archive, pytest.raises(zipfile.BadZipFile):
        _files.read_member(archive, "a.jpeg")
