"""After an engine has failed: everything that is known about it in one value, the verdict, and one journal entry.

Evidence is taken before anything is killed or cleaned up, and what is left of the engine goes before the next is built.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_serve import metrics
from llm_serve.core.errors import ConfigError, HostError
from llm_serve.core.evidence import ErrorRecord, Evidence, Failure, Kind
from llm_serve.core.failures import classify
from llm_serve.core.policy import KEEPS_WEIGHTS
from llm_serve.engine.evidence import Collector
from llm_serve.engine.factory import Factory, StartError
from llm_serve.engine.running import Engine
from llm_serve.host import gpu_gate
from llm_serve.host.logs import get_logger
from llm_serve.host.state_file import append_failure
from llm_serve.host.witnesses import Witnesses

_NEWS_S, _LOOK_EVERY_S = 0.2, 0.01
"""Exit codes and last records arrive after the news of a death, the codes last."""
_CAUSE_WITHIN_S = 60.0
"""An engine survives many errors that it logs; older ones do not explain its death."""
_MEMORY_BACK_S = 30.0


class Postmortem:
    """Explains failures and removes remains, for one instance."""

    def __init__(self, factory: Factory, collector: Collector, witnesses: Witnesses, state: Path) -> None:
        self._factory, self._collector, self._witnesses, self._state = factory, collector, witnesses, state
        self.last: tuple[dict[str, Any], ...] = ()
        """The last failures of this process, newest first."""

    def begin(self) -> None:
        """A new engine is about to be started: what happens from now on is about it."""
        self._witnesses.begin()

    async def of_start(self, error: BaseException) -> Failure:
        """A start that failed; the factory has removed what there was of it."""
        if isinstance(error, ConfigError):
            return await self._conclude(Evidence(), Failure(Kind.configuration, str(error)))
        if isinstance(error, HostError):
            said = ErrorRecord("", "HostError", str(error))
            failure = classify(Evidence(parent_error=said))
            known = failure.kind not in (Kind.crashed, Kind.unknown)
            return await self._conclude(Evidence(), failure if known else Failure(Kind.host_limit, str(error)))
        evidence = error.evidence if isinstance(error, StartError) else self._collector.evidence(error)
        evidence = await asyncio.to_thread(self._witnesses.testify, evidence)
        return await self._conclude(await self._without_remains(evidence))

    async def of_death(self, engine: Engine) -> Failure:
        """An engine that was found dead."""
        pids = [process.pid for process in engine.processes]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_NEWS_S):
                while not self._collector.has_ends_of(pids):  # noqa: ASYNC110 - told from another thread
                    await asyncio.sleep(_LOOK_EVERY_S)
        return await self._bury(engine, exit_codes=engine.exit_codes())

    async def of_stall(self, engine: Engine, seconds: float) -> Failure:
        """An engine that does nothing although there is work. Where it stands is written down first."""
        waited_for = engine.steps.waiting_for()
        get_logger().error("the engine stands still", seconds=round(seconds, 1), waiting_for=waited_for)
        await self._factory.dump_stacks()
        return await self._bury(engine, stalled_for_s=seconds, stalled_on=waited_for)

    async def _bury(self, engine: Engine, **more: Any) -> Failure:
        since = time.time() - _CAUSE_WITHIN_S
        evidence = self._collector.evidence(since=since, has_served=True, **more)
        evidence = await asyncio.to_thread(self._witnesses.testify, evidence)
        await self._factory.ending.kill(engine)
        return await self._conclude(await self._without_remains(evidence, engine))

    async def _without_remains(self, evidence: Evidence, engine: Engine | None = None) -> Evidence:
        """When nothing of the engine is left, its processes and its memory; what stays has become evidence."""
        if unkillable := await self._factory.ending.remains(engine):
            return replace(evidence, unkillable=unkillable)
        await self.wait_for_memory()
        return evidence

    async def wait_for_memory(self) -> None:
        """The next engine measures what is free: the last one's memory must be back by then."""
        tell = get_logger().warning
        await gpu_gate.wait_for_memory(
            self._witnesses.gpus,
            self._witnesses.devices,
            needed_free_bytes=None,
            own_pids=self._factory.ending.pids(),
            timeout_s=_MEMORY_BACK_S,
            tell=tell,
        )

    async def _conclude(self, evidence: Evidence, failure: Failure | None = None) -> Failure:
        failure = failure or classify(evidence)
        if self._factory.weights.pids and not (evidence.has_served and failure.kind in KEEPS_WEIGHTS):
            await self._let_go_of_weights(has_served=evidence.has_served)
        metrics.engine_failures.labels(failure.kind.value).inc()
        get_logger().error("engine failed", **_fields(failure, evidence))
        entry = {"time": time.time(), "failure": failure.to_json(), "evidence": evidence.to_json()}
        self.last = (entry, *self.last)[:10]
        if warning := await asyncio.to_thread(append_failure, self._state, entry):
            get_logger().warning(warning)
        return failure

    async def _let_go_of_weights(self, *, has_served: bool) -> None:
        weights = self._factory.weights
        get_logger().info("weights in GPU memory are let go of: the next engine reads them anew")
        if not has_served:
            weights.judge(has_come_up=False)
        await asyncio.to_thread(weights.drop)
        await self.wait_for_memory()


def _fields(failure: Failure, evidence: Evidence) -> dict[str, Any]:
    """The journal entry's fields: the verdict, and all that led to it, in text. What is empty is left out."""
    errors = [f"{each.process}: {each.type}: {each.text}\n  in {' > '.join(each.frames)}" for each in evidence.errors]
    fields = {
        "kind": failure.kind.value,
        "failure": failure.detail,
        "advice": failure.advice,
        "place": failure.place.value,
        "phase": evidence.phase,
        "errors": "\n".join(errors),
        "exit_codes": ", ".join(f"{process} {code}" for process, code in evidence.exit_codes.items()),
        "oom_kills": evidence.oom_kills,
        "xids": ", ".join(map(str, evidence.xids)),
        "kernel_log": "\n".join(evidence.kernel_log),
        "gpu_holders": "; ".join(map(str, evidence.gpu_holders)),
        "unkillable": "; ".join(evidence.unkillable),
        "output": "\n".join(evidence.output_tail),
    }
    return {name: value for name, value in fields.items() if value}
