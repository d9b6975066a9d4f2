"""The command line: one thin verb per function. Says errors in one sentence and turns them into exit statuses.

Owns arguments and help texts. Every verb's work is done by a function that a notebook can call as well; those modules
load inside the verbs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from pneumoscope import _files, _stopping, cli_use
from pneumoscope._options import Allow, Config, Data, Json, Preset, Settings, allowing, spec_of, voice_of
from pneumoscope.errors import PneumoscopeError, StoreError, UsageError
from pneumoscope.specs import APPROACHES, TITLES, Spec

_MADE_AGAIN = re.compile(r"\.?((images|features|bundle|exported)-[0-9a-f]{16}|demo-images)(\..+)?")
"""Cache entries that can be made again, whole or unfinished; nothing else is deleted: the folder may hold more."""

_TRIES = 5
"""How often an entry is deleted in which other processes make and rename files meanwhile."""


class Executor(StrEnum):
    """Where the stages of a run are done."""

    INLINE = "inline"
    LOCAL = "local"
    SLURM = "slurm"


class JobsAction(StrEnum):
    """What can be done to batch jobs."""

    CANCEL = "cancel"


app = typer.Typer(
    name="pneumoscope",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "From a folder of chest X-rays to trained, measured and explained pneumonia classifiers. "
        "Start with 'pneumoscope demo', then 'pneumoscope run DATA -o RUN'. "
        "For research; not a medical device."
    ),
)
fetch_app = typer.Typer(no_args_is_help=True, help="Download what a run needs: the only verb that uses the network.")
app.add_typer(fetch_app, name="fetch")


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 bad data or result, 2 wrong call, 75 stopped and resumable.

    Typer itself ends on Ctrl-C (130) and where the reader of the output has gone, as with ``| head`` (1).
    """
    try:
        app(standalone_mode=True)
    except PneumoscopeError as error:
        from pneumoscope.narration import visible

        print(f"pneumoscope: {visible(str(error))}", file=sys.stderr)
        sys.exit(error.exit_status)
    sys.exit(0)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"pneumoscope {version('pneumoscope')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    del version


def _delete(entry: Path) -> None:
    for _ in range(_TRIES):
        try:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        except FileNotFoundError:
            pass  # another process was quicker, with the entry or with one file in it
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else something new came into it
                raise StoreError(f"Cannot delete {entry} ({error.strerror}); its owner can.") from error
        if not os.path.lexists(entry):
            return
    raise StoreError(
        f"Cannot delete {entry}: something still writes there; wait for its run to end, then run the same again."
    )


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():  # the folder itself may be a link to a larger disk
        _delete(entry)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The run directory.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Make synthetic X-rays and do the whole job on them: offline, a few minutes on two cores."""
    from pneumoscope import phantom, pipeline
    from pneumoscope.runs import Run

    spec = Spec.preset_named("demo")
    data = phantom.write_dataset(_files.cache_dir() / "demo-images")
    if Run(output).read_manifest().get("data") == str(data):
        with Run(output).lock():  # not while another process makes it
            pass
        _empty(output)  # a demo is made anew each time; only ever an earlier demo is removed
    with _stopping.on_signals() as stop:
        pipeline.run(spec, data, output, narration=voice_of(as_json), stop=stop)


@app.command()
def run(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="The run directory to make.")],
    preset: Preset = None,
    config: Config = None,
    settings: Settings = None,
    models: Annotated[
        str | None, typer.Option(help=f"Which approaches, separated by commas: {','.join(APPROACHES)}.")
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            metavar="K", min=2, help="Train K further times, each time holding out another part of the patients."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="Train with N seeds in all, so that a verdict does not hang on the luck of one."
        ),
    ] = None,
    allow: Allow = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished run; starts fresh where there is nothing.")
    ] = False,
    devices: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="GPUs that train one model together (JAX backend).")
    ] = None,
    executor: Annotated[
        Executor,
        typer.Option(
            help="Where the stages run: inline, one after the other; local, the approaches at the same time in "
            "processes of their own; slurm, as batch jobs."
        ),
    ] = Executor.INLINE,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="With slurm: here, in the allocation that salloc or srun has given.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="With slurm: follow the jobs until the last has ended.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With slurm: print the scripts that sbatch would be given.")
    ] = False,
    partition: Annotated[str | None, typer.Option(help="With slurm: the partition (cluster.partition).")] = None,
    account: Annotated[str | None, typer.Option(help="With slurm: the account (cluster.account).")] = None,
    time: Annotated[
        str | None, typer.Option(help="With slurm: limit of each job; minutes, H:MM:SS or D-HH:MM:SS.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="With slurm: GPUs of each job that runs a network.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="With slurm: cores of each job.")] = None,
    mem: Annotated[float | None, typer.Option(min=0, help="With slurm: memory of each job, GB.")] = None,
    as_json: Json = False,
) -> None:
    """Train every approach on DATA, measure it on validation and test, and leave figures, tables and models.

    Example: pneumoscope run chest_xray -o runs/first --models tl --set train.epochs=3
    """
    asked = {
        "train.devices": devices,
        "cluster.partition": partition,
        "cluster.account": account,
        "cluster.time_min": None if time is None else minutes_of(time),
        "cluster.gpus": gpus,
        "cluster.cpus": cpus,
        "cluster.mem_gb": mem,
    }
    further = [f"{key}={json.dumps(value)}" for key, value in asked.items() if value is not None]
    spec = allowing(spec_of(preset, config, [*(settings or []), *further], models), allow)
    if executor is not Executor.SLURM and (interactive or wait or dry_run):
        raise UsageError("--interactive, --wait and --dry-run belong to batch jobs; add --executor slurm.")
    from pneumoscope import batch, jobs, pipeline

    repeated = {"folds": folds or 0, "seeds": seeds or 1}
    if dry_run:
        for name, script in batch.scripts(spec, data, output, **repeated).items():
            typer.echo(f"# ----- {name}\n{script}")
        return
    voice = voice_of(as_json)
    if executor is Executor.SLURM and not interactive:
        batch.submit(spec, data, output, **repeated, resume=resume, narration=voice)
        if wait:
            batch.follow(output, narration=voice)
        return
    if interactive and jobs.inside() is None:
        raise UsageError(
            "This process is in no Slurm job; get an allocation with salloc or srun --pty, or leave --interactive away."
        )
    where: Literal["inline", "local"] = "local" if executor is Executor.LOCAL else "inline"
    with _stopping.on_signals(spec.cluster.signal) as stop:
        pipeline.run(spec, data, output, **repeated, executor=where, resume=resume, narration=voice, stop=stop)


@app.command(hidden=True)
def stage(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory that has been begun.")],
    name: Annotated[str, typer.Argument(metavar="STAGE", help="images, features, train-M, evaluate or repeats.")],
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Of features: part I, from 0, of N.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads where the settings leave them open.")] = 0,
    as_json: Json = False,
) -> None:
    """Do one stage of a run: what the jobs of --executor local and slurm call."""
    from pneumoscope import pipeline
    from pneumoscope.runs import Run

    part = None
    if shard is not None:
        if not (found := re.fullmatch(r"(\d+)/(\d+)", shard)) or int(found[1]) >= int(found[2]):
            raise UsageError(f"--shard {shard!r} names no part; write it as I/N with I from 0 to N-1.")
        part = (int(found[1]), int(found[2]))
    voice = voice_of(as_json)
    with _stopping.on_signals(Run.open(folder).read_spec().cluster.signal) as stop:
        pipeline.perform(folder, name, shard=part, threads=threads, narration=voice, stop=stop)


@app.command()
def jobs(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run directory that the jobs work on.")],
    action: Annotated[JobsAction | None, typer.Argument(help="cancel takes back what has not ended.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow them until the last has ended.")] = False,
    as_json: Json = False,
) -> None:
    """Show a run's batch jobs: state, epoch, validation loss and log; --wait follows them, cancel takes them back."""
    from pneumoscope import batch
    from pneumoscope.runs import Run

    Run.open(folder)
    voice = voice_of(as_json)
    if action is JobsAction.CANCEL:
        batch.cancel(folder, narration=voice)
    elif wait:
        batch.follow(folder, narration=voice)
    else:
        batch.show_jobs(folder, narration=voice)


@app.command()
def inspect(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where pictures and the list of images go.")],
    preset: Preset = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Look at the images without training: counts, sample grids, class distributions."""
    spec = spec_of(preset, None, settings, None)
    from pneumoscope import survey

    survey.inspect(data, output, spec=spec, narration=voice_of(as_json))


@app.command()
def audit(
    data: Data,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where audit.json and a picture of near-duplicates go.")
    ] = None,
    preset: Preset = None,
    settings: Settings = None,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Look for what makes figures wrong: leaks, double labels, duplicates, odd images; exit status 1 for an error."""
    spec = allowing(spec_of(preset, None, settings, None), allow)
    from pneumoscope import survey

    survey.audit_images(data, output, spec=spec, narration=voice_of(as_json)).require_passed()


@app.command()
def pack(
    data: Data,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the store; the cache where not given.")
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Decode and resize every image once, ahead of a run."""
    spec = spec_of("default", None, settings, None)
    from pneumoscope.catalog import Catalog
    from pneumoscope.store import ImageStore

    voice = voice_of(as_json)
    with voice.stage(f"Reading {data}"), voice.bar("files", unit="files") as progress:
        catalog = Catalog.scan(data, classes=spec.data.classes, progress=progress)
    with voice.stage("Packing the images"), voice.bar("images") as progress:
        store = ImageStore.pack(
            catalog,
            size_px=spec.image.size_px,
            jpeg_quality=spec.image.jpeg_quality,
            cache=output,
            progress=progress,
        )
    voice.event(
        "packed",
        f"{len(store.image_ids):,} distinct images of {store.size_px} x {store.size_px} pixels are in {store.folder}"
        + (f"; {len(store.rejected)} could not be decoded." if store.rejected else "."),
        folder=store.folder,
        images=len(store.image_ids),
        rejected=store.rejected,
    )


@app.command()
def models(
    model: Annotated[
        str | None, typer.Option("--model", help=f"List every layer of one: {', '.join(APPROACHES)}.")
    ] = None,
    preset: Preset = None,
    config: Config = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Show the approaches; with --model, every layer's number, name, output shape, parameters and whether it trains."""
    spec = spec_of(preset, config, [*(settings or []), "backbone.weights=none"], model)  # a listing needs none
    from pneumoscope import _backend

    _backend.prepare(threads=spec.train.threads)
    from pneumoscope import models as networks

    voice = voice_of(as_json)
    if model is not None:
        network = networks.build(model, spec)
        rows = [
            [str(r.number), r.name, r.kind, r.output_shape, f"{r.parameters:,}", "yes" if r.trainable else "no"]
            for r in networks.listing(network)
        ]
        voice.table(
            f"{model} ({TITLES[model]}), preset {spec.preset}",
            ["number", "name", "kind", "output", "parameters", "trains"],
            rows,
        )
        voice.say(
            f"{networks.count_parameters(network):,} parameters, "
            f"{networks.count_parameters(network, trainable_only=True):,} of them train; "
            f"the frozen part ends at {networks.cut(network) or 'no layer: everything trains'}."
        )
        return
    rows = []
    for name in spec.models:
        network = networks.build(name, spec)
        total, trains = networks.count_parameters(network), networks.count_parameters(network, trainable_only=True)
        backbone = "-" if name == "cnn" else spec.backbone.name
        rows.append([name, TITLES[name], backbone, f"{total:,}", f"{trains:,}", str(networks.cut(network) or "-")])
    voice.table(
        f"Approaches, preset {spec.preset}", ["model", "what", "backbone", "parameters", "train", "cut at"], rows
    )


@fetch_app.command("weights")
def fetch_weights(
    names: Annotated[list[str], typer.Argument(metavar="BACKBONE...", help="For example resnet152v2.")],
    as_json: Json = False,
) -> None:
    """Download ImageNet weights of backbones into the cache, with progress and checksum."""
    from pneumoscope import backbones

    voice = voice_of(as_json)
    for name in names:
        with voice.bar(name, unit="bytes") as progress:
            path = backbones.fetch_weights(name, progress=progress)
        voice.event("fetched", f"{name}: {path}", name=name, path=path)


@fetch_app.command("kaggle")
def fetch_kaggle(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the download; the cache where not given.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Another data set; paultimothymooney/chest-xray-pneumonia else."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Download the chest X-rays from Kaggle (2.5 GB; 5 GB until unpacked) and say what came; resumes by itself."""
    from pneumoscope import kaggle

    voice, name = voice_of(as_json), dataset or kaggle.DATASET
    with voice.bar(name, unit="bytes") as progress:
        fetched = kaggle.fetch(name, folder=output, progress=progress)
    rows = [[str(place), *map(str, counts)] for place, *counts in fetched.counts.itertuples(name=None)]
    voice.table(f"Images in {fetched.folder}", ["folder", *fetched.counts.columns], rows)
    for sentence in fetched.sentences:
        voice.say(sentence)
    voice.event("fetched", f"Next: {fetched.command}", name=name, path=fetched.folder, command=fetched.command)


@app.command()
def cache(
    clean: Annotated[
        bool,
        typer.Option(
            "--clean", help="Delete packed images, features, exported models and unfinished files; weights stay."
        ),
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="With --clean: delete weights as well.")] = False,
    as_json: Json = False,
) -> None:
    """Show what is stored and how big it is; --clean deletes what can be made again."""
    voice, root = voice_of(as_json), _files.cache_dir()
    entries = sorted(root.iterdir()) if root.is_dir() else []
    rows = [[entry.name, _files.size_text(_files.size_of(entry))] for entry in entries]
    total = sum(_files.size_of(entry) for entry in entries)
    voice.table(f"Cache in {root}: {_files.size_text(total)}", ["entry", "size"], rows)
    if not clean:
        return
    going = [
        entry for entry in entries if _MADE_AGAIN.fullmatch(entry.name) or (everything and entry.name == "weights")
    ]
    freed = sum(_files.size_of(entry) for entry in going)
    for entry in going:
        _delete(entry)
    voice.event("cleaned", f"Deleted {len(going)} entries, {_files.size_text(freed)}.", entries=len(going), freed=freed)


@app.command()
def doctor(
    data: Annotated[
        Path | None, typer.Argument(metavar="[DATA]", help="The images of a run: what would it lack here?")
    ] = None,
    preset: Preset = None,
    config: Config = None,
    settings: Settings = None,
    executor: Annotated[Executor, typer.Option(help="Where that run would be done.")] = Executor.INLINE,
    as_json: Json = False,
) -> None:
    """Say what this machine can do: backend, devices, weights, Slurm; with DATA, status 1 where a run lacks some."""
    spec = spec_of(preset, config, settings, None)
    from pneumoscope import doctor as machine

    voice, report = voice_of(as_json), machine.look(spec, data, executor=executor.value)
    for check in report.checks:
        text = f"{check.name}: {check.text}"
        voice.event("check", text if check.state == "ok" else f"{text} [{check.state}]", **vars(check))
    if data is not None:
        machine.refuse(machine.missing(report))


def minutes_of(time: str) -> int:
    """Return a time limit in minutes, rounded up.

    Parameters
    ----------
    time : str
        Minutes, ``H:MM:SS``, ``D-HH`` or ``D-HH:MM:SS``, as Slurm takes them.

    Raises
    ------
    UsageError
        For anything else.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not found:
        raise UsageError(f"--time {time!r} is not a time; write minutes, H:MM:SS or D-HH:MM:SS, for example 4:00:00.")
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] is None and found[3] is None:
        return first
    if found[1] is None and found[4] is None:  # M:SS
        return first + (second > 0)
    return days * 1440 + first * 60 + second + (third > 0)


cli_use.add_to(app)

if __name__ == "__main__":
    main()
