"""Records and output of engine processes, over the real sockets."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import queue
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_serve.engine import relay
from llm_serve.engine.relay import Receiver, Record, RelayHandler

WAIT_S = 10.0


class Ears:
    """A receiver, and what it has heard."""

    def __init__(self, folder: Path) -> None:
        self.records: queue.Queue[Record] = queue.Queue()
        self.lines: queue.Queue[str] = queue.Queue()
        self.receiver = Receiver(folder, self.records.put, self.lines.put)

    def record(self) -> Record:
        """The next record."""
        return self.records.get(timeout=WAIT_S)

    def line(self) -> str:
        """The next line of output."""
        return self.lines.get(timeout=WAIT_S)


@pytest.fixture
def ears(tmp_path: Path) -> Iterator[Ears]:
    """A receiver that listens in a folder of its own."""
    found = Ears(tmp_path)
    yield found
    found.receiver.close()


def logger_of(handler: logging.Handler) -> logging.Logger:
    """A logger of its own, which no other test knows."""
    logger = logging.Logger("vllm.v1.engine.core")  # noqa: LOG001 - getLogger would keep it
    logger.addHandler(handler)
    return logger


@pytest.fixture
def logger(ears: Ears) -> Iterator[logging.Logger]:
    """A logger whose records go to `ears`."""
    handler = RelayHandler(str(ears.receiver.records_socket))
    yield logger_of(handler)
    if handler._socket is not None:
        handler._socket.close()


def fail_twice() -> None:
    """Raise an error that has a cause."""
    try:
        load_model()
    except MemoryError as error:
        raise RuntimeError("Worker failed") from error


def load_model() -> None:
    """Raise the cause."""
    raise MemoryError("CUDA out of memory. Tried to allocate 1.02 GiB")


def test_a_record_arrives_as_it_was_said(logger: logging.Logger, ears: Ears) -> None:
    """Who, how bad and what, with the arguments filled in."""
    logger.info("Loading weights took %.2f seconds", 0.5)

    record = ears.record()

    assert {
        "pid": os.getpid(),
        "process": "MainProcess",
        "level": "INFO",
        "logger": "vllm.v1.engine.core",
        "message": "Loading weights took 0.50 seconds",
        "exception": None,
        "ended": None,
    } == {key: value for key, value in record.items() if key != "time"}
    assert record["time"] > 1.7e9


def test_the_end_of_a_process_arrives_as_values(logger: logging.Logger, ears: Ears) -> None:
    """Which process, and its exit code."""
    logger.warning("process %d has ended", 77, extra={"ended": (77, -9)})

    assert [77, -9] == ears.record()["ended"]


def test_an_exception_arrives_with_its_chain(logger: logging.Logger, ears: Ears) -> None:
    """The type, the text and the frames of the error itself, and a traceback that shows its cause too."""
    try:
        fail_twice()
    except RuntimeError:
        logger.exception("EngineCore failed to start.")

    exception = ears.record()["exception"]

    assert ("builtins.RuntimeError", "Worker failed") == (exception["type"], exception["text"])
    assert ["test_an_exception_arrives_with_its_chain", "fail_twice"] == exception["frames"]
    assert "MemoryError: CUDA out of memory. Tried to allocate 1.02 GiB" in exception["traceback"]
    assert "load_model" in exception["traceback"]


def test_vllm_s_name_of_the_process_counts(logger: logging.Logger, ears: Ears) -> None:
    """A record that carries vLLM's own name for its process keeps it."""
    # Made by hand: once vllm is imported, its record factory sets the name itself and refuses it as an extra.
    record = logging.LogRecord(logger.name, logging.INFO, __file__, 1, "hello", (), None)
    record.vllm_process_name = "Worker_TP1"
    logger.handle(record)

    assert "Worker_TP1" == ears.record()["process"]


def test_a_forked_child_sends_on_a_socket_of_its_own(logger: logging.Logger, ears: Ears) -> None:
    """A handler that was used before a fork works in the child, and goes on working in the parent."""
    logger.info("before")
    assert "before" == ears.record()["message"]

    child = os.fork()
    if child == 0:
        logger.error("from the child")
        os._exit(0 if logger.handlers[0]._socket else 1)  # type: ignore[attr-defined]
    assert (child, 0) == os.waitpid(child, 0)
    from_child = ears.record()
    logger.info("after")

    assert ("from the child", child) == (from_child["message"], from_child["pid"])
    assert ("after", os.getpid()) == (ears.record()["message"], os.getpid())


def test_nobody_there_raises_nothing(tmp_path: Path) -> None:
    """An engine goes on when the daemon's socket is missing, and when it goes away."""
    handler = RelayHandler(str(tmp_path / "none.sock"))
    logger = logger_of(handler)

    logger.error("lost")
    logger.error("lost as well")

    assert handler._socket is None


def test_a_daemon_that_went_away_raises_nothing(logger: logging.Logger, ears: Ears) -> None:
    """Records after the receiver's end are lost in silence."""
    logger.info("heard")
    ears.record()
    ears.receiver.close()

    logger.error("lost")


def test_a_record_that_cannot_be_written_raises_nothing(logger: logging.Logger, ears: Ears) -> None:
    """Wrong arguments lose one record and not the next."""
    logger.info("%d", "no number")
    logger.info("next")

    assert "next" == ears.record()["message"]


@pytest.mark.parametrize("text", ["x" * 300_000, "\u2620" * 300_000], ids=["ascii", "escaped"])
def test_a_huge_record_arrives_cut(text: str, logger: logging.Logger, ears: Ears) -> None:
    """A text that no datagram holds is cut, in the message and in the exception, whose end is kept as well."""
    logger.error(text, exc_info=ValueError(text))

    record = ears.record()

    assert text[:6000] == record["message"]
    assert f"{text[:3000]} [...] {text[-3000:]}" == record["exception"]["text"]
    assert 12_000 == len(record["exception"]["traceback"])


def test_a_full_buffer_drops_what_is_unimportant(tmp_path: Path) -> None:
    """While nobody reads, an INFO record never blocks an engine."""
    path = str(tmp_path / "full.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(path)
        handler = RelayHandler(path)
        logger = logger_of(handler)

        for number in range(3000):
            logger.info("record %d", number)

        assert handler._socket is not None
        assert 0.0 == handler._socket.gettimeout()
        handler._socket.close()


def test_nonsense_on_the_socket_is_passed_over(logger: logging.Logger, ears: Ears) -> None:
    """What is no JSON does not end the listening."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        for nonsense in (b"", b"\xff", b"{", b"[1"):
            sender.sendto(nonsense, str(ears.receiver.records_socket))
    logger.info("still there")

    assert "still there" == ears.record()["message"]


def test_a_listener_that_raises_goes_on_listening(tmp_path: Path) -> None:
    """A bug in what is done with a record or a line, or a log that is full, loses that one only."""
    heard: queue.Queue[object] = queue.Queue()

    def take(value: object) -> None:
        heard.put(value)
        raise OSError("no space left for logs")

    receiver = Receiver(tmp_path, take, take)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        for number in (b"1", b"2"):
            sender.sendto(number, str(receiver.records_socket))
            assert int(number) == heard.get(timeout=WAIT_S)
    with socket.socket(socket.AF_UNIX) as sink:
        sink.connect(str(receiver.output_socket))
        sink.sendall(b"one\ntwo\n")
        assert ["one", "two"] == [heard.get(timeout=WAIT_S) for _ in range(2)]
    receiver.close()


def test_raw_output_arrives_line_by_line(ears: Ears) -> None:
    """What a process writes past its logger comes as text; empty lines do not."""
    with socket.socket(socket.AF_UNIX) as sink:
        sink.connect(str(ears.receiver.output_socket))
        code = "import os; os.write(1, b'one\\n\\n  \\n'); os.write(2, b'tw\\xffo \\r\\nlast without an end')"
        subprocess.run([sys.executable, "-c", code], stdout=sink.fileno(), stderr=sink.fileno(), check=True)

    assert ["one", "tw\ufffdo", "last without an end"] == [ears.line() for _ in range(3)]


def test_several_processes_write_at_the_same_time(ears: Ears) -> None:
    """Each connection has its own lines."""
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.connect(str(ears.receiver.output_socket))
        second.connect(str(ears.receiver.output_socket))
        first.sendall(b"fir")
        second.sendall(b"second\n")
        assert "second" == ears.line()
        first.sendall(b"st\n")
        assert "first" == ears.line()


def test_the_sockets_are_private_and_leave_with_the_receiver(ears: Ears) -> None:
    """Only this user may speak for an engine, and nothing is left behind."""
    paths = [ears.receiver.records_socket, ears.receiver.output_socket]
    modes = [stat.S_IMODE(path.stat().st_mode) for path in paths]

    ears.receiver.close()

    assert [0o600, 0o600] == modes
    assert [False, False] == [path.exists() for path in paths]


def test_a_receiver_takes_the_place_of_a_dead_one(ears: Ears, tmp_path: Path) -> None:
    """Sockets that a killed daemon left are replaced."""
    again = Ears(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(b'{"message": "x"}', str(again.receiver.records_socket))

    assert {"message": "x"} == again.record()
    again.receiver.close()


def test_the_logging_configuration_works(ears: Ears, tmp_path: Path) -> None:
    """The file that vLLM's processes are given sends `vllm`'s records, and only those, to the receiver."""
    path = tmp_path / "logging.json"
    relay.write_logging_config(path, ears.receiver.records_socket, "INFO")
    code = (
        "import json, logging, logging.config, sys;"
        "logging.config.dictConfig(json.load(open(sys.argv[1])));"
        "logging.getLogger('other').error('not ours');"
        "logging.getLogger('vllm.a').debug('too quiet');"
        "logging.getLogger('vllm.a').info('ours');"
        "print(sorted(name for name in sys.modules if name.startswith(('llm_serve', 'structlog', 'psutil'))))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True, check=True
    )

    assert "ours" == ears.record()["message"]
    assert "not ours\n" == done.stderr
    assert ["llm_serve", "llm_serve.engine", "llm_serve.engine.relay"] == json.loads(done.stdout.replace("'", '"'))
