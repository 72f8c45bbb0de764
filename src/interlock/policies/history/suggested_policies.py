"""Policy files with proposed thresholds, and their statistics in comments."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from interlock.core.policy import SET_MARK, MeasuredFrom
from interlock.policies.history.threshold_advisor import Aim, OperationStatistics, Proposal, Suggestion

_Statistics = Mapping[tuple[str, str], OperationStatistics]
"""By rule and operation."""

_WIDTH = 100
_SECOND_MS = 1_000
_MINUTE_MS = 60_000
_UNITS_MS = (("h", 3_600_000), ("m", _MINUTE_MS), ("s", _SECOND_MS), ("ms", 1))

_MEASURED = {
    MeasuredFrom.LAST_PROGRESS: "kept silent for",
    MeasuredFrom.TASK_STARTED: "were at it for",
}


def written(milliseconds: int) -> str:
    """Format a duration for a policy file: `45s`, `1m30s`."""
    parts = []
    for unit, length_ms in _UNITS_MS:
        count, milliseconds = divmod(milliseconds, length_ms)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def policy_text(suggestion: Suggestion, extends: str, recorded: str) -> str:
    """Return a policy file that extends `extends` with the proposed thresholds.

    `recorded` is a phrase that describes the history.
    """
    changed = [proposal for proposal in suggestion.proposals if proposal.changed]
    unknown = [proposal for proposal in suggestion.proposals if proposal.unknown]
    name = f"{suggestion.policy[:900]}-suggested"
    parts = [
        *_comment(f"Thresholds for {suggestion.policy}, suggested by {recorded}."),
        "#",
        *_comment(_method(suggestion)),
        "",
        "[policy]",
        f"name = {_string(name)}",
        f"extends = {_string(extends)}",
    ]
    findings = {(rule, finding.operation): finding for finding in suggestion.findings for rule in finding.rules}
    if changed:
        parts += ["", "[thresholds]"]
        for title, proposal in titled(changed, suggestion.proposals):
            parts += ["", *_comment(_why(proposal, findings, suggestion.aim))]
            parts.append(f"{_string(title)} = {_string(written(proposal.proposed_ms))}")
    else:
        parts += ["", *_comment("Nothing speaks for another threshold than today's.")]
    if unknown:
        parts += [
            "",
            *_comment(f"It takes {suggestion.needed} healthy ones of an operation, and too few were recorded of"),
        ]
        parts += _comment(f"{_too_few(unknown, findings)}.", "#   ")
        parts += _comment("What takes over from these has today's threshold, or a longer one.")
    return "\n".join(parts) + "\n"


def titled(changed: Iterable[Proposal], every: Iterable[Proposal]) -> Iterator[tuple[str, Proposal]]:
    """Yield proposals with the id to write them under: one for a whole family if all its thresholds are equal.

    Rules expanded from one `[[rule]]` share its position, and their ids differ in the operation or the number of the
    set of conditions at the end.
    """
    families = {source: list(members) for source, members in groupby(every, key=lambda one: one.source)}
    for source, members in groupby(changed, key=lambda one: one.source):
        mine = list(members)
        family = families[source]
        if len(mine) > 1 and len(mine) == len(family) and len({one.proposed_ms for one in mine}) == 1:
            ids = {one.rule.partition(SET_MARK)[0] for one in mine}
            yield (ids.pop() if len(ids) == 1 else ids.pop().rpartition(".")[0]), mine[0]
        else:
            yield from ((one.rule, one) for one in mine)


def _method(suggestion: Suggestion) -> str:
    aim = suggestion.aim
    return (
        f"Each is the {aim.percentile:g}th percentile of what healthy operations took, as a bound that holds with "
        f"{aim.confidence:g} % confidence, times {aim.factor:g}, rounded up. Progress without news leaves no event, "
        "so a recorded silence is an upper bound of the true one. What `because` says in the extended policy may "
        "still name its former threshold."
    )


def _why(proposal: Proposal, findings: _Statistics, aim: Aim) -> str:
    sentences = []
    for operation in proposal.operations:
        one = findings[proposal.rule, operation]
        if one.percentile_ms is not None and one.bound_ms is not None and one.longest_ms is not None:
            sentences.append(
                f"{operation}: {aim.percentile:g} % of {one.healthy} healthy ones {_MEASURED[one.measured_from]} "
                f"at most {shown(one.percentile_ms)} (bound {shown(one.bound_ms)}, "
                f"longest {shown(one.longest_ms)})."
            )
    sentences.append(
        f"Would have cut short {proposal.cut_short} of {proposal.healthy}; today's {written(proposal.today_ms)}: "
        f"{proposal.cut_short_today}."
    )
    if proposal.unknown:
        sentences.append(f"Too little is known of {', '.join(proposal.unknown)}.")
    return " ".join(sentences)


def _too_few(unknown: Iterable[Proposal], findings: _Statistics) -> str:
    counts = {
        operation: findings[proposal.rule, operation].healthy for proposal in unknown for operation in proposal.unknown
    }
    return ", ".join(f"{operation} {count}" for operation, count in sorted(counts.items()))


def shown(milliseconds: int) -> str:
    """Format a measured duration, to three digits or the second: `780ms`, `23.9s`, `1m47s`."""
    if milliseconds < _SECOND_MS:
        return f"{milliseconds}ms"
    if milliseconds < _MINUTE_MS:
        return f"{milliseconds / _SECOND_MS:.3g}s"
    return written(round(milliseconds / _SECOND_MS) * _SECOND_MS)


def _comment(text: str, mark: str = "# ") -> list[str]:
    return textwrap.wrap(_printable(text), _WIDTH, initial_indent=mark, subsequent_indent=mark, break_long_words=False)


def _printable(text: str) -> str:
    """Remove characters that would end a comment."""
    return "".join(character if character.isprintable() else " " for character in text)


def _string(text: str) -> str:
    """Format a TOML string: as JSON, with DEL escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
