"""A certificate authority of the tests' own, for servers and clients that want TLS."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """Paths of a certificate and its private key, both PEM."""

    certificate: Path
    key: Path


def _name(common_name: str, group: str = "") -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if group:
        parts.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, group))
    return x509.Name(parts)


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


class Authority:
    """Signs certificates that last a day (or have ended, if a test wants that)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("tests")
        builder = self._builder(self._name, self._key, ended=False).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.certificate = folder / "ca.crt"
        self._write(self.certificate, builder)

    def server(self, name: str, addresses: list[str]) -> Pair:
        """Return a pair for a server that listens on ``addresses`` (IP addresses)."""
        names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.DNSName(name)]
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        return self._signed(name, "", ExtendedKeyUsageOID.SERVER_AUTH, names=names)

    def client(self, user: str, group: str = "", *, ended: bool = False) -> Pair:
        """Return a pair for ``user`` of ``group``; ``ended`` makes it one of yesterday."""
        return self._signed(user, group, ExtendedKeyUsageOID.CLIENT_AUTH, ended=ended)

    def signing_key(self, name: str) -> Path:
        """Return the path of a new RSA key, as service account tokens are signed with."""
        path = self.folder / f"{name}.key"
        path.write_bytes(_pem(rsa.generate_private_key(public_exponent=65537, key_size=2048)))
        return path

    def _signed(
        self,
        user: str,
        group: str,
        usage: x509.ObjectIdentifier,
        *,
        names: list[x509.GeneralName] | None = None,
        ended: bool = False,
    ) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(_name(user, group), key, ended=ended).add_extension(
            x509.ExtendedKeyUsage([usage]), critical=False
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        stem = user.replace(":", "-")
        pair = Pair(self.folder / f"{stem}.crt", self.folder / f"{stem}.key")
        pair.key.write_bytes(_pem(key))
        self._write(pair.certificate, builder)
        return pair

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ended: bool
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        end = now - DAY if ended else now + DAY
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * DAY)
            .not_valid_after(end)
        )

    def _write(self, path: Path, builder: x509.CertificateBuilder) -> None:
        signed = builder.sign(self._key, hashes.SHA256())
        path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
