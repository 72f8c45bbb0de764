"""`interlock policy table` and `diagram`: the verdicts of a policy, as tables and drawings, without a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from interlock.cli.commands.policy.group import policy_commands
from interlock.cli.commands.policy.output import caller_of, caller_options, compiled, paragraph, write, write_bytes
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.configuration import errors_as_failures
from interlock.cli.options.quantities import Duration
from interlock.cli.output.formatting import printable

if TYPE_CHECKING:
    from interlock.core.policy import CompiledPolicy
    from interlock.policies.rendering.tables import Circumstances, Matrix, Row, Section, Selection

_DEFAULT: Final = "standard"
_COLOURS: Final = {
    "admit": "green",
    "preempt": "cyan",
    "redundant": "yellow",
    "after": "magenta",
    "deny": "bright_black",
}
_NAME_WIDTH: Final = 27
_HEADS: Final = {
    "building": "buil",
    "active": "actv",
    "paused": "paus",
    "suspended": "susp",
    "stopped": "stop",
    "rescued": "resc",
    "resized": "resz",
    "shelved": "shlv",
    "shelved_offloaded": "offl",
    "soft_deleted": "sdel",
    "deleted": "del",
    "migrated_out": "migr",
    "error": "err",
}
"""Abbreviations of vm_states in column heads."""


@policy_commands.command()
@click.argument("name", metavar="[NAME|FILE]", required=False)
@click.option("--policy", "named", metavar="NAME|FILE", help="Same as the argument. Default: standard.")
@click.option(
    "--format", "form", type=click.Choice(["text", "csv", "html", "markdown"]), default="text", show_default=True,
    help="Output format.",
)  # fmt: skip
@click.option("--operation", "operations", multiple=True, metavar="OPERATION", help="Only this one. May be repeated.")
@click.option("--vm-state", "vm_states", multiple=True, metavar="STATE", help="Only this one. May be repeated.")
@click.option(
    "--task", "tasks", multiple=True, metavar="TASK",
    help="Only this task_state, none, or all phases of an operation. May be repeated. In text and markdown the default "
    "is none; 'all' shows every one.",
)  # fmt: skip
@caller_options()
@click.option("--locked", is_flag=True, help="The VM is locked.")
@click.option("--silent", "silent_ms", type=Duration(), default=0, help="Time without progress, such as 5m.")
@click.option("--host-unreachable", is_flag=True, help="The host of the VM is not reachable.")
@click.option("--never-launched", is_flag=True, help="In text and markdown: the VM has never run.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Output file. Default: standard output.")
@with_json
def table(invocation: Invocation, /, *, name: str | None, named: str | None, out: Path | None, **asked: Any) -> None:
    """Show a policy's verdicts for every operation in every state.

    The verdicts are for one caller, with nothing outstanding except the operation of the task_state. CSV has the
    columns operation, vm_state, task_state, launched, verdict, threshold_s, rule and reason, one row per combination.
    Operations and hard variants have the names that the policy defines.
    """
    from interlock.policies.rendering.tables import Circumstances, select

    if name is not None and named is not None and name != named:
        raise Failure(ExitCode.USAGE, f"Two policies given: {name!r} and {named!r}.", remedy="Give one.")
    policy = compiled(name or named or _DEFAULT)
    circumstances = Circumstances(
        caller=caller_of(asked),
        locked=asked["locked"],
        silent_ms=asked["silent_ms"],
        host_reachable=not asked["host_unreachable"],
    )
    shown = asked["form"] in ("text", "markdown") and not invocation.json
    tasks = asked["tasks"] or (("none",) if shown else ())
    tasks = () if "all" in tasks else tasks
    with errors_as_failures():
        selection = select(policy, operations=asked["operations"], vm_states=asked["vm_states"], tasks=tasks)
    launched = not asked["never_launched"]
    if invocation.json:
        from interlock.policies.rendering.tables import table as rows_of

        write_bytes(invocation, out, [_document(policy, circumstances, rows_of(policy, circumstances, selection))])
    else:
        lines = _form(asked["form"], policy, circumstances, selection, launched=launched)
        write(invocation, out, lines)


def _form(
    form: str, policy: CompiledPolicy, circumstances: Circumstances, selection: Selection, *, launched: bool
) -> Iterable[str]:
    from interlock.policies.rendering import tables

    match form:
        case "csv":
            return tables.csv_lines(tables.rows(policy, circumstances, selection))
        case "html":
            from interlock.policies.rendering.table_pages import html_page

            return [html_page(policy, circumstances, selection)]
        case "markdown":
            from interlock.policies.rendering.table_pages import markdown_lines

            return (f"{line}\n" for line in markdown_lines(policy, circumstances, selection, launched=launched))
        case _:
            return (f"{line}\n" for line in _text(policy, circumstances, selection, launched=launched))


def _document(policy: CompiledPolicy, circumstances: Circumstances, rows: list[Row]) -> bytes:
    import msgspec

    return (
        msgspec.json.encode({"policy": policy.stamp, "circumstances": circumstances.document(), "rows": rows}) + b"\n"
    )


# ------------------------------------------------------------------------------------------------------------ text


def _text(
    policy: CompiledPolicy, circumstances: Circumstances, selection: Selection, *, launched: bool
) -> Iterator[str]:
    from interlock.policies.rendering.table_pages import circumstances_text
    from interlock.policies.rendering.tables import differing, matrix, title_of

    names = policy.policy.names
    there = matrix(policy, circumstances, selection, launched=launched)
    yield click.style(f"Policy {printable(policy.policy.name)}", bold=True) + (
        f": what {circumstances_text(circumstances, launched=launched)} is answered"
    )
    for section in there.sections:
        yield ""
        yield from paragraph("With ", title_of(section, names), bold=True)
        yield from _section(there, section)
    yield ""
    yield from _legend(there)
    if launched:
        others = differing(there, matrix(policy, circumstances, selection, launched=False))
        if others:
            yield (
                f"An instance that has never run is answered otherwise in {others} of these combinations: "
                "--never-launched."
            )
    if selection.task_states == frozenset({"none"}):
        yield from _more(policy, circumstances, selection)


def _more(policy: CompiledPolicy, circumstances: Circumstances, selection: Selection) -> Iterator[str]:
    from interlock.policies.rendering.tables import Selection, matrix, title_of

    whole = Selection(variants=selection.variants, vm_states=selection.vm_states)
    sections = matrix(policy, circumstances, whole).sections[1:]
    if not sections:
        return
    titles = "; ".join(title_of(section, policy.policy.names) for section in sections)
    yield ""
    yield "While an operation is in progress, --task TASK (or --task all) shows the answers. What ';' parts differs:"
    yield from paragraph("  ", titles)


def _section(there: Matrix, section: Section) -> Iterator[str]:
    from interlock.policies.rendering.table_pages import is_refusal
    from interlock.policies.rendering.tables import sign

    refused = [line for line in section.lines if all(is_refusal(answer) for answer in line.answers)]
    kept = [line for line in section.lines if line not in refused]
    columns = [
        number for number in range(len(there.vm_states)) if not all(is_refusal(line.answers[number]) for line in kept)
    ]
    if kept:
        signs = [[sign(line.answers[number]) for number in columns] for line in kept]
        heads = [_HEADS[there.vm_states[number].value] for number in columns]
        widths = [max(map(len, column)) + 1 for column in zip(heads, *signs, strict=True)]
        labels = [printable(" ".join(line.names)) for line in kept]
        room = min(max(map(len, labels)), _NAME_WIDTH)
        yield " " * room + "  " + _line(heads, widths, ["white"] * len(heads))
        for line, label, row in zip(kept, labels, signs, strict=True):
            colours = [_COLOURS[line.answers[number].rule.verdict.value] for number in columns]
            yield f"{_cut(label, room):<{room}}  {_line(row, widths, colours)}"
    if kept and len(columns) < len(there.vm_states):
        left = [state.value for number, state in enumerate(there.vm_states) if number not in columns]
        yield from paragraph("Everything is denied in: ", ", ".join(left))
    if refused:
        yield from paragraph("Always denied: ", ", ".join(printable(name) for line in refused for name in line.names))


def _line(texts: Sequence[str], widths: Sequence[int], colours: Sequence[str]) -> str:
    """Format coloured cells; the last is not padded."""
    padded = (text.ljust(width - 1) for text, width in zip(texts[:-1], widths, strict=False))
    return " ".join(click.style(text, fg=colour) for text, colour in zip((*padded, texts[-1]), colours, strict=True))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _legend(there: Matrix) -> Iterator[str]:
    from interlock.policies.rendering.tables import LATER, MEANINGS

    signs = ((word, meaning, _COLOURS[verdict.value]) for verdict, (word, meaning) in MEANINGS.items())
    for word, meaning, colour in (*signs, (*LATER, None)):
        yield f"  {click.style(word.ljust(5), fg=colour)} {meaning}"
    heads = [f"{_HEADS[state.value]} {state.value}" for state in there.vm_states]
    yield from paragraph("  ", ", ".join(heads))


@policy_commands.command()
@click.argument("name", metavar="NAME|FILE")
@click.option(
    "--of", "subject", type=click.Choice(["states", "table", "tasks"]), default="states", show_default=True,
    help="states: the operations between states. table: the verdicts in each state. tasks: the verdicts for an active "
    "instance in each task_state.",
)  # fmt: skip
@click.option(
    "--format", "form", type=click.Choice(["svg", "dot"]), default="svg", show_default=True,
    help="dot (Graphviz) is available for states only.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Output file. Default: standard output.")
@with_json
def diagram(invocation: Invocation, /, *, name: str, subject: str, form: str, out: Path | None) -> None:
    """Draw a diagram of a policy.

    The state diagram has an arrow for each operation admitted while nothing is outstanding. It requires Graphviz.
    """
    from interlock.policies.rendering import answer_grid_svg, state_diagram

    if form == "dot" and subject != "states":
        raise Failure(ExitCode.USAGE, "The format dot is available for states only.", remedy="Leave out --format dot.")
    policy = compiled(name)
    with errors_as_failures():
        match subject:
            case "table":
                text = answer_grid_svg.svg_grid(answer_grid_svg.of_states(policy))
            case "tasks":
                text = answer_grid_svg.svg_grid(answer_grid_svg.of_tasks(policy))
            case _:
                text = state_diagram.dot_source(policy)
                text = state_diagram.svg_of(text) if form == "svg" else text
    if invocation.json:
        invocation.emit({"policy": policy.stamp, "of": subject, "format": form, "content": text})
    else:
        write(invocation, out, [text])
