"""The state stack of an instance: the vm_states to which it can return, and where each operation leads.

A rescue, resize or shelve pushes the vm_state before it; the operation that undoes it pops that state.
"""

from __future__ import annotations

from typing import Final

from interlock.core.operations import CATALOGUE, Operation
from interlock.core.states import Target, VmState

ARRIVES: Final[frozenset[Operation]] = frozenset({Operation.MIGRATE})
"""The operations that lead off this host, and may report that the instance has arrived at another host of this server:
then its vm_state is unchanged."""

Memory = tuple[VmState, ...]
"""The state stack of an instance: the vm_state before the operation that can be undone now, then those before it.

A rescue, resize or shelve pushes one state; a soft delete pushes another. `stopped` at the bottom, of an instance that
is resized, means that its guest has ended since.
"""

REMEMBERING: Final[frozenset[VmState]] = frozenset(
    state for entry in CATALOGUE.values() if entry.to is Target.PRIOR for state in entry.sources
)
"""The vm_states with an operation to undo. In every other one the state stack is empty."""


def remembered_in(vm_state: VmState, memory: Memory) -> Memory:
    """Return the state stack in that vm_state."""
    return memory if vm_state in REMEMBERING else ()


def rests(vm_state: VmState, memory: Memory) -> bool:
    """Whether no guest runs although the vm_state is one in which guests run.

    A resize of a stopped instance does not start it, and a resized instance whose guest has ended stays resized.
    """
    return vm_state is VmState.RESIZED and memory[-1:] == (VmState.STOPPED,)


def without_guest(vm_state: VmState, memory: Memory) -> Memory:
    """Return the state stack after the end of the guest, in a vm_state that outlasts it."""
    if vm_state is not VmState.RESIZED or rests(vm_state, memory):
        return memory
    return (*(memory or (VmState.ACTIVE,)), VmState.STOPPED)


def evacuated(vm_state: VmState, memory: Memory) -> tuple[VmState, Memory]:
    """Return the vm_state and state stack of an instance after its evacuation.

    Saved memory is lost with the host, so that a suspended instance is stopped. The old disk of a resize is lost too,
    so that the resize is confirmed. A shelved instance keeps its image. An instance that was building or in error is
    created again.
    """
    match vm_state:
        case VmState.BUILDING | VmState.ERROR:
            return VmState.ACTIVE, ()
        case VmState.SUSPENDED:
            return VmState.STOPPED, ()
        case VmState.RESIZED:
            return (memory[-1] if memory else VmState.ACTIVE), ()
        case VmState.SHELVED:
            return VmState.SHELVED_OFFLOADED, _remembered_elsewhere(memory)
        case (
            VmState.ACTIVE
            | VmState.PAUSED
            | VmState.STOPPED
            | VmState.RESCUED
            | VmState.SHELVED_OFFLOADED
            | VmState.SOFT_DELETED
            | VmState.DELETED
            | VmState.MIGRATED_OUT
        ):
            return vm_state, _remembered_elsewhere(memory)


def _remembered_elsewhere(memory: Memory) -> Memory:
    """Return the state stack after an evacuation. A state below that was building or error stays."""
    if not memory or memory[0] in {VmState.BUILDING, VmState.ERROR}:
        return memory
    first, rest = evacuated(memory[0], memory[1:])
    return (first, *rest)


def resolve_target(operation: Operation, vm_state: VmState, memory: Memory) -> tuple[VmState, Memory]:
    """Return the vm_state and the state stack after a successful operation in `vm_state`.

    An operation that undoes another returns to the top of the stack, or to active if it is empty. The stack is kept if
    the vm_state does not change, and otherwise only from the operation's source states, so that no policy can make it
    grow without bound.
    """
    entry = CATALOGUE[operation]
    match entry.to:
        case Target.SAME:
            state = vm_state
        case Target.REPAIRED:
            state = VmState.ACTIVE if vm_state is VmState.ERROR else vm_state
        case Target.PRIOR:
            state, memory = (memory[0], memory[1:]) if memory else (VmState.ACTIVE, ())
        case Target.PRESENT:
            state, memory = (memory[-1] if memory else VmState.ACTIVE), ()
        case Target.EVACUATED:
            state, memory = evacuated(vm_state, memory)
        case VmState() as state:
            if state is not vm_state:
                known = memory if vm_state in entry.sources else ()
                memory = (vm_state, *known) if entry.remembers else known
    return state, remembered_in(state, memory)
