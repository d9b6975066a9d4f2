"""The only module that loads onnxruntime, and without its telemetry.

From 1.29 on onnxruntime writes what it runs on into a file of the user's cache on Linux and macOS, to be sent to its
maker, unless an environment variable says otherwise before it is loaded. Nothing here may leave the machine unasked.
"""

from __future__ import annotations

import importlib
import os
from typing import Any


def load(part: str = "onnxruntime") -> Any:
    """Return the package, or one of its modules, loaded on first use: half a second that few steps need.

    Parameters
    ----------
    part : str
        Full name of the module.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return importlib.import_module(part)
