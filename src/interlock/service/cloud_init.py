"""Validation of cloud-init input: hostname, SSH keys, user-data and network configuration.

No response and no event contains it, since user-data may hold secrets.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from interlock.core.errors import Invalid
from interlock.core.specs import Interface, Seed
from interlock.service import user_data
from interlock.service.request_models import USER_DATA_LENGTH_MAX, NewInstance

_HOSTNAME: Final = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
)
_KEY: Final = re.compile(r"([a-z0-9][a-z0-9@.-]{2,63}) ([A-Za-z0-9+/]+={0,2})( [\x20-\x7e\xa0-\U0010ffff]*)?")
_KEY_TYPES: Final = (
    *("ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"),
    *("sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com"),
)


def seed_of(new: NewInstance) -> Seed | None:
    """Return the cloud-init data of a new instance, or None if the caller gives none.

    Raises:
        Invalid: names the field and what was expected.
    """
    data = user_data_of(new)
    if not (new.hostname or new.ssh_keys or data or new.network_config):
        return None
    hostname = new.hostname or hostname_of(new.name)
    if _HOSTNAME.fullmatch(hostname) is None:
        raise Invalid(
            f"Invalid hostname {hostname[:80]!r}: expected lower-case letters, digits and hyphens, in labels of up to "
            "63 separated by dots."
        )
    for number, key in enumerate(new.ssh_keys):
        _check_key(key, f"ssh_keys[{number}]")
    if new.user_data is not None:
        _check_text(new.user_data, "user_data")
    if new.network_config is not None:
        _check_text(new.network_config, "network_config")
        if re.search(r"^\W*(version|network)\b", new.network_config, re.MULTILINE) is None:
            raise Invalid("network_config: expected a cloud-init network configuration with a `version`.")
    return Seed(
        hostname=hostname,
        ssh_keys=new.ssh_keys,
        user_data=new.user_data or None,
        user_data_bytes=data if data and not new.user_data else None,
        network_config=new.network_config,
    )


def with_network_config(seed: Seed | None, name: str, interfaces: Sequence[Interface]) -> Seed | None:
    """Return the seed with a network configuration for the interfaces, unless the caller gave one.

    Without it cloud-init configures the first interface only. An instance with further ones gets a seed for it.
    """
    if not interfaces or (seed is None and len(interfaces) == 1) or (seed is not None and seed.network_config):
        return seed
    ethernets = {f"interface{number}": _ethernet(one, first=not number) for number, one in enumerate(interfaces)}
    # JSON is valid YAML with everything quoted.
    config = json.dumps({"version": 2, "ethernets": ethernets}, indent=1) + "\n"
    return msgspec.structs.replace(seed or Seed(hostname=hostname_of(name)), network_config=config)


def _ethernet(interface: Interface, *, first: bool) -> dict[str, Any]:
    """Return an interface as in version 2 of cloud-init's network configuration: all kinds have DHCP."""
    network = interface.network
    six = network is not None and any(":" in subnet.prefix for subnet in network.subnets)
    found: dict[str, Any] = {"match": {"macaddress": interface.mac}, "dhcp4": True}
    found |= {"dhcp6": True} if six else {}
    found |= {"mtu": network.mtu} if network is not None and network.mtu is not None else {}
    # Without a carrier on it, the guest boots all the same; and its default route is that of the first.
    return found if first else {**found, "optional": True, "dhcp4-overrides": {"route-metric": 200}}


def user_data_of(new: NewInstance) -> bytes | None:
    """Return the user-data from either of its two fields. Raises `Invalid`."""
    if new.user_data_base64 is None:
        return None if new.user_data is None else new.user_data.encode()
    if new.user_data is not None:
        raise Invalid("user_data: mutually exclusive with user_data_base64.", remedy="Give one of them.")
    try:
        data = base64.b64decode(re.sub(r"\s+", "", new.user_data_base64), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Invalid(f"user_data_base64: invalid base64 ({error}).") from None
    if len(data) > USER_DATA_LENGTH_MAX:
        raise Invalid(
            f"user_data_base64: {len(data)} bytes; the limit is {USER_DATA_LENGTH_MAX}.",
            remedy="Serve the data at a URL and refer to it with `#include`.",
        )
    return data


def warnings_of(new: NewInstance) -> tuple[str, ...]:
    """Return warnings about user-data that cloud-init would ignore silently, one sentence each."""
    data = user_data_of(new)
    return () if data is None else user_data.warnings(data)


def hostname_of(name: str) -> str:
    """Derive a hostname from a VM name: lower case, hyphens for invalid characters (RFC 1123, 2.1)."""
    labels = (re.sub("[^a-z0-9-]", "-", label).strip("-") for label in name.lower().split("."))
    return ".".join(label for label in labels if label)


def _check_key(key: str, field: str) -> None:
    found = _KEY.fullmatch(key)
    if found is None or found.group(1) not in _KEY_TYPES:
        what = "this is a private key" if "PRIVATE KEY" in key else "invalid public key"
        raise Invalid(
            f"{field}: {what}; expected a line such as `ssh-ed25519 AAAA... name`.",
            remedy="Use the file whose name ends in `.pub`.",
        )
    try:
        blob = base64.b64decode(found.group(2), validate=True)
        (length,) = struct.unpack(">I", blob[:4])
    except (binascii.Error, struct.error):
        length, blob = 0, b""
    if blob[4 : 4 + length] != found.group(1).encode():
        raise Invalid(f"{field}: the key is damaged: its data is not a {found.group(1)} key.")


def _check_text(text: str, field: str) -> None:
    control = re.search(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", text)
    if control is not None:
        raise Invalid(
            f"{field}: not text: control character {ord(control.group()):#04x} at offset {control.start()}.",
            remedy="Send binary data in base64, as user_data_base64." if field == "user_data" else None,
        )
