"""The hypervisor of another host: its agent holds the guests, and the server speaks to it over one connection."""

from interlock.hypervisors.remote.adapter import RemoteHypervisor
from interlock.hypervisors.remote.serving import HostService

__all__ = ["HostService", "RemoteHypervisor"]
