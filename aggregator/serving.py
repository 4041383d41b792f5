"""From settings to a daemon that serves: folders are locked, states opened, the broker named."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from aggregator import settings as daemon_settings
from aggregator.daemon import Daemon
from aggregator.desk import FleetDesk
from aggregator.engine import IN_PROCESS, Engine, open_engine
from aggregator.enrol.folder import FleetFolder, Membership
from aggregator.errors import ConfigError
from aggregator.identity import signing_key
from aggregator.job_files import JobFile, open_job_file, reread
from aggregator.link import SharedLink, own_link
from aggregator.logs import StructuredLog
from aggregator.merging import check_engine
from aggregator.rounds import Policy
from aggregator.service import Service
from aggregator.settings import DEFAULT_STATE, Effective, ServeSettings
from aggregator.store import Store
from aggregator.tracking.tracker import Tracker
from protocol.errors import TunefleetError
from protocol.events import EventLog
from protocol.extras import how_to_install
from protocol.files import lock_folder
from protocol.messages import Job
from protocol.notify import since_alive_s
from protocol.patience import Waiting
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress


def root_of_states(settings: ServeSettings, folder: Path = Path()) -> Path:
    """Return the folder above the state folders of several jobs."""
    if settings.dir is not None:
        return settings.state or settings.dir / "state"
    return settings.state or folder / DEFAULT_STATE


def serve(known: Effective, job_file: Path | None, log: StructuredLog) -> None:
    """Serve the job of a file, or all jobs that the settings name, until it is stopped.

    Raises:
        TunefleetError: it can't; says why, and what to do.
    """
    files = [job_file] if job_file is not None else known.settings.jobs
    if job_file is None and len({file.resolve() for file in files}) < len(files):
        raise ConfigError(f"{known.source('jobs')}: jobs: a file is named twice")
    opened = [open_job_file(file) for file in files]
    with ExitStack() as stack:
        _Serving(known, log, stack, alone=job_file is not None).run(opened)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where states are, and who signs."""

    root: Path
    """Above the states of jobs."""
    desk: Path | None
    """Where what is asked of the whole daemon is written; None where one job is all there is."""
    fleet: FleetFolder | None
    membership: Membership | None
    key: SigningKey | None
    """None: each state may have one of its own, from earlier."""


class _Serving:
    """Hold what serving takes, for as long as a stack lasts."""

    def __init__(
        self, known: Effective, log: StructuredLog, stack: ExitStack, *, alone: bool
    ) -> None:
        self._known, self._log, self._stack, self._alone = known, log, stack, alone
        self._settings = known.settings
        self._closing: dict[str, ExitStack] = {}
        self._files: dict[str, JobFile] = {}
        self._engine: Engine = IN_PROCESS

    def run(self, opened: Sequence[tuple[Job, JobFile]]) -> None:
        self._files = {file.job: file for _, file in opened}
        self._place = self._open_place()
        desk = self._open_desk()
        jobs = [(job, file.policy) for job, file in opened]
        if desk is not None and not self._alone:
            jobs += [made for made in desk.created() if made[0].job not in self._files]
        self._check_names([file.job for _, file in opened])
        if not jobs:
            raise ConfigError(f"{self._known.file}: jobs: name a job file at least")
        for job, _ in jobs:
            check_engine(job, self._settings.engine)
        address = self._address()
        self._waiting = Waiting(self._log)
        name = jobs[0][0].job if self._alone else self._common_name()
        tls = self._place.membership.tls if self._place.membership else None
        link = own_link(address, name, tls, self._waiting)
        self._shared = SharedLink(link)
        for job, _ in jobs:
            self._shared.part(job.job)
        self._engine = self._stack.enter_context(open_engine(self._settings.engine))
        daemons = [self.open(job, policy) for job, policy in jobs]
        service = Service(
            self._shared,
            daemons,
            self._log,
            desk=desk,
            reload=self._reload,
            stay=not self._alone and not self._settings.exit_when_done,
        )
        if self._settings.page.port is not None:
            self._open_page(service, jobs[0][0].job)
        service.run()

    # -- one job ---------------------------------------------------------------------------------

    def open(self, job: Job, policy: Policy) -> Daemon:
        """Lock a job's state folder and open what is in it."""
        place = self._place
        check_engine(job, self._settings.engine)
        with ExitStack() as stack:
            where = self._state_of(job.job)
            stack.enter_context(lock_folder(where, "aggregator"))
            store = Store(where)
            stack.callback(store.close)
            part = self._shared.part(job.job)
            stack.callback(part.close)
            daemon_log = self._log if self._alone else self._log.part(job=job.job)
            daemon = Daemon(
                job,
                policy,
                store,
                part,
                daemon_log,
                key=place.key or signing_key(where, self._settings.key),
                membership=place.membership,
                onnx=self._settings.onnx,
                engine=self._engine,
                shared=self._settings.shared_intake,
                exit_when_done=self._settings.exit_when_done,
                wait_for_broker=self._settings.wait_for_broker,
            )
            stack.enter_context(self._tracker(job.job, where, daemon_log))
            self._closing[job.job] = self._stack.enter_context(stack.pop_all())
        return daemon

    def _tracker(self, job: str, state: Path, log: EventLog) -> Tracker:
        """Return what tells trackers of a job's rounds."""
        settings = self._settings.tracking
        folder = settings.folder / job if settings.folder is not None else None
        options = {
            "wandb": {"mode": settings.wandb_mode, "project": settings.wandb_project},
            "mlflow": {"uri": settings.mlflow_uri, "experiment": settings.mlflow_experiment},
        }
        return Tracker(state, settings.sinks, log, options, folder=folder)

    def _open_page(self, service: Service, job: str) -> None:
        """Serve the live page beside the jobs, for as long as the stack lasts."""
        from aggregator.page.health import Health
        from aggregator.page.opening import open_page

        def health() -> Health:
            return Health(since_alive_s(), dict.fromkeys(service.jobs, service.connected))

        place = self._place
        one_state = self._alone and place.fleet is None
        root = self._state_of(job) if one_state else place.root
        open_page(self._stack, self._settings.page, root, place.fleet, health, self._log)

    def close(self, job: str) -> None:
        """Let go of a job that is not served after all."""
        self._closing.pop(job).close()

    def _state_of(self, job: str) -> Path:
        """Return a job's state folder; one that is served alone may have any."""
        if self._alone and self._settings.state is not None:
            return self._settings.state
        if self._alone and self._settings.dir is None:
            return DEFAULT_STATE
        return self._place.root / job

    # -- the whole -------------------------------------------------------------------------------

    def _open_place(self) -> _Place:
        """Open the fleet's folder, and lock the one of all states."""
        settings = self._settings
        fleet = None
        if settings.dir is not None:
            fleet = self._open_fleet(settings.dir)
        root = root_of_states(settings, self._known.folder)
        if self._alone:
            root = root if fleet is None else fleet.path / "state"
        desk = None if self._alone and fleet is None else root
        if desk is not None:
            self._stack.enter_context(lock_folder(desk, "aggregator"))
        membership = fleet.membership() if fleet is not None else None
        return _Place(root, desk, fleet, membership, membership.key if membership else None)

    def _open_desk(self) -> FleetDesk | None:
        if self._place.desk is None:
            return None
        opener = None if self._alone else self
        desk = FleetDesk(self._place.desk, self._log, fleet=self._place.fleet, opener=opener)
        self._stack.callback(desk.close)
        return desk

    def _check_names(self, names: Sequence[str]) -> None:
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{self._known.source('jobs')}: jobs: two are called {name!r}")

    def _common_name(self) -> str:
        """Return what this aggregator is called at the broker, whatever jobs it serves."""
        key = self._place.key or signing_key(self._place.root, self._settings.key)
        return hashlib.sha256(key.public.encode()).hexdigest()[:12]

    def _address(self) -> BrokerAddress:
        if self._settings.broker:
            return BrokerAddress.parse(self._settings.broker)
        if self._place.fleet is not None:
            return self._place.fleet.broker_here
        address = _embedded(self._stack, self._settings.port)
        self._log.emit("broker", address=str(address), note="embedded: for trial, loopback only")
        return address

    def _open_fleet(self, path: Path) -> FleetFolder:
        """Open a fleet's folder for this process alone, and let devices in while the stack lasts.

        Raises:
            FolderError: it is not there, not in order, or another aggregator serves it.
            ConfigError: the port of enrolment is taken.
        """
        fleet = FleetFolder(path)
        self._stack.enter_context(fleet.served_here())
        for name in fleet.renew(datetime.now(timezone.utc)):
            self._log.emit("renewed", file=name)
        port = self._settings.enroll_port
        port = fleet.settings.enrol_port if port is None else port
        if not port:
            return fleet
        if not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")):
            raise ConfigError(
                f"enrolment needs an extra; {how_to_install('aggregator')}; or serve without it: "
                "--enroll-port 0"
            )
        from aggregator.enrol.server import EnrolmentServer

        server = self._stack.enter_context(EnrolmentServer(fleet, self._log, port=port))
        self._log.emit("enrolment", port=server.port)
        return fleet

    # -- read again ------------------------------------------------------------------------------

    def _reload(self, service: Service) -> None:
        """Go by what the files say now, as far as that can be without a restart."""
        known = self._known
        try:
            now = daemon_settings.read(known.file, known.given, os.environ)
            read = [reread(file) for file in self._files.values()]
        except TunefleetError as error:
            self._log.emit("reload-refused", reason=str(error))
            return
        refused = [
            name
            for name in ServeSettings.model_fields
            if name != "log" and getattr(now.settings, name) != getattr(known.settings, name)
        ]
        self._log.level = now.settings.log.level
        for one in read:
            self._files[one.file.job] = one.file
            refused += [f"{one.file.job}: {name}" for name in one.refused]
            if one.changed and one.file.job in service.jobs:
                service.jobs[one.file.job].reload(one.file.policy)
            self._log.emit("reloaded", job=one.file.job, changed=one.changed)
        if refused:
            self._log.emit("restart-needed", settings=refused)


def _embedded(stack: ExitStack, port: int) -> BrokerAddress:
    """Start the embedded broker for as long as the stack lasts.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("amqtt") is None:
        raise ConfigError(
            f"the embedded broker needs an extra; {how_to_install('aggregator')}; or name a "
            "broker with --broker"
        )
    from protocol.broker import EmbeddedBroker

    return stack.enter_context(EmbeddedBroker(port=port)).address
