"""A Bundle as a service: images in over HTTP, scores and pictures of evidence out, and the page for people.

Owns the addresses, what each answers, and the process that listens. Limits hold while a request comes in (`_uploads`),
images of concurrent requests share the network's batches (`_batching`). Stores nothing, fetches nothing, loads no
Keras. Knows nothing of runs or training.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Route

from pneumoscope import _files, _pictures, _wire, dicom, images
from pneumoscope._batching import Batcher
from pneumoscope._connections import Connection
from pneumoscope._gauges import Gauges
from pneumoscope._guard import LOOPBACK, Guard
from pneumoscope._uploads import FIELD, RETRY_AFTER, Held, Limits, Upload, read_files
from pneumoscope.bundle import Bundle
from pneumoscope.errors import ImageError, UsageError
from pneumoscope.predictor import Answer, Picture, Predictor
from pneumoscope.specs import RESEARCH_USE

__all__ = ["Limits", "build", "serve"]

PAGE: Final = Path(__file__).parent / "page"
"""The files of the page, served as they are."""

_KINDS: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
_OPEN: Final = ("/", "/health", "/docs", "/openapi.json")  # they say nothing that is not in the package itself
_MOST_DECODERS: Final = 8
_SMALL_BYTES: Final = 128 * 1024  # with up to so many pixels as follow, decoded in a few milliseconds
_SMALL_PIXELS: Final = 1_000_000
_ENOUGH: Final = 4  # images that wait before a second batch is begun: alone they cost 1.5 times as much each
_ERRORS: Final = {404: "There is nothing at this address; /docs lists what there is.", 405: "Use another method."}

_log = logging.getLogger("pneumoscope.serving")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class _Outcome:
    """What became of one upload."""

    name: str
    picture: Picture | None
    answer: Answer | None
    reason: str
    ms: float


_Found = tuple[Picture, Answer] | ImageError | None


class _Service:
    """The model at work: decodes in a few threads, runs the network in one, and counts what waits."""

    def __init__(self, bundle: Bundle, limits: Limits, threads: int) -> None:
        # Several batches at a time with few threads each: threads that wait for one another cost a third of the rate
        # on a busy machine, and those that spin while they wait take the cores that decode and answer.
        cores = threads or os.cpu_count() or 1
        each = isqrt(cores)
        self.predictor: Predictor = bundle.predictor(threads=each, spinning=False)
        self.bundle, self.limits = bundle, limits
        self.held = Held(limits.max_held_bytes)
        self.gauges = Gauges(waiting=lambda: self.waiting, held=lambda: self.held.used)
        self.waiting = 0
        self._decoders = ThreadPoolExecutor(
            max(2, min(os.cpu_count() or 1, _MOST_DECODERS)), thread_name_prefix="decoder"
        )
        self._one_large = asyncio.Semaphore(1)
        self._batcher: Batcher[bytes | Picture, _Found] = Batcher(
            self._work,
            batch=limits.batch_images,
            delay_ms=limits.delay_ms,
            workers=cores // each,
            enough=_ENOUGH,
            seen=self.gauges.batch,
        )
        side = self.predictor.description.size_px
        self.predictor.network(np.zeros((1, side, side), dtype=np.uint8))  # warm, and known to work

    def close(self) -> None:
        self._batcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def require_room(self) -> None:
        if self.waiting >= self.limits.max_waiting:
            raise HTTPException(503, "As many images wait as the server takes; send it again later.", RETRY_AFTER)

    async def in_thread(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, lambda: function(*args, **kwargs))

    async def score(self, uploads: list[Upload]) -> list[_Outcome]:
        """Answer files in their order; so many at a time that one large request leaves room for others."""
        self.require_room()
        turn = asyncio.Semaphore(self.limits.batch_images)

        async def one(upload: Upload) -> _Outcome:
            async with turn:
                return await self._score(upload)

        self.waiting += len(uploads)
        try:
            if len(uploads) == 1:
                return [await self._score(uploads[0])]
            return list(await asyncio.gather(*map(one, uploads)))
        finally:
            self.waiting -= len(uploads)

    async def _score(self, upload: Upload) -> _Outcome:
        started = time.perf_counter()
        found: _Found = None
        if len(upload.data) <= _SMALL_BYTES and not dicom.is_dicom(upload.data):
            found = await self._batcher.submit(upload.data)
        try:
            if isinstance(found, ImageError):
                raise found
            if found is None:
                with self._batcher.coming():
                    picture = await self.decoded(self.predictor.read, upload.data)
                found = await self._batcher.submit(picture)
        except ImageError as error:
            self.gauges.image("unreadable")
            return _Outcome(upload.name, None, None, str(error), _ms_since(started))
        assert isinstance(found, tuple), "a picture gets an answer"
        picture, answer = found
        self.gauges.image(answer.call)
        return _Outcome(upload.name, picture, answer, answer.reason, _ms_since(started))

    def _work(self, items: list[bytes | Picture]) -> list[_Found]:
        """Answer a batch; what is quickly decoded comes as bytes, because each change of threads costs time too.

        None where a picture proves too large to keep its batch waiting.
        """
        found: list[_Found | Picture] = [item if isinstance(item, Picture) else self._quickly(item) for item in items]
        answers = iter(self.predictor.answer([item for item in found if isinstance(item, Picture)]))
        return [(item, next(answers)) if isinstance(item, Picture) else item for item in found]

    def _quickly(self, data: bytes) -> Picture | ImageError | None:
        try:
            header = images.read_header(data)
            large = header.width_px * header.height_px > min(_SMALL_PIXELS, self.limits.large_pixels)
            return None if large else self.predictor.read(data, header=header)
        except ImageError as error:
            return error
        except Exception:  # told apart where it is decoded by itself
            return None

    async def decoded(self, decode: Callable[..., R], data: bytes) -> R:
        """Decode in a thread; large pictures one at a time. `decode` takes the data and, by name, their header."""

        def attempt() -> R | images.Header:
            header = images.read_header(data)
            if header.width_px * header.height_px > self.limits.large_pixels:
                return header
            return decode(data, header=header)

        try:
            found = await self.in_thread(attempt)
            if not isinstance(found, images.Header):
                return found
            async with self._one_large:
                return await self.in_thread(decode, data, header=found)
        except ImageError:
            raise
        except MemoryError as error:
            raise ImageError("too large", "The picture needs more memory than the server has.") from error
        except Exception as error:  # foreign bytes meet many libraries; what one says may quote the file
            _log.error("A decoder failed with %s", type(error).__name__)
            raise ImageError("damaged", "The file could not be decoded.") from None


def build(
    bundle: Bundle,
    *,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    api_key: str | None = None,
    threads: int = 0,
    hosts: Collection[str] = (),
) -> FastAPI:
    """Make the application that serves a bundle.

    Parameters
    ----------
    bundle : Bundle
        The model.
    limits : Limits
        What it takes on at most.
    api_key : str, optional
        Wanted in the header ``X-API-Key``, or ``Authorization: Bearer``, of every request but those for ``/health``,
        the page and the documentation.
    threads : int
        CPU threads of the network; 0 takes all cores.
    hosts : collection of str
        Names that requests may have in their Host header; any where empty.

    Returns
    -------
    FastAPI

    Raises
    ------
    UsageError
        For an API key that is empty, or holds more than visible ASCII and spaces.
    StoreError
        Where onnxruntime cannot load the bundle's network.
    """
    if api_key is not None:
        api_key = api_key.strip()  # a header carries no white space at its ends
        if not api_key:
            raise UsageError("The API key is empty and would let nobody in; give a long random one.")
        if not re.fullmatch(r"[\x20-\x7e]+", api_key):
            raise UsageError(
                "The API key holds a character that is no visible ASCII, which a header may not carry as it is; give "
                "a long random one of letters and digits."
            )
    service = _Service(bundle, limits, threads)
    files = _page_files()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title=f"pneumoscope: {bundle.description.title}",
        description=f"{RESEARCH_USE}.",
        version=str(bundle.description.provenance.get("pneumoscope", "")) or "0",
        docs_url=None,  # FastAPI's pages load scripts from another site
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_errors(app)
    _add_answers(app, service)
    _add_state(app, service)
    _add_page(app, files)
    app.add_middleware(
        Guard,
        api_key=api_key,
        is_open=lambda path: path in _OPEN or path.startswith("/page/"),
        hosts=hosts,
        seen=service.gauges.request,
    )
    return app


def serve(
    bundle: Bundle,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    insecure: bool = False,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    threads: int = 0,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve a bundle until the process is asked to end.

    Parameters
    ----------
    bundle : Bundle
        The model.
    host, port : str, int
        Where to listen; port 0 takes a free one.
    api_key : str, optional
        See `build`.
    insecure : bool
        Whether to listen on other addresses than this machine's own without a key.
    limits : Limits
        What it takes on at most.
    threads : int
        CPU threads of the network; 0 takes all cores.
    on_ready : callable, optional
        Told the URL once the server listens.

    Raises
    ------
    UsageError
        Where others could reach it without a key and that was not asked for, or it cannot listen there.
    StoreError
        Where onnxruntime cannot load the bundle's network.
    """
    local = _is_loopback(host)
    if not local and api_key is None and not insecure:
        raise UsageError(
            f"Listening on {host} lets everyone who can reach this machine send images and read answers; set an API "
            "key, or pass --insecure if that is what you want, or listen on 127.0.0.1."
        )
    app = build(bundle, limits=limits, api_key=api_key, threads=threads, hosts=(*LOOPBACK, host) if local else ())
    with _listening(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            app, http=Connection, ws="none", lifespan="on", log_level="warning", access_log=False,
            server_header=False, proxy_headers=False, timeout_graceful_shutdown=10,
        )  # fmt: skip
        try:
            _Server(config, url, on_ready).run(sockets=[listener])
        except KeyboardInterrupt:
            return  # that is how it is ended; requests under way were answered


class _Server(uvicorn.Server):
    """uvicorn's, which tells when it listens."""

    def __init__(self, config: uvicorn.Config, url: str, on_ready: Callable[[str], None] | None) -> None:
        super().__init__(config)
        self._url, self._on_ready = url, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and self._on_ready is not None:
            self._on_ready(self._url)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"The server cannot listen on {host}, port {port} ({reason}); choose another with --port, 0 takes a free "
            "one."
        ) from error
    return listener


# --- Addresses --------------------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _json({"detail": _ERRORS.get(error.status_code, error.detail)}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return _json({"detail": f"The parameter {first['loc'][-1]} does not fit: {first['msg']}."}, 422)


def _add_answers(app: FastAPI, service: _Service) -> None:
    refusals = (400, 401, 403, 408, 413, 415, 503)

    @app.post(
        "/predict",
        summary="Score images",
        response_model=_wire.Prediction,
        responses=_wire.problems(*refusals, further=_wire.UNREAD),
        openapi_extra=_wire.FORM,
    )
    async def predict(request: Request) -> Response:
        """Score one image or many. A file that cannot be read gets its own result and keeps no other from its own."""
        started = time.perf_counter()
        service.require_room()
        with service.held.share() as share:
            uploads = await read_files(request.stream(), request.headers, limits=service.limits, share=share)
            read_ms = _ms_since(started)
            outcomes = await service.score(uploads)
        content = {
            "model": _model(service),
            "results": [_result(service.predictor, outcome) for outcome in outcomes],
            "timing_ms": {
                "read": read_ms,
                "answer": max(outcome.ms for outcome in outcomes),
                "total": _ms_since(started),
            },
            "notice": RESEARCH_USE,
        }
        if all(outcome.answer is None for outcome in outcomes):
            return _json({"detail": "No file could be read; each result says why.", **content}, 422)
        return _json(content)

    # FastAPI's route is for the description; its way to the function costs 0.2 to 0.4 ms, a tenth of an answer
    app.router.routes.insert(0, Route("/predict", predict, methods=["POST"], include_in_schema=False))

    @app.post(
        "/evidence",
        summary="Show evidence",
        response_class=Response,
        responses=_wire.problems(*refusals, 422, further=_wire.PICTURE),
        openapi_extra=_wire.FORM,
    )
    async def evidence(request: Request, layer: _wire.Layer = "overlay") -> Response:
        """Give a picture for one image: its evidence laid over it, the evidence alone, or the image alone."""
        service.require_room()
        with service.held.share() as share:
            uploads = await read_files(request.stream(), request.headers, limits=service.limits, share=share)
            if len(uploads) != 1:
                raise HTTPException(422, f"The form holds {len(uploads)} files in the field {FIELD}; send one.")
            outcome = (await service.score(uploads))[0]
            if outcome.picture is None or outcome.answer is None:
                raise HTTPException(422, outcome.reason)
            if layer == "image":
                try:
                    png = await service.decoded(_pictures.grey_png, uploads[0].data)
                except ImageError as error:
                    raise HTTPException(422, str(error)) from error
            else:
                draw = _pictures.overlay_png if layer == "overlay" else _pictures.evidence_png
                png = await service.in_thread(
                    draw, outcome.picture.pixels, outcome.answer.evidence, service.predictor.description
                )
        headers = {
            "X-Score": repr(outcome.answer.score),
            "X-Call": outcome.answer.call,
            "X-Model": _model(service)["sha256"],
        }
        return Response(png, media_type="image/png", headers=headers)


def _add_state(app: FastAPI, service: _Service) -> None:
    description = _files.jsonable(_description(service))

    @app.get("/health", summary="Is the process alive", response_model=_wire.Health)
    async def health() -> Response:
        """Answer always, also under load."""
        return _json({"status": "ok"})

    @app.get(
        "/ready",
        summary="Would images be taken now",
        response_model=_wire.Readiness,
        responses=_wire.problems(401, 403, further=_wire.NOT_READY),
    )
    async def ready() -> Response:
        """Say whether images would be taken now."""
        room = service.waiting < service.limits.max_waiting
        return _json({"ready": room, "waiting": service.waiting}, 200 if room else 503, None if room else RETRY_AFTER)

    @app.get("/model", summary="What the model is", response_model=dict[str, Any], responses=_wire.problems(401, 403))
    async def model() -> Response:
        """Describe the model: intended use, operating points, measured performance, where it comes from."""
        return _json(description)

    @app.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=PlainTextResponse,
        responses=_wire.problems(401, 403),
    )
    async def metrics() -> Response:
        """Give counters and timings in the format of Prometheus."""
        return Response(generate_latest(service.gauges.registry), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI, files: dict[str, tuple[bytes, str]]) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        if "index.html" not in files:
            return PlainTextResponse(f"{RESEARCH_USE}. This server has no page; /docs says how programs ask it.")
        return Response(files["index.html"][0], media_type=files["index.html"][1])

    @app.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in files:  # a name is looked up, never made a path
            raise HTTPException(404)
        return Response(files[name][0], media_type=files[name][1])

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(_wire.page_of(app.openapi()))


def _page_files() -> dict[str, tuple[bytes, str]]:
    if not PAGE.is_dir():
        return {}
    found = sorted(path for path in PAGE.iterdir() if path.suffix in _KINDS and path.is_file())
    return {path.name: (path.read_bytes(), _KINDS[path.suffix]) for path in found}


# --- What answers hold ------------------------------------------------------------------------------------------------


def _model(service: _Service) -> dict[str, Any]:
    known = service.bundle.description
    return {
        "name": known.model,
        "title": known.title,
        "sha256": str(service.bundle.content.get("sha256", "")),
        "size_px": known.size_px,
        "note": known.note,
    }


def _result(predictor: Predictor, outcome: _Outcome) -> dict[str, Any]:
    answer, (point, threshold) = outcome.answer, predictor.description.point
    return {
        "file": outcome.name,
        "score": None if answer is None else answer.score,
        "probability": None if answer is None else answer.probability,
        "call": None if answer is None else answer.call,
        "operating_point": point,
        "threshold": threshold,
        "assessable": False if answer is None else answer.assessable,
        "reason": outcome.reason,
    }


def _description(service: _Service) -> dict[str, Any]:
    """All of the description but the arrays that only the server needs."""
    known = service.bundle.description
    content = replace(known, familiarity=None).as_dict()
    del content["assessability"]
    point, threshold = known.point
    usual = known.familiarity
    return {
        **_model(service),
        **content,
        "operating_point": {"name": point, "threshold": threshold},
        "assessed": usual is not None,
        "usual_distance": None if usual is None else usual.threshold,
        "notice": RESEARCH_USE,
    }


def _json(content: Any, status: int = 200, headers: Any = None) -> JSONResponse:
    return JSONResponse(content, status, headers=headers)


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
