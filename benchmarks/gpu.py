"""The whole three-approach schedule on this machine's accelerator: seconds per stage, images/s, compilation apart.

    KERAS_BACKEND=jax python benchmarks/gpu.py [--data FOLDER] [--preset tutorial] [--epochs 50]

Weights are random (the time does not depend on them); without --data the images are synthetic.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from pneumoscope import _backend, phantom

_backend.prepare()

from pneumoscope import inference, metrics, models, training  # noqa: E402
from pneumoscope.catalog import Catalog  # noqa: E402
from pneumoscope.specs import Spec  # noqa: E402
from pneumoscope.store import ImageStore  # noqa: E402


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path)
    arguments.add_argument("--preset", default="tutorial")
    arguments.add_argument("--epochs", type=int, default=50)
    arguments.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    given = arguments.parse_args()
    print(json.dumps(vars(_backend.describe())))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PNEUMOSCOPE_CACHE"] = folder
        data = given.data or phantom.write_dataset(Path(folder) / "synthetic", n_train=1200, n_test=300)
        changes = ["backbone.weights=none", "features.cache=true", f"train.epochs={given.epochs}"]
        changes += [f"train.patience={given.epochs}", f"train.precision={given.precision}"]
        run(Spec.preset_named(given.preset).with_overrides(changes), data)


def run(spec: Spec, data: Path) -> None:
    """Do every stage once and print what it took."""
    clock = _Clock()
    catalog = Catalog.scan(data).split(spec.split, seed=spec.seed)
    clock.lap("scan")
    store = ImageStore.pack(catalog, size_px=spec.image.size_px, jpeg_quality=spec.image.jpeg_quality)
    clock.lap("pack", images=len(store.image_ids))
    built = {name: models.build(name, spec) for name in spec.models}
    clock.lap("build")
    learn, check = catalog.rows("train"), catalog.rows("validation")
    training.extract_features([built["tl"], built["ft"]], store, catalog, spec=spec)
    clock.lap("features, compilation included", images=len(learn) + len(check))
    for name, model in built.items():
        history = training.train(model, store, catalog, spec=spec)
        clock.lap(f"{name}: {len(history.epochs)} epochs", images=len(history.epochs) * len(learn))
        seconds = history.epochs["seconds"]
        later = float(seconds.iloc[1:].median())
        print(f"  {name}: compilation about {seconds.iloc[0] - later:.1f} s; then {len(learn) / later:,.0f} images/s")
        for split in ("validation", "test"):
            metrics.evaluate(inference.score(model, store, catalog.rows(split)))
        clock.lap(f"{name}: scoring, compilation included", images=len(check) + len(catalog.rows("test")))


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self, what: str, *, images: int | None = None) -> None:
        seconds = time.perf_counter() - self._last
        rate = "" if images is None else f"  {images / seconds:,.0f} images/s"
        print(f"{what:<40} {seconds:8.1f} s{rate}", flush=True)
        self._last = time.perf_counter()


if __name__ == "__main__":
    main()
