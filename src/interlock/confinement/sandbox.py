"""Command lines that confine a program: no privileges, resource limits, namespaces, and few files in view.

The namespaces are made by bubblewrap (`bwrap`): by root, who then changes to an unprivileged user, or in a user
namespace. The program sees a read-only file system with itself, the system's libraries and what `View` names.
"""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

BWRAP: Final = "bwrap"
WORKING_FOLDER: Final = "/run/inside"
"""Where a program in namespaces sees its working folder."""
_OVERFLOW: Final = 65_534
"""The kernel's overflow uid."""
_SETPRIV_NEEDS: Final = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
_LIBRARIES: Final = ("/lib", "/lib32", "/lib64", "/libx32", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32")
_LOADER_CACHE: Final = Path("/etc/ld.so.cache")
_DEVICES: Final = (Path("/dev/null"), Path("/dev/zero"), Path("/dev/urandom"))
_PROBE_S: Final = 10.0


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """An unprivileged user that programs run as."""

    user_id: int
    group_id: int
    group_ids: tuple[int, ...] = ()
    """Further groups."""


def nobody() -> Account:
    """Return the account `nobody`."""
    try:
        found = pwd.getpwnam("nobody")
    except KeyError:
        return Account(user_id=_OVERFLOW, group_id=_OVERFLOW)
    return Account(user_id=found.pw_uid, group_id=found.pw_gid)


class Namespaces(StrEnum):
    """How namespaces are made on this host."""

    NONE = "none"
    """Not at all: the program has those of its parent."""
    BY_ROOT = "by root"
    IN_USER_NAMESPACE = "in a user namespace"


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What a program can reach of the host. Without namespaces, only `folder` has an effect."""

    folder: Path
    """Its working folder."""
    whole: bool = True
    """Whether it sees its working folder, at `WORKING_FOLDER`; else only what `files` and `written` have of it."""
    files: tuple[Path, ...] = ()
    """Files and folders that it can read, besides its program and the system's libraries. Missing ones are left out."""
    written: tuple[Path, ...] = ()
    """Existing files that it may write to; permissions apply as well."""
    devices: tuple[Path, ...] = ()
    """Devices besides null, zero and urandom."""
    network: bool = False
    """Whether it shares the host's network."""
    processes: bool = True
    """Whether it sees its own processes, in /proc."""


class Namespaced(msgspec.Struct, frozen=True, kw_only=True):
    """The result of trying to make namespaces."""

    namespaces: Namespaces
    because: str
    """Why there are none, for people; empty if there are."""


def confined(
    command: Sequence[str],
    view: View,
    limits: Sequence[str],
    to: Account | None,
    marks: Sequence[str] = (),
    *,
    namespaces: Namespaces = Namespaces.NONE,
    report: int | None = None,
    dies_with_parent: bool = False,
) -> list[str]:
    """Wrap a command to run confined.

    Args:
        command: the program, by name or path, and its arguments.
        view: what it can reach.
        limits: options of prlimit(1).
        to: the user that it runs as; None: that of this process, which is not root then.
        marks: environment variables besides PATH, as NAME=VALUE.
        namespaces: how its namespaces are made. It is then the child of a process that waits for it, and process 1 of
            its own namespace.
        report: the number of a descriptor to which the process id of that child is written, as JSON (`child-pid`).
        dies_with_parent: whether it is killed when the thread that started it ends, and stays in its process group;
            else it has a session of its own. Kill the group: a child that waits for its namespaces outlives its parent.
    """
    apart = namespaces is not Namespaces.NONE
    words = ["env", "-i", f"--chdir={'/' if apart else view.folder}", f"PATH={os.environ.get('PATH', os.defpath)}"]
    words += [*marks, "prlimit", *limits, "--"]
    program = command[0]
    if apart:
        program = shutil.which(program) or program
        words += _bwrap(view, Path(program), namespaces, changes_user=to is not None)
        words += [] if report is None else ["--info-fd", str(report)]
        words += ["--die-with-parent" if dies_with_parent else "--new-session", "--"]
    if to is not None or not apart:
        # A change of user forgets that the process is to die with its parent.
        death = ["--pdeathsig", "KILL"] if dies_with_parent else []
        words += [shutil.which("setpriv") or "setpriv", "--no-new-privs", *_unprivileged(to), *death, "--"]
    return [*words, program, *command[1:]]


def _unprivileged(to: Account | None) -> list[str]:
    if to is None:
        return []
    groups = "--groups=" + ",".join(map(str, to.group_ids)) if to.group_ids else "--clear-groups"
    return [f"--reuid={to.user_id}", f"--regid={to.group_id}", groups, "--inh-caps=-all", "--bounding-set=-all"]


def _bwrap(view: View, program: Path, namespaces: Namespaces, *, changes_user: bool) -> list[str]:
    words = [BWRAP, "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--as-pid-1"]
    words += [] if view.network else ["--unshare-net"]
    words += ["--cap-drop", "ALL"]
    needed = [program]
    if namespaces is Namespaces.IN_USER_NAMESPACE:
        words.append("--unshare-user")
    if changes_user:
        # bwrap sets no-new-privs; these capabilities end with the change of the user.
        words += [word for capability in _SETPRIV_NEEDS for word in ("--cap-add", capability)]
        needed.append(Path(shutil.which("setpriv") or "setpriv"))
    links = [path for path in map(Path, _LIBRARIES) if path.is_symlink()]
    trees = [path for path in map(Path, _LIBRARIES) if path.is_dir() and not path.is_symlink()]
    shown = [*trees, _LOADER_CACHE, *needed, *view.files]
    # bwrap makes a missing parent readable to its owner alone.
    place = WORKING_FOLDER if view.whole else str(view.folder)
    named = (*shown, *view.written, *_DEVICES, *view.devices, Path(place, "file"))
    folders = {parent for path in named for parent in path.parents}
    words += [word for folder in sorted(folders - {Path("/")}) for word in ("--dir", str(folder))]
    words += [word for link in links for word in ("--symlink", str(link.readlink()), str(link))]
    words += [word for path in shown for word in ("--ro-bind-try", str(path), str(path))]
    words += [word for path in (*_DEVICES, *view.devices) for word in ("--dev-bind", str(path), str(path))]
    words += [word for path in view.written for word in ("--bind", str(path), str(path))]
    words += ["--proc", "/proc"] if view.processes else []
    words += ["--ro-bind", str(view.folder), place] if view.whole else []
    return [*words, "--remount-ro", "/", "--chdir", place]


def namespaces_for(to: Account | None) -> Namespaced:
    """Try to make namespaces for a process that runs as `to`. Blocks for some milliseconds, once.

    Returns:
        How they are made on this host, or why they cannot be.
    """
    return _tried(changes_user=to is not None)


@functools.cache
def _tried(*, changes_user: bool) -> Namespaced:
    to = nobody() if changes_user else None
    if shutil.which(BWRAP) is None:
        return Namespaced(namespaces=Namespaces.NONE, because=f"{BWRAP} is not installed (package bubblewrap)")
    made = Namespaces.BY_ROOT if os.geteuid() == 0 else Namespaces.IN_USER_NAMESPACE
    words = confined(["true"], View(folder=Path("/usr/lib")), ["--core=0"], to, namespaces=made)
    try:
        tried = subprocess.run(words, capture_output=True, timeout=_PROBE_S, check=False)  # noqa: S603 - our own words
    except (OSError, subprocess.TimeoutExpired) as error:
        return Namespaced(namespaces=Namespaces.NONE, because=f"{BWRAP} cannot be run: {error}")
    if tried.returncode == 0:
        return Namespaced(namespaces=made, because="")
    lines = tried.stderr.decode("utf-8", "replace").strip().splitlines()
    why = lines[-1] if lines else f"exit status {tried.returncode}"
    return Namespaced(namespaces=Namespaces.NONE, because=f"{BWRAP} cannot make namespaces: {why}")
