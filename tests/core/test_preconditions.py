"""What each operation needs of the record, judged as it will be once what comes before has been done."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from core_samples import START_MS, O, V, compiled, instance_in, rule

from interlock.core.admission import admit
from interlock.core.evaluation import would_admit
from interlock.core.lifecycle import finish, take
from interlock.core.networks import Network, NetworkKind
from interlock.core.operations import Lane, Operation
from interlock.core.policy import Verdict
from interlock.core.preconditions import PRECONDITIONS, RULE, unmet
from interlock.core.records import (
    NO_FACTS,
    Admitted,
    Denied,
    Disk,
    Facts,
    Forward,
    Held,
    Image,
    Instance,
    Interface,
    Outcome,
    SharedFolder,
    Spec,
    Status,
    Submission,
)
from interlock.core.specs import INTERFACES_MAX
from interlock.core.states import PowerState

ANYTHING = compiled(rule("all", frozenset(O), Verdict.ADMIT), outstanding_max=16)
GIB = 1 << 30


def image(kind: str = "disk", size_bytes: int = GIB) -> Image:
    return Image(id=f"an-{kind}", name=kind, kind=kind, path="/there", size_bytes=size_bytes, sha256="0" * 64)


def made(vm_state: V = V.ACTIVE, *, spec: dict[str, Any] | None = None, **more: Any) -> Instance:
    """An instance that boots from a disk of 2 GiB and has the volume `data` and the interface `nic`."""
    fields: dict[str, Any] = {
        "image": image(),
        "root_gib": 2,
        "disks": (Disk(id="data", path="/data"),),
        "interfaces": (Interface(id="nic", mac="52:54:00:00:00:01"),),
    }
    power = PowerState.NONE if vm_state in {V.STOPPED, V.SHELVED, V.SHELVED_OFFLOADED} else PowerState.RUNNING
    return instance_in(vm_state, spec=Spec(**{**fields, **(spec or {})}), **{"power_state": power, **more})


LAB = Network(id="n1", name="lab", kind=NetworkKind.MANAGED)
LAN = Network(id="n2", name="lan", kind=NetworkKind.BRIDGE, bridge="br0")
IN_LAB, ON_LAN = (
    made(spec={"primary": Interface(id="primary", mac="52:54:00:00:00:09", network=network)}) for network in (LAB, LAN)
)
FORWARDED_STOPPED = made(V.STOPPED, spec={"forwards": (Forward(host_port=80, guest_port=80),)})
FORWARDED = made(spec={"forwards": (Forward(host_port=80, guest_port=80),)})
NEEDY = msgspec.structs.replace(image(), min_memory_mib=96)
LACKING: tuple[tuple[Operation, dict[str, Any], Instance, Facts, str], ...] = (
    (O.SNAPSHOT, {"name": "x"}, made(spec={"image": image("kernel")}), NO_FACTS, "no_bootable_disk"),
    (O.BACKUP, {}, made(spec={"image": image("iso")}), NO_FACTS, "no_bootable_disk"),
    (O.REBUILD, {"image": "x"}, made(), Facts(image=image(size_bytes=3 * GIB)), "image_too_large"),
    (O.REBUILD, {"image": "x"}, made(spec={"root_gib": 0}), Facts(image=image("iso")), "no_root_disk"),
    (O.RESIZE, {"vcpus": 1, "root_gib": 2}, made(), NO_FACTS, "same_size"),
    (O.RESIZE, {"root_gib": 1}, made(), NO_FACTS, "disk_would_shrink"),
    (
        O.RESIZE,
        {"root_gib": 2},
        made(spec={"image": image(size_bytes=3 * GIB), "root_gib": 0}),
        NO_FACTS,
        "disk_would_shrink",
    ),
    (O.RESIZE, {"memory_mib": 95}, made(spec={"image": NEEDY}), NO_FACTS, "too_little_memory"),
    (O.REBUILD, {"image": "x"}, made(spec={"memory_mib": 64}), Facts(image=NEEDY), "too_little_memory"),
    (O.RESCUE, {"image": "x"}, made(spec={"memory_mib": 64}), Facts(image=NEEDY), "too_little_memory"),
    (O.SHELVE_OFFLOAD, {}, made(V.SHELVED), NO_FACTS, "no_shelved_image"),
    (O.UNSHELVE, {}, made(V.SHELVED_OFFLOADED), NO_FACTS, "no_shelved_image"),
    (O.MIGRATE, {"host": "any"}, made(), Facts(targets=()), "no_other_host"),
    (O.MIGRATE, {"host": "h"}, made(), NO_FACTS, "same_host"),
    (O.LIVE_MIGRATE, {"host": "any"}, made(), Facts(targets=("h",)), "no_other_host"),
    (O.MIGRATE, {"host": "north"}, made(), Facts(target_lacks_network="It has none."), "host_lacks_network"),
    (O.LIVE_MIGRATE, {"host": "north"}, made(), Facts(sends_guests=False), "cannot_migrate_live"),
    (O.LIVE_MIGRATE, {"host": "north"}, made(), Facts(cannot_encrypt=True), "cannot_encrypt"),
    (O.MIGRATE, {"host": "north"}, made(), Facts(target_lacks_root=True), "host_lacks_root_disk"),
    (O.LIVE_MIGRATE, {"host": "north"}, made(spec={"root_is_whole": True}), NO_FACTS, "root_disk_stands_alone"),
    (O.EVACUATE, {"host": "north"}, made(), NO_FACTS, "root_disk_on_lost_host"),
    (O.EVACUATE, {"host": "h"}, made(), NO_FACTS, "same_host"),
    (O.CRASH_DUMP, {}, made(V.ERROR, power_state=PowerState.NONE), NO_FACTS, "no_guest"),
    (O.ATTACH_VOLUME, {"volume": "data"}, made(), NO_FACTS, "already_attached"),
    (O.ATTACH_VOLUME, {"volume": "data"}, made(detaching=("data",)), NO_FACTS, "being_detached"),
    (O.ATTACH_VOLUME, {"volume": "other"}, made(V.SHELVED, prior_vm_state=V.SUSPENDED), NO_FACTS, "memory_saved"),
    (O.DETACH_VOLUME, {"volume": "other"}, made(), NO_FACTS, "not_attached"),
    (O.DETACH_VOLUME, {"volume": "data"}, made(V.PAUSED), NO_FACTS, "paused"),
    (O.DETACH_INTERFACE, {"interface": "nic"}, made(V.PAUSED), NO_FACTS, "paused"),
    (O.DETACH_VOLUME, {}, made(spec={"disks": ()}), NO_FACTS, "not_attached"),
    (O.DETACH_VOLUME, {"volume": "data"}, made(V.SHELVED, prior_vm_state=V.SUSPENDED), NO_FACTS, "memory_saved"),
    (O.SWAP_VOLUME, {"old": "data", "new": "data"}, made(), NO_FACTS, "same_volume"),
    (O.SWAP_VOLUME, {"old": "other", "new": "data"}, made(), NO_FACTS, "already_attached"),
    (O.SWAP_VOLUME, {"old": "other", "new": "new"}, made(), NO_FACTS, "not_attached"),
    (
        O.SWAP_VOLUME,
        {"old": "data", "new": "new"},
        made(),
        Facts(volume_bytes={"data": 2, "new": 1}),
        "volume_too_small",
    ),
    (O.SWAP_VOLUME, {"old": "data", "new": "new", "copy": False}, made(), NO_FACTS, "guest_uses_volume"),
    (O.ATTACH_INTERFACE, {"mac": "52:54:00:00:00:01".upper()}, made(), NO_FACTS, "address_taken"),
    (
        O.ATTACH_INTERFACE,
        {},
        made(spec={"interfaces": tuple(Interface(id=str(n), mac=str(n)) for n in range(INTERFACES_MAX))}),
        NO_FACTS,
        "too_many_interfaces",
    ),
    (O.MOVE_INTERFACE, {"interface": "other"}, made(), NO_FACTS, "no_such_interface"),
    (O.MOVE_INTERFACE, {"interface": "primary"}, IN_LAB, Facts(network=LAB), "same_network"),
    (O.MOVE_INTERFACE, {"interface": "primary"}, made(), Facts(network=LAB), "guest_runs"),
    (O.MOVE_INTERFACE, {"interface": "primary"}, FORWARDED_STOPPED, Facts(network=LAN), "has_forwards"),
    (O.MOVE_INTERFACE, {"interface": "nic"}, made(), Facts(host_lacks_network="It has none."), "host_lacks_network"),
    (O.SET_INTERFACE, {"interface": "nic"}, made(), NO_FACTS, "user_network"),
    (O.ADD_FORWARD, {"host_port": 81}, ON_LAN, NO_FACTS, "on_bridge"),
    (O.ADD_FORWARD, {"host_port": 80}, FORWARDED, NO_FACTS, "already_forwarded"),
    (O.REMOVE_FORWARD, {"host_port": 81}, FORWARDED, NO_FACTS, "not_forwarded"),
    (O.REMOVE_FORWARD, {}, made(), NO_FACTS, "not_forwarded"),
    (O.DETACH_INTERFACE, {"interface": "other"}, made(), NO_FACTS, "no_such_interface"),
    (O.DETACH_INTERFACE, {}, made(spec={"interfaces": ()}), NO_FACTS, "no_such_interface"),
    (O.MIGRATE, {"host": "north"}, made(), Facts(target_lacks_volumes=True), "host_lacks_volumes"),
    (O.ATTACH_VOLUME, {"volume": "new"}, made(), Facts(host_lacks=frozenset({"new"})), "host_lacks_volumes"),
    (O.SWAP_VOLUME, {"old": "data", "new": "new"}, made(), Facts(host_lacks=frozenset({"new"})), "host_lacks_volumes"),
    (O.SET_PASSWORD, {}, made(), Facts(agent_answers=False), "no_guest_agent"),
    (O.LIVE_MIGRATE_ABORT, {}, made(), NO_FACTS, "not_migrating"),
    (O.LIVE_MIGRATE_FORCE_COMPLETE, {}, made(), NO_FACTS, "not_migrating"),
)
HAVING: tuple[tuple[Operation, dict[str, Any], Instance, Facts], ...] = (
    (O.SNAPSHOT, {"name": "x"}, made(), NO_FACTS),
    (O.REBUILD, {"image": "x"}, made(), Facts(image=image(size_bytes=2 * GIB))),
    (O.REBUILD, {"image": "x"}, made(spec={"root_gib": 0}), Facts(image=image(size_bytes=9 * GIB))),
    (O.REBUILD, {}, made(), NO_FACTS),
    (O.RESIZE, {"vcpus": 2, "root_gib": 2}, made(), NO_FACTS),
    (O.RESIZE, {}, made(), NO_FACTS),
    (O.RESIZE, {"root_gib": 3}, made(spec={"image": image(size_bytes=3 * GIB), "root_gib": 0}), NO_FACTS),
    (O.RESIZE, {"root_gib": 2}, made(spec={"image": image("iso", 3 * GIB), "root_gib": 0}), NO_FACTS),
    (O.SHELVE_OFFLOAD, {}, made(V.SHELVED, shelved_image=image()), NO_FACTS),
    (O.SHELVE_OFFLOAD, {}, made(V.SHELVED, spec={"image": image("kernel"), "root_gib": 0}), NO_FACTS),
    (O.UNSHELVE, {}, made(V.SHELVED), NO_FACTS),
    (O.UNSHELVE, {}, made(V.SHELVED_OFFLOADED, spec={"root_is_whole": True}), NO_FACTS),
    (O.MIGRATE, {"host": "any"}, made(), Facts(targets=("north",))),
    (O.LIVE_MIGRATE, {"host": "north"}, made(), Facts(sends_guests=True)),
    (
        O.LIVE_MIGRATE,
        {"host": "north"},
        made(spec={"root_is_whole": True, "shared": SharedFolder(path="/shared", id="1")}),
        NO_FACTS,
    ),
    (O.EVACUATE, {"host": "north", "from_image": True}, made(), NO_FACTS),
    (O.CRASH_DUMP, {}, made(V.ERROR, power_state=PowerState.CRASHED), NO_FACTS),
    (O.ATTACH_VOLUME, {"volume": "other"}, made(), NO_FACTS),
    (O.ATTACH_VOLUME, {}, made(), NO_FACTS),
    (O.ATTACH_VOLUME, {"volume": "other"}, made(V.SHELVED, prior_vm_state=V.STOPPED), NO_FACTS),
    (O.DETACH_VOLUME, {"volume": "data"}, made(), NO_FACTS),
    (O.DETACH_VOLUME, {"volume": "stray"}, made(), Facts(claimed=frozenset({"stray"}))),
    (O.SWAP_VOLUME, {"old": "data", "new": "new"}, made(), Facts(volume_bytes={"data": 1, "new": 1})),
    (O.SWAP_VOLUME, {"old": "data", "new": "new", "copy": False}, made(V.STOPPED), NO_FACTS),
    (O.ATTACH_INTERFACE, {"mac": "52:54:00:00:00:02"}, made(), NO_FACTS),
    (O.DETACH_INTERFACE, {"interface": "nic"}, made(), NO_FACTS),
    (O.MOVE_INTERFACE, {"interface": "primary"}, IN_LAB, Facts(network=LAN)),
    (O.MOVE_INTERFACE, {"interface": "nic"}, FORWARDED_STOPPED, Facts(network=LAN)),
    (O.SET_INTERFACE, {"interface": "primary"}, IN_LAB, NO_FACTS),
    (O.ADD_FORWARD, {"host_port": 81}, FORWARDED, NO_FACTS),
    (O.REMOVE_FORWARD, {"host_port": 80}, FORWARDED, NO_FACTS),
    (O.MIGRATE, {"host": "north"}, made(spec={"disks": ()}), Facts(target_lacks_volumes=True)),
    (O.SWAP_VOLUME, {"old": "data", "new": "new"}, made(), Facts(host_lacks=frozenset({"data"}))),
    (O.SET_PASSWORD, {}, made(), Facts(agent_answers=True)),
    (O.SET_PASSWORD, {}, made(), NO_FACTS),
)


@pytest.mark.parametrize(("operation", "parameters", "instance", "facts", "reason"), LACKING)
def test_what_could_only_fail_is_refused_with_the_reason_and_what_to_do(
    operation: Operation, parameters: dict[str, Any], instance: Instance, facts: Facts, reason: str
) -> None:
    """Law 8: whatever the policy says, and with a hold too: no policy will ever admit it."""
    for hold_ms in (None, 1000):
        answer = ask(instance, operation, facts=facts, hold_ms=hold_ms, **parameters).answer
        assert isinstance(answer, Denied)
        assert (answer.reason, answer.rule) == (reason, RULE)
        assert answer.because
        assert "{" not in answer.because
        assert answer.remedy
    refused = compiled(rule("none", frozenset(O), Verdict.DENY, reason="policy"))
    for policy in (ANYTHING, refused):
        assert would_admit(instance, asked(operation, facts=facts, **parameters), policy, START_MS) is False
    submission = asked(operation, facts=facts, hold_ms=1000, **parameters)
    held = admit(instance, submission, refused, START_MS).answer
    assert isinstance(held, Denied), "it is not held for a policy that could not help"
    assert held.reason == reason


@pytest.mark.parametrize(("operation", "parameters", "instance", "facts"), HAVING)
def test_what_the_record_does_not_speak_against_is_admitted(
    operation: Operation, parameters: dict[str, Any], instance: Instance, facts: Facts
) -> None:
    answer = ask(instance, operation, facts=facts, **parameters).answer
    assert isinstance(answer, Admitted), answer


def test_every_precondition_is_seen_unmet() -> None:
    seen = {(operation, reason) for operation, _, _, _, reason in LACKING}
    listed = {(operation, one.reason) for operation, some in PRECONDITIONS.items() for one in some}
    # The same condition is listed for several operations, and seen with one of them.
    assert {reason for _, reason in listed} == {reason for _, reason in seen}
    assert seen <= listed
    assert {operation for operation, _ in listed} == {operation for operation, _ in seen}


def test_what_the_policy_refuses_has_the_policys_reason() -> None:
    policy = compiled(rule("none", frozenset(O), Verdict.DENY, reason="policy"))
    answer = admit(made(), asked(O.DETACH_VOLUME, volume="other"), policy, START_MS).answer
    assert isinstance(answer, Denied)
    assert answer.reason == "policy"


def test_what_is_refused_by_the_policy_is_held_where_nothing_is_lacking() -> None:
    policy = compiled(rule("none", frozenset(O), Verdict.DENY, reason="policy"))
    assert isinstance(admit(made(), asked(O.PAUSE, hold_ms=1000), policy, START_MS).answer, Held)


def asked(operation: Operation, request_id: str = "r1", **more: Any) -> Submission:
    named = {name: more.pop(name) for name in ("facts", "hold_ms") if name in more}
    return Submission(request_id=request_id, operation=operation, requested_by="ada", parameters=more, **named)


def ask(instance: Instance, operation: Operation, request_id: str = "r1", **more: Any) -> Any:
    return admit(instance, asked(operation, request_id, **more), ANYTHING, START_MS)


def queued(*steps: tuple[Operation, dict[str, Any]], start: Instance | None = None) -> Instance:
    instance = start or made()
    for number, (operation, parameters) in enumerate(steps, 1):
        change = ask(instance, operation, f"q{number}", **parameters)
        assert isinstance(change.answer, Admitted), change.answer
        instance = change.instance
    return instance


def test_what_comes_before_counts_as_done() -> None:
    """A detachment that is queued makes the attachment possible, and the other way round."""
    queued((O.DETACH_VOLUME, {"volume": "data"}), (O.ATTACH_VOLUME, {"volume": "data"}))
    queued((O.UNPAUSE, {}), (O.DETACH_VOLUME, {"volume": "data"}), start=made(V.PAUSED))
    queued((O.ATTACH_VOLUME, {"volume": "other"}), (O.DETACH_VOLUME, {"volume": "other"}))
    queued((O.SWAP_VOLUME, {"old": "data", "new": "new"}), (O.SWAP_VOLUME, {"old": "new", "new": "data"}))
    queued((O.ATTACH_INTERFACE, {}), (O.DETACH_INTERFACE, {"interface": "q1"}))
    queued((O.DETACH_INTERFACE, {"interface": "nic"}), (O.ATTACH_INTERFACE, {"mac": "52:54:00:00:00:01"}))
    queued((O.MIGRATE, {"host": "north"}), (O.MIGRATE, {"host": "h"}))
    queued((O.RESIZE, {"vcpus": 2}), (O.RESIZE, {"vcpus": 1}))
    queued((O.REBUILD, {"image": "x"}), (O.SNAPSHOT, {}), start=made(spec={"image": image("kernel")}))
    queued((O.STOP, {}), (O.SWAP_VOLUME, {"old": "data", "new": "new", "copy": False}))
    queued((O.START, {}), (O.CRASH_DUMP, {}), start=made(V.STOPPED))
    queued((O.UNPAUSE, {}), (O.DETACH_VOLUME, {"volume": "data"}), start=made(V.PAUSED))


@pytest.mark.parametrize(
    ("first", "then", "reason"),
    [
        ((O.ATTACH_VOLUME, {"volume": "other"}), (O.ATTACH_VOLUME, {"volume": "other"}), "already_attached"),
        ((O.DETACH_VOLUME, {"volume": "data"}), (O.DETACH_VOLUME, {"volume": "data"}), "not_attached"),
        ((O.SWAP_VOLUME, {"old": "data", "new": "x"}), (O.DETACH_VOLUME, {"volume": "data"}), "not_attached"),
        ((O.ATTACH_INTERFACE, {"mac": "52:54:00:00:00:0A"}), (O.ATTACH_INTERFACE, {"mac": "52:54:00:00:00:0a"}),
         "address_taken"),
        ((O.DETACH_INTERFACE, {"interface": "nic"}), (O.DETACH_INTERFACE, {"interface": "nic"}), "no_such_interface"),
        ((O.RESIZE, {"root_gib": 4}), (O.RESIZE, {"root_gib": 3}), "disk_would_shrink"),
        ((O.RESIZE, {"vcpus": 4}), (O.RESIZE, {"vcpus": 4}), "same_size"),
        ((O.MIGRATE, {"host": "north"}), (O.MIGRATE, {"host": "north"}), "same_host"),
    ],
)  # fmt: skip
def test_what_comes_before_can_make_it_impossible(
    first: tuple[Operation, dict[str, Any]], then: tuple[Operation, dict[str, Any]], reason: str
) -> None:
    answer = ask(queued(first), then[0], "r9", **then[1]).answer
    assert isinstance(answer, Denied)
    assert answer.reason == reason


def test_what_is_known_of_now_says_nothing_of_then() -> None:
    """Whether an agent answers, and which host reaches a volume, may be otherwise once what comes before is done."""
    starting = queued((O.START, {}), start=made(V.STOPPED))
    assert isinstance(ask(starting, O.SET_PASSWORD, facts=Facts(agent_answers=False)).answer, Admitted)
    going = queued((O.MIGRATE, {"host": "north"}))
    lacking = Facts(host_lacks=frozenset({"new"}))
    assert isinstance(ask(going, O.ATTACH_VOLUME, facts=lacking, volume="new").answer, Admitted)
    left = queued((O.DETACH_VOLUME, {"volume": "data"}))
    assert isinstance(ask(left, O.MIGRATE, facts=Facts(target_lacks_volumes=True), host="north").answer, Admitted)


def test_what_waits_is_judged_again_and_cancelled_with_the_reason() -> None:
    """The detachment fails, so that the volume is still attached when it is to be attached."""
    instance = queued((O.DETACH_VOLUME, {"volume": "data"}), (O.ATTACH_VOLUME, {"volume": "data"}), (O.STOP, {}))
    taken = take(instance, Lane.COMPONENT, START_MS)
    assert taken.answer is not None
    failed = finish(taken.instance, "q1", taken.answer.fence, Outcome.FAILED, ANYTHING, START_MS)
    ended = {request.id: request for request in failed.requests}
    assert (ended["q2"].status, ended["q2"].reason) == (Status.CANCELLED, "already_attached")
    assert "data" in (ended["q2"].message or "")
    told = [event for event in failed.events if event.kind == "request.cancelled"]
    assert [event.data["rule"] for event in told] == [RULE]
    assert [request.id for request in failed.instance.outstanding] == ["q3"]


def test_a_state_change_that_waits_is_cancelled_for_what_it_lacks() -> None:
    instance = queued((O.RESIZE, {"vcpus": 2}), (O.RESIZE, {"vcpus": 1}), (O.PAUSE, {}))
    taken = take(instance, Lane.STATE, START_MS)
    assert taken.answer is not None
    failed = finish(taken.instance, "q1", taken.answer.fence, Outcome.INTERRUPTED, ANYTHING, START_MS)
    ended = {request.id: request for request in failed.requests}
    assert (ended["q2"].status, ended["q2"].reason) == (Status.CANCELLED, "same_size")
    assert [request.id for request in failed.instance.outstanding] == ["q3"]


def test_a_live_migration_in_flight_can_be_aborted_and_hurried() -> None:
    instance = queued((O.LIVE_MIGRATE, {"host": "north"}))
    assert isinstance(ask(instance, O.LIVE_MIGRATE_ABORT).answer, Denied), "it is only queued"
    instance = take(instance, Lane.STATE, START_MS).instance
    aborted = ask(instance, O.LIVE_MIGRATE_ABORT).instance
    assert aborted.outstanding[0].interrupt_at_ms == START_MS
    hurried = ask(instance, O.LIVE_MIGRATE_FORCE_COMPLETE).instance
    assert hurried.outstanding[0].parameters["force_complete"] is True
    assert hurried.outstanding[0].interrupt_at_ms is None


def test_an_instance_of_which_nothing_is_recorded_lacks_nothing() -> None:
    bare = msgspec.structs.replace(made(), spec=None)
    assert all(unmet(bare, operation, {}, NO_FACTS) is None for operation in O)
