"""A real Slurm for the session's tests: two nodes of four cores, all of them this machine (scripts/slurm-local).

A test module that needs it says ``pytest_plugins = "slurm_local"`` and takes the fixture ``slurm``, or ``own_slurm``.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "slurm-local"
NODES = 2


@dataclass(frozen=True)
class LocalSlurm:
    """One Slurm, its folder and its ports."""

    folder: Path
    port: int

    @property
    def stand_in(self) -> Path:
        """Where the `sacct` is that works without an accounting database."""
        return self.folder / "bin"

    def call(self, verb: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "SLURM_LOCAL_DIR": str(self.folder),
            "SLURM_LOCAL_PORT": str(self.port),
            "SLURM_LOCAL_NODES": str(NODES),
        }
        return subprocess.run([SCRIPT, verb], env=environment, capture_output=True, text=True, check=False)

    def start(self) -> None:
        done = self.call("start")
        assert done.returncode == 0, done.stderr

    def stop(self) -> None:
        done = self.call("stop")
        assert done.returncode == 0, done.stderr

    def forget(self) -> None:
        """Have the controller know nothing of earlier jobs, as any one does some minutes after they ended."""
        self.stop()
        shutil.rmtree(self.folder / "state")
        self.start()

    def show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have Slurm's programs, called by this process, talk to this one."""
        monkeypatch.setenv("SLURM_CONF", str(self.folder / "slurm.conf"))
        monkeypatch.setenv("PATH", f"{self.stand_in}{os.pathsep}{os.environ['PATH']}")


def _can_be_installed() -> bool:
    if shutil.which("apt-get") is None:
        return False
    return os.geteuid() == 0 or (
        shutil.which("sudo") is not None and subprocess.run(["sudo", "-n", "true"], check=False).returncode == 0
    )


def _free_port() -> int:
    """The first of as many free ports as one Slurm takes."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        try:
            for number in range(port, port + 1 + NODES):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port


def _running_slurm() -> Iterator[LocalSlurm]:
    """Install Slurm where it is not, run one, and stop it."""
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None and not _can_be_installed():
        pytest.skip("there is no Slurm, and no apt-get with root to install it: scripts/slurm-local install")
    # in /tmp itself: munged wants every folder above its socket open to all, and a socket's path is short
    slurm = LocalSlurm(Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")), _free_port())
    try:
        installed = slurm.call("install")
        assert installed.returncode == 0, installed.stderr
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(slurm.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm_of_the_session() -> Iterator[LocalSlurm]:
    yield from _running_slurm()


@pytest.fixture
def slurm(slurm_of_the_session: LocalSlurm, monkeypatch: pytest.MonkeyPatch) -> LocalSlurm:
    """The session's Slurm, shown to this test."""
    slurm_of_the_session.show(monkeypatch)
    return slurm_of_the_session


@pytest.fixture
def own_slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalSlurm]:
    """A Slurm for one test alone, which may do to it what it likes."""
    for slurm in _running_slurm():
        slurm.show(monkeypatch)
        yield slurm
