"""The settings' own rules: addresses, bounds, and values that cannot be changed."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from llm_serve.core.budgets import (
    KILL_S,
    MAX_DRAIN_S,
    UNIT_STOP_TIMEOUT_S,
    budgets,
)
from llm_serve.core.settings import (
    GpuSettings,
    LimitSettings,
    Listen,
    LogSettings,
    NetworkSettings,
    RecoverySettings,
    ServerSettings,
    Settings,
    parse_listen,
)

TABLES: tuple[type[BaseModel], ...] = (
    ServerSettings, LimitSettings, RecoverySettings, GpuSettings, NetworkSettings, LogSettings, Settings,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8000", Listen("127.0.0.1", 8000)),
        ("0.0.0.0:0", Listen("0.0.0.0", 0)),
        ("[::1]:8000", Listen("::1", 8000)),
        ("gpu-1.example_lan.org:80", Listen("gpu-1.example_lan.org", 80)),
        ("unix:/run/llm-serve/a.sock", Listen(path="/run/llm-serve/a.sock")),
    ],
)
def test_an_address_is_understood_and_written_back(text: str, expected: Listen) -> None:
    """Each form of listen is parsed, and its text is the form itself."""
    parsed = parse_listen(text)

    assert expected == parsed
    assert text == str(parsed)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("8000", "host:port"),
        ("localhost", "host:port"),
        ("localhost:http", "host:port"),
        ("localhost:65536", "65535"),
        ("localhost:²", "host:port"),
        (":8000", "0.0.0.0:8000"),
        ("*:8000", "0.0.0.0:8000"),
        ("::1:8000", "[::1]:8000"),
        ("[::g]:8000", "IPv6"),
        ("256.0.0.1:8000", "IPv4"),
        ("http://localhost:8000", "brackets"),
        ("a b:8000", "host name"),
        ("unix:relative.sock", "absolute"),
        ("unix:/run/", "absolute"),
        ("unix:/" + "x" * 107, "107"),
    ],
)
def test_a_wrong_address_is_refused_with_its_reason(text: str, reason: str) -> None:
    """What is not an address is refused in words that lead to one."""
    with pytest.raises(ValueError, match=r".") as caught:
        parse_listen(text)

    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/a.sock", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("gpu1:1", False),
    ],
)
def test_only_addresses_of_this_machine_are_loopback(text: str, expected: bool) -> None:
    """An address that others may reach is never taken for a loopback one."""
    assert expected is parse_listen(text).is_loopback


def test_every_option_has_a_description() -> None:
    """Each option says in one line what it is, for the manual and for --help."""
    without = [
        f"{table.__name__}.{name}"
        for table in TABLES
        for name, field in table.model_fields.items()
        if not field.description
    ]

    assert without == []


def test_every_default_is_within_its_own_bounds() -> None:
    """Writing a default into the file changes nothing."""
    for table in (ServerSettings, LimitSettings, RecoverySettings, GpuSettings, NetworkSettings, LogSettings):
        defaults = table()
        assert defaults == table(**defaults.model_dump())


def test_settings_cannot_be_changed() -> None:
    """A setting that was read stays what the file says."""
    settings = Settings(name="a", source="a.toml", model="m")

    with pytest.raises(ValidationError, match="frozen"):
        settings.model = "other"


def test_a_switch_is_not_a_number() -> None:
    """`max_queued = true` is a mistake, not 1."""
    with pytest.raises(ValidationError, match="max_queued"):
        ServerSettings(max_queued=True)


def test_the_longest_drain_fits_under_the_units_stop_timeout() -> None:
    """drain + kill stays under TimeoutStopSec even at the largest drain."""
    assert MAX_DRAIN_S + KILL_S < UNIT_STOP_TIMEOUT_S
    assert MAX_DRAIN_S == 300


def test_the_budgets_are_said_with_their_arithmetic() -> None:
    """The worst cases of the default settings are spelt out as sums."""
    stop, wait, starts = budgets(Settings(name="a", source="a.toml", model="m"))

    assert "60 s drain + 15 s kill = 75 s" in stop
    assert "300 s" in wait
    assert "8 in 3600 s x 3 by systemd = 24" in starts
