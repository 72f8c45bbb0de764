"""`interlock project`: limits in people's units, and what is used beside what may be used."""

from __future__ import annotations

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import AT, problem
from interlock.api.schemas.projects import Project, ProjectList, Quota, Use
from interlock.core.quotas import RESOURCES

RESEARCH = Project(
    name="research",
    created_at=AT,
    created_by="root",
    quota=Quota(vcpus=8, memory_mib=1024),
    used=Use(**{**dict.fromkeys(RESOURCES, 0), "instances": 2, "vcpus": 3, "memory_mib": 2048}),
)


def test_limits_are_given_in_units_and_taken_away_by_a_word(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("PATCH", "/v1/projects/research/quota", Given(value=RESEARCH))
    ran = interlock("project", "quota", "research", "--memory", "64GiB", "--disk", "2", "--vcpus", "none")
    assert ran.code == 0
    assert server.asked[-1].json == {"memory_mib": 65536, "disk_mib": 2048, "vcpus": None}
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["vCPUs", "3", "8", "5"] in lines
    assert ["Memory", "(MiB)", "2048", "1024", "0"] in lines
    assert ["VMs", "2", "none", "unlimited"] in lines
    assert interlock("project", "quota", "research", "--vcpus", "few").code == 2


def test_a_quota_without_limits_named_is_shown(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/projects/research", Given(value=RESEARCH))
    for command in ("show", "quota"):
        ran = interlock("project", command, "research")
        assert ran.code == 0
        assert ran.out.startswith("research, created 19 s ago by root")


def test_the_list_has_use_beside_limits(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/projects", Given(value=ProjectList(items=(RESEARCH,))))
    line = interlock("project", "list").out.splitlines()[1].split()
    assert line[:4] == ["research", "2", "3/8", "2048/1024"]


def test_a_project_is_made_with_limits_and_deleted_after_a_question(
    interlock: Interlock, server: ScriptedServer
) -> None:
    server.on("POST", "/v1/projects", Given(201, RESEARCH))
    assert interlock("project", "create", "research", "--instances", "5").out == "Created: project research\n"
    assert server.asked[-1].json == {"name": "research", "quota": {"instances": 5}, "with_history": False}
    server.on("DELETE", "/v1/projects/research", Given(409, problem(409, "The project research is not empty.")))
    ran = interlock("project", "delete", "research", "--yes")
    assert ran.code != 0
    assert "not empty" in ran.err
