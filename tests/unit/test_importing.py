"""How vLLM was started becomes an instance file: what is carried over, what is explained, and what stays secret."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serve.core.importing import Draft, compose_launch, config_words, draft_of, launch_of, launch_of_script
from llm_serve.core.instance_file import parse_instance
from llm_serve.core.instance_text import instance_text
from llm_serve.core.launch import Launch, NotImportable, Remark
from llm_serve.core.settings import Settings
from llm_serve.core.shell import ShellError
from tests.catalogue import CATALOGUE

HOME = {"HOME": "/srv/u"}


def draft(script: str) -> Draft:
    """The draft of a shell text."""
    return draft_of(launch_of_script(script, HOME), CATALOGUE)


def text(script: str) -> str:
    """The file of a shell text."""
    return instance_text(draft(script), "A start script")


def settings(script: str) -> Settings:
    """What our own reader makes of that file."""
    return parse_instance(text(script), source="a.toml", name="a")


def said(found: Draft) -> str:
    """All its remarks, one a line."""
    return "\n".join(
        f"{remark.table}| {remark.what}: {remark.why} {' / '.join(remark.lines)}" for remark in found.remarks
    )


@pytest.mark.parametrize(
    "script",
    [
        "vllm serve m --max-num-seqs 4",
        "/opt/v/bin/vllm serve m --max-num-seqs=4 &",
        "python3 -m vllm.entrypoints.openai.api_server --model m --max-num-seqs 4",
        "exec python -m vllm.entrypoints.cli.main serve m --max-num-seqs 4",
        "bash -c 'vllm serve m --max-num-seqs 4'",
        'tmux new-session -d -s x "cd /opt && vllm serve m --max-num-seqs 4"',
        "echo vllm serve; pkill -f 'vllm serve x'; uv run vllm serve m --max-num-seqs 4 | tee log",
        "docker run vllm/vllm-openai --model m --max-num-seqs 4",
        "docker run vllm/vllm-openai:v0.12.0 m --max-num-seqs 4",
        "sudo podman run --rm -it docker.io/vllm/vllm-openai vllm serve m --max-num-seqs 4",
        "docker run --entrypoint bash own/image -c 'vllm serve m --max-num-seqs 4'",
        "docker run -v/a:/b -p8000:8000 own/image python3 -m vllm.entrypoints.openai.api_server --model m --max-num-seqs 4",
    ],
)
def test_vllm_is_found_however_it_is_started(script: str) -> None:
    """By path, as a module, in a shell of its own, in a container."""
    found = settings(script)

    assert (found.model, found.engine) == ("m", {"max_num_seqs": 4})


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("ls -l", "no command in it starts vLLM"),
        ("", "no command in it starts vLLM"),
        ("vllm bench serve --model m", "no command in it starts vLLM"),
        ("docker run nginx", "no command in it starts vLLM"),
        ("docker run vllm/vllm-openai bash", "no command in it starts vLLM"),
        ("vllm serve a &\n\nvllm serve b", "2 commands start vLLM (lines 1, 3)"),
    ],
)
def test_what_is_not_one_launch_is_refused(script: str, message: str) -> None:
    """None, or more than one."""
    with pytest.raises(NotImportable) as caught:
        draft(script)

    assert message in str(caught.value)


def test_words_after_the_dashes_are_one_command() -> None:
    """A shell has read them already: what it left is taken as it is."""
    found = draft_of(launch_of(("vllm", "serve", "m", "--chat-template", "$x 'y'")), CATALOGUE)

    assert found.engine == {"chat_template": "$x 'y'"}
    with pytest.raises(NotImportable):
        launch_of(("ls", "-l"))


@pytest.mark.parametrize(
    ("script", "listen", "words"),
    [
        ("vllm serve m --host 127.0.0.1 --port 81", "127.0.0.1:81", ""),
        ("vllm serve m --host localhost", "localhost:8000", ""),
        ("vllm serve m --host ::1", "[::1]:8000", ""),
        ("vllm serve m --uds /run/a.sock", "unix:/run/a.sock", ""),
        ("vllm serve m", "127.0.0.1:8000", 'listen = "0.0.0.0:8000"'),
        ("vllm serve m --host 0.0.0.0 --port 81", "127.0.0.1:81", 'listen = "0.0.0.0:81"'),
        ("vllm serve m --host :: --port 81", "127.0.0.1:81", 'listen = "[::]:81"'),
        ("vllm serve m --host 'a b'", "127.0.0.1:8000", "is not a host name"),
        ("vllm serve m --api-key abcdefgh", "0.0.0.0:8000", "of 8 characters or more"),
        ("VLLM_API_KEY=abcdefgh vllm serve m --host 10.0.0.1", "10.0.0.1:8000", "/etc/credstore/llm-serve.m.api-keys"),
        ("docker run -p 8001:8000 vllm/vllm-openai --model m --api-key abcdefgh", "0.0.0.0:8001", ""),
        ("docker run -p 127.0.0.1:8001:81 vllm/vllm-openai --model m --port 81", "127.0.0.1:8001", ""),
        ("docker run -p 8001:8000/tcp -p 9:9 vllm/vllm-openai --model m", "127.0.0.1:8001", "is not the one that vLLM listened on"),
        ("docker run vllm/vllm-openai --model m", "127.0.0.1:8000", "published nowhere"),
        ("docker run --network host vllm/vllm-openai --model m --host 127.0.0.1", "127.0.0.1:8000", ""),
    ],
)  # fmt: skip
def test_the_address_is_the_hosts_and_never_open_without_a_key(script: str, listen: str, words: str) -> None:
    """Where clients found it; without a key this machine alone, and the two lines that open it."""
    found = draft(script)

    assert listen == found.server["listen"] == settings(script).server.listen
    assert words in said(found)
    assert "abcdefgh" not in text(script)
    assert settings(script).server.listen_on.is_loopback or "api_keys" in found.server


@pytest.mark.parametrize(
    ("script", "devices"),
    [
        ("CUDA_VISIBLE_DEVICES=1,0 vllm serve m", [1, 0]),
        ("export CUDA_VISIBLE_DEVICES=2\nvllm serve m", [2]),
        ("CUDA_VISIBLE_DEVICES=GPU-1f vllm serve m", None),
        ("vllm serve m", None),
        ("vllm serve m --device-ids 2,3", [2, 3]),
        ("vllm serve m --device-ids [2,3]", [2, 3]),
        ("CUDA_VISIBLE_DEVICES=4,6 vllm serve m --device-ids 1", [6]),
        ("docker run --gpus all vllm/vllm-openai --model m", None),
        ("docker run --gpus 2 vllm/vllm-openai --model m", [0, 1]),
        ("""docker run --gpus '"device=2,3"' vllm/vllm-openai --model m""", [2, 3]),
        ("docker run --gpus 4218133739 vllm/vllm-openai --model m", None),
        ("docker run --gpus device=\u00b2 vllm/vllm-openai --model m", None),
        ("CUDA_VISIBLE_DEVICES=\u00b2 vllm serve m", None),
        ("docker run --gpus device=2 vllm/vllm-openai --model m", [2]),
        ("docker run --gpus device=GPU-1f vllm/vllm-openai --model m", None),
        ("docker run --runtime nvidia -e NVIDIA_VISIBLE_DEVICES=1,3 vllm/vllm-openai --model m", [1, 3]),
        ("docker run --gpus '\"device=4,6\"' -e CUDA_VISIBLE_DEVICES=1 vllm/vllm-openai --model m", [6]),
        ("docker run --gpus 1 -e CUDA_VISIBLE_DEVICES=1 vllm/vllm-openai --model m", [0]),
    ],
)
def test_devices_are_the_hosts(script: str, devices: list[int] | None) -> None:
    """What the container was given, less what the variable leaves of it."""
    found = draft(script)

    assert devices == found.gpu.get("devices")
    assert "CUDA_VISIBLE_DEVICES" not in settings(script).engine_env


def test_paths_of_a_container_become_the_hosts() -> None:
    """Wherever they stand: model, options, tables, variables."""
    found = draft(
        "docker run -v /data/models:/models:ro --mount type=bind,source=/etc/t,target=/templates -v cache:/c -e X=/models/x "
        'vllm/vllm-openai --model /models/a --chat-template /templates/t.jinja --hf-overrides \'{"p": "/models/b"}\' '
        "--revision /modelsx"
    )

    assert found.model == "/data/models/a"
    assert found.engine["chat_template"] == "/etc/t/t.jinja"
    assert found.engine["hf_overrides"] == {"p": "/data/models/b"}
    assert found.engine["revision"] == "/modelsx"
    assert found.env == {"X": "/data/models/x"}
    assert "volume cache:/c: a volume of the container runtime" in said(found)


@pytest.mark.parametrize(
    ("script", "lines"),
    [
        ("numactl --cpunodebind=0 --membind=0 vllm serve m", ["NUMAPolicy=bind", "NUMAMask=0", "CPUAffinity=numa"]),
        ("numactl -N 1 -m 1 vllm serve m", ["NUMAPolicy=bind", "NUMAMask=1", "CPUAffinity=numa"]),
        (
            "numactl -C 0-15 --interleave=all vllm serve m",
            ["NUMAPolicy=interleave", "NUMAMask=all", "CPUAffinity=0-15"],
        ),
        ("numactl --cpunodebind=1 vllm serve m", ["# CPUAffinity= the CPUs of node 1, see lscpu"]),
        ("taskset -c 0-7 nohup vllm serve m", ["CPUAffinity=0-7"]),
        ("docker run -e A=1 vllm/vllm-openai numactl -m0 vllm serve m", ["NUMAPolicy=bind", "NUMAMask=0"]),
    ],
)
def test_binding_becomes_lines_of_the_unit(script: str, lines: list[str]) -> None:
    """llm-serve does not bind; systemd does, with what stands in the comment."""
    found = draft(script)

    assert [("[Service]", *lines)] == [remark.lines for remark in found.remarks if remark.lines[:1] == ("[Service]",)]
    assert settings(script).model == "m"


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("VLLM_USE_V1=0", "there is one engine now"),
        ("VLLM_NO_SUCH=1", "vLLM 0.32.0 does not read it"),
        ("VLLM_SERVER_DEV_MODE=1", "routes"),
        ("VLLM_WORKER_MULTIPROC_METHOD=spawn", "llm-serve sets it"),
        ("LD_LIBRARY_PATH=/x", "belongs to the installation"),
        ('PATH="/x:$PATH"', "belongs to the installation"),
        ("LANG=C", "the unit has its own"),
        ("X=$(nproc)", "$(nproc) is set nowhere"),
        ("CUDA_DEVICE_ORDER=FASTEST_FIRST", "nvidia-smi"),
    ],
)
def test_a_variable_that_cannot_come_along_is_explained(variable: str, words: str) -> None:
    """With its value, unless it is a secret."""
    script = f"export {variable} OMP_NUM_THREADS=8\nvllm serve m"

    assert {"OMP_NUM_THREADS": "8"} == settings(script).engine_env
    assert words in said(draft(script))


def test_the_backend_of_a_variable_becomes_an_option() -> None:
    """Under its name of today; the option itself counts for more."""
    assert draft("VLLM_ATTENTION_BACKEND=TRITON_ATTN_VLLM_V1 vllm serve m").engine == {
        "attention_backend": "TRITON_ATTN"
    }
    both = "VLLM_ATTENTION_BACKEND=FLASHINFER vllm serve m --attention-backend TRITON_ATTN"
    assert draft(both).engine == {"attention_backend": "TRITON_ATTN"}


SECRETS = (
    "HF_TOKEN={} vllm serve m",
    "export HUGGING_FACE_HUB_TOKEN={}\nvllm serve m",
    "AWS_SECRET_ACCESS_KEY={} vllm serve m",
    "HTTPS_PROXY=http://user:{}@proxy:1 vllm serve m",
    "VLLM_API_KEY={} vllm serve m",
    "vllm serve m --api-key {}",
    "vllm serve m --api-key=a {}",
    "vllm serve m --hf-token {}",
    "vllm serve m --hf_token={}",
    "vllm serve m --no-such-secret {}",
    "vllm serve m --no-such-token={}",
    'vllm serve m --additional-config \'{{"s3": {{"password": "{}"}}}}\'',
    'vllm serve m --additional-config \'{{"password": "{}", "x": null}}\'',
    "vllm serve m --additional-config.s3.secret_key {}",
    "vllm serve m --revision http://user:{}@host/x",
    "vllm serve m --api-key $K",
    "sudo HF_TOKEN={} vllm serve m",
    "docker run -e HF_TOKEN={} --label api-token={} vllm/vllm-openai --model m",
    "docker run --env=HF_TOKEN={} vllm/vllm-openai --model m --api-key {}",
    "K={}; docker run vllm/vllm-openai --model m --api-key $K",
    "source env.sh TOKEN={}; vllm serve m",
)


@pytest.mark.parametrize("script", SECRETS)
def test_a_secret_is_written_nowhere(script: str) -> None:
    """Neither as a value nor in a comment; what to do with it is said."""
    found = text(script.replace("{{", "{").replace("}}", "}").replace("{}", "S3cr3tValue"))

    assert "S3cr3tValue" not in found
    assert "(hidden)" in found


def test_a_vllm_yaml_is_read_by_vllms_rules() -> None:
    """true is the flag, false its negation, a list its values, a table JSON."""
    config = {
        "model": "m", "port": 8001, "host": "127.0.0.1", "enforce-eager": True, "enable_prefix_caching": False,
        "disable-log-requests": False, "served-model-name": ["a", "b"], "hf-overrides": {"a": {"b": 1}}, "max-model-len": -1,
    }  # fmt: skip

    found = draft_of(Launch(config_words(config, CATALOGUE)), CATALOGUE)

    assert (found.model, found.server) == ("m", {"listen": "127.0.0.1:8001"})
    assert found.engine == {
        "enforce_eager": True, "enable_prefix_caching": False, "served_model_name": ["a", "b"],
        "hf_overrides": {"a": {"b": 1}}, "max_model_len": -1,
    }  # fmt: skip


SERVICE: dict[str, Any] = {
    "image": "vllm/vllm-openai:${TAG:-v0.8.4}",
    "command": "--model /models/m --max-num-seqs ${SEQS:-4} --chat-template 'a b'",
    "environment": {"A": 1, "B": True, "C": None, "HF_TOKEN": "${HF_TOKEN}"},
    "ports": ["127.0.0.1:8001:8000"],
    "volumes": ["/data:/models"],
    "restart": "unless-stopped",
    "deploy": {"resources": {"reservations": {"devices": [{"capabilities": ["gpu"], "device_ids": ["2", "3"]}]}}},
    "healthcheck": {"test": "curl"},
}


@pytest.mark.parametrize(
    "service",
    [
        SERVICE,
        SERVICE | {"command": ["--model", "/models/m", "--max-num-seqs", 4, "--chat-template", "a b"]},
        SERVICE | {"command": "vllm serve /models/m --max-num-seqs 4 --chat-template 'a b'", "image": "own"},
        SERVICE | {"environment": ["A=1", "B=true", "C", "HF_TOKEN=${HF_TOKEN}"]},
        SERVICE | {"ports": [{"target": 8000, "published": 8001, "host_ip": "127.0.0.1"}]},
        SERVICE | {"volumes": [{"type": "bind", "source": "/data", "target": "/models"}]},
        {key: SERVICE[key] for key in SERVICE if key != "deploy"} | {"gpus": "device=2,3"},
        SERVICE
        | {"entrypoint": ["/bin/sh", "-c"], "command": ["vllm serve /models/m --max-num-seqs 4 --chat-template 'a b'"]},
    ],
)
def test_every_form_of_a_compose_service_means_the_same(service: dict[str, Any]) -> None:
    """Text or list, table or list, short or long."""
    found = draft_of(compose_launch({"services": {"llm": service, "web": {"image": "nginx"}}}, None, {}), CATALOGUE)

    assert (found.model, found.server) == ("/data/m", {"listen": "127.0.0.1:8001"})
    assert found.engine == {"max_num_seqs": 4, "chat_template": "a b"}
    assert (found.env, found.gpu) == ({"A": "1", "B": "true"}, {"devices": [2, 3]})
    for words in ("C: came from the caller's environment", "HF_TOKEN (hidden)", "systemctl enable", "/readyz"):
        assert words in said(found)


@pytest.mark.parametrize(
    ("services", "service", "message"),
    [
        ({"a": SERVICE, "b": SERVICE}, None, "--service a or --service b"),
        ({"a": SERVICE}, "c", "there is no service c: a"),
        ({"a": {"image": "nginx"}}, None, "no service starts vLLM (services: a)"),
        ({"a": None}, None, "no service starts vLLM"),
        ([], None, "no table of services"),
    ],
)
def test_a_compose_file_without_one_service_of_vllm_is_refused(
    services: Any, service: str | None, message: str
) -> None:
    """None, several, or not the one that was named."""
    with pytest.raises(NotImportable) as caught:
        compose_launch({"services": services}, service, {})

    assert message in str(caught.value)


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from(["", "vllm", "a:b", "1:2", "=", "${", "$X", "'", "gpu", "all"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "target", "source", "published", "devices", "resources", "reservations"]), inner, max_size=3),
    ),
    max_leaves=6,
)  # fmt: skip
KEYS = ("command", "deploy", "entrypoint", "environment", "gpus", "image", "ports", "restart", "volumes", "x")


@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=5), st.booleans())
def test_no_service_is_more_than_read_or_refused(service: dict[str, Any], is_vllm: bool) -> None:
    """Whatever YAML holds, an answer comes."""
    whole = service | ({"image": "vllm/vllm-openai", "command": "--model m"} if is_vllm else {})
    try:
        found = draft_of(compose_launch({"services": {"a": whole}}, None, {}), CATALOGUE)
    except (NotImportable, ShellError):
        return
    parse_instance(instance_text(found, "A test"), source="a.toml", name="a")


WORDS = st.sampled_from(
    ["docker", "run", "-v", "-p", "-e", "--gpus", "1:2", "/a:/b", "A=1", "vllm/vllm-openai", "vllm", "serve", "--model", "m", "-d",
     "-it", "--mount", "device=1", "=", "-", "--", "", "numactl", "-N", "taskset", "-c", "0-3", "bash", "-c", "vllm serve 'm", "python",
     "-m", "vllm.entrypoints.openai.api_server", "--port", "9", "--compilation-config.a", "--task", "-O", "--x", "0"]
)  # fmt: skip


@given(st.lists(WORDS, max_size=10))
def test_no_command_is_more_than_read_or_refused(words: list[str]) -> None:
    """Whatever is given after the dashes, a file that reads comes, or one line."""
    try:
        found = draft_of(launch_of(tuple(words)), CATALOGUE)
    except NotImportable:
        return
    parse_instance(instance_text(found, "A test"), source="a.toml", name="a")


def test_paths_that_a_service_cannot_use_are_pointed_at() -> None:
    """Relative ones, and those in a home that the unit hides."""
    found = said(draft("vllm serve ./m --chat-template ~/t.jinja --revision ../x".replace("~", "/home/u")))

    assert "| model: is relative" in found
    assert "engine| chat_template: is in a home" in found
    assert "engine| revision: is relative" in found


NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(lambda name: name != "env")
TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)
ANY_TEXT = st.text(max_size=9) | st.sampled_from(["a\nb = 1", "\r[x]", "\0", "x\x85y", "a\u2028b = 1"])
NUMBERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
VALUES = st.recursive(
    st.one_of(TEXTS, NUMBERS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


@given(
    TEXTS.filter(bool),
    st.dictionaries(NAMES, VALUES, max_size=5),
    st.dictionaries(st.from_regex(r"A[A-Z_]{0,8}", fullmatch=True), TEXTS.filter(lambda value: "\0" not in value), max_size=3),
    st.lists(st.builds(Remark, st.sampled_from(["", "server", "engine", "engine.env", "gpu"]), ANY_TEXT, ANY_TEXT, st.tuples(ANY_TEXT)), max_size=4),
)  # fmt: skip
def test_whatever_a_draft_holds_its_text_reads_back(
    model: str, engine: dict[str, Any], env: dict[str, str], remarks: list[Remark]
) -> None:
    """Every value arrives as it was, and no remark breaks out of its comment."""
    found = Draft("a", model, {"listen": "127.0.0.1:1"}, engine, env, {"devices": [0]}, remarks)

    read = parse_instance(instance_text(found, "A test"), source="a.toml", name="a")

    assert (model, env) == (read.model, read.engine_env)
    assert engine == read.engine
