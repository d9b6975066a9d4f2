"""The verbs that use trained models: measure them elsewhere, ask them, look into them, take them out, serve them.

Like `cli`, of which it is the second half: arguments and help texts only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pneumoscope import _files
from pneumoscope._options import Json, voice_of
from pneumoscope.specs import APPROACHES


def add_to(app: typer.Typer) -> None:
    """Give the command line these verbs."""
    for verb in (evaluate, export):
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


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run directory.")],
    model: Annotated[str, typer.Option(help=f"Which approach: {', '.join(APPROACHES)}.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="The folder to make.")],
    weights: Annotated[
        str, typer.Option(help="How weights are kept: float32, float16 or int8; each must score as the run's own.")
    ] = "float32",
    as_json: Json = False,
) -> None:
    """Write a trained model for use elsewhere, as ONNX, once it is shown to score every image as the run does."""
    from pneumoscope import export as exporting
    from pneumoscope.runs import Run

    voice = voice_of(as_json)
    bundle = exporting.export(Run.open(folder), model, output, weights=weights, narration=voice)  # type: ignore[arg-type]
    size = _files.size_text(_files.size_of(bundle.folder))
    voice.event("exported", f"The bundle is in {bundle.folder} ({size}).", path=bundle.folder)
