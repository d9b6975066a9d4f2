"""What several verbs of the command line take, and what becomes of it: a Spec, and somebody who speaks.

Owns the arguments that verbs share. Does no work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pneumoscope.errors import UsageError
from pneumoscope.narration import Narration
from pneumoscope.specs import APPROACHES, Spec

Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="A folder with train/ and test/ (Kaggle), class folders NORMAL/ and PNEUMONIA/, a .zip of those, "
        "a .csv with the columns path,label[,split,group], or a MedMNIST .npz.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Where the settings begin: default, best (deep fine-tuning), tutorial (the published procedure), "
        "demo and smoke (small, for trying and for tests).  [default: default]"  # None: the file of --config may say
    ),
]
Config = Annotated[Path | None, typer.Option(help="A TOML file with settings, such as a run's spec.toml.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. train.epochs=3; may be repeated."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="FINDING",
        help="Let an error of the audit pass: content-across-validation, group-across-validation or two-labels; "
        "may be repeated.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON event per line instead of text.")]


def spec_of(preset: str | None, config: Path | None, settings: list[str] | None, models: str | None) -> Spec:
    """Return the Spec that a call describes, from `default` where nothing else is said; see `Spec` for what it raises.

    Raises
    ------
    UsageError
        Where there is no such approach, or two places say where the settings begin.
    """
    if config is not None and preset is not None:
        raise UsageError(
            f"--preset {preset} and --config {config} both say where the settings begin; leave --preset out and write "
            f'preset = "{preset}" at the top of the file.'
        )
    spec = Spec.from_toml(config) if config is not None else Spec.preset_named("default" if preset is None else preset)
    if models is not None:
        names = [name.strip() for name in models.split(",") if name.strip()]
        unknown = [name for name in names if name not in APPROACHES]
        if unknown or not names:
            raise UsageError(
                f"There is no approach {unknown[0] if unknown else ''!r}; choose from {', '.join(APPROACHES)}."
            )
        spec = spec.with_overrides([f"models={json.dumps(names)}"])
    return spec.with_overrides(settings or [])


def allowing(spec: Spec, findings: list[str] | None) -> Spec:
    """Return a Spec that lets further findings of the audit pass."""
    wanted = dict.fromkeys([*spec.audit.allow, *(findings or [])])  # each once, in order
    return spec.with_overrides([f"audit.allow={json.dumps(list(wanted))}"], source="--allow")


def voice_of(as_json: bool) -> Narration:
    """Return who speaks: JSON events, or what suits the terminal."""
    return Narration("json" if as_json else None)
