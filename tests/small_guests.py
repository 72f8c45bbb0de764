"""The small guest as tests boot it: built once, from packages that are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from interlock.core.records import Image, Spec
from interlock.guests import small_guest


def packages_folder() -> Path:
    """Return the folder of the packages, so that they are downloaded once."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "interlock-tests" / "packages"


def small_spec() -> Spec:
    """Return the spec of an instance that boots it."""
    built = small_guest.build(packages_folder())
    image = Image(
        id="small",
        name="small",
        kind="kernel",
        path=str(built.kernel),
        initrd=str(built.initrd),
        cmdline=built.cmdline,
        size_bytes=1,
        sha256="",
    )
    return Spec(image=image, memory_mib=128)
