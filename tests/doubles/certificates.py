"""Real CAs and certificates, made in no time: for TLS as it should be, and as it should not."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kvc2.host.tls import TlsFiles

DAY = datetime.timedelta(days=1)
HOSTS = ("127.0.0.1", "localhost")


class Pair:
    """A certificate and its key; `files` writes both, and the CA's that the other end must have."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate.public_bytes(serialization.Encoding.PEM)
        self.key = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def files(self, folder: Path, ca: CertificateAuthority) -> TlsFiles:
        """certificate.pem, key.pem (0600) and ca.pem in `folder`, each replaced whole."""
        folder.mkdir(exist_ok=True)
        found = TlsFiles(folder / "certificate.pem", folder / "key.pem", folder / "ca.pem")
        replace(found.certificate, self.certificate)
        replace(found.key, self.key)
        replace(found.ca, ca.certificate)
        return found


class CertificateAuthority:
    """`pair` signs a certificate for a subject and alternative names: hosts, addresses and URIs."""

    def __init__(self, name: str = "ca") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        signed = _builder(self._name, self._name, self._key, 1)
        signed = signed.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        self._certificate = signed.sign(self._key, hashes.SHA256())
        self.certificate = self._certificate.public_bytes(serialization.Encoding.PEM)

    def pair(self, subject: str, names: Sequence[str] = (), *, days: int = 1) -> Pair:
        """Valid from two days ago until in so many days; negative: it has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = _builder(_named(subject), self._name, key, days)
        if names:
            alternative = x509.SubjectAlternativeName([_alternative(each) for each in names])
            made = made.add_extension(alternative, False)
        return Pair(made.sign(self._key, hashes.SHA256()), key)


def replace(path: Path, content: bytes) -> None:
    """Whole or not at all, and its owner's alone."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.chmod(0o600)
    fresh.rename(path)


def _named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative(name: str) -> x509.GeneralName:
    if ":" in name:
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * DAY)
        .not_valid_after(now + days * DAY)
    )
