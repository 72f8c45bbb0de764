"""A server process to be killed: it settles what its predecessor left, then keeps asking for random operations.

Started by `multiprocessing`, so that a round costs a fork and not an import of everything.
"""

from __future__ import annotations

import asyncio
import random
from multiprocessing.connection import Connection
from pathlib import Path

from in_process.embedded import Embedded
from interlock.core.operations import Operation
from interlock.core.records import Admitted, Image, Instance, Spec
from interlock.core.states import PowerState, VmState
from interlock.hypervisors.simulated import SimulatedGuest, SimulatedHost
from interlock.hypervisors.simulated.faults import Method
from interlock.ports import InstanceFilter

ASKED = (
    Operation.START,
    Operation.STOP,
    Operation.REBOOT,
    Operation.PAUSE,
    Operation.UNPAUSE,
    Operation.ATTACH_VOLUME,
    Operation.DETACH_VOLUME,
    Operation.SUSPEND,
    Operation.RESUME,
    Operation.RESCUE,
    Operation.UNRESCUE,
    Operation.CRASH_DUMP,
    Operation.SET_PASSWORD,
    Operation.SOFT_DELETE,
    Operation.RESTORE,
    Operation.DELETE,
)
DELAYS_MS = dict.fromkeys((method for method in Method if method is not Method.INSPECT), 3)
VMS = ("one", "two")
MEDIC = Image(id="medic", name="medic", kind="disk", path="/nowhere", size_bytes=1 << 20, sha256="0" * 64)
"""What a rescue boots."""


def run(folder: Path, seed: int, acknowledged: list[str], pipe: Connection) -> None:
    """Serve until killed. `acknowledged` are the ids whose ends the parent wants to hear of."""
    asyncio.run(_run(folder, random.Random(seed), acknowledged, pipe))


async def _run(folder: Path, chance: random.Random, acknowledged: list[str], pipe: Connection) -> None:
    host = SimulatedHost(folder=folder / "host")
    fleet = Embedded(folder / "data", host, delays_ms=DELAYS_MS, power_off_ms=2)
    await fleet.start()
    await settle(fleet)
    store = fleet.server.store
    requests = [await store.request(request_id) for request_id in acknowledged]
    pipe.send(("ends", [(one.id, one.status.value) if one else None for one in requests]))
    pipe.send(("differences", await differences(fleet, host)))
    if not any(volume.id == "data" for volume in await store.volumes.all()):
        await fleet.make_volume("data")
    if not any(image.id == MEDIC.id for image in await store.images.all()):
        await fleet.put_image(MEDIC)
    while True:
        await _ask(fleet, chance, pipe)
        await asyncio.sleep(chance.random() * 0.01)


async def settle(fleet: Embedded) -> None:
    for instance in await fleet.server.store.unsettled():
        for request in instance.outstanding:
            await fleet.ended(request)


async def differences(fleet: Embedded, host: SimulatedHost) -> list[str]:
    """What the record and the host do not agree on, once everything has settled."""
    found = [f"stuck: {instance}" for instance in await fleet.server.store.unsettled()]
    page = await fleet.server.store.instances(InstanceFilter(), 500)
    living = {instance.id: instance for instance in page.items}
    found += [f"stray: {stray}" for stray in set(host.guests) - set(living)]
    for instance in living.values():
        guest = host.guests.get(instance.id)
        found += _differences_of(
            instance, guest or SimulatedGuest(instance_id=instance.id, spec=instance.spec or Spec(image=MEDIC))
        )
        if await fleet.server.dump_files.dumps(instance.id) and instance.vm_state is VmState.DELETED:
            found.append(f"{instance.name} is deleted and has dumps")
    return found


def _differences_of(instance: Instance, guest: SimulatedGuest) -> list[str]:
    found = []
    runs = guest.power in {PowerState.RUNNING, PowerState.PAUSED}
    if runs != instance.executing:
        found.append(f"{instance.name} is {instance.vm_state.value}, and its guest {guest.power.value}")
    if runs and (guest.power is PowerState.PAUSED) != (instance.vm_state is VmState.PAUSED):
        found.append(f"{instance.name} is {instance.vm_state.value}, and its guest {guest.power.value}")
    if guest.starting or guest.paused_for_memory:
        found.append(f"the guest of {instance.name} is still held")
    suspended = VmState.SUSPENDED in {instance.vm_state, *instance.state_stack}
    if guest.memory_saved and not suspended:
        found.append(f"{instance.name} is {instance.vm_state.value}, and its memory is saved")
    if instance.vm_state is VmState.SUSPENDED and not guest.memory_saved:
        found.append(f"{instance.name} is suspended, and its memory is lost")
    held = {disk.id for disk in instance.spec.disks} if instance.spec else set()
    plugged = set(guest.disks) - {"root", "rescue"} if runs else held
    if held != plugged:
        found.append(f"{instance.name} should have {held}, and has {plugged}")
    rescued = instance.spec is not None and instance.spec.rescue_image is not None
    if instance.vm_state in {VmState.ACTIVE, VmState.PAUSED, VmState.RESIZED} and (rescued or "rescue" in guest.disks):
        found.append(f"{instance.name} is {instance.vm_state.value}, and has its rescue disk")
    if instance.vm_state is VmState.RESCUED and not rescued:
        found.append(f"{instance.name} is rescued, and boots its own disk")
    return found


async def _chosen(fleet: Embedded, chance: random.Random, name: str) -> Operation:
    """Mostly something that would be admitted now: of what there is, little is in any one state."""
    if chance.random() < 0.3:
        return chance.choice(ASKED)
    _, answers = await fleet.server.instances.allowed(fleet.caller, name)
    admitted = [operation for operation in ASKED if isinstance(answers[operation], Admitted)]
    return chance.choice(admitted or ASKED)


async def _ask(fleet: Embedded, chance: random.Random, pipe: Connection) -> None:
    name = chance.choice(VMS)
    if await fleet.server.store.instance_named(fleet.caller.project, name) is None:
        from interlock.service.request_models import NewInstance

        answer = await fleet.server.instances.create(fleet.caller, NewInstance(name=name, image="nothing"))
    else:
        operation = await _chosen(fleet, chance, name)
        parameters: dict[str, object] = {"volume": "data"} if "volume" in operation.value else {}
        if operation is Operation.RESCUE and chance.random() < 0.5:
            parameters = {"image": MEDIC.name}
        if operation in {Operation.STOP, Operation.REBOOT} and chance.random() < 0.5:
            parameters = {"hard": True}
        try:
            answer = await fleet.submit(name, operation, **parameters)
        except Exception:  # noqa: BLE001 - attached elsewhere, or deleted meanwhile: nothing was acknowledged
            return
    if isinstance(answer.disposition, Admitted):
        pipe.send(("acknowledged", answer.disposition.request.id))
