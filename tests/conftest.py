"""Shared fixtures: where real images are, and a cache that no test shares with the user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


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
