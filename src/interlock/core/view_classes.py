"""Classes of views, and of callers, that the conditions of some rules do not distinguish."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from interlock.core.condition_kinds import Bound, Choice, Members
from interlock.core.conditions import ABOUT, AGES, CALLER, CONDITIONS, Condition, Conditions
from interlock.core.views import PARAMETERS, View


def distinguished_by(
    rules: Sequence[Conditions],
    fields: Iterable[str] = (),
    bounds_ms: Mapping[str, Iterable[int]] = MappingProxyType({}),
) -> Callable[[View], Hashable]:
    """Return a function that gives views the same key if no condition of the rules distinguishes them.

    Views are also distinguished by `fields`, and by the bounds that a field of `bounds_ms` has reached.
    """
    alike = [*fields]
    classed: list[tuple[Callable[[View], Any], Callable[[Any], Hashable]]] = []
    bounds = {field: set(some) for field, some in bounds_ms.items()}
    for condition in CONDITIONS:
        wanted = condition.wanted(rules)
        if condition.reads in bounds:
            bounds[condition.reads].update(wanted)
        elif wanted:
            class_of = condition.kind.class_of(wanted)
            if class_of is None:
                alike.append(condition.reads)
            else:
                classed.append((condition.value, class_of))
    classed += ((attrgetter(field), partial(bisect_right, sorted(some))) for field, some in bounds.items() if some)
    values = attrgetter(*(alike or ["operation"]))
    if not classed:
        return values
    if len(classed) == 1:  # most policies: they look at silence, and at no tags or names
        ((value_of, one_class_of),) = classed
        if not alike:
            return lambda view: one_class_of(value_of(view))
        return lambda view: (values(view), one_class_of(value_of(view)))
    return lambda view: (values(view), *[class_of(value(view)) for value, class_of in classed])


def until_turns_ms(rule: Conditions, view: View) -> Iterator[int]:
    """Yield the time until a condition of a rule on an age gives another answer; negative if it has given it."""
    for condition in AGES:
        wanted = condition.of(rule)
        if wanted is not None:
            assert isinstance(condition.kind, Bound), "an age is a number"
            yield condition.kind.turns_at(wanted) - condition.value(view)


def names_age(rule: Conditions) -> bool:
    """Return whether a rule depends on an age that no progress ends: the instance's, or that of its state."""
    return any(condition.of(rule) is not None for condition in AGES if condition.reads != "silent_ms")


def names_tags(rule: Conditions) -> bool:
    """Return whether a rule depends on the instance's tags."""
    return any(condition.of(rule) is not None for condition in ABOUT["tags"])


def callers(rules: Sequence[Conditions], **known: Any) -> Iterator[dict[str, Any]]:
    """Yield one caller of each class that the rules distinguish, the most ordinary first.

    A caller is its role, its name, and those other fields of submissions, requests and views that some rule tests;
    `known` are not varied.
    """
    values = {
        condition.reads: (known[condition.reads],) if condition.reads in known else _distinct(condition, wanted)
        for condition in CALLER
        if (wanted := condition.wanted(rules)) or condition.reads in {"role", "requested_by", *known}
    }
    for chosen in product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def parameters(rules: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
    """Yield the parameters of one request of each class that the rules distinguish, but of the one that gives none."""
    about = [
        (PARAMETERS[reads], ["", *_given(conditions, rules)])
        for reads, conditions in ABOUT.items()
        if reads in PARAMETERS and any(condition.wanted(rules) for condition in conditions)
    ]
    for chosen in product(*(values for _, values in about)):
        given = {name: value for (name, _), value in zip(about, chosen, strict=True) if value}
        if given:
            yield given


def _given(conditions: Iterable[Condition], rules: Sequence[Conditions]) -> list[Any]:
    """Return the values of one parameter that the conditions distinguish."""
    found: dict[Any, None] = {}
    for condition in conditions:
        assert isinstance(condition.kind, Choice), "a parameter has one value"
        found.update(dict.fromkeys(value for value in condition.kind.values(condition.wanted(rules)) if value))
    return list(found)


def members_of(reads: str, rules: Sequence[Conditions]) -> tuple[Any, ...]:
    """Return the members of a set, a field of views, that the rules distinguish."""
    found: dict[Any, None] = {}
    for condition in ABOUT[reads]:
        assert isinstance(condition.kind, Members), "the field is a set"
        found.update(dict.fromkeys(condition.kind.members(condition.wanted(rules))))
    return tuple(found)


def _distinct(condition: Condition, wanted: Sequence[Any]) -> tuple[Any, ...]:
    """Return one value for each different answer to these conditions: names that occur together are one class."""
    assert isinstance(condition.kind, Choice), "a caller has one value of each"
    tests = [condition.kind.test(each) for each in dict.fromkeys(wanted)]
    found: dict[Hashable, Any] = {}
    for value in condition.kind.values(wanted):
        found.setdefault(tuple([bool(test(value)) for test in tests]), value)
    return tuple(found.values())
