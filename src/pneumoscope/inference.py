"""Trained models: load one safely, run it over packed images, or give it the face that answers stand on.

A model is rebuilt from its own Spec and only its weight arrays are read from the file: nothing in a file is ever run.
Knows nothing of thresholds or figures.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from pneumoscope import explainer, models
from pneumoscope.errors import RunError
from pneumoscope.predictions import Predictions
from pneumoscope.predictor import Network, Outputs
from pneumoscope.specs import Spec
from pneumoscope.store import ImageStore

# What zipfile, HDF5 and Keras raise on damaged or foreign bytes, found by changing bytes at random.
_DAMAGE = (OSError, EOFError, ValueError, LookupError, RuntimeError, UserWarning, zipfile.BadZipFile, zlib.error)


def load_model(path: Path, *, approach: str, spec: Spec) -> models.Model:
    """Load a trained model.

    Parameters
    ----------
    path : Path
        A ``.keras`` file that a run wrote.
    approach : {"cnn", "tl", "ft", "best"}
        What it is.
    spec : Spec
        What it was made with.

    Returns
    -------
    keras.Model

    Raises
    ------
    RunError
        Where the file is missing, damaged, or does not fit the Spec.
    """
    bare = spec.model_copy(update={"backbone": spec.backbone.model_copy(update={"weights": "none"})})
    model = models.build(approach, bare)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Skipping", UserWarning)  # else Keras may leave weights as they were
            model.load_weights(path)
    except _DAMAGE as error:
        misfit = isinstance(error, UserWarning)
        reason = "its weights do not fit the Spec" if misfit else " ".join(str(error).split())[:200]
        raise RunError(
            f"The model {path} cannot be loaded ({reason}); train it again, or give the run it came from."
        ) from error
    return model


def score(
    model: models.Model,
    store: ImageStore,
    rows: pd.DataFrame,
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Score packed images, each once.

    Parameters
    ----------
    model : keras.Model
        From `load_model` or `models.build`.
    store : ImageStore
        Holds the images.
    rows : DataFrame
        A Catalog's rows.
    batch_size : int
        Images in a step.
    progress : callable, optional
        Called with (done, total) images.

    Returns
    -------
    Predictions
        In the order of `rows`.

    Raises
    ------
    StoreError
        Where an image is not in the store.
    """
    where = store.rows_of(rows)

    def fetch(positions: slice) -> object:
        if progress is not None:
            progress(positions.stop, len(where))
        return store.images[where[positions], ..., None]

    return Predictions.of(rows, models.scores(model, fetch, len(where), batch_size=batch_size))


def network_of(model: models.Model) -> Network:
    """Give a Keras model the face that `predictor.Predictor` stands on.

    Parameters
    ----------
    model : keras.Model
        From `load_model` or `models.build`.

    Returns
    -------
    callable
        See `predictor.Network`; the evidence comes with the score, from one forward pass.
    """
    network = explainer.build(model)

    def run(images: npt.NDArray[np.uint8]) -> Outputs:
        batches = models.in_batches(network, lambda at: images[at, ..., None], len(images), batch_size=len(images))
        return Outputs(*next(iter(batches))[1])

    return run
