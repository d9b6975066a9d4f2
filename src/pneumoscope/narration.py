"""What a running job says: bars on a terminal, plain lines in a file, JSON events for machines, and a log of it all.

Owns the screen and ``run.log``. Knows nothing of what the stages do.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pneumoscope import _files

Mode = Literal["terminal", "plain", "json", "silent"]
_SECONDS_BETWEEN_LINES = 20.0


class Narration:
    """A job's voice.

    Parameters
    ----------
    mode : {"terminal", "plain", "json", "silent"}, optional
        ``terminal`` has bars and colours, ``plain`` one line per fact, ``json`` one event per line; chosen by whether
        the stream is a terminal where not given.
    stream : file, optional
        Where to; standard output where not given.
    """

    def __init__(self, mode: Mode | None = None, *, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout
        self.mode: Mode = mode or ("terminal" if self._stream.isatty() else "plain")
        self._console = Console(  # what is said is text: file names may look like markup or emoji
            file=self._stream, highlight=False, markup=False, emoji=False, force_terminal=self.mode == "terminal"
        )
        self._log: IO[str] | None = None

    def log_to(self, path: Path) -> None:
        """Append everything said from now on to a file, with times."""
        self.close()
        self._log = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def say(self, text: str) -> None:
        """Say one fact."""
        self._emit("say", text, style="", text=text)

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
        self._emit(name, text, style="", **values)

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
            drawn = Table(title=visible(title), title_justify="left", header_style="bold")
            for index, name in enumerate(shown[0]):
                drawn.add_column(name, justify="left" if index == 0 else "right")
            for row in shown[1:]:
                drawn.add_row(*row)
            self._console.print(drawn)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Announce a piece of work, and how long it took when it ends well."""
        started = time.monotonic()
        self._emit("stage", f"{title} ...", style="bold", title=title)
        yield
        seconds = time.monotonic() - started
        self._emit("done", f"{title}: done in {seconds_text(seconds)}", style="green", title=title, seconds=seconds)

    @contextmanager
    def bar(self, label: str, *, unit: str = "images") -> Iterator[Callable[[int, int], None]]:
        """Give a function (done, total) that shows progress with a rate and the time left.

        Parameters
        ----------
        label : str
            What is counted.
        unit : str
            Plural noun.

        Yields
        ------
        callable
            Takes (done, total); may be called as often as one likes.
        """
        if self.mode == "terminal":
            columns = (
                TextColumn("  {task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}", markup=False),
            )
            with Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True) as progress:
                task = progress.add_task(visible(label), total=None, rate="")
                speed = _Speed()

                def update(done: int, total: int) -> None:
                    rate = f"{speed(done):,.1f} {unit}/s"
                    progress.update(task, completed=done, total=total, rate=rate)

                yield update
        else:
            yield _Lines(self, label, unit)

    def _emit(self, name: str, line: str, /, *, style: str, **values: Any) -> None:
        line = visible(line)
        self._write_log(line)
        if self.mode == "json":
            self._json(name, **values)
        elif self.mode == "plain":
            self._print(line)
        elif self.mode == "terminal":
            self._console.print(line, style=style)

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
            self._log.write("".join(f"{stamp} {line}\n" for line in text.splitlines()))
            self._log.flush()


class _Speed:
    """Things done per second since the count last began; it begins anew where it falls, as in every epoch."""

    def __init__(self) -> None:
        self._since, self._from, self._last = time.monotonic(), 0, 0

    def __call__(self, done: int) -> float:
        if done < self._last:
            self._since, self._from = time.monotonic(), done
        self._last = done
        return (done - self._from) / max(time.monotonic() - self._since, 1e-6)


class _Lines:
    """Progress where there is no terminal: a line now and then."""

    def __init__(self, narration: Narration, label: str, unit: str) -> None:
        self._narration, self._label, self._unit = narration, label, unit
        self._last, self._speed = time.monotonic(), _Speed()

    def __call__(self, done: int, total: int) -> None:
        rate, now = self._speed(done), time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES or not rate:
            return
        self._last = now
        text = (
            f"  {self._label}: {done:,} of {total:,} ({rate:,.1f} {self._unit}/s, "
            f"{seconds_text((total - done) / rate)} left)"
        )
        self._narration.event("progress", text, label=self._label, done=done, total=total, rate=rate)


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
