"""Images on their way to the server."""

from __future__ import annotations

import hashlib
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path

import msgspec
import pytest

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import AT
from interlock.api.schemas import inventory

IMAGE = inventory.Image(
    id="im-1", name="mine", kind="kernel", format="raw", cmdline="x", size_bytes=1536, sha256="0" * 64, created_at=AT
)


def test_a_kernel_and_its_parts_arrive_as_they_are(
    interlock: Interlock, server: ScriptedServer, tmp_path: Path
) -> None:
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    kernel.write_bytes(bytes(range(256)) * 5000)
    initrd.write_bytes(b"\r\n--almost a boundary\r\n")
    server.on("POST", "/v1/images", Given(201, IMAGE))
    ran = interlock("image", "add", "mine", "--kernel", str(kernel), "--initrd", str(initrd), "--cmdline", "quiet")
    assert ran.out == "Added: image mine (kernel, 1.5 KiB), id im-1\n"
    (asked,) = server.asked
    head = f"Content-Type: {asked.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + asked.body)
    parts = {part.get_param("name", header="content-disposition"): part for part in message.iter_parts()}
    assert {name: parts[name].get_payload(decode=True) for name in ("name", "kind", "cmdline")} == {
        "name": b"mine",
        "kind": b"kernel",
        "cmdline": b"quiet",
    }
    assert parts["kernel"].get_payload(decode=True) == kernel.read_bytes()
    assert parts["initrd"].get_payload(decode=True) == initrd.read_bytes()


@pytest.mark.parametrize("options", [(), ("--disk", "F", "--kernel", "F"), ("--disk", "F", "--cmdline", "x")])
def test_options_that_do_not_go_together_are_refused_before_anything_is_sent(
    interlock: Interlock, server: ScriptedServer, tmp_path: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / "F").touch()
    assert interlock("image", "add", "x", *(o.replace("F", str(tmp_path / "F")) for o in options)).code == 2
    assert server.asked == []


@pytest.mark.parametrize(("options", "form"), [((), "kernel"), (("--disk",), "disk")])
def test_the_small_guest_is_asked_for_in_the_form_that_is_wished(
    interlock: Interlock, server: ScriptedServer, options: tuple[str, ...], form: str
) -> None:
    server.on("POST", "/v1/images/small", Given(201, IMAGE))
    assert interlock("image", "build-small", "mine", *options).code == 0
    assert [asked.json for asked in server.asked] == [{"name": "mine", "form": form}]


FETCH = inventory.ImageFetch(
    id="f-1", name="web", url="https://example.org/a.qcow2", status="running", phase="downloading", received_bytes=1,
    total_bytes=9, begun_at=AT, image=None, error=None, remedy=None,
)  # fmt: skip
URL = ("image", "add", "web", "--url", FETCH.url)


def test_an_image_is_fetched_to_its_end_also_across_a_restart_of_the_server(
    interlock: Interlock, server: ScriptedServer
) -> None:
    missing = Given(404, {"type": "x", "title": "Not found", "status": 404, "detail": "no"}, "application/problem+json")
    again, done = msgspec.structs.replace(FETCH, id="f-2"), msgspec.structs.replace(FETCH, id="f-2", status="succeeded")
    server.on("POST", "/v1/image-fetches", Given(202, FETCH), Given(202, again))
    server.on("GET", "/v1/image-fetches/f-1", Given(200, FETCH), missing)
    server.on("GET", "/v1/image-fetches/f-2", Given(200, msgspec.structs.replace(done, image=IMAGE)))
    ran = interlock(*URL, "--checksum-file", "https://example.org/SHA512SUMS", "--min-memory", "256")
    assert ran.code == 0
    assert ran.out.endswith("Added: image mine (kernel, 1.5 KiB), id im-1\n")
    posted = [asked.json for asked in server.asked if asked.method == "POST"]
    assert posted[0] == posted[1]
    assert posted[0]["checksum_url"] == "https://example.org/SHA512SUMS"
    assert posted[0]["min_memory_mib"] == 256


def test_a_fetch_that_fails_says_why(interlock: Interlock, server: ScriptedServer) -> None:
    failed = msgspec.structs.replace(FETCH, status="failed", error="It answers 404.", remedy="Look.")
    server.on("POST", "/v1/image-fetches", Given(202, failed))
    ran = interlock(*URL)
    assert ran.code == 1
    assert "It answers 404." in ran.err
    assert "Look." in ran.err


@pytest.mark.parametrize("extra", [("--disk", "F"), ("--cmdline", "x"), ("--kernel", "F")])
def test_a_url_goes_with_nothing_of_a_file(
    interlock: Interlock, server: ScriptedServer, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    (tmp_path / "F").touch()
    assert interlock(*URL, *(word.replace("F", str(tmp_path / "F")) for word in extra)).code == 2
    assert server.asked == []


def test_an_image_is_downloaded_with_its_sum(interlock: Interlock, server: ScriptedServer, tmp_path: Path) -> None:
    content = b"{}"
    sha256 = hashlib.sha256(content).hexdigest()
    server.on("GET", "/v1/images/mine", Given(200, msgspec.structs.replace(IMAGE, kind="disk", sha256=sha256)))
    server.on("GET", "/v1/images/im-1/content", Given(200, {}))
    ran = interlock("image", "download", "mine", str(tmp_path / "out"))
    assert (ran.code, (tmp_path / "out").read_bytes()) == (0, content)
    assert f"SHA-256: {sha256} (as the original)" in ran.out
    assert interlock("image", "download", "mine", str(tmp_path / "out")).code == 2
