"""New tags are held against the queue at once: never after a success, and never too late to prevent anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from policy_samples import START_MS, Play, instance

from interlock.core import lifecycle
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Request
from interlock.core.states import VmState
from interlock.policies.active_policy import Earlier, PolicyInForce
from interlock.policies.language.loader import compile_named
from interlock.policies.rehearsal.runner import rehearse

CLOUD = """
[policy]
name = "cloud"
extends = "standard"

[[rule]]
id = "no-gpu-resize"
operations = ["resize"]
tags = ["gpu"]
verdict = "deny"
reason = "gpu_fixed_size"
because = "A VM with a GPU keeps its size."

[[rule]]
id = "legal-hold"
operations = ["delete", "force_delete"]
tags = ["hold"]
verdict = "deny"
reason = "legal_hold"
because = "The VM is evidence."
"""


@pytest.fixture
def cloud(tmp_path: Path) -> CompiledPolicy:
    path = tmp_path / "cloud.toml"
    path.write_text(CLOUD)
    return compile_named(path)


def play(policy: CompiledPolicy, *events: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(answer) for answer in rehearse([json.dumps(event) for event in events], policy)]


ACTIVE = {"instance": {"vm_state": "active", "role": "member"}}


def test_a_resize_behind_a_stop_is_cancelled_when_the_tag_comes_and_not_when_the_stop_has_succeeded(
    cloud: CompiledPolicy,
) -> None:
    *_, tagged, stopped = play(
        cloud, ACTIVE, {"submit": "stop"}, {"take": "any"}, {"submit": "resize"}, {"relabel": ["gpu"]},
        {"finish": "stop"},
    )  # fmt: skip
    assert tagged["cancelled"] == {"r2": "gpu_fixed_size"}
    assert (stopped["vm_state"], stopped["cancelled"]) == ("stopped", {})


def test_a_resize_that_a_tag_forbids_is_not_performed(cloud: CompiledPolicy) -> None:
    *_, tagged, taken = play(cloud, ACTIVE, {"submit": "resize"}, {"relabel": ["gpu"]}, {"take": "any"})
    assert tagged["cancelled"] == {"r1": "gpu_fixed_size"}
    assert taken["taken"] is None


def test_a_deletion_that_preempts_is_cancelled_by_a_tag_that_forbids_deletions(cloud: CompiledPolicy) -> None:
    answers = play(
        cloud, ACTIVE, {"submit": "snapshot"}, {"take": "any"}, {"submit": "delete"}, {"relabel": ["hold"]},
        {"finish": "snapshot", "outcome": "interrupted"}, {"take": "any"},
    )  # fmt: skip
    assert answers[3]["disposition"] == "admitted"
    assert answers[4]["cancelled"] == {"r2": "legal_hold"}
    assert answers[6]["taken"] is None


def test_what_is_in_flight_and_what_the_tag_does_not_concern_goes_on(cloud: CompiledPolicy) -> None:
    answers = play(
        cloud, ACTIVE, {"submit": "resize"}, {"take": "any"}, {"submit": "confirm-resize"}, {"relabel": ["gpu"]},
        {"show": True},
    )  # fmt: skip
    assert answers[4]["cancelled"] == {}
    assert [one["operation"] for one in answers[5]["outstanding"]] == ["resize", "confirm_resize"]


def test_the_cancellation_names_the_rule_and_the_tags(cloud: CompiledPolicy) -> None:
    stage = Play(cloud, instance(VmState.ACTIVE))
    stage.submit(Operation.RESIZE)
    change = lifecycle.relabel(stage.instance, cloud, "ann", START_MS, tags=("gpu", "prod"))
    (request,) = change.requests
    assert request.message == "The VM has the tags gpu, prod: A VM with a GPU keeps its size."
    (cancelled,) = [event for event in change.events if event.kind == "request.cancelled"]
    assert (cancelled.data["rule"], cancelled.data["reason"]) == ("no-gpu-resize", "gpu_fixed_size")


def test_blocking_an_operation_cancels_nothing_that_was_admitted_before(cloud: CompiledPolicy) -> None:
    stage = Play(cloud, instance(VmState.ACTIVE))
    stage.submit(Operation.RESIZE)
    change = lifecycle.relabel(stage.instance, cloud, "ann", START_MS, blocked_operations=(Operation.RESIZE,))
    assert [request.operation for request in change.instance.outstanding] == [Operation.RESIZE]


def test_a_policy_that_still_binds_its_requests_decides_with_the_new_tags(cloud: CompiledPolicy) -> None:
    in_force = PolicyInForce(cloud)
    in_force.replace(cloud, [Earlier(compile_named("standard"), until_ms=START_MS)])
    resize = Request(
        id="r1", instance_id="i1", operation=Operation.RESIZE, requested_by="me", rule="some", admitted_at_ms=START_MS
    )
    kept = msgspec.structs.replace(instance(VmState.ACTIVE), outstanding=(resize,))
    change = lifecycle.relabel(kept, in_force.for_waiting(kept), "ann", START_MS + 1, tags=("gpu",))
    assert change.instance.outstanding == (resize,)
