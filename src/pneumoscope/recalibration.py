"""Recalibration: a site's own labelled images give a bundle new operating points and a new temperature.

Owns what is measured on the site's images, how sure it is, how many images would make it surer, and the new bundle. The
network stays as it is, byte for byte. Loads no Keras. Nothing that could name a patient goes into the bundle: no file
name, no folder, no group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pneumoscope import calibration, intervals, metrics
from pneumoscope.bundle import Bundle, OnnxNetwork
from pneumoscope.calibration import Temperature
from pneumoscope.catalog import Catalog
from pneumoscope.counts import Confusion, confusion
from pneumoscope.curves import COST_RATIO
from pneumoscope.errors import UsageError
from pneumoscope.intervals import LEVEL, AucEstimate, Interval
from pneumoscope.metrics import Evaluation
from pneumoscope.narration import Narration
from pneumoscope.predictions import Predictions
from pneumoscope.predictor import Curve, Description, Predictor
from pneumoscope.site_sample import SITE, Sample, require_enough, score
from pneumoscope.specs import LABELS, RESEARCH_USE

WIDTH: Final = 0.1
"""Width of the interval that `images_needed` is asked for, unless another is wished."""

RESAMPLES: Final = 1000
"""Resamples of whole groups behind each bootstrap interval."""

_FEW_GROUPS: Final = 20  # fewer make the bootstrap's intervals too narrow
_SHARES: Final = ("sensitivity", "specificity")
_DETAILS: Final = ("subgroups", "decision_curve", "bootstrap", "undefined")  # too much for a bundle, as in `export`
_OWN_KEYS: Final = ("schema_version", "sha256")  # which every writing of a bundle sets anew


@dataclass(frozen=True)
class PointChange:
    """One operating point, before and after.

    Attributes
    ----------
    name : str
        Of the operating point.
    before : Confusion or None
        The site's images at the old threshold; None where the old bundle had no such point.
    after : Confusion
        The same images at the new threshold, which was chosen on them: flattering.
    threshold_interval : Interval or None
        Of the new threshold, by bootstrap; None where every resample chose the same.
    group_intervals : mapping of str to (Interval or None)
        ``before.sensitivity``, ``before.specificity``, ``after.sensitivity``, ``after.specificity`` by bootstrap over
        groups; those after include that the threshold was chosen. Without the ones before where there was no point.
    flattery : mapping of str to float
        ``sensitivity`` and ``specificity``: by how much a threshold chosen on such a sample is better there than on
        other images, on average (the optimism of Efron 1983, by bootstrap over groups).
    needed : mapping of str to int
        ``sensitivity`` and ``specificity``: the PNEUMONIA and the NORMAL images for an interval of the wished width.
    """

    name: str
    before: Confusion | None
    after: Confusion
    threshold_interval: Interval | None
    group_intervals: Mapping[str, Interval | None]
    flattery: Mapping[str, float]
    needed: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        return {
            "before": None if self.before is None else _figures(self.before),
            "after": _figures(self.after),
            "threshold_interval": self.threshold_interval and self.threshold_interval.as_dict(),
            "group_intervals": {name: each and each.as_dict() for name, each in self.group_intervals.items()},
            "flattery": dict(self.flattery),
            "images_needed": dict(self.needed),
        }


@dataclass(frozen=True)
class Recalibrated:
    """What recalibration found and wrote.

    Attributes
    ----------
    bundle : Bundle
        The new one.
    sample : Sample
        What it stands on.
    points : tuple of PointChange
        The default operating point first.
    evaluation : Evaluation
        Of the site's images at the new points and the new temperature.
    auc_group_interval : Interval or None
        Of the AUC, by bootstrap over groups.
    temperature_before : float or None
        The old one.
    temperature : Temperature
        The new one, or why there is none.
    loss_before, loss : float
        Mean binary cross-entropy on the site's images with the old and the new temperature, nats.
    width : float
        What `PointChange.needed` stands for.
    """

    bundle: Bundle
    sample: Sample
    points: tuple[PointChange, ...]
    evaluation: Evaluation
    auc_group_interval: Interval | None
    temperature_before: float | None
    temperature: Temperature
    loss_before: float
    loss: float
    width: float

    @property
    def auc(self) -> AucEstimate:
        """The AUC on the site's images, with DeLong's interval."""
        if self.evaluation.auc is None:  # both labels are there, or nothing was chosen
            raise AssertionError("an AUC needs both labels")
        return self.evaluation.auc


def recalibrate(
    source: Bundle,
    catalog: Catalog,
    *,
    folder: Path,
    width: float = WIDTH,
    cost_ratio: float = COST_RATIO,
    threads: int = 0,
    seed: int = 0,
    resamples: int = RESAMPLES,
    narration: Narration | None = None,
) -> Recalibrated:
    """Choose a bundle's operating points and temperature anew on a site's own labelled images, and write a new bundle.

    Parameters
    ----------
    source : Bundle
        Stays as it is.
    catalog : Catalog
        The site's images; all of them are used, whatever their split.
    folder : Path
        Of the new bundle: new, or an earlier bundle's, but not that of `source`.
    width : float
        Of the interval that the number of images needed is said for, between 0 and 1.
    cost_ratio : float
        How many false positives a false negative weighs in the operating point ``cost``; above 0.
    threads : int
        CPU threads of the network; 0 takes all cores.
    seed : int
        Of the bootstrap, 0 or more.
    resamples : int
        Of the bootstrap, 1 or more.
    narration : Narration, optional
        Who speaks; silent where not given.

    Returns
    -------
    Recalibrated

    Raises
    ------
    UsageError
        For a number out of its range, or where `folder` is the bundle's own.
    DataError
        Where the sample has fewer than `LEAST_IMAGES` usable images of a label.
    StoreError
        Where the network was changed meanwhile, or `folder` holds something else than a bundle.
    """
    voice = narration or Narration("silent")
    _check_call(source, folder, width=width, cost_ratio=cost_ratio, resamples=resamples)
    network = source.network_bytes()
    loaded = OnnxNetwork(network, name=str(source.folder / "model.onnx"), threads=threads)
    sample = score(Predictor(source.description, loaded), catalog, narration=voice)
    require_enough(sample)
    old, predictions = source.description, sample.predictions
    chosen = _default_first(metrics.choose_operating_points(predictions, cost_ratio=cost_ratio), old)
    temperature = calibration.fit_temperature(predictions.labels, predictions.scores)
    with voice.stage(f"Resampling {sample.n_groups:,} groups {resamples:,} times"):
        drawn = intervals.resample_by_group(
            _statistics(predictions, chosen, old.points, cost_ratio), sample.groups, resamples=resamples, seed=seed
        )
    points = tuple(_change(name, at, old, predictions, drawn, width=width) for name, at in chosen.items())
    evaluation = metrics.evaluate(predictions, operating_points=chosen, temperature=temperature.value)
    auc_interval = intervals.percentile_interval(drawn["auc"])
    description = replace(
        old,
        points=chosen,
        chosen_on=SITE,
        curve=Curve.of(SITE, predictions.labels, predictions.scores),
        temperature=temperature.value,
        metrics={**old.metrics, SITE: _figures_of(evaluation, points, auc_interval)},
        provenance=_provenance(old, sample),
    )
    further = {key: value for key, value in source.content.items() if key not in {*old.as_dict(), *_OWN_KEYS}}
    bundle = Bundle.write(folder, network=network, description=description, further=further)
    result = Recalibrated(
        bundle=bundle,
        sample=sample,
        points=points,
        evaluation=evaluation,
        auc_group_interval=auc_interval,
        temperature_before=old.temperature,
        temperature=temperature,
        loss_before=_loss(predictions, old.temperature),
        loss=_loss(predictions, temperature.value),
        width=width,
    )
    say(result, voice)
    return result


def _check_call(source: Bundle, folder: Path, *, width: float, cost_ratio: float, resamples: int) -> None:
    """Refuse a call that cannot end well before the images are read."""
    images_needed(0.5, width=width)
    if not 0 < cost_ratio < math.inf:
        raise UsageError(f"The cost ratio is {cost_ratio}; give a finite number above 0, for example 5.")
    if resamples < 1:
        raise UsageError(f"A bootstrap of {resamples} resamples was asked for; give 1 or more, usually 1000.")
    if folder.resolve() == source.folder.resolve():
        raise UsageError(
            f"{folder} is the bundle to recalibrate, which stays as it is; name another folder for the new one with -o."
        )
    Bundle.require_free(folder)


# --- how sure ---------------------------------------------------------------------------------------------------------


def images_needed(share: float, *, width: float, level: float = LEVEL) -> int:
    """Return the smallest number of images whose Wilson interval at a share is no wider than wished.

    The interval of `intervals.wilson`, with ``share * n`` successes whole or not, narrows with every image. Images are
    taken as independent: count patients where several images are of one.

    Parameters
    ----------
    share : float
        Such as a sensitivity, in [0, 1].
    width : float
        From the low to the high end, between 0 and 1.
    level : float
        Of the interval, between 0 and 1.

    Returns
    -------
    int
        1 or more.

    Raises
    ------
    UsageError
        For a number out of its range.
    """
    intervals.check_level(level)
    if not 0 <= share <= 1:
        raise UsageError(f"The share is {share}; give a number from 0 to 1, for example a sensitivity of 0.95.")
    if not 0 < width < 1:
        raise UsageError(f"The width of an interval is {width}; give a number between 0 and 1, for example 0.1.")
    z = NormalDist().inv_cdf((1 + level) / 2)

    def fits(n: int) -> bool:
        return 2 * z / (n + z**2) * math.sqrt(n * share * (1 - share) + z**2 / 4) <= width

    enough = 1
    while not fits(enough):
        enough *= 2
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if fits(middle) else (middle, enough)
    return enough


def _statistics(
    predictions: Predictions, chosen: Mapping[str, float], old: Mapping[str, float], cost_ratio: float
) -> intervals.Statistics:
    """Return what one resample says: thresholds chosen on it, figures there, and how much better than on all images."""
    labels, scores = predictions.labels, predictions.scores
    weighted = intervals.weighted_auc(labels, scores)

    def figures(weights: npt.NDArray[np.float64]) -> dict[str, float | None]:
        again = np.repeat(np.arange(len(labels)), weights.astype(int))
        of_labels, of_scores = labels[again], scores[again]
        points = metrics.choose_operating_points(Predictions(predictions.table.iloc[again]), cost_ratio=cost_ratio)
        found: dict[str, float | None] = {"auc": weighted(weights)}
        for name in chosen:
            threshold = points.get(name)
            found[f"{name}.threshold"] = threshold
            here, there = (
                None if threshold is None else confusion(*each, threshold=threshold)
                for each in ((of_labels, of_scores), (labels, scores))
            )
            before = None if name not in old else confusion(of_labels, of_scores, threshold=old[name])
            for share in _SHARES:
                was, on_these, on_all = (None if at is None else getattr(at, share) for at in (before, here, there))
                found |= {f"{name}.before.{share}": was, f"{name}.after.{share}": on_these}
                found[f"{name}.flattery.{share}"] = None if on_these is None else on_these - on_all
        return found

    return figures


def _change(
    name: str,
    threshold: float,
    old: Description,
    predictions: Predictions,
    drawn: Mapping[str, npt.NDArray[np.float64]],
    *,
    width: float,
) -> PointChange:
    labels, scores = predictions.labels, predictions.scores
    after = confusion(labels, scores, threshold=threshold)
    before = confusion(labels, scores, threshold=old.points[name]) if name in old.points else None
    times = ("after",) if before is None else ("before", "after")
    flattery = {share: drawn[f"{name}.flattery.{share}"] for share in _SHARES}
    shares = {"sensitivity": after.sensitivity or 0.0, "specificity": after.specificity or 0.0}
    return PointChange(
        name=name,
        before=before,
        after=after,
        threshold_interval=intervals.percentile_interval(drawn[f"{name}.threshold"]),
        group_intervals={
            f"{time}.{share}": intervals.percentile_interval(drawn[f"{name}.{time}.{share}"])
            for time in times
            for share in _SHARES
        },
        flattery={share: float(np.nanmean(values)) for share, values in flattery.items() if np.isfinite(values).any()},
        needed={share: images_needed(value, width=width) for share, value in shares.items()},
    )


def _default_first(points: Mapping[str, float], old: Description) -> dict[str, float]:
    """Keep what was the default operating point the default."""
    default = old.point[0]
    first = {default: points[default]} if default in points else {}
    return {**first, **points}


def _loss(predictions: Predictions, temperature: float | None) -> float:
    labels, scores = predictions.labels, predictions.scores
    return calibration.log_loss(
        labels, scores if temperature is None else calibration.apply_temperature(scores, temperature)
    )


def _provenance(old: Description, sample: Sample) -> dict[str, Any]:
    normal, sick = sample.counts
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "pneumoscope": version("pneumoscope"),
        "n": len(sample.predictions),
        "n_positive": sick,
        "n_negative": normal,
        "n_groups": sample.n_groups,
        "left_out": dict(sample.left_out),
        "not_assessable": sample.unlike,
        "data_sha256": sample.sha256,
        "operating_points_before": dict(old.points),
        "temperature_before": old.temperature,
        "chosen_on_before": old.chosen_on,
    }
    return {**old.provenance, "recalibrated": [*old.provenance.get("recalibrated", ()), record]}


def _figures_of(
    evaluation: Evaluation, points: tuple[PointChange, ...], auc_interval: Interval | None
) -> dict[str, Any]:
    """Return the figures on the site's images as ``metrics.json`` names them, and under ``changes`` each point's."""
    figures = {key: value for key, value in evaluation.as_dict().items() if key not in _DETAILS}
    figures["group_intervals"] = {"auc": auc_interval and auc_interval.as_dict()}
    return {**figures, "changes": {point.name: point.as_dict() for point in points}}


def _figures(at: Confusion) -> dict[str, Any]:
    found, sure = at.figures(), at.intervals()
    return {
        "threshold": at.threshold,
        **{share: found[share] for share in _SHARES},
        "intervals": {share: each and each.as_dict() for share in _SHARES for each in (sure[share],)},
        "false_negatives": at.false_negatives,
        "false_positives": at.false_positives,
    }


# --- said ------------------------------------------------------------------------------------------------------------


def say(result: Recalibrated, voice: Narration) -> None:
    """Show what recalibration found.

    Parameters
    ----------
    result : Recalibrated
        From `recalibrate`.
    voice : Narration
        Who speaks.
    """
    normal, sick = result.sample.counts
    rows = [_row(point, when) for point in result.points for when in ("before", "after")]
    voice.table(
        f"Operating points on the site's {normal + sick:,} images ({sick:,} PNEUMONIA, {normal:,} NORMAL), with 95 % "
        "intervals",
        ["operating point", "threshold", "sensitivity", "specificity", "FN", "FP"],
        [row for row in rows if row],
    )
    for sentence in sentences(result):
        voice.say(sentence)
    for sentence in warnings(result):
        voice.warn(sentence)


def _row(point: PointChange, when: str) -> list[str]:
    at = point.before if when == "before" else point.after
    if at is None:
        return []
    sure = at.intervals()
    interval = point.threshold_interval if when == "after" else None
    return [
        f"{point.name}, {'old' if when == 'before' else 'new'}",
        _with(at.threshold, interval),
        _with(at.sensitivity, sure["sensitivity"]),
        _with(at.specificity, sure["specificity"]),
        str(at.false_negatives),
        str(at.false_positives),
    ]


def _with(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({interval.low:.3f}-{interval.high:.3f})" if interval else "")


def sentences(result: Recalibrated) -> list[str]:
    """Say in words what recalibration found.

    Parameters
    ----------
    result : Recalibrated
        From `recalibrate`.

    Returns
    -------
    list of str
    """
    sample, point = result.sample, result.points[0]
    said = []
    if sample.left_out:
        parts = ", ".join(f"{reason}: {n:,}" for reason, n in sorted(sample.left_out.items()))
        said.append(f"{sum(sample.left_out.values()):,} images were left out ({parts}).")
    groups = "" if result.auc_group_interval is None else f", by patient {_ends(result.auc_group_interval)}"
    said.append(f"AUC {_with(result.auc.auc, result.auc.interval)}{groups}; no threshold or temperature changes it.")
    if result.temperature.value is None:
        said.append(f"No temperature. {result.temperature.reason}")
    else:
        earlier = "none" if result.temperature_before is None else f"{result.temperature_before:.3f}"
        said.append(
            f"Temperature: {earlier} before, {result.temperature.value:.3f} now; the loss of the probabilities on "
            f"these images goes from {result.loss_before:.4f} to {result.loss:.4f}."
        )
    before, sure = point.before, point.threshold_interval
    if before is not None and sure is not None and sure.low <= before.threshold <= sure.high:
        said.append(
            f"The old threshold of {point.name}, {before.threshold:.3f}, lies within the interval of the new one, "
            f"{_ends(sure)}: these images give no reason to change it."
        )
    for share, label in zip(_SHARES, (1, 0), strict=True):
        said.append(
            f"For an interval of the {share} no wider than {result.width:g} at {point.name} you need "
            f"{point.needed[share]:,} {LABELS[label]} images of different patients; you have "
            f"{sample.counts[label]:,} of {sample.n_groups_of(label):,}."
        )
    if sample.unlike is None:
        said.append("Whether the site's images are like the training images is not known to this bundle.")
    else:
        said.append(
            f"{sample.unlike:,} of {len(sample.predictions):,} images ({sample.unlike / len(sample.predictions):.1%}) "
            "are unlike the training images and would be called not assessable; that reference was carried over "
            "unchanged."
        )
    said.append(f"{RESEARCH_USE}.")
    return said


def warnings(result: Recalibrated) -> list[str]:
    """Say in words what a reader of the figures must not miss.

    Parameters
    ----------
    result : Recalibrated
        From `recalibrate`.

    Returns
    -------
    list of str
    """
    sample, point = result.sample, result.points[0]
    flattery = " and ".join(f"{100 * value:.1f} points of {share}" for share, value in point.flattery.items())
    said = [
        (
            f"Figures at the new thresholds flatter (at {point.name} by about {flattery or 'an unknown amount'}), for "
            f"the thresholds were chosen on the same {len(sample.predictions):,} images; measure them on other images."
        )
    ]
    for label, name in enumerate(LABELS):
        if (n := sample.n_groups_of(label)) < _FEW_GROUPS:
            said.append(f"The {name} images are of {n} patients only: the intervals are too narrow.")
    if sample.unlike is not None and 5 * sample.unlike > len(sample.predictions):
        said.append("More than a fifth of the site's images are unlike the training images: train on such images.")
    return said


def _ends(interval: Interval) -> str:
    return f"{interval.low:.3f}-{interval.high:.3f}"
