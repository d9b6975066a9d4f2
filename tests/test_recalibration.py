"""A site's own images move the operating points and the temperature, and nothing else."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pneumoscope import _files, calibration, metrics, recalibration, site_sample
from pneumoscope.bundle import Bundle
from pneumoscope.catalog import Catalog
from pneumoscope.errors import DataError, StoreError, UsageError
from pneumoscope.evidence import Grid
from pneumoscope.familiarity import Familiarity
from pneumoscope.intervals import wilson
from pneumoscope.narration import Narration
from pneumoscope.predictor import Description
from pneumoscope.recalibration import images_needed, recalibrate
from pneumoscope.specs import LABELS, RESEARCH_USE

SIDE = 32
SLOPE, BIAS = 16.0, -8.0  # the logit is SLOPE x mean brightness (0 to 1) + BIAS
OLD = {"youden": 0.5, "sensitivity-0.95": 0.3, "cost": 0.2}
FAST = 60  # resamples


def network() -> bytes:
    """A network whose logit rises with the mean brightness; it keeps the contract of a bundle."""
    nodes = [
        helper.make_node("Cast", ["image"], ["grey"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["grey", "one"], ["channel"]),
        helper.make_node("AveragePool", ["channel"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Squeeze", ["pooled", "one"], ["cells"]),
        helper.make_node("Mul", ["cells", "slope"], ["evidence"]),
        helper.make_node("ReduceSum", ["evidence", "places"], ["sum"], keepdims=0),
        helper.make_node("Add", ["sum", "offset"], ["logit"]),
        helper.make_node("Sub", ["logit", "sum"], ["bias"]),
        helper.make_node("Sigmoid", ["logit"], ["score"]),
        helper.make_node("Flatten", ["evidence"], ["features"]),
    ]
    constants: dict[str, npt.NDArray[Any]] = {
        "one": np.array([1], dtype=np.int64),
        "places": np.array([1, 2], dtype=np.int64),
        "slope": np.array(SLOPE / 255 / 4, dtype=np.float32),
        "offset": np.array(BIAS, dtype=np.float32),
    }
    shapes = {"score": ["n"], "logit": ["n"], "bias": ["n"], "evidence": ["n", 2, 2], "features": ["n", 4]}
    graph = helper.make_graph(
        nodes,
        "brightness",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", SIDE, SIDE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def cells(brightness: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return brightness[:, None] * np.ones(4) * SLOPE / 4


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    rng = np.random.default_rng(0)
    usual = [cells(rng.uniform(0.2, 0.8, n)) + rng.normal(0, 0.02, (n, 4)) for n in (200, 100)]
    description = Description(
        model="tl", title="Brightness", size_px=SIDE, grid=Grid(7.5, 16.0), evidence_scale=1.0, points=OLD,
        chosen_on="validation", curve=None, temperature=2.0,
        familiarity=Familiarity.fit(usual[0], held_out=usual[1]), unfamiliar="",
        metrics={"validation": {"n": 9}}, provenance={"data_sha256": "ab"}, note="SYNTHETIC DATA",
    )  # fmt: skip
    return Bundle.write(
        tmp_path / "bundle", network=network(), description=description, further={"weights": "float32", "parity": {}}
    )


def picture(brightness: float, *, seed: int) -> npt.NDArray[np.uint8]:
    noise = np.random.default_rng(seed).normal(0, 12, (SIDE, SIDE))
    return np.asarray(np.clip(255 * brightness + noise - noise.mean(), 0, 255), dtype=np.uint8)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def write_site(
    folder: Path, *, n: int = 40, normal: float = 0.45, sick: float = 0.6, spread: float = 0.08, seed: int = 0
) -> Path:
    """Class folders with `n` images of each label in Kaggle's names, one patient for two images."""
    rng = np.random.default_rng(seed)
    for label, middle in enumerate((normal, sick)):
        for at in range(n):
            name = f"person{at // 2 + 1}_virus_{at}.png" if label else f"IM-{at // 2 + 1:04d}-{at:04d}.png"
            place = folder / LABELS[label] / name
            place.parent.mkdir(parents=True, exist_ok=True)
            pixels = picture(float(rng.normal(middle, spread)), seed=1000 * label + at + 5000 * seed)
            place.write_bytes(png(pixels))
    return folder


def sigmoid(catalog: Catalog) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """Labels and scores by hand, in the catalog's order."""
    rows = catalog.rows()
    means = [np.asarray(Image.open(io.BytesIO(catalog.read_bytes(path)))).mean() for path in rows["path"]]
    return rows["label"].to_numpy(), 1 / (1 + np.exp(-(SLOPE * np.array(means) / 255 + BIAS)))


def test_the_new_bundle_has_new_choices_and_the_same_network(bundle: Bundle, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in bundle.folder.iterdir()}
    catalog = Catalog.scan(write_site(tmp_path / "site", spread=0.2))  # too sure
    result = recalibrate(bundle, catalog, folder=tmp_path / "new", resamples=FAST)
    new = Bundle.open(tmp_path / "new")
    labels, scores = sigmoid(catalog)

    assert {path.name: path.read_bytes() for path in bundle.folder.iterdir()} == before
    assert (new.folder / "model.onnx").read_bytes() == before["model.onnx"]
    assert new.content["sha256"] == bundle.content["sha256"]
    assert new.content["weights"] == "float32"
    made = new.description
    expected = metrics.choose_operating_points(result.sample.predictions)
    assert made.points == expected
    assert list(made.points) == list(OLD)
    assert np.allclose(result.sample.predictions.scores, scores, atol=1e-5)
    assert made.temperature == pytest.approx(calibration.fit_temperature(labels, scores).value, rel=1e-3)
    assert (made.chosen_on, made.curve and made.curve.split) == ("site", "site")
    assert made.curve is not None
    assert made.curve.at(made.point[1]) == pytest.approx(
        ((scores[labels == 1] > made.point[1]).mean(), (scores[labels == 0] <= made.point[1]).mean())
    )
    kept = ("model", "title", "size_px", "grid", "evidence_scale", "unfamiliar", "note")
    assert [getattr(made, name) for name in kept] == [getattr(bundle.description, name) for name in kept]
    old_usual, new_usual = (each.description.familiarity for each in (bundle, new))
    assert old_usual is not None
    assert new_usual is not None
    assert new_usual.as_dict() == old_usual.as_dict()
    assert set(made.metrics) == {"validation", "site"}
    assert made.metrics["site"]["n"] == 80
    assert made.metrics["site"]["auc"] == pytest.approx(result.auc.auc)


def test_both_thresholds_are_measured_on_the_site(bundle: Bundle, tmp_path: Path) -> None:
    catalog = Catalog.scan(write_site(tmp_path / "site"))
    result = recalibrate(bundle, catalog, folder=tmp_path / "new", resamples=FAST)
    labels, scores = sigmoid(catalog)
    for point in result.points:
        assert point.before is not None
        assert point.before.threshold == OLD[point.name]
        for at in (point.before, point.after):
            assert at.sensitivity == pytest.approx((scores[labels == 1] > at.threshold).mean())
            assert at.specificity == pytest.approx((scores[labels == 0] <= at.threshold).mean())
        written = Bundle.open(tmp_path / "new").content["metrics"]["site"]["changes"][point.name]
        sure = wilson(point.after.true_positives, 40)
        assert sure is not None
        assert written["after"]["intervals"]["sensitivity"] == pytest.approx(sure.as_dict())
        interval = point.threshold_interval
        assert interval is not None
        assert interval.low <= point.after.threshold <= interval.high


def test_a_darker_site_gets_its_sensitivity_back(bundle: Bundle, tmp_path: Path) -> None:
    catalog = Catalog.scan(write_site(tmp_path / "site", normal=0.25, sick=0.42))
    point = recalibrate(bundle, catalog, folder=tmp_path / "new", resamples=FAST).points[0]
    assert point.before is not None
    assert point.before.sensitivity is not None
    assert point.after.sensitivity is not None
    assert point.before.sensitivity < 0.3
    assert point.after.sensitivity > 0.7
    assert point.threshold_interval is not None
    assert point.threshold_interval.high < OLD["youden"]


def test_thresholds_chosen_on_chance_are_said_to_flatter(bundle: Bundle, tmp_path: Path) -> None:
    catalog = Catalog.scan(write_site(tmp_path / "site", n=20, normal=0.5, sick=0.5))
    result = recalibrate(bundle, catalog, folder=tmp_path / "new", resamples=300)
    flattery = result.points[0].flattery
    assert flattery["sensitivity"] + flattery["specificity"] > 0.08
    said = recalibration.warnings(result)
    assert "chosen on the same 40 images; measure them on other images." in said[0]
    assert "The NORMAL images are of 10 patients only: the intervals are too narrow." in said


def test_neither_file_names_nor_groups_reach_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    site = write_site(tmp_path / "Hospital of Nowhere")
    (site / "NORMAL" / "Jane Doe.png").write_bytes(b"nothing")
    recalibrate(bundle, Catalog.scan(site), folder=tmp_path / "new", resamples=FAST)
    text = (tmp_path / "new" / "bundle.json").read_text(encoding="utf-8")
    assert "Nowhere" not in text
    assert "Jane" not in text
    assert "person" not in text
    assert "IM-" not in text
    assert "virus" not in text


def test_the_bundle_says_what_it_was_before_and_each_time(bundle: Bundle, tmp_path: Path) -> None:
    catalog = Catalog.scan(write_site(tmp_path / "site"))
    first = recalibrate(bundle, catalog, folder=tmp_path / "first", resamples=FAST)
    other = Catalog.scan(write_site(tmp_path / "other", n=30, seed=3))
    second = recalibrate(first.bundle, other, folder=tmp_path / "second", resamples=FAST)
    records = second.bundle.description.provenance["recalibrated"]
    assert [record["n"] for record in records] == [80, 60]
    assert records[0]["operating_points_before"] == OLD
    assert records[0]["temperature_before"] == 2.0
    assert records[0]["chosen_on_before"] == "validation"
    assert records[1]["operating_points_before"] == dict(first.bundle.description.points)
    assert records[1]["chosen_on_before"] == "site"
    assert second.bundle.description.provenance["data_sha256"] == "ab"
    assert records[0]["data_sha256"] != records[1]["data_sha256"]


def test_the_hash_of_the_data_is_of_contents_and_labels_only(bundle: Bundle, tmp_path: Path) -> None:
    site = write_site(tmp_path / "site", n=12)
    first = site_sample.score(bundle.predictor(), Catalog.scan(site)).sha256
    for at, path in enumerate(sorted((site / "NORMAL").iterdir())):
        path.rename(path.with_name(f"{at}.png"))
    assert site_sample.score(bundle.predictor(), Catalog.scan(site)).sha256 == first
    (site / "NORMAL" / "0.png").rename(site / "PNEUMONIA" / "0.png")
    assert site_sample.score(bundle.predictor(), Catalog.scan(site)).sha256 != first


def test_images_that_cannot_be_used_are_left_out_and_counted(bundle: Bundle, tmp_path: Path) -> None:
    site = write_site(tmp_path / "site", n=12)
    good = sorted((site / "NORMAL").iterdir())
    (site / "NORMAL" / "empty.png").write_bytes(b"")
    (site / "NORMAL" / "half.png").write_bytes(good[0].read_bytes()[:300])
    (site / "NORMAL" / "copy.png").write_bytes(good[1].read_bytes())
    (site / "NORMAL" / "twice.png").write_bytes(png(picture(0.9, seed=77)))
    (site / "PNEUMONIA" / "twice.png").write_bytes(png(picture(0.9, seed=77)))
    (site / "PNEUMONIA" / "grey.png").write_bytes(png(np.full((SIDE, SIDE), 90, np.uint8)))
    sample = site_sample.score(bundle.predictor(), Catalog.scan(site))
    assert sample.counts == (12, 12)
    assert sum(sample.left_out.values()) == 6
    assert sample.left_out["a copy of another image"] == 1
    assert sample.left_out["under both labels"] == 2
    assert sample.left_out["shows nothing"] == 1


def test_the_share_that_is_unlike_the_training_images_is_said(bundle: Bundle, tmp_path: Path) -> None:
    site = write_site(tmp_path / "site", n=12)
    for at in range(9):
        half = picture(0.5, seed=at)
        half[:, : SIDE // 2] = 0
        (site / "NORMAL" / f"half{at}.png").write_bytes(png(half))
    result = recalibrate(bundle, Catalog.scan(site), folder=tmp_path / "new", resamples=FAST)
    unlike = result.sample.unlike
    assert unlike is not None
    assert 9 <= unlike <= 12
    assert any(f"{unlike} of 33 images" in each for each in recalibration.sentences(result))
    assert any("More than a fifth" in each for each in recalibration.warnings(result))


def test_a_bundle_without_a_reference_says_so(bundle: Bundle, tmp_path: Path) -> None:
    bare = replace(bundle.description, familiarity=None, unfamiliar="why not")
    source = Bundle.write(tmp_path / "bare", network=network(), description=bare)
    result = recalibrate(source, Catalog.scan(write_site(tmp_path / "site")), folder=tmp_path / "new", resamples=FAST)
    assert result.sample.unlike is None
    assert any("not known to this bundle" in each for each in recalibration.sentences(result))
    assert result.bundle.description.unfamiliar == "why not"


@pytest.mark.parametrize(
    ("n", "spoil", "text"),
    [
        (9, "", "The site's images hold 9 usable NORMAL images among 18, but at least 10 of each label are needed"),
        (12, "PNEUMONIA", "The site's images hold no usable PNEUMONIA image among 12, but at least 10"),
    ],
)
def test_too_small_a_sample_is_refused_and_nothing_written(
    n: int, spoil: str, text: str, bundle: Bundle, tmp_path: Path
) -> None:
    site = write_site(tmp_path / "site", n=n)
    if spoil:
        for path in (site / spoil).iterdir():
            path.write_bytes(b"not an image")
    with pytest.raises(DataError) as caught:
        recalibrate(bundle, Catalog.scan(site), folder=tmp_path / "new", resamples=FAST)
    assert text in str(caught.value).replace("usable PNEUMONIA images", "usable PNEUMONIA image")
    assert not (tmp_path / "new").exists()


def test_the_bundle_itself_is_never_written_into(bundle: Bundle, tmp_path: Path) -> None:
    catalog = Catalog.scan(write_site(tmp_path / "site", n=12))
    (tmp_path / "link").symlink_to(bundle.folder)
    for folder in (bundle.folder, tmp_path / "link", bundle.folder / ".." / "bundle"):
        with pytest.raises(UsageError, match="is the bundle to recalibrate, which stays as it is; name another folder"):
            recalibrate(bundle, catalog, folder=folder, resamples=FAST)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="is there and is no bundle; choose a new folder with -o"):
        recalibrate(bundle, catalog, folder=tmp_path / "full", resamples=FAST)


def test_a_network_changed_after_it_was_opened_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    catalog = Catalog.scan(write_site(tmp_path / "site", n=12))
    with (bundle.folder / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match="was changed while it was in use; export the bundle again"):
        recalibrate(bundle, catalog, folder=tmp_path / "new", resamples=FAST)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"width": 0.0}, "The width of an interval is 0.0; give a number between 0 and 1"),
        ({"width": 1.0}, "The width of an interval is 1.0"),
        ({"cost_ratio": 0.0}, "The cost ratio is 0.0; give a finite number above 0"),
        ({"cost_ratio": math.nan}, "The cost ratio is nan"),
        ({"resamples": 0}, "A bootstrap of 0 resamples was asked for"),
    ],
)
def test_a_wrong_number_is_refused_before_anything_is_read(
    wrong: dict[str, Any], text: str, bundle: Bundle, tmp_path: Path
) -> None:
    catalog = Catalog.scan(write_site(tmp_path / "site", n=2))  # too few: would be refused, but later
    with pytest.raises(UsageError, match=text):
        recalibrate(bundle, catalog, folder=tmp_path / "new", **wrong)


def test_every_split_and_other_layouts_are_used(bundle: Bundle, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    labels = np.arange(30) % 2
    pictures = np.stack([picture(0.45 + 0.1 * label + rng.normal(0, 0.08), seed=at) for at, label in enumerate(labels)])
    parts = {"train": slice(0, 10), "val": slice(10, 20), "test": slice(20, 30)}
    arrays = {f"{name}_images": pictures[at] for name, at in parts.items()}
    arrays |= {f"{name}_labels": labels[at, None].astype(np.uint8) for name, at in parts.items()}
    np.savez(tmp_path / "site.npz", **arrays)  # type: ignore[arg-type]
    result = recalibrate(bundle, Catalog.scan(tmp_path / "site.npz"), folder=tmp_path / "new", resamples=FAST)
    assert result.sample.counts == (15, 15)
    assert np.allclose(
        result.sample.predictions.scores,
        1 / (1 + np.exp(-(SLOPE * pictures.mean(axis=(1, 2)) / 255 + BIAS))),
        atol=1e-5,
    )


def test_a_second_call_with_the_same_seed_finds_the_same(bundle: Bundle, tmp_path: Path) -> None:
    catalog = Catalog.scan(write_site(tmp_path / "site"))
    first, second = (
        recalibrate(bundle, catalog, folder=tmp_path / name, resamples=FAST, seed=7) for name in ("one", "two")
    )
    assert first.points == second.points
    assert _files.hash_of(dict(first.bundle.content["metrics"])) == _files.hash_of(
        dict(second.bundle.content["metrics"])
    )


def test_what_is_said_names_the_figures(bundle: Bundle, tmp_path: Path) -> None:
    stream = io.StringIO()
    result = recalibrate(
        bundle,
        Catalog.scan(write_site(tmp_path / "site", spread=0.2)),
        folder=tmp_path / "new",
        resamples=FAST,
        narration=Narration("plain", stream=stream),
    )
    said = stream.getvalue()
    point = result.points[0]
    assert "Operating points on the site's 80 images (40 PNEUMONIA, 40 NORMAL)" in said
    assert "youden, old" in said
    assert f"{point.after.sensitivity:.3f} (" in said
    needed = point.needed["sensitivity"]
    assert needed == images_needed(point.after.sensitivity or 0, width=0.1)
    assert f"at youden you need {needed} PNEUMONIA images of different patients; you have 40 of 20." in said
    assert "Temperature: 2.000 before" in said
    assert f"{RESEARCH_USE}." in said
    json.dumps(Bundle.open(tmp_path / "new").content, allow_nan=False)


# --- images needed ---------------------------------------------------------------------------------------------------


def formula(share: float, width: float, level: float) -> int:
    """The smallest whole number at or above the root of the quadratic that Wilson's width gives."""
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    k = width**2 / (4 * z2)  # k (n + z2)^2 = n pq + z2 / 4
    pq = share * (1 - share)
    b = 2 * k * z2 - pq
    return max(1, math.ceil((-b + math.sqrt(b**2 - 4 * k * (k * z2**2 - z2 / 4))) / (2 * k)))


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("width", [0.02, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_search_finds_what_the_formula_gives(share: float, width: float, level: float) -> None:
    assert images_needed(share, width=width, level=level) == formula(share, width, level)


@pytest.mark.parametrize(("successes", "n"), [(76, 80), (5, 10), (190, 200), (35, 35), (0, 12), (1, 1)])
def test_the_number_agrees_with_the_interval_itself(successes: int, n: int) -> None:
    interval = wilson(successes, n)
    assert interval is not None
    width = interval.high - interval.low
    assert images_needed(successes / n, width=width + 1e-9) == n
    assert images_needed(successes / n, width=width - 1e-9) == n + 1


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match=r"The share is .*; give a number from 0 to 1"):
        images_needed(share, width=0.1)


def test_a_level_that_is_no_share_is_refused() -> None:
    with pytest.raises(UsageError, match="The level of an interval is 95"):
        images_needed(0.9, width=0.1, level=95)
