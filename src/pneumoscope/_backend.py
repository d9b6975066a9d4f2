"""The only module that names TensorFlow, JAX or torch: a quiet start, threads, determinism, what is there.

Whoever needs Keras says ``from pneumoscope._backend import keras``: that loads it once, with the chosen backend, and
keeps the loading quiet. `prepare` sets threads and determinism and must come before the first computation. Knows
nothing of models or data.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pneumoscope.errors import UsageError

BACKENDS: tuple[str, ...] = ("tensorflow", "jax", "torch")

keras: Any
"""The Keras package, loaded on first use."""


@dataclass(frozen=True)
class Machine:
    """What the chosen backend computes on.

    Attributes
    ----------
    backend : str
        ``tensorflow``, ``jax`` or ``torch``.
    versions : dict of str to str
        Of Python, Keras and the backend.
    devices : tuple of str
        For example ``("CPU",)`` or ``("GPU: NVIDIA A100",)``.
    threads : int
        CPU threads in use.
    """

    backend: str
    versions: dict[str, str]
    devices: tuple[str, ...]
    threads: int


def chosen() -> str:
    """Return the backend that Keras uses or will use.

    Returns
    -------
    str
        ``$KERAS_BACKEND``, else the first installed of `BACKENDS`.

    Raises
    ------
    UsageError
        Where it is none of `BACKENDS`, or is not installed.
    """
    if "keras" in sys.modules:
        return str(sys.modules["keras"].config.backend())
    installed = [name for name in BACKENDS if importlib.util.find_spec(name)]
    name = os.environ.get("KERAS_BACKEND") or next(iter(installed), "")
    if name not in installed:
        extra = "" if name == "tensorflow" else f"[{name}]"
        raise UsageError(
            f"KERAS_BACKEND is {name!r}, installed are: {', '.join(installed) or 'none'}; "
            + (f"pip install 'pneumoscope{extra}' or choose another." if name in BACKENDS else "choose one of them.")
        )
    return name


def prepare(*, threads: int = 0, deterministic: bool = True) -> str:
    """Start the backend quietly, with a number of threads and deterministic kernels.

    Parameters
    ----------
    threads : int
        CPU threads; 0 takes every core this process may use.
    deterministic : bool
        Ask the backend for kernels that give the same bits each time (on the same machine and thread count).

    Returns
    -------
    str
        The backend's name.

    Raises
    ------
    UsageError
        As `chosen`; or where the backend has already started with another number of threads.
    """
    name = chosen()
    os.environ["KERAS_BACKEND"] = name
    count = threads or available_cores()
    with _quiet():
        {"tensorflow": _prepare_tensorflow, "jax": _prepare_jax, "torch": _prepare_torch}[name](count, deterministic)
        importlib.import_module("keras")
    return name


def __getattr__(attribute: str) -> Any:
    if attribute != "keras":
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    os.environ["KERAS_BACKEND"] = chosen()
    with _quiet():
        return importlib.import_module("keras")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what backends print while they load off the screen; an error while loading is still raised.

    TensorFlow's C++ logger writes straight to file descriptor 2 before any Python setting reaches it.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # third parties warn of their own futures
            yield
        logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns of retracing, which is ours to mend
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def available_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compiles() -> bool:
    """Whether models should be compiled by XLA: always under JAX, else only on a GPU.

    On a CPU, XLA makes TensorFlow's convolutions about eight times slower (docs/log.md).
    """
    name = chosen()
    return name == "jax" or (name == "tensorflow" and describe().devices != ("CPU",))


def describe() -> Machine:
    """Return the backend, its versions and its devices (starts it where it has not been)."""
    loaded = __getattr__("keras")
    name = str(loaded.config.backend())
    module = importlib.import_module(name)
    versions = {"python": sys.version.split()[0], "keras": str(loaded.__version__), name: str(module.__version__)}
    devices, threads = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[name](module)
    return Machine(name, versions, devices or ("CPU",), threads or available_cores())


def _prepare_tensorflow(threads: int, deterministic: bool) -> None:
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(min(threads, 2))
    except RuntimeError as error:  # already started: fine where it started with the same number
        running = tf.config.threading.get_intra_op_parallelism_threads() or available_cores()
        if running != threads:
            raise UsageError(
                f"TensorFlow already runs with {running} threads, {threads} were asked for; start a new Python process."
            ) from error
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def _prepare_jax(threads: int, deterministic: bool) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic and "xla_gpu_deterministic_ops" not in flags and importlib.util.find_spec("jax_cuda12_plugin"):
        flags += " --xla_gpu_deterministic_ops=true"
    if threads < available_cores() and "intra_op_parallelism_threads" not in flags:
        flags += f" --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads={threads}"
    os.environ["XLA_FLAGS"] = flags.strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax  # noqa: F401


def _prepare_torch(threads: int, deterministic: bool) -> None:
    import torch

    torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def _tensorflow(tf: Any) -> tuple[tuple[str, ...], int]:
    gpus = tf.config.list_physical_devices("GPU")
    names = tuple(f"GPU: {tf.config.experimental.get_device_details(gpu).get('device_name', gpu.name)}" for gpu in gpus)
    return names, int(tf.config.threading.get_intra_op_parallelism_threads())


def _jax(jax: Any) -> tuple[tuple[str, ...], int]:
    return tuple(f"GPU: {device.device_kind}" for device in jax.devices() if device.platform != "cpu"), 0


def _torch(torch: Any) -> tuple[tuple[str, ...], int]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(f"GPU: {torch.cuda.get_device_name(index)}" for index in range(count)), int(torch.get_num_threads())
