"""Files that are whole or absent: atomic writes, hashes, versioned JSON, safe archives, the cache folder.

Owns how bytes reach and leave the disk. Knows nothing of images, models or runs.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import lzma
import math
import os
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import IO, Any

from pneumoscope.errors import DataError, PneumoscopeError, StoreError

SCHEMA_VERSION = 1
MAX_ARCHIVE_ENTRIES = 200_000
MAX_MEMBER_BYTES = 256 * 2**20
"""An image larger than this inside an archive is refused before it is unpacked."""

BROKEN_ARCHIVE = (EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""What a damaged archive raises where a member is read, beside what `read_member` does."""


def cache_dir() -> Path:
    """Return the folder for packed images, features and weights (not created here).

    Returns
    -------
    Path
        ``$PNEUMOSCOPE_CACHE`` where set, else ``pneumoscope`` in the platform's user cache folder.
    """
    chosen = os.environ.get("PNEUMOSCOPE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "pneumoscope"


@contextmanager
def replacing(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file beside `path` for writing and move it onto `path` only when the block ends well.

    Parameters
    ----------
    path : Path
        Where the file shall stand; its folder is created.
    mode : str
        ``"wb"`` or ``"w"`` (UTF-8, newlines kept as written).

    Raises
    ------
    PneumoscopeError
        Where the folder or the file cannot be written; what stood at `path` is left whole.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        # file names may hold bytes that are not UTF-8; they are written as \udcXX, which JSON reads back
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        with os.fdopen(handle, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise PneumoscopeError(
            f"Cannot write {path}: {error.strerror or error}; "
            "free space or choose a folder you may write to, then run the same command again."
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that `path` holds either the old or the new whole."""
    with replacing(path, "w") as file:
        file.write(text)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes so that `path` holds either the old or the new whole."""
    with replacing(path) as file:
        file.write(data)


def jsonable(value: Any) -> Any:
    """Turn numpy numbers, paths and tuples into plain JSON values; NaN and infinity become ``None``.

    Undefined figures are ``null`` in every file the project writes: JSON has no NaN.
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays, without importing numpy on this floor
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON with ``schema_version`` first."""
    body = {"schema_version": SCHEMA_VERSION, **jsonable(content)}
    write_text(path, json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that `write_json` wrote.

    Raises
    ------
    StoreError
        Where the file is missing, is not JSON, or was written by a newer schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist; run the step that writes it first.") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as JSON ({error}); delete it and make it anew.") from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema_version {found!r}, this version reads {SCHEMA_VERSION}; "
            "install the version of pneumoscope that wrote it, or make the file anew."
        )
    return dict(content)


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 of `data`, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read in pieces, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a mapping of plain values, independent of the order of its keys."""
    return sha256_of(json.dumps(jsonable(content), sort_keys=True, allow_nan=False).encode())


def require_space(folder: Path, needed_bytes: int, *, what: str) -> None:
    """Refuse to start writing what will not fit.

    Parameters
    ----------
    folder : Path
        Where it shall be written; it need not exist yet.
    needed_bytes : int
        How much it will take.
    what : str
        Names the thing in the message.

    Raises
    ------
    StoreError
        Where less than `needed_bytes` plus 5 % is free.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes * 1.05:
        raise StoreError(
            f"{what} needs {size_text(needed_bytes)} in {folder}, but only {size_text(free)} is free; "
            "free some space, or set PNEUMOSCOPE_CACHE to a larger disk."
        )


def free_memory() -> int:
    """Return how much memory processes can still take without swapping, bytes; 8 GiB where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 * 2**30


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; what vanishes meanwhile counts for nothing."""
    total = 0
    for entry in path.rglob("*") if path.is_dir() else (path,):
        with contextlib.suppress(FileNotFoundError):
            total += 0 if entry.is_dir() else entry.lstat().st_size
    return total


def size_text(n_bytes: float) -> str:
    """Return a size for people, for example ``"12.3 MB"`` (powers of 1000)."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def archive_members(archive: zipfile.ZipFile, *, name: str) -> list[zipfile.ZipInfo]:
    """Return the regular files of an archive whose names stay inside it.

    Members are only ever read, never unpacked to a path taken from the archive; names that climb out
    (``../``, absolute, drive letters) and symbolic links are refused all the same, because such an archive
    was not made by accident.

    Raises
    ------
    DataError
        For a hostile name, a symbolic link, or more than `MAX_ARCHIVE_ENTRIES` entries.
    """
    entries = archive.infolist()
    if len(entries) > MAX_ARCHIVE_ENTRIES:
        raise DataError(
            f"{name} lists {len(entries):,} entries, at most {MAX_ARCHIVE_ENTRIES:,} are read; "
            "unpack it yourself and give the folder."
        )
    members = []
    for entry in entries:
        if entry.is_dir():
            continue
        path = entry.filename
        if path.startswith("/") or "\\" in path or ".." in path.split("/") or path[1:2] == ":":
            raise DataError(f"{name} holds the entry {path!r}, which points outside it; do not use this archive.")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise DataError(f"{name} holds the symbolic link {path!r}; unpack it yourself and give the folder.")
        members.append(entry)
    return members


def read_member(archive: zipfile.ZipFile, entry: str) -> bytes:
    """Return one member's bytes, reading at most `MAX_MEMBER_BYTES` whatever the archive claims.

    Raises
    ------
    ValueError
        Where the member is larger; the archive's own errors (bad checksum, encryption) pass through.
    """
    with archive.open(entry) as file:
        data = file.read(MAX_MEMBER_BYTES + 1)
    if len(data) > MAX_MEMBER_BYTES:
        raise ValueError(f"larger than {size_text(MAX_MEMBER_BYTES)}")
    return data


def csv_cell(value: object) -> str:
    """Return the text of a CSV cell that no spreadsheet runs as a formula.

    Text that begins with ``= + - @``, a tab or a carriage return gets an apostrophe in front, as OWASP advises for
    CSV injection; numbers stay as they are, floats in their shortest exact form, NaN and ``None`` empty.
    """
    if value is None:
        return ""
    if isinstance(value, Real):  # numpy's numbers are registered as such
        return "" if math.isnan(value) else str(value)
    text = str(value)
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file atomically, every cell through `csv_cell`."""
    with replacing(path, "w") as file:
        plain, quoted = (
            csv.writer(file, lineterminator="\n", quoting=quoting) for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
        )
        plain.writerow(list(header))
        for row in rows:
            cells = [csv_cell(cell) for cell in row]
            returns = any("\r" in cell for cell in cells)  # a line's end to spreadsheets, and not to csv's writer
            (quoted if returns else plain).writerow(cells)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with a header into one dictionary per row (UTF-8, byte order mark allowed).

    Raises
    ------
    DataError
        Where the file is missing, is not UTF-8 text, or has a row with more cells than the header.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a UTF-8 CSV file ({error}); save it as CSV UTF-8.") from error
    for number, row in enumerate(rows, start=1):
        if None in row:  # where DictReader puts the cells that no column is named for
            raise DataError(
                f"{path}: row {number} has more cells than the header; mend it, or quote cells with commas."
            )
    return rows


def build_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Create the folder `target` whole or not at all.

    Parameters
    ----------
    target : Path
        The folder that shall appear.
    fill : callable
        Called with a temporary folder beside `target`; when it returns, that folder is renamed to `target`.
        Where another process was quicker, its folder stays and ours is dropped.

    Raises
    ------
    StoreError
        Where the place cannot be written or is full.
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        fill(temporary)
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner only, a cache may be shared
        try:
            os.replace(temporary, target)
        except OSError:
            if not target.exists():
                raise
    except OSError as error:
        raise StoreError(
            f"Cannot write {target}: {error.strerror or error}; "
            "free space, or set PNEUMOSCOPE_CACHE to a folder you may write to."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
