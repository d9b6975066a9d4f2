"""The Kaggle data set: fetched where there is a network, found again where there is none, and recognised.

Owns the call of kagglehub, where its files land, and what each of its failures means in one sentence. Knows nothing of
training; which files are images, and of what, is for the Catalog to say.

kagglehub goes on with an unfinished archive by itself, checks the whole against the MD5 that comes with it, unpacks it
and marks it as complete, all below the folder it is given::

    datasets/OWNER/NAME/2.archive       while it comes
                        versions/2/     unpacked
                        2.complete      written last
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

import pandas as pd

from pneumoscope import _files, _locks, _sources
from pneumoscope.catalog import SPLITS, Catalog
from pneumoscope.errors import DataError, PneumoscopeError, StoppedEarly, StoreError, UsageError
from pneumoscope.specs import LABELS

DATASET: Final = "paultimothymooney/chest-xray-pneumonia"
"""What Kaggle calls the chest X-rays of Kermany et al."""

EDITIONS: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType(
    {"Kaggle": {"train": 5216, "val": 16, "test": 624}, "Mendeley": {"train": 5232, "test": 624}}
)
"""Images in each folder of the two editions of this one set of 5,856 images."""

Progress = Callable[[int, int], None]
"""Called with (bytes here, bytes in all)."""

_HANDLE: Final = re.compile(r"(\w[\w.-]*)/(\w[\w.-]*)(/versions/[1-9]\d*)?", re.ASCII)
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_DAMAGED: Final = (zipfile.BadZipFile, zlib.error, tarfile.TarError, EOFError, NotImplementedError)
_TOKEN: Final = "make a token at https://www.kaggle.com/settings, save it as ~/.kaggle/access_token"
_ELSEWHERE: Final = (
    "run 'pneumoscope fetch kaggle' where there is a network, such as a cluster's login node or a laptop, "
    "and copy the folder that it names to this machine"
)


@dataclass(frozen=True, eq=False)
class Fetched:
    """A data set that is here.

    Attributes
    ----------
    folder : Path
        What ``pneumoscope run`` takes.
    counts : DataFrame of int
        Images as they lie in the folders: index ``folder`` (``train``, ``val``, ``test`` ...), columns ``NORMAL``,
        ``PNEUMONIA``, ``total``.
    sentences : tuple of str
        Which edition it looks like, what a small ``val`` folder means, and what the scan noted.
    command : str
        The next one to run.
    """

    folder: Path
    counts: pd.DataFrame
    sentences: tuple[str, ...]
    command: str


def fetch(dataset: str = DATASET, *, folder: Path | None = None, progress: Progress | None = None) -> Fetched:
    """Fetch a data set from Kaggle, going on where an earlier call broke off, and look at what came.

    What is here already is not fetched again, and needs no network; a newer version is then not looked for.

    Parameters
    ----------
    dataset : str
        ``OWNER/NAME`` as in its address on Kaggle, or ``OWNER/NAME/versions/N``.
    folder : Path, optional
        Where kagglehub's files go; ``kaggle`` in the cache where not given.
    progress : callable, optional
        Called with the bytes here and the bytes there are, while the archive comes.

    Returns
    -------
    Fetched

    Raises
    ------
    UsageError
        Where `dataset` is no such name.
    DataError
        Where there is no network or no such data set, where Kaggle wants credentials, where what came is damaged or
        holds no X-rays.
    StoreError
        Where the disk has no room for it, or the folder cannot be written.
    StoppedEarly
        Where it was interrupted; the same call goes on.
    RunError
        Where another process is fetching the same.
    """
    known = _HANDLE.fullmatch(dataset)
    if not known:
        raise UsageError(
            f"{dataset!r} is not the name of a data set on Kaggle; give OWNER/NAME as in its address, "
            f"for example {DATASET}."
        )
    home = (folder or _files.cache_dir() / "kaggle").expanduser().absolute()
    place = home / "datasets" / known[1] / known[2]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(home, error) from error
    with _locks.hold(place, "fetch", what=f"The download of {dataset}"):
        came = _download(dataset, home, place, progress)
    found = data_folder(came)
    catalog = Catalog.scan(found)
    counts = counts_of(catalog)
    notes = [note for note in catalog.notes if "validation folder" not in note]  # `recognise` says it by its numbers
    command = f"pneumoscope run {shlex.quote(str(found))} -o runs/first"
    return Fetched(found, counts, (*recognise(counts), *notes), command)


def data_folder(root: Path) -> Path:
    """Find the data set inside what was unpacked: Kaggle's archive wraps it, repeats it inside, and adds ``__MACOSX``.

    Parameters
    ----------
    root : Path
        An unpacked archive.

    Returns
    -------
    Path
        The folder nearest to `root` that holds a ``train`` folder; `root` itself where there is none.
    """
    level = [root]
    while level:
        for folder in level:
            if any(_sources.SPLIT_NAMES.get(child.name.casefold()) == "train" for child in _folders(folder)):
                return folder
        level = [child for folder in level for child in _folders(folder)]
    return root


def _folders(folder: Path) -> list[Path]:
    return sorted(
        child for child in folder.iterdir() if child.is_dir() and not child.is_symlink() and child.name != "__MACOSX"
    )


def counts_of(catalog: Catalog) -> pd.DataFrame:
    """Count a scanned data set's images by the folder they lie in, as `Fetched.counts` holds them.

    Parameters
    ----------
    catalog : Catalog
        Fresh from `Catalog.scan`. Its splits are not asked: a small ``val`` folder counts as train there.

    Returns
    -------
    DataFrame of int
    """
    places = [
        next((name.casefold() for name in path.split("/")[:-1] if name.casefold() in _sources.SPLIT_NAMES), split)
        for path, split in zip(catalog.table["path"], catalog.table["split"], strict=True)
    ]
    counts = pd.crosstab(pd.Series(places, name="folder"), catalog.table["label"].to_numpy())
    counts = counts.reindex(columns=range(len(LABELS)), fill_value=0).set_axis(list(LABELS), axis=1)
    in_order = sorted(counts.index, key=lambda name: SPLITS.index(_sources.SPLIT_NAMES.get(name, name)))
    return counts.assign(total=counts.sum(axis=1)).loc[in_order]


def recognise(counts: pd.DataFrame) -> list[str]:
    """Say which edition of the data set this looks like, and what a small ``val`` folder means.

    Parameters
    ----------
    counts : DataFrame
        As `counts_of` returns it.

    Returns
    -------
    list of str
        One sentence or two.
    """
    found = {str(name): int(n) for name, n in counts["total"].items()}
    edition = next((name for name, images in EDITIONS.items() if images == found), None)
    if edition is None:
        known = "; ".join(f"the {name} edition has {_listed(images)}" for name, images in EDITIONS.items())
        said = [f"This is not the known data set, or not the whole of it: found {_listed(found)}; {known}."]
    else:
        said = [f"This looks like the {edition} edition: {_listed(found)}, {sum(found.values()):,} images in all."]
    few = found.get("val", 0)
    if 0 < few <= _sources.KAGGLE_VAL_IMAGES:
        said.append(
            f"Its val folder holds {few} images, too few to steer training by: they count as train, and a run holds "
            "out validation images of its own."
        )
    return said


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


# --- the call of kagglehub -------------------------------------------------------------------------------------------


def _download(dataset: str, home: Path, place: Path, progress: Progress | None) -> Path:
    """Have kagglehub fetch, check and unpack a data set, or name the folder where it did so before."""
    import kagglehub  # late: loads requests, which no other verb needs

    try:
        with _settings(kagglehub, home), _own_bar(kagglehub, partial(_Bar, dataset, home, progress)):
            return Path(kagglehub.dataset_download(_newest_here(dataset, place)))
    except (KeyboardInterrupt, StoppedEarly) as error:
        raise StoppedEarly(
            f"The download of {dataset} was interrupted; what came is kept, run the same command again to go on."
        ) from error
    except PneumoscopeError:
        raise
    except Exception as error:  # kagglehub's own errors have no common base
        raise _told(error, dataset, home, place) from error


def _newest_here(dataset: str, place: Path) -> str:
    """Name the newest version that is complete: for that kagglehub asks no server."""
    if "/versions/" in dataset:
        return dataset
    stems = [path.stem for path in place.glob("*.complete")]
    numbers = [int(stem) for stem in stems if stem.isdecimal() and (place / "versions" / stem).is_dir()]
    return f"{dataset}/versions/{max(numbers)}" if numbers else dataset


@contextmanager
def _settings(kagglehub: Any, home: Path) -> Iterator[None]:
    """Give kagglehub its folder and keep it quiet: what it prints on standard output would break JSON lines."""
    logger = logging.getLogger(kagglehub.__name__)
    level, before = logger.level, os.environ.get("KAGGLEHUB_CACHE")
    os.environ["KAGGLEHUB_CACHE"] = str(home)
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["KAGGLEHUB_CACHE"]
        else:
            os.environ["KAGGLEHUB_CACHE"] = before


@contextmanager
def _own_bar(kagglehub: Any, bar: Callable[..., Any]) -> Iterator[None]:
    """Put `bar` in the place of the tqdm bar that kagglehub opens once it knows the archive's size.

    kagglehub has no parameter for it; a test with the real kagglehub fails where the name goes away.
    """
    theirs = kagglehub.clients.tqdm
    kagglehub.clients.tqdm = bar
    try:
        yield
    finally:
        kagglehub.clients.tqdm = theirs


class _Bar:
    """Looks at the disk before the first byte is written, then reports what comes."""

    def __init__(
        self, dataset: str, home: Path, progress: Progress | None, *, total: int, initial: int, **_: Any
    ) -> None:
        self._progress, self._done, self._total = progress, initial, total
        # JPEG files do not shrink in an archive: unpacked they take as much again, while the archive still lies there
        needed, free = 2 * total - initial, shutil.disk_usage(home).free
        if free < needed * 1.05:
            raise StoreError(
                f"{dataset} needs {_files.size_text(needed)} in {home} until it is unpacked, but only "
                f"{_files.size_text(free)} is free; free some space, or choose a folder on a larger disk with -o."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, n_bytes: int) -> None:
        self._done += n_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)


# --- what its failures mean ------------------------------------------------------------------------------------------


def _told(error: Exception, dataset: str, home: Path, place: Path) -> PneumoscopeError:
    """Turn an exception of kagglehub, requests or the disk into one sentence."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return DataError(_refused(status, dataset))
    if type(error).__name__ == "DataCorruptionError":  # kagglehub has deleted it
        return DataError(
            f"The archive of {dataset} does not have the checksum that Kaggle gives for it; it was deleted, run the "
            "same command again, and if that repeats, look whether a proxy changes downloads."
        )
    if isinstance(error, _DAMAGED) or str(error) == "Unsupported archive type.":
        for archive in place.glob("*.archive"):
            archive.unlink()  # complete by its size: kagglehub would unpack it again and again
        return DataError(
            f"The archive of {dataset} is damaged ({_first_line(error)}); it was deleted, run the same command again."
        )
    if isinstance(error, OSError):
        return _unreachable(error, dataset, place) if error.errno is None else _unwritable(home, error, place)
    return DataError(f"Kaggle did not give {dataset} ({_first_line(error)}); mend that and run the same command again.")


def _refused(status: int, dataset: str) -> str:
    if status == HTTPStatus.NOT_FOUND:
        return (
            f"Kaggle has no data set {dataset} (404), or it is private; check OWNER/NAME in its address, and for a "
            f"private one {_TOKEN} and run the same command again."
        )
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return (
            f"Kaggle does not let you read {dataset} ({status}); check OWNER/NAME in its address, {_TOKEN}, agree to "
            "the terms on its page where it has any, and run the same command again."
        )
    meaning = "asks to wait" if status == HTTPStatus.TOO_MANY_REQUESTS else "failed"
    return f"Kaggle {meaning} ({status}) at {dataset}; run the same command again in some minutes."


def _unreachable(error: OSError, dataset: str, place: Path) -> DataError:
    """Say that the network failed: requests' errors are OSErrors without a number."""
    had = sum(archive.stat().st_size for archive in place.glob("*.archive"))
    if had:
        return DataError(
            f"The connection to Kaggle ended early; {_files.size_text(had)} of {dataset} are kept, run the same "
            "command again to go on."
        )
    reason = getattr(error.args[0] if error.args else error, "reason", error)  # what urllib3 gave up for
    reason = getattr(reason, "original_error", reason)
    return DataError(f"Kaggle cannot be reached ({_first_line(reason).rpartition(': ')[2]}); {_ELSEWHERE}.")


def _unwritable(home: Path, error: OSError, place: Path | None = None) -> StoreError:
    why = error.strerror or str(error)
    if error.errno not in _FULL or place is None:
        return StoreError(f"Cannot write to {home} ({why}); choose a folder you may write to with -o.")
    archives = list(place.glob("*.archive"))
    came, needed = (_files.size_text(sum(map(size, archives))) for size in (_files.size_of, _unpacked_size))
    return StoreError(
        f"There is no more room in {home} ({why}): {came} came, {needed} are needed to unpack them, "
        f"{_files.size_text(shutil.disk_usage(home).free)} is free; free some space and run the same command again."
    )


def _unpacked_size(archive: Path) -> int:
    try:
        with zipfile.ZipFile(archive) as entries:
            return sum(entry.file_size for entry in entries.infolist())
    except (OSError, zipfile.BadZipFile):  # not whole yet: JPEG files do not shrink in an archive
        return _files.size_of(archive)


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
