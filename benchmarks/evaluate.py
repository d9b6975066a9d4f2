"""Seconds to evaluate very many predictions with every count, curve, interval and subgroup, and what a bootstrap costs.

    python benchmarks/evaluate.py [--images 1000000]

The scores are random: this measures time, nothing else.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd

from pneumoscope import metrics
from pneumoscope.predictions import Predictions


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, default=1_000_000)
    n = arguments.parse_args().images
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, n)
    scores = 1 / (1 + np.exp(-random.normal(2 * labels - 1, 1.5)))
    rows = pd.DataFrame({"path": "", "image_id": "", "split": "test", "label": labels}, index=range(n))
    predictions = Predictions.of(rows, scores)
    subtype = np.where(labels == 0, "NORMAL", np.where(random.random(n) < 0.5, "virus", "bacteria"))
    groups = random.integers(0, n // 2, n)
    points = metrics.choose_operating_points(predictions)
    started = time.perf_counter()
    metrics.evaluate(predictions, operating_points=points, subgroups={"subtype": subtype}, temperature=1.5).as_dict()
    print(f"{n:,} predictions evaluated in {time.perf_counter() - started:.1f} s without a bootstrap")
    seconds = metrics.bootstrap_seconds(predictions, groups=groups, operating_points=points)
    print(f"1,000 resamples of {len(np.unique(groups)):,} groups would take about {seconds:.0f} s")


if __name__ == "__main__":
    main()
