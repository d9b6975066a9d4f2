"""What the server counts, for Prometheus; a registry of its own for each application.

Owns the names of counters and their labels, which are few whatever is asked. Counts calls, never scores with names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Gauges:
    """Counters and timings of one application.

    Parameters
    ----------
    waiting, held : callable
        Give the images that are being worked on and the bytes that are held, when asked.
    """

    def __init__(self, *, waiting: Callable[[], float], held: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "pneumoscope_requests", "Requests answered.", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "pneumoscope_request_seconds", "From the first byte to the answer.", ["path"], registry=self.registry
        )
        self._images = Counter("pneumoscope_images", "Images by call, or unreadable.", ["call"], registry=self.registry)
        self._batches = Histogram(
            "pneumoscope_batch_images", "Images in a batch.", buckets=(1, 2, 4, 8, 16, 32), registry=self.registry
        )
        Gauge("pneumoscope_waiting_images", "Images being worked on.", registry=self.registry).set_function(waiting)
        Gauge("pneumoscope_held_bytes", "Bytes of uploads in memory.", registry=self.registry).set_function(held)

    def request(self, scope: Mapping[str, Any], status: int, seconds: float) -> None:
        """Count a request; its path only where a route has it, so that nobody can add names at will."""
        plain = scope["path"] if "endpoint" in scope else "other"  # a route without a record of itself has one path
        path = getattr(scope.get("route"), "path", plain)
        self._requests.labels(path, str(status or "gone")).inc()
        self._seconds.labels(path).observe(seconds)

    def image(self, call: str) -> None:
        """Count an image."""
        self._images.labels(call).inc()

    def batch(self, length: int) -> None:
        """Count a batch."""
        self._batches.observe(length)
