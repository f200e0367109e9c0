"""`llm-serve targets`: what Prometheus is told of the instances of a machine."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llm_serve.cli.main import app
from llm_serve.core.settings import parse_listen
from llm_serve.core.targets import NotScrapable, address_of, by_instance

HERE = socket.gethostname()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two instances, and a file that is none."""
    (tmp_path / "etc").mkdir()
    write(tmp_path / "etc/qwen7b.toml", "127.0.0.1:8000")
    write(tmp_path / "etc/llama.toml", "[::]:8001")
    (tmp_path / "etc/qwen7b.keys").write_text("first-key-0001\n")
    return tmp_path / "etc"


def write(path: Path, listen: str) -> None:
    """An instance file."""
    path.write_text(f'model = "m"\n[server]\nlisten = "{listen}"\napi_keys = "/etc/llm-serve/x.keys"\n')


def run(*options: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command."""
    done = CliRunner().invoke(app, ["targets", *map(str, options)])
    return done.exit_code, done.stdout, done.stderr


def group(name: str, address: str, host: str = HERE) -> dict[str, Any]:
    """What file discovery reads."""
    return {"targets": [address], "labels": {"instance": name, "host": host}}


@pytest.mark.parametrize(
    ("listen", "here", "from_afar"),
    [
        ("10.0.0.5:8000", "10.0.0.5:8000", "10.0.0.5:8000"),
        ("gpu1.example.org:80", "gpu1.example.org:80", "gpu1.example.org:80"),
        ("[2001:db8::5]:8000", "[2001:db8::5]:8000", "[2001:db8::5]:8000"),
        ("0.0.0.0:8000", "127.0.0.1:8000", "gpu1:8000"),
        ("[::]:8000", "[::1]:8000", "gpu1:8000"),
        ("127.0.0.1:8000", "127.0.0.1:8000", "from this machine only"),
        ("localhost:8000", "localhost:8000", "from this machine only"),
        ("[::1]:8000", "[::1]:8000", "from this machine only"),
        ("unix:/run/x.sock", "unix socket", "unix socket"),
        ("127.0.0.1:0", "another port at each start", "another port at each start"),
    ],
)
def test_an_address_is_where_prometheus_finds_it(listen: str, here: str, from_afar: str) -> None:
    """A wildcard is no address; what cannot be scraped has a reason that says what to do."""
    for expected, reached_as in ((here, None), (from_afar, "gpu1")):
        if ":" in expected:
            assert expected == address_of(parse_listen(listen), reached_as)
        else:
            with pytest.raises(NotScrapable, match=f"{expected}.*server.listen"):
                address_of(parse_listen(listen), reached_as)


def test_a_name_of_ipv6_is_bracketed() -> None:
    """The port must not be taken for a part of it."""
    assert "[2001:db8::1]:8000" == address_of(parse_listen("0.0.0.0:8000"), "2001:db8::1")


def test_instances_are_listed(folder: Path) -> None:
    """One group for each, in order, with the name by which every other command knows it."""
    status, out, err = run("--folder", folder)

    assert (0, "") == (status, err)
    assert [group("llama", "[::1]:8001"), group("qwen7b", "127.0.0.1:8000")] == json.loads(out)


def test_a_prometheus_elsewhere_is_told_what_it_can_reach(folder: Path) -> None:
    """The machine's name stands in the address and in the label; what is on loopback is left out with a word."""
    status, out, err = run("--folder", folder, "--host", "gpu1")

    assert (0, [group("llama", "gpu1:8001", "gpu1")]) == (status, json.loads(out))
    assert err.startswith(
        "llm-serve: targets: qwen7b is left out: 127.0.0.1:8000 can be reached from this machine only."
    )


def test_the_list_is_a_file_that_prometheus_may_read(folder: Path, tmp_path: Path) -> None:
    """Whatever the umask; nothing else is left beside it, and a second run replaces it."""
    output, before = tmp_path / "run/targets.json", os.umask(0o077)
    output.parent.mkdir()
    try:
        for _ in range(2):
            assert (0, "", "") == run("--folder", folder, "--output", output)
    finally:
        os.umask(before)

    assert ["llama", "qwen7b"] == [each["labels"]["instance"] for each in json.loads(output.read_text())]
    assert (0o644, [output]) == (stat.S_IMODE(output.stat().st_mode), list(output.parent.iterdir()))


def test_a_broken_file_leaves_its_instance_where_it_was(folder: Path, tmp_path: Path) -> None:
    """A slip of the pen does not end the watch over a daemon that serves on; one that was never listed is left out."""
    output = tmp_path / "targets.json"
    run("--folder", folder, "--output", output)
    listed = json.loads(output.read_text())
    (folder / "qwen7b.toml").write_text("model = m\n")
    (folder / "new.toml").write_text('modle = "m"\n')

    status, _, err = run("--folder", folder, "--output", output)

    assert (0, listed) == (status, json.loads(output.read_text()))
    assert f"{folder}/qwen7b.toml:1: not TOML" in err
    assert "qwen7b stays at 127.0.0.1:8000, because its file is refused." in err
    assert "new is left out, because its file is refused." in err


def test_an_instance_without_a_file_is_gone(folder: Path, tmp_path: Path) -> None:
    """Removing the file is how an instance is given up."""
    output = tmp_path / "targets.json"
    run("--folder", folder, "--output", output)
    (folder / "qwen7b.toml").unlink()
    run("--folder", folder, "--output", output)

    assert ["llama"] == list(by_instance(json.loads(output.read_text())))


@pytest.mark.parametrize("damage", ["", "{", "[1]", '[{"targets": [], "labels": {}}]', "null", "\udcff"])
def test_a_damaged_list_is_written_anew(folder: Path, tmp_path: Path, damage: str) -> None:
    """What cannot be read is worth nothing, and stops nothing."""
    output = tmp_path / "targets.json"
    output.write_bytes(damage.encode(errors="surrogateescape"))

    assert (0, "", "") == run("--folder", folder, "--output", output)
    assert {"llama", "qwen7b"} == set(by_instance(json.loads(output.read_text())))


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old list stays, or every alert would fall silent."""
    output = tmp_path / "targets.json"
    output.write_text("[]")
    assert 75 == run("--folder", tmp_path / "none", "--output", output)[0]

    def denied(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", denied)
    status, out, err = run("--folder", tmp_path, "--output", output)

    assert (75, "", "[]") == (status, out, output.read_text())
    assert f"llm-serve: targets: {tmp_path} cannot be looked into: Permission denied.\n" == err


def test_a_list_that_cannot_be_written_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """The reason is one line, and no temporary file stays."""
    (tmp_path / "taken").mkdir()

    status, _, err = run("--folder", folder, "--output", tmp_path / "taken")

    assert (75, f"llm-serve: targets: {tmp_path}/taken cannot be written: Is a directory.\n") == (status, err)
    assert {"etc", "taken"} == {path.name for path in tmp_path.iterdir()}
    assert 75 == run("--folder", folder, "--output", tmp_path / "none/targets.json")[0]


@pytest.mark.parametrize("host", ["", "a b", "gpu1:9090", "999.1.1.1"])
def test_a_host_that_is_none_is_wrong_usage(folder: Path, host: str) -> None:
    """It would stand in every address."""
    status, out, err = run("--folder", folder, "--host", host)

    assert (2, "", True) == (status, out, err.startswith("llm-serve: targets: --host "))
