"""What the service and the state drivers need of the world: a store, a hypervisor, a clock, folders of files.

Protocols only, and the values that they speak in. Each protocol has one conformance suite in `testing/`, which every
adapter must pass, so that a sentence in a docstring here is a test there.
"""

from interlock.ports.clock import Clock
from interlock.ports.files import Dump, DumpFiles, ImageFiles, SharedRoots, SmallForm, VolumeFiles
from interlock.ports.hosts import Host, HostState, Limits, Link, RemoteHost
from interlock.ports.hypervisor import Hypervisor, HypervisorEvent, Observation, Permit, Report, Stream
from interlock.ports.passwords import Passwords
from interlock.ports.store import IdempotencyKey, InstanceFilter, Page, Role, Store, Token, Volume, every_instance

__all__ = [
    "Clock",
    "Dump",
    "DumpFiles",
    "Host",
    "HostState",
    "Hypervisor",
    "HypervisorEvent",
    "IdempotencyKey",
    "ImageFiles",
    "InstanceFilter",
    "Limits",
    "Link",
    "Observation",
    "Page",
    "Passwords",
    "Permit",
    "RemoteHost",
    "Report",
    "Role",
    "SharedRoots",
    "SmallForm",
    "Store",
    "Stream",
    "Token",
    "Volume",
    "VolumeFiles",
    "every_instance",
]
