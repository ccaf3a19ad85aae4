"""Bytes and seconds as people read them."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """Three digits and a decimal unit.

    >>> format_bytes(10_800_000), format_bytes(999)
    ('10.8 MB', '999 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_seconds(seconds: float) -> str:
    """Seconds up to a minute and a half, then minutes, then hours.

    >>> format_seconds(12.4), format_seconds(600), format_seconds(9_000)
    ('12 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
