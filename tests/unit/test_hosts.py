"""The names that a server may be called by."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from llm_serve.core.hosts import Hosts
from llm_serve.core.settings import ServerSettings

LOCAL = ("localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.0.0.1:8000", "127.9.9.9", "[::1]", "[::1]:8000")
FOREIGN = (
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.5", "0.0.0.0",
    "[::2]", "[fe80::1]:8000", "::1", "localhost evil", "\x7f", "é", "a" * 5000,
)  # fmt: skip


def hosts(listen: str = "127.0.0.1:8000", *names: str, has_keys: bool = False) -> Hosts:
    """The names of a server."""
    return Hosts.of(ServerSettings(listen=listen, hosts=names), has_keys=has_keys)


@pytest.mark.parametrize("host", LOCAL)
@pytest.mark.parametrize("listen", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000"])
def test_a_local_server_is_called_by_local_names(listen: str, host: str) -> None:
    """However loopback is written, and with any port: a tunnel ends on another one."""
    assert hosts(listen).includes(host.encode())


@pytest.mark.parametrize("host", FOREIGN)
def test_a_local_server_without_keys_is_called_by_no_other(host: str) -> None:
    """A page that has made its own name point here says that name."""
    assert not hosts().includes(host.encode("latin-1"))


@pytest.mark.parametrize("header", [None, b""])
def test_a_program_that_says_no_name_is_no_browser(header: bytes | None) -> None:
    """Every browser sends the header."""
    assert hosts().includes(header)


@pytest.mark.parametrize(
    ("listen", "has_keys"), [("127.0.0.1:8000", True), ("0.0.0.0:8000", True), ("unix:/run/a.sock", False)]
)
def test_where_something_else_guards_the_server_any_name_will_do(listen: str, has_keys: bool) -> None:
    """No page knows a key or reaches a unix socket; proxies say all kinds of names."""
    assert hosts(listen, has_keys=has_keys).includes(b"llm.example")


@pytest.mark.parametrize("has_keys", [True, False])
def test_names_of_the_file_are_the_only_ones_beside_loopback(has_keys: bool) -> None:
    """With keys and without."""
    named = hosts("10.0.0.5:8000", "llm.example", "gpu1", has_keys=has_keys)

    known = ("llm.example", "LLM.Example.:443", "gpu1:8000", "10.0.0.5:8000", "localhost")
    assert [True] * len(known) == [named.includes(host.encode()) for host in known]
    assert not named.includes(b"evil.example")
    assert not named.includes(b"example")


@pytest.mark.parametrize("name", ["", "*", "http://a", "a/b", "a b", "a:80", "[::1", "999.1.1.1"])
def test_what_is_no_name_is_refused(name: str) -> None:
    """A mistake in the list would shut everybody out, or let everybody in."""
    with pytest.raises(ValidationError, match=r"hosts"):
        ServerSettings(hosts=(name,))
