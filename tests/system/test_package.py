"""The Debian package on a booted Debian: installed, upgraded under clients, rolled back, removed, purged."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.system.conftest import MODELS, PROJECT, UNIT
from tests.system.machine import Machine
from tests.system.packaged import NEW, OLD, build, lend_packages, venv_of

pytestmark = [pytest.mark.system, pytest.mark.vllm, pytest.mark.timeout(300)]

_START_LIMIT_S = 240
_SHARED = (
    "etc/.pwd.lock", "etc/credstore", "etc/group-", "etc/gshadow-", "etc/passwd-", "etc/shadow-", "etc/subgid-",
    "etc/subuid-", "root", "run", "tmp", "var/cache", "var/lib/PackageKit", "var/lib/apt", "var/lib/dpkg",
    "var/lib/systemd", "var/log", "var/tmp",
)  # fmt: skip
"""Where dpkg, apt and systemd write for any package; what has our name is looked for there all the same."""


def test_one_tree_gives_one_package(packages: dict[str, Path], tmp_path: Path) -> None:
    """Built again later and elsewhere, it is the same file."""
    assert packages[OLD].read_bytes() == build(tmp_path, OLD).read_bytes()


def test_package_holds_what_it_should_and_no_environment(packages: dict[str, Path]) -> None:
    words = ["dpkg-deb", "--fsys-tarfile", str(packages[OLD])]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as archive:
        listed = subprocess.run(["tar", "-t"], stdin=archive.stdout, capture_output=True, text=True, check=True).stdout
    names = {line.lstrip(".") for line in listed.splitlines()}

    assert names >= {
        "/usr/bin/llm-serve",
        "/usr/lib/systemd/system/llm-serve@.service",
        "/usr/lib/systemd/system/llm-serve.target",
        "/usr/lib/sysusers.d/llm-serve.conf",
        "/usr/lib/tmpfiles.d/llm-serve.conf",
        "/usr/share/doc/llm-serve/examples/rtx3090-qwen2.5-7b.toml",
        f"/usr/share/llm-serve/llm_serve-{OLD}-py3-none-any.whl",
        "/usr/share/llm-serve/locks/cpu.txt",
        "/usr/share/llm-serve/locks/cuda.txt",
        "/usr/share/llm-serve/locks/router.txt",
        "/usr/share/llm-serve/setup",
    }
    for folder in ("packaging/prometheus", "packaging/grafana"):
        shipped = [path.name for end in ("yml", "json") for path in (PROJECT / folder).glob(f"*.{end}")]
        assert names >= {f"/usr/share/llm-serve/{Path(folder).name}/{name}" for name in shipped}
    if (PROJECT / "packaging/man").exists():
        assert names >= {"/usr/share/man/man8/llm-serve.8.gz", "/usr/share/man/man5/llm-serve.toml.5.gz"}
        assert "/usr/share/bash-completion/completions/llm-serve" in names
    assert packages[OLD].stat().st_size < 1_000_000


@pytest.mark.skipif(not shutil.which("lintian"), reason="needs lintian")
def test_lintian_has_nothing_to_say(packages: dict[str, Path]) -> None:
    words = ["lintian", "--allow-root", "--pedantic"]
    done = subprocess.run([*words, str(packages[OLD])], capture_output=True, text=True, check=False)

    is_documented = (PROJECT / "packaging/man").exists()
    assert not [line for line in done.stdout.splitlines() if is_documented or "no-manual-page" not in line]


# ---- a life ------------------------------------------------------------------------------------------


def apt(box: Machine, *words: str) -> str:
    options = ("-y", "-q", "--no-install-recommends")
    return box.run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *options, *words, timeout=100).stdout


def ask(box: Machine) -> str:
    body = {"model": "smollm2-135m-instruct", "temperature": 0, "max_tokens": 12}
    body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    url, form = "http://127.0.0.1:8000/v1/chat/completions", "content-type: application/json"
    done = box.run("curl", "-sS", "--max-time", "100", url, "-H", form, "-d", json.dumps(body))
    return str(json.loads(done.stdout)["choices"][0]["message"]["content"])


def environment_of(box: Machine) -> set[str]:
    """The environments whose Python the daemon was started with."""
    words = box.run("cat", f"/proc/{box.show(UNIT, 'MainPID')}/cmdline").stdout
    return set(re.findall(r"/opt/llm-serve/venvs/([^/]+)/", words))


def version_of(box: Machine) -> str:
    return box.run("llm-serve", "--version").stdout.split()[-1]


def environments(box: Machine) -> dict[str, list[str]]:
    rows: list[dict[str, Any]] = json.loads(box.run("llm-serve", "setup", "--list", "--json").stdout)
    return {row["name"]: row["links"] for row in rows}


def test_whole_life_of_the_package(bare: Machine, tmp_path: Path) -> None:
    """One test, because each step stands on the one before: from `apt install` to `apt purge`."""
    model = ensure_demo_model(default_cache(os.environ), print)
    before = bare.added()

    # Installed, nothing built: units and user are there, and every command says what comes first.
    assert "llm-serve setup" in apt(bare, "install", f"/srv/llm-serve_{OLD}_all.deb")
    early = bare.run("llm-serve", "status", check=False)
    assert (78, 1) == (early.returncode, early.stderr.count("\n"))
    assert "root:llm-serve 750" == bare.run("stat", "-c", "%U:%G %a", "/etc/llm-serve").stdout.strip()

    # Set up: what was cut off is gone on with, tried, and current.
    lend_packages(bare, venv_of(OLD))
    said = bare.run("llm-serve", "setup", "--backend", "cpu").stdout
    assert "[1/1] llm-serve: done" in said, said
    assert "up to date" not in said
    assert (OLD, {OLD: ["current"]}) == (version_of(bare), environments(bare))
    shutil.copytree(model, bare.root / MODELS / model.name)
    bare.run("chown", "-R", "llm-serve:llm-serve", "/var/cache/llm-serve")
    bare.write("/etc/llm-serve/demo.toml", (PROJECT / "config/demo.toml").read_text())
    bare.run("systemctl", "enable", "--now", UNIT, timeout=_START_LIMIT_S)
    assert "Paris" in ask(bare)
    assert {OLD} == environment_of(bare)

    # Upgraded while a client connects without a pause: nothing happens to the instance before it is restarted.
    stop, first = tmp_path / "stop", bare.show(UNIT, "MainPID")
    loop = bare.popen(sys.executable, str(Path(__file__).parent / "connect_loop.py"), "127.0.0.1", "8000", str(stop))
    apt(bare, "install", f"/srv/llm-serve_{NEW}_all.deb")
    lend_packages(bare, venv_of(NEW))
    said = bare.run("llm-serve", "setup").stdout
    assert f"Running instances go on in {OLD}" in said
    assert (first, {OLD}) == (bare.show(UNIT, "MainPID"), environment_of(bare))
    bare.run("systemctl", "try-restart", "llm-serve@*.service", timeout=_START_LIMIT_S)
    assert "Paris" in ask(bare)
    stop.touch()
    seen = json.loads(loop.communicate(timeout=90)[0])
    print(f"while it was upgraded: {seen}")
    assert {"200"} == set(seen["answers"]), seen
    assert seen["answers"]["200"] > 100
    assert first != bare.show(UNIT, "MainPID")
    assert {NEW} == environment_of(bare)
    assert {OLD: ["previous"], NEW: ["current"]} == environments(bare)

    # Rolled back: the next start is in the old one; the instance that runs is asked nothing.
    bare.run("llm-serve", "setup", "--rollback")
    assert (OLD, {NEW}) == (version_of(bare), environment_of(bare))
    assert {OLD: ["current"], NEW: ["previous"]} == environments(bare)
    assert "nothing to remove" in bare.run("llm-serve", "setup", "--prune").stdout

    # Removed: nothing runs, and what an admin wrote or fetched is still there.
    apt(bare, "remove", "llm-serve")
    assert not bare.run("ps", "-u", "llm-serve", "-o", "pid=", check=False).stdout.strip()
    assert (bare.root / "etc/llm-serve/demo.toml").exists()
    assert (bare.root / MODELS / model.name).exists()
    assert (bare.root / "opt/llm-serve/current").is_symlink()

    # Purged: nothing is left.
    bare.write("/etc/credstore/llm-serve.demo.api-keys", "a-key\n", 0o600)
    apt(bare, "purge", "llm-serve")
    left = bare.added() - before
    assert not {path for path in left if not path.startswith(_SHARED) or "llm-serve" in path}
    for name in ("passwd", "group", "shadow", "gshadow"):
        assert "llm-serve" not in (bare.root / "etc" / name).read_text()
    assert "not-found" == bare.show(UNIT, "LoadState")
