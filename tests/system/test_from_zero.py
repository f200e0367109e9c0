"""The package on a bare Debian that has no Python yet, with every package fetched: to a served model, and by piuparts.

Takes minutes and fetches gigabytes: LLM_SERVE_FROM_ZERO=1. Further folders that this machine's pip needs can be named
instead of the 1, with colons between.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.system.conftest import MODELS, PROJECT
from tests.system.machine import Machine, machine
from tests.system.packaged import OLD

_FROM_ZERO = os.environ.get("LLM_SERVE_FROM_ZERO", "")

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not _FROM_ZERO, reason="takes minutes and fetches gigabytes: LLM_SERVE_FROM_ZERO=1"),
]

_WHEELS = "/srv/wheels"


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bare Debian 12 from its mirror, with this machine's settings of pip and its certificates."""
    root = tmp_path_factory.mktemp("zero") / "debian"
    include = "--include=systemd,systemd-sysv,dbus,ca-certificates,curl"
    subprocess.run(["debootstrap", "--variant=minbase", include, "bookworm", str(root)], check=True)
    own = str(Path.home() / ".config/pip/pip.conf").lstrip("/")
    for name in ("etc/pip.conf", own, "etc/ssl/certs/ca-certificates.crt", "etc/resolv.conf"):
        if Path("/", name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).unlink(missing_ok=True)  # resolv.conf may be a link into /run
            shutil.copy(Path("/", name), root / name)
    yield root
    shutil.rmtree(root)


class Way:
    """Commands typed one after the other into a machine, each with its time."""

    def __init__(self, box: Machine) -> None:
        self._box = box
        self._took: dict[str, float] = {}

    def type(self, *words: str) -> str:
        """Run one to its end; what it printed."""
        began = time.monotonic()
        said = self._box.run("env", "DEBIAN_FRONTEND=noninteractive", *words, timeout=2400).stdout
        self._took[" ".join(words)] = time.monotonic() - began
        print(said)
        return said

    def serve(self) -> str:
        """Start the demo's model, which is brought, not fetched; the list of models that is served."""
        model, root = ensure_demo_model(default_cache(os.environ), print), self._box.root
        shutil.copytree(model, root / MODELS / model.name)
        text = (PROJECT / "config/demo.toml").read_text().replace("127.0.0.1:8000", "127.0.0.1:8765")
        self._box.write("/etc/llm-serve/qwen7b.toml", text)
        self._box.run("chown", "-R", "llm-serve:llm-serve", "/var/cache/llm-serve")
        self.type("systemctl", "enable", "--now", "llm-serve@qwen7b")
        return self.type("curl", "-sS", "http://127.0.0.1:8765/v1/models")

    def tell(self) -> None:
        """Print how long all of it took."""
        for words, seconds in self._took.items():
            print(f"{seconds:7.1f} s  {words}")
        print(f"{sum(self._took.values()) / 60:7.1f} min in {len(self._took)} commands and one file")


def test_from_zero_to_served(debian: Path, packages: dict[str, Path]) -> None:
    """README's commands, timed."""
    binds = [f"--bind-ro={folder}" for folder in _FROM_ZERO.split(":") if folder.startswith("/")]
    with machine(debian, ["--resolv-conf=off", *binds]) as box:
        shutil.copy(packages[OLD], box.root / "srv")
        box.boot()
        way = Way(box)
        way.type("apt-get", "install", "-y", f"/srv/llm-serve_{OLD}_all.deb")
        way.type("llm-serve", "setup")
        assert "smollm2" in way.serve()
        way.tell()


def test_from_zero_without_network(debian: Path, packages: dict[str, Path], tmp_path: Path) -> None:
    """What packaging/locks/README.md says to fetch elsewhere is all that `setup --find-links` needs."""
    wheels = tmp_path / "wheels"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "v"], check=True)
    locks = PROJECT / "packaging/locks"
    fetch = [f"{tmp_path}/v/bin/pip", "download", "-q", "--no-deps", "-d", str(wheels)]
    torch = [*fetch, "-r", f"{locks}/torch-cpu.txt"]
    if subprocess.run(torch, check=False).returncode:  # not where this machine's pip looks
        subprocess.run([*torch, "--index-url", "https://download.pytorch.org/whl/cpu"], check=True)
    for name in ("cpu.txt", "router.txt"):
        subprocess.run([*fetch, "--require-hashes", "-r", f"{locks}/{name}"], check=True)

    with machine(debian, [f"--bind-ro={wheels}:{_WHEELS}", "--resolv-conf=off"]) as box:
        shutil.copy(packages[OLD], box.root / "srv")
        box.boot()
        way = Way(box)
        way.type("apt-get", "install", "-y", f"/srv/llm-serve_{OLD}_all.deb")  # Debian's own, Python among them
        setup = ("llm-serve", "setup", "--backend", "cpu", "--find-links", _WHEELS)
        way.type("unshare", "--net", *setup)
        assert "smollm2" in way.serve()
        way.tell()


def test_piuparts(debian: Path, packages: dict[str, Path], tmp_path: Path) -> None:
    """Installed, removed, purged and installed again by Debian's own judge of packages, where systemd is already: what
    that leaves behind when it is purged is not ours."""
    log = tmp_path / "piuparts.log"
    words = ["piuparts", "--distribution=bookworm", f"--existing-chroot={debian}", f"--log-file={log}"]
    done = subprocess.run([*words, "--no-eatmydata", str(packages[OLD])], check=False, stdout=subprocess.DEVNULL)
    print("\n".join(log.read_text().splitlines()[-40:]))
    assert 0 == done.returncode
