"""A wish to stop, from a signal: work that can be taken up again ends at once, work that must keep its state is told.

Owns the signals. Knows nothing of what is stopped: everything here is written aside and renamed, so that an exception
may come at any line, as a kill may.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pneumoscope.errors import StoppedEarly, UsageError

_patient = 0


@contextmanager
def patient() -> Iterator[None]:
    """Say that the work inside asks by itself whether to stop, and keeps its state first."""
    global _patient
    _patient += 1
    try:
        yield
    finally:
        _patient -= 1


@contextmanager
def on_signals(*names: str) -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM, Ctrl-C and further signals into a wish to stop.

    Outside `patient`, the wish raises `StoppedEarly` where the program stands; within, whoever asks is told. A second
    Ctrl-C interrupts at once.

    Parameters
    ----------
    *names : str
        Further signals without ``SIG``, such as the one a cluster sends before a time limit; those that this system
        lacks are left out.

    Yields
    ------
    callable
        Whether to stop.

    Raises
    ------
    UsageError
        Where a name is that of a signal that cannot be caught.
    """
    wished = False

    def wish(number: int, _: FrameType | None) -> None:
        nonlocal wished
        if wished and number == signal.SIGINT:
            raise KeyboardInterrupt
        wished = True
        if not _patient:
            raise StoppedEarly("Stopped on request; run the same command with --resume.")

    before: dict[signal.Signals, Any] = {}
    try:
        for name in ("INT", "TERM", *names):
            number = getattr(signal, f"SIG{name}", None)
            if number is None or number in before:
                continue
            try:
                before[number] = signal.signal(number, wish)
            except OSError as error:
                raise UsageError(f"SIG{name} cannot be caught; name another signal, such as USR2.") from error
        yield lambda: wished
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
