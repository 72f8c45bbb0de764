"""A text that is checked by a pattern ends where it seems to: no newline is smuggled in behind it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from interlock.core.errors import Invalid
from interlock.core.operations import Operation
from interlock.service.request_models import NewInstance, check_parameters


@pytest.mark.parametrize(
    ("operation", "parameters"),
    [
        (Operation.SET_PASSWORD, {"user": "root"}),
        (Operation.SET_PASSWORD, {"password": "correct horse"}),
        (Operation.BACKUP, {"backup_type": "daily", "rotation": 2}),
        (Operation.ATTACH_INTERFACE, {"mac": "52:54:00:00:00:01"}),
        (Operation.SET_METADATA, {"set": {"note": "text"}}),
    ],
)
def test_a_last_newline_is_part_of_the_text(operation: Operation, parameters: dict[str, Any]) -> None:
    check_parameters(operation, parameters)
    name, value = next(iter(parameters.items()))
    with_newline = {f"{key}\n": text for key, text in value.items()} if isinstance(value, dict) else f"{value}\n"
    with pytest.raises(Invalid, match=f"parameters of {operation.value}"):
        check_parameters(operation, {**parameters, name: with_newline})


def test_a_tag_ends_in_no_newline() -> None:
    wish = {"name": "web", "image": "debian", "tags": ["production\n"]}
    with pytest.raises(msgspec.ValidationError, match="tags"):
        msgspec.convert(wish, NewInstance)


def test_only_a_wrong_name_is_answered_with_the_names() -> None:
    with pytest.raises(Invalid) as wrong_value:
        check_parameters(Operation.RENAME, {"name": 3})
    assert wrong_value.value.remedy is None
    with pytest.raises(Invalid) as missing:
        check_parameters(Operation.RENAME, {})
    assert missing.value.remedy == "It takes: name."
