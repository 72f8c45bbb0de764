"""`policy replay` and `policy suggest`: what people see, what programs get, and what cannot be done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.recorded_history import Plan, record_history
from cli.conftest import Ran
from interlock.cli.application import run
from interlock.cli.commands.policy.group import policy_commands
from interlock.policies.language.loader import compile_named, load
from interlock.server import DATABASE
from interlock.stores import schema
from interlock.stores.history import History

Policy = Callable[..., Ran]
PLAN = Plan(submissions=3_000, instances=30, between_ms=90_000)
IN_MY_CLOUD = """
[policy]
name = "my-cloud"
extends = "standard"

[[rule]]
id = "no-stop"
operations = ["stop"]
verdict = "deny"
reason = "never"
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / DATABASE
    record_history(path, compile_named("standard"), PLAN)
    return path


@pytest.fixture
def policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Policy:
    """Run one of the two commands in this process, with a data folder that has nothing in it."""
    root = policy_commands

    def call(*arguments: str | Path, **environment: str) -> Ran:
        code = run(root, [str(one) for one in arguments], {"INTERLOCK_DATA_DIR": str(tmp_path), **environment})
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call


@pytest.fixture
def my_cloud(tmp_path: Path) -> Path:
    path = tmp_path / "my-cloud.toml"
    path.write_text(IN_MY_CLOUD)
    return path


def of(ran: Ran) -> dict[str, Any]:
    assert ran.code == 0, ran.err
    document: dict[str, Any] = json.loads(ran.out)
    return document


# -------------------------------------------------------------------------------------------------------------- replay


def test_the_policy_that_decided_would_decide_the_same(policy: Policy, database: Path) -> None:
    ran = policy("replay", "--policy", "standard", "--database", database)
    assert ran.code == 0
    assert "Policy standard on 3000 submissions" in ran.out
    assert "3000  100.0 %  would be decided the same" in ran.out
    assert "HOW MANY" not in ran.out


def test_a_rule_of_ones_own_shows_who_it_would_have_refused(policy: Policy, database: Path, my_cloud: Path) -> None:
    ran = policy("replay", "--policy", my_cloud, "--database", database)
    assert ran.code == 0
    assert "would be denied, and were not" in ran.out
    assert "denied by no-stop (never)" in ran.out
    document = of(policy("replay", "--policy", my_cloud, "--database", database, "--json"))
    stops = document["operations"]["stop"]
    # The rule about locks is fixed in `standard`, and goes on speaking first.
    assert stops["refused"] + stops["other_reason"] + stops["same"] == stops["submissions"]
    assert (stops["refused"] > 100, stops["admitted"]) == (True, 0)
    assert document["totals"]["refused"] == stops["refused"]
    first = document["differences"][0]
    assert first["operation"] == "stop"
    assert first["candidate"] == {"disposition": "denied", "rule": "no-stop", "reason": "never"}
    assert sum(first["projects"].values()) == first["submissions"]
    assert first["example"]["instance"].startswith("instance-")


def test_another_reason_is_listed_when_it_is_asked_for(policy: Policy, database: Path, my_cloud: Path) -> None:
    arguments = ("replay", "--policy", my_cloud, "--database", database)
    differences = of(policy(*arguments, "--json"))["differences"]
    reasons = {one["recorded"]["rule"] for one in differences if one["effect"] == "other_reason"}
    others = {one["recorded"]["rule"] for one in differences if one["effect"] != "other_reason"}
    assert reasons - others
    for rule in reasons - others:
        assert f"denied by {rule} (" not in policy(*arguments).out
        assert f"denied by {rule} (" in policy(*arguments, "--reasons").out


def test_a_project_and_a_part_of_the_time_are_judged_alone(policy: Policy, database: Path) -> None:
    arguments = ("replay", "--policy", "take2", "--database", database, "--json")
    whole = of(policy(*arguments))
    blue = of(policy(*arguments, "--project", "blue"))
    assert set(blue["projects"]) == {"blue"}
    assert blue["totals"] == whole["projects"]["blue"]
    late = of(policy(*arguments, "--since", "30m"))
    early = of(policy(*arguments, "--until", "30m"))
    assert 0 < late["totals"]["submissions"] < whole["totals"]["submissions"]
    assert late["totals"]["submissions"] + early["totals"]["submissions"] == whole["totals"]["submissions"]
    assert late["first_at_ms"] >= whole["last_at_ms"] - 30 * 60_000 - 1
    by_date = of(policy(*arguments, "--since", "2026-09-21T14:30:00+00:00"))
    assert by_date["first_at_ms"] >= 1_790_001_000_000


def test_without_a_name_the_servers_own_database_is_read(policy: Policy, tmp_path: Path, database: Path) -> None:
    (tmp_path / DATABASE).write_bytes(database.read_bytes())
    assert "on 3000 submissions" in policy("replay", "--policy", "standard").out


# ------------------------------------------------------------------------------------------------------------- suggest


def test_a_line_for_each_operation_and_each_threshold(policy: Policy, database: Path) -> None:
    ran = policy("suggest", "--policy", "standard", "--database", database, "--percentile", "90")
    assert ran.code == 0
    lines = {line.split("  ")[0]: line for line in ran.out.splitlines()}
    assert "too few" not in lines["stop"]
    assert "again-power.stop" in lines
    assert "3m" in lines["again-power.stop"]
    assert "Never seen to succeed: backup" in ran.out
    never = next(line for line in ran.out.splitlines() if line.startswith("Never seen"))
    assert not set(never.partition(": ")[2].rstrip(".").split(", ")) & set(lines)


def test_programs_get_the_numbers(policy: Policy, database: Path) -> None:
    document = of(policy("suggest", "--policy", "standard", "--database", database, "--json"))
    assert (document["needed"], document["out"], document["picture"]) == (299, None, None)
    stop = next(one for one in document["findings"] if one["operation"] == "stop")
    rule = next(one for one in document["proposals"] if one["rule"] == "again-power.stop")
    if stop["proposed_ms"] is not None:
        assert rule["proposed_ms"] == stop["proposed_ms"]
    assert stop["healthy"] == rule["healthy"] > 100


def test_todays_policy_is_the_configured_one(policy: Policy, database: Path, my_cloud: Path) -> None:
    document = of(policy("suggest", "--database", database, "--json", INTERLOCK_POLICY=str(my_cloud)))
    assert document["policy"] == "my-cloud"
    assert of(policy("suggest", "--database", database, "--json"))["policy"] == "standard"


def test_the_file_extends_todays_policy_wherever_that_is(
    policy: Policy, database: Path, my_cloud: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "suggested"
    folder.mkdir()
    out = folder / "new.toml"
    ran = policy("suggest", "--policy", my_cloud, "--database", database, "--percentile", "90", "--out", out)
    assert ran.code == 0, ran.err
    assert f"The policy is in {out}" in ran.out
    found = load(out)
    assert found.name == "my-cloud-suggested"
    assert "no-stop" in {rule.id for rule in found.rules}
    assert found.rules != load(my_cloud).rules
    assert "2026-09-21" in out.read_text()
    again = policy("replay", "--policy", out, "--database", database)
    assert "Policy my-cloud-suggested on 3000 submissions" in again.out


def test_the_picture_is_drawn(policy: Policy, database: Path, tmp_path: Path) -> None:
    picture = tmp_path / "thresholds.html"
    ran = policy("suggest", "--policy", "standard", "--database", database, "--picture", picture)
    assert ran.code == 0, ran.err
    assert "<svg" in picture.read_text()
    assert f"The picture is in {picture}." in ran.out


# ------------------------------------------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize("command", ["replay", "suggest"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--database", "{folder}/nothing.db"), "not found"),
        (("--database", "{folder}"), "not found"),
        ((), "not found"),
        (("--database", "{folder}/fresh.db"), "No events in"),
        (("--database", "{folder}/text.db"), "is not an SQLite database"),
        (("--database", "{database}", "--since", "yesterday"), "Invalid --since 'yesterday'."),
        (("--database", "{database}", "--since", "-3d"), "Invalid --since '-3d'."),
        (("--database", "{database}", "--until", "1e99"), "Invalid --until '1e99'."),
        (("--database", "{database}", "--since", "2026-13-45"), "Invalid --since"),
        (("--database", "{database}", "--since", "0001-01-01T00:00:00+14:00"), "Invalid --since"),
        (("--database", "{database}", "--since", "1h", "--until", "2h"), "is not before"),
        (("--database", "{database}", "--since", "2030-01-01"), "was recorded between"),
        (("--database", "{database}", "--until", "2020-01-01"), "was recorded between"),
        (("--database", "{database}", "--policy", "standrad"), "Built-in policy 'standrad' not found"),
        (("--database", "{database}", "--policy", "{folder}/none.toml"), "File not found"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_what_to_do(
    policy: Policy, database: Path, tmp_path: Path, command: str, arguments: tuple[str, ...], said: str
) -> None:
    schema.upgrade(tmp_path / "fresh.db")
    (tmp_path / "text.db").write_text("notes " * 100)
    given = [one.format(folder=tmp_path, database=database) for one in arguments]
    ran = policy(command, *(() if "--policy" in given else ("--policy", "standard")), *given)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert len(ran.err.strip().splitlines()) <= 2


def test_a_project_that_asked_for_nothing_is_told(policy: Policy, database: Path) -> None:
    ran = policy("replay", "--policy", "take2", "--database", database, "--project", "nobody")
    assert ran.code == 2
    assert "No submission of the project nobody was recorded between" in ran.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--out", "{folder}/there.toml"), "already exists"),
        (("--out", "{folder}/new.txt"), "expected a name that ends in .toml"),
        (("--out", "{folder}/no/new.toml"), "not found"),
        (("--picture", "{folder}/a.gif"), "names no kind of picture"),
        (("--picture", "{folder}/no/a.png"), "not found"),
        (("--percentile", "100"), "percentile"),
        (("--confidence", "x"), "confidence"),
        (("--factor", "0"), "factor"),
    ],
)
def test_nothing_is_overwritten_and_nothing_half_written(
    policy: Policy, database: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "there.toml").write_text("mine")
    given = [one.format(folder=tmp_path) for one in arguments]
    ran = policy("suggest", "--policy", "standard", "--database", database, *given)
    assert ran.code == 2
    assert said in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["there.toml"]
    assert (tmp_path / "there.toml").read_text() == "mine"


def test_a_file_that_would_be_no_policy_is_not_left_behind(
    policy: Policy, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.policies.history.suggested_policies.policy_text", lambda *_: "nonsense = 1\n")
    ran = policy("suggest", "--policy", "standard", "--database", database, "--out", tmp_path / "new.toml")
    assert ran.code == 2
    assert "new.toml:1" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_failures_are_json_for_programs(policy: Policy, tmp_path: Path) -> None:
    ran = policy("replay", "--json", "--policy", "standard", "--database", tmp_path / "none.db")
    assert ran.code == 2
    assert json.loads(ran.err)["detail"].endswith("not found.")


def test_history_is_not_loaded_before_it_is_asked_for() -> None:
    """The command line stays fast: neither the store nor matplotlib comes with its commands."""
    import subprocess
    import sys

    code = (
        "import sys; import interlock.cli.application; "
        "print([name for name in ('apsw', 'matplotlib', 'numpy', 'uvicorn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_history_of_the_tests_is_what_they_say(database: Path) -> None:
    with History(database) as history:
        assert sum(1 for _ in history.submissions()) == PLAN.submissions
