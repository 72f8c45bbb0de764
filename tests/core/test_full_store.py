"""Which changes are still written while the disk of the store is full."""

from __future__ import annotations

from typing import Any

import pytest
from core_samples import ORDINARY, START_MS, O, admitted, ask, instance_in, queue, serving

from interlock.core.admission import admit
from interlock.core.full_store import SERVED_WHEN_FULL, kept_when_full
from interlock.core.lifecycle import finish, take
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Change, Event, Outcome

POLICY = CompiledPolicy(ORDINARY)


@pytest.mark.parametrize("operation", [O.STOP, O.DELETE, O.PAUSE, O.ATTACH_VOLUME])
def test_only_what_frees_space_or_ends_guests_is_admitted(operation: Operation) -> None:
    instance = instance_in()
    change = admit(instance, ask(operation), POLICY, START_MS)
    admitted(change)
    assert kept_when_full(instance, change) is (operation in SERVED_WHEN_FULL)
    assert not kept_when_full(None, change), "a new instance"


def test_what_is_outstanding_is_taken_and_ends() -> None:
    instance = queue(instance_in(), POLICY, O.PAUSE)
    assert kept_when_full(instance, take(instance, None, START_MS))
    served = serving(O.PAUSE)
    assert kept_when_full(served, finish(served, "r0", 1, Outcome.FAILED, POLICY, START_MS))


def test_a_change_of_nothing_is_not_written() -> None:
    instance = instance_in()
    assert not kept_when_full(instance, Change(instance=instance, answer=None))


@pytest.mark.parametrize(
    ("kind", "data", "kept"),
    [
        ("request.denied", {"operation": O.STOP}, True),
        ("request.denied", {"operation": O.PAUSE}, False),
        ("request.redundant", {"operation": O.STOP}, True),
        ("request.redundant", {"operation": O.PAUSE}, False),
        ("request.progress", {"operation": O.PAUSE}, True),
        ("guest.crashed", {}, True),
        ("instance.relabelled", {"by": "ada", "blocked_operations": []}, True),
        ("instance.relabelled", {"by": "ada", "tags": []}, False),
        ("instance.state", {}, True),
        ("instance.fenced", {}, True),
        ("instance.renamed", {}, False),
        ("policy.activated", {}, False),
    ],
)
def test_an_event_is_written_if_it_is_about_what_goes_on(kind: str, data: dict[str, Any], *, kept: bool) -> None:
    """An instance that is protected from deletion has to be unprotected before it can be deleted."""
    instance = instance_in()
    event = Event(kind=kind, instance_id="i-1", at_ms=START_MS, generation=1, data=data)
    assert kept_when_full(instance, Change(instance=instance, events=(event,), answer=None)) is kept
