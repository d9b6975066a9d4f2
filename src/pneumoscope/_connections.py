"""Connections that are not kept by those who send nothing: uvicorn's, with a clock.

Owns how long a connection may stay without a whole request, and how many there may be. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

IDLE_S: Final = 20.0
"""Seconds for a request's head, and for what still comes of a body that was refused."""

MOST: Final = 800
"""Connections at a time; further ones are closed at once, so that the process never runs out of file handles."""


class Connection(H11Protocol):
    """uvicorn waits forever for the first line of a request, and for the rest of a body that nobody reads."""

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock, or close where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > MOST:
            transport.close()
        self._wind()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        if self._clock is not None:
            self._clock.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Start the clock for the next request."""
        super().on_response_complete()
        self._wind()

    def _wind(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
        self._clock = self.loop.call_later(IDLE_S, self._look, self.cycle)

    def _look(self, cycle: RequestResponseCycle | None) -> None:
        current: Any = self.cycle
        if current is cycle and (cycle is None or cycle.response_complete):
            self.transport.close()
