"""Folds and seeds put together: every image once, honest spreads, refusals where runs do not belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from pneumoscope import _files, repeats
from pneumoscope.catalog import COLUMNS, Catalog
from pneumoscope.errors import RunError
from pneumoscope.runs import Run
from pneumoscope.specs import EvaluationSpec, Spec

N = 60
SPEC = Spec.preset_named("smoke").with_overrides(["models=['tl', 'ft']"])
FAST = EvaluationSpec(bootstrap=40)


def catalog(folder: Path, held: npt.NDArray[np.bool_]) -> Catalog:
    rows = pd.DataFrame(
        {
            "path": [f"train/{at:03d}.jpeg" for at in range(N)] + ["test/0.jpeg", "train/bad.jpeg"],
            "image_id": [f"{at:016x}" for at in range(N + 2)],
            "split": [("validation" if at % 4 else "calibration") if held[at] else "train" for at in range(N)]
            + ["test", "train"],
            "label": np.r_[np.arange(N) % 2, 1, 0].astype(np.int8),
            "group": [f"IM/{at // 2}" for at in range(N + 2)],
            "subtype": "",
            "width_px": 100,
            "height_px": 90,
            "file_bytes": 5,
            "status": ["ok"] * (N + 1) + ["truncated"],
        }
    )
    return Catalog(folder, rows[list(COLUMNS)].astype({"label": "int8"}))


def scores_of(model: str) -> npt.NDArray[np.float32]:
    noise = np.random.default_rng(len(model) if model == "tl" else 9).normal(0, {"tl": 0.6, "ft": 0.2}[model], N)
    return (1 / (1 + np.exp(-3 * (np.arange(N) % 2 - 0.5 + noise)))).astype(np.float32)


def fold_runs(root: Path, folds: int = 3, *, status: str = "finished") -> list[Run]:
    runs = []
    for fold in range(folds):
        run = Run(root / str(fold + 1))
        run.folder.mkdir(parents=True)
        held = np.arange(N) // 2 % folds == fold
        listed = catalog(run.folder, held)
        listed.write(run.catalog_path)
        _files.write_text(run.spec_path, SPEC.to_toml())
        run.update_manifest(status=status)
        for model in SPEC.models:
            for split in repeats.HELD_OUT:
                part = listed.rows(split)
                scores = scores_of(model)[part["path"].str.slice(6, 9).astype(int)].tolist()
                cells = zip(part["label"].tolist(), scores, part["image_id"], part["path"], strict=True)
                path = run.table_path(model, f"{split}_yscores")
                path.parent.mkdir(exist_ok=True)
                _files.write_csv(path, ["y_true", "y_scores", "image_id", "path"], cells)
        runs.append(run)
    return runs


def test_every_training_image_is_held_out_once_validation_and_calibration_alike(tmp_path: Path) -> None:
    pooled = repeats.out_of_fold(fold_runs(tmp_path))
    assert list(pooled) == ["tl", "ft"]
    for model, predictions in pooled.items():
        assert predictions.table["path"].tolist() == [f"train/{at:03d}.jpeg" for at in range(N)]
        assert np.array_equal(predictions.scores.astype(np.float32), scores_of(model))
        assert np.array_equal(predictions.labels, np.arange(N) % 2)


def test_the_pooled_and_the_folds_areas_are_scikit_learns(tmp_path: Path) -> None:
    runs = fold_runs(tmp_path)
    content = repeats.cross_validated(runs, repeats.out_of_fold(runs), spec=FAST)
    labels, fold_of = np.arange(N) % 2, np.arange(N) // 2 % 3
    for model in SPEC.models:
        found = content["models"][model]
        assert found["out_of_fold"]["auc"] == pytest.approx(roc_auc_score(labels, scores_of(model)), abs=1e-9)
        expected = [roc_auc_score(labels[fold_of == fold], scores_of(model)[fold_of == fold]) for fold in range(3)]
        assert found["auc_by_fold"] == pytest.approx(expected, abs=1e-9)
    (compared,) = content["comparisons"]
    assert (compared["first"], compared["second"], compared["n_groups"]) == ("tl", "ft", N // 2)
    assert content["folds"] == 3
    assert content["sentences"][0].startswith(
        f"tl: AUC {content['models']['tl']['out_of_fold']['auc']:.4f} over the 60 images of 3 folds together; "
        "fold by fold 0."
    )
    assert content["sentences"][-1] == compared["sentence"]
    _files.write_json(tmp_path / "repeats.json", content)


def test_out_of_fold_scores_are_written_like_any_scores(tmp_path: Path) -> None:
    target = Run(tmp_path / "run")
    (tmp_path / "run" / "tables").mkdir(parents=True)
    pooled = repeats.out_of_fold(fold_runs(tmp_path / "folds"))
    paths = repeats.write_out_of_fold(target, pooled)
    assert [path.name for path in paths] == ["tl_out_of_fold_yscores.csv", "ft_out_of_fold_yscores.csv"]
    rows = _files.read_csv(paths[0])
    assert len(rows) == N
    assert list(rows[0]) == ["y_true", "y_scores", "image_id", "path"]


def test_an_unfinished_fold_is_refused(tmp_path: Path) -> None:
    runs = fold_runs(tmp_path, status="stopped")
    with pytest.raises(RunError, match=r"^The run in \S+ is stopped, not finished; run the command with --resume\.$"):
        repeats.out_of_fold(runs)


@pytest.mark.parametrize(("chosen", "found"), [([0, 1], 40), ([0, 0, 1, 2], 60)])
def test_folds_that_are_not_of_one_division_are_refused(chosen: list[int], found: int, tmp_path: Path) -> None:
    runs = fold_runs(tmp_path)
    with pytest.raises(
        RunError,
        match=rf"^The {len(chosen)} folds hold out {found} of 60 images, and some perhaps twice; they are not folds of "
        r"one division: make them again in a new folder\.$",
    ):
        repeats.out_of_fold([runs[at] for at in chosen])


def seed_run(root: Path, seed: int, figures: dict[str, tuple[float | None, float, float]]) -> Run:
    run = Run(root / str(seed))
    run.folder.mkdir(parents=True)
    _files.write_text(run.spec_path, SPEC.with_overrides([f"seed={seed}"]).to_toml())
    models: dict[str, Any] = {
        name: {"test": {"auc": auc, "operating_point": {"sensitivity": sensitivity, "specificity": specificity}}}
        for name, (auc, sensitivity, specificity) in figures.items()
    }
    _files.write_json(run.metrics_path, {"models": models})
    return run


def test_seeds_are_summed_up_with_their_spread(tmp_path: Path) -> None:
    runs = [
        seed_run(tmp_path, 1, {"tl": (0.9, 0.8, 0.7), "ft": (0.95, 0.9, 0.6)}),
        seed_run(tmp_path, 2, {"tl": (0.92, 0.8, 0.7), "ft": (0.91, 0.9, 0.8)}),
        seed_run(tmp_path, 3, {"tl": (0.94, 0.8, 0.7), "ft": (0.96, 0.9, 0.7)}),
    ]
    content = repeats.over_seeds(runs)
    assert content["seeds"] == [1, 2, 3]
    auc = content["models"]["tl"]["auc"]
    assert auc.pop("values") == [0.9, 0.92, 0.94]
    assert auc == pytest.approx({"mean": 0.92, "sd": 0.02, "min": 0.9, "max": 0.94})
    assert content["best"] == {"tl": 1, "ft": 2}
    assert content["sentences"] == [
        f"{model}: AUC on test {auc} over 3 seeds; sensitivity {sensitivity}, specificity {specificity} at the "
        f"operating point."
        for model, auc, sensitivity, specificity in (
            ("tl", "0.9200 (0.9000 to 0.9400)", "0.8000 (0.8000 to 0.8000)", "0.7000 (0.7000 to 0.7000)"),
            ("ft", "0.9400 (0.9100 to 0.9600)", "0.9000 (0.9000 to 0.9000)", "0.7000 (0.6000 to 0.8000)"),
        )
    ] + [
        "Highest AUC on test: tl 1 of 3, ft 2 of 3 seeds.",
    ]


def test_models_that_are_equal_are_each_counted_as_best(tmp_path: Path) -> None:
    runs = [seed_run(tmp_path, seed, {"tl": (1.0, 1.0, 1.0), "ft": (1.0, 1.0, 1.0)}) for seed in (1, 2)]
    assert repeats.over_seeds(runs)["best"] == {"tl": 2, "ft": 2}


def test_figures_that_are_undefined_stay_so(tmp_path: Path) -> None:
    runs = [seed_run(tmp_path, seed, {"tl": (None, 1.0, 1.0)}) for seed in (1, 2)]
    content = repeats.over_seeds(runs)
    assert content["models"]["tl"]["auc"] == {
        "values": [None, None],
        "mean": None,
        "sd": None,
        "min": None,
        "max": None,
    }
    assert content["best"] == {"tl": 0}
    assert "AUC on test undefined over 2 seeds" in content["sentences"][0]
