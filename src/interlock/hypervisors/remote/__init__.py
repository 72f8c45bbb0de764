"""The hypervisor of another host: its agent runs the guests, and the server calls it over one connection."""

from interlock.hypervisors.remote.adapter import RemoteHypervisor
from interlock.hypervisors.remote.agent_service import AgentService

__all__ = ["AgentService", "RemoteHypervisor"]
