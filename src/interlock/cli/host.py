"""`interlock host`: what the server's host has, and what is left of it."""

from __future__ import annotations

import click

from interlock.api.host_schemas import HostStands
from interlock.cli.invocation import Invocation, json_option, needs_invocation
from interlock.cli.naming import completer
from interlock.cli.other_hosts import HOSTS, say_room, show_other


@click.group("host")
def host_commands() -> None:
    """The hosts that VMs run on."""


@host_commands.command("show")
@click.argument("name", required=False, shell_complete=completer(HOSTS))
@json_option
@needs_invocation
def show(invocation: Invocation, *, name: str | None) -> None:
    """Show what a host has, what is promised to VMs and volumes, and what is free.

    Without NAME it is the host on which the server runs; of another one, also
    how it is connected.
    """
    if name is not None:
        show_other(invocation, name)
        return
    reply = invocation.client.get("/v1/host")
    if invocation.answer(reply):
        return
    stands = reply.decode(HostStands)
    held = stands.hypervisor if stands.accelerator is None else f"{stands.hypervisor} ({stands.accelerator})"
    invocation.say(f"{stands.name}: {stands.guests} VMs, held by {held}")
    say_room(invocation, stands)
