"""What surrounds a worker: environment variables, and the CPUs and the memory that it may count on."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic

_PASSED = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_.*|TZ|LD_LIBRARY_PATH|LD_PRELOAD|MALLOC_.*|PYTHON[A-Z]*|SSL_CERT_.*|"
    r"CUDA_.*|NVIDIA_.*|NCCL_.*|HIP_.*|ROCR_.*|TORCH.*|PYTORCH_.*|HF_.*|TRANSFORMERS_.*|OMP_.*|KMP_.*|MKL_.*|OPENBLAS_.*|"
    r"XDG_CACHE_HOME|HTTPS?_PROXY|NO_PROXY|https?_proxy|no_proxy"
)

# From this size on a copy passes the caches by, which else first fetch the memory that it overwrites: glibc's own bound
# depends on the size of the last cache, and may be tens of MiB. Read once, when a process starts.
_BOUND = "glibc.cpu.x86_non_temporal_threshold"
LARGE_COPY = 1 << 20


def worker_environment(extra: Sequence[str]) -> dict[str, str]:
    """The allow-listed variables of this process, and those named in `extra`; large bodies are copied quickly."""
    environ = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name) or name in extra}
    return environ | {"PYTHONUNBUFFERED": "1"} | quick_copies(os.environ)


def quick_copies(environ: Mapping[str, str]) -> dict[str, str]:
    """The variable by which copies of large bodies take half the time, unless it says otherwise already."""
    tunables = environ.get("GLIBC_TUNABLES", "")
    added = "" if _BOUND in tunables else f":{_BOUND}={LARGE_COPY}"
    return {"GLIBC_TUNABLES": (tunables.strip(":") + added).lstrip(":")}


def thread_counts(threads: int) -> dict[str, str]:
    """The variables by which the usual libraries take `threads` CPU threads."""
    return dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))


def cores() -> int:
    """The CPU cores this process may use: its affinity, and of that what its control groups grant (rounded up).

    May be a second old.
    """
    return _cores(int(monotonic()))


@functools.lru_cache(maxsize=1)  # a registration asks six times, and each time a dozen files would be read
def _cores(second: int) -> int:
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """CPUs by the control groups of this process (v2 `cpu.max`, v1 `cpu.cfs_quota_us`); infinite without a limit.

    A group is bound by those above it. In a container the files of its own group lie where the hierarchy is mounted.
    """
    return min([limit for group in _groups("cpu", root) for limit in _limits(group)], default=math.inf)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of the control groups that bound this process, its own first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / controllers
        own = mounted / path.lstrip("/")
        for group in (own, *own.parents):
            yield group
            if group == mounted:
                break


def _limits(group: Path) -> Iterator[float]:
    """The group's own limits in CPUs; at least one infinite one."""
    yield math.inf
    with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
        allowed, period = (group / "cpu.max").read_text().split()
        yield int(allowed) / int(period)
    with contextlib.suppress(OSError, ValueError):
        allowed, period = (group / "cpu.cfs_quota_us").read_text(), (group / "cpu.cfs_period_us").read_text()
        if int(allowed) > 0:
            yield int(allowed) / int(period)


def memory(root: Path = Path("/")) -> int:
    """Bytes of memory this process may use: the machine's, and of that what its control groups grant."""
    import psutil  # later: this module is imported before the first fork server is started

    return min(psutil.virtual_memory().total, *(_memory_limit(group) for group in _groups("memory", root)), 1 << 62)


def _memory_limit(group: Path) -> int:
    for name in ("memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
            return int((group / name).read_text())
    return 1 << 62
