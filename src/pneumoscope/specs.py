"""The Spec: the frozen, validated description of a run. Presets, TOML in, TOML out, ``KEY=VALUE`` overrides.

Owns every configuration key, its meaning, its default and its limits. Reads no data and builds no network.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from pneumoscope import _files
from pneumoscope.errors import SpecError
from pneumoscope.surroundings import ClusterSpec, Part, TrackingSpec

APPROACHES: tuple[str, ...] = ("cnn", "tl", "ft", "best")
"""The ways to a model: from scratch, transfer learning, fine-tuning, and the best recipe we know."""

PRETRAINED: tuple[str, ...] = ("tl", "ft", "best")
"""Those that stand on a backbone."""

TITLES: Mapping[str, str] = MappingProxyType(
    {"cnn": "CNN from scratch", "tl": "Transfer learning", "ft": "Fine-tuning", "best": "Deep fine-tuning"}
)
"""The approaches' names for people."""

ALLOWABLE: tuple[str, ...] = ("content-across-validation", "group-across-validation", "two-labels")
"""Errors that ``audit.allow`` may name. What reaches into test is never allowed, nor is a set that lacks a class."""

RESEARCH_USE = "Research use only, not a medical device"
"""Stands on every output."""

LABELS: tuple[str, str] = ("NORMAL", "PNEUMONIA")
"""Label names; the index is the class: 0 and 1."""

INDIFFERENT: tuple[str, ...] = ("cluster", "tracking")
"""Tables that no figure depends on: a run may go on with other values."""

_OPEN: tuple[str, ...] = ("data.classes", "cluster.extra")
"""Tables whose keys are the user's own."""

Fraction = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1)]


class DataSpec(Part):
    """Where labels come from.

    Attributes
    ----------
    classes : dict of str to str
        Folder name -> ``NORMAL`` or ``PNEUMONIA``, for folders that are not named so.
    """

    classes: dict[str, Literal["NORMAL", "PNEUMONIA"]] = Field(default_factory=dict)


class SplitSpec(Part):
    """How training images are divided.

    Attributes
    ----------
    by : {"group", "image"}
        ``group`` never cuts a patient; ``image`` is the tutorial's split.
    validation : float
        Share of the training images, between 0 and 1.
    calibration : float
        Share of the validation images kept apart, by group: early stopping never sees them, and thresholds,
        temperature and conformal quantile come from them. 0 takes those from the validation images, which flatters.
    test : float
        Share held out for test where the data come without a test split, between 0 and 1.
    test_seed : int
        Of that share, so that the test images stay the same whatever the seed of the run.
    folds : int
        Where 2 or more, the training groups are divided in so many parts and one of them is held out (with
        ``validation`` ignored); 0 for a single division.
    fold : int
        Which part is held out, from 1 to `folds`.
    """

    by: Literal["group", "image"] = "group"
    validation: Fraction = 0.2
    calibration: float = Field(default=0.0, ge=0, lt=1)
    test: Fraction = 0.15
    test_seed: int = Field(default=42, ge=0, lt=2**31)
    folds: int = Field(default=0, ge=0, le=20)
    fold: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _fold_within(self) -> Self:
        if self.fold > 1 and not self.folds:
            raise ValueError(f"fold {self.fold} is named, but split.folds is 0, so that there is only one division")
        if self.folds == 1:
            raise ValueError("1 fold divides nothing; 2 or more are needed, or 0 for a single division")
        if self.folds and self.fold > self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds} does not exist")
        return self


class ImageSpec(Part):
    """What the networks see.

    Attributes
    ----------
    size_px : int
        Side of the square that images are squashed to, 32 to 1024.
    jpeg_quality : int
        Compress the square as a JPEG of this quality, in training and in use, up to 95; 0 for no compression.
    """

    size_px: int = Field(default=224, ge=32, le=1024)
    jpeg_quality: int = Field(default=0, ge=0, le=95)


class AugmentSpec(Part):
    """Random changes of training images, drawn anew for every image and epoch.

    Attributes
    ----------
    zoom : float
        Largest relative change of scale, the same in both directions: 0.1 is 90 % to 110 %.
    translation : float
        Largest shift as a share of the side, in each direction.
    rotation : float
        Largest turn in either direction, degrees.
    stretch : float
        Largest relative change of width over height: 0.15 is 1 / 1.15 to 1.15.
    gamma : float
        Largest relative change of the exponent that grey values are raised to: 0.4 is 1 / 1.4 to 1.4.
    contrast : float
        Largest relative change of the contrast about the image's mean: 0.3 is 1 / 1.3 to 1.3.
    brightness : float
        Largest shift of all grey values, as a share of white.
    blur : float
        Largest standard deviation of a Gaussian blur, as a share of the side; half of the images are not blurred.
    noise : float
        Largest standard deviation of noise, as a share of white; half of the images get none.
    """

    zoom: float = Field(default=0.0, ge=0, le=0.5)
    translation: float = Field(default=0.0, ge=0, le=0.5)
    rotation: float = Field(default=0.0, ge=0, le=180)
    stretch: float = Field(default=0.0, ge=0, le=1)
    gamma: float = Field(default=0.0, ge=0, le=2)
    contrast: float = Field(default=0.0, ge=0, le=2)
    brightness: float = Field(default=0.0, ge=0, le=0.5)
    blur: float = Field(default=0.0, ge=0, le=0.05)
    noise: float = Field(default=0.0, ge=0, le=0.5)

    @property
    def active(self) -> bool:
        """Whether any change is made at all."""
        return any(self.model_dump().values())

    @property
    def of_values(self) -> bool:
        """Whether grey values are changed, and not only places."""
        return any((self.gamma, self.contrast, self.brightness, self.blur, self.noise))


class BackboneSpec(Part):
    """The pretrained network behind ``tl`` and ``ft``.

    Attributes
    ----------
    name : str
        A name that `pneumoscope.backbones.BACKBONES` knows.
    weights : str
        ``imagenet``, a path to a weights file, or ``none`` for random weights.
    scaling : {"native", "unit"}
        ``native``: pixel values as the backbone was trained on; ``unit``: plain [0, 1].
    """

    name: str = "efficientnet_lite0"
    weights: str = "imagenet"
    scaling: Literal["native", "unit"] = "native"


class TrainSpec(Part):
    """The schedule, shared by all approaches.

    Attributes
    ----------
    epochs : int
        Most epochs, 1 or more.
    batch_size : int
        Images in a step.
    threads : int
        CPU threads of the backend; 0 takes all cores. Another number can change results in the last digits.
    devices : int
        Accelerators that train one model together, each on a part of every batch; more than 1 needs the JAX backend.
    precision : {"float32", "bfloat16"}
        Of the arithmetic in convolutions and dense layers; weights are float32 in either case.
    class_weights : bool
        Weigh each label by n / (2 n_label) in the loss.
    patience : int
        EarlyStopping: epochs without a better validation loss before training ends; the best weights are restored.
    min_delta : float
        EarlyStopping: a smaller gain does not count.
    plateau_factor : float
        The learning rate is multiplied by this ...
    plateau_patience : int
        ... after so many epochs without a better validation loss ...
    plateau_min_delta : float
        ... where a smaller gain does not count.
    schedule : {"plateau", "cosine"}
        ``plateau``: early stopping and the falling rate above. ``cosine``: the rate rises over the first epoch and then
        falls to 0 along half a cosine; nothing stops early and the last epoch's weights are kept, so that no choice
        among epochs hangs on the validation images.
    weight_decay : float
        AdamW's, applied to kernels; 0 is Adam.
    label_smoothing : float
        The loss aims at this / 2 and 1 - this / 2 instead of 0 and 1.
    weight_average : float
        Momentum of a running mean of the weights, which is what is validated and kept; 0 for none.
    teachers : int
        Train so many networks first, 0 to 9, each from its own seed and on its own augmented views; the model then
        learns half from the labels and half from the mean of their scores (distillation).
    half_kernels : bool
        Round the trained kernels to half precision in the end, so that a bundle of half the size scores just as the run
        does.
    """

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=32, ge=1)
    threads: int = Field(default=0, ge=0)
    devices: int = Field(default=1, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    class_weights: bool = False
    patience: int = Field(default=5, ge=1)
    min_delta: float = Field(default=1e-7, ge=0)
    plateau_factor: Fraction = 0.2
    plateau_patience: int = Field(default=2, ge=1)
    plateau_min_delta: float = Field(default=1e-7, ge=0)
    schedule: Literal["plateau", "cosine"] = "plateau"
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    weight_average: float = Field(default=0.0, ge=0, lt=1)
    teachers: int = Field(default=0, ge=0, le=9)
    half_kernels: bool = False


class FeaturesSpec(Part):
    """What is kept of the frozen part of a network.

    Attributes
    ----------
    cache : bool
        Compute the frozen part once per image and train on the stored outputs; ``false`` runs the whole network in
        every step.
    views : int
        Augmented copies of each training image beside the clean one, one of them drawn in each epoch.
    dtype : {"float16", "float32"}
        Precision on disk.
    """

    cache: bool = True
    views: int = Field(default=0, ge=0, le=64)
    dtype: Literal["float16", "float32"] = "float16"


class AuditSpec(Part):
    """Findings that shall not stop a run.

    Attributes
    ----------
    allow : tuple of {"content-across-validation", "group-across-validation", "two-labels"}
        Names of findings.
    """

    allow: tuple[str, ...] = ()

    @field_validator("allow")
    @classmethod
    def _allowable(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if set(names) - set(ALLOWABLE):
            raise ValueError(
                f"only {', '.join(ALLOWABLE)} can be allowed: what reaches into test never is, and other findings "
                "stop no run"
            )
        return names


class EvaluationSpec(Part):
    """How finished models are measured.

    Attributes
    ----------
    bootstrap : int
        Resamples of whole groups behind the intervals that have no formula; 0 leaves those out.
    cost_ratio : float
        How many false positives one false negative is worth, for the operating point ``cost``.
    coverage : float
        Share of conformal prediction sets that shall hold the true label, between 0 and 1.
    """

    bootstrap: int = Field(default=1000, ge=0, le=100_000)
    cost_ratio: float = Field(default=5.0, gt=0)
    coverage: Fraction = 0.9


class CnnSpec(Part):
    """The network from scratch.

    Attributes
    ----------
    layers : {"tutorial", "tiny"}
        ``tutorial``: the three published blocks; ``tiny``: for tests.
    learning_rate : float
        Adam's.
    momentum : float
        Of the running means in BatchNormalization, between 0 and 1.
    """

    layers: Literal["tutorial", "tiny"] = "tutorial"
    learning_rate: Rate = 3e-5
    momentum: Fraction = 0.99


class TlSpec(Part):
    """Transfer learning: a frozen backbone and a new head.

    Attributes
    ----------
    learning_rate : float
        Adam's.
    """

    learning_rate: Rate = 5e-5


class FtSpec(Part):
    """Fine-tuning: as transfer learning, and the backbone's last layers train too.

    Attributes
    ----------
    learning_rate : float
        Adam's.
    trainable_layers : int
        How many of the backbone's layers train, counted from its end as ``pneumoscope models`` lists them.
    """

    learning_rate: Rate = 2e-6
    trainable_layers: int = Field(default=13, ge=1)


class BestSpec(Part):
    """Deep fine-tuning: as `FtSpec`, most of the backbone trains.

    Attributes
    ----------
    learning_rate : float
        Adam's.
    trainable_layers : int
        How many of the backbone's layers train, counted from its end as ``pneumoscope models`` lists them.
    """

    learning_rate: Rate = 1e-3
    trainable_layers: int = Field(default=82, ge=1)


class Spec(Part):
    """The whole description of a run.

    Attributes
    ----------
    preset : str
        The preset it began as.
    seed : int
        Of the split, the initial weights, the order of images, augmentation and dropout.
    models : tuple of {"cnn", "tl", "ft", "best"}
        The approaches to train, in this order, each once.
    data, split, image, augment, backbone, train, features, audit, evaluation, cnn, tl, ft, best, cluster, tracking
        The parts; see their classes.
    """

    preset: str = "default"
    seed: int = Field(default=42, ge=0, lt=2**31)
    models: tuple[Literal["cnn", "tl", "ft", "best"], ...] = Field(default=("cnn", "tl", "ft"), min_length=1)
    data: DataSpec = DataSpec()
    split: SplitSpec = SplitSpec()
    image: ImageSpec = ImageSpec()
    augment: AugmentSpec = AugmentSpec()
    backbone: BackboneSpec = BackboneSpec()
    train: TrainSpec = TrainSpec()
    features: FeaturesSpec = FeaturesSpec()
    audit: AuditSpec = AuditSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    cnn: CnnSpec = CnnSpec()
    tl: TlSpec = TlSpec()
    ft: FtSpec = FtSpec()
    best: BestSpec = BestSpec()
    cluster: ClusterSpec = ClusterSpec()
    tracking: TrackingSpec = TrackingSpec()

    @field_validator("models")
    @classmethod
    def _each_once(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(models)) < len(models):
            raise ValueError("each approach can be named once")
        return models

    @classmethod
    def preset_named(cls, name: str = "default") -> Self:
        """Return a preset.

        Parameters
        ----------
        name : {"default", "best", "tutorial", "smoke", "demo"}

        Raises
        ------
        SpecError
            For an unknown name.
        """
        if name not in PRESETS:
            raise SpecError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
        return cls._validated({"preset": name, **PRESETS[name]}, source=f"preset {name}")

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Read a Spec; keys that the file leaves out come from the preset it names (else ``default``).

        Raises
        ------
        SpecError
            Where the file is missing, is not TOML, or holds an unknown key or a bad value.
        """
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise SpecError(f"There is no configuration file {path}; check the path.") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise SpecError(f"{path} is not a TOML file ({error}); mend it or leave --config away.") from error
        base = cls.preset_named(str(content.get("preset", "default")))
        return base._merged(_flatten(content), source=str(path))

    def with_overrides(self, assignments: Iterable[str], *, source: str = "--set") -> Self:
        """Return a Spec with ``KEY=VALUE`` assignments applied, as ``--set`` takes them.

        Parameters
        ----------
        assignments : iterable of str
            For example ``"train.epochs=3"``; values are TOML, and words without quotes are taken as text.
        source : str
            Where they come from, for the message.

        Returns
        -------
        Spec

        Raises
        ------
        SpecError
            For an assignment without ``=``, an unknown key (the valid ones are listed) or a bad value.
        """
        changes: dict[str, Any] = {}
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise SpecError(f"--set {assignment!r} has no '='; write it as KEY=VALUE, for example train.epochs=3.")
            if key.strip() == "preset":
                raise SpecError(f"--set cannot change the preset; write --preset {text.strip()} instead.")
            changes[key.strip()] = _parse_value(text.strip())
        return self._merged(changes, source=source)

    def to_toml(self) -> str:
        """Return the Spec as TOML text that `from_toml` reads back to an equal Spec."""
        return tomli_w.dumps(self.model_dump(mode="json"))

    @property
    def hash(self) -> str:
        """SHA-256 of everything in the Spec that a figure can depend on, 64 hexadecimal digits."""
        return _files.hash_of(self.model_dump(mode="json", exclude=set(INDIFFERENT)))

    def _merged(self, changes: Mapping[str, Any], *, source: str) -> Self:
        content = self.model_dump(mode="json")
        for key, value in changes.items():
            _assign(content, key, value, source=source)
        return type(self)._validated(content, source=source)

    @classmethod
    def _validated(cls, content: Mapping[str, Any], *, source: str) -> Self:
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            found = key if isinstance(first["input"], dict) else f"{key} = {first['input']!r}"  # not a whole table
            raise SpecError(
                f"{source}: {found} is not valid: {message[:1].lower()}{message[1:]}; change it."
            ) from error


def valid_keys() -> list[str]:
    """Return every key that ``--set`` takes, sorted, for example ``"train.epochs"``."""
    keys = _flatten(Spec().model_dump(mode="json"))
    fixed = sorted(key for key in keys if key != "preset" and key not in _OPEN)
    return [*fixed, "data.classes.FOLDER", "cluster.extra.NAME"]


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        full = f"{prefix}{key}"
        if isinstance(value, Mapping) and full not in _OPEN:
            flat |= _flatten(value, f"{full}.")
        else:
            flat[full] = value
    return flat


def _assign(content: dict[str, Any], key: str, value: Any, *, source: str) -> None:
    for table in _OPEN:
        if key.startswith(f"{table}."):
            part, name = table.split(".")
            content[part][name] = content[part][name] | {key.removeprefix(f"{table}."): value}
            return
    *parents, last = key.split(".")
    target: Any = content
    for parent in parents:
        target = target.get(parent) if isinstance(target, dict) else None
    if not isinstance(target, dict) or last not in target or (isinstance(target[last], dict) and key not in _OPEN):
        keys = valid_keys()
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SpecError(f"{source}: there is no key {key!r}; {hint}Valid keys: {', '.join(keys)}.")
    if isinstance(target[last], list) and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    target[last] = value


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


_SMOKE: dict[str, Any] = {
    "image": {"size_px": 64},
    "evaluation": {"bootstrap": 100},
    "train": {"epochs": 1, "batch_size": 16, "threads": 0},
    "cnn": {"layers": "tiny", "learning_rate": 1e-3, "momentum": 0.9},
    "tl": {"learning_rate": 1e-3},
    "ft": {"learning_rate": 1e-4, "trainable_layers": 4},
}

_DEFAULT: dict[str, Any] = {
    "split": {"calibration": 0.5},
    "augment": {"zoom": 0.1, "translation": 0.1},
    "cnn": {"learning_rate": 3e-4, "momentum": 0.9},
    "tl": {"learning_rate": 5e-4},
    "ft": {"learning_rate": 1e-4, "trainable_layers": 11},
}

PRESETS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "default": _DEFAULT,
        "best": {
            "models": ["best"],
            "image": {"jpeg_quality": 75},
            "split": {"calibration": 0.5},
            "augment": {"zoom": 0.15, "translation": 0.08, "rotation": 10, "stretch": 0.2}
            | {"gamma": 0.5, "contrast": 0.4, "brightness": 0.1, "blur": 0.009, "noise": 0.08},
            "train": {"epochs": 6, "schedule": "cosine", "weight_decay": 0.01, "half_kernels": True},
            "features": {"views": 8},
        },
        "tutorial": {
            "split": {"by": "image", "validation": 0.2},
            "augment": {"zoom": 0.1, "translation": 0.1},
            "backbone": {"name": "resnet152v2", "scaling": "unit"},
            "train": {"epochs": 50},
            "features": {"cache": False},
            "audit": {"allow": ["group-across-validation"]},
        },
        "smoke": _SMOKE,
        "demo": _DEFAULT | {"image": {"size_px": 128}, "train": {"epochs": 20, "batch_size": 16}},
    }
)
"""What each preset changes against the classes' defaults."""
