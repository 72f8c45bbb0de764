"""A guest that panics as soon as it has booted, on a real VM: started again with growing pauses, then left in peace."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.nano_guest import Act, nano_guest
from interlock.config import Config
from interlock.core.operations import Operation
from interlock.core.records import Admitted, Instance, Status
from interlock.core.restart_policy import OnCrash, RestartPolicy
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.server import Server
from interlock.service.auth import Caller
from interlock.service.request_models import Labels, NewInstance, NewRequest

pytestmark = pytest.mark.qemu

ADMIN = Caller(token_id="t", name="ann", role=Role.ADMIN, project="default")
TWICE = RestartPolicy(on_crash=OnCrash.RESTART, restarts_max=2)


async def test_a_boot_loop_on_qemu_comes_to_an_end_and_the_owner_is_told() -> None:
    with tempfile.TemporaryDirectory(prefix="interlock-restarts-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # noqa: ASYNC240 - QEMU runs as another user if we are root
        config = Config(data_dir=str(folder / "data"))
        server = Server(config)
        await server.open()
        image = nano_guest(folder, Act.PANIC, after_ms=200)
        await server.store.images.put(image)
        wish = NewInstance(name="loop", image=image.name, memory_mib=64, restart=TWICE)
        vm = (await server.instances.create(ADMIN, wish)).instance.id
        # The second restart is left to another server.
        await _until(server, vm, restarts=1)
        await server.close()
        server = Server(config)
        await server.open()
        try:
            one = await _until(server, vm, gave_up=True)
            assert one.vm_state is VmState.ERROR
            assert one.error == ("The guest crashed. It was restarted 2 times within 600 s; no more restarts.")
            page = await server.store.requests(vm, 100)
            mine = sorted(
                (request for request in page.items if request.requested_by == "interlock"),
                key=lambda request: request.admitted_at_ms,
            )
            assert [request.status for request in mine] == [Status.SUCCEEDED, Status.SUCCEEDED]
            events = await server.store.events(0, 1000, instance_id=vm)
            due = [event.data["at_ms"] for event in events if event.kind == "instance.restart_due"]
            assert all(request.admitted_at_ms >= at_ms for request, at_ms in zip(mine, due, strict=True))
            crashes = [event.at_ms for event in events if event.kind == "guest.crashed"]
            assert len(crashes) == 3
            pauses = [after - before for before, after in pairwise(crashes)]
            assert pauses[0] >= 1_000
            assert pauses[1] >= 2_000
            await server.instances.relabel(ADMIN, vm, Labels(restart=RestartPolicy()))
        finally:
            await _remove(server, vm)
            await server.close()


async def _until(server: Server, vm: str, *, restarts: int = 0, gave_up: bool = False) -> Instance:
    async def so() -> Instance | None:
        instance = await server.store.instance(vm)
        assert instance is not None
        count = 0 if instance.restarts is None else instance.restarts.count
        done = "no more restarts" in (instance.error or "") if gave_up else count >= restarts
        return instance if done else None

    found = await server.instances.watch.until(vm, so, 60_000)
    assert found is not None, await server.store.instance(vm)
    return found


async def _remove(server: Server, vm: str) -> None:
    answer = await server.instances.submit(ADMIN, vm, NewRequest(operation=Operation.DELETE))
    assert isinstance(answer.disposition, Admitted)
    await server.instances.request(ADMIN, answer.disposition.request.id, 60_000)
