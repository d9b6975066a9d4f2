"""The Catalog: one row per image of a data set, the patient it belongs to, and the split it stands in.

Owns the table, the groups and how they are divided. Knows nothing of folders and archives (`_sources` finds the rows)
and decodes no pixel: an image that proves damaged later comes back through `Catalog.quarantine`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from pneumoscope import _files, _sources, images
from pneumoscope.errors import DataError, ImageError
from pneumoscope.specs import LABELS, SplitSpec

COLUMNS: Final = (
    "path", "image_id", "split", "label", "group", "subtype", "width_px", "height_px", "file_bytes", "status"
)  # fmt: skip
"""Columns of the table, in order; `Catalog` says what each holds."""

SPLITS: Final = ("train", "validation", "calibration", "test")
"""Names of the splits, in the order in which they are shown."""

Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""

_TELLING: Final = {"image_id": "content", "split": "split", "label": "label", "group": "group", "status": "status"}
_BLOCK: Final = 1024  # files that wait for a thread at one time: each costs far more memory than its row
_INTEGERS: Final = {"label": "int8", "width_px": "int64", "height_px": "int64", "file_bytes": "int64"}
_FORMAT_OF_SUFFIX: Final = {".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".dcm": "DICOM", ".dicom": "DICOM"}
_KAGGLE_PERSON: Final = re.compile(r"person(?P<number>\d+)_(?P<kind>bacteria|virus)_\d+(_\d+)*", re.I | re.A)
_KAGGLE_NORMAL: Final = re.compile(r"(NORMAL2-)?IM-(\d+)-\d+(-\d+)*", re.I | re.A)
_MENDELEY: Final = re.compile(r"(?P<kind>normal|bacteria|virus)-(?P<number>\d+)-\d+", re.I | re.A)


@dataclass(frozen=True, eq=False)
class Catalog:
    r"""A table of images with their labels, groups and splits.

    Attributes
    ----------
    root : Path
        Absolute folder that the paths in the table are relative to.
    table : DataFrame
        Exactly `COLUMNS`: ``path`` (posix, also ``archive.zip!/member`` and ``file.npz#train/17``; bytes that are not
        UTF-8 stand as ``\udcXX``), ``image_id`` (16 hexadecimal digits of the SHA-256 of the bytes, empty where the
        file was never read), ``split`` (one of `SPLITS`), ``label`` (int8; 0 NORMAL, 1 PNEUMONIA), ``group``,
        ``subtype`` (``bacteria``, ``virus`` or empty), ``width_px`` and ``height_px`` (0 where unknown),
        ``file_bytes``, ``status`` (``ok`` or why the image is quarantined).
    ignored : mapping of str to int
        Kind of file that is no part of the data -> how many.
    notes : tuple of str
        Sentences that a reader of the results should know.
    """

    root: Path
    table: pd.DataFrame
    ignored: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    _reader: _sources.Reader = field(default_factory=_sources.Reader, repr=False)

    @classmethod
    def scan(
        cls, data: Path | str, *, classes: Mapping[str, str] | None = None, progress: Progress | None = None
    ) -> Catalog:
        """List the images of a data set, hash them and read their headers; nothing is unpacked or written.

        Parameters
        ----------
        data : Path or str
            A folder (``train/NORMAL``, ``test/PNEUMONIA`` ... or class folders alone), the same inside a .zip, a CSV
            manifest with the columns ``path,label[,split,group]``, or a MedMNIST .npz.
        classes : mapping of str to str, optional
            Folder name (any case) or manifest label -> ``NORMAL`` or ``PNEUMONIA``, beside those two names.
        progress : callable, optional
            Called with (files done, files in all).

        Returns
        -------
        Catalog
            Without a test split where the data have none; `split` makes one.

        Raises
        ------
        DataError
            Where the data are missing, hold no images, no class folder, an unknown class folder or several data
            sets, or where the archive, the manifest or the array file is not sound.
        """
        reader = _sources.Reader()
        found = _sources.find(data, classes=classes or {}, reader=reader)
        table, notes = _examine(found.rows, found.root, reader, progress)
        return cls(found.root, table, found.ignored, (*found.notes, *notes), reader)

    @classmethod
    def read(cls, path: Path, *, root: Path) -> Catalog:
        """Read a table that `write` wrote; `ignored` and `notes` are not in it.

        Parameters
        ----------
        path : Path
            The CSV file.
        root : Path
            Folder that its paths are relative to.

        Returns
        -------
        Catalog

        Raises
        ------
        DataError
            Where the file is missing or is not a catalog.
        """
        lines = _sources.csv_lines(path)
        if not lines or tuple(lines[0][1]) != COLUMNS or any(len(cells) != len(COLUMNS) for _, cells in lines):
            raise DataError(
                f"{path} is not a catalog: the columns {','.join(COLUMNS)} were expected; scan the data anew."
            )
        table = {
            name: pd.Series([_sources.plain_cell(cells[at]) for _, cells in lines[1:]], dtype="str")
            for at, name in enumerate(COLUMNS)
        }
        try:
            return cls(root.absolute(), pd.DataFrame(table).astype(_INTEGERS))
        except (ValueError, OverflowError) as error:
            raise DataError(f"{path} is not a catalog ({error}); scan the data anew.") from error

    def write(self, path: Path) -> None:
        """Write the table as CSV, whole or not at all, with no cell that a spreadsheet would run.

        Raises
        ------
        PneumoscopeError
            Where the place cannot be written.
        """
        _files.write_csv(path, COLUMNS, self.table.itertuples(index=False, name=None))

    def read_bytes(self, path: str) -> bytes:
        """Return the bytes of one row's image; may be called from several threads.

        A row of an array file comes as the bytes of an .npy file, which `pneumoscope.images.decode` takes.

        Parameters
        ----------
        path : str
            As in the table.

        Raises
        ------
        ImageError
            Where the file cannot be read (any more), is too large, or is no regular file.
        """
        return self._reader.read(self.root, path)

    def split(self, spec: SplitSpec, *, seed: int) -> Catalog:
        """Divide the train rows; test rows stay, and validation rows that came with the data are kept.

        Parameters
        ----------
        spec : SplitSpec
            ``by="group"`` keeps each group whole and the shares of (label, subtype); ``by="image"`` takes the files
            that ``keras.utils.image_dataset_from_directory`` takes. A missing test split, folds and the calibration
            part are always made by group. Where the validation groups are too few to be divided there is no
            calibration part, and a note says so.
        seed : int
            0 or more; of everything but the test split, which has its own.

        Returns
        -------
        Catalog

        Raises
        ------
        DataError
            Where there are too few images or groups to hold any out.
        """
        table, notes = self.table.assign(split=self.table["split"]), list(self.notes)  # other columns stay shared
        if not (table["split"] == "test").any():
            held = _hold_out(table, fraction=spec.test, seed=[spec.test_seed, 1])
            _assign(table, held, "test")
            notes.append(f"The data have no test split; {len(held):,} images were held out for test, by group.")
        if spec.folds:
            table.loc[table["split"] != "test", "split"] = "train"  # every image is held out once
            _assign(table, _fold(table, spec.fold, folds=spec.folds, seed=[seed, 3]), "validation")
        elif own := int((table["split"] == "validation").sum()):
            notes.append(f"The data bring {own:,} validation images of their own; they were kept as they are.")
        elif spec.by == "image":
            order = _keras_order(table[table["split"] == "train"])
            _assign(table, order[keras_validation_mask(len(order), fraction=spec.validation, seed=seed)], "validation")
        else:
            _assign(table, _hold_out(table, fraction=spec.validation, seed=[seed, 2]), "validation")
        if spec.calibration:
            notes += _keep_calibration(table, fraction=spec.calibration, seed=[seed, 4])
        return replace(self, table=table, notes=tuple(notes))

    def quarantine(self, reasons: Mapping[str, str]) -> Catalog:
        """Return a Catalog in which images found to be bad are not usable any more.

        Parameters
        ----------
        reasons : mapping of str to str
            ``image_id`` -> a few words for ``status``.
        """
        rows = zip(self.table["image_id"], self.table["status"], strict=True)
        now = [(image_id and reasons.get(image_id)) or status for image_id, status in rows]  # empty: never read
        return replace(self, table=self.table.assign(status=pd.Series(now, index=self.table.index, dtype="str")))

    def rows(self, split: str | None = None, *, label: int | None = None) -> pd.DataFrame:
        """Return the usable rows, in the table's order, numbered anew from 0.

        Parameters
        ----------
        split : str, optional
            Only this one of `SPLITS`.
        label : {0, 1}, optional
            Only this label.

        Returns
        -------
        DataFrame
            With the columns `COLUMNS`.
        """
        keep = self.table["status"] == "ok"
        if split is not None:
            keep &= self.table["split"] == split
        if label is not None:
            keep &= self.table["label"] == label
        return self.table[keep].reset_index(drop=True)

    def counts(self) -> pd.DataFrame:
        """Return how many usable images there are.

        Returns
        -------
        DataFrame of int
            Index ``split`` (those present, in the order of `SPLITS`), columns ``NORMAL``, ``PNEUMONIA``, ``total``.
        """
        usable = self.rows()
        present = [split for split in SPLITS if (usable["split"] == split).any()]
        cells = {
            name: [int(((usable["split"] == split) & (usable["label"] == label)).sum()) for split in present]
            for label, name in enumerate(LABELS)
        }
        counts = pd.DataFrame(cells, index=pd.Index(present, name="split", dtype="str"), dtype="int64")
        return counts.assign(total=counts.sum(axis=1))

    def quarantined(self) -> pd.DataFrame:
        """Return the rows that are not usable, in the table's order, numbered anew from 0."""
        return self.table[self.table["status"] != "ok"].reset_index(drop=True)

    def require_usable(self) -> None:
        """Refuse a set without a usable image.

        Raises
        ------
        DataError
            Where there is none.
        """
        if self.rows().empty:
            reasons = self.table["status"].value_counts()
            why = ", ".join(f"{reason}: {n:,}" for reason, n in reasons.items()) or "the list is empty"
            raise DataError(f"No image in {self.root} can be used ({why}); JPEG, PNG and DICOM images are expected.")

    def require_learnable(self) -> None:
        """Refuse a set that no model can learn from.

        Raises
        ------
        DataError
            Where no image is usable, or train (or validation, once there is one) lacks a class.
        """
        self.require_usable()
        counts = self.counts()
        needed = ["train", "validation"] if (self.table["split"] == "validation").any() else ["train"]
        for split in needed:
            found = counts.to_dict("index").get(split, {})
            for name in LABELS:
                if not found.get(name):
                    raise DataError(
                        f"The {split} images of {self.root} hold no usable {name} image ({found.get('total', 0):,} "
                        "images in all), but a model learns from both classes; add images, or name their folder in "
                        "data.classes."
                    )

    @property
    def content_hash(self) -> str:
        """SHA-256 over path, image_id, split, label, group and status, whatever the order of rows; 64 digits."""
        rows = self.table[["path", *_TELLING]].itertuples(index=False, name=None)
        return _files.hash_of({"rows": sorted(map(list, rows))})

    def changes_from(self, earlier: Catalog) -> str:
        """Say what differs from an earlier Catalog of the same data, whatever the order of rows.

        Parameters
        ----------
        earlier : Catalog
            Scanned and split as this one was, or read back from where it was written.

        Returns
        -------
        str
            How many images were added, removed, or have another content, split, label, group or status, each with the
            first path: a part of a sentence, without a full stop. Empty where nothing differs.
        """
        now, before = (
            table.assign(path=table["path"].map(_written)).set_index("path") for table in (self.table, earlier.table)
        )
        common = now.index[now.index.isin(before.index)]
        changed = {
            "added": now.index[~now.index.isin(before.index)],
            "removed": before.index[~before.index.isin(now.index)],
        } | {
            f"with another {what}": common[now.loc[common, name].to_numpy() != before.loc[common, name].to_numpy()]
            for name, what in _TELLING.items()
        }
        return ", ".join(f"{len(paths):,} {what} ({paths[0]})" for what, paths in changed.items() if len(paths))


def keras_validation_mask(n: int, *, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Say which of `n` listed files Keras's ``image_dataset_from_directory`` takes for validation.

    Parameters
    ----------
    n : int
        Number of files, in Keras's order: class folders by name, then files by name.
    fraction : float
        Its ``validation_split``, between 0 and 1.
    seed : int
        Its ``seed``.

    Returns
    -------
    ndarray of bool, shape (n,)
        True for the files that end among the last ``int(fraction * n)`` of the shuffled list.
    """
    order = np.arange(n)
    np.random.RandomState(seed).shuffle(order)
    mask = np.zeros(n, dtype=np.bool_)
    mask[order[n - int(fraction * n) :]] = True
    return mask


# --- from files to rows ----------------------------------------------------------------------------------------------


def _written(path: str) -> str:
    """Return a path as a table on the disk has it: bytes that are not UTF-8 spelled out."""
    return path.encode(errors="backslashreplace").decode()


def _examine(
    rows: Sequence[_sources.Row], root: Path, reader: _sources.Reader, progress: Progress | None
) -> tuple[pd.DataFrame, list[str]]:
    """Hash every file, read its header and find its group; on all cores, because most of it waits for the disk."""
    cells = {name: np.empty(len(rows), dtype=_INTEGERS.get(name, "object")) for name in COLUMNS}
    misnamed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            for at, record in enumerate(pool.map(lambda row: _record(row, root, reader), block), start):
                for name in COLUMNS:
                    cells[name][at] = record[name]
                misnamed += record["misnamed"]
                if progress is not None:
                    progress(at + 1, len(rows))
    table = pd.DataFrame({name: pd.Series(cells.pop(name), dtype=_INTEGERS.get(name, "str")) for name in COLUMNS})
    notes = []
    if unknown := sum(group == f"file/{path}" for group, path in zip(table["group"], table["path"], strict=True)):
        notes.append(f"{unknown:,} of {len(rows):,} names tell no patient; each of these images is its own group.")
    if misnamed:
        notes.append(f"{misnamed:,} files hold another format than their name says; they were read by their content.")
    if joined := _join_groups(table):
        notes.append(f"{joined:,} groups share identical images with another group and were joined to it.")
    return table, notes


def _record(row: _sources.Row, root: Path, reader: _sources.Reader) -> dict[str, Any]:
    """Return one image's cells; a file that is no image has the reason as its status."""
    group, subtype = _group_of(row.path)
    record = {"path": row.path, "image_id": "", "split": row.split, "label": row.label, "width_px": 0, "height_px": 0}
    record |= {"group": row.group or group or f"file/{row.path}", "subtype": subtype if row.label else ""}
    record |= {"file_bytes": row.n_bytes, "status": row.status, "misnamed": False}
    if row.status != "ok":
        return record
    try:
        data = reader.read(root, row.path)
        record |= {"image_id": _files.sha256_of(data)[:16], "file_bytes": len(data)}
        header = images.read_header(data)
    except ImageError as error:
        return record | {"status": error.reason}
    named = _FORMAT_OF_SUFFIX.get(Path(row.path).suffix.lower(), header.format)
    return record | {
        "width_px": header.width_px, "height_px": header.height_px, "misnamed": named != header.format
    }  # fmt: skip


def _group_of(path: str) -> tuple[str, str]:
    """Return (group, subtype) as far as the file's name tells them, else empty."""
    stem = path.rpartition("/")[2].rpartition(".")[0]
    if match := _KAGGLE_NORMAL.fullmatch(stem):
        return f"{(match[1] or '').upper()}IM/{match[2].lstrip('0') or 0}", ""
    if match := _KAGGLE_PERSON.fullmatch(stem) or _MENDELEY.fullmatch(stem):
        kind, number = sys.intern(match["kind"].lower()), match["number"].lstrip("0") or "0"
        return (f"NORMAL/{number}", "") if kind == "normal" else (f"{kind}/{number}", kind)
    return "", ""


def _join_groups(table: pd.DataFrame) -> int:
    """Give groups that share a usable image one name, the smallest of theirs; return how many lost their own."""
    parent: dict[str, str] = {}

    def head(group: str) -> str:
        while parent.get(group, group) != group:
            group = parent[group]
        return group

    usable = table.loc[table["status"] == "ok", ["image_id", "group"]]
    for _, groups in usable[usable["image_id"].duplicated(keep=False)].groupby("image_id")["group"]:
        heads = sorted({head(group) for group in groups})
        parent.update(dict.fromkeys(heads[1:], heads[0]))
    if parent:
        table["group"] = table["group"].map(head)
    return len(parent)


# --- splits ----------------------------------------------------------------------------------------------------------


def _assign(table: pd.DataFrame, held: npt.NDArray[np.int64], split: str) -> None:
    if not len(held):
        train = table[table["split"] == "train"]
        raise DataError(
            f"The {len(train)} train images, in {train['group'].nunique()} groups, are too few to hold any out for "
            f"{split}; add images, or raise split.{split}."
        )
    table.loc[held, "split"] = split


def _keep_calibration(table: pd.DataFrame, *, fraction: float, seed: Sequence[int]) -> list[str]:
    """Move a share of the validation groups to ``calibration`` where both parts keep both labels; return notes."""
    held = _hold_out(table, fraction=fraction, seed=seed, source="validation")
    moved = table.index.isin(held)
    stays = (table["split"] == "validation") & ~moved
    usable = table["status"] == "ok"
    if all(table.loc[part & usable, "label"].nunique() == len(LABELS) for part in (moved, stays)):
        table.loc[held, "split"] = "calibration"
        return []
    note = "The validation groups are too few for a calibration part; thresholds come from the validation images."
    return [note]


def _fold(table: pd.DataFrame, fold: int, *, folds: int, seed: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the rows' index of one of `folds` parts of the train groups, each as alike in (label, subtype) as can be.

    The largest groups come first (in a seeded order among equals), each to the part that holds least of its stratum
    and, among equals, least of its label. So no two parts of a stratum differ by more than its largest group, and each
    part has both labels.
    """
    strata = _strata(table, "train")
    if (short := strata.groupby("label").size().min()) < folds:
        raise DataError(
            f"{folds} folds need {folds} groups of each label, found {short} of one; choose fewer with --folds."
        )
    random = np.random.RandomState(list(seed))
    shuffled = strata.sort_values("group").iloc[random.permutation(len(strata))]
    sizes = np.zeros((3, folds))  # images in each part: of this stratum, of this label, of all
    mine: list[str] = []
    for _, of_label in shuffled.groupby("label"):
        sizes[1] = 0
        for _, stratum in of_label.groupby("subtype"):
            sizes[0] = 0
            largest_first = stratum.sort_values("n", ascending=False, kind="stable")
            for group, n in zip(largest_first["group"], largest_first["n"], strict=True):
                to = int(np.lexsort(sizes[::-1])[0])  # least by the first row, ties by the second, then by the third
                sizes[:, to] += n
                if to == fold - 1:
                    mine.append(group)
    train = table["split"] == "train"
    return np.asarray(table.index[train & table["group"].isin(mine)], dtype=np.int64)


def _strata(table: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return one row per group of a split's usable images: ``group``, commonest ``label`` and ``subtype``, ``n``."""
    usable = table.loc[(table["split"] == split) & (table["status"] == "ok"), ["group", "label", "subtype"]]
    counted = usable.groupby(["group", "label", "subtype"]).size().rename("n").reset_index()
    main = counted.sort_values(["n", "label", "subtype"], ascending=[False, True, True], kind="stable")
    return main.drop_duplicates("group").assign(n=lambda rows: rows["group"].map(usable["group"].value_counts()))


def _hold_out(
    table: pd.DataFrame, *, fraction: float, seed: Sequence[int], source: str = "train"
) -> npt.NDArray[np.int64]:
    """Choose whole groups of one split's rows, stratified by (label, subtype); return their rows' index.

    Groups come in a seeded order, and one is taken where that brings its stratum's images nearer to `fraction`; what
    a stratum misses is carried to the next. A label with two groups or more has one on either side.
    """
    main = _strata(table, source)
    random = np.random.RandomState(list(seed))  # its stream, unlike Generator's, is the same in every NumPy
    chosen: list[str] = []
    carry = 0.0
    for _, of_label in main.groupby("label"):
        taken: list[str] = []
        for _, stratum in of_label.sort_values("group").groupby("subtype"):
            missing = carry + fraction * float(stratum["n"].sum())
            seeded = stratum.iloc[random.permutation(len(stratum))]
            for group, n in zip(seeded["group"], seeded["n"], strict=True):
                if abs(missing - n) < abs(missing):
                    taken.append(group)
                    missing -= n
            carry = missing
        if len(of_label) > 1 and len(taken) in (0, len(of_label)):
            taken = taken[:-1] or [str(of_label["group"].min())]
        chosen += taken
    return np.asarray(table.index[(table["split"] == source) & table["group"].isin(chosen)], dtype=np.int64)


def _keras_order(rows: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Return the rows' index in the order in which Keras lists the files of one folder.

    That is by class folder, folder and file name, usable or not, only suffixes it knows. A folded ``val`` counts as if
    its files lay in train; where folders do not tell the class, labels do.
    """
    rows = rows[~rows["path"].str.lower().str.endswith(_sources.OTHER_SUFFIXES)]
    paths = [_without_split(path.split("/")) for path in rows["path"]]
    levels = zip(*(path[:-1] for path in paths), strict=False)
    common = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, levels))
    places = ["".join(path[common : common + 1]) if len(path) > common + 1 else "" for path in paths]
    labels = list(rows["label"])
    if len(set(zip(places, labels, strict=True))) > len(set(places)):
        places = [str(label) for label in labels]
    keys = [(place, "/".join(path[:-1]), path[-1]) for place, path in zip(places, paths, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return np.asarray(rows.index[order], dtype=np.int64)


def _without_split(parts: Iterable[str]) -> list[str]:
    *folders, name = parts
    at = max(
        (at for at, folder in enumerate(folders) if folder.casefold() in _sources.SPLIT_NAMES), default=len(folders)
    )
    return [*folders[:at], *folders[at + 1 :], name]
