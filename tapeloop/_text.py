"""How texts show numbers."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """Return a number of bytes in the largest fitting unit: `1.5 MiB`."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.{int(units[0] != 'B')}f} {units[0]}"
