"""A policy is sent as its files and is the same policy there; nothing outside them is reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from interlock.core.errors import PolicyError
from interlock.policies.language.bundle import bundle_of, read_bundle
from interlock.policies.language.loader import load, read
from interlock.policies.language.schema import FILE_SIZE_MAX_BYTES

RULE = '[[rule]]\nid = "{}"\noperations = ["stop"]\nverdict = "deny"\n'


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def extending(extends: str, rule: str) -> str:
    return f'[policy]\nextends = "{extends}"\n' + RULE.format(rule)


@pytest.mark.parametrize(
    ("main", "files", "names"),
    [
        ("a.toml", {"a.toml": extending("standard", "a")}, {"a.toml"}),
        ("a.toml", {"a.toml": extending("./x/../b.toml", "a"), "x/y.toml": "", "b.toml": RULE.format("b")},
         {"a.toml", "b.toml"}),
        (
            "sites/de/a.toml",
            {
                "sites/de/a.toml": extending("../../base/b.toml", "a"),
                "base/b.toml": extending("c.toml", "b"),
                "base/c.toml": extending("take2", "c"),
            },
            {"sites/de/a.toml", "base/b.toml", "base/c.toml"},
        ),
        ("a.toml", {"a.toml": extending("more/b.toml", "a"), "more/b.toml": extending("../c.toml", "b"),
                    "c.toml": RULE.format("c")}, {"a.toml", "more/b.toml", "c.toml"}),
    ],
)  # fmt: skip
def test_a_policy_that_is_sent_is_the_same(tmp_path: Path, main: str, files: dict[str, str], names: set[str]) -> None:
    write(tmp_path, files)
    bundle = bundle_of(tmp_path / main)
    sent, sent_main = bundle.files, bundle.main
    assert (set(sent), sent_main) == (names, main)
    there, here = read_bundle(sent, sent_main), read(tmp_path / main)
    assert there.policy.digest == here.policy.digest
    assert there.policy.name == here.policy.name == Path(main).stem
    assert (there.sets, there.description) == (here.sets, here.description)
    assert sorted(there.files.values()) == sorted(here.files.values()) == sorted(sent.values())
    assert there.source == sent_main


def test_the_text_of_a_policy_is_kept_with_it(tmp_path: Path) -> None:
    write(tmp_path, {"a.toml": extending("b.toml", "a"), "b.toml": extending("standard", "b")})
    found = read(tmp_path / "a.toml")
    assert {Path(name).name: text for name, text in found.files.items()} == {
        "a.toml": extending("b.toml", "a"),
        "b.toml": extending("standard", "b"),
    }
    assert list(read("standard").files) == ["standard.toml"]


@pytest.mark.parametrize("extends", ["/etc/hostname.toml", "../b.toml", "b.toml", "./../../etc/passwd", "~/b.toml"])
def test_nothing_outside_the_files_is_reached(tmp_path: Path, extends: str) -> None:
    write(tmp_path, {"b.toml": RULE.format("b")})
    with pytest.raises(PolicyError, match=r"a\.toml:2:11: The extended file .* is not found in the bundle"):
        read_bundle({"a.toml": extending(extends, "a")}, "a.toml")


def test_a_file_may_have_the_name_of_a_built_in_policy() -> None:
    files = {"standard.toml": extending("./more/standard.toml", "a"), "more/standard.toml": extending("standard", "b")}
    policy = read_bundle(files, "standard.toml").policy
    assert [rule.id for rule in policy.rules if rule.id in {"a", "b"}] == ["a", "b"]
    assert len(policy.rules) == len(load("standard").rules) + 2


@pytest.mark.parametrize(
    ("files", "main", "said"),
    [
        ({"a.toml": RULE.format("a")}, "b.toml", r"File 'b\.toml' not found in the bundle"),
        ({}, "b.toml", r"File 'b\.toml' not found in the bundle"),
        ({"a.toml": extending("./a.toml", "a")}, "a.toml", r"a\.toml:2:11: The policy extends itself"),
        (
            {"a.toml": extending("b.toml", "a"), "b.toml": extending("x/../a.toml", "b")},
            "a.toml",
            r"b\.toml:2:11: The policy extends itself",
        ),
        ({"a.toml": extending("b.toml", "a"), "b.toml": "x"}, "a.toml", r"b\.toml:1:2: This is not TOML"),
        ({"a.toml": "x = '\ud800'"}, "a.toml", r"a\.toml:1:6: The file is not UTF-8"),
        ({"a.toml": "#" * (FILE_SIZE_MAX_BYTES + 1)}, "a.toml", r"a\.toml:1:1: The file is larger"),
        (
            {"a.toml": extending("b.toml", "a"), "b.toml": "#" * (FILE_SIZE_MAX_BYTES - 10)},
            "a.toml",
            r"a\.toml:2:11: The policy and the files it extends are larger",
        ),
        (
            {f"{i}.toml": extending(f"{i + 1}.toml", f"r{i}") for i in range(30)},
            "0.toml",
            r"16\.toml:2:11: More than 16 policies extend each other",
        ),
        (
            {f"{i}.toml": f"[policy]\nextends = './{i + 1}.toml'\n" + "".join(
                f'[[rule]]\nid = "r{i}-{j}"\noperations = "*"\noutstanding = ["@same"]\nverdict = "deny"\n'
                for j in range(100)) for i in range(3)} | {"3.toml": RULE.format("last")},
            "0.toml",
            r"0\.toml:\d+:1: The rules up to here expand to more than 10000",
        ),
    ],
)  # fmt: skip
def test_files_that_make_no_policy_are_refused(files: dict[str, str], main: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        read_bundle(files, main)


def test_a_link_that_gives_two_files_one_name_is_refused(tmp_path: Path) -> None:
    write(
        tmp_path, {"here/a.toml": extending("link/../a.toml", "a"), "there/a.toml": RULE.format("b"), "there/in/x": ""}
    )
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there" / "in")
    assert [rule.id for rule in load(tmp_path / "here" / "a.toml").rules] == ["a", "b"]
    with pytest.raises(PolicyError, match="the same name as another file"):
        bundle_of(tmp_path / "here" / "a.toml")
