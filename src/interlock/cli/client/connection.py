"""The server's URL and token, from the environment or from the data folder of a server on this machine."""

from __future__ import annotations

import getpass
import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from interlock.cli.failures import ExitCode, Failure

URL_VARIABLE = "INTERLOCK_URL"
TOKEN_VARIABLE = "INTERLOCK_TOKEN"  # noqa: S105 - a variable's name
CA_VARIABLE = "INTERLOCK_CA"
PLAIN_HTTP_VARIABLE = "INTERLOCK_INSECURE_PLAIN_HTTP"
DATA_DIR_VARIABLE = "INTERLOCK_DATA_DIR"
SERVER_FILE = "server.json"
TOKEN_FILE = "admin.token"  # noqa: S105 - a file's name
SYSTEM_FOLDER = Path("/var/lib/interlock")
_TOKEN_CHARACTERS_MAX = 512


class Connection(NamedTuple):
    """A server's URL and bearer token."""

    url: str
    token: str
    ca: str | None = None
    """PEM file of CAs that the server's certificate may be from, besides the system's."""

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS settings; None without TLS. Raises `Failure` if the file of CAs cannot be read."""
        if not self.url.startswith("https://"):
            return None
        settings = ssl.create_default_context()
        if self.ca is not None:
            try:
                settings.load_verify_locations(self.ca)
            except OSError as error:
                raise Failure(
                    ExitCode.USAGE,
                    f"Cannot read the CAs in {self.ca}: {error.strerror or error}.",
                    remedy=f"Set --ca or {CA_VARIABLE} to a PEM file of certificates.",
                ) from None
        return settings


def folder_of(environment: Mapping[str, str]) -> Path:
    """Return the data folder in which this user's server writes its URL and first token."""
    from interlock.config import Config

    return Config(data_dir=environment.get(DATA_DIR_VARIABLE, "")).folder


def find(environment: Mapping[str, str], url: str | None = None, ca: str | None = None) -> Connection:
    """Return the server to use: the given one, or the one of the data folder. `ca` replaces `INTERLOCK_CA`.

    The admin token in the data folder is sent only to the server that runs on that folder.

    Raises:
        Failure: no server or no token.
    """
    named = url or environment.get(URL_VARIABLE)
    token, ca = environment.get(TOKEN_VARIABLE), ca or environment.get(CA_VARIABLE)
    if token is not None and not (token.isascii() and token.strip().isprintable()):
        raise Failure(
            ExitCode.USAGE,
            f"Invalid {TOKEN_VARIABLE}: unexpected characters.",
            remedy="Set it to the secret only, on one line.",
        )
    if named:
        named = encrypted_url(
            named,
            allowed=environment.get(PLAIN_HTTP_VARIABLE) == "1",
            exposed="your token and what you send",
            by=f"{PLAIN_HTTP_VARIABLE}=1",
        )
    if named and token:
        return Connection(named, token.strip(), ca)
    folder = folder_of(environment)
    if named:
        here, own_ca = _read_server(folder / SERVER_FILE)
        if here is None or here.rstrip("/") != named.rstrip("/"):
            raise Failure(
                ExitCode.NOT_AUTHORISED,
                f"Token for {named} not found.",
                remedy=f"Set {TOKEN_VARIABLE} to a token of that server.",
            )
        return Connection(named, _read_token(folder / TOKEN_FILE), ca or own_ca)
    here, own_ca = _read_server(folder / SERVER_FILE)
    if here is None:
        raise _not_running(folder)
    return Connection(valid_url(here), token.strip() if token else _read_token(folder / TOKEN_FILE), ca or own_ca)


def valid_url(url: str) -> str:
    """Return a server's URL without a slash at its end. Raises `Failure` unless it is http or https, with a host."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise Failure(
            ExitCode.USAGE,
            f"Invalid URL {url!r}.",
            remedy="Expected a URL such as http://127.0.0.1:7420.",
        )
    return url.rstrip("/")


def encrypted_url(url: str, *, allowed: bool, exposed: str, by: str) -> str:
    """Return a server's URL.

    Args:
        url: the URL.
        allowed: whether a connection beyond loopback may be unencrypted.
        exposed: what would cross the network in the clear, for people.
        by: what allows it, for people.

    Raises:
        Failure: it is invalid, or would not be encrypted.
    """
    from interlock.config import is_loopback

    url = valid_url(url)
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname or "") and not allowed:
        raise Failure(
            ExitCode.USAGE,
            f"The connection to {url} would not be encrypted: {exposed} would cross the network in the clear.",
            remedy=f"Use https:// (give the server tls_names, or tls_certificate and tls_key), or allow it with {by}.",
        )
    return url


def _read_server(path: Path) -> tuple[str | None, str | None]:
    """Return the URL in a server's file, None if the file does not exist; and the file of the server's own CA."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return str(document["url"]), document.get("ca")
    except FileNotFoundError:
        return None, None
    except OSError as error:
        raise Failure(
            ExitCode.NOT_REACHABLE,
            f"Cannot read the server's URL from {path}: {error.strerror}.",
            remedy=f"Run this as the user of the server, or set {URL_VARIABLE} and {TOKEN_VARIABLE}.",
        ) from None
    except (ValueError, KeyError, TypeError):
        raise Failure(
            ExitCode.NOT_REACHABLE,
            f"Invalid {path}: server URL not found.",
            remedy=f"Restart the server, or set {URL_VARIABLE}.",
        ) from None


def _not_running(folder: Path) -> Failure:
    remedy = "Start one with `interlock serve` (or `make run` in the source tree)"
    if folder != SYSTEM_FOLDER and _is_file(SYSTEM_FOLDER / SERVER_FILE):
        remedy = f"A system server runs on {SYSTEM_FOLDER}: use sudo, or set {URL_VARIABLE} and {TOKEN_VARIABLE}."
        return Failure(ExitCode.NOT_REACHABLE, f"No server of this user is running on {folder}.", remedy=remedy)
    return Failure(
        ExitCode.NOT_REACHABLE,
        f"No server is running on {folder}.",
        remedy=f"{remedy}, set {DATA_DIR_VARIABLE} to its folder, or set {URL_VARIABLE}.",
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
        problem = f"Token file {path} not found"
    except PermissionError:
        problem = (
            f"Permission denied: token file {path} is readable only by {_owner(path)}; you are {getpass.getuser()}"
        )
    except (OSError, UnicodeDecodeError) as error:
        problem = f"Cannot read token file {path} ({error})"
    else:
        if token and len(token) <= _TOKEN_CHARACTERS_MAX and token.isprintable():
            return token
        problem = f"Invalid token in {path}"
    raise Failure(
        ExitCode.NOT_AUTHORISED,
        f"{problem}.",
        remedy=(
            f"Set {TOKEN_VARIABLE}; an admin creates tokens with `interlock token create`. If no admin token is left, "
            "stop the server and run `interlock token recover` as its user."
        ),
    )


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (OSError, KeyError):
        return "the user of the server"
