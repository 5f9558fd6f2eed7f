"""Answers with the number of CPU threads that its worker was given."""

import os


def handle(data, context):
    if data is None:
        return None
    return [os.environ["OMP_NUM_THREADS"] for _ in data]
