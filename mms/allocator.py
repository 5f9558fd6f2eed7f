"""Memory for large bodies: how the C library keeps what was freed, in the front end and in workers, and a buffer."""

from __future__ import annotations

import ctypes
import os
from typing import cast

# mallopt(3). By default, a block over 128 KiB is fetched from the system anew each time, and given back: of a body of
# that size the page faults cost more than all copies of it.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT = 64 << 20
KEPT_BLOCK = 32 << 20  # the most that glibc takes


def keep_freed_memory() -> None:
    """Keep up to KEPT bytes for what comes next. With glibc only, and unless the environment says otherwise."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return
    mallopt(_M_TRIM_THRESHOLD, KEPT)
    mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK)


_new_bytearray = ctypes.pythonapi.PyByteArray_FromStringAndSize
_new_bytearray.argtypes, _new_bytearray.restype = (ctypes.c_void_p, ctypes.c_ssize_t), ctypes.py_object


def buffer(size: int) -> bytearray:
    """Room for so many bytes that are about to be read: not cleared before, which would cost as much as a copy."""
    return cast(bytearray, _new_bytearray(None, size))
