"""The tutorial is one text: it opens as a notebook, and runs as a script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

TUTORIAL = Path(__file__).resolve().parents[1] / "notebooks" / "tutorial.py"


def test_it_opens_as_a_notebook_with_text_before_every_step() -> None:
    cells = jupytext.read(TUTORIAL).cells
    kinds = [cell.cell_type for cell in cells]
    assert kinds[0] == "markdown"
    assert kinds.count("code") >= 8
    assert kinds.count("markdown") >= 6
    assert "Nothing here is a medical device" in cells[0].source


def test_its_code_cells_are_valid_python_one_by_one() -> None:
    for cell in jupytext.read(TUTORIAL).cells:
        if cell.cell_type == "code":
            compile(cell.source, "cell", "exec")


@pytest.mark.slow
def test_it_runs_as_a_script_from_the_images_to_the_figures(tmp_path: Path) -> None:
    environment = {**os.environ, "PNEUMOSCOPE_OUT": str(tmp_path / "out")}
    environment.pop("PNEUMOSCOPE_DATA", None)
    done = subprocess.run(
        [sys.executable, str(TUTORIAL)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for approach in ("cnn", "tl", "ft"):
        assert f"{approach:>3}       test: n 120, AUC 0." in done.stdout
        for figure in ("learning_curve_loss", "roc_curve_testing"):
            assert (tmp_path / "out" / f"{approach}_{figure}.png").stat().st_size > 10_000
