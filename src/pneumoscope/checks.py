"""Whether to believe a model's evidence maps: the checks of `evidence_checks` on validation images of a run.

Owns which images are looked at, the files that hold what was found, and what each picture shows. `check` writes::

    DIR/evidence_checks.json    figures and verdicts
        evidence_checks.csv     check,part,measure,image_id,value: one row per image and measure
        deletion_insertion.png  evidence_shares.png  randomisation.png  evidence_gallery.png
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from pneumoscope import _files, evidence, evidence_checks, evidence_figures, export, figures, inference, models
from pneumoscope.errors import DataError, UsageError
from pneumoscope.evidence_checks import HEADER, SHUFFLES, Finding, Sample
from pneumoscope.narration import Narration
from pneumoscope.predictor import Description, Outputs, Predictor
from pneumoscope.runs import Run
from pneumoscope.specs import LABELS, RESEARCH_USE
from pneumoscope.stages import own_images

GALLERY: Final = 3
"""Images of each label in the gallery."""


def check(
    run: Run,
    model: str,
    *,
    folder: Path,
    n_images: int = 64,
    narration: Narration | None = None,
) -> dict[str, Any]:
    """Check a model's evidence maps on validation images of its run, and write what was found.

    Parameters
    ----------
    run : Run
        Finished, its images still where they were.
    model : {"cnn", "tl", "ft", "best"}
        Which approach.
    folder : Path
        Where the files go; created where it is not there.
    n_images : int
        How many images, half of each label where there are enough; 2 or more. The same run gives the same images.
    narration : Narration, optional
        Who speaks; silent where not given.

    Returns
    -------
    dict
        As in ``evidence_checks.json``.

    Raises
    ------
    UsageError
        For another model, or fewer than 2 images.
    DataError
        Where the validation images lack a label.
    PneumoscopeError
        Where the run, its model or its images cannot be read.
    """
    voice = narration or Narration("silent")
    if n_images < 2:
        raise UsageError(f"The checks were asked for on {n_images} images; give 2 or more, for example 64.")
    predictor = export.open_predictor(run, model, narration=voice)
    spec = run.read_spec()
    keras_model = inference.load_model(run.model_path(model), approach=model, spec=spec)
    catalog, store = own_images(run, spec, voice)
    rows = sampled(catalog.rows("validation"), n_images=n_images, seed=spec.seed)
    sample = look(predictor, rows, store.images[store.rows_of(rows)])
    found = _findings(sample, predictor, keras_model, seed=spec.seed, precision=spec.train.precision, voice=voice)
    content = _content(sample, predictor.description, found, seed=spec.seed)
    drawn = _drawn(sample, predictor.description, found)
    for name, figure in drawn.items():
        figures.save(figure, folder / name)
    _files.write_csv(folder / "evidence_checks.csv", HEADER, (row for each in found.values() for row in each.rows))
    content = dict(_files.jsonable({**content, "figures": list(drawn)}))
    _files.write_json(folder / "evidence_checks.json", content)  # last: its presence says that all is there
    for sentence in content["verdicts"]:
        voice.say(sentence)
    return content


def sampled(rows: pd.DataFrame, *, n_images: int, seed: int) -> pd.DataFrame:
    """Pick images of both labels, each content once.

    Parameters
    ----------
    rows : DataFrame
        A Catalog's rows of one split.
    n_images : int
        Half of each label, 2 or more; where one label has fewer, the other has more.
    seed : int
        0 or more; the same seed picks the same images.

    Returns
    -------
    DataFrame
        At most `n_images` of the rows, in their order, numbered anew.

    Raises
    ------
    DataError
        Where a label is missing.
    """
    distinct = rows.drop_duplicates("image_id")
    having = [int((distinct["label"] == label).sum()) for label in (0, 1)]
    if not all(having):
        raise DataError(
            f"The validation images hold {having[0]:,} NORMAL and {having[1]:,} PNEUMONIA images, but the checks need "
            "both; choose a run whose validation part has both."
        )
    half = n_images // 2
    normal = min(having[0], max(half, n_images - having[1]))
    wanted = normal, min(having[1], n_images - normal)
    parts = [distinct[distinct["label"] == at].sample(n, random_state=seed) for at, n in enumerate(wanted)]
    return pd.concat(parts).sort_index().reset_index(drop=True)


def look(predictor: Predictor, rows: pd.DataFrame, images: npt.NDArray[np.uint8]) -> Sample:
    """Have a model look at images.

    Parameters
    ----------
    predictor : Predictor
        The model.
    rows : DataFrame
        With ``image_id``, ``group`` and ``label``.
    images : ndarray of uint8, shape (n, H, H)
        In the order of the rows.

    Returns
    -------
    Sample
    """
    batches = [predictor.network(images[at : at + evidence.BATCH]) for at in range(0, len(images), evidence.BATCH)]
    return Sample(
        image_ids=rows["image_id"].to_numpy(dtype=str),
        groups=rows["group"].to_numpy(dtype=str),
        labels=rows["label"].to_numpy(dtype=np.int8),
        images=np.asarray(images),
        outputs=Outputs(*(np.concatenate([batch[at] for batch in batches]) for at in range(len(Outputs._fields)))),
        threshold=predictor.description.point[1],
    )


def _findings(
    sample: Sample, predictor: Predictor, model: models.Model, *, seed: int, precision: str, voice: Narration
) -> dict[str, Finding]:
    grid = predictor.description.grid

    def score(images: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        return predictor.network(images).score

    found = {"invariant": evidence_checks.invariant(sample, precision=precision)}
    with voice.stage(f"Shuffling weights, {SHUFFLES} times"):
        found["randomisation"] = evidence_checks.randomisation(sample, model, seed=seed)
    with voice.stage("Hiding and showing images in the order of their evidence"), voice.bar("images") as progress:
        found["perturbation"] = evidence_checks.perturbation(sample, score, grid=grid, seed=seed, progress=progress)
    found["shares"] = evidence_checks.shares(sample, grid=grid, seed=seed)
    with voice.stage("Pasting a letter into each corner"):
        found["markers"] = evidence_checks.markers(sample, score)
    return found


def _content(sample: Sample, known: Description, found: Mapping[str, Finding], *, seed: int) -> dict[str, Any]:
    n, sick = len(sample.labels), int(sample.labels.sum())
    return {
        "research_use": RESEARCH_USE,
        "note": known.note,
        "model": known.model,
        "title": known.title,
        "split": "validation",
        "n": n,
        "n_positive": sick,
        "n_negative": n - sick,
        "n_groups": len(np.unique(sample.groups)),
        "n_called_pneumonia": int(sample.called.sum()),
        "operating_point": dict(zip(("name", "threshold"), known.point, strict=True)),
        "seed": seed,
        "size_px": known.size_px,
        "cells": list(sample.outputs.evidence.shape[1:]),
        "verdicts": [*(str(each.figures["sentence"]) for each in found.values()), f"{RESEARCH_USE}."],
        **{name: dict(each.figures) for name, each in found.items()},
    }


def _drawn(sample: Sample, known: Description, found: Mapping[str, Finding]) -> dict[str, Figure]:
    order = np.argsort(sample.outputs.score, kind="stable")
    of_labels = [order[sample.labels[order] == label] for label in (0, 1)]
    picked = [each[np.unique(np.linspace(0, len(each) - 1, GALLERY).round().astype(int))] for each in of_labels]
    shown = np.concatenate(picked)
    captions = [
        f"{LABELS[sample.labels[at]]}, score {sample.outputs.score[at]:.3f}, called {LABELS[int(sample.called[at])]}"
        for at in shown
    ]
    overlays = [
        evidence.overlay(sample.images[at], sample.outputs.evidence[at], grid=known.grid, scale=known.evidence_scale)
        for at in shown
    ]
    what = f"{known.model} on {len(sample.labels):,} validation images"
    draw, note = evidence_figures, known.note
    return {
        "deletion_insertion.png": draw.perturbation(
            found["perturbation"].figures["parts"], note=note,
            title=f"Does the order of the map matter to the score? {what}",
        ),
        "evidence_shares.png": draw.shares(
            found["shares"].figures["parts"], title=f"Evidence at the edges and outside the body: {what}", note=note
        ),
        "randomisation.png": draw.randomisation(
            found["randomisation"].figures, title=f"Do the maps follow the weights? {what}", note=note
        ),
        "evidence_gallery.png": draw.gallery(
            [sample.images[at] for at in shown], overlays, captions=captions, scale=known.evidence_scale,
            title=f"Evidence maps of {known.model}, from the lowest score to the highest of each label", note=note,
        ),
    }  # fmt: skip
