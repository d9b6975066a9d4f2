"""Repeats: what the folds of a cross-validation, or several seeds, say together that one run cannot.

Owns how finished runs are read and put together. A repeat is an ordinary run in a folder of its own; this module starts
none, and knows nothing of networks and images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pneumoscope import _files, comparison, metrics
from pneumoscope.catalog import Catalog
from pneumoscope.errors import RunError
from pneumoscope.predictions import Predictions
from pneumoscope.runs import Run
from pneumoscope.specs import EvaluationSpec

HELD_OUT = ("validation", "calibration")
"""Splits whose images a fold's models were not fitted to; the first steered their early stopping."""


def out_of_fold(runs: Sequence[Run]) -> dict[str, Predictions]:
    """Put the held-out predictions of all folds together.

    Parameters
    ----------
    runs : sequence of Run
        One finished run per fold of the same images.

    Returns
    -------
    dict of str to Predictions
        By approach: every training image once, sorted by path, scored by models that were not fitted to its group.

    Raises
    ------
    RunError
        Where a fold is missing or not finished, or an image is held out twice or never.
    """
    for run in runs:
        if run.status != "finished":
            raise RunError(f"The run in {run.folder} is {run.status}, not finished; run the command with --resume.")
    found: dict[str, Predictions] = {}
    for model in runs[0].read_spec().models:
        parts = [_held_out(run, model) for run in runs]
        table = pd.concat(parts, ignore_index=True).sort_values("path", kind="stable", ignore_index=True)
        expected = _rows(runs[0])
        if table["path"].tolist() != expected["path"].tolist():
            raise RunError(
                f"The {len(runs)} folds hold out {table['path'].nunique():,} of {len(expected):,} images, and some "
                "perhaps twice; they are not folds of one division: make them again in a new folder."
            )
        found[model] = Predictions.of(table.assign(split="validation"), table["score"].to_numpy())
    return found


def cross_validated(
    runs: Sequence[Run], pooled: Mapping[str, Predictions], *, spec: EvaluationSpec, seed: int = 0
) -> dict[str, Any]:
    """Measure the models of a cross-validation on the images that each was not fitted to.

    Parameters
    ----------
    runs : sequence of Run
        One finished run per fold.
    pooled : mapping of str to Predictions
        From `out_of_fold` of these runs.
    spec : EvaluationSpec
        The bootstrap.
    seed : int
        Of the bootstrap.

    Returns
    -------
    dict
        ``folds``; ``models``: by approach ``out_of_fold`` (an Evaluation of all scores together, at threshold 0.5) and
        ``auc_by_fold``; ``comparisons`` of the out-of-fold scores; ``sentences``.
    """
    groups = _rows(runs[0])["group"].to_numpy(dtype=str)
    content: dict[str, Any] = {"folds": len(runs), "models": {}, "comparisons": [], "sentences": []}
    for model, predictions in pooled.items():
        found = metrics.evaluate(predictions, groups=groups, bootstrap=spec.bootstrap, seed=seed)
        by_fold = [_auc(_held_out(run, model)) for run in runs]
        content["models"][model] = {"out_of_fold": found.as_dict(), "auc_by_fold": by_fold}
        content["sentences"].append(
            f"{model}: AUC {_said(found.roc.auc)} over the {found.n:,} images of {len(runs)} folds together; fold by "
            f"fold {_spread(by_fold)}."
        )
    if spec.bootstrap and len(pooled) > 1:
        compared = comparison.compare_all(
            pooled,
            groups=groups,
            thresholds=dict.fromkeys(pooled, metrics.HALF),
            resamples=max(spec.bootstrap, 20 * len(pooled) * (len(pooled) - 1)),  # fewer could decide nothing
            seed=seed,
        )
        content["comparisons"] = [one.as_dict() for one in compared]
        content["sentences"] += [one.sentence for one in compared]
    return content


def over_seeds(runs: Sequence[Run], *, split: str = "test") -> dict[str, Any]:
    """Say how much a model's figures depend on the seed.

    Parameters
    ----------
    runs : sequence of Run
        Finished runs that differ in their seed only.
    split : str
        Where the figures are taken; the same images in every run, so ``test``.

    Returns
    -------
    dict
        ``seeds``; ``models``: by approach ``auc``, ``sensitivity`` and ``specificity`` (at the operating point), each
        with ``values`` in the order of the seeds, ``mean``, ``sd`` (n - 1), ``min``, ``max``; ``best``: how often each
        approach had the highest AUC; ``sentences``.

    Raises
    ------
    RunError
        Where a run is not finished or its metrics are damaged.
    """
    contents = [_files.read_json(run.metrics_path)["models"] for run in runs]
    seeds = [run.read_spec().seed for run in runs]
    content: dict[str, Any] = {"split": split, "seeds": seeds, "models": {}, "best": {}, "sentences": []}
    for model in contents[0]:
        parts = [found[model][split] for found in contents]
        figures = {"auc": [part["auc"] for part in parts]}
        for name in ("sensitivity", "specificity"):
            figures[name] = [part["operating_point"] and part["operating_point"][name] for part in parts]
        content["models"][model] = {name: _summary(values) for name, values in figures.items()}
        content["sentences"].append(
            f"{model}: AUC on {split} {_spread(figures['auc'])} over {len(runs)} seeds; sensitivity "
            f"{_spread(figures['sensitivity'])}, specificity {_spread(figures['specificity'])} at the operating point."
        )
    content["best"] = _wins(contents, split)
    if len(contents[0]) > 1:
        wins = ", ".join(f"{model} {count} of {len(runs)}" for model, count in content["best"].items())
        content["sentences"].append(f"Highest AUC on {split}: {wins} seeds.")
    return content


def write_out_of_fold(target: Run, pooled: Mapping[str, Predictions]) -> list[Path]:
    """Write each approach's out-of-fold scores beside a run's other tables.

    Parameters
    ----------
    target : Run
        Whose ``tables`` folder takes ``M_out_of_fold_yscores.csv``.
    pooled : mapping of str to Predictions
        From `out_of_fold`.

    Returns
    -------
    list of Path

    Raises
    ------
    PneumoscopeError
        Where the place cannot be written.
    """
    written = []
    for model, predictions in pooled.items():
        table, path = predictions.table, target.table_path(model, "out_of_fold_yscores")
        columns = (table["label"].tolist(), table["score"].tolist(), table["image_id"], table["path"])
        _files.write_csv(path, ["y_true", "y_scores", "image_id", "path"], zip(*columns, strict=True))
        written.append(path)
    return written


def _rows(run: Run) -> pd.DataFrame:
    """Return the images that are held out once over all folds: everything usable but test, by path."""
    usable = Catalog.read(run.catalog_path, root=run.folder).rows()
    return usable[usable["split"] != "test"].sort_values("path", kind="stable", ignore_index=True)


def _held_out(run: Run, model: str) -> pd.DataFrame:
    """Return path, image_id, label and score of what one fold held out."""
    parts = []
    for split in HELD_OUT:
        path = run.table_path(model, f"{split}_yscores")
        if path.exists():
            parts += _files.read_csv(path)
    cells = [(row["path"], row["image_id"], int(row["y_true"]), float(row["y_scores"])) for row in parts]
    return pd.DataFrame(cells, columns=["path", "image_id", "label", "score"])


def _auc(table: pd.DataFrame) -> float | None:
    return metrics.roc_curve(table["label"].to_numpy(dtype=np.int8), table["score"].to_numpy(dtype=np.float64)).auc


def _summary(values: Sequence[float | None]) -> dict[str, Any]:
    known = np.asarray([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return {"values": list(values), "mean": None, "sd": None, "min": None, "max": None}
    sd = float(known.std(ddof=1)) if len(known) > 1 else None
    ends = {"min": float(known.min()), "max": float(known.max())}
    return {"values": list(values), "mean": float(known.mean()), "sd": sd, **ends}


def _spread(values: Sequence[float | None]) -> str:
    found = _summary(values)
    return "undefined" if found["mean"] is None else f"{found['mean']:.4f} ({found['min']:.4f} to {found['max']:.4f})"


def _said(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _wins(contents: Sequence[Mapping[str, Any]], split: str) -> dict[str, int]:
    wins = dict.fromkeys(contents[0], 0)
    for found in contents:
        known = {model: parts[split]["auc"] for model, parts in found.items() if parts[split]["auc"] is not None}
        if known:
            for model in known:
                wins[model] += known[model] == max(known.values())  # equals win both
    return wins
