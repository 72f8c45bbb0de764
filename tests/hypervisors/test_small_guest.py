"""The small guest: taken from packages without installing them, the same bytes each time, and a Linux that answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from interlock.core.errors import Unavailable
from interlock.core.records import Seed
from interlock.guests import packages, small_guest
from interlock.images import cloud_init
from interlock.images.image_folder import GuestFiles
from small_guests import packages_folder
from waiting import PATIENCE_S

QEMU = shutil.which("qemu-system-x86_64")
BUILT_FROM = ("apt-get", "apt-cache", "dpkg-deb")
MARKS = [
    pytest.mark.qemu,
    pytest.mark.skipif(not all(map(shutil.which, BUILT_FROM)), reason="apt is not on this system"),
]


def test_without_apt_the_remedy_says_what_else_can_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable) as told:
        small_guest.build(tmp_path)
    assert "image add" in (told.value.remedy or "")


def stand_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_without_package_lists_the_remedy_is_to_update_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "dpkg", "echo amd64")
    stand_in(tmp_path, "apt-cache", "echo 'N: Unable to locate package' >&2; exit 100")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="linux-image-cloud-amd64") as told:
        small_guest.build(tmp_path)
    assert "sudo apt-get update" in (told.value.remedy or "")


def test_a_download_that_fails_is_told_with_apts_own_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "dpkg", "echo amd64")
    stand_in(tmp_path, "apt-cache", 'echo "Package: $3"; echo "Version: 1:2-3"; echo "SHA256: 00"')
    stand_in(tmp_path, "apt-get", "echo 'E: Failed to fetch something' >&2; exit 100")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(Unavailable, match="Failed to fetch something"):
        small_guest.build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_packages_that_a_kernel_is_split_into_are_all_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """echo "Package: $3"; echo "Version: 1"; case $3 in
        linux-image-virtual) echo 'Depends: linux-image-6.8-generic (= 1) | other, wireless-regdb' ;;
        linux-image-6.8-generic) echo 'Depends: kmod, linux-modules-6.8-generic' ;;
    esac"""
    stand_in(tmp_path, "apt-cache", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    source = packages.PackageSource(tmp_path)
    first = packages.find_first(source, ("linux-image-virtual",))
    found = packages.closure(source, first, small_guest._KERNEL_PARTS)
    assert {part.name for part in found} == {
        "linux-image-virtual",
        "linux-image-6.8-generic",
        "linux-modules-6.8-generic",
    }


def test_packages_that_are_asked_for_together_are_looked_up_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"""echo "$@" >>{tmp_path}/calls; shift 2
        for name; do [ $name = absent ] || printf 'Package: %s\\nVersion: 1\\n\\n' $name; done"""
    stand_in(tmp_path, "apt-cache", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    source = packages.PackageSource(tmp_path)
    source.ask(("absent", "kernel", "busybox"))
    for name in ("kernel", "busybox"):
        found = source.find(name)
        assert found is not None
        assert (found.name, found.version) == (name, "1")
    assert (tmp_path / "calls").read_text().splitlines() == ["show --no-all-versions absent kernel busybox"]


@pytest.fixture(scope="module")
def guest() -> GuestFiles:
    return small_guest.build(packages_folder())


class Console:
    """What a guest writes to its serial port, line by line."""

    def __init__(self, output: asyncio.StreamReader) -> None:
        self._output = output

    async def until(self, expected: str) -> str:
        """The first line from now on that matches."""
        async with asyncio.timeout(PATIENCE_S):
            while line := (await self._output.readline()).decode("utf-8", "replace").strip():
                if re.search(expected, line):
                    return line
        raise AssertionError(f"the guest ended without saying {expected}")


class Booted:
    """A guest that runs: what it writes, the ways to it, and its disk."""

    def __init__(self, folder: Path, output: asyncio.StreamReader) -> None:
        self.folder = folder
        self.console = Console(output)
        self.monitor = QMPClient()
        self.connections = contextlib.AsyncExitStack()

    async def agent(self) -> GuestAgent:
        """The guest's agent, once it listens."""
        reader, writer = await asyncio.open_unix_connection(self.folder / "agent")
        self.connections.push_async_callback(closed, writer)
        return GuestAgent(reader, writer)

    async def get(self, path: str) -> str:
        """What the guest's web server answers, through the port that is forwarded to it."""
        answer = await self.monitor.execute("human-monitor-command", {"command-line": "info usernet"})
        found = re.search(r"TCP\[HOST_FORWARD\]\s+\S+\s+127\.0\.0\.1\s+(\d+)", str(answer))
        assert found is not None
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(found.group(1)))
            writer.write(f"GET /{path} HTTP/1.0\r\n\r\n".encode())
            text = (await reader.read()).decode()
            writer.close()
        return text.partition("\r\n\r\n")[2].strip()

    async def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.get("cgi-bin/status"))
        return found


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


class GuestAgent:
    """One who speaks with the guest's agent, as QEMU's documentation says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, command: str, mark: bytes = b"", **arguments: Any) -> None:
        self._writer.write(mark + json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")

    async def line(self) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.readline()

    async def ask(self, command: str, **arguments: Any) -> Any:
        """What it returns; of an error, its class."""
        self.send(command, **arguments)
        answer = json.loads(await self.line())
        return answer["return"] if "return" in answer else answer["error"]["class"]


MACHINE = (
    "-M q35 -cpu kvm64 -accel tcg -m 128 -nodefaults -no-user-config -display none -serial stdio "
    "-device pcie-root-port,id=slot1,slot=1 -device pcie-root-port,id=slot2,slot=2 "
    "-netdev user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:80 -device virtio-net-pci,netdev=net,romfile= "
    "-chardev socket,id=agent,path=agent,server=on,wait=off -device virtio-serial-pci "
    "-device virtserialport,chardev=agent,name=org.qemu.guest_agent.0 "
    "-drive file=disk,format=raw,if=virtio -drive file=seed.iso,format=raw,if=virtio,readonly=on"
)


@contextlib.asynccontextmanager
async def booting(guest: GuestFiles, folder: Path, seed: Seed) -> AsyncIterator[Booted]:
    assert QEMU is not None
    with (folder / "disk").open("wb") as disk:
        disk.truncate(8 << 20)
    cloud_init.write(folder / "seed.iso", seed, "tested")
    process = await asyncio.create_subprocess_exec(
        *(QEMU, *MACHINE.split(), "-kernel", str(guest.kernel), "-initrd", str(guest.initrd)),
        *("-append", f"{guest.cmdline} interlock.hostname=tested", "-qmp", "unix:qmp,server=on,wait=off"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        cwd=folder,
    )
    assert process.stdout is not None
    booted = Booted(folder, process.stdout)
    try:
        await booted.console.until("interlock-guest: up tested")
        await booted.monitor.connect(f"{folder}/qmp")
        yield booted
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await booted.connections.aclose()
        with contextlib.suppress(Exception):
            await booted.monitor.disconnect()


@pytest.fixture
async def booted(guest: GuestFiles, tmp_path: Path) -> AsyncIterator[Booted]:
    async with booting(guest, tmp_path, Seed(hostname="seeded")) as running:
        yield running


class TestBuilt:
    """What is built from this system's packages."""

    pytestmark = MARKS

    @pytest.mark.long
    def test_the_same_packages_make_the_same_bytes(self, guest: GuestFiles, tmp_path: Path) -> None:
        for package in packages_folder().glob("*.deb"):
            (tmp_path / package.name).hardlink_to(package)
        again = small_guest.build(tmp_path)
        assert again.kernel.parent.name == guest.kernel.parent.name
        assert again.kernel.read_bytes() == guest.kernel.read_bytes()
        assert again.initrd.read_bytes() == guest.initrd.read_bytes()

    def test_nothing_is_read_again_for_versions_that_were_built(
        self, guest: GuestFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(packages, "read_members", None)
        assert small_guest.build(packages_folder()) == guest

    def test_its_kernel_spends_no_time_on_signatures_of_its_own_modules(self, guest: GuestFiles) -> None:
        archive = guest.initrd.read_bytes()
        assert b"modules/virtio_blk.ko" in archive
        assert b"Module signature appended" not in archive

    def test_packages_in_the_cache_are_enough_where_apt_has_no_lists(
        self, guest: GuestFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stand_in(tmp_path, "apt-cache", "exit 100")
        stand_in(tmp_path, "apt-get", "exit 100")
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert small_guest.build(packages_folder()) == guest


@pytest.mark.skipif(QEMU is None, reason="QEMU is not installed")
class TestBooted:
    """The guest as a real virtual machine."""

    pytestmark = MARKS

    async def test_it_has_an_address_tells_of_a_plugged_disk_and_heeds_the_power_button(self, booted: Booted) -> None:
        console, monitor = booted.console, booted.monitor
        await console.until("interlock-guest: address 10.0.2.15")
        subprocess.run(["truncate", "--size=8M", booted.folder / "plugged"], check=True)  # noqa: ASYNC221
        file = {"driver": "file", "filename": "plugged"}
        await monitor.execute("blockdev-add", {"driver": "raw", "node-name": "disk", "file": file})
        await monitor.execute("device_add", {"driver": "virtio-blk-pci", "drive": "disk", "id": "d", "bus": "slot1"})
        await console.until("interlock-guest: disk vdc 16384 sectors")
        await monitor.execute("device_del", {"id": "d"})
        await console.until("interlock-guest: disk vdc gone")
        await monitor.execute("system_powerdown")
        await console.until("interlock-guest: power button")

    async def test_it_tells_of_an_interface_that_is_plugged_in_and_out(self, booted: Booted) -> None:
        console, monitor = booted.console, booted.monitor
        await console.until("interlock-guest: address")
        await monitor.execute("netdev_add", {"type": "user", "id": "second", "restrict": True})
        device = {"driver": "virtio-net-pci", "netdev": "second", "id": "n", "bus": "slot2", "romfile": ""}
        await monitor.execute("device_add", {**device, "mac": "52:54:00:00:00:77"})
        await console.until("interlock-guest: interface eth1 52:54:00:00:00:77")
        await monitor.execute("device_del", {"id": "n"})
        await console.until("interlock-guest: interface eth1 gone")

    async def test_what_was_written_to_its_disk_is_there_for_others_and_after_a_reset(self, booted: Booted) -> None:
        await booted.console.until("interlock-guest: address")
        before = await booted.status()
        assert await booted.get("cgi-bin/write?first%20words") == "first words"
        disk = (booted.folder / "disk").read_bytes()
        assert disk[1 << 20 :].startswith(b"first words\n\0")
        assert not any(disk[: 1 << 20])
        assert "no such disk" in await booted.get("cgi-bin/read/vdx")
        assert before["boot_id"] == (await booted.status())["boot_id"]
        await booted.monitor.execute("system_reset")
        await booted.console.until("interlock-guest: address")
        assert await booted.get("cgi-bin/read") == "first words"
        assert before["boot_id"] != (await booted.status())["boot_id"]

    async def test_a_guest_that_is_paused_goes_on_counting_where_it_was(self, booted: Booted) -> None:
        await booted.console.until("interlock-guest: address")
        before = await booted.status()
        await booted.monitor.execute("stop")
        await booted.monitor.execute("cont")
        after = await booted.status()
        while after["counter"] == before["counter"]:
            after = await booted.status()
        assert after["counter"] > before["counter"]
        assert after["uptime_s"] > before["uptime_s"]
        assert after["boot_id"] == before["boot_id"]

    async def test_its_agent_speaks_qemus_protocol(self, booted: Booted) -> None:
        await booted.console.until("interlock-guest: agent listens")
        agent = await booted.agent()
        agent.send("guest-sync-delimited", mark=b'{"execute": "gue\xff', id=981_264)
        assert await agent.line() == b'\xff{"return": 981264}\n'
        assert await agent.ask("guest-sync", id=17) == 17
        assert await agent.ask("guest-ping") == {}
        told = await agent.ask("guest-info")
        assert {"guest-ping", "guest-shutdown"} < {each["name"] for each in told["supported_commands"]}
        assert (await agent.ask("guest-get-osinfo"))["id"] == "interlock"
        assert await agent.ask("guest-exec", path="/bin/sh") == "CommandNotFound"
        assert await agent.ask("guest-sync") == "GenericError"

    async def test_its_agent_sets_a_password_that_is_kept_as_a_hash(self, booted: Booted) -> None:
        await booted.console.until("interlock-guest: agent listens")
        agent = await booted.agent()
        secret = base64.b64encode(b"a secret").decode()
        assert await agent.ask("guest-set-user-password", username="nobody", password=secret) == "GenericError"
        assert await agent.ask("guest-set-user-password", username="root", password=secret, crypted=False) == {}
        kept = (await booted.status())["passwords"]["root"]
        made = subprocess.run(  # noqa: ASYNC221
            ["openssl", "passwd", "-5", "-salt", kept.split("$")[2], "a secret"],
            check=True,
            capture_output=True,
            text=True,
        )
        assert made.stdout.strip() == kept

    async def test_who_writes_waits_while_it_is_frozen(self, booted: Booted) -> None:
        await booted.console.until("interlock-guest: agent listens")
        agent = await booted.agent()
        assert await agent.ask("guest-fsfreeze-status") == "thawed"
        assert await agent.ask("guest-fsfreeze-freeze") == 1
        assert await agent.ask("guest-fsfreeze-freeze") == "GenericError"
        assert await agent.ask("guest-get-osinfo") == "GenericError"
        writing = asyncio.create_task(booted.get("cgi-bin/write?late"))
        # A second conversation after the writer's has begun: the guest has had its chance to answer the first.
        assert (await booted.status())["frozen"] is True
        assert not writing.done()
        assert not any((booted.folder / "disk").read_bytes())
        assert await agent.ask("guest-fsfreeze-thaw") == 1
        assert await writing == "late"
        assert await agent.ask("guest-fsfreeze-thaw") == 0
        assert (await booted.status())["freezes"] == 1

    async def test_its_agent_powers_it_off_and_can_be_told_to_be_silent(self, booted: Booted) -> None:
        await booted.console.until("interlock-guest: agent listens")
        agent = await booted.agent()
        assert await booted.get("cgi-bin/silence-agent") == "silence-agent"
        agent.send("guest-sync", id=1)
        await booted.console.until("interlock-guest: agent silent")
        assert await booted.get("cgi-bin/wake-agent") == "wake-agent"
        assert await agent.ask("guest-sync", id=2) == 2
        agent.send("guest-shutdown", mode="powerdown")
        await booted.console.until("interlock-guest: agent powerdown")
        assert await agent.line() == b""

    async def test_it_takes_a_seed_to_heart(self, guest: GuestFiles, tmp_path: Path) -> None:
        script = "#!/bin/sh\necho ran as $(hostname)\ncat /root/.ssh/authorized_keys\n"
        keys = ("ssh-ed25519 AAAAC3Nza me@there", "ecdsa-sha2-nistp256 AAAAE2V= you")
        async with booting(guest, tmp_path, Seed(hostname="web-1", ssh_keys=keys, user_data=script)) as booted:
            await booted.console.until("interlock-guest: seed web-1")
            await booted.console.until("ran as web-1")
            for key in keys:
                assert await booted.console.until("ssh-|ecdsa") == key
            assert (await booted.status())["hostname"] == "web-1"

    async def test_it_does_what_a_simple_cloud_config_says(self, guest: GuestFiles, tmp_path: Path) -> None:
        config = "#cloud-config\nhostname: db-1\nruncmd:\n  - echo one $((1 + 1))\n  - echo three\nother: 1\n"
        async with booting(guest, tmp_path, Seed(hostname="web-1", user_data=config)) as booted:
            await booted.console.until("interlock-guest: seed db-1")
            assert await booted.console.until("one") == "one 2"
            await booted.console.until("three")
