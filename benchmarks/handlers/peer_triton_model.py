"""The work of `work.py` in Triton's Python backend: bytes in and out, or the tensor that Triton has made of JSON."""

import os
import sys

sys.path[:0] = os.environ["PEER_PATH"].split(os.pathsep)

import numpy  # noqa: E402  # found by the path above, as the others are
import triton_python_backend_utils as backend  # noqa: E402
import work  # noqa: E402


class TritonPythonModel:
    def initialize(self, arguments):
        self.work = work.from_environment()
        self.tensors = os.environ["PEER_WORK"] != "noop"

    def execute(self, requests):
        inputs = [backend.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        if self.tensors:
            rows = self.work.forward(numpy.concatenate(inputs))
            outputs = [numpy.array([row], numpy.float32) for row in rows]
        else:
            items = [self.work.parse(array.reshape(-1)[0]) for array in inputs]
            outputs = [numpy.array([[self.work.answer(result)]], object) for result in self.work.forward(items)]
        return [backend.InferenceResponse([backend.Tensor("y", output)]) for output in outputs]
