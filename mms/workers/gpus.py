"""The NVIDIA GPUs that this server may use, under the names that CUDA takes in every process, and their readings."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mms.metrics import GpuFacts

log = logging.getLogger("mms.gpus")

ASK_LIMIT = 30.0  # seconds for nvidia-smi; without the persistence daemon it first wakes every GPU
_LINE = re.compile(r"\s*(GPU|MIG) .*\(UUID: ([\w/-]+)\)\s*")


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU of this machine, and the parts that MIG has cut it into, by UUID."""

    uuid: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gpu:
    """What one worker may be given: `index` counts what the server sees from 0, `uuid` is a GPU's or a MIG part's."""

    index: int
    uuid: str

    def environment(self) -> dict[str, str]:
        """The variables with which a process sees this GPU alone."""
        return {"CUDA_VISIBLE_DEVICES": self.uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def find_gpus() -> list[Gpu]:
    """The GPUs that the driver shows and CUDA_VISIBLE_DEVICES leaves to this server. May run nvidia-smi: blocking."""
    return visible_gpus(_devices(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible_gpus(devices: Sequence[Device], chosen: str | None) -> list[Gpu]:
    """The rules of CUDA_VISIBLE_DEVICES: numbers (in PCI order), UUIDs or their beginnings; ends at the first unknown.

    Unset, it is every GPU, or the MIG parts of those that are divided.
    """
    if chosen is None:
        uuids = [uuid for device in devices for uuid in device.parts or (device.uuid,)]
    else:
        uuids = []
        for word in chosen.split(","):
            uuid = _resolve(word.strip(), devices)
            if not uuid or uuid in uuids:
                break
            uuids.append(uuid)
    return [Gpu(index, uuid) for index, uuid in enumerate(uuids)]


def _resolve(word: str, devices: Sequence[Device]) -> str:
    """The full UUID of one entry; empty for an entry that means nothing here."""
    if word.isdecimal():
        return devices[int(word)].uuid if int(word) < len(devices) else ""
    if word.startswith("MIG-GPU-"):  # MIG-GPU-UUID/3/0, as drivers before R470 name parts and show them nowhere
        return word if any(word.startswith(f"MIG-{device.uuid}/") for device in devices) else ""
    known = [uuid for device in devices for uuid in (device.uuid, *device.parts)]
    found = [uuid for uuid in known if uuid.startswith(word)] if word.startswith(("GPU-", "MIG-")) else []
    return found[0] if len(found) == 1 else ""


def _devices() -> list[Device]:
    """What the driver shows, in PCI order: through NVML, else nvidia-smi, else /proc (which knows no MIG)."""
    nvml = _nvml()
    if nvml is not None:
        return list(_ask_nvml(nvml))
    if shutil.which("nvidia-smi"):
        try:
            done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=ASK_LIMIT, check=True)
            return parse_listing(done.stdout)
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("nvidia-smi does not tell which GPUs there are: %s", error)
    return read_proc(Path("/proc/driver/nvidia/gpus"))


def _nvml() -> ModuleType | None:
    """NVML, ready for use, where nvidia-ml-py (extra `gpu`) and the driver are there."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.debug("NVML is not available: %s", error)
        return None
    module: ModuleType = pynvml
    return module


def _ask_nvml(nvml: ModuleType) -> Iterator[Device]:
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        parts = []
        with contextlib.suppress(nvml.NVMLError):  # most GPUs cannot be divided
            if nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE:
                for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
                    with contextlib.suppress(nvml.NVMLError):  # an empty place
                        part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
                        parts.append(nvml.nvmlDeviceGetUUID(part))
        yield Device(nvml.nvmlDeviceGetUUID(handle), tuple(parts))


def parse_listing(text: str) -> list[Device]:
    """What `nvidia-smi -L` prints: a line per GPU, with a line per MIG part below it."""
    devices: list[Device] = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        kind, uuid = match.groups()
        if kind == "GPU":
            devices.append(Device(uuid))
        elif devices:
            devices[-1] = Device(devices[-1].uuid, (*devices[-1].parts, uuid))
    return devices


def read_proc(folder: Path) -> list[Device]:
    """The kernel driver's own list: a folder per PCI address with a file `information`."""
    devices = []
    for path in sorted(folder.glob("*/information")):
        with contextlib.suppress(OSError):
            match = re.search(r"^GPU UUID:\s*(GPU-[\w-]+)", path.read_text(), re.MULTILINE)
            if match is not None:
                devices.append(Device(match[1]))
    return devices


def memory_by_process(gpus: Sequence[Gpu]) -> dict[int, int]:
    """Bytes that each process holds on `gpus`, by pid; empty without NVML, or where its pids are not ours (containers).

    Blocking: call it outside the event loop.
    """
    nvml = _nvml()
    used: dict[int, int] = {}
    if nvml is None:
        return used
    for gpu in gpus:
        with contextlib.suppress(nvml.NVMLError):
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)):
                used[process.pid] = used.get(process.pid, 0) + (process.usedGpuMemory or 0)
    return used


class GpuMonitor:
    """Utilisation and memory of `gpus` through NVML; nothing without it (extra `gpu`)."""

    def __init__(self, gpus: Sequence[Gpu]) -> None:
        self._gpus = gpus
        self._nvml = _nvml() if gpus else None
        if gpus and self._nvml is None:
            log.warning("GPU metrics are missing: they need NVML; pip install 'mms-server[gpu]'")

    def facts(self) -> Iterator[GpuFacts]:
        """One reading per GPU. Blocking: call it outside the event loop."""
        nvml = self._nvml
        if nvml is None:
            return
        for gpu in self._gpus:
            with contextlib.suppress(nvml.NVMLError):
                handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
                used = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
                utilization = None
                with contextlib.suppress(nvml.NVMLError):  # of a MIG part it is not known
                    utilization = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                yield GpuFacts(gpu.index, gpu.uuid, utilization, used)
