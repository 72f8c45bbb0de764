"""Proofs of what changes disks, images, volumes and interfaces."""

from __future__ import annotations

from typing import Final

from interlock.core.operations import Operation
from operation_tests.power import anew, off, running, same_disk, state, undisturbed
from operation_tests.scenario import SECOND, VM, WRITTEN, Before, Scenario
from operation_tests.stage import MEMORY_MIB, SMALL, SMALL_DISK, Stage

_AFTERWARDS: Final = "written afterwards"
_LARGER_MIB: Final = MEMORY_MIB + 64
_LARGER_SECTORS: Final = 2 << 21
_CHANGE: Final = {"memory_mib": _LARGER_MIB, "root_gib": 2}


def _rescued(stage: Stage, before: Before) -> None:
    state(stage, "rescued")
    before.booted_anew(stage.status(VM))
    assert stage.instance(VM)["prior_vm_state"] == "active"
    same_disk(stage)


def _rescue(stage: Stage) -> None:
    running(stage)
    stage.carry_out(VM, "rescue", image=SMALL)
    stage.status(VM)


def _running_from_disk(stage: Stage) -> None:
    """A guest that booted from its own disk and answers, with something written onto that disk."""
    stage.boot(VM, SMALL_DISK)
    stage.write(VM, WRITTEN)
    stage.until_console(VM, "agent listens")


def _rebuilt(stage: Stage, before: Before) -> None:
    state(stage, "active")
    before.booted_anew(stage.status(VM))
    assert stage.read(VM) == "", "the disk is the old one"
    now = stage.instance(VM)
    assert [now[name] for name in ("id", "name", "forwards")] == [
        before.instance[name] for name in ("id", "name", "forwards")
    ]
    _one_root_disk(stage)


def _one_root_disk(stage: Stage) -> None:
    disks = sorted(path.name for path in stage.files(VM).glob("root*.qcow2"))
    assert len(disks) == 1, f"there are {disks}"


def _resized(stage: Stage, before: Before) -> None:
    state(stage, "resized")
    now = stage.status(VM)
    before.booted_anew(now)
    assert before.status is not None
    assert now["memory_kib"] > before.status["memory_kib"], "it has no more memory"
    stage.until_console(VM, f"disk vda {_LARGER_SECTORS} sectors")
    same_disk(stage)


def _resize(stage: Stage) -> None:
    _running_from_disk(stage)
    stage.carry_out(VM, "resize", **_CHANGE)
    stage.write(VM, _AFTERWARDS)


def _confirmed(stage: Stage, before: Before) -> None:
    undisturbed(stage, before)
    assert stage.read(VM) == _AFTERWARDS
    assert stage.instance(VM)["memory_mib"] == _LARGER_MIB
    _one_root_disk(stage)


def _reverted(stage: Stage, before: Before) -> None:
    anew(stage, before)
    assert stage.instance(VM)["memory_mib"] == MEMORY_MIB
    _one_root_disk(stage)


def _shelved(stage: Stage, _before: Before) -> None:
    off(stage, "shelved")


def _shelve(stage: Stage) -> None:
    _running_from_disk(stage)
    stage.carry_out(VM, "shelve")


def _offload(stage: Stage) -> None:
    _shelve(stage)
    stage.carry_out(VM, "shelve_offload")


def _offloaded(stage: Stage, before: Before) -> None:
    state(stage, "shelved_offloaded")
    folder = stage.server.folder / "guests" / "vms" / str(before.instance["id"])
    assert not folder.exists(), f"{folder} is left over"


def _copied(stage: Stage, before: Before) -> None:
    undisturbed(stage, before)
    assert before.status is not None
    now = stage.status(VM)
    assert not now["frozen"], "its file systems are frozen still"
    # A second time where the next server took it up.
    assert now["freezes"] - before.status["freezes"] in {1, 2}, "its file systems were not frozen for it"
    stage.write(VM, _AFTERWARDS)
    (copy,) = [image for image in stage.server.get("/v1/images")["items"] if image["source_instance"]]
    assert copy["source_instance"] == before.instance["id"]
    stage.boot(SECOND, copy["id"])
    assert stage.read(SECOND) == WRITTEN, "the copy does not have what was written before"


def _attached(stage: Stage, before: Before) -> None:
    undisturbed(stage, before)
    stage.until_console(VM, "disk vdb 16384 sectors")


def _attach(stage: Stage) -> None:
    running(stage)
    stage.carry_out(VM, "attach_volume", volume="data")
    stage.until_console(VM, "disk vdb 16384 sectors")
    stage.write(VM, WRITTEN, "vdb")


def _detached(stage: Stage, before: Before) -> None:
    undisturbed(stage, before)
    stage.until_console(VM, "disk vdb gone")


def _swapped(stage: Stage, before: Before) -> None:
    undisturbed(stage, before)
    assert stage.read(VM, "vdb") == WRITTEN, "what was written onto the volume is not on the other one"
    attached = {one["name"]: one["attached_to"] for one in stage.server.get("/v1/volumes")["items"]}
    assert attached == {"data": None, "other": before.instance["id"]}, attached


def _plugged(stage: Stage, before: Before) -> None:
    undisturbed(stage, before)
    stage.until_console(VM, "interface eth1")


def _plug(stage: Stage) -> None:
    running(stage)
    stage.carry_out(VM, "attach_interface")
    stage.until_console(VM, "interface eth1")


def _unplugged(stage: Stage, before: Before) -> None:
    undisturbed(stage, before)
    stage.until_console(VM, "interface eth1 gone")
    assert stage.instance(VM)["interfaces"] == []


_O = Operation
_COPIED: Final = (
    "The guest was frozen for it and went on in the same process; another that boots from the copy has what it had "
    "written before."
)

SCENARIOS: Final = (
    Scenario(
        operation=_O.RESCUE,
        parameters={"image": SMALL},
        proof="Another boot answers, which has the guest's own disk beside it.",
        prepare=running,
        verify=_rescued,
    ),
    Scenario(
        operation=_O.UNRESCUE,
        proof="The guest answers under another boot id, with its own disk.",
        prepare=_rescue,
        verify=anew,
    ),
    Scenario(
        operation=_O.REBUILD,
        proof="The guest boots from a new disk and answers with the same id, name and ports; nothing is written there.",
        prepare=_running_from_disk,
        verify=_rebuilt,
    ),
    Scenario(
        operation=_O.RESIZE,
        parameters=dict(_CHANGE),
        proof="The guest says that it has more memory and a larger disk, with what was written before.",
        prepare=_running_from_disk,
        verify=_resized,
    ),
    Scenario(
        operation=_O.CONFIRM_RESIZE,
        proof="The guest went on with what it has written since, and one root disk is left.",
        prepare=_resize,
        verify=_confirmed,
    ),
    Scenario(
        operation=_O.REVERT_RESIZE,
        proof="The guest has its old memory, and its disk what was written before the resize.",
        prepare=_resize,
        verify=_reverted,
    ),
    Scenario(
        operation=_O.SHELVE,
        proof="No process has the guest.",
        prepare=_running_from_disk,
        verify=_shelved,
    ),
    Scenario(
        operation=_O.SHELVE_OFFLOAD,
        proof="Nothing is left of it on the host.",
        prepare=_shelve,
        verify=_offloaded,
        answers=False,
    ),
    Scenario(
        operation=_O.UNSHELVE,
        proof="The guest answers again, and its disk, made from the image, has what was written before.",
        prepare=_offload,
        verify=anew,
        answers=False,
    ),
    Scenario(
        operation=_O.SNAPSHOT,
        parameters={"name": "copy"},
        proof=_COPIED,
        prepare=_running_from_disk,
        verify=_copied,
    ),
    Scenario(
        operation=_O.BACKUP,
        parameters={"backup_type": "daily", "rotation": 2},
        proof=_COPIED,
        prepare=_running_from_disk,
        verify=_copied,
    ),
    Scenario(
        operation=_O.ATTACH_VOLUME,
        parameters={"volume": "data"},
        proof="The guest said on its console that it has another disk.",
        prepare=running,
        verify=_attached,
    ),
    Scenario(
        operation=_O.DETACH_VOLUME,
        parameters={"volume": "data"},
        proof="The guest said on its console that the disk is gone.",
        prepare=_attach,
        verify=_detached,
    ),
    Scenario(
        operation=_O.SWAP_VOLUME,
        parameters={"old": "data", "new": "other"},
        proof="The guest reads from the other volume what it has written onto the first.",
        prepare=_attach,
        verify=_swapped,
    ),
    Scenario(
        operation=_O.ATTACH_INTERFACE,
        proof="The guest said on its console that it has another interface.",
        prepare=running,
        verify=_plugged,
    ),
    Scenario(
        operation=_O.DETACH_INTERFACE,
        chosen=lambda stage: {"interface": stage.instance(VM)["interfaces"][0]["id"]},
        proof="The guest said on its console that the interface is gone.",
        prepare=_plug,
        verify=_unplugged,
    ),
)
