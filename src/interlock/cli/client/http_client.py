"""The HTTP client of the command line: sends a request, returns a reply or raises `Failure`.

It uses the standard library's client, because others take longer to import than a command takes.
"""

from __future__ import annotations

import contextlib
import difflib
import http.client
import re
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec

from interlock.cli.client.connection import CA_VARIABLE, TOKEN_VARIABLE, URL_VARIABLE, Connection
from interlock.cli.client.paths import COLLECTIONS
from interlock.cli.failures import ExitCode, Failure, of_status
from interlock.cli.output.formatting import escape_all, escape_line

ValueT = TypeVar("ValueT")
Query = Mapping[str, str | int | None]

TIMEOUT_S: Final = 30.0
"""How long a server has to respond, in addition to the requested wait."""
BODY_BYTES_MAX: Final = 256 * 1024 * 1024
RETRY_S_MAX: Final = 60.0
"""How long a command retries in total if the server says after what time to retry."""
_OVERLOADED: Final = b'"urn:interlock:problem:overloaded"'
_DIGITS_MAX: Final = 6
_PAGE: Final = 500
_ERRORS: Final = 400
_NOT_FOUND: Final = re.compile(rf"({'|'.join(COLLECTIONS)}) not found: (.*)\.", re.DOTALL)
_DISCONNECTED: Final = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)


class Reply(NamedTuple):
    """An HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def decode(self, kind: type[ValueT]) -> ValueT:
        """Decode the body as `kind`, with control characters escaped. Raises `Failure` if it is invalid."""
        try:
            return msgspec.convert(escape_all(msgspec.json.decode(self.body)), type=kind)
        except msgspec.DecodeError as error:
            raise _invalid_response(error) from None

    def document(self) -> dict[str, Any]:
        """Return the body unchanged, to be printed as JSON only. Raises `Failure` if it is invalid."""
        try:
            return msgspec.json.decode(self.body, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise _invalid_response(error) from None

    @property
    def retry_after_s(self) -> int | None:
        """After how many seconds the server takes the request, if it is busy (429 or 503) and says so."""
        text = self.headers.get("retry-after", "")
        busy = self.status in {http.HTTPStatus.TOO_MANY_REQUESTS, http.HTTPStatus.SERVICE_UNAVAILABLE}
        return int(text) if busy and text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MAX else None

    @property
    def did_nothing(self) -> bool:
        """Whether the server refused the request before it looked at it."""
        return self.status == http.HTTPStatus.TOO_MANY_REQUESTS or _OVERLOADED in self.body

    @property
    def at(self) -> float | None:
        """The server's clock (header Date), in seconds since the epoch; None if unknown."""
        try:
            return parsedate_to_datetime(self.headers["date"]).timestamp()
        except (KeyError, TypeError, ValueError):
            return None


def _is_repeatable(method: str, body: bytes | Iterable[bytes] | None, headers: Mapping[str, str], reply: Reply) -> bool:
    """Whether sending a refused request again has the effect of sending it once."""
    if not isinstance(body, bytes | None):
        return False
    return reply.did_nothing or method == "GET" or "Idempotency-Key" in headers


def _invalid_response(error: msgspec.DecodeError) -> Failure:
    return Failure(
        ExitCode.SERVER_ERROR,
        f"Invalid response from the server: {error}.",
        remedy="Check that `interlock version` and the server's version are the same.",
    )


class Client:
    """HTTP client of one server, over one connection that is opened on demand."""

    def __init__(self, find: Callable[[], Connection], timeout_s: float = TIMEOUT_S) -> None:
        self._find = find
        self._timeout_s = timeout_s
        self._server: Connection | None = None
        self._http: http.client.HTTPConnection | None = None
        self.now: float | None = None
        """The server's clock at its last response, in seconds since the epoch; None if unknown."""

    @property
    def server(self) -> Connection:
        if self._server is None:
            self._server = self._find()
        return self._server

    def reset(self) -> None:
        """Close the connection and find the server again: it may have restarted on another address."""
        self.close()
        self._server = None

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    def get(self, path: str, query: Query | None = None, *, wait_s: float = 0) -> Reply:
        """Send a GET; `wait_s` is the wait that the server was asked for, which is added to the timeout."""
        return self.raise_for_status(self._exchange("GET", target(path, query), None, {}, wait_s))

    def post(self, path: str, value: Any, headers: Mapping[str, str] | None = None, *, wait_s: float = 0) -> Reply:
        sent = {"Content-Type": "application/json", **(headers or {})}
        return self.raise_for_status(self._exchange("POST", path, msgspec.json.encode(value), sent, wait_s))

    def put(self, path: str, value: Any, headers: Mapping[str, str] | None = None, *, wait_s: float = 0) -> Reply:
        sent = {"Content-Type": "application/json", **(headers or {})}
        return self.raise_for_status(self._exchange("PUT", path, msgspec.json.encode(value), sent, wait_s))

    def patch(self, path: str, value: Any, headers: Mapping[str, str] | None = None) -> Reply:
        sent = {"Content-Type": "application/json", **(headers or {})}
        return self.raise_for_status(self._exchange("PATCH", path, msgspec.json.encode(value), sent, 0))

    def delete(self, path: str) -> Reply:
        return self.raise_for_status(self._exchange("DELETE", path, None, {}, 0))

    def upload(self, path: str, body: Iterable[bytes], headers: Mapping[str, str]) -> Reply:
        """Post a streamed body; `headers` must have its Content-Length."""
        self.close()
        try:
            return self.raise_for_status(self._exchange("POST", path, body, headers, 600))
        except Failure as failure:
            if failure.code is ExitCode.NOT_REACHABLE and isinstance(failure.__context__, _DISCONNECTED):
                failure.remedy = "The file may be too large; check the server's log."
            raise

    def stream(self, path: str, query: Query | None, headers: Mapping[str, str], silence_s: float) -> Stream:
        """Open a streaming response; `silence_s` without data counts as a lost connection."""
        connection = self._connect(silence_s)
        try:
            connection.request("GET", target(path, query), headers=self._headers(headers))
            response = connection.getresponse()
            if response.status >= _ERRORS:
                self.raise_for_status(Reply(response.status, _lower(response), response.read(BODY_BYTES_MAX)))
        except Failure:
            connection.close()
            raise
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self.unreachable(error) from error
        return Stream(connection, response)

    def _exchange(
        self, method: str, target: str, body: bytes | Iterable[bytes] | None, headers: Mapping[str, str], wait_s: float
    ) -> Reply:
        """Send a request, and again after the time that the server names, if that is safe."""
        left_s = RETRY_S_MAX
        while True:
            reply = self._exchange_once(method, target, body, headers, wait_s)
            pause_s = reply.retry_after_s
            if pause_s is None or pause_s > left_s or not _is_repeatable(method, body, headers, reply):
                return reply
            left_s -= pause_s
            self.close()
            time.sleep(pause_s)

    def _exchange_once(
        self, method: str, target: str, body: bytes | Iterable[bytes] | None, headers: Mapping[str, str], wait_s: float
    ) -> Reply:
        reused = self._http is not None
        try:
            return self._send(method, target, body, headers, wait_s)
        except _DISCONNECTED as error:
            # A server may close an idle connection at any moment: retry once.
            self.close()
            if not reused:
                raise self.unreachable(error) from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self.unreachable(error) from error
        try:
            return self._send(method, target, body, headers, wait_s)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self.unreachable(error) from error

    def _send(
        self, method: str, target: str, body: bytes | Iterable[bytes] | None, headers: Mapping[str, str], wait_s: float
    ) -> Reply:
        if self._http is None:
            self._http = self._connect(self._timeout_s)
        if self._http.sock is not None:
            self._http.sock.settimeout(self._timeout_s + wait_s)
        else:
            self._http.timeout = self._timeout_s + wait_s
        self._http.request(method, target, body=body, headers=self._headers(headers))
        response = self._http.getresponse()
        return Reply(response.status, _lower(response), response.read(BODY_BYTES_MAX))

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.server.url)
        host = parts.hostname or ""
        if parts.scheme == "https":
            return http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=self.server.tls())
        return http.client.HTTPConnection(host, parts.port, timeout=timeout_s)

    def _headers(self, more: Mapping[str, str]) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.server.token}", "Accept": "application/json", **more}

    def raise_for_status(self, reply: Reply) -> Reply:
        """Return the reply. Raises `Failure` with the problem details of an error status, and similar names."""
        self.now = reply.at or self.now
        if reply.status < _ERRORS:
            return reply
        code = of_status(reply.status)
        try:
            document = msgspec.json.decode(reply.body, type=dict[str, Any])
        except msgspec.DecodeError:
            document = {"title": http.client.responses.get(reply.status, "Error"), "status": reply.status}
        message = str(document.get("detail") or f"The server returned {reply.status} ({document.get('title')}).")
        remedy = document.get("remedy")
        if reply.status == http.HTTPStatus.UNAUTHORIZED and "Authorization" in (remedy or "Authorization"):
            # The server's says how to send a token; why it refuses a known one is said as it is.
            remedy = (
                f"Set {TOKEN_VARIABLE} to a token of {self.server.url}; an admin creates one with "
                f"`interlock token create`. On the server's own machine, unset {TOKEN_VARIABLE}."
            )
        remedy = self._similar(message) or (remedy and escape_line(str(remedy)))
        raise Failure(code, escape_line(message), remedy=remedy, document=document)

    def pages(self, path: str, query: Query | None = None) -> Iterator[Reply]:
        """Yield every page of a collection. Raises `Failure`."""
        cursor: str | None = None
        while True:
            reply = self.get(path, {**(query or {}), "limit": _PAGE, "cursor": cursor})
            yield reply
            cursor = reply.document()["next_cursor"]
            if cursor is None:
                return

    def names(self, collection: str) -> list[str]:
        """Return the names in the first page of a collection. Raises `Failure`."""
        items = self.get(collection).decode(dict[str, Any]).get("items", [])
        return [str(item["name"]) for item in items if "name" in item]

    def _similar(self, message: str) -> str | None:
        """Return a suggestion if the message says that a resource was not found and there are similar names."""
        found = _NOT_FOUND.fullmatch(message)
        if found is None:
            return None
        with contextlib.suppress(Failure):
            known = self.names(COLLECTIONS[found[1]])
            near = difflib.get_close_matches(found[2], known, n=3, cutoff=0.5)
            return f"Did you mean {' or '.join(near)}?" if near and found[2] not in known else None
        return None

    def unreachable(self, error: Exception) -> Failure:
        """Return the failure for a connection error."""
        url = self.server.url
        remedy = f"Start one with `interlock serve`, or set {URL_VARIABLE} to one elsewhere."
        match error:
            case ssl.SSLCertVerificationError():
                message = f"Certificate of {url} not trusted: {error.verify_message}."
                remedy = f"If it is your own, name the certificate of its CA with --ca or {CA_VARIABLE}."
            case ssl.SSLError():
                message = f"TLS connection to {url} failed: {error.reason}."
                remedy = "Check whether the URL should start with http:// instead."
            case ConnectionRefusedError():
                message = f"Connection refused by {url}: the server is not running."
            case TimeoutError():
                message = f"Request to {url} timed out."
                remedy = "The server may be overloaded or stopped; check its log."
            case socket.gaierror():
                message = f"Host of {url} not found: {error.strerror}."
            case _:
                message = f"Connection to {url} lost ({str(error) or type(error).__name__})."
                remedy = "Check whether the server is running, and its log."
        return Failure(ExitCode.NOT_REACHABLE, message, remedy=remedy)


_CHUNK_BYTES = 1 << 20


class Stream:
    """A streaming response."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response

    @property
    def length(self) -> int | None:
        """Remaining bytes; None if unknown."""
        return self._response.length

    def chunks(self) -> Iterable[bytes]:
        """Yield the body in chunks. Raises `OSError` if it is truncated."""
        try:
            while chunk := self._response.read(_CHUNK_BYTES):
                yield chunk
            if self._response.length:
                raise ConnectionResetError("connection lost before the end")
        except http.client.HTTPException as error:
            raise ConnectionResetError("connection lost before the end") from error
        finally:
            self._connection.close()

    def lines(self) -> Iterable[str]:
        """Yield lines until the connection is lost."""
        try:
            while line := self._response.readline():
                yield line.decode("utf-8", "replace").rstrip("\r\n")
        except (OSError, http.client.HTTPException, ValueError):
            return
        finally:
            self._connection.close()


def target(path: str, query: Query | None) -> str:
    """Return the path with its query; None values are left out."""
    given = {name: value for name, value in (query or {}).items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def _lower(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}


_PIECE_BYTES: Final = 1024 * 1024


def _suffix(path: Path) -> str:
    """Return the file's suffix, which may name its format; the rest of the name is not sent."""
    return path.suffix.lower() if path.suffix.isascii() and path.suffix[1:].isalnum() else ""


class Form:
    """Text fields, then files, with a length known in advance."""

    def __init__(self, fields: Mapping[str, str], files: Mapping[str, Path]) -> None:
        """Raises `OSError` if a file is not accessible."""
        self._boundary = secrets.token_hex(16)
        self._text = b"".join(
            self._head(f'form-data; name="{name}"') + value.encode() + b"\r\n" for name, value in fields.items()
        )
        self._files = [
            (
                self._head(f'form-data; name="{name}"; filename="{name}{_suffix(path)}"', "application/octet-stream"),
                path,
                path.stat().st_size,
            )
            for name, path in files.items()
        ]
        self._tail = f"--{self._boundary}--\r\n".encode()

    def _head(self, disposition: str, kind: str | None = None) -> bytes:
        lines = [f"--{self._boundary}", f"Content-Disposition: {disposition}"]
        if kind is not None:
            lines.append(f"Content-Type: {kind}")
        return "\r\n".join([*lines, "", ""]).encode()

    @property
    def headers(self) -> dict[str, str]:
        length = len(self._text) + len(self._tail)
        length += sum(len(head) + size + len(b"\r\n") for head, _, size in self._files)
        return {
            "Content-Type": f"multipart/form-data; boundary={self._boundary}",
            "Content-Length": str(length),
        }

    def pieces(self, on_progress: Callable[[int, int], None]) -> Iterator[bytes]:
        """Yield the body; call `on_progress` with the bytes of files sent and their total after each piece."""
        total = sum(size for _, _, size in self._files)
        sent = 0
        yield self._text
        for head, path, size in self._files:
            yield head
            left = size
            with path.open("rb") as file:
                while left and (piece := file.read(min(left, _PIECE_BYTES))):
                    yield piece
                    left -= len(piece)
                    sent += len(piece)
                    on_progress(sent, total)
            if left:
                raise OSError(f"{path} was truncated during the upload")
            yield b"\r\n"
        yield self._tail
