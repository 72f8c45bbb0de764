"""What `interlock policy table` prints, and how it ends."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Ran
from interlock.cli.application import run
from interlock.cli.commands.policy.group import policy_commands


@pytest.fixture
def policy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "100")
    group = policy_commands

    def call(*arguments: str) -> Ran:
        code = run(group, arguments, {})
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call


def test_the_standard_policy_is_shown_where_none_is_named(policy: Any) -> None:
    ran = policy("table")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0] == "Policy standard: what a member is answered"
    assert lines[2] == "With no task"
    stop = next(line for line in lines if line.startswith("stop "))
    assert stop.split() == ["stop", "yes", "yes", "yes", "·", "same", "yes", "·", "·", "·", "·", "·", "yes"]
    assert "Everything is denied in: deleted" in lines
    assert any(line.startswith("Always denied: evacuate, reset_state") for line in lines)
    assert "--task TASK" in ran.out
    assert not [line for line in lines if line.endswith(" ")]


def test_the_title_names_the_caller(policy: Any) -> None:
    ran = policy("table", "--requested-by", "ci-7")
    assert ran.out.splitlines()[0] == "Policy standard: what a member named ci-7 is answered"


def test_a_policy_is_named_by_argument_or_option_but_once(policy: Any) -> None:
    assert policy("table", "take2").out == policy("table", "--policy", "take2").out
    ran = policy("table", "take2", "--policy", "standard")
    assert (ran.code, ran.err.splitlines()[0]) == (2, "Error: Two policies given: 'take2' and 'standard'.")


def test_the_text_fits_a_terminal_and_can_be_narrowed_to_a_task(policy: Any) -> None:
    ran = policy("table", "--task", "reboot")
    assert "With rebooting, reboot_pending, reboot_started" in ran.out
    assert "With rebooting_hard" in ran.out
    assert "3m" in ran.out
    assert "yes*" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 100


def test_csv_is_every_combination(policy: Any) -> None:
    ran = policy("table", "--policy", "propolis", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(ran.out)))
    assert ran.code == 0
    assert len({tuple(row[key] for key in ("operation", "vm_state", "task_state", "launched")) for row in rows}) == len(
        rows
    )
    assert {row["verdict"] for row in rows} <= {"admit", "redundant", "deny", "preempt", "after"}
    assert len(rows) > 40_000


def test_json_is_one_document_with_the_rows(policy: Any) -> None:
    ran = policy("table", "--operation", "delete", "--vm-state", "active", "--task", "deleting", "--json")
    document = json.loads(ran.out)
    assert ran.out.count("\n") == 1
    assert document["policy"]["name"] == "standard"
    assert document["circumstances"]["role"] == "member"
    assert [row["launched"] for row in document["rows"]] == [True, False]
    assert document["rows"][0] == {
        "operation": "delete",
        "vm_state": "active",
        "task_state": "deleting",
        "launched": True,
        "verdict": "after",
        "threshold_s": 300,
        "rule": "delete-again",
        "reason": "already_deleting",
        "later_s": None,
    }


def test_circumstances_change_the_answers(policy: Any) -> None:
    narrow = ("table", "--operation", "stop", "--format", "csv", "--vm-state", "active", "--task")
    assert ",locked\n" in policy(*narrow, "none", "--locked").out
    assert ",role_required\n" in policy(*narrow, "none", "--role", "reader").out
    assert "after,180," in policy(*narrow, "rebooting", "--silent", "5m").out
    evacuate = ("table", "--operation", "evacuate", "--format", "csv", "--vm-state", "active", "--task", "none")
    assert ",host_reachable\n" in policy(*evacuate).out
    assert ",host_reachable\n" not in policy(*evacuate, "--host-unreachable").out


def test_a_table_is_written_to_a_file_whole_or_not_at_all(policy: Any, tmp_path: Path) -> None:
    path = tmp_path / "table.html"
    ran = policy("table", "--format", "html", "--out", str(path))
    assert (ran.code, ran.out) == (0, "")
    assert path.read_text().startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]
    ran = policy("table", "--out", str(tmp_path / "missing" / "x"))
    assert ran.code == 2
    assert ran.err.startswith(f"Error: Cannot write {tmp_path / 'missing' / 'x'}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope",), "Built-in policy 'nope' not found."),
        (("--operation", "rebot"), "Unknown operation 'rebot'."),
        (("--vm-state", "activ"), "Unknown vm_state 'activ'."),
        (("--task", "rebootin"), "Unknown task_state 'rebootin'."),
        (("--silent", "-3m"), "expected a duration"),
        (("--silent", "1e99s"), "expected a duration"),
        (("--format", "pdf"), "Invalid value for '--format'"),
    ],
)
def test_wrong_input_is_a_sentence(policy: Any, arguments: tuple[str, ...], message: str) -> None:
    ran = policy("table", *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err
