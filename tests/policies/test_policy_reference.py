"""The reference for operators names everything that there is, and what it shows works."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from interlock.cli.commands.policy.group import schema_page
from interlock.core import policy as core_policy
from interlock.core.operations import Operation
from interlock.core.policy import Rule, Verdict
from interlock.core.preconditions import PRECONDITIONS
from interlock.core.states import VmState
from interlock.policies.language.loader import builtin_names, compile_named, load
from interlock.policies.language.schema import HEADER_KEYS, SECTIONS
from interlock.policies.language.section_parser import KEYS
from interlock.policies.language.vocabulary import KNOWN_WORDS
from interlock.policies.rehearsal.events import VERBS
from interlock.policies.rehearsal.runner import rehearse
from language_page import language_page

REFERENCE = (Path(__file__).parents[2] / "docs" / "reference" / "policies.md").read_text()


def code_in_first_column(heading: str) -> list[str]:
    section = REFERENCE.split(heading, 1)[1].split("\n## ", 1)[0]
    cells = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    return [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]


def test_the_pages_that_are_drawn_are_what_the_language_says() -> None:
    """To draw them again: `make docs`."""
    folder = Path(__file__).parents[2] / "docs" / "reference"
    assert (folder / "policy-language.md").read_text() == language_page()
    assert (folder / "policy.schema.json").read_text() == schema_page()


def test_the_drawn_page_has_every_key_and_every_word() -> None:
    page = language_page()
    words = {*KEYS, *(key.name for key in HEADER_KEYS), *Verdict, *KNOWN_WORDS - {"soft_delete"}, *SECTIONS}
    assert {word for word in words if f"`{word}`" not in page and f"`[{word}]`" not in page} == {"rule"}
    assert "`[[rule]]`" in page
    for state in VmState:
        assert re.search(rf"^\| `{state.value}` \| [A-Z].*\.", page, re.MULTILINE), state
    assert set(re.findall(r"^\| `(\w+)` \| (?:state|component|record) \|", page, re.MULTILINE)) == set(Operation)


def test_no_key_of_a_rule_is_described_that_there_is_not() -> None:
    assert set(code_in_first_column("## The file")) <= set(KEYS)


def test_every_built_in_policy_is_described() -> None:
    assert sorted(re.findall(r"^### `(\w+)`$", REFERENCE, re.MULTILINE)) == sorted(builtin_names())


def test_every_reason_is_listed_and_no_other() -> None:
    rules = [rule for name in builtin_names() for rule in load(name).rules]
    rules += [value for value in vars(core_policy).values() if isinstance(value, Rule)]
    refusing = {rule.code for rule in rules if rule.verdict not in (Verdict.ADMIT, Verdict.PREEMPT)}
    assert set(code_in_first_column("### Reasons")) == refusing | {"not_performed"}


def test_every_precondition_is_listed_with_its_operations() -> None:
    listed = {(reason, operation) for reason, operation in _preconditions()}
    assert listed == {(one.reason, operation.value) for operation, some in PRECONDITIONS.items() for one in some}


def _preconditions() -> Iterator[tuple[str, str]]:
    section = REFERENCE.split("## Preconditions", 1)[1]
    for reason, operations in re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE):
        for operation in re.findall(r"`(\w+)`", operations):
            yield reason, operation


def test_every_event_of_a_rehearsal_is_described() -> None:
    shown = {next(iter(json.loads(event.replace("{…}", "{}")))) for event in code_in_first_column("## Rehearse")}
    assert shown == set(VERBS)


def test_the_example_policy_can_be_used(tmp_path: Path) -> None:
    example = REFERENCE.split("```toml\n", 1)[1].split("```", 1)[0]
    path = tmp_path / "my-cloud.toml"
    path.write_text(example)
    script = [
        '{"instance": {"vm_state": "active", "in_flight": "backup", "age": "20m"}}',
        '{"submit": "stop"}',
        '{"instance": {"vm_state": "active", "tags": ["build"]}}',
        '{"submit": "pause"}',
    ]
    answers = [json.loads(answer) for answer in rehearse(script, compile_named(path))]
    assert answers[1]["rule"] == "patient-backups"
    assert answers[1]["retry_after"] == 2400
    assert answers[3]["reason"] == "builder"
