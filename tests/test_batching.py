"""Batches: alone at once, together when several come, what came meanwhile next, errors to those concerned."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from pneumoscope._batching import Batcher

FOREVER_MS = 600_000.0


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(scene(), 30)

    asyncio.run(limited())


class Work:
    """Doubles numbers; keeps what it was called with; waits at a gate where one is closed."""

    def __init__(self, *, closed: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.began = threading.Event()
        self.gate = threading.Event()
        if not closed:
            self.gate.set()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.began.set()
        assert self.gate.wait(30)
        if 13 in items:
            raise ValueError("13")
        return [2 * item for item in items]


def test_one_item_alone_is_run_at_once_whatever_the_delay() -> None:
    async def scene() -> None:
        work = Work()
        batcher = Batcher(work, batch=4, delay_ms=FOREVER_MS)
        with batcher.coming():
            await asyncio.sleep(0)
        assert await batcher.submit(1) == 2
        assert work.batches == [[1]]

    run(scene)


def test_what_comes_while_the_worker_is_busy_is_run_together_in_order_and_no_more_than_a_batch() -> None:
    async def scene() -> None:
        work = Work(closed=True)
        batcher = Batcher(work, batch=4, delay_ms=FOREVER_MS)
        tasks = [asyncio.ensure_future(batcher.submit(number)) for number in range(7)]
        await asyncio.to_thread(work.began.wait, 30)
        work.gate.set()
        assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8, 10, 12]
        assert work.batches == [[0], [1, 2, 3, 4], [5, 6]]

    run(scene)


def test_an_idle_worker_waits_for_those_that_are_announced() -> None:
    async def scene() -> None:
        work = Work()
        batcher = Batcher(work, batch=4, delay_ms=FOREVER_MS)
        decoded = asyncio.Event()

        async def late(number: int) -> int:
            with batcher.coming():
                await decoded.wait()
            return await batcher.submit(number)

        others = [asyncio.ensure_future(late(number)) for number in (2, 3)]
        await asyncio.sleep(0)
        first = asyncio.ensure_future(batcher.submit(1))
        await asyncio.sleep(0)
        assert work.batches == []
        decoded.set()
        assert await asyncio.gather(first, *others) == [2, 4, 6]
        assert work.batches == [[1, 2, 3]]

    run(scene)


def test_an_announced_item_that_fails_keeps_nobody_waiting() -> None:
    async def scene() -> None:
        batcher = Batcher(Work(), batch=4, delay_ms=FOREVER_MS)
        broken = asyncio.Event()

        async def never() -> None:
            with batcher.coming():
                await broken.wait()
                raise KeyError

        other = asyncio.ensure_future(never())
        await asyncio.sleep(0)
        waiting = asyncio.ensure_future(batcher.submit(1))
        await asyncio.sleep(0)
        broken.set()
        assert await waiting == 2
        with pytest.raises(KeyError):
            await other

    run(scene)


def test_the_wait_for_announced_items_ends() -> None:
    async def scene() -> None:
        batcher = Batcher(Work(), batch=4, delay_ms=1)
        with batcher.coming():
            assert await batcher.submit(1) == 2

    run(scene)


def test_a_full_batch_waits_for_nobody() -> None:
    async def scene() -> None:
        work = Work()
        batcher = Batcher(work, batch=2, delay_ms=FOREVER_MS)
        with batcher.coming():
            assert list(await asyncio.gather(batcher.submit(1), batcher.submit(2))) == [2, 4]
        assert work.batches == [[1, 2]]

    run(scene)


def test_an_error_reaches_its_batch_and_the_next_one_is_run() -> None:
    async def scene() -> None:
        work = Work(closed=True)
        batcher = Batcher(work, batch=2, delay_ms=0)
        tasks = [asyncio.ensure_future(batcher.submit(number)) for number in (1, 13, 2, 3)]
        await asyncio.to_thread(work.began.wait, 30)
        work.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[0] == 2
        assert isinstance(results[1], ValueError)
        assert isinstance(results[2], ValueError)
        assert results[3] == 6

    run(scene)


def test_an_item_whose_request_is_gone_is_not_run() -> None:
    async def scene() -> None:
        work = Work(closed=True)
        lengths: list[int] = []
        batcher = Batcher(work, batch=4, delay_ms=0, seen=lengths.append)
        tasks = [asyncio.ensure_future(batcher.submit(number)) for number in (1, 2, 3)]
        await asyncio.to_thread(work.began.wait, 30)
        tasks[1].cancel()
        await asyncio.sleep(0)
        work.gate.set()
        assert await tasks[0] == 2
        assert await tasks[2] == 6
        assert work.batches == [[1], [3]]
        assert lengths == [1, 1]
        batcher.close()

    run(scene)


def test_a_second_worker_helps_only_where_enough_wait() -> None:
    async def scene() -> None:
        work = Work(closed=True)
        batcher = Batcher(work, batch=4, delay_ms=0, workers=2, enough=3)
        tasks = [asyncio.ensure_future(batcher.submit(number)) for number in (1, 2, 3)]
        await asyncio.to_thread(work.began.wait, 30)
        assert work.batches == [[1]]
        work.began.clear()
        tasks += [asyncio.ensure_future(batcher.submit(number)) for number in (4, 5)]
        await asyncio.to_thread(work.began.wait, 30)
        assert work.batches == [[1], [2, 3, 4]]
        work.gate.set()
        assert list(await asyncio.gather(*tasks)) == [2, 4, 6, 8, 10]
        assert work.batches == [[1], [2, 3, 4], [5]]

    run(scene)
