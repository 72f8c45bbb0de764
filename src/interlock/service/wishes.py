"""What callers send, and whether it makes sense by itself, before any state is looked at."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
from msgspec import Meta

from interlock.core.errors import Invalid
from interlock.core.operations import Operation
from interlock.core.restart_policy import RestartPolicy
from interlock.core.states import VmState
from interlock.policies.durations import parse_duration
from interlock.service.expectations import in_words, what_instead

NAME_PATTERN: Final = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
END: Final = r"$(?!\n)"
"""Where a text ends, in a pattern: Python's `$` matches before a last newline too, and JSON Schema knows no `\\Z`."""
MAC_PATTERN: Final = "^(?!00(:00){5})[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}" + END
"""An address of one interface, and not of many."""
TAG_PATTERN: Final = r"^[^\x00-\x1f\x7f-\x9f]+" + END
USER_PATTERN: Final = r"^[^\x00-\x20:,/\x7f]+" + END
PASSWORD_PATTERN: Final = r"^[^\x00\n\r]+" + END
SHA256_PATTERN: Final = "^[0-9a-fA-F]{64}$"
BACKUP_PATTERN: Final = "^[a-z0-9]+(-[a-z0-9]+)*" + END
PATTERNS: Final = {
    NAME_PATTERN: "a name: 1 to 63 lower-case letters, digits and hyphens, starting and ending with a letter or digit",
    TAG_PATTERN: "a text without control characters",
    MAC_PATTERN: "the address of one interface, as in 52:54:00:12:34:56",
    USER_PATTERN: "the name of a user, without spaces, commas, colons and slashes",
    PASSWORD_PATTERN: "a password of one line",
    SHA256_PATTERN: "64 hexadecimal digits",
    BACKUP_PATTERN: "lower-case letters, digits and single hyphens, as in daily",
}
"""What the patterns mean, for who is told that something does not match."""
_NAME = re.compile(NAME_PATTERN[:-1] + r"\Z")

Name = Annotated[
    str,
    Meta(min_length=1, max_length=63, pattern=NAME_PATTERN, description="Lower-case letters, digits and hyphens."),
]
Reference = Annotated[str, Meta(min_length=1, max_length=63, description="An id or a name.")]
Tag = Annotated[
    str,
    Meta(min_length=1, max_length=64, pattern=TAG_PATTERN, description="No control characters."),
]


SshKey = Annotated[str, Meta(min_length=1, max_length=16_384, description="A line of an OpenSSH public key file.")]
USER_DATA_LENGTH_MAX: Final = 64 * 1024
"""How long user-data and a network configuration may be, in characters each."""


class NewForward(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A TCP port of the guest to reach on the host's loopback address."""

    host_port: Annotated[int, Meta(ge=1024, le=65_535)]
    guest_port: Annotated[int, Meta(ge=1, le=65_535)]


class NewInstance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An instance to create."""

    name: Name
    image: Reference
    vcpus: Annotated[int, Meta(ge=1, le=64)] = 1
    memory_mib: Annotated[int, Meta(ge=64, le=1_048_576)] = 128
    root_gib: Annotated[int, Meta(ge=0, le=65_536)] = 0
    forwards: Annotated[tuple[NewForward, ...], Meta(max_length=32)] = ()
    tags: Annotated[tuple[Tag, ...], Meta(max_length=64)] = ()
    blocked_operations: Annotated[tuple[Operation, ...], Meta(max_length=64)] = ()
    """Operations refused whatever the policy says, such as `delete` for protection."""
    restart: RestartPolicy | None = None
    """What is done when its guest ends by itself; by default it is left as it is."""
    hostname: Annotated[str, Meta(min_length=1, max_length=253)] | None = None
    """What the guest is to call itself, by cloud-init; by default its name, if anything else is said to cloud-init."""
    ssh_keys: Annotated[tuple[SshKey, ...], Meta(max_length=32)] = ()
    """Public keys that may log in, as they stand in a `.pub` file."""
    user_data: Annotated[str, Meta(max_length=USER_DATA_LENGTH_MAX)] | None = None
    """For cloud-init: `#cloud-config`, a script that begins with `#!`, or a MIME message. It is never shown again."""
    network_config: Annotated[str, Meta(max_length=USER_DATA_LENGTH_MAX)] | None = None
    """For cloud-init; by default the first interface asks for its address (DHCP)."""
    host: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    """Where it runs: a host's name, or `any` for the one with the fewest instances of those that have room. Default:
    the server's own."""
    start: bool = True
    """False only records it, in `building`; a `start` makes and boots it later."""


class Labels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an owner may change of an instance's record at any time; what is not named stays."""

    tags: Annotated[tuple[Tag, ...], Meta(max_length=64)] | None = None
    blocked_operations: Annotated[tuple[Operation, ...], Meta(max_length=64)] | None = None
    restart: RestartPolicy | None = None


class NewRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An operation to carry out on an instance."""

    operation: Operation
    parameters: dict[str, Any] = {}
    hold: Annotated[str, Meta(min_length=2, max_length=64)] | None = None
    """If it is refused now: for how long to wait for the policy to admit it, such as `10m`."""


class NewVolume(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A volume to make."""

    name: Name
    size_mib: Annotated[int, Meta(ge=1, le=1024 * 1024 * 64)]


class NoParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The operation takes none."""


class HardParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of stop and reboot."""

    hard: bool = False
    """True does not ask the guest."""


class VolumeParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of attach_volume and detach_volume."""

    volume: Reference


class RescueParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of rescue."""

    image: Reference | None = None
    """What it boots meanwhile; none: its own image afresh."""


class PasswordParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of set_password. The password is in no record, and in no answer but that to the submission that has none."""

    user: Annotated[str, Meta(min_length=1, max_length=256, pattern=USER_PATTERN)] = "root"
    password: Annotated[str, Meta(min_length=1, max_length=512, pattern=PASSWORD_PATTERN)] | None = None
    """None: one is made up, and told once."""


class RebuildParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of rebuild."""

    image: Reference | None = None
    """What it is rebuilt from; none: the image that it was made of."""


class ResizeParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of resize: what is to be another; what is not named stays."""

    vcpus: Annotated[int, Meta(ge=1, le=64)] | None = None
    memory_mib: Annotated[int, Meta(ge=64, le=1_048_576)] | None = None
    root_gib: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    """Of the root disk, which never shrinks."""


class SnapshotParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of snapshot."""

    name: Name
    """Of the image that is made; in use from the moment that it is asked for."""


class BackupParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of backup."""

    backup_type: Annotated[str, Meta(max_length=20, pattern=BACKUP_PATTERN)]
    """With which others it rotates, such as `daily`: lower-case letters, digits and single hyphens."""
    rotation: Annotated[int, Meta(ge=1, le=100)]
    """How many of that type are kept, this one included."""


class SwapParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of swap_volume."""

    old: Reference
    new: Reference
    """Takes the place of the old volume; at least as large."""
    copy: bool = True
    """False takes the new volume with what is on it, for an old one that cannot be read any more."""


class AttachInterfaceParameters(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Of attach_interface."""

    mac: Annotated[str, Meta(pattern=MAC_PATTERN)] | None = None
    """Its address; none: one is made up."""


class DetachInterfaceParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of detach_interface."""

    interface: Annotated[str, Meta(min_length=1, max_length=63)]
    """Its id."""


class MigrateParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of migrate and live_migrate."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    """Where it goes: a host's name, or `any` for the one with the fewest instances of those that have room."""


class EvacuateParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of evacuate."""

    host: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    """Where it is taken up: a host's name, or `any` as above. Default: the server's own host."""
    from_image: bool = False
    """True lets its root disk begin as its image again, whatever was on it. One in a folder that hosts share is gone on
    with otherwise; one that was on the host's own disk is lost with the host."""


class ResetStateParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of reset_state."""

    vm_state: VmState = VmState.ERROR
    reason: Annotated[str, Meta(min_length=1, max_length=1000)]
    """Why, for the audit."""


class MetadataParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of set_metadata: what is noted, and which notes are taken away."""

    set: Annotated[dict[Tag, Annotated[str, Meta(max_length=1000)]], Meta(max_length=64)] = {}
    remove: Annotated[tuple[Tag, ...], Meta(max_length=64)] = ()


PARAMETERS: Final[dict[Operation, type[msgspec.Struct]]] = {
    Operation.STOP: HardParameters,
    Operation.REBOOT: HardParameters,
    Operation.ATTACH_VOLUME: VolumeParameters,
    Operation.DETACH_VOLUME: VolumeParameters,
    Operation.RESCUE: RescueParameters,
    Operation.SET_PASSWORD: PasswordParameters,
    Operation.SWAP_VOLUME: SwapParameters,
    Operation.ATTACH_INTERFACE: AttachInterfaceParameters,
    Operation.DETACH_INTERFACE: DetachInterfaceParameters,
    Operation.REBUILD: RebuildParameters,
    Operation.RESIZE: ResizeParameters,
    Operation.MIGRATE: MigrateParameters,
    Operation.LIVE_MIGRATE: MigrateParameters,
    Operation.EVACUATE: EvacuateParameters,
    Operation.SNAPSHOT: SnapshotParameters,
    Operation.BACKUP: BackupParameters,
    Operation.RESET_STATE: ResetStateParameters,
    Operation.SET_METADATA: MetadataParameters,
}
"""What the parameters of an operation look like; those not named take none."""

_RESETTABLE: Final = frozenset({VmState.ACTIVE, VmState.STOPPED, VmState.ERROR})


def check_name(name: str, field: str) -> None:
    """Raise `Invalid` unless `name` can be a name: lower-case letters, digits, hyphens, at most 63, and no id."""
    if _NAME.match(name) is None:
        raise Invalid(
            f"{field}: {name[:80]!r} is no name; expected 1 to 63 lower-case letters, digits and hyphens, "
            "starting and ending with a letter or digit."
        )
    if is_id(name):
        raise Invalid(f"{field}: {name!r} looks like an id; choose a name that does not.")


def is_id(text: str) -> bool:
    """Whether a reference is an id rather than a name."""
    try:
        return str(UUID(text)) == text.lower()
    except ValueError:
        return False


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
        raise Invalid(f'hold: {text[:80]!r}; expected a length of time such as "30s" or "10m", at most seven days.')
    return length_ms


def check_parameters(operation: Operation, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters of an operation, checked, with the defaults left out.

    Raises:
        Invalid: names the parameter and what was expected.
    """
    kind = PARAMETERS.get(operation, NoParameters)
    try:
        wish = msgspec.convert(parameters, kind)
    except msgspec.ValidationError as error:
        names = ", ".join(field.name for field in msgspec.structs.fields(kind)) or "none"
        wrong = in_words(str(error), PATTERNS)
        remedy = what_instead(str(error), kind) or f"It takes: {names}."
        raise Invalid(f"parameters of {operation.value}: {wrong}.", remedy=remedy) from None
    if isinstance(wish, ResetStateParameters) and wish.vm_state not in _RESETTABLE:
        raise Invalid(
            f"parameters of reset_state: vm_state {wish.vm_state.value!r}; expected active, stopped or error."
        )
    if isinstance(wish, ResizeParameters) and wish == ResizeParameters():
        raise Invalid("parameters of resize: nothing is to change.", remedy="Name vcpus, memory_mib or root_gib.")
    if isinstance(wish, SnapshotParameters):
        check_name(wish.name, "parameters of snapshot: name")
    built: dict[str, Any] = msgspec.to_builtins(wish)
    return built
