"""Check at a policy switch: each VM with outstanding or held requests can still be deleted under the new policy.

The model checker explores a policy from new instances. A switch meets instances whose requests an earlier policy
admitted, in states that the new policy may never lead to. For each of them the core itself is searched for a way to
`deleted` that needs no worker's report except the success of a deletion: submissions of every class of callers,
requests that are taken, deadlines, and time. One instance of each class that no policy involved distinguishes is
searched.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from interlock.core import admission, lifecycle
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.policy_switches import Outstanding
from interlock.core.preconditions import unmet
from interlock.core.records import NO_FACTS, SERVED, Admitted, Instance, Outcome, Request, Status, Submission
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.core.view_classes import callers
from interlock.core.views import at_present
from interlock.policies.active_policy import Earlier, PolicyInForce

STATES_MAX: Final = 2_000
"""Maximum number of states searched for one instance; after that, no way to delete it is known."""
BLOCKED_MAX: Final = 5
"""How many classes of blocked instances are looked for: each takes a complete search."""
_DELETIONS: Final = (Operation.DELETE, Operation.FORCE_DELETE, Operation.SOFT_DELETE)
"""Operations whose success is counted on: the goal is reached by them."""
_NEW: Final = "new"


class BlockedInstance(msgspec.Struct, frozen=True, kw_only=True):
    """An instance that nobody could delete any more after a policy switch."""

    instance_id: str
    name: str
    project: str
    operation: Operation
    """Of its request in flight, or else of the first one that is queued or held."""
    status: Status
    """Of that request."""
    because: str
    """How it can no longer be deleted, as a sentence."""
    alike: int = 0
    """How many more instances are in the same situation."""
    rejudge_helps: bool = False
    """Whether it could be deleted if the switch evaluated queued requests again (`rejudge`)."""

    @property
    def message(self) -> str:
        """Say which instance it is, and why it could not be deleted."""
        request = f"{self.operation.value} {self.status.value.replace('_', ' ')}"
        more = f" The same holds for {self.alike} more." if self.alike else ""
        what = f"VM {self.name!r} of project {self.project!r}, with {request}, could no longer be deleted"
        return f"{what}: {self.because}{more}"

    @property
    def remedy(self) -> str:
        """Say what to do about it."""
        requests = f"the requests of VM {self.name!r} have ended, or cancel them, and load the policy again."
        if not self.rejudge_helps:
            return f"Wait until {requests}"
        return f"Load it with `--outstanding rejudge`, which cancels what it does not permit; or wait until {requests}"


class SwitchCheck:
    """Compares what can be deleted before and after one switch; remembers the classes of instances it has searched."""

    def __init__(
        self, before: PolicyInForce, new: CompiledPolicy, outstanding: Outstanding, reachable: Callable[[str], bool]
    ) -> None:
        """`before` is in force now; `reachable` returns whether a host, by name, is reachable.

        The policies are used in the thread that calls `blocked`, and must not be shared with another.
        """
        self._before = before
        self._after = PolicyInForce(new)
        self._rejudges = outstanding is Outstanding.REJUDGE
        self._reachable = reachable
        self._searches: dict[tuple[bool, bool], _Search] = {}
        self._searched: dict[Hashable, BlockedInstance | None] = {}
        self._class_of = _instance_classes((before.compiled, new, *(one.compiled for one in before.earlier)))

    def blocked(
        self, instances: Iterable[Instance], now_ms: int, *, until_s: float = math.inf
    ) -> tuple[BlockedInstance, ...]:
        """Return those that can always be deleted before the switch and not after it, one of each class.

        The search ends at `BLOCKED_MAX` of them.

        Raises:
            TimeoutError: the monotonic clock reached `until_s`.
        """
        if not self._rejudges:
            self._after.replace(self._after.compiled, (*self._before.earlier, Earlier(self._before.compiled, now_ms)))
        # Whatever is submitted in a search is submitted after the switch.
        later_ms = now_ms + 1
        counts: dict[Hashable, int] = {}
        failed = 0
        for instance in instances:
            if not instance.outstanding and not instance.held:
                continue
            key = self._class_of(instance, later_ms, self._reachable(instance.host), self._after.earlier)
            counts[key] = counts.get(key, -1) + 1
            if key not in self._searched:
                if failed >= BLOCKED_MAX:
                    continue
                if time.monotonic() >= until_s:
                    raise TimeoutError
                self._searched[key] = self._search(instance, later_ms)
            failed += self._searched[key] is not None and counts[key] == 0
        found = ((self._searched.get(key), more) for key, more in counts.items())
        return tuple(msgspec.structs.replace(one, alike=more) for one, more in found if one is not None)

    def _search(self, instance: Instance, now_ms: int) -> BlockedInstance | None:
        reachable = self._reachable(instance.host)
        again = lifecycle.rejudge(instance, self._after.compiled, now_ms, host_reachable=reachable).instance
        after = again if self._rejudges else instance
        trap = self._search_of(self._after, reachable=reachable).trap(after, now_ms)
        if trap is None or self._search_of(self._before, reachable=reachable).trap(instance, now_ms) is not None:
            return None  # the switch takes nothing away
        first = (*after.outstanding, *after.held, *instance.outstanding, *instance.held)[0]
        return BlockedInstance(
            instance_id=instance.id,
            name=instance.name,
            project=instance.project,
            operation=first.operation,
            status=first.status,
            because=trap,
            rejudge_helps=not self._rejudges
            and _Search(PolicyInForce(self._after.compiled), reachable=reachable).trap(again, now_ms) is None,
        )

    def _search_of(self, in_force: PolicyInForce, *, reachable: bool) -> _Search:
        key = (in_force is self._after, reachable)
        if key not in self._searches:
            self._searches[key] = _Search(in_force, reachable=reachable)
        return self._searches[key]


class _Moment(NamedTuple):
    """A state of the search."""

    instance: Instance
    now_ms: int


def _doing(instance: Instance) -> str:
    serving = instance.served(Lane.STATE) or instance.served(Lane.COMPONENT)
    return f"in {instance.vm_state.value}" + (
        "" if serving is None else f" while {serving.operation.value} is in flight"
    )


class _Search:
    """A search on the core under one policy in force. Workers never report, except that deletions succeed."""

    def __init__(self, in_force: PolicyInForce, *, reachable: bool) -> None:
        self._in_force = in_force
        self._reachable = reachable
        self._class_of = _instance_classes((in_force.compiled, *(one.compiled for one in in_force.earlier)))
        rules = in_force.compiled.rules
        self._good: dict[Hashable, bool] = {}
        """Whether a way to `deleted` is known, by class of instances."""
        self._free: set[Hashable] = set()
        """The classes of instances in which no trap is."""
        self._callers = {
            operation: tuple(callers([rule for rule in rules if operation in rule.operations]))
            for operation in Operation
        }

    def trap(self, instance: Instance, now_ms: int) -> str | None:
        """Return how the instance can no longer be deleted; None if it always can.

        It always can if there is a way from every state that its workers may lead to, and from each of these after one
        more request.
        """
        pending = [_Moment(instance, now_ms)]
        for here in pending:
            key = self._key(here)
            if key in self._free:
                continue
            if (found := self._trap_in(here)) is not None:
                return found
            self._free.add(key)
            # Once nothing is outstanding, the instance is as one that the model checker begins with.
            pending += [one for one in self._worked(here) if one.instance.outstanding or one.instance.held]
        return None

    def _trap_in(self, here: _Moment) -> str | None:
        where = _doing(here.instance)
        if not self._reaches_deleted(here):
            return f"{where}, nothing that any role may submit leads to its deletion."
        for answer, following in self._submitted(here, Operation):
            if not self._reaches_deleted(following):
                return (
                    f"{where}, {answer.request.operation.value} is admitted (rule {answer.rule!r}), and then nothing "
                    "that any role may submit leads to its deletion."
                )
        return None

    def _worked(self, moment: _Moment) -> Iterator[_Moment]:
        """Yield what the workers of the instance may do next: take a request, enter a phase, succeed, or fail."""
        instance, now_ms = moment
        yield from self._taken(moment)
        policy = self._in_force.for_waiting(instance)
        for one in instance.outstanding:
            if one.status not in SERVED:
                continue
            entry = CATALOGUE[one.operation]
            phases = entry.hard_phases if one.phase in entry.hard_phases else entry.phases
            later = phases[phases.index(one.phase) + 1 :] if one.phase in phases else ()
            for phase in later[:1]:
                entered = lifecycle.progress(instance, one.id, one.fence, now_ms, phase=phase)
                yield _Moment(entered.instance, now_ms)
            for outcome in (Outcome.SUCCEEDED, Outcome.FAILED):
                ended = lifecycle.finish(
                    instance, one.id, one.fence, outcome, policy, now_ms, host_reachable=self._reachable
                )
                yield _Moment(ended.instance, now_ms)

    def _taken(self, moment: _Moment) -> Iterator[_Moment]:
        """Yield what the state driver does next: it applies what is due, or gives a request to a worker."""
        instance, now_ms = moment
        deciding = self._in_force.for_instance(instance)
        expired = lifecycle.expire(instance, deciding, now_ms, host_reachable=self._reachable)
        if expired.instance is not instance:
            yield _Moment(expired.instance, now_ms)
            return
        for lane in (None, Lane.COMPONENT):
            taken = lifecycle.take(instance, lane, now_ms, host_reachable=self._reachable)
            if taken.answer is not None:
                yield _Moment(taken.instance, now_ms)

    def _reaches_deleted(self, start: _Moment) -> bool:
        """Return whether some way leads to `deleted`; first only deletions are submitted, then everything."""
        key = self._key(start)
        if key not in self._good:
            ways = (_DELETIONS, tuple(Operation))
            self._good[key] = any(self._found(start, operations) for operations in ways)
        return self._good[key]

    def _found(self, start: _Moment, operations: Iterable[Operation]) -> bool:
        known = {self._key(start)}
        path = [self._following(start, operations)]
        while path and len(known) <= STATES_MAX:
            following = next(path[-1], None)
            if following is None:
                path.pop()
                continue
            if following.instance.vm_state is VmState.DELETED:
                return True
            key = self._key(following)
            if self._good.get(key):
                return True
            if key not in known:
                known.add(key)
                path.append(self._following(following, operations))
        return False

    def _key(self, moment: _Moment) -> Hashable:
        return self._class_of(moment.instance, moment.now_ms, self._reachable, self._in_force.earlier)

    def _following(self, moment: _Moment, operations: Iterable[Operation]) -> Iterator[_Moment]:
        """Yield what follows without any worker's help, except that of a deletion."""
        instance, now_ms = moment
        serving = instance.served(Lane.STATE)
        if serving is not None and serving.operation in _DELETIONS:
            policy = self._in_force.for_waiting(instance)
            ended = lifecycle.finish(
                *(instance, serving.id, serving.fence, Outcome.SUCCEEDED, policy, now_ms),
                host_reachable=self._reachable,
            )
            yield _Moment(ended.instance, now_ms)
        yield from self._taken(moment)
        deleting = any(one.operation in _DELETIONS for one in instance.outstanding)
        if deleting:
            yield from self._later(moment, operations)
        for answer, following in self._submitted(moment, operations):
            request = answer.request
            # What only waits behind a request in flight ends nothing that hangs.
            waits = bool(instance.outstanding) and not request.preempts and request.lane is not Lane.RECORD
            if not waits or request.operation in _DELETIONS:
                yield following
        if not deleting:
            yield from self._later(moment, operations)

    def _submissions(self, operations: Iterable[Operation]) -> Iterator[Submission]:
        for operation in operations:
            reset = {"vm_state": VmState.ERROR.value} if operation is Operation.RESET_STATE else {}
            variants: list[dict[str, Any]] = [reset, {"hard": True}] if CATALOGUE[operation].hard_phases else [reset]
            for caller in reversed(self._callers[operation]):
                for parameters in variants:
                    yield Submission(
                        request_id=_NEW,
                        operation=operation,
                        parameters=parameters,
                        host_reachable=self._reachable,
                        **caller,
                    )

    def _submitted(self, moment: _Moment, operations: Iterable[Operation]) -> Iterator[tuple[Admitted, _Moment]]:
        """Yield the instance after each submission that is admitted, with the answer."""
        instance, now_ms = moment
        new = f"{_NEW}-{instance.generation}"
        policy = self._in_force.for_instance(instance)
        for submission in self._submissions(operations):
            named = msgspec.structs.replace(submission, request_id=new)
            change = admission.admit_there(instance, named, policy, now_ms)
            if isinstance(change.answer, Admitted):
                yield change.answer, _Moment(change.instance, now_ms)

    def _later(self, moment: _Moment, operations: Iterable[Operation]) -> Iterator[_Moment]:
        """Yield the instance at the next time at which a deadline passes or an answer may change, if there is one."""
        instance, now_ms = moment
        deadline_ms = lifecycle.next_deadline_ms(instance)
        policy = self._in_force.compiled
        plain = (Submission(request_id=_NEW, operation=operation, requested_by="") for operation in operations)
        views = (policy.view(instance, submission, now_ms) for submission in plain)
        waits = [wait for view in views if (wait := policy.changes_in_ms(view, now_ms)) is not None]
        moments = [now_ms + wait for wait in waits]
        if deadline_ms is not None and deadline_ms > now_ms:
            moments.append(deadline_ms)
        if moments:
            yield _Moment(instance, min(moments))


def _instance_classes(
    policies: Iterable[CompiledPolicy],
) -> Callable[[Instance, int, bool, Sequence[Earlier]], Hashable]:
    """Return a function that gives instances the same key if these policies do not distinguish them.

    It takes the instance, the time, whether its host is reachable, and the earlier policies that bind.
    """
    known = tuple(policies)
    rules = [rule for policy in known for rule in policy.rules]
    bounds = sorted({bound for rule in rules for bound in (rule.threshold_ms, rule.silent_ms_min) if bound})

    def request_class(request: Request, instance: Instance, now_ms: int, reachable: bool) -> Hashable:
        view = at_present(instance, host_reachable=reachable).view(request)
        classes = tuple(policy.class_of(view) for policy in known)
        common = (classes, request.hard, request.status, request.preempts, request.in_turn, request.phase)
        if request.status not in SERVED:
            return common
        since_ms = (request.last_progress_at_ms, request.taken_at_ms)
        ages = tuple(bisect_right(bounds, now_ms - (at_ms or request.taken_at_ms or 0)) for at_ms in since_ms)
        deadline_ms = request.interrupt_deadline_ms
        return (*common, ages, None if deadline_ms is None else deadline_ms <= now_ms)

    def instance_class(instance: Instance, now_ms: int, reachable: bool, earlier: Sequence[Earlier]) -> Hashable:
        plain = Submission(
            request_id=_NEW, operation=Operation.DELETE, requested_by="", role=Role.ADMIN, host_reachable=reachable
        )
        oldest_ms = min((request.admitted_at_ms for request in instance.outstanding), default=now_ms)
        return (
            tuple(policy.class_of(policy.view(instance, plain, now_ms)) for policy in known),
            instance.state_stack,
            instance.blocked_operations,
            instance.host_fenced,
            tuple(unmet(instance, operation, {}, NO_FACTS) is None for operation in _DELETIONS),
            tuple(request_class(request, instance, now_ms, reachable) for request in instance.outstanding),
            tuple(request_class(request, instance, now_ms, reachable) for request in instance.held),
            instance.held_due_ms is not None and instance.held_due_ms <= now_ms,
            sum(one.until_ms >= oldest_ms for one in earlier),
        )

    return instance_class
