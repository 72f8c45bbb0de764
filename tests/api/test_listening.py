"""The socket that a server listens on."""

from __future__ import annotations

import pytest

from interlock.api.http import listener
from interlock.core.errors import Unavailable


def test_a_port_that_is_in_use_says_how_to_choose_another() -> None:
    with listener.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(Unavailable, match=f"Cannot listen on 127.0.0.1:{port}: Address already in use") as raised:
            listener.bind("127.0.0.1", port)
    assert "INTERLOCK_LISTEN_PORT" in str(raised.value.remedy)
