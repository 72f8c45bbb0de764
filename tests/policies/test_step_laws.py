"""The laws about requests on packed steps: each mistake that is made in the steps is found with its law."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

import proof_page
from interlock.core.operations import CATALOGUE, Operation
from interlock.core.states import VmState
from interlock.policies.language.loader import compile_named
from interlock.policies.laws import LAWS, SERVER_LAWS
from interlock.policies.model_checker.model import Model
from interlock.policies.model_checker.packed_laws import StepLaws
from interlock.policies.model_checker.queues import Queues
from interlock.policies.model_checker.search import Search
from interlock.policies.model_checker.steps import Action, Steps, Transitions

O = Operation  # noqa: E741
SUBMITTED = (O.STOP, O.START, O.REBOOT, O.SNAPSHOT, O.DETACH_VOLUME, O.SWAP_VOLUME, O.DELETE, O.RESET_STATE, O.LOCK)


def broken(policy: str = "standard") -> set[int]:
    """The laws that a short search finds broken."""
    model = Model(compile_named(policy), SUBMITTED, starts=[VmState.ACTIVE], outstanding_max=2)
    search = Search(model)
    search.run(states_max=4_000)
    return {breach.law for breach in search.breaches.found}


@pytest.mark.parametrize("name", ["standard", "take2", "propolis", "nova"])
def test_no_law_is_broken_without_a_mistake(name: str) -> None:
    assert broken(name) == set()


Mistake = Callable[[pytest.MonkeyPatch], None]


def beside_everything(patch: pytest.MonkeyPatch) -> None:
    """A component change is served beside any state change."""
    prepare = Steps.__init__

    def careless(self: Steps, *parts: Any) -> None:
        prepare(self, *parts)
        self.tables.kind_with_task[:] = True

    patch.setattr(Steps, "__init__", careless)


def a_second_state_change(patch: pytest.MonkeyPatch) -> None:
    """A state change is taken although one is served."""
    take = Steps.take

    def eager(self: Steps, words: Any, task: Any, component: Any) -> Transitions:
        return take(self, words, np.zeros_like(task), component)

    patch.setattr(Steps, "take", eager)


def doubled_by_a_cancellation(patch: pytest.MonkeyPatch) -> None:
    """What is cancelled stays, and comes once more."""

    def doubling(self: Steps, words: Any) -> Iterator[Transitions]:
        mask = self.layout.queue.mask
        rows = np.flatnonzero(words & mask)
        queue = words[rows] & mask
        twice = queue << self.layout.kind_bits | queue & self.layout.queue_first
        yield Transitions(Action.CANCEL, rows, (words[rows] & ~mask) | twice & mask)

    patch.setattr(Steps, "_cancelled", doubling)


def ended_by_progress(patch: pytest.MonkeyPatch) -> None:
    """A progress report ends the request that it is about."""

    def fatal(self: Steps, words: Any, busy: Any, component_busy: Any) -> Iterator[Transitions]:
        yield Transitions(Action.LIFE, busy, words[busy] & ~self.layout.served)

    patch.setattr(Steps, "_signs_of_life", fatal)


def fenced_and_served(patch: pytest.MonkeyPatch) -> None:
    """The worker that did not stop in time is fenced, and goes on."""

    def lenient(self: Steps, words: Any) -> Transitions:
        rows = np.flatnonzero(words & self.layout.deadline.mask)
        return Transitions(Action.DEADLINE, rows, words[rows] & ~self.layout.deadline.mask)

    patch.setattr(Steps, "deadline", lenient)


def nobody_is_asked_to_stop(patch: pytest.MonkeyPatch) -> None:
    """A preempting request is queued, and the worker in service knows nothing of it."""
    reevaluate = Queues.reevaluate

    def silent(self: Queues, words: Any, queue: Any, **more: Any) -> Any:
        words &= ~self._layout.deadline.mask
        return reevaluate(self, words, queue, **more)

    patch.setattr(Queues, "reevaluate", silent)


def success_without_effect(patch: pytest.MonkeyPatch) -> None:
    """A success leaves the instance as it was."""

    def idle(self: Steps, words: Any, busy: Any) -> Transitions:
        gone = self.layout.served | self.layout.idle.mask
        return Transitions(Action.SUCCEED, busy, self.queues.reevaluated(words[busy] & ~gone))

    patch.setattr(Steps, "succeeded", idle)


def served_after_success(patch: pytest.MonkeyPatch) -> None:
    """An operation that failed is still being served."""

    def stubborn(self: Steps, words: Any, busy: Any, component_busy: Any) -> Iterator[Transitions]:
        yield Transitions(Action.INTERRUPT, busy, words[busy])

    patch.setattr(Steps, "_ends", stubborn)


def newest_first(patch: pytest.MonkeyPatch) -> None:
    """A request is queued before those that came first."""

    def pushing(self: Queues, words: Any, kind: Any) -> Any:
        mask = self._layout.queue.mask
        return (words & ~mask) | (words & mask) << self._layout.kind_bits | kind

    patch.setattr(Queues, "appended", pushing)


def the_last_component_first(patch: pytest.MonkeyPatch) -> None:
    """A component change is taken before everything that waits."""
    take = Steps.take_component

    def unfair(self: Steps, words: Any, task: Any, component: Any) -> Transitions:
        preempts = self.tables.preempts.copy()
        self.tables.preempts[:] = False
        try:
            return take(self, words, np.where(task == 0, 1, task), component)
        finally:
            self.tables.preempts[:] = preempts

    patch.setattr(Steps, "take_component", unfair)


MISTAKES: tuple[tuple[int, str, Mistake], ...] = (
    (1, "a component change is served beside any state change", beside_everything),
    (1, "a state change is taken while another is served", a_second_state_change),
    (3, "a cancelled request stays and comes once more", doubled_by_a_cancellation),
    (3, "a progress report ends its request", ended_by_progress),
    (4, "a fenced worker goes on", fenced_and_served),
    (4, "a worker is preempted and not asked to stop", nobody_is_asked_to_stop),
    (7, "a success has no effect", success_without_effect),
    (7, "what has ended is still served", served_after_success),
    (12, "the newest request is queued first", newest_first),
    (12, "a component change overtakes what waits", the_last_component_first),
)
"""The law, the mistake as docs/proof.md has it, and what makes it."""


def test_the_page_lists_these_mistakes() -> None:
    listed = {law: proof_page.mistakes(law).steps for law in (*LAWS, *SERVER_LAWS)}
    made = {law: [what for number, what, _ in MISTAKES if number == law] for law in listed}
    assert listed == made


@pytest.mark.parametrize(
    ("law", "mistake"),
    [(law, mistake) for law, _, mistake in MISTAKES],
    ids=[mistake.__name__ for _, _, mistake in MISTAKES],
)
def test_a_mistake_in_the_steps_is_found_with_its_law(
    monkeypatch: pytest.MonkeyPatch, law: int, mistake: Mistake
) -> None:
    mistake(monkeypatch)
    assert law in broken()
    monkeypatch.setattr(StepLaws, "check", lambda *_: None)
    assert law not in broken(), "something else than these checks finds it"


def test_a_success_that_leads_elsewhere_than_the_catalogue_says_breaks_law_7(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of the steps are computed by the core; the check reads the catalogue."""
    model = Model(compile_named("standard"), SUBMITTED, starts=[VmState.ACTIVE], outstanding_max=1)
    other = {**CATALOGUE, O.STOP: msgspec.structs.replace(CATALOGUE[O.STOP], to=VmState.PAUSED)}
    monkeypatch.setattr("interlock.policies.model_checker.packed_laws.CATALOGUE", other)
    search = Search(model)
    search.run(states_max=500)
    assert {breach.law for breach in search.breaches.found} == {7}
