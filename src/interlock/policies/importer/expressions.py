"""Expressions of oslo.policy: parser and evaluation for a caller with given roles.

Grammar and meaning: https://docs.openstack.org/oslo.policy/latest/reference/api/oslo_policy.policy.html. An expression
that cannot be parsed refuses everybody, as in oslo.policy. What a check looks at and Interlock does not know is
unknown: the result is true or false only if it does not depend on that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

LENGTH_MAX: Final = 10_000
"""The length of the longest expression that is read, in characters."""
_DEPTH_MAX: Final = 50
_WORD: Final = re.compile(r"\S+")


class Check(NamedTuple):
    """One check: `role:admin`, `project_id:%(project_id)s`; the kind is all of `@` and `!`."""

    kind: str
    match: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.match}" if self.match or self.kind not in _CONSTANTS else self.kind


class Not(NamedTuple):
    operand: Expression


class All(NamedTuple):
    operands: tuple[Expression, ...]


class Any(NamedTuple):
    operands: tuple[Expression, ...]


Expression = Check | Not | All | Any
_CONSTANTS: Final = {"@": True, "!": False}
EVERYBODY: Final = Check("@")
NOBODY: Final = Check("!")


class NotAnExpression(ValueError):
    """The text cannot be parsed."""


def parsed(rule: object) -> Expression:
    """Parse a rule: text, or the older form, a list of alternatives that are checks or lists of checks.

    Raises:
        NotAnExpression: it is neither; the message says why.
    """
    if rule is None:
        return EVERYBODY
    if isinstance(rule, str):
        return _parse_text(rule)
    if isinstance(rule, Sequence):
        return _parse_list(rule)
    raise NotAnExpression("it is neither text nor a list")


def _parse_text(text: str) -> Expression:
    if len(text) > LENGTH_MAX:
        raise NotAnExpression(f"it is longer than {LENGTH_MAX} characters")
    if not text:
        return EVERYBODY
    return _Parser(list(_tokens(text))).parse()


def _parse_list(alternatives: Sequence[object]) -> Expression:
    if not alternatives:
        return EVERYBODY
    found: list[Expression] = []
    for one in alternatives:
        checks = [one] if isinstance(one, str) else one
        if not isinstance(checks, Sequence) or not all(isinstance(check, str) for check in checks):
            raise NotAnExpression("a list may only have checks and lists of checks")
        if checks:
            found.append(All(tuple(_check(str(check)) for check in checks)))
    return Any(tuple(found))


def _tokens(text: str) -> Iterator[str]:
    """Yield words and parentheses. Those inside a word belong to it: `project_id:%(project_id)s`."""
    for found in _WORD.finditer(text):
        word = found.group()
        inner = word.lstrip("(")
        yield from "(" * (len(word) - len(inner))
        bare = inner.rstrip(")")
        if bare:
            yield bare
        yield from ")" * (len(inner) - len(bare))


def _check(text: str) -> Check:
    if text in _CONSTANTS:
        return Check(text)
    kind, colon, match = text.partition(":")
    if not colon:
        raise NotAnExpression(f"{text!r} is not a check: expected kind:value")
    return Check(kind, match)


class _Parser:
    """`or` binds less than `and`, and `and` less than `not`."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens[::-1]
        self._depth = 0

    def parse(self) -> Expression:
        found = self._alternatives()
        if self._tokens:
            raise NotAnExpression(f"unexpected {self._tokens[-1]!r}")
        return found

    def _next_is(self, word: str) -> bool:
        if self._tokens and self._tokens[-1].lower() == word:
            self._tokens.pop()
            return True
        return False

    def _alternatives(self) -> Expression:
        operands = [self._conjunction()]
        while self._next_is("or"):
            operands.append(self._conjunction())
        return operands[0] if len(operands) == 1 else Any(tuple(operands))

    def _conjunction(self) -> Expression:
        operands = [self._operand()]
        while self._next_is("and"):
            operands.append(self._operand())
        return operands[0] if len(operands) == 1 else All(tuple(operands))

    def _operand(self) -> Expression:
        self._depth += 1
        if self._depth > _DEPTH_MAX:
            raise NotAnExpression(f"it is nested more than {_DEPTH_MAX} deep")
        try:
            if self._next_is("not"):
                return Not(self._operand())
            if self._next_is("("):
                inner = self._alternatives()
                if not self._next_is(")"):
                    raise NotAnExpression("a parenthesis is not closed")
                return inner
            if not self._tokens or self._tokens[-1].lower() in {")", "and", "or"}:
                raise NotAnExpression("a check is missing")
            return _check(self._tokens.pop())
        finally:
            self._depth -= 1


def checks_of(expression: Expression) -> Iterator[Check]:
    """Yield the checks of an expression."""
    match expression:
        case Check():
            yield expression
        case Not(operand):
            yield from checks_of(operand)
        case All(operands) | Any(operands):
            for operand in operands:
                yield from checks_of(operand)


class Evaluation:
    """What expressions give for a caller with some roles, who acts on an instance of their own project."""

    def __init__(self, rule_of: Callable[[str], Expression], roles: Collection[str]) -> None:
        self._rule_of = rule_of
        self._roles = roles
        self._within: list[str] = []

    def result(self, expression: Expression) -> bool | None:
        """Return whether the caller may; None if that depends on what is not known."""
        match expression:
            case Check():
                return self._check(expression)
            case Not(operand):
                found = self.result(operand)
                return None if found is None else not found
            case All(operands):
                results = [self.result(operand) for operand in operands]
                return False if False in results else None if None in results else True
            case Any(operands):
                results = [self.result(operand) for operand in operands]
                return True if True in results else None if None in results else False

    def _check(self, check: Check) -> bool | None:
        if check.kind in _CONSTANTS and not check.match:
            return _CONSTANTS[check.kind]
        if check.kind == "role":
            return None if "%(" in check.match else check.match.lower() in self._roles
        if check.kind == "rule":
            return self._named(check.match)
        if check == Check("is_admin", "True"):
            return self._named("context_is_admin")
        return True if is_own_project(check) else None

    def _named(self, name: str) -> bool | None:
        if name in self._within:
            return False
        self._within.append(name)
        try:
            return self.result(self._rule_of(name))
        finally:
            self._within.pop()


def is_own_project(check: Check) -> bool:
    """Return whether a check compares the caller's project with the instance's."""
    return check.kind in {"project_id", "tenant_id"} and check.match in _PROJECTS


_PROJECTS: Final = {f"%({name})s" for name in ("project_id", "tenant_id", "target.project_id", "target.tenant_id")}
Rules = Mapping[str, Expression]
