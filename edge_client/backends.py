"""Which backends a device can learn a job with: what is installed, and which files it has.

torch needs the base model's folder, onnx an artifact set of the same base (edge_client/ort). Where
the owner leaves the choice (`auto`), whatever can't be used is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import inf
from pathlib import Path

from edge_client.config import Settings
from edge_client.errors import (
    ArtifactWanted,
    ConfigError,
    EdgeError,
    ModelError,
    ModelWanted,
    NoPlanFits,
)
from edge_client.model import find_model, is_of_hub, is_partial, model_hash
from edge_client.ort.artifact import CACHED_SETS, check_artifact, read_artifact
from edge_client.ort.runtime import missing_training
from edge_client.plan import Backend, Plan, preference
from protocol.artifact import Artifact
from protocol.extras import how_to_install
from protocol.messages import Job

_NO_SET = (
    "--backend onnx needs the model's artifact set: make it with `edge-client export-onnx MODEL "
    "--out DIR` on a computer with torch, copy it here and give --onnx DIR"
)
TORCH_PACKAGES = ("torch", "transformers", "peft")
ONNX_EXPORT_PACKAGES = ("onnx", "onnxruntime", "optimum.exporters.onnx", "optimum.onnxruntime")


@dataclass(frozen=True, slots=True)
class Backends:
    """Folders of what a device can train with, and why it can't with the others."""

    folders: dict[Backend, Path]
    missing: dict[Backend, str]


def check_backend(backend: str, onnx: Path | None, *, may_fetch: bool = False) -> None:
    """Refuse settings with which nothing could be trained, before a job is there.

    With `may_fetch` a missing artifact set is no reason: the job may offer one.

    Raises:
        ConfigError: says what is missing, and what to do.
        ModelError: `onnx` is no artifact set.
    """
    if onnx is not None:
        read_artifact(onnx)
    lacks = missing_training() if may_fetch else _missing_onnx(onnx)
    reasons = {"torch": missing_torch(), "onnx": lacks}
    wanted = [backend] if backend != "auto" else list(reasons)
    if all(reasons[name] for name in wanted):
        # The owner who has nothing of ONNX Runtime is told of torch alone.
        has_some = onnx is not None or find_spec("onnxruntime") is not None
        told = wanted if has_some or backend != "auto" else ["torch"]
        raise ConfigError("; ".join(reasons[name] for name in told))


def require_torch() -> None:
    """Refuse where the packages for torch are not installed.

    Raises:
        ConfigError: says which are missing.
    """
    if why := missing_torch():
        raise ConfigError(why)


def check_export() -> None:
    """Refuse where an artifact set can't be made.

    Raises:
        ConfigError: says what is missing, and what to do.
    """
    missing = [name for name in (*TORCH_PACKAGES, "onnx") if not find_spec(name)]
    if missing:
        raise ConfigError(f"exporting needs {', '.join(missing)}; {how_to_install('export')}")
    if why := missing_training():
        raise ConfigError(f"exporting needs ONNX Runtime's build for training: {why}")


def check_exporting(kind: str) -> None:
    """Refuse where a result can't be exported in this form.

    Raises:
        ConfigError: says what is missing, and what to do.
    """
    needed = TORCH_PACKAGES if kind == "merged" else (*TORCH_PACKAGES, *ONNX_EXPORT_PACKAGES)
    if missing := [name for name in needed if not _is_there(name)]:
        raise ConfigError(
            f"exporting with --format {kind} needs {', '.join(missing)}; {how_to_install('export')}"
        )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package that it is in
        return False


def find_backends(settings: Settings, job: Job, *, downloads: bool = True) -> Backends:
    """Return what this device can learn a job with: one backend at least.

    Raises:
        ModelWanted: without `downloads`: the base model would have to be.
        ArtifactWanted: an artifact set is all that is missing.
        ConfigError: the backend that the owner wants can't be used.
        ModelError: the base model is not there, or is another one than the job's.
    """
    finders: dict[Backend, Callable[[], Path]] = {
        "torch": lambda: _torch_folder(settings, job, downloads),
        "onnx": lambda: _onnx_folder(settings, job),
    }
    folders: dict[Backend, Path] = {}
    refused: dict[Backend, EdgeError] = {}
    for name, find in finders.items():
        if settings.backend in ("auto", name):
            try:
                folders[name] = find()
            except ModelWanted:
                raise
            except (ConfigError, ModelError) as error:
                refused[name] = error
    if not folders:
        # A set that is no good, or could be fetched, says more than that torch is missing.
        onnx = refused.get("onnx")
        wanted = isinstance(onnx, ArtifactWanted) and (
            settings.backend == "onnx" or bool(missing_torch())
        )
        raise onnx if onnx and (settings.onnx or wanted) else next(iter(refused.values()))
    return Backends(folders, {name: str(error) for name, error in refused.items()})


def better(
    plans: Mapping[Backend, Plan | NoPlanFits], shared_rank: int, missing: Mapping[Backend, str]
) -> Plan:
    """Return the best plan of all backends, with why it is that backend's.

    More blocks come first, then whole sequences, then `preference`: at equal rank that with Adam's
    moments, and then the faster one.
    `missing` are the backends that can't be used, and why.

    Raises:
        NoPlanFits: no backend has one; what the first says.
    """
    found = [plan for plan in plans.values() if isinstance(plan, Plan)]
    if not found:
        raise next(error for error in plans.values() if isinstance(error, NoPlanFits))
    best = max(found, key=lambda p: (*_extent(p), *preference(p, shared_rank)))
    return replace(best, why_backend=_why(best, plans, missing))


def _why(
    best: Plan, plans: Mapping[Backend, Plan | NoPlanFits], missing: Mapping[Backend, str]
) -> str:
    """Say of each other backend why it was not taken."""
    reasons = list(missing.values())
    for name, plan in plans.items():
        if isinstance(plan, NoPlanFits):
            reasons.append(f"{name} does not fit: {plan}")
        elif name == best.backend:
            continue
        elif _size(plan) == _size(best) and plan.optimizer != best.optimizer:
            reasons.append(f"{name} has that rank without Adam's moments only")
        elif _size(plan) == _size(best):
            reasons.append(
                f"at the same rank {name} trains {plan.predicted_tokens_s:.0f} tokens/s, "
                f"{best.backend} {best.predicted_tokens_s:.0f}"
            )
        else:
            reasons.append(f"what fits with {name} is smaller: {plan}")
    return "; ".join(reasons)


def _extent(plan: Plan) -> tuple[float, int]:
    return plan.blocks or inf, plan.seq_len


def _size(plan: Plan) -> tuple[float, ...]:
    return (*_extent(plan), plan.rank, plan.held)


def missing_torch(what: str = "training") -> str:
    """Return why this Python can't do `what` with torch; empty: it can."""
    missing = [name for name in TORCH_PACKAGES if not find_spec(name)]
    if not missing:
        return ""
    return f"{what} with torch needs {', '.join(missing)}; {how_to_install('edge')}"


def _missing_onnx(folder: Path | None) -> str:
    if why := missing_training():
        return f"--backend onnx: {why}"
    return _NO_SET if folder is None else ""


def _torch_folder(settings: Settings, job: Job, downloads: bool) -> Path:
    """Return the folder of the job's base model on this device."""
    require_torch()
    name = settings.model or job.base.name
    if not downloads and is_of_hub(name):
        return _folder_here(name, settings, job)
    folder = find_model(name)
    found = model_hash(folder)
    if found != job.base.sha256:
        raise ModelError(
            f"the model in {folder} is not the job's {job.base.name!r} (hash {found[:12]}…, the "
            f"job's {job.base.sha256[:12]}…); give the right one with --model"
        )
    return folder


def _folder_here(name: str, settings: Settings, job: Job) -> Path:
    """Return what was downloaded of a hub's model, if that is whole and the job's."""
    try:
        folder = find_model(name, downloads=False)
        whole = (folder / "config.json").is_file() and not is_partial(name, settings.state)
        if whole and model_hash(folder) == job.base.sha256:
            return folder
    except ModelError:
        pass
    raise ModelWanted(name)


def _onnx_folder(settings: Settings, job: Job) -> Path:
    """Return the folder of an artifact set of the job's base model."""
    if why := missing_training():
        raise ConfigError(f"--backend onnx: {why}")
    if settings.onnx is None:
        if (cached := _cached_set(settings.cache, job)) is None:
            raise ArtifactWanted(_NO_SET)
        return cached
    artifact = check_artifact(settings.onnx)
    if not _is_of(artifact, job):
        raise ModelError(
            f"the artifact set in {settings.onnx} is of {artifact.name!r} (hash "
            f"{artifact.base_sha256[:12]}…), not of the job's {job.base.name!r} (hash "
            f"{job.base.sha256[:12]}…); export that one, and give it with --onnx"
        )
    return settings.onnx


def _cached_set(cache: Path, job: Job) -> Path | None:
    """Return a whole artifact set of the job's base model that an earlier job has left."""
    for folder in sorted((cache / CACHED_SETS).glob("[0-9a-f]" * 32)):
        try:
            if _is_of(read_artifact(folder), job):  # before gigabytes are hashed
                check_artifact(folder)
                return folder
        except ModelError:  # damaged
            continue
    return None


def _is_of(artifact: Artifact, job: Job) -> bool:
    return artifact.base_sha256 == job.base.sha256 and artifact.modules == dict(job.base.modules)
