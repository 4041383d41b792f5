"""Which execution provider of ONNX Runtime computes: an NPU's first where it loads, else the CPU.

The profile says which accelerators the device has and which providers its ONNX Runtime; whether a
provider's driver works shows only when a graph is opened with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from device_profiles.schema import Accelerator, DeviceProfile
from edge_client.errors import ConfigError, ModelError
from edge_client.ort.runtime import ERRORS, import_onnxruntime
from protocol.errors import os_words

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

SUFFIX = "ExecutionProvider"
CPU = f"CPU{SUFFIX}"
_FOR: tuple[tuple[str, str, str, Mapping[str, str]], ...] = (
    ("npu", "Intel NPU", "OpenVINO", {"device_type": "NPU"}),
    ("npu", "AMD XDNA", "VitisAI", {}),
    ("npu", "Qualcomm Hexagon", "QNN", {"backend_path": "libQnnHtp.so"}),
    ("npu", "Rockchip", "Rknpu", {}),
    ("npu", "Apple Neural Engine", "CoreML", {}),
    ("gpu", "NVIDIA", "CUDA", {}),
    ("gpu", "AMD", "MIGraphX", {}),
    ("gpu", "AMD", "ROCM", {}),
    ("gpu", "Intel", "OpenVINO", {"device_type": "GPU"}),
    ("gpu", "Apple", "CoreML", {}),
)
"""Kind of accelerator, how its name begins, the provider for it, that one's options; best first."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A provider to try, and what it is for."""

    provider: str
    options: Mapping[str, str] = field(default_factory=dict)
    purpose: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """A graph that is open."""

    session: InferenceSession
    provider: str
    refused: tuple[str, ...]
    """Why providers before it could not be taken."""


def candidates(profile: DeviceProfile, wanted: str = "") -> tuple[list[Candidate], list[str]]:
    """Return the providers to try, in order, the CPU's last, and why others can't be tried.

    `wanted` is the owner's choice, with or without `ExecutionProvider` at its end, tried alone.

    Raises:
        ConfigError: this ONNX Runtime does not have the provider that is wanted.
    """
    there = profile.execution_providers or (CPU,)
    known = [
        Candidate(f"{provider}{SUFFIX}", options, found.name)
        for kind, name, provider, options in _FOR
        for found in profile.accelerators
        if _is(found, kind, name)
    ]
    if wanted:
        return [_wanted(wanted, known, there)], []
    missing = {
        c.purpose: f"the {c.purpose} is not used: this ONNX Runtime has no {c.provider}"
        for c in known
        if c.provider not in there
    }
    tried = [c for c in known if c.provider in there]
    for candidate in tried:
        missing.pop(candidate.purpose, None)
    return [*tried, Candidate(CPU)], list(missing.values())


def open_graph(graph: Path, tried: Sequence[Candidate], threads: int) -> Opened:
    """Open a graph with the first provider that takes it.

    Raises:
        ModelError: none does; says why of each.
    """
    refused: list[str] = []
    for candidate in tried:
        try:
            session = _open(graph, candidate, threads)
        except Exception as error:  # the library's errors have no common kind
            refused.append(f"{candidate.provider} does not load: {os_words(error)[:200]}")
            continue
        if session.get_providers()[0] == candidate.provider:
            return Opened(session, candidate.provider, tuple(refused))
        refused.append(f"{candidate.provider} does not load here")
    raise ModelError(f"can't open {graph}: {'; '.join(refused)}")


def _open(graph: Path, candidate: Candidate, threads: int) -> InferenceSession:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS
    options.intra_op_num_threads = threads
    if candidate.provider not in onnxruntime.get_available_providers():
        raise ValueError("this ONNX Runtime was built without it")
    providers: list[object] = [(candidate.provider, dict(candidate.options))]
    if candidate.provider != CPU:  # which takes the operators that the other has not
        providers.append(CPU)
    session: InferenceSession = onnxruntime.InferenceSession(
        str(graph), options, providers=providers
    )
    return session


def _wanted(name: str, known: Sequence[Candidate], there: Sequence[str]) -> Candidate:
    by_lower = {provider.lower(): provider for provider in there}
    provider = by_lower.get(name.lower()) or by_lower.get(f"{name}{SUFFIX}".lower())
    if provider is None:
        raise ConfigError(
            f"--provider {name}: this ONNX Runtime has no such provider; it has {', '.join(there)}"
        )
    return next((c for c in known if c.provider == provider), Candidate(provider))


def _is(found: Accelerator, kind: str, name: str) -> bool:
    return found.kind == kind and found.name.startswith(name)
