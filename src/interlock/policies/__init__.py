"""Policies as files, and the tools for them. What a policy means is in `core`."""
