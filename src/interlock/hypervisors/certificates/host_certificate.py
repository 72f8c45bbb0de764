"""The key and certificate of one host, in its data folder, and the TLS settings made of them."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from interlock.core.errors import OperationRejected
from interlock.images.atomic_files import write_atomically
from interlock.ports.hosts import IssuedCertificate

CA_FILE: Final = "ca.pem"
_FILE: Final = "host.pem"
_ENROLLED: Final = "enrolled"


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class HostCertificate:
    """The certificate of this host, with its key; both are in one file, and replaced together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key: ec.EllipticCurvePrivateKey | None = None

    @property
    def path(self) -> Path | None:
        """The file with certificate and key; None if there is none yet."""
        path = self._folder / _FILE
        return path if path.exists() else None

    def request(self) -> str:
        """Create a key, and return the request for its certificate (PEM)."""
        self._key = ec.generate_private_key(ec.SECP256R1())
        built = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(self._key, hashes.SHA256())
        return built.public_bytes(serialization.Encoding.PEM).decode()

    def install(self, issued: IssuedCertificate) -> None:
        """Store the certificate for the key of the last `request`. Raises OSError."""
        assert self._key is not None
        self._folder.mkdir(mode=0o711, exist_ok=True)
        write_atomically(self._folder / CA_FILE, issued.ca, mode=0o644)
        write_atomically(self._folder / _FILE, key_pem(self._key) + issued.certificate.encode(), mode=0o600)

    def is_enrolled_with(self, secret: str) -> bool:
        """Whether this secret was used to get the first certificate. Raises OSError."""
        path = self._folder / _ENROLLED
        return path.exists() and path.read_text() == hashlib.sha256(secret.encode()).hexdigest()

    def note_enrolled_with(self, secret: str) -> None:
        """Remember the hash of a secret that was used. Raises OSError."""
        write_atomically(self._folder / _ENROLLED, hashlib.sha256(secret.encode()).hexdigest(), mode=0o600)

    def settings(self, *, server_side: bool) -> ssl.SSLContext:
        """Return settings for TLS 1.3 with another host: both sides need a certificate of the same CA.

        The name in the other side's certificate is to be checked: `ports.hosts.certified_host`.

        Raises:
            OperationRejected: this host has no certificate.
        """
        settings = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
        settings.minimum_version = ssl.TLSVersion.TLSv1_3
        # The end of a connection must not look like the end of what was sent; some versions of Python allow that.
        settings.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
        settings.check_hostname = False
        settings.verify_mode = ssl.CERT_REQUIRED
        if server_side:
            settings.num_tickets = 0  # sessions are not resumed
        try:
            settings.load_cert_chain(self._folder / _FILE)
            settings.load_verify_locations(self._folder / CA_FILE)
        except OSError as error:
            raise OperationRejected(
                f"This host has no valid certificate in {self._folder}: {error.strerror or error}.",
                remedy="Restart its agent: it gets one from its server when it connects.",
            ) from None
        return settings
