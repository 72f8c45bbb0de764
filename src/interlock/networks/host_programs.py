"""Programs of the host that networks need, found and run."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from interlock.core.errors import OperationRejected

PACKAGES: Final = {"nft": "nftables", "dnsmasq": "dnsmasq-base"}
"""The packages of Debian and Ubuntu that have them."""
_SYSTEM: Final = ("/usr/sbin", "/sbin")
_TIMEOUT_S: Final = 20.0


def find(program: str) -> str | None:
    """Return the path of a program, also of one for administrators; None if it is not installed."""
    return shutil.which(program, path=os.pathsep.join((os.environ.get("PATH", os.defpath), *_SYSTEM)))


def installed(program: str) -> str:
    """Return the path of a program. Raises `OperationRejected` if it is not installed."""
    found = find(program)
    if found is None:
        raise OperationRejected(
            f"{program} is not installed on this host.",
            remedy=f"Install the package {PACKAGES.get(program, program)} there.",
        )
    return found


async def run(words: Sequence[str], text: bytes = b"") -> tuple[int, str, str]:
    """Run a program to its end.

    Returns:
        Its exit status, output and errors.

    Raises:
        OperationRejected: it did not end in time, and was killed.
    """
    with _as_file(text) as stdin:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            output, errors = await process.communicate()
    except TimeoutError:
        raise OperationRejected(f"{words[0]} did not end within {_TIMEOUT_S:.0f} s.") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, output.decode("utf-8", "replace"), errors.decode("utf-8", "replace")


@contextmanager
def _as_file(text: bytes) -> Iterator[int]:
    """Return a file in memory with the text, which a program can open again; the pipes of uvloop are sockets."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(text)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
