"""A server that is killed in any phase of any operation, after any of its effects, is gone on from where it was.

Real processes and a real SIGKILL, on a real SQLite file; only the guests are simulated, and theirs are files too.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from in_process.embedded import Embedded
from interlock.core.operations import CATALOGUE, Operation
from interlock.core.records import Instance, Request, Status
from interlock.core.references import MIGRATIONS
from interlock.core.state_stack import resolve_target
from interlock.core.states import VmState
from interlock.driver.operations import HANDLERS
from interlock.hypervisors.simulated import SimulatedHost
from interlock.server import DATABASE
from interlock.stores.sqlite import SqliteStore
from processes.preloaded import fork_server
from recovery import dying_in_phase
from recovery.dying_in_phase import CASES, PASSED_OVER, STORIES, opened
from recovery.simulated_server import differences
from waiting import PATIENCE_S

_EFFECTS_MAX = 12


@pytest.fixture
def context() -> ForkServerContext:
    return fork_server()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    asyncio.run(dying_in_phase.prepare(folder))
    return folder


def test_every_operation_and_every_phase_is_killed() -> None:
    """One that is performed and not in the table, or in a phase that no test dies in, fails here."""
    performed = set(HANDLERS) - MIGRATIONS  # those have two hosts, and are killed in tests/hosts
    assert set(STORIES) == performed
    phases = {
        (operation, phase)
        for operation in performed
        for phase in CATALOGUE[operation].phases + CATALOGUE[operation].hard_phases
    }
    assert {case for case in phases if case[1] not in PASSED_OVER} == set(CASES)
    assert {phase for _, phase in phases} >= PASSED_OVER


@pytest.mark.parametrize(("operation", "phase"), CASES, ids=[f"{operation}-{phase}" for operation, phase in CASES])
async def test_a_server_that_is_killed_in_a_phase_is_recovered_from(
    operation: Operation, phase: str, tmp_path: Path, prepared: Path, context: ForkServerContext
) -> None:
    for effects in range(_EFFECTS_MAX):
        folder = tmp_path / str(effects)
        shutil.copytree(prepared, folder)
        server = context.Process(target=dying_in_phase.run, args=(folder, operation, phase, effects))
        server.start()
        server.join(PATIENCE_S)
        if server.exitcode == 0:
            assert effects > 0, f"{operation.value} never came to the phase {phase}"
            return
        assert server.exitcode == -signal.SIGKILL
        await _recover(folder, operation, phase)
    raise AssertionError(f"more than {_EFFECTS_MAX} effects in {phase}")


async def _recover(folder: Path, operation: Operation, phase: str) -> None:
    before, request = await _left(folder, operation)
    assert request.phase == phase
    fleet, host = opened(folder)
    await fleet.start()
    try:
        ended = await fleet.ended(request)
        fails = STORIES[operation].fails
        assert ended.status is (Status.SUCCEEDED if fails is None else Status.FAILED), ended
        assert fails is None or fails in (ended.message or "")
        instance = await fleet.server.store.instance(before.id)
        assert instance is not None
        there = resolve_target(operation, before.vm_state, before.state_stack)[0]
        expected = there if fails is None else before.vm_state
        assert instance.vm_state is expected
        assert await differences(fleet, host) == []
        await _check_content(fleet, host, instance, operation)
    finally:
        await fleet.server.close()


async def _left(folder: Path, operation: Operation) -> tuple[Instance, Request]:
    """The instance as the dead server left it, and what was being done to it."""
    store = SqliteStore(folder / "data" / DATABASE)
    await store.open()
    try:
        (instance,) = await store.unsettled()
        (request,) = instance.outstanding
    finally:
        await store.close()
    assert request.operation is operation
    return instance, request


async def _check_content(fleet: Embedded, host: SimulatedHost, instance: Instance, operation: Operation) -> None:
    """What the guest wrote is there for as long as the instance is, unless it was rebuilt."""
    guest = host.guests.get(instance.id)
    if instance.vm_state is VmState.DELETED:
        assert guest is None
        assert all(volume.attached_to is None for volume in await fleet.server.store.volumes.all())
    elif guest is not None and operation is not Operation.CREATE:
        assert instance.spec is not None
        kept = () if operation is Operation.REBUILD else ("letter",)
        assert guest.roots[instance.spec.root].written == kept
