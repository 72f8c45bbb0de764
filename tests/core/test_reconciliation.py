"""How a guest differs from its record, and what the record is after that was found."""

from __future__ import annotations

from typing import Any

import pytest
from core_samples import ORDINARY, START_MS, O, V, instance_in, kinds_told, queue, serving, waiting_for

from interlock.core.policy import CompiledPolicy
from interlock.core.reconciliation import Difference, difference, settle, without_devices
from interlock.core.records import Disk, Image, Instance, Interface, Spec
from interlock.core.request_queue import replace
from interlock.core.states import PowerState, VmState

POLICY = CompiledPolicy(ORDINARY)
NEW_DISK = Disk(id="new", path="/new")
NEW_INTERFACE = Interface(id="eth", mac="52:54:00:00:00:02")
SPEC = Spec(
    image=Image(id="i", name="i", kind="disk", path="/i", size_bytes=512, sha256="0"),
    disks=(Disk(id="data", path="/data"), Disk(id="logs", path="/logs")),
    interfaces=(Interface(id="nic", mac="52:54:00:00:00:01"),),
)


def recorded(vm_state: VmState = V.ACTIVE, **more: Any) -> Instance:
    power = PowerState.PAUSED if vm_state is V.PAUSED else PowerState.RUNNING
    return instance_in(vm_state, **({"spec": SPEC, "power_state": power} | more))


def found_in(instance: Instance, power: PowerState = PowerState.RUNNING, *, paused: bool = False) -> Difference:
    return difference(instance, power, ("root", "rescue", "logs", "new"), ("eth",), paused=paused)


def test_a_guest_that_is_as_recorded_does_not_differ() -> None:
    same = difference(recorded(), PowerState.RUNNING, ("root", "data", "logs"), ("nic",), paused=False)
    assert not same.any


def test_a_difference_names_what_is_gone_and_what_is_new_but_not_the_own_disks() -> None:
    found = found_in(recorded())
    assert found.any
    assert found == Difference(detached=("data", "nic"), volumes=("new",), interfaces=("eth",))


@pytest.mark.parametrize(
    ("vm_state", "power", "paused", "differs"),
    [
        (V.ACTIVE, PowerState.RUNNING, False, False),
        (V.ACTIVE, PowerState.PAUSED, True, True),
        (V.ACTIVE, PowerState.PAUSED, False, False),
        (V.PAUSED, PowerState.RUNNING, False, True),
        (V.PAUSED, PowerState.PAUSED, True, False),
        (V.RESCUED, PowerState.PAUSED, True, False),
    ],
)
def test_a_guest_that_was_paused_or_resumed_differs_unless_it_halted_by_itself(
    vm_state: VmState, power: PowerState, *, paused: bool, differs: bool
) -> None:
    found = found_in(recorded(vm_state), power, paused=paused)
    assert found.power_state is (power if differs else None)


def test_no_difference_is_looked_for_while_no_guest_runs_or_something_is_served() -> None:
    for instance in (
        recorded(V.STOPPED, power_state=PowerState.NONE),
        recorded(spec=None),
        replace(serving(O.REBOOT), spec=SPEC),
        replace(serving(O.ATTACH_VOLUME), spec=SPEC),
    ):
        assert not found_in(instance).any
    for power in (PowerState.SHUTDOWN, PowerState.CRASHED, PowerState.NONE):
        assert not found_in(recorded(), power).any


def test_a_difference_is_recorded_and_what_it_rules_out_is_cancelled() -> None:
    """Only devices that belong to the instance are recorded as attached."""
    instance = queue(recorded(), POLICY, O.PAUSE)
    found = found_in(instance, PowerState.PAUSED, paused=True)
    change = settle(instance, instance, found, (NEW_DISK, NEW_INTERFACE), POLICY, START_MS + 9)
    after = change.instance
    assert change.answer is True
    assert after.spec == replace(SPEC, disks=(SPEC.disks[1], NEW_DISK), interfaces=(NEW_INTERFACE,))
    assert (after.vm_state, after.power_state) == (V.PAUSED, PowerState.PAUSED)
    assert after.state_since_ms == after.updated_at_ms == START_MS + 9
    assert kinds_told(change) == ["guest.changed", "instance.state", "request.cancelled"]
    assert change.events[0].data == {"detached": ["data", "nic"], "attached": ["new", "eth"], "power_state": "paused"}
    assert change.events[1].data == {"vm_state": "paused", "before": "active"}
    assert not waiting_for(after)


def test_a_difference_of_devices_alone_leaves_the_state_as_it_is() -> None:
    instance = recorded(V.PAUSED)
    change = settle(instance, instance, Difference(detached=("data",)), (), POLICY, START_MS + 9)
    assert (change.instance.vm_state, change.instance.power_state) == (V.PAUSED, PowerState.PAUSED)
    assert [event.data for event in change.events] == [{"detached": ["data"]}]


@pytest.mark.parametrize(
    "now",
    [
        replace(recorded(), host="elsewhere"),
        recorded(V.PAUSED),
        recorded(spec=replace(SPEC, memory_mib=SPEC.memory_mib + 1)),
        replace(serving(O.REBOOT), spec=SPEC),
        replace(serving(O.ATTACH_VOLUME), spec=SPEC),
    ],
)
def test_nothing_is_recorded_if_the_record_has_changed_meanwhile_or_something_is_served(now: Instance) -> None:
    change = settle(now, recorded(), Difference(detached=("data",)), (), POLICY, START_MS + 9)
    assert (change.answer, change.instance, change.events) == (False, now, ())


def test_an_instance_without_a_spec_has_no_devices_to_lose() -> None:
    instance = recorded(spec=None)
    assert without_devices(instance, ("data",)) is instance
    change = settle(instance, instance, Difference(), (), POLICY, START_MS)
    assert (change.answer, change.instance) == (False, instance)
