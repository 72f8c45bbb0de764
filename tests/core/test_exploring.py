"""The model checker on every built-in policy, and on mistakes seeded into policies and the core."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from core_samples import ORDINARY, STUCK_MS, O, V, compiled, rule

import model_checker_reference
from interlock.core import admission, evaluation, lifecycle, outcomes, request_queue
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import CompiledPolicy, Verdict
from interlock.core.records import SERVED, Change, Instance, Request, Status
from interlock.core.request_queue import Draft
from interlock.core.roles import Role
from interlock.policies.language.loader import compile_named
from interlock.policies.model_checker import Exploration, explore
from interlock.policies.model_checker.symmetry_reduction import distinct_operations
from interlock.policies.rehearsal.runner import rehearse
from tiers import tier

BUILT_IN = ("standard", "take2", "propolis", "nova")
STATE_CHANGES = tuple(operation for operation, entry in CATALOGUE.items() if entry.lane is Lane.STATE)
POWER = (O.CREATE, O.START, O.STOP, O.DELETE)
RESCUING = (O.START, O.STOP, O.RESCUE, O.UNRESCUE, O.DELETE)
BESIDE = (O.REBOOT, O.DELETE, O.SWAP_VOLUME)


def broken_laws(exploration: Exploration) -> set[int]:
    return {violation.law for violation in exploration.violations}


def assert_holds(exploration: Exploration) -> None:
    assert exploration.complete, f"only {exploration.states} states were expanded"
    assert not exploration.violations, "\n".join(
        f"law {violation.law}: {violation.what}\n  " + "\n  ".join(violation.story)
        for violation in exploration.violations
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_laws_hold_for_power_changes_up_to_three_at_a_time(name: str) -> None:
    """Laws 1 to 5, 7 and 8, over all interleavings of three outstanding power changes."""
    exploration = explore(compile_named(name), operations=POWER, outstanding_max=3)
    assert_holds(exploration)
    assert exploration.states > 40


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_laws_hold_for_component_changes_beside_state_changes(name: str) -> None:
    """The same with two lanes, from a running instance, where two requests can be in flight at once."""
    exploration = explore(compile_named(name), operations=BESIDE, starts=[V.ACTIVE], outstanding_max=2)
    assert_holds(exploration)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_laws_hold_for_all_operations(name: str) -> None:
    """All operations from `building`, three outstanding and a deletion on top."""
    exploration = explore(compile_named(name), outstanding_max=3)
    assert_holds(exploration)
    assert exploration.states > 500


@pytest.mark.parametrize("role", [Role.ADMIN, Role.READER])
@pytest.mark.parametrize("name", BUILT_IN)
def test_an_administrator_can_always_delete_and_a_reader_never(name: str, role: Role) -> None:
    """The second promise of law 5 is about one role, and breaks no law."""
    operations = tier((*RESCUING, *BESIDE, O.CREATE, O.LOCK, O.UNLOCK, O.RESET_STATE), tuple(O))
    exploration = explore(compile_named(name), operations=operations, outstanding_max=2, role=role)
    assert_holds(exploration)
    assert exploration.weaker is not None
    assert bool(exploration.weaker.cannot) is (role is Role.READER)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_laws_hold_in_the_reference_search(name: str) -> None:
    """Every state change from every state that it can be in, as the core's own records: also laws 1, 3, 4 and 7."""
    operations = tier(RESCUING, STATE_CHANGES)
    assert_holds(
        model_checker_reference.explore(
            compile_named(name), operations=operations, starts=[V.ACTIVE], outstanding_max=1
        )
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_delete_gets_past_a_hung_component_change(name: str) -> None:
    """Law 5: a deletion always succeeds, also past a hung component change, which has no task state."""
    exploration = explore(compile_named(name), operations=[O.DELETE, O.ATTACH_VOLUME], starts=[V.ACTIVE])
    assert_holds(exploration)


def test_the_sample_policy_of_these_tests_holds() -> None:
    """The policy that the seeded mistakes below start from violates no law."""
    assert_holds(sample())


def sample(policy: CompiledPolicy | None = None, **more: Any) -> Exploration:
    operations = more.pop("operations", (O.REBOOT, O.STOP, O.START, O.DELETE))
    fields: dict[str, Any] = {"starts": [V.ACTIVE], "outstanding_max": 2, "states_max": 4000} | more
    explored = fields.pop("explored", explore)
    exploration: Exploration = explored(policy or CompiledPolicy(ORDINARY), operations=operations, **fields)
    return exploration


# ------------------------------------------------------------------------------------------- mistakes in a policy


def test_a_policy_that_denies_delete_during_a_reboot_breaks_law_5() -> None:
    """An instance whose reboot hangs could never be deleted."""
    shut = rule("shut", {O.DELETE, O.REBOOT}, Verdict.DENY, task_states=frozenset({"rebooting"}))
    exploration = sample(compiled(shut, *ORDINARY.rules))
    assert broken_laws(exploration) == {5}
    first = exploration.violations[0]
    assert [json.loads(line) for line in first.story[:3]] == [
        {"instance": {"vm_state": "active", "role": "member"}},
        {"submit": "reboot"},
        {"take": "state"},
    ]


def test_a_policy_that_admits_nothing_in_a_state_breaks_law_5() -> None:
    """Nothing is ever admitted in error: a dead end."""
    shut = rule("shut", frozenset(O), Verdict.DENY, vm_states=frozenset({V.ERROR}))
    exploration = sample(compiled(shut, *ORDINARY.rules))
    assert any("nothing is ever admitted in error" in violation.what for violation in exploration.violations)


def test_a_retry_time_at_which_another_rule_denies_breaks_law_5() -> None:
    """A retry time in a denial must be true."""
    late = rule("late", {O.REBOOT}, Verdict.DENY, task_states=frozenset({"rebooting"}), silent_ms_min=STUCK_MS)
    exploration = sample(compiled(late, *ORDINARY.rules))
    assert any("at the retry time of its denial" in violation.what for violation in exploration.violations)


def test_a_refusal_without_a_reason_breaks_law_8() -> None:
    """Every answer explains itself."""
    mute = rule("", {O.START}, Verdict.DENY, vm_states=frozenset({V.ACTIVE}))
    assert 8 in broken_laws(sample(compiled(mute, *ORDINARY.rules)))


# --------------------------------------------------------------------------------------------- mistakes in the core


def by_the_core() -> Exploration:
    return sample(explored=model_checker_reference.explore)


def test_a_queue_that_is_never_judged_again_breaks_law_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits behind a failed stop would be served in a state in which it is not permitted."""

    def trusting(draft: Draft, policy: CompiledPolicy) -> tuple[str, ...]:
        return ()

    monkeypatch.setattr(lifecycle, "judge_again", trusting)
    monkeypatch.setattr(admission, "judge_again", trusting)
    assert 2 in broken_laws(by_the_core())


def test_a_takeover_that_does_not_fence_breaks_law_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """The superseded worker would still be allowed to act on the hypervisor."""

    def lenient(draft: Draft, by: str | None, message: str) -> tuple[str, ...]:
        served = [request for request in draft.instance.outstanding if request.status in SERVED]
        for request in served:
            draft.end(request, Status.SUPERSEDED, "superseded", message)
        return tuple(request.id for request in served)

    monkeypatch.setattr(Draft, "fence_off", lenient)
    assert broken_laws(by_the_core()) == {4}


def test_an_adoption_under_the_old_fence_breaks_law_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was only thought lost would act beside its successor."""

    def careless(instance: Instance, now_ms: int) -> Change[tuple[Request, ...]]:
        draft = Draft(instance, now_ms)
        for request in instance.outstanding:
            if request.status in SERVED:
                draft.put(msgspec.structs.replace(request, status=Status.UNKNOWN))
        return draft.change(())

    monkeypatch.setattr(lifecycle, "adopt", careless)
    assert 4 in broken_laws(by_the_core())


def test_believing_a_worker_whatever_its_fence_breaks_law_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adopted request would be finished by the worker that lost it."""

    def gullible(instance: Instance, request_id: str, fence: int) -> Request | None:
        return next((r for r in instance.outstanding if r.id == request_id and r.status in SERVED), None)

    monkeypatch.setattr(lifecycle, "_held", gullible)
    assert 4 in broken_laws(by_the_core())


def test_taking_without_looking_at_what_is_in_flight_breaks_law_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two state changes at once."""

    def eager(instance: Instance, lane: Lane | None) -> Request | None:
        return next((r for r in instance.outstanding if r.status is Status.QUEUED and r.lane is lane), None)

    monkeypatch.setattr(lifecycle, "next_served", eager)
    assert 1 in broken_laws(by_the_core())


def test_an_end_without_an_event_breaks_law_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watchers would get no event."""
    emit = Draft.emit

    def discreet(draft: Draft, kind: str, request_id: str | None = None, /, **data: Any) -> None:
        if kind != "request.cancelled":
            emit(draft, kind, request_id, **data)

    monkeypatch.setattr(Draft, "emit", discreet)
    assert broken_laws(by_the_core()) == {3}


def test_a_request_that_is_dropped_breaks_law_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be gone without an end."""
    end = Draft.end

    def forgetful(draft: Draft, request: Request, status: Status, *why: Any, **more: Any) -> None:
        end(draft, request, status, *why, **more)
        if request.status is Status.QUEUED:
            del draft.requests[request.id]

    monkeypatch.setattr(Draft, "end", forgetful)
    assert 3 in broken_laws(by_the_core())


def test_a_success_that_changes_no_state_breaks_law_7(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next decision would be about the old state."""
    monkeypatch.setattr(outcomes, "resolve_target", lambda _, vm_state, prior: (vm_state, prior))
    assert 7 in broken_laws(by_the_core())


def test_a_quick_answer_that_is_not_that_of_the_gate_breaks_law_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry times are computed from it."""
    monkeypatch.setattr(evaluation, "would_admit", lambda *_: True)
    assert 8 in broken_laws(by_the_core())


def test_a_refusal_that_names_an_ended_request_breaks_law_7(monkeypatch: pytest.MonkeyPatch) -> None:
    """No refusal follows from what was reported done."""
    ghost = Request(
        id="r99", instance_id="i", operation=O.STOP, requested_by="x", rule="x", admitted_at_ms=0, status=Status.FAILED
    )
    monkeypatch.setattr(admission, "blocker_of", lambda *_: ghost)
    assert 7 in broken_laws(by_the_core())


def test_a_component_change_before_a_waiting_deletion_breaks_law_5(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be taken without a deadline, hang, and keep the deletion out for ever."""
    served = request_queue.next_served

    def components_first(instance: Instance, lane: Lane | None) -> Request | None:
        if lane is Lane.COMPONENT and not any(request.status in SERVED for request in instance.outstanding):
            return next((r for r in instance.outstanding if r.lane is lane), None)
        return served(instance, lane)

    monkeypatch.setattr(lifecycle, "next_served", components_first)
    exploration = model_checker_reference.explore(
        compile_named("propolis"), operations=[O.DELETE, O.SWAP_VOLUME], starts=[V.ACTIVE]
    )
    assert broken_laws(exploration) == {5, 12}


def test_state_changes_before_component_changes_break_law_12(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller who keeps submitting state changes would keep a detachment waiting for ever."""
    monkeypatch.setattr(request_queue, "_comes_last", lambda request: request.lane is Lane.COMPONENT)
    exploration = model_checker_reference.explore(
        compile_named("standard"), operations=[O.PAUSE, O.UNPAUSE, O.DETACH_VOLUME], starts=[V.ACTIVE]
    )
    assert 12 in broken_laws(exploration)


# ------------------------------------------------------------------------------------------------- the search itself


def test_a_counterexample_can_be_rehearsed() -> None:
    """A counterexample is a script for `interlock rehearse`, which runs it without an error."""
    shut = rule("shut", {O.DELETE, O.REBOOT}, Verdict.DENY, task_states=frozenset({"rebooting"}))
    policy = compiled(shut, *ORDINARY.rules)
    story = sample(policy).violations[0].story
    answers = [json.loads(answer) for answer in rehearse([*story, '{"submit": "delete"}'], policy)]
    assert not [answer for answer in answers if "error" in answer]
    assert answers[-1]["rule"] == "shut"


def test_a_search_that_reaches_its_bound_reports_it() -> None:
    """`complete` is false, and states that were not expanded are no violations."""
    exploration = sample(states_max=10)
    assert exploration.states == 10
    assert not exploration.complete
    assert not exploration.violations


def test_symmetric_operations_are_tried_once() -> None:
    """A snapshot and a backup lead to the same states if no rule distinguishes them."""
    every = compiled(rule("all", frozenset(Operation), Verdict.ADMIT))
    assert distinct_operations(every, [O.SNAPSHOT, O.BACKUP, O.ATTACH_VOLUME, O.ATTACH_INTERFACE]) == (
        O.SNAPSHOT,
        O.ATTACH_VOLUME,
    )
    other = compiled(rule("one", {O.BACKUP}, Verdict.DENY), rule("all", frozenset(Operation), Verdict.ADMIT))
    assert distinct_operations(other, [O.SNAPSHOT, O.BACKUP]) == (O.SNAPSHOT, O.BACKUP)
