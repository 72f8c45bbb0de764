"""Which views a rule decides, found without trying them one by one.

A cell is an (operation, vm_state, task_state). In it, the further conditions of a rule hold in a region: some of the
roles, some of the flags, a stretch of silence, and what has to be among the outstanding kinds, the held ones and the
tags. A rule decides in a cell if something is left of its region once those of the rules before it are taken away.
What that means for a policy is not here (see `checking`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Final, NamedTuple

from interlock.core.operations import BIT, CATALOGUE, TASK_OPERATION, TASK_STATES, Operation
from interlock.core.policy import Rule, View
from interlock.core.states import LEFT_AT_END, NO_TASK, VmState
from interlock.policies.regions import Literal, Region, meet, members, miss
from interlock.policies.vocabulary import ROLES

TASKS: Final = (NO_TASK, *TASK_STATES)
STEPS_MAX: Final = 20_000
"""How many rules are held against pieces of regions for one answer. Past it a rule counts as one that can decide."""
STEPS_MAX_IN_ALL: Final = 20_000_000
"""The same for all answers about one policy."""

_FLAGS: Final = ("locked", "blocked", "host_reachable", "hard", "launched")
_LIKELY: Final = frozenset({"host_reachable", "launched"})
"""The flags that are set unless a rule says otherwise."""
_FALSE, _TRUE = 1, 2
_EVERY_KIND: Final = sum(BIT.values())
_ROLE, _SILENT = 0, 1 + len(_FLAGS)
_OUTSTANDING, _HELD, _TAGS = range(3)


class Cell(NamedTuple):
    """One combination that the rules are looked up by."""

    operation: Operation
    vm_state: VmState
    task_state: str

    def __str__(self) -> str:
        state = self.vm_state.value if self.task_state == NO_TASK else f"{self.vm_state.value}/{self.task_state}"
        return f"{self.operation.value} in {state}"


class Reaching:
    """The rules of one policy, ready for being asked which views they decide."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._moments = _moments_ms(self.rules)
        self._tags = sorted({tag for rule in self.rules for tag in rule.tags or ()})
        bits = {tag: 1 << number for number, tag in enumerate(self._tags)}
        sizes = [len(ROLES), *(2 for _ in _FLAGS), len(self._moments)]
        self._sizes = tuple((1 << size) - 1 for size in sizes)
        self._literals = [tuple(_literals(rule, bits, self._moments, self._sizes)) for rule in self.rules]
        self._unconditional = _mask_of(number for number, literals in enumerate(self._literals) if not literals)
        self._by_operation = _index(((rule.operations for rule in self.rules)), Operation)
        self._by_state = _index((states_of(rule) for rule in self.rules), VmState)
        self._by_task = _index((rule.task_states or TASKS for rule in self.rules), TASKS)
        self._about_kinds = _mask_of(
            number
            for number, literals in enumerate(self._literals)
            if any(literal.test != "is" and literal.place == _OUTSTANDING for literal in literals)
        )
        self._known: dict[tuple[int, int, int, tuple[Literal, ...]], Region | None] = {}
        self._steps = STEPS_MAX_IN_ALL

    @cached_property
    def alike(self) -> tuple[tuple[Cell, ...], ...]:
        """Every cell but those of a deleted instance, together with all that are decided in the same way."""
        groups: dict[tuple[Operation, int, str], list[Cell]] = {}
        for operation in Operation:
            for state in sorted(_UNDELETED, key=tuple(VmState).index):
                for task in TASKS:
                    cell = Cell(operation, state, task)
                    served = task if task == NO_TASK else TASK_OPERATION[task]
                    groups.setdefault((operation, self.program(cell), served), []).append(cell)
        return tuple(tuple(cells) for cells in groups.values())

    def program(self, cell: Cell) -> int:
        """The rules asked in a cell, as one bit a rule: up to the first that has no further condition."""
        asked = self._by_operation[cell.operation] & self._by_state[cell.vm_state] & self._by_task[cell.task_state]
        last = asked & self._unconditional
        return asked if not last else asked & (((last & -last) << 1) - 1)

    @property
    def exhausted(self) -> bool:
        """Whether the policy was too intricate for all of it to be taken apart."""
        return self._steps <= 0

    def unlike(self, number: int, cells: Iterable[Cell]) -> Iterator[tuple[Cell, int]]:
        """One cell of each kind in which the rule is decided alike, and how many of the kind there are."""
        found: dict[tuple[int, int], tuple[Cell, int]] = {}
        for cell in cells:
            before = self.program(cell) & ((1 << number) - 1)
            key = (before, self._served(cell, before | 1 << number))
            first, count = found.get(key, (cell, 0))
            found[key] = (first, count + 1)
        yield from found.values()

    def _served(self, cell: Cell, rules: int) -> int:
        """The kind that is being served, if any of the rules looks at what is outstanding."""
        if cell.task_state == NO_TASK or not rules & self._about_kinds:
            return 0
        return BIT[TASK_OPERATION[cell.task_state]]

    def asked(self, cell: Cell) -> tuple[int, ...]:
        """The numbers of those rules, in order."""
        return tuple(_places(self.program(cell)))

    def matching(self, number: int) -> Iterator[Cell]:
        """The cells that a rule is about, whether or not it gets to decide there."""
        rule = self.rules[number]
        for operation in Operation:
            if operation in rule.operations:
                for state in states_of(rule):
                    for task in TASKS if rule.task_states is None else rule.task_states:
                        yield Cell(operation, state, task)

    def decides(self, number: int, cell: Cell, *more: Literal) -> View | None:
        """A view in the cell that the rule decides, also holding `more`; None if there is none."""
        region = self._region(number, cell, more)
        return None if region is None else self._view(cell, region)

    def can_hold(self, number: int, cell: Cell, *more: Literal) -> bool:
        """Whether the rule's own conditions and `more` can hold together in the cell, whatever comes before it."""
        return self._start(number, cell, more) is not None

    def survives(self, number: int, cell: Cell, before: Iterable[int], *more: Literal) -> bool:
        """Whether the rule would decide something in the cell if only the rules `before` were asked before it."""
        start = self._start(number, cell, more)
        about = self._by_operation[cell.operation] & self._by_state[cell.vm_state] & self._by_task[cell.task_state]
        return (
            start is not None and self._left(start, (each for each in sorted(before) if about >> each & 1)) is not None
        )

    def overlapping(self, number: int, earlier: int, cell: Cell, *more: Literal) -> bool:
        """Whether both rules hold for some view of the cell."""
        region = self._start(number, cell, more)
        for literal in self._literals[earlier]:
            region = None if region is None else meet(region, literal)
        return region is not None

    def role(self, *roles: str) -> Literal:
        return Literal(test="is", place=_ROLE, mask=_mask_of(ROLES.index(role) for role in roles))

    def flag(self, name: str, value: object) -> Literal:
        """A condition on one of the flags: locked, blocked, host_reachable, hard, launched."""
        return Literal(test="is", place=1 + _FLAGS.index(name), mask=_TRUE if value else _FALSE)

    def any_outstanding(self, kinds: int) -> Literal:
        """That one of the kinds of this mask is outstanding."""
        return Literal(test="any", place=_OUTSTANDING, mask=kinds)

    def silent_for(self, at_least_ms: int) -> Literal:
        """A condition on the silence; `at_least_ms` must be a moment that some rule names, or past all of them."""
        return _silence(self._moments, self._sizes, at_least_ms)

    def only_outstanding(self, kinds: int) -> Literal:
        """That nothing but the kinds of this mask is outstanding."""
        return Literal(test="none", place=_OUTSTANDING, mask=_EVERY_KIND & ~kinds)

    def _start(self, number: int, cell: Cell, more: tuple[Literal, ...]) -> Region | None:
        wanted = frozenset[int]()
        if cell.task_state != NO_TASK:
            # What is being served is outstanding.
            wanted = frozenset({BIT[TASK_OPERATION[cell.task_state]]})
        region: Region | None = Region(self._sizes, (wanted, frozenset(), frozenset()), (0, 0, 0))
        for literal in (*more, *self._literals[number]):
            region = None if region is None else meet(region, literal)
        return region

    def _region(self, number: int, cell: Cell, more: tuple[Literal, ...]) -> Region | None:
        program = self.program(cell)
        if not program >> number & 1:
            return None
        before = program & ((1 << number) - 1)
        looks = any(literal.test != "is" and literal.place == _OUTSTANDING for literal in more)
        served = self._served(cell, self._about_kinds if looks else before | 1 << number)
        key = (before, number, served, more)
        if key not in self._known:
            start = self._start(number, cell, more)
            self._known[key] = None if start is None else self._left(start, _places(before))
        return self._known[key]

    def _left(self, region: Region, before: Iterable[int]) -> Region | None:
        """What is left of a region, or a part of it, once those of other rules are taken away."""
        if self._steps <= 0:
            return region
        unlike = list(dict.fromkeys(self._literals[earlier] for earlier in before))
        steps = [min(STEPS_MAX, self._steps)]
        allowed = steps[0]
        left = self._escape(region, unlike, steps)
        self._steps -= allowed - steps[0]
        return left

    def _escape(self, region: Region, before: list[tuple[Literal, ...]], steps: list[int]) -> Region | None:
        """A part of a region outside all of `before`, depth first; one that may be inside when the steps run out."""
        pending = [(region, 0)]
        while pending:
            piece, index = pending.pop()
            outside: list[Region] | None = None
            while outside is None and index < len(before):
                steps[0] -= 1
                if steps[0] <= 0:
                    return piece
                outside = _outside(piece, before[index])
                index += 1
            if outside is None:
                return piece
            pending.extend((rest, index) for rest in reversed(outside))
        return None

    def _view(self, cell: Cell, region: Region) -> View:
        role = next(role for number, role in enumerate(ROLES) if region.choices[_ROLE] >> number & 1)
        for likely in ("admin", "member"):
            if region.choices[_ROLE] >> ROLES.index(likely) & 1:
                role = likely
        flags = {
            name: bool(left & _TRUE) if name in _LIKELY else not left & _FALSE
            for name, left in zip(_FLAGS, region.choices[1:], strict=False)
        }
        silent_ms = self._moments[(region.choices[_SILENT] & -region.choices[_SILENT]).bit_length() - 1]
        sets = [members(wanted, shunned) for wanted, shunned in zip(region.wanted, region.shunned, strict=True)]
        return View(
            operation=cell.operation,
            vm_state=cell.vm_state,
            task_state=cell.task_state,
            outstanding=sets[_OUTSTANDING],
            role=role,
            locked=flags["locked"],
            blocked=flags["blocked"],
            tags=tuple(tag for number, tag in enumerate(self._tags) if sets[_TAGS] >> number & 1),
            host_reachable=flags["host_reachable"],
            hard=flags["hard"],
            silent_ms=silent_ms,
            running_ms=silent_ms,
            launched=flags["launched"],
            held=sets[_HELD],
        )


def _outside(region: Region, literals: tuple[Literal, ...]) -> list[Region] | None:
    """What of a region is outside all of these conditions together, in parts; None if all of it is."""
    inside: Region | None = region
    outside = []
    for literal in literals:
        assert inside is not None
        rest = miss(inside, literal)
        if rest is not None:
            outside.append(rest)
        inside = meet(inside, literal)
        if inside is None:
            return None
    return outside


def can_be_together(vm_state: VmState, task_state: str) -> bool:
    """Whether a task can be served in a vm_state: where its operation can be performed, or what a guest does meanwhile.

    A guest that powers itself off or crashes moves the vm_state under the operation that is being served.
    """
    if task_state == NO_TASK:
        return True
    sources = CATALOGUE[TASK_OPERATION[task_state]].sources
    ended = {VmState.STOPPED, VmState.ERROR} if sources & LEFT_AT_END else set()
    return vm_state in sources | ended


def states_of(rule: Rule) -> frozenset[VmState]:
    """The vm_states that a rule is about. One that names none is about all but the deleted."""
    return rule.vm_states if rule.vm_states is not None else _UNDELETED


_UNDELETED: Final = frozenset(VmState) - {VmState.DELETED}


def _places(mask: int) -> Iterator[int]:
    """The places of the bits that are set, from the lowest."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _mask_of(places: Iterable[int]) -> int:
    mask = 0
    for place in places:
        mask |= 1 << place
    return mask


def _index(names: Iterable[Iterable[str]], words: Iterable[str]) -> dict[str, int]:
    """For each word, the rules that name it, one bit a rule."""
    collected: dict[str, bytearray] = {}
    listed = [tuple(each) for each in names]
    for word in words:
        collected[word] = bytearray(len(listed) // 8 + 1)
    for number, each in enumerate(listed):
        for word in each:
            collected[word][number >> 3] |= 1 << (number & 7)
    return {word: int.from_bytes(bits, "little") for word, bits in collected.items()}


def _moments_ms(rules: Sequence[Rule]) -> list[int]:
    """Every length of silence from which some rule answers otherwise, and none at all."""
    named = {0}
    for rule in rules:
        named.update(moment for moment in (rule.silent_ms_min, rule.threshold_ms) if moment is not None)
    return sorted(named)


def _silence(moments: list[int], sizes: tuple[int, ...], at_least_ms: int) -> Literal:
    first = min(bisect_left(moments, at_least_ms), len(moments) - 1)
    return Literal(test="is", place=_SILENT, mask=sizes[_SILENT] & ~((1 << first) - 1))


def _literals(rule: Rule, bits: dict[str, int], moments: list[int], sizes: tuple[int, ...]) -> Iterator[Literal]:
    if rule.roles is not None:
        roles = _mask_of(ROLES.index(role) for role in rule.roles if role in ROLES)
        yield Literal(test="is", place=_ROLE, mask=roles)
    for number, name in enumerate(_FLAGS):
        flag = getattr(rule, name)
        if flag is not None:
            yield Literal(test="is", place=1 + number, mask=_TRUE if flag else _FALSE)
    if rule.silent_ms_min is not None:
        yield _silence(moments, sizes, rule.silent_ms_min)
    if rule.outstanding is not None:
        yield _kinds(_OUTSTANDING, rule.outstanding)
    if rule.held is not None:
        yield _kinds(_HELD, rule.held)
    if rule.tags is not None:
        yield Literal(test="any", place=_TAGS, mask=sum(bits[tag] for tag in rule.tags))


def _kinds(index: int, kinds: frozenset[Operation]) -> Literal:
    if not kinds:
        return Literal(test="none", place=index, mask=_EVERY_KIND)
    return Literal(test="any", place=index, mask=sum(BIT[kind] for kind in kinds))
