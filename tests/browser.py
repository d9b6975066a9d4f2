"""A real headless Chromium for tests of the page.

A test module that needs it says ``pytest_plugins = "browser"`` and takes the fixture ``browser``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

PROGRAMS = ("chromium", "chromedriver")
PACKAGES = ("chromium", "chromium-driver")


def _found() -> list[str]:
    paths = (shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/bin") for name in PROGRAMS)
    return [path for path in paths if path is not None]


def _as_root() -> list[str] | None:
    """What to put before a command that needs root; None where there is no root to be had, or no apt-get."""
    if shutil.which("apt-get") is None:
        return None
    if os.geteuid() == 0:
        return []
    sudo = ["sudo", "-n"]
    can = shutil.which("sudo") is not None and subprocess.run([*sudo, "true"], check=False).returncode == 0
    return sudo if can else None


def _install() -> None:
    as_root = _as_root()
    if as_root is None:
        pytest.skip("there is no Chromium, and no apt-get with root to install chromium and chromium-driver")
    install = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "install", "-y", "--no-install-recommends"]
    for command in (["apt-get", "-qq", "update"], [*install, *PACKAGES]):
        done = subprocess.run([*as_root, *command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"there is no Chromium, and {command[-1]} could not be installed: {done.stderr[-300:]}")


@pytest.fixture(scope="session")
def chromium() -> tuple[str, str]:
    """Paths of the browser and of its driver, installed where they are not."""
    if len(_found()) != len(PROGRAMS):
        _install()
    browser, driver = _found()
    return browser, driver


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    """Where the browser puts what is saved."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    return folder


@pytest.fixture
def browser(chromium: tuple[str, str], tmp_path: Path, downloads: Path) -> Iterator[webdriver.Chrome]:
    """A browser of its own for the test, 1400 x 1000, that logs its console and every request."""
    options = webdriver.ChromeOptions()
    options.binary_location = chromium[0]
    arguments = [
        "--headless=new", "--window-size=1400,1000", f"--user-data-dir={tmp_path / 'profile'}", "--no-first-run",
        "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-gpu",
    ]  # fmt: skip
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium's sandbox refuses to run as root
    for argument in arguments:
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=chromium[1]))
    try:
        yield driver
    finally:
        driver.quit()
