"""The setting `cache` of a model. Only its form; what it does is in models/cache.py."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

from mms.sizes import parse_size

MAX_TTL = 10**9
MAX_HEADERS = 16

_NAME = re.compile(r"[!#$%&'*+.^`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2, without the underscore: such fields are dropped
_OFF = (None, False, "", "none", "off", "false")


class CacheSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes that the kept answers may fill, seconds for which one is given, and the request headers that matter."""

    size: int = 64 << 20
    ttl_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_TTL)] = 60.0
    headers: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_HEADERS)] = ()


def parse_cache(value: Any) -> CacheSettings | None:
    """From YAML or JSON as they are read, or from JSON in a text (a query); None when it is off. Raises ValueError."""
    if value in _OFF:
        return None
    try:
        if isinstance(value, str):
            value = msgspec.json.decode(value)
        if not isinstance(value, dict):
            raise ValueError('a mapping is needed, such as {"size": "64MiB", "ttl_s": 60}')
        if "size" in value:
            value = {**value, "size": _size(value["size"])}
        settings = msgspec.convert(value, CacheSettings)
    except msgspec.ValidationError as error:
        raise ValueError(re.sub(r" - at `\$\.?(.*)`$", r" (\1)", str(error))) from None
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise ValueError(f'a mapping is needed, such as {{"size": "64MiB", "ttl_s": 60}}: {error}') from None
    for name in settings.headers:
        if not _NAME.fullmatch(name):
            raise ValueError(f"headers: {name!r:.80} is no name of a header")
    return msgspec.structs.replace(settings, headers=tuple(dict.fromkeys(name.lower() for name in settings.headers)))


def _size(value: Any) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise ValueError(f"size: {error}") from None
