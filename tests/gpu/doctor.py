"""The doctor on a real GPU: what it says of the machine as it is, and of faults that are made here.

    python -m tests.gpu.doctor [--only SCENE ...] [--json FILE] [--full FILE]

Each scene prints seconds, how many findings of each state, every finding that is not good, and whether it found what it
had to. It takes about five minutes on one GPU. Nothing is injected: memory is really held, a left-over is a real process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_DAEMON = Path(__file__).parents[2] / "daemon"
_COMMAND = "from llm_serve.cli.main import main; main()"
_HOG = """
import sys, time, torch
free, _ = torch.cuda.mem_get_info()
wanted = int(float(sys.argv[1]) * 2**30) if float(sys.argv[1]) > 0 else free + int(float(sys.argv[1]) * 2**30)
held = torch.empty(wanted, dtype=torch.uint8, device="cuda")
print("held", flush=True)
time.sleep(600)
"""
_ORPHAN = """
import os, sys
if os.fork():
    os._exit(0)
os.setsid()
print(os.getpid(), flush=True)
os.execv(sys.executable, ["VLLM::EngineCore", "-c", sys.argv[1], sys.argv[2]])
"""
Row = dict[str, Any]
Answer = dict[str, Any]


def doctor(*arguments: str, environ: Mapping[str, str] = os.environ) -> Answer:
    """What the command prints as JSON, with its exit status and how long it took."""
    path = os.pathsep.join([str(_DAEMON), environ.get("PYTHONPATH", "")])
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, "doctor", "--json", *arguments],
        env={**environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if not done.stdout:
        raise RuntimeError(done.stderr[-1500:])
    answer: Answer = json.loads(done.stdout)
    return answer | {
        "status": done.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "stderr": done.stderr[-500:],
    }


def states(answer: Answer) -> dict[str, str]:
    """Each check with its state."""
    return {finding["check"]: finding["state"] for finding in answer["findings"]}


def told(answer: Answer, *, is_right: bool) -> Row:
    """The row of a scene."""
    bad = [
        f"{each['state']}: {each['check']}: {each['found']}" for each in answer["findings"] if each["state"] != "good"
    ]
    tried = [each["found"] for each in answer["findings"] if each["check"].startswith("attention")]
    return {
        "is right": is_right and answer["status"] == answer["exit_status"] and not answer["stderr"],
        "seconds": answer["seconds"],
        "status": answer["status"],
        "counts": answer["counts"],
        "attention": tried,
        "not good": bad,
        "stderr": answer["stderr"],
        "answer": answer["findings"],
    }


@contextmanager
def left_over(amount_gib: float) -> Iterator[int]:
    """A process that is called as vLLM's engine, holds GPU memory (GiB, or all but so much), and has no parent."""
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # by that name, Python does not find its own place
    command = [sys.executable, "-c", _ORPHAN, _HOG, str(amount_gib)]
    parent = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        assert parent.stdout.readline() == "held\n"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
        time.sleep(3)


def plain(_: Path) -> Row:
    """The machine as it is: vLLM's first choice has to run, within a minute."""
    answer = doctor()
    seen = states(answer)
    is_right = seen["attention"] == "good" and seen["driver"] == "good" and answer["seconds"] < 60
    return told(answer, is_right=is_right)


def cold(folder: Path) -> Row:
    """Without one compiled kernel in any cache."""
    names = (
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "VLLM_CACHE_ROOT",
        "FLASHINFER_WORKSPACE_BASE",
        "XDG_CACHE_HOME",
    )
    answer = doctor(environ={**os.environ, **{name: str(folder / name) for name in names}})
    return told(answer, is_right=states(answer)["attention"] == "good" and answer["seconds"] < 120)


def hurried(folder: Path) -> Row:
    """A second for each backend with cold caches: those that compile have to be told as standing somewhere."""
    environ = {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    answer = doctor("--timeout", "1", environ=environ)
    late = [each for each in answer["findings"] if "had not computed" in each["found"]]
    return told(answer, is_right=bool(late) and answer["status"] == 75 and all(" (" in each["found"] for each in late))


def no_compiler(_: Path) -> Row:
    """PATH without gcc and nvcc, as in a slim image: Triton's backends have to fail, with the package to install."""
    with tempfile.TemporaryDirectory() as empty:
        answer = doctor(environ={**os.environ, "PATH": empty, "TRITON_CACHE_DIR": f"{empty}/triton", "CC": ""})
    return told(answer, is_right=states(answer)["tools.compiler"] == "problem")


def held(_: Path) -> Row:
    """An engine without its server holds all memory but 150 MiB: it is a problem, and trials are left out or fail for it."""
    with left_over(-0.15) as pid:
        answer, forced = doctor(), doctor("--trials")
    seen, then = states(answer), states(forced)
    is_named = seen.get(f"process.{pid}") == then.get(f"process.{pid}") == "problem"
    is_right = is_named and seen["attention"] == then["attention"] == "not known" and "torch" not in then
    return told(forced, is_right=is_right and answer["seconds"] < 10)


def instance(folder: Path) -> Row:
    """A file that wants a GPU which is not there, and one whose model fits, with a taken port."""
    model = folder / "model"
    model.mkdir()
    about = {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584, "model_type": "qwen2"}
    (model / "config.json").write_text(json.dumps(about))
    (folder / "far.toml").write_text(f'model = "{model}"\n[gpu]\ndevices = [63]\n')
    (folder / "near.toml").write_text(f'model = "{model}"\n[gpu]\ndevices = [0]\n[engine]\nkv_cache_dtype = "fp8"\n')
    far = doctor("--no-trials", str(folder / "far.toml"))
    near = doctor(str(folder / "near.toml"))
    is_right = states(far)["instance.gpus"] == "problem" and states(near)["instance.gpu.0"] == "good"
    return told(
        near, is_right=is_right and "28 heads on 4 of 128" in " ".join(each["found"] for each in near["findings"])
    )


SCENES: dict[str, Callable[[Path], Row]] = {
    scene.__name__: scene for scene in (plain, cold, hurried, no_compiler, held, instance)
}


def main() -> None:
    """Play the scenes and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(SCENES), default=list(SCENES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--full", type=Path, help="a file for every finding of every scene")
    given = parser.parse_args()
    rows: dict[str, Row] = {}
    whole: Row = {}
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows[name] = SCENES[name](Path(folder))
            except Exception:  # noqa: BLE001 - the other scenes still count
                rows[name] = {"is right": False, "failed": traceback.format_exc()[-1500:]}
        whole[name] = rows[name].pop("answer", None)
        print(name, json.dumps(rows[name], indent=1), flush=True)
        for path, what in ((given.json, rows), (given.full, whole)):
            if path:
                path.write_text(json.dumps(what, indent=1))
    sys.exit(0 if all(row["is right"] for row in rows.values()) else 1)


if __name__ == "__main__":
    main()
