"""A live console is shared by many, drained for all, and nobody is held up by who does not read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from interlock.core.errors import GuestNotFound
from interlock.hypervisors.qemu.console.serial_console import Console
from waiting import PATIENCE_S


class Line:
    """The other end of consoles: each call is kept with its socket."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []

    def call(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.settimeout(PATIENCE_S)
        self.ends.append(theirs)
        return ours


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    for end in line.ends:
        end.close()


async def test_all_users_share_one_connection_and_each_sees_everything(line: Line) -> None:
    console = Console("one", line.call, 1000)
    first, second = await asyncio.gather(console.open(), console.open())
    assert len(line.ends) == 1
    line.ends[0].send(b"hello")
    assert await first.read() == b"hello"
    assert await second.read() == b"hello"
    await first.close()
    line.ends[0].send(b"again")
    assert await second.read() == b"again"
    await second.write(b"typed")
    assert await asyncio.to_thread(line.ends[0].recv, 100) == b"typed"
    await second.close()


async def test_the_connection_goes_with_the_last_user_and_the_next_gets_another(line: Line) -> None:
    console = Console("one", line.call, 1000)
    first, second = await console.open(), await console.open()
    await first.close()
    await second.close()
    assert await asyncio.to_thread(line.ends[0].recv, 1) == b""
    assert await second.read() == b""
    third = await console.open()
    line.ends[1].send(b"new")
    assert await third.read() == b"new"
    await third.close()


async def test_who_does_not_read_loses_the_middle_is_told_and_holds_up_nobody(line: Line) -> None:
    console = Console("one", line.call, 1000)
    slow, quick = await console.open(), await console.open()
    line.ends[0].send(b"begin")
    assert await slow.read() == b"begin"
    seen = await quick.read()
    sent = b"".join(b"%09d\n" % number for number in range(100_000))
    sending = asyncio.create_task(asyncio.to_thread(line.ends[0].sendall, sent))
    while b"000099999\n" not in seen[-2000:]:
        seen += await quick.read()
    await sending
    late = await slow.read()
    assert late.startswith(b"\r\n[interlock: 999000 bytes of the console were dropped here]\r\n")
    assert late.endswith(sent[-1000:])
    await slow.close()
    await quick.close()


async def test_the_end_of_the_guest_ends_it_for_all(line: Line) -> None:
    console = Console("one", line.call, 1000)
    stream = await console.open()
    line.ends[0].send(b"last words")
    line.ends[0].close()
    assert await stream.read() == b"last words"
    assert await stream.read() == b""
    with pytest.raises(GuestNotFound):
        await stream.write(b"hello?")


async def test_typing_into_a_guest_that_takes_nothing_in_waits_and_can_be_given_up(line: Line) -> None:
    console = Console("one", line.call, 1000)
    stream = await console.open()
    typing = asyncio.create_task(stream.write(b"x" * 10_000_000))
    done, _ = await asyncio.wait({typing}, timeout=0.2)
    assert not done
    typing.cancel()
    await stream.close()
    with pytest.raises(asyncio.CancelledError):
        await typing


async def test_nobody_there_is_told() -> None:
    def refuse() -> socket.socket:
        raise ConnectionRefusedError

    with pytest.raises(GuestNotFound):
        await Console("one", refuse, 1000).open()
