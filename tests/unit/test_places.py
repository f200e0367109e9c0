"""How many connections one client, and all of them, may have."""

from __future__ import annotations

import resource

import pytest

from llm_serve.web.places import Places


def client(host: str) -> tuple[str, int]:
    """A peer of that address."""
    return host, 1


def test_one_address_leaves_places_for_another() -> None:
    """The fifth of an address is refused, with the option; another one is not, and one that goes makes room."""
    places = Places(8, 4)
    assert [""] * 4 == [places.take(client("10.0.0.1")) for _ in range(4)]

    assert "server.max_connections_per_client" in places.take(client("10.0.0.1"))
    assert "" == places.take(client("10.0.0.2"))
    places.give_back(client("10.0.0.1"))
    assert "" == places.take(client("10.0.0.1"))


def test_all_together_have_a_limit_too() -> None:
    """Also those that have no address."""
    places = Places(3, 2)
    assert [""] * 3 == [places.take(who) for who in (None, None, client("10.0.0.1"))]

    assert "server.max_connections" in places.take(None)
    assert "server.max_connections)" in places.take(client("10.0.0.2"))
    places.give_back(None)
    assert "" == places.take(client("10.0.0.2"))


@pytest.mark.parametrize(
    ("one", "other", "are_one"),
    [
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
    ],
)
def test_who_counts_as_one(one: str, other: str, are_one: bool) -> None:
    """A machine has a whole network of IPv6 addresses; an IPv4 address stays one in whichever way it is written."""
    places = Places(8, 1)
    assert "" == places.take(client(one))

    assert are_one == bool(places.take(client(other)))


def test_what_the_settings_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four fifths for one address unless told otherwise; front ends share; half of the files are for the engine."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))

    def counts(*asked: int) -> tuple[int, int]:
        places = Places.of(*asked)
        taken = 0
        while not places.take(client("10.0.0.1")):
            taken += 1
        most = taken
        while not places.take(None):
            most += 1
        return most, taken

    assert (100, 80) == counts(100, 0)
    assert (100, 7) == counts(100, 7)
    assert (50, 4) == counts(100, 7, 2)
    assert (512, 409) == counts(4096, 0)
