"""The FeatureStore: what the frozen part of a network makes of each image, computed once and kept memory-mapped.

Owns which inputs decide a feature's value (its key) and how an interrupted extraction goes on. Knows nothing of labels,
heads or schedules.

A store is a folder in the cache, one for each view of the images at each place where the network is cut::

    features-<key>/features.npy    (N, ...)
                   manifest.json   written last
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pneumoscope import _backend, _files, augmentation, backbones, models
from pneumoscope._backend import keras
from pneumoscope.errors import StoreError
from pneumoscope.specs import Spec
from pneumoscope.store import ImageStore, new_array, open_array

_BATCH = 32
_STEPS_BETWEEN_MARKS = 8  # at most this many batches are computed again after a kill

Progress = Callable[[int, int], None]
"""Called with (done, total) forward passes."""


@dataclass(frozen=True)
class FeatureStore:
    """Stored outputs of one network prefix.

    Attributes
    ----------
    views : tuple of ndarray, the first of shape (N, ...), the others (n, ...)
        Memory-mapped, read only, float16 or float32. The first is of the clean images, the others of augmented copies
        of those that are learned from.
    """

    views: tuple[npt.NDArray[Any], ...]


def extract(
    model: models.Model,
    cuts: Sequence[str],
    *,
    store: ImageStore,
    rows: npt.NDArray[np.intp],
    learned: npt.NDArray[np.intp],
    spec: Spec,
    cache: Path | None = None,
    part: tuple[int, int] | None = None,
    parts: int = 1,
    progress: Progress | None = None,
) -> dict[str, FeatureStore]:
    """Compute the outputs at some layers for many images in one pass, or open what is already there.

    Parameters
    ----------
    model : keras.Model
        Holds the layers; everything before them is frozen.
    cuts : sequence of str
        Names of layers.
    store : ImageStore
        The images.
    rows : ndarray of intp, shape (N,)
        Which images, in the order of the features.
    learned : ndarray of intp, shape (n,)
        Those that are learned from; only these are augmented.
    spec : Spec
        ``features``, ``augment``, ``backbone`` and ``seed``.
    cache : Path, optional
        Folder for stores; the user's cache where not given.
    part : tuple of int, optional
        Compute only one part of each view and return nothing: which, from 0, of how many.
    parts : int
        Where 2 or more, take so many parts from where other processes have stored them, compute those that are missing,
        and put them together.
    progress : callable, optional
        Called with (done, total) images, counting every view.

    Returns
    -------
    dict of str to FeatureStore
        By the name of the cut.

    Raises
    ------
    StoreError
        Where there is too little space or the cache cannot be written.
    """
    root = cache or _files.cache_dir()
    rows_of = [rows, *[learned] * spec.features.views]
    targets = [
        {name: root / f"features-{_key(name, view, store=store, rows=rows_of[view], spec=spec)}" for name in cuts}
        for view in range(len(rows_of))
    ]
    missing = [_unfinished(one) for one in targets]
    size = sum(np.prod(_shape(model, name, len(rows_of[view]))) for view, one in enumerate(missing) for name in one)
    if size:
        copies = 1 if parts == 1 else 2  # parts stand beside the whole until it is put together
        needed = copies * int(size) * np.dtype(spec.features.dtype).itemsize
        needed -= sum(_reserved(target) for one in missing for target in one.values())
        _files.require_space(root, needed, what="Storing the features")
    total, before = sum(map(len, rows_of)), 0
    for view, chosen in enumerate(rows_of):

        def report(done: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        work = _View(model, view, store, chosen, spec)
        if missing[view] and part is not None:
            work.compute(work.folders_of(part, missing[view]), part, report=report)
        elif missing[view] and parts > 1:
            work.put_together(missing[view], parts, report=report)
        elif missing[view]:
            work.compute(missing[view], report=report)
        before += len(chosen)
    if part is not None:
        return {}
    return {name: FeatureStore(tuple(open_array(one[name] / "features.npy") for one in targets)) for name in cuts}


def frozen(
    table: pd.DataFrame,
    store: ImageStore,
    *,
    spec: Spec,
    among: pd.DataFrame | None = None,
    progress: Progress | None = None,
) -> npt.NDArray[np.float32]:
    """Return what the frozen backbone, averaged over the picture, makes of clean images.

    Nothing in it was trained on any of these images, so that two sets can be compared fairly.

    Parameters
    ----------
    table : DataFrame
        Rows of a Catalog.
    store : ImageStore
        Their images.
    spec : Spec
        ``backbone``, ``features`` and ``image``.
    among : DataFrame, optional
        More rows, `table` within them, to compute at once: those that training needs have been stored by it.
    progress : callable, optional
        Called with (done, total) images.

    Returns
    -------
    ndarray of float32, shape (n, d)
        In the order of `table`.

    Raises
    ------
    WeightsError
        Where the backbone's weights cannot be had.
    StoreError
        As `extract`.
    """
    model = models.build("tl", spec)
    (cut,) = filter(None, [models.cut(model)])
    rows = np.unique(store.rows_of(table if among is None else among))
    clean = spec.with_overrides(["features.views=0"])
    found = extract(model, [cut], store=store, rows=rows, learned=rows, spec=clean, progress=progress)
    return found[cut].views[0][np.searchsorted(rows, store.rows_of(table))].astype(np.float32)


def _finished(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


def _unfinished(targets: Mapping[str, Path]) -> dict[str, Path]:
    """Return the stores that are still to compute; what one process lacks, all that work together compute."""
    return {name: folder for name, folder in targets.items() if _backend.agree(not _finished(folder))}


def _shape(model: models.Model, cut: str, n: int) -> tuple[int, ...]:
    return (n, *model.get_layer(cut).output.shape[1:])


def _key(
    cut: str,
    view: int,
    *,
    store: ImageStore,
    rows: npt.NDArray[np.intp],
    spec: Spec,
    part: tuple[int, int] | None = None,
) -> str:
    change = {"augment": spec.augment.model_dump(), "seed": spec.seed, "view": view} if view else {}
    content = {
        "images": store.key,
        "rows": _files.sha256_of(np.ascontiguousarray(rows, dtype=np.int64).tobytes()),
        "backbone": spec.backbone.name,
        "scaling": spec.backbone.scaling,
        "weights": backbones.weights_hash(spec.backbone) or f"random, seed {spec.seed}",
        "cut": cut,
        "dtype": spec.features.dtype,
        "precision": spec.train.precision,
        "keras": keras.__version__,
        "backend": keras.config.backend(),
        **change,
        **({} if part is None else {"part": list(part)}),
    }
    return _files.hash_of(content)[:16]


@dataclass(frozen=True)
class _View:
    """One view of the images on its way through the network; view 0 is of the clean images."""

    model: models.Model
    view: int
    store: ImageStore
    rows: npt.NDArray[np.intp]
    spec: Spec

    def span(self, part: tuple[int, int] | None) -> slice:
        """Return which rows a part holds: whole batches, so that every image is computed in the same company."""
        if part is None:
            return slice(0, len(self.rows))
        batches, (index, parts) = -(-len(self.rows) // _BATCH), part
        start, stop = (min(_BATCH * (batches * one // parts), len(self.rows)) for one in (index, index + 1))
        return slice(start, stop)

    def folders_of(self, part: tuple[int, int], targets: Mapping[str, Path]) -> dict[str, Path]:
        """Return where a part of some stores is kept until they are put together."""
        keys = {
            name: _key(name, self.view, store=self.store, rows=self.rows, spec=self.spec, part=part) for name in targets
        }
        return {name: folder.with_name(f"features-{keys[name]}") for name, folder in targets.items()}

    def compute(
        self, targets: Mapping[str, Path], part: tuple[int, int] | None = None, *, report: Callable[[int], None]
    ) -> None:
        """Run the images, or a part of them, through the network up to every cut, and store what comes out."""
        span, waiting = self.span(part), _unfinished(targets)
        n = span.stop - span.start
        if not n or not waiting:
            return
        prefix = keras.Model(self.model.input, [self.model.get_layer(name).output for name in waiting])
        dtype = np.dtype(self.spec.features.dtype)
        partial = [_Partial(folder, _shape(self.model, name, n), dtype) for name, folder in waiting.items()]
        network, fetch = self._reader(prefix)
        start = _backend.agree(min(one.done for one in partial), of=min)

        def rest(positions: slice) -> Any:
            return fetch(slice(positions.start + start + span.start, positions.stop + start + span.start))

        batches = models.in_batches(network, rest, n - start, batch_size=_BATCH)
        for step, (positions, outputs) in enumerate(batches, start=1):
            done = positions.stop + start
            for one, output in zip(partial, outputs, strict=True):
                one.array[positions.start + start : done] = _narrowed(output, dtype)
                if step % _STEPS_BETWEEN_MARKS == 0:
                    one.mark(done)
            report(span.start + done)
        with _backend.in_turn():  # processes that work together end together
            for one in partial:
                one.finish()

    def put_together(self, targets: Mapping[str, Path], parts: int, *, report: Callable[[int], None]) -> None:
        """Make stores of their parts: those that are there are copied, the others computed first."""
        shapes = {name: _shape(self.model, name, len(self.rows)) for name in targets}
        whole = {name: _Partial(folder, shapes[name], self.spec.features.dtype) for name, folder in targets.items()}
        copied = []
        for index in range(parts):
            if all(map(_finished, targets.values())):  # another job put the same parts together, and deletes them
                break
            span, folders = self.span((index, parts)), self.folders_of((index, parts), targets)
            if span.start == span.stop:
                continue
            self.compute(folders, (index, parts), report=report)
            for name, folder in folders.items():
                try:
                    whole[name].array[span] = open_array(folder / "features.npy")
                except StoreError:
                    if not all(map(_finished, targets.values())):
                        raise
                copied.append(folder)
            report(span.stop)
        for one in whole.values():
            one.finish()
        for folder in copied:
            shutil.rmtree(folder, ignore_errors=True)

    def _reader(self, prefix: models.Model) -> tuple[models.Model, Callable[[slice], Any]]:
        """Return the network and how to fetch its inputs."""
        if self.view == 0:
            return prefix, lambda positions: self.store.images[self.rows[positions], ..., None]
        drawn = augmentation.draw(self.spec.augment, len(self.rows), seed=(self.spec.seed, models.VIEWS, self.view))
        return augmentation.augmented(prefix, self.spec.augment), lambda positions: [
            self.store.images[self.rows[positions], ..., None],
            drawn[positions],
        ]


def _narrowed(output: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return the outputs in the precision they are stored in; float16 ends at 65,504."""
    with np.errstate(over="ignore"):  # said below, in a sentence
        stored = output.astype(dtype)
    if not np.isfinite(stored).all():
        raise StoreError(
            f"The frozen layers gave values that {dtype} cannot hold (the largest is "
            f"{float(np.abs(output.astype(np.float32)).max()):g}); set features.dtype=float32 and check the weights."
        )
    return stored


def _partial_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _reserved(target: Path) -> int:
    """Return how much of the disk an earlier, unfinished extraction holds already, in bytes."""
    path = _partial_of(target) / "features.npy"
    return path.stat().st_size if path.exists() else 0


class _Partial:
    """An unfinished store beside its final place: an array of the final size and a mark of how far it is valid.

    Two processes that extract the same features write the same bytes, so they may share one.
    """

    def __init__(self, target: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self._target, self._folder = target, _partial_of(target)
        self._mark = self._folder / "done.json"
        path = self._folder / "features.npy"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                self._mark.unlink(missing_ok=True)  # of an array that is gone, as where a deletion was interrupted
                fresh = self._folder / f".{os.getpid()}.npy"
                new_array(fresh, shape=shape, dtype=dtype).flush()
                with contextlib.suppress(FileExistsError):  # never replace an array another process already writes to
                    os.link(fresh, path)
                fresh.unlink()
        except OSError as error:
            raise StoreError(
                f"Cannot write to {target.parent}: {error.strerror or error}; "
                "set PNEUMOSCOPE_CACHE to a folder you may write to."
            ) from error
        self.array = np.lib.format.open_memmap(path, mode="r+")
        self.done = int(_files.read_json(self._mark)["done"]) if self._mark.exists() else 0

    def mark(self, done: int) -> None:
        """Say that the first rows are valid, once they are on the disk."""
        self.array.flush()
        if (self._folder / "features.npy").exists():  # else another process was quicker, and took it away
            _files.write_json(self._mark, {"done": done})

    def finish(self) -> None:
        """Give the store its final name."""
        if not (self._folder / "features.npy").exists() and not _finished(self._target):
            raise StoreError(f"{self._folder} was deleted while features were written to it; run the same again.")
        self.mark(len(self.array))
        _files.write_json(self._folder / "manifest.json", {"kind": "features"})
        try:
            os.replace(self._folder, self._target)
        except OSError:
            if _finished(self._target):  # another process was quicker with the same features
                shutil.rmtree(self._folder, ignore_errors=True)
            else:  # a deletion was interrupted
                shutil.rmtree(self._target, ignore_errors=True)
                os.replace(self._folder, self._target)
