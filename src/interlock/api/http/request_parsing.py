"""Request parsing: body, query parameters and headers, with validation."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import re
from typing import Any, Final, TypeVar

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, HTTPConnection, Request

from interlock.api.http.problems import HttpProblem
from interlock.api.http.protocol import received_body
from interlock.core.durations import parse_duration
from interlock.core.errors import Invalid
from interlock.service.request_models import PATTERNS
from interlock.service.validation_messages import in_words, what_instead

BodyT = TypeVar("BodyT")
DefaultT = TypeVar("DefaultT", str, None)
_HEADERS: Final = "interlock.headers"

WAIT_MS_MAX: Final = 120_000
"""The longest that a request is held open; longer waits are capped."""
KEY_LENGTH_MAX: Final = 255
_DISCARD_S: Final = 2.0
"""For how long, and how much, of a body that is too large is read and discarded before the response."""
_DISCARD_BYTES: Final = 1024 * 1024
_PREFER_WAIT: Final = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?(?:$|[,;\s])", re.IGNORECASE)
_DECODERS: Final[dict[Any, msgspec.json.Decoder[Any]]] = {}


def header(request: HTTPConnection, name: str, default: DefaultT) -> str | DefaultT:
    """Return the first header of that name in lower case, or the default.

    A dictionary of all of them is made once: Starlette goes through the list each time.
    """
    headers = request.scope.get(_HEADERS)
    if headers is None:
        headers = request.scope[_HEADERS] = dict(reversed(request.scope["headers"]))
    value = headers.get(name.encode())
    return default if value is None else value.decode("latin-1")


async def body(request: Request, kind: type[BodyT], bytes_max: int) -> BodyT:
    """Decode the JSON body as a `kind`.

    Raises:
        HttpProblem: unsupported media type, body too large, or invalid JSON.
        Invalid: a field is invalid; names the field and what was expected.
    """
    sent_type = media_type(request)
    if sent_type != "application/json" and not sent_type.endswith("+json"):
        raise HttpProblem("media-type", f"Unsupported media type {sent_type[:80]!r}.", remedy="Send application/json.")
    content = await _read(request, bytes_max)
    decoder = _DECODERS.get(kind)
    if decoder is None:
        decoder = _DECODERS[kind] = msgspec.json.Decoder(kind)
    try:
        value: BodyT = decoder.decode(content)
        _reject_duplicate_keys(content)
    except msgspec.ValidationError as error:
        raise Invalid(
            f"Invalid body: {in_words(str(error), PATTERNS)}.", remedy=what_instead(str(error), kind)
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpProblem("not-json", f"Invalid JSON: {error}.") from None
    return value


def _reject_duplicate_keys(content: bytes) -> None:
    """Raise `HttpProblem` if any JSON object has a key twice: parsers disagree about which value counts."""
    once = "Send each key once."

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        read = dict(pairs)
        if len(read) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise HttpProblem("duplicate-key", f"Duplicate key {twice[:80]!r} in one JSON object.", remedy=once)
        return read

    if content.count(b":") > 1:
        json.loads(content, object_pairs_hook=unique)


async def text(request: Request, bytes_max: int) -> str:
    """Return the body as text, whatever its media type.

    Raises:
        HttpProblem: body too large.
        Invalid: not UTF-8.
    """
    try:
        return (await _read(request, bytes_max)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Invalid(f"Invalid UTF-8 in the body: {error.reason} at byte {error.start}.") from None


def media_type(request: Request) -> str:
    """Return the body's media type in lower case without parameters; JSON without a Content-Type."""
    return header(request, "content-type", "application/json").partition(";")[0].strip().lower()


async def _read(request: Request, bytes_max: int) -> bytes:
    whole = received_body(request.scope)
    if whole is not None:
        if len(whole) > bytes_max:
            raise await too_large(request, bytes_max, more=False)
        return whole
    declared = header(request, "content-length", "")
    if declared.isdecimal() and int(declared) > bytes_max:
        raise await too_large(request, bytes_max)
    chunks: list[bytes] = []
    length = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        length += len(chunks[-1])
        if length > bytes_max:
            raise await too_large(request, bytes_max, more=message.get("more_body", False))
        if not message.get("more_body"):
            return b"".join(chunks)


async def too_large(request: Request, bytes_max: int, *, more: bool = True) -> HttpProblem:
    """Return the problem for a body that is too large, after reading and discarding some more of it.

    Closing the connection while the client still sends would reset it, and the client would not see the response.
    """
    discarded = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while more and discarded <= _DISCARD_BYTES:
                message = await request.receive()
                discarded += len(message.get("body", b""))
                more = message.get("more_body", False)
    return HttpProblem("too-large", f"The body is larger than {bytes_max} bytes.", Connection="close")


def check_parameters(query: QueryParams, *names: str) -> None:
    """Raise `Invalid` for an unknown or a duplicate query parameter."""
    for name in query:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            known = f"Did you mean `{near[0]}`?" if near else f"Known parameters: {', '.join(names) or 'none'}."
            raise Invalid(f"Unknown query parameter {name[:80]!r}.", remedy=known)
        if len(query.getlist(name)) > 1:
            raise Invalid(f"Duplicate query parameter {name!r}.", remedy="Send each parameter once.")


def integer(query: QueryParams, name: str, default: int, least: int, most: int) -> int:
    """Return an integer query parameter. Raises `Invalid` if it is not an integer or out of bounds."""
    text = query.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 18 or not least <= int(text) <= most:  # noqa: PLR2004
        raise Invalid(f"Invalid {name} {text[:80]!r}: expected an integer from {least} to {most}.")
    return int(text)


def boolean(query: QueryParams, name: str) -> bool:
    """Return a boolean query parameter, `true` or `false`; the default is false. Raises `Invalid`."""
    text = query.get(name, "false")
    if text not in {"true", "false"}:
        raise Invalid(f"Invalid {name} {text[:80]!r}: expected true or false.")
    return text == "true"


def wait_ms(query: QueryParams) -> int:
    """Return the query parameter `wait`, such as `30s`, in milliseconds, at most `WAIT_MS_MAX`; the default is 0."""
    text = query.get("wait")
    if text is None:
        return 0
    length = parse_duration(text)
    if length is None:
        raise Invalid(f"Invalid wait {text[:80]!r}: expected a duration such as 30s or 500ms.")
    return min(length, WAIT_MS_MAX)


def preferred_wait_s(request: Request) -> int | None:
    """Return the seconds of `Prefer: wait=N`, or None. An invalid preference is ignored, as RFC 7240 requires."""
    found = _PREFER_WAIT.search(header(request, "prefer", ""))
    return min(int(found.group(1)), WAIT_MS_MAX // 1000) if found else None


def idempotency_key(request: Request) -> str | None:
    """Return the `Idempotency-Key`, or None. Raises `HttpProblem` for an invalid one."""
    key = header(request, "idempotency-key", None)
    if key is None:
        return None
    if not 1 <= len(key) <= KEY_LENGTH_MAX or not key.isascii() or not key.isprintable():
        raise HttpProblem(
            "bad-header", f"Invalid Idempotency-Key: expected 1 to {KEY_LENGTH_MAX} printable ASCII characters."
        )
    return key


def if_generation(request: Request) -> int | None:
    """Return the generation in `If-Match`, or None for `*` or no header. Raises `HttpProblem` for another ETag format.

    An instance's ETag is its generation, a hyphen and a digest; the generation alone is accepted.
    """
    tag = header(request, "if-match", None)
    if tag is None or tag.strip() == "*":
        return None
    text = tag.strip().removeprefix("W/").removeprefix('"').removesuffix('"').partition("-")[0]
    if not text.isascii() or not text.isdecimal() or len(text) > 18:  # noqa: PLR2004
        raise HttpProblem(
            "bad-header", f'Invalid If-Match {tag[:80]!r}: expected the ETag of an instance, such as "7".'
        )
    return int(text)


def matches_etag(request: Request, etag: str) -> bool:
    """Return whether `If-None-Match` has that ETag, by the weak comparison of RFC 9110, 13.1.2."""
    tags = [tag.strip().removeprefix("W/") for tag in header(request, "if-none-match", "").split(",")]
    return "*" in tags or etag.removeprefix("W/") in tags
