"""What is said to people about a value that is not what was expected."""

from __future__ import annotations

from typing import Any

import pytest

from interlock.core.errors import Invalid
from interlock.core.operations import Operation
from interlock.service.wishes import check_parameters


@pytest.mark.parametrize(
    ("operation", "parameters", "said"),
    [
        (Operation.RESIZE, {"memory_mib": 3}, "memory_mib: expected a whole number of at least 64"),
        (Operation.RESIZE, {"vcpus": "two"}, "vcpus: expected a whole number or null, got a text"),
        (Operation.SNAPSHOT, {"name": "a b"}, "name: expected a name: 1 to 63 lower-case letters, digits and hyphens"),
        (Operation.SNAPSHOT, {"name": ""}, "name: expected a text with a length of at least 1"),
        (
            Operation.ATTACH_INTERFACE,
            {"mac": "x"},
            "mac: expected the address of one interface, as in",
        ),
        (Operation.STOP, {"hrad": True}, "Object contains unknown field `hrad`"),
    ],
)
def test_what_is_wrong_is_said_in_words(operation: Operation, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(Invalid) as wrong:
        check_parameters(operation, parameters)
    assert said in wrong.value.message
    assert "`$" not in wrong.value.message
    assert "regex" not in wrong.value.message
