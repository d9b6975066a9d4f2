"""What the shortcuts cost in validation AUC: stored features, their precision, stored views, bfloat16.

    python benchmarks/quality.py plain --models cnn tl ft --seeds 42       the plain procedure beside pneumoscope
    python benchmarks/quality.py views --views 0 1 2 4 --seeds 42 43       augmented copies beside the stored features
    python benchmarks/quality.py settings --set features.dtype=float32 --set train.precision=bfloat16

Every figure is of the validation images; the test images are not touched. A line is printed as soon as it is known.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from pneumoscope import _backend

_backend.prepare()

import keras  # noqa: E402
import numpy as np  # noqa: E402
import plain  # noqa: E402

from pneumoscope import inference, metrics, models, training  # noqa: E402
from pneumoscope.catalog import Catalog  # noqa: E402
from pneumoscope.specs import Spec  # noqa: E402
from pneumoscope.store import ImageStore  # noqa: E402

SPLIT_SEED = plain.SEED  # the same validation images for every seed and for both procedures


class Quality:
    def __init__(self, data: Path) -> None:
        self.data = data
        self.scanned = Catalog.scan(data)
        self.store = ImageStore.pack(self.scanned, size_px=224)

    def ours(self, approach: str, spec: Spec, *, what: str) -> None:
        """Train one approach and print what it reaches."""
        divided = self.scanned.split(spec.split, seed=SPLIT_SEED)
        model = models.build(approach, spec)
        started = time.monotonic()
        training.extract_features([model], self.store, divided, spec=spec)
        extracted = time.monotonic()
        history = training.train(model, self.store, divided, spec=spec)
        trained = time.monotonic()
        seconds = history.epochs["seconds"].median()
        found = metrics.evaluate(inference.score(model, self.store, divided.rows("validation")))
        say(
            approach, spec.seed, what, found.roc.auc, found.loss,
            f"{len(history.epochs)} epochs, best {history.best_epoch}; {seconds:.1f} s an epoch, "
            f"features {extracted - started:.0f} s, training {trained - extracted:.0f} s",
        )  # fmt: skip

    def plain(self, approach: str, spec: Spec) -> None:
        """Train one approach by the plain procedure, with the tutorial's augmentation, and print what it reaches."""
        train, validation = plain.load(self.data / "train", augment=True)
        keras.utils.set_random_seed(spec.seed)
        if approach == "cnn":
            model = plain.cnn(rate=spec.cnn.learning_rate, momentum=spec.cnn.momentum)
        else:
            network = plain.from_rgb(models.build(approach, spec))
            model = plain.compiled(network, rate=getattr(spec, approach).learning_rate)
        stop = keras.callbacks.EarlyStopping("val_loss", patience=5, min_delta=1e-7, restore_best_weights=True)
        started = time.monotonic()
        model.fit(train, validation_data=validation, epochs=spec.train.epochs, verbose=0, callbacks=[stop])
        seconds = time.monotonic() - started
        parts = [(truth.numpy()[:, 0], model.predict_on_batch(pixels)[:, 0]) for pixels, truth in validation]
        labels, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
        auc = metrics.roc_curve(labels.astype(np.int8), scores.astype(np.float64)).auc
        say(approach, spec.seed, "plain", auc, metrics.log_loss(labels, scores), f"training {seconds:.0f} s")

    def check_split(self, spec: Spec) -> None:
        """Make sure that both procedures hold out the same files."""
        ours = self.scanned.split(spec.split, seed=SPLIT_SEED).rows("validation")["path"]
        theirs = plain.listed(self.data / "train")[1].file_paths
        if sorted(Path(path).name for path in ours) != sorted(Path(path).name for path in theirs):
            raise SystemExit("The two procedures do not hold out the same validation images; compare nothing.")


def say(approach: str, seed: int, what: str, auc: float | None, loss: float | None, how: str) -> None:
    print(f"{approach:<4} seed {seed}  {what:<28} val AUC {auc:.4f}  val loss {loss:.4f}  {how}", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "chest_xray"
    arguments.add_argument("what", choices=("plain", "views", "settings"))
    arguments.add_argument("--data", type=Path, default=default, help="Kaggle layout at 224 px")
    arguments.add_argument("--models", nargs="+", default=["tl", "ft"])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[42])
    arguments.add_argument("--views", nargs="+", type=int, default=[0, 1, 2, 4])
    arguments.add_argument("--set", action="append", default=[], help="each beside the preset, one at a time")
    arguments.add_argument("--epochs", type=int)
    arguments.add_argument("--recipe", choices=("tutorial", "default"), default="tutorial", help="the cnn's, for plain")
    given = arguments.parse_args()
    os.environ.setdefault("PNEUMOSCOPE_CACHE", str(Path("benchmarks/out/cache").absolute()))
    quality = Quality(given.data.resolve())
    epochs = given.epochs or (3 if given.what == "plain" else 20)
    for seed in given.seeds:
        for approach in given.models:
            preset = given.recipe if given.what == "plain" and approach == "cnn" else "default"
            spec = Spec.preset_named(preset).with_overrides(
                [f"seed={seed}", f"train.epochs={epochs}", "split.calibration=0"]
            )
            if given.what == "plain":
                spec = spec.with_overrides(["split.by=image"])
                quality.check_split(spec)
                quality.ours(approach, spec, what="pneumoscope")
                quality.plain(approach, spec)
            elif given.what == "views":
                for views in given.views:
                    quality.ours(approach, spec.with_overrides([f"features.views={views}"]), what=f"views {views}")
            else:
                for change in ["", *given.set]:
                    changed = spec.with_overrides([change]) if change else spec
                    quality.ours(approach, changed, what=change or preset)


if __name__ == "__main__":
    main()
