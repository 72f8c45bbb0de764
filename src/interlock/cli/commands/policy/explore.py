"""`interlock policy explore` and `key`: model checking of a policy without a server, and certificates of it."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from interlock.cli.commands.policy.group import policy_commands
from interlock.cli.commands.policy.output import assumption_lines, compiled, story_lines
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import ExitCode, Failure, writing
from interlock.cli.options.configuration import errors_as_failures
from interlock.cli.output.formatting import printable
from interlock.cli.output.progress import LiveLine, progress_stream
from interlock.core.roles import Role

if TYPE_CHECKING:
    from interlock.policies.model_checker import Exit, Exploration, SearchProgress, Violation

_OUTSTANDING_MAX: Final = 16
_FAULTS_MAX: Final = 15
_SHOWN: Final = 5
"""How many violations and states of a list are printed; `--json` has all of them."""


class _Seconds(click.ParamType[float]):
    """A positive, finite number of seconds."""

    name = "seconds"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            self.fail(f"Invalid duration {str(value)!r}: expected seconds, such as 30.", param, ctx)
        return number


@policy_commands.command()
@click.argument("name", metavar="NAME|FILE")
@click.option(
    "--outstanding",
    "outstanding_max",
    type=click.IntRange(1, _OUTSTANDING_MAX),
    default=3,
    show_default=True,
    help="Maximum number of outstanding requests, not counting a deletion.",
)
@click.option(
    "--faults",
    "faults_max",
    type=click.IntRange(0, _FAULTS_MAX),
    help="Maximum number of faults (failed operations, guests that end) in a run. Default: unlimited.",
)
@click.option("--seconds", "seconds_max", type=_Seconds(), help="Time limit. Default: none.")
@click.option(
    "--role",
    type=click.Choice([role.value for role in Role]),
    callback=lambda _context, _parameter, role: Role(role),
    default="member",
    show_default=True,
    help="Also say where callers of this role alone cannot delete.",
)
@click.option(
    "--story", "story_path", type=click.Path(path_type=Path), help="Write the shortest counterexample to this file."
)
@click.option(
    "--certificate",
    "certificate_path",
    type=click.Path(path_type=Path),
    help="Write the result to this file as JSON, for `policy load --certificate`.",
)
@click.option(
    "--key", "key_path", type=click.Path(path_type=Path), help="Sign the certificate with this key (`policy key`)."
)
@click.option(
    "--valid-days",
    type=click.IntRange(1, 3650),
    default=365,
    show_default=True,
    help="How long the certificate is valid.",
)
@with_json
def explore(
    invocation: Invocation,
    /,
    *,
    name: str,
    story_path: Path | None,
    certificate_path: Path | None,
    key_path: Path | None,
    valid_days: int,
    **search: Any,
) -> None:
    """Explore every reachable state of an instance, and check the laws in each.

    All interleavings are explored: submissions, workers that report, fail, hang or are lost, guests that end, and time.
    A violation is shown with the shortest counterexample, which `interlock rehearse --policy NAME|FILE` plays. What
    does not vary is listed with the result as its assumptions.

    Exits with 1 if a law is violated, and with 2 if the policy is invalid or the bound is too large.
    """
    if key_path is not None and certificate_path is None:
        raise Failure(ExitCode.USAGE, "--key needs --certificate.", remedy="Add --certificate FILE.")
    private_key = None if key_path is None else read_key(key_path)
    found = _explored(invocation, name, search)
    if story_path is not None and found.violations:
        _write(story_path, found.violations[0])
    if certificate_path is not None:
        write_certificate(name, found, search["faults_max"], certificate_path, private_key, valid_days)
    if invocation.json:
        invocation.emit(found)
    else:
        _show(invocation, name, found)
    if found.violations:
        raise Failure(ExitCode.ENDED_OTHERWISE, "", text="")


def _explored(invocation: Invocation, name: str, search: dict[str, Any]) -> Exploration:
    from interlock.policies.language.loader import compile_named
    from interlock.policies.model_checker import explore as walk

    stream = progress_stream(json=invocation.json)
    live = LiveLine(stream, plain=invocation.plain) if stream.isatty() else None
    try:
        with errors_as_failures(), live or nullcontext():
            on_progress = None if live is None else lambda advance: live.update(_progress(advance))
            return walk(compile_named(name), **search, on_progress=on_progress)
    except MemoryError:
        raise Failure(
            ExitCode.USAGE,
            "Out of memory: too many states.",
            remedy="Use fewer outstanding requests (--outstanding) or a time limit (--seconds).",
        ) from None


def _progress(advance: SearchProgress) -> str:
    rate = advance.states / max(advance.seconds, 0.001)
    return (
        f"{advance.states:,} states, {advance.depth} steps deep, {advance.waiting:,} to look at, {rate:,.0f} states/s"
    )


def _write(path: Path, violation: Violation) -> None:
    with writing(path):
        path.write_text("".join(f"{line}\n" for line in violation.story))


def _show(invocation: Invocation, name: str, found: Exploration) -> None:
    rate = found.states / max(found.seconds, 0.001)
    invocation.echo(
        f"{printable(name)}: {found.states:,} states and {found.transitions:,} steps between them, up to "
        f"{found.depth} steps from the start, in {found.seconds:.1f} s ({rate:,.0f} states/s)."
    )
    bound = f"{found.outstanding_max} outstanding request{'' if found.outstanding_max == 1 else 's'}"
    if found.complete:
        invocation.echo(f"That is all there is with {bound} of {len(found.operations)} kinds, and a deletion on top.")
    else:
        invocation.echo(
            click.style("That is not all:", fg="yellow") + f" the walk with {bound} ended before everything was seen."
        )
    for what in found.undecided:
        invocation.echo(f"Not decided, {printable(what)}.")
    if found.violations:
        _show_violations(invocation, name, found.violations)
    else:
        invocation.echo(click.style("No law is broken", fg="green") + " under these assumptions:")
    if found.violations:
        invocation.echo("\nAssumptions of the exploration:")
    for line in assumption_lines(found.assumptions):
        invocation.echo(line)
    if found.until_silence:
        _show_until_silence(invocation, found.until_silence)
    if found.weaker is not None:
        invocation.echo(printable(found.weaker.sentence))
    _show_exits(invocation, found.exits)


def _show_violations(invocation: Invocation, name: str, violations: tuple[Violation, ...]) -> None:
    from interlock.policies.laws import LAWS

    policy = compiled(name)
    for violation in violations[:_SHOWN]:
        invocation.echo("")
        title = click.style(f"Law {violation.law} is broken", fg="red", bold=True)
        law = LAWS[violation.law]
        invocation.echo(f"{title} ({law.name}): {printable(violation.what)}.")
        invocation.echo(f"  {law.promise}")
        for line in story_lines(violation.story, policy):
            invocation.echo(f"  {printable(line)}")
    if len(violations) > _SHOWN:
        invocation.echo(f"\n{len(violations) - _SHOWN} more; --json has all of them.")
    invocation.echo(f"\nA story is played by: interlock rehearse --policy {printable(name)}")


def _show_until_silence(invocation: Invocation, states: tuple[str, ...]) -> None:
    """Print the states in which a deletion waits until a worker makes no progress."""
    more = f", and {len(states) - _SHOWN} more (--json)" if len(states) > _SHOWN else ""
    shown = "; ".join(states[:_SHOWN])
    invocation.echo(
        f"As long as a worker makes progress, nobody can delete without a reset of the state: {shown}{more}."
    )


def _show_exits(invocation: Invocation, exits: tuple[Exit, ...]) -> None:
    """Print the tasks whose hang only a deletion ends."""
    closed: dict[str, list[str]] = {}
    for one in exits:
        # That only deletions follow a soft one is no finding.
        deletions = all(operation == "soft_delete" for operation in one.takeovers)
        if deletions and one.task_state != "soft_deleting":
            closed.setdefault(one.task_state, []).append(one.vm_state.value)
    if not closed:
        invocation.echo("Whatever hangs, something other than a deletion can take over from it.")
        return
    invocation.echo("If its worker hangs, nothing but a deletion (soft or not) or a reset ends:")
    for task_state, states in list(closed.items())[: None if len(closed) <= 2 * _SHOWN else _SHOWN]:
        invocation.echo(f"  {task_state} in {', '.join(states)}")
    if len(closed) > 2 * _SHOWN:
        invocation.echo(f"  and {len(closed) - _SHOWN} more task states; --json has all of them.")


@policy_commands.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@with_json
def key(invocation: Invocation, *, file: Path) -> None:
    """Make a key that signs certificates, and print its public half.

    The private key is written to FILE, which must not exist. `interlock policy explore --certificate --key FILE` signs
    with it; a server accepts its certificates if `policy_keys` in its configuration has the public key.
    """
    from interlock.policies.certificates import new_private_key, public_text, read_private_key

    pem = new_private_key()
    with writing(file):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as written:
        written.write(pem)
    public_key = public_text(read_private_key(pem))
    if invocation.json:
        invocation.emit({"file": str(file), "public_key": public_key})
    else:
        invocation.echo(public_key)


def read_key(path: Path) -> Any:
    """Return the private key in a file. Raises `Failure`."""
    from interlock.policies.certificates import read_private_key

    with errors_as_failures():
        return read_private_key(_read_file(path))


def write_certificate(
    name: str, found: Exploration, faults_max: int | None, path: Path, private_key: Any, valid_days: int
) -> None:
    """Write the certificate of an exploration, signed if there is a key. Raises `Failure`."""
    from datetime import UTC, datetime

    from interlock.policies.certificates import SignedCertificate, certify, sign
    from interlock.policies.language.loader import compile_named

    now = datetime.now(UTC)  # noqa: TID251 - there is no store, and another machine compares it with its own time
    with errors_as_failures():
        certificate = certify(compile_named(name), found, faults_max, now, valid_days)
    signed = SignedCertificate(certificate=certificate) if private_key is None else sign(certificate, private_key)
    text = msgspec.json.format(msgspec.json.encode(signed), indent=2)
    with writing(path):
        path.write_bytes(text + b"\n")


def read_certificate(path: Path) -> Any:
    """Return a certificate as JSON values; the server checks it. Raises `Failure`."""
    try:
        return msgspec.json.decode(_read_file(path))
    except msgspec.DecodeError as error:
        raise Failure(
            ExitCode.USAGE,
            f"Invalid certificate {path}: {error}.",
            remedy="Write one with `interlock policy explore --certificate FILE --key KEY`.",
        ) from None


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Failure(ExitCode.USAGE, f"Cannot read {path}: {error.strerror}.") from None
