"""The parameters of the operations: their types, limits, meaning, and form on the command line.

The catalogue (`operations`) names the type of each operation. Validation, the resolution of references, the OpenAPI
description, the documentation and the command line are derived from these types.
"""

from __future__ import annotations

import re
from enum import StrEnum
from ipaddress import IPv4Address
from types import UnionType
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from interlock.core.command_forms import Argument, Option
from interlock.core.durations import parse_duration
from interlock.core.errors import Invalid
from interlock.core.networks import ingress_of

NAME_PATTERN: Final = "^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
END: Final = r"$(?!\n)"
"""The end of a text in a pattern: Python's `$` matches before a last newline too, and JSON Schema knows no `\\Z`."""
MAC_PATTERN: Final = "^(?!00(:00){5})[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}" + END
"""A unicast address."""
TAG_PATTERN: Final = r"^[^\x00-\x1f\x7f-\x9f]+" + END
USER_PATTERN: Final = r"^[^\x00-\x20:,/\x7f]+" + END
PASSWORD_PATTERN: Final = r"^[^\x00\n\r]+" + END
BACKUP_PATTERN: Final = "^[a-z0-9]+(-[a-z0-9]+)*" + END
PATTERNS: Final = {
    NAME_PATTERN: (
        "a name: 1 to 63 letters, digits, hyphens, dots and underscores, starting and ending with a letter or digit"
    ),
    TAG_PATTERN: "a text without control characters",
    MAC_PATTERN: "the address of one interface, as in 52:54:00:12:34:56",
    USER_PATTERN: "the name of a user, without spaces, commas, colons and slashes",
    PASSWORD_PATTERN: "a password of one line",
    BACKUP_PATTERN: "lower-case letters, digits and single hyphens, as in daily",
}
"""What each pattern means, for people."""
_NAME: Final = re.compile(NAME_PATTERN[:-1] + r"\Z")
_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z", re.IGNORECASE | re.ASCII)

Name = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=63,
        pattern=NAME_PATTERN,
        description="Letters, digits, hyphens, dots and underscores. Capitals count: `Web` and `web` are two names.",
    ),
]
Reference = Annotated[str, Meta(min_length=1, max_length=63, description="An id or a name.")]
Tag = Annotated[str, Meta(min_length=1, max_length=64, pattern=TAG_PATTERN, description="No control characters.")]
HostName = Annotated[str, Meta(min_length=1, max_length=255)]


def check_name(name: str, field: str) -> None:
    """Raise `Invalid` unless `name` can be a name (`PATTERNS`) and does not look like an id."""
    if _NAME.match(name) is None:
        raise Invalid(f"{field}: {name[:80]!r} is not {PATTERNS[NAME_PATTERN]}.")
    if is_id(name):
        raise Invalid(f"{field}: {name!r} looks like an id; choose a name that does not.")


GROUPS_LENGTH_MAX: Final = 1024
"""The longest list of security groups of an interface: 16 names."""


def group_names(text: str) -> tuple[str, ...]:
    """Return the names of security groups in a text such as `web,db`; none for an empty one. Raises `Invalid`."""
    names = tuple(dict.fromkeys(one.strip() for one in text.split(",") if one.strip()))
    for name in names:
        check_name(name, "security_groups")
    return names


def check_host_address(text: str) -> None:
    """Raise `Invalid` unless `text` is an IPv4 address."""
    try:
        IPv4Address(text)
    except ValueError:
        raise Invalid(f"host_address: {text[:80]!r} is not an IPv4 address.") from None


def is_id(text: str) -> bool:
    """Whether a reference is an id rather than a name."""
    return _ID.match(text) is not None


class Refers(StrEnum):
    """What a parameter names: how it is resolved and completed."""

    IMAGE = "image"
    NEW_IMAGE = "new_image"
    """The name of an image that the operation creates."""
    HOST = "host"
    VOLUME_IN = "volume_in"
    """A volume that the operation attaches; no other instance may have it."""
    VOLUME_OUT = "volume_out"
    """A volume that the operation detaches."""
    INTERFACE_OUT = "interface_out"
    """The id of an interface that the operation detaches."""
    NETWORK = "network"
    """A network that the operation connects an interface to."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the parameter types. `msgspec.to_builtins` of one is what a request records."""

    required_any: ClassVar[bool] = False
    """Whether at least one parameter is required."""
    secret: ClassVar[str | None] = None
    """The parameter that is kept in memory only, never recorded: a repeated submission cannot be compared."""

    def check(self) -> None:
        """Raise `Invalid` for what the types cannot express. The message begins with the parameter's name."""


class NoParameters(Parameters, frozen=True, kw_only=True):
    """None."""


class StopParameters(Parameters, frozen=True, kw_only=True, omit_defaults=True):
    hard: Annotated[bool, Meta(description="Power off at once."), Option("--hard")] = False


class RebootParameters(Parameters, frozen=True, kw_only=True, omit_defaults=True):
    hard: Annotated[bool, Meta(description="Reset at once."), Option("--hard")] = False


class AttachVolumeParameters(Parameters, frozen=True, kw_only=True):
    volume: Annotated[Reference, Argument(), Refers.VOLUME_IN]


class DetachVolumeParameters(Parameters, frozen=True, kw_only=True):
    volume: Annotated[Reference, Argument(), Refers.VOLUME_OUT]


class SwapVolumeParameters(Parameters, frozen=True, kw_only=True, omit_defaults=True):
    old: Annotated[Reference, Argument(), Refers.VOLUME_OUT]
    new: Annotated[
        Reference,
        Meta(description="Takes the place of the old volume; at least as large."),
        Argument(),
        Refers.VOLUME_IN,
    ]
    copy: Annotated[
        bool,
        Meta(description="False uses the data on the new volume, for an old one that is no longer readable."),
        Option("--no-copy", help="Use the data on NEW, for an OLD volume that is no longer readable."),
    ] = True


_ADDRESS: Final = Meta(max_length=128)
_ADDRESS_MEANING: Final = Meta(
    description="An address of a managed network, or two with a comma between (IPv4 and IPv6). Default: free ones.",
)
_INTERFACE: Final = Meta(min_length=1, max_length=63, description="Its id; `primary` is the first interface.")
_RATE: Final = Meta(ge=0, le=1_000_000_000)
_HOST_PORT: Final = Meta(ge=1024, le=65_535, description="Port of the host.")


class AttachInterfaceParameters(Parameters, frozen=True, kw_only=True, omit_defaults=True):
    network: Annotated[
        Reference | None,
        Meta(description="Network, a name or an id. Default: a user network of its own."),
        Option("--network"),
        Refers.NETWORK,
    ] = None
    address: Annotated[Annotated[str, _ADDRESS] | None, _ADDRESS_MEANING, Option("--address")] = None
    mac: Annotated[
        Annotated[str, Meta(pattern=MAC_PATTERN)] | None,
        Meta(description="MAC address, such as 52:54:00:12:34:56. Default: generated."),
        Option("--mac"),
    ] = None


class DetachInterfaceParameters(Parameters, frozen=True, kw_only=True):
    interface: Annotated[
        str, Meta(min_length=1, max_length=63, description="Its id."), Argument(), Refers.INTERFACE_OUT
    ]


class MoveInterfaceParameters(Parameters, frozen=True, kw_only=True, omit_defaults=True):
    interface: Annotated[str, _INTERFACE, Argument()]
    network: Annotated[Reference, Meta(description="The new network, a name or an id."), Argument(), Refers.NETWORK]
    address: Annotated[Annotated[str, _ADDRESS] | None, _ADDRESS_MEANING, Option("--address")] = None


class SetInterfaceParameters(Parameters, frozen=True, kw_only=True, omit_defaults=True):
    interface: Annotated[str, _INTERFACE, Argument()]
    inbound_kbit: Annotated[
        Annotated[int, _RATE] | None,
        Meta(description="The most that the guest receives, in kbit/s; 0: no limit."),
        Option("--inbound"),
    ] = None
    outbound_kbit: Annotated[
        Annotated[int, _RATE] | None,
        Meta(description="The most that the guest sends, in kbit/s; 0: no limit."),
        Option("--outbound"),
    ] = None
    allow: Annotated[
        Annotated[str, Meta(max_length=2000)] | None,
        Meta(
            description="Which connections from outside of the network are allowed, instead of the present rules: such "
            "as `tcp 22 from 10.0.0.0/8, icmp`. Empty: none."
        ),
        Option("--allow"),
    ] = None
    security_groups: Annotated[
        Annotated[str, Meta(max_length=GROUPS_LENGTH_MAX)] | None,
        Meta(
            description="Security groups whose rules apply beside those of the interface, instead of the present "
            "ones: names with commas between. Empty: none."
        ),
        Option("--group"),
    ] = None

    def check(self) -> None:
        ingress_of(self.allow or "")
        group_names(self.security_groups or "")


class AddForwardParameters(Parameters, frozen=True, kw_only=True, omit_defaults=True):
    host_port: Annotated[int, _HOST_PORT, Argument()]
    guest_port: Annotated[int, Meta(ge=1, le=65_535, description="Port of the guest."), Argument()]
    protocol: Annotated[Literal["tcp", "udp"], Meta(description="Protocol."), Option("--protocol")] = "tcp"
    host_address: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=64,
            description="IPv4 address of the host at which the port is opened; 0.0.0.0: all of them.",
        ),
        Option("--host-address"),
    ] = "127.0.0.1"

    def check(self) -> None:
        check_host_address(self.host_address)


class RemoveForwardParameters(Parameters, frozen=True, kw_only=True):
    host_port: Annotated[int, _HOST_PORT, Argument()]


class RescueParameters(Parameters, frozen=True, kw_only=True, omit_defaults=True):
    image: Annotated[
        Reference | None,
        Meta(description="Rescue image, a name or an id. Default: its own image."),
        Option("--image"),
        Refers.IMAGE,
    ] = None


class RebuildParameters(Parameters, frozen=True, kw_only=True, omit_defaults=True):
    image: Annotated[
        Reference | None,
        Meta(description="New image, a name or an id. Default: its present image."),
        Option("--image"),
        Refers.IMAGE,
    ] = None


class ResizeParameters(Parameters, frozen=True, kw_only=True, omit_defaults=True):
    required_any: ClassVar[bool] = True
    vcpus: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None, Meta(description="Number of vCPUs."), Option("--vcpus")
    ] = None
    memory_mib: Annotated[
        Annotated[int, Meta(ge=64, le=1_048_576)] | None,
        Meta(description="Memory, in MiB."),
        Option("--memory", help="Memory, such as 512 (MiB) or 2GiB.", unit="MiB"),
    ] = None
    root_gib: Annotated[
        Annotated[int, Meta(ge=1, le=65_536)] | None,
        Meta(description="Root disk, in GiB; shrinking is not possible."),
        Option("--root-size", help="Root disk, such as 20 (GiB) or 1TiB; shrinking is not possible.", unit="GiB"),
    ] = None


class SnapshotParameters(Parameters, frozen=True, kw_only=True):
    name: Annotated[
        Name,
        Meta(description="Name of the image, in use from the submission on."),
        Argument(),
        Refers.NEW_IMAGE,
    ]

    def check(self) -> None:
        check_name(self.name, "name")


class BackupParameters(Parameters, frozen=True, kw_only=True):
    backup_type: Annotated[
        str,
        Meta(
            max_length=20,
            pattern=BACKUP_PATTERN,
            description="Backup type, within which backups rotate, such as `daily`.",
        ),
        Option("--type", help="Backup type, within which backups rotate.", default="daily"),
    ]
    rotation: Annotated[
        int,
        Meta(ge=1, le=100, description="Number of backups of the type to keep, 1 to 100."),
        Option("--keep"),
    ]


class SetPasswordParameters(Parameters, frozen=True, kw_only=True):
    secret: ClassVar[str | None] = "password"  # noqa: S105 - the name of a parameter
    user: Annotated[
        str,
        Meta(min_length=1, max_length=256, pattern=USER_PATTERN, description="User name."),
        Option("--user"),
    ] = "root"
    password: Annotated[
        Annotated[str, Meta(min_length=1, max_length=512, pattern=PASSWORD_PATTERN)] | None,
        Meta(description="Not recorded. Default: generated, and returned once, in the answer to the submission."),
        Option(
            "--ask",
            help="Prompt for the password. Default: generate one, and print it once.",
            prompt="Password",
        ),
    ] = None


class MigrateParameters(Parameters, frozen=True, kw_only=True):
    host: Annotated[
        HostName,
        Meta(description="Target host, or `any` for the one with the fewest VMs that has free capacity."),
        Refers.HOST,
    ]


class LiveMigrateParameters(MigrateParameters, frozen=True, kw_only=True, omit_defaults=True):
    converge_timeout: Annotated[
        Annotated[str, Meta(min_length=1, max_length=64)] | None,
        Meta(
            description="Cancel if it has not converged after that time, such as `10m`. "
            "Default: `driver.converge_timeout_ms`."
        ),
    ] = None
    post_copy: Annotated[bool, Meta(description="Not supported; rejected with the reason.")] = False

    def check(self) -> None:
        if self.post_copy:
            raise Invalid(
                "post_copy is not supported: QEMU runs without privileges, and the kernel lets such a process not "
                "handle missing memory (userfaultfd; vm.unprivileged_userfaultfd is 0).",
                remedy="Leave it out: a guest that writes faster than can be sent is slowed down. converge_timeout "
                "limits that, and live_migrate_force_complete ends it with the guest standing still.",
            )
        if self.converge_timeout is not None and not parse_duration(self.converge_timeout):
            raise Invalid(
                f'converge_timeout: {self.converge_timeout!r}; expected a length of time such as "30s" or "10m".'
            )


class EvacuateParameters(Parameters, frozen=True, kw_only=True, omit_defaults=True):
    host: Annotated[
        HostName | None,
        Meta(description="Target host, or `any` for one with free capacity. Default: the server's own host."),
        Refers.HOST,
    ] = None
    from_image: Annotated[
        bool,
        Meta(
            description="Recreate its root disk from its image: required if the disk is lost with the host. "
            "A root disk in a shared folder is kept otherwise."
        ),
    ] = False


class ResetStateParameters(Parameters, frozen=True, kw_only=True):
    vm_state: Annotated[
        Literal["active", "stopped", "error"], Meta(description="The state to record."), Option("--to")
    ] = "error"
    reason: Annotated[
        str, Meta(min_length=1, max_length=1000, description="Reason, recorded in the event."), Option("--reason")
    ]


class MetadataParameters(Parameters, frozen=True, kw_only=True, omit_defaults=True):
    set: Annotated[
        dict[Tag, Annotated[str, Meta(max_length=1000)]], Meta(max_length=64, description="Keys and values to set.")
    ] = {}
    remove: Annotated[tuple[Tag, ...], Meta(max_length=64, description="Keys to remove.")] = ()


class RenameParameters(Parameters, frozen=True, kw_only=True):
    name: Annotated[Name, Meta(description="The new name; no other VM of the project may have it."), Argument("NEW")]

    def check(self) -> None:
        check_name(self.name, "name")


class Field(NamedTuple):
    """One parameter, as its type describes it."""

    name: str
    default: Any
    """`msgspec.NODEFAULT` if it is required."""
    kinds: tuple[Any, ...]
    """Its type; for a union its members, without None."""
    form: Argument | Option | None
    """On the command line; None: not there, or by a command of its own."""
    refers: Refers | None
    metas: tuple[Meta, ...]
    """Its constraints and descriptions, the outermost last."""

    @property
    def required(self) -> bool:
        return self.default is msgspec.NODEFAULT

    @property
    def description(self) -> str:
        return next((meta.description for meta in reversed(self.metas) if meta.description is not None), "")

    @property
    def least(self) -> int | None:
        return next((int(meta.ge) for meta in self.metas if meta.ge is not None), None)

    @property
    def most(self) -> int | None:
        return next((int(meta.le) for meta in self.metas if meta.le is not None), None)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a `Literal`; empty for other types."""
        (kind, *_) = self.kinds
        return tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()


def fields_of(kind: type[Parameters]) -> tuple[Field, ...]:
    """Return the parameters of a type, in the order of their definition."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(_field(one, hints[one.name]) for one in msgspec.structs.fields(kind))


def _field(field: msgspec.structs.FieldInfo, hint: Any) -> Field:
    kinds: list[Any] = []
    marks: list[Any] = []
    _collect(hint, kinds, marks)
    return Field(
        name=field.name,
        default=field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory(),
        kinds=tuple(kinds),
        form=next((mark for mark in marks if isinstance(mark, Argument | Option)), None),
        refers=next((mark for mark in marks if isinstance(mark, Refers)), None),
        metas=tuple(mark for mark in marks if isinstance(mark, Meta)),
    )


def _collect(hint: Any, kinds: list[Any], marks: list[Any]) -> None:
    """Collect the types and the annotations of a type hint, the innermost first."""
    if get_origin(hint) is Annotated:
        _collect(hint.__origin__, kinds, marks)
        marks += hint.__metadata__
    elif get_origin(hint) in {Union, UnionType}:
        for part in get_args(hint):
            _collect(part, kinds, marks)
    elif hint is not type(None):
        kinds.append(hint)
