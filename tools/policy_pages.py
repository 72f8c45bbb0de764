"""Generator of docs/policies/: a page and diagrams for each built-in policy."""

from __future__ import annotations

from collections.abc import Iterator

from interlock.core.durations import short_time
from interlock.core.policy import CompiledPolicy, Rule, Verdict
from interlock.policies.language.loader import builtin_names, read
from interlock.policies.rendering.answer_grid_svg import of_states, of_tasks, svg_grid
from interlock.policies.rendering.state_diagram import dot_source, svg_of
from interlock.policies.rendering.tables import Variant


def files() -> Iterator[tuple[str, str]]:
    """Return the files of the folder by name. Raises `Invalid` without Graphviz."""
    yield "README.md", _index()
    for name in builtin_names():
        policy = CompiledPolicy(read(name).policy)
        yield f"{name}.md", page(name)
        yield f"{name}-states.svg", svg_of(dot_source(policy))
        yield f"{name}-table.svg", svg_grid(of_states(policy))
        yield f"{name}-tasks.svg", svg_grid(of_tasks(policy))


def _index() -> str:
    lines = ["# The built-in policies, drawn", "", "<!-- Drawn by `make docs`; a test compares. -->", ""]
    lines += [f"* [`{name}`]({name}.md): {read(name).description}" for name in builtin_names()]
    return "\n".join([*lines, ""])


def page(name: str) -> str:
    """Return the page of one built-in policy."""
    text = read(name)
    policy = text.policy
    lines = [
        f"# `{name}`",
        "",
        "<!-- Drawn by `make docs`; a test compares. -->",
        "",
        text.description,
        "",
        f"The policy is [{name}.toml](../../src/interlock/policies/builtin/{name}.toml).",
        f"`interlock policy table {name}` shows all of its answers, for other callers too; with `--format html` as one",
        "page to browse.",
        "",
        "## Where operations lead",
        "",
        f"![The states of an instance, and which operations lead from one to another]({name}-states.svg)",
        "",
        "## With nothing in the way",
        "",
        f"![What a member is answered in each vm_state]({name}-table.svg)",
        "",
        "## While an operation is in progress",
        "",
        "For an active instance, immediately. A `*` marks an answer that changes after a time without progress.",
        "",
        f"![The answers to a member, by operation in progress]({name}-tasks.svg)",
        "",
        "## The rules, in order of evaluation",
        "",
        "| rule | verdict | reason | why |",
        "|---|---|---|---|",
    ]
    lines += dict.fromkeys(_rule_line(rule) for rule in policy.rules)
    return "\n".join([*lines, ""])


def _rule_line(rule: Rule) -> str:
    words = {Variant(operation).word for operation in rule.operations}
    start, dot, end = rule.id.rpartition(".")
    identifier = start if dot and words == {end} else rule.id
    verdict = rule.verdict.value
    if rule.verdict is Verdict.AFTER:
        verdict += f" {short_time(rule.threshold_ms or 0)}"
    cells = (f"`{identifier}`", verdict, f"`{rule.reason}`" if rule.reason else "", rule.because or "")
    return f"| {' | '.join(cell.replace('|', '&#124;').replace(chr(10), ' ') for cell in cells)} |"
