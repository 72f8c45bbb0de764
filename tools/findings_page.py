"""docs/reference/findings.md: the kinds of findings of `interlock policy check`, from their table."""

from __future__ import annotations

from collections.abc import Iterator

from interlock.policies.lint import KINDS, FindingKind


def findings_page() -> str:
    """Return the page."""
    return "\n".join([*_lines(), ""])


def _lines() -> Iterator[str]:
    yield "# Findings of `interlock policy check`"
    yield ""
    yield "<!-- Written by tools/draw_docs.py; edit src/interlock/policies/lint/finding_kinds.py instead. -->"
    yield ""
    yield "Each finding has a stable code. `interlock policy check --explain CODE` prints what is here."
    yield "Findings of one kind are grouped, the most serious first; `--verbose` prints each. An error keeps a policy"
    yield "from being loaded."
    yield ""
    yield "| code | severity | what is wrong |"
    yield "|---|---|---|"
    yield from (
        f"| [`{kind.code}`](#{kind.code}) | {kind.severity.value} | {kind.several} |" for kind in KINDS.values()
    )
    for kind in KINDS.values():
        yield from _section(kind)


def _section(kind: FindingKind) -> Iterator[str]:
    yield ""
    yield f"## {kind.code}"
    yield ""
    yield f"*{kind.severity.value.capitalize()}.* {kind.meaning}"
    yield ""
    yield f"**Remedy:** {kind.remedy}"
    if kind.example:
        yield ""
        yield "```toml"
        yield kind.text().rstrip()
        yield "```"
