"""The life cycle of guests: defined, started, reset, paused, powered off, removed; and what state they are in."""

from __future__ import annotations

from typing import Final

from interlock.core.errors import GuestNotFound, NotResponding
from interlock.core.records import Spec
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.disks import root_disks
from interlock.hypervisors.qemu.files.instance_folder import Phase
from interlock.hypervisors.qemu.guest import ENDED_STATES, Guest
from interlock.hypervisors.qemu.launch import Launcher
from interlock.hypervisors.qemu.memory.guest_memory import discard_saved, end_process
from interlock.hypervisors.qemu.memory.saved_memory import SavedMemory
from interlock.hypervisors.qemu.migration.live_migration import LiveMigration
from interlock.hypervisors.qemu.network.taps import Taps
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.ports import Observation, Permit

_UNKNOWN: Final = Observation(defined=False, power_state=PowerState.NONE)


class Lifecycle:
    """State and power of guests. See `ports.Hypervisor` for the methods."""

    def __init__(self, registry: ProcessRegistry, launcher: Launcher, migration: LiveMigration, taps: Taps) -> None:
        self._registry = registry
        self._launcher = launcher
        self._taps = taps
        self._migration = migration

    # --------------------------------------------------------------------------------------------------- state

    async def inspect(self, instance_id: str) -> Observation:
        if not self._registry.can_name_folder(instance_id):
            return _UNKNOWN
        responded = await self._registry.caught_up(instance_id)
        guest, folder = self._registry.find(instance_id), self._registry.folder(instance_id)
        saved = SavedMemory(folder).is_usable_by(guest)
        if guest is not None and not responded:
            return _observed(guest, guest.last_state, saved=saved, responsive=False)
        if guest is not None:
            try:
                state = await guest.query_power_state()
                if state not in ENDED_STATES:
                    await guest.disks()
                    await guest.interfaces()
            except NotResponding:
                return _observed(guest, guest.last_state, saved=saved, responsive=False)
            except GuestNotFound:
                pass
            else:
                return _observed(guest, state, saved=saved, responsive=True)
        return Observation(defined=folder.exists(), power_state=PowerState.NONE, memory_saved=saved)

    async def wait_powered_off(self, instance_id: str) -> None:
        guest = self._registry.find(instance_id)
        if guest is not None:
            await guest.powered_off.wait()

    # ------------------------------------------------------------------------------------------- create, remove

    async def define(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        folder, settings = self._registry.folder(instance_id), self._registry.settings
        if not folder.exists():
            await self._taps.check(instance_id, spec)
        with folder.os_errors_rejected():
            root_disks.require_files(folder, spec)
            folder.make(permit)
            root_disks.remove_drafts(permit, folder.path)
            await root_disks.make_root_disk(permit, folder, spec, settings)
            await root_disks.make_rescue_disk(permit, folder, spec, settings)
            await root_disks.make_seed_disk(permit, folder, instance_id, spec)

    async def undefine(self, permit: Permit, instance_id: str) -> None:
        await self.power_off(permit, instance_id)
        folder = self._registry.folder(instance_id)
        with folder.os_errors_rejected():
            folder.remove(permit)

    # --------------------------------------------------------------------------------------------------- power

    async def power_on(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        guest = self._registry.find(instance_id)
        if guest is not None:
            state = await self._power_state(guest)
            if state is PowerState.RUNNING:
                return
            stale = guest.phase is Phase.STARTING and (
                guest.folder.spec() != spec
                or SavedMemory(guest.folder).any()
                or self._migration.is_awaited(instance_id)
            )
            if stale or (state in ENDED_STATES and guest.phase is not Phase.STARTING):
                await guest.kill(permit)
                guest = None
        if guest is None:
            files = SavedMemory(self._registry.folder(instance_id))
            self._migration.discard(permit, instance_id)
            with files.folder.os_errors_rejected():
                await files.remove(permit)
            guest = await self._launcher.start(permit, instance_id, spec)
        elif guest.phase is Phase.STARTING:
            await self._launcher.connect(guest, spec)
        await self._run(permit, guest)

    async def _run(self, permit: Permit, guest: Guest) -> None:
        await discard_saved(permit, guest)
        if guest.last_status == "io-error":
            await guest.allow_resume(permit)
        await guest.execute(permit, "cont")
        guest.note_boot()

    async def _power_state(self, guest: Guest) -> PowerState:
        """Return the power state; `NONE` if the process has just ended."""
        try:
            return await guest.query_power_state()
        except GuestNotFound:
            if not guest.process.ended.is_set():
                raise
            guest.record_phase(Phase.ENDED)
            return PowerState.NONE

    async def power_off(self, permit: Permit, instance_id: str) -> None:
        guest = self._registry.find(instance_id)
        if guest is not None:
            await end_process(permit, guest)

    async def press_power_button(self, permit: Permit, instance_id: str) -> None:
        await self._registry.require(instance_id).execute(permit, "system_powerdown")

    async def reset(self, permit: Permit, instance_id: str) -> None:
        guest = self._registry.find(instance_id)
        try:
            if guest is not None and guest.phase is not Phase.STARTING:
                await discard_saved(permit, guest)
                await guest.wait_past_firmware()
                if guest.last_status == "io-error":
                    await guest.allow_resume(permit)
                await guest.execute(permit, "system_reset")
                guest.note_boot()
                await guest.execute(permit, "cont")
                return
        except (NotResponding, GuestNotFound):
            permit.check()
        spec = self._registry.folder(instance_id).spec()
        if spec is None:
            raise GuestNotFound(f"VM {instance_id} was never started on this host.")
        await self.power_off(permit, instance_id)
        await self.power_on(permit, instance_id, spec)

    async def pause(self, permit: Permit, instance_id: str) -> None:
        guest = self._registry.require(instance_id)
        if await guest.require_running() is not PowerState.PAUSED:
            await guest.execute(permit, "stop")
        elif guest.last_status == "io-error":
            await guest.inhibit_resume(permit)

    async def unpause(self, permit: Permit, instance_id: str) -> None:
        guest = self._registry.require(instance_id)
        if await guest.require_running() is not PowerState.RUNNING:
            await self._run(permit, guest)


def _observed(guest: Guest, state: PowerState, *, saved: bool, responsive: bool) -> Observation:
    ended = state in ENDED_STATES
    return Observation(
        defined=True,
        power_state=state,
        disks=() if ended else guest.last_disks,
        interfaces=() if ended else guest.last_interfaces,
        memory_saved=saved,
        paused=state is PowerState.PAUSED and guest.last_status == "paused" and guest.saving is None,
        responsive=responsive,
    )
