"""The operations of the catalogue as commands of `interlock vm`: one command for each; `dump` is in `dumps`.

What all of them take, and how the answer is said, is in `submitting`.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from interlock.cli.invocation import Invocation, needs_invocation
from interlock.cli.naming import IMAGES, VOLUMES, completer, suggesting, vm_argument
from interlock.cli.submitting import asking_options, submit
from interlock.cli.vm import vm_commands
from interlock.core.operations import Operation

_O = Operation

SIMPLE = {
    "start": (_O.START, "Boot a VM that is stopped. One that was resized is so for good, by that."),
    "pause": (_O.PAUSE, "Halt a VM's processors; its memory is kept."),
    "unpause": (_O.UNPAUSE, "Let a paused VM go on."),
    "suspend": (_O.SUSPEND, "Write a VM's memory to disk, and free what it held."),
    "resume": (_O.RESUME, "Let a suspended VM go on where it was."),
    "unrescue": (_O.UNRESCUE, "End the rescue of a VM, and bring it to what it was before."),
    "confirm-resize": (_O.CONFIRM_RESIZE, "Keep a VM's new size, and give up its disk from before."),
    "revert-resize": (_O.REVERT_RESIZE, "Give a VM the size and the disk back that it had before."),
    "shelve": (_O.SHELVE, "Power a VM off, and keep an image of its root disk."),
    "offload": (_O.SHELVE_OFFLOAD, "Remove a shelved VM from its host; the image is kept."),
    "unshelve": (_O.UNSHELVE, "Bring a shelved VM back to what it was before."),
    "soft-delete": (_O.SOFT_DELETE, "Power a VM off, and delete it unless it is restored in time."),
    "restore": (_O.RESTORE, "Bring back a VM that was soft-deleted."),
    "lock": (_O.LOCK, "Let only the locker and admins change a VM."),
    "unlock": (_O.UNLOCK, "Take the lock off again."),
}
"""The commands of operations that take no parameters."""


def _simple(name: str, operation: Operation, help_text: str) -> None:
    @vm_commands.command(name, help=help_text)
    @vm_argument
    @asking_options
    @needs_invocation
    def run(invocation: Invocation, *, vm: str, wait: bool, hold: str | None) -> None:
        submit(invocation, vm, operation, wait=wait, hold=hold)


for _name, (_operation, _help) in SIMPLE.items():
    _simple(_name, _operation, _help)


def _with_hard(operation: Operation, help_text: str, hard_help: str) -> None:
    @vm_commands.command(operation.value, help=help_text)
    @vm_argument
    @click.option("--hard", is_flag=True, help=hard_help)
    @asking_options
    @needs_invocation
    def run(invocation: Invocation, *, vm: str, hard: bool, wait: bool, hold: str | None) -> None:
        submit(invocation, vm, operation, wait=wait, hold=hold, parameters={"hard": True} if hard else None)


_with_hard(_O.STOP, "Ask the guest to power off; after a time-out, pull the plug.", "Pull the plug without asking.")
_with_hard(_O.REBOOT, "Ask the guest to restart; after a time-out, reset it.", "Reset it without asking.")


def _deletion(name: str, operation: Operation, help_text: str) -> None:
    @vm_commands.command(name, help=help_text)
    @vm_argument
    @click.option("--yes", "-y", is_flag=True, help="Do not ask for confirmation.")
    @asking_options
    @needs_invocation
    def run(invocation: Invocation, *, vm: str, yes: bool, wait: bool, hold: str | None) -> None:
        _confirm(f"Delete {vm} and its root disk?", yes=yes)
        submit(invocation, vm, operation, wait=wait, hold=hold)


_deletion("delete", _O.DELETE, "Delete a VM and its root disk. Volumes are kept. On a terminal this asks first.")
_deletion("force-delete", _O.FORCE_DELETE, "Delete a VM whatever is being done with it. On a terminal this asks first.")


def _confirm(question: str, *, yes: bool) -> None:
    if not yes and sys.stdin.isatty():
        click.confirm(question, abort=True, err=True)


def _with_volume(name: str, operation: Operation, help_text: str) -> None:
    @vm_commands.command(name, help=help_text)
    @vm_argument
    @click.argument("volume", shell_complete=completer(VOLUMES))
    @asking_options
    @needs_invocation
    def run(invocation: Invocation, *, vm: str, volume: str, wait: bool, hold: str | None) -> None:
        with suggesting(invocation.client, VOLUMES, volume):
            submit(invocation, vm, operation, wait=wait, hold=hold, parameters={"volume": volume})


_with_volume("attach", _O.ATTACH_VOLUME, "Attach a volume to a VM, running or not.")
_with_volume("detach", _O.DETACH_VOLUME, "Detach a volume from a VM.")


@vm_commands.command("swap-volume")
@vm_argument
@click.argument("old", shell_complete=completer(VOLUMES))
@click.argument("new", shell_complete=completer(VOLUMES))
@click.option(
    "--no-copy", is_flag=True, help="Take NEW with what is on it, for an old volume that cannot be read any more."
)
@asking_options
@needs_invocation
def swap_volume(
    invocation: Invocation, *, vm: str, old: str, new: str, no_copy: bool, wait: bool, hold: str | None
) -> None:
    """Put the volume NEW in the place of OLD, with what is on it. The guest sees the same device."""
    parameters: dict[str, Any] = {"old": old, "new": new, **({"copy": False} if no_copy else {})}
    with suggesting(invocation.client, VOLUMES, old), suggesting(invocation.client, VOLUMES, new):
        submit(invocation, vm, _O.SWAP_VOLUME, wait=wait, hold=hold, parameters=parameters)


@vm_commands.command("attach-interface")
@vm_argument
@click.option("--mac", help="Its address, as in 52:54:00:12:34:56. Default: one is made up.")
@asking_options
@needs_invocation
def attach_interface(invocation: Invocation, *, vm: str, mac: str | None, wait: bool, hold: str | None) -> None:
    """Give a VM another network interface, running or not."""
    submit(invocation, vm, _O.ATTACH_INTERFACE, wait=wait, hold=hold, parameters={"mac": mac} if mac else None)


@vm_commands.command("detach-interface")
@vm_argument
@click.argument("interface")
@asking_options
@needs_invocation
def detach_interface(invocation: Invocation, *, vm: str, interface: str, wait: bool, hold: str | None) -> None:
    """Take a network interface away again; `vm show` tells their ids."""
    submit(invocation, vm, _O.DETACH_INTERFACE, wait=wait, hold=hold, parameters={"interface": interface})


def _with_image(name: str, operation: Operation, help_text: str, image_help: str, question: str | None) -> None:
    @vm_commands.command(name, help=help_text)
    @vm_argument
    @click.option("--image", shell_complete=completer(IMAGES), help=image_help)
    @click.option("--yes", "-y", is_flag=True, help="Do not ask for confirmation.", hidden=question is None)
    @asking_options
    @needs_invocation
    def run(invocation: Invocation, *, vm: str, image: str | None, yes: bool, wait: bool, hold: str | None) -> None:
        if question is not None:
            _confirm(question.format(vm), yes=yes)
        parameters = None if image is None else {"image": image}
        with suggesting(invocation.client, IMAGES, image or ""):
            submit(invocation, vm, operation, wait=wait, hold=hold, parameters=parameters)


_with_image(
    "rebuild",
    _O.REBUILD,
    "Give a VM a new root disk; its id, name, size and volumes stay. On a terminal this asks first.",
    "What it boots from now on: a name or an id. Default: the image that it has.",
    "Rebuild {}, and lose what is on its root disk?",
)
_with_image(
    "rescue",
    _O.RESCUE,
    "Boot something else, with the VM's own disk beside it.",
    "What it boots meanwhile: a name or an id. Default: its own image, afresh.",
    None,
)


@vm_commands.command()
@vm_argument
@click.option("--vcpus", type=click.IntRange(min=1), help="Virtual processors.")
@click.option("--memory", "memory_mib", type=click.IntRange(min=64), metavar="MIB", help="Memory in MiB.")
@click.option(
    "--root-size", "root_gib", type=click.IntRange(min=1), metavar="GIB", help="Root disk in GiB; it never shrinks."
)
@asking_options
@needs_invocation
def resize(invocation: Invocation, /, *, vm: str, wait: bool, hold: str | None, **size: int | None) -> None:
    """Give a VM another size; then `vm confirm-resize` or `vm revert-resize`. It is powered off meanwhile."""
    wanted = {name: value for name, value in size.items() if value is not None}
    if not wanted:
        raise click.UsageError("Nothing to change: name --vcpus, --memory or --root-size.")
    submit(invocation, vm, _O.RESIZE, wait=wait, hold=hold, parameters=wanted)


@vm_commands.command()
@vm_argument
@click.argument("name")
@asking_options
@needs_invocation
def snapshot(invocation: Invocation, *, vm: str, name: str, wait: bool, hold: str | None) -> None:
    """Make an image called NAME of a VM's root disk as it is now. The guest goes on."""
    submit(invocation, vm, _O.SNAPSHOT, wait=wait, hold=hold, parameters={"name": name})


@vm_commands.command()
@vm_argument
@click.option("--type", "backup_type", default="daily", show_default=True, help="With which others it rotates.")
@click.option(
    "--keep", "rotation", type=click.IntRange(1, 100), required=True, help="How many of that type to keep, 1 to 100."
)
@asking_options
@needs_invocation
def backup(invocation: Invocation, *, vm: str, backup_type: str, rotation: int, wait: bool, hold: str | None) -> None:
    """Make an image of a VM's root disk, and keep so many of them. The oldest beyond those go."""
    parameters = {"backup_type": backup_type, "rotation": rotation}
    submit(invocation, vm, _O.BACKUP, wait=wait, hold=hold, parameters=parameters)


@vm_commands.command("set-password")
@vm_argument
@click.option("--user", default="root", show_default=True, help="Whose password.")
@click.option("--ask", is_flag=True, help="Ask for the password. Default: one is made up, and told once.")
@asking_options
@needs_invocation
def set_password(invocation: Invocation, *, vm: str, user: str, ask: bool, wait: bool, hold: str | None) -> None:
    """Have the guest agent set a user's password."""
    parameters: dict[str, Any] = {"user": user}
    if ask:
        parameters["password"] = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    submit(invocation, vm, _O.SET_PASSWORD, wait=wait, hold=hold, parameters=parameters)


@vm_commands.command("reset-state")
@vm_argument
@click.option(
    "--to", "vm_state", type=click.Choice(["active", "stopped", "error"]), default="error", help="Default: error."
)
@click.option("--reason", required=True, help="Why, for the record.")
@asking_options
@needs_invocation
def reset_state(invocation: Invocation, *, vm: str, vm_state: str, reason: str, wait: bool, hold: str | None) -> None:
    """Correct the recorded state of a VM, ending whatever is outstanding. For admins."""
    parameters = {"vm_state": vm_state, "reason": reason}
    submit(invocation, vm, _O.RESET_STATE, wait=wait, hold=hold, parameters=parameters)


@vm_commands.command()
@vm_argument
@click.argument("notes", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="The same as an option. May be repeated.")
@click.option("--remove", multiple=True, metavar="KEY", help="A note to take away. May be repeated.")
@asking_options
@needs_invocation
def metadata(
    invocation: Invocation,
    *,
    vm: str,
    notes: tuple[str, ...],
    pairs: tuple[str, ...],
    remove: tuple[str, ...],
    wait: bool,
    hold: str | None,
) -> None:
    """Note something of a VM, or take notes away."""
    written = (*notes, *pairs)
    if not (written or remove):
        raise click.UsageError("Nothing to change: write KEY=VALUE, or name --remove.")
    for note in written:
        if not note.partition("=")[0] or "=" not in note:
            raise click.UsageError(f"{note!r} is no note; write KEY=VALUE, as in owner=alice.")
    kept = dict(note.partition("=")[::2] for note in written)
    if len(kept) < len(written):
        raise click.UsageError("A key is there twice; write each once.")
    parameters = {"set": kept, "remove": remove}
    submit(invocation, vm, _O.SET_METADATA, wait=wait, hold=hold, parameters=parameters)
