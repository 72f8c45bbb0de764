"""Image downloads over HTTP(S): verified TLS, resume after connection errors, limits of size and time.

A partial download is kept in its own folder, so that a retry resumes it.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import httpx
import msgspec

from interlock.config import Config
from interlock.core.errors import Invalid, StoreFull, Unavailable
from interlock.images.atomic_files import disk_errors_raised, make_folder

_REDIRECTS_MAX: Final = 5
_ATTEMPTS_MAX: Final = 6
"""Maximum number of consecutive attempts without progress."""
_BACKOFF_S: Final = 1.0
_CONNECT_TIMEOUT_S: Final = 15.0
_READ_TIMEOUT_S: Final = 60.0
_CHECKSUMS_BYTES_MAX: Final = 1 << 20
_UNUSED_S: Final = 3 * 24 * 3600
"""After what time an unfinished download is removed."""
_FINAL_STATUS: Final = frozenset(range(400, 500)) - {408, 416, 425, 429}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_GNU: Final = re.compile(r"([0-9a-fA-F]{32,128}) [ *](.+)")
_BSD: Final = re.compile(r"(\w+) ?\((.+)\) ?= ?([0-9a-fA-F]{32,128})")
_ALGORITHMS: Final = {64: "sha256", 96: "sha384", 128: "sha512"}
"""By the number of hexadecimal digits; shorter checksums are insecure."""

Report = Callable[[int, int | None], None]


class _State(msgspec.Struct, frozen=True, kw_only=True):
    """The response that a partial file belongs to."""

    url: str
    validator: str | None = None
    """The ETag or Last-Modified by which the server identifies the version of the file."""


class _Broken(Exception):
    """The connection broke, or the server was busy: the request can be retried."""


class ImageDownloads:
    """Implements `ports.ImageDownloads` on one folder."""

    def __init__(self, folder: Path, *, bytes_max: int, timeout_ms: int, backoff_s: float = _BACKOFF_S) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._timeout_ms = timeout_ms
        self._backoff_s = backoff_s

    def sweep(self, now_ms: int) -> None:
        """Delete downloads that were not continued for days. No download may be running."""
        if self._folder.is_dir():
            for left in self._folder.iterdir():
                if now_ms / 1000 - left.stat().st_mtime > _UNUSED_S:
                    shutil.rmtree(left, ignore_errors=True)

    def check(self, url: str, field: str) -> None:
        check_url(url, field)

    async def fetch(self, url: str, report: Report) -> Path:
        folder = self._folder_of(url)
        await asyncio.to_thread(make_folder, self._folder)
        with disk_errors_raised(self._folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                await self._whole(url, folder, report)
        except TimeoutError:
            raise Unavailable(
                f"{_shown(url)}: timed out: fetching took longer than {self._timeout_ms} ms.",
                remedy="Retry: it resumes where it stopped. image_fetch_timeout_ms is the limit.",
            ) from None
        except StoreFull:
            self.discard(url)
            raise
        return folder / file_name(url)

    async def checksum(self, url: str, of: str) -> tuple[str, str]:
        try:
            async with self._client() as client, client.stream("GET", url) as answer:
                _check_status(answer, url)
                content = bytearray()
                async for chunk in answer.aiter_bytes():
                    content += chunk
                    if len(content) > _CHECKSUMS_BYTES_MAX:
                        raise Invalid(f"{_shown(url)}: this is too large for a checksum file.")
        except (httpx.HTTPError, _Broken) as error:
            raise _unreachable(url, error) from error
        return checksum_in(content.decode("utf-8", "replace"), file_name(of), _shown(url))

    def discard(self, url: str) -> None:
        shutil.rmtree(self._folder_of(url), ignore_errors=True)

    def _folder_of(self, url: str) -> Path:
        return self._folder / hashlib.sha256(url.encode()).hexdigest()[:32]

    def _client(self) -> httpx.AsyncClient:
        # The system's certificates or SSL_CERT_FILE; proxies from the environment.
        return httpx.AsyncClient(
            verify=ssl.create_default_context(),
            follow_redirects=True,
            max_redirects=_REDIRECTS_MAX,
            timeout=httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            headers={"Accept-Encoding": "identity", "User-Agent": "interlock"},
            event_hooks={"request": [_check_redirect]},
        )

    async def _whole(self, url: str, folder: Path, report: Report) -> None:
        failures, path = 0, folder / file_name(url)
        async with self._client() as client:
            while True:
                before = _length(path)
                try:
                    await self._some(client, url, folder, report)
                except (httpx.TransportError, _Broken) as error:
                    failures = failures + 1 if _length(path) <= before else 1
                    if failures >= _ATTEMPTS_MAX or _hopeless(error):
                        raise _unreachable(url, error) from error
                    await asyncio.sleep(self._backoff_s * 2 ** (failures - 1))
                except httpx.TooManyRedirects as error:
                    raise Invalid(f"{_shown(url)}: it redirects more than {_REDIRECTS_MAX} times.") from error
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    raise Invalid(f"{_shown(url)}: the server's answer cannot be used ({error}).") from error
                else:
                    return

    async def _some(self, client: httpx.AsyncClient, url: str, folder: Path, report: Report) -> None:
        """Request the missing range and append it. Returns when the file is complete."""
        path, state_path = folder / file_name(url), folder / "state.json"
        state = _read_state(state_path, url)
        start = _length(path) if state.validator else 0
        headers = {"Range": f"bytes={start}-", "If-Range": state.validator or ""} if start else {}
        async with client.stream("GET", url, headers=headers) as answer:
            if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                path.unlink(missing_ok=True)
                raise _Broken("the file has changed on the server")
            _check_status(answer, url)
            if answer.status_code != httpx.codes.PARTIAL_CONTENT or not _continues(answer, start):
                start = 0
            total = _total(answer, start)
            self._check_size(url, total)
            with disk_errors_raised(self._folder):
                state_path.write_bytes(msgspec.json.encode(_State(url=url, validator=_validator(answer))))
            received = await self._append(answer, path, start, total, url, report)
        if total is not None and received != total:
            raise _Broken(f"the connection ended after {received} of {total} bytes")

    async def _append(
        self, answer: httpx.Response, path: Path, start: int, total: int | None, url: str, report: Report
    ) -> int:
        received = start
        with disk_errors_raised(self._folder), path.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.truncate()
            report(received, total)
            async for chunk in answer.aiter_raw():
                received += len(chunk)
                self._check_size(url, received)
                await asyncio.to_thread(file.write, chunk)
                report(received, total)
        return received

    def _check_size(self, url: str, size: int | None) -> None:
        if size is not None and size > self._bytes_max:
            self.discard(url)
            raise Invalid(
                f"{_shown(url)}: {size} bytes exceed the limit of {self._bytes_max}.",
                remedy="Have upload_bytes_max raised if you trust the image.",
            )


def image_downloads_of(config: Config) -> ImageDownloads:
    """Return the downloads with the server's configuration."""
    folder, timeout_ms = config.folder / "fetches", config.image_fetch_timeout_ms
    return ImageDownloads(folder, bytes_max=config.upload_bytes_max, timeout_ms=timeout_ms)


def check_url(url: str, field: str) -> None:
    """Raise `Invalid` unless the server may fetch from the URL."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isprintable() or " " in url:
        raise Invalid(f"{field}: {url[:200]!r} is not a URL such as https://example.org/disk.qcow2.")
    if parts.username is not None:
        raise Invalid(f"{field}: a name or password in a URL is not supported.", remedy="Download the file yourself.")


def file_name(url: str) -> str:
    """Return the file name in a URL."""
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    return name if _NAME.fullmatch(name) and name != "state.json" else "image"


def checksum_in(text: str, name: str, source: str) -> tuple[str, str]:
    """Return algorithm and checksum of a file from a checksum file in GNU or BSD format. Raises `Invalid`."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if bsd := _BSD.fullmatch(line.strip()):
            found.append((bsd.group(2), bsd.group(3)))
        elif gnu := _GNU.fullmatch(line.strip()):
            found.append((gnu.group(2), gnu.group(1)))
    sums = {value.lower() for path, value in found if path.removeprefix("./").rpartition("/")[2] == name}
    if not sums:
        what = f"names {len(found)} files, and {name} is not among them" if found else "has no known checksums"
        raise Invalid(f"{source}: the checksum file {what}.", remedy="Give the sum itself: `--sha256`.")
    strong = sorted((value for value in sums if len(value) in _ALGORITHMS), key=len)
    if not strong or len({len(value) for value in sums}) != len(sums):
        why = "has several sums for" if strong else "has only insecure checksums (MD5, SHA-1) for"
        raise Invalid(f"{source}: the checksum file {why} {name}.", remedy="Give the sum itself: `--sha256`.")
    return _ALGORITHMS[len(strong[-1])], strong[-1]


async def _check_redirect(request: httpx.Request) -> None:
    """Reject a redirect from HTTPS to an unencrypted URL."""
    request.extensions.setdefault("first", request.url)
    first = request.extensions["first"]
    if request.url.scheme not in {"http", "https"} or (first.scheme == "https" and request.url.scheme != "https"):
        raise httpx.UnsupportedProtocol(f"it redirects to {request.url.scheme}://{request.url.host}", request=request)


def _check_status(answer: httpx.Response, url: str) -> None:
    status = answer.status_code
    if status in _FINAL_STATUS:
        raise Invalid(
            f"{_shown(url)}: the server answers {status} {answer.reason_phrase}.",
            remedy="Check the URL, and that the file is available without authentication.",
        )
    if status not in {httpx.codes.OK, httpx.codes.PARTIAL_CONTENT}:
        raise _Broken(f"the server answers {status} {answer.reason_phrase}".strip())


def _continues(answer: httpx.Response, start: int) -> bool:
    return re.match(rf"bytes {start}-", answer.headers.get("content-range", "")) is not None


def _total(answer: httpx.Response, start: int) -> int | None:
    length = answer.headers.get("content-length", "")
    return start + int(length) if length.isdecimal() else None


def _validator(answer: httpx.Response) -> str | None:
    etag = answer.headers.get("etag", "")
    found = etag if etag and not etag.startswith("W/") else answer.headers.get("last-modified")
    return found or None


def _read_state(path: Path, url: str) -> _State:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_State)
    except (OSError, msgspec.DecodeError):
        return _State(url=url)


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _hopeless(error: Exception) -> bool:
    """Whether a retry would fail in the same way."""
    return isinstance(error, httpx.UnsupportedProtocol) or "certificate" in str(error).lower()


def _unreachable(url: str, error: Exception) -> Unavailable:
    why = str(error) or type(error).__name__
    return Unavailable(f"{_shown(url)}: cannot be fetched: {why}.", remedy="Retry: it resumes where it stopped.")


def _shown(url: str) -> str:
    """Return the URL without its query, which may contain a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"[:300]
