"""The TLS settings of the HTTP server."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Protocol

from interlock.config import Config
from interlock.core.errors import Unavailable


class CertificateIssuer(Protocol):
    """The server's CA. Both raise `Unavailable`, OSError."""

    @property
    def ca(self) -> str:
        """The certificate of the CA (PEM)."""
        ...

    def issue_server(self, names: tuple[str, ...]) -> Path:
        """Return the file of a new key and certificate for a server of these names and addresses."""
        ...


def server_tls(config: Config, issuer: CertificateIssuer) -> ssl.SSLContext:
    """Return settings with the certificate that the configured files have now, or with a new one of the server's CA.

    Raises:
        Unavailable: the certificate cannot be loaded, or the CA's key is missing.
        OSError: a new certificate cannot be written.
    """
    certificate, key = config.tls_certificate, config.tls_key
    if config.tls_names:
        names = (*config.tls_names, config.listen_host, "localhost", "127.0.0.1")
        certificate = key = str(issuer.issue_server(tuple(dict.fromkeys(names))))
    settings = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    settings.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.hosts.require_client_certificates:
        settings.verify_mode = ssl.CERT_OPTIONAL
        settings.load_verify_locations(cadata=issuer.ca)
    try:
        settings.load_cert_chain(certificate, key)
    except OSError as error:
        raise Unavailable(
            f"Cannot load the server's certificate from {certificate} and its key from {key}: "
            f"{error.strerror or error}.",
            remedy="Set tls_certificate and tls_key to PEM files of a certificate and of its key.",
        ) from error
    return settings
