"""Proofs of what starts, stops, holds and saves a guest, and of what is told to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import httpx

from interlock.core.operations import Operation
from operation_tests.scenario import VM, WRITTEN, Before, Scenario
from operation_tests.stage import Stage


def running(stage: Stage) -> None:
    """A guest that answers, with something written onto its disk."""
    stage.boot(VM)
    stage.write(VM, WRITTEN)


def stopped(stage: Stage) -> None:
    """The same, powered off."""
    running(stage)
    stage.carry_out(VM, "stop")


def _after(*operations: str) -> Callable[[Stage], None]:
    def prepare(stage: Stage) -> None:
        running(stage)
        for operation in operations:
            stage.carry_out(VM, operation)

    return prepare


def state(stage: Stage, vm_state: str) -> None:
    """Hold that the instance is in that state. Raises AssertionError."""
    found = stage.instance(VM)
    assert found["vm_state"] == vm_state, found


def same_disk(stage: Stage) -> None:
    """Hold that the disk has what was written onto it. Raises AssertionError."""
    assert stage.read(VM) == WRITTEN, f"the disk has {stage.read(VM)!r}"


def off(stage: Stage, vm_state: str) -> None:
    """Hold that no process has the guest. Raises AssertionError."""
    state(stage, vm_state)
    assert stage.process(VM) is None, "a process has the guest"


def anew(stage: Stage, before: Before) -> None:
    """Hold that the guest was booted anew on the same disk. Raises AssertionError."""
    state(stage, "active")
    before.booted_anew(stage.status(VM))
    same_disk(stage)


def undisturbed(stage: Stage, before: Before) -> None:
    """Hold that the guest runs on in the same process. Raises AssertionError."""
    state(stage, "active")
    before.goes_on(stage.status(VM))
    assert stage.process(VM) == before.process, "another process has the guest"


def _nothing(_stage: Stage) -> None:
    """What is to be created needs nothing before."""


def _created(stage: Stage, _before: Before) -> None:
    state(stage, "active")
    stage.status(VM)


def _stopped(stage: Stage, before: Before) -> None:
    off(stage, "stopped")
    said = stage.console(VM)[before.console :]
    assert "power button" in said or "agent powerdown" in said, f"the guest was not asked, and said {said!r}"


def _stopped_hard(stage: Stage, _before: Before) -> None:
    off(stage, "stopped")


def _paused(stage: Stage, before: Before) -> None:
    state(stage, "paused")
    assert stage.process(VM) == before.process
    assert stage.silent(VM), "a paused guest answers"


def _resumed(stage: Stage, before: Before) -> None:
    state(stage, "active")
    now = stage.status(VM)
    before_suspension = stage.remembered
    assert now["boot_id"] == before_suspension["boot_id"], "it was booted anew"
    assert now["counter"] >= before_suspension["counter"], "its memory was set back"
    assert before.process is None


def _suspended(stage: Stage, _before: Before) -> None:
    off(stage, "suspended")
    assert any("memory" in path.name for path in stage.files(VM).iterdir()), "its memory is in no file"


def _suspend(stage: Stage) -> None:
    running(stage)
    stage.remembered = stage.status(VM)
    stage.carry_out(VM, "suspend")


def _pause(stage: Stage) -> None:
    running(stage)
    stage.remembered = stage.status(VM)
    stage.carry_out(VM, "pause")


def _unpaused(stage: Stage, before: Before) -> None:
    state(stage, "active")
    now = stage.status(VM)
    assert now["boot_id"] == stage.remembered["boot_id"], "it was booted anew"
    assert stage.process(VM) == before.process


def _password(stage: Stage, before: Before) -> None:
    undisturbed(stage, before)
    now = stage.status(VM)
    assert before.status is not None
    assert now["passwords"] != before.status["passwords"], "no password was set"


def _dumped(stage: Stage, before: Before) -> None:
    undisturbed(stage, before)
    (dump,) = stage.server.get(f"/v1/instances/{VM}/dumps")["items"]
    content = stage.server.client.get(f"/v1/instances/{VM}/dumps/{dump['id']}").content
    assert content.startswith((b"KDUMP", b"makedumpfile")), content[:16]


def _soft_deleted(stage: Stage, _before: Before) -> None:
    off(stage, "soft_deleted")
    assert any(path.suffix == ".qcow2" for path in stage.files(VM).iterdir()), "its disk is gone"


def _deleted(stage: Stage, before: Before) -> None:
    assert stage.server.client.get(f"/v1/instances/{VM}").status_code == httpx.codes.NOT_FOUND
    folder = stage.server.folder / "guests" / "vms" / str(before.instance["id"])
    assert not folder.exists(), f"{folder} is left over"


_O = Operation

SCENARIOS: Final = (
    Scenario(
        operation=_O.CREATE,
        proof="The guest answers over its network.",
        prepare=_nothing,
        verify=_created,
        answers=False,
        exists=False,
    ),
    Scenario(
        operation=_O.START,
        proof="The guest answers over its network, and its disk has what was written before.",
        prepare=stopped,
        verify=anew,
        answers=False,
    ),
    Scenario(
        operation=_O.STOP,
        proof="The guest said that it was asked to power off, and no process has it.",
        prepare=running,
        verify=_stopped,
    ),
    Scenario(
        operation=_O.STOP,
        parameters={"hard": True},
        proof="No process has the guest.",
        prepare=running,
        verify=_stopped_hard,
    ),
    Scenario(
        operation=_O.REBOOT,
        proof="The guest answers under another boot id, and its disk has what was written before.",
        prepare=running,
        verify=anew,
    ),
    Scenario(
        operation=_O.REBOOT,
        parameters={"hard": True},
        proof="The same.",
        prepare=running,
        verify=anew,
    ),
    Scenario(
        operation=_O.PAUSE,
        proof="The same process has the guest, and it gives no answer.",
        prepare=running,
        verify=_paused,
    ),
    Scenario(
        operation=_O.UNPAUSE,
        proof="The guest answers under the same boot id, in the same process.",
        prepare=_pause,
        verify=_unpaused,
        answers=False,
    ),
    Scenario(
        operation=_O.SUSPEND,
        proof="No process has the guest, and a file has its memory.",
        prepare=running,
        verify=_suspended,
    ),
    Scenario(
        operation=_O.RESUME,
        proof="The guest answers under the same boot id, and its counter went on from where it was.",
        prepare=_suspend,
        verify=_resumed,
        answers=False,
    ),
    Scenario(
        operation=_O.CRASH_DUMP,
        proof="The dump that is downloaded is one for a debugger, and the guest went on in the same process.",
        prepare=running,
        verify=_dumped,
    ),
    Scenario(
        operation=_O.SET_PASSWORD,
        parameters={"user": "root", "password": "of this proof"},
        proof="The guest's agent has set another password, and the guest went on. It is in memory only: after a "
        "crash it is to be asked for again.",
        forgotten=True,
        prepare=running,
        verify=_password,
    ),
    Scenario(
        operation=_O.SOFT_DELETE,
        proof="No process has the guest, and its disk is kept.",
        prepare=running,
        verify=_soft_deleted,
    ),
    Scenario(
        operation=_O.RESTORE,
        proof="The guest answers again, and its disk has what was written before.",
        prepare=_after("soft_delete"),
        verify=anew,
        answers=False,
    ),
    Scenario(
        operation=_O.DELETE,
        proof="Nothing is left of it on the host.",
        prepare=running,
        verify=_deleted,
    ),
    Scenario(
        operation=_O.FORCE_DELETE,
        proof="Nothing is left of it on the host.",
        prepare=running,
        verify=_deleted,
    ),
)
