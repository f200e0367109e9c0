"""The router's file: what it becomes, and what is said where it is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llm_serve.cli import router as cli
from llm_serve.core.errors import ConfigError
from llm_serve.host.names import instance_names, instance_path

EXAMPLE = Path(__file__).parents[2] / "config/router.toml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two instances that serve one model and some that go with neither, beside a vllm-router."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    program = bin_folder / "vllm-router"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bin_folder / "python"))
    for name, listen, model in [
        ("a", "127.0.0.1:8001", "m"),
        ("b", "0.0.0.0:8002", "m"),
        ("six", "[::]:8006", "m"),
        ("other", "127.0.0.1:8003", "another"),
        ("socket", "unix:/run/x.sock", "m"),
        ("any", "127.0.0.1:0", "m"),
    ]:
        (tmp_path / f"{name}.toml").write_text(f'model = "{model}"\n[server]\nlisten = "{listen}"\n')
    (tmp_path / "broken.toml").write_text('model = "m"\n[server]\nlistn = "127.0.0.1:8001"\n')
    return tmp_path


def command_of(folder: Path, text: str) -> tuple[list[str], list[str]]:
    file = folder / "router.toml"
    file.write_text(text)
    return cli.command_line(file)


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_names_become_addresses(folder: Path) -> None:
    """An address that means all of them is reached on loopback; another machine needs a word to the unit."""
    command, notes = command_of(folder, 'instances = ["a", "b", "six", "https://gpu7:8000/", "http://127.0.0.1:9"]')

    begin = command.index("--worker-urls") + 1
    urls = ["http://127.0.0.1:8001", "http://127.0.0.1:8002", "http://[::1]:8006", "https://gpu7:8000", "http://127.0.0.1:9"]  # fmt: skip
    assert [*urls, "--worker-startup-check-interval"] == command[begin : begin + 6]
    assert ("127.0.0.1", "30000") == (value(command, "--host"), value(command, "--port"))
    assert ["https://gpu7:8000"] == [note.split()[0] for note in notes]
    assert str(folder / "bin/vllm-router") == command[0]


def test_an_instance_that_recovers_is_passed_over_within_two_seconds(folder: Path) -> None:
    command, _ = command_of(folder, 'instances = ["a"]')

    assert "/readyz" == value(command, "--health-check-endpoint")
    seconds = [value(command, f"--health-check-{word}-secs") for word in ("interval", "timeout")]
    assert ["1", "1"] == seconds
    assert "1" == value(command, "--health-failure-threshold")


@pytest.mark.parametrize(("wait_s", "tries"), [(0, 1), (0.1, 2), (0.3, 3), (30, 19), (3600, 1804)])
def test_a_request_is_offered_for_as_long_as_the_file_says(folder: Path, wait_s: float, tries: int) -> None:
    """Pauses of 0.1, 0.2, 0.4, 0.8, 1.6 and then 2 s."""
    command, _ = command_of(folder, f'instances = ["a"]\nwait-s = {wait_s}')

    assert str(tries) == value(command, "--retry-max-retries")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["instances: is required"]),
        ("instances = []", ["1: instances:", "at least 1"]),
        ('instances = ["a"]\n\nlistn = "x"', ["3: listn: unknown option", "Did you mean listen?"]),
        ('instances = ["a"]\npolicy = "power_of_two"', ["2: policy: must be one of", "round_robin"]),
        ('instances = ["a"]\nlisten = "0.0.0.0:80"', ["2: listen:", "reached from other machines", "proxy"]),
        ('instances = ["a"]\nlisten = "unix:/x"', ["2: listen:", "unix socket"]),
        ('instances = ["a"]\nlisten = "8000"', ["2: listen: must be host:port"]),
        ('instances = ["a"]\nmetrics = "0.0.0.0:80"', ["2: metrics:"]),
        ('instances = ["a"]\nwait_s = -1', ["2: wait_s: must be at least 0"]),
        ('instances = "a"', ["1: instances: must be a list"]),
        ('instances = ["a", "a"]', ["1: instances: names a twice"]),
        ('instances = [\n"a",\n"c"]', ["3: instances.1:", "c.toml: does not exist"]),
        ('instances = ["a", "broken"]', ["broken.toml:3: server.listn: unknown option", "1: instances.1:"]),
        ('instances = ["socket"]', ["1: instances.0: socket listens on unix:", "server.listen"]),
        ('instances = ["any"]', ["1: instances.0:", "another port at each start"]),
        ('instances = ["a", "other"]', ["1: instances.1: other serves another, others m"]),
        ('instances = ["ftp://h:1"]', ["1: instances.0:", "http://"]),
        ('instances = ["http://h:1/v1"]', ["1: instances.0:", "a host and a port alone: http://h:1"]),
        ('instances = ["http://h:x"]', ["1: instances.0:", "is not an address"]),
        ('instances = ["router"]', ["is the router's file"]),
        ("instances = [a]", ["1: not TOML"]),
    ],
)
def test_what_is_wrong_is_said_with_its_line(
    folder: Path, text: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "router.toml"
    file.write_text(text)

    assert 78 == cli.router(file, check=True)
    message = capsys.readouterr().err
    for each in said:
        assert each in message


def test_without_the_program_it_says_how_to_get_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bin/vllm-router").unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    file = folder / "router.toml"
    file.write_text('instances = ["a"]')

    assert 75 == cli.router(file, check=True)
    assert "llm-serve setup" in capsys.readouterr().err


def test_the_shipped_example_is_good(folder: Path) -> None:
    for name in ("qwen7b-a", "qwen7b-b"):
        (folder / f"{name}.toml").write_text((folder / "a.toml").read_text().replace("8001", str(8000 + len(name))))

    command, notes = command_of(folder, EXAMPLE.read_text())

    assert command
    assert [] == notes


def test_the_routers_file_is_no_instance(folder: Path) -> None:
    (folder / "router.toml").write_text("")

    assert "router" not in instance_names(folder)
    with pytest.raises(ConfigError, match="llm-serve router"):
        instance_path("router", folder)
