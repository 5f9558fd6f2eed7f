"""What surrounds a worker: environment variables, GPUs, CPU threads, an archive's own virtual environment."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import hashlib
import logging
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mms.errors import ModelLoadError
from mms.metrics import GpuFacts

log = logging.getLogger("mms.environment")

INSTALL_LIMIT = 1800.0
_PASSED = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_.*|TZ|TMPDIR|LD_LIBRARY_PATH|LD_PRELOAD|MALLOC_.*|PYTHON[A-Z]*|SSL_CERT_.*|"
    r"CUDA_.*|NVIDIA_.*|NCCL_.*|HIP_.*|ROCR_.*|TORCH.*|PYTORCH_.*|HF_.*|TRANSFORMERS_.*|OMP_.*|KMP_.*|MKL_.*|OPENBLAS_.*|"
    r"XDG_CACHE_HOME|HTTPS?_PROXY|NO_PROXY|https?_proxy|no_proxy"
)


def worker_environment(threads: int, extra: Sequence[str]) -> dict[str, str]:
    """The allow-listed variables of this process, those named in `extra`, and thread counts for the usual libraries."""
    environ = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name) or name in extra}
    counts = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return environ | counts | {"PYTHONUNBUFFERED": "1"}


def cores() -> int:
    """The CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def find_gpus() -> list[int]:
    """Indexes of the NVIDIA GPUs, as far as CUDA_VISIBLE_DEVICES lets this server see them."""
    found = [int(path.removeprefix("/dev/nvidia")) for path in glob.glob("/dev/nvidia[0-9]*")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return sorted(found)
    wanted = [int(word) for word in visible.split(",") if word.strip().isdigit()]
    return [index for index in wanted if index in found]


class GpuMonitor:
    """Utilisation and memory of the GPUs through NVML, where nvidia-ml-py is installed (extra `gpu`)."""

    def __init__(self) -> None:
        self._nvml = None
        if find_gpus():
            with contextlib.suppress(ImportError):
                import pynvml

                try:
                    pynvml.nvmlInit()
                    self._nvml = pynvml
                except pynvml.NVMLError as error:
                    log.warning("NVML is not available, GPU metrics are missing: %s", error)

    def facts(self) -> Iterator[GpuFacts]:
        """One reading per GPU; nothing without NVML. Blocking: call it outside the event loop."""
        nvml = self._nvml
        if nvml is None:
            return
        for index in find_gpus():
            with contextlib.suppress(nvml.NVMLError):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                used = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
                yield GpuFacts(index, nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100, used)


async def own_interpreter(requirements: Path, cache: Path, scratch: Path) -> str:
    """The Python of a virtual environment that has `requirements`, made on first use and found again by their hash.

    It is made in `scratch` and moved to `cache` when it is complete, as other servers use that, too.

    The server's own packages are visible behind its own, so that a worker can run there. Raises ModelLoadError.
    """
    digest = await asyncio.to_thread(_digest, requirements)
    folder = cache / digest
    python = folder / "bin" / "python"
    if not python.exists():
        log.info("installing %s into %s", requirements.name, folder)
        building = Path(tempfile.mkdtemp(prefix="venv-", dir=scratch))
        try:
            await _run(sys.executable, "-m", "venv", str(building))
            base = [path for path in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))]
            site = building / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
            (site / "server.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in base))
            await _run(str(building / "bin" / "python"), "-m", "pip", "install", "--no-input", "-r", str(requirements))
            os.rename(building, folder)
        except OSError:
            if not await asyncio.to_thread(python.exists):  # otherwise somebody else was quicker
                raise
        finally:
            await asyncio.to_thread(shutil.rmtree, building, ignore_errors=True)
    return str(python)


def _digest(requirements: Path) -> str:
    """Of what the environment depends on: the requirements, this Python and where the server's packages are."""
    python = f"{sys.version} {sys.prefix}".encode()
    return hashlib.sha256(requirements.read_bytes() + python).hexdigest()[:16]


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(INSTALL_LIMIT):
            output, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        text = output.decode("utf-8", "replace").strip()
        last = next(
            (line for line in reversed(text.splitlines()) if "ERROR" in line), text.splitlines()[-1] if text else ""
        )
        raise ModelLoadError(f"the archive's requirements cannot be installed: {last}", traceback=text[-4000:])
