"""What a person may order of an instance that runs: reload its file, stop admission, resume it. Each has its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from llm_serve.core import events, machine, states
from llm_serve.core.errors import LlmServeError
from llm_serve.core.reload import Change, compare
from llm_serve.core.states import State
from llm_serve.core.status import Reply
from llm_serve.host import interpreter
from llm_serve.host.logs import get_logger
from llm_serve.host.systemd import Notifier
from llm_serve.instance import Instance
from llm_serve.supervisor import Supervisor

T = TypeVar("T")

_TRY_AGAIN, _GAVE_UP, _WRONG_FILE = 75, 70, 78
_ENDING = states.FINAL | {State.draining}


class Orders:
    """Carries orders out, one reload at a time.

    `read` returns what the instance's file says now, `examine` lets vLLM judge it; both raise LlmServeError for what is
    wrong, take their time, and are called in a thread.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        notifier: Notifier,
        *,
        read: Callable[[], Instance],
        examine: Callable[[Instance], None],
    ) -> None:
        self._supervisor, self._notifier = supervisor, notifier
        self._read, self._examine = read, examine
        self._reloading = asyncio.Lock()

    def by_path(self) -> dict[str, Callable[[], Awaitable[Reply]]]:
        """The orders by the path under which the control socket takes them."""
        return {"/reload": self.reload, "/drain": self.drain, "/resume": self.resume}

    def request_reload(self) -> None:
        """Reload; what came of it is in the log. Safe as a signal handler."""

        async def reload() -> None:
            await self.reload()

        self._supervisor.spawn(reload())

    async def reload(self) -> Reply:
        """Read the file again and serve what it says now. What cannot be used changes nothing."""
        if self._reloading.locked():
            return Reply(_TRY_AGAIN, "a reload is under way already; wait for its end.")
        async with self._reloading:
            now = self._supervisor.situation
            if now.state not in states.UP:
                return self._heard(_not_now(now))
            self._notifier.reloading()
            try:
                reply = await self._reload()
            finally:
                # Else the next engine's readiness ends the reload.
                if self._supervisor.situation.state in states.UP:
                    self._notifier.ready()
            return self._heard(reply)

    def _heard(self, reply: Reply) -> Reply:
        """Write the outcome where people look for it."""
        is_done, log = reply.exit_status == 0, get_logger()
        self._supervisor.reload_failed = None if is_done else reply.message
        (log.info if is_done else log.error)(f"reload: {reply.message}", status=reply.exit_status)
        return reply

    async def _reload(self) -> Reply:
        old = self._supervisor.instance
        try:
            new = await _in_thread(self._read)
            change = compare(old.settings, new.settings)
            if change.restart:
                return _needs_restart(old, change)
            if change.needs_engine:
                await _in_thread(lambda: self._examine(new))
        except LlmServeError as error:
            return Reply(error.exit_status, f"{error}\nThe file as it was before serves on.")
        return await self._use(new, change)

    async def _use(self, new: Instance, change: Change) -> Reply:
        now = await self._supervisor.offer(new, needs_engine=change.needs_engine)
        if self._supervisor.instance is not new:
            return _not_now(now)
        if not change.options:
            return Reply(0, "no option has changed; the API keys have been read again.")
        if not change.needs_engine:
            return Reply(0, f"{_applied(change)} without a new engine.")
        now = await self._supervisor.until(lambda now: now.state in states.UP | _ENDING)
        if self._supervisor.instance is new and now.state in states.UP:
            return Reply(0, f"{_applied(change)} with a new engine (start {now.epoch}).")
        if now.fell_back:
            why = now.fell_back.rstrip(".")
            serves = "serves again" if now.state in states.UP else f"is {now.state}"
            return Reply(
                _GAVE_UP,
                f"the changed file's engine does not start: {why}. The file as it was before {serves}.",
            )
        return Reply(_TRY_AGAIN, f"the instance ended before the reload did: {now.why}.")

    async def drain(self) -> Reply:
        """Let new requests wait; those in flight finish."""
        return await self._set_drained(events.DrainRequested(), "stopped: new requests wait")

    async def resume(self) -> Reply:
        """Let requests through again, those that wait first."""
        return await self._set_drained(events.ResumeRequested(), "open")

    async def _set_drained(self, order: events.Event, outcome: str) -> Reply:
        before = self._supervisor.situation
        now = await self._supervisor.tell(order)
        if now.state in _ENDING:
            return Reply(_TRY_AGAIN, f"the instance is {now.state} ({now.why}): nothing was changed.")
        already = " already" if now.is_drained == before.is_drained else ""
        later = "" if now.state in states.UP else f", as soon as the engine answers (the instance is {now.state})"
        but = f"; but {now.too_hot}" if now.too_hot and not now.is_drained else ""
        reply = Reply(0, f"admission is{already} {outcome}{later}{but}.")
        get_logger().info(reply.message)
        return reply


async def _in_thread(work: Callable[[], T]) -> T:
    with interpreter.loop_first():
        return await asyncio.to_thread(work)


def _applied(change: Change) -> str:
    return f"applied {', '.join(change.options)}"


def _not_now(now: machine.Situation) -> Reply:
    return Reply(_TRY_AGAIN, f"the instance is {now.state} ({now.why}): nothing was changed. Reload it when it serves.")


def _needs_restart(old: Instance, change: Change) -> Reply:
    """Nothing of a file is used that cannot be used whole."""
    options, name = ", ".join(change.restart), old.settings.name
    return Reply(
        _WRONG_FILE,
        f"{options} cannot change while the instance runs: nothing was changed. `systemctl restart llm-serve@{name}` "
        "takes the file as it is now, and refuses no connection.",
    )
