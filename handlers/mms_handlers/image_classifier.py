"""`image_classifier`: a picture in, its most likely labels out as `{label: probability}`. In the worker process."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2

from mms.handler import Context, Handler, PredictionError, Request
from mms_handlers.loading import load_model, options

__all__ = ["ImageClassifier"]

DEFAULTS = {
    "image_size": 224,
    "resize": 256,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "top_k": 5,
    "interpolation": "bilinear",
}


class ImageClassifier(Handler):
    """Classifies pictures with any network that takes N x 3 x H x W and gives one score per class."""

    def initialize(self, context: Context) -> None:
        """Reads the `image_classifier` section of model-config.yaml and index_to_name.json; both may be missing."""
        settings = options(context, "image_classifier", DEFAULTS)
        self.model = load_model(context)
        self.device = context.device
        self.top_k = int(settings["top_k"])
        self.transform = _build_transform(settings)
        self.labels = _read_labels(context)

    def preprocess(self, request: Request) -> tuple[torch.Tensor, int]:
        """The picture as the network wants it, and how many labels this client asks for (`?top_k=3`)."""
        return self.transform(request.image()), _requested_top_k(request, self.top_k)

    def collate(self, items: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, list[int]]:
        """The pictures as one batch, the counts beside it."""
        return torch.stack([picture for picture, _ in items]), [top_k for _, top_k in items]

    def inference(self, batch: tuple[torch.Tensor, list[int]]) -> list[list[tuple[int, float]]]:
        """Per picture its most likely classes, best first."""
        pictures, counts = batch
        with torch.inference_mode():
            probabilities = self.model(pictures.to(self.device)).float().softmax(dim=1)
            best = probabilities.topk(min(max(counts), probabilities.shape[1]))
        rows = zip(best.indices.tolist(), best.values.tolist(), counts, strict=True)
        return [list(zip(indices, values, strict=True))[:count] for indices, values, count in rows]

    def postprocess(self, output: list[tuple[int, float]]) -> dict[str, float]:
        """`{label: probability}`, most likely first."""
        return {self.labels.get(index, str(index)): probability for index, probability in output}


def _build_transform(settings: dict[str, Any]) -> v2.Compose:
    names = [mode.value for mode in InterpolationMode]
    if settings["interpolation"] not in names:
        raise ValueError(
            f"model-config.yaml: interpolation {settings['interpolation']!r} is none of {', '.join(names)}"
        )
    return v2.Compose(
        [
            v2.Resize(settings["resize"], interpolation=InterpolationMode(settings["interpolation"])),
            v2.CenterCrop(settings["image_size"]),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(settings["mean"], settings["std"]),
        ]
    )


def _read_labels(context: Context) -> dict[int, str]:
    path = context.model_dir / "index_to_name.json"
    if not path.exists():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))
    # TorchServe's files hold either "tabby" or ["n02123045", "tabby"].
    labels = {int(index): str(name[-1] if isinstance(name, list) else name) for index, name in entries.items()}
    # ImageNet has two cranes; as keys of one JSON object they would overwrite each other.
    shared = {name for name, count in Counter(labels.values()).items() if count > 1}
    return {index: f"{name} ({index})" if name in shared else name for index, name in labels.items()}


def _requested_top_k(request: Request, default: int) -> int:
    text = request.query.get("top_k")
    if text is None:
        return default
    if not text.isdecimal() or len(text) > 6 or int(text) < 1:
        raise PredictionError(f"top_k must be a whole number of at least 1, not {text[:20]!r}")
    return int(text)
