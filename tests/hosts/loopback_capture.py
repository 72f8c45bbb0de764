"""Records what is sent over TCP from and to one loopback address, as a capture on the network between hosts does."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections import defaultdict
from types import TracebackType
from typing import Self

_ETH_P_IP = 0x0800
_SO_ATTACH_FILTER = 26
_SO_RCVBUFFORCE = 33
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_PACKET_OUTGOING = 4
_BUFFER_BYTES = 128 << 20
_PACKET_BYTES_MAX = 1 << 17
_SILENCE_S = 0.3
"""How long nothing may come at the end, in seconds: a packet is recorded a moment after it was sent."""
_RECORDS = {20, 21, 22, 23}
"""The types of TLS records."""
_RECORD_BYTES_MAX = (1 << 14) + 256


class LoopbackCapture:
    """Records during its block. Needs root.

    Args:
        address: of one side of the connections, in 127.0.0.0/8.
    """

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_IP))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        wanted = struct.unpack("!I", socket.inet_aton(address))[0]
        # Load the source address, accept it, load the destination, accept it, drop all others.
        program = b"".join(
            struct.pack("HBBI", *instruction)
            for instruction in (
                (0x20, 0, 0, 12),
                (0x15, 3, 0, wanted),
                (0x20, 0, 0, 16),
                (0x15, 1, 0, wanted),
                (0x06, 0, 0, 0),
                (0x06, 0, 0, _PACKET_BYTES_MAX),
            )
        )
        held = ctypes.create_string_buffer(program)
        self._socket.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(program) // 8, ctypes.addressof(held))
        )
        self._socket.bind(("lo", _ETH_P_IP))
        self._socket.settimeout(_SILENCE_S)
        self._segments: dict[tuple[bytes, bytes, bytes], dict[int, bytes]] = defaultdict(dict)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        statistics = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        self._socket.close()
        assert struct.unpack("II", statistics)[1] == 0, "packets were not recorded"

    def _record(self) -> None:
        while True:
            try:
                packet, origin = self._socket.recvfrom(_PACKET_BYTES_MAX)
            except TimeoutError:
                if self._ending.is_set():
                    return
                continue
            if origin[2] != _PACKET_OUTGOING and packet[9] == socket.IPPROTO_TCP:
                self._note(packet)

    def _note(self, packet: bytes) -> None:
        head = (packet[0] & 15) * 4
        sequence = struct.unpack_from("!I", packet, head + 4)[0]
        payload = packet[head + (packet[head + 12] >> 4) * 4 : struct.unpack_from("!H", packet, 2)[0] or None]
        if payload:
            self._segments[packet[12:16], packet[16:20], packet[head : head + 4]][sequence] = payload

    def streams(self) -> list[bytes]:
        """What was sent, each direction of each connection by itself."""
        return [b"".join(segments[number] for number in sorted(segments)) for segments in self._segments.values()]


def is_tls(stream: bytes) -> bool:
    """Whether a stream consists of TLS records and nothing else."""
    at = 0
    while at < len(stream):
        kind, major, _, length = struct.unpack_from("!BBBH", stream, at)
        if kind not in _RECORDS or major != 3 or length > _RECORD_BYTES_MAX:
            return False
        at += 5 + length
    return at == len(stream)


def can_capture() -> bool:
    return os.geteuid() == 0
