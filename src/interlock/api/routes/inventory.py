"""`/v1/images`, `/v1/image-fetches`, `/v1/volumes` and `/v1/tokens`: create, list, read and delete."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from interlock.api.http import audit_entries, multipart_upload, request_parsing
from interlock.api.http.route import ApiParts, Parameter, Routes, json_response
from interlock.api.schemas import inventory, serializers
from interlock.core.errors import Invalid
from interlock.core.records import Image
from interlock.core.roles import Role
from interlock.ports import Token
from interlock.service.auth import Caller
from interlock.service.image_fetches import Fetch
from interlock.service.request_models import PATTERNS, NewImageFetch, NewVolume, duration_ms
from interlock.service.validation_messages import in_words, what_instead

images_routes = Routes("images")
volumes_routes = Routes("volumes")
tokens_routes = Routes("tokens")

_FIELDS: Final = frozenset(field.name for field in msgspec.structs.fields(inventory.ImageUpload))
_PARTS: Final = ("kernel", "initrd")
_FILES: Final = frozenset({"disk", "kernel", "initrd"})


def _form() -> dict[str, Any]:
    text = {name: {"type": "string"} for name in sorted(_FIELDS)}
    files = {name: {"type": "string", "format": "binary"} for name in sorted(_FILES)}
    return {"type": "object", "properties": {**text, **files}, "required": ["name", "kind"]}


# --------------------------------------------------------------------------------------------------------- images


@images_routes.add("GET /v1/images", "List images", {200: inventory.ImageList})
async def images(parts: ApiParts, caller: Caller, request: Request) -> inventory.ImageList:
    return inventory.ImageList(items=tuple(serializers.image(one) for one in await parts.inventory.images(caller)))


@images_routes.add(
    "POST /v1/images", "Upload an image", {201: inventory.Image}, problems=(400, 409, 413, 415, 507), form=_form()
)
async def add_image(parts: ApiParts, caller: Caller, request: Request) -> Response:
    """Receive an upload into a temporary folder, and import the image from there."""
    caller.require(Role.ADMIN, "add images")
    with tempfile.TemporaryDirectory(prefix=multipart_upload.FOLDER_PREFIX, dir=parts.config.folder) as folder:
        bytes_max = parts.config.upload_bytes_max
        texts, files = await multipart_upload.receive(request, Path(folder), _FIELDS, _FILES, bytes_max)
        image = await _import(parts, caller, _parse_upload(texts, files), files)
    return json_response(serializers.image(image), 201, {"Location": "/v1/images"})


def _parse_upload(texts: dict[str, str], files: Collection[str]) -> inventory.ImageUpload:
    """Return the form's fields. Raises `Invalid`, also if the files do not match the kind."""
    try:
        upload = msgspec.convert(texts, inventory.ImageUpload, strict=False)
    except msgspec.ValidationError as error:
        remedy = what_instead(str(error), inventory.ImageUpload) or f"The fields are: {', '.join(sorted(_FIELDS))}."
        raise Invalid(f"Invalid form: {in_words(str(error), PATTERNS)}.", remedy=remedy) from None
    needed, optional = ({"disk"}, set[str]()) if upload.kind == "disk" else ({"kernel"}, {"initrd"})
    if not needed <= set(files) <= needed | optional:
        what = "the file `disk`" if upload.kind == "disk" else "the file `kernel`, and optionally `initrd`"
        raise Invalid(f"Invalid files for kind {upload.kind}: {', '.join(sorted(files)) or 'none'}; expected {what}.")
    return upload


async def _import(parts: ApiParts, caller: Caller, upload: inventory.ImageUpload, paths: dict[str, Path]) -> Image:
    if upload.kind == "disk":
        return await parts.inventory.add_disk_image(
            caller,
            upload.name,
            paths["disk"],
            upload.sha256,
            claimed=upload.format,
            min_memory_mib=upload.min_memory_mib,
        )
    return await parts.inventory.add_kernel_image(
        caller, upload.name, paths["kernel"], paths.get("initrd"), upload.cmdline, upload.min_memory_mib
    )


@images_routes.add(
    "POST /v1/images/small",
    "Build a small guest image from the distribution's packages",
    {201: inventory.Image},
    problems=(409, 507),
    body=inventory.NewSmallImage,
)
async def build_small(parts: ApiParts, caller: Caller, request: Request) -> Response:
    body = await request_parsing.body(request, inventory.NewSmallImage, parts.config.request_body_bytes_max)
    image = await parts.inventory.build_small_image(caller, body.name, body.form)
    return json_response(serializers.image(image), 201, {"Location": "/v1/images"})


@images_routes.add("GET /v1/images/{reference}", "Read an image's record", {200: inventory.Image})
async def image(parts: ApiParts, caller: Caller, request: Request) -> inventory.Image:
    return serializers.image(await parts.inventory.find_image(caller, request.path_params["reference"]))


@images_routes.add(
    "GET /v1/images/{reference}/content",
    "Download an image's file, or a range of it",
    {200: "application/octet-stream"},
    parameters=(Parameter("part", "Which file of a kernel image.", {"type": "string", "enum": ["kernel", "initrd"]}),),
)
async def download_image(parts: ApiParts, caller: Caller, request: Request) -> Response:
    part = request.query_params.get("part")
    if part is not None and part not in _PARTS:
        raise Invalid(f"Invalid part {part[:80]!r}: expected kernel or initrd.")
    path = await parts.inventory.image_file(caller, request.path_params["reference"], part)
    return FileResponse(path, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})


@images_routes.add(
    "DELETE /v1/images/{reference}", "Delete an image that no instance uses", {204: None}, problems=(409,)
)
async def delete_image(parts: ApiParts, caller: Caller, request: Request) -> None:
    await parts.inventory.delete_image(caller, request.path_params["reference"])


@images_routes.add(
    "POST /v1/image-fetches",
    "Fetch a disk image from a URL",
    {202: inventory.ImageFetch},
    problems=(409,),
    body=NewImageFetch,
)
async def begin_fetch(parts: ApiParts, caller: Caller, request: Request) -> Response:
    body = await request_parsing.body(request, NewImageFetch, parts.config.request_body_bytes_max)
    fetch = await parts.image_fetches.begin(caller, body)
    return json_response(_fetch_view(fetch), 202, {"Location": f"/v1/image-fetches/{fetch.id}"})


@images_routes.add(
    "GET /v1/image-fetches", "List the fetches of this server process, oldest first", {200: inventory.ImageFetchList}
)
async def fetches(parts: ApiParts, caller: Caller, request: Request) -> inventory.ImageFetchList:
    return inventory.ImageFetchList(items=tuple(_fetch_view(one) for one in parts.image_fetches.list(caller)))


@images_routes.add("GET /v1/image-fetches/{id}", "Read a fetch's progress", {200: inventory.ImageFetch})
async def fetch(parts: ApiParts, caller: Caller, request: Request) -> inventory.ImageFetch:
    return _fetch_view(parts.image_fetches.find(caller, request.path_params["id"]))


@images_routes.add(
    "DELETE /v1/image-fetches/{id}", "Cancel a fetch; no effect once it has ended", {200: inventory.ImageFetch}
)
async def cancel_fetch(parts: ApiParts, caller: Caller, request: Request) -> inventory.ImageFetch:
    return _fetch_view(await parts.image_fetches.cancel(caller, request.path_params["id"]))


def _fetch_view(fetch: Fetch) -> inventory.ImageFetch:
    return inventory.ImageFetch(
        id=fetch.id,
        name=fetch.request.name,
        url=fetch.request.url,
        status=fetch.status,
        phase=fetch.phase,
        received_bytes=fetch.received_bytes,
        total_bytes=fetch.total_bytes,
        begun_at=serializers.timestamp(fetch.begun_at_ms),
        image=None if fetch.image is None else serializers.image(fetch.image),
        error=None if fetch.error is None else fetch.error.message,
        remedy=None if fetch.error is None else fetch.error.remedy,
    )


# -------------------------------------------------------------------------------------------------------- volumes


@volumes_routes.add("GET /v1/volumes", "List volumes", {200: inventory.VolumeList})
async def volumes(parts: ApiParts, caller: Caller, request: Request) -> inventory.VolumeList:
    return inventory.VolumeList(items=tuple(serializers.volume(one) for one in await parts.inventory.volumes(caller)))


@volumes_routes.add(
    "POST /v1/volumes", "Create an empty volume", {201: inventory.Volume}, problems=(409, 507), body=NewVolume
)
async def make_volume(parts: ApiParts, caller: Caller, request: Request) -> Response:
    body = await request_parsing.body(request, NewVolume, parts.config.request_body_bytes_max)
    made = await parts.inventory.make_volume(caller, body)
    return json_response(serializers.volume(made), 201, {"Location": f"/v1/volumes/{made.id}"})


@volumes_routes.add("GET /v1/volumes/{reference}", "Read a volume", {200: inventory.Volume})
async def volume(parts: ApiParts, caller: Caller, request: Request) -> inventory.Volume:
    return serializers.volume(await parts.inventory.find_volume(caller, request.path_params["reference"]))


@volumes_routes.add(
    "DELETE /v1/volumes/{reference}", "Delete a volume that is not attached", {204: None}, problems=(409,)
)
async def delete_volume(parts: ApiParts, caller: Caller, request: Request) -> None:
    await parts.inventory.delete_volume(caller, request.path_params["reference"])


# --------------------------------------------------------------------------------------------------------- tokens


@tokens_routes.add("GET /v1/tokens", "List tokens", {200: inventory.TokenList})
async def tokens(parts: ApiParts, caller: Caller, request: Request) -> inventory.TokenList:
    now_ms = parts.instances.now_ms()
    found = await parts.tokens.list(caller)
    return inventory.TokenList(items=tuple(serializers.token(one, now_ms) for one in found))


@tokens_routes.add(
    "POST /v1/tokens",
    "Create a token; its secret is shown only once",
    {201: inventory.MadeToken},
    problems=(409,),
    body=inventory.NewToken,
    audited="token.create",
)
async def make_token(parts: ApiParts, caller: Caller, request: Request) -> Response:
    body = await request_parsing.body(request, inventory.NewToken, parts.config.request_body_bytes_max)
    project = body.project or caller.project
    audit_entries.note(request, target=body.name, details={"role": body.role.value, "project_of_token": project})
    if body.host is not None:
        parts.hosts.require_present_name(caller, body.host)
    expires_in_ms = duration_ms("expires_in", body.expires_in)
    project = body.project or caller.project
    is_new = not parts.projects.exists(project)
    token, secret = await parts.tokens.make(
        caller,
        body.name,
        body.role,
        project,
        body.host,
        body.groups,
        expires_in_ms=expires_in_ms,
        server_admin=body.server_admin,
    )
    return _with_secret(parts, token, secret, 201, project_created=is_new)


@tokens_routes.add(
    "POST /v1/tokens/{reference}/rotate",
    "Give a token a new secret, which is shown only once",
    {200: inventory.MadeToken},
    body=inventory.TokenRotation,
    audited="token.rotate",
)
async def rotate_token(parts: ApiParts, caller: Caller, request: Request) -> Response:
    body = await request_parsing.body(request, inventory.TokenRotation, parts.config.request_body_bytes_max)
    token, secret = await parts.tokens.rotate(
        caller,
        request.path_params["reference"],
        overlap_ms=duration_ms("overlap", body.overlap) or 0,
        expires_in_ms=duration_ms("expires_in", body.expires_in),
    )
    return _with_secret(parts, token, secret, 200)


def _with_secret(parts: ApiParts, token: Token, secret: str, status: int, *, project_created: bool = False) -> Response:
    view = serializers.token(token, parts.instances.now_ms())
    made = inventory.MadeToken(token=view, secret=secret, project_created=project_created)
    return json_response(made, status, {"Cache-Control": "no-store"})


@tokens_routes.add(
    "DELETE /v1/tokens/{reference}",
    "Delete a token, and close its connections at once",
    {204: None},
    audited="token.delete",
)
async def delete_token(parts: ApiParts, caller: Caller, request: Request) -> None:
    await parts.tokens.delete(caller, request.path_params["reference"])
