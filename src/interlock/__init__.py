"""Interlock keeps the state of virtual machines."""

__version__ = "0.1.0"
