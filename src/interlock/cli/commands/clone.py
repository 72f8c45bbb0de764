"""`interlock vm clone`: snapshot a VM and create another from the image."""

from __future__ import annotations

import contextlib
import secrets
from typing import Any

import click

from interlock.api.schemas.responses import Admitted, Instance, Request
from interlock.cli.client.paths import IMAGES, INSTANCES, path_of
from interlock.cli.client.records import policy_of
from interlock.cli.commands.submission import REQUESTS, post_operation, wait_for_end, wait_option
from interlock.cli.commands.vm import create_vm, vm_commands
from interlock.cli.context import Invocation
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.new_vm import seed_fields, seed_options
from interlock.cli.options.quantities import Size
from interlock.cli.output.formatting import printable
from interlock.core.operations import Operation
from interlock.core.records import ENDS, Status
from interlock.service.cloud_init import hostname_of
from interlock.service.request_models import NewInstance

_IMAGE_NAME_MAX = 63
_WAIT_S = 20


@vm_commands.command("clone")
@click.argument("source")
@click.argument("name")
@click.option("--image-name", help="Name of the snapshot's image. Default: derived from NAME.")
@click.option("--vcpus", type=click.IntRange(1, 64), help="Number of vCPUs. Default: as SOURCE.")
@click.option("--memory", type=Size("MiB", 64), help="Memory, such as 512 (MiB) or 2GiB. Default: as SOURCE.")
@click.option("--host", help="Host, or `any` for one with free capacity. Default: the server's own.")
@seed_options
@wait_option
def clone(
    invocation: Invocation,
    *,
    source: str,
    name: str,
    image_name: str | None,
    vcpus: int | None,
    memory: int | None,
    host: str | None,
    wait: bool,
    **seed: Any,
) -> None:
    """Create the VM NAME with a copy of the root disk of the VM SOURCE.

    Takes a snapshot of SOURCE, and creates NAME from its image. The new VM has its own id, MAC address and, by
    cloud-init, hostname and instance id. Volumes, forwards, cloud-init data and protected tags of SOURCE are not
    copied. If the create is denied, the image is deleted again; otherwise the new VM's disk is backed by it.
    """
    client = invocation.client
    original = client.get(path_of(INSTANCES, source)).decode(Instance)
    seed["hostname"] = seed["hostname"] or hostname_of(name)
    image = image_name or f"{name[: _IMAGE_NAME_MAX - 11]}-clone-{secrets.token_hex(2)}".lower()
    new = NewInstance(
        name=name,
        image=image,
        vcpus=vcpus or original.vcpus,
        memory_mib=memory or original.memory_mib,
        root_gib=original.root_gib,
        tags=_copied_tags(invocation, original.tags),
        host=host,
        **seed_fields(seed),
    )
    _snapshot(invocation, source, image)
    try:
        create_vm(invocation, new, wait=wait)
    except Failure:
        # The deletion is denied if the VM exists and its create failed afterwards: it uses the image.
        with contextlib.suppress(Failure):
            client.delete(path_of(IMAGES, image))
            invocation.echo(f"Deleted: snapshot image {image}, because the VM was not created.", error=True)
        raise
    if not invocation.json:
        invocation.echo(
            f"Its disk is backed by the image {image}: after the VM is deleted, run `interlock image delete {image}`."
        )


def _copied_tags(invocation: Invocation, tags: tuple[str, ...]) -> tuple[str, ...]:
    """Return the tags that the new VM gets: not the protected ones, which a member could not set."""
    if not tags:
        return ()
    protected = policy_of(invocation.client.get("/v1/policy").decode(dict[str, Any])).protected(tags)
    if protected and not invocation.json:
        invocation.echo(f"Not copied: the protected tags {printable(', '.join(sorted(protected)))}.")
    return tuple(tag for tag in tags if tag not in protected)


def _snapshot(invocation: Invocation, source: str, image: str) -> None:
    request = post_operation(invocation, source, Operation.SNAPSHOT, {"name": image}).decode(Admitted).request
    if not invocation.json:
        wait_for_end(invocation, request, source)
        return
    # Only one JSON document is printed: that of the create.
    while request.status not in ENDS:
        reply = invocation.client.get(path_of(REQUESTS, request.id), {"wait": f"{_WAIT_S}s"}, wait_s=_WAIT_S)
        request = reply.decode(Request)
    if request.status is not Status.SUCCEEDED:
        raise Failure(ExitCode.ENDED_OTHERWISE, request.message or f"Snapshot of {source} {request.status}.")
