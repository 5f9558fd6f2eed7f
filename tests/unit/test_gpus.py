"""Which GPUs a server sees: what the driver shows, and what CUDA_VISIBLE_DEVICES leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mms.workers.gpus import Device, find_gpus, parse_listing, read_proc, visible_gpus

LISTING = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 1g.5gb      Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 3g.20gb     Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA A100 (spare) (UUID: GPU-7a01b1f2-0c11-4e3c-9f9f-0a1b2c3d4e5f)
"""
DEVICES = [Device("GPU-aa1"), Device("GPU-ab2", ("MIG-c1", "MIG-d2")), Device("GPU-b3")]


@pytest.mark.parametrize(
    ("chosen", "uuids"),
    [
        (None, ["GPU-aa1", "MIG-c1", "MIG-d2", "GPU-b3"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2, 0", ["GPU-b3", "GPU-aa1"]),
        ("1", ["GPU-ab2"]),
        ("0,9,2", ["GPU-aa1"]),
        ("0,0,2", ["GPU-aa1"]),
        ("GPU-b3,GPU-aa1", ["GPU-b3", "GPU-aa1"]),
        ("GPU-b", ["GPU-b3"]),
        ("GPU-a", []),
        ("MIG-d2", ["MIG-d2"]),
        ("MIG-GPU-ab2/1/0", ["MIG-GPU-ab2/1/0"]),
        ("MIG-GPU-zz9/1/0", []),
    ],
)
def test_cuda_visible_devices_chooses_as_cuda_does(chosen: str | None, uuids: list[str]) -> None:
    gpus = visible_gpus(DEVICES, chosen)
    assert [gpu.uuid for gpu in gpus] == uuids
    assert [gpu.index for gpu in gpus] == list(range(len(uuids)))


def test_a_worker_sees_its_own_gpu_by_its_lasting_name() -> None:
    assert visible_gpus(DEVICES, "2")[0].environment() == {
        "CUDA_VISIBLE_DEVICES": "GPU-b3",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


def test_the_listing_of_nvidia_smi_is_read_with_its_mig_parts() -> None:
    assert parse_listing(LISTING) == [
        Device(
            "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77",
            ("MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb"),
        ),
        Device("GPU-7a01b1f2-0c11-4e3c-9f9f-0a1b2c3d4e5f"),
    ]
    assert parse_listing("No devices found.\n") == []


def test_the_kernels_list_is_read_in_pci_order(tmp_path: Path) -> None:
    for address, uuid in (("0000:c1:00.0", "GPU-2"), ("0000:21:00.0", "GPU-1")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "information").write_text(f"Model: \t\t NVIDIA L4\nGPU UUID: \t {uuid}\nIRQ: 12\n")
    assert read_proc(tmp_path) == [Device("GPU-1"), Device("GPU-2")]
    assert read_proc(tmp_path / "nothing") == []


def test_f112_nvidia_smi_is_asked_where_nvml_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ntest \"$1\" = -L && cat <<'END'\n{LISTING}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("mms.workers.gpus._nvml", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.uuid for gpu in find_gpus()] == ["GPU-7a01b1f2-0c11-4e3c-9f9f-0a1b2c3d4e5f"]
