from __future__ import annotations

import re
import shutil
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pneumoscope import phantom
from pneumoscope.errors import DataError, UsageError

CLASSES = ("NORMAL", "PNEUMONIA")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom.write_dataset(tmp_path_factory.mktemp("phantom") / "set", n_train=300, n_test=150, size_px=128)


def files_of(dataset: Path, split: str) -> list[tuple[Path, int]]:
    return [(path, label) for label, name in enumerate(CLASSES) for path in sorted((dataset / split / name).iterdir())]


def separation(labels: list[int], values: list[float]) -> float:
    area = float(roc_auc_score(labels, values))
    return max(area, 1 - area)


def thumbnails(dataset: Path, split: str) -> tuple[npt.NDArray[np.float64], list[int]]:
    rows = [
        np.asarray(Image.open(path).resize((16, 16), Image.Resampling.BOX), dtype=np.float64).ravel()
        for path, _ in files_of(dataset, split)
    ]
    return np.stack(rows), [label for _, label in files_of(dataset, split)]


def test_draws_the_size_asked_for_with_bright_bone_and_dark_air() -> None:
    picture = phantom.draw(0, seed=1, width_px=200, height_px=120)
    assert picture.shape == (120, 200)
    assert picture.dtype == np.uint8
    spine, right_lung = picture[50:80, 97:103].mean(), picture[50:65, 50:70].mean()
    assert spine > right_lung + 30


@pytest.mark.parametrize(("label", "subtype"), [(0, ""), (1, ""), (1, "bacteria"), (1, "virus")])
def test_equal_arguments_give_equal_pixels_and_other_seeds_do_not(label: int, subtype: str) -> None:
    first, again = (phantom.draw(label, subtype=subtype, seed=5) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, phantom.draw(label, subtype=subtype, seed=6))


def attenuation(seed: int, *, subtype: str = "") -> npt.NDArray[np.floating[Any]]:
    """What is drawn before the exposure, which is metered anew for each picture."""
    child, view = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    return phantom._attenuation(child, view, (256, 320), label=int(bool(subtype)), subtype=subtype)


@pytest.mark.parametrize("subtype", ["bacteria", "virus"])
def test_pneumonia_is_the_same_child_with_less_air_in_the_lungs(subtype: str) -> None:
    for seed in range(6):
        added = attenuation(seed, subtype=subtype) - attenuation(seed)
        assert added.max() > 0.03
        assert added.mean() > 0
        assert np.abs(added[:25]).max() < 1e-3  # neck and shoulders
        assert np.abs(added[-20:, 150:170]).max() < 1e-3  # spine below the diaphragm


def test_bacteria_are_more_focal_than_viruses() -> None:
    def touched(seed: int, subtype: str) -> float:
        added = attenuation(seed, subtype=subtype) - attenuation(seed)
        return float((added > 0.25 * added.max()).mean())

    spread = {subtype: np.mean([touched(seed, subtype) for seed in range(12)]) for subtype in ("bacteria", "virus")}
    assert spread["virus"] > 1.2 * spread["bacteria"]


def test_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(UsageError, match=r"The label is 2; pass 0 for NORMAL or 1 for PNEUMONIA\."):
        phantom.draw(2, seed=0)
    with pytest.raises(UsageError, match=r"The subtype is 'virus' for label 0; pass \"bacteria\", \"virus\" or"):
        phantom.draw(0, subtype="virus", seed=0)
    with pytest.raises(UsageError, match="The subtype is 'fungus' for label 1"):
        phantom.draw(1, subtype="fungus", seed=0)
    with pytest.raises(UsageError, match=r"31 x 256 pixels with seed 0 cannot be drawn; pass sizes from 32 to 4,096"):
        phantom.draw(0, seed=0, width_px=31)
    with pytest.raises(UsageError, match="with seed -1 cannot be drawn"):
        phantom.draw(0, seed=-1)


def test_writes_the_kaggle_layout_with_the_counts_asked_for(dataset: Path) -> None:
    counts = {split: [len(list((dataset / split / name).iterdir())) for name in CLASSES] for split in ("train", "test")}
    assert counts == {"train": [86, 214], "test": [43, 107]}
    assert sorted(path.name for path in dataset.iterdir()) == ["SYNTHETIC.txt", "phantom.json", "test", "train"]


def test_names_are_kaggle_names_and_no_child_is_in_two_splits_or_classes(dataset: Path) -> None:
    normal = re.compile(r"((?:NORMAL2-)?IM-\d{4})-0001(?:-000[12])?\.jpeg")
    sick = re.compile(r"person(\d+)_(bacteria|virus)_\d+\.jpeg")
    places = defaultdict(set)
    images: dict[tuple[str, ...], int] = defaultdict(int)
    for split in ("train", "test"):
        for path, label in files_of(dataset, split):
            found = (normal, sick)[label].fullmatch(path.name)
            assert found, path.name
            places[found.groups()].add((split, label))
            images[found.groups()] += 1
    assert all(len(where) == 1 for where in places.values())
    assert set(images.values()) == {1, 2, 3}
    assert {key[1] for key in places if len(key) == 2} == {"bacteria", "virus"}


def test_images_of_one_child_differ_and_no_two_files_are_equal(dataset: Path) -> None:
    contents = [path.read_bytes() for split in ("train", "test") for path, _ in files_of(dataset, split)]
    assert len(set(contents)) == len(contents) == 450


def test_the_classes_cannot_be_told_apart_by_brightness_size_or_bytes(dataset: Path) -> None:
    files = files_of(dataset, "train") + files_of(dataset, "test")
    labels = [label for _, label in files]
    pictures = [np.asarray(Image.open(path)) for path, _ in files]
    assert separation(labels, [float(picture.mean()) for picture in pictures]) < 0.75
    assert separation(labels, [path.stat().st_size for path, _ in files]) < 0.8
    assert separation(labels, [picture.shape[0] for picture in pictures]) < 0.6
    assert separation(labels, [picture.shape[1] for picture in pictures]) < 0.6
    assert len({picture.shape for picture in pictures}) > 50


def test_the_classes_can_be_learned_but_not_trivially(dataset: Path) -> None:
    train, train_labels = thumbnails(dataset, "train")
    test, test_labels = thumbnails(dataset, "test")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000)).fit(train, train_labels)
    area = roc_auc_score(test_labels, model.predict_proba(test)[:, 1])
    assert 0.75 < area < 0.99


def test_equal_arguments_give_equal_files_and_another_seed_does_not(tmp_path: Path) -> None:
    first, again, other = (
        phantom.write_dataset(tmp_path / name, n_train=8, n_test=4, size_px=48, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert (first / "phantom.json").read_bytes() == (again / "phantom.json").read_bytes()
    assert (first / "phantom.json").read_bytes() != (other / "phantom.json").read_bytes()


def test_an_identical_set_is_reused_and_an_empty_folder_filled(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    assert phantom.write_dataset(folder, n_train=4, n_test=4, size_px=32) == folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    phantom.write_dataset(folder, n_train=4, n_test=4, size_px=32)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert sum(path.suffix == ".jpeg" for path in before) == 8


def test_other_content_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="notes holds something else than the synthetic set asked for; choose a folder"):
        phantom.write_dataset(tmp_path / "notes", n_train=4, n_test=4, size_px=32)
    with pytest.raises(DataError, match=r"mine\.txt holds something else than the synthetic set"):
        phantom.write_dataset(tmp_path / "notes" / "mine.txt", n_train=4, n_test=4, size_px=32)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"
    phantom.write_dataset(tmp_path / "set", n_train=4, n_test=4, size_px=32)
    with pytest.raises(DataError, match="something else than the synthetic set asked for"):
        phantom.write_dataset(tmp_path / "set", n_train=4, n_test=4, size_px=32, seed=7)


@pytest.mark.parametrize("change", ["changed", "removed", "added"])
def test_a_set_that_was_tampered_with_is_refused_by_the_files_name(tmp_path: Path, change: str) -> None:
    folder = phantom.write_dataset(tmp_path / "set", n_train=4, n_test=4, size_px=32)
    path = next((folder / "train" / "PNEUMONIA").iterdir())
    if change == "changed":
        path.write_bytes(path.read_bytes() + b"x")
    elif change == "removed":
        path.unlink()
    else:
        path = path.with_name("new.jpeg")
        path.write_bytes(b"x")
    with pytest.raises(DataError, match=f"{re.escape(path.name)} was added, removed or changed since the synthetic"):
        phantom.write_dataset(folder, n_train=4, n_test=4, size_px=32)


def test_refuses_numbers_out_of_range(tmp_path: Path) -> None:
    message = r"A synthetic set of 3 \+ 4 images of 32 px with seed 42 cannot be made; pass at least 4 images"
    with pytest.raises(UsageError, match=message):
        phantom.write_dataset(tmp_path / "set", n_train=3, n_test=4, size_px=32)
    with pytest.raises(UsageError, match="images of 31 px"):
        phantom.write_dataset(tmp_path / "set", size_px=31)
    assert not (tmp_path / "set").exists()


def test_every_image_says_synthetic(dataset: Path) -> None:
    assert (dataset / "SYNTHETIC.txt").read_text(encoding="utf-8").startswith("SYNTHETIC\n")
    for path, _ in files_of(dataset, "test"):
        assert phantom.is_synthetic_image(path.read_bytes())
        with Image.open(path) as image:
            assert image.info["comment"].startswith(b"SYNTHETIC")


def test_recognises_synthetic_data_also_in_parts_and_in_archives(dataset: Path, tmp_path: Path) -> None:
    assert phantom.is_synthetic(dataset)
    assert phantom.is_synthetic(dataset / "train")
    shutil.copytree(dataset / "test" / "NORMAL", tmp_path / "copy" / "healthy")
    assert phantom.is_synthetic(tmp_path / "copy")
    for source in (dataset, dataset / "test"):
        archive = Path(shutil.make_archive(str(tmp_path / source.name), "zip", source))
        assert phantom.is_synthetic(archive)


def test_other_data_is_not_called_synthetic(tmp_path: Path) -> None:
    Image.new("L", (40, 40)).save(tmp_path / "plain.jpeg")
    assert not phantom.is_synthetic(tmp_path)
    assert not phantom.is_synthetic(tmp_path / "missing")
    assert not phantom.is_synthetic(tmp_path / "plain.jpeg")
    with zipfile.ZipFile(tmp_path / "real.zip", "w") as archive:
        archive.write(tmp_path / "plain.jpeg", "plain.jpeg")
    assert not phantom.is_synthetic(tmp_path / "real.zip")


def test_real_data_is_not_called_synthetic(real_data: Path) -> None:
    assert not phantom.is_synthetic(real_data / "chest_xray")
