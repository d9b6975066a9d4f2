"""Which model a call names: a Bundle, a Run, or one model of a Run (``RUN:ft``).

Owns the meaning of MODEL on the command line. Loads no network.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from pneumoscope import _files
from pneumoscope.bundle import Bundle, is_bundle
from pneumoscope.errors import PneumoscopeError, RunError, StoreError, UsageError
from pneumoscope.runs import Run

SHIPPED = Path(__file__).with_name("shipped")
"""The bundle that comes with the package; its model_card.md says what it was made from, and how."""


def find(text: str | None) -> Bundle | tuple[Run, str]:
    """Return what MODEL stands for.

    Parameters
    ----------
    text : str or None
        None for the model that comes with the package; else a bundle's folder, a run's, or a run's with ``:`` and the
        model's name behind it. Of a run with several models the one with the best AUC on validation is taken where none
        is named.

    Returns
    -------
    Bundle, or Run and str

    Raises
    ------
    UsageError
        Where it is neither, or the run has no such model.
    PneumoscopeError
        Where the bundle or the run is damaged.
    """
    if text is None:
        return Bundle.open(SHIPPED)
    folder, model = Path(text), ""
    if not folder.exists() and ":" in text:
        name, _, model = text.rpartition(":")
        folder = Path(name)
    if is_bundle(folder) and not model:
        return Bundle.open(folder)
    if not Run(folder).manifest_path.exists():
        raise UsageError(
            f"{text} is neither a bundle nor a run (there is no bundle.json and no manifest.json in {folder}); give a "
            "folder that pneumoscope export or run has made, or RUN:ft for one model of a run."
        )
    run = Run.open(folder)
    trained = run.trained()
    if model and model not in trained:
        raise UsageError(f"The run in {folder} has no model {model!r}; it has {', '.join(trained) or 'none'}.")
    return run, model or best_of(run)


def best_of(run: Run) -> str:
    """Return the model of a run with the best AUC on validation; the only one where there is one.

    Raises
    ------
    RunError
        Where no model was measured.
    """
    trained = run.trained()
    if len(trained) == 1:
        return trained[0]
    if not trained or not run.metrics_path.exists():
        raise RunError(f"The run in {run.folder} is {run.status} and has no measured model; run it to its end first.")
    models = _files.read_json(run.metrics_path)["models"]
    return max(trained, key=lambda name: models.get(name, {}).get("validation", {}).get("auc") or 0.0)


def bundle_of(text: str | None) -> Bundle:
    """Return the bundle that MODEL stands for; a run's model is exported into the cache first, once.

    The export is a process of its own: who serves a model loads no Keras.

    Parameters
    ----------
    text : str or None
        See `find`.

    Returns
    -------
    Bundle

    Raises
    ------
    PneumoscopeError
        As `find`, and where the model cannot be exported.
    """
    found = find(text)
    if isinstance(found, Bundle):
        return found
    run, model = found
    folder = _files.cache_dir() / f"exported-{_files.sha256_of_file(run.model_path(model))[:16]}"
    try:
        return Bundle.open(folder)
    except StoreError:  # it is not there yet, or not whole: a deletion of the cache was broken off
        shutil.rmtree(folder, ignore_errors=True)
        _files.build_folder(folder, lambda place: _export(run, model, place))
    return Bundle.open(folder)


def _export(run: Run, model: str, folder: Path) -> None:
    words = [sys.executable, "-m", "pneumoscope", "export", str(run.folder), "--model", model, "-o", str(folder)]
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with status {done.returncode}"]
        raise PneumoscopeError(last[0].removeprefix("pneumoscope: "))
