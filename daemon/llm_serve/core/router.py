"""The router's file as values, and the command line of vllm-router that does what it says.

vllm-router counts instances as equals, asks each once a second whether it serves, and sends a request that got no
answer to another. What is chosen here was measured with vllm-router 0.1.17.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, count, takewhile
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from llm_serve.core.errors import ConfigError, Problem
from llm_serve.core.instance_file import in_words, load_toml, nearest
from llm_serve.core.settings import Listen, Settings, Table, as_tuple, parse_listen
from llm_serve.core.toml_lines import locate_within, normalised

_FIRST_PAUSE_MS, _LONGEST_PAUSE_MS = 100, 2000
_YEAR_S = 365 * 86_400
_FRONT = "vllm-router lets everyone who reaches it add instances: put a proxy before it that passes /v1/ only"


class RouterSettings(Table):
    """`/etc/llm-serve/router.toml`: one address for several instances that serve the same model."""

    listen: str = "127.0.0.1:30000"
    """host:port on loopback."""
    instances: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(min_length=1)
    """Names of instances of this machine, and http(s):// addresses of others."""
    policy: Literal["round_robin", "random", "cache_aware", "consistent_hash"] = "round_robin"
    """Who gets a request: each in turn, any, the one that knows its beginning, or always the same for one user."""
    wait_s: float = Field(default=30, ge=0, le=3600, allow_inf_nan=False)
    """How long a request is offered again while no instance serves, or while all refuse it."""
    metrics: str = "127.0.0.1:29000"
    """host:port of vllm-router's own metrics, on loopback."""

    @field_validator("listen", "metrics")
    @classmethod
    def _is_loopback(cls, value: str) -> str:
        listen = parse_listen(value)
        if listen.path is not None:
            raise ValueError("must be host:port: vllm-router cannot listen on a unix socket")
        if not listen.is_loopback:
            raise ValueError(f"{value} can be reached from other machines. {_FRONT}")
        return value

    @field_validator("instances")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := next((each for each in value if value.count(each) > 1), None):
            raise ValueError(f"names {twice} twice")
        return value

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        """Return what `text` means, or raise ConfigError with all that is wrong with it."""
        values = {normalised(key): value for key, value in load_toml(text, source).items()}
        known = tuple(cls.model_fields)
        problems = [
            _problem(source, text, key, "unknown option", (meant := nearest(key, known)) and f"Did you mean {meant}?")
            for key in values
            if key not in known
        ]
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            problems += [_problem(source, text, path, message) for path, message in in_words(error)]
            raise ConfigError(sorted(problems, key=lambda problem: problem.line or 0)) from None
        return settings


def _problem(source: str, text: str, path: str, message: str, hint: str | None = None) -> Problem:
    return Problem(source, locate_within(text, path), path, message, hint)


def is_address(instance: str) -> bool:
    """True for the address of an instance, false for a name."""
    return "://" in instance


def address_problem(address: str) -> str | None:
    """What is wrong with the address of an instance, or None."""
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError as error:
        return f"{address} is not an address: {error}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"{address} is not an address: it must begin with http:// or https:// and name a host"
    if parts.username or parts.path.strip("/") or parts.query or parts.fragment:
        return f"{address} must be a host and a port alone: {parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return None


def is_elsewhere(address: str) -> bool:
    """True when it is another machine's."""
    return not Listen(host=urlsplit(address).hostname).is_loopback


def url_of(instance: Settings) -> str:
    """How the router reaches an instance of this machine. Raises ValueError with why it cannot."""
    listen = instance.server.listen_on
    if listen.path is not None:
        raise ValueError(f"{instance.name} listens on {listen}: vllm-router needs a host and a port (server.listen)")
    if not listen.port:
        raise ValueError(f"{instance.name} listens on another port at each start: name one in server.listen")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen.host or "", listen.host)  # noqa: S104 - reached, not listened on
    return f"http://{Listen(host=host, port=listen.port)}"


def model_name(instance: Settings) -> str:
    """The name by which clients ask for its model."""
    names = instance.engine.get("served_model_name") or instance.model
    return str(names[0] if isinstance(names, list) else names)


def arguments(settings: RouterSettings, urls: tuple[str, ...]) -> Iterator[str]:
    """The words after `vllm-router`."""
    listen, metrics = parse_listen(settings.listen), parse_listen(settings.metrics)
    yield from ("--host", str(listen.host), "--port", str(listen.port))
    yield from ("--prometheus-host", str(metrics.host), "--prometheus-port", str(metrics.port))
    yield from ("--policy", settings.policy, "--worker-urls", *urls)
    # It waits for the first instance, however long that loads; by default it looks every 30 s, and ends after 10 min.
    yield from ("--worker-startup-check-interval", "1", "--worker-startup-timeout-secs", str(_YEAR_S))
    # An instance that recovers says so at once, and holds what it is sent: the fewer it gets, the fewer wait.
    yield from ("--health-check-endpoint", "/readyz", "--health-check-interval-secs", "1")
    yield from (
        "--health-check-timeout-secs",
        "1",
        "--health-failure-threshold",
        "1",
        "--health-success-threshold",
        "1",
    )
    # By default five refusals, of a full queue for one, close an instance for a minute that says it serves.
    yield "--disable-circuit-breaker"
    # Only what has no answer yet is sent again: a refused connection, 408, 429 and 5xx. Never an answer that has begun.
    yield from ("--retry-max-retries", str(_tries(settings.wait_s)), "--retry-backoff-multiplier", "2")
    yield from ("--retry-initial-backoff-ms", str(_FIRST_PAUSE_MS))
    yield from ("--retry-max-backoff-ms", str(_LONGEST_PAUSE_MS))
    # How long an answer may take is for the instances to say.
    yield from ("--request-timeout-secs", "86400")


def _tries(wait_s: float) -> int:
    """So many attempts that the pauses between them last as long; 1 is none but the first."""
    pauses = (min(_FIRST_PAUSE_MS * 2**n, _LONGEST_PAUSE_MS) for n in count())
    return 1 + sum(1 for _ in takewhile(lambda waited_ms: waited_ms <= wait_s * 1000, accumulate(pauses)))
