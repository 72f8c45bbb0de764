"""The exception with which a command fails, exit codes with their documentation, and missing extras as failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any, Final


class ExitCode(IntEnum):
    """The exit codes of every command."""

    DONE = 0
    ENDED_OTHERWISE = 1
    USAGE = 2
    REFUSED = 3
    NOT_FOUND = 4
    NOT_REACHABLE = 5
    NOT_AUTHORISED = 6
    REJECTED = 7
    SERVER_ERROR = 8
    INTERRUPTED = 130


MEANINGS: Final = {
    ExitCode.DONE: "Success: done, admitted, or redundant.",
    ExitCode.ENDED_OTHERWISE: "The operation did not succeed (`--wait`); a check or test failed; two policies differ.",
    ExitCode.USAGE: "Invalid command line, configuration or policy file; no request was sent.",
    ExitCode.REFUSED: "Denied in this state (HTTP 409 or 412); the reason is on standard error.",
    ExitCode.NOT_FOUND: "VM, request, image, volume or token not found.",
    ExitCode.NOT_REACHABLE: "The server is not reachable, or its certificate is not trusted.",
    ExitCode.NOT_AUTHORISED: "Permission denied: the token is missing, invalid, or its role does not allow this.",
    ExitCode.REJECTED: "The server rejected the input as invalid.",
    ExitCode.SERVER_ERROR: "The server failed or could not be started.",
    ExitCode.INTERRUPTED: "Ctrl-C. Admitted requests continue.",
}
"""The meaning of every exit code."""

_BY_STATUS: Final = {
    401: ExitCode.NOT_AUTHORISED,
    403: ExitCode.NOT_AUTHORISED,
    404: ExitCode.NOT_FOUND,
    409: ExitCode.REFUSED,
    412: ExitCode.REFUSED,
}
_SERVER_ERRORS: Final = 500


def of_status(status: int) -> ExitCode:
    """Return the exit code for an HTTP error status."""
    if status >= _SERVER_ERRORS:
        return ExitCode.SERVER_ERROR
    return _BY_STATUS.get(status, ExitCode.REJECTED)


class Failure(Exception):
    """A failed command: its exit code, message and remedy.

    `text` replaces the printed message and remedy; `document` is printed by `--json`: the server's problem details, if
    there are any.
    """

    def __init__(
        self,
        code: ExitCode,
        message: str,
        *,
        remedy: str | None = None,
        text: str | None = None,
        document: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy
        self.text = text
        self._document = document

    @property
    def document(self) -> dict[str, Any]:
        """The failure as problem details."""
        if self._document is not None:
            return self._document
        document: dict[str, Any] = {
            "type": f"urn:interlock:cli:{self.code.name.lower().replace('_', '-')}",
            "title": self.code.name.replace("_", " ").capitalize(),
            "detail": self.message,
        }
        return document if self.remedy is None else {**document, "remedy": self.remedy}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` in the block, which writes a file that the user named, into a `Failure`."""
    try:
        yield
    except OSError as error:
        message = f"Cannot write {path}: {error.strerror}."
        raise Failure(ExitCode.USAGE, message, remedy="Choose another file.") from None


MODULES: Final = {
    "policies": ("cryptography", "numpy", "yaml"),
    "plots": ("matplotlib",),
    "server": (
        *("apsw", "httptools", "httpx", "lz4", "oslo_utils", "prometheus_client", "pycdlib", "pyroute2"),
        *("python_multipart", "qemu"),
        *("starlette", "structlog", "swagger_ui", "uuid_utils", "uvicorn", "uvloop", "zstandard"),
    ),
}
"""The modules that each extra of pyproject.toml installs, by their names in imports."""


def missing_extra(error: ModuleNotFoundError) -> Failure:
    """Return the failure that names the extra to install. Raises the error again if no extra has the module."""
    module = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in MODULES.items() if module in modules), None)
    if extra is None:
        raise error
    return Failure(
        ExitCode.ENDED_OTHERWISE,
        f"This command needs the extra '{extra}', which is not installed (no module named '{module}').",
        remedy=f"Install it with: pip install 'interlock[{extra}]'",
    )
