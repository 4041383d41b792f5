"""ONNX Runtime as a device loads it: found honestly, imported without torch.

`onnxruntime` and `onnxruntime-training-cpu` own the same folder: whichever was installed last is
what is there, and the metadata of both say that all is well.
"""

from __future__ import annotations

import platform
import sys
import types
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_client.errors import ConfigError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PACKAGE = "onnxruntime-training-cpu"
REPAIR = f"pip uninstall -y onnxruntime {PACKAGE} && pip install {PACKAGE}==1.19.2"


def missing_training() -> str:
    """Return why this Python can't train with ONNX Runtime and what to do; empty: it can."""
    if find_spec("onnxruntime") is None:
        machine, version = platform.machine(), sys.version_info[:2]
        if platform.system() != "Linux" or machine != "x86_64" or version > (3, 12):
            return (
                f"there is no {PACKAGE} for {platform.system()} on {machine} with Python "
                f"{version[0]}.{version[1]} (only for Linux on x86_64 with Python up to 3.12): "
                "train with --backend torch"
            )
        return f"{PACKAGE} is not installed: pip install 'tunefleet[edge]'"
    try:
        state = import_onnxruntime().capi._pybind_state
    except ImportError as error:
        return f"onnxruntime can't be loaded ({error}): {REPAIR}"
    if hasattr(state, "load_checkpoint"):
        return ""
    installed = _is_installed(PACKAGE)
    over = f"lies over {PACKAGE}" if installed else "is installed, which can't train"
    return f"a plain onnxruntime {over}: {REPAIR}"


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def import_onnxruntime() -> Any:
    """Import ONNX Runtime without its package for training, and without torch.

    It would load both to look at their versions. What computes is a session over a graph.

    Raises:
        ImportError: it is not there, or does not load.
    """
    if "onnxruntime" not in sys.modules:
        spec = find_spec("onnxruntime")
        if spec is None or spec.origin is None:
            raise ImportError("onnxruntime is not installed")
        training = types.ModuleType("onnxruntime.training")
        training.__path__ = [str(Path(spec.origin).parent / "training")]
        hidden = {"onnxruntime.training": training}
        hidden |= {} if "torch" in sys.modules else {"torch": None}
        sys.modules.update(hidden)  # type: ignore[arg-type]
        try:
            import onnxruntime
        finally:
            for name in hidden:
                del sys.modules[name]
    import onnxruntime

    return onnxruntime


def require_training() -> None:
    """Refuse in one line where this Python can't train with ONNX Runtime.

    Raises:
        ConfigError: says why, and what to do.
    """
    if why := missing_training():
        raise ConfigError(f"--backend onnx: {why}")


def open_session(graph: Path, threads: int) -> InferenceSession:
    """Open a training graph for `threads` threads."""
    onnxruntime = import_onnxruntime()
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Constants that are worked out or packed beforehand would be second copies of weights.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    # Threads that spin while they wait take the cores from whatever else runs on the device.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session: InferenceSession = onnxruntime.InferenceSession(
        str(graph), options, providers=["CPUExecutionProvider"]
    )
    return session


def path_to_fetches() -> Any:
    """Return options of a run that computes only what the results asked for take."""
    options = import_onnxruntime().RunOptions()
    options.only_execute_path_to_fetches = True
    return options
