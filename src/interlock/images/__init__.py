"""Disk images, volumes and dumps as files: inspection, conversion, download, cloud-init data, atomic writes."""
