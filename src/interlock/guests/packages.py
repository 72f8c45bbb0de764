"""Finds, downloads and reads Debian packages without installing them.

apt downloads them, and verifies them against the signed package lists. Files are read from the archive by name; nothing
is executed or unpacked to its path.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from email.parser import Parser
from pathlib import Path

import msgspec

from interlock.core.errors import Unavailable
from interlock.images import subprocess_runner

_ASK_S = 60.0
_DOWNLOAD_S = 900.0
_MEMBER_BYTES_MAX = 512 << 20
_OTHER_SYSTEMS = (
    "On a system that is not Debian or Ubuntu, bring a kernel and initial file system of your own: "
    "`interlock image add`."
)
_NEW_LISTS = "Run `sudo apt-get update`, then try again."


class Package(msgspec.Struct, frozen=True, kw_only=True):
    """An available version of a package."""

    name: str
    version: str
    sha256: str | None
    """Signed checksum of the file; None for a package that is only in the cache."""
    depends: tuple[str, ...]
    """Names of its dependencies, the first of alternatives."""
    file: Path | None = None
    """The file of a package that is only in the cache."""


class PackageSource:
    """Finds packages with apt and downloads them to `cache`.

    Without apt lists (an offline machine), the `.deb` files in `cache` are used.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._kept: dict[str, Package] | None = None
        self._shown: dict[str, Package] = {}

    def ask(self, names: tuple[str, ...]) -> None:
        """Look up several packages that `find` may be called for, at once.

        apt reads all of its lists in each call, which takes most of a second where it keeps no cache of them.

        Raises:
            Unavailable: this system has no apt.
        """
        shown = _run(["apt-cache", "show", "--no-all-versions", *names], _ASK_S)
        for control in shown.output.decode("utf-8", "replace").split("\n\n"):
            if control.strip():
                package = _described(control)
                self._shown.setdefault(package.name, package)

    def find(self, name: str) -> Package | None:
        """Return the installation candidate of that name, or None.

        Raises:
            Unavailable: this system has no apt.
        """
        if name in self._shown:
            return self._shown[name]
        shown = _run(["apt-cache", "show", "--no-all-versions", name], _ASK_S)
        if shown.status == 0 and shown.output.strip():
            return _described(shown.output.decode("utf-8", "replace"))
        if self._kept is None:
            self._kept = {kept.name: kept for kept in self._read_cache()}
        return self._kept.get(name)

    def fetch(self, package: Package) -> Path:
        """Return the package's file; download it unless it is in the cache.

        Raises:
            Unavailable: it could not be downloaded.
        """
        if package.file is not None:
            return package.file
        kept = self._cache / f"{package.name}_{package.version.replace(':', '%3a')}.deb"
        if kept.is_file() and _sha256(kept) == package.sha256:
            return kept
        with tempfile.TemporaryDirectory(prefix=".download-", dir=self._cache) as folder:
            # As root, apt would drop to a user that cannot write here.
            command = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"]
            ended = _run([*command, f"{package.name}={package.version}"], _DOWNLOAD_S, Path(folder))
            files = list(Path(folder).glob("*.deb"))
            if ended.status != 0 or len(files) != 1:
                raise Unavailable(
                    f"The package {package.name} {package.version} could not be downloaded: {ended.complaint}.",
                    remedy=f"See that this machine reaches its package mirror. {_NEW_LISTS}",
                )
            files[0].replace(kept)
        return kept

    def _read_cache(self) -> Iterator[Package]:
        for file in sorted(self._cache.glob("*.deb")):
            shown = _run(["dpkg-deb", "--field", str(file), "Package", "Version", "Depends"], _ASK_S)
            if shown.status == 0:
                yield msgspec.structs.replace(_described(shown.output.decode("utf-8", "replace")), file=file)


def closure(source: PackageSource, first: Package, wanted: re.Pattern[str]) -> tuple[Package, ...]:
    """Return `first` and its transitive dependencies whose names match `wanted`.

    Raises:
        Unavailable: one of them is not available.
    """
    found: dict[str, Package] = {}
    open_names = [first.name]
    while open_names:
        name = open_names.pop()
        if name in found:
            continue
        package = first if name == first.name else source.find(name)
        if package is None:
            raise Unavailable(f"Package {name}, a dependency of {first.name}, not found.", remedy=_NEW_LISTS)
        found[name] = package
        open_names.extend(needed for needed in package.depends if wanted.match(needed))
    return tuple(found.values())


def find_first(source: PackageSource, names: tuple[str, ...]) -> Package:
    """Return the first available package of `names`. Raises `Unavailable` if there is none."""
    for name in names:
        package = source.find(name)
        if package is not None:
            return package
    raise Unavailable(f"None of the packages {', '.join(names)} found by apt.", remedy=_NEW_LISTS)


def read_members(file: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the regular files in a package whose path (without a leading slash) `wanted` accepts.

    Raises:
        Unavailable: the package's file is damaged.
    """
    members: dict[str, bytes] = {}
    with subprocess.Popen(  # noqa: S603
        ["dpkg-deb", "--fsys-tarfile", str(file)],  # noqa: S607 - wherever the distribution has it
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as unpacking:
        try:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
                for member in archive:
                    path = member.name.removeprefix("./")
                    if member.isreg() and member.size <= _MEMBER_BYTES_MAX and wanted(path):
                        content = archive.extractfile(member)
                        members[path] = content.read() if content is not None else b""
        except tarfile.TarError as error:
            raise _damaged(file) from error
    if unpacking.returncode != 0:
        raise _damaged(file)
    return members


def _damaged(file: Path) -> Unavailable:
    return Unavailable(f"The package in {file} is damaged.", remedy="Remove the file, then try again.")


def architecture() -> str:
    """Return dpkg's architecture, such as `amd64`. Raises `Unavailable` without dpkg."""
    return _run(["dpkg", "--print-architecture"], _ASK_S).output.decode().strip()


def _run(command: list[str], timeout_s: float, folder: Path | None = None) -> subprocess_runner.Ended:
    try:
        return subprocess_runner.run(command, timeout_s=timeout_s, folder=folder)
    except FileNotFoundError as error:
        raise Unavailable(f"The program {command[0]} is not installed.", remedy=_OTHER_SYSTEMS) from error


def _described(control: str) -> Package:
    fields = Parser().parsestr(control.lstrip(), headersonly=True)
    alternatives = (fields.get("Depends") or "").split(",")
    names = (re.match(r"\s*([a-z0-9][a-z0-9+.-]+)", alternative) for alternative in alternatives)
    return Package(
        name=str(fields["Package"]),
        version=str(fields["Version"]),
        sha256=fields.get("SHA256"),
        depends=tuple(match.group(1) for match in names if match),
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
