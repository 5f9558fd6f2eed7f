"""How the settings of a model come from a file or a call: spellings, bounds, what does not fit together."""

from __future__ import annotations

from typing import Any

import pytest

from mms.errors import ConfigError
from mms.model_settings import ModelSettings, merge_settings
from mms.safe_yaml import parse_yaml


def model(changes: dict[str, Any], *, strict: bool = True) -> ModelSettings:
    return merge_settings(ModelSettings(), changes, "test", strict=strict)


def test_the_spellings_of_torchserve_are_understood() -> None:
    settings = model(
        {
            "batchSize": 4, "maxBatchDelay": 100, "minWorkers": 1, "maxWorkers": 2, "responseTimeout": 30,
            "startupTimeout": 60, "jobQueueSize": 7, "deviceType": "gpu", "deviceIds": [0, 2],
        }
    )  # fmt: skip
    assert settings == ModelSettings(
        batch_size=4, max_batch_delay=0.1, min_workers=1, max_workers=2, response_timeout=30.0, startup_timeout=60.0,
        queue_size=7, device="gpu", gpus=(0, 2),
    )  # fmt: skip
    assert settings.worker_limit == 2


def test_other_keys_belong_to_the_handler_or_are_a_mistake() -> None:
    assert model({"topk": 5, "batch_size": 2}, strict=False).batch_size == 2
    with pytest.raises(ConfigError, match="test: unknown setting batchsize; did you mean batch_size"):
        model({"batchsize": 5})


def test_more_workers_at_least_than_at_most_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_workers 1 is less than min_workers 2"):
        model({"min_workers": 2, "max_workers": 1})


@pytest.mark.parametrize(("text", "value"), [("isolate_errors: true", "true"), ("isolate_errors: off", "false")])
def test_true_and_false_may_be_written_as_yaml_has_them(text: str, value: str) -> None:
    assert model(parse_yaml(text.encode(), "test")).isolate_errors == value


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("batch_size", "x", "a whole number is needed"),
        ("batch_size", None, "a whole number is needed"),
        ("batch_size", "9" * 5000, "a whole number is needed"),
        ("max_requests", 1 << 63, "a smaller number is needed"),
        ("queue_bytes", "9000000000GiB", "a size of less than 8 EiB is needed"),
        ("queue_timeout", [1], "a number is needed"),
        ("queue_timeout", 10**400, "a number is needed"),
        ("min_workers", 1025, "must be at most 1024"),
        ("max_workers", 1025, "must be at most 1024"),
        ("batch_size", 1 << 40, "must be at most 65536"),
        ("queue_size", 10**9, "must be at most 1000000"),
        ("cpu_threads", 1025, "must be at most 1024"),
    ],
)
def test_a_wrong_number_is_refused_in_our_own_words(name: str, value: Any, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model({name: value})
    assert caught.value.message.startswith(f"test: {name} = ")
    assert caught.value.message.endswith(f": {reason}")
    assert len(caught.value.message) < 300


def test_an_error_keeps_the_spelling_of_the_caller() -> None:
    with pytest.raises(ConfigError, match=r"test: batchSize = 'x'"):
        model({"batchSize": "x"})


@pytest.mark.parametrize("retry", [-1, 2])
def test_a_job_is_retried_once_or_never(retry: int) -> None:
    assert model({"retry": 0}).retry == 0
    with pytest.raises(ConfigError, match="retry"):
        model({"retry": retry})
