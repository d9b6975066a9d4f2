"""The Spec: presets, TOML, overrides, and what a wrong key or value is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pneumoscope.errors import SpecError
from pneumoscope.specs import PRESETS, Spec, valid_keys

FOLDERS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)

# DESIGN 4.2, read by a person: key -> value
TUTORIAL: dict[str, object] = {
    "seed": 42,
    "models": ("cnn", "tl", "ft"),
    "split.by": "image",
    "split.validation": 0.2,
    "split.calibration": 0.0,
    "split.folds": 0,
    "image.size_px": 224,
    "augment.zoom": 0.1,
    "augment.translation": 0.1,
    "backbone.name": "resnet152v2",
    "backbone.weights": "imagenet",
    "backbone.scaling": "unit",
    "train.epochs": 50,
    "train.batch_size": 32,
    "train.class_weights": False,
    "train.patience": 5,
    "train.min_delta": 1e-7,
    "train.plateau_factor": 0.2,
    "train.plateau_patience": 2,
    "train.plateau_min_delta": 1e-7,
    "features.views": 0,
    "audit.allow": ("group-across-validation",),
    "cnn.layers": "tutorial",
    "cnn.learning_rate": 3e-5,
    "cnn.momentum": 0.99,
    "tl.learning_rate": 5e-5,
    "ft.learning_rate": 2e-6,
    "ft.trainable_layers": 13,
}
DEFAULT: dict[str, object] = {
    "split.by": "group",
    "split.validation": 0.2,
    "split.calibration": 0.5,
    "split.folds": 0,
    "image.size_px": 224,
    "backbone.name": "efficientnet_lite0",
    "backbone.weights": "imagenet",
    "backbone.scaling": "native",
    "train.batch_size": 32,
    "audit.allow": (),
    "evaluation.bootstrap": 1000,
    "evaluation.cost_ratio": 5.0,
    "evaluation.coverage": 0.9,
}
SMOKE: dict[str, object] = {
    "split.by": "group",
    "image.size_px": 64,
    "augment.zoom": 0.0,
    "augment.translation": 0.0,
    "backbone.name": "efficientnet_lite0",
    "train.epochs": 1,
    "train.batch_size": 16,
    "cnn.layers": "tiny",
    "evaluation.bootstrap": 100,
}
DEMO: dict[str, object] = DEFAULT | {"image.size_px": 128, "train.epochs": 20, "train.batch_size": 16}


def value_at(spec: Spec, key: str) -> object:
    value: Any = spec
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("preset", "table"),
    [("tutorial", TUTORIAL), ("default", DEFAULT), ("smoke", SMOKE), ("demo", DEMO)],
    ids=["tutorial", "default", "smoke", "demo"],
)
def test_preset_holds_what_the_design_says(preset: str, table: dict[str, object]) -> None:
    spec = Spec.preset_named(preset)
    assert {key: value_at(spec, key) for key in table} == table


def test_every_preset_is_valid_and_knows_its_name() -> None:
    assert set(PRESETS) == {"default", "best", "tutorial", "smoke", "demo"}
    assert [Spec.preset_named(name).preset for name in PRESETS] == list(PRESETS)


def test_every_key_that_scripts_rely_on_is_there() -> None:
    promised = {
        *("seed", "split.by", "split.validation", "image.size_px", "augment.zoom", "augment.translation"),
        *("backbone.name", "backbone.weights", "train.epochs", "train.batch_size", "train.threads"),
        *("split.calibration", "split.folds", "split.fold", "features.views", "features.dtype", "features.cache"),
        *("audit.allow", "evaluation.bootstrap", "evaluation.cost_ratio", "evaluation.coverage"),
        *("cnn.learning_rate", "tl.learning_rate", "ft.learning_rate", "ft.trainable_layers"),
    }
    assert promised <= set(valid_keys())
    assert "data.classes.FOLDER" in valid_keys()
    assert "preset" not in valid_keys()


def test_a_spec_cannot_be_changed() -> None:
    spec = Spec()
    with pytest.raises(ValidationError, match="frozen"):
        spec.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        spec.train.epochs = 1  # type: ignore[misc]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_survives_toml(preset: str, tmp_path: Path) -> None:
    spec = Spec.preset_named(preset)
    file = tmp_path / "spec.toml"
    file.write_text(spec.to_toml(), encoding="utf-8")
    assert Spec.from_toml(file) == spec
    assert Spec.from_toml(file).hash == spec.hash


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**31 - 1),
    validation=st.floats(0, 1, exclude_min=True, exclude_max=True),
    learning_rate=st.floats(0, 1, exclude_min=True),
    models=st.lists(st.sampled_from(["cnn", "tl", "ft"]), min_size=1, unique=True),
    classes=st.dictionaries(FOLDERS, st.sampled_from(["NORMAL", "PNEUMONIA"]), max_size=4),
    weights=st.text(st.characters(codec="utf-8"), max_size=30),
)
def test_any_spec_survives_toml(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    validation: float,
    learning_rate: float,
    models: list[str],
    classes: dict[str, str],
    weights: str,
) -> None:
    spec = Spec.model_validate(
        {
            "seed": seed,
            "models": models,
            "data": {"classes": classes},
            "split": {"validation": validation},
            "backbone": {"weights": weights},
            "ft": {"learning_rate": learning_rate},
        }
    )
    file = tmp_path_factory.mktemp("toml") / "spec.toml"
    file.write_text(spec.to_toml(), encoding="utf-8")
    assert Spec.from_toml(file) == spec


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('preset = "tutorial"\n[train]\nepochs = 3\n[data.classes]\n"sick.ones" = "PNEUMONIA"\n')
    expected = Spec.preset_named("tutorial").model_dump()
    expected["train"]["epochs"] = 3
    expected["data"]["classes"] = {"sick.ones": "PNEUMONIA"}
    assert Spec.from_toml(file).model_dump() == expected


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("train.epochs=3", "train.epochs", 3),
        (" train.epochs = 3 ", "train.epochs", 3),
        ("cnn.learning_rate=1e-4", "cnn.learning_rate", 1e-4),
        ("backbone.name=resnet50v2", "backbone.name", "resnet50v2"),
        ("backbone.weights=/data/a=b.h5", "backbone.weights", "/data/a=b.h5"),
        ('backbone.weights="none"', "backbone.weights", "none"),
        ("features.cache=false", "features.cache", False),
        ("models=tl,ft", "models", ("tl", "ft")),
        ("models=cnn", "models", ("cnn",)),
        ('models=["ft"]', "models", ("ft",)),
        ("audit.allow=group-across-validation", "audit.allow", ("group-across-validation",)),
        ("audit.allow=[]", "audit.allow", ()),
        ("split.calibration=0.25", "split.calibration", 0.25),
        ("split.folds=20", "split.folds", 20),
        ("evaluation.bootstrap=0", "evaluation.bootstrap", 0),
        ("evaluation.cost_ratio=2", "evaluation.cost_ratio", 2.0),
        ("evaluation.coverage=0.95", "evaluation.coverage", 0.95),
        ("data.classes.sick.ones=PNEUMONIA", "data.classes", {"sick.ones": "PNEUMONIA"}),
    ],
)
def test_override_is_understood(assignment: str, key: str, value: object) -> None:
    spec = Spec.preset_named("tutorial")
    changed = spec.with_overrides([assignment])
    assert value_at(changed, key) == value
    assert changed.preset == "tutorial"
    assert spec == Spec.preset_named("tutorial")


def test_folder_names_add_up() -> None:
    spec = Spec().with_overrides(["data.classes.a=NORMAL", "data.classes.b=PNEUMONIA"])
    assert spec.data.classes == {"a": "NORMAL", "b": "PNEUMONIA"}


def test_the_last_override_wins() -> None:
    assert Spec().with_overrides(["seed=1", "seed=2"]).seed == 2


def test_the_hash_follows_the_content() -> None:
    assert Spec(seed=1).hash == Spec(seed=1).hash
    assert len({Spec(seed=seed).hash for seed in range(3)}) == 3


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epochs", "--set 'train.epochs' has no '='; write it as KEY=VALUE, for example train.epochs=3."),
        ("preset=tutorial", "--set cannot change the preset; write --preset tutorial instead."),
        ("train.epochs=three", "--set: train.epochs = 'three' is not valid: input should be a valid integer"),
        (
            "train.epochs=0",
            "--set: train.epochs = 0 is not valid: input should be greater than or equal to 1; change it.",
        ),
        (
            "train.min_delta=inf",
            "--set: train.min_delta = inf is not valid: input should be a finite number; change it.",
        ),
        ("tl.learning_rate=nan", "--set: tl.learning_rate = nan is not valid: input should be"),
        ("split.validation=1", "--set: split.validation = 1 is not valid: input should be less than 1; change it."),
        (
            "split.by=patient",
            "--set: split.by = 'patient' is not valid: input should be 'group' or 'image'; change it.",
        ),
        ("split.calibration=1", "--set: split.calibration = 1 is not valid: input should be less than 1; change it."),
        ("split.calibration=-0.1", "split.calibration = -0.1 is not valid: input should be greater than or equal to 0"),
        ("split.folds=1", "1 fold divides nothing; 2 or more are needed, or 0 for a single division; change it."),
        (
            "split.folds=21",
            "--set: split.folds = 21 is not valid: input should be less than or equal to 20; change it.",
        ),
        (
            "split.fold=2",
            "split is not valid: fold 2 is named, but split.folds is 0, so that there is only one division; change it.",
        ),
        (
            "audit.allow=two-label",
            "audit.allow = ['two-label'] is not valid: only content-across-validation, group-across-validation, ",
        ),
        ("split.fold=0", "--set: split.fold = 0 is not valid: input should be greater than or equal to 1; change it."),
        (
            "evaluation.bootstrap=-1",
            "evaluation.bootstrap = -1 is not valid: input should be greater than or equal to 0",
        ),
        ("evaluation.bootstrap=100001", "is not valid: input should be less than or equal to 100000; change it."),
        ("evaluation.cost_ratio=0", "evaluation.cost_ratio = 0 is not valid: input should be greater than 0; change"),
        ("evaluation.coverage=0", "evaluation.coverage = 0 is not valid: input should be greater than 0; change it."),
        ("evaluation.coverage=1", "evaluation.coverage = 1 is not valid: input should be less than 1; change it."),
        ("image.size_px=31", "--set: image.size_px = 31 is not valid: input should be greater than or equal to 32"),
        (
            "models=cnn,resnet",
            "--set: models.1 = 'resnet' is not valid: input should be 'cnn', 'tl', 'ft' or 'best'; change it.",
        ),
        ("models=[]", "--set: models = [] is not valid: tuple should have at least 1 item"),
        ("models=cnn,cnn", "each approach can be named once; change it."),
        (
            "data.classes.sick=ILL",
            "--set: data.classes.sick = 'ILL' is not valid: input should be 'NORMAL' or 'PNEUMONIA'",
        ),
    ],
)
def test_a_wrong_override_is_told(assignment: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        Spec().with_overrides([assignment])
    assert message in str(caught.value)


def test_a_fold_beyond_the_last_is_told() -> None:
    folds = Spec().with_overrides(["split.folds=5", "split.fold=5"]).split
    assert (folds.folds, folds.fold) == (5, 5)
    with pytest.raises(SpecError, match=r"^--set: split is not valid: fold 6 of 5 does not exist; change it\.$"):
        Spec().with_overrides(["split.folds=5", "split.fold=6"])


@pytest.mark.parametrize("key", ["train.epoch", "epochs", "train", "train.epochs.x", "", "zzz", "seed.x"])
def test_an_unknown_key_is_told_the_valid_ones(key: str) -> None:
    with pytest.raises(SpecError) as caught:
        Spec().with_overrides([f"{key}=1"])
    message = str(caught.value)
    assert message.startswith(f"--set: there is no key {key!r}; ")
    assert message.endswith(f"Valid keys: {', '.join(valid_keys())}.")


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(SpecError, match=r"no key 'train\.epoch'; did you mean train\.epochs\? Valid keys: "):
        Spec().with_overrides(["train.epoch=1"])


def test_an_unknown_preset_is_told_the_others() -> None:
    with pytest.raises(SpecError) as caught:
        Spec.preset_named("tutorail")
    assert str(caught.value) == ("There is no preset 'tutorail'; choose one of default, best, tutorial, smoke, demo.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"There is no configuration file .*mine\.toml; check the path\."),
        (b"seed = ", r"mine\.toml is not a TOML file \(.*\); mend it or leave --config away\."),
        (b"\xff\xfe", r"mine\.toml is not a TOML file \(.*\); mend it"),
        (b"sead = 1", r"mine\.toml: there is no key 'sead'; did you mean seed\? Valid keys: "),
        (b"train = 3", r"mine\.toml: there is no key 'train'; "),
        (b"[train]\nepochs = 'x'", r"mine\.toml: train\.epochs = 'x' is not valid: "),
        (b"preset = 'x'", r"There is no preset 'x'; choose one of "),
        (b"[data]\nclasses = 3", r"mine\.toml: data\.classes = 3 is not valid: "),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "mine.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SpecError, match=message):
        Spec.from_toml(file)


def test_a_folder_is_no_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is not a TOML file"):
        Spec.from_toml(tmp_path)
