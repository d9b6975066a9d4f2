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

_SENTENCE = "Stopped on request; run the same command with --resume."
_patient = 0
_put_off = False  # a wish that came while work was patient


class Wish(KeyboardInterrupt):
    """What a signal raises where the program stands; no handler of errors takes it for one, as Ctrl-C elsewhere."""


@contextmanager
def patient() -> Iterator[None]:
    """Say that the work inside asks by itself whether to stop, and keeps its state first.

    Raises
    ------
    StoppedEarly
        Where the work ended without asking once more after the wish came.
    """
    global _patient
    _patient += 1
    try:
        yield
    finally:
        _patient -= 1
    if _put_off and not _patient:
        raise StoppedEarly(_SENTENCE)


@contextmanager
def on_signals(*names: str) -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM, Ctrl-C and further signals into a wish to stop.

    Outside `patient`, the wish ends what is done where the program stands, by a `Wish`; within, whoever asks is told. A
    second Ctrl-C interrupts at once.

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
    StoppedEarly
        Where the block was ended by a wish.
    UsageError
        Where a name is that of a signal that cannot be caught.
    """
    global _put_off
    wished = _put_off = False

    def wish(number: int, _: FrameType | None) -> None:
        global _put_off
        nonlocal wished
        if wished and number == signal.SIGINT:
            raise KeyboardInterrupt
        wished = True
        if not _patient:
            raise Wish(_SENTENCE)
        _put_off = True

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
    except Wish as error:
        raise StoppedEarly(_SENTENCE) from error
    finally:
        _put_off = False
        for number, handler in before.items():
            signal.signal(number, handler)
