"""`/v1/images`, `/v1/volumes` and `/v1/tokens`."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from interlock.api import asking, schemas, uploading, views
from interlock.api.doors import ApiParts, Door, answer
from interlock.core.errors import Invalid
from interlock.core.records import Image
from interlock.ports import Role
from interlock.service.callers import Caller
from interlock.service.expectations import in_words, what_instead
from interlock.service.wishes import PATTERNS, NewVolume

_FIELDS: Final = frozenset(field.name for field in msgspec.structs.fields(schemas.ImageUpload))
_FILES: Final = frozenset({"disk", "kernel", "initrd"})

# --------------------------------------------------------------------------------------------------------- images


async def images(parts: ApiParts, caller: Caller, request: Request) -> Response:
    asking.only(request.query_params)
    return answer(schemas.ImageList(items=tuple(views.image(one) for one in await parts.inventory.images(caller))))


async def add_image(parts: ApiParts, caller: Caller, request: Request) -> Response:
    """Take an upload to a folder that goes when this is over, and have the service bring in what is in it."""
    caller.require(Role.ADMIN, "add images")
    with tempfile.TemporaryDirectory(prefix=uploading.FOLDER_PREFIX, dir=parts.config.folder) as folder:
        bytes_max = parts.config.upload_bytes_max
        texts, files = await uploading.receive(request, Path(folder), _FIELDS, _FILES, bytes_max)
        image = await _keep(parts, caller, _check(texts, files), files)
    return answer(views.image(image), 201, {"Location": "/v1/images"})


def _check(texts: dict[str, str], files: Collection[str]) -> schemas.ImageUpload:
    """What the form says of the image, if the files are those of its kind."""
    try:
        upload = msgspec.convert(texts, schemas.ImageUpload)
    except msgspec.ValidationError as error:
        remedy = what_instead(str(error), schemas.ImageUpload) or f"The fields are: {', '.join(sorted(_FIELDS))}."
        raise Invalid(f"The form is wrong: {in_words(str(error), PATTERNS)}.", remedy=remedy) from None
    needed, optional = ({"disk"}, set[str]()) if upload.kind == "disk" else ({"kernel"}, {"initrd"})
    if not needed <= set(files) <= needed | optional:
        what = "the file `disk`" if upload.kind == "disk" else "the file `kernel`, and `initrd` if it has one"
        raise Invalid(f"An image of the kind {upload.kind} takes {what}; found {', '.join(sorted(files)) or 'none'}.")
    return upload


async def _keep(parts: ApiParts, caller: Caller, upload: schemas.ImageUpload, paths: dict[str, Path]) -> Image:
    if upload.kind == "disk":
        return await parts.inventory.add_disk_image(caller, upload.name, paths["disk"], upload.sha256)
    return await parts.inventory.add_kernel_image(
        caller, upload.name, paths["kernel"], paths.get("initrd"), upload.cmdline
    )


async def build_small(parts: ApiParts, caller: Caller, request: Request) -> Response:
    wish = await asking.body(request, schemas.NewSmallImage, parts.config.request_body_bytes_max)
    image = await parts.inventory.build_small_image(caller, wish.name, wish.form)
    return answer(views.image(image), 201, {"Location": "/v1/images"})


async def delete_image(parts: ApiParts, caller: Caller, request: Request) -> Response:
    await parts.inventory.delete_image(caller, request.path_params["reference"])
    return Response(status_code=204)


# -------------------------------------------------------------------------------------------------------- volumes


async def volumes(parts: ApiParts, caller: Caller, request: Request) -> Response:
    asking.only(request.query_params)
    return answer(schemas.VolumeList(items=tuple(views.volume(one) for one in await parts.inventory.volumes(caller))))


async def make_volume(parts: ApiParts, caller: Caller, request: Request) -> Response:
    wish = await asking.body(request, NewVolume, parts.config.request_body_bytes_max)
    made = await parts.inventory.make_volume(caller, wish)
    return answer(views.volume(made), 201, {"Location": f"/v1/volumes/{made.id}"})


async def volume(parts: ApiParts, caller: Caller, request: Request) -> Response:
    return answer(views.volume(await parts.inventory.find_volume(caller, request.path_params["reference"])))


async def delete_volume(parts: ApiParts, caller: Caller, request: Request) -> Response:
    await parts.inventory.delete_volume(caller, request.path_params["reference"])
    return Response(status_code=204)


# --------------------------------------------------------------------------------------------------------- tokens


async def tokens(parts: ApiParts, caller: Caller, request: Request) -> Response:
    asking.only(request.query_params)
    return answer(schemas.TokenList(items=tuple(views.token(one) for one in await parts.callers.list(caller))))


async def make_token(parts: ApiParts, caller: Caller, request: Request) -> Response:
    wish = await asking.body(request, schemas.NewToken, parts.config.request_body_bytes_max)
    token, secret = await parts.callers.make(caller, wish.name, wish.role, wish.project)
    made = schemas.MadeToken(token=views.token(token), secret=secret)
    return answer(made, 201, {"Cache-Control": "no-store"})


async def delete_token(parts: ApiParts, caller: Caller, request: Request) -> Response:
    await parts.callers.delete(caller, request.path_params["reference"])
    return Response(status_code=204)


def _form() -> dict[str, Any]:
    text = {name: {"type": "string"} for name in sorted(_FIELDS)}
    files = {name: {"type": "string", "format": "binary"} for name in sorted(_FILES)}
    return {"type": "object", "properties": {**text, **files}, "required": ["name", "kind"]}


DOORS: Final = (
    Door(
        method="GET",
        path="/v1/images",
        endpoint=images,
        summary="List images",
        answers={200: schemas.ImageList},
        tag="images",
    ),
    Door(
        method="POST",
        path="/v1/images",
        endpoint=add_image,
        summary="Upload an image",
        form=_form(),
        answers={201: schemas.Image},
        problems=(400, 409, 413, 415, 422, 507),
        tag="images",
    ),
    Door(
        method="POST",
        path="/v1/images/small",
        endpoint=build_small,
        summary="Build the small guest from the distribution's packages",
        body=schemas.NewSmallImage,
        answers={201: schemas.Image},
        problems=(409, 503, 507),
        tag="images",
    ),
    Door(
        method="DELETE",
        path="/v1/images/{reference}",
        endpoint=delete_image,
        summary="Delete an image that no instance uses",
        answers={204: None},
        problems=(404, 409),
        tag="images",
    ),
    Door(
        method="GET",
        path="/v1/volumes",
        endpoint=volumes,
        summary="List volumes",
        answers={200: schemas.VolumeList},
        tag="volumes",
    ),
    Door(
        method="POST",
        path="/v1/volumes",
        endpoint=make_volume,
        summary="Make an empty volume",
        body=NewVolume,
        answers={201: schemas.Volume},
        problems=(409, 503, 507),
        tag="volumes",
    ),
    Door(
        method="GET",
        path="/v1/volumes/{reference}",
        endpoint=volume,
        summary="Read a volume",
        answers={200: schemas.Volume},
        problems=(404,),
        tag="volumes",
    ),
    Door(
        method="DELETE",
        path="/v1/volumes/{reference}",
        endpoint=delete_volume,
        summary="Delete a volume that no instance has",
        answers={204: None},
        problems=(404, 409),
        tag="volumes",
    ),
    Door(
        method="GET",
        path="/v1/tokens",
        endpoint=tokens,
        summary="List tokens",
        answers={200: schemas.TokenList},
        tag="tokens",
    ),
    Door(
        method="POST",
        path="/v1/tokens",
        endpoint=make_token,
        summary="Make a token; its secret is shown this once",
        body=schemas.NewToken,
        answers={201: schemas.MadeToken},
        problems=(409,),
        tag="tokens",
    ),
    Door(
        method="DELETE",
        path="/v1/tokens/{reference}",
        endpoint=delete_token,
        summary="Delete a token",
        answers={204: None},
        problems=(404, 422),
        tag="tokens",
    ),
)
