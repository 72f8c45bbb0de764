"""What keeps instances, requests, events, tokens, images, volumes, policies and hosts, and what callers of it name.

Its conformance suite is `testing/check_store/`: a sentence in a docstring here is a test there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from enum import StrEnum
from typing import Any, Protocol, TypeVar

import msgspec

from interlock.core.policy_switches import PolicyBundle, PolicySwitch
from interlock.core.records import Change, Event, Image, Instance, Request
from interlock.core.states import VmState
from interlock.ports.hosts import Host

AnswerT = TypeVar("AnswerT")


class Role(StrEnum):
    """What a caller may do. Each but `agent` includes the one before.

    An admin administers the server: its images, and the tokens of every project. Instances, volumes and events are
    those of the token's own project, whatever its role. An agent may do nothing but speak for a host.
    """

    READER = "reader"
    MEMBER = "member"
    ADMIN = "admin"
    AGENT = "agent"


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
    """Keeps instances, requests, events, tokens, images, volumes, policies and hosts. It decides nothing.

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
        """Keep an image. Raises `NameTaken` (per project; those of all projects are one more)."""
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

    async def put_host(self, host: Host) -> None:
        """Keep a host, in the place of what was kept of one with that name."""
        ...

    async def delete_host(self, name: str) -> bool: ...
    async def hosts(self) -> tuple[Host, ...]:
        """Hosts in the order of their names."""
        ...


_PAGE = 500


async def every_instance(store: Store, where: InstanceFilter | None = None) -> AsyncIterator[Instance]:
    """All instances that `where` shows, of every project where it names none; read page by page."""
    cursor: str | None = None
    while True:
        page = await store.instances(where or InstanceFilter(), _PAGE, cursor)
        for instance in page.items:
            yield instance
        cursor = page.next_cursor
        if cursor is None:
            return
