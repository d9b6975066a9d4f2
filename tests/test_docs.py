"""The site is whole and true: it has every verb, setting, preset, finding and public name, and none that is not."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import pneumoscope
from pneumoscope.audit import FINDINGS
from pneumoscope.cli import app
from pneumoscope.metrics import choose_operating_points
from pneumoscope.predictions import Predictions
from pneumoscope.specs import ALLOWABLE, APPROACHES, PRESETS, RESEARCH_USE, Spec, valid_keys

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md"))
TRUE_NOW = [path for path in PAGES if path.name != "log.md"]
"""The log and the decisions keep what was true at their time."""

TOPS = ("docs", "notebooks", "scripts", "src", "tests", "benchmarks")


@pytest.fixture(scope="module")
def conf() -> dict[str, Any]:
    """What ``docs/conf.py`` defines."""
    pytest.importorskip("sphinx", reason="the site's generator is not installed")
    return runpy.run_path(str(DOCS / "conf.py"))


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def spans(path: Path) -> list[str]:
    """Return what stands between backticks in a page, blocks left out."""
    prose = re.sub(r"(?ms)^```.*?^```$", "", path.read_text(encoding="utf-8"))
    return re.findall(r"(?<!})`([^`\n]+)`", prose)


def verb_names() -> list[str]:
    command: Any = typer.main.get_command(app)
    return [name for name, inner in command.commands.items() if not inner.hidden]


def test_every_verb_has_its_help_on_the_page(conf: dict[str, Any]) -> None:
    shown = conf["verbs"]()
    assert {name.split()[0] for name in shown} == set(verb_names())
    assert {"fetch kaggle", "fetch weights"} <= set(shown)
    for name, text in shown.items():
        assert text.startswith(f"Usage: pneumoscope {name}"), text
        assert "--help" in text
    assert "```{verbs}" in text_of("cli.md")


@pytest.mark.parametrize("verb", verb_names())
def test_every_verb_is_shown_at_work_in_a_page_or_the_readme(verb: str) -> None:
    pages = [path.read_text(encoding="utf-8") for path in (*TRUE_NOW, REPOSITORY / "README.md")]
    assert any(re.search(rf"pneumoscope {verb}\b", text) for text in pages)


def test_every_setting_stands_in_the_tables_with_a_meaning_and_its_value_in_each_preset(conf: dict[str, Any]) -> None:
    tables = conf["settings"]()
    keys = [f"{part}.{key}" if part else key for part, found in tables.items() for key in found]
    wanted = {key.removesuffix(".FOLDER").removesuffix(".NAME") for key in valid_keys()}
    assert sorted(keys) == sorted(wanted)
    for part, found in tables.items():
        for key, (meaning, values) in found.items():
            assert len(meaning) > 5, f"{part}.{key}: {meaning!r}"
            assert len(values) == len(PRESETS)
    presets = list(PRESETS)
    epochs = tables["train"]["epochs"][1]
    assert epochs[presets.index("tutorial")] == str(Spec.preset_named("tutorial").train.epochs) == "50"
    assert "```{settings}" in text_of("cli.md")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_explained(name: str) -> None:
    assert f"| `{name}` |" in text_of("approaches.md")


@pytest.mark.parametrize("name", APPROACHES)
def test_every_approach_is_explained(name: str) -> None:
    assert f"## `{name}`" in text_of("approaches.md")


@pytest.mark.parametrize("name", FINDINGS)
def test_every_finding_of_the_audit_is_explained(name: str) -> None:
    assert re.search(rf"^\|[^|]*`{name}`", text_of("data.md"), re.MULTILINE)


def test_no_finding_is_explained_that_does_not_exist_nor_called_allowable_wrongly() -> None:
    rows = re.findall(r"^\| ((?:`[a-z-]+`(?:, )?)+) \| (\w+)", text_of("data.md"), re.MULTILINE)
    named = {
        name for cell, grade in rows if grade in ("error", "warning", "note") for name in re.findall(r"`(.+?)`", cell)
    }
    assert named == set(FINDINGS)
    assert all(f"--allow {name}" in text_of("data.md") for name in ALLOWABLE)


def test_every_operating_point_is_explained() -> None:
    import pandas as pd

    rows = pd.DataFrame({"path": list("abcd"), "image_id": list("abcd"), "split": "validation", "label": [0, 0, 1, 1]})
    points = choose_operating_points(Predictions.of(rows, pd.Series([0.1, 0.6, 0.4, 0.9]).to_numpy()))
    for page in ("report.md",):
        assert [name for name in points if f"| `{name}` |" not in text_of(page)] == []


@pytest.mark.parametrize("page", TRUE_NOW, ids=lambda page: page.name)
def test_a_setting_that_the_text_names_exists(page: Path) -> None:
    parts = {key.partition(".")[0] for key in valid_keys() if "." in key}
    known = {*valid_keys(), "data.classes", "cluster.extra"}
    named = {
        found[1]
        for span in spans(page)
        if (found := re.match(r"([a-z]+\.[a-z_]+)(?:=| = |$)", span)) and found[1].partition(".")[0] in parts
    }
    files = {"audit.json", "features.npz", "evaluation.json"}
    modules = {name for name in named if (REPOSITORY / "src/pneumoscope" / f"{name.partition('.')[0]}.py").is_file()}
    code = {name for name in modules if hasattr(sys.modules.get("pneumoscope.audit"), name.partition(".")[2])}
    assert named - known - files - code == set()


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    text = text_of("api.md")
    listed = set(re.findall(r"^\.\. auto\w+:: (?:pneumoscope\.)?(\w+)", text, re.MULTILINE))
    assert listed == set(pneumoscope.__all__)


@pytest.mark.parametrize("page", TRUE_NOW, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wanted = {DOCS / f"{name}.md" for name in re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", text)}
    wanted |= {page.parent / target.partition("#")[0] for target in re.findall(r"\]\((?!https?:)([^)#]+)", text)}
    for span in re.findall(r"`([^`\n]+)`", text):
        path = span.partition(" ")[0].rstrip("/")
        if "/" in path and path.split("/")[0] in TOPS and not set(path) & set("<>*$"):
            wanted.add(REPOSITORY / path)
    assert sorted(str(path) for path in wanted if not path.exists()) == []


def test_every_page_can_be_reached_from_the_first() -> None:
    named = set(re.findall(r"(?m)^([a-z]+)$", text_of("index.md")))
    assert {path.stem for path in PAGES} - {"index"} <= named


def test_the_modules_that_the_tour_names_exist() -> None:
    modules = {path.stem for path in (REPOSITORY / "src/pneumoscope").glob("*.py")}
    rows = [line for line in text_of("design.md").splitlines() if line.startswith("| ")]
    floors = [line.split("|")[2] for line in rows if line.split("|")[1].strip() in ("ground", "values", "work", "top")]
    named = {name for cell in floors for name in re.findall(r"`(\w+)`", cell)}
    assert named
    assert named <= modules
    for name, attribute in re.findall(r"`([a-z_]+)\.([A-Z_]{3,}|build|decode)`", text_of("design.md")):
        assert name in modules
        assert re.search(rf"(?m)^(def )?{attribute}\b", (REPOSITORY / f"src/pneumoscope/{name}.py").read_text())


def test_it_says_what_it_is_not() -> None:
    for name in ("index.md", "limits.md"):
        assert RESEARCH_USE in text_of(name)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the site's generator is not installed")
    call = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for page in ("index", "cli", "api", "log", "decisions/0008-numbers"):
        html = (tmp_path / f"{page}.html").read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//[^"]+', html) == []
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert all(f'id="pneumoscope.{name}"' in api or f"module-pneumoscope.{name}" in api for name in pneumoscope.__all__)
    assert 'id="recalibrate"' in (tmp_path / "cli.html").read_text(encoding="utf-8")
