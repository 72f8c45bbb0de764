"""Real VMs: one unprivileged QEMU process each, driven over QMP, which outlive the server."""
