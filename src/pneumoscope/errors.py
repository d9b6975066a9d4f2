"""Every error that pneumoscope raises on purpose, and the exit status each one means.

    PneumoscopeError            exit status 1: the data or the result is bad
    ├── DataError               a data set that cannot be used as it stands
    ├── ImageError              one file that is not a usable image (carries a short ``reason``)
    ├── StoreError              packed images or features that are missing, damaged or do not fit
    ├── WeightsError            pretrained weights that cannot be had or do not fit
    ├── RunError                a run directory that cannot be written, read or continued
    ├── UsageError              exit status 2: the call is wrong
    │   └── SpecError           a configuration key or value that is not valid
    └── StoppedEarly            exit status 75: stopped on request, ``--resume`` goes on

The message of each is one sentence for the person at the keyboard: what was wrong, what was found, what was
expected, what to do next. This module knows nothing of how the message is shown.
"""

from __future__ import annotations

from typing import ClassVar


class PneumoscopeError(Exception):
    """Base of all errors raised on purpose; ``exit_status`` is what the command line returns."""

    exit_status: ClassVar[int] = 1


class DataError(PneumoscopeError):
    """The data set as a whole cannot be used (no class, one class, nothing readable, no such folder)."""


class ImageError(PneumoscopeError):
    """One file is not a usable image.

    Parameters
    ----------
    reason : str
        A few words that stand in the Catalog's ``status`` column, for example ``"truncated"``.
    detail : str, optional
        The whole sentence; ``reason`` where none is given.
    """

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(detail or reason)
        self.reason = reason


class StoreError(PneumoscopeError):
    """Packed images or stored features are missing, damaged, or belong to something else."""


class WeightsError(PneumoscopeError):
    """Pretrained weights are not here, cannot be fetched, or do not fit the network."""


class RunError(PneumoscopeError):
    """A run directory cannot be written, read or continued."""


class UsageError(PneumoscopeError):
    """The call itself is wrong."""

    exit_status: ClassVar[int] = 2


class SpecError(UsageError):
    """A configuration key or value is not valid."""


class StoppedEarly(PneumoscopeError):
    """Work was stopped by a signal; what was done is kept and can be resumed."""

    exit_status: ClassVar[int] = 75
