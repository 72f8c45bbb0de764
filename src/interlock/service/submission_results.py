"""Results of submissions, stuck instances, and texts about hosts and guests in trouble."""

from __future__ import annotations

import msgspec

from interlock.core.evacuation import loses_root
from interlock.core.operations import Operation
from interlock.core.records import Disposition, Instance, Request
from interlock.core.states import GuestTrouble
from interlock.ports import HostCondition, HostState


class SubmissionResult(msgspec.Struct, frozen=True, kw_only=True):
    """The disposition of a submission, with what the caller needs to proceed."""

    disposition: Disposition
    instance: Instance
    allowed_instead: tuple[Operation, ...] = ()
    """For a denial: the operations that would be admitted now."""
    loses: tuple[str, ...] = ()
    """For an evacuation: the data lost with the host, as sentences for people."""
    waits_for_host: str | None = None
    """The instance's host, if the request waits because that host is not connected."""
    password: str | None = None
    """The generated password of a set_password; returned only once."""


class Stuck(msgspec.Struct, frozen=True, kw_only=True):
    """An instance that needs attention.

    Its operation made no progress for longer than a takeover threshold or will not end (`request.warning`), its guest
    is in trouble, or its host is lost or fenced.
    """

    instance: Instance
    host: HostCondition | None = None
    """Its host, if lost or fenced."""
    request: Request | None
    """The operation in progress, if any."""
    silent_since_ms: int
    allowed: tuple[Operation, ...]
    """The operations that would be admitted now."""
    takes_over: tuple[Operation, ...]
    """Those of them that would take over from the stuck operation."""


def host_trouble(host: HostCondition, instance: Instance) -> tuple[str, str]:
    """Return problem and remedy for a VM whose host is lost or fenced."""
    anew = loses_root(instance)
    evacuate = f"`interlock vm evacuate {instance.name} --host any" + " --from-image" * anew
    starts = "recreates it from its image" if anew else "starts it"
    lost = ", without the data on its root disk" * anew
    if host.state is HostState.FENCED:
        why = f"The host {host.name} is fenced: the VM does not run."
        return why, f"{evacuate}` {starts} on another host{lost}; you can also delete it, or reconnect {host.name}."
    until = "" if host.fenced_at_ms is None else " until its lease expires"
    why = f"The host {host.name} does not respond: the VM may be running there{until}."
    if host.fenced_at_ms is None:
        return why, f"Check that {host.name} is powered off, then `interlock host fence {host.name} --i-am-sure`."
    return why, f"{evacuate} --hold 10m` {starts} on another host{lost} once {host.name} is fenced."


class TroubleText(msgspec.Struct, frozen=True):
    """Problem and remedy for a guest in trouble."""

    why: str
    """The end of a sentence that begins with the VM's name."""
    remedy: str
    """`{name}` stands for the VM's name."""


TROUBLES: dict[GuestTrouble, TroubleText] = {
    GuestTrouble.NOT_RESPONDING: TroubleText(
        "does not respond: its QEMU process is stopped, or waits for storage that does not respond",
        "`interlock vm stop {name}` waits until the shutdown times out, then kills its process; "
        "`interlock vm reboot {name} --hard` kills it at once and starts it again.",
    ),
    GuestTrouble.NO_SPACE: TroubleText(
        "was halted: no space left for its disk writes",
        "Free space on the file system of its disks, and it resumes automatically; `interlock vm stop {name}` works "
        "too.",
    ),
    GuestTrouble.IO_ERROR: TroubleText(
        "was halted: an I/O error occurred on one of its disks",
        "Check the storage of its host; then `interlock vm reboot {name} --hard`, or `interlock vm stop {name}`.",
    ),
}


class TurnedAway(Exception):
    """Aborts a decision of the store and carries its result, which is not recorded."""

    def __init__(self, answer: SubmissionResult) -> None:
        super().__init__()
        self.answer = answer
