"""The verbs that use trained models: measure them elsewhere, ask them, look into them, take them out, serve them.

Like `cli`, of which it is the second half: arguments and help texts only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pneumoscope import _files
from pneumoscope._options import Data, Json, Settings, spec_of, voice_of
from pneumoscope.errors import UsageError
from pneumoscope.specs import APPROACHES, RESEARCH_USE

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="A bundle, or a run directory; RUN:ft picks one of its models, else the best on validation is taken. "
        "Where not given, the model that comes with the package: for chest X-rays of small children.",
    ),
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of the network; 0 takes all cores.")]


def add_to(app: typer.Typer) -> None:
    """Give the command line these verbs."""
    for verb in (evaluate, report, predict, explain, export, recalibrate, serve):
        app.command()(verb)


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    data: Annotated[Path | None, typer.Option(help="Other labelled images to score instead of the run's own.")] = None,
    as_json: Json = False,
) -> None:
    """Score a run's models again, on its own images or, with --data, on others."""
    from pneumoscope import pipeline
    from pneumoscope.runs import Run

    voice = voice_of(as_json)
    path = pipeline.evaluate_run(Run.open(folder), data=data, narration=voice)
    voice.event("evaluated", f"Written to {path}.", path=path)


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run directory, or several to compare.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Of a comparison; comparison.html where not given."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a run's report.html anew from its files, or one page that compares several runs."""
    from pneumoscope import report as reporting
    from pneumoscope.runs import Run

    runs = [Run.open(folder) for folder in folders]
    if len(runs) == 1 and output is not None:
        raise UsageError(
            f"--output {output} is for a comparison of several runs; the report of one always goes to "
            f"{runs[0].report_path}. Leave --output away, or name another run."
        )
    if len(runs) == 1:
        path = reporting.write_report(runs[0])
    else:
        path = reporting.write_comparison(runs, output or Path("comparison.html"))
    voice_of(as_json).event("reported", f"Written to {path}.", path=path)


def predict(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILES...", help="Images (JPEG, PNG, DICOM), folders, .zip archives or patterns."),
    ],
    model: Model = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="OUT", help="A table of all answers: file,score,call,assessable,reason.")
    ] = None,
    evidence: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A picture for each image: what speaks for and against.")
    ] = None,
    occlusion: Annotated[
        bool, typer.Option("--occlusion", help="With --evidence: also what hiding each place does (slow).")
    ] = False,
    at: Annotated[
        str | None,
        typer.Option(metavar="POINT", help="Another operating point: its name, or a threshold from 0 to 1."),
    ] = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Ask a model about images: score, call, whether it can be assessed, and the evidence; for research only.

    Example: pneumoscope predict scans --model runs/first --csv answers.csv --evidence maps
    """
    from pneumoscope import _chosen, _inputs, answers
    from pneumoscope.bundle import Bundle

    voice, named = voice_of(as_json), _chosen.find(model)
    if model is None:
        voice.say("Asking the model that comes with the package: made from X-rays of children of one to five years.")
    found = _inputs.find(files)
    if isinstance(named, Bundle):
        predictor = named.predictor(threads=threads)
    else:
        from pneumoscope import export as exporting  # a bundle needs no Keras

        run, name = named
        voice.say(f"Asking {name} of {run.folder}.")
        predictor = exporting.open_predictor(run, name, threads=threads, narration=voice)
    if at is not None:
        predictor = predictor.at(_point(at))
    for note in found.notes:
        voice.warn(note)
    answers.predict(predictor, found.inputs, csv=csv, evidence=evidence, occlusion=occlusion, narration=voice)


def explain(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where figures and tables go.")],
    model: Annotated[
        str | None, typer.Option(help=f"Which approach: {', '.join(APPROACHES)}; the best on validation else.")
    ] = None,
    images: Annotated[int, typer.Option(min=2, metavar="N", help="How many validation images.")] = 64,
    as_json: Json = False,
) -> None:
    """Check whether a model's evidence maps can be believed: shuffled weights, deletion, borders, pasted markers."""
    from pneumoscope import _chosen, checks
    from pneumoscope.runs import Run

    voice, run = voice_of(as_json), Run.open(folder)
    checks.check(run, model or _chosen.best_of(run), folder=output, n_images=images, narration=voice)
    voice.event("explained", f"Figures and tables are in {output}.", path=output)


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run directory.")],
    model: Annotated[str, typer.Option(help=f"Which approach: {', '.join(APPROACHES)}.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="The folder to make.")],
    weights: Annotated[
        str, typer.Option(help="How weights are kept: float32, float16 or int8; each must score as the run's own.")
    ] = "float32",
    also: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Also a .keras or .tflite file (scores only); may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a trained model for use elsewhere, as ONNX, once it is shown to score every image as the run does."""
    from pneumoscope import export as exporting
    from pneumoscope.runs import Run

    voice = voice_of(as_json)
    bundle = exporting.export(Run.open(folder), model, output, weights=weights, narration=voice)  # type: ignore[arg-type]
    for path in also or []:
        exporting.also(Run.open(folder), model, path, narration=voice)
        voice.event("exported", f"Written to {path}.", path=path)
    size = _files.size_text(_files.size_of(bundle.folder))
    voice.event("exported", f"The bundle is in {bundle.folder} ({size}).", path=bundle.folder)


def recalibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A bundle, a run directory, or RUN:ft.")],
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="The new bundle's folder.")],
    width: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Say how many images an interval of this width needs.")
    ] = 0.1,
    settings: Settings = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Choose operating points and temperature anew on a site's own labelled images; weights stay as they are."""
    spec = spec_of("default", None, settings, None)
    from pneumoscope import _chosen, recalibration
    from pneumoscope.catalog import Catalog

    voice = voice_of(as_json)
    bundle = _chosen.bundle_of(model)
    with voice.stage(f"Reading {data}"), voice.bar("files", unit="files") as progress:
        catalog = Catalog.scan(data, classes=spec.data.classes, progress=progress)
    recalibration.recalibrate(
        bundle,
        catalog,
        folder=output,
        width=width,
        cost_ratio=spec.evaluation.cost_ratio,
        threads=threads,
        narration=voice,
    )
    voice.event("recalibrated", f"The new bundle is in {output}.", path=output)


def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Where to listen; other addresses than this machine's own need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="PNEUMOSCOPE_API_KEY", help="Asked of everyone who sends images; better as the variable."),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen beyond this machine without a key: whoever reaches it may ask."),
    ] = False,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Serve a model: a page to drop images on, and the same for programs (/predict, /evidence, /docs)."""
    from pneumoscope import _chosen, serving

    voice = voice_of(as_json)
    bundle = _chosen.bundle_of(model)

    def ready(url: str) -> None:
        voice.event("serving", f"Serving {bundle.description.title} at {url} (Ctrl-C ends it).", url=url)
        voice.say(f"{RESEARCH_USE}.")

    serving.serve(bundle, host=host, port=port, api_key=api_key, insecure=insecure, threads=threads, on_ready=ready)


def _point(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
