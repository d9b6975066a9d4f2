"""Familiarity: is one image so unlike the training images that a score for it means nothing.

Owns the distance of an image's features from those of the training images, the threshold beyond which an image is *not
assessable*, and their form in a bundle. Needs NumPy only, because it is asked where models are served. Knows nothing of
networks, labels or files.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from pneumoscope.errors import DataError, StoreError, UsageError

AXES: Final = 32
"""Directions whose own variance is kept; 16, 64, 128, 256 and a full covariance found fewer foreign images."""

_SMALLEST_VARIANCE: Final = 1e-6  # as a share of the mean variance of a direction
_ROWS: Final = 8  # at a time: from 16 on BLAS wakes threads that fight onnxruntime's (0.2 to 5 ms an image, not 0.01)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Familiarity:
    """How far an image is from the training images, and from where on it is not assessable.

    The distance is that of Mahalanobis (Lee et al. 2018) with a compact covariance: the `AXES` directions in which the
    training features spread most keep their own variance, all others share the mean of theirs (Moghaddam and Pentland
    1997; Tipping and Bishop 1999). It measures how unusual an image is, not how wrong a score will be; images that look
    alike to the network pass, inverted or dark ones often do.

    Attributes
    ----------
    mean : ndarray of float32, shape (d,)
        Of the training features.
    axes : ndarray of float32, shape (k, d)
        Orthonormal.
    variances : ndarray of float64, shape (k,)
        Along the axes, falling, above 0.
    residual_variance : float
        Along any other direction, above 0.
    threshold : float
        An image is assessable where its distance is at most this.
    quantile : float
        The share of images like the held-out ones that shall be assessable.
    n_train, n_held_out : int
        Images behind the axes and behind the threshold.
    """

    mean: npt.NDArray[np.float32]
    axes: npt.NDArray[np.float32]
    variances: Floats
    residual_variance: float
    threshold: float
    quantile: float
    n_train: int
    n_held_out: int

    @classmethod
    def fit(cls, train: npt.ArrayLike, *, held_out: npt.ArrayLike, quantile: float = 0.99) -> Self:
        """Learn what training images look like, and how far others of their kind lie from them.

        Parameters
        ----------
        train : array_like of float, shape (n, d)
            Features of the training images.
        held_out : array_like of float, shape (m, d)
            Features of images that the network did not learn from: calibration or validation, never test.
        quantile : float
            Between 0 and 1. The threshold is the ``ceil((m + 1) quantile)``-th smallest distance of the held-out
            images (as for conformal p values, Bates et al. 2023), so that of new images of their kind no more than
            1 - quantile are expected beyond it; with fewer than quantile / (1 - quantile) images it is the largest.

        Returns
        -------
        Familiarity

        Raises
        ------
        DataError
            Where there are fewer than three training images, no held-out image, features that are not finite, that are
            not of the same network, or that do not vary.
        UsageError
            Where the quantile is not between 0 and 1.
        """
        if not 0 < quantile < 1:
            raise UsageError(f"The quantile is {quantile}; give a share between 0 and 1, for example 0.99.")
        known, others = feature_rows(train), feature_rows(held_out)
        n, d = known.shape
        if n < 3 or not len(others):
            raise DataError(
                f"There are {n} training and {len(others)} held-out images; give at least 3 and 1, so that it is known "
                "what is usual."
            )
        if bool((known == known[0]).all()):
            raise DataError("The features of all training images are the same; check the images and the network.")
        variances, directions = np.linalg.eigh(np.cov(known, rowvar=False, ddof=0).reshape(d, d))  # rising
        rest = d - min(AXES, d - 1, n - 2)
        least = _SMALLEST_VARIANCE * float(variances.mean())
        fitted = cls(
            mean=known.mean(axis=0).astype(np.float32),
            axes=directions[:, : rest - 1 : -1].T.astype(np.float32),
            variances=np.maximum(variances[: rest - 1 : -1], least),
            residual_variance=max(float(variances[:rest].mean()), least),
            threshold=math.inf,
            quantile=quantile,
            n_train=n,
            n_held_out=len(others),
        )
        place = math.ceil((len(others) + 1) * quantile - 1e-9)  # 1e-9: 0.99 is not quite 99 hundredths
        return replace(fitted, threshold=float(np.sort(fitted.distance(others))[min(place, len(others)) - 1]))

    def distance(self, features: npt.ArrayLike) -> Floats:
        """Return how far images are from the training images.

        Parameters
        ----------
        features : array_like of float, shape (n, d)
            Of the same network.

        Returns
        -------
        ndarray of float64, shape (n,)
            0 or more, in standard deviations.

        Raises
        ------
        DataError
            Where the features have another length or are not finite.
        """
        values = feature_rows(features)
        if values.shape[1] != len(self.mean):
            raise DataError(
                f"The images have {values.shape[1]} features each, the training images had {len(self.mean)}; compute "
                "them with the same network."
            )
        axes = self.axes.astype(np.float64)
        squared = np.empty(len(values))
        for start in range(0, len(values), _ROWS):
            part = slice(start, start + _ROWS)
            centred = values[part] - self.mean
            along = centred @ axes.T
            rest = centred - along @ axes  # not a difference of squares, which would lose the small rest
            squared[part] = (along**2 / self.variances).sum(axis=1) + (rest**2).sum(axis=1) / self.residual_variance
        return np.asarray(np.sqrt(squared))

    def assess(self, features: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Say which images are like those that the model learned from.

        Parameters
        ----------
        features : array_like of float, shape (n, d)
            Of the same network.

        Returns
        -------
        distance : ndarray of float64, shape (n,)
            As `distance`.
        assessable : ndarray of bool, shape (n,)
            Whether the distance is at most the threshold.

        Raises
        ------
        DataError
            As `distance`.
        """
        distances = self.distance(features)
        return distances, distances <= self.threshold

    def as_dict(self) -> dict[str, Any]:
        """Return all that a bundle needs to repeat `assess`, ready for JSON.

        Returns
        -------
        dict
            The numbers under their names; ``mean`` and ``axes`` as base64 of little-endian float32, row by row;
            ``shape``, that of the axes.
        """
        return {
            "mean": _packed(self.mean),
            "axes": _packed(self.axes),
            "shape": list(self.axes.shape),
            "variances": self.variances.tolist(),
            "residual_variance": self.residual_variance,
            "threshold": self.threshold,
            "quantile": self.quantile,
            "n_train": self.n_train,
            "n_held_out": self.n_held_out,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Read what `as_dict` returned; the distances are the same to the last digit.

        Raises
        ------
        StoreError
            Where something is missing or does not fit.
        """
        try:
            k, d = content["shape"]
            return cls(
                mean=_unpacked(content["mean"]).reshape(d),
                axes=_unpacked(content["axes"]).reshape(k, d),
                variances=np.asarray(content["variances"], dtype=np.float64).reshape(k),
                residual_variance=float(content["residual_variance"]),
                threshold=float(content["threshold"]),
                quantile=float(content["quantile"]),
                n_train=int(content["n_train"]),
                n_held_out=int(content["n_held_out"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"The description of the training images is damaged ({type(error).__name__}: {error}); export the "
                "model again."
            ) from error


def _packed(values: npt.NDArray[np.float32]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")


def _unpacked(text: str) -> npt.NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)


def feature_rows(values: npt.ArrayLike) -> Floats:
    """Check features and return them as float64.

    Parameters
    ----------
    values : array_like of float, shape (n, d)
        One row per image.

    Returns
    -------
    ndarray of float64, shape (n, d)

    Raises
    ------
    DataError
        Where they are no table of finite numbers.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2 or not rows.shape[1]:
        raise DataError(
            f"The features have the shape {rows.shape}; give one row of numbers per image, for example the mean of "
            "each feature map."
        )
    if not np.isfinite(rows).all():
        raise DataError("A feature is not a finite number; compute the features anew.")
    return rows
