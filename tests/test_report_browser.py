"""The report in a real Chromium: it fits the screen, its slider counts as the run did, nothing in it runs or leaves."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

import reported
from pneumoscope._report_blocks import share
from pneumoscope.report import write_comparison, write_report
from pneumoscope.runs import Run
from test_report import HOSTILE, poison

pytest_plugins = "browser"
pytestmark = pytest.mark.slow

WIDE, NARROW = (1400, 900), (400, 800)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A measured run; never write into it."""
    return reported.make(tmp_path_factory.mktemp("made") / "first")


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A copy of it to change, in a folder with a hostile name."""
    folder = tmp_path / '<script>alert("run")&'
    return Run(Path(shutil.copytree(made.folder, folder)))


@pytest.fixture
def page(browser: Chrome) -> Iterator[Chrome]:
    """The browser, which must have logged no error and asked for nothing at the end."""
    browser.get("about:blank")
    asked(browser)  # what the browser itself asked for when it began
    yield browser
    log: Callable[[str], list[dict[str, Any]]] = browser.get_log
    assert [entry for entry in log("browser") if entry["level"] == "SEVERE"] == []
    assert asked(browser) == []


def asked(browser: Chrome) -> list[str]:
    """Every address that was asked for, but for the file itself and pictures inside it."""
    log: Callable[[str], list[dict[str, Any]]] = browser.get_log
    messages = [json.loads(entry["message"])["message"] for entry in log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not re.match(r"file:///.*\.html$|data:image/(jpeg|png);base64,", url)]


def show(page: Chrome, path: Path, size: tuple[int, int] = WIDE, *, dark: bool = False) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    page.get(path.resolve().as_uri())


def find(page: Chrome | WebElement, css: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, css)


def overflows(page: Chrome) -> bool:
    return bool(page.execute_script("const r = document.documentElement; return r.scrollWidth > r.clientWidth"))


# --- what is seen ----------------------------------------------------------------------------------------------------


def test_the_first_screen_answers_without_scrolling_and_no_width_overflows(page: Chrome, made: Run) -> None:
    path = write_report(made)
    show(page, path)
    bottom = page.execute_script("return document.querySelector('#summary').getBoundingClientRect().bottom")
    assert bottom <= WIDE[1]
    assert not overflows(page)
    for size in ((1200, 900), (1151, 900), NARROW):  # the first table is not to scroll anywhere: no key would move it
        show(page, path, size)
        assert not overflows(page)
        table = find(page, ".trained .scroll")
        assert page.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", table), size
    charts = page.find_elements(By.CSS_SELECTOR, "svg.chart")
    assert len(charts) > 20
    assert all(0 < chart.size["width"] <= NARROW[0] and chart.size["height"] > 0 for chart in charts)


def test_dark_is_dark_where_the_system_asks_for_it(page: Chrome, made: Run) -> None:
    path = write_report(made)
    grounds = []
    for dark in (False, True):
        show(page, path, dark=dark)
        ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        grounds.append(sum(map(int, re.findall(r"\d+", ground)[:3])))
    assert grounds[0] > 600
    assert grounds[1] < 150


def test_it_prints_on_a4_with_the_spec_unfolded_and_no_chart_cut(page: Chrome, made: Run) -> None:
    show(page, write_report(made))
    options = {"preferCSSPageSize": True, "printBackground": True}
    pdf = base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", options)["data"])
    boxes = {tuple(map(round, map(float, box.split()))) for box in re.findall(rb"/MediaBox\s*\[([^\]]+)\]", pdf)}
    assert boxes == {(0, 0, 595, 842)} or boxes == {(0, 0, 596, 842)}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    broken = "return [...document.querySelectorAll('.charts figure')].map(e => getComputedStyle(e).breakInside)"
    assert set(page.execute_script(broken)) == {"avoid"}
    hidden = "return getComputedStyle(document.querySelector('#thresholds')).display"
    assert page.execute_script(hidden) == "none"
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_it_is_complete_without_scripts(page: Chrome, made: Run) -> None:
    path = write_report(made)
    show(page, path)
    with_scripts = page.find_elements(By.CSS_SELECTOR, "section h2, article.case, svg, table")
    counted = len(with_scripts) - len(page.find_elements(By.CSS_SELECTOR, "#thresholds table"))
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    show(page, path)
    shown = page.find_elements(By.CSS_SELECTOR, "section h2, article.case, svg, table")
    assert len(shown) == counted
    assert all(one.is_displayed() for one in page.find_elements(By.CSS_SELECTOR, "article.case"))
    assert not find(page, "#thresholds").is_displayed()
    assert not find(page, "#gallery-tools").is_displayed()
    assert "With scripts on, a slider here tries other thresholds." in find(page, "#points").text


# --- what scripts add ------------------------------------------------------------------------------------------------


def row_of(page: Chrome, model: str) -> WebElement:
    return find(page, f'#thresholds tr[data-model="{model}"]')


def figures_of(row: WebElement) -> list[str]:
    return [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "td")[2:]]


def expected(point: dict[str, Any]) -> list[str]:
    shares = ("sensitivity", "specificity", "positive_predictive_value", "negative_predictive_value")
    counts = ("true_negatives", "false_positives", "false_negatives", "true_positives")
    return [
        *(str(point[key]) for key in counts),
        *("–" if point[key] is None else share(point[key]).replace("\u00a0", " ") for key in shares),
    ]


def enter(row: WebElement, value: object) -> None:
    field = find(row, "input[type=number]")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(str(value))


def test_the_slider_counts_what_the_run_measured_at_every_operating_point(page: Chrome, made: Run) -> None:
    metrics = json.loads(made.metrics_path.read_text())["models"]
    show(page, write_report(made))
    split = Select(find(page, "#thresholds select"))
    assert [option.get_attribute("value") for option in split.options] == ["validation", "test"]
    for name in ("validation", "test"):
        split.select_by_value(name)
        for model, parts in metrics.items():
            row, found = row_of(page, model), parts[name]
            for point in (*found["operating_points"].values(), found):  # the whole split's figures are those at 0.5
                enter(row, point["threshold"])
                assert figures_of(row) == expected(point)
            find(row, "button").click()
            assert figures_of(row)[0] == str(found["operating_point"]["true_negatives"])


def test_the_slider_moves_the_number_and_a_number_that_is_none_has_no_figures(page: Chrome, made: Run) -> None:
    show(page, write_report(made))
    row = row_of(page, "tl")
    slider = find(row, "input[type=range]")
    slider.send_keys(Keys.END)
    assert find(row, "input[type=number]").get_property("value") == "1"
    assert figures_of(row)[3] == "0"  # nothing is above 1
    assert figures_of(row)[6] == "–"  # so that the share of right calls is undefined
    find(row, "input[type=number]").send_keys(Keys.CONTROL, "a", Keys.BACKSPACE)
    assert figures_of(row) == ["–"] * 8


def test_the_gallery_is_filtered_and_sorted(page: Chrome, made: Run) -> None:
    show(page, write_report(made))

    def shown() -> list[WebElement]:
        return [one for one in page.find_elements(By.CSS_SELECTOR, "article.case") if one.is_displayed()]

    assert len(shown()) == 15
    model, kind, _, order = (Select(one) for one in page.find_elements(By.CSS_SELECTOR, "#gallery-tools select"))
    model.select_by_value("ft")
    kind.select_by_value("false_positive")
    assert len(shown()) == 2
    assert {one.get_attribute("data-model") for one in shown()} == {"ft"}
    assert find(page, "#gallery-shown").text == "2 of 15 shown"
    model.select_by_value("")
    kind.select_by_value("")
    order.select_by_value("low")
    scores = [float(one.get_attribute("data-score") or "nan") for one in shown()]
    assert scores == sorted(scores)
    find(page, "#gallery-tools input").send_keys("no such file")
    assert shown() == []


# --- hostile names ---------------------------------------------------------------------------------------------------


def test_hostile_names_run_nothing_and_the_layout_holds(page: Chrome, run: Run) -> None:
    poison(run)
    path = write_report(run)
    for size in (WIDE, NARROW):
        show(page, path, size)
        assert page.title.endswith("pneumoscope report")
        assert "owned" not in page.title
        assert not overflows(page)
        assert page.find_elements(By.CSS_SELECTOR, "img:not([src^='data:image/'])") == []
    assert len(page.find_elements(By.TAG_NAME, "script")) <= 2


def test_hostile_model_names_reach_the_slider_and_the_gallery_as_text(page: Chrome, run: Run) -> None:
    hostile = "<img src=x onerror=alert(1)>\"'"
    content = json.loads(run.metrics_path.read_text())
    content["models"][hostile] = content["models"].pop("tl")
    run.metrics_path.write_text(json.dumps(content))
    gallery = json.loads(run.gallery_path.read_text())
    gallery["models"][HOSTILE] = gallery["models"].pop("tl")
    run.gallery_path.write_text(json.dumps(gallery))
    show(page, write_report(run))
    options = [option.text for option in Select(find(page, "#gallery-tools select")).options]
    assert any("onerror" in option for option in options)
    assert page.find_elements(By.CSS_SELECTOR, "#gallery-tools img, #thresholds img") == []


def test_a_comparison_opens_without_a_script_and_fits(page: Chrome, made: Run, run: Run, tmp_path: Path) -> None:
    path = write_comparison([made, run], tmp_path / "both.html")
    for size in (WIDE, NARROW):
        show(page, path, size)
        assert not overflows(page)
    assert "cannot be told apart" in find(page, "#verdict").text
