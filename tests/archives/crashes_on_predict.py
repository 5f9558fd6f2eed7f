"""Batch style: raises for every batch."""


def handle(data, context):
    if data is not None:
        raise ValueError("a secret of the handler")
