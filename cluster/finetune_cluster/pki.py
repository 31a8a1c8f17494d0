"""Certificates and kubeconfigs of a cluster."""

import base64
import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from finetune_cluster.locks import write_atomically

VALID_DAYS = 3650


class Authority:
    """A certificate authority in a folder. What exists is kept, so that calling it again changes nothing."""

    def __init__(self, folder: Path, name: str) -> None:
        self.certificate_file, self.key_file = folder / f"{name}.crt", folder / f"{name}.key"
        self._folder = folder
        if not self.certificate_file.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
            certificate = _builder(subject, subject, key).add_extension(
                x509.BasicConstraints(ca=True, path_length=None), critical=True
            )
            usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
            identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
            certificate = certificate.add_extension(usage, critical=True).add_extension(identifier, critical=False)
            _write_key(self.key_file, key)
            write_atomically(self.certificate_file, _pem(certificate.sign(key, hashes.SHA256())))
        loaded = serialization.load_pem_private_key(self.key_file.read_bytes(), password=None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self._key = loaded
        self._certificate = x509.load_pem_x509_certificate(self.certificate_file.read_bytes())

    def issue(
        self, file: str, common_name: str, groups: Sequence[str] = (), sans: Sequence[str] = ()
    ) -> tuple[Path, Path]:
        """Paths of certificate and key for a client and, with ``sans`` (names and addresses), also a server."""
        certificate_file, key_file = self._folder / f"{file}.crt", self._folder / f"{file}.key"
        if not certificate_file.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            names = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
            subject = x509.Name([*names, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
            builder = _builder(subject, self._certificate.subject, key).add_extension(
                x509.BasicConstraints(ca=False, path_length=None), critical=True
            )
            usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if sans else [])]
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
            builder = builder.add_extension(issuer, critical=False)
            if sans:
                builder = builder.add_extension(
                    x509.SubjectAlternativeName([_san(san) for san in sans]), critical=False
                )
            _write_key(key_file, key)
            write_atomically(certificate_file, _pem(builder.sign(self._key, hashes.SHA256())))
        return certificate_file, key_file


def service_account_key(folder: Path) -> Path:
    """The key that service account tokens are signed with and checked against."""
    file = folder / "service-account.key"
    if not file.exists():
        _write_key(file, ec.generate_private_key(ec.SECP256R1()))
    return file


def write_kubeconfig(file: Path, context: str, server: str, authority: Path, user: dict[str, str]) -> Path:
    """Write a kubeconfig that holds everything itself; ``user`` is that section of it (token, or certificate data)."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": context,
        "clusters": [
            {"name": context, "cluster": {"server": server, "certificate-authority-data": _base64(authority)}}
        ],
        "users": [{"name": context, "user": user}],
        "contexts": [{"name": context, "context": {"cluster": context, "user": context}}],
    }
    write_atomically(file, yaml.safe_dump(config, sort_keys=False), mode=0o600)
    return file


def certificate_user(pair: tuple[Path, Path]) -> dict[str, str]:
    """The user section of a kubeconfig for a client certificate."""
    return {"client-certificate-data": _base64(pair[0]), "client-key-data": _base64(pair[1])}


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
    )


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_key(file: Path, key: ec.EllipticCurvePrivateKey) -> None:
    # SEC 1 ("EC PRIVATE KEY"): kube-apiserver takes it for service accounts as well as for TLS.
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL
    write_atomically(file, key.private_bytes(encoding, form, serialization.NoEncryption()), mode=0o600)
