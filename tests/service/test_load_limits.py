"""Rates and slots: what a key may take, and when it gets it back."""

from __future__ import annotations

import asyncio

import pytest

from interlock.config import HttpConfig
from interlock.service import load_limits
from interlock.service.load_limits import LoadLimits, Slots, TokenBuckets, waiting


def test_a_bucket_has_its_burst_at_once_and_its_rate_from_then_on() -> None:
    now_s = [0.0]
    buckets = TokenBuckets(2, 3, lambda: now_s[0])
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, pytest.approx(0.5)]
    assert buckets.take("b") == 0, "each key has a bucket of its own"
    now_s[0] = 0.5
    assert [buckets.take("a"), buckets.take("a")] == [0, pytest.approx(0.5)]
    now_s[0] = 100
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, pytest.approx(0.5)], "no more than the burst is kept"


def test_buckets_that_are_full_again_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_limits, "_BUCKETS_MAX", 5)
    now_s = [0.0]
    buckets = TokenBuckets(1, 1, lambda: now_s[0])
    for number in range(5):
        buckets.take(str(number))
    now_s[0] = 2
    assert buckets.take("another") == 0
    assert list(buckets._full_at_s) == ["another"]


def test_slots_are_limited_in_all_and_by_key() -> None:
    slots = Slots(3, 2)
    assert [slots.take("a"), slots.take("a"), slots.take("a"), slots.full_for("a")] == [True, True, False, True]
    assert [slots.take("b"), slots.take("b"), slots.full_for("b")] == [True, False, False]
    slots.release("a")
    assert [slots.take("b"), slots.take("c")] == [True, False]


def test_a_request_that_waits_leaves_its_slot_to_others() -> None:
    load = LoadLimits(HttpConfig(requests_max=1, token_requests_max=1))
    slot = load.serve("a")
    assert slot is not None
    with slot:
        assert load.serve("b") is None
        with waiting():
            other = load.serve("b")
            assert other is not None
            with waiting():
                pass
        with other:
            assert load.serve("c") is None
        assert load.serve("c") is None, "the first has resumed"
    assert load.serve("c") is not None


async def test_a_task_that_ends_later_than_its_request_takes_no_slot() -> None:
    load = LoadLimits(HttpConfig(requests_max=1, token_requests_max=1))
    slot = load.serve("a")
    assert slot is not None

    async def wait() -> None:
        with waiting():
            await asyncio.Event().wait()

    with slot:
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait({task})
    assert load.requests.taken == 0
    assert load.serve("b") is not None


def test_waiting_outside_of_a_request_changes_nothing() -> None:
    with waiting():
        pass
