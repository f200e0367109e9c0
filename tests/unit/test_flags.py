"""vLLM's words become options as vLLM's parser would take them, and old ones are explained."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.flags import Flags, read_flags
from llm_serve.core.launch import NotImportable
from tests.catalogue import CATALOGUE


def read(*args: str) -> Flags:
    """The options of these words, after a model."""
    return read_flags(("m", *args), CATALOGUE)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--max-model-len", "8192"], {"max_model_len": 8192}),
        (["--max_model_len=16k"], {"max_model_len": 16_000}),
        (["--max-model-len", "16K"], {"max_model_len": 16_384}),
        (["--max-model-len", "25.6k"], {"max_model_len": 25_600}),
        (["--max-model-len", "auto"], {"max_model_len": "auto"}),
        (["--max-model-len", "-1"], {"max_model_len": -1}),
        (["--gpu-memory-utilization", "1e999"], {"gpu_memory_utilization": "1e999"}),
        (["--hf-overrides", '{"a": 1e999}'], {"hf_overrides": '{"a": 1e999}'}),
        (["--max-model-len", "9" * 5000], {"max_model_len": "9" * 5000}),
        (["--max-model-len", "\u00b2"], {"max_model_len": "\u00b2"}),
        (["--gpu-memory-utilization", ".9"], {"gpu_memory_utilization": 0.9}),
        (["--device-memory-utilization", "0.5"], {"gpu_memory_utilization": 0.5}),
        (["--gpu-mem", "0.9"], {"gpu_memory_utilization": 0.9}),
        (["-tp", "2"], {"tensor_parallel_size": 2}),
        (["-tp=2"], {"tensor_parallel_size": 2}),
        (["-O3"], {"optimization_level": "3"}),
        (["-O", "1"], {"optimization_level": "1"}),
        (["-O=1"], {"optimization_level": "1"}),
        (["--enforce-eager"], {"enforce_eager": True}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--enable-prefix-caching", "False"], {"enable_prefix_caching": False}),
        (["--enable-prefix-caching=True"], {"enable_prefix_caching": True}),
        (["--max-num-seqs", "1", "--max-num-seqs", "2"], {"max_num_seqs": 2}),
        (["--served-model-name", "a", "b"], {"served_model_name": ["a", "b"]}),
        (["--cudagraph-capture-sizes", "1", "2"], {"cudagraph_capture_sizes": [1, 2]}),
        (["--revision", "8"], {"revision": "8"}),
        (["--hf-overrides", '{"a": {"b": [1, 2.5, true]}}'], {"hf_overrides": {"a": {"b": [1, 2.5, True]}}}),
        (["--hf-overrides", '{"a": null}'], {"hf_overrides": '{"a": null}'}),
        (["--compilation-config.mode", "3"], {"compilation_config": {"mode": 3}}),
        (["-cc.mode=3", "--compilation-config.pass_config.x", "true"], {"compilation_config": {"mode": 3, "pass_config": {"x": True}}}),
        (["--compilation-config.ops+", "a,b", "--compilation-config.ops+=c"], {"compilation_config": {"ops": ["a", "b", "c"]}}),
        (["--compilation-config", "3"], {"compilation_config": {"mode": 3}}),
        (["--limit-mm-per-prompt", "image=4,video=1"], {"limit_mm_per_prompt": {"image": 4, "video": 1}}),
        (["--attention-backend", "TRITON_ATTN_VLLM_V1"], {"attention_backend": "TRITON_ATTN"}),
        (["--chat-template", "./a b.jinja"], {"chat_template": "./a b.jinja"}),
        (["--chat-template", "{{ messages }}"], {"chat_template": "{{ messages }}"}),
    ],
)  # fmt: skip
def test_options_become_values(args: list[str], expected: dict[str, Any]) -> None:
    """Every spelling that vLLM takes, and those that earlier versions took; nothing is left to say."""
    flags = read(*args)

    assert expected == flags.values
    assert [] == flags.remarks


@pytest.mark.parametrize(
    ("args", "expected", "words"),
    [
        (["--swap-space", "16"], {}, "--swap-space 16"),
        (["--use-v2-block-manager", "--max-num-seqs", "2"], {"max_num_seqs": 2}, "one block manager"),
        (["--disable-log-requests"], {}, "requests are never logged"),
        (["--num-scheduler-steps", "8"], {}, "async_scheduling"),
        (["--device", "cuda"], {}, "CPU build"),
        (["--enable-reasoning"], {}, "reasoning_parser alone"),
        (["--worker-use-ray"], {"distributed_executor_backend": "ray"}, "distributed_executor_backend"),
        (["--disable-mm-preprocessor-cache"], {"mm_processor_cache_gb": 0}, "mm_processor_cache_gb"),
        (["--guided-decoding-backend", "xgrammar:disable-any-whitespace"],
         {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}, "structured_outputs_config.backend"),
        (["--rope-scaling", '{"rope_type": "yarn"}', "--rope-theta", "1000000"],
         {"hf_overrides": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1000000}}}, "rope_theta"),
        (["--cuda-graph-sizes", "1", "2"], {"cudagraph_capture_sizes": [1, 2]}, "cudagraph_capture_sizes"),
        (["--speculative-model", "[ngram]", "--num-speculative-tokens", "5", "--ngram-prompt-lookup-max", "4"],
         {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}}, "speculative_config"),
        (["--task", "embed"], {"runner": "pooling", "convert": "embed"}, "runner and convert"),
        (["--max-nun-seqs", "4"], {}, "Did you mean max_num_seqs?"),
        (["--zzz", "1", "2"], {}, "--zzz 1 2"),
        (["--zzz-token", "hush"], {}, "--zzz-token (hidden)"),
        (["stray"], {}, "belongs to no option"),
        (["--max-num-seqs"], {}, "has no value"),
        (["--max-num-seqs", "\0$N\0"], {}, "$N is set nowhere"),
    ],
)  # fmt: skip
def test_what_is_no_option_today_is_explained(args: list[str], expected: dict[str, Any], words: str) -> None:
    """Today's name where there is one, else the reason; the value is shown, unless it is a secret."""
    flags = read(*args)

    assert expected == flags.values
    said = [f"{remark.what}: {remark.why}" for remark in flags.remarks]
    assert any(words in each for each in said), said
    assert not any("hush" in each for each in said)


def test_the_model_may_stand_anywhere() -> None:
    """First, after options, or as --model, which counts for more."""
    assert read_flags(("m", "--max-num-seqs", "1"), CATALOGUE).model == "m"
    assert read_flags(("--use-v2-block-manager", "m"), CATALOGUE).model == "m"
    assert read_flags(("--enforce-eager", "m"), CATALOGUE).model == "m"
    assert read_flags(("--model", "m"), CATALOGUE).model == "m"


@pytest.mark.parametrize(("args", "message"), [((), "names no model"), (("\0$1\0",), "$1 is set nowhere")])
def test_without_a_model_there_is_no_file(args: tuple[str, ...], message: str) -> None:
    """What every file needs has to be known."""
    with pytest.raises(NotImportable) as caught:
        read_flags(args, CATALOGUE)

    assert message in str(caught.value)


JSON = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_any_json_table_arrives_whole(table: dict[str, Any]) -> None:
    """A flag's JSON is its table, in both ways of giving it."""
    text = json.dumps(table)

    assert table == read("--hf-overrides", text).values["hf_overrides"]
    assert table == read(f"--hf-overrides={text}").values["hf_overrides"]


@given(st.lists(st.text(max_size=8), max_size=8))
def test_no_words_are_more_than_read_or_refused(args: list[str]) -> None:
    """Whatever is written, an answer comes."""
    assert read(*args).model
