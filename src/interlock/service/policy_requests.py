"""Request bodies to load a policy or to roll back to an earlier one."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from interlock.core.errors import Invalid
from interlock.core.policy_switches import Outstanding, PolicyBundle
from interlock.policies.certificates import SignedCertificate
from interlock.policies.language import bundle as bundles

FileName = Annotated[
    str, Meta(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$", description="No control characters.")
]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]


class Terms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options for activating a policy."""

    outstanding: Outstanding = Outstanding.KEEP
    """Whether requests admitted before keep their promise (`keep`) or are judged again (`rejudge`)."""
    explore_seconds: Seconds | None = None
    """Time limit of the exploration of its reachable states; 0 skips it. Default: the server's configuration."""
    dry_run: bool = False
    """Only verify it."""


class NewPolicy(Terms, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A policy to activate: a built-in by name, or its text."""

    name: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    """A built-in policy."""
    main: FileName | None = None
    """The name of the policy's own file among `files`."""
    files: Annotated[dict[FileName, str], Meta(max_length=64)] | None = None
    """The texts of the policy's own file and of those that it extends, by name."""
    certificate: SignedCertificate | None = None
    """A signed certificate of `interlock policy explore`, in place of an exploration by the server."""


class OldPolicy(Terms, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rollback to an earlier policy."""

    to: Annotated[int, Meta(ge=1)] | None = None
    """The number of the switch that activated it; by default the policy before the active one."""


def bundle_of(new: NewPolicy) -> PolicyBundle:
    """Return the text of the policy. Raises `Invalid`, `PolicyError`."""
    if (new.name is None) == (new.main is None) or (new.main is None) != (new.files is None):
        raise Invalid(
            "Invalid policy: expected either `name`, or `main` and `files`.",
            remedy='Send {"name": "take2"}, or {"main": "site.toml", "files": {"site.toml": "…"}}.',
        )
    if new.name is not None:
        return bundles.builtin(new.name)
    assert new.main is not None
    assert new.files is not None
    if new.main not in new.files:
        raise Invalid(f"main: {new.main[:80]!r} not found in files.", remedy="Send the main file too.")
    return PolicyBundle(main=new.main, files=new.files)
