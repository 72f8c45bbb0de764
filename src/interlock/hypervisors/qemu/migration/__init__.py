"""Live migration between hosts: source and target side."""
