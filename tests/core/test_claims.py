"""What an instance is promised of its host, from its record alone."""

from __future__ import annotations

from typing import Any

import pytest

from interlock.core.operations import Operation
from interlock.core.records import Disk, Forward, Image, Instance, Interface, Request, SharedFolder, Spec
from interlock.core.resource_claims import Claim, claim_of, claims_of
from interlock.core.states import VmState

GIB = 1024**3
KERNEL = Image(id="k", name="k", kind="kernel", path="/k", size_bytes=5 * GIB, sha256="0" * 64)
DISK = Image(id="d", name="d", kind="disk", path="/d", size_bytes=2 * GIB, sha256="0" * 64)
SMALL = Spec(image=DISK, vcpus=2, memory_mib=512, forwards=(Forward(host_port=2222, guest_port=22),))


def instance(state: VmState = VmState.ACTIVE, spec: Spec | None = SMALL, **more: Any) -> Instance:
    return Instance(id="vm", name="web", project="p", host="here", vm_state=state, spec=spec, **more)


def asking(operation: Operation, **parameters: Any) -> Request:
    return Request(
        id="r",
        instance_id="vm",
        operation=operation,
        parameters=parameters,
        requested_by="ann",
        rule="x",
        admitted_at_ms=1,
    )


AWAY = {VmState.DELETED, VmState.SHELVED_OFFLOADED, VmState.MIGRATED_OUT}


@pytest.mark.parametrize("state", list(VmState))
def test_it_is_promised_all_wherever_it_may_come_to_run_here(state: VmState) -> None:
    claim = claim_of(instance(state))
    if state in AWAY:
        assert claim is None
    else:
        assert claim == Claim(
            host="here", memory_mib=512, vcpus=2, disk_bytes=2 * GIB, ports=frozenset({2222}), devices=1
        )


def test_a_kernel_has_no_disk_unless_one_was_asked_for() -> None:
    bare, with_disk = (claim_of(instance(spec=Spec(image=KERNEL, root_gib=gib))) for gib in (0, 3))
    assert bare is not None
    assert with_disk is not None
    assert (bare.disk_bytes, with_disk.disk_bytes) == (0, 3 * GIB)


def test_a_root_disk_that_hosts_share_takes_nothing_of_any_host_s_own_disk() -> None:
    shared = SharedFolder(path="/shared", id="x")
    spec = Spec(image=DISK, root_gib=3, shared=shared)
    larger = asking(Operation.RESIZE, root_gib=9)
    there = asking(Operation.MIGRATE, host="there")
    for one in (instance(spec=spec, outstanding=(larger,)), instance(spec=spec, outstanding=(there,))):
        assert [claim.disk_bytes for claim in claims_of(one)] == [0] * len(claims_of(one))
        assert claims_of(one)


def test_until_a_resize_is_settled_the_larger_of_both_is_promised() -> None:
    larger = Spec(image=DISK, vcpus=1, memory_mib=2048, root_gib=10)
    claim = claim_of(instance(VmState.RESIZED, larger, prior_spec=SMALL))
    assert claim is not None
    assert (claim.memory_mib, claim.vcpus, claim.disk_bytes) == (2048, 2, 10 * GIB)


def test_a_resize_is_promised_its_room_from_the_moment_it_is_asked_for_also_while_it_is_held() -> None:
    wish = asking(Operation.RESIZE, memory_mib=4096)
    for one in (instance(outstanding=(wish,)), instance(held=(wish,))):
        claim = claim_of(one)
        assert claim is not None
        assert (claim.memory_mib, claim.vcpus) == (4096, 2)


def test_what_is_unshelved_comes_back_with_all_it_had() -> None:
    coming = instance(VmState.SHELVED_OFFLOADED, outstanding=(asking(Operation.UNSHELVE),))
    assert claim_of(coming) == claim_of(instance())


@pytest.mark.parametrize("operation", [Operation.MIGRATE, Operation.LIVE_MIGRATE, Operation.EVACUATE])
def test_what_goes_to_another_host_is_promised_the_same_there_while_that_is_outstanding_or_held(
    operation: Operation,
) -> None:
    going = asking(operation, host="there")
    for one in (instance(outstanding=(going,)), instance(held=(going,))):
        assert [(claim.host, claim.memory_mib, claim.vcpus) for claim in claims_of(one)] == [
            ("here", 512, 2),
            ("there", 512, 2),
        ]
    assert [claim.host for claim in claims_of(instance())] == ["here"]


def test_what_has_arrived_keeps_its_room_where_it_was_until_it_is_removed_there() -> None:
    going = asking(Operation.MIGRATE, host="here")
    arrived = instance(outstanding=(going,), left_host="there")
    assert [claim.host for claim in claims_of(arrived)] == ["here", "there"]
    assert [claim.host for claim in claims_of(instance(left_host="there"))] == ["here"]


def test_a_resize_that_waits_behind_a_migration_is_promised_its_size_on_both_hosts() -> None:
    asked = (asking(Operation.MIGRATE, host="there"), asking(Operation.RESIZE, memory_mib=4096))
    assert [claim.memory_mib for claim in claims_of(instance(outstanding=asked))] == [4096, 4096]


def test_what_is_deleted_is_promised_nothing_anywhere() -> None:
    assert claims_of(instance(VmState.DELETED, outstanding=(asking(Operation.MIGRATE, host="there"),))) == ()


def test_its_guest_has_places_for_what_it_has_and_what_is_being_attached_and_for_a_root_disk_in_any_case() -> None:
    spec = Spec(
        image=KERNEL, disks=(Disk(id="v1", path="/v1"),), interfaces=(Interface(id="n1", mac="52:54:00:0:0:1"),)
    )
    assert [claim.devices for claim in claims_of(instance(spec=spec))] == [3]
    more = (asking(Operation.ATTACH_VOLUME, volume="v2"),)
    for one in (instance(spec=spec, outstanding=more), instance(spec=spec, held=more)):
        assert [claim.devices for claim in claims_of(one)] == [4]
    # One that is plugged in already while its request goes on has one place, and what may yet stay has it too.
    again = (asking(Operation.ATTACH_VOLUME, volume="v1"), asking(Operation.DETACH_INTERFACE, interface="n1"))
    assert [claim.devices for claim in claims_of(instance(spec=spec, outstanding=again))] == [3]


def test_what_is_offloaded_needs_nothing_of_its_host_when_a_volume_is_attached_but_the_place() -> None:
    asked = (asking(Operation.ATTACH_VOLUME, volume="v1"),)
    assert claims_of(instance(VmState.SHELVED_OFFLOADED, outstanding=asked)) == (Claim(host="here", devices=2),)
