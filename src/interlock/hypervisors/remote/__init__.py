"""The hypervisor of another host: its agent runs the guests, and the server calls it over one connection."""
