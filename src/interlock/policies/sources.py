"""A policy together with the text that it was read from, so that it can be kept and read again elsewhere."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec

from interlock.core.errors import PolicyError
from interlock.core.policy import Policy
from interlock.core.policy_switches import PolicyBundle
from interlock.policies.reading import builtin_names, load
from interlock.policies.vocabulary import nearest


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A policy by the name under which it is found, as it was when it was read."""

    name: str
    """Of a built-in, or the path of a file."""
    policy: Policy
    bundle: PolicyBundle

    @staticmethod
    def read(name: str) -> Source:
        """Read a built-in or a file. Raises `PolicyError`, as `reading.load`."""
        policy = load(name)
        if name in builtin_names():
            return Source(name=name, policy=policy, bundle=builtin(name))
        try:
            from interlock.policies.bundles import bundle_of
        except ImportError:  # TEMPORARY
            path = Path(name)
            return Source(
                name=name, policy=policy, bundle=PolicyBundle(main=path.name, files={path.name: path.read_text()})
            )
        files, main = bundle_of(Path(name))
        return Source(name=name, policy=policy, bundle=PolicyBundle(main=main, files=dict(files)))


def builtin(name: str) -> PolicyBundle:
    """The text of a built-in policy. Raises `PolicyError` if there is none of that name."""
    if name not in builtin_names():
        raise PolicyError(f"There is no built-in policy {name[:80]!r}.", remedy=nearest(name, builtin_names()))
    main = f"{name}.toml"
    text = (resources.files("interlock.policies") / "builtin" / main).read_text(encoding="utf-8")
    return PolicyBundle(main=main, files={main: text})


def read(bundle: PolicyBundle) -> Policy:
    """The policy that a text says. Raises `PolicyError`."""
    from interlock.policies.bundles import read_bundle

    return read_bundle(bundle.files, bundle.main).policy
