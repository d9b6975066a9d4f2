"""From a run to a Bundle: everything known about one model, its network as ONNX, and the proof that both score alike.

Owns what is taken out of a run for use elsewhere, and the gate: every validation and test image is scored by Keras and
by onnxruntime, and a network that scores otherwise is not written. Knows nothing of serving.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal, get_args

import numpy as np
import pandas as pd

from pneumoscope import _backend, _files, card, explainer, inference, intervals, metrics, models, onnx_graph
from pneumoscope.bundle import Bundle, OnnxNetwork
from pneumoscope.catalog import Catalog
from pneumoscope.errors import DataError, PneumoscopeError, RunError, UsageError
from pneumoscope.familiarity import Familiarity
from pneumoscope.narration import Narration
from pneumoscope.predictions import Predictions
from pneumoscope.predictor import Curve, Description, Network, Outputs, Predictor
from pneumoscope.runs import Run
from pneumoscope.scorecard import Choice
from pneumoscope.specs import INDIFFERENT, TITLES, Spec
from pneumoscope.stages import own_images
from pneumoscope.store import ImageStore

Weights = Literal["float32", "float16", "int8"]

LARGEST_DIFFERENCE: Final = {"float32": 1e-3, "float16": 1e-3, "int8": 0.02}
"""Between a score of Keras and one of onnxruntime, by how weights are kept; a larger one refuses the export."""

LARGEST_AUC_LOSS: Final = 1e-3
"""Of a network in 8-bit integers."""

USUAL_IMAGES: Final = 1000
"""At most so many training images of a label teach what is usual."""

CALIBRATION_IMAGES: Final = 200
"""Training images that the ranges of 8-bit integers are taken from."""

_SCORED: Final = ("validation", "test")
_DETAILS: Final = ("subgroups", "decision_curve", "bootstrap", "undefined", "conformal")  # stay in the run
_KEPT_QUANTILE: Final = 0.995  # of the evidence of a cell: what gets full colour


@dataclass(frozen=True)
class Parity:
    """How one split's scores by onnxruntime compare with Keras's.

    Attributes
    ----------
    n : int
        Images, all of the split.
    difference : float
        The largest between two scores of an image.
    flipped : int
        Images whose call at the operating point is another, however near the threshold.
    auc, auc_before : float or None
        Of onnxruntime's scores and of Keras's; None where a label is missing.
    """

    n: int
    difference: float
    flipped: int
    auc: float | None
    auc_before: float | None


def export(
    run: Run, model: str, folder: Path, *, weights: Weights = "float32", narration: Narration | None = None
) -> Bundle:
    """Write a trained model as a Bundle, once it is shown to score as the run's own.

    Parameters
    ----------
    run : Run
        Finished, its images still where they were.
    model : {"cnn", "tl", "ft", "best"}
        Which approach.
    folder : Path
        Of the bundle: new, or an earlier bundle's.
    weights : {"float32", "float16", "int8"}
        How they are kept; int8 chooses operating points anew. Each has its gate in `LARGEST_DIFFERENCE`.
    narration : Narration, optional
        Who speaks; silent where not given.

    Returns
    -------
    Bundle

    Raises
    ------
    UsageError
        For another model or way to keep weights.
    PneumoscopeError
        Where the images are gone, or the network does not score as Keras does; then nothing is written.
    """
    if weights not in get_args(Weights):
        raise UsageError(f"Weights cannot be kept as {weights!r}; choose one of {', '.join(get_args(Weights))}.")
    voice = narration or Narration("silent")
    opened = _Opened.of(run, model, voice)
    with voice.stage(f"Writing {model} as ONNX ({weights})"):
        proto = onnx_graph.build(opened.keras_model, weights="float16" if weights == "float16" else "float32")
        if weights == "int8":
            train = opened.catalog.rows("train")
            train = train.sample(min(CALIBRATION_IMAGES, len(train)), random_state=opened.spec.seed)
            proto = onnx_graph.quantized(proto, opened.store.images[opened.store.rows_of(train)])
    data = proto.SerializeToString()
    network = OnnxNetwork(data, name="the new network", threads=opened.spec.train.threads)
    described = opened.describe(voice)
    scored: dict[str, tuple[Predictions, Predictions]] = {}
    features: dict[str, Any] = {}
    for split in (*_SCORED, *({described.chosen_on} - set(_SCORED))):
        if len(rows := opened.catalog.rows(split)):
            with voice.stage(f"Scoring {split} with Keras and with onnxruntime"), voice.bar(split) as progress:
                first, second = (
                    run_over(each, opened.store, rows, progress=progress) for each in (opened.network, network)
                )
            scored[split] = (Predictions.of(rows, first.score), Predictions.of(rows, second.score))
            features[split] = second.features
    if weights == "int8":
        chosen = scored[described.chosen_on][1]
        choice = Choice.on(chosen, spec=opened.spec.evaluation)
        described = replace(
            described,
            points=choice.points,
            temperature=choice.temperature.value,
            curve=Curve.of(described.chosen_on, chosen.labels, chosen.scores),
            familiarity=None if described.familiarity is None else opened.usual(network, voice)[0],
            metrics={split: _measured(after, choice) for split, (_, after) in scored.items()},
        )
    parity = {split: compare(*pair, threshold=described.point[1]) for split, pair in scored.items()}
    require_alike(parity, weights=weights)
    for split, found in parity.items():
        voice.say(
            f"  {split}: {found.n:,} images, scores at most {found.difference:.1e} apart, {found.flipped} calls differ."
        )
    further = {
        "weights": weights,
        "parity": {split: vars(found) for split, found in parity.items()},
        "not_assessable": {split: int((~usual.assess(of_split)[1]).sum()) for split, of_split in features.items()}
        if (usual := described.familiarity)
        else {},
        "card": card.facts_of(run, models=(model,), shared=True),
    }
    return Bundle.write(folder, network=data, description=described, further=further)


def also(run: Run, model: str, path: Path, *, narration: Narration | None = None) -> None:
    """Write a trained model in a form of Keras's own beside a bundle: scores only, no evidence, nothing known about it.

    Parameters
    ----------
    run : Run
        Finished, for ``.tflite`` its images still where they were.
    model : {"cnn", "tl", "ft", "best"}
        Which approach.
    path : Path
        Ends in ``.keras``, or in ``.tflite`` for TensorFlow Lite, which passes the same gate as a bundle on validation.
    narration : Narration, optional
        Who speaks; silent where not given.

    Raises
    ------
    UsageError
        For another ending, another model, or TensorFlow Lite on another backend than TensorFlow.
    PneumoscopeError
        Where it cannot be written, or scores otherwise; then nothing is there.
    """
    voice = narration or Narration("silent")
    if path.suffix not in (".keras", ".tflite"):
        raise UsageError(f"{path} ends in {path.suffix!r}; a model can be written as .keras or .tflite.")
    opened = _Opened.of(run, model, voice, images=path.suffix == ".tflite")
    if path.suffix == ".keras":
        _files.write_bytes(path, run.model_path(model).read_bytes())
        return
    rows = opened.catalog.rows("validation")
    pixels = opened.store.images[opened.store.rows_of(rows)]
    with TemporaryDirectory() as folder, voice.stage(f"Writing {model} as TensorFlow Lite"):
        made = Path(folder) / "model.tflite"
        score = _backend.lite(opened.keras_model, made)
        lite = Predictions.of(rows, [score(image) for image in pixels])
        kept = Predictions.of(rows, run_over(opened.network, opened.store, rows).score)
        found = compare(kept, lite, threshold=0.5)
        require_alike({"validation": found}, weights="float32")
        _files.write_bytes(path, made.read_bytes())
    voice.say(f"  validation: {found.n:,} images, scores at most {found.difference:.1e} apart.")


def open_predictor(run: Run, model: str, *, threads: int = 0, narration: Narration | None = None) -> Predictor:
    """Return a run's model, with Keras, ready to answer.

    Parameters
    ----------
    run : Run
        Finished.
    model : {"cnn", "tl", "ft", "best"}
        Which approach.
    threads : int
        CPU threads of the network; 0 takes those of the run's Spec.
    narration : Narration, optional
        Who speaks; silent where not given.

    Returns
    -------
    Predictor

    Raises
    ------
    PneumoscopeError
        Where the run or its model cannot be read.
    """
    voice = narration or Narration("silent")
    opened = _Opened.of(run, model, voice, images=False, threads=threads)
    return Predictor(opened.describe(voice), opened.network)


@dataclass
class _Opened:
    """A run's model and images, loaded; what takes a pass over images is kept in the run for the next time."""

    run: Run
    model: str
    spec: Spec
    keras_model: models.Model
    voice: Narration
    _images: tuple[Catalog, ImageStore] | None = None

    @classmethod
    def of(cls, run: Run, model: str, voice: Narration, *, images: bool = True, threads: int = 0) -> _Opened:
        if run.status != "finished":
            raise RunError(
                f"The run in {run.folder} is {run.status}, not finished; run its command again with --resume first."
            )
        if model not in (trained := run.trained()):
            raise UsageError(f"The run in {run.folder} has no model {model!r}; it has {', '.join(trained) or 'none'}.")
        spec = run.read_spec()
        _backend.prepare(threads=threads or spec.train.threads)
        keras_model = inference.load_model(run.model_path(model), approach=model, spec=spec)
        opened = cls(run, model, spec, keras_model, voice)
        if images:
            opened._load_images()
        return opened

    def _load_images(self) -> tuple[Catalog, ImageStore]:
        if self._images is None:
            self._images = own_images(self.run, self.spec, self.voice)
        return self._images

    @property
    def catalog(self) -> Catalog:
        return self._load_images()[0]

    @property
    def store(self) -> ImageStore:
        return self._load_images()[1]

    @property
    def network(self) -> Network:
        return inference.network_of(self.keras_model)

    def describe(self, voice: Narration) -> Description:
        """Gather all that is known about the model but its weights."""
        content = _files.read_json(self.run.metrics_path)
        measured, chosen_on = content["models"][self.model], str(content["chosen_on"])
        choice = Choice.of_dict(measured["validation"])
        familiarity, reason, scale = self._reference(voice)
        manifest, scored = self.run.read_manifest(), self._written_scores(chosen_on)
        return Description(
            model=self.model,
            title=TITLES[self.model],
            size_px=self.spec.image.size_px,
            grid=explainer.grid(self.keras_model),
            evidence_scale=scale,
            points=choice.points,
            chosen_on=chosen_on,
            curve=Curve.of(chosen_on, scored.labels, scored.scores),
            temperature=choice.temperature.value,
            familiarity=familiarity,
            unfamiliar=reason,
            metrics={
                split: {key: value for key, value in figures.items() if key not in _DETAILS}
                for split, figures in measured.items()
            },
            provenance={
                "pneumoscope": version("pneumoscope"),
                "exported": datetime.now(UTC).isoformat(timespec="seconds"),
                "trained": manifest["finished"],
                "spec_sha256": self.spec.hash,
                "data": Path(manifest["data"]).name,
                "data_sha256": manifest["data_hash"],
                "model_sha256": _files.sha256_of_file(self.run.model_path(self.model)),
                "machine": manifest["machine"],
                "backbone": None if self.model == "cnn" else self.spec.backbone.model_dump(mode="json"),
                "spec": self.spec.model_dump(mode="json", exclude=set(INDIFFERENT)),
            },
            note=str(manifest["note"]),
            jpeg_quality=self.spec.image.jpeg_quality,
        )

    def _written_scores(self, split: str) -> Predictions:
        rows = pd.DataFrame(_files.read_csv(self.run.table_path(self.model, f"{split}_yscores")))
        scores = rows["y_scores"].to_numpy(dtype=np.float64).astype(np.float32)
        table = rows.assign(split=split, label=rows["y_true"].astype(int))
        return Predictions.of(table, scores)

    def _reference(self, voice: Narration) -> tuple[Familiarity | None, str, float]:
        """What is usual for the model: from the run where it was kept, else from its images."""
        path, sha256 = self.run.reference_path(self.model), _files.sha256_of_file(self.run.model_path(self.model))
        if path.exists() and (kept := _files.read_json(path)).get("model_sha256") == sha256:
            usual = kept["assessability"]
            return None if usual is None else Familiarity.from_dict(usual), kept["reason"], kept["evidence_scale"]
        try:
            familiarity, reason, scale = self.usual(self.network, voice)
        except PneumoscopeError as error:  # a model can be used where its training images are not
            return None, f"Whether the image is like the training images is not known: {error}", 1.0
        kept = {"assessability": familiarity and familiarity.as_dict(), "reason": reason, "evidence_scale": scale}
        with contextlib.suppress(PneumoscopeError):  # kept for speed; in a run of others it may not be written
            _files.write_json(path, {"model_sha256": sha256, **kept})
        return familiarity, reason, scale

    def usual(self, network: Network, voice: Narration) -> tuple[Familiarity | None, str, float]:
        """Learn from training images and held-out ones what is usual, and how strong evidence is."""
        parts = [part for split in ("calibration", "validation") if len(part := self.catalog.rows(split))]
        train, held = (_sampled(part, seed=self.spec.seed) for part in (self.catalog.rows("train"), parts[0]))
        with voice.stage("Learning what training images look like to the model"), voice.bar("images") as progress:
            of_train = run_over(network, self.store, train, progress=progress)
            of_held = run_over(network, self.store, held, progress=progress)
        scale = float(np.quantile(np.abs(of_held.evidence), _KEPT_QUANTILE)) or 1.0
        try:
            return Familiarity.fit(of_train.features, held_out=of_held.features), "", scale
        except DataError as error:  # random weights may tell no image from another
            return None, f"Whether the image is like the training images is not known: {error}", scale


def run_over(
    network: Network,
    store: ImageStore,
    rows: pd.DataFrame,
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Outputs:
    """Run a network over packed images.

    Parameters
    ----------
    network : callable
        See `predictor.Network`.
    store : ImageStore
        Holds the images.
    rows : DataFrame
        A Catalog's rows.
    batch_size : int
        Images in a step.
    progress : callable, optional
        Called with (done, total) images.

    Returns
    -------
    Outputs
        In the order of `rows`.

    Raises
    ------
    StoreError
        Where an image is not in the store.
    """
    where = store.rows_of(rows)
    parts = []
    for start in range(0, len(where), batch_size):
        parts.append(network(store.images[where[start : start + batch_size]]))
        if progress is not None:
            progress(min(start + batch_size, len(where)), len(where))
    return Outputs(*(np.concatenate([part[at] for part in parts]) for at in range(len(Outputs._fields))))


def compare(before: Predictions, after: Predictions, *, threshold: float) -> Parity:
    """Compare two networks' scores of the same images.

    Parameters
    ----------
    before, after : Predictions
        In the same order.
    threshold : float
        Of the call.

    Returns
    -------
    Parity
    """
    first, second = before.scores, after.scores
    return Parity(
        n=len(before),
        difference=float(np.abs(first - second).max(initial=0)),
        flipped=int(((first > threshold) != (second > threshold)).sum()),
        auc=_auc(after),
        auc_before=_auc(before),
    )


def require_alike(parity: Mapping[str, Parity], *, weights: Weights) -> None:
    """Refuse a network that scores otherwise than the run's own.

    A call can then only differ where a score lies nearer to the threshold than the difference that is allowed.

    Parameters
    ----------
    parity : mapping of str to Parity
        By split.
    weights : {"float32", "float16", "int8"}
        Decides what is allowed.

    Raises
    ------
    RunError
        Where a score or, for int8, an AUC is too far off.
    """
    allowed = LARGEST_DIFFERENCE[weights]
    next_step = (
        "tell us of it, with the run's spec.toml" if weights == "float32" else "export it with --weights float32"
    )
    for split, found in parity.items():
        if not found.difference <= allowed:
            raise RunError(
                f"The network written with {weights} weights scores {split} images up to {found.difference:.4f} "
                f"otherwise than the run's own (at most {allowed} is allowed; {found.flipped} of {found.n:,} calls "
                f"differ); nothing was written: {next_step}."
            )
        lost = 0.0 if found.auc is None or found.auc_before is None else found.auc_before - found.auc
        if weights == "int8" and lost > LARGEST_AUC_LOSS:
            raise RunError(
                f"In 8-bit integers the AUC on {split} falls by {lost:.4f} to {found.auc:.4f} (at most "
                f"{LARGEST_AUC_LOSS} is allowed); nothing was written: {next_step}."
            )


def _measured(scored: Predictions, choice: Choice) -> dict[str, Any]:
    found = metrics.evaluate(scored, operating_points=choice.points, temperature=choice.temperature.value)
    return {key: value for key, value in found.as_dict().items() if key not in _DETAILS}


def _auc(scored: Predictions) -> float | None:
    found = intervals.delong(scored.labels, scored.scores)
    return None if found is None else found.auc


def _sampled(rows: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    parts = [part.sample(min(USUAL_IMAGES, len(part)), random_state=seed) for _, part in rows.groupby("label")]
    return pd.concat(parts).sort_index().reset_index(drop=True)
