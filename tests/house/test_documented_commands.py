"""Every `interlock …` command in README.md and docs/ exists, with its options; the diagram has every status."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import click

from interlock.__main__ import root
from interlock.core.operations import Operation
from interlock.core.records import Change, Status
from interlock.core.states import VmState
from interlock.policies.language.loader import compile_named
from model_checker_reference import Walk
from model_checker_reference.laws import Step

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text: str) -> list[str]:
    """The command lines of a page: in code spans, and in blocks of code after an optional prompt."""
    joined = text.replace("\\\n", " ")
    spans = re.findall(r"(?<!`)`(interlock [^`]+)`(?!`)", joined)
    blocks = re.findall(r"^(?:    )?(?:\$ )?(?:[A-Z_]+=\S+ )?(?:\.venv/bin/)?(interlock [^\n]+)$", joined, re.MULTILINE)
    return spans + [line.partition("  #")[0] for line in blocks]


def problem(line: str) -> str | None:
    """What is wrong with a command line: an unknown command or long option; None if nothing is."""
    words = shlex.split(re.sub(r"[…|>\[\]]", " ", line.replace("'", "")))[1:]
    command: click.Command = root()
    while words and isinstance(command, click.Group) and re.fullmatch(r"[a-z][a-z-]*", words[0]):
        name = words.pop(0)
        if name not in command.commands:
            return f"no command '{name}' in '{command.name}'"
        command = command.commands[name]
    if command.context_settings.get("ignore_unknown_options"):
        return None
    known = {"--help", "--json", "--version"} | {option for parameter in command.params for option in parameter.opts}
    known |= {option for parameter in command.params for option in parameter.secondary_opts}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    return f"no option {unknown[0]} of '{command.name}'" if unknown else None


def test_a_command_that_does_not_exist_is_found() -> None:
    assert commands("Run `interlock vm stp web`.\n\n```console\n$ interlock vm stop web --wait\n```\n") == [
        "interlock vm stp web",
        "interlock vm stop web --wait",
    ]
    assert problem("interlock vm stp web") == "no command 'stp' in 'vm'"
    assert problem("interlock vm stop web --quickly") == "no option --quickly of 'stop'"
    assert problem("interlock vm stop web --wait") is None


def test_every_command_in_the_documentation_exists() -> None:
    found = [(page, line) for page in PAGES for line in commands(page.read_text())]
    assert len(found) > 100
    assert [f"{page.relative_to(ROOT)}: {line}: {wrong}" for page, line in found if (wrong := problem(line))] == []


class _ObservedWalk(Walk):
    """A walk that notes each change of a request's status, `[*]` being the status of a new one."""

    def __init__(self) -> None:
        operations = [Operation.STOP, Operation.LOCK, Operation.DELETE]
        super().__init__(compile_named("standard"), operations, 2, 120, VmState.DELETED)
        self.seen: set[tuple[str, str]] = set()

    def _follow(self, index: int, node: Any, step: Step, change: Change[Any], now_ms: int) -> None:
        before = {request.id: request.status for request in node.instance.outstanding}
        pairs = {(str(before.get(request.id, "[*]")), str(request.status)) for request in change.requests}
        self.seen |= {(source, target) for source, target in pairs if source != target}
        super()._follow(index, node, step, change, now_ms)


def test_the_diagram_of_a_request_has_the_arrows_that_the_core_takes() -> None:
    """A walk holds nothing, so the arrows of held requests are only checked for their statuses."""
    diagram = (ROOT / "README.md").read_text().split("stateDiagram-v2", 1)[1].split("```", 1)[0]
    arrows = set(re.findall(r"^    (\S+) --> (\w+)", diagram, re.MULTILINE))
    walk = _ObservedWalk()
    walk.run([VmState.ACTIVE], math.inf)
    assert {arrow for arrow in arrows if Status.HELD not in arrow} == walk.seen
    assert {target for _, target in arrows} == {status.value for status in Status}
