"""The ledger: how often a test set has been looked at, by which models, with what result.

A test set that was looked at often has been tuned on, whether anybody meant to or not. Every scoring of one is appended
to a file in the cache and never taken out, kept by what the test images *are*, so that another folder, another name or
another run makes no fresh start. Knows nothing of how a score comes about, and keeps no path and no name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pneumoscope import _files
from pneumoscope.errors import RunError

_VERSION = 1


@dataclass(frozen=True)
class Look:
    """One scoring of one test set by one model.

    Attributes
    ----------
    test_set : str
        `test_set_of` its images.
    spec_hash, model_hash : str
        SHA-256 of the Spec and of the model's file, 64 hexadecimal digits each.
    model : str
        The approach.
    n : int
        Images scored.
    auc, accuracy : float or None
        What was seen, in [0, 1]; None where undefined. Accuracy is at threshold 0.5.
    time : str
        When, ISO 8601, UTC.
    """

    test_set: str
    spec_hash: str
    model_hash: str
    model: str
    n: int
    auc: float | None
    accuracy: float | None
    time: str = ""


@dataclass(frozen=True)
class Ledger:
    """A file of looks, one per line, to which lines are only ever added.

    Attributes
    ----------
    path : Path
        ``ledger.jsonl`` in the cache.
    """

    path: Path

    @classmethod
    def in_cache(cls) -> Self:
        """Return the user's ledger; the file comes into being with the first look."""
        return cls(_files.cache_dir() / "ledger.jsonl")

    def append(self, look: Look) -> None:
        """Add one look, stamped with the time, safely beside other processes.

        Parameters
        ----------
        look : Look
            Its own ``time`` is replaced.

        Raises
        ------
        RunError
            Where the ledger cannot be written: a test set is not looked at in secret.
        """
        stamped = asdict(look) | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        line = json.dumps({"schema_version": _VERSION} | stamped, allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write in append mode: lines of several processes stand after one another, never inside.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, (b"" if self._ends_whole() else b"\n") + line.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunError(
                f"The test-set ledger {self.path} cannot be written ({error.strerror or error}); "
                "set PNEUMOSCOPE_CACHE to a folder you may write to."
            ) from error

    def looks(self, test_set: str) -> list[Look]:
        """Return every look at one test set, oldest first; damaged lines are passed over.

        Parameters
        ----------
        test_set : str
            From `test_set_of`.
        """
        return [look for look in self._all() if look.test_set == test_set]

    def summary(self, test_set: str) -> dict[str, Any]:
        """Return how often a test set was looked at, as ``metrics.json`` holds it.

        Parameters
        ----------
        test_set : str
            From `test_set_of`.

        Returns
        -------
        dict
            ``test_set``, ``looks`` (scorings), ``models`` (different model files), ``specs`` (different Specs),
            ``first`` and ``last`` (times; None where there was none) and ``sentence``.
        """
        looks = self.looks(test_set)
        models, specs = ({getattr(look, name) for look in looks} for name in ("model_hash", "spec_hash"))
        counts = [f"{n:,} {noun}{'' if n == 1 else 's'}" for n, noun in (
            (len(looks), "time"), (len(models), "model"), (len(specs), "configuration")
        )]  # fmt: skip
        sentence = (
            f"These test images have been scored {counts[0]} on this machine, by {counts[1]} of {counts[2]}; "
            "each look that led to a choice makes the figures flatter."
        )
        return {
            "test_set": test_set,
            "looks": len(looks),
            "models": len(models),
            "specs": len(specs),
            "first": looks[0].time if looks else None,
            "last": looks[-1].time if looks else None,
            "sentence": sentence,
        }

    def _ends_whole(self) -> bool:
        """Whether the last line was written to its end; a machine can stop in the middle of one."""
        if not self.path.exists() or not self.path.stat().st_size:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _all(self) -> Iterable[Look]:
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        for line in lines:
            try:
                content = json.loads(line)
                content.pop("schema_version")
                yield Look(**content)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue


def test_set_of(image_ids: Sequence[str]) -> str:
    """Name a set of images by what they are.

    Parameters
    ----------
    image_ids : sequence of str
        From the Catalog; order and repetition do not matter.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    return _files.hash_of({"image_ids": sorted(set(image_ids))})[:16]
