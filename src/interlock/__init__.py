"""Interlock keeps the state of virtual machines."""

__version__ = "0.2.0"
