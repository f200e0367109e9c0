"""The instance file as values: every option of llm-serve with its unit, default and bounds.

It owns what is ours and passes `[engine]` on unread: which names exist there is the installed vLLM's
decision, taken at its border. Reading text into these values is `instance_file`'s work.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from llm_serve.core.devices import Device, parse_device

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


def as_tuple(value: Any) -> Any:
    """TOML has arrays, frozen settings have tuples."""
    return tuple(value) if isinstance(value, list) else value


Opened = Literal[
    "logits_processors", "prompt_logprobs", "structured_outputs.grammar", "structured_outputs.regex", "vllm_xargs"
]
"""What `limits.allow` may open; vLLM's own switches under [engine] open the rest."""

Seconds = Annotated[float, Field(gt=0, le=30 * DAY_S, allow_inf_nan=False)]
SecondsOrOff = Annotated[float, Field(ge=0, le=30 * DAY_S, allow_inf_nan=False)]


class Table(BaseModel):
    """One table of the file: nothing unknown, nothing converted behind one's back, nothing changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ServerSettings(Table):
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
    write_timeout_s: Seconds = 120
    """How long a client may take nothing of an answer that waits for it."""
    request_timeout_s: SecondsOrOff = 21_600
    """Longest time of one request from its head to the end of its answer, waiting included; 0: any."""
    max_connections: int = Field(default=4096, ge=8, le=1_000_000)
    """Most connections at once, of all front ends together; at most half of the files that may be open."""
    max_connections_per_client: int = Field(default=0, ge=0, le=1_000_000)
    """Most connections of one address (IPv6: one /64); 0: four fifths of all, for those behind a proxy have one."""
    drain_timeout_s: SecondsOrOff = 60
    """How long a stop waits for requests in flight."""
    open_metrics: bool = False
    """Serve /metrics without a key, for a scraper that has none."""
    hosts: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Names that clients may call it by (the Host header), beside loopback's; none: any, where there are keys."""
    allow_env: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Variables that are refused otherwise, because they open the engine to clients or load foreign code into it."""
    anthropic_messages: bool = False
    """Serve Anthropic's /v1/messages beside the OpenAI routes."""
    front_ends: int = Field(default=1, ge=1, le=64)
    """Processes that answer HTTP before the one engine; each beyond the first takes 0.25 GB of memory or more."""

    @field_validator("hosts")
    @classmethod
    def _hosts_are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            _parse_host(f"[{host}]" if host.count(":") > 1 else host, "8000")
        return value

    @field_validator("listen")
    @classmethod
    def _listen_is_an_address(cls, value: str) -> str:
        parse_listen(value)
        return value

    @property
    def listen_on(self) -> Listen:
        """`listen`, parsed."""
        return parse_listen(self.listen)


class LimitSettings(Table):
    """`[limits]`: what one request may ask for. What is refused gets a 400 or 413 that names the option."""

    max_choices: int = Field(default=8, ge=1, le=16_384)
    """Largest `n`."""
    max_prompts: int = Field(default=2048, ge=1)
    """Most prompts, or texts to embed, of one request. vLLM's own limit for completions is 1024."""
    max_messages: int = Field(default=4096, ge=1)
    """Most messages of a chat, and most parts of one message."""
    max_tools: int = Field(default=256, ge=0)
    """Most tools."""
    max_tools_bytes: int = Field(default=256 << 10, ge=256)
    """Longest list of tools, as JSON."""
    max_schema_bytes: int = Field(default=32 << 10, ge=256)
    """Longest schema of an answer, or list of tools of which one must be called: what has to be compiled."""
    max_pattern_chars: int = Field(default=1024, ge=1)
    """Longest regular expression in a schema."""
    max_label_chars: int = Field(default=1024, ge=16)
    """Longest stop string, bad word, name or id."""
    max_token_ids: int = Field(default=1024, ge=1)
    """Most entries of logit_bias, allowed_token_ids and the like."""
    max_prompt_chars: int = Field(default=0, ge=0)
    """Longest text of one prompt, after the chat template; 0: 16 for each token of max_model_len, at least 262,144."""
    max_nesting: int = Field(default=64, ge=8, le=200)
    """Deepest nesting of arrays and objects in a body."""
    max_values: int = Field(default=1_000_000, ge=1000)
    """Most values in a body; commas and brackets in texts count as well."""
    allow: Annotated[tuple[Opened, ...], BeforeValidator(as_tuple)] = ()
    """Fields that are refused otherwise, because one request could kill or block the engine with them."""
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    """What becomes of fields that vLLM does not know; it ignores them itself."""


class RecoverySettings(Table):
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
    keep_weights: bool = False
    """Weights stay in GPU memory while an engine is replaced, in a process of their own."""
    attention_backends: Annotated[Literal["auto"] | tuple[str, ...], BeforeValidator(as_tuple)] = "auto"
    """"auto", or the backends to fall back through, in order."""

    @field_validator("attention_backends", mode="before")
    @classmethod
    def _auto_or_names(cls, value: Any) -> Any:
        names = as_tuple(value)
        if names == "auto":
            return names
        if not isinstance(names, tuple) or not names or not all(isinstance(n, str) and n for n in names):
            raise ValueError(f'must be "auto" or a list of backend names, not {value!r}')
        if len(set(names)) < len(names):
            raise ValueError("names a backend twice")
        return names


class GpuSettings(Table):
    """`[gpu]`: which devices, and how hot they may get."""

    devices: tuple[Device, ...] | None = None
    """The GPUs to use, by index, UUID or PCI address, bound to their NUMA nodes; without it all visible ones."""
    wait_timeout_s: Seconds = 300
    """How long a start waits for the driver and the GPUs."""
    pause_above_celsius: int = Field(default=0, ge=0, le=110)
    """Admission pauses above this temperature, until 5 degrees below it; 0: never."""

    @field_validator("devices", mode="before")
    @classmethod
    def _some_and_each_once(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        if not value:
            raise ValueError("is empty: name at least one device, or leave it out to use all")
        devices = tuple(map(parse_device, value))
        if len(set(devices)) < len(devices):
            raise ValueError("names a device twice")
        return devices


class NetworkSettings(Table):
    """`[network]`: what may be reached from here."""

    engine: Literal["auto", "closed", "open"] = "auto"
    """closed: an engine's processes reach this machine's loopback only; auto: open where hosts or downloads need it."""


class LogSettings(Table):
    """`[log]`: how much is logged, and in which form. Prompts and answers never are."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""
    format: Literal["auto", "journal", "console", "json"] = "auto"
    """auto: journal fields under systemd, else readable lines."""


TABLES = ("server", "limits", "recovery", "gpu", "network", "log")
"""The tables whose options are ours, in the file's order."""


class Settings(Table):
    """One instance: what its file says, with every default filled in."""

    name: str
    """The instance's name, as in llm-serve@NAME."""
    source: str
    """The file it was read from, for messages."""
    model: str = Field(min_length=1)
    """Hub id or folder of the model."""
    server: ServerSettings = ServerSettings()
    """Who may connect, and how long they wait."""
    limits: LimitSettings = LimitSettings()
    """What one request may ask for."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM's arguments by their own names, with `_`; checked at vLLM's border, not here."""
    engine_env: dict[str, str] = Field(default_factory=dict)
    """Environment of the engine's processes only."""
    recovery: RecoverySettings = RecoverySettings()
    """How far and how often llm-serve helps itself."""
    gpu: GpuSettings = GpuSettings()
    """Which devices, and how hot they may get."""
    network: NetworkSettings = NetworkSettings()
    """What may be reached from here."""
    log: LogSettings = LogSettings()
    """How much is logged, and in which form."""
