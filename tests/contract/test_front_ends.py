"""What several front ends need of vLLM: one engine, and clients of it that come and go."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine import core_client
from vllm.v1.engine.async_llm import AsyncLLM

from llm_serve.core.errors import ConfigError
from llm_serve.engine import attach, orphans
from tests.contract.surface import parameters

pytestmark = pytest.mark.vllm


def test_an_engine_is_started_for_all_front_ends_and_their_clients_can_be_numbered() -> None:
    """The first client starts it, with addresses that can be added to; the others are given theirs."""
    from vllm.v1.engine.utils import EngineZmqAddresses

    assert ["vllm_config", "executor_class", "log_stats", "addresses"] == list(
        parameters(core_client.launch_core_engines)
    )
    assert {"inputs", "outputs"} <= {each.name for each in dataclasses.fields(EngineZmqAddresses)}
    assert {"client_addresses", "client_count", "client_index"} <= parameters(AsyncLLM.from_vllm_config).keys()
    source = inspect.getsource(core_client.MPClient.__init__)
    assert (
        "with launch_core_engines(\n                    vllm_config, executor_class, log_stats, addresses\n" in source
    )
    for name in ("input_address", "output_address", "input_listener", "self._apply_ready_response(payload)"):
        assert name in source


def test_the_offer_is_made_at_the_start_and_nothing_stays_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place has two addresses of its own, and what the engine says of itself is kept."""
    import pickle

    started: list[Any] = []
    monkeypatch.setattr(core_client, "launch_core_engines", lambda *given: started.append(given))
    launch, apply = core_client.launch_core_engines, core_client.MPClient._apply_ready_response
    offers: list[tuple[int, bytes]] = []
    party = attach.Party(3, lambda epoch, offer: offers.append((epoch, offer)))
    addresses = SimpleNamespace(inputs=["ipc:///first"], outputs=["ipc:///out"])

    with party.invited(7, {"a": "config"}, SimpleNamespace(port=1), {"X": "1"}):  # type: ignore[arg-type]
        core_client.launch_core_engines("config", "executor", True, addresses)

    (epoch, pickled) = offers[0]
    offer = pickle.loads(pickled)
    assert (7, {"a": "config"}, {"X": "1"}) == (epoch, offer.config, offer.env)
    assert [requests for requests, _ in offer.addresses] == addresses.inputs[1:]
    assert [answers for _, answers in offer.addresses] == addresses.outputs[1:]
    assert 8 == len(set(addresses.inputs + addresses.outputs))
    assert [("config", "executor", True, addresses)] == started
    assert (launch, apply) == (core_client.launch_core_engines, core_client.MPClient._apply_ready_response)


@pytest.mark.parametrize(
    ("parallel", "ipc", "told"),
    [(1, "direct_rpc", None), (2, "direct_rpc", "data_parallel_size"), (1, "torch_shm", "mm_tensor_ipc")],
)
def test_an_engine_that_cannot_be_shared_is_refused(parallel: int, ipc: str, told: str | None) -> None:
    """In words, before anything is started; a cache that is between one client and its engine is exchanged."""
    from vllm.config import MultiModalConfig, ParallelConfig

    media = MultiModalConfig(mm_tensor_ipc=ipc, mm_processor_cache_type="shm")
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=parallel),
        model_config=SimpleNamespace(multimodal_config=media),
    )
    assert "data_parallel_size" in {each.name for each in dataclasses.fields(ParallelConfig)}

    if told is None:
        attach.check(config, "x.toml")
        assert "lru" == media.mm_processor_cache_type
    else:
        with pytest.raises(ConfigError, match=told):
            attach.check(config, "x.toml")


async def test_a_client_meets_an_engine_that_comes_before_or_after_it_or_for_the_second_time() -> None:
    """It is not waited for in vLLM's constructor; vLLM's own greeting may have been said, or not."""
    import tempfile

    import zmq
    import zmq.asyncio
    from vllm.utils.network_utils import make_zmq_listener, make_zmq_socket
    from vllm.v1.engine import EngineCoreRequestType

    with tempfile.TemporaryDirectory() as folder, zmq.Context() as engines:
        address = f"ipc://{folder}/real"
        engine = make_zmq_socket(engines, address, zmq.DEALER, identity=attach._ENGINE, bind=False, linger=0)
        engine.send(b"READY")
        for turn in range(2):
            listener = make_zmq_listener(f"{address}-{turn}", zmq.ROUTER)
            context = zmq.asyncio.Context()
            with attach._greeted(listener.address):
                router = make_zmq_socket(context, listener.address, zmq.ROUTER, bind=True, listener=listener.socket)
                assert [attach._ENGINE, b""] == zmq.Socket.shadow(router.underlying).recv_multipart()
            llm = SimpleNamespace(engine_core=SimpleNamespace(input_socket=router))
            client = attach.Client(llm, SimpleNamespace(), SimpleNamespace(), address)  # type: ignore[arg-type]

            await asyncio.wait_for(attach.meet(client), 10)

            assert [EngineCoreRequestType.WAKEUP.value, b"\xc0"] == engine.recv_multipart()
            await router.send_multipart((attach._ENGINE, b"a request"))
            assert [b"a request"] == engine.recv_multipart()
            router.close(linger=0)
            context.term()
            await asyncio.to_thread(lambda: None)
        engine.close()


def test_what_is_sent_to_meet_an_engine_is_taken_no_notice_of() -> None:
    """EngineCore's input thread decodes what follows, and its loop returns at once."""
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.serial_utils import MsgpackDecoder

    assert MsgpackDecoder().decode(b"\xc0") is None
    source = inspect.getsource(EngineCoreProc._handle_client_request)
    assert "if request_type == EngineCoreRequestType.WAKEUP:\n            return\n" in source


def test_an_engine_gives_up_the_requests_of_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler knows whose each is, and vLLM's client calls the method by its name."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

    monkeypatch.setattr(EngineCore, orphans.METHOD, None, raising=False)
    orphans.install()
    aborted: list[list[str]] = []
    requests = {name: SimpleNamespace(client_index=index) for name, index in (("a", 1), ("b", 2), ("c", 1))}
    engine = SimpleNamespace(scheduler=SimpleNamespace(requests=requests), abort_requests=aborted.append)

    assert 2 == getattr(EngineCore, orphans.METHOD)(engine, 1)
    assert 0 == getattr(EngineCore, orphans.METHOD)(engine, 3)
    assert [["a", "c"]] == aborted
    assert "self.requests: dict[str, Request]" in inspect.getsource(Scheduler.__init__)
    assert "client_index" in parameters(Request.__init__)
    assert ["self", "method", "args"] == list(parameters(core_client.AsyncMPClient.call_utility_async))
