"""A server process that kills itself with SIGKILL in a phase of an operation, after so many of its effects.

What has to be asked before an operation can be is a table here: one entry for each operation that drivers perform.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from in_process.embedded import Embedded, admitted
from interlock.core.operations import CATALOGUE, Operation
from interlock.core.records import Event, Request
from interlock.hypervisors.simulated import SimulatedHost
from interlock.service.request_models import NewInstance, NewNetwork
from recovery.simulated_server import MEDIC

O = Operation  # noqa: E741
VM: Final = "one"


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """What leads to an operation, and what it is asked with."""

    before: tuple[tuple[Operation, dict[str, Any]], ...] = ()
    """What is carried out first, on an instance that runs, has a root disk, and whose guest has written to it."""
    parameters: dict[str, Any] = {}
    fails: str | None = None
    """What is said when it cannot be gone on with after a crash, for what is not meant to be."""


def after(*before: Operation, **parameters: Any) -> Story:
    return Story(before=tuple((operation, {}) for operation in before), parameters=parameters)


NEWEST: Final = "newest"
"""Stands for the id of the interface that was attached last."""

_RESIZED: Final = (O.RESIZE, {"memory_mib": 256, "root_gib": 2})
_IN_LAB: Final = (O.MOVE_INTERFACE, {"interface": "primary", "network": "lab"})
_FORWARD: Final = {"host_port": 8080, "guest_port": 80}
_DATA: Final = (O.ATTACH_VOLUME, {"volume": "data"})

STORIES: Final[dict[Operation, Story]] = {
    O.CREATE: Story(),
    O.START: after(O.STOP),
    O.STOP: after(),
    O.REBOOT: after(),
    O.PAUSE: after(),
    O.UNPAUSE: after(O.PAUSE),
    O.SUSPEND: after(),
    O.RESUME: after(O.SUSPEND),
    O.RESCUE: after(image=MEDIC.name),
    O.UNRESCUE: Story(before=((O.RESCUE, {"image": MEDIC.name}),)),
    O.CRASH_DUMP: after(),
    O.SET_PASSWORD: Story(parameters={"user": "ada", "password": "a word"}, fails="kept in memory only"),
    O.SOFT_DELETE: after(),
    O.RESTORE: after(O.SOFT_DELETE),
    O.DELETE: Story(before=(_DATA,)),
    O.FORCE_DELETE: Story(before=(_DATA,)),
    O.ATTACH_VOLUME: after(volume="data"),
    O.DETACH_VOLUME: Story(before=(_DATA,), parameters={"volume": "data"}),
    O.SWAP_VOLUME: Story(before=(_DATA,), parameters={"old": "data", "new": "more"}),
    O.ATTACH_INTERFACE: after(),
    O.DETACH_INTERFACE: after(O.ATTACH_INTERFACE, interface=NEWEST),
    O.MOVE_INTERFACE: after(O.STOP, interface="primary", network="lab"),
    O.SET_INTERFACE: Story(
        before=((O.STOP, {}), _IN_LAB, (O.START, {})), parameters={"interface": "primary", "inbound_kbit": 100}
    ),
    O.ADD_FORWARD: after(host_port=8080, guest_port=80),
    O.REMOVE_FORWARD: Story(before=((O.ADD_FORWARD, _FORWARD),), parameters={"host_port": 8080}),
    O.REBUILD: after(image=MEDIC.name),
    O.RESIZE: Story(parameters={"memory_mib": 256, "root_gib": 2}),
    O.CONFIRM_RESIZE: Story(before=(_RESIZED,)),
    O.REVERT_RESIZE: Story(before=(_RESIZED,)),
    O.SHELVE: after(),
    O.SHELVE_OFFLOAD: after(O.SHELVE),
    O.UNSHELVE: after(O.SHELVE, O.SHELVE_OFFLOAD),
    O.SNAPSHOT: after(name="copy"),
    O.BACKUP: after(backup_type="daily", rotation=1),
}

PASSED_OVER: Final = frozenset({"block_device_mapping", "networking", "reboot_pending_hard"})
"""Phases of the catalogue in which this driver has nothing to do, so that it never journals them."""

CASES: Final = [
    (operation, phase)
    for operation in STORIES
    for phase in CATALOGUE[operation].phases + CATALOGUE[operation].hard_phases
    if phase not in PASSED_OVER
]


async def prepare(folder: Path) -> None:
    """Make a server's folder with everything in it that no operation makes; a copy of it saves time."""
    fleet, _ = opened(folder)
    await fleet.start()
    await fleet.put_image(MEDIC)
    await fleet.put_image(msgspec.structs.replace(MEDIC, id="base", name="base"))
    await fleet.make_volume("data")
    await fleet.make_volume("more")
    await fleet.server.networks.create(fleet.caller, NewNetwork(name="lab"))
    await fleet.server.close()


def run(folder: Path, operation: Operation, phase: str, effects: int) -> None:
    """Carry out an operation, and die in that phase after so many effects; return if there are not so many."""
    asyncio.run(_run(folder, operation, phase, effects))


def opened(folder: Path) -> tuple[Embedded, SimulatedHost]:
    host = SimulatedHost(folder=folder / "host")
    return Embedded(folder / "data", host), host


async def _run(folder: Path, operation: Operation, phase: str, effects: int) -> None:
    fleet, host = opened(folder)
    await fleet.start()
    story = STORIES[operation]
    if operation is not O.CREATE:
        await fleet.ended(await _create(fleet))
        (vm,) = host.guests
        assert host.guest_writes(vm, "letter")
        for earlier, parameters in story.before:
            done = await fleet.carry_out(VM, earlier, **parameters)
            assert done.status.value == "succeeded", done
    _lay_in_wait(fleet, host, phase, effects)
    await fleet.ended(await _asked(fleet, operation, phase, story))
    await fleet.server.close()


async def _create(fleet: Embedded) -> Request:
    wish = NewInstance(name=VM, image="base", root_gib=1)
    return admitted(await fleet.server.instances.create(fleet.caller, wish))


async def _asked(fleet: Embedded, operation: Operation, phase: str, story: Story) -> Request:
    if operation is O.CREATE:
        return await _create(fleet)
    parameters = dict(story.parameters)
    if parameters.get("interface") == NEWEST:
        instance = await fleet.server.instances.describe(fleet.caller, VM)
        assert instance.spec is not None
        parameters["interface"] = instance.spec.interfaces[-1].id
    hard = {"hard": True} if phase in CATALOGUE[operation].hard_phases else {}
    return admitted(await fleet.submit(VM, operation, **parameters, **hard))


def _lay_in_wait(fleet: Embedded, host: SimulatedHost, phase: str, effects: int) -> None:
    """Kill this process in the phase, after so many changes of the host."""
    left = [effects]
    waiting = [False]
    keep, undefine = host.keep, host.undefine

    def heed(events: Sequence[Event]) -> None:
        for event in events:
            if event.kind in {"request.taken", "request.progress"} and event.data.get("phase") is not None:
                waiting[0] = event.data["phase"] == phase
                if waiting[0] and left[0] == 0:
                    _die()

    def changed() -> None:
        if waiting[0]:
            left[0] -= 1
            if left[0] == 0:
                _die()

    def keep_and_die(*args: Any) -> None:
        keep(*args)
        changed()

    def undefine_and_die(*args: Any) -> None:
        undefine(*args)
        changed()

    host.keep, host.undefine = keep_and_die, undefine_and_die  # type: ignore[method-assign,assignment]
    fleet.server.store.listen(heed)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
