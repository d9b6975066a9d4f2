"""A checkpoint: the whole state of something long, in one checksummed file, beside the one before it.

Owns the file, its damage and the order in which the next one takes its place. Knows nothing of what the state is of.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pneumoscope import _files
from pneumoscope.errors import PneumoscopeError, RunError

Arrays = Mapping[str, npt.NDArray[Any]]

_DIGEST_BYTES = 64  # the file ends with its SHA-256: an archive's own checksums leave its directory open


class Checkpoint:
    """A state on the disk and the one before it; one process at a time may use them.

    Parameters
    ----------
    path : Path, optional
        Of the newest, an ``.npz`` file; where not given, nothing is kept.
    signature : str
        Of the work; a state is only taken up by work with the same.
    """

    def __init__(self, path: Path | None, *, signature: str) -> None:
        self._path, self._signature = path, signature

    def save(self, state: Mapping[str, Any], arrays: Arrays) -> None:
        """Write a state; at every instant at least one whole state stands.

        Parameters
        ----------
        state : mapping
            Plain values.
        arrays : mapping of str to ndarray
            Of any shape and dtype; no name is ``state``.

        Raises
        ------
        RunError
            Where it cannot be written; what was kept before stays.
        """
        if self._path is None:
            return
        text = json.dumps({"signature": self._signature, **state})
        members: dict[str, Any] = {"state": np.frombuffer(text.encode(), dtype=np.uint8), **arrays}
        buffer = io.BytesIO()
        np.savez(buffer, **members)
        data = buffer.getvalue()
        try:
            with _files.replacing(self._path) as file:
                file.write(data + _files.sha256_of(data).encode())
                file.flush()
                os.fsync(file.fileno())
                if self._path.exists():  # the new one is on the disk: only now may the one before the last go
                    os.replace(self._path, _before(self._path))
        except PneumoscopeError as error:
            raise RunError(
                f"The state of the training ({_files.size_text(len(data))}) cannot be written to {self._path}: "
                f"{getattr(error.__cause__, 'strerror', None) or error}; what was kept before it is whole, so free "
                "space there and run the same command with --resume."
            ) from error

    def load(self, say: Callable[[str], None] | None = None) -> tuple[dict[str, Any], Arrays] | None:
        """Return the newest whole state, and drop what is damaged.

        Parameters
        ----------
        say : callable, optional
            Called with a sentence where something was damaged.

        Returns
        -------
        tuple of (dict, mapping of str to ndarray, each of any shape), or None
            As `save` got them; None where there is no whole state.

        Raises
        ------
        RunError
            Where the state is of other work, or cannot be read.
        """
        if self._path is None:
            return None
        for left in self._path.parent.glob(f".{self._path.name}.*.tmp"):  # by processes killed while they wrote
            left.unlink()
        damaged = []
        found = None
        for path in (self._path, _before(self._path)):
            content = _read(path)
            data, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
            if _files.sha256_of(data).encode() == digest:
                found = self._parsed(data)
                break
            if path.exists():
                damaged.append(str(path))
                path.unlink()  # `save` must not put it in the place of the whole one
        if damaged and say is not None:
            then = "starts afresh" if found is None else "goes on from the state before it"
            say(f"{' and '.join(damaged)} {'is' if len(damaged) == 1 else 'are'} damaged; the training {then}.")
        return found

    def _parsed(self, data: bytes) -> tuple[dict[str, Any], Arrays]:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        state = json.loads(arrays.pop("state").tobytes())
        if state.pop("signature") != self._signature:
            raise RunError(
                f"{self._path} belongs to a run with another configuration or other images; "
                "use the same ones to go on, or a new run directory."
            )
        return state, arrays


def _before(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _read(path: Path) -> bytes:
    """Return a file's bytes, none where there is no file; what cannot be read for now is not damaged."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror or error}); see to the disk or the rights, then run the same "
            "command with --resume."
        ) from error
