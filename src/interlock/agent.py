"""The composition root of `interlock agent`: runs a host's guests, and keeps the connection and lease with its server.

The agent decides nothing: it executes the calls of its server.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
import structlog

from interlock.config import Config, is_loopback
from interlock.core.errors import Forbidden, HostTaken, InterlockError, NotResponding
from interlock.core.specs import repr_hiding
from interlock.hypervisors.certificates.host_certificate import HostCertificate
from interlock.hypervisors.factory import hypervisor_of, log_protections, networks_of, protections_of
from interlock.hypervisors.qemu.disks.images_in_use import images_in_use
from interlock.hypervisors.remote.agent_service import AgentService
from interlock.hypervisors.remote.exchange import Exchange
from interlock.hypervisors.remote.http_ranges import HttpRanges
from interlock.hypervisors.remote.lease import ENDLESS_NS, Lease, now_ns
from interlock.hypervisors.remote.protocol import Renew, Welcome
from interlock.hypervisors.remote.reconnect import dial, tls_settings
from interlock.hypervisors.remote.watchdog import LEASE, Watchdog
from interlock.images.atomic_files import make_data_folder
from interlock.ports import Hypervisor, Link
from interlock.service.capacity import disk_free_mib, limits_of

_LOG = structlog.get_logger(__name__)
_PAUSE_S: Final = 0.2
_PAUSE_MAX_S: Final = 3.0
"""Initial and maximum pause between two connection attempts, in seconds."""
_REFUSED_PAUSE_MAX_S: Final = 60.0
"""Maximum pause after the server rejected the agent without a retry time, in seconds."""
_RENEWAL_MAX_S: Final = 5.0
"""Maximum interval between two lease renewals, in seconds."""


class Contact(msgspec.Struct, frozen=True, kw_only=True):
    """The agent's connection settings."""

    __repr__ = repr_hiding("token")

    server: str
    """The server's URL."""
    token: str
    """The secret of its token, where there is no file of it."""
    token_file: Path | None = None
    """The file with that secret. It is read for each connection, so that a rotated one is used."""
    name: str
    """The host's name."""
    ca: Path | None = None
    """A PEM file of CAs that are trusted besides the system's."""
    enrolment: Path | None = None
    """The file with a secret of `interlock host enroll`, which is used once."""
    shared: Path | None = None
    """A folder shared with the server, mounted under the same path."""

    def secret(self) -> str:
        """Return the secret of the token as it is now. Raises OSError if the file cannot be read."""
        return self.token if self.token_file is None else read_token(self.token_file)


def read_token(path: Path) -> str:
    """Return the secret in a file. Raises OSError."""
    return path.read_text(encoding="ascii", errors="replace").strip()


class HostAgent:
    """An agent process."""

    def __init__(self, config: Config, contact: Contact, hypervisor: Hypervisor | None = None) -> None:
        self._contact = contact
        server = urlsplit(contact.server)
        if server.scheme == "http" and not is_loopback(server.hostname or ""):
            _LOG.warning("connection not encrypted", server=contact.server, allowed_by="--insecure-plain-http")
        self._folder = config.folder
        self._lease = Lease(self._folder / LEASE)
        self._watchdog = Watchdog(self._folder, self._folder / "guests")
        self._ranges = HttpRanges(contact.server, contact.name)
        self._hypervisor = opened = hypervisor or hypervisor_of(config)
        self._certificate = HostCertificate(config.certificates)
        self._service = AgentService(
            contact.name,
            opened,
            self._folder,
            shared=contact.shared,
            address=config.qemu.migration_address,
            ranges=self._ranges,
            limits=lambda: limits_of(config, config.folder),
            protections=lambda: protections_of(opened),
            networks=lambda: networks_of(opened),
            images_in_use=partial(images_in_use, self._folder / "guests" / "vms"),
            may_hold=self._may_hold,
            certificate=self._certificate,
        )
        self._stopping = asyncio.Event()
        self._lease_ms = 0
        self._sent: dict[int, int] = {}
        self._answered = asyncio.Event()
        self._guarded = False
        self._pause_s = _PAUSE_S
        self._refused_pause_s = _PAUSE_S
        self._welcomed = False
        self._refusal: str | None = None
        """The server's last rejection, logged once."""

    def _may_hold(self) -> None:
        """Raise `NotResponding` unless this host may run guests now."""
        self._lease.require()
        if self._guarded and not self._watchdog.alive:
            raise NotResponding("The lease watchdog of this host has ended; another is being started.")

    async def run(self) -> None:
        """Adopt the host's guests, and serve the server's calls until `stop`.

        Raises:
            Unavailable: guests cannot run here, such as if another agent runs.
            Forbidden: the server rejects this agent.
        """
        make_data_folder(self._folder)
        self._lease.open()
        await self._service.open()
        log_protections(self._hypervisor)
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
            await self._ranges.close()
            self._watchdog.close()
            self._lease.close()

    def stop(self) -> None:
        """End `run`. Guests keep running until the lease expires."""
        self._stopping.set()

    async def _serve(self) -> None:
        """Keep a connection to the server. Raises `Forbidden` if the first attempt is rejected."""
        while True:
            try:
                await self._connect()
            except OSError as error:
                # Connection errors, or local ones: no space for the watchdog's log, too many open files.
                _LOG.info("not connected", server=self._contact.server, why=str(error))
                pause_s = self._pause_s
                self._pause_s = min(pause_s * 2, _PAUSE_MAX_S)
            except InterlockError as error:
                if not self._welcomed and isinstance(error, Forbidden):
                    raise
                pause_s = self._pause_after(error)
            else:
                pause_s = self._pause_s
            await asyncio.sleep(pause_s)

    async def _connect(self) -> None:
        """Serve one connection to the server; the one that enrols the host ends as soon as it has a certificate."""
        contact, enrolment = self._contact, self._enrolment()
        certificate, secret = self._certificate.path if enrolment is None else None, contact.secret()
        await self._ranges.open(await tls_settings(contact.server, contact.ca, certificate), secret)
        tls = await tls_settings(contact.server, contact.ca, certificate)
        await self._converse(await dial(contact.server, contact.name, secret, tls, enrolment), enrolment)

    def _enrolment(self) -> str | None:
        """Return the enrolment secret; None if there is none, or it was used."""
        path = self._contact.enrolment
        if path is None or not path.exists():
            return None
        secret = path.read_text("ascii", "replace").strip()
        return None if self._certificate.is_enrolled_with(secret) else secret

    def _pause_after(self, refusal: InterlockError) -> float:
        """Return the pause before the next attempt in seconds; log each new reason once."""
        if refusal.message != self._refusal:
            self._refusal = refusal.message
            _LOG.warning("refused by server", server=self._contact.server, why=refusal.message, remedy=refusal.remedy)
        pause_s = self._refused_pause_s
        self._refused_pause_s = min(pause_s * 2, _REFUSED_PAUSE_MAX_S)
        if isinstance(refusal, HostTaken) and refusal.retry_ms is not None:
            return min(max(refusal.retry_ms / 1000, _PAUSE_S), _REFUSED_PAUSE_MAX_S)
        return pause_s

    async def _converse(self, link: Link, enrolment: str | None) -> None:
        renewing: list[asyncio.Task[None]] = []

        def welcomed(exchange: Exchange, welcome: Welcome) -> None:
            _LOG.info("connected", server=self._contact.server, host=self._contact.name, protocol=welcome.version)
            # Only after the welcome, so that a server that rejects this agent is not called in a tight loop.
            self._pause_s = self._refused_pause_s = _PAUSE_S
            self._welcomed, self._refusal = True, None
            if enrolment is not None and welcome.certificate is not None:
                _LOG.info("host enrolled", server=self._contact.server, host=self._contact.name)
                self._certificate.note_enrolled_with(enrolment)
                renewing.append(asyncio.create_task(link.close(), name="connect again, with the certificate"))
                return
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
        """Renew the lease periodically; close the connection if the server does not respond."""
        interval_s = min(_RENEWAL_MAX_S, self._lease_ms / 3000) if self._lease_ms else _RENEWAL_MAX_S
        number = 0
        while True:
            self._guarded = bool(self._lease_ms)
            await self._watchdog.ensure()
            number += 1
            self._answered.clear()
            self._sent[number] = now_ns()
            exchange.post(Renew(number=number, disk_free_mib=disk_free_mib(self._folder)))
            self._service.renew_certificate(exchange)
            try:
                async with asyncio.timeout(interval_s * 3):
                    await self._answered.wait()
            except TimeoutError:
                _LOG.warning("server not responding", server=self._contact.server)
                with contextlib.suppress(ConnectionError):
                    await link.close()
                return
            await asyncio.sleep(interval_s)

    def _renewed(self, number: int) -> None:
        """Extend the lease from when the renewal was sent: the server counts from a later time."""
        sent_ns = self._sent.pop(number, None)
        if sent_ns is not None:
            self._lease.extend(sent_ns + self._lease_ms * 1_000_000 if self._lease_ms else ENDLESS_NS)
            self._sent = {later: at for later, at in self._sent.items() if later > number}
            self._answered.set()
