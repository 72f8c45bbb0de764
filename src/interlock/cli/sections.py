"""A group of so many commands that its help lists them under headings."""

from __future__ import annotations

from typing import ClassVar, Final

import click

SECTIONS: Final[dict[str, tuple[str, ...]]] = {
    "VMs": ("create", "list", "show", "watch", "events", "label", "metadata", "protect", "unprotect", "lock", "unlock"),
    "On and off": ("start", "stop", "reboot", "pause", "unpause", "suspend", "resume"),
    "In and out": ("console", "ssh", "screenshot", "vnc", "set-password"),
    "Disks, sizes and networks": (
        "attach",
        "detach",
        "swap-volume",
        "attach-interface",
        "detach-interface",
        "resize",
        "confirm-resize",
        "revert-resize",
        "rebuild",
    ),
    "Copies, and putting aside": ("snapshot", "backup", "shelve", "unshelve", "offload"),
    "When something is wrong": ("rescue", "unrescue", "dump", "dumps", "reset-state"),
    "Other hosts": ("migrate", "evacuate"),
    "The end": ("delete", "soft-delete", "restore", "force-delete"),
}
"""The commands of `interlock vm`, those that are needed first before the others."""
_OTHERS: Final = "More"
_SENTENCE: Final = 100
"""How long a command's first sentence may be before it is cut; what does not fit into a line is broken, not cut."""


class Sectioned(click.Group):
    """Lists its commands by `SECTIONS`; one that is in none of them comes last."""

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
