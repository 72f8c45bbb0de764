"""Policies by name or file: found, read, put together with what they extend, and compiled.

The language is described in docs/reference/policies.md. One `[[rule]]` is read in `rules`, the words in its lists in
`vocabulary`. Whatever is wrong is a `PolicyError` that opens with file and line.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final

import msgspec

from interlock.core.errors import PolicyError
from interlock.core.operations import Operation
from interlock.core.policy import DEFAULT_OUTSTANDING_MAX, CompiledPolicy, Policy, Rule
from interlock.policies.positions import Positions
from interlock.policies.rules import TEXT_LENGTH_MAX, read_rules
from interlock.policies.vocabulary import KNOWN_WORDS, RESERVED_GROUPS, Place, UserSet, UserSets, listed, nearest

FILE_SIZE_MAX_BYTES: Final = 1024 * 1024
RULES_MAX: Final = 2_000
OUTSTANDING_MAX_LIMIT: Final = 10_000
EXTENDS_DEPTH_MAX: Final = 16

_SECTIONS: Final = ("policy", "sets", "rule")
_POLICY_KEYS: Final = ("name", "extends", "outstanding_max", "description")
_SET_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_TOML_PLACE: Final = re.compile(r"^(.*) \(at line (\d+), column \d+\)$", re.DOTALL)


class PolicyText(msgspec.Struct, frozen=True, kw_only=True):
    """A policy together with what only its readers need."""

    policy: Policy
    description: str
    sets: dict[str, tuple[str, ...]]
    """The groups that it and what it extends have named."""
    source: str
    """Its file, or `name.toml` for a built-in."""


class _Reading(msgspec.Struct, frozen=True):
    policy: Policy
    description: str
    sets: UserSets
    source: str


def builtin_names() -> tuple[str, ...]:
    """The names of the policies that come with Interlock, sorted."""
    return tuple(sorted(_builtins()))


def load(name_or_path: str | Path) -> Policy:
    """A built-in policy by its name, or a policy file by its path.

    Raises:
        PolicyError: there is none, or it is wrong; with file, line, what was expected and the nearest valid word.
    """
    return read(name_or_path).policy


def read(name_or_path: str | Path) -> PolicyText:
    """The same as `load`, with the policy's description and sets."""
    reading = _read(name_or_path)
    sets = {name: members.members for name, members in reading.sets.items()}
    return PolicyText(policy=reading.policy, description=reading.description, sets=sets, source=reading.source)


def compile_named(name_or_path: str | Path, performs: Iterable[Operation] | None = None) -> CompiledPolicy:
    """A policy ready for deciding; with `performs`, every other operation is denied before any rule is asked.

    Raises:
        PolicyError: as `load`.
    """
    return CompiledPolicy(load(name_or_path), performs)


def _builtins() -> dict[str, Traversable]:
    folder = resources.files("interlock.policies") / "builtin"
    return {entry.name.removesuffix(".toml"): entry for entry in folder.iterdir() if entry.name.endswith(".toml")}


def _read(name_or_path: str | Path) -> _Reading:
    if isinstance(name_or_path, str):
        if name_or_path in _builtins():
            return _read_builtin(name_or_path)
        if "/" not in name_or_path and not name_or_path.endswith(".toml"):
            raise PolicyError(
                f"There is no built-in policy {name_or_path!r}.",
                remedy=f"{nearest(name_or_path, builtin_names())} A file is named by its path, ending in .toml.",
            )
    path = Path(name_or_path)
    return _parse(_bytes_of(path, str(path)), str(path), path, ())


@cache
def _read_builtin(name: str) -> _Reading:
    return _parse(_builtins()[name].read_bytes(), f"{name}.toml", None, ())


def _bytes_of(path: Path, shown: str) -> bytes:
    try:
        if not path.is_file():
            raise PolicyError(f"{shown}:1: There is no such file.", remedy="Name a policy file or a built-in policy.")
        with path.open("rb") as file:
            data = file.read(FILE_SIZE_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise PolicyError(f"{shown}:1: The file cannot be read: {error}.") from error
    if len(data) > FILE_SIZE_MAX_BYTES:
        raise PolicyError(f"{shown}:1: The file is larger than {FILE_SIZE_MAX_BYTES} bytes; no policy is that long.")
    return data


def _parse(data: bytes, shown: str, path: Path | None, chain: tuple[Path, ...]) -> _Reading:
    return _Document(data, shown, path, chain).read()


class _Document:
    """One policy file while it is read."""

    def __init__(self, data: bytes, shown: str, path: Path | None, chain: tuple[Path, ...]) -> None:
        self._shown = shown
        self._path = path
        self._chain = chain if path is None else (*chain, path.resolve())
        text = _decode(data, shown)
        self._content = _toml(text, shown)
        self._positions = Positions(text)

    def _at(self, *path: str | int) -> Place:
        return Place(self._shown, self._positions.line(path))

    def read(self) -> _Reading:
        for key in self._content:
            if key not in _SECTIONS:
                raise self._at(key).error(f"A policy has no part {key!r}.", nearest(key, _SECTIONS))
        header = self._header()
        base = self._base(header)
        sets = {**(base.sets if base else {}), **self._sets()}
        rules = self._rules(sets)
        if not rules and base is None:
            raise self._at().error("The policy has no rule, and so would deny everything.", "Write a [[rule]].")
        _check_order(rules)
        _check_ids(rules, base.policy.rules if base else ())
        outstanding_max = header.get(
            "outstanding_max", base.policy.outstanding_max if base else DEFAULT_OUTSTANDING_MAX
        )
        policy = Policy(
            name=header.get("name", Path(self._shown).stem),
            rules=_joined(rules, base.policy.rules if base else ()),
            outstanding_max=outstanding_max,
        )
        return _Reading(policy, header.get("description", ""), sets, self._shown)

    def _header(self) -> dict[str, Any]:
        header = self._content.get("policy", {})
        if not isinstance(header, dict):
            raise self._at("policy").error("policy must be a table, [policy].")
        for key, value in header.items():
            place = self._at("policy", key)
            if key not in _POLICY_KEYS:
                raise place.error(f"[policy] has no key {key!r}.", nearest(key, _POLICY_KEYS))
            if key == "outstanding_max":
                if type(value) is not int or not 1 <= value <= OUTSTANDING_MAX_LIMIT:
                    raise place.error(f"outstanding_max must be a whole number from 1 to {OUTSTANDING_MAX_LIMIT}.")
            elif not isinstance(value, str) or not 0 < len(value) <= TEXT_LENGTH_MAX:
                raise place.error(f"{key} must be a string of 1 to {TEXT_LENGTH_MAX} characters.")
        return header

    def _base(self, header: dict[str, Any]) -> _Reading | None:
        extends = header.get("extends")
        if extends is None:
            return None
        place = self._at("policy", "extends")
        if extends in _builtins():
            return _read_builtin(extends)
        if self._path is None or ("/" not in extends and not extends.endswith(".toml")):
            raise place.error(f"There is no built-in policy {extends!r}.", nearest(extends, builtin_names()))
        path = self._path.parent / extends
        try:
            resolved = path.resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise place.error(f"extends names no file: {error}.") from error
        if resolved in self._chain:
            raise place.error(f"The policy extends itself, through {extends!r}.")
        if len(self._chain) > EXTENDS_DEPTH_MAX:
            raise place.error(f"More than {EXTENDS_DEPTH_MAX} policies extend one another.")
        if not path.is_file():
            raise place.error(f"extends names {extends!r}, and there is no file {str(path)!r}.")
        return _parse(_bytes_of(path, str(path)), str(path), path, self._chain)

    def _sets(self) -> dict[str, UserSet]:
        raw = self._content.get("sets", {})
        if not isinstance(raw, dict):
            raise self._at("sets").error("sets must be a table, [sets].")
        sets: dict[str, UserSet] = {}
        for name, members in raw.items():
            place = self._at("sets", name)
            if _SET_NAME.fullmatch(name) is None:
                raise place.error(f"The name of a set may hold only small letters, digits and '_', not {name!r}.")
            if name in RESERVED_GROUPS:
                raise place.error(f"@{name} is a group already.", "Choose another name for the set.")
            sets[name] = UserSet(listed(members, f"The set {name}", place), place)
        for members in sets.values():
            _check_members(members)
        return sets

    def _rules(self, sets: UserSets) -> tuple[Rule, ...]:
        tables = self._content.get("rule", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise self._at("rule").error("A rule is written under [[rule]], with two brackets.")
        if len(tables) > RULES_MAX:
            raise self._at("rule", RULES_MAX).error(f"A policy may have at most {RULES_MAX} rules.")
        rules: list[Rule] = []
        for index, table in enumerate(tables):

            def place_of(key: str | None, index: int = index) -> Place:
                return self._at("rule", index) if key is None else self._at("rule", index, key)

            rules.extend(read_rules(table, place_of, sets))
        return tuple(rules)


def _decode(data: bytes, shown: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PolicyError(
            f"{shown}:{line}: The file is not UTF-8 text.", remedy="Save it with the encoding UTF-8."
        ) from error


def _toml(text: str, shown: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _TOML_PLACE.match(str(error))
        line = int(found.group(2)) if found else text.count("\n") + 1
        message = found.group(1) if found else str(error)
        raise PolicyError(f"{shown}:{line}: This is not TOML: {message}.") from error
    except (RecursionError, ValueError) as error:
        raise PolicyError(f"{shown}:1: This is not TOML that a policy could be: {error}.") from error


def _check_members(members: UserSet) -> None:
    for member in members.members:
        word = member.replace("-", "_")
        if member.startswith("!"):
            raise members.place.error("A set cannot leave things out.", "Write !… where the set is used.")
        if not word.startswith("@") and word != "*" and word not in KNOWN_WORDS:
            raise members.place.error(f"{member!r} is no word of the language.", nearest(word, sorted(KNOWN_WORDS)))


def _place(rule: Rule) -> Place:
    file, _, line = rule.source.rpartition(":")
    return Place(file, int(line))


def _check_order(rules: tuple[Rule, ...]) -> None:
    """Fixed rules come first, so that asking them before everything that extends the policy changes nothing in it."""
    earlier: Rule | None = None
    for rule in rules:
        if not rule.fixed:
            earlier = earlier or rule
        elif earlier is not None:
            raise _place(rule).error(
                f"The fixed rule {rule.id!r} stands behind {earlier.id!r}, which is not fixed.",
                "Move the fixed rules to the beginning of the file.",
            )


def _check_ids(rules: tuple[Rule, ...], base: tuple[Rule, ...]) -> None:
    seen = {rule.id: rule for rule in base}
    for rule in rules:
        if rule.id in seen:
            raise _place(rule).error(
                f"The id {rule.id!r} is used already, at {seen[rule.id].source}.", "Give every rule an id of its own."
            )
        seen[rule.id] = rule


def _joined(rules: tuple[Rule, ...], base: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The order in which rules are asked: fixed ones of the base, then those that extend it, then the rest of it."""
    fixed = tuple(rule for rule in base if rule.fixed)
    rest = tuple(rule for rule in base if not rule.fixed)
    return (*fixed, *rules, *rest)
