"""Access tokens: expiry, rotation, time of last use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from in_process.embedded import Embedded
from interlock.config import TokensConfig
from interlock.core.errors import Invalid
from interlock.core.roles import Role
from interlock.hypervisors.simulated import SimulatedHost
from interlock.ports import Token
from interlock.server import DATABASE
from interlock.service.auth import Authenticator

pytestmark = pytest.mark.virtual_time

HOUR_MS = 3_600_000


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Embedded]:
    house = Embedded(tmp_path / "data", SimulatedHost())
    await house.start()
    yield house
    await house.crash()


@pytest.fixture
def callers(house: Embedded) -> Authenticator:
    return house.server.callers


async def make(house: Embedded, name: str = "ci", expires_in_ms: int | None = None) -> tuple[Token, str]:
    return await house.server.tokens.make(house.caller, name, Role.MEMBER, "default", expires_in_ms=expires_in_ms)


async def test_a_token_is_valid_until_it_expires_and_not_longer(house: Embedded, callers: Authenticator) -> None:
    _, secret = await make(house, expires_in_ms=HOUR_MS)
    await asyncio.sleep(3_599)
    assert callers.authenticate(secret) is not None
    await asyncio.sleep(1)
    assert callers.authenticate(secret) is None
    why, remedy = callers.refusal(secret) or ("", "")
    assert why == "The access token ci has expired."
    assert "token rotate ci" in remedy


async def test_a_connection_is_closed_when_its_token_expires(house: Embedded, callers: Authenticator) -> None:
    _, secret = await make(house, expires_in_ms=HOUR_MS)
    _, lasting = await make(house, "lasting")
    caller, other = callers.authenticate(secret), callers.authenticate(lasting)
    assert caller is not None
    assert other is not None
    with callers.using(caller) as use, callers.using(other) as unlimited:
        reads = asyncio.create_task(asyncio.Event().wait())
        use.waiting.add(reads)
        begin_ms = house.server.store.now_ms()
        await asyncio.wait({reads})
        assert house.server.store.now_ms() - begin_ms == pytest.approx(HOUR_MS, abs=1_000)
        assert (use.revoked, unlimited.revoked) == (True, False)


async def test_a_rotated_token_has_a_new_secret_and_the_former_one_for_as_long_as_asked(
    house: Embedded, callers: Authenticator
) -> None:
    token, former = await make(house)
    rotated, secret = await house.server.tokens.rotate(house.caller, "ci", overlap_ms=HOUR_MS)
    assert (rotated.id, rotated.name, rotated.role) == (token.id, "ci", Role.MEMBER)
    old, new = callers.authenticate(former), callers.authenticate(secret)
    assert old is not None
    assert new is not None
    with callers.using(old) as before, callers.using(new) as after:
        await asyncio.sleep(3_601)
        assert (before.revoked, after.revoked) == (True, False)
    assert callers.authenticate(former) is None
    assert "was rotated" in (callers.refusal(former) or ("",))[0]
    assert callers.authenticate(secret) is not None


async def test_a_rotation_without_an_overlap_ends_the_former_secret_at_once(
    house: Embedded, callers: Authenticator
) -> None:
    _, former = await make(house)
    caller = callers.authenticate(former)
    assert caller is not None
    with callers.using(caller) as use:
        await house.server.tokens.rotate(house.caller, "ci")
        assert use.revoked
    assert callers.authenticate(former) is None


async def test_a_second_rotation_ends_the_secret_before_the_first(house: Embedded, callers: Authenticator) -> None:
    _, first = await make(house)
    _, second = await house.server.tokens.rotate(house.caller, "ci", overlap_ms=HOUR_MS)
    await house.server.tokens.rotate(house.caller, "ci", overlap_ms=HOUR_MS)
    assert callers.authenticate(first) is None
    assert callers.authenticate(second) is not None


async def test_a_new_secret_is_valid_for_as_long_as_the_former_one_was(house: Embedded) -> None:
    await make(house, expires_in_ms=HOUR_MS)
    await asyncio.sleep(1_800)
    rotated, _ = await house.server.tokens.rotate(house.caller, "ci", overlap_ms=2 * HOUR_MS)
    now_ms = house.server.store.now_ms()
    assert rotated.expires_at_ms == pytest.approx(now_ms + HOUR_MS, abs=1_000)
    assert rotated.former_until_ms == pytest.approx(now_ms + HOUR_MS / 2, abs=1_000), "it would have expired then"


async def test_a_token_cannot_rotate_itself_without_an_overlap(house: Embedded, callers: Authenticator) -> None:
    _, secret = await house.server.tokens.make(house.caller, "boss", Role.ADMIN, "default")
    caller = callers.authenticate(secret)
    assert caller is not None
    with pytest.raises(Invalid, match="overlap: required"):
        await house.server.tokens.rotate(caller, "boss")
    await house.server.tokens.rotate(caller, "boss", overlap_ms=60_000)


async def test_no_token_is_valid_for_longer_than_the_server_allows(tmp_path: Path) -> None:
    house = Embedded(tmp_path / "data", SimulatedHost(), settings={"tokens": TokensConfig(lifetime_max_ms=HOUR_MS)})
    await house.start()
    with pytest.raises(Invalid, match=r"expires_in: 2h is longer than this server allows \(1h\)"):
        await make(house, expires_in_ms=2 * HOUR_MS)
    token, _ = await make(house)
    assert token.expires_at_ms == token.created_at_ms + HOUR_MS
    admin = next(one for one in await house.server.tokens.list(house.caller) if one.name == "admin")
    assert admin.expires_at_ms is None, "nobody could create another"
    await house.crash()


async def test_expiry_and_rotation_survive_a_restart(house: Embedded) -> None:
    _, former = await make(house, expires_in_ms=HOUR_MS)
    _, secret = await house.server.tokens.rotate(house.caller, "ci", overlap_ms=60_000)
    await house.crash()
    await house.start()
    callers = house.server.callers
    assert callers.authenticate(former) is not None
    await asyncio.sleep(61)
    assert callers.authenticate(former) is None
    assert callers.authenticate(secret) is not None
    await asyncio.sleep(3_600)
    assert callers.authenticate(secret) is None


async def test_the_time_of_last_use_is_written_once_a_minute_however_many_requests_there_are(
    house: Embedded, callers: Authenticator
) -> None:
    secrets = [(await make(house, name))[1] for name in ("a", "b")]
    written: list[dict[str, int]] = []
    note = house.server.store.tokens.note_uses

    async def noting(uses: dict[str, int]) -> None:
        written.append(uses)
        await note(uses)

    house.server.store.tokens.note_uses = noting  # type: ignore[method-assign, assignment]
    for _ in range(123):
        for secret in secrets:
            assert callers.authenticate(secret) is not None
        await asyncio.sleep(1)
    assert [len(uses) for uses in written] == [2, 2, 2]
    tokens = {one.name: one for one in await house.server.tokens.list(house.caller)}
    assert tokens["a"].last_used_at_ms == pytest.approx(house.server.store.now_ms(), abs=1_000)
    await house.crash()
    with apsw.Connection(str(house.server.folder / DATABASE)) as database:
        stored = dict(database.execute("SELECT body ->> 'name', body ->> 'last_used_at_ms' FROM tokens"))
    database.close()
    assert stored["a"] == tokens["a"].last_used_at_ms, "the last uses are written when the server stops"
    assert stored["admin"] is None
    await house.start()
