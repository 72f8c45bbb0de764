"""Connections between hosts: both sides have a certificate of their server's CA, and see whose the other's is."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from benchmarks.nano_guest import Act, nano_guest
from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench, opened, two_benches
from interlock.config import Config, HostsConfig
from interlock.core.errors import Invalid, OperationRejected, Unavailable
from interlock.core.records import Spec
from interlock.core.states import PowerState
from interlock.hypervisors.certificates.authority import CertificateAuthority
from interlock.hypervisors.certificates.host_certificate import HostCertificate
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.migration.connections import OK, PeerTls, connect, read_line, send_line
from interlock.hypervisors.qemu.migration.relay import Relay
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports.migration import MigrationEndpoint
from waiting import PATIENCE_S

PERMIT = GivenPermit()
NOW_MS = 1_800_000_000_000
DAY_MS = 24 * 3_600_000
MIB = 1024**2


class FixedClock:
    """Satisfies `authority.WallClock`."""

    def __init__(self, wall_ms: int) -> None:
        self.wall_ms = wall_ms

    def now_ms(self) -> int:
        return 0

    def shown_ms(self, at_ms: int) -> int:
        return self.wall_ms + at_ms


def authority(folder: Path, wall_ms: int | None = None) -> CertificateAuthority:
    """A server's CA, which takes it to be that time; by default the present."""
    folder.mkdir(exist_ok=True)
    now_ms = int(time.time() * 1000) if wall_ms is None else wall_ms
    return CertificateAuthority(Config(data_dir=str(folder)), "here", FixedClock(now_ms))


def certificate(ca: CertificateAuthority, name: str, folder: Path) -> HostCertificate:
    made = HostCertificate(folder)
    made.install(ca.issue(name, made.request()))
    return made


@asynccontextmanager
async def target(tls: PeerTls) -> AsyncIterator[MigrationEndpoint]:
    """A target that accepts whatever has a valid certificate of the source that it expects."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)

        async def accept() -> None:
            while True:
                connection, _ = await asyncio.get_running_loop().sock_accept(listening)
                connection.setblocking(False)
                try:
                    with await tls.secure(connection, server_side=True) as outer:
                        await read_line(outer)
                        await send_line(outer, OK)
                except OSError:
                    connection.close()

        accepting = asyncio.create_task(accept())
        try:
            yield MigrationEndpoint(host="127.0.0.1", port=listening.getsockname()[1], secret="secret")
        finally:
            accepting.cancel()
            await asyncio.wait({accepting})


async def refused(north: HostCertificate, south: HostCertificate, source: str = "north", to: str = "south") -> str:
    """Why a connection of north to south fails, and what to do; south expects `source`, and north `to`."""
    async with target(PeerTls(south, source)) as endpoint:
        with pytest.raises(OperationRejected) as rejected:
            (await connect(endpoint, "memory", PeerTls(north, to), PATIENCE_S)).close()
    return f"{rejected.value.message} {rejected.value.remedy}"


async def test_two_hosts_of_one_server_connect(tmp_path: Path) -> None:
    ca = authority(tmp_path / "server")
    north, south = (certificate(ca, name, tmp_path / name) for name in ("north", "south"))
    async with target(PeerTls(south, "north")) as endpoint:
        with await connect(endpoint, "memory", PeerTls(north, "south"), PATIENCE_S) as connection:
            assert connection.version() == "TLSv1.3"  # type: ignore[attr-defined]


async def test_a_host_is_sent_nothing_if_its_certificate_is_of_another(tmp_path: Path) -> None:
    ca = authority(tmp_path / "server")
    north, south = (certificate(ca, name, tmp_path / name) for name in ("north", "south"))
    why = await refused(north, south, to="west")
    assert "The target host west cannot be sent the VM" in why
    assert "its certificate is of host south, not of host west" in why
    assert "qemu.migration_address" in why


async def test_a_host_receives_nothing_from_another_than_the_source(tmp_path: Path) -> None:
    ca = authority(tmp_path / "server")
    north, south = (certificate(ca, name, tmp_path / name) for name in ("north", "south"))
    assert "its certificate is of host north, not of host east" in await refused(north, south, source="east")


@pytest.mark.parametrize("whose", ["north", "south"])
async def test_a_certificate_of_another_ca_is_refused_on_both_sides(whose: str, tmp_path: Path) -> None:
    known, other = authority(tmp_path / "server"), authority(tmp_path / "other")
    north, south = (
        certificate(other if name == whose else known, name, tmp_path / name) for name in ("north", "south")
    )
    why = await refused(north, south)
    assert "its certificate is not from this server's CA" in why
    assert "Restart the agents of both hosts" in why


@pytest.mark.parametrize(
    ("whose", "said"),
    [("north", "it rejected the certificate of this host"), ("south", "its certificate is not valid now")],
)
async def test_an_expired_certificate_is_refused_on_both_sides(whose: str, said: str, tmp_path: Path) -> None:
    ca = authority(tmp_path / "server")
    before = authority(tmp_path / "server", int(time.time() * 1000) - 31 * DAY_MS)
    certificate(before, "west", tmp_path / "west")  # so that the CA is not younger than what it issues
    north, south = (certificate(before if name == whose else ca, name, tmp_path / name) for name in ("north", "south"))
    why = await refused(north, south)
    assert said in why
    assert "expired" in why
    assert "that the clocks are right" in why


async def test_a_host_without_a_certificate_says_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "north").mkdir()
    with pytest.raises(OperationRejected) as rejected:
        HostCertificate(tmp_path / "north").settings(server_side=True)
    assert "This host has no valid certificate in" in rejected.value.message
    assert "Restart its agent" in str(rejected.value.remedy)


# -------------------------------------------------------------------------------------------------------- authority


def test_keys_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    ca = authority(tmp_path / "server")
    certificate(ca, "north", tmp_path / "north")
    keys = [tmp_path / "server" / "tls" / name for name in ("ca.key", "host.pem")]
    for path in (*keys, tmp_path / "north" / "host.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


async def test_the_ca_is_the_same_after_a_restart_of_the_server(tmp_path: Path) -> None:
    north = certificate(authority(tmp_path / "server"), "north", tmp_path / "north")
    south = certificate(authority(tmp_path / "server"), "south", tmp_path / "south")
    async with target(PeerTls(south, "north")) as endpoint:
        (await connect(endpoint, "memory", PeerTls(north, "south"), PATIENCE_S)).close()


def test_a_ca_whose_key_is_lost_is_not_replaced_in_silence(tmp_path: Path) -> None:
    certificate(authority(tmp_path / "server"), "north", tmp_path / "north")
    (tmp_path / "server" / "tls" / "ca.key").unlink()
    with pytest.raises(Unavailable, match="The key of the server's CA is not found") as lost:
        certificate(authority(tmp_path / "server"), "north", tmp_path / "north")
    assert "Restore it from a backup" in str(lost.value.remedy)


@pytest.mark.parametrize(
    "request_text", ["", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"]
)
def test_what_is_no_certificate_request_is_refused(request_text: str, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="Invalid certificate request"):
        authority(tmp_path / "server").issue("north", request_text)


def test_the_certificate_of_the_servers_own_host_is_renewed_in_time(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    clock = FixedClock(NOW_MS)
    config = Config(data_dir=str(tmp_path / "server"), hosts=HostsConfig(certificate_ms=30 * DAY_MS))
    ca, own = CertificateAuthority(config, "here", clock), tmp_path / "server" / "tls" / "host.pem"
    seen = []
    for days in (0, 9, 11, -20):
        clock.wall_ms = NOW_MS + days * DAY_MS
        certificate(ca, "north", tmp_path / "north")
        seen.append(own.read_bytes())
    assert seen[0] == seen[1] != seen[2] != seen[3]


# ------------------------------------------------------------------------------------------------------------ relay


async def relayed(tmp_path: Path) -> tuple[socket.socket, Relay, Relay, socket.socket]:
    """Two ends with a TLS connection between them."""
    ca = authority(tmp_path / "server")
    north, south = (certificate(ca, name, tmp_path / name) for name in ("north", "south"))
    (one, inner_one), (two, inner_two) = socket.socketpair(), socket.socketpair()
    left, right = socket.socketpair()
    for each in (left, right):
        each.setblocking(False)
    outer_one, outer_two = await asyncio.gather(
        PeerTls(north, "south").secure(left, server_side=False), PeerTls(south, "north").secure(right, server_side=True)
    )
    return one, Relay(inner_one, outer_one, "one"), Relay(inner_two, outer_two, "two"), two


def received(end: socket.socket) -> bytes:
    found = bytearray()
    while piece := end.recv(MIB):
        found += piece
    return bytes(found)


async def test_everything_that_was_sent_arrives_also_what_was_sent_last(tmp_path: Path) -> None:
    one, first, second, two = await relayed(tmp_path)
    sent = secrets.token_bytes(8 * MIB + 1)

    def send() -> None:
        with one:
            one.sendall(sent)

    with two:
        _, found = await asyncio.gather(asyncio.to_thread(send), asyncio.to_thread(received, two))
    assert found == sent
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(first.ended.wait(), second.ended.wait())
    assert (first.failure, second.failure) == (None, None)


async def test_both_directions_are_forwarded_at_once(tmp_path: Path) -> None:
    one, first, second, two = await relayed(tmp_path)
    sent = secrets.token_bytes(4 * MIB)

    def exchange(end: socket.socket) -> bytes:
        end.settimeout(PATIENCE_S)
        found = bytearray()
        view = memoryview(sent)
        while len(found) < len(sent):
            if view:
                view = view[end.send(view[: 64 * 1024]) :]
            found += end.recv(64 * 1024)
        return bytes(found)

    with one, two:
        found = await asyncio.gather(*(asyncio.to_thread(exchange, end) for end in (one, two)))
        assert list(found) == [sent, sent]
    await asyncio.gather(first.ended.wait(), second.ended.wait())


async def test_a_relay_that_is_closed_ends_both_sides(tmp_path: Path) -> None:
    one, first, second, two = await relayed(tmp_path)
    with one, two:
        first.close()
        assert list(await asyncio.gather(asyncio.to_thread(one.recv, 1), asyncio.to_thread(two.recv, 1))) == [b"", b""]
    await asyncio.gather(first.ended.wait(), second.ended.wait())


# --------------------------------------------------------------------------------------------------------- migration


@pytest.mark.qemu
@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed")
async def test_a_guest_whose_connection_breaks_on_the_way_runs_on_at_the_source(tmp_path: Path) -> None:
    with two_benches(tmp_path) as benches:
        north, _ = benches
        north.settings = replace(north.settings, migration_bytes_per_s=4 * MIB)
        certify(tmp_path, benches)
        here, there = [await opened(bench) for bench in benches]
        spec = Spec(image=nano_guest(north.folder, Act.DIRTY), memory_mib=16)
        await here.define(PERMIT, "one", spec)
        await here.power_on(PERMIT, "one", spec)
        await north.until_up("one")
        await there.define(PERMIT, "one", spec)
        endpoint = await there.receive_guest_tls(PERMIT, "one", spec, await here.machine_kind("one"), "north")
        moved = asyncio.Event()
        sending = asyncio.create_task(
            here.send_guest_tls(PERMIT, "one", endpoint, "south", 0, lambda *_, **__: moved.set())
        )
        await moved.wait()
        break_connection(there)
        with pytest.raises(OperationRejected, match=f"The connection to 127.0.0.1:{endpoint.port} broke: ") as failed:
            await sending
        assert "VM one could not be migrated" in failed.value.message
        assert "The VM continues on the source host." in str(failed.value.remedy)
        assert (await here.inspect("one")).power_state is PowerState.RUNNING
        await north.until_up("one")
        for hypervisor in (here, there):
            await hypervisor.undefine(PERMIT, "one")
            await hypervisor.close()


def break_connection(target: QemuHypervisor) -> None:
    """End the connection to a target as the end of its process does, without a word of TLS."""
    (relay,) = target._migration._listeners["one"]._relays
    with socket.socket(fileno=os.dup(relay._outer.fileno())) as connection:
        connection.shutdown(socket.SHUT_RDWR)


async def test_a_host_neither_sends_nor_receives_unencrypted_unless_its_configuration_allows_it(tmp_path: Path) -> None:
    hypervisor = QemuHypervisor(QemuSettings(folder=tmp_path))
    endpoint = MigrationEndpoint(host="127.0.0.1", port=1, secret="secret")
    spec = Spec(image=nano_guest(tmp_path))
    for refused in (
        hypervisor.receive_guest(PERMIT, "one", spec, ""),
        hypervisor.send_guest(PERMIT, "one", endpoint, 0, lambda *_, **__: None),
    ):
        with pytest.raises(OperationRejected, match="does not send or receive VMs without encryption") as rejected:
            await refused
        assert "qemu.migration_unencrypted" in str(rejected.value.remedy)


def certify(folder: Path, benches: tuple[QemuWorkbench, QemuWorkbench]) -> None:
    ca = authority(folder / "server")
    for name, bench in zip(("north", "south"), benches, strict=True):
        bench.certificate.install(ca.issue(name, bench.certificate.request()))
