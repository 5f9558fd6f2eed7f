"""`instances`: how it is written, what it plans on made-up GPUs, and where the next worker runs."""

from __future__ import annotations

from typing import Any

import pytest

from mms.errors import ConfigError
from mms.instances import InstanceGroup, parse_instances, show_instances
from mms.model_settings import ModelSettings, merge_settings
from mms.workers.gpus import Gpu
from mms.workers.placement import Place, Placement, plan

GPUS = [Gpu(0, "GPU-aa1"), Gpu(1, "GPU-ab2"), Gpu(2, "MIG-c3")]
MIXED = [{"kind": "gpu", "count": 2, "gpus": [0, 1], "threads": 2}, {"kind": "cpu", "count": 1}]


def settings(**changes: Any) -> ModelSettings:
    return merge_settings(ModelSettings(), changes, "test", strict=True)


def planned(seen: list[Gpu] = GPUS, /, **changes: Any) -> Placement:
    return plan(settings(**changes), seen, 4)


def short(place: Place) -> str:
    return "cpu" if place.gpu is None else str(place.gpu.index)


def filled(placement: Placement, count: int) -> list[Place]:
    taken: list[Place] = []
    for _ in range(count):
        taken.append(placement.next(taken))
    return taken


def test_gpus_with_several_workers_are_told_from_those_with_one() -> None:
    placement = planned(instances=[{"kind": "gpu", "gpus": [0, 1]}, {"kind": "gpu", "gpus": [0], "threads": 2}])
    assert placement.crowded(2) == set() and placement.crowded(3) == {GPUS[0]}
    assert placement.crowded(6) == {GPUS[0], GPUS[1]}


# how it is written


@pytest.mark.parametrize(
    "value", [MIXED, '[{"kind": "gpu", "count": 2, "gpus": [0, 1], "threads": 2}, {"kind": "cpu", "count": 1}]']
)
def test_instances_are_a_list_or_json(value: Any) -> None:
    assert parse_instances(value) == (InstanceGroup("gpu", 2, (0, 1), 2), InstanceGroup("cpu"))


def test_what_is_shown_can_be_read() -> None:
    groups = parse_instances(MIXED)
    assert parse_instances(show_instances(groups)) == groups
    assert parse_instances(show_instances(())) == ()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([{"kind": "tpu"}], "'tpu'.*kind"),
        ([{"count": 2}], "kind"),
        ([{"kind": "cpu", "count": 0}], ">= 1.*count"),
        ([{"kind": "cpu", "count": 9999}], "<= 1024.*count"),
        ([{"kind": "cpu", "count": True}], "count"),
        ([{"kind": "cpu", "threads": 65}], "<= 64.*threads"),
        ([{"kind": "cpu", "cuont": 1}], "cuont"),
        ([{"kind": "cpu", "gpus": [0]}], "gpus is for groups of kind gpu"),
        ([{"kind": "gpu", "gpus": ["zero"]}], "'zero' is neither"),
        ([{"kind": "gpu", "gpus": [-1]}], "'-1' is neither"),
        ({"kind": "cpu"}, "array"),
        ("cpu", "a list is needed"),
        (5, "array"),
        (None, "array"),
    ],
)
def test_what_instances_cannot_be(value: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"test: instances = .*: .*{reason}"):
        settings(instances=value)


@pytest.mark.parametrize(
    ("value", "gpus"), [("0, GPU-ab2", (0, "GPU-ab2")), ([0, "1"], (0, 1)), ("", ()), (["MIG-c3"], ("MIG-c3",))]
)
def test_gpus_are_numbers_or_uuids(value: Any, gpus: tuple[int | str, ...]) -> None:
    assert settings(gpus=value).gpus == gpus


# which source says where


@pytest.mark.parametrize("other", [{"device": "cpu"}, {"deviceIds": [0]}])
def test_one_source_says_once_where_workers_run(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"and so does {next(iter(other))}: one must go"):
        settings(instances=MIXED, **other)


def test_later_instances_replace_what_was_said_of_devices_and_workers() -> None:
    before = settings(device="cpu", gpus=[2], min_workers=3, max_workers=5)
    after = merge_settings(before, {"instances": MIXED}, "test", strict=True)
    assert (after.device, after.gpus, after.min_workers, after.max_workers) == ("auto", (), -1, -1)


def test_a_later_device_replaces_instances() -> None:
    after = merge_settings(settings(instances=MIXED), {"deviceType": "cpu"}, "test", strict=True)
    assert (after.instances, after.device) == ((), "cpu")


def test_workers_beside_instances_say_how_many_of_them_run() -> None:
    after = settings(instances=MIXED, min_workers=1, max_workers=9)
    assert (plan(after, GPUS, 4).size, after.min_workers, after.max_workers) == (5, 1, 9)


def test_a_model_that_torchserve_splits_over_gpus_is_refused() -> None:
    with pytest.raises(ConfigError, match="parallelType = 'pp': a worker has one GPU"):
        merge_settings(ModelSettings(), {"parallelType": "pp"}, "test", strict=False)


# the plan


def test_without_instances_there_is_one_worker_per_gpu() -> None:
    assert [short(place) for place in filled(planned(), 3)] == ["0", "1", "2"]
    assert planned().size == 3


def test_without_gpus_there_is_one_worker_per_core() -> None:
    assert planned([]).size == 4
    assert {short(place) for place in filled(planned([]), 4)} == {"cpu"}


def test_the_devices_of_torchserve_are_a_plan() -> None:
    assert planned(deviceType="gpu", deviceIds=[2, 0]).gpus == (0, 2)
    assert [short(place) for place in filled(planned(deviceIds=[2, 0]), 3)] == ["2", "0", "2"]
    assert planned(deviceType="cpu").gpus == ()


def test_groups_are_filled_in_their_order_and_devices_in_turn() -> None:
    placement = planned(instances=MIXED)
    assert [short(place) for place in filled(placement, 7)] == ["0", "1", "0", "1", "cpu", "0", "1"]
    assert (placement.size, placement.gpus) == (5, (0, 1))


def test_threads_are_those_of_the_group_or_of_the_model() -> None:
    places = filled(planned(instances=MIXED, threads=3), 5)
    assert [place.threads for place in places] == [2, 2, 2, 2, 3]


def test_a_replacement_takes_the_place_that_is_free() -> None:
    placement = planned(instances=MIXED)
    for gone in range(5):
        taken = filled(placement, 5)
        place = taken.pop(gone)
        assert placement.next(taken) == place


@pytest.mark.parametrize("count", range(1, 13))
def test_what_was_filled_last_is_given_up_first(count: int) -> None:
    placement = planned(instances=MIXED)
    taken = filled(placement, count)
    assert placement.last(taken) == taken[-1]


def test_a_place_named_twice_holds_the_workers_of_both() -> None:
    placement = planned(instances=[{"kind": "gpu", "gpus": [0]}, {"kind": "cpu"}, {"kind": "gpu", "gpus": ["GPU-aa1"]}])
    assert placement.size == 3
    assert [short(place) for place in filled(placement, 3)] == ["0", "0", "cpu"]


def test_uuids_and_their_beginnings_mean_the_gpus_that_cuda_means() -> None:
    assert planned(instances=[{"kind": "gpu", "gpus": ["GPU-ab", "MIG-c3"]}]).gpus == (1, 2)
    assert planned(gpus=["MIG-c3"]).gpus == (2,)


@pytest.mark.parametrize(
    ("gpus", "changes", "message"),
    [
        (GPUS, {"instances": [{"kind": "gpu", "gpus": [0, 3]}]}, "gpus: 3 does not exist"),
        (GPUS, {"instances": [{"kind": "gpu", "gpus": ["GPU-a", 7]}]}, "gpus: GPU-a, 7 do not exist"),
        (GPUS, {"deviceIds": [3]}, "gpus: 3 does not exist"),
    ],
)
def test_f111_devices_that_are_not_there_are_refused_with_those_that_are(
    gpus: list[Gpu], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"{message}; this server sees: 0 .GPU-aa1., 1 .GPU-ab2., 2 .MIG-c3."):
        planned(gpus, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instances": [{"kind": "gpu"}]}, "kind gpu needs a GPU; this server sees: none"),
        ({"instances": [{"kind": "gpu", "gpus": [0]}]}, "gpus: 0 does not exist; this server sees: none"),
        ({"device": "gpu"}, "device = gpu: this machine has no GPU"),
        ({"instances": [{"kind": "cpu", "count": 1024}] * 2}, "2048 workers in all, at most 1024"),
    ],
)
def test_what_a_server_without_gpus_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned([], **changes)


def test_a_worker_on_the_cpu_sees_no_gpu() -> None:
    (on_cpu,) = filled(planned(instances=[{"kind": "cpu"}]), 1)
    assert on_cpu.environment() == {"CUDA_VISIBLE_DEVICES": ""}
    assert filled(planned(device="cpu"), 1)[0].environment() == {"CUDA_VISIBLE_DEVICES": ""}
    assert filled(planned([]), 1)[0].environment() == {}, "there are none that we know: left as the server has it"
    assert filled(planned(), 1)[0].environment()["CUDA_VISIBLE_DEVICES"] == "GPU-aa1"


def test_the_groups_are_described_with_the_numbers_of_their_gpus() -> None:
    assert planned(instances=[{"kind": "gpu", "gpus": ["MIG-c3"]}, {"kind": "cpu", "threads": 4}]).describe() == [
        {"kind": "gpu", "count": 1, "gpus": [2], "threads": 1},
        {"kind": "cpu", "count": 1, "threads": 4},
    ]
