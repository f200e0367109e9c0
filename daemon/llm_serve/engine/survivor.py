"""The EngineClient that vLLM's handlers see: it outlives the engines behind it.

Front ends know an engine only through `bind`, `unbind` and `epoch`. A request waits while no engine is bound, is run
again from the start when its engine dies before anything was delivered, and is gone on with after that.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import msgspec
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from llm_serve import passage
from llm_serve.core.company import ALONE, Company
from llm_serve.core.suspects import Suspects
from llm_serve.engine import grammars, resume
from llm_serve.engine.delivered import Delivered
from llm_serve.engine.resume import Asked, CannotResumeError
from llm_serve.host.logs import get_logger

_BAN_S = 600.0
Ask = Callable[[Any, str], AsyncGenerator[Any, None]]
"""Asks an engine under a name that is new to it."""


class EngineRestarted(GenerationError):  # type: ignore[misc]  # noqa: N818 - an event in the life of a request; nobody's mistake
    """An answer was cut because its engine ended. The request may be sent again."""

    def __init__(self, why: str) -> None:
        super().__init__(f"engine_restarted: {why}. What was sent so far is incomplete; please send the request again.")
        self.status_code = HTTPStatus.SERVICE_UNAVAILABLE


class RequestKillsEngine(GenerationError):  # type: ignore[misc]  # noqa: N818 - as its code
    """This request was in flight at two deaths, once with nobody else. A third engine is not given to it."""

    def __init__(self) -> None:
        super().__init__(
            "request_kills_engine: two engines died while they worked on this request. It is not tried again, and "
            f"refused for {_BAN_S / 60:.0f} minutes."
        )
        self.status_code = HTTPStatus.INTERNAL_SERVER_ERROR


class Survivor(EngineClient):  # type: ignore[misc]  # vLLM's types are Any here
    """Stands for whichever engine is bound.

    `on_death(epoch)` is called when a request finds its engine dead; `on_ban(fingerprint, seconds)` when one is refused
    for what it has done to engines. `company` are other front ends on the same engines.
    """

    def __init__(self, on_death: Callable[[int], None], company: Company = ALONE) -> None:
        self.epoch = 0
        self._on_death = on_death
        self.on_ban: Callable[[str, float], None] = lambda *_: None
        self._llm: Any = None
        self._is_bound = asyncio.Event()
        self._ended: EngineRestarted | None = None
        self._suspects = Suspects(company)
        self._news = asyncio.Event()
        self._waiting = 0
        self._longest = 0

    def attach(self, llm: Any) -> None:
        """Show handlers this engine's configuration and tokenizer, before any request is sent to it."""
        self._llm = llm

    def bind(self, llm: Any, epoch: int) -> None:
        """Send requests, waiting ones first, to this engine."""
        self._llm, self.epoch = llm, epoch
        self._longest = max(self._longest, llm.model_config.max_model_len)
        self._suspects.verdict(may_be_a_request=False)  # of an engine that was ended in good order
        self._is_bound.set()
        self._tell()

    def unbind(self) -> int:
        """Let requests wait. The last engine's tokenizer and configuration stay in use until the next.

        Returns how many requests were with the engine.
        """
        self._is_bound.clear()
        return self._suspects.engine_lost(time.monotonic())

    def explain(self, *, may_be_a_request: bool, everywhere: int | None = None) -> None:
        """Why the engine that was unbound has ended: may one of its requests have done it?

        `everywhere` counts the requests that were with it at all front ends, where there are several.
        """
        self._suspects.verdict(may_be_a_request=may_be_a_request, everywhere=everywhere)

    def ban(self, fingerprint: str, seconds: float) -> None:
        """Refuse requests with this fingerprint for so long."""
        self._suspects.ban(fingerprint, time.monotonic() + seconds)

    def look(self) -> None:
        """Other front ends may have done something that somebody here waits for."""
        if self._waiting and self._is_bound.is_set():
            self._tell()

    def end(self, why: str) -> None:
        """End every request, in flight and waiting, with an error that says why. No engine will follow."""
        self._ended = EngineRestarted(why)
        if self._llm is not None:
            self._llm.output_processor.propagate_error(self._ended)
        self._is_bound.set()
        self._tell()

    def _tell(self) -> None:
        """Wake everybody who waits for a turn."""
        self._news.set()
        self._news = asyncio.Event()

    async def _engine(self) -> Any:
        await self._is_bound.wait()
        if self._ended is not None:
            raise self._ended
        return self._llm

    # What handlers read at each request: never an engine's own object kept from an earlier epoch.
    vllm_config = property(lambda self: self._llm.vllm_config)
    model_config = property(lambda self: self._llm.model_config)
    renderer = property(lambda self: self._llm.renderer)
    input_processor = property(lambda self: self._llm.input_processor)
    is_running = property(lambda self: self._ended is None)
    is_stopped = property(lambda self: self._ended is not None)
    errored = property(lambda self: self._ended is not None)

    @property
    def dead_error(self) -> BaseException:
        """What a handler raises when `errored`."""
        return self._ended or EngineDeadError()

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Apply vLLM's own queue limits, while there is an engine; the gate bounds what waits for one."""
        if self._is_bound.is_set() and self._ended is None:
            self._llm.check_admission(n, request_id)

    async def check_health(self) -> None:
        """Raise when no engine will come any more."""
        if self._ended is not None:
            raise self._ended

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> AsyncGenerator[Any, None]:
        """Tokens from the engine of the moment, and from the next ones if it dies."""
        asked, delivered = Asked(prompt, sampling_params, request_id, options), Delivered()

        def ask(llm: Any, name: str) -> AsyncGenerator[Any, None]:
            if delivered.first is not None:
                passage.here().resumes += 1
                return resume.go_on(llm, asked, delivered, name)
            self._check_length(asked, llm)
            return llm.generate(prompt, sampling_params, name, **options)  # type: ignore[no-any-return]

        return self._run(ask, request_id, prompt, sampling_params, delivered if asked.is_streamed else None)

    def encode(
        self, prompt: Any, pooling_params: Any, request_id: str, *rest: Any, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Embeddings and the like; see `generate`. They are delivered whole, so there is nothing to go on with."""

        def ask(llm: Any, name: str) -> AsyncGenerator[Any, None]:
            return llm.encode(prompt, pooling_params, name, *rest, **options)  # type: ignore[no-any-return]

        return self._run(ask, request_id, prompt, pooling_params, None)

    async def _run(  # the parts of one request
        self, ask: Ask, request_id: str, prompt: Any, params: Any, delivered: Delivered | None
    ) -> AsyncGenerator[Any, None]:
        """Ask one engine after another until the answer is complete."""
        attempt, journey = 0, passage.here()
        with self._entered(request_id, prompt, params) as name:
            await grammars.check(params, self._llm)
            while True:
                llm, epoch = await self._turn(name, journey), self.epoch
                try:
                    async for output in ask(llm, f"{request_id}-a{attempt}" if attempt else request_id):
                        output.request_id = request_id
                        if delivered is not None:
                            delivered.add(output)
                        yield output
                    return
                except (EngineDeadError, EngineGenerateError) as error:
                    if isinstance(error, EngineGenerateError) and not llm.errored and self._ended is None:
                        raise
                    self._may_go_on(error, journey)
                    self._lost(epoch)
                    if not resume.is_repeatable(prompt):
                        raise self._cut(journey, "the engine died, and this prompt cannot be sent twice") from error
                    attempt = journey.replays = attempt + 1
                except CannotResumeError as error:
                    raise self._cut(journey, f"the engine died, and {error}") from error
                except Exception as error:
                    self._may_go_on(error, journey)
                    raise

    @contextmanager
    def _entered(self, request_id: str, prompt: Any, params: Any) -> Iterator[_Name]:
        """Keep the books on one request, from here to its end. Raises RequestKillsEngine for one that is known."""
        name = _Name(request_id, prompt, params)
        if self._suspects.has_banned and self._suspects.is_banned(name.fingerprint(), time.monotonic()):
            passage.here().is_poisoned = True
            raise RequestKillsEngine
        self._suspects.enter(name)
        try:
            yield name
        finally:
            self._suspects.leave(name)
            if self._waiting:
                self._tell()

    async def _turn(self, name: _Name, journey: passage.Passage) -> Any:
        """Wait until there is an engine, and no suspect that has to be alone with it. Returns the engine."""
        while True:
            if self._ended is not None:
                journey.is_interrupted = True
                raise self._ended
            if self._suspects.is_guilty(name):
                self.ban(name.fingerprint(), _BAN_S)
                self.on_ban(name.fingerprint(), _BAN_S)
                journey.is_poisoned = True
                get_logger().error("a request has killed engines, and is refused", request_id=name.request_id)
                raise RequestKillsEngine
            if self._is_bound.is_set() and self._suspects.may_run(name):
                break
            self._waiting += 1
            try:
                await self._news.wait()
            finally:
                self._waiting -= 1
        if name == self._suspects.next_suspect:
            get_logger().warning("a suspected request runs alone", request_id=name.request_id)
            asyncio.get_running_loop().call_later(self._suspects.trial_s(name), self._clear, name)
        self._suspects.give(name, time.monotonic())
        return self._llm

    def _clear(self, name: _Name) -> None:
        self._suspects.clear(name)
        self._tell()

    def _may_go_on(self, error: Exception, journey: passage.Passage) -> None:
        """Raise the last word to all requests, if it has been spoken."""
        if self._ended is not None:
            journey.is_interrupted = True
            raise self._ended from error

    def _cut(self, journey: passage.Passage, why: str) -> EngineRestarted:
        journey.is_interrupted = True
        return EngineRestarted(why)

    def _check_length(self, asked: Asked, llm: Any) -> None:
        """Refuse a prompt that was short enough when it was accepted, with the reason for what has changed."""
        limit, tokens = int(llm.model_config.max_model_len), asked.prompt_tokens
        if tokens is not None and limit <= len(tokens) < self._longest:
            raise VLLMValidationError(
                f"This model's maximum context length is {limit} tokens since its engine was restarted with a smaller "
                f"plan (before: {self._longest}). The prompt has {len(tokens)} tokens; please shorten it.",
                parameter="input_tokens",
                value=len(tokens),
            )

    def _lost(self, epoch: int) -> None:
        if epoch == self.epoch and self._is_bound.is_set() and self._ended is None:
            self.unbind()
            self._on_death(epoch)

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing: the supervisor ends engines."""


class _Name:
    """One request, as itself: two with the same id are two."""

    def __init__(self, request_id: str, prompt: Any, params: Any) -> None:
        self.request_id, self._prompt = request_id, prompt
        # Taken now: vLLM fills some of them in later. Those of its own (_) it also changes in place.
        asked = {field: value for field, value in msgspec.structs.asdict(params).items() if field[0] != "_"}
        self._params = asked | _ANOTHER_TRY

    def fingerprint(self) -> str:
        """The same for the same request sent again: prompt and parameters, but for what only makes it another try."""
        prompt = self._prompt.get("prompt_token_ids") if isinstance(self._prompt, dict) else self._prompt
        return hashlib.sha256(f"{prompt!r} {sorted(self._params.items())}".encode()).hexdigest()


_ANOTHER_TRY = {"seed": None, "output_kind": None, "skip_clone": None}


def _delegate(name: str, *, is_async: bool) -> Callable[..., Any]:
    """A method that asks the engine of the moment; the async kind waits for one."""

    async def ask_later(self: Survivor, *args: Any, **options: Any) -> Any:
        answer: Awaitable[Any] = getattr(await self._engine(), name)(*args, **options)
        return await answer

    def ask_now(self: Survivor, *args: Any, **options: Any) -> Any:
        return getattr(self._llm, name)(*args, **options)

    return ask_later if is_async else ask_now


# Whatever else this vLLM version's EngineClient has is passed on, so that a new method needs no change here.
for _name, _method in list(vars(EngineClient).items()):
    if not _name.startswith("_") and _name not in vars(Survivor) and callable(_method):
        setattr(Survivor, _name, _delegate(_name, is_async=inspect.iscoroutinefunction(_method)))
Survivor.__abstractmethods__ = frozenset()
