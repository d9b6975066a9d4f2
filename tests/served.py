"""A bundle that needs no Keras to make, a server process around it, and ways to ask both; for the tests of serving."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pneumoscope import phantom
from pneumoscope.bundle import Bundle
from pneumoscope.evidence import Grid
from pneumoscope.familiarity import Familiarity
from pneumoscope.predictor import Curve, Description

SIZE_PX = 64
CELLS = 4
BOUNDARY = "boundary-of-a-test"
ERRORS_SHOWN = 2000

Files = Sequence[tuple[str, bytes]]


def network() -> bytes:
    """ONNX that scores by brightness: a cell's evidence is its mean grey less one half; the bias is 0.25."""

    def constant(name: str, values: Any, kind: Any) -> Any:
        return numpy_helper.from_array(np.array(values, dtype=kind), name)

    step = SIZE_PX // CELLS
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Cast", ["image"], ["grey"], to=TensorProto.FLOAT),
            node("Div", ["grey", "white"], ["share"]),
            node("Unsqueeze", ["share", "channel"], ["plane"]),
            node("AveragePool", ["plane"], ["pooled"], kernel_shape=[step, step], strides=[step, step]),
            node("Squeeze", ["pooled", "channel"], ["cells"]),
            node("Sub", ["cells", "half"], ["evidence"]),
            node("Reshape", ["cells", "flat"], ["features"]),
            node("ReduceSum", ["evidence", "sides"], ["sum"], keepdims=0),
            node("Mul", ["sum", "zero"], ["nothing"]),
            node("Add", ["nothing", "quarter"], ["bias"]),
            node("Add", ["sum", "bias"], ["logit"]),
            node("Sigmoid", ["logit"], ["score"]),
        ],
        "brightness",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIZE_PX, SIZE_PX])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (
                ("score", ["batch"]),
                ("logit", ["batch"]),
                ("bias", ["batch"]),
                ("evidence", ["batch", CELLS, CELLS]),
                ("features", ["batch", CELLS * CELLS]),
            )
        ],
        [
            constant("white", 255, np.float32),
            constant("half", 0.5, np.float32),
            constant("zero", 0, np.float32),
            constant("quarter", 0.25, np.float32),
            constant("channel", [1], np.int64),
            constant("sides", [1, 2], np.int64),
            constant("flat", [-1, CELLS * CELLS], np.int64),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString())


def write_bundle(folder: Path) -> Bundle:
    """Write a bundle around `network`."""
    rng = np.random.default_rng(0)
    usual = rng.normal(0.5, 0.2, (400, CELLS * CELLS))
    description = Description(
        model="tl",
        title="Transfer learning",
        size_px=SIZE_PX,
        grid=Grid((SIZE_PX / CELLS - 1) / 2, SIZE_PX / CELLS),
        evidence_scale=0.5,
        points={"youden": 0.5, "sensitivity-0.95": 0.25},
        chosen_on="validation",
        curve=Curve(
            "validation", 3, 2, np.array([1.0, 0.5, 0.0]), np.array([0.0, 0.8, 1.0]), np.array([1.0, 0.9, 0.0])
        ),
        temperature=2.0,
        familiarity=Familiarity.fit(usual[:200], held_out=usual[200:]),
        unfamiliar="",
        metrics={"validation": {"auc": 0.9}},
        provenance={"pneumoscope": "0"},
        note="The images were synthetic.",
    )
    return Bundle.write(folder, network=network(), description=description)


def png(seed: int, *, size_px: int = 96) -> bytes:
    """A synthetic radiograph."""
    return encoded(phantom.draw(seed % 2, seed=seed, width_px=size_px, height_px=size_px))


def encoded(pixels: Any) -> bytes:
    """A PNG of grey pixels."""
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def form(files: Files, *, field: str = "files") -> bytes:
    """A multipart body."""
    parts = b"".join(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in files
    )
    return parts + f"--{BOUNDARY}--\r\n".encode()


KIND = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def ask(app: Any, method: str, path: str, *, base: str = "http://testserver", **given: Any) -> httpx.Response:
    """Ask an application that runs in this process; whatever it raises is raised here."""

    async def once() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base) as client:
            return await client.request(method, path, **given)

    return asyncio.run(once())


def post(app: Any, path: str, files: Files, **given: Any) -> httpx.Response:
    """Upload files to an application that runs in this process."""
    headers = KIND | given.pop("headers", {})
    return ask(app, "POST", path, content=form(files), headers=headers, **given)


@dataclass(frozen=True)
class Served:
    """A server process."""

    url: str
    port: int
    process: subprocess.Popen[str]

    def anonymous_kb(self) -> int:
        """Memory of the process that is not files mapped into it."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
        raise AssertionError("no RssAnon")

    def peak_kb(self) -> int:
        """Most memory the process ever had, mapped files included."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
        raise AssertionError("no VmHWM")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def raw(self, data: bytes, *, close: bool = False) -> tuple[int, bytes]:
        """Send bytes as they are; return the status and the body of the answer."""
        with self.connect() as connection:
            connection.sendall(data)
            if close:
                connection.shutdown(socket.SHUT_WR)
            return answer_of(connection)

    def upload(self, files: Files, path: str = "/predict") -> tuple[int, Any]:
        """Upload files; return the status and the JSON of the answer."""
        status, body = self.raw(request(form(files), path=path))
        return status, json.loads(body)

    def get(self, path: str) -> tuple[int, bytes]:
        return self.raw(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n\r\n".encode())


def request(body: bytes, *, path: str = "/predict", length: int | None = None, host: str = "127.0.0.1") -> bytes:
    """A POST as bytes; its Content-Length may lie."""
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {KIND['Content-Type']}\r\nContent-Length: {length}"
    return f"{head}\r\n\r\n".encode() + body


def answer_of(connection: socket.socket) -> tuple[int, bytes]:
    """Read one answer; (0, b"") where the connection was closed without one."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return 0, b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields.get(b"content-length", b"0")):
        piece = connection.recv(65536)
        assert piece, "the answer was cut off"
        body += piece
    return int(head.split()[1]), body


@contextmanager
def serving_process(bundle: Path, limits: str = "Limits()", more: str = "") -> Iterator[Served]:
    """Run `serving.serve` in a process of its own; it prints what it says to stderr where it should say nothing."""
    program = (
        "from pathlib import Path\nfrom pneumoscope.bundle import Bundle\n"
        "from pneumoscope.serving import Limits, serve\n"
        f"serve(Bundle.open(Path({str(bundle)!r})), port=0, limits={limits}, {more}\n"
        "      on_ready=lambda url: print(url, flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    try:
        assert url.startswith("http://127.0.0.1:"), process.communicate(timeout=30)[1][-ERRORS_SHOWN:]
        yield Served(url, int(url.rpartition(":")[2]), process)
    finally:
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert "Traceback" not in said, said[-ERRORS_SHOWN:]
