"""Generator of docs/reference/policy-language.md from the schema of the policy language."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Final

from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.states import Target, VmState
from interlock.policies.language.loader import builtin_names
from interlock.policies.language.schema import HEADER_KEYS, LIMITS, RULE_KEYS, SECTIONS, TIMES, VERDICTS, Key, Takes
from interlock.policies.language.section_parser import NAMEABLE
from interlock.policies.language.vocabulary import (
    CONDITION_WORDS,
    HARD_VARIANTS,
    OPERATIONS,
    SAME,
    SOURCES,
    TASKS,
    phases_of,
)

_EVERYWHERE: Final = frozenset(VmState) - {VmState.DELETED}
_LED: Final = {
    Target.SAME: "stays",
    Target.REPAIRED: "stays; `error` becomes `active`",
    Target.PRIOR: "what was before",
    Target.PRESENT: "what was before; `stopped` if the guest has ended since",
    Target.EVACUATED: "what is left without its host: `suspended` becomes `stopped`, `shelved` `shelved_offloaded`, "
    "`building` and `error` `active`, and a resize is confirmed",
}
_LISTS: Final = {
    Takes.OPERATIONS: "list of operations",
    Takes.VM_STATES: "list of vm_states",
    Takes.TASK_STATES: "list of task_states",
    Takes.KINDS: 'list of operations, or `["none"]`',
    Takes.TEXTS: "list of texts",
    Takes.SETS: "list of tables",
}


def language_page() -> str:
    """Return the page."""
    parts = (_head(), _sections(), _rules(), _verdicts(), _lists(), _operations(), _states(), _limits())
    return "\n".join(line for part in parts for line in (*part, ""))


def _head() -> Iterator[str]:
    yield "# The language of policies"
    yield ""
    yield "<!-- Drawn by `make docs`; a test compares the two. -->"
    yield ""
    yield "Every part, key and word of a policy file, made from the tables by which files are read. How the parts work"
    yield "together is described in [policies.md](policies.md)."
    yield ""
    yield "An editor that knows JSON Schema completes and checks a policy while it is written. The schema is"
    yield "[policy.schema.json](policy.schema.json), or what `interlock policy schema` prints; the first line of a"
    yield "policy names it, for instance for Even Better TOML in VS Code:"
    yield ""
    yield "```toml"
    yield "#:schema ./policy.schema.json"
    yield "```"


def _sections() -> Iterator[str]:
    yield "## The parts of a file"
    for name, meaning in SECTIONS.items():
        yield ""
        yield f"### `{f'[[{name}]]' if name == 'rule' else f'[{name}]'}`"
        yield ""
        yield meaning
        if name == "policy":
            yield ""
            yield from _table("key | value | default | meaning", (_key_cells(key) for key in HEADER_KEYS))


def _rules() -> Iterator[str]:
    yield "## The keys of a rule"
    yield ""
    yield "`id`, `operations` and `verdict` must be there."
    yield ""
    yield from _table(
        "key | value | only with | default | meaning",
        (
            (name, takes, ", ".join(f"`{one.value}`" for one in key.verdicts), default, meaning)
            for key in RULE_KEYS
            for name, takes, default, meaning in (_key_cells(key),)
        ),
    )
    yield ""
    yield f"A time is {TIMES[0].lower()}{TIMES[1:]}"


def _key_cells(key: Key) -> tuple[str, str, str, str]:
    if key.choices is not None:
        takes = ", ".join(f"`{member.value}`" for member in key.choices)
    elif key.takes is Takes.FLAG:
        takes = "`true`, `false`"
    else:
        takes = f"list of {key.name}" if key.takes is Takes.WORDS else _LISTS.get(key.takes, key.takes.value)
    default = key.default or ""
    literal = default.startswith('"') or default in {"true", "false"}
    return f"`{key.name}`", takes, f"`{default}`" if literal else default, key.meaning


def _verdicts() -> Iterator[str]:
    yield "## Verdicts"
    yield ""
    yield from _table("verdict | meaning", ((f"`{verdict.value}`", meaning) for verdict, meaning in VERDICTS.items()))


def _lists() -> Iterator[str]:
    yield "## Lists"
    yield ""
    yield from _table(
        "written | stands for",
        (
            ('`"*"`', "Any of them, with or without brackets; of the vm_states, all but `deleted`."),
            ('`"@group"`', "All of a group: one of those below, or a set of the policy."),
            ('`"!word"`, `"!@group"`', 'All that the rest of the list names, but these: `["*", "!lock"]`.'),
            (
                '`"powering-off"`',
                "The same as `powering_off`: hyphens, as Nova writes them, are understood everywhere.",
            ),
            ("a name", "What `[names]` calls an operation or a task state, where only one can be meant."),
        ),
    )
    yield ""
    yield "| group | in | stands for |"
    yield "|---|---|---|"
    for group, members in OPERATIONS.groups.items():
        yield f"| `@{group}` | operations | {_words(one.value for one in Operation if one in members)} |"
    for group in TASKS.groups:
        yield f"| `@{group}` | task_states | {_words(_ordered(group))} |"
    yield f"| `@{SAME}` | task_states, outstanding, held | the operation that is asked for, or its phases |"
    yield f"| `@{SOURCES}` | vm_states | wherever a driver can perform the operation that is asked for |"
    yield ""
    yield f"A rule with `@{SAME}` or `@{SOURCES}` means something else for each operation, so it becomes one rule an"
    yield "operation, and answers name it `id.operation`. These groups cannot stand in a set."
    yield ""
    for key, vocabulary in CONDITION_WORDS.items():
        yield f"The words of `{key}` are {_words(vocabulary.words)}."
    yield f"The hard variants that `[names]` may name are {_words(HARD_VARIANTS)}."


def _ordered(operation: str) -> tuple[str, ...]:
    phases = phases_of(Operation(operation))
    return tuple(word for word in NAMEABLE if word in phases)


def _operations() -> Iterator[str]:
    yield "## Operations"
    yield ""
    yield "What is true of each whatever a policy says. Of the task_states that serving a state change goes through,"
    yield "the first holds from the moment it is taken; those behind a stroke are of its hard variant. `@sources` is"
    yield "wherever a driver can perform it."
    yield ""
    yield from _table("operation | lane | task_states | `@sources` | leads to", map(_operation_cells, Operation))
    yield ""
    yield "## Lanes"
    yield ""
    yield from _table("lane | meaning", ((f"`{word}`", meaning) for word, meaning in _meanings(Lane).items()))


def _operation_cells(operation: Operation) -> tuple[str, ...]:
    entry = CATALOGUE[operation]
    phases = _words(entry.phases) if entry.lane is Lane.STATE else ""
    if entry.hard_phases:
        phases = f"{phases} / {_words(entry.hard_phases)}"
    sources = (
        "any but `deleted`"
        if entry.sources == _EVERYWHERE
        else _words(state.value for state in VmState if state in entry.sources)
    )
    leads = f"`{entry.to.value}`" if isinstance(entry.to, VmState) else _LED[entry.to]
    if operation is Operation.RESET_STATE:
        leads = "what is asked for"
    if entry.on_failure is not None:
        leads += f"; failed: `{entry.on_failure.value}`"
    return f"`{operation.value}`", entry.lane.value, phases, sources, leads


def _states() -> Iterator[str]:
    yield "## vm_states"
    yield ""
    yield "A rule says something of a deleted instance only if it names `deleted`; nothing is ever admitted for one."
    yield ""
    yield from _table("vm_state | meaning", ((f"`{word}`", meaning) for word, meaning in _meanings(VmState).items()))
    yield ""
    yield "## task_states"
    yield ""
    yield "`none`, and the phases of the state changes:"
    yield ""
    yield f"{_words(word for word in TASKS.words if word != 'none')}."


def _limits() -> Iterator[str]:
    yield "## Limits"
    yield ""
    yield from _table("of | at most", LIMITS)
    yield ""
    yield f"The policies that come with Interlock are {_words(builtin_names())}."


def _table(head: str, rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {head} |"
    yield f"|{'---|' * len(head.split(' | '))}"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def _words(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _meanings(kind: type[StrEnum]) -> dict[str, str]:
    """The sentence under each member of an enumeration, by the member's value."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {member.value: "" for member in kind}
    word = ""
    for node in body.body:
        match node:
            case ast.Assign(value=ast.Constant(value=str(value))):
                word = value
            case ast.Expr(value=ast.Constant(value=str(text))) if word:
                found[word] = " ".join(text.split())
            case _:
                word = ""
    return found
