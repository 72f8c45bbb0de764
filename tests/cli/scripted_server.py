"""A server that gives the answers that a test has laid out for it, and remembers what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import msgspec


class Asked(NamedTuple):
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Given(NamedTuple):
    status: int = 200
    value: Any = None
    kind: str = "application/json"
    retry_after: str | None = None


HANG_UP = Given(status=0)
"""Instead of an answer: the connection is closed."""
Answer = Given | Callable[[Asked], Given]


class ScriptedServer:
    """Answers are given in the order laid out; the last one of a path again and again."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.asked: list[Asked] = []
        self._script: dict[tuple[str, str], list[Answer]] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def on(self, method: str, path: str, *answers: Answer) -> None:
        self._script[method, path] = list(answers)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _answer(self, asked: Asked) -> Given:
        self.asked.append(asked)
        answers = self._script.get((asked.method, asked.path))
        if not answers:
            problem = {"type": "t", "title": "Nothing", "status": 404, "detail": f"There is nothing at {asked.path}."}
            return Given(404, problem)
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return answer if isinstance(answer, Given) else answer(asked)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                given = server._answer(Asked(self.command, self.path, headers, body))
                if given is HANG_UP:
                    self.close_connection = True
                    return
                data = given.value if isinstance(given.value, bytes) else msgspec.json.encode(given.value)
                self.send_response_only(given.status)
                self.send_header("Date", formatdate(server.now, usegmt=True))
                self.send_header("Content-Type", given.kind)
                self.send_header("Content-Length", str(len(data)))
                if given.retry_after is not None:
                    self.send_header("Retry-After", given.retry_after)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 - as the library calls them

            def log_message(self, *args: Any) -> None:
                pass

        return Handler
