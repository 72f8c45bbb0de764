"""Answer tables as Markdown, and as a self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterator
from importlib import resources
from string import Template
from typing import Any, Final

import msgspec

from interlock.core.conditions import CALLER, CONDITION
from interlock.core.durations import short_time
from interlock.core.operations import TASK_OPERATION
from interlock.core.policy import Before, CompiledPolicy, MeasuredFrom, Verdict
from interlock.core.states import NO_TASK, VmState
from interlock.policies.rendering.tables import (
    EVERYTHING,
    LATER,
    MEANINGS,
    PLAIN,
    TASKS,
    Answer,
    Circumstances,
    Matrix,
    Section,
    Selection,
    matrix,
    sign,
    title_of,
)

_HTML_IN_SCRIPT: Final = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
"""JSON escapes of characters that would end a script element or start a comment in it."""


def circumstances_text(circumstances: Circumstances, *, launched: bool = True) -> str:
    """Describe the circumstances, to follow `what`."""
    role = circumstances.caller.get("role", CONDITION["role"].usual)
    parts = [f"{'an' if role == 'admin' else 'a'} {role}"]
    for condition in CALLER:
        value = circumstances.caller.get(condition.reads, condition.usual)
        if condition.reads != "role" and value != condition.usual:
            title = "named" if condition.reads == "requested_by" else condition.title
            parts.append(f"{title} {condition.kind.found(value)}")
    if circumstances.locked:
        parts.append("with the instance locked")
    if circumstances.silent_ms:
        parts.append(f"after {short_time(circumstances.silent_ms)} of silence")
    if not circumstances.host_reachable:
        parts.append("with the host out of reach")
    if not launched:
        parts.append("for an instance that has never run")
    return " ".join(parts)


def is_refusal(answer: Answer) -> bool:
    """Return whether it is denied, now and after any silence."""
    return answer.rule.verdict is Verdict.DENY and answer.later_ms is None


# -------------------------------------------------------------------------------------------------------- Markdown


def markdown_lines(
    policy: CompiledPolicy,
    circumstances: Circumstances = PLAIN,
    selection: Selection = EVERYTHING,
    *,
    launched: bool = True,
) -> Iterator[str]:
    """Yield a table for each class of tasks with the same answers, and the legend."""
    there = matrix(policy, circumstances, selection, launched=launched)
    yield f"What {circumstances_text(circumstances, launched=launched)} is answered by {_plain(policy.policy.name)}."
    for section in there.sections:
        yield ""
        yield f"**With {_plain(title_of(section, policy.policy.names))}**"
        yield ""
        yield from _markdown_section(there, section)
    yield ""
    for word, meaning in (*MEANINGS.values(), LATER):
        yield f"* {_plain(word)} — {meaning}"


def _markdown_section(there: Matrix, section: Section) -> Iterator[str]:
    kept = [line for line in section.lines if not all(map(is_refusal, line.answers))]
    if kept:
        yield f"| | {' | '.join(_plain(state.value) for state in there.vm_states)} |"
        yield f"|---|{':-:|' * len(there.vm_states)}"
    for line in kept:
        yield f"| {_plain(', '.join(line.names))} | {' | '.join(_plain(sign(answer)) for answer in line.answers)} |"
    refused = [name for line in section.lines if line not in kept for name in line.names]
    if refused:
        yield ""
        yield f"Always refused: {_plain(', '.join(refused))}."


def _plain(text: str) -> str:
    """Escape text for Markdown."""
    return "".join(f"\\{letter}" if letter in "\\|*_`<[#" else letter for letter in text)


# ------------------------------------------------------------------------------------------------------------ HTML


def html_page(policy: CompiledPolicy, circumstances: Circumstances = PLAIN, selection: Selection = EVERYTHING) -> str:
    """Return one page with every selected answer; without scripts it shows those of the first task state."""
    drawn = _Page(policy, circumstances, selection)
    template = Template(
        (resources.files("interlock.policies.rendering") / "table_page.html").read_text(encoding="utf-8")
    )
    legend = "".join(
        f'<li><span class="{verdict.value}-key">{word}</span>{meaning}</li>'
        for verdict, (word, meaning) in MEANINGS.items()
    )
    return template.substitute(
        title=html.escape(f"Policy {policy.policy.name}"),
        subtitle=html.escape(f"What {circumstances_text(circumstances)} is answered, with nothing else in the way."),
        legend=f"{legend}<li><span>{LATER[0]}</span>{LATER[1]}</li>",
        head=drawn.head(),
        body=drawn.body(),
        data=msgspec.json.encode(drawn.data()).decode().translate(_HTML_IN_SCRIPT),
    )


class _Page:
    """The data of the page, deduplicated: answers, and the rows of answers of task states."""

    def __init__(self, policy: CompiledPolicy, circumstances: Circumstances, selection: Selection) -> None:
        self._names = policy.policy.names
        self._matrices = [
            matrix(policy, circumstances, selection, launched=launched, alike=_identity) for launched in (True, False)
        ]
        self._numbers: dict[object, int] = {}
        self._answers: list[Answer] = []
        for there in self._matrices:
            for section in there.sections:
                for answer in (answer for line in section.lines for answer in line.answers):
                    if self._numbers.setdefault(_identity(answer), len(self._numbers)) == len(self._answers):
                        self._answers.append(answer)

    def head(self) -> str:
        states = "".join(f'<th scope="col">{html.escape(self._called(state))}</th>' for state in self._states)
        return f"<tr><th></th>{states}</tr>"

    def body(self) -> str:
        """The table of the first task state, shown without scripts."""
        return "\n".join(
            f'<tr><th scope="row">{html.escape(", ".join(line.names))}</th>'
            + "".join(
                f'<td class="{answer.rule.verdict.value}" title="{html.escape(_says(answer))}">{sign(answer)}</td>'
                for answer in line.answers
            )
            + "</tr>"
            for line in self._matrices[0].sections[0].lines
        )

    def data(self) -> dict[str, Any]:
        """The data for the script: tasks with the indexes of their slices; slices of indexes of answers."""
        first = self._matrices[0].sections
        tasks: dict[str, list[int]] = {}
        for before, there in zip((0, len(first)), self._matrices, strict=True):
            for number, section in enumerate(there.sections):
                for task in section.task_states:
                    tasks.setdefault(task, []).append(before + number)
        order = sorted(tasks, key=TASKS.index)
        groups: dict[str | None, list[int]] = {}
        for number, task in enumerate(order):
            groups.setdefault(None if task == NO_TASK else TASK_OPERATION[task].value, []).append(number)
        return {
            "states": [self._called(state) for state in self._states],
            "operations": [", ".join(line.names) for line in first[0].lines],
            "groups": list(groups.items()),
            "tasks": [
                {"name": self._called(task), "launched": launched, "never": never}
                for task, (launched, never) in ((task, tasks[task]) for task in order)
            ],
            "slices": [
                [[self._numbers[_identity(answer)] for answer in line.answers] for line in section.lines]
                for there in self._matrices
                for section in there.sections
            ],
            "answers": [_answer_fields(answer) for answer in self._answers],
        }

    @property
    def _states(self) -> tuple[VmState, ...]:
        return self._matrices[0].vm_states

    def _called(self, word: str) -> str:
        return ", ".join(self._names.get(word, (word,)))


def _identity(answer: Answer) -> tuple[str, int | None]:
    return answer.rule.id, answer.later_ms


def _answer_fields(answer: Answer) -> dict[str, Any]:
    rule = answer.rule
    return {
        "verdict": rule.verdict.value,
        "sign": sign(answer),
        "says": _says(answer),
        "rule": rule.id,
        "reason": answer.reason,
        "because": rule.because or "",
        "source": rule.source,
    }


def _says(answer: Answer) -> str:
    """Word an answer as a sentence."""
    rule = answer.rule
    match rule.verdict:
        case Verdict.AFTER:
            until = "called redundant" if rule.before is Before.REDUNDANT else "refused"
            since = (
                "from the beginning" if rule.measured_from is MeasuredFrom.TASK_STARTED else "without a sign of life"
            )
            text = f"{until} for {short_time(answer.threshold_ms or 0)} {since} of what is in flight, then takes over"
        case Verdict.PREEMPT:
            text = f"admitted before all else; what is in flight has {short_time(rule.grace_ms)} to stop by itself"
        case verdict:
            text = MEANINGS[verdict][1]
    if answer.later_ms is not None:
        text += f"; another rule answers after {short_time(answer.later_ms)} of silence"
    return f"{text[0].upper()}{text[1:]}."
