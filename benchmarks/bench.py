"""pneumoscope beside the plain Keras procedure, on the same images, in one run on one machine.

    make bench
    python benchmarks/bench.py --data FOLDER --only cnn-224 evaluation

Prints a table and writes ``benchmarks/out/results.json``. Where a row is extrapolated it says how: plain epochs are
scaled up from measured batches, our 50-epoch schedules from a whole feature extraction and measured epochs. Weights are
random: the time of a forward pass does not depend on them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pneumoscope import _backend

_backend.prepare(deterministic=False)  # the peer runs so too

import keras  # noqa: E402
import numpy as np  # noqa: E402
import plain  # noqa: E402
import tensorflow as tf  # noqa: E402

from pneumoscope import images, inference, metrics, models, training  # noqa: E402
from pneumoscope.catalog import Catalog  # noqa: E402
from pneumoscope.specs import Spec  # noqa: E402
from pneumoscope.store import ImageStore  # noqa: E402

OUT = Path(__file__).parent / "out" / "results.json"
EPOCHS = 50
MEASURED_BATCHES = 20
FULL_ROWS = 2000
SUBSET = 1600  # images of the cnn rows: 40 training batches and 10 of validation


@dataclass(frozen=True)
class Row:
    """One comparison; ``gflop`` is the arithmetic that ours needs at least, for the fraction of the machine's peak."""

    work: str
    plain_s: float
    ours_s: float
    how: str = ""
    target: float | None = None
    ours_gflop: float | None = None

    @property
    def ratio(self) -> float:
        return self.plain_s / self.ours_s

    def of_peak(self, peak: float) -> float | None:
        """Share of the machine's peak, in GFLOP/s, that ours reaches."""
        return None if self.ours_gflop is None else self.ours_gflop / self.ours_s / peak

    def as_dict(self, *, peak: float) -> dict[str, Any]:
        found = {"ratio": self.ratio, "extrapolated": bool(self.how), "fraction_of_peak": self.of_peak(peak)}
        return asdict(self) | found

    def line(self, *, peak: float) -> str:
        share = self.of_peak(peak)
        return (
            f"{self.work:<14}{self.plain_s:>12,.2f}{self.ours_s:>12,.2f}{self.ratio:>8.2f}{self.target or '':>8}"
            f"{'' if share is None else f'{share:.0%}':>9}  {self.how}"
        )


@dataclass(frozen=True)
class _Ours:
    """One pass over the images, and 50 epochs of each approach on what it stored."""

    features_s: float
    features_gflop: float
    epochs_s: dict[str, float]
    epochs_gflop: dict[str, float]


class Bench:
    def __init__(self, data: Path, work: Path) -> None:
        self.data, self.work = data, work
        self.catalog = Catalog.scan(data)
        self.tutorial = Spec.preset_named("tutorial").with_overrides(
            ["backbone.weights=none", "features.cache=true", "augment.zoom=0", "augment.translation=0"]
        )

    # -- the cnn, epoch against epoch ---------------------------------------------------------------------------

    def cnn_224(self) -> list[Row]:
        rows = self.catalog.rows("train")
        chosen = rows.sample(min(SUBSET, len(rows)), random_state=0)
        return [self._cnn("cnn-224", self._folder("files-224", chosen, copies=1), target=1.15)]

    def cnn_full(self) -> list[Row]:
        return [self._cnn("cnn-full", self._originals(), target=1.3)]

    def _cnn(self, work: str, folder: Path, *, target: float) -> Row:
        spec = Spec.preset_named("tutorial").with_overrides(["backbone.weights=none", "train.epochs=2"])
        catalog = Catalog.scan(folder)
        store = ImageStore.pack(catalog, size_px=224)
        plain_s, ours_s = [], []
        for _ in range(2):  # in turn, so that a drift of the machine meets both
            train, validation = plain.load(folder, augment=True)
            clock = _EpochClock()
            plain.cnn().fit(train, validation_data=validation, epochs=2, verbose=0, callbacks=[clock])
            plain_s.append(clock.seconds[-1])
            divided = _as_keras(catalog, spec)
            history = training.train(models.build("cnn", spec), store, divided, spec=spec)
            ours_s.append(float(history.epochs["seconds"].iloc[-1]))
        n_train, n_validation = len(divided.rows("train")), len(divided.rows("validation"))
        forward = gflop_per_image(models.build("cnn", spec))
        return Row(work, min(plain_s), min(ours_s), "", target, forward * (3 * n_train + n_validation))

    # -- schedules on a backbone ----------------------------------------------------------------------------------

    def resnet(self) -> list[Row]:
        """The tutorial's backbone; each row bears the whole time of the one pass that serves both approaches."""
        plain_s = {}
        for approach, trainable, rate in (("tl", 0, 5e-5), ("ft", 13, 2e-6)):
            plain_s[approach] = self._plain_schedule(plain.resnet(trainable=trainable, rate=rate))
            keras.backend.clear_session()
        ours = self._our_schedules(["tl", "ft"], self.tutorial)
        targets = {"tl": 40, "ft": 10}
        return [
            Row(f"{name}-schedule", plain_s[name], ours.features_s + ours.epochs_s[name], _HOW, targets[name],
                ours.features_gflop + ours.epochs_gflop[name])
            for name in plain_s
        ]  # fmt: skip

    def lite0(self) -> list[Row]:
        spec = Spec.preset_named("default").with_overrides(["backbone.weights=none"])
        plain_s = 0.0
        for approach in ("tl", "ft"):
            model = plain.compiled(plain.from_rgb(models.build(approach, spec)), rate=1e-4)
            plain_s += self._plain_schedule(model)
        ours = self._our_schedules(["tl", "ft"], spec)
        ours_s = ours.features_s + sum(ours.epochs_s.values())
        gflop = ours.features_gflop + sum(ours.epochs_gflop.values())
        return [Row("lite0-tl-ft", plain_s, ours_s, _HOW, 8, gflop)]

    def _plain_schedule(self, model: Any) -> float:
        """Seconds of 50 epochs, from measured training and validation batches."""
        train, validation = plain.load(self.data / "train", augment=False)
        model.fit(train.take(2), verbose=0)
        model.evaluate(validation.take(2), verbose=0)
        learn = _seconds(lambda: model.fit(train.take(MEASURED_BATCHES), verbose=0)) / MEASURED_BATCHES
        check = _seconds(lambda: model.evaluate(validation.take(MEASURED_BATCHES), verbose=0)) / MEASURED_BATCHES
        return EPOCHS * (learn * int(train.cardinality()) + check * int(validation.cardinality()))

    def _our_schedules(self, approaches: list[str], spec: Spec) -> _Ours:
        """Measure the whole feature extraction, views 0, and three epochs of each approach."""
        spec = spec.with_overrides(["features.views=0", "train.epochs=3"])
        with tempfile.TemporaryDirectory(dir=self.work) as cache:
            os.environ["PNEUMOSCOPE_CACHE"] = cache
            divided = _as_keras(self.catalog, spec)
            store = ImageStore.pack(divided, size_px=224)
            built = {approach: models.build(approach, spec) for approach in approaches}
            features_s = _seconds(lambda: training.extract_features(list(built.values()), store, divided, spec=spec))
            n_train, n_validation = len(divided.rows("train")), len(divided.rows("validation"))
            epochs_s, epochs_gflop, features_gflop = {}, {}, 0.0
            for name, model in built.items():
                history = training.train(model, store, divided, spec=spec)
                epochs_s[name] = EPOCHS * statistics.median(history.epochs["seconds"].iloc[1:])
                cut = models.cut(model)
                assert cut is not None
                prefix, tail = models.split_at(model, cut)
                epochs_gflop[name] = EPOCHS * gflop_per_image(tail) * (3 * n_train + n_validation)
                features_gflop = max(features_gflop, gflop_per_image(prefix) * (n_train + n_validation))
        return _Ours(features_s, features_gflop, epochs_s, epochs_gflop)

    # -- everything after training --------------------------------------------------------------------------------

    def evaluation(self) -> list[Row]:
        """Both splits, with every count, curve and table; the peer predicts file by file, for counts and for curves."""
        spec = self.tutorial.with_overrides(["models=['cnn']"])
        divided = _as_keras(self.catalog, spec)
        store = ImageStore.pack(divided, size_px=224)
        parts = [divided.rows(split) for split in ("validation", "test")]
        model, peer = models.build("cnn", spec), plain.cnn()
        paths = [divided.root / path for part in parts for path in part["path"]]
        some = paths[:: max(1, len(paths) // 150)]
        plain.predict_one(peer, some[0])
        each = _seconds(lambda: [plain.predict_one(peer, path) for path in some]) / len(some)
        inference.score(model, store, parts[0].head(40))

        def ours() -> None:
            scored = [inference.score(model, store, part) for part in parts]
            points = metrics.choose_operating_points(scored[0])
            for index, predictions in enumerate(scored):
                metrics.evaluate(predictions, operating_points=points).as_dict()
                predictions.table.to_csv(self.work / f"scores-{index}.csv")

        how = f"plain: {len(some)} of {len(paths)} files measured, two passes (counts; curves)"
        return [Row("evaluation", 2 * each * len(paths), _seconds(ours), how, 10, gflop_per_image(model) * len(paths))]

    def pack_full(self) -> list[Row]:
        """Decode and resize originals once: the peer's loader reads them through, ours packs them."""
        folder = self._originals()
        train, validation = plain.load(folder, augment=False)
        plain_s = _seconds(lambda: [None for part in (train, validation) for _ in part])
        catalog = Catalog.scan(folder)
        ours_s = _seconds(lambda: ImageStore.pack(catalog, size_px=224, cache=self.work / "pack-full"))
        return [Row("pack-full", plain_s, ours_s)]

    def predict_one(self) -> list[Row]:
        spec = self.tutorial.with_overrides(["models=['cnn']"])
        model, peer = models.build("cnn", spec), plain.cnn()
        path = self.catalog.root / self.catalog.rows("test")["path"].iloc[0]

        def ours() -> None:
            pixels = images.load(path.read_bytes(), 224)
            model.predict_on_batch(pixels[None, ..., None])

        model.compile(jit_compile=False)
        plain.predict_one(peer, path)
        ours()
        pairs = [(_seconds(lambda: plain.predict_one(peer, path)), _seconds(ours)) for _ in range(20)]
        return [Row("predict-one", *(statistics.median(part) for part in zip(*pairs, strict=True)))]

    def growth(self) -> list[dict[str, float | str]]:
        """Seconds for N and 4 N images."""
        spec = Spec.preset_named("default").with_overrides(["backbone.weights=none", "train.epochs=2", "models=['tl']"])
        grown = []
        for n, seed in ((250, 1), (1000, 2)):
            os.environ["PNEUMOSCOPE_CACHE"] = str(self.work / f"cache-growth-{n}")
            folder = self._folder(f"growth-{n}", self.catalog.rows("train").sample(n, random_state=seed), copies=1)
            catalog = _as_keras(Catalog.scan(folder), self.tutorial)
            pack_s = _seconds(functools.partial(ImageStore.pack, catalog, size_px=224))
            store = ImageStore.pack(catalog, size_px=224)
            model = models.build("tl", spec)
            feature_s = _seconds(functools.partial(training.extract_features, [model], store, catalog, spec=spec))
            history = training.train(model, store, catalog, spec=spec)
            grown.append({"pack": pack_s, "features": feature_s, "tl epoch": float(history.epochs["seconds"].iloc[-1])})
        small, large = grown
        return [{"work": k, "n_s": small[k], "4n_s": large[k], "growth": large[k] / small[k]} for k in small]

    # -- images -----------------------------------------------------------------------------------------------------

    def _originals(self) -> Path:
        """The published originals, repeated to 2,000 files; each copy ends in other bytes, so none is a duplicate."""
        source = self.data.parent / "full_resolution"
        rows = Catalog.scan(source if source.is_dir() else self.data).rows()
        root = source if source.is_dir() else self.data
        return self._folder("originals", rows, copies=-(-FULL_ROWS // len(rows)), root=root)

    def _folder(self, name: str, rows: Any, *, copies: int, root: Path | None = None) -> Path:
        target = self.work / name
        if not target.exists():
            for copy, row in itertools.product(range(copies), rows.itertuples()):
                label = target / ("NORMAL", "PNEUMONIA")[row.label]
                label.mkdir(parents=True, exist_ok=True)
                data = ((root or self.data) / row.path).read_bytes()
                extra = f"copy {copy}".encode() if copies > 1 else b""  # after the end marker: decoders stop before it
                (label / f"{copy:03d}-{Path(row.path).name}").write_bytes(data + extra)
        return target


_HOW = f"plain: {EPOCHS} epochs from {MEASURED_BATCHES} batches; ours: {EPOCHS} epochs from 2, after all features"


class _EpochClock(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def _as_keras(catalog: Catalog, spec: Spec) -> Catalog:
    return catalog.split(spec.split, seed=spec.seed)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def gflop_per_image(model: Any) -> float:
    """Return the multiplications and additions of one forward pass in GFLOP, convolutions and dense layers only."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, (keras.layers.DepthwiseConv2D, keras.layers.Conv2D)):
            total += 2 * int(np.prod(layer.kernel.shape)) * int(np.prod(layer.output.shape[1:3]))
        elif isinstance(layer, keras.layers.Dense):
            total += 2 * int(np.prod(layer.kernel.shape))
    return total / 1e9


def peak_gflops() -> float:
    """Return the best of five float32 matrix products of 4096 x 4096, in GFLOP/s."""
    a = tf.random.normal((4096, 4096))
    multiply = tf.function(lambda: tf.linalg.matmul(a, a), jit_compile=False)
    multiply()
    return max(2 * 4096**3 / 1e9 / _seconds(lambda: multiply().numpy()) for _ in range(5))


def machine() -> dict[str, Any]:
    described = _backend.describe()
    return {
        "platform": platform.platform(),
        "cores": _backend.available_cores(),
        "versions": described.versions,
        "devices": list(described.devices),
        "peak_gflops_float32": peak_gflops(),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "chest_xray"
    arguments.add_argument("--data", type=Path, default=default, help="Kaggle layout at 224 px")
    arguments.add_argument("--only", nargs="*", help="names of works: ids of rows, lite0, resnet, growth")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PNEUMOSCOPE_CACHE"] = str(Path(folder) / "cache")
        bench = Bench(given.data.resolve(), Path(folder))
        known = {
            "cnn-224": bench.cnn_224,
            "cnn-full": bench.cnn_full,
            "pack-full": bench.pack_full,
            "predict-one": bench.predict_one,
            "evaluation": bench.evaluation,
            "lite0": bench.lite0,
            "resnet": bench.resnet,
        }
        about = machine()
        rows = []
        print(f"{about['cores']} cores, {about['peak_gflops_float32']:.0f} GFLOP/s float32 matrix product")
        print(f"{'work':<14}{'plain s':>12}{'ours s':>12}{'ratio':>8}{'target':>8}{'of peak':>9}  extrapolated")
        for name, work in known.items():
            if given.only and name not in given.only:
                continue
            for row in work():
                rows.append(row.as_dict(peak=about["peak_gflops_float32"]))
                print(row.line(peak=about["peak_gflops_float32"]), flush=True)
            keras.backend.clear_session()
        grown = [] if given.only and "growth" not in given.only else bench.growth()
        for part in grown:
            print(f"from N to 4 N images: {part['work']:<10} {part['n_s']:.2f} s to {part['4n_s']:.2f} s")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"rows": rows, "growth": grown, "machine": about}, indent=2) + "\n")
    print(f"Written to {OUT}")


if __name__ == "__main__":
    main()
