"""Shift: do these images differ from those a model learned from, and how far did its operating point move.

Owns a two-sample test on features and the comparison of a threshold on two splits. Whether one single image is unlike
the training images is for `familiarity`. Knows nothing of networks, images or files.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from sklearn.covariance import ledoit_wolf_shrinkage

from pneumoscope import intervals, metrics
from pneumoscope.errors import DataError, UsageError
from pneumoscope.familiarity import feature_rows
from pneumoscope.intervals import Interval
from pneumoscope.predictions import Predictions
from pneumoscope.specs import LABELS

PERMUTATIONS: Final = 199
"""Random exchanges of groups behind a p value, whose smallest possible value is 1 / 200."""

_FOLDS: Final = 5
_FEWEST_GROUPS: Final = 5  # in each set: with fewer, hardly any exchange of groups is different from another
_LEVEL: Final = 0.05
_RIDGE: Final = 1e-6  # beside variances of 1: lets columns be constant or alike

Floats = npt.NDArray[np.float64]


# --- do two sets differ ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sample:
    """One set of images as a network sees them.

    Attributes
    ----------
    name : str
        What the set is called in sentences.
    features : ndarray of float64, shape (n, d)
        One row per image; any table of finite numbers is taken. The network must not have been trained on one of the
        two sets only: it sees its training images with other eyes. Take a frozen backbone's.
    groups : ndarray of str or int, shape (n,)
        The group of each image.
    labels : ndarray of int, shape (n,), or None
        0 NORMAL, 1 PNEUMONIA; None where they are not known.

    Raises
    ------
    DataError
        Where a feature is not finite, or there is not one group and one label per image.
    """

    name: str
    features: npt.NDArray[Any]
    groups: npt.NDArray[Any]
    labels: npt.NDArray[Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", feature_rows(self.features))
        for what, values in (("groups", self.groups), ("labels", self.labels)):
            if values is not None and values.shape != (len(self.features),):
                raise DataError(
                    f"The {what} of {self.name} have the shape {values.shape} for {len(self.features):,} images; give "
                    "one per image."
                )

    def of_label(self, label: str) -> Sample:
        """Return the images of one label.

        Raises
        ------
        DataError
            Where the labels are not known.
        """
        if self.labels is None:
            raise DataError(f"The labels of {self.name} are not known; test all its images together.")
        keep = self.labels == LABELS.index(label)
        return Sample(self.name, self.features[keep], self.groups[keep], self.labels[keep])


@dataclass(frozen=True)
class TwoSample:
    """Whether a classifier can tell two sets of images apart.

    Attributes
    ----------
    names : tuple of str
        What the first and the second set are called.
    label : str or None
        The label that all these images have; None where labels were not looked at.
    n, groups : tuple of int
        Images and groups of either set.
    auc : float or None
        Share of the pairs (one image of each set) that the classifier orders rightly, in [0, 1]; 0.5 is guessing.
        None where it was not tested.
    interval : Interval or None
        Of the AUC, by a bootstrap over groups with the classifiers left as they are; None where it has no width.
    p_value : float or None
        One-sided, in (0, 1]: how often sets made by exchanging whole groups at random are told apart as well.
    alpha : float
        The sets differ where the p value is at most this.
    permutations : int
        Exchanges behind the p value.
    reason : str or None
        Why it was not tested, in one sentence.
    """

    names: tuple[str, str]
    label: str | None
    n: tuple[int, int]
    groups: tuple[int, int]
    auc: float | None
    interval: Interval | None
    p_value: float | None
    alpha: float
    permutations: int
    reason: str | None

    @property
    def verdict(self) -> str:
        """``differ``, ``cannot be told apart at this n`` or ``not tested``."""
        if self.p_value is None:
            return "not tested"
        return "differ" if self.p_value <= self.alpha else "cannot be told apart at this n"

    @property
    def sentence(self) -> str:
        """The verdict in words, with its figures."""
        kind = f"{self.label} images" if self.label else "images"
        first, second = self.names
        if self.auc is None or self.p_value is None:
            return f"Whether the {kind} of {second} differ from those of {first} was not tested: {self.reason}"
        return (
            f"The {self.n[0]:,} {kind} of {first} and the {self.n[1]:,} of {second} {self.verdict}: a classifier "
            f"between them has an AUC of {self.auc:.3f}{_within(self.interval)}, where 0.5 is guessing "
            f"(p = {self.p_value:.3f})."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ``verdict`` and ``sentence``, ready for JSON."""
        content = asdict(self) | {"verdict": self.verdict, "sentence": self.sentence}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}


def two_sample(
    first: Sample,
    second: Sample,
    *,
    label: str | None = None,
    alpha: float = _LEVEL,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> TwoSample:
    """Test whether two sets of images differ in their features, by how well a classifier tells them apart.

    This is the classifier two-sample test (Lopez-Paz and Oquab 2017) made for groups. The classifier is Fisher's linear
    discriminant on standardised features with the shrunk covariance of Ledoit and Wolf (2004); on frozen features of
    real X-rays it finds what logistic regression finds, and one fit serves hundreds of exchanged sets. Being linear, it
    sees features that are higher or lower in one set, not features that only vary more. Groups are dealt to five folds
    at random, and each fold's images are scored by a classifier fitted on the others.

    The p value comes from exchanging whole groups between the sets and doing all of it again: (1 + exchanges at least
    as good) / (1 + exchanges) (Phipson and Smyth 2010). A patient's images need not be independent; where nothing
    differs, the groups with their sizes are taken to come from one population.

    Parameters
    ----------
    first, second : Sample
        With features of the same network and no group in common.
    label : str, optional
        Only the images of this one of ``NORMAL`` and ``PNEUMONIA``.
    alpha : float
        The sets differ where the p value is at most this, between 0 and 1.
    permutations : int
        1 or more.
    seed : int
        0 or more; of the folds, the exchanges and the bootstrap.

    Returns
    -------
    TwoSample
        Not tested, with the reason, where a set has fewer than five groups.

    Raises
    ------
    DataError
        Where the sets have features of different lengths or a group in common, or a label is asked for that is unknown.
    UsageError
        Where there is no permutation.
    """
    if permutations < 1:
        raise UsageError(
            f"A test with {permutations} permutations was asked for; give 1 or more, usually {PERMUTATIONS}."
        )
    sides = [side if label is None else side.of_label(label) for side in (first, second)]
    group, of_second = _groups(*sides)
    counts = (int((~of_second).sum()), int(of_second.sum()))
    result = TwoSample(
        names=(first.name, second.name), label=label, n=(len(sides[0].features), len(sides[1].features)),
        groups=counts, auc=None, interval=None, p_value=None, alpha=alpha, permutations=permutations, reason=None,
    )  # fmt: skip
    if min(counts) < _FEWEST_GROUPS:
        few = f"the sets have {counts[0]:,} and {counts[1]:,} groups, at least {_FEWEST_GROUPS} each are needed."
        return replace(result, reason=few)
    random = np.random.default_rng(seed)
    fold = (random.permutation(len(of_second)) % _FOLDS)[group]
    exchanged = [of_second, *(random.permutation(of_second) for _ in range(permutations))]
    sets = np.stack(exchanged, axis=1)[group]
    scores = _held_out_scores(np.concatenate([side.features for side in sides]), sets, fold)
    auc = _areas(scores, sets)
    at_least_as_good = int((auc[1:] >= auc[0] - 1e-12).sum())  # sums in another order differ in the last digits
    area = intervals.weighted_auc(sets[:, 0], scores[:, 0])
    interval = intervals.bootstrap_by_group(lambda weights: {"auc": area(weights)}, group, seed=seed)["auc"]
    return replace(result, auc=float(auc[0]), interval=interval, p_value=(1 + at_least_as_good) / (1 + permutations))


def two_sample_by_label(
    first: Sample, second: Sample, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> dict[str, TwoSample]:
    """Test each label by itself, so that another share of PNEUMONIA is not taken for other images.

    Parameters
    ----------
    first, second, permutations, seed
        As in `two_sample`, with labels.

    Returns
    -------
    dict of str to TwoSample
        By label. Two tests are made, so each has half of 0.05 (Bonferroni).

    Raises
    ------
    DataError, UsageError
        As `two_sample`.
    """
    alpha = _LEVEL / len(LABELS)
    return {
        label: two_sample(first, second, label=label, alpha=alpha, permutations=permutations, seed=seed)
        for label in LABELS
    }


def _groups(first: Sample, second: Sample) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Return the number of each image's group, and of each group whether it is of the second set."""
    lengths = first.features.shape[1], second.features.shape[1]
    if lengths[0] != lengths[1]:
        raise DataError(
            f"The images of {first.name} have {lengths[0]} features each, those of {second.name} {lengths[1]}; compute "
            "both with the same network."
        )
    if len(shared := np.intersect1d(first.groups, second.groups)):
        raise DataError(
            f"{len(shared):,} groups stand in both {first.name} and {second.name}, {shared[0]} among them; give sets "
            "that share no group."
        )
    named, group = np.unique(np.concatenate([first.groups, second.groups]), return_inverse=True)
    return group, np.isin(named, second.groups)


def _held_out_scores(features: Floats, sets: npt.NDArray[np.bool_], fold: npt.NDArray[np.intp]) -> Floats:
    """Score every image by classifiers that never saw its fold, shape (n, k) for k ways to divide into two sets.

    The covariance does not depend on how the images are divided, so one solution serves all k.
    """
    scores = np.empty(sets.shape)
    for held in (fold == number for number in np.unique(fold)):
        seen = features[~held]
        middle, spread = seen.mean(axis=0), seen.std(axis=0)
        spread[spread == 0] = 1
        known, unknown = (seen - middle) / spread, (features[held] - middle) / spread
        shrinkage = ledoit_wolf_shrinkage(known, assume_centered=True)
        covariance = (1 - shrinkage) * (known.T @ known) / len(known)
        covariance.flat[:: len(covariance) + 1] += shrinkage * (known**2).mean() + _RIDGE
        of_second = sets[~held] - sets[~held].mean(axis=0)
        scores[held] = unknown @ np.linalg.solve(covariance, known.T @ of_second)
    return scores


def _areas(scores: Floats, sets: npt.NDArray[np.bool_]) -> Floats:
    """Return the AUC of each column from its ranks (Mann and Whitney 1947), ties counting half."""
    n = sets.sum(axis=0)
    above = (rankdata(scores, axis=0) * sets).sum(axis=0) - n * (n + 1) / 2
    return np.asarray(above / (n * (len(sets) - n)), dtype=np.float64)


# --- what it did to an operating point -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One share on two sets of images.

    Attributes
    ----------
    name : str
        ``sensitivity`` or ``specificity``.
    there, here : float or None
        In [0, 1]; None where a set has no image of that label.
    there_interval, here_interval : Interval or None
        Wilson's, each image taken as independent.
    difference : float or None
        `here` less `there`, in [-1, 1].
    interval : Interval or None
        Of the difference (Newcombe 1998, method 10).
    """

    name: str
    there: float | None
    here: float | None
    there_interval: Interval | None
    here_interval: Interval | None
    difference: float | None
    interval: Interval | None

    @property
    def verdict(self) -> str:
        """``fell``, ``rose``, ``cannot be told to have moved at this n`` or ``undefined``."""
        if self.interval is None:
            return "undefined"
        if self.interval.low <= 0 <= self.interval.high:
            return "cannot be told to have moved at this n"
        return "fell" if self.interval.high < 0 else "rose"


@dataclass(frozen=True)
class Moved:
    """How far an operating point moved from the images it was chosen on to others.

    Attributes
    ----------
    point : str
        Its name, for example ``youden``.
    threshold : float
        Images with a score above it are called PNEUMONIA, on both sets.
    names : tuple of str
        What the two sets are called.
    sensitivity, specificity : Change
        On both.
    """

    point: str
    threshold: float
    names: tuple[str, str]
    sensitivity: Change
    specificity: Change

    @property
    def sentence(self) -> str:
        """What moved and by how much, with intervals."""
        parts = [_told(change, self.names) for change in (self.sensitivity, self.specificity)]
        return f"At the operating point {self.point} (threshold {self.threshold:.3g}), {parts[0]}; {parts[1]}."

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, each share's ``verdict`` and the ``sentence``, ready for JSON."""
        changes = {
            change.name: asdict(change) | {"verdict": change.verdict} for change in (self.sensitivity, self.specificity)
        }
        return {
            "point": self.point, "threshold": self.threshold, "names": list(self.names), **changes,
            "sentence": self.sentence,
        }  # fmt: skip


def moved(
    there: Predictions,
    here: Predictions,
    *,
    threshold: float,
    point: str = "youden",
    names: tuple[str, str] = ("validation", "test"),
) -> Moved:
    """Compare what a threshold achieves on the images it was chosen on with what it achieves on others.

    A threshold looks best where it was chosen, so a small fall is to be expected of any.

    Parameters
    ----------
    there, here : Predictions
        One model's, on the split where the threshold was chosen and on another; no image in both.
    threshold : float
        Above it, a score means PNEUMONIA.
    point : str
        The operating point's name.
    names : tuple of str
        What the splits are called.

    Returns
    -------
    Moved
    """
    before, after = (metrics.confusion(part.labels, part.scores, threshold=threshold) for part in (there, here))
    sensitivity, specificity = (
        [(count.true_positives, count.true_positives + count.false_negatives) for count in (before, after)],
        [(count.true_negatives, count.true_negatives + count.false_positives) for count in (before, after)],
    )
    return Moved(
        point, float(threshold), names, _change("sensitivity", *sensitivity), _change("specificity", *specificity)
    )


def _change(name: str, there: tuple[int, int], here: tuple[int, int]) -> Change:
    """Compare two shares, each given as (right, all)."""
    first, second = intervals.wilson(*there), intervals.wilson(*here)
    p = there[0] / there[1] if there[1] else None
    q = here[0] / here[1] if here[1] else None
    if p is None or q is None or first is None or second is None:
        return Change(name, p, q, first, second, None, None)
    low = q - p - math.hypot(q - second.low, first.high - p)
    high = q - p + math.hypot(second.high - q, p - first.low)
    return Change(name, p, q, first, second, q - p, Interval(low, high, "newcombe", first.level))


def _told(change: Change, names: tuple[str, str]) -> str:
    shares = [
        f"{share:.3f}{_within(interval)}" if share is not None else "undefined"
        for share, interval in ((change.there, change.there_interval), (change.here, change.here_interval))
    ]
    told = f"{change.name} is {shares[0]} on {names[0]} and {shares[1]} on {names[1]}"
    if change.difference is None or change.interval is None:
        return f"{told}, so that no change can be told"
    return f"{told}: it {change.verdict}, {change.difference:+.3f}{_within(change.interval)}"


def _within(interval: Interval | None) -> str:
    """Return an interval for a sentence, with a space before it; nothing where there is none."""
    if interval is None:
        return ""
    return f" ({100 * interval.level:g} % interval {interval.low:.3f} to {interval.high:.3f})"
