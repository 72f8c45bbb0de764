"""Held requests on packed states: which submissions are held, and how a hold ends.

One request is held at a time. It is evaluated again as the core does, as a transition of its own; its hold ends at any
time, when it expires or its owner cancels it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec
import numpy as np

from interlock.core import admission
from interlock.core.records import Held
from interlock.policies.model_checker.actions import Alphabet
from interlock.policies.model_checker.gate_table import outstanding_mask
from interlock.policies.model_checker.layout import Layout, Words
from interlock.policies.model_checker.state_encoding import NOW_MS, StateEncoding
from interlock.policies.model_checker.steps import Action, Transitions
from interlock.policies.model_checker.submissions import PackedGate

HOLD_MS: Final = 30 * 24 * 3_600_000


class Holds:
    """The transitions of held requests of one search."""

    def __init__(self, alphabet: Alphabet, layout: Layout, gate: PackedGate, encoding: StateEncoding) -> None:
        self._alphabet = alphabet
        self._layout = layout
        self._gate = gate
        self._encoding = encoding
        self._masks = {number: _named(alphabet, number) for number in alphabet.held}
        """For each submission, the sets of outstanding operations that rules about it distinguish."""
        self._known: dict[tuple[int, ...], bool] = {}

    def after(self, words: Words) -> Iterator[Transitions]:
        """Yield the transitions in which a request is held, is admitted, or its hold ends."""
        field = self._layout.held
        if not field.bits:
            return
        held = np.flatnonzero(field.of(words))
        yield Transitions(Action.HOLD_ENDED, held, words[held] & ~field.mask)
        yield from self._gate.held_admitted(words)
        free = np.flatnonzero(field.of(words) == 0)
        for number, submission in enumerate(self._alphabet.held, start=1):
            rows = free[self._are_held(words[free], submission)]
            yield Transitions(Action.HOLD + submission, rows, words[rows] | number << field.shift)

    def _are_held(self, words: Words, submission: int) -> np.ndarray:
        """Return whether the core holds a submission in each state; it is asked once for states that are alike."""
        queues = self._gate.queues
        outstanding, named = queues.outstanding(words), np.zeros(len(words), np.int64)
        for number, mask in enumerate(self._masks[submission]):
            named |= ((outstanding & mask) != 0).astype(np.int64) << number
        columns = [self._gate.situations(words), named, queues.foreseen(words)]
        keys = np.stack([*columns, queues.lengths(words)], axis=1)
        found, first, back = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        answers = np.zeros(len(found), bool)
        for at, key in enumerate(map(tuple, found.tolist())):
            known = (submission, *key)
            if known not in self._known:
                self._known[known] = self._is_held(int(words[first[at]]), submission)
            answers[at] = self._known[known]
        there: np.ndarray = answers[back.reshape(-1)]
        return there

    def _is_held(self, word: int, submission: int) -> bool:
        alphabet, encoding = self._alphabet, self._encoding
        new = alphabet.submissions[submission].submission("new", host_reachable=encoding.host_reachable(word))
        new = msgspec.structs.replace(new, hold_ms=HOLD_MS)
        change = admission.admit_there(encoding.unpack(word), new, alphabet.policy, NOW_MS)
        return isinstance(change.answer, Held)


def _named(alphabet: Alphabet, submission: int) -> list[int]:
    operation = alphabet.submissions[submission].operation
    named = [rule.outstanding for rule in alphabet.policy.rules if operation in rule.operations]
    return list(dict.fromkeys(outstanding_mask(operations) for operations in named if operations is not None))
