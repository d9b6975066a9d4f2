"""The checks of evidence maps find what was built in: maps that tell what is used, and maps that do not."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image

from pneumoscope import (
    checks,
    evidence,
    evidence_checks,
    evidence_figures,
    explainer,
    inference,
    models,
    phantom,
    pipeline,
)
from pneumoscope.errors import DataError, UsageError
from pneumoscope.evidence import Grid
from pneumoscope.evidence_checks import Sample, invariant, markers, paired, perturbation, randomisation, shares
from pneumoscope.predictor import Description, Outputs, Predictor
from pneumoscope.runs import Run
from pneumoscope.specs import RESEARCH_USE, Spec

SIDE, CELLS = 32, 4
GRID = Grid(3.5, 8.0)  # 4 x 4 cells of 8 pixels
Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


class Eye(NamedTuple):
    """A model that looks at some cells: the logit is a sum over cells of weight x brightness."""

    weights: Floats
    bias: float = 0.0

    def maps(self, images: Images) -> Floats:
        cells = images.reshape(len(images), CELLS, 8, CELLS, 8).mean(axis=(2, 4)) / 255 - 0.5
        return np.asarray(cells * self.weights, dtype=np.float64)

    def outputs(self, images: Images) -> Outputs:
        maps = self.maps(images)
        logit = maps.sum(axis=(1, 2)) + self.bias
        score = 1 / (1 + np.exp(-logit))
        parts = (score, logit, np.full(len(images), self.bias), maps, maps.reshape(len(images), -1))
        return Outputs(*(each.astype(np.float32) for each in parts))

    def score(self, images: Images) -> npt.NDArray[np.float32]:
        return self.outputs(images).score


def centre() -> Eye:
    weights = np.zeros((CELLS, CELLS))
    weights[1:3, 1:3] = 6
    return Eye(weights)


def edges() -> Eye:
    weights = np.full((CELLS, CELLS), 4.0)
    weights[1:3, 1:3] = 0
    return Eye(weights)


def blotches(n: int, *, seed: int = 0) -> Images:
    """Cells of random brightness, so that every map has an order."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.integers(30, 226, (n, CELLS, CELLS)).repeat(8, 1).repeat(8, 2), dtype=np.uint8)


def sample_of(
    eye: Eye, images: Images, *, maps: npt.NDArray[Any] | None = None, threshold: float = 0.5, groups: int | None = None
) -> Sample:
    n = len(images)
    outputs = eye.outputs(images)
    if maps is not None:
        outputs = outputs._replace(evidence=maps.astype(np.float32))
    return Sample(
        image_ids=np.array([f"{at:016x}" for at in range(n)]),
        groups=np.array([f"p{at % (groups or n)}" for at in range(n)]),
        labels=(outputs.score > 0.5).astype(np.int8),
        images=images,
        outputs=outputs,
        threshold=threshold,
    )


# --- which images ----------------------------------------------------------------------------------------------------


def table(n_normal: int, n_sick: int) -> pd.DataFrame:
    labels = [0] * n_normal + [1] * n_sick
    return pd.DataFrame({"image_id": [f"{at:016x}" for at in range(len(labels))], "label": labels, "group": "g"})


@pytest.mark.parametrize(
    ("having", "n", "wanted"),
    [
        ((50, 50), 20, (10, 10)),
        ((3, 50), 20, (3, 17)),
        ((50, 3), 20, (17, 3)),
        ((4, 5), 64, (4, 5)),
        ((9, 9), 5, (2, 3)),
    ],
)
def test_both_labels_are_sampled_evenly_where_there_are_enough(
    having: tuple[int, int], n: int, wanted: tuple[int, int]
) -> None:
    rows = checks.sampled(table(*having), n_images=n, seed=1)
    assert ((rows["label"] == 0).sum(), (rows["label"] == 1).sum()) == wanted
    assert rows.index.tolist() == list(range(sum(wanted)))


def test_the_seed_picks_the_images_and_copies_count_once() -> None:
    rows = table(40, 40)
    first, again, other = (checks.sampled(rows, n_images=10, seed=seed)["image_id"].tolist() for seed in (1, 1, 2))
    assert first == again != other
    doubled = pd.concat([rows, rows], ignore_index=True)
    assert checks.sampled(doubled, n_images=200, seed=1)["image_id"].is_unique


def test_a_missing_label_is_refused() -> None:
    with pytest.raises(DataError, match="The validation images hold 5 NORMAL and 0 PNEUMONIA images, but the checks"):
        checks.sampled(table(5, 0), n_images=4, seed=1)


# --- the invariant ---------------------------------------------------------------------------------------------------


def test_maps_that_add_up_hold_and_others_do_not() -> None:
    images = blotches(6)
    good = invariant(sample_of(centre()._replace(bias=0.5), images))
    assert good.figures["holds"]
    assert good.figures["largest"] < 1e-5
    assert "the maps add up" in good.figures["sentence"]
    maps = centre().maps(images)
    maps[3, 0, 0] += 0.25
    bad = invariant(sample_of(centre(), images, maps=maps))
    assert not bad.figures["holds"]
    assert bad.figures["largest"] == pytest.approx(0.25, abs=1e-5)
    assert "do not add up, and must not be used" in bad.figures["sentence"]
    assert [row[4] > 0.2 for row in bad.rows] == [at == 3 for at in range(6)]


# --- deletion and insertion ------------------------------------------------------------------------------------------


def test_a_map_of_what_the_score_stands_on_beats_a_random_order_and_claims_no_more() -> None:
    eye = centre()
    found = perturbation(sample_of(eye, blotches(24)), eye.score, grid=GRID, seed=0).figures
    assert found["verdict"] == "used"
    areas = {kind: found["parts"]["all"][kind]["area"] for kind in ("deletion", "insertion")}
    assert areas["deletion"]["interval"]["high"] < 0 < areas["insertion"]["interval"]["low"]
    assert "not shown to localise disease" in found["sentence"]
    assert "better than chance" in found["sentence"]


def test_a_map_of_somewhere_else_is_not_shown_to_localise() -> None:
    eye, images = centre(), blotches(24)
    elsewhere = np.random.default_rng(5).normal(size=(24, CELLS, CELLS))
    found = perturbation(sample_of(eye, images, maps=elsewhere), eye.score, grid=GRID, seed=0).figures
    assert found["verdict"] == "not shown"
    assert "the maps are not shown to localise, not even what the score stands on" in found["sentence"]


def test_a_map_upside_down_is_said_to_be_worse_than_chance() -> None:
    eye, images = centre(), blotches(24)
    found = perturbation(sample_of(eye, images, maps=-eye.maps(images)), eye.score, grid=GRID, seed=0).figures
    assert found["verdict"] == "not shown"
    assert "(hiding and showing in random order does better)" in found["sentence"]


def test_a_score_that_heeds_nothing_gives_no_interval_and_no_claim() -> None:
    blind = Eye(np.zeros((CELLS, CELLS)), bias=1.0)
    maps = centre().maps(blotches(8))
    found = perturbation(sample_of(blind, blotches(8), maps=maps), blind.score, grid=GRID, seed=0).figures
    assert found["verdict"] == "not shown"
    assert found["parts"]["all"]["deletion"]["area"]["interval"] is None
    assert "no interval" in found["sentence"]


def test_the_curves_begin_and_end_where_they_must() -> None:
    eye, images = centre(), blotches(10)
    found = perturbation(sample_of(eye, images), eye.score, grid=GRID, seed=0).figures
    curves = found["parts"]["all"]
    whole = float(eye.score(images).mean())
    for order in ("map", "random"):
        assert curves["deletion"][order][0] == pytest.approx(whole, abs=1e-6)
        assert curves["insertion"][order][-1] == pytest.approx(whole, abs=1e-6)
        assert curves["deletion"][order][-1] == pytest.approx(curves["insertion"][order][0], abs=1e-6)
    assert found["untouched"] == pytest.approx(whole, abs=1e-6)


def test_blurring_that_raises_the_score_is_said() -> None:
    weights = np.zeros((CELLS, CELLS))
    weights[1:3, 1:3] = -6
    dark = np.full((8, SIDE, SIDE), 30, dtype=np.uint8)
    dark[:, 8:24, 8:24] = np.random.default_rng(0).integers(180, 250, (8, 16, 16))
    eye = Eye(weights)
    found = perturbation(sample_of(eye, dark), eye.score, grid=GRID, seed=0).figures
    assert found["hidden"] > found["untouched"]
    assert "Blurring all of an image raises its score" in found["sentence"]


def test_no_image_called_pneumonia_leaves_that_part_out() -> None:
    eye, images = centre(), blotches(6)
    sample = sample_of(eye, images, threshold=1.0)
    assert perturbation(sample, eye.score, grid=GRID, seed=0).figures["parts"]["called_pneumonia"] is None
    assert shares(sample, grid=GRID, seed=0).figures["parts"]["called_pneumonia"] is None
    part = {"called_pneumonia": None, "all": None}
    for draw in (evidence_figures.perturbation, evidence_figures.shares):
        draw(part, title="Nothing")


# --- where the evidence lies -----------------------------------------------------------------------------------------


def test_evidence_at_the_edges_is_found_and_evidence_in_the_middle_is_not() -> None:
    images = blotches(24)
    at_edges = shares(sample_of(edges(), images), grid=GRID, seed=0).figures
    assert "border" in at_edges["more_than_area"]
    assert "there is more evidence than area in the border" in at_edges["sentence"]
    in_middle = shares(sample_of(centre(), images), grid=GRID, seed=0).figures
    assert in_middle["more_than_area"] == []
    assert "in none of these is more evidence than area shown" in in_middle["sentence"]
    assert in_middle["parts"]["all"]["corners"]["difference"] < 0


def test_maps_of_zeros_say_nothing() -> None:
    images = blotches(4)
    found = shares(sample_of(centre(), images, maps=np.zeros((4, CELLS, CELLS))), grid=GRID, seed=0).figures
    assert found["parts"]["all"]["border"]["first"] is None
    assert found["sentence"] == "Where the evidence lies cannot be said: every map is zero everywhere."


# --- letters ---------------------------------------------------------------------------------------------------------


def test_a_model_that_looks_at_a_corner_is_caught_and_one_that_does_not_is_not() -> None:
    images = np.full((8, SIDE, SIDE), 20, dtype=np.uint8)
    images[:4, 8:24, 8:24] = 200
    calm = markers(sample_of(centre(), images), centre().score).figures
    assert (calm["flipped"], calm["largest_absolute"]) == (0, 0.0)
    assert "0 of 8 calls flip" in calm["sentence"]
    assert "changes calls" not in calm["sentence"]
    weights = centre().weights
    weights[0, 3] = 60
    eye = Eye(weights, bias=17.5)  # just under the threshold without a letter in that corner
    before = eye.score(images)
    found = markers(sample_of(eye, images, threshold=float(before.max()) + 1e-3), eye.score).figures
    by_corner = {each["corner"]: each for each in found["corners"]}
    assert by_corner["top right"]["to_pneumonia"] > 0
    assert by_corner["top right"]["largest"] > 0
    assert by_corner["bottom left"]["largest"] == 0
    assert found["flipped"] == by_corner["top right"]["to_pneumonia"]
    assert "What says nothing of a lung changes calls." in found["sentence"]


# --- weights ---------------------------------------------------------------------------------------------------------

SMOKE = Spec.preset_named("smoke")


@pytest.fixture(scope="module")
def seen() -> tuple[Any, Sample]:
    model = models.build("cnn", SMOKE)
    images = np.stack([phantom.draw(at % 2, seed=at, width_px=64, height_px=64) for at in range(10)])
    outputs = inference.network_of(model)(images)
    ids = np.array([f"{at:016x}" for at in range(10)])
    return model, Sample(ids, ids, np.arange(10, dtype=np.int8) % 2, images, outputs, 0.5)


def test_real_maps_follow_the_weights(seen: tuple[Any, Sample]) -> None:
    model, sample = seen
    before = [weights.copy() for weights in model.get_weights()]
    finding = randomisation(sample, model, seed=0, shuffles=2, depth=4)
    found = finding.figures
    assert found["verdict"] == "follow"
    assert len(found["layers"]) == 4
    assert found["layers"][0]["layer"] == "logit"
    assert len(finding.rows) == 4 * 2 * 10
    assert 0 < found["chance"] < found["limit"] < 1
    assert all(np.array_equal(one, two) for one, two in zip(before, model.get_weights(), strict=True))


def test_maps_that_stay_whatever_the_weights_are_caught(
    seen: tuple[Any, Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sample = seen
    still = [("logit", np.full(10, -0.97)), ("head", np.full(10, 0.96))]
    monkeypatch.setattr(explainer, "randomisation", lambda *_, **__: still)
    found = randomisation(sample, model, seed=0).figures
    assert found["verdict"] == "do not follow"
    assert "the maps do not follow the weights, and must not be read as what the model learned" in found["sentence"]


def test_flat_maps_leave_the_verdict_open(seen: tuple[Any, Sample]) -> None:
    model, sample = seen
    flat = Sample(sample.image_ids, sample.groups, sample.labels, sample.images,
                  sample.outputs._replace(evidence=np.zeros((10, 3, 3), np.float32)), 0.5)  # fmt: skip
    found = randomisation(flat, model, seed=0, shuffles=1, depth=2).figures
    assert (found["verdict"], found["chance"], found["n"]) == ("undefined", None, 0)
    assert "cannot be said" in found["sentence"]
    evidence_figures.randomisation(found, title="Nothing")


# --- paired ----------------------------------------------------------------------------------------------------------


def test_pairs_are_compared_image_by_image_over_groups() -> None:
    rng = np.random.default_rng(0)
    level, lift = rng.normal(0, 10, 60), rng.normal(1, 0.5, 60)
    alone = np.array([f"{at}" for at in range(60)])
    found = paired(level + lift, level, groups=alone, seed=0)
    assert found["difference"] == pytest.approx(lift.mean())
    assert found["interval"]["low"] > 0.7
    wide = paired(np.repeat(lift[:10], 6), np.zeros(60), groups=np.repeat(alone[:10], 6), seed=0)["interval"]
    narrow = paired(np.repeat(lift[:10], 6), np.zeros(60), groups=alone, seed=0)["interval"]
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])


def test_images_without_a_number_are_left_out() -> None:
    found = paired([1.0, np.nan, 3.0], [0.0, 0.0, 1.0], groups=np.array(["a", "b", "c"]), seed=0)
    assert (found["n"], found["first"], found["second"]) == (2, 2.0, 0.5)
    assert paired([np.nan], [1.0], groups=np.array(["a"]), seed=0) == {
        "n": 0, "first": None, "second": None, "difference": None, "interval": None,
    }  # fmt: skip


# --- the whole -------------------------------------------------------------------------------------------------------


def test_the_gallery_refuses_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match="The gallery got 0 images, 0 overlays and 0 captions; pass as many of each"):
        evidence_figures.gallery([], [], captions=[], scale=1, title="")
    with pytest.raises(UsageError, match="from 1 to 12"):
        evidence_figures.gallery([blotches(1)[0]] * 13, [], captions=["a"] * 13, scale=1, title="")


def test_one_image_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="The checks were asked for on 1 images; give 2 or more, for example 64"):
        checks.check(Run(tmp_path), "cnn", folder=tmp_path / "out", n_images=1)


@pytest.fixture(scope="module")
def finished(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PNEUMOSCOPE_CACHE", str(folder / "cache"))
        spec = SMOKE.with_overrides(['models=["cnn"]', "evaluation.bootstrap=0"])
        return pipeline.run(spec, tiny_set, folder / "run")


@pytest.mark.slow
def test_a_run_is_checked_into_files_that_agree(finished: Run, tmp_path: Path) -> None:
    content = checks.check(finished, "cnn", folder=tmp_path / "out", n_images=8)
    written = json.loads((tmp_path / "out" / "evidence_checks.json").read_text(encoding="utf-8"))
    assert written.pop("schema_version") == 1
    assert written == content
    assert content["split"] == "validation"
    assert content["n"] == content["n_positive"] + content["n_negative"] <= 8
    assert content["invariant"]["holds"]
    assert content["verdicts"][-1] == f"{RESEARCH_USE}."
    assert content["note"]  # the images are synthetic, and every picture says so
    assert len(content["verdicts"]) == 6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["evidence_checks.json", "evidence_checks.csv", *content["figures"]]
    )
    for name in content["figures"]:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.format == "PNG"
    with (tmp_path / "out" / "evidence_checks.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    assert tuple(lines[0]) == evidence_checks.HEADER
    assert {line[0] for line in lines[1:]} == {"randomisation", "perturbation", "shares", "markers", "invariant"}
    deletion = [float(line[4]) for line in lines if line[:3] == ["perturbation", "map", "deletion_area"]]
    assert np.mean(deletion) == pytest.approx(content["perturbation"]["parts"]["all"]["deletion"]["area"]["first"])
    text = (tmp_path / "out" / "evidence_checks.json").read_text(encoding="utf-8")
    assert "person" not in text
    assert "IM-" not in text
    again = checks.check(finished, "cnn", folder=tmp_path / "again", n_images=8)
    assert again == content
    with pytest.raises(UsageError, match="has no model 'ft'"):
        checks.check(finished, "ft", folder=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_a_model_says_is_gathered_in_batches() -> None:
    images, eye = blotches(evidence.BATCH + 3), centre()
    rows = table(20, 15)
    known = Description("tl", "T", SIDE, GRID, 1.0, {"youden": 0.4}, "validation", None, None, None, "")
    sizes = []

    def network(batch: Images) -> Outputs:
        sizes.append(len(batch))
        return eye.outputs(batch)

    sample = checks.look(Predictor(known, network), rows, images)
    assert sizes == [evidence.BATCH, 3]
    assert np.array_equal(sample.outputs.score, eye.score(images))
    assert sample.threshold == 0.4
