"""The parts of a Spec that no figure depends on: what batch jobs ask for, and where a run is mirrored.

Owns those keys, their meaning, their defaults and their limits. Everything that a figure can depend on is in `specs`.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Part(BaseModel):
    """A table of a Spec: frozen, and no key but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ClusterSpec(Part):
    """What batch jobs ask Slurm for; no figure depends on it, so a run may go on with other values.

    Attributes
    ----------
    partition, account : str
        As ``sbatch`` takes them; empty for the cluster's own choice.
    time_min : int
        Limit of each job, minutes.
    cpus : int
        Cores of each job.
    mem_gb : float
        Memory of each job, GB; 0 for the cluster's own choice.
    gpus : int
        GPUs of each job that runs a network.
    nodes : int
        Nodes that one model trains on, data-parallel; 1 unless ``train.devices`` reaches over more.
    shards : int
        Jobs that share the frozen layers' pass, each on a part of the images.
    signal : str
        Sent before the time limit and at preemption, without ``SIG``; a job keeps its state then. Some communication
        libraries use USR1 themselves.
    signal_delay_s : int
        How long before the limit, seconds.
    requeue : bool
        Whether a job that was warned goes back into the queue by itself; else it ends with status 75.
    requeues : int
        How often a job may run into its time limit before it is given up.
    setup : tuple of str
        Lines of shell before the job's command, such as ``module load`` or ``source .venv/bin/activate``.
    extra : dict of str to str, int or bool
        Further ``sbatch`` parameters, without the dashes, such as ``qos``; true for one that has no value.
    """

    partition: str = ""
    account: str = ""
    time_min: int = Field(default=240, ge=1)
    cpus: int = Field(default=2, ge=1)
    mem_gb: float = Field(default=8.0, ge=0)
    gpus: int = Field(default=0, ge=0)
    nodes: int = Field(default=1, ge=1)
    shards: int = Field(default=1, ge=1, le=1000)
    signal: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9+]*$")] = "USR2"
    signal_delay_s: int = Field(default=90, ge=1)
    requeue: bool = True
    requeues: int = Field(default=20, ge=0)
    setup: tuple[str, ...] = ()
    extra: dict[str, str | int | bool] = Field(default_factory=dict)


class TrackingSpec(Part):
    """Mirrors of a run's plain files; no figure depends on them, so a run may go on with other values.

    Attributes
    ----------
    tensorboard : bool
        Whether to write event files for TensorBoard under ``tensorboard`` in the run directory.
    mlflow : str
        Where MLflow keeps its runs, such as ``sqlite:///mlruns.db`` or ``https://host:5000``; empty for nowhere.
    mlflow_experiment : str
        The MLflow experiment that the runs belong to.
    """

    tensorboard: bool = False
    mlflow: str = ""
    mlflow_experiment: str = Field(default="pneumoscope", min_length=1, max_length=200)

    @field_validator("mlflow")
    @classmethod
    def _reachable(cls, uri: str) -> str:
        if uri and not re.match(r"(sqlite(?=:///)|postgresql|mysql|mssql|https?)(\+\w+)?://[^/@]*(/.|$)", uri):
            raise ValueError(
                "write a local store as sqlite:///mlruns.db (MLflow has given up stores of plain files), a server as "
                "https://host:5000; user and password would stand in spec.toml: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD instead"
            )
        return uri
