"""Baselines that see no lung: each measure against what was planted, and classifiers that see nothing else."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from pneumoscope import images, shortcut
from pneumoscope.catalog import Catalog
from pneumoscope.errors import DataError, StoreError
from pneumoscope.predictions import Predictions
from pneumoscope.specs import SplitSpec
from pneumoscope.store import ImageStore

Pixels = npt.NDArray[np.uint8]


def noise(seed: int, shape: tuple[int, int] = (50, 60)) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: Pixels, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(8), "JPEG", exif=exif)


def planted(root: Path, content: Mapping[str, bytes], size_px: int = 32) -> tuple[Catalog, ImageStore]:
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    catalog = Catalog.scan(root)
    return catalog, ImageStore.pack(catalog, size_px=size_px)


def rows_of(labels: npt.NDArray[np.int64], splits: list[str]) -> pd.DataFrame:
    names = [f"{at}.png" for at in range(len(labels))]
    return pd.DataFrame({"path": names, "image_id": names, "split": splits, "label": labels})


def in_memory(pictures: Pixels) -> ImageStore:
    """A store of pictures that were never files; picture n has the id of the n-th row of `rows_of`."""
    ids = np.array([f"{at}.png" for at in range(len(pictures))])
    order = np.argsort(ids)
    return ImageStore(Path("nowhere"), pictures[order], ids[order], {}, "key")


def measured(rows: pd.DataFrame, **columns: npt.ArrayLike) -> pd.DataFrame:
    """What `measures` gives for images that differ in nothing but the named columns."""
    table = pd.DataFrame({"path": rows["path"], "image_id": rows["image_id"]})
    for name in shortcut.COLUMNS[2:]:
        table[name] = np.asarray(columns.get(name, 1.0))
    return table


def auc(predictions: Predictions) -> float:
    return float(roc_auc_score(predictions.labels, predictions.scores))


def split_rows(n: int, seed: int = 0) -> pd.DataFrame:
    labels = np.random.default_rng(seed).integers(0, 2, n)
    return rows_of(labels, ["train", "train", "validation", "calibration", "test"] * (n // 5))


# --- measures --------------------------------------------------------------------------------------------------------


def test_each_measure_is_what_was_planted(tmp_path: Path) -> None:
    content = {
        "NORMAL/a.png": encoded(noise(1, (50, 60))),
        "NORMAL/b.jpeg": encoded(noise(2, (70, 40)), "JPEG", quality=83),
        "PNEUMONIA/c.jpeg": turned(6),
    }
    catalog, store = planted(tmp_path / "data", content)
    table = shortcut.measures(catalog.rows(), store=store, read_bytes=catalog.read_bytes)
    assert tuple(table.columns) == shortcut.COLUMNS
    assert list(table.index) == [0, 1, 2]
    assert table["path"].tolist() == list(content)
    assert table["image_id"].tolist() == catalog.rows()["image_id"].tolist()
    assert table[["width_px", "height_px"]].values.tolist() == [[60, 50], [40, 70], [50, 60]]
    assert table["aspect"].tolist() == [60 / 50, 40 / 70, 50 / 60]
    assert table["file_bytes"].tolist() == [len(data) for data in content.values()]
    assert table["jpeg_quality"].tolist()[1:] == [83, 75]
    assert np.isnan(table["jpeg_quality"][0])
    assert table["frames"].tolist() == [1, 1, 1]
    assert table["orientation"].tolist() == [1, 1, 6]
    for row, data in enumerate(content.values()):
        pixels = images.load(data, 32).astype(np.float64)
        edge = np.concatenate(
            [pixels[:3].ravel(), pixels[-3:].ravel(), pixels[3:-3, :3].ravel(), pixels[3:-3, -3:].ravel()]
        )
        found = table[["mean", "contrast", "border_mean", "border_std"]].to_numpy()[row]
        assert found == pytest.approx([pixels.mean(), pixels.std(), edge.mean(), edge.std()], abs=1e-9)


def test_rows_keep_their_order_over_many_blocks(tmp_path: Path) -> None:
    content = {f"NORMAL/{at:03}.png": encoded(np.full((4, 4), at, dtype=np.uint8)) for at in range(150)}
    catalog, store = planted(tmp_path / "data", content)
    rows = catalog.rows().sample(frac=1, random_state=1)
    seen: list[tuple[int, int]] = []
    table = shortcut.measures(
        rows, store=store, read_bytes=catalog.read_bytes, progress=lambda done, total: seen.append((done, total))
    )
    assert table["path"].tolist() == rows["path"].tolist()
    assert table["mean"].tolist() == [float(path[7:10]) for path in rows["path"].tolist()]
    assert table["border_mean"].tolist() == table["mean"].tolist()
    assert table["file_bytes"].tolist() == rows["file_bytes"].tolist()
    assert seen == [(64, 150), (128, 150), (150, 150)]


def test_identical_files_are_measured_alike(tmp_path: Path) -> None:
    data = encoded(noise(3), "JPEG", quality=60)
    catalog, store = planted(tmp_path / "data", {"NORMAL/a.jpeg": data, "PNEUMONIA/b.jpeg": data})
    assert len(store.images) == 1
    table = shortcut.measures(catalog.rows(), store=store, read_bytes=catalog.read_bytes)
    first, second = table.drop(columns="path").to_dict("records")
    assert first == second


def test_pages_are_counted_and_array_files_have_no_quality(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(4)).save(buffer, "PNG", save_all=True, append_images=[Image.fromarray(noise(5))])
    catalog, store = planted(
        tmp_path / "data", {"NORMAL/a.png": buffer.getvalue(), "PNEUMONIA/b.png": encoded(noise(6))}
    )
    assert shortcut.measures(catalog.rows(), store=store, read_bytes=catalog.read_bytes)["frames"].tolist() == [2, 1]
    pictures, labels = np.stack([noise(at, (28, 28)) for at in (0, 1)]), np.array([[0], [1]])
    np.savez(
        tmp_path / "set.npz",
        train_images=pictures, train_labels=labels, val_images=pictures, val_labels=labels,
        test_images=pictures, test_labels=labels,
    )  # fmt: skip
    catalog = Catalog.scan(tmp_path / "set.npz")
    store = ImageStore.pack(catalog, size_px=32)
    table = shortcut.measures(catalog.rows(), store=store, read_bytes=catalog.read_bytes)
    assert table["jpeg_quality"].isna().all()
    assert set(table["frames"]) == set(table["orientation"]) == {1}


def test_an_orientation_that_does_not_exist_is_upright(tmp_path: Path) -> None:
    catalog, store = planted(tmp_path / "data", {"NORMAL/a.jpeg": turned(77)})
    assert shortcut.measures(catalog.rows(), store=store, read_bytes=catalog.read_bytes)["orientation"].tolist() == [1]


def test_the_quality_of_a_jpeg_is_the_one_it_was_saved_with() -> None:
    for quality in range(1, 101):
        with Image.open(io.BytesIO(encoded(noise(7, (8, 8)), "JPEG", quality=quality))) as image:
            assert shortcut.jpeg_quality_of(image.quantization[0]) == quality  # type: ignore[attr-defined]


def test_another_makers_table_gets_the_nearest_quality() -> None:
    with Image.open(io.BytesIO(encoded(noise(7, (8, 8)), "JPEG", quality=80))) as image:
        table = list(image.quantization[0])  # type: ignore[attr-defined]
    assert shortcut.jpeg_quality_of([table[0] + 1, *table[1:]]) == 80
    assert shortcut.jpeg_quality_of([1] * 64) == 100
    assert shortcut.jpeg_quality_of([65535] * 64) == 1


def test_a_file_that_is_gone_or_damaged_is_named(tmp_path: Path) -> None:
    catalog, store = planted(tmp_path / "data", {"NORMAL/a.png": encoded(noise(1)), "NORMAL/b.png": encoded(noise(2))})
    rows = catalog.rows()
    (tmp_path / "data/NORMAL/b.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        shortcut.measures(rows, store=store, read_bytes=catalog.read_bytes)
    assert (
        str(caught.value)
        == "NORMAL/b.png was listed but cannot be used now (empty file); make it readable and run again."
    )
    (tmp_path / "data/NORMAL/b.png").unlink()
    with pytest.raises(
        DataError, match=r"^NORMAL/b\.png was listed but cannot be used now \(.*\); make it readable and run again\.$"
    ):
        shortcut.measures(rows, store=store, read_bytes=catalog.read_bytes)


def test_images_that_are_not_packed_are_refused(tmp_path: Path) -> None:
    catalog, store = planted(tmp_path / "data", {"NORMAL/a.png": encoded(noise(1))})
    rows = catalog.rows().assign(image_id="0" * 16)
    with pytest.raises(StoreError, match="1 of 1 images are not in"):
        shortcut.measures(rows, store=store, read_bytes=catalog.read_bytes)


def test_no_rows_give_an_empty_table(tmp_path: Path) -> None:
    catalog, store = planted(tmp_path / "data", {"NORMAL/a.png": encoded(noise(1))})
    table = shortcut.measures(catalog.rows("test"), store=store, read_bytes=catalog.read_bytes)
    assert (len(table), tuple(table.columns)) == (0, shortcut.COLUMNS)


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
    predictions = shortcut.baseline(rows, measured=measured(rows, frames=rows["label"], orientation=rows["label"]))
    assert len(set(predictions.scores)) == 1


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
    table = shortcut.measures(rows, store=store, read_bytes=catalog.read_bytes)
    normal, pneumonia = table[rows["label"] == 0], table[rows["label"] == 1]
    assert normal["jpeg_quality"].min() > pneumonia["jpeg_quality"].max()
    assert normal["height_px"].mean() > 1.3 * pneumonia["height_px"].mean()
    assert auc(shortcut.baseline(rows, measured=table)) == 1.0
    assert auc(shortcut.border_probe(rows, store=store)) > 0.7
