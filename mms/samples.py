"""The samples of a model's `warmup` setting: what its settings say, its archive must hold and its workers run."""

from __future__ import annotations

import json
import mimetypes
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

MAX_SAMPLES = 100
MAX_COUNT = 10_000
MAX_ELEMENTS = 1 << 30
DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")

_KEYS = ("file", "content_type", "shape", "dtype", "count")


@dataclass(frozen=True, kw_only=True)
class WarmupSample:
    """One sample: the `file` of the archive that is a request's body, or the `shape` and `dtype` of a request's item.

    It runs `count` times in each batch size.
    """

    file: str = ""
    content_type: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    count: int = 1

    @property
    def name(self) -> str:
        """As errors call it."""
        return self.file or f"{self.dtype} {list(self.shape)}"


def parse_samples(value: Any) -> tuple[WarmupSample, ...]:
    """A list of mappings, or its JSON. Raises ValueError that names the sample."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value else []
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list | tuple) or len(value) > MAX_SAMPLES:
        raise ValueError(f"a list of at most {MAX_SAMPLES} samples is needed, each with a file or a shape")
    return tuple(_parse(number, sample) for number, sample in enumerate(value, 1))


def _parse(number: int, sample: Any) -> WarmupSample:
    if not isinstance(sample, dict) or ("file" in sample) == ("shape" in sample):
        raise ValueError(f"sample {number}: either file: NAME or shape: [...] is needed")
    if unknown := sorted(str(key) for key in sample if key not in _KEYS):
        raise ValueError(f"sample {number} has no {', '.join(unknown)}; it may have {', '.join(_KEYS)}")
    count = sample.get("count", 1)
    if not _is_number(count) or not 1 <= count <= MAX_COUNT:
        raise ValueError(f"sample {number}: count must be a whole number from 1 to {MAX_COUNT}")
    if "file" in sample:
        file, kind = _file(number, sample["file"]), sample.get("content_type", "")
        if not isinstance(kind, str) or "dtype" in sample:
            raise ValueError(f"sample {number}: beside file stands content_type, a text, and no dtype")
        kind = kind or mimetypes.guess_type(file)[0] or "application/octet-stream"
        return WarmupSample(file=file, content_type=kind, count=count)
    dtype = sample.get("dtype", "float32")
    if dtype not in DTYPES or "content_type" in sample:
        raise ValueError(f"sample {number}: beside shape stands dtype, one of {', '.join(DTYPES)}, and no content_type")
    return WarmupSample(shape=_shape(number, sample["shape"]), dtype=dtype, count=count)


def _file(number: int, name: Any) -> str:
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"sample {number}: file must name a file of the archive")
    return str(path)


def _shape(number: int, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list | tuple) or not all(_is_number(length) and length > 0 for length in shape):
        raise ValueError(f"sample {number}: shape must be a list of whole numbers from 1 on, without the batch")
    elements = 1
    for length in shape:
        elements *= length
        if elements > MAX_ELEMENTS:
            raise ValueError(f"sample {number}: shape has more than {MAX_ELEMENTS} elements")
    return tuple(shape)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
