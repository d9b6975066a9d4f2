"""What a job says, in each mode, to each stream: whole lines, plain JSON, and names that cannot steer a terminal."""

from __future__ import annotations

import ast
import io
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import pydicom
import pytest
from rich.cells import cell_len

from pneumoscope import narration, pipeline, survey
from pneumoscope._stopping import Wish
from pneumoscope.errors import DataError, RunError, StoppedEarly
from pneumoscope.narration import EVENTS, Mode, Narration, seconds_text
from pneumoscope.specs import Spec

SOURCE = Path(narration.__file__).parent
PAGE = SOURCE.parents[1] / "docs" / "events.md"

ESCAPE = "\x1b"
MODES: tuple[Mode, ...] = ("terminal", "plain", "json", "silent")
MARKUP = "[/red][bold] :smile:"
NASTY = "a\nb\rc\t\x1b[31mred\x1b]0;title\x07\x9b2J \u202egpj.exe\u2028\x85 \udc80 " + MARKUP
HARMLESS = r"a\nb\rc\t\x1b[31mred\x1b]0;title\x07\x9b2J \u202egpj.exe\u2028\x85 \udc80 " + MARKUP


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(narration, "time", SimpleNamespace(monotonic=own.monotonic))
    return own


def say_everything(voice: Narration, name: str = "image.jpeg") -> None:
    """Use every way of speaking."""
    voice.say(f"Reading {name}.")
    voice.warn(f"{name} is damaged.")
    voice.event("scored", f"{name} is scored.", name=name, score=0.5)
    voice.table(f"About {name}", ["file", "size"], [[name, "1,234"], ["b", "5"]])
    with voice.stage(f"Packing {name}"), voice.bar(name) as progress:
        progress(1, 2)
        progress(2, 2)


def said(mode: Mode, name: str = "image.jpeg") -> str:
    stream = io.StringIO()
    say_everything(Narration(mode, stream=stream), name)
    return stream.getvalue()


def without_codes(text: str) -> str:
    """Return what a terminal was sent without what rich draws and moves with."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def left_on_screen(text: str) -> list[str]:
    """Return the lines that stay, as a terminal understands line feeds, returns, and rich's going up and erasing."""
    lines, at = [""], 0
    for code, plain in re.findall(r"\x1b\[([0-9;?]*[A-Za-z])|([^\x1b]+)", text):
        if code.endswith("A"):
            at -= int(code[:-1])
        elif code == "2K":
            lines[at] = ""
        for char in plain:
            if char == "\n":
                at += 1
                lines += [""] * (at == len(lines))
            elif char != "\r":
                lines[at] += char
    return [line for line in lines if line]


def events(text: str) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# --- plain -----------------------------------------------------------------------------------------------------------


def test_plain_lines_are_whole_and_uncoloured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    voice = Narration("plain", stream=stream)
    long = "word " * 40 + "end"
    voice.say(long)
    voice.warn(long)
    voice.event("name", long, value=1)
    assert stream.getvalue() == f"{long}\nWarning: {long}\n{long}\n"
    voice.table(long, ["x" * 150, "y"], [["1", "2"]])
    with voice.stage(long):
        pass
    assert ESCAPE not in stream.getvalue()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 8
    assert all(len(line) > 150 for line in lines)


def test_a_stage_says_how_long_it_took_when_it_ends_well(clock: Clock) -> None:
    stream = io.StringIO()
    voice = Narration("plain", stream=stream)
    with voice.stage("Packing"):
        assert stream.getvalue() == "Packing ...\n"
        clock.now += 65
    assert stream.getvalue() == "Packing ...\nPacking: done in 1 min 05 s\n"
    with pytest.raises(KeyError), voice.stage("Scoring"):
        raise KeyError
    assert stream.getvalue().splitlines()[2:] == ["Scoring ...", "Scoring: failed after 0.0 s"]


def test_a_stage_that_is_stopped_is_not_called_failed(clock: Clock) -> None:
    stream = io.StringIO()
    for error in (StoppedEarly("on request"), KeyboardInterrupt()):
        with pytest.raises(type(error)), Narration("plain", stream=stream).stage("Training"):
            raise error
    assert stream.getvalue().splitlines()[1::2] == ["Training: stopped after 0.0 s"] * 2


def test_a_table_stands_in_columns_numbers_at_the_right() -> None:
    stream = io.StringIO()
    Narration("plain", stream=stream).table(
        "Images", ["split", "NORMAL", "total"], [["train", "1,080", "4,581"], ["validation", "7", "12"]]
    )
    assert stream.getvalue() == (
        "Images\n"
        "split       NORMAL  total\n"
        "train        1,080  4,581\n"
        "validation       7     12\n"
    )  # fmt: skip


def test_a_table_without_rows_is_its_head() -> None:
    stream = io.StringIO()
    Narration("plain", stream=stream).table("None", ["file", "size"], [])
    assert stream.getvalue() == "None\nfile  size\n"


def test_a_row_with_another_number_of_cells_is_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        Narration("plain", stream=io.StringIO()).table("T", ["a", "b"], [["only one"]])


def test_each_line_leaves_at_once() -> None:
    stream = io.TextIOWrapper(raw := io.BytesIO(), encoding="utf-8")  # buffers, as a file does
    Narration("plain", stream=stream).say("now")
    assert raw.getvalue() == b"now\n"
    stream.close()


def test_what_a_stream_cannot_encode_is_escaped() -> None:
    stream = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii", errors="strict")
    Narration("plain", stream=stream).say("Röntgen → 1")
    assert raw.getvalue() == b"R\\xf6ntgen \\u2192 1\n"
    stream.close()


# --- progress --------------------------------------------------------------------------------------------------------


def test_progress_off_a_terminal_is_a_line_now_and_then(clock: Clock) -> None:
    stream = io.StringIO()
    with Narration("plain", stream=stream).bar("files", unit="files") as progress:
        for done in range(1, 1001):
            clock.now += 0.1
            progress(done, 2000)
    lines = stream.getvalue().splitlines()
    assert 3 <= len(lines) <= 5  # 100 seconds, a line in about 20
    assert re.fullmatch(r"  files: 20\d of 2,000 files \(10\.0 files/s, 3 min 00 s left\)", lines[0])


def test_quick_work_shows_no_progress_lines(clock: Clock) -> None:
    stream = io.StringIO()
    with Narration("plain", stream=stream).bar("files") as progress:
        for done in range(1000):
            clock.now += 0.001
            progress(done, 1000)
    assert stream.getvalue() == ""


def test_progress_in_json_has_its_numbers(clock: Clock) -> None:
    stream = io.StringIO()
    with Narration("json", stream=stream).bar("cnn", unit="steps") as progress:
        clock.now += 50
        progress(0, 1000)  # nothing is done yet: no line
        progress.note("epoch 1/9")
        progress(100, 1000)  # and here no rate: the first report began the count
        clock.now += 50
        progress(200, 1000)
    first, second = events(stream.getvalue())
    known = {"event": "progress", "label": "cnn", "note": "epoch 1/9", "total": 1000, "unit": "steps"}
    assert first == known | {"time": first["time"], "done": 100, "rate": None, "left_seconds": None}
    assert second == known | {"time": second["time"], "done": 200, "rate": 4.0, "left_seconds": 200.0}


def test_what_was_done_before_the_first_report_does_not_count_for_the_rate(clock: Clock) -> None:
    stream = io.StringIO()
    with Narration("json", stream=stream).bar("features") as progress:
        clock.now += 30  # a network is compiled
        progress(900, 1000)  # and an earlier process had stored most of it
        for done in range(901, 941):
            clock.now += 1
            progress(done, 1000)
    assert [event["rate"] for event in events(stream.getvalue())][1:] == [1.0, 1.0]


def test_bytes_are_shown_as_sizes_and_one_thing_in_the_singular(clock: Clock) -> None:
    stream = io.StringIO()
    voice = Narration("plain", stream=stream)
    with voice.bar("weights", unit="bytes") as progress:
        for done in (0, 40_000_000):
            clock.now += 20
            progress(done, 60_000_000)
    with voice.bar("files", unit="files") as progress:
        clock.now += 20
        progress(1, 1)
    assert stream.getvalue().splitlines() == [
        "  weights: 40.0 MB of 60.0 MB (2.0 MB/s, 10 s left)",
        "  files: 1 of 1 file",
    ]


def test_the_rate_begins_anew_with_every_epoch(clock: Clock) -> None:
    stream = io.StringIO()
    with Narration("json", stream=stream).bar("cnn", unit="steps") as progress:
        for step in range(1, 101):  # ten a second ...
            clock.now += 0.1
            progress(step, 100)
        for step in range(1, 101):  # ... and one a second
            clock.now += 1
            progress(step, 100)
    rates = [event["rate"] for event in events(stream.getvalue())]
    assert rates[-1] == pytest.approx(1, rel=0.02)


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_json_is_one_event_a_line() -> None:
    found = events(said("json"))
    assert [event["event"] for event in found] == ["say", "warning", "scored", "table", "stage", "done"]
    for event in found:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", event["time"])
    assert found[0]["text"] == "Reading image.jpeg."
    assert found[1]["text"] == "image.jpeg is damaged."
    assert (found[2]["name"], found[2]["score"]) == ("image.jpeg", 0.5)
    assert (found[3]["columns"], found[3]["rows"]) == (["file", "size"], [["image.jpeg", "1,234"], ["b", "5"]])
    assert found[5]["seconds"] >= 0


def test_json_has_no_nan() -> None:
    stream = io.StringIO()
    Narration("json", stream=stream).event(
        "epoch", "", loss=float("nan"), rate=float("inf"), path=Path("a"), more=[float("-inf"), 1.5]
    )
    (event,) = events(stream.getvalue())
    assert [event[key] for key in ("loss", "rate", "path", "more")] == [None, None, "a", [None, 1.5]]


def test_names_reach_machines_unchanged() -> None:
    found = events(said("json", NASTY))
    assert found[2]["name"] == NASTY
    assert found[3]["rows"][0] == [NASTY, "1,234"]
    assert said("json", NASTY).isascii()


# --- silence and the log ---------------------------------------------------------------------------------------------


def test_silence_prints_nothing_but_logs(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    voice = Narration("silent", stream=stream)
    voice.log_to(tmp_path / "run.log")
    say_everything(voice)
    with voice.bar("files") as progress:
        clock.now += 60
        progress(30, 60)
    voice.close()
    assert stream.getvalue() == ""
    assert capsys.readouterr() == ("", "")
    lines = [line.partition(" ")[2] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert lines == [
        "Reading image.jpeg.",
        "Warning: image.jpeg is damaged.",
        "image.jpeg is scored.",
        "About image.jpeg",
        "file         size",
        "image.jpeg  1,234",
        "b               5",
        "Packing image.jpeg ...",
        "Packing image.jpeg: done in 0.0 s",
        "  files: 30 of 60 images",
    ]


@pytest.mark.parametrize("mode", MODES)
def test_the_log_is_the_same_in_every_mode_and_has_times(tmp_path: Path, clock: Clock, mode: Mode) -> None:
    voice = Narration(mode, stream=io.StringIO())
    voice.say("before the log")
    voice.log_to(tmp_path / "run.log")
    say_everything(voice)
    assert "done in" in (tmp_path / "run.log").read_text()  # written at once, for whoever looks on
    voice.close()
    voice.say("after the log")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert len(lines) == 9
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \S", line) for line in lines)


def test_a_resumed_job_adds_to_the_log(tmp_path: Path) -> None:
    for text in ("first", "second"):
        voice = Narration("silent")
        voice.log_to(tmp_path / "run.log")
        voice.say(text)
        voice.close()
    assert [line.split(" ")[1] for line in (tmp_path / "run.log").read_text().splitlines()] == ["first", "second"]


# --- names from elsewhere --------------------------------------------------------------------------------------------


def test_no_name_breaks_a_plain_line_or_steers_the_terminal() -> None:
    text = said("plain", NASTY)
    assert text.count("\n") == said("plain").count("\n")
    assert all(line.isprintable() for line in text.split("\n"))
    assert text.split("\n")[0] == f"Reading {HARMLESS}."
    assert text.count(HARMLESS) == 7


def test_no_name_steers_a_terminal_or_is_taken_for_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said("terminal", NASTY))  # what rich itself draws with
    assert all(line.isprintable() for line in re.split(r"[\r\n]", plain))
    assert plain.count(HARMLESS) >= 7


@pytest.mark.parametrize("mode", MODES)
def test_no_name_breaks_a_log_line(tmp_path: Path, mode: Mode) -> None:
    voice = Narration(mode, stream=io.StringIO())
    voice.log_to(tmp_path / "run.log")
    say_everything(voice, NASTY)
    voice.close()
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 9
    assert text.count(HARMLESS) == 7


def test_letters_of_any_language_stay_as_they_are() -> None:
    stream = io.StringIO()
    name = "Röntgen_胸部 Снимок – 5 µm.jpeg"
    Narration("plain", stream=stream).say(name)
    assert stream.getvalue() == f"{name}\n"


# --- terminals -------------------------------------------------------------------------------------------------------


def on_a_terminal(speak: Callable[[IO[str]], None]) -> str:
    """Return what a real pseudo-terminal was sent."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    reading, writing = pty.openpty()
    chunks: list[bytes] = []

    def collect() -> None:
        with suppress(OSError):  # how Linux says that the other end is closed
            while data := os.read(reading, 65536):
                chunks.append(data)

    reader = Thread(target=collect)
    reader.start()
    with os.fdopen(writing, "w", encoding="utf-8") as stream:
        speak(stream)
    reader.join(timeout=30)
    os.close(reading)
    return b"".join(chunks).decode()


def test_a_terminal_is_seen_and_shows_a_bar_with_its_rate(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def speak(stream: IO[str]) -> None:
        voice = Narration(stream=stream)
        assert voice.mode == "terminal"
        with voice.bar("files", unit="files") as progress:
            progress(0, 1234)
            clock.now += 10
            progress(617, 1234)
        voice.warn("look here")

    shown = on_a_terminal(speak)
    assert "617/1,234 files, 61.7 files/s, 10 s left" in shown
    assert "\x1b[33mWarning: look here\x1b[0m" in shown


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = on_a_terminal(lambda stream: say_everything(Narration(stream=stream)))
    assert ESCAPE not in shown
    assert "Packing image.jpeg ..." in shown


def test_a_stage_leaves_one_line_on_a_terminal_and_nothing_of_what_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    voice = Narration("terminal", stream=stream)
    with voice.stage("Packing"), voice.bar("images") as progress:
        progress(1, 2)
        voice.warn("one is damaged")
        progress(2, 2)
    with pytest.raises(KeyError), voice.stage("Scoring"):
        raise KeyError
    assert left_on_screen(stream.getvalue()) == [
        "Warning: one is damaged",
        "Packing: done in 0.0 s",
        "Scoring: failed after 0.0 s",
    ]


@pytest.mark.parametrize("columns", [20, 40, 80, 120, 200])
@pytest.mark.parametrize("title", ["Packing", "Reading " + "very/" * 60, "胸部" * 40, NASTY])
def test_the_moving_line_never_breaks(monkeypatch: pytest.MonkeyPatch, clock: Clock, columns: int, title: str) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = io.StringIO()
    voice = Narration("terminal", stream=stream)
    with voice.bar(title) as progress:
        progress(0, 1_000_000)
        clock.now += 10
        progress(100_000, 1_000_000)
    moving = [line for line in re.split(r"[\r\n]+", without_codes(stream.getvalue())) if "─" in line]
    assert moving
    assert all(cell_len(line) <= columns for line in moving)


def test_the_moving_line_shows_as_much_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    shown = {}
    for columns in (50, 70, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = io.StringIO()
        voice = Narration("terminal", stream=stream)
        with voice.bar("Training cnn (CNN from scratch)", unit="steps") as progress:
            progress.note("epoch 2/9")
            progress(100, 900)
            clock.now += 10
            progress(200, 900)
        shown[columns] = without_codes(stream.getvalue())
    assert "epoch 2/9, 10.0 steps/s, 1 min 10 s left" in shown[120]
    assert "epoch 2/9, 1 min 10 s left" in shown[70]
    assert "steps/s" not in shown[70]
    assert "Training cnn (CNN from scra… ━─────── epoch 2/9" in shown[50]
    assert "epoch 2/9" in shown[50]


def test_a_wide_table_becomes_several_and_no_figure_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    head = ["model", "AUC", "at 0.5: accuracy", "FN", "FP", "at Youden: sensitivity", "specificity", "FN", "FP"]
    row = ["0.9617 (0.949-0.975)", "0.7312", "175", "0", "0.9136 (0.881-0.938)", "0.8513 (0.804-0.889)", "33", "40"]
    tables = {}
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = io.StringIO()
        Narration("terminal", stream=stream).table("Results", head, [["cnn", *row], ["file-and-grey", *row]])
        text = tables[columns] = without_codes(stream.getvalue())
        assert all(cell in text for cell in (*head, *row))
        assert all(len(line) <= columns for line in text.splitlines())
    assert "continued" not in tables[120]
    assert tables[80].count("file-and-grey") == 2
    assert "Results, continued" in tables[80]


def test_a_broken_line_keeps_its_indent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    Narration("terminal", stream=stream).say("  " + "word " * 20)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("  word") and len(line) <= 40 for line in lines)


def test_a_terminal_that_cannot_show_a_letter_does_not_end_the_work() -> None:
    stream = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii", errors="strict")
    say_everything(Narration("terminal", stream=stream), "Röntgen")
    assert b"R\\xf6ntgen" in raw.getvalue()
    stream.close()


def test_off_a_terminal_the_mode_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    assert Narration(stream=io.StringIO()).mode == "plain"
    voice = Narration()
    assert voice.mode == "plain"
    voice.say("to standard output")
    assert capsys.readouterr() == ("to standard output\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_log_that_cannot_be_written_hinders_nothing_and_is_said() -> None:
    stream = io.StringIO()
    voice = Narration("plain", stream=stream)
    voice.log_to(Path("/dev/full"))
    with pytest.raises(DataError, match=r"^its own$"), voice.stage("Training"):
        raise DataError("its own")
    voice.end(DataError("its own"))
    voice.close()
    assert stream.getvalue().count("Warning: The log is not written any more (No space left on device).") == 1


def test_a_log_in_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"^Cannot write .*run\.log: Not a directory; "):
        Narration("silent").log_to(tmp_path / "file" / "run.log")


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line", "event"),
    [
        (
            DataError("No image in a\nb."),
            r"Failed: No image in a\nb.",
            {"text": "No image in a\nb.", "kind": "DataError", "exit_status": 1},
        ),
        (
            StoppedEarly("Stopped; use --resume."),
            "Stopped: Stopped; use --resume.",
            {"text": "Stopped; use --resume.", "kind": "StoppedEarly", "exit_status": 75},
        ),
        (
            Wish("Stopped; use --resume."),  # a signal, before the command has made of it what it ends with
            "Stopped: Stopped; use --resume.",
            {"text": "Stopped; use --resume.", "kind": "StoppedEarly", "exit_status": 75},
        ),
        (
            KeyboardInterrupt(),
            "Stopped: KeyboardInterrupt",
            {"text": "KeyboardInterrupt", "kind": "KeyboardInterrupt", "exit_status": None},
        ),
        (
            ValueError("bad\nTraceback ..."),
            "Failed: ValueError: bad",
            {"text": "ValueError: bad", "kind": "ValueError", "exit_status": None},
        ),
    ],
)
def test_by_what_a_run_ended_stands_in_the_log_and_in_json_but_not_on_the_screen(
    tmp_path: Path, error: BaseException, line: str, event: dict[str, Any]
) -> None:
    for mode in MODES:
        stream = io.StringIO()
        voice = Narration(mode, stream=stream)
        voice.log_to(tmp_path / f"{mode}.log")
        voice.end(error)
        voice.close()
        assert (tmp_path / f"{mode}.log").read_text().partition(" ")[2] == f"{line}\n"
        if mode == "json":
            (found,) = events(stream.getvalue())
            assert found == {"event": "error", "time": found["time"]} | event
        else:
            assert stream.getvalue() == ""


# --- the list of events ----------------------------------------------------------------------------------------------


def test_every_event_that_the_code_emits_is_listed_with_its_fields() -> None:
    unlisted = []
    for path in sorted(SOURCE.glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] in ("event", "_emit", "_json"):
                name = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
                fields = {word.arg for word in call.keywords if word.arg} - {"style", "passing"}
                if name is not None and not fields <= set(EVENTS.get(str(name), ())):
                    unlisted.append((path.name, name, fields))
    assert unlisted == []


def test_the_page_of_events_is_the_list() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (`.*?`) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: set(re.findall(r"`(\w+)`", cell)) for name, cell in rows} == {
        name: set(fields) for name, fields in EVENTS.items()
    }
    assert len(rows) == len(EVENTS)


@pytest.mark.slow
def test_every_event_of_a_real_run_is_listed(tiny_set: Path, tmp_path: Path) -> None:
    settings = ["image.size_px=32", "evaluation.bootstrap=0", "train.epochs=3", "train.plateau_patience=1"]
    spec = Spec.preset_named("smoke").with_overrides([*settings, "models=cnn", "cnn.learning_rate=0.5"])
    stream = io.StringIO()
    pipeline.run(spec, tiny_set, tmp_path / "run", narration=Narration("json", stream=stream))
    found = events(stream.getvalue())
    for event in found:
        assert set(event) == {"event", "time", *EVENTS[event["event"]]}, event
    assert {"say", "stage", "done", "table", "warning", "epoch"} <= {event["event"] for event in found}
    rows = [event for event in found if event["event"] == "epoch"]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    losses = [row["val_loss"] for row in rows]
    for index, row in enumerate(rows):
        best = min(range(index + 1), key=losses.__getitem__)
        assert (row["best_epoch"], row["best_val_loss"]) == (best + 1, losses[best])
        assert (row["wait"], row["patience"], row["epochs"]) == (index - best, spec.train.patience, 3)
    log = (tmp_path / "run" / "run.log").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (  )?\S", line) for line in log)
    assert all(len(line) <= 80 for line in (line.partition(" ")[2] for line in log) if re.match(r"  cnn \d", line))


def test_no_name_of_a_patient_is_said_or_logged(tmp_path: Path) -> None:
    for label in ("NORMAL", "PNEUMONIA"):
        for index in range(12):
            write_dicom(tmp_path / "data" / label / f"{index}.dcm", seed=index, broken=index == 0)
    stream = io.StringIO()
    voice = Narration("json", stream=stream)
    voice.log_to(tmp_path / "run.log")
    spec = Spec.preset_named("smoke")
    catalog, _ = survey.read_images(spec, tmp_path / "data", voice)
    voice.close()
    assert (catalog.table["status"] != "ok").any()
    log = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert "left out" in log
    assert re.findall("SURNAME|SECRET|19700101", log + stream.getvalue()) == []


def write_dicom(path: Path, *, seed: int, broken: bool) -> None:
    """Write a small image in whose header a person is named; a broken one has too few pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", pydicom.uid.generate_uid()
    data.PatientName, data.PatientID, data.PatientBirthDate = "SURNAME^GIVEN", "SECRET", "19700101"
    data.Modality, data.PhotometricInterpretation, data.SamplesPerPixel = "CR", "MONOCHROME2", 1
    data.Rows = data.Columns = 64
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    pixels = np.random.default_rng([seed, len(path.parent.name)]).integers(0, 255, (64, 64), dtype=np.uint8).tobytes()
    data.PixelData = pixels[:100] if broken else pixels
    data.save_as(path, enforce_file_format=True)


# --- durations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.04, "0.0 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (60, "1 min 00 s"),
        (185.4, "3 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (3600, "1 h 00 min"),
        (90061, "25 h 01 min"),
    ],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
