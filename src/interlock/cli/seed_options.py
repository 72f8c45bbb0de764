"""The options by which a new guest is told of itself: its hostname, who may log in, and what cloud-init is to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import click

_PRIVATE = "PRIVATE KEY"


class SeedOptions(TypedDict):
    """What they come to."""

    hostname: str | None
    ssh_keys: tuple[str, ...]
    user_data: str | None
    network_config: str | None


class PublicKeys(click.ParamType[Any]):
    """A public key, or a file of them."""

    name = "file|key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The keys that it stands for, a line each."""
        if isinstance(value, tuple):
            return value
        text = str(value)
        if " " not in text.strip():
            text = _read(Path(text).expanduser(), self, param, ctx)
        if _PRIVATE in text:
            self.fail("that is a private key; name the file whose name ends in .pub.", param, ctx)
        return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))


class Text(click.ParamType[Any]):
    """The text in a file."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return _read(Path(str(value)).expanduser(), self, param, ctx)


def _read(path: Path, kind: click.ParamType[Any], param: click.Parameter | None, ctx: click.Context | None) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        kind.fail(f"{path} is no text in UTF-8.", param, ctx)
    except (OSError, ValueError) as error:
        kind.fail(f"{path} cannot be read: {error}.", param, ctx)


def _joined(_context: click.Context, _parameter: click.Parameter, value: Any) -> tuple[str, ...]:
    return tuple(key for keys in value for key in keys)


def seed_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command."""
    for option in (
        click.option("--network-config", type=Text(), help="Cloud-init's network configuration; default: DHCP."),
        click.option("--user-data", type=Text(), help="For cloud-init: a #cloud-config, a #! script, or MIME."),
        click.option(
            "--ssh-key",
            "ssh_keys",
            multiple=True,
            type=PublicKeys(),
            callback=_joined,
            help="Who may log in: a .pub file, or a key itself. May be repeated.",
        ),
        click.option(
            "--hostname", help="What the guest calls itself, by cloud-init; default: NAME, where it is told anything."
        ),
    ):
        command = option(command)
    return command
