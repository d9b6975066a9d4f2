"""Joins what concurrent requests bring into batches: a few workers, which take what has come while they were busy.

Owns the queue in front of the network and when a batch is run. Knows nothing of images, networks or HTTP. Lives in one
event loop; the work itself runs in threads of its own.
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
    them, but not longer than the delay. A worker that was busy takes at once what has come meanwhile. Further workers
    help only where `enough` items wait, because a batch costs less than its items one by one.

    Parameters
    ----------
    work : callable
        Takes a list of items and returns as many results, in their order. Called in threads.
    batch : int
        Items in a call, at most.
    delay_ms : float
        Longest wait of an idle worker for items that are coming.
    workers : int
        Batches that are worked on at a time.
    enough : int
        Items that must wait before a second worker helps.
    seen : callable, optional
        Told the length of each batch, in the event loop.
    """

    def __init__(
        self,
        work: Callable[[list[T]], Sequence[R]],
        *,
        batch: int,
        delay_ms: float,
        workers: int = 1,
        enough: int = 1,
        seen: Callable[[int], None] | None = None,
    ) -> None:
        self._work = work
        self._batch = batch
        self._delay_s = delay_ms / 1000
        self._workers = workers
        self._enough = enough
        self._seen = seen
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="network")
        self._queue: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._running = 0
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
        """End the threads, once they have done what they do."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        """Run a batch now, or see to it that one is run later."""
        if not self._queue or self._running == self._workers:
            return
        if self._running:
            if len(self._queue) >= self._enough:
                self._run()
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
        self._running += 1
        if self._seen is not None:
            self._seen(len(taken))
        items, futures = [item for item, _ in taken], [future for _, future in taken]
        job = asyncio.get_running_loop().run_in_executor(self._threads, self._work, items)
        job.add_done_callback(lambda done: self._finish(futures, done))

    def _finish(self, futures: list[asyncio.Future[R]], done: asyncio.Future[Sequence[R]]) -> None:
        self._running -= 1
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
