"""What a new user of `interlock vm` sees: its help, and what can be done next with a VM."""

from __future__ import annotations

import pytest

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import AT, admitted, instance, request
from interlock.__main__ import root
from interlock.api.schemas import responses
from interlock.cli.commands.vm import vm_commands
from interlock.cli.output.grouped_help import SECTIONS
from interlock.core.operations import Operation
from interlock.core.records import Status
from interlock.core.states import PowerState, VmState

DUE = responses.Due(operation=Operation.CONFIRM_RESIZE, at=AT)


def test_the_help_lists_each_command_once_under_a_heading(interlock: Interlock) -> None:
    root()
    said = interlock("vm", "--help").out
    for heading in SECTIONS:
        assert f"\n{heading}:\n" in said
    listed = said.partition("\nVMs:")[2]
    names = [line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "]
    assert sorted(names) == sorted(name for name, one in vm_commands.commands.items() if not one.hidden)
    assert "..." not in listed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vm_state": VmState.SUSPENDED}, "`vm resume` restores its memory and continues it"),
        ({"vm_state": VmState.RESCUED, "prior_vm_state": VmState.ACTIVE}, "`vm unrescue`"),
        (
            {"vm_state": VmState.RESIZED, "due": DUE},
            "restores the old one; confirmed automatically at 12:00",
        ),
        (
            {"vm_state": VmState.RESIZED, "power_state": PowerState.SHUTDOWN},
            "restores the old one; `vm start` boots it with its new size, and confirms that",
        ),
        (
            {
                "vm_state": VmState.SOFT_DELETED,
                "prior_vm_state": VmState.RESIZED,
                "further_vm_states": (VmState.ACTIVE, VmState.STOPPED),
            },
            "resized, before it was soft_deleted; active, before it was resized\n",
        ),
        ({"vm_state": VmState.SHELVED}, "`vm unshelve` restores it"),
        ({"vm_state": VmState.SOFT_DELETED}, "`vm restore` undeletes it"),
        (
            {
                "vm_state": VmState.SOFT_DELETED,
                "prior_vm_state": VmState.RESCUED,
                "further_vm_states": (VmState.STOPPED,),
            },
            "rescued, before it was soft_deleted; stopped, before it was rescued",
        ),
        ({"seeded": True}, "Cloud-init:"),
    ],
)
def test_show_tells_what_can_be_done_next(
    interlock: Interlock, server: ScriptedServer, changes: dict[str, object], said: str
) -> None:
    server.on("GET", "/v1/instances/demo", Given(value=instance(**changes)))
    assert said in interlock("vm", "show", "demo").out


def test_nothing_is_said_to_be_next_while_something_is_done(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/instances/demo", Given(value=instance(vm_state=VmState.SUSPENDED, outstanding=(request(),))))
    assert "Next:" not in interlock("vm", "show", "demo").out


def test_notes_are_written_as_words(interlock: Interlock, server: ScriptedServer) -> None:
    done = admitted(request(operation=Operation.SET_METADATA, status=Status.SUCCEEDED, duration_s=0.0))
    server.on("POST", "/v1/instances/demo/requests", Given(202, done))
    ran = interlock("vm", "metadata", "demo", "owner=alice", "url=a=b", "--remove", "old")
    assert (ran.code, ran.out) == (0, "Done: set metadata of demo\n")
    assert server.asked[-1].json["parameters"] == {"set": {"owner": "alice", "url": "a=b"}, "remove": ["old"]}


@pytest.mark.parametrize("words", [(), ("foo",), ("=x",), ("a=1", "a=2")])
def test_what_is_no_note_is_refused_before_anything_is_sent(
    interlock: Interlock, server: ScriptedServer, words: tuple[str, ...]
) -> None:
    assert interlock("vm", "metadata", "demo", *words).code == 2
    assert server.asked == []
