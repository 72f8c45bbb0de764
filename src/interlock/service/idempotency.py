"""Idempotency keys: the fingerprint of a submission, stored with its response."""

from __future__ import annotations

import hashlib

import msgspec

from interlock.core.operations import CATALOGUE
from interlock.core.records import Admitted, Held
from interlock.ports import IdempotencyKey, Store
from interlock.service.auth import Caller
from interlock.service.request_models import NewRequest
from interlock.service.submission_results import SubmissionResult


def as_recorded(new: NewRequest) -> NewRequest:
    """Remove the secret parameter, which must not be stored in any form."""
    secret = CATALOGUE[new.operation].parameters.secret
    if secret not in new.parameters:
        return new
    parameters = {name: value for name, value in new.parameters.items() if name != secret}
    return msgspec.structs.replace(new, parameters=parameters)


def idempotency_key(caller: Caller, key: str | None, target: str, new: msgspec.Struct) -> IdempotencyKey | None:
    if key is None:
        return None
    fingerprint = hashlib.sha256(target.encode() + b"\0" + msgspec.json.encode(new)).hexdigest()
    return IdempotencyKey(scope=caller.token_id, key=key, fingerprint=fingerprint)


async def submitted_before(store: Store, caller: Caller, new: NewRequest, key: str | None) -> SubmissionResult | None:
    """Return the result of the same submission with the same key, or None.

    It may have taken the name by which it is repeated, as a delete does.
    """
    recorded = None if key is None else await store.recorded_answer(caller.token_id, key)
    if recorded is None or not isinstance(recorded[1], Admitted | Held):
        return None
    fingerprint, disposition = recorded
    instance_id = disposition.request.instance_id
    same = idempotency_key(caller, key, instance_id, as_recorded(new))
    instance = await store.instance(instance_id)
    if instance is None or same is None or same.fingerprint != fingerprint:
        return None
    return SubmissionResult(disposition=disposition, instance=instance)
