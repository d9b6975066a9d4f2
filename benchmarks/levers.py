"""Which levers make a better model? One change against the preset `best` at a time, on the train images alone.

    python benchmarks/levers.py DATA screen                every lever, a third of the patients, one split, two seeds
    python benchmarks/levers.py DATA series --levers a b   the same third, one series of normals unseen and judged on
    python benchmarks/levers.py DATA folds --levers a b    all patients, five folds
    python benchmarks/levers.py DATA table                 what is known so far, as Markdown
    python benchmarks/levers.py DATA final --bundle B      a candidate on the test images, under every change

A row is kept in `levers.json` as soon as it is known, and what is kept is not computed again, so the search can be
ended and taken up at any time, and several processes can share it. Only `final` reads the test images. Judged is: AUC
on held-out patients, mean AUC over the fixed changes of `pneumoscope.robustness`, specificity as it is and there at the
threshold that gives 97 % sensitivity on unchanged images. All but `final` look at images of 112 px on one thread: a
lever costs minutes so, and is one of the recipe, not of the size (`224 px` is a lever itself).

A lever is settings, and may be what the product does not do: a change of the pixels before anything else (`PIXELS`),
of a step of training (`STEPS`), or of the optimizer (`rates by depth`).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pneumoscope import _backend, _files

_backend.prepare()

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from scipy import ndimage  # noqa: E402

from pneumoscope import backbones, bundle, curves, intervals, models, onnx_graph, robustness, training  # noqa: E402
from pneumoscope._backend import keras  # noqa: E402
from pneumoscope.catalog import Catalog  # noqa: E402
from pneumoscope.specs import Spec  # noqa: E402
from pneumoscope.store import ImageStore  # noqa: E402

KNOWN = Path(__file__).parent / "levers.json"
SENSITIVITY = 0.97
FOLDS = 5
SEEDS = (1, 2)
THIRD = 3
SMALL = ["image.size_px=112", "train.threads=1"]

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
    "224 px": ["image.size_px=224"],
}
"""By name, what is set beside the preset `best`."""


# --- What the product does not do: tried here first -------------------------------------------------------------------


def local_contrast(picture: Any) -> Any:
    """Give every neighbourhood (a Gaussian, an eighth of the side) the same mean and deviation."""
    values, sigma = picture.astype(np.float64), len(picture) / 8
    centred = values - ndimage.gaussian_filter(values, sigma)
    deviation = np.sqrt(ndimage.gaussian_filter(centred**2, sigma))
    return np.clip(np.rint(128 + 50 * centred / (deviation + 5)), 0, 255).astype(np.uint8)


def equalised(picture: Any) -> Any:
    """Give the image a flat histogram: each pixel its rank."""
    counts = np.bincount(picture.ravel(), minlength=256)
    ranks = (np.cumsum(counts) - counts / 2) / picture.size
    return np.rint(255 * ranks).astype(np.uint8)[picture]


PIXELS: Mapping[str, Callable[[Any], Any]] = {"local contrast": local_contrast, "equalised histogram": equalised}


class Mixup(training._Loop):
    """Each example a mean of itself and another of its batch, labels too, one share from Beta(0.2, 0.2) for a batch.

    Zhang et al. 2018, https://arxiv.org/abs/1710.09412; here of stored features where there are any.
    """

    def mix(self, inputs: Any, share: float, other: Any) -> tuple[Any, float]:
        return share * inputs + (1 - share) * inputs[other], share

    def _step(self, positions: Any) -> None:
        draw = np.random.default_rng([self.spec.seed, 99, self.state.epoch, int(positions[0])])
        share, other = float(draw.beta(0.2, 0.2)), draw.permutation(len(positions))
        inputs, share = self.mix(self.learn.batch(positions, self.state.epoch), share, other)
        labels = self.learn.labels[positions]
        targets = share * labels + (1 - share) * labels[other]
        self._set_rate()
        self.network.reset_metrics()
        logs = self.network.train_on_batch(inputs, targets[:, None], return_dict=True)
        self._average_weights()
        self.state.images_seen += len(labels)
        self.state.loss_sum += float(logs["loss"]) * len(labels)


class Cutmix(Mixup):
    """As `Mixup`, with a rectangle of the other in place of a mean, here always in the middle.

    Yun et al. 2019, https://arxiv.org/abs/1905.04899, who place it anywhere.
    """

    def mix(self, inputs: Any, share: float, other: Any) -> tuple[Any, float]:
        height, width = inputs.shape[1:3]
        tall, wide = (round(side * (1 - share) ** 0.5) for side in (height, width))
        top, left = (height - tall) // 2, (width - wide) // 2
        mixed = inputs.copy()
        mixed[:, top : top + tall, left : left + wide] = inputs[other][:, top : top + tall, left : left + wide]
        return mixed, 1 - tall * wide / (height * width)


class Subtype(training._Loop):
    """A second output tells bacteria from viruses, where there is pneumonia; it is dropped after training.

    Its optimizer is in no checkpoint: a row that was ended and taken up is not exactly that of one left alone.
    """

    bacteria: Any = None  # 1, 0, or NaN for normal images, in the order of the examples

    def _step(self, positions: Any) -> None:
        if not hasattr(self, "_both"):
            head = self.network.get_layer("head_dropout")._inbound_nodes[-1].outputs[0]  # in this network, not in all
            hidden = keras.layers.Dense(1, activation="sigmoid", name="subtype")(head)
            self._both = keras.Model(self.network.input, [self.network.output, hidden])
            rate = self.network.optimizer.learning_rate
            self._both.compile(
                training._optimizer(self.spec, rate=float(rate)),
                loss=["binary_crossentropy", "binary_crossentropy"],
                loss_weights=[1, 0.3],
            )
        self._set_rate()
        self._both.optimizer.learning_rate = self.state.schedule.learning_rate
        labels, kinds = self.learn.labels[positions], self.bacteria[positions]
        known = ~np.isnan(kinds)
        logs = self._both.train_on_batch(
            self.learn.batch(positions, self.state.epoch),
            [labels[:, None], np.nan_to_num(kinds)[:, None]],
            sample_weight=[np.ones(len(labels), np.float32), known.astype(np.float32)],
            return_dict=True,
        )
        self._average_weights()
        self.state.images_seen += len(labels)
        self.state.loss_sum += float(logs["loss"]) * len(labels)


STEPS: Mapping[str, type[training._Loop]] = {"mixup 0.2": Mixup, "cutmix": Cutmix, "subtype": Subtype}


class ByDepth(keras.optimizers.AdamW):  # type: ignore[misc]  # Keras ships no types
    """Each stage of the backbone learns 0.7 times as fast as the one after it."""

    def build(self, variables: Any) -> None:
        super().build(variables)
        names = [variable.path.split("/")[0] for variable in variables]
        stages = [int(name[5]) if name.startswith("block") else 0 if name.startswith("stem") else 8 for name in names]
        self._parts = [0.7 ** (8 - stage) for stage in stages]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient, variable, learning_rate * self._parts[self._get_variable_index(variable)])


def by_depth(spec: Spec, *, rate: float) -> Any:
    optimizer = ByDepth(rate, weight_decay=spec.train.weight_decay)
    optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    return optimizer


ALL_LAYERS = ["best.trainable_layers=999", "features.cache=false"]
LEVERS |= {name: [] for name in [*PIXELS, *STEPS, "rates by depth"]}
LEVERS |= {"all layers": ALL_LAYERS, "all layers, rates by depth": ALL_LAYERS}


@contextmanager
def tried(lever: str, table: pd.DataFrame) -> Iterator[None]:
    """Let training do for a while what the product does not."""
    loop, optimizer = training._Loop, training._optimizer
    Subtype.bacteria = np.where(table["label"] == 0, np.nan, table["path"].str.contains("bacteria")).astype(np.float32)
    training._Loop = STEPS.get(lever, loop)  # type: ignore[misc]
    if lever.endswith("rates by depth"):
        training._optimizer = by_depth
    try:
        yield
    finally:
        training._Loop, training._optimizer = loop, optimizer  # type: ignore[misc]


# --- The search -------------------------------------------------------------------------------------------------------


def part_of(group: str, parts: int, *, salt: str) -> int:
    """Put a patient into one of some parts, the same whenever and wherever it is asked."""
    return int(hashlib.sha256(f"{salt} {group}".encode()).hexdigest()[:8], 16) % parts


def divided(catalog: Catalog, protocol: str, part: int) -> Catalog:
    """Divide the train images by patient: what is learned from, and what is judged on (``validation``)."""
    table = catalog.table[(catalog.table["split"] == "train") & (catalog.table["status"] == "ok")].copy()
    if protocol != "folds":
        table = table[[part_of(group, THIRD, salt="third") == 0 for group in table["group"]]]
    held = np.array([part_of(group, FOLDS, salt="fold") == part for group in table["group"]])
    if protocol == "series":  # of the normals, one series is learned from and the other judged on
        second = table["group"].str.startswith("NORMAL2").to_numpy()
        normal = (table["label"] == 0).to_numpy()
        held = np.where(normal, second == (part == 0), held)
    table["split"] = np.where(held, "validation", "train")
    return replace(catalog, table=table.reset_index(drop=True))


def judge(model: Any, store: ImageStore, table: pd.DataFrame, *, pixels: Callable[[Any], Any] | None) -> dict[str, Any]:
    """Score the judged images as they are and under every fixed change."""
    network = bundle.OnnxNetwork(onnx_graph.build(model).SerializeToString(), name="levers")
    pictures, labels = store.images[store.rows_of(table)], table["label"].to_numpy()

    def score(images: Any) -> Any:
        seen = images if pixels is None else np.stack([pixels(image) for image in images])
        return np.concatenate([network(seen[start : start + 32]).score for start in range(0, len(seen), 32)])

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
        spec = Spec.preset_named("best").with_overrides([f"seed={seed}", *SMALL, *LEVERS[lever]])
        identity_hash = _files.hash_of([identity, spec.hash])[:16]
        catalog = divided(self.scanned, protocol, part)
        store = packed = ImageStore.pack(catalog, size_px=spec.image.size_px)
        if pixels := PIXELS.get(lever):
            seen = np.stack([pixels(image) for image in packed.images])
            store = replace(packed, images=seen, key=f"{packed.key} {lever}")
        if lever.startswith("all layers"):  # all but the first
            layers = len(backbones.layers_of(models.build("tl", spec), spec.backbone.name))
            spec = spec.with_overrides([f"best.trainable_layers={layers - 1}"])
        model = models.build(spec.models[0], spec)
        started, cpu = time.monotonic(), time.process_time()
        checkpoint = _files.cache_dir() / "levers" / f"{identity_hash}.npz"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with tried(lever, catalog.rows("train")):
            history = training.train(model, store, catalog, spec=spec, checkpoint=checkpoint)
        row = identity | {
            "learned": len(catalog.rows("train")),
            "seconds": round(time.monotonic() - started),
            "cpu_seconds": round(time.process_time() - cpu),
            "best_epoch": history.best_epoch,
            "val_loss": float(history.epochs.set_index("epoch")["val_loss"][history.best_epoch]),
            **judge(model, packed, catalog.rows("validation"), pixels=pixels),
        }
        checkpoint.unlink(missing_ok=True)
        self.keep(row)
        print(line(row), flush=True)

    def keep(self, row: dict[str, Any]) -> None:
        """Add a row to what all processes know."""
        with (_files.cache_dir() / "levers" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.known = [*(json.loads(KNOWN.read_text()) if KNOWN.exists() else []), row]
            temporary = KNOWN.with_suffix(".partial")
            temporary.write_text("[\n" + ",\n".join(json.dumps(one) for one in self.known) + "\n]\n")
            os.replace(temporary, KNOWN)


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
    """Write what is known as Markdown, the best robustness first; of several seeds or folds the mean and the range.

    CPU seconds are the most of any run: one that was ended and taken up counts its last sitting only.
    """
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
        yield f"| {lever} | {len(rows)} | {' | '.join(cells)} | {rows['cost'].max():.0f} |"


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
        for protocol in ("screen", "series", "folds"):
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
