"""The sections of a report that show how good the models are: curves, calibration, counts, subgroups, intervals.

Owns which of the measured figures stand in which section, as charts and tables, and the one line that stands where one
was not measured. Computes nothing but the points of the precision-recall curve, which no file of a run holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from pneumoscope import _charts
from pneumoscope._report_blocks import (
    UNDEFINED,
    Block,
    Cell,
    Charts,
    Points,
    Reasons,
    Section,
    Table,
    Text,
    Thresholds,
    area,
    area_span,
    count,
    ends_of,
    figure_cell,
    interval_of,
    joined,
    plain,
    share,
    share_span,
    signed,
    threshold,
)
from pneumoscope._report_head import BETTER, WORSE
from pneumoscope._report_material import Floats, Material, Scores, at, mapping, mappings, number, title_of, words
from pneumoscope.errors import UsageError
from pneumoscope.specs import LABELS

MAX_SLIDER_SCORES: Final = 200_000
"""Scores that a page carries for the threshold slider at most: four bytes each, and every move counts them all."""

_MAX_PARTS: Final = 30  # of one division shown; series come from file names and may be thousands
_TREAT: Final = {"treat_all": "treat all", "treat_none": "treat none"}
_HALF: Final = "0.5"


def learning(material: Material) -> Section:
    """Return the learning curves."""
    name, title = "learning", "Learning curves"
    charts: list[Markup] = []
    for model in material.models:
        best = best_epoch(material, model)
        for kind in ("loss", "accuracy"):
            epochs = material.epochs(model, kind)
            if epochs is not None:
                charts += _drawn(
                    _charts.learning_curves, epochs, kind=kind, best_epoch=best,
                    title=f"{plain(title_of(model))}: {kind}",
                )  # fmt: skip
    if not charts:
        return Section(name, title, missing="The run holds no usable tables of loss and accuracy per epoch.")
    lacking = [model for model in material.models if material.epochs(model, "loss") is None]
    missing = f"There are no tables per epoch of {joined(map(plain, lacking))}." if lacking else ""
    return Section(name, title, [Charts(charts)], missing, "The marked epoch's weights were kept.")


def best_epoch(material: Material, model: str) -> int | None:
    """Return the epoch whose weights were kept, as the training noted it.

    Where it left no note: with ``train.schedule = "plateau"`` the last epoch whose validation loss fell by more than
    ``train.min_delta``, else the last whose loss was a number.

    Parameters
    ----------
    material : Material
        With the table of losses.
    model : str
        Which.

    Returns
    -------
    int or None
        None without a table, or where no loss was a number.
    """
    losses = material.epochs(model, "loss")
    if losses is None:
        return None
    noted = number(at(material.stages, f"train-{model}", "best_epoch"))
    if noted is not None:
        return int(noted)
    least, kept = float("inf"), None
    delta = number(at(material.spec, "train", "min_delta")) or 0.0
    steered = at(material.spec, "train", "schedule") != "cosine"
    for epoch, loss in zip(losses["epoch"], losses["val_loss"], strict=True):
        if loss < least - delta if steered else isfinite(loss):
            least, kept = float(loss), int(epoch)
    return kept


def curves(material: Material) -> Section:
    """Return ROC and precision-recall curves, with the operating points on them."""
    name, title = "curves", "ROC and precision-recall curves"
    rocs, recalls = list[Markup](), list[Markup]()
    for split in _shown_splits(material):
        rocs += _roc_chart(material, split)
        recalls += _recall_chart(material, split)
    if not rocs + recalls:
        return Section(name, title, missing="The run holds no usable tables of scores and ROC points.")
    lead = "The marks are the default operating points. Precision moves with the share of PNEUMONIA in a split."
    return Section(name, title, [*_charts_block(rocs), *_charts_block(recalls)], lead=lead)


def precision_recall(scores: Scores) -> tuple[Floats, Floats]:
    """Return recall and precision at every distinct score, from the highest down.

    Parameters
    ----------
    scores : Scores
        Of one split.

    Returns
    -------
    tuple of ndarray of float64, shape (k,)
        Recall, rising, and precision, both in [0, 1]; empty without a PNEUMONIA image.
    """
    order = np.argsort(-scores.scores, kind="stable")
    ranked, truth = scores.scores[order], scores.labels[order]
    total = int(truth.sum())
    if not total:
        return np.empty(0), np.empty(0)
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    hits = np.cumsum(truth)[last].astype(np.float64)
    return hits / total, hits / (last + 1)


def calibration(material: Material) -> Section:
    """Return reliability curves and figures of the calibrated and of the raw scores."""
    name, title, charts, rows = "calibration", "Calibration: are the scores probabilities?", list[Markup](), []
    for split in _shown_splits(material):
        found = {plain(m): bins for m in material.models if (bins := _bins(material.of(m, split)))}
        if found:
            charts += _drawn(_charts.reliability, found, title=f"Reliability, {split} images, calibrated scores")
        for model in material.models:
            after, raw = (mapping(material.of(model, split).get(key)) for key in ("calibration", "calibration_raw"))
            if after:
                keys = ("loss", "brier", "expected_calibration_error")
                figures = [Cell(area(after.get(key)), f"raw {area(raw.get(key))}") for key in keys]
                cox = [Cell(area(after.get(key))) for key in ("slope", "intercept")]
                rows.append([Cell(plain(title_of(model)), split), Cell(area(after.get("temperature"))), *figures, *cox])
    if not rows:
        return Section(name, title, missing="Calibration was not measured.")
    head = ["Model", "Temperature", "Loss", "Brier", "Calibration error", "Slope", "Intercept"]
    table = Table(head, rows, "Calibrated and raw scores; slope 1 and intercept 0 are perfect")
    blocks: list[Block] = [*_charts_block(charts), table]
    return Section(name, title, blocks, lead="On the diagonal, what is said is so. Bars are 95 % intervals (Wilson).")


def counts(material: Material) -> Section:
    """Return the four counts of every model at the operating point, and at 0.5."""
    name, title, charts, rows = "counts", "Right and wrong calls", list[Markup](), []
    for split in _shown_splits(material):
        for model in material.models:
            for part, which in (
                (material.point(model, split), _point_name(material, model, split)),
                (material.of(model, split), _HALF),
            ):
                four = _four(part)
                if four is None:
                    continue
                shown = [Cell(plain(title_of(model)), split), Cell(which, threshold(part.get("threshold")))]
                rows.append([*shown, *(Cell(f"{n:,}") for n in four)])
                if part is material.point(model, split):
                    charts += _drawn(_charts.confusion, *four, title=f"{plain(title_of(model))}: {split}, at {which}")
    if not rows:
        return Section(name, title, missing="The run's metrics.json holds no counts.")
    head = ["Model", "Threshold", "True negatives", "False positives", "False negatives", "True positives"]
    lead = "A false negative is a PNEUMONIA image called NORMAL, a false positive a NORMAL image called PNEUMONIA."
    table = Table(head, rows, "Counts at the operating point and at 0.5")
    return Section(name, title, [*_charts_block(charts), table], lead=lead)


def points(material: Material) -> Section:
    """Return all operating points on the images they were chosen on and on test, and the threshold slider."""
    name, title = "points", "Operating points, and how far they moved"
    wanted = (words(material.metrics.get("chosen_on")) or "validation", "test")
    splits = [split for split in wanted if split in material.splits] or material.splits
    rows, reasons = [], Reasons()
    for model in material.models:
        names = [_HALF, *mapping(material.of(model, splits[0]).get("operating_points"))]
        for point in names:
            parts = [_at_point(material, model, split, point) for split in splits]
            cells = [Cell(plain(title_of(model)), plain(point)), Cell(threshold(parts[0].get("threshold")))]
            for split, part in zip(splits, parts, strict=True):
                reasons.note(material.of(model, split), "sensitivity", "specificity")
                cells += [figure_cell(part, key) for key in ("sensitivity", "specificity")]
                cells += [Cell(f"{count(part.get('false_negatives'))} / {count(part.get('false_positives'))}")]
            rows.append(cells)
    per = ["Sensitivity", "Specificity", "FN / FP"]
    above = [("", 2), *((split.capitalize(), len(per)) for split in splits)]
    table = Table(["Model", "Threshold", *(per * len(splits))], rows, "Operating points", above, [*reasons.found])
    moved = [
        f"{model}: {sentence}"
        for model, found in mapping(material.metrics.get("moved")).items()
        if (sentence := words(at(found, "sentence")))
    ]
    blocks: list[Block] = [table, *([Points(moved)] if moved else []), Thresholds(_why_no_slider(material))]
    blocks += _charts_block(_histograms(material, splits[-1]))
    return Section(name, title, blocks, lead="An image is called PNEUMONIA when its score is above the threshold.")


def slider_scores(material: Material) -> dict[str, dict[str, Scores]]:
    """Return the scores for the threshold slider, by model and split; empty where there are none or too many.

    Parameters
    ----------
    material : Material
        With the tables of scores.

    Returns
    -------
    dict of str to (dict of str to Scores)
    """
    found = {
        model: {split: scores for split in material.splits if (scores := material.scores(model, split)) is not None}
        for model in material.models
    }
    total = sum(len(scores.labels) for parts in found.values() for scores in parts.values())
    return {} if total > MAX_SLIDER_SCORES else {model: parts for model, parts in found.items() if parts}


def subgroups(material: Material) -> Section:
    """Return the figures of parts of a split: subtype, series, size."""
    name, title, blocks, cut = "subgroups", "Subgroups", list[Block](), False
    split = _last_split(material)
    divisions: dict[str, dict[str, None]] = {}
    for model in material.models:
        for division, parts in mapping(material.of(model, split).get("subgroups")).items():
            divisions.setdefault(division, {}).update(dict.fromkeys(mapping(parts)))
    for division, values in divisions.items():
        shown = list(values)[:_MAX_PARTS]
        cut = cut or len(values) > len(shown)
        blocks += [_subgroup_table(material, split, division, shown)]
        blocks += _charts_block(
            [
                chart
                for figure in ("sensitivity", "specificity")
                for chart in _subgroup_chart(material, split, division, shown, figure)
            ]
        )
    if not blocks:
        return Section(name, title, missing="No subgroups were measured: these images fall into one part only.")
    missing = f"Only the first {_MAX_PARTS} parts of each division are shown; metrics.csv has all." if cut else ""
    lead = f"On {split} images, at the default operating point. A part of few images has a wide interval."
    return Section(name, title, blocks, missing, lead)


def decision(material: Material) -> Section:
    """Return the decision curves."""
    name, title, charts = "decision", "Decision curves: is acting on the model worth it?", list[Markup]()
    for split in _shown_splits(material):
        thresholds: list[Any] = []
        drawn: dict[str, list[Any]] = {}
        for model in material.models:
            curve = mapping(material.of(model, split).get("decision_curve"))
            thresholds = thresholds or _listed(curve.get("thresholds"))
            for key, called in (("net_benefit", plain(model)), *_TREAT.items()):
                if values := _listed(curve.get(key)):
                    drawn[called] = values
        if thresholds and drawn:
            order = sorted(drawn, key=lambda called: called in _TREAT.values())
            ordered = {called: drawn[called] for called in order}
            charts += _drawn(_charts.decision_curve, thresholds, ordered, title=f"Net benefit, {split} images")
    if not charts:
        return Section(name, title, missing="No decision curve was computed.")
    lead = (
        "Where a model's line is the highest, acting on it beats treating everybody and treating nobody, for someone "
        "who would act from that probability on."
    )
    return Section(name, title, [Charts(charts)], lead=lead)


def uncertainty(material: Material) -> Section:
    """Return intervals by formula and by patient, all comparisons, and what the prediction sets did."""
    name, title = "uncertainty", "How sure the figures are"
    rows, bars = [], []
    for index, model in enumerate(material.scored):
        for split in _shown_splits(material):
            whole = material.of(model, split)
            ends = interval_of(whole, "auc")
            bars.append((f"{plain(model)}, {split}", number(whole.get("auc")), *(ends or (None, None)), index))
            rows.append([Cell(plain(title_of(model)), split), *_both_intervals(whole, material.point(model, split))])
    charts = _drawn(_charts.intervals, bars, title="AUC with 95 % intervals", minimum=None, maximum=1.0)
    head = ["Model", "AUC", "DeLong", "By patient", "Sensitivity", "Wilson", "By patient", "Specificity", "Wilson"]
    table = Table([*head, "By patient"], rows, "95 % intervals: each image by itself, or by patient")
    blocks: list[Block] = [*_charts_block(charts), table]
    blocks += [found for split in _shown_splits(material) if (found := _compared(material, split)) is not None]
    compared = any(material.comparisons(split) for split in material.splits)
    missing = "" if compared else "Models were not compared in pairs: there was no bootstrap (evaluation.bootstrap)."
    sets = _conformal_table(material)
    blocks += [sets] if sets else [Text("No prediction sets were measured.", "quiet")]
    lead = "Intervals say how much chance there is in these images; they do not cover other hospitals."
    return Section(name, title, blocks, missing, lead)


def shift(material: Material) -> Section:
    """Return whether test images differ from training images, as sets and one by one."""
    name, title, rows, sentences = "shift", "Shift: are the test images of the same kind?", [], []
    found = mapping(material.metrics.get("shift"))
    for label, one in found.items():
        if not isinstance(one, Mapping):
            continue
        sentences += [said] if (said := words(one.get("sentence"))) else []
        if number(one.get("auc")) is not None:
            n = " and ".join(count(value) for value in _listed(one.get("n")))
            auc = Cell(area(one.get("auc")), area_span(ends_of(one.get("interval"))))
            verdict = Cell(words(one.get("verdict")))
            rows.append([Cell(plain(label)), Cell(n), auc, Cell(area(one.get("p_value"))), verdict])
    sentences += [said] if (said := words(at(material.metrics, "not_assessable", "sentence"))) else []
    if not sentences:
        return Section(name, title, missing=words(found.get("reason")) or "Shift was not measured.")
    head = ["Label", "Images compared", "AUC between the sets", "p", "Verdict"]
    table = Table(head, rows, "A classifier tries to tell test from training images; 0.5 is guessing")
    return Section(name, title, [*([table] if rows else []), Points(sentences)], missing=words(found.get("reason")))


# --- parts -----------------------------------------------------------------------------------------------------------


def _drawn(draw: Callable[..., Markup], *args: Any, **options: Any) -> list[Markup]:
    """Draw a chart; figures that do not fit each other, as in a damaged file, leave it out."""
    try:
        return [draw(*args, **options)]
    except UsageError:
        return []


def _charts_block(charts: Sequence[Markup]) -> list[Charts]:
    return [Charts(charts)] if charts else []


def _shown_splits(material: Material) -> list[str]:
    return [split for split in ("validation", "test") if split in material.splits] or material.splits


def _last_split(material: Material) -> str:
    return material.shown_split


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _roc_chart(material: Material, split: str) -> list[Markup]:
    rocs, points = {}, {}
    for model in material.models:
        shown, point = plain(model), material.point(model, split)
        if (rates := material.roc(model, split)) is None:
            continue
        rocs[shown] = (*rates, number(material.of(model, split).get("auc")))
        sensitivity, specificity = number(point.get("sensitivity")), number(point.get("specificity"))
        if sensitivity is not None and specificity is not None:
            points[shown] = (1 - specificity, sensitivity)
    return _drawn(_charts.roc, rocs, title=f"ROC, {split} images", points=points) if rocs else []


def _recall_chart(material: Material, split: str) -> list[Markup]:
    curves = {
        plain(model): (*precision_recall(scores), number(material.of(model, split).get("average_precision")))
        for model in material.models
        if (scores := material.scores(model, split)) is not None
    }
    title, prevalence = f"Precision and recall, {split} images", _prevalence(material, split)
    return _drawn(_charts.precision_recall, curves, title=title, prevalence=prevalence) if curves else []


def _prevalence(material: Material, split: str) -> float | None:
    for model in material.models:
        n, sick = (number(material.of(model, split).get(key)) for key in ("n", "n_positive"))
        if n and sick is not None:
            return sick / n
    return None


def _bins(whole: Mapping[str, Any]) -> tuple[npt.NDArray[np.float64], ...] | None:
    """Return the columns of a reliability curve: said, so, low, high, n; None without bins."""
    columns: list[list[float]] = []
    for one in mappings(at(whole, "calibration", "bins")):
        ends = ends_of(one.get("interval")) or (None, None)
        said, so, n = (number(one.get(key)) for key in ("mean_probability", "share_positive", "n"))
        columns.append([float("nan") if value is None else value for value in (said, so, *ends, n)])
    return tuple(np.array(column) for column in zip(*columns, strict=True)) if columns else None


def _point_name(material: Material, model: str, split: str) -> str:
    return plain(words(material.point(model, split).get("name")) or _HALF)


def _at_point(material: Material, model: str, split: str, point: str) -> Mapping[str, Any]:
    whole = material.of(model, split)
    return whole if point == _HALF else mapping(at(whole, "operating_points", point))


def _four(part: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    keys = ("true_negatives", "false_positives", "false_negatives", "true_positives")
    found = [number(part.get(key)) for key in keys]
    tn, fp, fn, tp = (-1 if value is None else int(value) for value in found)
    return None if min(tn, fp, fn, tp) < 0 else (tn, fp, fn, tp)


def _histograms(material: Material, split: str) -> list[Markup]:
    charts = []
    for model in material.models:
        if (scores := material.scores(model, split)) is not None:
            at_point = number(material.point(model, split).get("threshold"))
            title = f"{plain(title_of(model))}: scores of {split} images"
            charts += _drawn(_charts.score_histogram, scores.scores, scores.labels, threshold=at_point, title=title)
    return charts


def _why_no_slider(material: Material) -> str:
    if slider_scores(material):
        return ""
    if any(material.scores(model, split) is not None for model in material.models for split in material.splits):
        return f"There is no threshold slider: this run has more than {MAX_SLIDER_SCORES:,} scores."
    return "There is no threshold slider: the run holds no usable tables of scores."


def _subgroup_table(material: Material, split: str, division: str, values: Sequence[str]) -> Table:
    rows = []
    for value in values:
        for model in material.models:
            part = mapping(at(material.of(model, split), "subgroups", division, value))
            point = mapping(next(iter(mapping(part.get("operating_points")).values()), part))
            wrong = f"{count(point.get('false_negatives'))} / {count(point.get('false_positives'))}"
            size = f"{count(part.get('n_positive'))} / {count(part.get('n_negative'))}"
            figures = [figure_cell(point, key) for key in ("sensitivity", "specificity")]
            rows.append([Cell(plain(value), plain(model)), Cell(size), figure_cell(part, "auc"), *figures, Cell(wrong)])
    head = [plain(division).capitalize(), "PNEUMONIA / NORMAL", "AUC", "Sensitivity", "Specificity", "FN / FP"]
    return Table(head, rows, f"By {plain(division)}", notes=[f"{UNDEFINED} a part holds images of one label only."])


def _subgroup_chart(material: Material, split: str, division: str, values: Sequence[str], figure: str) -> list[Markup]:
    rows = []
    for value in values:
        for index, model in enumerate(material.models):
            part = mapping(at(material.of(model, split), "subgroups", division, value))
            point = mapping(next(iter(mapping(part.get("operating_points")).values()), part))
            if (found := number(point.get(figure))) is not None:
                ends = interval_of(point, figure) or (None, None)
                rows.append((f"{plain(value)}, {plain(model)}", found, *ends, index))
    return _drawn(_charts.intervals, rows, title=f"{figure.capitalize()} by {plain(division)}") if rows else []


def _both_intervals(whole: Mapping[str, Any], point: Mapping[str, Any]) -> list[Cell]:
    of_auc = (whole.get("auc_interval"), at(whole, "group_intervals", "auc"))
    cells = [Cell(area(whole.get("auc"))), *(Cell(area_span(ends_of(one)) or UNDEFINED) for one in of_auc)]
    for figure in ("sensitivity", "specificity"):
        both = (at(point, "intervals", figure), at(point, "group_intervals", figure))
        cells += [Cell(share(point.get(figure))), *(Cell(share_span(ends_of(one)) or UNDEFINED) for one in both)]
    return cells


def _compared(material: Material, split: str) -> Table | None:
    """Return every model with every other; None where they were not compared."""
    rows, reasons = [], Reasons()
    for one in material.comparisons(split):
        first, second = plain(one.get("first", "")), plain(one.get("second", ""))
        areas = [Cell(area(at(one, "auc", which))) for which in ("first", "second")]
        ends = ends_of(one.get("auc_by_group"))
        gain = Cell(signed(at(one, "auc", "difference")), "" if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}")
        reasons.note(one, "p_adjusted")
        verdict = words(one.get("verdict"))
        told = f"{first} is {verdict}" if verdict in (BETTER, WORSE) else verdict
        rows.append([Cell(f"{first}, {second}"), *areas, gain, Cell(area(one.get("p_adjusted"))), Cell(told)])
    if not rows:
        return None
    head = ["First, second", "AUC of first", "AUC of second", "Difference", "p, adjusted", "Verdict"]
    note = "Difference with its 95 % interval by patient; p is the larger of two tests, adjusted for all pairs (Holm)."
    return Table(head, rows, f"Every model with every other, {split} images", notes=[note, *reasons.found])


def _conformal_table(material: Material) -> Table | None:
    rows = []
    for model in material.models:
        for split in _shown_splits(material):
            found = mapping(material.of(model, split).get("conformal"))
            if not found:
                continue
            parts = [at(found, "coverage"), *(at(found, "coverage_by_label", label) for label in LABELS)]
            parts += [found.get(key) for key in ("single", "both", "empty")]
            cells = [Cell(share(at(one, "value")), share_span(ends_of(at(one, "interval")))) for one in parts]
            rows.append([Cell(plain(title_of(model)), split), Cell(share(at(found, "rule", "coverage"))), *cells])
    if not rows:
        return None
    head = ["Model", "Wanted", "Coverage", "of NORMAL", "of PNEUMONIA", "One label", "Both", "None"]
    notes = ["A set that holds both labels says: this model cannot tell. Shift voids the promise; so it is measured."]
    return Table(head, rows, "Prediction sets: how often they hold the true label (conformal)", notes=notes)
