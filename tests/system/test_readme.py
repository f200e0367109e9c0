"""README's commands, read from README and typed in its order into a booted Debian that has never seen llm-serve.

A command that is neither typed as it stands nor in INSTEAD, with the reason, fails the first test: nobody adds one unnoticed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from llm_serve import __version__
from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.readme import README, Command, commands
from tests.system.conftest import MODELS, PROJECT, open_the_checkout
from tests.system.machine import Machine
from tests.system.packaged import NEW, lend_packages, venv_of

pytestmark = [pytest.mark.system, pytest.mark.vllm, pytest.mark.timeout(1200)]

COMMANDS = commands(README.read_text())
_LIMIT_S = 300
_SHELL = (
    "env", "-i", "HOME=/root", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "DEBIAN_FRONTEND=noninteractive", f"LLM_SERVE_CACHE={default_cache(os.environ)}", "bash", "-c",
)  # fmt: skip
"""Root's, with nothing of the tests' own environment but where the demo's model is: this machine has no network."""


@dataclass(frozen=True)
class Instead:
    """Why a command does not run as it stands or need not end with 0, and what runs; "": nothing, `reason` says why."""

    reason: str
    runs: str = ""
    statuses: tuple[int, ...] = (0,)


def _as_it_stands(command: str, reason: str, *statuses: int) -> Instead:
    return Instead(reason, command, statuses)


_LONG = "measures or hurts engines for 25 minutes: what it would run is printed"
_HELP = (
    "measures for minutes, or on a GPU: that the module takes these options is asked; a checkout has Python in .venv"
)
_IN_FULL = "the name of a command that stands in full elsewhere"
_ELSEWHERE = "for other hosts, or Ray, which no machine here has"
_PAGES = "a test machine has no pager: the page is read where `man` looks for it"
_MODULES = sorted({command.text for command in COMMANDS if command.text.startswith("python -m tests.")})
INSTEAD: dict[str, Instead] = {
    "make test": Instead("is what runs this: .ci/run calls it"),
    "make faults": Instead(_LONG, "make -n faults"),
    "make bench": Instead(_LONG, "make -n bench"),
    **{words: Instead(_HELP, f".venv/bin/{words} --help") for words in _MODULES},
    "systemctl status": Instead(_IN_FULL),
    "llm-serve check": Instead(_IN_FULL),
    "llm-serve bench": Instead(_IN_FULL),
    "vllm bench serve": Instead("what a figure of ours is compared with, not a thing to do"),
    "/opt/llm-serve/current/bin/pip install ray": Instead("there is no network here"),
    "ray start --head": Instead(_ELSEWHERE),
    "ray start --address=HEAD:6379": Instead(_ELSEWHERE),
    "vllm serve --headless": Instead(_ELSEWHERE),
    "llm-serve bench qwen7b": Instead(
        "takes two minutes on its own", "llm-serve bench qwen7b --streams 1,2 --seconds 1 --warm-up 0"
    ),
    "llm-serve top": Instead("goes on until `q`", "llm-serve top --once"),
    "llm-serve top qwen7b": Instead("goes on until `q`", "llm-serve top qwen7b --once"),
    "llm-serve doctor qwen7b": _as_it_stands(
        "llm-serve doctor qwen7b", "75 is its word for a problem, which a container may well have", 0, 75
    ),
    "llm-serve stress": _as_it_stands("llm-serve stress", "75: there is no GPU here", 75),
    "man llm-serve": Instead(_PAGES, "mandoc -T html /usr/share/man/man8/llm-serve.8.gz"),
    "man llm-serve.toml": Instead(_PAGES, "mandoc -T html /usr/share/man/man5/llm-serve.toml.5.gz"),
}

SAYS = {
    "make setup BACKEND=cpu": "up to date",
    "llm-serve setup": "llm-serve: done",
    "systemctl status llm-serve@qwen7b": 'Status: "serving',
    "llm-serve check qwen7b": "max_model_len",
    "llm-serve import start.sh --output qwen7b.toml": "qwen7b.toml",
    "llm-serve import -- docker run --gpus all -p 8001:8000 vllm/vllm-openai:v0.8.4 --model Qwen/Qwen3-8B": "Qwen/Qwen3-8B",
    "llm-serve plan qwen7b": "KV cache",
    'llm-serve plan qwen7b --gpu "24GiB x 4"': "KV cache",
    "llm-serve router --check": "--worker-urls http://127.0.0.1:8000",
    "llm-serve status": "qwen7b",
    "llm-serve status qwen7b": "serving",
    "llm-serve top": "qwen7b",
    "llm-serve top qwen7b": "qwen7b",
    "llm-serve bench qwen7b": "tokens",
    "llm-serve stress": "GPU",
    "llm-serve targets --host gpu1.lan": "qwen7b is left out",  # it listens on loopback
    "llm-serve setup --rollback": __version__,
    "llm-serve setup --list": __version__,
    "man llm-serve": "restart_limit",
    "man llm-serve.toml": "hold_timeout_s",
}
"""What an answer holds, beside the status, so that a command that does nothing is not enough."""


def test_every_command_is_typed_or_excused() -> None:
    """And nothing is excused or expected that README does not say."""
    said = {command.text for command in COMMANDS}

    assert set() == INSTEAD.keys() - said
    assert set() == SAYS.keys() - said
    assert all(each.reason for each in INSTEAD.values())
    assert "make test" in (PROJECT / ".ci/run").read_text()
    for text in (words for words, each in INSTEAD.items() if each.reason == _IN_FULL):
        assert any(other.startswith(f"{text} ") for other in said), text


# ---- the walk ----------------------------------------------------------------------------------------


class Walk:
    """A reader at the machine's shell, as root, in the checkout."""

    def __init__(self, box: Machine) -> None:
        self._box = box
        self.seconds: dict[str, float] = {}

    def prepare(self) -> None:
        """What a reader's machine has, and this one does not; nothing of it changes a command."""
        box = self._box
        ensure_demo_model(default_cache(os.environ), print)
        if not (PROJECT / ".venv").exists():
            lend_packages(box, PROJECT / ".venv")
        shutil.copy(PROJECT / "tests/originals/rtx5090-start.sh", box.root / str(PROJECT / "start.sh").lstrip("/"))
        # A reader says yes, and images of Debian leave manuals and examples out.
        box.write("/etc/apt/apt.conf.d/90yes", 'APT::Get::Assume-Yes "true";\nAPT::Install-Recommends "false";\n')
        box.run("sh", "-c", "rm -f /etc/dpkg/dpkg.cfg.d/*")
        shutil.rmtree(box.root / str(PROJECT / "dist").lstrip("/"), ignore_errors=True)

    def type(self, command: Command) -> None:
        """Type it, or what INSTEAD has for it, and look at the answer."""
        instead = INSTEAD.get(command.text, _as_it_stands(command.text, "", 0))
        if not instead.runs:
            return
        began = time.monotonic()
        if before := self._before().get((command.section, command.text)):
            before()
        if command.text == "make demo":
            self._demo()
        else:
            self._look(command.text, self._shell(instead.runs), instead.statuses)
        if after := self._after().get(command.text):
            after()
        self.seconds[command.text] = time.monotonic() - began

    def _shell(self, line: str) -> subprocess.CompletedProcess[str]:
        words = f"cd {shlex.quote(str(PROJECT))}\n{line}\n"
        return self._box.run(*_SHELL, words, check=False, timeout=_LIMIT_S)

    def _look(self, text: str, done: subprocess.CompletedProcess[str], statuses: tuple[int, ...]) -> None:
        answer = f"{text}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.returncode in statuses, answer
        assert SAYS.get(text, "") in done.stdout + done.stderr, answer

    def _before(self) -> dict[tuple[str, str], Callable[[], None]]:
        return {("Upgrade and remove", "llm-serve setup"): self._install_the_new_package}

    def _after(self) -> dict[str, Callable[[], None]]:
        return {
            "apt install ./dist/llm-serve_*_all.deb": self._spare_the_download,
            "cp /usr/share/doc/llm-serve/examples/rtx3090-qwen2.5-7b.toml /etc/llm-serve/qwen7b.toml": self._change_it,
            "systemctl enable --now llm-serve@qwen7b": self._ask,
            "cp /usr/share/doc/llm-serve/examples/router.toml /etc/llm-serve/": self._name_the_instance,
            "systemctl enable --now llm-serve-router": self._ask_the_router,
            "systemctl try-restart 'llm-serve@*.service'": self._ask,
        }

    def _demo(self) -> None:
        """Until Ctrl-C, from another terminal: the curl line that it prints answers."""
        words = f"cd {shlex.quote(str(PROJECT))} && exec make demo"
        running = self._box.popen(*_SHELL, words, inside=True)
        assert running.stdout is not None
        said = ""
        for line in running.stdout:
            said += line
            if line.startswith("http://"):
                break
        found = re.search(r"^  curl .*?\]}'$", said, re.MULTILINE | re.DOTALL)
        assert found, said
        answer = json.loads(self._shell(found[0].replace("curl", "curl -sS", 1)).stdout)
        assert "Paris" in answer["choices"][0]["message"]["content"]
        os.killpg(running.pid, signal.SIGINT)
        running.communicate(timeout=_LIMIT_S)

    def _spare_the_download(self) -> None:
        """`setup` goes on where it stopped: before its last step."""
        lend_packages(self._box, venv_of(__version__))
        open_the_checkout(self._box)
        self._box.run("systemctl", "daemon-reload")

    def _install_the_new_package(self) -> None:
        self._look("apt install", self._shell(f"apt install /srv/llm-serve_{NEW}_all.deb"), (0,))
        lend_packages(self._box, venv_of(NEW))

    def _change_it(self) -> None:
        """The model for a machine without a GPU and without a network."""
        model = ensure_demo_model(default_cache(os.environ), print)
        shutil.copytree(model, self._box.root / MODELS / model.name, dirs_exist_ok=True)
        self._box.run("chown", "-R", "llm-serve:llm-serve", "/var/cache/llm-serve")
        self._box.write("/etc/llm-serve/qwen7b.toml", (PROJECT / "config/demo.toml").read_text())

    def _ask(self) -> None:
        assert "smollm2" in self._box.run("curl", "-sS", "http://127.0.0.1:8000/v1/models").stdout

    def _name_the_instance(self) -> None:
        self._box.write("/etc/llm-serve/router.toml", 'instances = ["qwen7b"]\n')

    def _ask_the_router(self) -> None:
        def models() -> bool:
            return "smollm2" in self._box.run("curl", "-s", "http://127.0.0.1:30000/v1/models", check=False).stdout

        self._box.wait_until(models, 60, "an answer through the router")


def test_a_reader_gets_as_far_as_readme_says(bare: Machine) -> None:
    """One walk, because each command stands on those before: from `make demo` to `apt purge`."""
    walk = Walk(bare)
    walk.prepare()

    for command in COMMANDS:
        walk.type(command)
        print(f"{walk.seconds.get(command.text, 0.0):6.1f} s  {command.text}")

    assert "not-found" == bare.show("llm-serve@qwen7b", "LoadState")
