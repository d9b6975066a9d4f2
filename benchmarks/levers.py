"""Which levers make a better model? One change against the preset `best` at a time, on the train images alone.

    python benchmarks/levers.py DATA screen                every lever, a third of the patients, one split, two seeds
    python benchmarks/levers.py DATA folds --levers a b    all patients, five folds
    python benchmarks/levers.py DATA series --levers a b   train without one series of normals, judge on it
    python benchmarks/levers.py DATA table                 what is known so far, as Markdown
    python benchmarks/levers.py DATA final --bundle B      a candidate on the test images, under every change

A row is kept in `levers.json` as soon as it is known, and what is kept is not computed again, so the search can be
ended and taken up at any time. Only `final` reads the test images. Judged is: AUC on held-out patients, mean AUC over
the fixed changes of `pneumoscope.robustness`, specificity there at the threshold that gives 97 % sensitivity on
unchanged images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pneumoscope import _backend, _files

_backend.prepare()

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from pneumoscope import bundle, curves, intervals, models, onnx_graph, robustness, training  # noqa: E402
from pneumoscope.catalog import Catalog  # noqa: E402
from pneumoscope.specs import Spec  # noqa: E402
from pneumoscope.store import ImageStore  # noqa: E402

KNOWN = Path(__file__).parent / "levers.json"
SENSITIVITY = 0.97
FOLDS = 5
SEEDS = (1, 2)
THIRD = 3

NO_VALUES = ["gamma=0", "contrast=0", "brightness=0", "blur=0", "noise=0"]
NO_PLACES = ["zoom=0", "translation=0", "rotation=0", "stretch=0"]


def augment(settings: list[str]) -> list[str]:
    return [f"augment.{setting}" for setting in settings]


LEVERS: dict[str, list[str]] = {
    "base": [],
    "no augmentation": ["features.views=0", *augment([*NO_VALUES, *NO_PLACES])],
    "the tutorial's augmentation": augment([*NO_VALUES, *NO_PLACES, "zoom=0.1", "translation=0.1"]),
    "only geometric": augment(NO_VALUES),
    "only photometric": augment(NO_PLACES),
    "stronger augmentation": augment(
        ["gamma=0.8", "contrast=0.8", "brightness=0.15", "blur=0.014", "noise=0.12", "zoom=0.2", "rotation=15"]
    ),
    "4 views": ["features.views=4"],
    "only the head (tl)": ["models=tl", "tl.learning_rate=0.001"],
    "11 layers": ["best.trainable_layers=11"],
    "55 layers": ["best.trainable_layers=55"],
    "100 layers": ["best.trainable_layers=100"],
    "no mean of weights": ["train.weight_average=0"],
    "label smoothing 0.1": ["train.label_smoothing=0.1"],
    "class weights": ["train.class_weights=true"],
    "plateau and early stopping": ["train.schedule=plateau"],
    "rate 3e-4": ["best.learning_rate=0.0003"],
    "rate 3e-3": ["best.learning_rate=0.003"],
    "no weight decay": ["train.weight_decay=0"],
    "weight decay 0.1": ["train.weight_decay=0.1"],
    "5 epochs": ["train.epochs=5"],
    "20 epochs": ["train.epochs=20"],
    "160 px": ["image.size_px=160"],
}
"""By name, what is set beside the preset `best`."""


def part_of(group: str, parts: int, *, salt: str) -> int:
    """Put a patient into one of some parts, the same whenever and wherever it is asked."""
    return int(hashlib.sha256(f"{salt} {group}".encode()).hexdigest()[:8], 16) % parts


def divided(catalog: Catalog, protocol: str, part: int) -> Catalog:
    """Divide the train images by patient: what is learned from, and what is judged on (``validation``)."""
    table = catalog.table[(catalog.table["split"] == "train") & (catalog.table["status"] == "ok")].copy()
    if protocol == "screen":
        table = table[[part_of(group, THIRD, salt="third") == 0 for group in table["group"]]]
    held = np.array([part_of(group, FOLDS, salt="fold") == part for group in table["group"]])
    if protocol == "series":  # of the normals, one series is learned from and the other judged on
        second = table["group"].str.startswith("NORMAL2").to_numpy()
        normal = (table["label"] == 0).to_numpy()
        held = np.where(normal, second == (part == 0), held)
    table["split"] = np.where(held, "validation", "train")
    return replace(catalog, table=table.reset_index(drop=True))


def judge(model: Any, store: ImageStore, table: pd.DataFrame) -> dict[str, Any]:
    """Score the judged images as they are and under every fixed change."""
    network = bundle.OnnxNetwork(onnx_graph.build(model).SerializeToString(), name="levers")
    pictures, labels = store.images[store.rows_of(table)], table["label"].to_numpy()

    def score(images: Any) -> Any:
        return np.concatenate([network(images[start : start + 32]).score for start in range(0, len(images), 32)])

    clean = score(pictures)
    threshold = curves.sensitivity_threshold(labels, clean.astype(float), at_least=SENSITIVITY)
    found = robustness.assess(score, pictures, labels, threshold=threshold)
    estimate = intervals.delong(labels, clean)
    return {
        "n": len(labels),
        "auc": estimate.auc,
        "threshold": threshold,
        "specificity": float((clean[labels == 0] <= threshold).mean()),
        "robustness": found.as_dict(),
        "scores": [round(float(one), 5) for one in clean],
    }


class Search:
    def __init__(self, data: Path) -> None:
        self.scanned = Catalog.scan(data)
        self.known: list[dict[str, Any]] = json.loads(KNOWN.read_text()) if KNOWN.exists() else []

    def do(self, lever: str, protocol: str, *, seed: int, part: int = 0) -> None:
        identity = {"lever": lever, "settings": LEVERS[lever], "protocol": protocol, "part": part, "seed": seed}
        if any(identity.items() <= row.items() for row in self.known):
            return
        spec = Spec.preset_named("best").with_overrides([f"seed={seed}", *LEVERS[lever]])
        identity_hash = _files.hash_of([identity, spec.hash])[:16]
        catalog = divided(self.scanned, protocol, part)
        store = ImageStore.pack(catalog, size_px=spec.image.size_px)
        model = models.build(spec.models[0], spec)
        started, cpu = time.monotonic(), time.process_time()
        checkpoint = _files.cache_dir() / "levers" / f"{identity_hash}.npz"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        history = training.train(model, store, catalog, spec=spec, checkpoint=checkpoint)
        row = identity | {
            "learned": len(catalog.rows("train")),
            "seconds": round(time.monotonic() - started),
            "cpu_seconds": round(time.process_time() - cpu),
            "best_epoch": history.best_epoch,
            "val_loss": float(history.epochs.set_index("epoch")["val_loss"][history.best_epoch]),
            **judge(model, store, catalog.rows("validation")),
        }
        checkpoint.unlink(missing_ok=True)
        self.known = json.loads(KNOWN.read_text()) if KNOWN.exists() else []
        self.known.append(row)
        temporary = KNOWN.with_suffix(".partial")
        temporary.write_text("[\n" + ",\n".join(json.dumps(one) for one in self.known) + "\n]\n")
        os.replace(temporary, KNOWN)
        print(line(row), flush=True)


def final(data: Path, folder: Path) -> None:
    """Print how a bundle does on the test images as they are and under every fixed change, at its operating point."""
    found = bundle.Bundle.open(folder)
    point, threshold = found.description.point
    catalog = Catalog.scan(data)
    rows = catalog.rows("test")
    store = ImageStore.pack(catalog, size_px=found.description.size_px)
    network = bundle.OnnxNetwork(found.network_bytes(), name="final")
    pictures, labels = store.images[store.rows_of(rows)], rows["label"].to_numpy()

    def score(images: Any) -> Any:
        return np.concatenate([network(images[start : start + 32]).score for start in range(0, len(images), 32)])

    clean = score(pictures)
    called = clean > threshold
    print(f"n {len(labels)}, operating point {point}, threshold {threshold:.4f}")
    print(f"| change | AUC | sensitivity | specificity |\n|---|---|---|---|\n| none | "
          f"{intervals.delong(labels, clean).auc:.4f} | {called[labels == 1].mean():.3f} | "
          f"{(~called[labels == 0]).mean():.3f} |")  # fmt: skip
    changed = robustness.assess(score, pictures, labels, threshold=threshold)
    for name, auc in changed.auc.items():
        print(f"| {name} | {auc:.4f} | {changed.sensitivity[name]:.3f} | {changed.specificity[name]:.3f} |", flush=True)
    print(f"mean AUC under changes {changed.mean_auc:.4f}, mean specificity {changed.mean_specificity:.3f}")


def line(row: dict[str, Any]) -> str:
    found = row["robustness"]
    return (
        f"{row['lever']:<28} {row['protocol']} part {row['part']} seed {row['seed']}: n {row['n']}, "
        f"AUC {row['auc']:.4f}, robustness {found['mean_auc']:.4f}, specificity {row['specificity']:.3f} and changed "
        f"{np.mean(list(found['specificity'].values())):.3f}, {row['cpu_seconds']} CPU s"
    )


def table(known: list[dict[str, Any]], protocol: str) -> Iterator[str]:
    """Write what is known as Markdown, the best robustness first; of several seeds or folds the mean and the range."""
    yield f"| {protocol} | runs | AUC | robustness AUC | specificity | under changes | CPU s |"
    yield "|---|---|---|---|---|---|---|"
    frame = pd.DataFrame(
        {
            "lever": row["lever"],
            "auc": row["auc"],
            "robust": row["robustness"]["mean_auc"],
            "specificity": row["specificity"],
            "changed": float(np.mean(list(row["robustness"]["specificity"].values()))),
            "cost": row["cpu_seconds"],
        }
        for row in known
        if row["protocol"] == protocol
    )
    if frame.empty:
        return
    for lever, rows in sorted(frame.groupby("lever"), key=lambda pair: -pair[1]["robust"].mean()):
        cells = [
            f"{rows[name].mean():.4f} ({rows[name].min():.4f} to {rows[name].max():.4f})" for name in ("auc", "robust")
        ]
        cells += [f"{rows[name].mean():.3f}" for name in ("specificity", "changed")]
        yield f"| {lever} | {len(rows)} | {' | '.join(cells)} | {rows['cost'].mean():.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("protocol", choices=["screen", "folds", "series", "table", "final"])
    parser.add_argument("--levers", nargs="*", default=list(LEVERS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--bundle", type=Path)
    options = parser.parse_args()
    if options.protocol == "final":
        final(options.data, options.bundle)
        return
    if options.protocol == "table":
        known = json.loads(KNOWN.read_text())
        for protocol in ("screen", "folds", "series"):
            print("\n".join(table(known, protocol)), "\n")
        return
    search = Search(options.data)
    parts = {"screen": range(1), "folds": range(FOLDS), "series": range(2)}[options.protocol]
    for seed in options.seeds if options.protocol == "screen" else options.seeds[:1]:
        for lever in options.levers:
            for part in parts:
                search.do(lever, options.protocol, seed=seed, part=part)


if __name__ == "__main__":
    main()
