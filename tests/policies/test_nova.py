"""`nova`: the gates of OpenStack Nova 34 as they stand, on every combination that there is."""

from __future__ import annotations

import csv
import io

import pytest
from click.testing import CliRunner
from nova_gates import GATES, TASK_STATES, VM_STATES
from policy_samples import Play, instance, said, serving

from interlock.cli.application import build
from interlock.cli.context import Invocation
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Verdict
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.policies.language.loader import compile_named

O = Operation  # noqa: E741
V = VmState
COLUMNS = ["operation", "vm_state", "task_state", "launched", "verdict", "threshold_s", "rule", "reason"]


@pytest.fixture(scope="module")
def nova() -> CompiledPolicy:
    return compile_named("nova")


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str, str, str], dict[str, str]]:
    shown = CliRunner().invoke(build(), ["policy", "table", "--policy", "nova", "--format", "csv"], obj=Invocation({}))
    assert shown.exit_code == 0, shown.output
    rows = csv.DictReader(io.StringIO(shown.stdout))
    assert rows.fieldnames == COLUMNS
    return {(row["operation"], row["vm_state"], row["task_state"], row["launched"]): row for row in rows}


@pytest.mark.parametrize("operation", GATES)
def test_the_table_agrees_with_novas_own_gates_on_every_combination(
    table: dict[tuple[str, str, str, str], dict[str, str]], operation: str
) -> None:
    gate, compared = GATES[operation], 0
    for vm_state in VM_STATES:
        for task_state in TASK_STATES:
            for launched in (True, False):
                row = table[operation, vm_state, task_state, str(launched).lower()]
                expected = gate.allows(vm_state, task_state, launched=launched)
                assert (row["verdict"] in {"admit", "preempt"}) is expected, row
                assert row["threshold_s"] == ""
                compared += 1
    assert compared == 12 * 43 * 2


def test_the_first_thing_that_is_wrong_is_the_reason(table: dict[tuple[str, str, str, str], dict[str, str]]) -> None:
    """vm_state before task_state, and that before launched."""
    assert table["start", "active", "pausing", "false"]["reason"] == "invalid_vm_state"
    assert table["start", "stopped", "pausing", "false"]["reason"] == "invalid_task_state"
    assert table["start", "stopped", "none", "false"]["reason"] == "not_launched"
    assert table["start", "stopped", "none", "true"]["verdict"] == "admit"


def test_no_rule_of_novas_knows_time(nova: CompiledPolicy) -> None:
    """Only what ends a deletion that hangs does, which Nova has nothing for."""
    timed = [rule.id for rule in nova.rules if rule.silent_ms_min is not None or rule.verdict is Verdict.AFTER]
    assert timed == ["extra-delete-again"]


@pytest.mark.parametrize("operation", [O.STOP, O.PAUSE, O.REBOOT, O.SUSPEND, O.DELETE])
def test_a_lock_stops_the_owner_and_no_administrator(nova: CompiledPolicy, operation: O) -> None:
    play = Play(nova, instance(V.ACTIVE, launched_at_ms=0, locked_by="owner"))
    assert said(play.submit(operation)) == ("denied", "locked")
    assert said(play.submit(operation, role=Role.ADMIN))[0] == "admitted"


@pytest.mark.parametrize("operation", [O.SNAPSHOT, O.BACKUP, O.UNLOCK, O.RENAME])
def test_a_lock_leaves_copies_to_the_owner(nova: CompiledPolicy, operation: O) -> None:
    assert said(Play(nova, instance(V.ACTIVE, locked_by="owner")).submit(operation))[0] == "admitted"


def test_a_name_is_no_matter_of_the_state(nova: CompiledPolicy) -> None:
    """Nova has no gate for it: API.update_instance."""
    assert said(Play(nova, serving(V.BUILDING, "spawning")).submit(O.RENAME))[0] == "admitted"
    assert said(Play(nova, instance(V.SHELVED_OFFLOADED)).submit(O.RENAME))[0] == "admitted"


def test_what_is_about_to_be_done_counts_as_done(nova: CompiledPolicy) -> None:
    """Nova claims the task state when it admits."""
    play = Play(nova, instance(V.ACTIVE))
    assert said(play.submit(O.STOP))[0] == "admitted"
    assert said(play.submit(O.PAUSE)) == ("denied", "invalid_task_state")


def test_a_hard_reboot_gets_through_a_pause_that_hangs(nova: CompiledPolicy) -> None:
    play = Play(nova, serving(V.ACTIVE, "pausing"))
    assert said(play.submit(O.REBOOT)) == ("denied", "invalid_task_state")
    assert said(play.submit(O.REBOOT, hard=True))[0] == "admitted"


def test_nothing_is_admitted_for_a_deleted_instance_whatever_the_gates_say(nova: CompiledPolicy) -> None:
    assert said(Play(nova, instance(V.DELETED, launched_at_ms=0)).submit(O.DELETE)) == ("denied", "deleted")
