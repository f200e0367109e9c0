"""The page for people: files that hold no data, the same ones wherever llm-serve runs; what they show is /status.

They are served without a key, as a browser sends none with the address that is typed into it; the page asks for one.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response

_FOLDER = Path(__file__).parent / "page"
_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "plots.js": "text/javascript; charset=utf-8",
    "uPlot.iife.min.js": "text/javascript; charset=utf-8",
    "uPlot.min.css": "text/css; charset=utf-8",
    "uPlot.LICENSE.txt": "text/plain; charset=utf-8",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # asked again each time, so that an upgrade shows; most often the answer is 304
}


@dataclass(frozen=True)
class Asset:
    """One file, read when it is first asked for."""

    name: str

    @cached_property
    def content(self) -> bytes:
        """As it is."""
        return (_FOLDER / self.name).read_bytes()

    @cached_property
    def packed(self) -> bytes:
        """Compressed."""
        return gzip.compress(self.content, mtime=0)

    @cached_property
    def etag(self) -> str:
        """Another one for other content."""
        return f'W/"{hashlib.sha256(self.content).hexdigest()[:16]}"'

    def answer(self, asked: Headers) -> Response:
        """The file, or 304 for who has it already."""
        headers = _HEADERS | {"etag": self.etag, "vary": "accept-encoding"}
        if self.etag in asked.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        headers["content-type"] = _TYPES[self.name]
        if not accepts_gzip(asked):
            return Response(self.content, headers=headers)
        return Response(self.packed, headers=headers | {"content-encoding": "gzip"})


ASSETS = {f"/page/{name}": Asset(name) for name in _TYPES if name != "index.html"} | {"/": Asset("index.html")}
"""By path."""


def accepts_gzip(asked: Headers) -> bool:
    """True for a client that unpacks what it gets."""
    return "gzip" in asked.get("accept-encoding", "")
