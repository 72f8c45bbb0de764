"""A server that is killed anywhere loses no guest, leaves no stray process, and its work can be completed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from conformance.hypervisor import GivenPermit, Told
from conformance.qemu_workbench import QemuWorkbench
from interlock.core.records import GuestEvent
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.files.instance_folder import Phase, ProcessRecord
from interlock.hypervisors.qemu.process.qemu_process import started_ticks
from interlock.ports import HypervisorEvent
from processes.preloaded import exit_code
from tiers import tier

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

PERMIT = GivenPermit()

# A server that kills itself at its Nth step: a step is an effect that a permit is asked for, or a record that is kept.
DOOMED = """
import asyncio, os, signal, sys
from pathlib import Path
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu import launch
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder
from conformance.qemu_workbench import QemuWorkbench

steps = int(sys.argv[2])

def step():
    global steps
    steps -= 1
    if steps == 0:
        os.kill(os.getpid(), signal.SIGKILL)

class Permit:
    check = staticmethod(step)

def stepping(function):
    def stepped(*args, **kwargs):
        step()
        answer = function(*args, **kwargs)
        step()
        return answer
    return stepped

InstanceFolder.write_process_record = stepping(InstanceFolder.write_process_record)
launch.spawn = stepping(launch.spawn)

async def serve():
    host = QemuWorkbench(Path(sys.argv[1]))
    hypervisor = host.make()
    await hypervisor.open(print)
    await hypervisor.define(Permit, "one", host.spec())
    await hypervisor.power_on(Permit, "one", host.spec())
    await hypervisor.attach_disk(Permit, "one", host.disk("v1"))
    await hypervisor.detach_disk(Permit, "one", "v1")
    await hypervisor.undefine(Permit, "one")
    await hypervisor.close()

asyncio.run(serve())
"""


async def doomed(folder: Path, steps: int) -> int:
    """Run a server that kills itself at that step, and return its exit status."""
    return await asyncio.to_thread(exit_code, "-c", DOOMED, str(folder), str(steps))


async def test_whatever_step_a_server_is_killed_at_its_work_can_be_completed(host: QemuWorkbench) -> None:
    steps = 0
    status = -signal.SIGKILL
    while status == -signal.SIGKILL:
        steps += tier(5, 1)
        status = await doomed(host.folder, steps)
        hypervisor = host.make()
        told = Told()
        await hypervisor.open(told)
        assert told.kinds() == [], f"nothing happened by itself, at step {steps}"
        if "one" in await hypervisor.known() and steps % 2:
            await hypervisor.power_off(PERMIT, "one")
            assert (await hypervisor.inspect("one")).power_state is PowerState.NONE
        await hypervisor.define(PERMIT, "one", host.spec())
        await hypervisor.power_on(PERMIT, "one", host.spec())
        await host.until_up("one")
        await hypervisor.attach_disk(PERMIT, "one", host.disk("v1"))
        await hypervisor.detach_disk(PERMIT, "one", "v1")
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()
        assert await host.remains("one") == [], f"killed at step {steps}"
    assert status == 0
    assert steps > 15


async def test_a_guest_outlives_a_killed_server_and_its_news_is_kept(host: QemuWorkbench) -> None:
    script = DOOMED.replace(
        'await hypervisor.attach_disk(Permit, "one", host.disk("v1"))',
        'print("runs", flush=True)\n    await asyncio.Event().wait()',
    )
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(host.folder), "0", stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert server.stdout is not None
    assert await server.stdout.readline() == b"runs\n"
    os.killpg(server.pid, signal.SIGKILL)
    await server.wait()
    assert await server.stdout.read() == b"", "the guest must not hold its server's pipe open"
    await host.until_up("one")
    await host.guest_power_off("one")
    told = Told()
    hypervisor = host.make()
    await hypervisor.open(told)
    assert told.events == [HypervisorEvent(instance_id="one", kind=GuestEvent.STOPPED, during_watch=False)]
    assert (await hypervisor.inspect("one")).power_state is PowerState.SHUTDOWN
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


async def test_news_that_was_read_and_not_told_is_told_from_what_is_seen(host: QemuWorkbench) -> None:
    """A server killed after it emptied the journal and before it told."""
    hypervisor = host.make()
    await hypervisor.open(Told())
    await hypervisor.define(PERMIT, "one", host.spec())
    await hypervisor.power_on(PERMIT, "one", host.spec())
    await host.until_up("one")
    await host.abandon(hypervisor)
    await host.guest_panic("one")
    journal = host.instance_folder("one").open_event_pipe("out")
    assert b"GUEST_PANICKED" in os.read(journal, 65536)
    os.close(journal)
    told = Told()
    hypervisor = host.make()
    await hypervisor.open(told)
    assert told.kinds() == [GuestEvent.CRASHED]
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


async def test_a_reused_process_id_is_not_taken_for_the_guest(host: QemuWorkbench) -> None:
    hypervisor = host.make()
    await hypervisor.open(Told())
    await hypervisor.define(PERMIT, "one", host.spec())
    await hypervisor.close()
    record = ProcessRecord(phase=Phase.RUNNING, process_id=os.getpid(), started_ticks=started_ticks(os.getpid()) or 0)
    host.instance_folder("one").write_process_record(record)
    told = Told()
    hypervisor = host.make()
    await hypervisor.open(told)
    assert told.kinds() == [GuestEvent.VANISHED]
    await hypervisor.power_off(PERMIT, "one")
    await hypervisor.close()
    assert isinstance(hypervisor, QemuHypervisor)
