"""JSON Schema of policy files for editors: completion, descriptions and validation of a single file.

Generated from the schema of the policy language, in draft 7, which TOML extensions of editors support. Only the loader
finds duplicate ids and unknown groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from interlock.core.durations import EXPECTED
from interlock.core.operations import CATALOGUE, Lane
from interlock.core.policy import Verdict
from interlock.policies.language.loader import builtin_names, load
from interlock.policies.language.schema import (
    CODE,
    CONDITION_KEYS,
    COUNT_MAX,
    HEADER_KEYS,
    ID,
    NAME,
    NAMES_MAX,
    OUTSTANDING_MAX_LIMIT,
    RULE_KEYS,
    SECTIONS,
    SET_NAME,
    SETS_IN_RULE_MAX,
    SETS_MAX,
    TEXT_LENGTH_MAX,
    TEXTS_MAX,
    UNLIMITED,
    VERDICTS,
    Key,
    Takes,
)
from interlock.policies.language.section_parser import NAMEABLE
from interlock.policies.language.vocabulary import (
    CONDITION_WORDS,
    KNOWN_WORDS,
    NOTHING,
    OPERATIONS,
    RESERVED_GROUPS,
    SAME,
    SOURCES,
    TASKS,
    VM_STATES,
    Vocabulary,
)

Schema = dict[str, Any]

_GROUP: Final = "^!?@[a-z][a-z0-9_-]*$"
_TIME: Final = r"^([0-9]{1,12}(\.[0-9]{1,3})?(ms|s|m|h|d))+$"
_NO_TIME: Final = r"^(0+(\.0+)?(ms|s|m|h|d))+$"
_NAME: Final = f"^{NAME.pattern}$"
_FILE: Final = r"(/|\.toml$)"

_VOCABULARIES: Final[Mapping[Takes, tuple[str, Vocabulary[Any], tuple[str, ...]]]] = {
    Takes.OPERATIONS: ("operation", OPERATIONS, ()),
    Takes.VM_STATES: ("vm_state", VM_STATES, (SOURCES,)),
    Takes.TASK_STATES: ("task_state", TASKS, (SAME,)),
    Takes.KINDS: ("kind", OPERATIONS, (SAME,)),
}
"""The name of each kind of list in the schema, its words and its additional groups."""
_TEXT: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": TEXT_LENGTH_MAX}
_ANY: Final[Schema] = {"const": "*"}
_LIMIT: Final[Schema] = {
    "anyOf": [{"type": "string", "pattern": _TIME, "maxLength": 64, "not": {"pattern": _NO_TIME}}, {"const": UNLIMITED}]
}
_SERVED: Final = tuple(
    spelling
    for word, operation in OPERATIONS.words.items()
    if CATALOGUE[operation].lane is not Lane.RECORD
    for spelling in dict.fromkeys((word, word.replace("_", "-")))
)
"""The operations that are served for a time, in both spellings."""
_SHAPES: Final[Mapping[Takes, Schema]] = {
    Takes.TEXT: _TEXT,
    Takes.ID: {"type": "string", "pattern": f"^{ID.pattern}$"},
    Takes.CODE: {"type": "string", "pattern": f"^{CODE.pattern}$"},
    Takes.FLAG: {"type": "boolean"},
    Takes.TIME: {"allOf": [{"$ref": "#/definitions/time"}]},
    Takes.LIMIT: _LIMIT,
    Takes.COUNT: {"type": "integer", "minimum": 1, "maximum": OUTSTANDING_MAX_LIMIT},
}
_MAY_BE_NAMED: Final = (Takes.OPERATIONS, Takes.TASK_STATES, Takes.KINDS)
"""The lists in which custom names are valid."""


def schema() -> Schema:
    """Return the schema."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Interlock policy",
        "description": "Rules of which the first that matches decides; if none matches, the request is denied.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "policy": _header(),
            "sets": _sets(),
            "names": _names(),
            "thresholds": _thresholds(),
            "exceptions": _exceptions(),
            "served_at_most": _table(SECTIONS["served_at_most"], dict.fromkeys(_SERVED, _LIMIT)),
            "rule": {
                "description": SECTIONS["rule"],
                "type": "array",
                "items": {"$ref": "#/definitions/rule"},
            },
        },
        "anyOf": [{"required": ["rule"], "properties": {"rule": {"minItems": 1}}}, _extending()],
        "allOf": [
            {"if": {"required": ["thresholds"]}, "then": _extending()},
            {"if": {"required": ["exceptions"]}, "then": _extending()},
            {"if": _without_own_names(), "then": _strict()},
        ],
        "definitions": dict(_definitions()),
    }


def _extending() -> Schema:
    return {"required": ["policy"], "properties": {"policy": {"required": ["extends"]}}}


def _header() -> Schema:
    return _table(SECTIONS["policy"], {key.name: _value(key) for key in HEADER_KEYS})


def _table(description: str, properties: Schema) -> Schema:
    return {"description": description, "type": "object", "additionalProperties": False, "properties": properties}


def _sets() -> Schema:
    return {
        "description": SECTIONS["sets"],
        "type": "object",
        "maxProperties": SETS_MAX,
        "propertyNames": {
            "pattern": f"^{SET_NAME.pattern}$",
            "not": {"enum": sorted(RESERVED_GROUPS)},
        },
        "additionalProperties": _listed(
            {"anyOf": [{"$ref": "#/definitions/member"}, {"type": "string", "pattern": _NAME}]}
        ),
    }


def _names() -> Schema:
    name = {"type": "string", "pattern": _NAME}
    several = {"type": "array", "minItems": 1, "maxItems": NAMES_MAX, "uniqueItems": True, "items": name}
    named = {"anyOf": [name, several]}
    return {
        "description": SECTIONS["names"],
        "type": "object",
        "properties": dict.fromkeys(NAMEABLE, named),
        "propertyNames": {"pattern": _spelled(NAMEABLE)},
        "additionalProperties": named,
    }


def _exceptions() -> Schema:
    part = {"anyOf": [_words(Takes.OPERATIONS), {"type": "object"}]}
    return {"description": SECTIONS["exceptions"], "type": "object", "additionalProperties": part}


def _thresholds() -> Schema:
    more_than_nothing = {"type": "string", "pattern": _TIME, "maxLength": 64, "not": {"pattern": _NO_TIME}}
    part = {"anyOf": [more_than_nothing, {"type": "object"}]}
    return {"description": SECTIONS["thresholds"], "type": "object", "additionalProperties": part}


def _definitions() -> Iterator[tuple[str, Schema]]:
    yield "rule", _rule()
    yield "time", {"type": "string", "pattern": _TIME, "maxLength": 64, "description": f"{EXPECTED}."}
    groups = [f"@{group}" for group in sorted(RESERVED_GROUPS)]
    known = [{"enum": ["*", *sorted(KNOWN_WORDS), *groups]}, {"pattern": _spelled(sorted(KNOWN_WORDS))}]
    yield "member", {"type": "string", "anyOf": [*known, {"pattern": _GROUP.replace("!?", "")}]}
    for name, vocabulary, more in _VOCABULARIES.values():
        yield name, _word(vocabulary, more)
    for vocabulary in CONDITION_WORDS.values():
        yield vocabulary.noun, _word(vocabulary, ())


def _word(vocabulary: Vocabulary[Any], more: Iterable[str]) -> Schema:
    words = [*vocabulary.words, *(f"@{group}" for group in (*more, *vocabulary.groups))]
    strict = [
        {"enum": ["*", *words, *(f"!{word}" for word in words)]},
        {"pattern": _spelled(vocabulary.words, "!?")},
        {"pattern": _GROUP},
    ]
    return {"type": "string", "anyOf": strict}


def _rule() -> Schema:
    return {
        "type": "object",
        "description": SECTIONS["rule"],
        "required": [key.name for key in RULE_KEYS if key.required],
        "additionalProperties": False,
        "properties": {key.name: _value(key) for key in RULE_KEYS},
        "allOf": [_only_with(verdicts) for verdicts in dict.fromkeys(key.verdicts for key in RULE_KEYS) if verdicts],
    }


def _only_with(verdicts: tuple[Verdict, ...]) -> Schema:
    """Return the condition on keys that are valid only with some verdicts, or required by them."""
    keys = [key.name for key in RULE_KEYS if key.verdicts == verdicts]
    this = {"properties": {"verdict": {"enum": [one.value for one in verdicts]}}, "required": ["verdict"]}
    found: Schema = {"if": this, "else": {"properties": dict.fromkeys(keys, False)}}
    if verdicts == (Verdict.AFTER,):
        found["then"] = {
            "required": ["threshold"],
            "properties": {"threshold": {"not": {"type": "string", "pattern": _NO_TIME}}},
        }
    return found


def _value(key: Key) -> Schema:
    """Return the schema of a key's value."""
    found: Schema = {"description": _described(key)}
    if key.example is not None:
        found["examples"] = [key.example]
    if key.choices is not None:
        found |= {"type": "string", "enum": [member.value for member in key.choices]}
    elif key.takes is Takes.POLICY:
        found |= {"type": "string", "anyOf": [{"enum": list(builtin_names())}, {"pattern": _FILE}]}
    elif key.condition is not None and key.takes is Takes.COUNT:
        found |= {"type": "integer", "minimum": 1, "maximum": COUNT_MAX}
    elif key.takes is Takes.SETS:
        conditions = {one.name: _value(one) for one in RULE_KEYS if one.name in CONDITION_KEYS}
        one_set = {"type": "object", "minProperties": 1, "additionalProperties": False, "properties": conditions}
        found |= {"type": "array", "minItems": 1, "maxItems": SETS_IN_RULE_MAX, "items": one_set}
    elif key.takes in _VOCABULARIES:
        found |= _words(key.takes)
    elif key.condition is not None and key.takes is Takes.WORDS:
        found |= _listed({"$ref": f"#/definitions/{CONDITION_WORDS[key.name].noun}"})
    elif key.condition is not None and key.takes is Takes.TEXTS:
        item = {"type": "string", "pattern": f"^{key.condition.kind.item.pattern}$"}
        found |= {"anyOf": [{"type": "array", "minItems": 1, "items": item, "maxItems": TEXTS_MAX}, _ANY]}
    elif key.takes is Takes.TEXTS:
        found |= {"type": "array", "minItems": 1, "items": _TEXT, "maxItems": TEXTS_MAX}
    else:
        found |= _SHAPES[key.takes]
    return found


def _described(key: Key) -> str:
    parts = [key.meaning]
    if key.choices is Verdict:
        parts += [f"{verdict.value}: {meaning}" for verdict, meaning in VERDICTS.items()]
    if key.verdicts:
        known = " or ".join(f'"{verdict.value}"' for verdict in key.verdicts)
        parts.append(f"Only with verdict = {known}.")
    if key.default is not None:
        parts.append(f"If it is left out: {key.default}.")
    return "\n".join(parts)


def _words(takes: Takes) -> Schema:
    name = _VOCABULARIES[takes][0]
    word: Schema = {"$ref": f"#/definitions/{name}"}
    if takes in _MAY_BE_NAMED:
        word = {"anyOf": [word, {"type": "string", "pattern": f"^!?{_NAME[1:]}"}]}
    return _some(takes, word)


def _some(takes: Takes, word: Schema) -> Schema:
    found = _listed(word)
    if takes is Takes.KINDS:
        found["anyOf"].append({"type": "array", "maxItems": 1, "minItems": 1, "items": {"const": NOTHING}})
    return found


def _listed(item: Schema) -> Schema:
    return {"anyOf": [{"type": "array", "minItems": 1, "items": item}, _ANY]}


def _without_own_names() -> Schema:
    """Return the condition that the policy has no custom names and extends no file that may have some."""
    plain = [name for name in builtin_names() if not load(name).names]
    extends = {"properties": {"extends": {"enum": plain}}}
    return {"not": {"required": ["names"]}, "properties": {"policy": extends}}


def _strict() -> Schema:
    lists = {
        key.name: _some(key.takes, {"$ref": f"#/definitions/{_VOCABULARIES[key.takes][0]}"})
        for key in RULE_KEYS
        if key.takes in _MAY_BE_NAMED
    }
    sets = {"additionalProperties": _listed({"$ref": "#/definitions/member"})}
    alternatives = {"items": {"properties": {key: one for key, one in lists.items() if key in CONDITION_KEYS}}}
    return {"properties": {"rule": {"items": {"properties": {**lists, "any": alternatives}}}, "sets": sets}}


def _spelled(words: Iterable[str], before: str = "") -> str:
    """Return a pattern of words, with hyphens or underscores."""
    return f"^{before}({'|'.join(word.replace('_', '[_-]') for word in words)})$"
