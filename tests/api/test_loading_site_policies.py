"""Policies as sites write them: what is sound for some role is accepted, and what is not is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from api.conftest import ApiServer, make
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
SOFT_DELETE_FIRST = (Path(__file__).parents[2] / "docs" / "examples" / "soft-delete-first.toml").read_text()
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


A_MINUTE_OF_SILENCE = f"""{HEAD}
[[rule]]
id = "delete-gives-a-minute"
operations = ["delete", "force_delete"]
task_state = ["*", "!none", "!@delete", "!@force_delete"]
verdict = "after"
threshold = "1m"
reason = "in_progress"
because = "A minute of silence is waited for."
"""
NO_GPU_RESIZE = f"""{HEAD}
[[rule]]
id = "no-gpu-resize"
operations = ["resize"]
tags = ["gpu"]
verdict = "deny"
reason = "gpu_fixed_size"
because = "A GPU instance keeps its flavour; create another."
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


# ------------------------------------------------------------------------------------------ what happens under them


async def hanging(api: ApiServer, client: httpx.AsyncClient, operation: str, **parameters: object) -> str:
    """A VM `vm` whose guest hangs in an operation; the id of its request."""
    instance = await make(client, "vm")
    api.host.freeze(str(instance["id"]))
    answer = await submit(client, operation, **parameters)
    assert answer.status_code == 202, answer.text
    request: str = answer.json()["request"]["id"]
    while (await client.get(f"/v1/requests/{request}")).json()["status"] == "queued":
        await client.get("/v1/instances/vm", params={"after_generation": 10**6, "wait": "10ms"})
    return request


async def submit(client: httpx.AsyncClient, operation: str, **parameters: object) -> httpx.Response:
    body = {"operation": operation, "parameters": parameters}
    return await client.post("/v1/instances/vm/requests", json=body)


async def test_a_refusal_that_counts_on_silence_says_so_and_the_check_lists_it(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    """A worker that makes progress for ever keeps the deletion waiting: no time is named that may pass."""
    loaded = await load(admin, A_MINUTE_OF_SILENCE, 0)
    assert loaded.status_code == 200, loaded.text
    (note,) = [one for one in loaded.json()["findings"] if one["code"] == "delete-needs-silence"]
    assert (note["rule"], note["severity"]) == ("delete-gives-a-minute", "note")
    await hanging(api, admin, "suspend")
    said = (await submit(admin, "delete")).json()
    assert (said["rule"], said["allowed_if_silent"], said["allowed_latest_at"]) == ("delete-gives-a-minute", True, None)
    assert "if it makes no progress until then" in said["detail"]
    reset = await submit(admin, "reset_state", vm_state="error", reason="its worker never ends")
    assert reset.status_code in {200, 202}, reset.text
    assert (await submit(admin, "delete")).status_code == 202


async def test_what_waits_is_cancelled_at_once_when_a_tag_forbids_it(api: ApiServer, admin: httpx.AsyncClient) -> None:
    """Not only when what is before it has succeeded, and it is not served against the rule."""
    assert (await load(admin, NO_GPU_RESIZE, 0)).status_code == 200
    rebooting = await hanging(api, admin, "reboot", hard=True)
    resizing = (await submit(admin, "resize", memory_mib=512)).json()["request"]["id"]
    assert (await admin.patch("/v1/instances/vm", json={"tags": ["gpu"]})).status_code == 200
    ended = (await admin.get(f"/v1/requests/{resizing}")).json()
    assert (ended["status"], ended["reason"]) == ("cancelled", "gpu_fixed_size")
    assert "The VM has the tags gpu" in ended["message"]
    assert (await admin.get(f"/v1/requests/{rebooting}")).json()["status"] in {"in_flight", "unknown"}
    assert (await submit(admin, "resize", memory_mib=512)).json()["rule"] == "no-gpu-resize"
