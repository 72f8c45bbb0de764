"""`interlock policy table`: the whole matrix of a policy, without a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from interlock.cli import policy_diagrams
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, json_option, needs_invocation
from interlock.cli.policy_differences import diff
from interlock.cli.policy_output import compiled, paragraph, write, write_bytes
from interlock.cli.wording import printable
from interlock.core.errors import Invalid

if TYPE_CHECKING:
    from interlock.core.policy import CompiledPolicy
    from interlock.policies.matrices import Matrix, Section
    from interlock.policies.tables import Circumstances, Row, Selection

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
"""The vm_states over the columns of a terminal; the legend says which is which."""


class SilenceText(click.ParamType[int]):
    """A length of time such as `5m`, in milliseconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from interlock.policies.durations import EXPECTED, parse_duration

        if isinstance(value, int):
            return value
        milliseconds = parse_duration(value)
        if milliseconds is None:
            self.fail(f"{printable(value[:80])!r} is not {EXPECTED}.", param, ctx)
        return milliseconds


@click.command()
@click.argument("name", metavar="[NAME|FILE]", required=False)
@click.option("--policy", "named", metavar="NAME|FILE", help="The same as the argument; standard if neither is there.")
@click.option(
    "--format", "form", type=click.Choice(["text", "csv", "html", "markdown"]), default="text", show_default=True,
    help="text for a terminal, csv for programs, html for a browser, markdown for documents.",
)  # fmt: skip
@click.option(
    "--operation", "operations", multiple=True, metavar="OPERATION", help="Only this one; may be given again."
)
@click.option("--vm-state", "vm_states", multiple=True, metavar="STATE", help="Only this one; may be given again.")
@click.option(
    "--task", "tasks", multiple=True, metavar="TASK",
    help="Only this task_state, none, or all phases of an operation; may be given again. In text and markdown, "
    "'all' shows every one; without it they show what is answered while nothing is being done.",
)  # fmt: skip
@click.option(
    "--role", type=click.Choice(["reader", "member", "admin"]), default="member", show_default=True, help="Who asks."
)
@click.option("--locked", is_flag=True, help="Let the instance be locked.")
@click.option(
    "--silent", "silent_ms", type=SilenceText(), default=0, help="How long nothing has shown life, such as 5m."
)
@click.option("--host-unreachable", is_flag=True, help="Let the instance's host be out of reach.")
@click.option("--never-launched", is_flag=True, help="In text and markdown: for an instance that has never run.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write it there.")
@json_option
@needs_invocation
def table(invocation: Invocation, /, *, name: str | None, named: str | None, out: Path | None, **asked: Any) -> None:
    """Show what a policy answers for every operation in every state.

    The rows are those of one caller, with nothing else outstanding than the operation whose task is being served.
    CSV has the columns operation, vm_state, task_state, launched, verdict, threshold_s, rule and reason, one row a
    combination. An operation, or its hard variant, has the names that the policy gives it.
    """
    from interlock.policies.tables import Circumstances, select

    if name is not None and named is not None and name != named:
        raise Failure(ExitCode.USAGE, f"Two policies are named, {name!r} and {named!r}.", remedy="Name one.")
    policy = compiled(name or named or _DEFAULT)
    circumstances = Circumstances(
        role=asked["role"],
        locked=asked["locked"],
        silent_ms=asked["silent_ms"],
        host_reachable=not asked["host_unreachable"],
    )
    shown = asked["form"] in ("text", "markdown") and not invocation.json
    tasks = asked["tasks"] or (("none",) if shown else ())
    tasks = () if "all" in tasks else tasks
    try:
        selection = select(policy, operations=asked["operations"], vm_states=asked["vm_states"], tasks=tasks)
    except Invalid as error:
        raise Failure(ExitCode.USAGE, error.message, remedy=error.remedy) from None
    launched = not asked["never_launched"]
    if invocation.json:
        from interlock.policies.tables import table as rows_of

        write_bytes(invocation, out, [_document(policy, circumstances, rows_of(policy, circumstances, selection))])
    else:
        lines = _form(asked["form"], policy, circumstances, selection, launched=launched)
        write(invocation, out, lines)


def _form(
    form: str, policy: CompiledPolicy, circumstances: Circumstances, selection: Selection, *, launched: bool
) -> Iterable[str]:
    from interlock.policies import tables

    match form:
        case "csv":
            return tables.csv_lines(tables.rows(policy, circumstances, selection))
        case "html":
            from interlock.policies.table_pages import html_page

            return [html_page(policy, circumstances, selection)]
        case "markdown":
            from interlock.policies.table_pages import markdown_lines

            return (f"{line}\n" for line in markdown_lines(policy, circumstances, selection, launched=launched))
        case _:
            return (f"{line}\n" for line in _text(policy, circumstances, selection, launched=launched))


def _document(policy: CompiledPolicy, circumstances: Circumstances, rows: list[Row]) -> bytes:
    import msgspec

    return msgspec.json.encode({"policy": policy.stamp, "circumstances": circumstances, "rows": rows}) + b"\n"


# ------------------------------------------------------------------------------------------------------------ text


def _text(
    policy: CompiledPolicy, circumstances: Circumstances, selection: Selection, *, launched: bool
) -> Iterator[str]:
    from interlock.policies.matrices import differing, matrix, title_of
    from interlock.policies.table_pages import circumstances_text

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
    from interlock.policies.matrices import matrix, title_of
    from interlock.policies.tables import Selection

    whole = Selection(variants=selection.variants, vm_states=selection.vm_states)
    sections = matrix(policy, circumstances, whole).sections[1:]
    if not sections:
        return
    titles = "; ".join(title_of(section, policy.policy.names) for section in sections)
    yield ""
    yield "While something is being done, --task TASK (or --task all) shows the answers. What ';' parts differs:"
    yield from paragraph("  ", titles)


def _section(there: Matrix, section: Section) -> Iterator[str]:
    from interlock.policies.matrices import sign
    from interlock.policies.table_pages import is_refusal

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
        yield from paragraph("Everything is refused in: ", ", ".join(left))
    if refused:
        yield from paragraph("Always refused: ", ", ".join(printable(name) for line in refused for name in line.names))


def _line(texts: Sequence[str], widths: Sequence[int], colours: Sequence[str]) -> str:
    """Cells in their colours; the last is not padded, so that no line ends with spaces."""
    padded = (text.ljust(width - 1) for text, width in zip(texts[:-1], widths, strict=False))
    return " ".join(click.style(text, fg=colour) for text, colour in zip((*padded, texts[-1]), colours, strict=True))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _legend(there: Matrix) -> Iterator[str]:
    from interlock.policies.matrices import LATER, MEANINGS

    signs = ((word, meaning, _COLOURS[verdict.value]) for verdict, (word, meaning) in MEANINGS.items())
    for word, meaning, colour in (*signs, (*LATER, None)):
        yield f"  {click.style(word.ljust(5), fg=colour)} {meaning}"
    heads = [f"{_HEADS[state.value]} {state.value}" for state in there.vm_states]
    yield from paragraph("  ", ", ".join(heads))


COMMANDS: tuple[click.Command, ...] = (table, diff, *policy_diagrams.COMMANDS)
"""What `interlock policy` has for looking at a policy as a whole."""
