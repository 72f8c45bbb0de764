"""Whatever a policy file is made of, it is read or refused with its place: soon, in little memory, without a crash."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core.errors import PolicyError
from interlock.policies.language.bundle import read_bundle
from interlock.policies.language.loader import PolicyText, builtin_names, load
from interlock.policies.language.source_location import Positions
from tiers import tier

RULE = '[[rule]]\nid = "r"\noperations = ["stop"]\nverdict = "admit"\n'
PLACED = re.compile(r"[^\n]+?:[1-9]\d*:[1-9]\d*: [^\n]", re.DOTALL)
PROCESSOR_S_MAX: Final = 2.0
MEMORY_MIB_MAX: Final = 200

# Written to the file that is named by the first argument; tells how it went, in how much time and memory.
ONE_READING = """
import re, sys, time
from pathlib import Path
from interlock.core.errors import PolicyError
from interlock.policies.language.loader import load

begun = time.process_time()
try:
    said = f"{len(load(sys.argv[1]).rules)} rules"
except PolicyError as error:
    said = f"{error.message} {error.remedy}"
memory_mib = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024
print(f"{time.process_time() - begun} {memory_mib} {said}")
"""


def read(text: str) -> PolicyText:
    return read_bundle({"a.toml": text}, "a.toml")


def refusal(text: str) -> str:
    with pytest.raises(PolicyError) as caught:
        read(text)
    return caught.value.message


# ------------------------------------------------------------------------------------------------------ much of it


def rules(count: int, *lines: str) -> str:
    return "".join("\n".join(("[[rule]]", f'id = "r{i}"', 'verdict = "deny"', *lines, "")) for i in range(count))


SAME = ('operations = "*"', 'vm_state = ["@sources"]', 'task_state = ["*", "!@same"]', 'outstanding = ["@same"]')
LARGE: dict[str, tuple[Callable[[], str], str]] = {
    "ten megabytes": (lambda: "# a\n" * 2_500_000, ":1:1: The file is larger than"),
    "a million rules": (lambda: rules(1_000_000, 'operations = ["stop"]'), ":1:1: The file is larger than"),
    "many rules": (lambda: rules(5_000, 'operations = ["stop"]'), ":8001:1: A policy may have at most 2000 rules."),
    "many empty rules": (lambda: "[[rule]]\n" * 55_000, ":2001:1: A policy may have at most 2000 rules."),
    "many inline rules": (lambda: "rule = [" + "{}, " * 100_000 + "]", "more than 60000 keys"),
    "as many rules as may be": (
        lambda: rules(2_000, 'operations = ["@state"]', 'task_state = ["@stop"]'),
        "2000 rules",
    ),
    "rules for each operation": (lambda: rules(250, *SAME), "rules"),
    "too many rules for each operation": (lambda: rules(2_000, *SAME), "expand to more than 10000"),
    "many sets": (lambda: "[sets]\n" + "".join(f's{i} = ["stop"]\n' for i in range(20_000)), "at most 200 sets"),
    "a long set": (lambda: "[sets]\nx = [" + '"stop",' * 70_000 + "]\n" + RULE.replace("stop", "@x"), "1 rules"),
    "a long list": (lambda: RULE.replace('"stop"', '"stop",' * 70_000), "1 rules"),
    "a wrong word in a long list": (
        lambda: RULE.replace('"stop"', '"stop",' * 70_000 + '"stpo"'),
        ":3:490015: Unknown operation 'stpo'",
    ),
    "a long word": (lambda: RULE.replace("stop", "s" * 500_000), ":3:15: Unknown operation 'sss"),
    "a long key": (lambda: "k" * 500_000 + " = 1", ":1:1: Unknown section"),
    "a long dotted key": (
        lambda: "a" + ".a" * 250_000 + " = 1",
        ":1:1: This is not TOML within the limits of a policy",
    ),
    "many dotted keys": (
        lambda: "".join(f"[{'.'.join([f'a{i}'] * 15)}]\n" for i in range(4_500)),
        "more than 60000 keys, lists and tables",
    ),
    "many keys": (lambda: "".join(f"k{i} = 1\n" for i in range(45_000)), ":1:1: Unknown section 'k0'"),
    "many numbers": (lambda: "x = [" + "1," * 250_000 + "]", ":1:1: Unknown section 'x'"),
    "many tables": (lambda: "x = [" + "{a={b={}}}," * 45_000 + "]", "more than 60000 keys, lists and tables"),
    "deep lists": (
        lambda: "x = " + "[" * 500_000,
        ":1:37: This is not TOML within the limits of a policy: Lists or tables",
    ),
    "deep tables": (
        lambda: "x = " + "{a = " * 100_000,
        ":1:165: This is not TOML within the limits of a policy: Lists or",
    ),
    "a long number": (lambda: f"x = {'9' * 500_000}", ":1:5: This is not TOML within the limits of a policy: A number"),
    "a long number in a list": (
        lambda: f"x = [1, {'9' * 500_000}]",
        ":1:9: This is not TOML within the limits of a policy",
    ),
    "a long number in base 16": (lambda: RULE + f"silent_for = 0x{'F' * 500_000}", ":5:14: This is not TOML within"),
    "a string that does not end": (lambda: 'x = """' + '""a' * 150_000, "This is not TOML: Unterminated string"),
    "many thresholds": (
        lambda: '[policy]\nextends = "standard"\n[thresholds]\n' + "".join(f'k{i} = "5m"\n' for i in range(35_000)),
        ":4:1: Rule 'k0' not found in the extended policy",
    ),
    "many names": (lambda: "[names]\nreboot = [" + '"a",' * 100_000 + "]", ":2:10: reboot must be a name, or a list"),
    "many empty lines": (lambda: "\n" * 500_000 + "x", ":500001:2: This is not TOML"),
    "many quotes": (lambda: "'''" * 170_000, "This is not TOML"),
    "many escapes": (lambda: RULE + 'because = "' + "\\u0041" * 80_000 + '"', ":5:11: because must be a string"),
}


@pytest.mark.parametrize("name", LARGE)
def test_much_of_anything_takes_little_time_and_memory(tmp_path: Path, name: str) -> None:
    text, expected = LARGE[name]
    path = tmp_path / "large.toml"
    path.write_text(text())
    ran = subprocess.run([sys.executable, "-c", ONE_READING, path], capture_output=True, text=True, check=True)
    seconds, memory_mib, said = ran.stdout.split(" ", 2)
    assert expected in said.replace(str(path), "")
    assert len(said) < 1_000
    assert float(seconds) < PROCESSOR_S_MAX
    assert float(memory_mib) < MEMORY_MIB_MAX


# ------------------------------------------------------------------------------------------------- what is no file


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "loop.toml").symlink_to(tmp_path / "pool.toml")
    (tmp_path / "pool.toml").symlink_to(tmp_path / "loop.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "nowhere.toml").symlink_to("absent")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket.toml"))
    for name in ("pipe", "folder", "loop", "zero", "nowhere", "socket", "absent", "x" * 300, "a\0b"):
        path = tmp_path / f"{name}.toml"
        with pytest.raises(PolicyError) as caught:
            load(path)
        assert PLACED.match(caught.value.message), caught.value.message
        main = tmp_path / "main.toml"
        main.write_text(f'[policy]\nextends = "./{name}.toml"\n'.replace("\0", "\\u0000"))
        with pytest.raises(PolicyError) as caught:
            load(main)
        assert caught.value.message.startswith(f"{main}:2:11: "), caught.value.message
    listening.close()
    for name, kind in (("pipe", "a pipe"), ("folder", "a directory"), ("zero", "a device")):
        with pytest.raises(PolicyError, match=f"Not a regular file: {kind}"):
            load(tmp_path / f"{name}.toml")


def test_policies_that_extend_one_another_in_a_circle_are_refused(tmp_path: Path) -> None:
    for here, there in (("a", "./b"), ("b", "c"), ("c", "link/a")):
        (tmp_path / f"{here}.toml").write_text(
            f'[policy]\nextends = "{there}.toml"\n' + RULE.replace('"r"', f'"{here}"')
        )
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(PolicyError, match=r"c\.toml:2:11: The policy extends itself, through 'link/a\.toml'"):
        load(tmp_path / "a.toml")


def test_a_long_chain_of_policies_is_refused_where_it_becomes_too_long(tmp_path: Path) -> None:
    for i in range(40):
        text = f'[policy]\nextends = "{i + 1}.toml"\n' + RULE.replace('"r"', f'"r{i}"')
        (tmp_path / f"{i}.toml").write_text(text)
    with pytest.raises(PolicyError, match=r"16\.toml:2:11: More than 16 policies extend each other"):
        load(tmp_path / "0.toml")


# ------------------------------------------------------------------------------------------------------ odd things


@pytest.mark.parametrize(
    "time", ["-3m", "1e99s", "3 m", "٣m", "3м", "", "3", "1_000s", "∞", "99999999d", "3m\\n", "0x3s"]
)
def test_an_odd_time_is_refused_at_its_place(time: str) -> None:
    text = RULE.replace("admit", "after") + f'threshold = "{time}"\n'
    assert refusal(text).startswith("a.toml:5:13: Invalid threshold: '")
    assert refusal(RULE + f'  silent_for = "{time}"').startswith("a.toml:5:16: Invalid silent_for: '")


@pytest.mark.parametrize(
    "time", ["15", "1979-05-27", "1979-05-27T07:32:00Z", "07:32:00", "1e999", "nan", "true", '["3m"]', "{s = 3}"]
)
def test_what_is_no_text_is_no_time(time: str) -> None:
    assert refusal(RULE + f"silent_for = {time}").startswith("a.toml:5:14: Invalid silent_for: ")


@pytest.mark.parametrize(
    "name", ["p\u0430use", "\uff50", "r\u00e9", "a b", "-a", "", "\\u0000", "a\\nb", "x" * 101, "\u200br", "\\ue000"]
)
def test_an_id_of_other_letters_is_refused_at_its_place(name: str) -> None:
    assert refusal(RULE.replace('"r"', f'"{name}"')).startswith("a.toml:2:6: ")
    assert refusal(RULE + f'reason = "{name}"').startswith("a.toml:5:10: ")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a\0 = 1\n", "1:2"),
        ('x = "a\0"\n', "1:7"),
        ('x = "\\ud800"\n', "1:12"),
        ('x = "\\U00110000"\n', "1:16"),
        ("[policy]\nname = 'a'\nname = 'b'\n", "3:11"),
        ("[policy]\n[policy]\n", "2:8"),
        ("[sets]\na = ['stop']\n[sets]\n", "3:6"),
        (RULE + "tags = ['a\\u0000']", None),
        (RULE + 'tags = ["a\\u0000"]', "5:9"),
        (RULE + 'because = "a\\u001b[31m"', "5:11"),
        ('[policy]\nname = "a\\u0007"\n' + RULE, "2:8"),
        ("policy = 1979-05-27\n", "1:1"),
        ("policy = ['a']\n", "1:1"),
        ("[[policy]]\nname = 'a'\n", "1:1"),
        ("[policy]\nname = 1979-05-27\n", "2:8"),
        ("rule.id = 'x'\n", "1:1"),
        ("rule = ['x']\n", "1:1"),
        ("[policy]\nextends = ['standard']\n", "2:11"),
        ("[policy]\nextends = './a\\u0000.toml'\n", "2:11"),
        ("[policy]\noutstanding_max = 99999999999999999999999999999999999999999999\n", "2:19"),
        ("[policy]\noutstanding_max = inf\n", "2:19"),
        ("[policy]\noutstanding_max = 3.0\n", "2:19"),
        ("\ufeff\ufeff[policy]\n", "1:1"),
        ("x\r\n", "1:2"),
        ("# a\rb\n", "1:4"),
        ("[policy]\r\n\r\n  nam = 'x'\r\n", "3:3"),
        ("sets = {a = ['stop', 'stpo']}\n" + RULE, "1:22"),
        ("rule = [{id = 'a', operations = ['stop'], verdict = 'deny'}, {id = 'b', operations = ['x']}]", "1:62"),
        ("rule = [{id = 'a', verdict = 'deny', operations = ['stop', 'x']}]", "1:60"),
        ("[[rule]]\nid = 'a'\nverdict = 'deny'\noperations = [\n  'stop',  # [\n\t'x' ]", "6:2"),
        ("[[rule]]\nid = 'a'\nverdict = 'deny'\n\"operations\" = ['''\nstpo''']", "4:17"),
    ],
)  # fmt: skip
def test_an_odd_file_is_refused_at_its_place(text: str, place: str | None) -> None:
    if place is None:
        read(text)
    else:
        assert refusal(text).startswith(f"a.toml:{place}: "), refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + RULE,
        RULE.replace("\n", "\r\n"),
        'rule = [{id = "r", operations = ["stop"], verdict = "admit"}]',
        'policy.outstanding_max = 16\nrule = [{id = "r", "operations" = ["stop"], verdict = "admit"}]',
        '[[ rule ]]\n"id" = "r"\noperations = [\n"stop", # s\n]\nverdict = """admit"""\n',
    ],
)
def test_other_ways_to_write_the_same_are_read(text: str) -> None:
    assert read(text).policy.digest == read(RULE).policy.digest


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(("# é\n" + RULE).encode(encoding))
    with pytest.raises(PolicyError, match=rf"{path}:1:\d: The file is not UTF-8 text"):
        load(path)


# --------------------------------------------------------------------------------------------------------- mutations

TEXTS = {
    name: (resources.files("interlock.policies") / "builtin" / f"{name}.toml").read_text() for name in builtin_names()
}
PIECES = st.text(max_size=3) | st.sampled_from(
    [
        "[", "]", "{", "}", '"', "'", '"""', "=", ".", ",", "\n", "#", "!", "@", "*", "-", "0", "1e9", "\0", "\ufeff",
        "\u0430", "true", "[[rule]]", "[policy]", "extends", '"stop"', '"@same"', '"none"', "verdict", "threshold",
        "1979-05-27",
    ]
)  # fmt: skip


@st.composite
def mutations(draw: st.DrawFn) -> str:
    """The beginning of a built-in policy with some of it cut out, doubled, or replaced."""
    text = TEXTS[draw(st.sampled_from(sorted(TEXTS)))][: draw(st.integers(200, 4_000))]
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 60)))
        piece = draw(PIECES | st.just(text[start:end] * 2))
        text = text[:start] + piece + text[end:]
    return text


@settings(max_examples=tier(80, 2000))
@given(mutations())
def test_a_policy_that_was_changed_at_random_is_read_or_refused_with_a_place(text: str) -> None:
    said = None
    try:
        read(text)
    except PolicyError as error:
        said = error.message
    if said is None:
        return
    found = re.match(r"a\.toml:(\d+):(\d+): .", said)
    assert found is not None, said
    lines = [*text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n"), ""]
    line, column = int(found.group(1)), int(found.group(2))
    assert line <= len(lines), said
    assert column <= len(lines[line - 1]) + 1, said


KEYS = st.sampled_from(["a", "b-1", '"c d"', "'#'"])
STRINGS = st.sampled_from(['"x"', "'y]'", '"[\\"#"', '"""\n"a""b"""""', "'''\n''a'''", '""', "''"])
SCALARS = st.sampled_from(["1", "true", "1979-05-27 07:32:00", "0x1F", "-1.5e3", "inf"])
VALUES = st.recursive(
    STRINGS | SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[ {' , '.join(items)}]")
        | st.dictionaries(KEYS, inner, max_size=3).map(
            lambda table: "{" + ", ".join(f"{key} = {value}" for key, value in table.items()) + "}"
        )
    ),
    max_leaves=6,
)


@settings(max_examples=tier(40, 1000))
@given(
    before=st.lists(VALUES, max_size=3), wanted=VALUES, inside=st.lists(VALUES, max_size=3), spaces=st.integers(0, 3)
)
def test_the_place_of_an_item_is_where_it_was_put(
    before: list[str], wanted: list[str], inside: list[str], spaces: int
) -> None:
    text = "".join(f"k{number} = {value} # {value[0]}\n" for number, value in enumerate(before))
    text += f"[[t]]\n[[t]]\n{' ' * spaces}k = [" + "".join(f"\n# ]\n{value}," for value in inside) + " \t"
    at = len(text)
    text += f"{wanted} ]\n"
    expected = (text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at))
    assert Positions(text).of_value(("t", 1, "k", len(inside))) == expected
