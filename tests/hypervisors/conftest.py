"""A host with real QEMU, and an adapter in charge of it; a file that needs another kind brings fixtures of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench, opened
from interlock.hypervisors.qemu.adapter import QemuHypervisor


@pytest.fixture
def host(tmp_path: Path) -> Iterator[QemuWorkbench]:
    host = QemuWorkbench(tmp_path)
    yield host
    host.end_everything()


@pytest.fixture
async def hypervisor(host: QemuWorkbench) -> AsyncIterator[QemuHypervisor]:
    hypervisor = await opened(host)
    yield hypervisor
    for instance_id in await hypervisor.known():
        await hypervisor.undefine(GivenPermit(), instance_id)
    await hypervisor.close()
