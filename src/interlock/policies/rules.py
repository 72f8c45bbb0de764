"""One `[[rule]]` of a policy file, read into rules of the core.

A rule that speaks of `@same` or `@sources` means something else for each operation, and so becomes one rule an
operation. Files, and how one policy extends another, are not here (see `reading`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final, TypeVar

from interlock.core.operations import CATALOGUE, Operation
from interlock.core.policy import DEFAULT_GRACE_MS, Before, MeasuredFrom, Rule, Verdict
from interlock.policies.durations import EXPECTED, parse_duration
from interlock.policies.vocabulary import (
    CALLER_ROLES,
    OPERATIONS,
    SAME,
    SOURCES,
    TASKS,
    VM_STATES,
    Place,
    UserSets,
    listed,
    nearest,
    phases_of,
)

ChoiceT = TypeVar("ChoiceT", bound=StrEnum)

TEXT_LENGTH_MAX: Final = 1_000
TAGS_MAX: Final = 64
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_CODE: Final = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)

KEYS: Final = (
    "id",
    "operations",
    "vm_state",
    "task_state",
    "outstanding",
    "roles",
    "locked",
    "blocked",
    "tags",
    "host_reachable",
    "hard",
    "silent_for",
    "verdict",
    "threshold",
    "measured_from",
    "before",
    "grace",
    "in_turn",
    "reason",
    "because",
    "fixed",
)
"""Every key that a rule may have, in the order of the reference."""
_ONLY_WITH: Final = {
    "threshold": Verdict.AFTER,
    "measured_from": Verdict.AFTER,
    "before": Verdict.AFTER,
    "grace": Verdict.PREEMPT,
    "in_turn": Verdict.ADMIT,
}
"""Keys that mean something for one verdict only."""


class _Table:
    """One `[[rule]]`, with where its keys stand."""

    def __init__(self, table: Mapping[str, Any], place_of: Callable[[str | None], Place]) -> None:
        self.table = table
        self.place_of = place_of

    def __contains__(self, key: str) -> bool:
        return key in self.table

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        value = self.table[key]
        if not isinstance(value, str) or not 0 < len(value) <= TEXT_LENGTH_MAX:
            raise self.place_of(key).error(f"{key} must be a string of 1 to {TEXT_LENGTH_MAX} characters.")
        if pattern is not None and pattern.fullmatch(value) is None:
            shape = "letters, digits, '.', '_' and '-'" if pattern is _ID else "small letters, digits and '_'"
            raise self.place_of(key).error(f"{key} {value!r} may hold only {shape}, and not so many.")
        return value

    def optional_text(self, key: str, pattern: re.Pattern[str] | None = None) -> str | None:
        return self.text(key, pattern) if key in self.table else None

    def flag(self, key: str) -> bool | None:
        if key not in self.table:
            return None
        value = self.table[key]
        if not isinstance(value, bool):
            raise self.place_of(key).error(f"{key} must be true or false.")
        return value

    def choice(self, key: str, kind: type[ChoiceT]) -> ChoiceT:
        value = self.table[key]
        known = [member.value for member in kind]
        if not isinstance(value, str) or value not in known:
            raise self.place_of(key).error(f"{key} is {value!r}.", nearest(str(value), known))
        return kind(value)

    def duration_ms(self, key: str) -> int | None:
        if key not in self.table:
            return None
        value = self.table[key]
        parsed = parse_duration(value) if isinstance(value, str) else None
        if parsed is None:
            raise self.place_of(key).error(f"{key} is {value!r}.", f"Expected {EXPECTED}.")
        return parsed


def read_rules(table: Mapping[str, Any], place_of: Callable[[str | None], Place], sets: UserSets) -> tuple[Rule, ...]:
    """The rules that one `[[rule]]` stands for, in the order of the catalogue.

    `place_of` says where a key stands, and where the rule does for None.

    Raises:
        PolicyError: with the place and what was expected.
    """
    source = _Table(table, place_of)
    _check_keys(source)
    verdict = source.choice("verdict", Verdict)
    _check_verdict(source, verdict)
    operations = OPERATIONS.expand(table["operations"], "operations", place_of("operations"), sets)
    if not _varies(table):
        return (_rule(source, verdict, source.text("id", _ID), operations, sets, None),)
    several = len(operations) > 1
    return tuple(
        _rule(
            source,
            verdict,
            f"{source.text('id', _ID)}.{operation.value}" if several else source.text("id", _ID),
            frozenset({operation}),
            sets,
            operation,
        )
        for operation in Operation
        if operation in operations
    )


def _check_keys(source: _Table) -> None:
    for key in source.table:
        if key not in KEYS:
            raise source.place_of(key).error(f"A rule has no key {key!r}.", nearest(key, KEYS))
    for key in ("id", "operations", "verdict"):
        if key not in source:
            raise source.place_of(None).error(f"This rule has no {key}.", f"Write {key} = ….")


def _check_verdict(source: _Table, verdict: Verdict) -> None:
    for key, only in _ONLY_WITH.items():
        if key in source and verdict is not only:
            raise source.place_of(key).error(
                f"{key} means something only with verdict = {only.value!r}; this rule's is {verdict.value!r}.",
                f"Remove {key}, or change the verdict.",
            )
    if verdict is Verdict.AFTER and not source.duration_ms("threshold"):
        place = source.place_of("threshold" if "threshold" in source else None)
        raise place.error(
            'A rule with verdict = "after" needs a threshold of more than nothing.',
            'Write threshold = "3m", or verdict = "preempt" for one that does not wait.',
        )


def _varies(table: Mapping[str, Any]) -> bool:
    groups = {f"@{SAME}", f"@{SOURCES}"}
    lists = (table.get(key) for key in ("vm_state", "task_state", "outstanding"))
    return any(
        isinstance(item, str) and item.removeprefix("!") in groups
        for items in lists
        if isinstance(items, list)
        for item in items
    )


def _rule(
    source: _Table,
    verdict: Verdict,
    rule_id: str,
    operations: frozenset[Operation],
    sets: UserSets,
    of: Operation | None,
) -> Rule:
    grace_ms = source.duration_ms("grace")
    in_turn = source.flag("in_turn")
    return Rule(
        id=rule_id,
        operations=operations,
        verdict=verdict,
        vm_states=_vm_states(source, sets, of),
        task_states=_task_states(source, sets, of),
        outstanding=_outstanding(source, sets, of),
        roles=CALLER_ROLES.expand(source.table["roles"], "roles", source.place_of("roles"), sets)
        if "roles" in source
        else None,
        locked=source.flag("locked"),
        blocked=source.flag("blocked"),
        tags=_tags(source),
        host_reachable=source.flag("host_reachable"),
        hard=source.flag("hard"),
        silent_ms_min=source.duration_ms("silent_for"),
        threshold_ms=source.duration_ms("threshold"),
        measured_from=source.choice("measured_from", MeasuredFrom)
        if "measured_from" in source
        else MeasuredFrom.LAST_PROGRESS,
        before=source.choice("before", Before) if "before" in source else Before.DENY,
        grace_ms=DEFAULT_GRACE_MS if grace_ms is None else grace_ms,
        in_turn=True if in_turn is None else in_turn,
        reason=source.optional_text("reason", _CODE),
        because=source.optional_text("because"),
        fixed=source.flag("fixed") or False,
        source=str(source.place_of(None)),
    )


def _is_any(source: _Table, key: str) -> bool:
    return key not in source or source.table[key] in ("*", ["*"])


def _vm_states(source: _Table, sets: UserSets, of: Operation | None) -> frozenset[Any] | None:
    if _is_any(source, "vm_state"):
        return None
    words = VM_STATES if of is None else VM_STATES.with_group(SOURCES, CATALOGUE[of].sources)
    return words.expand(source.table["vm_state"], "vm_state", source.place_of("vm_state"), sets)


def _task_states(source: _Table, sets: UserSets, of: Operation | None) -> frozenset[str] | None:
    if _is_any(source, "task_state"):
        return None
    words = TASKS if of is None else TASKS.with_group(SAME, phases_of(of))
    return words.expand(source.table["task_state"], "task_state", source.place_of("task_state"), sets)


def _outstanding(source: _Table, sets: UserSets, of: Operation | None) -> frozenset[Operation] | None:
    if "outstanding" not in source:
        return None
    raw, place = source.table["outstanding"], source.place_of("outstanding")
    if "none" in listed(raw, "outstanding", place):
        if raw != ["none"]:
            raise place.error('"none" means that nothing is outstanding, and cannot stand beside other kinds.')
        return frozenset()
    words = OPERATIONS if of is None else OPERATIONS.with_group(SAME, frozenset({of}))
    return words.expand(raw, "outstanding", place, sets)


def _tags(source: _Table) -> frozenset[str] | None:
    if "tags" not in source:
        return None
    place = source.place_of("tags")
    tags = listed(source.table["tags"], "tags", place)
    if len(tags) > TAGS_MAX or not all(0 < len(tag) <= TEXT_LENGTH_MAX for tag in tags):
        raise place.error(f"tags must be a list of 1 to {TAGS_MAX} tags, none of them empty.")
    return frozenset(tags)
