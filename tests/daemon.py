"""One `llm-serve run` as a real process: its file, its private folders, its log, and what is left when it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

import llm_serve
from llm_serve.host.processes import shared_memory_of
from tests.patience import patient

MODEL_NAME = "smollm2-135m-instruct"
ENGINE: Mapping[str, Any] = {
    "served_model_name": [MODEL_NAME],
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 256 << 20,
}
START_LIMIT_S, STOP_LIMIT_S = 180, 60
_CONSOLE_ENTRY = "from llm_serve.cli.main import main; main()"
_SHARED_MEMORY = Path("/dev/shm")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")

Tables = Mapping[str, Mapping[str, Any]]
Seen = TypeVar("Seen")


def http_client(url: str, timeout_s: float = 120, **options: Any) -> httpx.Client:
    """One of plain HTTP. Without `verify=False` each would read and parse all known certificates, 20 ms at best."""
    return httpx.Client(base_url=url, timeout=timeout_s, trust_env=False, verify=False, **options)


def eventually(look: Callable[[], Seen], is_right: Callable[[Seen], bool], *, within_s: float, what: str) -> Seen:
    """What `look` returned when it was right. Fails at the deadline with what it last saw."""
    deadline, last = time.monotonic() + patient(within_s), "nothing"
    while True:
        try:
            seen = look()
            if is_right(seen):
                return seen
            last = repr(seen)
        except httpx.TransportError as error:
            last = repr(error)
        assert time.monotonic() < deadline, f"{what}: not within {patient(within_s):g} s; last seen: {last}"
        time.sleep(0.05)


def free_port() -> int:
    """A TCP port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def instance_text(model: str | Path, tables: Tables) -> str:
    """An instance file. What TOML has in common with JSON is all that a test needs."""
    lines = [f"model = {json.dumps(str(model))}"]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)


class Daemon:
    """`llm-serve run FILE` with folders of its own, by which whatever it leaves behind can be found.

    `tables` are those of the instance file; a free port, and the settings in ENGINE, are filled in. `wrapped_in` is a
    command that becomes the one that follows it.
    """

    def __init__(
        self,
        model: str | Path,
        tables: Tables | None = None,
        *,
        text: str | None = None,
        environ: Mapping[str, str] | None = None,
        wrapped_in: Sequence[str] = (),
        is_apart: bool = False,
    ) -> None:
        """`is_apart`: in a session of its own, as a service is. The kernel shares CPU time between sessions, so that it
        computes while clients are busy, for benches; and while tests want to look, where that is in their way."""
        self.folder = Path(tempfile.mkdtemp(prefix="lls-"))  # short: the path of a unix socket has 107 characters
        self.runtime, self.temporary = self.folder / "run", self.folder / "tmp"
        for folder in (self.runtime, self.temporary):
            folder.mkdir(mode=0o700)
        tables = tables or {}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.file = self.folder / "tiny.toml"
        server = {"listen": f"127.0.0.1:{self.port}"} | dict(tables.get("server", {}))
        engine = dict(ENGINE) | dict(tables.get("engine", {}))
        whole = dict(tables) | {"server": server, "engine": engine}
        self.file.write_text(text if text is not None else instance_text(model, whole))
        self._wrapped_in = wrapped_in
        self._group: dict[str, Any] = {"start_new_session": True} if is_apart else {"process_group": 0}
        self._log = self.folder / "log"
        self._environ = self._environment() | dict(environ or {})
        self._shared_before = set(_SHARED_MEMORY.iterdir())
        self._process: subprocess.Popen[bytes] | None = None
        self.http = http_client(self.url, patient(120))

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("NOTIFY_", "LISTEN_", "JOURNAL_"))
        }
        path = str(Path(llm_serve.__file__).parents[1])
        own = {"PYTHONPATH": path, "XDG_RUNTIME_DIR": str(self.runtime), "TMPDIR": str(self.temporary)}
        return kept | own | {"HF_HUB_OFFLINE": "1"}

    # Its life.
    def start(self) -> Daemon:
        """Start the process and return at once."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._wrapped_in, sys.executable, "-c", _CONSOLE_ENTRY, "run", str(self.file)],
                env=self._environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._group,
            )  # fmt: skip
        return self

    def check(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run `llm-serve check` on its file."""
        command = [sys.executable, "-c", _CONSOLE_ENTRY, "check", str(self.file), *options]
        return subprocess.run(
            command, env=self._environ, check=False, capture_output=True, text=True, timeout=patient(120)
        )

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of `llm-serve` on its file, as its user does."""
        return self.llm_serve(*words, str(self.file))

    def llm_serve(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of `llm-serve`, as its user does."""
        command = [sys.executable, "-c", _CONSOLE_ENTRY, *words]
        try:
            return subprocess.run(
                command, env=self._environ, check=False, capture_output=True, text=True, timeout=patient(300)
            )
        except subprocess.TimeoutExpired as late:
            raise AssertionError(f"{late}; it said {late.stderr!r}; the daemon:\n{self.log()[-6000:]}") from None

    def rewrite(self, old: str, new: str) -> str:
        """Replace this in its file. Returns what the file was before."""
        before = self.file.read_text()
        assert old in before, before
        self.file.write_text(before.replace(old, new))
        return before

    @property
    def pid(self) -> int:
        """The daemon's own pid."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    def wait_for_answers(self) -> Daemon:
        """Wait until the HTTP server is there; the model is not."""
        eventually(
            lambda: self._alive().get("/livez").status_code, lambda code: code == 200, within_s=60, what="/livez"
        )
        return self

    def wait_ready(self, within_s: float = START_LIMIT_S) -> Daemon:
        """Wait until /readyz says 200."""
        self.wait_until(lambda seen: seen.status_code == 200, within_s=within_s)
        return self

    def wait_until(self, is_right: Callable[[httpx.Response], bool], within_s: float = START_LIMIT_S) -> httpx.Response:
        """Wait for an answer of /readyz."""
        look = lambda: self._alive().get("/readyz")  # noqa: E731 - named where it is used
        try:
            return eventually(look, is_right, within_s=within_s, what="/readyz")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()[-6000:]}") from None

    def _alive(self) -> httpx.Client:
        assert self._process is not None
        assert self._process.poll() is None, f"it ended with {self._process.returncode}:\n{self.log()[-6000:]}"
        return self.http

    def signal(self, number: signal.Signals) -> None:
        """Send the daemon's own process a signal."""
        os.kill(self.pid, number)

    def wait_for_exit(self, within_s: float = STOP_LIMIT_S) -> int:
        """The exit status, waited for."""
        assert self._process is not None
        try:
            return self._process.wait(patient(within_s))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {within_s:g} s:\n{self.log()[-6000:]}") from None

    def stop(self, expected: int = 0) -> None:
        """SIGTERM, as systemd would, and the exit status."""
        self.signal(signal.SIGTERM)
        status = self.wait_for_exit()
        assert expected == status, self.log()[-6000:]

    def destroy(self) -> None:
        """End everything, whatever happened before, and remove the folders."""
        self.http.close()
        if self._process is not None:
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self._process.kill()  # also when its environment could not be read
            self._process.wait(patient(10))
        for path in self.new_shared_memory():
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    # What can be seen of it.
    def log(self) -> str:
        """Everything that it has written, without colours."""
        return _ANSI.sub("", self._log.read_text(errors="replace")) if self._log.exists() else ""

    def status(self) -> dict[str, Any]:
        """The body of /status."""
        body: dict[str, Any] = self._alive().get("/status").raise_for_status().json()
        return body

    def metric(self, line: str) -> float:
        """The value of one series of /metrics, which `line` names with its labels; 0 when it is absent."""
        for candidate in self._alive().get("/metrics").raise_for_status().text.splitlines():
            name, _, value = candidate.rpartition(" ")
            if name == line:
                return float(value)
        return 0.0

    def processes(self) -> list[psutil.Process]:
        """Every living process that was started with the daemon's own runtime folder, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if self._is_ours(process) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        return process.environ().get("XDG_RUNTIME_DIR") == str(self.runtime)

    def new_shared_memory(self) -> list[Path]:
        """Files in /dev/shm that were not there before and that no process of somebody else has mapped."""
        return sorted(set(_SHARED_MEMORY.iterdir()) - self._shared_before - self._mapped_by_others())

    def _mapped_by_others(self) -> set[Path]:
        others = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if not self._is_ours(process):
                    others.append(process)
        return set(shared_memory_of(others))

    def temporary_files(self) -> list[str]:
        """Whatever lies in its TMPDIR and its runtime folder, folders that are empty left out."""
        found = [path for top in (self.temporary, self.runtime) for path in top.rglob("*") if not path.is_dir()]
        return sorted(str(path.relative_to(self.folder)) for path in found)

    # Requests.
    def chat(self, content: str = "Say hello.", **options: Any) -> httpx.Response:
        """One chat completion, as plain HTTP."""
        body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 8}
        headers = options.pop("headers", None)
        return self.http.post("/v1/chat/completions", json=body | options, headers=headers)

    def later(self, ask: Callable[[], Any]) -> Later:
        """Run `ask` in a thread of its own."""
        return Later(ask)

    @contextlib.contextmanager
    def stream(self, max_tokens: int, *, is_endless: bool = False) -> Iterator[Stream]:
        """One streamed completion of exactly so many tokens, read in a thread; an endless one is asked for again."""
        stream = Stream(self.url, max_tokens, is_endless=is_endless)
        try:
            yield stream
        finally:
            stream.close()


class Later:
    """The result, or the error, of a call that runs in a thread."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._ask = ask
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._ask()
        except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread
            self._error = error

    @property
    def is_done(self) -> bool:
        """True when there is a result."""
        return not self._thread.is_alive()

    def result(self, within_s: float = START_LIMIT_S) -> Any:
        """What the call returned; what it raised is raised here."""
        self._thread.join(patient(within_s))
        assert self.is_done, f"no result within {patient(within_s):g} s"
        if self._error is not None:
            raise self._error
        return self._value


class Stream:
    """One streamed answer, read as it comes: `events` are its data lines as values, `end` is "[DONE]" if it had that."""

    def __init__(self, url: str, max_tokens: int, *, is_endless: bool = False) -> None:
        self.events: list[dict[str, Any]] = []
        self.end: str | None = None
        self._is_endless = is_endless
        self._body = {
            "model": MODEL_NAME, "prompt": "Count with me: one, two, three,", "stream": True,
            "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        self._client = http_client(url, patient(120))
        self._reading = Later(self._read)

    def _read(self) -> None:
        try:
            self._read_once()
            while self._is_endless:  # closed, it raises
                self._read_once()
        finally:
            self._client.close()

    def _read_once(self) -> None:
        with self._client.stream("POST", "/v1/completions", json=self._body) as answer:
            assert 200 == answer.status_code, answer.read()
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.end = "[DONE]"
                elif line.startswith("data: "):
                    self.events.append(json.loads(line.removeprefix("data: ")))

    def wait_for_tokens(self, number: int, within_s: float = 60) -> None:
        """Wait until so many events have come."""
        eventually(lambda: len(self.events), lambda seen: seen >= number, within_s=within_s, what="streamed events")

    def wait(self, within_s: float = START_LIMIT_S) -> Stream:
        """Wait until the server has ended the answer properly; a connection cut in the middle raises."""
        self._reading.result(within_s)
        return self

    @property
    def errors(self) -> list[dict[str, Any]]:
        """The error objects among the events."""
        return [event["error"] for event in self.events if "error" in event]

    @property
    def finish_reasons(self) -> list[str]:
        """Every finish_reason that the client was told."""
        choices = [choice for event in self.events for choice in event.get("choices", ())]
        return [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()
