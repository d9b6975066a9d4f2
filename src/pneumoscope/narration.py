"""What a running job says: one line that moves on a terminal, plain lines in a file, JSON events for machines, a log.

Owns the screen, ``run.log`` and the names of the events (`EVENTS`; ``docs/events.md`` explains them). Knows nothing of
what the stages do.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pneumoscope import _files
from pneumoscope._stopping import Wish
from pneumoscope.errors import PneumoscopeError, RunError, StoppedEarly

Mode = Literal["terminal", "plain", "json", "silent"]

EVENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "say": ("text",),
        "warning": ("text",),
        "stage": ("title",),
        "done": ("title", "seconds"),
        "broken": ("title", "seconds", "how"),
        "progress": ("label", "note", "done", "total", "unit", "rate", "left_seconds"),
        "table": ("title", "columns", "rows"),
        "error": ("text", "kind", "exit_status"),
        "teacher": ("model", "number", "of"),
        "learning-rate": ("model", "epoch", "before", "now"),
        "epoch": (
            *("model", "epoch", "epochs", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate"),
            *("seconds", "best_epoch", "best_val_loss", "wait", "patience"),
        ),
        "job": ("name", "id", "state"),
        "packed": ("folder", "images", "rejected"),
        "fetched": ("name", "path", "command"),
        "cleaned": ("entries", "freed"),
        "check": ("name", "state", "sentence", "remedy"),
        "evaluated": ("path",),
        "explained": ("path",),
        "exported": ("path",),
        "reported": ("path",),
        "recalibrated": ("path",),
        "answer": ("file", "score", "probability", "call", "operating_point", "assessable", "reason", "evidence"),
        "predicted": (
            *("model", "operating_point", "threshold", "n", "calls", "not_assessable", "unknown", "unreadable"),
            *("csv", "evidence", "note"),
        ),
        "serving": ("url",),
    }
)
"""Every event of ``--json`` and its fields beside ``event`` and ``time``."""

_SECONDS_BETWEEN_LINES = 20.0
_SECONDS_BEFORE_A_RATE = 1.0
_BAR = range(8, 31)  # columns


class Narration:
    """A job's voice.

    Parameters
    ----------
    mode : {"terminal", "plain", "json", "silent"}, optional
        ``terminal`` has a moving line and colours, ``plain`` one line per fact, ``json`` one event per line; chosen by
        whether the stream is a terminal where not given.
    stream : file, optional
        Where to; standard output where not given.
    """

    def __init__(self, mode: Mode | None = None, *, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout
        moves = self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self.mode: Mode = mode or ("terminal" if moves else "plain")
        if self.mode == "terminal" and hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")  # a bar must not end a run
        self._console = Console(  # what is said is text: file names may look like markup or emoji
            file=self._stream, highlight=False, markup=False, emoji=False, force_terminal=self.mode == "terminal"
        )
        self._foot = _Foot(self._console)
        self._log: IO[str] | None = None

    def log_to(self, path: Path) -> None:
        """Append everything said from now on to a file, with times.

        Parameters
        ----------
        path : Path
            Of the file; where it cannot be written any more, that is said once and nothing else ends by it.

        Raises
        ------
        RunError
            Where it cannot be opened.
        """
        self.close()
        try:
            self._log = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"Cannot write {path}: {error.strerror or error}; free space or mend its rights.") from error

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            with contextlib.suppress(OSError):  # of what could not be written before either
                self._log.close()
            self._log = None

    def say(self, text: str) -> None:
        """Say one fact."""
        self._emit("say", text, text=text)

    def warn(self, text: str) -> None:
        """Say what the reader must not miss."""
        self._emit("warning", f"Warning: {text}", style="yellow", text=text)

    def event(self, name: str, text: str, /, **values: Any) -> None:
        """Say a fact that machines read by its values.

        Parameters
        ----------
        name : str
            The event's name in JSON.
        text : str
            The same for people.
        **values
            Plain values for machines.
        """
        self._emit(name, text, **values)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table; the first column stands left, the others right.

        Parameters
        ----------
        title : str
            Above it.
        columns : sequence of str
            Heads.
        rows : sequence of sequence of str
            Cells, already text.
        """
        shown = [[visible(cell) for cell in row] for row in (columns, *rows)]
        widths = [max(len(cell) for cell in column) for column in zip(*shown, strict=True)]
        lines = [
            "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip()
            for first, *others in shown
        ]
        text = "\n".join([visible(title), *lines])
        self._write_log(text)
        if self.mode == "json":
            self._json("table", title=title, columns=list(columns), rows=[list(row) for row in rows])
        elif self.mode == "plain":
            self._print(text)
        elif self.mode == "terminal":
            for index, drawn in enumerate(_fitting(shown, self._console)):
                self._show(visible(title) + ", continued" * (index > 0))
                self._console.print(drawn)

    def end(self, error: BaseException) -> None:
        """Keep in the log, and tell machines, by what a run ended; whoever catches the error tells people.

        Parameters
        ----------
        error : BaseException
            Of any kind.
        """
        if isinstance(error, Wish):
            error = StoppedEarly(str(error))  # what it becomes for whoever catches it
        meant = isinstance(error, PneumoscopeError)
        text = str(error) if meant else f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")
        self._write_log(visible(f"{'Stopped' if _is_stop(error) else 'Failed'}: {text}"))
        if self.mode == "json":
            status = error.exit_status if isinstance(error, PneumoscopeError) else None
            self._json("error", text=text, kind=type(error).__name__, exit_status=status)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Announce a piece of work, and say how long it took when it ends; on a terminal only the latter stays.

        Parameters
        ----------
        title : str
            What is done, for example ``"Packing the images"``.

        Yields
        ------
        None
        """
        started = time.monotonic()
        self._emit("stage", f"{title} ...", passing=True, title=title)
        try:
            with self._shown(_Task(visible(title))):
                yield
        except BaseException as error:
            how, seconds = "stopped" if _is_stop(error) else "failed", time.monotonic() - started
            line = f"{title}: {how} after {seconds_text(seconds)}"
            self._emit("broken", line, style="yellow", title=title, seconds=seconds, how=how)
            raise
        seconds = time.monotonic() - started
        self._emit("done", f"{title}: done in {seconds_text(seconds)}", style="green", title=title, seconds=seconds)

    @contextmanager
    def bar(self, label: str, *, unit: str = "images") -> Iterator[Bar]:
        """Give a function (done, total) that shows progress with a rate and the time left.

        Parameters
        ----------
        label : str
            What is counted.
        unit : str
            Plural noun; ``"bytes"`` are shown as sizes.

        Yields
        ------
        Bar
            Takes (done, total); may be called as often as one likes.
        """
        bar = Bar(self, label, unit)
        with self._shown(bar.task):
            yield bar

    @contextmanager
    def _shown(self, task: _Task) -> Iterator[None]:
        if self.mode != "terminal":
            yield
            return
        with self._foot.showing(task):
            yield

    def _emit(self, name: str, line: str, /, *, style: str = "", passing: bool = False, **values: Any) -> None:
        """Say something in each mode's way; what is passing stands in the moving line on a terminal already."""
        line = visible(line)
        self._write_log(line)
        if self.mode == "json":
            self._json(name, **values)
        elif self.mode == "plain":
            self._print(line)
        elif self.mode == "terminal" and not passing:
            self._show(line, style)

    def _show(self, line: str, style: str = "") -> None:
        """Print on a terminal; what is broken into several lines keeps its indent."""
        indent = len(line) - len(line.lstrip())
        for part in Text(line.lstrip()).wrap(self._console, max(self._console.width - indent, 1)):
            self._console.print(" " * indent + part.plain, style=style, soft_wrap=True)

    def _print(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        self._stream.flush()

    def _json(self, name: str, /, **values: Any) -> None:
        event = {"event": name, "time": _now(), **values}
        self._print(json.dumps(_files.jsonable(event), ensure_ascii=True))

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            stamp = _now()
            try:
                self._log.write("".join(f"{stamp} {line}\n" for line in text.splitlines()))
                self._log.flush()
            except OSError as error:  # a full disk: the work, and what it says of that itself, matter more
                self.close()
                self.warn(f"The log is not written any more ({error.strerror}).")


class Bar:
    """Progress that is being made; `Narration.bar` gives it. Called with (done, total).

    Parameters
    ----------
    narration : Narration
        Who shows it.
    label : str
        What is counted.
    unit : str
        Plural noun.
    """

    def __init__(self, narration: Narration, label: str, unit: str) -> None:
        self.task = _Task(visible(label), unit)
        self._narration, self._label, self._last = narration, label, time.monotonic()

    def note(self, text: str) -> None:
        """Show some words in the place of the count, for example ``"epoch 3/20"``."""
        self.task.note = visible(text)

    def __call__(self, done: int, total: int) -> None:
        """Take in how much is done, out of how much."""
        task, now = self.task, time.monotonic()
        task.update(done, total, now)
        if done and now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            pace = ", ".join(filter(None, (task.rate_text(), task.left_text())))
            note = f"{task.note}, " if task.note else ""
            text = f"  {self._label}: {note}{task.count_text(' of ')}" + (f" ({pace})" if pace else "")
            values: dict[str, Any] = {"label": self._label, "note": task.note, "done": done, "total": total}
            values |= {"unit": task.unit, "rate": task.rate or None, "left_seconds": task.left()}
            self._narration._emit("progress", text, passing=True, **values)


class _Task:
    """What is being done, and for a bar how far it is; the rate begins anew where the count falls.

    The first report sets the beginning of the count: before it, networks were compiled, and what earlier processes had
    done may be in it.
    """

    def __init__(self, title: str, unit: str = "") -> None:
        self.title, self.unit, self.note = title, unit, ""
        self.started = time.monotonic()
        self.done, self.total, self.rate = 0, 0, 0.0
        self._from: tuple[int, float] | None = None

    def update(self, done: int, total: int, now: float) -> None:
        if self._from is None or done < self.done:
            self._from = done, now
        self.done, self.total = done, total
        if now - self._from[1] >= _SECONDS_BEFORE_A_RATE:
            self.rate = (done - self._from[0]) / (now - self._from[1])

    def left(self) -> float | None:
        """Return the seconds that are left, where that can be told."""
        return (self.total - self.done) / self.rate if self.rate and self.done < self.total else None

    def count_text(self, between: str) -> str:
        if self.unit == "bytes":
            return f"{_files.size_text(self.done)}{between}{_files.size_text(self.total)}"
        return f"{self.done:,}{between}{self.total:,} {self.unit if self.total != 1 else self.unit.removesuffix('s')}"

    def rate_text(self) -> str:
        if not self.rate:
            return ""
        if self.unit == "bytes":
            return f"{_files.size_text(self.rate)}/s"
        return f"{self.rate:,.{0 if self.rate >= 100 else 1}f} {self.unit}/s"

    def left_text(self) -> str:
        left = self.left()
        return "" if left is None else f"{seconds_text(left) if left >= 59.5 else f'{left:.0f} s'} left"


class _Foot:
    """The line at the foot of a terminal that moves while work is done, and is gone when it has ended."""

    def __init__(self, console: Console) -> None:
        self._console, self._tasks = console, list[_Task]()

    @contextmanager
    def showing(self, task: _Task) -> Iterator[None]:
        """Show a task, within the one that is shown already where there is one."""
        self._tasks.append(task)
        try:
            if len(self._tasks) > 1:
                yield
                return
            own = self._console.file is sys.stdout
            errors = own and sys.stderr is not None and sys.stderr.isatty()  # else they go to a file, and shall
            with Live(
                console=self._console,
                get_renderable=self.line,
                refresh_per_second=8,
                transient=True,
                redirect_stdout=own,
                redirect_stderr=errors,
            ):
                yield
        finally:
            self._tasks.remove(task)

    def line(self) -> Text:
        """Return the line, which always fits: title, bar, and as much of the numbers as there is room for."""
        if not self._tasks:
            return Text()
        outer, task, width = self._tasks[0], self._tasks[-1], self._console.width - 1
        title = outer.title
        if task is not outer and task.title.lower() not in f"{title} {task.unit}".lower():
            title = f"{title}: {task.title}"
        spinner, full, empty = ("|/-\\", "#", "-") if self._console.options.ascii_only else ("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "━", "─")
        elapsed = time.monotonic() - outer.started
        turn = spinner[int(elapsed * 8) % len(spinner)]
        line = Text(f"{turn} ", style="green", no_wrap=True, overflow="crop", end="")
        if not task.total:
            line.append(f"{_cut(title, width - 12)}  {elapsed:.0f} s", style="default")
            return line
        words = task.note or task.count_text("/")
        for parts in ((words, task.rate_text(), task.left_text()), (words, task.left_text()), (words,)):
            numbers = ", ".join(filter(None, parts))
            room = width - 2 - cell_len(title) - 2 - len(numbers)
            if room >= _BAR.start:
                break
        size = min(max(room, _BAR.start), _BAR.stop - 1)
        title = _cut(title, width - 4 - size - len(numbers))
        filled = min(size * task.done // task.total, size)
        line.append(f"{title} ", style="default").append(full * filled, style="magenta")
        return line.append(empty * (size - filled), style="bright_black").append(f" {numbers}", style="default")


def _cut(text: str, length: int) -> str:
    """Return the beginning of a text, at most so many columns wide."""
    return text if cell_len(text) <= length else f"{set_cell_size(text, max(length - 1, 0))}…"


def _fitting(rows: Sequence[Sequence[str]], console: Console) -> Iterator[Table]:
    """Make a table, or several to stand below one another, the first column in each, where one would be too wide."""
    endless, count, first = console.options.update(max_width=10_000), len(rows[0]), 1
    while first < max(count, 2):
        last = count
        while (drawn := _drawn(rows, [0, *range(first, last)])) and last > first + 1:
            if console.measure(drawn, options=endless).maximum <= console.width:
                break
            last -= 1
        yield drawn
        first = max(last, 2)


def _drawn(rows: Sequence[Sequence[str]], columns: Sequence[int]) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(rows[0][column], justify="right" if column else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*(row[column] for column in columns))
    return table


def _is_stop(error: BaseException) -> bool:
    return isinstance(error, StoppedEarly | KeyboardInterrupt)


def seconds_text(seconds: float) -> str:
    """Return a duration for people, for example ``"3 min 05 s"``."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def visible(text: str) -> str:
    """Escape what would break a line or steer a terminal: control and format characters, lone surrogates."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
