"""The matrix as pages: all of it, safe to open, and needing nothing from anywhere else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy, Rule, Verdict
from interlock.core.states import NO_TASK, VmState
from interlock.policies.language.loader import compile_named
from interlock.policies.rendering.table_pages import html_page, markdown_lines
from interlock.policies.rendering.tables import TASKS, Circumstances, select, table

STANDARD = compile_named("standard")


class Parsed(HTMLParser):
    """The tags of a page, and the texts of the parts of which something is said."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts.setdefault(self.tags[-1][0], []).append(data)


def data_of(page: str) -> Any:
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def test_the_page_has_every_answer_of_the_policy() -> None:
    data = data_of(html_page(STANDARD))
    tasks = {each["name"]: each for each in data["tasks"]}
    assert list(tasks) == list(TASKS)
    for row in table(STANDARD):
        task = tasks[row.task_state]
        lines = data["slices"][task["launched" if row.launched else "never"]]
        place = lines[data["operations"].index(row.operation)][data["states"].index(row.vm_state)]
        answer = data["answers"][place]
        assert (answer["verdict"], answer["rule"], answer["reason"]) == (row.verdict, row.rule, row.reason)
        assert answer["sign"].endswith("*") == (row.later_s is not None)


def test_the_page_offers_each_task_state_once_under_its_operation() -> None:
    data = data_of(html_page(STANDARD))
    offered = [data["tasks"][number]["name"] for _, numbers in data["groups"] for number in numbers]
    assert offered == list(TASKS)
    assert data["groups"][0] == [None, [0]]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = html_page(STANDARD)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    for tag, attributes in Parsed(page).tags:
        assert tag not in {"link", "img", "iframe"}
        assert not {"src", "href"} & set(attributes)


def test_the_page_shows_the_first_task_state_without_scripts() -> None:
    parsed = Parsed(html_page(STANDARD))
    cells = [attributes for tag, attributes in parsed.tags if tag == "td"]
    rows = [row for row in table(STANDARD) if row.task_state == NO_TASK and row.launched]
    assert [cell["class"] for cell in cells] == [row.verdict.value for row in rows]


def test_what_a_policy_says_cannot_leave_its_place_in_the_page() -> None:
    hostile = "</script><script>alert(1)</script><!--$data"
    rule = Rule(id=hostile, operations=frozenset(Operation), verdict=Verdict.ADMIT, because=hostile)
    policy = CompiledPolicy(Policy(name=hostile, rules=(rule,), names={"stop": (hostile,)}))
    page = html_page(policy)
    assert "<script>alert" not in page
    assert [tag for tag, _ in Parsed(page).tags].count("script") == 2
    assert {answer["rule"] for answer in data_of(page)["answers"]} == {hostile, "gone"}
    assert "<script" not in "\n".join(markdown_lines(policy)).replace("\\<", "")


def test_answers_explain_what_happens_when() -> None:
    says = {answer["rule"]: answer["says"] for answer in data_of(html_page(STANDARD))["answers"]}
    assert says["delete"] == "Admitted before all else; what is in flight has 10s to stop by itself."
    assert says["delete-again"] == (
        "Called redundant for 5m without a sign of life of what is in flight, then takes over."
    )
    later = [answer["says"] for answer in data_of(html_page(STANDARD))["answers"] if answer["sign"].endswith("*")]
    assert later
    assert all(text.endswith("; another rule answers after 15s of silence.") for text in later)


def test_markdown_has_a_line_for_each_operation_that_is_not_always_refused() -> None:
    chosen = select(STANDARD, operations=["stop", "evacuate"], tasks=["none"])
    lines = list(markdown_lines(STANDARD, Circumstances(caller={"role": "admin"}), chosen))
    assert lines[0] == "What an admin is answered by standard."
    assert lines[2] == "**With no task**"
    header, rule, *rest = lines[4:]
    assert header.count("|") == rule.count("|") == len(VmState) + 2
    assert rest[0] == "| stop | yes | yes | yes | · | same | yes | · | · | · | · | · | · | yes |"
    assert rest[1].startswith("| stop\\_hard |")
    assert "Always refused: evacuate." in rest


def test_markdown_tells_of_what_changes_with_silence() -> None:
    lines = list(markdown_lines(STANDARD, selection=select(STANDARD, operations=["stop"], tasks=["rebooting"])))
    assert any("yes\\*" in line for line in lines)
