"""Loading and output shared by the policy commands."""

from __future__ import annotations

import contextlib
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import msgspec

from interlock.cli.context import Invocation
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.configuration import errors_as_failures
from interlock.cli.output.formatting import duration, printable
from interlock.core.condition_kinds import Word
from interlock.core.conditions import CALLER, Condition
from interlock.core.errors import Invalid

if TYPE_CHECKING:
    from interlock.api.schemas.policy import PolicyWalk
    from interlock.core.policy import CompiledPolicy
    from interlock.policies.lint import Finding, FindingGroup

_WRITTEN: Final = 64 * 1024
_WIDTH_MAX: Final = 120
_SINGLY_MAX: Final = 3
"""Up to how many findings of one kind are printed one by one."""
SEVERITY_COLOURS: Final = {"error": "red", "warning": "yellow", "note": "cyan"}

_Command = TypeVar("_Command", bound=Callable[..., Any])


def caller_options(*, defaults: bool = True) -> Callable[[_Command], _Command]:
    """Add an option for each thing that rules can ask of a caller; without `defaults`, None if it is not given."""

    def add(command: _Command) -> _Command:
        for condition in reversed(CALLER):
            words = condition.kind.words if isinstance(condition.kind, Word) else None
            several = isinstance(condition.usual, tuple)
            command = click.option(
                f"--{condition.reads.replace('_', '-')}",
                type=_option_type(condition),
                metavar="NAME" if words is None and not isinstance(condition.usual, int) else None,
                multiple=several,
                default=str(condition.usual) if defaults and words is not None else None,
                show_default=defaults and words is not None,
                help=_help(condition, shows_usual=not defaults and words is not None),
            )(command)
        return command

    return add


def _option_type(condition: Condition) -> click.ParamType[Any] | type[str]:
    if isinstance(condition.kind, Word):
        return click.Choice([str(word) for word in condition.kind.words])
    return click.IntRange(min=0) if isinstance(condition.usual, int) else str


def _help(condition: Condition, *, shows_usual: bool) -> str:
    if shows_usual:
        return f"{condition.option}  [{condition.usual}]"
    return f"{condition.option[:-1]}; repeatable." if isinstance(condition.usual, tuple) else condition.option


def caller_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the caller that the options describe: the values that are not as usual."""
    given = {condition.reads: options[condition.reads] for condition in CALLER}
    return {field: value for field, value in given.items() if value not in (None, ())}


def compiled(name: str) -> CompiledPolicy:
    """Return a policy by name or file. Raises `Failure` if it is invalid."""
    from interlock.policies.language.loader import compile_named

    with errors_as_failures():
        return compile_named(name)


def write(invocation: Invocation, out: Path | None, lines: Iterable[str]) -> None:
    """Write text to standard output, or without colours to a file (atomic)."""
    if out is None:
        for block in _blocks(lines):
            click.echo(block, nl=False, color=False if invocation.plain else None)
    else:
        write_bytes(invocation, out, (click.unstyle(block).encode() for block in _blocks(lines)))


def write_bytes(invocation: Invocation, out: Path | None, blocks: Iterable[bytes]) -> None:
    """Write bytes to standard output, or to a file (atomic)."""
    if out is None:
        for block in blocks:
            click.echo(block, nl=False)
        return
    # A pipe or device is written directly, a regular file atomically.
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
        raise Failure(ExitCode.USAGE, f"Cannot write {out}: {error.strerror}.") from None
    if not invocation.json:
        invocation.echo(f"Written to {out}.", error=True)


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """Join lines into larger blocks, for fewer system calls."""
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
    """Wrap a titled text to the width of the terminal."""
    width = min(shutil.get_terminal_size((100, 24)).columns, _WIDTH_MAX) - indent
    lines = textwrap.wrap(title + text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [" " * indent + click.style(line, bold=bold or None) for line in lines]


def assumption_lines(assumptions: Iterable[str]) -> list[str]:
    """Return what an exploration held fixed as a list, wrapped to the width of the terminal."""
    return [line for one in assumptions for line in paragraph("- ", printable(one), indent=2)]


def walk_text(walk: PolicyWalk) -> str:
    """Describe the exploration of a policy without violations, with its assumptions."""
    seen = f"{walk.states:,} states in {duration(walk.seconds)}"
    by = "" if walk.version is None else f" by Interlock {printable(walk.version)}"
    if walk.complete:
        first = f"Explored{by}: all {seen}; no violations under these assumptions:"
    else:
        first = (
            f"Explored{by}: {seen}, incomplete; `interlock policy explore` explores all. No violations under these "
            "assumptions:"
        )
    if walk.certified_by is not None:
        certified = f"Certified by {printable(walk.certified_by)}, explored{by}"
        first = f"{certified}: {seen}; no violations under these assumptions:"
    limits = [] if walk.role_limits is None else [printable(walk.role_limits)]
    return "\n".join((first, *assumption_lines(walk.assumptions), *limits))


def finding_lines(findings: Iterable[Finding], *, singly: bool = False) -> Iterator[str]:
    """Format findings, the most serious first: many of one kind as one sentence with their places."""
    from interlock.policies.lint import grouped

    for group in grouped(findings):
        if not singly and len(group.findings) > _SINGLY_MAX:
            yield from _group_lines(group)
            continue
        for one in group.findings:
            yield _finding_head(one.place, group.severity.value, one.message, group.code)
            if one.remedy:
                yield f"    {printable(one.remedy)}"


def _group_lines(group: FindingGroup) -> Iterator[str]:
    message = f"{group.summary} {len(group.findings)} places:"
    yield _finding_head(group.findings[0].place, group.severity.value, message, group.code)
    # A place stays on one line: its space is one at which lines do not break.
    places = (f"{one.place.partition(':')[2] or one.place}\xa0{printable(one.rule or '')}" for one in group.findings)
    yield from (line.replace("\xa0", " ") for line in paragraph("", ", ".join(places), indent=4))
    if group.remedy:
        yield f"    {printable(group.remedy)}"


def _finding_head(place: str, severity: str, message: str, code: str) -> str:
    coloured = click.style(f"{severity}:", fg=SEVERITY_COLOURS[severity], bold=True)
    return f"{printable(place)}: {coloured} {printable(message)} [{code}]"


def story_lines(story: Sequence[str], policy: CompiledPolicy | None) -> Iterator[str]:
    """Yield the events of a counterexample, and the answer to the last, which is the breach.

    Where the events lead to a state that cannot be left, the last is an admin's delete there. Without the policy, or if
    a server's walk knew what is not known here, yield the events alone.
    """
    from interlock.policies.rehearsal.events import read_line
    from interlock.policies.rehearsal.runner import Rehearsal

    if policy is None:
        yield from story
        return
    lines = list(story)
    if "submit" not in msgspec.json.decode(lines[-1]):
        lines.append(msgspec.json.encode({"submit": "delete", "role": "admin"}).decode())
    stage = Rehearsal(policy)
    try:
        answers = [stage.play(*read_line(line)) for line in lines]
    except Invalid:
        yield from story
        return
    yield from lines
    yield f"-> {msgspec.json.encode(answers[-1]).decode()}"
