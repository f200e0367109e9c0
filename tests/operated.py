"""A control socket with the real operations application behind it, and no engine: a test says what it tells."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, Response

from llm_serve import metrics
from llm_serve.core.status import Snapshot
from llm_serve.host import listening
from llm_serve.web import operations
from llm_serve.web.server import Server


def snapshot(name: str, **values: Any) -> Snapshot:
    """One instance that serves, for an hour and a minute."""
    known: dict[str, Any] = {
        "instance": name, "model": "Qwen/Qwen2.5-7B", "state": "serving", "why": "the engine answers",
        "since": time.time() - 3690, "started": time.time() - 90061, "uptime_s": 90061.0, "phase": "serving",
        "progress": 1.0, "version": "1", "vllm_version": "0.32.0", "pid": 7, "listen": "127.0.0.1:8000",
        "source": f"/etc/llm-serve/{name}.toml", "max_model_len": 2048, "max_num_seqs": 8, "engine_starts": 2,
        "engine_pids": (8, 9),
    }  # fmt: skip
    return Snapshot(**known | values)


@dataclass
class Told:
    """What it tells: /status, and the families of an engine in /metrics. Tokens grow with every look."""

    now: Snapshot
    running: float = 0.0
    waiting: float = 0.0
    kv: float = 0.0
    tokens: float = 0.0
    looks: int = 0

    async def status(self, _: int | None = None) -> Response:
        """As the supervisor has it."""
        return JSONResponse(self.now.to_json())

    async def metrics(self) -> Response:
        """As vLLM writes it."""
        self.looks += 1
        self.tokens += 100
        engine = '{engine="0",model_name="m"}'
        first = ('le="0.1"', self.looks), ('le="1.0"', 2 * self.looks), ('le="+Inf"', 2 * self.looks)
        lines = [
            f"vllm:num_requests_running{engine} {self.running}",
            f"vllm:num_requests_waiting{engine} {self.waiting}",
            f"vllm:kv_cache_usage_perc{engine} {self.kv}",
            f"vllm:generation_tokens_total{engine} {self.tokens}",
            f"vllm:prompt_tokens_total{engine} {2 * self.tokens}",
            f"vllm:request_success_total{engine} 4.0",
            f"vllm:prefix_cache_queries_total{engine} 200.0",
            f"vllm:prefix_cache_hits_total{engine} 50.0",
            f"vllm:num_preemptions_total{engine} 3.0",
            f"llm_serve_plan_max_num_seqs {self.now.max_num_seqs}" if self.now.max_num_seqs else "",
            *(f'vllm:time_to_first_token_seconds_bucket{{engine="0",{le}}} {count}' for le, count in first),
        ]
        return Response("\n".join(lines) + "\n", media_type=metrics.CONTENT_TYPE)

    def tell(self, **values: Any) -> None:
        """Change what /status says."""
        self.now = replace(self.now, **values)


@contextmanager
def operated(place: Path, name: str, **values: Any) -> Iterator[Told]:
    """An instance of this name that is asked at place/NAME/control.sock."""
    told = Told(snapshot(name, **values))
    path = place / name / "control.sock"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    listener = listening.open_control(path)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = Server(operations.create(lambda: told.now, (), told), listener)
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        yield told
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        listener.close()
        path.unlink(missing_ok=True)
