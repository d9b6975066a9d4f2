"""What a machine can do and what a run would lack on it; and that a run on a node tries no network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pneumoscope import _files, backbones, doctor, models
from pneumoscope.doctor import Check, Report
from pneumoscope.errors import PneumoscopeError, SpecError
from pneumoscope.specs import PRESETS, Spec

NAMES = ("Backend", "Packages", "Cores", "Memory", "Weights", "Other backbones", "Slurm", "Data", "Space", "Cache")


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hide Slurm, weights and devices of the machine that runs the tests; return the only folder on the PATH."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "KERAS", "XLA", "CUDA"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    return tools


@pytest.fixture
def tool(bare: Path) -> Callable[[str, str], None]:
    """Put a command on the PATH that does what some lines of shell say."""

    def put(name: str, lines: str) -> None:
        (bare / name).write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
        (bare / name).chmod(0o755)

    return put


@pytest.fixture
def slurm(tool: Callable[[str, str], None]) -> Callable[[str, str], None]:
    """A cluster of this machine alone; more can be put on top."""
    tool("sbatch", "echo slurm 23.11.4")
    tool("srun", "")
    tool("squeue", "")
    tool("sinfo", "echo localhost")
    return tool


def smoke(*settings: str) -> Spec:
    return Spec.preset_named("smoke").with_overrides(settings)


def lacking(spec: Spec, data: Path, **options: object) -> str:
    """Return the one sentence with which a run is refused."""
    with pytest.raises(PneumoscopeError) as caught:
        doctor.require(spec, data, **options)  # type: ignore[arg-type]
    assert caught.value.exit_status == 1
    text = str(caught.value)
    assert re.fullmatch(r"[^\n]*[^.\n]\.", text), text
    return text


def found(name: str, spec: Spec, data: Path | None = None, **options: object) -> Check:
    """Return one of the checks that need no backend."""
    settings: dict[str, object] = {"executor": "inline", "folder": None} | options
    return Report(tuple(doctor._quick(spec, data, **settings))).of(name)  # type: ignore[arg-type]


# --- the report ------------------------------------------------------------------------------------------------------


def test_everything_is_looked_at_and_here(tiny_set: Path, own_cache: Path) -> None:
    report = doctor.look(smoke(), tiny_set)
    assert [check.name for check in report.checks] == list(NAMES)
    assert {check.state for check in report.checks} == {"ok"}
    assert doctor.missing(report) == ()
    backend = r"(tensorflow|jax|torch) on .+, \d+ threads \(python 3\.\d+\.\d+, keras 3\.[\w.]+, \w+ [\w.+]+\)"
    assert re.fullmatch(backend, report.of("Backend").sentence)
    packages = report.of("Packages").sentence
    assert re.match(r"pneumoscope \d+\.\d+\.\d+, ", packages)
    assert f"numpy {np.__version__}" in packages
    assert report.of("Weights").sentence == f"efficientnet_lite0 in {backbones.weights_path('efficientnet_lite0')}"
    assert report.of("Other backbones").text.startswith("weights of none are here, of resnet152v2, resnet50v2, ")
    assert report.of("Slurm").text == "not here."
    assert report.of("Data").text == f"64 images in {tiny_set} (test 16, train 48)."
    assert re.fullmatch(rf"{re.escape(str(own_cache))}, \d+\.\d [GT]B free, writable\.", report.of("Cache").text)
    assert not own_cache.exists(), "looking leaves nothing behind"


def test_without_a_run_the_default_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "abacus")
    report = doctor.look()
    assert [check.name for check in report.checks] == [name for name in NAMES if name not in ("Data", "Space")]
    if "keras" not in sys.modules:  # else the backend has been chosen long ago
        assert report.of("Backend").state == "missing"


def test_a_backend_that_is_none_is_a_wrong_call(tmp_path: Path) -> None:
    program = "from pneumoscope import doctor; from pneumoscope.specs import Spec; "
    environment = os.environ | {"KERAS_BACKEND": "abacus"}
    call = f"doctor.require(Spec(), __import__('pathlib').Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program + call], env=environment, capture_output=True, text=True, check=False
    )
    assert "UsageError: KERAS_BACKEND is 'abacus', installed are: " in done.stderr.splitlines()[-1]
    looked = "print(doctor.look().of('Backend').text)"
    done = subprocess.run(
        [sys.executable, "-c", program + looked], env=environment, capture_output=True, text=True, check=False
    )
    assert re.fullmatch(r"KERAS_BACKEND is 'abacus', installed are: [^;]+; choose one of them\.\n", done.stdout), done


def test_nothing_is_said_where_nothing_is_missing(tiny_set: Path) -> None:
    doctor.require(smoke(), tiny_set)
    doctor.require(smoke(), tiny_set, executor="local", folder=tiny_set)
    doctor.require(smoke("train.threads=1000"), tiny_set)  # a warning stops nobody


def test_asking_starts_no_backend_and_loads_no_keras(tiny_set: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pneumoscope import doctor; from pneumoscope.specs import Spec; "
        "doctor.require(Spec.preset_named('smoke'), Path(sys.argv[1])); "
        "print([name for name in ('keras', 'tensorflow', 'jax', 'torch', 'submitit') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, tiny_set], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_one_sentence_names_everything_that_is_missing(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PNEUMOSCOPE_CACHE", str(tmp_path / "file" / "cache"))
    text = lacking(smoke("backbone.name=resnet152v2"), tmp_path / "typo", executor="slurm")
    assert re.fullmatch(
        r"This run lacks 4 things: "
        r"\(1\) The ImageNet weights of resnet152v2 are not here, or not whole \(looked for [^;]+\); run 'pneumoscope "
        r"fetch weights resnet152v2' on a machine with network access, such as a cluster's login node, or set "
        r"backbone.name to efficientnet_lite0, which needs no download; "
        r"\(2\) There is no Slurm here \(sbatch, srun and squeue are not on the PATH\); submit from a node of the "
        r"cluster that has them, or choose --executor local; "
        rf"\(3\) There is no file or folder '{tmp_path}/typo'; check the path; "
        rf"\(4\) The cache {tmp_path}/file/cache cannot be written \(Not a directory\); set PNEUMOSCOPE_CACHE to a "
        r"folder you may write to\.",
        text,
    ), text


def test_a_check_is_found_by_its_name() -> None:
    report = Report((Check("Cores", "ok", "2"), Check("Data", "warn", "few", "add some")))
    assert report.of("Data").text == "few; add some."
    assert report.of("Cores").text == "2."
    with pytest.raises(KeyError):
        report.of("Luck")


def test_an_error_that_names_no_next_step_is_told_whole() -> None:
    assert doctor._as_missing("Data", PneumoscopeError("Nothing is left.")).text == "Nothing is left."
    assert doctor._as_missing("Data", PneumoscopeError("A; b; do c.")) == Check("Data", "missing", "A; b", "do c")


# --- weights ---------------------------------------------------------------------------------------------------------


def test_missing_weights_are_told_as_a_run_tells_them(tiny_set: Path) -> None:
    spec = smoke("backbone.name=densenet121")
    text = lacking(spec, tiny_set)
    with pytest.raises(PneumoscopeError) as caught:
        backbones.weights_hash(spec.backbone)
    assert text == str(caught.value)
    assert "run 'pneumoscope fetch weights densenet121' on a machine with network access" in text


def test_half_a_weights_file_is_told(tiny_set: Path, own_cache: Path) -> None:
    half = own_cache / "weights" / backbones.BACKBONES["densenet121"].file_name
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    assert lacking(smoke("backbone.name=densenet121"), tiny_set) == (
        f"The weights file {half} of densenet121 has 4 bytes, 29,084,464 were expected; delete it and run "
        "'pneumoscope fetch weights densenet121' with a network."
    )


def test_a_weights_file_that_is_not_there_is_told(tiny_set: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.weights.h5"
    spec = smoke(f"backbone.weights={path}")
    assert lacking(spec, tiny_set) == (
        f"backbone.weights is {path}, which is not a file; give imagenet, none, or the path of a weights file."
    )
    path.write_bytes(b"whatever: only the run opens it")
    assert found("Weights", spec).text == f"efficientnet_lite0 in {path}."


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("backbone.weights=none", "densenet121 begins with random ones (backbone.weights is none)."),
        ('models=["cnn"]', "the cnn needs none."),
    ],
)
def test_weights_that_no_model_needs_are_not_missing(setting: str, text: str) -> None:
    check = found("Weights", smoke("backbone.name=densenet121", setting))
    assert (check.state, check.text) == ("ok", text)


def test_an_unknown_backbone_is_a_wrong_call(tiny_set: Path) -> None:
    with pytest.raises(SpecError, match=r"There is no backbone 'vgg16'; set backbone\.name to one of "):
        doctor.require(smoke("backbone.name=vgg16"), tiny_set)


# --- data and space --------------------------------------------------------------------------------------------------


def test_data_of_which_nothing_can_be_read_are_told(tmp_path: Path) -> None:
    lines = ["path,label", *(f"{number}.png,NORMAL" for number in range(23))]
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    assert lacking(smoke(), tmp_path / "list.csv") == (
        f"None of 6 images that were tried in {tmp_path}/list.csv can be read; check their permissions."
    )


def test_data_of_which_some_cannot_be_read_are_only_warned_of(tmp_path: Path) -> None:
    lines = ["path,label", *(f"{number}.png,NORMAL" for number in range(5))]
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "3.png").write_bytes(b"only the run decodes it")
    check = found("Data", smoke(), tmp_path / "list.csv")
    assert (check.state, check.text) == (
        "warn",
        f"5 images in {tmp_path}/list.csv (train 5), 4 of 5 that were tried cannot be read; check their permissions.",
    )


def array_file(path: Path, n: int) -> Path:
    """A MedMNIST file of n images that takes no room."""
    pixels, labels = np.zeros((n, 2, 2), np.uint8), np.arange(n, dtype=np.uint8)[:, None] % 2
    parts = {f"{split}_{kind}": part for split in ("train", "val", "test") for kind, part in
             (("images", pixels), ("labels", labels))}  # fmt: skip
    np.savez_compressed(path, **parts)  # type: ignore[arg-type]
    return path


def test_too_small_a_disk_is_told_before_anything_is_computed(tmp_path: Path, own_cache: Path) -> None:
    huge = ("image.size_px=1024", "features.views=64", "features.dtype=float32", "ft.trainable_layers=139")
    data = array_file(tmp_path / "many.npz", 20_000)
    text = lacking(smoke(*huge), data)
    assert re.fullmatch(
        rf"About 261\.8 TB will be stored in {re.escape(str(own_cache))} for 60,000 images, but only \S+ [GT]B is "
        r"free; run 'pneumoscope cache --clean', set PNEUMOSCOPE_CACHE to a larger disk, or features\.cache=false\.",
        text,
    ), text
    doctor.require(smoke(*huge, "features.cache=false"), array_file(tmp_path / "few.npz", 20))
    assert not own_cache.exists()


def test_what_the_cache_holds_already_is_not_asked_for_again(tmp_path: Path, own_cache: Path) -> None:
    spec = smoke("image.size_px=1024", "features.views=64", "ft.trainable_layers=139")
    data = array_file(tmp_path / "many.npz", 2_000)
    assert found("Space", spec, data).state == "missing"
    stored = own_cache / "features-0123456789abcdef" / "features.npy"
    stored.parent.mkdir(parents=True)
    with stored.open("wb") as file:
        file.truncate(15 * 10**12)  # a hole: it takes no room
    assert found("Space", spec, data).state == "ok"


def handed_over(model: models.Model) -> int:
    """How many values the frozen part of a model hands over for each image; 0 where there is no such part."""
    cut = models.cut(model)
    return int(np.prod(model.get_layer(cut).output.shape[1:])) if cut else 0


def true_bytes(spec: Spec, *, images: int, test: int) -> int:
    """What a run stores by the networks themselves: each array once, whoever asks for it."""
    pooled, known = handed_over(models.build("tl", spec)), images - test
    values = images * pooled
    if spec.features.cache:
        copies = {"tl": spec.features.views, "ft": 1 + spec.features.views}
        values += sum(known * n * handed_over(models.build(name, spec)) for name, n in copies.items()
                      if name in spec.models)  # fmt: skip
    return images * spec.image.size_px**2 + values * np.dtype(spec.features.dtype).itemsize


@pytest.mark.parametrize(
    "settings",
    [
        ("image.size_px=224", "ft.trainable_layers=11", "features.views=3"),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(('models=["tl"]', "image.size_px=100", "features.dtype=float32"), marks=pytest.mark.slow),
        ('models=["cnn"]',),
        pytest.param(("features.cache=false",), marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_what_the_networks_hand_over(settings: tuple[str, ...]) -> None:
    spec = smoke("backbone.weights=none", *settings)
    estimate, true = doctor.stored_bytes(spec, images=1000, test=100), true_bytes(spec, images=1000, test=100)
    assert estimate == pytest.approx(true, rel=0.01)


def test_parts_of_features_are_stored_twice_for_a_while() -> None:
    one, several = (doctor.stored_bytes(smoke(f"cluster.shards={n}"), images=100, test=10) for n in (1, 4))
    assert several - one == 90 * (1280 + 2 * 2 * 320) * 2


def test_teachers_have_views_of_their_own() -> None:
    alone, taught = (
        doctor.stored_bytes(smoke("features.views=3", f"train.teachers={n}"), images=100, test=10) for n in (0, 2)
    )
    assert taught - alone == 90 * 2 * 3 * (1280 + 2 * 2 * 320) * 2


def test_every_backbone_has_an_estimate() -> None:
    assert set(doctor._CUTS) == set(backbones.BACKBONES)
    for steps in doctor._CUTS.values():
        assert steps[0][0] == 1
        assert list(steps) == sorted(steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", doctor._CUTS)
def test_the_estimate_holds_for_every_backbone(name: str) -> None:
    common = ("image.size_px=224", 'models=["ft"]', f"backbone.name={name}", "backbone.weights=none")
    model = models.build("ft", smoke(*common))
    layers = backbones.layers_of(model, name)
    starts = [step[0] for step in doctor._CUTS[name]]
    for n in sorted({*starts, *(start - 1 for start in starts[1:]), 4, 11, 13, len(layers) - 2}):
        for at, layer in enumerate(layers):
            layer.trainable = at >= len(layers) - n
        # without test images, only what ft stores grows with the images beside what is known
        sizes = [
            doctor.stored_bytes(smoke(*common, f"ft.trainable_layers={n}"), images=1, test=test) for test in (0, 1)
        ]
        estimate, true = (sizes[0] - sizes[1]) / 2, handed_over(model)
        assert 0.85 * true <= estimate, n
        if n in (4, 11, 13):  # of the presets
            assert estimate <= 2 * true, n


def test_the_presets_train_as_many_layers_as_the_slow_test_looks_at() -> None:
    assert {Spec.preset_named(name).ft.trainable_layers for name in PRESETS} <= {4, 11, 13}


# --- cores, memory, devices ------------------------------------------------------------------------------------------


def test_more_threads_than_cores_are_warned_of() -> None:
    cores = len(os.sched_getaffinity(0))
    check = found("Cores", smoke("train.threads=1000"))
    assert (check.state, check.text) == (
        "warn",
        (
            f"{cores} for this process, but train.threads is 1000, and threads beyond the cores wait for one another; "
            f"set train.threads={cores}, or 0 for all of them."
        ),
    )
    on_cluster = found("Cores", smoke("train.threads=9", "cluster.cpus=8"), executor="slurm")
    assert on_cluster.sentence.startswith("8 for each job, but train.threads is 9, ")
    assert found("Cores", smoke("train.threads=8", "cluster.cpus=8"), executor="slurm").text == "8 for each job."


def test_little_memory_is_warned_of() -> None:
    check = found("Memory", smoke("cluster.mem_gb=1"), executor="slurm")
    assert (check.state, check.text) == (
        "warn",
        "1.0 GB for each job, a run may need 2.0 GB; raise cluster.mem_gb.",
    )
    assert found("Memory", smoke("cluster.mem_gb=8"), executor="slurm").text == "8.0 GB for each job."
    assert re.fullmatch(r"\d+\.\d [GT]B free(, .*)?\.", found("Memory", smoke("cluster.mem_gb=1")).text)


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/slurm/job_7\n", {"cgroup/slurm/job_7/memory.max": "max", "cgroup/slurm/memory.max": "4096"}, [4096]),
        (
            "5:cpu,memory:/job\n4:cpu:/other\n0::/\n",
            {"cgroup/memory/job/memory.limit_in_bytes": "8192", "cgroup/memory/memory.limit_in_bytes": "9000"},
            [8192, 9000],
        ),
        ("", {}, []),
    ],
)
def test_what_a_batch_system_allows_is_read(
    groups: str, files: dict[str, str], limits: list[int], tmp_path: Path
) -> None:
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/{name}": text for name, text in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert list(doctor._memory_limits(tmp_path)) == [*limits, 2**63]


def test_gpus_are_counted_as_far_as_they_may_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert doctor._gpus(tmp_path) == 3
    for allowed, n in (("0,2", 2), ("", 0), ("-1", 0), ("0,1,2,3", 3), ("GPU-1b2c", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
        assert doctor._gpus(tmp_path) == n, allowed


DEVICES = """
import json, os, sys
from pneumoscope import doctor
from pneumoscope.specs import Spec
for executor, flags, *settings in json.loads(sys.argv[1]):
    os.environ["XLA_FLAGS"] = flags
    checks = doctor._devices(Spec.preset_named("smoke").with_overrides(settings), executor)
    print(*[f"{check.state}: {check.text}" for check in checks])
"""


def test_devices_are_compared_with_what_there_will_be() -> None:
    pytest.importorskip("jax")
    forced = "--xla_force_host_platform_device_count=2"
    cases = [
        ["inline", ""],
        ["inline", "", "train.devices=2"],
        ["inline", forced, "train.devices=2"],
        ["slurm", "", "train.devices=4", "cluster.gpus=1", "cluster.nodes=2"],
        ["slurm", "", "train.devices=4", "cluster.gpus=2", "cluster.nodes=2"],
    ]
    environment = os.environ | {"KERAS_BACKEND": "jax", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", DEVICES, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "",
        "missing: train.devices is 2, but 0 GPUs are here; set train.devices=1.",
        "ok: 2, train.devices is 2.",
        (
            "missing: train.devices is 4, but jobs ask for 1 GPUs on 2 nodes; set cluster.gpus and cluster.nodes so "
            "that they make 4."
        ),
        "ok: 4, train.devices is 4.",
    ]


def test_several_devices_need_jax(tiny_set: Path) -> None:
    from pneumoscope import _backend

    backend = _backend.chosen()
    if backend == "jax":
        pytest.skip("the tests run with JAX")
    assert lacking(smoke("train.devices=2"), tiny_set) == (
        f"train.devices is 2, for which the backend must be JAX, but it is {backend}; set KERAS_BACKEND=jax, or "
        "train.devices=1."
    )


# --- Slurm -----------------------------------------------------------------------------------------------------------


def test_slurm_is_told_with_its_version(
    slurm: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tiny_set: Path
) -> None:
    assert found("Slurm", smoke()).text == "23.11.4, not in a job."
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert found("Slurm", smoke()).text == "23.11.4, inside job 77 (2 nodes, here 8 cores and 4 GPUs)."
    doctor.require(smoke(), tiny_set, executor="slurm")


def test_slurm_by_half_is_told(tool: Callable[[str, str], None]) -> None:
    tool("srun", "")
    text = "Slurm is here by half: sbatch, squeue not on the PATH; load its module."
    for executor, state in (("inline", "warn"), ("slurm", "missing")):
        check = found("Slurm", smoke(), executor=executor)
        assert (check.state, check.text) == (state, text)


def test_slurm_without_a_cluster_is_told(slurm: Callable[[str, str], None]) -> None:
    slurm("sbatch", "echo sbatch: error: what >&2; echo sbatch: fatal: no configuration >&2; exit 1")
    text = "sbatch is here but does not work (sbatch: fatal: no configuration); set SLURM_CONF, or load its module."
    for executor, state in (("inline", "warn"), ("slurm", "missing")):
        check = found("Slurm", smoke(), executor=executor)
        assert (check.state, check.text) == (state, text)


@pytest.fixture
def in_memory() -> Iterator[Path]:
    folder = Path(f"/dev/shm/pneumoscope-{os.getpid()}")
    if doctor._file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_folders_that_other_nodes_do_not_see_are_told(
    slurm: Callable[[str, str], None], tiny_set: Path, in_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm("sinfo", 'test "$*" = "--noheader --format=%n" && echo node1 && echo node2')
    monkeypatch.setenv("PNEUMOSCOPE_CACHE", str(in_memory / "cache"))
    text = lacking(smoke(), tiny_set, executor="slurm", folder=in_memory / "run")
    assert text == (
        f"This run lacks 3 things: (1) The cache {in_memory}/cache is on a disk of this machine only, and jobs run on "
        "others; set PNEUMOSCOPE_CACHE to one on a disk that all nodes see; "
        f"(2) The data set {tiny_set} is on a disk of this machine only, and jobs run on others; choose another on a "
        f"disk that all nodes see; (3) The run directory {in_memory}/run is on a disk of this machine only, and jobs "
        "run on others; choose another on a disk that all nodes see."
    )
    doctor.require(smoke(), tiny_set, executor="local", folder=in_memory / "run")


def test_folders_whose_disk_tells_nothing_are_only_warned_of(
    slurm: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tiny_set: Path
) -> None:
    slurm("sinfo", "echo node1")
    place = Path("/usr")
    kind = doctor._file_system(place)
    if kind in doctor._SHARED | doctor._OF_ONE_MACHINE or kind.startswith("fuse"):
        pytest.skip(f"the system lies on {kind}")
    (check,) = doctor._shared({"The run directory": place})
    assert (check.state, check.text) == (
        "warn",
        (
            f"The run directory {place} is on {kind}, which other nodes may not see; if they do not, choose another on "
            "a disk that all nodes see."
        ),
    )


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.sshfs"])
def test_folders_on_a_disk_that_all_nodes_see_are_well(
    kind: str, slurm: Callable[[str, str], None], tmp_path: Path
) -> None:
    slurm("sinfo", "echo node1")
    place = tmp_path / "für alle"
    place.mkdir()
    mounts = tmp_path / "mountinfo"
    mounted = str(place).replace(" ", "\\040")
    mounts.write_text(
        f"22 1 8:1 / / rw - ext4 /dev/sda rw\n30 22 0:9 / {mounted} rw,relatime shared:4 - {kind} server:/home rw\n",
        encoding="utf-8",
    )
    assert [doctor._file_system(folder, mounts) for folder in (place / "new", tmp_path)] == [kind, "ext4"]
    assert list(doctor._shared({"The cache": place / "new"}, mounts)) == []


def test_a_cluster_of_this_machine_alone_shares_everything(
    slurm: Callable[[str, str], None], in_memory: Path, tiny_set: Path
) -> None:
    doctor.require(smoke(), tiny_set, executor="slurm", folder=in_memory / "run")
    slurm("sinfo", "exit 1")  # a controller that does not answer is no reason to refuse
    doctor.require(smoke(), tiny_set, executor="slurm", folder=in_memory / "run")


def test_the_innermost_mount_tells_the_file_system() -> None:
    assert doctor._file_system(Path("/proc/self")) == "proc"
    assert doctor._file_system(Path("/no/such/folder")) == doctor._file_system(Path("/"))


# --- on a node ------------------------------------------------------------------------------------------------------

GUARD = """
import os, sys
WATCHED = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
def guard(event, arguments):
    if event not in WATCHED:
        return
    asked = arguments[1] if event in WATCHED[:2] else arguments[0]
    host = asked[0] if isinstance(asked, tuple) else asked
    if host in (None, "", "localhost", "::1") or str(host).startswith(("127.", "/", "b'/")) or isinstance(host, bytes):
        return
    with open(os.environ["NETWORK_LOG"], "a") as file:
        file.write(f"{event} {asked}\\n")
    raise OSError(f"tried the network: {event} {asked}")
sys.addaudithook(guard)
"""
"""Runs in every Python process before anything else; an audit hook cannot be taken away again."""


@pytest.fixture
def node(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """Run a command as on a node without a network, and return what it did and what it tried."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    log = tmp_path / "network.log"
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"PYTHONPATH": str(tmp_path / "guard"), "NETWORK_LOG": str(log), "HOME": str(tmp_path / "home")}
    apart = ["/usr/bin/unshare", "-rn"]  # what is no Python has no network either, where the system allows that
    if not Path(apart[0]).exists() or subprocess.run([*apart, "/bin/true"], capture_output=True).returncode:
        apart = []

    def run(*arguments: object) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        command = [*apart, sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done, log.read_text(encoding="utf-8").splitlines() if log.exists() else []

    return run


@pytest.mark.slow
def test_a_run_on_a_node_tries_no_network(
    tiny_set: Path, tmp_path: Path, node: Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]
) -> None:
    done, tried = node("-m", "pneumoscope", "run", tiny_set, "-o", tmp_path / "run", "--preset", "smoke")
    assert (done.returncode, done.stderr, tried) == (0, "", [])
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())["models"]) == {"cnn", "tl", "ft"}
    cache = _files.cache_dir()
    stored = sum(_files.size_of(path) for kind in ("images-*", "features-*") for path in cache.glob(f"{kind}/*.npy"))
    assert doctor.stored_bytes(smoke(), images=64, test=16) == pytest.approx(stored, rel=0.05)


@pytest.mark.slow
def test_the_guard_sees_who_tries_the_network(
    node: Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]],
) -> None:
    connect = "import socket; socket.create_connection(('192.0.2.1', 443), timeout=5)"
    done, tried = node("-c", connect)
    assert done.returncode == 1
    assert tried == ["socket.getaddrinfo 192.0.2.1"]
    done, tried = node("-m", "pneumoscope", "fetch", "weights", "mobilenetv2")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert tried[1:] == ["socket.getaddrinfo storage.googleapis.com"]


@pytest.mark.slow
def test_the_doctor_tries_no_network(
    tiny_set: Path, node: Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]
) -> None:
    program = "import sys; from pneumoscope import doctor; print(len(doctor.look().checks))"
    done, tried = node("-c", program)
    assert (done.stdout, done.stderr, tried) == ("8\n", "", [])


# --- the verb --------------------------------------------------------------------------------------------------------


def called(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pneumoscope", "doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_verb_ends_with_1_where_a_run_lacks_something(tmp_path: Path) -> None:
    done = called(tmp_path / "typo", "--executor", "slurm")
    assert done.returncode == 1
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == list(NAMES)
    assert re.findall(r"(\w+): .*\[missing\]", done.stdout) == ["Slurm", "Data"]
    assert re.fullmatch(r"pneumoscope: This run lacks 2 things: \(1\) There is no Slurm here [^\n]+\.\n", done.stderr)


def test_the_verb_alone_only_says_what_it_finds(own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be", encoding="utf-8")
    done = called("--json")
    assert (done.returncode, done.stderr) == (0, "")
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["event"], last["name"], last["state"]) == ("check", "Cache", "missing")
    assert last["remedy"] == "set PNEUMOSCOPE_CACHE to a folder you may write to"
