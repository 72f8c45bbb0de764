"""Reading the configuration from a TOML file and the environment, and the checks of its values."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from interlock.config import ENVIRONMENT_PREFIX, Config, QemuConfig, is_loopback
from interlock.core.errors import Invalid

_MAY_BE_ZERO = frozenset(
    {
        "policy_explore_ms",
        "resize_confirm_window_ms",
        "reclaim_after_ms",
        "offload_after_ms",
        "lease_ms",
        "converge_timeout_ms",
        "image_unused_ms",
        "lifetime_max_ms",
        "keep_ms",
    }
)
_LISTS = frozenset({"policy_keys", "program_paths", "tls_names"})
_SECRET_CHARACTERS_MIN = 16
_NOT_NEGATIVE = ("host_memory_mib", "host_memory_reserved_mib", "host_disk_reserved_gib")
_WEIGHT_MAX = 10_000
_SYSTEM_USERS_LAST = 65_535
_USERS_LAST = 2**31 - 1
_ELSEWHERE = frozenset(
    {"INTERLOCK_CONFIG", "INTERLOCK_URL", "INTERLOCK_TOKEN", "INTERLOCK_CA", "INTERLOCK_INSECURE_PLAIN_HTTP"}
)
"""Variables that the command line reads."""


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
                place[key] = text.split() if key in _LISTS else text


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


def _check_tls(config: Config) -> None:
    if bool(config.tls_certificate) != bool(config.tls_key):
        raise Invalid("The configuration names only one of tls_certificate and tls_key; TLS needs both.")
    if config.tls_certificate and config.tls_names:
        raise Invalid("The configuration has both tls_certificate and tls_names.", remedy="Set one of them.")
    if config.hosts.require_client_certificates and not config.tls:
        raise Invalid(
            "hosts.require_client_certificates is set, and the server has no TLS.",
            remedy="Set tls_names, or tls_certificate and tls_key.",
        )
    if not is_loopback(config.listen_host) and not config.tls and not config.allow_plain_http:
        raise Invalid(
            f"{config.listen_host} is not a loopback address, and tokens would cross the network in the clear.",
            remedy="Set tls_names, or tls_certificate and tls_key; or allow_plain_http if something in front does TLS.",
        )


def _check(config: Config) -> None:
    _check_tls(config)
    if not 0 <= config.listen_port <= 65_535:  # noqa: PLR2004 - the last TCP port
        raise Invalid(f"listen_port is {config.listen_port}; a TCP port is 0 to 65535 (0: any free one).")
    for holder, share in (
        (config, "host_vcpus_overcommit"),
        (config, "host_disk_overcommit"),
        (config.http, "token_requests_per_s"),
        (config.http, "auth_failures_per_s"),
    ):
        if not 0 < getattr(holder, share) < math.inf:
            raise Invalid(f"{share} is {getattr(holder, share)}; it must be more than 0.")
    if 0 < len(config.http.metrics_token) < _SECRET_CHARACTERS_MIN:
        raise Invalid(f"http.metrics_token is too short: it must have at least {_SECRET_CHARACTERS_MIN} characters.")
    _check_shared_dir(config)
    _check_isolation(config.qemu)
    for name in _NOT_NEGATIVE:
        if getattr(config, name) < 0:
            raise Invalid(f"{name} is {getattr(config, name)}; it must be 0 or more.")
    for table in ("", *_tables()):
        _check_numbers(getattr(config, table) if table else config, f"{table}." if table else "")


def _check_isolation(qemu: QemuConfig) -> None:
    for name in ("cpu_weight", "io_weight"):
        if not 1 <= getattr(qemu, name) <= _WEIGHT_MAX:
            raise Invalid(f"qemu.{name} is {getattr(qemu, name)}; a weight is 1 to {_WEIGHT_MAX}.")
    if qemu.users_first <= _SYSTEM_USERS_LAST or qemu.users_first + qemu.users_max > _USERS_LAST:
        what = f"qemu.users_first is {qemu.users_first} and qemu.users_max {qemu.users_max}"
        raise Invalid(f"{what}; user ids of VMs are {_SYSTEM_USERS_LAST + 1} to {_USERS_LAST}.")


def _check_shared_dir(config: Config) -> None:
    shared = config.hosts.shared_dir
    if shared and not Path(shared).is_absolute():
        raise Invalid(f"hosts.shared_dir is {shared}; it must be a whole path, which begins with /.")
    if shared and config.hypervisor == "simulated":
        raise Invalid("hosts.shared_dir is set, and simulated guests have no disks to share.")


def _check_numbers(struct: msgspec.Struct, prefix: str) -> None:
    for field in msgspec.structs.fields(type(struct)):
        least = 0 if field.name in _MAY_BE_ZERO else 1
        if field.name.endswith(("_ms", "_max", "_burst")) and getattr(struct, field.name) < least:
            what = "positive" if least else "0 or more"
            raise Invalid(f"{prefix}{field.name} is {getattr(struct, field.name)}; it must be {what}.")
