"""How operations and their parameters appear on the command line, as data."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Topic(StrEnum):
    """A heading in the help of `interlock vm`."""

    VMS = "VMs"
    POWER = "Power"
    ACCESS = "Access"
    DISKS = "Disks, sizes and networks"
    COPIES = "Snapshots, backups and shelving"
    RECOVERY = "Recovery"
    MIGRATION = "Migration"
    DELETION = "Deletion"


class Argument(msgspec.Struct, frozen=True):
    """A positional argument of the command."""

    metavar: str | None = None
    """Default: the parameter's name in capitals."""


class Option(msgspec.Struct, frozen=True):
    """An option of the command."""

    flag: str
    help: str | None = None
    """Default: the parameter's description."""
    default: str | None = None
    """The value sent without the option, for a parameter without a default."""
    unit: str | None = None
    """For a size: the parameter's unit, `MiB` or `GiB`. The option accepts others too."""
    prompt: str | None = None
    """For a secret: the option has no value, and prompts with this text."""
