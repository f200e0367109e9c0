"""What a reload relies on of vLLM: the names of what needs a restart, and its judgement of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from llm_serve.cli import control
from llm_serve.cli.reload import reload
from llm_serve.core.reload import OF_THE_APPLICATION, OF_THE_GPUS, OF_THE_MODEL
from llm_serve.engine import arguments

pytestmark = pytest.mark.vllm


def test_every_argument_that_needs_a_restart_is_vllms() -> None:
    """An argument that vLLM has renamed must not slip out of the list."""
    named = {name.removeprefix("engine.") for name in OF_THE_APPLICATION | OF_THE_MODEL | OF_THE_GPUS}

    assert set() == named - set(arguments.known_options())


def test_what_vllm_refuses_is_not_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 78 with vLLM's reason and the line, and the daemon has heard of no reload."""
    file, heard = tmp_path / "x.toml", list[str]()
    file.write_text('model = "m"\n[engine]\ndtype = "float33"\n')

    def ask(_: Path, what: str, *, method: str = "GET", timeout_s: float | None = None) -> dict[str, object]:
        heard.append(f"{method} {what}")
        return {"source": str(file)}

    monkeypatch.setattr(control, "find", lambda _: tmp_path)
    monkeypatch.setattr(control, "ask", ask)

    assert 78 == reload(str(file), False)

    error = capsys.readouterr().err
    assert "x.toml:3: engine.dtype: must be one of" in error
    assert "serves on" in error
    assert ["GET /status"] == heard
