"""A password reaches the guest and nothing else, whatever becomes of its request."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from in_process.embedded import IMAGE, Embedded, admitted
from interlock.core.operations import Operation
from interlock.core.records import Status
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import Method, Refuses, Slow
from interlock.hypervisors.simulated.guest import hashed
from interlock.service.request_models import NewInstance, NewRequest

O = Operation  # noqa: E741
WORD = "correct-horse-battery"


def traces(folder: Path) -> list[str]:
    """The files in which the password can be read."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and WORD.encode() in path.read_bytes()]


@pytest.mark.parametrize("fails", [False, True])
async def test_a_password_is_set_and_recorded_nowhere(
    fleet: Embedded,
    host: SimulatedHost,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    *,
    fails: bool,
) -> None:
    caplog.set_level(logging.DEBUG)
    vm = await fleet.create("web")
    if fails:
        host.faults.script(vm, Method.SET_PASSWORD, Refuses("The guest says no."))
    wish = NewRequest(operation=O.SET_PASSWORD, parameters={"user": "ada", "password": WORD})
    answer = await fleet.server.instances.submit(fleet.caller, vm, wish, "key")
    assert answer.password is None
    request = await fleet.ended(admitted(answer))
    assert request.status is (Status.FAILED if fails else Status.SUCCEEDED)
    assert request.parameters == {"user": "ada"}
    if not fails:
        assert host.guests[vm].passwords == {"ada": hashed(vm, "ada", WORD)}
    assert WORD not in repr(await fleet.events(vm))
    assert fleet.server.passwords.of(request.id) is None
    # The same key again is answered as before, and leaves nothing behind.
    again = await fleet.server.instances.submit(fleet.caller, vm, wish, "key")
    assert admitted(again).id == request.id
    await fleet.server.close()
    assert traces(tmp_path) == []
    assert WORD not in caplog.text
    printed = capsys.readouterr()
    assert WORD not in printed.out + printed.err
    await fleet.start()


async def test_a_password_that_is_not_given_is_made_up_and_told_once(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    wish = NewRequest(operation=O.SET_PASSWORD)
    answer = await fleet.server.instances.submit(fleet.caller, vm, wish, "key")
    assert answer.password is not None
    assert len(answer.password) >= 16
    await fleet.ended(admitted(answer))
    assert host.guests[vm].passwords == {"root": hashed(vm, "root", answer.password)}
    again = await fleet.server.instances.submit(fleet.caller, vm, wish, "key")
    assert again.password is None


async def test_a_password_is_forgotten_with_the_server_and_the_request_says_so(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    host.faults.script(vm, Method.SET_PASSWORD, Slow(60_000))
    request = admitted(await fleet.submit(vm, O.SET_PASSWORD, user="ada", password=WORD))
    await fleet.until(vm, task_state="updating_password")
    await fleet.crash()
    await fleet.start()
    ended = await fleet.ended(request)
    assert ended.status is Status.FAILED
    assert "kept in memory only" in (ended.message or "")
    assert host.guests[vm].passwords == {}
    assert (await fleet.carry_out(vm, O.SET_PASSWORD, user="ada", password=WORD)).status is Status.SUCCEEDED


async def test_a_password_that_is_refused_by_the_gate_is_forgotten_at_once(fleet: Embedded) -> None:
    vm = await fleet.create("web")
    await fleet.carry_out(vm, O.STOP)
    await fleet.submit(vm, O.SET_PASSWORD, user="ada", password=WORD)
    assert fleet.server.passwords._kept == {}


async def test_a_guest_whose_agent_has_gone_meanwhile_says_what_is_missing(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    host.faults.script(vm, Method.SET_PASSWORD, Slow(50))
    asked = admitted(await fleet.submit(vm, O.SET_PASSWORD, password=WORD))
    host.guests[vm].has_agent = False
    request = await fleet.ended(asked)
    assert request.status is Status.FAILED
    assert "agent" in (request.message or "")


async def test_what_a_guest_was_told_goes_with_it(fleet: Embedded, tmp_path: Path) -> None:
    wish = NewInstance(name="web", image=IMAGE.name, user_data=f"#!/bin/sh\necho {WORD}\n")
    vm = (await fleet.server.instances.create(fleet.caller, wish)).instance.id
    assert traces(tmp_path), "until then the guest may have to be told again"
    await fleet.carry_out(vm, O.FORCE_DELETE)
    kept = await fleet.server.store.instance(vm)
    assert kept is not None
    assert kept.spec is not None
    assert kept.spec.seed is None
