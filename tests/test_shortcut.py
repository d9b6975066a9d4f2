"""Baselines that see no lung: planted shortcuts are found, and nothing else is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from pneumoscope import appearance, shortcut
from pneumoscope.catalog import Catalog
from pneumoscope.errors import DataError, StoreError
from pneumoscope.predictions import Predictions
from pneumoscope.specs import SplitSpec
from pneumoscope.store import ImageStore

Pixels = npt.NDArray[np.uint8]


def noise(seed: int, shape: tuple[int, int]) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def rows_of(labels: npt.NDArray[np.int64], splits: list[str]) -> pd.DataFrame:
    names = [f"{at}.png" for at in range(len(labels))]
    return pd.DataFrame({"path": names, "image_id": names, "split": splits, "label": labels})


def in_memory(pictures: Pixels) -> ImageStore:
    """A store of pictures that were never files; picture n has the id of the n-th row of `rows_of`."""
    ids = np.array([f"{at}.png" for at in range(len(pictures))])
    order = np.argsort(ids)
    return ImageStore(Path("nowhere"), pictures[order], ids[order], {}, "key")


def measured(rows: pd.DataFrame, **columns: npt.ArrayLike) -> pd.DataFrame:
    """The measures of images that differ in nothing but the named columns."""
    table = pd.DataFrame({"path": rows["path"], "image_id": rows["image_id"]})
    for name in appearance.MEASURES[2:]:
        table[name] = np.asarray(columns.get(name, "upright" if name == "orientation" else 1.0))
    return table


def auc(predictions: Predictions) -> float:
    return float(roc_auc_score(predictions.labels, predictions.scores))


def split_rows(n: int, seed: int = 0) -> pd.DataFrame:
    labels = np.random.default_rng(seed).integers(0, 2, n)
    return rows_of(labels, ["train", "train", "validation", "calibration", "test"] * (n // 5))


# --- the baseline ----------------------------------------------------------------------------------------------------


def test_one_measure_that_differs_by_class_is_found() -> None:
    rows = split_rows(200)
    predictions = shortcut.baseline(rows, measured=measured(rows, file_bytes=1000 * rows["label"] + 5.0))
    assert auc(predictions) == 1.0
    assert predictions.table["path"].tolist() == rows.loc[rows["split"] != "train", "path"].tolist()
    assert set(predictions.table["split"]) == {"validation", "calibration", "test"}
    assert predictions.table["score"].dtype == np.float32
    assert predictions.scores.min() > 0
    assert predictions.scores.max() < 1


def test_measures_that_do_not_differ_are_worth_nothing() -> None:
    rows = split_rows(50)
    predictions = shortcut.baseline(rows, measured=measured(rows))
    share = rows.loc[rows["split"] == "train", "label"].mean()
    assert predictions.scores == pytest.approx(share, abs=1e-4)


def test_only_train_rows_are_learned_from() -> None:
    rows = split_rows(200)
    random = np.random.default_rng(3)
    table = measured(rows, mean=random.normal(size=200) + rows["label"], aspect=random.normal(size=200))
    held = rows["split"] != "train"
    scores = shortcut.baseline(rows, measured=table).scores
    other_labels = rows.assign(label=rows["label"].where(~held, 1 - rows["label"]))
    np.testing.assert_array_equal(shortcut.baseline(other_labels, measured=table).scores, scores)
    alone = held & (np.arange(200) == 2)
    few = rows[~held | alone], table[~held | alone]
    assert shortcut.baseline(few[0], measured=few[1]).scores == pytest.approx(scores[0], abs=1e-7)
    swapped = rows.assign(label=rows["label"].where(held, 1 - rows["label"]))
    assert auc(shortcut.baseline(swapped, measured=table)) < 0.5 < auc(shortcut.baseline(rows, measured=table))


def test_the_scores_are_those_of_a_logistic_regression_done_by_hand() -> None:
    rows = split_rows(300)
    random = np.random.default_rng(4)
    quality = np.where(random.random(300) < 0.3, np.nan, 70 + 9 * rows["label"] + random.normal(0, 8, 300))
    mean = random.normal(100, 20, 300) - 10 * rows["label"]
    train = (rows["split"] == "train").to_numpy()
    missing = np.isnan(quality)
    filled = np.where(missing, np.median(quality[train & ~missing]), quality)
    columns = np.column_stack([filled, mean, missing])
    columns = (columns - columns[train].mean(axis=0)) / columns[train].std(axis=0)
    by_hand = LogisticRegression(tol=1e-8).fit(columns[train], rows["label"][train])
    expected = by_hand.predict_proba(columns[~train])[:, 1]
    predictions = shortcut.baseline(rows, measured=measured(rows, jpeg_quality=quality, mean=mean))
    assert predictions.scores == pytest.approx(expected, abs=1e-3)
    assert auc(predictions) > 0.6


def test_a_missing_quality_is_itself_a_measure() -> None:
    rows = split_rows(100)
    png_for_one_class = np.where(rows["label"] == 1, np.nan, 75.0)
    assert auc(shortcut.baseline(rows, measured=measured(rows, jpeg_quality=png_for_one_class))) == 1.0


def test_a_set_without_any_quality_is_no_trouble() -> None:
    rows = split_rows(50)
    table = measured(rows, jpeg_quality=np.nan, width_px=100.0 + rows["label"])
    assert auc(shortcut.baseline(rows, measured=table)) == 1.0
    only_outside_train = np.where(rows["split"] == "test", 90.0, np.nan)
    table = measured(rows, jpeg_quality=only_outside_train, width_px=100.0 + rows["label"])
    assert auc(shortcut.baseline(rows, measured=table)) == 1.0


def test_frames_and_orientation_are_not_learned_from() -> None:
    rows = split_rows(50)
    stands = np.where(rows["label"] == 1, "turned-90", "upright")
    predictions = shortcut.baseline(rows, measured=measured(rows, frames=rows["label"], orientation=stands))
    assert len(set(predictions.scores)) == 1


@pytest.mark.parametrize("name", shortcut.MEASURES)
def test_every_number_that_is_measured_of_an_image_can_give_its_class_away(name: str) -> None:
    rows = split_rows(50)
    assert auc(shortcut.baseline(rows, measured=measured(rows, **{name: 10.0 + rows["label"]}))) == 1.0


def test_the_measures_are_size_quality_grey_and_border() -> None:
    assert shortcut.MEASURES == (
        "width_px", "height_px", "aspect", "file_bytes", "jpeg_quality", "mean", "contrast", "border_mean", "border_std"
    )  # fmt: skip


def test_train_rows_of_one_class_are_refused() -> None:
    rows = split_rows(50)
    rows.loc[rows["split"] == "train", "label"] = 1
    with pytest.raises(DataError) as caught:
        shortcut.baseline(rows, measured=measured(rows))
    assert str(caught.value) == (
        "The train rows hold 0 NORMAL and 20 PNEUMONIA images, but a baseline learns from both classes; "
        "split the images so that train holds both."
    )


def test_measures_of_other_images_are_refused() -> None:
    rows = split_rows(50)
    message = "The 50 measured images are not the 50 images to score, in their order; measure these images first."
    with pytest.raises(DataError) as caught:
        shortcut.baseline(rows, measured=measured(rows).iloc[::-1])
    assert str(caught.value) == message


def test_with_nothing_to_score_there_are_no_predictions() -> None:
    rows = split_rows(50).assign(split="train")
    assert len(shortcut.baseline(rows, measured=measured(rows))) == 0


# --- the probe of the border -----------------------------------------------------------------------------------------


def border_of(size_px: int) -> tuple[int, npt.NDArray[np.bool_]]:
    """The border's width and mask, from the definition: pixels nearer to an edge than 8 per cent of the side."""
    width = max(1, round(0.08 * size_px))
    y, x = np.mgrid[:size_px, :size_px]
    return width, np.minimum(np.minimum(x, y), size_px - 1 - np.maximum(x, y)) < width


@pytest.mark.parametrize("size_px", [32, 50, 64, 224])
def test_changing_the_middle_changes_no_score(size_px: int) -> None:
    rows = split_rows(80)
    pictures = np.stack([noise(at, (size_px, size_px)) for at in range(80)])
    _, border = border_of(size_px)
    pictures[:, border] //= 2
    scores = shortcut.border_probe(rows, store=in_memory(pictures)).scores
    other = np.stack([noise(1000 + at, (size_px, size_px)) for at in range(80)])
    other[:, border] = pictures[:, border]
    np.testing.assert_array_equal(shortcut.border_probe(rows, store=in_memory(other)).scores, scores)
    assert len(set(scores)) == len(scores)


@pytest.mark.parametrize(("size_px", "cells"), [(32, 40), (224, 44)])
def test_every_pixel_of_the_border_counts(size_px: int, cells: int) -> None:
    _, border = border_of(size_px)
    found = shortcut._border_cells(size_px)
    assert len(found) == cells
    count = np.zeros((size_px, size_px), dtype=int)
    for down, across in found:
        count[down, across] += 1
    np.testing.assert_array_equal(count, border.astype(int))


def test_a_mark_in_one_corner_is_found() -> None:
    rows = split_rows(200)
    pictures = np.stack([noise(at, (64, 64)) for at in range(200)])
    assert 0.3 < auc(shortcut.border_probe(rows, store=in_memory(pictures))) < 0.7
    pictures[rows["label"] == 1, :4, -4:] = 255
    assert auc(shortcut.border_probe(rows, store=in_memory(pictures))) > 0.95


def test_a_mark_in_the_middle_is_not_found() -> None:
    rows = split_rows(200)
    pictures = np.stack([noise(at, (64, 64)) for at in range(200)])
    width, _ = border_of(64)
    pictures[rows["label"] == 1, width:-width, width:-width] = 255
    assert 0.3 < auc(shortcut.border_probe(rows, store=in_memory(pictures))) < 0.7


def test_images_that_are_not_packed_are_refused() -> None:
    rows = split_rows(50)
    store = in_memory(np.stack([noise(at, (32, 32)) for at in range(49)]))
    with pytest.raises(StoreError, match="1 of 50 images are not in"):
        shortcut.border_probe(rows, store=store)


def test_the_probe_learns_from_train_only_and_needs_both_classes() -> None:
    rows = split_rows(100)
    store = in_memory(np.stack([noise(at, (32, 32)) for at in range(100)]))
    held = rows["split"] != "train"
    other_labels = rows.assign(label=rows["label"].where(~held, 1 - rows["label"]))
    scores = shortcut.border_probe(rows, store=store).scores
    np.testing.assert_array_equal(shortcut.border_probe(other_labels, store=store).scores, scores)
    with pytest.raises(DataError, match=r"^The train rows hold 40 NORMAL and 0 PNEUMONIA images"):
        shortcut.border_probe(rows.assign(label=0), store=store)


# --- real X-rays -----------------------------------------------------------------------------------------------------


def test_the_published_originals_differ_by_class_in_size_and_quality(real_data: Path) -> None:
    catalog = Catalog.scan(real_data / "full_resolution").split(SplitSpec(), seed=42)
    store = ImageStore.pack(catalog, size_px=64)
    rows = catalog.rows()
    table = appearance.look(catalog, store).measures
    normal, pneumonia = table[rows["label"] == 0], table[rows["label"] == 1]
    assert normal["jpeg_quality"].min() > pneumonia["jpeg_quality"].max()
    assert normal["height_px"].mean() > 1.3 * pneumonia["height_px"].mean()
    assert auc(shortcut.baseline(rows, measured=table)) == 1.0
    assert auc(shortcut.border_probe(rows, store=store)) > 0.7
