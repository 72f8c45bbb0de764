"""A command group whose help lists its commands under headings."""

from __future__ import annotations

from typing import ClassVar, Final

import click

from interlock.core.command_forms import Topic
from interlock.core.operations import CATALOGUE

_OWN: Final[dict[Topic, tuple[str, ...]]] = {
    Topic.VMS: ("create", "list", "show", "watch", "events", "label", "metadata", "protect", "unprotect"),
    Topic.POWER: (),
    Topic.ACCESS: ("console", "ssh", "screenshot", "vnc"),
    Topic.DISKS: (),
    Topic.COPIES: ("clone",),
    Topic.RECOVERY: ("dump", "dumps"),
    Topic.MIGRATION: ("migrate", "evacuate"),
    Topic.DELETION: (),
}
"""The commands that are written by hand, the most used first."""
SECTIONS: Final[dict[str, tuple[str, ...]]] = {
    topic.value: (*own, *(one.command for one in CATALOGUE.values() if one.topic is topic and one.command is not None))
    for topic, own in _OWN.items()
}
"""The commands of `interlock vm` by heading; those made from the catalogue come last, in its order."""
_OTHERS: Final = "More"
_SENTENCE: Final = 100
"""Maximum length of a command's first sentence; lines are wrapped, not cut."""


class Sectioned(click.Group):
    """Lists its commands by `SECTIONS`; others come last."""

    sections: ClassVar = SECTIONS

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as click calls it
        named = [name for names in self.sections.values() for name in names]
        return [*(name for name in named if name in self.commands), *(set(self.commands) - set(named))]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        listed = [name for name in self.list_commands(ctx) if not self.commands[name].hidden]
        width = max(map(len, listed), default=0)
        for heading, names in {**self.sections, _OTHERS: tuple(listed)}.items():
            here = [name for name in names if name in listed]
            listed = [name for name in listed if name not in here]
            if here:
                rows = [(f"{name:<{width}}", self.commands[name].get_short_help_str(_SENTENCE)) for name in here]
                with formatter.section(heading):
                    formatter.write_dl(rows)
