"""Held requests in a rehearsal: the same moments as with a driver."""

from __future__ import annotations

import json
from typing import Any

from interlock.policies.language.loader import compile_named
from interlock.policies.rehearsal.runner import rehearse


def played(*events: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        json.loads(answer) for answer in rehearse([json.dumps(event) for event in events], compile_named("standard"))
    ]


def test_what_is_held_is_admitted_at_its_moment_and_takes_over() -> None:
    _, held, early, over, shown = played(
        {"instance": {"vm_state": "active", "in_flight": "reboot", "age": "20s"}},
        {"submit": "stop", "hold": "10m"},
        {"advance": "159s"},
        {"advance": "1s"},
        {"show": True},
    )
    assert (held["disposition"], held["reason"], held["retry_after"]) == ("held", "no_sign_of_life", 160)
    assert "admitted" not in early
    assert over["admitted"] == {"r2": "silent-power.stop"}
    assert over["ended"] == {"r1": "superseded"}
    assert [one["request"] for one in shown["outstanding"]] == ["r2"]


def test_time_that_passes_in_one_go_is_time_that_passes() -> None:
    """The hold ends after five minutes, and its moment is after three."""
    *_, over = played(
        {"instance": {"vm_state": "active", "in_flight": "reboot", "age": "20s"}},
        {"submit": "stop", "hold": "5m"},
        {"advance": "1h"},
    )
    assert over["admitted"] == {"r2": "silent-power.stop"}


def test_the_end_of_what_was_in_the_way_lets_it_in() -> None:
    *_, ended = played(
        {"instance": {"vm_state": "active"}},
        {"submit": "stop"},
        {"submit": "reboot", "hold": "5m"},
        {"submit": "reboot", "hold": "5m"},
        {"cancel": "r1"},
    )
    assert (ended["cancelled"], ended["admitted"]) == ({"r1": "cancelled"}, {"r2": "reboot"})


def test_the_same_again_is_redundant_while_it_is_held() -> None:
    *_, again = played(
        {"instance": {"vm_state": "active"}},
        {"submit": "stop"},
        {"submit": "reboot", "hold": "5m"},
        {"submit": "reboot"},
    )
    assert (again["disposition"], again["reason"], again["request"]) == ("redundant", "already_held", "r2")


def test_what_is_held_too_long_is_given_up() -> None:
    *_, over = played({"instance": {"vm_state": "active"}}, {"submit": "unpause", "hold": "5m"}, {"advance": "5m"})
    assert over["cancelled"] == {}, "of an active instance an unpause is redundant, and was never held"
    *_, over = played({"instance": {"vm_state": "stopped"}}, {"submit": "unpause", "hold": "5m"}, {"advance": "5m"})
    assert over["cancelled"] == {"r1": "hold_expired"}
