"""State diagram of a policy: the operations that lead from one vm_state to another, with nothing outstanding.

The policy says what is admitted, the catalogue where it leads, and Graphviz draws it. Operations that would clutter the
diagram are listed in its caption: those that keep the state, that lead to one state from nearly everywhere, and that
restore a past state.
"""

from __future__ import annotations

import hashlib
import html
import subprocess
import textwrap
from typing import Final, NamedTuple

from interlock.core.errors import Invalid
from interlock.core.operations import CATALOGUE, Lane
from interlock.core.policy import CompiledPolicy, Verdict
from interlock.core.state_stack import resolve_target
from interlock.core.states import NO_TASK, Target, VmState
from interlock.policies.rendering.tables import Answers, Circumstances, Variant, variants

EVERYWHERE_MIN: Final = 8
"""From so many vm_states on, an operation that leads to the same one is named in a line instead of drawn."""
LAYOUT_TIMEOUT_S: Final = 60
_ADMIN: Final = Circumstances(caller={"role": "admin"})
_LINE: Final = 26
_COLOURS: Final = {
    VmState.BUILDING: "#fbeec3",
    VmState.ACTIVE: "#d4efd8",
    VmState.ERROR: "#f8d7d4",
    VmState.DELETED: "#dfe3e8",
    VmState.SOFT_DELETED: "#dfe3e8",
    VmState.MIGRATED_OUT: "#dfe3e8",
}
_FILL: Final = "#eaf1fb"


class DiagramEdges(NamedTuple):
    """What a policy lets happen to an instance for which nothing is outstanding."""

    edges: dict[tuple[VmState, VmState], tuple[str, ...]]
    """The operations that lead from one vm_state to another."""
    staying: dict[VmState, tuple[str, ...]]
    """The state changes that leave the vm_state as it is."""
    returning: dict[VmState, tuple[str, ...]]
    """The operations that lead back to what held before."""
    everywhere: dict[str, tuple[VmState, tuple[VmState, ...]]]
    """Operations that lead to one vm_state from nearly all: where to, and from where not."""
    failures: tuple[VmState, ...]
    """The vm_states from which an operation that fails leads to error."""

    def reachable(self) -> frozenset[VmState]:
        """The vm_states that an instance can come to, from its building on."""
        found = {VmState.BUILDING, *(target for target, _ in self.everywhere.values())}
        if self.failures:
            found.add(VmState.ERROR)
        while True:
            more = {target for (source, target) in self.edges if source in found} - found
            if not more:
                return frozenset(found)
            found |= more


def transitions(policy: CompiledPolicy) -> DiagramEdges:
    """What an administrator may do in each vm_state, and where it leads when it succeeds."""
    edges: dict[tuple[VmState, VmState], list[str]] = {}
    staying: dict[VmState, list[str]] = {}
    returning: dict[VmState, list[str]] = {}
    everywhere: dict[str, tuple[VmState, tuple[VmState, ...]]] = {}
    failing: set[VmState] = set()
    for variant, sources in _admitted(policy):
        entry = CATALOGUE[variant.operation]
        name = ", ".join(policy.policy.names.get(variant.word, (variant.word,)))
        if entry.on_failure is VmState.ERROR:
            failing.update(sources)
        if entry.to in {Target.PRIOR, Target.PRESENT}:
            for source in sources:
                returning.setdefault(source, []).append(name)
            continue
        targets = {source: resolve_target(variant.operation, source, ())[0] for source in sources}
        moving = {source: target for source, target in targets.items() if target is not source}
        if len(moving) >= EVERYWHERE_MIN and len(set(moving.values())) == 1:
            target = next(iter(moving.values()))
            missing = tuple(state for state in VmState if state not in (*moving, target, VmState.DELETED))
            everywhere[name] = (target, missing)
            continue
        for source, target in targets.items():
            if target is source:
                staying.setdefault(source, []).append(name)
            else:
                edges.setdefault((source, target), []).append(name)
    return DiagramEdges(
        {key: tuple(names) for key, names in edges.items()},
        {key: tuple(names) for key, names in staying.items()},
        {key: tuple(names) for key, names in returning.items()},
        everywhere,
        tuple(state for state in VmState if state in failing and state is not VmState.ERROR),
    )


def _admitted(policy: CompiledPolicy) -> list[tuple[Variant, list[VmState]]]:
    """The state changes that a driver can perform and the policy admits, and where; a hard one where no soft one is."""
    answers = Answers(policy, _ADMIN)
    found: list[tuple[Variant, list[VmState]]] = []
    soft: set[VmState] = set()
    for variant in variants(policy):
        entry = CATALOGUE[variant.operation]
        if entry.lane is not Lane.STATE:
            continue
        states = [state for state in VmState if state in entry.sources and _is_admitted(answers, variant, state)]
        if variant.hard:
            states = [state for state in states if state not in soft]
        soft = set(states)
        found.append((variant, states))
    return found


def _is_admitted(answers: Answers, variant: Variant, state: VmState) -> bool:
    # An instance that is being built has never run; everything else is asked for one that has.
    launched, never = answers.of(variant, state, NO_TASK)
    answer = never if state is VmState.BUILDING else launched
    return answer.rule.verdict in (Verdict.ADMIT, Verdict.PREEMPT)


# ------------------------------------------------------------------------------------------------------------- dot


def dot_source(policy: CompiledPolicy) -> str:
    """The state diagram in Graphviz' language. The same policy gives the same text."""
    drawn = transitions(policy)
    present = drawn.reachable()
    lines = [
        "digraph policy {",
        '  graph [rankdir=LR, bgcolor="white", fontname="sans-serif", fontsize=12, nodesep=0.35, ranksep=0.9,',
        f"    labelloc=b, labeljust=l, label=<{_note(policy, drawn)}>];",
        '  node [shape=box, style="rounded,filled", fontname="sans-serif", fontsize=12, color="#7b8794"];',
        '  edge [fontname="sans-serif", fontsize=10, color="#46505c", fontcolor="#1c2430"];',
    ]
    for state in VmState:
        if state in present:
            fill = _COLOURS.get(state, _FILL)
            lines.append(f'  {state.value} [fillcolor="{fill}", label=<{_label(state, drawn)}>];')
    for (source, target), names in drawn.edges.items():
        if source not in present:
            continue
        wrapped = textwrap.wrap(", ".join(names), _LINE, break_long_words=False, break_on_hyphens=False)
        label = "<br/>".join(map(html.escape, wrapped))
        lines.append(f"  {source.value} -> {target.value} [label=<{label}>];")
    ends = [state.value for state in (VmState.SOFT_DELETED, VmState.DELETED, VmState.MIGRATED_OUT) if state in present]
    lines.append(f"  {{rank=max; {'; '.join(ends)}}}")
    return "\n".join([*lines, "}", ""])


def _label(state: VmState, drawn: DiagramEdges) -> str:
    parts = [f"<b>{state.value}</b>"]
    for sign, names in (("⟲ ", drawn.staying.get(state, ())), ("↩ ", drawn.returning.get(state, ()))):
        if names:
            wrapped = textwrap.wrap(sign + ", ".join(names), _LINE + 4, break_long_words=False, break_on_hyphens=False)
            parts.append('<font point-size="9">' + "<br/>".join(map(html.escape, wrapped)) + "</font>")
    return "<br/>".join(parts)


def _note(policy: CompiledPolicy, drawn: DiagramEdges) -> str:
    lines = [f"Policy {policy.policy.name}: what it admits for an instance with nothing outstanding."]
    by_target: dict[tuple[VmState, tuple[VmState, ...]], list[str]] = {}
    for name, where in drawn.everywhere.items():
        by_target.setdefault(where, []).append(name)
    for (target, missing), names in by_target.items():
        but = f" but {', '.join(state.value for state in missing)}" if missing else ""
        lines.append(f"To {target.value}, from every state{but}: {', '.join(names)}.")
    failures = [state.value for state in drawn.failures if state in drawn.reachable()]
    if failures:
        lines.append(f"To error, when an operation fails: from {', '.join(failures)}.")
    lines.append("⟲ leaves the state as it is;  ↩ leads back to the state before.")
    return "".join(f'{html.escape(line)}<br align="left"/>' for line in lines)


def digest_of(source: str) -> str:
    """By which a drawing is known to be current, whatever version of Graphviz has laid it out."""
    return hashlib.sha256(source.encode()).hexdigest()


def svg_of(source: str) -> str:
    """The diagram laid out, with the digest of its source in a comment.

    Raises:
        Invalid: Graphviz is missing, or cannot draw it.
    """
    try:
        run = subprocess.run(
            ["dot", "-Tsvg"],  # noqa: S607 - wherever the system has it
            input=source.encode(),
            capture_output=True,
            timeout=LAYOUT_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise Invalid(
            "Graphviz is not installed: there is no program 'dot'.",
            remedy="Install the package graphviz, or ask for --format dot.",
        ) from None
    except subprocess.TimeoutExpired:
        raise Invalid(f"Graphviz has drawn nothing in {LAYOUT_TIMEOUT_S} s.") from None
    if run.returncode != 0:
        raise Invalid(f"Graphviz cannot draw it: {run.stderr.decode(errors='replace').strip()[:200]}")
    drawing = run.stdout.decode()
    return drawing.replace("<svg ", f"<!-- source: {digest_of(source)} -->\n<svg ", 1)
