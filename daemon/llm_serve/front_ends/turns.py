"""What a front end among others does again and again: it says that it is there, and looks at what the others wrote."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from llm_serve.core.admission import Load
from llm_serve.host.board import Seat
from llm_serve.web.gate import Gate

_EVERY_S, _WHILE_SOME_WAIT_S = 0.1, 0.005
"""The second is for how long a place in the engine may stay free that somebody at another gate waits for."""


class Turns:
    """One front end's turns. `survivor` and `steps` (the watch on the engine's steps) are set once they are there."""

    def __init__(self, seat: Seat, gate: Gate) -> None:
        self._seat, self._gate = seat, gate
        self._noted_at = 0.0
        self.survivor: Any = None
        self.steps: Any = None

    async def run(self) -> None:
        """Take turns for ever."""
        while True:
            self._turn()
            await asyncio.sleep(_WHILE_SOME_WAIT_S if self._gate.held else _EVERY_S)

    def note(self, load: Load) -> None:
        """The engine has told this front end of its work: all of them may know."""
        self._seat.tell_load(load)
        self._noted_at = self._seat.row.loaded_at
        self._gate.note(load)

    def _turn(self) -> None:
        row, steps = self._seat.row, self.steps
        row.in_flight = self._gate.in_flight
        row.unfinished = steps.unfinished if steps is not None else 0
        row.stepped_at = (steps.last_step_at if steps is not None else None) or 0.0
        row.turned_at = time.monotonic()
        loaded_at, load = self._seat.board.newest_load()
        if loaded_at > self._noted_at:
            self._noted_at = loaded_at
            self._gate.note(load)
        self._gate.look()
        if self.survivor is not None:
            self.survivor.look()
