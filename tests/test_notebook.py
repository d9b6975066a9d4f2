"""The tutorial: `tutorial.ipynb` is what people open, `tutorial.py` the same cells as text, which is what is reviewed.

After a change of the text: ``jupytext --to notebook -o notebooks/tutorial.ipynb notebooks/tutorial.py``.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import jupytext
import pytest

import pneumoscope
from pneumoscope.specs import RESEARCH_USE, Spec

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
TEXT = NOTEBOOKS / "tutorial.py"
NOTEBOOK = NOTEBOOKS / "tutorial.ipynb"

PITFALLS = 7
APPROACHES = Spec.preset_named("demo").models
LONGEST_S = 900


def cells_of(path: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def code_of(path: Path) -> str:
    return "\n".join(source for kind, source in cells_of(path) if kind == "code")


def test_the_notebook_is_the_text_cell_for_cell() -> None:
    assert cells_of(NOTEBOOK) == cells_of(TEXT)


def test_it_is_kept_without_outputs() -> None:
    notebook = jupytext.read(NOTEBOOK)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count] == []
    assert notebook.metadata.kernelspec.name == "python3"


def test_it_teaches_before_each_step() -> None:
    cells = cells_of(TEXT)
    prose = "\n".join(source for kind, source in cells if kind == "markdown")
    assert cells[0][0] == "markdown"
    assert RESEARCH_USE in cells[0][1]
    assert re.findall(r"\*\*Pitfall (\d+):", prose) == [str(number) for number in range(1, PITFALLS + 1)]
    for approach in APPROACHES:
        assert f"| `{approach}`" in prose
    assert len(re.findall(r"(?m)^## ", prose)) >= 8


def test_its_code_is_valid_python_cell_by_cell_and_takes_public_names() -> None:
    for kind, source in cells_of(TEXT):
        if kind == "code":
            compile(source, "cell", "exec")
    taken = [
        alias.name
        for node in ast.walk(ast.parse(code_of(TEXT)))
        if isinstance(node, ast.ImportFrom) and node.module == "pneumoscope"
        for alias in node.names
    ]
    modules = {path.stem for path in Path(str(pneumoscope.__file__)).parent.glob("*.py")}
    assert set(taken) <= {*pneumoscope.__all__, *modules}


def test_one_line_changes_it_to_other_images() -> None:
    assert len(re.findall(r"(?m)^DATA = None\b", code_of(TEXT))) == 1
    assert "environ" not in code_of(TEXT)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_shows_what_it_promises(
    tmp_path: Path, own_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nbclient = pytest.importorskip("nbclient", reason="what runs notebooks is not installed")
    notebook = jupytext.read(NOTEBOOK)
    nbclient.NotebookClient(notebook, timeout=LONGEST_S, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 10
    for approach in APPROACHES:
        assert re.search(rf"(?m)^{approach} +validation +\d+ +0\.\d+ +\d+ +\d+$", printed), printed
        assert re.search(rf"(?m)^ {{{len(approach)}}} +test +100 +(0\.\d+|1\.0+) +\d+ +\d+$", printed), printed
        assert re.search(rf"(?m)^ +{approach}: best epoch [1-6] of [1-6], val_loss \d", printed), printed
    assert (
        printed.count("cannot be told apart") + printed.count(" is better than ") + printed.count(" is worse than ")
        >= 3
    )
    assert _off_the_logit(printed) < 1e-4
    _files_are_there(tmp_path / "tutorial-output")
    assert "Traceback" not in capfd.readouterr().err


def _off_the_logit(printed: str) -> float:
    found = re.search(r"sum of the map \+ bias is off the logit by at most (\S+)", printed)
    assert found is not None
    return float(found[1])


def _files_are_there(out: Path) -> None:
    wanted: list[Any] = [f"{part}_classes" for part in ("train", "test")]
    wanted += [f"samples_{name}" for name in ("normal", "pneumonia")]
    for approach in APPROACHES:
        wanted += [f"{approach}_learning_curve_{quantity}" for quantity in ("loss", "accuracy")]
        wanted += [f"{approach}_roc_curve_{shown}" for shown in ("validation", "testing")]
        wanted += [f"{approach}_confusion_testing"]
    for name in wanted:
        assert (out / f"{name}.png").stat().st_size > 5_000, name
    assert len(list(out.glob("*_evidence.png"))) == 1
    report = (out / "run" / "report.html").read_text(encoding="utf-8")
    assert RESEARCH_USE in report
    assert "SYNTHETIC DATA" in report
