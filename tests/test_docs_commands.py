"""Every command that the pages show: it names real verbs and options, and it runs, in the order in which it is read.

A command stands in a ``console`` block, each line beginning with ``$``. A block that cannot run here is marked in the
source by ``<!-- not run: KIND: reason -->`` above it. ``<!-- saved as NAME -->`` above a block makes it a file that
the commands find. The names in the pages (``chest_xray``, ``scans`` ...) are synthetic images in one temporary folder;
runs are made with the preset ``smoke``.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import typer
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from pneumoscope import phantom
from pneumoscope.cli import app
from pneumoscope.specs import PRESETS, Spec

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
KEPT = ("log", "decisions")
"""Pages that keep what was true, and typed, at their time."""

LISTED = re.findall(r"(?m)^([a-z]+)$", (DOCS / "index.md").read_text(encoding="utf-8"))  # in its tables of contents
PAGES = [REPOSITORY / "README.md", *(DOCS / f"{name}.md" for name in ("index", *LISTED) if name not in KEPT)]
"""In reading order."""

KINDS = ("network", "slurm", "gpu", "long", "server")
"""Why a command may stay unrun."""

LONGEST_S = 900

_FENCE = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)
_NOT_RUN = re.compile(rf"not run: ({'|'.join(KINDS)}): (.+)")
_SAVED = re.compile(r"saved as ([\w.-]+)")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    mark: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands of a console block, lines that end in a backslash joined to the next."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(page.name, line, found["language"].strip(), found["text"], found["mark"] or "")


ALL = [block for page in PAGES for block in blocks(page)]
CONSOLE = [block for block in ALL if block.language == "console"]
SHOWN = [(block, command) for block in CONSOLE for command in block.commands]


def calls(text: str) -> Iterator[list[str]]:
    """Yield the words of each call of pneumoscope in a line of shell, the program's name left out."""
    for part in re.split(r"&&|\|\||[|;]", re.sub(r"(?:^|\s)#.*", "", text)):
        words = shlex.split(part)
        if "pneumoscope" in words:
            yield words[words.index("pneumoscope") + 1 :]


def fault_of(words: list[str]) -> str:
    """Say what is wrong with a call: a verb, an option or a setting that does not exist; empty where nothing is."""
    command: Any = typer.main.get_command(app)
    words = list(words)
    while words and hasattr(command, "commands"):
        if words[0].startswith("-"):
            break
        if words[0] not in command.commands:
            return f"there is no verb {words[0]!r}"
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts} | {"-h", "--help"}
    for at, word in enumerate(words):
        if word.startswith("-") and word != "-" and word.partition("=")[0] not in known:
            return f"there is no option {word}"
        value = words[at + 1] if at + 1 < len(words) else ""
        if word == "--preset" and value not in (*PRESETS, "NAME"):
            return f"there is no preset {value}"
        if word == "--set" and value != "KEY=VALUE":
            try:
                Spec().with_overrides([value])
            except Exception as error:  # whatever is wrong with it is what the reader would see
                return str(error)
    return ""


# --- fast: what is shown exists ---------------------------------------------------------------------------------------


def test_every_page_is_read() -> None:
    assert {page.stem for page in PAGES[1:]} == {path.stem for path in DOCS.glob("*.md")} - set(KEPT)
    assert len(SHOWN) > 20


@pytest.mark.parametrize(("block", "command"), SHOWN, ids=[f"{block.where} {command[:50]}" for block, command in SHOWN])
def test_a_shown_command_names_what_exists(block: Block, command: str) -> None:
    faults = [fault for words in calls(command) if (fault := fault_of(words))]
    assert faults == [], f"{block.where}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_within_the_text_names_what_exists(page: Path) -> None:
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose) if span.startswith("pneumoscope ")]
    named = [
        span for span in spans if span != "pneumoscope VERB ..." and not span.startswith("pneumoscope VERB --help")
    ]
    assert {span: fault for span in named for words in calls(span) if (fault := fault_of(words))} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_option_within_the_text_exists_in_some_verb(page: Path) -> None:
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose) if span.startswith(("pneumoscope ", "--"))]
    shown = {option for span in spans for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", span)}
    assert shown - _options(typer.main.get_command(app)) - {"--help", "--version"} == set()


def _options(command: Any) -> set[str]:
    own = {option for parameter in getattr(command, "params", []) for option in parameter.opts}
    return own.union(*(_options(inner) for inner in getattr(command, "commands", {}).values()))


def test_what_is_wrong_is_found() -> None:
    assert fault_of(["run", "DATA", "-o", "RUN", "--preset", "smoke", "--set", "train.epochs=3"]) == ""
    assert fault_of(["fetch", "weights", "resnet152v2"]) == ""
    assert fault_of(["trian", "DATA"]) == "there is no verb 'trian'"
    assert fault_of(["fetch", "web"]) == "there is no verb 'web'"
    assert fault_of(["run", "DATA", "--fast"]) == "there is no option --fast"
    assert fault_of(["run", "DATA", "--preset", "best-of-all"]) == "there is no preset best-of-all"
    assert "there is no key 'train.epoch'" in fault_of(["run", "DATA", "--set", "train.epoch=3"])
    assert list(calls("cd x && pneumoscope cache  # all | of it")) == [["cache"]]


@pytest.mark.parametrize("block", CONSOLE, ids=lambda block: block.where)
def test_a_console_block_is_commands_and_nothing_else(block: Block) -> None:
    """Output would be copied once and be wrong from the next change on; it stands in text blocks, cut to its form."""
    lines = block.text.splitlines()
    stray = [line for at, line in enumerate(lines) if not line.startswith("$ ") and not lines[at - 1].endswith("\\")]
    assert (stray, bool(block.commands)) == ([], True)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_commands_stand_in_console_blocks_only(page: Path) -> None:
    hidden = [
        block.where
        for block in blocks(page)
        if block.language in ("", "text", "sh", "shell") and re.search(r"(?m)^\$ |^pneumoscope ", block.text)
    ]
    assert hidden == []


def test_every_mark_has_a_kind_and_a_reason() -> None:
    marks = [(block.where, block.mark) for block in ALL if block.mark]
    bad = [(where, mark) for where, mark in marks if not (_NOT_RUN.fullmatch(mark) or _SAVED.fullmatch(mark))]
    assert bad == []
    for block in CONSOLE:
        if block.mark:
            print(f"{block.where}: {block.mark}: {' ; '.join(block.commands)}")
    named = [path for _, mark in marks for path in re.findall(r"\b(?:tests|docs|scripts)/[\w./-]+\w", mark)]
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
    marked = [command for block in CONSOLE if block.mark for command in block.commands]
    assert len(marked) < len(SHOWN), "nothing would be run"


@pytest.mark.parametrize("block", [one for one in ALL if one.language == "toml"], ids=lambda block: block.where)
def test_a_shown_settings_file_is_a_valid_one(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "shown.toml"
    path.write_text(block.text, encoding="utf-8")
    Spec.from_toml(path)


# --- slow: it runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name."""
    place = tmp_path_factory.mktemp("pages")
    phantom.write_dataset(place / "chest_xray", n_train=72, n_test=24, seed=3, size_px=64)
    phantom.write_dataset(place / "our-hospital", n_train=24, n_test=24, seed=4, size_px=64)
    _other_names(place)
    _scans(place / "scans")
    for block in ALL:
        if saved := _SAVED.fullmatch(block.mark):
            (place / saved[1]).write_text(block.text, encoding="utf-8")
    return place


def _other_names(place: Path) -> None:
    """Write other folder names, and a manifest of the same pictures."""
    rows = ["path,label,split,group"]
    for number in range(24):
        label = number % 2
        folder = place / "other-names" / ("healthy", "sick")[label]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number}.png"
        Image.fromarray(phantom.draw(label, seed=number, width_px=64, height_px=64)).save(path)
        part = "test" if number % 6 > 3 else "train"
        rows.append(f"{path.relative_to(place)},{('NORMAL', 'PNEUMONIA')[label]},{part},child-{number}")
    (place / "images.csv").write_text("\n".join(rows), encoding="utf-8")


def _scans(folder: Path) -> None:
    folder.mkdir()
    pixels = phantom.draw(1, seed=11, width_px=80, height_px=64)
    Image.fromarray(pixels).save(folder / "child.jpeg")
    image = pydicom.Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    image.Modality, image.PhotometricInterpretation = "CR", "MONOCHROME2"
    image.SamplesPerPixel, image.BitsAllocated, image.BitsStored, image.HighBit = 1, 8, 8, 7
    image.PixelRepresentation, (image.Rows, image.Columns) = 0, pixels.shape
    image.WindowCenter, image.WindowWidth = 128, 256
    image.PixelData = np.ascontiguousarray(pixels).tobytes()
    image.save_as(folder / "child.dcm", enforce_file_format=True)


def small(command: str) -> str:
    """Return a command as it is run here: a run begins with the preset ``smoke`` where its page names none."""
    if re.match(r"pneumoscope (run|inspect|audit|doctor|models)\b", command) and not re.search(
        r"--(preset|config)\b", command
    ):
        body = "".join(takewhile(lambda letter: letter != "#", command)).rstrip()
        return f"{body} --preset smoke"
    return command


RUN_HERE = [(block, command) for block, command in SHOWN if not _NOT_RUN.fullmatch(block.mark)]


@pytest.mark.slow
def test_every_command_runs_in_reading_order(workplace: Path) -> None:
    """One test, since each command stands on those before it."""
    scripts = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PNEUMOSCOPE_CACHE": str(workplace / "cache"),
    }
    failed, done = [], set()
    for block, command in RUN_HERE:
        shown = small(command)
        if shown in done and "--resume" not in shown:  # shown on two pages
            continue
        done.add(shown)
        ended = subprocess.run(
            ["bash", "-c", shown],
            cwd=workplace,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
        print(f"{block.where}: {shown}: {ended.returncode}")
        if ended.returncode:
            failed.append(f"{block.where}: {shown} ended with {ended.returncode}: {ended.stderr[-500:]}")
    assert failed == []


@pytest.mark.slow
@pytest.mark.parametrize("block", [one for one in ALL if one.language == "python"], ids=lambda block: block.where)
def test_every_python_example_runs(workplace: Path, block: Block, tmp_path: Path) -> None:
    program = tmp_path / "example.py"
    program.write_text(block.text.replace('preset_named("default")', 'preset_named("smoke")'), encoding="utf-8")
    environment = {**os.environ, "PNEUMOSCOPE_CACHE": str(workplace / "cache")}
    ended = subprocess.run(
        [sys.executable, str(program)], cwd=workplace, env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
