"""A run's model leaves as a bundle that answers as the run does, or does not leave at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pneumoscope import _files, export, onnx_graph, phantom, pipeline
from pneumoscope.bundle import Bundle
from pneumoscope.errors import PneumoscopeError, RunError, StoreError, UsageError
from pneumoscope.predictions import Predictions
from pneumoscope.runs import Run
from pneumoscope.specs import Spec

SPEC = Spec.preset_named("smoke").with_overrides(
    ["image.size_px=64", "image.jpeg_quality=50", 'models=["cnn","tl"]', "split.calibration=0.3"]
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack the images once for all tests here."""
    monkeypatch.setenv("PNEUMOSCOPE_CACHE", str(cache))


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A finished run of two approaches on synthetic images; only its reference files are added to."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PNEUMOSCOPE_CACHE", str(cache))
        data = phantom.write_dataset(folder / "chest", n_train=80, n_test=24, seed=3, size_px=96)
        yield pipeline.run(SPEC, data, folder / "run")


@pytest.fixture(scope="module")
def bundles(run: Run, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PNEUMOSCOPE_CACHE", str(cache))
        return {name: export.export(run, name, folder / name) for name in ("cnn", "tl")}


def files_of(run: Run, split: str) -> list[bytes]:
    names = _files.read_csv(run.table_path("cnn", f"{split}_yscores"))
    return [(Path(run.read_manifest()["data"]) / row["path"]).read_bytes() for row in names]


@pytest.mark.parametrize("name", ["cnn", "tl"])
def test_a_bundle_answers_from_the_files_as_the_run_scored_them(
    run: Run, bundles: dict[str, Bundle], name: str
) -> None:
    by_bundle, by_run = bundles[name].predictor(), export.open_predictor(run, name)
    for split in ("validation", "test"):
        written = [float(row["y_scores"]) for row in _files.read_csv(run.table_path(name, f"{split}_yscores"))]
        pictures = [by_bundle.read(data) for data in files_of(run, split)]
        first, second = by_bundle.answer(pictures), by_run.answer(pictures)
        np.testing.assert_allclose([answer.score for answer in first], written, atol=1e-4)
        np.testing.assert_allclose([answer.score for answer in second], written, atol=1e-4)
        assert [answer.call for answer in first] == [answer.call for answer in second]
        assert [answer.assessable for answer in first] == [answer.assessable for answer in second]
        for one, other in zip(first, second, strict=True):
            np.testing.assert_allclose(one.evidence, other.evidence, atol=1e-3)
            assert one.evidence.sum() + one.bias == pytest.approx(one.logit, abs=1e-3)


def test_a_bundle_knows_what_its_run_knew(run: Run, bundles: dict[str, Bundle]) -> None:
    known, measured = bundles["tl"].description, _files.read_json(run.metrics_path)
    entry = measured["models"]["tl"]["validation"]
    assert known.points == {name: point["threshold"] for name, point in entry["operating_points"].items()}
    assert known.point[0] == entry["operating_point"]["name"]
    assert known.chosen_on == measured["chosen_on"] == "calibration"
    assert known.metrics["test"]["auc"] == measured["models"]["tl"]["test"]["auc"]
    assert "subgroups" not in known.metrics["test"]
    assert known.note == run.read_manifest()["note"] != ""
    assert known.provenance["model_sha256"] == _files.sha256_of_file(run.model_path("tl"))
    assert str(run.folder.parent) not in json.dumps(bundles["tl"].content)  # where it was made is nobody's business
    assert known.curve is not None
    chosen = measured["models"]["tl"]["calibration"]["operating_point"]
    rates = known.curve.at(known.point[1])
    np.testing.assert_allclose(rates, [chosen["sensitivity"], chosen["specificity"]])
    assert {split: part["n"] for split, part in bundles["tl"].content["parity"].items()} == {
        split: part["n"] for split, part in measured["models"]["tl"].items()
    }
    unlike = bundles["tl"].content["not_assessable"]
    assert set(unlike) == set(measured["models"]["tl"])
    assert all(0 <= count <= measured["models"]["tl"][split]["n"] for split, count in unlike.items())


def test_nothing_that_is_no_array_is_in_a_bundle(bundles: dict[str, Bundle]) -> None:
    assert sorted(path.name for path in bundles["tl"].folder.iterdir()) == [
        "bundle.json",
        "model.onnx",
        "model_card.md",
    ]
    proto = onnx.load(bundles["tl"].folder / "model.onnx")
    assert all(constant.data_location == onnx.TensorProto.DEFAULT for constant in proto.graph.initializer)


def test_what_is_usual_is_learned_once_and_anew_for_another_model(run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "run")
    kept = Run(folder).reference_path("cnn")
    first = export.open_predictor(Run(folder), "cnn").description.familiarity
    before = kept.stat().st_mtime_ns
    second = export.open_predictor(Run(folder), "cnn").description.familiarity
    assert first is not None
    assert second is not None
    assert (first.threshold, kept.stat().st_mtime_ns) == (second.threshold, before)
    _files.write_json(kept, _files.read_json(kept) | {"model_sha256": "0"})
    export.open_predictor(Run(folder), "cnn")
    assert kept.stat().st_mtime_ns != before


def test_a_run_that_may_not_be_written_answers_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = run.folder / "spec.toml" / "cnn.reference.json"  # a file has no files, even for root
    monkeypatch.setattr(Run, "reference_path", lambda *_: nowhere)
    assert export.open_predictor(run, "cnn").description.familiarity is not None


def test_a_run_whose_images_are_gone_still_answers(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PNEUMOSCOPE_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(run.folder, tmp_path / "run")
    Run(folder).reference_path("cnn").unlink(missing_ok=True)
    Run(folder).update_manifest(data=str(tmp_path / "gone"))
    predictor = export.open_predictor(Run(folder), "cnn")
    answer = predictor.answer([predictor.read(files_of(run, "test")[0])])[0]
    assert answer.assessable is None
    assert answer.reason.startswith("Whether the image is like the training images is not known: ")
    with pytest.raises(PneumoscopeError, match="was listed but is missing now"):
        export.export(Run(folder), "cnn", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_network_that_scores_otherwise_is_not_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = onnx_graph.build

    def wrong(model: Any, **options: Any) -> onnx.ModelProto:
        proto = honest(model, **options)
        bias = next(constant for constant in proto.graph.initializer if constant.name == "logit/bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.5), bias.name))
        return proto

    monkeypatch.setattr(onnx_graph, "build", wrong)
    with pytest.raises(RunError, match=r"scores validation images up to 0\.\d+ otherwise .* nothing was written"):
        export.export(run, "cnn", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_other_ways_to_keep_weights_pass_the_same_gate_or_are_refused(run: Run, tmp_path: Path) -> None:
    for weights, allowed in export.LARGEST_DIFFERENCE.items():
        try:
            made = export.export(run, "cnn", tmp_path / weights, weights=weights)  # type: ignore[arg-type]
        except RunError as error:
            assert weights != "float32"
            assert "--weights float32" in str(error)  # noqa: PT017
            assert not (tmp_path / weights).exists()
            continue
        assert made.content["weights"] == weights
        assert all(part["difference"] <= allowed for part in made.content["parity"].values())
    whole = (tmp_path / "float32" / "model.onnx").stat().st_size
    half = tmp_path / "float16" / "model.onnx"
    assert half.exists()
    assert half.stat().st_size < 0.7 * whole


def scored(scores: list[float]) -> Predictions:
    import pandas as pd

    rows = pd.DataFrame(
        {"path": ["a", "b", "c", "d"], "image_id": list("abcd"), "split": "validation", "label": [0, 0, 1, 1]}
    )
    return Predictions.of(rows, scores)


def test_the_gate_of_integers_looks_at_scores_and_at_the_auc() -> None:
    before = scored([0.1, 0.495, 0.505, 0.9])
    near = export.compare(before, scored([0.1, 0.505, 0.495, 0.9]), threshold=0.5)
    assert (near.n, near.flipped, near.auc_before, near.auc) == (4, 2, 1.0, 0.75)
    assert near.difference == pytest.approx(0.01, abs=1e-6)
    with pytest.raises(RunError, match=r"In 8-bit integers the AUC on test falls by 0\.2500 to 0\.7500"):
        export.require_alike({"test": near}, weights="int8")
    with pytest.raises(RunError, match=r"up to 0\.0100 otherwise .*2 of 4 calls differ"):
        export.require_alike({"test": near}, weights="float16")
    export.require_alike({"test": export.compare(before, before, threshold=0.5)}, weights="float32")


@pytest.mark.parametrize(
    ("model", "weights", "words"),
    [("ft", "float32", "has no model 'ft'; it has cnn, tl"), ("cnn", "bf16", "cannot be kept as 'bf16'")],
)
def test_what_cannot_be_exported_is_said(run: Run, tmp_path: Path, model: str, weights: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        export.export(run, model, tmp_path / "bundle", weights=weights)  # type: ignore[arg-type]


def test_an_unfinished_run_and_a_folder_of_something_else_are_refused(run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear to me")
    with pytest.raises(StoreError, match="is there and is no bundle"):
        export.export(run, "cnn", tmp_path / "mine")
    Run(folder).update_manifest(status="stopped")
    with pytest.raises(RunError, match="is stopped, not finished"):
        export.export(Run(folder), "cnn", tmp_path / "bundle")


def test_keras_and_tensorflow_lite_are_written_beside_and_score_alike(run: Run, tmp_path: Path) -> None:
    export.also(run, "cnn", tmp_path / "out" / "model.keras")
    assert (tmp_path / "out" / "model.keras").read_bytes() == run.model_path("cnn").read_bytes()
    export.also(run, "cnn", tmp_path / "out" / "model.tflite")
    assert (tmp_path / "out" / "model.tflite").read_bytes()[4:8] == b"TFL3"
    with pytest.raises(UsageError, match=r"ends in '\.h5'; a model can be written as \.keras or \.tflite"):
        export.also(run, "cnn", tmp_path / "model.h5")


def test_tensorflow_lite_that_scores_otherwise_is_not_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pneumoscope._backend.lite", lambda model, path: lambda image: 0.5)
    with pytest.raises(RunError, match="nothing was written"):
        export.also(run, "cnn", tmp_path / "model.tflite")
    assert not (tmp_path / "model.tflite").exists()


def test_a_network_that_is_changed_after_its_bundle_was_opened_does_not_run(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    bundle = Bundle.open(shutil.copytree(bundles["cnn"].folder, tmp_path / "bundle"))
    (tmp_path / "bundle" / "model.onnx").write_bytes((bundles["tl"].folder / "model.onnx").read_bytes())
    with pytest.raises(StoreError, match="was changed while it was in use"):
        bundle.predictor()


def test_8_bit_weights_have_figures_of_their_own(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST_DIFFERENCE", dict.fromkeys(export.LARGEST_DIFFERENCE, 1.0))
    monkeypatch.setattr(export, "LARGEST_AUC_LOSS", 1.0)
    known = export.export(run, "tl", tmp_path / "int8", weights="int8").description
    for split, figures in known.metrics.items():
        assert figures["operating_point"]["threshold"] == known.point[1], split
    own = _files.read_json(run.metrics_path)["models"]["tl"]["validation"]
    assert known.metrics["validation"]["loss"] != own["loss"]
