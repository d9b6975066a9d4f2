"""Hostile clients and files against a real server process: each gets its answer, memory stays bounded, and the next
good request is served; and requests made up from the OpenAPI description find no 500."""

from __future__ import annotations

import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import served
from pneumoscope import serving
from pneumoscope.bundle import Bundle
from pneumoscope.serving import Limits
from served import Served

GOOD = served.png(1)
MIB = 2**20
LARGEST_GROWTH_KB = 400 * 1024
IMPLICIT_CR = b"1.2.840.10008.5.1.4.1.1.1\x00"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return served.write_bundle(tmp_path_factory.mktemp("hostile") / "bundle")


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[Served]:
    """A server that holds 64 MB of uploads, of at most 8 MB each, and waits 3 s for one."""
    limits = f"Limits(max_file_bytes={8 * MIB}, max_request_bytes={16 * MIB}, max_held_bytes={64 * MIB}, timeout_s=3)"
    with served.serving_process(bundle.folder, limits, "threads=1,") as running:
        assert running.upload([("warm", GOOD)])[0] == 200
        yield running


@pytest.fixture(autouse=True)
def still_well(server: Served) -> Iterator[None]:
    """After every attack the server has not grown much, and gives a good request its score."""
    before = server.anonymous_kb()
    expected = server.upload([("good", GOOD)])[1]["results"][0]
    yield
    assert server.get("/health")[0] == 200
    status, content = server.upload([("good", GOOD)])
    assert (status, content["results"][0]) == (200, expected)
    assert server.anonymous_kb() - before < LARGEST_GROWTH_KB
    assert server.process.poll() is None


# --- Files ------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 black pixels, one bit each, packed twice as tightly as a file of that kind can be."""
    side = 30_000
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def element(group: int, number: int, kind: bytes, value: bytes, *, length: int | None = None) -> bytes:
    """An element in explicit little endian."""
    length = len(value) if length is None else length
    head = struct.pack("<HH", group, number) + kind
    long = kind in (b"OB", b"OW", b"SQ", b"UN")
    return head + (struct.pack("<HI", 0, length) if long else struct.pack("<H", length)) + value


def dicom(rows: int = 64, columns: int = 64, pixels: bytes | None = None, *, length: int | None = None) -> bytes:
    """A computed radiograph of 8 bits, whose pixels may be fewer than it says."""
    pixels = bytes(range(256)) * (rows * columns // 256) if pixels is None else pixels
    meta = element(2, 0x10, b"UI", b"1.2.840.10008.1.2.1\x00")
    return (
        bytes(128) + b"DICM" + element(2, 0, b"UL", struct.pack("<I", len(meta))) + meta
        + element(8, 0x16, b"UI", IMPLICIT_CR) + element(8, 0x60, b"CS", b"CR")
        + element(0x10, 0x10, b"PN", b"Doe^Jane")
        + element(0x28, 2, b"US", struct.pack("<H", 1)) + element(0x28, 4, b"CS", b"MONOCHROME2 ")
        + element(0x28, 0x10, b"US", struct.pack("<H", rows)) + element(0x28, 0x11, b"US", struct.pack("<H", columns))
        + element(0x28, 0x100, b"US", struct.pack("<H", 8)) + element(0x28, 0x101, b"US", struct.pack("<H", 8))
        + element(0x28, 0x102, b"US", struct.pack("<H", 7)) + element(0x28, 0x103, b"US", struct.pack("<H", 0))
        + element(0x7FE0, 0x10, b"OW", pixels, length=length)
    )  # fmt: skip


def wide_png() -> bytes:
    """16 bits, 20 million pixels, a few kB: decoded, alone."""
    out = io.BytesIO()
    Image.fromarray(np.zeros((4000, 5000), dtype=np.uint16)).save(out, "PNG")
    return out.getvalue()


def test_the_dicom_file_that_the_hostile_ones_are_made_of_is_read(server: Served) -> None:
    status, content = server.upload([("a.dcm", dicom())])
    assert status == 200
    assert content["results"][0]["score"] is not None


HOSTILE = {
    "bomb": (bomb, "The picture is over 100,000,000 pixels by far"),
    "cut DICOM": (lambda: dicom()[:-1000], "The DICOM file ends before its pixels do; get it again."),
    "65535 x 65535": (
        lambda: dicom(65535, 65535, bytes(4096)),
        "The DICOM file ends before its pixels do; get it again.",
    ),
    "element longer than the file": (
        lambda: dicom()[:300] + element(0x20, 0x10, b"OB", bytes(16), length=0xFFFFFFF0),
        None,
    ),
    "pixels longer than the file": (
        lambda: dicom(pixels=bytes(100), length=0xFFFFFFF0),
        "The DICOM file ends before its pixels do; get it again.",
    ),
    "only a preamble of a program": (
        lambda: b"MZ" + bytes(400),
        "The file is Windows program; JPEG, PNG and DICOM are read.",
    ),
    "cut JPEG": (lambda: jpeg()[:-200], None),
    "HTML": (
        lambda: b"<!doctype html><script>alert(1)</script>",
        "The file's content is not an image; JPEG, PNG and DICOM are read.",
    ),
    "address": (
        lambda: b"http://169.254.169.254/latest/meta-data/",
        "The file's content is not an image; JPEG, PNG and DICOM are read.",
    ),
    "entities": (
        lambda: b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><svg>&b;</svg>',
        "The file's content is not an image; JPEG, PNG and DICOM are read.",
    ),
    "empty": (lambda: b"", "The file holds 0 bytes."),
}


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(GOOD)).save(out, "JPEG")
    return out.getvalue()


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_gets_its_reason_and_the_good_one_beside_it_its_score(server: Served, case: str) -> None:
    make, reason = HOSTILE[case]
    data = make()
    assert len(data) < MIB
    status, content = server.upload([("../../x<script>alert(1)</script>.png", data), ("good.png", GOOD)])
    assert status == 200
    bad, good = content["results"]
    assert (bad["score"], bad["call"], bad["assessable"]) == (None, None, False)
    assert bad["reason"].startswith(reason or "The ")
    assert bad["file"] == "script>.png"  # the last component: a slash stands in the closing tag
    assert good["score"] is not None
    assert "Doe" not in json.dumps(content)


def test_a_program_before_a_dicom_file_is_read_as_the_picture_and_never_run(server: Served) -> None:
    status, content = server.upload([("a.dcm", b"MZ" + dicom()[2:])])
    plain = server.upload([("a.dcm", dicom())])[1]
    assert status == 200
    assert content["results"] == plain["results"]


@pytest.mark.slow
def test_many_large_pictures_at_once_are_decoded_in_turn(server: Served) -> None:
    data = wide_png()
    assert len(data) < 100_000
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda at: server.upload([(str(at), data)]), range(12)))
    assert {status for status, _ in answers} == {200}
    assert server.peak_kb() < 2 * MIB  # 12 at a time would take 5 GB


# --- Clients ----------------------------------------------------------------------------------------------------------


def test_200_parallel_uploads_each_get_an_answer(server: Served) -> None:
    connections = [server.connect() for _ in range(200)]
    whole = served.request(served.form([("a", GOOD)]))
    for connection in connections:
        connection.sendall(whole)
    assert server.get("/health")[0] == 200
    answers = [served.answer_of(connection) for connection in connections]
    for connection in connections:
        connection.close()
    assert {status for status, _ in answers} <= {200, 503}
    assert sum(status == 200 for status, _ in answers) >= 64
    scores = {json.loads(body)["results"][0]["score"] for status, body in answers if status == 200}
    assert max(scores) - min(scores) < 1e-6


def test_200_large_parallel_uploads_do_not_fill_the_memory(server: Served) -> None:
    body = served.form([("a", b"\x89PNG\r\n\x1a\n" + bytes(6 * MIB))])
    whole = served.request(body)

    def upload(_: int) -> int:
        with server.connect() as connection:
            connection.sendall(whole)
            return served.answer_of(connection)[0]

    with ThreadPoolExecutor(200) as pool:
        statuses = list(pool.map(upload, range(200)))
    assert set(statuses) <= {408, 422, 503}
    assert server.peak_kb() < 2 * MIB


def test_a_slow_client_is_told_so_and_keeps_nobody_waiting(server: Served) -> None:
    whole = served.request(served.form([("a", GOOD)]))
    with server.connect() as slow:
        slow.sendall(whole[:-100])
        assert server.upload([("b", GOOD)])[0] == 200
        status, body = served.answer_of(slow)
    assert status == 408
    assert json.loads(body) == {
        "detail": "The upload was not complete after 3 s; send fewer or smaller files at a time."
    }


def test_a_length_that_is_said_too_large_is_refused_before_the_body_comes(server: Served) -> None:
    status, body = server.raw(served.request(b"", length=10**15))
    assert status == 413
    assert json.loads(body) == {"detail": "The request is over 16.8 MB; send fewer files at a time."}


def test_a_length_that_is_said_too_small_is_a_form_that_ends_too_soon(server: Served) -> None:
    body = served.form([("a", GOOD)])
    status, answer = server.raw(served.request(body, length=len(body) // 2))
    assert status == 400
    assert json.loads(answer)["detail"].startswith("The form ends before its last part does.")


def test_a_length_that_is_said_larger_than_the_body_ends_with_the_connection_or_the_time(server: Served) -> None:
    body = served.form([("a", GOOD)])
    assert server.raw(served.request(body, length=len(body) + 1000))[0] == 408
    assert server.raw(served.request(body, length=len(body) + 1000), close=True)[0] in (0, 408)


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "5, 6", "9" * 30])
def test_a_length_that_is_no_number_is_refused(server: Served, length: str) -> None:
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {served.KIND['Content-Type']}\r\n"
    assert server.raw(f"{head}Content-Length: {length}\r\n\r\n".encode())[0] in (400, 413)


def test_a_body_in_pieces_without_a_length_meets_the_same_limit(server: Served) -> None:
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {served.KIND['Content-Type']}\r\n"
    start = served.form([("a", b"")]).rpartition(b"\r\n--")[0]
    piece = bytes(MIB)
    with server.connect() as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n{len(start):x}\r\n".encode() + start + b"\r\n")
        for _ in range(20):
            connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        assert served.answer_of(connection)[0] == 413


def test_connections_that_send_nothing_or_half_a_head_keep_nobody_waiting(server: Served) -> None:
    idle = [server.connect() for _ in range(100)]
    for connection in idle[::2]:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: loc")
    started = time.monotonic()
    assert server.upload([("a", GOOD)])[0] == 200
    assert time.monotonic() - started < 60  # at all
    for connection in idle:
        connection.close()


def test_a_client_that_leaves_leaves_nothing_behind(server: Served) -> None:
    whole = served.request(served.form([("a", bytes(4 * MIB))]))
    for _ in range(30):
        with server.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(whole[: 3 * MIB])
    deadline = time.monotonic() + 30
    while b"pneumoscope_held_bytes 0.0" not in server.get("/metrics")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_noise_for_a_head_and_a_head_without_end_are_refused(server: Served) -> None:
    assert server.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 40 + b"\r\n\r\n")[0] == 400
    assert server.raw(b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000)[0] in (0, 400)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example"])
def test_a_name_that_was_made_to_point_here_is_refused(server: Served, host: str) -> None:
    assert server.raw(served.request(served.form([("a", GOOD)]), host=host))[0] == 403


def test_nothing_is_stored(server: Served, bundle: Bundle) -> None:
    """Neither beside the bundle nor in a file that is open, even a nameless one."""
    server.upload([("a", GOOD), ("b", bytes(4 * MIB))])
    assert sorted(path.name for path in bundle.folder.iterdir()) == ["bundle.json", "model.onnx", "model_card.md"]
    handles = [path.readlink() for path in Path(f"/proc/{server.process.pid}/fd").iterdir()]
    assert [str(path) for path in handles if str(path).startswith(("/tmp", "/var")) or "deleted" in str(path)] == []


# --- Made-up requests -------------------------------------------------------------------------------------------------


def statuses_of(app: Any, operation: Any) -> set[int]:
    """Send what can be made up for an operation; return the statuses that were seen."""
    import hypothesis
    import requests

    seen: set[int] = set()

    @hypothesis.settings(
        max_examples=40,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy())
    def check(case: Any) -> None:
        given = case.as_transport_kwargs(base_url="http://testserver")
        made = requests.Request(**{name: value for name, value in given.items() if name != "cookies"}).prepare()
        body = made.body.encode() if isinstance(made.body, str) else made.body
        headers = {name: value for name, value in made.headers.items() if name.lower() != "content-length"}
        answer = served.ask(app, str(made.method), str(made.url), content=body, headers=headers)
        seen.add(answer.status_code)
        assert answer.status_code < 500
        if answer.status_code >= 400:
            assert isinstance(answer.json()["detail"], str)
        assert str(answer.status_code) in operation.definition.raw["responses"]

    check()
    return seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("api_key", [None, "key"])
def test_requests_made_up_from_the_description_find_no_500(bundle: Bundle, api_key: str | None) -> None:
    import schemathesis

    app = serving.build(bundle, threads=1, api_key=api_key, limits=Limits(timeout_s=5))
    schema = schemathesis.openapi.from_dict(served.ask(app, "GET", "/openapi.json").json())
    statuses: set[int] = set()
    for found in schema.get_all_operations():
        statuses |= statuses_of(app, found.ok())  # type: ignore[union-attr]
    assert statuses >= ({200, 422} if api_key is None else {200, 401})
