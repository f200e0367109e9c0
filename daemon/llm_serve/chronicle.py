"""Keeps an instance's history: looks at it once a second, and hears what goes to its journal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llm_serve.core import history
from llm_serve.core.history import EVERY_S, History
from llm_serve.core.status import Snapshot
from llm_serve.core.tally import Paces
from llm_serve.host import logs

_TTFT_LOOKS = 10


class Chronicle:
    """What was, for those who come later. `rows` are the tallies of all processes that serve HTTP."""

    def __init__(self, snapshot: Callable[[], Snapshot], rows: Callable[[], Iterable[Sequence[float]]]) -> None:
        self._snapshot, self._rows = snapshot, rows
        self._history, self._paces = History(), Paces(_TTFT_LOOKS)

    def look(self) -> None:
        """Take one sample."""
        pace = self._paces.look(time.monotonic(), self._rows())
        self._history.add_sample(history.sample(time.time(), self._snapshot(), pace))
        self._hear()

    def after(self, number: int) -> dict[str, Any]:
        """What came after that number."""
        self._hear()
        return self._history.after(number)

    def _hear(self) -> None:
        """Events come from any thread; they are numbered here."""
        while logs.recent:
            self._history.add_event(logs.recent.popleft())

    async def keep(self) -> None:
        """Look again and again. An error in it costs the history and nothing else."""
        while True:
            try:
                self.look()
            except Exception as error:  # noqa: BLE001 - nobody's requests depend on this
                logs.get_logger().error("the history is kept no longer", exc_info=error)
                return
            await asyncio.sleep(EVERY_S)
