"""What can be wished of the policy in force: another one, on which terms, or an earlier one."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from interlock.core.errors import Invalid
from interlock.core.policy_switches import Outstanding, PolicyBundle
from interlock.policies import sources

FileName = Annotated[
    str, Meta(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$", description="No control characters.")
]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]


class Terms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """On which terms a policy is put in force."""

    outstanding: Outstanding = Outstanding.KEEP
    """Whether requests admitted before keep their promise (`keep`) or are judged again (`rejudge`)."""
    explore_seconds: Seconds | None = None
    """How long its reachable states are walked before; 0 does not. What is left out is what the server is told."""
    dry_run: bool = False
    """Only prove it, and change nothing."""


class NewPolicy(Terms, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A policy to put in force: a built-in by its name, or the text of one."""

    name: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    """Of a built-in policy."""
    main: FileName | None = None
    """The name of the policy's own file among `files`."""
    files: Annotated[dict[FileName, str], Meta(max_length=64)] | None = None
    """The texts of the policy's own file and of those that it extends, by name."""


class OldPolicy(Terms, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An earlier policy to bring back."""

    to: Annotated[int, Meta(ge=1)] | None = None
    """The number of the switch that put it in force; if left out, what was in force before the present one."""


def bundle_of(wish: NewPolicy) -> PolicyBundle:
    """The text of the policy that is wished for. Raises `Invalid`, `PolicyError`."""
    if (wish.name is None) == (wish.main is None) or (wish.main is None) != (wish.files is None):
        raise Invalid(
            "A policy is named by `name`, or sent by `main` and `files`; one of the two.",
            remedy='Send {"name": "take2"}, or {"main": "site.toml", "files": {"site.toml": "…"}}.',
        )
    if wish.name is not None:
        return sources.builtin(wish.name)
    assert wish.main is not None
    assert wish.files is not None
    if wish.main not in wish.files:
        raise Invalid(f"main: there is no {wish.main[:80]!r} among the files.", remedy="Send the main file too.")
    return PolicyBundle(main=wish.main, files=wish.files)
