"""Signals as a wish to stop: at once where nothing is lost by it, later where state has to be kept first."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from pneumoscope import _stopping, pipeline
from pneumoscope.errors import StoppedEarly, UsageError
from pneumoscope.narration import Narration
from pneumoscope.runs import Run
from pneumoscope.specs import Spec


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", ["TERM", "INT", "USR2"])
def test_a_signal_ends_the_work_where_it_stands(name: str) -> None:
    message = "^Stopped on request; run the same command with --resume.$"
    with pytest.raises(StoppedEarly, match=message), _stopping.on_signals("USR2") as stop:
        send(signal.Signals[f"SIG{name}"])
    assert stop()


def test_patient_work_is_told_and_goes_on_until_it_asks() -> None:
    asked: list[bool] = []

    def work(stop: Callable[[], bool]) -> None:
        asked.append(stop())
        send(signal.SIGTERM)
        asked.append(stop())
        raise ZeroDivisionError  # its own way to end

    with pytest.raises(ZeroDivisionError), _stopping.on_signals() as stop, _stopping.patient():
        work(stop)
    assert asked == [False, True]


def test_patient_work_that_ends_without_asking_again_is_stopped_after_it() -> None:
    done: list[str] = []

    def work() -> None:
        with _stopping.patient():
            with _stopping.patient():
                send(signal.SIGTERM)
            done.append("inner")  # still within patient work
        done.append("outer")

    with pytest.raises(StoppedEarly, match="run the same command with --resume"), _stopping.on_signals():
        work()
    assert done == ["inner"]
    with _stopping.on_signals(), _stopping.patient():
        done.append("a wish of earlier work is not this one's")
    assert len(done) == 2


def test_impatience_comes_back_after_patient_work_that_failed() -> None:
    with _stopping.on_signals():
        with pytest.raises(ZeroDivisionError), _stopping.patient():
            raise ZeroDivisionError
        with pytest.raises(_stopping.Wish):
            send(signal.SIGTERM)


def test_no_handler_of_errors_takes_a_wish_for_one() -> None:
    def work() -> None:
        with contextlib.suppress(Exception):  # as around a picture of the report, without which a run is still one
            send(signal.SIGTERM)
        pytest.fail("the wish to stop was taken for an error, and the work went on")

    with pytest.raises(StoppedEarly), _stopping.on_signals():
        work()


def twice(number: signal.Signals, done: list[str]) -> None:
    send(number)
    send(number)
    done.append("went on")


def test_a_second_interrupt_from_the_keyboard_is_not_put_off() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt), _stopping.on_signals(), _stopping.patient():
        twice(signal.SIGINT, done)
    assert not done


def test_a_second_request_of_a_cluster_is_put_off_like_the_first() -> None:
    done: list[str] = []
    with pytest.raises(StoppedEarly), _stopping.on_signals(), _stopping.patient():
        twice(signal.SIGTERM, done)
    assert done


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)]
    with _stopping.on_signals("USR2"):
        assert signal.getsignal(signal.SIGUSR2) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)] == before


def test_a_signal_that_cannot_be_caught_is_refused_and_leaves_nothing_behind() -> None:
    before = signal.getsignal(signal.SIGTERM)
    message = "^SIGKILL cannot be caught; name another signal, such as USR2.$"
    with pytest.raises(UsageError, match=message), _stopping.on_signals("KILL"):
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_this_system_lacks_is_left_out() -> None:
    with _stopping.on_signals("NOSUCH") as stop:
        assert not stop()


# --- a whole run ------------------------------------------------------------------------------------------------------

STAGES = (
    *(
        "Reading",
        "Packing the images",
        "Auditing",
        "Drawing",
        "Running the frozen layers",
        "Training cnn",
        "Training tl",
    ),
    *("Scoring cnn", "Scoring tl", "Measuring", "Comparing"),
)


class Interrupting(Narration):
    """Asks the process to stop when a stage of that title begins."""

    def __init__(self, title: str) -> None:
        super().__init__("silent")
        self._title = title

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        with super().stage(title):
            if title.startswith(self._title):
                send(signal.SIGTERM)
            yield


def scores_of(run: Run) -> dict[str, list[float]]:
    return {path.name: list(pd.read_csv(path)["y_scores"]) for path in sorted(run.folder.glob("tables/*_yscores.csv"))}


@pytest.mark.slow
def test_a_run_stopped_in_every_stage_goes_on_and_ends_as_one_left_alone(tiny_set: Path, tmp_path: Path) -> None:
    spec = Spec.preset_named("smoke").with_overrides(["models=cnn,tl", "image.size_px=32", "backbone.weights=none"])
    stopped = Run(tmp_path / "stopped")
    for title in STAGES:
        with pytest.raises(StoppedEarly), _stopping.on_signals() as stop:
            pipeline.run(spec, tiny_set, stopped.folder, resume=True, narration=Interrupting(title), stop=stop)
        assert stopped.status == "stopped", title
        assert "run the same command with --resume" in stopped.read_manifest()["error"], title
    pipeline.run(spec, tiny_set, stopped.folder, resume=True)
    alone = pipeline.run(spec, tiny_set, tmp_path / "alone")
    assert stopped.status == "finished"
    assert len(scores_of(alone)) == 4
    assert scores_of(stopped) == scores_of(alone)
