"""What this machine can do, and what a run would lack on it: said before anything is begun or queued.

Owns the checks and their sentences. Touches no network and writes nothing that stays. `look` starts the backend;
`require` does not, so that submitting a job takes a moment, and a login node needs no backend at all.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from packaging.requirements import Requirement

from pneumoscope import _backend, _files, _sources, backbones, jobs
from pneumoscope.errors import DataError, ImageError, PneumoscopeError, UsageError, WeightsError
from pneumoscope.specs import PRETRAINED, Spec

State = Literal["ok", "warn", "missing"]
Executor = Literal["inline", "local", "slurm"]

_ANSWER_S: Final = 10
_LEAST_MEMORY: Final = 2_000_000_000  # default took 0.4 GB on 5,000 images (docs/log.md), larger backbones take more
_TRIED: Final = 5
"""Images of a data set that are opened, far apart in its list."""

_SHARED: Final = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs", "pvfs2"}
    | {"smb3", "virtiofs", "wekafs"}
)
"""File systems that several machines see; FUSE brings more of them."""

_MOUNTS: Final = Path("/proc/self/mountinfo")
_OF_ONE_MACHINE: Final = frozenset({"devtmpfs", "overlay", "ramfs", "tmpfs"})

_CUTS: Final = {  # from so many trainable layers on: the picture is divided by this, and has so many channels
    "efficientnet_lite0": (
        *((1, 32, 1280), (3, 32, 320), (5, 32, 1152), (11, 32, 192), (40, 16, 672), (66, 16, 480), (92, 8, 240)),
        *((109, 4, 144), (126, 2, 96)),
    ),
    "resnet152v2": ((1, 32, 2048), (38, 16, 1024), (436, 8, 512), (526, 4, 256)),
    "resnet50v2": ((1, 32, 2048), (38, 16, 1024), (106, 8, 512), (152, 4, 256)),
    "densenet121": ((1, 32, 1024), (116, 16, 1024), (288, 8, 512), (376, 4, 256), (424, 2, 64)),
    "mobilenetv2": (
        *((1, 32, 1280), (3, 32, 320), (5, 32, 960), (11, 32, 160), (31, 16, 576), (58, 16, 384), (93, 8, 192)),
        *((120, 4, 144), (138, 2, 96)),
    ),
    "efficientnetv2b0": ((1, 32, 1280), (3, 32, 192), (110, 16, 672), (234, 8, 192), (246, 4, 64), (264, 2, 32)),
}
"""About what the frozen part of a backbone hands over; a test holds it against the networks themselves."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
        A word or two, such as ``Weights``.
    state : {"ok", "warn", "missing"}
        ``missing`` would stop a run; ``warn`` may slow it or spoil it.
    sentence : str
        What was found, without the full stop.
    remedy : str
        What to do about it, empty where nothing is to be done.
    """

    name: str
    state: State
    sentence: str
    remedy: str = ""

    @property
    def text(self) -> str:
        """The sentence with its remedy and a full stop."""
        return f"{self.sentence}; {self.remedy}." if self.remedy else f"{self.sentence}."


@dataclass(frozen=True)
class Report:
    """Everything that was looked at.

    Attributes
    ----------
    checks : tuple of Check
        In the order in which they are shown.
    """

    checks: tuple[Check, ...]

    def of(self, name: str) -> Check:
        """Return the check of a name; KeyError where it was not made."""
        return {check.name: check for check in self.checks}[name]


def look(
    spec: Spec | None = None, data: Path | None = None, *, executor: Executor = "inline", folder: Path | None = None
) -> Report:
    """Look at this machine, and at what a run would need of it. Starts the backend.

    Parameters
    ----------
    spec : Spec, optional
        The run; the preset ``default`` where not given.
    data : Path, optional
        Its images, as `Catalog.scan` takes them; they are listed, a few are opened.
    executor : {"inline", "local", "slurm"}
        Where it would run.
    folder : Path, optional
        Its run directory.

    Returns
    -------
    Report

    Raises
    ------
    SpecError
        For an unknown ``backbone.name``.
    """
    asked = spec or Spec.preset_named()
    checks = [_backend_started(asked), _packages(), *_quick(asked, data, executor=executor, folder=folder)]
    return Report(tuple(checks))


def missing(report: Report) -> tuple[Check, ...]:
    """Return what would stop the run that was looked at.

    Parameters
    ----------
    report : Report
        From `look`.

    Returns
    -------
    tuple of Check
        Empty where nothing stands in its way.
    """
    return tuple(check for check in report.checks if check.state == "missing")


def refuse(checks: tuple[Check, ...]) -> None:
    """Raise where anything is missing.

    Parameters
    ----------
    checks : tuple of Check
        From `missing`.

    Raises
    ------
    PneumoscopeError
        One sentence that names each of them and what mends it.
    """
    if len(checks) == 1:
        raise PneumoscopeError(checks[0].text)
    if checks:
        named = "; ".join(f"({at}) {check.text.rstrip('.')}" for at, check in enumerate(checks, start=1))
        raise PneumoscopeError(f"This run lacks {len(checks)} things: {named}.")


def require(spec: Spec, data: Path, *, executor: Executor = "inline", folder: Path | None = None) -> None:
    """Refuse a run that would stop on this machine; quick, and without a backend.

    Parameters
    ----------
    spec, data, executor, folder
        As `look` takes them.

    Raises
    ------
    PneumoscopeError
        One sentence that names everything that is missing and what mends each.
    UsageError
        Where ``KERAS_BACKEND`` names no backend that is installed.
    SpecError
        For an unknown ``backbone.name``.
    """
    _backend.chosen()
    refuse(missing(Report(tuple(_quick(spec, data, executor=executor, folder=folder)))))


def _quick(spec: Spec, data: Path | None, *, executor: Executor, folder: Path | None) -> Iterator[Check]:
    """Make every check that needs no backend; the cache comes last."""
    yield _cores(spec, executor)
    yield _memory(spec, executor)
    yield from _devices(spec, executor)
    yield _weights(spec)
    yield _other_backbones(spec)
    yield _slurm(executor)
    places = {"The cache": _files.cache_dir()}
    if data is not None:
        found = _data(spec, data)
        yield found[0]
        yield _space(spec, found[1])
        places["The data set"] = data
    if folder is not None:
        places["The run directory"] = folder
    if executor == "slurm":
        yield from _shared(places)
    yield _cache()


# --- the machine -----------------------------------------------------------------------------------------------------


def _backend_started(spec: Spec) -> Check:
    try:
        _backend.prepare(threads=spec.train.threads)
        machine = _backend.describe()
    except UsageError as error:
        return _as_missing("Backend", error)
    except Exception as error:  # a broken installation may raise anything, and to say so is what this is for
        return Check("Backend", "missing", f"The backend does not start ({error})", "install pneumoscope anew")
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    said = f"{machine.backend} on {', '.join(machine.devices)}, {machine.threads} threads ({versions})"
    if machine.devices == ("CPU",) and (gpus := _gpus()):
        remedy = "pip install 'pneumoscope[cuda]' and set KERAS_BACKEND=jax"
        return Check("Backend", "warn", f"{said}, which does not see the NVIDIA GPUs of this machine ({gpus})", remedy)
    return Check("Backend", "ok", said)


def _packages() -> Check:
    """Hold what is installed against what pneumoscope declares."""
    here, wrong = [f"pneumoscope {importlib.metadata.version('pneumoscope')}"], []
    for text in importlib.metadata.requires("pneumoscope") or []:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{needed.name} is not installed")
            continue
        here.append(f"{needed.name} {version}")
        if not needed.specifier.contains(version, prereleases=True):
            wrong.append(f"{needed.name} is {version}, {needed.specifier} is needed")
    if wrong:
        return Check("Packages", "missing", f"Python packages are not as needed: {', '.join(wrong)}", "install again")
    return Check("Packages", "ok", ", ".join(here))


def _cores(spec: Spec, executor: Executor) -> Check:
    have = spec.cluster.cpus if executor == "slurm" else _backend.available_cores()
    said = f"{have} for {'each job' if executor == 'slurm' else 'this process'}"
    if spec.train.threads > have:
        said += f", but train.threads is {spec.train.threads}, and threads beyond the cores wait for one another"
        return Check("Cores", "warn", said, f"set train.threads={have}, or 0 for all of them")
    return Check("Cores", "ok", said)


def _memory(spec: Spec, executor: Executor) -> Check:
    asked = spec.cluster.mem_gb * 1e9 if executor == "slurm" else 0.0
    have = asked or min(_files.free_memory(), *_memory_limits())
    said = f"{_files.size_text(have)} {'for each job' if asked else 'free'}"
    if have < _LEAST_MEMORY:
        remedy = "raise cluster.mem_gb" if asked else "end other programs, or ask for more"
        return Check("Memory", "warn", f"{said}, a run may need {_files.size_text(_LEAST_MEMORY)}", remedy)
    return Check("Memory", "ok", said)


def _memory_limits(system: Path = Path("/")) -> Iterator[int]:
    """Give what a batch system or a container allows this process; ends with a number that limits nothing."""
    for line in _text(system / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        base, name = ("cgroup/memory", "memory.limit_in_bytes") if kinds else ("cgroup", "memory.max")
        place = system / "sys/fs" / base / path.lstrip("/")
        for group in (place, *place.parents):
            text = _text(group / name)
            if text.isdecimal():
                yield int(text)
    yield 2**63


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""


def _gpus(devices: Path = Path("/dev")) -> int:
    """Count NVIDIA GPUs without loading anything: their device files, as far as CUDA is allowed to see them."""
    files = [path for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return len(files)
    return min(len(files), len([name for name in allowed.split(",") if name.strip() not in ("", "-1")]))


def _devices(spec: Spec, executor: Executor) -> Iterator[Check]:
    """Compare ``train.devices`` with what there will be; nothing is said of the one device that is always there."""
    wanted = spec.train.devices
    if wanted == 1:
        return
    try:
        backend = _backend.chosen()
    except UsageError:
        return  # the check of the backend says so
    if backend != "jax":
        said = f"train.devices is {wanted}, for which the backend must be JAX, but it is {backend}"
        yield Check("Devices", "missing", said, "set KERAS_BACKEND=jax, or train.devices=1")
        return
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    asked = spec.cluster.gpus * spec.cluster.nodes
    have = max(asked if executor == "slurm" else _gpus(), int(forced[1]) if forced else 0)
    if have >= wanted:
        yield Check("Devices", "ok", f"{have}, train.devices is {wanted}")
    elif executor == "slurm":
        said = f"train.devices is {wanted}, but jobs ask for {spec.cluster.gpus} GPUs on {spec.cluster.nodes} nodes"
        yield Check("Devices", "missing", said, f"set cluster.gpus and cluster.nodes so that they make {wanted}")
    else:
        said = f"train.devices is {wanted}, but {have} GPUs are here"
        yield Check("Devices", "missing", said, f"set train.devices={max(have, 1)}")


def _slurm(executor: Executor) -> Check:
    tools = {name: shutil.which(name) for name in ("sbatch", "srun", "squeue")}
    lacking = [name for name, path in tools.items() if path is None]
    if len(lacking) == len(tools):
        if executor == "slurm":
            said = "There is no Slurm here (sbatch, srun and squeue are not on the PATH)"
            remedy = "submit from a node of the cluster that has them, or choose --executor local"
            return Check("Slurm", "missing", said, remedy)
        return Check("Slurm", "ok", "not here")
    state: State
    if lacking:
        state = "missing" if executor == "slurm" and "sbatch" in lacking else "warn"
        return Check("Slurm", state, f"Slurm is here by half: {', '.join(lacking)} not on the PATH", "load its module")
    version, trouble = _answer("sbatch", "--version")
    if trouble:
        state = "missing" if executor == "slurm" else "warn"
        said = f"sbatch is here but does not work ({trouble})"
        return Check("Slurm", state, said, "set SLURM_CONF, or load its module")
    where = "not in a job"
    if job := jobs.inside():
        where = f"inside job {job.job_id} ({job.nodes} nodes, here {job.cpus} cores and {job.gpus} GPUs)"
    return Check("Slurm", "ok", f"{version.removeprefix('slurm ')}, {where}")


def _answer(*command: str) -> tuple[str, str]:
    """Return what a command of Slurm prints, and what went wrong, empty where nothing did."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return "", str(error)
    if done.returncode:
        return "", next(iter(done.stderr.strip().splitlines()[-1:]), f"status {done.returncode}")
    return done.stdout.strip(), ""


# --- what a run needs ------------------------------------------------------------------------------------------------


def _weights(spec: Spec) -> Check:
    """Say where the weights of the run's backbone are; a run of the cnn alone can do without."""
    name, chosen = spec.backbone.name, spec.backbone.weights
    found = backbones.weights_path(name)
    if not set(PRETRAINED) & set(spec.models):
        return Check("Weights", "ok", "the cnn needs none" + (f"; those of {name} are here" if found else ""))
    if chosen == "none":
        return Check("Weights", "ok", f"{name} begins with random ones (backbone.weights is none)")
    if chosen != "imagenet":
        found = Path(chosen).expanduser()
    if found is None or not found.is_file():
        try:
            backbones.weights_hash(spec.backbone)  # says what is wrong; there is no file that it could read
        except WeightsError as error:
            return _as_missing("Weights", error)
    assert found is not None
    size, whole = found.stat().st_size, backbones.BACKBONES[name].size_bytes
    if chosen == "imagenet" and size != whole:
        said = f"The weights file {found} of {name} has {size:,} bytes, {whole:,} were expected"
        return Check("Weights", "missing", said, f"delete it and run 'pneumoscope fetch weights {name}' with a network")
    return Check("Weights", "ok", f"{name} in {found}")


def _other_backbones(spec: Spec) -> Check:
    others = [name for name in backbones.BACKBONES if name != spec.backbone.name]
    here = [name for name in others if backbones.weights_path(name)]
    away = [name for name in others if name not in here]
    said = f"weights of {', '.join(here) or 'none'} are here"
    if not away:
        return Check("Other backbones", "ok", said)
    said += f", of {', '.join(away)} not"
    return Check("Other backbones", "ok", said, "'pneumoscope fetch weights NAME' gets them")


def _data(spec: Spec, data: Path) -> tuple[Check, list[_sources.Row]]:
    """List a data set and open a few of its images."""
    reader = _sources.Reader()
    try:
        found = _sources.find(data, classes=spec.data.classes, reader=reader)
    except DataError as error:
        return _as_missing("Data", error), []
    rows = [row for row in found.rows if row.status == "ok"]
    tried = rows[:: max(1, len(rows) // _TRIED)]
    bad = 0
    for row in tried:
        try:
            reader.read(found.root, row.path)
        except ImageError:
            bad += 1
    if bad == len(tried):
        said = f"None of {bad} images that were tried in {data} can be read"
        return Check("Data", "missing", said, "check their permissions"), rows
    counts = ", ".join(f"{split} {n:,}" for split, n in Counter(row.split for row in rows).items())
    said = f"{len(rows):,} images in {data} ({counts})"
    if bad:
        said += f", {bad} of {len(tried)} that were tried cannot be read"
        return Check("Data", "warn", said, "check their permissions"), rows
    return Check("Data", "ok", said), rows


def stored_bytes(spec: Spec, *, images: int, test: int = 0) -> int:
    """Estimate what a run keeps in the cache: packed images, and what the frozen layers make of them.

    Parameters
    ----------
    spec : Spec
        Image size, backbone, models, ``features``, ``train.teachers`` and ``cluster.shards``.
    images : int
        How many there are, test images too.
    test : int
        How many of them are test images: training stores nothing of those.

    Returns
    -------
    int
        Bytes; right within a factor of two for the presets, too much rather than too little where many layers train.
    """
    steps, size, known = _CUTS[spec.backbone.name], spec.image.size_px, images - test
    pooled = steps[0][2]
    values = images * pooled  # tl learns from them, and every run compares test with training images by them
    if spec.features.cache:
        views = spec.features.views * (1 + spec.train.teachers)  # each network has its own
        copies = (1 + views) * (2 if spec.cluster.shards > 1 else 1)  # parts, then the whole of them
        if "tl" in spec.models:
            values += known * pooled * (copies - 1)
        for layers in {getattr(spec, name).trainable_layers for name in ("ft", "best") if name in spec.models}:
            _, divisor, channels = max(step for step in steps if step[0] <= layers)
            values += known * copies * (-(-size // divisor)) ** 2 * channels
    return images * size**2 + values * (2 if spec.features.dtype == "float16" else 4)


def _space(spec: Spec, rows: list[_sources.Row]) -> Check:
    """Compare the estimate with the disk; what the cache holds already may be just what this run needs."""
    root = _files.cache_dir()
    needed = stored_bytes(spec, images=len(rows), test=sum(row.split == "test" for row in rows))
    free = shutil.disk_usage(_existing(root)).free
    stored = 0
    if needed > free:
        stored = sum(_files.size_of(entry) for kind in ("images-*", "features-*") for entry in root.glob(kind))
    said = f"about {_files.size_text(needed)} will be stored in {root} for {len(rows):,} images"
    if needed > free + stored:
        said = f"About {said[6:]}, but only {_files.size_text(free)} is free"
        remedy = "run 'pneumoscope cache --clean', set PNEUMOSCOPE_CACHE to a larger disk, or features.cache=false"
        return Check("Space", "missing", said, remedy)
    return Check("Space", "ok", said)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _cache() -> Check:
    root = _files.cache_dir()
    existing = _existing(root)
    free = _files.size_text(shutil.disk_usage(existing).free)
    try:
        with tempfile.TemporaryFile(dir=existing):  # permissions alone do not tell of read-only disks
            return Check("Cache", "ok", f"{root}, {free} free, writable")
    except OSError as error:
        said = f"The cache {root} cannot be written ({error.strerror})"
        return Check("Cache", "missing", said, "set PNEUMOSCOPE_CACHE to a folder you may write to")


def _shared(places: dict[str, Path], mounts: Path = _MOUNTS) -> Iterator[Check]:
    """Ask of each folder whether other nodes see it, where the cluster has other nodes."""
    nodes = set(_answer("sinfo", "--noheader", "--format=%n")[0].split())
    name = socket.gethostname()
    if not nodes - {name, name.partition(".")[0], "localhost"}:
        return
    for what, path in places.items():
        kind, place = _file_system(path, mounts), path.absolute()
        scratch = any(place.is_relative_to(folder) for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp"))
        if kind in _SHARED or kind.startswith("fuse"):
            continue
        remedy = "set PNEUMOSCOPE_CACHE to one" if what == "The cache" else "choose another"
        if kind in _OF_ONE_MACHINE or scratch:
            said = f"{what} {path} is on a disk of this machine only, and jobs run on others"
            yield Check("Shared", "missing", said, f"{remedy} on a disk that all nodes see")
        else:
            said = f"{what} {path} is on {kind or 'an unknown file system'}, which other nodes may not see"
            yield Check("Shared", "warn", said, f"if they do not, {remedy} on a disk that all nodes see")


def _file_system(path: Path, mounts: Path = _MOUNTS) -> str:
    """Return the kind of file system that a path is on, empty where the system does not say."""
    place, best = _existing(path.absolute()).resolve(), ("", "")
    for line in _text(mounts).splitlines():
        before, _, after = line.partition(" - ")
        mount = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4])  # a blank stands as \040
        if place.is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, after.split()[0])
    return best[1]


def _as_missing(name: str, error: PneumoscopeError) -> Check:
    said, _, remedy = str(error).rstrip(".").rpartition("; ")
    return Check(name, "missing", said or remedy, remedy if said else "")
