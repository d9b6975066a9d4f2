"""Images without labels, as a command line names them: files, folders, patterns and .zip archives, one `Input` each.

Owns which files an argument stands for, what they are called in the answers, and how their bytes are reached. Opens no
image while it lists (only the beginning of files whose names tell no format), follows no link out of a folder, unpacks
nothing to disk, and fetches no address. Knows nothing of pixels, models or labels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pneumoscope import _files, _sources
from pneumoscope.errors import DataError, ImageError

EVIDENCE_SUFFIX: Final = ".evidence.png"
"""End of the names of evidence maps that we draw: left out of folders, because they are pictures of pictures."""

_MAGIC: Final = ("*", "?", "[")
_ZIP: Final = b"PK\x03\x04"
_FAULTS: Final = {
    "broken link": "It is a broken link.",
    "link out of the folder": "It is a link that leads out of the folder.",
    "not a regular file": "It is not a regular file but a pipe, a socket or a device.",
    "too large": f"It is larger than {_files.size_text(_files.MAX_MEMBER_BYTES)}.",
    "unreadable": "It cannot be read.",
}
_COUNTED: Final = {  # plural nouns for what `_sources.walk` counts
    "linked folders": "linked folders (not entered)",
    "unreadable folders": "folders that cannot be read",
    "repeated entries": "repeated entries of an archive",
    "._*": "hidden files",
    ".DS_Store": "hidden files",
    "Thumbs.db": "hidden files",
    "__MACOSX": "hidden files",
}


@dataclass(frozen=True, slots=True)
class Input:
    """One file to answer about.

    Attributes
    ----------
    name : str
        The argument, joined with the path inside it; may hold any character, also bytes that are not UTF-8.
    place : Path
        The file, or the archive that holds it.
    member : str
        Its name in the archive; empty for a file.
    fault : str
        Why there is nothing to read, as a sentence; empty where there is.
    """

    name: str
    place: Path
    member: str = ""
    fault: str = ""

    def read(self, reader: _sources.Reader | None = None) -> bytes:
        """Return the whole file.

        Parameters
        ----------
        reader : Reader, optional
            Keeps the archive open for the next; safe for several threads.

        Returns
        -------
        bytes

        Raises
        ------
        ImageError
            Where it cannot be read, is too large or no regular file; the message does not repeat the name.
        """
        if self.fault:
            raise ImageError("unreadable", self.fault)
        try:
            if self.member:
                return _files.read_member((reader or _sources.Reader()).archive(self.place), self.member)
            return _sources.read_regular(self.place)
        except ImageError as error:
            raise ImageError(error.reason, _FAULTS.get(error.reason, str(error))) from error
        except OSError as error:
            raise ImageError("unreadable", f"The file cannot be read ({error.strerror or 'damaged'}).") from error
        except ValueError as error:  # of `read_member`, whatever size the archive claimed
            raise ImageError("too large", _FAULTS["too large"]) from error
        except (RuntimeError, NotImplementedError) as error:  # what zipfile raises for encryption and rare methods
            raise ImageError("unsupported archive", "It is encrypted or packed in a way that is not read.") from error
        except (LookupError, *_files.BROKEN_ARCHIVE) as error:
            raise ImageError("unreadable", "The archive is damaged at this file.") from error


@dataclass(frozen=True)
class Found:
    """What a command line stands for.

    Attributes
    ----------
    inputs : tuple of Input
        In the order of the arguments; within a folder or an archive by name.
    notes : tuple of str
        Sentences on what was left out.
    """

    inputs: tuple[Input, ...]
    notes: tuple[str, ...] = ()


def find(arguments: Sequence[str], *, reader: _sources.Reader | None = None) -> Found:
    """List the files that arguments stand for.

    A file that is named is always tried. In folders and archives, files count as images that end like one, or begin
    like DICOM where their name tells nothing; hidden files and archives inside are left out and counted.

    Parameters
    ----------
    arguments : sequence of str
        Files, folders (with all below them), .zip archives, and patterns such as ``scans/*.dcm`` or ``scans/**/*.png``
        that no shell has expanded.
    reader : Reader, optional
        Keeps archives open for reading.

    Returns
    -------
    Found
        An argument that stands for nothing has an Input with its fault, so that nobody misses it.

    Raises
    ------
    DataError
        Where no argument stands for a file that could be read.
    """
    kept, ignored, empty = reader or _sources.Reader(), Counter[str](), list[str]()
    inputs: list[Input] = []
    for argument in arguments:
        own = {one.name: one for name in _expanded(argument) for one in _inside(name, kept, ignored)}
        inputs += own.values()  # each once, where a pattern matches a folder and what is in it
        if not own:
            empty.append(argument)
    if not any(not one.fault for one in inputs):
        raise DataError(_nothing(inputs, empty, ignored))
    notes = [f"{name!r} holds no images." for name in empty]
    if left := _listing(ignored):
        notes.append(f"Left out: {left}.")
    return Found(tuple(inputs), tuple(notes))


def _expanded(argument: str) -> list[str]:
    """Return the names that a pattern matches, sorted; anything else alone, also a file whose name has a bracket."""
    if os.path.lexists(argument) or not any(sign in argument for sign in _MAGIC):
        return [argument]
    parts = argument.split("/")
    first = next(at for at, part in enumerate(parts) if any(sign in part for sign in _MAGIC))
    base, pattern = "/".join(parts[:first]), "/".join(part for part in parts[first:] if part)
    root = Path(f"{base}/") if first else Path()
    try:  # pathlib's "**" enters no linked folder, so no loop of links can hold it up
        found = sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))
    except (OSError, ValueError, NotImplementedError, RecursionError):
        found = []
    hidden = any(part.startswith(".") for part in parts[first:])
    shown = [name for name in found if hidden or name == "." or not _is_hidden(name)]
    return [name if not first else f"{base}/{name}" if name != "." else f"{base}/" for name in shown] or [argument]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _inside(name: str, reader: _sources.Reader, ignored: Counter[str]) -> Iterator[Input]:
    """Give the inputs that one existing or missing name stands for."""
    place = Path(name)
    try:
        if place.is_dir():
            root = place.resolve()
            files, counts = _sources.walk(root)
            ignored.update(counts)
            for file in _images(files, ignored):
                yield Input(os.path.join(name, file.name), root / file.name, "", _FAULTS.get(file.status, ""))  # noqa: PTH118
        elif _is_archive(place):
            members, counts = _sources.members(place, reader)
            ignored.update(counts)
            for file in _images(members, ignored):
                yield Input(f"{name}/{file.name}", place, file.name, _FAULTS.get(file.status, ""))
        else:
            yield Input(name, place)
    except FileNotFoundError:
        yield Input(name, place, "", f"There is no file or folder that {_kind_of(name)}.")
    except DataError as error:
        yield Input(name, place, "", str(error))
    except (OSError, ValueError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "its name cannot be used"
        yield Input(name, place, "", f"It cannot be reached ({why}).")


def _kind_of(name: str) -> str:
    if "://" in name:
        return "has this name; web addresses are never fetched, so save the file first"
    return "this pattern matches" if any(sign in name for sign in _MAGIC) else "has this name; check the path"


def _is_archive(place: Path) -> bool:
    """Say whether a file is a .zip, by its name or its beginning; its kind is looked at first, for a FIFO blocks."""
    if not place.is_file():
        place.stat()  # raises where it is missing; a FIFO is told of when it is read
        return False
    if place.suffix.lower() == ".zip":
        return True
    try:
        with place.open("rb") as file:
            return file.read(len(_ZIP)) == _ZIP
    except OSError:
        return False  # told of when it is read


def _images(files: Sequence[_sources.File], ignored: Counter[str]) -> Iterator[_sources.File]:
    """Give the images among the files of a folder or an archive and count the others."""
    for file in files:
        lower = file.name.lower()
        kind = _sources.ignored_kind(file)
        if not kind and lower.endswith(EVIDENCE_SUFFIX):
            kind = "evidence maps of an earlier prediction"
        elif kind == "other files" and lower.endswith(".zip"):
            kind = ".zip archives (give them by name)"
        if kind:
            ignored[kind] += 1
        else:
            yield file


def _listing(ignored: Counter[str]) -> str:
    counts = Counter[str]()
    for kind, n in ignored.items():
        counts[_COUNTED.get(kind, kind)] += n
    return ", ".join(f"{n:,} {kind}" for kind, n in sorted(counts.items()) if n)


def _nothing(inputs: Sequence[Input], empty: Sequence[str], ignored: Counter[str]) -> str:
    """Say in one sentence why nothing is there to be answered about."""
    expected = "give JPEG, PNG or DICOM files, folders or a .zip of them"
    if inputs:
        more = (
            f" ({len(inputs) + len(empty) - 1} more could not be used either)" if len(inputs) + len(empty) > 1 else ""
        )
        return f"{inputs[0].name!r} cannot be used: {inputs[0].fault.rstrip('.')}{more}; {expected}."
    if not empty:
        return f"No file was named; {expected}."
    found = f" (found {left})" if (left := _listing(ignored)) else ""
    return f"{', '.join(map(repr, empty[:3]))} holds no images{found}; {expected}."
