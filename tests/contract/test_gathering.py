"""Pieces of answers that gather: who waits for the beat, who does not, and that nothing is lost or changed."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import given
from hypothesis import strategies as st
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import async_llm
from vllm.v1.engine.output_processor import RequestOutputCollector

from llm_serve.engine import gathering
from llm_serve.engine.gathering import BEATS_S, Beat

pytestmark = pytest.mark.vllm


class Busy:
    """A clock, and a thread that is on a CPU for `share` of the time."""

    def __init__(self, share: float) -> None:
        self.share, self.now, self.used = share, 0.0, 0.0

    def pass_(self, seconds: float) -> None:
        """Time goes on."""
        self.now += seconds
        self.used += seconds * self.share

    def beat(self) -> Beat:
        """One that has looked at this clock once."""
        beat = Beat(lambda: self.now, lambda: self.used)
        self.pass_(0.06)
        assert beat.interval_s() == 0.0, "nothing is known yet"
        return beat


def busy_beat() -> Beat:
    """A beat at its longest."""
    busy = Busy(1.0)
    beat = busy.beat()
    for _ in BEATS_S:
        busy.pass_(0.06)
        beat.interval_s()
    assert beat.interval_s() == BEATS_S[-1]
    return beat


def piece(*tokens: int, finished: bool = False) -> RequestOutput:
    """What one step of an engine adds to an answer."""
    text = "".join(chr(token) for token in tokens)
    part = CompletionOutput(0, text, list(tokens), None, None, finish_reason="stop" if finished else None)
    return RequestOutput("r", None, [1], None, [part], finished)


def made(beat: Beat) -> Any:
    """An answer's collector in this beat."""
    return gathering.collector(RequestOutputCollector, beat)(RequestOutputKind.DELTA, "r")


async def heard(collector: Any) -> list[tuple[list[int], float]]:
    """All pieces of an answer, each with when it was heard."""
    loop, seen, finished = asyncio.get_running_loop(), [], False
    while not finished:
        output = collector.get_nowait() or await collector.get()
        seen.append((list(output.outputs[0].token_ids), loop.time()))
        finished = output.finished
    return seen


async def spoken(collector: Any, count: int, every_s: float) -> list[float]:
    """`count` tokens, one after the other, the last of which ends the answer. Returns when each was there."""
    loop, at = asyncio.get_running_loop(), []
    for token in range(65, 65 + count):
        collector.put(piece(token, finished=token == 64 + count))
        at.append(loop.time())
        await asyncio.sleep(every_s)
    return at


async def both(collector: Any, count: int, every_s: float = 0.004) -> tuple[list[tuple[list[int], float]], list[float]]:
    """An answer that is spoken and heard at the same time."""
    listening = asyncio.create_task(heard(collector))
    await asyncio.sleep(0)
    at = await spoken(collector, count, every_s)
    return await listening, at


@pytest.mark.parametrize(
    ("share", "level"), [(0.0, 0), (0.49, 0), (0.75, 0), (0.81, len(BEATS_S) - 1), (1.0, len(BEATS_S) - 1)]
)
def test_only_a_loop_that_is_nearly_always_busy_lets_pieces_gather(share: float, level: int) -> None:
    """An interval that was right stays; the longest is the end."""
    busy = Busy(share)
    beat = busy.beat()
    for _ in range(20):
        busy.pass_(0.06)
        beat.interval_s()
    assert beat.interval_s() == BEATS_S[level]


def test_one_that_has_air_again_lets_them_go() -> None:
    """One level for each window, and not before a window is over."""
    busy = Busy(1.0)
    beat = busy.beat()
    busy.pass_(0.06)
    assert beat.interval_s() == BEATS_S[1]
    busy.pass_(0.02)
    assert beat.interval_s() == BEATS_S[1]
    busy.pass_(0.04)
    assert beat.interval_s() == BEATS_S[2]
    busy.share = 0.7
    for _ in range(5):
        busy.pass_(0.06)
        assert beat.interval_s() == BEATS_S[2]
    busy.share = 0.1
    seen = []
    for _ in BEATS_S:
        busy.pass_(0.06)
        seen.append(beat.interval_s())
    assert seen == [BEATS_S[1], 0.0, 0.0, 0.0, 0.0]


def test_what_is_between_the_first_and_the_last_piece_gathers() -> None:
    """All tokens in their order, in fewer pieces; the first and the last at once."""

    async def play() -> None:
        pieces, at = await both(made(busy_beat()), 40)
        assert list(itertools.chain.from_iterable(tokens for tokens, _ in pieces)) == list(range(65, 105))
        assert pieces[0][0] == [65]
        assert len(pieces) < 20
        assert pieces[0][1] - at[0] < BEATS_S[-1] / 2
        assert pieces[-1][1] - at[-1] < BEATS_S[-1] / 2

    asyncio.run(play())


def test_a_loop_with_air_sends_each_token() -> None:
    """As vLLM does it."""

    async def play() -> None:
        pieces, _ = await both(made(Busy(0.2).beat()), 20)
        assert [tokens for tokens, _ in pieces] == [[token] for token in range(65, 85)]

    asyncio.run(play())


def test_an_error_does_not_wait() -> None:
    """The engine's death is told at once, whatever has gathered."""

    async def play() -> None:
        collector = made(busy_beat())
        collector.put(piece(65))
        assert (await collector.get()).outputs[0].token_ids == [65]
        asking = asyncio.create_task(collector.get())
        await asyncio.sleep(0)
        collector.put(piece(66))
        collector.put(piece(67))
        await asyncio.sleep(0)
        assert not asking.done()
        collector.put(RuntimeError("dead"))
        with pytest.raises(RuntimeError, match="dead"):
            await asyncio.wait_for(asking, BEATS_S[-1] / 2)

    asyncio.run(play())


def test_a_loop_that_ended_in_the_middle_keeps_nobody_waiting_in_the_next() -> None:
    """Its timer will never ring."""
    beat = busy_beat()

    async def leave() -> None:
        collector = made(beat)
        collector.put(piece(65))
        collector.get_nowait()
        collector.put(piece(66))

    asyncio.run(leave())

    async def play() -> None:
        pieces, _ = await asyncio.wait_for(both(made(beat), 10), 20)
        assert sum(len(tokens) for tokens, _ in pieces) == 10

    asyncio.run(play())


@given(st.lists(st.sampled_from(["put", "get", "turn", "beat"]), max_size=60))
def test_no_order_of_things_loses_or_moves_a_token(events: list[str]) -> None:
    """Puts, gets and beats in any order: what is heard is what was spoken."""

    async def play() -> None:
        beat, token, seen = busy_beat(), 65, []
        collector = made(beat)
        for event in events:
            if event == "put":
                collector.put(piece(token))
                token += 1
            elif event == "get" and (output := collector.get_nowait()) is not None:
                seen += output.outputs[0].token_ids
            elif event == "turn":
                await asyncio.sleep(0)
            elif event == "beat":
                beat._beat()
        collector.put(piece(token, finished=True))
        while (output := await asyncio.wait_for(collector.get(), 20)) is not None:
            seen += output.outputs[0].token_ids
            if output.finished:
                break
        assert seen == list(range(65, token + 1))

    asyncio.run(play())


def test_async_llm_is_given_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name under which AsyncLLM looks for it."""
    monkeypatch.setattr(async_llm, "RequestOutputCollector", RequestOutputCollector)
    gathering.install()
    given_ = async_llm.RequestOutputCollector
    assert issubclass(given_, RequestOutputCollector)
    assert given_ is not RequestOutputCollector
    gathering.install()
    assert async_llm.RequestOutputCollector is given_
