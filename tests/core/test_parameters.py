"""What a parameter must be that its type does not say."""

from __future__ import annotations

import msgspec
import pytest

from interlock.core.durations import DURATION_MAX_MS, parse_duration
from interlock.core.errors import Invalid
from interlock.core.parameters import LiveMigrateParameters, RenameParameters, SnapshotParameters, check_name, is_id
from interlock.core.specs import repr_hiding

ID = "018f2b3c-0000-7000-8000-00000000002a"


@pytest.mark.parametrize("text", [ID, ID.upper()])
def test_an_id_is_told_from_a_name_and_is_none(text: str) -> None:
    assert is_id(text)
    for kind in (RenameParameters, SnapshotParameters):
        with pytest.raises(Invalid, match=r"^name: '018.*' looks like an id"):
            kind(name=text).check()


@pytest.mark.parametrize("text", ["web", ID[:-1], ID + "0", ID + "\n", ID.replace("-", "."), "x" + ID[1:]])
def test_what_only_resembles_an_id_is_none(text: str) -> None:
    assert not is_id(text)


@pytest.mark.parametrize("name", ["", "-web", "web-", "a b", "web\n", "x" * 64])
def test_a_name_that_is_none_is_refused_with_its_field(name: str) -> None:
    with pytest.raises(Invalid, match=r"^volume: '.*' is not a name: 1 to 63 letters"):
        check_name(name, "volume")
    for fine in ("w", "web-1.a_b", "x" * 63):
        check_name(fine, "volume")


@pytest.mark.parametrize(
    ("timeout", "valid"), [(None, True), ("10m", True), ("soon", False), ("", False), ("0s", False)]
)
def test_the_time_in_which_a_migration_converges_is_a_duration(timeout: str | None, *, valid: bool) -> None:
    parameters = LiveMigrateParameters(host="north", converge_timeout=timeout)
    if valid:
        parameters.check()
    else:
        with pytest.raises(Invalid, match=f"^converge_timeout: '{timeout}'; expected a length of time"):
            parameters.check()


def test_a_duration_has_at_most_64_characters_ten_years_and_whole_milliseconds() -> None:
    longest = "1ms" * 20 + "12ms"
    assert len(longest) == 64
    assert parse_duration(longest) == 32
    assert parse_duration(longest + "1s") is None
    assert parse_duration("3650d") == DURATION_MAX_MS
    assert parse_duration("3650d1ms") is None
    assert (parse_duration("1.5s"), parse_duration("0.5ms"), parse_duration("-1s")) == (1500, None, None)


class Secretive(msgspec.Struct):
    name: str
    password: str | None = None
    __repr__ = repr_hiding("password")


def test_a_record_is_shown_without_its_secrets_and_with_all_else() -> None:
    assert repr(Secretive("web", "geheim")) == "Secretive(name='web', password=...)"
    assert repr(Secretive("web")) == "Secretive(name='web', password=None)"
