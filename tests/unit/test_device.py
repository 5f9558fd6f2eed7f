"""What threads of a worker have of their own in torch."""

from __future__ import annotations

import threading

import pytest

from mms.backend.device import modes


def test_a_thread_computes_gradients_only_where_the_one_that_loaded_does() -> None:
    torch = pytest.importorskip("torch")
    seen: list[bool] = []

    def run() -> None:
        begin()
        seen.append(torch.is_grad_enabled())

    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            begin = modes()
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
    assert seen == [False, True]
