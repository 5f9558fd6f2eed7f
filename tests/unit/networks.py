"""Real networks for the tests of the built-in handlers. They import it when they run: torch takes seconds."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import torch
from safetensors.torch import save_file

BATCH = torch.export.Dim("batch")
SOURCE = """
import torch

class Double(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x * self.factor
"""


class Colours(torch.nn.Module):  # type: ignore[misc]  # torch is not looked into
    """Scores a picture by the mean of its red, green and blue."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.mean(dim=(2, 3))


class Sums(torch.nn.Module):  # type: ignore[misc]  # torch is not looked into
    """Two outputs per row: its sum, and the row doubled."""

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rows.sum(dim=1), rows * 2


class Double(torch.nn.Module):  # type: ignore[misc]  # torch is not looked into
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * 2


class Normed(torch.nn.Sequential):  # type: ignore[misc]  # torch is not looked into
    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))


NETWORKS = {network.__name__: network for network in (Colours, Sums, Double, Normed)}


@functools.cache
def exported(name: str, shape: tuple[int, ...], dynamic: bool) -> bytes:
    """A .pt2 file."""
    shapes = ({0: BATCH},) if dynamic else None
    file = io.BytesIO()
    network = NETWORKS[name]().eval()
    torch.export.save(torch.export.export(network, (torch.zeros(shape),), dynamic_shapes=shapes), file)
    return file.getvalue()


def save_weights(path: Path, file: str) -> None:
    """3 as the factor of SOURCE, in safetensors or torch's own format."""
    weights = {"factor": torch.tensor([3.0])}
    if file.endswith(".safetensors"):
        save_file(weights, path / file)
    else:
        torch.save(weights, path / file)
