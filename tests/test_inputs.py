"""Which files an argument stands for, and what hostile folders, archives and names come to."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pneumoscope import _files, _inputs
from pneumoscope.errors import DataError, ImageError

GREY = np.arange(48 * 64, dtype=np.uint32).reshape(48, 64).astype(np.uint8)


def png(pixels: np.ndarray[tuple[int, int], np.dtype[np.uint8]] = GREY) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def names(*arguments: object) -> list[str]:
    return [one.name for one in _inputs.find([str(each) for each in arguments]).inputs]


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_names_are_the_argument_joined_with_the_path_inside_it_in_the_order_of_the_arguments(here: Path) -> None:
    for name in ("scans/b/2.png", "scans/a/10.jpeg", "scans/a/1.PNG", "one.png"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(png())
    zipped(here / "all.zip", {"NORMAL/x.png": png(), "b.dcm": b"x"})
    inside = ["scans/a/1.PNG", "scans/a/10.jpeg", "scans/b/2.png"]
    assert names("one.png", "scans", "all.zip") == ["one.png", *inside, "all.zip/NORMAL/x.png", "all.zip/b.dcm"]
    assert names("scans/") == inside
    assert names(".") == ["./all.zip", *[f"./{name}" for name in ("one.png", *inside)]][1:]
    assert names(here / "scans") == [str(here / name) for name in inside]
    assert [one.read() for one in _inputs.find(["all.zip", "one.png"]).inputs] == [png(), b"x", png()]


def test_a_file_that_is_named_is_tried_whatever_it_is_called(here: Path) -> None:
    for name in ("readme.txt", ".hidden", "a.evidence.png"):
        (here / name).write_bytes(png())
    assert names("readme.txt", ".hidden", "a.evidence.png") == ["readme.txt", ".hidden", "a.evidence.png"]


def test_what_is_left_out_of_a_folder_is_counted_and_said(here: Path) -> None:
    for name in ("ok.png", "notes.txt", ".hidden.png", "._ok.png", "__MACOSX/x.png", "ok.evidence.png", "more.zip"):
        (here / "scans" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "scans" / name).write_bytes(png())
    (here / "empty").mkdir()
    found = _inputs.find(["scans", "empty"])
    assert [one.name for one in found.inputs] == ["scans/ok.png"]
    left = (
        "1 .zip archives (give them by name), 1 evidence maps of an earlier prediction, 3 hidden files, 1 other files"
    )
    assert found.notes == ("'empty' holds no images.", f"Left out: {left}.")


def test_dicom_without_a_suffix_counts_as_an_image_in_folders_and_archives(here: Path) -> None:
    dicom = bytes(128) + b"DICM" + b"rest"
    for name, data in {"1.2.840.1": dicom, "IM0001": dicom, "DICOMDIR": dicom, "LICENSE": b"words"}.items():
        (here / "study" / name).parent.mkdir(exist_ok=True)
        (here / "study" / name).write_bytes(data)
    zipped(here / "study.zip", {"IM1": dicom, "LICENSE": b"words"})
    assert names("study", "study.zip") == ["study/1.2.840.1", "study/IM0001", "study.zip/IM1"]


def test_patterns_that_no_shell_expanded_are_expanded(here: Path) -> None:
    for name in ("s/a1.png", "s/a2.png", "s/b.txt", "s/deep/a3.png", "s/.a4.png", "s/[x].png"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(png())
    assert names("s/a*.png") == ["s/a1.png", "s/a2.png"]
    assert names("./s/a?.png") == ["./s/a1.png", "./s/a2.png"]
    assert names(f"{here}/s/a1*") == [f"{here}/s/a1.png"]
    assert names("s/**/a*.png") == ["s/a1.png", "s/a2.png", "s/deep/a3.png"]
    assert names("s/[x].png") == ["s/[x].png"]  # a file of this very name goes first
    assert names("s/**") == ["s/[x].png", "s/a1.png", "s/a2.png", "s/deep/a3.png"]  # each once
    assert names("s/b.*") == ["s/b.txt"]  # as if the shell had named it


def test_an_argument_that_stands_for_nothing_is_kept_with_its_fault_and_the_others_go_on(here: Path) -> None:
    (here / "ok.png").write_bytes(png())
    (here / "bad.zip").write_bytes(b"PK\x03\x04 and then nothing")
    absent = ["gone.png", "no/*.png", "https://example.org/x.png", "ok.png/inside", "n" * 300]
    found = _inputs.find([*absent, "bad.zip", "ok.png"]).inputs
    faults = [one.fault for one in found]
    assert [one.name for one in found] == [*absent, "bad.zip", "ok.png"]
    assert faults[:5] == [
        "There is no file or folder that has this name; check the path.",
        "There is no file or folder that this pattern matches.",
        "There is no file or folder that has this name; web addresses are never fetched, so save the file first.",
        "It cannot be reached (Not a directory).",
        "It cannot be reached (File name too long).",
    ]
    assert "bad.zip cannot be read as a .zip" in faults[5]
    assert faults[6] == ""
    with pytest.raises(ImageError, match=r"There is no file or folder that has this name; check the path\."):
        found[0].read()


def test_nothing_usable_at_all_is_one_sentence(here: Path) -> None:
    (here / "empty").mkdir()
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text("x")
    expected = r"give JPEG, PNG or DICOM files, folders or a \.zip of them\."
    with pytest.raises(DataError, match=f"^No file was named; {expected}$"):
        _inputs.find([])
    with pytest.raises(DataError, match=f"^'empty' holds no images; {expected}$"):
        _inputs.find(["empty"])
    with pytest.raises(DataError, match=rf"^'texts' holds no images \(found 1 other files\); {expected}$"):
        _inputs.find(["texts"])
    sentence = "'gone.png' cannot be used: There is no file or folder that has this name; check the path"
    with pytest.raises(DataError, match=f"^{sentence}; {expected}$"):
        _inputs.find(["gone.png"])
    with pytest.raises(DataError, match=rf"^{sentence} \(2 more could not be used either\); {expected}$"):
        _inputs.find(["gone.png", "empty", "gone2.png"])


@pytest.mark.parametrize("name", ["../out.png", "/etc/x.png", "a/../../x.png", "C:x.png"])
def test_an_archive_that_points_outside_is_refused_and_the_others_go_on(here: Path, name: str) -> None:
    zipped(here / "slip.zip", {"ok.png": png(), name: png()})
    (here / "ok.png").write_bytes(png())
    first, second = _inputs.find(["slip.zip", "ok.png"]).inputs
    assert "points outside it; do not use this archive" in first.fault
    assert (second.name, second.fault) == ("ok.png", "")


def test_archives_inside_an_archive_are_not_opened_and_are_counted(here: Path) -> None:
    inner = zipped(here / "inner.zip", {"a.png": png()}).read_bytes()
    zipped(here / "outer.zip", {"inner.zip": inner, "ok.png": png(), "__MACOSX/._ok.png": png()})
    found = _inputs.find(["outer.zip"])
    assert [one.name for one in found.inputs] == ["outer.zip/ok.png"]
    assert found.notes == ("Left out: 1 .zip archives (give them by name), 1 hidden files.",)


def test_bombs_and_large_files_are_refused_before_they_fill_the_memory(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_files, "MAX_MEMBER_BYTES", 10_000)
    with zipfile.ZipFile(here / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(1_000_000))
        archive.writestr("ok.png", b"x")
    (here / "large.png").write_bytes(bytes(10_001))
    bomb, ok, large = _inputs.find(["bomb.zip", "large.png"]).inputs
    for one in (bomb, large):
        with pytest.raises(ImageError, match=r"^It is larger than 268\.4 MB\.$"):
            one.read()
    assert ok.read() == b"x"
    lying = _inputs.Input("x", here / "bomb.zip", "bomb.png")  # as if the archive's list had lied
    with pytest.raises(ImageError, match="It is larger than"):
        lying.read()


def test_a_member_that_is_encrypted_damaged_or_gone_is_one_sentence(here: Path) -> None:
    data = bytearray(zipped(here / "a.zip", {"x.png": png(), "y.png": png()}).read_bytes())
    data[data.index(b"IDAT") + 4] ^= 0xFF  # the checksum of x.png no longer fits
    (here / "a.zip").write_bytes(bytes(data))
    x, y = _inputs.find(["a.zip"]).inputs
    with pytest.raises(ImageError, match=r"^The archive is damaged at this file\.$"):
        x.read()
    assert y.read() == png()
    (here / "a.zip").unlink()
    with pytest.raises(ImageError, match=r"^The file cannot be read \(No such file or directory\)\.$"):
        y.read()
    second = bytearray(zipped(here / "b.zip", {"x.png": png()}).read_bytes())
    second[6] |= 1  # encrypted, as the member's own header says it
    second[second.index(b"PK\x01\x02") + 8] |= 1
    (here / "b.zip").write_bytes(bytes(second))
    with pytest.raises(ImageError, match=r"^It is encrypted or packed in a way that is not read\.$"):
        _inputs.find(["b.zip"]).inputs[0].read()


def test_a_damaged_member_that_was_packed_by_lzma_is_one_sentence(here: Path) -> None:
    with zipfile.ZipFile(here / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.png", png())
        archive.writestr("unnamed", bytes(128) + b"DICM" + bytes(500))
    data = bytearray((here / "a.zip").read_bytes())
    for name in (b"x.png", b"unnamed"):
        start = data.index(name) + len(name) + 9  # behind the name and LZMA's own header
        data[start : start + 20] = b"\xff" * 20
    (here / "a.zip").write_bytes(bytes(data))
    (x,) = _inputs.find(["a.zip"]).inputs
    with pytest.raises(ImageError, match=r"^The archive is damaged at this file\.$"):
        x.read()


def test_links_pipes_and_loops_hold_nothing_up_and_lead_nowhere(here: Path) -> None:
    (here / "secret.png").write_bytes(png())
    root = here / "scans"
    root.mkdir()
    (root / "ok.png").write_bytes(png())
    (root / "inside.png").symlink_to(root / "ok.png")
    (root / "out.png").symlink_to(here / "secret.png")
    (root / "broken.png").symlink_to(here / "gone.png")
    (root / "loop").symlink_to(root)
    (here / "circle.png").symlink_to(here / "circle.png")
    os.mkfifo(root / "pipe.png")
    found = _inputs.find(["scans"])
    faults = {one.name: one.fault for one in found.inputs}
    assert faults == {
        "scans/broken.png": "It is a broken link.",
        "scans/inside.png": "",
        "scans/ok.png": "",
        "scans/out.png": "It is a link that leads out of the folder.",
        "scans/pipe.png": "It is not a regular file but a pipe, a socket or a device.",
    }
    assert found.notes == ("Left out: 1 linked folders (not entered).",)
    assert names("scans/**/ok.png") == ["scans/ok.png"]
    pipe, device, circle, _ = _inputs.find(["scans/pipe.png", "/dev/zero", "circle.png", "secret.png"]).inputs
    for one in (pipe, device):
        with pytest.raises(ImageError, match="It is not a regular file but a pipe"):
            one.read()
    assert "cannot be reached" in circle.fault


def test_a_link_that_is_named_is_followed(here: Path) -> None:
    (here / "real").mkdir()
    (here / "real" / "a.png").write_bytes(png())
    (here / "linked").symlink_to(here / "real")
    (here / "one.png").symlink_to(here / "real" / "a.png")
    assert [(one.name, one.read()) for one in _inputs.find(["linked", "one.png"]).inputs] == [
        ("linked/a.png", png()),
        ("one.png", png()),
    ]


def test_names_of_any_bytes_are_found_and_read(here: Path) -> None:
    odd = ["=cmd|' C calc'!A0.png", "new\nline.png", "\x1b[31mred.png", os.fsdecode(b"\xff\xfe.png"), "日本.png"]
    (here / "s").mkdir()
    for name in odd:
        (here / "s" / name).write_bytes(png())
    found = _inputs.find(["s", *(f"s/{name}" for name in odd)]).inputs
    assert sorted(one.name for one in found[:5]) == sorted(f"s/{name}" for name in odd)
    assert [one.name for one in found[5:]] == [f"s/{name}" for name in odd]
    assert {one.read() for one in found} == {png()}


def test_a_file_that_begins_like_an_archive_is_one_whatever_its_name(here: Path) -> None:
    zipped(here / "export", {"a.png": png()})
    zipped(here / "shout.ZIP", {"b.png": png()})
    assert names("export", "shout.ZIP") == ["export/a.png", "shout.ZIP/b.png"]
    assert [one.read() for one in _inputs.find(["export", "shout.ZIP"]).inputs] == [png(), png()]
