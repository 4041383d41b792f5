"""Find ONNX Runtime's execution providers without loading it, which would take a second."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from edge_client.profile_linux import children

# Providers that are libraries of their own beside the runtime's, by the name of the library.
_BY_LIBRARY = {
    "onnxruntime_providers_cuda": "CUDA",
    "onnxruntime_providers_tensorrt": "Tensorrt",
    "onnxruntime_providers_openvino": "OpenVINO",
    "onnxruntime_providers_rocm": "ROCM",
    "onnxruntime_providers_migraphx": "MIGraphX",
    "onnxruntime_providers_vitisai": "VitisAI",
    "onnxruntime_providers_qnn": "QNN",
    "onnxruntime_providers_dnnl": "Dnnl",
    "onnxruntime_providers_cann": "CANN",
    "DirectML": "Dml",
}


def execution_providers(package: Path | None = None, *, apple: bool = False) -> tuple[str, ...]:
    """List the providers that an installed ONNX Runtime has, accelerators first.

    They are read from the libraries in its folder, `package` or where Python finds `onnxruntime`;
    empty where it is not installed. `apple` says that this is macOS, whose builds hold Core ML.
    Azure's, which computes elsewhere, is left out. Whether a provider's own driver works shows only
    when a model runs.
    """
    folder = package or _installed()
    if folder is None or not (folder / "capi").is_dir():
        return ()
    libraries = {path.name.removeprefix("lib").split(".")[0] for path in children(folder / "capi")}
    found = [name for library, name in _BY_LIBRARY.items() if library in libraries]
    if apple:
        found.append("CoreML")
    return tuple(f"{name}ExecutionProvider" for name in (*found, "CPU"))


def _installed() -> Path | None:
    try:
        spec = importlib.util.find_spec("onnxruntime")
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec and spec.origin else None
