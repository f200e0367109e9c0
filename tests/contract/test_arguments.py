"""The border to vLLM's arguments: its parser, its refusals and its defaults, as installed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import ParallelConfig

from llm_serve.cli.check import check
from llm_serve.core.errors import ConfigError, HostError
from llm_serve.core.plan import EnginePlan
from llm_serve.engine import arguments
from llm_serve.engine.weights import check_tokenizer, check_weights

pytestmark = pytest.mark.vllm

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "vocab_size": 128,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that is a whole model as far as files go."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    write_weights(folder / "model.safetensors")
    return folder


def write_weights(path: Path, missing_bytes: int = 0) -> int:
    """Write a safetensors file of one tensor, less some bytes; return its whole size."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(16)
    path.write_bytes(whole[: len(whole) - missing_bytes])
    return len(whole)


def text_of(values: dict[str, Any]) -> str:
    """Return a file with the options on lines 3 and following."""
    return "\n".join(['model = "m"', "[engine]", *(f"{name} = 0" for name in values)])


def parse(values: dict[str, Any], model: str = "m") -> Any:
    """Parse a plan with these arguments."""
    return arguments.parse_plan(EnginePlan(model, values, {}), source="a.toml", text=text_of(values))


def refusals(values: dict[str, Any]) -> list[str]:
    """Return the problems of a plan that the parser refuses."""
    with pytest.raises(ConfigError) as caught:
        parse(values)
    return list(map(str, caught.value.problems))


def config_refusals(values: dict[str, Any], model: str | Path) -> list[str]:
    """Return the problems of a plan that parses, and that no engine can be made of."""
    namespace = parse(values, str(model))
    with pytest.raises(ConfigError) as caught:
        arguments.engine_config(namespace, source="a.toml", text=text_of(values))
    return list(map(str, caught.value.problems))


def test_every_kind_of_value_arrives_as_vllm_would_have_parsed_it() -> None:
    """Numbers, text, switches, tables and lists take the form that each option has."""
    namespace = parse(
        {
            "max_model_len": "16k",
            "gpu_memory_utilization": 0.5,
            "dtype": "bfloat16",
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "hf_overrides": {"rope": {"a": 1}},
            "served_model_name": ["one", "two"],
            "allowed_origins": ["http://a"],
            "cudagraph_capture_sizes": [1, 2],
            "chat_template": "-{{ messages }}",
            "limit_mm_per_prompt": {"image": 2},
        },
        model="org/name",
    )

    assert namespace.model == "org/name"
    assert namespace.max_model_len == 16_000
    assert namespace.gpu_memory_utilization == 0.5
    assert namespace.enforce_eager is True
    assert namespace.enable_prefix_caching is False
    assert namespace.hf_overrides == {"rope": {"a": 1}}
    assert namespace.served_model_name == ["one", "two"]
    assert namespace.allowed_origins == ["http://a"]
    assert namespace.cudagraph_capture_sizes == [1, 2]
    assert namespace.chat_template == "-{{ messages }}"
    assert namespace.limit_mm_per_prompt == {"image": 2}


DTYPE_PROBLEM = (
    "a.toml:5: engine.dtype: must be one of auto, bfloat16, float, float16, float32, half, "
    'not "bf16". Did you mean bfloat16?'
)


def test_all_wrong_options_are_named_at_once_with_their_lines() -> None:
    """The parser knows one error at a time; the file's author gets them all."""
    found = refusals(
        {
            "gpu_memory_utilisation": 0.9,
            "max_num_seqs": "abc",
            "dtype": "bf16",
            "enforce_eager": 1,
            "max_model_len": True,
            "no_enable_prefix_caching": True,
            "tp": 2,
        }
    )

    assert found == [
        "a.toml:3: engine.gpu_memory_utilisation: unknown option. Did you mean gpu_memory_utilization?",
        'a.toml:4: engine.max_num_seqs: must be a whole number, not "abc"',
        DTYPE_PROBLEM,
        "a.toml:6: engine.enforce_eager: must be true or false, not 1",
        "a.toml:7: engine.max_model_len: takes a value, not true",
        "a.toml:8: engine.no_enable_prefix_caching: unknown option. Set enable_prefix_caching = false",
        "a.toml:9: engine.tp: unknown option. Did you mean tensor_parallel_size?",
    ]


@pytest.mark.parametrize("name", sorted(arguments.OWNED))
def test_what_llm_serve_owns_is_refused_with_where_to_set_it(name: str) -> None:
    """Two places for one thing would contradict each other sooner or later."""
    (problem,) = refusals({name: "x"})

    assert f"engine.{name}: is not an engine option here. {arguments.OWNED[name]}" in problem


def test_every_owned_option_exists_in_the_installed_vllm() -> None:
    """An option that vLLM renames must not slip through under its new name unseen."""
    known = {action.dest for action in arguments._parser()._actions}

    assert set() == arguments.OWNED.keys() - known


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"compilation_config": {"x": 1}}, "engine.compilation_config: x Unexpected keyword argument"),
        ({"default_chat_template_kwargs": "abc"}, "must be a table or list"),
        ({"served_model_name": []}, "expected at least one argument"),
        ({"served_model_name": ["--x"]}, "begins with -"),
        ({"max_num_batched_tokens": [1, 2]}, "must be a whole number"),
        ({"lora_modules": [{"name": "a"}]}, "engine.lora_modules"),
        ({"enable_auto_tool_choice": True}, "enable_auto_tool_choice requires tool_call_parser"),
        ({"tool_call_parser": "hermess", "enable_auto_tool_choice": True}, "did you mean hermes?"),
        ({"tool_call_parser": "foo", "enable_auto_tool_choice": True}, "as one of apertus"),
        ({"reasoning_parser": "quen3"}, "did you mean qwen3?"),
        ({"chat_template": "/nonexistent.jinja"}, "doesn't exist! Give a file that exists"),
        ({"xyzzyx": 1}, "unknown option"),
    ],
)
def test_a_refusal_of_the_parser_is_one_line_in_the_files_own_words(values: dict[str, Any], words: str) -> None:
    """No usage text, no links, no names of flags: the option and what is wrong with it."""
    (problem,) = refusals(values)

    assert words in problem
    assert "\n" not in problem
    assert "--" not in problem.replace('"--x"', "")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_model_len": 99_999}, "a.toml:3: engine.max_model_len: User-specified"),
        ({"max_model_len": 99_999}, "Set it to 4096 or less"),
        ({"max_num_seqs": 0}, "a.toml:3: engine.max_num_seqs: must be greater than or equal to 1, not 0"),
        ({"gpu_memory_utilization": 1.5}, "a.toml:3: engine.gpu_memory_utilization: must be less than"),
        ({"tensor_parallel_size": 3}, "a.toml:3: engine.tensor_parallel_size: Total number"),
        (
            {"tensor_parallel_size": 2, "numa_bind": True, "numa_bind_nodes": [0]},
            "a.toml:5: engine.numa_bind_nodes: numa_bind_nodes is too short: it has 1 of the 2 entries",
        ),
        (
            {"numa_bind_nodes": [0]},
            "a.toml:3: engine.numa_bind_nodes: numa_bind_nodes and numa_bind_cpus require numa_bind=True",
        ),
        ({"max_num_batched_tokens": 64, "max_num_seqs": 128}, "a.toml:3: engine.max_num_batched_tokens"),
        ({"speculative_config": {"x": 1}}, "a.toml:3: engine.speculative_config.x: Unexpected keyword"),
    ],
)
def test_what_no_engine_can_be_made_of_is_a_problem_with_a_line(
    model: Path, values: dict[str, Any], words: str
) -> None:
    """vLLM's own validation is heard before a process is started or ended."""
    (problem,) = config_refusals(values, model)

    assert words in problem


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("attention_backend", "TRITON_ATN", "vLLM has no TRITON_ATN. Did you mean TRITON_ATTN?"),
        ("load_format", "gguf", "vLLM has no gguf. It has auto, dummy, "),
        ("quantization", "bitsandbytes", "vLLM has no bitsandbytes. It has "),
    ],
)
def test_names_that_vllm_looks_up_late_are_refused_before_anything_is_downloaded(
    option: str, name: str, words: str
) -> None:
    """The model need not be here. What this vLLM has, in any case that it takes, passes."""
    with pytest.raises(ConfigError) as caught:
        parse({option: name}, "org/elsewhere")
    assert f"a.toml:3: engine.{option}: {words}" in str(caught.value)

    parse({"attention_backend": "triton_attn", "load_format": "safetensors", "quantization": "awq"}, "org/elsewhere")
    parse({"attention_backend": "auto"}, "org/elsewhere")


def test_more_processes_than_gpus_are_a_problem_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own count on a machine with one GPU, which is made up here."""
    monkeypatch.setattr("vllm.platforms.current_platform.is_cuda", lambda: True)
    monkeypatch.setattr("vllm.platforms.current_platform.device_count", lambda: 1)
    report = arguments._report("a.toml", text_of({"seed": 1, "tensor_parallel_size": 2}))

    with pytest.raises(ConfigError) as caught, report.refusals():
        ParallelConfig(tensor_parallel_size=2)

    assert (
        "a.toml:4: engine.tensor_parallel_size: World size (2) is larger than the number of available GPUs (1) in this "
        "node. Lower the parallel sizes, or name more GPUs in gpu.devices"
    ) == str(caught.value)


def test_a_sound_plan_gives_the_limits_that_really_hold(model: Path) -> None:
    """What differs from the defaults is listed, and the limits are those of the model and the machine."""
    namespace = parse({"max_num_seqs": 16, "enforce_eager": True, "hf_token": "hf_secret"}, str(model))
    _, config = arguments.engine_config(namespace)

    effective = arguments.effective_arguments(namespace, config)

    assert {
        "model",
        "max_num_seqs",
        "enforce_eager",
        "hf_token",
        "max_model_len",
        "gpu_memory_utilization",
    } == set(effective)
    assert (effective["max_num_seqs"], effective["max_model_len"]) == (16, 4096)
    assert "hf_secret" not in str(effective)


def test_the_effective_arguments_are_json(model: Path) -> None:
    """Whatever objects vLLM makes of an option, what is printed is plain."""
    values = {
        "compilation_config": {"mode": 0},
        "lora_modules": [{"name": "a", "path": "/x"}],
        "optimization_level": 1,
    }

    effective = arguments.effective_arguments(parse(values, str(model)))

    assert json.loads(json.dumps(effective))["compilation_config"] == {"mode": 0}


def test_an_absent_folder_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    """vLLM would complain about the spelling of a repository."""
    (problem,) = config_refusals({}, tmp_path / "absent")

    assert f"a.toml:1: model: {tmp_path / 'absent'} does not exist" in problem


def test_a_folder_without_a_config_is_refused(model: Path) -> None:
    """The file that is missing is named."""
    (model / "config.json").unlink()

    (problem,) = config_refusals({}, model)

    assert "has no config.json" in problem


def test_a_broken_config_is_refused(model: Path) -> None:
    """A download that was cut is told from a model that vLLM does not know."""
    (model / "config.json").write_text('{"a')

    (problem,) = config_refusals({}, model)

    assert "a.toml:1: model: " in problem
    assert "Download config.json again" in problem


def test_a_hub_id_that_is_not_cached_offline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With downloads off, waiting would not help."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    (problem,) = config_refusals({}, "nobody/no-such-model")

    assert "is not in the local cache, and downloads are off" in problem


@pytest.mark.parametrize(
    "message",
    ["Failed to infer device type", "No CUDA GPUs are available", "We couldn't connect to 'https://hub'"],
)
def test_what_the_machine_lacks_is_no_fault_of_the_file(
    model: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    """No device yet and no network are to be tried again, not corrected."""

    def fail(_: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(arguments, "_create", fail)

    with pytest.raises(HostError, match=message):
        arguments.engine_config(parse({}, str(model)))


def test_whole_weights_pass(model: Path) -> None:
    """A sound folder is not complained about."""
    check_weights(str(model))
    check_tokenizer(str(model))


def weight_refusal(model: Path) -> str:
    """Return the refusal of a folder's weights."""
    with pytest.raises(ConfigError) as caught:
        check_weights(str(model), source="a.toml", text='model = "m"')
    return str(caught.value)


def test_a_truncated_file_is_named_with_both_sizes(model: Path) -> None:
    """The size that is there and the size that should be stand in the message."""
    whole = write_weights(model / "model.safetensors", missing_bytes=5)

    message = weight_refusal(model)

    assert message == (
        f"a.toml:1: model: {model}/model.safetensors is truncated: {whole - 5} of {whole} bytes. "
        "Download the file again"
    )


def test_a_file_cut_inside_its_header_is_truncated(model: Path) -> None:
    """The header's own length says what is missing."""
    write_weights(model / "model.safetensors", missing_bytes=40)

    assert "is truncated" in weight_refusal(model)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"", "is empty"),
        (b"abc", "no valid safetensors header"),
        (b"<html>" + bytes(100), "no valid safetensors header"),
        (struct.pack("<Q", 4) + b"[1] ", "no valid safetensors header"),
        (struct.pack("<Q", 2) + b"{}" + b"more", "is too long"),
    ],
)
def test_what_is_not_weights_is_refused(model: Path, content: bytes, words: str) -> None:
    """Pointers, pages of error and noise are told apart from weights."""
    (model / "model.safetensors").write_bytes(content)

    assert words in weight_refusal(model)


def test_files_that_the_index_names_and_nobody_downloaded_are_listed(model: Path) -> None:
    """An interrupted download of many files is found before the engine is."""
    names = {f"w{i}": f"model-{i}.safetensors" for i in range(5)} | {"w": "model.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    message = weight_refusal(model)

    assert "5 of the 6 files that model.safetensors.index.json names are missing" in message
    assert "model-0.safetensors, model-1.safetensors, model-2.safetensors, ..." in message


def test_a_folder_without_weights_or_tokenizer_is_refused(model: Path) -> None:
    """Both are said, each with what to do."""
    (model / "model.safetensors").unlink()
    (model / "tokenizer.json").unlink()

    assert "has no weights" in weight_refusal(model)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        check_tokenizer(str(model))


def test_dummy_weights_need_no_files(model: Path) -> None:
    """A plan that makes its weights up is not asked for them."""
    (model / "model.safetensors").unlink()

    arguments.check_model(parse({"load_format": "dummy"}, str(model)))


def test_check_prints_the_effective_plan_and_returns_0(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sound file is answered with what it comes to, as text and as JSON."""
    file = tmp_path / "a.toml"
    file.write_text(f'model = "{model}"\n[engine]\nmax-num-seqs = 16\n')

    assert check(str(file), json_output=False) == 0
    text = capsys.readouterr().out
    assert check(str(file), json_output=True) == 0
    verdict = json.loads(capsys.readouterr().out)

    assert f"{file}: good" in text
    assert verdict["effective"]["max_num_seqs"] == 16
    assert verdict["instance"] == "a"


def test_check_prints_all_problems_to_stderr_and_returns_78(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys, options and address are judged in one run."""
    file = tmp_path / "a.toml"
    file.write_text(f'model = "{model}"\n[server]\nlisten = "0.0.0.0:1"\n[engine]\nmax_num_sequences = 1\nport = 1\n')

    assert check(str(file), json_output=False) == 78
    out, err = capsys.readouterr()

    assert out == ""
    assert [int(line.split(":")[1]) for line in err.splitlines() if line.startswith(str(file))] == [3, 5, 6]


def test_check_says_what_it_could_not_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that is elsewhere is no fault of the file, and not passed over in silence."""
    file = tmp_path / "a.toml"
    file.write_text('model = "nobody/no-such-model"\n[server]\napi_keys = "/nonexistent/a.keys"\n')

    assert check(str(file), json_output=False) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]

    assert len(notes) == 2


def test_check_judges_with_the_engines_own_environment(model: Path, tmp_path: Path) -> None:
    """A variable that vLLM's validation asks for counts in check as it does in a start."""
    file = tmp_path / "a.toml"
    text = f'model = "{model}"\n[engine]\nmax_model_len = 9999\n'

    file.write_text(text)
    assert check(str(file), json_output=False) == 78
    file.write_text(text + "[engine.env]\nVLLM_ALLOW_LONG_MAX_MODEL_LEN = 1\n")
    assert check(str(file), json_output=False) == 0
    file.write_text(text)
    assert check(str(file), json_output=False) == 78
