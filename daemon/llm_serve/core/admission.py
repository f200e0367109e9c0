"""Who goes to the engine next, and how many at once.

Invariants, checked after every step in tests:
- nobody is let in past those who wait, and nobody while the gate is closed;
- what is let in never exceeds the engine's batch and the reserve behind it;
- of those who wait, each key's go in their order, and the keys take turns;
- no more than the limit wait, and no key takes more than four times what it leaves free for others, so that there is a
  place for a key that comes late (dynamic thresholds, as in switches with shared memory; to throw out one who waits
  already would break a promise);
- everybody who enters is let in, refused, or leaves: nobody is lost.

Several front ends before one engine share its batch and the one limit of those who wait: each counts what the others
have let in and keep waiting, of each key too, and of the requests that are next at their gates the oldest goes first.
So no gate starves, whichever of them the kernel hands the connections to; the keys' turns are each gate's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from llm_serve.core.company import ALONE, NEVER, Company, Other

T = TypeVar("T")

_FULL_CACHE = 0.9
_GREED = 4


@dataclass(frozen=True, slots=True)
class Load:
    """The engine's work as its last step told: sequences that run and that wait, share of the KV cache in use."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0


IDLE = Load()


def reserve(slots: int) -> int:
    """How many may wait inside an engine that runs `slots` at once, to take a place the moment it falls free."""
    return max(2, -(-slots // 4))


class Queue(Generic[T]):
    """Those who wait: each key's in their order, the keys in turns."""

    def __init__(self) -> None:
        self._lines: OrderedDict[bytes, OrderedDict[T, float]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, key: bytes, item: T, at: float = 0.0) -> None:
        """Put `item`, which came at this time, behind all others of its key; a new key's turn comes last."""
        self._lines.setdefault(key, OrderedDict())[item] = at
        self._length += 1

    @property
    def first_since(self) -> float:
        """When the one came whose turn it is; NEVER when nobody waits."""
        line = next(iter(self._lines.values()), None)
        return next(iter(line.values())) if line else NEVER

    def pop(self) -> tuple[bytes, T]:
        """Take out whose turn it is, and its key."""
        key, line = next(iter(self._lines.items()))
        item, _ = line.popitem(last=False)
        self._lines.move_to_end(key)
        self._took_from(key, line)
        return key, item

    def remove(self, key: bytes, item: T) -> bool:
        """Take `item` out. False when it was not there any more."""
        line = self._lines.get(key)
        if line is None or item not in line:
            return False
        del line[item]
        self._took_from(key, line)
        return True

    def count(self, key: bytes) -> int:
        """How many of this key wait."""
        return len(self._lines.get(key, ()))

    def _took_from(self, key: bytes, line: OrderedDict[T, float]) -> None:
        self._length -= 1
        if not line:
            del self._lines[key]


class Admission(Generic[T]):
    """The queue before one engine after another, at most `limit` long, and the count of what they were given.

    A queue that is not shared is all of one key, which then may fill it. `company` are the gates beside this one.
    """

    def __init__(self, limit: int, *, is_shared: bool = True, company: Company = ALONE) -> None:
        self._limit, self._is_shared, self._company = limit, is_shared, company
        self._queue: Queue[T] = Queue()
        self._load = IDLE
        self._since_step = 0
        self._slots: int | None = None
        self._ramp = 0
        self.is_open = False
        self.inside = 0

    def __len__(self) -> int:
        return len(self._queue)

    def resize(self, limit: int, *, is_shared: bool) -> None:
        """Count by these from now on; who waits already goes on waiting."""
        self._limit, self._is_shared = limit, is_shared

    # What becomes of the engine.
    def open(self, slots: int | None) -> None:
        """There is an engine that runs `slots` requests at once; None when unknown, and then nothing is kept back."""
        self.is_open, self._slots = True, slots
        self._load, self._since_step = IDLE, 0
        # What has waited for a fresh engine comes in steps: it compiles, and its first batches are its slowest.
        self._ramp = 2 * reserve(slots or 0)
        self._tell()

    def close(self) -> None:
        """There is no engine. What was let in stays counted until it ends: the next engine gets it first."""
        self.is_open = False
        self._tell()

    def note(self, load: Load) -> None:
        """The engine has done a step."""
        self._load, self._since_step = load, 0
        if self._slots is not None and self._ramp < self._slots + reserve(self._slots):
            self._ramp *= 2
        self._tell()

    # What requests do.
    def enter(self) -> bool:
        """Let a request in at once. False when it has to wait."""
        others = self._company.others()
        if self._queue or any(other.first_since < NEVER for other in others) or self._room(others) <= 0:
            return False
        self._let_in()
        return True

    def wait(self, key: bytes, item: T, at: float = 0.0) -> bool:
        """Let `item`, which came at this time, wait. False when there is no room for it."""
        free = self._limit - self.waiting
        if free <= 0 or (self._is_shared and self._queue.count(key) + self._company.waiting(key) >= _GREED * free):
            return False
        self._queue.push(key, item, at)
        self._company.tell_waiting(key, 1)
        self._tell()
        return True

    def withdraw(self, key: bytes, item: T) -> bool:
        """Let `item` wait no longer. False when it had been taken out before."""
        if was_there := self._queue.remove(key, item):
            self._company.tell_waiting(key, -1)
            self._tell()
        return was_there

    @property
    def waiting(self) -> int:
        """How many wait, at all gates together."""
        return len(self._queue) + sum(other.waiting for other in self._company.others())

    def due(self) -> Iterator[T]:
        """Let in, and take out, as many as there is room for and whose turn it is."""
        while self._queue and self._is_next(others := self._company.others()) and self._room(others) > 0:
            item = self._take_out()
            self._let_in()
            yield item

    def everybody(self) -> Iterator[T]:
        """Take out all who wait, without letting them in."""
        while self._queue:
            item = self._take_out()
            self._tell()
            yield item

    def ended(self) -> None:
        """A request that was let in has ended."""
        self.inside -= 1
        self._tell()

    def _take_out(self) -> T:
        key, item = self._queue.pop()
        self._company.tell_waiting(key, -1)
        return item

    def _let_in(self) -> None:
        self.inside += 1
        self._since_step += 1
        self._tell()

    def _tell(self) -> None:
        """Let the gates beside this one know. Who waits at a closed gate does not keep the others from their turn."""
        self._company.tell_gate(
            inside=self.inside,
            let_in=self._since_step,
            waiting=len(self._queue),
            first_since=self._queue.first_since if self.is_open else NEVER,
        )

    def _is_next(self, others: Sequence[Other]) -> bool:
        return all(self._queue.first_since <= other.first_since for other in others)

    def _room(self, others: Sequence[Other]) -> int:
        """How many more the engine can take now."""
        if not self.is_open:
            return 0
        if self._slots is None:
            return 1
        spare = reserve(self._slots)
        most = min(self._slots + spare, self._ramp)
        inside = self.inside + sum(other.inside for other in others)
        if not inside:
            return most  # whatever the last step said is over
        load = self._load
        # One request may be many sequences, and the engine knows only what has arrived there: the larger count holds.
        room = most - max(inside, load.running + load.waiting)
        if load.waiting and load.kv_cache_usage >= _FULL_CACHE:
            let_in = self._since_step + sum(other.let_in for other in others)
            room = min(room, spare - load.waiting - let_in)
        return room
