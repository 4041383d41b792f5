"""ONNX Runtime as a device loads it: found honestly, imported without torch.

`onnxruntime` and `onnxruntime-training-cpu` own the same folder: whichever was installed last is
what is there, and the metadata of both say that all is well.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import types
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PACKAGE = "onnxruntime-training-cpu"
VERSION = "1.19.2"
ERRORS = 3
"""The severity from which on ONNX Runtime prints what it has to say."""
REPAIR = f"pip uninstall -y onnxruntime {PACKAGE} && pip install {PACKAGE}=={VERSION}"


def missing_training() -> str:
    """Return why this Python can't train with ONNX Runtime and what to do; empty: it can.

    Another process looks, so that this one does not keep the library.
    """
    here = (platform.system(), platform.machine(), sys.version_info[:2])
    if find_spec("onnxruntime") is None:
        return _why_not_installed(*here)
    code = "from edge_client.ort.runtime import can_train; print(can_train())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = answer.stdout.strip()
    if said == "True":
        return ""
    if said == "False":
        return _why_plain(*here, over=_is_installed(PACKAGE))
    why = answer.stderr.strip().splitlines() or ["it ended without a word"]
    return f"onnxruntime can't be loaded ({why[-1][:200]}): {REPAIR}"


def can_train() -> bool:
    """Say whether the onnxruntime that is loaded was built for training.

    Raises:
        ImportError: it is not there, or does not load.
    """
    return hasattr(import_onnxruntime().capi._pybind_state, "load_checkpoint")


def _why_plain(system: str, machine: str, python: tuple[int, int], *, over: bool) -> str:
    """Say why a plain onnxruntime can't train; where there is no other, it is there for chat."""
    if over:
        return f"a plain onnxruntime lies over {PACKAGE}: {REPAIR}"
    if _has_wheel(system, machine, python):
        return f"a plain onnxruntime is installed, which can't train: {REPAIR}"
    return _why_not_installed(system, machine, python)


def _has_wheel(system: str, machine: str, python: tuple[int, int]) -> bool:
    return (system, machine) == ("Linux", "x86_64") and python <= (3, 12)


def _why_not_installed(system: str, machine: str, python: tuple[int, int]) -> str:
    if _has_wheel(system, machine, python):
        return f"{PACKAGE} is not installed: pip install {PACKAGE}=={VERSION}"
    return (
        f"there is no {PACKAGE} for {system} on {machine} with Python {python[0]}.{python[1]}, "
        "only for Linux on x86_64 with Python up to 3.12: train with --backend torch"
    )


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
        hidden: dict[str, Any] = {"onnxruntime.training": training}
        if "torch" not in sys.modules:
            hidden["torch"] = None
        sys.modules.update(hidden)
        try:
            import onnxruntime
        finally:
            for name in hidden:
                del sys.modules[name]
    import onnxruntime

    return onnxruntime


def open_session(graph: Path, threads: int) -> InferenceSession:
    """Open a training graph for `threads` threads."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS
    options.intra_op_num_threads = threads
    # The arena stays on, and keeps what a step took: giving that back would cost a fifth of speed.
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
