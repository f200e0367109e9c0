"""Mistakes in a file or a model: `check` names each with its place and its remedy, in words that partly are vLLM's.

A start says the same and ends with the same status: tests/e2e/test_bad_inputs.py, for some of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from llm_serve.cli.check import check
from llm_serve.host.demo_model import default_cache, ensure_demo_model
from tests.daemon import ENGINE, instance_text

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120)]

BAD_TABLES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "wrong type": ({"server": {"hold_timeout_s": "long"}}, ("server.hold_timeout_s: must be a number", "long")),
    "below the bound": ({"recovery": {"restart_limit": 0}}, ("recovery.restart_limit:", "1")),
    "an address for all without keys": (
        {"server": {"listen": "0.0.0.0:8999"}},
        ("server.listen:", "0.0.0.0:8999", "api_keys"),
    ),
    "no address": ({"server": {"listen": "everywhere"}}, ("server.listen:", "host:port")),
    "unknown option of vLLM's": (
        {"engine": {"max_model_length": 8}},
        ("engine.max_model_length:", "Did you mean max_model_len?"),
    ),
    "wrong value of vLLM's": ({"engine": {"dtype": "bf16"}}, ("engine.dtype:", "Did you mean bfloat16?")),
    "an option that is ours to set": ({"engine": {"port": 1}}, ("engine.port:", "server.listen")),
    "a length that the model has not": (
        {"engine": {"max_model_len": 1_000_000}},
        ("engine.max_model_len:", "8192"),
    ),
    "a reasoning parser for other models": (
        {"engine": {"reasoning_parser": "deepseek_r1"}},
        ("engine", "could not locate think start/end tokens"),
    ),
    "a dangerous variable": (
        {"engine.env": {"VLLM_SERVER_DEV_MODE": "1"}},
        ("VLLM_SERVER_DEV_MODE",),
    ),
    "a chat template that is not there": (
        {"engine": {"chat_template": "/nonexistent/template.jinja"}},
        ("/nonexistent/template.jinja",),
    ),
    "several at once": (
        {"server": {"max_qeued": 1, "hold_timeout_s": "long"}, "recovery": {"restart_limit": 0}},
        ("server.max_qeued", "server.hold_timeout_s", "recovery.restart_limit"),
    ),
}

MISSING = {
    "config.json": "has no config.json",
    "model.safetensors": "has no weights",
    "tokenizer.json": "has no tokenizer",
}

Says = Callable[..., str]


@pytest.fixture(scope="module")
def model() -> Path:
    """The folder of the embedded model."""
    return ensure_demo_model(default_cache(os.environ), print)


@pytest.fixture
def says(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Says:
    """What `check` says of a file, and that it ends with 78."""

    def ask(tables: dict[str, Any], of: Path = model) -> str:
        engine = dict(ENGINE) | tables.get("engine", {})
        file = tmp_path / "tiny.toml"
        file.write_text(instance_text(of, tables | {"engine": engine}))
        assert 78 == check(str(file), json_output=False)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return " ".join(said.split())

    return ask


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the model whose big file is a link."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model.iterdir():
        if file.name == "model.safetensors":
            (folder / file.name).symlink_to(file)
        else:
            shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_wrong_file_is_refused_with_the_place(says: Says, case: str) -> None:
    """Each mistake has a message of its own that names the option and the remedy; nobody fixes a file one by one."""
    tables, phrases = BAD_TABLES[case]
    said = says(tables)
    assert [] == [phrase for phrase in phrases if phrase not in said], said


def test_a_missing_model_folder(says: Says, tmp_path: Path) -> None:
    """A path that is not there is not taken for a hub id."""
    assert "nowhere does not exist" in says({}, tmp_path / "nowhere")


@pytest.mark.parametrize("name", MISSING)
def test_a_model_without_a_part(says: Says, copy: Path, name: str) -> None:
    """Found before an engine is built."""
    (copy / name).unlink()
    assert MISSING[name] in says({}, copy)


def test_a_config_that_is_no_json(says: Says, copy: Path) -> None:
    """A damaged config.json is named."""
    (copy / "config.json").write_text("{")
    assert "config.json" in says({}, copy)
