"""What the system of a host refuses, the server's or an agent's, is told with its path, reason and remedy."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from in_process.three_hosts import Street
from interlock.core.errors import NoSpace
from interlock.core.operations import Operation
from interlock.core.records import Status
from interlock.hypervisors.remote.fence_table import FenceTable
from interlock.ports.system_errors import system_failure

O = Operation  # noqa: E741
REMEDIES = {
    errno.ENOSPC: "Free space",
    errno.EDQUOT: "quota",
    errno.EIO: "storage",
    errno.EROFS: "read-write",
    errno.EACCES: "user of the process",
    errno.EMFILE: "open files",
}


@pytest.mark.parametrize("host", ["north", "here"])
@pytest.mark.parametrize("number", REMEDIES)
async def test_a_request_fails_with_what_the_system_said(
    street: Street, host: str, number: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    vm = await street.create("web", host=host)
    await street.house.carry_out(vm, O.STOP)
    capfd.readouterr()

    async def refuse(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number), "/srv/vms/web/root.qcow2")

    holds = street.north.hypervisor if host == "north" else street.house.server.hypervisor
    monkeypatch.setattr(holds, "define", refuse)
    ended = await street.house.carry_out(vm, O.START)
    assert ended.status is Status.FAILED
    message = str(ended.message)
    assert os.strerror(number) in message
    assert "/srv/vms/web/root.qcow2" in message
    assert ("the host north" if host == "north" else "the server's host") in message
    assert REMEDIES[number] in message
    assert "Internal error" not in message
    assert "Traceback" not in "".join(capfd.readouterr())


def test_what_the_system_did_not_name_is_a_defect() -> None:
    assert system_failure(TimeoutError(), "here") is None
    failed = system_failure(OSError(errno.ENOSPC, "No space left on device"), "the host north")
    assert isinstance(failed, NoSpace)
    assert failed.message == "No space left on device on the host north."


def test_a_full_disk_keeps_no_worker_from_being_fenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest can be stopped and deleted there: what cannot be kept of a fence is known as long as the agent lives."""

    def refuse(*_arguments: object, **_more: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fences = FenceTable(tmp_path / "fences")
    fences.open()
    monkeypatch.setattr(Path, "write_text", refuse)
    fences.see("web", 7)
    assert fences.highest("web") == 7
