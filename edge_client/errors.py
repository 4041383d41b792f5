"""Errors of the edge_client package.

TunefleetError
└── EdgeError                  something on this device keeps it from taking part
    ├── NoPlanFits             no rank, batch and length fit the memory there is
    ├── ModelError             the base model is not there, or not one that can be trained
    │   └── ModelWanted        it is not there, and a hub may have it
    ├── DataError              the owner's text is missing, unreadable or too short
    ├── ConfigError            a setting is missing, unknown or out of bounds
    │   └── ArtifactWanted     to train with ONNX Runtime it lacks only the model's artifact set
    ├── NameTaken              another device takes part by this one's name
    ├── OtherAggregator        the job's aggregator is not the one that this device trusts
    ├── StorageError           what must be kept can't be: the disk is full, or a file is damaged
    ├── JoinRefused            a fleet does not let this device in, or is not the token's
    ├── TrainingPaused         training has stopped between two steps; asked again it goes on
    └── WorkerError            the training process died or broke its protocol
        └── WorkerKilled       it was killed, as the kernel does when memory runs out
"""

from __future__ import annotations

from protocol.cli import EXIT_TOO_LARGE
from protocol.errors import TunefleetError


class EdgeError(TunefleetError):
    """Something on this device keeps it from taking part."""


class NoPlanFits(EdgeError):
    """No rank, micro-batch and sequence length fit the memory that there is."""

    exit_code = EXIT_TOO_LARGE


class ModelError(EdgeError):
    """The base model is not there, or is not one that can be trained here."""


class ModelWanted(ModelError):
    """The base model is not on this device, or not whole; a hub may have it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the model {name!r} is not on this computer")
        self.name = name


class DataError(EdgeError):
    """The owner's text is missing, unreadable or too short to train on."""


class ConfigError(EdgeError):
    """A setting is missing, unknown or out of bounds."""


class ArtifactWanted(ConfigError):
    """To train with ONNX Runtime a device lacks the model's artifact set, and nothing else."""


class NameTaken(EdgeError):
    """Another device takes part in a job by this one's name."""

    def __init__(self, device: str, job: str) -> None:
        super().__init__(
            f"another device, or this one with another --state, takes part in job {job!r} as "
            f"{device!r}; choose another --name, or go on with that state"
        )


class OtherAggregator(EdgeError):
    """The job that the owner names is signed by another aggregator than this device trusts."""

    def __init__(self, job: str, trusted: object) -> None:
        super().__init__(
            f"job {job!r} is signed by another aggregator than the one that this device trusts; if "
            f"that is right (the aggregator was set up anew), remove {trusted} or use another "
            "--state"
        )


class StorageError(EdgeError):
    """What a device must keep can't be written, or not be read: a full disk, a damaged file."""


class JoinRefused(EdgeError):
    """A fleet that does not let this device in, can't be reached, or is not the token's."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"can't join the fleet at {url}: {why}")
        self.url = url
        self.why = why


class TrainingDiverged(EdgeError):
    """Training came to numbers that are not finite."""


class TrainingPaused(EdgeError):
    """Training has stopped between two steps; asked for again it goes on from there."""

    def __init__(self, steps: int, unkept: str = "") -> None:
        super().__init__(steps, unkept)
        self.steps = steps
        """Steps that are done."""
        self.unkept = unkept
        """Why they could not be kept, so that training begins anew; empty: they are."""

    def __str__(self) -> str:
        lost = f", and is lost ({self.unkept})" if self.unkept else ""
        return f"training is paused after {self.steps} steps{lost}"


class WorkerError(EdgeError):
    """The training process died, was killed, or said something unexpected."""


class WorkerKilled(WorkerError):
    """The training process was killed, as the kernel does when memory runs out."""
