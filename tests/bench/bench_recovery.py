"""Recovery: llm-serve against vLLM's own API server that somebody starts again whenever it ends, as `Restart=always` does.

    python -m tests.bench.bench_recovery [--model FOLDER] [--rounds 3] [--only start|kill|fit|hang|gap] [--json FILE]
                                         [--streams 8] [--arguments JSON]

Same model, same arguments, same load: clients that ask for one streamed answer after the other and, after an error,
ask again half a second later. A shell loop with a pause of 1 s stands for systemd. The arguments are for two cores;
on a GPU: --streams 64 --arguments '{"max_model_len": 8192}', for example.

start The first start, with empty caches, and the next one: seconds to the first answer of one token.
kill  EngineCore is killed under load: seconds to the next answer that is complete.
fit   the KV cache is too small for max_model_len: engine starts until it serves.
hang  EngineCore is stopped under load: seconds until the server says that it is not well, and until it answers.
gap   EngineCore is killed in the middle of one stream, llm-serve's only: the longest silence in it, and its parts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil

import llm_serve
from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.bench import servers
from tests.daemon import Daemon, eventually, free_port, instance_text

_TOKENS = 50
_STALL_TIMEOUT_S, _WATCH_A_HANG_S, _WATCH_A_LOOP_S = 20, 60, 120
_START_LIMIT_S = 240
_SETTLED_S = 1
"""By then an answer that was complete when the engine was killed has been read, and no new engine is there yet."""
_TOO_SMALL = {"max_model_len": 8192, "kv_cache_memory_bytes": 128 << 20}
_CACHES = ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What both servers get: the model's folder, the engine's arguments, clients, how often a fault comes, variables."""

    model: Path
    arguments: Mapping[str, Any]
    streams: int
    rounds: int
    environ: Mapping[str, str] = field(default_factory=dict)


# ---- the clients --------------------------------------------------------------------------------------


@dataclass
class Outcomes:
    """What became of each request, by the monotonic time at which it ended.

    completed, error (an event that says so), cut (ended in the middle without a word), refused (no connection, or an
    error status), unanswered (still open when the clients gave up).
    """

    ended: list[tuple[float, str]] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def note(self, how: str) -> None:
        """One request has ended."""
        self.ended.append((time.monotonic(), how))

    def completed_after(self, moment: float) -> list[float]:
        """Seconds from `moment` to each answer that was complete after it."""
        return [when - moment for when, how in self.ended if how == "completed" and when > moment]

    def wait_for(self, number: int, since: float, within_s: float) -> float:
        """Wait for so many complete answers after `since`. Returns the seconds to the first."""
        look: Callable[[], list[float]] = lambda: self.completed_after(since)  # noqa: E731 - its type, beside its use
        return eventually(look, lambda seen: len(seen) >= number, within_s=within_s, what="complete answers")[0]

    def one_answer_s(self, streams: int) -> float:
        """What an answer takes, from the second of each client. Who begin together end together: a fault's moment counts."""
        self.wait_for(2 * streams, 0, _START_LIMIT_S)
        ended = self.completed_after(0)
        return ended[2 * streams - 1] - ended[streams - 1]

    def lost(self, since: float) -> dict[str, int]:
        """Requests that ended after `since` without a complete answer, by how."""
        return dict(Counter(how for when, how in self.ended if how != "completed" and when > since))


@contextlib.contextmanager
def clients(url: str, streams: int) -> Iterator[Outcomes]:
    """So many clients at work, in a thread of their own, for the length of a block."""
    outcomes = Outcomes()
    thread = threading.Thread(target=lambda: asyncio.run(_ask_until_over(url, streams, outcomes)))
    thread.start()
    try:
        yield outcomes
    finally:
        outcomes.is_over.set()
        thread.join()


async def _ask_until_over(url: str, streams: int, outcomes: Outcomes) -> None:
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        asking = [asyncio.create_task(_ask_again_and_again(session, url, outcomes, each)) for each in range(streams)]
        while not outcomes.is_over.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.05)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def _ask_again_and_again(session: aiohttp.ClientSession, url: str, outcomes: Outcomes, client: int) -> None:
    while True:
        try:
            how = await _ask(session, url, client)
        except asyncio.CancelledError:
            outcomes.note("unanswered")
            raise
        outcomes.note(how)
        if how != "completed":
            await asyncio.sleep(0.5)


async def _ask(session: aiohttp.ClientSession, url: str, client: int, tokens: int = _TOKENS) -> str:
    body = {
        "model": servers.MODEL_NAME, "prompt": f"Tale number {client}: once upon a time", "stream": True,
        "max_tokens": tokens, "ignore_eos": True, "temperature": 0,
    }  # fmt: skip
    is_accepted, text = False, b""
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                return "refused"
            is_accepted = True
            async for line in response.content:
                text = line if line.strip() else text
                if line.startswith(b'data: {"error"'):
                    return "error"
    except (aiohttp.ClientError, OSError):
        return "cut" if is_accepted else "refused"
    return "completed" if text.strip() == b"data: [DONE]" else "cut"


# ---- the two servers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A server under test. `core()` is the pid of its EngineCore, `starts()` how often an engine was started."""

    url: str
    core: Callable[[], int]
    starts: Callable[[], int]

    def is_well(self) -> bool:
        """What its /health says."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@contextlib.contextmanager
def ours(case: Case) -> Iterator[Server]:
    """`llm-serve run FILE`."""
    daemon = _daemon(case).start()
    try:
        daemon.wait_for_answers()
        yield Server(
            daemon.url,
            core=lambda: int(min(daemon.status()["engine_pids"])),
            starts=lambda: int(daemon.status()["engine_starts"]),
        )
    finally:
        daemon.destroy()


@contextlib.contextmanager
def theirs(case: Case) -> Iterator[Server]:
    """vLLM's own API server in a loop that starts it again 1 s after each end."""
    port = free_port()
    command = shlex.join(servers.vllm_command(case.model, port, case.arguments))
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | quiet | dict(case.environ)
    with tempfile.TemporaryDirectory(prefix="llm-serve-bench-") as folder:
        starts, log = Path(folder) / "starts", Path(folder) / "log"
        loop = f"while :; do echo start >>{starts}; {command}; sleep 1; done"
        with log.open("wb") as sink:
            shell = subprocess.Popen(
                ["sh", "-c", loop],
                env=environment | {"TMPDIR": folder}, stdout=sink, stderr=sink, start_new_session=True,
            )  # fmt: skip
        try:
            yield Server(
                f"http://127.0.0.1:{port}",
                core=lambda: _engine_core_below(shell.pid),
                starts=lambda: starts.read_text().count("start") if starts.exists() else 0,
            )
        finally:
            _end(shell)


def _engine_core_below(pid: int) -> int:
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "VLLM::EngineCore" in " ".join(process.cmdline()):
                return process.pid
    raise LookupError("no process is called VLLM::EngineCore")


def _end(shell: subprocess.Popen[bytes]) -> None:
    """The loop first, so that it starts nothing any more."""
    below = psutil.Process(shell.pid).children(recursive=True)
    shell.kill()
    for process in below:
        with contextlib.suppress(psutil.Error):
            process.kill()
    shell.wait()
    psutil.wait_procs(below, timeout=10)


def _daemon(case: Case, **log: str) -> Daemon:
    """With these arguments only, and as patient as the loop that it is compared with, which starts again for ever."""
    path = f"{Path(llm_serve.__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    daemon = Daemon(case.model, text="", environ={"PYTHONPATH": path, **case.environ}, is_apart=True)
    tables = {
        "server": {"listen": f"127.0.0.1:{daemon.port}"},
        "engine": dict(case.arguments) | {"served_model_name": [servers.MODEL_NAME]},
        "recovery": {"stall_timeout_s": _STALL_TIMEOUT_S, "restart_limit": 1000},
        "log": log,
    }
    daemon.file.write_text(instance_text(case.model, tables))
    return daemon


Serve = Callable[[Case], contextlib.AbstractContextManager[Server]]
SERVERS: Mapping[str, Serve] = {"llm-serve": ours, "vLLM": theirs}


# ---- the faults ---------------------------------------------------------------------------------------


def start(case: Case) -> dict[str, Figures]:
    """With empty caches, and again with what the first start left in them; a server is ended before the next starts."""
    figures: dict[str, Figures] = {}
    for name, serve in SERVERS.items():
        with tempfile.TemporaryDirectory(prefix="llm-serve-bench-") as folder:
            caches = {each: str(Path(folder) / each.lower()) for each in _CACHES}
            warmed = replace(case, environ=caches)
            figures[name] = {f"{which} start s": _first_answer_s(warmed, serve) for which in ("first", "next")}
    return figures | _ratios(figures, "first start s", "next start s")


def _first_answer_s(case: Case, serve: Serve) -> float:
    began = time.monotonic()

    async def ask(url: str) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
            while await _ask(session, url, 0, tokens=1) != "completed":
                assert time.monotonic() - began < _START_LIMIT_S, "no answer in time"
                await asyncio.sleep(0.1)

    with serve(case) as server:
        asyncio.run(ask(server.url))
        return round(time.monotonic() - began, 1)


def _ratios(figures: Mapping[str, Figures], *names: str) -> dict[str, Figures]:
    ours_, theirs_ = (figures[name] for name in SERVERS)
    return {"ratio": {name.removesuffix(" s"): round(ours_[name] / theirs_[name], 3) for name in names}}


def _after_kill(case: Case, server: Server, share: float) -> Figures:
    """Kill EngineCore when this share of an answer has been given; the load goes on until all are served again."""
    with clients(server.url, case.streams) as outcomes:
        time.sleep(share * outcomes.one_answer_s(case.streams))
        core, began = server.core(), time.monotonic()
        os.kill(core, signal.SIGKILL)
        first_s = _SETTLED_S + outcomes.wait_for(case.streams, began + _SETTLED_S, _START_LIMIT_S)
    lost = outcomes.lost(began)
    lost["unanswered"] = 0  # cancelled by us, when the measurement was over
    return {"next answer s": round(first_s, 2), "lost": {how: count for how, count in lost.items() if count}}


def kill(case: Case) -> dict[str, Figures]:
    """EngineCore killed under load, the same number of times for both."""
    figures: dict[str, Figures] = {}
    for name, serve in SERVERS.items():
        with serve(case) as server:
            seen = [_after_kill(case, server, (number + 0.5) / case.rounds) for number in range(case.rounds)]
        figures[name] = {
            "next answer s, median": statistics.median(each["next answer s"] for each in seen),
            "rounds": seen,
        }
    return figures | _ratios(figures, "next answer s, median")


def fit(case: Case) -> dict[str, Figures]:
    """A KV cache too small: engine starts until the server is well. Once, for what never ends cannot be repeated."""
    small = replace(case, arguments=dict(case.arguments) | _TOO_SMALL)
    figures: dict[str, Figures] = {}
    for name, serve in SERVERS.items():
        with serve(small) as server:
            began = time.monotonic()
            while not (is_well := server.is_well()) and time.monotonic() < began + _WATCH_A_LOOP_S:
                time.sleep(0.2)
            figures[name] = {
                "serves": is_well,
                "engine starts": server.starts(),
                "watched s": round(time.monotonic() - began, 1),
            }
    return figures


def _after_hang(case: Case, server: Server) -> Figures:
    with clients(server.url, case.streams) as outcomes:
        time.sleep(outcomes.one_answer_s(case.streams) / 2)
        stopped, began = psutil.Process(server.core()), time.monotonic()
        stopped.suspend()
        noticed = None
        while noticed is None and time.monotonic() < began + _WATCH_A_HANG_S:
            noticed = None if server.is_well() else round(time.monotonic() - began, 1)
            time.sleep(0.1)
        answered = None
        if noticed is not None:
            answered = round(outcomes.wait_for(case.streams, began, _START_LIMIT_S), 1)
    lost = outcomes.lost(began)
    if noticed is not None:
        lost.pop("unanswered", None)
    return {"noticed after s": noticed, "next answer s": answered, "lost": lost}


def hang(case: Case) -> dict[str, Figures]:
    """EngineCore stopped under load, and watched for a minute. Once: what is never noticed takes for ever."""
    figures: dict[str, Figures] = {}
    for name, serve in SERVERS.items():
        with serve(case) as server:
            figures[name] = _after_hang(case, server)
    return figures


_GAP_TOKENS = 200
_PARTS = {
    "noticed": "serving -> recovering",
    "explained and cleaned up": "engine failed",
    "built": "recovering -> serving",
}
"""The parts of a gap, in order, by the log entry that ends each; the last ends with the next token."""


def gap(case: Case) -> dict[str, Figures]:
    """One stream, gone on with after each kill: what its client waits for."""
    daemon = _daemon(case, format="json").start()
    try:
        seen = [_parts_of_gap(daemon.wait_ready()) for _ in range(case.rounds)]
    finally:
        daemon.destroy()
    return {"llm-serve": {f"{part} s": round(statistics.median(each[part] for each in seen), 2) for part in seen[0]}}


def _parts_of_gap(daemon: Daemon) -> dict[str, float]:
    heard: list[float] = []
    body = {
        "model": servers.MODEL_NAME,
        "prompt": "Once",
        "stream": True,
        "max_tokens": _GAP_TOKENS,
        "ignore_eos": True,
    }

    def listen() -> None:
        with daemon.http.stream("POST", "/v1/completions", json=body) as answer:
            heard.extend(time.time() for line in answer.iter_lines() if line.startswith("data: {"))

    listening = daemon.later(listen)
    time.sleep(1.5)
    killed_at = time.time()
    os.kill(min(daemon.status()["engine_pids"]), signal.SIGKILL)
    listening.result(_START_LIMIT_S)

    longest, ended_at = max((after - before, after) for before, after in itertools.pairwise(heard))
    moments = [killed_at, *(_logged_at(daemon, entry, killed_at) for entry in _PARTS.values()), ended_at]
    took = [after - before for before, after in itertools.pairwise(moments)]
    return {"longest silence": longest} | dict(zip([*_PARTS, "read again, and the next token"], took, strict=True))


def _logged_at(daemon: Daemon, event: str, since: float) -> float:
    """When this was first logged after a moment."""
    entries = (json.loads(line) for line in daemon.log().splitlines() if line.startswith("{"))
    times = (datetime.fromisoformat(each["timestamp"]).timestamp() for each in entries if each["event"] == event)
    return next(moment for moment in times if moment > since)


FAULTS: dict[str, Callable[[Case], dict[str, Figures]]] = {
    "start": start, "kill": kill, "fit": fit, "hang": hang, "gap": gap,
}  # fmt: skip


def _table(found: Mapping[str, Mapping[str, Figures]]) -> Iterator[str]:
    for fault, by_server in found.items():
        for name, figures in by_server.items():
            shown = {key: value for key, value in figures.items() if key != "rounds"}
            if "rounds" in figures:
                shown["lost"] = sum((Counter(each["lost"]) for each in figures["rounds"]), Counter())
            yield f"{fault:6} {name:10} " + ", ".join(
                f"{key}: {dict(value) if isinstance(value, Counter) else value}" for key, value in shown.items()
            )


def main() -> None:
    """Measure, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; the demo's without it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--arguments", type=json.loads, default=servers.ARGUMENTS, help="the engine's, as JSON")
    parser.add_argument("--only", choices=FAULTS, action="append", help="this fault; may be given again")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = given.model or ensure_demo_model(default_cache(os.environ), print)
    case = Case(model, given.arguments, given.streams, given.rounds)
    found: dict[str, dict[str, Figures]] = {}
    for fault in given.only or FAULTS:
        found[fault] = FAULTS[fault](case)
        print("\n".join(_table({fault: found[fault]})), flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
