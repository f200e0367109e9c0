"""Finds the one command among many that starts vLLM, and says what the words around it were for.

A launch is what a start script, a docker run line and a compose service have in common: vLLM's own words, the
environment, and what the machine gave it (GPUs, ports, folders). What has no place in an instance file becomes
a remark.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from llm_serve.core.shell import Command, ShellError, commands, readable


class NotImportable(ValueError):  # noqa: N818 - a fact about the input, for whoever gave it
    """The text cannot become an instance file; the message says why, on one line."""


@dataclass(frozen=True, slots=True)
class Remark:
    """What could not be carried over as it was: a comment of the file."""

    table: str
    """The table under which it stands: "server", "engine", "engine.env", "gpu", or "" for the top of the file."""
    what: str
    """As it was written, without secrets."""
    why: str
    """Why it is not there, and what to do instead."""
    lines: tuple[str, ...] = ()
    """Lines to copy: of this file, or of a drop-in of the unit."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How vLLM was started."""

    args: tuple[str, ...]
    """vLLM's own words, after `serve`."""
    env: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()
    name: str = ""
    """What the container or service was called."""
    devices: tuple[int, ...] | None = None
    """The GPUs that a container was given."""
    mounts: tuple[tuple[str, str], ...] = ()
    """(folder in the container, folder of the host)"""
    published: Mapping[int, str] | None = None
    """Port in the container -> address and port of the host; None outside of containers."""

    def under(self, env: Mapping[str, str], remarks: Iterable[Remark] = ()) -> Launch:
        """The same launch in an environment, with what there was to say before."""
        return replace(self, env={**env, **self.env}, remarks=(*remarks, *self.remarks))


_MODULES = frozenset({"vllm.entrypoints.openai.api_server", "vllm.entrypoints.cli.main"})
_SPEAKERS = frozenset({"cat", "echo", "grep", "kill", "man", "pgrep", "pip", "pkill", "printf", "ps", "which"})
"""Programs that say or look for `vllm serve`, and do not start it."""
_NESTED = 3


def plain_launches(command: Command) -> Iterator[Launch]:
    """Yield the launches of vLLM that a command is, or that stand in its words as text (`bash -c '...'`)."""
    yield from _in_command(command, _NESTED)


def _in_command(command: Command, depth: int) -> Iterator[Launch]:
    words = command.words
    if not words or _program(words[0]) in _SPEAKERS:
        return
    if (split := _split(words)) is not None:
        before, args = split
        env, remarks = _wrappers(before)
        yield Launch(args, env, tuple(remarks)).under(command.env)
    else:
        yield from _in_text(command, depth)


def _in_text(command: Command, depth: int) -> Iterator[Launch]:
    for index, word in enumerate(command.words):
        if not depth or "vllm" not in word or not re.search(r"\s", word):
            continue
        env, remarks = _wrappers(command.words[:index])
        try:
            inner = commands(readable(word), {})
        except ShellError:
            continue
        for each in inner:
            for launch in _in_command(each, depth - 1):
                yield launch.under({**command.env, **env}, remarks)


def _split(words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return the words before vLLM's command and those after it; None where it is not vLLM's server."""
    for index, (word, following) in enumerate(zip(words, (*words[1:], ""), strict=True)):
        if _program(word) == "vllm" and following == "serve":
            return words[:index], words[index + 2 :]
        if word == "-m" and following in _MODULES:
            rest = words[index + 2 :]
            return words[: max(index - 1, 0)], rest[1:] if rest[:1] == ("serve",) else rest
    return None


def _program(word: str) -> str:
    return word.rpartition("/")[2]


_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_RUNS_ON = "systemd keeps it running, and its output goes to the journal"
_OTHER_PLACE = "llm-serve has an environment of its own"
_WRAPPERS = {
    "chrt": "a drop-in of the unit sets it (CPUSchedulingPolicy=)",
    "conda": _OTHER_PLACE,
    "env": "",
    "exec": "",
    "ionice": "a drop-in of the unit sets it (IOSchedulingClass=)",
    "nice": "a drop-in of the unit sets it (Nice=)",
    "nohup": _RUNS_ON,
    "numactl": "llm-serve does not bind; `systemctl edit llm-serve@{name}` does it with these lines:",
    "poetry": _OTHER_PLACE,
    "screen": _RUNS_ON,
    "setsid": _RUNS_ON,
    "stdbuf": _RUNS_ON,
    "sudo": "the unit runs as the user llm-serve",
    "taskset": "llm-serve does not bind; `systemctl edit llm-serve@{name}` does it with these lines:",
    "time": "",
    "timeout": "a service has no end; recovery.start_timeout_s ends a start that takes too long",
    "tmux": _RUNS_ON,
    "uv": _OTHER_PLACE,
}


def _wrappers(words: tuple[str, ...]) -> tuple[dict[str, str], list[Remark]]:
    """Return the variables that stand in front of a command, and what else stands there."""
    env: dict[str, str] = {}
    groups: list[list[str]] = []
    for word in words:
        if found := _ASSIGNMENT.fullmatch(word):
            env[found.group(1)] = found.group(2)
        elif _program(word) in _WRAPPERS or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return env, [remark for group in groups if (remark := _wrapper(group)) is not None]


def _wrapper(group: list[str]) -> Remark | None:
    name, what = _program(group[0]), readable(" ".join(group))
    why = _WRAPPERS.get(name, "llm-serve starts vLLM itself, without it")
    if not why:
        return None
    lines = {"numactl": _numactl, "taskset": _taskset}.get(name, lambda _: ())(group[1:])
    return Remark("", what, why if lines or ":" not in why else "a drop-in of the unit sets it (CPUAffinity=)", lines)


_NUMACTL = {
    "-C": "physcpubind",
    "-N": "cpunodebind",
    "-i": "interleave",
    "-l": "localalloc",
    "-m": "membind",
    "-p": "preferred",
}
_POLICIES = {"membind": "bind", "interleave": "interleave", "preferred": "preferred", "localalloc": "local"}


def _numactl(options: list[str]) -> tuple[str, ...]:
    """Return what a unit says for numactl's options."""
    given: dict[str, str] = {}
    last = ""
    for option in options:
        if not option.startswith("-"):
            given[last] = option
            continue
        flag, _, value = option.partition("=")
        last = flag.removeprefix("--") if flag.startswith("--") else _NUMACTL.get(flag[:2], flag)
        given[last] = value or (flag[2:] if not flag.startswith("--") else "")
    lines = []
    for name in [name for name in given if name in _POLICIES]:
        lines.append(f"NUMAPolicy={_POLICIES[name]}")
        lines += [f"NUMAMask={given[name]}"] if given[name] else []
    if "physcpubind" in given:
        lines.append(f"CPUAffinity={given['physcpubind']}")
    elif "cpunodebind" in given:
        # `numa` means the CPUs of NUMAMask=.
        same = given["cpunodebind"] == given.get("membind")
        lines.append(
            "CPUAffinity=numa" if same else f"# CPUAffinity= the CPUs of node {given['cpunodebind']}, see lscpu"
        )
    return ("[Service]", *lines) if lines else ()


def _taskset(options: list[str]) -> tuple[str, ...]:
    cpus = [option for option in options if re.fullmatch(r"[\d,-]+", option) and option[0].isdigit()]
    is_list = any(re.fullmatch(r"-\w*c|--cpu-list", option) for option in options)
    return ("[Service]", f"CPUAffinity={cpus[0]}") if is_list and cpus else ()
