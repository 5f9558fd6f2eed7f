"""Whether what a handler returned for a batch has one result per request, and which function is to blame if not.

Runs in the worker process.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def miscount(results: Any, wanted: int, function: str) -> str:
    """What is wrong with the shape of a batch's results, or nothing."""
    sized = isinstance(results, list) if function == "handle" else _is_sequence(results)
    if not sized:
        kind = type(results).__name__ if getattr(results, "shape", None) != () else f"a 0-d {type(results).__name__}"
        return f"{function} returned {kind}; a list with one result per request ({wanted}) is needed"
    if len(results) != wanted:
        return f"{function} returned {len(results)} results for {wanted} requests; one per request is needed"
    return ""


def miscount_of(collated: Any, outputs: Any, wanted: int) -> str:
    """As miscount, of `inference`; what `collate` made of a batch is to blame if it has the same wrong length.

    Not before: another length alone is no fault, as the first axis may be time, or an image be there in several parts.
    """
    fault = miscount(outputs, wanted, "inference")
    if fault and _is_sequence(outputs):
        lengths = _lengths(collated)
        if wanted not in lengths and len(outputs) in lengths:
            return f"collate made a batch of {len(outputs)} of {wanted} requests, and inference as many results"
    return fault


def tell_lengths(collated: Any, wanted: int) -> None:
    """A line in the model's log if nothing of what `inference` has failed on is as long as the batch."""
    lengths = sorted(_lengths(collated))
    if lengths and wanted not in lengths:
        text = " and ".join(map(str, lengths))
        sys.stderr.write(f"what collate made of {wanted} requests has length {text}\n")
        sys.stderr.flush()


def _lengths(collated: Any) -> set[int]:
    """That a batch may have: its own, or of a dict, tuple or list that of what is in it."""
    if isinstance(collated, Mapping):
        parts = list(collated.values())
    else:
        parts = [collated, *collated] if isinstance(collated, tuple | list) else [collated]
    return {len(part) for part in parts if _is_sequence(part)}


def _is_sequence(value: Any) -> bool:
    if isinstance(value, str | bytes | bytearray | dict | set):
        return False
    try:
        len(value)
    except TypeError:  # arrays and tensors without dimensions have the method, but no length
        return False
    return True
