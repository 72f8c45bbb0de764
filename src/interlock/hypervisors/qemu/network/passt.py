"""passt: a process per user network that translates a guest's frames into the host's own connections.

It is an unprivileged process of its own user, enters empty namespaces and a system call filter by itself, and ends when
QEMU closes their socket. Source of the options: passt(1), version 2023_03_09 and later.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from interlock.confinement.host_users import UserClaim
from interlock.confinement.sandbox import Account, View, confined
from interlock.core.errors import OperationRejected
from interlock.core.specs import Forward
from interlock.hypervisors.qemu.files.instance_folder import NetworkProcess
from interlock.hypervisors.qemu.process.qemu_process import FIRST_DESCRIPTOR, reap, spawn, started_ticks
from interlock.networks.host_programs import find

PASST: Final = "passt"
_RESOLVERS: Final = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
"""The second has the resolvers that systemd-resolved itself uses."""
_MAC: Final = "52:55:0a:00:02:02"
"""Of the gateway, the same for each process, so that a guest finds a new one at once."""
_LIMITS: Final = ("--core=0", "--nofile=8192", "--as=1073741824")
_START_MS: Final = 5_000
_UNBOUND: Final = re.compile(r"Failed to bind any port for '-[tu] ([0-9.]+)/(\d+):")
_NO_ROUTE: Final = "No external routable interface"


class UserSubnet(msgspec.Struct, frozen=True, kw_only=True):
    """The addresses of a user network, all in a range of 256."""

    start: str
    """The first three numbers, as in `10.0.2`."""

    @property
    def guest(self) -> str:
        return f"{self.start}.15"

    @property
    def gateway(self) -> str:
        return f"{self.start}.2"

    @property
    def resolver(self) -> str:
        return f"{self.start}.3"


def is_installed() -> bool:
    """Whether this host has passt."""
    return find(PASST) is not None


async def start(
    connected: int, claim: UserClaim | None, account: Account | None, subnet: UserSubnet, forwards: Sequence[Forward]
) -> NetworkProcess:
    """Start a process; return when it serves the guest and listens on the forwarded ports.

    Args:
        connected: a descriptor of a socket that is connected to QEMU.
        claim: that of its user, which it keeps.
        account: the user that it runs as; None: that of this process, which is not root then.
        subnet: its addresses.
        forwards: the ports of the host that are forwarded to the guest.

    Raises:
        OperationRejected: another program has one of the ports, or it did not start.
        OSError: there are not enough processes or descriptors.
    """
    status, error, process = await _run(connected, claim, account, options(subnet, forwards))
    if status and _NO_ROUTE in error:
        # A host without a network: its guests have a network that leads nowhere.
        status, error, process = await _run(connected, claim, account, [*options(subnet, forwards), "-i", "lo"])
    if (found := _UNBOUND.search(error)) is not None:
        raise OperationRejected(
            f"The host's port {found[2]} cannot be forwarded: another program probably listens on it.",
            remedy=f"End what listens on {found[1]}:{found[2]}, or choose another port.",
        )
    if status or process is None:
        raise OperationRejected(f"passt did not start: {error or f'exit status {status}'}")
    return process


def options(subnet: UserSubnet, forwards: Sequence[Forward]) -> list[str]:
    """Return the options for a guest's network."""
    words = ["--quiet", "--ipv4-only", "--no-map-gw", "--mac-addr", _MAC]
    words += ["--address", subnet.guest, "--netmask", "24", "--gateway", subnet.gateway]
    words += ["--dns-forward", subnet.resolver]
    words += [word for address in _resolvers(subnet) for word in ("--dns", address)]
    for forward in forwards:
        option = "--udp-ports" if forward.protocol == "udp" else "--tcp-ports"
        words += [option, f"{forward.host_address}/{forward.host_port}:{forward.guest_port}"]
    return words


def host_resolvers() -> list[str]:
    """Return the addresses of the host's DNS servers (IPv4)."""
    return [address for path in _RESOLVERS for address in _nameservers(path)]


def _resolvers(subnet: UserSubnet) -> list[str]:
    """Return the resolvers that a guest uses; the first is also what `--dns-forward` leads to.

    One on the host's loopback is out of the guest's reach, except by that.
    """
    found: list[str] = []
    for path in _RESOLVERS:
        found = [*found, *_nameservers(path)]
        beyond = [one for one in found if not ipaddress.ip_address(one).is_loopback]
        if beyond:
            return beyond
    return [found[0], subnet.resolver] if found else []


def _nameservers(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for words in (line.split() for line in lines):
        if words[:1] == ["nameserver"] and len(words) > 1 and _is_ipv4(words[1]):
            yield words[1]


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


async def _run(
    connected: int, claim: UserClaim | None, account: Account | None, words: list[str]
) -> tuple[int, str, NetworkProcess | None]:
    """Run passt until it has become a background process or failed.

    Returns:
        Its exit status, what it said, and the background process.
    """
    descriptors = [connected] if claim is None else [connected, claim.descriptor]
    said = os.memfd_create("passt", os.MFD_CLOEXEC)
    try:
        with _file_for(account) as record:
            command = [PASST, "--fd", str(FIRST_DESCRIPTOR), "--pid", str(record), *words]
            status = await _until_ended(
                spawn(confined(command, View(folder=Path("/")), _LIMITS, account), said, descriptors)
            )
            written = record.read_text(encoding="ascii").strip()
        os.lseek(said, 0, os.SEEK_SET)
        lines = os.read(said, 4096).decode(errors="replace").splitlines()
    finally:
        os.close(said)
    error = " ".join(line for line in lines if line and "syslog" not in line)
    user_id = None if claim is None else claim.user_id
    ticks = started_ticks(int(written)) if written.isdigit() else None
    process = None if ticks is None else NetworkProcess(process_id=int(written), started_ticks=ticks, user_id=user_id)
    return status, error, process


@contextmanager
def _file_for(account: Account | None) -> Iterator[Path]:
    """Yield an empty file that the account can write to by its path, and nobody else."""
    with tempfile.TemporaryDirectory(prefix="interlock-passt-") as folder:
        Path(folder).chmod(0o711)
        path = Path(folder, "pid")
        path.touch(0o600)
        if account is not None:
            os.chown(path, account.user_id, account.group_id)
        yield path


async def _until_ended(process_id: int) -> int:
    """Wait until a child has ended, which is killed after a while; return its exit status."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    descriptor = os.pidfd_open(process_id)
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(_START_MS / 1000):
            await ended.wait()
    except BaseException as error:
        reap(process_id)
        if isinstance(error, TimeoutError):
            raise OperationRejected(f"passt did not start within {_START_MS} ms.") from None
        raise
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])  # noqa: ASYNC222 - it has ended
