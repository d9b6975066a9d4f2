"""What a section of a report is made of: text, tables, charts, pictures. And how figures are said.

Owns the few kinds of block that the templates know how to show, and the form of every number: three decimals for areas,
per cent for shares, an en dash where a figure is undefined. Escapes nothing: the templates do.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

from markupsafe import Markup

from pneumoscope._report_material import at, mapping, number

UNDEFINED: Final = "–"
"""Stands where a figure is undefined."""

MAX_NAME: Final = 200
"""Characters that are shown of a name at most; a longer one is cut in the middle."""

Tone = Literal["plain", "good", "warning", "quiet"]


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes
    ----------
    text : str
        The value.
    small : str
        Under it, for example its interval.
    strong : bool
        Whether it stands out.
    """

    text: str
    small: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    kind: ClassVar[str] = "points"
    sentences: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes
    ----------
    head : sequence of str
        Names of the columns; the first column names the rows.
    rows : sequence of (sequence of Cell)
        As long as `head`.
    caption : str
        What it shows.
    above : sequence of (str, int)
        A second head over the first: names, and how many columns each spans.
    notes : sequence of str
        Under it.
    of_words : bool
        Whether the cells hold words, which begin at the left, and not figures.
    """

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    above: Sequence[tuple[str, int]] = ()
    notes: Sequence[str] = ()
    of_words: bool = False


@dataclass(frozen=True)
class Charts:
    """Charts side by side, as many as there is room for."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Markup]


@dataclass(frozen=True)
class Picture:
    """A picture with words under it.

    Attributes
    ----------
    source : str
        A ``data:`` address; empty where there is no picture, and `lacks` says why.
    caption : str
        Under it.
    lacks : str
        In its place.
    """

    source: str
    caption: str
    lacks: str = ""


@dataclass(frozen=True)
class Pictures:
    """Small pictures side by side."""

    kind: ClassVar[str] = "pictures"
    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Case:
    """One image of the gallery.

    Attributes
    ----------
    model, case, case_title : str
        Name of the model; ``false_negative`` and its like; the same in words.
    rank : int
        From 1, the most telling first.
    score : float or None
        In [0, 1].
    label, subtype, group, path : str
        Of the image.
    image, evidence : Picture
        The image, and its evidence map.
    """

    model: str
    case: str
    case_title: str
    rank: int
    score: float | None
    label: str
    subtype: str
    group: str
    path: str
    image: Picture
    evidence: Picture


@dataclass(frozen=True)
class Cases:
    """The gallery: cards that scripts can sort and filter."""

    kind: ClassVar[str] = "cases"
    cases: Sequence[Case]


@dataclass(frozen=True)
class Code:
    """Text to read or copy as it is; a long one folds away on the screen."""

    kind: ClassVar[str] = "code"
    text: str
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Thresholds:
    """Where scripts put the threshold slider; `reason` says why there are no scores for it."""

    kind: ClassVar[str] = "thresholds"
    reason: str = ""


Block = Text | Points | Table | Charts | Pictures | Cases | Code | Thresholds


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes
    ----------
    name : str
        Its anchor.
    title : str
        Its heading.
    blocks : sequence of Block
        What it shows; empty where there is nothing, and then `missing` says why.
    missing : str
        One line: why it, or a part of it, is not there.
    lead : str
        One line: what there is to see here.
    """

    name: str
    title: str
    blocks: Sequence[Block] = ()
    missing: str = ""
    lead: str = ""


@dataclass
class Reasons:
    """Why figures are undefined: gathered while a table is made, and shown under it.

    Attributes
    ----------
    found : dict of str to None
        Each reason once, in the order in which they came.
    """

    found: dict[str, None] = field(default_factory=dict)

    def note(self, part: Mapping[str, Any], *keys: str) -> None:
        """Keep the reasons that a split's figures give for some keys."""
        for key in keys:
            reason = mapping(part.get("undefined")).get(key)
            if isinstance(reason, str):
                self.found[f"{UNDEFINED} {reason}"] = None


# --- how figures are said --------------------------------------------------------------------------------------------


def plain(value: object, *, longest: int = MAX_NAME) -> str:
    """Return a name that can be shown: what cannot be seen is written out, and a very long one is cut.

    Parameters
    ----------
    value : object
        A text from outside; anything else is written as text.
    longest : int
        Characters.

    Returns
    -------
    str
    """
    text = "".join(c if _is_seen(c) else c.encode("unicode_escape").decode("ascii") for c in str(value))
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def _is_seen(c: str) -> bool:
    """Whether a character is seen, or is a plain space of any script; those that turn the writing are not."""
    return c.isprintable() or unicodedata.category(c) == "Zs"


def area(value: object) -> str:
    """Return an AUC or another figure from 0 to 1 with three decimals."""
    found = number(value)
    return UNDEFINED if found is None else f"{found:.3f}"


def signed(value: object) -> str:
    """Return a difference of areas with its sign."""
    found = number(value)
    return UNDEFINED if found is None else f"{found:+.3f}"


def share(value: object) -> str:
    """Return a share in per cent with one decimal, halves up: as ``report.js`` does, so that both say the same."""
    found = number(value)
    return UNDEFINED if found is None else f"{math.floor(1000 * found + 0.5 + 1e-9) / 10:.1f}\u00a0%"


def count(value: object) -> str:
    """Return a count with its thousands set off."""
    found = number(value)
    return UNDEFINED if found is None else f"{found:,.0f}"


def counted(n: float, noun: str) -> str:
    """Return a count with its noun, in the plural where it is not one."""
    return f"{n:,.0f} {noun}" if n == 1 else f"{n:,.0f} {noun}s"


def threshold(value: object) -> str:
    """Return a threshold with four significant digits."""
    found = number(value)
    return UNDEFINED if found is None else f"{found:.4g}"


def duration(value: object) -> str:
    """Return seconds for people."""
    found = number(value)
    if found is None:
        return UNDEFINED
    if found < 90:
        return f"{found:.1f} s"
    return f"{found / 60:.1f} min" if found < 5400 else f"{found / 3600:.1f} h"


def joined(names: Iterable[str]) -> str:
    """Return names as a list in a sentence: ``a, b and c``."""
    *most, last = [*names] or [""]
    return f"{', '.join(most)} and {last}" if most else last


def interval_of(part: Mapping[str, Any], figure: str) -> tuple[float, float] | None:
    """Return the interval of a figure: that by patient where there is one, else that by formula.

    Parameters
    ----------
    part : mapping
        Figures of a split, of one operating point, or of a part of a split.
    figure : str
        ``auc``, ``sensitivity`` and so on.

    Returns
    -------
    tuple of float, or None
        Its two ends.
    """
    by_formula = part.get("auc_interval") if figure == "auc" else at(part, "intervals", figure)
    for found in (at(part, "group_intervals", figure), by_formula):
        if (ends := ends_of(found)) is not None:
            return ends
    return None


def ends_of(interval: object) -> tuple[float, float] | None:
    """Return the ends of an interval as ``metrics.json`` holds it, None for anything else."""
    low, high = number(at(interval, "low")), number(at(interval, "high"))
    return None if low is None or high is None else (low, high)


def area_span(ends: tuple[float, float] | None) -> str:
    """Return an interval of areas; empty where there is none."""
    return "" if ends is None else f"{ends[0]:.3f}–{ends[1]:.3f}"


def share_span(ends: tuple[float, float] | None) -> str:
    """Return an interval of shares in per cent; empty where there is none."""
    return "" if ends is None else f"{100 * ends[0]:.1f}–{100 * ends[1]:.1f}"


def figure_cell(part: Mapping[str, Any], figure: str) -> Cell:
    """Return a figure with its interval under it: areas for ``auc`` and ``average_precision``, else per cent."""
    ends = interval_of(part, figure)
    if figure in ("auc", "average_precision", "mcc"):
        return Cell(area(part.get(figure)), area_span(ends))
    return Cell(share(part.get(figure)), share_span(ends))
