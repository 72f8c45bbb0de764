"""What the gate said, for people: a refusal, and the answer to "why"."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from interlock.api.schemas import AllowedOperation, Blocker, Refusal
from interlock.cli.failures import Failure
from interlock.cli.wording import clock, duration, printable, spoken


def as_refusal(document: dict[str, Any]) -> Refusal | None:
    """The gate's refusal in a problem document, or None if it is another problem."""
    try:
        return msgspec.convert(document, Refusal)
    except msgspec.ValidationError:
        return None


def refusal_text(refusal: Refusal, name: str, now: float | None) -> str:
    """A refusal in a few lines: what, why, until when, and what is allowed instead."""
    head = f"Refused: {spoken(refusal.operation)} of {name} ({refusal.reason})"
    lines = [click.style(head, fg="red", bold=True)]
    lines += reasons(refusal, refusal.detail, now)
    if refusal.allowed_instead:
        lines.append(f"Allowed now: {', '.join(spoken(one) for one in refusal.allowed_instead)}")
    return "\n  ".join(lines)


def reasons(answer: Refusal | AllowedOperation, detail: str, now: float | None) -> list[str]:
    """Who blocks since when, what the rule says, and when to come back."""
    lines = []
    if answer.blocked_by is not None:
        lines.append(blocker_sentence(answer.blocked_by, now))
    if answer.because or detail:
        lines.append(printable(answer.because or detail))
    state = (
        f"when it is {answer.vm_state.value}, after what is outstanding"
        if answer.foreseen
        else f"as it is now ({answer.vm_state.value})"
    )
    lines.append(f"Rule {answer.rule} decided, judging the VM {state}.")
    again = allowed_again(answer, now)
    return [*lines, again] if again else lines


def blocker_sentence(blocker: Blocker, now: float | None) -> str:
    """What stands in the way, whose it is, and since when."""
    match blocker.status.value:
        case "queued":
            doing = "is queued"
        case "unknown":
            doing = "has an outcome that is not known yet, in flight"
        case _:
            doing = f"is in flight ({spoken(blocker.phase)})" if blocker.phase else "is in flight"
    sentence = f"{spoken(blocker.operation)} {blocker.request} by {printable(blocker.by)} {doing}"
    sentence += f" since {clock(blocker.since, now)}"
    if blocker.last_sign_of_life is not None:
        sentence += f"; last sign of life {clock(blocker.last_sign_of_life, now)}"
    return sentence + "."


def allowed_again(answer: Refusal | AllowedOperation, now: float | None) -> str | None:
    """When asking again makes sense, as a sentence; None if only something else can change the answer."""
    if answer.allowed_at is not None:
        wait = f" (in {duration(answer.retry_after_s)})" if answer.retry_after_s is not None else ""
        silence = ", unless it shows life before" if answer.blocked_by is not None else ""
        return f"Allowed again: {clock(answer.allowed_at, now)}{wait}{silence}"
    if answer.blocked_by is not None:
        return "Judged anew: as soon as that has ended"
    return None


def explain_failure(failure: Failure, name: str, now: float | None) -> None:
    """Give a failure that carries a refusal the text of one."""
    refusal = as_refusal(failure.document)
    if refusal is not None:
        failure.text = refusal_text(refusal, name, now)


def failure_text(failure: Failure) -> str:
    """Any failure, for people."""
    if failure.text is not None:
        return failure.text
    lines = [click.style("Error: ", fg="red", bold=True) + printable(failure.message)]
    if failure.remedy:
        lines.append(printable(failure.remedy))
    if occurrence := failure.document.get("occurrence"):
        lines.append(f"The server's log tells more under {printable(str(occurrence))}.")
    return "\n  ".join(lines)


def why_text(answer: AllowedOperation, name: str, now: float | None) -> str:
    """What the gate would say to one operation now, and why."""
    what = f"{spoken(answer.operation)} of {name}"
    match answer.disposition:
        case "admitted":
            head = click.style(f"Allowed: {what}", fg="green", bold=True)
        case "redundant":
            head = click.style(f"Redundant: {what} ({answer.reason})", fg="yellow", bold=True)
        case "denied":
            head = click.style(f"Refused: {what} ({answer.reason})", fg="red", bold=True)
    lines = [head, *reasons(answer, answer.detail, now)]
    if answer.supersedes:
        lines.append(f"It would take over from: {', '.join(answer.supersedes)}")
    if answer.cancels:
        lines.append(f"It would cancel: {', '.join(answer.cancels)}")
    return "\n  ".join(lines)
