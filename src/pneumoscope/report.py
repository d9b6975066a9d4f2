"""The report: a run as one HTML file that opens anywhere, offline; and several runs side by side.

Owns the page around the sections: its templates, its content security policy, its size, and the scores that it carries
for scripts. What stands in the sections comes from the modules ``_report_*``. Reads nothing but run directories, and
loads no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
from markupsafe import Markup

from pneumoscope import _files, _report_data, _report_measures, _report_pictures
from pneumoscope._report_blocks import Section, duration, plain
from pneumoscope._report_compare import Comparison
from pneumoscope._report_head import head
from pneumoscope._report_material import Material, number, read, title_of, words
from pneumoscope.errors import RunError, UsageError
from pneumoscope.runs import Run
from pneumoscope.specs import RESEARCH_USE

MAX_BYTES: Final = 10_000_000
"""No report is larger."""

_PAGE: Final = Path(__file__).with_name("report_page")
_ROOMS: Final = (5_600_000, 2_000_000, 0)  # bytes of pictures to try: base64 makes a third more of them


def write_report(run: Run) -> Path:
    """Write a run's report from what the run left.

    Parameters
    ----------
    run : Run
        Measured: finished, or failed after some of its approaches were measured.

    Returns
    -------
    Path
        ``report.html`` in the run directory: one file below `MAX_BYTES`, complete without scripts, that loads nothing.

    Raises
    ------
    RunError
        Where nothing is measured yet.
    StoreError
        Where the run's manifest or metrics are damaged.
    PneumoscopeError
        Where the file cannot be written, or not even a report without pictures is small enough.
    """
    material = read(run)
    page = next((page for room in _ROOMS if len(page := _page(material, room=room)) < MAX_BYTES), None)
    if page is None:
        raise RunError(
            f"The report of {run.folder} would be larger than {_files.size_text(MAX_BYTES)} even without pictures; its "
            "metrics.json holds far more than a run measures: score the run again with pneumoscope evaluate RUN."
        )
    _files.write_bytes(run.report_path, page)
    return run.report_path


def write_comparison(runs: Sequence[Run], path: Path) -> Path:
    """Write several runs side by side: what differs in their Specs, and their figures with intervals.

    Parameters
    ----------
    runs : sequence of Run
        Two or more, each measured. They are compared in pairs only where their test images are the same.
    path : Path
        The HTML file to write.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    UsageError
        For fewer than two runs, or one run twice.
    RunError
        Where one of them has measured nothing yet.
    PneumoscopeError
        Where a run's figures are damaged, or the file cannot be written.
    """
    folders = [run.folder.resolve() for run in runs]
    if len(runs) < 2 or len(set(folders)) < len(folders):
        raise UsageError(
            f"{len(set(folders))} different run is not enough to compare; give two or more."
            if len(set(folders)) < 2
            else "A run is named twice; name each once."
        )
    found = Comparison.of([read(run) for run in runs])
    text = (
        _environment()
        .get_template("compare.html.jinja")
        .render(
            _common(title="Runs side by side"),
            name="Runs side by side",
            subtitle=found.subtitle,
            sections=found.sections(),
        )
    )
    _files.write_bytes(path, _encoded(text))
    return path


def sections(material: Material, *, room: int) -> list[Section]:
    """Return every section of a run's report in its order, also those that have nothing to show.

    Parameters
    ----------
    material : Material
        What the run left.
    room : int
        Bytes of pictures that may be taken.

    Returns
    -------
    list of Section
    """
    album = _report_pictures.album_of(material, room=room)
    cases = _report_pictures.gallery(material, album)  # first: errors matter more than samples where room is short
    data, measures = _report_data, _report_measures
    return [
        data.data(material, album),
        measures.learning(material),
        measures.curves(material),
        measures.calibration(material),
        measures.counts(material),
        measures.points(material),
        measures.subgroups(material),
        measures.decision(material),
        measures.uncertainty(material),
        measures.shift(material),
        cases,
        data.checks(material),
        data.repeats(material),
        data.cost(material),
        data.provenance(material),
        data.reproduce(material),
    ]


# --- the page --------------------------------------------------------------------------------------------------------


def _page(material: Material, *, room: int) -> bytes:
    folder = material.run.folder.resolve()
    manifest = material.manifest
    status = words(manifest.get("status")) or "unknown"
    took = f" in {duration(manifest['seconds'])}" if number(manifest.get("seconds")) is not None else ""
    began = words(manifest.get("started"))[:16].replace("T", " ") or "at a time unknown"
    text = _environment().get_template("report.html.jinja").render(
        _common(title=f"{plain(folder.name)}: pneumoscope report", script=_text("report.js"), data=_scores(material)),
        name=plain(folder.name),
        subtitle=plain(f"{status}{took}, begun {began} UTC; images: {manifest.get('data', '–')}"),
        head=head(material),
        sections=sections(material, room=room),
    )  # fmt: skip
    return _encoded(text)


def _common(*, title: str, script: str = "", data: str | None = None) -> dict[str, Any]:
    """Return what every page needs; style and script are ours, and the policy allows just these by their hashes."""
    style = _text("report.css")
    policy = [
        "default-src 'none'", "img-src data:", f"style-src {_hash_of(style)}",
        f"script-src {_hash_of(script) if script else chr(39) + 'none' + chr(39)}",
        "base-uri 'none'", "form-action 'none'",
    ]  # fmt: skip
    return {
        "title": title,
        "policy": "; ".join(policy),
        "style": Markup(style),
        "script": Markup(script),
        "data": None if data is None else Markup(data),
        "research_use": RESEARCH_USE,
        "version": metadata.version("pneumoscope"),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _scores(material: Material) -> str | None:
    """Return the scores for the threshold slider as JSON that cannot end the element that it stands in."""
    found = _report_measures.slider_scores(material)
    if not found:
        return None
    models = {}
    for model, by_split in found.items():
        point = material.point(model, next(iter(by_split)))
        at = number(point.get("threshold"))
        models[plain(model)] = {
            "title": plain(title_of(model)),
            "point": plain(point.get("name") or "0.5"),
            "threshold": 0.5 if at is None else at,
            "splits": {
                split: {
                    "labels": _base64(scores.labels.astype(np.uint8).tobytes()),
                    "scores": _base64(scores.scores.astype("<f8").tobytes()),  # exact: a threshold may lie beside one
                }
                for split, scores in by_split.items()
            },
        }
    text = json.dumps({"models": models}, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )


def _visible(value: object) -> object:
    """Write out characters that cannot be seen, such as those that turn the direction of writing; line ends stay."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    lines = value.replace("\r\n", "\n").split("\n")
    return "\n".join(plain(line, longest=max(1, len(line)) * 10) for line in lines)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="backslashreplace")


def _text(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _hash_of(text: str) -> str:
    return f"'sha256-{_base64(hashlib.sha256(text.encode()).digest())}'"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
