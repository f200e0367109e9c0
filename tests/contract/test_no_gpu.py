"""The CUDA build of vLLM on a machine without a GPU: its parser does not even list its options there.

That build is 8 GB and needs CUDA's libraries, so it is not what is tested here: the platform that it finds on such a
machine is put into the CPU build.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import patient

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120)]

_NO_GPU = """
import vllm.platforms
from vllm.platforms.interface import UnspecifiedPlatform
vllm.platforms.current_platform = UnspecifiedPlatform()
from llm_serve.cli.main import main
main()
"""


def llm_serve(*words: str) -> subprocess.CompletedProcess[str]:
    """A command where vLLM sees nothing to compute on."""
    command = [sys.executable, "-c", _NO_GPU, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=patient(60))


def test_a_file_is_checked_and_it_is_said_for_what(tmp_path: Path) -> None:
    """Good is good, and a mistake is found, on the laptop of whoever writes the file."""
    file = tmp_path / "some.toml"
    file.write_text('model = "Qwen/Qwen2.5-7B-Instruct"\n\n[engine]\nmax_model_len = 4096\n')

    good = llm_serve("check", str(file))
    file.write_text(file.read_text() + "max_num_sequences = 8\n")
    wrong = llm_serve("check", str(file))

    assert 0 == good.returncode, good.stderr
    assert "vLLM sees no GPU here: what it chooses by the GPU is shown as for one of 24GiB" in good.stdout
    assert 78 == wrong.returncode
    assert "some.toml:5: engine.max_num_sequences: " in wrong.stderr


def test_a_line_is_imported() -> None:
    done = llm_serve("import", "--", "vllm", "serve", "Qwen/Qwen3-8B", "--max-num-seqs", "8")

    assert 0 == done.returncode, done.stderr
    assert "max_num_seqs = 8" in done.stdout
