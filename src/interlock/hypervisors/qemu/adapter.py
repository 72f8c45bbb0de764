"""The hypervisor port on QEMU: which steps each verb takes, and how it converges from whatever is found.

One process per guest. No thread, no timer and no polling per guest: pidfds, pipes and sockets wake the event loop. What
a step does is in the modules beside this one.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Final

from interlock.core.errors import Fenced, HypervisorError, NotResponding, NotThere, Refused
from interlock.core.records import Spec
from interlock.core.states import PowerState
from interlock.hypervisors.qemu import dump, guest_agent, memory, root_disks, screen
from interlock.hypervisors.qemu.charge import SAFE_ID
from interlock.hypervisors.qemu.command_line import Machine
from interlock.hypervisors.qemu.console_log import end_of
from interlock.hypervisors.qemu.guest import ENDED_STATES, Guest
from interlock.hypervisors.qemu.instance_folder import Phase
from interlock.hypervisors.qemu.launch import launch, refused
from interlock.hypervisors.qemu.networks import taken_port
from interlock.hypervisors.qemu.passages import Passages
from interlock.hypervisors.qemu.saved_memory import SavedMemory
from interlock.ports import Observation, Permit, Report, Stream

_UNKNOWN: Final = Observation(defined=False, power_state=PowerState.NONE)


class QemuHypervisor(Passages):
    """Holds guests as QEMU processes that outlive it. See `ports.Hypervisor` for what each method promises."""

    # --------------------------------------------------------------------------------------------- looking

    async def inspect(self, instance_id: str) -> Observation:
        if SAFE_ID.fullmatch(instance_id) is None:
            return _UNKNOWN
        guest = self._guests.get(instance_id)
        folder = self._folder_of(instance_id)
        saved = SavedMemory(folder).can_be_gone_on_from(guest)
        if guest is not None:
            try:
                state = await guest.look()
                if state not in ENDED_STATES:
                    await guest.disks()
                    await guest.interfaces()
            except NotResponding:
                return _seen(guest, guest.last_seen, saved=saved, responsive=False)
            except NotThere:
                pass
            else:
                return _seen(guest, state, saved=saved, responsive=True)
        return Observation(defined=folder.exists(), power_state=PowerState.NONE, memory_saved=saved)

    async def wait_powered_off(self, instance_id: str) -> None:
        guest = self._guests.get(instance_id)
        if guest is not None:
            await guest.rests.wait()

    async def console_tail(self, instance_id: str, length: int) -> bytes | None:
        path = self.console_path(instance_id)
        return None if path is None else await asyncio.to_thread(end_of, path, length)

    def console_path(self, instance_id: str) -> Path | None:
        """The file to which the guest's serial console is written, or None if there is none."""
        if SAFE_ID.fullmatch(instance_id) is None:
            return None
        console = self._folder_of(instance_id).console
        return console if console.exists() else None

    # -------------------------------------------------------------------------------- making and removing

    async def define(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        folder = self._folder_of(instance_id)
        with refused(folder):
            root_disks.require_files(folder, spec)
            folder.make(permit)
            root_disks.drop_half_made(permit, folder.path)
            await root_disks.make_root_disk(permit, folder, spec, self._settings)
            await root_disks.make_rescue_disk(permit, folder, spec, self._settings)
            await root_disks.make_seed_disk(permit, folder, instance_id, spec)

    async def undefine(self, permit: Permit, instance_id: str) -> None:
        await self.power_off(permit, instance_id)
        folder = self._folder_of(instance_id)
        with refused(folder):
            folder.remove(permit)

    # ---------------------------------------------------------------------------------------- on and off

    async def power_on(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        guest = self._guests.get(instance_id)
        if guest is not None:
            state = await self._look_unless_gone(guest)
            if state is PowerState.RUNNING:
                return
            waits_for_memory = SavedMemory(guest.folder).any()
            stale = guest.phase is Phase.STARTING and (
                guest.folder.spec() != spec or waits_for_memory or self._awaits(instance_id)
            )
            if stale or (state in ENDED_STATES and guest.phase is not Phase.STARTING):
                await guest.kill(permit)
                guest = None
        if guest is None:
            files = SavedMemory(self._folder_of(instance_id))
            self._forget_passages(permit, instance_id)
            with refused(files.folder):
                await files.drop(permit)
            guest = await self._start(permit, instance_id, spec)
        await self._let_run(permit, guest)

    async def _let_run(self, permit: Permit, guest: Guest) -> None:
        with refused(guest.folder):
            await memory.make_way(permit, guest, SavedMemory(guest.folder))
        await guest.tell(permit, "cont")
        guest.boots()

    async def _look_unless_gone(self, guest: Guest) -> PowerState:
        """What state the guest is in; as good as powered off when its process has just ended."""
        try:
            return await guest.look()
        except NotThere:
            if not guest.process.ended.is_set():
                raise
            guest.keep(Phase.ENDED)
            return PowerState.NONE

    async def _start(self, permit: Permit, instance_id: str, spec: Spec, machine: Machine | None = None) -> Guest:
        """Start a process whose guest stands still, and wait until it answers."""
        folder = self._folder_of(instance_id)
        if not folder.inside.is_dir():
            raise NotThere(f"Instance {instance_id} is not defined on this host.")
        if len(self._guests) >= self._settings.processes_max:
            raise Refused(
                f"This host holds {len(self._guests)} guests, as many as it may.",
                remedy="Stop one, or raise processes_max.",
            )
        process_id = launch(permit, instance_id, folder, spec, self._settings, self._account, machine)
        guest = self._hold(instance_id, folder, process_id)
        guest.journal.negotiate()
        guest.watch()
        await self._await_greeting(guest)
        return guest

    async def _await_greeting(self, guest: Guest) -> None:
        greeting = asyncio.ensure_future(guest.monitor.connect(self._settings.start_timeout_ms))
        ended = asyncio.ensure_future(guest.process.ended.wait())
        try:
            await asyncio.wait({greeting, ended}, return_when=asyncio.FIRST_COMPLETED)
            if greeting.done() and (greeting.exception() is None or isinstance(greeting.exception(), NotResponding)):
                return greeting.result()
            # The connection breaks a moment before the process has ended.
            await asyncio.wait({ended}, timeout=self._settings.qmp_timeout_ms / 1000)
        finally:
            for task in (greeting, ended):
                task.cancel()
        words = guest.folder.last_error()
        if (port := taken_port(words)) is not None:
            raise Refused(
                f"The host's port {port} cannot be forwarded to instance {guest.instance_id}: another program "
                "probably listens on it.",
                remedy=f"End what listens on 127.0.0.1:{port}, then start the instance.",
            )
        raise Refused(
            f"QEMU did not start for instance {guest.instance_id}: {words}",
            remedy=f"QEMU's own words are in {guest.folder.errors}.",
        )

    async def power_off(self, permit: Permit, instance_id: str) -> None:
        guest = self._guests.get(instance_id)
        if guest is not None:
            await self._end(permit, guest)

    async def _end(self, permit: Permit, guest: Guest) -> None:
        """End its process; a memory from which it was about to run, and did not, is saved still."""
        await guest.kill(permit)
        with refused(guest.folder):
            await SavedMemory(guest.folder).take_back(permit, guest)

    async def press_power_button(self, permit: Permit, instance_id: str) -> None:
        await self._guest(instance_id).tell(permit, "system_powerdown")

    async def reset(self, permit: Permit, instance_id: str) -> None:
        guest = self._guests.get(instance_id)
        try:
            if guest is not None and guest.phase is not Phase.STARTING:
                with refused(guest.folder):
                    await memory.make_way(permit, guest, SavedMemory(guest.folder))
                await guest.past_firmware()
                await guest.tell(permit, "system_reset")
                guest.boots()
                await guest.tell(permit, "cont")
                return
        except (NotResponding, NotThere):
            permit.check()
        spec = self._folder_of(instance_id).spec()
        if spec is None:
            raise NotThere(f"Instance {instance_id} was never started on this host.")
        await self.power_off(permit, instance_id)
        await self.power_on(permit, instance_id, spec)

    async def pause(self, permit: Permit, instance_id: str) -> None:
        guest = self._guest(instance_id)
        state = await guest.look()
        if state in ENDED_STATES:
            raise NotThere(f"No guest of instance {instance_id} runs.")
        if state is not PowerState.PAUSED:
            await guest.tell(permit, "stop")

    async def unpause(self, permit: Permit, instance_id: str) -> None:
        guest = self._guest(instance_id)
        state = await guest.look()
        if state in ENDED_STATES:
            raise NotThere(f"No guest of instance {instance_id} runs.")
        if state is not PowerState.RUNNING:
            await self._let_run(permit, guest)

    # -------------------------------------------------------------------------------------------- memory

    async def save_memory(self, permit: Permit, instance_id: str, report: Report) -> None:
        files = SavedMemory(self._folder_of(instance_id))
        if instance_id in self._guests:
            await memory.save(permit, self._guests[instance_id], files, report)
        elif not files.saved.exists():
            raise NotThere(f"No guest of instance {instance_id} runs.")

    async def restore_memory(self, permit: Permit, instance_id: str, spec: Spec, report: Report) -> None:
        files = SavedMemory(self._folder_of(instance_id))
        guest = self._guests.get(instance_id)
        if guest is not None and memory.of_no_use(guest, files):
            await guest.kill(permit)
            guest = None
        if guest is not None:
            return await memory.run(permit, guest, files)
        machine = files.machine_for(instance_id, spec)
        try:
            guest = await self._start(permit, instance_id, spec, machine)
            await memory.read(permit, guest, files, report)
            await memory.run(permit, guest, files)
        except BaseException:
            with contextlib.suppress(HypervisorError, Fenced):
                await self.power_off(permit, instance_id)
            raise

    async def forget_memory(self, permit: Permit, instance_id: str) -> None:
        guest = self._guests.get(instance_id)
        files = SavedMemory(self._folder_of(instance_id))
        if guest is not None and guest.phase is Phase.STARTING and files.any():
            await guest.kill(permit)
        with refused(self._folder_of(instance_id)):
            await files.drop(permit)

    async def dump_memory(self, permit: Permit, instance_id: str, target: Path, report: Report) -> None:
        await dump.dump(permit, self._guest(instance_id), target, report)

    # -------------------------------------------------------------------------------- seeing and being seen

    async def screenshot(self, instance_id: str) -> bytes:
        return await screen.screenshot(self._guest_that_runs(instance_id))

    async def open_display(self, instance_id: str) -> Stream:
        return await screen.open_display(self._guest_that_runs(instance_id))

    async def open_console(self, instance_id: str) -> Stream:
        guest = self._guest(instance_id)
        stream = await guest.console.open()
        # A question behind the call: when it is answered, QEMU has taken the call, and tells us what comes.
        try:
            with contextlib.suppress(HypervisorError):
                await guest.ask("query-chardev")
        except BaseException:
            await stream.close()
            raise
        return stream

    # --------------------------------------------------------------------------------------------- guest agent

    async def agent_answers(self, instance_id: str) -> bool:
        guest = self._guests.get(instance_id)
        return guest is not None and await guest_agent.answers(guest)

    async def ask_shutdown(self, permit: Permit, instance_id: str) -> None:
        await guest_agent.ask_shutdown(self._guest(instance_id), permit)

    async def set_password(self, permit: Permit, instance_id: str, user: str, password: str) -> None:
        await guest_agent.set_password(self._guest(instance_id), permit, user, password)


def _seen(guest: Guest, state: PowerState, *, saved: bool, responsive: bool) -> Observation:
    ended = state in ENDED_STATES
    return Observation(
        defined=True,
        power_state=state,
        disks=() if ended else guest.last_disks,
        interfaces=() if ended else guest.last_interfaces,
        memory_saved=saved,
        responsive=responsive,
    )
