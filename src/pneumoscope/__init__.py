"""pneumoscope: from a folder of chest X-rays to trained, measured and explained pneumonia classifiers.

The names below load on first use, so that ``import pneumoscope`` is quick and starts no deep-learning backend::

    from pneumoscope import Catalog, ImageStore, Spec, build, evaluate, figures, score, train

For research; not a medical device.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Audit": "audit",
    "Catalog": "catalog",
    "Comparison": "comparison",
    "Conformal": "conformal",
    "Evaluation": "metrics",
    "Familiarity": "familiarity",
    "History": "training",
    "ImageStore": "store",
    "PneumoscopeError": "errors",
    "Predictions": "predictions",
    "Run": "runs",
    "Spec": "specs",
    "appearance": None,
    "apply_temperature": "calibration",
    "audit_images": "survey",
    "build": "models",
    "choose_operating_points": "metrics",
    "compare": "comparison",
    "compare_all": "comparison",
    "evaluate": "metrics",
    "evaluate_run": "pipeline",
    "figures": None,
    "fit_temperature": "calibration",
    "inspect": "survey",
    "load_model": "inference",
    "phantom": None,
    "run": "pipeline",
    "score": "inference",
    "shift": None,
    "shortcut": None,
    "train": "training",
}

__all__ = [
    "Audit",
    "Catalog",
    "Comparison",
    "Conformal",
    "Evaluation",
    "Familiarity",
    "History",
    "ImageStore",
    "PneumoscopeError",
    "Predictions",
    "Run",
    "Spec",
    "appearance",
    "apply_temperature",
    "audit_images",
    "build",
    "choose_operating_points",
    "compare",
    "compare_all",
    "evaluate",
    "evaluate_run",
    "figures",
    "fit_temperature",
    "inspect",
    "load_model",
    "phantom",
    "run",
    "score",
    "shift",
    "shortcut",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    return (
        importlib.import_module(f"{__name__}.{name}")
        if home is None
        else getattr(importlib.import_module(f"{__name__}.{home}"), name)
    )


def __dir__() -> list[str]:
    return sorted(__all__)
