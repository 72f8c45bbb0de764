"""The HTTP client of the command line: a request out, a reply or a `Failure` back.

Written on the standard library's client, because everything else costs more time to import than a command takes.
What the answers mean is not here.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec

from interlock.cli.connection import URL_VARIABLE, Connection
from interlock.cli.exit_codes import ExitCode, of_status
from interlock.cli.failures import Failure

ValueT = TypeVar("ValueT")
Query = Mapping[str, str | int | None]

TIMEOUT_S: Final = 30.0
"""How long a server has to answer, on top of the time that it was asked to wait."""
BODY_BYTES_MAX: Final = 256 * 1024 * 1024
_ERRORS: Final = 400
_LOST: Final = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)


class Reply(NamedTuple):
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def decode(self, kind: type[ValueT]) -> ValueT:
        """The body as a value of that type. Raises `Failure` if it is none."""
        try:
            return msgspec.json.decode(self.body, type=kind)
        except msgspec.DecodeError as error:
            raise Failure(
                ExitCode.SERVER_ERROR,
                f"The server's answer cannot be understood: {error}.",
                remedy="See whether `interlock version` and the server's version are the same.",
            ) from None

    @property
    def at(self) -> float | None:
        """The server's clock when it answered, in seconds since the epoch; None if it did not say."""
        try:
            return parsedate_to_datetime(self.headers["date"]).timestamp()
        except (KeyError, TypeError, ValueError):
            return None


class Client:
    """Sends requests to one server over one connection, which is made when it is needed."""

    def __init__(self, find: Callable[[], Connection], timeout_s: float = TIMEOUT_S) -> None:
        self._find = find
        self._timeout_s = timeout_s
        self._server: Connection | None = None
        self._http: http.client.HTTPConnection | None = None
        self.now: float | None = None
        """The server's clock at its last answer, in seconds since the epoch; None if it never said."""

    @property
    def server(self) -> Connection:
        if self._server is None:
            self._server = self._find()
        return self._server

    def forget(self) -> None:
        """Close the connection, and look anew where the server is: it may have come back somewhere else."""
        self.close()
        self._server = None

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    def get(self, path: str, query: Query | None = None, *, wait_s: float = 0) -> Reply:
        """Get; `wait_s` is how long the server is asked to wait, which is added to the time-out."""
        return self.checked(self._exchange("GET", target(path, query), None, {}, wait_s))

    def post(self, path: str, value: Any, headers: Mapping[str, str] | None = None, *, wait_s: float = 0) -> Reply:
        sent = {"Content-Type": "application/json", **(headers or {})}
        return self.checked(self._exchange("POST", path, msgspec.json.encode(value), sent, wait_s))

    def put(self, path: str, value: Any, headers: Mapping[str, str] | None = None, *, wait_s: float = 0) -> Reply:
        sent = {"Content-Type": "application/json", **(headers or {})}
        return self.checked(self._exchange("PUT", path, msgspec.json.encode(value), sent, wait_s))

    def patch(self, path: str, value: Any, headers: Mapping[str, str] | None = None) -> Reply:
        sent = {"Content-Type": "application/json", **(headers or {})}
        return self.checked(self._exchange("PATCH", path, msgspec.json.encode(value), sent, 0))

    def delete(self, path: str) -> Reply:
        return self.checked(self._exchange("DELETE", path, None, {}, 0))

    def upload(self, path: str, body: Iterable[bytes], headers: Mapping[str, str]) -> Reply:
        """Post a body that is made as it is sent; `headers` must give its length."""
        self.close()
        try:
            return self.checked(self._exchange("POST", path, body, headers, 600))
        except Failure as failure:
            if failure.code is ExitCode.NOT_REACHABLE and isinstance(failure.__context__, _LOST):
                failure.remedy = "It may be too large; the server's log says more."
            raise

    def stream(self, path: str, query: Query | None, headers: Mapping[str, str], silence_s: float) -> Stream:
        """Open an answer that does not end; a silence longer than `silence_s` counts as a lost connection."""
        connection = self._connect(silence_s)
        try:
            connection.request("GET", target(path, query), headers=self._headers(headers))
            response = connection.getresponse()
            if response.status >= _ERRORS:
                self.checked(Reply(response.status, _lower(response), response.read(BODY_BYTES_MAX)))
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self.unreachable(error) from error
        return Stream(connection, response)

    def _exchange(
        self, method: str, target: str, body: bytes | Iterable[bytes] | None, headers: Mapping[str, str], wait_s: float
    ) -> Reply:
        reused = self._http is not None
        try:
            return self._once(method, target, body, headers, wait_s)
        except _LOST as error:
            # A server may close an idle connection at any moment; that is no reason to fail.
            self.close()
            if not reused:
                raise self.unreachable(error) from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self.unreachable(error) from error
        try:
            return self._once(method, target, body, headers, wait_s)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self.unreachable(error) from error

    def _once(
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
            return http.client.HTTPSConnection(host, parts.port, timeout=timeout_s)
        return http.client.HTTPConnection(host, parts.port, timeout=timeout_s)

    def _headers(self, more: Mapping[str, str]) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.server.token}", "Accept": "application/json", **more}

    def checked(self, reply: Reply) -> Reply:
        """The reply, if it is no problem; else raises `Failure` with what it says."""
        self.now = reply.at or self.now
        if reply.status < _ERRORS:
            return reply
        code = of_status(reply.status)
        try:
            document = msgspec.json.decode(reply.body, type=dict[str, Any])
        except msgspec.DecodeError:
            document = {"title": http.client.responses.get(reply.status, "Error"), "status": reply.status}
        message = str(document.get("detail") or f"The server answered {reply.status} ({document.get('title')}).")
        raise Failure(code, message, remedy=document.get("remedy"), document=document)

    def unreachable(self, error: Exception) -> Failure:
        """What an error of the connection means, and what to do."""
        url = self.server.url
        remedy = f"Start one with `interlock serve`, or set {URL_VARIABLE} to one elsewhere."
        match error:
            case ssl.SSLCertVerificationError():
                message = f"The certificate of {url} is not trusted: {error.verify_message}."
                remedy = "If it is your own, set SSL_CERT_FILE to the certificate of the authority that signed it."
            case ssl.SSLError():
                message = f"No TLS connection to {url} could be made: {error.reason}."
                remedy = "See whether the URL should begin with http:// instead."
            case ConnectionRefusedError():
                message = f"No server answers at {url}: it was there, and is not running now."
            case TimeoutError():
                message = f"The server at {url} did not answer in time."
                remedy = "It may be overloaded or stopped; its log says more."
            case socket.gaierror():
                message = f"The name in {url} is not known: {error.strerror}."
            case _:
                message = f"The connection to {url} was lost ({str(error) or type(error).__name__})."
                remedy = "See whether the server is running; its log says more."
        return Failure(ExitCode.NOT_REACHABLE, message, remedy=remedy)


_CHUNK_BYTES = 1 << 20


class Stream:
    """The lines of an answer that does not end."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response

    @property
    def length(self) -> int | None:
        """How many bytes are to come, where the server said so."""
        return self._response.length

    def chunks(self) -> Iterable[bytes]:
        """The bytes of an answer that does end, in pieces. Raises `OSError` where it ends early."""
        try:
            while chunk := self._response.read(_CHUNK_BYTES):
                yield chunk
            if self._response.length:
                raise ConnectionResetError("the connection was lost half-way")
        except http.client.HTTPException as error:
            raise ConnectionResetError("the connection was lost half-way") from error
        finally:
            self._connection.close()

    def lines(self) -> Iterable[str]:
        """Lines without their ends, until the connection is lost."""
        try:
            while line := self._response.readline():
                yield line.decode("utf-8", "replace").rstrip("\r\n")
        except (OSError, http.client.HTTPException, ValueError):
            return
        finally:
            self._connection.close()


def target(path: str, query: Query | None) -> str:
    """A path with its query."""
    given = {name: value for name, value in (query or {}).items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def _lower(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}
