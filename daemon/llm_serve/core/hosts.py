"""By which names clients may call a server.

A web page that the user of this machine opens can have its own name point to 127.0.0.1 and then talk to whatever
listens there (DNS rebinding). The browser still says the page's name, in the Host header: that is what gives it away.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from llm_serve.core.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class Hosts:
    """The names, apart from this machine's own; None: any."""

    names: frozenset[str] | None = None

    @classmethod
    def of(cls, server: ServerSettings, *, has_keys: bool) -> Hosts:
        """Only those of the file; where it names none, any, unless the server's only guard is that it is local."""
        listen = server.listen_on
        is_open = has_keys or listen.path is not None or not listen.is_loopback
        if not server.hosts and is_open:
            return cls()
        own = (listen.host,) if listen.host else ()
        return cls(frozenset(host.lower().rstrip(".") for host in (*server.hosts, *own)))

    def includes(self, header: bytes | None) -> bool:
        """True for a Host header with such a name; also without one, for every browser sends it."""
        if self.names is None or not header:
            return True
        host = _without_port(header.decode("latin-1")).lower().rstrip(".")
        return host == "localhost" or host in self.names or _is_loopback(host)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
