"""A policy together with the text that it was read from, so that it can be kept and read again elsewhere.

The one place that knows how a text that is no file of this machine is read. Nothing outside it is ever opened for it:
what it extends is among its own files, or built in.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import tempfile
import tomllib
from importlib import resources
from pathlib import Path

import msgspec

from interlock.core.errors import PolicyError
from interlock.core.policy import Policy
from interlock.core.policy_switches import PolicyBundle
from interlock.policies import reading
from interlock.policies.reading import EXTENDS_DEPTH_MAX, FILE_SIZE_MAX_BYTES, PolicyText, builtin_names
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
        policy = digested(reading.load(name))
        bundle = builtin(name) if name in builtin_names() else bundle_of(Path(name))
        return Source(name=name, policy=policy, bundle=bundle)


def digested(policy: Policy) -> Policy:
    """The policy with the digest of what decides in it, unless its reading has given it one.

    Where its rules stand and what they say to people does not decide anything.
    """
    if policy.digest:
        return policy
    rules = [msgspec.structs.replace(rule, source="", because=None) for rule in policy.rules]
    decides = msgspec.json.encode((policy.outstanding_max, rules), order="deterministic")
    return msgspec.structs.replace(policy, digest=hashlib.sha256(decides).hexdigest())


def builtin(name: str) -> PolicyBundle:
    """The text of a built-in policy. Raises `PolicyError` if there is none of that name."""
    if name not in builtin_names():
        raise PolicyError(f"There is no built-in policy {name[:80]!r}.", remedy=nearest(name, builtin_names()))
    main = f"{name}.toml"
    text = (resources.files("interlock.policies") / "builtin" / main).read_text(encoding="utf-8")
    return PolicyBundle(main=main, files={main: text})


def bundle_of(path: Path) -> PolicyBundle:
    """The text of a policy file and of the files that it extends, named as seen from the folder that has them all.

    Raises:
        PolicyError: one of them cannot be read, or is named by an absolute path. Whether they are a policy is not
            looked at.
    """
    found: dict[Path, str] = {}
    latest = _absolute(path)
    while latest not in found and len(found) <= EXTENDS_DEPTH_MAX:
        found[latest] = text = _text(latest)
        extends = _extended(text)
        if extends is None:
            break
        if extends.startswith("/"):
            what = (
                f"{latest}:1: extends names the absolute path {extends[:80]!r}, which is nowhere but on this machine."
            )
            raise PolicyError(what, remedy="Name it by its path relative to this file.")
        latest = _absolute(latest.parent / extends)
    folder = os.path.commonpath([place.parent for place in found])
    files = {place.relative_to(folder).as_posix(): text for place, text in found.items()}
    return PolicyBundle(main=next(iter(files)), files=files)


def _absolute(path: Path) -> Path:
    # By its name alone: where links lead to is no business of who sends it elsewhere.
    return Path(os.path.abspath(path))  # noqa: PTH100


def _text(path: Path) -> str:
    """The text of a file, with its line ends as they are."""
    try:
        if not path.is_file():
            raise PolicyError(f"{path}:1: There is no such file.", remedy="Name a policy file or a built-in policy.")
        with path.open("rb") as file:
            data = file.read(FILE_SIZE_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path}:1: The file cannot be read: {error}.") from error
    if len(data) > FILE_SIZE_MAX_BYTES:
        raise PolicyError(f"{path}:1: The file is larger than {FILE_SIZE_MAX_BYTES} bytes; no policy is that long.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"{path}:{line}: The file is not UTF-8 text."
        raise PolicyError(what, remedy="Save it with the encoding UTF-8.") from error


def _extended(text: str) -> str | None:
    """The file that a text extends; None if it extends none, or is no policy at all: reading it says so."""
    try:
        extends = tomllib.loads(text)["policy"]["extends"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    is_file = isinstance(extends, str) and ("/" in extends or extends.endswith(".toml")) and "\0" not in extends
    return extends if is_file else None


def read(bundle: PolicyBundle) -> Policy:
    """The policy that a text says. Raises `PolicyError`."""
    return read_text(bundle).policy


def read_text(bundle: PolicyBundle) -> PolicyText:
    """The same with what only readers need; its places are named as the files are in the bundle.

    Raises:
        PolicyError: it is wrong, or extends a file that is not in the bundle.
    """
    for name, text in bundle.files.items():
        _check_inside(name, name)
        extends = _extended(text)
        if extends is not None:
            there = posixpath.normpath(posixpath.join(posixpath.dirname(name), extends))
            if there not in {posixpath.normpath(other) for other in bundle.files}:
                raise PolicyError(
                    f"{name}:1: extends names {extends[:80]!r}, which is not among the files that were sent.",
                    remedy="Send what it extends too.",
                )
    with tempfile.TemporaryDirectory(prefix="interlock-policy-") as folder:
        return _read_in(Path(folder), bundle)


def _check_inside(name: str, shown: str) -> None:
    path = posixpath.normpath(name)
    if name.startswith("/") or path.startswith("..") or path == "." or "\0" in name:
        raise PolicyError(f"{shown[:80]!r} is no name of a file in a bundle.", remedy="Name it by a relative path.")


def _read_in(folder: Path, bundle: PolicyBundle) -> PolicyText:
    """Read a bundle by way of files, which are gone afterwards."""
    prefix = f"{folder}/"
    try:
        for name, text in bundle.files.items():
            path = folder / posixpath.normpath(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode("utf-8"))
        found = reading.read(folder / posixpath.normpath(bundle.main))
    except PolicyError as error:
        raise PolicyError(error.message.replace(prefix, ""), remedy=error.remedy) from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise PolicyError(f"{bundle.main}:1: The files cannot be laid out as they are named: {why}.") from None
    rules = tuple(msgspec.structs.replace(rule, source=rule.source.replace(prefix, "")) for rule in found.policy.rules)
    policy = digested(msgspec.structs.replace(found.policy, rules=rules))
    return msgspec.structs.replace(found, policy=policy, source=found.source.replace(prefix, ""))
