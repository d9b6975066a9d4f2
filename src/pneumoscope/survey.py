"""What a person should see of the images before anything is trained: counts, findings, sample grids.

Owns how a set of images is read and what is said and drawn of it. Knows nothing of networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from pneumoscope import _files, audit, figures, phantom
from pneumoscope.audit import Audit
from pneumoscope.catalog import Catalog
from pneumoscope.errors import UsageError
from pneumoscope.narration import Narration
from pneumoscope.runs import Run
from pneumoscope.specs import LABELS, PRETRAINED, Spec
from pneumoscope.store import ImageStore

SAMPLES = 12


def inspect(data: Path, folder: Path, *, spec: Spec, narration: Narration | None = None) -> Catalog:
    """Look at a set of images without training: counts, sample grids, class distributions.

    Parameters
    ----------
    data : Path
        Images, as `Catalog.scan` takes them.
    folder : Path
        Where ``catalog.csv`` and ``figures/`` are written.
    spec : Spec
        Classes, split and image size.
    narration : Narration, optional
        Who speaks; silent where not given.

    Returns
    -------
    Catalog

    Raises
    ------
    PneumoscopeError
        Where the images cannot be used, or the folder is a run's or cannot be written.
    """
    voice, paths = narration or Narration("silent"), Run(folder)
    _require_no_run(paths)
    catalog, store = read_images(spec, data, voice)
    catalog.write(paths.catalog_path)
    draw_data(catalog, store, paths, note=note_of(spec, data, catalog=catalog, models_used=()), seed=spec.seed)
    voice.say(f"Pictures are in {folder / 'figures'}, the list of images in {paths.catalog_path}.")
    return catalog


def audit_images(data: Path, folder: Path | None, *, spec: Spec, narration: Narration | None = None) -> Audit:
    """Look for what makes figures wrong: leaks, double labels, duplicates, odd images.

    Parameters
    ----------
    data : Path
        Images, as `Catalog.scan` takes them.
    folder : Path, optional
        Where ``audit.json`` and pictures of near-duplicates are written.
    spec : Spec
        Classes, split, image size and ``audit.allow``.
    narration : Narration, optional
        Who speaks; silent where not given.

    Returns
    -------
    Audit
        Its ``exit_status`` says whether a run would be refused.

    Raises
    ------
    PneumoscopeError
        Where the images cannot be read, or the folder is a run's or cannot be written.
    """
    voice, target = narration or Narration("silent"), None if folder is None else Run(folder)
    if target is not None:
        _require_no_run(target)
    catalog, store = read_images(spec, data, voice, learnable=False)
    note = note_of(spec, data, catalog=catalog, models_used=())
    return examine(catalog, store, spec, voice, target=target, note=note)


def _require_no_run(target: Run) -> None:
    """Refuse to put another list of images, or another audit, in the place of those that models were made with."""
    if target.manifest_path.exists():
        raise UsageError(
            f"{target.folder} is a run, whose list of images and audit belong to its models; choose another folder "
            "with -o."
        )


def examine(
    catalog: Catalog, store: ImageStore, spec: Spec, voice: Narration, *, target: Run | None = None, note: str = ""
) -> Audit:
    """Audit images that have been read, say what was found and keep it.

    Parameters
    ----------
    catalog, store : Catalog, ImageStore
        From `read_images`.
    spec : Spec
        ``audit.allow``.
    voice : Narration
        Who speaks.
    target : Run, optional
        Where ``audit.json`` and the picture of near-duplicates belong.
    note : str
        Stands on the picture.

    Returns
    -------
    Audit

    Raises
    ------
    PneumoscopeError
        Where a file cannot be read any more or the result cannot be written.
    """
    with voice.stage("Auditing the images"), voice.bar("audit") as progress:
        found = audit.audit(catalog, store, allow=spec.audit.allow, progress=progress)
    _say_findings(found, voice)
    if target is not None:
        _files.write_json(target.audit_path, found.as_dict())
        if len(found.pairs):
            figures.save(_pair_grid(found, catalog, store, note=note), target.figure_path("near_duplicates"))
    return found


def read_images(
    spec: Spec, data: Path, voice: Narration, *, divide: bool = True, learnable: bool = True
) -> tuple[Catalog, ImageStore]:
    """List, decode and divide a set of images, saying what was found.

    Parameters
    ----------
    spec : Spec
        Classes, split and image size.
    data : Path
        Images, as `Catalog.scan` takes them.
    voice : Narration
        Who speaks.
    divide : bool
        Make the splits.
    learnable : bool
        Refuse a set that no model can learn from.

    Returns
    -------
    Catalog
        Without the images that could not be decoded.
    ImageStore

    Raises
    ------
    PneumoscopeError
        Where the images cannot be used.
    """
    with voice.stage(f"Reading {data}"), voice.bar("files", unit="files") as progress:
        catalog = Catalog.scan(data, classes=spec.data.classes, progress=progress)
    store = pack(catalog, spec, voice)
    catalog = catalog.quarantine(store.rejected)
    if divide:
        catalog = catalog.split(spec.split, seed=spec.seed)
        if learnable:
            catalog.require_learnable()
    for note in catalog.notes:
        voice.say(f"  {note}")
    if catalog.ignored:
        counts = ", ".join(f"{count} {kind}" for kind, count in catalog.ignored.items())
        voice.say(f"  Ignored: {counts}.")
    _say_quarantined(catalog, voice)
    counted = catalog.counts()
    rows = [[str(split), *(f"{count:,}" for count in counted.loc[split])] for split in counted.index]
    rows.append(["all", *(f"{count:,}" for count in counted.sum())])
    voice.table("Images", ["split", *counted.columns], rows)
    return catalog, store


def note_of(spec: Spec, data: Path, *, catalog: Catalog, models_used: Sequence[str] | None = None) -> str:
    """Return what must stand on every output: synthetic data, random weights; empty where nothing must.

    Parameters
    ----------
    spec : Spec
        Names the weights.
    data : Path
        The images.
    catalog : Catalog
        Their list: a manifest may name synthetic images wherever they lie.
    models_used : sequence of str, optional
        The approaches concerned; those of `spec` where not given.

    Returns
    -------
    str
    """
    marks = []
    first = catalog.rows().drop_duplicates(["split", "label"])["path"]  # of each part, because lists can be mixed
    if phantom.is_synthetic(data) or any(phantom.is_synthetic_image(catalog.read_bytes(path)) for path in first):
        marks.append("SYNTHETIC DATA")
    hollow = [name for name in PRETRAINED if name in (spec.models if models_used is None else models_used)]
    if spec.backbone.weights == "none" and hollow:
        marks.append(f"{' and '.join(hollow)} on RANDOM WEIGHTS")
    return ", ".join(marks)


def pack(catalog: Catalog, spec: Spec, voice: Narration) -> ImageStore:
    """Decode and resize every image once, with progress.

    Parameters
    ----------
    catalog : Catalog
        The images.
    spec : Spec
        ``image``.
    voice : Narration
        Who speaks.

    Returns
    -------
    ImageStore

    Raises
    ------
    StoreError
        As `ImageStore.pack`.
    """
    with voice.stage("Packing the images"), voice.bar("images") as progress:
        return ImageStore.pack(
            catalog, size_px=spec.image.size_px, jpeg_quality=spec.image.jpeg_quality, progress=progress
        )


def draw_data(catalog: Catalog, store: ImageStore, target: Run, *, note: str, seed: int) -> None:
    """Draw the class distributions and sample grids of the training images (all that are not test) and of test.

    Parameters
    ----------
    catalog, store : Catalog, ImageStore
        The images.
    target : Run
        Where the pictures belong.
    note : str
        Stands on each.
    seed : int
        Of the samples.

    Raises
    ------
    PneumoscopeError
        Where a picture cannot be written.
    """
    usable = catalog.rows()
    is_test = usable["split"] == "test"
    for name, part in (("train", usable[~is_test]), ("test", usable[is_test])):
        counts = {label: int((part["label"] == index).sum()) for index, label in enumerate(LABELS)}
        title = {"train": "Training images", "test": "Test images"}[name]
        bars = figures.class_bars(counts, title=title, note=note)
        figures.save(bars, target.figure_path(f"{name}_data_dist_barplot"))
        figures.save(figures.class_pie(counts, title=title, note=note), target.figure_path(f"{name}_data_dist_pieplot"))
        for index, label in enumerate(LABELS):
            grid = _sample_grid(
                part[part["label"] == index], store, title=f"{label}, {name} images", note=note, seed=seed
            )
            figures.save(grid, target.figure_path(f"{name}_samples_{label.lower()}"))


def _say_findings(found: Audit, voice: Narration) -> None:
    if not found.findings:
        voice.say("  The audit found nothing to report.")
        return
    rows = [[finding.name, finding.severity, f"{finding.count:,}"] for finding in found.findings]
    voice.table("Audit", ["finding", "severity", "count"], rows)
    for finding in found.findings:  # under the table: sentences are too long for a column
        voice.say(f"  {finding.name}: {finding.sentence}")


def _say_quarantined(catalog: Catalog, voice: Narration) -> None:
    bad = catalog.quarantined()
    if not len(bad):
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in bad["status"].value_counts().items())
    voice.warn(f"{len(bad)} files are left out ({reasons}); catalog.csv lists them.")


def _sample_grid(rows: pd.DataFrame, store: ImageStore, *, title: str, note: str, seed: int) -> Figure:
    chosen = rows.sample(min(SAMPLES, len(rows)), random_state=seed).sort_values("path") if len(rows) else rows
    pixels: list[npt.NDArray[np.uint8]] = [store.images[row] for row in store.rows_of(chosen)] if len(chosen) else []
    captions = [Path(path).name for path in chosen["path"]]
    return figures.sample_grid(pixels, captions=captions, title=title, note=note)


def _pair_grid(found: Audit, catalog: Catalog, store: ImageStore, *, note: str) -> Figure:
    """Draw the first of the near-duplicates side by side."""
    chosen = found.pairs.head(figures.MAX_PAIRS)
    (count,) = (finding.count for finding in found.findings if finding.name == "near-duplicate")
    rows = catalog.rows().drop_duplicates("path").set_index("path")
    sides = [store.images[store.rows_of(rows.loc[chosen[side]])] for side in ("first", "second")]
    return figures.pairs(
        list(zip(*sides, strict=True)),
        captions=[(Path(one).name, Path(two).name) for one, two in zip(chosen["first"], chosen["second"], strict=True)],
        title=f"Near-duplicates to look at ({len(chosen)} of {count:,} pairs)",
        note=note,
    )
