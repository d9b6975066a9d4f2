"""Familiarity: distances against scipy and scikit-learn, a threshold that holds its share, a form that repeats both."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.spatial.distance import mahalanobis
from sklearn.decomposition import PCA

from pneumoscope import familiarity, images
from pneumoscope.errors import DataError, StoreError, UsageError
from pneumoscope.familiarity import Familiarity

Floats = npt.NDArray[np.float64]


def drawn(n: int, d: int, seed: int) -> Floats:
    """Features that hang together, each with a mean and a spread of its own; another seed draws other images."""
    mixing = np.random.default_rng(100 + d).normal(size=(d, d)) * np.geomspace(3, 0.3, d)[:, None]
    return np.asarray(np.random.default_rng(seed).normal(size=(n, d)) @ mixing + np.arange(d))


def fitted(n: int = 400, d: int = 50, *, quantile: float = 0.99, n_held_out: int = 300) -> Familiarity:
    return Familiarity.fit(drawn(n, d, seed=1), held_out=drawn(n_held_out, d, seed=2), quantile=quantile)


# --- the distance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 5, 33])
def test_with_few_features_it_is_the_distance_of_mahalanobis(d: int) -> None:
    train, others = drawn(300, d, seed=1), drawn(20, d, seed=3)
    inverse = np.linalg.inv(np.cov(train, rowvar=False, ddof=0).reshape(d, d))
    expected = [mahalanobis(row, train.mean(axis=0), inverse) for row in others]
    model = Familiarity.fit(train, held_out=others)
    assert len(model.axes) == d - 1
    assert model.distance(others) == pytest.approx(expected, rel=1e-4)  # the axes are float32


def test_with_many_features_it_is_that_of_probabilistic_pca() -> None:
    """The log density of Tipping and Bishop's model is minus half the squared distance, and a constant."""
    train, others = drawn(400, 80, seed=1), drawn(30, 80, seed=3)
    model = Familiarity.fit(train, held_out=others)
    density = PCA(familiarity.AXES).fit(train).score_samples(others) * (400 / 399)  # its variances divide by n - 1
    squared = model.distance(others) ** 2
    assert -2 * (density - density[0]) == pytest.approx(squared - squared[0], rel=1e-4, abs=1e-3)


def test_the_axes_are_orthonormal_and_their_variances_fall() -> None:
    model = fitted(d=60)
    assert model.axes.shape == (familiarity.AXES, 60)
    assert model.mean.dtype == np.float32
    assert model.axes.dtype == np.float32
    assert model.axes @ model.axes.T == pytest.approx(np.eye(familiarity.AXES), abs=1e-5)
    assert (np.diff(model.variances) <= 0).all()
    assert model.variances[-1] >= model.residual_variance > 0
    assert (model.n_train, model.n_held_out) == (400, 300)


def test_the_middle_is_near_and_far_is_far() -> None:
    model = fitted()
    middle = model.mean[None, :].astype(np.float64)
    steps = np.arange(4.0)[:, None] * model.axes[0] * np.sqrt(model.variances[0])
    assert model.distance(middle + steps) == pytest.approx([0, 1, 2, 3], abs=1e-3)


def test_float16_and_float32_features_are_taken() -> None:
    train, others = drawn(100, 20, seed=1), drawn(10, 20, seed=3)
    model = Familiarity.fit(train.astype(np.float32), held_out=others.astype(np.float16))
    assert model.distance(others.astype(np.float32)) == pytest.approx(model.distance(others), rel=1e-4)
    assert model.distance(others).dtype == np.float64


def test_a_feature_that_never_varied_counts_where_it_does() -> None:
    train, others = drawn(100, 20, seed=1), drawn(50, 20, seed=3)
    train[:, 7] = others[:, 7] = 2.0
    model = Familiarity.fit(train, held_out=others)
    strange = others[:1].copy()
    strange[0, 7] = 9.0
    distance, assessable = model.assess(np.concatenate([others[:1], strange]))
    assert np.isfinite(distance).all()
    assert distance[1] > 10 * distance[0]
    assert not assessable[1]


@pytest.mark.parametrize(("n", "d"), [(3, 1), (3, 400), (20, 400), (40, 31)])
def test_few_training_images_are_enough_for_a_finite_distance(n: int, d: int) -> None:
    train, held_out = np.random.default_rng(0).normal(size=(n, d)), np.random.default_rng(1).normal(size=(9, d))
    model = Familiarity.fit(train, held_out=held_out)
    assert np.isfinite(model.distance(held_out)).all()
    assert model.assess(held_out)[1].all()
    assert not model.assess(np.full((1, d), 1000.0))[1].any()


# --- the threshold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "quantile", "place"), [(99, 0.99, 99), (199, 0.99, 198), (10, 0.99, 10), (19, 0.5, 10)])
def test_the_threshold_is_a_distance_of_a_held_out_image(m: int, quantile: float, place: int) -> None:
    model = fitted(quantile=quantile, n_held_out=m)
    distance, assessable = model.assess(drawn(m, 50, seed=2))
    assert model.threshold == np.sort(distance)[place - 1]
    assert assessable.sum() == place
    np.testing.assert_array_equal(assessable, distance <= model.threshold)


def test_new_images_of_the_same_kind_are_assessable_as_often_as_promised() -> None:
    refused = [
        1
        - Familiarity.fit(drawn(100, 8, seed), held_out=drawn(99, 8, 1000 + seed), quantile=0.9)
        .assess(drawn(200, 8, 2000 + seed))[1]
        .mean()
        for seed in range(60)
    ]
    assert np.mean(refused) == pytest.approx(0.1, abs=0.015)


def test_real_x_rays_are_told_from_what_is_none(real_data: Path) -> None:
    """On raw grey values at 16 px, the poorest features there are."""
    files = sorted((real_data / "chest_xray/train").glob("*/*.jpeg"))[::10]
    pictures = np.stack([images.load(file.read_bytes(), 16) for file in files])
    features = pictures.reshape(len(pictures), -1).astype(np.float64)
    order = np.random.default_rng(0).permutation(len(features))
    train, held_out, new = np.split(features[order], [250, 350])
    model = Familiarity.fit(train, held_out=held_out)
    assert model.assess(new)[1].mean() > 0.9
    noise = np.random.default_rng(1).integers(0, 256, (30, 256))
    upside_down = pictures[order[350:], ::-1].reshape(-1, 256)
    assert not model.assess(noise)[1].any()
    assert model.assess(upside_down)[1].mean() < 0.2


# --- its form in a bundle --------------------------------------------------------------------------------------------


def test_what_is_written_repeats_every_distance_to_the_last_digit() -> None:
    model = fitted(d=70)
    others = drawn(40, 70, seed=5)
    content = json.loads(json.dumps(model.as_dict(), allow_nan=False))
    assert sorted(content) == [
        "axes", "mean", "n_held_out", "n_train", "quantile", "residual_variance", "shape", "threshold", "variances"
    ]  # fmt: skip
    again = Familiarity.from_dict(content)
    for before, after in zip(model.assess(others), again.assess(others), strict=True):
        np.testing.assert_array_equal(before, after)
    assert again.as_dict() == content


def test_the_written_form_can_be_read_without_this_module() -> None:
    model = fitted()
    content = model.as_dict()
    mean = np.frombuffer(base64.b64decode(content["mean"]), "<f4")
    axes = np.frombuffer(base64.b64decode(content["axes"]), "<f4").reshape(content["shape"])
    others = drawn(5, 50, seed=6)
    along = (others - mean) @ axes.T
    rest = others - mean - along @ axes
    squared = (along**2 / content["variances"]).sum(axis=1) + (rest**2).sum(axis=1) / content["residual_variance"]
    assert model.distance(others) == pytest.approx(np.sqrt(squared), rel=1e-9)


@pytest.mark.parametrize(
    "change",
    [{"mean": "&&&"}, {"axes": ""}, {"shape": [3, 4]}, {"variances": [1.0]}, {"threshold": None}, {"shape": None}],
)
def test_a_damaged_description_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(StoreError) as caught:
        Familiarity.from_dict(fitted().as_dict() | change)
    assert str(caught.value).startswith("The description of the training images is damaged (")
    assert str(caught.value).endswith("); export the model again.")


def test_a_description_with_a_missing_part_is_refused() -> None:
    content = fitted().as_dict()
    del content["threshold"]
    with pytest.raises(StoreError) as caught:
        Familiarity.from_dict(content)
    assert str(caught.value) == (
        "The description of the training images is damaged (KeyError: 'threshold'); export the model again."
    )


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.0, 1.0, 99.0])
def test_a_quantile_that_is_no_share_is_refused(quantile: float) -> None:
    with pytest.raises(UsageError) as caught:
        fitted(quantile=quantile)
    assert str(caught.value) == f"The quantile is {quantile}; give a share between 0 and 1, for example 0.99."


@pytest.mark.parametrize(("n", "m"), [(2, 5), (5, 0)])
def test_too_few_images_are_refused(n: int, m: int) -> None:
    with pytest.raises(DataError) as caught:
        fitted(n, 4, n_held_out=m)
    assert str(caught.value) == (
        f"There are {n} training and {m} held-out images; give at least 3 and 1, so that it is known what is usual."
    )


def test_training_images_that_are_all_alike_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        Familiarity.fit(np.full((9, 4), 0.1), held_out=drawn(3, 4, seed=1))
    assert str(caught.value) == ("The features of all training images are the same; check the images and the network.")


def test_features_of_another_network_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        fitted(d=50).assess(drawn(3, 40, seed=1))
    assert str(caught.value) == (
        "The images have 40 features each, the training images had 50; compute them with the same network."
    )


@pytest.mark.parametrize("shape", [(5,), (5, 0), (2, 7, 7, 192)])
def test_what_is_no_table_of_features_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError) as caught:
        familiarity.feature_rows(np.zeros(shape))
    assert str(caught.value) == (
        f"The features have the shape {shape}; give one row of numbers per image, for example the mean of each "
        "feature map."
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(DataError) as caught:
        fitted(d=2).assess([[value, 1.0]])
    assert str(caught.value) == "A feature is not a finite number; compute the features anew."
