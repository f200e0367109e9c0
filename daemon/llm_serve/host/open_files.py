"""How many files, and with them connections, a process may have open."""

from __future__ import annotations

import resource


def allow(wanted: int) -> None:
    """Let this process and its children have so many: the usual limit is 1024. Takes what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
