"""The ports: protocols of the store, the hypervisor, the clock, hosts and files, and their value types.

Every adapter must pass the conformance suite of its protocol in `tests/conformance/`, which tests these docstrings.
"""

from interlock.ports.clock import Clock
from interlock.ports.files import Dump, DumpFiles, ImageDownloads, ImageFiles, SharedRoots, SmallForm, VolumeFiles
from interlock.ports.hosts import (
    Drain,
    Host,
    HostCondition,
    HostEvent,
    HostIdentity,
    HostState,
    Limits,
    Link,
    RemoteHost,
)
from interlock.ports.hypervisor import (
    GuestInterface,
    Hypervisor,
    HypervisorEvent,
    Observation,
    Permit,
    Report,
    Stream,
    TransferReport,
)
from interlock.ports.passwords import Passwords
from interlock.ports.projects import Project
from interlock.ports.store import (
    IdempotencyKey,
    InstanceFilter,
    Jump,
    Page,
    Store,
    Tally,
    Token,
    Volume,
    counts_around,
    every_instance,
)

__all__ = [
    "Clock",
    "Drain",
    "Dump",
    "DumpFiles",
    "GuestInterface",
    "Host",
    "HostCondition",
    "HostEvent",
    "HostIdentity",
    "HostState",
    "Hypervisor",
    "HypervisorEvent",
    "IdempotencyKey",
    "ImageDownloads",
    "ImageFiles",
    "InstanceFilter",
    "Jump",
    "Limits",
    "Link",
    "Observation",
    "Page",
    "Passwords",
    "Permit",
    "Project",
    "RemoteHost",
    "Report",
    "SharedRoots",
    "SmallForm",
    "Store",
    "Stream",
    "Tally",
    "Token",
    "TransferReport",
    "Volume",
    "VolumeFiles",
    "counts_around",
    "every_instance",
]
