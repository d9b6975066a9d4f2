"""What the server's answers look like on the wire: shapes for the OpenAPI description, and its page for people.

Owns names and types of JSON answers and the text that describes them. Knows nothing of how an answer is found.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from pneumoscope._uploads import FIELD
from pneumoscope.specs import RESEARCH_USE

Layer = Literal["overlay", "evidence", "image"]
"""Pictures that ``/evidence`` can give."""


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Problem(_Shape):
    """Why a request was not answered."""

    detail: str = Field(description="One sentence for a person.")


class Model(_Shape):
    """Which model answered."""

    name: str
    title: str
    sha256: str = Field(description="Of model.onnx.")
    size_px: int = Field(description="Side of the picture that the network sees.")
    note: str = Field(description="What must stand beside every answer; may be empty.")


class Result(_Shape):
    """What the model says of one file."""

    file: str = Field(description="The uploaded name without folders and control characters. Show it as text only.")
    score: float | None = Field(description="The network's, from 0 to 1; null where the file could not be read.")
    probability: float | None = Field(description="Calibrated; null where the model has no calibration.")
    call: Literal["NORMAL", "PNEUMONIA"] | None = Field(description="PNEUMONIA where score > threshold.")
    operating_point: str
    threshold: float
    assessable: bool | None = Field(description="Whether the image is like the training images; null: not known.")
    reason: str = Field(description="Why it is not assessable or could not be read, and what else to know.")


class Timing(_Shape):
    """Milliseconds."""

    read: float = Field(description="Until the request had come in whole.")
    answer: float = Field(description="Decoding and the network, waiting included, of the slowest image.")
    total: float


class Prediction(_Shape):
    """Answers in the order of the files."""

    model: Model
    results: list[Result]
    timing_ms: Timing
    notice: str


class Unread(Prediction):
    """As Prediction, where no file could be read."""

    detail: str


class Health(_Shape):
    """The process is alive."""

    status: Literal["ok"]


class Readiness(_Shape):
    """Whether images would be taken now."""

    ready: bool
    waiting: int = Field(description="Images that are being worked on.")


Responses = dict[int | str, dict[str, Any]]
"""What FastAPI takes as the ``responses`` of a route."""

UNREAD: Final[Responses] = {422: {"model": Unread | Problem, "description": "No file, or none that can be read."}}
NOT_READY: Final[Responses] = {503: {"model": Readiness, "description": "The server is full."}}
PICTURE: Final[Responses] = {
    200: {
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        "description": "A PNG.",
        "headers": {
            "X-Score": {"schema": {"type": "number"}, "description": "The score."},
            "X-Call": {"schema": {"type": "string"}, "description": "NORMAL or PNEUMONIA."},
            "X-Model": {"schema": {"type": "string"}, "description": "Which model answered: sha256 of model.onnx."},
        },
    }
}
_REFUSALS: Final = {
    400: "The form is damaged.",
    401: "The API key is missing or wrong.",
    403: "Another host's or site's page asked.",
    408: "The request came too slowly.",
    413: "Too many bytes or files.",
    415: "The request is no multipart form.",
    422: "Not one file, one that cannot be read, or a wrong parameter.",
    503: "The server is full; Retry-After says when to ask again.",
}


def problems(*statuses: int, further: Responses | None = None) -> Responses:
    """Return what a route's refusals look like, and `further` answers."""
    refused: Responses = {status: {"model": Problem, "description": _REFUSALS[status]} for status in statuses}
    return refused | (further or {})


FORM: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {
                        FIELD: {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                            "description": "JPEG, PNG or DICOM.",
                        }
                    },
                }
            }
        },
    }
}
"""``openapi_extra`` of a route that takes images."""


def page_of(description: Mapping[str, Any]) -> str:
    """Return an HTML page that lists what an OpenAPI description describes; needs no script and no other site."""
    rows = []
    for path, methods in description["paths"].items():
        for method, route in methods.items():
            answers = "".join(
                f"<li>{html.escape(status)}: {html.escape(answer.get('description', ''))}</li>"
                for status, answer in route["responses"].items()
            )
            rows.append(
                f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>"
                f"<p>{html.escape(route.get('description') or route.get('summary', ''))}</p><ul>{answers}</ul>"
            )
    title = html.escape(description["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title></head><body>'
        f"<h1>{title}</h1><p><strong>{RESEARCH_USE}.</strong> The whole description, for programs: "
        f'<a href="/openapi.json">openapi.json</a>.</p>{"".join(rows)}</body></html>'
    )
