"""The server's answers: what each address gives, what is refused and how, and that scores do not depend on the way."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

import served
from pneumoscope import _uploads, _wire, serving
from pneumoscope.bundle import Bundle
from pneumoscope.errors import UsageError
from pneumoscope.predictor import Predictor
from pneumoscope.serving import Limits
from pneumoscope.specs import RESEARCH_USE

GOOD = served.png(1)
KEY = "a long random key"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return served.write_bundle(tmp_path_factory.mktemp("served") / "bundle")


@pytest.fixture(scope="module")
def app(bundle: Bundle) -> FastAPI:
    return serving.build(bundle, threads=1)


def detail(answer: httpx.Response, status: int) -> str:
    """The one sentence of a refusal."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["detail"]
    return str(answer.json()["detail"])


# --- Scores -----------------------------------------------------------------------------------------------------------


def test_one_image_gets_the_score_that_the_predictor_gives(app: FastAPI, bundle: Bundle) -> None:
    answer = served.post(app, "/predict", [("chest.png", GOOD)])
    predictor = bundle.predictor(threads=1)
    expected = predictor.answer([predictor.read(GOOD)])[0]
    assert answer.status_code == 200
    content = answer.json()
    _wire.Prediction.model_validate_json(answer.content)
    assert content["model"] == {
        "name": "tl",
        "title": "Transfer learning",
        "sha256": bundle.content["sha256"],
        "size_px": 64,
        "note": "The images were synthetic.",
    }
    assert content["results"] == [
        {
            "file": "chest.png",
            "score": expected.score,
            "probability": expected.probability,
            "call": expected.call,
            "operating_point": "youden",
            "threshold": 0.5,
            "assessable": expected.assessable,
            "reason": expected.reason,
        }
    ]
    assert content["notice"] == RESEARCH_USE
    assert all(value >= 0 for value in content["timing_ms"].values())


@pytest.mark.parametrize("small_bytes", [0, 10**6], ids=["decoded before", "decoded in the batch"])
def test_images_of_concurrent_requests_are_batched_and_score_as_alone(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, small_bytes: int
) -> None:
    monkeypatch.setattr(serving, "_SMALL_BYTES", small_bytes)
    files = [(f"{seed}.png", served.png(seed)) for seed in range(24)]
    predictor = bundle.predictor(threads=1)
    alone = [predictor.answer([predictor.read(data)])[0].score for _, data in files]
    lengths: list[int] = []

    def counted(self: Predictor, pictures: Any) -> Any:
        lengths.append(len(pictures))
        return answer(self, pictures)

    answer = Predictor.answer
    monkeypatch.setattr(Predictor, "answer", counted)
    app = serving.build(bundle, threads=1, limits=Limits(delay_ms=60_000, batch_images=8))

    async def scene() -> list[float]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            answers = await asyncio.gather(
                *(client.post("/predict", content=served.form([file]), headers=served.KIND) for file in files)
            )
        return [answer.json()["results"][0]["score"] for answer in answers]

    together = asyncio.run(scene())
    assert np.allclose(together, alone, atol=1e-6)
    assert len(set(alone)) > 20
    assert sum(lengths) == 24
    assert 1 < max(lengths) <= 8


def test_many_images_are_answered_in_their_order_and_a_bad_one_keeps_none_from_its_answer(app: FastAPI) -> None:
    files = [(f"{seed}.png", served.png(seed)) for seed in range(20)]
    files[7] = ("7.png", b"<html>hello</html>")
    files[9] = ("9.png", b"")
    answer = served.post(app, "/predict", files)
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [result["file"] for result in results] == [name for name, _ in files]
    assert [at for at, result in enumerate(results) if result["score"] is None] == [7, 9]
    assert results[7] == {
        "file": "7.png",
        "score": None,
        "probability": None,
        "call": None,
        "operating_point": "youden",
        "threshold": 0.5,
        "assessable": False,
        "reason": "The file's content is not an image; JPEG, PNG and DICOM are read.",
    }
    assert results[9]["reason"] == "The file holds 0 bytes."
    one = served.post(app, "/predict", [files[3]]).json()["results"][0]
    assert results[3]["score"] == pytest.approx(one["score"], abs=1e-6)


def test_a_picture_without_content_has_a_score_and_is_not_assessable(app: FastAPI) -> None:
    answer = served.post(app, "/predict", [("flat.png", served.encoded(np.full((80, 80), 9)))])
    result = answer.json()["results"][0]
    assert result["assessable"] is False
    assert result["reason"] == "The picture is one grey all over."
    assert result["call"] == "NORMAL"


def test_where_no_file_can_be_read_the_status_says_so_and_the_results_why(app: FastAPI) -> None:
    answer = served.post(app, "/predict", [("a", b"%PDF-1.7"), ("b", b"GIF89a")])
    assert answer.status_code == 422
    _wire.Unread.model_validate_json(answer.content)
    assert answer.json()["detail"] == "No file could be read; each result says why."
    assert [result["reason"] for result in answer.json()["results"]] == [
        "The file is PDF; JPEG, PNG and DICOM are read.",
        "The file is GIF; JPEG, PNG and DICOM are read.",
    ]


def test_an_unforeseen_error_of_a_decoder_is_that_files_own_and_quotes_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Predictor, data: bytes, **_: Any) -> Any:
        if len(data) == len(GOOD):
            return read(self, data)
        raise (MemoryError if len(data) > len(GOOD) else KeyError)("Doe^Jane")

    read = Predictor.read
    monkeypatch.setattr(Predictor, "read", broken)
    others = [served.png(seed) for seed in range(2, 12)]
    shorter = next(data for data in others if len(data) < len(GOOD))
    longer = next(data for data in others if len(data) > len(GOOD))
    answer = served.post(serving.build(bundle, threads=1), "/predict", [("a", shorter), ("b", GOOD), ("c", longer)])
    reasons = [result["reason"] for result in answer.json()["results"]]
    assert answer.status_code == 200
    assert reasons[0] == "The file could not be decoded."
    assert answer.json()["results"][1]["score"] is not None
    assert reasons[2] == "The picture needs more memory than the server has."
    assert caplog.messages == ["A decoder failed with KeyError"]


def test_an_unforeseen_error_elsewhere_is_a_neutral_500(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Predictor, pictures: Any) -> Any:
        raise ValueError("Doe^Jane")

    monkeypatch.setattr(Predictor, "answer", broken)
    answer = served.post(serving.build(bundle, threads=1), "/predict", [("a", GOOD)])
    assert detail(answer, 500) == "The server failed at this request; its log says where."
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "An unforeseen ValueError at broken:" in caplog.text
    assert "Doe" not in caplog.text


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\films\\a.dcm", "a.dcm"),
        ("<img src=x onerror=alert(1)>.png", "<img src=x onerror=alert(1)>.png"),
        ("a\x00b\x1b[31mc\u202egnp.exe", "ab[31mcgnp.exe"),
        ("", "unnamed"),
        ("..", ".."),
        ("/", "unnamed"),
        ("ü" * 300, "ü" * 255),
    ],
)
def test_a_name_is_made_harmless_as_text(given: str, shown: str) -> None:
    assert _uploads.clean_name(given) == shown


def test_a_name_is_shown_and_never_a_path(app: FastAPI) -> None:
    answer = served.post(app, "/predict", [("../../x<b>.png", GOOD)])
    assert answer.json()["results"][0]["file"] == "x<b>.png"
    assert answer.headers["content-type"] == "application/json"


# --- Evidence ---------------------------------------------------------------------------------------------------------


def picture_of(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    return Image.open(io.BytesIO(answer.content))


def half_bright() -> bytes:
    """Left black, right white: evidence for NORMAL there and for PNEUMONIA here."""
    pixels = np.zeros((2000, 1500), dtype=np.uint8)
    pixels[:, 750:] = 255
    return served.encoded(pixels)


def test_the_overlay_is_blue_where_evidence_speaks_for_normal_and_red_where_for_pneumonia(app: FastAPI) -> None:
    answer = served.post(app, "/evidence", [("a", half_bright())])
    picture = picture_of(answer)
    assert (picture.mode, picture.size) == ("RGB", (448, 448))
    values = np.asarray(picture).astype(int)
    assert values[:, 20, 2].min() > values[:, 20, 0].max()
    assert values[:, -20, 0].min() > values[:, -20, 2].max()
    scored = served.post(app, "/predict", [("a", half_bright())]).json()["results"][0]
    assert float(answer.headers["x-score"]) == pytest.approx(scored["score"], abs=1e-6)
    assert answer.headers["x-call"] == scored["call"]


@pytest.mark.parametrize("layer", ["overlay", "evidence", "image"])
def test_a_picture_says_which_model_answered(app: FastAPI, layer: str) -> None:
    answer = served.post(app, f"/evidence?layer={layer}", [("a", GOOD)])
    model = served.post(app, "/predict", [("a", GOOD)]).json()["model"]
    assert answer.headers["x-model"] == model["sha256"] != ""


def test_evidence_alone_is_clear_where_there_is_none(app: FastAPI) -> None:
    pixels = np.full((64, 64), 127, dtype=np.uint8)
    pixels[:16, :16], pixels[-16:, -16:] = 255, 0
    picture = picture_of(served.post(app, "/evidence?layer=evidence", [("a", served.encoded(pixels))]))
    assert (picture.mode, picture.size) == ("RGBA", (448, 448))
    values = np.asarray(picture)
    assert tuple(values[5, 5]) == (178, 24, 43, 255)
    assert tuple(values[-5, -5]) == (33, 102, 172, 255)
    assert values[5, -5, 3] <= 2


def test_the_image_alone_is_grey_and_not_too_large(app: FastAPI) -> None:
    picture = picture_of(served.post(app, "/evidence?layer=image", [("a", half_bright())]))
    assert (picture.mode, picture.size) == ("L", (768, 1024))
    assert np.asarray(picture)[500, 5] == 0
    assert np.asarray(picture)[500, -5] == 255
    small = picture_of(served.post(app, "/evidence?layer=image", [("a", GOOD)]))
    assert small.size == (96, 96)


def test_evidence_takes_one_file_that_can_be_read_and_a_known_layer(app: FastAPI) -> None:
    two = served.post(app, "/evidence", [("a", GOOD), ("b", GOOD)])
    assert detail(two, 422) == "The form holds 2 files in the field files; send one."
    bad = served.post(app, "/evidence", [("a", b"MZ")])
    assert detail(bad, 422) == "The file is Windows program; JPEG, PNG and DICOM are read."
    layer = served.post(app, "/evidence?layer=heat", [("a", GOOD)])
    assert detail(layer, 422).startswith("The parameter layer does not fit: Input should be 'overlay'")


# --- Limits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(bundle: Bundle) -> FastAPI:
    limits = Limits(max_file_bytes=50_000, max_request_bytes=80_000, max_files=3, max_held_bytes=100_000)
    return serving.build(bundle, threads=1, limits=limits)


HOW = "Send images (JPEG, PNG or DICOM) as multipart/form-data, each in the field files."


def test_too_much_is_refused_with_413(small: FastAPI) -> None:
    def refused(files: served.Files) -> str:
        return detail(served.post(small, "/predict", files), 413)

    assert refused([("a", GOOD), ("b", b"x" * 50_001)]) == "A file is over 50.0 kB; at most that is read of each."
    assert refused([("a", b"x" * 40_000)] * 2 + [("b", GOOD)]) == (
        "The request is over 80.0 kB; send fewer files at a time."
    )
    assert refused([("a", b"x")] * 4) == "The form holds over 3 files; send them in several requests."
    body = served.form([("a", b"x")] * 30, field="other")
    answer = served.ask(small, "POST", "/predict", content=body, headers=served.KIND)
    assert detail(answer, 413) == "The form holds over 3 files; send them in several requests."
    assert served.post(small, "/predict", [("a", GOOD)]).status_code == 200


def test_the_limit_holds_while_a_body_comes_whatever_its_length_is_said_to_be(small: FastAPI) -> None:
    given = 0

    async def endless() -> Any:
        nonlocal given
        yield served.form([("a", b"")]).rpartition(b"\r\n--")[0]
        while given < 10**9:
            given += 1000
            yield b"x" * 1000

    answer = served.ask(small, "POST", "/predict", content=endless(), headers=served.KIND)
    assert answer.status_code == 413
    assert given < 200_000


def test_what_is_no_form_is_refused(small: FastAPI) -> None:
    def refused(status: int, content: bytes, kind: str | None) -> str:
        headers = {} if kind is None else {"Content-Type": kind}
        return detail(served.ask(small, "POST", "/predict", content=content, headers=headers), status)

    assert refused(415, b"{}", "application/json") == f"The request is no form with files. {HOW}"
    assert refused(415, GOOD, None) == f"The request is no form with files. {HOW}"
    assert refused(400, b"", "multipart/form-data") == f"The request's Content-Type names no usable boundary. {HOW}"
    assert refused(400, b"hello", served.KIND["Content-Type"]) == f"The form is damaged. {HOW}"
    cut = served.form([("a", GOOD)])[:-40]
    assert refused(400, cut, served.KIND["Content-Type"]) == f"The form ends before its last part does. {HOW}"
    other = served.form([("a", GOOD)], field="file")
    assert refused(422, other, served.KIND["Content-Type"]) == f"The form has no field files. {HOW}"


def test_a_full_server_says_when_to_ask_again_and_its_health_is_answered(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = serving.build(bundle, threads=1, limits=Limits(max_waiting=2))
    decoding, go_on = asyncio.Event(), asyncio.Event()
    reading = serving._Service.decoded

    async def slow(self: Any, decode: Callable[..., Any], data: bytes) -> Any:
        decoding.set()
        await go_on.wait()
        return await reading(self, decode, data)

    monkeypatch.setattr(serving._Service, "decoded", slow)
    monkeypatch.setattr(serving, "_SMALL_BYTES", 0)

    async def scene() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:

            def upload() -> Awaitable[httpx.Response]:
                body = served.form([("a", GOOD), ("b", GOOD)])
                return client.post("/predict", content=body, headers=served.KIND)

            first = asyncio.ensure_future(upload())
            await decoding.wait()
            refused, health, ready = await upload(), await client.get("/health"), await client.get("/ready")
            sentence = "As many images wait as the server takes; send it again later."
            assert detail(refused, 503) == sentence
            assert refused.headers["retry-after"] == "1"
            assert health.json() == {"status": "ok"}
            assert (ready.status_code, ready.json()) == (503, {"ready": False, "waiting": 2})
            go_on.set()
            assert (await first).status_code == 200
            assert (await client.get("/ready")).json() == {"ready": True, "waiting": 0}
            assert (await upload()).status_code == 200

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_bytes_held_by_all_requests_together_are_limited_and_given_back(small: FastAPI) -> None:
    async def scene() -> None:
        stopped = asyncio.Event()
        body = served.form([("a", b"x" * 49_000)])

        async def slow() -> Any:
            yield body[:-10]
            await stopped.wait()
            yield body[-10:]

        async with httpx.AsyncClient(transport=httpx.ASGITransport(small), base_url="http://t") as client:
            given = [
                asyncio.ensure_future(client.post("/predict", content=slow(), headers=served.KIND)) for _ in range(2)
            ]
            for _ in range(10):
                await asyncio.sleep(0)
            refused = await client.post("/predict", content=body, headers=served.KIND)
            assert detail(refused, 503) == "The server holds as many uploads as it can; send it again later."
            stopped.set()
            assert [answer.status_code for answer in await asyncio.gather(*given)] == [422, 422]
            assert (await client.post("/predict", content=body, headers=served.KIND)).status_code == 422

    asyncio.run(scene())


def test_a_body_that_does_not_come_is_answered_with_408(bundle: Bundle) -> None:
    app = serving.build(bundle, threads=1, limits=Limits(timeout_s=0.05))

    async def never() -> Any:
        yield served.form([("a", GOOD)])[:100]
        await asyncio.sleep(3600)

    answer = served.ask(app, "POST", "/predict", content=never(), headers=served.KIND)
    sentence = "The upload was not complete after 0.05 s; send fewer or smaller files at a time."
    assert detail(answer, 408) == sentence


def test_large_pictures_are_decoded_one_at_a_time(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    app = serving.build(bundle, threads=1, limits=Limits(large_pixels=100))
    at_once: list[int] = []
    running = 0

    def read(self: Predictor, data: bytes, **given: Any) -> Any:
        nonlocal running
        running += 1
        at_once.append(running)
        try:
            return original(self, data, **given)
        finally:
            running -= 1

    original = Predictor.read
    monkeypatch.setattr(Predictor, "read", read)
    answer = served.post(app, "/predict", [(str(seed), served.png(seed, size_px=400)) for seed in range(8)])
    assert answer.status_code == 200
    assert at_once == [1] * 8


def test_limits_that_let_nothing_through_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^The limit max_files is 0; give a number above 0\.$"):
        Limits(max_files=0)
    assert Limits(delay_ms=0).delay_ms == 0


# --- Who may ask ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(bundle: Bundle) -> FastAPI:
    return serving.build(bundle, threads=1, api_key=KEY)


@pytest.mark.parametrize("path", ["/model", "/metrics", "/ready", "/no/such"])
def test_what_asks_needs_the_key(locked: FastAPI, path: str) -> None:
    for headers in ({}, {"X-API-Key": "wrong"}, {"Authorization": f"Basic {KEY}"}):
        answer = served.ask(locked, "GET", path, headers=headers)
        assert detail(answer, 401) == "The API key is missing or wrong; send it in the header X-API-Key."
    for headers in ({"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}):
        assert served.ask(locked, "GET", path, headers=headers).status_code in (200, 404)


def test_images_need_the_key_and_the_page_and_health_do_not(locked: FastAPI) -> None:
    assert served.post(locked, "/predict", [("a", GOOD)]).status_code == 401
    assert served.post(locked, "/evidence", [("a", GOOD)]).status_code == 401
    assert served.post(locked, "/predict", [("a", GOOD)], headers={"X-API-Key": KEY}).status_code == 200
    for path in ("/health", "/", "/docs", "/openapi.json"):
        assert served.ask(locked, "GET", path).status_code == 200


def test_an_empty_key_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"^The API key is empty and would let nobody in; give a long random one\.$"):
        serving.build(bundle, api_key=" ")
    for key in ("two\tcolumns", "schlüssel"):
        with pytest.raises(UsageError, match=r"^The API key holds a character that is no visible ASCII, "):
            serving.build(bundle, api_key=key)


def test_white_space_around_a_key_is_no_part_of_it(bundle: Bundle) -> None:
    app = serving.build(bundle, threads=1, api_key=f" {KEY}\r\n")  # as a file written on Windows has it
    assert served.ask(app, "GET", "/model", headers={"X-API-Key": KEY}).status_code == 200


def test_a_page_of_another_site_may_not_send(app: FastAPI) -> None:
    for origin in ("http://evil.example", "null", "http://testserver:81", "http://[bad"):
        answer = served.post(app, "/predict", [("a", GOOD)], headers={"Origin": origin})
        assert detail(answer, 403) == "The request comes from a page of another site; open this server's own page."
    own = served.post(app, "/predict", [("a", GOOD)], headers={"Origin": "http://testserver"})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000"])
def test_a_server_for_this_machine_answers_to_its_names(bundle: Bundle, host: str) -> None:
    app = serving.build(bundle, threads=1, hosts=("localhost", "127.0.0.1", "[::1]"))
    assert served.ask(app, "GET", "/model", headers={"Host": host}).status_code == 200
    answer = served.ask(app, "GET", "/health", headers={"Host": f"evil.example:{8000}"})
    sentence = "This server answers to 127.0.0.1, [::1], localhost only; use one of them in the address."
    assert detail(answer, 403) == sentence


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_listening_for_others_needs_a_key_or_the_word_for_it(bundle: Bundle, host: str) -> None:
    with pytest.raises(UsageError) as caught:
        serving.serve(bundle, host=host)
    assert str(caught.value) == (
        f"Listening on {host} lets everyone who can reach this machine send images and read answers; set an API key, "
        "or pass --insecure if that is what you want, or listen on 127.0.0.1."
    )


def test_a_port_that_is_taken_is_said(bundle: Bundle) -> None:
    with serving._listening("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError) as caught:
            serving.serve(bundle, port=port, threads=1)
    assert str(caught.value) == (
        f"The server cannot listen on 127.0.0.1, port {port} (Address already in use); choose another with --port, 0 "
        "takes a free one."
    )


# --- The rest ---------------------------------------------------------------------------------------------------------


def test_every_answer_has_the_headers_that_keep_a_browser_safe(app: FastAPI, locked: FastAPI) -> None:
    answers = [
        served.ask(app, "GET", "/"),
        served.ask(app, "GET", "/health"),
        served.ask(app, "GET", "/none"),
        served.ask(app, "PUT", "/predict"),
        served.ask(locked, "GET", "/model"),
        served.post(app, "/predict", [("a", GOOD)]),
    ]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        for part in ("default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"):
            assert part in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


def test_an_address_or_a_method_that_is_not_there_is_said(app: FastAPI) -> None:
    nothing = "There is nothing at this address; /docs lists what there is."
    assert detail(served.ask(app, "GET", "/none"), 404) == nothing
    assert detail(served.ask(app, "GET", "/page/serving.py"), 404) == nothing
    assert detail(served.ask(app, "GET", "/page/%2e%2e%2fserving.py"), 404) == nothing
    answer = served.ask(app, "GET", "/predict")
    assert detail(answer, 405) == "Use another method."
    assert answer.headers["allow"] == "POST"


def test_the_page_is_served_as_it_lies_in_its_folder(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "PAGE", tmp_path / "none")
    plain = served.ask(serving.build(bundle, threads=1), "GET", "/").text
    assert plain == "Research use only, not a medical device. This server has no page; /docs says how programs ask it."
    for name in ("index.html", "page.js", "notes.txt"):
        (tmp_path / name).write_text(f"this is {name}")
    monkeypatch.setattr(serving, "PAGE", tmp_path)
    app = serving.build(bundle, threads=1)
    index, script = served.ask(app, "GET", "/"), served.ask(app, "GET", "/page/page.js")
    assert (index.text, index.headers["content-type"]) == ("this is index.html", "text/html; charset=utf-8")
    assert (script.text, script.headers["content-type"]) == ("this is page.js", "text/javascript; charset=utf-8")
    assert served.ask(app, "GET", "/page/notes.txt").status_code == 404


def test_the_model_is_described_without_its_large_arrays(app: FastAPI, bundle: Bundle) -> None:
    content = served.ask(app, "GET", "/model").json()
    assert content["name"] == "tl"
    assert content["sha256"] == bundle.content["sha256"]
    assert content["labels"] == ["NORMAL", "PNEUMONIA"]
    assert content["operating_points"] == {"youden": 0.5, "sensitivity-0.95": 0.25}
    assert content["operating_point"] == {"name": "youden", "threshold": 0.5}
    assert content["curve"]["sensitivity"] == [0.0, 0.8, 1.0]
    assert content["curve"]["split"] == "validation"
    assert content["evidence"]["scale"] == 0.5
    assert content["temperature"] == 2.0
    assert content["intended_use"].startswith(RESEARCH_USE)
    assert content["note"] == "The images were synthetic."
    assert content["assessed"] is True
    assert "assessability" not in content


def test_what_was_done_is_counted_by_few_names(bundle: Bundle) -> None:
    app = serving.build(bundle, threads=1)
    served.post(app, "/predict", [("a", GOOD), ("b", b"")])
    for path in ("/none/1", "/none/2", "/page/x"):
        served.ask(app, "GET", path)
    answer = served.ask(app, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    assert 'pneumoscope_requests_total{path="/predict",status="200"} 1.0' in lines
    assert 'pneumoscope_images_total{call="unreadable"} 1.0' in lines
    assert "pneumoscope_batch_images_sum 2.0" in lines
    assert "pneumoscope_waiting_images 0.0" in lines
    assert "pneumoscope_held_bytes 0.0" in lines
    assert 'pneumoscope_requests_total{path="other",status="404"} 2.0' in lines
    assert "/none" not in answer.text


def test_the_documentation_needs_no_other_site(app: FastAPI) -> None:
    page = served.ask(app, "GET", "/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "POST /predict" in page.text
    assert RESEARCH_USE in page.text
    assert "http" not in page.text.lower()
    assert "<script" not in page.text
    description = served.ask(app, "GET", "/openapi.json").json()
    assert set(description["paths"]) == {"/predict", "/evidence", "/health", "/ready", "/model", "/metrics"}
    assert "422" in description["paths"]["/predict"]["post"]["responses"]
    assert "ValidationError" not in json.dumps(description)


def test_serving_loads_no_keras(bundle: Bundle) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(served.__file__).parent)!r})
from pathlib import Path
from pneumoscope import serving
from pneumoscope.bundle import Bundle
app = serving.build(Bundle.open(Path({str(bundle.folder)!r})), threads=1)
import served
answer = served.post(app, "/predict", [("a", served.png(1))])
assert served.post(app, "/evidence", [("a", served.png(1))]).status_code == 200
print(answer.status_code, [name for name in ("keras", "tensorflow", "jax", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("200 []\n", "")


def test_the_process_ends_when_it_is_asked_to(bundle: Bundle) -> None:
    with served.serving_process(bundle.folder) as server:
        assert server.get("/health") == (200, b'{"status":"ok"}')
        server.process.terminate()
        assert server.process.wait(30) in (0, -15)
