"""What a request says: its body, its query and its headers, checked before anything is done."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import re
from typing import Any, Final, TypeVar

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import Request

from interlock.api.problems import Bad
from interlock.core.errors import Invalid
from interlock.policies.durations import parse_duration
from interlock.service.expectations import in_words, what_instead
from interlock.service.wishes import PATTERNS

BodyT = TypeVar("BodyT")

WAIT_MS_MAX: Final = 120_000
"""The longest that a request is held open; a longer wish is cut to it."""
KEY_LENGTH_MAX: Final = 255
_LINGER_S: Final = 2.0
"""For how long, and how much, is read of a body that is too large before it is answered."""
_LINGER_BYTES: Final = 1024 * 1024
_PREFER_WAIT: Final = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?(?:$|[,;\s])", re.IGNORECASE)
_DECODERS: Final[dict[Any, msgspec.json.Decoder[Any]]] = {}


async def body(request: Request, kind: type[BodyT], bytes_max: int) -> BodyT:
    """The JSON body as a value of `kind`.

    Raises:
        Bad: it is of another media type, too large, or no JSON.
        Invalid: it is JSON, and not what was expected; names where and what.
    """
    sent_as = media_type(request)
    if sent_as != "application/json" and not sent_as.endswith("+json"):
        raise Bad("media-type", f"The body is {sent_as[:80]!r}.", remedy="Send application/json.")
    content = await _read(request, bytes_max)
    decoder = _DECODERS.get(kind)
    if decoder is None:
        decoder = _DECODERS[kind] = msgspec.json.Decoder(kind)
    try:
        value: BodyT = decoder.decode(content)
    except msgspec.ValidationError as error:
        raise Invalid(
            f"The body is wrong: {in_words(str(error), PATTERNS)}.", remedy=what_instead(str(error), kind)
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Bad("not-json", f"The body is not JSON: {error}.") from None
    return value


async def text(request: Request, bytes_max: int) -> str:
    """The body as text, whatever its media type.

    Raises:
        Bad: it is too large.
        Invalid: it is not UTF-8.
    """
    try:
        return (await _read(request, bytes_max)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Invalid(f"The body is not UTF-8 text: {error.reason} at byte {error.start}.") from None


def media_type(request: Request) -> str:
    """The media type of the body, in small letters and without its parameters; JSON if none is named."""
    return request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()


async def _read(request: Request, bytes_max: int) -> bytes:
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > bytes_max:
        raise await too_large(request, bytes_max)
    text = b""
    async for chunk in request.stream():
        text += chunk
        if len(text) > bytes_max:
            raise await too_large(request, bytes_max)
    return text


async def too_large(request: Request, bytes_max: int) -> Bad:
    """The problem of a body that is too large.

    A little more of it is read and thrown away: a connection that is closed on a client that is still sending is
    reset, and the client would never see the answer.
    """
    thrown_away = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            async for chunk in request.stream():
                thrown_away += len(chunk)
                if thrown_away > _LINGER_BYTES:
                    break
    return Bad("too-large", f"The body is larger than {bytes_max} bytes.", Connection="close")


def only(query: QueryParams, *names: str) -> None:
    """Raise `Invalid` for a query parameter that the path does not know, or that is there twice."""
    for name in query:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            known = f"Did you mean `{near[0]}`?" if near else f"It takes: {', '.join(names) or 'none'}."
            raise Invalid(f"There is no query parameter {name[:80]!r} here.", remedy=known)
        if len(query.getlist(name)) > 1:
            raise Invalid(f"The query parameter {name!r} is there twice.", remedy="Ask once for each.")


def number(query: QueryParams, name: str, default: int, least: int, most: int) -> int:
    """A whole number of the query. Raises `Invalid` if it is none, or out of its bounds."""
    text = query.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 18 or not least <= int(text) <= most:  # noqa: PLR2004
        raise Invalid(f"{name}: {text[:80]!r}; expected a whole number from {least} to {most}.")
    return int(text)


def wait_ms(query: QueryParams) -> int:
    """The query's `wait`, such as `30s`, in milliseconds and no more than is granted; 0 if it is not there."""
    text = query.get("wait")
    if text is None:
        return 0
    length = parse_duration(text)
    if length is None:
        raise Invalid(f"wait: {text[:80]!r}; expected a length of time such as 30s or 500ms.")
    return min(length, WAIT_MS_MAX)


def preferred_wait_s(request: Request) -> int | None:
    """The seconds of `Prefer: wait=N`, or None. A preference that makes no sense is passed over, as RFC 7240 has it."""
    found = _PREFER_WAIT.search(request.headers.get("prefer", ""))
    return min(int(found.group(1)), WAIT_MS_MAX // 1000) if found else None


def idempotency_key(request: Request) -> str | None:
    """The `Idempotency-Key`, or None. Raises `Bad` for one that is none."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= KEY_LENGTH_MAX or not key.isascii() or not key.isprintable():
        raise Bad("bad-header", f"Idempotency-Key must be 1 to {KEY_LENGTH_MAX} printable ASCII characters.")
    return key


def if_generation(request: Request) -> int | None:
    """The generation of `If-Match`, or None for `*` or none at all. Raises `Bad` for what is no ETag of ours."""
    tag = request.headers.get("if-match")
    if tag is None or tag.strip() == "*":
        return None
    text = tag.strip().removeprefix('"').removesuffix('"')
    if not text.isascii() or not text.isdecimal() or len(text) > 18:  # noqa: PLR2004
        raise Bad("bad-header", f'If-Match: {tag[:80]!r}; expected the ETag of an instance, such as "7".')
    return int(text)
