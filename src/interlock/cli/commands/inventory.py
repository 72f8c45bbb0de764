"""`interlock image` and `volume`: create, list, show, download and delete."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from interlock.api.schemas.inventory import (
    Image,
    ImageFetch,
    ImageList,
    NewSmallImage,
    Volume,
    VolumeList,
)
from interlock.cli.client.http_client import Form, Query, Reply
from interlock.cli.client.paths import IMAGES, VOLUMES, path_of
from interlock.cli.completion import completer
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.quantities import Size
from interlock.cli.output.confirmation import confirm, yes_option
from interlock.cli.output.formatting import age, size
from interlock.cli.output.progress import Progress, transfer
from interlock.ports import SmallForm
from interlock.service.request_models import NewImageFetch, NewVolume

_FILES: Final = ("disk", "kernel", "initrd")
"""The options that name a file of an upload; its part of the form has the same name."""
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
BUILD_WAIT_S = 900
"""Timeout of building the small image, including the download of packages."""


def _remove(invocation: Invocation, collection: str, reference: str) -> None:
    reply = invocation.client.delete(path_of(collection, reference))
    invocation.print_removed(reply, f"Deleted: {reference}")


# ----------------------------------------------------------------------------------------------------------- images


@click.group("image")
def image_commands() -> None:
    """Images: what VMs boot."""


@image_commands.command()
@click.argument("name")
@click.option(
    "--disk",
    type=_FILE,
    help="Disk image: raw, qcow2, vmdk, vhd, vhdx or vdi, without a backing file; or an ISO. May be compressed (gz, "
    "xz, zst, bz2), or the only disk of an OVA.",
)
@click.option("--url", help="URL from which the server fetches the disk image. http requires --sha256.")
@click.option("--sha256", help="Expected SHA-256 of the disk image's file.")
@click.option(
    "--checksum-file",
    "checksum_url",
    metavar="URL",
    help="With --url: URL of the published checksums, such as SHA512SUMS.",
)
@click.option(
    "--format",
    type=click.Choice(["raw"]),
    help="Accept a raw disk without a boot sector. Other formats are detected.",
)
@click.option(
    "--min-memory",
    "min_memory_mib",
    type=Size("MiB", 0),
    help="Minimum memory, such as 256 (MiB) or 2GiB; less is rejected. Default for a kernel: estimated from its size.",
)
@click.option("--kernel", type=_FILE, help="Kernel to boot directly, instead of a disk.")
@click.option("--initrd", type=_FILE, help="The kernel's initrd.")
@click.option("--cmdline", help="The kernel's command line.")
@with_json
def add(invocation: Invocation, /, *, name: str, **options: Any) -> None:
    """Add the image NAME from a file or a URL.

    Files are uploaded; a URL is fetched by the server.
    """
    given = {field: value for field, value in options.items() if value is not None}
    if len(given.keys() & {"disk", "kernel", "url"}) != 1:
        raise click.UsageError("Give one of --disk, --kernel and --url.")
    if "checksum_url" in given and "url" not in given:
        raise click.UsageError("--checksum-file requires --url.")
    if given.keys() & ({"sha256", "format"} if "kernel" in given else {"initrd", "cmdline"}):
        raise click.UsageError("--sha256 and --format require a disk; --initrd and --cmdline require --kernel.")
    if "url" in given:
        fetched = fetch_image(invocation, NewImageFetch(name=name, **given))
        if fetched is not None:
            _print_image(invocation, fetched)
        return
    files: dict[str, Path] = {part: given.pop(part) for part in _FILES if part in given}
    kind = "disk" if "disk" in files else "kernel"
    _upload(invocation, {"name": name, "kind": kind, **{field: str(value) for field, value in given.items()}}, files)


def _upload(invocation: Invocation, fields: dict[str, str], files: dict[str, Path]) -> None:
    try:
        form = Form(fields, files)
        with invocation.transfer_progress() as line:
            name = fields["name"]
            pieces = form.pieces(
                lambda sent, total: line.update("", _upload_progress(name, sent, total, line.elapsed_s))
            )
            reply = invocation.client.upload(IMAGES, pieces, form.headers)
    except OSError as error:
        raise Failure(ExitCode.USAGE, f"Cannot read the image: {error}.") from None
    if not invocation.print_json(reply):
        _print_image(invocation, reply.decode(Image))


def _upload_progress(name: str, sent: int, total: int, elapsed_s: float) -> Progress:
    """Return an upload's progress."""
    if sent >= total:
        return Progress(f"image {name}: uploaded; inspecting")
    return transfer(f"image {name}: uploading", sent, total, elapsed_s)


def _print_image(invocation: Invocation, image: Image) -> None:
    converted = f", converted from {image.converted_from}" if image.converted_from else ""
    invocation.echo(f"Added: image {image.name} ({image.kind}, {size(image.size_bytes)}{converted}), id {image.id}")


@image_commands.command("build-small")
@click.argument("name", default="small")
@click.option("--disk", is_flag=True, help="Build a bootable disk, whose snapshots boot too.")
@with_json
def build_small(invocation: Invocation, *, name: str, disk: bool) -> None:
    """Build a small guest image from the packages of the server's distribution.

    NAME is small by default. The image is a directly booted kernel, unless --disk is given.
    """
    build_small_image(invocation, name, "disk" if disk else "kernel")


def build_small_image(invocation: Invocation, name: str, form: SmallForm = "kernel") -> None:
    """Build the small image by the server, showing progress. Raises `Failure`."""
    with invocation.progress() as line:
        line.update(f"building the image {name} from the distribution's packages")
        reply = invocation.client.post(f"{IMAGES}/small", NewSmallImage(name=name, form=form), wait_s=BUILD_WAIT_S)
    if not invocation.print_json(reply):
        _print_image(invocation, reply.decode(Image))


@image_commands.command("list")
@with_json
def list_images(invocation: Invocation) -> None:
    """List the images."""
    columns = {
        "NAME": lambda one: one.name,
        "KIND": lambda one: one.kind,
        "FORMAT": lambda one: one.format,
        "SIZE": lambda one: size(one.size_bytes),
        "MIN MEMORY": lambda one: f"{one.min_memory_mib} MiB" if one.min_memory_mib else "-",
        "AGE": lambda one: age(one.created_at, invocation.client.now),
        "ID": lambda one: one.id,
    }
    invocation.print_items(invocation.client.get(IMAGES), ImageList, columns)


@image_commands.command("delete")
@click.argument("image", shell_complete=completer(IMAGES))
@yes_option
@with_json
def delete_image(invocation: Invocation, *, image: str, yes: bool) -> None:
    """Delete an image that no VM uses, after confirmation."""
    confirm(f"Delete the image {image}?", yes=yes)
    _remove(invocation, IMAGES, image)


# ---------------------------------------------------------------------------------------------------------- volumes


@click.group("volume")
def volume_commands() -> None:
    """Volumes: disks that exist independently of VMs."""


@volume_commands.command("create")
@click.argument("name")
@click.option(
    "--size", "size_mib", type=Size("MiB", 1, bare="GiB"), required=True, help="Size, such as 10 (GiB), 0.5 or 512MiB."
)
@with_json
def create_volume(invocation: Invocation, *, name: str, size_mib: int) -> None:
    """Create the empty volume NAME."""
    reply = invocation.client.post(VOLUMES, NewVolume(name=name, size_mib=size_mib))
    if not invocation.print_json(reply):
        new = reply.decode(Volume)
        invocation.echo(f"Created: volume {new.name} ({size(new.size_bytes)}), id {new.id}")


@volume_commands.command("list")
@with_json
def list_volumes(invocation: Invocation) -> None:
    """List the project's volumes."""
    columns = {
        "NAME": lambda one: one.name,
        "SIZE": lambda one: size(one.size_bytes),
        "ATTACHED TO": lambda one: one.attached_to or "-",
        "AGE": lambda one: age(one.created_at, invocation.client.now),
        "ID": lambda one: one.id,
    }
    invocation.print_items(invocation.client.get(VOLUMES), VolumeList, columns)


@volume_commands.command("show")
@click.argument("volume", shell_complete=completer(VOLUMES))
@with_json
def show_volume(invocation: Invocation, *, volume: str) -> None:
    """Show a volume."""
    reply = invocation.client.get(path_of(VOLUMES, volume))
    if invocation.print_json(reply):
        return
    one = reply.decode(Volume)
    facts = {"Name": one.name, "Id": one.id, "Size": size(one.size_bytes), "Project": one.project}
    facts["Attached to"] = one.attached_to or "nothing"
    invocation.print_facts(facts, 13)


@volume_commands.command("delete")
@click.argument("volume", shell_complete=completer(VOLUMES))
@yes_option
@with_json
def delete_volume(invocation: Invocation, *, volume: str, yes: bool) -> None:
    """Delete a volume that is not attached, with its data, after confirmation."""
    confirm(f"Delete the volume {volume} and its data?", yes=yes)
    _remove(invocation, VOLUMES, volume)


_SILENCE_S = 60


class Downloaded(NamedTuple):
    """A downloaded file."""

    size_bytes: int
    sha256: str


def download(invocation: Invocation, path: str, target: Path, query: Query | None = None) -> Downloaded:
    """Download `path` to `target`, readable only by its owner. Raises `Failure`."""
    draft = target.with_name(f"{target.name}.part")
    written, digest = 0, hashlib.sha256()
    try:
        accept = {"Accept": "application/octet-stream"}
        stream = invocation.client.stream(path, query, accept, _SILENCE_S)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file, invocation.transfer_progress() as line:
            total = stream.length
            for chunk in stream.chunks():
                written += file.write(chunk)
                digest.update(chunk)
                line.update("", transfer(f"downloading {target}", written, total, line.elapsed_s))
        draft.replace(target)
    except OSError as error:
        raise Failure(ExitCode.NOT_REACHABLE, f"Cannot write {target}: {error.strerror or error}.") from error
    finally:
        draft.unlink(missing_ok=True)
    return Downloaded(written, digest.hexdigest())


FETCHES: Final = "/v1/image-fetches"
_POLL_S: Final = 0.3
_RECONNECT_TIMEOUT_S: Final = 120.0
"""How long to try to reconnect to a restarting server."""


def fetch_image(invocation: Invocation, new: NewImageFetch) -> Image | None:
    """Fetch an image by the server, showing progress. Return it, or None if it was printed as JSON.

    Ctrl-C cancels the fetch. If the server restarts, the fetch is resumed.

    Raises:
        Failure: rejected or failed.
    """
    reply = invocation.client.post(FETCHES, new)
    fetch = reply.decode(ImageFetch)
    try:
        with invocation.progress() as line:
            while fetch.status == "running":
                line.update(f"image {fetch.name}: {fetch.phase}", _progress_of(fetch, line.elapsed_s))
                time.sleep(_POLL_S)
                reply = _poll(invocation, fetch, new)
                fetch = reply.decode(ImageFetch)
    except KeyboardInterrupt:
        invocation.client.delete(path_of(FETCHES, fetch.id))
        invocation.echo(f"Cancelled: the fetch of image {fetch.name}", error=True)
        raise
    if fetch.status != "succeeded" or fetch.image is None:
        raise Failure(ExitCode.ENDED_OTHERWISE, fetch.error or f"The fetch was {fetch.status}.", remedy=fetch.remedy)
    return None if invocation.print_json(reply) else fetch.image


def _poll(invocation: Invocation, fetch: ImageFetch, new: NewImageFetch) -> Reply:
    until = time.monotonic() + _RECONNECT_TIMEOUT_S
    while True:
        try:
            return invocation.client.get(path_of(FETCHES, fetch.id))
        except Failure as failure:
            if failure.code is ExitCode.NOT_FOUND:
                # The server has restarted; it resumes from the partial download.
                return invocation.client.post(FETCHES, new)
            if failure.code is not ExitCode.NOT_REACHABLE or time.monotonic() > until:
                raise
            invocation.client.reset()
            time.sleep(_POLL_S)


def _progress_of(fetch: ImageFetch, elapsed_s: float) -> Progress:
    if fetch.phase == "inspecting":
        return Progress(f"image {fetch.name}: fetched; inspecting")
    return transfer(f"image {fetch.name}: fetching", fetch.received_bytes, fetch.total_bytes, elapsed_s)


@image_commands.command("download")
@click.argument("image", shell_complete=completer(IMAGES))
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--part", type=click.Choice(["kernel", "initrd"]), help="Which file of a kernel image.")
@with_json
def download_image(invocation: Invocation, *, image: str, file: Path | None, part: str | None) -> None:
    """Download IMAGE to FILE; default: its name and format, in the current folder.

    An image that was converted or decompressed has another SHA-256 than the original file.
    """
    reply = invocation.client.get(path_of(IMAGES, image))
    found = reply.decode(Image)
    target = file or Path(f"{found.name}.{part or ('kernel' if found.kind == 'kernel' else found.format)}")
    if target.exists():
        raise click.UsageError(f"{target} already exists; choose another file.")
    written = download(invocation, path_of(IMAGES, found.id, "content"), target, {"part": part})
    if invocation.print_json(reply):
        return
    invocation.echo(f"Written: {target} ({size(written.size_bytes)})")
    same = "as the original" if written.sha256 == found.sha256 else f"the original has {found.sha256}"
    invocation.echo(f"SHA-256: {written.sha256}" + ("" if part == "initrd" else f" ({same})"))
