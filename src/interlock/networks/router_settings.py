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
_FILE: Final = "forwarding-set-{}"


class RouterSettings:
    """The settings with which a host forwards packets.

    Args:
        folder: has a file for each setting that was changed, until it is set back.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

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
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._mark(version).touch()
            try:
                setting.write_text("1")
            except OSError as error:
                self._mark(version).unlink()
                raise OperationRejected(
                    f"{name} is off, and cannot be set: {error.strerror}.",
                    remedy=f"Set `sysctl -w {name}=1`: the network {network.name} needs it to go beyond its host.",
                ) from error

    def restore(self, found: Iterable[str]) -> None:
        """Set back what was set, unless another data folder has managed networks here.

        Args:
            found: the names of the host's links.
        """
        others = any(BRIDGE_OF_ANY.match(name) for name in found)
        for version, setting in _SETTINGS.items():
            if self._mark(version).exists():
                if not others:
                    setting.write_text("0")
                self._mark(version).unlink()

    def _mark(self, version: int) -> Path:
        return self._folder / _FILE.format(version)
