"""Downloads to a file, and `interlock image download` and `image add --url`."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Final, NamedTuple

import click

from interlock.api.schemas.inventory import Image, ImageFetch
from interlock.cli.client.http_client import Query, Reply
from interlock.cli.client.paths import IMAGES, path_of
from interlock.cli.completion import completer
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.output.formatting import size
from interlock.cli.output.progress import Progress, transfer
from interlock.service.request_models import NewImageFetch

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


@click.command("download")
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
