"""What a changed file asks of an instance that serves: nothing, other numbers, another engine, or a restart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llm_serve.core.devices import COUNTED
from llm_serve.core.plan import EnginePlan
from llm_serve.core.settings import TABLES, Settings

OF_THE_PROCESS = frozenset(
    {
        *("model", "log.level", "log.format", "server.listen", "server.anthropic_messages", "server.front_ends"),
        "server.allow_env",
        *("server.header_timeout_s", "server.body_timeout_s", "server.write_timeout_s", "server.stream_keep_alive_s"),
        *("server.max_connections", "server.max_connections_per_client"),
        *("gpu.devices", "gpu.wait_timeout_s", "network.engine"),
    }
)
"""Options that are used once, when the process starts; no stream begun with one model can be ended by another."""

OF_THE_APPLICATION = frozenset(
    f"engine.{name}"
    for name in (
        *("allow_credentials", "allowed_headers", "allowed_methods", "allowed_origins", "disable_fastapi_docs"),
        *("enable_offline_docs", "enable_request_id_headers", "middleware", "root_path"),
    )
)
"""vLLM's arguments that its HTTP application is built with, once."""

OF_THE_MODEL = frozenset(
    f"engine.{name}"
    for name in (
        *("code_revision", "convert", "hf_config_path", "hf_overrides", "revision", "runner", "skip_tokenizer_init"),
        *("tokenizer", "tokenizer_mode", "tokenizer_revision"),
    )
)
"""vLLM's arguments that make another model of the same name."""

OF_THE_GPUS = frozenset(f"engine.{name}" for name in COUNTED)
"""vLLM's arguments that decide which GPUs are watched and waited for, which is settled once."""

_NEEDS_RESTART = OF_THE_PROCESS | OF_THE_APPLICATION | OF_THE_MODEL | OF_THE_GPUS
_ENVIRONMENT = "engine.env."
"""Much of it is read when the process starts."""


@dataclass(frozen=True, slots=True)
class Change:
    """What differs between the file that counts and the one that was read."""

    options: tuple[str, ...]
    """Dotted names of everything that differs, in order."""
    restart: tuple[str, ...]
    """Those of them that a running process cannot change."""
    needs_engine: bool
    """True when the engine would be built with another plan."""


def compare(old: Settings, new: Settings) -> Change:
    """Return what has changed from `old` to `new`."""
    before, after = dict(_options(old)), dict(_options(new))
    options = tuple(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))
    restart = tuple(name for name in options if _needs_restart(name))
    return Change(options, restart, EnginePlan.from_settings(old) != EnginePlan.from_settings(new))


def _needs_restart(name: str) -> bool:
    return name in _NEEDS_RESTART or name.startswith(_ENVIRONMENT)


def _options(settings: Settings) -> Iterator[tuple[str, object]]:
    """Every option by its dotted name, as the file has it."""
    yield "model", settings.model
    for table in TABLES:
        for name, value in getattr(settings, table).model_dump().items():
            yield f"{table}.{name}", value
    for name, value in settings.engine.items():
        yield f"engine.{name}", value
    for name, text in settings.engine_env.items():
        yield f"engine.env.{name}", text
