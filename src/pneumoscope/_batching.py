"""Joins what concurrent requests bring into batches: one worker, which takes what has come while it was busy.

Owns the queue in front of the network and when a batch is run. Knows nothing of images, networks or HTTP. Lives in one
event loop; the work itself runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Run work on batches of what is submitted one by one.

    An item that comes alone is worked on at once. Where others were announced (`coming`), an idle worker waits for
    them, but not longer than the delay. A worker that was busy takes at once what has come meanwhile.

    Parameters
    ----------
    work : callable
        Takes a list of items and returns as many results, in their order. Called in a thread, never twice at a time.
    batch : int
        Items in a call, at most.
    delay_ms : float
        Longest wait of an idle worker for items that are coming.
    seen : callable, optional
        Told the length of each batch, in the event loop.
    """

    def __init__(
        self,
        work: Callable[[list[T]], Sequence[R]],
        *,
        batch: int,
        delay_ms: float,
        seen: Callable[[int], None] | None = None,
    ) -> None:
        self._work = work
        self._batch = batch
        self._delay_s = delay_ms / 1000
        self._seen = seen
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._queue: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._running = False
        self._timer: asyncio.TimerHandle | None = None
        self._coming = 0

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Announce an item that will be submitted right after, without waiting for anything in between."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1
            # soon, so that the item itself is in the queue by then; and where it failed, others wait no longer
            asyncio.get_running_loop().call_soon(self._start)

    async def submit(self, item: T) -> R:
        """Return the result for one item.

        Parameters
        ----------
        item : object
            For the work.

        Returns
        -------
        object
            Its result. What the work raises is raised to all of its batch.
        """
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._queue.append((item, future))
        self._start()
        return await future

    def close(self) -> None:
        """End the thread, once it has done what it does."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        """Run a batch now, or see to it that one is run later."""
        if self._running or not self._queue:
            return
        if self._coming and len(self._queue) < self._batch:
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(self._delay_s, self._run)
            return
        self._run()

    def _run(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        taken: list[tuple[T, asyncio.Future[R]]] = []
        while self._queue and len(taken) < self._batch:
            item, future = self._queue.popleft()
            if not future.done():  # its request may be gone
                taken.append((item, future))
        if not taken:
            return
        self._running = True
        if self._seen is not None:
            self._seen(len(taken))
        items, futures = [item for item, _ in taken], [future for _, future in taken]
        job = asyncio.get_running_loop().run_in_executor(self._thread, self._work, items)
        job.add_done_callback(lambda done: self._finish(futures, done))

    def _finish(self, futures: list[asyncio.Future[R]], done: asyncio.Future[Sequence[R]]) -> None:
        self._running = False
        self._run()  # at once: what came meanwhile has waited
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        results: Sequence[R] = () if error is not None else done.result()
        for at, future in enumerate(futures):
            if future.done():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(results[at])
