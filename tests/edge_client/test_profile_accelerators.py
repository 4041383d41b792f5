"""Accelerators, and what ONNX Runtime can use, from small hand-made trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.profile import measure_profile
from edge_client.profile_accelerators import read_accelerators
from edge_client.profile_runtimes import execution_providers
from tests.edge_client.small_tree import put

ACCEL = "sys/class/accel/accel0/device/uevent"
DRM = "sys/class/drm/card1/device"
PCI = "sys/bus/pci/devices/0000:01:00.0/uevent"
USB = "sys/bus/usb/devices/2-1"
GIB = 2**30


@pytest.mark.parametrize(
    ("files", "kind", "name", "own_mib"),
    [
        ({"dev/nvhost-gpu": "", "dev/nvidia0": ""}, "gpu", "NVIDIA Tegra integrated GPU", "shared"),
        ({"dev/nvidia0": "", "dev/nvidiactl": ""}, "gpu", "NVIDIA GPU", None),
        (
            {"proc/driver/nvidia/gpus/0/information": "Model: \t NVIDIA L4\n"},
            "gpu",
            "NVIDIA L4",
            None,
        ),
        (
            {"proc/driver/nvidia/gpus/0/information": "Model: NVIDIA GB10\n"},
            "gpu",
            "NVIDIA GB10",
            "shared",
        ),
        (
            {f"{DRM}/uevent": "DRIVER=amdgpu", f"{DRM}/mem_info_vram_total": f"{16 * GIB}"},
            "gpu",
            "AMD graphics (amdgpu)",
            16384,
        ),
        (
            {f"{DRM}/uevent": "DRIVER=amdgpu", f"{DRM}/mem_info_vram_total": f"{GIB // 2}"},
            "gpu",
            "AMD graphics (amdgpu)",
            "shared",
        ),
        (
            {f"{DRM}/uevent": "DRIVER=xe", f"{DRM}/tile0/physical_vram_size_bytes": f"{12 * GIB}"},
            "gpu",
            "Intel graphics (xe)",
            12288,
        ),
        ({f"{DRM}/uevent": "DRIVER=asahi"}, "gpu", "Apple GPU (asahi)", "shared"),
        ({"dev/kgsl-3d0": ""}, "gpu", "Qualcomm Adreno", "shared"),
        ({ACCEL: "DRIVER=intel_vpu"}, "npu", "Intel NPU", "shared"),
        ({ACCEL: "DRIVER=amdxdna"}, "npu", "AMD XDNA NPU", "shared"),
        ({ACCEL: "DRIVER=habanalabs"}, "npu", "Intel Gaudi", None),
        ({ACCEL: "DRIVER=of_tomorrow"}, "npu", "NPU (of_tomorrow)", "shared"),
        ({"dev/accel/accel0": ""}, "npu", "NPU (unknown driver)", "shared"),
        ({"dev/rknpu": ""}, "npu", "Rockchip NPU", "shared"),
        ({"sys/class/devfreq/fdab0000.npu/cur_freq": "1"}, "npu", "Rockchip NPU", "shared"),
        ({"sys/bus/platform/drivers/RKNPU/fde40000.npu": ""}, "npu", "Rockchip NPU", "shared"),
        ({"dev/fastrpc-cdsp": "", "dev/fastrpc-adsp": ""}, "npu", "Qualcomm Hexagon", "shared"),
        (
            {"dev/adsprpc-smd": "", "dev/adsprpc-smd-secure": ""},
            "npu",
            "Qualcomm Hexagon",
            "shared",
        ),
        ({"dev/nvhost-ctrl-nvdla0": ""}, "npu", "NVIDIA DLA", "shared"),
        ({"dev/hailo0": ""}, "npu", "Hailo NPU", None),
        ({"dev/apex_0": ""}, "tpu", "Google Coral Edge TPU", 8),
        (
            {f"{USB}/idVendor": "1a6e\n", f"{USB}/idProduct": "089a\n"},
            "tpu",
            "Google Coral Edge TPU",
            8,
        ),
        (
            {f"{USB}/idVendor": "18d1\n", f"{USB}/idProduct": "9302\n"},
            "tpu",
            "Google Coral Edge TPU",
            8,
        ),
        (
            {PCI: "PCI_CLASS=120000\nPCI_ID=8086:7D1D\n"},
            "npu",
            "Intel NPU (no driver)",
            "shared",
        ),
        (
            {PCI: "PCI_CLASS=118000\nPCI_ID=1022:1502\n"},
            "npu",
            "AMD XDNA NPU (no driver)",
            "shared",
        ),
        ({PCI: "PCI_CLASS=120000\nPCI_ID=1E60:2864\n"}, "npu", "Hailo NPU (no driver)", None),
        (
            {PCI: "PCI_CLASS=FF0000\nPCI_ID=1AC1:089A\n"},
            "tpu",
            "Google Coral Edge TPU (no driver)",
            8,
        ),
    ],
)
def test_one_accelerator(
    tmp_path: Path, files: dict[str, str], kind: str, name: str, own_mib: int | str | None
) -> None:
    (found,) = measure_profile(put(tmp_path, files)).accelerators
    assert (found.kind, found.name) == (kind, name)
    assert found.shares_system_memory == (own_mib == "shared")
    assert found.memory_mib == (None if own_mib == "shared" else own_mib)


@pytest.mark.parametrize(
    "files",
    [
        {PCI: "DRIVER=nvme\nPCI_CLASS=10802\nPCI_ID=144D:A80A\n"},
        {PCI: "DRIVER=vfio-pci\nPCI_CLASS=120000\nPCI_ID=8086:7D1D\n"},  # lent to a guest
        {"dev/fastrpc-adsp": ""},  # it is for sound
        {f"{DRM}/uevent": "DRIVER=vc4"},  # it only displays
        {f"{USB}/idVendor": "18d1\n", f"{USB}/idProduct": "4ee7\n"},  # a phone
    ],
)
def test_no_accelerator(tmp_path: Path, files: dict[str, str]) -> None:
    assert measure_profile(put(tmp_path, files)).accelerators == ()


def test_one_npu_seen_by_two_drivers_counts_once(tmp_path: Path) -> None:
    root = put(tmp_path, {ACCEL: "DRIVER=rocket", "sys/class/devfreq/fdab0000.npu/cur_freq": "1"})
    assert [npu.name for npu in measure_profile(root).accelerators] == ["Rockchip NPU"]


def test_jetson_has_a_gpu_and_dlas_in_one_memory(tmp_path: Path) -> None:
    root = put(tmp_path, {"dev/nvgpu/igpu0/power": "", "dev/nvhost-nvdla0": ""})
    found = measure_profile(root).accelerators
    assert [one.kind for one in found] == ["gpu", "npu"]
    assert all(one.shares_system_memory for one in found)


@pytest.fixture
def own_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder of programs that stands alone in PATH but for the system's."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_nvidia_driver_tells_memory(tmp_path: Path, own_programs: Path) -> None:
    root = put(tmp_path / "root", {"dev/nvidia0": "", "dev/nvidia1": ""})
    write_program(own_programs / "nvidia-smi", "echo 'NVIDIA L4, 23034'; echo 'NVIDIA GB10, [N/A]'")
    found = [
        (gpu.name, gpu.memory_mib, gpu.shares_system_memory)
        for gpu in read_accelerators(root, ask=True)
    ]
    assert found == [("NVIDIA L4", 23034, False), ("NVIDIA GB10", None, True)]


@pytest.mark.parametrize("script", ["exec sleep 20", "echo no driver; exit 9", "echo ,"])
def test_nvidia_driver_that_does_not_tell(tmp_path: Path, own_programs: Path, script: str) -> None:
    root = put(tmp_path / "root", {"dev/nvidia0": ""})
    write_program(own_programs / "nvidia-smi", script)
    (gpu,) = read_accelerators(root, ask=True)
    assert (gpu.name, gpu.memory_mib) == ("NVIDIA GPU", None)


@pytest.mark.parametrize(
    ("libraries", "found"),
    [
        (["libonnxruntime.so.1.20.0", "libonnxruntime_providers_shared.so"], ["CPU"]),
        (["libonnxruntime_providers_cuda.so"], ["CUDA", "CPU"]),
        (["libonnxruntime_providers_openvino.so"], ["OpenVINO", "CPU"]),
        (["onnxruntime_providers_qnn.dll"], ["QNN", "CPU"]),
        (["DirectML.dll"], ["Dml", "CPU"]),
    ],
)
def test_execution_providers(tmp_path: Path, libraries: list[str], found: list[str]) -> None:
    put(tmp_path, {f"capi/{name}": "" for name in libraries})
    assert execution_providers(tmp_path) == tuple(f"{name}ExecutionProvider" for name in found)


def test_apple_builds_hold_core_ml(tmp_path: Path) -> None:
    put(tmp_path, {"capi/libonnxruntime.dylib": ""})
    expected = ("CoreMLExecutionProvider", "CPUExecutionProvider")
    assert execution_providers(tmp_path, apple=True) == expected


def test_without_onnx_runtime_there_are_no_providers(tmp_path: Path) -> None:
    assert execution_providers(tmp_path) == ()
