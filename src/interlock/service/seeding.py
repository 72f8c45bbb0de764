"""What a caller wants a new guest to be told of itself, and whether it makes sense by itself.

How a guest is told is the hypervisor's; nothing here is ever repeated in an answer or an event, since user-data may
hold secrets.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from typing import Final

from interlock.core.errors import Invalid
from interlock.core.specs import Seed
from interlock.service.wishes import NewInstance

_HOSTNAME: Final = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
)
_KEY: Final = re.compile(r"([a-z0-9][a-z0-9@.-]{2,63}) ([A-Za-z0-9+/]+={0,2})( [\x20-\x7e\xa0-\U0010ffff]*)?")
_KEY_TYPES: Final = (
    *("ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"),
    *("sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com"),
)
_USER_DATA_BEGINNINGS: Final = (
    *("#!", "#cloud-config", "#cloud-boothook", "#include", "#part-handler", "## template:"),
    *("Content-Type:", "MIME-Version:", "From "),
)
"""By which cloud-init knows what to do with it; the last three begin a MIME message."""


def seed_of(wish: NewInstance) -> Seed | None:
    """What the guest is to be told, or None if the caller says nothing of it.

    Raises:
        Invalid: names the field and what was expected.
    """
    if not (wish.hostname or wish.ssh_keys or wish.user_data or wish.network_config):
        return None
    hostname = wish.hostname or wish.name
    if _HOSTNAME.fullmatch(hostname) is None:
        raise Invalid(
            f"hostname: {hostname[:80]!r} is none; expected lower-case letters, digits and hyphens, in parts of up to "
            "63 with dots between them."
        )
    for number, key in enumerate(wish.ssh_keys):
        _check_key(key, f"ssh_keys[{number}]")
    if wish.user_data is not None:
        _check_text(wish.user_data, "user_data")
        if not wish.user_data.lstrip("\ufeff").startswith(_USER_DATA_BEGINNINGS):
            raise Invalid(
                "user_data: its beginning does not tell cloud-init what it is.",
                remedy="Begin it with `#cloud-config`, with `#!` and a shell, or with the headers of a MIME message.",
            )
    if wish.network_config is not None:
        _check_text(wish.network_config, "network_config")
        if re.search(r"^\W*(version|network)\b", wish.network_config, re.MULTILINE) is None:
            raise Invalid("network_config: expected cloud-init's network configuration, which names its `version`.")
    return Seed(hostname=hostname, ssh_keys=wish.ssh_keys, user_data=wish.user_data, network_config=wish.network_config)


def _check_key(key: str, field: str) -> None:
    found = _KEY.fullmatch(key)
    if found is None or found.group(1) not in _KEY_TYPES:
        what = "a private key" if "PRIVATE KEY" in key else "no public key"
        raise Invalid(
            f"{field}: this is {what}; expected a line such as `ssh-ed25519 AAAA... name`.",
            remedy="It stands in a file whose name ends in `.pub`.",
        )
    try:
        blob = base64.b64decode(found.group(2), validate=True)
        (length,) = struct.unpack(">I", blob[:4])
    except (binascii.Error, struct.error):
        length, blob = 0, b""
    if blob[4 : 4 + length] != found.group(1).encode():
        raise Invalid(f"{field}: the key is damaged: what it holds is no {found.group(1)} key.")


def _check_text(text: str, field: str) -> None:
    strange = re.search(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", text)
    if strange is not None:
        raise Invalid(f"{field}: it is no text: there is a byte {ord(strange.group()):#04x} at {strange.start()}.")
