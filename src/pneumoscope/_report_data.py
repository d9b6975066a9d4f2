"""The sections of a report around the models: the data, repeats, checks, cost, where all came from, how to do it again.

Owns what of the catalog, the audit, the stages' records and the Spec is shown, and the glossary. Computes counts and
rates only.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from typing import Any, Final

from pneumoscope import _charts, _files
from pneumoscope._report_blocks import (
    Block,
    Cell,
    Charts,
    Code,
    Points,
    Section,
    Table,
    Text,
    area,
    area_span,
    count,
    duration,
    interval_of,
    plain,
    share,
)
from pneumoscope._report_head import trained_table
from pneumoscope._report_material import SPLITS, Material, at, mapping, mappings, number, title_of, words
from pneumoscope._report_pictures import Album, finding_pictures, samples
from pneumoscope.errors import UsageError
from pneumoscope.specs import LABELS

_MAX_EXAMPLES: Final = 6  # of a finding; audit.json has the rest


def data(material: Material, album: Album) -> Section:
    """Return counts, samples and the audit's findings."""
    name, title = "data", "The data"
    blocks: list[Block] = []
    if material.catalog:
        blocks += [trained_table(material), *_by_subtype(material), *_bars(material)]
    left_out = [row for row in material.catalog if row.get("status") not in ("ok", None)]
    if left_out:
        reasons = sorted({row["status"] for row in left_out})
        told = f"{len(left_out):,} files are left out ({', '.join(reasons[:8])}); catalog.csv lists them."
        blocks.append(Text(plain(told, longest=400), "warning"))
    shown = samples(material, album)
    blocks += shown or [Text(f"No sample pictures: {_why_no_pictures(material)}", "quiet")]
    blocks += _findings(material, album)
    missing = material.missing.get("catalog", "")
    return Section(name, title, blocks, missing)


def repeats(material: Material) -> Section:
    """Return what further folds and seeds say together."""
    name, title, blocks = "repeats", "Folds and seeds", list[Block]()
    for kind in ("folds", "seeds"):
        found = mapping(material.repeats.get(kind))
        if not found:
            continue
        blocks += [_folds_table(found) if kind == "folds" else _seeds_table(found)]
        sentences = [one for one in found.get("sentences") or () if isinstance(one, str)]
        blocks += [Points(sentences)] if sentences else []
    missing = material.missing.get("repeats", "repeats.json holds neither folds nor seeds.")
    return Section(name, title, blocks, "" if blocks else missing)


def checks(material: Material) -> Section:
    """Return what the checks of evidence maps found, where they lie in the run."""
    name, title = "checks", "Can the evidence maps be believed?"
    blocks: list[Block] = []
    for folder, found in material.checks.items():
        verdicts = found.get("verdicts")
        sentences = [one for one in verdicts if isinstance(one, str)] if isinstance(verdicts, list) else []
        if sentences:
            model = plain(title_of(words(found.get("model"))))
            blocks += [Text(f"{model}, {count(found.get('n'))} images, from {plain(folder)}/:"), Points(sentences)]
    run = shlex.quote(str(material.run.folder))
    missing = f"The maps were not checked; pneumoscope explain {run} -o {run}/evidence does, for the next report."
    return Section(name, title, blocks, "" if blocks else plain(missing, longest=400))


def cost(material: Material) -> Section:
    """Return time and speed of every stage, and the machine."""
    name, title = "cost", "Cost"
    blocks: list[Block] = [Text(_machine(material))]
    begun = [(stage, record, _seconds(record.get("started"))) for stage, record in material.stages.items()]
    known = sorted((moment, stage, record) for stage, record, moment in begun if moment is not None)
    rows = [
        [
            Cell(plain(stage), plain(record.get("host") or "")),
            Cell(plain(record.get("status") or "unknown"), plain(record.get("error") or "")),
            Cell(duration(record.get("seconds"))),
            Cell(_speed(record)),
        ]
        for _, stage, record in known
    ]
    if not rows:
        return Section(name, title, blocks, "The run holds no records of its stages.")
    bars = [(plain(stage), moment, _ended(moment, record)) for moment, stage, record in known]
    note = "Speed: images read, or training images times epochs, through the seconds of the stage."
    table = Table(["Stage", "Status", "Time", "Speed"], rows, "Stages", notes=[note], of_words=True)
    with contextlib.suppress(UsageError):
        blocks.append(Charts([_charts.timeline(bars, title="When each stage ran")]))
    return Section(name, title, [*blocks, table])


def provenance(material: Material) -> Section:
    """Return hashes, versions, how often the test images were looked at, and the Spec."""
    manifest = material.manifest
    facts: list[tuple[str, object]] = [
        ("Data", manifest.get("data")),
        ("SHA-256 of the data", manifest.get("data_hash")),
        ("SHA-256 of the Spec", manifest.get("spec_hash")),
        ("Started, finished (UTC)", f"{manifest.get('started')}, {manifest.get('finished')}"),
        ("Status", manifest.get("status")),
        ("Backend", at(manifest, "machine", "backend")),
        ("Platform", at(manifest, "machine", "platform")),
        *((f"Version: {key}", value) for key, value in mapping(at(manifest, "machine", "versions")).items()),
        ("Version: pneumoscope that wrote this report", metadata.version("pneumoscope")),
        *((f"SHA-256 of models/{model}.keras", _model_hash(material, model)) for model in material.models),
    ]
    rows = [[Cell(plain(key)), Cell(plain(value))] for key, value in facts if value is not None]
    looked = words(at(material.metrics, "test_set", "sentence"))
    looked = looked or "How often the test images were looked at is not known."
    blocks: list[Block] = [Table(["What", "Value"], rows, "Where this comes from", of_words=True), Text(looked)]
    if material.spec_text:
        blocks.append(Code(material.spec_text, "The Spec, as spec.toml holds it", folded=True))
    return Section("provenance", "Provenance", blocks, material.missing.get("spec", ""))


def reproduce(material: Material) -> Section:
    """Return the command that does this run again."""
    name, title = "reproduce", "Do it again"
    if "spec" in material.missing or not words(material.manifest.get("data")):
        why = material.missing.get("spec", "The manifest does not say where the data were.")
        return Section(name, title, missing=f"The command is not known: {why}")
    spec = str(material.run.spec_path.absolute())
    command = ["pneumoscope", "run", words(material.manifest.get("data")), "-o", "runs/again", "--config", spec]
    folds, seeds = number(at(material.repeats, "folds", "folds")), at(material.repeats, "seeds", "seeds")
    command += ["--folds", f"{folds:.0f}"] if folds else []
    command += ["--seeds", str(len(seeds))] if isinstance(seeds, list) and seeds else []
    code = Code("\n".join(plain(line, longest=4000) for line in [shlex.join(command), _report_command(material)]))
    told = (
        "The same images, Spec, versions, backend and number of threads give the same weights and figures. The data's "
        "hash and the versions stand under Provenance."
    )
    return Section(name, title, [code, Text(told)])


# --- the data --------------------------------------------------------------------------------------------------------


def _why_no_pictures(material: Material) -> str:
    return material.missing.get("gallery") or words(material.gallery.get("reason")) or "the gallery holds none."


def _by_subtype(material: Material) -> list[Table]:
    kinds = sorted({row.get("subtype") or "" for row in material.catalog} - {""})[:8]
    if not kinds:
        return []
    rows, usable = [], [row for row in material.catalog if row.get("status") == "ok"]
    for split in SPLITS:
        part = [row.get("subtype") for row in usable if row.get("split") == split]
        if part:
            rows.append([Cell(split), *(Cell(f"{part.count(kind):,}") for kind in kinds)])
    return [Table(["Split", *map(plain, kinds)], rows, "PNEUMONIA images by subtype")]


def _bars(material: Material) -> list[Charts]:
    usable = [row for row in material.catalog if row.get("status") == "ok"]
    splits = [split for split in SPLITS if any(row.get("split") == split for row in usable)]
    if not splits:
        return []
    pairs = [(row.get("split"), row.get("label")) for row in usable]
    series = {
        label: [float(pairs.count((split, str(index)))) for split in splits] for index, label in enumerate(LABELS)
    }
    return [Charts([_charts.bars(splits, series, title="Class distribution", unit="images")])]


def _findings(material: Material, album: Album) -> list[Block]:
    if "audit" in material.missing:
        return [Text(f"No audit: {material.missing['audit']}", "quiet")]
    findings = mappings(material.audit.get("findings"))
    if not findings:
        return [Text("The audit found nothing to report.", "good")]
    rows = [
        [
            Cell(plain(one.get("name", "")), plain(one.get("severity", ""))),
            Cell(count(one.get("count"))),
            Cell(plain(one.get("sentence", ""), longest=600), _examples(one.get("examples"))),
        ]
        for one in findings
    ]
    head = ["Finding", "Count", "What it means"]
    table = Table(head, rows, "What the audit of the data found", of_words=True)
    return [table, *finding_pictures(material, album).values()]


def _examples(examples: object) -> str:
    if not isinstance(examples, list) or not examples:
        return ""
    said = [" = ".join(map(str, one)) if isinstance(one, list) else str(one) for one in examples[:_MAX_EXAMPLES]]
    more = f" and {len(examples) - len(said):,} more in audit.json" if len(examples) > len(said) else ""
    return "For example: " + "; ".join(plain(one) for one in said) + more


# --- repeats ---------------------------------------------------------------------------------------------------------


def _folds_table(found: Mapping[str, Any]) -> Table:
    rows = []
    for model, one in mapping(found.get("models")).items():
        pooled = mapping(at(one, "out_of_fold"))
        by_fold = at(one, "auc_by_fold")
        each = ", ".join(area(value) for value in by_fold) if isinstance(by_fold, list) else ""
        rows.append([Cell(plain(title_of(model))), Cell(area(pooled.get("auc")), area_span(interval_of(pooled, "auc"))),
                     Cell(each), Cell(share(pooled.get("accuracy")))])  # fmt: skip
    head = ["Model", "AUC, all folds together", "AUC of each fold", "Accuracy at 0.5"]
    return Table(head, rows, f"Cross-validation, {count(found.get('folds'))} folds by patient")


def _seeds_table(found: Mapping[str, Any]) -> Table:
    rows = []
    for model, one in mapping(found.get("models")).items():
        cells = []
        for figure, said in (("auc", area), ("sensitivity", share), ("specificity", share)):
            low, high = (said(at(one, figure, end)) for end in ("min", "max"))
            cells.append(Cell(said(at(one, figure, "mean")), f"{low} to {high}"))
        rows.append([Cell(plain(title_of(model))), *cells, Cell(count(at(found, "best", model)))])
    seeds = found.get("seeds")
    n = len(seeds) if isinstance(seeds, list) else 0
    head = ["Model", "AUC", "Sensitivity", "Specificity", "Times best"]
    return Table(head, rows, f"Mean and range over {n} seeds, {plain(found.get('split', 'test'))} images")


# --- cost and provenance ---------------------------------------------------------------------------------------------


def _machine(material: Material) -> str:
    machine = mapping(material.manifest.get("machine"))
    if not machine:
        return "On what machine this ran is not known."
    devices = machine.get("devices")
    shown = ", ".join(map(str, devices)) if isinstance(devices, list) else "unknown devices"
    total = duration(material.manifest.get("seconds"))
    told = (
        f"{machine.get('backend')} on {shown}, {machine.get('threads')} threads, {machine.get('platform')}. "
        f"The last call took {total}."
    )
    return plain(told, longest=400)


def _seconds(moment: object) -> float | None:
    try:
        return datetime.fromisoformat(moment).timestamp() if isinstance(moment, str) else None
    except ValueError:
        return None


def _ended(moment: float, record: Mapping[str, Any]) -> float | None:
    seconds = number(record.get("seconds"))
    return None if seconds is None else moment + seconds


def _speed(record: Mapping[str, Any]) -> str:
    """Return images per second as the stage measured them; of scoring, for each model."""
    rate = number(at(record, "speed", "images_per_second"))
    by_model = {model: number(at(found, "images_per_second")) for model, found in mapping(record.get("speeds")).items()}
    told = [f"{found:,.0f} images/s ({model})" for model, found in by_model.items() if found]
    return f"{rate:,.0f} images/s" if rate else ", ".join(told)


def _model_hash(material: Material, model: str) -> str | None:
    path = material.run.model_path(model)
    try:
        return _files.sha256_of_file(path) if path.is_file() else None
    except OSError:
        return None


def _report_command(material: Material) -> str:
    return shlex.join(["pneumoscope", "report", str(material.run.folder.absolute())])
