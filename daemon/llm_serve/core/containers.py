"""What a docker run line or a compose service means without the container: a launch on the host itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llm_serve.core.launch import Launch, NotImportable, Remark, plain_launches
from llm_serve.core.shell import Command, commands, interpolated, readable

_RUNNERS = frozenset({"docker", "podman", "nerdctl"})
_SWITCHES = frozenset(
    [
        "--detach",
        "--init",
        "--interactive",
        "--no-healthcheck",
        "--oom-kill-disable",
        "--privileged",
        "--publish-all",
        "--quiet",
        "--read-only",
        "--replace",
        "--rm",
        "--sig-proxy",
        "--tty",
    ]
)
_SHORT_SWITCHES = "diPqt"
_LONG = {
    "-c": "--cpu-shares", "-e": "--env", "-h": "--hostname", "-l": "--label", "-m": "--memory", "-p": "--publish",
    "-u": "--user", "-v": "--volume", "-w": "--workdir",
}  # fmt: skip

_OTHER_PROGRAMS = frozenset({"bash", "bench", "nvidia-smi", "python", "python3", "sh", "sleep", "vllm"})

_SHM = "there is no container: the host's own /dev/shm is used"
_UNIT = "the unit llm-serve@.service does it"
_REASONS = {
    "cap_add": "the unit needs no capability",
    "cpus": "a drop-in of the unit sets it (CPUQuota=)",
    "cpuset": "a drop-in of the unit sets it (CPUAffinity=)",
    "cpuset_cpus": "a drop-in of the unit sets it (CPUAffinity=)",
    "cpuset_mems": "a drop-in of the unit sets it (NUMAPolicy=, NUMAMask=)",
    "depends_on": "a drop-in of the unit sets it (After=, Wants=)",
    "env_file": "was not read: add what the engine needs of it",
    "healthcheck": "the unit watches itself; a proxy asks /readyz",
    "ipc": _SHM,
    "logging": "everything goes to the journal",
    "memory": "a drop-in of the unit sets it (MemoryMax=)",
    "mem_limit": "a drop-in of the unit sets it (MemoryMax=)",
    "restart": f"{_UNIT}: `systemctl enable --now llm-serve@{{name}}`",
    "shm_size": _SHM,
    "stop_grace_period": "server.drain_timeout_s says how long a stop waits for requests in flight",
    "ulimit": f"{_UNIT} (LimitNOFILE=, LimitMEMLOCK=)",
    "ulimits": f"{_UNIT} (LimitNOFILE=, LimitMEMLOCK=)",
    "user": f"{_UNIT} (User=llm-serve)",
}
_ALIASES = {"net": "network", "network_mode": "network", "environment": "env", "ports": "publish", "mount": "volume"}


@dataclass(slots=True)
class _Container:
    """What a line or a service says; both are written in compose's names."""

    image: str = ""
    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    name: str = ""
    env: dict[str, str] = field(default_factory=dict)
    devices: tuple[int, ...] | None = None
    mounts: list[tuple[str, str]] = field(default_factory=list)
    published: dict[int, str] = field(default_factory=dict)
    is_on_host_network: bool = False
    remarks: list[Remark] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    """What has no meaning without a container."""


def docker_run(words: Sequence[str]) -> Launch | None:
    """Return the launch that a `docker run` line is; None where it is none, or not of vLLM."""
    for index, word in enumerate(words):
        if word.rpartition("/")[2] in _RUNNERS and {"run", "create"} & set(words[index + 1 : index + 3]):
            start = next(at for at in range(index, len(words)) if words[at] in ("run", "create"))
            container = _Container()
            rest = _read_options(container, words[start + 1 :])
            container.image, container.command = next(iter(rest), ""), tuple(rest[1:])
            return _as_launch(container)
    return None


def _read_options(container: _Container, words: Sequence[str]) -> Sequence[str]:
    """Read docker's options, and return the words from the image on."""
    at = 0
    while at < len(words) and words[at].startswith("-"):
        flag, equals, value = words[at].partition("=")
        at += 1
        if not flag.startswith("--"):
            flag, value = flag[:2], words[at - 1][2:].removeprefix("=")
            if flag[1:] in _SHORT_SWITCHES:
                container.forgotten.append(words[at - 1])
                continue
            flag, equals = _LONG.get(flag, flag), value
        if flag in _SWITCHES:
            container.forgotten.append(flag)
            continue
        if not equals and at < len(words):
            value, at = words[at], at + 1
        _option(container, flag.removeprefix("--").replace("-", "_"), value, f"{flag} {value}")
    return words[at:]


def _option(container: _Container, name: str, value: str, what: str) -> None:
    """Take one option of docker's, or one key of compose's with a plain value."""
    name = _ALIASES.get(name, name)
    if name == "env":
        variable, equals, text = value.partition("=")
        if equals:
            container.env[variable] = text
        else:
            container.remarks.append(
                Remark("engine.env", variable, "came from the caller's environment: add its value")
            )
    elif name == "volume":
        _volume(container, value)
    elif name == "publish":
        _publish(container, value)
    elif name == "gpus":
        container.devices = _gpus(container, value)
    elif name in ("name", "container_name"):
        container.name = value
    elif name == "entrypoint":
        container.entrypoint = tuple(value.split())
    elif name == "network" and value == "host":
        container.is_on_host_network = True
    elif name in _REASONS:
        container.remarks.append(Remark("engine.env" if name == "env_file" else "", readable(what), _REASONS[name]))
    else:
        container.forgotten.append(readable(what))


def _volume(container: _Container, text: str) -> None:
    if "=" in text:  # --mount type=bind,source=/a,target=/b
        parts = dict(part.partition("=")[::2] for part in text.split(","))
        source = parts.get("source", parts.get("src", ""))
        target = parts.get("target", parts.get("destination", parts.get("dst", "")))
    else:
        source, _, target = text.partition(":")
        target = target.partition(":")[0]
    if source.startswith(("/", ".", "~")) and target:
        container.mounts.append((target.rstrip("/"), source.rstrip("/")))
    else:
        why = "a volume of the container runtime: copy its files to a folder that the user llm-serve can read"
        container.remarks.append(Remark("", f"volume {readable(text)}", why))


def _publish(container: _Container, text: str) -> None:
    inside = text.rpartition(":")[2].partition("/")[0]
    address, _, port = text.rpartition(":")[0].rpartition(":")
    if re.fullmatch(r"[0-9]{1,5}", inside) and re.fullmatch(r"[0-9]{1,5}", port or inside):
        container.published[int(inside)] = f"{address or '0.0.0.0'}:{port or inside}"  # noqa: S104 - what docker means
    else:
        container.remarks.append(Remark("server", f"port {readable(text)}", "one instance listens on one port"))


def _gpus(container: _Container, value: str) -> tuple[int, ...] | None:
    """Return the indices that docker's --gpus names; None for all of them."""
    text = value.strip("\"'")
    if re.fullmatch(r"[0-9]{1,2}", text):
        return tuple(range(int(text)))
    if text == "all":
        return None
    named = re.fullmatch(r"device=(.+)", text) or re.fullmatch(r"([0-9]{1,2}(?:,[0-9]{1,2})+)", text)
    listed = named.group(1).split(",") if named else [text]
    if named and all(re.fullmatch(r"[0-9]{1,2}", each) for each in listed):
        return tuple(map(int, listed))
    why = "devices are named by their index here: `nvidia-smi -L` lists index and UUID"
    container.remarks.append(Remark("gpu", f"--gpus {readable(value)}", why))
    return None


def compose_launch(text: Mapping[str, Any], service: str | None, variables: Mapping[str, str]) -> Launch:
    """Return the launch of one service of a compose file, or of a service that stands alone. Raises NotImportable."""
    services = text.get("services", text)
    if "image" in text or "command" in text:
        services = {"": text}
    if not isinstance(services, Mapping):
        raise NotImportable("services is no table of services")
    if service is not None and service not in services:
        raise NotImportable(f"there is no service {service}: {', '.join(map(str, services))}")
    names = [service] if service is not None else list(services)
    found: dict[str, Launch] = {}
    for name in names:
        if isinstance(services[name], Mapping):
            launch = _as_launch(_read_service(str(name), services[name], variables))
            found |= {str(name): launch} if launch is not None else {}
    if not found:
        raise NotImportable(f"no service starts vLLM (services: {', '.join(map(str, names))})")
    if len(found) > 1:
        raise NotImportable(f"several services start vLLM: give one of them, --service {' or --service '.join(found)}")
    return next(iter(found.values()))


def _read_service(name: str, service: Mapping[str, Any], variables: Mapping[str, str]) -> _Container:
    def text(value: Any) -> str:
        return interpolated(value if isinstance(value, str) else _scalar(value), variables)

    def words(value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            # The list that a shell would make of it; variables are compose's, and filled in before.
            return tuple(word for each in commands(text(value), {}) for word in each.words)
        if isinstance(value, Mapping):
            raise NotImportable(f"service {name}: a command is text or a list")
        return tuple(map(text, value)) if isinstance(value, list) else ()

    container = _Container(image=text(service.get("image", "")), name=name)
    container.command, container.entrypoint = words(service.get("command")), words(service.get("entrypoint"))
    for key, value in service.items():
        if key in ("image", "command", "entrypoint"):
            continue
        if key == "deploy":
            _deploy(container, value)
        elif key == "environment" and isinstance(value, Mapping):
            for variable, given in value.items():
                _option(container, key, str(variable) if given is None else f"{variable}={text(given)}", "")
        elif key in ("ports", "volumes", "environment") and isinstance(value, Sequence) and not isinstance(value, str):
            for item in value:
                _option(container, key.removesuffix("s") if key == "volumes" else key, _item(item, text), "")
        else:
            written = text(value) if not isinstance(value, Mapping | list) else "..."
            _option(container, key, written, f"{key}: {written}")
    return container


def _scalar(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _item(item: Any, text: Any) -> str:
    """Return a port or a volume in its short form."""
    if not isinstance(item, Mapping):
        return str(text(item))
    if "published" in item or ("target" in item and "source" not in item):
        address = f"{text(item['host_ip'])}:" if "host_ip" in item else ""
        return f"{address}{text(item.get('published', item.get('target')))}:{text(item.get('target'))}"
    return f"{text(item.get('source', ''))}:{text(item.get('target', ''))}"


def _deploy(container: _Container, deploy: Any) -> None:
    """Read deploy.resources.reservations.devices, where compose names GPUs."""
    if isinstance(deploy, Mapping):
        container.forgotten += [f"deploy.{key}: ..." for key in deploy if key != "resources"]
    if _within(deploy, "resources", "limits"):
        container.remarks.append(Remark("", "deploy.resources.limits", _REASONS["memory"]))
    for device in _listed(_within(deploy, "resources", "reservations", "devices")):
        ids, count = _listed(_within(device, "device_ids")), _within(device, "count")
        if "gpu" not in _listed(_within(device, "capabilities")):
            continue
        if ids:
            container.devices = _gpus(container, f"device={','.join(map(str, ids))}")
        elif count is not None:
            container.devices = _gpus(container, str(count))


def _within(value: Any, *keys: str) -> Any:
    """Return what a path of keys leads to; None where it leads nowhere."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _as_launch(container: _Container) -> Launch | None:
    words = container.entrypoint + container.command
    launch = next(plain_launches(Command(words, {}, 1)), None)
    if launch is None:
        # The image's own entrypoint is vLLM's server, and takes its words.
        is_other = bool(words) and words[0].rpartition("/")[2] in _OTHER_PROGRAMS
        if "vllm" not in container.image or container.entrypoint or is_other:
            return None
        launch = Launch(words)
    return replace(
        launch,
        env={**_visible(container), **launch.env},
        remarks=(*_remarks(container), *launch.remarks),
        name=container.name,
        devices=_devices(container),
        mounts=tuple(container.mounts),
        published=None if container.is_on_host_network else container.published,
    )


def _visible(container: _Container) -> dict[str, str]:
    return {name: value for name, value in container.env.items() if name != "NVIDIA_VISIBLE_DEVICES"}


def _devices(container: _Container) -> tuple[int, ...] | None:
    """The GPUs that the container sees, also where NVIDIA_VISIBLE_DEVICES names them."""
    named = container.env.get("NVIDIA_VISIBLE_DEVICES", "")
    if container.devices is None and re.fullmatch(r"[0-9]{1,2}(,[0-9]{1,2})*", named):
        return tuple(map(int, named.split(",")))
    return container.devices


def _remarks(container: _Container) -> Iterator[Remark]:
    if container.image:
        yield Remark("", f"image {readable(container.image)}", "llm-serve has the vLLM that is installed with it")
    yield from container.remarks
    for target, source in container.mounts:
        if target.endswith(("/.cache/huggingface", "/.cache/huggingface/hub")):
            why = "models of the service are in /var/cache/llm-serve/huggingface/hub: move them there, or set HF_HOME"
        else:
            why = (
                "there is no container: options have the host's paths now; the user llm-serve must be able to read them"
            )
        yield Remark("", f"volume {readable(source)}:{target}", why)
    if container.forgotten:
        yield Remark("", " ".join(container.forgotten), "says how a container runs; there is none")
