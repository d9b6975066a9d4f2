"""pneumoscope: from a folder of chest X-rays to trained, measured and explained pneumonia classifiers.

The names below load on first use, so that ``import pneumoscope`` is quick and starts no deep-learning backend::

    from pneumoscope import Catalog, ImageStore, Spec, build, evaluate, figures, score, train

For research; not a medical device.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Catalog": "catalog",
    "Evaluation": "metrics",
    "History": "training",
    "ImageStore": "store",
    "Predictions": "predictions",
    "PneumoscopeError": "errors",
    "Run": "runs",
    "Spec": "specs",
    "build": "models",
    "choose_operating_points": "metrics",
    "evaluate": "metrics",
    "figures": None,
    "load_model": "inference",
    "phantom": None,
    "run": "pipeline",
    "score": "inference",
    "train": "training",
}

__all__ = [
    "Catalog",
    "Evaluation",
    "History",
    "ImageStore",
    "PneumoscopeError",
    "Predictions",
    "Run",
    "Spec",
    "build",
    "choose_operating_points",
    "evaluate",
    "figures",
    "load_model",
    "phantom",
    "run",
    "score",
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
