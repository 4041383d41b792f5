"""Join a fleet: trade a token for a certificate, with keys that never leave this device.

    keys → the CA, checked against the token → the server, checked against the CA → certificate

Everything can be repeated: keys are kept from the first try on, and the aggregator gives the same
device the same answer again while the token lasts.
"""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edge_client.errors import ConfigError, JoinRefused
from edge_client.membership import FILE, Membership, tls_files
from edge_client.trust import FILE as TRUST_FILE
from edge_client.trust import trusted_key
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
from protocol.errors import ProtocolError, os_words
from protocol.files import PRIVATE, write_durably
from protocol.link import in_url
from protocol.signing import SigningKey, open_message
from protocol.tls import client_context, explain, socket_words

TIMEOUT_S = 15.0
DEFAULT_PORT = 8884
OTHER_PORT = (
    "whoever listens on this port does not do enrolment; the broker's port is another one: give "
    f"the address that `aggregator enroll` printed, mostly with port {DEFAULT_PORT}"
)
NOBODY = (
    "nobody listens on port {port} of {host}: is `aggregator serve` running there, is the port "
    "right, does a firewall refuse it?"
)


def join(url: str, token_text: str, state: Path) -> Membership:
    """Join the fleet whose enrolment is at `url`, and keep all that `run` needs in `state`.

    Raises:
        ConfigError: the address can't be right, or the folder can't be written.
        MalformedMessage: the token is not one.
        JoinRefused: nobody answers there, it is another fleet, or it lets this device not in.
        StorageError: the key of the aggregator known before is damaged.
    """
    token = Token.parse(token_text)
    host, port = _address(url)
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        signing_key = SigningKey.load_or_create(state / "device.key")
        tls_key = _load_or_create_key(state / "tls.key")
    except OSError as error:
        raise ConfigError(
            f"can't keep keys in {state}: {os_words(error)}; name another --state"
        ) from None

    # Nothing is believed of this first answer but what the token confirms.
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    ca_pem = _confirmed(_ask(host, port, unchecked, "GET", PATH_CA), token, url)

    request = EnrolRequest(token=str(token), csr=_certificate_request(tls_key))
    answer_bytes = _ask(
        host,
        port,
        client_context(ca_pem),
        "POST",
        PATH_ENROL,
        signing_key.seal(request, REQUEST_TOPIC),
    )
    try:
        answer, aggregator_key = open_message(answer_bytes, ANSWER_TOPIC, EnrolAnswer)
    except ProtocolError as error:
        raise JoinRefused(url, str(error)) from None
    _check_certificate(url, answer, tls_key)
    _refuse_other_fleet(url, state, aggregator_key)

    files = tls_files(state)
    membership = Membership(device=answer.device, broker=answer.broker)
    try:
        write_durably(files.ca, ca_pem.encode())
        write_durably(files.certificate, answer.certificate.encode())
        write_durably(state / TRUST_FILE, aggregator_key.encode())
        write_durably(state / FILE, membership.model_dump_json(indent=1).encode())
    except OSError as error:
        raise ConfigError(f"can't write to {state}: {os_words(error)}; join again") from None
    return membership


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    try:
        port = parts.port or DEFAULT_PORT
    except ValueError:
        port = 0
    if parts.scheme != "https" or not parts.hostname or not port or parts.path.strip("/"):
        raise ConfigError(f"{url!r} is not an address of enrolment; write https://host:port")
    return parts.hostname, port


def _ask(
    host: str, port: int, context: ssl.SSLContext, method: str, path: str, body: bytes = b""
) -> bytes:
    """Make one request; no redirects, no proxies, and a bounded answer."""
    where = f"https://{in_url(host)}:{port}"
    connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    try:
        connection.request(method, path, body or None, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found = answer.read(BODY_LIMIT_BYTES + 1)
    except ssl.SSLCertVerificationError as error:
        raise JoinRefused(where, explain(error)) from None
    except (ssl.SSLError, ConnectionResetError, http.client.HTTPException):
        raise JoinRefused(where, OTHER_PORT) from None
    except ConnectionRefusedError:
        raise JoinRefused(where, NOBODY.format(host=host, port=port)) from None
    except (OSError, UnicodeError) as error:
        raise JoinRefused(where, socket_words(error, host)) from None
    finally:
        connection.close()
    if answer.status != http.client.OK:
        words = found[:500].decode("utf-8", "replace").strip().splitlines()
        said = "".join(c for c in (words or [""])[0] if c.isprintable())
        raise JoinRefused(where, said or f"it answers {answer.status}")
    if len(found) > BODY_LIMIT_BYTES:
        raise JoinRefused(where, "its answer is too long")
    return found


def _load_or_create_key(path: Path) -> ec.EllipticCurvePrivateKey:
    if path.exists():
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{path} is no key; remove it to make a new one")
        return key
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_durably(path, pem, mode=PRIVATE)
    return key


def _certificate_request(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a CSR; the aggregator knows the name, from the token."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "device")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def _confirmed(answer: bytes, token: Token, url: str) -> str:
    """Return the token's CA in PEM, and only it: an answer may hold others behind it.

    Raises:
        JoinRefused: the answer does not begin with it.
    """
    try:
        found = x509.load_pem_x509_certificate(answer)
    except ValueError:
        found = None
    if found is None or found.fingerprint(hashes.SHA256()) != token.ca_sha256:
        raise JoinRefused(url, "this is not the fleet that the token is for: its CA is another one")
    return found.public_bytes(serialization.Encoding.PEM).decode()


def _check_certificate(url: str, answer: EnrolAnswer, key: ec.EllipticCurvePrivateKey) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
    except ValueError:
        raise JoinRefused(url, "what it gave as a certificate can't be read as one") from None
    if certificate.public_key() != key.public_key():
        raise JoinRefused(url, "it gave a certificate for another key than this device's")


def _refuse_other_fleet(url: str, state: Path, aggregator_key: str) -> None:
    """Keep a device that trusts one aggregator from being handed to another unnoticed."""
    if trusted_key(state) not in (None, aggregator_key):
        raise JoinRefused(
            url, f"{state} belongs to another aggregator; name another --state for this fleet"
        )
