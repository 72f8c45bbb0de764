"""`interlock vm`: create, list, show and label. The commands that submit operations are in `operations`."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import click

from interlock.api.schemas.inventory import VolumeList
from interlock.api.schemas.networks import AddressList, Interface
from interlock.api.schemas.responses import Created, Instance, InstancePage
from interlock.cli.client.paths import IMAGES, INSTANCES, VOLUMES, path_of
from interlock.cli.commands.hosts import host_text
from interlock.cli.commands.submission import describe, post, wait_for_end, wait_option
from interlock.cli.commands.vm_table import (
    ColumnNames,
    SortKey,
    forwards_text,
    next_steps,
    power_text,
    print_table,
    size_text,
    sort,
    state_text,
)
from interlock.cli.completion import OperationName, completer, vm_argument
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import Failure
from interlock.cli.options.new_vm import (
    apart_option,
    evacuate_option,
    network_option,
    restart_option,
    restart_text,
    seed_fields,
    seed_options,
)
from interlock.cli.options.quantities import Size
from interlock.cli.output.formatting import STATE_COLOURS, age, clock
from interlock.cli.output.grouped_help import Sectioned
from interlock.core.records import Status
from interlock.core.states import PowerState
from interlock.service.request_models import NewForward, NewInstance

_LISTS: Final = {"tags": "no_tags", "blocked_operations": "no_protect", "apart_from": "not_apart"}
"""The lists that `label` replaces, and the options that empty them."""
_COLONS_MAX = 2
"""Of a forward."""


@click.group("vm", cls=Sectioned)
def vm_commands() -> None:
    """Virtual machines, and the operations on them."""


class ForwardPair(click.ParamType[Any]):
    """A pair of ports, [ADDRESS:]HOST:GUEST[/udp]."""

    name = "host:guest"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        pair, _, protocol = str(value).partition("/")
        *address, host, guest = ("", "", *pair.split(":"))[-3:] if pair.count(":") < _COLONS_MAX + 1 else ("", "", "")
        if not (host.isdecimal() and guest.isdecimal() and protocol in {"", "tcp", "udp"}):
            self.fail(
                f"Invalid forward {value!r}: expected ports such as 8080:80, 0.0.0.0:8080:80 or 5353:53/udp.",
                param,
                ctx,
            )
        more: dict[str, Any] = {"host_address": address[0]} if address[0] else {}
        if protocol == "udp":
            more["protocol"] = protocol
        return NewForward(host_port=int(host), guest_port=int(guest), **more)


@vm_commands.command()
@click.argument("name")
@click.option("--image", required=True, shell_complete=completer(IMAGES), help="Image, a name or an id.")
@click.option("--vcpus", type=click.IntRange(min=1), default=1, show_default=True, help="Number of vCPUs.")
@click.option(
    "--memory", "memory_mib", type=Size("MiB", 64), default="128", show_default=True,
    help="Memory, such as 512 (MiB) or 2GiB.",
)  # fmt: skip
@click.option(
    "--root-size",
    "root_gib",
    type=Size("GiB", 0),
    default="0",
    help="Root disk, such as 20 (GiB) or 1TiB. Default: the image's.",
)
@network_option
@click.option(
    "--forward",
    "forwards",
    multiple=True,
    type=ForwardPair(),
    metavar="[ADDRESS:]HOST:GUEST[/udp]",
    help="Forward a port of the host to the guest: of its loopback, unless ADDRESS is given (0.0.0.0: all). May be "
    "repeated.",
)
@click.option("--tag", "tags", multiple=True, help="Tag. May be repeated.")
@click.option(
    "--protect", "blocked_operations", multiple=True, type=OperationName(),
    help="Block this operation. May be repeated.",
)  # fmt: skip
@restart_option
@evacuate_option
@apart_option
@seed_options
@click.option("--host", help="Host, or `any` for one with free capacity. Default: the server's own.")
@click.option("--no-start", is_flag=True, help="Do not boot it; `vm start` builds and boots it.")
@wait_option
def create(invocation: Invocation, /, *, no_start: bool, wait: bool, **fields: Any) -> None:
    """Create the VM NAME from an image, and boot it."""
    create_vm(invocation, NewInstance(start=not no_start, **seed_fields(fields)), wait=wait)


def create_vm(invocation: Invocation, new: NewInstance, *, wait: bool) -> None:
    """Create a VM, print the result, and wait for its end if `wait`. Raises `Failure`."""
    reply = post(invocation, INSTANCES, new, new.name)
    created = reply.decode(Created)
    for warning in created.warnings:
        invocation.echo(f"Warning: {warning}", error=True)
    if wait and created.request is not None:
        wait_for_end(invocation, created.request, new.name)
    elif not invocation.print_json(reply):
        if created.request is None:
            invocation.echo(f"Created: {new.name}; `interlock vm start {new.name}` builds and boots it")
        else:
            done = click.style("Admitted", fg="green", bold=True)
            invocation.echo(f"{done}: create of {new.name}, request {created.request.id}")


@vm_commands.command("list")
@click.option("--state", help="Only VMs in this vm_state, such as `active`; `deleted` lists deleted VMs.")
@click.option("--task", help="Only VMs in this task_state, such as `rebooting`.")
@click.option("--host", help="Only VMs on this host.")
@click.option("--tag", help="Only VMs with this tag.")
@click.option("--name", help="Only the VM with this name.")
@click.option("--sort", "by", type=SortKey(), help="Sort by a column, such as `host`; `-changed`: in reverse.")
@click.option("--columns", type=ColumnNames(), help="Columns, such as name,size,id. Default: as many as fit.")
@click.option("--all-projects", is_flag=True, help="VMs of all projects. For admins.")
@with_json
def list_(
    invocation: Invocation,
    /,
    *,
    by: str | None,
    columns: tuple[str, ...] | None,
    all_projects: bool,
    **where: str | None,
) -> None:
    """List the project's VMs, oldest first."""
    query = {{"state": "vm_state", "task": "task_state"}.get(key, key): value for key, value in where.items()}
    if all_projects:
        query["all_projects"] = "true"
    pages = invocation.client.pages(INSTANCES, query)
    if invocation.json:
        invocation.emit({"items": [one for page in pages for one in page.document()["items"]]})
    elif rows := [one for page in pages for one in page.decode(InstancePage).items]:
        print_table(invocation, sort(rows, by), columns, all_projects=all_projects)
    else:
        invocation.echo("No VMs. `interlock vm create NAME --image IMAGE` creates one.", error=True)


@vm_commands.command()
@vm_argument
@with_json
def show(invocation: Invocation, *, vm: str) -> None:
    """Show a VM and its outstanding requests."""
    reply = invocation.client.get(path_of(INSTANCES, vm))
    if not invocation.print_json(reply):
        one = reply.decode(Instance)
        print_vm(invocation, one, host_text(invocation.client, one.host), reported_text(invocation, one))


@vm_commands.command()
@vm_argument
@click.option("--tag", "tags", multiple=True, help="New tags. May be repeated.")
@click.option("--no-tags", is_flag=True, help="Remove all tags.")
@click.option(
    "--protect", "blocked_operations", multiple=True, type=OperationName(),
    help="New blocked operations. May be repeated.",
)  # fmt: skip
@click.option("--no-protect", is_flag=True, help="Remove all protection.")
@restart_option
@evacuate_option
@apart_option
@click.option("--not-apart", is_flag=True, help="Remove it from all anti-affinity groups.")
@with_json
def label(invocation: Invocation, /, *, vm: str, **given: Any) -> None:
    """Change a VM's tags, protection, groups, restart or evacuation policy."""
    if any(given[field] and given[none] for field, none in _LISTS.items()):
        raise click.UsageError("An option and its --no- form are mutually exclusive.")
    body = {field: given[field] for field in ("restart", "evacuate") if given[field] is not None}
    body |= {field: given[field] for field, none in _LISTS.items() if given[field] or given[none]}
    if not body:
        raise click.UsageError(
            "Nothing to change: use --tag, --no-tags, --protect, --no-protect, --restart, --evacuate, --apart-from or "
            "--not-apart."
        )
    reply = invocation.client.patch(path_of(INSTANCES, vm), body)
    if not invocation.print_json(reply):
        print_vm(invocation, reply.decode(Instance))


def volumes_text(invocation: Invocation, one: Instance) -> str:
    """Return the VM's volumes by name and id."""
    if not one.volumes:
        return ""
    names: dict[str, str] = {}
    with contextlib.suppress(Failure):
        names = {volume.id: volume.name for volume in invocation.client.get(VOLUMES).decode(VolumeList).items}
    return ", ".join(f"{names[volume]} [{volume}]" if volume in names else volume for volume in one.volumes)


def interface_text(one: Interface) -> str:
    """Return the network, the leased addresses and the MAC address of an interface."""
    groups = f"groups {' and '.join(one.security_groups)}" if one.security_groups else ""
    parts = (one.network or "", ", ".join(one.addresses), one.mac, groups)
    limits = (("in", one.inbound_kbit), ("out", one.outbound_kbit))
    allowed = f"allows {' and '.join(one.allow)}" if one.allow else ""
    rates = (f"{way} {kbit} kbit/s" for way, kbit in limits if kbit is not None)
    return ", ".join(filter(None, (*parts, *rates, allowed)))


def reported_text(invocation: Invocation, one: Instance) -> str | None:
    """Return what the guest of a VM with a network says about its addresses."""
    if one.primary is None or one.power_state is not PowerState.RUNNING:
        return None
    with contextlib.suppress(Failure):
        found = invocation.client.get(path_of(INSTANCES, one.id, "addresses")).decode(AddressList)
        reported = (f"{', '.join(each.reported)} [{each.id}]" for each in found.items if each.reported)
        return found.detail or "; ".join(reported) or "no addresses"
    return None


def evacuation_text(one: Instance, now: float | None) -> str | None:
    """Return the source host, time and losses of the last evacuation."""
    if one.evacuated is None:
        return None
    text = f"from {one.evacuated.from_host}, {clock(one.evacuated.at, now)}. {' '.join(one.evacuated.lost)}"
    return text.strip()


def print_vm(invocation: Invocation, one: Instance, host: str | None = None, reported: str | None = None) -> None:
    """Print a VM, one field per line, then its outstanding requests in the order of execution.

    `host` is the text for its host; default: the name. `reported` has the addresses that its guest reports.
    """
    now = invocation.client.now
    facts = {
        "Name": one.name,
        "Id": one.id,
        "State": click.style(one.vm_state.value, fg=STATE_COLOURS.get(one.vm_state.value)),
        "Earlier state": state_text(one),
        "Task": one.task_state,
        "Power": power_text(one),
        "Trouble since": one.guest_trouble_since_at and clock(one.guest_trouble_since_at, now),
        "Error": one.error or None,
        "Next": next_steps(one, now),
        "Host": host or one.host,
        "Evacuated": evacuation_text(one, now),
        "Project": one.project,
        "Image": one.image.name if one.image is not None else None,
        "Size": size_text(one),
        "Forwards": forwards_text(one),
        "Size before": None if one.prior_size is None else size_text(one.prior_size),
        "Shelved as": None if one.shelved_image is None else f"private image {one.shelved_image.id}",
        "Cloud-init": "yes" if one.seeded else None,
        "Root disk": "on shared storage" if one.root_shared else None,
        "Volumes": volumes_text(invocation, one),
        "Network": None if one.primary is None else interface_text(one.primary),
        "Interfaces": "; ".join(f"{interface_text(plugged)} [{plugged.id}]" for plugged in one.interfaces),
        "Guest reports": reported,
        "Detaching": one.detaching and f"{', '.join(one.detaching)}, once the guest releases it, is reset or ends",
        "Metadata": ", ".join(f"{key}={value}" for key, value in sorted(one.metadata.items())),
        "Tags": ", ".join(one.tags),
        "Locked by": one.locked_by and f"{one.locked_by} ({one.lock_role})",
        "Restart": restart_text(one.restart, one.restarts),
        "Evacuate": one.evacuate and one.evacuate.value,
        "Anti-affinity": ", ".join(one.apart_from),
        "Protected from": ", ".join(one.blocked_operations),
        "Created": clock(one.created_at, now),
        "Last change": f"{clock(one.updated_at, now)} ({age(one.updated_at, now)} ago)",
        "Generation": str(one.generation),
    }
    invocation.print_facts(facts, 16)
    for request in (*one.outstanding, *one.held):
        title = "Held:" if request.status is Status.HELD else "Outstanding:"
        invocation.echo(f"{title:<16}{describe(request, one.name)} [{request.id}, {request.requested_by}]")
