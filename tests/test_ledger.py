"""The ledger of looks at a test set: kept by content, never losing a line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pneumoscope import ledger
from pneumoscope.errors import RunError
from pneumoscope.ledger import Ledger, Look

LOOK = Look("a" * 16, "b" * 64, "c" * 64, "ft", 624, 0.98, None)


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "deep" / "ledger.jsonl")


def test_a_test_set_is_named_by_its_images_whatever_their_order() -> None:
    name = ledger.test_set_of(["b", "a", "b"])
    assert name == ledger.test_set_of(["a", "b"])
    assert name != ledger.test_set_of(["a", "c"])
    assert re.fullmatch("[0-9a-f]{16}", name)


def test_looks_come_back_in_order_with_their_time(book: Ledger) -> None:
    assert book.looks(LOOK.test_set) == []
    book.append(LOOK)
    book.append(replace(LOOK, test_set="d" * 16))
    book.append(replace(LOOK, model="tl", model_hash="e" * 64, auc=None))
    first, second = book.looks(LOOK.test_set)
    assert replace(first, time="") == LOOK
    assert (second.model, second.auc) == ("tl", None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first.time)
    assert all(json.loads(line)["schema_version"] == 1 for line in book.path.read_text().splitlines())


def test_the_summary_counts_scorings_models_and_configurations(book: Ledger) -> None:
    other = replace(LOOK, model_hash="f" * 64, spec_hash="g" * 64)
    for look in (LOOK, LOOK, replace(LOOK, model_hash="e" * 64), other):
        book.append(look)
    summary = book.summary(LOOK.test_set)
    assert (summary["looks"], summary["models"], summary["specs"]) == (4, 3, 2)
    assert summary["first"] <= summary["last"]
    assert summary["sentence"] == (
        "These test images have been scored 4 times on this machine, by 3 models of 2 configurations; "
        "each look that led to a choice makes the figures flatter."
    )
    assert book.summary("0" * 16)["first"] is None
    book.append(replace(LOOK, test_set="1" * 16))
    assert "scored 1 time on this machine, by 1 model of 1 configuration;" in book.summary("1" * 16)["sentence"]


def test_damaged_lines_hide_no_other(book: Ledger) -> None:
    book.append(LOOK)
    with book.path.open("ab") as file:
        file.write(b'not json\n[1]\n{"schema_version": 1}\n\xff\xfe\n{"schema_ver')  # the last was cut by a power loss
    book.append(replace(LOOK, model="cnn"))
    assert [look.model for look in book.looks(LOOK.test_set)] == ["ft", "cnn"]


def test_several_processes_write_whole_lines(book: Ledger) -> None:
    code = (
        "import sys; from pathlib import Path; from pneumoscope.ledger import Ledger, Look\n"
        "for i in range(50): Ledger(Path(sys.argv[1])).append(Look('a'*16, 'b'*64, 'c'*64, sys.argv[2], i, .5, .5))"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(book.path), name]) for name in ("cnn", "tl", "ft")]
    assert [child.wait() for child in children] == [0, 0, 0]
    looks = book.looks("a" * 16)
    for name in ("cnn", "tl", "ft"):
        assert [look.n for look in looks if look.model == name] == list(range(50))
    assert len(book.path.read_bytes().splitlines()) == 150


def test_a_ledger_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        RunError,
        match=r"^The test-set ledger \S+ledger\.jsonl cannot be written \(.+\); set PNEUMOSCOPE_CACHE to a folder you "
        r"may write to\.$",
    ):
        Ledger(tmp_path / "file" / "ledger.jsonl").append(LOOK)


def test_the_ledger_lies_in_the_cache_and_outlives_its_cleaning(own_cache: Path) -> None:
    Ledger.in_cache().append(LOOK)
    command = [sys.executable, "-m", "pneumoscope", "cache", "--clean", "--all"]
    subprocess.run(command, check=True, capture_output=True)
    assert Ledger(own_cache / "ledger.jsonl").looks(LOOK.test_set)
