"""Network namespaces, and guests that are a network stack in one, behind the tap that a host made for them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_CLONE_NEWNET: Final = 0x40000000
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_IP_FREEBIND: Final = 15
_IPV6_FREEBIND: Final = 78
_FRAME_BYTES: Final = 70_000


def _call(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Namespace:
    """A network namespace without a name: it ends when nothing uses it."""

    def __init__(self) -> None:
        with _kept():
            _call(_LIBC.unshare(_CLONE_NEWNET))
            self.descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self.run("ip", "link", "set", "lo", "up")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run the body, and the processes that it starts, in the namespace; sockets made there stay in it."""
        with _kept():
            _call(_LIBC.setns(self.descriptor, _CLONE_NEWNET))
            yield

    def run(self, *words: str, fails: bool = False) -> str:
        """Run a program there to its end; return its output."""
        with self.entered():
            ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert fails or ended.returncode == 0, f"{words}: {ended.stdout} {ended.stderr}"
        return ended.stdout + ended.stderr

    def ip(self, words: str) -> None:
        """Run ip(8) there."""
        self.run("ip", *words.split())

    def close(self) -> None:
        os.close(self.descriptor)

    # ---------------------------------------------------------------------------------------------------- traffic

    def opened(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """Return a socket there, with a short time limit."""
        with self.entered():
            made = socket.socket(family, kind, protocol)
        made.settimeout(3)
        return made

    @contextlib.contextmanager
    def serving(self, port: int, address: str = "0.0.0.0", answer: bytes = b"hello") -> Iterator[None]:
        """Answer TCP connections in the body of a `with`."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = self.opened(family)
        listener.settimeout(None)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # An IPv6 address is tentative for a moment, even without detection of duplicates.
        listener.setsockopt(*((socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1) if ":" in address else (0, _IP_FREEBIND, 1)))
        listener.bind((address, port))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, peer = listener.accept()
                    with connection:
                        connection.sendall(answer or peer[0].encode())

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join()

    def reads(self, address: str, port: int, within_s: float = 0.4) -> bytes:
        """Connect to a TCP port and return what it answers; empty if nothing does."""
        with self.opened(socket.AF_INET6 if ":" in address else socket.AF_INET) as caller:
            caller.settimeout(within_s)
            with contextlib.suppress(OSError):
                caller.connect((address, port))
                return caller.recv(100)
        return b""

    def pings(self, address: str, within_s: float = 0.4) -> bool:
        """Whether an address answers an ICMP echo request."""
        six = ":" in address
        family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if six else (socket.AF_INET, socket.IPPROTO_ICMP)
        with self.opened(family, socket.SOCK_RAW, protocol) as pinging:
            pinging.settimeout(within_s)
            message = struct.pack("!BBHHH", 128 if six else 8, 0, 0, os.getpid() & 0xFFFF, 1)
            if not six:
                message = message[:2] + struct.pack("!H", _checksum(message)) + message[4:]
            with contextlib.suppress(OSError):
                pinging.sendto(message, (address, 0))
                while True:
                    answer, (sender, *_) = pinging.recvfrom(200)
                    kind = answer[0] if six else answer[(answer[0] & 15) * 4]
                    if sender == address and kind == (129 if six else 0):
                        return True
        return False

    def frames(self, link: str) -> socket.socket:
        """Return a socket that sends and receives whole frames of a link."""
        with self.entered():
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            made.bind((link, 0))
        made.settimeout(0.4)
        return made


class Guest(Namespace):
    """A guest: a network stack with one interface, `eth0`, whose frames pass the tap of its host.

    Args:
        tap: the descriptor of the tap; the guest closes it.
        mac: of its interface.
    """

    def __init__(self, tap: int, mac: str) -> None:
        super().__init__()
        with self.entered():
            self._own = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(self._own, 0x400454CA, struct.pack("16sH22x", b"eth0", 0x0002 | 0x1000 | 0x4000))
        self._tap = tap
        self.mac = mac
        self.ip(f"link set eth0 address {mac} up")
        self._end, self._ended = os.pipe()
        self._pump = threading.Thread(target=self._carry)
        self._pump.start()

    def _carry(self) -> None:
        """Carry frames, each with its header of virtio, between the guest's interface and the tap."""
        ways = {self._own: self._tap, self._tap: self._own}
        while True:
            ready, _, _ = select.select([*ways, self._end], [], [])
            if self._end in ready:
                return
            for source in ready:
                with contextlib.suppress(OSError):  # an interface that is down, or not connected
                    os.write(ways[source], os.read(source, _FRAME_BYTES))

    def close(self) -> None:
        """End: as a QEMU that ends, its tap does too."""
        os.write(self._ended, b"x")
        self._pump.join()
        for descriptor in (self._own, self._tap, self._end, self._ended):
            os.close(descriptor)
        super().close()

    def configure(self, address: str, gateway: str = "") -> None:
        """Give its interface an address, as in `10.7.0.2/24`."""
        self.ip(f"addr add {address} dev eth0" + (" nodad" if ":" in address else ""))
        if gateway:
            self.ip(f"route add default via {gateway}")

    def asks_dhcp(self, within_s: float = 3.0) -> dict[int, bytes]:
        """Return the options of DHCP's answer, and the address as option 0; empty without an answer."""
        with self.opened(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(within_s)
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            asking.bind(("", 68))
            try:
                offer = self._exchange(asking, {53: b"\x01"})
                return self._exchange(asking, {53: b"\x03", 50: offer[0], 54: offer[54]})
            except OSError:
                return {}

    def _exchange(self, asking: socket.socket, options: dict[int, bytes]) -> dict[int, bytes]:
        mac = bytes.fromhex(self.mac.replace(":", ""))
        request = {**options, 55: bytes([1, 3, 6, 15, 26, 119])}
        text = b"".join(bytes([code, len(value)]) + value for code, value in request.items())
        head = struct.pack("!BBBBIHH16x16s192x4s", 1, 1, 6, 0, 7, 0, 0x8000, mac, b"\x63\x82\x53\x63")
        asking.sendto(head + text + b"\xff", ("255.255.255.255", 67))
        answer = asking.recv(2000)
        found, place = {0: answer[16:20]}, 240
        while answer[place] != 255:
            code, length = answer[place], answer[place + 1]
            found[code] = answer[place + 2 : place + 2 + length]
            place += 2 + length
        return found

    def asks_dhcp6(self) -> str:
        """Return the address that a DHCPv6 server offers; empty without one."""
        mac = bytes.fromhex(self.mac.replace(":", ""))
        identity = _option6(1, struct.pack("!HH", 3, 1) + mac) + _option6(3, bytes(12)) + _option6(8, bytes(2))
        with self.opened(socket.AF_INET6, socket.SOCK_DGRAM) as asking:
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            asking.bind(("::", 546))
            asking.settimeout(0.5)
            for _ in range(200):  # its own link-local address is tentative at first
                with contextlib.suppress(OSError):
                    with self.entered():
                        index = socket.if_nametoindex("eth0")
                    asking.sendto(b"\x01\0\0\x07" + identity, ("ff02::1:2", 547, 0, index))
                    answer = asking.recv(1500)
                    inside = answer.index(struct.pack("!HH", 5, 24))
                    return socket.inet_ntop(socket.AF_INET6, answer[inside + 4 : inside + 20])
                time.sleep(0.1)
        return ""

    def resolves(self, name: str, server: str) -> str:
        """Return the IPv4 address that a name server has for a name; empty without an answer."""
        labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
        with self.opened(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(2)
            asking.sendto(struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\x01\0\x01", (server, 53))
            with contextlib.suppress(OSError):
                answer = asking.recv(600)
                return socket.inet_ntoa(answer[-4:]) if answer[6:8] != b"\0\0" else ""
        return ""


def _option6(code: int, value: bytes) -> bytes:
    return struct.pack("!HH", code, len(value)) + value


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Bring the thread back to its namespace."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        yield
    finally:
        _call(_LIBC.setns(before, _CLONE_NEWNET))
        os.close(before)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def processes_with(text: str) -> list[int]:
    """Return the processes whose command line has a text."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and text.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found
