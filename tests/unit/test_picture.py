"""Pictures: what is said before and after where one cannot be drawn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from llm_serve import picture


def test_without_matplotlib_it_is_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And without --png nobody needs it."""
    picture.check(None)
    picture.check(tmp_path / "a.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    picture.check(None)
    with pytest.raises(ValueError, match=r"^--png needs matplotlib: pip"):
        picture.check(tmp_path / "a.png")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured is not lost for it: nothing is raised."""
    assert picture.written(lambda path: path.touch(), tmp_path / "a.png")
    assert not picture.written(lambda path: path.touch(exist_ok=False), tmp_path)

    assert f"llm-serve: cannot write {tmp_path}: File exists\n" == capsys.readouterr().err
