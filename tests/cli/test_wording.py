"""Times, durations and sizes as people read them."""

from __future__ import annotations

import pytest

from interlock.cli.wording import age, clock, duration, printable, size

AT = "2026-03-01T12:00:03.000Z"
NOON = 1_772_366_400.0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.02, "20 ms"),
        (3.24, "3.2 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (161, "2 min 41 s"),
        (7_260, "2 h 1 min"),
        (180_000, "2 d 2 h"),
    ],
)
def test_a_duration_has_its_two_greatest_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_moment_of_another_day_has_its_date() -> None:
    assert clock(AT, NOON) == "12:00:03"
    assert clock(AT, NOON + 86_400) == "2026-03-01 12:00:03"


def test_an_age_is_never_negative() -> None:
    assert age(AT, NOON + 63) == "1 min"
    assert age(AT, NOON) == "0 s"


@pytest.mark.parametrize(("size_bytes", "said"), [(0, "0 B"), (1536, "1.5 KiB"), (2**30, "1 GiB"), (2**44, "16 TiB")])
def test_a_size_has_the_unit_that_fits(size_bytes: int, said: str) -> None:
    assert size(size_bytes) == said


def test_escape_sequences_are_made_harmless() -> None:
    assert printable("a\x1b[2Jb\n\tc\u202e") == "a\ufffd[2Jb\n\tc\ufffd"
