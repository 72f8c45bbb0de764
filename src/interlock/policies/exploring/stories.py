"""The story of a packed state: the shortest way there, as events of a rehearsal that the core has played."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from interlock.core.errors import BrokenInvariant
from interlock.core.operations import Lane
from interlock.core.policy import Verdict
from interlock.core.records import SERVED, Instance, Request
from interlock.policies.exploring.model import Model
from interlock.policies.exploring.steps import Action
from interlock.policies.exploring.timing import AGEING, Stage, moments, tellings
from interlock.policies.exploring.visited import Visited
from interlock.policies.rehearsal_events import read_line
from interlock.policies.rehearsing import Rehearsal

_encode = msgspec.json.Encoder().encode
_OUTCOMES: Final = {Action.SUCCEED: "succeeded", Action.FAIL: "failed", Action.INTERRUPT: "interrupted"}
_GUEST: Final = {Action.GUEST_STOPPED: "stopped", Action.GUEST_CRASHED: "crashed", Action.GUEST_RESET: "reset"}
_TAKEN: Final = {Action.TAKE: Lane.STATE, Action.TAKE_PART: Lane.COMPONENT}


class Storyteller:
    """Tells how the states of one walk come about."""

    def __init__(self, model: Model, visited: Visited) -> None:
        self._model = model
        self._visited = visited

    def tell(self, state: int, action: int | None) -> tuple[str, ...] | None:
        """The events that lead to a state, and the one that is then tried; None if no clock can tell them.

        Raises:
            BrokenInvariant: the core does not come by the states that the walk came by.
        """
        stages = self._stages(state)
        for told in tellings(self._model, stages):
            times = self._moments(told)
            if times is not None:
                return self._played(*self._shortened(told, times), action)
        return None

    def _moments(self, stages: list[Stage]) -> list[int] | None:
        return moments(self._model, stages, lambda at: self._grace_ms(stages, at))

    def _shortened(self, stages: list[Stage], times: list[int]) -> tuple[list[Stage], list[int]]:
        """Without the signs of life that the story does as well without."""
        for at in range(len(stages) - 1, 0, -1):
            if stages[at].word == stages[at - 1].word:
                shorter = stages[:at] + stages[at + 1 :]
                found = self._moments(shorter)
                if found is not None:
                    stages, times = shorter, found
        return stages, times

    def _stages(self, state: int) -> list[Stage]:
        stages = []
        while state >= 0:
            stages.append(Stage(self._visited.action(state), int(self._visited.words[state])))
            state = self._visited.parent(state)
        return stages[::-1]

    def _grace_ms(self, stages: list[Stage], at: int) -> int | None:
        """How long a submission gives what is served to stop, if it does."""
        number = stages[at].action - Action.SUBMIT
        if number < 0:
            return None
        rule = self._model.gate.rule(stages[at - 1].word, number)
        return rule.grace_ms if rule.verdict is Verdict.PREEMPT else None

    def _played(self, stages: list[Stage], times: list[int], tried: int | None) -> tuple[str, ...]:
        """The story, as the core has played it by way of the same states."""
        model = self._model
        stage = Rehearsal(model.alphabet.policy)
        lines: list[str] = []

        def play(event: dict[str, Any]) -> dict[str, Any]:
            line = _encode(event).decode()
            lines.append(line)
            return stage.play(*read_line(line))

        start = model.alphabet.footings[model.layout.footing.one(stages[0].word)]
        play({"instance": {"vm_state": start.vm_state.value, "role": model.alphabet.role}})
        for at in range(1, len(stages)):
            waited_ms = times[at] - times[at - 1]
            if waited_ms:
                play({"advance": _duration(waited_ms)})
            for event in self._events(stages[at].action, stage.instance):
                play(event)
            if at + 1 < len(stages) and stages[at].action in AGEING and stages[at + 1].action in AGEING:
                continue
            if model.packing.pack(stage.instance, stage.now_ms) != self._without_faults(stages[at].word):
                raise BrokenInvariant(f"The core comes to another state than the walk: {' '.join(lines)}")
        if tried is not None:
            for event in self._events(tried, stage.instance):
                answer = play(event)
                if answer.get("retry_after"):
                    play({"advance": answer["retry_after"]})
                    play(event)
        return tuple(lines)

    def _without_faults(self, word: int) -> int:
        return word & ~self._model.layout.faults.mask

    def _events(self, action: int, instance: Instance) -> Iterator[dict[str, Any]]:
        """What a rehearsal is told of a step; nothing, where only time passes."""
        state, part = instance.served(Lane.STATE), instance.served(Lane.COMPONENT)
        if action >= Action.SUBMIT:
            ask = self._model.alphabet.asks[action - Action.SUBMIT]
            yield {"submit": ask.operation.value, **({"parameters": ask.parameters} if ask.parameters else {})}
        elif action >= Action.CANCEL_PART:
            yield {"cancel": _waiting(instance, Lane.COMPONENT)[action - Action.CANCEL_PART].id}
        elif action >= Action.CANCEL:
            yield {"cancel": _waiting(instance, Lane.STATE)[action - Action.CANCEL].id}
        elif action in _TAKEN:
            yield {"take": _TAKEN[Action(action)].value}
        elif action in _GUEST:
            yield {"observe": _GUEST[Action(action)]}
        elif action == Action.ADOPT:
            yield {"adopt": True}
        elif action == Action.FINISH_PART and part is not None:
            yield {"finish": part.operation.value, "outcome": "succeeded"}
        elif action == Action.PART_LIFE and part is not None:
            yield {"progress": part.id}
        elif state is not None:
            yield from self._reports(action, state)

    def _reports(self, action: int, state: Request) -> Iterator[dict[str, Any]]:
        if action in _OUTCOMES:
            yield {"finish": state.operation.value, "outcome": _OUTCOMES[Action(action)]}
        elif action == Action.LIFE:
            yield {"progress": state.id}
        elif action == Action.PHASE:
            phases = self._model.alphabet.phases(state.operation, hard=state.hard)
            yield {"progress": state.id, "phase": phases[phases.index(state.phase or "") + 1]}


def _waiting(instance: Instance, lane: Lane) -> list[Request]:
    return [one for one in instance.outstanding if one.status not in SERVED and one.lane is lane]


def _duration(milliseconds: int) -> str:
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"
