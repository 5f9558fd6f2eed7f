"""The `warmup` setting as it is written, and what is said about a wrong one."""

from __future__ import annotations

from typing import Any

import pytest

from mms.errors import ConfigError
from mms.model_settings import ModelSettings, merge_settings
from mms.samples import WarmupSample, parse_samples


def test_a_file_has_a_content_type_by_its_name_unless_it_is_given() -> None:
    assert parse_samples([{"file": "cat.jpg"}, {"file": "a/x.bin", "content_type": "image/png", "count": 3}]) == (
        WarmupSample(file="cat.jpg", content_type="image/jpeg"),
        WarmupSample(file="a/x.bin", content_type="image/png", count=3),
    )


def test_a_shape_has_a_dtype() -> None:
    assert parse_samples('[{"shape": [3, 2]}, {"shape": [], "dtype": "int64"}]') == (
        WarmupSample(shape=(3, 2), dtype="float32"),
        WarmupSample(shape=(), dtype="int64"),
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "a list of at most 100 samples"),
        ("cat.jpg", "a list of at most 100 samples"),
        pytest.param("[" * 100_000, "a list of at most 100 samples", id="bottomless"),
        (["cat.jpg"], "sample 1: either file: NAME or shape"),
        ([{"file": "a", "shape": [1]}], "sample 1: either file: NAME or shape"),
        ([{"file": "a"}, {"file": "b", "kount": 1}], "sample 2 has no kount; it may have file, content_type"),
        ([{"file": "../secret"}], "sample 1: file must name a file of the archive"),
        ([{"file": "/etc/passwd"}], "sample 1: file must name a file of the archive"),
        ([{"file": "a", "count": 0}], "sample 1: count must be a whole number from 1"),
        ([{"file": "a", "dtype": "int8"}], "and no dtype"),
        ([{"shape": [3], "dtype": "float31"}], "one of float16, bfloat16"),
        ([{"shape": [0]}], "a list of whole numbers from 1 on"),
        ([{"shape": [1 << 20, 1 << 20]}], "more than 1073741824 elements"),
    ],
)
def test_a_wrong_sample_is_named(value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        merge_settings(ModelSettings(), {"warmup": value}, "model-config.yaml", strict=True)
    assert raised.value.message.startswith("model-config.yaml: warmup = ")
    assert said in raised.value.message


def test_batch_sizes_of_graphs_are_in_order_and_within_bounds() -> None:
    assert merge_settings(ModelSettings(), {"cuda_graphs": "8, 1,4 8"}, "x", strict=True).cuda_graphs == (1, 4, 8)
    with pytest.raises(ConfigError, match="each must be from 1 to 65536"):
        merge_settings(ModelSettings(), {"cuda_graphs": [0]}, "x", strict=True)
