"""A policy is activated only if every VM with outstanding requests can still be deleted under it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from in_process.embedded import admitted, refused
from in_process.three_hosts import Street
from interlock.core.operations import Operation
from interlock.core.policy_switches import Outstanding, PolicyBundle, PolicySwitch
from interlock.policies.verification import Proof
from interlock.service.outstanding_check import OutstandingCheck
from interlock.service.policies import Loaded
from interlock.service.policy_requests import NewPolicy, OldPolicy
from interlock.stores.policy_table import PolicyTable

O = Operation  # noqa: E741
NOBODY_MIGRATES = """
[policy]
name = "nobody-migrates"
extends = "standard"

[[rule]]
id = "nobody-migrates"
operations = ["migrate"]
verdict = "deny"
reason = "no_migrations"
because = "Nobody migrates here."

[[rule]]
id = "no-reset"
operations = ["reset_state"]
verdict = "deny"
reason = "no_reset"
because = "States are not edited by hand here."

[[rule]]
id = "delete-waits-for-migration"
operations = ["delete", "force_delete"]
task_state = ["@migrate"]
outstanding = ["*", "!delete", "!force_delete"]
verdict = "admit"
because = "A migration is finished first."
"""
"""Sound for every VM that begins under it, since nothing is migrated then."""


async def load(street: Street, text: str = NOBODY_MIGRATES, **terms: Any) -> Loaded:
    new = NewPolicy(main="site.toml", files={"site.toml": text}, **terms)
    return await street.house.server.policies.load(street.house.caller, new)


async def migrating(street: Street, name: str = "web") -> str:
    """A VM whose migration is in flight and hangs: its id."""
    vm = await street.create(name)
    street.house.host.freeze(vm)
    await street.house.submit(vm, O.MIGRATE, host="north")
    await street.house.until_event(vm, "request.taken")
    return vm


async def nothing_changed(street: Street) -> bool:
    """Whether `standard` decides, is reported, and is the only policy in the history."""
    server = street.house.server
    names = [one.name for one in await server.policies.history(10)]
    return (server.policy.policy.name, server.policies.now.name, names) == ("standard", "standard", ["standard"])


async def test_a_policy_under_which_a_migration_in_flight_could_never_be_ended_is_refused(street: Street) -> None:
    vm = await migrating(street)
    loaded = await load(street)
    (blocked,) = loaded.proof.blocked
    assert not loaded.proof.holds
    assert (blocked.name, blocked.instance_id, blocked.operation) == ("web", vm, O.MIGRATE)
    assert blocked.message.startswith(
        "VM 'web' of project 'default', with migrate in flight, could no longer be deleted:"
    )
    assert "delete is admitted (rule 'delete-waits-for-migration')" in blocked.message
    assert (
        loaded.proof.remedy
        == "Wait until the requests of VM 'web' have ended, or cancel them, and load the policy again."
    )
    assert await nothing_changed(street)


async def test_it_is_accepted_once_the_migration_has_ended(street: Street) -> None:
    vm = await migrating(street)
    assert not (await load(street)).proof.holds
    street.house.host.thaw(vm)
    await street.house.until(vm, outstanding=())
    assert (await load(street)).proof.holds
    assert refused(await street.house.submit(vm, O.MIGRATE, host="south")) == "no_migrations"


async def test_a_dry_run_reports_the_vms_that_block_it(street: Street) -> None:
    await migrating(street)
    assert [one.name for one in (await load(street, dry_run=True)).proof.blocked] == ["web"]
    assert await nothing_changed(street)


async def test_vms_in_the_same_situation_are_counted_and_named_once(street: Street) -> None:
    for name in ("a", "b", "c"):
        await migrating(street, name)
    (blocked,) = (await load(street)).proof.blocked
    assert (blocked.name, blocked.alike) == ("a", 2)
    assert blocked.message.endswith("The same holds for 2 more.")


async def queued_migration(street: Street) -> str:
    """A VM with a migration behind a reboot that hangs: its id."""
    vm = await street.create("web")
    street.house.host.freeze(vm)
    await street.house.submit(vm, O.REBOOT)
    await street.house.until_event(vm, "request.taken")
    admitted(await street.house.submit(vm, O.MIGRATE, host="north"))
    return vm


async def test_a_queued_migration_is_kept_or_judged_again_as_the_operator_says(street: Street) -> None:
    await queued_migration(street)
    kept = await load(street)
    assert [one.rejudge_helps for one in kept.proof.blocked] == [True]
    assert kept.proof.remedy is not None
    assert kept.proof.remedy.startswith("Load it with `--outstanding rejudge`")
    assert await nothing_changed(street)
    again = await load(street, outstanding=Outstanding.REJUDGE)
    assert again.proof.holds
    assert (again.after.name, again.after.cancelled) == ("nobody-migrates", 1)


async def test_a_request_admitted_between_the_check_and_the_switch_is_seen(
    street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await street.create("web")
    street.house.host.freeze(vm)
    check, runs = OutstandingCheck.run, 0

    async def run_and_migrate(self: OutstandingCheck, proof: Proof, *limits: int) -> Proof:
        nonlocal runs
        found = await check(self, proof, *limits)
        runs += 1
        if runs == 1:
            admitted(await street.house.submit(vm, O.MIGRATE, host="north"))
        return found

    monkeypatch.setattr(OutstandingCheck, "run", run_and_migrate)
    loaded = await load(street)
    assert runs == 2
    assert [one.name for one in loaded.proof.blocked] == ["web"]
    assert await nothing_changed(street)


async def test_a_request_submitted_during_the_switch_is_judged_by_the_new_policy(
    street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await street.create("web")
    switch = PolicyTable.switch
    submitted: list[asyncio.Task[Any]] = []

    async def submit_and_switch(self: PolicyTable, record: PolicySwitch, bundle: PolicyBundle) -> int:
        submitted.append(asyncio.create_task(street.house.submit(vm, O.MIGRATE, host="north")))
        number = await switch(self, record, bundle)
        assert not submitted[0].done()
        return number

    monkeypatch.setattr(PolicyTable, "switch", submit_and_switch)
    assert (await load(street)).proof.holds
    assert refused(await submitted[0]) == "no_migrations"


async def test_a_rollback_is_checked_too(street: Street) -> None:
    assert (await load(street)).proof.holds
    server, caller = street.house.server, street.house.caller
    assert (await server.policies.roll_back(caller, OldPolicy())).proof.holds
    await migrating(street)
    back = await server.policies.roll_back(caller, OldPolicy())
    assert [one.name for one in back.proof.blocked] == ["web"]
    assert server.policy.policy.name == "standard"


async def test_a_configured_policy_is_checked_at_the_start_and_on_reload(street: Street, tmp_path: Path) -> None:
    await migrating(street)
    file = tmp_path / "site.toml"
    file.write_text(NOBODY_MIGRATES)
    street.house._config = msgspec.structs.replace(street.house._config, policy=str(file))
    await street.restart()
    policies = street.house.server.policies
    assert await nothing_changed(street)
    assert policies.refused is not None
    assert "VM 'web'" in policies.refused.why
    await policies.reload()
    assert await nothing_changed(street)
    assert "VM 'web'" in policies.refused.why


async def test_what_was_stuck_before_does_not_block_a_switch(street: Street) -> None:
    """The VM cannot be deleted under the policy in force either: loading a better one must stay possible."""
    await migrating(street)
    policies = street.house.server.policies
    with pytest.MonkeyPatch.context() as unchecked:

        async def run(_self: OutstandingCheck, proof: Proof, *_limits: int) -> Proof:
            return proof

        unchecked.setattr(OutstandingCheck, "run", run)
        await load(street)
    assert policies.now.name == "nobody-migrates"
    assert (await load(street, NOBODY_MIGRATES.replace("nobody-migrates", "again"))).proof.holds
