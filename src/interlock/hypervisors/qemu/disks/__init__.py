"""Root disks and volumes: making, hotplug, mirroring, export."""
