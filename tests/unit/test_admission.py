"""Who is let in, in which order, and how many: examples, and the invariants under any sequence of events."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_serve.core.admission import Admission, Load, reserve
from llm_serve.host.board import Board, Seat

A, B, C = b"a", b"b", b"c"


def admission(slots: int | None = None, limit: int = 100) -> Admission[str]:
    """A queue before an engine that has been up for a while; without slots there is no engine."""
    queue: Admission[str] = Admission(limit)
    if slots is not None:
        queue.open(slots)
        for _ in range(20):
            queue.note(Load())
    return queue


def fill(queue: Admission[str], load: Load | None = None) -> int:
    """Let in as many as go in at once, and say what the engine then reports. Returns how many."""
    while queue.enter():
        pass
    if load is not None:
        queue.note(load)
    return queue.inside


@pytest.mark.parametrize(("slots", "expected"), [(1, 2), (4, 2), (8, 2), (16, 4), (17, 5), (256, 64)])
def test_the_reserve_is_a_quarter_and_two_at_least(slots: int, expected: int) -> None:
    """A place that falls free is taken at once, also where the batch is small."""
    assert expected == reserve(slots)


@pytest.mark.parametrize("slots", [1, 4, 16, 256])
def test_the_engine_gets_a_full_batch_and_the_reserve(slots: int) -> None:
    """As many as run at once, and those who take their places; the next one waits."""
    assert slots + reserve(slots) == fill(admission(slots))


def test_without_a_known_size_nothing_is_kept_back() -> None:
    """Where nobody knows how much the engine runs at once, it decides for itself."""
    queue: Admission[str] = Admission(10)
    queue.open(None)

    assert all(queue.enter() for _ in range(1000))


@pytest.mark.parametrize(
    ("load", "room"),
    [
        pytest.param(Load(10, 0, 0.5), 10, id="room in the batch"),
        pytest.param(Load(16, 4, 0.5), 0, id="batch and reserve are full"),
        pytest.param(Load(40, 0, 0.5), 0, id="ten requests of several sequences each"),
        pytest.param(Load(10, 0, 0.99), 10, id="a full cache in which nobody waits"),
        pytest.param(Load(6, 4, 0.95), 0, id="a full cache, and as many wait as there is reserve"),
        pytest.param(Load(6, 1, 0.95), 3, id="a full cache, and the reserve is not"),
        pytest.param(Load(6, 4, 0.5), 10, id="those who wait are about to run"),
    ],
)
def test_room_is_what_the_engine_has(load: Load, room: int) -> None:
    """Ten requests are inside an engine of 16 slots; what it says of them decides how many more go in."""
    queue = admission(16)
    for _ in range(10):
        assert queue.enter()
    queue.note(load)

    assert 10 + room == fill(queue)


def test_an_engine_without_requests_has_room_whatever_it_said_last() -> None:
    """The last report of an engine whose requests were all given up is out of date, and no other one will come."""
    queue = admission(4)
    assert queue.enter()
    queue.note(Load(50, 50, 1.0))
    assert not queue.enter()

    queue.ended()

    assert queue.enter()


def test_a_fresh_engine_is_not_stampeded() -> None:
    """Those who waited for it come in steps that double, not all at once."""
    queue: Admission[str] = Admission(1000)
    for number in range(500):
        queue.wait(A, str(number))
    queue.open(64)

    groups = []
    for _ in range(5):
        groups.append(len(list(queue.due())))
        queue.note(Load(queue.inside, 0, 0.1))

    assert [32, 32, 16, 0, 0] == groups


def test_what_is_inside_stays_counted_over_a_death() -> None:
    """The requests that the last engine left behind are the first ones for the next engine."""
    queue = admission(8)
    assert 10 == fill(queue)
    queue.wait(A, "later")

    queue.close()
    queue.open(8)

    assert [] == list(queue.due())
    for _ in range(7):
        queue.ended()
    assert ["later"] == list(queue.due())


def test_keys_take_turns() -> None:
    """A key with many requests delays one with few by one request a turn, and each key's own order holds."""
    queue: Admission[str] = Admission(10)
    for key, item in [(A, "a1"), (A, "a2"), (A, "a3"), (B, "b1"), (C, "c1"), (B, "b2")]:
        queue.wait(key, item)
    queue.open(None)

    assert ["a1", "b1", "c1", "a2", "b2", "a3"] == list(queue.due())


def test_nobody_passes_those_who_wait() -> None:
    """A place that is free belongs to the queue, also when somebody asks before the queue was looked at."""
    queue: Admission[str] = Admission(10)
    queue.wait(A, "first")
    queue.open(16)

    assert not queue.enter()
    assert ["first"] == list(queue.due())
    assert queue.enter()


@pytest.mark.parametrize(
    ("limit", "waiting", "is_let_wait"),
    [
        pytest.param(0, {}, False, id="no queue"),
        pytest.param(1, {}, True, id="a queue of one"),
        pytest.param(1, {A: 1}, False, id="a full queue of one"),
        pytest.param(10, {A: 7}, True, id="less than four times what is free"),
        pytest.param(10, {A: 8}, False, id="four times what is free"),
        pytest.param(10, {B: 8}, True, id="another key has left room"),
        pytest.param(10, {B: 5, C: 4}, True, id="the last place, for a key that has none"),
        pytest.param(10, {A: 4, B: 5}, False, id="the last place, for a key that has some"),
        pytest.param(10, {B: 5, C: 5}, False, id="full"),
    ],
)
def test_no_key_takes_all_of_the_queue(limit: int, waiting: dict[bytes, int], is_let_wait: bool) -> None:
    """A request of key A comes to a queue in which so many of each key wait."""
    queue: Admission[str] = Admission(limit)
    for number in range(limit):
        for key, count in waiting.items():
            if number < count:
                queue._queue.push(key, f"{key!r}{number}")

    assert is_let_wait is queue.wait(A, "new")


def test_a_queue_of_one_key_may_be_filled_by_it() -> None:
    """Where there is nobody to share with, max_queued is what it says."""
    queue: Admission[str] = Admission(10, is_shared=False)

    assert [True] * 10 + [False] == [queue.wait(A, str(number)) for number in range(11)]


def test_who_leaves_is_forgotten() -> None:
    """A place in the queue is free at once, and leaving twice is no mistake."""
    queue: Admission[str] = Admission(10)
    for item in ("a1", "a2"):
        queue.wait(A, item)

    assert queue.withdraw(A, "a1")
    assert not queue.withdraw(A, "a1")
    assert not queue.withdraw(B, "a2")
    assert ["a2"] == list(queue.everybody())
    assert 0 == len(queue)


class Rules(RuleBasedStateMachine):
    """Requests of a few keys, and engines that come, step and die, in any order."""

    LIMIT = 6

    def __init__(self) -> None:
        super().__init__()
        self.queue: Admission[tuple[bytes, int]] = Admission(self.LIMIT)
        self.slots = 0
        self.number = 0
        self.waiting: dict[bytes, list[tuple[bytes, int]]] = {A: [], B: [], C: []}
        self.inside = 0
        self.most = 0
        self.passed_over: Counter[bytes] = Counter()

    @rule(slots=st.integers(1, 8))
    def engine_comes(self, slots: int) -> None:
        """An engine opens the gate; another may have been there."""
        self.queue.open(slots)
        self.slots = slots
        self.let_in()

    @rule()
    def engine_goes(self) -> None:
        """The gate is closed."""
        self.queue.close()
        assert not self.queue.enter()

    @rule(running=st.integers(0, 12), waiting=st.integers(0, 12), used=st.floats(0, 1))
    def engine_steps(self, running: int, waiting: int, used: float) -> None:
        """The engine reports anything at all."""
        self.queue.note(Load(running, waiting, used))
        self.let_in()

    @rule(key=st.sampled_from([A, B, C]))
    def request_comes(self, key: bytes) -> None:
        """It goes in at once, waits, or somebody is refused."""
        if self.queue.enter():
            assert not any(self.waiting.values()), "it went past those who wait"
            self.count_in()
            return
        self.number += 1
        item = (key, self.number)
        free = self.LIMIT - sum(map(len, self.waiting.values()))
        if self.queue.wait(key, item):
            self.waiting[key].append(item)
        else:
            assert len(self.waiting[key]) >= 4 * free, "it was not greedy"

    @invariant()
    def nobody_is_kept_out_by_one_other(self) -> None:
        """One key alone cannot fill the queue."""
        if [key for key, line in self.waiting.items() if line] == [A]:
            assert len(self.waiting[A]) < self.LIMIT

    @precondition(lambda self: any(self.waiting.values()))
    @rule(choice=st.randoms(use_true_random=False))
    def request_leaves(self, choice: object) -> None:
        """One that waits goes away."""
        item = choice.choice([each for line in self.waiting.values() for each in line])  # type: ignore[attr-defined]
        assert self.queue.withdraw(item[0], item)
        self.waiting[item[0]].remove(item)

    @precondition(lambda self: self.inside)
    @rule()
    def request_ends(self) -> None:
        """One that was let in ends."""
        self.queue.ended()
        self.inside -= 1
        self.let_in()

    def let_in(self) -> None:
        """Take out those who are due: in order within a key, and no key twice while another waits for its turn."""
        for item in self.queue.due():
            assert self.queue.is_open
            key = item[0]
            assert item == self.waiting[key].pop(0), "not the oldest of its key"
            self.passed_over[key] = 0
            for other, line in self.waiting.items():
                if other != key and line:
                    self.passed_over[other] += 1
                    assert self.passed_over[other] <= 2 * len(self.waiting), "a key starves"
            self.count_in()

    def count_in(self) -> None:
        """One more is inside, and there was room for it."""
        self.inside += 1
        assert self.inside <= self.slots + reserve(self.slots)

    @invariant()
    def nobody_is_lost(self) -> None:
        """The queue holds exactly those who came and neither went in nor away."""
        assert sum(map(len, self.waiting.values())) == len(self.queue) <= self.LIMIT
        assert self.inside == self.queue.inside

    @invariant()
    def nobody_waits_before_an_empty_engine(self) -> None:
        """With an open gate and nothing inside, there is no queue: nothing would ever wake it."""
        if self.queue.is_open and not self.queue.inside:
            assert not len(self.queue)


TestRules = Rules.TestCase
TestRules.settings = settings(max_examples=150, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow])


class Crowd(RuleBasedStateMachine):
    """Three gates before one engine, in any order; each looks again whenever it likes."""

    GATES, LIMIT = 3, 7

    def __init__(self) -> None:
        super().__init__()
        board = Board(self.GATES)
        for row in board.rows:
            row.turned_at = float("inf")
        self.seats = [Seat(board, place) for place in range(self.GATES)]
        self.gates = [Admission[int](self.LIMIT, company=seat) for seat in self.seats]
        self.keys = (A, next(key for key in map(str.encode, "bcdefg") if board.line_of(key) != board.line_of(A)))
        self.slots = self.now = 0
        self.waiting: dict[int, int] = {}
        self.key_of: dict[int, bytes] = {}

    gates_ = st.integers(0, GATES - 1)

    @rule(slots=st.integers(1, 6))
    def engine_comes(self, slots: int) -> None:
        """All gates are opened, one after the other."""
        self.slots = slots
        for gate in self.gates:
            gate.open(slots)

    @rule(gate=gates_)
    def gate_closes(self, gate: int) -> None:
        """One of them has lost the engine first, or has not got it yet: who waits there keeps nobody up."""
        self.gates[gate].close()

    @rule(gate=gates_, name=st.integers(0, 1))
    def request_comes(self, gate: int, name: int) -> None:
        """It passes nobody who waits at an open gate, and waits if all of them together have room for it and its key."""
        key = self.keys[name]
        self.now += 1
        if self.gates[gate].enter():
            assert not any(self.gates[where].is_open for where in self.waiting.values()), "it passed somebody"
            self.check_room()
            return
        its = sum(self.key_of[other] == key for other in self.waiting)
        is_greedy = its >= 4 * (self.LIMIT - len(self.waiting))
        assert self.gates[gate].wait(key, self.now, float(self.now)) is not is_greedy
        if not is_greedy:
            self.waiting[self.now], self.key_of[self.now] = gate, key
            assert len(self.waiting) <= self.LIMIT

    @rule(gate=gates_)
    def request_ends(self, gate: int) -> None:
        """One that was let in there."""
        if self.gates[gate].inside:
            self.gates[gate].ended()

    @rule(gate=gates_, running=st.integers(0, 8), queued=st.integers(0, 8), used=st.floats(0, 1))
    def engine_steps(self, gate: int, running: int, queued: int, used: float) -> None:
        """One of the gates is told."""
        self.gates[gate].note(Load(running, queued, used))

    @rule(gate=gates_)
    def gate_looks(self, gate: int) -> None:
        """Of those that are next at open gates the oldest goes first; at each, its key's oldest."""
        for item in self.gates[gate].due():
            assert gate == self.waiting.pop(item)
            here = (other for other, at in self.waiting.items() if at == gate)
            assert not any(other < item for other in here if self.key_of[other] == self.key_of[item]), (
                "past its own key"
            )
            next_elsewhere = [seat.row.first_since for seat in self.seats if seat.place != gate]
            assert all(item < since for since in next_elsewhere if since), "out of turn"
            self.check_room()

    @rule()
    def all_look(self) -> None:
        """Whenever there is room in an engine that says nothing else, somebody takes it."""
        for gate in self.gates:
            for _ in range(20):
                gate.note(Load())
        for turn in range(self.LIMIT * self.GATES):
            self.gate_looks(turn % self.GATES)
        free = self.slots + reserve(self.slots) - sum(gate.inside for gate in self.gates)
        assert free <= 0 or not any(self.gates[where].is_open for where in self.waiting.values())

    def check_room(self) -> None:
        """What is let in is one batch and its reserve, not one for each gate."""
        assert sum(gate.inside for gate in self.gates) <= self.slots + reserve(self.slots)

    @invariant()
    def nobody_is_lost(self) -> None:
        """All gates together hold exactly those who wait, and tell each other of no others."""
        assert [len(gate) for gate in self.gates] == [sum(seat.row.lines) for seat in self.seats]
        assert len(self.waiting) == sum(map(len, self.gates)) == self.gates[0].waiting


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(max_examples=80, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow])


def test_one_whose_loop_stands_still_keeps_nobody_waiting() -> None:
    """What it has in the engine counts; whom it keeps waiting does not go first for ever."""
    board = Board(2)
    stuck, gate = (Admission[str](10, company=Seat(board, place)) for place in range(2))
    for each in (stuck, gate):
        each.open(4)
        each.note(Load())
    assert stuck.wait(A, "old", 1.0)
    assert gate.wait(A, "new", 2.0)
    board.rows[0].turned_at = float("inf")
    assert [] == list(gate.due())

    board.rows[0].turned_at = 0.0

    assert ["new"] == list(gate.due())
