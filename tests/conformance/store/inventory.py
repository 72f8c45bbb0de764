"""What a store promises of tokens, images, volumes and the audit log."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from conformance.store.harness import IMAGE, START_MS, Bench, check, raises
from interlock.core.errors import NameTaken
from interlock.core.networks import Network, NetworkKind, SecurityGroup, Subnet, ingress_of
from interlock.core.quotas import Quota
from interlock.core.roles import Role
from interlock.ports import Project, Token, Volume
from interlock.ports.audit import AuditEntry, AuditFilter, Outcome

TOKEN = Token(id="t1", name="ci", role=Role.MEMBER, project="one", secret_sha256="a" * 64, created_at_ms=START_MS)
VOLUME = Volume(id="v1", name="data", project="one", path="/v1", size_bytes=4096, created_at_ms=START_MS)


@check
async def tokens_are_kept_until_they_are_deleted(bench: Bench) -> None:
    other = replace(TOKEN, id="t2", role=Role.ADMIN, groups=("ops", "dba"))
    await bench.store.tokens.put(TOKEN)
    await bench.store.tokens.put(other)
    await bench.reopen()
    assert await bench.store.tokens.all() == (TOKEN, other)
    assert await bench.store.tokens.delete("t1")
    assert not await bench.store.tokens.delete("t1")
    async with bench.power_cut() as found:
        assert await found.tokens.all() == (other,)


@check
async def a_token_that_is_replaced_keeps_its_place(bench: Bench) -> None:
    other = replace(TOKEN, id="t2", role=Role.AGENT)
    await bench.store.tokens.put(TOKEN)
    await bench.store.tokens.put(other)
    bound = replace(TOKEN, role=Role.AGENT, host="north")
    await bench.store.tokens.replace(bound)
    await bench.store.tokens.replace(replace(TOKEN, id="unknown"))
    async with bench.power_cut() as found:
        assert await found.tokens.all() == (bound, other)


@check
async def uses_of_tokens_are_kept_together_and_only_those_of_tokens_that_exist(bench: Bench) -> None:
    other = replace(TOKEN, id="t2", expires_at_ms=START_MS + 9, former_sha256="b" * 64, former_until_ms=START_MS + 5)
    await bench.store.tokens.put(TOKEN)
    await bench.store.tokens.put(other)
    await bench.store.tokens.note_uses({"t2": START_MS + 1, "unknown": START_MS + 2})
    await bench.store.tokens.note_uses({})
    async with bench.power_cut() as found:
        assert await found.tokens.all() == (TOKEN, replace(other, last_used_at_ms=START_MS + 1))


@check
async def images_have_names_of_their_own(bench: Bench) -> None:
    await bench.store.images.put(IMAGE)
    async with raises(NameTaken):
        await bench.store.images.put(replace(IMAGE, id="another"))
    other = replace(IMAGE, id="another", name="another", cmdline="quiet")
    await bench.store.images.put(other)
    async with bench.power_cut() as found:
        assert await found.images.all() == (IMAGE, other)
    assert await bench.store.images.delete("image")
    assert not await bench.store.images.delete("image")
    await bench.store.images.put(replace(IMAGE, id="third"))
    assert [image.id for image in await bench.store.images.all()] == ["another", "third"]


@check
async def images_are_counted_by_project(bench: Bench) -> None:
    for number, project in enumerate((None, "one", "one", "one-more", "one0")):
        await bench.store.images.put(replace(IMAGE, id=f"i{number}", name=f"n{number}", project=project))
    found = {project: bench.store.images.count(project) for project in ("one", "one-more", "one0", "none")}
    assert found == {"one": 2, "one-more": 1, "one0": 1, "none": 0}
    await bench.store.images.delete("i1")
    assert bench.store.images.count("one") == 1


@check
async def projects_are_kept_until_they_are_deleted(bench: Bench) -> None:
    one = Project(name="one", created_at_ms=START_MS, created_by="ann", quota=Quota(vcpus=3))
    two = Project(name="a-second")
    await bench.store.projects.put(one)
    await bench.store.projects.put(two)
    async with raises(NameTaken):
        await bench.store.projects.put(replace(one, quota=Quota()))
    await bench.store.projects.replace(replace(two, quota=Quota(instances=0)))
    await bench.store.projects.replace(Project(name="unknown"))
    async with bench.power_cut() as found:
        known = {project.name: project for project in await found.projects.all()}
    assert sorted(known) == list(known), "in the order of their names"
    assert (known["one"], known["a-second"].quota) == (one, Quota(instances=0))
    assert "unknown" not in known
    assert await bench.store.projects.delete("one")
    assert not await bench.store.projects.delete("one")


@check
async def images_of_a_project_have_names_of_their_own_in_it(bench: Bench) -> None:
    await bench.store.images.put(IMAGE)
    of_one = replace(IMAGE, id="one", project="one", source_instance="vm", backup_type="daily")
    await bench.store.images.put(of_one)
    await bench.store.images.put(replace(IMAGE, id="two", project="two"))
    async with raises(NameTaken):
        await bench.store.images.put(replace(IMAGE, id="another", project="one"))
    await bench.reopen()
    assert [image.id for image in await bench.store.images.all()] == [IMAGE.id, "one", "two"]
    assert of_one in await bench.store.images.all()


@check
async def networks_have_names_of_their_own_in_their_project(bench: Bench) -> None:
    shared = Network(id="n1", name="lab", kind=NetworkKind.BRIDGE, bridge="br0", created_at_ms=START_MS)
    subnet = Subnet(prefix="10.7.0.0/24", gateway="10.7.0.1")
    of_one = Network(id="n2", name="lab", kind=NetworkKind.MANAGED, project="one", subnets=(subnet,))
    await bench.store.networks.put(shared)
    await bench.store.networks.put(of_one)
    for taken in (shared, of_one):
        async with raises(NameTaken):
            await bench.store.networks.put(replace(taken, id="n3"))
    changed = replace(shared, mtu=9000)
    await bench.store.networks.replace(changed)
    async with bench.power_cut() as found:
        assert await found.networks.all() == (changed, of_one)
    assert await bench.store.networks.delete("n2")
    assert not await bench.store.networks.delete("n2")
    assert await bench.store.networks.all() == (changed,)


@check
async def security_groups_have_names_of_their_own_in_their_project(bench: Bench) -> None:
    groups = bench.store.security_groups
    web = SecurityGroup(id="g1", name="web", project="one", ingress=ingress_of("tcp 80"), created_at_ms=START_MS)
    of_two = replace(web, id="g2", project="two")
    await groups.put(web)
    await groups.put(of_two)
    async with raises(NameTaken):
        await groups.put(replace(web, id="g3"))
    changed = replace(web, ingress=ingress_of("tcp 443 from 10.0.0.0/8"))
    await groups.replace(changed)
    async with bench.power_cut() as found:
        assert await found.security_groups.all() == (changed, of_two)
    assert await groups.delete("g2")
    assert not await groups.delete("g2")
    assert await groups.all() == (changed,)


@check
async def volumes_have_names_of_their_own_in_their_project(bench: Bench) -> None:
    await bench.store.volumes.put(VOLUME)
    async with raises(NameTaken):
        await bench.store.volumes.put(replace(VOLUME, id="v2"))
    other = replace(VOLUME, id="v3", project="two")
    await bench.store.volumes.put(other)
    await bench.reopen()
    assert await bench.store.volumes.all() == (VOLUME, other)
    assert await bench.store.volumes.all("two") == (other,)
    assert await bench.store.volumes.get("v1") == VOLUME
    assert await bench.store.volumes.get("v9") is None


@check
async def a_volume_is_claimed_by_one_instance_at_a_time(bench: Bench) -> None:
    await bench.store.volumes.put(VOLUME)
    claims = await asyncio.gather(*(bench.store.volumes.claim("v1", f"i{number}") for number in range(20)))
    assert claims.count(True) == 1
    holder = f"i{claims.index(True)}"
    assert await bench.store.volumes.get("v1") == replace(VOLUME, attached_to=holder)
    assert await bench.store.volumes.claim("v1", holder), "to claim again what one has is no conflict"
    assert not await bench.store.volumes.claim("none such", "i1")
    await bench.store.volumes.release("v1", "somebody else")
    async with bench.power_cut() as found:
        assert await found.volumes.get("v1") == replace(VOLUME, attached_to=holder)
    await bench.store.volumes.release("v1", holder)
    assert await bench.store.volumes.claim("v1", "next")


@check
async def a_claimed_volume_is_not_forgotten(bench: Bench) -> None:
    await bench.store.volumes.put(VOLUME)
    await bench.store.volumes.claim("v1", "a")
    assert not await bench.store.volumes.delete("v1")
    await bench.store.volumes.release("v1", "a")
    assert await bench.store.volumes.delete("v1")
    assert not await bench.store.volumes.delete("v1")
    assert await bench.store.volumes.all() == ()


ENTRY = AuditEntry(
    at_ms=START_MS,
    action="token.create",
    outcome=Outcome.SUCCEEDED,
    who="ada",
    role="admin",
    address="192.0.2.1",
    details={"role": "member"},
)
_ALL = AuditFilter()


@check
async def the_audit_log_is_read_from_both_ends(bench: Bench) -> None:
    denied = replace(ENTRY, at_ms=START_MS + 1, action="policy.switch", outcome=Outcome.REFUSED, who="bob", details={})
    for entry in (ENTRY, denied, replace(ENTRY, at_ms=START_MS + 2, action="token.delete")):
        await bench.store.audit.add(entry)
    async with bench.power_cut() as found:
        newest = await found.audit.before(None, 2, _ALL)
        assert [entry.action for entry in newest] == ["token.delete", "policy.switch"]
        (oldest,) = await found.audit.before(newest[-1].sequence, 10, _ALL)
        assert oldest == replace(ENTRY, sequence=oldest.sequence)
        assert await found.audit.after(oldest.sequence, 10, _ALL) == newest[::-1]
        assert await found.audit.after(newest[0].sequence, 10, _ALL) == ()


@check
async def the_audit_log_is_filtered(bench: Bench) -> None:
    for action, who, outcome in (
        ("token.create", "ada", Outcome.SUCCEEDED),
        ("token.create", "bob", Outcome.REFUSED),
        ("token", "ada", Outcome.SUCCEEDED),
        ("tokens.other", "ada", Outcome.FAILED),
    ):
        await bench.store.audit.add(replace(ENTRY, action=action, who=who, outcome=outcome))

    async def actions(**where: object) -> list[str]:
        return [entry.action for entry in await bench.store.audit.after(0, 10, AuditFilter(**where))]  # type: ignore[arg-type]

    assert await actions(action="token") == ["token.create", "token.create", "token"]
    assert await actions(action="token.create", who="bob") == ["token.create"]
    assert await actions(outcome=Outcome.FAILED) == ["tokens.other"]


@check
async def entries_of_the_audit_log_are_forgotten_and_their_sequence_is_not_used_again(bench: Bench) -> None:
    await bench.store.audit.add(ENTRY)
    (before,) = await bench.store.audit.after(0, 10, _ALL)
    assert await bench.store.audit.forget(START_MS) == 0
    assert await bench.store.audit.forget(START_MS + 1) == 1
    await bench.reopen()
    await bench.store.audit.add(ENTRY)
    (after,) = await bench.store.audit.after(0, 10, _ALL)
    assert after.sequence > before.sequence
