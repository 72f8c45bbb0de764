"""Real QEMU as a workbench: the conformance suite can be run against it, and nano guests do what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from qemu.qmp import QMPClient

from benchmarks.nano_guest import HERE, MEMORY_MIB, nano_guest
from conformance.disk_patterns import first_byte, write_pattern
from conformance.hypervisor import Told
from interlock.core.errors import NotResponding
from interlock.core.records import Disk, Spec
from interlock.hypervisors.certificates.host_certificate import HostCertificate
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.process.qemu_process import find_in
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import Hypervisor
from waiting import PATIENCE_S

_KEYS = {"power_off": "o", "reset": "r", "panic": "p", "ignore": "i", "cooperate": "c", "here": "h"}
_NEWS = {"power_off": "SHUTDOWN", "reset": "RESET", "panic": "GUEST_PANICKED"}
_ASK_AGAIN_S = 0.05
_LOOK_AGAIN_S = 0.01


class QemuWorkbench:
    """Satisfies `conformance.hypervisor.HypervisorUnderTest`.

    Args:
        folder: an empty folder of its own.
        qmp_timeout_ms: how long the adapters wait for an answer, in milliseconds.
    """

    patience_s = PATIENCE_S
    notice_s = 15.0

    def __init__(self, folder: Path, qmp_timeout_ms: int = 1_000) -> None:
        self.folder = folder
        self.settings = QemuSettings(
            folder=folder / "qemu",
            qmp_timeout_ms=qmp_timeout_ms,
            detach_timeout_ms=1_000,
            liveness_interval_ms=500,
            liveness_timeout_ms=2_500,
            display=False,
            migration_unencrypted=True,
        )
        self.certificate = HostCertificate(folder / "tls")
        self._hypervisor: QemuHypervisor | None = None
        self._image = nano_guest(folder)

    def make(self) -> Hypervisor:
        self._hypervisor = QemuHypervisor(self.settings, self.certificate)
        return self._hypervisor

    async def abandon(self, hypervisor: Hypervisor) -> None:
        """What the end of our process would let go of: every descriptor, and nothing else."""
        await hypervisor.close()
        self._hypervisor = None

    def spec(self) -> Spec:
        return Spec(image=self._image, memory_mib=MEMORY_MIB)

    def disk(self, disk_id: str) -> Disk:
        path = self.folder / f"{disk_id}.qcow2"
        if not path.exists():
            subprocess.run(
                [self.settings.image_tool_binary, "create", "-q", "-f", "qcow2", str(path), "1M"], check=True
            )
        return Disk(id=disk_id, path=str(path))

    async def mark_root(self, spec: Spec, instance_id: str, mark: int) -> None:
        await asyncio.to_thread(write_pattern, self.instance_folder(instance_id).roots(spec).disk(spec.root), mark, 1)

    async def root_mark(self, spec: Spec, instance_id: str) -> int | None:
        disk = self.instance_folder(instance_id).roots(spec).disk(spec.root)
        return await asyncio.to_thread(first_byte, disk) if disk.exists() else None

    def instance_folder(self, instance_id: str) -> InstanceFolder:
        return InstanceFolder(self.settings.folder / "vms" / instance_id)

    def process_id(self, instance_id: str) -> int:
        """The process that holds the guest."""
        record = self.instance_folder(instance_id).process_record()
        assert record is not None, f"no process of {instance_id} is on record"
        assert record.process_id, f"the process of {instance_id} is not on record yet"
        return record.process_id

    async def until_up(self, instance_id: str) -> None:
        """Press a key until the guest says that it was pressed: one that is pressed while it boots is lost."""
        console = self.instance_folder(instance_id).console
        before = console.read_text().count(HERE)
        async with asyncio.timeout(self.patience_s):
            while console.read_text().count(HERE) == before:
                with contextlib.suppress(NotResponding):  # a machine that starts on a busy host may take its time
                    await self.press(instance_id, "here")
                await asyncio.sleep(_ASK_AGAIN_S)

    async def until_said(self, instance_id: str, text: str, times: int = 1) -> None:
        """Return when the guest has written a text on its serial console so many times."""
        console = self.instance_folder(instance_id).console
        async with asyncio.timeout(self.patience_s):
            while True:
                if console.read_text(errors="replace").count(text) >= times:
                    return
                await asyncio.sleep(_LOOK_AGAIN_S)

    async def incarnation(self, instance_id: str) -> object:
        record = self.instance_folder(instance_id).process_record()
        return None if record is None else (record.process_id, record.started_ticks)

    async def remains(self, instance_id: str) -> list[str]:
        folder = self.instance_folder(instance_id)
        process_id = find_in(folder.inside)
        found = [str(path) for path in folder.path.rglob("*")]
        return [*found, *([str(folder.path)] if folder.exists() else []), *([str(process_id)] if process_id else [])]

    async def guest_power_off(self, instance_id: str) -> None:
        await self.press(instance_id, "power_off")

    async def guest_reset(self, instance_id: str) -> None:
        await self.press(instance_id, "reset")

    async def guest_panic(self, instance_id: str) -> None:
        await self.press(instance_id, "panic")

    async def guest_ignores(self, instance_id: str) -> None:
        await self.press(instance_id, "ignore")
        await self.until_up(instance_id)

    async def guest_cooperates(self, instance_id: str) -> None:
        await self.press(instance_id, "cooperate")
        await self.until_up(instance_id)

    async def press(self, instance_id: str, act: str) -> None:
        """Press the key that stands for an act. While nobody watches, return when QEMU has told of it."""
        arguments = {"keys": [{"type": "qcode", "data": _KEYS[act]}], "hold-time": 1}
        guest = None if self._hypervisor is None else self._hypervisor.guest(instance_id)
        if guest is not None:
            await guest.execute(_Always(), "send-key", arguments)
            return
        async with self._unwatched(instance_id) as client, asyncio.timeout(self.patience_s):
            await client.execute("send-key", arguments)
            if act in _NEWS:
                while (await client.events.get())["event"] != _NEWS[act]:
                    pass

    @contextlib.asynccontextmanager
    async def _unwatched(self, instance_id: str) -> AsyncIterator[QMPClient]:
        client = QMPClient(instance_id)
        await client.connect(self.instance_folder(instance_id).connect_monitor())
        try:
            yield client
        finally:
            await client.disconnect()

    async def kill(self, instance_id: str) -> None:
        process = os.pidfd_open(self.process_id(instance_id))
        try:
            signal.pidfd_send_signal(process, signal.SIGKILL)
            waiting = select.poll()
            waiting.register(process, select.POLLIN)
            assert await asyncio.to_thread(waiting.poll, self.patience_s * 1000), "the process did not end"
        finally:
            os.close(process)

    async def freeze(self, instance_id: str) -> None:
        os.kill(self.process_id(instance_id), signal.SIGSTOP)

    async def thaw(self, instance_id: str) -> None:
        os.kill(self.process_id(instance_id), signal.SIGCONT)

    def end_everything(self) -> None:
        """End every process that is left, whatever went wrong."""
        for folder in (self.settings.folder / "vms").glob("*"):
            process_id = find_in(folder / "inside")
            if process_id is not None:
                os.kill(process_id, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process_id, 0)


class _Always:
    """A permit that is never lost."""

    fence = 0

    def check(self) -> None:
        return


async def opened(bench: QemuWorkbench, told: Told | None = None) -> QemuHypervisor:
    """An adapter in charge of the workbench, that tells `told`; nobody, if that is None."""
    hypervisor = bench.make()
    assert isinstance(hypervisor, QemuHypervisor)
    await hypervisor.open(told or Told())
    return hypervisor


@contextlib.contextmanager
def two_benches(folder: Path) -> Iterator[tuple[QemuWorkbench, QemuWorkbench]]:
    """Two hosts in a folder, `here` and `there`; nothing of them is left behind."""
    for name in ("here", "there"):
        (folder / name).mkdir(mode=0o711)
    pair = QemuWorkbench(folder / "here"), QemuWorkbench(folder / "there")
    try:
        yield pair
    finally:
        for bench in pair:
            bench.end_everything()
