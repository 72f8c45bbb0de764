"""The kinds of conditions: the test of a view's value, the values that an analysis distinguishes, and their words."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable
from enum import Enum
from itertools import combinations
from operator import not_
from typing import Any, NamedTuple

from interlock.core.durations import format_seconds
from interlock.core.operations import BIT, Operation

Test = Callable[[Any], object]
"""Whether the value of a view fulfils a condition: the result is true or false, not always a bool."""


class Takes(Enum):
    """The form of a condition's value in a policy file."""

    FLAG = "true, false"
    TIME = "time"
    COUNT = "number"
    KINDS = "operations or none"
    WORDS = "words"
    """A list of words that are known."""
    TEXTS = "texts"
    """A list of words that are not known before, each of which matches `Kind.item`."""


class Kind:
    """What is common to conditions on values of one type."""

    takes: Takes
    item: re.Pattern[str]
    """For `Takes.TEXTS`: the pattern of each item."""
    expected: str
    """For `Takes.TEXTS`: what the items are, for an error."""

    def test(self, wanted: Any) -> Test:
        """Return the test of a view's value."""
        raise NotImplementedError

    def class_of(self, wanted: Iterable[Any]) -> Callable[[Any], Hashable] | None:  # noqa: ARG002 (see the subclasses)
        """Return a function that maps values to equal ones if these conditions do not distinguish them.

        None: the value itself.
        """
        return None

    def wanted(self, wanted: Any) -> str:
        """Describe the condition's value."""
        raise NotImplementedError

    def found(self, value: Any) -> str:
        """Describe the view's value."""
        raise NotImplementedError


class Choice(Kind):
    """The view has one value, of which a condition accepts some."""

    def values(self, wanted: Iterable[Any]) -> tuple[Any, ...]:
        """Return one value of each class that these conditions do not distinguish, the most ordinary ones first."""
        raise NotImplementedError


class Parts(NamedTuple):
    """What a condition wants of a set: one of `some`, all of `every`, none of `none`; no member if these are empty."""

    some: frozenset[Any] = frozenset()
    every: frozenset[Any] = frozenset()
    none: frozenset[Any] = frozenset()


class Members(Kind):
    """The view has a set, and a condition wants some members of it, or not."""

    def parts(self, wanted: Any) -> Parts:
        """Return what a condition wants of the set."""
        return Parts(some=wanted)

    def members(self, wanted: Iterable[Any]) -> tuple[Any, ...]:
        """Return the members that these conditions distinguish."""
        raise NotImplementedError

    def with_members(self, value: Any, members: Iterable[Any]) -> Any:
        """Return the view's value with some members more."""
        raise NotImplementedError


class Flag(Choice):
    """True or false."""

    takes = Takes.FLAG

    def __init__(self, *, usual: bool) -> None:
        self._usual = usual

    def test(self, wanted: Any) -> Test:
        return bool if wanted else not_

    def values(self, wanted: Iterable[Any]) -> tuple[Any, ...]:  # noqa: ARG002 (both are always possible)
        return (self._usual, not self._usual)

    def wanted(self, wanted: Any) -> str:
        return str(wanted).lower()

    def found(self, value: Any) -> str:
        return self.wanted(value)


class Word(Choice):
    """One of several known words, of which a condition accepts some."""

    takes = Takes.WORDS

    def __init__(self, words: tuple[str, ...], *, usual: str) -> None:
        self.words = words
        self._usual = usual

    def test(self, wanted: Any) -> Test:
        accepted: frozenset[str] = wanted
        return accepted.__contains__

    def values(self, wanted: Iterable[Any]) -> tuple[Any, ...]:  # noqa: ARG002 (every word is always possible)
        return (self._usual, *(word for word in reversed(self.words) if word != self._usual))

    def wanted(self, wanted: Any) -> str:
        return one_of(wanted)

    def found(self, value: Any) -> str:
        return str(value)


class Name(Choice):
    """A name, of which a condition accepts some, or all that begin in some way: `alice`, `ci-*`, `*`.

    A name in a condition stands for itself; one that ends with `*` for all that begin so and match no longer one. No
    condition distinguishes more, so that the names in the conditions, and one that is in none, are all that there is.
    """

    takes = Takes.TEXTS
    item = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]{0,62}\*?|\*)")
    expected = "names: letters, digits, '.', '_' and '-', and '*' only at the end"

    def __init__(self, unnamed: str = "another name") -> None:
        """`unnamed` describes the empty name, which stands for all that no condition names."""
        self._unnamed = unnamed

    def test(self, wanted: Any) -> Test:
        named: frozenset[str] = wanted
        beginnings = tuple(name[:-1] for name in named if name.endswith("*"))
        if not beginnings:
            return named.__contains__
        return lambda name: name in named or name.startswith(beginnings)

    def values(self, wanted: Iterable[Any]) -> tuple[Any, ...]:
        return ("", *sorted(frozenset[str]().union(*wanted)))

    def class_of(self, wanted: Iterable[Any]) -> Callable[[Any], Hashable] | None:
        named = frozenset[str]().union(*wanted)
        beginnings = sorted((name[:-1] for name in named if name.endswith("*")), key=len, reverse=True)

        def class_of(name: str) -> str:
            if name in named:
                return name
            return next((f"{beginning}*" for beginning in beginnings if name.startswith(beginning)), "")

        return class_of

    def wanted(self, wanted: Any) -> str:
        return one_of(wanted)

    def found(self, value: Any) -> str:
        return str(value) or self._unnamed


class Bound(Choice):
    """A number, or a time in milliseconds, on which a condition sets a bound. 0 may mean that it is not given."""

    def __init__(self, takes: Takes = Takes.TIME, *, given: bool = True) -> None:
        """With `given` false, 0 means that no value is given, and no condition holds for it."""
        self.takes = takes
        self._zero_counts = given

    def turns_at(self, wanted: int) -> int:
        """Return the least value to which the condition gives another answer than to less."""
        raise NotImplementedError

    def values(self, wanted: Iterable[Any]) -> tuple[Any, ...]:
        least = () if self._zero_counts else (1,)
        return tuple(sorted({0, *least, *map(self.turns_at, wanted)}))

    def class_of(self, wanted: Iterable[Any]) -> Callable[[Any], Hashable] | None:
        bounds = self.values(wanted)
        return lambda value: bisect_right(bounds, value)

    def wanted(self, wanted: Any) -> str:
        return self.found(wanted)

    def found(self, value: Any) -> str:
        if not value and not self._zero_counts:
            return "none"
        return format_seconds(value) if self.takes is Takes.TIME else str(value)


class AtLeast(Bound):
    """A value that a condition bounds from below."""

    def test(self, wanted: Any) -> Test:
        least: int = wanted
        return least.__le__

    def turns_at(self, wanted: int) -> int:
        return wanted

    def wanted(self, wanted: Any) -> str:
        return f"at least {self.found(wanted)}"


class AtMost(Bound):
    """A value that a condition bounds from above."""

    def test(self, wanted: Any) -> Test:
        most: int = wanted
        if self._zero_counts:
            return most.__ge__
        return lambda value: 0 < value <= most

    def turns_at(self, wanted: int) -> int:
        return wanted + 1

    def wanted(self, wanted: Any) -> str:
        return f"at most {self.found(wanted)}"


class Belongs(Choice):
    """What a caller belongs to, as a tuple of texts: a condition accepts any of some, and none of those with `!`.

    What conditions distinguish is which of their texts a value has, so that every combination of these is a value; of
    more than a few texts, none of them, each alone, and all together.
    """

    takes = Takes.TEXTS

    def __init__(self, item: str, expected: str) -> None:
        self.item = re.compile(f"!?(?:{item})")
        self.expected = f"{expected}, each with or without '!' before it"

    def test(self, wanted: Any) -> Test:
        some, none = _split(wanted)
        if not none:
            return lambda texts: not some.isdisjoint(texts)
        return lambda texts: none.isdisjoint(texts) and (not some or not some.isdisjoint(texts))

    def values(self, wanted: Iterable[Any]) -> tuple[Any, ...]:
        named = sorted(_texts(wanted))
        sizes = range(len(named) + 1) if len(named) <= _COMBINED_MAX else (0, 1, len(named))
        return tuple(chosen for size in sizes for chosen in combinations(named, size))

    def class_of(self, wanted: Iterable[Any]) -> Callable[[Any], Hashable] | None:
        return _texts(wanted).intersection

    def wanted(self, wanted: Any) -> str:
        return _some_and_none(wanted)

    def found(self, value: Any) -> str:
        return ", ".join(value) or "none"


class Unless(Belongs):
    """What an approver belongs to, as a tuple of texts: a condition holds while it has none of some."""

    def __init__(self, item: str, expected: str) -> None:
        super().__init__(item, expected)
        self.item, self.expected = re.compile(item), expected

    def test(self, wanted: Any) -> Test:
        approvers: frozenset[str] = wanted
        return approvers.isdisjoint

    def found(self, value: Any) -> str:
        return ", ".join(value) or "no approval"


_COMBINED_MAX = 4


def _some_and_none(wanted: Iterable[str]) -> str:
    some, none = _split(wanted)
    return " and ".join([*([one_of(some)] if some else []), *(f"not {text}" for text in sorted(none))])


def _split(wanted: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the texts without `!`, and those that have it, without it."""
    none = frozenset(text[1:] for text in wanted if text.startswith("!"))
    if not none and isinstance(wanted, frozenset):
        return wanted, none
    return frozenset(text for text in wanted if not text.startswith("!")), none


def _texts(wanted: Iterable[Iterable[str]]) -> frozenset[str]:
    return frozenset(text.removeprefix("!") for texts in wanted for text in texts)


class AnyOperation(Members):
    """Operations, as a bit mask in the view."""

    takes = Takes.KINDS

    def test(self, wanted: Any) -> Test:
        mask = sum(BIT[operation] for operation in wanted)
        return mask.__and__ if mask else not_

    def members(self, wanted: Iterable[Any]) -> tuple[Any, ...]:  # noqa: ARG002 (every operation is always possible)
        return tuple(Operation)

    def with_members(self, value: Any, members: Iterable[Any]) -> Any:
        for member in members:
            value |= BIT[member]
        return value

    def wanted(self, wanted: Any) -> str:
        return one_of(operation.value for operation in wanted) if wanted else "nothing"

    def found(self, value: Any) -> str:
        return ", ".join(operation.value for operation in Operation if value & BIT[operation]) or "nothing"


class AnyText(Members):
    """Texts, as a tuple in the view: a condition wants any of some, and none of those with `!`."""

    takes = Takes.TEXTS

    def __init__(self, item: str, expected: str) -> None:
        self.item = re.compile(f"!?(?:{item})")
        self.expected = f"{expected}, each with or without '!' before it"

    def test(self, wanted: Any) -> Test:
        some, none = _split(wanted)
        if not none:
            return lambda texts: not some.isdisjoint(texts)
        if not some:
            return none.isdisjoint
        return lambda texts: none.isdisjoint(texts) and not some.isdisjoint(texts)

    def parts(self, wanted: Any) -> Parts:
        some, none = _split(wanted)
        return Parts(some=some, none=none)

    def members(self, wanted: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(sorted(_texts(wanted)))

    def class_of(self, wanted: Iterable[Any]) -> Callable[[Any], Hashable] | None:
        return _texts(wanted).intersection

    def with_members(self, value: Any, members: Iterable[Any]) -> Any:
        return tuple(sorted({*value, *members}))

    def wanted(self, wanted: Any) -> str:
        return _some_and_none(wanted)

    def found(self, value: Any) -> str:
        return ", ".join(value) or "none"


class AllTexts(AnyText):
    """As `AnyText`, but a condition wants all of the texts."""

    def __init__(self, item: str, expected: str) -> None:
        super().__init__(item, expected)
        self.item, self.expected = re.compile(item), expected

    def parts(self, wanted: Any) -> Parts:
        return Parts(every=wanted)

    def test(self, wanted: Any) -> Test:
        named: frozenset[str] = wanted
        return named.issubset

    def wanted(self, wanted: Any) -> str:
        return ", ".join(sorted(wanted)) if len(wanted) == 1 else f"all of {', '.join(sorted(wanted))}"


def one_of(words: Iterable[str]) -> str:
    shown = sorted(words)
    return shown[0] if len(shown) == 1 else f"one of {', '.join(shown)}"
