"""Writes docs/reference/library.md: the public names of the library, from their signatures and docstrings.

.venv/bin/python tools/library_reference.py > docs/reference/library.md
"""

from __future__ import annotations

import enum
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any, Final

import msgspec

PACKAGES: Final = (
    "interlock.core",
    "interlock.policies",
    *(
        f"interlock.policies.{name}"
        for name in ("comparison", "explanation", "lint", "rehearsal", "fleet", "model_checker")
    ),
    "interlock.stores",
)
_HEAD: Final = """\
# Library

The public names of `interlock.core`, `interlock.policies` and `interlock.stores`, generated from their docstrings.
[Embed the gate](../guides/embed-the-gate.md) shows how they are used. A record is a frozen `msgspec.Struct`; a field
with `=` has a default.
"""
_CONSTANTS: Final = {
    "CATALOGUE": "For each `Operation` its `Entry`: lane, phases, sources and target state.",
    "DEFAULT_STATES_MAX": "How many states `explore` visits unless it is given another limit.",
    "Disposition": "What the gate answers: `Admitted`, `Redundant`, `Denied` or `Held`.",
    "KINDS": "For each code of a finding its `FindingKind`, the most serious first.",
    "NO_TASK": "The task state of an instance without a state change in flight.",
}


def page() -> str:
    """Return the page as Markdown."""
    return "\n".join((_HEAD, *(line for package in PACKAGES for line in _package(package))))


def _package(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    yield f"## {name}\n"
    yield f"{_paragraphs(module.__doc__)}\n"
    names = [(public, getattr(module, public)) for public in module.__all__]
    functions = [(public, value) for public, value in names if inspect.isfunction(value)]
    for public, function in functions:
        yield f"### {public}\n\n```python\n{public}{_signature(function)}\n```\n\n{_paragraphs(function.__doc__)}\n"
    yield "| name | kind | what it is |\n|---|---|---|"
    for public, value in names:
        if not inspect.isfunction(value):
            yield f"| `{public}` | {_kind(value)} | {_CONSTANTS.get(public) or _summary(value)} |"
    yield ""


def _signature(function: Any) -> str:
    text = str(inspect.signature(function)).replace("'", "")
    if len(text) < 100:  # noqa: PLR2004 - a line
        return text
    inner, _, returned = text[1:].rpartition(") -> ")
    parameters = re.sub(r", (?=[*\w]+:|\*, )", ",\n    ", inner)
    return f"(\n    {parameters},\n) -> {returned}"


def _paragraphs(text: str | None) -> str:
    """Return a docstring as Markdown, its section `Raises:` as a list."""
    lines = inspect.cleandoc(text or "").replace("|", r"\|").splitlines()
    return "\n".join(re.sub(r"^    (\w+): ", r"* `\1`: ", line) for line in lines)


def _kind(value: Any) -> str:
    for base, kind in ((enum.Enum, "enumeration"), (Exception, "error"), (msgspec.Struct, "record"), (object, "class")):
        if isinstance(value, type) and issubclass(value, base):
            return kind
    return "constant"


def _summary(value: Any) -> str:
    summary = inspect.cleandoc(value.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    if issubclass(value, enum.Enum):
        return f"{summary} {', '.join(f'`{member.name}`' for member in value)}"
    if issubclass(value, msgspec.Struct):
        optional = {field.name for field in msgspec.structs.fields(value) if not field.required}
        fields = (f"`{name}=`" if name in optional else f"`{name}`" for name in value.__struct_fields__)
        return f"{summary} Fields: {', '.join(fields)}".replace("|", r"\|")
    return summary


if __name__ == "__main__":
    sys.stdout.write(page())
