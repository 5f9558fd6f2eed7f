"""The work of `work.py` in the archives of Multi Model Server and TorchServe."""

import work

_work = None


def handle(data, context):
    global _work
    if _work is None:
        _work = work.from_environment()
    if data is None:
        return None
    items = [_work.parse(row["body"]) for row in data]
    if _work.content_type == "application/json":
        for index in range(len(items)):
            context.set_response_content_type(index, "application/json")
    return [_work.answer(result).decode() for result in _work.forward(items)]
