"""TLS with client certificates: the files of one party, and what went wrong in words.

TLS 1.2 at least. With TLS 1.3 a client takes a handshake for done before the server has looked at
its certificate, so that a refusal shows as a connection that is closed: `refusal` asks again to
hear why.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from protocol.errors import CertificateUnusable, os_words

PATIENCE_S = 3.0
_REMEDY = "bring it back from a backup, or join again with a new token"
_CLOCK = "if that is not so, this computer's clock is wrong (it says {now:%Y-%m-%d %H:%M} UTC)"
_OPENSSL_NOT_YET, _OPENSSL_EXPIRED, _OPENSSL_OTHER_HOST, _OPENSSL_OTHER_IP = 9, 10, 62, 64

_ALERTS = {
    "CERTIFICATE_REVOKED": "it says that this certificate has been revoked",
    "CERTIFICATE_EXPIRED": "it says that this certificate has expired, or is not valid yet by its "
    "clock",
    "UNKNOWN_CA": "it does not know who issued this certificate; it belongs to another fleet",
    "CERTIFICATE_REQUIRED": "it asks for a client certificate; join the fleet first",
    "BAD_CERTIFICATE": "it does not take this certificate",
    "HANDSHAKE_FAILURE": "it asks for a client certificate, or for other ciphers than there are",
    "PROTOCOL_VERSION": "it speaks another version of TLS; 1.2 or 1.3 is needed",
    "WRONG_VERSION_NUMBER": "it does not speak TLS on this port",
    "RECORD_LAYER_FAILURE": "it does not speak TLS on this port",
}
"""Part of OpenSSL's reason → what it means here."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Name the PEM files of a party: whom it trusts, its own certificate and its key."""

    ca: Path
    certificate: Path
    key: Path

    def context(self, now: datetime | None = None) -> ssl.SSLContext:
        """Return a client's context that trusts this CA alone.

        Raises:
            CertificateUnusable: a file is missing or not in order, or the certificate is not valid
                now.
        """
        check_validity(self.certificate, now or datetime.now(timezone.utc))
        context = client_context(_read(self.ca).public_bytes(Encoding.PEM).decode())
        try:
            context.load_cert_chain(self.certificate, self.key)
        except ssl.SSLError as error:
            other = "KEY_VALUES_MISMATCH" in (error.reason or "")
            why = f"another one's than that of {self.certificate.name}" if other else "damaged"
            raise CertificateUnusable(self.key, f"the key is {why}: {_REMEDY}") from None
        except OSError as error:
            raise CertificateUnusable(self.key, f"{os_words(error)}: {_REMEDY}") from None
        return context


def client_context(ca: str) -> ssl.SSLContext:
    """Return a context that takes a server with a certificate of `ca` (PEM) for its host name."""
    context = ssl.create_default_context(cadata=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def check_validity(path: Path, now: datetime) -> None:
    """Check that a certificate is there and valid at a time.

    Raises:
        CertificateUnusable: it is not; says since or from when.
    """
    found = _read(path)
    clock = _CLOCK.format(now=now)
    if now > found.not_valid_after_utc:
        since = f"{found.not_valid_after_utc:%Y-%m-%d}"
        raise CertificateUnusable(
            path, f"it has expired on {since}: ask for a new token and join again; {clock}"
        )
    if now < found.not_valid_before_utc:
        start = f"{found.not_valid_before_utc:%Y-%m-%d}"
        raise CertificateUnusable(path, f"it is not valid before {start}; {clock}")


def _read(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise CertificateUnusable(path, f"{error.strerror}: {_REMEDY}") from None
    except ValueError:
        why = f"the file is damaged, it holds no certificate in PEM: {_REMEDY}"
        raise CertificateUnusable(path, why) from None


def explain(error: ssl.SSLError) -> str:
    """Say in words why a TLS connection could not be made."""
    now = datetime.now(timezone.utc)
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in (_OPENSSL_NOT_YET, _OPENSSL_EXPIRED):
            when = "expired" if error.verify_code == _OPENSSL_EXPIRED else "not valid yet"
            return f"the server's certificate is {when}; {_CLOCK.format(now=now)}"
        if error.verify_code in (_OPENSSL_OTHER_HOST, _OPENSSL_OTHER_IP):
            return (
                "the server's certificate is for other names than this address; use one that was "
                "given to `aggregator init --host`"
            )
        return f"the server's certificate is not to be trusted: {error.verify_message}"
    reason = getattr(error, "reason", None) or str(error)
    for part, words in _ALERTS.items():
        if part in reason:
            return words
    return str(error)


def refusal(host: str, port: int, context: ssl.SSLContext) -> str:
    """Connect once more and return why the server hangs up; empty when it does not say."""
    try:
        with (
            socket.create_connection((host, port), PATIENCE_S) as raw,
            context.wrap_socket(raw, server_hostname=host) as link,
        ):
            link.recv(1)
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return ""
    except ssl.SSLError as error:
        return explain(error)
    except OSError:
        return ""
    return ""


def socket_words(error: Exception, host: str) -> str:
    """Return why no connection could be made to a host."""
    if isinstance(error, socket.gaierror):
        return f"the name {host} is not known: {error.strerror}"
    return os_words(error)
