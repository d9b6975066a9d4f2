"""The Kaggle data set: kagglehub against a real local server, every failure in one sentence, editions recognised."""

from __future__ import annotations

import base64
import gc
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from kagglesdk import kaggle_env  # type: ignore[import-untyped]
from PIL import Image

from pneumoscope import _locks, cli, kaggle
from pneumoscope.catalog import Catalog
from pneumoscope.errors import DataError, PneumoscopeError, RunError, StoreError, UsageError

LAYOUT = {
    "train/NORMAL": ["IM-0001-0001.jpeg", "IM-0002-0001.jpeg"],
    "train/PNEUMONIA": ["person1_bacteria_1.jpeg", "person2_virus_2.jpeg", "person3_bacteria_3.jpeg"],
    "val/NORMAL": ["NORMAL2-IM-0003-0001.jpeg"],
    "val/PNEUMONIA": ["person4_bacteria_4.jpeg"],
    "test/NORMAL": ["IM-0005-0001.jpeg"],
    "test/PNEUMONIA": ["person6_virus_6.jpeg"],
}
FILLING = np.random.default_rng(5).bytes(3_000_000)
"""So that the archive takes several of the pieces in which kagglehub writes."""


def jpeg(name: str) -> bytes:
    pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (24, 24), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


def kaggles_archive() -> bytes:
    """An archive as Kaggle's is: the set in a folder, a copy of it inside, and what macOS adds."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for folder, names in LAYOUT.items():
            for name in names:
                for root in ("chest_xray", "chest_xray/chest_xray"):
                    archive.writestr(f"{root}/{folder}/{name}", jpeg(name))
                archive.writestr(f"chest_xray/__MACOSX/chest_xray/{folder}/._{name}", b"Mac OS X")
        archive.writestr("chest_xray/filling.bin", FILLING)
    return buffer.getvalue()


ARCHIVE = kaggles_archive()


class Server(ThreadingHTTPServer):
    """Answers as Kaggle does: the newest version, a redirect to the store, and there the archive or a rest of it."""

    status = 200
    body = ARCHIVE
    announced: str | None = None
    said_bytes: int | None = None
    limit: int | None = None
    stalls = False
    newest_client = "0"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.gone = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        method = self.path.rpartition("/")[2]
        self.server.asked.append(method)
        if self.server.status != 200:
            self.answer(self.server.status, b'{"message": "no"}', "application/json")
        elif method == "GetDataset":
            self.answer(200, json.dumps({"currentVersionNumber": 2}).encode(), "application/json")
        else:
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/store/archive.zip")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.asked.append(wanted or "archive")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        digest = base64.b64encode(hashlib.md5(ARCHIVE).digest()).decode()
        headers = {"Accept-Ranges": "bytes", "x-goog-hash": self.server.announced or f"crc32c=AAAAAA==,md5={digest}"}
        self.answer(206 if start else 200, self.server.body[start:], "application/zip", headers)

    def answer(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("X-Kaggle-HubVersion", self.server.newest_client)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        of_store = kind == "application/zip"
        self.send_header("Content-Length", str((of_store and self.server.said_bytes) or len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.limit] if of_store else body)
        if of_store and self.server.stalls:
            self.server.gone.wait(60)

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the credentials, proxies and Kaggle settings of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "home" / ".kaggle"))
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or (name.startswith("KAGGLE") and name != "KAGGLE_CONFIG_DIR"):
            monkeypatch.delenv(name)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, running.url)
    try:
        yield running
    finally:
        running.gone.set()
        running.shutdown()
        running.server_close()
        thread.join()


def refused(kind: type[PneumoscopeError], **options: Any) -> str:
    """Fetch, and return the one sentence that it ends with."""
    with pytest.raises(kind) as caught:
        kaggle.fetch(**options)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert re.fullmatch(r"[^\n]*[^.\n]\.", text), text
    return text


def archives(folder: Path) -> list[Path]:
    return list(folder.rglob("*.archive"))


# --- what comes ------------------------------------------------------------------------------------------------------


def test_fetching_ends_with_the_folder_that_a_run_takes(server: Server, own_cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    fetched = kaggle.fetch(progress=lambda *done: seen.append(done))
    place = own_cache / "kaggle" / "datasets" / "paultimothymooney" / "chest-xray-pneumonia"
    assert fetched.folder == place / "versions" / "2" / "chest_xray"
    assert sorted(path.name for path in fetched.folder.iterdir() if path.is_dir()) == [
        *("__MACOSX", "chest_xray", "test", "train", "val")
    ]
    assert archives(own_cache) == []
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 2
    assert seen[-1] == (len(ARCHIVE), len(ARCHIVE))
    assert fetched.counts.to_dict("index") == {
        "train": {"NORMAL": 2, "PNEUMONIA": 3, "total": 5},
        "val": {"NORMAL": 1, "PNEUMONIA": 1, "total": 2},
        "test": {"NORMAL": 1, "PNEUMONIA": 1, "total": 2},
    }
    assert fetched.counts.index.name == "folder"
    assert fetched.sentences == (
        (
            "This is not the known data set, or not the whole of it: found train 5, val 2, test 2; the Kaggle edition "
            "has train 5,216, val 16, test 624; the Mendeley edition has train 5,232, test 624."
        ),
        (
            "Its val folder holds 2 images, too few to steer training by: they count as train, and a run holds out "
            "validation images of its own."
        ),
        "9 files of a nested copy of the data were left out.",
    )
    assert fetched.command == f"pneumoscope run {fetched.folder} -o runs/first"
    assert len(Catalog.scan(fetched.folder).rows()) == 9


def test_what_is_here_is_found_without_a_network(server: Server, own_cache: Path, tmp_path: Path) -> None:
    first = kaggle.fetch(folder=tmp_path / "data")
    assert first.folder.is_relative_to(tmp_path / "data")
    assert not own_cache.exists()
    server.asked.clear()
    again = kaggle.fetch(folder=tmp_path / "data")
    assert (again.folder, server.asked) == (first.folder, [])


def test_an_unfinished_version_is_not_taken_for_a_whole_one(server: Server, tmp_path: Path) -> None:
    whole = kaggle.fetch(folder=tmp_path)
    (marker,) = tmp_path.rglob("2.complete")
    marker.unlink()
    (whole.folder / "train" / "NORMAL" / "IM-0001-0001.jpeg").unlink()
    server.asked.clear()
    assert kaggle.fetch(folder=tmp_path).counts["total"].sum() == 9
    assert server.asked == ["GetDataset", "DownloadDataset", "archive"]


def test_a_version_can_be_asked_for(server: Server, tmp_path: Path) -> None:
    fetched = kaggle.fetch(f"{kaggle.DATASET}/versions/1", folder=tmp_path)
    assert fetched.folder.parent.name == "1"
    assert server.asked == ["DownloadDataset", "archive"]


def test_nothing_is_printed_and_no_setting_stays_behind(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import kagglehub

    monkeypatch.setenv("KAGGLEHUB_CACHE", "/of/the/user")
    before = logging.getLogger("kagglehub").level, kagglehub.clients.tqdm
    kaggle.fetch(folder=tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (logging.getLogger("kagglehub").level, kagglehub.clients.tqdm) == before
    assert os.environ["KAGGLEHUB_CACHE"] == "/of/the/user"
    monkeypatch.delenv("KAGGLEHUB_CACHE")
    kaggle.fetch(folder=tmp_path)
    assert "KAGGLEHUB_CACHE" not in os.environ


def test_advice_to_upgrade_kagglehub_does_not_mix_with_what_programs_read(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import kagglehub

    monkeypatch.setenv("KAGGLE_API_TOKEN", "secret")  # only then it advises
    monkeypatch.setattr(kagglehub.clients, "already_printed_version_warning", False)
    server.newest_client = "99.0"
    kaggle.fetch(folder=tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    assert "(99.0)" in err


def test_a_version_that_was_deleted_is_fetched_again(server: Server, tmp_path: Path) -> None:
    shutil.rmtree(kaggle.fetch(folder=tmp_path).folder.parent)
    server.asked.clear()
    assert kaggle.fetch(folder=tmp_path).counts["total"].sum() == 9
    assert server.asked == ["GetDataset", "DownloadDataset", "archive"]


def test_a_set_without_a_train_folder_is_given_whole(tmp_path: Path) -> None:
    (tmp_path / "NORMAL").mkdir()
    (tmp_path / "__MACOSX" / "train").mkdir(parents=True)
    assert kaggle.data_folder(tmp_path) == tmp_path


def test_the_outer_of_two_copies_is_the_data_folder(tmp_path: Path) -> None:
    for folder in ("a/b/chest/Train", "a/chest/Train", "a/chest/chest/train"):
        (tmp_path / folder).mkdir(parents=True)
    assert kaggle.data_folder(tmp_path) == tmp_path / "a" / "chest"


def test_the_verb_ends_with_the_counts_and_the_next_command(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pneumoscope", "fetch", "kaggle", "-o", str(tmp_path / "my data")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    title, *table = capsys.readouterr().out.splitlines()
    assert title.startswith(f"Images in {tmp_path}/my data/datasets/")
    assert [line.split() for line in table[:4]] == [
        ["folder", "NORMAL", "PNEUMONIA", "total"],
        *(["train", "2", "3", "5"], ["val", "1", "1", "2"], ["test", "1", "1", "2"]),
    ]
    assert table[-1].startswith(f"Next: pneumoscope run '{tmp_path}/my data/datasets/")


# --- which set it is -------------------------------------------------------------------------------------------------


def counted(**totals: int) -> pd.DataFrame:
    counts = pd.DataFrame({"NORMAL": 0, "PNEUMONIA": totals, "total": totals})
    return counts.rename_axis("folder")


def test_the_kaggle_edition_is_recognised() -> None:
    assert kaggle.recognise(counted(train=5216, test=624, val=16)) == [
        "This looks like the Kaggle edition: train 5,216, test 624, val 16, 5,856 images in all.",
        (
            "Its val folder holds 16 images, too few to steer training by: they count as train, and a run holds out "
            "validation images of its own."
        ),
    ]


def test_the_mendeley_edition_is_recognised() -> None:
    assert kaggle.recognise(counted(train=5232, test=624)) == [
        "This looks like the Mendeley edition: train 5,232, test 624, 5,856 images in all."
    ]


def test_a_set_that_lacks_one_image_is_not_taken_for_whole() -> None:
    (sentence, _) = kaggle.recognise(counted(train=5215, test=624, val=16))
    assert sentence.startswith("This is not the known data set, or not the whole of it: found train 5,215, ")


def test_a_val_folder_of_some_size_is_no_matter() -> None:
    assert len(kaggle.recognise(counted(train=100, val=17))) == 1


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["chest-xray-pneumonia", "a/b/c", "a/b/versions/0", "a/b/versions/x", "../b", "a/..", "a b/c", "a/b\n"]
)
def test_a_name_that_is_none_is_a_wrong_call(name: str, own_cache: Path) -> None:
    assert refused(UsageError, dataset=name) == (
        f"{name!r} is not the name of a data set on Kaggle; give OWNER/NAME as in its address, "
        "for example paultimothymooney/chest-xray-pneumonia."
    )
    assert not own_cache.exists()


ELSEWHERE = (
    "run 'pneumoscope fetch kaggle' where there is a network, such as a cluster's login node or a laptop, and copy the "
    "folder that it names to this machine."
)


def test_a_refused_connection_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as closed:
        url = closed.url
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, url)
    assert refused(DataError) == f"Kaggle cannot be reached ([Errno 111] Connection refused); {ELSEWHERE}"


def test_a_name_that_does_not_resolve_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")  # no name ends in .invalid (RFC 6761)
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, "http://kaggle.invalid")
    text = refused(DataError)
    assert re.fullmatch(
        r"Kaggle cannot be reached \(Failed to resolve 'kaggle\.invalid' \(\[Errno -\d+\] [^\n]+\)\); (.+)", text
    ), text
    assert text.endswith(ELSEWHERE)


def test_a_proxy_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "PROD")
    monkeypatch.setenv("HTTPS_PROXY", server.url)  # it knows no CONNECT
    text = refused(DataError)
    assert text == f"Kaggle cannot be reached (501 Unsupported method ('CONNECT')); {ELSEWHERE}"


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (
            404,
            (
                "Kaggle has no data set a/b (404), or it is private; check OWNER/NAME in its address, and for a "
                "private one make a token at https://www.kaggle.com/settings, save it as ~/.kaggle/access_token and "
                "run the same command again."
            ),
        ),
        *(
            (
                status,
                (
                    f"Kaggle does not let you read a/b ({status}); check OWNER/NAME in its address, make a token at "
                    "https://www.kaggle.com/settings, save it as ~/.kaggle/access_token, agree to the terms on its "
                    "page where it has any, and run the same command again."
                ),
            )
            for status in (401, 403)
        ),
        (429, "Kaggle asks to wait (429) at a/b; run the same command again in some minutes."),
        (503, "Kaggle failed (503) at a/b; run the same command again in some minutes."),
    ],
)
def test_an_answer_that_is_no_data_set_is_told(status: int, text: str, server: Server) -> None:
    server.status = status
    assert refused(DataError, dataset="a/b") == text


def test_a_transfer_that_breaks_goes_on_with_the_same_command(server: Server, tmp_path: Path) -> None:
    server.limit = 2_500_000
    assert refused(DataError, folder=tmp_path) == (
        f"The connection to Kaggle ended early; 2.1 MB of {kaggle.DATASET} are kept, run the same command again to go "
        "on."
    )
    (part,) = archives(tmp_path)
    kept = part.stat().st_size
    assert part.read_bytes() == ARCHIVE[:kept]
    server.limit = None
    server.asked.clear()
    seen: list[int] = []
    assert kaggle.fetch(folder=tmp_path, progress=lambda done, _: seen.append(done)).counts["total"].sum() == 9
    assert server.asked == ["GetDataset", "DownloadDataset", "archive", f"bytes={kept}-"]
    assert min(seen) > kept


def test_what_lacks_its_checksum_is_deleted(server: Server, tmp_path: Path) -> None:
    server.body = ARCHIVE[:-1] + b"x"
    assert refused(DataError, folder=tmp_path) == (
        f"The archive of {kaggle.DATASET} does not have the checksum that Kaggle gives for it; it was deleted, run the "
        "same command again, and if that repeats, look whether a proxy changes downloads."
    )
    assert archives(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (ARCHIVE.replace(b"Mac OS X", b"Mac OS Y", 1), r"Bad CRC-32 for file 'chest_xray/__MACOSX/[^']+'"),
        (b"<html>please log in</html>", "Unsupported archive type"),
        (ARCHIVE[: len(ARCHIVE) // 2], "Unsupported archive type"),
    ],
)
def test_a_damaged_archive_is_deleted_where_no_checksum_came(
    body: bytes, why: str, server: Server, tmp_path: Path
) -> None:
    server.body, server.announced = body, "crc32c=AAAAAA=="
    text = refused(DataError, folder=tmp_path)
    assert re.fullmatch(
        rf"The archive of {kaggle.DATASET} is damaged \({why}\); it was deleted, run the same command again\.", text
    ), text
    assert archives(tmp_path) == []
    server.body = ARCHIVE
    assert kaggle.fetch(folder=tmp_path).counts["total"].sum() == 9


def test_a_data_set_without_x_rays_is_told(server: Server, tmp_path: Path) -> None:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("iris.csv", "a,b\n1,2\n")
    server.body, server.announced = buffer.getvalue(), "crc32c=AAAAAA=="
    text = refused(DataError, dataset="uciml/iris", folder=tmp_path)
    assert text == f"{tmp_path}/datasets/uciml/iris/versions/2 holds no images but 'iris.csv'; give that file."


def test_credentials_that_cannot_be_read_are_told(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "home" / ".kaggle" / "kaggle.json"
    file.parent.mkdir(parents=True)
    file.write_text("not JSON", encoding="utf-8")
    assert refused(DataError) == (
        f"Kaggle did not give {kaggle.DATASET} (Invalid Kaggle credentials file at {file}); mend that and run the same "
        "command again."
    )


def test_two_fetches_at_once_do_not_write_into_one_another(server: Server, own_cache: Path) -> None:
    place = own_cache / "kaggle" / "datasets" / "paultimothymooney" / "chest-xray-pneumonia"
    with _locks.hold(place, "fetch", what="x"):
        text = refused(RunError)
    assert text.startswith(f"The download of {kaggle.DATASET} is in use by process {os.getpid()} on ")
    assert server.asked == []


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious", encoding="utf-8")
    assert refused(StoreError, folder=file) == (
        f"Cannot write to {file} (Not a directory); choose a folder you may write to with -o."
    )
    assert file.read_text(encoding="utf-8") == "precious"


@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
def test_too_small_a_disk_is_told_before_anything_is_written(server: Server, tmp_path: Path) -> None:
    server.said_bytes = 10**15
    text = refused(StoreError, folder=tmp_path)
    assert re.fullmatch(
        rf"{kaggle.DATASET} needs 2000\.0 TB in {re.escape(str(tmp_path))} until it is unpacked, but only \S+ [GT]B is "
        r"free; free some space, or choose a folder on a larger disk with -o\.",
        text,
    ), text
    assert archives(tmp_path) == []
    gc.collect()  # kagglehub leaves the connection open


PROGRAM = """
import sys
from kagglesdk import kaggle_env  # type: ignore[import-untyped]
kaggle_env._env_to_endpoint[kaggle_env.KaggleEnv.LOCAL] = sys.argv[1]
from pathlib import Path
from pneumoscope import kaggle
from pneumoscope.errors import PneumoscopeError
try:
    print(kaggle.fetch(folder=Path(sys.argv[2]), progress=lambda *done: print(*done, flush=True)).folder)
except PneumoscopeError as error:
    print(f"{type(error).__name__} {error.exit_status}: {error}")
"""


def test_an_interrupted_download_is_kept_and_can_be_resumed(server: Server, tmp_path: Path) -> None:
    server.limit, server.stalls = 2_500_000, True
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, server.url, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert first.split()[1:] == [str(len(ARCHIVE))]
    assert rest.splitlines()[-1] == (
        f"StoppedEarly 75: The download of {kaggle.DATASET} was interrupted; what came is kept, run the same command "
        "again to go on."
    )
    server.gone.set()
    server.limit, server.stalls = None, False
    server.asked.clear()
    assert kaggle.fetch(folder=tmp_path).counts["total"].sum() == 9
    assert server.asked[-1].startswith("bytes="), "what came was thrown away"


def test_a_disk_that_fills_while_it_is_unpacked_is_told(server: Server, tmp_path: Path) -> None:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("chest_xray/filling.bin", bytes(20_000_000))  # 20 kB in the archive
    server.body, server.announced = buffer.getvalue(), "crc32c=AAAAAA=="
    disk = tmp_path / "disk"
    disk.mkdir()
    small = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=8m none "$0" && exec "$@"', str(disk)]
    if not shutil.which("unshare") or subprocess.run([*small, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be made here")
    command = [*small, sys.executable, "-c", PROGRAM, server.url, str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert re.fullmatch(
        rf"StoreError 1: There is no more room in {disk} \(No space left on device\): 19\.\d kB came, 20\.0 MB are "
        r"needed to unpack them, \S+ k?B is free; free some space and run the same command again\.",
        done.stdout.splitlines()[-1],
    ), done
