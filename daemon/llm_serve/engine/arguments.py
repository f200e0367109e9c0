"""Turns a plan into vLLM's own validated arguments, and vLLM's refusals into problems with a line.

vLLM's parser is the only list of its options that is never out of date, so it is asked, not copied. It was
made for a command line: it knows one error at a time and ends the process on it. Here each option is tried
alone first, so that all the wrong ones are named at once, and then all of them together.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm_serve.core import graph_sizes
from llm_serve.core.instance_file import nearest
from llm_serve.core.plan import HIDDEN, SECRET_NAME, EnginePlan
from llm_serve.engine import numa
from llm_serve.engine.refusals import Report, plain, shown
from llm_serve.engine.weights import check_tokenizer, check_weights, looks_like_path

__all__ = [
    "check_model",
    "check_weights",
    "effective_arguments",
    "engine_config",
    "model_is_at_hand",
    "parse_plan",
]

_LISTEN = "Set server.listen"
_TLS = "Put a TLS proxy in front of server.listen"
_LOG = "Set level and format under [log]"
_PRIVACY = "Prompts and answers are never logged"
_ROUTES = "llm-serve mounts the OpenAI routes, see server.anthropic_messages for the others"

OWNED: Mapping[str, str] = {
    "aggregate_engine_logging": _LOG,
    "api_key": "Set server.api_keys",
    "api_server_count": "Set server.front_ends",
    "config": "This file is the configuration; write its options under [engine]",
    "data_parallel_supervisor_port": _LISTEN,
    "device_ids": "Set gpu.devices",
    "disable_access_log_for_endpoints": _LOG,
    "disable_log_stats": "Hangs are found by the engine's statistics, so they stay on",
    "disable_uvicorn_access_log": _LOG,
    "dp_supervisor_probe_failure_threshold": "llm-serve watches the engine itself",
    "dp_supervisor_probe_interval_s": "llm-serve watches the engine itself",
    "dp_supervisor_probe_timeout_s": "llm-serve watches the engine itself",
    "enable_log_deltas": _PRIVACY,
    "enable_log_outputs": _PRIVACY,
    "enable_log_requests": _PRIVACY,
    "enable_offline_docs": _ROUTES,
    "enable_request_id_headers": "Every response has x-request-id already",
    "enable_scale_out": _ROUTES,
    "enable_ssl_refresh": _TLS,
    "enable_tokenizer_info_endpoint": _ROUTES,
    "grpc": _LISTEN,
    "grpc_port": _LISTEN,
    "headless": "An engine without a server is not what llm-serve runs",
    "host": _LISTEN,
    "log_config_file": _LOG,
    "log_level": _LOG,
    "logging_config": _LOG,
    "max_log_len": _PRIVACY,
    "middleware": "Foreign code in the server's process is not supported: put a proxy in front",
    "model": "Set model at the top of the file",
    "model_tag": "Set model at the top of the file",
    "port": _LISTEN,
    "ssl_ca_certs": _TLS,
    "ssl_cert_reqs": _TLS,
    "ssl_certfile": _TLS,
    "ssl_ciphers": _TLS,
    "ssl_keyfile": _TLS,
    "tokens_only": _ROUTES,
    "uds": 'Set server.listen = "unix:/path"',
    "uvicorn_log_level": _LOG,
}
"""vLLM's options that are llm-serve's business, and where that business is done."""


class _Refused(Exception):  # noqa: N818 - argparse's no, turned into a problem here
    """vLLM's parser says no; the text is argparse's."""


@lru_cache(maxsize=1)
def _parser() -> Any:
    """Return vLLM's own parser, which takes half a second to make."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class RaisingParser(FlexibleArgumentParser):  # type: ignore[misc]  # Any at vLLM's border
        """argparse would end the process."""

        def error(self, message: str) -> Any:
            raise _Refused(message)

    return make_arg_parser(RaisingParser(prog="llm-serve"))


@lru_cache(maxsize=1)
def known_options() -> dict[str, argparse.Action]:
    """Every option that a file may write, by the name it has there."""
    options: dict[str, argparse.Action] = {}
    for action in _parser()._actions:  # noqa: SLF001 - argparse has no public list of its options
        for flag in action.option_strings:
            negated = isinstance(action, argparse.BooleanOptionalAction) and flag.startswith("--no-")
            if flag.startswith("--") and not negated and action.dest != "help":
                options[flag.removeprefix("--").replace("-", "_")] = action
    return options


def _report(source: str, text: str | None) -> Report:
    return Report(source, text, known_options().keys())


def parse_plan(plan: EnginePlan, *, source: str, text: str | None = None) -> argparse.Namespace:
    """Return the plan as the namespace that vLLM's own server would have, or raise ConfigError.

    `source` and `text` are the file the plan came from: they put a name and a line into the message.
    """
    report = _report(source, text)
    for name, value in plan.arguments.items():
        for message, hint in option_problems(name, value):
            report.add(f"engine.{name}", message, hint)
    report.raise_if_any()
    argv = [f"--model={plan.model}"]
    for name, value in plan.arguments.items():
        argv += _as_argv(name, value, known_options()[name])
    with report.refusals():
        return _parse_together(argv)


def _parse_together(argv: list[str]) -> argparse.Namespace:
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    namespace: argparse.Namespace = _parser().parse_args(argv)
    validate_parsed_serve_args(namespace)
    _check_output_parsers(namespace)
    return namespace


def unknown_name(option: str, value: object) -> tuple[str, str | None] | None:
    """Return (message, hint) when vLLM does not know a name that it looks up only when an engine is made."""
    known = _names(option) if isinstance(value, str) and option in _NAMED else None
    if known is None or str(value) in known or (option == "attention_backend" and str(value).upper() in known):
        return None
    match = nearest(str(value), tuple(known))
    return f"vLLM has no {value}", f"Did you mean {match}?" if match else f"It has {', '.join(sorted(known))}"


_NAMED = frozenset({"attention_backend", "load_format", "quantization"})


def _names(option: str) -> Collection[str]:
    from vllm.model_executor import model_loader
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()  # they add names
    known: dict[str, Collection[str]] = {
        "attention_backend": ("AUTO", *AttentionBackendEnum.__members__),
        "load_format": model_loader._LOAD_FORMAT_TO_MODEL_LOADER,  # noqa: SLF001 - vLLM has no public list of them
        "quantization": QUANTIZATION_METHODS,
    }
    return known[option]


def _check_output_parsers(namespace: argparse.Namespace) -> None:
    """Refuse parsers that vLLM does not know: it looks for them long after the engine has started."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    looked_up = (
        ("tool_call_parser", "tool_parser_plugin", ToolParserManager),
        ("reasoning_parser", "reasoning_parser_plugin", ReasoningParserManager),
    )
    for option, plugin, registry in looked_up:
        name, known = getattr(namespace, option), sorted(registry.list_registered())
        if name and name not in known and not getattr(namespace, plugin):
            match = nearest(name, tuple(known))
            meant = f": did you mean {match}?" if match else f" as one of {', '.join(known)}"
            raise ValueError(f"{option} {shown(name)} is not known to vLLM{meant}")


def option_problems(name: str, value: object) -> Iterator[tuple[str, str | None]]:
    """Yield (message, hint) for what is wrong with one option, taken alone."""
    options = known_options()
    if name in OWNED:
        yield "is not an engine option here", OWNED[name]
    elif name not in options:
        yield "unknown option", _hint_for_unknown(name, value)
    else:
        action = options[name]
        try:
            _check_shape(value, action)
            _parser().parse_args(_as_argv(name, value, action))
        except _Refused as error:
            yield _in_words(str(error), value, action), _nearest_choice(value, action)
        except Exception as error:  # noqa: BLE001 - each option has its own converter, and none a promise
            yield plain(str(error)), None
        else:
            if (unknown := unknown_name(name, value)) is not None:
                yield unknown


def _hint_for_unknown(name: str, value: object) -> str | None:
    positive = name.removeprefix("no_")
    if positive != name and positive in known_options():
        return f"Set {positive} = {'false' if value is True else 'true'}"
    for action in known_options().values():
        if f"-{name}" in action.option_strings:
            return f"Did you mean {action.dest}?"
    match = nearest(name, tuple(known_options()))
    return f"Did you mean {match}?" if match else "See the list of engine arguments in vLLM's manual"


def _check_shape(value: object, action: argparse.Action) -> None:
    """Refuse a value of the wrong shape: argparse sees text only, and no `true`."""
    is_switch = action.nargs == 0
    if is_switch and not isinstance(value, bool):
        raise _Refused(f"must be true or false, not {shown(value)}")
    if isinstance(value, bool) and not is_switch and action.nargs != "?":
        raise _Refused(f"takes a value, not {shown(value)}")
    elements = value if isinstance(value, list | tuple) else ()
    if any(isinstance(element, str) and element.startswith("-") for element in elements):
        raise _Refused("must not have an element that begins with -")


def _as_argv(name: str, value: object, action: argparse.Action) -> list[str]:
    """Return the words that a command line would have for this option."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        if value:
            return [flag]
        has_negative = isinstance(action, argparse.BooleanOptionalAction)
        return ["--no-" + flag.removeprefix("--")] if has_negative else []
    if isinstance(value, list | tuple) and action.nargs in ("+", "*"):
        if len(value) != 1:
            return [flag, *map(_as_word, value)]
        value = value[0]
    # With `=`, a value that begins with - stays a value.
    return [f"{flag}={_as_word(value)}"]


def _as_word(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | list | tuple | bool) else str(value)


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "loads": "a table or list",
    "human_readable_int": "a whole number, also as 16k or 1M",
    "human_readable_int_or_auto": 'a whole number, also as 16k or 1M, or "auto"',
}


def _in_words(message: str, value: object, action: argparse.Action) -> str:
    """Return argparse's message as a person would say it, in the names of the file."""
    if "invalid choice" in message and action.choices is not None:
        return f"must be one of {', '.join(map(str, action.choices))}, not {shown(value)}"
    invalid = re.search(r"invalid (\w+) value", message)
    if invalid and invalid.group(1) in _KINDS:
        return f"must be {_KINDS[invalid.group(1)]}, not {shown(value)}"
    return plain(re.sub(r"^argument [^:]+: ", "", message))


def _nearest_choice(value: object, action: argparse.Action) -> str | None:
    choices = [str(choice) for choice in action.choices or ()]
    matches = get_close_matches(str(value).lower(), choices, n=1, cutoff=0.5)
    return f"Did you mean {matches[0]}?" if matches else None


def engine_config(namespace: argparse.Namespace, *, source: str = "", text: str | None = None) -> tuple[Any, Any]:
    """Return (AsyncEngineArgs, VllmConfig) of a parsed plan, or raise ConfigError or HostError.

    HostError means that the same arguments may be right later or elsewhere: no device, no network.
    """
    report = _report(source, text)
    _check_model_exists(namespace.model, report)
    are_graphs_named = _names_graph_sizes(namespace)  # afterwards vLLM has filled them in
    with report.refusals():
        created = _create(namespace)
        numa.check(created[1].parallel_config)
        if not are_graphs_named:
            _thin_graphs(created[1])
        return created


def _names_graph_sizes(namespace: argparse.Namespace) -> bool:
    """True where the file says which CUDA graphs it wants, under either of the names that vLLM has for it."""
    names = ("cudagraph_capture_sizes", "max_cudagraph_capture_size")
    return any(
        getattr(where, name, None) is not None for where in (namespace, namespace.compilation_config) for name in names
    )


def _thin_graphs(config: Any) -> None:
    """Leave out CUDA graphs whose capture costs more than they bring. Not where sizes follow from speculation."""
    sizes = config.compilation_config.cudagraph_capture_sizes
    if sizes and config.speculative_config is None:
        needed = (config.scheduler_config.max_num_seqs,)
        config.compilation_config.cudagraph_capture_sizes = graph_sizes.sparse(sizes, needed)


def _create(namespace: argparse.Namespace) -> tuple[Any, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
    from vllm.usage.usage_lib import UsageContext

    engine_args = AsyncEngineArgs.from_cli_args(namespace)
    propagate_flash_late_interaction(namespace, engine_args)
    return engine_args, engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)


def _check_model_exists(model: str, report: Report) -> None:
    """Refuse a folder that is not there: vLLM takes it for a hub id, and complains about its spelling."""
    folder = Path(model).expanduser()
    if looks_like_path(model) and not folder.exists():
        report.add("model", f"{folder} does not exist", "Give a folder with the model's files, or a hub id")
    elif folder.is_dir() and not (folder / "config.json").exists() and not any(folder.glob("params.json")):
        report.add("model", f"{folder} has no config.json", "Download the model's files into it")
    elif not folder.exists() and _is_offline() and not model_is_at_hand(model):
        report.add("model", f"{model} is not in the local cache, and downloads are off", "Unset HF_HUB_OFFLINE once")
    report.raise_if_any()


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def model_is_at_hand(model: str) -> bool:
    """True when the model's config can be read without a network."""
    if Path(model).expanduser().exists():
        return True
    if looks_like_path(model):
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:
        return False


def check_model(namespace: argparse.Namespace, *, source: str = "", text: str | None = None) -> None:
    """Raise ConfigError when the model is a local folder whose weights or tokenizer cannot be right."""
    model = Path(namespace.model).expanduser()
    if not model.is_dir():
        return
    # Dummy weights are made up, and the other loaders have formats of their own.
    if namespace.load_format in ("auto", "hf", "safetensors", "pt"):
        check_weights(str(model), source=source, text=text)
    own_tokenizer = namespace.tokenizer is None and namespace.tokenizer_mode == "auto"
    if own_tokenizer and not namespace.skip_tokenizer_init:
        check_tokenizer(str(model), source=source, text=text)


def effective_arguments(namespace: argparse.Namespace, vllm_config: Any = None) -> dict[str, object]:
    """Return what differs from vLLM's defaults, and with a VllmConfig also the limits that really hold."""
    parser = _parser()
    changed = {
        name: HIDDEN if SECRET_NAME.search(name) and isinstance(value, str) else _json_value(value)
        for name, value in vars(namespace).items()
        if name != "model_tag" and value != parser.get_default(name)
    }
    if vllm_config is not None:
        changed["max_model_len"] = vllm_config.model_config.max_model_len
        changed["max_num_seqs"] = vllm_config.scheduler_config.max_num_seqs
        changed["gpu_memory_utilization"] = vllm_config.cache_config.gpu_memory_utilization
    return changed


def _json_value(value: Any) -> object:
    """Return a value as JSON would have it; of a dataclass only what differs from its defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        given = {field.name: getattr(value, field.name) for field in fields(value) if field.repr}
        usual = _defaults_of(type(value))
        return {name: _json_value(inner) for name, inner in given.items() if name not in usual or inner != usual[name]}
    if isinstance(value, Enum):
        return _json_value(value.value)
    if isinstance(value, dict):
        return {str(key): _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_json_value(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _defaults_of(kind: type) -> dict[str, Any]:
    """Return the attributes of a dataclass made without arguments; none when it cannot be."""
    try:
        return dict(vars(kind()))
    except TypeError:
        return {}
