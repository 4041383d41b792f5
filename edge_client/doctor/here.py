"""What a device needs of its own computer."""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography import x509

from edge_client.backends import missing_torch
from edge_client.doctor import Check, Level, Patient
from edge_client.errors import EdgeError
from edge_client.join import DEFAULT_PORT
from edge_client.ort.runtime import REPAIR, missing_training
from edge_client.outbox import look
from edge_client.policy.decide import Used, decide
from edge_client.policy.owner import doubts
from edge_client.policy.sensors import Sensors
from edge_client.prepare import total_budget_mib
from edge_client.profile import measure_profile
from edge_client.report import read_told
from edge_client.trust import trusted_key
from protocol.enrolment import PATH_CA
from protocol.errors import StateError, TransportError, TunefleetError
from protocol.extras import how_to_install
from protocol.signing import SigningKey
from protocol.tls import TlsFiles, check_validity

KEY = "device.key"
YEARS = (2025, 2100)
APART = timedelta(minutes=2)
"""By more than this two clocks show different times."""
RENEW_BEFORE = timedelta(days=30)
SYNCHRONIZED = Path("/run/systemd/timesync/synchronized")
LEAST_DISK_MIB, LOW_DISK_MIB = 64, 1024
MEMORY_MIB = {"PyTorch": (440, 640), "ONNX Runtime": (130, 300)}
"""What the smallest model takes in all with each, and what a model of some ten millions does."""
LEAST_TOKENS = 2000
PACKAGES = ("torch", "transformers", "peft")
TIMEOUT_S = 3.0
BYTES_PER_MIB = 2**20


def checks_here(patient: Patient) -> Iterator[Check]:
    """Look at this computer; each check comes when it is done, for some take their time."""
    if patient.bad_membership:
        yield Check("fleet", "fail", patient.bad_membership)
    looks: list[Callable[[Patient], Check]] = [clock, certificate, aggregator, key, disk, memory]
    for look_at in looks:
        yield look_at(patient)
    yield packages()
    yield onnx()
    yield data(patient)
    yield policy(patient)


def clock(patient: Patient) -> Check:
    """Compare this computer's time with the fleet's, or see whether it is kept in time."""
    now = datetime.now(timezone.utc)
    shown = f"{now:%Y-%m-%d %H:%M} UTC"
    remedy = "set the clock, and keep it: sudo timedatectl set-ntp true"
    if not YEARS[0] <= now.year < YEARS[1]:
        return Check("clock", "fail", f"it shows {shown}", remedy)
    theirs = _fleet_time(patient) if patient.tls else None
    if theirs is not None:
        apart = abs(theirs - datetime.now(timezone.utc))
        if apart > APART:
            return Check("clock", "fail", f"{shown}, the aggregator's is {theirs:%H:%M}", remedy)
        return Check("clock", "ok", f"{shown}, as the aggregator's")
    kept = (
        ", kept in time" if SYNCHRONIZED.exists() else "; whether it is kept in time is not known"
    )
    return Check("clock", "ok", f"{shown}{kept}")


def certificate(patient: Patient) -> Check:
    """See whether the certificate for the broker is in order, and how long yet."""
    tls = patient.tls
    if tls is None:
        return Check("TLS", "ok", "none: this device has not joined a fleet")
    now = datetime.now(timezone.utc)
    try:
        check_validity(tls.ca, now)
        tls.context(now)
        own = x509.load_pem_x509_certificate(tls.certificate.read_bytes())
    except TransportError as error:
        return Check("TLS", "fail", str(error))
    left, until = own.not_valid_after_utc - now, f"valid until {own.not_valid_after_utc:%Y-%m-%d}"
    if left < RENEW_BEFORE:
        return Check("TLS", "warn", until, "ask for a new token and join again")
    return Check("TLS", "ok", until)


def aggregator(patient: Patient) -> Check:
    """See whom this device believes."""
    try:
        key = trusted_key(patient.state)
    except EdgeError as error:
        return Check("trust", "fail", str(error))
    if key is None:
        return Check("trust", "ok", "no aggregator yet: the first that is heard is believed")
    return Check("trust", "ok", f"the aggregator with the key {key[:12]}…")


def key(patient: Patient) -> Check:
    """See whether the key that its messages are signed with is there, and is one."""
    path = patient.state / KEY
    try:
        if path.exists():
            SigningKey.load(path)
            return Check("key", "ok", f"{KEY} is a key")
    except (StateError, OSError) as error:
        return Check("key", "fail", str(error))
    if patient.tls is None:
        return Check("key", "ok", "none yet: it is made at the first start")
    remedy = "bring it back from a backup, or join again with a new token"
    return Check("key", "fail", f"{path}, which the fleet knows this device by, is gone", remedy)


def disk(patient: Patient) -> Check:
    """See whether state and cache can be written, and how much room they have."""
    for folder in (patient.state, patient.cache):
        there = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
        if not there.is_dir():
            return Check("disk", "fail", f"{there} is a file", "name a folder (--state, --cache)")
        if not os.access(there, os.W_OK | os.X_OK):
            remedy = "give this user the folder, or name another (--state, --cache)"
            return Check("disk", "fail", f"{there} can't be written to", remedy)
        free_mib = shutil.disk_usage(there).free // BYTES_PER_MIB
        if free_mib < LOW_DISK_MIB:
            level: Level = "fail" if free_mib < LEAST_DISK_MIB else "warn"
            found = f"{free_mib} MiB free at {folder}, where {LOW_DISK_MIB} are wanted"
            return Check("disk", level, found, "free some space")
    return Check("disk", "ok", f"{free_mib} MiB free")


def memory(patient: Patient) -> Check:
    """See what training may take."""
    try:
        budget_mib = total_budget_mib(measure_profile(), patient.memory_cap_mib)
        told, _ = read_told(patient.state)
    except EdgeError as error:
        return Check("memory", "fail", str(error))
    plan, last = told.get("plan", {}), ""
    if {"predicted_mib", "floor_mib"} <= plan.keys():
        last = f", the last plan was for {plan['floor_mib'] + plan['predicted_mib']:.0f} in all"
    found = f"training may take {budget_mib:.0f} MiB{last}"
    library = "ONNX Runtime" if missing_torch() else "PyTorch"
    least_mib, low_mib = MEMORY_MIB[library]
    remedy = "close other programs, raise --memory-cap if it is given, or use a larger device"
    if budget_mib < least_mib:
        short = f"{found}: with {library} the smallest model takes {least_mib}"
        return Check("memory", "fail", short, remedy)
    if budget_mib < low_mib:
        return Check("memory", "warn", found, f"enough for small models alone; {remedy}")
    return Check("memory", "ok", found)


def packages() -> Check:
    """See whether what training needs is installed."""
    missing = [name for name in PACKAGES if not importlib.util.find_spec(name)]
    if missing and not missing_training():
        return Check("packages", "ok", f"{', '.join(missing)} missing; ONNX Runtime trains")
    if missing:
        remedy = how_to_install("edge")
        return Check("packages", "fail", f"{', '.join(missing)} missing", remedy)
    versions = (f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return Check("packages", "ok", ", ".join(versions))


def onnx() -> Check:
    """See whether ONNX Runtime can train here; a plain one over its build for training can't."""
    why = missing_training()
    if not why:
        return Check("onnx", "ok", "ONNX Runtime can train, with an artifact set of the model")
    if REPAIR in why:
        found, _, remedy = why.partition(": ")
        return Check("onnx", "warn", found, remedy)
    return Check("onnx", "ok", f"not used: {why}")


def data(patient: Patient) -> Check:
    """See whether the text can be read, and how much of it there is."""
    from edge_client.data import read_examples, tokenize
    from edge_client.data.read import check_paths
    from edge_client.model import find_model, load_tokenizer

    if not patient.data:
        return Check("data", "warn", "not looked at", "name it with --data")
    try:
        check_paths(patient.data)
        reading = read_examples(patient.data)
        model = patient.model or "base-tiny"
        tokenizer = load_tokenizer(find_model(model))
        tokens = sum(len(s) for s in tokenize(reading.examples, tokenizer, max_tokens=256))
    except TunefleetError as error:
        return Check("data", "fail", str(error))
    except ImportError:
        return Check("data", "ok", f"examples: {len(reading.examples)}")
    found = f"examples: {len(reading.examples)}, tokens: {tokens} (of {model})"
    if tokens < LEAST_TOKENS:
        return Check("data", "warn", found, "give more text: of so little not much is learnt")
    if reading.problems:
        more = f", {len(reading.problems)} left out ({reading.problems[0]})"
        remedy = "mend them (text has to be UTF-8), or let them be"
        return Check("data", "warn", found + more, remedy)
    return Check("data", "ok", found)


def policy(patient: Patient) -> Check:
    """Say whether the owner lets it train and transfer at this moment."""
    if patient.bad_policy:
        return Check("policy", "fail", patient.bad_policy)
    now = datetime.now()
    try:
        totals = look(patient.state, now.date().isoformat())
    except EdgeError as error:
        return Check("outbox", "fail", str(error))
    used = Used(totals.bytes, totals.training_s)
    decision = decide(patient.policy, Sensors().read(patient.policy), now, used)
    reasons = [reason.detail for reason in (*decision.train, *decision.transfer)]
    if seldom := doubts(patient.policy):
        remedy = f"it may hardly ever train so ({'; '.join(seldom)}): mend the policy"
        return Check("policy", "warn", "; ".join(reasons) or "it may train now", remedy)
    if reasons:
        return Check("policy", "warn", "; ".join(reasons))
    return Check("policy", "ok", "it may train and transfer now")


def _fleet_time(patient: Patient) -> datetime | None:
    """Ask the aggregator's enrolment, at its usual port, what time it is; None: no answer."""
    tls: TlsFiles | None = patient.tls
    if tls is None or patient.bad_membership:  # where it is isn't known
        return None
    try:
        link = http.client.HTTPSConnection(
            patient.broker.host, DEFAULT_PORT, timeout=TIMEOUT_S, context=tls.context()
        )
        link.request("GET", PATH_CA)
        date = link.getresponse().getheader("Date", "")
        link.close()
        return parsedate_to_datetime(date)
    except (OSError, http.client.HTTPException, TransportError, ValueError):
        return None
