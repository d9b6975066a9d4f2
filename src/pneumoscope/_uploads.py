"""Uploaded files, read into memory under limits that hold while they come, whatever the client announced.

Owns the limits of the server, what it keeps of a multipart body, and the names that uploads go by. Writes nothing to
the disk. Knows nothing of images or networks.
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Final, NoReturn

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

from pneumoscope import _files
from pneumoscope.errors import UsageError

FIELD: Final = "files"
"""The name of the form's field that holds images."""

RETRY_AFTER: Final = {"Retry-After": "1"}
"""What a client that was refused for want of room is told."""

_LONGEST_NAME: Final = 255
_FURTHER_FIELDS: Final = 16  # a form may hold so many other fields; they are passed over
_HOW: Final = f"Send images (JPEG, PNG or DICOM) as multipart/form-data, each in the field {FIELD}"


@dataclass(frozen=True)
class Limits:
    """What the server takes on at most.

    Attributes
    ----------
    max_file_bytes, max_request_bytes : int
        Of one image and of a whole request; more is answered with 413.
    max_files : int
        Images in a request; more is answered with 413.
    max_held_bytes : int
        Of all requests that are read or answered at the time; more is answered with 503.
    max_waiting : int
        Images that wait for the network or are decoded at the time; while there are more, requests get 503.
    timeout_s : float
        Seconds for a request to come in whole; then it is answered with 408.
    batch_images : int
        Images that the network is run on at a time.
    delay_ms : float
        How long an idle network waits for images that are being decoded.
    large_pixels : int
        Larger pictures are decoded one at a time, because each may take 16 bytes a pixel.
    """

    max_file_bytes: int = 64 * 2**20
    max_request_bytes: int = 256 * 2**20
    max_files: int = 64
    max_held_bytes: int = 512 * 2**20
    max_waiting: int = 64
    timeout_s: float = 60.0
    batch_images: int = 16
    delay_ms: float = 4.0
    large_pixels: int = 16_000_000

    def __post_init__(self) -> None:
        """Refuse limits that let nothing through.

        Raises
        ------
        UsageError
            Where one is 0 or less; only the delay may be 0.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value >= 0 if field.name == "delay_ms" else value > 0):
                raise UsageError(f"The limit {field.name} is {value}; give a number above 0.")


@dataclass(frozen=True)
class Upload:
    """One file as it came: its name, made harmless, and its bytes."""

    name: str
    data: bytes


class Held:
    """Counts the bytes that all requests hold at the time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """Give a request its share, and take it back when it is answered."""
        share = Share(self)
        try:
            yield share
        finally:
            self.used -= share.used

    def take(self, n_bytes: int) -> None:
        """Count bytes in.

        Raises
        ------
        HTTPException
            503 where there is no room for them.
        """
        if self.used + n_bytes > self._limit:
            raise HTTPException(503, "The server holds as many uploads as it can; send it again later.", RETRY_AFTER)
        self.used += n_bytes


class Share:
    """What one request holds."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self.used = 0

    def take(self, n_bytes: int) -> None:
        """Count bytes in; raises as `Held.take`."""
        self._held.take(n_bytes)
        self.used += n_bytes


async def read_files(
    body: AsyncIterator[bytes], headers: Mapping[str, str], *, limits: Limits, share: Share
) -> list[Upload]:
    """Read the files of a multipart body.

    Raises
    ------
    HTTPException
        400 where the body is damaged, 408 where it comes too slowly, 413 where it is too large, 415 where it is no
        multipart form, 422 where it holds no file, 503 where there is no room.
    """
    form = _Form(_boundary(headers), limits)
    if int(headers.get("content-length", "0")) > limits.max_request_bytes:  # the HTTP parser let only digits through
        _refuse_large(limits)
    try:
        async with asyncio.timeout(limits.timeout_s):
            async for chunk in body:
                if share.used + len(chunk) > limits.max_request_bytes:
                    _refuse_large(limits)
                share.take(len(chunk))
                form.write(chunk)
    except TimeoutError:
        raise HTTPException(
            408, f"The upload was not complete after {limits.timeout_s:g} s; send fewer or smaller files at a time."
        ) from None
    return form.finish()


def clean_name(name: str) -> str:
    """Return the last component of an uploaded name, without control and formatting characters, not too long."""
    last = name.replace("\\", "/").rpartition("/")[2]
    kept = "".join(character for character in last if unicodedata.category(character)[0] != "C")
    return kept.strip()[:_LONGEST_NAME] or "unnamed"


def _boundary(headers: Mapping[str, str]) -> bytes:
    kind, options = parse_options_header(headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise HTTPException(415, f"The request is no form with files. {_HOW}.")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:  # RFC 2046, 5.1.1
        raise HTTPException(400, f"The request's Content-Type names no usable boundary. {_HOW}.")
    return boundary


def _refuse_large(limits: Limits) -> NoReturn:
    raise HTTPException(
        413, f"The request is over {_files.size_text(limits.max_request_bytes)}; send fewer files at a time."
    )


class _Form:
    """Takes a multipart body piece by piece and keeps the files in it."""

    def __init__(self, boundary: bytes, limits: Limits) -> None:
        self._limits = limits
        self._files: list[Upload] = []
        self._n_parts = 0
        self._ended = False
        self._header: tuple[bytearray, bytearray] = bytearray(), bytearray()
        self._disposition = b""
        self._name: str | None = None  # of the file that is being read
        self._pieces: list[bytes] = []
        self._size = 0
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._keep,
            "on_part_end": self._close,
            "on_end": self._end,
        }
        self._parser = MultipartParser(boundary, callbacks)

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise HTTPException(400, f"The form is damaged. {_HOW}.") from None

    def finish(self) -> list[Upload]:
        if not self._ended:
            raise HTTPException(400, f"The form ends before its last part does. {_HOW}.")
        if not self._files:
            raise HTTPException(422, f"The form has no field {FIELD}. {_HOW}.")
        return self._files

    def _begin(self) -> None:
        self._n_parts += 1
        if self._n_parts > self._limits.max_files + _FURTHER_FIELDS:
            self._refuse_many()
        self._disposition, self._name = b"", None

    def _end_header(self) -> None:
        field, value = self._header
        if field.lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = bytearray(), bytearray()

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != FIELD.encode():
            return
        if len(self._files) == self._limits.max_files:
            self._refuse_many()
        self._name = clean_name(options.get(b"filename", b"").decode("utf-8", "replace"))

    def _keep(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            return
        self._size += end - start
        if self._size > self._limits.max_file_bytes:
            most = _files.size_text(self._limits.max_file_bytes)
            raise HTTPException(413, f"A file is over {most}; at most that is read of each.")
        self._pieces.append(data[start:end])

    def _close(self) -> None:
        if self._name is not None:
            self._files.append(Upload(self._name, b"".join(self._pieces)))
        self._name, self._pieces, self._size = None, [], 0

    def _end(self) -> None:
        self._ended = True

    def _refuse_many(self) -> NoReturn:
        raise HTTPException(413, f"The form holds over {self._limits.max_files} files; send them in several requests.")
