"""`[thresholds]`: a policy that extends another gives its `after` rules other thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from msgspec.structs import replace

from interlock.core.policy import Rule, Verdict
from interlock.policies.places import Place, nearest, shown
from interlock.policies.rules import read_duration


def changed(
    rules: tuple[Rule, ...], families: Mapping[str, str], own: AbstractSet[str], table: Mapping[str, Any], place: Place
) -> tuple[Rule, ...]:
    """The rules of the extended policy with their new thresholds; what is said of one goes before what is said of all.

    `families` has the id as written for every rule that stands for one operation of several, `own` the ids that the
    file itself has written.

    Raises:
        PolicyError: no such rule, or one whose threshold cannot be changed here.
    """
    if not table:
        return rules
    known = _Extended(rules, families)
    given: dict[str, int] = {}
    for name, value, here in sorted(_flat(table, place, ()), key=lambda one: one[0] in known.single):
        meant = known.meant(name, own, here)
        threshold_ms = read_duration(value, name, here)
        if not threshold_ms:
            raise here.error(f"{name} needs a threshold of more than nothing.")
        given.update(dict.fromkeys((rule.id for rule in meant), threshold_ms))
    return tuple(replace(rule, threshold_ms=given.get(rule.id, rule.threshold_ms)) for rule in rules)


class _Extended:
    """The rules of what is extended, by the ids that mean one or several of them."""

    def __init__(self, rules: tuple[Rule, ...], families: Mapping[str, str]) -> None:
        self.single = {rule.id: rule for rule in rules}
        self._family: dict[str, list[Rule]] = {}
        for rule in rules:
            if rule.id in families:
                self._family.setdefault(families[rule.id], []).append(rule)

    def meant(self, name: str, own: AbstractSet[str], place: Place) -> tuple[Rule, ...]:
        if name in self.single:
            rules: tuple[Rule, ...] = (self.single[name],)
        elif name in self._family:
            rules = tuple(self._family[name])
        elif name in own:
            raise place.key.error(
                f"{shown(name)} is a rule of this file, and [thresholds] is for what it extends.",
                "Write the threshold in the rule.",
            )
        else:
            choices = (
                *self._family,
                *(rule.id for rule in self.single.values() if rule.verdict is Verdict.AFTER),
            )
            raise place.key.error(f"What this policy extends has no rule {shown(name)}.", nearest(name, choices))
        first = rules[0]
        if first.fixed:
            raise place.key.error(f"The rule {name!r}, at {first.source}, is fixed, and cannot be changed.")
        if first.verdict is not Verdict.AFTER:
            raise place.key.error(
                f"The rule {name!r}, at {first.source}, has no threshold: its verdict is {first.verdict.value!r}.",
                'Only the thresholds of rules with verdict = "after" can be changed.',
            )
        return rules


def _flat(table: Mapping[str, Any], place: Place, before: tuple[str, ...]) -> Iterator[tuple[str, Any, Place]]:
    """The ids with what they are given. One with a dot may be written without quotes, which TOML reads as a table."""
    for key, value in table.items():
        parts = (*before, key)
        if isinstance(value, dict):
            yield from _flat(value, place.at(key), parts)
        else:
            yield ".".join(parts), value, place.at(key)
