"""Batch style: a batch with the body `bad` in it fails as a whole; `unlucky` gets an error of its own."""

from mms.handler import PredictionError


def handle(data, context):
    if data is None:
        return None
    bodies = [bytes(row["body"]) for row in data]
    if b"bad" in bodies:
        raise ValueError("one of them is bad")
    return [PredictionError("no luck", status=418) if body == b"unlucky" else body for body in bodies]
