"""One image's answer: its score, the call at the operating point, whether it can be assessed, and the evidence.

Owns what is known about a model beside its weights (`Description`), and how network outputs become an `Answer`. The
network itself is a function here: Keras's (`inference`) or onnxruntime's (`bundle`) behind one face, so that all of
them answer alike. Loads no Keras, because models are served with it. Knows nothing of files, tables or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from pneumoscope import calibration, images
from pneumoscope.curves import Labels, Scores
from pneumoscope.errors import StoreError, UsageError
from pneumoscope.evidence import Grid
from pneumoscope.familiarity import Familiarity
from pneumoscope.specs import LABELS, RESEARCH_USE

INTENDED_USE: Final = (
    f"{RESEARCH_USE}. For teaching and research on frontal chest radiographs like those it was trained on. It must not "
    "be used to diagnose, to treat, or to put patients in an order of urgency."
)

SMALLEST_PX: Final = 32
"""A picture with a shorter side holds too little to be assessed."""

LEAST_CONTRAST: Final = 8
"""Grey levels between the darkest and the brightest pixel below which a picture shows nothing."""

Floats = npt.NDArray[np.float64]


class Outputs(NamedTuple):
    """What a network says of a batch.

    Attributes
    ----------
    score, logit, bias : ndarray of float32, shape (n,)
        See `explainer.build`.
    evidence : ndarray of float32, shape (n, h, w)
        Signed, above 0 for PNEUMONIA; its sum + bias is the logit.
    features : ndarray of float32, shape (n, d)
        Means of the last feature maps.
    """

    score: npt.NDArray[np.float32]
    logit: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    evidence: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]


Network = Callable[[npt.NDArray[np.uint8]], Outputs]
"""Takes uint8 ``(n, size_px, size_px)``; safe to call from several threads at once."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Sensitivity and specificity at every threshold that matters, on images chosen from: what a moved threshold costs.

    Attributes
    ----------
    split : str
        Which images: ``validation`` or ``calibration``, or what a site brought.
    n_positive, n_negative : int
        Images of each label.
    thresholds : ndarray of float64, shape (k,)
        Falling, in [0, 1].
    sensitivity, specificity : ndarray of float64, shape (k,)
        At ``score > threshold``.
    """

    split: str
    n_positive: int
    n_negative: int
    thresholds: Floats
    sensitivity: Floats
    specificity: Floats

    @classmethod
    def of(cls, split: str, labels: Labels, scores: Scores) -> Self | None:
        """Count above every score; between two of them nothing changes, so that `at` is exact anywhere.

        Parameters
        ----------
        split : str
            Which images.
        labels : ndarray of int8, shape (n,)
            0 NORMAL, 1 PNEUMONIA.
        scores : ndarray of float64, shape (n,)
            In [0, 1].

        Returns
        -------
        Curve or None
            None where a label is missing.
        """
        values, sick = np.asarray(scores, dtype=np.float64), np.asarray(labels) == 1
        n_positive, n_negative = int(sick.sum()), int((~sick).sum())
        if not n_positive or not n_negative:
            return None
        distinct, place = np.unique(values, return_inverse=True)
        thresholds = np.unique(np.append(distinct, 0.0))[::-1]  # at a score itself, that image is no longer called
        counts = [np.bincount(place[one], minlength=len(distinct))[::-1].cumsum() for one in (sick, ~sick)]
        true, false = (np.concatenate([[0], above])[: len(thresholds)] for above in counts)
        return cls(split, n_positive, n_negative, thresholds, true / n_positive, 1 - false / n_negative)

    def at(self, threshold: float) -> tuple[float, float]:
        """Return sensitivity and specificity of ``score > threshold``.

        Parameters
        ----------
        threshold : float
            In [0, 1].

        Returns
        -------
        sensitivity, specificity : float
        """
        reached = np.flatnonzero(self.thresholds <= threshold)
        place = int(reached[0]) if len(reached) else len(self.thresholds) - 1
        return float(self.sensitivity[place]), float(self.specificity[place])


@dataclass(frozen=True)
class Description:
    """Everything about a model but its weights: what a bundle carries beside ``model.onnx``.

    Attributes
    ----------
    model, title : str
        The approach, short and in words.
    size_px : int
        Side of the images that it takes.
    grid : evidence.Grid
        Where the cells of its evidence maps lie.
    evidence_scale : float
        Evidence per cell that is drawn in full colour, the same for every image; above 0.
    points : mapping of str to float
        Thresholds by operating point, the default one first; empty where none could be chosen.
    chosen_on : str
        The split that points and temperature come from.
    curve : Curve or None
        None where a label was missing.
    temperature : float or None
        Turns scores into probabilities; None where none could be fitted.
    familiarity : Familiarity or None
        What training images look like to the model.
    unfamiliar : str
        Why `familiarity` is None; empty where it is there.
    metrics : mapping
        By split: the figures as ``metrics.json`` has them, without subgroups and curves.
    provenance : mapping
        Hashes, versions, licence, attribution, commands.
    note : str
        What must stand on every output, for example that the images were synthetic; empty where nothing must.
    jpeg_quality : int
        How images are compressed, as in `images.load`; 0 where they are not.
    """

    model: str
    title: str
    size_px: int
    grid: Grid
    evidence_scale: float
    points: Mapping[str, float]
    chosen_on: str
    curve: Curve | None
    temperature: float | None
    familiarity: Familiarity | None
    unfamiliar: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    jpeg_quality: int = 0

    @property
    def point(self) -> tuple[str, float]:
        """The default operating point: name and threshold; ``("half", 0.5)`` where none could be chosen."""
        return next(iter(self.points.items()), ("half", 0.5))

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON, as ``bundle.json`` holds it."""
        curve = self.curve
        return {
            "model": self.model,
            "title": self.title,
            "intended_use": INTENDED_USE,
            "note": self.note,
            "labels": list(LABELS),
            "size_px": self.size_px,
            "jpeg_quality": self.jpeg_quality,
            "operating_points": dict(self.points),
            "chosen_on": self.chosen_on,
            "curve": curve
            and {
                "split": curve.split,
                "n_positive": curve.n_positive,
                "n_negative": curve.n_negative,
                "thresholds": curve.thresholds.tolist(),
                "sensitivity": curve.sensitivity.tolist(),
                "specificity": curve.specificity.tolist(),
            },
            "temperature": self.temperature,
            "evidence": {**asdict(self.grid), "scale": self.evidence_scale},
            "assessability": self.familiarity and self.familiarity.as_dict(),
            "not_assessable_because": self.unfamiliar,
            "metrics": dict(self.metrics),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Read what `as_dict` returned.

        Raises
        ------
        StoreError
            Where something is missing or does not fit.
        """
        try:
            curve, usual, seen = content["curve"], content["assessability"], content["evidence"]
            if tuple(content["labels"]) != LABELS:
                raise ValueError(f"its labels are {content['labels']}, expected {list(LABELS)}")
            return cls(
                model=str(content["model"]),
                title=str(content["title"]),
                size_px=int(content["size_px"]),
                grid=Grid(float(seen["first_px"]), float(seen["step_px"])),
                evidence_scale=float(seen["scale"]),
                points={str(name): float(value) for name, value in content["operating_points"].items()},
                chosen_on=str(content["chosen_on"]),
                curve=None if curve is None else _curve_of(curve),
                temperature=None if content["temperature"] is None else float(content["temperature"]),
                familiarity=None if usual is None else Familiarity.from_dict(usual),
                unfamiliar=str(content["not_assessable_because"]),
                metrics=dict(content["metrics"]),
                provenance=dict(content["provenance"]),
                note=str(content["note"]),
                jpeg_quality=int(content.get("jpeg_quality", 0)),  # bundles of earlier versions do not say it
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"The description of the model is damaged ({type(error).__name__}: {error}); export it again."
            ) from error


def _curve_of(content: Mapping[str, Any]) -> Curve:
    thresholds, sensitivity, specificity = (
        np.asarray(content[name], dtype=np.float64) for name in ("thresholds", "sensitivity", "specificity")
    )
    if not len(thresholds) == len(sensitivity) == len(specificity) > 0:
        raise ValueError("its curve has columns of different lengths, or none")
    return Curve(
        str(content["split"]), int(content["n_positive"]), int(content["n_negative"]), thresholds, sensitivity,
        specificity,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Picture:
    """One decoded image as a model takes it.

    Attributes
    ----------
    pixels : ndarray of uint8, shape (size_px, size_px)
        Grey.
    width_px, height_px : int
        Of the file.
    notes : tuple of str
        What a reader of the answer should know about the file.
    empty : str
        Why the picture shows nothing that could be assessed; empty where it does.
    """

    pixels: npt.NDArray[np.uint8]
    width_px: int
    height_px: int
    notes: tuple[str, ...]
    empty: str


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model says of one image.

    Attributes
    ----------
    score : float
        The uncalibrated sigmoid, in [0, 1].
    probability : float or None
        Calibrated; None where no temperature was fitted.
    call : {"NORMAL", "PNEUMONIA"}
        PNEUMONIA where ``score > threshold``.
    operating_point, threshold : str, float
        What the call was made with.
    assessable : bool or None
        Whether the image is like those that the model learned from; None where that is not known.
    reason : str
        Why it is not assessable, or not known to be, and what else a reader should know; may be empty.
    logit, bias : float
        The logit, and the part of it that belongs to no place.
    evidence : ndarray of float32, shape (h, w)
        The rest of the logit, by place.
    """

    score: float
    probability: float | None
    call: str
    operating_point: str
    threshold: float
    assessable: bool | None
    reason: str
    logit: float
    bias: float
    evidence: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Predictor:
    """A model ready to answer.

    Attributes
    ----------
    description : Description
        What it is.
    network : callable
        See `Network`.
    """

    description: Description
    network: Network

    def read(self, data: bytes, *, header: images.Header | None = None) -> Picture:
        """Decode a file as the training images were decoded.

        Parameters
        ----------
        data : bytes
            The whole file: JPEG, PNG or DICOM.
        header : Header, optional
            What `images.read_header` said of it, where that was asked before.

        Returns
        -------
        Picture

        Raises
        ------
        ImageError
            As `images.load`.
        """
        header = header or images.read_header(data)
        known = self.description
        pixels = images.load(data, known.size_px, jpeg_quality=known.jpeg_quality)
        notes = list(header.notes)
        if header.frames > 1:
            notes.append(f"The file holds {header.frames} pictures; only the first was read.")
        empty = ""
        if min(header.width_px, header.height_px) < SMALLEST_PX:
            empty = f"The picture has only {header.width_px} x {header.height_px} pixels."
        elif int(pixels.max()) - int(pixels.min()) < LEAST_CONTRAST:
            empty = "The picture is one grey all over."
        return Picture(pixels, header.width_px, header.height_px, tuple(notes), empty)

    def answer(self, pictures: list[Picture]) -> list[Answer]:
        """Score pictures in one batch.

        Parameters
        ----------
        pictures : list of Picture
            From `read`; may be empty.

        Returns
        -------
        list of Answer
            In their order.

        Raises
        ------
        StoreError
            Where the network gives a score that is no number.
        """
        if not pictures:
            return []
        outputs = self.network(np.stack([picture.pixels for picture in pictures]))
        if not np.isfinite(outputs.score).all():
            raise StoreError("The network gives a score that is no number; it is damaged: export or train it again.")
        known = self.description
        familiar = None if known.familiarity is None else known.familiarity.assess(outputs.features)
        name, threshold = known.point
        result = []
        for at, picture in enumerate(pictures):
            assessable, reason = None if familiar is None else bool(familiar[1][at]), known.unfamiliar
            if familiar is not None:
                limit = 0.0 if known.familiarity is None else known.familiarity.threshold
                reason = "" if assessable else _unlike(float(familiar[0][at]), limit)
            if picture.empty:
                assessable, reason = False, picture.empty
            score = float(outputs.score[at])
            result.append(
                Answer(
                    score=score,
                    probability=self.probability(score),
                    call=LABELS[int(score > threshold)],
                    operating_point=name,
                    threshold=threshold,
                    assessable=assessable,
                    reason=" ".join(filter(None, (reason, *picture.notes))),
                    logit=float(outputs.logit[at]),
                    bias=float(outputs.bias[at]),
                    evidence=outputs.evidence[at],
                )
            )
        return result

    def probability(self, score: float) -> float | None:
        """Return the calibrated probability for a score in [0, 1]; None where no temperature was fitted."""
        if self.description.temperature is None:
            return None
        return float(calibration.apply_temperature(np.array([score]), self.description.temperature)[0])

    def at(self, point: str | float) -> Self:
        """Return the same model with another operating point as its default.

        Parameters
        ----------
        point : str or float
            The name of an operating point, or a threshold in [0, 1].

        Returns
        -------
        Predictor

        Raises
        ------
        UsageError
            Where there is no such point, or the threshold is not in [0, 1].
        """
        known = self.description
        if isinstance(point, str):
            if point not in known.points:
                names = ", ".join(known.points) or "none"
                raise UsageError(f"The model has no operating point {point!r}; it has {names}.")
            name, threshold = point, known.points[point]
        else:
            if not 0 <= point <= 1:
                raise UsageError(f"The threshold is {point}; give a number from 0 to 1.")
            name, threshold = "own", float(point)
        others = {key: value for key, value in known.points.items() if key != name}
        return replace(self, description=replace(known, points={name: threshold, **others}))


def _unlike(distance: float, limit: float) -> str:
    return f"The image is unlike the training images (distance {distance:.1f}; up to {limit:.1f} is usual)."
