"""Mistakes that are made in the core, each with the law that it breaks and the search that has to find it."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
import pytest
from core_samples import ORDINARY, O, V, compiled, rule

import model_checker_reference
from interlock.core import admission, evaluation, lifecycle, outcomes, request_queue, views
from interlock.core.operations import Lane, Operation
from interlock.core.policy import CompiledPolicy, Verdict
from interlock.core.records import SERVED, Change, Instance, Outcome, Request, Status, Submission
from interlock.core.request_queue import Draft
from interlock.core.views import View
from interlock.policies.language.loader import compile_named
from interlock.policies.model_checker import Exploration
from interlock.policies.model_checker.results import Breach

Patch = pytest.MonkeyPatch
replace = msgspec.structs.replace


def searched(
    of: CompiledPolicy | None = None, operations: Iterable[Operation] = (O.REBOOT, O.STOP, O.START, O.DELETE)
) -> Exploration:
    """Search by the core's own records."""
    return model_checker_reference.explore(
        of or CompiledPolicy(ORDINARY), operations=operations, starts=[V.ACTIVE], outstanding_max=2, states_max=1000
    )


def of_components(name: str, *operations: Operation) -> Callable[[], Exploration]:
    return lambda: model_checker_reference.explore(
        compile_named(name), operations=operations, starts=[V.ACTIVE], outstanding_max=2, states_max=1000
    )


def with_evacuations() -> Exploration:
    """Search under a policy that admits evacuations from any host."""
    anywhere = rule("evacuate", {O.EVACUATE}, Verdict.ADMIT)
    return searched(compiled(anywhere, *ORDINARY.rules), (O.EVACUATE, O.STOP, O.DELETE))


class Mistake(NamedTuple):
    """A mistake in the core."""

    law: int
    what: str
    """In words, as docs/proof.md has it."""
    make: Callable[[Patch], None]
    search: Callable[[], Exploration] = searched


def two_at_once(patch: Patch) -> None:
    def eager(instance: Instance, lane: Lane | None) -> Request | None:
        return next((r for r in instance.outstanding if r.status is Status.QUEUED and r.lane is lane), None)

    patch.setattr(lifecycle, "next_served", eager)


def never_judged_again(patch: Patch) -> None:
    """What waits behind a failed stop is served in a state in which it is not permitted."""

    def trusting(draft: Draft, policy: CompiledPolicy) -> tuple[str, ...]:
        return ()

    patch.setattr(lifecycle, "judge_again", trusting)
    patch.setattr(admission, "judge_again", trusting)


def end_without_event(patch: Patch) -> None:
    emit = Draft.emit

    def discreet(draft: Draft, kind: str, request_id: str | None = None, /, **data: Any) -> None:
        if kind != "request.cancelled":
            emit(draft, kind, request_id, **data)

    patch.setattr(Draft, "emit", discreet)


def dropped(patch: Patch) -> None:
    end = Draft.end

    def forgetful(draft: Draft, request: Request, status: Status, *why: Any, **more: Any) -> None:
        end(draft, request, status, *why, **more)
        if request.status is Status.QUEUED:
            del draft.requests[request.id]

    patch.setattr(Draft, "end", forgetful)


def takeover_without_fence(patch: Patch) -> None:
    def lenient(draft: Draft, by: str | None, message: str) -> tuple[str, ...]:
        served = [request for request in draft.instance.outstanding if request.status in SERVED]
        for request in served:
            draft.end(request, Status.SUPERSEDED, "superseded", message)
        return tuple(request.id for request in served)

    patch.setattr(Draft, "fence_off", lenient)


def adopted_under_the_old_fence(patch: Patch) -> None:
    """A worker that was only thought lost acts beside its successor."""

    def careless(instance: Instance, now_ms: int) -> Change[tuple[Request, ...]]:
        draft = Draft(instance, now_ms)
        for request in instance.outstanding:
            if request.status in SERVED:
                draft.put(replace(request, status=Status.UNKNOWN))
        return draft.change(())

    patch.setattr(lifecycle, "adopt", careless)


def any_fence_believed(patch: Patch) -> None:
    """An adopted request is finished by the worker that lost it."""

    def gullible(instance: Instance, request_id: str, fence: int) -> Request | None:
        return next((r for r in instance.outstanding if r.id == request_id and r.status in SERVED), None)

    patch.setattr(lifecycle, "_held", gullible)


def components_before_a_deletion(patch: Patch) -> None:
    """It is taken without a deadline, hangs, and keeps the deletion out for ever."""
    served = request_queue.next_served

    def components_first(instance: Instance, lane: Lane | None) -> Request | None:
        if lane is Lane.COMPONENT and not any(request.status in SERVED for request in instance.outstanding):
            return next((r for r in instance.outstanding if r.lane is lane), None)
        return served(instance, lane)

    patch.setattr(lifecycle, "next_served", components_first)


def ages_of_a_clock_that_went_back(patch: Patch) -> None:
    """A clock that is an hour behind makes everything an hour old."""

    def old(instance: Instance, submission: Submission, now_ms: int) -> View:
        view = views.build_view(instance, submission, now_ms)
        serving = instance.served(Lane.STATE) or instance.served(Lane.COMPONENT)
        since_ms = instance.updated_at_ms if serving is None else serving.last_progress_at_ms or 0
        return replace(view, silent_ms=abs(now_ms - since_ms), running_ms=max(view.running_ms, abs(now_ms - since_ms)))

    patch.setattr(evaluation, "build_view", old)


def success_without_a_change(patch: Patch) -> None:
    patch.setattr(outcomes, "resolve_target", lambda _, vm_state, prior: (vm_state, prior))


def refused_for_what_has_ended(patch: Patch) -> None:
    ghost = Request(
        id="r99", instance_id="i", operation=O.STOP, requested_by="x", rule="x", admitted_at_ms=0, status=Status.FAILED
    )
    patch.setattr(admission, "blocker_of", lambda *_: ghost)


def refused_without_a_blocker(patch: Patch) -> None:
    patch.setattr(admission, "blocker_of", lambda *_: None)


def always_admitted(patch: Patch) -> None:
    """Retry times are computed from the quick answer."""
    patch.setattr(evaluation, "would_admit", lambda *_: True)


def answered_before_stored(patch: Patch) -> None:
    """The change that a store writes does not have the request that was admitted."""
    change = Draft.change

    def partial(draft: Draft, answer: Any) -> Change[Any]:
        whole = change(draft, answer)
        return replace(whole, requests=tuple(r for r in whole.requests if r.status is not Status.QUEUED))

    patch.setattr(Draft, "change", partial)


def unknown_is_failed(patch: Patch) -> None:
    finish = lifecycle.finish

    def hasty(instance: Instance, request_id: str, fence: int, outcome: Outcome, *rest: Any, **more: Any) -> Any:
        known = Outcome.FAILED if outcome is Outcome.UNKNOWN else outcome
        return finish(instance, request_id, fence, known, *rest, **more)

    patch.setattr(lifecycle, "finish", hasty)


def evacuated_from_a_host_that_runs(patch: Patch) -> None:
    """The guest is started elsewhere while it runs on its host."""
    patch.setattr(admission, "admit_there", admission.admit)


def state_changes_first(patch: Patch) -> None:
    """Whoever keeps submitting state changes keeps a detachment waiting for ever."""
    patch.setattr(request_queue, "_comes_last", lambda request: request.lane is Lane.COMPONENT)


MISTAKES = (
    Mistake(1, "a request is taken while another is in flight", two_at_once),
    Mistake(2, "the queue is not judged again after a failure", never_judged_again),
    Mistake(3, "an end has no event", end_without_event),
    Mistake(3, "a queued request is dropped", dropped),
    Mistake(4, "a takeover does not fence", takeover_without_fence),
    Mistake(4, "a request is adopted under the old fence", adopted_under_the_old_fence),
    Mistake(4, "a worker is believed whatever its fence", any_fence_believed),
    Mistake(
        5,
        "a component change is served before a waiting deletion",
        components_before_a_deletion,
        of_components("propolis", O.DELETE, O.SWAP_VOLUME),
    ),
    Mistake(6, "ages grow when the clock goes back", ages_of_a_clock_that_went_back),
    Mistake(7, "a success changes no state", success_without_a_change),
    Mistake(7, "a refusal names a request that has ended", refused_for_what_has_ended),
    Mistake(8, "a refusal does not name what blocks", refused_without_a_blocker),
    Mistake(8, "the quick answer is not that of the gate", always_admitted),
    Mistake(9, "an admitted request is not in the change that is written", answered_before_stored),
    Mistake(10, "an unknown outcome is a failure", unknown_is_failed),
    Mistake(
        11, "an evacuation is admitted while the host is not fenced", evacuated_from_a_host_that_runs, with_evacuations
    ),
    Mistake(
        12,
        "state changes overtake component changes",
        state_changes_first,
        of_components("standard", O.PAUSE, O.UNPAUSE, O.DETACH_VOLUME),
    ),
)
CHECKS: dict[int, tuple[str, ...]] = {
    1: ("laws.one_at_a_time",),
    2: ("laws.kept_promise",),
    3: ("laws.one_end",),
    4: ("laws.held_fence",),
    5: ("walk.Walk.stuck",),
    6: ("walk.Walk.hastened",),
    7: ("laws.settled_success", "walk.explained"),
    8: ("walk.explained", "walk.Walk.answered_otherwise"),
    9: ("laws.written",),
    10: ("laws.unknown_waits",),
    11: ("walk.one_copy",),
    12: ("laws.served_in_turn",),
}
"""The checks of each law, in `model_checker_reference`."""


def without_check(patch: Patch, law: int) -> list[Breach]:
    """Remove the check of a law from the search, and return the list of what it would have reported."""
    noticed: list[Breach] = []

    def removed(check: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
        def others(*arguments: Any) -> Iterator[Any]:
            for found in check(*arguments):
                breach = found if isinstance(found, Breach) else found[1]
                if breach.law == law:
                    noticed.append(breach)
                else:
                    yield found

        return others

    for name in CHECKS[law]:
        path = f"model_checker_reference.{name}"
        patch.setattr(path, removed(pkgutil.resolve_name(path)))
    return noticed
