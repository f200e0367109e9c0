"""`run`: the daemon in the foreground; what the unit's ExecStart calls."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from llm_serve.core.errors import ConfigError, HostError, LlmServeError
from llm_serve.core.instance_file import check_exposure
from llm_serve.core.plan import EnginePlan
from llm_serve.core.settings import Settings
from llm_serve.host import boot, listening, logs
from llm_serve.host.instances import read_api_keys, read_instance
from llm_serve.host.systemd import Notifier, notifier


def run(target: str) -> int:
    """Serve the instance that `target` names. Returns the exit status of the process."""
    manager = notifier(os.environ)
    try:
        settings, text = read_instance(target)
        keys = read_api_keys(settings, os.environ)
        if (problem := check_exposure(settings, bool(keys))) is not None:
            raise ConfigError((problem,))
    except LlmServeError as error:
        return report(error, manager)
    return serve(settings, text, keys, manager)


def report(error: LlmServeError, manager: Notifier) -> int:
    """Say on stderr and to systemd why nothing runs. Returns the exit status."""
    for line in str(error).splitlines():
        print(f"llm-serve: {line}", file=sys.stderr)
    manager.status(str(error))
    return error.exit_status


def serve(
    settings: Settings,
    text: str,
    keys: tuple[str, ...],
    manager: Notifier,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Bind the sockets, then serve. Ends the process's threads with it: a start that hangs must not keep it alive."""
    logs.set_up(settings.name, level=settings.log.level, output_format=settings.log.format)
    try:
        runtime = boot.runtime_folder(settings.name, os.environ)
        listener = listening.open_listener(settings, manager)
        control = listening.open_control(runtime / "control.sock")
    except (LlmServeError, OSError) as error:
        wrapped = error if isinstance(error, LlmServeError) else HostError(str(error))
        return report(wrapped, manager)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        status = runner.run(_serve(settings, text, keys, manager, runtime, (listener, control), on_ready))
        sys.stdout.flush()
        sys.stderr.flush()
        # A thread inside vLLM may never return; nothing of the engine is left, so nothing is waited for.
        os._exit(status)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop
    return None


async def _serve(
    settings: Settings,
    text: str,
    keys: tuple[str, ...],
    manager: Notifier,
    runtime: Path,
    sockets: tuple[socket.socket, socket.socket],
    on_ready: Callable[[], None],
) -> int:
    from prometheus_client import REGISTRY

    from llm_serve import metrics
    from llm_serve.engine import architectures, evidence, factory, openai_routes, relay
    from llm_serve.supervisor import Instance, Supervisor
    from llm_serve.web import gate, operations
    from llm_serve.web.server import Server

    factory.remove_leftovers(runtime)
    collector = evidence.Collector()

    def on_record(value: relay.Record) -> None:
        collector.add_record(value)
        logs.relayed(value)

    def on_output(line: str) -> None:
        collector.add_output(line)
        logs.get_logger().info(line, vllm_process="output")

    receiver = relay.Receiver(runtime, on_record, on_output)
    routes = openai_routes.allowed(anthropic_messages=settings.server.anthropic_messages)
    instance = Instance(settings, text, EnginePlan.from_settings(settings), routes)
    engines = factory.Factory(runtime, collector, receiver, settings.log.level.upper())
    supervisor = Supervisor(instance, manager, engines, collector, on_ready)
    names = tuple(instance.plan.arguments.get("served_model_name") or (settings.model,))
    inside = operations.create(supervisor.snapshot, names)
    supervisor.gate = gate.Gate(
        keys=gate.Keys(keys),
        limits=gate.Limits(settings.server.max_queued, settings.server.hold_timeout_s),
        routes=routes,
        operations=inside,
        open_metrics=settings.server.open_metrics,
    )
    REGISTRY.register(metrics.SnapshotCollector(supervisor.snapshot))
    servers = [Server(supervisor.gate, sockets[0]), Server(inside, sockets[1])]
    for server in servers:
        await server.start()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.request_stop)
    try:
        return await supervisor.run(architectures.named_by(settings.model))
    finally:
        await asyncio.gather(*(server.stop() for server in servers))
        receiver.close()
        (runtime / "control.sock").unlink(missing_ok=True)
