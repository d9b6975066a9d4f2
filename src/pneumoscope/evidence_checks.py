"""Five checks of evidence maps: what each measures, against what, and the words of its verdict.

Owns the arithmetic between a model's maps and a `Finding`; the checks themselves come from `explainer` and `evidence`.
No verdict says that a map shows where disease is: nothing here knows where it is (Saporta et al. 2022,
https://doi.org/10.1038/s42256-022-00536-x). Knows nothing of runs, files or pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pneumoscope import appearance, evidence, explainer, intervals, models
from pneumoscope.predictor import Outputs

HEADER: Final = ("check", "part", "measure", "image_id", "value")
"""Columns of the long table."""

DEPTH: Final = 10
"""Layers that are shuffled, from the top down."""

SHUFFLES: Final = 3
"""Times that the shuffling is done, each with a seed of its own: one order alone may be a lucky one."""

STEPS: Final = 20
"""Parts in which the cells of a map are hidden and shown; fewer where it has fewer cells."""

RESAMPLES: Final = 2000
"""Of the bootstrap over groups behind each interval."""

ROUNDING: Final = {"float32": 1e-3, "bfloat16": 5e-2}
"""How far a map may miss its logit, as a share of 1 + the largest logit, by the precision of the arithmetic."""

_CORNER_SHARE: Final = 0.125  # of the side: the squares hold the letters of `evidence.marker_changes`
_KINDS: Final = ("deletion", "insertion")
_PLACES: Final = ("border", "corners", "outside")
_SHARES_DRAWN: Final = 21  # points of a mean curve

Floats = npt.NDArray[np.float64]
Row = tuple[str, str, str, str, float]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Sample:
    """Images that the checks are done on, and what the model says of them.

    Attributes
    ----------
    image_ids, groups : ndarray of str, shape (n,)
        Whose content, and whose patient.
    labels : ndarray of int8, shape (n,)
        0 NORMAL, 1 PNEUMONIA.
    images : ndarray of uint8, shape (n, H, H)
        Packed.
    outputs : Outputs
        Of the model.
    threshold : float
        Of the default operating point.
    """

    image_ids: npt.NDArray[np.str_]
    groups: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int8]
    images: npt.NDArray[np.uint8]
    outputs: Outputs
    threshold: float

    @property
    def called(self) -> npt.NDArray[np.bool_]:
        """Whether each image is called PNEUMONIA, shape (n,)."""
        return np.asarray(self.outputs.score.astype(np.float64) > self.threshold)

    @property
    def parts(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Which images belong to each part that is looked at, each of shape (n,), in the order shown."""
        return {"all": np.ones(len(self.labels), dtype=np.bool_), "called_pneumonia": self.called}


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes
    ----------
    figures : mapping
        For JSON, with ``sentence``, the verdict in words.
    rows : sequence of tuple
        For the long table, as `HEADER` names them.
    """

    figures: Mapping[str, Any]
    rows: Sequence[Row]


# --- 1 do the maps follow the weights --------------------------------------------------------------------------------


def randomisation(
    sample: Sample, model: models.Model, *, seed: int, depth: int = DEPTH, shuffles: int = SHUFFLES
) -> Finding:
    """Shuffle weights from the top down and measure how alike the maps stay (see `explainer.randomisation`).

    The maps follow the weights where, after the last layer, the median similarity without its sign is at most halfway
    between chance and 1; chance is that of the trained maps with their own cells in random order. A map that is the
    same everywhere after shuffling has lost its likeness: 0.

    Parameters
    ----------
    sample : Sample
        From `look`.
    model : keras.Model
        The same model.
    seed : int
        0 or more.
    depth : int
        Layers, 1 or more.
    shuffles : int
        How often, 1 or more.

    Returns
    -------
    Finding
        ``verdict`` is ``follow``, ``do not follow`` or ``undefined``.
    """
    maps = sample.outputs.evidence
    clear = np.ptp(maps.reshape(len(maps), -1), axis=1) > 0
    names: list[str] = []
    values: list[list[Floats]] = []  # by layer, then by shuffle
    rows: list[Row] = []
    for shuffle in range(shuffles):
        cascade = explainer.randomisation(model, sample.images, depth=depth, seed=seed + shuffle)
        names = [name for name, _ in cascade]
        values = values or [[] for _ in cascade]
        for at, (name, alike) in enumerate(cascade):
            values[at].append(np.nan_to_num(alike[clear]))
            rows += _rows("randomisation", name, f"similarity, shuffle {shuffle + 1}", sample, alike)
    chance = [
        np.abs(evidence.similarity(maps, _in_random_order(maps, seed=seed + shuffle)))[clear]
        for shuffle in range(shuffles)
    ]
    by_chance = float(np.nanmedian(chance)) if clear.any() else None
    limit = None if by_chance is None else (1 + by_chance) / 2
    layers = [_likeness(name, np.concatenate(each)) for name, each in zip(names, values, strict=True)]
    left = layers[-1]["median_absolute"]
    verdict = "undefined" if limit is None or left is None else "follow" if left <= limit else "do not follow"
    content = {
        "verdict": verdict, "shuffles": shuffles, "n": int(clear.sum()), "chance": by_chance, "limit": limit,
        "layers": layers, "sentence": _said_of_weights(verdict, layers, by_chance, limit),
    }  # fmt: skip
    return Finding(content, rows)


def _likeness(name: str, values: Floats) -> dict[str, Any]:
    if not len(values):
        return dict.fromkeys(("median", "median_absolute", "quarters", "range"), None) | {"layer": name}
    return {
        "layer": name,
        "median": float(np.median(values)),
        "median_absolute": float(np.median(np.abs(values))),
        "quarters": np.quantile(values, [0.25, 0.75]).tolist(),
        "range": [float(values.min()), float(values.max())],
    }


def _said_of_weights(verdict: str, layers: list[dict[str, Any]], chance: float | None, limit: float | None) -> str:
    if verdict == "undefined":
        return "Whether the maps follow the weights cannot be said: every map is the same everywhere."
    last = layers[-1]
    said = (
        f"With the weights of {len(layers)} layers shuffled from the top down, the similarity of the maps with the "
        f"trained ones, without its sign, is {last['median_absolute']:.2f} in the median (chance {chance:.2f}, limit "
        f"{limit:.2f})"
    )
    if verdict == "follow":
        return f"{said}: the maps follow the weights."
    return f"{said}: the maps do not follow the weights, and must not be read as what the model learned."


# --- 2 does the order of the cells matter to the score ----------------------------------------------------------------


def perturbation(
    sample: Sample,
    score: evidence.Score,
    *,
    grid: evidence.Grid,
    seed: int,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> Finding:
    """Compare deletion and insertion curves of each map with those of the same map with its cells in random order.

    Parameters
    ----------
    sample : Sample
        From `look`.
    score : callable
        See `evidence.Score`.
    grid : evidence.Grid
        Of the model that made the maps.
    seed : int
        Of the random orders and of the bootstrap, 0 or more.
    steps : int
        As in `evidence.perturbation`.
    progress : callable, optional
        Called with (images done, images in all).

    Returns
    -------
    Finding
        ``verdict`` is ``used`` where on all images the deletion area is lower and the insertion area higher than in
        random order, each with an interval that excludes 0; ``not shown`` otherwise. Neither is localisation.
        ``untouched`` and ``hidden`` are the mean scores of images as they are and blurred whole.
    """
    maps = sample.outputs.evidence
    shuffled = _in_random_order(maps, seed=seed)
    share = np.linspace(0, 1, _SHARES_DRAWN)
    areas = np.empty((2, 2, len(maps)))  # deletion and insertion; map and random order
    heights = np.empty((2, 2, len(maps), len(share)))
    for at, image in enumerate(sample.images):
        for order, each in enumerate((maps, shuffled)):
            curves = evidence.perturbation(score, image, each[at], grid=grid, steps=steps)
            areas[:, order, at] = curves.deletion_area, curves.insertion_area
            heights[0, order, at] = np.interp(share, curves.share, curves.deletion)
            heights[1, order, at] = np.interp(share, curves.share, curves.insertion)
        if progress is not None:
            progress(at + 1, len(maps))
    rows: list[Row] = []
    for kind, of_kind in zip(_KINDS, areas, strict=True):
        for name, values in zip(("map", "random"), of_kind, strict=True):
            rows += _rows("perturbation", name, f"{kind}_area", sample, values)
    parts: dict[str, Any] = {}
    for part, chosen in sample.parts.items():
        parts[part] = {"n": int(chosen.sum())} if chosen.any() else None
        for kind, area, height in zip(_KINDS, areas, heights, strict=True) if chosen.any() else ():
            middle = height[:, chosen].mean(axis=1)
            compared = paired(*area[:, chosen], groups=sample.groups[chosen], seed=seed)
            parts[part][kind] = {"share": share, "map": middle[0], "random": middle[1], "area": compared}
    deletion, insertion = (parts["all"][kind]["area"] for kind in _KINDS)
    verdict = "used" if _sign(deletion) < 0 < _sign(insertion) else "not shown"
    untouched, hidden = (float(heights[0, 0, :, end].mean()) for end in (0, -1))
    said = _said_of_order(verdict, deletion, insertion)
    if hidden > untouched:
        said += f" Blurring all of an image raises its score, from {untouched:.2f} to {hidden:.2f} in the mean."
    content = {"verdict": verdict, "steps": steps, "untouched": untouched, "hidden": hidden, "parts": parts,
               "sentence": said}  # fmt: skip
    return Finding(content, rows)


def _in_random_order(maps: npt.NDArray[Any], *, seed: int) -> npt.NDArray[Any]:
    rng = np.random.default_rng([seed, 1])
    return rng.permuted(maps.reshape(len(maps), -1), axis=1).reshape(maps.shape)


def _said_of_order(verdict: str, deletion: Mapping[str, Any], insertion: Mapping[str, Any]) -> str:
    said = (
        f"Hiding images in the order of their maps gives an area of {_compared(deletion)}, showing them so an area of "
        f"{_compared(insertion)}"
    )
    if verdict == "used":
        return (
            f"{said}: the maps tell what the score stands on better than chance does. They are not shown to localise "
            "disease: nothing here knows where it is."
        )
    worse = [name for name, sign in (("hiding", -_sign(deletion)), ("showing", _sign(insertion))) if sign < 0]
    beaten = f" ({' and '.join(worse)} in random order does better)" if worse else ""
    return f"{said}: the maps are not shown to localise, not even what the score stands on{beaten}."


def _compared(found: Mapping[str, Any]) -> str:
    sure = found["interval"]
    ends = "no interval" if sure is None else f"95 % {sure['low']:+.3f} to {sure['high']:+.3f}"
    return f"{found['first']:.3f} against {found['second']:.3f} in random order (difference {ends})"


# --- 3 where the evidence lies ----------------------------------------------------------------------------------------


def shares(sample: Sample, *, grid: evidence.Grid, seed: int) -> Finding:
    """Measure how much of the evidence lies in the border, in the corners and outside the body's box.

    Parameters
    ----------
    sample : Sample
        From `look`.
    grid : evidence.Grid
        Of the model that made the maps.
    seed : int
        Of the bootstrap, 0 or more.

    Returns
    -------
    Finding
        Under ``parts``, for each place: ``first``, the mean share of the evidence, and ``second``, that of the area,
        as `paired` compares them. ``more_than_area`` lists the places with more evidence than area on all images.
    """
    size_px = sample.images.shape[1]
    border_px, corner_px = appearance.border_px(size_px), max(1, round(_CORNER_SHARE * size_px))
    measured = evidence.shares(
        sample.images, sample.outputs.evidence, grid=grid, border_px=border_px, corner_px=corner_px
    )
    n = len(sample.images)
    pairs = {
        place: (getattr(measured, place), np.broadcast_to(getattr(measured, f"{place}_area"), n)) for place in _PLACES
    }
    rows: list[Row] = []
    for place, (of_evidence, of_area) in pairs.items():
        rows += _rows("shares", place, "evidence", sample, of_evidence)
        rows += _rows("shares", place, "area", sample, of_area)
    parts: dict[str, Any] = {
        part: {
            place: paired(first[chosen], second[chosen], groups=sample.groups[chosen], seed=seed)
            for place, (first, second) in pairs.items()
        }
        if chosen.any()
        else None
        for part, chosen in sample.parts.items()
    }
    more = [place for place in _PLACES if _sign(parts["all"][place]) > 0]
    coarse = grid.step_px > corner_px
    content = {
        "border_px": border_px, "corner_px": corner_px, "cell_px": grid.step_px, "parts": parts, "more_than_area": more,
        "sentence": _said_of_shares(parts["all"], more, coarse=coarse),
    }  # fmt: skip
    return Finding(content, rows)


def _said_of_shares(found: Mapping[str, Any], more: list[str], *, coarse: bool) -> str:
    names = {"border": "in the border", "corners": "in the corners", "outside": "outside the body"}
    parts = [
        f"{found[place]['first']:.0%} lies {name} ({found[place]['second']:.0%} of the area)"
        for place, name in names.items()
        if found[place]["first"] is not None
    ]
    if not parts:
        return "Where the evidence lies cannot be said: every map is zero everywhere."
    verdict = (
        f"there is more evidence than area {' and '.join(names[place] for place in more)}"
        if more
        else "in none of these is more evidence than area shown"
    )
    grain = " The cells of the map are larger than a corner, so that these shares are rough." if coarse else ""
    return f"Of the evidence, {', '.join(parts)}: {verdict}.{grain}"


# --- 4 does a letter matter -------------------------------------------------------------------------------------------


def markers(sample: Sample, score: evidence.Score, *, letter: str = "R") -> Finding:
    """Paste a letter into each corner and measure what the score and the call make of it.

    Parameters
    ----------
    sample : Sample
        From `look`.
    score : callable
        See `evidence.Score`.
    letter : {"L", "R"}
        Which.

    Returns
    -------
    Finding
        By corner: ``median`` and ``largest`` change of the score (signed), ``to_pneumonia`` and ``to_normal``, the
        calls that flip; ``flipped``, the images whose call flips in a corner or more, with Wilson's ``interval``.

    Raises
    ------
    UsageError
        For another letter.
    """
    changes = evidence.marker_changes(score, sample.images, letter=letter)
    before = sample.outputs.score.astype(np.float64)
    after = np.where(changes == 0, sample.called[:, None], before[:, None] + changes > sample.threshold)
    flips = after != sample.called[:, None]
    corners = [
        {
            "corner": corner,
            "median": float(np.median(change)),
            "median_absolute": float(np.median(np.abs(change))),
            "largest": float(change[np.abs(change).argmax()]),
            "to_pneumonia": int((flip & ~sample.called).sum()),
            "to_normal": int((flip & sample.called).sum()),
        }
        for corner, change, flip in zip(evidence.CORNERS, changes.T, flips.T, strict=True)
    ]
    flipped, n = int(flips.any(axis=1).sum()), len(before)
    sure = intervals.wilson(flipped, n)
    rows: list[Row] = []
    for corner, change in zip(evidence.CORNERS, changes.T, strict=True):
        rows += _rows("markers", corner, "score_change", sample, change)
    sentence = (
        f"A letter {letter} in a corner moves the score by {np.median(np.abs(changes)):.4f} in the median and by "
        f"{np.abs(changes).max():.4f} at most; {flipped:,} of {n:,} calls flip in a corner or more"
        + (f" (95 % {sure.low:.1%} to {sure.high:.1%})." if sure else ".")
        + (" What says nothing of a lung changes calls." if flipped else "")
    )
    content = {
        "letter": letter, "corners": corners, "flipped": flipped, "interval": sure and sure.as_dict(),
        "median_absolute": float(np.median(np.abs(changes))), "largest_absolute": float(np.abs(changes).max()),
        "sentence": sentence,
    }  # fmt: skip
    return Finding(content, rows)


# --- 5 does the map add up --------------------------------------------------------------------------------------------


def invariant(sample: Sample, *, precision: str = "float32") -> Finding:
    """Measure how far each map, with the bias term, is from the logit that it divides.

    Parameters
    ----------
    sample : Sample
        From `look`.
    precision : {"float32", "bfloat16"}
        Of the model's arithmetic.

    Returns
    -------
    Finding
        ``largest``, the largest distance, and whether it ``holds``: is at most `ROUNDING` x (1 + the largest logit).
    """
    outputs = sample.outputs
    sums = outputs.evidence.sum(axis=(1, 2), dtype=np.float64) + outputs.bias
    misses = np.abs(sums - outputs.logit)
    largest = float(misses.max())
    tolerance = ROUNDING[precision] * (1 + float(np.abs(outputs.logit).max()))
    holds = bool(largest <= tolerance)
    sentence = (
        f"The sum of a map and its bias term is off the logit by {largest:.1e} at most (rounding allows "
        f"{tolerance:.1e}): {'the maps add up' if holds else 'the maps do not add up, and must not be used'}."
    )
    content = {"largest": largest, "tolerance": tolerance, "holds": holds, "sentence": sentence}
    return Finding(content, _rows("invariant", "", "distance", sample, misses))


# --- what the checks share --------------------------------------------------------------------------------------------


def paired(first: npt.ArrayLike, second: npt.ArrayLike, *, groups: npt.NDArray[np.str_], seed: int) -> dict[str, Any]:
    """Compare two figures of the same images.

    Parameters
    ----------
    first, second : array_like of float, shape (n,)
        Images where either is no number are left out.
    groups : ndarray of str, shape (n,)
        The patient of each; what the bootstrap draws.
    seed : int
        Of the bootstrap, 0 or more.

    Returns
    -------
    dict
        ``n``; the means ``first`` and ``second`` and their ``difference``, None without images; ``interval`` of the
        difference, None where it never varies, and for the same reason where there is one group only.
    """
    one, two = (np.asarray(each, dtype=np.float64) for each in (first, second))
    known = np.isfinite(one) & np.isfinite(two)
    one, two, groups = one[known], two[known], groups[known]
    if not len(one):
        return {"n": 0, "first": None, "second": None, "difference": None, "interval": None}
    gap = one - two

    def mean(weights: Floats) -> dict[str, float | None]:
        return {"difference": float(weights @ gap / weights.sum())}

    sure = intervals.bootstrap_by_group(mean, groups, resamples=RESAMPLES, seed=seed)["difference"]
    means = {"first": float(one.mean()), "second": float(two.mean()), "difference": float(gap.mean())}
    return {"n": len(one), **means, "interval": sure and sure.as_dict()}


def _sign(found: Mapping[str, Any]) -> int:
    """Return -1 or 1 where the interval of a difference excludes 0, else 0."""
    sure = found["interval"]
    return 0 if sure is None else int(sure["low"] > 0) - int(sure["high"] < 0)


def _rows(check: str, part: str, measure: str, sample: Sample, values: npt.NDArray[Any]) -> list[Row]:
    return [
        (check, part, measure, str(name), float(value)) for name, value in zip(sample.image_ids, values, strict=True)
    ]
