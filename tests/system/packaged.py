"""The Debian package of this tree for a machine, and environments that need no download."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.system.machine import Machine
from tests.unit.test_install import install

PROJECT = Path(__file__).parents[2]
OLD, NEW = "0.8.0", "0.8.1"
"""Versions that this tree is packaged under; both are later than its own."""


def build(folder: Path, version: str) -> Path:
    """The package of this tree as `make deb` builds it, under another version."""
    words = [str(PROJECT / "packaging/deb"), "--python", sys.executable, "--version", version, "--out", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)
    assert 0 == done.returncode, done.stdout + done.stderr
    return folder / f"llm-serve_{version}_all.deb"


def venv_of(version: str) -> Path:
    """Where `llm-serve setup` builds the environment of a version."""
    return Path("/opt/llm-serve/venvs") / version


def lend_packages(box: Machine, venv: Path) -> None:
    """An environment as `setup` leaves it that was cut off before its last step.

    Fetching and unpacking 3 GB is what test_package does when asked to; here the checkout's own are lent to it.
    """
    box.run("/usr/bin/python3", "-m", "venv", "--without-pip", str(venv))
    inside = "lib/python{}.{}/site-packages/lent.pth".format(*sys.version_info)
    box.write(str(venv / inside), sysconfig.get_path("purelib") + "\n")
    box.write(str(venv / "bin/vllm-router"), _ROUTER.format(venv=venv), 0o755)
    environment = install.Environment(venv, "cpu", "cpu")
    done = {name: key for name, key, _ in environment.steps(dev=False) if name != "llm-serve"}
    stamp = {"asked": "cpu", "backend": "cpu", "python": [*sys.version_info[:2]], "revision": install.REVISION}
    box.write(str(venv / install.STAMP), json.dumps(stamp | {"done": done}))


_ROUTER = "#!{venv}/bin/python\nfrom vllm_router.launch_router import main\n\nmain()\n"
