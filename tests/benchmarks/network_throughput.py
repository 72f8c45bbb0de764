"""Throughput from a guest to a server beyond its host, by kind of network, side by side.

Host and server are network namespaces. Rounds of the kinds alternate, so that a busy machine slows all.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from interlock.bench import run
from interlock.core.networks import Network, NetworkKind, Subnet
from interlock.core.specs import Interface
from interlock.guests import small_guest
from interlock.images.image_folder import GuestFiles
from interlock.networks.host_networks import HostNetworks
from networks.namespaces import Namespace
from small_guests import packages_folder

_ROUNDS: Final = 5
_MIB: Final = 1 << 20
_SENT_MIB: Final = 8
_SERVER: Final = "192.0.2.1"
_PORT: Final = 5001
_MAC: Final = "52:54:00:00:00:07"
_BOOT_S: Final = 60.0
_PROMPT: Final = b"\x1b[6n"
"""What the shell asks the terminal before it reads a command."""
_NETWORK: Final = Network(
    id="bench", name="bench", kind=NetworkKind.MANAGED, subnets=(Subnet(prefix="10.7.0.0/24", gateway="10.7.0.1"),)
)


def measure(folder: Path, scale: float) -> dict[str, float]:
    """Return the median throughput of `slirp`, `passt` and a `tap` on a managed network, in Mbit/s. Needs root."""
    figures: dict[str, float] = run(_measure(folder, max(1, int(_ROUNDS * scale))))
    return figures


async def _measure(folder: Path, rounds: int) -> dict[str, float]:
    files = small_guest.build(packages_folder())
    host, server = Namespace(), Namespace()
    networks = HostNetworks(f"b{os.getpid() & 0xFFFFF:05x}", folder)
    host.ip("link add up0 type veth peer name eth0")
    host.ip(f"link set eth0 netns /proc/{os.getpid()}/fd/{server.descriptor}")
    for here, link, address in ((host, "up0", "192.0.2.2/24"), (server, "eth0", f"{_SERVER}/24")):
        here.ip(f"addr add {address} dev {link}")
        here.ip(f"link set {link} up")
    host.ip(f"route add default via {_SERVER}")
    found = defaultdict[str, list[float]](list)
    with contextlib.ExitStack() as guests, host.entered():
        interface = Interface(id="primary", mac=_MAC, network=_NETWORK, addresses=("10.7.0.7",))
        tap = await networks.plug("bench", interface)
        try:
            consoles = {
                "slirp": guests.enter_context(_guest(files, "user,id=network", ())),
                "passt": guests.enter_context(_passt_guest(files)),
                "tap": guests.enter_context(_guest(files, f"tap,id=network,fd={tap}", (tap,))),
            }
            for _ in range(rounds):
                for name, console in consoles.items():
                    found[f"{name}_mbit_per_s"].append(_transfer(console, server))
        finally:
            os.close(tap)
            await networks.unplug("bench", "primary")
            await networks.close()
    return {name: statistics.median(values) for name, values in found.items()}


def _transfer(console: socket.socket, server: Namespace) -> float:
    """Have the guest send, and return what the server received in Mbit/s."""
    with server.entered(), socket.create_server((_SERVER, _PORT)) as listener:
        console.sendall(f"dd if=/dev/zero bs=64k count={_SENT_MIB * 16} | nc {_SERVER} {_PORT}\n".encode())
        listener.settimeout(_BOOT_S)
        connection, _ = listener.accept()
        with connection:
            received, began = 0, time.perf_counter()
            while received < _SENT_MIB * _MIB and (chunk := connection.recv(_MIB)):
                received += len(chunk)
            taken = time.perf_counter() - began
    _until(console, _PROMPT)
    return received * 8 / 1e6 / taken


@contextlib.contextmanager
def _passt_guest(files: GuestFiles) -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    options = ("--ipv4-only", "--no-map-gw", "--address", "10.0.2.15", "--netmask", "24", "--gateway", "10.0.2.2")
    words = ["passt", "--foreground", "--quiet", "--fd", str(theirs.fileno()), *options]
    with ours, theirs, _running(words, (theirs.fileno(),)):
        netdev = f"stream,id=network,server=off,addr.type=fd,addr.str={ours.fileno()}"
        with _guest(files, netdev, (ours.fileno(),)) as console:
            yield console


@contextlib.contextmanager
def _guest(files: GuestFiles, netdev: str, descriptors: tuple[int, ...]) -> Iterator[socket.socket]:
    """Boot a guest; yield the shell on its console when it has an address."""
    console, serial = socket.socketpair()
    words = [
        *("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "128M", "-smp", "1"),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-chardev", f"socket,id=serial,fd={serial.fileno()}", "-serial", "chardev:serial"),
        *("-kernel", str(files.kernel), "-initrd", str(files.initrd), "-append", files.cmdline),
        *("-netdev", netdev, "-device", f"virtio-net-pci,netdev=network,mac={_MAC},romfile="),
    ]
    with console, serial, _running(words, (serial.fileno(), *descriptors)):
        console.settimeout(_BOOT_S)
        _until(console, b"interlock-guest: address")
        console.sendall(b"\n")
        _until(console, _PROMPT)
        yield console


@contextlib.contextmanager
def _running(words: list[str], descriptors: tuple[int, ...]) -> Iterator[None]:
    with tempfile.TemporaryFile() as errors, subprocess.Popen(words, pass_fds=descriptors, stderr=errors) as process:
        try:
            yield
        finally:
            process.kill()


def _until(console: socket.socket, text: bytes) -> None:
    said = b""
    while text not in said:
        try:
            said += console.recv(4096)
        except TimeoutError:
            raise TimeoutError(f"The guest did not say {text!r}, only: {said!r}") from None
