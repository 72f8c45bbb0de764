"""What the service and the state drivers need of the world: a store, a hypervisor, a clock.

Protocols only. Each has one conformance suite in `testing/`, which every adapter must pass, so that a sentence in a
docstring here is a test there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from interlock.core.policy_switches import PolicyBundle, PolicySwitch
from interlock.core.records import Change, Disk, Event, GuestEvent, Image, Instance, Request, Spec
from interlock.core.states import PowerState, VmState

AnswerT = TypeVar("AnswerT")

# ---------------------------------------------------------------------------------------------------------- clock


class Clock(Protocol):
    """Where time is read."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch, never less than an earlier answer, unmoved when the wall clock is set."""
        ...


# ----------------------------------------------------------------------------------------------------- hypervisor


class Permit(Protocol):
    """A worker's right to act on one instance, which can be lost at any moment."""

    def check(self) -> None:
        """Return if the worker may still act.

        Raises:
            Fenced: its request was superseded.
        """
        ...


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What a hypervisor holds of an instance, found by looking."""

    defined: bool
    """Whether it has anything at all of it: disks, a folder, a process."""
    power_state: PowerState
    disks: tuple[str, ...] = ()
    """Ids of the disks that the running guest has, `root` included; empty when no guest runs."""
    responsive: bool = True
    """False if something holds the guest but gave no answer in time; power_state is then the last known."""


class HypervisorEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that the hypervisor told of its own accord."""

    instance_id: str
    kind: GuestEvent
    during_watch: bool = True
    """False if it happened while nobody watched, and was kept."""


class Hypervisor(Protocol):
    """Holds guests. One object serves one host.

    Every method that changes something takes the worker's permit and checks it immediately before each effect, not
    only at the start. Every one converges: called again after a crash at any point, it completes what was begun, and
    where what it leads to holds already it does nothing. All raise `Refused`, `NotResponding` or `NotThere` with the
    meanings of the error tree, and `Fenced` when the permit is lost; a worker may be cancelled at any await.
    """

    async def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        """Take charge of the host's guests, and from now on tell `listener` (on the event loop) what they do.

        Guests that outlived an earlier process are found again, and what they did meanwhile is told with
        `during_watch=False` before this returns. An end that this object was asked for is not told.

        Raises:
            Unavailable: with the reason and the remedy, when guests cannot be held here.
        """
        ...

    async def close(self) -> None:
        """Let go of the guests without disturbing them."""
        ...

    async def known(self) -> frozenset[str]:
        """The ids of all instances of which anything is here, running or not."""
        ...

    async def inspect(self, instance_id: str) -> Observation:
        """Look at what is there. Never raises for an unknown or frozen instance: that is an answer."""
        ...

    async def define(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        """Make what the instance needs on this host (folder, root disk) without starting it."""
        ...

    async def undefine(self, permit: Permit, instance_id: str) -> None:
        """Remove everything of the instance; a running guest is ended first. Volumes' files are not touched."""
        ...

    async def power_on(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        """Start the guest with the disks that `spec` lists; returns when its processors run."""
        ...

    async def power_off(self, permit: Permit, instance_id: str) -> None:
        """Pull the plug: whatever holds the guest has ended when this returns, frozen or not."""
        ...

    async def press_power_button(self, permit: Permit, instance_id: str) -> None:
        """Ask the guest to power itself off. Returns at once; whether it does is told or can be seen."""
        ...

    async def wait_powered_off(self, instance_id: str) -> None:
        """Return as soon as no guest runs: it powered itself off, or what held it has ended. Changes nothing."""
        ...

    async def reset(self, permit: Permit, instance_id: str) -> None:
        """Reset the machine, as its reset button would; it runs afterwards also if it was powered off or crashed."""
        ...

    async def pause(self, permit: Permit, instance_id: str) -> None: ...

    async def unpause(self, permit: Permit, instance_id: str) -> None: ...

    async def attach_disk(self, permit: Permit, instance_id: str, disk: Disk) -> None:
        """Plug a disk into the running guest. Does nothing where it is plugged in already.

        Raises:
            NotThere: no guest runs.
        """
        ...

    async def detach_disk(self, permit: Permit, instance_id: str, disk_id: str) -> None:
        """Unplug a disk from the running guest; returns when the guest has let go of it.

        Raises:
            NotThere: no guest runs.
            NotResponding: the guest did not let go in time; the disk is still in use.
        """
        ...

    def console_path(self, instance_id: str) -> Path | None:
        """The file to which the guest's serial console is written, or None if there is none."""
        ...


# ---------------------------------------------------------------------------------------------------------- store


class Role(StrEnum):
    """What a caller may do. Each includes the one before.

    An admin administers the server: its images, and the tokens of every project. Instances, volumes and events are
    those of the token's own project, whatever its role.
    """

    READER = "reader"
    MEMBER = "member"
    ADMIN = "admin"


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A bearer token, without its secret: only the SHA-256 of that is kept."""

    id: str
    name: str
    role: Role
    project: str
    secret_sha256: str
    created_at_ms: int


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """A disk that lives on its own and can be attached to one instance at a time."""

    id: str
    name: str
    project: str
    path: str
    size_bytes: int
    attached_to: str | None = None
    created_at_ms: int


class IdempotencyKey(msgspec.Struct, frozen=True, kw_only=True):
    """A caller's promise that a submission with the same key is the same submission."""

    scope: str
    """Whose key it is: the token's id."""
    key: str
    fingerprint: str
    """A hash of what was asked, so that a key used for something else is noticed."""


class InstanceFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which instances a list shows; None means any. Deleted ones are shown only when asked for by state."""

    project: str | None = None
    vm_state: VmState | None = None
    task_state: str | None = None
    host: str | None = None
    tag: str | None = None
    name: str | None = None


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """One page of a list, and the cursor of the next one, or None at the end."""

    items: tuple[Any, ...]
    next_cursor: str | None = None


class Store(Protocol):
    """Keeps instances, requests, events, tokens, images, volumes and policies. It decides nothing.

    Writes are durable when they return (law 9). Whatever a `decide` raises is raised to the caller, and nothing of
    that decision is kept; other decisions that shared its transaction are not disturbed.
    """

    async def open(self) -> None:
        """Take the store for this process.

        Raises:
            StoreBusy, StoreCorrupt, StoreNewer, StoreError: each with its remedy.
        """
        ...

    async def close(self) -> None:
        """Keep what was admitted so far, then let go."""
        ...

    def now_ms(self) -> int:
        """The store's clock, on which every age is measured (law 6)."""
        ...

    async def settled(self) -> None:
        """Return when whatever was decided before this call is durable, or was refused."""
        ...

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> Callable[[], None]:
        """Call `listener` on the event loop with the events of each commit, in order; the answer ends that."""
        ...

    async def create(self, decide: Callable[[int], Change[AnswerT]], key: IdempotencyKey | None = None) -> AnswerT:
        """Keep a new instance. `decide` gets the time and may be called again.

        Raises:
            NameTaken: the project has an instance of that name that is not deleted.
            KeyReused: the key was used with another fingerprint.
        """
        ...

    async def change(
        self,
        instance_id: str,
        decide: Callable[[Instance, int], Change[AnswerT]],
        key: IdempotencyKey | None = None,
    ) -> AnswerT:
        """Read, decide and keep, as one step that nothing comes between. `decide` is pure and may be called again.

        With a key that was kept before, `decide` is not called and the answer kept with the key is returned (built
        again from its JSON as a `records.Disposition`). A refusal is not kept with its key: where a decision leaves the
        instance the same object and has no requests, asking again with the same key is judged anew.

        A change that leaves the instance the same object, with no requests and no events, writes nothing.

        Raises:
            NotFound: there is no such instance.
            KeyReused: the key was used with another fingerprint.
        """
        ...

    def fence(self, instance_id: str) -> int | None:
        """The instance's fence as last committed; None if there is no such instance. Costs no input or output."""
        ...

    async def instance(self, instance_id: str) -> Instance | None: ...

    async def instance_named(self, project: str, name: str) -> Instance | None:
        """The instance of that name in the project that is not deleted, or None."""
        ...

    async def instances(self, where: InstanceFilter, limit: int, cursor: str | None = None) -> Page:
        """Instances in the order created."""
        ...

    async def unsettled(self, host: str | None = None) -> tuple[Instance, ...]:
        """Every instance with something outstanding or held."""
        ...

    async def request(self, request_id: str) -> Request | None: ...

    async def requests(self, instance_id: str, limit: int, cursor: str | None = None) -> Page:
        """The instance's requests, newest first."""
        ...

    async def events(
        self, after: int, limit: int, instance_id: str | None = None, project: str | None = None
    ) -> tuple[Event, ...]:
        """Events in order, those with a greater sequence than `after`."""
        ...

    async def last_event(self) -> int:
        """The sequence of the newest event; 0 if there is none."""
        ...

    async def put_token(self, token: Token) -> None: ...
    async def delete_token(self, token_id: str) -> bool: ...
    async def tokens(self) -> tuple[Token, ...]: ...

    async def put_image(self, image: Image) -> None:
        """Keep an image. Raises `NameTaken`."""
        ...

    async def delete_image(self, image_id: str) -> bool: ...
    async def images(self) -> tuple[Image, ...]: ...

    async def put_volume(self, volume: Volume) -> None:
        """Keep a new volume. Raises `NameTaken` (per project)."""
        ...

    async def claim_volume(self, volume_id: str, instance_id: str) -> bool:
        """Attach the volume to the instance in the record; False if another instance has it."""
        ...

    async def release_volume(self, volume_id: str, instance_id: str) -> None:
        """Undo a claim of that instance; does nothing if it has none."""
        ...

    async def delete_volume(self, volume_id: str) -> bool:
        """Forget a volume that no instance has; False if it is unknown or claimed."""
        ...

    async def volume(self, volume_id: str) -> Volume | None: ...
    async def volumes(self, project: str | None = None) -> tuple[Volume, ...]: ...

    async def switch_policy(self, switch: PolicySwitch, bundle: PolicyBundle) -> int:
        """Keep that a policy has come into force, with its text; the number of the switch."""
        ...

    async def settle_switch(self, number: int, cancelled: int) -> None: ...

    async def policy_switches(self, limit: int, before: int | None = None) -> tuple[PolicySwitch, ...]:
        """Switches, newest first, those with a smaller number than `before`."""
        ...

    async def policy_bundle(self, number: int) -> PolicyBundle | None: ...


# ---------------------------------------------------------------------------------------------------------- files


class ImageFiles(Protocol):
    """The server's image folder. Nothing enters it that was not inspected."""

    async def bring_disk(self, image_id: str, name: str, source: Path, sha256: str | None = None) -> Image:
        """Inspect the disk image at `source` and take a copy into the folder (durable when this returns).

        Raises:
            Invalid: it is not what it claims, names a backing or data file, or its SHA-256 is not the one given.
            StoreFull: there is no room.
        """
        ...

    async def bring_kernel(self, image_id: str, name: str, kernel: Path, initrd: Path | None, cmdline: str) -> Image:
        """Take a copy of a kernel and its initial file system. Raises as `bring_disk`."""
        ...

    async def build_small(self, image_id: str, name: str) -> Image:
        """Build the small guest from the distribution's own packages.

        Raises:
            Unavailable: something that it is built from is not installed; the remedy names it.
        """
        ...

    async def remove(self, image: Image) -> None:
        """Remove the files of an image that no instance uses; does nothing where they are gone already."""
        ...


class VolumeFiles(Protocol):
    """The server's volume folder."""

    async def make(self, volume_id: str, size_bytes: int) -> Path:
        """Make an empty disk, durable when this returns. Raises `StoreFull`, `Unavailable`."""
        ...

    async def remove(self, volume_id: str) -> None:
        """Remove a volume's file; does nothing where it is gone already."""
        ...
