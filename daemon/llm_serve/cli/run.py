"""`run`: the daemon in the foreground; what the unit's ExecStart calls."""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_serve.core.budgets import budgets
from llm_serve.core.company import ALONE
from llm_serve.core.errors import ConfigError, LlmServeError
from llm_serve.core.instance_file import check_exposure
from llm_serve.core.plan import EnginePlan
from llm_serve.core.settings import Settings
from llm_serve.host import boot, closed_network, listening, logs, model_identity, open_files
from llm_serve.host.instances import read_api_keys, read_instance
from llm_serve.host.systemd import Notifier, notifier

if TYPE_CHECKING:
    # Half a second of FastAPI and uvicorn that a refused file need not wait for.
    from fastapi import FastAPI

    from llm_serve.engine.ending import Places
    from llm_serve.engine.relay import Receiver
    from llm_serve.front_ends.pool import FrontEnds
    from llm_serve.host.board import Seat
    from llm_serve.host.closed_network import Network
    from llm_serve.instance import Instance
    from llm_serve.supervisor import Supervisor
    from llm_serve.web.gate import Gate

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
    open_files.allow(2 * settings.server.max_connections)
    for sentence in budgets(settings):
        logs.get_logger().info(f"in the worst case, {sentence}")
    # From the moment the socket is there, somebody may wait for an answer: what takes long comes before it.
    for name in ("llm_serve.supervisor", "llm_serve.web.server", "llm_serve.web.operations", "llm_serve.door"):
        importlib.import_module(name)
    from llm_serve import door

    try:
        runtime = boot.runtime_folder(settings.name, os.environ)
        listener = listening.open_listener(settings, start.manager)
        boot.claim(runtime)
        control = listening.open_control(runtime / "control.sock")
        network = closed_network.prepare(settings, runtime, _finder(settings))
    except LlmServeError as error:
        return report(error, start.manager)
    with asyncio.Runner(loop_factory=door.loop_factory()) as runner:
        status = runner.run(_serve(start, runtime, (listener, control), network))
        logs.close()
        sys.stdout.flush()
        sys.stderr.flush()
        # A thread inside vLLM may never return; nothing of the engine is left, so nothing is waited for.
        os._exit(status)


def _finder(settings: Settings) -> Callable[[str], bool]:
    """Says of a model whether its weights are on this machine."""
    from llm_serve.engine.weights import are_here

    environ, asked = {**os.environ, **settings.engine_env}, settings.engine.get("revision")

    def is_here(model: str) -> bool:
        revision = asked if model == settings.model and isinstance(asked, str) else None
        return are_here(model, model_identity.snapshot(model, environ, revision))

    return is_here


async def _serve(start: Start, runtime: Path, sockets: tuple[socket.socket, socket.socket], network: Network) -> int:
    """Put the parts together, run them, and take them down again. The sockets are the clients' and the control's."""
    from prometheus_client import REGISTRY

    from llm_serve import door, metrics
    from llm_serve.chronicle import Chronicle
    from llm_serve.core import tally
    from llm_serve.engine import architectures, ending
    from llm_serve.host.board import Board, Seat
    from llm_serve.web import operations
    from llm_serve.web.server import Server

    places = ending.Places(runtime, boot.state_folder(runtime, os.environ))
    ending.remove_leftovers(places)
    listener, control = sockets
    supervisor, receiver = _supervisor(start, places, network)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, supervisor.request_stop)
    REGISTRY.register(metrics.SnapshotCollector(supervisor.snapshot))
    count = start.settings.server.front_ends
    seat = Seat(Board(count), 0) if count > 1 else None
    whole = operations.Here(supervisor.snapshot)
    inside = operations.create(supervisor.snapshot, door.model_names(start.settings), whole)
    supervisor.gate = gate = door.make_gate(start.settings, start.keys, inside, seat or ALONE)
    front_ends = _front_ends(supervisor, gate, seat, listener, runtime) if seat is not None else None
    if front_ends is not None:
        whole.render = front_ends.metrics
    chronicle = Chronicle(supervisor.snapshot, lambda: front_ends.tallies if front_ends else (tally.HERE.cells,))
    whole.history = chronicle.after

    def adopt(now: Instance) -> None:
        door.reconfigure(gate, now.settings, now.keys)
        if front_ends is not None:
            front_ends.reconfigure(now)

    supervisor.on_change = adopt
    _take_orders(supervisor, start.manager, inside)
    entrance = door.entrance(gate, start.settings)
    asked = start.settings.server
    servers = [Server(entrance, listener, door.timeouts(asked), seat, door.places(asked)), Server(inside, control)]
    for server in servers:
        await server.start()
    keeping = asyncio.create_task(chronicle.keep())
    try:
        return await supervisor.run(architectures.named_by(start.settings.model))
    finally:
        keeping.cancel()
        others = [front_ends.end()] if front_ends is not None else []
        await asyncio.gather(*(server.stop() for server in servers), *others)
        receiver.close()
        if network.broker is not None:
            network.broker.close()
        (runtime / "control.sock").unlink(missing_ok=True)


def _supervisor(start: Start, places: Places, network: Network) -> tuple[Supervisor, Receiver]:
    from llm_serve import door
    from llm_serve.engine import evidence, factory, relay
    from llm_serve.instance import Instance
    from llm_serve.supervisor import Supervisor

    collector = evidence.Collector()

    def on_record(value: relay.Record) -> None:
        ended = value.get("ended")
        if ended is None or ended[0] not in engines.ending.spared:  # what ends a front end explains no engine's failure
            collector.add_record(value)
        logs.relayed(value)

    def on_output(line: str) -> None:
        collector.add_output(line)
        logs.get_logger().info(line, vllm_process="output")

    receiver = relay.Receiver(places.runtime, on_record, on_output)
    origin = factory.Origin(start.settings.source, start.text)
    engines = factory.Factory(places, collector, receiver, origin)
    engines.network = network
    plan = EnginePlan.from_settings(start.settings)
    instance = Instance(start.settings, plan, door.routes(start.settings), places.state, start.text, start.keys)
    return Supervisor(instance, start.manager, engines, collector, start.on_ready), receiver


def _front_ends(supervisor: Supervisor, gate: Gate, seat: Seat, listener: socket.socket, runtime: Path) -> FrontEnds:
    """The front ends beside this process's own, which are forked as soon as there is what they are forked from."""
    from llm_serve.engine.attach import Party
    from llm_serve.front_ends.birth import Birth
    from llm_serve.front_ends.pool import FrontEnds

    loop, places = asyncio.get_running_loop(), len(seat.board.rows)

    def birth(place: int) -> Birth:
        now = supervisor.instance
        control, to_journal = runtime / "control.sock", logs.is_to_journal()
        return Birth(place, places, now.settings, now.keys, control, supervisor.snapshot(), to_journal)

    def invite(epoch: int, offer: bytes) -> None:
        loop.call_soon_threadsafe(front_ends.attach, epoch, offer)

    front_ends = FrontEnds(gate, seat, listener, birth, Party(places - 1, invite))
    supervisor.join(front_ends)
    return front_ends


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
