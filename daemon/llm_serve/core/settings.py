"""The instance file as values: every option of llm-serve with its unit, default and bounds.

It owns what is ours and passes `[engine]` on unread: which names exist there is the installed vLLM's
decision, taken at its border. Reading text into these values is `instance_file`'s work.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

MAX_PORT = 65535
DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the HTTP server listens: a host and a port, or the path of a unix socket."""

    host: str | None = None
    port: int | None = None
    path: str | None = None

    @property
    def is_loopback(self) -> bool:
        """True when only this machine can reach it; a host name other than localhost counts as outside."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host or "").is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in (self.host or "") else f"{self.host}:{self.port}"


def parse_listen(text: str) -> Listen:
    """Return the address that `text` means, or raise ValueError with what is wrong with it."""
    if text.startswith("unix:"):
        return _parse_unix(text.removeprefix("unix:"))
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > MAX_PORT:
        raise ValueError(f"must be host:port with a port up to {MAX_PORT}, [ipv6]:port or unix:/path, not {text!r}")
    return Listen(host=_parse_host(host, port), port=int(port))


def _parse_unix(path: str) -> Listen:
    # 107 bytes and a NUL is what sockaddr_un holds; bind() would say no more than "path too long".
    if not path.startswith("/") or path.endswith("/") or len(path.encode()) > 107 or "\0" in path:
        raise ValueError(f"unix: must be followed by an absolute path of at most 107 bytes, not {path!r}")
    return Listen(path=path)


def _parse_host(host: str, port: str) -> str:
    if host in ("", "*"):
        raise ValueError(f"has no address: write 0.0.0.0:{port} for all of them, or 127.0.0.1:{port}")
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError:
            raise ValueError(f"{host} is not an IPv6 address") from None
    if ":" in host:
        raise ValueError(f"an IPv6 address is written in brackets: [{host}]:{port}")
    if host.replace(".", "").isdigit():
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise ValueError(f"{host} is not an IPv4 address") from None
    if not all(label and label.replace("-", "").replace("_", "").isalnum() for label in host.split(".")):
        raise ValueError(f"{host!r} is not a host name")
    return host


def _as_tuple(value: Any) -> Any:
    """TOML has arrays, frozen settings have tuples."""
    return tuple(value) if isinstance(value, list) else value


Seconds = Annotated[float, Field(gt=0, le=30 * DAY_S, allow_inf_nan=False)]
SecondsOrOff = Annotated[float, Field(ge=0, le=30 * DAY_S, allow_inf_nan=False)]


class _Table(BaseModel):
    """One table of the file: nothing unknown, nothing converted behind one's back, nothing changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ServerSettings(_Table):
    """`[server]`: who may connect, and how long they wait."""

    listen: str = "127.0.0.1:8000"
    """host:port, [ipv6]:port or unix:/path; a socket of that address from systemd is taken over."""
    api_keys: str | None = Field(default=None, pattern=r"^/")
    """File with one key a line; without keys only loopback addresses are served."""
    max_queued: int = Field(default=256, ge=0, le=1_000_000)
    """Waiting requests beyond which a client gets 503 and Retry-After."""
    hold_timeout_s: SecondsOrOff = 300
    """How long a request may wait for an engine, or for room in it."""
    stream_keep_alive_s: SecondsOrOff = 15
    """Silence after which a waiting event stream gets a comment, so that no proxy cuts it; 0: never."""
    max_body_bytes: int = Field(default=32 << 20, ge=1024, le=1 << 40)
    """Longest body of a request; a longer one gets 413."""
    header_timeout_s: Seconds = 20
    """How long a client may take for the head of a request."""
    body_timeout_s: Seconds = 120
    """How long a client may take for the body of a request."""
    drain_timeout_s: SecondsOrOff = 60
    """How long a stop waits for requests in flight."""
    open_metrics: bool = False
    """Serve /metrics without a key, for a scraper that has none."""
    anthropic_messages: bool = False
    """Serve Anthropic's /v1/messages beside the OpenAI routes."""
    front_ends: int = Field(default=1, ge=1)
    """Processes that answer HTTP; this version has one."""

    @field_validator("listen")
    @classmethod
    def _listen_is_an_address(cls, value: str) -> str:
        parse_listen(value)
        return value

    @field_validator("front_ends")
    @classmethod
    def _one_front_end(cls, value: int) -> int:
        if value != 1:
            raise ValueError(f"must be 1: this version serves with one front end, not {value}")
        return value

    @property
    def listen_on(self) -> Listen:
        """`listen`, parsed."""
        return parse_listen(self.listen)


class RecoverySettings(_Table):
    """`[recovery]`: how far and how often llm-serve helps itself."""

    floor_max_model_len: int = Field(default=2048, ge=1)
    """The ladder never lowers engine.max_model_len under this many tokens."""
    floor_max_num_seqs: int = Field(default=4, ge=1)
    """The ladder never lowers engine.max_num_seqs under this many requests."""
    start_timeout_s: Seconds = 1800
    """Longest time for one engine start."""
    stall_timeout_s: Seconds = 120
    """With work waiting and no engine step for this long, the engine hangs."""
    restart_limit: int = Field(default=8, ge=1, le=1000)
    """Engine starts in restart_window_s, after which the daemon gives up with status 70."""
    restart_window_s: Seconds = 3600
    """The window of restart_limit."""
    step_up_after_s: SecondsOrOff = 0
    """Time on a smaller plan after which a larger one is tried again; 0: only after `reset`."""
    attention_backends: Annotated[Literal["auto"] | tuple[str, ...], BeforeValidator(_as_tuple)] = "auto"
    """"auto", or the backends to fall back through, in order."""

    @field_validator("attention_backends", mode="before")
    @classmethod
    def _auto_or_names(cls, value: Any) -> Any:
        names = _as_tuple(value)
        if names == "auto":
            return names
        if not isinstance(names, tuple) or not names or not all(isinstance(n, str) and n for n in names):
            raise ValueError(f'must be "auto" or a list of backend names, not {value!r}')
        if len(set(names)) < len(names):
            raise ValueError("names a backend twice")
        return names


class GpuSettings(_Table):
    """`[gpu]`: which devices, and how hot they may get."""

    devices: Annotated[tuple[Annotated[int, Field(ge=0)], ...] | None, BeforeValidator(_as_tuple)] = None
    """Indices of the GPUs to use; without it all visible ones."""
    wait_timeout_s: Seconds = 300
    """How long a start waits for the driver and the GPUs."""
    pause_above_celsius: int = Field(default=0, ge=0, le=110)
    """Admission pauses above this temperature, until 5 degrees below it; 0: never."""

    @field_validator("devices")
    @classmethod
    def _some_and_each_once(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and not value:
            raise ValueError("is empty: name at least one device, or leave it out to use all")
        if value is not None and len(set(value)) < len(value):
            raise ValueError("names a device twice")
        return value


class LogSettings(_Table):
    """`[log]`: how much is logged, and in which form. Prompts and answers never are."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""
    format: Literal["auto", "journal", "console", "json"] = "auto"
    """auto: journal fields under systemd, else readable lines."""


class Settings(_Table):
    """One instance: what its file says, with every default filled in."""

    name: str
    """The instance's name, as in llm-serve@NAME."""
    source: str
    """The file it was read from, for messages."""
    model: str = Field(min_length=1)
    """Hub id or folder of the model."""
    server: ServerSettings = ServerSettings()
    """Who may connect, and how long they wait."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM's arguments by their own names, with `_`; checked at vLLM's border, not here."""
    engine_env: dict[str, str] = Field(default_factory=dict)
    """Environment of the engine's processes only."""
    recovery: RecoverySettings = RecoverySettings()
    """How far and how often llm-serve helps itself."""
    gpu: GpuSettings = GpuSettings()
    """Which devices, and how hot they may get."""
    log: LogSettings = LogSettings()
    """How much is logged, and in which form."""
