"""Drawings of policies: true to the policy, well-formed, and those in the documentation current."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from interlock.cli.application import run
from interlock.cli.commands.policy.group import policy_commands
from interlock.core.errors import Invalid
from interlock.core.operations import CATALOGUE, Operation
from interlock.core.policy import CompiledPolicy, Policy, Rule, Verdict
from interlock.core.states import NO_TASK, VmState
from interlock.policies.language.loader import builtin_names, compile_named
from interlock.policies.rendering import state_diagram
from interlock.policies.rendering.answer_grid_svg import of_states, of_tasks, svg_grid
from interlock.policies.rendering.state_diagram import digest_of, dot_source, svg_of, transitions
from interlock.policies.rendering.tables import Circumstances, table
from policy_pages import files, page

DOCS = Path(__file__).parents[2] / "docs" / "policies"
STANDARD = compile_named("standard")
V = VmState
needs_graphviz = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")


def test_an_arrow_is_what_the_policy_admits_and_leads_where_the_catalogue_says() -> None:
    drawn = transitions(STANDARD)
    assert drawn.edges[V.ACTIVE, V.PAUSED] == ("pause",)
    assert drawn.edges[V.PAUSED, V.ACTIVE] == ("reboot_hard", "unpause")
    assert drawn.edges[V.STOPPED, V.ACTIVE] == ("start", "reboot_hard")
    assert (V.SUSPENDED, V.STOPPED) not in drawn.edges
    assert "reboot" in drawn.staying[V.ACTIVE]
    assert drawn.returning[V.RESIZED] == ("confirm_resize", "revert_resize")
    assert drawn.everywhere["delete"] == (V.DELETED, ())
    assert drawn.everywhere["soft_delete"] == (V.SOFT_DELETED, (V.MIGRATED_OUT,))
    assert V.PAUSED in drawn.failures


@pytest.mark.parametrize("name", builtin_names())
def test_what_is_told_of_a_diagram_is_all_that_is_admitted(name: str) -> None:
    policy = compile_named(name)
    drawn = transitions(policy)
    told: set[tuple[str, str]] = set()
    for kept in (drawn.staying, drawn.returning):
        told |= {(state.value, each) for state, names in kept.items() for name in names for each in name.split(", ")}
    told |= {
        (source.value, each)
        for (source, _), names in drawn.edges.items()
        for name in names
        for each in name.split(", ")
    }
    for names, (target, missing) in drawn.everywhere.items():
        left = {target, V.DELETED, *missing}
        told |= {(state.value, each) for state in V if state not in left for each in names.split(", ")}
    kinds = {each: kind for kind in Operation for each in policy.policy.names.get(kind.value, (kind.value,))}
    admitted = {
        (row.vm_state, row.operation)
        for row in table(policy, Circumstances(caller={"role": "admin"}))
        if row.task_state == NO_TASK
        and row.launched is (row.vm_state != V.BUILDING)
        and row.verdict in (Verdict.ADMIT, Verdict.PREEMPT)
        and row.operation in kinds
        and CATALOGUE[kinds[row.operation]].phases
        and CATALOGUE[kinds[row.operation]].lane.value == "state"
        and V(row.vm_state) in CATALOGUE[kinds[row.operation]].sources
    }
    everywhere = {each for names in drawn.everywhere for each in names.split(", ")}
    assert {pair for pair in told if pair[1] in kinds} >= {pair for pair in admitted if pair[1] not in everywhere}
    assert {pair for pair in told if pair[1] in kinds and pair[1] not in everywhere} <= admitted


def test_a_diagram_leaves_out_what_no_instance_comes_to() -> None:
    assert "suspended" not in dot_source(compile_named("propolis"))
    assert "  suspended [" in dot_source(STANDARD)


def test_the_same_policy_gives_the_same_text() -> None:
    assert dot_source(STANDARD) == dot_source(compile_named("standard"))
    assert digest_of(dot_source(STANDARD)) != digest_of(dot_source(compile_named("take2")))


@needs_graphviz
def test_the_names_that_a_policy_gives_are_drawn_as_they_are() -> None:
    hostile = 'say "<b>&stop|'
    rule = Rule(id="any", operations=frozenset(Operation), verdict=Verdict.ADMIT)
    policy = CompiledPolicy(Policy(name=hostile, rules=(rule,), names={"stop": (hostile,), "snapshot": (hostile,)}))
    for text in (svg_of(dot_source(policy)), svg_grid(of_states(policy)), svg_grid(of_tasks(policy))):
        assert "&stop|" in "".join(ET.fromstring(text.encode()).itertext())


def test_a_grid_has_a_cell_for_every_answer() -> None:
    titles = titles_of(svg_grid(of_states(STANDARD)))
    assert len(titles) == len(of_states(STANDARD).rows) * len(VmState)
    assert sum(title.startswith("start, active: redundant (already_active); rule ") for title in titles) == 1
    titles = titles_of(svg_grid(of_tasks(STANDARD)))
    assert "reboot, rebooting: after (already_in_progress); rule again-power.reboot" in titles


def titles_of(picture: str) -> list[str]:
    return [str(each.text) for each in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}title")]


def test_without_graphviz_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Invalid) as refused:
        svg_of("digraph {}")
    assert "no program 'dot'" in refused.value.message
    assert "graphviz" in str(refused.value.remedy)


@needs_graphviz
def test_what_graphviz_cannot_draw_is_a_sentence() -> None:
    with pytest.raises(Invalid, match="Graphviz cannot draw it"):
        state_diagram.svg_of("this is no graph")


@pytest.mark.parametrize("name", builtin_names())
def test_the_drawings_in_the_documentation_are_current(name: str) -> None:
    """Draw them again with `python tools/draw_docs.py policies`. The layout may differ, the source of it may not."""
    policy = compile_named(name)
    remedy = "Run `.venv/bin/python tools/draw_docs.py policies`."
    assert (DOCS / f"{name}.md").read_text() == page(name), remedy
    assert (DOCS / f"{name}-table.svg").read_text() == svg_grid(of_states(policy)), remedy
    assert (DOCS / f"{name}-tasks.svg").read_text() == svg_grid(of_tasks(policy)), remedy
    found = re.search(r"<!-- source: (\w+) -->", (DOCS / f"{name}-states.svg").read_text())
    assert found, remedy
    assert found.group(1) == digest_of(dot_source(policy)), remedy


def test_every_picture_of_a_page_is_there() -> None:
    for text in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)]+)\)", text.read_text()):
            assert (DOCS / target).exists(), f"{text.name}: {target}"


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(policy_commands, arguments, {})
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_a_diagram_can_be_had_as_dot_or_as_a_picture(command: Any, tmp_path: Path) -> None:
    assert command("diagram", "take2", "--format", "dot") == (0, dot_source(compile_named("take2")), "")
    path = tmp_path / "table.svg"
    assert command("diagram", "take2", "--of", "table", "--out", str(path))[0] == 0
    assert path.read_text() == svg_grid(of_states(compile_named("take2")))
    document = json.loads(command("diagram", "take2", "--format", "dot", "--json")[1])
    assert (document["policy"]["name"], document["format"]) == ("take2", "dot")


def test_wrong_input_of_a_diagram_is_a_sentence(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("diagram", "nope")[0] == 2
    code, _out, err = command("diagram", "take2", "--of", "table", "--format", "dot")
    assert (code, err.splitlines()[0]) == (2, "Error: The format dot is available for states only.")
    monkeypatch.setenv("PATH", "")
    code, _out, err = command("diagram", "take2")
    assert code == 2
    assert err.startswith("Error: Graphviz is not installed")


@needs_graphviz
def test_every_file_of_the_folder_is_drawn() -> None:
    assert {name for name, _ in files()} == {path.name for path in DOCS.iterdir()}
