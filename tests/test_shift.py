"""Shift: a two-sample test that holds its level with grouped images, and operating points compared with statsmodels."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from pneumoscope import shift
from pneumoscope.errors import DataError, UsageError
from pneumoscope.predictions import Predictions
from pneumoscope.shift import Change, Sample, two_sample, two_sample_by_label

Floats = npt.NDArray[np.float64]


def sample(name: str, n_groups: int, *, seed: int, d: int = 6, shift: float = 0.0, alike: float = 0.0) -> Sample:
    """Groups of one to six images; those of a group are the more alike, the larger `alike` is."""
    random = np.random.default_rng([seed, len(name)])
    group = np.repeat(np.arange(n_groups), random.integers(1, 7, n_groups))
    features = random.normal(size=(len(group), d)) + alike * random.normal(size=(n_groups, d))[group]
    features[:, 0] += shift
    return Sample(name, features, np.array([f"{name}/{number}" for number in group]))


def ungrouped(side: Sample) -> Sample:
    return Sample(side.name, side.features, np.array([f"{side.name}/{row}" for row in range(len(side.features))]))


def labelled(side: Sample, labels: npt.ArrayLike) -> Sample:
    return Sample(side.name, side.features, side.groups, np.asarray(labels))


# --- does the test hold what it promises -----------------------------------------------------------------------------


def test_sets_of_one_population_are_rarely_called_different() -> None:
    """At 0.05, with images of a patient alike: 80 pairs of sets, where nothing differs."""
    grouped, naive = [], []
    for seed in range(80):
        sides = sample("train", 40, seed=seed, alike=2.0), sample("test", 16, seed=seed, alike=2.0)
        grouped.append(two_sample(*sides, permutations=39, seed=seed).p_value)
        if seed < 30:
            naive.append(two_sample(*map(ungrouped, sides), permutations=39, seed=seed).p_value)
    rejected = sum(p is not None and p <= 0.05 for p in grouped)
    assert binomtest(rejected, 80, 0.05).pvalue > 0.01
    assert np.mean(np.array(grouped, dtype=float)) == pytest.approx(0.5, abs=0.1)
    # the same test without groups takes chance for a difference: it is the groups that keep the level
    assert sum(p is not None and p <= 0.05 for p in naive) > 15


def test_a_patient_is_never_learned_from_and_scored_with() -> None:
    """Each patient has a feature of its own: a classifier that had seen a patient would know its set."""
    n_groups = 30
    group = np.repeat(np.arange(2 * n_groups), 4)
    features = np.eye(2 * n_groups)[group] + np.random.default_rng(0).normal(0, 0.05, (len(group), 2 * n_groups))
    sides = [Sample(name, features[rows], group[rows]) for name, rows in (("a", group < 30), ("b", group >= 30))]
    together = two_sample(*sides, permutations=99)
    assert together.auc is not None
    assert together.auc < 0.6
    assert together.verdict == "cannot be told apart at this n"
    apart = two_sample(*map(ungrouped, sides), permutations=99)
    assert apart.auc is not None
    assert apart.auc > 0.9


def test_a_difference_is_found() -> None:
    result = two_sample(sample("train", 60, seed=1), sample("test", 30, seed=2, shift=1.2))
    assert result.verdict == "differ"
    assert result.p_value == 1 / 200
    assert result.auc is not None
    assert result.interval is not None
    assert 0.5 < result.interval.low < result.auc < result.interval.high < 0.9
    assert result.interval.method == "bootstrap by group"


def test_it_finds_what_a_logistic_regression_finds() -> None:
    for seed, size in ((1, 0.0), (2, 0.5), (3, 1.0)):
        first, second = sample("train", 80, seed=seed, d=10), sample("test", 50, seed=seed, d=10, shift=size)
        features = np.concatenate([first.features, second.features])
        of_second = np.repeat([0, 1], [len(first.features), len(second.features)])
        scores = cross_val_predict(
            make_pipeline(StandardScaler(), LogisticRegression()), features, of_second,
            groups=np.concatenate([first.groups, second.groups]), cv=GroupKFold(5), method="decision_function",
        )  # fmt: skip
        expected = roc_auc_score(of_second, scores)
        assert two_sample(first, second, permutations=1).auc == pytest.approx(expected, abs=0.03)


def test_sets_without_overlap_are_told_apart_perfectly() -> None:
    result = two_sample(sample("train", 20, seed=1), sample("test", 20, seed=2, shift=100.0), permutations=99)
    assert (result.auc, result.p_value, result.verdict) == (1.0, 0.01, "differ")
    assert result.interval is None  # it would have no width


def test_images_that_are_all_alike_cannot_be_told_apart() -> None:
    sides = [Sample(name, np.full((10, 3), 0.1), np.array([f"{name}{row}" for row in range(10)])) for name in "ab"]
    result = two_sample(*sides, permutations=19)
    assert (result.auc, result.p_value, result.verdict) == (0.5, 1.0, "cannot be told apart at this n")


def test_neither_scale_nor_the_order_of_rows_nor_the_order_of_sets_matters() -> None:
    first, second = sample("train", 30, seed=1), sample("test", 20, seed=2, shift=0.5)
    before = two_sample(first, second, permutations=99)
    scale = np.geomspace(1e-3, 1e3, 6)
    order = np.random.default_rng(0).permutation(len(second.features))
    scaled = [
        Sample("train", first.features * scale + 5, first.groups),
        Sample("test", second.features[order] * scale + 5, second.groups[order]),
    ]
    after = two_sample(*scaled, permutations=99)
    assert after.auc == pytest.approx(before.auc, abs=1e-9)
    assert after.p_value == before.p_value
    assert two_sample(second, first, permutations=1).auc == pytest.approx(before.auc, abs=1e-9)


def test_the_same_seed_gives_the_same_result() -> None:
    sides = sample("train", 20, seed=1), sample("test", 20, seed=2)
    assert two_sample(*sides, permutations=19, seed=5) == two_sample(*sides, permutations=19, seed=5)
    assert two_sample(*sides, permutations=19, seed=5) != two_sample(*sides, permutations=19, seed=6)


def test_more_features_than_images_are_no_trouble() -> None:
    result = two_sample(sample("train", 12, seed=1, d=300), sample("test", 12, seed=2, d=300), permutations=39)
    assert result.p_value is not None
    assert result.p_value > 0.05
    features = np.repeat(sample("train", 12, seed=1, d=2).features, 3, axis=1)  # columns that are alike
    doubled = Sample("train", features, sample("train", 12, seed=1, d=2).groups)
    assert two_sample(doubled, sample("test", 12, seed=2), permutations=39).auc is not None


# --- by label --------------------------------------------------------------------------------------------------------


def test_another_share_of_pneumonia_is_not_another_kind_of_image() -> None:
    """The label shifts the features, the sets differ in their labels only."""
    sides = []
    for name, share in (("train", 0.2), ("test", 0.8)):
        side = ungrouped(sample(name, 60, seed=3))
        labels = np.random.default_rng(len(name)).random(len(side.features)) < share
        side.features[labels, 0] += 3.0
        sides.append(labelled(side, labels.astype(np.int8)))
    assert two_sample(*sides).verdict == "differ"
    by_label = two_sample_by_label(*sides)
    assert list(by_label) == ["NORMAL", "PNEUMONIA"]
    assert {result.verdict for result in by_label.values()} == {"cannot be told apart at this n"}
    assert sum(result.n[0] for result in by_label.values()) == len(sides[0].features)
    assert [result.label for result in by_label.values()] == ["NORMAL", "PNEUMONIA"]
    assert {result.alpha for result in by_label.values()} == {0.025}


def test_the_label_that_differs_is_named() -> None:
    sides = []
    for name, by in (("train", 0.0), ("test", 1.5)):
        side = ungrouped(sample(name, 40, seed=4))
        labels = np.arange(len(side.features)) % 2
        side.features[labels == 1, 1] += by
        sides.append(labelled(side, labels))
    by_label = two_sample_by_label(*sides, permutations=99)
    assert by_label["NORMAL"].verdict == "cannot be told apart at this n"
    assert by_label["PNEUMONIA"].verdict == "differ"
    assert by_label["PNEUMONIA"] == two_sample(*sides, label="PNEUMONIA", alpha=0.025, permutations=99)


def test_a_label_without_images_is_not_tested() -> None:
    sides = [
        labelled(side, np.ones(len(side.features))) for side in (sample("train", 20, seed=1), sample("test", 9, seed=2))
    ]
    result = two_sample_by_label(*sides, permutations=19)["NORMAL"]
    assert (result.n, result.groups, result.auc, result.p_value, result.interval) == ((0, 0), (0, 0), None, None, None)
    assert result.verdict == "not tested"
    assert result.sentence == (
        "Whether the NORMAL images of test differ from those of train was not tested: the sets have 0 and 0 groups, "
        "at least 5 each are needed."
    )
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["reason"] == result.reason


@pytest.mark.parametrize(("n_groups", "tested"), [(4, False), (5, True)])
def test_fewer_than_five_groups_are_not_tested(n_groups: int, tested: bool) -> None:
    result = two_sample(sample("train", 20, seed=1), sample("test", n_groups, seed=2), permutations=9)
    assert (result.verdict != "not tested") is tested
    assert (result.auc is not None) is tested


# --- what is said ----------------------------------------------------------------------------------------------------


def test_the_sentence_says_what_was_found() -> None:
    first, second = sample("train", 60, seed=1), sample("test", 30, seed=2, shift=1.2)
    result = two_sample(first, second)
    assert result.interval is not None
    figures = (
        f"a classifier between them has an AUC of {result.auc:.3f} (95 % interval {result.interval.low:.3f} to "
        f"{result.interval.high:.3f}), where 0.5 is guessing (p = 0.005)."
    )
    n = len(first.features), len(second.features)
    assert result.sentence == f"The {n[0]} images of train and the {n[1]} of test differ: {figures}"
    second = sample("test", 30, seed=3)
    n = n[0], len(second.features)
    same = two_sample(labelled(first, np.zeros(n[0])), labelled(second, np.zeros(n[1])), label="NORMAL")
    assert same.sentence.startswith(
        f"The {n[0]} NORMAL images of train and the {n[1]} of test cannot be told apart at this n: a classifier between"
    )


def test_the_result_is_ready_for_json() -> None:
    result = two_sample(sample("train", 20, seed=1), sample("test", 10, seed=2), permutations=19)
    content = result.as_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["names"] == ["train", "test"]
    assert content["groups"] == [20, 10]
    assert (content["verdict"], content["sentence"]) == (result.verdict, result.sentence)
    assert content["interval"] == (result.interval and result.interval.as_dict())


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_group_in_both_sets_is_refused() -> None:
    first, second = sample("train", 20, seed=1), sample("test", 20, seed=2)
    second.groups[:2] = first.groups[0]
    with pytest.raises(DataError) as caught:
        two_sample(first, second)
    assert str(caught.value) == (
        "1 groups stand in both train and test, train/0 among them; give sets that share no group."
    )


def test_features_of_two_networks_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        two_sample(sample("train", 20, seed=1, d=5), sample("test", 20, seed=2, d=7))
    assert str(caught.value) == (
        "The images of train have 5 features each, those of test 7; compute both with the same network."
    )


def test_groups_and_labels_that_do_not_fit_are_refused() -> None:
    features = np.zeros((4, 2))
    with pytest.raises(DataError) as caught:
        Sample("site", features, np.arange(3))
    assert str(caught.value) == "The groups of site have the shape (3,) for 4 images; give one per image."
    with pytest.raises(DataError) as caught:
        Sample("site", features, np.arange(4), np.zeros((4, 1)))
    assert str(caught.value) == "The labels of site have the shape (4, 1) for 4 images; give one per image."


def test_features_that_are_no_finite_table_are_refused() -> None:
    with pytest.raises(DataError, match=r"^The features have the shape \(4,\); give one row of numbers per image"):
        Sample("site", np.zeros(4), np.arange(4))
    with pytest.raises(DataError, match=r"^A feature is not a finite number; compute the features anew\.$"):
        Sample("site", np.full((4, 2), np.nan), np.arange(4))


def test_a_label_cannot_be_picked_where_none_is_known() -> None:
    with pytest.raises(DataError) as caught:
        two_sample_by_label(sample("train", 20, seed=1), sample("site", 20, seed=2))
    assert str(caught.value) == "The labels of train are not known; test all its images together."


def test_a_test_without_permutations_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        two_sample(sample("train", 20, seed=1), sample("test", 20, seed=2), permutations=0)
    assert str(caught.value) == "A test with 0 permutations was asked for; give 1 or more, usually 199."


# --- operating points ------------------------------------------------------------------------------------------------


def scored(split: str, *, found: int, missed: int, cleared: int, alarmed: int) -> Predictions:
    """Images of both labels, called right and wrong at the threshold 0.5; a score on it is a call of NORMAL."""
    labels = [1] * (found + missed) + [0] * (cleared + alarmed)
    scores = [0.75] * found + [0.5] * missed + [0.5] * cleared + [0.75] * alarmed
    names = [f"{split}/{at}" for at in range(len(labels))]
    return Predictions.of(pd.DataFrame({"path": names, "image_id": names, "split": split, "label": labels}), scores)


def specificity(there: tuple[int, int], here: tuple[int, int]) -> Change:
    """The change of a share, each given as (right, wrong)."""
    parts = [
        scored(split, found=3, missed=1, cleared=right, alarmed=wrong)
        for split, (right, wrong) in (("validation", there), ("test", here))
    ]
    return shift.moved(*parts, threshold=0.5).specificity


def test_the_published_example_of_newcombe() -> None:
    """Newcombe (1998), Statistics in Medicine 17, 873-890, table II: 56/70 less 48/80, method 10."""
    change = specificity((48, 32), (56, 14))
    assert change.difference == pytest.approx(0.2, abs=1e-12)
    assert change.interval is not None
    assert (change.interval.low, change.interval.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert change.interval.method == "newcombe"
    assert change.verdict == "rose"


@pytest.mark.parametrize("there", [(0, 1), (1, 0), (5, 0), (0, 7), (40, 3), (1, 200)])
@pytest.mark.parametrize("here", [(0, 1), (1, 0), (9, 0), (0, 4), (30, 31), (200, 1)])
def test_intervals_are_those_of_statsmodels(there: tuple[int, int], here: tuple[int, int]) -> None:
    change = specificity(there, here)
    for counts, share, interval in (
        (there, change.there, change.there_interval),
        (here, change.here, change.here_interval),
    ):
        assert share == counts[0] / sum(counts)
        assert interval is not None
        expected = proportion_confint(counts[0], sum(counts), method="wilson")
        assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-9)
    low, high = confint_proportions_2indep(here[0], sum(here), there[0], sum(there), method="newcomb", compare="diff")
    assert change.interval is not None
    assert (change.interval.low, change.interval.high) == pytest.approx((low, high), abs=1e-9)
    assert -1 <= change.interval.low <= change.interval.high <= 1


def test_each_verdict_is_that_of_the_interval() -> None:
    assert specificity((96, 4), (60, 40)).verdict == "fell"
    assert specificity((60, 40), (96, 4)).verdict == "rose"
    assert specificity((60, 40), (61, 39)).verdict == "cannot be told to have moved at this n"
    assert specificity((1, 0), (0, 1)).verdict == "cannot be told to have moved at this n"
    assert specificity((1, 0), (0, 0)).verdict == "undefined"


def test_the_sentence_about_an_operating_point_says_both_shares() -> None:
    there = scored("validation", found=95, missed=5, cleared=96, alarmed=4)
    here = scored("test", found=96, missed=4, cleared=60, alarmed=40)
    result = shift.moved(there, here, threshold=0.5, point="youden")
    assert result.sentence == (
        "At the operating point youden (threshold 0.5), sensitivity is 0.950 (95 % interval 0.888 to 0.978) on "
        "validation and 0.960 (95 % interval 0.902 to 0.984) on test: it cannot be told to have moved at this n, "
        "+0.010 (95 % interval -0.055 to 0.076); specificity is 0.960 (95 % interval 0.902 to 0.984) on validation and "
        "0.600 (95 % interval 0.502 to 0.691) on test: it fell, -0.360 (95 % interval -0.461 to -0.252)."
    )
    content = result.as_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["sensitivity"]["there"] == 0.95
    assert content["specificity"]["verdict"] == "fell"
    assert content["specificity"]["interval"]["method"] == "newcombe"
    assert (content["point"], content["threshold"], content["names"]) == ("youden", 0.5, ["validation", "test"])


def test_a_share_that_is_undefined_is_said_to_be() -> None:
    there = scored("validation", found=9, missed=1, cleared=5, alarmed=5)
    here = scored("site", found=8, missed=2, cleared=0, alarmed=0)
    result = shift.moved(there, here, threshold=0.5, names=("validation", "the site"))
    change = result.specificity
    assert (change.there, change.here, change.here_interval, change.difference, change.interval) == (
        0.5,
        None,
        None,
        None,
        None,
    )
    assert result.sentence.endswith(
        "specificity is 0.500 (95 % interval 0.237 to 0.763) on validation and undefined on the site, "
        "so that no change can be told."
    )
    assert json.dumps(result.as_dict(), allow_nan=False)


def test_the_threshold_is_the_one_that_is_given() -> None:
    there = scored("validation", found=9, missed=1, cleared=8, alarmed=2)
    result = shift.moved(there, there, threshold=0.75)
    assert (result.sensitivity.there, result.specificity.there) == (0.0, 1.0)
    assert result.sensitivity.difference == 0.0
