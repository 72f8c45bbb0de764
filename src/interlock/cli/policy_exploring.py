"""`interlock policy explore`: every state that an instance can get into under a policy, without a server."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, json_option, needs_invocation
from interlock.cli.live_line import LiveLine, progress_stream
from interlock.cli.wording import printable
from interlock.core.errors import Invalid, PolicyError

if TYPE_CHECKING:
    from interlock.policies.exploring import Advance, Exit, Exploration, Violation

_ROLES: Final = ("reader", "member", "admin")
_OUTSTANDING_MAX: Final = 16
_FAULTS_MAX: Final = 15
_SHOWN: Final = 5
"""How many broken laws are told in full, and how many states of a list; `--json` has all of them."""


class _Seconds(click.ParamType[float]):
    """A finite length of time of more than nothing."""

    name = "seconds"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            self.fail(f"{str(value)!r} is no length of time in seconds, such as 30.", param, ctx)
        return number


@click.command()
@click.argument("name", metavar="NAME|FILE")
@click.option(
    "--outstanding",
    "outstanding_max",
    type=click.IntRange(1, _OUTSTANDING_MAX),
    default=3,
    show_default=True,
    help="How many requests may be outstanding at a time; a deletion may stand on top of them.",
)
@click.option(
    "--faults",
    "faults_max",
    type=click.IntRange(0, _FAULTS_MAX),
    help="How often in one story an operation fails or a guest ends by itself. Default: any number of times.",
)
@click.option("--seconds", "seconds_max", type=_Seconds(), help="Stop after so long. Default: when all is seen.")
@click.option(
    "--role", type=click.Choice(_ROLES), default="member", show_default=True, help="Whose submissions are tried."
)
@click.option("--story", "story_path", type=click.Path(path_type=Path), help="Write the shortest story to this file.")
@json_option
@needs_invocation
def explore(
    invocation: Invocation,
    *,
    name: str,
    outstanding_max: int,
    faults_max: int | None,
    seconds_max: float | None,
    role: str,
    story_path: Path | None,
) -> None:
    """Walk through every state of an instance, and check the laws in each.

    Everything that can happen is tried, in every order: submissions, workers that report, fail, hang or get lost,
    guests that end by themselves, and time. A law that is broken is told with the shortest story of how it comes about,
    which `interlock rehearse --policy NAME|FILE` plays. Tags, blocked operations, a lost host and held requests are not
    tried, and what is admitted with `in_turn = false` has no promise that could be broken.

    Ends with 1 if a law is broken, and with 2 if the policy cannot be read or the bound is too large.
    """
    found = _explored(invocation, name, outstanding_max, faults_max, seconds_max, role)
    if story_path is not None and found.violations:
        _write(story_path, found.violations[0])
    if invocation.json:
        invocation.emit(found)
    else:
        _show(invocation, name, found)
    if found.violations:
        raise Failure(ExitCode.ENDED_OTHERWISE, "", text="")


def _explored(
    invocation: Invocation,
    name: str,
    outstanding_max: int,
    faults_max: int | None,
    seconds_max: float | None,
    role: str,
) -> Exploration:
    from interlock.policies.exploring import explore as walk
    from interlock.policies.reading import compile_named

    stream = progress_stream(json=invocation.json)
    live = LiveLine(stream, plain=invocation.plain) if stream.isatty() else None
    try:
        policy = compile_named(name)
        with live or nullcontext():
            return walk(
                policy,
                outstanding_max=outstanding_max,
                faults_max=faults_max,
                seconds_max=seconds_max,
                role=role,
                on_advance=None if live is None else lambda advance: live.tell(_progress(advance)),
            )
    except (PolicyError, Invalid) as error:
        raise Failure(ExitCode.USAGE, error.message, remedy=error.remedy) from None
    except MemoryError:
        raise Failure(
            ExitCode.USAGE,
            "The states of this policy do not fit into memory.",
            remedy="Walk with fewer outstanding requests (--outstanding), or for a shorter time (--seconds).",
        ) from None


def _progress(advance: Advance) -> str:
    rate = advance.states / max(advance.seconds, 0.001)
    return (
        f"{advance.states:,} states, {advance.depth} steps deep, {advance.waiting:,} to look at, {rate:,.0f} states/s"
    )


def _write(path: Path, violation: Violation) -> None:
    try:
        path.write_text("".join(f"{line}\n" for line in violation.story))
    except OSError as error:
        raise Failure(
            ExitCode.USAGE, f"The story cannot be written to {path}: {error.strerror}.", remedy="Name another file."
        ) from None


def _show(invocation: Invocation, name: str, found: Exploration) -> None:
    rate = found.states / max(found.seconds, 0.001)
    invocation.say(
        f"{printable(name)}: {found.states:,} states and {found.transitions:,} steps between them, up to "
        f"{found.depth} steps from the start, in {found.seconds:.1f} s ({rate:,.0f} states/s)."
    )
    bound = f"{found.outstanding_max} outstanding request{'' if found.outstanding_max == 1 else 's'}"
    if found.complete:
        invocation.say(f"That is all there is with {bound} of {len(found.operations)} kinds, and a deletion on top.")
    else:
        invocation.say(
            click.style("That is not all:", fg="yellow") + f" the walk with {bound} ended before everything was seen."
        )
    for what in found.undecided:
        invocation.say(f"Not decided, {printable(what)}.")
    if found.violations:
        _show_violations(invocation, name, found.violations)
    else:
        invocation.say(click.style("No law is broken.", fg="green"))
    _show_exits(invocation, found.exits)


def _show_violations(invocation: Invocation, name: str, violations: tuple[Violation, ...]) -> None:
    from interlock.policies.laws import LAWS

    for violation in violations[:_SHOWN]:
        invocation.say("")
        title = click.style(f"Law {violation.law} is broken", fg="red", bold=True)
        invocation.say(f"{title} ({LAWS[violation.law]}): {printable(violation.what)}.")
        for line in violation.story:
            invocation.say(f"  {printable(line)}")
    if len(violations) > _SHOWN:
        invocation.say(f"\n{len(violations) - _SHOWN} more; --json has all of them.")
    invocation.say(f"\nA story is played by: interlock rehearse --policy {printable(name)}")


def _show_exits(invocation: Invocation, exits: tuple[Exit, ...]) -> None:
    """Where a task that hangs is ended by nothing but a deletion."""
    closed: dict[str, list[str]] = {}
    for one in exits:
        # That only deletions follow a soft one is no finding.
        deletions = all(operation == "soft_delete" for operation in one.takeovers)
        if deletions and one.task_state != "soft_deleting":
            closed.setdefault(one.task_state, []).append(one.vm_state.value)
    if not closed:
        invocation.say("Whatever hangs, something other than a deletion can take over from it.")
        return
    invocation.say("If its worker hangs, nothing but a deletion (soft or not) or a reset ends:")
    for task_state, states in list(closed.items())[: None if len(closed) <= 2 * _SHOWN else _SHOWN]:
        invocation.say(f"  {task_state} in {', '.join(states)}")
    if len(closed) > 2 * _SHOWN:
        invocation.say(f"  and {len(closed) - _SHOWN} more task states; --json has all of them.")


COMMANDS: Final[tuple[click.Command, ...]] = (explore,)
