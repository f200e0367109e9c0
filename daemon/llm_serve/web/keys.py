"""The API keys: who may come in, and for whom a request counts."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping


class Keys:
    """The API keys, as digests. Without keys everybody may come in (loopback only, see the settings)."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def are_shared(self) -> bool:
        """False when all requests count for one and the same."""
        return len(self._digests) != 1

    def holder(self, headers: Mapping[bytes, bytes], client: tuple[str, int] | None) -> bytes | None:
        """The digest of a request's key, or where there are no keys the client's address. None without a valid key.

        Takes as long for a wrong key as for a right one.
        """
        if not self._digests:
            return client[0].encode() if client else b""
        offered = headers.get(b"x-api-key", b"")
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            offered = token.strip()
        digest = hashlib.sha256(offered).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them: no early exit
        return digest if any(matches) else None
