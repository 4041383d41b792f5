"""PEM files of a fleet's folder: read, or named with what is wrong and what helps.

They raise FolderError, in one line without the words of a library.
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from aggregator.errors import FolderError
from protocol.errors import os_words

BACKUP = "bring it back from a backup"


def read_bytes(path: Path) -> bytes:
    """Return what a file holds."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FolderError(f"{path} is missing: {BACKUP}") from None
    except PermissionError:
        raise FolderError(
            f"{path} may not be read: run this as the user who made the fleet"
        ) from None
    except OSError as error:
        raise FolderError(f"can't read the fleet: {os_words(error)}; {BACKUP}") from None


def read_certificate(path: Path) -> x509.Certificate:
    """Return the certificate in a file."""
    try:
        found = x509.load_pem_x509_certificate(read_bytes(path))
        found.public_key(), found.extensions  # which are read no sooner than asked for
    except (ValueError, UnsupportedAlgorithm):
        raise FolderError(f"{path} is damaged: it holds no certificate in PEM; {BACKUP}") from None
    return found


def read_key(path: Path) -> PrivateKeyTypes:
    """Return the private key in a file."""
    try:
        return serialization.load_pem_private_key(read_bytes(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise FolderError(
            f"{path} is damaged: it holds no key in PEM that can be read; {BACKUP}"
        ) from None


def read_pair(certificate: Path, key: Path) -> tuple[x509.Certificate, PrivateKeyTypes]:
    """Return a certificate and the key that belongs to it."""
    found, own = read_certificate(certificate), read_key(key)
    if own.public_key() != found.public_key():
        raise FolderError(
            f"{key} is not the key of {certificate.name} beside it: bring both back from one backup"
        )
    return found, own


def read_revocations(path: Path) -> x509.CertificateRevocationList | None:
    """Return a revocation list; None if it is missing or damaged, for it can be made anew."""
    try:
        return x509.load_pem_x509_crl(path.read_bytes())
    except (OSError, ValueError):
        return None
