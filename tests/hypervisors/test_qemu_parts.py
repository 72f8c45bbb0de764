"""The parts of the QEMU adapter that need no QEMU: its command line, and what it makes of events."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from interlock.core.errors import OperationRejected
from interlock.core.records import Disk, Forward, GuestEvent, Image, Spec
from interlock.hypervisors.qemu.command_line import (
    Descriptors,
    arguments,
    device_name,
    disk_of_device,
    disk_serial,
    machine_uuid,
    node_name,
)
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.qmp.qmp_events import EventInterpreter, QemuEvent, QmpEventLog
from interlock.hypervisors.qemu.settings import QemuSettings
from waiting import PATIENCE_S

SETTINGS = QemuSettings(folder=Path("/unused"))
VOLUME = "6f2e0c5e-2a5c-4b44-9f0c-6f5b1d3b2a10"
DISK_IMAGE = Image(id="i", name="i", kind="disk", format="raw", path="/images/i", size_bytes=1, sha256="")
KERNEL_IMAGE = Image(
    id="k", name="k", kind="kernel", path="/images/k", initrd="/images/r", cmdline="a,b c", size_bytes=1, sha256=""
)


def values(words: list[str], option: str) -> list[str]:
    return [words[place + 1] for place, word in enumerate(words) if word == option]


def test_a_disk_image_is_the_backing_of_the_root_disk() -> None:
    spec = Spec(image=DISK_IMAGE, disks=(Disk(id=VOLUME, path="/volumes/v", read_only=True),))
    at = Descriptors(monitor=3, agent=8, console=9, console_log=4, backings={"root": 5}, disks={"root": 6, VOLUME: 7})
    words = arguments("one", spec, SETTINGS, at)
    backing, root, volume = (msgspec.json.decode(value) for value in values(words, "-blockdev"))
    assert (backing["driver"], backing["read-only"], backing["file"]["filename"]) == ("raw", True, "/dev/fdset/5")
    assert (root["driver"], root["backing"], root["read-only"]) == ("qcow2", backing["node-name"], False)
    assert (volume["backing"], volume["read-only"], volume["file"]["filename"]) == (None, True, "/dev/fdset/7")
    assert not any("/images" in word or "/volumes" in word for word in words), "QEMU is given no path"
    assert "-kernel" not in words


def test_a_kernel_image_is_booted_directly() -> None:
    words = arguments(
        "one",
        Spec(image=KERNEL_IMAGE),
        SETTINGS,
        Descriptors(monitor=3, agent=8, console=9, console_log=4, disks={}, kernel=5, initrd=6),
    )
    assert values(words, "-kernel") == ["/proc/self/fd/5"]
    assert values(words, "-initrd") == ["/proc/self/fd/6"]
    assert values(words, "-append") == ["a,b c"]
    assert values(words, "-blockdev") == []


def test_forwards_listen_on_loopback_only() -> None:
    spec = Spec(image=KERNEL_IMAGE, forwards=(Forward(host_port=2222, guest_port=22),))
    words = arguments(
        "one", spec, SETTINGS, Descriptors(monitor=3, agent=8, console=9, console_log=4, disks={}, kernel=5)
    )
    (network,) = map(msgspec.json.decode, values(words, "-netdev"))
    assert network["hostfwd"] == [{"str": "tcp:127.0.0.1:2222-:22"}]
    assert network["restrict"] is True


def test_a_guest_has_a_place_for_each_disk_that_it_has() -> None:
    spec = Spec(image=DISK_IMAGE, disks=tuple(Disk(id=f"v{number}", path="/v") for number in range(8)))
    at = Descriptors(
        monitor=3,
        agent=8,
        console=9,
        console_log=4,
        backings={"root": 5},
        disks={disk.id: 6 for disk in spec.disks} | {"root": 7},
    )
    words = arguments("one", spec, SETTINGS, at)
    places = sum(word.startswith("pcie-root-port,id=port-") for word in words)
    assert places == len(spec.disks) + 1 > SETTINGS.hotplug_ports


def test_names_fit_and_lead_back() -> None:
    assert len(node_name(VOLUME)) <= 31
    assert len(disk_serial(VOLUME)) == 20
    assert disk_of_device(device_name(VOLUME)) == VOLUME
    assert disk_of_device("port-0") is None
    assert machine_uuid(VOLUME) == VOLUME
    assert machine_uuid("one") == machine_uuid("one") != machine_uuid("two")


@pytest.mark.parametrize("bad", ["", "a,b", "a=b", "../a", "a b", "-a", "a" * 65])
def test_a_disk_id_that_qemu_could_misread_is_refused(bad: str) -> None:
    with pytest.raises(OperationRejected):
        device_name(bad)


def event(kind: str, at_ms: int = 0, **data: object) -> QemuEvent:
    timestamp = QemuEvent.Timestamp(seconds=at_ms // 1000, microseconds=at_ms % 1000 * 1000)
    return QemuEvent(event=kind, timestamp=timestamp, data=data)


def reset(at_ms: int, *, guest: bool = True) -> QemuEvent:
    return event("RESET", at_ms, guest=guest, reason="guest-reset" if guest else "host-qmp-system-reset")


def test_the_resets_of_the_firmware_belong_to_the_one_before() -> None:
    meaning = EventInterpreter(settle_ms=2000)
    moments = [10_000, 10_050, 11_900, 13_800, 15_801]
    assert [meaning.interpret(reset(at_ms)) for at_ms in moments] == [
        GuestEvent.RESET,
        None,
        None,
        None,
        GuestEvent.RESET,
    ]


def test_a_reset_of_ours_is_no_news_nor_is_what_follows_it() -> None:
    meaning = EventInterpreter(settle_ms=2000)
    assert meaning.interpret(reset(10_000, guest=False)) is None
    assert meaning.interpret(reset(10_100)) is None
    assert meaning.interpret(reset(12_200)) is GuestEvent.RESET


def test_a_guest_that_stands_still_for_lack_of_room_is_known_from_one_that_was_paused() -> None:
    meaning = EventInterpreter(settle_ms=2000)
    full = event("BLOCK_IO_ERROR", action="stop", nospace=True)
    told = event("BLOCK_IO_ERROR", action="report", nospace=False)
    happened = [event("STOP"), event("RESUME"), full, full, event("STOP"), event("RESUME"), event("STOP")]
    assert [meaning.halt(one) for one in happened] == [None, None, None, None, GuestEvent.NO_SPACE, None, None]
    assert [meaning.halt(one) for one in (told, event("STOP"))] == [None, None]
    failed = event("BLOCK_IO_ERROR", action="stop", nospace=False)
    assert [meaning.halt(one) for one in (failed, event("STOP"))] == [None, GuestEvent.IO_ERROR]


def test_a_wall_clock_that_is_set_back_hides_no_reset() -> None:
    meaning = EventInterpreter(settle_ms=2000)
    assert meaning.interpret(reset(100_000)) is GuestEvent.RESET
    assert meaning.interpret(reset(10_000)) is GuestEvent.RESET


def test_only_a_guest_that_powers_itself_off_has_stopped() -> None:
    meaning = EventInterpreter(settle_ms=2000)
    assert meaning.interpret(event("SHUTDOWN", guest=True, reason="guest-shutdown")) is GuestEvent.STOPPED
    assert meaning.interpret(event("SHUTDOWN", guest=False, reason="host-signal")) is None
    assert meaning.interpret(event("GUEST_PANICKED", action="pause")) is GuestEvent.CRASHED
    assert meaning.interpret(event("STOP")) is None


async def test_a_journal_gives_whole_events_and_passes_over_the_rest(tmp_path: Path) -> None:
    folder = InstanceFolder(tmp_path / "one")
    folder.inside.mkdir(parents=True)
    folder.make_event_pipes()
    heard: asyncio.Queue[str] = asyncio.Queue()
    journal = QmpEventLog(
        folder.open_event_pipe("in"),
        folder.open_event_pipe("out"),
        lambda told: heard.put_nowait(told.event),
        lambda: None,
    )
    writer = folder.open_event_pipe("out")
    stop = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}\r\n'
    os.write(writer, b'{"return": {}}\r\nnonsense\r\n' + stop + stop[:20])
    journal.drain()
    assert (heard.get_nowait(), heard.qsize()) == ("STOP", 0)
    journal.watch()
    os.write(writer, stop[20:])
    async with asyncio.timeout(PATIENCE_S):
        assert await heard.get() == "STOP"
    journal.close()
    os.close(writer)


def test_a_record_that_was_cut_short_counts_as_absent(tmp_path: Path) -> None:
    folder = InstanceFolder(tmp_path)
    (tmp_path / "process.json").write_bytes(b'{"phase": "runn')
    assert folder.process_record() is None
