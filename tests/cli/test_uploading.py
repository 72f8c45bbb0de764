"""Images on their way to the server."""

from __future__ import annotations

from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path

import pytest

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import AT
from interlock.api import schemas

IMAGE = schemas.Image(
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
