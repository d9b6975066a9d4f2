"""What a run left, read for its report: every file that may be there, and why each missing or damaged one is so.

Owns which files a report is made of and how much of a damaged one is taken. Reads only the run directory, and reads it
in good faith only where it must: any value may be missing, of another type, or written by an earlier version. Knows
nothing of how anything is shown.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from pneumoscope import _files
from pneumoscope.errors import PneumoscopeError, RunError
from pneumoscope.runs import Run
from pneumoscope.specs import TITLES

SPLITS: Final = ("train", "validation", "calibration", "test")
"""All splits in the order in which they are shown; models are scored on all but the first."""

EVIDENCE_CHECKS: Final = "evidence_checks.json"
"""Name of what ``pneumoscope explain RUN -o DIR`` writes; shown where DIR lies in the run."""

Floats = npt.NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Scores:
    """What one model said of one split.

    Attributes
    ----------
    labels : ndarray of int8, shape (n,)
        0 NORMAL, 1 PNEUMONIA.
    scores : ndarray of float64, shape (n,)
        In [0, 1].
    image_ids, paths : tuple of str
        Of the images, in the same order.
    """

    labels: npt.NDArray[np.int8]
    scores: Floats
    image_ids: tuple[str, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Material:
    """Everything a report is made of.

    Attributes
    ----------
    run : Run
        Where it was read.
    manifest, metrics, audit, repeats, gallery, spec : mapping
        Content of the file of that name; empty where it is missing or damaged.
    stages : mapping of str to mapping
        The stages' records.
    catalog : sequence of dict
        The rows of ``catalog.csv`` as text.
    checks : mapping of str to mapping
        Checks of evidence maps, by the folder that holds them.
    spec_text : str
        ``spec.toml`` as it stands.
    missing : mapping of str to str
        By attribute: why it is empty, in one sentence.
    """

    run: Run
    manifest: Mapping[str, Any]
    metrics: Mapping[str, Any]
    audit: Mapping[str, Any]
    repeats: Mapping[str, Any]
    gallery: Mapping[str, Any]
    spec: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    catalog: Sequence[Mapping[str, str]]
    checks: Mapping[str, Mapping[str, Any]]
    spec_text: str
    missing: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def models(self) -> dict[str, Mapping[str, Any]]:
        """The measured models, by name: each split's figures."""
        return _of_mappings(self.metrics.get("models"))

    @cached_property
    def shortcuts(self) -> dict[str, Mapping[str, Any]]:
        """The baselines that see no lung, likewise."""
        return _of_mappings(self.metrics.get("shortcuts"))

    @property
    def scored(self) -> dict[str, Mapping[str, Any]]:
        """Models and baselines together."""
        return {**self.models, **self.shortcuts}

    @cached_property
    def splits(self) -> list[str]:
        """The splits that a model was scored on, in their order."""
        return [split for split in SPLITS if any(mapping(parts.get(split)) for parts in self.models.values())]

    @property
    def shown_split(self) -> str:
        """What figures are shown of first: test, else validation; calibration chose the thresholds, which flatters."""
        return next((split for split in ("test", "validation") if split in self.splits), self.splits[-1])

    @cached_property
    def wanted(self) -> list[str]:
        """The approaches that the Spec asks for."""
        names = self.spec.get("models")
        return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []

    @property
    def note(self) -> str:
        """What must stand on every output."""
        return words(self.metrics.get("note")) or words(self.manifest.get("note"))

    def of(self, model: str, split: str) -> Mapping[str, Any]:
        """Return a model's or baseline's figures on a split; empty where there are none."""
        return mapping(self.scored.get(model, {}).get(split))

    def point(self, model: str, split: str) -> Mapping[str, Any]:
        """Return the figures at the default operating point; those at 0.5 where there is no such point."""
        found = self.of(model, split)
        return mapping(found.get("operating_point")) or found

    def comparisons(self, split: str) -> list[Mapping[str, Any]]:
        """Return the comparisons on a split, as ``metrics.json`` holds them."""
        return mappings(at(self.metrics, "comparisons", split))

    def scores(self, model: str, split: str) -> Scores | None:
        """Return a model's scores, None where its table is missing or damaged."""
        return self._table(model, f"{split}_yscores", _scores_of)

    def roc(self, model: str, split: str) -> tuple[Floats, Floats] | None:
        """Return false and true positive rates of the ROC curve, None where its table is missing or damaged."""
        found = self._table(model, f"{split}_roc", lambda rows: _columns(rows, ("fpr", "tpr")))
        return None if found is None else (found["fpr"], found["tpr"])

    def epochs(self, model: str, kind: str) -> dict[str, Floats] | None:
        """Return ``epoch``, ``train_KIND`` and ``val_KIND`` of a training, None where the table cannot be used."""
        names = ("epoch", f"train_{kind}", f"val_{kind}")
        return self._table(model, f"{kind}_per_epoch", lambda rows: _columns(rows, names))

    def _table(self, model: str, name: str, take: Callable[[list[dict[str, str]]], T]) -> T | None:
        if not is_plain_name(model):
            return None
        path = self.run.table_path(model, name)
        try:
            rows = _files.read_csv(path) if path.exists() else []
            return take(rows) if rows else None
        except (PneumoscopeError, KeyError, ValueError):
            return None


def read(run: Run) -> Material:
    """Read what a run left.

    Parameters
    ----------
    run : Run
        Finished, failed or under way.

    Returns
    -------
    Material

    Raises
    ------
    RunError
        Where nothing is measured yet.
    StoreError
        Where the manifest or the figures are damaged: a report without either would mislead.
    """
    manifest, metrics = _measured(run)
    missing: dict[str, str] = {}
    none: dict[str, Any] = {}

    def taken(name: str, path: Path, why: str) -> dict[str, Any]:
        return _taken(missing, name, path, _files.read_json, none, why)

    text = _taken(missing, "spec", run.spec_path, _read_text, "", "The run holds no spec.toml.")
    return Material(
        run=run,
        manifest=manifest,
        metrics=metrics,
        audit=taken("audit", run.audit_path, "The run holds no audit.json."),
        repeats=taken("repeats", run.repeats_path, "The run was made once: --folds K and --seeds N repeat it."),
        gallery=taken("gallery", run.gallery_path, "The run holds no gallery of pictures."),
        spec=_parsed(text, missing),
        stages=_stages(run),
        catalog=_taken(missing, "catalog", run.catalog_path, _files.read_csv, [], "The run holds no catalog.csv."),
        checks=_checks(run),
        spec_text=text,
        missing=missing,
    )


def is_plain_name(name: str) -> bool:
    """Whether a name stays in its folder and is fit for a file: no separator, no drive, no leading dot, printable."""
    return bool(name) and name.isprintable() and not name.startswith(".") and not set(name) & set('/\\:*?"<>|')


# --- values that may be anything -------------------------------------------------------------------------------------


def at(content: object, *keys: str) -> Any:
    """Return a nested value, None where the way there ends early."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def mapping(value: object) -> Mapping[str, Any]:
    """Return a mapping as it is, anything else as an empty one."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: object) -> list[Mapping[str, Any]]:
    """Return the mappings in a list; anything else is an empty list."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def number(value: object) -> float | None:
    """Return a finite number, None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and _finite(value) else None


def words(value: object) -> str:
    """Return a text as it is, anything else as an empty one."""
    return value if isinstance(value, str) else ""


def title_of(model: str) -> str:
    """Return a model's name for people, with its short name: ``Fine-tuning (ft)``."""
    return f"{TITLES[model]} ({model})" if model in TITLES else model


def _finite(value: float) -> bool:
    return abs(value) < float("inf")  # NaN compares as false


def _of_mappings(value: object) -> dict[str, Mapping[str, Any]]:
    return {name: part for name, part in mapping(value).items() if isinstance(part, Mapping)}


# --- files -----------------------------------------------------------------------------------------------------------


def _measured(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the manifest and the figures, without which there is nothing to report."""
    manifest = run.read_manifest()
    if not run.metrics_path.exists():
        raise RunError(
            f"The run in {run.folder} is {words(manifest.get('status')) or 'new'} and has measured nothing yet (it "
            "holds no metrics.json); let it go on with --resume, then ask for the report."
        )
    metrics = _files.read_json(run.metrics_path)
    if not any(mapping(part) for parts in _of_mappings(metrics.get("models")).values() for part in parts.values()):
        raise RunError(
            f"{run.metrics_path} holds the figures of no model; score the run again with pneumoscope evaluate RUN."
        )
    return manifest, metrics


def _taken(missing: dict[str, str], name: str, path: Path, take: Callable[[Path], T], empty: T, why: str) -> T:
    """Return what a file holds; where there is none, or a damaged one, keep the reason under its name."""
    if not path.exists():
        missing[name] = why
        return empty
    try:
        return take(path)
    except (PneumoscopeError, ValueError, OSError) as error:
        missing[name] = str(error)
        return empty


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _parsed(text: str, missing: dict[str, str]) -> dict[str, Any]:
    """Read the Spec as plain values: one that an earlier version wrote is shown as it is, not judged."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        missing["spec"] = f"spec.toml is damaged ({error})."
        return {}


def _stages(run: Run) -> dict[str, Mapping[str, Any]]:
    try:
        return _of_mappings(run.read_stages())
    except PneumoscopeError:  # cost and causes are then unknown, the figures stand
        return {}


def _checks(run: Run) -> dict[str, Mapping[str, Any]]:
    """Return what checks of evidence maps lie in the run, in its folder or one or two below."""
    found: dict[str, Mapping[str, Any]] = {}
    for depth in ("", "*/", "*/*/"):
        for path in sorted(run.folder.glob(depth + EVIDENCE_CHECKS)):
            try:
                found[str(path.parent.relative_to(run.folder))] = _files.read_json(path)
            except PneumoscopeError as error:
                found[str(path.parent.relative_to(run.folder))] = {"verdicts": [str(error)]}
    return found


def _columns(rows: list[dict[str, str]], names: Sequence[str]) -> dict[str, Floats]:
    """Return columns of numbers; an empty cell is NaN, as where a loss was no number."""
    return {name: np.array([float(row[name] or "nan") for row in rows], dtype=np.float64) for name in names}


def _scores_of(rows: list[dict[str, str]]) -> Scores:
    labels = np.array([int(row["y_true"]) for row in rows], dtype=np.int8)
    scores = np.array([float(row["y_scores"]) for row in rows], dtype=np.float64)
    if not bool(np.isin(labels, (0, 1)).all() and ((scores >= 0) & (scores <= 1)).all()):
        raise ValueError("not labels and scores")
    return Scores(labels, scores, tuple(row["image_id"] for row in rows), tuple(row["path"] for row in rows))
