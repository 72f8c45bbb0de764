"""What is said to people about a value that is not what was expected."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from interlock.core.errors import Invalid
from interlock.core.operations import Operation
from interlock.core.states import VmState
from interlock.service.request_models import check_parameters
from interlock.service.validation_messages import what_instead


@pytest.mark.parametrize(
    ("operation", "parameters", "said"),
    [
        (Operation.RESIZE, {"memory_mib": 3}, "memory_mib: expected a whole number of at least 64"),
        (Operation.RESIZE, {"vcpus": "two"}, "vcpus: expected a whole number or null, got a text"),
        (
            Operation.SNAPSHOT,
            {"name": "a b"},
            "name: expected a name: 1 to 63 letters, digits, hyphens, dots and",
        ),
        (Operation.SNAPSHOT, {"name": ""}, "name: expected a text with a length of at least 1"),
        (
            Operation.ATTACH_INTERFACE,
            {"mac": "x"},
            "mac: expected the address of one interface, as in",
        ),
        (Operation.STOP, {"hrad": True}, "Object contains unknown field `hrad`"),
        (Operation.RESET_STATE, {"vm_state": "on fire", "reason": "x"}, "vm_state: 'on fire' is not known"),
        (Operation.SET_METADATA, {"set": {"": "x"}}, "a name in set: expected a text with a length of at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_words(operation: Operation, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(Invalid) as wrong:
        check_parameters(operation, parameters)
    assert said in wrong.value.message
    assert "`$" not in wrong.value.message
    assert "regex" not in wrong.value.message


class Pair(msgspec.Struct, forbid_unknown_fields=True):
    host_port: int = 0
    state: VmState | None = None


class Wish(msgspec.Struct, forbid_unknown_fields=True):
    name: str = ""
    pairs: tuple[Pair, ...] = ()
    states: dict[str, VmState] = {}


@pytest.mark.parametrize(
    ("sent", "remedy"),
    [
        ({"nmae": ""}, "Did you mean `name`?"),
        ({"host_port": 1}, "The fields are: name, pairs, states."),
        ({"pairs": [{"colour": 1}]}, "The fields are: host_port, state."),
        ({"pairs": [{"host_prt": 1}]}, "Did you mean `host_port`?"),
        ({"pairs": [{"state": "activ"}]}, "Did you mean `active`?"),
        ({"states": {"one": "stoped"}}, "Did you mean `stopped`?"),
        ({"states": {"one": "on fire"}}, f"It is one of: {', '.join(sorted(VmState))}."),
        ({"name": 3}, None),
    ],
)
def test_a_name_that_is_not_known_is_answered_with_those_of_its_place(sent: dict[str, Any], remedy: str | None) -> None:
    with pytest.raises(msgspec.ValidationError) as wrong:
        msgspec.convert(sent, Wish)
    assert what_instead(str(wrong.value), Wish) == remedy
