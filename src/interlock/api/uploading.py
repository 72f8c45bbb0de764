"""Multipart uploads, streamed to files in the server's folder: never more of one in memory than a few chunks.

What the files are is not judged here; see `ports.ImageFiles`.
"""

from __future__ import annotations

import asyncio
import difflib
import errno
import os
import re
import shutil
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import BinaryIO, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from interlock.api import asking
from interlock.api.problems import Bad
from interlock.core.errors import Invalid, StoreFull

TEXT_BYTES_MAX: Final = 4096
"""The longest text field, in bytes."""
_SUFFIX: Final = re.compile(rb"\.[A-Za-z0-9]{1,8}\Z")
"""What a file's name says of its format; that much of the name is kept."""
_ENVELOPE_BYTES: Final = 64 * 1024
"""What the boundaries, headers and text fields of a form may add to the files."""
FOLDER_PREFIX: Final = "upload-"
"""How the names of the folders begin that uploads are received in."""
_BUFFER_BYTES: Final = 1024 * 1024
"""How much is gathered before a thread writes it to the disk."""


def sweep(folder: Path) -> None:
    """Remove what a server that was killed had received of uploads in `folder`. Only while none is under way."""
    for left in folder.glob(f"{FOLDER_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


async def receive(
    request: Request, folder: Path, texts: Collection[str], files: Collection[str], bytes_max: int
) -> tuple[dict[str, str], dict[str, Path]]:
    """Take a form into `folder`: the text fields, and for each file its path: its field's name, and its own suffix.

    Raises:
        Bad: it is no form, or larger than `bytes_max`.
        Invalid: a field is unknown, comes twice, or is too long.
        StoreFull: there is no room.
    """
    media_type, options = parse_options_header(request.headers.get("content-type"))
    if media_type != b"multipart/form-data":
        raise Bad("media-type", "A file is uploaded as multipart/form-data.")
    boundary = options.get(b"boundary")
    if not boundary:
        raise Bad("not-a-form", "The Content-Type names no boundary.")
    form = _Form(folder, texts, files)
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        async for chunk in _within(request, bytes_max):
            parser.write(chunk)
            if form.gathered >= _BUFFER_BYTES:
                await asyncio.to_thread(form.write)
        await asyncio.to_thread(form.write)
    except FormParserError as error:
        raise Bad("not-a-form", f"The body is not a form: {error}.") from None
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise StoreFull("There is no room for the upload on the server.", remedy="Free some space.") from None
        raise
    finally:
        form.close()
    if not form.ended:
        raise Bad("not-a-form", "The form ends before its last boundary.")
    return form.texts(), form.paths


async def _within(request: Request, bytes_max: int) -> AsyncIterator[bytes]:
    """The chunks of the body, as long as they are no more than allowed, whatever the headers say."""
    told = request.headers.get("content-length", "")
    received = int(told) if told.isdecimal() else 0
    most = bytes_max + _ENVELOPE_BYTES
    if received > most:
        raise await asking.too_large(request, bytes_max)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > most:
            raise await asking.too_large(request, bytes_max)
        if chunk:
            yield chunk


class _Form:
    """What has been seen of a form, as the parser tells it."""

    def __init__(self, folder: Path, texts: Collection[str], files: Collection[str]) -> None:
        self._folder = folder
        self._known = (*texts, *files)
        self._file_names = files
        self._texts: dict[str, bytearray] = {}
        self._files: dict[str, BinaryIO] = {}
        self._gathered: list[tuple[BinaryIO, bytes]] = []
        self._name = ""
        self._suffix = ""
        self._header = bytearray()
        self._value = bytearray()
        self.paths: dict[str, Path] = {}
        self.gathered = 0
        self.ended = False

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._take,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._name = ""

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            named = _SUFFIX.search(options.get(b"filename", b""))
            self._suffix = "" if named is None else named.group().decode()
        self._header.clear()
        self._value.clear()

    def _open(self) -> None:
        name = self._name
        if name not in self._known:
            near = difflib.get_close_matches(name, self._known, n=1)
            known = f"Did you mean `{near[0]}`?" if near else f"The fields are: {', '.join(sorted(self._known))}."
            raise Invalid(f"The form has an unknown field {name[:80]!r}.", remedy=known)
        if name in self._texts or name in self.paths:
            raise Invalid(f"The form has the field {name!r} twice.")
        if name in self._file_names:
            self.paths[name] = self._folder / f"{name}{self._suffix}"
            self._files[name] = os.fdopen(os.open(self.paths[name], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        else:
            self._texts[name] = bytearray()

    def _take(self, data: bytes, start: int, end: int) -> None:
        part = data[start:end]
        if self._name in self._files:
            self._gathered.append((self._files[self._name], part))
            self.gathered += len(part)
            return
        text = self._texts[self._name]
        text += part
        if len(text) > TEXT_BYTES_MAX:
            raise Invalid(f"The field {self._name} is longer than {TEXT_BYTES_MAX} bytes.")

    def _end(self) -> None:
        self.ended = True

    def write(self) -> None:
        """Write what was gathered. Blocks."""
        for file, part in self._gathered:
            file.write(part)
        self._gathered.clear()
        self.gathered = 0
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def texts(self) -> dict[str, str]:
        try:
            return {name: text.decode() for name, text in self._texts.items()}
        except UnicodeDecodeError:
            raise Invalid("A text field of the form is not UTF-8.") from None
