"""The FeatureStore: what the frozen part of a network makes of each image, computed once and kept memory-mapped.

Owns which inputs decide a feature's value (its key) and how an interrupted extraction goes on. Knows nothing of labels,
heads or schedules.

A store is a folder in the cache, one for each place where the network is cut::

    features-<key>/view-0.npy      (N, ...) of the clean images
                   view-1.npy ...  of augmented copies
                   manifest.json   written last
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pneumoscope import _files, backbones, models
from pneumoscope._backend import keras
from pneumoscope.errors import StoreError
from pneumoscope.specs import Spec
from pneumoscope.store import ImageStore

_BATCH = 32
_STEPS_BETWEEN_MARKS = 8  # at most this many batches are computed again after a kill

Progress = Callable[[int, int], None]
"""Called with (done, total) forward passes."""


@dataclass(frozen=True)
class FeatureStore:
    """Stored outputs of one network prefix.

    Attributes
    ----------
    folder : Path
        Where the store lies.
    views : tuple of ndarray, each of shape (N, ...)
        Memory-mapped, read only, float16 or float32. The first is of the clean images, the others of augmented copies.
    """

    folder: Path
    views: tuple[npt.NDArray[Any], ...]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a finished store.

        Parameters
        ----------
        folder : Path
            As `extract` made it.

        Returns
        -------
        FeatureStore

        Raises
        ------
        StoreError
            Where it is unfinished or damaged.
        """
        manifest = _files.read_json(folder / "manifest.json")
        try:
            views = tuple(
                np.load(folder / f"view-{view}.npy", mmap_mode="r", allow_pickle=False)
                for view in range(manifest["views"])
            )
        except (OSError, ValueError) as error:
            raise StoreError(f"{folder} is damaged ({error}); delete it and run again.") from error
        return cls(folder, views)


def extract(
    model: models.Model,
    cuts: Sequence[str],
    *,
    store: ImageStore,
    rows: npt.NDArray[np.intp],
    spec: Spec,
    cache: Path | None = None,
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
    spec : Spec
        ``features``, ``augment``, ``backbone`` and ``seed``.
    cache : Path, optional
        Folder for stores; the user's cache where not given.
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
    targets = {name: root / f"features-{_key(name, store=store, rows=rows, spec=spec)}" for name in cuts}
    missing = {name: folder for name, folder in targets.items() if not (folder / "manifest.json").exists()}
    if missing:
        _compute(model, missing, store=store, rows=rows, spec=spec, progress=progress)
    return {name: FeatureStore.open(folder) for name, folder in targets.items()}


def _key(cut: str, *, store: ImageStore, rows: npt.NDArray[np.intp], spec: Spec) -> str:
    views = {"augment": spec.augment.model_dump(), "seed": spec.seed} if spec.features.views else {}
    content = {
        "images": store.key,
        "rows": _files.sha256_of(np.ascontiguousarray(rows, dtype=np.int64).tobytes()),
        "backbone": spec.backbone.name,
        "scaling": spec.backbone.scaling,
        "weights": backbones.weights_hash(spec.backbone) or f"random, seed {spec.seed}",
        "cut": cut,
        "views": spec.features.views,
        "dtype": spec.features.dtype,
        "precision": spec.train.precision,
        "keras": keras.__version__,
        "backend": keras.config.backend(),
        **views,
    }
    return _files.hash_of(content)[:16]


def _compute(
    model: models.Model,
    targets: Mapping[str, Path],
    *,
    store: ImageStore,
    rows: npt.NDArray[np.intp],
    spec: Spec,
    progress: Progress | None,
) -> None:
    prefix = keras.Model(model.input, [model.get_layer(name).output for name in targets])
    shapes = {name: tuple(model.get_layer(name).output.shape[1:]) for name in targets}
    views, n = 1 + spec.features.views, len(rows)
    size = sum(int(np.prod(shape)) for shape in shapes.values()) * n * views * np.dtype(spec.features.dtype).itemsize
    root = next(iter(targets.values())).parent
    _files.require_space(root, size, what="Storing the features")
    partial = {name: _Partial(folder, shapes[name], n=n, spec=spec) for name, folder in targets.items()}
    for view in range(views):
        network, fetch = _reader(prefix, view, store=store, rows=rows, spec=spec)
        start = min(part.done(view) for part in partial.values())
        arrays = [part.array(view) for part in partial.values()]

        def shifted(positions: slice, fetch: Callable[[slice], Any] = fetch, start: int = start) -> Any:
            return fetch(slice(positions.start + start, positions.stop + start))

        batches = models.in_batches(network, shifted, n - start, batch_size=_BATCH)
        for step, (positions, outputs) in enumerate(batches, start=1):
            stop = positions.stop + start
            for array, output in zip(arrays, outputs, strict=True):
                array[positions.start + start : stop] = output
            if step % _STEPS_BETWEEN_MARKS == 0 or stop == n:
                for part, array in zip(partial.values(), arrays, strict=True):
                    array.flush()
                    part.mark(view, stop)
            if progress is not None:
                progress(view * n + stop, views * n)
    for part in partial.values():
        part.finish(views)


def _reader(
    prefix: models.Model, view: int, *, store: ImageStore, rows: npt.NDArray[np.intp], spec: Spec
) -> tuple[models.Model, Callable[[slice], Any]]:
    """Return the network for one view and how to fetch its inputs; view 0 is of the clean images."""
    if view == 0:
        return prefix, lambda positions: store.images[rows[positions], ..., None]
    drawn = models.transforms(spec.augment, len(rows), seed=(spec.seed, models.VIEWS, view))
    return models.augmented(prefix), lambda positions: [store.images[rows[positions], ..., None], drawn[positions]]


class _Partial:
    """An unfinished store beside its final place: arrays of the final size and a mark of how far they are valid.

    Two processes that extract the same features write the same bytes, so they may share one.
    """

    def __init__(self, target: Path, shape: tuple[int, ...], *, n: int, spec: Spec) -> None:
        self._target, self._folder = target, target.with_name(f".{target.name}.partial")
        self._shape, self._dtype = (n, *shape), np.dtype(spec.features.dtype)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"Cannot write to {target.parent}: {error.strerror}; "
                "set PNEUMOSCOPE_CACHE to a folder you may write to."
            ) from error

    def array(self, view: int) -> Any:
        path = self._folder / f"view-{view}.npy"
        if not path.exists():
            fresh = self._folder / f".view-{view}.{os.getpid()}.npy"
            np.lib.format.open_memmap(fresh, mode="w+", dtype=self._dtype, shape=self._shape).flush()
            with contextlib.suppress(FileExistsError):  # never replace an array another process already writes to
                os.link(fresh, path)
            fresh.unlink()
        return np.lib.format.open_memmap(path, mode="r+")

    def done(self, view: int) -> int:
        mark = self._folder / f"view-{view}.json"
        return int(_files.read_json(mark)["done"]) if mark.exists() else 0

    def mark(self, view: int, done: int) -> None:
        _files.write_json(self._folder / f"view-{view}.json", {"done": done})

    def finish(self, views: int) -> None:
        _files.write_json(self._folder / "manifest.json", {"kind": "features", "views": views})
        try:
            os.replace(self._folder, self._target)
        except OSError:  # another process was quicker with the same features
            if not (self._target / "manifest.json").exists():
                raise
