"""The verbs that use trained models, and what MODEL stands for on the command line."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import reported
from pneumoscope import _chosen, _files, cli, phantom, pipeline, serving
from pneumoscope.bundle import Bundle
from pneumoscope.errors import PneumoscopeError, RunError, StoreError, UsageError
from pneumoscope.runs import Run
from pneumoscope.specs import Spec

SPEC = Spec.preset_named("smoke").with_overrides(["image.size_px=32", 'models=["cnn"]', "train.epochs=2"])

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PNEUMOSCOPE_CACHE", str(cache))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom.write_dataset(tmp_path_factory.mktemp("data") / "chest", n_train=60, n_test=24, seed=5, size_px=64)


@pytest.fixture(scope="module")
def run(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PNEUMOSCOPE_CACHE", str(cache))
        yield pipeline.run(SPEC, data, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def bundle(run: Run, cache: Path) -> Bundle:
    """As `serve` makes it of a run: in the cache, by another process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PNEUMOSCOPE_CACHE", str(cache))
        return _chosen.bundle_of(f"{run.folder}:cnn")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call the command line in this process: status, output, errors."""

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pneumoscope", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return go


# --- what MODEL stands for -------------------------------------------------------------------------------------------


def test_model_is_a_bundle_a_run_or_one_model_of_a_run(run: Run, bundle: Bundle) -> None:
    found = _chosen.find(str(bundle.folder))
    assert isinstance(found, Bundle)
    assert found.content == bundle.content
    assert _chosen.find(str(run.folder)) == (run, "cnn")
    assert _chosen.find(f"{run.folder}:cnn") == (run, "cnn")


def test_of_several_models_the_best_on_validation_is_taken(run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "run")
    spec = Spec.preset_named("smoke")
    _files.write_text(folder / "spec.toml", spec.to_toml())
    content = _files.read_json(folder / "metrics.json")
    entry = content["models"]["cnn"]["validation"]
    for name, auc in (("cnn", 0.7), ("tl", 0.9), ("ft", None)):
        content["models"][name] = {"validation": entry | {"auc": auc}, "test": entry | {"auc": 1.0}}
        shutil.copy(run.model_path("cnn"), folder / "models" / f"{name}.keras")
    del content["schema_version"]
    _files.write_json(folder / "metrics.json", content)
    assert _chosen.find(str(folder)) == (Run(folder), "tl")


def test_a_folder_whose_name_has_a_colon_is_itself(bundle: Bundle, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle.folder, tmp_path / "a:cnn")
    found = _chosen.find(str(folder))
    assert isinstance(found, Bundle)
    assert found.folder == folder


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("{tmp}/nothing", UsageError, "is neither a bundle nor a run"),
        ("{tmp}/nothing:ft", UsageError, "is neither a bundle nor a run"),
        ("{tmp}", UsageError, "give a folder that pneumoscope export or run has made, or RUN:ft"),
        ("{run}:ft", UsageError, "has no model 'ft'; it has cnn"),
        ("{bundle}:cnn", UsageError, "is neither a bundle nor a run"),
    ],
)
def test_what_is_no_model_is_said(
    run: Run, bundle: Bundle, tmp_path: Path, text: str, kind: type[PneumoscopeError], words: str
) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        _chosen.find(text.format(tmp=tmp_path, run=run.folder, bundle=bundle.folder))


def test_a_run_without_a_model_is_said(tmp_path: Path, run: Run) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("models"))
    with pytest.raises(RunError, match="has no measured model; run it to its end first"):
        _chosen.find(str(folder))


def test_a_run_is_exported_once_and_what_hinders_it_is_said(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    before = (bundle.folder / "bundle.json").stat().st_mtime_ns
    assert _chosen.bundle_of(str(run.folder)).folder == bundle.folder
    assert (bundle.folder / "bundle.json").stat().st_mtime_ns == before
    folder = shutil.copytree(run.folder, tmp_path / "run")
    Run(folder).update_manifest(status="stopped")
    with Path(folder / "models" / "cnn.keras").open("ab") as file:
        file.write(b"another")  # so that it is not the exported one
    with pytest.raises(PneumoscopeError, match=r"^The run in .* is stopped, not finished; "):
        _chosen.bundle_of(str(folder))


def test_an_export_that_was_broken_off_hinders_no_later_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PNEUMOSCOPE_CACHE", str(tmp_path / "cache"))

    def breaks_off(words: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(words[-1]) / "model.onnx").write_bytes(b"half")
        return subprocess.CompletedProcess(words, 137, "", "")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", breaks_off)
        with pytest.raises(PneumoscopeError, match=r"^it ended with status 137$"):
            _chosen.bundle_of(f"{run.folder}:cnn")
    assert _chosen.bundle_of(f"{run.folder}:cnn").description.model == "cnn"


@pytest.mark.parametrize("gone", ["bundle.json", "model.onnx"])
def test_what_a_broken_off_deletion_left_in_the_cache_is_exported_anew(
    run: Run, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    monkeypatch.setenv("PNEUMOSCOPE_CACHE", str(tmp_path / "cache"))
    left = shutil.copytree(bundle.folder, tmp_path / "cache" / bundle.folder.name)
    (left / gone).unlink()
    found = _chosen.bundle_of(f"{run.folder}:cnn")
    assert (found.folder, found.description.model) == (left, "cnn")


def test_a_bundle_that_was_changed_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    network = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(network[:-1] + bytes([network[-1] ^ 1]))
    with pytest.raises(StoreError, match="its SHA-256 differs"):
        _chosen.find(str(folder))
    (folder / "model.onnx").unlink()
    with pytest.raises(StoreError, match=r"holds no model\.onnx"):
        _chosen.find(str(folder))


# --- the verbs -------------------------------------------------------------------------------------------------------


def test_predict_answers_alike_from_a_run_and_from_its_bundle(
    run: Run, bundle: Bundle, data: Path, tmp_path: Path, call: Call
) -> None:
    tables = []
    for name, model in (("run", run.folder), ("bundle", bundle.folder)):
        status, out, _ = call("predict", data / "test", "--model", model, "--csv", tmp_path / f"{name}.csv")
        assert status == 0
        assert "Research use only, not a medical device." in out
        with (tmp_path / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file)))
    first, second = tables
    assert list(first[0]) == ["file", "score", "call", "assessable", "reason"]
    assert len(first) == 24
    for one, other in zip(first, second, strict=True):
        assert float(one.pop("score")) == pytest.approx(float(other.pop("score")), abs=1e-4)
        assert one["assessable"] == other["assessable"]
        assert (one["file"], one["call"]) == (other["file"], other["call"])


def test_predict_draws_the_evidence(bundle: Bundle, data: Path, tmp_path: Path, call: Call) -> None:
    image = sorted((data / "test").rglob("*.jpeg"))[0]
    assert call("predict", image, "--model", bundle.folder, "--evidence", tmp_path / "maps")[0] == 0
    assert [path.name for path in (tmp_path / "maps").iterdir()] == [f"{image.stem}.evidence.png"]


@pytest.mark.parametrize(("at", "words"), [("0", "PNEUMONIA"), ("1", "NORMAL"), ("youden", None)])
def test_predict_calls_at_the_point_that_is_asked_for(
    bundle: Bundle, data: Path, call: Call, at: str, words: str | None
) -> None:
    status, out, _ = call("predict", data / "test", "--model", bundle.folder, "--at", at, "--json")
    events = [json.loads(line) for line in out.splitlines()]
    calls = {event["call"] for event in events if event["event"] == "answer"}
    assert status == 0
    assert calls == {words} if words else calls <= {"NORMAL", "PNEUMONIA"}


def test_predict_refuses_what_it_cannot_do_in_one_sentence(
    bundle: Bundle, data: Path, tmp_path: Path, call: Call
) -> None:
    model = ("--model", bundle.folder)
    for words, expected, text in (
        ((data, *model, "--at", "best"), 2, "has no operating point 'best'"),
        ((data, *model, "--at", "nan"), 2, "The threshold is nan"),
        ((data, "--model", tmp_path), 2, "is neither a bundle nor a run"),
        ((tmp_path / "nothing.png", *model), 1, "nothing.png"),
    ):
        status, _, err = call("predict", *words)
        assert (status, err.startswith("pneumoscope: "), text in err) == (expected, True, True), err
        assert "Traceback" not in err


def test_export_writes_a_bundle(run: Run, tmp_path: Path, call: Call) -> None:
    status, out, _ = call("export", run.folder, "--model", "cnn", "-o", tmp_path / "bundle")
    assert status == 0
    assert f"The bundle is in {tmp_path / 'bundle'}" in out
    assert Bundle.open(tmp_path / "bundle").description.model == "cnn"
    status, _, err = call("export", run.folder, "--model", "cnn", "-o", tmp_path / "b", "--weights", "int4")
    assert (status, "cannot be kept as 'int4'" in err) == (2, True)


def test_recalibrate_writes_another_bundle_with_the_same_network(
    run: Run, bundle: Bundle, data: Path, tmp_path: Path, call: Call
) -> None:
    status, _, err = call("recalibrate", run.folder, data, "-o", tmp_path / "site", "--width", "0.2")
    assert status == 0, err
    made = Bundle.open(tmp_path / "site")
    assert made.content["sha256"] == bundle.content["sha256"]
    assert made.description.chosen_on == "site"
    assert call("recalibrate", bundle.folder, data, "-o", bundle.folder)[0] == 2


def test_explain_writes_its_findings(run: Run, tmp_path: Path, call: Call) -> None:
    status, out, err = call("explain", run.folder, "-o", tmp_path / "explained", "--images", "4")
    assert status == 0, err
    content = _files.read_json(tmp_path / "explained" / "evidence_checks.json")
    assert content["verdicts"]
    assert content["verdicts"][0] in out


def test_serve_hands_the_model_and_the_wishes_on(
    run: Run, bundle: Bundle, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(serving, "serve", lambda model, **wishes: asked.update(wishes, model=model.folder))
    monkeypatch.setenv("PNEUMOSCOPE_API_KEY", "secret")
    assert call("serve", "--model", run.folder, "--port", "0", "--host", "0.0.0.0")[0] == 0
    asked.pop("on_ready")
    assert asked == {
        "model": bundle.folder, "host": "0.0.0.0", "port": 0, "api_key": "secret", "insecure": False, "threads": 0,
    }  # fmt: skip


def test_serve_beyond_this_machine_needs_a_key_or_a_word(bundle: Bundle, call: Call) -> None:
    status, _, err = call("serve", "--model", bundle.folder, "--host", "0.0.0.0", "--port", "0")
    assert status == 2
    assert "lets everyone who can reach this machine send images" in err


# --- the report ------------------------------------------------------------------------------------------------------


def test_report_writes_the_page_anew(run: Run, call: Call) -> None:
    assert run.report_path.exists()  # every run ends with it
    run.report_path.unlink()
    assert call("report", run.folder) == (0, f"Written to {run.report_path}.\n", "")
    assert "Research use only" in run.report_path.read_text(encoding="utf-8")


def test_report_of_several_runs_compares_them(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [reported.make(tmp_path / name, seed=seed).folder for seed, name in enumerate(("one", "two"))]
    monkeypatch.chdir(tmp_path)
    assert call("report", *folders) == (0, "Written to comparison.html.\n", "")
    status, out, _ = call("report", *folders, "-o", "both.html")
    assert (status, out) == (0, "Written to both.html.\n")
    page = Path("both.html").read_text(encoding="utf-8")
    assert all(f">{folder.name}<" in page for folder in folders)


def test_the_report_of_one_run_has_its_place(run: Run, call: Call) -> None:
    status, _, err = call("report", run.folder, "-o", "elsewhere.html")
    assert status == 2
    assert err == (
        f"pneumoscope: --output elsewhere.html is for a comparison of several runs; the report of one always goes to "
        f"{run.report_path}. Leave --output away, or name another run.\n"
    )
