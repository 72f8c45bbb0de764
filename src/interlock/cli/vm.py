"""`interlock vm`: create, list, show and label. The operations that can be asked for are in `operations`."""

from __future__ import annotations

from typing import Any, Unpack

import click

from interlock.api.schemas import Created, Instance, InstancePage, NewForward, NewInstance
from interlock.cli.failures import Failure
from interlock.cli.invocation import Cell, Invocation, json_option, needs_invocation
from interlock.cli.naming import IMAGES, INSTANCES, OperationName, completer, path_of, suggesting, vm_argument
from interlock.cli.next_steps import next_steps, size_text, state_text
from interlock.cli.other_hosts import host_text
from interlock.cli.refusals import explain_failure
from interlock.cli.restart_option import WORDS, restart_option, spoken_policy
from interlock.cli.sections import Sectioned
from interlock.cli.seed_options import SeedOptions, seed_options
from interlock.cli.submitting import fresh_key, wait_option
from interlock.cli.waiting import describe, wait_for_end
from interlock.cli.wording import STATE_COLOURS, age, clock, printable, spoken
from interlock.core.operations import Operation
from interlock.core.records import Status
from interlock.core.states import NO_TASK

_PAGE = 500


@click.group("vm", cls=Sectioned)
def vm_commands() -> None:
    """Virtual machines, and the operations on them."""


class ForwardPair(click.ParamType[Any]):
    """A pair of TCP ports, HOST:GUEST."""

    name = "host:guest"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        host, colon, guest = str(value).partition(":")
        if not (colon and host.isdecimal() and guest.isdecimal()):
            self.fail(f"{value!r} is no pair of ports; write HOST:GUEST, as in 8080:80.", param, ctx)
        return NewForward(host_port=int(host), guest_port=int(guest))


@vm_commands.command()
@click.argument("name")
@click.option("--image", required=True, shell_complete=completer(IMAGES), help="What it boots: a name or an id.")
@click.option("--vcpus", type=click.IntRange(min=1), default=1, show_default=True, help="Virtual processors.")
@click.option(
    "--memory", type=click.IntRange(min=64), default=128, show_default=True, metavar="MIB", help="Memory in MiB."
)
@click.option(
    "--root-size",
    type=click.IntRange(min=0),
    default=0,
    metavar="GIB",
    help="Root disk in GiB; 0 (default): the image's.",
)
@click.option(
    "--forward", "forwards", multiple=True, type=ForwardPair(), help="Reach a guest's TCP port on the host's loopback."
)
@click.option("--tag", "tags", multiple=True, help="A label. May be repeated.")
@click.option("--protect", multiple=True, type=OperationName(), help="Refuse this operation whatever the policy says.")
@restart_option
@seed_options
@click.option("--host", help="On which host; `any` for one with room. Default: the server's own.")
@click.option("--no-start", is_flag=True, help="Only record it; `vm start` makes and boots it.")
@wait_option
@needs_invocation
def create(
    invocation: Invocation,
    *,
    name: str,
    image: str,
    vcpus: int,
    memory: int,
    root_size: int,
    forwards: tuple[NewForward, ...],
    tags: tuple[str, ...],
    protect: tuple[Operation, ...],
    restart: str | None,
    host: str | None,
    no_start: bool,
    wait: bool,
    **seed: Unpack[SeedOptions],
) -> None:
    """Make a VM called NAME from an image, and boot it."""
    wish = NewInstance(
        name=name,
        image=image,
        vcpus=vcpus,
        memory_mib=memory,
        root_gib=root_size,
        forwards=forwards,
        tags=tags,
        blocked_operations=protect,
        restart=None if restart is None else WORDS[restart],
        host=host,
        start=not no_start,
        hostname=seed["hostname"],
        ssh_keys=seed["ssh_keys"],
        user_data=seed["user_data"],
        network_config=seed["network_config"],
    )
    create_vm(invocation, wish, wait=wait)


def create_vm(invocation: Invocation, wish: NewInstance, *, wait: bool) -> None:
    """Create a VM, print what became of it, and follow it to its end if `wait`. Raises `Failure`."""
    client = invocation.client
    try:
        with suggesting(client, IMAGES, wish.image):
            reply = client.post(INSTANCES, wish, fresh_key())
    except Failure as failure:
        explain_failure(failure, wish.name, client.now)
        raise
    made = reply.decode(Created)
    if wait and made.request is not None:
        wait_for_end(invocation, made.request, wish.name)
    elif not invocation.answer(reply):
        if made.request is None:
            invocation.say(f"Recorded: {wish.name}; `interlock vm start {wish.name}` makes and boots it")
        else:
            done = click.style("Admitted", fg="green", bold=True)
            invocation.say(f"{done}: create of {wish.name}, request {made.request.id}")


@vm_commands.command("list")
@click.option("--state", help="Only those in this vm_state, such as `active`; `deleted` shows deleted ones.")
@click.option("--task", help="Only those in this task_state, such as `rebooting`.")
@click.option("--host", help="Only those on this host.")
@click.option("--tag", help="Only those with this tag.")
@click.option("--name", help="Only the one of this name.")
@json_option
@needs_invocation
def list_(invocation: Invocation, /, **where: str | None) -> None:
    """List the project's VMs, oldest first."""
    query = {{"state": "vm_state", "task": "task_state"}.get(key, key): value for key, value in where.items()}
    rows: list[Instance] = []
    documents: list[Any] = []
    cursor: str | None = None
    while True:
        reply = invocation.client.get(INSTANCES, {**query, "limit": _PAGE, "cursor": cursor})
        if invocation.json:
            page = reply.decode(dict[str, Any])
            documents += page["items"]
            cursor = page["next_cursor"]
        else:
            typed = reply.decode(InstancePage)
            rows += typed.items
            cursor = typed.next_cursor
        if cursor is None:
            break
    if invocation.json:
        invocation.emit({"items": documents})
    elif rows:
        _print_list(invocation, rows)
    else:
        invocation.say("No VMs. `interlock vm create NAME --image IMAGE` makes one.", error=True)


def _print_list(invocation: Invocation, rows: list[Instance]) -> None:
    now = invocation.client.now
    apart = len({one.host for one in rows}) > 1
    invocation.table(
        (
            *("NAME", "STATE", "TASK", "POWER", "WAITING", "PROTECTED FROM", "LAST CHANGE", "IMAGE"),
            *(("HOST",) if apart else ()),
            "ID",
        ),
        (
            (
                one.name,
                Cell(one.vm_state.value, STATE_COLOURS.get(one.vm_state.value)),
                "-" if one.task_state == NO_TASK else one.task_state,
                one.power_state.value,
                str(len(one.held) + sum(request.status is Status.QUEUED for request in one.outstanding) or "-"),
                ", ".join(spoken(operation) for operation in one.blocked_operations) or "-",
                age(one.updated_at, now),
                one.image.name if one.image is not None else "-",
                *((one.host,) if apart else ()),
                one.id,
            )
            for one in rows
        ),
    )


@vm_commands.command()
@vm_argument
@json_option
@needs_invocation
def show(invocation: Invocation, *, vm: str) -> None:
    """Show a VM and what is outstanding for it."""
    with suggesting(invocation.client, INSTANCES, vm):
        reply = invocation.client.get(path_of(INSTANCES, vm))
    if not invocation.answer(reply):
        one = reply.decode(Instance)
        print_vm(invocation, one, host_text(invocation.client, one.host))


@vm_commands.command()
@vm_argument
@click.option("--tag", "tags", multiple=True, help="Its tags from now on. May be repeated.")
@click.option("--no-tags", is_flag=True, help="Take all tags away.")
@click.option("--protect", multiple=True, type=OperationName(), help="Refuse these operations from now on.")
@click.option("--no-protect", is_flag=True, help="Take all protection away.")
@restart_option
@json_option
@needs_invocation
def label(
    invocation: Invocation,
    *,
    vm: str,
    tags: tuple[str, ...],
    no_tags: bool,
    protect: tuple[Operation, ...],
    no_protect: bool,
    restart: str | None,
) -> None:
    """Change a VM's tags, what it is protected from, or whether it is restarted."""
    if (tags and no_tags) or (protect and no_protect):
        raise click.UsageError("An option and its --no- form do not go together.")
    if not (tags or no_tags or protect or no_protect or restart):
        raise click.UsageError("Nothing to change: name --tag, --no-tags, --protect, --no-protect or --restart.")
    wish: dict[str, Any] = {}
    if tags or no_tags:
        wish["tags"] = tags
    if protect or no_protect:
        wish["blocked_operations"] = protect
    if restart:
        wish["restart"] = WORDS[restart]
    with suggesting(invocation.client, INSTANCES, vm):
        reply = invocation.client.patch(path_of(INSTANCES, vm), wish)
    if not invocation.answer(reply):
        print_vm(invocation, reply.decode(Instance))


def print_vm(invocation: Invocation, one: Instance, host: str | None = None) -> None:
    """Print a VM: one fact a line, then its outstanding requests in the order in which they are served.

    `host` is what is said of where it is; None: only the name.
    """
    now = invocation.client.now
    facts = {
        "Name": one.name,
        "Id": one.id,
        "State": click.style(one.vm_state.value, fg=STATE_COLOURS.get(one.vm_state.value)),
        "Was": state_text(one),
        "Task": one.task_state,
        "Power": one.power_state.value,
        "Error": printable(one.error) if one.error else None,
        "Next": next_steps(one, now),
        "Host": host or one.host,
        "Project": one.project,
        "Image": one.image.name if one.image is not None else None,
        "Size": size_text(one),
        "Forwards": ", ".join(f"127.0.0.1:{pair.host_port} -> {pair.guest_port}" for pair in one.forwards),
        "Size before": None if one.prior_size is None else size_text(one.prior_size),
        "Shelved as": None if one.shelved_image is None else f"an image of its own, {one.shelved_image.id}",
        "Cloud-init": "its guest was given something to read" if one.seeded else None,
        "Root disk": "in a folder that hosts share" if one.root_shared else None,
        "Volumes": ", ".join(one.volumes),
        "Interfaces": ", ".join(f"{plugged.mac} [{plugged.id}]" for plugged in one.interfaces),
        "Metadata": printable(", ".join(f"{key}={value}" for key, value in sorted(one.metadata.items()))),
        "Tags": printable(", ".join(one.tags)),
        "Locked by": one.locked_by,
        "Restart": spoken_policy(one.restart, one.restarts),
        "Protected from": ", ".join(one.blocked_operations),
        "Created": clock(one.created_at, now),
        "Last change": f"{clock(one.updated_at, now)} ({age(one.updated_at, now)} ago)",
        "Generation": str(one.generation),
    }
    for title, fact in facts.items():
        if fact:
            invocation.say(f"{title + ':':<16}{fact}")
    for request in (*one.outstanding, *one.held):
        title = "Held:" if request.status is Status.HELD else "Outstanding:"
        invocation.say(f"{title:<16}{describe(request, one.name)} [{request.id}, {request.requested_by}]")
