"""The Predictions table: its columns, what it refuses, and that no score loses a bit on its way."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pneumoscope.errors import DataError
from pneumoscope.predictions import COLUMNS, Predictions


def catalog_rows(labels: list[int], *, split: str = "test") -> pd.DataFrame:
    """Rows as a Catalog gives them: more columns than are wanted, and numbered from elsewhere."""
    n = len(labels)
    return pd.DataFrame(
        {
            "path": [f"{split}/{at}.jpeg" for at in range(n)],
            "image_id": [f"{at:016x}" for at in range(n)],
            "group": [f"virus/{at}" for at in range(n)],
            "split": [split] * n,
            "label": np.array(labels, dtype=np.int64),
        },
        index=range(100, 100 + n),
    )


def test_rows_are_joined_with_their_scores_in_order() -> None:
    rows = catalog_rows([1, 0, 1])
    before = rows.copy()
    predictions = Predictions.of(rows, [0.75, 0.25, 0.5])
    table = predictions.table
    assert tuple(table.columns) == COLUMNS == ("path", "image_id", "split", "label", "score", "probability")
    assert list(table.index) == [0, 1, 2]
    assert table["path"].tolist() == ["test/0.jpeg", "test/1.jpeg", "test/2.jpeg"]
    assert table["image_id"].tolist() == before["image_id"].tolist()
    assert table["split"].tolist() == ["test"] * 3
    assert table["score"].tolist() == [0.75, 0.25, 0.5]
    assert [str(table[name].dtype) for name in ("label", "score", "probability")] == ["int8", "float32", "float32"]
    assert table["probability"].isna().all()
    pd.testing.assert_frame_equal(rows, before)
    assert len(predictions) == 3


def test_labels_and_scores_come_as_arrays() -> None:
    predictions = Predictions.of(catalog_rows([1, 0]), np.array([1.0, 0.0]))
    assert predictions.labels.dtype == np.int8
    assert predictions.labels.tolist() == [1, 0]
    assert predictions.scores.dtype == np.float64
    assert predictions.scores.tolist() == [1.0, 0.0]


def test_a_float32_score_keeps_every_bit() -> None:
    scores = np.random.default_rng(0).random(1000, dtype=np.float32)
    scores[:4] = [0, 1, np.nextafter(np.float32(0), np.float32(1)), np.nextafter(np.float32(1), np.float32(0))]
    predictions = Predictions.of(catalog_rows([0] * 1000), scores)
    assert predictions.table["score"].to_numpy().tobytes() == scores.tobytes()
    assert (predictions.scores == scores.astype(np.float64)).all()
    assert predictions.scores.astype(np.float32).tobytes() == scores.tobytes()


@pytest.mark.parametrize(
    ("scores", "shape"), [([0.5], "(1,)"), ([0.5] * 4, "(4,)"), ([[0.5], [0.5], [0.5]], "(3, 1)"), ([], "(0,)")]
)
def test_another_number_of_scores_than_images_is_refused(scores: list[float], shape: str) -> None:
    with pytest.raises(DataError) as caught:
        Predictions.of(catalog_rows([0, 1, 1]), scores)
    assert str(caught.value) == f"There are {shape} scores for 3 images; give one score per image."


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e-9, 1 + 2.0**-23, 1e30])
def test_a_score_that_is_no_probability_is_refused(bad: float) -> None:
    with pytest.raises(DataError) as caught:
        Predictions.of(catalog_rows([0, 1]), [0.5, bad])
    assert str(caught.value) == "A score is not a number from 0 to 1; the model is damaged, train it again."


def test_tables_are_put_under_one_another_and_taken_apart_by_split() -> None:
    validation = Predictions.of(catalog_rows([0, 1], split="validation"), [0.25, 0.5])
    test = Predictions.of(catalog_rows([1, 1, 0], split="test"), [0.75, 1.0, 0.0])
    both = Predictions.concat(iter([validation, test]))
    assert len(both) == 5
    assert list(both.table.index) == [0, 1, 2, 3, 4]
    assert both.table.dtypes.to_dict() == test.table.dtypes.to_dict()
    pd.testing.assert_frame_equal(both.of_split("validation").table, validation.table)
    pd.testing.assert_frame_equal(both.of_split("test").table, test.table)
    assert len(both.of_split("train")) == 0


def test_no_rows_make_an_empty_table() -> None:
    empty = Predictions.of(catalog_rows([]), [])
    assert tuple(empty.table.columns) == COLUMNS
    assert (len(empty), empty.labels.shape, empty.scores.shape) == (0, (0,), (0,))
