"""The setting `instances`: groups of workers, each with the devices it runs on. Only its form; places are elsewhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

MAX_COUNT = 1024
MAX_AT_A_TIME = 64

Gpus = tuple[int | str, ...]


class InstanceGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`count` workers per device, each running `threads` batches at a time (None: as many as the model's setting says).

    `gpus` are numbers, or UUIDs of GPUs and MIG parts; empty, they are all that the server sees.
    """

    kind: Literal["gpu", "cpu"]
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)] = 1
    gpus: Gpus = ()
    threads: Annotated[int, msgspec.Meta(ge=1, le=MAX_AT_A_TIME)] | None = None


Groups = tuple[InstanceGroup, ...]


def parse_instances(value: Any) -> Groups:
    """From YAML or JSON as they are read, or from JSON in a text (a query, a variable). Raises ValueError."""
    try:
        if isinstance(value, str):
            groups: Groups = msgspec.json.decode(value, type=Groups) if value.strip() else ()
        else:
            groups = msgspec.convert(value, Groups)
    except msgspec.ValidationError as error:
        raise ValueError(str(error).replace("`$[", "`[").replace(" - at `$`", "")) from None
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise ValueError(f'a list is needed, such as [{{"kind": "gpu", "count": 2}}]: {error}') from None
    for group in groups:
        if group.kind == "cpu" and group.gpus:
            raise ValueError("gpus is for groups of kind gpu")
        gpus(group.gpus)
    return groups


def show_instances(groups: Groups) -> str:
    """As one would write it in a query; empty for none."""
    return msgspec.json.encode(groups).decode() if groups else ""


def gpus(value: Any) -> Gpus:
    """Numbers and UUIDs from a list, or from a text with commas or spaces between them. Raises ValueError."""
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        raise ValueError("a list is needed")
    return tuple(_gpu(word) for word in words)


def _gpu(word: Any) -> int | str:
    if isinstance(word, str) and word.startswith(("GPU-", "MIG-")):
        return word
    text = str(word)
    if isinstance(word, bool) or not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise ValueError(f"{text[:80]!r} is neither the number of a GPU nor a UUID (GPU-..., MIG-...)")
    return int(text)
