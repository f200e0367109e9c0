"""How many connections there may be, in all and of one address, so that nobody takes them all."""

from __future__ import annotations

import ipaddress
import resource
from collections import Counter

_MOST_OF_ONE = 0.8
"""Of all, where no number is set: behind a proxy everybody has one address, and still a place is left for another."""


class Places:
    """Places for connections. A client without an address (a unix socket) counts only among all."""

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most, self._most_of_one = most, most_of_one
        self._taken = 0
        self._by_address: Counter[bytes] = Counter()

    @classmethod
    def of(cls, max_connections: int, per_client: int, processes: int = 1) -> Places:
        """Those of one of so many processes, which takes its share and keeps half of its files for other ends."""
        open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        share = -(-max_connections // processes)
        most = share if open_files == resource.RLIM_INFINITY else max(1, min(share, open_files // 2))
        return cls(most, -(-per_client // processes) or max(1, int(most * _MOST_OF_ONE)))

    def take(self, client: tuple[str, int] | None) -> str:
        """Why there is no place for one more connection of this client; empty when it has been given one."""
        if self._taken >= self._most:
            return f"{self._taken} connections are open already (server.max_connections)."
        if client is not None:
            if self._by_address[who := _who(client[0])] >= self._most_of_one:
                what = f"{self._most_of_one} connections of your address are open already"
                return f"{what} (server.max_connections_per_client)."
            self._by_address[who] += 1
        self._taken += 1
        return ""

    def give_back(self, client: tuple[str, int] | None) -> None:
        """A connection that was given a place has ended."""
        self._taken -= 1
        if client is not None:
            self._by_address[who := _who(client[0])] -= 1
            if not self._by_address[who]:
                del self._by_address[who]


UNLIMITED = Places(1 << 62, 1 << 62)


def _who(host: str) -> bytes:
    """An IPv4 address, or the network of an IPv6 address: a single machine has all of the latter."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.encode()
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped.packed if address.ipv4_mapped else address.packed[:8]
    return address.packed
