"""Batch style: answers with its row as Python wrote it, so that types are visible (form fields, JSON, text, bytes)."""


def handle(data, context):
    if data is None:
        return None
    return [repr(dict(sorted(row.items()))) for row in data]
