"""Facts beyond an instance's record, which a shell gives with a submission for its preconditions."""

from __future__ import annotations

from typing import Final

import msgspec

from interlock.core.networks import Network
from interlock.core.specs import Image


class Facts(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Facts beyond the instance's record for the preconditions of a submission; an unknown fact refuses nothing."""

    targets: tuple[str, ...] | None = None
    """The hosts that are up and can access the instance's disks; None: unknown."""
    target_lacks_root: bool = False
    """Whether the target host does not have the shared folder with the instance's root disk."""
    sends_guests: bool | None = None
    """Whether its host supports live migration; None: unknown."""
    cannot_encrypt: bool = False
    """Whether live migration to the target host must be encrypted, and one of both hosts cannot do that."""
    target_lacks_volumes: bool = False
    """Whether the target host cannot access one of the instance's volumes."""
    target_lacks_network: str = ""
    """Why the target host cannot connect the instance to its networks; empty: it can, or there is no target."""
    network: Network | None = None
    """The network in the parameters."""
    host_lacks_network: str = ""
    """Why the instance's host cannot connect it to that network; empty: it can."""
    host_lacks: frozenset[str] = frozenset()
    """Those volumes of the parameters that the instance's host cannot access."""
    agent_answers: bool | None = None
    """Whether its guest agent responds; None: unknown."""
    claimed: frozenset[str] = frozenset()
    """Those volumes of the parameters that the instance has claimed."""
    volume_bytes: dict[str, int] = {}
    """The sizes of the volumes in the parameters."""
    volume_paths: dict[str, str] = {}
    """The paths of the volumes in the parameters, on the server."""
    image: Image | None = None
    """The image in the parameters."""
    names: dict[str, str] = {}
    """The names of the ids in the parameters."""


NO_FACTS: Final = Facts()
