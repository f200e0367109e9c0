"""What is wrong is said in words, with its place and its remedy, and ends with the right exit status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import MODEL_NAME, Daemon

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(180)]
MakeDaemon = Callable[..., Daemon]


def _ends(daemon: Daemon, status: int, *phrases: str) -> None:
    """Assert how a daemon ends and what its log says."""
    assert status == daemon.wait_for_exit(120), daemon.log()[-4000:]
    log = " ".join(daemon.log().split())
    for phrase in phrases:
        assert phrase in log, daemon.log()[-6000:]
    assert "Traceback" not in daemon.log()


BAD_TABLES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown option of ours": (
        {"server": {"max_qeued": 1}},
        ("tiny.toml:5: server.max_qeued: unknown option", "Did you mean max_queued?"),
    ),
    "key file that is not there": (
        {"server": {"api_keys": "/nonexistent/keys"}},
        ("/nonexistent/keys", "server.api_keys"),
    ),
    "unknown option of vLLM's": ({"engine": {"max_num_seq": 8}}, ("engine.max_num_seq:", "Did you mean max_num_seqs?")),
}
"""More of them: tests/contract/test_bad_files.py, without a process for each."""


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_wrong_file_ends_with_78_and_the_place(daemon: MakeDaemon, case: str) -> None:
    """Each mistake has a message of its own that names the option and the remedy."""
    tables, phrases = BAD_TABLES[case]
    _ends(daemon(tables), 78, *phrases)


def test_broken_toml_is_named_with_its_line(daemon: MakeDaemon) -> None:
    """A file that cannot be read as TOML says where."""
    _ends(daemon(text='model = "x"\n[server\n'), 78, "tiny.toml:2:")


def test_a_missing_file_names_what_there_is(daemon: MakeDaemon) -> None:
    """An instance that does not exist is no traceback."""
    asked = daemon(text="model = 1")
    asked.wait_for_exit(60)
    asked.file.unlink()
    _ends(asked.start(), 78, "tiny.toml", "does not exist")


def test_a_port_in_use_is_named_with_its_holder(daemon: MakeDaemon, model: Path) -> None:
    """Exit 75: it may be free at the next try."""
    first = daemon().wait_for_answers()
    second = Daemon(model, {"server": {"listen": f"127.0.0.1:{first.port}"}}).start()
    try:
        _ends(second, 75, f"127.0.0.1:{first.port} is in use by", str(first.pid), "server.listen")
        assert 200 == first.http.get("/livez").status_code
    finally:
        second.destroy()


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the model whose big file is a link; `broken(name)` removes one file of it."""

    def make(missing: str) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for file in model.iterdir():
            if file.name == "model.safetensors":
                (folder / file.name).symlink_to(file)
            else:
                shutil.copy(file, folder)
        (folder / missing).unlink()
        return folder

    return make


def test_a_truncated_weight_file(daemon: MakeDaemon, model: Path, broken: Callable[[str], Path]) -> None:
    """A download that was cut short names the file and both sizes."""
    folder = broken("model.safetensors")
    whole = (model / "model.safetensors").stat().st_size
    with (model / "model.safetensors").open("rb") as source:
        (folder / "model.safetensors").write_bytes(source.read(1 << 20))
    _ends(daemon(model=folder), 78, "model.safetensors", str(1 << 20), str(whole))


def test_a_model_without_chat_template_serves_completions(daemon: MakeDaemon, broken: Callable[[str], Path]) -> None:
    """It serves; a chat gets a 400 that says what is missing."""
    serving = daemon(model=broken("chat_template.jinja")).wait_ready()
    answer = serving.chat()
    assert (400, True) == (answer.status_code, "chat template" in answer.text)
    plain = serving.http.post("/v1/completions", json={"model": MODEL_NAME, "prompt": "One", "max_tokens": 1})
    assert 200 == plain.status_code


def test_a_cache_that_cannot_be_written(daemon: MakeDaemon) -> None:
    """Said before vLLM turns it into "failed to be inspected"."""
    _ends(
        daemon(environ={"VLLM_CACHE_ROOT": "/dev/null/cache"}), 78, "VLLM_CACHE_ROOT", "cannot write to /dev/null/cache"
    )


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own with nothing free."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(daemon: MakeDaemon, full_disk: Path) -> None:
    """Exit 75, with the folder and how much is free."""
    (full_disk / "filler").write_bytes(b"0" * 900_000)
    _ends(daemon(environ={"VLLM_CACHE_ROOT": str(full_disk)}), 75, "MiB are free", str(full_disk), "VLLM_CACHE_ROOT")


def test_an_engine_that_does_not_fit_says_what_to_change(daemon: MakeDaemon) -> None:
    """Where even the floors do not fit: the child's own words arrive, what to change, and exit 70 after one start."""
    starting = daemon({"engine": {"kv_cache_memory_bytes": 32 << 20}})
    assert 70 == starting.wait_for_exit(120), starting.log()[-4000:]
    last = next(line for line in starting.log().splitlines() if "status=70" in line)
    for phrase in ("kv_cache_too_small", "estimated maximum model length is", "recovery.floor_max_model_len"):
        assert phrase in last
    assert "engine start 2" not in starting.log()


def test_a_start_that_takes_too_long_is_ended(daemon: MakeDaemon) -> None:
    """The deadline is ours: vLLM has none."""
    tables = {"recovery": {"restart_limit": 1, "start_timeout_s": 3.0}}
    slow = daemon(tables)
    _ends(slow, 70, "start_timeout", "not ready 3 s after its start", "recovery.start_timeout_s")
    assert [] == slow.processes()


def test_check_finds_the_same_without_starting(daemon: MakeDaemon, model: Path, tmp_path: Path) -> None:
    """`llm-serve check` prints the plan of a right file as JSON, and 78 with the place for a wrong one."""
    right = Daemon(model, {})
    try:
        done = right.check("--json")
        assert 0 == done.returncode, done.stderr
        assert "max_model_len" in json.dumps(json.loads(done.stdout))
        right.file.write_text(right.file.read_text().replace("max_num_seqs", "max_num_sequences"))
        wrong = right.check()
        assert (78, True) == (wrong.returncode, "Did you mean max_num_seqs?" in wrong.stderr)
    finally:
        right.destroy()


def test_a_second_daemon_of_the_same_name_is_refused(daemon: MakeDaemon, model: Path) -> None:
    """Exit 75, and the first one keeps its sockets: two files of one name in two folders share a runtime folder."""
    first = daemon().wait_for_answers()
    second = Daemon(model, {}, environ={"XDG_RUNTIME_DIR": str(first.runtime)}).start()
    try:
        _ends(second, 75, "an instance of this name runs already", str(first.runtime), "rename this file")
        assert "starting" == first.status()["state"]
        assert ["run/llm-serve/tiny/control.sock"] == [name for name in first.temporary_files() if "control" in name]
    finally:
        second.destroy()


@pytest.mark.parametrize("case", ["no folder", "too long"])
def test_a_runtime_folder_that_cannot_be_used(daemon: MakeDaemon, tmp_path: Path, case: str) -> None:
    """A place where no socket can be made is named with what to set."""
    folder = {"no folder": Path("/dev/null/run"), "too long": tmp_path / ("x" * 90)}[case]
    _ends(daemon(environ={"XDG_RUNTIME_DIR": str(folder)}), 78, "RUNTIME_DIRECTORY", str(folder), "XDG_RUNTIME_DIR")
