"""The error tree: what each means for the exit status."""

from __future__ import annotations

import inspect
import pickle

import pytest

from pneumoscope import errors

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.PneumoscopeError, 1),
        (errors.DataError, 1),
        (errors.StoreError, 1),
        (errors.WeightsError, 1),
        (errors.RunError, 1),
        (errors.ImageError, 1),
        (errors.UsageError, 2),
        (errors.SpecError, 2),
        (errors.StoppedEarly, 75),
    ],
)
def test_exit_status_of(kind: type[errors.PneumoscopeError], status: int) -> None:
    assert kind("something").exit_status == status


def test_every_error_is_ours_and_in_the_drawn_tree() -> None:
    assert len(KINDS) == 9
    assert [kind for kind in KINDS if not issubclass(kind, errors.PneumoscopeError)] == []
    assert [kind.__name__ for kind in KINDS if kind.__name__ not in str(errors.__doc__)] == []


def test_an_image_error_has_a_short_reason_and_a_sentence() -> None:
    error = errors.ImageError("truncated", "The picture ends early.")
    assert (error.reason, str(error)) == ("truncated", "The picture ends early.")
    assert str(errors.ImageError("truncated")) == "truncated"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_comes_back_whole_from_a_worker_process(kind: type[errors.PneumoscopeError]) -> None:
    back = pickle.loads(pickle.dumps(kind("something")))
    assert (type(back), str(back)) == (kind, "something")


def test_an_image_error_keeps_its_reason_on_the_way_from_a_worker_process() -> None:
    back = pickle.loads(pickle.dumps(errors.ImageError("truncated", "The picture ends early.")))
    assert (back.reason, str(back)) == ("truncated", "The picture ends early.")
