"""Pictures of what the checks of evidence maps found.

Owns four figures: deletion and insertion curves, shares by place, likeness after shuffling, and a gallery of overlays.
Computes nothing: it receives what `checks` measured. Colours, type and margins are those of `figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pneumoscope import figures
from pneumoscope.errors import UsageError

PARTS: Mapping[str, str] = {"all": "all images", "called_pneumonia": "images called PNEUMONIA"}
"""The parts of the sample that are shown, and what they are called."""

MAX_OVERLAYS = 12
"""Images in one gallery."""

_NO_FIGURE = "no images"


def perturbation(found: Mapping[str, Any], *, title: str, note: str = "") -> Figure:
    """Draw the mean score while images are taken apart and put together, beside a random order of the same cells.

    Parameters
    ----------
    found : mapping
        By part (see `PARTS`): None, or a mapping with ``n`` and, under ``deletion`` and ``insertion``, ``share``,
        ``map`` and ``random`` (lists of equal length, in [0, 1]) and ``area`` with ``first`` and ``second``, the mean
        areas of the map and of the random order.
    title : str
        Above the figure; wrapped where it is long.
    note : str
        What must be said with the picture; stands in the lower margin.

    Returns
    -------
    Figure
        A new figure.
    """
    figure = figures._new_figure((9.6, 7.6))
    figure.suptitle(figures._wrapped(title, width_in=9.6, points=13), fontsize=13, fontweight="bold")
    cells = figure.subplots(len(PARTS), 2, squeeze=False, sharex=True, sharey=True)
    for row, (part, name) in enumerate(PARTS.items()):
        for column, (kind, what) in enumerate({"deletion": "hidden", "insertion": "shown"}.items()):
            ax = cells[row, column]
            _curves(ax, found.get(part), kind)
            ax.set_title(f"{kind.capitalize()}, {name}", fontsize=11, loc="left")
            ax.set(xlabel=f"Share of the image {what}", ylabel="Mean score", xlim=(0, 1), ylim=(0, 1.02))
            _plain_axes(ax)
    figures._footer(figure, note)
    return figure


def _curves(ax: Axes, part: Mapping[str, Any] | None, kind: str) -> None:
    if part is None:
        ax.text(0.5, 0.5, _NO_FIGURE, ha="center", va="center", color=figures._GREY)
        return
    drawn = part[kind]
    style: dict[str, Any] = {"linewidth": 2, "clip_on": False}
    area = drawn["area"]
    ax.plot(drawn["share"], drawn["map"], color=figures._BLUE, label=f"order of the map, area {area['first']:.3f}",
            **style)  # fmt: skip
    ax.plot(drawn["share"], drawn["random"], color=figures._GREY, linestyle=(0, (4, 3)),
            label=f"random order, area {area['second']:.3f}", **style)  # fmt: skip
    ax.legend(loc="best", fontsize=8, framealpha=0.9, edgecolor="#CCCCCC", title=f"{part['n']:,} images",
              title_fontsize=8)  # fmt: skip


def shares(found: Mapping[str, Any], *, title: str, note: str = "") -> Figure:
    """Draw how much of the evidence lies at the edges and outside the body, beside how much of the image that is.

    Parameters
    ----------
    found : mapping
        By part (see `PARTS`): None, or a mapping with ``border``, ``corners`` and ``outside``, each with ``first``
        (mean share of the evidence) and ``second`` (mean share of the area), in [0, 1] or None.
    title, note
        As in `perturbation`.

    Returns
    -------
    Figure
        A new figure.
    """
    ax = figures._new_figure((7.6, 4.8)).subplots()
    places = {"border": "border", "corners": "corners", "outside": "outside the body"}
    bars = [(f"evidence, {name}", found.get(part), "first") for part, name in PARTS.items()]
    bars.append(("area of the image", found.get("all"), "second"))
    colours = (figures._BLUE, figures._VERMILLION, "#BBBBBB")
    for at, ((name, part, which), colour) in enumerate(zip(bars, colours, strict=True)):
        values = [np.nan if part is None or part[place][which] is None else part[place][which] for place in places]
        drawn = ax.bar(np.arange(3) + 0.27 * (at - 1), values, width=0.25, color=colour, label=name)
        ax.bar_label(drawn, labels=["-" if np.isnan(each) else f"{each:.0%}" for each in values], padding=2, fontsize=9)
    ax.set_xticks(range(3), places.values())
    ax.set_ylabel("Share")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_ylim(bottom=0)
    ax.margins(y=0.12)
    figures._finish(ax, title=title, note=note, pad=26)
    ax.grid(visible=False, axis="x")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=8.5, borderaxespad=0.2)
    return figures._root(ax)


def randomisation(found: Mapping[str, Any], *, title: str, note: str = "") -> Figure:
    """Draw how alike the maps stay while weights are shuffled from the top down.

    Parameters
    ----------
    found : mapping
        ``layers``: a list, in the order of shuffling, of mappings with ``layer``, ``median`` and ``quarters`` (two
        numbers); ``median_absolute`` of each is compared with ``chance`` and ``limit``, numbers in [0, 1] or None.
    title, note
        As in `perturbation`.

    Returns
    -------
    Figure
        A new figure.
    """
    ax = figures._new_figure((8.2, 5.2)).subplots()
    layers = [each for each in found["layers"] if each["median"] is not None]
    at = np.arange(len(layers))
    middle = np.array([each["median"] for each in layers], dtype=np.float64)
    low, high = (np.array([each["quarters"][end] for each in layers], dtype=np.float64) for end in (0, 1))
    ax.errorbar(at, middle, yerr=[middle - low, high - middle], color=figures._BLUE, fmt="o", capsize=4,
                label="similarity: median and middle half")  # fmt: skip
    strength = [each["median_absolute"] for each in layers]
    ax.plot(at, strength, color=figures._VERMILLION, marker="s", linewidth=1.5, label="median without its sign")
    for name, style in (("chance", (0, (1, 2))), ("limit", (0, (4, 3)))):
        if found[name] is not None:
            ax.axhline(
                found[name], color=figures._GREY, linestyle=style, linewidth=1.3, label=f"{name} {found[name]:.2f}"
            )
    ax.axhline(0, color="#CCCCCC", linewidth=1, zorder=0)
    names = [figures._plain(figures._shortened(each["layer"], 24)) for each in layers]
    ax.set_xticks(at, names, rotation=35, ha="right", fontsize=8)
    ax.set(xlabel="Last layer shuffled; those to its left are too", ylabel="Spearman correlation with the trained map")
    ax.set_ylim(-1.05, 1.05)
    figures._finish(ax, title=title, note=note, pad=26)
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, fontsize=8.5, borderaxespad=0.2)
    return figures._root(ax)


def gallery(
    images: Sequence[NDArray[np.uint8]],
    overlays: Sequence[NDArray[np.uint8]],
    *,
    captions: Sequence[str],
    scale: float,
    title: str,
    note: str = "",
) -> Figure:
    """Draw images beside themselves under their evidence, two pairs in a row, with one colour bar for all.

    Parameters
    ----------
    images : sequence of ndarray
        At most `MAX_OVERLAYS`, each uint8 ``(H, W)``.
    overlays : sequence of ndarray
        One for each image, uint8 ``(H, W, 3)``, as `evidence.overlay` draws them.
    captions : sequence of str
        One for each image.
    scale : float
        Evidence per cell in full colour, above 0.
    title, note
        As in `perturbation`.

    Returns
    -------
    Figure
        A new figure.

    Raises
    ------
    UsageError
        Where the numbers differ, or there are no or too many images.
    """
    if not len(images) == len(overlays) == len(captions) or not 1 <= len(images) <= MAX_OVERLAYS:
        raise UsageError(
            f"The gallery got {len(images)} images, {len(overlays)} overlays and {len(captions)} captions; pass as "
            f"many of each, from 1 to {MAX_OVERLAYS}."
        )
    rows = (len(images) + 1) // 2
    figure = figures._new_figure((9.8, 2.6 * rows + 1.0))
    figure.suptitle(figures._wrapped(title, width_in=9.8, points=13), fontsize=13, fontweight="bold")
    cells = figure.subplots(rows, 5, squeeze=False, width_ratios=[1, 1, 0.08, 1, 1])
    for cell in cells.ravel():
        cell.axis("off")
    for at, (image, overlay, caption) in enumerate(zip(images, overlays, captions, strict=True)):
        left, right = (cells[at // 2, at % 2 * 3 + side] for side in (0, 1))
        left.imshow(image, cmap="gray", vmin=0, vmax=255)
        right.imshow(overlay)
        left.set_title(figures._plain(caption), fontsize=8, pad=3, loc="left")
    colours = ScalarMappable(Normalize(-scale, scale), figures._signed_colours())
    bar = figure.colorbar(colours, ax=cells[:, -1].tolist(), extend="both", shrink=0.9)
    for cell in cells.ravel():
        cell.set_anchor("N")  # which the colour bar has changed for the cells beside it
    bar.set_label("Evidence per cell, in units of the logit", fontsize=9)
    figures._footer(figure, figures._SEPARATOR.join(filter(None, [figures.SIGNED, note])))
    return figure


def _plain_axes(ax: Axes) -> None:
    ax.grid(visible=True, color="#E5E5E5", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
