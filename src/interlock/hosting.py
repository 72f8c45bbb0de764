"""The composition root of a host's agent: what `interlock agent` is made of, and how it keeps in touch with its server.

The agent holds guests and decides nothing; what is done to them is the server's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import structlog

from interlock.config import Config
from interlock.core.errors import Forbidden, InterlockError, NotResponding
from interlock.hypervisors.choice import hypervisor_of
from interlock.hypervisors.qemu.images_in_use import images_in_use
from interlock.hypervisors.remote.dialling import dial
from interlock.hypervisors.remote.lease import ENDLESS_NS, Lease, now_ns
from interlock.hypervisors.remote.serving import HostService
from interlock.hypervisors.remote.watchdog import LEASE, Watchdog
from interlock.hypervisors.remote.wire import Exchange, Renew, Welcome
from interlock.ports import Hypervisor, Link
from interlock.service.capacity import disk_free_mib, limits_of
from interlock.wiring import make_folder

_LOG = structlog.get_logger(__name__)
_PAUSE_S: Final = 0.2
_PAUSE_MAX_S: Final = 3.0
"""Between two attempts to reach the server, in seconds: the first, and the longest."""
_RENEWAL_MAX_S: Final = 5.0
"""How often an agent gives a sign of life at least, in seconds."""


class Contact(msgspec.Struct, frozen=True, kw_only=True):
    """How an agent reaches its server."""

    server: str
    """The server's URL."""
    token: str
    name: str
    """What this host is called."""
    certificate: Path | None = None
    """A certificate to trust beside the system's."""
    shared: Path | None = None
    """A folder that this host and the server have in common, under the same name."""


class HostAgent:
    """Everything that runs in one agent's process."""

    def __init__(self, config: Config, contact: Contact, hypervisor: Hypervisor | None = None) -> None:
        self._contact = contact
        self._folder = config.folder
        self._lease = Lease(self._folder / LEASE)
        self._watchdog = Watchdog(self._folder, self._folder / "guests" / "vms")
        self._service = HostService(
            contact.name,
            hypervisor or hypervisor_of(config),
            self._folder,
            shared=contact.shared,
            address=config.qemu.migration_address,
            limits=lambda: limits_of(config, config.folder),
            boots_from=partial(images_in_use, self._folder / "guests" / "vms"),
            may_hold=self._may_hold,
        )
        self._stopping = asyncio.Event()
        self._lease_ms = 0
        self._sent: dict[int, int] = {}
        self._answered = asyncio.Event()
        self._guarded = False
        self._pause_s = _PAUSE_S

    def _may_hold(self) -> None:
        """Raise `NotResponding` unless this host may hold guests now."""
        self._lease.require()
        if self._guarded and not self._watchdog.alive:
            raise NotResponding("The process that watches over this host's lease has ended; another is being started.")

    async def run(self) -> None:
        """Take charge of the host's guests, and serve the server until told to stop.

        Raises:
            Unavailable: guests cannot be held here, such as where another agent does.
            Forbidden: the server does not let this agent in.
        """
        make_folder(self._folder)
        self._lease.open()
        await self._service.open()
        try:
            await self._watchdog.ensure()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.stop)
            serving = asyncio.create_task(self._serve(), name="serve the server")
            stopping = asyncio.create_task(self._stopping.wait(), name="until stopped")
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in (serving, stopping):
                task.cancel()
            await asyncio.wait({serving, stopping})
            if not serving.cancelled():
                serving.result()
        finally:
            await self._service.close()
            self._watchdog.close()
            self._lease.close()

    def stop(self) -> None:
        """Have `run` come to its end. Guests go on for as long as the lease lasts."""
        self._stopping.set()

    async def _serve(self) -> None:
        """Be connected with the server, again and again."""
        let_in = False
        while True:
            try:
                link = await dial(
                    self._contact.server, self._contact.name, self._contact.token, self._contact.certificate
                )
                let_in = True
                await self._converse(link)
            except ConnectionError as error:
                _LOG.info("not connected", server=self._contact.server, why=str(error))
            except InterlockError as error:
                if not let_in and isinstance(error, Forbidden):
                    raise
                _LOG.warning("turned away", server=self._contact.server, why=error.message, remedy=error.remedy)
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(self._pause_s * 2, _PAUSE_MAX_S)

    async def _converse(self, link: Link) -> None:
        renewing: list[asyncio.Task[None]] = []

        def welcomed(exchange: Exchange, welcome: Welcome) -> None:
            _LOG.info("connected", server=self._contact.server, host=self._contact.name)
            # Only now: a server that wants no such agent is not to be asked again at once, for as long as both run.
            self._pause_s = _PAUSE_S
            self._lease_ms = welcome.lease_ms
            renewing.append(asyncio.create_task(self._renew(exchange, link), name="renew the lease"))

        try:
            await self._service.run(link, welcomed, self._renewed)
        finally:
            for task in renewing:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _renew(self, exchange: Exchange, link: Link) -> None:
        """Renew the lease again and again; a server that does not answer any more is called anew."""
        interval_s = min(_RENEWAL_MAX_S, self._lease_ms / 3000) if self._lease_ms else _RENEWAL_MAX_S
        number = 0
        while True:
            self._guarded = bool(self._lease_ms)
            await self._watchdog.ensure()
            number += 1
            self._answered.clear()
            self._sent[number] = now_ns()
            exchange.post(Renew(number=number, disk_free_mib=disk_free_mib(self._folder)))
            try:
                async with asyncio.timeout(interval_s * 3):
                    await self._answered.wait()
            except TimeoutError:
                _LOG.warning("the server does not answer", server=self._contact.server)
                with contextlib.suppress(ConnectionError):
                    await link.close()
                return
            await asyncio.sleep(interval_s)

    def _renewed(self, number: int) -> None:
        """The lease counts from when it was asked for: the server counts from a later moment."""
        sent_ns = self._sent.pop(number, None)
        if sent_ns is not None:
            self._lease.extend(sent_ns + self._lease_ms * 1_000_000 if self._lease_ms else ENDLESS_NS)
            self._sent = {later: at for later, at in self._sent.items() if later > number}
            self._answered.set()
