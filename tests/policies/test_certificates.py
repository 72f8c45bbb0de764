"""A certificate stands for an exploration if a trusted key signed it for this policy, version and time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from interlock.core.errors import Invalid
from interlock.policies.certificates import (
    Bounds,
    Certificate,
    SignedCertificate,
    certify,
    check,
    check_public_keys,
    new_private_key,
    public_text,
    read_private_key,
    sign,
)
from interlock.policies.language.loader import compile_named
from interlock.policies.model_checker import explore

NOW = datetime(2030, 5, 1, tzinfo=UTC)
POLICY = compile_named("propolis")
DIGEST = POLICY.policy.digest
KEY = read_private_key(new_private_key())
OTHER = read_private_key(new_private_key())


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    return certify(POLICY, explore(POLICY), None, NOW, valid_days=30)


def refusal(signed: SignedCertificate, *, digest: str = DIGEST, now: datetime = NOW) -> str:
    with pytest.raises(Invalid) as refused:
        check(signed, digest, [public_text(KEY)], now)
    assert refused.value.remedy
    return refused.value.message


def test_a_certificate_that_is_written_and_read_again_is_accepted_with_what_was_assumed(
    certificate: Certificate,
) -> None:
    written = msgspec.json.format(msgspec.json.encode(sign(certificate, KEY)), indent=2)
    signed = msgspec.json.decode(written, type=SignedCertificate)
    walk = check(signed, DIGEST, [public_text(OTHER), public_text(KEY)], NOW + timedelta(days=29))
    assert (walk.states, walk.complete, walk.certified_by) == (certificate.states, True, public_text(KEY))
    assert walk.assumptions == certificate.assumptions != ()
    assert walk.version == certificate.version


@pytest.mark.parametrize("field", [name for name in Certificate.__struct_fields__ if name != "bounds"])
def test_a_certificate_of_which_a_field_was_changed_is_refused(certificate: Certificate, field: str) -> None:
    changes: dict[type, Any] = {str: "x", int: 99_999_999, bool: False, float: 0.5, tuple: (), datetime: NOW.max}
    value = changes[type(getattr(certificate, field))]
    value = value.replace(tzinfo=UTC) if isinstance(value, datetime) else value
    signed = replace(sign(certificate, KEY), certificate=replace(certificate, **{field: value}))
    assert "signature does not fit" in refusal(signed)


def test_a_certificate_with_other_bounds_or_a_damaged_signature_is_refused(certificate: Certificate) -> None:
    signed = sign(certificate, KEY)
    other = replace(certificate, bounds=Bounds(outstanding_max=4, faults_max=None))
    for damaged in (replace(signed, certificate=other), replace(signed, signature="?"), replace(signed, signature="")):
        assert "signature does not fit" in refusal(damaged)


def test_a_certificate_of_another_key_is_refused(certificate: Certificate) -> None:
    assert "does not trust" in refusal(sign(certificate, OTHER))
    claimed = replace(sign(certificate, OTHER), public_key=public_text(KEY))
    assert "signature does not fit" in refusal(claimed)
    assert "not signed" in refusal(SignedCertificate(certificate=certificate))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"digest": "0" * 64}, "is for the policy with the digest 0000000000000000"),
        ({"version": "0.0.1"}, "Interlock 0.0.1 explored the policy"),
        ({"complete": False}, "the exploration is incomplete"),
        ({"violations": 2}, "the exploration found 2 violations"),
        ({"laws": (1, 2, 3, 4, 7, 8, 12)}, "the laws 5 were not checked"),
        ({"bounds": Bounds(outstanding_max=2, faults_max=None)}, "covers 2 outstanding requests at a time"),
        ({"bounds": Bounds(outstanding_max=3, faults_max=1)}, "covers at most 1 faults"),
        ({"expires_at": NOW}, "it expired at 2030-05-01"),
        ({"issued_at": NOW + timedelta(days=1)}, "it was issued at 2030-05-02"),
    ],
)
def test_a_certificate_that_does_not_prove_the_policy_now_is_refused_with_its_reason(
    certificate: Certificate, changes: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(sign(replace(certificate, **changes), KEY))


def test_a_certificate_of_another_policy_is_refused(certificate: Certificate) -> None:
    assert f"is for the policy with the digest {DIGEST[:16]}" in refusal(sign(certificate, KEY), digest="f" * 64)


@pytest.mark.parametrize("text", ["", "ed25519:", "ed25519:AAAA", "rsa:AAAA", "A" * 43 + "="])
def test_what_is_no_public_key_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="Invalid public key"):
        check_public_keys([public_text(KEY), text])


@pytest.mark.parametrize("pem", [b"", b"-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n"])
def test_what_is_no_private_key_is_refused(pem: bytes) -> None:
    with pytest.raises(Invalid, match="Invalid key"):
        read_private_key(pem)
