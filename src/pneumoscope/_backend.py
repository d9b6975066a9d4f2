"""The only module that names TensorFlow, JAX or torch: a quiet start, threads, determinism, devices, what is there.

Whoever needs Keras says ``from pneumoscope._backend import keras``: that loads it once, with the chosen backend, and
keeps the loading quiet. `prepare` sets threads and determinism and must come before the first computation;
`distribute` lets several devices, of one process or of several, train one model, and must come before it is built.
Knows nothing of models or data.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pneumoscope.errors import RunError, UsageError

BACKENDS: tuple[str, ...] = ("tensorflow", "jax", "torch")

_OUT_OF_MEMORY = {"MemoryError", "ResourceExhaustedError", "OutOfMemoryError"}  # Python's, TensorFlow's, torch's
_OUT_OF_MEMORY_TEXTS = (  # in errors of every kind
    "RESOURCE_EXHAUSTED",  # JAX
    "DefaultCPUAllocator",  # torch without a GPU
    "Dst tensor is not initialized",  # TensorFlow, copying to a GPU
)
_ADDRESS = "KERAS_DISTRIBUTION_JOB_ADDRESSES"
_PROCESS_VARIABLES = (
    ("KERAS_DISTRIBUTION_PROCESS_ID", "KERAS_DISTRIBUTION_NUM_PROCESSES"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)

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
    cpu : str
        The processor's name as the system gives it; empty where it gives none.
    cores : int
        CPU cores that this process may use.
    memory_bytes : int or None
        Memory of the whole machine, of which a job may be allowed less; None where the system does not say.
    """

    backend: str
    versions: dict[str, str]
    devices: tuple[str, ...]
    threads: int
    cpu: str
    cores: int
    memory_bytes: int | None

    @property
    def gpus(self) -> tuple[str, ...]:
        """The names of the GPUs among `devices`."""
        return tuple(name.removeprefix("GPU: ") for name in self.devices if name.startswith("GPU: "))


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


def process(devices: int) -> tuple[int, int]:
    """Tell which of the processes that train one model together this one is; starts nothing.

    Parameters
    ----------
    devices : int
        ``train.devices``; with 1, processes have nothing to do with one another, however they were started.

    Returns
    -------
    index, count : int
        ``$KERAS_DISTRIBUTION_PROCESS_ID`` and ``$KERAS_DISTRIBUTION_NUM_PROCESSES``; else the task's number and the
        number of tasks where Slurm's ``srun`` started this process; else 0 and 1. The one with index 0 writes files.

    Raises
    ------
    UsageError
        Where the two numbers make no sense.
    """
    if devices == 1:
        return 0, 1
    for index, count in _PROCESS_VARIABLES:
        given = os.environ.get(index, ""), os.environ.get(count, "")
        if given[1]:
            if not (all(text.isdecimal() for text in given) and int(given[0]) < int(given[1])):
                raise UsageError(
                    f"{index} is {given[0]!r}, {count} is {given[1]!r}; set both, the first from 0 to below the other."
                )
            return int(given[0]), int(given[1])
    return 0, 1


def distribute(devices: int, *, batch_size: int) -> None:
    """Let several devices train one model, each on a part of every batch; before the model is built.

    What they compute together is what one device computes alone, but for the last digits: gradients and the
    statistics of BatchNormalization are those of the whole batch. A batch that they cannot share evenly, the last of an
    epoch, is computed by each of them. With several processes (`process`), one on each node that uses all its devices,
    every process does the same work in the same order and holds every batch.

    Parameters
    ----------
    devices : int
        How many, over all processes.
    batch_size : int
        Examples in a step, over all devices.

    Raises
    ------
    UsageError
        Where the backend is not JAX, the devices cannot share a batch or the processes the devices evenly, there are
        too few devices, or the processes cannot find one another.
    """
    loaded = __getattr__("keras")
    if devices == 1:
        loaded.distribution.set_distribution(None)
        return
    index, count = process(devices)
    each = devices // count
    if devices % count:
        raise UsageError(
            f"train.devices is {devices}, which {count} processes cannot share; use a multiple of {count}."
        )
    if batch_size % devices:
        raise UsageError(
            f"train.batch_size is {batch_size}, which {devices} devices cannot share; use a multiple of {devices}."
        )
    if chosen() != "jax":
        raise UsageError(
            f"train.devices is {devices}, the backend {chosen()} trains on one device only; set KERAS_BACKEND=jax "
            "(pip install 'pneumoscope[jax]', for GPUs 'pneumoscope[cuda]') or train.devices=1."
        )
    if count > 1:
        _join(index, count, each)
    loaded.distribution.set_distribution(_shared(_jax_devices(each, count)))
    with _muted(1):  # processes on CPUs greet one another on the standard output
        agree(0)


def split(network: Any) -> None:
    """Let the devices share each of a network's training and prediction steps; nothing to do with one device.

    Every process gives the whole batch and gets the whole of what comes out.

    Parameters
    ----------
    network : keras.Model
        Built after `distribute`, not trained and not asked for predictions yet.
    """
    shared = __getattr__("keras").distribution.distribution()
    if shared is None or "train_step" in vars(network):
        return
    import jax

    train, predict = network.train_step, network.predict_step

    def part(value: Any) -> Any:  # in a step, hence while JAX traces it: it is the compiler that divides the work
        return value if value.shape[0] % shared.num_model_replicas else _laid_out(value, shared, shared.batch_dim_name)

    def train_step(state: Sequence[Any], data: Any) -> Any:
        *kept, sums = state
        return train((*kept, jax.tree.map(jax.numpy.zeros_like, sums)), jax.tree.map(part, data))

    def predict_step(state: Sequence[Any], data: Any) -> Any:
        outputs, state = predict(state, jax.tree.map(part, data))
        return jax.tree.map(lambda value: _laid_out(value, shared), outputs), state

    network.train_step, network.predict_step = train_step, predict_step
    network.reset_metrics = lambda: None  # in the step: from outside, processes compare notes for every single sum


def assign(variable: Any, value: Any) -> None:
    """Give a variable a value that every process has; Keras's own way makes the processes compare it first.

    Parameters
    ----------
    variable : keras.Variable
        Of a network or an optimizer.
    value : ndarray
        Of its shape.
    """
    if __getattr__("keras").distribution.distribution() is not None:
        import jax
        import numpy as np

        whole = np.asarray(value, dtype=variable.dtype)
        value = jax.make_array_from_callback(whole.shape, variable.value.sharding, lambda index: whole[index])
    variable.assign(value)


def agree(value: int, *, of: Callable[[Sequence[int]], int] = max) -> int:
    """Return one number for all processes that train one model together.

    Every one of them must call it, in the same order; otherwise they wait for one another.

    Parameters
    ----------
    value : int
        This process's.
    of : callable
        Chooses one of what the processes gave, for example `max`.

    Returns
    -------
    int
        `value` where this process works alone.
    """
    shared = __getattr__("keras").distribution.distribution()
    if shared is None or shared.num_processes == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return int(of(multihost_utils.process_allgather(np.asarray(value)).tolist()))


@contextmanager
def in_turn() -> Iterator[None]:
    """Let the first process do something before the others that train one model with it."""
    shared = __getattr__("keras").distribution.distribution()
    first = shared is None or not shared.data_shard_id
    if not first:
        agree(0)
    try:
        yield
    finally:
        if first:
            agree(0)


def seed(number: int) -> None:
    """Set where Python's, NumPy's and Keras's random numbers begin.

    Parameters
    ----------
    number : int
        0 or more.
    """
    loaded = __getattr__("keras")
    with _quiet():  # Keras seeds TensorFlow too where it is installed, and so loads it
        loaded.utils.set_random_seed(number)


def __getattr__(attribute: str) -> Any:
    if attribute != "keras":
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    os.environ["KERAS_BACKEND"] = chosen()
    with _quiet():
        return importlib.import_module("keras")


@contextmanager
def memory_told(work: str, *, change: str) -> Iterator[None]:
    """Turn each library's own error for too little memory into a sentence, so that one approach ends and not the run.

    Parameters
    ----------
    work : str
        What is done inside, for the sentence: there is not enough memory *to do it*.
    change : str
        The settings that it needs less with when they are smaller.

    Raises
    ------
    RunError
        Where the memory of the machine or of its accelerator is not enough.
    """
    try:
        yield
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if not kinds & _OUT_OF_MEMORY and not any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS):
            raise
        raise RunError(
            f"There is not enough memory to {work}; choose a smaller {change} in a new folder, or a machine with more "
            "memory."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what backends print while they load off the screen; an error while loading is still raised.

    TensorFlow's C++ logger writes straight to file descriptor 2 before any Python setting reaches it.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    with _muted(2), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third parties warn of their own futures
        yield
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns of retracing, which is ours to mend


@contextmanager
def _muted(descriptor: int) -> Iterator[None]:
    """Send what is written to a file descriptor nowhere."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
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


def lite(model: Any, path: Any) -> Callable[[Any], float]:
    """Write a Keras model as TensorFlow Lite, by Keras's own exporter, and return what scores one image with it.

    Parameters
    ----------
    model : keras.Model
        With the input (B, H, W, 1) and the output (B, 1).
    path : Path
        Of the file.

    Returns
    -------
    callable
        Takes uint8 of shape (H, W), returns the output.

    Raises
    ------
    UsageError
        On another backend than TensorFlow.
    """
    if chosen() != "tensorflow":
        raise UsageError(f"TensorFlow Lite is written by TensorFlow; the backend is {chosen()}: unset KERAS_BACKEND.")
    with _quiet(), _muted(1), _muted(2), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf

        model.export(path, format="litert")
        interpreter = tf.lite.Interpreter(str(path))  # deprecated; the package that follows it is one more to install
        interpreter.allocate_tensors()
    taken, given = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def score(image: Any) -> float:
        interpreter.set_tensor(taken["index"], image[None, ..., None].astype(taken["dtype"]))
        interpreter.invoke()
        return float(interpreter.get_tensor(given["index"])[0, 0])

    return score


def describe() -> Machine:
    """Return the backend, its versions, its devices and the machine (starts the backend where it has not been)."""
    loaded = __getattr__("keras")
    name = str(loaded.config.backend())
    module = importlib.import_module(name)
    versions = {"python": sys.version.split()[0], "keras": str(loaded.__version__), name: str(module.__version__)}
    devices, threads = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[name](module)
    cores = available_cores()
    return Machine(name, versions, devices or ("CPU",), threads or cores, _processor(), cores, _memory_bytes())


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name; Python's own answer is often empty on Linux."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return " ".join((next(found, "") or platform.processor() or platform.machine()).split())


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


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


def _join(index: int, count: int, each: int) -> None:
    """Let this process find the others; the program ends here where they do not come."""
    import jax

    if jax.distributed.is_initialized():
        return
    loaded = __getattr__("keras")
    slurm, address = "SLURM_STEP_NODELIST" in os.environ, os.environ.get(_ADDRESS, "").partition(",")[0]
    if ":" not in address and not (slurm and not address):
        raise UsageError(
            f"{count} processes train one model, {_ADDRESS} is {address!r}; set it to HOST:PORT of the first of them."
        )
    if slurm:  # else JAX would take one device for each of Slurm's tasks
        first = each * int(os.environ["SLURM_LOCALID"])
        os.environ.setdefault("JAX_LOCAL_DEVICE_IDS", ",".join(map(str, range(first, first + each))))
    seed(0)  # else Keras lets the processes agree on one, on their CPUs
    try:
        loaded.distribution.initialize(address or None, num_processes=count, process_id=index)
    except RuntimeError as error:
        raise UsageError(
            f"JAX has started already, {count} processes cannot join now; start a new Python process."
        ) from error


def _jax_devices(each: int, count: int) -> list[Any]:
    import jax

    with _quiet():
        found = jax.devices()
    chosen = [[device for device in found if device.process_index == index][:each] for index in range(count)]
    fewest = min(map(len, chosen))
    if fewest < each:
        where = f" in one of {count} processes" if count > 1 else ""
        raise UsageError(
            f"train.devices is {each * count}, JAX finds {fewest} ({found[0].platform.upper()}){where}; set "
            f"train.devices={fewest * count} or give the job more GPUs (JAX sees them with 'pneumoscope[cuda]' only)."
        )
    return [device for devices in chosen for device in devices]


def _shared(devices: Sequence[Any]) -> Any:
    """Return Keras's word for devices that hold the same weights."""
    library = __getattr__("keras").distribution
    shared = library.DataParallel(devices=devices, auto_shard_dataset=False)
    # Keras would take what each process gives for a part of the batch; it is the whole, which `split` divides
    shared.get_data_layout = lambda shape: library.TensorLayout([None] * len(shape), shared.device_mesh)
    return shared


def _laid_out(value: Any, shared: Any, *axes: str) -> Any:
    """Return an array divided along its first axes, whole along the others."""
    library = __getattr__("keras").distribution
    layout = library.TensorLayout([*axes, *[None] * (value.ndim - len(axes))], shared.device_mesh)
    return library.distribute_tensor(value, layout)


def _tensorflow(tf: Any) -> tuple[tuple[str, ...], int]:
    gpus = tf.config.list_physical_devices("GPU")
    names = tuple(f"GPU: {tf.config.experimental.get_device_details(gpu).get('device_name', gpu.name)}" for gpu in gpus)
    return names, int(tf.config.threading.get_intra_op_parallelism_threads())


def _jax(jax: Any) -> tuple[tuple[str, ...], int]:
    return tuple(f"GPU: {device.device_kind}" for device in jax.devices() if device.platform != "cpu"), 0


def _torch(torch: Any) -> tuple[tuple[str, ...], int]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(f"GPU: {torch.cuda.get_device_name(index)}" for index in range(count)), int(torch.get_num_threads())
