"""Images over HTTP: fetched by the server, downloaded, with a least memory; and what an instance is told in bytes."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from api.conftest import ApiServer
from interlock.core.roles import Role
from waiting import PATIENCE_S

DISK = (b"\x01" * 446 + bytes(64) + b"\x55\xaa").ljust(1 << 20, b"\x07")
SUM = hashlib.sha256(DISK).hexdigest()


class Site:
    """A web site with a disk, of which it gives nothing until it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.may.set()
        self.asked = 0
        self.url = ""


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            site.asked += 1
            site.may.wait(PATIENCE_S)
            body = gzip.compress(DISK) if self.path.endswith(".gz") else DISK
            self.send_response(200 if self.path.startswith("/disk") else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    yield site
    site.may.set()
    server.shutdown()
    server.server_close()
    thread.join()


async def ended(admin: httpx.AsyncClient, fetch: dict[str, Any]) -> dict[str, Any]:
    while fetch["status"] == "running":
        await asyncio.sleep(0.01)
        fetch = (await admin.get(f"/v1/image-fetches/{fetch['id']}")).json()
    return fetch


async def test_the_server_fetches_an_image_once_whoever_asks_again(admin: httpx.AsyncClient, site: Site) -> None:
    wish = {"name": "web", "url": f"{site.url}/disk.raw", "sha256": SUM, "min_memory_mib": 256}
    site.may.clear()
    begun = await admin.post("/v1/image-fetches", json=wish)
    assert begun.status_code == 202, begun.text
    assert begun.json()["status"] == "running"
    assert (await admin.post("/v1/image-fetches", json=wish)).json()["id"] == begun.json()["id"]
    site.may.set()
    done = await ended(admin, begun.json())
    assert (done["status"], done["error"]) == ("succeeded", None)
    assert (done["image"]["sha256"], done["image"]["min_memory_mib"]) == (SUM, 256)
    assert (done["received_bytes"], done["total_bytes"]) == (len(DISK), len(DISK))
    assert (await admin.post("/v1/image-fetches", json=wish)).json()["id"] == done["id"]
    assert site.asked == 1
    assert (await admin.post("/v1/image-fetches", json={**wish, "min_memory_mib": 1})).status_code == 409
    assert [one["id"] for one in (await admin.get("/v1/image-fetches")).json()["items"]] == [done["id"]]


@pytest.mark.parametrize(
    ("path", "change", "why"),
    [
        ("/disk.raw", {"sha256": "0" * 64}, "SHA256 is"),
        ("/nothing", {}, "answers 404"),
        ("/disk.qcow2", {}, "contains a raw image"),
        ("/disk.gz", {}, "SHA256 is"),
    ],
)
async def test_what_is_wrong_with_it_is_said(
    admin: httpx.AsyncClient, api: ApiServer, site: Site, path: str, change: dict[str, str], why: str
) -> None:
    wish = {"name": "web", "url": site.url + path, "sha256": SUM, **change}
    done = await ended(admin, (await admin.post("/v1/image-fetches", json=wish)).json())
    assert done["status"] == "failed"
    assert why in done["error"]
    assert [image["name"] for image in (await admin.get("/v1/images")).json()["items"]] == ["nothing"]


async def test_a_fetch_is_cancelled_and_leaves_nothing(admin: httpx.AsyncClient, api: ApiServer, site: Site) -> None:
    site.may.clear()
    wish = {"name": "web", "url": f"{site.url}/disk.raw", "sha256": SUM}
    begun = (await admin.post("/v1/image-fetches", json=wish)).json()
    for _ in range(2):
        assert (await admin.delete(f"/v1/image-fetches/{begun['id']}")).json()["status"] == "cancelled"
    assert list((api.server.folder / "fetches").glob("*")) == []
    assert (await admin.get("/v1/image-fetches/unknown")).status_code == 404


@pytest.mark.parametrize(
    ("wish", "status"),
    [
        ({"url": "http://127.0.0.1/disk.raw"}, 422),
        ({"url": "file:///etc/passwd", "sha256": SUM}, 422),
        ({"url": "https://a/b", "checksum_url": "http://a/SUMS"}, 422),
        ({"url": "https://a/b", "checksum_url": "https://a/SUMS", "sha256": SUM}, 422),
        ({"url": "https://a/b", "name": "nothing"}, 409),
        ({"url": "https://a/b", "name": "-x-"}, 422),
    ],
)
async def test_what_proves_nothing_or_makes_no_sense_is_not_begun(
    admin: httpx.AsyncClient, wish: dict[str, str], status: int
) -> None:
    answer = await admin.post("/v1/image-fetches", json={"name": "web", **wish})
    assert answer.status_code == status, answer.text
    assert (await admin.get("/v1/image-fetches")).json()["items"] == []


async def test_only_admins_have_the_server_fetch(api: ApiServer) -> None:
    member = await api.token("m", Role.MEMBER)
    for answer in (
        await member.post("/v1/image-fetches", json={"name": "web", "url": "https://a/b"}),
        await member.get("/v1/image-fetches"),
        await member.delete("/v1/image-fetches/x"),
    ):
        assert answer.status_code == 403


async def test_an_image_is_downloaded_whole_or_in_part(admin: httpx.AsyncClient) -> None:
    form = {"name": "mine", "kind": "disk", "min_memory_mib": "200"}
    made = await admin.post("/v1/images", data=form, files={"disk": ("d.raw.gz", gzip.compress(DISK))})
    assert made.status_code == 201, made.text
    assert made.json()["converted_from"] == "raw, gzip"
    assert (await admin.get("/v1/images/mine")).json() == made.json()
    assert (await admin.get("/v1/images/mine/content")).content == DISK
    part = await admin.get("/v1/images/mine/content", headers={"Range": "bytes=440-515"})
    assert (part.status_code, part.content) == (206, DISK[440:516])
    assert (await admin.get("/v1/images/mine/content?part=initrd")).status_code == 404
    assert (await admin.get("/v1/images/mine/content?part=x")).status_code == 422
    assert (await admin.get("/v1/images/none/content")).status_code == 404
    answer = await admin.post("/v1/instances", json={"name": "vm1", "image": "mine", "memory_mib": 199})
    assert (answer.status_code, "at least 200 MiB" in answer.text) == (422, True)
    assert (await admin.post("/v1/instances", json={"name": "vm1", "image": "mine", "memory_mib": 200})).is_success


async def test_user_data_may_be_bytes_and_what_has_no_effect_is_warned_of(admin: httpx.AsyncClient) -> None:
    good = base64.b64encode(gzip.compress(b"\n#cloud-config\n{}\n")).decode()
    made = await admin.post("/v1/instances", json={"name": "one", "image": "nothing", "user_data_base64": good})
    assert (made.status_code, made.json()["warnings"]) == (202, [])
    made = await admin.post("/v1/instances", json={"name": "two", "image": "nothing", "user_data": "hello"})
    assert made.status_code == 202
    assert "cloud-init ignores it" in made.json()["warnings"][0]
