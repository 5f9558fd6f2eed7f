"""Answers with the CPU threads that numpy's BLAS and torch use; torch's are 0 where it is not imported."""

import json
import sys

import numpy  # noqa: F401 - its BLAS is what is asked about
import threadpoolctl


def handle(data, context):
    if data is None:
        return None
    blas = [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if "numpy" in pool["filepath"]]
    torch = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 0
    return [json.dumps([*blas, torch]) for _ in data]
