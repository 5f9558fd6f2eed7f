"""One setting: how its value is written, read, checked and shown."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from mms.errors import ConfigError
from mms.instances import parse_instances, show_instances

MAX_SHOWN = 200  # characters of a wrong value in an error
MAX_BATCH = 65_536
MAX_QUEUE = 1_000_000
MAX_OUTPUT = 64 << 10

_PORTS = {"http": 80, "https": 443}


def setting(
    default: Any, parse: Callable[[Any], Any], help: str, *, low: float | None = None, high: float | None = None
) -> Any:
    """A field of a dataclass of settings; `parse` raises ValueError."""
    return field(default=default, metadata={"parse": parse, "help": help, "low": low, "high": high})


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean X?`, or nothing when no known word is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def parse_setting(kind: type, name: str, value: Any, origin: str, *, called: str = "") -> Any:
    """One value as its field's type. Raises ConfigError with its origin and name, or what it is `called` there."""
    meta = next(f.metadata for f in fields(kind) if f.name == name)
    called = called or name
    try:
        parsed = meta["parse"](value)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{origin}: {called} = {shown(value)}: {error}") from None
    if meta["low"] is not None and parsed < meta["low"]:
        raise ConfigError(f"{origin}: {called} = {shown(value)}: must be at least {meta['low']}")
    if meta["high"] is not None and parsed > meta["high"]:
        raise ConfigError(f"{origin}: {called} = {shown(value)}: must be at most {meta['high']}")
    return parsed


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def show_setting(kind: type, name: str, value: Any) -> str:
    """The value as one would write it in a file."""
    meta = next(f.metadata for f in fields(kind) if f.name == name)
    if meta["parse"] is parse_milliseconds:
        value = round(value * 1000, 6)
    if meta["parse"] is parse_instances:
        return show_instances(value)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def parse_integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError("a whole number is needed")
    try:
        number = int(value)
    except (ValueError, TypeError):
        raise ValueError("a whole number is needed") from None
    if not -(1 << 63) <= number < 1 << 63:  # more cannot be told to another process
        raise ValueError("a smaller number is needed")
    return number


def parse_number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError("a number is needed")
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError("a number is needed") from None
    if not -1e12 < number < 1e12:
        raise ValueError("a finite number is needed")
    return number


def parse_milliseconds(value: Any) -> float:
    return parse_number(value) / 1000


def parse_boolean(value: Any) -> bool:
    text = str(value).lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0"):
        return False
    raise ValueError("true or false is needed")


def parse_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text is needed")
    return value


def parse_path(value: Any) -> Path | None:
    return None if value in (None, "") else Path(parse_text(str(value))).expanduser().absolute()


def parse_paths(value: Any) -> tuple[str, ...]:
    return tuple(str(Path(word).expanduser().absolute()) for word in parse_words(value))


def parse_words(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [word for word in re.split(r"[,\s]+", value) if word]
    if not isinstance(value, list | tuple):
        raise ValueError("a list is needed")
    return tuple(str(word) for word in value)


def parse_models(value: Any) -> tuple[str, ...]:
    words = parse_words(value)
    for word in words:
        name, equals, file = word.partition("=")
        if equals and "://" not in name and not (name and file):
            raise ValueError(f"{word}: name=file is needed")
    return words


def parse_integers(value: Any) -> tuple[int, ...]:
    return tuple(parse_integer(word) for word in (value if isinstance(value, list | tuple) else parse_words(value)))


def parse_batch_sizes(value: Any) -> tuple[int, ...]:
    sizes = parse_integers([value] if isinstance(value, int) else value)
    if any(not 1 <= size <= MAX_BATCH for size in sizes):
        raise ValueError(f"each must be from 1 to {MAX_BATCH}")
    return tuple(sorted({*sizes}))


def parse_queue_sizes(value: Any) -> tuple[int, ...]:
    sizes = parse_integers([value] if isinstance(value, int) else value)
    if any(size < 0 or size > MAX_QUEUE for size in sizes):
        raise ValueError(f"numbers from 0 (no limit of its own) to {MAX_QUEUE} are needed")
    return sizes


def parse_output(value: Any) -> Any:
    try:
        encoded = msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("a text or a value that JSON can hold is needed") from None
    if len(encoded) > MAX_OUTPUT:
        raise ValueError(f"at most {MAX_OUTPUT} bytes as JSON")
    return value


@dataclass(frozen=True)
class OneOf:
    """Parses one of a few words."""

    words: tuple[str, ...]

    def __call__(self, value: Any) -> str:
        text = str(value)
        if isinstance(value, bool):  # YAML reads on, off, yes and no as these
            text = "none" if value is False and "none" in self.words else text.lower()
        if text not in self.words:
            raise ValueError(f"one of {', '.join(self.words)} is needed")
        return text


def one_of(*words: str) -> OneOf:
    return OneOf(words)


def parse_address(value: Any) -> str:
    text = parse_text(value).removeprefix("http://").rstrip("/")
    if not text.startswith("unix:"):
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError("host:port or unix:/path is needed")
    return text


def parse_origins(value: Any) -> tuple[str, ...]:
    return tuple(_origin(word) for word in parse_words(value))


def _origin(url: str) -> str:
    parts = urlsplit(url)
    if parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(f"{url}: only scheme, host and port, such as https://models.example.com")
    return origin_of(url)


def origin_of(url: str) -> str:
    """`scheme://host:port` of an http address. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname or re.search(r"[\s\\\x00-\x1f\x7f]", url):
        raise ValueError("http://host or https://host is needed")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or _PORTS[parts.scheme]}"


def parse_networks(value: Any) -> tuple[str, ...]:
    return tuple(str(ipaddress.ip_network(word)) for word in parse_words(value))


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return address.startswith("unix:") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
