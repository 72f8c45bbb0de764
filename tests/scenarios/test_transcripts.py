"""Every transcript in this folder is what `rehearse` answers, word for word.

A transcript is a text file: `policy NAME` begins a rehearsal of that policy, `> ` is an event, `< ` the answer to it,
`#` a comment. `pytest tests/scenarios --rewrite` writes the answers anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from interlock.policies.language.loader import compile_named
from interlock.policies.rehearsal.runner import rehearse

FOLDER = Path(__file__).parent
TRANSCRIPTS = sorted(FOLDER.glob("*.txt"))


def performed(lines: list[str]) -> list[str]:
    """The transcript with the answers that are given now."""
    written: list[str] = []
    script: list[str] = []
    policy = ""
    answered = 0
    for line in lines:
        if line.startswith("policy "):
            policy, script, answered = line.removeprefix("policy ").strip(), [], 0
        if not line.startswith("< "):
            written.append(line)
        if line.startswith("> "):
            # The whole script is played again for each event: what was said before must not depend on what follows.
            script.append(line.removeprefix("> "))
            answers = list(rehearse(script, compile_named(policy)))
            assert len(answers) == answered + 1
            written.append(f"< {answers[-1].decode()}")
            answered += 1
    return written


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda path: path.stem)
def test_a_transcript_is_what_is_answered(transcript: Path, request: pytest.FixtureRequest) -> None:
    lines = transcript.read_text().splitlines()
    now = performed(lines)
    assert sum(line.startswith("> ") for line in now) >= 3
    if request.config.getoption("--rewrite", default=False):
        transcript.write_text("\n".join(now) + "\n")
        return
    assert now == lines


def test_there_are_transcripts_and_each_kind_of_line_is_known() -> None:
    assert TRANSCRIPTS
    for transcript in TRANSCRIPTS:
        for line in transcript.read_text().splitlines():
            assert line == "" or line.startswith(("#", "policy ", "> ", "< ")), (transcript.name, line)
