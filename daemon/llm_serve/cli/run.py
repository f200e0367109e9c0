"""`run`: the daemon in the foreground; what the unit's ExecStart calls."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_serve.core.budgets import budgets
from llm_serve.core.errors import ConfigError, LlmServeError
from llm_serve.core.instance_file import check_exposure
from llm_serve.core.plan import EnginePlan
from llm_serve.core.settings import ServerSettings, Settings
from llm_serve.engine import openai_routes
from llm_serve.engine.openai_routes import Route
from llm_serve.host import boot, listening, logs
from llm_serve.host.instances import read_api_keys, read_instance
from llm_serve.host.systemd import Notifier, notifier

if TYPE_CHECKING:
    # Half a second of FastAPI and uvicorn that a refused file need not wait for.
    from fastapi import FastAPI

    from llm_serve.engine.factory import Places
    from llm_serve.engine.relay import Receiver
    from llm_serve.instance import Instance
    from llm_serve.supervisor import Supervisor
    from llm_serve.web.asgi import Asgi
    from llm_serve.web.gate import Gate
    from llm_serve.web.limits import Limits

_STDIN = 0


def run(target: str) -> int:
    """Serve the instance that `target` names. Returns the exit status of the process."""
    manager = notifier(os.environ)
    try:
        start = Start(*read(target), manager)
    except LlmServeError as error:
        return report(error, manager)
    return serve(start)


def read(target: str) -> tuple[Settings, str, tuple[str, ...]]:
    """The settings that `target` names, the text they were read from, and the API keys. Raises ConfigError."""
    settings, text = read_instance(target)
    keys = read_api_keys(settings, os.environ)
    if (problem := check_exposure(settings, bool(keys), text)) is not None:
        raise ConfigError((problem,))
    return settings, text, keys


def report(error: LlmServeError, manager: Notifier) -> int:
    """Say on stderr and to systemd why nothing runs. Returns the exit status."""
    for line in str(error).splitlines():
        print(f"llm-serve: {line}", file=sys.stderr)
    manager.status(str(error))
    return error.exit_status


@dataclass(frozen=True)
class Start:
    """What one life of the daemon begins with. `on_ready` is called each time an engine begins to serve."""

    settings: Settings
    text: str
    keys: tuple[str, ...]
    manager: Notifier
    on_ready: Callable[[], None] = lambda: None


def serve(start: Start) -> int:
    """Bind the sockets, then serve. Ends the whole process when that is over."""
    settings = start.settings
    logs.set_up(settings.name, level=settings.log.level, output_format=settings.log.format)
    # Systemd ends a daemon that no longer answers it with SIGABRT: where it stood is the only thing to learn from.
    faulthandler.enable()
    for sentence in budgets(settings):
        logs.get_logger().info(f"in the worst case, {sentence}")
    # From the moment the socket is there, somebody may wait for an answer: what takes long comes before it.
    for name in ("llm_serve.supervisor", "llm_serve.web.server", "llm_serve.web.operations"):
        importlib.import_module(name)
    try:
        runtime = boot.runtime_folder(settings.name, os.environ)
        listener = listening.open_listener(settings, start.manager)
        boot.claim(runtime)
        control = listening.open_control(runtime / "control.sock")
    except LlmServeError as error:
        return report(error, start.manager)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        status = runner.run(_serve(start, runtime, listener, control))
        logs.close()
        sys.stdout.flush()
        sys.stderr.flush()
        # A thread inside vLLM may never return; nothing of the engine is left, so nothing is waited for.
        os._exit(status)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    with contextlib.suppress(ImportError):
        uvloop: Any = importlib.import_module("uvloop")
        factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
        return factory
    return None


async def _serve(start: Start, runtime: Path, listener: socket.socket, control: socket.socket) -> int:
    """Put the parts together, run them, and take them down again."""
    from prometheus_client import REGISTRY

    from llm_serve import metrics
    from llm_serve.engine import architectures, factory
    from llm_serve.web import operations
    from llm_serve.web.deadlines import Timeouts
    from llm_serve.web.server import Server

    places = factory.Places(runtime, boot.state_folder(runtime, os.environ))
    factory.remove_leftovers(places)
    supervisor, receiver = _supervisor(start, places)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, supervisor.request_stop)
    REGISTRY.register(metrics.SnapshotCollector(supervisor.snapshot))
    inside = operations.create(supervisor.snapshot, _model_names(start.settings))
    supervisor.gate = gate = _gate(start, inside)
    supervisor.on_change = partial(_reconfigure, gate)
    _take_orders(supervisor, start.manager, inside)
    timeouts = Timeouts(start.settings.server.header_timeout_s, start.settings.server.body_timeout_s)
    servers = [Server(gate, listener, timeouts), Server(inside, control)]
    for server in servers:
        await server.start()
    try:
        return await supervisor.run(architectures.named_by(start.settings.model))
    finally:
        await asyncio.gather(*(server.stop() for server in servers))
        receiver.close()
        (runtime / "control.sock").unlink(missing_ok=True)


def _supervisor(start: Start, places: Places) -> tuple[Supervisor, Receiver]:
    from llm_serve.engine import evidence, factory, relay
    from llm_serve.instance import Instance
    from llm_serve.supervisor import Supervisor

    collector = evidence.Collector()

    def on_record(value: relay.Record) -> None:
        collector.add_record(value)
        logs.relayed(value)

    def on_output(line: str) -> None:
        collector.add_output(line)
        logs.get_logger().info(line, vllm_process="output")

    receiver = relay.Receiver(places.runtime, on_record, on_output)
    origin = factory.Origin(start.settings.source, start.text)
    engines = factory.Factory(places, collector, receiver, origin)
    plan = EnginePlan.from_settings(start.settings)
    instance = Instance(start.settings, plan, _routes(start.settings), places.state, start.text, start.keys)
    return Supervisor(instance, start.manager, engines, collector, start.on_ready), receiver


def _take_orders(supervisor: Supervisor, manager: Notifier, inside: FastAPI) -> None:
    """From now on the file can be read again, as SIGHUP or the control socket asks, and admission be stopped."""
    from llm_serve.cli.check import Verdict, examine_engine
    from llm_serve.orders import Orders
    from llm_serve.web import operations

    source = supervisor.instance.settings.source

    def reread() -> Instance:
        settings, text, keys = read(source)
        plan = EnginePlan.from_settings(settings)
        return replace(supervisor.instance, settings=settings, plan=plan, text=text, keys=keys)

    def examine(instance: Instance) -> None:
        examine_engine(Verdict(instance.settings, instance.plan), instance.text)

    orders = Orders(supervisor, manager, read=reread, examine=examine)
    operations.take_orders(inside, orders.by_path())
    has_file, had_terminal = Path(source).is_file(), os.isatty(_STDIN)

    def hang_up() -> None:
        # The signal's other meaning: the window that this runs in has been closed.
        is_terminal_gone = had_terminal and not os.isatty(_STDIN)
        supervisor.request_stop() if is_terminal_gone or not has_file else orders.request_reload()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)


def _reconfigure(gate: Gate, instance: Instance) -> None:
    from llm_serve.web.keys import Keys

    server = instance.settings.server
    gate.reconfigure(Keys(instance.keys), _limits(server), open_metrics=server.open_metrics)


def _limits(server: ServerSettings) -> Limits:
    from llm_serve.web.limits import Limits

    return Limits(server.max_queued, server.hold_timeout_s, server.max_body_bytes, server.stream_keep_alive_s)


def _gate(start: Start, operations: Asgi) -> Gate:
    from llm_serve.web.gate import Gate
    from llm_serve.web.keys import Keys

    server = start.settings.server
    return Gate(
        keys=Keys(start.keys),
        limits=_limits(server),
        routes=_routes(start.settings),
        operations=operations,
        open_metrics=server.open_metrics,
    )


def _routes(settings: Settings) -> frozenset[Route]:
    return openai_routes.allowed(anthropic_messages=settings.server.anthropic_messages)


def _model_names(settings: Settings) -> tuple[str, ...]:
    """The names that vLLM will give the model: a list, or one, or the model itself."""
    names = settings.engine.get("served_model_name") or settings.model
    return (names,) if isinstance(names, str) else tuple(names)
