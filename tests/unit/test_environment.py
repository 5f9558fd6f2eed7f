"""What surrounds a worker: the CPUs that control groups grant, and the variables it gets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from mms.workers import environment
from mms.workers.environment import cores, cpu_quota, thread_counts, worker_environment


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "4:memory:/box\n3:cpu,cpuacct:/box\n2:cpuset:/box\n"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, math.inf),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
            },
            2.0,
        ),
        ({"proc/self/cgroup": "0::/not/mounted/here\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        ({"proc/self/cgroup": V1}, math.inf),
    ],
)
def test_the_tightest_control_group_counts(tmp_path: Path, files: dict[str, str], cpus: float) -> None:
    assert cpu_quota(write(tmp_path, **files)) == cpus


class Quota:
    """The CPUs that control groups grant, of three in all, and how late it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cpus = math.inf
        self.now = 0.0
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
        monkeypatch.setattr("mms.workers.environment.cpu_quota", lambda: self.cpus)
        monkeypatch.setattr("mms.workers.environment.monotonic", lambda: self.now)


@pytest.fixture
def quota(monkeypatch: pytest.MonkeyPatch) -> Iterator[Quota]:
    forget = environment._cores.cache_clear
    forget()
    yield Quota(monkeypatch)
    forget()


@pytest.mark.parametrize(("cpus", "expected"), [(0.5, 1), (1.5, 2), (2.0, 2), (math.inf, 3)])
def test_cores_are_what_affinity_and_quota_leave(quota: Quota, cpus: float, expected: int) -> None:
    quota.cpus = cpus
    assert cores() == expected


def test_cores_are_looked_up_once_a_second(quota: Quota) -> None:
    assert cores() == 3
    quota.cpus = 1.0
    assert cores() == 3
    quota.now += 1
    assert cores() == 1


def test_workers_get_the_usual_variables_and_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_CACHE_PATH", "SECRET", "WANTED"):
        monkeypatch.setenv(name, "x")
    environ = worker_environment(("WANTED",))
    assert {"CUDA_CACHE_PATH", "WANTED", "PATH"} <= environ.keys() and "SECRET" not in environ
    assert set(thread_counts(3).values()) == {"3"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param("", "glibc.cpu.x86_non_temporal_threshold=1048576", id="none"),
        pytest.param(
            "glibc.malloc.check=1",
            "glibc.malloc.check=1:glibc.cpu.x86_non_temporal_threshold=1048576",
            id="others",
        ),
        pytest.param(
            "glibc.cpu.x86_non_temporal_threshold=0x8000", "glibc.cpu.x86_non_temporal_threshold=0x8000", id="its-own"
        ),
    ],
)
def test_copies_of_large_bodies_are_quick_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", given)
    assert worker_environment(())["GLIBC_TUNABLES"] == expected
