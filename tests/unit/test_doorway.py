"""The doorway: order, width, pace, and nobody lost."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.web.doorway import Doorway, Step

_NEVER_S = 1000.0


async def _soon(*tasks: asyncio.Task[Step]) -> list[int]:
    """Which of them have their turn, once everybody has had the chance."""
    for _ in range(3 * len(tasks) + 3):
        await asyncio.sleep(0)
    return [number for number, task in enumerate(tasks) if task.done() and not task.cancelled()]


def test_so_many_at_a_time_in_their_order() -> None:
    """The next one comes when somebody has arrived, and arriving twice counts once."""

    async def play() -> None:
        doorway = Doorway(2, _NEVER_S)
        tasks = [asyncio.create_task(doorway.enter()) for _ in range(5)]
        assert [0, 1] == await _soon(*tasks)
        tasks[1].result().leave()
        tasks[1].result().leave()
        assert [0, 1, 2] == await _soon(*tasks)
        tasks[0].result().leave()
        tasks[2].result().leave()
        assert [0, 1, 2, 3, 4] == await _soon(*tasks)

    asyncio.run(play())


def test_as_many_follow_after_a_while() -> None:
    """Nobody has to wait for those who take long."""

    async def play() -> None:
        doorway = Doorway(2, 0.001)
        await asyncio.gather(*(doorway.enter() for _ in range(20)))

    asyncio.run(asyncio.wait_for(play(), 60))


def test_alone_nobody_waits() -> None:
    """Without a width."""

    async def play() -> None:
        doorway = Doorway()
        tasks = [asyncio.create_task(doorway.enter()) for _ in range(100)]
        await asyncio.sleep(0)
        assert all(task.done() for task in tasks)

    asyncio.run(play())


def test_a_late_loop_lets_everybody_in() -> None:
    """A loop that turns once in 200 ms would else let in five a second."""

    async def play() -> list[int]:
        doorway = Doorway(1, 0.01)
        tasks = [asyncio.create_task(doorway.enter()) for _ in range(100)]
        await asyncio.sleep(0)
        time.sleep(0.2)  # noqa: ASYNC251 - the loop is to be late
        return await _soon(*tasks)

    assert 100 == len(asyncio.run(play()))


@pytest.mark.parametrize("is_let_in", [False, True])
def test_who_gives_up_takes_nobodys_place(*, is_let_in: bool) -> None:
    """A client that goes while it waits, or in the moment when it is let in."""

    async def play() -> None:
        doorway = Doorway(1, _NEVER_S)
        first = await doorway.enter()
        gone, last = asyncio.create_task(doorway.enter()), asyncio.create_task(doorway.enter())
        await asyncio.sleep(0)
        if is_let_in:
            first.leave()
        gone.cancel()
        first.leave()
        assert [0] == await _soon(last)
        assert gone.cancelled()

    asyncio.run(play())


@given(st.lists(st.tuples(st.sampled_from(["enter", "leave", "cancel"]), st.integers(0, 30)), max_size=80))
def test_nobody_is_lost(steps: list[tuple[str, int]]) -> None:
    """After any sequence: never more on their way than there is room for, and once all leave, all have been let in."""

    async def play() -> None:
        doorway = Doorway(3, _NEVER_S)
        tasks: list[asyncio.Task[Step]] = []
        inside: list[Step] = []
        for what, which in steps:
            if what == "enter":
                tasks.append(asyncio.create_task(doorway.enter()))
            elif what == "cancel" and tasks:
                tasks[which % len(tasks)].cancel()
            elif inside:
                inside.pop(which % len(inside)).leave()
            if which % 2:
                await _soon(*tasks)
                inside = [task.result() for task in tasks if task.done() and not task.cancelled()]
                inside = [step for step in inside if step._doorway is not None]
            assert len(inside) <= 3
        for _ in tasks:
            await _soon(*tasks)
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.result().leave()
        assert all(task.done() for task in tasks)
        assert [await doorway.enter() for _ in range(3)]

    asyncio.run(asyncio.wait_for(play(), 60))
