"""Options of a new VM, named as its fields: restarts, evacuation, anti-affinity groups, networks, cloud-init data."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from interlock.core.restart_policy import Evacuate, OnCrash, OnPowerOff, RestartPolicy
from interlock.service.request_models import USER_DATA_LENGTH_MAX, NewInterface

_WORDS: Final[dict[str, RestartPolicy]] = {
    "never": RestartPolicy(),
    "on-crash": RestartPolicy(on_crash=OnCrash.RESTART),
    "always": RestartPolicy(on_crash=OnCrash.RESTART, on_power_off=OnPowerOff.RESTART),
}

restart_option = click.option(
    "--restart",
    type=click.Choice(tuple(_WORDS)),
    callback=lambda _context, _parameter, word: None if word is None else _WORDS[word],
    help="Restart the guest when it has crashed, or always when it has ended by itself. A requested stop is kept.",
)
evacuate_option = click.option(
    "--evacuate",
    type=click.Choice([choice.value for choice in Evacuate]),
    callback=lambda _context, _parameter, word: None if word is None else Evacuate(word),
    help="Evacuate automatically when its host is fenced: never; auto, if its root disk is not lost; or from-image, "
    "also if it is lost. Default: the server's hosts.evacuate.",
)
apart_option = click.option(
    "--apart-from",
    multiple=True,
    metavar="GROUP",
    help="Anti-affinity group: never on one host with another VM of it. May be repeated.",
)


def restart_text(policy: RestartPolicy | None, restarts: int) -> str | None:
    """Describe a restart policy with the number of recent restarts; None if it never restarts."""
    if policy is None:
        return None
    parts = []
    if policy.on_crash is not OnCrash.LEAVE:
        parts.append(f"{policy.on_crash.value} when it crashed")
    if policy.on_power_off is not OnPowerOff.LEAVE:
        parts.append("restart when it powered itself off")
    if not parts:
        return None
    limit = f"at most {policy.restarts_max} times within {policy.window_s} s"
    return f"{', '.join(parts)}; {limit}" + (f", {restarts} so far" if restarts else "")


_PRIVATE = "PRIVATE KEY"


class PublicKeys(click.ParamType[Any]):
    """An SSH public key, or a file with some."""

    name = "file|key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the keys."""
        if isinstance(value, tuple):
            return value
        text = str(value)
        if " " not in text.strip():
            text = _read(Path(text).expanduser(), self, param, ctx)
        if _PRIVATE in text:
            self.fail("this is a private key; use the .pub file.", param, ctx)
        return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))


class Text(click.ParamType[Any]):
    """The text of a file."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return _read(Path(str(value)).expanduser(), self, param, ctx)


class Content(click.ParamType[Any]):
    """The content of a file or, for `-`, of standard input: text, or bytes if it is binary."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the text or the bytes."""
        try:
            with click.open_file(str(Path(str(value)).expanduser()) if value != "-" else "-", "rb") as file:
                data = file.read(USER_DATA_LENGTH_MAX + 1)
        except (OSError, ValueError) as error:
            self.fail(f"Cannot read {value}: {error}.", param, ctx)
        if len(data) > USER_DATA_LENGTH_MAX:
            self.fail(f"{value} too large: the limit is {USER_DATA_LENGTH_MAX} bytes.", param, ctx)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return data
        return text if all(letter.isprintable() or letter in "\t\n\r\f" for letter in text) else data


def _read(path: Path, kind: click.ParamType[Any], param: click.Parameter | None, ctx: click.Context | None) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        kind.fail(f"Invalid UTF-8 in {path}.", param, ctx)
    except (OSError, ValueError) as error:
        kind.fail(f"Cannot read {path}: {error}.", param, ctx)


def _joined(_context: click.Context, _parameter: click.Parameter, value: Any) -> tuple[str, ...]:
    return tuple(key for keys in value for key in keys)


class InterfaceValue(click.ParamType[Any]):
    """A network, with options of the interface in it."""

    name = "network"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        network, *options = str(value).split(",")
        fields: dict[str, Any] = {}
        lists: dict[str, list[str]] = {"address": [], "group": []}
        for option in options:
            key, equals, text = option.partition("=")
            if not (equals and text) or key not in {*lists, "mac"} or key in fields:
                self.fail(
                    f"Invalid network {value!r}: expected NAME, then options such as address=10.7.0.20, "
                    "group=web or mac=52:54:00:12:34:56, each after a comma.",
                    param,
                    ctx,
                )
            if key in lists:
                lists[key].append(text)
            else:
                fields[key] = text
        addresses, groups = map(tuple, lists.values())
        return NewInterface(network=network, addresses=addresses, security_groups=groups, **fields)


network_option: Final = click.option(
    "--network",
    "networks",
    multiple=True,
    type=InterfaceValue(),
    metavar="NAME[,address=ADDRESS][,mac=MAC][,group=GROUP]",
    help="Network of an interface, the first one first. May be repeated. Default: a user network of its own.",
)


def seed_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a new VM for its options: binary user data has a field of its own."""
    data = fields["user_data"]
    if not isinstance(data, bytes):
        return fields
    return {**fields, "user_data": None, "user_data_base64": base64.b64encode(data).decode()}


def seed_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command."""
    for option in (
        click.option(
            "--network-config", type=Text(), help="File with cloud-init's network configuration. Default: DHCP."
        ),
        click.option(
            "--user-data",
            type=Content(),
            help="File with cloud-init user data: #cloud-config, a #! script, or MIME; also gzipped. `-` for standard "
            "input.",
        ),
        click.option(
            "--ssh-key",
            "ssh_keys",
            multiple=True,
            type=PublicKeys(),
            callback=_joined,
            help="Authorized SSH key: a .pub file or the key itself. May be repeated.",
        ),
        click.option("--hostname", help="Hostname, set by cloud-init. Default: NAME, if there is cloud-init data."),
    ):
        command = option(command)
    return command
