"""Trains a classifier on scikit-learn's handwritten digits, stores its numbers and runs model-archiver."""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

HERE = Path(__file__).resolve().parent
MODEL_NAME = "digits"


def split_digits() -> list[Any]:
    """Training pictures, held-out pictures, and the digits of each; the same split every time."""
    pictures, digits = load_digits(return_X_y=True)
    split: list[Any] = train_test_split(pictures / 16, digits, test_size=0.25, random_state=0, stratify=digits)
    return split


def train(path: Path) -> float:
    """Stores the fitted numbers in `path`; the accuracy on the held-out digits."""
    pictures, held_out, digits, held_out_digits = split_digits()
    classifier = LogisticRegression(C=10, max_iter=1000).fit(pictures, digits)
    numpy.savez(path, classes=classifier.classes_, coefficients=classifier.coef_, intercepts=classifier.intercept_)
    return float(classifier.score(held_out, held_out_digits))


def package(export_path: Path) -> None:
    """Writes the archive into the folder `export_path`."""
    export_path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        fitted = Path(name) / "digits.npz"
        print(f"accuracy on {len(split_digits()[1])} held-out digits: {train(fitted):.3f}", flush=True)
        command = [
            f"{sysconfig.get_path('scripts')}/model-archiver",
            *("--model-name", MODEL_NAME),
            *("--version", "1.0"),
            *("--handler", f"{HERE / 'handler.py'}:Digits"),
            *("--serialized-file", str(fitted)),
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
