"""A policy together with the text that it was read from, so that it can be kept and read again elsewhere.

Nothing outside its bundle is ever opened for a text that is no file of this machine: what it extends is among its own
files, or built in (see `bundles`).
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec

from interlock.core.errors import PolicyError
from interlock.core.policy import Policy
from interlock.core.policy_switches import PolicyBundle
from interlock.policies import bundles, reading
from interlock.policies.places import nearest
from interlock.policies.reading import PolicyText, builtin_names


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A policy by the name under which it is found, as it was when it was read."""

    name: str
    """Of a built-in, or the path of a file."""
    policy: Policy
    bundle: PolicyBundle

    @staticmethod
    def read(name: str) -> Source:
        """Read a built-in or a file. Raises `PolicyError`, as `reading.load`."""
        policy = reading.load(name)
        bundle = builtin(name) if name in builtin_names() else bundle_of(Path(name))
        return Source(name=name, policy=policy, bundle=bundle)


def builtin(name: str) -> PolicyBundle:
    """The text of a built-in policy. Raises `PolicyError` if there is none of that name."""
    if name not in builtin_names():
        raise PolicyError(f"There is no built-in policy {name[:80]!r}.", remedy=nearest(name, builtin_names()))
    main = f"{name}.toml"
    text = (resources.files("interlock.policies") / "builtin" / main).read_text(encoding="utf-8")
    return PolicyBundle(main=main, files={main: text})


def bundle_of(path: Path) -> PolicyBundle:
    """The text of a policy file and of the files that it extends. Raises `PolicyError`, as `reading.load`."""
    files, main = bundles.bundle_of(path)
    return PolicyBundle(main=main, files=files)


def read(bundle: PolicyBundle) -> Policy:
    """The policy that a text says. Raises `PolicyError`."""
    return read_text(bundle).policy


def read_text(bundle: PolicyBundle) -> PolicyText:
    """The same with what only readers need; its places are named as the bundle's files. Raises `PolicyError`."""
    return bundles.read_bundle(bundle.files, bundle.main)
