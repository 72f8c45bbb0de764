"""Shipped with Interlock: what adapters are checked with, and what measures and strains a whole server."""
