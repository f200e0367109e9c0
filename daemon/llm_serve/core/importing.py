"""Turns the way in which vLLM was started into the tables of an instance file.

Whatever has no place there becomes a remark with the reason; a secret becomes one without its value. Nothing is dropped
in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_serve.core import environment, former_flags
from llm_serve.core.containers import compose_launch, docker_run
from llm_serve.core.flags import Catalogue, read_flags
from llm_serve.core.launch import Launch, NotImportable, Remark, plain_launches
from llm_serve.core.plan import HIDDEN, SECRET_NAME
from llm_serve.core.settings import parse_listen
from llm_serve.core.shell import Command, commands, holes, readable

__all__ = ["Draft", "compose_launch", "config_words", "draft_of", "launch_of", "launch_of_script"]


@dataclass(slots=True)
class Draft:
    """An instance file, before it is text."""

    name: str
    model: str
    server: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    gpu: dict[str, Any] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)

    def remark(self, table: str, what: str, why: str, *lines: str) -> None:
        """Note what is not in the tables."""
        self.remarks.append(Remark(table, what, why, lines))

    def refuse(self, option: str, why: str) -> None:
        """Take an engine option out again, for this reason."""
        value = self.engine.pop(option)
        self.remark("engine", f"{option} = {json.dumps(value, ensure_ascii=False)}", why)


def launch_of_script(text: str, variables: Mapping[str, str]) -> Launch:
    """Return the one launch of vLLM in a shell text. Raises NotImportable, ShellError."""
    found = [(launch, command.line) for command in commands(text, variables) for launch in _launches(command)]
    if not found:
        raise NotImportable("no command in it starts vLLM's server (`vllm serve`, docker run, ...)")
    if len(found) > 1:
        places = ", ".join(str(line) for _, line in found)
        raise NotImportable(f"{len(found)} commands start vLLM (lines {places}): import them one by one, after --")
    (launch, line), remarks = found[0], []
    for command in commands(text, variables):
        if command.line <= line and command.words[0] in ("source", ".") and not command.words[-1].endswith("activate"):
            what = readable(" ".join(command.words))
            remarks.append(Remark("engine.env", what, "was not read: add what it sets and the engine needs"))
    return launch.under({}, remarks)


def launch_of(words: tuple[str, ...]) -> Launch:
    """Return the launch that the words of one command are. Raises NotImportable."""
    for launch in _launches(Command(words, {}, 1)):
        return launch
    raise NotImportable("this is not a command that starts vLLM's server (`vllm serve`, docker run, ...)")


def _launches(command: Command) -> Iterator[Launch]:
    container = docker_run(command.words) if command.words else None
    if container is not None:
        # Variables in front of `docker run` are docker's, not the container's.
        yield container
    else:
        yield from plain_launches(command)


def config_words(config: Mapping[str, Any], catalogue: Catalogue) -> tuple[str, ...]:
    """Return the words that a vLLM YAML file stands for, by vLLM's own rules."""
    words: list[str] = []
    for key, value in config.items():
        option = catalogue.options.get(str(key).replace("-", "_"))
        if value is True:
            words.append(f"--{key}")
        elif value is False:
            words += [f"--no-{key}"] if option is None or option.kind == "switch" else []
        elif isinstance(value, list):
            words += [f"--{key}", *(json.dumps(each) if isinstance(each, dict) else str(each) for each in value)]
        else:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return tuple(words)


def draft_of(launch: Launch, catalogue: Catalogue, name: str = "") -> Draft:
    """Return the tables that a launch comes to. Raises NotImportable."""
    flags = read_flags(launch.args, catalogue)
    model = _on_host(flags.model or "", launch)
    draft = Draft(name or _as_name(launch.name) or _as_name(model.rstrip("/").rpartition("/")[2]) or "model", model)
    draft.remarks += launch.remarks
    draft.remarks += flags.remarks
    values = {option: _on_host(value, launch) for option, value in flags.values.items()}
    env = {variable: _on_host(value, launch) for variable, value in launch.env.items()}
    _serve(draft, values, env, launch)
    _choose_devices(draft, values, env, launch)
    for option, value in values.items():
        _engine_option(draft, option, value, catalogue)
    for variable, value in env.items():
        _variable(draft, variable, value, catalogue)
    _judge_paths(draft)
    return draft


def _as_name(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def _on_host(value: Any, launch: Launch) -> Any:
    """Return a value with the paths of a container as they are on the host."""
    if isinstance(value, dict):
        return {key: _on_host(each, launch) for key, each in value.items()}
    if isinstance(value, list):
        return [_on_host(each, launch) for each in value]
    for inside, outside in sorted(launch.mounts, reverse=True):
        if isinstance(value, str) and (value == inside or value.startswith(f"{inside}/")):
            return outside + value[len(inside) :]
    return value


_EVERY_ADDRESS = ("0.0.0.0", "::", "")  # noqa: S104 - recognised, not bound


def _serve(draft: Draft, values: dict[str, Any], env: dict[str, str], launch: Launch) -> None:
    """Fill [server]: where it listens, and who may come in."""
    keys = values.pop("api_key", None) or env.pop("VLLM_API_KEY", None)
    if keys:
        draft.server["api_keys"] = f"/etc/llm-serve/{draft.name}.keys"
        draft.remark(
            "server",
            f"--api-key {HIDDEN}",
            "keys do not belong here. Each is a line of that file, of 8 characters or more, or of the credential "
            f"/etc/credstore/llm-serve.{draft.name}.api-keys (then take api_keys out). Make the file with:",
            f"install -m 640 -o root -g llm-serve /dev/null /etc/llm-serve/{draft.name}.keys",
        )
    host, port = str(values.pop("host", "") or ""), values.pop("port", 8000)
    socket = values.pop("uds", None)
    wanted = f"unix:{socket}" if socket else f"[{host}]:{port}" if ":" in host else f"{host or '0.0.0.0'}:{port}"  # noqa: S104
    if launch.published is not None:
        wanted = _published(draft, port, launch.published)
    try:
        listen = parse_listen(wanted)
    except ValueError as error:
        draft.remark("server", f"--host {host} --port {port}", str(error))
        listen = parse_listen("127.0.0.1:8000")
    if keys or listen.is_loopback:
        draft.server["listen"] = str(listen)
        return
    draft.server["listen"] = f"127.0.0.1:{listen.port}"
    draft.remark(
        "server",
        f"{'every address' if (listen.host or '') in _EVERY_ADDRESS else listen.host}, port {listen.port}",
        "other machines could use it without a key. With a file of keys (one a line, mode 640) they can again:",
        f'listen = "{listen}"',
        f'api_keys = "/etc/llm-serve/{draft.name}.keys"',
    )


def _published(draft: Draft, port: Any, published: Mapping[int, str]) -> str:
    """Return the host's side of a container's port."""
    for inside, outside in published.items():
        if inside != port:
            draft.remark("server", f"port {outside}:{inside}", "is not the one that vLLM listened on")
    if port in published:
        return published[port]
    draft.remark("server", f"port {port} of the container", "was published nowhere: only containers could reach it")
    return f"127.0.0.1:{port}"


def _choose_devices(draft: Draft, values: dict[str, Any], env: dict[str, str], launch: Launch) -> None:
    """Fill [gpu]: what the container was given, less what CUDA_VISIBLE_DEVICES leaves of it."""
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    devices = launch.devices
    ids = values.pop("device_ids", "")
    ids = ",".join(map(str, ids)) if isinstance(ids, list) else str(ids)
    for written, text in (("CUDA_VISIBLE_DEVICES", visible), ("--device-ids", ids)):
        if not text:
            continue
        indices = [int(each) for each in text.split(",") if re.fullmatch(r" *[0-9]{1,2} *", each)]
        if len(indices) != len(text.split(",")):
            why = "devices are named by their index here: `nvidia-smi -L` lists index and UUID"
            draft.remark("gpu", f"{written} {readable(text)}", why)
        elif devices is not None and max(indices) >= len(devices):
            draft.remark("gpu", f"{written} {text}", f"there are only {len(devices)} GPUs")
        else:
            devices = tuple(devices[each] for each in indices) if devices is not None else tuple(indices)
    env.pop("CUDA_VISIBLE_DEVICES", None)
    order = env.pop("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if order != "PCI_BUS_ID":
        draft.remark("gpu", f"CUDA_DEVICE_ORDER={order}", "devices are numbered as nvidia-smi shows them: check them")
    if devices:
        draft.gpu["devices"] = list(dict.fromkeys(devices))


def _engine_option(draft: Draft, option: str, value: Any, catalogue: Catalogue) -> None:
    known = catalogue.options.get(option)
    gone = former_flags.WEIGHTS.get(str(value), {}).get(option)
    if known is not None and known.elsewhere:
        shown = HIDDEN if SECRET_NAME.search(option) else json.dumps(value, ensure_ascii=False)
        draft.remark("engine", f"{option} {shown}", f"is not vLLM's business here. {known.elsewhere}")
    elif option == "hf_token":
        _secret(draft, "hf_token")
    elif _has_secret(option, value):
        draft.remark(
            "engine", f"{option} {HIDDEN}", "holds a secret: add it, and let only root and llm-serve read the file"
        )
    elif gone:
        draft.remark("engine", f"{option} = {json.dumps(value)}", gone)
    else:
        draft.engine[option] = value


def _has_secret(name: str, value: Any) -> bool:
    """True for a text whose name says that it is one, at any depth, and for an address with a password in it."""
    if isinstance(value, dict):
        return any(_has_secret(str(key), each) for key, each in value.items())
    if isinstance(value, list):
        return any(_has_secret(name, each) for each in value)
    if not isinstance(value, str):
        return False
    if value.lstrip().startswith(("{", "[")):
        try:
            return _has_secret(name, json.loads(value))
        except ValueError:
            pass
    return SECRET_NAME.search(name) is not None or re.search(r"://[^/\s@]+:[^/\s@]+@", value) is not None


_INSTALLATION = frozenset({"LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"})
_SESSION = frozenset(
    {"DISPLAY", "HOME", "LANG", "LC_ALL", "LOGNAME", "PWD", "PYTHONUNBUFFERED", "SHELL", "TERM", "USER"}
)
_HUB_TOKENS = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN"})


def _variable(draft: Draft, name: str, value: str, catalogue: Catalogue) -> None:
    """Put a variable under [engine.env], or say why it is not there."""
    shown = f"{name}={readable(value)}"
    if name == "VLLM_ATTENTION_BACKEND" and not holes(value):
        draft.engine.setdefault("attention_backend", former_flags.BACKENDS.get(value, value))
        draft.remark("engine.env", shown, f"is attention_backend under [engine] now; {former_flags.BACKEND_ORDER}")
    elif name in _HUB_TOKENS or _has_secret(name, value):
        _secret(draft, name)
    elif name.startswith("VLLM_") and name not in catalogue.variables:
        draft.remark(
            "engine.env", shown, former_flags.VARIABLES.get(name, f"vLLM {catalogue.version} does not read it")
        )
    elif (why := _why_not(name)) is not None:
        draft.remark("engine.env", shown, why)
    elif holes(value):
        draft.remark("engine.env", shown, f"{', '.join(holes(value))} is set nowhere in the text: write its value")
    else:
        draft.env[name] = value


def _why_not(name: str) -> str | None:
    if name in _INSTALLATION:
        return "belongs to the installation that it came from"
    if name in _SESSION:
        return "the unit has its own"
    if name in environment.SET_BY_US:
        return "llm-serve sets it for each engine it starts"
    if name in environment.UNSAFE:
        return environment.UNSAFE[name]
    return None if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) else "is not a name that a variable can have"


def _secret(draft: Draft, name: str) -> None:
    if name == "hf_token" or name in _HUB_TOKENS:
        why = "a secret: put it into /var/cache/llm-serve/huggingface/token (owner llm-serve, mode 600)"
        draft.remark("engine.env", f"{name} {HIDDEN}", why)
    else:
        file = f"/etc/llm-serve/{draft.name}.env"
        why = f"a secret: put it into {file} (mode 600), and let `systemctl edit llm-serve@{draft.name}` say:"
        draft.remark("engine.env", f"{name} {HIDDEN}", why, "[Service]", f"EnvironmentFile={file}")


def _judge_paths(draft: Draft) -> None:
    """Remark on paths that mean something else for a service."""
    paths = {"model": draft.model, **draft.engine, **draft.env}
    for name, value in paths.items():
        if not isinstance(value, str):
            continue
        table = "" if name == "model" else "engine.env" if name in draft.env else "engine"
        if value.startswith(("./", "../")):
            draft.remark(table, name, "is relative to where the command ran: write the whole path")
        elif re.match(r"(/home/|/root(/|$)|~)", value):
            draft.remark(
                table, name, "is in a home, which the unit hides (ProtectHome=yes): move it, for example to /srv"
            )
