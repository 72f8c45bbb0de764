"""A policy file means what it says, and one that is wrong says where and what was expected."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core.durations import format_seconds, parse_duration
from interlock.core.errors import PolicyError
from interlock.core.operations import CATALOGUE, TASK_STATES, Lane, Operation
from interlock.core.policy import Before, MeasuredFrom, Policy, Verdict
from interlock.core.states import VmState
from interlock.core.views import View
from interlock.policies.language.loader import FILE_SIZE_MAX_BYTES, builtin_names, compile_named, load, read
from interlock.policies.language.source_location import Positions
from tiers import tier

O = Operation  # noqa: E741
RULE = '[[rule]]\nid = "r"\noperations = ["stop"]\nverdict = "admit"\n'


def write(folder: Path, text: str | bytes, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def one_rule(folder: Path, *lines: str, verdict: str = "admit") -> Policy:
    head = [line for line in ('id = "r"', 'operations = ["stop"]') if line.split()[0] not in "\n".join(lines)]
    return load(write(folder, "\n".join(["[[rule]]", *head, f'verdict = "{verdict}"', *lines])))


# ---------------------------------------------------------------------------------------------------- what is read


def test_every_key_of_a_rule_is_read(tmp_path: Path) -> None:
    text = """
    [policy]
    name = "cloud"
    description = "Ours."
    outstanding_max = 4

    [[rule]]
    id = "all"
    operations = ["reboot", "stop"]
    vm_state = ["active", "soft-delete"]
    task_state = ["powering-off", "none"]
    outstanding = ["start"]
    roles = ["member", "admin"]
    locked = false
    blocked = true
    tags = ["blue"]
    host_reachable = true
    hard = false
    silent_for = "15s"
    verdict = "after"
    threshold = "1m30s"
    measured_from = "task_started"
    before = "redundant"
    reason = "because_so"
    because = "So."
    fixed = true
    """
    path = write(tmp_path, text)
    policy = load(path)
    (rule,) = policy.rules
    assert (policy.name, policy.outstanding_max, read(path).description) == ("cloud", 4, "Ours.")
    assert rule.operations == frozenset({O.REBOOT, O.STOP})
    assert rule.vm_states == frozenset({VmState.ACTIVE, VmState.SOFT_DELETED})
    assert rule.task_states == frozenset({"powering_off", "none"})
    assert rule.outstanding == frozenset({O.START})
    assert rule.roles == frozenset({"member", "admin"})
    assert (rule.locked, rule.blocked, rule.host_reachable, rule.hard) == (False, True, True, False)
    assert rule.tags == frozenset({"blue"})
    assert (rule.silent_ms_min, rule.threshold_ms) == (15_000, 90_000)
    assert (rule.verdict, rule.measured_from, rule.before) == (
        Verdict.AFTER,
        MeasuredFrom.TASK_STARTED,
        Before.REDUNDANT,
    )
    assert (rule.reason, rule.because, rule.fixed, rule.source) == ("because_so", "So.", True, f"{path}:7")


def test_a_group_stands_for_its_members(tmp_path: Path) -> None:
    rule = one_rule(
        tmp_path, 'operations = ["@component", "!swap-volume"]', 'task_state = ["@reboot"]', 'outstanding = "*"'
    ).rules[0]
    components = frozenset(operation for operation in O if CATALOGUE[operation].lane is Lane.COMPONENT)
    assert rule.operations == components - {O.SWAP_VOLUME}
    assert rule.task_states == frozenset(CATALOGUE[O.REBOOT].phases + CATALOGUE[O.REBOOT].hard_phases)
    assert rule.outstanding == frozenset(O)


def test_a_star_is_any_and_none_is_nothing(tmp_path: Path) -> None:
    rule = one_rule(
        tmp_path, 'operations = "*"', 'vm_state = "*"', 'task_state = ["*"]', 'outstanding = ["none"]'
    ).rules[0]
    assert rule.operations == frozenset(O)
    assert (rule.vm_states, rule.task_states) == (None, None)
    assert rule.outstanding == frozenset()
    busy = one_rule(tmp_path, 'task_state = ["*", "!none"]').rules[0]
    assert busy.task_states == frozenset(TASK_STATES)


def test_a_set_of_ones_own_may_be_used_in_every_list_and_in_other_sets(tmp_path: Path) -> None:
    text = """
    [sets]
    power = ["start", "stop"]
    more = ["@power", "reboot"]
    [[rule]]
    id = "r"
    operations = ["@more"]
    outstanding = ["@power"]
    verdict = "admit"
    """
    rule = load(write(tmp_path, text)).rules[0]
    assert rule.operations == frozenset({O.START, O.STOP, O.REBOOT})
    assert rule.outstanding == frozenset({O.START, O.STOP})


def test_same_and_sources_mean_something_else_for_each_operation(tmp_path: Path) -> None:
    rules = one_rule(
        tmp_path, 'operations = ["stop", "pause"]', 'vm_state = ["@sources"]', 'outstanding = ["@same"]'
    ).rules
    assert [rule.id for rule in rules] == ["r.stop", "r.pause"]
    assert [rule.vm_states for rule in rules] == [CATALOGUE[O.STOP].sources, CATALOGUE[O.PAUSE].sources]
    assert [rule.outstanding for rule in rules] == [frozenset({O.STOP}), frozenset({O.PAUSE})]
    assert one_rule(tmp_path, 'outstanding = ["@same"]').rules[0].id == "r"


def test_preempt_has_a_grace_and_admit_may_be_out_of_turn(tmp_path: Path) -> None:
    assert one_rule(tmp_path, 'grace = "0s"', verdict="preempt").rules[0].grace_ms == 0
    assert one_rule(tmp_path, "in_turn = false").rules[0].in_turn is False


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("500ms", 500), ("15s", 15_000), ("3m", 180_000), ("1h30m", 5_400_000), ("0.25s", 250), ("1d", 86_400_000)],
)
def test_a_length_of_time(text: str, milliseconds: int) -> None:
    assert parse_duration(text) == milliseconds
    assert parse_duration(format_seconds(milliseconds)) == milliseconds


@pytest.mark.parametrize("text", ["", "3", "m", "-3s", "3 m", "3M", "0.0001s", "99999d", "3s" * 40, "٣s"])
def test_what_is_no_length_of_time(text: str) -> None:
    assert parse_duration(text) is None


# ------------------------------------------------------------------------------------------------------- extending


def test_rules_that_extend_are_asked_first_and_a_fixed_one_before_them(tmp_path: Path) -> None:
    write(
        tmp_path,
        '[sets]\npower = ["stop"]\n'
        '[[rule]]\nid = "base-fixed"\noperations = ["delete"]\nverdict = "admit"\nfixed = true\n'
        '[[rule]]\nid = "base-free"\noperations = "*"\nverdict = "admit"\n',
        "base.toml",
    )
    text = (
        '[policy]\nextends = "base.toml"\n'
        '[[rule]]\nid = "mine"\noperations = ["delete", "@power"]\nverdict = "deny"\nreason = "no"\n'
    )
    policy = load(write(tmp_path, text))
    assert [rule.id for rule in policy.rules] == ["base-fixed", "mine", "base-free"]
    assert policy.name == "mine"
    compiled = compile_named(tmp_path / "mine.toml")
    assert compiled.decide(View(operation=O.DELETE, vm_state=VmState.ACTIVE)).id == "base-fixed"
    assert compiled.decide(View(operation=O.STOP, vm_state=VmState.ACTIVE)).id == "mine"
    assert compiled.decide(View(operation=O.START, vm_state=VmState.ACTIVE)).id == "base-free"


def test_a_built_in_can_be_extended_with_nothing_but_a_limit(tmp_path: Path) -> None:
    policy = load(write(tmp_path, '[policy]\nextends = "standard"\noutstanding_max = 3\n'))
    assert policy.outstanding_max == 3
    assert policy.rules == load("standard").rules


def test_a_policy_that_extends_itself_is_refused(tmp_path: Path) -> None:
    write(tmp_path, '[policy]\nextends = "b.toml"\n', "a.toml")
    write(tmp_path, '[policy]\n\nextends = "./a.toml"\n', "b.toml")
    with pytest.raises(PolicyError, match=r"b\.toml:3:11: The policy extends itself"):
        load(tmp_path / "a.toml")


def test_an_operation_that_no_driver_performs_is_denied_before_any_rule() -> None:
    compiled = compile_named("standard", performs={O.STOP})
    assert compiled.decide(View(operation=O.PAUSE, vm_state=VmState.ACTIVE)).reason == "not_performed"
    assert compiled.decide(View(operation=O.STOP, vm_state=VmState.ACTIVE)).id == "stop"


# ------------------------------------------------------------------------------------------------------ what is wrong

WRONG = [
    ('[policy]\nnme = "x"\n' + RULE, "2:1", r"Unknown key 'nme' in \[policy\]", "name"),
    ("[polcy]\n" + RULE, "1:1", r"Unknown section 'polcy'", "policy"),
    (RULE + 'thresold = "3m"\n', "5:1", r"Unknown key 'thresold'", "threshold"),
    (RULE.replace('"stop"', '"stpo"'), "3:15", r"Unknown operation 'stpo'", "stop"),
    (RULE + 'vm_state = ["activ"]\n', "5:13", r"Unknown vm_state 'activ'", "active"),
    (RULE + 'task_state = ["powering-of"]\n', "5:15", r"Unknown task_state", "powering_off"),
    (RULE + 'roles = ["root"]\n', "5:10", r"Unknown role 'root'", "reader"),
    (RULE + 'outstanding = ["@stat"]\n', "5:16", r"Unknown group @stat", "state"),
    (RULE + 'outstanding = ["none", "stop"]\n', "5:16", r"cannot be combined", ""),
    (RULE + 'outstanding = ["none", "!stop"]\n', "5:16", r"cannot be combined", ""),
    (RULE + "vm_state = []\n", "5:12", r"empty list", "Leave"),
    (RULE + 'vm_state = ["active", "!active"]\n', "5:12", r"matches no vm_state", "Leave"),
    (RULE + 'vm_state = "active"\n', "5:12", r'list of strings, such as \["active", "paused"\], or', ""),
    (RULE + "vm_state = [1]\n", "5:13", r'list of strings, such as \["active", "paused"\], or', ""),
    (RULE + 'requested_by = "ci-*"\n', "5:16", r'list of strings, such as \["alice", "ci-\*"\], or', ""),
    ("[sets]\nmine = 'stop'\n" + RULE, "2:8", r'list of strings, such as \["stop"\], or', ""),
    (RULE + 'locked = "yes"\n', "5:10", r"true or false", ""),
    (RULE + "silent_for = 15\n", "5:14", r"Invalid silent_for: 15", "15s"),
    (RULE + 'threshold = "3m"\n', "5:1", r"only with verdict = 'after'", "Remove"),
    (RULE + 'grace = "3s"\n', "5:1", r"only with verdict = 'preempt'", "Remove"),
    (RULE + 'reason = "Not A Code"\n', "5:10", r"small letters", ""),
    (RULE + 'because = ""\n', "5:11", r"1 to 1000 characters", ""),
    (RULE + 'because = "After {threshold}."\n', "5:11", r"no threshold: its verdict is 'admit'", "without"),
    (RULE + "tags = [\n'',\n]\n", "6:1", r"tags must be", ""),
    (RULE.replace("admit", "after"), "1:1", r"needs a threshold", "3m"),
    (RULE.replace("admit", "after") + 'threshold = "0s"\n', "5:13", r"needs a threshold", "preempt"),
    (RULE.replace("admit", "admitt"), "4:11", r"Invalid verdict: 'admitt'", "admit"),
    (RULE.replace('verdict = "admit"\n', ""), "1:1", r"no verdict", "verdict"),
    (RULE.replace('id = "r"\n', ""), "1:1", r"no id", "id"),
    (RULE + RULE, "6:6", r"'r' already exists, at .*:1", "id of its own"),
    ("# nothing\n", "1:1", r"no rule", r"\[\[rule\]\]"),
    ('[rule]\nid = "x"\n', "1:1", r"two brackets", ""),
    ("[sets]\n\nstate = ['stop']\n" + RULE, "3:1", r"Group @state already exists", "another"),
    ("[sets]\nBad = ['stop']\n" + RULE, "2:1", r"name of a set", ""),
    ("[sets]\nmine = ['sotp']\n" + RULE, "2:9", r"Unknown word 'sotp'", "stop"),
    ("[sets]\na = ['@b']\nb = ['@a']\n" + RULE.replace('"stop"', '"@a"'), "2:1", r"contains itself", ""),
    ("[sets]\nmine = ['!stop']\n" + RULE, "2:9", r"cannot exclude words", "used"),
    ("[policy]\noutstanding_max = 0\n" + RULE, "2:19", r"whole number", ""),
    ("[policy]\noutstanding_max = true\n" + RULE, "2:19", r"whole number", ""),
    ("[policy]\nextends = 'standrad'\n", "2:11", r"Built-in policy 'standrad' not found", "standard"),
    ("[policy]\nextends = 'none.toml'\n", "2:11", r"is not found", ""),
    (RULE + "\n\nlocked = = true\n", "7:10", r"not TOML", ""),
    ('x = "\n', "1:6", r"not TOML", ""),
    (RULE + RULE.replace('"r"', '"s"') + "fixed = true\n", "9:9", r"fixed rule 's' stands behind 'r'", "beginning"),
    (b"# fine\n[policy]\nname = '\xff'\n", "3:9", r"not UTF-8", "UTF-8"),
    (RULE + 'operations.x = ["stop"]', "5:24", r"not TOML", ""),
    ("rule = [{id = 'r', operations = ['stop'], verdict = 'admit', blah = 1}]", "1:62", r"Unknown key 'blah'", ""),
    ("a = " + "[" * 5000 + "]" * 5000, "1:37", r"not TOML", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "at", "message", "remedy"), WRONG)
def test_what_is_wrong_is_said_with_its_place_and_what_was_expected(
    tmp_path: Path, text: str | bytes, at: str, message: str, remedy: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(PolicyError, match=message) as caught:
        load(path)
    assert caught.value.message.startswith(f"{path}:{at}: "), caught.value.message
    if remedy:
        assert caught.value.remedy is not None
        assert re.search(remedy, caught.value.remedy)


def test_an_id_of_the_base_cannot_be_used_again(tmp_path: Path) -> None:
    text = '[policy]\nextends = "standard"\n\n' + RULE.replace('"r"', '"delete"')
    with pytest.raises(PolicyError, match=r":5:6: The id 'delete' already exists, at standard\.toml:\d+"):
        load(write(tmp_path, text))


def test_a_file_that_is_not_there_or_too_large_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="File not found"):
        load(tmp_path / "absent.toml")
    with pytest.raises(PolicyError, match="Not a regular file: a directory"):
        load(tmp_path)
    with pytest.raises(PolicyError, match="larger than"):
        load(write(tmp_path, b"#" * (FILE_SIZE_MAX_BYTES + 1)))
    with pytest.raises(PolicyError):
        load("with\0nul.toml")


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one() -> None:
    with pytest.raises(PolicyError, match="Built-in policy 'standart' not found") as caught:
        load("standart")
    assert "'standard'" in str(caught.value.remedy)


@pytest.mark.parametrize("name", builtin_names())
def test_a_built_in_reads_and_describes_itself(name: str) -> None:
    text = read(name)
    assert text.policy.name == name
    assert text.description
    assert all(rule.source.startswith(f"{name}.toml:") for rule in text.policy.rules)


# -------------------------------------------------------------------------------------------------------- positions


def test_positions_are_found_past_everything_that_looks_like_something_else() -> None:
    text = '''# [[rule]]
[policy]
description = """
[[rule]]
id = "not this"  \\" ""
"""""
'quoted.key' = '[[rule]]'  # = x
[[rule]]
tags = [
  "#", # ]
  "]",
]
"id" = 'a\\'
[ [ rule ] ]
'''.replace("[ [ rule ] ]", "[[ rule ]]")
    positions = Positions(
        text + "  id = '''\n'''\r\n[rule.sub]\nx.y = {a = 1, b = [']', 1979-05-27 07:32:00,2]}\nz = 1"
    )
    for path, key, value in (
        (("policy",), (2, 1), (2, 1)),
        (("policy", "description"), (3, 1), (3, 15)),
        (("policy", "quoted.key"), (7, 1), (7, 16)),
        (("rule",), (8, 1), (8, 1)),
        (("rule", 0), (8, 1), (8, 1)),
        (("rule", 0, "tags"), (9, 1), (9, 8)),
        (("rule", 0, "tags", 1), (11, 3), (11, 3)),
        (("rule", 0, "id"), (13, 1), (13, 8)),
        (("rule", 1), (14, 1), (14, 1)),
        (("rule", 1, "id"), (15, 3), (15, 8)),
        (("rule", 1, "sub"), (17, 1), (17, 1)),
        (("rule", 1, "sub", "x"), (18, 1), (18, 1)),
        (("rule", 1, "sub", "x", "y"), (18, 3), (18, 7)),
        (("rule", 1, "sub", "x", "y", "b"), (18, 15), (18, 19)),
        (("rule", 1, "sub", "x", "y", "b", 2), (18, 45), (18, 45)),
        (("rule", 1, "sub", "z"), (19, 1), (19, 5)),
        (("rule", 1, "absent"), (14, 1), (14, 1)),
        (("nowhere",), (1, 1), (1, 1)),
    ):
        assert (positions.of_key(path), positions.of_value(path)) == (key, value), path
    assert positions.lines_of_items("rule") == (8, 14)


@settings(max_examples=tier(60, 1500))
@given(st.text(alphabet='[]"\'=#.\n\\{},rule id"stop"@*!-1 ', max_size=120))
def test_whatever_stands_in_a_file_the_answer_is_a_policy_or_a_policy_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = write(tmp_path_factory.getbasetemp(), text, "fuzzed.toml")
    said = None
    try:
        load(path)
    except PolicyError as error:
        said = error.message
    assert said is None or said.startswith(f"{path}:")


@pytest.mark.parametrize(("threshold", "text"), [("90s", "90 seconds"), ("60s", "1 minute"), ("2h", "2 hours")])
def test_a_reason_names_the_threshold_that_holds(tmp_path: Path, threshold: str, text: str) -> None:
    base = write(tmp_path, f'[policy]\nextends = "standard"\n\n[thresholds]\n"again-power" = "{threshold}"\n')
    top = tmp_path / "top.toml"
    top.write_text(f'[policy]\nextends = "{base.name}"\n')
    for path in (base, top):
        texts = {rule.id: rule.because for rule in load(path).rules}
        expected = f"Already in progress. After {text} without progress, another request takes over."
        assert texts["again-power.stop"] == expected
        assert texts["again-long.migrate"] == expected.replace(text, "10 minutes")


@pytest.mark.parametrize("name", builtin_names())
def test_no_reason_of_a_built_in_policy_keeps_a_placeholder(name: str) -> None:
    assert not [rule.id for rule in load(name).rules if "{" in (rule.because or "")]
