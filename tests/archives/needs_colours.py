"""Uses a package that its requirements bring."""

import colours


def handle(data, context):
    if data is None:
        return None
    return [" ".join(colours.NAMES) for _ in data]
