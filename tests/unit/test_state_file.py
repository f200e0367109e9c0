"""State files: whole or not there, whatever happens to their writer, their disk or their bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llm_serve
from llm_serve.core.course import Course, Step
from llm_serve.core.evidence import ErrorRecord, Evidence, Failure, Kind, Place
from llm_serve.core.learned import Key, to_json
from llm_serve.core.plan import EnginePlan
from llm_serve.host import state_file
from llm_serve.host.state_file import FAILURES, LEARNED, MAX_BYTES, MAX_FAILURES, StateFile, append_failure

STEP = Step(Kind.out_of_memory, Place.serving, "256 -> 128 Anfragen, für OOM", {"max_num_seqs": 128}, {}, is_rung=True)
VALUE = to_json(Course(EnginePlan("m", {}, {}), (STEP,)), Key("f00", "0.32.0", ("T4 15360 MiB",), "folder abc"))
OTHER = {**VALUE, "steps": []}


@pytest.fixture
def file(tmp_path: Path) -> StateFile:
    """A file in a folder of its own, with nothing in it yet."""
    folder = tmp_path / "state"
    folder.mkdir()
    return StateFile(folder)


def others_in(file: StateFile) -> list[Path]:
    """What lies beside the file."""
    return [path for path in file.path.parent.iterdir() if path != file.path]


def test_what_was_written_is_read(file: StateFile) -> None:
    """A second value takes the place of the first, and nothing else is left."""
    assert file.write(OTHER) is None
    assert file.write(VALUE) is None

    assert (VALUE, None) == file.read()
    assert [] == others_in(file)


def test_people_can_read_it_and_others_cannot(file: StateFile) -> None:
    """UTF-8, a line for each value, names in order; private to the user."""
    file.write(VALUE)

    text = file.path.read_text(encoding="utf-8")
    assert '    "reason": "256 -> 128 Anfragen, für OOM"\n' in text
    assert text == json.dumps(json.loads(text), ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    assert 0o600 == stat.S_IMODE(file.path.stat().st_mode)


def test_no_file_is_no_news(tmp_path: Path, file: StateFile) -> None:
    """Neither a first start nor a folder that is not there is worth a warning."""
    assert (None, None) == file.read()
    assert (None, None) == StateFile(tmp_path / "nowhere").read()


def test_a_file_is_forgotten_once(file: StateFile, tmp_path: Path) -> None:
    """True where there was one, with what a killed writer left; another file of the folder stays."""
    file.write(VALUE)
    (file.path.parent / f".{LEARNED}.0123.tmp").write_text("{")
    StateFile(file.path.parent, FAILURES).write({"failures": []})

    assert [True, False, False] == [file.forget(), file.forget(), StateFile(tmp_path / "nowhere").forget()]
    assert (None, None) == file.read()
    assert [file.path.parent / FAILURES] == others_in(file)


def as_link(path: Path) -> None:
    path.with_name("target").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to("target")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(b"\0" * 512), "it is cut off or damaged: not JSON (Expecting value"),
        (lambda path: path.write_bytes(b'{"checksum": "'), "it is cut off or damaged: not JSON (Unterminated string"),
        (lambda path: path.write_bytes(b'{"a": "\xff"}'), "it is damaged: not UTF-8"),
        (lambda path: path.write_bytes(b"[" * 500_000), "it is damaged: nested too deeply"),
        (lambda path: path.write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "it is damaged: nested too deeply"),
        (lambda path: path.write_bytes(b"1" * 5000), "it is cut off or damaged: not JSON (Exceeds the limit"),
        (lambda path: path.write_bytes(b"[]"), "it holds no JSON object"),
        (lambda path: path.write_bytes(b"null"), "it holds no JSON object"),
        (lambda path: path.write_bytes(b'{"format": 1}'), "it was not written by llm-serve"),
        (lambda path: path.write_bytes(b'{"checksum": "0", "value": []}'), "it was not written by llm-serve"),
        (lambda path: path.write_bytes(b'{"checksum": 0, "value": {}}'), "its checksum does not fit"),
        (lambda path: path.write_bytes(b'{"checksum": 0, "value": {"a": NaN}}'), "its checksum does not fit"),
        (lambda path: path.write_text(path.read_text().replace(": 128", ": 127")), "its checksum does not fit"),
        (lambda path: path.write_bytes(path.read_bytes() + b" " * MAX_BYTES), f"it is larger than {MAX_BYTES} bytes"),
        (as_link, "it is a symbolic link"),
        (as_folder, "it is not a regular file"),
        (as_pipe, "it is not a regular file"),
    ],
    ids=[
        "empty", "zeros", "torn", "not text", "deep lists", "deep objects", "endless number", "list", "null", "foreign",
        "value no object", "checksum no text", "not a number", "changed by hand", "large", "link", "folder", "pipe",
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_believed_is_ignored(
    spoil: Callable[[Path], object], reason: str, file: StateFile
) -> None:
    """The warning names the file, what is wrong with it, and what happens now."""
    file.write(VALUE)
    spoil(file.path)

    value, warning = file.read()

    assert value is None
    assert warning is not None
    assert warning.startswith(f"{file.path} is ignored: {reason}")
    assert warning.endswith(". The plan starts from the instance file.")


def test_a_file_of_another_user_is_ignored(file: StateFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody else has put there decides nothing."""
    file.write(VALUE)
    monkeypatch.setattr("llm_serve.host.state_file.os.geteuid", lambda: 54321)

    reason = f"it belongs to another user (id {os.getuid()})"
    assert (None, f"{file.path} is ignored: {reason}. The plan starts from the instance file.") == file.read()


@pytest.mark.parametrize("name", ["open", "fstat"])
def test_a_file_that_the_system_refuses_is_ignored(name: str, file: StateFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """No permission, a disk with errors: the system's own words, and no exception."""
    file.write(VALUE)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(f"llm_serve.host.state_file.os.{name}", refuse)
        value, warning = file.read()

    assert value is None
    assert warning is not None
    assert f"{file.path} is ignored: it cannot be read: Input/output error." in warning


def test_each_file_says_what_its_loss_means(tmp_path: Path) -> None:
    """The last failures are no plan."""
    (tmp_path / FAILURES).write_text("")

    assert (None, f"{tmp_path}/{FAILURES} is ignored: it is empty. The failures in it are not shown.") == StateFile(
        tmp_path, FAILURES
    ).read()


def test_every_prefix_is_refused(file: StateFile) -> None:
    """A file that was cut off, wherever, is never taken for a whole one: only the last line end may be missing."""
    file.write(VALUE)
    whole = file.path.read_bytes()
    read: dict[int, tuple[object, object]] = {}
    for length in range(len(whole)):
        file.path.write_bytes(whole[:length])
        read[length] = file.read()

    assert (VALUE, None) == read.pop(len(whole) - 1)
    assert len(whole) - 1 == len(read)
    assert all(value is None and isinstance(warning, str) for value, warning in read.values())


def test_every_flipped_bit_is_noticed(file: StateFile) -> None:
    """A flipped bit in a number is a number again, and in a text a text: the checksum knows better."""
    file.write(VALUE)
    whole = file.path.read_bytes()
    for position in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        file.path.write_bytes(damaged)
        value, warning = file.read()
        assert value is None, damaged
        assert warning is not None


@given(st.data())
def test_any_damage_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes that were overwritten, doubled or lost in many places at once."""
    file = StateFile(tmp_path_factory.getbasetemp(), f"damage-{os.getpid()}.json")
    file.write(VALUE)
    damaged = bytearray(file.path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(damaged)))
        damaged[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    file.path.write_bytes(damaged)

    value, warning = file.read()
    assert value in (VALUE, None)
    assert (value is None) == (warning is not None)


values = st.dictionaries(
    st.text(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters()),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    ),
)  # fmt: skip


@given(values)
def test_any_value_survives(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    """Whatever JSON can hold."""
    file = StateFile(tmp_path_factory.getbasetemp(), f"any-{os.getpid()}.json")

    assert file.write(value) is None
    assert (value, None) == file.read()


def test_output_that_is_no_text_survives(file: StateFile) -> None:
    """Bytes that could not be decoded are lone surrogates; the file is UTF-8 all the same."""
    value = {"output": os.fsdecode(b"\xff\xfe abc"), "7": "\0\x1b\u2028"}

    assert file.write(value) is None
    assert (value, None) == file.read()
    file.path.read_bytes().decode()


def test_names_that_are_numbers_come_back_as_text(file: StateFile) -> None:
    """JSON has no other names; their order, and so the checksum, is that of the text."""
    value: dict[Any, Any] = {2: "b", 10: "a"}

    assert file.write(value) is None
    assert ({"10": "a", "2": "b"}, None) == file.read()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"a": {1, 2}}, "it is not made of JSON values (Object of type set is not JSON serializable)"),
        ({"a": float("nan")}, "it is not made of JSON values (Out of range float values are not JSON compliant"),
        ({"a": "x" * MAX_BYTES}, f"bytes are more than the {MAX_BYTES} that are read back"),
    ],
    ids=["set", "nan", "large"],
)
def test_a_value_that_could_not_be_read_back_is_not_written(
    value: dict[str, Any], reason: str, file: StateFile
) -> None:
    """The old one stays, and the warning says why."""
    file.write(OTHER)

    warning = file.write(value)

    assert warning is not None
    assert reason in warning
    assert (OTHER, None) == file.read()


@pytest.mark.parametrize(
    ("call", "code"),
    [("open", errno.EROFS), ("fsync", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EACCES)],
    ids=["read-only", "full", "errors", "not allowed"],
)
def test_a_disk_that_refuses_costs_the_new_value_only(
    call: str, code: int, file: StateFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old value stays, a warning comes back, and no temporary file is left."""
    file.write(OTHER)
    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        patch.setattr(f"llm_serve.host.state_file.os.{call}", refuse)
        warning = file.write(VALUE)

    lost = "What was learned is lost when the daemon ends."
    assert f"{file.path} cannot be written: {os.strerror(code)}. {lost}" == warning
    assert (OTHER, None) == file.read()
    assert [] == others_in(file)


def test_a_folder_that_went_is_said(tmp_path: Path) -> None:
    """Nothing is made that systemd is to make."""
    warning = StateFile(tmp_path / "nowhere").write(VALUE)

    assert warning is not None
    assert "nowhere/learned.json cannot be written: No such file or directory." in warning
    assert [] == list(tmp_path.iterdir())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs root, and to be allowed to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_the_old_value(tiny_disk: Path) -> None:
    """A real one: what does not fit leaves nothing behind, and the next value that fits is written."""
    file = StateFile(tiny_disk)
    file.write(OTHER)
    filler = tiny_disk / "filler"
    free = os.statvfs(tiny_disk)
    filler.write_bytes(b"\0" * (free.f_bavail * free.f_bsize))

    warning = file.write({"text": "x" * 8192})

    assert warning is not None
    assert "cannot be written: No space left on device." in warning
    assert (OTHER, None) == file.read()
    assert [filler] == others_in(file)

    filler.unlink()
    assert file.write(VALUE) is None
    assert (VALUE, None) == file.read()


def test_a_read_only_disk_is_said(tiny_disk: Path) -> None:
    """A real one: nothing is written, forgotten or raised."""
    file = StateFile(tiny_disk)
    file.write(OTHER)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)

    warning = file.write(VALUE)

    assert warning is not None
    assert "cannot be written: Read-only file system." in warning
    assert (OTHER, None) == file.read()
    with pytest.raises(OSError, match="Read-only"):
        file.forget()


# A disk that takes its time, wherever the test runs: else few writers are killed between their two steps.
WRITER = """
import os, sys, time
from pathlib import Path
from llm_serve.host.state_file import StateFile
fsync = os.fsync
os.fsync = lambda fd: (time.sleep(0.002), fsync(fd))
file, number = StateFile(Path(sys.argv[1])), int(sys.argv[2])
while True:
    number += 1
    file.write({"number": number, "fill": [number] * 2000})
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_value(file: StateFile) -> None:
    """Killed thirty times in the middle of its work: what is read is the last value it told of, or the one after."""
    chance = random.Random(7)
    environment = os.environ | {"PYTHONPATH": str(Path(llm_serve.__file__).parent.parent)}
    last, leftovers = 0, 0
    for _ in range(30):
        command = [sys.executable, "-c", WRITER, str(file.path.parent), str(last)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            told = [writer.stdout.readline()]
            deadline = time.monotonic() + chance.random() * 0.02
            while time.monotonic() < deadline:
                pass
            writer.send_signal(signal.SIGKILL)
            told += writer.stdout.readlines()
        last = int([line for line in told if line.endswith("\n")][-1])
        leftovers += len(others_in(file))

        value, warning = file.read()
        assert warning is None
        assert value is not None
        assert value["number"] in (last, last + 1)
        assert [value["number"]] * 2000 == value["fill"]

    # Else none of them was killed while it wrote, and the test has shown nothing.
    assert leftovers > 0
    file.write(VALUE)
    assert [] == others_in(file)


def test_a_reader_beside_a_writer_sees_whole_values(file: StateFile) -> None:
    """`status` may read at any moment."""
    file.write({"number": -1})
    seen: list[tuple[object, object]] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            seen.append(file.read())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        file.write({"number": number})
    is_over.set()
    reader.join()

    assert len(seen) > 1
    assert set() == {warning for _, warning in seen} - {None}
    assert all(isinstance(value, dict) and value.keys() == {"number"} for value, _ in seen)


def failure(number: int, lines: int = 1) -> dict[str, Any]:
    """An entry as the supervisor makes it."""
    evidence = Evidence(
        phase="loading",
        errors=(ErrorRecord("EngineCore", "OutOfMemoryError", "CUDA out of memory", ("run", "load") * lines),),
        output_tail=(f"line of failure {number}",) * lines,
    )
    return {
        "time": 1000.0 + number,
        "failure": Failure(Kind.out_of_memory, f"failure {number}", place=Place.loading).to_json(),
        "evidence": evidence.to_json(),
    }


def failures_in(folder: Path) -> list[dict[str, Any]]:
    """The remembered failures; what is read must be sound."""
    value, warning = StateFile(folder, FAILURES).read()
    assert warning is None
    assert value is not None
    assert 1 == value["format"]
    entries: list[dict[str, Any]] = value["failures"]
    return entries


def test_the_last_ten_failures_are_kept_newest_first(tmp_path: Path) -> None:
    """Each whole, as it was given."""
    for number in range(MAX_FAILURES + 3):
        assert append_failure(tmp_path, failure(number)) is None

    expected = [failure(number) for number in reversed(range(3, 13))]
    assert json.loads(json.dumps(expected)) == failures_in(tmp_path)


def test_the_oldest_lose_their_bulk_first(tmp_path: Path) -> None:
    """Where all do not fit, the verdicts stay, and the newest stays whole."""
    for number in range(5):
        assert append_failure(tmp_path, failure(number, lines=8000)) is None

    kept = failures_in(tmp_path)
    assert [f"failure {number}" for number in (4, 3, 2, 1, 0)] == [each["failure"]["detail"] for each in kept]
    lengths = [len(each["evidence"].get("output_tail", ())) for each in kept]
    assert [8000, 8000, 0, 0, 0] == lengths
    frames = [len(each["evidence"]["errors"][0]["frames"]) for each in kept]
    assert [16000, 16000, 0, 0, 0] == frames
    assert {"loading"} == {each["evidence"]["phase"] for each in kept}
    assert MAX_BYTES >= (tmp_path / FAILURES).stat().st_size


@pytest.mark.parametrize("lines", [100_000, 1], ids=["its own output", "its own text"])
def test_one_failure_that_is_too_large_is_cut(lines: int, tmp_path: Path) -> None:
    """The verdict is kept, with as much of the evidence as fits, and older verdicts too where there is room."""
    append_failure(tmp_path, failure(0))
    large = failure(1, lines)
    if lines == 1:
        large["evidence"]["stalled_on"] = "x" * MAX_BYTES

    assert append_failure(tmp_path, large) is None

    newest, *older = failures_in(tmp_path)
    assert "failure 1" == newest["failure"]["detail"]
    assert (lines > 1) == ("evidence" in newest)
    assert (["failure 0"] if lines > 1 else []) == [each["failure"]["detail"] for each in older]


def test_what_is_no_json_is_kept_in_words(tmp_path: Path) -> None:
    """A value that nobody thought of costs itself, not the failures before it."""
    append_failure(tmp_path, failure(0))
    odd = {"time": float("nan"), "failure": {"path": Path("/a")}, "evidence": {"tuple": (1, 2), ("a", 1): 0}}

    assert append_failure(tmp_path, odd) is None

    assert {"time": "NaN", "failure": {"path": "/a"}, "evidence": {"tuple": [1, 2]}} == failures_in(tmp_path)[0]
    assert 2 == len(failures_in(tmp_path))


@pytest.mark.parametrize(
    ("content", "warning"),
    [
        (b"{", "is ignored: it is cut off or damaged"),
        ({"format": 2, "failures": [{"failure": {}}]}, None),
        ({"format": 1, "failures": "none"}, None),
        ({"format": 1, "failures": ["text", None]}, None),
    ],
    ids=["torn", "another format", "no list", "no entries"],
)
def test_damaged_failures_are_begun_anew(content: bytes | dict[str, Any], warning: str | None, tmp_path: Path) -> None:
    """The new failure is there, whatever was there before."""
    if isinstance(content, bytes):
        (tmp_path / FAILURES).write_bytes(content)
    else:
        StateFile(tmp_path, FAILURES).write(content)

    said = append_failure(tmp_path, failure(1))

    assert (warning is None) == (said is None)
    assert (warning or "") in (said or "")
    assert ["failure 1"] == [each["failure"]["detail"] for each in failures_in(tmp_path)]


def test_a_failure_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """It says where it can be read nevertheless."""
    warning = append_failure(tmp_path / "nowhere", failure(1))

    assert warning is not None
    assert warning.endswith("No such file or directory. This failure is in the journal only.")


def test_bulk_is_named_as_evidence_names_it() -> None:
    """Should a field be renamed, a large failure would no longer get smaller."""
    assert set(state_file._BULK) | {"errors"} <= Evidence().to_json().keys()
    assert "frames" in ErrorRecord.__dataclass_fields__
