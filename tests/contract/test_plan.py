"""`llm-serve plan` against vLLM: what it counts, and what a real start then says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm")

import llm_serve
from llm_serve.engine.weights import stored_bytes
from tests.daemon import instance_text

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

GIB = 1 << 30
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "max_position_embeddings": 4096, "vocab_size": 1024, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
MLA = LLAMA | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_key_value_heads": 8,
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    "norm_topk_prob": False, "scoring_func": "softmax", "routed_scaling_factor": 1.0,
}  # fmt: skip
WINDOWS = LLAMA | {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window": 512,
    "sliding_window_pattern": 3, "query_pre_attn_scalar": 32, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
}  # fmt: skip
STATES = LLAMA | {
    "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid", "shared_intermediate_size": 512,
    "layer_types": ["mamba", "mamba", "attention"] * 2, "num_local_experts": 0, "num_experts_per_tok": 0,
    "mamba_n_heads": 16, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 64, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_proj_bias": False,
    "position_embedding_type": "nope", "attention_multiplier": 0.1, "embedding_multiplier": 12, "logits_scaling": 6,
    "residual_multiplier": 0.22, "hidden_act": "silu",
}  # fmt: skip
DELTA = LLAMA | {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "full_attention_interval": 3,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "hidden_act": "silu", "rms_norm_eps": 1e-6,
}  # fmt: skip
AWQ = LLAMA | {
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
}
PARAMETERS = 2 * 1024 * 256 + 6 * (256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 512 + 2 * 256) + 256
"""Of LLAMA, by hand: embeddings both ways; queries, keys and values; output; gate, up and down; two norms; the last."""

WEIGH = """
import json, sys
from llm_serve.cli.check import prepare_for_vllm
prepare_for_vllm()
from llm_serve import planning
from llm_serve.core.footprint import parse_gpus
from llm_serve.core.plan import EnginePlan
if sys.argv[2] != "cpu":
    from llm_serve.engine.absent_gpus import pretend
    pretend(parse_gpus(sys.argv[2]))
for name, (model, arguments) in json.load(open(sys.argv[1])).items():
    found = planning.weigh(EnginePlan(model, {"load_format": "dummy"} | arguments, {}), "a.toml")
    layers = [[each.count, each.keeps] for each in found.model.layers]
    print(json.dumps({
        "name": name, "weights": found.model.weights_bytes, "per token": found.model.kv_bytes_per_token,
        "layers": layers, "gpus": found.gpus_needed, "pool": found.outlook.budget.pool,
        "tokens": found.outlook.tokens, "concurrency": found.outlook.concurrency,
    }))
"""
START = """
import sys
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
if __name__ == "__main__":
    arguments = EngineArgs(sys.argv[1], load_format="dummy", **eval(sys.argv[2]))
    config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    EngineCore(config, Executor.get_class(config), log_stats=False).shutdown()
"""

GPU_SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "GQA": (LLAMA, {}, 6 * 2 * 4 * 32 * 2),
    "FP8 cache": (LLAMA, {"kv_cache_dtype": "fp8"}, 6 * 2 * 4 * 32),
    "two GPUs": (LLAMA, {"tensor_parallel_size": 2}, 6 * 2 * 2 * 32 * 2),
    "fewer heads than GPUs": (LLAMA, {"tensor_parallel_size": 8}, 6 * 2 * 1 * 32 * 2),
    "two stages": (LLAMA, {"pipeline_parallel_size": 2}, 3 * 2 * 4 * 32 * 2),
    "MLA": (MLA, {}, 6 * (512 + 64) * 2),
    "windows": (WINDOWS, {}, 6 * 2 * 4 * 32 * 2),
    "states": (STATES, {}, 2 * 2 * 4 * 32 * 2),
    "delta rule, experts": (DELTA, {}, 2 * 2 * 4 * 32 * 2),
    "FP8 weights": (LLAMA, {"quantization": "fp8"}, 6 * 2 * 4 * 32 * 2),
    "AWQ": (AWQ, {}, 6 * 2 * 4 * 32 * 2),
}
"""Configuration, arguments, and the bytes that each GPU keeps of a token: layers x keys and values x heads x size x 2."""


def environ() -> dict[str, str]:
    here = [str(Path(llm_serve.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": ":".join(filter(None, here)), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, for a plan may lay a platform under vLLM."""
    command = [sys.executable, *words]
    return subprocess.run(command, env=environ(), capture_output=True, text=True, timeout=280, check=False)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """The command."""
    return python("-c", "from llm_serve.cli.main import main; main()", "plan", *words)


def weigh(folder: Path, device: str, shapes: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """What is planned for several models, by name, in one process."""
    wanted = {name: (str(model_of(folder / name, config)), arguments) for name, (config, arguments) in shapes.items()}
    (folder / "shapes.json").write_text(json.dumps(wanted))
    done = python("-c", WEIGH, str(folder / "shapes.json"), device)
    assert done.returncode == 0, done.stderr[-3000:]
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


def model_of(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def file_of(folder: Path, config: dict[str, Any], **engine: Any) -> Path:
    model = model_of(folder / "model", config)
    (folder / "a.toml").write_text(instance_text(model, {"engine": {"load_format": "dummy"} | engine}))
    return folder / "a.toml"


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    shapes = {name: (config, arguments) for name, (config, arguments, _) in GPU_SHAPES.items()}
    return weigh(tmp_path_factory.mktemp("shapes"), "24GiB", shapes)


@pytest.mark.parametrize("name", list(GPU_SHAPES))
def test_bytes_per_token_are_those_of_the_real_layout(weighed: dict[str, Any], name: str) -> None:
    _, arguments, per_token = GPU_SHAPES[name]
    assert per_token == weighed[name]["per token"]
    assert 0 < weighed[name]["pool"] < 24 * GIB
    parallel = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    assert parallel == weighed[name]["gpus"]


def test_layers_are_told_apart_by_what_they_keep(weighed: dict[str, Any]) -> None:
    assert [[6, None]] == weighed["GQA"]["layers"]
    assert [[6, None]] == weighed["two stages"]["layers"]
    assert [[4, 512], [2, None]] == weighed["windows"]["layers"]
    assert [[4, 0], [2, None]] == weighed["states"]["layers"]
    assert [[4, 0], [2, None]] == weighed["delta rule, experts"]["layers"]


def test_weights_are_those_that_the_config_makes(weighed: dict[str, Any]) -> None:
    rotary_table = 4096 * 32 * 2
    assert PARAMETERS * 2 + rotary_table == pytest.approx(weighed["GQA"]["weights"], rel=1e-4)
    linear = PARAMETERS - 2 * 1024 * 256 - 13 * 256
    assert weighed["GQA"]["weights"] - linear == pytest.approx(weighed["FP8 weights"]["weights"], rel=1e-2)
    assert weighed["AWQ"]["weights"] < 0.5 * weighed["GQA"]["weights"]
    assert weighed["two GPUs"]["weights"] < 0.6 * weighed["GQA"]["weights"]


def test_what_does_not_fit_says_what_would_help_and_what_the_files_hold(tmp_path: Path) -> None:
    large = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
             "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
    file = file_of(tmp_path, LLAMA | large)
    tensors = {f"layer.{number}": torch.zeros(1000, 256, dtype=torch.bfloat16) for number in range(3)}
    save_file(tensors, tmp_path / "model/model-00001-of-00001.safetensors", {"format": "pt"})
    done = run(str(file), "--gpu", "4x24GiB", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert not said["fits"]
    assert said["failure"]["kind"] == "weights_do_not_fit"
    assert said["ladder"]["start"]["rungs"] == []
    assert said["ladder"]["serving"] is None
    assert said["weights"]["stored_bytes"] == 3 * 1000 * 256 * 2
    assert any("what is not loaded" in note for note in said["notes"])
    enough = {each["change"] for each in said["remedies"] if each["failure"] is None}
    assert "tensor_parallel_size = 8" in enough
    assert "tensor_parallel_size = 2" not in enough
    assert any(change.startswith("cpu_offload_gb") for change in enough)
    assert "a 4-bit checkpoint (AWQ, GPTQ)" in {each["change"] for each in said["remedies"]}


def test_the_text_is_for_people(tmp_path: Path) -> None:
    done = run(str(file_of(tmp_path, LLAMA)), "--gpu", "24GiB x 2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/a.toml: fits\n")
    for words in ("2 x GPU of 23.7 GiB", "3072 bytes per token", "requests at once", "config alone", "1. gpu_memory"):
        assert words in done.stdout


@pytest.mark.parametrize("content", [b"", b"{}", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 64])
def test_files_that_are_no_weights_count_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert stored_bytes(str(tmp_path)) is None


def test_all_weights_in_one_file_beside_the_parts_are_counted_once(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002", "model-00002-of-00002", "consolidated"):
        save_file({"weight": torch.zeros(100)}, tmp_path / f"{name}.safetensors")
    assert stored_bytes(str(tmp_path)) == 800


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--gpu", "much"], 2, "24GiB x 4"),
        (["--gpu", "2 x 24GiB x 2"], 2, "24GiB x 4"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path: Path, words: list[str], status: int, said: str) -> None:
    done = run(str(file_of(tmp_path, LLAMA)), *words)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_file_that_vllm_refuses_is_refused_with_its_line(tmp_path: Path) -> None:
    done = run(str(file_of(tmp_path, LLAMA, max_model_len=100_000)), "--gpu", "24GiB")
    assert done.returncode == 78
    assert "a.toml:5: engine.max_model_len" in done.stderr


def test_gpus_that_the_file_names_and_that_are_not_here_are_asked_for(tmp_path: Path) -> None:
    file = file_of(tmp_path, LLAMA)
    file.write_text(file.read_text() + "[gpu]\ndevices = [97]\n")
    done = run(str(file))
    assert done.returncode == 75
    assert "GPU 97" in done.stderr
    assert "--gpu" in done.stderr


def test_a_real_start_on_the_cpu_has_the_cache_that_was_planned(tmp_path: Path) -> None:
    limits = {"max_model_len": 4096, "max_num_seqs": 8, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20,
              "skip_tokenizer_init": True}  # fmt: skip
    said = weigh(tmp_path, "cpu", {"windows": (WINDOWS, limits)})["windows"]
    (tmp_path / "start.py").write_text(START)
    done = python(str(tmp_path / "start.py"), str(tmp_path / "windows"), repr(limits))
    found = re.search(r"KV cache size: ([\d,]+) tokens, .*: ([\d.]+)x", done.stdout + done.stderr)
    assert found, (done.stdout + done.stderr)[-3000:]
    assert said["tokens"] == int(found[1].replace(",", ""))
    assert said["concurrency"] == pytest.approx(float(found[2]), abs=0.0051)
