"""What a store promises of tokens, images and volumes."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from interlock.core.errors import NameTaken
from interlock.ports import Role, Token, Volume
from interlock.testing.check_store.bench import IMAGE, START_MS, Bench, check, raises

TOKEN = Token(id="t1", name="ci", role=Role.MEMBER, project="one", secret_sha256="a" * 64, created_at_ms=START_MS)
VOLUME = Volume(id="v1", name="data", project="one", path="/v1", size_bytes=4096, created_at_ms=START_MS)


@check
async def tokens_are_kept_until_they_are_deleted(bench: Bench) -> None:
    other = replace(TOKEN, id="t2", role=Role.ADMIN)
    await bench.store.put_token(TOKEN)
    await bench.store.put_token(other)
    await bench.reopen()
    assert await bench.store.tokens() == (TOKEN, other)
    assert await bench.store.delete_token("t1")
    assert not await bench.store.delete_token("t1")
    async with bench.power_cut() as found:
        assert await found.tokens() == (other,)


@check
async def images_have_names_of_their_own(bench: Bench) -> None:
    await bench.store.put_image(IMAGE)
    async with raises(NameTaken):
        await bench.store.put_image(replace(IMAGE, id="another"))
    other = replace(IMAGE, id="another", name="another", cmdline="quiet")
    await bench.store.put_image(other)
    async with bench.power_cut() as found:
        assert await found.images() == (IMAGE, other)
    assert await bench.store.delete_image("image")
    assert not await bench.store.delete_image("image")
    await bench.store.put_image(replace(IMAGE, id="third"))
    assert [image.id for image in await bench.store.images()] == ["another", "third"]


@check
async def images_of_a_project_have_names_of_their_own_in_it(bench: Bench) -> None:
    await bench.store.put_image(IMAGE)
    of_one = replace(IMAGE, id="one", project="one", source_instance="vm", backup_type="daily")
    await bench.store.put_image(of_one)
    await bench.store.put_image(replace(IMAGE, id="two", project="two"))
    async with raises(NameTaken):
        await bench.store.put_image(replace(IMAGE, id="another", project="one"))
    await bench.reopen()
    assert [image.id for image in await bench.store.images()] == [IMAGE.id, "one", "two"]
    assert of_one in await bench.store.images()


@check
async def volumes_have_names_of_their_own_in_their_project(bench: Bench) -> None:
    await bench.store.put_volume(VOLUME)
    async with raises(NameTaken):
        await bench.store.put_volume(replace(VOLUME, id="v2"))
    other = replace(VOLUME, id="v3", project="two")
    await bench.store.put_volume(other)
    await bench.reopen()
    assert await bench.store.volumes() == (VOLUME, other)
    assert await bench.store.volumes("two") == (other,)
    assert await bench.store.volume("v1") == VOLUME
    assert await bench.store.volume("v9") is None


@check
async def a_volume_is_claimed_by_one_instance_at_a_time(bench: Bench) -> None:
    await bench.store.put_volume(VOLUME)
    claims = await asyncio.gather(*(bench.store.claim_volume("v1", f"i{number}") for number in range(20)))
    assert claims.count(True) == 1
    holder = f"i{claims.index(True)}"
    assert await bench.store.volume("v1") == replace(VOLUME, attached_to=holder)
    assert await bench.store.claim_volume("v1", holder), "to claim again what one has is no conflict"
    assert not await bench.store.claim_volume("none such", "i1")
    await bench.store.release_volume("v1", "somebody else")
    async with bench.power_cut() as found:
        assert await found.volume("v1") == replace(VOLUME, attached_to=holder)
    await bench.store.release_volume("v1", holder)
    assert await bench.store.claim_volume("v1", "next")


@check
async def a_claimed_volume_is_not_forgotten(bench: Bench) -> None:
    await bench.store.put_volume(VOLUME)
    await bench.store.claim_volume("v1", "a")
    assert not await bench.store.delete_volume("v1")
    await bench.store.release_volume("v1", "a")
    assert await bench.store.delete_volume("v1")
    assert not await bench.store.delete_volume("v1")
    assert await bench.store.volumes() == ()
