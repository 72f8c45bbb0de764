"""Real QEMU keeps every promise of the port."""

from __future__ import annotations

import shutil

import pytest

from conformance.hypervisor import CHECKS, Check, run
from conformance.qemu_workbench import QemuWorkbench

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]


def name_of(promise: Check) -> str:
    return promise.__name__


@pytest.mark.parametrize("promise", CHECKS, ids=name_of)
async def test_real_qemu(promise: Check, host: QemuWorkbench) -> None:
    await run(promise, host)
