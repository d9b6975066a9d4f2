"""Charts for a page: pure functions from finished numbers to one inline SVG each.

Owns scales, axes, legends, thinning and what a screen reader is told. A chart is 400 units wide, as high as it needs,
and its letters are 13 units high, 11 px on a phone; where there is room, the page may make them smaller by
``.chart { font-size }``. Colours are the page's: ``--c0`` to ``--c4`` for series, ``--ink``, ``--muted``, ``--grid``,
``--paper``; dashes and shapes tell series apart too. Titles and names may be any text: they are cleaned, shortened and
escaped. What is undefined (None, NaN, infinite) leaves a gap. Computes no figure of merit; knows no files, and no page.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from pneumoscope.errors import UsageError
from pneumoscope.specs import LABELS

Floats = npt.NDArray[np.float64]
Numbers = Sequence[float | None] | npt.NDArray[Any]
"""What a curve may come as; None for what is undefined, as in JSON."""
Curve = tuple[Numbers, Numbers, float | None]
Row = tuple[str, float | None, float | None, float | None, int]
Pair = tuple[float, float]
Kind = Literal["loss", "accuracy"]
_Value = TypeVar("_Value", float, Floats)

_WIDTH, _LEFT, _INNER, _FONT = 400, 44, 344, 13  # what is inside the axes begins and ends so far from the left
_MOST_POINTS, _TOLERANCE = 300, 0.2  # with digits cut, off by 0.27 units, 0.43 px in 640; more only where 300 are few
_DASHES: Final = ("", "7 3", "2 2.5", "10 3 2 3", "4 2")
# Corners around the middle of a marker with radius 1; the first is a circle.
_SHAPES: Final = ((), ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)), ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
                  ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)), ((0, 1.3), (1.2, -0.9), (-1.2, -0.9)))  # fmt: skip
_REFERENCE: Final = -1  # the index of a line to compare with, thin and grey; a second one is -2
_INK, _MUTED, _GRID, _PAPER = "var(--ink)", "var(--muted)", "var(--grid)", "var(--paper)"
_ONE_CLASS = "Undefined: there is no curve, because one of the two classes has no image."
_UNIT = np.array([0.0, 1.0])


def learning_curves(epochs: Mapping[str, Numbers], *, kind: Kind, best_epoch: int | None, title: str) -> Markup:
    """Draw loss or accuracy over the epochs, training and validation.

    Parameters
    ----------
    epochs : mapping of str to sequence of float
        ``epoch`` (from 1), ``train_<kind>`` and ``val_<kind>``, shape (k,); losses 0 or more, accuracies in [0, 1].
    kind, best_epoch, title
        What is drawn; the epoch whose weights were kept, marked by a line; any text.

    Raises
    ------
    UsageError
        Where a column is missing or the columns differ in length.
    """
    keys = ("epoch", f"train_{kind}", f"val_{kind}")
    if missing := [key for key in keys if key not in epochs]:
        raise UsageError(f"The epochs lack {', '.join(missing)}; pass the columns {', '.join(keys)}.")
    x, train, val = _columns("epochs", *(epochs[key] for key in keys))
    seen = np.concatenate([values[np.isfinite(x + values)] for values in (train, val)])
    if not len(seen):
        return _empty(title, "No epoch was recorded.")
    bottom, top = (0.0, float(seen.max()) * 1.04 or 1.0) if kind == "loss" else (seen.min() - 0.025, 1.0)
    bottom = max(0.0, math.floor(bottom * 20) / 20)  # the next 0.05 below, so that equal curves stay readable
    curves = {"training": train, "validation": val}
    chart = _Chart(title, [(name, at, "both") for at, name in enumerate(curves)])
    chart.frame((np.nanmin(x) - 0.5, np.nanmax(x) + 0.5), (bottom, max(top, bottom + 0.05)), height=190)
    chart.axes("Epoch", kind.capitalize(), whole=True)
    chart.upright(best_epoch, f"best epoch {best_epoch}", y=chart.top + 14 if kind == "loss" else chart.foot - 8)
    for at, values in enumerate(curves.values()):
        chart.line(x, values, at, markers=len(x) <= 30)
    said = [f"{name} from {_shown(values[0])} to {_shown(values[-1])}" for name, values in curves.items()]
    kept = [] if best_epoch is None else [f"the weights of epoch {best_epoch} were kept"]
    return chart.done(f"{kind.capitalize()} over {len(x)} epochs", said + kept)


def roc(curves: Mapping[str, Curve], *, title: str, points: Mapping[str, Pair] | None = None) -> Markup:
    """Draw ROC curves; where every AUC is above 0.95, with the upper left corner enlarged.

    Parameters
    ----------
    curves : mapping of str to (fpr, tpr, auc)
        By name; rates of shape (k,) in [0, 1], rising; an `auc` of None is called undefined.
    title, points
        Any text; operating points by name, (fpr, tpr) in [0, 1]: one with the name of a curve gets its colour.

    Raises
    ------
    UsageError
        Where the rates of a curve differ in length.
    """
    rates = {name: _columns(name, *curve[:2]) for name, curve in curves.items()}
    if not any(np.isfinite(fpr + tpr).any() for fpr, tpr in rates.values()):
        return _empty(title, _ONE_CLASS)
    marks = {name: point for name, point in (points or {}).items() if np.isfinite(_numbers(point)).all()}
    index = {name: at for at, name in enumerate(dict.fromkeys([*rates, *marks]))}
    legend = [(f"{name}: AUC {_shown(curve[2], '{:.4f}')}", index[name], "line") for name, curve in curves.items()]
    legend += [(f"{n}: sensitivity {y:.3f}, specificity {1 - x:.3f}", index[n], "mark") for n, (x, y) in marks.items()]
    chart = _Chart(title, legend)
    chart.frame((0, 1), (0, 1), height=_INNER)
    chart.axes("False positive rate (1 − specificity)", "Sensitivity (true positive rate)")
    chart.line(_UNIT, _UNIT, _REFERENCE)
    closer = all((_number(curve[2]) or 0) > 0.95 for curve in curves.values())
    for zoomed in (False, True) if closer else (False,):
        if zoomed:  # such a curve keeps out of the inset: where it came in, it would lose 0.28 * 0.25 of its area
            chart.box(chart.left, chart.top, 0.2 * _INNER, 0.2 * _INNER, stroke=_MUTED, stroke_dasharray="3 2")
            left, top, side = chart.at_x(0.4), chart.at_y(0.67), 0.57 * _INNER
            chart.box(left - 38, top - 25, side + 46, side + 45, fill=_PAPER, stroke=_GRID)
            chart.frame((0, 0.2), (0.8, 1), left=left, top=top, width=side, height=side)
            chart.axes("", "The corner, enlarged")
        for name, rate in rates.items():
            chart.line(rate[0], rate[1], index[name])
        for name, (x, y) in marks.items():
            chart.mark(x, y, index[name])
    return chart.done("ROC curves", [text for text, *_ in legend])


def precision_recall(curves: Mapping[str, Curve], *, title: str, prevalence: float | None) -> Markup:
    """Draw precision over recall in steps, so that the area under a curve is its average precision.

    Parameters
    ----------
    curves : mapping of str to (recall, precision, average_precision)
        By name; of shape (k,) in [0, 1], recall falling or rising; an `average_precision` of None is called undefined.
    title, prevalence
        Any text; the share of PNEUMONIA in [0, 1], which is the precision of scores that tell nothing, or None.

    Raises
    ------
    UsageError
        Where recall and precision of a curve differ in length.
    """
    pairs = {name: _columns(name, *curve[:2]) for name, curve in curves.items()}
    seen = np.concatenate([y[np.isfinite(x + y)] for x, y in pairs.values()] or [_UNIT[:0]])
    if not len(seen):
        return _empty(title, _ONE_CLASS)
    chance = _numbers([prevalence, prevalence])
    legend = [(f"{name}: average precision {_shown(curve[2], '{:.4f}')}", at, "line")
              for at, (name, curve) in enumerate(curves.items())]  # fmt: skip
    legend += [(f"share of {LABELS[1]}: {_shown(prevalence)}", _REFERENCE, "line")]
    chart = _Chart(title, legend)
    lowest = float(np.nanmin([*seen, *chance]))
    chart.frame((0, 1), (max(0.0, math.floor(lowest * 10 - 0.5) / 10), 1), height=260)
    chart.axes("Recall (sensitivity)", "Precision (positive predictive value)")
    chart.line(_UNIT, chance, _REFERENCE)
    for at, (recall, precision) in enumerate(pairs.values()):
        order = slice(None, None, -1) if len(recall) and recall[0] > recall[-1] else slice(None)
        # the precision at a recall holds for all of the recall since the point before, or since 0
        chart.line(np.repeat(np.append(0.0, recall[order]), 2)[1:-1], np.repeat(precision[order], 2), at)
    return chart.done("Precision over recall", [text for text, *_ in legend])


def reliability(curves: Mapping[str, tuple[Numbers, Numbers, Numbers, Numbers, Numbers]], *, title: str) -> Markup:
    """Draw what probabilities said against what was so, with intervals; larger marks stand for more images.

    Parameters
    ----------
    curves, title
        By name (mean_predicted, observed, low, high, n), each of shape (bins,): four in [0, 1], with None where a bin
        has no interval, and the number of images. Any text.

    Raises
    ------
    UsageError
        Where the columns of a curve differ in length.
    """
    bins = {name: _columns(name, *curve) for name, curve in curves.items()}
    bins = {name: [one[np.isfinite(found[0] + found[1])] for one in found] for name, found in bins.items()}
    if not any(len(said) for said, *_ in bins.values()):
        return _empty(title, "No image was scored.")
    chart = _Chart(title, [(name, at, "both") for at, name in enumerate(bins)])
    chart.frame((0, 1), (0, 1), height=_INNER)
    chart.axes(f"Probability of {LABELS[1]}, as said", f"Share of {LABELS[1]}, as it was")
    chart.line(_UNIT, _UNIT, _REFERENCE)
    told = []
    for at, (name, (said, so, low, high, n)) in enumerate(bins.items()):
        chart.line(said, so, at)
        for x, y, start, end, count in zip(said, so, low, high, np.nan_to_num(n), strict=True):
            if math.isfinite(start + end):
                path = f"M{_n(chart.at_x(x))} {_n(chart.at_y(start))}V{_n(chart.at_y(end))}"
                chart.path(path, stroke=_colour(at), stroke_width=1.2)
            chart.mark(x, y, at, radius=3 + 3 * math.sqrt(max(0, count) / max(1, np.nanmax(n, initial=1))))
        if len(said):
            worst = int(np.abs(said - so).argmax())
            told += [f"{name}: the widest gap is where {said[worst]:.2f} was said and {so[worst]:.2f} was so"]
    return chart.done("Reliability", told)


def decision_curve(thresholds: Numbers, curves: Mapping[str, Numbers], *, title: str) -> Markup:
    """Draw the net benefit of acting on models, of acting always and of acting never; cut off far below 0.

    Parameters
    ----------
    thresholds : sequence of float, shape (k,)
        Probabilities above which one would act, in [0, 1).
    curves, title
        By name, shape (k,), in true positives per image, 1 or less: what starts with ``treat`` is thin. Any text.

    Raises
    ------
    UsageError
        Where a curve and the thresholds differ in length.
    """
    drawn = {name: _columns(name, thresholds, curve) for name, curve in curves.items()}
    seen = np.concatenate([y[np.isfinite(x + y)] for x, y in drawn.values()] or [_UNIT[:0]])
    if not len(seen):
        return _empty(title, "No net benefit was computed.")
    others = [name for name in drawn if name.lower().startswith("treat")]
    models = [name for name in drawn if name not in others]
    index = {name: at for at, name in enumerate(models)} | {name: -1 - at for at, name in enumerate(others)}
    top = max(0.05, float(seen.max()))
    chart = _Chart(title, [(name.replace("_", " "), at, "line") for name, at in index.items()])
    chart.frame((0, 1), (max(min(0.0, float(seen.min())), -0.15 * top), top * 1.05), height=220)
    chart.axes("Probability above which one would act", "Net benefit (true positives per image)")
    for name, at in reversed(index.items()):
        chart.line(drawn[name][0], drawn[name][1], at)
    x, told = _numbers(thresholds), []
    for near in dict.fromkeys(int(np.nanargmin(np.abs(x - wanted))) for wanted in (0.1, 0.25, 0.5)):
        told += [f"at {x[near]:.2f} " + ", ".join(f"{name} {_shown(drawn[name][1][near])}" for name in index)]
    return chart.done("Net benefit", told)


def score_histogram(scores: Numbers, labels: Numbers, *, threshold: float | None, title: str) -> Markup:
    """Draw how many images got which score, PNEUMONIA upward and NORMAL downward.

    Parameters
    ----------
    scores, labels : sequence, shape (n,)
        Scores in [0, 1]; labels 0 (NORMAL) or 1 (PNEUMONIA). Counts that differ by more than 20 times are logarithmic.
    threshold, title
        Above it an image is called PNEUMONIA, it is marked and errors are counted; None for no threshold. Any text.

    Raises
    ------
    UsageError
        Where scores and labels differ in length, a score is not in [0, 1], or a label not 0 or 1.
    """
    values, truth = _columns("the scores", scores, labels)
    values, truth = (one[np.isfinite(values + truth)] for one in (values, truth))
    if not len(values):
        return _empty(title, "No image was scored.")
    if values.min() < 0 or values.max() > 1 or not np.isin(truth, (0, 1)).all():
        raise UsageError(f"Scores reach from {values.min():g} to {values.max():g} and labels from {truth.min():g} to "
                         f"{truth.max():g}; pass scores in [0, 1] and labels that are 0 or 1.")  # fmt: skip
    edges, cut, told, counts = np.linspace(0, 1, 41), _number(threshold), [], []
    for label, wrong in ((1, "false negatives"), (0, "false positives")):
        mine = values[truth == label]
        errors = "" if cut is None else f", {int(((mine > cut) != bool(label)).sum()):,} {wrong}"
        told += [f"{LABELS[label]}: {len(mine):,} images{errors}"]
        counts += [np.histogram(mine, edges)[0].astype(np.float64)]
    every = np.concatenate(counts)
    steep = every.max() > 20 * every[every > 0].min(initial=np.inf)
    ticks = [0, *10.0 ** np.arange(1, 1 + int(math.log10(every.max())))] if steep else [*_ticks(0, every.max(), 3)]
    scale = np.log1p if steep else np.positive
    chart = _Chart(title, [(text, label, "mark") for text, label in zip(told, (1, 0), strict=True)])
    highest = max(1.0, float(scale(every.max()))) * 1.25
    chart.frame((0, 1), (-highest, highest), height=240)
    named = {sign * float(scale(tick)): f"{tick:,.0f}" for tick in ticks if tick == int(tick) for sign in (1, -1)}
    chart.axes("Score", "Images (logarithmic)" if steep else "Images", y_ticks=named)
    zero = _n(chart.at_y(0))
    for index, heights in ((1, scale(counts[0])), (0, -scale(counts[1]))):
        tops = zip(chart.at_x(edges[:-1]) + 0.5, chart.at_x(edges[1:]) - 0.5, chart.at_y(heights), strict=True)
        path = "".join(f"M{_n(a)} {zero}V{_n(y)}H{_n(b)}V{zero}z" for a, b, y in tops if _n(y) != zero)
        chart.path(path, fill=_colour(index))
    chart.path(f"M{_n(chart.left)} {zero}h{_n(chart.width)}", stroke=_INK)
    chart.upright(cut, f"threshold {_shown(cut)}", y=chart.top + 14)
    for text, y in ((f"▲ {LABELS[1]}", chart.top + 32), (f"▼ {LABELS[0]}", chart.foot - 8)):
        chart.text(_LEFT + _INNER / 2, y, text, text_anchor="middle", halo=True)
    return chart.done(f"Scores{'' if cut is None else f', {LABELS[1]} above {cut:.3f}'}", told)


def intervals(rows: Sequence[Row], *, title: str, minimum: float | None = None, maximum: float | None = 1.0) -> Markup:
    """Draw figures with their intervals, one below the other.

    Parameters
    ----------
    rows : sequence of (label, value, low, high, index)
        Without an interval `low` and `high` are None; `index`, 0 or more, chooses colour and marker.
    title, minimum, maximum
        Any text; ends of the scale: where None, and where a figure lies beyond, the figures decide.
    """
    figures = [[_number(one) for one in row[1:4]] for row in rows]
    known = [one for row in figures for one in row if one is not None]
    if not known:
        return _empty(title, "No figure is defined.")
    span = max(known) - min(known) or 0.1
    low = min(known) - 0.04 * span if minimum is None else min(minimum, *known)
    high = max(known) + 0.04 * span if maximum is None else max(maximum, *known)
    said = [_shown(v) + (f" ({a:.3f} to {b:.3f})" if a is not None and b is not None else "") for v, a, b in figures]
    named = [(row[0], text) for row, text in zip(rows, said, strict=True)]
    chart = _Chart(title)
    tops = chart.rows(named, (low, high if high > low else low + span), height=36)
    for y, (*_, index), (value, start, end) in zip(tops, rows, figures, strict=True):
        if start is not None and end is not None:
            ends = f"M{_n(chart.at_x(start))} {_n(y + 21)}v8m0 -4H{_n(chart.at_x(end))}m0 -4v8"
            chart.path(ends, stroke=_colour(index), stroke_width=2)
        if value is not None:
            chart.parts.append(_marker(chart.at_x(value), y + 25, index))
    return chart.done("Figures with intervals", map(": ".join, named))


def bars(groups: Sequence[str], series: Mapping[str, Numbers], *, title: str, unit: str) -> Markup:
    """Draw groups of horizontal bars, each with its figure and, among several, the name of its series.

    Parameters
    ----------
    groups, series, title, unit
        k names; by name, values of shape (k,), None where undefined; any text; and the unit, which stands once, below.

    Raises
    ------
    UsageError
        Where a series does not have one value for each group.
    """
    values = [(name, _columns(name, range(len(groups)), one)[1]) for name, one in series.items()]
    named, drawn = list[tuple[str, str]](), list[tuple[int, float | None]]()
    for at, group in enumerate(groups):
        for index, (name, one) in enumerate(values):
            named += [(f"{group}: {name}" if len(values) > 1 else group, _shown(one[at], "{:,.4g}"))]
            drawn += [(index, _number(one[at]))]
    known = [0.0, *(value for _, value in drawn if value is not None)]
    if len(known) == 1:
        return _empty(title, "There is no value.")
    chart = _Chart(title)
    tops = chart.rows(named, (min(known), max(known) if any(known) else 1.0), height=32, label=unit)
    for y, (index, value) in zip(tops, drawn, strict=True):
        ends = sorted((chart.at_x(0), chart.at_x(value or 0)))
        chart.box(ends[0], y + 18, ends[1] - ends[0], 10, fill=_colour(index))
    return chart.done(f"In {unit}", map(": ".join, named))


def confusion(tn: int, fp: int, fn: int, tp: int, *, title: str) -> Markup:
    """Draw the four counts of a decision, each with its share of the true class, shaded by it.

    Parameters
    ----------
    tn, fp, fn, tp, title
        Images, 0 or more, where PNEUMONIA is the positive class; any text.
    """
    chart = _Chart(title)
    table = (((tn, "true negatives (TN)"), (fp, "false positives (FP)")),
             ((fn, "false negatives (FN)"), (tp, "true positives (TP)")))  # fmt: skip
    y = chart.bottom + 10
    for row, cells in enumerate(table):
        total = sum(count for count, _ in cells)
        chart.text(12, y + 12, f"{total:,} images that are {LABELS[row]}", font_weight="bold")
        for column, (count, name) in enumerate(cells):
            share, x, wrong = count / max(total, 1), 12 + column * 190, row != column
            shade = {"fill": _colour(int(wrong)), "fill_opacity": f"{0.06 + 0.34 * share:.2f}"}
            chart.box(x, y + 20, 186, 76, stroke=_GRID, **shade)
            chart.text(x + 93, y + 37, name, text_anchor="middle", font_weight="bold" if wrong else None)
            chart.text(x + 93, y + 65, f"{count:,}", text_anchor="middle", font_size="1.8em")
            of_row = f"{share:.1%}" if total else "–"
            chart.text(x + 93, y + 86, f"{of_row}, called {LABELS[column]}", text_anchor="middle", font_size="0.92em")
        y += 106
    return chart.done("Counts", [f"{count:,} {name}" for cells in table for count, name in cells], bottom=y - 4)


def timeline(stages: Sequence[tuple[str, float, float | None]], *, title: str) -> Markup:
    """Draw when stages began and ended, one below the other; the first begins at 0.

    Parameters
    ----------
    stages, title
        Of each (name, start_s, end_s): seconds since any common moment, None where a stage did not end. Any text.
    """
    times = [(name, _number(start), _number(end)) for name, start, end in stages]
    known = [one for _, *both in times for one in both if one is not None]
    if not known:
        return _empty(title, "No stage has begun.")
    first, whole = min(known), max(known) - min(known)
    per, unit = (3600, "Hours") if whole >= 7200 else (60, "Minutes") if whole >= 120 else (1, "Seconds")
    named = [(name, "not ended" if a is None or b is None else _duration(b - a)) for name, a, b in times]
    chart = _Chart(title)
    tops = chart.rows(named, (0, (whole or 1) / per), height=32, label=unit)
    for y, (_, start, end) in zip(tops, times, strict=True):
        if start is not None and end is not None:
            x, x_end = (chart.at_x((one - first) / per) for one in (start, end))
            chart.box(x, y + 18, max(x_end - x, 1.5), 9, fill=_colour(0))
    return chart.done(f"{_duration(whole)} in all", map(": ".join, named))


class _Chart:
    """A picture in the making: its parts, and the frame that data are drawn in at the moment."""

    def __init__(self, title: str, legend: Sequence[tuple[str, int, str]] = ()) -> None:
        self.title, self.parts, self.bottom = title, list[Markup](), 4.0
        self.write(title, size=1.1, font_weight="bold")
        x = math.inf
        for label, index, kind in ((_fit(label, _WIDTH - 38), index, kind) for label, index, kind in legend):
            if x + 29 + _span(label) > _WIDTH - 4:
                x, self.bottom = 4.0, self.bottom + 19
            y = self.bottom - 4.5
            if kind != "mark":
                self.stroke(f"M{_n(x)} {_n(y)}h24", index)
            if kind != "line":
                self.parts.append(_marker(x + 12, y, index))
            self.text(x + 29, self.bottom, label)
            x += 43 + _span(label)

    def write(self, text: str, *, size: float = 1, **style: str) -> None:
        """Write a few lines below what is there."""
        words = _clean(text)
        width = max(12, int(len(words) * (_WIDTH - 8) / max(1, size * 1.08 * _span(words))))
        for line in textwrap.wrap(words, width, max_lines=3, placeholder=" …"):
            self.bottom += 18
            self.text(4, self.bottom, line, halo=False, font_size=f"{size}em", **style)

    def frame(
        self, x: Pair, y: Pair, *, height: float, left: float = _LEFT, width: float = _INNER, top: float | None = None
    ) -> None:
        """Say which data lie where; y grows upward in the data and downward in the picture."""
        self.x, self.y, self.left, self.width = x, y, left, width
        self.top = self.bottom + 31 if top is None else top
        self.height, self.foot = height, self.top + height

    def at_x(self, x: _Value) -> _Value:
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * self.width

    def at_y(self, y: _Value) -> _Value:
        return self.foot - (y - self.y[0]) / (self.y[1] - self.y[0]) * self.height

    def axes(self, x_label: str, y_label: str, *, whole: bool = False, y_ticks: dict[float, str] | None = None) -> None:
        """Draw grid, ticks and labels; that of y stands above, where it can be read without turning the head."""
        x_ticks = _ticks(*self.x, self.width / 55, whole=whole)
        y_ticks = _ticks(*self.y, self.height / 36) if y_ticks is None else y_ticks
        lines = [f"M{_n(self.left)} {_n(self.at_y(tick))}h{_n(self.width)}" for tick in y_ticks]
        lines += [f"M{_n(self.at_x(tick))} {_n(self.top)}v{_n(self.height)}" for tick in x_ticks]
        self.path("".join(lines), stroke=_GRID)
        for tick, text in y_ticks.items():
            self.text(self.left - 6, self.at_y(tick) + 4, text, text_anchor="end", font_size="0.92em", fill=_MUTED)
        for tick, text in x_ticks.items():
            self.text(self.at_x(tick), self.foot + 15, text, text_anchor="middle", font_size="0.92em", fill=_MUTED)
        self.text(max(4, self.left - 38), self.top - 11, y_label)
        self.text(self.left + self.width / 2, self.foot + 33, _fit(x_label, self.width), text_anchor="middle")
        self.bottom = max(self.bottom, self.foot + (38 if x_label else 20))

    def rows(self, named: Sequence[tuple[str, str]], x: Pair, *, height: float, label: str = "") -> list[float]:
        """Frame rows that start with a name and a figure, and return where each begins."""
        self.frame(x, (0, 1), top=self.bottom + 10, height=len(named) * height + 2, left=20, width=_WIDTH - 42)
        self.axes(label, "", y_ticks={})
        tops = [self.top + at * height for at in range(len(named))]
        for y, (name, figure) in zip(tops, named, strict=True):
            self.text(self.left, y + 13, _fit(name, self.width - 12 - _span(figure)), halo=True)
            self.text(self.left + self.width, y + 13, figure, text_anchor="end", halo=True)
        return tops

    def line(self, x: Floats, y: Floats, index: int, *, markers: bool = False) -> None:
        """Draw a line inside the frame, broken where a point is undefined; a point without neighbours is a mark."""
        inside = np.flatnonzero((x >= self.x[0]) & (x <= self.x[1]))
        part = slice(max(0, inside[0] - 1), inside[-1] + 2) if len(inside) else slice(0)
        points: Floats = np.column_stack([self.at_x(x[part]), self.at_y(y[part])])
        gaps = np.flatnonzero(~np.isfinite(points).all(axis=1))
        runs = [run[np.isfinite(run).all(axis=1)] for run in np.split(points, gaps)]
        runs = [run if markers else _thinned(np.round(run, 1)) for run in runs if len(run)]
        path = "".join("M" + "L".join(f"{_n(a)} {_n(b)}" for a, b in run) for run in runs if len(run) > 1)
        if (
            path
        ):  # an inner picture cuts off what leaves the frame: a clip path would need a name of its own on the page
            self.stroke(path, index)
            box = {"x": self.left - 1.5, "y": self.top - 1.5, "width": self.width + 3, "height": self.height + 3}
            self.parts.append(_tag("svg", self.parts.pop(), viewBox=" ".join(map(_n, box.values())), **box))
        for a, b in (point for run in runs if markers or len(run) == 1 for point in run):
            self.parts.append(_marker(a, b, index, radius=3.5))

    def mark(self, x: float, y: float, index: int, *, radius: float = 4.5) -> None:
        if self.x[0] <= x <= self.x[1] and self.y[0] <= y <= self.y[1]:
            self.parts.append(_marker(self.at_x(x), self.at_y(y), index, radius=radius))

    def upright(self, x: float | None, text: str, *, y: float) -> None:
        if x is not None and self.x[0] <= x <= self.x[1]:
            at, right = self.at_x(x), self.at_x(x) > self.left + self.width * 0.6
            self.path(f"M{_n(at)} {_n(self.top)}v{_n(self.height)}", stroke=_INK, stroke_dasharray="4 3")
            self.text(at + (-5 if right else 5), y, text, text_anchor="end" if right else None, halo=True)

    def stroke(self, path: str, index: int) -> None:
        dash = _DASHES[(abs(index) + abs(index) // 5) % 5] or None  # colour and dash together repeat after 25 only
        self.path(path, stroke=_colour(index), stroke_width=2.2 if index >= 0 else 1.2, stroke_dasharray=dash)

    def path(self, path: str, **style: str | float | None) -> None:
        self.parts += [_tag("path", d=path, **({"fill": "none"} | style))] * bool(path)

    def box(self, x: float, y: float, width: float, height: float, **style: str | float | None) -> None:
        self.path(f"M{_n(x)} {_n(y)}h{_n(width)}v{_n(height)}h{_n(-width)}z", **style)

    def text(self, x: float, y: float, text: str, *, halo: bool = False, **style: str | float | None) -> None:
        if halo:
            style |= {"stroke": _PAPER, "stroke_width": 4, "stroke_linejoin": "round", "paint_order": "stroke"}
        self.parts += [_tag("text", escape(_clean(text)), x=x, y=y, **style)] * bool(text)

    def done(self, kind: str, told: Iterable[str], *, bottom: float | None = None) -> Markup:
        """Return the picture, with its title and what it shows in words."""
        said = f"{kind}: {'; '.join(told).removesuffix('.')}."
        words = [_tag("title", escape(_clean(self.title))), _tag("desc", escape(_clean(said)))]
        box = f"0 0 {_WIDTH} {_n((self.bottom if bottom is None else bottom) + 2)}"
        return _tag("svg", *words, *self.parts, class_="chart", role="img", viewBox=box, font_size=_FONT, fill=_INK)


def _empty(title: str, reason: str) -> Markup:
    chart = _Chart(title)
    chart.write(reason, fill=_MUTED)
    return chart.done("Nothing to draw", [reason], bottom=chart.bottom + 6)


def _marker(x: float, y: float, index: int, *, radius: float = 4.5) -> Markup:
    if not (shape := _SHAPES[(abs(index) + abs(index) // 5) % 5]):
        return _tag("circle", cx=x, cy=y, r=radius, fill=_colour(index), stroke=_PAPER)
    corners = " ".join(f"{_n(x + radius * dx)},{_n(y + radius * dy)}" for dx, dy in shape)
    return _tag("polygon", points=corners, fill=_colour(index), stroke=_PAPER)


def _tag(name: str, *inside: Markup, **attributes: str | float | None) -> Markup:
    shown = {key.rstrip("_").replace("_", "-"): one for key, one in attributes.items() if one is not None}
    written = "".join(f' {key}="{escape(_n(one))}"' for key, one in shown.items())
    return Markup(f"<{name}{written}>{Markup().join(inside)}</{name}>")


def _colour(index: int) -> str:
    return _MUTED if index < 0 else f"var(--c{index % 5})"


def _n(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def _thinned(points: Floats, tolerance: float = _TOLERANCE) -> Floats:
    """Leave out what straight lines between the other points meet anyway (Douglas and Peucker 1973)."""
    keep, pieces = {0, len(points) - 1}, [(0, len(points) - 1)]
    while pieces:
        first, last = pieces.pop()
        inner, chord = points[first + 1 : last] - points[first], points[last] - points[first]
        along = np.clip(inner @ chord / max(float(chord @ chord), 1e-9), 0, 1)
        away = np.hypot(*(inner - along[:, None] * chord).T)
        if away.max(initial=0.0) > tolerance:
            far = first + 1 + int(away.argmax())
            keep.add(far)
            pieces += [(first, far), (far, last)]
    return _thinned(points, tolerance * 1.4) if len(keep) > _MOST_POINTS else points[sorted(keep)]


def _ticks(low: float, high: float, most: float, *, whole: bool = False) -> dict[float, str]:
    """Return where ticks stand, at most so many steps of 1, 2 or 5 times a power of ten, and what they are called."""
    rough = (high - low) / most * (1 - 1e-9)
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(1.0 if whole else 0.0, next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough))
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    at = np.arange(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1) * step + 0.0
    return {float(x): f"{x:,.{places}f}" if places < 5 and abs(x) < 1e6 else f"{x:.3g}" for x in at}


def _columns(name: str, *columns: Iterable[float | None]) -> list[Floats]:
    """Return columns of numbers, equally long; what is undefined or infinite is NaN."""
    found = [_numbers(column) for column in columns]
    if len(lengths := {len(column) for column in found}) > 1:
        raise UsageError(f"The columns of {_clean(name)} differ in length: {sorted(lengths)}; pass equally long ones.")
    return found


def _numbers(values: Iterable[float | None]) -> Floats:
    try:
        found = np.array([np.nan if one is None else one for one in values], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"A chart got what is no number ({error}); pass numbers, or None where undefined.") from error
    return np.where(np.abs(found) < 1e30, found, np.nan)  # beyond, sums overflow


def _number(value: float | None) -> float | None:
    found = float(_numbers([value])[0])
    return found if math.isfinite(found) else None


def _shown(value: float | None, form: str = "{:.3f}") -> str:
    return "undefined" if _number(value) is None else form.format(value)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if not 60 <= seconds < 1e9 else f"{timedelta(seconds=round(seconds))} h"


def _clean(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())


def _span(text: str) -> float:
    """Estimate how wide a text is, as in DejaVu Sans, the widest of the usual letters."""
    return _FONT * sum(1.05 if unicodedata.east_asian_width(one) in "WF" else 0.34 if one in " .,:;'|!()[]/-ijlftrIJ"
                       else 0.93 if one in "MWmw@%=+<" else 0.7 if one.isupper() else 0.61 for one in text)  # fmt: skip


def _fit(text: str, room: float) -> str:
    """Cut the middle out of what is too long: beginning and end tell names apart."""
    text = _clean(text)
    kept = max(2, int(len(text) * room / max(1.0, _span(text))) - 2)
    return text if _span(text) <= room else f"{text[: kept // 2]}…{text[-(kept // 2) :]}"
