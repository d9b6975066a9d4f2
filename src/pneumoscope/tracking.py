"""Mirrors of a run's plain files: event files for TensorBoard, and runs in an MLflow store.

Owns what stands in the mirrors, by which names, and that a mirror never stops or slows the work it shows: all is
written by a thread beside it, and one that fails is named once and left. The run's own files are the truth; whatever a
mirror missed is taken from them at the end. Knows nothing of how a figure comes about, and sends no radiograph, no
file name and no path of an image anywhere.

The names are the same in both: for each epoch ``loss/train``, ``loss/validation``, ``accuracy/train``,
``accuracy/validation``, ``learning_rate`` and ``seconds``; for the kept weights, once measured,
``final_validation/F`` and ``final_test/F``, where ``F`` is ``auc``, ``accuracy`` and so on at threshold 0.5, and
``F_at_P`` the same at the operating point ``P``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

from pneumoscope import _files
from pneumoscope.errors import StoppedEarly, UsageError
from pneumoscope.narration import Narration
from pneumoscope.runs import Run
from pneumoscope.specs import INDIFFERENT, RESEARCH_USE, TITLES, Spec

End = Literal["finished", "stopped", "failed"]
Row = Mapping[str, float]

PATIENCE_S = 60.0
"""How long the end of a stage waits for what a mirror has not yet taken, seconds."""

_SERIES = {
    "train_loss": "loss/train",
    "val_loss": "loss/validation",
    "train_accuracy": "accuracy/train",
    "val_accuracy": "accuracy/validation",
    "learning_rate": "learning_rate",
    "seconds": "seconds",
}
_FIGURES = (
    *("n", "loss", "auc", "average_precision", "brier", "accuracy", "sensitivity", "specificity", "f1", "mcc"),
    *("false_negatives", "false_positives"),
)
_SHOWN = ("*_learning_curve_*.png", "*_roc_curve_*.png", "*_data_dist_*.png")  # of all figures, those without an image


def require(spec: Spec) -> None:
    """Refuse a run whose mirrors need packages that are not installed.

    Raises
    ------
    UsageError
        It names the packages and what installs them.
    """
    tracking = spec.tracking
    needed = {"tensorboard": tracking.tensorboard, "mlflow": bool(tracking.mlflow)}
    needed |= dict.fromkeys(("sqlalchemy", "alembic"), bool(tracking.mlflow) and not tracking.mlflow.startswith("http"))
    missing = [name for name, wanted in needed.items() if wanted and not _installed(name)]
    if missing:
        keys = [key for key in ("tensorboard", "mlflow") if getattr(tracking, key)]
        raise UsageError(
            f"{' and '.join(f'tracking.{key}' for key in keys)} cannot work: {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed here; pip install 'pneumoscope[tracking]', or leave "
            "it off (--resume can switch it on later)."
        )


def _installed(name: str) -> bool:
    """Whether a package is there; a folder of that name in the working directory is none."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


class Mirrors:
    """What a run's Spec asks to be mirrored; where it asks for nothing, every method does nothing.

    Parameters
    ----------
    target : Run
        What is mirrored.
    spec : Spec
        Its ``tracking`` says where to.
    voice : Narration
        Who says, once, that a mirror has failed.
    """

    def __init__(self, target: Run, spec: Spec, voice: Narration) -> None:
        self._voice, self._target, self._spec = voice, target, spec
        self._mirrors: list[_Mirror] = []
        if spec.tracking.tensorboard:
            self._mirrors.append(_TensorBoard(target, spec))
        if spec.tracking.mlflow:
            self._mirrors.append(_Mlflow(target, spec))
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failed: dict[str, str] = {}
        self._told: set[str] = set()

    def open(self) -> None:
        """Say where the mirrors are, and load what they need while other work goes on.

        Raises
        ------
        UsageError
            Where a package is missing, as `require` has it.
        """
        require(self._spec)
        for mirror in self._mirrors:
            self._voice.say(f"  {mirror.title}: {mirror.how_to_look()}")
        self._all(lambda mirror: mirror.open())

    def begin(self) -> None:
        """Make what all stages share, before any of them needs it; the manifest says by now what the run is of."""
        self._all(lambda mirror: mirror.begin())

    def epoch(self, name: str, row: Row) -> None:
        """Mirror an epoch that has just ended.

        Parameters
        ----------
        name : str
            The approach.
        row : mapping of str to float
            As `training.History.epochs` has it.
        """
        kept = dict(row)
        self._all(lambda mirror: mirror.epoch(name, kept))

    def trained(self, name: str, rows: Iterable[Mapping[Any, float]]) -> None:
        """Mirror a whole training, where epochs of it are not there yet.

        Parameters
        ----------
        name : str
            The approach.
        rows : iterable of mapping
            Every epoch, as for `epoch`.
        """
        kept = [{str(key): one for key, one in row.items()} for row in rows]
        self._all(lambda mirror: mirror.trained(name, kept))

    def measured(self) -> None:
        """Mirror what stands in the run's tables, figures and ``metrics.json``; nothing that is there is doubled."""
        self._all(lambda mirror: mirror.measured())

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Note how a stage ends, and wait a little until all is mirrored.

        Parameters
        ----------
        stage : str
            Its name; with ``evaluate`` the run is finished.

        Yields
        ------
        None
        """
        end: End | None = "finished" if stage == "evaluate" else None
        try:
            yield
        except BaseException as error:
            end = "stopped" if isinstance(error, (StoppedEarly, KeyboardInterrupt)) else "failed"
            raise
        finally:
            self._all(lambda mirror: mirror.ended(end))
            self._settle()

    def _all(self, do: Callable[[_Mirror], None]) -> None:
        """Have something done by every mirror that still works, in the order of the calls, beside this thread."""
        for mirror in self._mirrors:
            self._work.put(lambda mirror=mirror: self._guarded(mirror, do))  # type: ignore[misc]
        if self._mirrors and self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="mirrors", daemon=True)
            self._thread.start()
        self._tell()

    def _serve(self) -> None:
        while (task := self._work.get()) is not None:
            task()

    def _guarded(self, mirror: _Mirror, do: Callable[[_Mirror], None]) -> None:
        if mirror.title in self._failed:
            return
        try:
            do(mirror)
        except Exception as error:  # whatever a library, a disk or a server does: the work goes on
            self._failed[mirror.title] = _reason(error)

    def _tell(self) -> None:
        """Say what failed; only here, so that all is said by one thread."""
        for title, reason in list(self._failed.items()):
            if title not in self._told:
                self._told.add(title)
                self._voice.warn(
                    f"{title} is left out from here on ({reason}); nothing is lost: {self._target.folder} holds "
                    "everything."
                )

    def _settle(self) -> None:
        if self._thread is not None:
            self._work.put(None)
            working = any(mirror.title not in self._failed for mirror in self._mirrors)
            self._thread.join(PATIENCE_S if working else 0)
            if self._thread.is_alive():  # it keeps the thread: two would write at once
                for mirror in self._mirrors:
                    self._failed.setdefault(mirror.title, f"no answer in {PATIENCE_S:.0f} s")
            else:
                self._thread = None
        self._tell()


class _Mirror(Protocol):
    """One place that shows the run; its methods are called one at a time."""

    title: str

    def how_to_look(self) -> str: ...
    def open(self) -> None: ...
    def begin(self) -> None: ...
    def epoch(self, name: str, row: Row) -> None: ...
    def trained(self, name: str, rows: Sequence[Row]) -> None: ...
    def measured(self) -> None: ...
    def ended(self, end: End | None) -> None: ...


# --- what is mirrored ------------------------------------------------------------------------------------------------


def _scalars(row: Row) -> dict[str, float]:
    """Return an epoch's numbers by their names in the mirrors; what is no number is left out."""
    return {tag: float(row[key]) for key, tag in _SERIES.items() if math.isfinite(row.get(key, math.nan))}


def _rows_of(target: Run, name: str) -> list[Row]:
    """Return a training's epochs as the run's tables have them; none where it has not ended."""
    rows: dict[str, dict[str, float]] = {}
    for table in ("loss_per_epoch", "accuracy_per_epoch"):
        path = target.table_path(name, table)
        for cells in _files.read_csv(path) if path.exists() else []:
            values = {key: float(cell) for key, cell in cells.items() if cell}
            rows.setdefault(cells["epoch"], {}).update(values)
    return list(rows.values())


def _finals_of(target: Run) -> dict[str, dict[str, float]]:
    """Return the figures of ``metrics.json`` for each model in it, by their names in the mirrors."""
    if not target.metrics_path.exists():
        return {}
    found: dict[str, dict[str, float]] = {}
    for name, parts in _files.read_json(target.metrics_path)["models"].items():
        found[name] = {}
        for split, part in parts.items():
            point = part.get("operating_point") or {}
            for suffix, source in (("", part), (f"_at_{point.get('name')}", point)):
                values = {f"final_{split}/{key}{suffix}": source.get(key) for key in _FIGURES}
                found[name] |= {tag: float(value) for tag, value in values.items() if value is not None}
    return found


def _settings(spec: Spec) -> dict[str, str | bool | int | float]:
    """Return every setting that a figure can depend on, flat, for example ``train.epochs``."""
    flat: dict[str, str | bool | int | float] = {}
    for key, value in spec.model_dump(mode="json", exclude=set(INDIFFERENT)).items():
        parts = {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
        for name, one in parts.items():
            flat[name] = one if isinstance(one, str | bool | int | float) else json.dumps(one)
    return flat


def _reason(error: BaseException) -> str:
    """Return the first line of what a system call said, else of the error, shortened and without anybody's password."""
    chain, cause = [error], error.__cause__ or error.__context__
    while cause is not None and cause not in chain:  # libraries wrap "connection refused" in a page of text
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    told = next((one for one in reversed(chain) if isinstance(one, OSError)), error)
    lines = str(told).strip().splitlines() or [type(told).__name__]
    text = re.sub(r"//[^/@\s]+@", "//", lines[0])
    return text if len(text) <= 200 else f"{text[:199]}…"


# --- TensorBoard -----------------------------------------------------------------------------------------------------


class _TensorBoard:
    """Event files under ``tensorboard/M``, written with TensorBoard's own records; TensorFlow is not loaded for it.

    Who resumes writes a new file and begins it by taking back the steps from there on, as TensorBoard understands it.
    """

    title = "TensorBoard"

    def __init__(self, target: Run, spec: Spec) -> None:
        self._target, self._spec = target, spec
        self._folder = target.folder / "tensorboard"
        self._open: dict[str, _Events] = {}
        self._written: dict[str, list[int]] = {}

    def how_to_look(self) -> str:
        return f"tensorboard --logdir {self._folder}"

    def open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        pass

    def epoch(self, name: str, row: Row) -> None:
        step = int(row["epoch"])
        if name not in self._open:
            self._restart(name, step)
        self._open[name].scalars(_scalars(row), step=step)
        self._written[name].append(step)

    def trained(self, name: str, rows: Sequence[Row]) -> None:
        if rows and self._written.get(name) != [int(row["epoch"]) for row in rows]:
            self._restart(name, int(rows[0]["epoch"]))
            for row in rows:
                self.epoch(name, row)

    def measured(self) -> None:
        for name, finals in _finals_of(self._target).items():
            if not self._files_of(name):  # trained before mirrors were asked for
                self.trained(name, _rows_of(self._target, name))
            path = self._folder / name / "events.out.tfevents.final"
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name.replace('tfevents', 'new')}")  # not yet a name that is looked for
            events = _Events(temporary)
            events.settings(_settings(self._spec), session=f"{self._target.folder.name}/{name}")
            events.scalars(finals, step=0)
            events.close()
            os.replace(temporary, path)

    def ended(self, end: End | None) -> None:
        del end
        for events in self._open.values():
            events.close()
        self._open.clear()

    def _files_of(self, name: str) -> list[Path]:
        return sorted(path for path in (self._folder / name).glob("events.out.tfevents.*") if path.suffix != ".final")

    def _restart(self, name: str, step: int) -> None:
        """Open the next file of an approach; whatever others hold from a step on no longer counts."""
        earlier = self._files_of(name)
        if name not in self._open:
            path = self._folder / name / f"events.out.tfevents.{len(earlier) + 1:04d}"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open[name] = _Events(path)
        if earlier:
            self._open[name].restart(step)
        self._written[name] = []


class _Events:
    """One event file."""

    def __init__(self, path: Path) -> None:
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        writer = importlib.import_module("tensorboard.summary.writer.record_writer").RecordWriter
        self._records = writer(path.open("wb"))
        self._write(file_version="brain.Event:2")

    def restart(self, step: int) -> None:
        """Take back all that was written of this step and later ones."""
        self._write(step=step, session_log=self._event.SessionLog(status=self._event.SessionLog.START))

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=one) for tag, one in values.items()])
        self._write(step=step, summary=summary)

    def settings(self, values: Mapping[str, str | bool | int | float], *, session: str) -> None:
        """Write what TensorBoard shows as hyperparameters."""
        make = importlib.import_module("tensorboard.plugins.hparams.summary_v2").hparams_pb
        self._write(summary=make(dict(values), trial_id=session))

    def close(self) -> None:
        self._records.close()

    def _write(self, **content: Any) -> None:
        event = self._event.Event(wall_time=time.time(), **content)
        self._records.write(event.SerializeToString())
        self._records.flush()


# --- MLflow ----------------------------------------------------------------------------------------------------------


class _Mlflow:
    """An MLflow run for the whole and one under it for each approach; their ids lie under ``mlflow`` in the run."""

    title = "MLflow"

    def __init__(self, target: Run, spec: Spec) -> None:
        self._target, self._spec, self._uri = target, spec, spec.tracking.mlflow
        self._folder = target.folder / "mlflow"
        self._client: Any = None
        self._ids: dict[str, str] = {}
        self._steps: dict[str, set[int]] = {}

    def how_to_look(self) -> str:
        experiment = self._spec.tracking.mlflow_experiment
        if self._uri.startswith("http"):
            return f"experiment {experiment} at {self._uri}"
        return f"experiment {experiment}; mlflow ui --backend-store-uri {self._uri}"

    def open(self) -> None:
        self._connected()

    def begin(self) -> None:
        self._run_of("")

    def epoch(self, name: str, row: Row) -> None:
        run, step = self._run_of(name), int(row["epoch"])
        if step not in self._steps[name]:
            self._log(run, _scalars(row), step=step)
            self._steps[name].add(step)

    def trained(self, name: str, rows: Sequence[Row]) -> None:
        for row in rows:
            self.epoch(name, row)

    def measured(self) -> None:
        finals = _finals_of(self._target)
        for name, values in finals.items():
            self.trained(name, _rows_of(self._target, name))
            self._log(self._run_of(name), values)
        parent = self._run_of("")
        self._log(parent, {f"{name}/{tag}": one for name, values in finals.items() for tag, one in values.items()})
        self._send_files(finals)

    def ended(self, end: End | None) -> None:
        if end is not None and (self._folder / "run.json").exists():
            self._run_of("")
            status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[end]
            for run in self._ids.values():
                self._client.set_terminated(run, status=status)
            self._ids.clear()

    def _connected(self) -> Any:
        """Return MLflow's client; loaded late, since that takes seconds."""
        if self._client is None:
            quiet = {
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
                "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
                "MLFLOW_LOGGING_LEVEL": "ERROR",
                "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
                "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            }
            for key, value in quiet.items():
                os.environ.setdefault(key, value)
            logging.getLogger("alembic").setLevel(logging.ERROR)
            self._client = importlib.import_module("mlflow").MlflowClient(self._uri)
        return self._client

    def _run_of(self, name: str) -> str:
        """Return the id of an approach's MLflow run, of the whole where `name` is empty; made where there is none."""
        if name not in self._ids:
            client, path = self._connected(), self._folder / f"{name or 'run'}.json"
            run = self._kept(path)
            if run is None or not self._lives(run):
                run = self._create(name)
                _files.write_json(path, {"store": self._uri, "run_id": run})
            client.update_run(run, status="RUNNING")
            history = client.get_metric_history(run, _SERIES["train_loss"])
            self._ids[name], self._steps[name] = run, {metric.step for metric in history}
        return self._ids[name]

    def _lives(self, run: str) -> bool:
        """Whether a run is still in the store; someone may have deleted it there."""
        errors = importlib.import_module("mlflow.exceptions")
        try:
            return str(self._connected().get_run(run).info.lifecycle_stage) == "active"
        except errors.MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _kept(self, path: Path) -> str | None:
        """Return an id that was written down, where it is one of this store."""
        kept = _files.read_json(path) if path.exists() else {}
        return str(kept["run_id"]) if kept.get("store") == self._uri else None

    def _create(self, name: str) -> str:
        client, folder = self._connected(), self._target.folder.absolute()
        title, above, tags = folder.name, None, self._tags()
        if folder.parent.name in ("folds", "seeds"):  # under the run that it repeats
            title = " ".join(folder.parts[-3:])
            above = self._kept(folder.parents[1] / "mlflow" / "run.json")
        if name:
            above, tags = self._run_of(""), tags | {"approach": name, "title": TITLES.get(name, name)}
        if above is not None:
            tags["mlflow.parentRunId"] = above
        made = client.create_run(self._experiment(), tags=tags, run_name=f"{title} {name}".strip())
        entities = importlib.import_module("mlflow.entities")
        params = [entities.Param(key, str(value)[:6000]) for key, value in _settings(self._spec).items()]
        for start in range(0, len(params), 100):  # as many as MLflow takes at once
            client.log_batch(made.info.run_id, params=params[start : start + 100])
        return str(made.info.run_id)

    def _tags(self) -> dict[str, str]:
        """Return what a run was made of and with."""
        manifest = self._target.read_manifest()
        note = f"{RESEARCH_USE}." + (f" {manifest['note']}." if manifest.get("note") else "")
        versions = {"pneumoscope": metadata.version("pneumoscope")} | manifest.get("machine", {}).get("versions", {})
        hashes = {"spec_hash": self._spec.hash, "data_hash": str(manifest.get("data_hash", ""))}
        return hashes | {f"version.{key}": str(one) for key, one in versions.items()} | {"mlflow.note.content": note}

    def _experiment(self) -> str:
        client, name = self._connected(), self._spec.tracking.mlflow_experiment
        found = client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        place = None
        if self._uri.startswith("sqlite"):  # else MLflow would take the working directory
            place = (Path(self._uri.partition(":///")[2]).absolute().parent / "mlartifacts").as_uri()
        return str(client.create_experiment(name, artifact_location=place))

    def _log(self, run: str, values: Mapping[str, float], *, step: int = 0) -> None:
        entities, now = importlib.import_module("mlflow.entities"), int(time.time() * 1000)
        known = {} if step else self._connected().get_run(run).data.metrics  # measured again, the same is not doubled
        new = [entities.Metric(tag, one, now, step) for tag, one in values.items() if known.get(tag) != one]
        if new:
            self._connected().log_batch(run, metrics=new)

    def _send_files(self, names: Iterable[str]) -> None:
        """Send figures of numbers and the metrics; pictures that show radiographs stay here."""
        client, figures = self._connected(), self._target.figure_path("any").parent
        for path in sorted(path for pattern in _SHOWN for path in figures.glob(pattern)):
            owner = next((name for name in names if path.name.startswith(f"{name}_")), "")
            client.log_artifact(self._run_of(owner), str(path), "figures")
        for path in (self._target.metrics_path, self._target.metrics_csv_path, self._target.spec_path):
            client.log_artifact(self._run_of(""), str(path))
