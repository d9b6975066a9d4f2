"""Probabilities and what was so: statsmodels, SciPy, scikit-learn, dcurves, and sums by hand."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as sklearn_log_loss
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM
from statsmodels.stats.proportion import proportion_confint

from pneumoscope import calibration
from pneumoscope.calibration import Temperature
from pneumoscope.errors import DataError, UsageError

Labels = npt.NDArray[np.int8]
Scores = npt.NDArray[np.float64]
Case = tuple[Labels, Scores]

NO_OVERLAP = "The probabilities of the two labels do not overlap, so that logistic regression has no solution."
NOT_TOO_SURE = "The scores are not too sure as they are, and none makes them surer: they stand."
TOO_HOT = (
    "The loss still falls at a temperature of 100, because the scores do not rise with the label; "
    "train the model again."
)
SCORES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32, allow_subnormal=False)
CASES = st.lists(st.tuples(st.integers(0, 1), SCORES), min_size=1, max_size=60).map(
    lambda rows: (np.array([label for label, _ in rows], np.int8), np.array([score for _, score in rows], np.float64))
)
exhaustively = settings(derandomize=True, deadline=None, max_examples=150, database=None)


def random_case(n: int, seed: int, *, sharpness: float = 1.0, shift: float = 0.0) -> Case:
    """Labels drawn with probability expit(x), scores expit(sharpness x + shift) as float32, some of them 0 and 1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0.8, 2, n)
    labels = (rng.random(n) < expit(x)).astype(np.int8)
    scores = expit(sharpness * x + shift).astype(np.float32).astype(np.float64)
    scores[:2] = [0, 1]
    return labels, scores


def clipped(scores: Scores) -> Scores:
    return np.clip(scores, 1e-7, 1 - 1e-7)


# --- proper scores ---------------------------------------------------------------------------------------------------


@exhaustively
@given(CASES)
def test_brier_and_loss_are_those_of_scikit_learn(case: Case) -> None:
    labels, scores = case
    assert calibration.brier_loss(labels, scores) == pytest.approx(
        brier_score_loss(labels, scores, labels=[0, 1], pos_label=1), abs=1e-12
    )
    expected = sklearn_log_loss(labels, clipped(scores), labels=[0, 1])
    assert calibration.log_loss(labels, scores) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_coin_has_a_quarter_and_a_wholly_wrong_score_one() -> None:
    assert calibration.brier_loss(np.array([0, 1, 1]), np.full(3, 0.5)) == 0.25
    assert calibration.brier_loss(np.array([0, 1]), np.array([1.0, 0.0])) == 1


# --- recalibration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("sharpness", "shift"), [(1.0, 0.0), (3.0, 0.0), (0.3, -1.0), (1.5, 2.0), (-1.0, 0.5)])
def test_slope_and_intercepts_are_those_of_statsmodels(seed: int, sharpness: float, shift: float) -> None:
    labels, scores = random_case(400, seed, sharpness=sharpness, shift=shift)
    x = logit(clipped(scores))
    both = GLM(labels, np.column_stack([np.ones_like(x), x]), family=Binomial()).fit(tol=1e-14)
    shifted = GLM(labels, np.ones((len(x), 1)), family=Binomial(), offset=x).fit(tol=1e-14)
    found = calibration.calibrate(labels, scores)
    assert (found.intercept, found.slope) == pytest.approx(tuple(both.params), abs=1e-6)
    assert found.intercept_in_the_large == pytest.approx(shifted.params[0], abs=1e-6)
    assert found.undefined == {}


def test_probabilities_that_are_too_sure_have_a_slope_below_1() -> None:
    labels, scores = random_case(20_000, 1, sharpness=2.0)
    slope = calibration.calibrate(labels, scores).slope
    assert slope == pytest.approx(0.5, abs=0.05)
    labels, scores = random_case(20_000, 1, sharpness=0.5)
    slope = calibration.calibrate(labels, scores).slope
    assert slope == pytest.approx(2.0, abs=0.1)


@exhaustively
@given(CASES)
def test_recalibration_makes_the_loss_least_or_says_why_not(case: Case) -> None:
    labels, scores = case
    found = calibration.calibrate(labels, scores)
    none = {name for name in ("slope", "intercept", "intercept_in_the_large") if getattr(found, name) is None}
    assert set(found.undefined) == none
    x = logit(clipped(scores))
    if found.intercept_in_the_large is not None:  # the mean probability is then the share of PNEUMONIA
        assert expit(x + found.intercept_in_the_large).mean() == pytest.approx(labels.mean(), abs=1e-9)
    if found.slope is not None and found.intercept is not None:  # there the slope of the loss is 0 in both directions
        wrong = expit(found.intercept + found.slope * x) - labels
        assert wrong.mean() == pytest.approx(0, abs=1e-9)
        assert (wrong * x).mean() == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    ("labels", "scores"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.7, 0.9]),  # perfect separation
        ([0, 0, 1, 1], [0.9, 0.7, 0.2, 0.1]),  # and the wrong way round
        ([0, 0, 1, 1], [0.1, 0.5, 0.5, 0.9]),  # they touch
        ([0, 1], [0.5, 0.5]),  # all the same
    ],
)
def test_without_overlap_there_is_no_slope(labels: list[int], scores: list[float]) -> None:
    found = calibration.calibrate(np.array(labels, np.int8), np.array(scores))
    assert (found.slope, found.intercept) == (None, None)
    assert found.undefined == {"slope": NO_OVERLAP, "intercept": NO_OVERLAP}
    assert found.intercept_in_the_large is not None


@pytest.mark.parametrize(("label", "missing"), [(0, "PNEUMONIA"), (1, "NORMAL")])
@pytest.mark.parametrize("n", [1, 3])
def test_with_one_class_all_three_are_undefined(label: int, missing: str, n: int) -> None:
    found = calibration.calibrate(np.full(n, label, np.int8), np.linspace(0.2, 0.8, n))
    reason = f"There is no {missing} image."
    assert found.undefined == {"slope": reason, "intercept": reason, "intercept_in_the_large": reason}
    assert (found.slope, found.intercept, found.intercept_in_the_large) == (None, None, None)
    assert math.isfinite(found.loss)
    assert json.dumps(found.as_dict(), allow_nan=False)


def test_a_pair_of_images_in_the_wrong_order_by_one_bit_is_fitted() -> None:
    high = float(np.nextafter(np.float32(0.5), np.float32(1)))
    labels, scores = np.array([0, 0, 1, 1], np.int8), np.array([0.01, high, 0.5, 0.99])
    found = calibration.calibrate(labels, scores)
    assert found.slope is not None
    assert found.intercept is not None
    x = logit(scores)
    assert ((expit(found.intercept + found.slope * x) - labels) * x).sum() == pytest.approx(0, abs=1e-8)


def test_where_plain_newton_steps_run_away_halved_ones_arrive() -> None:
    # two PNEUMONIA images among 26 NORMAL ones of nearly one score: one below most of them, one far above
    logits = np.concatenate([[9.9, 16.0], 10 + 0.1 * np.cos(np.arange(26))])
    labels, scores = np.array([1, 1] + [0] * 26, np.int8), expit(logits)
    found = calibration.calibrate(labels, scores)
    assert found.slope is not None
    assert found.intercept is not None
    wrong = expit(found.intercept + found.slope * logit(scores)) - labels
    assert wrong.mean() == pytest.approx(0, abs=1e-9)
    assert (wrong * logits).mean() == pytest.approx(0, abs=1e-8)


# --- reliability -----------------------------------------------------------------------------------------------------


def test_bins_and_expected_error_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 0, 1, 1], np.int8)
    scores = np.array([0.0, 0.1, 0.125, 0.75, 0.8, 0.8125, 1.0])
    found = calibration.calibrate(labels, scores)
    shown = [(part.low, part.high, part.n, part.mean_probability, part.share_positive) for part in found.bins]
    # 0.1 and 0.8 belong to the bin below them, as a score that equals a threshold does
    assert shown == [
        (0.0, 0.1, 2, 0.05, 0.0),
        (0.1, 0.2, 1, 0.125, 1.0),
        (pytest.approx(0.7), 0.8, 2, pytest.approx(0.775), 0.5),
        (0.8, 0.9, 1, 0.8125, 1.0),
        (0.9, 1.0, 1, 1.0, 1.0),
    ]
    by_hand = (2 * 0.05 + 0.875 + 2 * 0.275 + 0.1875 + 0) / 7
    assert found.expected_calibration_error == pytest.approx(by_hand, abs=1e-15)


@exhaustively
@given(CASES, st.integers(1, 12))
def test_the_reliability_curve_is_that_of_scikit_learn(case: Case, bins: int) -> None:
    labels, scores = case
    found = calibration.reliability_curve(labels, scores, bins=bins)
    assert sum(part.n for part in found) == len(labels)
    share, mean = calibration_curve(np.append(labels, [0, 1]), np.append(scores, [1.0, 1.0]), n_bins=bins)
    more = calibration.reliability_curve(
        np.append(labels, [0, 1]).astype(np.int8), np.append(scores, [1.0, 1.0]), bins=bins
    )
    assert [part.share_positive for part in more] == pytest.approx(share.tolist(), abs=1e-12)
    assert [part.mean_probability for part in more] == pytest.approx(mean.tolist(), abs=1e-12)
    assert (
        more[:-1] == found[: len(more) - 1]
    )  # but for the last bin, which got the two that give scikit-learn both labels


def test_each_bin_has_the_wilson_interval_of_statsmodels() -> None:
    labels, scores = random_case(300, 5)
    bins = calibration.reliability_curve(labels, scores, bins=4)
    assert [part.n for part in bins] == np.histogram(scores, 4, (0, 1))[0].tolist()
    for part in bins:
        assert part.interval is not None
        expected = proportion_confint(round(part.share_positive * part.n), part.n, method="wilson")
        assert (part.interval.low, part.interval.high) == pytest.approx(expected, abs=1e-9)


def test_probabilities_that_hold_have_a_small_expected_error_and_biased_ones_have_not() -> None:
    labels, scores = random_case(50_000, 3)
    assert calibration.calibrate(labels, scores).expected_calibration_error < 0.01
    labels, scores = random_case(50_000, 3, shift=2.0)
    assert calibration.calibrate(labels, scores).expected_calibration_error > 0.1


def test_a_calibration_is_ready_for_json() -> None:
    labels, scores = random_case(100, 2)
    shown = calibration.calibrate(labels, scores).as_dict()
    assert list(shown) == [
        "loss", "brier", "slope", "intercept", "intercept_in_the_large", "expected_calibration_error", "bins"
    ]  # fmt: skip
    assert set(shown["bins"][0]) == {"low", "high", "n", "mean_probability", "share_positive", "interval"}
    assert set(shown["bins"][0]["interval"]) == {"low", "high", "method", "level"}
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown


@pytest.mark.parametrize("bins", [0, -3])
def test_a_curve_without_bins_is_refused(bins: int) -> None:
    with pytest.raises(UsageError) as caught:
        calibration.reliability_curve(np.array([1], np.int8), np.array([0.5]), bins=bins)
    assert str(caught.value) == f"A reliability curve of {bins} bins was asked for; give 1 or more, usually 10."


# --- temperature -----------------------------------------------------------------------------------------------------


class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier whose probability is what it is given, so that scikit-learn can calibrate any scores."""

    def fit(self, x: Scores, y: Labels) -> Given:
        self.classes_ = np.unique(y)
        return self

    def predict_proba(self, x: Scores) -> Scores:
        return np.column_stack([1 - x[:, 0], x[:, 0]])

    def predict(self, x: Scores) -> npt.NDArray[np.bool_]:
        return x[:, 0] > 0.5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sharpness", [1.3, 2.5])
def test_the_temperature_is_that_of_scikit_learn(seed: int, sharpness: float) -> None:
    labels, scores = random_case(500, seed, sharpness=sharpness)
    inside = clipped(scores)[:, None]
    oracle = CalibratedClassifierCV(FrozenEstimator(Given().fit(inside, labels)), method="temperature")
    oracle.fit(inside, labels)
    fitted = calibration.fit_temperature(labels, scores)
    assert fitted.value is not None
    inverse = oracle.calibrated_classifiers_[0].calibrators[0].beta_
    assert fitted.value == pytest.approx(1 / inverse, rel=1e-6)
    expected = oracle.predict_proba(inside)[:, 1]
    np.testing.assert_allclose(calibration.apply_temperature(scores, fitted.value), expected, rtol=0, atol=1e-6)


@exhaustively
@given(CASES)
def test_no_other_temperature_has_a_lower_loss(case: Case) -> None:
    labels, scores = case
    fitted = calibration.fit_temperature(labels, scores)
    assert (fitted.value is None) == (fitted.reason is not None)
    if fitted.value is None:
        return

    def loss(log_temperature: float) -> float:
        z = logit(clipped(scores)) / math.exp(log_temperature)
        return float((np.logaddexp(0, z) - labels * z).mean())

    best = minimize_scalar(loss, bounds=(0, math.log(100)), options={"xatol": 1e-10})
    assert loss(math.log(fitted.value)) <= best.fun + 1e-12
    assert 1 <= fitted.value <= 100


def test_temperature_takes_the_sharpness_away_and_leaves_the_order() -> None:
    labels, scores = random_case(50_000, 7, sharpness=3.0)
    fitted = calibration.fit_temperature(labels, scores)
    assert fitted.value == pytest.approx(3.0, abs=0.1)
    assert fitted.value is not None
    calm = calibration.apply_temperature(scores, fitted.value)
    assert calibration.log_loss(labels, calm) < calibration.log_loss(labels, scores)
    assert calibration.calibrate(labels, calm).slope == pytest.approx(1.0, abs=0.02)
    order = np.argsort(scores, kind="stable")
    assert (np.diff(calm[order]) >= 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_scores_that_are_not_sure_enough_stay_as_they_are(seed: int) -> None:
    labels, scores = random_case(500, seed, sharpness=0.4)
    assert calibration.fit_temperature(labels, scores) == Temperature(None, NOT_TOO_SURE)


def test_applying_a_temperature_by_hand() -> None:
    odds = np.array([1 / 16, 1, 4, 81])
    found = calibration.apply_temperature(odds / (1 + odds), 2.0)  # half the logit is the root of the odds
    np.testing.assert_allclose(found, [0.2, 0.5, 2 / 3, 0.9], rtol=0, atol=1e-12)
    ends = calibration.apply_temperature(np.array([0.0, 1.0]), 0.5)
    assert 0 < ends[0] < 1e-13
    assert 1 - 1e-13 < ends[1] < 1
    same = np.array([0.25, 0.5, 0.75])
    np.testing.assert_allclose(calibration.apply_temperature(same, 1.0), same, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("labels", "scores", "reason"),
    [
        ([1, 1], [0.2, 0.8], "There is no NORMAL image to fit a temperature on."),
        ([0], [0.2], "There is no PNEUMONIA image to fit a temperature on."),
        ([0, 0, 1, 1], [0.1, 0.4, 0.6, 0.9], NOT_TOO_SURE),
        ([0, 0, 1, 1], [0.9, 0.6, 0.4, 0.1], TOO_HOT),
        ([0, 1], [0.5, 0.5], TOO_HOT),
    ],
)
def test_where_no_temperature_can_be_fitted_there_is_a_reason(
    labels: list[int], scores: list[float], reason: str
) -> None:
    fitted = calibration.fit_temperature(np.array(labels, np.int8), np.array(scores))
    assert fitted == Temperature(None, reason)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_out_of_range_is_refused(temperature: float) -> None:
    with pytest.raises(UsageError) as caught:
        calibration.apply_temperature(np.array([0.5]), temperature)
    assert str(caught.value) == (
        f"The temperature is {temperature}; give a finite number above 0, as fit_temperature returns it."
    )


# --- decisions -------------------------------------------------------------------------------------------------------


def test_net_benefit_is_that_of_dcurves() -> None:
    at = np.arange(200)
    scores = ((at * 73) % 199 + 0.5) / 200
    labels = (((at * 31) % 97) / 97 < scores).astype(np.int8)
    thresholds = np.array([0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 0.9, 0.99])
    found = calibration.decision_curve(labels, scores, thresholds=thresholds)
    # what dca() of dcurves 1.1.7 (Memorial Sloan Kettering) gives for these very rows
    model = [0.500151515152, 0.481842105263, 0.450555555556, 0.40125, 0.345, 0.255, 0.145, 0.045, 0.005]
    everybody = [0.505050505051, 0.484210526316, 0.455555555556, 0.3875, 0.246153846154, 0.02, -0.96, -3.9, -48.0]
    np.testing.assert_allclose(found.net_benefit, model, rtol=0, atol=1e-11)
    np.testing.assert_allclose(found.treat_all, everybody, rtol=0, atol=1e-11)


@exhaustively
@given(CASES)
def test_net_benefit_by_counting(case: Case) -> None:
    labels, scores = case
    found = calibration.decision_curve(labels, scores)
    assert found.thresholds.tolist() == pytest.approx([k / 100 for k in range(1, 100)], abs=1e-15)
    for threshold, benefit in list(zip(found.thresholds.tolist(), found.net_benefit.tolist(), strict=True))[::7]:
        called = scores > threshold
        odds = Fraction(threshold) / (1 - Fraction(threshold))
        right, wrong = int((called & (labels == 1)).sum()), int((called & (labels == 0)).sum())
        assert benefit == pytest.approx(float((right - odds * wrong) / len(labels)), abs=1e-12)


def test_a_probability_equal_to_the_threshold_is_not_acted_on() -> None:
    found = calibration.decision_curve(np.array([1], np.int8), np.array([0.5]), thresholds=np.array([0.25, 0.5]))
    assert found.net_benefit.tolist() == [1.0, 0.0]
    assert found.treat_all.tolist() == [1.0, 1.0]
    assert found.as_dict() == {
        "thresholds": [0.25, 0.5], "net_benefit": [1.0, 0.0], "treat_all": [1.0, 1.0], "treat_none": [0.0, 0.0]
    }  # fmt: skip


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_a_decision_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError) as caught:
        calibration.decision_curve(np.array([1], np.int8), np.array([0.5]), thresholds=np.array([threshold]))
    assert str(caught.value) == (
        "A threshold of a decision curve is not from 0 to below 1; give probabilities to act on."
    )


def test_no_images_are_refused() -> None:
    none = np.array([], np.int8), np.array([])
    message = "There is no image whose probability could be measured; give one labelled image or more."
    with pytest.raises(DataError) as caught:
        calibration.calibrate(*none)
    assert str(caught.value) == message
    with pytest.raises(DataError) as caught:
        calibration.decision_curve(*none)
    assert str(caught.value) == message
    assert calibration.fit_temperature(*none).value is None
