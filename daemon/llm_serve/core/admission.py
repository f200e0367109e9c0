"""Who goes to the engine next, and how many at once.

Invariants, checked after every step in tests:
- nobody is let in past those who wait, and nobody while the gate is closed;
- what is let in never exceeds the engine's batch and the reserve behind it;
- of those who wait, each key's go in their order, and the keys take turns;
- no more than the limit wait, and no key takes more than four times what it leaves free for others, so that there is a
  place for a key that comes late (dynamic thresholds, as in switches with shared memory; to throw out one who waits
  already would break a promise);
- everybody who enters is let in, refused, or leaves: nobody is lost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

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
        self._lines: OrderedDict[bytes, OrderedDict[T, None]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, key: bytes, item: T) -> None:
        """Put `item` behind all others of its key; a new key's turn comes last."""
        self._lines.setdefault(key, OrderedDict())[item] = None
        self._length += 1

    def pop(self) -> T:
        """Take out whose turn it is."""
        key, line = next(iter(self._lines.items()))
        item, _ = line.popitem(last=False)
        self._lines.move_to_end(key)
        self._took_from(key, line)
        return item

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

    def _took_from(self, key: bytes, line: OrderedDict[T, None]) -> None:
        self._length -= 1
        if not line:
            del self._lines[key]


class Admission(Generic[T]):
    """The queue before one engine after another, at most `limit` long, and the count of what they were given.

    A queue that is not shared is all of one key, which then may fill it.
    """

    def __init__(self, limit: int, *, is_shared: bool = True) -> None:
        self._limit, self._is_shared = limit, is_shared
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

    def close(self) -> None:
        """There is no engine. What was let in stays counted until it ends: the next engine gets it first."""
        self.is_open = False

    def note(self, load: Load) -> None:
        """The engine has done a step."""
        self._load, self._since_step = load, 0
        if self._slots is not None and self._ramp < self._slots + reserve(self._slots):
            self._ramp *= 2

    # What requests do.
    def enter(self) -> bool:
        """Let a request in at once. False when it has to wait."""
        if self._queue or self._room() <= 0:
            return False
        self._let_in()
        return True

    def wait(self, key: bytes, item: T) -> bool:
        """Let `item` wait. False when there is no room for it."""
        free = self._limit - len(self._queue)
        if free <= 0 or (self._is_shared and self._queue.count(key) >= _GREED * free):
            return False
        self._queue.push(key, item)
        return True

    def withdraw(self, key: bytes, item: T) -> bool:
        """Let `item` wait no longer. False when it had been taken out before."""
        return self._queue.remove(key, item)

    def due(self) -> Iterator[T]:
        """Let in, and take out, as many as there is room for."""
        while self._queue and self._room() > 0:
            self._let_in()
            yield self._queue.pop()

    def everybody(self) -> Iterator[T]:
        """Take out all who wait, without letting them in."""
        while self._queue:
            yield self._queue.pop()

    def ended(self) -> None:
        """A request that was let in has ended."""
        self.inside -= 1

    def _let_in(self) -> None:
        self.inside += 1
        self._since_step += 1

    def _room(self) -> int:
        """How many more the engine can take now."""
        if not self.is_open:
            return 0
        if self._slots is None:
            return 1
        spare = reserve(self._slots)
        most = min(self._slots + spare, self._ramp)
        if not self.inside:
            return most  # whatever the last step said is over
        load = self._load
        # One request may be many sequences, and the engine knows only what has arrived there: the larger count holds.
        room = most - max(self.inside, load.running + load.waiting)
        if load.waiting and load.kv_cache_usage >= _FULL_CACHE:
            room = min(room, spare - load.waiting - self._since_step)
        return room
