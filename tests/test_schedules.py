"""The schedule against Keras's own callbacks, losses that are no number, and the cosine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from pneumoscope._backend import keras
from pneumoscope.schedules import Schedule, cosine
from pneumoscope.specs import TrainSpec


def keras_schedule(losses: Sequence[float], spec: TrainSpec) -> tuple[list[float], int, int]:
    """Drive Keras's own callbacks: the rate after each epoch, the best epoch, how many epochs there were."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.Adam(0.5), loss="mse")
    stopping = keras.callbacks.EarlyStopping(
        "val_loss", patience=spec.patience, min_delta=spec.min_delta, restore_best_weights=True
    )
    plateau = keras.callbacks.ReduceLROnPlateau(
        "val_loss", factor=spec.plateau_factor, patience=spec.plateau_patience, min_delta=spec.plateau_min_delta
    )
    rates = []
    for callback in (stopping, plateau):
        callback.set_model(model)
        callback.on_train_begin()
    for epoch, loss in enumerate(losses):
        for callback in (stopping, plateau):
            callback.on_epoch_end(epoch, {"val_loss": loss})
        rates.append(float(model.optimizer.learning_rate))
        if model.stop_training:
            break
    return rates, stopping.best_epoch + 1, len(rates)


@pytest.mark.parametrize("seed", range(12))
def test_schedule_does_what_the_callbacks_of_keras_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = TrainSpec(
        patience=int(rng.integers(1, 6)),
        min_delta=float(rng.choice([0, 1 / 64])),
        plateau_factor=float(rng.choice([0.2, 0.5])),
        plateau_patience=int(rng.integers(1, 4)),
        plateau_min_delta=float(rng.choice([0, 1 / 64, 1 / 16])),
    )
    losses = (rng.integers(20, 60, 25) - np.arange(25)) / 64  # exact in float32, with ties and gains of just min_delta
    schedule, rates = Schedule(0.5), []
    for epoch, loss in enumerate(losses.tolist(), start=1):
        best = schedule.best_epoch
        assert schedule.update(loss, epoch=epoch, spec=spec) == (schedule.best_epoch != best)
        rates.append(schedule.learning_rate)
        if schedule.exhausted(spec):
            break
    expected, best_epoch, n = keras_schedule(losses.tolist(), spec)
    assert np.allclose(rates, expected, rtol=1e-6)
    assert (schedule.best_epoch, len(rates)) == (best_epoch, n)


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    schedule, spec = Schedule(0.5), TrainSpec(patience=3, plateau_patience=2)
    best = [schedule.update(loss, epoch=n, spec=spec) for n, loss in enumerate([math.nan, 0.7, math.nan, math.nan], 1)]
    assert best == [False, True, False, False]
    assert (schedule.best_loss, schedule.best_epoch, schedule.learning_rate) == (0.7, 2, 0.5 * 0.2)
    assert not schedule.exhausted(spec)
    schedule.update(math.nan, epoch=5, spec=spec)
    assert schedule.exhausted(spec)


def test_cosine_rises_over_its_warm_up_and_falls_to_nothing() -> None:
    rates = [cosine(progress, warmup=0.1) for progress in np.linspace(0, 1, 101)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(0.5)
    assert max(rates) == rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert all(before > after for before, after in itertools.pairwise(rates[10:]))


def test_with_cosine_the_last_good_epoch_counts_and_nothing_stops_early() -> None:
    schedule, spec = Schedule(0.5), TrainSpec(schedule="cosine", patience=1, plateau_patience=1)
    best = [schedule.update(loss, epoch=n, spec=spec) for n, loss in enumerate([0.5, 0.7, 0.9, math.nan], 1)]
    assert best == [True, True, True, False]
    assert schedule.best_epoch == 3
    assert schedule.learning_rate == 0.5  # the loop sets it step by step
    assert not schedule.exhausted(spec)
