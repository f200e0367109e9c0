"""One booted machine with the service installed, shared by all tests here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.figures import ROWS, Watch, report, watch_of
from tests.system.machine import Machine, machine
from tests.system.packaged import NEW, OLD, build

PROJECT = Path(__file__).parents[2]
UNIT = "llm-serve@demo"
MODELS = "var/cache/llm-serve/models"


@pytest.fixture(scope="session")
def box() -> Iterator[Machine]:
    """A booted machine with the unit, its user, the demo model and config/demo.toml, nothing started."""
    if os.geteuid() != 0 or not shutil.which("systemd-nspawn"):
        pytest.skip("booting a systemd needs root and systemd-nspawn (Debian: systemd-container)")
    model = ensure_demo_model(default_cache(os.environ), print)
    with machine() as built:
        _install(built, model)
        built.boot()
        built.run("systemd-sysusers")
        built.run("systemd-tmpfiles", "--create", "/usr/lib/tmpfiles.d/llm-serve.conf")
        built.run("chown", "-R", "llm-serve:llm-serve", "/var/cache/llm-serve")
        yield built


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tree, packaged under two versions."""
    if not shutil.which("dh"):
        pytest.skip("building the package needs debhelper")
    folder = tmp_path_factory.mktemp("packages")
    return {version: build(folder, version) for version in (OLD, NEW)}


@pytest.fixture(scope="session")
def bare(packages: dict[str, Path]) -> Iterator[Machine]:
    """A booted machine that has never seen the package; both versions of it lie in /srv."""
    if os.geteuid() != 0 or not shutil.which("systemd-nspawn"):
        pytest.skip("booting a systemd needs root and systemd-nspawn (Debian: systemd-container)")
    minor = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys; print(*sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
    )
    if minor.stdout.split() != [str(each) for each in sys.version_info[:2]]:
        pytest.skip("the system's Python is another than the one that runs the tests: its packages cannot be lent")
    with machine() as built:
        for package in packages.values():
            shutil.copy(package, built.root / "srv")
        # In a container image it forbids packages to start and stop services.
        (built.root / "usr/sbin/policy-rc.d").unlink(missing_ok=True)
        open_the_checkout(built)
        built.boot()
        yield built


@pytest.fixture
def watch(request: pytest.FixtureRequest) -> Watch:
    """The row of this test in the table of figures."""
    return watch_of(request)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table."""
    if ROWS:
        terminalreporter.write_sep("=", "faults")
        report(terminalreporter.write_line)


def _install(built: Machine, model: Path) -> None:
    root = built.root
    for unit in PROJECT.glob("systemd/llm-serve*.*"):
        shutil.copy(unit, root / "etc/systemd/system")
    shutil.copy(PROJECT / "systemd/sysusers.d/llm-serve.conf", root / "usr/lib/sysusers.d/llm-serve.conf")
    shutil.copy(PROJECT / "systemd/tmpfiles.d/llm-serve.conf", root / "usr/lib/tmpfiles.d/llm-serve.conf")
    built.write("/usr/bin/llm-serve", _LAUNCHER.format(python=sys.executable, daemon=PROJECT / "daemon"), 0o755)
    shutil.copytree(model, root / MODELS / model.name, dirs_exist_ok=True)
    built.write("/etc/llm-serve/demo.toml", (PROJECT / "config/demo.toml").read_text())
    open_the_checkout(built)


_LAUNCHER = "#!/bin/sh\nPYTHONPATH='{daemon}' exec '{python}' -c 'from llm_serve.cli.main import main; main()' \"$@\"\n"


def open_the_checkout(built: Machine) -> None:
    """Let the service user reach an interpreter and a checkout that live in somebody's home or in /tmp, as in development.

    An installed service has its environment under /opt, and both protections stay on.
    """
    hidden = {"/root": "ProtectHome=no", "/home": "ProtectHome=no", "/tmp": "PrivateTmp=no"}
    lifted = set()
    for path in (Path(sys.executable).resolve(), Path(sys.prefix), PROJECT):
        for parent in (path, *path.parents):
            inside = built.root / str(parent).lstrip("/")
            inside.chmod(inside.stat().st_mode | 0o011)
        lifted |= {option for place, option in hidden.items() if path.is_relative_to(place)}
    if lifted:
        for unit in ("llm-serve@.service", "llm-serve-targets.service", "llm-serve-router.service"):
            built.write(f"/etc/systemd/system/{unit}.d/checkout.conf", "\n".join(["[Service]", *lifted, ""]))
