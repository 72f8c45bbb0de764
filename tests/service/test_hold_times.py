"""The time of a held request, as users type it."""

from __future__ import annotations

import msgspec
import pytest

from interlock.core.errors import Invalid
from interlock.service.request_models import NewRequest, hold_ms


@pytest.mark.parametrize("text", ["5", "banana", "8d"])
def test_an_invalid_hold_says_what_is_expected(text: str) -> None:
    request = msgspec.json.decode(f'{{"operation": "stop", "hold": "{text}"}}', type=NewRequest)
    with pytest.raises(Invalid, match=f"Invalid hold '{text}': expected a duration such as 30s or 10m"):
        hold_ms(request.hold)
