"""DHCP and DNS of a managed network: one dnsmasq for each bridge, which leases what is recorded and nothing else.

It outlives the server, and is found by its command line, which names its bridge.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import shutil
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from interlock.confinement.sandbox import BWRAP
from interlock.core.errors import OperationRejected
from interlock.core.networks import Network
from interlock.images.atomic_files import write_atomically
from interlock.networks import host_programs
from interlock.networks.connections import gateways, ranges

DNSMASQ: Final = "dnsmasq"
_LEASE: Final = "1h"
_END_MS: Final = 3000
_FOLDER: Final = "/data"
"""Where it sees its files."""
_FILES: Final = {"dhcp-leasefile": "leases", "dhcp-hostsfile": "hosts", "addn-hosts": "names"}
_CAPABILITIES: Final = ("NET_ADMIN", "NET_RAW", "NET_BIND_SERVICE", "SETUID", "SETGID", "SETPCAP", "CHOWN")
"""It gives up all but the first three when it changes to its user."""
_RESOLVERS: Final = ("/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf", "/run/netconfig", "/run/connman")
"""Where /etc/resolv.conf leads on some systems."""
_HOSTNAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z", re.IGNORECASE)


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """What is leased to one interface."""

    mac: str
    addresses: tuple[str, ...]
    hostname: str = ""
    """Its name in the DNS of the network; empty: none."""

    def host_line(self) -> str:
        """Return its line of `dhcp-hostsfile`."""
        return ",".join([self.mac, *(f"[{text}]" if ":" in text else text for text in self.addresses)])

    def name_lines(self, domain: str) -> list[str]:
        """Return its lines of `addn-hosts`."""
        if not _HOSTNAME.match(self.hostname):
            return []
        name = self.hostname.lower()
        names = f"{name}.{domain} {name}" if domain else name
        return [f"{address} {names}" for address in self.addresses]


class DhcpServers:
    """The DHCP and DNS servers of a data folder's bridges.

    Args:
        folder: has a folder for each.
        bridges: the beginning of the names of bridges.
    """

    def __init__(self, folder: Path, bridges: str) -> None:
        self._folder = folder
        self._bridges = bridges
        self._processes: dict[str, int] = {}
        """As found last."""

    async def _process(self, bridge: str) -> int | None:
        """Return the process of the server of a bridge, if it runs."""
        known = self._processes.get(bridge)
        if known is None or self._bridge_of(_command(known)) != bridge:
            self._processes = await asyncio.to_thread(self._running)
        return self._processes.get(bridge)

    def _running(self) -> dict[str, int]:
        """Return the process ids of the servers that run, by bridge."""
        found = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdecimal() and (bridge := self._bridge_of(_command(int(entry.name)))):
                found[bridge] = int(entry.name)
        return found

    def _bridge_of(self, command: Sequence[str]) -> str | None:
        if not command or Path(command[0]).name != DNSMASQ:
            return None
        named = (word.removeprefix("--interface=") for word in command if word.startswith("--interface="))
        return next((bridge for bridge in named if bridge.startswith(self._bridges)), None)

    async def serve(self, bridge: str, network: Network, leases: Iterable[Lease], *, anew: bool) -> int:
        """Serve leases on a bridge that is up.

        Args:
            bridge: its name.
            network: the managed network.
            leases: all of it.
            anew: whether the bridge is a new one, so that a server that runs does not listen there.

        Returns:
            The id of its process.

        Raises:
            OperationRejected: dnsmasq is not installed, or did not start.
        """
        folder = self._folder / bridge
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder.chmod(0o755)  # it reads its files again as its user; the folders above are closed
        known = sorted(leases, key=lambda lease: lease.mac)
        hosts = "".join(f"{lease.host_line()}\n" for lease in known)
        names = "".join(f"{line}\n" for lease in known for line in lease.name_lines(network.domain))
        stale = _stale(folder, known)
        changed = [_write(folder / "hosts", hosts), _write(folder / "names", names)]
        command = _words(bridge, network)
        process = await self._process(bridge)
        if process is not None and _command(process)[1:] == command and not (stale or anew):
            if any(changed):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGHUP)
            return process
        await self._end(bridge)
        _forget(folder / "leases", stale)
        await _start(folder, command)
        process = await self._process(bridge)
        if process is None:
            raise OperationRejected(f"dnsmasq for the network {network.name} ended as soon as it was started.")
        return process

    async def _end(self, bridge: str) -> None:
        """End the server of a bridge, if it runs."""
        process = await self._process(bridge)
        if process is not None:
            await asyncio.to_thread(_end, process)

    async def remove(self, bridge: str) -> None:
        """End the server of a bridge, and remove its files."""
        await self._end(bridge)
        shutil.rmtree(self._folder / bridge, ignore_errors=True)

    async def found(self) -> set[str]:
        """Return the bridges that have a server or its files."""
        self._processes = await asyncio.to_thread(self._running)
        with contextlib.suppress(FileNotFoundError):
            files = {entry.name for entry in os.scandir(self._folder) if entry.name.startswith(self._bridges)}
            return files | self._processes.keys()
        return set(self._processes)


def _end(process: int) -> None:
    """End a process. Blocks until it has ended."""
    with contextlib.suppress(ProcessLookupError):
        watched = os.pidfd_open(process)
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                signal.pidfd_send_signal(watched, number)
                poll = select.poll()
                poll.register(watched, select.POLLIN)
                if poll.poll(_END_MS):
                    return
        finally:
            os.close(watched)


def _words(bridge: str, network: Network) -> list[str]:
    """Return the arguments of dnsmasq."""
    words = ["--conf-file=/dev/null", f"--interface={bridge}", "--bind-dynamic", "--except-interface=lo", "--pid-file="]
    words += [f"--user={'nobody' if shutil.which(BWRAP) else 'root'}", "--group=", "--no-hosts"]
    words += [f"--{option}={_FOLDER}/{name}" for option, name in _FILES.items()]
    words += ["--dhcp-authoritative", "--no-ping", "--dhcp-ignore=tag:!known", "--dhcp-ignore-names"]
    words += ["--domain-needed", "--bogus-priv", "--quiet-dhcp", "--quiet-dhcp6", "--quiet-ra", "--log-facility=daemon"]
    for found in ranges(network, 4):
        words.append(f"--dhcp-range={found.network_address},static,{found.netmask},{_LEASE}")
    for found in ranges(network, 6):
        words += [f"--dhcp-range={found.network_address},static,{found.prefixlen},{_LEASE}", "--enable-ra"]
        words += [] if network.mtu is None else [f"--ra-param={bridge},mtu:{network.mtu},0"]
    words += [] if network.mtu is None else [f"--dhcp-option=option:mtu,{network.mtu}"]
    if network.domain:
        words += [f"--domain={network.domain}", f"--local=/{network.domain}/"]
        words += [f"--dhcp-option=option:domain-search,{network.domain}"]
        words += [f"--dhcp-option=option6:domain-search,{network.domain}"] if gateways(network, 6) else []
    # A guest that may not reach what is beyond could send it as questions to name servers.
    return words if network.outbound else [*words, "--no-resolv"]


async def _start(folder: Path, arguments: Sequence[str]) -> None:
    """Start dnsmasq, which returns when it serves."""
    program = host_programs.installed(DNSMASQ)
    words = [program, *arguments]
    if bwrap := shutil.which(BWRAP):
        words = [bwrap, *_view(folder), "--", *words]
    else:
        words = [word.replace(_FOLDER, str(folder), 1) for word in words]
    status, output, errors = await host_programs.run(words)
    if status != 0:
        lines = (errors or output).strip().splitlines()
        why = lines[-1].strip() if lines else f"exit status {status}"
        raise OperationRejected(
            f"dnsmasq did not start: {why.removeprefix('dnsmasq: ')}.",
            remedy="If another DNS or DHCP server of the host listens on every address, limit it to its own.",
        )


def _view(folder: Path) -> list[str]:
    """Return the options of bwrap: the system's programs, the files of its resolver, and its own folder."""
    words = ["--unshare-ipc", "--unshare-uts", "--new-session", "--cap-drop", "ALL"]
    words += [word for name in _CAPABILITIES for word in ("--cap-add", f"CAP_{name}")]
    words += ["--ro-bind", "/usr", "/usr", "--ro-bind", "/etc", "/etc", "--dev", "/dev"]
    for place in ("/lib", "/lib64", "/lib32", "/bin", "/sbin"):
        path = Path(place)
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), place]
        elif path.is_dir():
            words += ["--ro-bind", place, place]
    words += [word for place in _RESOLVERS for word in ("--ro-bind-try", place, place)]
    words += ["--ro-bind-try", "/dev/log", "/dev/log", "--bind", str(folder), _FOLDER]
    return [*words, "--remount-ro", "/"]


def _command(process: int) -> list[str]:
    """Return the command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")[:-1]
    except OSError:
        return []


def _write(path: Path, text: str) -> bool:
    """Write a file, and return whether that changed it."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_text(encoding="utf-8") == text:
            return False
    write_atomically(path, text, mode=0o644)
    return True


def _owners(lines: Iterable[str]) -> Mapping[str, str]:
    """Return the MAC addresses of `dhcp-hostsfile`, by address."""
    split = (line.strip().split(",") for line in lines)
    return {address.strip("[]"): mac for mac, *addresses in split for address in addresses}


def _stale(folder: Path, leases: Sequence[Lease]) -> set[str]:
    """Return the addresses whose lease dnsmasq remembers for another interface: it would not give them out."""
    try:
        lines = [line.split() for line in (folder / "leases").read_text().splitlines()]
        remembered = {address for words in lines for address in words[2:3]}
        before = _owners((folder / "hosts").read_text().splitlines())
    except FileNotFoundError:
        return set()
    now = _owners(lease.host_line() for lease in leases)
    return {address for address in remembered if address in now and before.get(address) != now[address]}


def _forget(path: Path, addresses: set[str]) -> None:
    if not addresses:
        return
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not addresses & set(line.split()[2:3])))
