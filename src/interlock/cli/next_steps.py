"""What an owner can do next with a VM that is not simply on or off, and what happens to it by itself. Pure."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from interlock.api.schemas import Due, Instance, Size
from interlock.cli.wording import clock
from interlock.core.operations import Operation
from interlock.core.states import PowerState, VmState

_STEPS: Final = {
    VmState.BUILDING: "`vm start` makes and boots it",
    VmState.PAUSED: "`vm unpause` lets it go on",
    VmState.SUSPENDED: "`vm resume` lets it go on where it was",
    VmState.RESCUED: "`vm unrescue` boots its own disk again",
    VmState.RESIZED: "`vm confirm-resize` keeps the new size, `vm revert-resize` brings the old one back",
    VmState.SHELVED: "`vm unshelve` brings it back, `vm offload` frees what it has on the host",
    VmState.SHELVED_OFFLOADED: "`vm unshelve` brings it back",
    VmState.SOFT_DELETED: "`vm restore` brings it back",
    VmState.ERROR: "`vm reboot --hard` tries again, `vm rebuild` begins afresh; `interlock why` tells all",
}
_DUE: Final = {
    Operation.CONFIRM_RESIZE: "confirmed",
    Operation.DELETE: "deleted for good",
    Operation.SHELVE_OFFLOAD: "offloaded",
    Operation.START: "started again",
    Operation.STOP: "stopped",
}


def next_steps(one: Instance, now: float | None) -> str | None:
    """What can be done next, in words; None while something is being done, or where everything can."""
    parts = [] if one.outstanding or one.vm_state not in _STEPS else [_STEPS[one.vm_state]]
    if parts and one.vm_state is VmState.RESIZED and one.power_state is not PowerState.RUNNING:
        parts.append("`vm start` boots it with its new size, and keeps that")
    if one.due is not None:
        parts.append(_due(one.due, now))
    return "; ".join(parts) or None


def _due(due: Due, now: float | None) -> str:
    done = _DUE.get(due.operation, f"asked for {due.operation.value}")
    return f"{done} by itself at {clock(due.at, now)}"


def size_text(one: Instance | Size) -> str:
    """How large a VM is, or was."""
    processors = f"{one.vcpus} vcpu" + ("" if one.vcpus == 1 else "s")
    disk = f", root disk {one.root_gib} GiB" if one.root_gib else ""
    return f"{processors}, {one.memory_mib} MiB memory{disk}"


def state_text(one: Instance) -> str | None:
    """What it was before, where that can be had again."""
    if one.prior_vm_state is None:
        return None
    states = (one.vm_state, one.prior_vm_state, *one.further_vm_states)
    if VmState.RESIZED in states:
        states = states[: states.index(VmState.RESIZED) + 2]  # what is behind that is where its guest is now
    return "; ".join(f"{before.value}, before it was {state.value}" for state, before in pairwise(states))
