"""`llm-serve plan` beside what vLLM then measures, on a real GPU: one line of a table for each shape.

    python -m tests.gpu.plan --models FOLDER [--only SHAPE ...] [--json FILE]

FOLDER has qwen2.5-7b and qwen2.5-32b, of which configuration and tokenizer will do: weights are made up. The other shapes
are written here. Each is planned by the command itself, all at once and away from the GPU, then started one by one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.daemon import instance_text

_REPOSITORY = Path(__file__).parents[2]
_GIB = 1 << 30
_MOST_DIFFERENCE = 0.05
_COMMON = {
    "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "vocab_size": 49152,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "rope_theta": 1e6, "attention_bias": False,
}  # fmt: skip
_MLA = _COMMON | {
    # DeepSeek-V2-Lite's attention; without experts, which need kernels that a small bundle of vLLM has not.
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
    "intermediate_size": 10944, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 16,
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
    "first_k_dense_replace": 12, "moe_layer_freq": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    "norm_topk_prob": False, "scoring_func": "softmax", "routed_scaling_factor": 1.0,
}  # fmt: skip
_WINDOWS = _COMMON | {
    # Gemma 3 4B: five layers of six see 1024 tokens.
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 2560,
    "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "sliding_window": 1024, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000.0, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
}  # fmt: skip
_HYBRID = _COMMON | {
    # Granite 4.0 H: one layer of ten has attention, the others a state of fixed size.
    "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid", "hidden_size": 2048,
    "intermediate_size": 8192, "shared_intermediate_size": 8192, "num_hidden_layers": 20, "num_attention_heads": 32,
    "num_key_value_heads": 8, "layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 2,
    "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 64, "mamba_d_head": 64, "mamba_n_groups": 1,
    "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": True,
    "mamba_proj_bias": False, "position_embedding_type": "nope", "attention_multiplier": 0.0156,
    "embedding_multiplier": 12, "logits_scaling": 8, "residual_multiplier": 0.22,
}  # fmt: skip

SHAPES: dict[str, tuple[str | dict[str, Any], dict[str, Any]]] = {
    "GQA": ("qwen2.5-7b", {}),
    "GQA, FP8 cache": ("qwen2.5-32b", {"kv_cache_dtype": "fp8", "enforce_eager": True}),
    "MLA": (_MLA, {}),
    "windows": (_WINDOWS, {}),
    "states": (_HYBRID, {"enforce_eager": True, "max_num_seqs": 256}),
}
"""Model (a folder, or a configuration to be written) and the engine's arguments."""


def instance(name: str, models: Path, folder: Path) -> Path:
    """Write the instance file of a shape."""
    model, arguments = SHAPES[name]
    path = models / model if isinstance(model, str) else folder / name.replace(" ", "-")
    if isinstance(model, dict):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(model))
    engine = {"load_format": "dummy", "tokenizer": str(models / "qwen2.5-7b"), "max_model_len": 32768} | arguments
    file = folder / f"{name.replace(' ', '-').replace(',', '')}.toml"
    file.write_text(instance_text(path, {"engine": engine, "engine.env": {"VLLM_USE_FLASHINFER_SAMPLER": "0"}}))
    return file


def planned(file: Path, core: int) -> dict[str, Any]:
    """What the command says, in the units of `measured`. It keeps to one CPU; several shall not share it."""
    code = f"import os; os.sched_setaffinity(0, {{{core}}}); from llm_serve.cli.main import main; main()"
    said = json.loads(_run([sys.executable, "-c", code, "plan", str(file), "--json"]))
    sums = said["budget"]
    return {
        "weights": sums["weights"], "kept": sums["kept"], "step": sums["step"], "graphs": sums["graphs"],
        "pool": sums["pool"], "bytes per token": said["kv_cache"]["bytes_per_token"],
        "tokens": said["kv_cache_tokens"], "concurrency": said["concurrency"], "device": sums["device"],
    }  # fmt: skip


def measured(file: Path) -> dict[str, Any]:
    """The same of a real start, in a process of its own."""
    lines = _run([sys.executable, "-m", "tests.gpu.plan", "--start", str(file)]).splitlines()
    return dict(json.loads(lines[-1]))


def _run(command: list[str]) -> str:
    path = f"{_REPOSITORY / 'daemon'}:{_REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"
    environ = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[-2:]} ended with {done.returncode}: {done.stdout[-500:]} {done.stderr[-2500:]}")
    return done.stdout


def start(file: Path) -> None:
    """Start an engine in this process, and print what it measured as the last line."""
    os.environ |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.kv_cache_interface import MambaSpec

    from llm_serve.core.plan import EnginePlan
    from llm_serve.engine import arguments
    from llm_serve.host.instances import read_instance

    settings, text = read_instance(str(file))
    namespace = arguments.parse_plan(EnginePlan.from_settings(settings), source=settings.source, text=text)
    _, config = arguments.engine_config(namespace)
    core = EngineCore(config, Executor.get_class(config), log_stats=False)
    worker = core.model_executor.driver_worker.worker
    specs = [each for each in worker.model_runner.get_kv_cache_spec().values() if not isinstance(each, MambaSpec)]
    weights, graphs = int(worker.model_runner.model_memory_usage), int(worker.cudagraph_memory_estimate)
    found = {
        "weights": weights, "kept": worker.total_consumed - weights, "step": worker.peak_activation_memory - graphs,
        "graphs": graphs, "pool": int(worker.available_kv_cache_memory_bytes),
        "bytes per token": sum(spec.page_size_bytes // spec.block_size for spec in specs),
        "tokens": config.cache_config.kv_cache_size_tokens,
        "concurrency": config.cache_config.kv_cache_max_concurrency,
        "device": worker.init_snapshot.total_memory,
    }  # fmt: skip
    print("\n" + json.dumps(found), flush=True)
    # Without waiting for threads of vLLM's.
    os._exit(0)


def _table(rows: dict[str, dict[str, Any]]) -> bool:
    """Print it; true when all is as near as it has to be."""
    is_good = True
    for name, row in rows.items():
        print(f"\n{name}  (planned in {row['plan s']} s, started in {row['start s']} s)")
        if "failed" in row:
            print(f"  failed: {row['failed']}")
            is_good = False
            continue
        for what, real in row["measured"].items():
            said = row["planned"][what]
            unit = 1 if what in ("bytes per token", "tokens", "concurrency") else _GIB
            ratio = said / real if real else float("nan")
            print(f"  {what:16} {said / unit:14.2f} planned {real / unit:14.2f} by vLLM   {ratio:6.3f}")
        is_exact = row["planned"]["bytes per token"] == row["measured"]["bytes per token"]
        is_near = abs(row["planned"]["pool"] / row["measured"]["pool"] - 1) <= _MOST_DIFFERENCE
        print(f"  bytes per token {'exact' if is_exact else 'WRONG'}, pool {'within' if is_near else 'BEYOND'} 5 %")
        is_good = is_good and is_exact and is_near
    print("\nEstimates to be corrected (GiB, planned / by vLLM):")
    for name, row in rows.items():
        if "measured" in row:
            each = (f"{what} {row['planned'][what] / _GIB:.3f} / {row['measured'][what] / _GIB:.3f}"
                    for what in ("step", "kept", "graphs", "device"))  # fmt: skip
            print(f"  {name}: {', '.join(each)}")
    return is_good


def main() -> None:
    """Plan, start, compare; status 1 when a figure is further off than it may be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.start:
        start(given.start)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        files = {name: instance(name, given.models, Path(folder)) for name in given.only}
        began = time.monotonic()
        cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
        plans = {name: pool.submit(planned, file, next(cores)) for name, file in files.items()}
        for plan in plans.values():
            plan.exception()
        planning = round(time.monotonic() - began, 1)
        for name, file in files.items():
            began = time.monotonic()
            row: dict[str, Any] = {}
            try:
                row = {"planned": plans[name].result(), "measured": measured(file)}
            except Exception as error:  # noqa: BLE001 - a result like others
                row = {"failed": str(error)}
            rows[name] = row | {"plan s": planning, "start s": round(time.monotonic() - began, 1)}
            print(json.dumps({name: rows[name]}), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    sys.exit(0 if _table(rows) else 1)


if __name__ == "__main__":
    main()
