"""What programs that run as users of VMs reach of a host and beyond."""

from __future__ import annotations

import contextlib
import ctypes
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from interlock.core.errors import OperationRejected
from interlock.core.specs import Forward
from interlock.networks import nftables
from interlock.networks.user_filter import UserFilter
from networks.conftest import Host, interface, lab
from networks.namespaces import Namespace

FIRST, COUNT = 1_990_000, 100
OPEN, CLOSED = FIRST, FIRST + 7
OTHER = FIRST + COUNT
PORT = 8080
INTERNET = "192.0.2.1"
REFUSED = b"refused"
_LIBC = ctypes.CDLL(None)


@contextlib.contextmanager
def as_user(user: int) -> Iterator[None]:
    """Let this thread, and those that it starts, open sockets as a user."""
    before = _LIBC.setfsuid(user)
    try:
        yield
    finally:
        _LIBC.setfsuid(before)


def tried(namespace: Namespace, user: int, address: str, port: int = PORT) -> bytes:
    """Return what a user reads from a TCP port, or that it was refused."""
    with as_user(user), namespace.opened(socket.AF_INET6 if ":" in address else socket.AF_INET) as caller:
        try:
            caller.connect((address, port))
        except ConnectionRefusedError:
            return REFUSED
        return caller.recv(100)


@pytest.fixture
async def user_filter(host: Host) -> AsyncIterator[UserFilter]:
    made = UserFilter("abcdef", FIRST, COUNT)
    await made.settle({OPEN: True, CLOSED: False}, [])
    yield made
    await made.settle({}, [])
    assert "interlock_abcdef_user" not in host.namespace.run("nft", "list", "tables")


async def test_a_user_network_reaches_the_internet_and_no_address_of_its_host(
    host: Host, user_filter: UserFilter
) -> None:
    host.namespace.ip("addr add 169.254.169.254/32 dev lo")
    with host.namespace.serving(PORT), host.internet.serving(PORT, answer=b"internet"):
        assert tried(host.namespace, OPEN, INTERNET) == b"internet"
        for address in ("127.0.0.1", "127.0.0.53", "192.0.2.2", "169.254.169.254"):
            assert tried(host.namespace, OPEN, address) == REFUSED, address
            assert tried(host.namespace, OTHER, address) == b"hello", address


async def test_the_metadata_service_of_a_cloud_is_out_of_reach_beyond_the_host_too(
    host: Host, user_filter: UserFilter
) -> None:
    host.internet.ip("addr add fd00::1/64 dev eth0 nodad")
    host.namespace.ip("addr add fd00::2/64 dev up0 nodad")
    for address, router in (("169.254.169.254", INTERNET), ("168.63.129.16", INTERNET), ("fd00:ec2::254", "fd00::1")):
        host.internet.ip(f"addr add {address} dev lo")
        host.namespace.ip(f"route add {address} via {router}")
        with host.internet.serving(PORT, address, b"secrets"):
            assert tried(host.namespace, OTHER, address) == b"secrets"
            assert tried(host.namespace, OPEN, address) == REFUSED


async def test_a_user_network_reaches_neither_managed_networks_nor_their_forwards(
    host: Host, user_filter: UserFilter
) -> None:
    forward = Forward(host_port=PORT, guest_port=PORT, host_address="0.0.0.0")
    guest = await host.guest("one", interface(5, lab()), [forward])
    with guest.serving(PORT):
        for address in ("10.7.0.5", "127.0.0.1", "192.0.2.2"):
            assert tried(host.namespace, OTHER, address) == b"hello", address
            assert tried(host.namespace, OPEN, address) == REFUSED, address


async def test_a_closed_user_network_reaches_nothing_until_it_is_opened(host: Host, user_filter: UserFilter) -> None:
    with host.internet.serving(PORT, answer=b"internet"):
        assert tried(host.namespace, CLOSED, INTERNET) == REFUSED
        await user_filter.settle({CLOSED: True}, [])
        assert tried(host.namespace, CLOSED, INTERNET) == b"internet"


@pytest.mark.parametrize("user", [OPEN, CLOSED])
async def test_a_forwarded_port_answers_whatever_its_user_may_connect_to(
    host: Host, user_filter: UserFilter, user: int
) -> None:
    with as_user(user), host.namespace.serving(PORT, "127.0.0.1", b"forwarded"):
        assert tried(host.namespace, OTHER, "127.0.0.1") == b"forwarded"


async def test_only_the_dns_port_of_a_resolver_on_the_host_is_reached(host: Host, user_filter: UserFilter) -> None:
    await user_filter.settle({OPEN: True, CLOSED: False}, ["127.0.0.53", "::1"])
    for address in ("127.0.0.53", "::1"):
        with host.namespace.serving(53, address, b"dns"), host.namespace.serving(54, address, b"other"):
            assert tried(host.namespace, OPEN, address, 53) == b"dns"
            assert tried(host.namespace, OPEN, address, 54) == REFUSED
            assert tried(host.namespace, CLOSED, address, 53) == REFUSED


async def test_rules_that_somebody_removed_are_made_again_beside_those_of_others(
    host: Host, user_filter: UserFilter
) -> None:
    host.namespace.run("nft", "flush", "ruleset")
    host.namespace.run("nft", "add", "table", "inet", "theirs")
    with host.namespace.serving(PORT):
        assert tried(host.namespace, OPEN, "127.0.0.1") == b"hello"
        await user_filter.settle({OPEN: True}, [], anew=True)
        assert tried(host.namespace, OPEN, "127.0.0.1") == REFUSED
    assert "theirs" in host.namespace.run("nft", "list", "tables")


async def test_another_user_with_the_same_rights_costs_no_change_of_rules(
    user_filter: UserFilter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_: object) -> None:
        raise OperationRejected("nothing may be changed")

    monkeypatch.setattr(nftables, "apply", refuse)
    await user_filter.settle({OPEN: True, OPEN + 1: True, CLOSED: False}, [])
    with pytest.raises(OperationRejected):
        await user_filter.settle({OPEN: False, CLOSED: False}, [])
    monkeypatch.undo()


async def test_a_server_that_starts_again_takes_over_what_the_former_one_made(
    host: Host, user_filter: UserFilter
) -> None:
    await UserFilter("abcdef", FIRST, COUNT).settle({CLOSED: False}, [])
    assert host.namespace.run("nft", "list", "ruleset").count("hook output") == 1
    await user_filter.settle({OPEN: True}, [], anew=True)
