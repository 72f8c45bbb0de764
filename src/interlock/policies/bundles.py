"""A policy that is sent: its main file, and the files that it extends, by their names."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from interlock.core.errors import PolicyError
from interlock.policies.places import nearest, shown
from interlock.policies.policy_files import SentShelf, named_beside
from interlock.policies.reading import PolicyText, files_of, read_sent


def read_bundle(files: Mapping[str, str], main: str) -> PolicyText:
    """Read a policy of which all files were sent: `extends` leads to another of them or to a built-in.

    Raises:
        PolicyError: as `reading.read`.
    """
    shelf = SentShelf(files)
    file = shelf.file(main)
    if file is None:
        raise PolicyError(
            f"There is no file {shown(main)} among those that were sent.", remedy=nearest(main, sorted(files))
        )
    return read_sent(shelf, file)


def bundle_of(path: Path) -> tuple[dict[str, str], str]:
    """The texts of a policy file and of all that it extends, by names that lead to one another, and the main one's.

    Raises:
        PolicyError: as `reading.read`; also if what is wrong is in a file that is extended.
    """
    name = path.name
    named: dict[str, tuple[str, str]] = {}
    for file in files_of(path):
        if name in named and named[name][0] != file.identity:
            raise PolicyError(
                f"{file.name}:1:1: It would have the same name as another file that is sent with it, {shown(name)}.",
                remedy="Extend it by a path without symbolic links.",
            )
        named[name] = (file.identity, file.text)
        if file.extends is not None:
            name = named_beside(name, file.extends)
    inside = _beneath(path, named)
    return {inside[name]: text for name, (_, text) in named.items()}, inside[path.name]


def _beneath(path: Path, names: Mapping[str, object]) -> dict[str, str]:
    """New names, of which none leads upwards out of the folder that holds all the files."""
    upwards = max(PurePosixPath(name).parts.count("..") for name in names)
    parents = path.absolute().parent.parts[1:]
    prefix = posixpath.join("", *parents[len(parents) - upwards :]) if upwards else ""
    return {name: posixpath.normpath(posixpath.join(prefix, name)) for name in names}
