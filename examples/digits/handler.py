"""Names the handwritten digit in an 8 x 8 picture: scikit-learn behind `mms.handler.Handler`. In the worker process."""

from __future__ import annotations

from typing import Any

import numpy
from sklearn.linear_model import LogisticRegression

from mms.handler import Context, Handler, PredictionError, Request

PIXELS = 64


class Digits(Handler):
    """Takes `[64 numbers from 0 to 16]`, or the same as 8 rows, and answers `{"digit": 3, "probability": 0.98}`."""

    def initialize(self, context: Context) -> None:
        """Rebuilds the classifier from its fitted numbers: an archive with a pickle could run any code at load."""
        with numpy.load(context.path("digits.npz"), allow_pickle=False) as fitted:
            self.classifier = LogisticRegression()
            self.classifier.classes_ = fitted["classes"]
            self.classifier.coef_ = fitted["coefficients"]
            self.classifier.intercept_ = fitted["intercepts"]

    def preprocess(self, request: Request) -> Any:
        """The picture as 64 numbers from 0 to 1."""
        try:
            pixels = numpy.asarray(request.json(), dtype=numpy.float64)
        except (ValueError, TypeError):
            raise PredictionError("the body must be a JSON list of numbers") from None
        if pixels.shape not in ((PIXELS,), (8, 8)):
            raise PredictionError(f"a picture has 64 numbers, or 8 rows of 8; this has the shape {list(pixels.shape)}")
        if not (pixels.min() >= 0 and pixels.max() <= 16):
            raise PredictionError("a pixel is a number from 0 (white) to 16 (black)")
        return pixels.reshape(PIXELS) / 16

    def inference(self, batch: Any) -> Any:
        """Per picture the probability of each digit."""
        return self.classifier.predict_proba(batch)

    def postprocess(self, output: Any) -> dict[str, Any]:
        """The most likely digit."""
        best = int(output.argmax())
        return {"digit": int(self.classifier.classes_[best]), "probability": float(output[best])}
