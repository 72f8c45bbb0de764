"""What a search holds fixed: as sentences shown with its result, and as conditions replaced by their answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from interlock.core.conditions import CALLER, CONDITIONS, Condition, Subject
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Rule
from interlock.core.states import VmState
from interlock.policies.laws import HOW_CHECKED
from interlock.policies.model_checker.actions import EXPLORED, RESET_TARGETS, Alphabet
from interlock.policies.model_checker.liveness import Stuck
from interlock.policies.model_checker.model import Model

_NAMED_MAX: Final = 3
"""How many rules are named for one assumption."""


def assumptions(
    model: Model, tried: Iterable[Operation], outstanding_max: int, stuck: Stuck | None = None
) -> tuple[str, ...]:
    """Return what the search of a model holds fixed, one sentence each.

    `tried` are the operations that were asked for, `stuck` the result of the liveness check. A condition that no rule
    has is no assumption.
    """
    return tuple(_sentences(model, frozenset(tried), outstanding_max, stuck))


def _sentences(model: Model, tried: frozenset[Operation], outstanding_max: int, stuck: Stuck | None) -> Iterator[str]:
    alphabet = model.alphabet
    rules = alphabet.policy.rules
    yield f"An instance begins in {_or(model.starts)} with nothing outstanding."
    requests = "request is" if outstanding_max == 1 else "requests are"
    yield f"At most {outstanding_max} {requests} outstanding, and one deletion more."
    yield from _callers(alphabet)
    for condition in CONDITIONS:
        if condition.reads not in EXPLORED and condition.subject is not Subject.CALLER:
            about = [rule for rule in rules if condition.of(rule) is not None]
            if about:
                yield _fixed(condition, about)
    yield from _surroundings(alphabet)
    submitted = {submission.operation for submission in alphabet.submissions}
    if Operation.EVACUATE in tried - submitted:
        yield "The host stays reachable, and nobody submits an evacuation."
    left_out = frozenset(Operation) - tried
    if left_out:
        yield f"Nobody submits {', '.join(operation.value for operation in Operation if operation in left_out)}."
    if Operation.RESET_STATE in submitted:
        yield f"reset_state leads to {_or(RESET_TARGETS)} only."
    if model.faults_max is not None:
        yield f"At most {model.faults_max} operations fail or guests end."
    yield _workers(stuck)
    yield "The deletion that is served last succeeds."
    if stuck is not None and stuck.completed:
        yield f"What is served completes, if it is {' or '.join(operation.value for operation in stuck.completed)}."
    if any(not rule.in_turn for rule in rules):
        yield "A request that a rule with `in_turn = false` admits may be cancelled: law 2 is not checked for it."
    yield HOW_CHECKED


def _workers(stuck: Stuck | None) -> str:
    """Say what workers do, and whether law 5 is kept while one makes progress for ever."""
    if stuck is None or not len(stuck.until_silence):
        return "A worker ends, hangs, or makes progress for ever."
    who = "nobody can delete" if len(stuck.with_progress) else "nobody can delete without a reset of the state"
    return f"A worker ends or hangs: as long as one makes progress, be it for ever, {who} in some states."


def _callers(alphabet: Alphabet) -> Iterator[str]:
    """Say who submits: callers of every role, and one for each class of names that rules do not distinguish."""
    rules = alphabet.policy.rules
    named = [condition.key for condition in CALLER if condition.reads != "role" and condition.wanted(rules)]
    others = f", and by {' and '.join(named)} as far as rules distinguish them" if named else ""
    yield f"Callers of every role submit{others}."


def _surroundings(alphabet: Alphabet) -> Iterator[str]:
    """Say what of locks, the host and the tags varies."""
    if alphabet.locks_by_least and alphabet.lock_levels:
        least = alphabet.lock_levels[0].value
        yield f"Locks are those of a {least}; a lock of a higher role only denies more to others."
    if alphabet.held:
        names = ", ".join(sorted({alphabet.submissions[number].operation.value for number in alphabet.held}))
        yield f"One request is held at a time ({names}); no way to delete counts on the end of its hold."
    if alphabet.idle_rules_on_holds:
        rules = _rules(alphabet.idle_rules_on_holds)
        yield f"The rules {rules} about held requests only refuse what no deletion needs, and are left out."
    if alphabet.sees_host:
        yield "The host is lost and comes back at any time; no way to delete counts on its return."
    if alphabet.tags:
        most = f", at most {alphabet.tags_together} at a time" if alphabet.tags_together < len(alphabet.tags) else ""
        tags = ", ".join(alphabet.tags)
        yield f"The tags {tags} are set and removed{most}; no way to delete counts on their removal."
    left_out = alphabet.named_tags[len(alphabet.tags) :]
    if left_out:
        yield f"The tags {', '.join(left_out)} are never set."


def _or(states: Iterable[VmState]) -> str:
    return " or ".join(state.value for state in states)


def _fixed(condition: Condition, about: list[Rule]) -> str:
    """Return the sentence about a condition whose value does not vary, with the rules that name another value."""
    value = condition.kind.found(condition.usual)
    return f"`{condition.key}` is always {value}; it is a condition of {_rules(about)}."


def _rules(rules: Sequence[Rule]) -> str:
    """Return the ids of the first few rules as written, and how many more there are."""
    families = list(dict.fromkeys(rule.family for rule in rules))
    more = f" and {len(families) - _NAMED_MAX} more" if len(families) > _NAMED_MAX else ""
    return f"{', '.join(families[:_NAMED_MAX])}{more}"


def with_assumed_values(policy: CompiledPolicy) -> tuple[CompiledPolicy, tuple[str, ...]]:
    """Return the policy without the conditions on values that are assumed, and the assumptions as sentences.

    A rule keeps the vm_states in which its conditions hold for the assumed values; without any it is left out. So a
    counterexample is one of the whole policy, for instances and requests with those values.
    """
    assumed = [one for one in CONDITIONS if one.assumed is not None and one.wanted(policy.rules)]
    if not assumed:
        return policy, ()
    rules = tuple(kept for rule in policy.rules if (kept := _with_answers(rule, assumed)) is not None)
    compiled = CompiledPolicy(msgspec.structs.replace(policy.policy, rules=rules))
    return compiled, tuple(dict.fromkeys(one.assumption for one in assumed))


def _with_answers(rule: Rule, assumed: list[Condition]) -> Rule | None:
    """Return a rule without the conditions that are assumed; None if it cannot hold then."""
    about = [(one, wanted) for one in assumed if (wanted := one.of(rule)) is not None]
    states = frozenset(VmState) - {VmState.DELETED} if rule.vm_states is None else rule.vm_states
    left = frozenset(state for state in states if all(_holds(one, wanted, state) for one, wanted in about))
    if not left:
        return None
    fields = {one.field: None for one, _ in about}
    return msgspec.structs.replace(rule, vm_states=rule.vm_states if left == states else left, **fields)


def _holds(condition: Condition, wanted: object, vm_state: VmState) -> bool:
    assert condition.assumed is not None, "the condition is one of those that are assumed"
    return bool(condition.kind.test(wanted)(condition.assumed(vm_state)))
