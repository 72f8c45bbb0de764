"""Sums over all instances that are updated with each decision are those that a count of the instances gives."""

from __future__ import annotations

from typing import Any

import pytest

from interlock.core.operations import Operation
from interlock.core.records import Disk, Image, Instance, Request, Spec, Status
from interlock.core.request_queue import replace
from interlock.core.states import VmState
from interlock.ports import Tally
from interlock.stores.tallies import Tallies

O = Operation  # noqa: E741
V = VmState
SPEC = Spec(
    image=Image(id="i", name="i", kind="disk", path="/i", size_bytes=512, sha256="0"),
    memory_mib=64,
    disks=(Disk(id="v", path="/v"),),
)
PLAIN = Instance(id="a", name="a", project="p", host="h1", vm_state=V.ACTIVE, spec=SPEC)


def asking(operation: Operation, status: Status = Status.QUEUED, **parameters: Any) -> tuple[Request, ...]:
    request = Request(
        id="r", instance_id="a", operation=operation, requested_by="ada", rule="x", admitted_at_ms=1,
        status=status, parameters=parameters,
    )  # fmt: skip
    return (request,)


RESIZING = asking(O.RESIZE, memory_mib=256)
MOVING = asking(O.MIGRATE, host="h2")
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"vm_state": V.STOPPED},
    {"vm_state": V.SHELVED_OFFLOADED},
    {"vm_state": V.DELETED},
    {"host": "h2"},
    {"left_host": "h2"},
    {"apart_from": ("group",)},
    {"spec": replace(SPEC, memory_mib=128)},
    {"vm_state": V.RESIZED, "prior_spec": SPEC, "spec": replace(SPEC, memory_mib=128)},
    {"outstanding": RESIZING},
    {"outstanding": MOVING},
    {"outstanding": asking(O.STOP)},
    {"outstanding": asking(O.RESCUE, image="medic")},
    {"held": asking(O.RESIZE, Status.HELD, memory_mib=256)},
    {"held": asking(O.STOP, Status.HELD)},
    {"outstanding": RESIZING, "vm_state": V.STOPPED},
)


def counted(*decisions: tuple[Instance | None, Instance]) -> dict[Tally, dict[str, int]]:
    tallies = Tallies((), ())
    for before, after in decisions:
        tallies.note(before, after)
    return {what: tallies.all_of(what) for what in Tally}


@pytest.mark.parametrize("before", CHANGES, ids=str)
def test_after_each_decision_the_sums_are_those_of_the_instance_as_it_is(before: dict[str, Any]) -> None:
    first = replace(PLAIN, **before)
    for after in CHANGES:
        second = replace(PLAIN, **after)
        assert counted((None, first), (first, second)) == counted((None, second)), after
