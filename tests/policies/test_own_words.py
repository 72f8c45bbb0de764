"""What a policy says in its own words, of what it extends, and of launched and held instances."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core.errors import PolicyError
from interlock.core.operations import CATALOGUE, Operation
from interlock.core.policy import CompiledPolicy, Policy
from interlock.core.states import VmState
from interlock.core.views import View
from interlock.policies.language.bundle import read_bundle
from interlock.policies.language.loader import load
from tiers import tier

O = Operation  # noqa: E741
RULE = '[[rule]]\nid = "r"\noperations = ["stop"]\nverdict = "admit"\n'
BASE = """
[[rule]]
id = "always"
operations = ["delete"]
verdict = "after"
threshold = "1m"
fixed = true
[[rule]]
id = "takes-over"
operations = ["stop", "start"]
task_state = ["@same"]
verdict = "after"
threshold = "3m"
[[rule]]
id = "alone"
operations = ["reboot"]
verdict = "after"
threshold = "4m"
because = "Four minutes."
[[rule]]
id = "admitted"
operations = "*"
verdict = "admit"
"""


def read(text: str, **more: str) -> Policy:
    return read_bundle({"mine.toml": text, **{f"{name}.toml": one for name, one in more.items()}}, "mine.toml").policy


def refused(text: str, **more: str) -> tuple[str, str]:
    with pytest.raises(PolicyError) as caught:
        read(text, **more)
    return caught.value.message, caught.value.remedy or ""


# --------------------------------------------------------------------------------------------- launched, held, deleted


def test_a_rule_may_ask_whether_an_instance_was_launched_and_what_is_held() -> None:
    policy = read(
        RULE.replace('"r"', '"unlaunched"') + "launched = false\n" + RULE + 'held = ["@state"]\n'
        '[[rule]]\nid = "none-held"\noperations = "*"\nheld = ["none"]\nverdict = "deny"\n'
        '[[rule]]\nid = "same"\noperations = ["stop", "start"]\nheld = ["@same"]\nverdict = "admit"\n'
    )
    unlaunched, state, none, *same = policy.rules
    assert (unlaunched.launched, state.launched) == (False, None)
    assert state.held == frozenset(one for one in O if CATALOGUE[one].lane.value == "state")
    assert none.held == frozenset()
    assert [(rule.id, rule.held) for rule in same] == [
        ("same.start", frozenset({O.START})),
        ("same.stop", frozenset({O.STOP})),
    ]
    compiled = CompiledPolicy(policy)
    assert compiled.decide(View(operation=O.STOP, vm_state=VmState.ACTIVE, launched=False)).id == "unlaunched"
    assert compiled.decide(View(operation=O.STOP, vm_state=VmState.ACTIVE)).id == "none-held"


def test_none_cannot_stand_beside_other_kinds_that_are_held() -> None:
    message, _ = refused(RULE + 'held = ["stop", "none"]\n')
    assert message == 'mine.toml:5:17: "none" means that nothing is held, and cannot be combined with operations.'


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('"*"', None),
        ('["*"]', None),
        ('["*", "!active"]', frozenset(VmState) - {VmState.DELETED, VmState.ACTIVE}),
        ('["*", "deleted"]', frozenset(VmState)),
        ('["deleted"]', frozenset({VmState.DELETED})),
    ],
)
def test_a_star_is_every_state_but_deleted(written: str, meant: frozenset[VmState] | None) -> None:
    assert read(RULE + f"vm_state = {written}\n").rules[0].vm_states == meant


# ---------------------------------------------------------------------------------------------------------- thresholds


def thresholds(policy: Policy) -> dict[str, int | None]:
    return {rule.id: rule.threshold_ms for rule in policy.rules if rule.threshold_ms is not None}


def test_the_thresholds_of_what_is_extended_may_be_changed() -> None:
    before = thresholds(read(BASE))
    text = '[policy]\nextends = "base.toml"\n[thresholds]\n'
    changed = read(text + '"takes-over.stop" = "9m"\ntakes-over = "7m"\n', base=BASE)
    assert thresholds(changed) == {**before, "takes-over.start": 420_000, "takes-over.stop": 540_000}
    alone = read(text + 'alone = "1h"\ntakes-over.start = "1s"\n', base=BASE)
    assert thresholds(alone) == {**before, "alone": 3_600_000, "takes-over.start": 1_000}
    assert [rule.source for rule in alone.rules] == [rule.source.replace("mine", "base") for rule in read(BASE).rules]


def test_a_change_of_a_threshold_reaches_through_a_policy_between() -> None:
    middle = '[policy]\nextends = "base.toml"\n[thresholds]\nalone = "5m"\n' + RULE
    policy = read('[policy]\nextends = "middle.toml"\n[thresholds]\ntakes-over = "8m"\n', middle=middle, base=BASE)
    assert thresholds(policy) == {
        "always": 60_000,
        "takes-over.start": 480_000,
        "takes-over.stop": 480_000,
        "alone": 300_000,
    }


SILENT = """
[[rule]]
id = "quiet"
operations = ["stop", "start"]
task_state = ["@same"]
silent_for = "15s"
verdict = "after"
threshold = "3m"

[[rule]]
id = "deaf"
operations = ["pause"]
silent_for = "15s"
verdict = "deny"
"""


@pytest.mark.parametrize(
    ("lines", "stop", "start", "deaf"),
    [
        ('quiet = { threshold = "5s", silent_for = "2s" }', (5, 2), (5, 2), 15),
        ('quiet.silent_for = "2s"\ndeaf.silent_for = "1s"', (180, 2), (180, 2), 1),
        ('quiet = "5s"\n"quiet.stop" = { silent_for = "1s" }', (5, 1), (5, 15), 15),
        ('quiet.silent_for = "2s"\nquiet.stop.silent_for = "1s"\nquiet.start = "9s"', (180, 1), (9, 2), 15),
    ],
)
def test_the_silence_of_what_is_extended_may_be_changed_too(
    lines: str, stop: tuple[int, int], start: tuple[int, int], deaf: int
) -> None:
    policy = read(f'[policy]\nextends = "base.toml"\n[thresholds]\n{lines}\n', base=SILENT)
    found = {rule.id: (rule.threshold_ms, rule.silent_ms_min) for rule in policy.rules}
    expected = {"quiet.stop": stop, "quiet.start": start}
    assert {rule: found[rule] for rule in expected} == {
        rule: (threshold * 1000, silence * 1000) for rule, (threshold, silence) in expected.items()
    }
    assert found["deaf"] == (None, deaf * 1000)


@pytest.mark.parametrize(
    ("line", "said", "remedy"),
    [
        ('alone = { silent_for = "2s" }', "4:11: The rule 'alone', at base.toml:", "adds none"),
        ('alone = { silent = "2s" }', "4:11: Rule 'alone.silent' not found", ""),
        ('always.silent_for = "2s"', "4:8: The rule 'always', at base.toml:2, is fixed", ""),
        ('alone.threshold = "0s"', "4:19: Invalid threshold of alone: it must be greater than zero.", ""),
        ('always = "5m"', "4:1: The rule 'always', at base.toml:2, is fixed", ""),
        ('admitted = "5m"', "4:1: The rule 'admitted', at base.toml:20, has no threshold", "after"),
        ('takes-ovre = "5m"', "4:1: Rule 'takes-ovre' not found in the extended policy.", "'takes-over'"),
        ('r = "5m"', "4:1: 'r' is a rule of this file", "in the rule"),
        ('alone = "-3m"', "4:9: Invalid alone: '-3m'.", "duration"),
        ('alone = "1e99s"', "4:9: Invalid alone: '1e99s'.", "duration"),
        ('alone = "3 m"', "4:9: Invalid alone: '3 m'.", "duration"),
        ('alone = "٣m"', "4:9: Invalid alone: '٣m'.", "duration"),
        ("alone = 5", "4:9: Invalid alone: 5.", "duration"),
        ('alone = "0s"', "4:9: Invalid threshold of alone: it must be greater than zero.", ""),
        ('alone = ["5m"]', "4:9: Invalid alone: a list.", "duration"),
    ],
)
def test_a_threshold_that_cannot_be_changed_is_refused(line: str, said: str, remedy: str) -> None:
    message, hint = refused(f'[policy]\nextends = "base.toml"\n[thresholds]\n{line}\n{RULE}', base=BASE)
    assert message.startswith(f"mine.toml:{said}")
    assert remedy in hint


LOCKS = """
[[rule]]
id = "locked"
operations = ["*", "!unlock"]
locked = true
verdict = "deny"
fixed = true
exceptions = ["delete", "stop"]

[[rule]]
id = "open"
operations = ["delete", "pause"]
verdict = "admit"
"""


def excepting(lines: str, base: str = LOCKS) -> dict[str, frozenset[Operation]]:
    policy = read(f'[policy]\nextends = "base.toml"\n[exceptions]\n{lines}\n', base=base)
    return {rule.id: rule.operations for rule in policy.rules}


def test_a_policy_takes_operations_out_of_rules_that_it_extends() -> None:
    locked = frozenset(O) - {O.UNLOCK}
    assert excepting('locked = ["delete"]') == {"locked": locked - {O.DELETE}, "open": frozenset({O.DELETE, O.PAUSE})}
    assert excepting('locked = ["delete", "stop"]\nopen = ["pause"]')["open"] == frozenset({O.DELETE})
    assert excepting('open = ["delete", "pause"]') == {"locked": locked}


@pytest.mark.parametrize(
    ("line", "said", "remedy"),
    [
        ('locked = ["pause", "stop"]', "4:10: The rule 'locked', at base.toml:2, is fixed for pause.", "`exceptions`"),
        ('lock = ["stop"]', "4:1: Rule 'lock' not found in the extended policy.", "'locked'"),
        ('locked = "stop"', "4:10: locked must be a list of strings", ""),
        ('locked = ["stpo"]', "4:11: Unknown operation 'stpo'.", "'stop'"),
        ('r = ["stop"]', "4:1: 'r' is a rule of this file; [exceptions] changes", "itself"),
    ],
)
def test_an_exception_that_cannot_be_made_is_refused(line: str, said: str, remedy: str) -> None:
    message, hint = refused(f'[policy]\nextends = "base.toml"\n[exceptions]\n{line}\n{RULE}', base=LOCKS)
    assert message.startswith(f"mine.toml:{said}")
    assert remedy in hint


def test_a_fixed_rule_without_exceptions_has_none_and_no_other_rule_names_them() -> None:
    strict = LOCKS.replace('exceptions = ["delete", "stop"]\n', "")
    message, hint = refused('[policy]\nextends = "base.toml"\n[exceptions]\nlocked = ["stop"]\n', base=strict)
    assert "is fixed for stop" in message
    assert hint == "It allows no exceptions."
    loose = LOCKS.replace("fixed = true\n", "")
    assert "exceptions is valid only in a fixed rule" in refused(loose)[0]
    assert refused("[exceptions]\nr = ['stop']\n" + RULE)[0].startswith("mine.toml:1:1: [exceptions] changes the rules")


def test_thresholds_without_anything_extended_are_refused() -> None:
    assert refused("[thresholds]\nr = '3m'\n" + RULE)[0].startswith("mine.toml:1:1: [thresholds] changes the rules")


# --------------------------------------------------------------------------------------------------------------- names

NAMES = """
[names]
crash_dump = "trigger_crash_dump"
snapshot = ["snapshot", "snapshot-of-volume"]
reboot = "reboot_soft"
reboot_hard = "reboot_hard"
powering_off = "powering-off"
deleting = "being-deleted"
pause = "freeze"
suspend = "freeze"
"""


def test_a_policy_tells_what_its_own_world_calls_things_and_may_be_written_so() -> None:
    policy = read(
        NAMES + "[sets]\ndumps = ['trigger-crash-dump', '@create']\n"
        "[[rule]]\nid = 'r'\noperations = ['trigger_crash_dump', 'snapshot_of_volume']\n"
        "task_state = ['being_deleted']\noutstanding = ['trigger_crash_dump']\nverdict = 'deny'\n"
    )
    assert policy.names["snapshot"] == ("snapshot", "snapshot-of-volume")
    assert policy.names["powering_off"] == ("powering-off",)
    (rule,) = policy.rules
    assert rule.operations == {O.CRASH_DUMP, O.SNAPSHOT}
    assert rule.task_states == frozenset({"deleting"})
    assert rule.outstanding == frozenset({O.CRASH_DUMP})


def test_what_extends_a_policy_has_its_names_and_may_change_them() -> None:
    mine = "[policy]\nextends = 'base.toml'\n[names]\nsnapshot = 'image'\n"
    policy = read(mine + RULE.replace("stop", "trigger_crash_dump"), base=NAMES + RULE.replace('"r"', '"b"'))
    assert (policy.names["snapshot"], policy.names["crash_dump"]) == (("image",), ("trigger_crash_dump",))
    assert policy.rules[0].operations == {O.CRASH_DUMP}


def test_a_list_of_operations_may_mix_names_of_hard_and_soft_variants() -> None:
    mixed = RULE.replace('"stop"', '"reboot_soft", "stop", "reboot_hard"')
    (rule,) = read(NAMES + mixed).rules
    assert (rule.id, sorted(rule.operations), rule.hard) == ("r", [O.REBOOT, O.STOP], None)
    one = RULE.replace('"stop"', '"reboot_hard", "stop"')
    assert [(rule.id, rule.family, sorted(rule.operations), rule.hard) for rule in read(NAMES + one).rules] == [
        ("r", "r", [O.STOP], None),
        ("r#hard", "r", [O.REBOOT], True),
    ]
    soft = RULE.replace('"stop"', '"reboot_soft"')
    assert [(rule.id, rule.hard) for rule in read(NAMES + soft).rules] == [("r#soft", False)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NAMES + RULE.replace("stop", "freeze"), "13:15: Ambiguous name 'freeze': pause or suspend."),
        (NAMES + RULE + "outstanding = ['reboot_soft']\n", "15:16: 'reboot_soft' is only one variant of 'reboot'."),
        (NAMES + RULE.replace("stop", "reboot_hard") + "hard = true\n", "13:15: 'reboot_hard' is only one variant"),
        (NAMES + RULE.replace("stop", "trigger_crash_dmp"), "13:15: Unknown operation 'trigger_crash_dmp'."),
        (NAMES + RULE + "task_state = ['freeze']\n", "15:15: Unknown task_state 'freeze'."),
        ("[names]\nrebot = 'x'\n" + RULE, "2:1: Unknown operation, hard variant or task state 'rebot'."),
        ("[names]\nactive = 'x'\n" + RULE, "2:1: Unknown operation, hard variant or task state 'active'."),
        ("[names]\npause = 'suspend'\n" + RULE, "2:9: Invalid name 'suspend' for pause: it is a word of the language"),
        ("[names]\npause = ['x', 'powering-off']\n" + RULE, "2:15: Invalid name 'powering-off' for pause"),
        ("[names]\npause = []\n" + RULE, "2:9: pause must be a name, or a list of 1 to 8 names."),
        ("[names]\npause = 7\n" + RULE, "2:9: pause must be a name"),
        ("[names]\npause = ['x', 'x']\n" + RULE, "2:15: pause has the name 'x' twice."),
        ("[names]\npause = ['x', 'a b']\n" + RULE, "2:15: Invalid name 'a b': expected at most 64 letters"),
        (f"[names]\npause = '{'x' * 65}'\n" + RULE, "2:9: Invalid name"),
        ("[names]\npowering-off = 'x'\npowering_off = 'y'\n" + RULE, "2:1: 'powering_off' is named twice."),
        ("names = 1\n" + RULE, "1:1: names must be a table"),
    ],
)
def test_a_name_that_would_not_be_understood_is_refused(text: str, said: str) -> None:
    assert refused(text)[0].startswith(f"mine.toml:{said}")


# -------------------------------------------------------------------------------------------------------------- digest


def test_the_digest_is_of_what_decides_however_it_is_written() -> None:
    text = '[policy]\nextends = "standard"\n' + RULE.replace('"stop"', '"stop", "start"')
    same = read(text).digest
    assert len(same) == 64
    assert int(same, 16) >= 0
    for other in (
        "\n\n# More.\n" + text.replace("\n", "\r\n"),
        text.replace('"stop", "start"', '\n  "start",  # two\n  "stop", "start",\n'),
        text + 'because = "So."\nin_turn = true\nvm_state = "*"\n',
        text.replace("[policy]", '[policy]\nname = "else"\ndescription = "Else."'),
        text + "[names]\npause = 'freeze'\n",
    ):
        assert read(other).digest == same, other
    for other in (
        text.replace('"start"', '"pause"'),
        text + 'reason = "so"\n',
        text + "in_turn = false\n",
        text.replace('"r"', '"s"'),
        text.replace("[policy]", "[policy]\noutstanding_max = 3"),
        text + '[thresholds]\nsilent-power = "5m"\n',
        text.replace("standard", "take2"),
    ):
        assert read(other).digest != same, other


def test_the_order_of_rules_decides() -> None:
    first, second = RULE, RULE.replace('"r"', '"s"')
    assert read(first + second).digest != read(second + first).digest
    assert load("standard").digest != load("take2").digest


# --------------------------------------------------------------------------------------------------------------- sets


def test_sets_that_name_one_another_many_times_cost_no_more_than_once() -> None:
    text = "[sets]\n" + "".join(f's{i} = ["@s{i + 1}", "@s{i + 1}"]\n' for i in range(150))
    assert read(text + 's150 = ["stop"]\n' + RULE.replace("stop", "@s0")).rules[0].operations == {O.STOP}


def test_a_group_that_there_is_not_is_found_in_a_set_that_nobody_uses() -> None:
    message, remedy = refused("[sets]\nmine = ['stop', '@sttae']\n" + RULE)
    assert message == "mine.toml:2:17: Unknown group @sttae."
    assert "'state'" in remedy


def test_a_letter_that_only_looks_right_is_named() -> None:
    message, remedy = refused(RULE.replace('"r"', '"p\u0430use"'))
    assert message.startswith("mine.toml:2:6: Invalid id 'p\u0430use': expected at most 100 letters")
    assert remedy == "The '\u0430' in it is CYRILLIC SMALL LETTER A."
    _, remedy = refused(RULE.replace("stop", "\uff53\uff54\uff4f\uff50"))
    assert remedy == "Did you mean 'stop'? The '\uff53' in it is FULLWIDTH LATIN SMALL LETTER S."


WORDS = st.sampled_from(["stop", "start", "reboot", "@state", "@component", "@a", "@b", "*"])


@settings(max_examples=tier(40, 1000))
@given(
    a=st.lists(WORDS.filter(lambda word: word not in {"@a", "@b"}), min_size=1, max_size=4),
    b=st.lists(WORDS.filter(lambda word: word != "@b"), min_size=1, max_size=4),
    wanted=st.lists(WORDS, min_size=1, max_size=4),
    unwanted=st.lists(WORDS, max_size=2),
)
def test_a_list_means_what_a_plain_reading_of_it_means(
    a: list[str], b: list[str], wanted: list[str], unwanted: list[str]
) -> None:
    def meaning(words: list[str]) -> set[Operation]:
        found: set[Operation] = set()
        for word in words:
            if word == "*":
                found |= set(O)
            elif word in {"@a", "@b"}:
                found |= meaning(a if word == "@a" else b)
            elif word.startswith("@"):
                found |= {one for one in O if CATALOGUE[one].lane.value == word[1:]}
            else:
                found.add(O(word))
        return found

    listed = [*wanted, *(f"!{word}" for word in unwanted)]
    text = f"[sets]\na = {a}\nb = {b}\n" + RULE.replace('["stop"]', str(listed))
    expected = meaning(wanted) - meaning(unwanted)
    if expected:
        assert read(text).rules[0].operations == expected
    else:
        assert "matches no operation" in refused(text)[0]


def test_the_same_files_mean_the_same_on_a_disk(tmp_path: Path) -> None:
    for name, text in (("mine.toml", '[policy]\nextends = "base.toml"\n' + RULE), ("base.toml", BASE)):
        (tmp_path / name).write_text(text)
    assert load(tmp_path / "mine.toml").digest == read('[policy]\nextends = "base.toml"\n' + RULE, base=BASE).digest
