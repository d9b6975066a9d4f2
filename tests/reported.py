"""A run directory as a finished run leaves it, made in a second from drawn scores: for tests of what is read from it.

The figures are measured by `scorecard` like any run's; the pictures are grey squares. No network is trained or loaded.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from pneumoscope import _files, metrics, scorecard
from pneumoscope.ledger import test_set_of
from pneumoscope.predictions import Predictions
from pneumoscope.runs import Run
from pneumoscope.specs import EvaluationSpec, Spec

N = {"train": 160, "validation": 80, "test": 60}
STRENGTHS = {"cnn": 1.0, "tl": 3.0, "ft": 3.2, "file-and-grey": 0.8, "border-only": 0.1}
BASELINES = ("file-and-grey", "border-only")
COLUMNS = (
    "path", "image_id", "split", "label", "group", "subtype", "width_px", "height_px", "file_bytes", "status"
)  # fmt: skip


def make(
    folder: Path,
    *,
    models: Sequence[str] = ("cnn", "tl", "ft"),
    seed: int = 0,
    test_seed: int = 0,
    bootstrap: int = 60,
    overrides: Sequence[str] = (),
) -> Run:
    """Make a run directory.

    Parameters
    ----------
    folder : Path
        New.
    models : sequence of str
        Which approaches were measured.
    seed : int
        Of the scores.
    test_seed : int
        Which test images there are: runs with the same one share them.
    bootstrap : int
        Resamples; 0 leaves intervals by patient and all comparisons out.
    overrides : sequence of str
        Of the Spec, as ``--set`` takes them.
    """
    run = Run.create(folder)
    spec = Spec.preset_named("smoke").with_overrides([f"evaluation.bootstrap={bootstrap}", *overrides])
    rows = {split: _rows(split, n, of=test_seed if split == "test" else 0) for split, n in N.items()}
    scored = {split: part for split, part in rows.items() if split != "train"}
    names = [*models, *BASELINES]
    said = {name: {split: _scored(part, name, seed=seed) for split, part in scored.items()} for name in names}
    card = scorecard.measure(
        {name: said[name] for name in models},
        {name: said[name] for name in BASELINES},
        rows=scored,
        spec=EvaluationSpec(bootstrap=bootstrap),
    )
    _files.write_text(run.spec_path, spec.to_toml())
    _files.write_csv(run.catalog_path, COLUMNS, pd.concat(rows.values())[list(COLUMNS)].itertuples(index=False))
    _write_tables(run, {name: said[name] for name in models})
    _files.write_json(run.metrics_path, {"note": "", **card.as_dict(), **_further(rows["test"])})
    _files.write_json(run.audit_path, AUDIT)
    _write_stages(run, spec.models, models)
    _write_gallery(run, {name: said[name]["test"] for name in models})
    run.update_manifest(**MANIFEST, data=str(folder.parent / "chest_xray"), spec_hash=spec.hash)
    return run


def change(path: Path, **changes: Any) -> None:
    """Write a JSON file with some keys changed; a value of None takes the key out."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


AUDIT: dict[str, Any] = {
    "passed": True,
    "n_images": sum(N.values()),
    "findings": [
        {
            "name": "near-duplicate",
            "severity": "warning",
            "count": 1,
            "sentence": "1 pair of images that look alike: look at them side by side.",
            "examples": [["train/NORMAL/train0.jpeg", "train/NORMAL/train1.jpeg"]],
        }
    ],
}
MANIFEST: dict[str, Any] = {
    "status": "finished",
    "error": None,
    "note": "",
    "started": "2026-01-02T03:04:05+00:00",
    "finished": "2026-01-02T03:06:05+00:00",
    "seconds": 120.0,
    "data_hash": "d" * 64,
    "machine": {
        "backend": "tensorflow",
        "versions": {"python": "3.11.7", "keras": "3.15.1"},
        "devices": ["CPU"],
        "threads": 2,
        "platform": "Linux",
    },
}


def jpeg(grey: int = 90, side_px: int = 24) -> bytes:
    """Return a grey square as JPEG."""
    buffer = io.BytesIO()
    Image.new("L", (side_px, side_px), grey).save(buffer, "JPEG")
    return buffer.getvalue()


def _rows(split: str, n: int, *, of: int) -> pd.DataFrame:
    """Rows of a Catalog: two images to a patient, two of five NORMAL."""
    label = (np.arange(n) // 2 % 5 > 1).astype(np.int8)
    patient = np.arange(n) // 2
    series = [
        ("IM", "virus", "bacteria")[0 if not sick else 1 + at % 2] for sick, at in zip(label, patient, strict=True)
    ]
    folder = np.where(label == 1, "PNEUMONIA", "NORMAL")
    return pd.DataFrame({
        "path": [f"{split}/{part}/{split}{at}.jpeg" for at, part in enumerate(folder)],
        "image_id": [f"{len(split):02x}{of:02x}{at:012x}" for at in range(n)],
        "split": split,
        "label": label,
        "group": [f"{name}/{split}{at}" for name, at in zip(series, patient, strict=True)],
        "subtype": [name if sick else "" for name, sick in zip(series, label, strict=True)],
        "width_px": 1000 + np.arange(n),
        "height_px": 500 + np.arange(n),
        "file_bytes": 1000,
        "status": "ok",
    })  # fmt: skip


def _scored(rows: pd.DataFrame, name: str, *, seed: int) -> Predictions:
    rng = np.random.default_rng([seed, *name.encode(), len(rows)])
    labels: npt.NDArray[np.float64] = rows["label"].to_numpy(dtype=np.float64)
    logits = STRENGTHS.get(name, 2.0) * (labels - 0.5) + rng.normal(size=len(rows))
    return Predictions.of(rows, (1 / (1 + np.exp(-logits))).astype(np.float32))


def _further(test: pd.DataFrame) -> dict[str, Any]:
    sentence = "The 24 NORMAL images of train and the 20 of test differ."
    return {
        "shift": {
            "NORMAL": {
                "names": ["train", "test"], "label": "NORMAL", "n": [24, 20], "auc": 0.7, "p_value": 0.005,
                "interval": {"low": 0.6, "high": 0.8}, "verdict": "differ", "sentence": sentence,
            }
        },
        "not_assessable": {"part": 2, "whole": 60, "sentence": "2 of 60 test images are unlike the training images."},
        "test_set": {
            "test_set": test_set_of(test["image_id"].tolist()), "looks": 3, "models": 3, "specs": 1,
            "sentence": "These test images have been scored 3 times on this machine.",
        },
    }  # fmt: skip


def _write_tables(run: Run, said: Mapping[str, Mapping[str, Predictions]]) -> None:
    for name, by_split in said.items():
        for split, one in by_split.items():
            table, roc = one.table, metrics.roc_curve(one.labels, one.scores)
            columns = (table["label"].tolist(), table["score"].tolist(), table["image_id"], table["path"])
            head = ["y_true", "y_scores", "image_id", "path"]
            _files.write_csv(run.table_path(name, f"{split}_yscores"), head, zip(*columns, strict=True))
            points = zip(roc.fpr.tolist(), roc.tpr.tolist(), roc.thresholds.tolist(), strict=True)
            _files.write_csv(run.table_path(name, f"{split}_roc"), ["fpr", "tpr", "thresholds"], points)
        for kind, values in (("loss", [(0.7, 0.6), (0.5, 0.4), (0.4, 0.45)]), ("accuracy", [(0.6, 0.6)] * 3)):
            rows = [(epoch, *both) for epoch, both in enumerate(values, start=1)]
            head = ["epoch", f"train_{kind}", f"val_{kind}"]
            _files.write_csv(run.table_path(name, f"{kind}_per_epoch"), head, rows)


def _write_stages(run: Run, wanted: Sequence[str], trained: Sequence[str]) -> None:
    begun = "2026-01-02T03:0{}:05+00:00"
    for at, stage in enumerate(("images", *(f"train-{name}" for name in wanted), "evaluate")):
        failed = stage.startswith("train-") and stage.removeprefix("train-") not in trained
        run.update_stage(
            stage,
            status="failed" if failed else "finished",
            started=begun.format(4 + at),
            finished=begun.format(5 + at),
            seconds=20.0,
            error="The disk is full." if failed else None,
            host="node1",
            epoch=3,
        )


def _write_gallery(run: Run, said: Mapping[str, Predictions]) -> None:
    """Write what the report's gallery is read from: the two lowest PNEUMONIA and two highest NORMAL of each model."""
    folder = run.folder / "gallery"
    pictures = ["a.jpg", *(f"{name}-a.jpg" for name in said)]
    for at, name in enumerate(pictures):
        _files.write_bytes(folder / name, jpeg(60 + 30 * at))
    models = {}
    for name, one in said.items():
        table = one.table.sort_values("score", kind="stable")
        picked = {
            "false_negative": table[table["label"] == 1].head(2),
            "false_positive": table[table["label"] == 0].tail(2),
            "true_positive": table[table["label"] == 1].tail(1),
        }
        cases = [
            {
                "kind": kind, "rank": rank, "path": row["path"], "image_id": row["image_id"],
                "label": "PNEUMONIA" if row["label"] else "NORMAL", "subtype": "virus" if row["label"] else None,
                "group": "virus/1", "score": row["score"], "picture": "a.jpg", "evidence": f"{name}-a.jpg",
            }
            for kind, part in picked.items()
            for rank, row in enumerate(part.to_dict("records"), start=1)
        ]  # fmt: skip
        models[name] = {"operating_point": "youden", "threshold": 0.5, "cases": cases, "counts": {}}
    sample = {"path": "train/NORMAL/train0.jpeg", "picture": "a.jpg"}
    content = {
        "split": "test",
        "models": models,
        "samples": {"train": {"NORMAL": [sample]}},
        "findings": [{"name": "near-duplicate", "sentence": "1 pair.", "pictures": [sample]}],
        "reason": None,
    }
    _files.write_json(folder / "gallery.json", content)
