"""Where images come from: folders, .zip archives, CSV manifests and array files, as rows of (path, split, label).

Owns what a path in the Catalog means, how its bytes are reached, and what folder names say. Opens no image while it
lists (only the beginning of files whose names tell no format: they may be DICOM), follows no link out of the data,
unpacks nothing to disk. Knows nothing of pixels, patients or splits to make.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
import stat
import threading
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from pneumoscope import _files, _npy
from pneumoscope.errors import DataError, ImageError
from pneumoscope.specs import LABELS

SPLIT_NAMES: Final = {"train": "train", "training": "train", "test": "test", "testing": "test"} | {
    "val": "validation", "valid": "validation", "validation": "validation", "calibration": "calibration"
}  # fmt: skip
"""Folder name, in lower case -> split."""

KERAS_SUFFIXES: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
"""What ``keras.utils.image_dataset_from_directory`` lists."""

OTHER_SUFFIXES: Final = (".tif", ".tiff", ".webp", ".dcm", ".dicom")
"""Pictures that it does not list."""

KAGGLE_VAL_IMAGES: Final = 16
"""The Kaggle download's ``val`` folder holds 16 images: too few to steer training by, so they join train."""

MAX_ARRAY_BYTES: Final = 2 * 2**30
"""A larger array is refused before it is loaded."""

_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "'")
_NO_SUFFIX: Final = re.compile(r"[^.]+|[\d.]+")  # also numbers with points: DICOM files are often named for their UID
_ARRAY_ROW: Final = re.compile(r"(.+\.npz)#([a-z]+)/(\d+)", re.IGNORECASE | re.DOTALL)
_ARRAY_SPLITS: Final = {"train": "train", "validation": "val", "test": "test"}
_ESCAPED: Final = re.compile(r"\\udc([89a-f][0-9a-f])")
_EXPECTED: Final = "train/ and test/ that each hold NORMAL/ and PNEUMONIA/, or those two folders alone, were expected"
_WORTH_SAYING: Final = {
    "nested copy": "files of a nested copy of the data were left out",
    "images outside class folders": "images lie in no class folder and were left out",
    "linked folders": "folders are links and were not entered",
    "unreadable folders": "folders could not be read",
    "repeated entries": "entries of the archive repeat a name and were left out",
}

_Tree = tuple[tuple[str, ...], bool]  # the folders before a data set's own, and whether split folders follow


@dataclass(frozen=True, slots=True)
class Row:
    """An image before it is read: its path in the Catalog, its split and label, and what else is known of it."""

    path: str
    split: str
    label: int
    group: str = ""
    n_bytes: int = 0
    status: str = "ok"


@dataclass(frozen=True)
class Found:
    """What a data set lists: rows, counts of what is no part of it, and sentences worth saying."""

    root: Path
    rows: list[Row]
    ignored: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class File:
    """A file as a folder or an archive lists it: its name there, its path in the Catalog, and why not to open it."""

    name: str
    path: str
    n_bytes: int
    status: str = "ok"
    is_dicom: bool = False  # known only of a name without a suffix

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that it lies in, from the top."""
        return tuple(self.name.split("/")[:-1])


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where the files of a folder stand: their data set, split and label, and how deep the class folder lies."""

    tree: _Tree
    split: str
    label: int
    depth: int


def find(data: Path | str, *, classes: Mapping[str, str], reader: Reader) -> Found:
    """List the images of a data set.

    Parameters
    ----------
    data : Path or str
        A folder, a .zip, a CSV manifest or an .npz.
    classes : mapping of str to str
        Names beside ``NORMAL`` and ``PNEUMONIA``, in any case -> one of these two.
    reader : Reader
        Keeps the archive open.

    Raises
    ------
    DataError
        Where there is nothing at `data`, or it is no data set, or not a sound one.
    """
    known = _known_classes(classes)
    try:
        given = Path(data).expanduser()
        # a linked manifest names paths beside the link, so only folders are resolved
        place = given.resolve() if given.is_dir() else given.parent.resolve() / given.name
        if place.is_dir():
            return _place(*walk(place), place=place, root=place, known=known)
        if not place.is_file():
            raise DataError(f"There is no file or folder {str(data)!r}; check the path.")
    except (OSError, RuntimeError) as error:
        raise DataError(f"{str(data)!r} cannot be reached ({error}); check the path and its permissions.") from error
    suffix = place.suffix.lower()
    if suffix == ".zip":
        return _place(*members(place, reader), place=place, root=place.parent, known=known)
    if suffix == ".csv":
        return _read_manifest(place, known)
    if suffix == ".npz":
        return _array_rows(place, reader)
    raise DataError(f"{place} is neither a folder nor a .zip, .csv or .npz file; {_EXPECTED}.")


def csv_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Return (line number, cells) of every row that is not blank; line ends inside a cell stay as they are.

    Raises
    ------
    DataError
        Where the file is missing or is not a UTF-8 CSV file.
    """
    try:
        reader = csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
        return [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a UTF-8 CSV file ({error}); save it as CSV UTF-8.") from error


def plain_cell(text: str) -> str:
    """Undo `_files.csv_cell`: take away the apostrophe before what a spreadsheet would run."""
    return text[1:] if text[:1] == "'" and _files.csv_cell(text[1:]) == text else text


class Reader:
    """Bytes of rows, for several threads at once: an archive stays open in each, arrays are loaded once.

    A pickled one arrives fresh, because open files do not travel.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._lock = threading.Lock()
        self._arrays: dict[tuple[Path, str], npt.NDArray[Any]] = {}

    def __reduce__(self) -> tuple[type[Reader], tuple[()]]:
        return Reader, ()

    def read(self, root: Path, path: str) -> bytes:
        """Return one row's bytes.

        Parameters
        ----------
        root : Path
            Folder that `path` is relative to.
        path : str
            As in the Catalog.

        Raises
        ------
        ImageError
            Where it is missing, unreadable, too large or no regular file.
        """
        try:
            if row := _ARRAY_ROW.fullmatch(path):
                pixels = self.array(_on_disk(root, row[1]), f"{_ARRAY_SPLITS[row[2]]}_images")[int(row[3])]
                np.save(buffer := io.BytesIO(), pixels)
                return buffer.getvalue()
            container, inside, member = path.partition(".zip!/")
            if inside and (archive := _on_disk(root, f"{container}.zip")).is_file():
                return _files.read_member(self.archive(archive), member)
            return read_regular(_on_disk(root, path))
        except (FileNotFoundError, KeyError, IndexError) as error:
            raise ImageError("missing", f"There is no {path!r} in {root}.") from error
        except (RuntimeError, NotImplementedError) as error:  # what zipfile raises for encryption and rare methods
            raise ImageError("unsupported archive", f"{path!r} cannot be unpacked ({error}).") from error
        except (OSError, ValueError, *_files.BROKEN_ARCHIVE, DataError) as error:
            raise ImageError("unreadable", f"{path!r} cannot be read ({error}).") from error

    def archive(self, path: Path) -> zipfile.ZipFile:
        """Return this thread's own handle of a .zip; a forked process or a replaced file gets a new one."""
        state = path.stat()
        key = (path, os.getpid(), state.st_mtime_ns, state.st_size)
        if getattr(self._own, "key", None) != key:
            self._own.archive, self._own.key = zipfile.ZipFile(path), key
        handle: zipfile.ZipFile = self._own.archive
        return handle

    def array(self, path: Path, name: str) -> npt.NDArray[Any]:
        """Return one array of an .npz, or raise DataError."""
        with self._lock:
            if (path, name) not in self._arrays:
                self._arrays[path, name] = _load_array(path, name)
            return self._arrays[path, name]


# --- files and arrays ------------------------------------------------------------------------------------------------


def _path_of(name: str) -> str:
    """Return the Catalog's path for a name: valid UTF-8, and never the beginning of a spreadsheet formula."""
    text = name if name.isascii() else name.encode("utf-8", "backslashreplace").decode("utf-8")
    return f"./{text}" if text.startswith(_FORMULA) else text


def _on_disk(root: Path, path: str) -> Path:
    """Return where a Catalog's path lies; bytes that are not UTF-8 stand escaped in it."""
    if os.path.lexists(root / path):
        return root / path
    return root / _ESCAPED.sub(lambda match: chr(0xDC00 + int(match[1], 16)), path)


def read_regular(path: Path) -> bytes:
    """Read a file after its kind and size were looked at: to open a FIFO would wait for ever.

    Raises
    ------
    ImageError
        Where it is no regular file or too large; the system's own errors pass through.
    """
    if status := _refusal(path.stat()):
        raise ImageError(status, f"{str(path)!r} is {status}.")
    return path.read_bytes()


def _refusal(state: os.stat_result) -> str:
    if not stat.S_ISREG(state.st_mode):
        return "not a regular file"
    return "too large" if state.st_size > _files.MAX_MEMBER_BYTES else ""


def walk(root: Path) -> tuple[list[File], Counter[str]]:
    """List the files under a folder without opening any; linked folders are counted, not entered."""
    files: list[File] = []
    ignored: Counter[str] = Counter()
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            listing = os.scandir(root / folder)
        except OSError:
            if not folder:
                raise
            ignored["unreadable folders"] += 1
            continue
        with listing as entries:  # one at a time: an entry costs far more memory than what is kept of it
            for entry in entries:
                name = folder + entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{name}/")
                elif entry.is_symlink() and Path(entry.path).is_dir():
                    ignored["linked folders"] += 1
                else:
                    files.append(_listed(entry, name, root))
    return sorted(files, key=lambda file: file.path), ignored


def _listed(entry: os.DirEntry[str], name: str, root: Path) -> File:
    path = _path_of(name)
    try:
        state = entry.stat()
    except OSError:
        return File(name, path, 0, "broken link" if entry.is_symlink() else "unreadable")
    if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
        return File(name, path, 0, "link out of the folder")
    if status := _refusal(state):
        return File(name, path, state.st_size, status)
    return File(name, path, state.st_size, is_dicom=_is_unnamed_dicom(name, lambda: Path(entry.path).open("rb")))


def members(archive: Path, reader: Reader) -> tuple[list[File], Counter[str]]:
    """List the files of a .zip as `walk` lists those of a folder.

    Raises
    ------
    DataError
        Where it is no sound archive.
    """
    try:
        entries = _files.archive_members(reader.archive(archive), name=str(archive))
    except (OSError, ValueError, RuntimeError, *_files.BROKEN_ARCHIVE) as error:
        raise DataError(f"{archive} cannot be read as a .zip ({error}); get it again.") from error
    files: dict[str, File] = {}
    for entry in entries:
        name, path = entry.filename, _path_of(f"{archive.name}!/{entry.filename}")
        status = "too large" if entry.file_size > _files.MAX_MEMBER_BYTES else "ok"
        is_dicom = _is_unnamed_dicom(name, partial(reader.archive(archive).open, entry))
        files.setdefault(name, File(name, path, entry.file_size, status, is_dicom))
    repeated = Counter({"repeated entries": len(entries) - len(files)})
    return sorted(files.values(), key=lambda file: file.path), repeated


def _is_unnamed_dicom(name: str, opened: Callable[[], IO[bytes]]) -> bool:
    """Say whether a file without a suffix begins like DICOM; a DICOMDIR lists others and is no picture itself."""
    last = name.rpartition("/")[2]
    if last == "DICOMDIR" or not _NO_SUFFIX.fullmatch(last):
        return False
    try:
        with opened() as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ValueError, RuntimeError, NotImplementedError, *_files.BROKEN_ARCHIVE):
        return False  # what it is will be asked again when it is read


def _array_rows(path: Path, reader: Reader) -> Found:
    """List the images of a MedMNIST file; its splits and labels are its own."""
    rows: list[Row] = []
    for split, short in _ARRAY_SPLITS.items():
        pixels, labels = (reader.array(path, f"{short}_{kind}") for kind in ("images", "labels"))
        labels = labels.reshape(-1)
        matching = pixels.ndim in (3, 4) and pixels.dtype == np.uint8 and len(labels) == len(pixels)
        if not matching or not np.isin(labels, (0, 1)).all():
            raise DataError(
                f"{path} holds {short}_images {pixels.dtype} {pixels.shape} with {len(labels)} labels of the values "
                f"{np.unique(labels)[:5].tolist()}; uint8 (n, height, width) with n labels 0 or 1 were expected, "
                "as in pneumoniamnist.npz."
            )
        rows += [Row(f"{_path_of(path.name)}#{split}/{at}", split, int(label)) for at, label in enumerate(labels)]
    return Found(path.parent, rows)


def _load_array(path: Path, name: str) -> npt.NDArray[Any]:
    """Load one array of an .npz after what its header claims was held against what the file holds."""
    member = f"{name}.npy"
    try:
        with zipfile.ZipFile(path) as archive:
            if member not in archive.namelist():
                raise DataError(f"{path} has no array {name}; train, val and test images and labels were expected.")
            held = archive.getinfo(member).file_size
            with archive.open(member) as file:
                shape, _, dtype = _npy.read_array_header(file)
        claimed = dtype.itemsize * prod(shape)
        if dtype.kind not in "iu" or not 0 <= claimed <= min(held, MAX_ARRAY_BYTES):
            raise DataError(
                f"{path}: the array {name} claims {dtype} {shape}; integers that the file really holds, "
                f"{_files.size_text(MAX_ARRAY_BYTES)} at most, were expected, so do not use this file."
            )
        with np.load(path, allow_pickle=False) as arrays:
            loaded: npt.NDArray[Any] = arrays[member]  # by its whole name: there may be another without the suffix
            return loaded
    except (OSError, ValueError, RuntimeError, OverflowError, *_files.BROKEN_ARCHIVE) as error:
        raise DataError(f"{path} cannot be read as an array file ({error}); get it again.") from error


# --- what folder names say -------------------------------------------------------------------------------------------


def _known_classes(classes: Mapping[str, str]) -> dict[str, int]:
    for name, label in classes.items():
        if label not in LABELS:
            raise DataError(f"data.classes.{name} is {label!r}; NORMAL or PNEUMONIA was expected.")
    both = {label: label for label in LABELS} | dict(classes)
    return {name.casefold(): LABELS.index(label) for name, label in both.items()}


def _place(files: Sequence[File], ignored: Counter[str], *, place: Path, root: Path, known: Mapping[str, int]) -> Found:
    """Give each picture of a folder or an archive its split and label."""
    pictures: list[File] = []
    for file in files:
        if kind := ignored_kind(file):
            ignored[kind] += 1
        else:
            pictures.append(file)
    folders = {file.name.rpartition("/")[0]: file.folders for file in pictures}
    of_folder = {name: spot for name, parts in folders.items() if (spot := _locate(parts, known))}
    spots = {file.name: spot for file in pictures if (spot := of_folder.get(file.name.rpartition("/")[0]))}
    if not pictures:
        raise DataError(_nothing_here(files, ignored, place))
    tree = _only_tree([(file, spots[file.name]) for file in pictures if file.name in spots], place) if spots else None
    strays = [file for file in pictures if file.name not in spots]
    _refuse_unknown(strays, tree, place)
    if tree is None:
        inside = f"is the class folder {place.name} alone" if place.name.casefold() in known else "has no class folder"
        raise DataError(f"{place} {inside} for its {len(pictures):,} images; {_EXPECTED}.")
    own_split, notes = _split_of(place, tree)
    kept = [(file, spot) for file in pictures if (spot := spots.get(file.name)) and spot.tree == tree]
    ignored.update({"nested copy": len(spots) - len(kept), "images outside class folders": len(strays)})
    n_val = sum(spot.split == "validation" for _, spot in kept)
    folded = {"": own_split}
    if 0 < n_val <= KAGGLE_VAL_IMAGES:
        folded["validation"] = "train"
        notes.append(f"The validation folder's {n_val} images are too few to steer training; they were added to train.")
    rows = [
        Row(file.path, folded.get(spot.split, spot.split), spot.label, n_bytes=file.n_bytes, status=file.status)
        for file, spot in kept
    ]
    counted = {kind: n for kind, n in ignored.items() if n}
    notes += [f"{n:,} {_WORTH_SAYING[kind]}." for kind, n in counted.items() if kind in _WORTH_SAYING]
    return Found(root, rows, counted, tuple(notes))


def ignored_kind(file: File) -> str:
    """Return the name under which a file is counted that is no image of the data set; empty for an image."""
    name = file.name.rpartition("/")[2]
    if "__MACOSX" in file.folders:
        return "__MACOSX"
    if name in (".DS_Store", "Thumbs.db"):
        return name
    if name.startswith("._"):
        return "._*"
    if any(part.startswith(".") for part in (*file.folders, name)):
        return "hidden files"
    return "" if file.is_dicom or name.lower().endswith(KERAS_SUFFIXES + OTHER_SUFFIXES) else "other files"


def _locate(folders: tuple[str, ...], known: Mapping[str, int]) -> _Spot | None:
    """Find the class folder (the one after a split folder, else the deepest) and the split beside it."""
    names = [folder.casefold() for folder in folders]
    places = [at for at, name in enumerate(names) if name in known]
    if not places:
        return None
    at = next((at for at in places if at and names[at - 1] in SPLIT_NAMES), places[-1])
    before = SPLIT_NAMES.get(names[at - 1], "") if at else ""
    split = before or SPLIT_NAMES.get("".join(names[at + 1 : at + 2]), "")
    return _Spot((folders[: at - bool(before)], bool(split)), split, known[names[at]], at)


def _signature(file: File, spot: _Spot) -> tuple[str | int, ...]:
    """Return what a file shares with a copy of it in another tree."""
    names = [folder.casefold() for folder in file.folders[spot.depth :]]
    return (spot.split, *names, file.name.rpartition("/")[2], file.n_bytes)


def _only_tree(placed: Sequence[tuple[File, _Spot]], place: Path) -> _Tree:
    """Return the one data set among the files; others are bearable only where they repeat a part of it."""
    trees: dict[_Tree, list[tuple[File, _Spot]]] = defaultdict(list)
    for file, spot in placed:
        trees[spot.tree].append((file, spot))
    main, *rest = sorted(trees, key=lambda tree: (-len(trees[tree]), tree))
    if not rest:
        return main
    held = {_signature(*one) for one in trees[main]}
    others = [tree for tree in rest if not held.issuperset(_signature(*one) for one in trees[tree])]
    if others:
        names = ", ".join(repr("/".join(tree[0]) or ".") for tree in sorted([main, *others])[:5])
        raise DataError(f"{place} holds {1 + len(others)} data sets, in {names}; give the folder of one of them.")
    return main


def _refuse_unknown(strays: Sequence[File], tree: _Tree | None, place: Path) -> None:
    """Raise where images lie in a folder that stands where a class folder should: it is named, not guessed."""
    unknown = Counter(name for file in strays if (name := _unknown_folder(file, tree)))
    if unknown:
        names = ", ".join(f"{name!r} ({n:,} images)" for name, n in sorted(unknown.items())[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        example = next((name for name in sorted(unknown) if name.isprintable()), "NAME")
        raise DataError(
            f"{place} holds images in folders of unknown class: {names}{more}; NORMAL and PNEUMONIA are known, so "
            f"say what the others mean with --set {shlex.quote(f'data.classes.{example}=NORMAL')} (or =PNEUMONIA)."
        )


def _unknown_folder(file: File, tree: _Tree | None) -> str:
    """Return the folder that would be the class of an image in no known one; empty where no folder would."""
    folders = file.folders
    after_split = [name for at, name in enumerate(folders) if at and folders[at - 1].casefold() in SPLIT_NAMES]
    if after_split:
        return after_split[0]
    if tree is None:
        candidates = folders[-1:]
    elif tree[1] or folders[: len(tree[0])] != tree[0]:
        return ""  # a picture beside train/ and test/, or outside the data set
    else:
        candidates = folders[len(tree[0]) :][:1]
    return next((name for name in candidates if name.casefold() not in SPLIT_NAMES), "")


def _nothing_here(files: Sequence[File], ignored: Counter[str], place: Path) -> str:
    instead = [file.name for file in files if file.name.lower().endswith((".zip", ".npz", ".csv"))]
    if instead:
        return f"{place} holds no images but {instead[0]!r}; give that file."
    seen = ", ".join(f"{n:,} {kind}" for kind, n in sorted(ignored.items()) if n) or "nothing"
    return f"{place} holds no images (found {seen}; linked folders are not entered); {_EXPECTED}."


def _split_of(place: Path, tree: _Tree) -> tuple[str, list[str]]:
    """Return the split of images that lie in no split folder: the data given may itself be one split of more."""
    own = SPLIT_NAMES.get(place.name.casefold()) if tree == ((), False) else None
    if own == "test":
        return "test", [f"{place.name} is a test folder: its images are the test split."]
    beside = [path.name for path in place.parent.iterdir() if path.is_dir()] if own == "train" else []
    others = sorted(name for name in beside if SPLIT_NAMES.get(name.casefold(), "train") != "train")
    if others:
        raise DataError(
            f"{place} is only the train part of a data set that has {', '.join(map(repr, others))} too; "
            f"give the folder above it, {place.parent}."
        )
    return "train", []


# --- manifests -------------------------------------------------------------------------------------------------------


def _read_manifest(path: Path, known: Mapping[str, int]) -> Found:
    lines = csv_lines(path)
    header = [name.strip().casefold() for name in lines[0][1]] if lines else []
    if not {"path", "label"} <= set(header):
        raise DataError(f"{path} begins with {','.join(header)!r}; the columns path,label[,split,group] were expected.")
    rows: dict[str, tuple[int, Row]] = {}
    bad: list[str] = []
    for line, cells in lines[1:]:
        try:
            row = _manifest_row(dict(zip(header, cells, strict=False)), path.parent, {"0": 0, "1": 1, **known})
        except ValueError as error:
            bad.append(f"line {line} {error}")
            continue
        first, _ = rows.setdefault(row.path, (line, row))
        if first != line:
            bad.append(f"line {line} repeats the path of line {first}")
    if bad:
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"{path} has bad rows: {'; '.join(bad[:5])}{more}; each needs a path of its own, the label NORMAL, "
            "PNEUMONIA, 0, 1 or a name in data.classes, and the split train, validation, calibration, test or none."
        )
    if not rows:
        raise DataError(f"{path} lists no images; add rows with the columns path,label[,split,group].")
    return Found(path.parent, [row for _, row in rows.values()])


def _manifest_row(cells: Mapping[str, str], root: Path, meanings: Mapping[str, int]) -> Row:
    """Return one line of a manifest, or raise ValueError with what is wrong in it."""
    label, split, group = (cells.get(column, "").strip() for column in ("label", "split", "group"))
    written = Path(cells["path"])
    if not cells["path"].strip():
        raise ValueError("has no path")
    if label.casefold() not in meanings:
        raise ValueError(f"has the label {label!r}")
    if split and split.casefold() not in SPLIT_NAMES:
        raise ValueError(f"has the split {split!r}")
    inside = written.relative_to(root) if written.is_relative_to(root) else written
    path = _path_of(inside.as_posix())
    return Row(path, SPLIT_NAMES.get(split.casefold(), "train"), meanings[label.casefold()], plain_cell(group))
