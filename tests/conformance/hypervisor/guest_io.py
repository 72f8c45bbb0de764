"""The hypervisor's promises about being seen and spoken with: guest agent, serial console, display, screenshot."""

from __future__ import annotations

from conformance.hypervisor.harness import Bench, check, raises
from interlock.core.errors import GuestNotFound, OperationRejected
from interlock.core.states import PowerState
from interlock.ports import Stream

_PNG = b"\x89PNG\r\n\x1a\n"
_RFB = b"RFB 003.008\n"


async def _read(bench: Bench, stream: Stream, length: int) -> bytes:
    """The next bytes of a stream, so many or more."""
    read = b""

    async def enough() -> None:
        nonlocal read
        while len(read) < length:
            more = await stream.read()
            assert more, f"the stream ended after {read!r}"
            read += more

    await bench.in_time(enough())
    return read


async def _read_to_the_end(bench: Bench, stream: Stream) -> None:
    async def ended() -> None:
        while await stream.read():
            pass

    await bench.in_time(ended())


@check
async def nobody_answers_where_no_guest_runs(bench: Bench) -> None:
    assert not await bench.hypervisor.agent_answers("never-heard-of")
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    assert not await bench.hypervisor.agent_answers("one")
    async with raises(GuestNotFound):
        await bench.hypervisor.set_password(bench.permit, "one", "root", "word")
    async with raises(GuestNotFound):
        await bench.hypervisor.agent_interfaces("one")
    async with raises(GuestNotFound):
        await bench.hypervisor.ask_shutdown(bench.permit, "one")
    async with raises(GuestNotFound):
        await bench.hypervisor.screenshot("one")
    async with raises(GuestNotFound):
        await bench.hypervisor.open_console("one")
    async with raises(GuestNotFound, OperationRejected):
        await bench.hypervisor.open_display("one")
    assert await bench.power() is PowerState.NONE


@check
async def a_guest_that_is_asked_powers_itself_off(bench: Bench) -> None:
    await bench.start()
    await bench.hypervisor.ask_shutdown(bench.permit, "one")
    await bench.in_time(bench.hypervisor.wait_powered_off("one"))
    assert await bench.power() in {PowerState.SHUTDOWN, PowerState.NONE}


@check
async def a_screenshot_is_a_picture(bench: Bench) -> None:
    """Of a guest with a screen; one without says so."""
    await bench.start()
    try:
        picture = await bench.hypervisor.screenshot("one")
    except OperationRejected:
        return
    assert picture.startswith(_PNG)
    assert await bench.power() is PowerState.RUNNING


@check
async def a_display_speaks_vnc(bench: Bench) -> None:
    """That of a guest with a screen; one without says so."""
    await bench.start()
    try:
        display = await bench.hypervisor.open_display("one")
    except OperationRejected:
        return
    assert (await _read(bench, display, len(_RFB)))[: len(_RFB)] == _RFB
    await display.close()
    assert await bench.power() is PowerState.RUNNING


@check
async def a_console_ends_with_its_guest_and_closing_it_disturbs_none(bench: Bench) -> None:
    await bench.start()
    first, second = await bench.hypervisor.open_console("one"), await bench.hypervisor.open_console("one")
    await first.close()
    assert await bench.power() is PowerState.RUNNING
    await bench.hypervisor.power_off(bench.permit, "one")
    await _read_to_the_end(bench, second)
    async with raises(GuestNotFound):
        await bench.hypervisor.open_console("one")
