"""Who said it: Ed25519 signatures around messages.

A sealed message is the JSON object {"body": text, "key": text, "signature": text}. The signature
covers the topic and the exact UTF-8 bytes of `body`, so there is no canonical form of JSON to
agree on, and a message can't be replayed on another topic.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ValidationError

from protocol import VERSION
from protocol.errors import BadSignature, MalformedMessage, StateError, UnsupportedVersion
from protocol.files import PRIVATE, write_durably

MESSAGE_LIMIT_BYTES = 512 * 1024
M = TypeVar("M", bound=BaseModel)


class SigningKey:
    """Hold a private key and sign with it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public: str = _text(key.public_key().public_bytes_raw())
        """The public key, 32 bytes in base64."""

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> SigningKey:
        """Read a key, or make it there, readable by its owner alone.

        Raises:
            StateError: the file there is no key, or may not be read; or it can't be made.
        """
        if path.exists():
            return cls.load(path)
        key = Ed25519PrivateKey.generate()
        try:
            write_durably(path, key.private_bytes_raw(), mode=PRIVATE)
        except OSError as error:
            raise StateError(f"can't keep the signing key {path}: {error.strerror}") from None
        return cls(key)

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read a key.

        Raises:
            StateError: the file is no key, or may not be read.
        """
        try:
            return cls(Ed25519PrivateKey.from_private_bytes(path.read_bytes()))
        except OSError as error:
            raise StateError(f"can't read the signing key {path}: {error.strerror}") from None
        except ValueError:
            raise StateError(
                f"{path} holds no key (32 bytes); bring it back from a backup, or begin anew with "
                "another folder (--state, --dir) and another name"
            ) from None

    def seal(self, message: BaseModel, topic: str) -> bytes:
        """Return the signed bytes of a message for a topic."""
        body = message.model_dump_json()
        signature = _text(self._key.sign(_covered(topic, body)))
        return json.dumps({"body": body, "key": self.public, "signature": signature}).encode()


def open_message(
    payload: bytes, topic: str, model: type[M], *, trusted: str | None = None
) -> tuple[M, str]:
    """Return a sealed message and the public key that signed it.

    With `trusted` None any key may sign: the caller decides whether to remember it (trust on first
    use) and passes it from then on.

    Raises:
        MalformedMessage: too long, not JSON, a key twice, a field missing or out of bounds.
        UnsupportedVersion: another major version of the protocol.
        BadSignature: not signed, not by the trusted key, or not for this topic.
    """
    envelope = _parse(payload, topic)
    try:
        body, key, signature = (envelope[k] for k in ("body", "key", "signature"))
        public = Ed25519PublicKey.from_public_bytes(base64.b64decode(key, validate=True))
        signature_bytes = base64.b64decode(signature, validate=True)
        covered, plain = _covered(topic, body), body.encode()
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadSignature(topic, "the message is not signed") from None
    if trusted is not None and key != trusted:
        raise BadSignature(topic, "it is signed with another key than the one that is known here")
    try:
        public.verify(signature_bytes, covered)
    except InvalidSignature:
        raise BadSignature(topic, "the signature does not fit the message") from None
    return _validated(_parse(plain, topic), topic, model), key


def _parse(payload: bytes, where: str) -> dict[str, Any]:
    if len(payload) > MESSAGE_LIMIT_BYTES:
        raise MalformedMessage(where, f"{len(payload)} bytes (limit {MESSAGE_LIMIT_BYTES})")
    try:
        found = json.loads(payload, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(where, f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise MalformedMessage(where, "not a JSON object")
    return found


def _validated(fields: dict[str, Any], where: str, model: type[M]) -> M:
    theirs = fields.get("protocol", VERSION)
    if theirs != VERSION:
        raise UnsupportedVersion(theirs, VERSION)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "message"
        raise MalformedMessage(where, f"{field}: {first['msg']}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _covered(topic: str, body: str) -> bytes:
    """Return the bytes that a signature covers."""
    return f"tunefleet/{VERSION}\n{topic}\n{body}".encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
