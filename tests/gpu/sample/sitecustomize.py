"""Writes down where every thread of every process is, 50 times a second, for tests/gpu/profile.py.

Python runs this in every process that has this folder on its PYTHONPATH. LLM_SERVE_SAMPLES names a folder; each process
writes a file there: a line whenever a thread is somewhere else than before, [seconds since the epoch, thread, [frames]].
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

_FOLDER = os.environ.get("LLM_SERVE_SAMPLES", "")
_EVERY_S, _LINES_AT_MOST = 0.02, 60_000


def _stack(frame: object) -> list[str]:
    names = []
    while frame is not None:
        code = frame.f_code  # type: ignore[attr-defined]
        names.append(f"{'/'.join(code.co_filename.split('/')[-2:])}:{code.co_name}:{frame.f_lineno}")  # type: ignore[attr-defined]
        frame = frame.f_back  # type: ignore[attr-defined]
    return names[::-1]


def _sample() -> None:
    own, written = threading.get_ident(), 0
    last: dict[int, list[str]] = {}
    with Path(_FOLDER, f"{os.getpid()}.jsonl").open("a", buffering=1) as out:
        while written < _LINES_AT_MOST:
            now = time.time()
            for thread, frame in sys._current_frames().items():
                if thread != own and last.get(thread) != (stack := _stack(frame)):
                    last[thread] = stack
                    out.write(json.dumps([round(now, 3), thread, stack]) + "\n")
                    written += 1
            time.sleep(_EVERY_S)


def _begin() -> None:
    threading.Thread(target=_sample, daemon=True, name="sampler").start()


if _FOLDER:
    _begin()
    os.register_at_fork(after_in_child=_begin)
