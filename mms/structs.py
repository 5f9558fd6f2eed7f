"""Structs of the hot path, in the front end's process."""

from __future__ import annotations

from typing import TypeVar

import msgspec

S = TypeVar("S", bound=type[msgspec.Struct])


def quickly_set(struct: S) -> S:
    """Set attributes of its instances as those of any class with slots, which Python does in a fifth of the time.

    A Struct's own way also shows an instance to the collector that is first given something in which there may be
    cycles. So it is for those only which get such a thing from their constructor.
    """
    setattr(struct, "__setattr__", object.__setattr__)  # noqa: B010 -- not in the body: the metaclass would undo it
    setattr(struct, "__delattr__", object.__delattr__)  # noqa: B010 -- only both together are taken for what they are
    return struct
