"""Peak anonymous memory of pack, feature extraction, training and evaluation, at two numbers of images.

    python benchmarks/memory.py [--images 5000 100000]

Each stage of each size runs in a process of its own with the smoke preset's networks at 64 px. Anonymous memory
(RssAnon) is what a process must hold; pages of memory-mapped files, which the system can drop at any time, are not
counted. Images are noise in class folders: this measures memory, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

STAGES = ("pack alone", "pack", "features", "training", "evaluation")
"""``pack alone`` is the verb, which needs no network; the others are as in a run, with the backend in memory."""


def write_images(folder: Path, n: int) -> None:
    """Write n different 64 x 64 pictures in the Kaggle layout."""
    generator = np.random.default_rng(n)
    for index in range(n):
        label = ("NORMAL", "PNEUMONIA")[index % 2]
        target = folder / ("test" if index % 5 == 0 else "train") / label
        target.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(generator.integers(0, 255, (64, 64), dtype=np.uint8))
        picture.save(target / f"{label}-{index}-0001.png", compress_level=0)


def measure(stage: str, data: Path) -> None:
    """Run one stage in this process and print its peak anonymous memory in MB."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = max(peak, next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))

    if stage != "pack alone":  # as in a run, where the backend is there from the beginning
        from pneumoscope import _backend

        _backend.prepare()
        from pneumoscope import inference, metrics, models, training
    from pneumoscope.catalog import Catalog
    from pneumoscope.specs import Spec
    from pneumoscope.store import ImageStore

    threading.Thread(target=watch, daemon=True).start()
    spec = Spec.preset_named("smoke").with_overrides(["backbone.weights=none"])
    started = time.monotonic()
    catalog = Catalog.scan(data).split(spec.split, seed=spec.seed)
    store = ImageStore.pack(catalog, size_px=64)
    if stage == "features":
        training.extract_features([models.build("tl", spec)], store, catalog, spec=spec)
    elif stage == "training":
        training.train(models.build("tl", spec), store, catalog, spec=spec)
    elif stage == "evaluation":
        model = models.build("cnn", spec)
        for split in ("validation", "test"):
            metrics.evaluate(inference.score(model, store, catalog.rows(split))).as_dict()
    done.set()
    print(json.dumps({"stage": stage, "peak_mb": peak / 1000, "seconds": time.monotonic() - started}))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, nargs=2, default=(5_000, 100_000))
    arguments.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.stage:
        measure(given.stage, given.data)
        return
    peaks: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for n in given.images:
            data = Path(folder) / str(n)
            write_images(data, n)
            peaks[n] = {}
            for stage in STAGES:
                command = [sys.executable, __file__, "--stage", stage, "--data", str(data)]
                cache = Path(folder) / f"cache-{n}{'-alone' if stage == 'pack alone' else ''}"
                environment = {**os.environ, "PNEUMOSCOPE_CACHE": str(cache)}
                printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
                result = json.loads(printed.splitlines()[-1])
                peaks[n][stage] = result["peak_mb"]
                print(
                    f"{n:>8,} images  {stage:<10} {result['peak_mb']:8,.0f} MB  {result['seconds']:7.1f} s", flush=True
                )
    small, large = given.images
    for stage in STAGES:
        print(f"{stage:<10} {peaks[large][stage] / peaks[small][stage]:.2f} x from {small:,} to {large:,} images")


if __name__ == "__main__":
    main()
