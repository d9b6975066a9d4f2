"""What a job says, in each mode, to each stream: whole lines, plain JSON, and names that cannot steer a terminal."""

from __future__ import annotations

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

import pytest

from pneumoscope import narration
from pneumoscope.narration import Mode, Narration, seconds_text

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
    assert stream.getvalue().splitlines()[2:] == ["Scoring ..."]


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
    assert re.fullmatch(r"  files: 2\d\d of 2,000 \(10\.0 files/s, (2 min 5\d|3 min 00) s left\)", lines[0])


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
        progress(0, 1000)  # nothing is done yet: no rate, no line
        progress(100, 1000)
    (event,) = events(stream.getvalue())
    assert {key: event[key] for key in ("event", "label", "done", "total", "rate")} == {
        "event": "progress", "label": "cnn", "done": 100, "total": 1000, "rate": 2.0
    }  # fmt: skip


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
        "  files: 30 of 60 (0.5 images/s, 1 min 00 s left)",
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


def test_a_terminal_is_seen_and_shows_a_bar_with_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def speak(stream: IO[str]) -> None:
        voice = Narration(stream=stream)
        assert voice.mode == "terminal"
        with voice.bar("files", unit="files") as progress:
            progress(1, 1234)
            progress(1234, 1234)
        voice.warn("look here")

    shown = on_a_terminal(speak)
    assert re.search(r"files .*━.* .*1234/1234.* [\d,.]+ files/s", shown)
    assert "\x1b[33mWarning: look here\x1b[0m" in shown


def test_terminal_mode_shows_its_bar_on_any_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = said("terminal")
    assert re.search(r"image\.jpeg .*━.* .*2/2.* [\d,.]+ images/s", shown)
    assert re.search(r"image\.jpeg +│ +1,234 ", shown)
    assert "Packing image.jpeg: done in" in shown


def test_off_a_terminal_the_mode_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    assert Narration(stream=io.StringIO()).mode == "plain"
    voice = Narration()
    assert voice.mode == "plain"
    voice.say("to standard output")
    assert capsys.readouterr() == ("to standard output\n", "")


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
