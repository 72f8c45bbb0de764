"""Circumstances under which rules may part: built from what the rules of a cell ask for, the simplest first.

A probe changes a plain submission (a member asks; nothing is locked, blocked, tagged, held or outstanding but the task
itself; the host can be reached, the instance was launched, no time has passed) in as few things as it can. What is
found with probes is not here (see `differences`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import combinations, islice, product
from typing import Any, Final, NamedTuple

import msgspec

from interlock.core.operations import BIT, TASK_OPERATION, Operation
from interlock.core.policy import Rule, View
from interlock.core.states import NO_TASK
from interlock.policies.matrices import short_time
from interlock.policies.vocabulary import ROLES

PAIRED_MAX: Final = 30
"""Up to so many circumstances, two of them are tried at once too. Where there are more, it is left to `meetings`."""

PLAIN_VALUES: Final[dict[str, Any]] = {
    "role": "member",
    "locked": False,
    "blocked": False,
    "host_reachable": True,
    "launched": True,
}
"""What a plain submission has."""
FLAGS: Final = ("locked", "blocked", "host_reachable", "launched")
_MANY: Final = ("outstanding", "held", "tags")
"""Of which a probe may have several."""
_WORDS: Final = {
    ("locked", True): "the instance is locked",
    ("blocked", True): "the instance's own list blocks the operation",
    ("host_reachable", False): "the host is out of reach",
    ("launched", False): "it has never run",
}


class Change(NamedTuple):
    """One thing that is otherwise than in a plain submission."""

    field: str
    """Of `View`; for one of several kinds or tags, the field that holds them."""
    value: Any

    def __str__(self) -> str:
        match self.field:
            case "role":
                return f"{'an' if self.value == 'admin' else 'a'} {self.value} asks"
            case "silent_ms":
                return f"after {short_time(self.value)} of silence"
            case "outstanding":
                return f"{self.value.value} is outstanding"
            case "held":
                return f"{self.value.value} is held"
            case "tags":
                return f"tagged {self.value}"
            case _:
                return _WORDS[self.field, self.value]


Probe = tuple[Change, ...]


def words(probe: Probe) -> str:
    """A probe as people say it; empty for the plain one."""
    return ", ".join(str(change) for change in probe)


def applied(view: View, probe: Probe) -> View:
    """A plain view with the changes of a probe made to it."""
    changes: dict[str, Any] = {}
    for change in probe:
        match change.field:
            case "outstanding" | "held":
                before = changes.get(change.field, getattr(view, change.field))
                changes[change.field] = before | BIT[change.value]
            case "tags":
                changes["tags"] = tuple(sorted({*changes.get("tags", view.tags), change.value}))
            case "silent_ms":
                changes["silent_ms"] = changes["running_ms"] = change.value
            case field:
                changes[field] = change.value
    return msgspec.structs.replace(view, **changes) if changes else view


def probes(rules: Sequence[Rule], task_state: str) -> list[Probe]:
    """What to try where these rules are asked: one thing at a time, all that a rule wants, and two of those.

    The plain probe is the first, and fewer changes come before more. Kinds and tags that no rule tells apart are
    stood for by one of them.
    """
    served = None if task_state == NO_TASK else TASK_OPERATION[task_state]
    classes = {field: _classes(rules, field, served) for field in _MANY}
    parts: dict[Probe, None] = dict.fromkeys(_single(rules, classes))
    for rule in rules:
        parts.update(dict.fromkeys(_wanted(rule, classes, served)))
    parts.pop((), None)
    found: dict[Probe, None] = {(): None, **dict.fromkeys(sorted(parts, key=len))}
    if len(parts) <= PAIRED_MAX:
        for one, other in combinations(parts, 2):
            merged = _merged(one, other)
            if merged is not None:
                found.setdefault(merged)
    return sorted(found, key=len)


def simplest(rules: Sequence[Rule], task_state: str, count: int) -> list[Probe]:
    """The plain probe, and the fewest changes with which each rule holds; not more than so many."""
    served = None if task_state == NO_TASK else TASK_OPERATION[task_state]
    classes = {field: _classes(rules, field, served) for field in _MANY}
    return [(), *islice((probe for rule in rules for probe in islice(_wanted(rule, classes, served), 1)), count)]


def _single(rules: Sequence[Rule], classes: dict[str, list[Any]]) -> Iterator[Probe]:
    if any(rule.roles is not None for rule in rules):
        yield from ((Change("role", role),) for role in reversed(ROLES) if role != PLAIN_VALUES["role"])
    for field in FLAGS:
        if any(getattr(rule, field) is not None for rule in rules):
            yield (Change(field, not PLAIN_VALUES[field]),)
    yield from ((Change("silent_ms", rule.silent_ms_min),) for rule in rules if rule.silent_ms_min)
    for field, members in classes.items():
        yield from ((Change(field, member),) for member in members)


def _wanted(rule: Rule, classes: dict[str, list[Any]], served: Operation | None) -> Iterator[Probe]:
    """The fewest changes with which the rule holds; none if it cannot hold in the cell."""
    changes: list[Change] = []
    if rule.roles is not None and PLAIN_VALUES["role"] not in rule.roles:
        changes.append(Change("role", next(role for role in reversed(ROLES) if role in rule.roles)))
    for field in FLAGS:
        wanted = getattr(rule, field)
        if wanted is not None and wanted is not PLAIN_VALUES[field]:
            changes.append(Change(field, wanted))
    if rule.silent_ms_min:
        changes.append(Change("silent_ms", rule.silent_ms_min))
    choices = []
    for field in _MANY:
        asked = getattr(rule, field)
        if not asked or (field == "outstanding" and served in asked):
            continue
        there = asked.intersection(classes[field])
        choices.append([Change(field, member) for member in sorted(there, key=_order)])
    for chosen in product(*choices):
        yield ordered((*changes, *chosen))


def _classes(rules: Sequence[Rule], field: str, served: Operation | None) -> list[Any]:
    """One member for each group that no rule tells apart."""
    asked = [each for rule in rules if (each := getattr(rule, field))]
    named: dict[Any, list[int]] = {}
    for number, each in enumerate(asked):
        for member in each:
            named.setdefault(member, []).append(number)
    first: dict[Hashable, Any] = {}
    for member in sorted(named, key=_order):
        if field != "outstanding" or member is not served:
            first.setdefault(tuple(named[member]), member)
    if field != "tags" and not asked and any(getattr(rule, field) is not None for rule in rules):
        return [Operation.STOP if served is not Operation.STOP else Operation.START]
    return list(first.values())


def _order(member: Any) -> Any:
    return tuple(Operation).index(member) if isinstance(member, Operation) else str(member)


def _merged(one: Probe, other: Probe) -> Probe | None:
    """Both at once; None where they contradict each other."""
    values: dict[str, Any] = {}
    for change in (*one, *other):
        if change.field not in _MANY and values.setdefault(change.field, change.value) != change.value:
            if change.field != "silent_ms":
                return None
            values["silent_ms"] = max(values["silent_ms"], change.value)
    many = {change for change in (*one, *other) if change.field in _MANY}
    return ordered((*(Change(field, value) for field, value in values.items()), *many))


def ordered(changes: Iterable[Change]) -> Probe:
    """The one way to write these changes."""
    return tuple(sorted(changes, key=lambda change: (change.field, str(change.value))))
