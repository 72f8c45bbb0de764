"""How a command ends, as a number. The reference's table is drawn from here."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


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
    ExitCode.DONE: "Done; or admitted; or redundant, because it holds already or is on its way.",
    ExitCode.ENDED_OTHERWISE: "It ended otherwise than well (`--wait`); a check or test found something; two differ.",
    ExitCode.USAGE: "The command line, the configuration or a policy file is wrong; nothing was asked.",
    ExitCode.REFUSED: "The server refused it in this state (HTTP 409 or 412); the reason is on standard error.",
    ExitCode.NOT_FOUND: "There is no such VM, request, image, volume or token.",
    ExitCode.NOT_REACHABLE: "No server answers, or its certificate is not trusted.",
    ExitCode.NOT_AUTHORISED: "The token is missing, wrong, or may not do this.",
    ExitCode.REJECTED: "The server rejected the input as wrong.",
    ExitCode.SERVER_ERROR: "The server failed, or could not be started.",
    ExitCode.INTERRUPTED: "Ctrl-C. What was admitted goes on.",
}
"""What each means; complete."""

_BY_STATUS: Final = {
    401: ExitCode.NOT_AUTHORISED,
    403: ExitCode.NOT_AUTHORISED,
    404: ExitCode.NOT_FOUND,
    409: ExitCode.REFUSED,
    412: ExitCode.REFUSED,
}
_SERVER_ERRORS: Final = 500


def of_status(status: int) -> ExitCode:
    """The exit code for an HTTP error status."""
    if status >= _SERVER_ERRORS:
        return ExitCode.SERVER_ERROR
    return _BY_STATUS.get(status, ExitCode.REJECTED)
