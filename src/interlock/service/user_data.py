"""Detects the format of user-data as cloud-init does, and warns about what cloud-init would ignore.

Tested against recorded results of cloud-init: `tests/service/cloud_init_answers.json`.
"""

from __future__ import annotations

import base64
import binascii
import email
import email.message
import re
import zlib
from collections.abc import Iterator
from typing import Final

_MIME_BYTES: Final = 4096
"""The MIME header must be within so many bytes."""
_UNPACKED_BYTES_MAX: Final = 4 << 20
_GZIP: Final = b"\x1f\x8b"
_GZIP_WINDOW_BITS: Final = 31
_BEGINNINGS: Final = {
    "#include-once": "text/x-include-once-url",
    "#include": "text/x-include-url",
    "#!": "text/x-shellscript",
    "#cloud-config-archive": "text/cloud-config-archive",
    "#cloud-config-jsonp": "text/cloud-config-jsonp",
    "#cloud-config": "text/cloud-config",
    "#part-handler": "text/part-handler",
    "#cloud-boothook": "text/cloud-boothook",
    "## template: jinja": "text/jinja2",
    **{f"text/x-shellscript-per-{when}": f"text/x-shellscript-per-{when}" for when in ("boot", "instance", "once")},
}
"""MIME type by prefix; a longer prefix comes before its own prefixes."""
_HANDLED: Final = frozenset(_BEGINNINGS.values())
_DETECTED_KINDS: Final = frozenset({"text/plain", "text/x-not-multipart", "text/x-shellscript"})
_COMPRESSED: Final = frozenset(
    f"application/{name}"
    for name in (
        *("gzip", "gzip-compressed", "gzipped", "x-compress", "x-compressed", "x-gunzip", "x-gzip"),
        "x-gzip-compressed",
    )
)
_EXPECTED: Final = "begin it with `#cloud-config`, with `#!` and a shell, or with the headers of a MIME message"


def warnings(data: bytes) -> tuple[str, ...]:
    """Return warnings about parts of user-data that cloud-init would ignore, one sentence each."""
    if not data.strip():
        return ("user_data: empty; cloud-init ignores it.",)
    unpacked = _unpacked(data)
    if not _is_mime(unpacked):
        complaint = _complaint(type_of(unpacked), unpacked, "it")
        if complaint is None:
            return ()
        return (f"user_data: {complaint}{_hint(data, unpacked)}",)
    found = list(parts(data))
    if not found:
        return ("user_data: MIME message without parts; cloud-init ignores it.",)
    complaints = (
        _complaint(kind, content, f"part {number} ({kind or 'unknown type'})")
        for number, (kind, content) in enumerate(found, start=1)
    )
    return tuple(f"user_data: {complaint}." for complaint in complaints if complaint is not None)


def parts(data: bytes) -> Iterator[tuple[str | None, bytes]]:
    """Yield the MIME type and content of each part of user-data; the type is None if unknown."""
    data = _unpacked(data)
    if not _is_mime(data):
        yield type_of(data), data
        return
    try:
        message = email.message_from_string(data.decode())
    except UnicodeDecodeError:
        yield None, data
        return
    for part in message.walk():
        if part.get_content_maintype() == "multipart":
            continue
        kind, content = part.get_content_type(), _content(part)
        if kind in _COMPRESSED:
            content = _unpacked(content)
            kind = "text/plain"
        yield (type_of(content) or kind) if kind in _DETECTED_KINDS else kind, content


def type_of(data: bytes) -> str | None:
    """Return the MIME type by the content's prefix; None if cloud-init knows none."""
    text = data.decode("utf-8", "surrogateescape").lower().lstrip()
    return next((kind for beginning, kind in _BEGINNINGS.items() if text.startswith(beginning)), None)


def _complaint(kind: str | None, content: bytes, what: str) -> str | None:
    """Return why cloud-init ignores a part, or None."""
    if kind not in _HANDLED:
        return f"cloud-init ignores {what}: unknown format"
    if kind.startswith("text/x-shellscript") and not content.startswith(b"#!"):
        return f"cloud-init cannot run {what}: a script must begin with `#!`, with nothing before it"
    if kind != "text/jinja2":
        return None
    if content[:1].isspace():
        return f"cloud-init ignores {what}: a template must begin with its first line, with nothing before it"
    rest = content.partition(b"\n")[2]
    if type_of(rest) in _HANDLED:
        return None
    return f"cloud-init ignores {what}: unknown format after `## template: jinja`"


def _hint(data: bytes, unpacked: bytes) -> str:
    if data.startswith(_GZIP) and unpacked is data:
        return ": it is damaged and cannot be decompressed."
    if unpacked.startswith(b"\xef\xbb\xbf"):
        return ": remove the byte order mark at its beginning."
    if unpacked.startswith((b"\xff\xfe", b"\xfe\xff")):
        return ": it is in UTF-16; write it in UTF-8."
    if re.match(rb"\s*(content-type|from)\b", unpacked, re.IGNORECASE):
        return ": a MIME message requires the header `MIME-Version: 1.0`."
    try:
        decoded = base64.b64decode(b"".join(unpacked.split()), validate=True)
    except (binascii.Error, ValueError):
        decoded = b""
    if decoded and (decoded.startswith(_GZIP) or type_of(decoded) or _is_mime(decoded)):
        return ": it is in base64; give that as `user_data_base64`, or the file itself."
    return f"; {_EXPECTED}." if type_of(unpacked) is None else "."


def _is_mime(data: bytes) -> bool:
    return b"mime-version:" in data[:_MIME_BYTES].lower()


def _content(part: email.message.Message) -> bytes:
    content = part.get_payload(decode=True)
    return content if isinstance(content, bytes) else b""


def _unpacked(data: bytes) -> bytes:
    """Decompress gzip data up to a limit; return other data unchanged."""
    found, rest = b"", data
    try:
        while rest.startswith(_GZIP) and len(found) < _UNPACKED_BYTES_MAX:
            stream = zlib.decompressobj(_GZIP_WINDOW_BITS)
            found += stream.decompress(rest, _UNPACKED_BYTES_MAX - len(found) + 1)
            if not stream.eof:
                return found if len(found) > _UNPACKED_BYTES_MAX else data
            rest = stream.unused_data.lstrip(b"\0")
    except zlib.error:
        return data
    return data if rest is data or (rest and len(found) < _UNPACKED_BYTES_MAX) else found
