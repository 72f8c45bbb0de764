"""One exploration of a policy, from its tables to its stories."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from interlock.core.errors import Invalid
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.states import VmState
from interlock.policies.exploring import by_objects
from interlock.policies.exploring.escapes import without_escape
from interlock.policies.exploring.explorations import Exit, Exploration, OnAdvance, Violation
from interlock.policies.exploring.gate_table import Effect
from interlock.policies.exploring.model import Model
from interlock.policies.exploring.stories import Storyteller
from interlock.policies.exploring.walking import Walk

DEFAULT_STATES_MAX: Final = 20_000_000
COMPARED_MAX: Final = 2_000
"""How many states are walked by objects too; none if faults are bounded, which that walk does not know."""
_SHARE_OF_WALK: Final = 0.55
_SHARE_OF_ESCAPES: Final = 0.85
"""Until when of a limited time a walk may last, and the search for a way out behind it; the rest is for the objects."""
_NO_REMEDY: Final = frozenset({Operation.DELETE, Operation.FORCE_DELETE, Operation.RESET_STATE})


def explore(
    policy: CompiledPolicy,
    *,
    operations: Iterable[Operation] | None = None,
    starts: Iterable[VmState] = (VmState.BUILDING,),
    outstanding_max: int = 3,
    faults_max: int | None = None,
    states_max: int = DEFAULT_STATES_MAX,
    seconds_max: float | None = None,
    role: str = "member",
    goal: VmState = VmState.DELETED,
    on_advance: OnAdvance | None = None,
) -> Exploration:
    """Walk from `starts` with `operations` (None: all) submitted by `role`, up to `outstanding_max` requests at a time.

    Operations that lead to `goal` may stand on top of that bound, since they must always be able to come in.
    `faults_max` limits how often in one story an operation fails or a guest ends by itself (None: any number of times);
    a worker may always hang. `seconds_max` ends the walk early; what it came by is then checked, and `complete` is
    false. A walk in limited time also makes do with fewer outstanding requests, where states would not fit into a word.

    Raises:
        Invalid: the bound is too large for so many operations and moments: states would not fit into a word.
        BrokenInvariant: the core does not confirm a story: it and the walk disagree, which is a defect of the walk.
    """
    started_s = time.monotonic()
    limit_s = math.inf if seconds_max is None else seconds_max
    asked, begins = tuple(Operation if operations is None else operations), tuple(starts)

    def modelled(most: int) -> Model:
        return Model(policy, asked, starts=begins, outstanding_max=most, faults_max=faults_max, role=role, goal=goal)

    model, walked_max = _fitting(modelled, outstanding_max, outstanding_max if seconds_max is None else 1)
    walk = Walk(model, on_advance)
    walk.run(states_max=states_max, started_s=started_s, until_s=started_s + _SHARE_OF_WALK * limit_s)
    searched = _search_ways_out(walk, goal, started_s + _SHARE_OF_ESCAPES * limit_s)
    seconds = time.monotonic() - started_s
    compared = by_objects.explore(
        policy,
        operations=asked,
        starts=begins,
        outstanding_max=outstanding_max,
        states_max=min(COMPARED_MAX, states_max) if faults_max is None else 0,
        seconds_max=max(0.0, started_s + 0.95 * limit_s - time.monotonic()),
        role=role,
        goal=goal,
    )
    violations, undecided = _violations(walk, compared.violations)
    return Exploration(
        states=min(walk.visited.count, states_max),
        transitions=walk.transitions,
        complete=walk.complete and searched and not undecided and walked_max == outstanding_max,
        operations=model.alphabet.operations,
        outstanding_max=walked_max,
        violations=violations,
        undecided=undecided,
        seconds=seconds,
        depth=walk.depth,
        exits=tuple(_exits(model)),
        compared=compared.states,
    )


def _fitting(modelled: Callable[[int], Model], most: int, least: int) -> tuple[Model, int]:
    """The model with the most outstanding requests of which states fit into a word, and how many those are."""
    while True:
        try:
            return modelled(most), most
        except Invalid:
            if most == least:
                raise
            most -= 1


def _search_ways_out(walk: Walk, goal: VmState, until_s: float) -> bool:
    """Note every state from which the goal cannot be reached; False if the time was up before all were looked at."""
    stuck = without_escape(walk.model, walk.visited, walk.looked_at, until_s)
    if stuck is not None and len(stuck):
        what = f"{goal.value} cannot be reached from {{}} without its worker's help"
        walk.laws.note_stuck(stuck, walk.visited.words[stuck], what)
    return stuck is not None


def _violations(walk: Walk, others: Iterable[Violation]) -> tuple[tuple[Violation, ...], tuple[str, ...]]:
    """What is broken, and what could not be decided: ages are walked in classes, which may go together in no story."""
    undecided: list[str] = []
    found = {(one.law, one.what): one for one in others}
    teller = Storyteller(walk.model, walk.visited)
    for breach, candidates in walk.breaches.found.items():
        stories = (teller.tell(candidate.state, candidate.action) for candidate in candidates)
        story = next((story for story in stories if story is not None), None)
        known = found.get((breach.law, breach.what))
        if story is not None:
            found[breach.law, breach.what] = Violation(law=breach.law, what=breach.what, story=story)
        elif known is None:
            undecided.append(f"law {breach.law}: {breach.what}")
    return tuple(sorted(found.values(), key=lambda one: len(one.story))), tuple(undecided)


def _exits(model: Model) -> Iterator[Exit]:
    """What is possible while each task that was come by goes on, and nothing else is outstanding."""
    words = model.gate.tasks_alone()
    answers = model.gate.answers(words)
    tasks = model.layout.task.of(words)
    states = model.tables.vm_state[model.layout.footing.of(words)]
    found: dict[tuple[int, int], dict[bool, set[Operation]]] = {}
    for state, task in zip(states.tolist(), tasks.tolist(), strict=True):
        found.setdefault((state, task), {True: set(), False: set()})
    for row, ask, effect in zip(answers.rows.tolist(), answers.ask.tolist(), answers.effect.tolist(), strict=True):
        operation = model.alphabet.asks[ask].operation
        if effect in (Effect.ADMIT, Effect.TAKE_OVER, Effect.PREEMPT) and operation not in _NO_REMEDY:
            found[int(states[row]), int(tasks[row])][effect != Effect.ADMIT].add(operation)
    for (state, task), possible in sorted(found.items()):
        if model.tables.task_leads_to_goal[task]:
            continue
        yield Exit(
            vm_state=tuple(VmState)[state],
            task_state=model.alphabet.tasks[task - 1].phase,
            takeovers=tuple(sorted(possible[True])),
            queued=tuple(sorted(possible[False] - possible[True])),
        )
