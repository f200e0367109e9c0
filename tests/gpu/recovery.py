"""Faults on one real GPU: what was named, which rung, how many engines were started, seconds, and what became of requests.

    python -m tests.gpu.recovery --model FOLDER [--only SCENE ...] [--json FILE] [--logs FILE] [--caches FOLDER]

The model may be without weights: they are made up (load_format = "dummy"). What is not made for real is said in its scene.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time

from tests.daemon import MODEL_NAME, Daemon, Stream
from tests.faults.mixed import CATALOG
from tests.gpu.stage import HOG, Row, Stage, engine_core, hog, phases, play, story, until_serving, used_mib

_KINDS = ("chat streamed", "chat with logprobs", "chat with a stop string", "chat with penalties", "chat with a seed",
          "JSON schema", "two choices")  # fmt: skip


def kills(stage: Stage) -> Row:
    """EngineCore killed in the middle of one answer of each kind: is the rest as without the kill?"""
    row: Row = {"complete after s": [], "same": [], "different": {}}
    with stage.daemon() as daemon:
        until_serving(daemon, 1)
        before = {name: CATALOG[name](daemon.url) for name in _KINDS}
        row["deterministic"] = [name for name in _KINDS if CATALOG[name](daemon.url) == before[name]]
        for name in _KINDS:
            epoch = daemon.status()["epoch"]
            asked = daemon.later(lambda name=name: CATALOG[name](daemon.url))  # type: ignore[misc]
            time.sleep(0.35)
            os.kill(engine_core(daemon), signal.SIGKILL)
            began = time.monotonic()
            try:
                got = asked.result(200)
            except Exception as error:  # noqa: BLE001 - a result like others
                got = {"error": repr(error)}
            row["complete after s"].append(round(time.monotonic() - began, 1))
            until_serving(daemon, epoch + 1)
            if got == before[name]:
                row["same"].append(name)
            else:
                row["different"][name] = {"got": repr(got)[:700], "before": repr(before[name])[:700]}
        row["journal"] = [line for line in daemon.log().splitlines() if "engine failed" in line][-1:]
        return row | story(daemon)


def under_load(stage: Stage) -> Row:
    """EngineCore killed under 64 streams, three times; the seconds to the next token, and what became of the streams."""
    return _under_load(stage, 1)


def under_load_of_four(stage: Stage) -> Row:
    """The same with four processes that answer HTTP: in how many of them the streams were is told as well."""
    return _under_load(stage, 4)


def _under_load(stage: Stage, front_ends: int) -> Row:
    row: Row = {"next token s": [], "complete": 0}
    with stage.daemon(server={"front_ends": front_ends}) as daemon:
        until_serving(daemon, 1)
        while front_ends > 1 and [each["epoch"] for each in daemon.status()["front_ends"]] != [1] * front_ends:
            time.sleep(0.1)
        for _ in range(3):
            epoch = daemon.status()["epoch"]
            streams = [Stream(daemon.url, 1200) for _ in range(64)]
            for stream in streams:
                stream.wait_for_tokens(5)
            row["in flight at each"] = [each["requests_in_flight"] for each in daemon.status()["front_ends"]]
            os.kill(engine_core(daemon), signal.SIGKILL)
            began = time.monotonic()
            time.sleep(0.5)
            seen = sum(len(stream.events) for stream in streams)
            while sum(len(stream.events) for stream in streams) == seen:
                time.sleep(0.02)
            row["next token s"].append(round(time.monotonic() - began, 2))
            until_serving(daemon, epoch + 1)
            for stream in streams:
                stream.wait(200).close()
            row["complete"] += sum(stream.finish_reasons == ["length"] for stream in streams)
        row["phases"] = phases(daemon)
        return row | {"median s": statistics.median(row["next token s"])} | story(daemon)


def frozen(stage: Stage) -> Row:
    """EngineCore stopped with a request waiting."""
    with stage.daemon() as daemon:
        until_serving(daemon, 1)
        os.kill(engine_core(daemon), signal.SIGSTOP)
        began = time.monotonic()
        asked = daemon.later(daemon.chat)
        while daemon.http.get("/readyz").status_code == 200:
            time.sleep(0.1)
        noticed = time.monotonic() - began
        answered = asked.result(200).status_code
        return {"noticed s": round(noticed, 1), "answered": answered, "after s": round(time.monotonic() - began, 1),
                **story(daemon)}  # fmt: skip


def long_prompts(stage: Stage) -> Row:
    """Nothing but the longest prompts that the model takes, in small steps, LLM_SERVE_LONG_S seconds: never a hang."""
    seconds, is_over = float(os.environ.get("LLM_SERVE_LONG_S", "60")), threading.Event()
    answered: list[int] = []
    with stage.daemon(engine={"max_model_len": 32768, "max_num_batched_tokens": 256}) as daemon:
        until_serving(daemon, 1, 300)

        def client(number: int) -> None:
            while not is_over.is_set():
                prompt = [(number * 7919 + len(answered) * 31 + place) % 40_000 for place in range(32_760)]
                body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 4}
                answered.append(daemon.http.post("/v1/completions", json=body, timeout=400).status_code)
                assert answered[-1] == 200, "a request that was refused is no load"

        clients = [daemon.later(lambda number=number: client(number)) for number in range(8)]  # type: ignore[misc]
        ends_at, longest = time.monotonic() + seconds, 0.0
        while time.monotonic() < ends_at:
            longest = max(longest, daemon.status()["seconds_since_engine_step"] or 0.0)
            time.sleep(0.2)
        is_over.set()
        for each in clients:
            each.result(400)
        return {"seconds": seconds, "answered": len(answered), "codes": sorted(set(answered)),
                "longest without a step s": longest, **story(daemon)}  # fmt: skip


def memory_held(stage: Stage) -> Row:
    """Another process holds most of the GPU at the start: wait for it, then fit beside it."""
    with hog(90) as free, stage.daemon() as daemon:
        asked = daemon.later(daemon.chat)
        after_s = until_serving(daemon, 1, 400)
        told = {"serving after s": round(after_s, 1), "asked at once": asked.result(60).status_code}
        return {"free MiB": free, **told, **story(daemon)}


def memory_taken(stage: Stage) -> Row:
    """Another process takes the rest while it serves, and then come prompts that need more than there is."""
    with stage.daemon(engine={"gpu_memory_utilization": 0.95, "max_num_batched_tokens": 8192}) as daemon:
        until_serving(daemon, 1)
        epoch = daemon.status()["epoch"]
        with hog(-0.06) as free:
            prompt = "one two three four five six seven " * 1000
            answers = [daemon.later(lambda number=number: daemon.chat(f"{number} {prompt}", logprobs=True,  # type: ignore[misc]
                                                                      top_logprobs=20)) for number in range(64)]  # fmt: skip
            codes = [each.result(300).status_code for each in answers]
        return {"free MiB": free, "codes": sorted(set(codes)), "engines": daemon.status()["epoch"] - epoch,
                **story(daemon)}  # fmt: skip


def device_error(stage: Stage) -> Row:
    """An illegal memory access in the worker (injected: a kernel that writes where it must not)."""
    fault = stage.folder / "fault.json"
    with stage.daemon(environ={"LLM_SERVE_FAULT_FILE": str(fault)}) as daemon:
        until_serving(daemon, 1)
        epoch = daemon.status()["epoch"]
        fault.write_text(json.dumps({"at": "execute_model", "do": "illegal", "times": 1}))
        began = time.monotonic()
        answer = daemon.chat()
        after = time.monotonic() - began
        until_serving(daemon, epoch + 1)
        return {"answered": answer.status_code, "after s": round(after, 1), "xids": daemon.status()["gpus"][0]["xids"],
                **story(daemon)}  # fmt: skip


def telemetry(stage: Stage) -> Row:
    """What the sensors say idle and under 64 streams, what a scrape costs, and admission that pauses for heat."""
    row: Row = {}
    with stage.daemon() as daemon:
        until_serving(daemon, 1, 300)
        row["idle"] = _sensors(daemon)
        streams = [Stream(daemon.url, 1500) for _ in range(64)]
        for stream in streams:
            stream.wait_for_tokens(5)
        row["scrape ms under load"] = _scrapes(daemon)
        time.sleep(3)
        row["under load"] = _sensors(daemon)
        row["families"] = sorted({line.split("{")[0] for line in daemon.http.get("/metrics").text.splitlines()
                                  if line.startswith("llm_serve_gpu_")})  # fmt: skip
        row["status"] = daemon.command("status").stdout.splitlines()
        for stream in streams:
            stream.wait(100).close()
        before = daemon.rewrite("[gpu]", "[gpu]\npause_above_celsius = 10")
        row["reload"] = daemon.command("reload").stdout.strip()
        row["paused after s"], row["paused"] = _until_state(daemon, "drained")
        asked = daemon.later(daemon.chat)
        time.sleep(2)
        row["held while hot"] = daemon.status()["requests_held"]
        daemon.file.write_text(before)
        row["reload back"] = daemon.command("reload").stdout.strip()
        row["goes on after s"], _ = _until_state(daemon, "serving")
        row["answered"] = asked.result(60).status_code
        return row | story(daemon)


def utilization(stage: Stage) -> Row:
    """More of the GPU than there is: nobody holds it, so the share is what has to give."""
    with stage.daemon(engine={"gpu_memory_utilization": 0.999}) as daemon:
        asked = daemon.later(daemon.chat)
        after_s = until_serving(daemon, 1, 400)
        return {"serving after s": round(after_s, 1), "asked at once": asked.result(60).status_code, **story(daemon)}


def capture(stage: Stage) -> Row:
    """Another process takes all but 40 MiB while CUDA graphs are captured, until the start has failed."""
    trigger = stage.folder / "take-it"
    trigger.unlink(missing_ok=True)
    command = [sys.executable, "-c", HOG, "-0.04", str(trigger)]
    with stage.daemon() as daemon, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as thief:
        began = time.monotonic()
        asked = daemon.later(daemon.chat)
        while "GPU KV cache size" not in daemon.log():
            assert time.monotonic() - began < 200, daemon.log()[-3000:]
            time.sleep(0.02)
        while used_mib() < 100_000:  # the KV cache is there: warm-up and capture come next
            assert time.monotonic() - began < 200, daemon.log()[-3000:]
        trigger.touch()
        while not daemon.status()["failures"] and daemon.status()["state"] != "serving":
            time.sleep(0.05)
        thief.kill()
        failed = [failure["failure"] for failure in daemon.status()["failures"]]
        after_s = until_serving(daemon, 1, 400)
        told = {"failures": failed, "asked at once": asked.result(60).status_code}
        return {"serving after s": round(after_s, 1), **told, **story(daemon)}


def backends(stage: Stage) -> Row:
    """Attention backends that cannot be used here: one for another kind of model, one that is not installed."""
    row: Row = {}
    for name in ("FLASHMLA", "FLASHINFER"):
        with stage.daemon(engine={"attention_backend": name}) as daemon:
            asked = daemon.later(daemon.chat)
            after_s = until_serving(daemon, 1, 400)
            failed = [failure["failure"]["detail"][:200] for failure in daemon.status()["failures"]]
            told = {"failures": failed, "asked at once": asked.result(60).status_code}
            row[name] = {"serving after s": round(after_s, 1), **told, **story(daemon)}
    return row


def _sensors(daemon: Daemon) -> Row:
    (gpu,) = daemon.status()["gpus"]
    return {name: value for name, value in gpu.items() if name not in {"index", "uuid"}}


def _scrapes(daemon: Daemon) -> dict[str, float]:
    """Milliseconds of 100 scrapes under load."""
    took = []
    for _ in range(100):
        began = time.monotonic()
        daemon.http.get("/metrics").raise_for_status()
        took.append(1000 * (time.monotonic() - began))
        time.sleep(0.02)
    return {"p50": round(statistics.median(took), 1), "max": round(max(took), 1)}


def _until_state(daemon: Daemon, state: str) -> tuple[float, str]:
    began = time.monotonic()
    while (status := daemon.status())["state"] != state:
        assert time.monotonic() - began < 60, status["why"]
        time.sleep(0.05)
    return round(time.monotonic() - began, 2), str(status["why"])


SCENES = {
    scene.__name__: scene
    for scene in (
        kills, under_load, under_load_of_four, frozen, long_prompts, memory_held, memory_taken, device_error, telemetry, utilization, capture,
        backends,
    )
}  # fmt: skip


if __name__ == "__main__":
    play(SCENES, __doc__)
