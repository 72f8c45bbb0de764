"""Where the server is and who we are to it: found in the environment, or in the data folder of a server of ours.

Only finding is here; nothing is sent.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure

URL_VARIABLE = "INTERLOCK_URL"
TOKEN_VARIABLE = "INTERLOCK_TOKEN"  # noqa: S105 - a variable's name
DATA_DIR_VARIABLE = "INTERLOCK_DATA_DIR"
SERVER_FILE = "server.json"
TOKEN_FILE = "admin.token"  # noqa: S105 - a file's name
SYSTEM_FOLDER = Path("/var/lib/interlock")
_TOKEN_CHARACTERS_MAX = 512


class Connection(NamedTuple):
    """A server's URL and the bearer token to show it."""

    url: str
    token: str


def folder_of(environment: Mapping[str, str]) -> Path:
    """The data folder in which a server of this user leaves its URL and its first token."""
    from interlock.config import Config

    return Config(data_dir=environment.get(DATA_DIR_VARIABLE, "")).folder


def find(environment: Mapping[str, str], url: str | None = None) -> Connection:
    """The server to speak to. What is named goes before what is found.

    The admin token in the data folder is shown only to the server that runs on that folder.

    Raises:
        Failure: with what to do, when there is no server or no token.
    """
    named = url or environment.get(URL_VARIABLE)
    token = environment.get(TOKEN_VARIABLE)
    if token is not None and not (token.isascii() and token.strip().isprintable()):
        raise Failure(
            ExitCode.USAGE,
            f"What {TOKEN_VARIABLE} holds is no token: it has characters that no token has.",
            remedy="Set it to the secret alone, in one line.",
        )
    if named:
        named = _checked(named)
    if named and token:
        return Connection(named, token.strip())
    folder = folder_of(environment)
    if named:
        here = _read_url(folder / SERVER_FILE)
        if here is None or here.rstrip("/") != named.rstrip("/"):
            raise Failure(
                ExitCode.NOT_AUTHORISED,
                f"There is no token for {named}.",
                remedy=f"Set {TOKEN_VARIABLE} to a token of that server.",
            )
        return Connection(named, _read_token(folder / TOKEN_FILE))
    here = _read_url(folder / SERVER_FILE)
    if here is None:
        raise _not_running(folder)
    return Connection(_checked(here), token.strip() if token else _read_token(folder / TOKEN_FILE))


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise Failure(
            ExitCode.USAGE,
            f"{url!r} is not the URL of a server.",
            remedy="A URL looks like http://127.0.0.1:7420.",
        )
    return url.rstrip("/")


def _read_url(path: Path) -> str | None:
    """The URL in a server's file, or None if no server has left one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return str(document["url"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Failure(
            ExitCode.NOT_REACHABLE,
            f"{path}, which says where the server is, cannot be read: {error.strerror}.",
            remedy=f"Run this as the user of the server, or set {URL_VARIABLE} and {TOKEN_VARIABLE}.",
        ) from None
    except (ValueError, KeyError, TypeError):
        raise Failure(
            ExitCode.NOT_REACHABLE,
            f"{path} does not say where the server is.",
            remedy=f"Start the server again, or set {URL_VARIABLE}.",
        ) from None


def _not_running(folder: Path) -> Failure:
    remedy = "Start one with `interlock serve` (or `make run` in the source tree)"
    if folder != SYSTEM_FOLDER and _is_file(SYSTEM_FOLDER / SERVER_FILE):
        elsewhere = f"One of the system runs on {SYSTEM_FOLDER}: use sudo, or set {URL_VARIABLE} and {TOKEN_VARIABLE}."
        return Failure(ExitCode.NOT_REACHABLE, f"No server of yours is running on {folder}.", remedy=elsewhere)
    return Failure(
        ExitCode.NOT_REACHABLE,
        f"No server is running on {folder}.",
        remedy=f"{remedy}, name its folder with {DATA_DIR_VARIABLE}, or set {URL_VARIABLE} to one elsewhere.",
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        problem = f"There is no token in {path}"
    except PermissionError:
        problem = f"The token in {path} may be read only by {_owner(path)}, and you are {getpass.getuser()}"
    except (OSError, UnicodeDecodeError) as error:
        problem = f"The token in {path} cannot be read ({error})"
    else:
        if token and len(token) <= _TOKEN_CHARACTERS_MAX and token.isprintable():
            return token
        problem = f"{path} holds no token"
    raise Failure(
        ExitCode.NOT_AUTHORISED,
        f"{problem}.",
        remedy=(
            f"Set {TOKEN_VARIABLE}; an admin makes tokens with `interlock token create`. If no admin's token is left, "
            "end the server and run `interlock token recover` as its user."
        ),
    )


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (OSError, KeyError):
        return "the user of the server"
