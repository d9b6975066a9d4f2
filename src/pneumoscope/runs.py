"""The Run: a directory that holds everything one run made. This class knows all its file names, and nobody else does.

Owns paths, the manifest, the status, the stages' records and the locks. Knows nothing of how any file's content comes
about.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pneumoscope import _files, _locks
from pneumoscope.errors import RunError
from pneumoscope.specs import Spec

Status = Literal["running", "stopped", "failed", "finished"]


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes
    ----------
    folder : Path
        Where it lies.
    """

    folder: Path

    @classmethod
    def create(cls, folder: Path, *, resume: bool = False) -> Self:
        """Make a run directory, or take up an earlier one.

        Parameters
        ----------
        folder : Path
            New, empty, one whose run ended before it had read its images, or, with `resume`, any earlier run's.
        resume : bool
            Go on with what is there; starts fresh where there is nothing.

        Returns
        -------
        Run

        Raises
        ------
        RunError
            Where the folder cannot be written, holds a run and `resume` is false, or holds something else.
        """
        run = cls(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = sorted(entry.name for entry in folder.iterdir() if entry.name != "locks")  # taken before the rest
            probe = folder / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # another process may try the same folder
        except OSError as error:
            raise RunError(
                f"Cannot write the run to {folder}: {error.strerror or error}; "
                "choose a folder you may write to with -o."
            ) from error
        if content and not run.manifest_path.exists():
            raise RunError(
                f"{folder} is not empty and holds no run (found {content[0]!r}); choose a new folder with -o."
            )
        if run.catalog_path.exists() and not resume:  # one that ended before it had read its images lost nothing
            raise RunError(
                f"{folder} already holds a run ({run.status}); go on with --resume, or choose a new folder with -o."
            )
        return run

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a run directory for reading.

        Parameters
        ----------
        folder : Path
            As `create` made it.

        Returns
        -------
        Run

        Raises
        ------
        RunError
            Where it is not a run.
        """
        run = cls(folder)
        if not run.manifest_path.exists():
            raise RunError(
                f"{folder} is not a run directory (it holds no manifest.json); give the folder that -o named."
            )
        return run

    @property
    def spec_path(self) -> Path:
        """The Spec as TOML."""
        return self.folder / "spec.toml"

    @property
    def manifest_path(self) -> Path:
        """Status, versions, data, stages."""
        return self.folder / "manifest.json"

    @property
    def catalog_path(self) -> Path:
        """The Catalog with its split."""
        return self.folder / "catalog.csv"

    @property
    def audit_path(self) -> Path:
        """What the audit found."""
        return self.folder / "audit.json"

    @property
    def repeats_path(self) -> Path:
        """What further folds and seeds say together."""
        return self.folder / "repeats.json"

    def repeat_folder(self, kind: Literal["folds", "seeds"], number: int) -> Path:
        """Return where the run of one fold or of one further seed lies.

        Parameters
        ----------
        kind : {"folds", "seeds"}
            What is repeated.
        number : int
            The fold, from 1, or the seed.

        Returns
        -------
        Path
        """
        return self.folder / kind / str(number)

    @property
    def jobs_folder(self) -> Path:
        """What batch jobs leave: their scripts, outputs and records."""
        return self.folder / "jobs"

    def stage_path(self, name: str) -> Path:
        """Return where a stage's record lies; only the holder of the lock of that name writes it."""
        return self.folder / "stages" / f"{name}.json"

    @property
    def log_path(self) -> Path:
        """Everything that was said, with times."""
        return self.folder / "run.log"

    @property
    def metrics_path(self) -> Path:
        """All figures as JSON."""
        return self.folder / "metrics.json"

    @property
    def metrics_csv_path(self) -> Path:
        """All figures as one long table."""
        return self.folder / "metrics.csv"

    def model_path(self, model: str) -> Path:
        """Return where an approach's trained model lies."""
        return self.folder / "models" / f"{model}.keras"

    def reference_path(self, model: str) -> Path:
        """Return where it is kept what training images look like to a model."""
        return self.folder / "models" / f"{model}.reference.json"

    def checkpoint_path(self, model: str) -> Path:
        """Return where an unfinished training keeps its state."""
        return self.folder / "checkpoints" / f"{model}.npz"

    def table_path(self, model: str, name: str) -> Path:
        """Return where a table lies.

        Parameters
        ----------
        model : {"cnn", "tl", "ft", "best"}
            The approach.
        name : str
            ``accuracy_per_epoch``, ``loss_per_epoch``, ``validation_yscores``, ``test_yscores``, ``validation_roc`` or
            ``test_roc``.

        Returns
        -------
        Path
        """
        return self.folder / "tables" / f"{model}_{name}.csv"

    def figure_path(self, name: str) -> Path:
        """Return where a figure lies, by its name without ``.png``."""
        return self.folder / "figures" / f"{name}.png"

    @property
    def gallery_path(self) -> Path:
        """What the gallery shows; its pictures lie beside it."""
        return self.folder / "gallery" / "gallery.json"

    @property
    def card_path(self) -> Path:
        """The model card."""
        return self.folder / "model_card.md"

    @property
    def report_path(self) -> Path:
        """The report, one HTML file."""
        return self.folder / "report.html"

    def read_spec(self) -> Spec:
        """Return the Spec it was made with.

        Returns
        -------
        Spec

        Raises
        ------
        SpecError
            Where the file is missing or damaged.
        """
        return Spec.from_toml(self.spec_path)

    def read_manifest(self) -> dict[str, Any]:
        """Return the manifest; empty where there is none yet."""
        return _files.read_json(self.manifest_path) if self.manifest_path.exists() else {}

    def update_manifest(self, **changes: Any) -> None:
        """Write the manifest with some keys changed."""
        _files.write_json(self.manifest_path, _without_version(self.read_manifest()) | changes)

    def read_stages(self) -> dict[str, dict[str, Any]]:
        """Return the records of all stages that have one, by name, in alphabetical order.

        Returns
        -------
        dict of str to dict
            As `update_stage` wrote them.

        Raises
        ------
        StoreError
            Where a record is damaged.
        """
        paths = sorted(self.stage_path("any").parent.glob("*.json"))
        return {path.stem: _without_version(_files.read_json(path)) for path in paths}

    def read_stage(self, name: str) -> dict[str, Any]:
        """Return one stage's record; empty where there is none yet.

        Parameters
        ----------
        name : str
            Of the stage.

        Raises
        ------
        StoreError
            Where the record is damaged.
        """
        path = self.stage_path(name)
        return _without_version(_files.read_json(path)) if path.exists() else {}

    def update_stage(self, name: str, **changes: Any) -> None:
        """Write a stage's record with some keys changed.

        Parameters
        ----------
        name : str
            Of the stage, fit for a file's name.
        **changes
            Plain values; numbers that are none, and infinite ones, become ``None``.

        Raises
        ------
        StoreError
            Where the record is damaged.
        PneumoscopeError
            Where it cannot be written; the old one stays whole.
        """
        _files.write_json(self.stage_path(name), self.read_stage(name) | changes)

    def lock(self, name: str = "run") -> AbstractContextManager[_locks.Lease]:
        """Keep other processes from the same work, on this machine and on others, for as long as a block lasts.

        Different names do not hinder each other. A killed process holds nothing; only where it was on another machine
        does the next one wait half a minute to see that.

        Parameters
        ----------
        name : str
            ``run`` or a stage, fit for a file's name.

        Returns
        -------
        context manager of Lease
            Its ``lost`` tells that another process has taken over, after this one was suspended.

        Raises
        ------
        RunError
            On entering, where another process holds it or the folder cannot be written.
        """
        what = f"The run in {self.folder}" if name == "run" else f"The stage {name} of the run in {self.folder}"
        return _locks.hold(self.folder / "locks", name, what=what)

    @property
    def status(self) -> str:
        """``running``, ``stopped``, ``failed`` or ``finished``; ``new`` where nothing was written."""
        return str(self.read_manifest().get("status", "new"))

    def trained(self) -> list[str]:
        """Return the approaches whose models are here, in the Spec's order."""
        return [model for model in self.read_spec().models if self.model_path(model).exists()]

    def discard_checkpoints(self) -> None:
        """Remove the states of trainings that have ended."""
        folder = self.folder / "checkpoints"
        if folder.exists():
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


def _without_version(content: dict[str, Any]) -> dict[str, Any]:
    """Leave out the version, which writing puts first."""
    return {key: value for key, value in content.items() if key != "schema_version"}
