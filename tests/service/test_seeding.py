"""What a new guest is to be told: what is refused before it is kept, in words that name the field."""

from __future__ import annotations

import base64
import gzip
import struct
from typing import Any

import pytest

from interlock.core.errors import Invalid
from interlock.core.records import Seed
from interlock.service.cloud_init import seed_of, warnings_of
from interlock.service.request_models import USER_DATA_LENGTH_MAX, NewInstance


def key(kind: str = "ssh-ed25519", claimed: str | None = None) -> str:
    blob = struct.pack(">I", len(kind)) + kind.encode() + struct.pack(">I", 32) + bytes(32)
    return f"{claimed or kind} {base64.b64encode(blob).decode()} me@here"


def wish(**changes: Any) -> NewInstance:
    return NewInstance(name="web", image="debian", **changes)


def test_nothing_said_is_no_seed() -> None:
    assert seed_of(wish()) is None


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "sk-ssh-ed25519@openssh.com"])
def test_the_hostname_is_the_name_unless_another_is_said(kind: str) -> None:
    assert seed_of(wish(ssh_keys=(key(kind),))) == Seed(hostname="web", ssh_keys=(key(kind),))
    assert seed_of(wish(hostname="web-1.example.org")) == Seed(hostname="web-1.example.org")


@pytest.mark.parametrize(
    ("name", "hostname"),
    [
        ("web", "web"),
        ("Web_Server.Example", "web-server.example"),
        ("A__b", "a--b"),
        ("a._b", "a.b"),
        ("a..b", "a.b"),
        ("a.-_-.b", "a.b"),
        ("9.9", "9.9"),
    ],
)
def test_the_hostname_is_made_of_a_name_that_cannot_be_one(name: str, hostname: str) -> None:
    assert seed_of(NewInstance(name=name, image="debian", ssh_keys=(key(),))) == Seed(
        hostname=hostname, ssh_keys=(key(),)
    )


@pytest.mark.parametrize(
    "text",
    [
        "#cloud-config\n{}\n",
        "#!/bin/sh\necho\n",
        "#include\nhttps://example.org\n",
        "## template: jinja\n#cloud-config\n",
        'MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="x"\n',
    ],
)
def test_user_data_is_what_cloud_init_knows(text: str) -> None:
    assert seed_of(wish(user_data=text)) == Seed(hostname="web", user_data=text)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("hostname", "Web", "hostname"),
        ("hostname", "a_b", "hostname"),
        ("hostname", "-a", "hostname"),
        ("hostname", "a\n", "hostname"),
        ("hostname", "x" * 64, "hostname"),
        ("ssh_keys", (key(), "ssh-ed25519"), r"ssh_keys\[1\].*public key"),
        ("ssh_keys", ("-----BEGIN OPENSSH PRIVATE KEY-----",), "a private key"),
        ("ssh_keys", (key("ssh-dss"),), "public key"),
        ("ssh_keys", (f"{key()}\nssh-rsa AAAA",), "public key"),
        ("ssh_keys", (f'command="x" {key()}',), "public key"),
        ("ssh_keys", (key(claimed="ssh-rsa"),), "damaged"),
        ("ssh_keys", ("ssh-ed25519 AAA",), "damaged"),
        ("user_data", "#!/bin/sh\n\0", "not text"),
        ("user_data", "\x1f\x8b\x08", "not text"),
        ("network_config", "ethernets: {}", "version"),
        ("network_config", "version: 2\x07", "not text"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_field(field: str, value: Any, why: str) -> None:
    with pytest.raises(Invalid, match=why):
        seed_of(wish(**{field: value}))


def test_user_data_may_be_bytes_which_stay_as_they_are() -> None:
    data = gzip.compress(b"#cloud-config\n{}\n")
    wished = wish(user_data_base64=base64.encodebytes(data).decode())
    assert seed_of(wished) == Seed(hostname="web", user_data_bytes=data)
    assert warnings_of(wished) == ()
    assert warnings_of(wish()) == ()
    assert warnings_of(wish(user_data="hello"))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"user_data_base64": "???"}, "invalid base64"),
        ({"user_data_base64": "QQ"}, "invalid base64"),
        ({"user_data_base64": "\u00e4"}, "invalid base64"),
        ({"user_data_base64": "QQ==", "user_data": "#!/bin/sh"}, "mutually exclusive"),
        ({"user_data_base64": base64.b64encode(bytes(USER_DATA_LENGTH_MAX + 1)).decode()}, "the limit is"),
    ],
)
def test_bytes_that_cannot_be_taken_are_refused(given: dict[str, str], why: str) -> None:
    with pytest.raises(Invalid, match=why):
        seed_of(wish(**given))
