"""Split-conformal prediction sets: which labels an image may have, with a promise about how often that is right.

Owns the cuts, the sets and the count of what they did. Written here and not taken from crepes: for two labels the whole
method is one order statistic per label, and two cuts go into a bundle, where crepes would carry all calibration scores
along and, unless told otherwise, break ties by chance. It is the oracle of the tests. Knows nothing of Predictions,
splits or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pneumoscope.curves import Labels, Scores, smallest_count
from pneumoscope.errors import DataError, UsageError
from pneumoscope.intervals import wilson
from pneumoscope.specs import LABELS


@dataclass(frozen=True)
class Share:
    """A share of images.

    Attributes
    ----------
    part, whole : int
        Images.
    """

    part: int
    whole: int

    @property
    def value(self) -> float | None:
        """``part / whole`` in [0, 1]; None where the whole is 0."""
        return self.part / self.whole if self.whole else None

    def as_dict(self) -> dict[str, Any]:
        """Return ``value``, ``part``, ``whole`` and Wilson's ``interval`` as a dictionary or None."""
        interval = wilson(self.part, self.whole)
        return {
            "value": self.value,
            "part": self.part,
            "whole": self.whole,
            "interval": None if interval is None else interval.as_dict(),
        }


@dataclass(frozen=True)
class SetMeasure:
    """What prediction sets did on labelled images.

    Attributes
    ----------
    coverage : Share
        Images whose set holds their label.
    coverage_by_label : mapping of str to Share
        The same for NORMAL and for PNEUMONIA images.
    single, both, empty : Share
        Images whose set holds one label, both, or none.
    """

    coverage: Share
    coverage_by_label: Mapping[str, Share]
    single: Share
    both: Share
    empty: Share

    def as_dict(self) -> dict[str, Any]:
        """Return the shares with their intervals under their names, and ``undefined`` with reasons."""
        missing = [name for name, share in self.coverage_by_label.items() if share.value is None]
        return {
            "coverage": self.coverage.as_dict(),
            "coverage_by_label": {name: share.as_dict() for name, share in self.coverage_by_label.items()},
            "single": self.single.as_dict(),
            "both": self.both.as_dict(),
            "empty": self.empty.as_dict(),
            "undefined": {f"coverage_by_label.{name}": f"There is no {name} image." for name in missing},
        }


@dataclass(frozen=True)
class Conformal:
    """Split-conformal prediction sets, one cut per label (Vovk 2012, label-conditional; Papadopoulos et al. 2002).

    The set of an image holds NORMAL where its probability of PNEUMONIA is `normal_up_to` or less, and PNEUMONIA where
    it is `pneumonia_from` or more. Of new images with one label, drawn as those that the cuts come from, at least the
    share `coverage` on average have it in their set. One cut per label keeps this promise where the shares of the
    labels change, as they do between splits here; images that look different void it, so measure it.

    The two cuts are all that is needed for use. A rank needs no calibrated probability: temperature changes the cuts,
    not the sets.

    Attributes
    ----------
    coverage : float
        The wanted share, between 0 and 1.
    normal_up_to, pneumonia_from : float
        Probabilities of PNEUMONIA in [0, 1]. 1 and 0, so that the label is in every set, where there are fewer images
        of it than coverage / (1 - coverage): nothing less would keep the promise.
    n_normal, n_pneumonia : int
        Images that the cuts come from.
    """

    coverage: float
    normal_up_to: float
    pneumonia_from: float
    n_normal: int
    n_pneumonia: int

    @classmethod
    def fit(cls, labels: Labels, probabilities: Scores, *, coverage: float = 0.9) -> Self:
        """Take the cuts from labelled images that neither training nor the test has seen.

        Parameters
        ----------
        labels : ndarray of int, shape (n,)
            0 or 1.
        probabilities : ndarray of float64, shape (n,)
            Of PNEUMONIA, in [0, 1].
        coverage : float
            The wanted share, between 0 and 1.

        Returns
        -------
        Conformal

        Raises
        ------
        DataError
            Where there is no image.
        UsageError
            Where `coverage` is not between 0 and 1.
        """
        if not 0 < coverage < 1:
            raise UsageError(f"The wanted coverage is {coverage}; give a share between 0 and 1, for example 0.9.")
        _check_any(labels)
        well, sick = np.sort(probabilities[labels == 0]), np.sort(probabilities[labels == 1])[::-1]
        normal_up_to = _ranked(well, coverage, beyond=1.0)
        pneumonia_from = _ranked(sick, coverage, beyond=0.0)
        return cls(coverage, normal_up_to, pneumonia_from, len(well), len(sick))

    def sets(self, probabilities: Scores) -> npt.NDArray[np.bool_]:
        """Return which labels the set of each image holds.

        Parameters
        ----------
        probabilities : ndarray of float64, shape (n,)
            Of PNEUMONIA, in [0, 1].

        Returns
        -------
        ndarray of bool, shape (n, 2)
            Columns NORMAL and PNEUMONIA.
        """
        return np.column_stack([probabilities <= self.normal_up_to, probabilities >= self.pneumonia_from])

    def measure(self, labels: Labels, probabilities: Scores) -> SetMeasure:
        """Count what the sets do on labelled images, usually the test split.

        Parameters
        ----------
        labels : ndarray of int, shape (n,)
            0 or 1.
        probabilities : ndarray of float64, shape (n,)
            Of PNEUMONIA, in [0, 1].

        Returns
        -------
        SetMeasure

        Raises
        ------
        DataError
            Where there is no image.
        """
        _check_any(labels)
        sets = self.sets(probabilities)
        held, size, n = sets[np.arange(len(labels)), labels], sets.sum(axis=1), len(labels)
        of_label = {name: labels == at for at, name in enumerate(LABELS)}
        return SetMeasure(
            coverage=Share(int(held.sum()), n),
            coverage_by_label={name: Share(int(held[rows].sum()), int(rows.sum())) for name, rows in of_label.items()},
            single=Share(int((size == 1).sum()), n),
            both=Share(int((size == 2).sum()), n),
            empty=Share(int((size == 0).sum()), n),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields under their names."""
        return asdict(self)


def _ranked(ordered: Scores, coverage: float, *, beyond: float) -> float:
    """Return the probability at the rank that keeps the coverage of one new image; `beyond` where there is none."""
    rank = smallest_count(coverage, len(ordered) + 1)
    return float(ordered[rank - 1]) if rank <= len(ordered) else beyond


def _check_any(labels: Labels) -> None:
    if not len(labels):
        raise DataError("There is no image to take or measure prediction sets on; give one labelled image or more.")
