"""One image, one score, whoever is asked: Keras, onnxruntime, the command line and the server, on real X-rays."""

from __future__ import annotations

import csv
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pneumoscope import _files
from pneumoscope.bundle import Bundle
from pneumoscope.runs import Run

pytestmark = pytest.mark.slow

TOLERANCE = 1e-3
MODELS = ("cnn", "tl", "ft")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def pneumoscope(*words: object, cache: Path) -> str:
    command = [sys.executable, "-m", "pneumoscope", *map(str, words)]
    environment = os.environ | {"PNEUMOSCOPE_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(real_data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("real") / "run"
    pneumoscope("run", real_data / "chest_xray", "-o", folder, "--preset", "smoke", cache=cache)
    return Run(folder)


@pytest.fixture(scope="module")
def bundles(run: Run, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for model in MODELS:
        pneumoscope("export", run.folder, "--model", model, "-o", folder / model, cache=cache)
    return {model: folder / model for model in MODELS}


@contextmanager
def served(bundle: Path, cache: Path) -> Iterator[int]:
    """The server as a person starts it; yields its port."""
    command = [sys.executable, "-m", "pneumoscope", "serve", "--model", str(bundle), "--port", "0", "--json"]
    environment = os.environ | {"PNEUMOSCOPE_CACHE": str(cache)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            events = (json.loads(line) for line in process.stdout)
            url = next(event["url"] for event in events if event["event"] == "serving")
            yield int(url.rpartition(":")[2])
        finally:
            process.terminate()


def asked(port: int, paths: list[Path]) -> list[dict[str, Any]]:
    """What the server says of files, sixteen in a request."""
    connection, results = http.client.HTTPConnection("127.0.0.1", port, timeout=120), []
    for start in range(0, len(paths), 16):
        parts = b""
        for path in paths[start : start + 16]:
            head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'
            parts += head.encode() + path.read_bytes() + b"\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        connection.request("POST", "/predict", parts + b"--x--\r\n", headers)
        answer = connection.getresponse()
        assert answer.status == 200
        results += json.loads(answer.read())["results"]
    connection.close()
    return results


@pytest.mark.parametrize("model", MODELS)
def test_every_validation_image_has_one_score_and_one_call_whoever_is_asked(
    run: Run, bundles: dict[str, Path], cache: Path, real_data: Path, tmp_path: Path, model: str
) -> None:
    rows = _files.read_csv(run.table_path(model, "validation_yscores"))
    files = [real_data / "chest_xray" / row["path"] for row in rows]
    by_keras = np.array([float(row["y_scores"]) for row in rows])
    assert len(files) > 900

    predictor = Bundle.open(bundles[model]).predictor()
    by_onnx = [answer for path in files for answer in predictor.answer([predictor.read(path.read_bytes())])]
    pneumoscope("predict", *files, "--model", bundles[model], "--csv", tmp_path / "bundle.csv", cache=cache)
    pneumoscope("predict", *files, "--model", f"{run.folder}:{model}", "--csv", tmp_path / "run.csv", cache=cache)
    tables = []
    for name in ("bundle.csv", "run.csv"):
        with (tmp_path / name).open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file)))
    with served(bundles[model], cache) as port:
        by_http = asked(port, files)

    threshold = predictor.description.point[1]
    scores = {
        "onnx": [answer.score for answer in by_onnx],
        "bundle": [float(row["score"]) for row in tables[0]],
        "run": [float(row["score"]) for row in tables[1]],
        "http": [result["score"] for result in by_http],
    }
    calls = {
        "onnx": [answer.call for answer in by_onnx],
        "bundle": [row["call"] for row in tables[0]],
        "run": [row["call"] for row in tables[1]],
        "http": [result["call"] for result in by_http],
    }
    expected = ["PNEUMONIA" if score > threshold else "NORMAL" for score in by_keras]
    for name, values in scores.items():
        print(
            f"{model} {name}: {len(values)} images, at most {np.abs(np.array(values) - by_keras).max():.1e} from Keras"
        )
        np.testing.assert_allclose(values, by_keras, atol=TOLERANCE, err_msg=name)
        assert calls[name] == expected, name
    assert [row["assessable"] for row in tables[0]] == [row["assessable"] for row in tables[1]]
    assert [row["file"] for row in tables[0]] == [str(path) for path in files]
