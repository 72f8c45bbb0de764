"""Policies as sites write them: what is sound for some role is accepted, and what is not is refused with the reason."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from api.conftest import ApiServer
from tiers import tier

HEAD = '[policy]\nname = "site"\nextends = "standard"\n'
MEMBERS_SOFT_DELETE = f"""{HEAD}
[[rule]]
id = "members-soft-delete"
operations = ["delete", "force_delete"]
roles = ["*", "!admin"]
vm_state = ["*", "!soft_deleted"]
verdict = "deny"
reason = "soft_delete_first"
because = "Members soft delete; staff delete."
"""
SOFT_DELETE_FIRST = f"""{HEAD}
[[rule]]
id = "soft-delete-preempts"
operations = ["soft_delete"]
vm_state = ["*", "!soft_deleted"]
task_state = ["*", "!@soft_delete", "!@delete", "!@force_delete", "!@backup"]
outstanding = ["*", "!soft_delete", "!delete", "!force_delete"]
verdict = "preempt"
because = "Soft delete goes first."
[[rule]]
id = "only-soft-deleted"
operations = ["delete", "force_delete"]
vm_state = ["*", "!soft_deleted"]
verdict = "deny"
reason = "soft_delete_first"
because = "Soft delete it first; after seven days it can be deleted."
"""
LEGAL_HOLD = f"""{HEAD}
[[rule]]
id = "tagged"
operations = "*"
tags = ["legal-hold"]
verdict = "deny"
reason = "hold"
because = "Legal hold."
"""
ONE_HELD = f"""{HEAD}
[[rule]]
id = "one-held"
operations = "*"
held = ["*"]
verdict = "deny"
reason = "held"
because = "Something is held."
"""
SNAPSHOTS_BY_STAFF = f"""{HEAD}
[[rule]]
id = "snapshots-by-staff"
operations = ["snapshot"]
roles = ["*", "!admin"]
verdict = "deny"
reason = "staff_only"
because = "Staff take snapshots."
[[rule]]
id = "no-reset"
operations = ["reset_state"]
verdict = "deny"
reason = "no_reset"
because = "States are not edited by hand here."
[[rule]]
id = "delete-waits-for-snapshot"
operations = ["delete", "force_delete"]
task_state = ["@snapshot"]
outstanding = ["*", "!delete", "!force_delete"]
verdict = "admit"
because = "A snapshot by staff is finished first."
"""


async def load(client: httpx.AsyncClient, text: str, explore_seconds: float) -> httpx.Response:
    body = {"main": "site.toml", "files": {"site.toml": text}, "explore_seconds": explore_seconds}
    return await client.put("/v1/policy", json=body, timeout=300)


@pytest.mark.parametrize("text", [MEMBERS_SOFT_DELETE, SOFT_DELETE_FIRST], ids=["by staff", "after a soft delete"])
async def test_a_policy_under_which_some_role_can_always_delete_passes_its_check(
    admin: httpx.AsyncClient, text: str
) -> None:
    answer = await load(admin, text, 0)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("text", "circumstance"), [(LEGAL_HOLD, "tagged legal-hold"), (ONE_HELD, "is held")])
async def test_a_policy_under_which_nobody_can_delete_in_some_circumstance_is_refused_with_it(
    api: ApiServer, admin: httpx.AsyncClient, text: str, circumstance: str
) -> None:
    answer = await load(admin, text, 0)
    assert answer.status_code == 422
    errors: list[dict[str, Any]] = [one for one in answer.json()["findings"] if one["severity"] == "error"]
    assert any("any role" in one["message"] and circumstance in one["message"] for one in errors)
    assert api.server.policy.policy.name == "patient"


async def test_what_members_alone_cannot_do_is_said_and_refuses_nothing(admin: httpx.AsyncClient) -> None:
    answer = await load(admin, MEMBERS_SOFT_DELETE, tier(2.0, 60.0))
    assert answer.status_code == 200, answer.text
    assert "Callers of every role submit." in answer.json()["exploration"]["assumptions"]
    shown = (await admin.get("/v1/policy")).json()["exploration"]
    assert shown == answer.json()["exploration"]


@pytest.mark.long
async def test_a_policy_under_which_two_roles_together_make_a_dead_end_is_refused_with_the_story(
    admin: httpx.AsyncClient,
) -> None:
    """Members may not take snapshots, and their deletion waits for one that hangs."""
    answer = await load(admin, SNAPSHOTS_BY_STAFF, 60)
    assert answer.status_code == 422
    assert "it violates law 5 (never stuck)" in answer.json()["detail"]
    stories = ["".join(one["story"]) for one in answer.json()["violations"]]
    assert any('"submit":"snapshot"' in story and '"role":"admin"' in story for story in stories)
