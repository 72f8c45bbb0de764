"""What a host can do for each kind of network, and what it lacks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

from interlock.core.networks import NetworkKind
from interlock.networks import host_programs
from interlock.networks.dnsmasq import DNSMASQ
from interlock.networks.links import TUN
from interlock.networks.nftables import NFT
from interlock.ports.hosts import NetworkAbility

_STATUS: Final = Path("/proc/thread-self/status")
_NET_ADMIN: Final = 1 << 12
_TIMEOUT_S: Final = 10.0


def abilities() -> tuple[NetworkAbility, ...]:
    """Return what this host can do for each kind of network. Blocks for some milliseconds."""
    for_taps = [*_privileges(), *_missing(NFT)]
    if not for_taps:
        for_taps += _without_nftables()
    for_dhcp = [*for_taps, *_missing(DNSMASQ)]
    without_passt = "; ".join(_missing("passt"))
    return (
        NetworkAbility(
            kind=NetworkKind.USER,
            available=True,
            detail=f"{without_passt}: QEMU's own user network is used, restricted" if without_passt else "",
        ),
        NetworkAbility(kind=NetworkKind.BRIDGE, available=not for_taps, detail="; ".join(for_taps)),
        NetworkAbility(kind=NetworkKind.MANAGED, available=not for_dhcp, detail="; ".join(for_dhcp)),
    )


def why_no_filter() -> str:
    """Return why this host cannot have rules of nftables, for people; empty if it can. Blocks for some milliseconds."""
    return "; ".join([*_no_net_admin(), *_missing(NFT)] or _without_nftables())


def _no_net_admin() -> list[str]:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("CapEff:"))
    may = int(line.split()[1], 16) & _NET_ADMIN
    return [] if may else ["the server has no CAP_NET_ADMIN (run it as root)"]


def _privileges() -> list[str]:
    lacks = _no_net_admin()
    if not os.access(TUN, os.R_OK | os.W_OK):
        lacks.append(f"{TUN} cannot be opened")
    return lacks


def _missing(program: str) -> list[str]:
    if host_programs.find(program):
        return []
    return [f"{program} is not installed (package {host_programs.PACKAGES.get(program, program)})"]


def _without_nftables() -> list[str]:
    # Takes as long with many rules as with none, unlike a list.
    words = [host_programs.find(NFT) or NFT, "--check", "add", "table", "inet", "interlock_probe"]
    try:
        tried = subprocess.run(words, capture_output=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603 - our own words
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nft cannot be run: {error}"]
    if tried.returncode == 0:
        return []
    lines = tried.stderr.decode("utf-8", "replace").strip().splitlines()
    return [f"nft does not work: {lines[0] if lines else f'exit status {tried.returncode}'}"]
