"""Live migration between hosts: source and target side.

The record says which host runs the guest. Until it names the target, the guest never ran there, so that resuming the
source is safe; from then on the source stays paused, unless the target ended before it ever ran the guest, and the
record is changed back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from interlock.core.durations import parse_duration
from interlock.core.errors import Fenced, GuestNotFound, HypervisorError, NotResponding, OperationRejected
from interlock.core.operations import Lane
from interlock.core.records import InstanceUpdate
from interlock.core.states import PowerState, VmState
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations.boot_steps import without_root
from interlock.ports import Hypervisor
from interlock.ports.migration import IncomingState, MigrationPort


async def require_root(work: OperationContext, hypervisor: Hypervisor) -> None:
    """Raise `OperationRejected` if a host lacks the instance's shared root disk, instead of creating it from the image.

    An instance that never ran may have none yet. Call it before the instance is defined on another host.
    """
    spec = work.spec
    if spec.shared is not None and spec.has_root and work.instance.launched:
        await hypervisor.define(work.permit, work.id, spec)


async def live_migrate(work: OperationContext) -> Done:
    """Live-migrate the instance to the target host."""
    target = str(work.request.parameters["host"])
    if work.instance.host != target:
        require_other(work, target)
        try:
            await _bring(work, target)
        except NotResponding:
            raise
        except HypervisorError:
            await drop_there(work, target)
            await _migration_port(work, work.instance.host).resume_source(work.permit, work.id)
            raise
        await work.keep(InstanceUpdate(host=target, left_host=work.instance.host))
    return await _arrive(work)


async def _bring(work: OperationContext, target: str) -> None:
    """Transfer the guest; it is paused on both hosts when this returns."""
    here, there = _migration_port(work, work.instance.host), _migration_port(work, target)
    # Clean up after an earlier attempt: a paused guest on the source, and one that never ran on the target.
    await here.resume_source(work.permit, work.id)
    machine = await here.machine_kind(work.id)
    names = work.hosts.certificate_names(work.instance.host, target)
    with answering(target):
        await work.hosts.of(target).undefine(work.permit, work.id)
        await require_root(work, work.hosts.of(target))
        spec = work.spec if work.spec.shared is not None else without_root(work.spec)
        await work.hosts.of(target).define(work.permit, work.id, spec)
        if names is None:
            endpoint = await there.receive_guest(work.permit, work.id, work.spec, machine)
        else:
            endpoint = await there.receive_guest_tls(work.permit, work.id, work.spec, machine, names[0])
    async with work.moving() as report:
        forcing = asyncio.create_task(_force_on_request(work, here))
        try:
            if names is None:
                await here.send_guest(work.permit, work.id, endpoint, _converge_ms(work), report)
            else:
                await here.send_guest_tls(work.permit, work.id, endpoint, names[1], _converge_ms(work), report)
        finally:
            forcing.cancel()
            await asyncio.wait({forcing})
    with answering(target):
        await there.await_guest(work.id)


def require_other(work: OperationContext, target: str) -> None:
    """Raise `OperationRejected` if source and target are the same host."""
    if work.hosts.of(target) is work.hypervisor:
        raise OperationRejected(
            f"{work.instance.name} already runs on that host, recorded under its former name {work.instance.host}."
        )


@contextlib.contextmanager
def answering(target: str) -> Iterator[None]:
    """Convert a timeout of the target to a failure: the guest never ran there, and continues on the source."""
    try:
        yield
    except NotResponding as silent:
        raise OperationRejected(
            f"Host {target} rejected the incoming migration: {silent.message}", remedy=silent.remedy
        ) from None


def _converge_ms(work: OperationContext) -> int:
    """Return the convergence timeout: the request's, else the configured one."""
    requested = parse_duration(str(work.request.parameters.get("converge_timeout", "")))
    return work.config.converge_timeout_ms if requested is None else requested


async def _force_on_request(work: OperationContext, here: MigrationPort) -> None:
    """Pause the guest as soon as force-complete is requested."""
    while True:
        work.wakeup.clear()
        instance = await work.store.instance(work.id)
        serving = None if instance is None else instance.served(Lane.STATE)
        if serving is not None and serving.parameters.get("force_complete"):
            with contextlib.suppress(HypervisorError, Fenced):
                await here.force_converge(work.permit, work.id)
            return
        await work.wakeup.wait()


async def _arrive(work: OperationContext) -> Done:
    """Run the guest on the host in the record, and clean up the source."""
    there, source = _migration_port(work, work.instance.host), work.instance.left_host
    match await there.arrival(work.id):
        case IncomingState.AWAITED:
            await there.complete_incoming(work.permit, work.id)
            if work.instance.vm_state is VmState.PAUSED:
                await work.hypervisor.pause(work.permit, work.id)
        case IncomingState.LOST:
            if source is not None:
                await _go_back(work, source)
        case IncomingState.NONE:
            pass
    if source is not None:
        # An unreachable host cleans up when it reconnects.
        with contextlib.suppress(NotResponding):
            await work.hosts.of(source).undefine(work.permit, work.id)
        await work.keep(InstanceUpdate(left_host=None))
    power_state = PowerState.PAUSED if work.instance.vm_state is VmState.PAUSED else PowerState.RUNNING
    return Done(power_state=power_state)


async def _go_back(work: OperationContext, source: str) -> None:
    """Resume the guest on the source: the target ended before running it. Raises `OperationRejected`."""
    target = work.instance.host
    here = _migration_port(work, source)
    if (await work.hosts.of(source).inspect(work.id)).power_state is PowerState.NONE:
        raise GuestNotFound(
            f"The guest of {work.instance.name} ended on both hosts; its root disk is on host {target}."
        )
    await work.keep(InstanceUpdate(host=source, left_host=None))
    await here.resume_source(work.permit, work.id)
    raise OperationRejected(f"QEMU on target host {target} ended before the guest ran there; it continues on {source}.")


async def drop_there(work: OperationContext, target: str) -> None:
    """Remove the instance from a host where it is not. An unreachable host cleans up when it reconnects."""
    with contextlib.suppress(HypervisorError):
        await work.hosts.of(target).undefine(work.permit, work.id)


async def undo_live_migrate(work: OperationContext) -> None:
    """Resume the guest on the source. One that has arrived already stays on the target."""
    await work.alive()  # read the record after all pending writes
    target = str(work.request.parameters["host"])
    if work.instance.host == target:
        await _arrive(work)
        raise OperationRejected(f"The VM was already migrated to host {target}, and runs there.")
    await drop_there(work, target)
    await _migration_port(work, work.instance.host).resume_source(work.permit, work.id)


def _migration_port(work: OperationContext, host: str) -> MigrationPort:
    hypervisor = work.hosts.of(host)
    if not isinstance(hypervisor, MigrationPort):
        raise OperationRejected(f"Host {host} does not support live migration.")
    return hypervisor
