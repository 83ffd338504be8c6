"""A certificate authority for tests."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Authority:
    """Signs certificates for 127.0.0.1."""

    def __init__(self, name: str = "authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.pem = _pem(_sign(self._name, self._name, self._key, self._key, is_authority=True))

    def issue(self, name: str = "127.0.0.1") -> tuple[bytes, bytes]:
        """Returns a new certificate and its key, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _sign(_name(name), self._name, key, self._key, is_authority=False)
        return _pem(certificate), key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def issue_into(self, folder: Path, name: str = "127.0.0.1") -> tuple[Path, Path]:
        """Writes a new certificate and its key, each by a rename."""
        paths = (folder / "server.crt", folder / "server.key")
        for path, content in zip(paths, self.issue(name), strict=True):
            fresh = path.with_suffix(".fresh")
            fresh.write_bytes(content)
            fresh.rename(path)
        return paths


def serial_of(pem: bytes | str) -> int:
    content = pem.encode() if isinstance(pem, str) else pem
    return x509.load_pem_x509_certificate(content).serial_number


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _sign(subject, issuer, key, issuer_key, *, is_authority: bool) -> x509.Certificate:
    today = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
