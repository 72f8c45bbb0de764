"""Times, durations and sizes as people read them."""

from __future__ import annotations

import pytest

from interlock.cli.output.formatting import age, clock, duration, escape_all, escape_line, for_terminal, printable, size

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


def test_what_people_gave_stays_on_its_line_and_means_nothing_to_a_terminal() -> None:
    assert escape_line("v\nState: deleted") == "v\\nState: deleted"
    assert escape_line("\x1b[2J\r\x9b\u202e\u2028") == "\\x1b[2J\\r\\x9b\\u202e\\u2028"
    assert escape_line("naïve 名前\u3000\u00a0 ok") == "naïve 名前\u3000\u00a0 ok"
    given = {"k\n": ["a\x07", {"n": 1}], "none": None}
    assert escape_all(given) == {"k\\n": ["a\\x07", {"n": 1}], "none": None}


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (b"\x1b[31mred\x1b[0m\r\n", "red\n"),
        (b"\x1b]0;owned\x07title", "title"),
        (b"\x1b]52;c;AAAA\x1b\\clip", "clip"),
        (b"\x1bPq#0\x1b\\sixel", "sixel"),
        (b"\x1bcreset\x1b(Bset", "resetset"),
        (b"10%\r20%", "10%\n20%"),
        (b"\xff\x1b", "\ufffd\ufffd"),
        ("\u202eright\x9b".encode(), "\ufffdright\ufffd"),
    ],
)
def test_a_terminal_is_not_told_to_do_anything_by_a_guest(written: bytes, shown: str) -> None:
    assert for_terminal(written) == shown
