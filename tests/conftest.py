"""Shared fixtures: where real images are, and a cache that no test shares with the user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pneumoscope import phantom
from pneumoscope.catalog import Catalog
from pneumoscope.specs import SplitSpec
from pneumoscope.store import ImageStore

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Give each parallel worker one core of its own: backends that share cores wait for one another far longer."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real X-rays; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("PNEUMOSCOPE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "chest_xray").is_dir():
        pytest.skip(f"no real X-rays in {folder}; set PNEUMOSCOPE_TEST_DATA to the folder that holds chest_xray/")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test its own empty cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("PNEUMOSCOPE_CACHE", str(cache))
    return cache


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 64 synthetic images of about 64 px in the Kaggle layout: 48 train, 16 test; never write into it."""
    return phantom.write_dataset(tmp_path_factory.mktemp("data") / "tiny", n_train=48, n_test=16, seed=1, size_px=64)


@pytest.fixture(scope="session")
def packed(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Catalog, ImageStore]:
    """`tiny_set` divided by group (38 train, 10 validation, 16 test) and packed at 32 x 32; never write into it."""
    catalog = Catalog.scan(tiny_set).split(SplitSpec(), seed=42)
    return catalog, ImageStore.pack(catalog, size_px=32, cache=tmp_path_factory.mktemp("packed"))
