"""Downloads from a real web server that breaks off, changes its mind, redirects, and sends too much."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from interlock.core.errors import Invalid, Unavailable
from interlock.images.download import ImageDownloads, check_url, checksum_in, file_name

CONTENT = bytes(range(256)) * 4096


class Site:
    """What a web server does, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str | None] = []
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.breaks_after: list[int] = []
        """After how many bytes of an answer the connection breaks, for the next answers."""
        self.statuses: list[int] = []
        """What is answered instead, for the next requests."""
        self.ranges = True
        self.says_length = True
        self.location = ""
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        site = self.site
        site.asked.append(self.headers.get("Range"))
        if site.statuses:
            self.send_response(site.statuses.pop(0))
            if site.location:
                self.send_header("Location", site.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        asked = self.headers.get("Range")
        if site.ranges and asked and self.headers.get("If-Range") == site.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        body = site.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
        if site.etag:
            self.send_header("ETag", site.etag)
        if site.says_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if site.breaks_after:
            body = body[: site.breaks_after.pop(0)]
        self.wfile.write(body)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"site": site}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}/images/disk.qcow2"
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def downloads(tmp_path: Path) -> ImageDownloads:
    return ImageDownloads(tmp_path / "fetches", bytes_max=4 << 20, timeout_ms=20_000, backoff_s=0.001)


async def test_a_file_arrives_whole_under_its_name_with_progress(downloads: ImageDownloads, site: Site) -> None:
    told: list[tuple[int, int | None]] = []
    path = await downloads.fetch(site.url, lambda *at: told.append(at))
    assert (path.name, path.read_bytes()) == ("disk.qcow2", CONTENT)
    assert told[0] == (0, len(CONTENT))
    assert told[-1] == (len(CONTENT), len(CONTENT))
    downloads.discard(site.url)
    assert not path.exists()


async def test_a_broken_connection_is_gone_on_with_where_it_ended(downloads: ImageDownloads, site: Site) -> None:
    site.breaks_after = [100_000, 200_000]
    path = await downloads.fetch(site.url, lambda *_: None)
    assert path.read_bytes() == CONTENT
    assert site.asked == [None, "bytes=100000-", "bytes=300000-"]


async def test_another_process_goes_on_too(downloads: ImageDownloads, site: Site, tmp_path: Path) -> None:
    site.breaks_after = [100_000, *([0] * 9)]
    with pytest.raises(Unavailable, match="cannot be fetched"):
        await downloads.fetch(site.url, lambda *_: None)
    site.breaks_after = []
    site.asked.clear()
    again = ImageDownloads(tmp_path / "fetches", bytes_max=4 << 20, timeout_ms=20_000)
    assert (await again.fetch(site.url, lambda *_: None)).read_bytes() == CONTENT
    assert site.asked == ["bytes=100000-"]


@pytest.mark.parametrize("how", ["changed", "no ranges", "no validator"])
async def test_what_cannot_be_gone_on_with_is_begun_again(downloads: ImageDownloads, site: Site, how: str) -> None:
    site.breaks_after = [100_000]
    site.ranges = how != "no ranges"
    site.etag = None if how == "no validator" else site.etag
    changed = CONTENT[::-1]

    def change(received: int, _total: int | None) -> None:
        if how == "changed" and received:
            site.content, site.etag = changed, '"two"'

    path = await downloads.fetch(site.url, change)
    assert path.read_bytes() == (changed if how == "changed" else CONTENT)


@pytest.mark.parametrize("status", [500, 502, 503, 429])
async def test_a_busy_server_is_asked_again(downloads: ImageDownloads, site: Site, status: int) -> None:
    site.statuses = [status, status]
    assert (await downloads.fetch(site.url, lambda *_: None)).read_bytes() == CONTENT
    site.statuses = [status] * 20
    with pytest.raises(Unavailable, match=str(status)):
        await downloads.checksum(site.url, site.url)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
async def test_a_file_that_is_not_there_is_said_at_once(downloads: ImageDownloads, site: Site, status: int) -> None:
    site.statuses = [status] * 2
    with pytest.raises(Invalid, match=f"answers {status}"):
        await downloads.fetch(site.url, lambda *_: None)
    assert len(site.asked) == 1


@pytest.mark.parametrize("says_length", [True, False])
async def test_more_than_the_limit_is_refused_and_nothing_is_left(
    site: Site, tmp_path: Path, says_length: bool
) -> None:
    site.says_length = says_length
    downloads = ImageDownloads(tmp_path / "fetches", bytes_max=100_000, timeout_ms=20_000)
    with pytest.raises(Invalid, match="exceed the limit of"):
        await downloads.fetch(site.url, lambda *_: None)
    assert list((tmp_path / "fetches").iterdir()) == []


async def test_redirects_are_followed_a_few_times_and_only_to_the_web(downloads: ImageDownloads, site: Site) -> None:
    site.location, site.statuses = site.url, [302]
    assert (await downloads.fetch(site.url, lambda *_: None)).read_bytes() == CONTENT
    downloads.discard(site.url)
    site.statuses = [302] * 20
    with pytest.raises(Invalid, match="more than 5 times"):
        await downloads.fetch(site.url, lambda *_: None)
    site.location, site.statuses = "file:///etc/passwd", [302]
    with pytest.raises((Invalid, Unavailable), match=r"redirects to file|cannot be used|unsupported protocol"):
        await downloads.fetch(site.url, lambda *_: None)


async def test_it_does_not_take_for_ever(site: Site, tmp_path: Path) -> None:
    site.statuses = [503] * 99
    downloads = ImageDownloads(tmp_path / "fetches", bytes_max=1, timeout_ms=50, backoff_s=60)
    with pytest.raises(Unavailable, match="longer than 50 ms"):
        await downloads.fetch(site.url, lambda *_: None)


async def test_nobody_there_is_said(downloads: ImageDownloads) -> None:
    with pytest.raises(Unavailable, match="cannot be fetched"):
        await downloads.fetch("http://127.0.0.1:1/disk.qcow2", lambda *_: None)


async def test_old_downloads_are_removed_at_a_start(downloads: ImageDownloads, site: Site) -> None:
    site.breaks_after = [1000, *([0] * 9)]
    with pytest.raises(Unavailable):
        await downloads.fetch(site.url, lambda *_: None)
    (left,) = downloads._folder.iterdir()
    downloads.sweep(int(left.stat().st_mtime * 1000) + 1000)
    assert left.exists()
    downloads.sweep(int(left.stat().st_mtime * 1000) + 30 * 24 * 3_600_000)
    assert not left.exists()


SHA256, SHA512 = hashlib.sha256(CONTENT).hexdigest(), hashlib.sha512(CONTENT).hexdigest()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{'0' * 64}  other\n{SHA256}  a.qcow2\n", ("sha256", SHA256)),
        (f"{SHA512} *a.qcow2\r\n", ("sha512", SHA512)),
        (f"{SHA256}  ./images/a.qcow2\n", ("sha256", SHA256)),
        (f"SHA512 (a.qcow2) = {SHA512}\n", ("sha512", SHA512)),
        (f"# {'1' * 64}\nSHA256 (a.qcow2)={SHA256.upper()}\n", ("sha256", SHA256)),
        (f"{'0' * 32}  a.qcow2\n{SHA256}  a.qcow2\n", ("sha256", SHA256)),
    ],
)
def test_a_sum_is_found_in_a_checksum_file(text: str, expected: tuple[str, str]) -> None:
    assert checksum_in(text, "a.qcow2", "SUMS") == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no known checksums"),
        ("<html>404</html>", "no known checksums"),
        (f"{SHA256}  b.qcow2\n", "not among them"),
        (f"{SHA256}  a.qcow2.torrent\n", "not among them"),
        (f"{'0' * 32}  a.qcow2\n", "MD5"),
        (f"{'0' * 64}  a.qcow2\n{SHA256}  a.qcow2\n", "several sums"),
    ],
)
def test_one_that_is_not_there_or_proves_nothing_is_refused(text: str, why: str) -> None:
    with pytest.raises(Invalid, match=why):
        checksum_in(text, "a.qcow2", "SUMS")


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://a/b", "https://", "https:///x", "a.qcow2", "http://[::1", "https://u:p@a/x",
     "https://a/ x", "https://a:99999/x", "javascript:1", "https://a/\n"],
)  # fmt: skip
def test_what_is_no_web_address_is_refused(url: str) -> None:
    with pytest.raises(Invalid, match="url"):
        check_url(url, "url")


def test_the_name_of_a_file_never_leads_elsewhere() -> None:
    named: Callable[[str], str] = lambda path: file_name(f"https://example.org{path}")  # noqa: E731
    assert named("/a/debian-12.qcow2?x=1#y") == "debian-12.qcow2"
    assert {named(path) for path in ("", "/", "/a/..", "/%2e%2e%2fetc", "/a%2fb", "/.x", "/state.json")} <= {
        "image",
        "b",
        "etc",
    }
