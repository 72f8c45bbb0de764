"""Parsers of the sections of a policy file: `[names]`, `[sets]` and `[[rule]]`.

A rule with `@same` or `@sources` differs for each operation and is expanded to one rule for each, and one with `any` to
one for each of its sets of conditions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, Final, TypeVar, assert_never

from interlock.core.condition_kinds import Kind, Takes
from interlock.core.conditions import CONDITIONS, Condition
from interlock.core.durations import EXPECTED, parse_duration
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import (
    DEFAULT_APPROVE_WITHIN_MS,
    DEFAULT_GRACE_MS,
    SET_MARK,
    Before,
    MeasuredFrom,
    Rule,
    Verdict,
)
from interlock.policies.language.schema import (
    CODE,
    CONDITION_KEYS,
    COUNT_MAX,
    ID,
    ID_LENGTH_MAX,
    NAME,
    NAMES_MAX,
    RULE_KEYS,
    SET_NAME,
    SETS_IN_RULE_MAX,
    SETS_MAX,
    TEXT_LENGTH_MAX,
    TEXTS_MAX,
    THRESHOLD_PLACEHOLDER,
    UNLIMITED,
    WORD_LENGTH_MAX,
)
from interlock.policies.language.source_location import Place, foreign_letters, is_text, nearest, shown
from interlock.policies.language.vocabulary import (
    CONDITION_WORDS,
    HARD_VARIANTS,
    KNOWN_WORDS,
    NOTHING,
    OPERATIONS,
    RESERVED_GROUPS,
    SAME,
    SOURCES,
    TASKS,
    VM_STATES,
    Dictionary,
    UserSet,
    listed,
    phases_of,
    plain,
    split_variants,
)
from interlock.policies.time_windows import error_in

NAMEABLE: Final = tuple(
    dict.fromkeys((*OPERATIONS.words, *HARD_VARIANTS, *(word for word in TASKS.words if word != "none")))
)
"""The words that may have custom names."""
_TAKEN: Final = KNOWN_WORDS | HARD_VARIANTS.keys()


def read_names(
    table: Mapping[str, Any], place: Place, base: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Return the custom names of each word, including inherited ones. Raises `PolicyError`."""
    names = dict(base)
    for key, value in table.items():
        word = plain(key)
        if word not in NAMEABLE:
            raise place.at(key).key.error(
                f"Unknown operation, hard variant or task state {shown(key)}.", nearest(word, NAMEABLE)
            )
        if word != key and word in table:
            raise place.at(key).key.error(f"{word!r} is named twice.", "Write one list of names.")
        names[word] = _names(word, value, place.at(key))
    return names


def _names(word: str, value: Any, place: Place) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not 0 < len(items) <= NAMES_MAX:
        raise place.error(f"{word} must be a name, or a list of 1 to {NAMES_MAX} names.")
    for number, name in enumerate(items):
        here = place if isinstance(value, str) else place.at(number)
        if not isinstance(name, str) or NAME.fullmatch(name) is None:
            raise here.error(
                f"Invalid name {shown(name)}: expected at most {WORD_LENGTH_MAX} letters, digits, '_' and '-'.",
                foreign_letters(name) if isinstance(name, str) else None,
            )
        if plain(name) in _TAKEN and plain(name) != word:
            raise here.error(f"Invalid name {shown(name)} for {word}: it is a word of the language.")
        if name in items[:number]:
            raise here.error(f"{word} has the name {name!r} twice.")
    return tuple(items)


def read_sets(
    table: Mapping[str, Any], place: Place, base: Mapping[str, UserSet], names: Mapping[str, tuple[str, ...]]
) -> dict[str, UserSet]:
    """Return the sets of a policy, including inherited ones. Raises `PolicyError`."""
    if len(table) > SETS_MAX:
        beyond = list(table)[SETS_MAX]
        raise place.at(beyond).key.error(f"A policy may have at most {SETS_MAX} sets.")
    sets = dict(base)
    for name, raw in table.items():
        here = place.at(name)
        if SET_NAME.fullmatch(name) is None:
            raise here.key.error(
                f"Invalid name of a set {shown(name)}: expected small letters, digits and '_'.",
                foreign_letters(name),
            )
        if name in RESERVED_GROUPS:
            raise here.key.error(f"Group @{name} already exists.", "Choose another name for the set.")
        at: dict[str, int] = {}
        for number, member in enumerate(listed(raw, f"The set {name}", here)):
            at.setdefault(member, number)
        sets[name] = UserSet(tuple(at), here, () if raw == "*" else tuple(at.values()))
    words = KNOWN_WORDS | {plain(name) for called in names.values() for name in called}
    for name in table:
        for number, member in enumerate(sets[name].members):
            _check_member(member, sets[name].place_of(number), sets, words)
    return sets


def _check_member(member: str, place: Place, sets: Mapping[str, UserSet], words: frozenset[str]) -> None:
    word = plain(member)
    if member.startswith("!"):
        raise place.error(
            f"Invalid member {shown(member)}: a set cannot exclude words.", "Write !… where the set is used."
        )
    if word.startswith("@"):
        groups = (*sorted(RESERVED_GROUPS), *sets)
        if word[1:] not in groups:
            raise place.error(f"Unknown group {shown(member)[1:-1]}.", nearest(word[1:], groups))
    elif word != "*" and word not in words:
        raise place.error(f"Unknown word {shown(member)}.", nearest(word, sorted(words)))


ChoiceT = TypeVar("ChoiceT", bound=StrEnum)

KEYS: Final = tuple(key.name for key in RULE_KEYS)
"""The keys of a rule, in the order of the reference."""
ANY: Final = "any"


class _Table:
    """One `[[rule]]`, or one with the conditions of one of its sets under `any`, with its position."""

    def __init__(
        self,
        table: Mapping[str, Any],
        place: Place,
        line: int,
        dictionary: Dictionary,
        alternative: tuple[Mapping[str, Any], Place] | None = None,
    ) -> None:
        self.own = table
        self._own_place = place
        self._line = line
        self.dictionary = dictionary
        self._set, self._set_place = alternative or ({}, place)
        self.table = {**table, **self._set}

    @property
    def place(self) -> Place:
        return self._own_place

    @property
    def source(self) -> str:
        return f"{self.place.file}:{self._line}"

    def at(self, key: str) -> Place:
        """Return the position of a key."""
        return (self._set_place if key in self._set else self._own_place).at(key)

    def with_set(self, conditions: Mapping[str, Any], place: Place) -> _Table:
        """Return the rule with the conditions of one set besides its own."""
        return _Table(self.own, self._own_place, self._line, self.dictionary, (conditions, place))

    def __contains__(self, key: str) -> bool:
        return key in self.table

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        value = self.table[key]
        if not is_text(value, TEXT_LENGTH_MAX):
            raise self.at(key).error(f"{key} must be a string of 1 to {TEXT_LENGTH_MAX} characters.")
        if pattern is not None and pattern.fullmatch(value) is None:
            shape = "letters, digits, '.', '_' and '-'" if pattern is ID else "small letters, digits and '_'"
            length_max = ID_LENGTH_MAX if pattern is ID else WORD_LENGTH_MAX
            raise self.at(key).error(
                f"Invalid {key} {shown(value)}: expected at most {length_max} {shape}.", foreign_letters(value)
            )
        return str(value)

    def optional_text(self, key: str, pattern: re.Pattern[str] | None = None) -> str | None:
        return self.text(key, pattern) if key in self.table else None

    def flag(self, key: str) -> bool | None:
        if key not in self.table:
            return None
        value = self.table[key]
        if not isinstance(value, bool):
            raise self.at(key).error(f"{key} must be true or false.")
        return value

    def count(self, key: str) -> int:
        value = self.table[key]
        if type(value) is not int or not 1 <= value <= COUNT_MAX:
            raise self.at(key).error(f"{key} must be a whole number from 1 to {COUNT_MAX}.")
        return value

    def choice(self, key: str, kind: type[ChoiceT]) -> ChoiceT:
        value = self.table[key]
        known = [member.value for member in kind]
        if not isinstance(value, str) or value not in known:
            raise self.at(key).error(f"Invalid {key}: {shown(value)}.", nearest(shown(value), known))
        return kind(value)

    def duration_ms(self, key: str) -> int | None:
        return read_duration(self.table[key], key, self.at(key)) if key in self.table else None


def read_duration(value: Any, key: str, place: Place) -> int:
    """Return milliseconds. Raises `PolicyError`."""
    parsed = parse_duration(value) if isinstance(value, str) else None
    if parsed is None:
        raise place.error(f"Invalid {key}: {shown(value)}.", f"Expected {EXPECTED}.")
    return parsed


def read_rules(table: Mapping[str, Any], place: Place, line: int, dictionary: Dictionary) -> tuple[Rule, ...]:
    """Return the rules of one `[[rule]]` that begins on `line`, in the order of the catalogue.

    Raises:
        PolicyError: with the position and what was expected.
    """
    source = _Table(table, place, line, dictionary)
    _check_keys(source)
    verdict = source.choice("verdict", Verdict)
    _check_verdict(source, verdict)
    rule_id = source.text("id", ID)
    variants = _variants(source)
    if variants:
        return tuple(
            rule for one, operations, mark in variants for rule in _expanded(one, verdict, rule_id, operations, mark)
        )
    operations = OPERATIONS.expand(table["operations"], "operations", place.at("operations"), dictionary)
    alternatives = tuple(_alternatives(source))
    if not alternatives:
        return tuple(_expanded(source, verdict, rule_id, operations, ""))
    return tuple(
        rule
        for number, one in enumerate(alternatives, start=1)
        for rule in _expanded(one, verdict, rule_id, operations, f"{SET_MARK}{number}")
    )


def _variants(source: _Table) -> list[tuple[_Table, frozenset[Operation], str]]:
    """Return the parts of a rule that lists names of one variant of an operation; none with `hard` or `any`."""
    listing = source.table["operations"]
    if not isinstance(listing, list) or "hard" in source or ANY in source:
        return []
    split = split_variants(listing, source.at("operations"), source.dictionary)
    if split is None:
        return []
    both, hard, soft = split
    of_hard, of_soft = (source.with_set({"hard": which}, source.place) for which in (True, False))
    parts = ((source, both, ""), (of_hard, hard, f"{SET_MARK}hard"), (of_soft, soft, f"{SET_MARK}soft"))
    return [part for part in parts if part[1]]


def _alternatives(source: _Table) -> Iterator[_Table]:
    """Yield the rule with each of its sets of conditions; nothing if it has no `any`. Raises `PolicyError`."""
    if ANY not in source:
        return
    sets, place = source.table[ANY], source.at(ANY)
    if not isinstance(sets, list) or not 0 < len(sets) <= SETS_IN_RULE_MAX:
        raise place.error(
            f"{ANY} must be a list of 1 to {SETS_IN_RULE_MAX} sets of conditions.",
            f'Write {ANY} = [{{ tags = ["gpu"] }}, {{ roles = ["member"] }}].',
        )
    for number, conditions in enumerate(sets):
        here = place.at(number)
        if not isinstance(conditions, dict) or not conditions:
            raise here.error(f"A set of {ANY} must be a table with a condition, such as {{ locked = true }}.")
        for key in conditions:
            if key not in CONDITION_KEYS:
                raise here.at(key).key.error(f"Unknown condition {shown(key)}.", nearest(key, CONDITION_KEYS))
            if key in source.own:
                raise here.at(key).key.error(
                    f"{key} is a condition of the rule itself already.", f"Write it in the sets of {ANY} only."
                )
        yield source.with_set(conditions, here)


def _expanded(
    source: _Table, verdict: Verdict, rule_id: str, operations: frozenset[Operation], mark: str
) -> Iterator[Rule]:
    """Yield one rule, or one for each operation if it differs with that; `mark` comes last in their ids."""
    if not _varies(source.table):
        yield _rule(source, verdict, f"{rule_id}{mark}", operations, None)
        return
    for operation in Operation:
        if operation in operations:
            own_id = f"{rule_id}.{operation.value}" if len(operations) > 1 else rule_id
            yield _rule(source, verdict, f"{own_id}{mark}", frozenset({operation}), operation)


def _check_keys(source: _Table) -> None:
    for key in source.table:
        if key not in KEYS:
            raise source.at(key).key.error(f"Unknown key {shown(key)} in a rule.", nearest(key, KEYS))
    for one in RULE_KEYS:
        if one.required and one.name not in source:
            raise source.place.key.error(f"This rule has no {one.name}.", f"Write {one.name} = ….")


def _check_verdict(source: _Table, verdict: Verdict) -> None:
    for one in RULE_KEYS:
        key = one.name
        if key in source and one.verdicts and verdict not in one.verdicts:
            known = " or ".join(repr(each.value) for each in one.verdicts)
            raise source.at(key).key.error(
                f"{key} is valid only with verdict = {known}; this rule's is {verdict.value!r}.",
                f"Remove {key}, or change the verdict.",
            )
    if "approve_within" in source and "unless_approved_by" not in source:
        raise source.place.at("approve_within").key.error(
            "approve_within is valid only with unless_approved_by.", "Remove it, or say who approves the request."
        )
    if verdict is not Verdict.AFTER and THRESHOLD_PLACEHOLDER in (source.optional_text("because") or ""):
        raise source.at("because").error(
            f"because has {THRESHOLD_PLACEHOLDER}, and this rule has no threshold: its verdict is {verdict.value!r}.",
            "Write the reason without it.",
        )
    if verdict is Verdict.AFTER and not source.duration_ms("threshold"):
        place = source.at("threshold") if "threshold" in source else source.place.key
        raise place.error(
            'A rule with verdict = "after" needs a threshold greater than zero.',
            'Write threshold = "3m", or verdict = "preempt" to take over at once.',
        )


def _varies(table: Mapping[str, Any]) -> bool:
    groups = {f"@{SAME}", f"@{SOURCES}"}
    kinds = (condition.key for condition in CONDITIONS if condition.kind.takes is Takes.KINDS)
    lists = (table.get(key) for key in ("vm_state", "task_state", *kinds))
    return any(
        isinstance(item, str) and item.removeprefix("!") in groups
        for items in lists
        if isinstance(items, list)
        for item in items
    )


def _rule(
    source: _Table, verdict: Verdict, rule_id: str, operations: frozenset[Operation], of: Operation | None
) -> Rule:
    grace_ms, approve_within_ms = source.duration_ms("grace"), source.duration_ms("approve_within")
    in_turn = source.flag("in_turn")
    return Rule(
        id=rule_id,
        operations=operations,
        verdict=verdict,
        vm_states=_vm_states(source, of),
        task_states=_task_states(source, of),
        **{condition.field: _condition(source, condition, of) for condition in CONDITIONS},
        threshold_ms=source.duration_ms("threshold"),
        measured_from=source.choice("measured_from", MeasuredFrom)
        if "measured_from" in source
        else MeasuredFrom.LAST_PROGRESS,
        before=source.choice("before", Before) if "before" in source else Before.DENY,
        grace_ms=DEFAULT_GRACE_MS if grace_ms is None else grace_ms,
        served_at_most_ms=_limit(source),
        approve_within_ms=DEFAULT_APPROVE_WITHIN_MS if approve_within_ms is None else approve_within_ms,
        in_turn=True if in_turn is None else in_turn,
        reason=source.optional_text("reason", CODE),
        because=source.optional_text("because"),
        fixed=source.flag("fixed") or False,
        exceptions=_exceptions(source),
        source=source.source,
    )


def _exceptions(source: _Table) -> frozenset[Operation]:
    if "exceptions" not in source:
        return frozenset()
    if not source.flag("fixed"):
        raise source.at("exceptions").key.error(
            "exceptions is valid only in a fixed rule; any other may have exceptions.",
            "Remove it, or write fixed = true.",
        )
    return OPERATIONS.expand(source.table["exceptions"], "exceptions", source.at("exceptions"), source.dictionary)


def _limit(source: _Table) -> int | None:
    key = "served_at_most"
    return read_limit(source.table[key], key, source.at(key)) if key in source else None


def read_limits(table: Mapping[str, Any], place: Place, inherited: Mapping[Operation, int]) -> dict[Operation, int]:
    """Return `[served_at_most]` with what is inherited, in milliseconds by operation. Raises `PolicyError`."""
    limits = dict(inherited)
    for name, value in table.items():
        operation = OPERATIONS.words.get(name.replace("-", "_"))
        if operation is None or CATALOGUE[operation].lane is Lane.RECORD:
            served = [word for word, one in OPERATIONS.words.items() if CATALOGUE[one].lane is not Lane.RECORD]
            raise place.at(name).key.error(
                f"{shown(name)} is not an operation that is served for a time.", nearest(name, served)
            )
        limits[operation] = read_limit(value, name, place.at(name))
    return limits


def read_limit(value: Any, key: str, place: Place) -> int:
    """Return milliseconds, 0 for `unlimited`. Raises `PolicyError`."""
    if value == UNLIMITED:
        return 0
    limit_ms = read_duration(value, key, place)
    if not limit_ms:
        raise place.error(f"Invalid {key}: it must be greater than zero.", f'Write "{UNLIMITED}" for no limit.')
    return limit_ms


def _is_any(source: _Table, key: str) -> bool:
    return key not in source or source.table[key] in ("*", ["*"])


def _vm_states(source: _Table, of: Operation | None) -> frozenset[Any] | None:
    if _is_any(source, "vm_state"):
        return None
    groups = None if of is None else {SOURCES: CATALOGUE[of].sources}
    return VM_STATES.expand(source.table["vm_state"], "vm_state", source.at("vm_state"), source.dictionary, groups)


def _task_states(source: _Table, of: Operation | None) -> frozenset[str] | None:
    if _is_any(source, "task_state"):
        return None
    groups = None if of is None else {SAME: phases_of(of)}
    return TASKS.expand(source.table["task_state"], "task_state", source.at("task_state"), source.dictionary, groups)


def _condition(source: _Table, condition: Condition, of: Operation | None) -> Any:
    """Return the value of a condition; None if the rule does not have it. Raises `PolicyError`."""
    key = condition.key
    if key not in source:
        return None
    match condition.kind.takes:
        case Takes.FLAG:
            return source.flag(key)
        case Takes.TIME:
            return source.duration_ms(key)
        case Takes.COUNT:
            return source.count(key)
        case Takes.KINDS:
            return _kinds(source, key, of)
        case Takes.WORDS:
            return CONDITION_WORDS[key].expand(source.table[key], key, source.at(key), source.dictionary)
        case Takes.TEXTS:
            return _texts(source, key, condition.kind)
        case _:
            assert_never(condition.kind.takes)


def _kinds(source: _Table, key: str, of: Operation | None) -> frozenset[Operation]:
    raw, place = source.table[key], source.at(key)
    items = listed(raw, key, place)
    if NOTHING in items:
        if raw != [NOTHING]:
            raise place.at(items.index(NOTHING)).error(
                f'"none" means that nothing is {key}, and cannot be combined with operations.'
            )
        return frozenset()
    groups = None if of is None else {SAME: frozenset({of})}
    return OPERATIONS.expand(raw, key, place, source.dictionary, groups)


def _texts(source: _Table, key: str, kind: Kind) -> frozenset[str]:
    place = source.at(key)
    texts = listed(source.table[key], key, place)
    message = f"{key} must be a list of 1 to {TEXTS_MAX} {kind.expected}."
    if len(texts) > TEXTS_MAX:
        raise place.at(TEXTS_MAX).error(message)
    for number, text in enumerate(texts):
        if kind.item.fullmatch(text) is None:
            raise place.at(number).error(message)
        if key == "within" and (wrong := error_in(text)) is not None:
            raise place.at(number).error(f"Invalid time window {shown(text)}.", wrong)
    return frozenset(texts)
