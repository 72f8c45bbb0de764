"""Live migration, and evacuation: an instance comes to another host, as it runs or once its own host is lost.

Which host lets the guest run is what the record says. Until it names the other one, the guest there was never let run,
so that going on here is safe; from then on the guest here stands still for ever, unless it is found that the one there
ended before it was ever let run, and the record is changed back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import msgspec

from interlock.core.errors import Fenced, HypervisorError, NotResponding, NotThere, Refused
from interlock.core.operations import Lane
from interlock.core.records import Kept, Spec
from interlock.core.states import PowerState, VmState
from interlock.driver.operations.bringing import settle_resize
from interlock.driver.work import Done, Work
from interlock.ports import Hypervisor, Report
from interlock.ports.travelling import Arrival, Passage, Travelling


async def evacuate(work: Work) -> Done:
    """Make the instance anew on another host, and start it if it ran.

    A root disk in a shared folder is gone on with, and one that was on the lost host begins as its image again. From
    the moment that the record names the other host, whatever the lost one still has of its own is removed when it comes
    back.
    """
    target = str(work.request.parameters.get("host", work.hosts.own))
    if work.instance.host != target:
        await work.keep(Kept(host=target, spec=await _prepare(work, target), prior_spec=None))
    await work.hypervisor.define(work.permit, work.id, work.spec)
    await settle_resize(work)
    if work.instance.vm_state is VmState.STOPPED:
        return Done(power_state=PowerState.NONE)
    await work.hypervisor.power_on(work.permit, work.id, work.spec)
    return Done(power_state=PowerState.RUNNING)


async def _prepare(work: Work, target: str) -> Spec:
    """Make what the instance needs on the target; what it then is, maybe with another root disk."""
    spec, from_image = work.spec, bool(work.request.parameters.get("from_image"))
    if spec.has_root and spec.shared is None and not from_image:
        raise Refused(
            f"The root disk of {work.instance.name} was on the host {work.instance.host}.",
            remedy="Ask for it with from_image, which begins with its image again.",
        )
    again = spec.has_root and from_image
    fresh = msgspec.structs.replace(spec, root=spec.root + 1, root_is_whole=False) if again else spec
    hypervisor = work.hosts.of(target)
    try:
        # A guest that was on its way there is not the one that is lost.
        await hypervisor.undefine(work.permit, work.id)
        if again and spec.shared is not None:
            # One of that number may be left of a resize or rebuild that was lost with the host.
            await hypervisor.drop_root_disks(work.permit, work.id, spec, _known_roots(work))
        if not again:
            await require_root(work, hypervisor)
        await hypervisor.define(work.permit, work.id, fresh)
    except NotResponding:
        raise
    except HypervisorError:
        await hypervisor.undefine(work.permit, work.id)
        raise
    return fresh


def _known_roots(work: Work) -> frozenset[int]:
    return frozenset(spec.root for spec in (work.instance.spec, work.instance.prior_spec) if spec is not None)


async def require_root(work: Work, hypervisor: Hypervisor) -> None:
    """Raise `Refused` where a host lacks the instance's shared root disk, which would begin as its image there.

    One that never ran may have none yet, and has nothing to lose. To be called before the instance is defined on
    another host than its own.
    """
    spec = work.spec
    if spec.shared is not None and spec.has_root and work.instance.launched:
        # One that stands by itself is never made anew; this one is not made here either.
        await hypervisor.define(work.permit, work.id, msgspec.structs.replace(spec, root_is_whole=True))


# -------------------------------------------------------------------------------------------------- live migration


async def live_migrate(work: Work) -> Done:
    """Bring a guest to another host as it runs."""
    target = str(work.request.parameters["host"])
    if work.instance.host != target:
        require_other(work, target)
        try:
            await _bring(work, target)
        except NotResponding:
            raise
        except HypervisorError:
            await drop_there(work, target)
            await _travelling(work, work.instance.host).keep_guest(work.permit, work.id)
            raise
        await work.keep(Kept(host=target, left_host=work.instance.host))
    return await _arrive(work)


async def _bring(work: Work, target: str) -> None:
    """Send the guest; it stands still on both hosts when this returns."""
    here, there = _travelling(work, work.instance.host), _travelling(work, target)
    _require_layer(work, target)
    # Whatever an earlier attempt left: here a guest that may stand still, there one that never ran.
    await here.keep_guest(work.permit, work.id)
    machine = await here.machine_kind(work.id)
    with answering(target):
        await work.hosts.of(target).undefine(work.permit, work.id)
        await require_root(work, work.hosts.of(target))
        await work.hosts.of(target).define(work.permit, work.id, work.spec)
        passage = await there.receive_guest(work.permit, work.id, work.spec, machine)
    async with work.moving() as report:
        await _send(work, here, passage, report)
    with answering(target):
        await there.await_guest(work.id)


def _require_layer(work: Work, target: str) -> None:
    """Raise `Refused` for a root disk of which the other host cannot make the part that is not sent."""
    spec = work.spec
    if spec.has_root and spec.root_is_whole and spec.shared is None:
        raise Refused(
            f"The root disk of {work.instance.name} stands by itself on {work.instance.host}, and cannot be sent as "
            "its guest runs.",
            remedy=f"Migrate it cold: its guest is powered off, and started again on {target}.",
        )


def require_other(work: Work, target: str) -> None:
    """Raise `Refused` where both names are one host's: what is made there anew would be removed here first."""
    if work.hosts.of(target) is work.hypervisor:
        raise Refused(
            f"{work.instance.name} is on that host already, under its name from before: {work.instance.host}."
        )


@contextlib.contextmanager
def answering(target: str) -> Iterator[None]:
    """A target that gives no answer is a failure, not a riddle: the guest was never let run there, and goes on here."""
    try:
        yield
    except NotResponding as silent:
        raise Refused(f"The host {target} does not take the guest up: {silent.message}", remedy=silent.remedy) from None


async def _send(work: Work, here: Travelling, passage: Passage, report: Report) -> None:
    hurrying = asyncio.create_task(_hurry(work, here))
    try:
        await here.send_guest(work.permit, work.id, passage, report)
    finally:
        hurrying.cancel()
        await asyncio.wait({hurrying})


async def _hurry(work: Work, here: Travelling) -> None:
    """Have the guest stand still as soon as somebody wants the migration to end whatever that costs."""
    while True:
        work.news.clear()
        instance = await work.store.instance(work.id)
        serving = None if instance is None else instance.served(Lane.STATE)
        if serving is not None and serving.parameters.get("force_complete"):
            with contextlib.suppress(HypervisorError, Fenced):
                await here.hurry_guest(work.permit, work.id)
            return
        await work.news.wait()


async def _arrive(work: Work) -> Done:
    """Let the guest run where the record says that it is, and remove it where it was."""
    there, source = _travelling(work, work.instance.host), work.instance.left_host
    match await there.arrival(work.id):
        case Arrival.AWAITED:
            await there.take_guest(work.permit, work.id)
            if work.instance.vm_state is VmState.PAUSED:
                await work.hypervisor.pause(work.permit, work.id)
        case Arrival.LOST if source is not None:
            await _go_back(work, source)
        case _:
            pass
    if source is not None:
        # One that cannot be asked removes it when it comes back.
        with contextlib.suppress(NotResponding):
            await work.hosts.of(source).undefine(work.permit, work.id)
        await work.keep(Kept(left_host=None))
    power_state = PowerState.PAUSED if work.instance.vm_state is VmState.PAUSED else PowerState.RUNNING
    return Done(power_state=power_state)


async def _go_back(work: Work, source: str) -> None:
    """Go on where the guest was: the machine that was to take it up ended before it let it run. Raises `Refused`."""
    target = work.instance.host
    here = _travelling(work, source)
    if (await work.hosts.of(source).inspect(work.id)).power_state is PowerState.NONE:
        raise NotThere(f"The guest of {work.instance.name} ended on both hosts; its disk is on {target}.")
    await work.keep(Kept(host=source, left_host=None))
    await here.keep_guest(work.permit, work.id)
    raise Refused(f"The machine on {target} ended before the guest ran there; it goes on at {source}.")


async def drop_there(work: Work, target: str) -> None:
    """Remove what is left of the instance where it is not. A host that cannot be asked does so when it comes back."""
    with contextlib.suppress(HypervisorError):
        await work.hosts.of(target).undefine(work.permit, work.id)


async def undo_live_migrate(work: Work) -> None:
    """Let the guest go on where it is. One that has arrived already stays there."""
    await work.alive()  # the record as it is once everything that was asked of the store is done
    target = str(work.request.parameters["host"])
    if work.instance.host == target:
        await _arrive(work)
        raise Refused(f"It had come to {target} already, and runs there.")
    await drop_there(work, target)
    await _travelling(work, work.instance.host).keep_guest(work.permit, work.id)


def _travelling(work: Work, host: str) -> Travelling:
    hypervisor = work.hosts.of(host)
    if not isinstance(hypervisor, Travelling):
        raise Refused(f"The guests of the host {host} cannot go to another one as they run.")
    return hypervisor
