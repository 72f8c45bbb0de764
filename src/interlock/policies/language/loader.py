"""Policy loader: read a built-in policy or a file, merge it with the policies that it extends, and compile it.

`schema` defines the language; docs/reference/policy-language.md describes it. `section_parser` and `changed_rules`
parse the sections. Every error is a `PolicyError` that starts with file, line and column. The digest of a policy is
over everything that affects decisions, independent of layout and texts for people.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path, PurePath
from typing import Any, Final

import msgspec

from interlock.core.durations import spelled_time
from interlock.core.errors import PolicyError
from interlock.core.operations import Operation
from interlock.core.policy import DEFAULT_OUTSTANDING_MAX, CompiledPolicy, Policy, Rule
from interlock.policies.language.changed_rules import changed, excepted
from interlock.policies.language.policy_files import (
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
from interlock.policies.language.schema import (
    EXPANDED_RULES_MAX,
    EXTENDS_DEPTH_MAX,
    FILE_SIZE_MAX_BYTES,
    HEADER_KEYS,
    OUTSTANDING_MAX_LIMIT,
    RULES_MAX,
    SECTIONS,
    TEXT_LENGTH_MAX,
    TEXTS_MAX,
    THRESHOLD_PLACEHOLDER,
    Takes,
)
from interlock.policies.language.section_parser import read_limits, read_names, read_rules, read_sets
from interlock.policies.language.source_location import (
    OutOfBounds,
    Place,
    Position,
    Positions,
    end_of,
    is_text,
    nearest,
    shown,
)
from interlock.policies.language.vocabulary import Dictionary, UserSet

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
    """A policy with its description, sets and source text."""

    policy: Policy
    description: str
    sets: dict[str, tuple[str, ...]]
    """The sets of the policy and of its bases."""
    source: str
    """Its file, or `name.toml` for a built-in."""
    files: dict[str, str] = {}
    """The text of its file and of the files that it extends, by their names in errors; without built-ins."""


class ReadFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a policy, as it was read."""

    name: str
    """The name in errors."""
    identity: str
    text: str
    extends: str | None
    """The file that it extends, as written; None if it extends none, or a built-in."""


class _Reading(msgspec.Struct, frozen=True):
    policy: Policy
    description: str
    sets: Mapping[str, UserSet]
    files: tuple[ReadFile, ...]
    """This one, then those that it extends; without built-ins."""
    families: Mapping[str, str]
    """For each rule expanded from one written for several operations, the id as written."""


class _Written(msgspec.Struct, frozen=True):
    """A rule of the file, with its position."""

    rule: Rule
    place: Place


def load(name_or_path: str | Path) -> Policy:
    """Load a built-in policy by its name, or a policy file by its path.

    Raises:
        PolicyError: not found or invalid; with the position, what was expected and the nearest valid word.
    """
    return read(name_or_path).policy


def read(name_or_path: str | Path) -> PolicyText:
    """Load a policy with its description and sets. Raises `PolicyError`, as `load`."""
    return _policy_text(_read(name_or_path))


def files_of(path: Path) -> tuple[ReadFile, ...]:
    """Read a policy file and the files that it extends; return them in that order. Raises `PolicyError`."""
    return _read(path).files


def read_sent(shelf: SentShelf, main: PolicyFile) -> PolicyText:
    """Read a policy from a bundle of files. Raises `PolicyError`."""
    return _policy_text(_Document(main, shelf, ()).read())


def compile_named(name_or_path: str | Path, performs: Iterable[Operation] | None = None) -> CompiledPolicy:
    """Load and compile a policy; with `performs`, every other operation is denied before any rule is evaluated.

    Raises:
        PolicyError: as `load`.
    """
    return CompiledPolicy(load(name_or_path), performs)


def _policy_text(reading: _Reading) -> PolicyText:
    return PolicyText(
        policy=_with_thresholds_in_texts(reading.policy),
        description=reading.description,
        sets={name: members.members for name, members in reading.sets.items()},
        source=reading.files[0].name,
        files={file.name: file.text for file in reading.files},
    )


def _with_thresholds_in_texts(policy: Policy) -> Policy:
    """Return the policy with each rule's threshold in its `because`: last, since `[thresholds]` may change it."""
    rules = tuple(
        msgspec.structs.replace(
            rule, because=rule.because.replace(THRESHOLD_PLACEHOLDER, spelled_time(rule.threshold_ms))
        )
        if rule.because and rule.threshold_ms and THRESHOLD_PLACEHOLDER in rule.because
        else rule
        for rule in policy.rules
    )
    return msgspec.structs.replace(policy, rules=rules)


def _read(name_or_path: str | Path) -> _Reading:
    if isinstance(name_or_path, str):
        if name_or_path in builtin_names():
            return _read_builtin(name_or_path)
        if not is_file_name(name_or_path):
            raise PolicyError(
                f"Built-in policy {shown(name_or_path)} not found.",
                remedy=f"{nearest(name_or_path, builtin_names())} A file is named by its path, ending in .toml.",
            )
    return _Document(file_on_disk(Path(name_or_path)), DiskShelf(), ()).read()


@cache
def _read_builtin(name: str) -> _Reading:
    return _Document(builtin_file(name), NoShelf(), ()).read()


class _Document:
    """Parser of one policy file."""

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
                raise self._at(key).key.error(f"Unknown section {shown(key)}.", nearest(key, SECTIONS))
        header = self._header()
        base = self._base(header)
        names = read_names(self._table("names"), self._at("names"), base.policy.names if base else {})
        sets = read_sets(self._table("sets"), self._at("sets"), base.sets if base else {}, names)
        dictionary = Dictionary(sets, names)
        rules, families = self._rules(dictionary, len(base.policy.rules) if base else 0)
        if not rules and base is None:
            raise self._whole.error("The policy has no rule and would deny everything.", "Write a [[rule]].")
        _check_order(rules)
        _check_ids(rules, base.policy.rules if base else ())
        below = self._changed_base(base, rules, families, dictionary)
        extends = header.get("extends")
        built_in = extends in builtin_names()
        policy = Policy(
            name=header.get("name", PurePath(self._file.name).stem),
            rules=_joined(tuple(one.rule for one in rules), below),
            outstanding_max=header.get(
                "outstanding_max", base.policy.outstanding_max if base else DEFAULT_OUTSTANDING_MAX
            ),
            served_at_most=read_limits(
                self._table("served_at_most"),
                self._at("served_at_most"),
                base.policy.served_at_most if base else {},
            ),
            protected_tags=_protected_tags(header, self._at("policy", "protected_tags"), base),
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
                raise place.key.error(f"Unknown key {shown(name)} in [policy].", nearest(name, keys))
            if keys[name].takes is Takes.COUNT:
                if type(value) is not int or not 1 <= value <= OUTSTANDING_MAX_LIMIT:
                    raise place.error(f"{name} must be a whole number from 1 to {OUTSTANDING_MAX_LIMIT}.")
            elif keys[name].takes is not Takes.TEXTS and not is_text(value, TEXT_LENGTH_MAX):
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
            raise place.error(f"More than {EXTENDS_DEPTH_MAX} policies extend each other.")
        if sum(len(one.data) for one in (*self._chain, file)) > FILE_SIZE_MAX_BYTES:
            raise place.error(
                f"The policy and the files it extends are larger than {FILE_SIZE_MAX_BYTES} bytes, the limit."
            )
        return _Document(file, self._shelf, self._chain).read()

    def _rules(self, dictionary: Dictionary, inherited: int) -> tuple[tuple[_Written, ...], dict[str, str]]:
        """Return the rules of the file, and the id as written of those expanded for several operations."""
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
                    f"The rules up to here expand to more than {EXPANDED_RULES_MAX}, one for each operation.",
                    "Write fewer with @same or @sources.",
                )
        return tuple(rules), families

    def _changed_base(
        self,
        base: _Reading | None,
        rules: tuple[_Written, ...],
        families: Mapping[str, str],
        dictionary: Dictionary,
    ) -> tuple[Rule, ...]:
        """Return the rules of the base, with the thresholds of this file and without its exceptions."""
        if base is None:
            for section in ("thresholds", "exceptions"):
                if section in self._content:
                    raise self._at(section).key.error(
                        f"[{section}] changes the rules of an extended policy, and this one extends none.",
                        "Change it in the rule itself.",
                    )
            return ()
        own = frozenset({*(one.rule.id for one in rules), *families.values()})
        timed = changed(base.policy.rules, base.families, own, self._table("thresholds"), self._at("thresholds"))
        table, place = self._table("exceptions"), self._at("exceptions")
        return excepted(timed, base.families, own, table, place, dictionary)


def _protected_tags(header: Mapping[str, Any], place: Place, base: _Reading | None) -> tuple[str, ...]:
    """Return the protected tags of a policy, including inherited ones. Raises `PolicyError`."""
    inherited = base.policy.protected_tags if base else ()
    if "protected_tags" not in header:
        return inherited
    own = header["protected_tags"]
    if not isinstance(own, list) or not 0 < len(own) <= TEXTS_MAX:
        raise place.error(f'protected_tags must be a list of 1 to {TEXTS_MAX} tags, such as ["freeze", "gpu-*"].')
    for number, tag in enumerate(own):
        if not is_text(tag, TEXT_LENGTH_MAX):
            raise place.at(number).error(f"Invalid tag {shown(tag)}: expected 1 to {TEXT_LENGTH_MAX} characters.")
    return tuple(dict.fromkeys((*inherited, *own)))


def _decode(data: bytes, shown_name: str) -> str:
    try:
        # Some editors write a byte order mark.
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
        message = f"This is not TOML within the limits of a policy: {beyond.message}"
        raise PolicyError(f"{shown_name}:{at.line}:{at.column}: {message}") from None
    except tomllib.TOMLDecodeError as error:
        found = _TOML_PLACE.match(str(error))
        at = Position(int(found.group(2)), int(found.group(3))) if found else end_of(text.replace("\r\n", "\n"))
        message = (found.group(1) if found else str(error).removesuffix(_TOML_END))[:TEXT_LENGTH_MAX]
        raise PolicyError(f"{shown_name}:{at.line}:{at.column}: This is not TOML: {message}.") from error
    except (RecursionError, ValueError) as error:
        raise PolicyError(f"{shown_name}:1:1: This is not TOML: {error}.") from error


def _check_order(rules: tuple[_Written, ...]) -> None:
    """Check that fixed rules come first, so that moving them before the rules of extending policies changes nothing."""
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
                f"The id {rule.id!r} already exists, at {seen[rule.id].source}.", "Give every rule an id of its own."
            )
        seen[rule.id] = rule


def _joined(rules: tuple[Rule, ...], base: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules in order of evaluation: fixed ones of the base, those that extend it, the rest of the base."""
    fixed = tuple(rule for rule in base if rule.fixed)
    rest = tuple(rule for rule in base if not rule.fixed)
    return (*fixed, *rules, *rest)


_FORM: Final = "interlock policy 1"
"""Version of the digest's input."""
_DECIDES_NOTHING: Final = frozenset({"source", "because", "exceptions"})
_FIELDS: Final = tuple(field for field in msgspec.structs.fields(Rule) if field.name not in _DECIDES_NOTHING)


def digest_of(policy: Policy) -> str:
    """Return SHA-256 in hexadecimal. The policy's name and its custom names are left out."""
    content: list[Any] = [_FORM, policy.outstanding_max, [dict(_non_defaults(rule)) for rule in policy.rules]]
    # Left out otherwise, so that the digests of other policies stay.
    if any(policy.served_at_most.values()):
        content.append({"served_at_most": {name: limit for name, limit in policy.served_at_most.items() if limit}})
    if policy.protected_tags:
        content.append({"protected_tags": sorted(policy.protected_tags)})
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()


def _non_defaults(rule: Rule) -> Iterator[tuple[str, Any]]:
    """Yield fields that are not defaults, so that adding a condition to the language keeps other digests."""
    for field in _FIELDS:
        value = getattr(rule, field.name)
        if value != field.default:
            yield field.name, sorted(value) if isinstance(value, frozenset) else value
