"""Who may import what: the pure core, the border to vLLM, and commands that start at once."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import llm_serve

ROOT = Path(llm_serve.__file__).parent
CORE = sorted((ROOT / "core").rglob("*.py"))
EVERYTHING = sorted(ROOT.rglob("*.py"))

PURE = frozenset(
    {
        "__future__",
        "bisect",
        "collections",
        "collections.abc",
        "contextlib",
        "copy",
        "dataclasses",
        "difflib",
        "enum",
        "hashlib",
        "ipaddress",
        "itertools",
        "json",
        "math",
        "pydantic",
        "pydantic_core",
        "re",
        "signal",
        "textwrap",
        "tomllib",
        "types",
        "typing",
        "unicodedata",
        "urllib.parse",
        "llm_serve.core",
        "llm_serve.core.doctor",
        "llm_serve.core.terminal",
    }
)
"""What the core may import: nothing here opens, waits or looks at a clock (of `signal` only the names are used)."""


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def module(path: Path) -> str:
    """The name by which a file of ours is imported."""
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in EVERYTHING}


def ours(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports: at once, late, for its types alone, or by a name in a string."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names):
                found = [each.name for each in names]
            case ast.ImportFrom(package, names):
                found = [part if (part := f"{package}.{each.name}") in MODULES else f"{package}" for each in names]
            case ast.Call(
                ast.Attribute(attr="import_module") | ast.Name("import_module"), [ast.Constant(str(name)), *_]
            ):
                found = [name]
            case _:
                found = []
        yield from (name for name in found if name in MODULES)


def test_imports_go_one_way() -> None:
    """No module reaches itself through what it imports: each can be read knowing only what lies below it."""
    below = {name: set(ours(path)) for name, path in MODULES.items()}
    circle: list[str] = []
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        circle = error.args[1]

    assert sum(map(len, below.values())) > len(MODULES)
    assert [] == circle


def names(path: Path) -> set[str]:
    """The bare names that a file uses."""
    return {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_is_pure(path: Path) -> None:
    """No module of core/ imports anything that does I/O, or calls a built-in that does."""
    known = {name if name in PURE else name.rpartition(".")[0] or name for name in imports(path)}

    assert set() == known - PURE
    assert set() == names(path) & {"open", "print", "input", "exec", "eval", "__import__"}


def test_signals_are_only_named_in_the_core() -> None:
    """Of `signal` the core uses the numbers and their names, never a handler."""
    used = {
        node.attr
        for path in CORE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "signal"
    }

    assert {"Signals", "SIGKILL"} == used


STRESS = ("child", "memory", "operations", "products", "rig")


@pytest.mark.parametrize("name", ["vllm", "torch", "transformers"])
def test_only_engine_imports_vllm(name: str) -> None:
    """engine/ is the border: a new vLLM can break nothing outside it."""
    # The demo's model is converted, and GPUs are tested, in processes of their own, which need no vLLM.
    apart = {ROOT / "host/demo_convert.py"} if name != "vllm" else set()
    allowed = apart | {ROOT / f"stress/{each}.py" for each in STRESS if name == "torch"}
    found = {
        path
        for path in EVERYTHING
        if path.parent != ROOT / "engine" and any(each.split(".")[0] == name for each in imports(path))
    }

    assert set() == found - allowed


def test_the_relay_needs_the_standard_library_alone() -> None:
    """It is loaded into every process of vLLM."""
    foreign = {name.split(".")[0] for name in imports(ROOT / "engine/relay.py")} - sys.stdlib_module_names

    assert set() == foreign


HEAVY = (
    "vllm",
    "torch",
    "transformers",
    "fastapi",
    "uvicorn",
    "starlette",
    "prometheus_client",
    "structlog",
    "aiohttp",
)


def test_the_daemon_answers_before_it_has_loaded_vllm() -> None:
    """Whatever its loop needs is there without it, front ends of its own making included."""
    code = (
        "import sys\n"
        "import llm_serve.cli.run, llm_serve.supervisor, llm_serve.door, llm_serve.front_ends.pool\n"
        "import llm_serve.engine.attach, llm_serve.engine.orphans\n"
        "print(*sorted({'vllm', 'torch', 'transformers'} & set(sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert "" == done.stdout.strip()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("run", "check", "doctor", "import", "plan", "bench", "stress", "targets")),
        *([name, "--help"] for name in ("status", "top")),
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    """The command line is there at once: vLLM, torch and the web server are loaded by what needs them."""
    code = (
        "import sys\n"
        "from llm_serve.cli.main import main\n"
        "sys.argv[0] = 'llm-serve'\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"print(*sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=True
    )

    assert "llm-serve" in done.stdout
    assert "" == done.stderr.strip()
