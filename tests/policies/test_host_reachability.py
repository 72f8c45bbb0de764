"""A queue is judged again when the host is lost and when it is back, before anything of it is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from policy_samples import START_MS, Play, instance, said, serving

from interlock.core import lifecycle
from interlock.core.admission import admit
from interlock.core.host_changes import note_host
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Request, Status, Submission
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.policies.active_policy import Earlier, PolicyInForce
from interlock.policies.language.loader import compile_named
from interlock.policies.rehearsal.runner import rehearse

O = Operation  # noqa: E741
EVACUATE_IN_TURN = """
[policy]
name = "in-turn"
extends = "standard"

[[rule]]
id = "evacuate-in-turn"
operations = ["evacuate"]
vm_state = ["@sources"]
host_reachable = false
verdict = "admit"
because = "The host is lost."
"""
LOST: dict[str, Any] = {"host_reachable": False}
BACK: dict[str, Any] = {"host_reachable": True}


@pytest.fixture
def in_turn(tmp_path: Path) -> CompiledPolicy:
    path = tmp_path / "in-turn.toml"
    path.write_text(EVACUATE_IN_TURN)
    return compile_named(path)


@pytest.fixture(scope="module")
def standard() -> CompiledPolicy:
    return compile_named("standard")


def play(policy: CompiledPolicy, *events: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(answer) for answer in rehearse([json.dumps(event) for event in events], policy)]


def test_an_evacuation_that_waits_is_cancelled_when_the_host_is_back(standard: CompiledPolicy) -> None:
    *_, back, taken = play(
        standard, {"instance": {"vm_state": "active", "in_flight": "snapshot"}}, LOST, {"submit": "evacuate"}, BACK,
        {"take": "any"},
    )  # fmt: skip
    assert back["cancelled"] == {"r2": "host_reachable"}
    assert taken["taken"] is None


def test_one_that_waits_in_turn_is_cancelled_too(in_turn: CompiledPolicy) -> None:
    *_, back, taken = play(
        in_turn, {"instance": {"vm_state": "active"}}, LOST, {"submit": "evacuate"}, BACK, {"take": "any"}
    )
    assert back["cancelled"] == {"r1": "host_reachable"}
    assert taken["taken"] is None


def test_an_evacuation_is_not_cancelled_for_a_reachable_host_while_the_host_is_lost(in_turn: CompiledPolicy) -> None:
    *_, finished, taken = play(
        in_turn, {"instance": {"vm_state": "active", "in_flight": "attach_volume"}}, LOST, {"submit": "evacuate"},
        {"finish": "attach_volume", "outcome": "failed"}, {"take": "any"},
    )  # fmt: skip
    assert finished["cancelled"] == {}
    assert taken["taken"] == "evacuate"


def test_an_evacuation_in_flight_goes_on_when_the_host_is_back(standard: CompiledPolicy) -> None:
    *_, back, shown = play(
        standard, {"instance": {"vm_state": "active"}}, LOST, {"submit": "evacuate"}, {"take": "any"}, BACK,
        {"show": True},
    )  # fmt: skip
    assert back["cancelled"] == {}
    assert shown["in_flight"] == "evacuate"


@pytest.mark.parametrize(("submitted", "cancelled"), [("stop", {"r2": "host_fenced"}), ("delete", {})])
def test_what_waits_for_a_host_that_is_lost_is_cancelled_and_a_deletion_is_not(
    standard: CompiledPolicy, submitted: str, cancelled: dict[str, str]
) -> None:
    *_, lost = play(standard, {"instance": {"vm_state": "stopped", "in_flight": "start"}}, {"submit": submitted}, LOST)
    assert lost["cancelled"] == cancelled


def test_nothing_is_taken_from_a_queue_that_was_judged_for_another_reachability(standard: CompiledPolicy) -> None:
    stage = Play(standard, serving(VmState.ACTIVE, "image_snapshot"))
    assert said(stage.submit(O.EVACUATE, role=Role.ADMIN, host_reachable=False)) == ("admitted", None)
    fenced = lifecycle.expire(stage.instance, standard, START_MS, host_reachable=False).instance
    assert lifecycle.take(fenced, None, START_MS, host_reachable=True).answer is None
    change = lifecycle.expire(fenced, standard, START_MS, host_reachable=True)
    (cancelled,) = [request for request in change.requests if request.status is Status.CANCELLED]
    assert (cancelled.operation, cancelled.reason) == (O.EVACUATE, "host_reachable")
    assert lifecycle.expire(change.instance, standard, START_MS, host_reachable=True).instance is change.instance


def test_what_is_admitted_while_the_host_is_lost_has_the_rest_of_the_queue_judged_for_that(
    in_turn: CompiledPolicy,
) -> None:
    """Also before the news of the host itself has come."""
    stage = Play(in_turn, serving(VmState.ACTIVE, "image_snapshot"))
    stage.submit(O.PAUSE)
    stage.submit(O.EVACUATE, role=Role.ADMIN, host_reachable=False)
    assert (stage.requests["r2"].status, stage.requests["r2"].reason) == (Status.CANCELLED, "host_fenced")
    assert stage.requests["r3"].status is Status.QUEUED


def test_a_migration_in_flight_is_no_reason_to_cancel_the_evacuation_behind_it(standard: CompiledPolicy) -> None:
    """It may fail, and the host is lost."""
    *_, shown = play(
        standard, {"instance": {"vm_state": "active", "in_flight": "live_migrate"}}, LOST, {"submit": "evacuate"},
        {"show": True},
    )  # fmt: skip
    assert [one["operation"] for one in shown["outstanding"]] == ["live_migrate", "evacuate"]


def test_the_news_of_the_host_cancels_what_it_forbids(standard: CompiledPolicy) -> None:
    stage = Play(standard, serving(VmState.ACTIVE, "image_snapshot"))
    stage.submit(O.EVACUATE, role=Role.ADMIN, host_reachable=False)
    change = note_host(stage.instance, "host_back", standard, START_MS, host_reachable=True)
    assert change.answer == ("r2",)
    assert change.events[0].kind == "instance.host_back"


def test_an_admission_cancels_nothing_that_an_earlier_policy_permits(standard: CompiledPolicy) -> None:
    """`--outstanding keep`: none is cancelled that the policy which admitted it permits."""
    in_force = PolicyInForce(standard)
    in_force.replace(standard, [Earlier(compile_named("propolis"), until_ms=START_MS)])
    migrate = Request(
        id="r1", instance_id="i1", operation=O.MIGRATE, requested_by="me", rule="some", admitted_at_ms=START_MS
    )
    kept = replace(instance(VmState.PAUSED), outstanding=(migrate,))
    evacuate = Submission(
        request_id="r2", operation=O.EVACUATE, requested_by="me", role=Role.ADMIN, host_reachable=False
    )
    assert admit(kept, evacuate, standard, START_MS).answer.cancels == ("r1",)  # type: ignore[union-attr]
    change = admit(kept, evacuate, in_force.for_instance(kept), START_MS)
    assert [request.id for request in change.instance.outstanding] == ["r2", "r1"]
    resume = replace(evacuate, operation=O.RESUME, host_reachable=True)
    denied = admit(kept, resume, in_force.for_instance(kept), START_MS)
    assert said(denied.answer)[0] == "denied", "what is submitted now is judged by the active policy alone"
