"""Locks between processes: one holder of a name at a time, on this machine and on others that see the same folder.

Owns the two ways in which a holder is known to live: a lock of the kernel on ``NAME.lock``, and a lease,
``NAME.N.json``, that its holder touches every few seconds. Knows nothing of what is locked.

The kernel lets go the moment a process dies, but some file systems know no such locks, and on others they reach no
further than one machine. So both are taken. The lease with the largest number is the one in force. A new one is made
only where the one before was given back or its holder is dead, and making a file of a given name succeeds only once.
It is not deleted before a later one stands, or two could each make it anew; ``NAME.lock`` never is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pneumoscope import _files
from pneumoscope.errors import PneumoscopeError, RunError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

BEAT_S = 5.0
PATIENCE_S = 30.0
"""How long a lease of another machine must stand untouched before its holder counts as dead: six beats missed."""

_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # msvcrt says EACCES
_FAR = 2**30  # Windows locks bytes, not files; one that nobody reads


class Lease:
    """A lock that is held, and the thread that keeps it.

    Attributes
    ----------
    lost : bool
        Whether another process has taken it over, because this one was not heard of for so long (a suspended machine).
    """

    def __init__(self, path: Path, record: dict[str, Any], *, beat_s: float) -> None:
        self.lost = False
        self._path, self._record, self._beat_s = path, record, beat_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lock {path.stem}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._done.wait(self._beat_s):
            try:
                os.utime(self._path)
            except FileNotFoundError:  # a later lease stands in its place
                self.lost = True
                return
            except OSError:
                continue  # a network file system may be away for a while

    def _release(self) -> None:
        self._done.set()
        self._thread.join()
        # on a full disk the lease stays as it is, and is found dead by the next process
        with contextlib.suppress(PneumoscopeError):
            _files.write_json(self._path, self._record | {"released": True})


@contextmanager
def hold(
    folder: Path, name: str, *, what: str, beat_s: float = BEAT_S, patience_s: float = PATIENCE_S
) -> Iterator[Lease]:
    """Hold a lock for as long as the block lasts; it is given back at once where this process is killed.

    Only where the holder died on another machine does the next one wait, for `patience_s`, to see that it is dead.

    Parameters
    ----------
    folder : Path
        Where the files of the locks lie; it is created.
    name : str
        Of the lock, fit for a file's name.
    what : str
        Names what is locked, for the message.
    beat_s, patience_s : float
        Seconds between two touches of the lease, and without any until it is taken over.

    Yields
    ------
    Lease

    Raises
    ------
    RunError
        Where another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            kernel = _kernel_lock(descriptor)
            lease = None
            if kernel is not False:
                lease = _take(folder, name, kernel=bool(kernel), beat_s=beat_s, patience_s=patience_s)
            if lease is None:
                raise RunError(f"{what} is in use by {_holder(folder, name)}; wait until it ends, then run it again.")
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise RunError(
            f"{what} cannot be locked with a file in {folder}: {error.strerror or error}; "
            "free space or choose a folder you may write to."
        ) from error
    owner = os.getpid()
    try:
        yield lease
    finally:
        if os.getpid() == owner:  # a forked copy of the process gives nothing back
            lease._release()
            _kernel_unlock(descriptor)
        os.close(descriptor)


def _kernel_lock(descriptor: int) -> bool | None:
    """Try to lock a file; None where the file system knows no locks."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def _kernel_unlock(descriptor: int) -> None:
    """Unlock a file, also for copies of this process that still have it open."""
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            os.lseek(descriptor, _FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def _take(folder: Path, name: str, *, kernel: bool, beat_s: float, patience_s: float) -> Lease | None:
    """Make the next lease where the last one binds nobody; None where somebody lives, or was quicker."""
    last = max(_numbers(folder, name), default=0)
    if last and _lives(_path(folder, name, last), kernel=kernel, beat_s=beat_s, patience_s=patience_s):
        return None
    record = _record(kernel)
    path = _path(folder, name, last + 1)
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(record, file)
    except FileExistsError:
        return None
    except OSError:
        path.unlink(missing_ok=True)
        raise
    if max(_numbers(folder, name)) > last + 1:  # we looked long ago: later ones have come, and ours was cleared away
        path.unlink(missing_ok=True)
        return None
    for number in _numbers(folder, name):
        if number <= last:
            _path(folder, name, number).unlink(missing_ok=True)
    return Lease(path, record, beat_s=beat_s)


def _numbers(folder: Path, name: str) -> list[int]:
    pattern = re.compile(rf"{re.escape(name)}\.(\d+)\.json", re.ASCII)
    return [int(match[1]) for entry in folder.iterdir() if (match := pattern.fullmatch(entry.name))]


def _path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}.{number}.json"


def _record(kernel: bool) -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "schema_version": _files.SCHEMA_VERSION,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": since,
        "machine": _machine(),
        "process": _process(os.getpid()),
        "kernel": kernel,
        "released": False,
    }


def _lives(path: Path, *, kernel: bool, beat_s: float, patience_s: float) -> bool:
    """Whether a lease's holder is alive, as far as can be told from here; no two machines' clocks are compared."""
    before = _seen(path)
    held = _parsed(before[1])
    if held.get("released"):
        return False
    if held.get("machine") == _machine():
        if kernel and held.get("kernel"):
            return False  # its holder would have kept us from the kernel's lock
        alive = _alive(held)
        if alive is not None:
            return alive
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        time.sleep(beat_s / 5)
        if (now := _seen(path)) != before:
            return not _parsed(now[1]).get("released")
    return False


def _seen(path: Path) -> tuple[int, bytes]:
    """Return when a lease was last touched, and its text; opening it makes a network file system look afresh."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return 0, b""


def _parsed(text: bytes) -> dict[str, Any]:
    """Return a lease's content; empty where it is not written yet, or was written by half."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _holder(folder: Path, name: str) -> str:
    last = max(_numbers(folder, name), default=0)
    held = _parsed(_seen(_path(folder, name, last))[1])
    if not held or held.get("released"):
        return "another process, which has only just begun"
    return f"process {held.get('pid')} on {held.get('host')} since {held.get('since')}"


def _machine() -> str:
    """Name the running kernel: two machines can have one name, and a restarted one has none of its processes."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _process(pid: int) -> str:
    """Name a process so that no later one with its number is taken for it; empty where that cannot be told."""
    try:
        within = Path("/proc/self/ns/pid").readlink()  # containers count their processes each from 1
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
    return f"{within} {started}"


def _alive(held: dict[str, Any]) -> bool | None:
    """Whether the process of a lease of this machine lives; None where that cannot be told from here."""
    process, mine = str(held.get("process")), _process(os.getpid())
    if not mine or process.partition(" ")[0] != mine.partition(" ")[0]:
        return None
    return _process(int(held["pid"])) == process
