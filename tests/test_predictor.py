"""An image's answer: the call, what it was made with, and whether the image can be assessed at all."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pneumoscope import images
from pneumoscope.errors import ImageError, StoreError, UsageError
from pneumoscope.evidence import Grid
from pneumoscope.familiarity import Familiarity
from pneumoscope.predictor import Curve, Description, Outputs, Predictor

SIZE = 40


def brightness(images: npt.NDArray[np.uint8]) -> Outputs:
    """A network whose score is the mean grey, and whose features are the means of both halves."""
    grey = images.astype(np.float32) / 255
    halves = np.stack([grey[:, :, : SIZE // 2].mean((1, 2)), grey[:, :, SIZE // 2 :].mean((1, 2))], axis=1)
    score = halves.mean(axis=1)
    logit = np.log(score / (1 - score))
    evidence = np.repeat(logit[:, None, None] / 8, 4, axis=1).repeat(2, axis=2)
    return Outputs(score, logit, np.zeros_like(logit), evidence.astype(np.float32), halves)


def usual() -> Familiarity:
    """Images whose halves are about equally bright."""
    middle = np.random.default_rng(0).uniform(0.2, 0.8, (60, 1))
    spread = np.random.default_rng(1).normal(0, 0.01, (60, 2))
    return Familiarity.fit((middle + spread)[:40], held_out=(middle + spread)[40:])


DESCRIPTION = Description(
    model="cnn",
    title="CNN from scratch",
    size_px=SIZE,
    grid=Grid(5.0, 10.0),
    evidence_scale=0.5,
    points={"youden": 0.4, "cost": 0.2},
    chosen_on="validation",
    curve=Curve("validation", 10, 5, np.array([0.9, 0.5, 0.1]), np.array([0.0, 0.6, 1.0]), np.array([1.0, 0.8, 0.0])),
    temperature=2.0,
    familiarity=usual(),
    unfamiliar="",
    metrics={"test": {"n": 3, "auc": 0.75}},
    provenance={"pneumoscope": "0"},
)
PREDICTOR = Predictor(DESCRIPTION, brightness)


def png(left: int, right: int, *, size_px: int = SIZE) -> bytes:
    pixels = np.full((size_px, size_px), left, dtype=np.uint8)
    pixels[:, size_px // 2 :] = right
    pixels[::2] += 10 if abs(left - right) < 3 and left == 104 else 0
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_a_call_is_pneumonia_above_the_threshold_only() -> None:
    dark, bright = PREDICTOR.answer([PREDICTOR.read(png(60, 80)), PREDICTOR.read(png(120, 130))])
    assert (dark.call, bright.call) == ("NORMAL", "PNEUMONIA")
    assert (dark.operating_point, dark.threshold) == ("youden", 0.4)
    assert dark.score == pytest.approx(70 / 255, abs=1e-6)
    exactly = PREDICTOR.at(bright.score).answer([PREDICTOR.read(png(120, 130))])[0]
    assert (exactly.call, exactly.operating_point) == ("NORMAL", "own")


def test_the_probability_is_the_score_at_its_temperature() -> None:
    answer = PREDICTOR.answer([PREDICTOR.read(png(60, 80))])[0]
    assert answer.probability == pytest.approx(1 / (1 + np.exp(-answer.logit / 2)), abs=1e-6)
    assert replace(PREDICTOR, description=replace(DESCRIPTION, temperature=None)).probability(0.3) is None


def test_the_operating_point_can_be_another_one() -> None:
    assert PREDICTOR.at("cost").description.point == ("cost", 0.2)
    assert list(PREDICTOR.at("cost").description.points) == ["cost", "youden"]
    assert replace(PREDICTOR, description=replace(DESCRIPTION, points={})).description.point == ("half", 0.5)
    with pytest.raises(UsageError, match="no operating point 'best'; it has youden, cost"):
        PREDICTOR.at("best")
    with pytest.raises(UsageError, match=r"threshold is 1\.5; give a number from 0 to 1"):
        PREDICTOR.at(1.5)


def test_an_image_unlike_the_training_images_is_not_assessable_and_still_scored() -> None:
    like, unlike = PREDICTOR.answer([PREDICTOR.read(png(104, 104)), PREDICTOR.read(png(20, 230))])
    assert (like.assessable, like.reason) == (True, "")
    assert unlike.assessable is False
    assert unlike.reason.startswith("The image is unlike the training images (distance ")
    assert 0 < unlike.score < 1


def test_where_nothing_is_known_of_the_training_images_that_is_said() -> None:
    blind = replace(PREDICTOR, description=replace(DESCRIPTION, familiarity=None, unfamiliar="Nobody looked."))
    answer = blind.answer([blind.read(png(104, 104))])[0]
    assert (answer.assessable, answer.reason) == (None, "Nobody looked.")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(90, 93), "The picture is one grey all over."),
        (png(50, 200, size_px=1), "The picture has only 1 x 1 pixels."),
    ],
)
def test_a_picture_that_shows_nothing_is_not_assessable(data: bytes, reason: str) -> None:
    answer = PREDICTOR.answer([PREDICTOR.read(data)])[0]
    assert (answer.assessable, answer.reason) == (False, reason)


def test_a_file_is_prepared_as_the_description_says() -> None:
    compressing = replace(PREDICTOR, description=replace(DESCRIPTION, jpeg_quality=20))
    data = png(60, 200)
    assert np.array_equal(compressing.read(data).pixels, images.load(data, SIZE, jpeg_quality=20))
    assert not np.array_equal(compressing.read(data).pixels, PREDICTOR.read(data).pixels)


def test_no_picture_gives_no_answer_and_bytes_that_are_none_are_refused() -> None:
    assert PREDICTOR.answer([]) == []
    with pytest.raises(ImageError, match="0 bytes"):
        PREDICTOR.read(b"")


def test_a_score_that_is_no_number_is_no_answer() -> None:
    def damaged(images: npt.NDArray[np.uint8]) -> Outputs:
        return brightness(images)._replace(score=np.full(len(images), np.nan, dtype=np.float32))

    broken = replace(PREDICTOR, network=damaged)
    with pytest.raises(StoreError, match="gives a score that is no number"):
        broken.answer([broken.read(png(60, 80))])


def test_a_curve_is_exact_at_any_threshold() -> None:
    curve = Curve.of("validation", np.array([0, 1, 0, 1], dtype=np.int8), np.array([0.1, 0.3, 0.3, 0.9]))
    assert curve is not None
    np.testing.assert_allclose(curve.thresholds, [0.9, 0.3, 0.1, 0.0])
    np.testing.assert_allclose(curve.sensitivity, [0, 0.5, 1, 1])
    np.testing.assert_allclose(curve.specificity, [1, 1, 0.5, 0])
    assert (curve.split, curve.n_positive, curve.n_negative) == ("validation", 2, 2)
    for threshold in (1.0, 0.9, 0.7, 0.31, 0.3, 0.2, 0.1, 0.06, 0.0):
        called = np.array([0.1, 0.3, 0.3, 0.9]) > threshold
        assert curve.at(threshold) == (called[[1, 3]].mean(), 1 - called[[0, 2]].mean())
    zero = Curve.of("validation", np.array([0, 1], dtype=np.int8), np.array([0.0, 1.0]))
    assert zero is not None
    assert (zero.at(0.0), zero.at(1.0), list(zero.thresholds)) == ((1.0, 1.0), (0.0, 1.0), [1.0, 0.0])
    assert Curve.of("validation", np.array([1, 1], dtype=np.int8), np.array([0.1, 0.3])) is None


def test_a_description_survives_json() -> None:
    back = Description.from_dict(json.loads(json.dumps(DESCRIPTION.as_dict())))
    assert back.as_dict() == DESCRIPTION.as_dict()
    assert list(back.points) == ["youden", "cost"]
    compressed = replace(DESCRIPTION, jpeg_quality=75).as_dict()
    assert Description.from_dict(compressed).jpeg_quality == 75
    del compressed["jpeg_quality"]  # as bundles of earlier versions
    assert Description.from_dict(compressed).jpeg_quality == 0
    bare = replace(DESCRIPTION, curve=None, familiarity=None, temperature=None, points={})
    assert Description.from_dict(bare.as_dict()).as_dict() == bare.as_dict()


@pytest.mark.parametrize("missing", ["labels", "evidence", "operating_points", "temperature", "metrics"])
def test_a_damaged_description_is_refused(missing: str) -> None:
    content = DESCRIPTION.as_dict()
    del content[missing]
    with pytest.raises(StoreError, match=f"KeyError: '{missing}'.*export it again"):
        Description.from_dict(content)
    with pytest.raises(StoreError, match="its labels are"):
        Description.from_dict(DESCRIPTION.as_dict() | {"labels": ["PNEUMONIA", "NORMAL"]})
    with pytest.raises(StoreError, match="columns of different lengths"):
        Description.from_dict(DESCRIPTION.as_dict() | {"curve": {**DESCRIPTION.as_dict()["curve"], "thresholds": []}})


@pytest.mark.parametrize(
    ("threshold", "rates"), [(1.0, (0.0, 1.0)), (0.9, (0.0, 1.0)), (0.6, (0.6, 0.8)), (0.5, (0.6, 0.8)), (0.0, (1, 0))]
)
def test_a_moved_threshold_has_its_sensitivity_and_specificity(threshold: float, rates: tuple[float, float]) -> None:
    assert DESCRIPTION.curve is not None
    assert DESCRIPTION.curve.at(threshold) == rates
