"""The gallery of a run: the thumbnails and evidence overlays that its report shows, so that the run alone is enough.

Owns which images are shown, their size and encoding, and ``gallery/gallery.json``. Draws no map in a way of its own:
overlays are those of `evidence.overlay`. Computes no figure and knows nothing of pages. `write` leaves::

    RUN/gallery/gallery.json   what is shown and why; written last
                ID.jpg         a grey thumbnail, named by the image's content
                M-ID.jpg       the same under the evidence of the model M
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from pneumoscope import _files, evidence, explainer, inference
from pneumoscope.catalog import Catalog
from pneumoscope.errors import PneumoscopeError, RunError
from pneumoscope.evidence import Grid
from pneumoscope.metrics import HALF
from pneumoscope.narration import Narration
from pneumoscope.predictor import Network
from pneumoscope.repeats import HELD_OUT
from pneumoscope.runs import Run
from pneumoscope.specs import LABELS, RESEARCH_USE, Spec
from pneumoscope.store import ImageStore

KINDS: Final = ("false_negative", "false_positive", "true_positive", "true_negative")
"""Kinds of cases, in the order in which they stand."""

WORST: Final = 12
"""Most false negatives, and most false positives, of a model."""

TYPICAL: Final = 6
"""Most true positives, and most true negatives, of a model."""

SAMPLES: Final = 6
"""Most images of one label and split that stand for it."""

OF_FINDING: Final = 4
"""Most pictures of one finding of the audit."""

SIDE_PX: Final = 224
"""Side of every picture."""

QUALITY: Final = 85
"""Of the JPEGs: some 8 kB a thumbnail and 13 kB an overlay, so that a gallery of three models has about 2 MB."""

SCALE_IMAGES: Final = 64
"""Held-out images that the strength of full colour is taken from, where the run does not know it yet."""

_KEPT_QUANTILE: Final = 0.995  # of the evidence of a cell, as for `predict`: what gets full colour
_HELD_OUT: Final = tuple(reversed(HELD_OUT))  # calibration first: it never steered a training

Grey = npt.NDArray[np.uint8]


# --- which images ----------------------------------------------------------------------------------------------------


def kinds_of(labels: npt.ArrayLike, scores: npt.ArrayLike, *, threshold: float) -> npt.NDArray[np.str_]:
    """Return what each call is.

    Parameters
    ----------
    labels : array_like of int, shape (n,)
        0 NORMAL, 1 PNEUMONIA.
    scores : array_like of float, shape (n,)
        In [0, 1].
    threshold : float
        An image is called PNEUMONIA where ``score > threshold``.

    Returns
    -------
    ndarray of str, shape (n,)
        Each one of `KINDS`.
    """
    sick, called = np.asarray(labels) == 1, np.asarray(scores) > threshold
    wrong = np.where(sick, "false_negative", "false_positive")
    return np.where(sick == called, np.where(sick, "true_positive", "true_negative"), wrong)


def choose(rows: pd.DataFrame, scores: npt.ArrayLike, *, threshold: float) -> dict[str, list[int]]:
    """Choose the cases of one model that a person should see: the worst errors, and typical hits.

    The worst errors are those farthest on the wrong side of the threshold: false negatives from the lowest score up,
    false positives from the highest down. Typical hits are those whose score is nearest to the median score of their
    kind (all true positives, or all true negatives), the nearest first, one image of a group: neither the easiest nor
    the hardest. Every content is shown once. Equal scores stand in the order of ``image_id``, so that the same scores
    always give the same cases.

    Parameters
    ----------
    rows : DataFrame
        A Catalog's rows of one split, with ``label``, ``group`` and ``image_id``.
    scores : array_like of float, shape (n,)
        In [0, 1], in the order of the rows.
    threshold : float
        Of the call.

    Returns
    -------
    dict of str to list of int
        By kind, in the order of `KINDS`: positions in `rows`, at most `WORST` errors or `TYPICAL` hits.
    """
    values = np.asarray(scores, dtype=np.float64)
    kinds = kinds_of(rows["label"], values, threshold=threshold)
    table = pd.DataFrame({"image_id": rows["image_id"].to_numpy(), "group": rows["group"].to_numpy(), "at": values})
    chosen: dict[str, list[int]] = {}
    for kind in KINDS:
        part = table[kinds == kind]
        if kind.startswith("true"):
            distance, most, once = (part["at"] - part["at"].median()).abs(), TYPICAL, ["group", "image_id"]
        else:
            sign = 1 if kind == "false_negative" else -1
            distance, most, once = sign * part["at"], WORST, ["image_id"]
        part = part.assign(distance=distance).sort_values(["distance", "image_id"], kind="stable")
        for column in once:
            part = part.drop_duplicates(column)
        chosen[kind] = [int(position) for position in part.index[:most]]
    return chosen


def samples(rows: pd.DataFrame, *, seed: int) -> dict[str, list[dict[str, str]]]:
    """Pick images that stand for each label, at random, one of a group.

    Parameters
    ----------
    rows : DataFrame
        A Catalog's rows of one split; may be empty.
    seed : int
        0 or more; the same seed picks the same images.

    Returns
    -------
    dict of str to (list of dict)
        By label, at most `SAMPLES` each, sorted by ``path``, with ``path`` and ``picture``.
    """
    found = {}
    for index, label in enumerate(LABELS):
        part = rows[rows["label"] == index].sort_values("path", kind="stable").reset_index(drop=True)
        part = part.sample(frac=1, random_state=seed).drop_duplicates("group").drop_duplicates("image_id")
        found[label] = _pictures(part.head(SAMPLES).sort_values("path", kind="stable"))
    return found


def of_findings(findings: Sequence[Mapping[str, Any]], rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Pick the pictures of what the audit found.

    Parameters
    ----------
    findings : sequence of mapping
        As in ``audit.json``.
    rows : DataFrame
        A Catalog's usable rows.

    Returns
    -------
    list of dict
        For each finding that names usable images, in its order: ``name``, ``sentence`` and ``pictures``, at most
        `OF_FINDING` different ones, each with ``path`` and ``picture``. Copies with the same bytes are one picture.
    """
    known = rows.drop_duplicates("path").set_index("path", drop=False)
    found = []
    for finding in findings:
        named = [path for path in _flat(finding["examples"]) if path in known.index]
        part = known.loc[named].drop_duplicates("image_id").head(OF_FINDING)
        if len(part):
            found.append({"name": finding["name"], "sentence": finding["sentence"], "pictures": _pictures(part)})
    return found


def _flat(examples: Iterable[Any]) -> list[str]:
    """Return the texts of examples, some of which belong together."""
    return [text for example in examples for text in ([example] if isinstance(example, str) else example)]


def _pictures(rows: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {"path": path, "picture": _name(image_id)}
        for path, image_id in zip(rows["path"], rows["image_id"], strict=True)
    ]


def _name(image_id: str, *, model: str = "") -> str:
    return f"{model}-{image_id}.jpg" if model else f"{image_id}.jpg"


# --- pictures --------------------------------------------------------------------------------------------------------


def thumbnail(pixels: Grey) -> bytes:
    """Return an image as a grey JPEG.

    Parameters
    ----------
    pixels : ndarray of uint8, shape (H, H)
        Grey.

    Returns
    -------
    bytes
        Of a JPEG of `SIDE_PX` by `SIDE_PX`.
    """
    return _jpeg(_resized(pixels))


def overlay(pixels: Grey, cells: npt.NDArray[Any], *, grid: Grid, scale: float) -> bytes:
    """Return an image under its evidence as a coloured JPEG.

    Parameters
    ----------
    pixels : ndarray of uint8, shape (H, H)
        Grey.
    cells : ndarray, shape (h, h)
        Its evidence.
    grid : Grid
        Where the cells lie in the image.
    scale : float
        Evidence per cell in full colour, above 0.

    Returns
    -------
    bytes
        Of a JPEG of `SIDE_PX` by `SIDE_PX`.

    Raises
    ------
    UsageError
        Where `scale` is not above 0.
    """
    times = SIDE_PX / len(pixels)
    moved = Grid((grid.first_px + 0.5) * times - 0.5, grid.step_px * times)  # centres of pixels, not their edges
    return _jpeg(evidence.overlay(_resized(pixels), cells, grid=moved, scale=scale))


def _resized(pixels: Grey) -> Grey:
    picture = Image.fromarray(pixels)
    if picture.size != (SIDE_PX, SIDE_PX):
        picture = picture.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _jpeg(pixels: Grey) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=QUALITY, optimize=True)
    return out.getvalue()


# --- the gallery of a run --------------------------------------------------------------------------------------------


def write(run: Run, catalog: Catalog, store: ImageStore, *, narration: Narration | None = None) -> Path:
    """Make a run's gallery; an earlier one is replaced.

    Parameters
    ----------
    run : Run
        Its models measured: ``metrics.json`` and the tables of scores are there.
    catalog, store : Catalog, ImageStore
        The images that it was measured on.
    narration : Narration, optional
        Who speaks; silent where not given.

    Returns
    -------
    Path
        Of ``gallery.json``.

    Raises
    ------
    RunError
        Where the scores are not those of these images.
    PneumoscopeError
        Where a file of the run cannot be read, an image is not in the store, or the folder cannot be written.
    """
    voice = narration or Narration("silent")
    with voice.stage("Making the gallery"):
        return _Maker(run, catalog, store).write()


class _Maker:
    """Chooses, draws and writes; keeps which pictures the gallery names."""

    def __init__(self, run: Run, catalog: Catalog, store: ImageStore) -> None:
        self.run, self.catalog, self.store = run, catalog, store
        self.spec: Spec = run.read_spec()
        self.files: dict[str, bytes] = {}

    def write(self) -> Path:
        measured = _files.read_json(self.run.metrics_path)
        audited = _files.read_json(self.run.audit_path)["findings"] if self.run.audit_path.exists() else []
        usable = self.catalog.rows()
        split = _shown_split(measured["models"])
        models = {
            name: self._model(name, split, parts[split]) for name, parts in measured["models"].items() if split in parts
        }
        shown = {name: samples(usable[usable["split"] == name], seed=self.spec.seed) for name in ("train", "test")}
        found = of_findings(audited, usable)
        self._draw([part for of_split in shown.values() for parts in of_split.values() for part in parts])
        self._draw([part for finding in found for part in finding["pictures"]])
        content = {
            "research_use": RESEARCH_USE,
            "note": measured.get("note", ""),
            "split": split or None,
            "side_px": SIDE_PX,
            "models": models,
            "samples": shown,
            "findings": found,
            "reason": None if models else "No model of this run was measured on validation or test images.",
        }
        self._put(content)
        return self.run.gallery_path

    def _model(self, name: str, split: str, measured: Mapping[str, Any]) -> dict[str, Any]:
        """Return one model's cases, their pictures drawn."""
        rows, scores = self._scored(name, split)
        point = measured["operating_point"] or {"name": "half", "threshold": HALF}
        kinds = kinds_of(rows["label"], scores, threshold=point["threshold"])
        chosen = choose(rows, scores, threshold=point["threshold"])
        of_cases = rows.iloc[[position for part in chosen.values() for position in part]]
        self._draw(_pictures(of_cases))
        scale, reason = self._draw_evidence(name, of_cases)
        cases = [
            {
                "kind": kind,
                "rank": rank,
                "path": row["path"],
                "image_id": row["image_id"],
                "label": LABELS[row["label"]],
                "subtype": row["subtype"] or None,
                "group": row["group"],
                "score": float(scores[position]),
                "picture": _name(row["image_id"]),
                "evidence": None if reason else _name(row["image_id"], model=name),
            }
            for kind, part in chosen.items()
            for rank, (position, row) in enumerate(((at, rows.iloc[at]) for at in part), start=1)
        ]
        return {
            "operating_point": point["name"],
            "threshold": point["threshold"],
            "counts": {kind: int((kinds == kind).sum()) for kind in KINDS},
            "evidence_scale": scale,
            "evidence_reason": reason,
            "cases": cases,
        }

    def _scored(self, name: str, split: str) -> tuple[pd.DataFrame, npt.NDArray[np.float64]]:
        rows, path = self.catalog.rows(split).reset_index(drop=True), self.run.table_path(name, f"{split}_yscores")
        table = _files.read_csv(path)
        if [row["image_id"] for row in table] != rows["image_id"].tolist():
            raise RunError(
                f"{path} does not hold the scores of this run's {len(rows):,} {split} images in their order; score "
                "them again with pneumoscope evaluate."
            )
        return rows, np.array([float(row["y_scores"]) for row in table], dtype=np.float64)

    def _draw(self, pictures: Iterable[Mapping[str, str]]) -> None:
        names = sorted({one["picture"] for one in pictures} - set(self.files))
        ids = pd.DataFrame({"image_id": [name.removesuffix(".jpg") for name in names]}, dtype=str)
        for name, at in zip(names, self.store.rows_of(ids) if names else [], strict=True):
            self.files[name] = thumbnail(self.store.images[at])

    def _draw_evidence(self, name: str, rows: pd.DataFrame) -> tuple[float | None, str | None]:
        """Draw each case under its evidence; return what gets full colour, or why nothing was drawn."""
        if not len(rows):
            return None, "There are no cases."
        try:
            model = inference.load_model(self.run.model_path(name), approach=name, spec=self.spec)
            network, grid = inference.network_of(model), explainer.grid(model)
        except PneumoscopeError as error:  # a model that has no map has cases all the same
            return None, str(error)
        scale = self._scale(name, network)
        pixels = self.store.images[self.store.rows_of(rows)]
        maps = _maps(network, pixels)
        for image_id, image, cells in zip(rows["image_id"], pixels, maps, strict=True):
            self.files[_name(image_id, model=name)] = overlay(image, cells, grid=grid, scale=scale)
        return scale, None

    def _scale(self, name: str, network: Network) -> float:
        """Return the evidence of a cell in full colour: what `predict` uses where the run knows it, else its like."""
        kept = self.run.reference_path(name)
        if kept.exists():
            content = _files.read_json(kept)
            if content.get("model_sha256") == _files.sha256_of_file(self.run.model_path(name)):
                return float(content["evidence_scale"])
        held = next((part for split in _HELD_OUT if len(part := self.catalog.rows(split))), self.catalog.rows("test"))
        part = held.sample(min(SCALE_IMAGES, len(held)), random_state=self.spec.seed)
        found = _maps(network, self.store.images[self.store.rows_of(part)])
        return float(np.quantile(np.abs(found), _KEPT_QUANTILE)) or 1.0

    def _put(self, content: Mapping[str, Any]) -> None:
        """Write the pictures, then what names them, then clear away those of an earlier gallery."""
        folder = self.run.gallery_path.parent
        for name, data in self.files.items():
            _files.write_bytes(folder / name, data)
        _files.write_json(self.run.gallery_path, content)
        for path in folder.glob("*.jpg"):
            if path.name not in self.files:
                path.unlink(missing_ok=True)


def _maps(network: Network, pixels: Grey) -> npt.NDArray[np.float32]:
    """Return the evidence maps of images, shape (n, h, h)."""
    parts = []
    for at in range(0, len(pixels), evidence.BATCH):
        batch = pixels[at : at + evidence.BATCH]
        whole = np.resize(batch, (evidence.BATCH, *batch.shape[1:]))  # a backend compiles anew for another number
        parts.append(network(whole).evidence[: len(batch)])
    return np.concatenate(parts)


def _shown_split(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the split that cases come from: test where it was scored, else validation; empty where neither was."""
    return next((split for split in ("test", "validation") if any(split in parts for parts in models.values())), "")
