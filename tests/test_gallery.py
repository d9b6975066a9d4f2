"""The gallery: which images a run shows of its models, and under which names."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pneumoscope import _files, evidence, gallery, pipeline
from pneumoscope.catalog import Catalog
from pneumoscope.errors import RunError
from pneumoscope.evidence import Grid
from pneumoscope.gallery import KINDS, SIDE_PX
from pneumoscope.runs import Run
from pneumoscope.specs import LABELS, Spec
from pneumoscope.store import ImageStore

NO_WEIGHTS = "backbone.weights=/nowhere/weights"  # no backbone, so that nothing is compared by one: quicker


def rows_of(labels: list[int], *, groups: list[str] | None = None, ids: list[str] | None = None) -> pd.DataFrame:
    n = len(labels)
    return pd.DataFrame(
        {
            "label": labels,
            "group": groups or [f"g/{at}" for at in range(n)],
            "image_id": ids or [f"{at:016x}" for at in range(n)],
        }
    )


# --- which images ----------------------------------------------------------------------------------------------------


def test_a_score_on_the_threshold_is_called_normal() -> None:
    kinds = gallery.kinds_of([1, 1, 0, 0], [0.5, 0.6, 0.5, 0.6], threshold=0.5)
    assert kinds.tolist() == ["false_negative", "true_positive", "true_negative", "false_positive"]


def test_the_worst_errors_are_farthest_on_the_wrong_side_and_at_most_twelve() -> None:
    scores = np.linspace(0.01, 0.49, 20).tolist() + np.linspace(0.51, 0.99, 20).tolist()
    chosen = gallery.choose(rows_of([1] * 20 + [0] * 20), scores, threshold=0.5)
    assert chosen["false_negative"] == list(range(12))
    assert chosen["false_positive"] == list(range(39, 27, -1))
    assert chosen["true_positive"] == chosen["true_negative"] == []


def test_typical_hits_are_nearest_to_the_median_and_one_of_a_group() -> None:
    scores = [0.6, 0.7, 0.8, 0.81, 0.9, 0.99, 0.999]
    groups = ["a", "b", "c", "c", "d", "e", "f"]
    chosen = gallery.choose(rows_of([1] * 7, groups=groups), scores, threshold=0.5)
    assert chosen["true_positive"] == [3, 4, 1, 5, 6, 0]  # median 0.81; its neighbour of the same child is left out
    assert list(chosen) == list(KINDS)


def test_equal_scores_stand_by_content_whatever_their_order_and_copies_once() -> None:
    ids = ["c" * 16, "a" * 16, "b" * 16, "a" * 16]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        rows = rows_of([1] * 4, ids=[ids[at] for at in order])
        chosen = gallery.choose(rows, [0.1] * 4, threshold=0.5)["false_negative"]
        assert rows["image_id"].iloc[chosen].tolist() == ["a" * 16, "b" * 16, "c" * 16]


def test_a_label_without_images_leaves_its_kinds_empty() -> None:
    assert gallery.choose(rows_of([]), [], threshold=0.5) == {kind: [] for kind in KINDS}
    assert gallery.choose(rows_of([0]), [0.1], threshold=0.5)["true_negative"] == [0]


def test_samples_are_of_each_label_and_different_patients(packed: tuple[Catalog, ImageStore]) -> None:
    rows = packed[0].rows("train")
    found = gallery.samples(rows, seed=3)
    assert found == gallery.samples(rows.sample(frac=1, random_state=1), seed=3)
    assert found != gallery.samples(rows, seed=4)
    by_path = rows.set_index("path")
    for index, label in enumerate(LABELS):
        part = by_path.loc[[one["path"] for one in found[label]]]
        assert len(part) == gallery.SAMPLES
        assert (part["label"] == index).all()
        assert part["group"].is_unique
        assert [one["picture"] for one in found[label]] == [f"{image_id}.jpg" for image_id in part["image_id"]]
    assert gallery.samples(rows.iloc[:0], seed=3) == {label: [] for label in LABELS}


def test_findings_show_the_images_that_they_name_and_copies_once() -> None:
    rows = pd.DataFrame({"path": list("abcdefg"), "image_id": ["1", "1", "2", "3", "4", "5", "6"]})
    findings: list[dict[str, Any]] = [
        {"name": "near-duplicate", "sentence": "x", "examples": [["c", "d"], ["e", "f"], ["a", "g"]]},
        {"name": "duplicate-content", "sentence": "y", "examples": [["a", "b"]]},
        {"name": "group-across-validation", "sentence": "z", "examples": [["bacteria/7", "g"]]},
        {"name": "unreadable", "sentence": "u", "examples": ["gone"]},
        {"name": "large-group", "sentence": "v", "examples": ["bacteria/7"]},
    ]
    found = {one["name"]: [part["path"] for part in one["pictures"]] for one in gallery.of_findings(findings, rows)}
    assert found == {"near-duplicate": list("cdef"), "duplicate-content": ["a"], "group-across-validation": ["g"]}


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 224, 300])
def test_every_picture_has_one_size(size: int) -> None:
    pixels = np.tile(np.linspace(0, 255, size).astype(np.uint8), (size, 1))
    grey = Image.open(io.BytesIO(gallery.thumbnail(pixels)))
    assert (grey.size, grey.mode, grey.format) == ((SIDE_PX, SIDE_PX), "L", "JPEG")
    left, right = np.asarray(grey)[:, [5, -5]].mean(axis=0)
    assert left < 20 < 235 < right
    coloured = gallery.overlay(pixels, np.zeros((2, 2)), grid=Grid(size / 4 - 0.5, size / 2), scale=1.0)
    assert Image.open(io.BytesIO(coloured)).size == (SIDE_PX, SIDE_PX)


def test_colour_lies_where_the_cell_lies_in_the_image_whatever_its_size() -> None:
    cells = np.zeros((4, 4))
    cells[0, 3], cells[3, 0] = 1, -1
    for size in (64, 224, 448):
        grid = Grid(size / 8 - 0.5, size / 4)  # four cells that share the image evenly
        data = gallery.overlay(np.full((size, size), 128, np.uint8), cells, grid=grid, scale=1.0)
        seen = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        redder = seen[..., 0] - seen[..., 2]
        centre = SIDE_PX // 8
        assert redder[centre, -centre] > 80
        assert redder[-centre, centre] < -60
        assert abs(redder[centre, centre]) < 12


def test_the_overlay_is_that_of_evidence_where_nothing_is_resized() -> None:
    rng = np.random.default_rng(0)
    pixels, cells = np.full((SIDE_PX, SIDE_PX), 90, np.uint8), rng.normal(size=(7, 7))
    grid = Grid(31, 32)
    expected = evidence.overlay(pixels, cells, grid=grid, scale=2.0).astype(int)
    found = np.asarray(Image.open(io.BytesIO(gallery.overlay(pixels, cells, grid=grid, scale=2.0)))).astype(int)
    assert np.abs(found - expected).mean() < 3  # of 255: what a JPEG loses


# --- a run's gallery -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run of the smallest network on synthetic images, and its cache; copy it before changing it."""
    folder = tmp_path_factory.mktemp("gallery")
    spec = Spec.preset_named("smoke").with_overrides(
        ["models=cnn", "image.size_px=32", "evaluation.bootstrap=0", NO_WEIGHTS]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PNEUMOSCOPE_CACHE", str(folder / "cache"))
        return pipeline.run(spec, tiny_set, folder / "run"), folder / "cache"


def read(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.gallery_path.read_text(encoding="utf-8"))
    return found


def pictures_in(content: dict[str, Any]) -> set[str]:
    """Every file that the gallery names."""
    return set(re.findall(r'"([^"]+\.jpg)"', json.dumps(content)))


@pytest.fixture
def copy(finished: tuple[Run, Path], tmp_path: Path) -> tuple[Run, Catalog, ImageStore]:
    """The run in a folder of its own, with its images."""
    run = Run(shutil.copytree(finished[0].folder, tmp_path / "run"))
    catalog = Catalog.read(run.catalog_path, root=Path(run.read_manifest()["data"]))
    return run, catalog, ImageStore.pack(catalog, size_px=32, cache=finished[1])


def test_a_run_leaves_its_gallery_and_no_picture_that_it_does_not_name(finished: tuple[Run, Path]) -> None:
    run = finished[0]
    content = read(run)
    folder = run.gallery_path.parent
    assert {path.name for path in folder.iterdir()} == {"gallery.json", *pictures_in(content)}
    assert all(re.fullmatch(r"(cnn-)?[0-9a-f]{16}\.jpg", name) for name in pictures_in(content))
    assert (content["schema_version"], content["split"], content["reason"]) == (1, "test", None)
    assert content["note"] == "SYNTHETIC DATA"
    assert _files.size_of(folder) < 1_500_000


def test_cases_are_counted_and_scored_as_the_metrics_and_the_table_say(finished: tuple[Run, Path]) -> None:
    run = finished[0]
    of_model = read(run)["models"]["cnn"]
    point = _files.read_json(run.metrics_path)["models"]["cnn"]["test"]["operating_point"]
    assert (of_model["operating_point"], of_model["threshold"]) == (point["name"], point["threshold"])
    assert of_model["counts"] == {kind: point[f"{kind}s"] for kind in KINDS}
    table = {row["path"]: row for row in _files.read_csv(run.table_path("cnn", "test_yscores"))}
    groups = {row["path"]: row["group"] for row in _files.read_csv(run.catalog_path)}
    assert of_model["cases"]
    for case in of_model["cases"]:
        row = table[case["path"]]
        assert (case["score"], case["image_id"]) == (float(row["y_scores"]), row["image_id"])
        assert case["label"] == LABELS[int(row["y_true"])]
        assert case["group"] == groups[case["path"]]
        assert case["picture"] == f"{case['image_id']}.jpg"
        assert case["evidence"] == f"cnn-{case['image_id']}.jpg"
        called = case["score"] > point["threshold"]
        assert case["kind"].endswith("positive" if called else "negative")
        assert case["kind"].startswith("true") == (called == (case["label"] == "PNEUMONIA"))
    for kind in KINDS:
        ranks = [case["rank"] for case in of_model["cases"] if case["kind"] == kind]
        assert ranks == list(range(1, len(ranks) + 1))


def test_the_same_run_gives_the_same_gallery_and_clears_an_older_one_away(
    copy: tuple[Run, Catalog, ImageStore],
) -> None:
    run, catalog, store = copy
    before = {path.name: path.read_bytes() for path in run.gallery_path.parent.iterdir()}
    (run.gallery_path.parent / f"{'0' * 16}.jpg").write_bytes(b"of an older gallery")
    assert gallery.write(run, catalog, store) == run.gallery_path
    after = {path.name: path.read_bytes() for path in run.gallery_path.parent.iterdir()}
    assert after == before


def test_without_test_images_the_cases_are_of_validation_at_one_half_where_no_point_was_chosen(
    copy: tuple[Run, Catalog, ImageStore],
) -> None:
    run, catalog, store = copy
    measured = _files.read_json(run.metrics_path)
    del measured["models"]["cnn"]["test"]
    measured["models"]["cnn"]["validation"]["operating_point"] = None
    _files.write_json(run.metrics_path, {key: value for key, value in measured.items() if key != "schema_version"})
    run.audit_path.unlink()
    gallery.write(run, catalog, store)
    content = read(run)
    assert (content["split"], content["findings"]) == ("validation", [])
    of_model = content["models"]["cnn"]
    assert (of_model["operating_point"], of_model["threshold"]) == ("half", 0.5)
    assert sum(of_model["counts"].values()) == len(catalog.rows("validation"))


def test_a_model_that_has_no_map_has_its_cases_all_the_same(copy: tuple[Run, Catalog, ImageStore]) -> None:
    run, catalog, store = copy
    run.model_path("cnn").unlink()
    gallery.write(run, catalog, store)
    content = read(run)
    of_model = content["models"]["cnn"]
    assert of_model["cases"]
    assert {case["evidence"] for case in of_model["cases"]} == {None}
    assert "cannot be loaded" in of_model["evidence_reason"]
    assert not [name for name in pictures_in(content) if name.startswith("cnn-")]


def test_no_measured_model_is_told(copy: tuple[Run, Catalog, ImageStore]) -> None:
    run, catalog, store = copy
    measured = _files.read_json(run.metrics_path)
    _files.write_json(run.metrics_path, {"models": {}, "note": measured["note"]})
    gallery.write(run, catalog, store)
    content = read(run)
    assert (content["split"], content["models"]) == (None, {})
    assert content["reason"] == "No model of this run was measured on validation or test images."
    assert content["samples"]["train"]["NORMAL"]


def test_scores_of_other_images_are_refused(copy: tuple[Run, Catalog, ImageStore]) -> None:
    run, catalog, store = copy
    path = run.table_path("cnn", "test_yscores")
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(RunError) as caught:
        gallery.write(run, catalog, store)
    assert str(caught.value) == (
        f"{path} does not hold the scores of this run's 16 test images in their order; score them again with "
        "pneumoscope evaluate."
    )
