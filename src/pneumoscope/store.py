"""The ImageStore: every image of a Catalog decoded and resized once, kept as one memory-mapped array.

Owns the folder layout and what makes a store valid. Knows nothing of labels, splits or networks.

A store is a folder in the cache named for what went into it::

    images-<key>/images.npy      uint8 (N, size_px, size_px)
                 manifest.json   written last: key, size, decoder, image_id per row, rejected images and why
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from pneumoscope import _files, images
from pneumoscope._backend import available_cores
from pneumoscope.catalog import Catalog
from pneumoscope.errors import ImageError, StoreError

_BLOCK = 64  # images between two reports of progress

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True)
class ImageStore:
    """Packed images.

    Attributes
    ----------
    folder : Path
        Where the store lies.
    images : ndarray of uint8, shape (N, size_px, size_px)
        Memory-mapped, read only; 0 is black.
    image_ids : ndarray of str, shape (N,)
        Which image each row is; sorted.
    rejected : dict of str to str
        image_id -> reason, for files that could not be decoded.
    key : str
        Hash of the contents' ids, the size, the compression and the decoder's version.
    jpeg_quality : int
        As `images.load`.
    """

    folder: Path
    images: npt.NDArray[np.uint8]
    image_ids: npt.NDArray[np.str_]
    rejected: dict[str, str]
    key: str
    jpeg_quality: int = 0

    @classmethod
    def pack(
        cls,
        catalog: Catalog,
        *,
        size_px: int,
        jpeg_quality: int = 0,
        cache: Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Decode and resize every usable image of a Catalog, or open the store that already holds them.

        Parameters
        ----------
        catalog : Catalog
            Images with the same content are packed once.
        size_px : int
            Side of the square.
        jpeg_quality : int
            As `images.load`.
        cache : Path, optional
            Folder for stores; the user's cache where not given.
        progress : callable, optional
            Called with (done, total) images.

        Returns
        -------
        ImageStore
            Images that could not be decoded are in `rejected`; pass it to `Catalog.quarantine`.

        Raises
        ------
        StoreError
            Where there is too little space, the cache cannot be written, or a file changed since it was listed.
        """
        usable = catalog.rows()[["image_id", "path"]].drop_duplicates("image_id").sort_values("image_id", kind="stable")
        ids, paths = usable["image_id"].tolist(), usable["path"].tolist()
        content = {"image_ids": ids, "size_px": size_px, "decoder": images.DECODER_VERSION}
        if jpeg_quality:
            content["jpeg_quality"] = jpeg_quality
        key = _files.hash_of(content)[:16]
        folder = cls.folder_of(key, cache=cache)
        if folder.exists() and not (folder / "manifest.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # a deletion was interrupted: packing never leaves this
        if not folder.exists():
            _files.require_space(folder.parent, len(ids) * size_px**2, what="Packing the images")

            def fill(target: Path) -> None:
                _fill(
                    target, catalog, ids, paths, size_px=size_px, jpeg_quality=jpeg_quality, key=key, progress=progress
                )

            _files.build_folder(folder, fill)
        return cls.open(folder)

    @staticmethod
    def folder_of(key: str, *, cache: Path | None = None) -> Path:
        """Return where the store of a key is kept.

        Parameters
        ----------
        key : str
            Of a store.
        cache : Path, optional
            Folder for stores; the user's cache where not given.

        Returns
        -------
        Path
            Whether it is there or not.
        """
        return (cache or _files.cache_dir()) / f"images-{key}"

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a packed store.

        Parameters
        ----------
        folder : Path
            As `pack` made it.

        Returns
        -------
        ImageStore

        Raises
        ------
        StoreError
            Where it is unfinished, damaged, or made by another decoder.
        """
        manifest = _files.read_json(folder / "manifest.json")
        decoder = manifest.get("decoder")
        if decoder != images.DECODER_VERSION:
            raise StoreError(
                f"{folder} was packed by decoder {decoder}, this is {images.DECODER_VERSION}; pack the images again."
            )
        array = open_array(folder / "images.npy")
        shape = (len(manifest["image_ids"]), manifest["size_px"], manifest["size_px"])
        if array.shape != shape or array.dtype != np.uint8:
            raise StoreError(f"{folder} holds {array.shape} where {shape} belongs; delete it and run again.")
        image_ids = np.asarray(manifest["image_ids"], dtype=np.str_)
        quality = int(manifest.get("jpeg_quality", 0))  # stores of earlier versions do not say it
        return cls(folder, array, image_ids, dict(manifest["rejected"]), str(manifest["key"]), quality)

    @property
    def size_px(self) -> int:
        """Side of the square images."""
        return int(self.images.shape[1])

    def rows_of(self, table: pd.DataFrame) -> npt.NDArray[np.intp]:
        """Find the rows of a Catalog's images.

        Parameters
        ----------
        table : DataFrame
            With the column ``image_id``, for example `Catalog.rows`.

        Returns
        -------
        ndarray of intp, shape (n,)

        Raises
        ------
        StoreError
            Where an image is not in this store.
        """
        wanted = table["image_id"].to_numpy(dtype=str)
        if not len(self.image_ids):
            raise StoreError(f"{self.folder} holds no image; pack the images again.")
        rows = np.minimum(np.searchsorted(self.image_ids, wanted), len(self.image_ids) - 1)
        missing = self.image_ids[rows] != wanted
        if missing.any():
            raise StoreError(
                f"{int(missing.sum())} of {len(wanted)} images are not in {self.folder}; pack this set of images first."
            )
        return rows


def _fill(
    target: Path,
    catalog: Catalog,
    ids: list[str],
    paths: list[str],
    *,
    size_px: int,
    jpeg_quality: int,
    key: str,
    progress: Progress | None,
) -> None:
    """Write a store's files into `target`, the manifest last; rows of undecodable images are left out."""
    temporary = target / "all.npy"
    array = new_array(temporary, shape=(max(len(ids), 1), size_px, size_px), dtype=np.uint8)
    rejected: dict[str, str] = {}

    def work(row: int) -> None:
        try:
            data = catalog.read_bytes(paths[row])
        except ImageError as error:
            raise StoreError(
                f"{paths[row]} was listed but is {error.reason} now; make it readable and run again."
            ) from error
        if not _files.sha256_of(data).startswith(ids[row]):
            raise StoreError(f"{paths[row]} changed while it was read; wait until it is complete and run again.")
        try:
            array[row] = images.load(data, size_px, jpeg_quality=jpeg_quality)
        except ImageError as error:
            rejected[ids[row]] = error.reason

    with ThreadPoolExecutor(available_cores()) as pool:  # Pillow decodes and resizes outside the interpreter's lock
        for start in range(0, len(ids), _BLOCK):  # a block at a time, so that memory does not grow with the data
            for _ in pool.map(work, range(start, min(start + _BLOCK, len(ids)))):
                pass
            if progress is not None:
                progress(min(start + _BLOCK, len(ids)), len(ids))
    kept = [row for row, image_id in enumerate(ids) if image_id not in rejected]
    if len(kept) < len(array):  # rare: copy the good rows together
        good = new_array(target / "good.npy", shape=(len(kept), size_px, size_px), dtype=np.uint8)
        for new, old in enumerate(kept):
            good[new] = array[old]
        good.flush()
        os.replace(target / "good.npy", temporary)
    else:
        array.flush()
    os.replace(temporary, target / "images.npy")
    _files.write_json(
        target / "manifest.json",
        {
            "kind": "images",
            "key": key,
            "size_px": size_px,
            "jpeg_quality": jpeg_quality,
            "decoder": images.DECODER_VERSION,
            "image_ids": [ids[row] for row in kept],
            "rejected": rejected,
        },
    )


def new_array(path: Path, *, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.memmap[Any, Any]:
    """Make a memory-mapped array whose space is taken at once.

    Numpy makes a file of holes; where a quota or the disk then ends while a hole is filled, the system kills the
    process (SIGBUS) before any error can be told.

    Parameters
    ----------
    path : Path
        The ``.npy`` file to make.
    shape : tuple of int
        Of the array.
    dtype : dtype
        Of its elements.

    Returns
    -------
    memmap
        Writable, all zero. An ``OSError`` passes through where there is no space.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def open_array(path: Path) -> npt.NDArray[Any]:
    """Open a finished memory-mapped array for reading.

    Parameters
    ----------
    path : Path
        A ``.npy`` file; nothing else is opened, pickles never.

    Returns
    -------
    ndarray
        Of the shape and dtype that it was written with; read only.

    Raises
    ------
    StoreError
        Where it is missing or damaged.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")  # np.load would also open archives
    except (OSError, ValueError, TypeError, SyntaxError, TokenError) as error:  # a header is parsed as Python
        raise StoreError(f"{path.parent} is damaged ({error}); delete it and run again.") from error
