"""`interlock image`, `volume` and `token`: what VMs are made of, and who may speak to the server."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click

from interlock.api.schemas import (
    Image,
    ImageList,
    MadeToken,
    NewSmallImage,
    NewToken,
    NewVolume,
    TokenList,
    Volume,
    VolumeList,
)
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, json_option, needs_invocation
from interlock.cli.live_line import LiveLine, Standing, progress_stream
from interlock.cli.multipart import Form
from interlock.cli.naming import IMAGES, TOKENS, VOLUMES, completer, path_of, suggesting
from interlock.cli.wording import age, size
from interlock.ports import Role, SmallForm

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_MIB_PER_GIB = 1024
_VOLUME_GIB_MAX = 65_536

BUILD_WAIT_S = 900
"""How long building the small image may take; its packages may have to be fetched first."""


def _remove(invocation: Invocation, collection: str, reference: str) -> None:
    with suggesting(invocation.client, collection, reference):
        reply = invocation.client.delete(path_of(collection, reference))
    if invocation.json:
        click.echo(reply.body or b"{}")
    else:
        invocation.say(f"Deleted: {reference}")


# ----------------------------------------------------------------------------------------------------------- images


@click.group("image")
def image_commands() -> None:
    """Images: what VMs boot."""


@image_commands.command()
@click.argument("name")
@click.option(
    "--disk", type=_FILE, help="A disk image: raw, qcow2, vmdk, vhd, vhdx or vdi; or an ISO. It may need no other file."
)
@click.option("--sha256", help="What the disk image's SHA-256 must be.")
@click.option("--kernel", type=_FILE, help="A kernel that is booted directly, instead of a disk.")
@click.option("--initrd", type=_FILE, help="Its initial file system.")
@click.option("--cmdline", help="Its command line.")
@json_option
@needs_invocation
def add(
    invocation: Invocation,
    *,
    name: str,
    disk: Path | None,
    sha256: str | None,
    kernel: Path | None,
    initrd: Path | None,
    cmdline: str | None,
) -> None:
    """Upload an image called NAME: a disk, or a kernel with its initial file system."""
    if (disk is None) == (kernel is None):
        raise click.UsageError("Give either --disk or --kernel.")
    if (disk is not None and (initrd or cmdline)) or (kernel is not None and sha256):
        raise click.UsageError("--sha256 goes with --disk; --initrd and --cmdline go with --kernel.")
    fields = {"name": name, "kind": "disk" if disk else "kernel", "sha256": sha256, "cmdline": cmdline}
    files = {"disk": disk, "kernel": kernel, "initrd": initrd}
    _upload(invocation, {k: v for k, v in fields.items() if v}, {k: v for k, v in files.items() if v is not None})


def _upload(invocation: Invocation, fields: dict[str, str], files: dict[str, Path]) -> None:
    try:
        form = Form(fields, files)
        silent = invocation.json or not sys.stderr.isatty()
        with LiveLine(sys.stderr, silent=silent, plain=invocation.plain) as line:
            name = fields["name"]
            pieces = form.pieces(lambda sent, total: line.tell("", _sent(name, sent, total, line.elapsed_s)))
            reply = invocation.client.upload(IMAGES, pieces, form.headers)
    except OSError as error:
        raise Failure(ExitCode.USAGE, f"The image cannot be read: {error}.") from None
    if not invocation.answer(reply):
        _say_image(invocation, reply.decode(Image))


def _sent(name: str, sent: int, total: int, elapsed_s: float) -> Standing:
    """How far an upload is, with its rate once that means something."""
    if sent >= total:
        return Standing(f"image {name}: sent; the server looks at it")
    per_s = int(sent / elapsed_s) if elapsed_s >= 1 else None
    return Standing(f"image {name}: sending", sent / total, sent, total, per_s)


def _say_image(invocation: Invocation, image: Image) -> None:
    converted = f", converted from {image.converted_from}" if image.converted_from else ""
    invocation.say(f"Added: image {image.name} ({image.kind}, {size(image.size_bytes)}{converted}), id {image.id}")


@image_commands.command("build-small")
@click.argument("name", default="small")
@click.option("--disk", is_flag=True, help="A disk that boots by itself, so that snapshots of it boot, too.")
@json_option
@needs_invocation
def build_small(invocation: Invocation, *, name: str, disk: bool) -> None:
    """Build a small real guest, as an image called NAME.

    It is made from the packages of the server's distribution. Without NAME it is called small. It is a kernel that is
    booted directly, unless --disk is given.
    """
    build_small_image(invocation, name, "disk" if disk else "kernel")


def build_small_image(invocation: Invocation, name: str, form: SmallForm = "kernel") -> None:
    """Have the server build the small image, showing that it takes a while. Raises `Failure`."""
    with LiveLine(progress_stream(json=invocation.json), silent=invocation.json, plain=invocation.plain) as line:
        line.tell(f"building the image {name} from the distribution's packages")
        reply = invocation.client.post(f"{IMAGES}/small", NewSmallImage(name=name, form=form), wait_s=BUILD_WAIT_S)
    if not invocation.answer(reply):
        _say_image(invocation, reply.decode(Image))


@image_commands.command("list")
@json_option
@needs_invocation
def list_images(invocation: Invocation) -> None:
    """List the images."""
    reply = invocation.client.get(IMAGES)
    if invocation.answer(reply):
        return
    now = invocation.client.now
    invocation.table(
        ("NAME", "KIND", "FORMAT", "SIZE", "AGE", "ID"),
        (
            (one.name, one.kind, one.format, size(one.size_bytes), age(one.created_at, now), one.id)
            for one in reply.decode(ImageList).items
        ),
    )


@image_commands.command("delete")
@click.argument("image", shell_complete=completer(IMAGES))
@json_option
@needs_invocation
def delete_image(invocation: Invocation, *, image: str) -> None:
    """Delete an image that no VM uses."""
    _remove(invocation, IMAGES, image)


# ---------------------------------------------------------------------------------------------------------- volumes


@click.group("volume")
def volume_commands() -> None:
    """Volumes: disks that live on their own."""


@volume_commands.command("create")
@click.argument("name")
@click.option(
    "--size",
    "size_gib",
    type=click.FloatRange(min=0, max=_VOLUME_GIB_MAX, min_open=True),
    required=True,
    help="Size in GiB.",
)
@json_option
@needs_invocation
def create_volume(invocation: Invocation, *, name: str, size_gib: float) -> None:
    """Make an empty volume called NAME."""
    if math.isnan(size_gib):
        raise click.UsageError("--size is no number of GiB.")
    size_mib = round(size_gib * _MIB_PER_GIB)
    if size_mib < 1:
        raise click.UsageError("The smallest volume has 1 MiB (--size 0.001).")
    reply = invocation.client.post(VOLUMES, NewVolume(name=name, size_mib=size_mib))
    if not invocation.answer(reply):
        made = reply.decode(Volume)
        invocation.say(f"Made: volume {made.name} ({size(made.size_bytes)}), id {made.id}")


@volume_commands.command("list")
@json_option
@needs_invocation
def list_volumes(invocation: Invocation) -> None:
    """List the project's volumes."""
    reply = invocation.client.get(VOLUMES)
    if invocation.answer(reply):
        return
    now = invocation.client.now
    invocation.table(
        ("NAME", "SIZE", "ATTACHED TO", "AGE", "ID"),
        (
            (one.name, size(one.size_bytes), one.attached_to or "-", age(one.created_at, now), one.id)
            for one in reply.decode(VolumeList).items
        ),
    )


@volume_commands.command("show")
@click.argument("volume", shell_complete=completer(VOLUMES))
@json_option
@needs_invocation
def show_volume(invocation: Invocation, *, volume: str) -> None:
    """Show a volume."""
    with suggesting(invocation.client, VOLUMES, volume):
        reply = invocation.client.get(path_of(VOLUMES, volume))
    if invocation.answer(reply):
        return
    one = reply.decode(Volume)
    facts = {"Name": one.name, "Id": one.id, "Size": size(one.size_bytes), "Project": one.project}
    facts["Attached to"] = one.attached_to or "nothing"
    for title, fact in facts.items():
        invocation.say(f"{title + ':':<13}{fact}")


@volume_commands.command("delete")
@click.argument("volume", shell_complete=completer(VOLUMES))
@json_option
@needs_invocation
def delete_volume(invocation: Invocation, *, volume: str) -> None:
    """Delete a volume that no VM has."""
    _remove(invocation, VOLUMES, volume)


# ----------------------------------------------------------------------------------------------------------- tokens


@click.group("token")
def token_commands() -> None:
    """Tokens: who may speak to the server. For admins."""


@token_commands.command("create")
@click.argument("name")
@click.option("--role", type=click.Choice([role.value for role in Role]), required=True, help="What it may do.")
@click.option("--project", default="default", show_default=True, help="Whose VMs exist for it.")
@json_option
@needs_invocation
def create_token(invocation: Invocation, *, name: str, role: str, project: str) -> None:
    """Make a token called NAME. Its secret is printed this once, alone on standard output."""
    reply = invocation.client.post(TOKENS, NewToken(name=name, role=Role(role), project=project))
    if not invocation.answer(reply):
        made = reply.decode(MadeToken)
        invocation.say(
            f"Made: token {made.token.name} ({role} of {project}). Its secret is shown only now:", error=True
        )
        invocation.say(made.secret)


@token_commands.command("list")
@json_option
@needs_invocation
def list_tokens(invocation: Invocation) -> None:
    """List the tokens, without their secrets."""
    reply = invocation.client.get(TOKENS)
    if invocation.answer(reply):
        return
    now = invocation.client.now
    invocation.table(
        ("NAME", "ROLE", "PROJECT", "AGE", "ID"),
        (
            (one.name, one.role.value, one.project, age(one.created_at, now), one.id)
            for one in reply.decode(TokenList).items
        ),
    )


@token_commands.command("delete")
@click.argument("token", shell_complete=completer(TOKENS))
@json_option
@needs_invocation
def delete_token(invocation: Invocation, *, token: str) -> None:
    """Delete a token; whoever shows it is turned away at once."""
    _remove(invocation, TOKENS, token)
