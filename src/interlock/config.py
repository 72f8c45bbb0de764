"""The configuration: one frozen value, from a TOML file and the environment.

Every number that an operator may want to change stands here with its unit, its default and a sentence;
docs/reference/configuration.md is drawn from it. Reading it is here; acting on it is not.
"""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from interlock.core.errors import Invalid
from interlock.core.upkeep import UpkeepTimes

ENVIRONMENT_PREFIX = "INTERLOCK_"
_MAY_BE_ZERO = frozenset(
    {
        "policy_explore_ms",
        "resize_confirm_window_ms",
        "reclaim_after_ms",
        "offload_after_ms",
        "lease_ms",
        "image_unused_ms",
    }
)
_NOT_NEGATIVE = ("host_memory_mib", "host_memory_reserved_mib", "host_disk_reserved_gib")
_ELSEWHERE = frozenset({"INTERLOCK_CONFIG", "INTERLOCK_URL", "INTERLOCK_TOKEN"})
"""Variables that the command line reads."""


class DriverConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the state drivers serve requests. `[driver]` in the file, `INTERLOCK_DRIVER_*` in the environment."""

    guest_shutdown_timeout_ms: int = 30_000
    """How long a soft stop or reboot waits for the guest to power itself off before the plug is pulled, in ms."""
    heartbeat_ms: int = 5_000
    """How often a worker that waits for a guest looks whether it is still there, and says so, in ms."""
    inspect_retry_ms: int = 500
    """How long to wait before looking again at a guest that gives no answer, in ms; doubled up to 16 times this."""
    progress_interval_ms: int = 1_000
    """How often the progress of something long is kept and told, in ms; what takes less is told only when it ends."""
    dumps_max: int = 5
    """How many memory dumps are kept of an instance; once there is one more, the oldest is removed."""
    drain_ms: int = 2_000
    """How long a server that is being stopped lets what is in flight finish, in ms; the rest is taken up again."""


class UpkeepConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a server asks for by itself. `[upkeep]` in the file, `INTERLOCK_UPKEEP_*` in the environment."""

    resize_confirm_window_ms: int = 24 * 3_600_000
    """How long after a resize it is confirmed, unless somebody reverted or confirmed it, in ms; 0: never."""
    reclaim_after_ms: int = 7 * 24 * 3_600_000
    """How long after a soft delete what was deleted is deleted for good, in ms; 0: never."""
    offload_after_ms: int = 0
    """How long after it was shelved an instance is offloaded, in ms; 0: never."""
    retry_ms: int = 10_000
    """How long to wait before asking again what was refused or failed, in ms; doubled each time, up to an hour."""

    @property
    def times(self) -> UpkeepTimes:
        """After how long in a state something is done."""
        return UpkeepTimes(
            resize_confirm_window_ms=self.resize_confirm_window_ms,
            reclaim_after_ms=self.reclaim_after_ms,
            offload_after_ms=self.offload_after_ms,
        )


class QemuConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How guests are held by QEMU, and waited for. `[qemu]` in the file, `INTERLOCK_QEMU_*` in the environment."""

    cpu_model: str = "auto"
    """The processor that guests see, by QEMU's name for it. `auto`: `host` with KVM, `kvm64` without."""
    translation_cache_mib: int = 32
    """How much translated guest code `tcg` keeps per VM, in MiB; counts on top of the guest's memory."""
    processes_max: int = 500
    """How many guests this host holds at most."""
    open_files_max: int = 512
    """How many files a VM's process may have open: its disks, and one for each forwarded connection."""
    address_space_extra_mib: int = 2048
    """Address space that a VM's process may have beyond its guest's memory and translation cache, in MiB."""
    hotplug_ports: int = 8
    """How many disks and further network interfaces a guest can have together, with a place for a root disk. One more
    is refused when it is to be attached; what it has already it keeps."""
    display: bool = True
    """Whether guests have a screen, for screenshots and VNC; for those started from then on."""
    memory_stall_timeout_ms: int = 60_000
    """The longest that writing or reading a guest's memory (suspend, resume, crash dump) may stand still, in ms."""
    memory_look_interval_ms: int = 200
    """How often is looked how far writing or reading a guest's memory has come, in ms."""
    console_bytes_max: int = 4 * 1024 * 1024
    """Where a serial console's log is cut, in bytes: what is older is moved to `console.log.1`, replacing what was
    there."""
    console_check_interval_ms: int = 5_000
    """How often the size of the console logs is looked at while somebody is in charge of the guests, in ms."""
    console_reader_bytes_max: int = 262_144
    """How much of a live console is kept for one who looks on and does not keep up, in bytes; the middle is lost."""
    agent_timeout_ms: int = 2_000
    """How long a guest agent may take to answer before it counts as not there, in ms."""
    freeze_timeout_ms: int = 10_000
    """How long a guest agent may take to hold its file systems still for a copy, or to let them go on, in ms."""
    start_timeout_ms: int = 15_000
    """How long a new process may take until it answers, in ms."""
    detach_timeout_ms: int = 10_000
    """How long a guest may take to let go of a disk or a network interface, in ms."""
    kill_timeout_ms: int = 10_000
    """How long the kernel may take to end a killed process (it may wait for a disk), in ms."""
    image_tool_timeout_ms: int = 60_000
    """How long making an empty disk may take, in ms."""
    copy_silence_timeout_ms: int = 60_000
    """How long copying a disk may make no progress at all before it is given up, in ms; it may take any time else."""
    copy_look_interval_ms: int = 250
    """How often the progress of copying a disk is looked at, in ms."""
    copy_bytes_per_s: int = 0
    """How fast a disk of a running guest is copied, in bytes per second; 0: as fast as it can be."""
    export_write_timeout_ms: int = 10_000
    """How long a guest that writes may have to wait, in ms, until what it overwrites is kept for the export of its
    disk that is under way; after that the export fails, and not the guest."""
    migration_address: str = "127.0.0.1"
    """The address of this host at which other hosts bring guests as they run; on any free TCP port."""
    firmware_ms: int = 250
    """How long a machine that begins to boot is not reset, in ms: at first its firmware lays itself out in memory, and
    a machine whose reset meets that half done hangs for good, also after further resets."""
    reset_settle_ms: int = 2_000
    """Resets that follow one another within this time count as one, in ms: the firmware resets the machine itself as
    it starts, and cannot be told from the guest."""


class HostsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hosts beside the server's own. `[hosts]` in the file, `INTERLOCK_HOSTS_*` in the environment."""

    lease_ms: int = 15_000
    """For how long an agent may hold its guests after it last reached the server, in ms; then it ends them, so that
    they can be evacuated. 0: it holds them without end, and only an admin can say that a host is fenced."""
    lease_margin_ms: int = 5_000
    """How long after the end of its lease a host counts as fenced, in ms: for what it takes to end its guests."""
    image_unused_ms: int = 7 * 24 * 3_600_000
    """How long a copy of an image stays on a host on which no VM needs it, in ms; 0: for as long as the server has the
    image."""
    shared_dir: str = ""
    """A folder that hosts have in common, under the same name on each, in which root disks of new VMs are kept: those
    of this host, and of every host whose agent announces it or a folder above it (`--shared`). Empty: root disks are
    kept in each host's own folder. An agent announces it where it is not told `--shared`."""
    silence_ms: int = 15_000
    """How long an agent may say nothing before its connection counts as broken, in ms."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a server is told. Top level of the file, `INTERLOCK_*` in the environment."""

    data_dir: str = ""
    """The folder of the database, images, volumes and guests. Default: /var/lib/interlock as root, else
    ~/.local/share/interlock."""
    listen_host: str = "127.0.0.1"
    """The address to listen on. Anything but loopback needs TLS, or `allow_plain_http`."""
    listen_port: int = 7420
    """The TCP port to listen on; 0 takes any free one, which `server.json` in the data folder then names."""
    tls_certificate: str = ""
    """A PEM file with the certificate and its chain; together with `tls_key` it turns TLS on."""
    tls_key: str = ""
    """A PEM file with the certificate's private key."""
    allow_plain_http: bool = False
    """Allow an address that is not loopback without TLS."""
    host: str = ""
    """The name of this host. Default: what the system calls itself."""
    hypervisor: Literal["qemu", "simulated"] = "qemu"
    """What holds the guests. `simulated` holds none for real, and is for trying things out."""
    policy: str = "standard"
    """A built-in policy's name, or a policy file. One that is broken at a start leaves the last one in force."""
    policy_explore_ms: int = 5_000
    """For how long the reachable states of a policy are walked before it is put in force, where nobody says, in ms;
    0: not at all."""
    policy_explore_ms_max: int = 60_000
    """The longest that somebody who loads a policy may have it walked, in ms."""
    policy_check_ms_max: int = 30_000
    """How long reading and checking a policy that is to be put in force may take, beside walking it, in ms."""
    policy_memory_mib_max: int = 4_096
    """How much memory (address space) the process may take that checks a policy, in MiB."""
    policy_body_bytes_max: int = 4_194_304
    """The largest body with which a policy is loaded, in bytes."""
    qemu_binary: str = "qemu-system-x86_64"
    """QEMU's program: a name on the PATH, or a path."""
    accelerator: Literal["auto", "tcg", "kvm"] = "auto"
    """What executes guests' code. `auto`: KVM where /dev/kvm works and the guests' user may open it, else `tcg`, QEMU's
    own translation, which runs anywhere. With `kvm` the server does not start where it cannot be used."""
    qmp_timeout_ms: int = 5_000
    """How long a guest's monitor has to answer before its outcome counts as unknown, in ms."""
    request_body_bytes_max: int = 262_144
    """The largest body of a request that is not an upload, in bytes."""
    upload_bytes_max: int = 64 * 1024**3
    """The largest image that may be uploaded, in bytes."""
    image_bytes_max: int = 64 * 1024**3
    """How large an image may become when it is converted, in bytes."""
    image_conversion_timeout_ms: int = 600_000
    """How long converting an image may take, in ms."""
    instance_memory_mib_max: int = 65_536
    """The most memory that one instance may have, in MiB."""
    volume_gib_max: int = 16_384
    """The largest volume, in GiB."""
    log_format: Literal["text", "json"] = "text"
    """How the server writes its log, to standard error."""
    host_memory_mib: int = 0
    """How much memory instances may be promised on this host, in MiB. 0: what the host has without
    `host_memory_reserved_mib`; `simulated` guests need none, and are then not limited."""
    host_memory_reserved_mib: int = 512
    """How much of the host's memory is kept for the host itself where `host_memory_mib` is 0, in MiB."""
    host_vcpus_overcommit: float = 16.0
    """How many virtual processors instances may be promised for each processor of this host."""
    host_disk_overcommit: float = 4.0
    """How much disk may be promised to root disks and volumes, as a multiple of the data folder's file system: they
    take only what was written to them."""
    host_disk_reserved_gib: int = 1
    """How much of the data folder's file system must stay free when a disk is promised, in GiB."""
    driver: DriverConfig = DriverConfig()
    upkeep: UpkeepConfig = UpkeepConfig()
    qemu: QemuConfig = QemuConfig()
    hosts: HostsConfig = HostsConfig()

    @property
    def folder(self) -> Path:
        if self.data_dir:
            return Path(self.data_dir).expanduser()
        if os.geteuid() == 0:
            return Path("/var/lib/interlock")
        return Path("~/.local/share/interlock").expanduser()


def load(path: Path | None, environment: Mapping[str, str]) -> Config:
    """The configuration from the file, if one is named, with the environment's values over it.

    Raises:
        Invalid: the file cannot be read, or a key or value is wrong; the message names which and what was expected.
    """
    values = _read(path) if path is not None else {}
    _lay_over(values, environment)
    try:
        config = msgspec.convert(values, Config, strict=False)
    except msgspec.ValidationError as error:
        raise Invalid(f"The configuration is wrong: {_explain(str(error))}") from None
    _check(config)
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Invalid(f"The configuration file {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"The configuration file {path} is not TOML: {error}.") from None


def _tables() -> dict[str, type[msgspec.Struct]]:
    """The tables of the file, and what each holds."""
    fields = msgspec.structs.fields(Config)
    return {field.name: type(field.default) for field in fields if isinstance(field.default, msgspec.Struct)}


def _keys() -> dict[str, tuple[str, str]]:
    """Every variable of the environment that stands for a key: its table (empty at the top level) and the key."""
    keys = {}
    structs: dict[str, type[msgspec.Struct]] = {"": Config, **_tables()}
    for table, struct in structs.items():
        for field in msgspec.structs.fields(struct):
            if not isinstance(field.default, msgspec.Struct):
                keys[ENVIRONMENT_PREFIX + "_".join(filter(None, (table, field.name))).upper()] = (table, field.name)
    return keys


def _lay_over(values: dict[str, Any], environment: Mapping[str, str]) -> None:
    for variable, (table, key) in _keys().items():
        text = environment.get(variable)
        if text is not None:
            place = values.setdefault(table, {}) if table else values
            if isinstance(place, dict):
                place[key] = text


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """The variables that look like Interlock's and are not, each with the nearest that is; None where none is near."""
    known = {*_keys(), *_ELSEWHERE}
    unknown = [name for name in environment if name.startswith(ENVIRONMENT_PREFIX) and name not in known]
    return {name: next(iter(difflib.get_close_matches(name, known, n=1)), None) for name in sorted(unknown)}


def _explain(message: str) -> str:
    """The validator's message, with the nearest key where one is unknown."""
    if "unknown field" not in message:
        return message
    names = [*_tables(), *(key for _, key in _keys().values())]
    unknown = message.split("`")[1] if "`" in message else ""
    near = difflib.get_close_matches(unknown, names, n=1)
    return f"{message}; did you mean `{near[0]}`?" if near else message


def _check(config: Config) -> None:
    if bool(config.tls_certificate) != bool(config.tls_key):
        raise Invalid("The configuration names only one of tls_certificate and tls_key; TLS needs both.")
    loopback = config.listen_host in {"127.0.0.1", "::1", "localhost"}
    if not loopback and not config.tls_certificate and not config.allow_plain_http:
        raise Invalid(
            f"{config.listen_host} is not a loopback address, and tokens would cross the network in the clear.",
            remedy="Set tls_certificate and tls_key, or allow_plain_http if something in front does TLS.",
        )
    if not 0 <= config.listen_port <= 65_535:  # noqa: PLR2004 - the last TCP port
        raise Invalid(f"listen_port is {config.listen_port}; a TCP port is 0 to 65535 (0: any free one).")
    for share in ("host_vcpus_overcommit", "host_disk_overcommit"):
        if not 0 < getattr(config, share) < math.inf:
            raise Invalid(f"{share} is {getattr(config, share)}; it must be more than 0.")
    _check_shared_dir(config)
    for name in _NOT_NEGATIVE:
        if getattr(config, name) < 0:
            raise Invalid(f"{name} is {getattr(config, name)}; it must be 0 or more.")
    for table in ("", *_tables()):
        _check_numbers(getattr(config, table) if table else config, f"{table}." if table else "")


def _check_shared_dir(config: Config) -> None:
    shared = config.hosts.shared_dir
    if shared and not Path(shared).is_absolute():
        raise Invalid(f"hosts.shared_dir is {shared}; it must be a whole path, which begins with /.")
    if shared and config.hypervisor == "simulated":
        raise Invalid("hosts.shared_dir is set, and simulated guests have no disks to share.")


def _check_numbers(struct: msgspec.Struct, prefix: str) -> None:
    for field in msgspec.structs.fields(type(struct)):
        least = 0 if field.name in _MAY_BE_ZERO else 1
        if field.name.endswith(("_ms", "_max")) and getattr(struct, field.name) < least:
            what = "positive" if least else "0 or more"
            raise Invalid(f"{prefix}{field.name} is {getattr(struct, field.name)}; it must be {what}.")
