"""The scorecard: what is known about a run's models from their Predictions, and how far it can be believed.

Owns which images each choice comes from (thresholds, temperature and prediction sets never from the test images), which
models are compared, and the order and names of all this in ``metrics.json`` and ``metrics.csv``. The figures come from
`metrics`, `comparison`, `conformal` and `shift`. Knows nothing of networks and files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from pneumoscope import calibration, comparison, metrics, shift
from pneumoscope.comparison import BETTER, Comparison
from pneumoscope.conformal import Conformal, SetMeasure
from pneumoscope.counts import Confusion
from pneumoscope.errors import DataError, RunError
from pneumoscope.intervals import LEVEL, Interval
from pneumoscope.metrics import Evaluation
from pneumoscope.predictions import Predictions
from pneumoscope.shift import Moved
from pneumoscope.specs import EvaluationSpec

SCORED: Final = ("validation", "calibration", "test")
"""The splits that models are scored on, in the order in which they are shown; not every run has all."""

Scored = Mapping[str, Mapping[str, Predictions]]
"""Predictions by model, then by split; every model on the same images in the same order."""


@dataclass(frozen=True)
class Choice:
    """What is chosen for a model on images that are not test images, and carried to all others unchanged.

    Attributes
    ----------
    points : mapping of str to float
        Thresholds by operating point, the default one first; empty where a class was missing.
    temperature : calibration.Temperature
        With the reason where none could be fitted.
    conformal : Conformal
        The rule for prediction sets.
    """

    points: Mapping[str, float]
    temperature: calibration.Temperature
    conformal: Conformal

    @classmethod
    def on(cls, predictions: Predictions, *, spec: EvaluationSpec) -> Choice:
        """Choose on some images.

        Parameters
        ----------
        predictions : Predictions
            Of the calibration part, or of validation.
        spec : EvaluationSpec
            Cost ratio and coverage.

        Returns
        -------
        Choice

        Raises
        ------
        DataError
            Where there is no image.
        """
        labels, scores = predictions.labels, predictions.scores
        return cls(
            metrics.choose_operating_points(predictions, cost_ratio=spec.cost_ratio),
            calibration.fit_temperature(labels, scores),
            Conformal.fit(labels, scores, coverage=spec.coverage),
        )

    @classmethod
    def of_dict(cls, content: Mapping[str, Any]) -> Choice:
        """Take up the choice that one split's entry in ``metrics.json`` was made with.

        Parameters
        ----------
        content : mapping
            As `Model.as_dict` holds it for a split.

        Returns
        -------
        Choice

        Raises
        ------
        RunError
            Where the entry does not hold one, because an earlier version wrote it.
        """
        try:
            rule = content["conformal"]["rule"]
            conformal = Conformal(**{name: rule[name] for name in Conformal.__dataclass_fields__})
            points = {name: float(point["threshold"]) for name, point in content["operating_points"].items()}
            value = content["calibration"]["temperature"]
            reason = content["undefined"].get("calibration.temperature")
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"The run's metrics.json does not say what was chosen for its models ({error}), as where an earlier "
                "version wrote it; score the run again with pneumoscope evaluate RUN."
            ) from error
        return cls(points, calibration.Temperature(value, reason), conformal)


@dataclass(frozen=True)
class Model:
    """All about one model, or about a baseline that stands beside the models.

    Attributes
    ----------
    choice : Choice
        Made without test images.
    evaluations : mapping of str to Evaluation
        By split.
    sets : mapping of str to SetMeasure
        What the rule for prediction sets did, by split.
    moved : Moved or None
        How far the default operating point moved to the test images; None without an operating point.
    """

    choice: Choice
    evaluations: Mapping[str, Evaluation]
    sets: Mapping[str, SetMeasure]
    moved: Moved | None

    def as_dict(self) -> dict[str, Any]:
        """Return each split's figures; under ``conformal`` stand what its prediction sets did and their ``rule``."""
        reason = self.choice.temperature.reason
        found = {}
        for split, evaluation in self.evaluations.items():
            content = evaluation.as_dict()
            content["undefined"] |= {} if reason is None else {"calibration.temperature": reason}
            content["conformal"] = {"rule": self.choice.conformal.as_dict(), **self.sets[split].as_dict()}
            found[split] = content
        return found


@dataclass(frozen=True)
class Scorecard:
    """All models of a run.

    Attributes
    ----------
    chosen_on : str
        The split that thresholds, temperatures and prediction sets come from.
    models, shortcuts : mapping of str to Model
        By approach; and the baselines that see no lung.
    comparisons : mapping of str to (tuple of Comparison)
        By split: each model and baseline with each after it; empty without a bootstrap.
    """

    chosen_on: str
    models: Mapping[str, Model]
    shortcuts: Mapping[str, Model]
    comparisons: Mapping[str, tuple[Comparison, ...]]

    @property
    def splits(self) -> list[str]:
        """The splits that were scored, in the order of `SCORED`."""
        first = next(iter(self.models.values()))
        return [split for split in SCORED if split in first.evaluations]

    def as_dict(self) -> dict[str, Any]:
        """Return everything for ``metrics.json``."""
        return {
            "chosen_on": self.chosen_on,
            "models": {name: model.as_dict() for name, model in self.models.items()},
            "shortcuts": {name: model.as_dict() for name, model in self.shortcuts.items()},
            "comparisons": {split: [one.as_dict() for one in found] for split, found in self.comparisons.items()},
            "moved": {
                name: None if model.moved is None else model.moved.as_dict() for name, model in self.models.items()
            },
        }

    def table(self, split: str) -> list[list[str]]:
        """Return a split's rows for `TABLE_HEAD`, one per model, the shortcut baselines last."""
        both = [*self.models.items(), *self.shortcuts.items()]
        return [_table_row(name, model.evaluations[split]) for name, model in both]

    def verdicts(self, split: str) -> list[str]:
        """Return in words which models can be told apart on a split, and whether they beat the shortcuts."""
        found = self.comparisons.get(split, ())
        said = [one.sentence for one in found if one.first in self.models and one.second in self.models]
        against = [one for one in found if one.first in self.models and one.second in self.shortcuts]
        if against and all(one.verdict == BETTER for one in against):
            best = max(auc for one in against if (auc := one.auc.second) is not None)
            names = " and ".join(self.shortcuts)
            said.append(
                f"Every model is better than what can be had without looking at a lung ({names}: AUC up to {best:.3f})."
            )
        else:
            said += [_not_better(model, of) for model in self.models if (of := _unbeaten(model, against))]
        if split == "test":
            said += [f"{name}: {model.moved.sentence}" for name, model in self.models.items() if model.moved]
        return said


def _unbeaten(model: str, against: Sequence[Comparison]) -> list[Comparison]:
    return [one for one in against if one.first == model and one.verdict != BETTER]


def _not_better(model: str, unbeaten: Sequence[Comparison]) -> str:
    def said(auc: float | None) -> str:
        return "undefined" if auc is None else f"{auc:.3f}"

    baselines = " or ".join(f"{one.second} (AUC {said(one.auc.second)})" for one in unbeaten)
    return f"{model} (AUC {said(unbeaten[0].auc.first)}) is not shown to be better than {baselines}: those see no lung."


def measure(
    models: Scored,
    shortcuts: Scored,
    *,
    rows: Mapping[str, pd.DataFrame],
    spec: EvaluationSpec,
    choices: Mapping[str, Choice] | None = None,
    chosen_on: str | None = None,
    seed: int = 0,
    announce: Callable[[float], object] | None = None,
) -> Scorecard:
    """Measure and compare all models of a run.

    Parameters
    ----------
    models, shortcuts : mapping of str to (mapping of str to Predictions)
        By name, then by split of `SCORED`.
    rows : mapping of str to DataFrame
        By split: the Catalog's rows, in the order of the Predictions.
    spec : EvaluationSpec
        How to measure.
    choices : mapping of str to Choice, optional
        By name; made on the calibration part, or on validation where there is none, where not given.
    chosen_on : str, optional
        The split that `choices` were made on, where that is not one of these.
    seed : int
        Of the bootstrap.
    announce : callable, optional
        Called once, before the bootstrap starts, with the seconds that it will take about.

    Returns
    -------
    Scorecard

    Raises
    ------
    DataError
        Where there is no model, a split holds no image, a model was not scored on the rows of each split in their
        order, or there are neither choices nor images to make them on.
    """
    chosen_on = chosen_on or ("calibration" if "calibration" in rows else "validation")
    if not models:
        raise DataError("There is no model to measure; score at least one on labelled images first.")
    if choices is None and chosen_on not in rows:
        raise DataError(f"There is no {chosen_on} image to choose thresholds on; hold some out, or give the choices.")
    scored = {**models, **shortcuts}
    _check_rows(scored, rows)
    made = choices or {name: Choice.on(parts[chosen_on], spec=spec) for name, parts in scored.items()}
    groups = {split: part["group"].to_numpy(dtype=str) for split, part in rows.items()}
    if announce is not None and spec.bootstrap:
        announce(_cost(scored, made, groups, resamples=spec.bootstrap))
    measured = {
        name: _measured(parts, made[name], rows=rows, chosen_on=chosen_on, resamples=spec.bootstrap, seed=seed)
        for name, parts in scored.items()
    }
    return Scorecard(
        chosen_on,
        {name: measured[name] for name in models},
        {name: measured[name] for name in shortcuts},
        _compared(scored, made, groups, resamples=spec.bootstrap, seed=seed),
    )


def _check_rows(scored: Scored, rows: Mapping[str, pd.DataFrame]) -> None:
    for name, parts in scored.items():
        for split in {**rows, **parts}:
            both = split in rows and split in parts
            if not both or parts[split].table["path"].tolist() != rows[split]["path"].tolist():
                raise DataError(
                    f"The {split} scores of {name} are not those of the catalog's {split} rows in their order; "
                    "score it on these rows again."
                )


def _measured(
    parts: Mapping[str, Predictions],
    choice: Choice,
    *,
    rows: Mapping[str, pd.DataFrame],
    chosen_on: str,
    resamples: int,
    seed: int,
) -> Model:
    evaluations = {
        split: metrics.evaluate(
            part,
            operating_points=choice.points,
            groups=rows[split]["group"].to_numpy(dtype=str),
            subgroups=divisions(rows[split]),
            bootstrap=resamples,
            seed=seed,
            temperature=choice.temperature.value,
        )
        for split, part in parts.items()
    }
    sets = {split: choice.conformal.measure(part.labels, part.scores) for split, part in parts.items()}
    return Model(choice, evaluations, sets, _moved(parts, choice.points, chosen_on))


def _moved(parts: Mapping[str, Predictions], points: Mapping[str, float], chosen_on: str) -> Moved | None:
    if not points or not {chosen_on, "test"} <= set(parts):
        return None
    name, threshold = next(iter(points.items()))
    return shift.moved(parts[chosen_on], parts["test"], threshold=threshold, point=name, names=(chosen_on, "test"))


def _compared(
    scored: Scored,
    choices: Mapping[str, Choice],
    groups: Mapping[str, npt.NDArray[np.str_]],
    *,
    resamples: int,
    seed: int,
) -> dict[str, tuple[Comparison, ...]]:
    """Compare all with all on every split; nothing without a bootstrap, which the verdict needs."""
    pairs = math.comb(len(scored), 2)
    if not resamples or not pairs:
        return {}
    enough = max(resamples, math.ceil(2 * pairs / (1 - LEVEL)))  # fewer could decide nothing
    thresholds = {name: next(iter(choice.points.values()), metrics.HALF) for name, choice in choices.items()}
    return {
        split: tuple(
            comparison.compare_all(
                {name: parts[split] for name, parts in scored.items()},
                groups=of_split,
                thresholds={name: thresholds[name] for name in scored},
                resamples=enough,
                seed=seed,
            )
        )
        for split, of_split in groups.items()
    }


def _cost(
    scored: Scored, choices: Mapping[str, Choice], groups: Mapping[str, npt.NDArray[np.str_]], *, resamples: int
) -> float:
    """Estimate the seconds of every bootstrap; the comparisons take about as long as the models' own."""
    name, parts = next(iter(scored.items()))
    of_one = sum(
        metrics.bootstrap_seconds(
            part, groups=groups[split], operating_points=choices[name].points, resamples=resamples
        )
        for split, part in parts.items()
    )
    return 2 * len(scored) * of_one


def divisions(rows: pd.DataFrame) -> dict[str, npt.NDArray[np.str_]]:
    """Divide images by what a figure may depend on; a division that holds one value only is left out.

    Parameters
    ----------
    rows : DataFrame
        A Catalog's rows.

    Returns
    -------
    dict of str to (ndarray of str, shape (n,))
        ``subtype``: ``bacteria``, ``virus``, else ``NORMAL`` or ``PNEUMONIA``. ``series``: the beginning of the group's
        name, for example ``IM`` or ``NORMAL2-IM``; ``unknown`` where the file name or the manifest tells none.
        ``size``: the shorter side of the original, in thirds of these images.
    """
    if not len(rows):
        return {}
    label = np.where(rows["label"] == 1, "PNEUMONIA", "NORMAL")
    subtype = rows["subtype"].to_numpy(dtype=str)
    named = rows["group"].str.partition("/")  # a group from a manifest may be a bare number: that is no series
    series = named[0].where((named[1] == "/") & (named[0] != "file"), "unknown")
    found = {
        "subtype": np.where(subtype == "", label, subtype),
        "series": series.to_numpy(dtype=str),
        "size": _thirds(rows[["width_px", "height_px"]].min(axis=1).to_numpy()),
    }
    return {name: values for name, values in found.items() if len(np.unique(values)) > 1}


def _thirds(sides: npt.NDArray[Any]) -> npt.NDArray[np.str_]:
    edges = np.unique(np.quantile(sides, [1 / 3, 2 / 3], method="lower")).astype(int)
    names = [f"up to {edges[0]:,} px", *(f"{a + 1:,} to {b:,} px" for a, b in pairwise(edges))]
    names.append(f"over {edges[-1]:,} px")
    return np.asarray(names)[np.searchsorted(edges, sides)]


# --- shown -----------------------------------------------------------------------------------------------------------

TABLE_HEAD: Final = (
    "model", "AUC", "at 0.5: accuracy", "FN", "FP", "at Youden: sensitivity", "specificity", "FN", "FP"
)  # fmt: skip
"""Columns of `Scorecard.table`; intervals are 95 %, DeLong's and Wilson's."""


def _table_row(name: str, evaluation: Evaluation) -> list[str]:
    half = evaluation.at_half
    point = next(iter(evaluation.operating_points.values()), None)
    auc = evaluation.auc
    return [
        name,
        _with_interval(evaluation.roc.auc, None if auc is None else auc.interval),
        "-" if half.accuracy is None else f"{half.accuracy:.4f}",
        str(half.false_negatives),
        str(half.false_positives),
        *(_point_cells(point) if point is not None else ["-"] * 4),
    ]


def _point_cells(point: Confusion) -> list[str]:
    intervals = point.intervals()
    return [
        _with_interval(point.sensitivity, intervals["sensitivity"]),
        _with_interval(point.specificity, intervals["specificity"]),
        str(point.false_negatives),
        str(point.false_positives),
    ]


def _with_interval(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ({interval.low:.3f}-{interval.high:.3f})" if interval else "")


def as_rows(content: Mapping[str, Any]) -> list[tuple[str, str, str, object]]:
    """Flatten what ``metrics.json`` holds into rows of ``metrics.csv``.

    Parameters
    ----------
    content : mapping
        `Scorecard.as_dict`, with what the run adds to it.

    Returns
    -------
    list of (str, str, str, object)
        Model, split, metric, value. A nested figure has the names above it in front (``calibration.slope``), an
        operating point's its own (``youden.accuracy``). Model and split are empty where a figure has none.
    """
    rows: list[tuple[str, str, str, object]] = []
    for name, part in content.items():
        if name in ("models", "shortcuts"):
            for model, splits in part.items():
                for split, found in splits.items():
                    kept = {key: value for key, value in found.items() if key != "operating_point"}
                    kept |= kept.pop("operating_points", {})
                    rows += [(model, split, metric, value) for metric, value in _leaves(kept)]
        elif name == "comparisons":
            for split, compared in part.items():
                for one in compared:
                    pair = f"{one['first']} and {one['second']}"
                    rows += [(pair, split, metric, value) for metric, value in _leaves(one)]
        elif name == "moved":
            for model, found in part.items():
                rows += [(model, "test", metric, value) for metric, value in _leaves(found or {}, "moved")]
        else:
            rows += [("", "", metric, value) for metric, value in _leaves({name: part})]
    return rows


def _leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    parts: Sequence[tuple[Any, Any]]
    if isinstance(content, Mapping):
        parts = list(content.items())
    elif isinstance(content, (list, tuple)):
        parts = list(enumerate(content))
    else:
        yield prefix, content
        return
    for key, value in parts:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
