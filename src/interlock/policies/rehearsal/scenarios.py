"""Policy tests: rehearsal scripts with expected answers.

For `my-cloud.toml` they are `my-cloud.tests.jsonl` and every `.jsonl` file in `my-cloud.tests/`. A line is one JSON
object: an event with `expect`, or `{"test": "…"}`, which starts a scenario with a new instance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from interlock.core.errors import Invalid
from interlock.core.policy import CompiledPolicy, Policy, Rule
from interlock.core.views import View
from interlock.policies.language.loader import PolicyText
from interlock.policies.language.vocabulary import nearest
from interlock.policies.lint.findings import written
from interlock.policies.rehearsal.events import read_line
from interlock.policies.rehearsal.runner import Rehearsal

FILE_SIZE_MAX_BYTES: Final = 16 * 1024 * 1024
NAME_LENGTH_MAX: Final = 200
_COMMENTS: Final = ("#", "//")
_SHOWN_LENGTH: Final = 200
_encode: Final = msgspec.json.Encoder().encode


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One test as written."""

    name: str
    file: str
    line: int
    """Its first line."""
    events: tuple[tuple[int, str], ...]
    """Its lines, with their numbers."""


class Mismatch(msgspec.Struct, frozen=True, kw_only=True):
    """One key of an answer that differs from what was expected."""

    key: str
    expected: Any
    got: Any


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """The failure of a scenario. Later lines were not run."""

    place: str
    """`file:line`."""
    event: str
    """The line, as written."""
    message: str
    """One sentence."""
    differences: tuple[Mismatch, ...] = ()


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a scenario."""

    name: str
    place: str
    expectations: int
    """How many events had their answers compared."""
    failed: Failed | None = None


class Untouched(msgspec.Struct, frozen=True, kw_only=True):
    """A rule that decided no scenario."""

    rule: str
    place: str


class ScenarioResults(msgspec.Struct, frozen=True, kw_only=True):
    """The results of all scenarios of a policy, with rule coverage."""

    policy: str
    scenarios: tuple[Played, ...]
    rules: int
    """How many rules the policy's own file has."""
    untouched: tuple[Untouched, ...]
    """Those that decided nothing, in the order written."""
    inherited: int
    """How many rules it inherits."""
    inherited_touched: int

    @property
    def failures(self) -> int:
        return sum(one.failed is not None for one in self.scenarios)


class _Wrong(Exception):
    """A line failed."""

    def __init__(self, message: str, differences: tuple[Mismatch, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.differences = differences


def files_beside(policy: Path) -> tuple[Path, ...]:
    """Return the scenario files of a policy file, in the order they run; empty if there are none."""
    stem = policy.with_suffix("")
    single = stem.with_name(f"{stem.name}.tests.jsonl")
    folder = stem.with_name(f"{stem.name}.tests")
    inside = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    return (*((single,) if single.is_file() else ()), *inside)


def read_scenarios(path: Path) -> tuple[Scenario, ...]:
    """Parse the scenarios of a file. Lines before the first `test` are a scenario named after the file.

    Raises:
        Invalid: the file cannot be read, is too large or is not UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_SIZE_MAX_BYTES + 1)
        if len(data) > FILE_SIZE_MAX_BYTES:
            raise Invalid(f"{path}: The file is larger than {FILE_SIZE_MAX_BYTES} bytes.")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Invalid(
            f"{path}:{line}: The file is not UTF-8 text.", remedy="Save it with the encoding UTF-8."
        ) from error
    except (OSError, ValueError) as error:
        raise Invalid(f"{path}: The file cannot be read: {error}.") from error
    return tuple(_divided(text, path))


def _divided(text: str, path: Path) -> Iterator[Scenario]:
    name, begins, events = "", 0, list[tuple[int, str]]()
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith(_COMMENTS):
            continue
        title = _title(stripped)
        if title is None and begins:
            events.append((number, stripped))
            continue
        if begins:
            yield Scenario(name=name, file=str(path), line=begins, events=tuple(events))
        name, begins = title or path.name.removesuffix(".jsonl"), number
        events = [] if title else [(number, stripped)]
    if begins:
        yield Scenario(name=name, file=str(path), line=begins, events=tuple(events))


def _title(line: str) -> str | None:
    """Return the name of the test that the line starts; None for an event, valid or not."""
    try:
        content = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError):
        return None
    if not isinstance(content, dict) or set(content) != {"test"}:
        return None
    title = content["test"]
    return title if isinstance(title, str) and 0 < len(title) <= NAME_LENGTH_MAX else None


def run(policy: Policy | PolicyText, scenarios: Iterable[Scenario]) -> ScenarioResults:
    """Run every scenario on a new instance, and record which rules decided."""
    subject = policy.policy if isinstance(policy, PolicyText) else policy
    watched = _Watched(subject)
    played = tuple(_play(scenario, watched) for scenario in scenarios)
    rules = written(subject.rules)
    source = policy.source if isinstance(policy, PolicyText) else None
    own = [one for one in rules if source is None or one.file == source]
    touched = {one.id for one in rules if any(subject.rules[number].id in watched.touched for number in one.numbers)}
    return ScenarioResults(
        policy=source or subject.name,
        scenarios=played,
        rules=len(own),
        untouched=tuple(
            Untouched(rule=one.id, place=one.rule.source) for one in own if one.id not in touched
        ),
        inherited=len(rules) - len(own),
        inherited_touched=sum(one.id in touched for one in rules) - sum(one.id in touched for one in own),
    )  # fmt: skip


class _Watched(CompiledPolicy):
    """A policy that records which of its rules decided."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.touched: set[str] = set()

    def decide(self, view: View) -> Rule:
        rule = super().decide(view)
        self.touched.add(rule.id)
        return rule


def _play(scenario: Scenario, policy: CompiledPolicy) -> Played:
    stage = Rehearsal(policy)
    expectations = 0
    place = f"{scenario.file}:{scenario.line}"
    for number, line in scenario.events:
        try:
            expectations += _step(stage, line)
        except _Wrong as wrong:
            failed = Failed(
                place=f"{scenario.file}:{number}",
                event=line if len(line) <= _SHOWN_LENGTH else line[:_SHOWN_LENGTH] + "…",
                message=wrong.message,
                differences=wrong.differences,
            )
            return Played(name=scenario.name, place=place, expectations=expectations, failed=failed)
    if expectations:
        return Played(name=scenario.name, place=place, expectations=expectations)
    idle = 'No event of it has an "expect", so it would pass whatever the policy said.'
    return Played(name=scenario.name, place=place, expectations=0, failed=Failed(place=place, event="", message=idle))


def _step(stage: Rehearsal, line: str) -> bool:
    """Run one line; return whether its answer was compared. Raises `_Wrong`."""
    try:
        content = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _Wrong(f"This is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise _Wrong('A line is one JSON object: an event, or {"test": "…"}.')
    if "test" in content:
        raise _Wrong(f'A scenario begins with {{"test": "…"}} alone, with a name of 1 to {NAME_LENGTH_MAX} characters.')
    expected = content.pop("expect", None)
    if expected is not None and not isinstance(expected, dict):
        raise _Wrong('"expect" must be an object with the keys of the answer that matter.')
    try:
        answer = msgspec.json.decode(_encode(stage.play(*read_line(_encode(content)))))
    except Invalid as error:
        raise _Wrong(f"{error.message} {error.remedy}" if error.remedy else error.message) from error
    if expected is None:
        return False
    differences = tuple(_differences(expected, answer))
    if differences:
        raise _Wrong("The answer is not what was expected.", differences)
    return bool(expected)


def _differences(expected: dict[str, Any], answer: dict[str, Any]) -> Iterator[Mismatch]:
    for key, value in expected.items():
        if key not in answer:
            raise _Wrong(f"The answer has no key {key!r}. {nearest(key, answer)}")
        if not _equal(value, answer[key]):
            yield Mismatch(key=key, expected=value, got=answer[key])


def _equal(expected: Any, got: Any) -> bool:
    """Compare as JSON does: true is not 1."""
    if isinstance(expected, bool) or isinstance(got, bool):
        return expected is got
    if isinstance(expected, dict) and isinstance(got, dict):
        return expected.keys() == got.keys() and all(_equal(value, got[key]) for key, value in expected.items())
    if isinstance(expected, list) and isinstance(got, list):
        return len(expected) == len(got) and all(map(_equal, expected, got))
    return bool(expected == got)


def read_all(files: Sequence[Path]) -> tuple[Scenario, ...]:
    """Return the scenarios of several files, in order. Raises `Invalid`."""
    return tuple(scenario for path in files for scenario in read_scenarios(path))
