"""Multipart uploads, streamed to files in the data folder. `ports.ImageFiles` validates their content."""

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

from interlock.api.http import request_parsing
from interlock.api.http.problems import HttpProblem
from interlock.core.errors import Invalid, StoreFull

TEXT_BYTES_MAX: Final = 4096
"""The longest text field, in bytes."""
_SUFFIX: Final = re.compile(rb"\.[A-Za-z0-9]{1,8}\Z")
"""The suffix of an uploaded file's name, which is kept because it may name the format."""
_ENVELOPE_BYTES: Final = 64 * 1024
"""Limit of a form's boundaries, headers and text fields together."""
FOLDER_PREFIX: Final = "upload-"
"""Prefix of the temporary folders of uploads."""
_BUFFER_BYTES: Final = 1024 * 1024
"""How much is buffered before a thread writes it to the disk."""


def remove_leftovers(folder: Path) -> None:
    """Delete the partial uploads of a killed server. Call it only while no upload runs."""
    for leftover in folder.glob(f"{FOLDER_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


async def receive(
    request: Request, folder: Path, texts: Collection[str], files: Collection[str], bytes_max: int
) -> tuple[dict[str, str], dict[str, Path]]:
    """Receive a form into `folder`. Return the text fields, and each file's path: the field's name and a suffix.

    Raises:
        HttpProblem: invalid form, or larger than `bytes_max`.
        Invalid: unknown, duplicate or too long field.
        StoreFull: no space left.
    """
    media_type, options = parse_options_header(request.headers.get("content-type"))
    if media_type != b"multipart/form-data":
        raise HttpProblem("media-type", "Unsupported media type.", remedy="Upload files as multipart/form-data.")
    boundary = options.get(b"boundary")
    if not boundary:
        raise HttpProblem("not-a-form", "Invalid Content-Type: boundary missing.")
    form = _Form(folder, texts, files)
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        async for chunk in _limited_body(request, bytes_max):
            parser.write(chunk)
            if form.buffered_bytes >= _BUFFER_BYTES:
                await asyncio.to_thread(form.write)
        await asyncio.to_thread(form.write)
    except FormParserError as error:
        raise HttpProblem("not-a-form", f"Invalid form: {error}.") from None
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise StoreFull("No space left on the server's disk for the upload.", remedy="Free some space.") from None
        raise
    finally:
        form.close()
    if not form.ended:
        raise HttpProblem("not-a-form", "Invalid form: the last boundary is missing.")
    return form.texts(), form.paths


async def _limited_body(request: Request, bytes_max: int) -> AsyncIterator[bytes]:
    """Yield the chunks of the body. Raises `HttpProblem` if it is too large, whatever Content-Length says."""
    declared = request.headers.get("content-length", "")
    most = bytes_max + _ENVELOPE_BYTES
    if declared.isdecimal() and int(declared) > most:
        raise await request_parsing.too_large(request, bytes_max)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > most:
            raise await request_parsing.too_large(request, bytes_max)
        if chunk:
            yield chunk


class _Form:
    """Callbacks of the form parser, and the fields and files received so far."""

    def __init__(self, folder: Path, texts: Collection[str], files: Collection[str]) -> None:
        self._folder = folder
        self._known = (*texts, *files)
        self._file_names = files
        self._texts: dict[str, bytearray] = {}
        self._files: dict[str, BinaryIO] = {}
        self._buffer: list[tuple[BinaryIO, bytes]] = []
        self._name = ""
        self._suffix = ""
        self._header = bytearray()
        self._value = bytearray()
        self.paths: dict[str, Path] = {}
        self.buffered_bytes = 0
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
            raise Invalid(f"Unknown form field {name[:80]!r}.", remedy=known)
        if name in self._texts or name in self.paths:
            raise Invalid(f"Duplicate form field {name!r}.")
        if name in self._file_names:
            self.paths[name] = self._folder / f"{name}{self._suffix}"
            self._files[name] = os.fdopen(os.open(self.paths[name], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        else:
            self._texts[name] = bytearray()

    def _take(self, data: bytes, start: int, end: int) -> None:
        part = data[start:end]
        if self._name in self._files:
            self._buffer.append((self._files[self._name], part))
            self.buffered_bytes += len(part)
            return
        text = self._texts[self._name]
        text += part
        if len(text) > TEXT_BYTES_MAX:
            raise Invalid(f"Form field {self._name} too long: the limit is {TEXT_BYTES_MAX} bytes.")

    def _end(self) -> None:
        self.ended = True

    def write(self) -> None:
        """Write the buffer to the files. Blocks."""
        for file, part in self._buffer:
            file.write(part)
        self._buffer.clear()
        self.buffered_bytes = 0
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def texts(self) -> dict[str, str]:
        try:
            return {name: text.decode() for name, text in self._texts.items()}
        except UnicodeDecodeError:
            raise Invalid("Invalid UTF-8 in a text field of the form.") from None
