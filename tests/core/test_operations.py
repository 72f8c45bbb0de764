"""The catalogue is complete and consistent with itself."""

from __future__ import annotations

import pytest
from core_samples import O, V

from interlock.core.operations import BIT, CATALOGUE, FIELDS, TASK_OPERATION, TASK_STATES, Entry, Lane, Operation
from interlock.core.record_operations import RECORD_OPERATIONS
from interlock.core.state_stack import Memory, resolve_target, without_guest
from interlock.core.states import NO_TASK, Target, VmState
from interlock.driver.operations import PERFORMS

EVERY = sorted(CATALOGUE.values(), key=lambda entry: entry.operation.value)


def test_every_operation_has_an_entry_of_its_own() -> None:
    """The catalogue is complete."""
    assert set(CATALOGUE) == set(Operation)
    assert all(entry.operation is operation for operation, entry in CATALOGUE.items())


def test_what_changes_the_record_only_is_performed_by_the_core() -> None:
    """Each by its own entry: an operation that has none is an error, never another one."""
    assert set(RECORD_OPERATIONS) == {entry.operation for entry in EVERY if entry.lane is Lane.RECORD}


def test_a_phase_belongs_to_one_operation() -> None:
    """So the task state alone tells what is being done."""
    phases = [phase for entry in EVERY for phase in entry.phases + entry.hard_phases]
    assert len(phases) == len(set(phases))
    assert set(phases) == set(TASK_OPERATION)
    assert NO_TASK not in phases


def test_the_task_states_are_the_phases_of_the_state_changes() -> None:
    """A component change has a phase, and no task state."""
    assert set(TASK_STATES) == {
        phase for entry in EVERY if entry.lane is Lane.STATE for phase in entry.phases + entry.hard_phases
    }


@pytest.mark.parametrize("entry", EVERY, ids=lambda entry: entry.operation.value)
def test_an_entry_makes_sense(entry: Entry) -> None:
    """What is served has phases; what only changes the record has none; nothing starts from deleted."""
    assert bool(entry.phases) is (entry.lane is not Lane.RECORD)
    assert VmState.DELETED not in entry.sources
    assert entry.sources
    assert not entry.compatible_with or entry.lane is Lane.COMPONENT
    assert all(CATALOGUE[other].lane is Lane.STATE for other in entry.compatible_with)
    assert not entry.hard_phases or len(entry.hard_phases) == len(entry.phases)


@pytest.mark.parametrize("entry", EVERY, ids=lambda entry: entry.operation.value)
def test_a_definition_says_what_people_read(entry: Entry) -> None:
    """Its command, the reference and the OpenAPI description are made from it."""
    assert entry.summary.endswith(".")
    assert entry.confirm is None or "{vm}" in entry.confirm
    for field in FIELDS[entry.operation]:
        assert field.description, field.name
        assert entry.command is None or field.form is not None, field.name
    names = [field.name for field in FIELDS[entry.operation]]
    assert entry.parameters.secret is None or entry.parameters.secret in names


def test_no_two_operations_have_one_command() -> None:
    commands = [entry.command for entry in EVERY if entry.command is not None]
    assert len(set(commands)) == len(commands)


def test_every_operation_is_performed_by_somebody() -> None:
    assert set(Operation) == PERFORMS


def test_a_delete_can_be_performed_anywhere() -> None:
    """Law 5: delete always gets there."""
    for operation in (O.DELETE, O.FORCE_DELETE):
        assert CATALOGUE[operation].sources == frozenset(VmState) - {VmState.DELETED}
        assert CATALOGUE[operation].to is VmState.DELETED


def test_kinds_have_bits_of_their_own() -> None:
    """A set of kinds is one number."""
    assert len(set(BIT.values())) == len(Operation)
    assert all(bit.bit_count() == 1 for bit in BIT.values())


def test_a_bit_means_for_ever_what_it_meant_when_it_was_recorded() -> None:
    """Events keep masks: a new operation goes to the end, and none is ever taken out."""
    recorded = {O.CREATE: 0, O.CRASH_DUMP: 22, O.DELETE: 23, O.RESET_STATE: 34, O.LIVE_MIGRATE_FORCE_COMPLETE: 38}
    assert {operation: BIT[operation].bit_length() - 1 for operation in recorded} == recorded


EVACUATED = {
    V.BUILDING: V.ACTIVE,
    V.ERROR: V.ACTIVE,
    V.SUSPENDED: V.STOPPED,
    V.SHELVED: V.SHELVED_OFFLOADED,
    V.RESIZED: V.ACTIVE,
}
"""What an instance is without the host that it was on; what was resized is what it was before."""

UNDOING = [entry for entry in CATALOGUE.values() if entry.to is Target.PRIOR]


@pytest.mark.parametrize("operation", list(Operation))
@pytest.mark.parametrize("vm_state", list(VmState))
def test_a_landing_is_a_state_whatever_was_remembered(operation: Operation, vm_state: VmState) -> None:
    """`resolve_target` is total, and leads where the catalogue says."""
    for memory in ((), (V.STOPPED,), (V.RESCUED, V.STOPPED)):
        state, kept = resolve_target(operation, vm_state, memory)
        entry = CATALOGUE[operation]
        match entry.to:
            case Target.SAME:
                assert state is vm_state
            case Target.REPAIRED:
                assert state is (V.ACTIVE if vm_state is V.ERROR else vm_state)
            case Target.PRIOR:
                assert state is (memory[0] if memory else V.ACTIVE)
            case Target.EVACUATED:
                assert state is (memory[-1] if vm_state is V.RESIZED and memory else EVACUATED.get(vm_state, vm_state))
            case Target.PRESENT:
                assert (state, kept) == ((memory[-1] if memory else V.ACTIVE), ())
            case expected:
                assert state is expected
        if entry.remembers:
            assert kept[:1] == (memory[:1] if vm_state is entry.to else (vm_state,))
        assert not kept or any(state in undo.sources for undo in UNDOING), "remembered where nothing can be undone"


@pytest.mark.parametrize(
    ("there", "back"),
    [(O.RESCUE, O.UNRESCUE), (O.RESIZE, O.REVERT_RESIZE), (O.SHELVE, O.UNSHELVE), (O.SOFT_DELETE, O.RESTORE)],
)
def test_what_is_undone_leads_back(there: Operation, back: Operation) -> None:
    """To where the instance was before, running or not."""
    for before in (V.ACTIVE, V.STOPPED):
        assert resolve_target(back, *resolve_target(there, before, ())) == (before, ())


@pytest.mark.parametrize(
    ("there", "back"), [(O.RESCUE, O.UNRESCUE), (O.RESIZE, O.CONFIRM_RESIZE), (O.SHELVE, O.UNSHELVE)]
)
def test_a_soft_delete_and_a_restore_change_nothing(there: Operation, back: Operation) -> None:
    """What could be undone before can be undone after."""
    for before in (V.ACTIVE, V.STOPPED):
        was = resolve_target(there, before, ())
        deleted = resolve_target(O.SOFT_DELETE, *was)
        assert deleted == (V.SOFT_DELETED, (was[0], before))
        assert resolve_target(O.RESTORE, *deleted) == was
        assert resolve_target(back, *was) == (before, ())


def test_what_is_offloaded_goes_back_to_where_it_was_shelved() -> None:
    assert resolve_target(O.SHELVE_OFFLOAD, V.SHELVED, (V.SUSPENDED,)) == (V.SHELVED_OFFLOADED, (V.SUSPENDED,))


def test_what_came_from_where_it_could_not_be_asked_has_no_way_back_beyond_that() -> None:
    """So that a policy that admits anything makes no memory longer and longer."""
    assert resolve_target(O.RESCUE, V.SHELVED, (V.STOPPED,)) == (V.RESCUED, (V.SHELVED,))


@pytest.mark.parametrize(
    ("vm_state", "memory", "after"),
    [
        (V.SHELVED, (V.SUSPENDED,), (V.SHELVED_OFFLOADED, (V.STOPPED,))),
        (V.SHELVED, (V.ERROR,), (V.SHELVED_OFFLOADED, (V.ERROR,))),
        (V.SHELVED, (V.PAUSED,), (V.SHELVED_OFFLOADED, (V.PAUSED,))),
        (V.RESCUED, (V.BUILDING,), (V.RESCUED, (V.BUILDING,))),
        (V.SOFT_DELETED, (V.SHELVED, V.SUSPENDED), (V.SOFT_DELETED, (V.SHELVED_OFFLOADED, V.STOPPED))),
        (V.SOFT_DELETED, (V.RESIZED, V.PAUSED), (V.SOFT_DELETED, (V.PAUSED,))),
        (V.SOFT_DELETED, (), (V.SOFT_DELETED, ())),
    ],
)
def test_what_an_evacuated_instance_returns_to_was_evacuated_too(
    vm_state: VmState, memory: Memory, after: tuple[VmState, Memory]
) -> None:
    """A state to return to that was building or in error stays: it needs no guest and no disk."""
    assert resolve_target(O.EVACUATE, vm_state, memory) == after


@pytest.mark.parametrize(
    ("vm_state", "memory", "after"),
    [
        (V.RESIZED, (), (V.ACTIVE, V.STOPPED)),
        (V.RESIZED, (V.PAUSED,), (V.PAUSED, V.STOPPED)),
        (V.RESIZED, (V.STOPPED,), (V.STOPPED,)),
        (V.RESIZED, (V.PAUSED, V.STOPPED), (V.PAUSED, V.STOPPED)),
        (V.RESCUED, (V.ACTIVE,), (V.ACTIVE,)),
    ],
)
def test_only_a_resized_instance_remembers_that_its_guest_has_ended(
    vm_state: VmState, memory: Memory, after: Memory
) -> None:
    assert without_guest(vm_state, memory) == after
