"""Pictures of results: curves, matrices, sample grids and class distributions, and how they are saved.

Owns colours, type sizes, legends and the line that every figure carries in its lower margin. Computes nothing: it
receives finished numbers and pictures, and knows nothing of runs, models or file names of a run.

Figures are plain matplotlib objects made without pyplot, so nothing global is opened that somebody must close, and
threads and batch jobs without a display are safe. In a notebook a figure that is the last line of a cell shows
itself, once, whether or not pyplot was imported (figures made through pyplot show twice there). To open a window
instead, draw into your own axes: ``fig, ax = plt.subplots(); loss_curve(history, title="cnn", ax=ax); plt.show()``.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from pneumoscope import evidence
from pneumoscope._files import replacing
from pneumoscope.errors import UsageError
from pneumoscope.specs import RESEARCH_USE

if TYPE_CHECKING:  # only the type: drawing a curve needs none of what computing one needs
    from pneumoscope.metrics import RocCurve


MAX_PAIRS = 12
"""Pairs of images in one picture."""

SIGNED = "Red speaks for PNEUMONIA, blue for NORMAL: what the model used, not where disease is"
"""Stands under every evidence map."""

# Okabe & Ito (2008), "Color Universal Design": eight colours told apart with every common colour vision deficiency.
_BLUE, _VERMILLION, _GREEN = "#0072B2", "#D55E00", "#009E73"
_OTHERS = (_GREEN, "#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")
_CLASS_COLOURS = {"NORMAL": _BLUE, "PNEUMONIA": _VERMILLION}
_GREY = "#666666"
_SEPARATOR = " · "
_CAPTION_CHARACTERS = 32


class _Figure(Figure):
    """A figure that shows itself in a notebook also where no pyplot backend has registered a way to show figures."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def accuracy_curve(
    history: pd.DataFrame, *, title: str, note: str = "", best_epoch: int | None = None, ax: Axes | None = None
) -> Figure:
    """Draw accuracy over the epochs, training and validation.

    Parameters
    ----------
    history : DataFrame
        One row per epoch with the columns ``epoch`` (int, from 1), ``train_accuracy`` and ``val_accuracy``
        (fractions in [0, 1]; NaN leaves a gap).
    title : str
        Stands above the axes; wrapped where it is long.
    note : str
        What must be said with the picture, for example ``"SYNTHETIC DATA"``; stands in the lower margin.
    best_epoch : int, optional
        The epoch whose weights were kept; marked by a vertical line.
    ax : Axes, optional
        Where to draw; a new figure without it.

    Returns
    -------
    Figure
        The figure that holds the axes.

    Raises
    ------
    UsageError
        Where a column is missing or no epoch is there.
    """
    ax = _learning_curve(history, "accuracy", title=title, note=note, best_epoch=best_epoch, ax=ax)
    lowest = ax.dataLim.y0 if np.isfinite(ax.dataLim.y0) else 0.0
    bottom = max(0.0, np.floor(lowest * 20 - 0.5) / 20)  # the next 0.05 below, so that equal curves stay readable
    ax.set_ylim(bottom, 1 + 0.02 * (1 - bottom))
    return _root(ax)


def loss_curve(
    history: pd.DataFrame, *, title: str, note: str = "", best_epoch: int | None = None, ax: Axes | None = None
) -> Figure:
    """Draw the loss over the epochs, training and validation.

    Parameters
    ----------
    history : DataFrame
        One row per epoch with the columns ``epoch`` (int, from 1), ``train_loss`` and ``val_loss``
        (at least 0; NaN and infinity leave a gap).
    title, note, best_epoch, ax
        As in `accuracy_curve`.

    Returns
    -------
    Figure
        The figure that holds the axes.

    Raises
    ------
    UsageError
        Where a column is missing or no epoch is there.
    """
    ax = _learning_curve(history, "loss", title=title, note=note, best_epoch=best_epoch, ax=ax)
    ax.set_ylim(bottom=0)
    return _root(ax)


def roc_curve(
    curve: RocCurve,
    *,
    title: str,
    note: str = "",
    point: tuple[float, float, str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw a receiver operating characteristic with its area and, if given, one operating point.

    Parameters
    ----------
    curve : RocCurve
        ``fpr`` and ``tpr`` are float64 ``(k,)`` in [0, 1]; an ``auc`` of ``None`` is called undefined.
    title, note, ax
        As in `accuracy_curve`.
    point : (float, float, str), optional
        False positive rate, true positive rate and name of an operating point.

    Returns
    -------
    Figure
        The figure that holds the axes.
    """
    ax = _axes(ax, figsize=(5.6, 5.9))
    area = "AUC undefined" if curve.auc is None else f"AUC = {curve.auc:.4f}"
    counts = f"{curve.n_positive:,} PNEUMONIA, {curve.n_negative:,} NORMAL"
    ax.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=(0, (4, 3)), label="chance (AUC = 0.5)")
    ax.plot(curve.fpr, curve.tpr, color=_BLUE, linewidth=2, clip_on=False, zorder=3, label=f"{area}\n({counts})")
    if point is not None:
        fpr, tpr, name = point
        text = f"{_plain(name)}\n(sensitivity {tpr:.3f}, specificity {1 - fpr:.3f})"
        style = {"marker": "o", "markersize": 8, "markeredgecolor": "white", "linestyle": "none"}
        ax.plot([fpr], [tpr], color=_VERMILLION, clip_on=False, zorder=4, label=text, **style)  # type: ignore[arg-type]
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set(xlabel="False positive rate (1 - specificity)", ylabel="True positive rate (sensitivity)")
    _finish(ax, title=title, note=note)
    below_chance = curve.auc is not None and curve.auc < 0.5
    ax.legend(loc="upper left" if below_chance else "lower right", fontsize=9, framealpha=1, edgecolor="#CCCCCC")
    return _root(ax)


def confusion_matrix(counts: Mapping[str, int], *, title: str, note: str = "", ax: Axes | None = None) -> Figure:
    """Draw the four counts of a two-class decision, each with its share of the true class.

    Parameters
    ----------
    counts : mapping
        ``true_negatives``, ``false_positives``, ``false_negatives`` and ``true_positives``, each at least 0; the
        positive class is PNEUMONIA.
    title, note, ax
        As in `accuracy_curve`.

    Returns
    -------
    Figure
        The figure that holds the axes.

    Raises
    ------
    UsageError
        Where one of the four is missing.
    """
    names = (("true_negatives", "false_positives"), ("false_negatives", "true_positives"))
    missing = [name for row in names for name in row if name not in counts]
    if missing:
        raise UsageError(f"The confusion matrix lacks {', '.join(missing)}; pass all four counts by these names.")
    ax = _axes(ax, figsize=(5.6, 5.4))
    cells = np.array([[counts[name] for name in row] for row in names], dtype=np.int64)
    totals = cells.sum(axis=1, keepdims=True)
    shares = cells / np.maximum(totals, 1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1.25)  # 1.25 keeps the darkest cell light enough to read
    for (row, column), count in np.ndenumerate(cells):
        share = f"{shares[row, column]:.1%} of {totals[row, 0]:,}" if totals[row, 0] else "no such images"
        colour = "white" if shares[row, column] > 0.6 else "black"
        style = {"ha": "center", "color": colour}
        ax.text(column, row - 0.04, f"{count:,}", va="center", fontsize=20, **style)  # type: ignore[arg-type]
        ax.text(column, row + 0.2, share, va="center", fontsize=10, **style)  # type: ignore[arg-type]
        label = names[row][column].replace("_", " ")
        ax.text(column, row - 0.3, label, va="center", fontsize=10, **style)  # type: ignore[arg-type]
    ax.set(xlabel="Called", ylabel="True class")
    ax.set_xticks([0, 1], ["NORMAL", "PNEUMONIA"])
    ax.set_yticks([0, 1], ["NORMAL", "PNEUMONIA"], rotation=90, va="center")
    _finish(ax, title=title, note=note)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return _root(ax)


def sample_grid(
    images: Sequence[NDArray[np.uint8]],
    *,
    captions: Sequence[str],
    title: str,
    rows: int = 3,
    columns: int = 4,
    note: str = "",
) -> Figure:
    """Draw example images in a grid, each with its caption.

    Parameters
    ----------
    images : sequence of ndarray
        uint8 ``(H, W)``, grey values 0 (black) to 255 (white); sizes and shapes may differ. At most
        ``rows * columns``; cells without an image stay empty.
    captions : sequence of str
        One for each image, usually its file name; shortened in the middle where it is long.
    title, note
        As in `accuracy_curve`.
    rows, columns : int
        The grid, each at least 1.

    Returns
    -------
    Figure
        A new figure.

    Raises
    ------
    UsageError
        Where images and captions differ in number, or do not fit into the grid.
    """
    if len(images) != len(captions) or len(images) > rows * columns:
        raise UsageError(
            f"The sample grid got {len(images)} images and {len(captions)} captions for {rows} x {columns} cells; "
            "pass one caption for each image and no more images than cells."
        )
    aspects = [height / width for height, width in (image.shape for image in images)]
    heights = [max(aspects[row * columns : (row + 1) * columns], default=1.0) for row in range(rows)]
    width_in = 2.4 * columns
    figure = _new_figure((width_in, 2.3 * sum(heights) + 0.25 * rows + 0.9))
    figure.suptitle(_wrapped(title, width_in=width_in, points=13), fontsize=13, fontweight="bold")
    cells = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
    for cell in cells:
        cell.axis("off")
        cell.set_anchor("N")
    for cell, image, caption in zip(cells, images, captions, strict=False):
        cell.imshow(image, cmap="gray", vmin=0, vmax=255)
        cell.set_title(_plain(_shortened(caption, _CAPTION_CHARACTERS)), fontsize=8, pad=3)
    if not images:
        figure.text(0.5, 0.5, "no images", ha="center", va="center", color=_GREY, fontsize=13)
    _footer(figure, note)
    return figure


def pairs(
    images: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
    *,
    captions: Sequence[tuple[str, str]],
    title: str,
    note: str = "",
) -> Figure:
    """Draw pairs of images side by side, two pairs in a row, for people to compare.

    Parameters
    ----------
    images : sequence of (ndarray, ndarray)
        At most `MAX_PAIRS` pairs, each of two uint8 ``(H, W)``, 0 is black and 255 white; shapes may differ.
    captions : sequence of (str, str)
        Of each pair, one for either image; shortened in the middle where they are long.
    title, note
        As in `accuracy_curve`.

    Returns
    -------
    Figure
        A new figure.

    Raises
    ------
    UsageError
        Where pairs and captions differ in number, or there are too many.
    """
    if len(images) != len(captions) or len(images) > MAX_PAIRS:
        raise UsageError(
            f"The picture of pairs got {len(images)} pairs and {len(captions)} captions; "
            f"pass one pair of captions for each and no more than {MAX_PAIRS} pairs."
        )
    rows, gap = max(1, (len(images) + 1) // 2), 0.12
    figure = _new_figure((9.6, 2.4 * rows + 0.9))
    figure.suptitle(_wrapped(title, width_in=9.6, points=13), fontsize=13, fontweight="bold")
    cells = figure.subplots(rows, 5, squeeze=False, width_ratios=[1, 1, gap, 1, 1])
    for cell in cells.ravel():
        cell.axis("off")
        cell.set_anchor("N")
    for at, (two, names) in enumerate(zip(images, captions, strict=True)):
        for side, (image, name) in enumerate(zip(two, names, strict=True)):
            cell = cells[at // 2, at % 2 * 3 + side]
            cell.imshow(image, cmap="gray", vmin=0, vmax=255)
            cell.set_title(_plain(_shortened(name, _CAPTION_CHARACTERS)), fontsize=8, pad=3)
    if not images:
        figure.text(0.5, 0.5, "no pairs", ha="center", va="center", color=_GREY, fontsize=13)
    _footer(figure, note)
    return figure


@dataclass(frozen=True, eq=False)
class Layer:
    """An image coloured by a signed map, for `evidence_panel`.

    Attributes
    ----------
    pixels : ndarray of uint8, shape (H, W, 3)
        As `evidence.overlay` draws it.
    scale : float
        What gets full colour, above 0.
    title, unit : str
        Above the picture, and what its colour bar counts.
    """

    pixels: NDArray[np.uint8]
    scale: float
    title: str
    unit: str


def evidence_panel(
    image: NDArray[np.uint8],
    layers: Sequence[Layer],
    *,
    title: str,
    said: Sequence[str],
    aspect: float = 1.0,
    note: str = "",
) -> Figure:
    """Draw an image beside itself under its evidence, with colour bars whose scale does not depend on the image.

    Parameters
    ----------
    image : ndarray
        uint8 ``(H, W)``, 0 is black and 255 white.
    layers : sequence of Layer
        One or more, left to right.
    title, note
        As in `accuracy_curve`; the title is shortened in the middle where it is long.
    said : sequence of str
        The answer, one line each: score, call and operating point.
    aspect : float
        Height of the image in the file over its width: a model's image is squashed into a square.

    Returns
    -------
    Figure
        A new figure.
    """
    width_in = 4.1 * (1 + len(layers))
    figure = _new_figure((width_in, min(max(4.0 * aspect, 2.0), 9.0) + 1.5))
    lines = [_shortened(title, 2 * _characters(width_in, points=11) - 4), *said]
    figure.suptitle("\n".join(_wrapped(line, width_in=width_in, points=11) for line in lines), fontsize=11)
    seen = f"What the model was shown ({image.shape[1]} x {image.shape[0]})"
    shapes = [(image, seen), *((layer.pixels, layer.title) for layer in layers)]
    cells = figure.subplots(1, len(shapes), squeeze=False)[0]
    for cell, (pixels, name) in zip(cells, shapes, strict=True):
        cell.imshow(pixels, cmap="gray", vmin=0, vmax=255, aspect=aspect * pixels.shape[1] / pixels.shape[0])
        cell.set_title(_plain(name), fontsize=10)
        cell.axis("off")
    for cell, layer in zip(cells[1:], layers, strict=True):
        colours = ScalarMappable(Normalize(-layer.scale, layer.scale), _signed_colours())
        bar = figure.colorbar(colours, cax=cell.inset_axes((1.03, 0, 0.05, 1)), extend="both")  # as high as the image
        bar.set_label(_plain(layer.unit), fontsize=9)
    _footer(figure, _SEPARATOR.join(filter(None, [SIGNED, note])))
    return figure


@lru_cache
def _signed_colours() -> ListedColormap:
    """Return the colours of `evidence.overlay` as they look on a middle grey, full blue to full red."""
    ramp = evidence.overlay(np.full((256, 256), 128, np.uint8), np.linspace(-1, 1, 256)[None].repeat(256, 0),
                            grid=evidence.Grid(0, 1), scale=1)[0]  # fmt: skip
    return ListedColormap(ramp / 255)


def class_bars(counts: Mapping[str, int], *, title: str, note: str = "", ax: Axes | None = None) -> Figure:
    """Draw how many images each class has as bars, with the count on each bar.

    Parameters
    ----------
    counts : mapping
        Class name to number of images, at least 0; drawn in the order given.
    title, note, ax
        As in `accuracy_curve`.

    Returns
    -------
    Figure
        The figure that holds the axes.
    """
    ax = _axes(ax, figsize=(5.6, 4.8))
    names = [_plain(_shortened(name, _CAPTION_CHARACTERS)) for name in counts]
    bars = ax.bar(range(len(names)), list(counts.values()), color=_colours(counts), width=0.6)
    ax.bar_label(bars, labels=[f"{count:,}" for count in counts.values()], padding=3, fontsize=12)
    ax.set_xticks(range(len(names)), names)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_ylim(0, max([*counts.values(), 1]) * 1.12)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.set_ylabel(f"Images ({sum(counts.values()):,} in total)")
    _finish(ax, title=title, note=note)
    ax.grid(visible=False, axis="x")
    ax.tick_params(axis="x", length=0, labelsize=11)
    return _root(ax)


def class_pie(counts: Mapping[str, int], *, title: str, note: str = "", ax: Axes | None = None) -> Figure:
    """Draw the shares of the classes as a pie, each wedge with its count and percentage.

    Parameters
    ----------
    counts : mapping
        Class name to number of images, at least 0; a class without images is named below the pie.
    title, note, ax
        As in `accuracy_curve`.

    Returns
    -------
    Figure
        The figure that holds the axes.
    """
    ax = _axes(ax, figsize=(5.6, 4.8))
    total = sum(counts.values())
    short = {name: _plain(_shortened(name, _CAPTION_CHARACTERS)) for name in counts}
    shown = {name: count for name, count in counts.items() if count > 0}
    if shown:
        ax.pie(
            list(shown.values()),
            labels=[f"{short[name]}\n{count:,} ({count / total:.1%})" for name, count in shown.items()],
            colors=[colour for name, colour in zip(counts, _colours(counts), strict=True) if name in shown],
            startangle=90,
            counterclock=False,
            wedgeprops={"edgecolor": "white", "linewidth": 2},
            textprops={"fontsize": 11, **({"ha": "center"} if len(shown) == 1 else {})},
        )
    empty = [f"{short[name]}: 0" for name in counts if name not in shown]
    ax.set_xlabel(_SEPARATOR.join([f"{total:,} images in total", *empty]))
    _finish(ax, title=title, note=note)
    ax.set_aspect("equal")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return _root(ax)


def save(figure: Figure, path: Path) -> None:
    """Save a figure as PNG at 150 dots per inch; equal figures give equal bytes (no dates, no version in the file).

    Parameters
    ----------
    figure : Figure
        Any matplotlib figure; it stays open and unchanged.
    path : Path
        Where the file shall stand; its folder is created, an older file is replaced whole.

    Raises
    ------
    PneumoscopeError
        Where the file cannot be written.
    """
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


def _learning_curve(
    history: pd.DataFrame, quantity: str, *, title: str, note: str, best_epoch: int | None, ax: Axes | None
) -> Axes:
    columns = ["epoch", f"train_{quantity}", f"val_{quantity}"]
    missing = [name for name in columns if name not in history.columns]
    if missing or history.empty:
        found = f"lacks the column {', '.join(missing)}" if missing else "holds no epoch"
        raise UsageError(f"The history {found}; pass one row per epoch with the columns {', '.join(columns)}.")
    ax = _axes(ax, figsize=(7.0, 4.8))
    epochs, train, val = (history[name].to_numpy(dtype=np.float64, copy=True) for name in columns)
    size = 6.0 if len(epochs) <= 30 else 0.0  # a lone epoch is a point, not a line; many would be a string of beads
    for values, label, colour, marker in ((train, "training", _BLUE, "o"), (val, "validation", _VERMILLION, "s")):
        values[~np.isfinite(values)] = np.nan
        ax.plot(epochs, values, color=colour, marker=marker, markersize=size, linewidth=2, label=label)
    if best_epoch is not None:
        style = {"color": _GREY, "linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 1}
        ax.axvline(best_epoch, label=f"best epoch ({best_epoch})", **style)  # type: ignore[arg-type]
    ax.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.set(xlabel="Epoch", ylabel=quantity.capitalize())
    _finish(ax, title=title, note=note, pad=26)
    # Between title and axes, where no curve can run beneath it.
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=10, borderaxespad=0.2)
    return ax


def _axes(ax: Axes | None, *, figsize: tuple[float, float]) -> Axes:
    if ax is None:
        return _new_figure(figsize).subplots()
    if _root(ax).get_layout_engine() is None:  # without one the lower margin has no room for its line
        _root(ax).set_layout_engine("constrained")
    return ax


def _new_figure(figsize: tuple[float, float]) -> Figure:
    return _Figure(figsize=figsize, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))


def _root(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    if figure is None:
        raise UsageError("The axes belong to no figure any more; pass axes of a live figure, or none.")
    return figure


def _finish(ax: Axes, *, title: str, note: str, pad: float = 10) -> None:
    width_in = _root(ax).get_figwidth() * ax.get_position().width
    ax.set_title(_wrapped(title, width_in=width_in, points=12), loc="left", fontsize=12, fontweight="bold", pad=pad)
    ax.grid(visible=True, color="#E5E5E5", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    _footer(_root(ax), note)


def _footer(figure: Figure, note: str) -> None:
    """Put the note into the lower margin; a figure of several panels carries each note once."""
    there = figure.get_supxlabel().replace("\n", " ").split(_SEPARATOR)
    parts = dict.fromkeys([*there, _plain(note).strip(), RESEARCH_USE])  # keeps the order, drops repetitions
    ordered = [part for part in parts if part and part != RESEARCH_USE] + [RESEARCH_USE]
    width = _characters(figure.get_figwidth(), points=8)
    text = "\n".join(textwrap.wrap(_SEPARATOR.join(ordered), width=width))
    # As the figure's x label, because the layout engine keeps room for it and never cuts it off.
    figure.supxlabel(text, x=0.99, ha="right", fontsize=8, color=_GREY)


def _colours(counts: Mapping[str, int]) -> list[str]:
    others = [name for name in counts if name not in _CLASS_COLOURS]
    return [_CLASS_COLOURS.get(name) or _OTHERS[others.index(name) % len(_OTHERS)] for name in counts]


def _characters(width_in: float, *, points: float) -> int:
    return max(10, int(width_in * 72 / (points * 0.56)))  # DejaVu Sans Bold is about 0.56 of its size wide


def _wrapped(text: str, *, width_in: float, points: float) -> str:
    return "\n".join(textwrap.wrap(_plain(text), width=_characters(width_in, points=points)))


def _shortened(text: str, length: int) -> str:
    """Cut the middle out: the beginning names the patient, the end tells images of one patient apart."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[head + 1 - length :]}"


@lru_cache
def _glyphs() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return frozenset(font.get_charmap())


def _plain(text: str) -> str:
    r"""Make any text drawable as it is: no formulas between ``$``, ``?`` for characters that the font lacks."""
    known = "".join(character if ord(character) in _glyphs() else "?" for character in text)
    return known.replace("$", r"\$")
