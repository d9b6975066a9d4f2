"""How images are divided: no group is cut, shares stay close, calibration and folds come from where they may."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pneumoscope.catalog import COLUMNS, Catalog, keras_validation_mask
from pneumoscope.errors import DataError
from pneumoscope.specs import SplitSpec

BY_GROUP = SplitSpec()
BY_IMAGE = SplitSpec(by="image")
HALF = SplitSpec(calibration=0.5)
STRATA = ((0, ""), (1, "bacteria"), (1, "virus"))

NO_CALIBRATION = "The validation groups are too few for a calibration part; thresholds come from the validation images."

Group = tuple[int, str, int]  # label, subtype, images


def made(groups: Mapping[str, Sequence[Group]]) -> Catalog:
    """A Catalog, nowhere on disk, of the groups that each split holds."""
    rows: list[tuple[object, ...]] = []
    for split, members in groups.items():
        for number, (label, subtype, n) in enumerate(members):
            group = f"{split}/{label}{subtype}/{number}"
            rows += [
                (f"{group}/{at}", f"{len(rows) + at:016x}", split, label, group, subtype, 7, 5, 9, "ok")
                for at in range(n)
            ]
    return Catalog(Path("/nowhere"), pd.DataFrame(rows, columns=list(COLUMNS)).astype({"label": "int8"}))


def in_each_stratum(sizes: Iterable[int]) -> list[Group]:
    sizes = list(sizes)
    return [(label, subtype, n) for label, subtype in STRATA for n in sizes]


@pytest.fixture
def many() -> Catalog:
    """200 train groups of 1 to 5 images, every eleventh image unusable, and 8 test groups."""
    groups = [
        (label, subtype, 1 + at % 5)
        for (label, subtype), n in zip(STRATA, (80, 80, 40), strict=True)
        for at in range(n)
    ]
    catalog = made({"train": groups, "test": in_each_stratum([2, 3])})
    catalog.table.loc[catalog.table.index % 11 == 0, "status"] = "truncated"
    return catalog


@pytest.fixture
def own_validation() -> Catalog:
    """Data that bring a validation split: 12 groups beside 60 for training."""
    return made(
        {
            "train": in_each_stratum([1, 2, 3, 4] * 5),
            "validation": in_each_stratum([1, 2, 3, 4]),
            "test": in_each_stratum([2]),
        }
    )


def plant(root: Path, names: Iterable[str]) -> Path:
    """Write one distinct tiny image under each name; they are read by their content, whatever the name says."""
    for name in names:
        shades = np.frombuffer(sha256(name.encode()).digest(), np.uint8).reshape(8, 4)
        Image.fromarray(shades).save(buffer := io.BytesIO(), "PNG")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return root


def splits_of(catalog: Catalog) -> dict[str, str]:
    return dict(zip(catalog.table["path"], catalog.table["split"], strict=True))


def paths_of(catalog: Catalog, *splits: str) -> set[str]:
    return {path for path, split in splits_of(catalog).items() if split in splits}


def mixed(catalog: Catalog) -> Catalog:
    """The same rows in another order."""
    return Catalog(catalog.root, catalog.table.sample(frac=1, random_state=3).reset_index(drop=True))


def assert_no_group_is_cut(catalog: Catalog, *splits: str) -> None:
    """No group stands in two splits, or in two of those named."""
    table = catalog.table
    if splits:
        table = table[table["split"].isin(splits)]
    assert len(table)
    assert (table.groupby("group")["split"].nunique() == 1).all()


def counted(catalog: Catalog, split: str) -> dict[str, int]:
    """Usable images of each label in a split, and in all."""
    return {str(name): int(n) for name, n in catalog.counts().to_dict("index")[split].items()}


def assert_both_labels(catalog: Catalog, *splits: str) -> None:
    for split in splits:
        assert min(counted(catalog, split).values()) > 0


def images_in(catalog: Catalog, split: str) -> dict[tuple[int, str], int]:
    """Usable images of each stratum in a split."""
    rows = catalog.rows(split)
    return {
        (label, subtype): int(((rows["label"] == label) & (rows["subtype"] == subtype)).sum())
        for label, subtype in STRATA
    }


# --- by group --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_a_split_by_group_keeps_groups_whole_and_shares_close(many: Catalog, fraction: float) -> None:
    divided = many.split(SplitSpec(validation=fraction), seed=42)
    assert_no_group_is_cut(divided)
    usable = divided.rows()
    usable = usable[usable["split"] != "test"]
    for _, stratum in usable.groupby(["label", "subtype"]):
        assert abs((stratum["split"] == "validation").sum() - fraction * len(stratum)) <= 2
    assert abs((usable["split"] == "validation").sum() - fraction * len(usable)) <= 1
    assert paths_of(divided, "test") == paths_of(many, "test")


@pytest.mark.parametrize("spec", [BY_GROUP, HALF, SplitSpec(folds=5, fold=2)], ids=["plain", "calibration", "fold"])
def test_a_split_depends_on_the_seed_and_not_on_the_order_of_rows(many: Catalog, spec: SplitSpec) -> None:
    first = splits_of(many.split(spec, seed=42))
    assert splits_of(many.split(spec, seed=42)) == first
    assert splits_of(mixed(many).split(spec, seed=42)) == first
    assert mixed(many).content_hash == many.content_hash
    assert splits_of(many.split(spec, seed=43)) != first


def test_both_classes_are_on_both_sides_wherever_there_are_two_groups() -> None:
    catalog = made({"train": [(0, "", 1)] * 3 + [(1, "virus", 9), (1, "bacteria", 9)], "test": [(0, "", 1)]})
    for fraction in (0.01, 0.5, 0.99):
        divided = catalog.split(SplitSpec(validation=fraction), seed=0)
        divided.require_learnable()
        assert_no_group_is_cut(divided)


def test_class_folders_without_splits_get_a_test_split_by_group_and_say_so(tmp_path: Path) -> None:
    names = [f"NORMAL/IM-{at:04}-000{n}.jpeg" for at in range(1, 21) for n in (1, 2)]
    names += [
        f"PNEUMONIA/person{at}_{kind}_{n}.jpeg" for at in range(1, 11) for kind in ("bacteria", "virus") for n in (1, 2)
    ]
    catalog = Catalog.scan(plant(tmp_path / "set", names))
    assert list(catalog.counts().index) == ["train"]
    for spec in (BY_GROUP, BY_IMAGE):
        divided = catalog.split(spec, seed=42)
        assert list(divided.counts().index) == ["train", "validation", "test"]
        assert divided.notes[-1] == "The data have no test split; 12 images were held out for test, by group."
        held = divided.table[divided.table["split"] == "test"]
        assert not set(held["group"]) & set(divided.table.loc[divided.table["split"] != "test", "group"])
        assert held["label"].value_counts().to_dict() == {0: 6, 1: 6}
    assert_no_group_is_cut(catalog.split(BY_GROUP, seed=42))


def test_a_test_split_that_the_data_lack_is_the_same_whatever_the_seed(tmp_path: Path) -> None:
    names = [f"{label}/IM-{at:04}-{n}.jpeg" for label in ("NORMAL", "PNEUMONIA") for at in range(20) for n in (1, 2)]
    catalog = Catalog.scan(plant(tmp_path / "set", names))
    one, other = (catalog.split(BY_GROUP, seed=seed) for seed in (42, 43))
    assert paths_of(one, "test") == paths_of(other, "test")
    assert paths_of(one, "validation") != paths_of(other, "validation")
    moved = catalog.split(BY_GROUP.model_copy(update={"test_seed": 7}), seed=42)
    assert paths_of(moved, "test") != paths_of(one, "test")


@pytest.mark.parametrize("spec", [BY_GROUP, BY_IMAGE], ids=["group", "image"])
def test_validation_images_that_came_with_the_data_are_kept(own_validation: Catalog, spec: SplitSpec) -> None:
    divided = own_validation.split(spec, seed=1)
    assert splits_of(divided) == splits_of(own_validation)
    assert divided.notes == ("The data bring 30 validation images of their own; they were kept as they are.",)


@pytest.mark.parametrize("spec", [BY_GROUP, BY_IMAGE], ids=["group", "image"])
def test_too_few_images_to_hold_any_out_are_refused(spec: SplitSpec) -> None:
    catalog = made({"train": [(0, "", 1), (1, "", 1)], "test": [(0, "", 1)]})
    with pytest.raises(DataError) as caught:
        catalog.split(spec, seed=0)
    assert str(caught.value) == (
        "The 2 train images, in 2 groups, are too few to hold any out for validation; "
        "add images, or raise split.validation."
    )


def test_the_real_x_rays_are_split_by_group(real_data: Path) -> None:
    catalog = Catalog.scan(real_data / "chest_xray")
    divided = catalog.split(HALF, seed=42)
    assert_no_group_is_cut(divided)
    assert counted(divided, "train") == {"NORMAL": 864, "PNEUMONIA": 2801, "total": 3665}
    assert counted(divided, "validation") == {"NORMAL": 107, "PNEUMONIA": 351, "total": 458}
    assert counted(divided, "calibration") == {"NORMAL": 109, "PNEUMONIA": 349, "total": 458}
    assert counted(divided, "test") == counted(catalog, "test")
    parts = folds_of(catalog, 5, seed=42)
    assert [counted(part, "validation")["NORMAL"] for part in parts] == [216] * 5
    assert [counted(part, "validation")["PNEUMONIA"] for part in parts] == [701, 700, 700, 700, 700]


def test_the_originals_get_every_split_although_they_come_without_any(real_data: Path) -> None:
    divided = Catalog.scan(real_data / "full_resolution").split(BY_GROUP, seed=42)
    assert list(divided.counts().index) == ["train", "validation", "test"]
    assert_no_group_is_cut(divided)


# --- the calibration part --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_calibration_is_half_of_the_validation_groups_and_of_nothing_else(many: Catalog, seed: int) -> None:
    plain, divided = (many.split(spec, seed=seed) for spec in (BY_GROUP, HALF))
    assert_no_group_is_cut(divided)
    for split in ("train", "test"):
        assert paths_of(divided, split) == paths_of(plain, split)
    assert paths_of(divided, "validation", "calibration") == paths_of(plain, "validation")
    held, calibration = images_in(plain, "validation"), images_in(divided, "calibration")
    for stratum, n in held.items():
        assert abs(calibration[stratum] - n / 2) <= 2.5  # half of the largest group
    assert abs(sum(calibration.values()) - sum(held.values()) / 2) <= 2.5
    assert divided.notes == plain.notes


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_the_share_of_the_calibration_part_is_the_one_asked_for(many: Catalog, share: float) -> None:
    divided = many.split(SplitSpec(validation=0.5, calibration=share), seed=1)
    held, calibration = len(divided.rows("validation")), len(divided.rows("calibration"))
    assert abs(calibration - share * (held + calibration)) <= 2.5


def test_without_a_share_there_is_no_calibration_part(many: Catalog) -> None:
    assert set(many.split(BY_GROUP, seed=1).table["split"]) == {"train", "validation", "test"}


def test_the_calibration_part_of_a_split_by_image_is_by_group(many: Catalog) -> None:
    plain = many.split(BY_IMAGE, seed=1)
    divided = many.split(SplitSpec(by="image", calibration=0.5), seed=1)
    for split in ("train", "test"):
        assert paths_of(divided, split) == paths_of(plain, split)
    assert_no_group_is_cut(divided, "validation", "calibration")
    held, calibration = images_in(plain, "validation"), images_in(divided, "calibration")
    for stratum, n in held.items():
        assert abs(calibration[stratum] - n / 2) <= 2.5


def test_calibration_comes_from_the_validation_images_that_the_data_bring(own_validation: Catalog) -> None:
    divided = own_validation.split(HALF, seed=1)
    for split in ("train", "test"):
        assert paths_of(divided, split) == paths_of(own_validation, split)
    assert paths_of(divided, "validation", "calibration") == paths_of(own_validation, "validation")
    assert_no_group_is_cut(divided)
    for n in images_in(divided, "calibration").values():
        assert abs(n - 5) <= 2  # of 10; half of the largest group
    assert divided.notes == ("The data bring 30 validation images of their own; they were kept as they are.",)


def test_calibration_leaves_a_test_split_that_was_held_out_alone() -> None:
    catalog = made({"train": in_each_stratum([1, 2, 3] * 10)})
    plain, divided = (catalog.split(spec, seed=4) for spec in (BY_GROUP, HALF))
    assert paths_of(plain, "test")
    assert paths_of(divided, "test") == paths_of(plain, "test")
    assert paths_of(divided, "calibration") < paths_of(plain, "validation")
    assert_no_group_is_cut(divided)


@pytest.mark.parametrize(("n_normal", "n_pneumonia"), [(1, 9), (9, 1), (0, 9), (9, 0)])
def test_too_few_validation_groups_for_a_calibration_part_are_left_together(n_normal: int, n_pneumonia: int) -> None:
    validation = [(0, "", 2)] * n_normal + [(1, "virus", 2)] * n_pneumonia
    catalog = made({"train": in_each_stratum([2, 2]), "validation": validation, "test": in_each_stratum([1])})
    for seed in range(5):
        divided = catalog.split(HALF, seed=seed)
        assert splits_of(divided) == splits_of(catalog)
        assert divided.notes[-1] == NO_CALIBRATION


def test_two_validation_groups_of_each_label_are_enough_for_a_calibration_part() -> None:
    validation = [(0, "", 1), (0, "", 4), (1, "virus", 1), (1, "bacteria", 6)]
    catalog = made({"train": in_each_stratum([2, 2]), "validation": validation, "test": in_each_stratum([1])})
    for seed in range(5):
        divided = catalog.split(HALF, seed=seed)
        for split in ("validation", "calibration"):
            assert divided.rows(split).groupby("label")["group"].nunique().to_dict() == {0: 1, 1: 1}
        assert NO_CALIBRATION not in divided.notes


def test_groups_without_a_usable_image_make_no_calibration_part() -> None:
    validation = [(0, "", 2), (0, "", 2), (1, "virus", 2), (1, "virus", 2)]
    catalog = made({"train": in_each_stratum([2, 2]), "validation": validation, "test": in_each_stratum([1])})
    catalog.table.loc[catalog.table["group"] == "validation/0/1", "status"] = "truncated"
    divided = catalog.split(SplitSpec(calibration=0.8), seed=1)  # the one NORMAL group left would be taken
    assert splits_of(divided) == splits_of(catalog)
    assert divided.notes[-1] == NO_CALIBRATION


def test_another_seed_takes_other_groups_for_calibration(own_validation: Catalog) -> None:
    parts = {frozenset(paths_of(own_validation.split(HALF, seed=seed), "calibration")) for seed in range(5)}
    assert len(parts) == 5


# --- folds -----------------------------------------------------------------------------------------------------------


def folds_of(catalog: Catalog, folds: int, *, seed: int, calibration: float = 0.0) -> list[Catalog]:
    return [
        catalog.split(SplitSpec(folds=folds, fold=fold, calibration=calibration), seed=seed)
        for fold in range(1, folds + 1)
    ]


def assert_each_is_held_out_once(parts: Sequence[Catalog], expected: Iterable[str]) -> None:
    held = [path for part in parts for path in part.rows("validation")["path"]]
    assert sorted(held) == sorted(expected)


def assert_strata_are_alike(parts: Sequence[Catalog], catalog: Catalog) -> None:
    """In each stratum no two parts differ by more images than its largest group has."""
    usable = catalog.rows()
    usable = usable[usable["split"] != "test"]
    for label, subtype in STRATA:
        stratum = usable[(usable["label"] == label) & (usable["subtype"] == subtype)]
        sizes = [images_in(part, "validation")[label, subtype] for part in parts]
        assert max(sizes) - min(sizes) <= stratum["group"].value_counts().max()


@pytest.mark.parametrize("folds", [2, 5])
def test_every_train_image_is_held_out_once_over_the_folds_and_no_group_is_cut(many: Catalog, folds: int) -> None:
    parts = folds_of(many, folds, seed=42)
    assert_each_is_held_out_once(parts, many.rows("train")["path"])
    assert_strata_are_alike(parts, many)
    for part in parts:
        assert_no_group_is_cut(part)
        assert paths_of(part, "test") == paths_of(many, "test")
        assert paths_of(part, "train", "validation") == paths_of(many, "train")
        part.require_learnable()


def test_another_seed_makes_other_folds_of_the_same_images(many: Catalog) -> None:
    one, two = (folds_of(many, 5, seed=seed) for seed in (1, 2))
    assert_each_is_held_out_once(two, many.rows("train")["path"])
    assert {frozenset(paths_of(part, "validation")) for part in one}.isdisjoint(
        frozenset(paths_of(part, "validation")) for part in two
    )


def test_a_large_group_is_balanced_by_the_small_ones() -> None:
    catalog = made({"train": in_each_stratum([1, 1, 1, 1, 1, 1, 6]), "test": in_each_stratum([1])})
    for part in folds_of(catalog, 2, seed=5):
        assert images_in(part, "validation") == dict.fromkeys(STRATA, 6)


def test_every_fold_holds_both_labels_where_each_has_as_many_groups_as_there_are_folds() -> None:
    # two strata share the five PNEUMONIA groups, and the uneven NORMAL groups pull both of them to the same fold
    train = [(0, "", n) for n in (1, 10, 10, 10, 10)] + [(1, "bacteria", 1)] + [(1, "virus", 1)] * 4
    catalog = made({"train": train, "test": in_each_stratum([1])})
    for part in folds_of(catalog, 5, seed=0):
        assert counted(part, "validation")["NORMAL"] in (1, 10)
        assert counted(part, "validation")["PNEUMONIA"] == 1


def test_folds_hold_out_the_validation_images_that_the_data_bring_too(own_validation: Catalog) -> None:
    parts = folds_of(own_validation, 3, seed=1)
    usable = own_validation.rows()
    assert_each_is_held_out_once(parts, usable.loc[usable["split"] != "test", "path"])
    for part in parts:
        assert_no_group_is_cut(part)


def test_folds_hold_out_the_calibration_images_that_the_data_bring_too(own_validation: Catalog) -> None:
    table = own_validation.table.copy()
    brought = table.index[table["split"] == "validation"]
    table.loc[brought[::2], "split"] = "calibration"
    catalog = replace(own_validation, table=table)
    usable = catalog.rows()
    assert_each_is_held_out_once(folds_of(catalog, 3, seed=1), usable.loc[usable["split"] != "test", "path"])


def test_folds_share_the_test_split_that_is_held_out_before_them() -> None:
    catalog = made({"train": in_each_stratum([1, 2, 3] * 10)})
    parts = folds_of(catalog, 4, seed=3)
    tests = {frozenset(paths_of(part, "test")) for part in parts}
    assert tests == {frozenset(paths_of(catalog.split(BY_GROUP, seed=3), "test"))}
    assert_each_is_held_out_once(parts, set(catalog.table["path"]) - set(*tests))


def test_folds_are_made_by_group_in_a_split_by_image_too(many: Catalog) -> None:
    by_image = many.split(SplitSpec(by="image", folds=5, fold=3), seed=1)
    assert splits_of(by_image) == splits_of(many.split(SplitSpec(folds=5, fold=3), seed=1))


@pytest.mark.parametrize("folds", [4, 5])
def test_too_few_groups_for_the_folds_are_refused(folds: int) -> None:
    train = [(0, "", 4)] * 3 + [(1, "virus", 1)] * 2 + [(1, "bacteria", 1)] * 4
    catalog = made({"train": train, "test": in_each_stratum([1])})
    with pytest.raises(DataError) as caught:
        catalog.split(SplitSpec(folds=folds), seed=0)
    assert str(caught.value) == (
        f"{folds} folds need {folds} groups of each label, found 3 of one; choose fewer with --folds."
    )
    parts = folds_of(catalog, 3, seed=0)
    assert_each_is_held_out_once(parts, catalog.rows("train")["path"])
    assert [counted(part, "validation")["NORMAL"] for part in parts] == [4, 4, 4]


def test_the_calibration_part_of_a_fold_comes_from_what_the_fold_holds_out(many: Catalog) -> None:
    for plain, divided in zip(folds_of(many, 3, seed=7), folds_of(many, 3, seed=7, calibration=0.5), strict=True):
        assert_no_group_is_cut(divided)
        assert paths_of(divided, "train") == paths_of(plain, "train")
        assert paths_of(divided, "validation", "calibration") == paths_of(plain, "validation")
        held, calibration = len(plain.rows("validation")), len(divided.rows("calibration"))
        assert abs(calibration - held / 2) <= 2.5
        assert_both_labels(divided, "validation", "calibration")


# --- any data set ----------------------------------------------------------------------------------------------------

GROUPS = st.tuples(st.sampled_from(STRATA), st.integers(1, 12)).map(lambda drawn: (*drawn[0], drawn[1]))
TRAIN = st.lists(GROUPS, max_size=40).map(lambda drawn: [*in_each_stratum([1, 1]), *drawn])


@settings(derandomize=True, deadline=None, max_examples=25)
@given(train=TRAIN, folds=st.integers(2, 4), seed=st.integers(0, 2**31 - 1))
def test_folds_of_any_data_set_hold_each_image_out_once_and_both_labels(
    train: list[Group], folds: int, seed: int
) -> None:
    normals: list[Group] = [(0, "", 1)] * 2  # as many groups of each label as there can be folds
    catalog = made({"train": [*normals, *train], "test": in_each_stratum([1])})
    parts = folds_of(catalog, folds, seed=seed)
    assert_each_is_held_out_once(parts, catalog.rows("train")["path"])
    assert_strata_are_alike(parts, catalog)
    for part in parts:
        assert_no_group_is_cut(part)
        part.require_learnable()


@settings(derandomize=True, deadline=None, max_examples=25)
@given(train=TRAIN, share=st.floats(0.05, 0.95), seed=st.integers(0, 2**31 - 1), by=st.sampled_from(["group", "image"]))
def test_the_calibration_part_of_any_data_set_is_cut_from_validation_alone(
    train: list[Group], share: float, seed: int, by: str
) -> None:
    catalog = made({"train": train, "test": in_each_stratum([1])})
    plain, divided = (
        catalog.split(SplitSpec.model_validate({"by": by, "validation": 0.4, "calibration": part}), seed=seed)
        for part in (0, share)
    )
    assert_no_group_is_cut(divided, "validation", "calibration")
    assert_no_group_is_cut(divided, "validation", "test")
    assert paths_of(divided, "train") == paths_of(plain, "train")
    assert paths_of(divided, "validation", "calibration") == paths_of(plain, "validation")
    if NO_CALIBRATION in divided.notes:
        assert splits_of(divided) == splits_of(plain)
    else:
        assert_both_labels(divided, "validation", "calibration")


# --- the tutorial's split is Keras's own -----------------------------------------------------------------------------


def keras_files(folder: Path, *, fraction: float, seed: int) -> tuple[set[str], set[str]]:
    """What Keras itself takes for training and for validation, relative to the folder above."""
    import keras  # heavy, and only these tests need it

    pair = keras.utils.image_dataset_from_directory(
        str(folder), validation_split=fraction, seed=seed, subset="both", image_size=(8, 8), batch_size=8, verbose=False
    )
    train, validation = ({str(Path(path).relative_to(folder.parent)) for path in part.file_paths} for part in pair)
    return train, validation


def our_files(catalog: Catalog, *, fraction: float, seed: int) -> tuple[set[str], set[str]]:
    divided = catalog.split(SplitSpec(by="image", validation=fraction), seed=seed)
    return paths_of(divided, "train"), paths_of(divided, "validation")


def test_the_split_by_image_is_keras_own_on_the_real_x_rays(real_data: Path) -> None:
    folder = real_data / "chest_xray"
    ours = our_files(Catalog.scan(folder), fraction=0.2, seed=42)
    assert ours == keras_files(folder / "train", fraction=0.2, seed=42)
    assert tuple(map(len, ours)) == (3665, 916)


@pytest.mark.parametrize("classes", [("NORMAL", "PNEUMONIA"), ("normal", "PNEUMONIA"), ("well", "ill")])
@pytest.mark.parametrize("seed", [0, 42])
def test_the_split_by_image_is_keras_own_on_an_untidy_folder(
    tmp_path: Path, classes: tuple[str, str], seed: int
) -> None:
    normal, pneumonia = classes
    names = [
        f"{normal}/{name}" for name in ("b.jpeg", "B.JPG", "a.PNG", "c.bmp", "10.png", "9.png", "d/e.png", "d-e.png")
    ]
    names += [f"{pneumonia}/{name}" for name in ("x.gif", "y.Png", "Z.jpeg", "sub/a.jpg", "sub-2/a.jpg", "sub.png")]
    root = plant(tmp_path / "set/train", [*names, f"{normal}/cut.jpeg", f"{pneumonia}/film.tif"])
    plant(tmp_path / "set/test", [f"{normal}/t.png"])
    cut = root / normal / "cut.jpeg"
    cut.write_bytes(cut.read_bytes()[:-20])
    (root / normal / "empty.png").write_bytes(b"")
    (root / pneumonia / "gone.png").symlink_to("nowhere.png")
    (root / pneumonia / "notes.txt").write_text("x")
    catalog = Catalog.scan(tmp_path / "set", classes={normal: "NORMAL", pneumonia: "PNEUMONIA"})
    train, validation = our_files(catalog, fraction=0.3, seed=seed)
    assert (train - {f"train/{pneumonia}/film.tif"}, validation) == keras_files(root, fraction=0.3, seed=seed)
    assert len(validation) == 5


def test_a_folded_val_stands_among_the_train_files_as_if_it_lay_there(tmp_path: Path) -> None:
    names = [f"{label}/{at}.png" for label in ("NORMAL", "PNEUMONIA") for at in range(10)]
    plant(tmp_path / "one/train", names)
    for at, name in enumerate(names):
        plant(tmp_path / "two", [f"{'val' if at % 3 == 0 else 'train'}/{name}"])
    for folder in ("one", "two"):
        plant(tmp_path / folder, ["test/NORMAL/t.png"])
    one, two = (our_files(Catalog.scan(tmp_path / folder), fraction=0.2, seed=42) for folder in ("one", "two"))
    assert [{path.split("/", 1)[1] for path in part} for part in two] == [
        {path.split("/", 1)[1] for path in part} for part in one
    ]


def test_keras_takes_1046_of_the_full_5232_files_for_validation() -> None:
    mask = keras_validation_mask(5232, fraction=0.2, seed=42)
    assert (int((~mask).sum()), int(mask.sum())) == (4186, 1046)
    order = list(range(5232))
    np.random.RandomState(42).shuffle(order)
    assert set(np.flatnonzero(mask)) == set(order[-1046:])
    assert not keras_validation_mask(4, fraction=0.2, seed=0).any()
