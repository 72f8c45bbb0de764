"""What operators write, judged by the model checker: several roles, surroundings, holds, and switches of policy."""

from __future__ import annotations

import json
from typing import Any

import pytest
from policy_samples import EXAMPLES, site

from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.states import VmState
from interlock.policies.language.loader import compile_named
from interlock.policies.model_checker import Exploration, Violation, explore
from interlock.policies.rehearsal.runner import rehearse

O = Operation  # noqa: E741
V = VmState

NO_RESET = """
[[rule]]
id = "no-reset"
operations = ["reset_state"]
verdict = "deny"
reason = "no_reset"
because = "States are not edited by hand here."
"""


def search(policy: CompiledPolicy, *operations: Operation, **more: Any) -> Exploration:
    fields: dict[str, Any] = {"starts": [V.ACTIVE], "outstanding_max": 2, "operations": operations} | more
    return explore(policy, **fields)


def the_one(found: Exploration, what: str) -> Violation:
    return next(violation for violation in found.violations if what in violation.what)


def plays(violation: Violation, policy: CompiledPolicy, *more: dict[str, Any]) -> list[dict[str, Any]]:
    """Rehearse a story and what is tried after it; return the answers to that."""
    lines = [*violation.story, *(json.dumps(event) for event in more)]
    answers = [json.loads(answer) for answer in rehearse(lines, policy)]
    assert not [answer for answer in answers if "error" in answer]
    return answers[len(violation.story) :]


# ------------------------------------------------------------------------------------------------------- all roles

STAFF_SNAPSHOTS = """
[[rule]]
id = "snapshots-by-staff"
operations = ["snapshot"]
roles = ["member"]
verdict = "deny"
reason = "staff_only"
because = "Staff take snapshots."

[[rule]]
id = "delete-waits-for-snapshot"
operations = ["delete", "force_delete"]
task_state = ["@snapshot"]
outstanding = ["*", "!delete", "!force_delete"]
verdict = "admit"
because = "A snapshot by staff is finished first."
"""


def test_what_an_admin_starts_and_a_member_waits_for_is_one_story() -> None:
    """Neither role alone gets an instance stuck: staff do not wait, and members take no snapshot."""
    policy = site(STAFF_SNAPSHOTS + NO_RESET)
    found = search(policy, O.SNAPSHOT, O.DELETE, O.FORCE_DELETE, O.STOP, O.RESET_STATE)
    violation = the_one(found, "from active while snapshot is served")
    events = [json.loads(line) for line in violation.story]
    assert {"submit": "snapshot", "role": "admin"} in events
    answers = plays(violation, policy, {"advance": "1d"}, {"submit": "stop", "role": "admin"}, {"submit": "delete"})
    assert [answer.get("disposition") for answer in answers[1:]] == ["denied", "denied"]


def test_a_state_that_an_admin_can_reset_is_not_stuck() -> None:
    found = search(site(STAFF_SNAPSHOTS), O.SNAPSHOT, O.DELETE, O.FORCE_DELETE, O.STOP, O.RESET_STATE)
    assert not found.violations
    assert found.weaker is not None
    assert "active while snapshot is served" in found.weaker.cannot


SOFT = (O.STOP, O.REBUILD, O.EVACUATE, O.DELETE, O.SOFT_DELETE, O.RESTORE)
MEMBERS_SOFT_DELETE = """
[[rule]]
id = "members-soft-delete"
operations = ["delete", "force_delete"]
roles = ["member"]
vm_state = ["*", "!soft_deleted"]
verdict = "deny"
reason = "soft_delete_first"
because = "Members soft delete; staff delete."
"""


def test_a_policy_is_sound_if_only_staff_can_always_delete() -> None:
    """Where members cannot is said beside it, and is no violation."""
    found = search(site(MEMBERS_SOFT_DELETE), *SOFT)
    assert found.complete
    assert not found.violations
    assert found.weaker is not None
    assert found.weaker.role == "member"
    assert "active while rebuild is served" in found.weaker.cannot
    assert "active" not in found.weaker.cannot, "a member soft-deletes it, and the server reclaims it"


SOFT_DELETE_FIRST = EXAMPLES / "soft-delete-first.toml"


def test_soft_delete_and_what_the_server_reclaims_reach_the_end() -> None:
    found = search(compile_named(str(SOFT_DELETE_FIRST)), *SOFT, O.RESET_STATE)
    assert found.complete
    assert not found.violations
    assert "What is served completes, if it is soft_delete or evacuate." in found.assumptions


def test_a_soft_delete_after_which_nobody_deletes_breaks_law_5() -> None:
    _, rules = SOFT_DELETE_FIRST.read_text().split('description = "A VM is soft-deleted before it is deleted."')
    never = rules.replace('vm_state = ["*", "!soft_deleted", "!migrated_out"]', "")
    found = search(site(never + NO_RESET), O.STOP, O.DELETE, O.SOFT_DELETE)
    assert the_one(found, "deleted cannot be reached from soft_deleted").law == 5


# ---------------------------------------------------------------------------------------------------- surroundings

LEGAL_HOLD = """
[[rule]]
id = "tagged"
operations = "*"
tags = ["legal-hold"]
verdict = "deny"
reason = "hold"
because = "Legal hold."
"""


def test_a_tag_that_denies_everything_breaks_law_5() -> None:
    """Taking the tag off is no way out that the policy grants."""
    policy = site(LEGAL_HOLD)
    violation = the_one(search(policy, O.STOP, O.DELETE), "nothing is ever admitted in active")
    assert [json.loads(line) for line in violation.story[1:]] == [{"relabel": ["legal-hold"], "role": "admin"}]
    assert plays(violation, policy, {"submit": "delete", "role": "admin"})[0]["rule"] == "tagged"


def test_a_tag_that_denies_one_operation_breaks_no_law() -> None:
    """What waits is judged again when the tag is set, so that it is never cancelled after a success."""
    gpu = LEGAL_HOLD.replace('operations = "*"', 'operations = ["resize"]').replace("legal-hold", "gpu")
    found = search(site(gpu), O.STOP, O.START, O.RESIZE, O.DELETE)
    assert found.complete
    assert not found.violations
    assert "The tags gpu are set and removed; no way to delete counts on their removal." in found.assumptions


EVACUATE_IN_TURN = """
[[rule]]
id = "evacuate-in-turn"
operations = ["evacuate"]
vm_state = ["@sources"]
host_reachable = false
verdict = "admit"
because = "The host is lost."
"""


@pytest.mark.parametrize("rules", ["", EVACUATE_IN_TURN], ids=["preempting", "in turn"])
def test_evacuations_break_no_law_whenever_the_host_is_lost_and_back(rules: str) -> None:
    found = search(site(rules), O.REBOOT, O.MIGRATE, O.ATTACH_VOLUME, O.EVACUATE, O.DELETE)
    assert found.complete
    assert not found.violations
    assert O.EVACUATE in found.operations


def test_a_delete_that_waits_for_a_lost_host_breaks_law_5() -> None:
    waits = """
[[rule]]
id = "wait-for-the-host"
operations = "*"
host_reachable = false
verdict = "deny"
reason = "host_lost"
because = "Bring the host back."
"""
    violation = the_one(search(site(waits), O.STOP, O.DELETE), "nothing is ever admitted in active")
    assert [json.loads(line) for line in violation.story[1:]] == [{"host_reachable": False}]


def test_what_rules_do_not_name_costs_no_state() -> None:
    """Only tags that a rule about an operation of the search names are set."""
    plain = search(site(""), O.STOP, O.DELETE)
    tagged = search(site(LEGAL_HOLD.replace('operations = "*"', 'operations = ["rescue"]')), O.STOP, O.DELETE)
    assert tagged.states == plain.states
    assert not [line for line in plain.assumptions if "tags" in line]


# ----------------------------------------------------------------------------------------------------------- holds

ONE_HELD = """
[[rule]]
id = "one-held"
operations = "*"
held = ["*"]
verdict = "deny"
reason = "held"
because = "Something is held."
"""


def test_a_hold_that_denies_everything_breaks_law_5() -> None:
    """The end of a hold is no way out: it may be any time away, and only its owner may cancel it."""
    policy = site(ONE_HELD)
    violation = the_one(search(policy, O.STOP, O.START, O.UNRESCUE, O.DELETE), "nothing is ever admitted in active")
    assert "hold" in json.loads(violation.story[-1])
    admin = {"submit": "delete", "role": "admin"}
    answer, _, later, _, after = plays(violation, policy, admin, {"advance": "9h"}, admin, {"cancel": "r1"}, admin)
    assert [one["disposition"] for one in (answer, later, after)] == ["denied", "denied", "admitted"]
    assert answer["retry_after"] is None


def test_a_hold_that_denies_no_deletion_breaks_no_law() -> None:
    found = search(site(ONE_HELD.replace('operations = "*"', 'operations = ["start"]')), O.STOP, O.START, O.DELETE)
    assert found.complete
    assert not found.violations
    assert any("one-held" in assumed for assumed in found.assumptions)


def test_a_delete_that_waits_for_another_that_is_held_breaks_no_law() -> None:
    """The held request is admitted as soon as the policy admits it, and deletes the instance."""
    rules = """
[[rule]]
id = "held-already"
operations = ["delete"]
held = ["delete"]
verdict = "redundant"
reason = "held"
because = "A deletion is held."

[[rule]]
id = "not-during-a-stop"
operations = ["delete"]
task_state = ["@stop"]
verdict = "after"
threshold = "1m"
measured_from = "task_started"
reason = "stopping"
because = "It is being stopped."
"""
    found = search(site(rules), O.STOP, O.DELETE)
    assert found.complete
    assert not found.violations, found.violations
    assert any(assumed.startswith("One request is held at a time") for assumed in found.assumptions)


# ----------------------------------------------------------------------------------------------- endless heartbeats

A_MINUTE_OF_SILENCE = """
[[rule]]
id = "delete-gives-a-minute"
operations = ["delete", "force_delete"]
task_state = ["*", "!none", "!@delete", "!@force_delete"]
verdict = "after"
threshold = "1m"
reason = "in_progress"
because = "A minute of silence is waited for."
"""


def test_where_a_deletion_waits_for_a_silence_that_may_never_come_is_listed() -> None:
    found = search(site(A_MINUTE_OF_SILENCE), O.SNAPSHOT, O.DELETE, O.RESET_STATE)
    assert not found.violations
    assert "active while snapshot is served" in found.until_silence
    said = "A worker ends or hangs: as long as one makes progress, be it for ever, nobody can delete"
    assert f"{said} without a reset of the state in some states." in found.assumptions
    nobody = search(site(A_MINUTE_OF_SILENCE + NO_RESET), O.SNAPSHOT, O.DELETE, O.RESET_STATE)
    assert f"{said} in some states." in nobody.assumptions


FROM_THE_START = A_MINUTE_OF_SILENCE.replace('threshold = "1m"', 'threshold = "1m"\nmeasured_from = "task_started"')
LIMITED = f'{A_MINUTE_OF_SILENCE}\n[served_at_most]\nsnapshot = "1h"\n'


@pytest.mark.parametrize("rules", [FROM_THE_START, LIMITED], ids=["measured from the start", "served_at_most"])
def test_a_time_from_the_start_ends_the_wait_for_a_worker_that_makes_progress(rules: str) -> None:
    found = search(site(rules), O.SNAPSHOT, O.DELETE, O.RESET_STATE)
    assert not found.until_silence
    assert "A worker ends, hangs, or makes progress for ever." in found.assumptions


def test_no_deletion_waits_for_silence_under_standard() -> None:
    assert not search(compile_named("standard"), O.SNAPSHOT, O.MIGRATE, O.ATTACH_VOLUME, O.DELETE).until_silence
