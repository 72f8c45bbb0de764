"""How the commands about whole policies name them, and where they put what they make."""

from __future__ import annotations

import contextlib
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation
from interlock.core.errors import PolicyError

if TYPE_CHECKING:
    from interlock.core.policy import CompiledPolicy

_WRITTEN: Final = 64 * 1024
_WIDTH_MAX: Final = 120


def compiled(name: str) -> CompiledPolicy:
    """A policy by name or file, as a command line names it."""
    from interlock.policies.reading import compile_named

    try:
        return compile_named(name)
    except PolicyError as error:
        raise Failure(ExitCode.USAGE, error.message, remedy=error.remedy) from None


def write(invocation: Invocation, out: Path | None, lines: Iterable[str]) -> None:
    """Put text on standard output, or whole into a file; a file has no colours."""
    if out is None:
        for block in _blocks(lines):
            click.echo(block, nl=False, color=False if invocation.plain else None)
    else:
        write_bytes(invocation, out, (click.unstyle(block).encode() for block in _blocks(lines)))


def write_bytes(invocation: Invocation, out: Path | None, blocks: Iterable[bytes]) -> None:
    """Put bytes on standard output, or whole into a file."""
    if out is None:
        for block in blocks:
            click.echo(block, nl=False)
        return
    # What is no ordinary file, such as a pipe, is written to; everything else is there whole or not at all.
    part = out if out.exists() and not out.is_file() else out.with_name(f".{out.name}.part")
    try:
        with part.open("wb") as file:
            file.writelines(blocks)
        if part is not out:
            part.replace(out)
    except OSError as error:
        if part is not out:
            with contextlib.suppress(OSError):
                part.unlink()
        raise Failure(ExitCode.USAGE, f"{out} cannot be written: {error.strerror}.") from None
    if not invocation.json:
        invocation.say(f"Written to {out}.", error=True)


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that are worth a call of the system."""
    held: list[str] = []
    length = 0
    for line in lines:
        held.append(line)
        length += len(line)
        if length >= _WRITTEN:
            yield "".join(held)
            held, length = [], 0
    if held:
        yield "".join(held)


def paragraph(title: str, text: str, *, bold: bool = False, indent: int = 0) -> Sequence[str]:
    """Text with its title, broken where a line would be too long for the terminal."""
    width = min(shutil.get_terminal_size((100, 24)).columns, _WIDTH_MAX) - indent
    lines = textwrap.wrap(title + text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [" " * indent + click.style(line, bold=bold or None) for line in lines]
