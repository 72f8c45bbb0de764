"""Hints for `vm show`: the next possible commands, and the next scheduled action. Pure."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from interlock.api.schemas.responses import Due, Instance, Size
from interlock.cli.output.formatting import clock
from interlock.core.operations import Operation
from interlock.core.states import PowerState, VmState
from interlock.ports import HostState

_STEPS: Final = {
    VmState.BUILDING: "`vm start` builds and boots it",
    VmState.PAUSED: "`vm unpause` continues it",
    VmState.SUSPENDED: "`vm resume` restores its memory and continues it",
    VmState.RESCUED: "`vm unrescue` boots its own disk",
    VmState.RESIZED: "`vm confirm-resize` keeps the new size, `vm revert-resize` restores the old one",
    VmState.SHELVED: "`vm unshelve` restores it, `vm offload` frees its resources on the host",
    VmState.SHELVED_OFFLOADED: "`vm unshelve` restores it",
    VmState.SOFT_DELETED: "`vm restore` undeletes it",
    VmState.ERROR: "`vm reboot --hard` retries, `vm rebuild` recreates its root disk; `interlock why` lists all",
}
_DUE: Final = {
    Operation.CONFIRM_RESIZE: "confirmed",
    Operation.DELETE: "deleted permanently",
    Operation.SHELVE_OFFLOAD: "offloaded",
    Operation.START: "started again",
    Operation.STOP: "stopped",
}


def next_steps(one: Instance, now: float | None) -> str | None:
    """Return the hints; None while an operation is outstanding, or if there are none."""
    if one.host_state is HostState.FENCED and one.vm_state is not VmState.DELETED:
        return None if one.outstanding else "`vm evacuate` rebuilds it on another host"
    parts = [] if one.outstanding or one.vm_state not in _STEPS else [_STEPS[one.vm_state]]
    if parts and one.vm_state is VmState.RESIZED and one.power_state is not PowerState.RUNNING:
        parts.append("`vm start` boots it with its new size, and confirms that")
    if one.due is not None:
        parts.append(_due(one.due, now))
    return "; ".join(parts) or None


def _due(due: Due, now: float | None) -> str:
    done = _DUE.get(due.operation, f"{due.operation.value} submitted")
    return f"{done} automatically at {clock(due.at, now)}"


def size_text(one: Instance | Size) -> str:
    """Return the vCPUs, memory and root disk of a size."""
    processors = f"{one.vcpus} vcpu" + ("" if one.vcpus == 1 else "s")
    disk = f", root disk {one.root_gib} GiB" if one.root_gib else ""
    return f"{processors}, {one.memory_mib} MiB memory{disk}"


def state_text(one: Instance) -> str | None:
    """Return the earlier states that can be restored."""
    if one.prior_vm_state is None:
        return None
    states = (one.vm_state, one.prior_vm_state, *one.further_vm_states)
    if VmState.RESIZED in states:
        states = states[: states.index(VmState.RESIZED) + 2]  # earlier states are those of the present guest
    return "; ".join(f"{before.value}, before it was {state.value}" for state, before in pairwise(states))
