"""The EngineClient that vLLM's handlers see: it outlives the engines behind it.

Front ends know an engine only through `bind`, `unbind` and `epoch`. A request waits while no engine is bound,
is run again from the start when its engine dies before the first output, and ends with `EngineRestarted`
after that.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import GenerationError
from vllm.v1.engine.exceptions import EngineDeadError

from llm_serve import passage

_DEATHS_TO_REFUSE = 2


class EngineRestarted(GenerationError):  # type: ignore[misc]  # noqa: N818 - an event in the life of a request; nobody's mistake
    """An answer was cut because its engine ended. The request may be sent again."""

    def __init__(self, why: str) -> None:
        super().__init__(f"engine_restarted: {why}. What was sent so far is incomplete; please send the request again.")
        self.status_code = HTTPStatus.SERVICE_UNAVAILABLE


class RequestKillsEngine(GenerationError):  # type: ignore[misc]  # noqa: N818 - as its code
    """This request was in flight at two deaths. A third engine is not given to it."""

    def __init__(self) -> None:
        super().__init__(
            "request_kills_engine: two engines died while they worked on this request; it is not tried again."
        )
        self.status_code = HTTPStatus.INTERNAL_SERVER_ERROR


class Survivor(EngineClient):  # type: ignore[misc]  # vLLM's types are Any here
    """Stands for whichever engine is bound.

    `on_death(epoch)` is called when a request finds its engine dead.
    """

    def __init__(self, on_death: Callable[[int], None]) -> None:
        self.epoch = 0
        self._on_death = on_death
        self._llm: Any = None
        self._is_bound = asyncio.Event()
        self._ended: EngineRestarted | None = None

    def attach(self, llm: Any) -> None:
        """Show handlers this engine's configuration and tokenizer, before any request is sent to it."""
        self._llm = llm

    def bind(self, llm: Any, epoch: int) -> None:
        """Send requests, waiting ones first, to this engine."""
        self._llm, self.epoch = llm, epoch
        self._is_bound.set()

    def unbind(self) -> None:
        """Let requests wait. The last engine's tokenizer and configuration stay in use until the next."""
        self._is_bound.clear()

    def end(self, why: str) -> None:
        """End every request, in flight and waiting, with an error that says why. No engine will follow."""
        self._ended = EngineRestarted(why)
        if self._llm is not None:
            self._llm.output_processor.propagate_error(self._ended)
        self._is_bound.set()

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
        """Tokens from the engine of the moment, or from the next one if it dies before the first output."""
        return self._run(lambda llm, name: llm.generate(prompt, sampling_params, name, **options), request_id)

    def encode(
        self, prompt: Any, pooling_params: Any, request_id: str, *rest: Any, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Embeddings and the like; see `generate`."""
        return self._run(lambda llm, name: llm.encode(prompt, pooling_params, name, *rest, **options), request_id)

    async def _run(
        self, ask: Callable[[Any, str], AsyncGenerator[Any, None]], request_id: str
    ) -> AsyncGenerator[Any, None]:
        attempt, journey = 0, passage.here()
        while True:
            llm, epoch = await self._engine(), self.epoch
            is_delivered = False
            try:
                async for output in ask(llm, f"{request_id}-a{attempt}" if attempt else request_id):
                    if attempt:
                        output.request_id = request_id
                    is_delivered = True
                    yield output
                return
            except EngineDeadError as error:
                if self._ended is not None:
                    journey.is_interrupted = True
                    raise self._ended from error
                self._lost(epoch)
                if is_delivered:
                    journey.is_interrupted = True
                    raise EngineRestarted("the engine died during this answer") from error
                attempt = journey.replays = attempt + 1
                if attempt == _DEATHS_TO_REFUSE:
                    journey.is_poisoned = True
                    raise RequestKillsEngine from error
            except Exception as error:
                if self._ended is not None:
                    journey.is_interrupted = True
                    raise self._ended from error
                raise

    def _lost(self, epoch: int) -> None:
        if epoch == self.epoch and self._is_bound.is_set() and self._ended is None:
            self.unbind()
            self._on_death(epoch)

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing: the supervisor ends engines."""


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
