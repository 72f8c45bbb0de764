"""Signed certificates of explorations: what was explored, with which result, by which version; and their check.

A certificate stands for an exploration that a server need not repeat. It is signed with an Ed25519 key (RFC 8032), over
the JSON of its fields in alphabetical order without white space. Needs `cryptography` (the extra `policies`).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from interlock import __version__
from interlock.core.errors import Invalid
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.policy_switches import Walk
from interlock.policies.laws import LAWS

if TYPE_CHECKING:
    from interlock.policies.model_checker import Exploration

OUTSTANDING_MIN: Final = 3
"""The outstanding requests that an exploration must have covered to be accepted by a server."""
VALID_DAYS: Final = 365
Time = Annotated[datetime, Meta(tz=True)]
_PREFIX: Final = "ed25519:"
_PUBLIC_BYTES: Final = 32


class Bounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bounds of an exploration."""

    outstanding_max: int
    faults_max: int | None
    """None: any number of faults."""


class Certificate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of one exploration."""

    policy: str
    """Its name, for people."""
    digest: str
    """Of the policy, in hexadecimal: what the certificate is about."""
    version: str
    """The version of Interlock that explored it."""
    issued_at: Time
    expires_at: Time
    bounds: Bounds
    assumptions: tuple[str, ...]
    role_limits: str | None
    """What callers of an ordinary role alone can do, as a sentence."""
    laws: tuple[int, ...]
    """The laws that were checked."""
    operations: tuple[Operation, ...]
    """The operations submitted, one for each symmetry class."""
    states: int
    transitions: int
    depth: int
    seconds: float
    complete: bool
    violations: int


class SignedCertificate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A certificate, and who vouches for it."""

    certificate: Certificate
    public_key: str | None = None
    """`ed25519:` and the 32 bytes of the key in Base64; None if it is not signed."""
    signature: str | None = None
    """Base64."""


def certify(
    policy: CompiledPolicy, found: Exploration, faults_max: int | None, now: datetime, valid_days: int = VALID_DAYS
) -> Certificate:
    """Return the certificate of an exploration of a policy, whatever its result."""
    return Certificate(
        policy=policy.policy.name,
        digest=policy.policy.digest,
        version=__version__,
        issued_at=now,
        expires_at=now + timedelta(days=valid_days),
        bounds=Bounds(outstanding_max=found.outstanding_max, faults_max=faults_max),
        assumptions=found.assumptions,
        role_limits=None if found.weaker is None else found.weaker.sentence,
        laws=tuple(LAWS),
        operations=found.operations,
        states=found.states,
        transitions=found.transitions,
        depth=found.depth,
        seconds=round(found.seconds, 3),
        complete=found.complete,
        violations=len(found.violations),
    )


# ------------------------------------------------------------------------------------------------------------- keys


def new_private_key() -> bytes:
    """Return a new private key as PEM (PKCS 8, not encrypted)."""
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_private_key(pem: bytes) -> Ed25519PrivateKey:
    """Return the private key in a PEM file. Raises `Invalid`."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise Invalid(
            "Invalid key: expected an Ed25519 private key as PEM, without a password.",
            remedy="Make one with `interlock policy key FILE`.",
        )
    return key


def public_text(key: Ed25519PrivateKey) -> str:
    """Return the public half of a key, as configurations and certificates have it."""
    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return _PREFIX + base64.b64encode(raw).decode()


def _public_key(text: str) -> Ed25519PublicKey:
    """Return the key of a text. Raises `Invalid`."""
    try:
        raw = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not text.startswith(_PREFIX) or len(raw) != _PUBLIC_BYTES:
        raise Invalid(
            f"Invalid public key {text[:80]!r}: expected '{_PREFIX}' and {_PUBLIC_BYTES} bytes in Base64.",
            remedy="`interlock policy key FILE` prints the public key of FILE.",
        )
    return Ed25519PublicKey.from_public_bytes(raw)


# ------------------------------------------------------------------------------------------------ signing and checking


def sign(certificate: Certificate, key: Ed25519PrivateKey) -> SignedCertificate:
    """Return the certificate with its signature."""
    signature = base64.b64encode(key.sign(_signed_bytes(certificate))).decode()
    return SignedCertificate(certificate=certificate, public_key=public_text(key), signature=signature)


def check(signed: SignedCertificate, digest: str, trusted: Iterable[str], now: datetime) -> Walk:
    """Return the exploration that a certificate vouches for, for the policy with that digest.

    `trusted` are the public keys whose certificates are accepted.

    Raises:
        Invalid: it is not accepted; the message says why.
    """
    if signed.public_key is None or signed.signature is None:
        raise _refused("it is not signed", "Write it with `interlock policy explore --certificate FILE --key KEY`.")
    if signed.public_key not in frozenset(trusted):
        raise _refused(
            f"it is signed with the key {signed.public_key[:80]}, which this server does not trust",
            "Add the key to `policy_keys` in the server's configuration, or load the policy without a certificate.",
        )
    try:
        signature = base64.b64decode(signed.signature, validate=True)
        _public_key(signed.public_key).verify(signature, _signed_bytes(signed.certificate))
    except (binascii.Error, ValueError, InvalidSignature):
        raise _refused("its signature does not fit its content", "Sign it again; it was changed or damaged.") from None
    certificate = signed.certificate
    reason = next(_mismatches(certificate, digest, now), None)
    if reason is not None:
        raise _refused(reason, "Explore this policy with the server's version of Interlock, and sign the result.")
    return Walk(
        states=certificate.states,
        transitions=certificate.transitions,
        complete=True,
        seconds=certificate.seconds,
        assumptions=certificate.assumptions,
        role_limits=certificate.role_limits,
        certified_by=signed.public_key,
        version=certificate.version,
    )


def _mismatches(certificate: Certificate, digest: str, now: datetime) -> Iterator[str]:
    """Yield each reason for which a certificate with a valid signature is not accepted."""
    if certificate.digest != digest:
        yield f"it is for the policy with the digest {certificate.digest[:16]}, and this one has {digest[:16]}"
    if certificate.version != __version__:
        yield f"Interlock {certificate.version[:40]} explored the policy, and this server is {__version__}"
    if now >= certificate.expires_at:
        yield f"it expired at {certificate.expires_at.isoformat()}"
    if now < certificate.issued_at:
        yield f"it was issued at {certificate.issued_at.isoformat()}, which has not come yet"
    if certificate.violations:
        yield f"the exploration found {certificate.violations} violations"
    if not certificate.complete:
        yield "the exploration is incomplete"
    missing = LAWS.keys() - certificate.laws
    if missing:
        yield f"the laws {', '.join(map(str, sorted(missing)))} were not checked"
    if certificate.bounds.outstanding_max < OUTSTANDING_MIN:
        most = certificate.bounds.outstanding_max
        yield f"it covers {most} outstanding requests at a time, and at least {OUTSTANDING_MIN} are required"
    if certificate.bounds.faults_max is not None:
        yield f"it covers at most {certificate.bounds.faults_max} faults"


def _refused(why: str, remedy: str) -> Invalid:
    return Invalid(f"Certificate not accepted: {why}.", remedy=remedy)


def _signed_bytes(certificate: Certificate) -> bytes:
    return msgspec.json.encode(msgspec.to_builtins(certificate), order="sorted")


def check_public_keys(texts: Iterable[str]) -> None:
    """Raise `Invalid` if one of the texts is not a public key."""
    for text in texts:
        _public_key(text)
