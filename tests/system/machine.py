"""A booted Debian to test the service on: systemd in a container, over an overlay of this machine's own files or others.

What is written in it goes to a tmpfs. A reboot is its end and a new boot of the same overlay.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.patience import patient

_BOOT_LIMIT_S = 60.0
_OVERLAY_BYTES = "8g"


class Machine:
    """One machine. Files survive `reboot` and `power_cut`; nothing survives `close`.

    `lower` is what it begins with. `options` go to systemd-nspawn; by default it has a network of its own.
    """

    def __init__(self, lower: Path = Path("/"), options: Sequence[str] = ("--private-network",)) -> None:
        self._lower, self._options = lower, options
        self._base = Path(tempfile.mkdtemp(prefix="llm-serve-machine-"))
        self.root = self._base / "root"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._programs: list[subprocess.Popen[str]] = []
        self._leader = 0
        _run("mount", "-t", "tmpfs", "-o", f"size={_OVERLAY_BYTES}", "tmpfs", str(self._base))
        for name in ("upper", "work", "root"):
            (self._base / name).mkdir()
        layers = f"lowerdir={lower},upperdir={self._base}/upper,workdir={self._base}/work"
        _run("mount", "-t", "overlay", "overlay", "-o", layers, str(self.root))
        self._leave_host_services_out()

    def _leave_host_services_out(self) -> None:
        """Only what the test enables shall start."""
        for folder in (self.root / "etc/systemd/system").glob("*.wants"):
            shutil.rmtree(folder)
        for name in (
            "getty.target",
            "systemd-resolved.service",
            "systemd-networkd.service",
            "systemd-timesyncd.service",
        ):
            (self.root / "etc/systemd/system" / name).unlink(missing_ok=True)
            (self.root / "etc/systemd/system" / name).symlink_to("/dev/null")
        (self.root / "etc/systemd/system/default.target").unlink(missing_ok=True)
        (self.root / "etc/systemd/system/default.target").symlink_to("/lib/systemd/system/multi-user.target")
        # At boot systemd-tmpfiles would empty /tmp, where a checkout may lie.
        (self.root / "etc/tmpfiles.d/tmp.conf").write_text("")
        (self.root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")

    def boot(self) -> None:
        """Start it and wait until systemd says that it is up."""
        self.power_on()
        self.wait_until(self._is_up, _BOOT_LIMIT_S, "systemd to be up")

    def power_on(self) -> None:
        """Start it, and wait for nothing but its first process."""
        command = [
            "systemd-nspawn",
            "-q",
            "-D",
            str(self.root),
            "--boot",
            "--register=no",
            "--keep-unit",
            *self._options,
        ]
        # Its own tmpfs on /tmp would hide a checkout that lies there.
        environment = os.environ | {"SYSTEMD_NSPAWN_TMPFS_TMP": "0"}
        self._nspawn = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._leader = self.wait_until(self._find_leader, _BOOT_LIMIT_S, "a first process")

    def _find_leader(self) -> int:
        """The one that is number 1 in there: nspawn's first child only makes it, and ends."""
        assert self._nspawn is not None
        for child in psutil.Process(self._nspawn.pid).children(recursive=True):
            if _numbers(child.pid)[1:] == ["1"]:
                return child.pid
        return 0

    def _is_up(self) -> bool:
        return self.run("systemctl", "is-system-running", check=False).stdout.strip() in {"running", "degraded"}

    @property
    def is_on(self) -> bool:
        """True while it runs."""
        return self._nspawn is not None and self._nspawn.poll() is None

    def run(self, *command: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine, as root."""
        where = ["nsenter", "-t", str(self._leader), "-a"]
        done = subprocess.run(
            [*where, *command],
            check=False,
            capture_output=True,
            text=True,
            timeout=patient(timeout),
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}: {done.stdout}{done.stderr}"
        return done

    def host_pid(self, pid: str) -> int:
        """The number by which this host knows a process of the machine."""
        for process in psutil.Process(self._leader).children(recursive=True):
            if _numbers(process.pid)[-1:] == [pid]:
                return process.pid
        raise LookupError(f"the machine has no process {pid}")

    def popen(self, *command: str, inside: bool = False) -> subprocess.Popen[str]:
        """Start a program of this host in the machine's network, or one of the machine, with a process group of its own."""
        where = ["nsenter", "-t", str(self._leader), "-a" if inside else "-n"]
        started = subprocess.Popen(
            [*where, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=inside
        )
        self._programs.append(started)
        return started

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "-P", name, unit).stdout.strip()

    def journal(self, unit: str) -> list[dict[str, Any]]:
        """Every entry of a unit since boot, with all fields."""
        out = self.run("journalctl", "-b", "-o", "json", "--all", "-u", unit).stdout
        return [json.loads(line) for line in out.splitlines()]

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file in the machine."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def wait_until(self, ask: Callable[[], Any], timeout_s: float, what: str) -> Any:
        """Ask until the answer is true. Fails with the last answer when that takes too long."""
        deadline, last = time.monotonic() + patient(timeout_s), None
        while time.monotonic() < deadline:
            if last := ask():
                return last
            time.sleep(0.2)
        raise AssertionError(f"waited {patient(timeout_s):g} s for {what}; last seen: {last!r}")

    def added(self) -> set[str]:
        """The paths of all files and folders that are here and not in what it began with."""
        upper = self._base / "upper"
        paths = {str(path.relative_to(upper)) for path in upper.rglob("*") if not path.is_char_device()}
        return {path for path in paths if not os.path.lexists(self._lower / path)}

    def reboot(self) -> None:
        """Shut it down in order, and boot it again."""
        self.run("systemctl", "poweroff", "--no-block", check=False)
        self._wait_for_end(60)
        self.boot()

    def power_cut(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._leader, signal.SIGKILL)
        self._wait_for_end(20)

    def _wait_for_end(self, timeout_s: float) -> None:
        assert self._nspawn is not None
        self._nspawn.wait(patient(timeout_s))
        self._nspawn = None

    def close(self) -> None:
        """End it and what was started in its network, and remove all that it wrote."""
        for program in self._programs:
            with program:
                program.kill()
        if self._nspawn is not None and self._nspawn.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.power_cut()
        if self._nspawn is not None:
            self._nspawn.kill()
            self._nspawn.wait()
        for mount in (self.root, self._base):
            subprocess.run(["umount", "-l", str(mount)], check=False)
        self._base.rmdir()


def _numbers(pid: int) -> list[str]:
    """By which numbers a process is known, from this host's namespace inwards; none when it has gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/status").read_text().partition("NSpid:")[2].partition("\n")[0].split()
    return []


@contextlib.contextmanager
def machine(lower: Path = Path("/"), options: Sequence[str] = ("--private-network",)) -> Iterator[Machine]:
    """A machine that is gone afterwards, whatever happens in between."""
    built = Machine(lower, options)
    try:
        yield built
    finally:
        built.close()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
