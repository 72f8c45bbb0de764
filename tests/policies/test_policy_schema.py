"""Editors are told of policy files what reading them says."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner

from interlock.cli.commands.policy.group import schema_command
from interlock.cli.context import Invocation
from interlock.core.errors import PolicyError
from interlock.core.operations import TASK_STATES, Operation
from interlock.core.states import VmState
from interlock.policies.language.bundle import read_bundle
from interlock.policies.language.json_schema import schema
from interlock.policies.language.loader import builtin_names, read
from interlock.policies.language.schema import HEADER_KEYS, RULE_KEYS

SCHEMA = schema()
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.toml"))
RULE = '[[rule]]\nid = "r"\noperations = ["stop"]\nverdict = "admit"\n'
AFTER = RULE.replace("admit", "after") + 'threshold = "3m"\n'
EXTENDS = '[policy]\nextends = "standard"\n'

GOOD = (
    RULE,
    AFTER + 'before = "redundant"\nmeasured_from = "task_started"\n',
    RULE + 'outstanding = ["none"]\nheld = ["@same"]\ntask_state = "*"\nvm_state = ["*", "deleted", "!soft-delete"]\n',
    RULE.replace("stop", "@mine") + '[sets]\nmine = ["start", "@state"]\nother = ["powering-off"]\n',
    EXTENDS,
    EXTENDS + '[thresholds]\nsilent-power = "5m"\n',
    '[policy]\nextends = "standard"\noutstanding_max = 3\nname = "x"\ndescription = "y"\n',
    '[names]\ncrash_dump = "dump"\nreboot_hard = ["x", "y"]\npowering-off = "z"\n' + RULE.replace("stop", "dump"),
    '[policy]\nextends = "nova"\n' + RULE.replace("stop", "trigger_crash_dump"),
    RULE + 'requested_by = ["alice", "ci-*"]\n',
    RULE + 'tags = ["x"]\nroles = ["member"]\nlocked = true\nsilent_for = "1m30s"\nlaunched = false\n',
)
BROKEN = (
    "",
    "[polcy]\n" + RULE,
    "[policy]\nnme = 'x'\n" + RULE,
    "[policy]\noutstanding_max = 0\n" + RULE,
    "[policy]\nextends = 'standrad'\n",
    "[rule]\nid = 'x'\n",
    '[thresholds]\nsilent-power = "5m"\n' + RULE,
    EXTENDS + '[thresholds]\nsilent-power = "-3m"\n',
    EXTENDS + '[thresholds]\nsilent-power = "0s"\n',
    "[names]\nrebot = 'x'\n" + RULE,
    "[names]\nreboot = []\n" + RULE,
    "[names]\nreboot = 'a b'\n" + RULE,
    "[sets]\nBad = ['stop']\n" + RULE,
    "[sets]\nstate = ['stop']\n" + RULE,
    "[sets]\nmine = ['sotp']\n" + RULE,
    "[sets]\nmine = ['!stop']\n" + RULE,
    "[sets]\nmine = []\n" + RULE,
    RULE + 'thresold = "3m"\n',
    RULE.replace('"stop"', '"stpo"'),
    RULE.replace('["stop"]', '"stop"'),
    RULE + 'vm_state = ["activ"]\n',
    RULE + 'vm_state = ["@same!"]\n',
    RULE + 'task_state = ["powering-of"]\n',
    RULE + 'roles = ["root"]\n',
    RULE + 'outstanding = ["none", "stop"]\n',
    RULE + "vm_state = []\n",
    RULE + 'locked = "yes"\n',
    RULE + "silent_for = 15\n",
    RULE + 'silent_for = "3 m"\n',
    RULE + 'threshold = "3m"\n',
    RULE + 'grace = "3s"\n',
    RULE + 'reason = "Not A Code"\n',
    RULE + 'because = ""\n',
    RULE + "tags = ['']\n",
    RULE.replace("admit", "after"),
    AFTER.replace("3m", "0s"),
    AFTER + "in_turn = true\n",
    RULE.replace("admit", "admitt"),
    RULE.replace('verdict = "admit"\n', ""),
    RULE.replace('id = "r"\n', ""),
    RULE.replace('"r"', '"а"'),  # noqa: RUF001 - a Cyrillic letter
    RULE.replace('"r"', "1979-05-27"),
)


def plain(text: str) -> Any:
    """A text as JSON would have it."""
    return json.loads(json.dumps(tomllib.loads(text), default=lambda value: {"date": str(value)}))


def test_the_schema_is_one_of_draft_7() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", builtin_names())
def test_a_built_in_policy_is_taken(name: str) -> None:
    (text,) = read(name).files.values()
    VALIDATOR.validate(plain(text))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_taken(path: Path) -> None:
    VALIDATOR.validate(plain(path.read_text()))


@pytest.mark.parametrize("text", GOOD)
def test_what_can_be_read_is_taken(text: str) -> None:
    read_bundle({"a.toml": text}, "a.toml")
    VALIDATOR.validate(plain(text))


@pytest.mark.parametrize("text", BROKEN)
def test_what_cannot_be_read_is_not_taken(text: str) -> None:
    with pytest.raises(PolicyError):
        read_bundle({"a.toml": text}, "a.toml")
    assert not VALIDATOR.is_valid(plain(text))


def test_every_key_has_a_description_and_an_example_that_is_taken() -> None:
    for keys, properties in (
        (HEADER_KEYS, SCHEMA["properties"]["policy"]["properties"]),
        (RULE_KEYS, SCHEMA["definitions"]["rule"]["properties"]),
    ):
        assert [key.name for key in keys] == list(properties)
        for name, value in properties.items():
            assert value["description"]
            (example,) = value["examples"]
            jsonschema.Draft7Validator({**value, "definitions": SCHEMA["definitions"]}).validate(example), name


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        ("operation", {*Operation, "@state", "@component", "!@record", "!lock", "*"}),
        ("vm_state", {*VmState, "@sources", "!deleted", "*"}),
        ("task_state", {*TASK_STATES, "none", "@reboot", "@same", "!none", "*"}),
        ("kind", {*Operation, "@same"}),
        ("role", {"reader", "member", "admin"}),
    ],
)
def test_an_editor_can_complete_every_word(definition: str, words: set[str]) -> None:
    assert words <= set(SCHEMA["definitions"][definition]["anyOf"][0]["enum"])


def test_a_word_with_hyphens_is_taken_and_one_that_only_begins_right_is_not() -> None:
    pattern = SCHEMA["definitions"]["task_state"]["anyOf"][1]["pattern"]
    assert re.search(pattern, "powering-off")
    assert re.search(pattern, "!powering-off")
    assert not re.search(pattern, "powering-offf")


def test_the_command_prints_it_for_people_and_for_programs() -> None:
    runner = CliRunner()
    printed = runner.invoke(schema_command, [], obj=Invocation({}))
    assert printed.exit_code == 0
    assert json.loads(printed.output) == SCHEMA
    line = runner.invoke(schema_command, ["--json"], obj=Invocation({}))
    assert json.loads(line.output) == SCHEMA
    assert line.output.count("\n") == 1
