"""Long bodies: one after the other, with air in between; short ones never wait."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llm_serve.web.long_bodies import LONG_BYTES, LongBodies

LONG = b"x" * LONG_BYTES


class Work:
    """Looks at bodies and takes its time for it, by a clock of its own."""

    def __init__(self, seconds: float) -> None:
        self.now, self._seconds = 0.0, seconds
        self.seen: list[float] = []

    def look(self, body: bytes) -> int:
        """Note when that was; a body that begins with "bad" cannot be looked at."""
        self.seen.append(asyncio.get_running_loop().time())
        self.now += self._seconds
        if body.startswith(b"bad"):
            raise ValueError("bad")
        return len(body)

    def door(self) -> LongBodies:
        """One that asks this clock."""
        return LongBodies(lambda: self.now)


def play(story: Any) -> None:
    """Run it, for so long at most."""
    asyncio.run(asyncio.wait_for(story, 30))


def test_the_next_long_body_waits_in_proportion_to_what_the_last_one_took() -> None:
    """Twelve times 10 ms, three times."""

    async def story() -> None:
        work = Work(0.01)
        door = work.door()
        assert await asyncio.gather(*(door.look(work.look, LONG) for _ in range(4))) == [LONG_BYTES] * 4
        gaps = [after - before for before, after in zip(work.seen, work.seen[1:], strict=False)]
        assert all(gap >= 0.119 for gap in gaps), gaps

    play(story())


def test_others_have_a_turn_before_and_after() -> None:
    """Three long pieces of work for the loop follow each other: put together, looked at here, and parsed by vLLM."""

    async def story() -> None:
        work = Work(0.05)
        turns: list[float] = []

        async def other() -> None:
            while True:
                turns.append(work.now)
                await asyncio.sleep(0.01)

        others = asyncio.create_task(other())
        await work.door().look(work.look, LONG)
        others.cancel()
        assert turns[0] == 0.0
        assert turns.count(0.05) >= 2

    play(story())


def test_short_bodies_pass_while_long_ones_wait() -> None:
    """Without a turn of the loop, even."""

    async def story() -> None:
        work = Work(0.5)
        door = work.door()
        await door.look(work.look, LONG)
        waiting = asyncio.create_task(door.look(work.look, LONG))
        await asyncio.sleep(0)
        quick = door.look(work.look, LONG[:-1])
        with pytest.raises(StopIteration) as ended:
            quick.send(None)
        assert ended.value.value == LONG_BYTES - 1
        assert not waiting.done()
        waiting.cancel()

    play(story())


def test_what_goes_wrong_or_goes_away_keeps_nobody_waiting() -> None:
    """An error is the caller's; a client that leaves gives its turn up."""

    async def story() -> None:
        work = Work(0.001)
        door = work.door()
        with pytest.raises(ValueError, match="bad"):
            await door.look(work.look, b"bad" + LONG)
        leaving = [asyncio.create_task(door.look(work.look, LONG)) for _ in range(3)]
        await asyncio.sleep(0)
        for each in leaving:
            each.cancel()
        assert await door.look(work.look, LONG) == LONG_BYTES

    play(story())
