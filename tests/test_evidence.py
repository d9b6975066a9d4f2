"""Maps as arrays against scorers whose eyes are known: one that sees one corner, one that sees brightness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import spearmanr

from pneumoscope import evidence, phantom
from pneumoscope.errors import UsageError
from pneumoscope.evidence import Grid

Images = npt.NDArray[np.uint8]

SIDE = 32
EVEN = Grid(3.5, 8.0)  # four cells of eight pixels, side by side
RNG = np.random.default_rng(3)
NOISE = RNG.integers(0, 256, (5, SIDE, SIDE), dtype=np.uint8)


def corner_score(images: Images) -> npt.NDArray[np.float32]:
    """Sees nothing but the contrast of the top left 8 x 8 pixels."""
    return np.asarray(images[:, :8, :8].std(axis=(1, 2)), dtype=np.float32)


def map_with(**cells: float) -> npt.NDArray[np.float32]:
    """A map of 4 x 4 cells, all 0 but those named, such as ``c03``: row 0, column 3."""
    result = np.zeros((4, 4), dtype=np.float32)
    for name, value in cells.items():
        result[int(name[1]), int(name[2])] = value
    return result


# --- Where cells lie --------------------------------------------------------------------------------------------------


def test_an_enlarged_map_has_its_values_at_the_centres_of_its_cells() -> None:
    grid = Grid(3.0, 6.0)
    maps = RNG.normal(size=(2, 5, 5)).astype(np.float32)
    large = evidence.enlarged(maps, size_px=SIDE, grid=grid)
    assert large.shape == (2, SIDE, SIDE)
    assert np.allclose(large[:, 3:28:6, 3:28:6], maps)
    assert np.allclose(large[:, 6, 3:28:6], maps[:, 0] / 2 + maps[:, 1] / 2)  # halfway between two rows
    assert np.allclose(large[:, :3, :3], maps[:, :1, :1])  # nothing is made up outside the outer centres
    assert np.allclose(large[:, 28:, 28:], maps[:, -1:, -1:])


def test_an_enlarged_slope_is_a_slope() -> None:
    rows = np.arange(5.0)[:, None] * np.ones(5)
    large = evidence.enlarged(rows, size_px=SIDE, grid=Grid(3.0, 6.0))
    assert np.allclose(large[3:28], ((np.arange(3, 28) - 3) / 6)[:, None])


def test_a_pixel_belongs_to_the_nearest_cell() -> None:
    assert EVEN.cell_of(SIDE, 4).tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8
    assert Grid(10.0, 8.0).cell_of(SIDE, 2).tolist() == [0] * 15 + [1] * 17  # far pixels go to the outer cells


# --- Drawing ----------------------------------------------------------------------------------------------------------


def test_the_overlay_is_red_for_pneumonia_blue_against_and_clear_where_nothing_speaks() -> None:
    image = np.full((SIDE, SIDE), 100, dtype=np.uint8)
    picture = evidence.overlay(image, map_with(c00=2.0, c03=-9.0, c30=1.0), grid=EVEN, scale=2.0)
    assert picture.shape == (SIDE, SIDE, 3)
    assert picture.dtype == np.uint8

    def mixed(colour: tuple[int, int, int], strength: float) -> list[int]:
        share = evidence.OPACITY * strength
        return [round(100 * (1 - share) + part * share) for part in colour]

    assert picture[0, 0].tolist() == mixed(evidence.FOR, 1)
    assert picture[0, -1].tolist() == mixed(evidence.AGAINST, 1)  # beyond the scale: full colour, not more
    assert picture[-1, 0].tolist() == mixed(evidence.FOR, 0.5)
    assert picture[-1, -1].tolist() == [100, 100, 100]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_above_zero_is_refused(scale: float) -> None:
    with pytest.raises(
        UsageError,
        match=rf"^The scale of the overlay is {scale}; pass the evidence that gets full colour, above 0\.$",
    ):
        evidence.overlay(NOISE[0], map_with(), grid=EVEN, scale=scale)


# --- Where no lung is -------------------------------------------------------------------------------------------------


def test_the_body_is_the_bright_rectangle_and_a_marker_is_none_of_it() -> None:
    image = np.full((100, 100), 8, dtype=np.uint8)
    image[20:90, 15:70] = 150
    image[3:9, 90:96] = 255  # a marker in the dark
    assert evidence.body_box(image) == (slice(20, 90), slice(15, 70))


def test_an_image_without_anything_bright_is_all_body() -> None:
    assert evidence.body_box(np.zeros((10, 20), dtype=np.uint8)) == (slice(0, 10), slice(0, 20))


def test_synthetic_children_fill_most_of_their_picture() -> None:
    for seed in range(5):
        rows, columns = evidence.body_box(phantom.draw(seed % 2, seed=seed, width_px=128, height_px=128))
        assert (rows.stop - rows.start) * (columns.stop - columns.start) > 0.6 * 128**2


def test_shares_tell_where_evidence_lies_whatever_its_sign() -> None:
    images = np.zeros((5, SIDE, SIDE), dtype=np.uint8)
    images[:, 4:28, 4:28] = 200
    even = np.ones((4, 4), dtype=np.float32)
    maps = np.stack([map_with(c11=1), map_with(c00=-3), even, map_with(), map_with(c00=-1, c22=1)])
    shares = evidence.shares(images, maps, grid=EVEN, border_px=2, corner_px=4)
    assert shares.border_area == pytest.approx(1 - (28 / 32) ** 2)
    assert shares.corners_area == pytest.approx(4 * 16 / 1024)
    assert np.allclose(shares.outside_area, 1 - (24 / 32) ** 2)
    for values, area in (
        (shares.border, shares.border_area),
        (shares.corners, shares.corners_area),
        (shares.outside, shares.outside_area[0]),
    ):
        assert values[0] < 0.05  # the middle
        assert values[1] > 1.5 * area  # the corner
        assert values[2] == pytest.approx(area)  # spread evenly
        assert np.isnan(values[3])  # nothing has no place
        assert 0.25 * values[1] < values[4] < values[1]  # one speaks against the other, both count
    # of the corner's map, 3.5 pixels are full and 8 fall to 0, along each axis
    line = np.clip(1 - (np.arange(SIDE) - 3.5) / 8, 0, 1)
    assert shares.border[1] == pytest.approx(1 - (line[2:].sum() / line.sum()) ** 2)


@pytest.mark.parametrize(("border_px", "corner_px", "name", "width"), [(0, 4, "border", 0), (4, 16, "corner", 16)])
def test_a_border_that_does_not_fit_is_refused(border_px: int, corner_px: int, name: str, width: int) -> None:
    with pytest.raises(
        UsageError,
        match=rf"^The {name} is {width} px wide in images of 32 px; pass at least 1 and less than half the side\.$",
    ):
        evidence.shares(NOISE[:1], map_with()[None], grid=EVEN, border_px=border_px, corner_px=corner_px)


# --- Likeness ---------------------------------------------------------------------------------------------------------


def test_similarity_is_spearmans_rank_correlation_of_each_pair() -> None:
    first, second = RNG.normal(size=(2, 3, 4, 4))
    second[1] = np.exp(first[1])  # the same order
    second[2] = -first[2]
    first[0, 0] = 0.5  # ties
    found = evidence.similarity(first, second)
    assert found[0] == pytest.approx(spearmanr(first[0].ravel(), second[0].ravel()).statistic)
    assert found[1:].tolist() == pytest.approx([1, -1])


def test_a_map_of_one_value_is_like_none() -> None:
    assert np.isnan(evidence.similarity(np.ones((1, 3, 3)), RNG.normal(size=(1, 3, 3)))).all()


# --- Changed images ---------------------------------------------------------------------------------------------------


def test_hiding_what_the_scorer_sees_drops_the_score_at_once_and_showing_it_restores_it_at_once() -> None:
    image = NOISE[0]
    curves = evidence.perturbation(corner_score, image, map_with(c00=1), grid=EVEN)
    assert curves.share.tolist() == pytest.approx([cells / 16 for cells in range(17)])
    whole, blurred = curves.deletion[0], curves.deletion[-1]
    assert whole == pytest.approx(corner_score(image[None])[0])
    assert blurred < 0.3 * whole
    assert curves.deletion[1:].tolist() == [blurred] * 16
    assert curves.insertion.tolist() == [blurred] + [whole] * 16
    assert curves.deletion_area == pytest.approx(blurred + (whole - blurred) / 32)
    assert curves.insertion_area == pytest.approx(whole - (whole - blurred) / 32)


def test_a_map_that_misleads_has_the_areas_the_other_way_round() -> None:
    good = evidence.perturbation(corner_score, NOISE[0], map_with(c00=1), grid=EVEN)
    bad = evidence.perturbation(corner_score, NOISE[0], map_with(c00=-1), grid=EVEN)
    assert good.deletion_area < 0.5 * bad.deletion_area
    assert good.insertion_area > 2 * bad.insertion_area


def test_fewer_steps_take_several_cells_at_once() -> None:
    maps = RNG.normal(size=(4, 4))
    curves = evidence.perturbation(corner_score, NOISE[0], maps, grid=EVEN, steps=3)
    assert curves.share.tolist() == pytest.approx([0, 5 / 16, 11 / 16, 1])


def test_cells_that_are_not_of_one_size_count_by_their_pixels() -> None:
    curves = evidence.perturbation(corner_score, NOISE[0], np.array([[1.0, 0], [0, 0]]), grid=Grid(1.0, 10.0))
    assert curves.share[1] == pytest.approx(7 * 7 / SIDE**2)  # pixels 0 to 6 along each axis


def test_occlusion_finds_what_the_scorer_sees_and_nothing_else() -> None:
    lost = evidence.occlusion(corner_score, NOISE[0], cell_px=8)
    assert lost.shape == (4, 4)
    assert lost[0, 0] > 0.7 * corner_score(NOISE[:1])[0]
    assert np.count_nonzero(lost) == 1


def test_occlusion_covers_the_image_where_squares_do_not_divide_it() -> None:
    def lowest_row(images: Images) -> npt.NDArray[np.float64]:
        return np.asarray(images[:, -1].std(axis=1), dtype=np.float64)

    lost = evidence.occlusion(lowest_row, NOISE[0], cell_px=7)
    assert lost.shape == (5, 5)
    assert np.count_nonzero(lost[:-1]) == 0
    assert np.count_nonzero(lost[-1]) == 5


def test_an_occlusion_without_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^The square to hide is 0 px wide; pass 1 or more\.$"):
        evidence.occlusion(corner_score, NOISE[0], cell_px=0)


@pytest.mark.parametrize("letter", ["L", "R"])
def test_a_marker_changes_only_the_corner_it_is_pasted_into(letter: str) -> None:
    images = np.full((2, 100, 100), 40, dtype=np.uint8)
    half = slice(0, 50), slice(50, 100)
    for at, name in enumerate(evidence.CORNERS):
        rows, columns = half["bottom" in name], half["right" in name]

        def brightness(seen: Images, rows: slice = rows, columns: slice = columns) -> npt.NDArray[np.float64]:
            return np.asarray(seen[:, rows, columns].mean(axis=(1, 2)), dtype=np.float64)

        changes = evidence.marker_changes(brightness, images, letter=letter)
        assert changes.shape == (2, 4)
        assert (changes[:, at] > 0.5).all()  # grey levels over the whole quarter
        assert np.count_nonzero(changes) == 2
    assert (images == 40).all()


def test_the_two_markers_differ_and_stay_off_the_edge() -> None:
    seen: list[Images] = []

    def watch(images: Images) -> npt.NDArray[np.float64]:
        seen.extend(images)
        return np.zeros(len(images))

    for letter in ("L", "R"):
        evidence.marker_changes(watch, np.zeros((1, 200, 200), dtype=np.uint8), letter=letter)
    left, right = seen[1:5], seen[6:10]
    for images in (left, right):
        for image in images:
            rows, columns = np.nonzero(image)
            assert 10 <= rows.max() - rows.min() <= 15  # 6 % of 200
            assert min(rows.min(), columns.min(), 199 - rows.max(), 199 - columns.max()) >= 6
    assert not np.array_equal(left[0], right[0])


def test_an_unknown_marker_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^There is no marker 'X'; choose one of L, R\.$"):
        evidence.marker_changes(corner_score, NOISE, letter="X")


@pytest.mark.parametrize(
    "check",
    [
        lambda score: evidence.perturbation(score, NOISE[0], RNG.normal(size=(8, 8)), grid=Grid(1.5, 4.0)),
        lambda score: evidence.occlusion(score, NOISE[0], cell_px=4),
        lambda score: evidence.marker_changes(score, np.concatenate([NOISE] * 3)),
    ],
    ids=["perturbation", "occlusion", "marker_changes"],
)
def test_few_changed_images_are_in_memory_at_a_time(check: Callable[[evidence.Score], Any]) -> None:
    sizes: list[int] = []

    def watch(images: Images) -> npt.NDArray[np.float32]:
        assert images.dtype == np.uint8
        sizes.append(len(images))
        return corner_score(images)

    check(watch)
    assert max(sizes) == evidence.BATCH
    assert sum(sizes) > 2 * evidence.BATCH


def test_the_checks_leave_no_trace_and_repeat_themselves() -> None:
    image = NOISE[0].copy()
    once, again = (evidence.occlusion(corner_score, image, cell_px=8) for _ in range(2))
    assert np.array_equal(once, again)
    first, second = (evidence.perturbation(corner_score, image, map_with(c12=1), grid=EVEN) for _ in range(2))
    assert np.array_equal(first.deletion, second.deletion)
    assert np.array_equal(image, NOISE[0])
