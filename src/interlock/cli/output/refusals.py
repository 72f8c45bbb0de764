"""Text of the gate's denials, and of `interlock why`."""

from __future__ import annotations

from typing import Any, Final

import click
import msgspec

from interlock.api.schemas.responses import AllowedOperation, Blocker, Held, Redundant, Refusal
from interlock.cli.failures import Failure
from interlock.cli.output.formatting import clock, duration, escape_all, humanize, printable
from interlock.core.preconditions import RULE

BLOCKED: Final = "operation_blocked"
"""Reason code of an operation that a VM is protected from."""


def as_refusal(document: dict[str, Any]) -> Refusal | None:
    """Return the denial in a problem document, or None if it is another problem."""
    try:
        return msgspec.convert(escape_all(document), Refusal)
    except msgspec.ValidationError:
        return None


def refusal_text(refusal: Refusal, name: str, now: float | None) -> str:
    """Describe a denial in a few lines: what, why, until when, and what is allowed instead."""
    head = f"Denied: {humanize(refusal.operation)} of {name} ({refusal.reason})"
    lines = [click.style(head, fg="red", bold=True)]
    lines += reasons(refusal, refusal.detail, now)
    lines += _unprotect_hint(refusal, name)
    if refusal.allowed_instead:
        lines.append(f"Allowed now: {', '.join(humanize(one) for one in refusal.allowed_instead)}")
    return "\n  ".join(lines)


def reasons(answer: Refusal | AllowedOperation, detail: str, now: float | None) -> list[str]:
    """Return the blocking request, the rule, and when to retry, one line each."""
    lines = []
    if answer.blocked_by is not None:
        lines.append(blocker_sentence(answer.blocked_by, now))
    if answer.because or detail:
        lines.append(answer.because or detail)
    state = (
        f"in the foreseen state ({answer.vm_state.value})"
        if answer.foreseen
        else f"as it is now ({answer.vm_state.value})"
    )
    if answer.rule == RULE:
        lines.append("A precondition of the operation, independent of the policy.")
    else:
        lines.append(f"Rule {answer.rule} decided, evaluating the VM {state}.")
    if answer.remedy:
        lines.append(answer.remedy)
    again = allowed_again(answer, now)
    return [*lines, again] if again else lines


def _unprotect_hint(answer: Refusal | AllowedOperation, name: str) -> list[str]:
    """Return the command that removes the protection, if that is the reason."""
    if answer.reason != BLOCKED:
        return []
    command = answer.operation.value.replace("_", "-")
    return [f"`interlock vm unprotect {name} --from {command}` removes the protection."]


def blocker_sentence(blocker: Blocker, now: float | None) -> str:
    """Describe the blocking request, its requester, and since when."""
    match blocker.status.value:
        case "queued" | "held" as waiting:
            doing = f"is {waiting}"
        case "unknown":
            doing = "is in flight with an unknown outcome"
        case _:
            doing = f"is in flight ({humanize(blocker.phase)})" if blocker.phase else "is in flight"
    sentence = f"{humanize(blocker.operation)} {blocker.request} by {blocker.by} {doing}"
    sentence += f" since {clock(blocker.since, now)}"
    if blocker.last_sign_of_life is not None:
        sentence += f"; last progress {clock(blocker.last_sign_of_life, now)}"
    return sentence + "."


def allowed_again(answer: Refusal | AllowedOperation, now: float | None) -> str | None:
    """Return when to retry, as a sentence; None if time does not change the decision."""
    if answer.allowed_at is not None:
        wait = f" (in {duration(answer.retry_after_s)})" if answer.retry_after_s is not None else ""
        return f"Allowed again: {clock(answer.allowed_at, now)}{wait}{if_silent(answer, now)}"
    if answer.blocked_by is not None:
        return "Evaluated again: as soon as that has ended"
    return None


def if_silent(answer: Refusal | AllowedOperation | Redundant | Held, now: float | None) -> str:
    """Return what a named time depends on, to be appended to it; empty if it is definite."""
    if not answer.allowed_if_silent:
        return ""
    latest = "" if answer.allowed_latest_at is None else f"; at the latest {clock(answer.allowed_latest_at, now)}"
    return f", unless there is progress before{latest}"


def failure_text(failure: Failure) -> str:
    """Return the printed text of a failure."""
    if failure.text is not None:
        return failure.text
    lines = [click.style("Error: ", fg="red", bold=True) + printable(failure.message)]
    if failure.remedy:
        lines.append(printable(failure.remedy))
    if occurrence := failure.document.get("occurrence"):
        lines.append(f"See the server's log entry {printable(str(occurrence))}.")
    return "\n  ".join(lines)


def why_text(answer: AllowedOperation, name: str, now: float | None) -> str:
    """Describe what the gate would decide about an operation now, and why."""
    what = f"{humanize(answer.operation)} of {name}"
    match answer.disposition:
        case "admitted":
            head = click.style(f"Allowed: {what}", fg="green", bold=True)
        case "redundant":
            head = click.style(f"Redundant: {what} ({answer.reason})", fg="yellow", bold=True)
        case "denied":
            head = click.style(f"Denied: {what} ({answer.reason})", fg="red", bold=True)
    lines = [head, *reasons(answer, answer.detail, now), *_unprotect_hint(answer, name)]
    if answer.supersedes:
        lines.append(f"It would take over from: {', '.join(answer.supersedes)}")
    if answer.cancels:
        lines.append(f"It would cancel: {', '.join(answer.cancels)}")
    return "\n  ".join(lines)
