"""The networks of `benchmarks.gpu`, written out, with random weights, and the handler that serves them."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mms.handler import Context, Handler, Request


def mlp(*, quick: bool) -> tuple[Any, tuple[int, ...]]:
    """Three layers of 1024, and the shape of one input."""
    width = 32 if quick else 1024
    layers: list[Any] = []
    for _ in range(3):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers), (width,)


class Bottleneck(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """The block that ResNet-50 is made of."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *convolution(inside, width, 1), nn.ReLU(), *convolution(width, width, 3, stride), nn.ReLU(),
            *convolution(width, width * 4, 1),
        )  # fmt: skip
        changes = stride != 1 or inside != width * 4
        self.short = nn.Sequential(*convolution(inside, width * 4, 1, stride)) if changes else nn.Identity()

    def forward(self, x: Any) -> Any:
        return (self.path(x) + self.short(x)).relu()


def convolution(inside: int, outside: int, kernel: int, stride: int = 1) -> list[Any]:
    return [nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outside)]


def resnet50(*, quick: bool) -> tuple[Any, tuple[int, ...]]:
    """ResNet-50 for pictures of 224 x 224."""
    width = 4 if quick else 64
    layers: list[Any] = [*convolution(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inside = width
    for stage, blocks in enumerate((1, 1, 1, 1) if quick else (3, 4, 6, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(inside, width << stage, 2 if stage and not block else 1))
            inside = (width << stage) * 4
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 1000)]
    return nn.Sequential(*layers), (3, 32, 32) if quick else (3, 224, 224)


def encoder(*, quick: bool) -> tuple[Any, tuple[int, ...]]:
    """A transformer encoder as large as BERT-base, for 128 embedded tokens."""
    layers, width, heads, tokens = (1, 32, 2, 8) if quick else (12, 768, 12, 128)
    layer = nn.TransformerEncoderLayer(width, heads, width * 4, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False), (tokens, width)


class Network(Handler):
    """Requests are empty: their item lies on the device already, as it does in the bare loop."""

    def initialize(self, context: Context) -> None:
        network, self.shape = globals()[context.config["network"]](quick=context.config["quick"])
        self.device = context.device
        self.dtype = torch.float16 if self.device.startswith("cuda") else torch.float32
        self.network = network.eval().to(self.device, self.dtype)
        self.item = self.inputs(1)[0]

    def inputs(self, batch: int) -> Any:
        """A batch of random numbers."""
        return torch.randn((batch, *self.shape), device=self.device).to(self.dtype)

    def stream(self) -> AbstractContextManager[Any]:
        """A stream of the calling thread's own, on a GPU."""
        if not self.device.startswith("cuda"):
            return contextlib.nullcontext()
        manager: AbstractContextManager[Any] = torch.cuda.stream(torch.cuda.Stream())
        return manager

    def preprocess(self, request: Request) -> Any:
        return self.item

    def inference(self, batch: Any) -> Any:
        with torch.inference_mode():
            outputs = self.network(batch)
        if self.device.startswith("cuda"):
            torch.cuda.current_stream().synchronize()
        return outputs

    def postprocess(self, output: Any) -> bytes:
        return b"ok"
