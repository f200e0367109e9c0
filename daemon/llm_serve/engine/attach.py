"""Several front ends on one engine: what its starter offers the others, and how one of them attaches to it.

vLLM serves several API servers by starting the engine for a list of addresses, two for each client, and by giving each
client its own pair and its number. Here the first client is the daemon's, made by the same code as an only one: it
starts the engine, and its start is told of the others' addresses on the way (`Party`).

A client of vLLM waits, in its constructor and for as long as it takes, for the engine's first words, which the engine
says once to each address. So a front end that replaces a dead one would wait for ever, and a start that fails would
leave a thread in each of the others. Therefore a front end's client is built on an address of its own, where it is
greeted by this process; the address that the engine connects to, again and again until somebody is there, is opened
after that (`meet`), and what the engine has said comes from the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import pickle
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

from llm_serve.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from llm_serve.engine.steps import StepWatch

_ENGINE = (0).to_bytes(2, "little")
"""The name under which the only engine connects."""
_MEET_EVERY_S = 0.02


@dataclass(frozen=True)
class Offer:
    """What a front end needs to attach to an engine: its configuration, its arguments, and where to open.

    `addresses` holds (requests, answers) for the places 1, 2, ... in turn; `env` are variables that hold meanwhile.
    """

    config: Any
    args: Namespace
    env: Mapping[str, str]
    addresses: tuple[tuple[str, str], ...]


def check(config: Any, source: str) -> None:
    """Refuse, with ConfigError, an engine that cannot be shared in this way; else prepare its configuration."""
    parallel, media = config.parallel_config, config.model_config.multimodal_config
    obstacle = None
    if parallel.data_parallel_size > 1:
        obstacle = "engine.data_parallel_size above 1"
    elif media is not None and media.mm_tensor_ipc != "direct_rpc":
        obstacle = f"engine.mm_tensor_ipc = {media.mm_tensor_ipc!r}"
    if obstacle is not None:
        message = f"several front ends do not go with {obstacle}."
        raise ConfigError([Problem(source, None, "server.front_ends", message, "Set it to 1.")])
    if media is not None and media.mm_processor_cache_type == "shm":
        media.mm_processor_cache_type = "lru"  # the other kind is between one client and its engine


class Party:
    """The front ends beside the daemon's own: `others` of them, which `invite(epoch, offer)` tells of each engine.

    It is called in the thread that builds the engine, with the offer pickled.
    """

    def __init__(self, others: int, invite: Callable[[int, bytes], None]) -> None:
        self._others, self._invite = others, invite
        self.clients = others + 1
        self.ready = b""
        """What the last engine has said of itself when it was ready."""

    @contextlib.contextmanager
    def invited(self, epoch: int, config: Any, args: Namespace, env: Mapping[str, str]) -> Iterator[None]:
        """The engine whose client is built inside is started for the others as well."""
        client: Any = importlib.import_module("vllm.v1.engine.core_client")
        network: Any = importlib.import_module("vllm.utils.network_utils")
        launch, apply = client.launch_core_engines, client.MPClient._apply_ready_response  # noqa: SLF001 - see below

        def launch_for_all(config_: Any, executor: Any, log_stats: Any, addresses: Any) -> Any:
            new = network.get_open_zmq_ipc_path
            pairs = tuple((new(), new()) for _ in range(self._others))
            addresses.inputs += [requests for requests, _ in pairs]
            addresses.outputs += [answers for _, answers in pairs]
            self._invite(epoch, bytes(ForkingPickler.dumps(Offer(config, args, env, pairs))))
            return launch(config_, executor, log_stats, addresses)

        def apply_and_keep(self_: Any, payload: bytes) -> None:
            self.ready = bytes(payload)
            apply(self_, payload)

        client.launch_core_engines = launch_for_all
        client.MPClient._apply_ready_response = apply_and_keep  # noqa: SLF001 - it is nowhere said in public
        try:
            yield
        finally:
            client.launch_core_engines, client.MPClient._apply_ready_response = launch, apply  # noqa: SLF001


@dataclass
class Client:
    """A front end's client of an engine."""

    llm: Any
    args: Namespace
    steps: StepWatch
    address: str


def build(offered: bytes, place: int, places: int) -> Client:
    """A client for this place, which has not met its engine yet. Takes its time: call it in a thread."""
    import zmq

    from llm_serve.engine import forkserver, loading

    offer: Offer = pickle.loads(offered)  # noqa: S301 - the daemon's own, of which this process is a fork
    with forkserver.environment(offer.env):
        loading.import_vllm()
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.network_utils import make_zmq_listener
        from vllm.v1.engine.async_llm import AsyncLLM

        from llm_serve.engine import long_texts, replaced
        from llm_serve.engine.steps import StepWatch

        replaced.install()
        requests, answers = offer.addresses[place - 1]
        listener = make_zmq_listener(f"{requests}-{uuid.uuid4().hex[:8]}", zmq.ROUTER)
        steps = StepWatch()
        with _greeted(listener.address):
            llm = AsyncLLM.from_vllm_config(
                offer.config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                stat_loggers=[lambda *_: steps],
                disable_log_stats=bool(offer.args.disable_log_stats),
                client_addresses={
                    "input_address": listener.address,
                    "input_listener": listener.socket,
                    "output_address": answers,
                },
                client_count=places,
                client_index=place,
            )
    forkserver.remember_settings()
    long_texts.fit(llm.model_config.max_model_len)
    steps.attach(llm.output_processor.get_num_unfinished_requests)
    return Client(llm, offer.args, steps, requests)


@contextlib.contextmanager
def _greeted(address: str) -> Iterator[None]:
    """Whoever waits at this address for an engine's first words hears them."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.DEALER) as greeter:
        greeter.setsockopt(zmq.IDENTITY, _ENGINE)
        greeter.setsockopt(zmq.LINGER, 0)
        greeter.connect(address)
        greeter.send(b"")
        yield


async def meet(client: Client) -> None:
    """Open the address that the engine connects to, and return when it is there; that may take a whole start.

    Whether it is there is asked by sending it something that it takes no notice of: a socket that has to deliver says
    so when it cannot. Not for longer than that: to a dead engine, vLLM's client sends as if it lived.
    """
    import zmq
    from vllm.v1.engine import EngineCoreRequestType

    socket: Any = zmq.Socket.shadow(client.llm.engine_core.input_socket.underlying)
    nothing = (_ENGINE, EngineCoreRequestType.WAKEUP.value, b"\xc0")

    def is_there() -> bool:
        socket.poll(0)  # else it does not look at who has come
        try:
            socket.send_multipart(nothing, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    while is_there():  # noqa: ASYNC110 - the one that has greeted, under the engine's name, is still leaving
        await asyncio.sleep(_MEET_EVERY_S)
    socket.setsockopt(zmq.USE_FD, -1)  # else this one would be bound to the first one's descriptor
    socket.bind(client.address)
    while not is_there():  # noqa: ASYNC110 - a socket of vLLM's, with no event for this
        await asyncio.sleep(_MEET_EVERY_S)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 0)


def hear(client: Client, ready: bytes) -> None:
    """Take over what the engine has said of itself."""
    core = client.llm.engine_core
    core._effective_attention_block_sizes.clear()  # noqa: SLF001 - the greeting has put "unknown" there
    core._apply_ready_response(ready)  # noqa: SLF001 - as its constructor would have


def detach(client: Client) -> None:
    """Let go of an engine that is gone: every request that is with it hears of that. Call it in the loop."""
    if client.llm.output_handler is not None:
        client.llm.output_handler.cancel()  # else it reports an end that is known as an error
    tell_requests(client.llm)
    let_go(client.llm)


def tell_requests(llm: Any) -> None:
    """Let every request in flight find its engine dead. vLLM does so when it notices; not for one that it shut down."""
    from vllm.v1.engine.exceptions import EngineDeadError

    llm.engine_core.resources.engine_dead = True
    llm.output_processor.propagate_error(EngineDeadError())


def let_go(llm: Any) -> None:
    """Close what this process has of an engine that is gone."""
    with contextlib.suppress(Exception):
        llm.shutdown(0)
        # Requests that go on elsewhere began with this engine's threads, and end with them (embeddings, for one).
        llm.renderer._executor.replace_inner()  # noqa: SLF001 - vLLM's handlers hold it too
