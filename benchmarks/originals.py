"""Does a bundle answer originals as it answers the thumbnails of them that it learned from?

    python benchmarks/originals.py BUNDLE ORIGINALS THUMBNAILS

Both are folders with class folders inside; images are paired by file name. Originals are prepared as `images.load` does
it, under several qualities of `image.jpeg_quality`; printed is how far scores move (in log-odds, mean and standard
deviation by class) and how many calls differ from those of the thumbnails, at the bundle's operating point. Thumbnails
again: what compressing changes that was compressed already.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from pneumoscope import bundle, images
from pneumoscope.catalog import Catalog

QUALITIES = (0, 60, 70, 75, 80, 90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bundle", "originals", "thumbnails"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    opened = bundle.Bundle.open(options.bundle)
    network = bundle.OnnxNetwork(opened.network_bytes(), name="originals")
    size_px, (point, threshold) = opened.description.size_px, opened.description.point
    found = [Catalog.scan(folder) for folder in (options.originals, options.thumbnails)]
    by_name = [{Path(path).name: path for path in catalog.rows()["path"]} for catalog in found]
    both = sorted(by_name[0].keys() & by_name[1].keys())
    labels = found[0].rows().set_index("path").loc[[by_name[0][name] for name in both], "label"].to_numpy()

    def scores(which: int, quality: int) -> Any:
        files: Sequence[bytes] = [found[which].read_bytes(by_name[which][name]) for name in both]
        pictures = np.stack([images.load(data, size_px, jpeg_quality=quality) for data in files])
        return np.concatenate([network(pictures[at : at + 32]).score for at in range(0, len(pictures), 32)])

    usual = scores(1, 0)
    print(f"n {len(both)}, {int(labels.sum())} of them PNEUMONIA; operating point {point}, threshold {threshold:.4f}\n")
    print("| images | jpeg_quality | log-odds move, NORMAL | PNEUMONIA | calls that differ | wrong |")
    print("|---|---|---|---|---|---|")
    for name, which, quality in [
        ("thumbnails", 1, 0),
        ("thumbnails", 1, 75),
        *(("originals", 0, q) for q in QUALITIES),
    ]:
        now = scores(which, quality)
        moved = special.logit(now.clip(1e-6, 1 - 1e-6)) - special.logit(usual.clip(1e-6, 1 - 1e-6))
        differ = int(((now > threshold) != (usual > threshold)).sum())
        wrong = int(((now > threshold) != labels).sum())
        cells = [f"{moved[labels == label].mean():+.2f} ({moved[labels == label].std():.2f})" for label in (0, 1)]
        print(f"| {name} | {quality or 'none'} | {' | '.join(cells)} | {differ} | {wrong} |", flush=True)


if __name__ == "__main__":
    main()
