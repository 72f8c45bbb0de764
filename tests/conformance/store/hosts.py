"""What a store promises of hosts."""

from __future__ import annotations

from msgspec.structs import replace

from conformance.store.harness import START_MS, Bench, check
from interlock.ports.hosts import Host, HostState

HOST = Host(name="north", joined_at_ms=START_MS, last_seen_at_ms=START_MS, lease_until_ms=START_MS + 15_000)


@check
async def hosts_are_kept_as_they_were_last_put(bench: Bench) -> None:
    await bench.store.hosts.put(HOST)
    await bench.store.hosts.put(replace(HOST, name="south", address="10.0.0.2:7421", shared="/srv/shared"))
    fenced = replace(HOST, state=HostState.FENCED, fenced_by="lease")
    await bench.store.hosts.put(fenced)
    async with bench.power_cut() as found:
        kept = await found.hosts.all()
    assert [host.name for host in kept] == ["north", "south"]
    assert kept[0] == fenced
    assert kept[1].shared == "/srv/shared"


@check
async def a_host_that_is_deleted_is_not_known_any_more(bench: Bench) -> None:
    await bench.store.hosts.put(HOST)
    assert await bench.store.hosts.delete("north")
    assert not await bench.store.hosts.delete("north")
    await bench.reopen()
    assert await bench.store.hosts.all() == ()
