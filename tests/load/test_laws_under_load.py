"""Two hundred clients at once, on a host on which everything goes wrong: no law is broken, and no answer is a 5xx."""

from __future__ import annotations

import asyncio
from collections import Counter

import msgspec
import pytest

from check_history import HistoryViolation, check_history
from interlock.core.records import Event, Instance
from load.load import Report, put_load, read_history
from tiers import tier

SECONDS = tier(4.0, 60.0)
REQUESTS = tier(4_000, 60_000)
History = tuple[Report, list[Event], list[Instance]]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    async def load() -> History:
        folder = tmp_path_factory.mktemp("load")
        report = await put_load(folder, SECONDS, REQUESTS)
        return report, *await read_history(folder)

    return asyncio.run(load())


def _judge(history: History, events: list[Event]) -> list[HistoryViolation]:
    report, _, instances = history
    return check_history(events, instances, acknowledged=report.acknowledged, settled=True)


def test_every_law_holds_in_what_was_recorded(history: History) -> None:
    assert _judge(history, history[1]) == []


def test_no_answer_is_one_that_may_never_be(history: History) -> None:
    assert history[0].wrong == []


def test_everything_ends_once_the_faults_are_over(history: History) -> None:
    assert history[0].stuck == []


def test_the_record_and_the_host_agree_once_all_has_settled(history: History) -> None:
    """What is active runs, what is stopped does not, and no guest has a volume that is not its own."""
    assert history[0].differences == []


def test_the_load_was_one(history: History) -> None:
    """Otherwise the laws hold for want of anything to break them."""
    report, events, _ = history
    kinds = Counter(event.kind for event in events)
    assert report.requests >= REQUESTS
    assert len(report.acknowledged) > REQUESTS / 20
    rare = ("superseded", "cancelled", "failed", "unknown", "fenced", "interrupting", "denied", "redundant")
    for kind in (*(f"request.{name}" for name in rare), "instance.fenced", "guest.crashed", "guest.vanished"):
        assert kinds[kind], f"nothing was {kind}"


def test_a_history_with_a_lost_end_is_caught(history: History) -> None:
    events = history[1]
    lost = next(event for event in events if event.kind == "request.succeeded")
    broken = _judge(history, [event for event in events if event is not lost])
    assert {3} <= {one.law for one in broken if one.request_id == lost.request_id}


def test_a_history_in_which_two_are_served_at_once_is_caught(history: History) -> None:
    events = history[1]
    ended = next(event for event in events if event.kind == "request.succeeded" and event.data["operation"] == "stop")
    took = next(e for e in events if e.kind == "request.taken" and e.request_id == ended.request_id)
    twice = msgspec.structs.replace(took, sequence=0)
    at = events.index(took)
    assert 1 in {one.law for one in _judge(history, [*events[: at + 1], twice, *events[at + 1 :]])}


def test_a_history_without_what_a_client_was_told_is_caught(history: History) -> None:
    told = history[0].acknowledged[-1]
    kept = [event for event in history[1] if event.request_id != told]
    assert any(one.law == 9 and one.request_id == told for one in _judge(history, kept))


def test_a_history_in_which_a_fence_goes_back_is_caught(history: History) -> None:
    fenced = next(event for event in history[1] if event.kind == "instance.fenced")
    back = msgspec.structs.replace(fenced, data={**fenced.data, "fence": 0})
    events = [back if event is fenced else event for event in history[1]]
    assert 4 in {one.law for one in _judge(history, events)}
