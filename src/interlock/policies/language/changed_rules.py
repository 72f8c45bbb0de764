"""The sections `[thresholds]` and `[exceptions]`: changes of rules of the extended policy, by their ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Final, NamedTuple

from msgspec.structs import replace

from interlock.core.operations import Operation
from interlock.core.policy import Rule, Verdict
from interlock.policies.language.section_parser import read_duration
from interlock.policies.language.source_location import Place, nearest, shown
from interlock.policies.language.vocabulary import OPERATIONS, Dictionary

EXCEPTIONS: Final = "exceptions"
TIMES_OF_RULES: Final = {"threshold": "threshold_ms", "silent_for": "silent_ms_min"}
"""The times of a rule that `[thresholds]` changes, with their fields."""


def changed(
    rules: tuple[Rule, ...], families: Mapping[str, str], own: AbstractSet[str], table: Mapping[str, Any], place: Place
) -> tuple[Rule, ...]:
    """Return the rules of the extended policy with their new times; single ids take precedence.

    `families` maps the ids of expanded rules to the id as written; `own` has the ids of the file itself.

    Raises:
        PolicyError: rule not found, or it does not have that time, or must not be changed.
    """
    if not table:
        return rules
    known = _Extended(rules, families)
    given: dict[str, dict[str, int]] = {}
    for one in sorted(_flat(table, place, (), known), key=lambda one: one.name in known.single):
        meant = known.meant(one, own)
        title = one.name if one.key == "threshold" else f"{one.key} of {one.name}"
        time_ms = read_duration(one.value, title, one.place)
        if not time_ms:
            raise one.place.error(f"Invalid {one.key} of {one.name}: it must be greater than zero.")
        for rule in meant:
            given.setdefault(rule.id, {})[TIMES_OF_RULES[one.key]] = time_ms
    return tuple(replace(rule, **given[rule.id]) if rule.id in given else rule for rule in rules)


def excepted(
    rules: tuple[Rule, ...],
    families: Mapping[str, str],
    own: AbstractSet[str],
    table: Mapping[str, Any],
    place: Place,
    dictionary: Dictionary,
) -> tuple[Rule, ...]:
    """Return the rules of the extended policy without the operations that `[exceptions]` takes out of them.

    A rule without operations is left out. `families` and `own` are as for `changed`.

    Raises:
        PolicyError: rule or operation not found, or the rule is fixed and does not allow the exception.
    """
    known = _Extended(rules, families)
    left = {rule.id: rule.operations for rule in rules}
    for name, raw, here in _exceptions(table, place, ()):
        operations = OPERATIONS.expand(raw, name, here, dictionary)
        for rule in known.named(name, own, here, EXCEPTIONS):
            bound = operations & rule.operations - rule.exceptions if rule.fixed else frozenset()
            if bound:
                names = ", ".join(operation.value for operation in Operation if operation in bound)
                raise here.error(
                    f"The rule {name!r}, at {rule.source}, is fixed for {names}.",
                    "Its key `exceptions` lists the operations for which it is not."
                    if rule.exceptions
                    else "It allows no exceptions.",
                )
            left[rule.id] -= operations
    return tuple(replace(rule, operations=left[rule.id]) for rule in rules if left[rule.id])


def _exceptions(table: Mapping[str, Any], place: Place, before: tuple[str, ...]) -> Iterator[tuple[str, Any, Place]]:
    """Yield ids, operations and their positions. An unquoted id with a dot is read by TOML as a table."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _exceptions(value, place.at(key), (*before, key))
        else:
            yield ".".join((*before, key)), value, place.at(key)


class _NewTime(NamedTuple):
    """An entry of `[thresholds]`."""

    name: str
    """The id of a rule, or of a family."""
    key: str
    """One of `TIMES_OF_RULES`."""
    value: Any
    place: Place


class _Extended:
    """The rules of the extended policy, by id and by the id of a family of expanded rules."""

    def __init__(self, rules: tuple[Rule, ...], families: Mapping[str, str]) -> None:
        self.single = {rule.id: rule for rule in rules}
        self._family: dict[str, list[Rule]] = {}
        for rule in rules:
            if rule.id in families:
                self._family.setdefault(families[rule.id], []).append(rule)

    def named(self, name: str, own: AbstractSet[str], place: Place, section: str) -> tuple[Rule, ...]:
        """Return the rules of an id. Raises `PolicyError`."""
        if name in self.single:
            return (self.single[name],)
        if name in self._family:
            return tuple(self._family[name])
        if name in own:
            raise place.key.error(
                f"{shown(name)} is a rule of this file; [{section}] changes rules of the extended policy.",
                "Change it in the rule itself.",
            )
        every = self.single.values()
        choices = (*self._family, *(one.id for one in every if section == EXCEPTIONS or one.verdict is Verdict.AFTER))
        raise place.key.error(f"Rule {shown(name)} not found in the extended policy.", nearest(name, choices))

    def meant(self, new: _NewTime, own: AbstractSet[str]) -> tuple[Rule, ...]:
        name, place = new.name, new.place
        rules = self.named(name, own, place, "thresholds")
        first = rules[0]
        if first.fixed:
            raise place.key.error(f"The rule {name!r}, at {first.source}, is fixed and cannot be changed.")
        if new.key == "threshold" and first.verdict is not Verdict.AFTER:
            raise place.key.error(
                f"The rule {name!r}, at {first.source}, has no threshold: its verdict is {first.verdict.value!r}.",
                f'Write {name} = {{ silent_for = "15s" }}.'
                if first.silent_ms_min is not None
                else 'Only the thresholds of rules with verdict = "after" can be changed.',
            )
        if new.key == "silent_for" and any(rule.silent_ms_min is None for rule in rules):
            raise place.key.error(
                f"The rule {name!r}, at {first.source}, has no silent_for.",
                "[thresholds] changes times, and adds none.",
            )
        return rules


def _flat(table: Mapping[str, Any], place: Place, before: tuple[str, ...], known: _Extended) -> Iterator[_NewTime]:
    """Yield the new times. An unquoted id with a dot is read by TOML as a table."""
    for key, value in table.items():
        name, here = ".".join((*before, key)), place.at(key)
        if isinstance(value, dict):
            yield from _flat(value, here, (*before, key), known)
        elif before and key in TIMES_OF_RULES and name not in known.single:
            yield _NewTime(".".join(before), key, value, here)
        else:
            yield _NewTime(name, "threshold", value, here)
