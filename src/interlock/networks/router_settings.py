"""The settings with which a host forwards packets: set for managed networks, and set back when there are none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from interlock.core.errors import OperationRejected
from interlock.core.networks import Network
from interlock.networks.connections import BRIDGE_OF_ANY, Connection, ranges
from interlock.networks.links import Links

_SETTINGS: Final = {4: Path("/proc/sys/net/ipv4/ip_forward"), 6: Path("/proc/sys/net/ipv6/conf/all/forwarding")}
_FOLDER: Final = Path("/run/interlock/forwarding")
"""Shared by all data folders of a host, and empty after a reboot, as the settings are."""


class RouterSettings:
    """The settings with which a host forwards packets.

    A setting that was changed has a file until it is set back by whichever data folder has the last managed network.
    """

    async def need(self, network: Network, members: Sequence[Connection], links: Links) -> None:
        """Set forwarding as a network needs it.

        Raises:
            OperationRejected: it is off and cannot be set, or setting it would cut off the host.
        """
        passes = (
            network.outbound or network.open_outside or any(one.forwards or one.interface.ingress for one in members)
        )
        for version, setting in _SETTINGS.items():
            if not passes or not ranges(network, version) or setting.read_text().strip() != "0":
                continue
            name = ".".join(setting.relative_to("/proc/sys").parts)
            if version == 6 and (cut_off := await links.advertised_routes()):  # noqa: PLR2004
                raise OperationRejected(
                    f"{name} is off, and with it the host would lose the IPv6 routes that {', '.join(cut_off)} learned "
                    "from router advertisements.",
                    remedy=f"Set `sysctl -w net.ipv6.conf.{cut_off[0]}.accept_ra=2`, which keeps them.",
                )
            try:
                _FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
                _mark(version).touch()
                setting.write_text("1")
            except OSError as error:
                _mark(version).unlink(missing_ok=True)
                raise OperationRejected(
                    f"{name} is off, and cannot be set: {error.strerror}.",
                    remedy=f"Set `sysctl -w {name}=1`: the network {network.name} needs it to go beyond its host.",
                ) from error

    def restore(self, found: Iterable[str]) -> None:
        """Set back what was set, unless another data folder has managed networks here.

        Args:
            found: the names of the host's links.
        """
        if any(BRIDGE_OF_ANY.match(name) for name in found):
            return
        for version, setting in _SETTINGS.items():
            if _mark(version).exists():
                setting.write_text("0")
                _mark(version).unlink()


def _mark(version: int) -> Path:
    """Return the file of a setting, which each network namespace has of its own."""
    return _FOLDER / f"ipv{version}-{Path('/proc/thread-self/ns/net').stat().st_ino}"
