"""One `[[rule]]` of a policy file, read into rules of the core.

A rule that speaks of `@same` or `@sources` means something else for each operation, and so becomes one rule an
operation. Files, and how one policy extends another, are not here (see `reading`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, TypeVar

from interlock.core.operations import CATALOGUE, Operation
from interlock.core.policy import DEFAULT_GRACE_MS, Before, MeasuredFrom, Rule, Verdict
from interlock.policies.durations import EXPECTED, parse_duration
from interlock.policies.language import CODE, ID, RULE_KEYS, TAGS_MAX, TEXT_LENGTH_MAX
from interlock.policies.places import Place, foreign_letters, is_text, nearest, shown
from interlock.policies.vocabulary import (
    CALLER_ROLES,
    NOTHING,
    OPERATIONS,
    SAME,
    SOURCES,
    TASKS,
    VM_STATES,
    Dictionary,
    listed,
    phases_of,
)

ChoiceT = TypeVar("ChoiceT", bound=StrEnum)

KEYS: Final = tuple(key.name for key in RULE_KEYS)
"""Every key that a rule may have, in the order of the reference."""


class _Table:
    """One `[[rule]]`, with where it stands."""

    def __init__(self, table: Mapping[str, Any], place: Place, line: int, dictionary: Dictionary) -> None:
        self.table = table
        self.place = place
        self.source = f"{place.file}:{line}"
        self.dictionary = dictionary

    def __contains__(self, key: str) -> bool:
        return key in self.table

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        value = self.table[key]
        if not is_text(value, TEXT_LENGTH_MAX):
            raise self.place.at(key).error(f"{key} must be a string of 1 to {TEXT_LENGTH_MAX} characters.")
        if pattern is not None and pattern.fullmatch(value) is None:
            shape = "letters, digits, '.', '_' and '-'" if pattern is ID else "small letters, digits and '_'"
            raise self.place.at(key).error(
                f"{key} {shown(value)} may hold only {shape}, and not so many.", foreign_letters(value)
            )
        return str(value)

    def optional_text(self, key: str, pattern: re.Pattern[str] | None = None) -> str | None:
        return self.text(key, pattern) if key in self.table else None

    def flag(self, key: str) -> bool | None:
        if key not in self.table:
            return None
        value = self.table[key]
        if not isinstance(value, bool):
            raise self.place.at(key).error(f"{key} must be true or false.")
        return value

    def choice(self, key: str, kind: type[ChoiceT]) -> ChoiceT:
        value = self.table[key]
        known = [member.value for member in kind]
        if not isinstance(value, str) or value not in known:
            raise self.place.at(key).error(f"{key} is {shown(value)}.", nearest(shown(value), known))
        return kind(value)

    def duration_ms(self, key: str) -> int | None:
        return read_duration(self.table[key], key, self.place.at(key)) if key in self.table else None


def read_duration(value: Any, key: str, place: Place) -> int:
    """Milliseconds. Raises `PolicyError`."""
    parsed = parse_duration(value) if isinstance(value, str) else None
    if parsed is None:
        raise place.error(f"{key} is {shown(value)}.", f"Expected {EXPECTED}.")
    return parsed


def read_rules(table: Mapping[str, Any], place: Place, line: int, dictionary: Dictionary) -> tuple[Rule, ...]:
    """The rules that one `[[rule]]`, which begins on `line`, stands for, in the order of the catalogue.

    Raises:
        PolicyError: with the place and what was expected.
    """
    source = _Table(table, place, line, dictionary)
    _check_keys(source)
    verdict = source.choice("verdict", Verdict)
    _check_verdict(source, verdict)
    operations = OPERATIONS.expand(table["operations"], "operations", place.at("operations"), dictionary)
    rule_id = source.text("id", ID)
    if not _varies(table):
        return (_rule(source, verdict, rule_id, operations, None),)
    several = len(operations) > 1
    return tuple(
        _rule(
            source, verdict, f"{rule_id}.{operation.value}" if several else rule_id, frozenset({operation}), operation
        )
        for operation in Operation
        if operation in operations
    )


def _check_keys(source: _Table) -> None:
    for key in source.table:
        if key not in KEYS:
            raise source.place.at(key).key.error(f"A rule has no key {shown(key)}.", nearest(key, KEYS))
    for one in RULE_KEYS:
        if one.required and one.name not in source:
            raise source.place.key.error(f"This rule has no {one.name}.", f"Write {one.name} = ….")


def _check_verdict(source: _Table, verdict: Verdict) -> None:
    for one in RULE_KEYS:
        key = one.name
        if key in source and one.verdict not in (None, verdict):
            raise source.place.at(key).key.error(
                f"{key} means something only with verdict = {one.verdict.value!r}; this rule's is {verdict.value!r}.",
                f"Remove {key}, or change the verdict.",
            )
    if verdict is Verdict.AFTER and not source.duration_ms("threshold"):
        place = source.place.at("threshold") if "threshold" in source else source.place.key
        raise place.error(
            'A rule with verdict = "after" needs a threshold of more than nothing.',
            'Write threshold = "3m", or verdict = "preempt" for one that does not wait.',
        )


def _varies(table: Mapping[str, Any]) -> bool:
    groups = {f"@{SAME}", f"@{SOURCES}"}
    lists = (table.get(key) for key in ("vm_state", "task_state", "outstanding", "held"))
    return any(
        isinstance(item, str) and item.removeprefix("!") in groups
        for items in lists
        if isinstance(items, list)
        for item in items
    )


def _rule(
    source: _Table, verdict: Verdict, rule_id: str, operations: frozenset[Operation], of: Operation | None
) -> Rule:
    grace_ms = source.duration_ms("grace")
    in_turn = source.flag("in_turn")
    return Rule(
        id=rule_id,
        operations=operations,
        verdict=verdict,
        vm_states=_vm_states(source, of),
        task_states=_task_states(source, of),
        outstanding=_kinds(source, "outstanding", of),
        held=_kinds(source, "held", of),
        roles=CALLER_ROLES.expand(source.table["roles"], "roles", source.place.at("roles"), source.dictionary)
        if "roles" in source
        else None,
        locked=source.flag("locked"),
        blocked=source.flag("blocked"),
        tags=_tags(source),
        host_reachable=source.flag("host_reachable"),
        launched=source.flag("launched"),
        hard=source.flag("hard"),
        silent_ms_min=source.duration_ms("silent_for"),
        threshold_ms=source.duration_ms("threshold"),
        measured_from=source.choice("measured_from", MeasuredFrom)
        if "measured_from" in source
        else MeasuredFrom.LAST_PROGRESS,
        before=source.choice("before", Before) if "before" in source else Before.DENY,
        grace_ms=DEFAULT_GRACE_MS if grace_ms is None else grace_ms,
        in_turn=True if in_turn is None else in_turn,
        reason=source.optional_text("reason", CODE),
        because=source.optional_text("because"),
        fixed=source.flag("fixed") or False,
        source=source.source,
    )


def _is_any(source: _Table, key: str) -> bool:
    return key not in source or source.table[key] in ("*", ["*"])


def _vm_states(source: _Table, of: Operation | None) -> frozenset[Any] | None:
    if _is_any(source, "vm_state"):
        return None
    groups = None if of is None else {SOURCES: CATALOGUE[of].sources}
    return VM_STATES.expand(
        source.table["vm_state"], "vm_state", source.place.at("vm_state"), source.dictionary, groups
    )


def _task_states(source: _Table, of: Operation | None) -> frozenset[str] | None:
    if _is_any(source, "task_state"):
        return None
    groups = None if of is None else {SAME: phases_of(of)}
    return TASKS.expand(
        source.table["task_state"], "task_state", source.place.at("task_state"), source.dictionary, groups
    )


def _kinds(source: _Table, key: str, of: Operation | None) -> frozenset[Operation] | None:
    if key not in source:
        return None
    raw, place = source.table[key], source.place.at(key)
    items = listed(raw, key, place)
    if NOTHING in items:
        if raw != [NOTHING]:
            raise place.at(items.index(NOTHING)).error(
                f'"none" means that nothing is {key}, and cannot stand beside other kinds.'
            )
        return frozenset()
    groups = None if of is None else {SAME: frozenset({of})}
    return OPERATIONS.expand(raw, key, place, source.dictionary, groups)


def _tags(source: _Table) -> frozenset[str] | None:
    if "tags" not in source:
        return None
    place = source.place.at("tags")
    tags = listed(source.table["tags"], "tags", place)
    message = f"tags must be a list of 1 to {TAGS_MAX} tags, none of them empty."
    if len(tags) > TAGS_MAX:
        raise place.at(TAGS_MAX).error(message)
    for number, tag in enumerate(tags):
        if not is_text(tag, TEXT_LENGTH_MAX):
            raise place.at(number).error(message)
    return frozenset(tags)
