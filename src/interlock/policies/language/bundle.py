"""A policy as texts: its files by name, and reading policies from them instead of the file system."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from importlib import resources
from pathlib import Path, PurePosixPath

import msgspec

from interlock.core.errors import PolicyError
from interlock.core.policy import Policy
from interlock.core.policy_switches import PolicyBundle
from interlock.policies.language.loader import PolicyText, builtin_names, files_of, load, read_sent
from interlock.policies.language.policy_files import SentShelf, named_beside
from interlock.policies.language.source_location import nearest, shown


def read_bundle(files: Mapping[str, str], main: str) -> PolicyText:
    """Read a policy from a bundle: `extends` names another of its files or a built-in policy.

    Raises:
        PolicyError: as `loader.read`.
    """
    shelf = SentShelf(files)
    file = shelf.file(main)
    if file is None:
        raise PolicyError(f"File {shown(main)} not found in the bundle.", remedy=nearest(main, sorted(files)))
    return read_sent(shelf, file)


def bundle_of(path: Path) -> PolicyBundle:
    """Return the texts of a policy file and of the files that it extends, by relative names.

    Raises:
        PolicyError: as `loader.read`; also for an extended file.
    """
    name = path.name
    named: dict[str, tuple[str, str]] = {}
    for file in files_of(path):
        if name in named and named[name][0] != file.identity:
            raise PolicyError(
                f"{file.name}:1:1: It would have the same name as another file of the bundle, {shown(name)}.",
                remedy="Extend it by a path without symbolic links.",
            )
        named[name] = (file.identity, file.text)
        if file.extends is not None:
            name = named_beside(name, file.extends)
    inside = _beneath(path, named)
    return PolicyBundle(main=inside[path.name], files={inside[name]: text for name, (_, text) in named.items()})


def _beneath(path: Path, names: Mapping[str, object]) -> dict[str, str]:
    """Return names relative to the common folder, without leading `..`."""
    upwards = max(PurePosixPath(name).parts.count("..") for name in names)
    parents = path.absolute().parent.parts[1:]
    prefix = posixpath.join("", *parents[len(parents) - upwards :]) if upwards else ""
    return {name: posixpath.normpath(posixpath.join(prefix, name)) for name in names}


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A policy, its name and its text at the time it was read."""

    name: str
    """The name of a built-in policy, or the path of a file."""
    policy: Policy
    bundle: PolicyBundle

    @staticmethod
    def read(name: str) -> Source:
        """Read a built-in or a file. Raises `PolicyError`, as `loader.load`."""
        policy = load(name)
        bundle = builtin(name) if name in builtin_names() else bundle_of(Path(name))
        return Source(name=name, policy=policy, bundle=bundle)


def builtin(name: str) -> PolicyBundle:
    """Return the text of a built-in policy. Raises `PolicyError` if it does not exist."""
    if name not in builtin_names():
        raise PolicyError(f"Built-in policy {name[:80]!r} not found.", remedy=nearest(name, builtin_names()))
    main = f"{name}.toml"
    text = (resources.files("interlock.policies") / "builtin" / main).read_text(encoding="utf-8")
    return PolicyBundle(main=main, files={main: text})


def read(bundle: PolicyBundle) -> Policy:
    """Read the policy of a bundle. Raises `PolicyError`."""
    return read_text(bundle).policy


def read_text(bundle: PolicyBundle) -> PolicyText:
    """Read the policy of a bundle with description and sets; errors name the bundle's files. Raises `PolicyError`."""
    return read_bundle(bundle.files, bundle.main)
