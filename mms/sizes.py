"""Sizes in bytes, as settings have them."""

from __future__ import annotations

import re
from typing import Any

_SIZE = re.compile(r"(\d+)\s*(|b|kib|mib|gib|kb|mb|gb)", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_size(value: Any) -> int:
    """Bytes, from a number or from text with a unit. Raises ValueError."""
    match = _SIZE.fullmatch(str(value).strip())
    if match is None or isinstance(value, bool):
        raise ValueError("a size is needed, such as 1048576, 100MiB or 2GB")
    size = int(match[1]) * _UNITS[match[2].lower()]
    if size >= 1 << 63:  # more cannot be told to another process
        raise ValueError("a size of less than 8 EiB is needed")
    return size
