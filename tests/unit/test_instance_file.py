"""Instance files: what is accepted, what is refused, and on which line."""

from __future__ import annotations

import json
import string
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.errors import ConfigError
from llm_serve.core.instance_file import check_exposure, locate, parse_instance
from llm_serve.core.settings import Settings
from llm_serve.core.toml_lines import key_lines

CONFIG_FOLDER = Path(__file__).parents[2] / "config"

EXAMPLE = """\
model = "Qwen/Qwen2.5-7B-Instruct"        # hub id or folder

[server]
listen = "127.0.0.1:8000"                 # or "unix:/run/llm-serve/qwen7b.sock"; a socket from systemd wins
api_keys = "/etc/llm-serve/qwen7b.keys"   # one key a line; or systemd credential "api-keys"
max_queued = 256                          # waiting requests beyond which 503 + Retry-After
hold_timeout_s = 300                      # how long a request may wait for an engine
drain_timeout_s = 60

[engine]                                  # any vLLM argument by its own name
max_model_len = 16384
max_num_seqs = 256
gpu_memory_utilization = 0.90

[engine.env]                              # environment of the engine's processes only

[recovery]
floor_max_model_len = 2048
floor_max_num_seqs = 4
start_timeout_s = 1800                    # one engine start
stall_timeout_s = 120                     # work waiting, no engine step
restart_limit = 8                         # engine starts in restart_window_s, then exit 70
restart_window_s = 3600
step_up_after_s = 0                       # 0: stay on a learned rung until `reset` or a changed file
attention_backends = "auto"               # or an ordered list to fall back through

[gpu]
devices = [0]                             # else all visible
pause_above_celsius = 0                   # 0: off
"""


def parse(text: str) -> Settings:
    """Parse a text as the file a.toml."""
    return parse_instance(text, source="a.toml", name="a")


def problems(text: str) -> list[str]:
    """Return the refusal of a text, one line a problem."""
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value).splitlines()


def test_the_example_of_the_manual_is_accepted() -> None:
    """The file that the manual shows is a good one, and its values arrive."""
    settings = parse(EXAMPLE)

    assert settings.model == "Qwen/Qwen2.5-7B-Instruct"
    assert settings.engine == {"max_model_len": 16384, "max_num_seqs": 256, "gpu_memory_utilization": 0.9}
    assert settings.gpu.devices == (0,)
    assert settings.server.api_keys == "/etc/llm-serve/qwen7b.keys"


@pytest.mark.parametrize(
    "path", sorted(path for path in CONFIG_FOLDER.glob("*.toml") if path.stem != "router"), ids=lambda path: path.stem
)
def test_every_file_that_is_shipped_is_accepted(path: Path) -> None:
    """Nobody starts from an example that is refused."""
    settings = parse_instance(path.read_text(), source=str(path), name=path.stem)

    assert settings.model


def test_a_model_is_all_that_is_needed() -> None:
    """One line makes an instance, on loopback and with every default."""
    settings = parse('model = "m"')

    assert settings.server.listen_on.is_loopback
    assert (settings.engine, settings.engine_env) == ({}, {})


def test_an_unknown_option_names_the_nearest_known_one_and_its_line() -> None:
    """A slip of the pen is answered with the word that was meant."""
    assert problems('model = "m"\n[server]\nlisten_ = "x"\n') == [
        "a.toml:3: server.listen_: unknown option. Did you mean listen?"
    ]


def test_an_option_in_the_wrong_table_is_sent_to_the_right_one() -> None:
    """A known option that stands elsewhere is not called unknown without help."""
    (problem,) = problems('model = "m"\ndrain_timeout_s = 5\n')

    assert problem == "a.toml:2: drain_timeout_s: unknown option. It belongs under [server]"


def test_an_engine_option_at_the_top_is_sent_to_its_table() -> None:
    """vLLM's names are not known here, but where they go is."""
    (problem,) = problems('model = "m"\ntensor_parallel_size = 2\n')

    assert "[engine]" in problem


def test_all_problems_are_named_at_once_in_the_order_of_the_file() -> None:
    """Nobody has to fix a file one start at a time."""
    text = """\
model = 3
[server]
max_queued = -1
hold_timeout_s = "long"
drain_timeout_s = 400
[log]
level = "loud"
[recovery]
restart_limit = 1.5
restart_window_s = 0
colour = "red"
[gpu]
devices = [1, 1]
"""
    lines = [int(problem.split(":")[1]) for problem in problems(text)]

    assert lines == [1, 3, 4, 5, 7, 9, 10, 11, 13]


def test_a_missing_model_is_a_problem_of_the_file() -> None:
    """What is not written has no line."""
    assert problems("[server]\n") == ["a.toml: model: is required"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model = qwen\n", 1),
        ('model = "m"\n[server\nlisten = "x"\n', 2),
        ('model = "m"\nmodel = "n"\n', 2),
        ('model = "m"\n[server]\n[gpu]\n[server]\n', 4),
        ('model = "m', 1),
        ('model = """m\n\n', 3),
    ],
)
def test_a_syntax_error_names_its_line(text: str, line: int) -> None:
    """What is not TOML is refused with the line where it stops being TOML."""
    (problem,) = problems(text)

    assert problem.startswith(f"a.toml:{line}: not TOML: ")


def test_text_without_quotes_is_explained() -> None:
    """The most common slip has its remedy beside it."""
    assert "in quotes" in problems("model = qwen\n")[0]


def test_deep_nesting_is_refused_and_not_a_crash() -> None:
    """A file made to exhaust the parser is a wrong file."""
    assert "nested too deeply" in problems(f'model = "m"\nx = {"[" * 100_000}')[0]


def test_hyphens_and_underscores_are_alike() -> None:
    """Options copied from a command line are understood."""
    settings = parse('model = "m"\n[server]\nmax-queued = 5\n[engine]\nmax-num-seqs = 6\n')

    assert (settings.server.max_queued, settings.engine) == (5, {"max_num_seqs": 6})


def test_an_option_written_in_both_spellings_is_refused_at_the_second() -> None:
    """Two values for one option are a mistake, whichever would win."""
    (problem,) = problems('model = "m"\n[engine]\nmax-num-seqs = 5\n\nmax_num_seqs = 6\n')

    assert problem.startswith("a.toml:5: engine.max_num_seqs: is written twice")


def test_hyphens_inside_values_of_the_engine_are_kept() -> None:
    """Only the names of options are normalised, never what is passed on."""
    settings = parse('model = "m"\n[engine]\nhf-overrides = { "rope-type" = "x-y" }\n')

    assert settings.engine == {"hf_overrides": {"rope-type": "x-y"}}


def test_the_order_of_tables_does_not_matter() -> None:
    """engine.env before engine, and a dotted table before its parent, mean the same."""
    settings = parse('model = "m"\n[engine.env]\nA = "1"\n[gpu]\n[engine]\nseed = 1\n')

    assert (settings.engine, settings.engine_env) == ({"seed": 1}, {"A": "1"})


def test_environment_values_become_text() -> None:
    """Numbers may stand without quotes."""
    settings = parse('model = "m"\n[engine.env]\nOMP_NUM_THREADS = 4\nHF_HOME = "/x"\nR = 0.5\n')

    assert settings.engine_env == {"OMP_NUM_THREADS": "4", "HF_HOME": "/x", "R": "0.5"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("VLLM_SERVER_DEV_MODE = 1", "routes"),
        ('VLLM_ALLOW_INSECURE_SERIALIZATION = "true"', "pickled"),
        ('VLLM_ALLOW_RUNTIME_LORA_UPDATING = "1"', "files"),
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD = 1", "unpacked"),
        ("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION = 1", "another's name"),
        ('LD_PRELOAD = "/tmp/a.so"', 'server.allow_env = ["LD_PRELOAD"]'),
        ('PYTHONPATH = "/tmp"', "foreign code"),
        ('VLLM_API_KEY = "secret-key-1"', "server.api_keys"),
        ('VLLM_RPC_BASE_PATH = "/x"', "llm-serve sets it"),
        ('TMPDIR = "/x"', "llm-serve sets it"),
        ('VLLM_WORKER_MULTIPROC_METHOD = "fork"', "llm-serve sets it"),
        ('VLLM_LOGGING_CONFIG_PATH = "/x"', "llm-serve sets it"),
        ("A = true", "text or a number"),
        ("A = [1]", "text or a number"),
        ("A = { b = 1 }", "text or a number"),
        ('"A B" = "1"', "name"),
        ('A = "a\\u0000b"', "NUL"),
    ],
)
def test_an_environment_that_would_do_harm_is_refused(line: str, reason: str) -> None:
    """Variables that open a door, or that llm-serve needs itself, are refused with the reason."""
    (problem,) = problems(f'model = "m"\n[engine.env]\n{line}\n')

    assert problem.startswith("a.toml:3: engine.env.")
    assert reason in problem
    assert "secret-key-1" not in problem


def test_a_dangerous_switch_that_is_off_is_accepted() -> None:
    """Writing down that a door is shut is no mistake."""
    assert parse('model = "m"\n[engine.env]\nVLLM_SERVER_DEV_MODE = 0\n').engine_env


def test_a_dangerous_variable_is_accepted_where_the_file_says_so() -> None:
    """tcmalloc is preloaded for good reasons; only the variable that is named is."""
    allowing = 'model = "m"\n[server]\nallow_env = ["LD_PRELOAD"]\n[engine.env]\nLD_PRELOAD = "/lib/tcmalloc.so"\n'

    assert parse(allowing).engine_env == {"LD_PRELOAD": "/lib/tcmalloc.so"}
    assert 1 == len(problems(allowing + 'PYTHONPATH = "/a"\n'))
    assert 2 == len(problems(allowing.replace('["LD_PRELOAD"]', '"LD_PRELOAD"')))


def test_limits_and_names_are_read() -> None:
    """A list of the file is what the settings hold; what limits.allow cannot open is named."""
    text = 'model = "m"\n[server]\nhosts = ["llm.example"]\n[limits]\nmax_choices = 64\nallow = ["vllm_xargs"]\n'
    settings = parse(text)

    assert (("llm.example",), 64, ("vllm_xargs",)) == (
        settings.server.hosts, settings.limits.max_choices, settings.limits.allow,
    )  # fmt: skip
    (problem,) = problems(text.replace('"vllm_xargs"', '"chat_template"'))
    assert "limits.allow" in problem
    (unknown,) = problems(text.replace("max_choices", "max_choises"))
    assert "Did you mean max_choices?" in unknown


def test_devices_are_named_in_one_place_only() -> None:
    """gpu.devices and CUDA_VISIBLE_DEVICES would contradict each other."""
    (problem,) = problems('model = "m"\n[gpu]\ndevices = [0]\n[engine.env]\nCUDA_VISIBLE_DEVICES = "1"\n')

    assert "contradicts gpu.devices" in problem


def test_a_drain_over_budget_is_refused_with_the_sum() -> None:
    """Both numbers and what to write stand in the message."""
    (problem,) = problems('model = "m"\n[server]\ndrain_timeout_s = 301\n')

    assert problem == (
        "a.toml:3: server.drain_timeout_s: 301 s drain + 15 s kill + 15 s margin = 331 s, "
        "more than the unit's TimeoutStopSec of 330 s. Set it to 300 or less"
    )


def test_a_floor_above_the_wish_is_refused_only_when_it_is_written() -> None:
    """A small model_len does not have to lower a floor that nobody wrote."""
    assert parse('model = "m"\n[engine]\nmax_model_len = 512\n').engine

    (problem,) = problems('model = "m"\n[engine]\nmax_model_len = 512\n[recovery]\nfloor_max_model_len = 1024\n')

    assert problem.startswith("a.toml:5: recovery.floor_max_model_len: the floor of 1024")


def test_more_processes_than_devices_are_refused_with_the_product() -> None:
    """Parallel sizes have to fit on the devices that are named."""
    sizes = "tensor_parallel_size = 2\npipeline_parallel_size = 2\n"
    text = f'model = "m"\n[engine]\n{sizes}[gpu]\ndevices = [0, 1]\n'

    (problem,) = problems(text)

    assert problem.startswith("a.toml:6: gpu.devices: ")
    assert "tensor_parallel_size 2 x pipeline_parallel_size 2 = 4 GPUs, but devices names 2" in problem
    assert parse(text.replace("pipe", 'distributed_executor_backend = "ray"\npipe')).engine


@pytest.mark.parametrize("number", [0, 65])
def test_a_number_of_front_ends_that_helps_nobody_is_refused(number: int) -> None:
    """None at all serves nobody; more than there are cores on any machine only take memory."""
    (problem,) = problems(f'model = "m"\n[server]\nfront_ends = {number}\n')

    assert "front_ends" in problem
    assert 4 == parse('model = "m"\n[server]\nfront_ends = 4\n').server.front_ends


@pytest.mark.parametrize("value", ["1979-05-27", "07:32:00", "inf", "nan", "[1, inf]", "{ a = nan }"])
def test_engine_values_that_vllm_cannot_be_given_are_refused(value: str) -> None:
    """Dates and infinities have no form on vLLM's side."""
    (problem,) = problems(f'model = "m"\n[engine]\nx = {value}\n')

    assert problem.startswith("a.toml:3: engine.x")


def test_a_table_where_a_value_belongs_is_refused() -> None:
    """`[server.listen]` and `server = 3` are wrong types, not crashes."""
    assert "must be text" in problems('model = "m"\n[server.listen]\n')[0]
    assert "must be a table" in problems('model = "m"\nserver = 3\n')[0]
    assert "must be a table" in problems('model = "m"\n[[server]]\n')[0]
    assert "must be a table" in problems('model = "m"\nengine = [1]\n')[0]
    assert "must be a table" in problems('model = "m"\n[engine]\nenv = "A=1"\n')[0]


@pytest.mark.parametrize(
    ("listen", "has_keys", "is_problem"),
    [
        ("127.0.0.1:8000", False, False),
        ("unix:/run/a.sock", False, False),
        ("0.0.0.0:8000", False, True),
        ("0.0.0.0:8000", True, False),
    ],
)
def test_a_server_open_to_the_network_needs_keys(listen: str, has_keys: bool, is_problem: bool) -> None:
    """Without keys only this machine is served."""
    problem = check_exposure(parse(f'model = "m"\n[server]\nlisten = "{listen}"\n'), has_keys)

    assert is_problem is (problem is not None)


def test_the_problem_of_an_open_server_has_its_line() -> None:
    """With the text at hand, the address is found in it."""
    text = 'model = "m"\n[server]\nlisten = "0.0.0.0:1"\n'

    problem = check_exposure(parse(text), False, text)

    assert problem is not None
    assert problem.line == 3


def test_lines_are_found_in_every_form_of_toml() -> None:
    """Headers, dotted and quoted keys, inline tables, long strings and arrays are followed."""
    text = '''\
# [not.a.table]
a.b = 1
"quoted.key" = "x = 1"   # y = 2
long = """
fake = 1
[fake]
\\""" still
"""
'single' = \'\'\'
fake2 = 2\'\'\'
list = [
  1,  # one
  "]",
  { deep = [ 2,
    3 ] },
]
inline = { p = 1, "q" = { r = 2 } }
[t.u]
k = 1
  [ t . "v w" ]
  k = 2
[[rows]]
n = 1
[[rows]]
n = 2
[rows.sub]
m = 3
'''
    tomllib.loads(text)
    expected = {
        "a": 2, "a.b": 2, "quoted.key": 3, "long": 4, "single": 9, "list": 11, "list.0": 12, "list.1": 13,
        "list.2.deep": 14, "list.2.deep.1": 15, "inline.p": 17, "inline.q.r": 17, "t": 18, "t.u": 18,
        "t.u.k": 19, "t.v w": 20, "t.v w.k": 21, "rows": 22, "rows.0.n": 23, "rows.1": 24, "rows.1.n": 25,
        "rows.1.sub": 26, "rows.1.sub.m": 27,
    }  # fmt: skip

    assert expected == {path: locate(text, path) for path in expected}
    for fake in ("fake", "fake2", "y", "x", "not.a.table", "rows.2"):
        assert locate(text, fake) is None


KEYS = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=6)
QUOTED_KEYS = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=5)
NASTY_TEXT = st.text(st.sampled_from("ab\"'\\#=[]{},\n .\t"), max_size=12)
SCALARS = st.one_of(st.integers(-9, 9), st.booleans(), NASTY_TEXT)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


def as_toml(value: Any, newline: bool) -> str:
    """Write a value as TOML, over several lines when asked."""
    if isinstance(value, list):
        gap = "\n" if newline else " "
        return "[" + ",".join(f"{gap}{as_toml(inner, newline)}" for inner in value) + gap + "]"
    if isinstance(value, str) and newline and "\\" not in value and "'" not in value:
        return f"'''\n{value}'''"
    return json.dumps(value)


@given(
    st.lists(
        st.tuples(st.one_of(KEYS, QUOTED_KEYS), st.lists(st.tuples(KEYS, VALUES, st.booleans()), max_size=4)),
        max_size=4,
        unique_by=lambda table: table[0],
    )
)
def test_each_key_is_found_on_the_line_it_was_written_on(
    tables: list[tuple[str, list[tuple[str, Any, bool]]]],
) -> None:
    """Whatever the values look like, the scanner finds the keys, all of them and no other."""
    lines: list[str] = []
    expected: list[tuple[tuple[str, ...], int]] = []

    def write(text: str) -> int:
        first = "\n".join(lines).count("\n") + 2 if lines else 1
        lines.append(text)
        return first

    for table, pairs in tables:
        name = json.dumps(table, ensure_ascii=False).replace("\x7f", "\\u007f")
        expected.append(((table,), write(f"[{name}] # {name}")))
        for key, (_, value, newline) in {pair[0]: pair for pair in pairs}.items():
            expected.append(((table, key), write(f"{key} = {as_toml(value, newline)}")))
    text = "\n".join(lines)
    tomllib.loads(text)

    assert expected == [(path, line) for path, line in key_lines(text) if len(path) <= 2]


@given(st.text(st.sampled_from("ab\"'\\#=[]{},\n .\r\t0"), max_size=40))
def test_no_text_makes_the_reader_fail_otherwise_than_with_a_config_error(text: str) -> None:
    """Any text is settings or a refusal, and finding lines in it always ends."""
    with suppress(ConfigError):
        parse(text)
    locate(text, "a.b")


@given(st.lists(st.sampled_from("-_"), min_size=2, max_size=2), st.data())
def test_any_mix_of_hyphens_and_underscores_names_the_same_option(marks: list[str], data: st.DataObject) -> None:
    """drain-timeout_s is drain_timeout_s, in the file and when it is located."""
    key = f"drain{marks[0]}timeout{marks[1]}s"
    value = data.draw(st.integers(0, 300))
    text = f'model = "m"\n[server]\n{key} = {value}\n'

    assert value == parse(text).server.drain_timeout_s
    assert 3 == locate(text, "server.drain_timeout_s") == locate(text, "server.drain-timeout-s")
