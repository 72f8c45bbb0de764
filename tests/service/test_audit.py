"""The audit log: for how long entries are kept, and what is not recorded twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from in_process.embedded import Embedded
from interlock.config import AuditConfig
from interlock.core.errors import StoreFull
from interlock.hypervisors.simulated import SimulatedHost
from interlock.ports.audit import AuditEntry, AuditFilter, Outcome
from interlock.service.audit import AuditLog

pytestmark = pytest.mark.virtual_time

HOUR_S = 3_600
EVERYTHING = AuditFilter()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Embedded]:
    house = Embedded(tmp_path / "data", SimulatedHost())
    await house.start()
    yield house
    await house.crash()


@pytest.fixture
def log(house: Embedded) -> AuditLog:
    return house.server.audit


async def entries(house: Embedded, action: str) -> tuple[AuditEntry, ...]:
    return await house.server.store.audit.after(0, 100, AuditFilter(action=action))


async def test_entries_are_kept_for_as_long_as_configured(house: Embedded) -> None:
    log = AuditLog(house.server.store, keep_ms=24 * HOUR_S * 1000)
    await log.record_own("host.fence", "north")
    await asyncio.sleep(23 * HOUR_S)
    await log.record_own("host.fence", "south")
    assert [one.target for one in await entries(house, "host.fence")] == ["north", "south"]
    await asyncio.sleep(2 * HOUR_S)
    await log.record_own("host.fence", "west")
    assert [one.target for one in await entries(house, "host.fence")] == ["south", "west"]


async def test_by_default_entries_are_kept_for_ninety_days() -> None:
    assert AuditConfig().keep_ms == 90 * 24 * HOUR_S * 1000


async def test_failures_of_one_address_are_counted_for_an_hour(house: Embedded, log: AuditLog) -> None:
    for _ in range(100):
        await log.record_failure("192.0.2.1", "/v1/instances", "Access token missing or invalid.")
    await log.record_failure("192.0.2.2", "/v1/instances", "Access token missing or invalid.")
    await asyncio.sleep(HOUR_S)
    await log.record_failure("192.0.2.1", "/v1/instances", "Access token missing or invalid.")
    found = [(one.address, one.details["count"]) for one in await entries(house, "authenticate")]
    assert found == [("192.0.2.1", 1), ("192.0.2.1", 10), ("192.0.2.1", 100), ("192.0.2.2", 1), ("192.0.2.1", 1)]


async def test_many_addresses_are_counted_together_once_there_are_too_many(
    house: Embedded, log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlock.service.audit._REMEMBERED_MAX", 3)
    for number in range(30):
        await log.record_failure(f"2001:db8::{number}", "/v1/instances", "Access token missing or invalid.")
    found = [(one.address, one.details["count"]) for one in await entries(house, "authenticate")]
    assert found[:3] == [(f"2001:db8::{number}", 1) for number in range(3)]
    assert found[3:] == [("", 1), ("", 10)]


async def test_the_same_read_is_recorded_again_after_ten_minutes(house: Embedded, log: AuditLog) -> None:
    caller = house.caller
    for _ in range(3):
        await log.record_read("console.read", Outcome.SUCCEEDED, who=caller, address="", target="one")
    await log.record_read("console.read", Outcome.SUCCEEDED, who=caller, address="", target="two")
    await asyncio.sleep(600)
    await log.record_read("console.read", Outcome.SUCCEEDED, who=caller, address="", target="one")
    assert [one.target for one in await entries(house, "console.read")] == ["one", "two", "one"]


async def test_what_was_done_is_done_although_its_entry_cannot_be_stored(
    house: Embedded, log: AuditLog, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def full(_: AuditEntry) -> None:
        raise StoreFull("No space left on the server's disk.")

    monkeypatch.setattr(house.server.store.audit, "add", full)
    await log.record_own("host.fence", "north")
    said = capsys.readouterr().out
    assert "audit entry not stored" in said
    assert "host.fence" in said
