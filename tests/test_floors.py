"""The floors of the package, read from its imports: what may stand on what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "pneumoscope"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE
MODULES = sorted(path.stem for path in SOURCE.glob("*.py") if path.stem != "__init__")

# From the ground up; on one floor, a module may import those to its left.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "_files", "_locks", "_stopping", "_backend", "_onnxruntime"),
    ("_npy", "_codestreams", "_greys", "dicom", "images", "surroundings", "specs", "predictions", "schedules",
     "_torch_weights"),
    ("_sources", "_inputs", "catalog", "phantom", "intervals", "counts", "curves", "calibration", "metrics",
     "conformal", "comparison", "familiarity", "shift", "robustness", "augmentation", "backbones", "models",
     "evidence", "explainer", "onnx_graph", "predictor"),
    ("store", "checkpoints", "runs", "card", "bundle", "_chosen", "ledger", "figures", "_charts", "evidence_figures"),
    ("appearance", "evidence_checks", "audit", "shortcut", "scorecard", "features", "_examples", "training",
     "inference"),
    ("narration", "tracking", "answers", "site_sample", "recalibration", "_report_material", "_report_blocks",
     "_report_head", "_report_pictures", "_report_data", "_report_measures", "_report_compare", "report", "_batching",
     "_connections", "_gauges", "_uploads", "_guard", "_pictures", "_wire", "serving", "tasks", "_job", "jobs",
     "kaggle", "doctor"),
    ("survey", "repeats", "gallery", "evaluation", "stages", "export", "checks", "pipeline", "batch", "_options",
     "cli_use", "cli", "__main__"),
)  # fmt: skip
ORDER = [module for floor in FLOORS for module in floor]
GROUND = FLOORS[0]
BACKENDS = {"tensorflow", "jax", "jaxlib", "torch"}
KERAS_FREE = (
    "metrics",
    "comparison",
    "shift",
    "scorecard",
    "audit",
    "shortcut",
    "figures",
    "_charts",
    "card",
    "evidence",
    "predictor",
    "bundle",
    "evidence_figures",
    "answers",
    "site_sample",
    "recalibration",
    "_chosen",
    "report",
    "serving",
)
VERBS = ("cli", "cli_use")  # their verbs import late
MAX_LINES = 600


@dataclass(frozen=True)
class Imported:
    """One imported name, for example ``pneumoscope.errors``, and whether its import stands at the top."""

    name: str
    line: int
    at_top: bool

    @property
    def root(self) -> str:
        return self.name.partition(".")[0]

    @property
    def module(self) -> str | None:
        """Our own module that is imported, without the package; None for anything else."""
        parts = self.name.split(".")
        return None if parts[0] != PACKAGE else parts[1] if len(parts) > 1 else "__init__"


def imports_of(source: str) -> list[Imported]:
    """Return every import in a module's text, those through importlib too."""
    return list(_walk(ast.parse(source), at_top=True))


def _walk(node: ast.AST, *, at_top: bool) -> Iterator[Imported]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Imported(alias.name, child.lineno, at_top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            # `from . import x` and `from .x import y` are of the same package: it is flat
            origin = PACKAGE + (f".{child.module}" if child.module else "") if child.level else str(child.module)
            # `from pneumoscope import x` imports a module; `from pneumoscope.x import y` imports x
            names = [f"{origin}.{alias.name}" for alias in child.names] if origin == PACKAGE else [origin]
            yield from (Imported(name, child.lineno, at_top) for name in names)
        elif isinstance(child, ast.Call) and _called(child) in ("import_module", "__import__", "find_spec"):
            first = child.args[0] if child.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Imported(first.value, child.lineno, at_top)
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _walk(child, at_top=at_top and not inside)


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _imports(module: str) -> list[Imported]:
    return imports_of((SOURCE / f"{module}.py").read_text(encoding="utf-8"))


def test_every_way_of_importing_is_seen() -> None:
    source = """
import a.b
from pneumoscope import _files, errors
from pneumoscope.specs import Spec
from . import images
from .store import ImageStore
if True:
    import c
class K:
    import d
def f():
    import e
    importlib.import_module("torch")
    __import__("jax")
"""
    seen = {(found.name, found.at_top) for found in imports_of(source)}
    assert seen == {
        ("a.b", True),
        ("pneumoscope._files", True),
        ("pneumoscope.errors", True),
        ("pneumoscope.specs", True),
        ("pneumoscope.images", True),
        ("pneumoscope.store", True),
        ("c", True),
        ("d", True),
        ("e", False),
        ("torch", False),
        ("jax", False),
    }


def test_the_package_is_flat_and_every_module_has_a_floor() -> None:
    assert MODULES
    assert set(MODULES) <= set(ORDER), "give the new module its place in FLOORS"
    assert "utils" not in MODULES
    assert [path.name for path in SOURCE.iterdir() if path.is_dir() and list(path.glob("*.py"))] == []


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_stands_below_it(module: str) -> None:
    below = ORDER[: ORDER.index(module)]
    wrong = [
        f"{module}.py:{found.line} imports {found.name}"
        for found in _imports(module)
        if found.module is not None and found.module not in below and not _is_package_fact(found)
    ]
    assert wrong == []


def _is_package_fact(found: Imported) -> bool:
    """``from pneumoscope import __version__`` takes a constant, not a module."""
    return found.name == f"{PACKAGE}.__version__"


@pytest.mark.parametrize(
    "module", [module for module in MODULES if module not in ("cli", "cli_use")]
)  # verbs import late
def test_internal_imports_stand_at_the_top(module: str) -> None:
    late = [f"{module}.py:{found.line}" for found in _imports(module) if found.module is not None and not found.at_top]
    assert late == []


@pytest.mark.parametrize("module", ["__init__", *(module for module in MODULES if module != "_backend")])
def test_only_the_backend_module_names_a_backend(module: str) -> None:
    assert [f"{module}.py:{found.line} {found.name}" for found in _imports(module) if found.root in BACKENDS] == []


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_onnxruntime_is_loaded_without_its_telemetry(module: str) -> None:
    """By `_onnxruntime.load`, then, and by no import."""
    assert [f"{module}.py:{found.line}" for found in _imports(module) if found.root == "onnxruntime"] == []


@pytest.mark.parametrize("module", [module for module in GROUND if module in MODULES])
def test_the_ground_floor_stands_on_the_standard_library(module: str) -> None:
    foreign = [
        f"{module}.py:{found.line} {found.name}"
        for found in _imports(module)
        if found.root not in sys.stdlib_module_names | {PACKAGE} and (found.at_top or module != "_backend")
    ]
    assert foreign == []


@pytest.mark.parametrize("module", [module for module in KERAS_FREE if module in MODULES])
def test_module_never_loads_keras(module: str) -> None:
    heavy = sorted(BACKENDS | {"keras"})
    program = f"import sys, {PACKAGE}.{module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda path: path.stem)
def test_module_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
