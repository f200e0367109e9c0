"""Figures as people read them: short, and with their unit."""

from __future__ import annotations


def age(seconds: float) -> str:
    """A time in the two units that matter; one that lies ahead, after a clock was set back, is none."""
    whole = max(0, int(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def number(value: float | None) -> str:
    """Three digits or more of it: 0.34, 7.1, 812, 12345; a dash where it is not known."""
    if value is None:
        return "-"
    if value == 0 or value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 or float(value).is_integer() else f"{value:.2f}"


def whole(value: float | None) -> str:
    """A count."""
    return "-" if value is None else f"{value:.0f}"


def share(value: float | None) -> str:
    """A part of all in percent."""
    return "-" if value is None else f"{value:.0%}"


def seconds(value: float | None) -> str:
    """A time of the size of an answer's: 12 ms, 0.34 s, 7.1 s."""
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 0.1 else f"{number(value)} s"


def gib(used: float | None, total: float | None) -> str:
    """Memory in use, of what there is."""
    if used is None:
        return "-"
    return f"{used / 2**30:.1f} of {total / 2**30:.1f} GiB" if total else f"{used / 2**30:.1f} GiB"
