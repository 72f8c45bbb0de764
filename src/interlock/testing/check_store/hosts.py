"""What a store promises of hosts."""

from __future__ import annotations

from msgspec.structs import replace

from interlock.ports.hosts import Host, HostState
from interlock.testing.check_store.bench import START_MS, Bench, check

HOST = Host(name="north", joined_at_ms=START_MS, last_seen_at_ms=START_MS, lease_until_ms=START_MS + 15_000)


@check
async def hosts_are_kept_as_they_were_last_put(bench: Bench) -> None:
    await bench.store.put_host(HOST)
    await bench.store.put_host(replace(HOST, name="south", address="10.0.0.2:7421", shared="/srv/shared"))
    fenced = replace(HOST, state=HostState.FENCED, fenced_by="lease")
    await bench.store.put_host(fenced)
    async with bench.power_cut() as found:
        kept = await found.hosts()
    assert [host.name for host in kept] == ["north", "south"]
    assert kept[0] == fenced
    assert kept[1].shared == "/srv/shared"


@check
async def a_host_that_is_deleted_is_not_known_any_more(bench: Bench) -> None:
    await bench.store.put_host(HOST)
    assert await bench.store.delete_host("north")
    assert not await bench.store.delete_host("north")
    await bench.reopen()
    assert await bench.store.hosts() == ()
