"""All stages of the request style; each fails for the body that names it. `slow bodies` share one batch."""

from mms.handler import Handler, PredictionError, Response


class Stages(Handler):
    def preprocess(self, request):
        text = bytes(request.data()).decode()
        if text == "preprocess":
            raise PredictionError("preprocess does not like this", status=422)
        return text

    def inference(self, batch):
        if "inference" in batch:
            raise ValueError("a secret of the handler")
        return [text.upper() for text in batch]

    def postprocess(self, output):
        if output == "POSTPROCESS":
            raise PredictionError("postprocess does not like this")
        return Response(output, status=203, content_type="text/x-loud", headers={"x-length": str(len(output))})
