"""The limit of open files, in processes that end with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import llm_serve

CODE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from llm_serve.host import open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))
open_files.allow(int(sys.argv[2]))
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("wanted", "soft"), [(100, 256), (300, 300), (8192, 512)])
def test_it_is_raised_as_far_as_the_system_allows(wanted: int, soft: int) -> None:
    """And never lowered."""
    root = next(iter(llm_serve.__path__)) + "/.."
    done = subprocess.run([sys.executable, "-c", CODE, root, str(wanted)], capture_output=True, text=True, check=True)
    assert f"{soft} 512\n" == done.stdout
