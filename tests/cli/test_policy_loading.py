"""`interlock policy load`, `rollback` and `history`, and SIGHUP, against a server in a process of its own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli.conftest import Interlock, Ran
from cli.scripted_server import Given, ScriptedServer
from interlock.api.schemas.policy import PolicyLoaded, PolicyName, PolicyWalk
from interlock.core.policy_switches import Outstanding
from interlock.policies.laws import LAWS
from processes.real_server import RealServer

SITE = '[policy]\nname = "site"\nextends = "./base.toml"\n'
BASE = """
[policy]
name = "base"
extends = "standard"

[[rule]]
id = "no-pause"
operations = ["pause"]
verdict = "deny"
reason = "no_pause"
"""
ASKED_MAX = 5_000
"""How often the server is asked for something else while it reloads its policy."""
DEAD_RULE = BASE + '\n[[rule]]\nid = "never"\noperations = ["pause"]\nverdict = "admit"\n'


def loaded(**changes: Any) -> PolicyLoaded:
    given: dict[str, Any] = {
        "name": "site",
        "digest": "ab" * 32,
        "changed": True,
        "number": 2,
        "previous": PolicyName(name="standard", digest="cd" * 32, number=1),
        "outstanding": Outstanding.KEEP,
        "cancelled": None,
        "findings": (),
        "exploration": PolicyWalk(
            states=12_345,
            transitions=99,
            complete=False,
            seconds=5.0,
            assumptions=("Held fixed.",),
            version="1.2.3",
        ),
    }
    return PolicyLoaded(**given | changes)


# ------------------------------------------------------------------------------------------------ what is sent and said


def test_a_file_is_sent_with_what_it_extends_on_the_terms_that_were_asked_for(
    server: ScriptedServer, interlock: Interlock, tmp_path: Path
) -> None:
    (tmp_path / "site.toml").write_text(SITE)
    (tmp_path / "base.toml").write_text(BASE)
    server.on("PUT", "/v1/policy", Given(200, loaded(cancelled=2, outstanding=Outstanding.REJUDGE)))
    arguments = ("--outstanding", "rejudge", "--explore", "5", "--if-in-force", "cd" * 8)
    ran = interlock("policy", "load", str(tmp_path / "site.toml"), *arguments)
    assert (ran.code, ran.err) == (0, "")
    (asked,) = server.asked
    sent = asked.json
    assert sorted(sent["files"].values()) == sorted((SITE, BASE))
    assert sent["files"][sent["main"]] == SITE
    assert (sent["outstanding"], sent["explore_seconds"], sent["dry_run"]) == ("rejudge", 5, False)
    assert asked.headers["if-match"] == f'"{"cd" * 8}"'
    outcome, walk, assumed = ran.out.splitlines()
    assert assumed == "  - Held fixed."
    assert outcome.startswith(f"site ({'ab' * 8}) is in force, instead of standard ({'cd' * 8}). Queued requests were ")
    assert outcome.endswith("again: 2 requests were cancelled.")
    assert walk.startswith("Explored by Interlock 1.2.3: 12,345 states in 5 s, incomplete;")


@pytest.mark.parametrize(
    ("arguments", "answer", "said"),
    [
        ((), loaded(), "Admitted requests are kept."),
        (("--dry-run",), loaded(changed=False), "can be put in force; nothing was changed."),
        ((), loaded(changed=False), "is in force already."),
    ],
)
def test_a_built_in_is_named(
    server: ScriptedServer, interlock: Interlock, arguments: tuple[str, ...], answer: PolicyLoaded, said: str
) -> None:
    server.on("PUT", "/v1/policy", Given(200, answer))
    ran = interlock("policy", "load", "take2", *arguments)
    assert (ran.code, said in ran.out) == (0, True)
    assert server.asked[0].json == {"name": "take2", "outstanding": "keep", "dry_run": bool(arguments)}


def test_a_refusal_shows_what_was_found_and_the_story_and_exits_with_1(
    server: ScriptedServer, interlock: Interlock
) -> None:
    finding = {"severity": "error", "code": "x", "rule": "r", "place": "s.toml:9", "message": "Dead.", "remedy": "Go."}
    story = ['{"instance":{"vm_state":"active"}}', '{"submit":"stop"}']
    answer = (
        '-> {"disposition":"admitted","reason":null,"rule":"active-allowed","retry_after":null,"supersedes":[],'
        '"cancels":[],"request":"r1"}'
    )
    stuck = {"alike": 2, "rejudge_helps": False, "because": "it is stuck."}
    vm = {"instance_id": "1", "project": "p", "operation": "stop", "status": "queued", **stuck}
    problem = {
        "type": "urn:interlock:problem:policy-refused",
        "title": "Policy rejected",
        "status": 422,
        "detail": "Policy rejected: its check found 1 error. standard stays in force.",
        "findings": [finding],
        "violations": [{"law": 5, "what": "nothing is ever admitted", "story": story}],
        "blocked": [{**vm, "name": "a"}, {**vm, "name": "b"}],
        "exploration": None,
    }
    server.on("PUT", "/v1/policy", Given(422, problem, "application/problem+json"))
    ran = interlock("policy", "load", "take2", NO_COLOR="1")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines() == [
        "Rejected: Policy rejected: its check found 1 error. standard stays in force.",
        "s.toml:9: error: Dead. [x]",
        "    Go.",
        f"Law 5 (never stuck) is violated: nothing is ever admitted. {LAWS[5].promise}",
        "Counterexample, for `interlock rehearse`:",
        *(f"  {line}" for line in (*story, answer)),
        "VM 'b' of project 'p', with stop queued: it is stuck. The same holds for 2 more.",
    ]
    as_json = interlock("policy", "load", "take2", "--json")
    assert (as_json.code, json.loads(as_json.err)["violations"][0]["law"]) == (1, 5)


@pytest.mark.parametrize("name", ["none.toml", "./", "/dev/null/x.toml"])
def test_a_file_that_is_not_there_is_a_usage_error_and_nothing_is_asked(
    server: ScriptedServer, interlock: Interlock, tmp_path: Path, name: str
) -> None:
    ran = interlock("policy", "load", str(tmp_path / name) if name == "none.toml" else name)
    assert (ran.code, server.asked) == (2, [])
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "soon"])
def test_an_absurd_time_to_explore_is_a_usage_error(server: ScriptedServer, interlock: Interlock, seconds: str) -> None:
    ran = interlock("policy", "load", "take2", "--explore", seconds)
    assert (ran.code, server.asked) == (2, [])


def test_a_name_that_no_policy_has_is_a_usage_error(server: ScriptedServer, interlock: Interlock) -> None:
    problem = {"type": "urn:interlock:problem:policy", "title": "…", "status": 422, "detail": "There is no 'x'."}
    server.on("PUT", "/v1/policy", Given(422, problem, "application/problem+json"))
    ran = interlock("policy", "load", "x")
    assert (ran.code, "There is no 'x'." in ran.err) == (2, True)


def test_another_policy_in_force_is_refused_like_anything_else_that_has_changed(
    server: ScriptedServer, interlock: Interlock
) -> None:
    problem = {"type": "urn:interlock:problem:policy-mismatch", "title": "…", "status": 412, "detail": "Not that one."}
    server.on("PUT", "/v1/policy", Given(412, problem, "application/problem+json"))
    assert interlock("policy", "load", "take2", "--if-in-force", "ab" * 8).code == 3


# -------------------------------------------------------------------------------------------------------- real server


class Site:
    """A server on a policy file, and command lines that find it."""

    def __init__(self, folder: Path, call: Callable[..., Ran]) -> None:
        self.file = folder / "site.toml"
        self.file.write_text(BASE)
        self.folder = folder / "data"
        settings = {
            "INTERLOCK_HYPERVISOR": "simulated",
            "INTERLOCK_POLICY": str(self.file),
            "INTERLOCK_POLICY_EXPLORE_MS": "0",
        }
        self.server = RealServer(self.folder, settings)
        self._call = call

    def interlock(self, *arguments: str) -> Ran:
        return self._call(*arguments, INTERLOCK_DATA_DIR=str(self.folder), NO_COLOR="1")

    def hang_up(self, expected: str) -> dict[str, Any]:
        """Send SIGHUP, and what the server then logs that has these words."""
        seen = len(self._lines())
        pid = json.loads((self.folder / "server.json").read_text())["pid"]
        os.kill(pid, signal.SIGHUP)
        for _ in range(ASKED_MAX):
            for line in self._lines()[seen:]:
                if expected in line:
                    said: dict[str, Any] = msgspec.json.decode(line)
                    return said
            # It goes on answering meanwhile, which is also what makes this loop wait.
            assert self.in_force() != ""
        raise AssertionError(f"{expected!r} is not in the log: {self._lines()[seen:]}")

    def _lines(self) -> list[str]:
        return [line for line in self.server.log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def in_force(self) -> str:
        return str(self.server.get("/v1/policy")["name"])


@pytest.fixture
def site(tmp_path: Path, interlock: Interlock) -> Iterator[Site]:
    one = Site(tmp_path, interlock)
    one.server.start()
    yield one
    one.server.stop()


def test_a_policy_is_loaded_brought_back_and_listed(site: Site, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "site.toml").write_text(SITE)
    (tmp_path / "mine" / "base.toml").write_text(BASE)
    ran = site.interlock("policy", "load", str(tmp_path / "mine" / "site.toml"))
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("site (")
    assert site.in_force() == "site"
    back = site.interlock("policy", "rollback", "--json")
    assert json.loads(back.out)["previous"]["name"] == "site"
    assert site.in_force() == "base"
    listed = site.interlock("policy", "history").out.splitlines()
    assert [line.split()[0] for line in listed] == ["NUMBER", "3", "2", "1"]
    assert "rolled back" in listed[1]
    forth = site.interlock("policy", "rollback", "--to", "2")
    assert (forth.code, site.in_force()) == (0, "site")
    (tmp_path / "dead.toml").write_text(DEAD_RULE)
    refused = site.interlock("policy", "load", str(tmp_path / "dead.toml"))
    assert (refused.code, "never" in refused.err, site.in_force()) == (1, True, "site")


def test_a_server_that_starts_with_a_broken_file_goes_on_by_the_last_policy_and_says_so(site: Site) -> None:
    site.server.stop()
    site.file.write_text(BASE.replace('"pause"', '"puase"'))
    site.server.start()
    assert site.in_force() == "base"
    logged = next(
        json.loads(line) for line in site.server.log.read_text().splitlines() if "last active policy kept" in line
    )
    assert (logged["level"], logged["stays"]) == ("error", "base")
    assert logged["why"].startswith(f"{site.file}:8:")
    shown = site.interlock("policy", "show").out.splitlines()
    assert shown[0] == f"The configured policy {site.file} is rejected; base stays in force."
    assert shown[1].strip().startswith(f"{site.file}:8:")
    assert shown[4].startswith("Policy base: ")
    site.file.write_text(BASE.replace('"base"', '"mended"'))
    site.hang_up("policy switched")
    assert site.in_force() == "mended"
    assert site.interlock("policy", "show").out.startswith("Policy mended: ")


def test_a_hangup_has_the_file_read_again_and_what_is_wrong_with_it_logged(site: Site) -> None:
    site.file.write_text(BASE.replace('"base"', '"after"'))
    said = site.hang_up("policy switched")
    assert (said["policy"], said["before"], said["source"]) == ("after", "base", "reloaded")
    assert site.in_force() == "after"
    site.file.write_text(BASE.replace('"pause"', '"puase"'))
    wrong = site.hang_up("policy reload failed")
    assert (wrong["level"], wrong["stays"]) == ("error", "after")
    assert wrong["why"].startswith(f"{site.file}:8:")
    site.file.write_text(DEAD_RULE)
    dead = site.hang_up("policy reload failed")
    assert "site.toml:12" in dead["why"]
    assert site.in_force() == "after"
    assert site.server.get("/v1/policy/history")["items"][0]["name"] == "after"
