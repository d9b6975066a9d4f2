"""Random changes: what each number does to an image, how they are drawn, and a model behind them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from pneumoscope import augmentation, models
from pneumoscope._backend import keras
from pneumoscope.specs import AugmentSpec, Spec

PIXELS = np.random.default_rng(5).integers(0, 256, (6, 32, 32, 1), dtype=np.uint8)
SMOOTH = ndimage.gaussian_filter(PIXELS[..., 0].astype(np.float64), (0, 2, 2))[..., None].astype(np.float32)
PLACES = AugmentSpec(zoom=0.1, translation=0.2, rotation=10, stretch=0.2)
KINDS = {
    "gamma": AugmentSpec(gamma=0.4),
    "contrast": AugmentSpec(contrast=0.3),
    "brightness": AugmentSpec(brightness=0.1),
    "blur": AugmentSpec(blur=0.03),
    "noise": AugmentSpec(noise=0.1),
}

Images = npt.NDArray[np.float32]


def changes(n: int = 6, **values: float) -> Images:
    """The change that changes nothing, but for some numbers."""
    row = dict(zip(augmentation.COLUMNS, augmentation.IDENTITY, strict=True)) | values
    return np.tile(np.array(list(row.values()), dtype=np.float32), (n, 1))


def apply(spec: AugmentSpec, images: Any = PIXELS, change: Images | None = None, **values: float) -> Images:
    each = changes(len(images), **values) if change is None else change
    return np.asarray(keras.ops.convert_to_numpy(augmentation.Augment(spec)([images, each])), dtype=np.float32)


@pytest.mark.parametrize("spec", [PLACES, *KINDS.values()], ids=["places", *KINDS])
def test_the_identity_gives_the_image_back(spec: AugmentSpec) -> None:
    image = apply(spec)
    assert image.dtype == np.float32
    assert np.allclose(image, PIXELS, rtol=0, atol=2e-3)  # a power of 1 is not exact in float32


def test_without_turning_and_stretching_the_identity_is_exact() -> None:
    assert np.array_equal(apply(AugmentSpec(zoom=0.1, translation=0.1)), PIXELS)


@pytest.mark.parametrize(
    ("right", "down"), [(4, 0), (-4, 0), (0, 8), (0, -8), (8, -4)], ids=lambda shift: f"{shift:+d}"
)
def test_a_shift_moves_right_and_down_and_mirrors_the_outside(right: int, down: int) -> None:
    moved = apply(PLACES, right=right / 32, down=down / 32)[..., 0]
    mirrored = np.pad(PIXELS[..., 0], ((0, 0), (8, 8), (8, 8)), mode="symmetric")
    assert np.allclose(moved, mirrored[:, 8 - down : 40 - down, 8 - right : 40 - right], atol=1e-3)


@pytest.mark.parametrize("zoom", [0.8, 1.1, 1.5])
def test_zoom_enlarges_about_the_centre(zoom: float) -> None:
    x, y = np.meshgrid(np.arange(32.0), np.arange(32.0))
    across, along = apply(PLACES, np.stack([x, y])[..., None].astype(np.float32), zoom=zoom)[..., 0]
    inside = slice(5, -5)
    assert np.allclose(across[inside, inside], (15.5 + (x - 15.5) / zoom)[inside, inside], atol=1e-3)
    assert np.allclose(along[inside, inside], (15.5 + (y - 15.5) / zoom)[inside, inside], atol=1e-3)


def test_stretch_widens_what_it_does_not_heighten() -> None:
    x, y = np.meshgrid(np.arange(32.0), np.arange(32.0))
    across, along = apply(PLACES, np.stack([x, y])[..., None].astype(np.float32), stretch=1.44)[..., 0]
    inside = slice(5, -5)
    assert np.allclose(across[inside, inside], (15.5 + (x - 15.5) / 1.2)[inside, inside], atol=1e-3)
    assert np.allclose(along[8:-8, inside], (15.5 + (y - 15.5) * 1.2)[8:-8, inside], atol=1e-3)


def test_a_quarter_turn_is_counter_clockwise() -> None:
    turned = apply(PLACES, angle=np.pi / 2)[..., 0]
    assert np.allclose(turned, np.rot90(PIXELS[..., 0], axes=(1, 2)), atol=0.05)


def test_all_places_are_one_bilinear_resampling() -> None:
    drawn = augmentation.draw(PLACES, len(SMOOTH), seed=(1,))
    ours = apply(PLACES, SMOOTH, drawn)[..., 0]
    centre = np.array([15.5, 15.5])
    for image, result, change in zip(SMOOTH[..., 0], ours, drawn.astype(np.float64), strict=True):
        zoom, right, down, angle, stretch = change[:5]
        scale = np.diag([zoom / np.sqrt(stretch), zoom * np.sqrt(stretch)])  # rows, columns
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        back = np.linalg.inv(turn @ scale)  # output (row, column) -> input
        offset = centre - back @ (centre + 32 * np.array([down, right]))
        expected = ndimage.affine_transform(
            image.astype(np.float64), back, offset, order=1, mode="grid-constant", cval=np.nan
        )
        known = ~np.isnan(expected)
        assert known.mean() > 0.5
        assert np.allclose(result[known], expected[known], atol=0.02)


def test_gamma_contrast_and_brightness_are_their_formulas() -> None:
    grey = PIXELS.astype(np.float64)
    mean = grey.mean(axis=(1, 2, 3), keepdims=True)
    assert np.allclose(apply(KINDS["gamma"], gamma=1.4), 255 * (grey / 255) ** 1.4, atol=0.01)
    stretched = np.clip(mean + (grey - mean) * 1.3, 0, 255)
    assert np.allclose(apply(KINDS["contrast"], contrast=1.3), stretched, atol=0.01)
    assert np.allclose(apply(KINDS["brightness"], brightness=-20.0), np.clip(grey - 20, 0, 255), atol=0.01)


@pytest.mark.parametrize("sigma_px", [0.5, 0.9])
def test_blur_is_a_gaussian_of_its_own_for_each_image(sigma_px: float) -> None:
    change = changes()
    change[::2, augmentation.COLUMNS.index("blur")] = sigma_px / 32
    blurred = apply(KINDS["blur"], change=change)[..., 0]
    expected = ndimage.gaussian_filter(PIXELS[..., 0].astype(np.float64), (0, sigma_px, sigma_px), radius=(0, 2, 2),
                                       mode="mirror")  # fmt: skip
    assert np.allclose(blurred[::2], expected[::2], atol=0.02)
    assert np.allclose(blurred[1::2], PIXELS[1::2, ..., 0], atol=0.01)


def test_noise_has_its_strength_and_another_pattern_elsewhere() -> None:
    grey = np.full((2, 64, 64, 1), 128, dtype=np.float32)
    change = changes(2, noise=10.0)
    change[1, augmentation.COLUMNS.index("noise_row")] = 0.5
    noise = apply(KINDS["noise"], grey, change)[..., 0] - 128
    assert np.allclose(noise.std(axis=(1, 2)), 10, rtol=0.05)
    assert np.abs(noise.mean(axis=(1, 2))).max() < 1
    assert abs(np.corrcoef(*noise.reshape(2, -1)).min()) < 0.1
    assert np.array_equal(apply(KINDS["noise"], grey, change)[..., 0] - 128, noise)


def test_values_stay_grey() -> None:
    spec = AugmentSpec(**{name: getattr(one, name) for name, one in KINDS.items()})
    image = apply(spec, change=augmentation.draw(spec, 6, seed=(2,)))
    assert 0 <= image.min() < image.max() <= 255
    assert not np.allclose(image, PIXELS, atol=5)


def test_changes_are_drawn_from_their_ranges_by_the_seed_alone() -> None:
    spec = AugmentSpec(
        zoom=0.1, translation=0.2, rotation=10, stretch=0.2, gamma=0.5, contrast=0.4, brightness=0.1, blur=0.01,
        noise=0.08,
    )  # fmt: skip
    drawn = augmentation.draw(spec, 4000, seed=(42, models.TRANSFORMS, 3))
    assert drawn.shape == (4000, len(augmentation.COLUMNS))
    assert drawn.dtype == np.float32
    turn = np.deg2rad(10)
    ranges = [
        (0.9, 1.1), (-0.2, 0.2), (-0.2, 0.2), (-turn, turn), (1 / 1.2, 1.2), (1 / 1.5, 1.5), (1 / 1.4, 1.4),
        (-25.5, 25.5), (0, 0.01), (0, 20.4), (0, 1), (0, 1),
    ]  # fmt: skip
    for name, column, (low, high) in zip(augmentation.COLUMNS, drawn.T, ranges, strict=True):
        assert low - 1e-6 <= column.min() < low + 0.01 * (high - low), name
        assert high - 0.01 * (high - low) < column.max() <= high + 1e-6, name
    for name in ("stretch", "gamma", "contrast"):
        assert abs((drawn[:, augmentation.COLUMNS.index(name)] < 1).mean() - 0.5) < 0.03
    for name in ("blur", "noise"):
        assert abs((drawn[:, augmentation.COLUMNS.index(name)] == 0).mean() - 0.5) < 0.03
    assert np.abs(np.corrcoef(drawn.T) - np.eye(len(ranges))).max() < 0.1
    assert np.array_equal(augmentation.draw(spec, 4000, seed=(42, models.TRANSFORMS, 3)), drawn)
    for other in [(43, models.TRANSFORMS, 3), (42, models.VIEWS, 3), (42, models.TRANSFORMS, 4)]:
        assert not np.array_equal(augmentation.draw(spec, 4000, seed=other), drawn)
    nothing = augmentation.draw(AugmentSpec(), 4, seed=(1,))
    assert np.array_equal(nothing[:, :10], [augmentation.IDENTITY[:10]] * 4)


def test_another_kind_of_change_leaves_what_the_others_draw() -> None:
    less, more = (augmentation.draw(AugmentSpec(zoom=0.1, gamma=gamma), 5, seed=(1,)) for gamma in (0.0, 0.5))
    assert np.array_equal(less[:, :5], more[:, :5])
    assert not np.array_equal(less[:, 5], more[:, 5])


def test_an_augmented_model_shares_its_weights_and_sees_the_changed_image() -> None:
    model = models.build("cnn", Spec.preset_named("smoke").with_overrides(["image.size_px=32"]))
    network = augmentation.augmented(model, PLACES)
    assert set(map(id, network.weights)) == set(map(id, model.weights))

    def outputs(one: Any, inputs: Any) -> npt.NDArray[Any]:
        return np.asarray(keras.ops.convert_to_numpy(one(inputs, training=False)))

    moved = changes(zoom=1.1, right=0.1, down=-0.1)
    seen = outputs(model, apply(PLACES, change=moved))
    assert np.allclose(outputs(network, [PIXELS, changes()]), outputs(model, PIXELS), rtol=0, atol=1e-4)
    assert np.allclose(outputs(network, [PIXELS, moved]), seen, rtol=0, atol=1e-6)
    assert not np.allclose(seen, outputs(model, PIXELS), rtol=0, atol=1e-6)
