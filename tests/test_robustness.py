"""The fixed changes: each does what its name says, is the same every time, and is judged at a threshold given."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from pneumoscope import robustness

Pictures = npt.NDArray[np.uint8]

ROUGH = np.random.default_rng(3).integers(0, 256, (4, 96, 96))
PICTURES: Pictures = np.clip(ndimage.gaussian_filter(ROUGH.astype(float), (0, 3, 3)) * 3 - 255, 0, 255).astype(np.uint8)
"""Smooth patches of grey, black and white."""


def after(name: str, pictures: Pictures = PICTURES) -> Pictures:
    return robustness.changed(pictures, name)


@pytest.mark.parametrize("name", robustness.CHANGES)
def test_a_change_keeps_the_form_changes_something_and_is_the_same_again(name: str) -> None:
    before = PICTURES.copy()
    found = after(name)
    assert found.dtype == np.uint8
    assert found.shape == PICTURES.shape
    assert (found != PICTURES).any(axis=(1, 2)).all()
    assert np.array_equal(after(name), found)
    assert np.array_equal(before, PICTURES)


def test_gamma_and_contrast_are_their_formulas() -> None:
    assert np.abs(after("gamma-0.7") - 255 * (PICTURES / 255) ** 0.7).max() <= 0.5 + 1e-9
    for name, factor in (("contrast-0.7", 0.7), ("contrast-1.3", 1.3)):
        mean = PICTURES.mean(axis=(1, 2), keepdims=True)
        assert np.abs(after(name) - np.clip(mean + (PICTURES - mean) * factor, 0, 255)).max() <= 0.5 + 1e-9


def test_blur_is_counted_in_pixels_of_a_224_px_image() -> None:
    for side in (56, 224):
        point = np.zeros((1, side, side), dtype=np.uint8)
        point[0, side // 2, side // 2 :] = 255  # a line's end: wide enough to survive rounding
        expected = ndimage.gaussian_filter(point[0].astype(float), 2 * side / 224)
        assert np.abs(after("blur-2", point)[0] - expected).max() <= 0.5 + 1e-9


def test_noise_has_its_strength_and_is_another_for_every_image() -> None:
    grey = np.full((2, 96, 96), 128, dtype=np.uint8)
    grey[1, 0, 0] = 129
    for name, deviation in (("noise-5", 12.75), ("noise-10", 25.5)):
        noise = after(name, grey).astype(float) - 128
        assert np.allclose(noise.std(axis=(1, 2)), deviation, rtol=0.05)
        assert abs(np.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.1


def test_places_move_as_their_names_say() -> None:
    spot = np.zeros((1, 97, 97), dtype=np.uint8)
    spot[0, 44:53, 68:77] = 255  # right of the centre by 24 pixels

    def offset(name: str) -> tuple[float, float]:
        row, column = ndimage.center_of_mass(after(name, spot)[0].astype(float))
        return row - 48, column - 48

    assert offset("crop-0.85") == pytest.approx((0, 24 / 0.85), abs=0.1)
    assert offset("aspect-0.85") == pytest.approx((0, 24 * 0.85), abs=0.1)
    assert offset("aspect-1.15") == pytest.approx((0, 24 * 1.15), abs=0.1)
    turn = np.deg2rad(10)
    assert offset("rotation-left-10") == pytest.approx((-24 * np.sin(turn), 24 * np.cos(turn)), abs=0.1)
    assert offset("rotation-right-10") == pytest.approx((24 * np.sin(turn), 24 * np.cos(turn)), abs=0.1)


def test_the_marker_stands_in_its_corner_and_nowhere_else() -> None:
    black = np.zeros((1, 224, 224), dtype=np.uint8)
    marked = after("marker", black)[0]
    rows, columns = np.nonzero(marked)
    assert marked.max() == 255
    assert rows.max() < 50
    assert columns.max() < 50
    assert 50 < (marked > 128).sum() < 500


def test_detail_is_lost_by_half_size_and_jpeg() -> None:
    fine = np.tile(np.array([[0, 255], [255, 0]], dtype=np.uint8), (1, 48, 48))
    assert after("half-size", fine).std() < 20
    assert 1 < np.abs(after("jpeg-30").astype(int) - PICTURES).mean() < 20


def test_a_scorer_is_asked_once_for_every_change_at_the_threshold_given() -> None:
    labels = np.array([0, 0, 1, 1])
    asked: list[Pictures] = []

    def score(images: Pictures) -> npt.NDArray[Any]:
        asked.append(images)
        return np.array([0.1, 0.6, 0.4, 0.9])

    found = robustness.assess(score, PICTURES, labels, threshold=0.5)
    assert len(asked) == len(robustness.CHANGES)
    assert set(found.auc) == set(robustness.CHANGES)
    assert found.mean_auc == pytest.approx(0.75)
    assert found.mean_specificity == 0.5
    assert set(found.sensitivity.values()) == {0.5}
    assert found.as_dict()["mean_auc"] == found.mean_auc
