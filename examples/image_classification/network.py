"""The network that the weights are for. It is in the archive; the worker makes one and loads the weights into it."""

from __future__ import annotations

from efficientnet_lite_pytorch import EfficientNet, get_model_params


class EfficientNetLite0(EfficientNet):
    """EfficientNet-Lite0 as it was trained on ImageNet: pictures of 224 x 224 in, a thousand scores out."""

    def __init__(self) -> None:
        super().__init__(*get_model_params("efficientnet-lite0", None))
