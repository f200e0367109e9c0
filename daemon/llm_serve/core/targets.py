"""What Prometheus is told of a machine's instances, in the form of its file discovery, or why one cannot be scraped."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from llm_serve.core.settings import Listen

Group = dict[str, Any]
"""`{"targets": ["HOST:PORT"], "labels": {"instance": NAME, "host": MACHINE}}`."""


class NotScrapable(Exception):  # noqa: N818 - a fact about an address, not an error of ours
    """Prometheus cannot reach the address; the message says why, and what to do."""


def address_of(listen: Listen, reached_as: str | None = None) -> str:
    """Return the HOST:PORT at which Prometheus finds what listens there, or raise NotScrapable.

    `reached_as` is this machine's name for a Prometheus on another one; without it, Prometheus runs here.
    """
    if listen.path is not None:
        raise NotScrapable(f"{listen} is a unix socket, which Prometheus cannot scrape. Set server.listen to host:port")
    if not listen.port:
        raise NotScrapable(f"{listen} is another port at each start. Name one in server.listen")
    if reached_as and listen.is_loopback:
        raise NotScrapable(f"{listen} can be reached from this machine only. Set server.listen to another address")
    host = listen.host or ""
    if not _is_wildcard(host):
        return str(listen)
    return str(Listen(reached_as or ("::1" if ":" in host else "127.0.0.1"), listen.port))


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def group(name: str, host: str, address: str) -> Group:
    """One instance. `instance` is its name, as in llm-serve@NAME: addresses on loopback are the same everywhere."""
    return {"targets": [address], "labels": {"instance": name, "host": host}}


def by_instance(found: object) -> Mapping[str, Group]:
    """The groups of an earlier list by their instances; whatever is none is left out."""
    return {each["labels"]["instance"]: each for each in _groups(found)}


def _groups(found: object) -> Iterable[Group]:
    for each in found if isinstance(found, list) else ():
        match each:
            case {"targets": [str()], "labels": {"instance": str(), "host": str()}}:
                yield each
