"""The page, in a real Chromium against a real server: what a person sees is what the server says."""

from __future__ import annotations

import asyncio
import base64
import csv
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import onnx
import pytest
import uvicorn
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from pneumoscope import phantom, serving
from pneumoscope.bundle import Bundle
from pneumoscope.evidence import Grid
from pneumoscope.predictor import Curve, Description
from pneumoscope.specs import RESEARCH_USE

pytest_plugins = "browser"
pytestmark = pytest.mark.slow

SIZE_PX = 32
NOTE = "Trained on synthetic images."
POINTS = {"youden": 0.5, "sensitivity-0.95": 0.25}
TESTED = {
    "youden": {"threshold": 0.5, "sensitivity": 0.8, "specificity": 0.7},
    "sensitivity-0.95": {"threshold": 0.2, "sensitivity": 0.9, "specificity": 0.1},  # before the point was chosen anew
}
CURVE = Curve(
    split="validation",
    n_positive=40,
    n_negative=20,
    thresholds=np.array([1.0, 0.75, 0.5, 0.25, 0.0]),
    sensitivity=np.array([0.0, 0.6, 0.85, 0.95, 1.0]),
    specificity=np.array([1.0, 0.95, 0.9, 0.65, 0.0]),
)


def network() -> bytes:
    """A network whose evidence is how bright each quarter is, in 2 x 2 cells: bright is PNEUMONIA."""
    half = SIZE_PX // 2
    nodes = [
        helper.make_node("Cast", ["image"], ["grey"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["grey", "one"], ["channel"]),
        helper.make_node("AveragePool", ["channel"], ["pool"], kernel_shape=[half, half], strides=[half, half]),
        helper.make_node("Squeeze", ["pool", "one"], ["cells"]),
        helper.make_node("Sub", ["cells", "middle"], ["centred"]),
        helper.make_node("Div", ["centred", "spread"], ["evidence"]),
        helper.make_node("Flatten", ["evidence"], ["features"]),
        helper.make_node("ReduceSum", ["features", "one"], ["logit"], keepdims=0),
        helper.make_node("Sigmoid", ["logit"], ["score"]),
        helper.make_node("Sub", ["logit", "logit"], ["bias"]),
    ]
    constants = {"one": np.array([1]), "middle": np.float32(128), "spread": np.float32(80)}
    shapes: dict[str, list[str | int]] = {
        "score": ["n"], "logit": ["n"], "bias": ["n"], "evidence": ["n", 2, 2], "features": ["n", 4]
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", SIZE_PX, SIZE_PX])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


@dataclass
class Server:
    """A server under way, what it was asked, and what it is told to refuse."""

    url: str = ""
    files_per_request: list[int] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    key: str = ""
    largest_bytes: int = 2**30
    other_model: bool = False

    def wrap(self, app: Any) -> Any:
        """Stand before the application: count, and refuse as told."""

        async def outer(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http" or scope["path"] == "/" or scope["path"].startswith("/page/"):
                await app(scope, receive, send)
                return
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            if self.key and headers.get("x-api-key") != self.key:
                await refuse(send, 401, {})
            elif scope["path"] == "/predict":
                await self._predict(app, scope, receive, send)
            elif scope["path"] == "/evidence" and self.other_model:
                await app(scope, receive, of_another_model(send))
            else:
                await app(scope, receive, send)

        return outer

    async def _predict(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if self.refusals:
            await refuse(send, *self.refusals.pop(0))
            return
        if len(body) > self.largest_bytes:
            await refuse(send, 413, {})
            return
        self.bodies.append(body)
        self.files_per_request.append(body.count(b'name="files"'))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return messages.pop() if messages else await receive()

        async def renamed(message: Any) -> None:
            if b"sha256" in message.get("body", b""):
                found = json.loads(message["body"])
                found["model"]["sha256"] = found["model"]["sha256"][::-1]  # as long, as the header says
                message = message | {"body": json.dumps(found, separators=(",", ":")).encode()}
            await send(message)

        try:
            await asyncio.sleep(0.05)  # long enough for a third request, if there were one, to meet the others
            await app(scope, replay, renamed if self.other_model else send)
        finally:
            self.at_once -= 1


def of_another_model(send: Any) -> Any:
    """Turn the hash around that says which model made a picture."""

    async def renamed(message: Any) -> None:
        headers = message.get("headers", [])
        listed = [(name, value[::-1] if name == b"x-model" else value) for name, value in headers]
        await send(message | {"headers": listed} if headers else message)

    return renamed


async def refuse(send: Any, status: int, headers: dict[str, str]) -> None:
    listed = [(b"content-type", b"application/json"), *((n.encode(), v.encode()) for n, v in headers.items())]
    await send({"type": "http.response.start", "status": status, "headers": listed})
    await send({"type": "http.response.body", "body": json.dumps({"detail": f"Refused with {status}."}).encode()})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    description = Description(
        model="cnn",
        title="A tiny network",
        size_px=SIZE_PX,
        grid=Grid(7.5, 16.0),
        evidence_scale=1.25,
        points=POINTS,
        chosen_on="validation",
        curve=CURVE,
        temperature=1.5,
        familiarity=None,
        unfamiliar="Nothing is known of its training images.",
        note=NOTE,
        metrics={"test": {"n": 30, "operating_points": TESTED}},
    )
    bundle = Bundle.write(tmp_path / "bundle", network=network(), description=description)
    told = Server()
    config = uvicorn.Config(
        told.wrap(serving.build(bundle, threads=1)), host="127.0.0.1", port=0, log_level="error", ws="none"
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        told.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/"
        yield told
    finally:
        running.should_exit = True
        thread.join()


@dataclass(frozen=True)
class Page:
    """The page, as a hand and an eye have it."""

    driver: Chrome
    server: Server

    def open(self) -> Page:
        self.driver.get(self.server.url)
        if not self.server.key:
            self.until(lambda: "tiny" in self["model"].text)
        return self

    def __getitem__(self, id: str) -> WebElement:
        return self.driver.find_element(By.ID, id)

    def until(self, test: Callable[[], Any]) -> None:
        WebDriverWait(self.driver, 20, poll_frequency=0.05).until(lambda _: test())

    def choose(self, *files: Path, wait: bool = True) -> None:
        self["files"].send_keys("\n".join(map(str, files)))
        if wait:
            self.until(lambda: len(self.rows()) >= len(files) and self["export"].is_enabled())

    def rows(self) -> list[dict[str, str]]:
        """The worklist from top to bottom."""
        script = """
            const text = (row, name) => row.querySelector(name)?.textContent ?? "";
            const score = (row) => row.querySelector("data")?.value ?? "";
            return [...document.querySelectorAll("#rows .row")].map((row) => ({
              name: text(row, ".name b"), reason: text(row, ".name small"), score: score(row), shown: text(row, "data"),
              call: text(row, ".call"), assessable: text(row, ".assessable"), chosen: row.getAttribute("aria-selected"),
            }));"""
        rows: list[dict[str, str]] = self.driver.execute_script(script)
        return rows

    def chosen(self) -> list[str]:
        return [row["name"] for row in self.rows() if row["chosen"] == "true"]

    def calls(self) -> list[str]:
        return [row["call"] for row in self.rows()]

    def pixels(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """What the canvas shows once it has come to rest, shape (H, W, 4)."""
        script = """
            const [done] = arguments;
            const look = () => done(document.getElementById("canvas").toDataURL("image/png"));
            requestAnimationFrame(() => requestAnimationFrame(look));"""
        png: str = self.driver.execute_async_script(script)
        with Image.open(io.BytesIO(base64.b64decode(png.partition(",")[2]))) as image:
            return np.asarray(image.convert("RGBA"))

    def shows_picture(self) -> None:
        self.until(lambda: self["stage-text"].text == "" and self["viewer-foot"].text != "")

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def assert_quiet(self) -> None:
        """Nothing went wrong, and nothing was asked of any other host."""
        log: Callable[[str], list[dict[str, Any]]] = self.driver.get_log
        assert [entry for entry in log("browser") if entry["level"] != "INFO"] == []
        events = [json.loads(entry["message"])["message"] for entry in log("performance")]
        asked = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
        home = urlsplit(self.server.url).netloc
        inside = ("blob", "data", "chrome")  # the last: the browser's own first tab
        away = [url for url in asked if urlsplit(url).scheme not in inside and urlsplit(url).netloc != home]
        assert self.server.url in asked
        assert away == []


@pytest.fixture
def page(browser: Chrome, server: Server) -> Page:
    browser.set_window_size(1400, 1000)
    return Page(browser, server)


def drawn(path: Path, label: int, *, seed: int = 0, lighter: int = 0) -> Path:
    pixels = phantom.draw(label, seed=seed, width_px=160, height_px=120)
    grey = np.clip(pixels.astype(np.int64) + lighter, 0, 255).astype(np.uint8)
    Image.fromarray(grey).save(path, "JPEG")
    return path


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """A dark image and a light one."""
    return [drawn(tmp_path / "dark.jpeg", 0, lighter=-40), drawn(tmp_path / "light.jpeg", 1, lighter=60)]


def predicted(server: Server, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        answer = httpx.post(f"{server.url}predict", files={"files": (path.name, file)}, trust_env=False).json()
    result: dict[str, Any] = answer["results"][0]
    return result


# --- The worklist -----------------------------------------------------------------------------------------------------


def test_the_worklist_shows_what_predict_answers_highest_score_first(page: Page, two: list[Path]) -> None:
    page.open().choose(*two)
    expected = sorted((predicted(page.server, path) for path in two), key=lambda each: -each["score"])
    rows = page.rows()
    assert [row["name"] for row in rows] == ["light.jpeg", "dark.jpeg"]
    assert [float(row["score"]) for row in rows] == [each["score"] for each in expected]
    assert [row["shown"] for row in rows] == [f"{each['score']:.3f}" for each in expected]
    assert [row["call"] for row in rows] == [each["call"] for each in expected] == ["PNEUMONIA", "NORMAL"]
    assert [row["assessable"] for row in rows] == ["not known", "not known"]
    assert rows[0]["reason"] == "Nothing is known of its training images."
    assert "2 images: 1 PNEUMONIA, 1 NORMAL" in page["status"].text
    page.assert_quiet()


def test_what_cannot_be_read_says_why_below_the_others(page: Page, two: list[Path], tmp_path: Path) -> None:
    broken, small = tmp_path / "broken.jpeg", tmp_path / "small.png"
    broken.write_bytes(two[0].read_bytes()[:700])
    Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20)).save(small)
    page.open().choose(broken, *two, small)
    rows = {row["name"]: row for row in page.rows()}
    assert list(rows)[-1] == "broken.jpeg"
    assert "Not readable: " in rows["broken.jpeg"]["reason"]
    assert (rows["broken.jpeg"]["score"], rows["broken.jpeg"]["assessable"]) == ("", "no")
    assert rows["small.png"]["assessable"] == "no"
    assert "only 20 x 20 pixels" in rows["small.png"]["reason"]
    assert "1 not assessable, 1 not readable" in page["status"].text


def test_a_request_with_nothing_readable_is_answered_too(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "letter.jpeg"
    path.write_bytes(b"%PDF-1.4")
    page.open().choose(path)
    assert "PDF" in page.rows()[0]["reason"]


def test_many_files_go_in_small_requests_two_at_a_time_and_nameless(page: Page, tmp_path: Path) -> None:
    files = [drawn(tmp_path / f"MUELLER-{number:02}.jpeg", number % 2, seed=number) for number in range(20)]
    page.open().choose(*files)
    assert sorted(page.server.files_per_request) == [4, 8, 8]
    assert page.server.most_at_once == 2
    assert not any(b"MUELLER" in body for body in page.server.bodies)
    scores = [float(row["score"]) for row in page.rows()]
    assert len(scores) == 20
    assert scores == sorted(scores, reverse=True)


def test_a_busy_server_is_asked_again(page: Page, two: list[Path]) -> None:
    page.server.refusals = [(503, {"retry-after": "0"}), (429, {"retry-after": "0"}), (503, {})]
    page.open().choose(*two)
    assert page.calls() == ["PNEUMONIA", "NORMAL"]
    assert page.server.refusals == []


def test_files_that_are_too_much_together_go_one_by_one(page: Page, two: list[Path]) -> None:
    sizes = [path.stat().st_size for path in two]
    page.server.largest_bytes = max(sizes) + 1000
    assert sum(sizes) > page.server.largest_bytes
    page.open().choose(*two)
    assert page.calls() == ["PNEUMONIA", "NORMAL"]
    assert page.server.files_per_request == [1, 1]


def test_what_was_refused_says_so_and_can_be_tried_again(page: Page, two: list[Path]) -> None:
    page.server.refusals = [(500, {})]
    page.open().choose(*two)
    assert [row["reason"] for row in page.rows()] == ["Refused with 500."] * 2
    page["retry"].click()
    page.until(lambda: page.calls() == ["PNEUMONIA", "NORMAL"])
    assert not page["retry"].is_displayed()


def test_the_same_file_twice_is_one_line(page: Page, two: list[Path]) -> None:
    page.open().choose(*two)
    page.choose(two[0], wait=False)
    page.until(lambda: "1 file was in the list already" in page["status"].text)
    assert len(page.rows()) == 2


def test_clear_forgets_everything(page: Page, two: list[Path]) -> None:
    page.open().choose(*two)
    page["clear"].click()
    page.until(lambda: page.rows() == [])
    assert page["viewer-name"].text == "No image chosen"
    assert page["status"].text == "No images yet."
    page.choose(*two)
    assert len(page.rows()) == 2


def test_a_dropped_folder_is_walked(page: Page, two: list[Path]) -> None:
    """A drop is made of events here, because WebDriver has no hand for files from outside."""
    page.open()
    page.driver.execute_script(
        """
        const file = (name) => ({ isFile: true, name, file: (done) => done(new File(["x"], name)) });
        let left = [file("a.jpeg"), file(".hidden")];
        const reader = { readEntries: (done) => { done(left); left = []; } };
        const folder = { isDirectory: true, name: "ward", createReader: () => reader };
        const event = new Event("drop", { bubbles: true, cancelable: true });
        const items = [{ webkitGetAsEntry: () => folder }];
        Object.defineProperty(event, "dataTransfer", { value: { files: [], items } });
        document.body.dispatchEvent(event);"""
    )
    page.until(lambda: [row["name"] for row in page.rows()] == ["ward/a.jpeg"])


# --- The operating point ----------------------------------------------------------------------------------------------


def test_a_moved_threshold_changes_calls_and_the_rates_it_had(page: Page, two: list[Path]) -> None:
    page.open().choose(*two)

    def rates() -> tuple[str, str]:
        return page["sensitivity"].text, page["specificity"].text

    assert rates() == ("85.0 %", "90.0 %")
    assert "validation split (40 PNEUMONIA, 20 NORMAL)" in page["rates-source"].text
    assert page["rates-test"].text == "On 30 test images: 80.0 % and 70.0 %."
    assert Select(page["point"]).first_selected_option.text == "youden (0.5), the default"
    assert not page["moved"].is_displayed()

    page["threshold-slider"].send_keys(Keys.HOME)
    page.until(lambda: page.calls() == ["PNEUMONIA", "PNEUMONIA"])
    assert rates() == ("100.0 %", "0.0 %")
    assert page["rates-test"].text == ""
    assert "youden, 0.5" in page["moved"].text

    page["threshold-slider"].send_keys(Keys.END)
    page.until(lambda: page.calls() == ["NORMAL", "NORMAL"])
    assert rates() == ("0.0 %", "100.0 %")

    Select(page["point"]).select_by_value("sensitivity-0.95")
    assert rates() == ("95.0 %", "65.0 %")
    assert page["rates-test"].text == ""
    assert page["threshold"].get_attribute("value") == "0.25"

    page["point-reset"].click()
    page.until(lambda: page.calls() == ["PNEUMONIA", "NORMAL"])
    assert rates() == ("85.0 %", "90.0 %")


def test_a_typed_threshold_at_a_score_calls_it_normal(page: Page, two: list[Path]) -> None:
    page.open().choose(*two)
    score = page.rows()[0]["score"]
    anew = Keys.CONTROL + "a" + Keys.NULL
    page["threshold"].send_keys(anew, score)
    page.until(lambda: page.calls() == ["NORMAL", "NORMAL"])  # score > threshold, and not above it
    page["threshold"].send_keys(anew, "7")
    assert page["threshold"].get_attribute("aria-invalid") == "true"
    page["threshold"].send_keys(Keys.TAB)
    assert page["threshold"].get_attribute("value") == score


# --- The viewer -------------------------------------------------------------------------------------------------------


def test_evidence_colours_the_picture_as_much_as_its_slider_says(page: Page, two: list[Path]) -> None:
    page.open().choose(*two)
    page.shows_picture()
    plain = page.pixels().astype(int)
    assert plain.std() > 5
    assert (plain[..., 0] == plain[..., 2]).all()
    assert not page["legend"].is_displayed()

    page["evidence"].click()
    page.until(lambda: (page.pixels()[..., 0] != page.pixels()[..., 2]).any())
    assert "what the model used, not where disease is" in page["legend"].text
    assert "1.3 and beyond" in page["legend"].text  # the scale, 1.25, to two digits
    page["opacity"].send_keys(Keys.END)
    strong = page.pixels().astype(int)
    page["opacity"].send_keys(*[Keys.ARROW_LEFT] * 60)
    weak = page.pixels().astype(int)
    assert 0 < np.abs(weak - plain).sum() < np.abs(strong - plain).sum()
    page["opacity"].send_keys(Keys.HOME)
    assert (page.pixels() == plain).all()


def test_red_is_for_pneumonia_and_blue_for_normal_where_the_map_says(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "halves.png"
    Image.fromarray(np.repeat([20, 235], 50).astype(np.uint8)[None].repeat(100, axis=0)).save(path)
    page.open().choose(path)
    page.shows_picture()
    page["evidence"].click()
    page.until(lambda: (page.pixels()[..., 0] != page.pixels()[..., 2]).any())
    pixels = page.pixels().astype(int)
    warm = (pixels[..., 0] - pixels[..., 2])[:, np.flatnonzero(pixels[..., 3].any(axis=0))]
    side = warm.shape[1]
    assert warm[:, : side // 4].mean() < -20
    assert warm[:, -side // 4 :].mean() > 20


def test_window_level_invert_zoom_and_reset_change_the_picture_and_back(page: Page, two: list[Path]) -> None:
    page.open().choose(*two)
    page.shows_picture()
    plain = page.pixels()
    inside = plain[..., 3] == 255
    page["invert"].click()
    assert (page.pixels()[inside][:, 0].astype(int) + plain[inside][:, 0] == 255).mean() > 0.99
    page["invert"].click()
    page["level"].send_keys(Keys.HOME)
    assert page.pixels()[inside][:, 0].mean() > plain[inside][:, 0].mean() + 20
    page["zoom-in"].click()
    assert page["zoom"].text == "125 %"
    page["reset"].click()
    assert (page.pixels() == plain).all()

    canvas = page["canvas"]
    ActionChains(page.driver).click_and_hold(canvas).move_by_offset(-150, 60).release().perform()
    assert int(page["window-value"].text) < 255
    assert int(page["level-value"].text) > 128
    page["reset"].click()
    ActionChains(page.driver).key_down(Keys.SHIFT).click_and_hold(canvas).move_by_offset(80, 0).release().key_up(
        Keys.SHIFT
    ).perform()
    moved = page.pixels()
    assert page["window-value"].text == "255"
    assert (np.roll(plain, 80, axis=1)[:, 200:-200] == moved[:, 200:-200]).mean() > 0.9


def test_a_dicom_file_is_listed_and_shown_by_the_servers_decoder(page: Page) -> None:
    spec = find_spec("data_store")  # of pydicom-data
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "data" / "RG1_UNCR.dcm"
    page.open().choose(path)
    page.shows_picture()
    assert float(page.rows()[0]["score"]) == predicted(page.server, path)["score"]
    assert "Decoded by the server" in page["viewer-foot"].text
    assert page.pixels()[..., 0].std() > 20
    script = "const c = document.querySelector('.thumb'); return c.getContext('2d').getImageData(50, 50, 1, 1).data[3]"
    page.until(lambda: page.driver.execute_script(script) == 255)
    page.assert_quiet()


# --- What comes from outside ------------------------------------------------------------------------------------------


def test_a_hostile_file_name_is_text_and_runs_nothing(page: Page, two: list[Path], tmp_path: Path) -> None:
    name = "<img src=x onerror=document.title='run'>.jpeg"
    turned = "a\u202egepj.exe.jpeg"  # would show as aexe.jpeg read backwards
    for each in (name, turned):
        (tmp_path / each).write_bytes(two[1 if each == name else 0].read_bytes())
    page.open().choose(tmp_path / name, tmp_path / turned)
    page.shows_picture()
    assert [row["name"] for row in page.rows()] == [name, "a\ufffdgepj.exe.jpeg"]
    assert page["viewer-name"].text == name
    assert "run" not in page.driver.title
    assert page.driver.find_elements(By.CSS_SELECTOR, "main img") == []
    page.assert_quiet()


def test_a_key_is_asked_for_once_and_kept_nowhere(page: Page, two: list[Path]) -> None:
    page.server.key = "let me in"
    page.open()
    page.until(lambda: page["key"].is_displayed())
    page["key-value"].send_keys("wrong", Keys.ENTER)
    page.until(lambda: "does not take that key" in page["key-text"].text)
    page["key-value"].send_keys("let me in", Keys.ENTER)
    page.until(lambda: "tiny" in page["model"].text)
    page.choose(*two)
    assert page.calls() == ["PNEUMONIA", "NORMAL"]
    assert page.driver.execute_script("return localStorage.length + sessionStorage.length") == 0
    assert page.driver.get_cookies() == []


def test_no_image_is_called_before_the_model_is_known(page: Page, two: list[Path]) -> None:
    page.server.key = "let-me-in"
    page.open()
    page.until(lambda: page["key"].is_displayed())
    page.press(Keys.ESCAPE)
    page.until(lambda: "asks for an API key" in page["model"].text)
    page.choose(*two, wait=False)
    page.until(lambda: page["key"].is_displayed())
    page.press(Keys.ESCAPE)
    page.until(lambda: [row["reason"] for row in page.rows()] == ["The server asks for an API key."] * 2)
    page["retry"].click()
    page.until(lambda: page["key"].is_displayed())
    page["key-value"].send_keys("let-me-in", Keys.ENTER)
    page.until(lambda: page.calls() == ["PNEUMONIA", "NORMAL"])
    assert "tiny" in page["model"].text


def test_scores_of_another_model_get_no_call(page: Page, two: list[Path]) -> None:
    page.open()
    page.server.other_model = True
    page.choose(*two)
    assert [row["reason"] for row in page.rows()] == ["The server has another model now; load the page again."] * 2
    assert [row["score"] for row in page.rows()] == ["", ""]


def test_evidence_of_another_model_is_not_drawn_beside_the_scores_of_the_first(page: Page, two: list[Path]) -> None:
    page.open().choose(*two)
    page.shows_picture()
    page.server.other_model = True
    page["evidence"].click()
    page.until(lambda: "another model now; load the page again" in page["status"].text)
    pixels = page.pixels()
    assert (pixels[..., 0] == pixels[..., 2]).all()


# --- CSV --------------------------------------------------------------------------------------------------------------


def test_the_csv_holds_the_worklist_and_no_formula(
    page: Page, two: list[Path], tmp_path: Path, downloads: Path
) -> None:
    names = ['=1+1,"x".jpeg', "@light.jpeg", "-broken.jpeg"]
    contents = [two[0].read_bytes(), two[1].read_bytes(), two[0].read_bytes()[:700]]
    for name, content in zip(names, contents, strict=True):
        (tmp_path / name).write_bytes(content)
    page.open().choose(*(tmp_path / name for name in names))
    Select(page["point"]).select_by_value("sensitivity-0.95")
    expected = {name: predicted(page.server, tmp_path / name) for name in names}
    page["export"].click()
    target = downloads / "pneumoscope-worklist.csv"
    page.until(target.exists)
    text = target.read_text(encoding="utf-8")
    assert '"\'=1+1,""x"".jpeg"' in text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["file", "score", "call", "assessable", "reason", "threshold"]
    assert [row["file"] for row in rows] == ["'@light.jpeg", '\'=1+1,"x".jpeg', "'-broken.jpeg"]
    assert [float(row["score"]) for row in rows[:2]] == [expected[names[1]]["score"], expected[names[0]]["score"]]
    for row in rows[:2]:
        assert row["call"] == ("PNEUMONIA" if float(row["score"]) > 0.25 else "NORMAL")
        assert row["assessable"] == "unknown"
    assert (rows[2]["score"], rows[2]["call"], rows[2]["assessable"]) == ("", "", "no")
    assert rows[2]["reason"] == expected[names[2]]["reason"]
    assert {row["threshold"] for row in rows} == {"0.25"}


# --- Keys, colours, widths --------------------------------------------------------------------------------------------


def test_the_worklist_and_the_viewer_work_by_keyboard_alone(page: Page, two: list[Path], tmp_path: Path) -> None:
    middle = drawn(tmp_path / "middle.jpeg", 1)
    page.open().choose(*two, middle)
    page.shows_picture()
    assert page.chosen() == ["light.jpeg"]
    for key, name in (
        (Keys.ARROW_DOWN, "middle.jpeg"),
        (Keys.ARROW_DOWN, "dark.jpeg"),
        (Keys.ARROW_DOWN, "dark.jpeg"),
        (Keys.ARROW_UP, "middle.jpeg"),
        (Keys.HOME, "light.jpeg"),
        (Keys.END, "dark.jpeg"),
    ):
        page.press(key)
        assert page.chosen() == [name]
        assert page["viewer-name"].text == name
    assert page.driver.switch_to.active_element.get_attribute("aria-selected") == "true"
    page.shows_picture()

    page.press("i")
    page.until(lambda: page["invert"].get_attribute("aria-pressed") == "true")
    page.press("e")
    page.until(lambda: page["legend"].is_displayed())
    page.press("+", "+", "-")
    page.until(lambda: page["zoom"].text == "125 %")
    page.press("0")
    page.until(lambda: page["zoom"].text == "100 %" and page["invert"].get_attribute("aria-pressed") == "false")
    page.press("?")
    page.until(lambda: page["help"].is_displayed())
    page.press("i")
    assert page["invert"].get_attribute("aria-pressed") == "false"  # keys are the dialog's while it is open
    page.press(Keys.ESCAPE)
    page.until(lambda: not page["help"].is_displayed())


def test_every_control_has_a_name_and_can_be_reached_with_tab(page: Page, two: list[Path]) -> None:
    page.open().choose(*two)
    page["evidence"].click()
    reached = set()
    page.driver.execute_script("document.activeElement.blur()")
    for _ in range(40):
        page.press(Keys.TAB)
        element = page.driver.switch_to.active_element
        assert element.accessible_name or element.tag_name == "body"
        reached.add(element.get_attribute("id") or element.get_attribute("role"))
    assert {
        "files", "point", "threshold", "threshold-slider", "row", "export", "clear", "canvas", "invert", "evidence",
        "zoom-in", "zoom-out", "reset", "window", "level", "opacity", "theme", "help-open", "about-open",
    } <= reached  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [400, 1400])
def test_the_warning_and_the_note_are_in_sight_at_every_width_and_colour(
    page: Page, two: list[Path], width_px: int, scheme: str
) -> None:
    shape = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    page.open().choose(*two)
    page.driver.execute_script("scrollTo(0, 99999)")
    assert RESEARCH_USE in page["warning"].text
    assert NOTE in page["warning"].text
    top = page.driver.execute_script("return document.getElementById('warning').getBoundingClientRect().top")
    assert top == 0
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width_px
    page.driver.execute_script("scrollTo(0, 0)")

    def brightness() -> int:
        colour: str = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    assert (brightness() > 384) == (scheme == "light")
    page["theme"].click()
    assert (brightness() > 384) == (scheme == "dark")
    page.assert_quiet()


def test_about_the_model_says_what_it_is_for_and_how_it_was_measured(page: Page) -> None:
    page.open()["about-open"].click()
    assert "must not be used to diagnose" in page["about"].text
    assert NOTE in page["about"].text
