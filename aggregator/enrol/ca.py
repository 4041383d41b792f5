"""The private certificate authority of one fleet (ECDSA P-256, X.509).

It vouches for names: a device's certificate has its name as the common name, which the broker takes
for the user's name.

Time is a parameter, and is not to be trusted: a clock may be wrong when something is issued and
right when that is looked at. So all that is issued begins with the CA, whose begin is dated back a
little for devices whose clock is behind; only ends follow the clock.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aggregator.errors import EnrolmentRefused

CA_DAYS = 3650
LEAF_DAYS = 730
"""Validity of every certificate under the CA: two years, then it is renewed with a new token."""
BACKDATE = timedelta(days=1)
RSA_BITS = (2048, 4096)

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


class Issued(NamedTuple):
    """Hold a certificate and, where it was made here, its key."""

    certificate: x509.Certificate
    key: Key


@dataclass(frozen=True, slots=True)
class Authority:
    """Issue certificates and revocation lists."""

    certificate: x509.Certificate
    key: Key

    @classmethod
    def create(cls, name: str, now: datetime) -> Authority:
        """Make a new CA, valid for ten years."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(name)
        begin, until = now.astimezone(timezone.utc) - BACKDATE, now + timedelta(days=CA_DAYS)
        builder = (
            _builder(subject, subject, key.public_key(), begin, until)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    def server(self, hosts: Sequence[str], now: datetime) -> Issued:
        """Issue the certificate of broker and enrolment, for these host names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        builder = self._leaf(
            _subject(hosts[0]), key.public_key(), now, ExtendedKeyUsageOID.SERVER_AUTH
        )
        builder = builder.add_extension(names, critical=False)
        return Issued(builder.sign(self.key, hashes.SHA256()), key)

    def renewed(self, old: x509.Certificate, now: datetime) -> x509.Certificate:
        """Issue a certificate as an old one was, for the same key; it does not end earlier."""
        public, (purpose,) = (
            old.public_key(),
            old.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value,
        )
        assert isinstance(public, ec.EllipticCurvePublicKey), "keys of a fleet's folder are EC"
        lasting = max(now, old.not_valid_after_utc - timedelta(days=LEAF_DAYS))
        builder = self._leaf(old.subject, public, lasting, purpose)
        for extension in old.extensions:
            if isinstance(extension.value, x509.SubjectAlternativeName):
                builder = builder.add_extension(extension.value, critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def client(self, name: str, now: datetime) -> Issued:
        """Issue a client certificate with a new key."""
        key = ec.generate_private_key(ec.SECP256R1())
        return Issued(self.client_for(key.public_key(), name, now), key)

    def client_for(self, public: PublicKey, name: str, now: datetime) -> x509.Certificate:
        """Issue a client certificate for somebody's own key."""
        builder = self._leaf(_subject(name), public, now, ExtendedKeyUsageOID.CLIENT_AUTH)
        return builder.sign(self.key, hashes.SHA256())

    def revocations(self, revoked: Sequence[tuple[int, datetime]]) -> bytes:
        """Return the CRL in PEM: serial numbers and when each was revoked.

        With a list that is due, or of a time to come, a broker lets nobody in. So it does not fall
        due before the CA itself, and is dated a second after the CA's begin for each entry: a
        longer one is newer, which counts where somebody knows both (OpenSSL takes the newer).
        """
        begin = self.certificate.not_valid_before_utc + timedelta(seconds=len(revoked))
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(begin)
            .next_update(self.certificate.not_valid_after_utc)
            .add_extension(self._authority_id(), critical=False)
            .add_extension(x509.CRLNumber(len(revoked)), critical=False)
        )
        for serial, when in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
            )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _leaf(
        self, subject: x509.Name, public: PublicKey, now: datetime, purpose: x509.ObjectIdentifier
    ) -> x509.CertificateBuilder:
        own = self.certificate
        begin = own.not_valid_before_utc
        until = min(max(now, begin) + timedelta(days=LEAF_DAYS), own.not_valid_after_utc)
        return (
            _builder(subject, own.subject, public, begin, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(self._authority_id(), critical=False)
        )

    def _authority_id(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())


def read_request(csr: str) -> PublicKey:
    """Return the key that a certificate is asked for; name and extensions of a CSR are ignored.

    Raises:
        EnrolmentRefused: it can't be read, is not signed with that key, or the key is too weak.
    """
    try:
        request = x509.load_pem_x509_csr(csr.encode())
        public, signed = request.public_key(), request.is_signature_valid
    except x509.InvalidVersion:
        raise EnrolmentRefused("the certificate request is of a version that is unknown") from None
    except (ValueError, UnsupportedAlgorithm):
        raise EnrolmentRefused(
            "the certificate request can't be read: it is no PKCS #10 in PEM, or damaged"
        ) from None
    if not signed:
        raise EnrolmentRefused("the certificate request is not signed with its own key")
    if isinstance(public, ec.EllipticCurvePublicKey) and isinstance(
        public.curve, ec.SECP256R1 | ec.SECP384R1
    ):
        return public
    if isinstance(public, rsa.RSAPublicKey) and RSA_BITS[0] <= public.key_size <= RSA_BITS[1]:
        return public
    if isinstance(public, ed25519.Ed25519PublicKey):
        return public
    raise EnrolmentRefused("its key must be ECDSA P-256 or P-384, Ed25519, or RSA of 2048–4096 bit")


def sha256(certificate: x509.Certificate) -> bytes:
    """Return a certificate's hash, over its DER bytes."""
    return certificate.fingerprint(hashes.SHA256())


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public: PublicKey, begin: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
