"""The server's CA, which issues the certificates of hosts. Its key stays in the server's data folder."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from interlock.config import Config
from interlock.core.errors import Invalid, Unavailable
from interlock.hypervisors.certificates.host_certificate import CA_FILE, HostCertificate, key_pem
from interlock.images.atomic_files import write_atomically
from interlock.ports.hosts import IssuedCertificate, host_uri

_KEY_FILE: Final = "ca.key"
_SERVER_FILE: Final = "server.pem"
_CA_LIFETIME: Final = timedelta(days=365 * 20)
_SKEW: Final = timedelta(days=1)
"""How far the clock of a host may be behind the server's."""
_RENEWALS: Final = 3
"""How many times a certificate is renewed within its lifetime."""


class WallClock(Protocol):
    """The clocks of a store."""

    def now_ms(self) -> int: ...
    def shown_ms(self, at_ms: int) -> int: ...


class CertificateAuthority:
    """Issues certificates for hosts; the CA is created with the first one.

    Args:
        config: names the folder of the CA's key and certificate, and of the certificate of the server's own host.
        own: the name of that host.
        store: has the wall clock.
    """

    def __init__(self, config: Config, own: str, store: WallClock) -> None:
        self._folder = config.certificates
        self._own = own
        self._valid = timedelta(milliseconds=config.hosts.certificate_ms)
        self._store = store
        self._own_expires: datetime | None = None
        self._ca: tuple[ec.EllipticCurvePrivateKey, x509.Certificate] | None = None

    def issue(self, name: str, request: str) -> IssuedCertificate:
        """Return a certificate for the host of that name and the key of its certificate request (PEM).

        The certificate of the server's own host is renewed first if it is due.

        Raises:
            Invalid: the request is not one, or its signature is wrong.
            Unavailable: the CA's key is missing or invalid.
            OSError: a file cannot be written.
        """
        now = self._now()
        left = timedelta() if self._own_expires is None else self._own_expires - now
        if not self._valid * (_RENEWALS - 1) / _RENEWALS < left <= self._valid:  # more, if the clock was set back
            own = HostCertificate(self._folder)
            own.install(self._sign(self._own, own.request(), now))
            self._own_expires = now + self._valid
        return self._sign(name, request, now)

    @property
    def ca(self) -> str:
        """The certificate of the CA (PEM). Raises as `issue`."""
        return _pem(self._open(self._now())[1])

    def issue_server(self, names: tuple[str, ...]) -> Path:
        """Return the file of a new key and certificate for an HTTPS server of these names and addresses.

        Raises:
            Unavailable, OSError: as `issue`.
        """
        now = self._now()
        key, ca = ec.generate_private_key(ec.SECP256R1()), self._open(now)[1]
        built = _builder(_subject(names[0]), ca.subject, key.public_key(), now, self._valid)
        alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
        certificate = self._signed(built, alternatives, (ExtendedKeyUsageOID.SERVER_AUTH,))
        path = self._folder / _SERVER_FILE
        write_atomically(path, key_pem(key) + _pem(certificate).encode(), mode=0o600)
        return path

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._store.shown_ms(self._store.now_ms()) / 1000, tz=UTC)

    def _sign(self, name: str, request: str, now: datetime) -> IssuedCertificate:
        ca = self._open(now)[1]
        public_key = _requested_key(request)
        built = _builder(_subject(name), ca.subject, public_key, now, self._valid)
        uri = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(host_uri(name))])
        certificate = self._signed(built, uri, (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH))
        return IssuedCertificate(
            certificate=_pem(certificate), ca=_pem(ca), renew_s=int(self._valid.total_seconds() / _RENEWALS)
        )

    def _signed(
        self,
        built: x509.CertificateBuilder,
        names: x509.SubjectAlternativeName,
        uses: tuple[x509.ObjectIdentifier, ...],
    ) -> x509.Certificate:
        """Return the certificate of a host or server, with the extensions that all of them have."""
        assert self._ca is not None
        key = self._ca[0]
        return (
            built.add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )

    def _open(self, now: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        if self._ca is None:
            self._folder.mkdir(mode=0o711, exist_ok=True)
            key_path, path = self._folder / _KEY_FILE, self._folder / CA_FILE
            if key_path.exists():
                key = self._read_key(key_path)
            elif path.exists():
                raise Unavailable(
                    f"The key of the server's CA is not found: {key_path}.",
                    remedy=f"Restore it from a backup; or delete {path}: the hosts then get certificates of a new CA "
                    "when their agents connect.",
                )
            else:
                key = ec.generate_private_key(ec.SECP256R1())
                write_atomically(key_path, key_pem(key), mode=0o600)
            if not path.exists():
                write_atomically(path, _pem(_self_signed(key, self._own, now)), mode=0o644)
            self._ca = key, x509.load_pem_x509_certificate(path.read_bytes())
        return self._ca

    def _read_key(self, path: Path) -> ec.EllipticCurvePrivateKey:
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise Unavailable(f"Invalid key of the server's CA in {path}: {error}.") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise Unavailable(f"Invalid key of the server's CA in {path}: expected an EC key.")
        return key


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _requested_key(request: str) -> ec.EllipticCurvePublicKey:
    try:
        found = x509.load_pem_x509_csr(request.encode())
        signed = found.is_signature_valid
        key = found.public_key()
    except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise Invalid(f"Invalid certificate request: {error}.") from None
    if not signed or not isinstance(key, ec.EllipticCurvePublicKey):
        raise Invalid("Invalid certificate request: expected one that is signed with its EC key.")
    return key


def _self_signed(key: ec.EllipticCurvePrivateKey, own: str, now: datetime) -> x509.Certificate:
    name = _subject(f"Interlock CA of {own}")
    public_key = key.public_key()
    return (
        _builder(name, name, public_key, now, _CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .sign(key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, valid: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + valid)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
