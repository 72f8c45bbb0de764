"""What callers send, and whether it makes sense by itself, before any state is looked at."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from interlock.core import parameters
from interlock.core.durations import EXPECTED, parse_duration
from interlock.core.errors import Invalid
from interlock.core.networks import NetworkKind
from interlock.core.operations import CATALOGUE, FIELDS, Operation
from interlock.core.parameters import NAME_PATTERN, HostName, Name, Reference, Tag
from interlock.core.restart_policy import Evacuate, RestartPolicy
from interlock.core.specs import INTERFACES_MAX, repr_hiding
from interlock.service.validation_messages import in_words, what_instead

SHA256_PATTERN: Final = "^[0-9a-fA-F]{64}$"
PATTERNS: Final = {**parameters.PATTERNS, SHA256_PATTERN: "64 hexadecimal digits"}
"""What the patterns mean, for the error of a value that does not match."""
LOOPBACK: Final = "127.0.0.1"
Group = Annotated[str, Meta(min_length=1, max_length=63, pattern=NAME_PATTERN, description="A group's name.")]
Url = Annotated[str, Meta(min_length=8, max_length=2000, description="Such as https://example.org/disk.qcow2.")]
SshKey = Annotated[str, Meta(min_length=1, max_length=16_384, description="A line of an OpenSSH public key file.")]
USER_DATA_LENGTH_MAX: Final = 64 * 1024
"""How long user-data and a network configuration may be, in characters each."""


class NewForward(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A port of the guest to reach at an address of its host."""

    host_port: Annotated[int, Meta(ge=1024, le=65_535)]
    guest_port: Annotated[int, Meta(ge=1, le=65_535)]
    host_address: Annotated[str, Meta(min_length=1, max_length=64)] = LOOPBACK
    """An IPv4 address of the host; `0.0.0.0`: all of them."""
    protocol: Literal["tcp", "udp"] = "tcp"


class NewSubnet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A range of addresses of a network to create."""

    prefix: Annotated[str, Meta(min_length=1, max_length=64)]
    """As in `10.7.0.0/24` or `fd00:7::/64`."""
    gateway: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    """The address of the hosts in it; by default its first address."""


class NewNetwork(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network to create."""

    name: Name
    kind: NetworkKind = NetworkKind.MANAGED
    """`managed`: a bridge of its own on each host, with DHCP, DNS and address translation. `bridge`: a bridge that the
    hosts have; for admins. `user`: through the connections of a process of the host."""
    shared: bool = False
    """Whether all projects may use it; for admins."""
    subnets: Annotated[tuple[NewSubnet, ...], Meta(max_length=2)] = ()
    """Of the kind `managed`: at most one of IPv4 and one of IPv6; by default a free range of IPv4."""
    domain: Annotated[str, Meta(max_length=200)] = ""
    """Of the kind `managed`: the DNS domain of its guests; by default `NAME.internal`."""
    bridge: Annotated[str, Meta(max_length=64)] = ""
    """Of the kind `bridge`: the name of the bridge on the hosts."""
    vlan: int | None = None
    """Of the kind `bridge`: the VLAN, 1 to 4094."""
    mtu: int | None = None
    """Of the kinds `bridge` and `managed`, 576 to 9216; by default that of the bridge."""
    outbound: bool = True
    """Of the kinds `user` and `managed`: whether guests reach addresses beyond the network."""
    closed_inside: bool = False
    """Whether guests of the network reach each other only as security groups allow."""
    open_outside: bool = False
    """Whether guests are reached from outside of the network without a security group that allows it."""


Rate = Annotated[int, Meta(ge=8, le=1_000_000_000, description="In kbit/s.")]


class NewInterface(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An interface of an instance to create."""

    network: Reference
    addresses: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...], Meta(max_length=2)] = ()
    """Addresses of a managed network, at most one of IPv4 and one of IPv6; by default free ones."""
    mac: Annotated[str, Meta(pattern=parameters.MAC_PATTERN)] | None = None
    """By default one is generated."""
    inbound_kbit: Rate | None = None
    """The limit of what the guest receives; null: none."""
    outbound_kbit: Rate | None = None
    """The limit of what the guest sends; null: none."""
    allow: Annotated[str, Meta(max_length=2000)] = ""
    """Which connections from outside of the network are allowed, such as `tcp 22 from 10.0.0.0/8, icmp`."""
    security_groups: Annotated[tuple[Name, ...], Meta(max_length=16)] = ()
    """Security groups of the project, whose rules apply beside those in `allow`."""


Rules = Annotated[str, Meta(max_length=2000)]


class NewSecurityGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A security group to create."""

    name: Name
    allow: Rules = ""
    """Which connections are allowed, such as `tcp 22 from 10.0.0.0/8, icmp`."""


class SecurityGroupChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """New rules of a security group."""

    allow: Rules
    """Which connections are allowed, instead of the present rules; empty: none."""


class NewInstance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An instance to create."""

    __repr__ = repr_hiding("user_data", "user_data_base64", "network_config")

    name: Name
    image: Reference
    vcpus: Annotated[int, Meta(ge=1, le=64)] = 1
    memory_mib: Annotated[int, Meta(ge=64, le=1_048_576)] = 128
    root_gib: Annotated[int, Meta(ge=0, le=65_536)] = 0
    networks: Annotated[tuple[NewInterface, ...], Meta(max_length=1 + INTERFACES_MAX)] = ()
    """Its interfaces, the first one first; by default one on a user network of its own."""
    forwards: Annotated[tuple[NewForward, ...], Meta(max_length=32)] = ()
    tags: Annotated[tuple[Tag, ...], Meta(max_length=64)] = ()
    blocked_operations: Annotated[tuple[Operation, ...], Meta(max_length=64)] = ()
    """Operations refused whatever the policy says, such as `delete` for protection."""
    restart: RestartPolicy | None = None
    """What is done when its guest ends by itself; by default it is left as it is."""
    evacuate: Evacuate | None = None
    """Whether it is evacuated by itself once its host is fenced; by default as the server's configuration says."""
    apart_from: Annotated[tuple[Group, ...], Meta(max_length=16)] = ()
    """Groups of the project: no two instances of one are ever on the same host."""
    hostname: Annotated[str, Meta(min_length=1, max_length=253)] | None = None
    """What the guest is to call itself, by cloud-init; by default its name in lower case, with hyphens in place of
    underscores, if anything else is said to cloud-init."""
    ssh_keys: Annotated[tuple[SshKey, ...], Meta(max_length=32)] = ()
    """Public keys that may log in, as they stand in a `.pub` file."""
    user_data: Annotated[str, Meta(max_length=USER_DATA_LENGTH_MAX)] | None = None
    """For cloud-init: `#cloud-config`, a script that begins with `#!`, or a MIME message. It is never shown again."""
    user_data_base64: Annotated[str, Meta(max_length=USER_DATA_LENGTH_MAX // 3 * 4 + 4)] | None = None
    """The same for user-data that is no text, such as a gzip file: its bytes in base64. Instead of `user_data`."""
    network_config: Annotated[str, Meta(max_length=USER_DATA_LENGTH_MAX)] | None = None
    """For cloud-init; by default made from `networks`, or without those DHCP on the first interface."""
    host: HostName | None = None
    """Where it runs: a host's name, or `any` for the one with the fewest instances of those that have room. Default:
    the server's own."""
    start: bool = True
    """False only records it, as `stopped`; the first `start` makes its disk and boots it."""


class Labels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an owner may change of an instance's record at any time; what is not named stays."""

    tags: Annotated[tuple[Tag, ...], Meta(max_length=64)] | None = None
    blocked_operations: Annotated[tuple[Operation, ...], Meta(max_length=64)] | None = None
    restart: RestartPolicy | None = None
    evacuate: Evacuate | None = None
    apart_from: Annotated[tuple[Group, ...], Meta(max_length=16)] | None = None


class NewImageFetch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A disk image that the server is to fetch from the web."""

    name: Name
    url: Url
    """Over https; over http only where a sum proves what came."""
    sha256: Annotated[str, Meta(pattern=SHA256_PATTERN)] | None = None
    """What its SHA-256 must be."""
    checksum_url: Url | None = None
    """Of a checksum file (SHA256SUMS, SHA512SUMS) that names the file; instead of `sha256`."""
    format: Literal["raw"] | None = None
    """`raw` takes it as a disk although it has no boot sector; by default the format is recognised."""
    min_memory_mib: Annotated[int, Meta(ge=0, le=1_048_576)] | None = None
    """The least memory with which it boots."""


class NewRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An operation to carry out on an instance."""

    __repr__ = repr_hiding("parameters")

    operation: Operation
    parameters: dict[str, Any] = {}
    hold: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    """If it is refused now: for how long to wait for the policy to admit it, such as `10m`."""


class NewVolume(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A volume to make."""

    name: Name
    size_mib: Annotated[int, Meta(ge=1, le=1024 * 1024 * 64)]


HOLD_MAX_MS: Final = 7 * 24 * 3_600_000
"""For how long a request may be held."""


def hold_ms(text: str | None) -> int | None:
    """How long a request is held, in milliseconds; None if it is not.

    Raises:
        Invalid: it is no length of time, or too long.
    """
    if text is None:
        return None
    length_ms = parse_duration(text)
    if not length_ms or length_ms > HOLD_MAX_MS:
        raise Invalid(f"Invalid hold {text[:80]!r}: expected a duration such as 30s or 10m, of at most seven days.")
    return length_ms


def duration_ms(field: str, text: str | None) -> int | None:
    """Parse the duration in a field of a body to milliseconds; None for None. Raises `Invalid`, also for 0."""
    length_ms = None if text is None else parse_duration(text)
    if text is not None and not length_ms:
        raise Invalid(f"Invalid {field} {text[:80]!r}: expected {EXPECTED}.")
    return length_ms


def check_parameters(operation: Operation, given: dict[str, Any]) -> dict[str, Any]:
    """The parameters of an operation, checked, as they are recorded.

    Raises:
        Invalid: names the parameter and what was expected.
    """
    kind = CATALOGUE[operation].parameters
    try:
        checked = msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        wrong = in_words(str(error), PATTERNS)
        remedy = what_instead(str(error), kind)
        if remedy is None and " - at `$" not in str(error):
            # No value is wrong, but the names.
            remedy = f"It takes: {', '.join(_names(operation)) or 'none'}."
        raise Invalid(f"parameters of {operation.value}: {wrong}.", remedy=remedy) from None
    if kind.required_any and checked == kind():
        *names, last = _names(operation)
        remedy = f"Name {', '.join(names)} or {last}."
        raise Invalid(f"parameters of {operation.value}: nothing is to change.", remedy=remedy)
    try:
        checked.check()
    except Invalid as error:
        raise Invalid(f"parameters of {operation.value}: {error.message}", remedy=error.remedy) from None
    built: dict[str, Any] = msgspec.to_builtins(checked)
    return built


def _names(operation: Operation) -> list[str]:
    return [field.name for field in FIELDS[operation]]
