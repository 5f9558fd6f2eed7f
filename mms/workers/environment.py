"""What surrounds a worker: environment variables, CPU threads, an archive's own virtual environment."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from mms.errors import ModelLoadError

log = logging.getLogger("mms.environment")

INSTALL_LIMIT = 1800.0
KEPT_LINES = 20
_PASSED = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_.*|TZ|LD_LIBRARY_PATH|LD_PRELOAD|MALLOC_.*|PYTHON[A-Z]*|SSL_CERT_.*|"
    r"CUDA_.*|NVIDIA_.*|NCCL_.*|HIP_.*|ROCR_.*|TORCH.*|PYTORCH_.*|HF_.*|TRANSFORMERS_.*|OMP_.*|KMP_.*|MKL_.*|OPENBLAS_.*|"
    r"XDG_CACHE_HOME|HTTPS?_PROXY|NO_PROXY|https?_proxy|no_proxy"
)
_installing: defaultdict[Path, asyncio.Lock] = defaultdict(asyncio.Lock)


def worker_environment(extra: Sequence[str]) -> dict[str, str]:
    """The allow-listed variables of this process, and those named in `extra`."""
    environ = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name) or name in extra}
    return environ | {"PYTHONUNBUFFERED": "1"}


def thread_counts(threads: int) -> dict[str, str]:
    """The variables by which the usual libraries take `threads` CPU threads."""
    return dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))


def cores() -> int:
    """The CPU cores this process may use: its affinity, and of that what its control groups grant (rounded up)."""
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
    return min(psutil.virtual_memory().total, *(_memory_limit(group) for group in _groups("memory", root)), 1 << 62)


def _memory_limit(group: Path) -> int:
    for name in ("memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
            return int((group / name).read_text())
    return 1 << 62


async def own_interpreter(requirements: Path, cache: Path, scratch: Path, output: logging.Logger, label: str) -> str:
    """The Python of a virtual environment that has `requirements`, made on first use and found again by their content.

    It is made in `scratch` and moved to `cache` when it is complete, as other servers use that, too. The server's own
    packages are visible behind its own, so that a worker can run there. What pip says goes to `output`. Raises
    ModelLoadError.
    """
    digest = await asyncio.to_thread(_digest, requirements)
    folder = cache / digest
    python = folder / "bin" / "python"
    async with _installing[folder]:
        if not python.exists():
            try:
                async with asyncio.timeout(INSTALL_LIMIT):
                    await _install(requirements, folder, scratch, output, label)
            except TimeoutError:
                limit = f"{INSTALL_LIMIT:g} s"
                raise ModelLoadError(f"the requirements of {label} could not be installed within {limit}") from None
            except OSError as error:
                raise ModelLoadError(f"the requirements of {label} cannot be installed: {error}") from None
    return str(python)


def _digest(requirements: Path) -> str:
    """Of the interpreter, the requirements and the files beside them that they name (wheels in the archive)."""
    text = requirements.read_bytes()
    digest = hashlib.sha256(f"{sys.version} {sys.prefix}".encode() + text)
    for line in text.decode("utf-8", "replace").splitlines():
        with contextlib.suppress(OSError, ValueError):
            digest.update((requirements.parent / line.strip()).read_bytes())
    return digest.hexdigest()[:16]


async def _install(requirements: Path, folder: Path, scratch: Path, output: logging.Logger, label: str) -> None:
    log.info("%s: installing %s into %s", label, requirements.name, folder)
    building = Path(tempfile.mkdtemp(prefix="venv-", dir=scratch))
    try:
        python = str(building / "bin" / "python")
        await _run(output, label, sys.executable, "-m", "venv", "--without-pip", str(building))
        if not _show_server_packages(building):
            await _run(output, label, python, "-m", "ensurepip")
        pip = (python, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-color")
        await _run(
            output, label, *pip, "install", "--progress-bar", "off", "-r", str(requirements), cwd=requirements.parent
        )
        os.rename(building, folder)  # what stands at `folder` is complete
    except OSError:
        if not await asyncio.to_thread(folder.exists):  # otherwise another server was quicker
            raise
    finally:
        await asyncio.to_thread(shutil.rmtree, building, ignore_errors=True)
    log.info("%s: installed %s", label, requirements.name)


def _show_server_packages(building: Path) -> bool:
    """Let the environment see the server's packages behind its own; whether pip is among them."""
    base = list(dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))))
    site = building / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "server.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in base))
    return any(Path(path, "pip").is_dir() for path in base)


async def _run(output: logging.Logger, label: str, *command: str, cwd: Path | None = None) -> None:
    """Run to the end, each line to the log. Raises ModelLoadError; if it is given up, all it has started ends."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=cwd,
        limit=1 << 20,  # bytes in one line
        start_new_session=True,
    )
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=KEPT_LINES)
    try:
        async for line in process.stdout:
            last.append(line.decode("utf-8", "backslashreplace").rstrip())
            output.info("[%s install] %s", label, last[-1])
        await process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        raise
    if process.returncode:
        lines = [line for line in last if line.strip()] or [f"exit code {process.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1])
        raise ModelLoadError(
            f"the requirements of {label} cannot be installed: {reason.removeprefix('ERROR: ')}",
            traceback="\n".join(lines),
        )
