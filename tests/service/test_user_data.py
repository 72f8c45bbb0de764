"""What cloud-init makes of user-data, compared with the answers of cloud-init itself; and what is said of the rest."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_cloud_init import ANSWERS, SAMPLES

from interlock.service import user_data

RECORDED = json.loads(ANSWERS.read_text())["answers"]
UNKNOWN = "text/x-not-multipart"
"""What cloud-init calls that of which it knows no type."""
HANDLED = user_data._HANDLED


def test_every_sample_has_an_answer() -> None:
    assert RECORDED.keys() == SAMPLES.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_each_part_has_the_type_that_cloud_init_finds(name: str) -> None:
    assert [kind or UNKNOWN for kind, _ in user_data.parts(SAMPLES[name])] == RECORDED[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_what_cloud_init_ignores_is_warned_of_and_nothing_else(name: str) -> None:
    found = user_data.warnings(SAMPLES[name])
    ignored = not RECORDED[name] or any(kind not in HANDLED for kind in RECORDED[name])
    never_runs = name in {"script after a line", "per boot", "template after a line"}
    assert bool(found) == (ignored or never_runs), found


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty"),
        (b"hello\n", "begin it with `#cloud-config`"),
        (SAMPLES["script after a line"], "with nothing before"),
        (SAMPLES["config after a byte order mark"], "byte order mark"),
        (SAMPLES["config in UTF-16"], "UTF-16"),
        (SAMPLES["base64"], "user_data_base64"),
        (SAMPLES["gzip cut short"], "damaged"),
        (SAMPLES["MIME without its version"], "MIME-Version"),
        (SAMPLES["MIME with plain parts"], r"part 2 \(text/plain\)"),
        (b"## template: jinja\nhello\n", "unknown format after"),
    ],
)
def test_the_warning_says_what_is_wrong(data: bytes, what: str) -> None:
    found = user_data.warnings(data)
    assert re.search(what, found[0])


@given(st.binary(max_size=300), st.sampled_from([b"", b"\x1f\x8b\x08", b"MIME-Version: 1.0\n", b"#cloud-config"]))
def test_any_bytes_have_an_answer(data: bytes, beginning: bytes) -> None:
    user_data.warnings(beginning + data)
    user_data.warnings(gzip.compress(data))


def test_a_bomb_is_not_unpacked() -> None:
    assert user_data.warnings(gzip.compress(b"#cloud-config\n" + bytes(64 << 20))) == ()
