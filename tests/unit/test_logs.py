"""Where events go: the journal's wire form, console lines and JSON, and no event that breaks the daemon."""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.host import journal, logs
from llm_serve.host.journal import encode_entry, journal_fields
from llm_serve.host.logs import get_logger
from tests.patience import patient


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level
    logs.close()
    atexit.unregister(logs.close)
    structlog.reset_defaults()


def parse_entry(payload: bytes) -> dict[str, str]:
    """Read an entry as journald does: NAME=value, or NAME, length and value."""
    fields: dict[str, str] = {}
    while payload:
        head, _, rest = payload.partition(b"\n")
        name, is_short, value = head.partition(b"=")
        if is_short:
            payload = rest
        else:
            length = int.from_bytes(rest[:8], "little")
            value, end, payload = rest[8 : 8 + length], rest[8 + length : 9 + length], rest[9 + length :]
            assert end == b"\n"
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


# The journal's form.
def test_an_event_becomes_fields() -> None:
    """Each value has a field of its own; what explains is in the message as well."""
    event = {"event": "exit", "level": "critical", "status": 70, "why": "gave up", "request_id": "r1", "epoch": None}

    fields = journal_fields(event)

    assert {
        "MESSAGE": "exit status=70 why=gave up",
        "PRIORITY": "2",
        "STATUS": "70",
        "WHY": "gave up",
        "REQUEST_ID": "r1",
    } == fields


@pytest.mark.parametrize(
    ("level", "priority"),
    [("critical", "2"), ("error", "3"), ("warning", "4"), ("info", "6"), ("debug", "7"), ("odd", "6")],
)
def test_a_level_becomes_a_priority(level: str, priority: str) -> None:
    """The journal's priorities are syslog's."""
    assert priority == journal_fields({"event": "x", "level": level})["PRIORITY"]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("request_id", "REQUEST_ID"),
        ("vllm.process-name", "VLLM_PROCESS_NAME"),
        ("_private", "PRIVATE"),
        ("__cursor", "CURSOR"),
        ("9lives", "LIVES"),
        ("naïve", "NA_VE"),
        ("a=b\nc", "A_B_C"),
        ("é", "UNNAMED"),
        ("", "UNNAMED"),
        ("_", "UNNAMED"),
        ("x" * 100, "X" * 64),
    ],
)
def test_a_key_becomes_a_name_that_journald_takes(key: str, name: str) -> None:
    """Names have at most 64 of A-Z, 0-9 and _, and begin with a letter, else journald drops the field."""
    assert {name, "MESSAGE", "PRIORITY"} == journal_fields({"event": "e", key: 1}).keys()


def test_a_value_cannot_pose_as_the_message_or_the_priority() -> None:
    """An event's own values never take the place of what the journal reads."""
    fields = journal_fields({"event": "e", "level": "info", "message": "no", "priority": 0})

    assert ("e", "6") == (fields["MESSAGE"], fields["PRIORITY"])


def test_a_value_of_several_lines_goes_with_its_length() -> None:
    """A newline would end the field, so the length form is used: name, 8 bytes little endian, value."""
    payload = encode_entry({"A": "x", "TEXT": "one\ntwo\nB=fake"})

    assert b"A=x\nTEXT\n\x0e\0\0\0\0\0\0\0one\ntwo\nB=fake\n" == payload
    assert {"A": "x", "TEXT": "one\ntwo\nB=fake"} == parse_entry(payload)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.dictionaries(st.text(st.sampled_from("ABC_"), min_size=1), TEXT))
def test_every_entry_can_be_read_back(fields: dict[str, str]) -> None:
    """Whatever the values hold, no field leaks into another."""
    assert fields == parse_entry(encode_entry(fields))


def test_half_a_character_does_not_break_an_entry() -> None:
    """A lone surrogate, as from a file name that is no UTF-8, is replaced."""
    assert {"A": "x?"} == parse_entry(encode_entry({"A": "x\udc80"}))


# The journal itself.
@pytest.fixture
def journald(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A datagram socket in journald's place."""
    path = str(tmp_path / "journal.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path)
        receiver.settimeout(5)
        monkeypatch.setattr(journal, "SOCKET", path)
        yield receiver


def test_an_event_arrives_in_the_journal(journald: socket.socket) -> None:
    """One entry an event, with the instance, the identifier and the traceback as a field."""
    logs.set_up("qwen", level="info", output_format="journal")

    get_logger().debug("too quiet")
    get_logger().error("it broke", epoch=3, odd=object, path="/v1", exc_info=ValueError("bad\nvalue"))
    entry = parse_entry(journald.recv(1 << 16))

    assert ("llm-serve", "qwen", "3", "it broke path=/v1", "3") == (
        entry["SYSLOG_IDENTIFIER"],
        entry["INSTANCE"],
        entry["EPOCH"],
        entry["MESSAGE"],
        entry["PRIORITY"],
    )
    assert "ValueError: bad\nvalue" == entry["EXCEPTION"]


def test_a_library_record_arrives_in_the_journal(journald: socket.socket) -> None:
    """What uvicorn or asyncio log goes the same way, with the logger's name."""
    logs.set_up("qwen", level="info", output_format="journal")

    logging.getLogger("uvicorn.error").warning("connection %s lost", 7)
    entry = parse_entry(journald.recv(1 << 16))

    assert ("connection 7 lost", "uvicorn.error", "4") == (entry["MESSAGE"], entry["LOGGER"], entry["PRIORITY"])


def test_a_relayed_record_names_its_process(journald: socket.socket) -> None:
    """A record of an engine process keeps who said it, how bad it is, and its traceback."""
    logs.set_up("qwen", level="info", output_format="journal")
    exception = {"type": "builtins.ValueError", "text": "t", "frames": [], "traceback": "Traceback\nline"}

    logs.relayed(
        {
            "process": "EngineCore",
            "pid": 7,
            "level": "ERROR",
            "logger": "vllm.v1.engine.core",
            "message": "EngineCore failed to start.",
            "exception": exception,
        }
    )
    entry = parse_entry(journald.recv(1 << 16))

    assert ("EngineCore failed to start.", "3", "EngineCore", "7", "builtins.ValueError", "Traceback\nline") == tuple(
        entry[name] for name in ("MESSAGE", "PRIORITY", "VLLM_PROCESS", "VLLM_PID", "EXCEPTION_TYPE", "TRACEBACK")
    )


@pytest.mark.parametrize("text", ["x" * (8 << 20), "x"], ids=["too large", "nobody there"])
def test_what_the_journal_cannot_take_is_left_on_stderr(
    text: str, journald: socket.socket, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that is too large, or a journal that is gone, loses nothing and raises nothing."""
    if text == "x":
        monkeypatch.setattr(journal, "SOCKET", "/nonexistent/journal")
    logs.set_up("qwen", level="info", output_format="journal")

    get_logger().info("said anyway", text=text, odd=object())
    logs.close()

    assert "said anyway" == json.loads(capsys.readouterr().err)["event"]


def _read(journald: socket.socket, last: str) -> list[str]:
    """The messages that come, up to this one."""
    read: list[str] = []
    while last not in read[-1:]:
        read.append(parse_entry(journald.recv(1 << 16))["MESSAGE"])
    return read


def test_nobody_waits_for_a_journal_that_does_not_read(journald: socket.socket) -> None:
    """What it has not read is late. When it reads again it gets all of it, in order, though nothing more is logged."""
    logs.set_up("qwen", level="info", output_format="journal")

    for number in range(5000):
        get_logger().info(f"event {number}")

    assert [f"event {number}" for number in range(5000)] == _read(journald, "event 4999")


def test_of_what_the_journal_does_not_read_only_so_much_is_kept(
    journald: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many entries found no room stands where they would have."""
    monkeypatch.setattr(journal, "_MOST_LATE", 100)
    logs.set_up("qwen", level="info", output_format="journal")
    for number in range(5000):
        get_logger().info(f"event {number}")
    read = _read(journald, "event 49")
    time.sleep(0.1)

    get_logger().info("the last")

    read += _read(journald, "the last")
    lost = [each.split()[0] for each in read if each.endswith("entries are lost: the journal did not read")]
    kept = [int(each.split()[1]) for each in read if each.startswith("event ")]
    assert 5000 == len(kept) + sum(map(int, lost))
    assert sorted(kept) == kept
    assert len(read) == len(kept) + len(lost) + 1


def test_the_end_does_not_wait_long_for_a_journal_that_does_not_read(journald: socket.socket) -> None:
    """A moment for what was logged last, whatever is left."""
    logs.set_up("qwen", level="info", output_format="journal")
    for number in range(5000):
        get_logger().info(f"event {number}")

    began = time.monotonic()
    logs.close()

    assert time.monotonic() - began < patient(4)


# Console and JSON.
ODD_VALUES: dict[str, Any] = {
    "object": object(),
    "bytes": b"\xff",
    "set": {1},
    "nan": float("nan"),
    "class": Path,
    "none": None,
    "error": ValueError("x"),
    "keys": {1: {2: 3}, (1, 2): 4},
    "lines": "a\nb\x1b[31m",
}


@pytest.mark.parametrize("output_format", ["console", "json", "journal"])
@pytest.mark.parametrize("name", ODD_VALUES)
def test_no_value_breaks_an_event(
    name: str, output_format: str, journald: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is given to the log, the event is written."""
    logs.set_up("qwen", level="info", output_format=output_format)

    get_logger().info("an event", value=ODD_VALUES[name])

    written = journald.recv(1 << 16).decode() if output_format == "journal" else capsys.readouterr().err
    assert "an event" in written


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is a whole event with its time, level and values."""
    logs.set_up("qwen", level="warning", output_format="json")

    get_logger().info("too quiet")
    get_logger().warning("a\nb", seconds=1.5)
    get_logger().error("second")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())

    assert ("a\nb", "warning", 1.5) == (first["event"], first["level"], first["seconds"])
    assert ("second", "error") == (second["event"], second["level"])
    assert "T" in first["timestamp"]


@pytest.mark.parametrize("output_format", ["console", "json"])
def test_an_exception_is_written_with_its_traceback(output_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The error of a bug is readable in every format, and no warning is raised on the way."""
    logs.set_up("qwen", level="info", output_format=output_format)

    get_logger().critical("internal error", exc_info=ValueError("the bug"))

    assert "ValueError: the bug" in capsys.readouterr().err


def test_the_console_gets_readable_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal gets the event and its values, without colours when it is none."""
    logs.set_up("qwen", level="info", output_format="console")

    get_logger().info("starting -> serving", epoch=1)
    line = capsys.readouterr().err

    assert "starting -> serving" in line
    assert "epoch=1" in line
    assert "\x1b" not in line


@pytest.mark.parametrize("level", [5, 25, 35, 60])
def test_a_level_of_a_librarys_own_is_taken(level: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Libraries log at numbers that have no name here; that must not raise in their code."""
    logs.set_up("qwen", level="debug", output_format="json")
    logger = logging.getLogger("odd")
    logger.setLevel(1)

    logger.log(level, "heard")

    expected = {5: "debug", 25: "info", 35: "warning", 60: "critical"}[level]
    assert expected == json.loads(capsys.readouterr().err)["level"]


def test_a_malformed_record_does_not_raise_in_the_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong arguments for a format are reported as the standard library does, not thrown at the caller."""
    monkeypatch.setattr(logging, "raiseExceptions", True)
    logs.set_up("qwen", level="info", output_format="json")

    logging.getLogger("odd").error("%d things", "no number")

    assert "Logging error" in capsys.readouterr().err


# Which format.
def test_the_journal_is_known_by_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only when stderr is the very stream that systemd gave is the journal spoken to directly."""
    stat = os.fstat(2)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)

    monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
    assert "journal" == logs._choose()
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    assert "console" == logs._choose()
    monkeypatch.delenv("JOURNAL_STREAM")
    assert "console" == logs._choose()


# What is kept for who shows it.
def test_the_last_events_are_kept_without_requests_and_without_words_of_others() -> None:
    """The daemon's own, with what explains them; bounded in number and in length."""
    logs.recent.clear()
    logs.set_up("x", level="debug", output_format="json")
    log = get_logger()
    log.info("serving -> recovering", why="killed", epoch=2, token="no")
    log.error("engine failed", kind="killed", failure="x" * 10_000)
    log.info("request", path="/v1/completions", request_id="r")
    log.debug("detail")
    log.info("loaded", vllm_process="EngineCore", logger="vllm")
    logging.getLogger("uvicorn").warning("somebody hung up")

    kept = list(logs.recent)

    assert [("info", "serving -> recovering"), ("error", "engine failed")] == [
        (each["level"], each["event"]) for each in kept
    ]
    assert {"why": "killed"} == kept[0]["said"]
    assert abs(time.time() - kept[0]["time"]) < 60
    assert 1000 > len(json.dumps(kept[1]))
    for number in range(1000):
        log.info("event", why=number)
    assert 200 == len(logs.recent)
    assert {"why": "999"} == logs.recent[-1]["said"]
    logs.recent.clear()
