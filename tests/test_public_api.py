"""What the package shows to the world: light to import, complete, and documented to the last parameter.

The documentation is read from the source, so nothing heavy is imported for it. The rules, for public names (no leading
underscore):

- everything has a docstring;
- a function or method with more than one parameter lists each under Parameters, and what it gives under Returns or
  Yields;
- a class that takes more than one parameter lists each under Parameters; a dataclass or a pydantic model, its fields
  under Attributes;
- an array that is taken, kept or given has its shape told;
- whoever raises an error of the project names it, or a class above it, under Raises.

Modules with a leading underscore owe docstrings and Raises only. Verbs of `cli` and `cli_use` owe a docstring only: it
is their help.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pneumoscope
from pneumoscope import errors

SOURCE = Path(__file__).resolve().parents[1] / "src" / "pneumoscope"
MODULES = sorted(path.stem for path in SOURCE.glob("*.py") if path.stem != "__init__")
HEAVY = ["keras", "tensorflow", "jax", "torch", "sklearn", "matplotlib"]
MAX_IMPORT_S = 1.0

Function = ast.FunctionDef | ast.AsyncFunctionDef


def test_import_is_light_and_quick() -> None:
    program = f"""
import sys, time
start = time.perf_counter()
import pneumoscope
print(time.perf_counter() - start, [name for name in {HEAVY} if name in sys.modules], sep="\\n")
"""
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.stderr == ""
        seconds, loaded = done.stdout.splitlines()
        assert loaded == "[]"
        times.append(float(seconds))
    print(f"import pneumoscope: {min(times):.3f} s")
    assert min(times) < MAX_IMPORT_S


def test_every_name_in_all_resolves() -> None:
    names: list[str] = getattr(pneumoscope, "__all__", [])
    assert names, "pneumoscope.__all__ is empty"
    assert len(set(names)) == len(names)
    missing = [name for name in names if not hasattr(pneumoscope, name)]
    assert missing == []
    assert set(names) <= set(dir(pneumoscope))


def test_every_name_in_all_is_a_documented_one() -> None:
    defined = {"__version__", *MODULES} | {name for module in MODULES for name in _defined_names(module)}
    assert [name for name in getattr(pneumoscope, "__all__", []) if name not in defined] == []


def test_an_unknown_name_is_refused_by_name() -> None:
    with pytest.raises(AttributeError, match=r"pneumoscope.*no_such_name"):
        _ = pneumoscope.no_such_name


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module: str) -> None:
    tree = ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))
    faults = [
        f"{module}.py:{fault}"
        for fault in faults_in(tree, private=module.startswith("_"), verbs=module in ("cli", "cli_use"))
    ]
    assert faults == [], "\n" + "\n".join(faults)


def test_the_rules_find_what_is_missing() -> None:
    poor = '''
from dataclasses import dataclass
def bare(): ...
def two(a, *, b) -> int:
    """Short.

    Parameters
    ----------
    a : int
    """
    raise errors.RunError("x")
@dataclass
class Point:
    """Short."""
    x: int
    _y: int
class Part(_Base):
    """Short."""
    def __init__(self, a, b): ...
    def method(self, a, b): ...
    def _hidden(self, a, b): ...
def flat(a: Array) -> Array:
    """Short.

    Parameters
    ----------
    a : ndarray of float64
        Numbers.

    Returns
    -------
    dict of str to ndarray
    """
'''
    assert [fault.partition(" ")[2] for fault in faults_in(ast.parse(poor), private=False, verbs=False)] == [
        "bare has no docstring",
        "two: Parameters lacks b",
        "two: Returns is missing",
        "two: Raises lacks RunError",
        "Point: Attributes lacks x",
        "Part: Parameters lacks a, b",
        "Part.method has no docstring",
        "Part.method: Parameters lacks a, b",
        "Part.method: Returns is missing",
        "flat: Parameters gives no shape for a",
        "flat: Returns gives no shape for dict of str to ndarray",
    ]
    good = '''
@contextmanager
def opened(a: int, *others: str, b: int = 1, images, scores) -> Iterator[int]:
    """Short.

    Parameters
    ----------
    a, b : int
        What they are.
    *others : str
    images : sequence of ndarray
        Each ``(H, W)``.
    scores : ndarray of float64, shape (n,)

    Yields
    ------
    int

    Raises
    ------
    PneumoscopeError
        Always.
    """
    raise StoreError("x")
def plain(a: int) -> None:
    """Short."""
    def inner(a, b):
        raise RunError("x")
'''
    assert faults_in(ast.parse(good), private=False, verbs=False) == []


def faults_in(tree: ast.Module, *, private: bool, verbs: bool) -> list[str]:
    """Return what the documentation of a module's public names lacks, one line each."""
    faults: list[str] = []
    models = _models_of(tree)
    for owner, node in _public_nodes(tree):
        name = f"{owner}.{node.name}" if owner else node.name
        doc = inspect.cleandoc(ast.get_docstring(node) or "")
        lacks = [] if doc else [f"{name} has no docstring"]
        if isinstance(node, ast.ClassDef):
            lacks += [] if private else _class_faults(node, doc, name=name, is_model=node.name in models)
            lacks += [] if private else _shape_faults(doc, name=name)
        elif not verbs:
            lacks += [] if private else _function_faults(node, doc, name=name)
            lacks += [] if private else _shape_faults(doc, name=name)
            lacks += _raises_faults(node, doc, name=name)
        faults += [f"{node.lineno} {text}" for text in lacks]
    return faults


def _public_nodes(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    for node in tree.body:
        if not isinstance(node, (Function, ast.ClassDef)) or node.name.startswith("_"):
            continue
        yield "", node
        if isinstance(node, ast.ClassDef):
            yield from ((node.name, item) for item in node.body if isinstance(item, Function) and item.name[0] != "_")


def _defined_names(module: str) -> set[str]:
    """Return the public functions, classes and constants that a module makes itself."""
    body = ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8")).body
    names = {node.name for node in body if isinstance(node, (Function, ast.ClassDef))}
    names |= {target.id for node in body for target in _targets(node) if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def _targets(node: ast.stmt) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []


def _models_of(tree: ast.Module) -> set[str]:
    """Return the names of dataclasses, named tuples and pydantic models: classes whose fields are annotations."""
    models: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            above = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
            marks = {ast.unparse(mark).partition("(")[0].rpartition(".")[2] for mark in node.decorator_list}
            if "dataclass" in marks or above & ({"BaseModel", "NamedTuple"} | models):
                models.add(node.name)
    return models


def _class_faults(node: ast.ClassDef, doc: str, *, name: str, is_model: bool) -> list[str]:
    fields = [
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and not item.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(item.annotation)
    ]
    init = next((item for item in node.body if isinstance(item, Function) and item.name == "__init__"), None)
    faults = _lacking(doc, "Attributes", fields, name=name) if is_model else []
    return faults + (_parameter_faults(init, doc, name=name) if init else [])


def _function_faults(node: Function, doc: str, *, name: str) -> list[str]:
    marks = {ast.unparse(mark) for mark in node.decorator_list}
    if "overload" in marks or any(mark.endswith(".setter") for mark in marks):
        return []
    faults = _parameter_faults(node, doc, name=name)
    gives = node.returns is None or ast.unparse(node.returns) not in ("None", "NoReturn", "Never")
    if len(_parameters(node)) > 1 and gives and not (_section(doc, "Returns") or _section(doc, "Yields")):
        faults.append(f"{name}: Returns is missing")
    return faults


def _parameter_faults(node: Function, doc: str, *, name: str) -> list[str]:
    wanted = _parameters(node)
    if len(wanted) < 2 and not _section(doc, "Parameters"):
        return []
    unknown = sorted(set(_listed(doc, "Parameters")) - set(wanted))
    faults = _lacking(doc, "Parameters", wanted, name=name)
    return faults + ([f"{name}: Parameters names what is not there: {', '.join(unknown)}"] if unknown else [])


def _parameters(node: Function) -> list[str]:
    taken = node.args
    named = [*taken.posonlyargs, *taken.args, *([taken.vararg] if taken.vararg else []), *taken.kwonlyargs]
    names = [item.arg for item in [*named, *([taken.kwarg] if taken.kwarg else [])]]
    return [item for item in names if item not in ("self", "cls") and not item.startswith("_")]


def _shape_faults(doc: str, *, name: str) -> list[str]:
    faults = []
    for title in ("Parameters", "Returns", "Yields", "Attributes"):
        for entry in re.findall(r"^\S[^\n]*(?:\n[ \t]+[^\n]*)*", _section(doc, title), re.MULTILINE):
            head = entry.partition("\n")[0]
            if re.search(r"\bndarray\b|\barray_like\b", head) and not re.search(r"\bshape\b|\baxis\b|``\(", entry):
                faults.append(f"{name}: {title} gives no shape for {head.partition(' :')[0]}")
    return faults


def _raises_faults(node: Function, doc: str, *, name: str) -> list[str]:
    listed = set(_listed(doc, "Raises"))
    missing = []
    for raised in sorted(_raised(node)):
        kind = getattr(errors, raised, None)
        if inspect.isclass(kind) and not listed & {above.__name__ for above in kind.__mro__}:
            missing.append(raised)
    return [f"{name}: Raises lacks {', '.join(missing)}"] if missing else []


def _raised(node: ast.AST) -> set[str]:
    """Return the last names of what the function's own body raises, its inner functions left out."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (Function, ast.Lambda, ast.ClassDef)):
            continue
        if isinstance(child, ast.Raise) and child.exc is not None:
            found.add(ast.unparse(child.exc).partition("(")[0].rpartition(".")[2])
        found |= _raised(child)
    return found


def _lacking(doc: str, section: str, wanted: list[str], *, name: str) -> list[str]:
    listed = set(_listed(doc, section))
    missing = [item for item in wanted if item not in listed]
    return [f"{name}: {section} lacks {', '.join(missing)}"] if missing else []


def _section(doc: str, title: str) -> str:
    """Return the text of a numpydoc section, empty where there is none."""
    found = re.search(rf"^{title}\n-{{3,}}\n(.*?)(?=^\w[^\n]*\n-{{3,}}\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def _listed(doc: str, title: str) -> list[str]:
    """Return the names that a numpydoc section explains: ``a, b : int`` names two, ``*rest`` names rest."""
    lines = re.findall(r"^(\S[^\n]*)$", _section(doc, title), re.MULTILINE)
    return [part.strip().lstrip("*") for line in lines for part in line.partition(" :")[0].split(",")]
