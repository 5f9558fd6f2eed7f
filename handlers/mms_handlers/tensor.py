"""`tensor`: numbers in, as JSON or raw, the network's output as JSON numbers out. Runs in the worker process."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy
import torch

from mms.handler import Context, Handler, PredictionError, Request
from mms.payload import media_type
from mms_handlers.loading import load_model, options

__all__ = ["Tensor"]

DEFAULTS = {"input_shape": None, "dtype": "float32"}
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "int32", "int64", "uint8", "bool")}


class Tensor(Handler):
    """Runs a network that takes one tensor, batch dimension first."""

    def initialize(self, context: Context) -> None:
        """Reads `input_shape` (of one request) and `dtype` from the `tensor` section of model-config.yaml."""
        settings = options(context, "tensor", DEFAULTS)
        if settings["dtype"] not in DTYPES:
            raise ValueError(f"model-config.yaml: dtype {settings['dtype']!r} is none of {', '.join(DTYPES)}")
        self.dtype: torch.dtype = DTYPES[settings["dtype"]]
        self.shape: list[int] | None = settings["input_shape"]
        self.model = load_model(context)
        self.device = context.device

    def preprocess(self, request: Request) -> torch.Tensor:
        """JSON (a list or `{"data": [...]}`), or little-endian float32 when sent as application/octet-stream."""
        if media_type(request.content_type).lower() == "application/octet-stream":
            return self._from_bytes(request.body)
        return self._from_json(request.json())

    def inference(self, batch: torch.Tensor) -> list[Any]:
        """Per request its row of the output; of a network with several outputs, a row of each."""
        with torch.inference_mode():
            return _rows(self.model(batch.to(self.device)))

    def _from_bytes(self, body: bytearray) -> torch.Tensor:
        if self.shape is None:
            raise PredictionError("raw numbers need input_shape in the archive's model-config.yaml; send JSON instead")
        expected = 4 * prod(self.shape)
        if len(body) != expected:
            raise PredictionError(
                f"the body must hold {expected} bytes: float32 numbers of shape {self.shape}; it holds {len(body)}"
            )
        numbers = numpy.frombuffer(body, dtype="<f4").astype(numpy.float32)
        return torch.from_numpy(numbers.reshape(self.shape)).to(self.dtype)

    def _from_json(self, value: Any) -> torch.Tensor:
        numbers = value.get("data") if isinstance(value, dict) else value
        if not isinstance(numbers, list):
            raise PredictionError('the body must be a list of numbers, nested as its shape is, or {"data": [...]}')
        try:
            tensor = torch.tensor(numbers, dtype=self.dtype)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise PredictionError(f"the list is not a tensor: {str(error).splitlines()[0]}") from None
        if self.shape is not None and list(tensor.shape) != self.shape:
            raise PredictionError(f"the model takes numbers of shape {self.shape}, not {list(tensor.shape)}")
        return tensor


def _rows(output: Any) -> list[Any]:
    if isinstance(output, torch.Tensor):
        return list(output.tolist())
    if isinstance(output, dict):
        columns = [_rows(column) for column in output.values()]
        return [dict(zip(output, row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(output, list | tuple):
        return [list(row) for row in zip(*map(_rows, output), strict=True)]
    raise TypeError(f"the network gave a {type(output).__name__}; tensors, or a list or dict of them, can be answered")
