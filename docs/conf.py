"""The site: ``sphinx-build -W -q -b html docs build/docs``, offline, in seconds.

Owns how the pages look, and what is made from the code so that it cannot grow stale: the help text of every verb
(``{verbs}``) and every setting with its meaning and its presets (``{settings}``). Holds no prose.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from pneumoscope import specs
from pneumoscope.cli import app

project = "pneumoscope"
release = version_of("pneumoscope")
copyright = f"pneumoscope contributors, Apache-2.0. {specs.RESEARCH_USE}"
html_title = f"pneumoscope {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
nitpicky = False  # numpydoc's "array_like of int, shape (n,)" is prose, not a reference

html_theme = "furo"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False

# Keras is never loaded for a page: it would start a backend. Types are text in this package, so signatures stay whole.
autodoc_mock_imports = ["keras"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 100

HELP_COLUMNS = 100


def verbs() -> dict[str, str]:
    """Return every verb that people call, ``fetch kaggle`` among them -> its help text."""
    return dict(_helps(typer.main.get_command(app), ()))


def _helps(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _helps(inner, (*path, name))
    if path and not hasattr(command, "commands"):
        shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": str(HELP_COLUMNS)}, prog_name="pneumoscope")
        yield " ".join(path), shown.output.strip()


def settings() -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Return every key by its part ("" for the Spec's own): what it means, and its value in each preset."""
    presets = [specs.Spec.preset_named(name) for name in specs.PRESETS]
    found: dict[str, dict[str, tuple[str, list[str]]]] = {"": {}}
    for name, field in specs.Spec.model_fields.items():
        if name == "preset":
            continue
        part = field.default if isinstance(field.default, BaseModel) else None
        meanings = _meanings(type(part) if part is not None else specs.Spec)
        for key in type(part).model_fields if part is not None else [name]:
            owners = [getattr(preset, name) if part is not None else preset for preset in presets]
            values = [_as_toml(getattr(owner, key)) for owner in owners]
            found.setdefault(name if part is not None else "", {})[key] = (meanings[key], values)
    return found


def _meanings(owner: type) -> dict[str, str]:
    """Return what a class's numpydoc section Attributes says of each name."""
    section = re.split(r"\n-{3,}\n", re.sub(r"(?m)^ {4}", "", owner.__doc__ or ""), maxsplit=1)[1]
    meanings = {}
    for names, text in re.findall(r"(?m)^(\S[^:\n]*) :[^\n]*\n((?:[ ]{4}[^\n]*\n?)+)", section):
        meanings |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return meanings


def _as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value not in ("", {}) else "none"


class _Generated(SphinxDirective):
    """Puts Markdown that the code makes where the directive stands."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(self.markdown(), allow_section_headings=True)

    def markdown(self) -> str:
        """Return what is put there."""
        raise NotImplementedError


class Verbs(_Generated):
    """Every verb under a heading of its own, as ``--help`` shows it."""

    def markdown(self) -> str:
        """Return the sections."""
        return "\n".join(f"## {name}\n\n```text\n{text}\n```\n" for name, text in verbs().items())


class Settings(_Generated):
    """Every key of a Spec, a table for each part."""

    def markdown(self) -> str:
        """Return the tables."""
        head = "| key | default | other presets | what it is |\n|---|---|---|---|\n"
        lines = []
        for part, keys in settings().items():
            lines.append(f"\n### {f'[{part}]' if part else 'Of the whole run'}\n\n{head}")
            for key, (meaning, values) in keys.items():
                usual = values[list(specs.PRESETS).index("default")]
                others = [
                    f"{name} {value}" for name, value in zip(specs.PRESETS, values, strict=True) if value != usual
                ]
                cells = [f"`{part}.{key}`" if part else f"`{key}`", usual, ", ".join(others), meaning]
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
        return "".join(lines)


def setup(sphinx: Sphinx) -> dict[str, bool]:
    """Give Sphinx the two directives."""
    sphinx.add_directive("verbs", Verbs)
    sphinx.add_directive("settings", Settings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
