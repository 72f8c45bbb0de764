"""A policy's text can be sent elsewhere with what it extends, and says the same there; nothing else is ever opened."""

from __future__ import annotations

import posixpath
from pathlib import Path

import pytest
from msgspec.structs import replace

from interlock.core.errors import PolicyError
from interlock.core.policy import Policy
from interlock.core.policy_switches import PolicyBundle
from interlock.policies.language import bundle as bundles
from interlock.policies.language.bundle import Source, bundle_of
from interlock.policies.language.loader import builtin_names, load

RULE = '[[rule]]\nid = "{id}"\noperations = ["stop"]\nverdict = "deny"\n'


def says(policy: Policy) -> Policy:
    """A policy without the places at which its rules stand."""
    return replace(policy, rules=tuple(replace(rule, source="") for rule in policy.rules))


@pytest.mark.parametrize("name", builtin_names())
def test_a_built_in_says_the_same_as_a_text(name: str) -> None:
    source = Source.read(name)
    assert says(bundles.read(source.bundle)) == says(load(name))
    assert source.bundle.main == f"{name}.toml"


@pytest.mark.parametrize(
    ("main", "extends", "base", "names"),
    [
        ("site.toml", "base.toml", "base.toml", ["site.toml", "base.toml"]),
        ("site.toml", "./base.toml", "base.toml", ["site.toml", "base.toml"]),
        ("sites/one.toml", "../base.toml", "base.toml", ["sites/one.toml", "base.toml"]),
        ("site.toml", "more/base.toml", "more/base.toml", ["site.toml", "more/base.toml"]),
    ],
)
def test_a_file_is_sent_with_what_it_extends(
    tmp_path: Path, main: str, extends: str, base: str, names: list[str]
) -> None:
    for name, text in (
        (main, f'[policy]\nextends = "{extends}"\n' + RULE.format(id="own")),
        (base, '[policy]\nextends = "standard"\n# Größe\r\n' + RULE.format(id="lower")),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    bundle = bundle_of(tmp_path / main)
    assert (bundle.main, list(bundle.files)) == (names[0], names)
    assert bundle.files[names[1]].encode() == (tmp_path / base).read_bytes()
    there = bundles.read(bundle)
    assert says(there) == says(load(tmp_path / main))
    places = [posixpath.normpath(rule.source.rpartition(":")[0]) for rule in there.rules]
    assert [places[number] for number, rule in enumerate(there.rules) if rule.id in {"own", "lower"}] == names


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.toml": '[policy]\nextends = "/etc/passwd.toml"\n'}, "is not found in the bundle"),
        ({"a.toml": '[policy]\nextends = "../b.toml"\n', "b.toml": RULE.format(id="b")}, "is not found in the bundle"),
        ({"a.toml": '[policy]\nextends = "b.toml"\n'}, "is not found in the bundle"),
        ({"a.toml": '[policy]\nextends = "./a.toml"\n'}, "extends itself"),
        ({"a.toml": RULE.format(id="a") + "x = ["}, "a.toml:5"),
    ],
)
def test_a_bundle_that_is_wrong_or_reaches_outside_is_refused(files: dict[str, str], said: str) -> None:
    with pytest.raises(PolicyError, match=said) as caught:
        bundles.read(PolicyBundle(main="a.toml", files=files))
    assert "/tmp" not in caught.value.message


def test_a_file_that_cannot_be_sent_is_refused_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    for content, said in (
        (b'[policy]\nextends = "/etc/base.toml"\n', "a.toml:2:11: The extended file '/etc/base.toml' is not found"),
        (b'[policy]\nextends = "./none.toml"\n', "a.toml:2:11: The extended file"),
        (b"# \xff\n", "a.toml:1:3: The file is not UTF-8 text"),
        (b"#" * (1024 * 1024 + 1), "a.toml:1:1: The file is larger"),
    ):
        file.write_bytes(content)
        with pytest.raises(PolicyError, match=said):
            bundle_of(file)
    with pytest.raises(PolicyError, match="Not a regular file"):
        bundle_of(tmp_path)


def test_the_digest_is_of_what_decides() -> None:
    def digest(text: str) -> str:
        return bundles.read(PolicyBundle(main="a.toml", files={"a.toml": text})).digest

    text = '[policy]\nname = "a"\nextends = "standard"\n' + RULE.format(id="own")
    assert len(digest(text)) == 64
    assert digest(text) == digest(text.replace("\n", "\n# comment\n") + 'because = "Tapes."\n')
    assert digest(text) != digest(text.replace('"stop"', '"start"'))
    assert digest(text) != digest(text.replace("extends", "outstanding_max = 3\nextends"))
    assert bundles.read(bundles.builtin("take2")).digest == Source.read("take2").policy.digest


def test_files_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[policy]\nextends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('[policy]\nextends = "./a.toml"\n')
    with pytest.raises(PolicyError, match="extends itself"):
        bundle_of(tmp_path / "a.toml")
