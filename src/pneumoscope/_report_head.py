"""The first screen of a report: which model, how good, can it be trusted.

Owns the choice of the model that the headline is about (by validation images, never by test), the verdict in words, and
which warnings matter. Reads figures that `scorecard` measured; computes none of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from pneumoscope._report_blocks import (
    UNDEFINED,
    Cell,
    Reasons,
    Table,
    area,
    area_span,
    count,
    counted,
    figure_cell,
    interval_of,
    joined,
    plain,
    share,
    share_span,
    threshold,
)
from pneumoscope._report_material import SPLITS, Material, at, mapping, mappings, number, title_of, words
from pneumoscope.specs import PRETRAINED

BETTER: Final = "better"
WORSE: Final = "worse"
FIGURES: Final = (
    ("auc", "AUC"), ("sensitivity", "Sensitivity"), ("specificity", "Specificity"), ("accuracy", "Accuracy")
)  # fmt: skip
"""What stands beside every approach, and its heading."""

CHOICE: Final = "validation"
"""The split whose AUC decides which model the headline is about."""

_DIVIDED: Final = {"group": "Divided by patient", "image": "Divided by image, not by patient"}

INTERVALS: Final = "Small figures: 95 % intervals, by patient; where there is none, by image (DeLong, Wilson)."


@dataclass(frozen=True)
class Tile:
    """One large figure: its name, value, interval, and what it means in counts."""

    name: str
    value: str
    span: str
    meaning: str


@dataclass(frozen=True)
class Warned:
    """A warning: how grave (``grave``, ``mind`` or ``fine``), the sentence, and the section that has more."""

    level: str
    sentence: str
    section: str


@dataclass(frozen=True)
class Head:
    """The first screen.

    Attributes
    ----------
    model : str
        What the headline is about, for people.
    split : str
        Where its figures come from: ``test``, or another where test was not scored.
    why : str
        How it was chosen.
    tiles : sequence of Tile
        Its figures.
    trained : Table
        Images and patients by split.
    trained_on : str
        Size, preset, backbone, in one line.
    approaches : Table
        All approaches and baselines side by side.
    verdicts : sequence of str
        Which models can be told apart, and whether they beat the baselines.
    warnings : sequence of Warned
        The gravest first.
    """

    model: str
    split: str
    why: str
    tiles: tuple[Tile, ...]
    trained: Table
    trained_on: str
    approaches: Table
    verdicts: tuple[str, ...]
    warnings: tuple[Warned, ...]


def head(material: Material) -> Head:
    """Return the first screen of a run's report.

    Parameters
    ----------
    material : Material
        With one measured model or more.

    Returns
    -------
    Head
    """
    model, why = chosen(material)
    split = "test" if material.of(model, "test") else material.shown_split
    return Head(
        model=plain(title_of(model)),
        split=split,
        why=why,
        tiles=_tiles(material, model, split),
        trained=trained_table(material),
        trained_on=_trained_on(material),
        approaches=approaches(material),
        verdicts=(*_told_apart(material, model), *_against_shortcuts(material)),
        warnings=tuple(warnings(material)),
    )


def chosen(material: Material) -> tuple[str, str]:
    """Return the model with the highest AUC on validation, and how it was chosen, in a sentence.

    Parameters
    ----------
    material : Material
        With one measured model or more.

    Returns
    -------
    tuple of str
        The model's name, and the sentence. Test images have no part in it.
    """
    models = list(material.models)
    known = {name: auc for name in models if (auc := number(material.of(name, CHOICE).get("auc"))) is not None}
    if len(models) == 1:
        return models[0], "The only model that was measured."
    if not known:
        return models[0], f"The first of {len(models)}: no {CHOICE} AUC is defined, so none was chosen."
    best = max(known, key=known.__getitem__)
    equal = [plain(name) for name, auc in known.items() if auc == known[best] and name != best]
    also = f", which {joined(equal)} {'has' if len(equal) == 1 else 'have'} too" if equal else ""
    return best, (
        f"Chosen for the highest AUC on {CHOICE} images ({known[best]:.3f}{also}); "
        "test images had no part in the choice."
    )


def approaches(material: Material) -> Table:
    """Return all approaches and baselines side by side on validation and test, at the default operating point.

    Parameters
    ----------
    material : Material
        With one measured model or more.

    Returns
    -------
    Table
    """
    splits = [split for split in material.splits if split != "calibration"]
    best, reasons = chosen(material)[0], Reasons()
    rows = []
    for name in material.scored:
        cells = [Cell(plain(title_of(name)), _kind_of(material, name), strong=name == best)]
        for split in splits:
            whole, point = material.of(name, split), material.point(name, split)
            reasons.note(whole, "auc", "operating_point")
            cells += [figure_cell(whole if key == "auc" else point, key) for key, _ in FIGURES]
        rows.append(cells)
    chosen_on = words(material.metrics.get("chosen_on")) or CHOICE
    notes = [f"{INTERVALS} Thresholds were chosen on {chosen_on} images.", *reasons.found]
    return Table(
        head=["Approach", *(title for _ in splits for _, title in FIGURES)],
        above=[("", 1), *((f"{split.capitalize()}: {_size(material, split)}", len(FIGURES)) for split in splits)],
        rows=rows,
        caption="Approaches side by side, and the baselines that see no lung",
        notes=notes,
    )


def _kind_of(material: Material, name: str) -> str:
    if name in material.shortcuts:
        return "sees no lung"
    return f"threshold {threshold(material.point(name, material.splits[0]).get('threshold'))}"


def _size(material: Material, split: str) -> str:
    n = next((found for name in material.models if (found := number(material.of(name, split).get("n")))), None)
    return UNDEFINED if n is None else counted(n, "image")


# --- the headline ----------------------------------------------------------------------------------------------------


def _tiles(material: Material, model: str, split: str) -> tuple[Tile, ...]:
    whole, point = material.of(model, split), material.point(model, split)
    sick, well = number(whole.get("n_positive")), number(whole.get("n_negative"))
    n = number(whole.get("n"))

    def of(key: str, name: str, meaning: str) -> Tile:
        ends = interval_of(point, key)
        return Tile(name, share(point.get(key)), share_span(ends) + "\u00a0%" * (ends is not None), meaning)

    return (
        Tile(
            f"{split.capitalize()} AUC", area(whole.get("auc")), area_span(interval_of(whole, "auc")),
            f"on {count(n)} images: {count(sick)} PNEUMONIA, {count(well)} NORMAL",
        ),
        of("sensitivity", "Sensitivity", f"{count(point.get('false_negatives'))} of {count(sick)} PNEUMONIA missed"),
        of("specificity", "Specificity", f"{count(point.get('false_positives'))} of {count(well)} NORMAL: false alarm"),
    )  # fmt: skip


def trained_table(material: Material) -> Table:
    """Return images, labels and patients of each split, as the catalog has them.

    Parameters
    ----------
    material : Material
        With the catalog's rows, or why there are none.

    Returns
    -------
    Table
    """
    rows = []
    for split in SPLITS:
        part = [row for row in material.catalog if row.get("status") == "ok" and row.get("split") == split]
        if part:
            sick = sum(row.get("label") == "1" for row in part)
            patients = len({row.get("group") for row in part})
            rows.append([Cell(split), *(Cell(f"{n:,}") for n in (len(part), len(part) - sick, sick, patients))])
    notes = [material.missing["catalog"]] if "catalog" in material.missing else []
    return Table(["Split", "Images", "NORMAL", "PNEUMONIA", "Patients"], rows, notes=notes)


def _trained_on(material: Material) -> str:
    spec = material.spec
    if not spec:
        return material.missing.get("spec", "")
    by = _DIVIDED.get(words(at(spec, "split", "by")))
    size, name, weights = at(spec, "image", "size_px"), at(spec, "backbone", "name"), at(spec, "backbone", "weights")
    parts = [by, f"{size} x {size} px", f"preset {spec.get('preset')}"]
    if set(PRETRAINED) & {*material.wanted, *material.models}:
        parts.append(f"backbone {name} ({'random weights' if weights == 'none' else weights})")
    return plain("; ".join(str(part) for part in parts if part)) + "."


# --- the verdict -----------------------------------------------------------------------------------------------------


def _told_apart(material: Material, best: str) -> list[str]:
    """Say on each split from which of the other models the chosen one can be told."""
    others = [name for name in material.models if name != best]
    said = []
    for split in (split for split in (CHOICE, "test") if split in material.splits and others):
        of_best = {other: _verdict(material, split, best, other) for other in others}
        known = {other: verdict for other, verdict in of_best.items() if verdict}
        if not known:
            why = "" if material.comparisons(split) else ": there was no bootstrap (evaluation.bootstrap = 0)"
            said.append(f"On {split}, the models were not compared{why}.")
            continue
        parts = [
            f"{words_for} {joined(names)}"
            for verdict, words_for in ((BETTER, "better than"), (WORSE, "worse than"))
            if (names := [other for other, found in known.items() if found == verdict])
        ]
        alike = [other for other, found in known.items() if found not in (BETTER, WORSE)]
        parts = [f"is {joined(parts)}"] if parts else []
        if alike:
            parts.append(f"cannot be told apart from {joined(alike)} with this many images")
        said.append(plain(f"On {split}, {best} {joined(parts)}.", longest=600))
    return said


def _verdict(material: Material, split: str, one: str, other: str) -> str:
    """Return the verdict said of `one`; empty where the two were not compared."""
    turned = {BETTER: WORSE, WORSE: BETTER}
    for found in material.comparisons(split):
        verdict = words(found.get("verdict"))
        if (found.get("first"), found.get("second")) == (one, other):
            return verdict
        if (found.get("first"), found.get("second")) == (other, one):
            return turned.get(verdict, verdict)
    return ""


def unbeaten(material: Material, split: str) -> dict[str, list[str]]:
    """Return by model the baselines that it is not shown to beat on a split; empty where none was compared.

    Parameters
    ----------
    material : Material
        With its comparisons.
    split : str
        Where.

    Returns
    -------
    dict of str to list of str
    """
    found = {
        model: [
            other
            for other in material.shortcuts
            if (verdict := _verdict(material, split, model, other)) and verdict != BETTER
        ]
        for model in material.models
    }
    return {model: others for model, others in found.items() if others}


def _not_beaten(model: str, others: Sequence[str]) -> str:
    sees = "which sees" if len(others) == 1 else "which see"
    return f"{model} is not shown to beat {joined(others)}, {sees} no lung."


def _against_shortcuts(material: Material) -> list[str]:
    split = material.shown_split
    if not material.shortcuts:
        return ["No baseline that sees no lung stands beside the models."]
    if not any(_verdict(material, split, model, other) for model in material.models for other in material.shortcuts):
        return []
    each = [f"{name} (AUC {area(material.of(name, split).get('auc'))})" for name in material.shortcuts]
    beaten = unbeaten(material, split)
    if not beaten:
        return [plain(f"On {split}, every model beats what can be had without looking at a lung: {joined(each)}.")]
    return [plain(f"On {split}, {_not_beaten(model, others)}", longest=600) for model, others in beaten.items()]


# --- warnings --------------------------------------------------------------------------------------------------------


def warnings(material: Material) -> list[Warned]:
    """Return what stands against trusting the figures, the gravest first.

    Parameters
    ----------
    material : Material
        Of any run.

    Returns
    -------
    list of Warned
    """
    found = [
        *_about_the_run(material),
        *_about_the_data(material),
        *_about_the_choice(material),
        *_about_shift(material),
        *_about_looks(material),
    ]
    order = ("grave", "mind", "fine")
    return sorted(found, key=lambda warned: order.index(warned.level))


def _about_the_run(material: Material) -> Iterable[Warned]:
    if material.note:
        yield Warned("grave", f"{plain(material.note)}: the figures say nothing about real X-rays.", "data")
    status = words(material.manifest.get("status")) or "unknown"
    if status != "finished":
        error = words(material.manifest.get("error"))
        told = f"This run is {status}, not finished" + (f": {error}" if error else ".")
        yield Warned("grave", plain(told, longest=300), "cost")
    for name in (name for name in material.wanted if name not in material.models):
        error = words(at(material.stages, f"train-{name}", "error"))
        told = f"{title_of(name)} was not measured" + (f": {error}" if error else ".")
        yield Warned("grave", plain(told, longest=300), "cost")
    if at(material.spec, "backbone", "weights") == "none" and set(PRETRAINED) & set(material.models):
        yield Warned("grave", "The backbone began with random weights: nothing is transferred from it.", "provenance")


def _about_the_data(material: Material) -> Iterable[Warned]:
    allowed = at(material.spec, "audit", "allow")
    allowed = [name for name in allowed if isinstance(name, str)] if isinstance(allowed, list) else []
    for finding in mappings(material.audit.get("findings")):
        name, n = words(finding.get("name")), number(finding.get("count")) or 0
        if name in allowed:
            yield Warned("grave", f"A leak was allowed by name: {plain(name)} ({n:,.0f} found).", "data")
        elif finding.get("severity") == "error":
            yield Warned("grave", f"The audit found an error: {plain(name)} ({n:,.0f}).", "data")
    minor = [
        words(finding.get("name"))
        for finding in mappings(material.audit.get("findings"))
        if finding.get("severity") == "warning" and finding.get("name") not in allowed
    ]
    if minor:
        yield Warned("mind", plain(f"The audit of the data warns of {joined(minor)}.", longest=300), "data")
    if "audit" in material.missing:
        yield Warned("mind", plain(f"The data were not audited: {material.missing['audit']}"), "data")


def _about_the_choice(material: Material) -> Iterable[Warned]:
    for model, others in unbeaten(material, CHOICE).items():
        yield Warned("mind", plain(f"On {CHOICE}, {_not_beaten(model, others)}", longest=300), "uncertainty")
    if material.metrics.get("chosen_on") == CHOICE:
        told = "Thresholds come from the validation images, which also steered the training: their figures flatter."
        yield Warned("mind", told, "points")


def _about_shift(material: Material) -> Iterable[Warned]:
    shift = mapping(material.metrics.get("shift"))
    differ = [label for label, one in shift.items() if at(one, "verdict") == "differ"]
    if differ:
        told = f"Test images differ from training images ({joined(differ)}): expect other figures elsewhere too."
        yield Warned("mind", plain(told), "shift")
    if reason := words(shift.get("reason")):
        yield Warned("mind", plain(f"Whether test images differ from training images is not known: {reason}"), "shift")
    fell = [
        f"{name}'s {figure}"
        for name, moved in mapping(material.metrics.get("moved")).items()
        for figure in ("sensitivity", "specificity")
        if at(moved, figure, "verdict") == "fell"
    ]
    if fell:
        yield Warned("mind", plain(f"From where thresholds were chosen to test, {joined(fell)} fell."), "points")
    unlike = number(at(material.metrics, "not_assessable", "part"))
    if unlike:
        whole = count(at(material.metrics, "not_assessable", "whole"))
        yield Warned("fine", f"{unlike:,.0f} of {whole} test images are unlike the training images.", "shift")


def _about_looks(material: Material) -> Iterable[Warned]:
    looks = number(at(material.metrics, "test_set", "looks"))
    models, specs = (number(at(material.metrics, "test_set", key)) or 0 for key in ("models", "specs"))
    if looks is None:
        if "test" in material.splits:
            yield Warned("mind", "How often these test images were looked at is not known.", "provenance")
        return
    told = (
        f"These test images were scored {counted(looks, 'time')} on this machine by {counted(models, 'model')} of "
        f"{counted(specs, 'configuration')}."
    )
    yield Warned("mind" if specs > 1 else "fine", told, "provenance")
