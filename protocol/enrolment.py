"""How a device gets into a fleet: the token, what it sends, what it is given.

The operator hands a one-time token to the device's owner. It names the fleet's CA by its hash, so
that the device trusts nobody else from its first word on, and carries a secret, which only the
aggregator that issued it can check. Request and answer travel in the envelope of every other
message (`protocol.signing`); its key is the device's signing key one way, the aggregator's the
other.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

from protocol.errors import MalformedMessage
from protocol.messages import Name, Text

REQUEST_TOPIC, ANSWER_TOPIC = "enrol/request", "enrol/answer"
"""What signatures cover in the place of a topic; no MQTT topic is called so."""
PATH_CA, PATH_ENROL = "/ca.pem", "/enroll"
BODY_LIMIT_BYTES = 16 * 1024
"""Largest request or answer."""

_PREFIX = "tf1-"
_HASH_BYTES = 32
_SECRET_BYTES = 24

Pem = Annotated[str, StringConstraints(max_length=8192)]


@dataclass(frozen=True, slots=True)
class Token:
    """A one-time token: tf1- and base64url of the CA's SHA-256 and a secret.

    >>> Token.parse(str(Token(bytes(32), b"s" * 24))).secret
    b'ssssssssssssssssssssssss'
    """

    ca_sha256: bytes
    """Of the CA certificate in DER, 32 bytes."""
    secret: bytes

    @classmethod
    def issue(cls, ca_sha256: bytes) -> Token:
        return cls(ca_sha256, secrets.token_bytes(_SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read a token.

        Raises:
            MalformedMessage: it is not one, or not a whole one.
        """
        text = text.strip()
        try:
            code = text.removeprefix(_PREFIX).rstrip("=")  # which a copy easily loses
            padded = code + "=" * (-len(code) % 4)
            data = base64.b64decode(padded.encode("ascii"), altchars=b"-_", validate=True)
        except ValueError:
            data = b""
        if not text.startswith(_PREFIX) or len(data) != _HASH_BYTES + _SECRET_BYTES:
            raise MalformedMessage(
                "the token", f"copy all of what `aggregator enroll` printed, from {_PREFIX} on"
            )
        return cls(data[:_HASH_BYTES], data[_HASH_BYTES:])

    @property
    def digest(self) -> str:
        """What the aggregator keeps of a token: SHA-256 of its secret, in hex."""
        return hashlib.sha256(self.secret).hexdigest()

    def __str__(self) -> str:
        data = base64.urlsafe_b64encode(self.ca_sha256 + self.secret).decode()
        return _PREFIX + data

    def __repr__(self) -> str:
        return "Token(…)"  # not into a log


class EnrolRequest(BaseModel):
    """What a device asks with: its token, and a request for a certificate of its own key."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    protocol: Literal[1] = 1
    token: Annotated[str, StringConstraints(max_length=200)]
    csr: Pem
    """PKCS #10 in PEM; the aggregator takes the public key from it and nothing else."""


class EnrolAnswer(BaseModel):
    """What a device is given: its name and certificate, the CA's, and where the broker is."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    protocol: Literal[1] = 1
    device: Name
    certificate: Pem
    ca: Pem
    broker: Text
