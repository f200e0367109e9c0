"""An engine that dies, hangs or does not fit: what the daemon does about it, with the real engine and its real causes.

The row numbers are those of the fault matrix. What is injected, and not made for real, is said in the test.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.daemon import Daemon, Later, Stream, eventually
from tests.faults.conftest import Fault, engine_core
from tests.figures import Watch

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

MakeDaemon = Callable[..., Daemon]
STALL = {"recovery": {"stall_timeout_s": 20}}
LONG_S = float(os.environ.get("LLM_SERVE_LONG_S", "120"))


def engine_processes(daemon: Daemon) -> list[psutil.Process]:
    """Forks of the daemon's fork server, also of a start that is under way: EngineCore, then its worker."""
    found = []
    for process in daemon.processes():
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            is_fork = parent is not None and "forkserver" in " ".join(parent.cmdline())
            if is_fork and not process.name().startswith("front-end-"):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def assert_recovered(daemon: Daemon, watch: Watch, *, starts: int = 2, rung: int = 0) -> None:
    """It serves again, with as many engine starts and on the rung that the fault calls for, and one engine only."""
    watch.serving(daemon)
    status = daemon.status()
    assert (starts, rung, "serving") == (status["engine_starts"], status["rung"], status["state"])
    assert [process.pid for process in engine_processes(daemon)] == sorted(status["engine_pids"])


# ---- it dies ------------------------------------------------------------------------------------------


@pytest.mark.row("1", "EngineCore killed, idle")
def test_a_kill_while_idle(daemon: MakeDaemon, watch: Watch) -> None:
    """The daemon stays, is not ready within a second, and serves again with the same plan."""
    serving = daemon().wait_ready()
    pid = engine_core(serving)

    watch.begin()
    os.kill(pid, signal.SIGKILL)

    watch.detected(serving, within_s=1)
    assert_recovered(serving, watch)
    assert not psutil.pid_exists(pid)
    assert "killed" in serving.status()["last_failure"]
    assert 1.0 == serving.metric('llm_serve_engine_failures_total{kind="killed"}')
    assert 1.0 == serving.metric("llm_serve_recovery_seconds_count")


@pytest.mark.row("2", "EngineCore killed under 32 streams")
def test_a_kill_under_streams(daemon: MakeDaemon, watch: Watch) -> None:
    """Every stream ends with an answer or an error event; none ends in silence, none hangs."""
    serving = daemon({"engine": {"max_num_seqs": 32}}).wait_ready()
    streams = [Stream(serving.url, 200) for _ in range(32)]
    for stream in streams:
        stream.wait_for_tokens(1)

    watch.begin()
    os.kill(engine_core(serving), signal.SIGKILL)

    watch.detected(serving, within_s=2)
    for stream in streams:
        stream.wait(120)
    silent = [stream for stream in streams if not stream.errors and not stream.finish_reasons]
    assert [] == silent
    assert not any(stream.errors and stream.finish_reasons for stream in streams)
    watch.figure(**{"silent cuts": 0, "with an error event": sum(bool(stream.errors) for stream in streams)})
    assert_recovered(serving, watch)


@pytest.mark.row("3", "native crash (SIGSEGV, SIGBUS, SIGABRT)")
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT])
def test_a_native_crash(daemon: MakeDaemon, watch: Watch, number: signal.Signals) -> None:
    """The signal is named, nothing is made smaller, and no core file is written."""
    serving = daemon().wait_ready()

    watch.begin()
    os.kill(engine_core(serving), number)

    assert_recovered(serving, watch)
    assert "crashed" in serving.status()["last_failure"]
    assert number.name in serving.status()["last_failure"]
    assert [] == [path for path in serving.folder.rglob("core*") if path.is_file()]


@pytest.mark.row("4", "exception in a step (injected)")
def test_an_exception_in_a_step(daemon: MakeDaemon, watch: Watch, fault: Fault) -> None:
    """The engine's own exception is told, and the request that had no answer yet is run again."""
    serving = daemon(environ=fault.environ).wait_ready()
    fault.arm("execute_model", "error")

    watch.begin()
    answer = serving.chat(max_tokens=4)

    assert 1 == fault.made
    assert 200 == answer.status_code, answer.text
    assert_recovered(serving, watch)
    assert "RuntimeError" in serving.status()["last_failure"]
    assert "injected" in serving.status()["last_failure"]


@pytest.mark.row("5", "weights cut short")
def test_weights_that_are_cut_short(daemon: MakeDaemon, watch: Watch, model: Path, tmp_path: Path) -> None:
    """It is tried once, ends with 78, and says which file to replace."""
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    weights = next(broken.glob("*.safetensors"))
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)

    watch.begin()
    failing = daemon(model=broken)

    assert 78 == failing.wait_for_exit(120)
    assert 1 == failing.log().count("engine start 1") or "engine start 2" not in failing.log()
    assert "download the file again" in failing.log().lower()
    watch.figure(**{"exit": 78, "after s": round(watch.passed_s, 1)})


@pytest.mark.row("5b", "EngineCore killed while it loads")
def test_a_kill_while_loading(daemon: MakeDaemon, watch: Watch) -> None:
    """A start that is killed is tried again, and requests wait for it."""
    loading = daemon().wait_for_answers()
    asked = loading.later(loading.chat)
    core = eventually(lambda: engine_processes(loading), bool, within_s=60, what="EngineCore")[0]

    watch.begin()
    core.kill()

    assert 200 == asked.result(120).status_code
    assert_recovered(loading, watch)


@pytest.mark.row("18", "the output task dies (injected)")
def test_the_output_task_dies(daemon: MakeDaemon, watch: Watch, fault: Fault) -> None:
    """An engine that computes but is not listened to any more is a failed engine, not a silence."""
    serving = daemon(environ=fault.environ).wait_ready()
    fault.arm("process_outputs", "error")

    watch.begin()
    answer = serving.chat(max_tokens=4)

    assert 1 == fault.made
    assert 200 == answer.status_code
    assert_recovered(serving, watch)


# ---- it hangs -----------------------------------------------------------------------------------------


@pytest.mark.row("13", "EngineCore frozen (SIGSTOP)")
@pytest.mark.parametrize("which", ["EngineCore", "Worker"])
def test_a_frozen_engine(daemon: MakeDaemon, watch: Watch, which: str) -> None:
    """With work waiting and no step for stall_timeout_s it is a hang: stacks first, then a new engine."""
    serving = daemon(STALL).wait_ready()
    frozen = engine_processes(serving)[["EngineCore", "Worker"].index(which)]
    frozen.suspend()
    eventually(frozen.status, lambda seen: seen == psutil.STATUS_STOPPED, within_s=2, what="a frozen process")

    watch.begin()
    asked = serving.later(lambda: serving.chat(max_tokens=4))

    watch.detected(serving, within_s=30)
    assert psutil.STATUS_STOPPED == frozen.status() or not frozen.is_running()
    assert 200 == asked.result(120).status_code
    assert_recovered(serving, watch)
    assert "stalled" in serving.status()["last_failure"]
    assert "stopped" in serving.log()
    assert not frozen.is_running()


@pytest.fixture
def frozen_group() -> Iterator[Path]:
    """A control group of the first kind that is frozen: what is in it does not even die."""
    group = Path("/sys/fs/cgroup/freezer/llm-serve-test")
    try:
        group.mkdir()
        (group / "freezer.state").write_text("FROZEN")
    except OSError as error:
        pytest.skip(f"nothing real holds a process against SIGKILL here: {error}")
    yield group
    (group / "freezer.state").write_text("THAWED")
    eventually(lambda: group.joinpath("cgroup.procs").read_text(), lambda pids: not pids, within_s=20, what="the end")
    group.rmdir()


@pytest.mark.row("B6", "EngineCore stuck in the kernel")
def test_a_process_that_cannot_be_killed(daemon: MakeDaemon, watch: Watch, frozen_group: Path) -> None:
    """No engine is started beside it: the daemon gives up, and says which process, where it waits, and what frees it."""
    serving = daemon(STALL).wait_ready()
    pid = engine_core(serving)
    (frozen_group / "cgroup.procs").write_text(str(pid))
    watch.begin()
    asked = serving.later(lambda: serving.chat(max_tokens=4))

    watch.detected(serving, within_s=40)
    assert 70 == serving.wait_for_exit(120)
    watch.mark("gave up")
    assert 503 == asked.result(5).status_code
    log = serving.log()
    assert f"SIGKILL does not end python (pid {pid}): D (disk sleep)" in log
    assert "nvidia-smi --gpu-reset" in log
    assert "engine start 2" not in log


@pytest.mark.row("14", "short freeze (STOP, CONT)")
def test_a_short_freeze(daemon: MakeDaemon, watch: Watch) -> None:
    """Below the limit nothing is restarted, and the answer is complete."""
    serving = daemon(STALL).wait_ready()
    frozen = psutil.Process(engine_core(serving))
    frozen.suspend()
    asked = serving.later(lambda: serving.chat(max_tokens=4))
    time.sleep(12)  # the fault itself: a freeze that is shorter than stall_timeout_s
    frozen.resume()

    assert 200 == asked.result(60).status_code
    watch.note(serving)
    assert 1 == serving.status()["engine_starts"]


@pytest.mark.row("15", "busy hang that holds the GIL (injected)")
def test_a_busy_hang(daemon: MakeDaemon, watch: Watch, fault: Fault) -> None:
    """CPU time alone is no progress while serving; the stack in the log shows where it turns."""
    serving = daemon(STALL, environ=fault.environ).wait_ready()
    fault.arm("execute_model", "spin")

    watch.begin()
    asked = serving.later(lambda: serving.chat(max_tokens=4))

    watch.detected(serving, within_s=30)
    assert 1 == fault.made
    assert 200 == asked.result(120).status_code
    assert_recovered(serving, watch)
    assert "_spin" in serving.log()


@pytest.mark.row("6", "a start that hangs (injected)")
def test_a_start_that_hangs(daemon: MakeDaemon, watch: Watch, fault: Fault) -> None:
    """A start that does nothing for stall_timeout_s is ended with all its processes, and tried again."""
    fault.arm("load_model", "sleep")
    loading = daemon(STALL, environ=fault.environ).wait_for_answers()
    eventually(lambda: fault.made, lambda made: made == 1, within_s=60, what="the hang")

    watch.begin()
    asked = loading.later(lambda: loading.chat(max_tokens=1))

    eventually(
        lambda: loading.status()["last_failure"] or "",
        lambda seen: "start_stalled" in seen,
        within_s=40,
        what="the stall",
    )
    watch.figure(**{"detected after s": round(watch.passed_s, 1)})
    assert 200 == asked.result(120).status_code
    assert_recovered(loading, watch)


@pytest.mark.row("16", "slow, not stuck: longest prompts, full batch")
@pytest.mark.timeout(LONG_S + 300)
def test_long_prompts_are_no_hang(daemon: MakeDaemon, watch: Watch) -> None:
    """Nothing but the longest prompts, in small steps, for a while: never taken for a hang.

    Two minutes here; LLM_SERVE_LONG_S makes it longer.
    """
    tables = {"engine": {"max_num_batched_tokens": 256, "enable_prefix_caching": False}, **STALL}
    serving = daemon(tables).wait_ready()
    until = time.monotonic() + LONG_S
    answered: list[int] = []

    def ask() -> None:
        while time.monotonic() < until:
            words = " ".join(random.choice(("one", "two", "six", "ten")) for _ in range(1900))
            answered.append(serving.chat(words, max_tokens=1).status_code)

    askers = [threading.Thread(target=ask) for _ in range(16)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()

    status = serving.status()
    assert 1 == status["engine_starts"], status["failures"]
    assert {200} == set(answered)
    watch.note(serving)
    watch.figure(**{"false alarms": 0, "answers": len(answered)})


@pytest.mark.row("16b", "a prompt that gives no token for longer than stall_timeout_s")
def test_a_long_silence_is_no_hang(daemon: MakeDaemon, watch: Watch) -> None:
    """Eight tokens a step: what fills the KV cache gets on, though nothing comes of it for a long time."""
    engine = {"max_num_batched_tokens": 8, "max_num_seqs": 4, "enable_prefix_caching": False}
    serving = daemon({"engine": engine, "recovery": {"stall_timeout_s": 5}}).wait_ready()
    watch.begin()

    answer = serving.chat("one " * 1900, max_tokens=1)

    silent_s, status = watch.passed_s, serving.status()
    assert 1 == status["engine_starts"], status["failures"]
    assert 200 == answer.status_code
    watch.note(serving)
    watch.figure(**{"silent s": round(silent_s, 1)})
    assert silent_s > 7


# ---- it does not fit ----------------------------------------------------------------------------------


@pytest.mark.row("A5", "KV cache too small for max_model_len")
def test_a_kv_cache_that_is_too_small(daemon: MakeDaemon, watch: Watch) -> None:
    """vLLM's own estimate cures it in exactly one restart, and the next daemon begins there."""
    tables = {"engine": {"max_model_len": 8192, "kv_cache_memory_bytes": 128 << 20}}
    watch.begin()
    serving = daemon(tables)

    serving.wait_ready()

    assert_recovered(serving, watch, starts=2, rung=1)
    status = serving.status()
    assert status["max_model_len"] < 8192
    assert any("max_model_len" in reason for reason in status["steps"])
    assert status["max_model_len"] == serving.metric("llm_serve_plan_max_model_len")
    again = _restarted(serving)
    assert (1, 1) == (again.status()["engine_starts"], again.status()["rung"])
    assert status["max_model_len"] == again.status()["max_model_len"]


def _restarted(daemon: Daemon) -> Daemon:
    daemon.stop()
    return daemon.start().wait_ready()


@pytest.mark.row("9", "out of memory at every start (injected)")
def test_out_of_memory_at_every_start_walks_the_whole_ladder(daemon: MakeDaemon, watch: Watch, fault: Fault) -> None:
    """Every rung is tried once, none below the floors, and then it gives up with the whole story."""
    fault.arm("initialize_kv_cache", "oom", times=99)
    tables = {"recovery": {"floor_max_model_len": 1024, "floor_max_num_seqs": 8, "restart_limit": 40}}

    watch.begin()
    failing = daemon(tables, environ=fault.environ)

    assert 70 == failing.wait_for_exit(380)
    log = failing.log()
    assert fault.made >= 3
    starts = log.count("engine failed")
    assert starts == log.count("the plan has changed") + 1
    assert "rung 1" in log.splitlines()[-1] or "rung 1" in log[log.rindex("exit") :]
    watch.figure(starts=starts, exit=70, **{"after s": round(watch.passed_s, 1)})


@pytest.mark.row("8", "out of memory while serving (injected)")
def test_out_of_memory_while_serving_is_one_rung(daemon: MakeDaemon, watch: Watch, fault: Fault) -> None:
    """Exactly one rung, with real slack: less KV cache and half the sequences."""
    serving = daemon(environ=fault.environ).wait_ready()
    fault.arm("execute_model", "oom")

    watch.begin()
    serving.chat(max_tokens=4)

    assert 1 == fault.made
    assert_recovered(serving, watch, rung=1)
    arguments = serving.status()["engine_arguments"]["arguments"]
    assert 8 == serving.status()["max_num_seqs"]
    assert arguments["kv_cache_memory_bytes"] < 256 << 20
    assert "out_of_memory" in serving.status()["last_failure"]


# ---- it is stopped, or fails for ever -----------------------------------------------------------------


@pytest.mark.row("22", "stop during load or recovery, 10 moments")
def test_a_stop_at_any_moment_takes_less_than_ten_seconds(daemon: MakeDaemon, watch: Watch) -> None:
    """Whatever it is in the middle of, it is gone in 10 s, with status 0 and nothing left."""
    longest = 0.0
    for number in range(10):
        moment = random.Random(number)
        stopping = daemon()
        if number % 2:
            stopping.wait_ready()
            os.kill(engine_core(stopping), signal.SIGKILL)
            time.sleep(moment.uniform(0, 5))
        else:
            stopping.wait_for_answers()
            time.sleep(moment.uniform(0, 10))
        began = time.monotonic()
        stopping.stop()
        longest = max(longest, time.monotonic() - began)
        eventually(stopping.processes, lambda left: left == [], within_s=3, what="no process left")
        assert [] == stopping.new_shared_memory()
        stopping.destroy()
    watch.figure(**{"longest stop s": round(longest, 1)})
    assert longest < 10


@pytest.mark.row("24", "crash loop (injected)")
def test_a_crash_loop_backs_off_and_gives_up(daemon: MakeDaemon, watch: Watch, fault: Fault) -> None:
    """Pauses grow, no CPU is burnt in them, and after restart_limit starts it ends with 70 and the story."""
    fault.arm("load_model", "abort", times=99)
    watch.begin()
    failing = daemon({"recovery": {"restart_limit": 4}}, environ=fault.environ)

    assert 70 == failing.wait_for_exit(200)

    assert 4 == fault.made
    assert "gave up after 4 engine starts" in failing.log()
    assert "SIGABRT" in failing.log()
    watch.figure(starts=4, exit=70, **{"after s": round(watch.passed_s, 1)})


@pytest.mark.row("29", "descriptors run out")
def test_descriptors_run_out(daemon: MakeDaemon, watch: Watch) -> None:
    """Without descriptors it does not spin, and it serves again when there are some."""
    serving = daemon().wait_ready()
    process = psutil.Process(serving.pid)
    before = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + 1, before[1]))
    process.cpu_percent()
    clients = [serving.later(lambda: serving.chat(max_tokens=1)) for _ in range(8)]
    time.sleep(5)  # the fault itself: a while without descriptors
    busy = process.cpu_percent()
    watch.begin()
    process.rlimit(psutil.RLIMIT_NOFILE, before)

    serving.wait_ready(within_s=30)
    watch.serving(serving, within_s=30)
    assert busy < 90
    assert 1 == serving.status()["engine_starts"]
    answered = sum(_is_answered(client) for client in clients)
    watch.figure(**{"CPU %": busy, "answered": answered, "connections reset": len(clients) - answered})


def _is_answered(client: Later) -> bool:
    """True for an answer; a connection for which there was no descriptor has been reset instead."""
    try:
        return bool(client.result(60).status_code == 200)
    except httpx.TransportError:
        return False


def _is_serving(daemon: Daemon, epoch: int) -> bool:
    status = daemon.status()
    return bool(status["epoch"] == epoch and status["state"] == "serving")
