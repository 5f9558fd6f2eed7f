"""Yields the chunks that the body lists, each after its gate: a JSON list of chunks; {"gate": path} waits for a file.

Other objects: {"raise": text}, {"note": path} (written when the generator is closed or ends), {"echo": value}.
"""

import json
import os
import threading


def handle(data, context):
    if data is None:
        return None
    return [_chunks(json.loads(bytes(row["body"]))) for row in data]


def _chunks(steps):
    if not isinstance(steps, list):
        return steps
    return _generate(steps)


def _generate(steps):
    notes = []
    try:
        for step in steps:
            match step:
                case {"gate": path}:
                    with open(f"{path}.begun", "a") as file:
                        file.write(f"{os.getpid()} 1\n")
                    while not os.path.exists(path):
                        threading.Event().wait(0.002)
                case {"raise": text}:
                    raise ValueError(text)
                case {"note": path}:
                    notes.append(path)
                case {"echo": value}:
                    yield value
                case {"bytes": text}:
                    yield text.encode()
                case {"nothing": times}:
                    for _ in range(times):
                        threading.Event().wait(0.01)
                        yield None
                case {"repeat": text, "times": times}:
                    for _ in range(times):
                        yield text
                case _:
                    yield step
    finally:
        for path in notes:
            with open(path, "a") as file:
                file.write("closed\n")
