"""The configuration: one frozen value, from a TOML file and the environment.

Every number that an operator may want to change stands here with its unit, its default and a sentence;
docs/reference/configuration.md is drawn from it. Reading it is here; acting on it is not.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from interlock.core.errors import Invalid

ENVIRONMENT_PREFIX = "INTERLOCK_"
_MAY_BE_ZERO = frozenset({"policy_explore_ms"})


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
    drain_ms: int = 2_000
    """How long a server that is being stopped lets what is in flight finish, in ms; the rest is taken up again."""


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
    """A built-in policy's name, or a policy file."""
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
    accelerator: Literal["tcg", "kvm"] = "tcg"
    """`tcg` runs anywhere; `kvm` needs a /dev/kvm that works and that the guests' user may open."""
    qmp_timeout_ms: int = 5_000
    """How long a guest's monitor has to answer before its outcome counts as unknown, in ms."""
    request_body_bytes_max: int = 262_144
    """The largest body of a request that is not an upload, in bytes."""
    upload_bytes_max: int = 64 * 1024**3
    """The largest image that may be uploaded, in bytes."""
    instance_memory_mib_max: int = 65_536
    """The most memory that one instance may have, in MiB."""
    volume_gib_max: int = 16_384
    """The largest volume, in GiB."""
    log_format: Literal["text", "json"] = "text"
    """How the server writes its log, to standard error."""
    driver: DriverConfig = DriverConfig()

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


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Invalid(f"The configuration file {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"The configuration file {path} is not TOML: {error}.") from None


def _lay_over(values: dict[str, object], environment: Mapping[str, str]) -> None:
    driver = values.setdefault("driver", {})
    for field in msgspec.structs.fields(DriverConfig):
        text = environment.get(f"{ENVIRONMENT_PREFIX}DRIVER_{field.name.upper()}")
        if text is not None and isinstance(driver, dict):
            driver[field.name] = text
    for field in msgspec.structs.fields(Config):
        text = environment.get(f"{ENVIRONMENT_PREFIX}{field.name.upper()}")
        if text is not None and field.name != "driver":
            values[field.name] = text


def _explain(message: str) -> str:
    """The validator's message, with the nearest key where one is unknown."""
    if "unknown field" not in message:
        return message
    names = [field.name for struct in (Config, DriverConfig) for field in msgspec.structs.fields(struct)]
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
    for struct, prefix in ((config, ""), (config.driver, "driver.")):
        for field in msgspec.structs.fields(type(struct)):
            least = 0 if field.name in _MAY_BE_ZERO else 1
            if field.name.endswith(("_ms", "_max")) and getattr(struct, field.name) < least:
                what = "positive" if least else "0 or more"
                raise Invalid(f"{prefix}{field.name} is {getattr(struct, field.name)}; it must be {what}.")
