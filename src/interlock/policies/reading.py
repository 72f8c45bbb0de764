"""Policies by name or file: found, read, put together with what they extend, and compiled.

The language is defined in `language` and described in docs/reference/policy-language.md. One `[[rule]]` is read in
`rules`, the other parts in `own_words` and `thresholds`, the words in lists in `vocabulary`. Whatever is wrong is a
`PolicyError` that opens with file, line and column.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path, PurePath
from typing import Any, Final

import msgspec

from interlock.core.errors import PolicyError
from interlock.core.operations import Operation
from interlock.core.policy import DEFAULT_OUTSTANDING_MAX, CompiledPolicy, Policy, Rule
from interlock.policies.digests import digest_of
from interlock.policies.language import (
    EXPANDED_RULES_MAX,
    EXTENDS_DEPTH_MAX,
    FILE_SIZE_MAX_BYTES,
    HEADER_KEYS,
    OUTSTANDING_MAX_LIMIT,
    RULES_MAX,
    SECTIONS,
    TEXT_LENGTH_MAX,
    Takes,
)
from interlock.policies.own_words import read_names, read_sets
from interlock.policies.places import Place, is_text, nearest, shown
from interlock.policies.policy_files import (
    DiskShelf,
    NoShelf,
    PolicyFile,
    SentShelf,
    Shelf,
    builtin_file,
    builtin_names,
    file_on_disk,
    is_file_name,
)
from interlock.policies.positions import OutOfBounds, Position, Positions, end_of
from interlock.policies.rules import read_rules
from interlock.policies.thresholds import changed
from interlock.policies.vocabulary import Dictionary, UserSet

__all__ = [
    "EXTENDS_DEPTH_MAX",
    "FILE_SIZE_MAX_BYTES",
    "PolicyText",
    "builtin_names",
    "compile_named",
    "files_of",
    "load",
    "read",
    "read_sent",
]

_TOML_PLACE: Final = re.compile(r"^(.*) \(at line (\d+), column (\d+)\)$", re.DOTALL)
_TOML_END: Final = " (at end of document)"


class PolicyText(msgspec.Struct, frozen=True, kw_only=True):
    """A policy together with what only its readers need."""

    policy: Policy
    description: str
    sets: dict[str, tuple[str, ...]]
    """The groups that it and what it extends have named."""
    source: str
    """Its file, or `name.toml` for a built-in."""
    files: dict[str, str] = {}
    """The text of its file and of those that it extends, by their names in errors; of no built-in that it extends."""


class ReadFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a policy, as it was read."""

    name: str
    """As errors name it."""
    identity: str
    text: str
    extends: str | None
    """The file that it extends, as written; None if it extends none, or a built-in."""


class _Reading(msgspec.Struct, frozen=True):
    policy: Policy
    description: str
    sets: Mapping[str, UserSet]
    files: tuple[ReadFile, ...]
    """This one, then those that it extends; without a built-in."""
    families: Mapping[str, str]
    """For each rule that was made of one that stands for several, the id that was written."""


class _Written(msgspec.Struct, frozen=True):
    """A rule of the file, with where it stands."""

    rule: Rule
    place: Place


def load(name_or_path: str | Path) -> Policy:
    """A built-in policy by its name, or a policy file by its path.

    Raises:
        PolicyError: there is none, or it is wrong; with the place, what was expected and the nearest valid word.
    """
    return read(name_or_path).policy


def read(name_or_path: str | Path) -> PolicyText:
    """The same as `load`, with the policy's description and sets."""
    return _told(_read(name_or_path))


def files_of(path: Path) -> tuple[ReadFile, ...]:
    """A policy file and those that it extends, in that order, after reading all of them. Raises `PolicyError`."""
    return _read(path).files


def read_sent(shelf: SentShelf, main: PolicyFile) -> PolicyText:
    """A policy of which all files were sent together. Raises `PolicyError`."""
    return _told(_Document(main, shelf, ()).read())


def compile_named(name_or_path: str | Path, performs: Iterable[Operation] | None = None) -> CompiledPolicy:
    """A policy ready for deciding; with `performs`, every other operation is denied before any rule is asked.

    Raises:
        PolicyError: as `load`.
    """
    return CompiledPolicy(load(name_or_path), performs)


def _told(reading: _Reading) -> PolicyText:
    return PolicyText(
        policy=reading.policy,
        description=reading.description,
        sets={name: members.members for name, members in reading.sets.items()},
        source=reading.files[0].name,
        files={file.name: file.text for file in reading.files},
    )


def _read(name_or_path: str | Path) -> _Reading:
    if isinstance(name_or_path, str):
        if name_or_path in builtin_names():
            return _read_builtin(name_or_path)
        if not is_file_name(name_or_path):
            raise PolicyError(
                f"There is no built-in policy {shown(name_or_path)}.",
                remedy=f"{nearest(name_or_path, builtin_names())} A file is named by its path, ending in .toml.",
            )
    return _Document(file_on_disk(Path(name_or_path)), DiskShelf(), ()).read()


@cache
def _read_builtin(name: str) -> _Reading:
    return _Document(builtin_file(name), NoShelf(), ()).read()


class _Document:
    """One policy file while it is read."""

    def __init__(self, file: PolicyFile, shelf: Shelf, extended_by: tuple[PolicyFile, ...]) -> None:
        self._file = file
        self._shelf = shelf
        self._chain = (*extended_by, file)
        self._text = _decode(file.data, file.name)
        self._positions = Positions(self._text)
        self._content = _toml(self._text, self._positions, file.name)
        self._whole = Place(file.name, self._positions)

    def _at(self, *path: str | int) -> Place:
        return self._whole.at(*path)

    def read(self) -> _Reading:
        for key in self._content:
            if key not in SECTIONS:
                raise self._at(key).key.error(f"A policy has no part {shown(key)}.", nearest(key, SECTIONS))
        header = self._header()
        base = self._base(header)
        names = read_names(self._table("names"), self._at("names"), base.policy.names if base else {})
        sets = read_sets(self._table("sets"), self._at("sets"), base.sets if base else {}, names)
        rules, families = self._rules(Dictionary(sets, names), len(base.policy.rules) if base else 0)
        if not rules and base is None:
            raise self._whole.error("The policy has no rule, and so would deny everything.", "Write a [[rule]].")
        _check_order(rules)
        _check_ids(rules, base.policy.rules if base else ())
        below = self._changed_base(base, rules, families)
        extends = header.get("extends")
        built_in = extends in builtin_names()
        policy = Policy(
            name=header.get("name", PurePath(self._file.name).stem),
            rules=_joined(tuple(one.rule for one in rules), below),
            outstanding_max=header.get(
                "outstanding_max", base.policy.outstanding_max if base else DEFAULT_OUTSTANDING_MAX
            ),
            names=names,
        )
        return _Reading(
            msgspec.structs.replace(policy, digest=digest_of(policy)),
            header.get("description", ""),
            sets,
            (self._read_file(None if built_in else extends), *(base.files if base and not built_in else ())),
            {**(base.families if base else {}), **families},
        )

    def _read_file(self, extends: str | None) -> ReadFile:
        return ReadFile(name=self._file.name, identity=self._file.identity, text=self._text, extends=extends)

    def _table(self, name: str) -> dict[str, Any]:
        table = self._content.get(name, {})
        if not isinstance(table, dict):
            raise self._at(name).key.error(f"{name} must be a table, [{name}].")
        return table

    def _header(self) -> dict[str, Any]:
        header = self._table("policy")
        keys = {key.name: key for key in HEADER_KEYS}
        for name, value in header.items():
            place = self._at("policy", name)
            if name not in keys:
                raise place.key.error(f"[policy] has no key {shown(name)}.", nearest(name, keys))
            if keys[name].takes is Takes.COUNT:
                if type(value) is not int or not 1 <= value <= OUTSTANDING_MAX_LIMIT:
                    raise place.error(f"{name} must be a whole number from 1 to {OUTSTANDING_MAX_LIMIT}.")
            elif not is_text(value, TEXT_LENGTH_MAX):
                raise place.error(f"{name} must be a string of 1 to {TEXT_LENGTH_MAX} characters.")
        return header

    def _base(self, header: dict[str, Any]) -> _Reading | None:
        extends = header.get("extends")
        if extends is None:
            return None
        if extends in builtin_names():
            return _read_builtin(extends)
        place = self._at("policy", "extends")
        file = self._shelf.extended(self._file, extends, place)
        if any(file.identity == one.identity for one in self._chain):
            raise place.error(f"The policy extends itself, through {shown(extends)}.")
        if len(self._chain) > EXTENDS_DEPTH_MAX:
            raise place.error(f"More than {EXTENDS_DEPTH_MAX} policies extend one another.")
        if sum(len(one.data) for one in (*self._chain, file)) > FILE_SIZE_MAX_BYTES:
            raise place.error(
                f"The policy and what it extends are larger than {FILE_SIZE_MAX_BYTES} bytes; none is that long."
            )
        return _Document(file, self._shelf, self._chain).read()

    def _rules(self, dictionary: Dictionary, inherited: int) -> tuple[tuple[_Written, ...], dict[str, str]]:
        """The rules of the file, and for those that were made of one that stands for several, the id written."""
        tables = self._content.get("rule", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise self._at("rule").key.error("A rule is written under [[rule]], with two brackets.")
        if len(tables) > RULES_MAX:
            raise self._at("rule", RULES_MAX).key.error(f"A policy may have at most {RULES_MAX} rules.")
        lines = self._positions.lines_of_items("rule")
        rules: list[_Written] = []
        families: dict[str, str] = {}
        for number, table in enumerate(tables):
            place = self._at("rule", number)
            line = lines[number] if number < len(lines) else 1
            for rule in read_rules(table, place, line, dictionary):
                rules.append(_Written(rule, place))
                if rule.id != table["id"]:
                    families[rule.id] = table["id"]
            if inherited + len(rules) > EXPANDED_RULES_MAX:
                raise place.key.error(
                    f"The rules up to here stand for more than {EXPANDED_RULES_MAX}, one for each operation.",
                    "Write fewer with @same or @sources.",
                )
        return tuple(rules), families

    def _changed_base(
        self, base: _Reading | None, rules: tuple[_Written, ...], families: Mapping[str, str]
    ) -> tuple[Rule, ...]:
        """The rules of what is extended, with the thresholds that this file gives them."""
        table, place = self._table("thresholds"), self._at("thresholds")
        if base is None:
            if "thresholds" in self._content:
                raise place.key.error(
                    "[thresholds] changes what a policy extends, and this one extends nothing.",
                    "Write the threshold in the rule.",
                )
            return ()
        own = frozenset({*(one.rule.id for one in rules), *families.values()})
        return changed(base.policy.rules, base.families, own, table, place)


def _decode(data: bytes, shown_name: str) -> str:
    try:
        # What some editors write before the first character is no part of the text.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        raise PolicyError(
            f"{shown_name}:{line}:{column}: The file is not UTF-8 text.", remedy="Save it with the encoding UTF-8."
        ) from error


def _toml(text: str, positions: Positions, shown_name: str) -> dict[str, Any]:
    try:
        positions.check_bounds()
        return tomllib.loads(text)
    except OutOfBounds as beyond:
        at = beyond.position
        message = f"This is not TOML that a policy could be: {beyond.message}"
        raise PolicyError(f"{shown_name}:{at.line}:{at.column}: {message}") from None
    except tomllib.TOMLDecodeError as error:
        found = _TOML_PLACE.match(str(error))
        at = Position(int(found.group(2)), int(found.group(3))) if found else end_of(text.replace("\r\n", "\n"))
        message = (found.group(1) if found else str(error).removesuffix(_TOML_END))[:TEXT_LENGTH_MAX]
        raise PolicyError(f"{shown_name}:{at.line}:{at.column}: This is not TOML: {message}.") from error
    except (RecursionError, ValueError) as error:
        raise PolicyError(f"{shown_name}:1:1: This is not TOML that a policy could be: {error}.") from error


def _check_order(rules: tuple[_Written, ...]) -> None:
    """Fixed rules come first, so that asking them before everything that extends the policy changes nothing in it."""
    earlier: Rule | None = None
    for one in rules:
        if not one.rule.fixed:
            earlier = earlier or one.rule
        elif earlier is not None:
            raise one.place.at("fixed").error(
                f"The fixed rule {one.rule.id!r} stands behind {earlier.id!r}, which is not fixed.",
                "Move the fixed rules to the beginning of the file.",
            )


def _check_ids(rules: tuple[_Written, ...], base: tuple[Rule, ...]) -> None:
    seen = {rule.id: rule for rule in base}
    for one in rules:
        rule = one.rule
        if rule.id in seen:
            raise one.place.at("id").error(
                f"The id {rule.id!r} is used already, at {seen[rule.id].source}.", "Give every rule an id of its own."
            )
        seen[rule.id] = rule


def _joined(rules: tuple[Rule, ...], base: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The order in which rules are asked: fixed ones of the base, then those that extend it, then the rest of it."""
    fixed = tuple(rule for rule in base if rule.fixed)
    rest = tuple(rule for rule in base if not rule.fixed)
    return (*fixed, *rules, *rest)
