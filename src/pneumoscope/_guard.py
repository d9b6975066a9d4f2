"""What every request passes on its way in and out: who may ask, what browsers may do, and the last resort.

Owns the API key, the check of Host and Origin, the headers of every answer, and the answer to an unforeseen error.
Knows nothing of what is asked.
"""

from __future__ import annotations

import hmac
import json
import logging
import time
import traceback
from collections.abc import Callable, Collection
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pneumoscope._uploads import RETRY_AFTER

LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
"""Names that this machine has for itself; a page of another name that resolves to it is not ours."""

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""On every answer."""

_log = logging.getLogger("pneumoscope.serving")


class Guard:
    """An ASGI application around another.

    Parameters
    ----------
    app : ASGI application
        What is guarded.
    api_key : str, optional
        Wanted of every request but those `is_open` lets through.
    is_open : callable
        Tells by its path whether a request needs no key.
    hosts : collection of str
        Names that the Host header may have, without port; any where empty.
    seen : callable, optional
        Told the scope, the status and the seconds of every request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        is_open: Callable[[str], bool],
        hosts: Collection[str],
        seen: Callable[[Scope, int, float], None] | None = None,
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._is_open = is_open
        self._hosts = frozenset(hosts)
        self._seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            if refused := self._refusal(scope):
                await _answer(sending, *refused)
            else:
                await self._app(scope, receive, sending)
        except ClientDisconnect:
            pass  # nobody is left to answer
        except Exception as error:  # the last resort: no request may show or log what an error says
            _log.error("An unforeseen %s at %s", type(error).__name__, _place(error))
            if status:
                raise ConnectionAbortedError("the answer was cut off") from None
            if isinstance(error, MemoryError):
                await _answer(sending, 503, "The server is out of memory; send it again later.", RETRY_AFTER)
            else:
                await _answer(sending, 500, "The server failed at this request; its log says where.")
        finally:
            if self._seen is not None:
                self._seen(scope, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> tuple[int, str] | tuple[int, str, dict[str, str]] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts and _without_port(host) not in self._hosts:
            return 403, f"This server answers to {', '.join(sorted(self._hosts))} only; use one of them in the address."
        origin = headers.get("origin")
        if origin is not None and scope["method"] not in ("GET", "HEAD") and not _same(origin, host):
            return 403, "The request comes from a page of another site; open this server's own page."
        if self._key is None or self._is_open(scope["path"]):
            return None
        given = headers.get("x-api-key", "")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if not given and scheme.lower() == "bearer":
            given = token.strip()
        if hmac.compare_digest(given.encode("utf-8", "replace"), self._key):
            return None
        return 401, "The API key is missing or wrong; send it in the header X-API-Key.", {"WWW-Authenticate": "Bearer"}


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _same(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower() != ""
    except ValueError:
        return False


def _place(error: BaseException) -> str:
    """Return where an error came from: code only, never what it says, which may quote a file."""
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames[-4:]))


async def _answer(send: Send, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
    body = json.dumps({"detail": detail}).encode()
    further = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    start = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *further]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
