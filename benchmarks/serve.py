"""Answers a second of the server beside the same work in one process: decode, and onnxruntime.

    python benchmarks/serve.py BUNDLE IMAGES [--seconds 2] [--rounds 5] [--clients 16]

The server and its clients are processes of their own on this machine, so that they share its cores; clients send the
raw bytes of one image a request over a connection that stays open. Three ratios are to hold: with one client the
median answer takes less than 3 times what decoding and the network take in-process; many clients together get at least
0.7 of the rate in-process, with batches; and their median answer takes at most 1.6 times their number over that rate.
In-process counts the better of two settings of onnxruntime: threads that spin while they wait, or do not. All is
measured in turns, so that other work on the machine meets both sides; the figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import selectors
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from pneumoscope import serving
from pneumoscope.bundle import Bundle
from pneumoscope.predictor import Predictor

BOUNDARY = b"benchmark-boundary"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("images", type=Path, help="a folder with JPEG, PNG or DICOM files, at any depth")
    arguments.add_argument("--seconds", type=float, default=2.0, help="for each measurement of the server")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--clients", type=int, default=16)
    arguments.add_argument("--files", type=int, default=200)
    given = arguments.parse_args()
    paths = sorted(path for path in given.images.rglob("*") if path.is_file() and not path.name.startswith("."))
    chosen = paths[:: max(1, len(paths) // given.files)][: given.files]
    files = [path.read_bytes() for path in chosen]
    print(f"{len(files)} images of {np.median([len(data) for data in files]) / 1024:.0f} kB")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(given.bundle, theirs), daemon=True)
    server.start()
    url = ours.recv()
    try:
        _measure(Bundle.open(given.bundle), files, url, given, context)
    finally:
        server.terminate()
        server.join()


def _measure(bundle: Bundle, files: list[bytes], url: str, given: Any, context: Any) -> None:
    predictors = [bundle.predictor(spinning=spinning) for spinning in (True, False)]
    rounds = []
    with context.Pool(1) as pool:
        for clients in (1, given.clients):
            pool.apply(_ask, (url, files, clients, 1.0))  # warm
        for number in range(given.rounds):
            one, many = (
                max(_in_process(each, files, batch=batch, seconds=given.seconds / 4) for each in predictors)
                for batch in (1, given.clients)
            )
            alone, _ = pool.apply(_ask, (url, files, 1, given.seconds))
            times, rate = pool.apply(_ask, (url, files, given.clients, given.seconds))
            rounds.append((1 / one, many, np.median(alone), rate, np.median(times)))
            print("round", number + 1, *(f"{value:.4g}" for value in rounds[-1]))
    values = np.array(rounds)
    alone_s, many, p50_one, rate, p50_many = np.median(values, axis=0)
    print(f"in-process: {1e3 * alone_s:.2f} ms an image alone; {many:.0f} images/s in batches of {given.clients}")
    print(f"1 client: p50 {1e3 * p50_one:.2f} ms; {given.clients} clients: {rate:.0f}/s, p50 {1e3 * p50_many:.1f} ms")
    ratios = (
        (values[:, 2] / values[:, 0], "p50 of one client over in-process (target: under 3)"),
        (values[:, 3] / values[:, 1], "rate of many clients over in-process (target: at least 0.7)"),
        (
            values[:, 4] * values[:, 1] / given.clients,
            "p50 of many over clients / rate in-process (target: at most 1.6)",
        ),
    )
    for ratio, name in ratios:
        print(f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f}) {name}")


def _serve(folder: Path, pipe: Connection) -> None:
    serving.serve(Bundle.open(folder), port=0, on_ready=pipe.send)


def _in_process(predictor: Predictor, files: list[bytes], *, batch: int, seconds: float) -> float:
    """Images a second of one thread that decodes a batch and runs the network on it, again and again."""
    done = 0

    def step() -> None:
        nonlocal done
        predictor.answer([predictor.read(files[(done + at) % len(files)]) for at in range(batch)])
        done += batch

    return _timed(step, lambda: done, seconds)


def _timed(step: Callable[[], None], count: Callable[[], int], seconds: float) -> float:
    step()
    first, started = count(), time.perf_counter()
    while time.perf_counter() < started + seconds:
        step()
    return (count() - first) / (time.perf_counter() - started)


def _ask(url: str, files: list[bytes], clients: int, seconds: float) -> tuple[list[float], float]:
    """Ask with several connections from one thread; each sends its next image once it has its answer."""
    host = urlsplit(url)
    requests = [_request(data, host.netloc) for data in files]
    selector = selectors.DefaultSelector()
    for number in range(clients):
        connection = socket.create_connection((host.hostname or "", host.port or 0))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(connection, selectors.EVENT_READ, [number, 0.0, b""])
        _send(selector.get_key(connection), requests)
    times: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() < started + seconds:
        for key, _ in selector.select(1.0):
            key.data[2] += key.fileobj.recv(65536)  # type: ignore[union-attr]
            if _is_whole(key.data[2]):
                times.append(time.perf_counter() - key.data[1])
                _send(key, requests)
    elapsed = time.perf_counter() - started
    for key in list(selector.get_map().values()):
        key.fileobj.close()  # type: ignore[union-attr]
    return times, len(times) / elapsed


def _request(data: bytes, host: str) -> bytes:
    head = b'Content-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    body = b"--" + BOUNDARY + b"\r\n" + head + data + b"\r\n--" + BOUNDARY + b"--\r\n"
    return (
        b"POST /predict HTTP/1.1\r\nHost: " + host.encode() + b"\r\nContent-Type: multipart/form-data; boundary="
        + BOUNDARY + b"\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )  # fmt: skip


def _send(key: selectors.SelectorKey, requests: list[bytes]) -> None:
    number, _, _ = key.data
    key.data[:] = [number + 7, time.perf_counter(), b""]
    key.fileobj.sendall(requests[number % len(requests)])  # type: ignore[union-attr]


def _is_whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    if len(body) < length:
        return False
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"The server refused: {json.loads(body)}")
    return True


if __name__ == "__main__":
    main()
