"""What `interlock policy check`, `test` and `explain` print, and how they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli.conftest import Interlock, Ran
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import NOW
from interlock.api.routes.policy import policy_view
from interlock.api.schemas import serializers
from interlock.cli.application import run
from interlock.cli.commands.policy.group import policy_commands
from interlock.cli.commands.policy.output import story_lines
from interlock.config import UpkeepConfig
from interlock.core.admission import admit_there
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Submission
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.policies.explanation.explainer import NOT_SUBMITTED, imagined
from interlock.policies.language.loader import compile_named

BROKEN = Path(__file__).parents[1] / "policies" / "broken"
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "my-cloud.toml"
NOW_MS = round(NOW * 1000)


@pytest.fixture
def policy(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run one of the commands, against the scripted server where there is one to ask."""
    group = policy_commands

    def call(*arguments: str) -> Ran:
        code = run(group, arguments, {"INTERLOCK_DATA_DIR": str(folder)})
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call


def test_findings_are_lines_that_an_editor_understands(policy: Any) -> None:
    path = BROKEN / "dead-rule.toml"
    ran = policy("check", str(path))
    assert ran.code == 1
    assert ran.out.startswith(f"{path}:12: error: 'members-may-stop' never decides")
    assert "[unreachable]\n    Move it before 'no-stops'" in ran.out
    assert "of them with --verbose" in ran.out.splitlines()[-1]
    assert "stop-harder" not in ran.out
    assert "stop-harder" in policy("check", str(path), "--verbose").out


def test_warnings_are_errors_only_when_strict(policy: Any) -> None:
    assert "warning:" in policy("check", "propolis").out
    assert policy("check", "propolis").code == 0
    assert policy("check", "propolis", "--strict").code == 1


def test_a_file_that_is_no_policy_is_a_finding_with_its_position(policy: Any) -> None:
    ran = policy("check", str(BROKEN / "unknown-name.toml"))
    assert ran.code == 1
    assert f"{BROKEN / 'unknown-name.toml'}:7" in ran.out
    assert "Did you mean 'pause'?" in ran.out


@pytest.mark.parametrize(
    ("name", "says"), [("standart", "Did you mean 'standard'?"), ("x.toml", "File 'x.toml' not found")]
)
def test_a_name_that_stands_for_nothing_is_a_slip_on_the_command_line(policy: Any, name: str, says: str) -> None:
    ran = policy("check", name)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err


def test_with_json_all_findings_of_all_policies_are_one_document(policy: Any) -> None:
    ran = policy("check", "propolis", str(BROKEN / "ring.toml"), "--json")
    document = json.loads(ran.out)
    assert [one["policy"] for one in document["policies"]] == ["propolis", str(BROKEN / "ring.toml")]
    assert (ran.code, document["passed"], ran.err) == (1, False, "")
    severities = [finding["severity"] for one in document["policies"] for finding in one["findings"]]
    assert document["warnings"] == severities.count("warning") > 0


def test_scenarios_that_pass_are_told_in_a_line_each(policy: Any) -> None:
    ran = policy("test", str(EXAMPLE))
    assert (ran.code, ran.err) == (0, "")
    assert "  ok      a silent backup is given an hour\n" in ran.out
    assert ran.out.splitlines()[-1].startswith("6 scenarios, 0 failed; 3 of 3 own rules touched")


def test_a_scenario_that_fails_shows_what_differs_and_where(policy: Any) -> None:
    scenarios = EXAMPLE.with_name("my-cloud.tests.jsonl")
    ran = policy("test", "standard", "--scenarios", str(scenarios), "--coverage")
    assert ran.code == 1
    assert f'{scenarios}:6: {{"submit": "stop"' in ran.out
    assert '- disposition  "denied"\n          + disposition  "admitted"\n' in ran.out
    assert "no scenario touches 'pause-suspend'" not in ran.out
    assert "no scenario touches 'unrescue'" in ran.out
    document = json.loads(policy("test", "standard", "--scenarios", str(scenarios), "--json").out)
    failed = [one for one in document["policies"][0]["scenarios"] if one["failed"]]
    assert failed[0]["failed"]["differences"][0] == {"key": "disposition", "expected": "denied", "got": "admitted"}


def test_no_scenarios_at_all_is_a_slip(policy: Any, tmp_path: Path) -> None:
    alone = tmp_path / "alone.toml"
    alone.write_text('[policy]\nextends = "standard"\n')
    for arguments in (("test", "standard"), ("test", str(alone))):
        ran = policy(*arguments)
        assert ran.code == 2
        assert ".tests.jsonl, or name a file with --scenarios." in ran.err
    assert policy("test", str(tmp_path / "none.toml")).code == 2


def test_a_caller_is_explained_by_name(policy: Any, tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        '[policy]\nextends = "standard"\n[[rule]]\nid = "robots"\noperations = ["stop"]\nrequested_by = ["ci-*"]\n'
        'verdict = "deny"\n'
    )
    robot = policy("explain", "active", "stop", "--policy", str(site), "--requested-by", "ci-1")
    assert robot.out.startswith("Denied: stop in active, requested with the role member by ci-1 (not_allowed)")
    person = policy("explain", "active", "stop", "--policy", str(site), "--requested-by", "alice")
    assert person.out.startswith("Allowed: stop in active, requested with the role member by alice")
    tables = [
        policy("table", str(site), "--format", "csv", "--operation", "stop", *more).out
        for more in ((), ("--requested-by", "ci-1"))
    ]
    assert ["stop,active,none,true,deny,,robots,not_allowed" in text for text in tables] == [False, True]
    assert policy("check", str(site)).code == 0


def test_a_state_is_explained_without_a_server(policy: Any) -> None:
    ran = policy("explain", "active/rebooting", "stop", "--silent", "20s")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("Denied: stop in active/rebooting, requested with the role member")
    assert "roles: wants one of agent, reader, found member" in ran.out
    assert "→ silent-power.stop" in ran.out
    assert "in 2 min 40 s, unless there is progress before  (rule silent-power.stop)" in ran.out


def test_a_time_that_progress_does_not_move_is_explained_without_a_proviso(policy: Any, tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        '[policy]\nextends = "standard"\n[[rule]]\nid = "patient"\noperations = ["stop"]\ntask_state = ["@reboot"]\n'
        'verdict = "after"\nthreshold = "1m"\nmeasured_from = "task_started"\n'
    )
    ran = policy("explain", "active/rebooting", "stop", "--policy", str(site), "--silent", "5s", "--running", "20s")
    assert "in 40 s  (rule patient)" in ran.out
    assert "unless" not in ran.out


def test_rules_that_fail_for_the_same_cause_are_folded(policy: Any) -> None:
    folded, everything = (policy("explain", "active", "unrescue", *more).out for more in ((), ("--all",)))
    assert len(everything) > len(folded)
    assert "if it is rescued: rescue leads there, and is allowed now  (rule unrescue)" in folded


def test_the_options_describe_the_instance(policy: Any) -> None:
    described = ("--locked", "--tag", "gpu", "--not-launched", "--unreachable", "--outstanding", "start,stop")
    ran = policy("explain", "stopped", "reboot", "--hard", "--blocked", "--running", "1m", *described, "--json")
    view = json.loads(ran.out)["view"]
    assert (view["locked"], view["tags"], view["launched"], view["host_reachable"]) == (True, ["gpu"], False, False)
    assert (view["hard"], view["blocked"], view["outstanding"]) == (True, True, 0b110)


def test_what_is_admitted_in_turn_shows_both_looks(policy: Any) -> None:
    ran = policy("explain", "stopped", "reboot", "--outstanding", "start")
    assert ran.out.startswith("Allowed: ")
    assert "Evaluated again in the foreseen state active:" in ran.out
    assert "It would be admitted" not in ran.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("activ/rebooting", "stop"), "Did you mean 'active'?"),
        (("active/reboot", "stop"), "The phases of reboot are rebooting"),
        (("active", "stpo"), "Did you mean stop"),
        (("active", "stop", "--silent", "-3m"), "Invalid duration"),
        (("active", "stop", "--outstanding", "lock"), "is never outstanding"),
        (("active", "stop", "--outstanding", "strt"), "Did you mean start"),
        (("active", "stop", "--policy", "nowhere.toml"), "File not found"),
        (("demo", "stop", "--locked"), "--locked requires a STATE; 'demo' is the name of a VM"),
        (("demo", "stop", "--hard"), "Add --policy NAME|FILE to evaluate a policy locally"),
    ],
)
def test_wrong_input_is_refused_in_words(
    policy: Any, server: ScriptedServer, arguments: tuple[str, ...], says: str
) -> None:
    server.on("GET", "/v1/instances/demo", Given(200, wire_instance(VmState.ACTIVE, "none")))
    ran = policy("explain", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err


def wire_instance(vm_state: VmState, task: str, **more: Any) -> Any:
    return serializers.instance(named(vm_state, task, **more), UpkeepConfig().times)


def named(vm_state: VmState, task: str, **more: Any) -> Any:
    return msgspec.structs.replace(imagined(vm_state, task, NOW_MS, **more), id="i-1", name="demo")


def serve(
    server: ScriptedServer,
    by: CompiledPolicy,
    role: Role,
    *,
    vm_state: VmState,
    task: str,
    reachable: bool = True,
    **more: Any,
) -> None:
    """A server that has one VM, and answers by that policy as a real one does."""
    instance = named(vm_state, task, **more)
    asked = Submission(
        request_id=NOT_SUBMITTED, operation=Operation.STOP, requested_by="me", role=role, host_reachable=reachable
    )
    answers = {
        operation: admit_there(instance, msgspec.structs.replace(asked, operation=operation), by, NOW_MS).answer
        for operation in Operation
    }
    allowed = serializers.allowed(instance, answers, NOW_MS, host_reachable=reachable)
    server.on("GET", "/v1/instances/demo", Given(200, serializers.instance(instance, UpkeepConfig().times)))
    server.on("GET", "/v1/instances/i-1/allowed", Given(200, allowed))
    server.on("GET", "/v1/policy", Given(200, policy_view(by)))


@pytest.mark.parametrize("options", [(), ("--policy", "standard")])
def test_a_vm_whose_host_is_lost_is_explained_as_that(
    policy: Any, server: ScriptedServer, options: tuple[str, ...]
) -> None:
    """The server knows what became of the host, whichever policy is asked."""
    by = compile_named("standard")
    serve(server, by, Role.ADMIN, vm_state=VmState.ACTIVE, task="none", reachable=False)
    role = ("--role", "admin") if options else ()
    ran = policy("explain", "demo", "evacuate", *options, *role)
    assert ran.code == 0
    assert ran.out.startswith("Allowed: evacuate of demo"), ran.out
    assert "changed meanwhile" not in ran.out
    serve(server, by, Role.ADMIN, vm_state=VmState.ACTIVE, task="none")
    assert policy("explain", "demo", "evacuate", *options, *role).out.startswith("Denied: evacuate of demo")


@pytest.mark.parametrize("role", [Role.MEMBER, Role.ADMIN])
def test_a_vm_is_explained_by_the_policy_of_its_server(policy: Any, server: ScriptedServer, role: Role) -> None:
    serve(
        server, compile_named("standard"), role, vm_state=VmState.ACTIVE, task="rebooting",
        silent_ms=20_000, running_ms=50_000,
    )  # fmt: skip
    ran = policy("explain", "demo", "stop")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("Denied: stop of demo (no_sign_of_life)")
    assert "→ silent-power.stop" in ran.out
    assert "in 2 min 40 s, at 12:03:02" in ran.out.replace("2026-03-01 ", "")
    document = json.loads(policy("explain", "demo", "stop", "--json").out)
    assert document["ways"][0] == {
        "turn": "time", "value": None, "at_ms": NOW_MS + 160_000, "rule": "silent-power.stop", "by": [],
        "text": "in 160s, if nothing makes progress until then", "in_s": 160, "if_silent": True, "latest_ms": None,
    }  # fmt: skip


def test_a_vm_can_be_judged_here_by_a_policy_that_is_not_loaded(policy: Any, server: ScriptedServer) -> None:
    serve(server, compile_named("standard"), Role.MEMBER, vm_state=VmState.ACTIVE, task="none")
    server.on("GET", "/v1/instances/demo", Given(200, wire_instance(VmState.ACTIVE, "none", tags=["gpu"])))
    ran = policy("explain", "demo", "pause", "--policy", str(EXAMPLE))
    assert ran.out.startswith("Denied: pause of demo, requested with the role member (idle_gpu)")
    assert "if it has no tag 'gpu', which only an admin may set or remove  (rule pause-suspend)" in ran.out


def test_an_answer_that_its_rules_do_not_lead_to_is_not_explained_wrongly(policy: Any, server: ScriptedServer) -> None:
    serve(server, compile_named("standard"), Role.MEMBER, vm_state=VmState.ACTIVE, task="none")
    server.on("GET", "/v1/policy", Given(200, policy_view(compile_named("propolis"))))
    ran = policy("explain", "demo", "pause")
    assert ran.out.startswith("Allowed: pause of demo")
    assert "Retry." in ran.out
    assert "The rules asked" not in ran.out


def test_every_state_and_operation_can_be_explained(policy: Any) -> None:
    for state in VmState:
        ran = policy("explain", state.value, Operation.STOP.value)
        assert (ran.code, ran.err) == (0, ""), state


def test_a_misspelt_state_is_helped_where_no_vm_has_that_name(interlock: Interlock) -> None:
    ran = interlock("policy", "explain", "activ", "start")
    assert ran.code == 4
    assert "Did you mean the state 'active'?" in ran.err


def test_a_policy_of_novas_api_is_converted_to_a_file_that_passes_the_check(policy: Any, tmp_path: Path) -> None:
    source, made = tmp_path / "policy.yaml", tmp_path / "made.toml"
    source.write_text('"os_compute_api:servers:delete": "role:admin"\n"os_compute_api:os-flavors": "@"\n')
    ran = policy("import", str(source), "--name", "mine", "--out", str(made))
    assert (ran.code, ran.out) == (0, "")
    assert "1 remark" in ran.err
    assert 'name = "mine"' in made.read_text()
    assert policy("check", str(made)).code == 0
    missing = policy("import", str(tmp_path / "nothing.yaml"))
    assert missing.code == 2
    assert "not found" in missing.err


def test_many_findings_of_one_kind_are_one_sentence_with_their_places(policy: Any, tmp_path: Path) -> None:
    path = tmp_path / "messy.toml"
    rules = "".join(f'[[rule]]\nid = "r{n}"\noperations = ["stop"]\nverdict = "deny"\n' for n in range(6))
    path.write_text(f'[policy]\nextends = "standard"\n{rules}')
    ran = policy("check", str(path))
    assert (
        f"{path}:7: error: Rules never decide: everything that they match is decided before them. 5 places: " in ran.out
    )
    assert "    7 r1, 11 r2, 15 r3, 19 r4, 23 r5\n" in ran.out
    assert ran.out.count("[unreachable]") == 1
    assert policy("check", str(path), "--verbose").out.count("[unreachable]") == 5
    (groups,) = [one["groups"] for one in json.loads(policy("check", str(path), "--json").out)["policies"]]
    assert [len(one["findings"]) for one in groups if one["code"] == "unreachable"] == [5]


def test_a_kind_of_finding_is_explained_with_an_example(policy: Any) -> None:
    ran = policy("check", "--explain", "no-exit")
    assert ran.code == 0
    assert "every operation is denied to every role" in " ".join(ran.out.split())
    assert 'tags = ["legal-hold"]' in ran.out
    unknown = policy("check", "--explain", "noexit")
    assert unknown.code == 2
    assert "Did you mean 'no-exit'?" in unknown.err
    assert policy("check").code == 2


def test_a_counterexample_ends_with_the_breach_and_its_answer() -> None:
    policy = compile_named("standard")
    deleted = ('{"instance":{"vm_state":"active"}}', '{"submit":"delete"}', '{"take":"any"}')
    *events, asked, answer = story_lines(deleted, policy)
    assert tuple(events) == deleted
    assert asked == '{"submit":"delete","role":"admin"}'
    assert answer.startswith('-> {"disposition":"redundant"')
    assert [*story_lines(deleted[:2], policy)][-1].startswith('-> {"disposition":"admitted"')
    assert tuple(story_lines(deleted, None)) == deleted
    assert [*story_lines(['{"unknown":1}'], policy)] == ['{"unknown":1}']
