"""The packed transition relation equals that of the core.

A word is decoded to an instance, every transition is applied by the core's functions, and the results are encoded. Both
sets of states must be equal.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core import admission, lifecycle
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import Before, CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict
from interlock.core.records import SERVED, Admitted, GuestEvent, Instance, Outcome, Request
from interlock.core.references import MIGRATIONS
from interlock.core.roles import Role
from interlock.core.state_stack import ARRIVES
from interlock.core.states import VmState
from interlock.policies.language.loader import compile_named
from interlock.policies.laws import POLICY_LAWS
from interlock.policies.model_checker.model import Model
from interlock.policies.model_checker.search import Search
from interlock.policies.model_checker.state_encoding import NOW_MS, Words
from model_checker_reference import Walk
from tiers import tier

O = Operation  # noqa: E741
BUILT_IN = ("standard", "take2", "propolis", "nova")
SAMPLES = tier(40, 600)


def model_of(policy: CompiledPolicy, outstanding_max: int, **more: Any) -> Model:
    return Model(policy, Operation, starts=[VmState.BUILDING], outstanding_max=outstanding_max, **more)


def walked(model: Model, states_max: int = 1_000_000) -> Words:
    search = Search(model)
    search.run(states_max=states_max)
    return search.visited.words


def by_packed_steps(model: Model, words: Words) -> list[set[int]]:
    """Return the successors of each state by the packed search, without itself."""
    found: list[set[int]] = [set() for _ in words]
    for transitions in model.after(words, model.gate.answers(words)):
        for row, word in zip(transitions.rows.tolist(), transitions.words.tolist(), strict=True):
            found[row].add(word)
    for own, there in zip(words.tolist(), found, strict=True):
        there.discard(own)
    return found


def by_the_core(model: Model, word: int) -> set[int]:
    """Return the successors of a state by the core, without itself."""
    encoding = model.encoding
    instance = encoding.unpack(word)
    reachable = encoding.host_reachable(word)
    packed = encoding.pack(instance, NOW_MS, host_reachable=reachable)
    assert packed == word, "the decoded instance encodes to another word"
    found = {
        encoding.pack(after, NOW_MS, host_reachable=there)
        for after, there in core_successors(model, instance, host_reachable=reachable)
    }
    found.update(successors_in_time(model, word))
    return found - {word}


def core_successors(model: Model, instance: Instance, *, host_reachable: bool) -> Iterator[tuple[Instance, bool]]:
    """Yield the instance after everything that can happen to it, and whether its host is reachable then."""
    policy, there, by = model.alphabet.policy, host_reachable, "someone"
    for lane in (Lane.STATE, Lane.COMPONENT):
        yield lifecycle.take(instance, lane, NOW_MS, host_reachable=there).instance, there
    for request in instance.outstanding:
        yield lifecycle.cancel(instance, request.id, policy, by, NOW_MS, host_reachable=there).instance, there
        if request.status in SERVED:
            for phase in next_phases(model, request):
                yield lifecycle.progress(instance, request.id, request.fence, NOW_MS, phase=phase).instance, there
            yield from finished(model, instance, request, host_reachable=there)
    for event in GuestEvent:
        yield lifecycle.observe(instance, event, policy, NOW_MS, host_reachable=there).instance, there
    yield lifecycle.adopt(instance, NOW_MS).instance, there
    yield from ((after, there) for after in admitted(model, instance, host_reachable=there))
    if model.alphabet.sees_host:
        yield lifecycle.rejudge(instance, policy, NOW_MS, host_reachable=not there).instance, not there
    for tag in model.alphabet.tags:
        tags = tuple({*instance.tags} ^ {tag})
        if len(tags) <= model.alphabet.tags_together:
            yield (
                lifecycle.relabel(
                    instance, policy, by, NOW_MS, role=Role.ADMIN, host_reachable=there, tags=tags
                ).instance,
                there,
            )


def finished(
    model: Model, instance: Instance, request: Request, *, host_reachable: bool
) -> Iterator[tuple[Instance, bool]]:
    """Yield the instance after each outcome of a request in service; a migration leads to a reachable host."""
    outcomes = [(outcome, False) for outcome in Outcome]
    for outcome, arrived in [*outcomes, (Outcome.SUCCEEDED, request.operation in ARRIVES)]:
        moved = outcome is Outcome.SUCCEEDED and request.operation in MIGRATIONS
        there = host_reachable or moved
        yield (
            lifecycle.finish(
                instance,
                request.id,
                request.fence,
                outcome,
                model.alphabet.policy,
                NOW_MS,
                arrived=arrived,
                host_reachable=there,
            ).instance,
            there,
        )


def next_phases(model: Model, request: Request) -> Iterable[str | None]:
    yield None
    if request.lane is Lane.STATE:
        phases = model.alphabet.phases(request.operation, hard=request.hard)
        yield from (after for before, after in pairwise(phases) if before == request.phase)


def admitted(model: Model, instance: Instance, *, host_reachable: bool) -> Iterator[Instance]:
    for submission in model.alphabet.submissions:
        new = submission.submission("new", host_reachable=host_reachable)
        change = admission.admit_there(instance, new, model.alphabet.policy, NOW_MS)
        on_top = 1 if CATALOGUE[submission.operation].to is VmState.DELETED else 0
        if isinstance(change.answer, Admitted):
            room = CATALOGUE[submission.operation].lane is Lane.RECORD
            if room or len(change.instance.outstanding) <= model.layout.slots - 1 + on_top:
                yield change.instance


def successors_in_time(model: Model, word: int) -> Iterator[int]:
    """Yield the successors in which one age reaches its next class, or a deadline passes, and nothing else changes."""
    layout, alphabet = model.layout, model.alphabet
    task, component = layout.task.one(word), layout.component.one(word)
    ages = alphabet.task_ages[task - 1] if task else None
    bounds = [
        (layout.silent, len(ages.silent) if ages else 0),
        (layout.running, len(ages.running) if ages else 0),
        (layout.component_silent, len(alphabet.component_ages.silent) if component else 0),
        (layout.component_running, len(alphabet.component_ages.running) if component else 0),
        (layout.idle, len(alphabet.idle_ages)),
    ]
    expiring = [field for field, classes in bounds if field.one(word) < classes]
    expiring += [field for field in (layout.deadline, layout.component_deadline) if field.one(word)]
    deadlines = (layout.deadline, layout.component_deadline)
    reachable = model.encoding.host_reachable(word)
    for field in expiring:
        instance = model.encoding.unpack(word, field)
        if model.encoding.pack(instance, NOW_MS, host_reachable=reachable) != word:
            continue  # This age cannot be the first to change there.
        change = lifecycle.expire(instance, alphabet.policy, NOW_MS + 1, host_reachable=reachable)
        there = model.encoding.pack(change.instance, NOW_MS + 1, host_reachable=reachable)
        # Two ages that change at one time are two transitions of the packed search.
        if field in deadlines or (there ^ word) & ~field.mask == 0:
            yield there


def assert_same_steps(model: Model, words: Words) -> None:
    for word, packed in zip(words.tolist(), by_packed_steps(model, words), strict=True):
        core = by_the_core(model, word)
        assert packed == core, describe(model, word, packed, core)


def describe(model: Model, word: int, packed: set[int], core: set[int]) -> str:
    def described(other: int) -> str:
        instance = model.encoding.unpack(other)
        queue = ", ".join(f"{r.operation.value}:{r.status.value}" for r in instance.outstanding)
        return f"{instance.vm_state.value} {instance.state_stack} [{queue}] {other:#x}"

    lines = [f"from {described(word)}", *(f"packed only: {described(one)}" for one in packed - core)]
    return "\n".join([*lines, *(f"core only: {described(one)}" for one in core - packed)])


def sampled(words: Words, count: int, seed: int) -> Words:
    chosen = random.Random(seed).sample(range(len(words)), min(count, len(words)))
    found: Words = words[np.array(sorted(chosen))]
    return found


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_step_with_one_outstanding_request_equals_the_core(name: str) -> None:
    model = model_of(compile_named(name), 1)
    words = walked(model)
    assert len(words) > 50
    assert_same_steps(model, sampled(words, tier(500, len(words)), seed=1))


@pytest.mark.parametrize("outstanding_max", [2, 3])
@pytest.mark.parametrize("name", BUILT_IN)
def test_steps_with_a_longer_queue_equal_the_core(name: str, outstanding_max: int) -> None:
    model = model_of(compile_named(name), outstanding_max)
    words = walked(model, states_max=tier(30_000, 300_000))
    assert_same_steps(model, sampled(words, SAMPLES, seed=outstanding_max))


def test_steps_of_several_callers_equal_the_core() -> None:
    """A robot may rebuild where nobody else may, and not stop."""
    robots = frozenset({"ci-*", "ci-1"})
    rules = (
        Rule(id="robots", operations=frozenset({O.STOP}), verdict=Verdict.DENY, requested_by=robots),
        Rule(id="rebuild", operations=frozenset({O.REBUILD}), verdict=Verdict.ADMIT, requested_by=robots - {"ci-1"}),
        Rule(id="nobody", operations=frozenset({O.REBUILD}), verdict=Verdict.DENY),
    )
    standard = compile_named("standard").policy
    policy = CompiledPolicy(msgspec.structs.replace(standard, rules=(*rules, *standard.rules)))
    model = Model(
        policy, (O.CREATE, O.START, O.STOP, O.REBUILD, O.DELETE), starts=[VmState.BUILDING], outstanding_max=2
    )
    assert len({dict(caller)["requested_by"] for caller in model.alphabet.callers(O.STOP)}) == 2
    assert_same_steps(model, sampled(walked(model), SAMPLES, seed=11))


@pytest.mark.parametrize("name", BUILT_IN)
def test_whatever_the_walk_by_objects_meets_the_packed_walk_has_seen(name: str) -> None:
    """The words of all of its instances, ages apart: it tells fewer of those apart, and comes by them otherwise."""
    policy, operations = compile_named(name), tier((*FEW, O.RESET_STATE), tuple(O))
    objects = Walk(policy, operations, 2, tier(1_000, 4_000), VmState.DELETED)
    objects.run([VmState.BUILDING], math.inf)
    model = Model(policy, operations, starts=[VmState.BUILDING], outstanding_max=2)
    layout = model.layout
    seen = set((walked(model) & ~(layout.silent.mask | layout.running.mask | layout.idle.mask)).tolist())
    ageless = ~(layout.silent.mask | layout.running.mask | layout.idle.mask)
    met = {model.encoding.pack(node.instance, node.now_ms) & ageless for node in objects.nodes}
    assert len(met) > 100
    assert met <= seen


# --------------------------------------------------------------------------------------------------- random policies

FEW = (
    O.CREATE,
    O.START,
    O.STOP,
    O.REBOOT,
    O.RESCUE,
    O.UNRESCUE,
    O.SWAP_VOLUME,
    O.ATTACH_VOLUME,
    O.DELETE,
    O.EVACUATE,
    O.LOCK,
    O.UNLOCK,
)
PHASES = ("none", "scheduling", "spawning", "powering_on", "powering_off", "powering_off_hard", "rebooting", "deleting")
MOMENTS = (15_000, 60_000, 180_000)


def some_of(words: Iterable[Any], most: int = 4) -> st.SearchStrategy[frozenset[Any] | None]:
    return st.none() | st.frozensets(st.sampled_from(list(words)), min_size=1, max_size=most)


flags = st.none() | st.none() | st.booleans()


@st.composite
def rules(draw: st.DrawFn, number: int) -> Rule:
    verdict = draw(st.sampled_from([Verdict.ADMIT, Verdict.ADMIT, *Verdict]))
    return Rule(
        id=f"r{number}",
        operations=draw(st.frozensets(st.sampled_from(FEW), min_size=1, max_size=6)),
        verdict=verdict,
        vm_states=draw(some_of(VmState)),
        task_states=draw(some_of(PHASES)),
        outstanding=draw(st.none() | st.just(frozenset()) | st.frozensets(st.sampled_from(FEW), max_size=3)),
        locked=draw(flags),
        launched=draw(flags),
        hard=draw(flags),
        host_reachable=draw(flags),
        tags=draw(st.none() | st.none() | st.sampled_from([frozenset({"gpu"}), frozenset({"freeze", "gpu"})])),
        roles=draw(
            st.none() | st.none() | st.sampled_from([frozenset({Role.MEMBER}), frozenset({Role.ADMIN, Role.READER})])
        ),
        requested_by=draw(st.none() | st.none() | st.just(frozenset({"ci-*"}))),
        silent_ms_min=draw(st.none() | st.none() | st.sampled_from(MOMENTS)),
        threshold_ms=draw(st.sampled_from(MOMENTS)) if verdict is Verdict.AFTER else None,
        measured_from=draw(st.sampled_from(MeasuredFrom)),
        before=draw(st.sampled_from(Before)),
        grace_ms=draw(st.sampled_from([2_000, 10_000, 30_000])),
        in_turn=draw(st.sampled_from([True, True, False])),
        reason="why",
    )


@st.composite
def policies(draw: st.DrawFn) -> CompiledPolicy:
    """Draw a few random rules, followed by one that admits everything."""
    count = draw(st.integers(min_value=1, max_value=8))
    chosen = [draw(rules(number)) for number in range(count)]
    open_rule = Rule(id="open", operations=frozenset(FEW), verdict=Verdict.ADMIT)
    most = draw(st.sampled_from([2, 16]))
    return CompiledPolicy(Policy(name="random", rules=(*chosen, open_rule), outstanding_max=most))


@settings(max_examples=tier(12, 125))
@given(policy=policies(), outstanding_max=st.integers(min_value=1, max_value=3))
def test_under_random_policies_too_every_step_equals_the_core(policy: CompiledPolicy, outstanding_max: int) -> None:
    starts = [VmState.BUILDING, VmState.ACTIVE, VmState.RESCUED]
    model = Model(policy, FEW, starts=starts, outstanding_max=outstanding_max)
    search = Search(model)
    search.run(states_max=2_000)
    assert {breach.law for breach in search.breaches.found} <= POLICY_LAWS, "a policy breaks a law that none can break"
    assert_same_steps(model, sampled(search.visited.words, 40, seed=outstanding_max))
