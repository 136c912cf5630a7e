"""Who gets a place, who waits, and who is refused."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from cloud_service.admission import AdmissionQueue
from shared.errors import CloudOverloaded


class Crowd:
    """Streams that want a place, by name; `served` is the order in which they got one."""

    def __init__(self, queue: AdmissionQueue) -> None:
        self.queue = queue
        self.served: list[str] = []
        self.leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def comes(self, *names: str) -> None:
        """The first letter of a name is the tenant's."""
        for name in names:
            self.leave[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._stay(name))
            await asyncio.sleep(0)

    async def leaves(self, name: str) -> None:
        self.leave[name].set()
        await self.tasks[name]
        for _ in range(4):
            await asyncio.sleep(0)

    async def _stay(self, name: str) -> None:
        async with self.queue.place(name[0]):
            self.served.append(name)
            await self.leave[name].wait()

    async def end(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


def places(num: int, *, max_waiting: int = 9, max_wait_s: float = 30.0) -> AdmissionQueue:
    return AdmissionQueue(num, max_waiting=max_waiting, max_wait_s=max_wait_s)


async def test_streams_of_one_tenant_are_served_in_the_order_in_which_they_came() -> None:
    crowd = Crowd(places(1))
    await crowd.comes("a1", "a2", "a3", "a4")
    assert crowd.served == ["a1"]
    for name in ("a1", "a2", "a3"):
        await crowd.leaves(name)
    assert crowd.served == ["a1", "a2", "a3", "a4"]
    await crowd.end()


async def test_the_tenant_that_holds_fewest_places_goes_first() -> None:
    crowd = Crowd(places(2))
    await crowd.comes("a1", "a2", "a3", "a4", "b1", "b2")
    await crowd.leaves("a1")
    assert crowd.served[-1] == "b1"
    await crowd.leaves("a2")
    assert crowd.served[-1] == "a3", "b holds one by now, a none"
    await crowd.end()


async def test_a_full_queue_refuses_the_newest_of_whoever_fills_it_most() -> None:
    crowd = Crowd(places(1, max_waiting=3))
    await crowd.comes("a1", "a2", "a3", "a4", "b1")
    with pytest.raises(CloudOverloaded, match="3 streams wait already") as caught:
        await crowd.tasks["a4"]
    assert caught.value.retry_after_s is not None
    await crowd.comes("a5")
    with pytest.raises(CloudOverloaded):
        await crowd.tasks["a5"]
    assert not crowd.tasks["b1"].done()
    await crowd.end()


async def test_a_stream_waits_no_longer_than_it_is_told() -> None:
    queue = places(1, max_wait_s=0.05)
    async with queue.place("a"):
        with pytest.raises(CloudOverloaded, match=r"within 0\.05 s"):
            async with queue.place("b"):
                raise AssertionError("there was no place")
        assert queue.num_waiting == 0


async def test_who_gives_up_waiting_leaves_no_trace() -> None:
    crowd = Crowd(places(1))
    await crowd.comes("a1", "b1", "c1")
    crowd.tasks["b1"].cancel()
    await asyncio.gather(crowd.tasks["b1"], return_exceptions=True)
    await crowd.leaves("a1")
    assert crowd.served == ["a1", "c1"]
    await crowd.end()


async def test_a_place_given_in_the_moment_of_giving_up_goes_to_the_next() -> None:
    crowd = Crowd(places(1))
    await crowd.comes("a1", "b1", "c1")
    crowd.leave["a1"].set()
    while "b1" not in crowd.served and crowd.queue.num_waiting == 2:  # noqa: ASYNC110 - the very moment
        await asyncio.sleep(0)
    crowd.tasks["b1"].cancel()
    await asyncio.gather(crowd.tasks["b1"], return_exceptions=True)
    for _ in range(4):
        await asyncio.sleep(0)
    assert crowd.served[-1] == "c1"
    await crowd.end()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(crowd.queue.place("d"))  # and nothing is lost
