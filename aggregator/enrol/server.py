"""The door for new devices: enrolment over HTTPS, in a thread of `aggregator serve`.

Anybody can reach it, so that it reads little, keeps nothing open for long and says no in one line.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from datetime import datetime, timezone

from cryptography.hazmat.primitives import serialization
from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from aggregator.enrol import ca
from aggregator.enrol.folder import FleetFolder
from aggregator.enrol.pem_files import read_pair
from aggregator.errors import ConfigError, EnrolmentRefused, FolderError
from aggregator.web import Certificate, Door, WebServer
from protocol.enrolment import (
    ANSWER_TOPIC,
    BODY_LIMIT_BYTES,
    PATH_CA,
    PATH_ENROL,
    REQUEST_TOPIC,
    EnrolAnswer,
    EnrolRequest,
    Token,
)
from protocol.errors import ProtocolError, TunefleetError
from protocol.events import EventLog, Seldom
from protocol.signing import open_message

CONNECTIONS = 64
"""At once, whatever they have said; more are hung up on."""
IDLE_S = 5
BROKEN_OFF = "the request broke off before its end"
WORDS = {
    "Invalid HTTP request": "no HTTP request: something else was sent to the port of enrolment",
    "concurrency limit": f"{CONNECTIONS} connections at once: more are turned away",
}
"""Part of what uvicorn says of a request → what is told of it."""
Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(timezone.utc)


def enrol(folder: FleetFolder, payload: bytes, now: datetime) -> tuple[str, bytes]:
    """Trade a token for a certificate; return the device's name and the sealed answer.

    Repeated with the same token and keys, the answer is the same.

    Raises:
        EnrolmentRefused: the token, the request or the device's key is not good.
        ProtocolError: the request can't be read.
    """
    request, signing_key = open_message(payload, REQUEST_TOPIC, EnrolRequest)
    token = Token.parse(request.token)
    public = ca.read_request(request.csr)
    spki = public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    keys = hashlib.sha256(spki + signing_key.encode()).hexdigest()
    registry = folder.registry()
    try:
        use = registry.check_token(token.digest, keys, now=now.timestamp())
        pem = use.certificate
        if not pem:
            certificate = folder.authority().client_for(public, use.device, now)
            pem = ca.pem(certificate).decode()
            registry.admit(
                token.digest,
                keys,
                use.device,
                signing_key,
                certificate=pem,
                serial=certificate.serial_number,
                expires=certificate.not_valid_after_utc.timestamp(),
            )
    finally:
        registry.close()
    answer = EnrolAnswer(
        device=use.device,
        certificate=pem,
        ca=folder.ca_pem(),
        broker=str(folder.broker_for_devices),
    )
    return use.device, folder.signing_key().seal(answer, ANSWER_TOPIC)


def build_app(folder: FleetFolder, seldom: Seldom, clock: Clock = utc_now) -> FastAPI:
    """Return the two addresses of enrolment: the CA for everybody, a certificate for a token."""
    app = FastAPI(title="tunefleet", openapi_url=None)

    def say(status: int, text: str) -> Response:
        return Response(text + "\n", status, media_type="text/plain; charset=utf-8")

    def address(request: Request) -> str:
        return request.client.host if request.client else ""

    def refused(error: TunefleetError, who: str) -> None:
        seldom.emit(type(error).__name__, "enrolment refused", address=who, reason=str(error))

    def nobody_now(error: TunefleetError, who: str) -> Response:
        refused(error, who)
        return say(503, "nobody can be let in now; the aggregator's log says why")

    async def give_ca(request: Request) -> Response:
        try:
            return Response(folder.ca_pem(), media_type="application/x-pem-file")
        except FolderError as error:
            return nobody_now(error, address(request))

    async def give_certificate(request: Request) -> Response:
        body, who = bytearray(), address(request)
        try:
            async for part in request.stream():
                body += part
                if len(body) > BODY_LIMIT_BYTES:
                    return say(413, f"a request has at most {BODY_LIMIT_BYTES} bytes")
        except ClientDisconnect:
            seldom.emit("broken off", "enrolment refused", address=who, reason=BROKEN_OFF)
            return say(400, BROKEN_OFF)  # to nobody
        try:
            device, answer = enrol(folder, bytes(body), clock())
        except (EnrolmentRefused, ProtocolError) as error:
            refused(error, who)
            return say(403 if isinstance(error, EnrolmentRefused) else 400, str(error))
        except TunefleetError as error:
            return nobody_now(error, who)
        seldom.emit(("enrolled", device), "enrolled", device=device, address=who)
        return Response(answer, media_type="application/json")

    app.add_api_route(PATH_CA, give_ca, methods=["GET"])
    app.add_api_route(PATH_ENROL, give_certificate, methods=["POST"])
    return app


class EnrolmentServer(WebServer):
    """Serve enrolment for as long as the block lasts."""

    def __init__(
        self, folder: FleetFolder, events: EventLog, *, port: int, clock: Clock = utc_now
    ) -> None:
        """Take the port.

        Raises:
            FolderError: what vouches for devices or for this server is missing, or not in order.
            ConfigError: the port is taken.
        """
        folder.authority()
        read_pair(folder.server_certificate, folder.server_key)
        seldom = Seldom(events)

        def complain(said: str, error: BaseException | None) -> None:
            kind = next((part for part in WORDS if part in said), "")
            why = WORDS.get(kind) or (f"a mistake in enrolment: {error!r}" if error else said)
            seldom.emit(("library", kind), "enrolment refused", reason=why)

        super().__init__(
            "enrolment",
            build_app(folder, seldom, clock),
            Door(_listen(folder.settings.bind, port), CONNECTIONS),
            complain,
            certificate=Certificate(folder.server_certificate, folder.server_key),
            idle_s=IDLE_S,
        )


def _listen(bind: str, port: int) -> socket.socket:
    """Listen on one address, or on all: IPv6 and IPv4 where there are both."""
    both = not bind and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in bind else socket.AF_INET
    try:
        return socket.create_server((bind, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(
            f"can't listen for enrolment on port {port}: {error.strerror}; name another with "
            "--enroll-port, or 0 for none"
        ) from None
