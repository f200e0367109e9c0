"""What a command line means to llm-serve is what it means to the installed vLLM."""

from __future__ import annotations

import argparse
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

pytest.importorskip("vllm")

from llm_serve.cli.check import check
from llm_serve.cli.import_ import import_
from llm_serve.cli.main import app
from llm_serve.core import former_flags
from llm_serve.core.flags import Catalogue, read_flags
from llm_serve.core.importing import draft_of
from llm_serve.core.instance_file import parse_instance
from llm_serve.core.instance_text import instance_text
from llm_serve.core.launch import Launch
from llm_serve.core.plan import EnginePlan
from llm_serve.engine import arguments
from llm_serve.engine.catalogue import catalogue, refusal
from tests.catalogue import CATALOGUE as BY_HAND
from tests.readme import README, configuration

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
ORIGINALS = sorted((ROOT / "tests/originals").iterdir())
"""How the machines of the field reports were served before, written down again from what the reports say."""
# demo.toml names a folder that the demo makes; the e2e tests serve it. router.toml is no instance.
CONFIG = sorted(path for path in (ROOT / "config").glob("*.toml") if path.stem not in ("demo", "router"))
SECRETS = ("sk-5090-local-only-not-for-others", "sk-deepseek-r1-70b-secret")


@pytest.fixture(scope="module")
def vllm() -> Catalogue:
    """The installed vLLM."""
    return catalogue()


def test_the_catalogue_by_hand_is_a_part_of_the_real_one(vllm: Catalogue) -> None:
    """Decisions are tested with options as they are."""
    assert BY_HAND.options == {name: vllm.options.get(name) for name in BY_HAND.options}
    assert BY_HAND.short.items() <= vllm.short.items()
    assert BY_HAND.variables <= vllm.variables
    assert BY_HAND.version == vllm.version.partition("+")[0]


def test_no_former_option_is_one_of_today(vllm: Catalogue) -> None:
    """An option that vLLM takes is never called gone."""
    former = {*former_flags.DROPPED, *former_flags.RENAMED, *former_flags.SWITCHED, "task"}

    assert set() == former & vllm.options.keys()
    assert set() == former_flags.VARIABLES.keys() & vllm.variables


def test_every_name_of_today_exists(vllm: Catalogue) -> None:
    """What an old option is said to be now, vLLM knows."""
    paths = [*former_flags.RENAMED.values(), *(path for path, _ in former_flags.SWITCHED.values())]
    tasks = {option for task in former_flags.TASKS.values() for option in task}

    assert set() == ({path.partition(".")[0] for path in paths} | tasks) - vllm.options.keys()
    for name, value in (pair for task in former_flags.TASKS.values() for pair in task.items()):
        assert refusal(name, value) is None
    for backend in former_flags.BACKENDS.values():
        assert refusal("attention_backend", backend) is None
    for value, options in former_flags.WEIGHTS.items():
        for option in options:
            assert refusal(option, value) is not None


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ("structured_outputs_config", {"backend": "xgrammar", "disable_any_whitespace": True}),
        ("structured_outputs_config", {"backend": "guidance", "disable_additional_properties": True}),
        ("compilation_config", {"mode": 3}),
        ("hf_overrides", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}),
    ],
)
def test_the_tables_that_old_options_become_are_accepted(table: str, value: dict[str, Any]) -> None:
    """Not only the option: also what is in it."""
    assert refusal(table, value) is None


@pytest.mark.parametrize("original", ORIGINALS, ids=lambda path: path.name)
def test_each_original_becomes_a_file_that_passes(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By import and by check, with all its secrets left out; a folder that is not here is check's business."""
    services = ("first", "second") if "compose" in original.name else (None,)
    for service in services:
        file = tmp_path / f"{service}.toml"

        assert 0 == import_([str(original)], file, service, force=False), capsys.readouterr().err
        text = file.read_text()
        # The model's folder stands for any: its name on the hub can be judged without its files.
        file.write_text(text.replace('model = "/data/models/', 'model = "org/'))
        assert 0 == check(str(file), json_output=False), capsys.readouterr().err

        assert not any(secret in text for secret in SECRETS)
        assert 0o640 == file.stat().st_mode & 0o777 | 0o040
        assert "note: " in capsys.readouterr().out


def imported(name: str, capsys: pytest.CaptureFixture[str], service: str | None = None) -> tuple[Any, str]:
    """The settings that an original becomes, and the text."""
    assert 0 == import_([str(ROOT / "tests/originals" / name)], None, service, force=False)
    text = capsys.readouterr().out
    return parse_instance(text, source=name, name="a"), text


def test_the_start_script_of_the_5090s(capsys: pytest.CaptureFixture[str]) -> None:
    """TP 4 on four of eight, thinking off, keys in their file, numactl as lines of the unit."""
    settings, text = imported("rtx5090-start.sh", capsys)

    assert settings.gpu.devices == (0, 1, 2, 3)
    assert settings.server.listen == "0.0.0.0:8000"
    assert settings.server.api_keys == "/etc/llm-serve/qwen3.6-27b.keys"
    assert settings.engine["default_chat_template_kwargs"] == {"enable_thinking": False}
    assert (settings.engine["tensor_parallel_size"], settings.engine["max_num_seqs"]) == (4, 64)
    assert settings.engine_env["NCCL_P2P_DISABLE"] == "1"
    for words in ("NUMAPolicy=bind", "CPUAffinity=numa", "VLLM_WORKER_MULTIPROC_METHOD=spawn: llm-serve sets it"):
        assert words in text


def test_the_backend_that_was_found_by_trial_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """As a variable of long ago, and as today's option."""
    for name in ("rtx3090-nohup.sh", "rtx3090-module.sh"):
        settings, _ = imported(name, capsys)
        assert settings.engine["attention_backend"] == "TRITON_ATTN"


def test_the_two_halves_of_the_2080ti(capsys: pytest.CaptureFixture[str]) -> None:
    """Two services, two pairs of GPUs, two ports."""
    halves = [imported("rtx2080ti-compose.yaml", capsys, service)[0] for service in ("first", "second")]

    assert [half.gpu.devices for half in halves] == [(0, 1), (2, 3)]
    assert [half.server.listen for half in halves] == ["127.0.0.1:8001", "127.0.0.1:8002"]


def test_a_quantization_that_vllm_has_dropped_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    """bitsandbytes: vLLM's parser would take it, and no engine would start."""
    settings, text = imported("deepseek-r1-70b.yaml", capsys)

    assert {"quantization", "load_format", "swap_space"} & settings.engine.keys() == set()
    assert settings.engine["cpu_offload_gb"] == 24
    assert '# quantization = "bitsandbytes"' in text


@pytest.mark.parametrize("path", CONFIG, ids=lambda path: path.stem)
def test_every_shipped_file_passes_check_without_its_gpu_and_model(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what could not be checked here is said."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert 0 == check(str(path), json_output=False), capsys.readouterr().err
    out = capsys.readouterr().out

    assert "is not on this machine: its own limits were not checked" in out
    assert "GPUs" in out.partition("note: ")[2]


def test_the_file_that_readme_shows_passes_check(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands there, but for the place of its keys."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    keys, file = tmp_path / "qwen7b.keys", tmp_path / "qwen7b.toml"
    keys.write_text("a-key-of-many-characters\n")
    keys.chmod(0o600)
    file.write_text(configuration(README.read_text()).replace("/etc/llm-serve/qwen7b.keys", str(keys)))

    assert 0 == check(str(file), json_output=False), capsys.readouterr().err
    assert str(keys) in file.read_text()


def _values(action: argparse.Action) -> st.SearchStrategy[list[str]] | None:
    """Words that an option may get: what it chooses from, else something of each kind."""
    if action.nargs == 0:
        return st.just([])
    words: st.SearchStrategy[str]
    if action.choices:
        words = st.sampled_from([str(choice) for choice in action.choices if choice is not None])
    else:
        words = st.sampled_from(
            ["1", "2", "16", "4k", "2K", "0.5", "auto", "a", "a b", "/x/y", "-1", "{}", "[1]"]
        ) | st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=6)
    return st.lists(words, min_size=1, max_size=3 if action.nargs in ("+", "*") else 1)


@lru_cache
def actions() -> dict[str, argparse.Action]:
    """The options that a file writes under [engine], as vLLM's parser has them."""
    elsewhere = {*arguments.OWNED, "hf_token", "device_ids"}
    return {name: action for name, action in arguments.known_options().items() if name not in elsewhere}


OPEN_TABLES = ("additional_config", "default_chat_template_kwargs", "hf_overrides", "override_generation_config")
"""Options whose table vLLM takes with any keys in it."""


@st.composite
def dotted(draw: st.DrawFn) -> list[str]:
    """One table, a part of it here and a part there, and perhaps the whole too."""
    flag = f"--{draw(st.sampled_from(OPEN_TABLES)).replace('_', draw(st.sampled_from('-_')))}"
    argv = [f"{flag}={json.dumps({'whole': 1})}"] if draw(st.booleans()) else []
    for path in draw(st.lists(st.sampled_from(["a", "a.b", "b.c-d", "b.c_e", "l+", "b.l+"]), max_size=4)):
        value = draw(st.sampled_from(["1", "0.5", "true", "a,b", "text", '{"x": 1}', '[1, "y"]', "a b"]))
        argv += [f"{flag}.{path}={value}"] if draw(st.booleans()) else [f"{flag}.{path}", value]
    return argv


@settings(max_examples=60, deadline=None)
@given(dotted())
def test_tables_with_dots_mean_the_same_after_import(argv: list[str]) -> None:
    """Parts are put together as vLLM puts them."""
    expected, found, text = _both(argv)

    assert expected == found, text


@st.composite
def flags(draw: st.DrawFn) -> list[str]:
    """A valid set of flags, as vLLM's own parser judges each alone."""
    argv: list[str] = []
    for name in draw(st.lists(st.sampled_from(sorted(actions())), min_size=1, max_size=8, unique=True)):
        strategy = _values(actions()[name])
        assert strategy is not None
        words = draw(strategy)
        flag = f"--{name.replace('_', draw(st.sampled_from('-_')))}"
        if not words and isinstance(actions()[name], argparse.BooleanOptionalAction) and draw(st.booleans()):
            flag = flag.replace("--", "--no-", 1)
        given = [f"{flag}={words[0]}"] if len(words) == 1 and draw(st.booleans()) else [flag, *words]
        try:
            arguments._parser().parse_args(["--model=m", *given])
        except Exception:  # noqa: BLE001 - vLLM says no in many ways
            continue
        argv += given
    return argv


@settings(max_examples=60, deadline=None)
@given(flags())
def test_any_valid_flags_mean_the_same_after_import(argv: list[str]) -> None:
    """vLLM's parser is asked twice: with the words, and with the file that they became."""
    expected, found, text = _both(argv)

    assert expected == found, text


def _both(argv: list[str]) -> tuple[dict[str, str], dict[str, str], str]:
    """What vLLM makes of the words, what it makes of the file, and the file."""
    expected = vars(arguments._parser().parse_args(["--model=m", *argv]))
    draft = draft_of(Launch(("m", *argv)), catalogue())
    text = instance_text(draft, "A test")
    read = parse_instance(text, source="a.toml", name="a")
    plan = EnginePlan.from_settings(read)

    words = [
        word for name, value in plan.arguments.items() for word in arguments._as_argv(name, value, actions()[name])
    ]
    found = vars(arguments._parser().parse_args(["--model=m", *words]))

    return _told(expected), _told(found), text


def _told(parsed: dict[str, Any]) -> dict[str, str]:
    """Each value as text, without the names that vLLM makes up anew each time."""
    return {name: re.sub(r"engine_id='[0-9a-f-]{36}'", "engine_id=...", repr(each)) for name, each in parsed.items()}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["1", "12", "25.6", "0.5", "3.25"]), st.sampled_from(["", *"kmgtKMGT"]))
def test_numbers_with_a_letter_are_vllms(number: str, letter: str) -> None:
    """16k and 16K differ."""
    from vllm.utils.argparse_utils import human_readable_int

    try:
        expected = human_readable_int(number + letter)
    except (ValueError, argparse.ArgumentTypeError):
        return
    assert expected == read_flags(("m", f"--max-model-len={number}{letter}"), BY_HAND).values["max_model_len"]


def test_what_vllm_refuses_becomes_a_comment(capsys: pytest.CaptureFixture[str]) -> None:
    """Its own words are the reason."""
    words = ["vllm", "serve", "m", "--dtype", "bf16", "--max-num-seqs", "abc", "--attention-backend", "XFORMERS"]

    assert 0 == import_(words, None, None, force=False)
    out = capsys.readouterr().out

    assert '# dtype = "bf16": must be one of auto' in out
    assert '# max_num_seqs = "abc": must be a whole number' in out
    assert '# attention_backend = "XFORMERS": vLLM has no XFORMERS' in out


def test_a_config_file_of_the_command_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's own words count for more; a file that is not here is said."""
    (tmp_path / "vllm.yaml").write_text(json.dumps({"model": "other", "max-num-seqs": 3, "max-model-len": 5}))
    script = tmp_path / "start.sh"
    script.write_text("vllm serve m --config vllm.yaml --max-model-len 7\n")

    assert 0 == import_([str(script)], None, None, force=False)
    read = parse_instance(capsys.readouterr().out, source="a.toml", name="a")
    (tmp_path / "vllm.yaml").unlink()
    assert 0 == import_([str(script)], None, None, force=False)

    assert read.engine == {"max_num_seqs": 3, "max_model_len": 7}
    assert '# config "vllm.yaml":' in capsys.readouterr().out


def test_the_example_of_the_help_works(tmp_path: Path) -> None:
    """As it stands there."""
    shown = CliRunner().invoke(app, ["import", "--help"]).stdout.partition("Example: llm-serve ")[2].split()

    done = CliRunner().invoke(app, shown)

    assert (0, True) == (done.exit_code, "max_model_len = 16000" in done.stdout), done.stderr


def test_a_contradiction_of_the_original_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """More processes than GPUs: the file is printed, and so is what check will say."""
    words = ["docker", "run", "--gpus", "1", "vllm/vllm-openai", "--model", "m", "-tp", "2"]

    assert 78 == import_(words, None, None, force=False)
    out, err = capsys.readouterr()

    assert "tensor_parallel_size = 2" in out
    assert "devices names 1" in err
