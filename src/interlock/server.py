"""The composition root of the server: chooses adapters, wires them together, starts and stops them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import platform
import signal
import socket
from collections.abc import Iterator
from functools import partial

import structlog
import uuid_utils

from interlock import __version__
from interlock.api.app import ApiParts, Application, create_app
from interlock.api.http.listener import bind, url_of
from interlock.api.http.server import HttpServer
from interlock.api.http.server_tls import server_tls
from interlock.api.metrics import Metrics
from interlock.config import Config
from interlock.confinement.host_users import HostUsers
from interlock.core.errors import NotResponding
from interlock.core.policy import CompiledPolicy
from interlock.core.resource_claims import shared_markers
from interlock.driver.dispatcher import Dispatcher
from interlock.driver.host_admission import HostAdmission
from interlock.driver.host_registry import HostRegistry
from interlock.driver.image_copies import ImageCopies
from interlock.driver.leases import Leases
from interlock.driver.operation_context import DriverDependencies
from interlock.driver.operations import PERFORMS
from interlock.driver.scheduled_actions import ScheduledActions
from interlock.guests.small_guest import build
from interlock.hypervisors.certificates.authority import CertificateAuthority
from interlock.hypervisors.certificates.host_certificate import CA_FILE
from interlock.hypervisors.factory import hypervisor_of, log_protections, networks_of, protections_of
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.remote.adapter import RemoteHypervisor
from interlock.hypervisors.remote.protocol import FRAME_BYTES_MAX
from interlock.images.atomic_files import make_data_folder, write_atomically, write_or_overwrite
from interlock.images.download import image_downloads_of
from interlock.images.image_folder import ImageFolder
from interlock.images.qemu_img import ImageTool
from interlock.images.shared_folder import shared_roots_of
from interlock.images.volume_folder import DumpFolder, VolumeFolder
from interlock.policies.active_policy import PolicyInForce
from interlock.policies.time_windows import resolved
from interlock.ports import Clock, Hypervisor, RemoteHost, Tally
from interlock.service.audit import AuditLog
from interlock.service.auth import Authenticator
from interlock.service.capacity import Capacity, limits_of
from interlock.service.clock_watch import ClockWatch
from interlock.service.configured_policy import ConfiguredPolicy
from interlock.service.console_service import ConsoleService
from interlock.service.disk_space import DiskSpace
from interlock.service.dumps import Dumps
from interlock.service.event_feed import EventFeed
from interlock.service.group_updates import GroupUpdates
from interlock.service.host_enrolment import HostEnrolment
from interlock.service.host_moves import HostMoves
from interlock.service.hosts import HostService
from interlock.service.image_fetches import ImageFetches
from interlock.service.instances import Instances
from interlock.service.inventory import Inventory
from interlock.service.load_limits import LoadLimits
from interlock.service.networks import Networks
from interlock.service.passwords import PendingPasswords
from interlock.service.policies import Policies
from interlock.service.policy_verifier import PolicyVerifier
from interlock.service.projects import Projects
from interlock.service.readiness import Readiness
from interlock.service.tokens import Tokens, make_admin, new_secret
from interlock.stores.sqlite import SqliteStore

DATABASE = "interlock.db"
ADMIN_TOKEN = "admin.token"  # noqa: S105 - a file's name
GC_ALLOCATIONS = 50_000
"""Threshold of the garbage collector's first generation; Python's default is 700."""
_HEAD_START_S = 0.3
"""How long a starting server waits for the inspection of its guests before it listens, in seconds."""
SERVER_FILE = "server.json"
"""File with the URL and process id of a listening server, for the command line."""

_LOG = structlog.get_logger(__name__)


def new_id() -> str:
    """Return a UUID version 7: ids sort by creation time."""
    return str(uuid_utils.uuid7())


class Server:
    """A server process: the store, the driver and the HTTP API."""

    def __init__(
        self,
        config: Config,
        hypervisor: Hypervisor | None = None,
        clock: Clock | None = None,
        prover: PolicyVerifier | None = None,
    ) -> None:
        """Create the parts, without side effects before `open`. Tests may replace some."""
        self.config = config
        self.folder = config.folder
        self.store = _store(config, clock)
        self.hypervisor = hypervisor or hypervisor_of(config)
        self._users = HostUsers(config.qemu.users_first, config.qemu.users_max)
        configured = ConfiguredPolicy(config.policy)
        self.in_force = PolicyInForce(CompiledPolicy(configured.at_first, PERFORMS), self._with_windows)
        host = config.host or platform.node() or "localhost"
        self.authority = CertificateAuthority(config, host, self.store)
        unencrypted = config.qemu.migration_unencrypted
        self.hosts = HostRegistry(host, self.hypervisor, self._remote, self._reachable, unencrypted=unencrypted)
        self.audit = AuditLog(self.store, config.audit.keep_ms)
        self.leases = self._leases()
        self.clock_watch = ClockWatch(self.store, self.leases.note_own, self.in_force.resolve_windows)
        self.disk_space = DiskSpace(self.folder, config.disk_low_mib, self.store, self.leases.note_own)
        self.callers = Authenticator(self.store, config.tokens.last_use_interval_ms)
        self.image_files = ImageFolder(
            self.folder / "images", small_guest=partial(build, self.folder / "packages"), tool=self._image_tool()
        )
        volumes = VolumeFolder(self.folder / "volumes")
        self.dump_files = DumpFolder(self.folder / "dumps")
        self.passwords = PendingPasswords()
        self.means = self._means()
        self.upkeep = ScheduledActions(self.store, self.in_force, config.upkeep, new_id, self.leases.reachable)
        self.agent = Dispatcher(self.means, self.in_force, self.upkeep)
        self.capacity = Capacity(self.store, host, self.folder, lambda: limits_of(config, self.folder), self.leases)
        self.networks = Networks(self.store, self.capacity.quotas, new_id)
        self.projects = Projects(self.store, self.capacity.quotas, self.callers)
        self.tokens = Tokens(self.callers, self.store, new_id, self.projects, config.tokens.lifetime_max_ms)
        self.shared_roots = shared_roots_of(config)
        self.host_admission = self._host_admission()
        self.other_hosts = self._host_verbs()
        self.enrolment = HostEnrolment(config.hosts, self.leases.current_name, self.store.now_ms)
        self.image_copies = ImageCopies(self.store, self.hosts, config.hosts.image_unused_ms)
        self.inventory = Inventory(
            self.store, self.image_files, volumes, new_id, self.capacity, config.volume_gib_max, self.image_copies.ring
        )
        parts = (self.store, self.in_force, self.other_hosts, self.inventory, self.passwords, new_id, self.capacity)
        self.instances = Instances(*parts, self.networks, config.instance_memory_mib_max)
        self.feed = EventFeed(self.store)
        self.load = LoadLimits(config.http)
        self.moves, self.group_updates = self._bulk_requests()
        self.image_downloads = image_downloads_of(config)
        self.image_fetches = ImageFetches(self.inventory, self.image_downloads, new_id, self.store.now_ms)
        self.policies = self._policies(configured, prover)
        self.metrics = Metrics()
        self.accepting = False
        """Whether requests are accepted. Whether they are served: see `readiness`."""
        self.url = ""  # set once it listens
        self._http: HttpServer | None = None
        self._stopping = False
        self._reloading: set[asyncio.Task[None]] = set()

    def _means(self) -> DriverDependencies:
        return DriverDependencies(
            store=self.store,
            hosts=self.hosts,
            images=self.image_files,
            dumps=self.dump_files,
            passwords=self.passwords,
            config=self.config.driver,
        )

    def _bulk_requests(self) -> tuple[HostMoves, GroupUpdates]:
        """Return what submits requests of the server itself."""
        hosts, retry_ms = self.config.hosts, self.config.upkeep.retry_ms
        moves = HostMoves(self.store, self.other_hosts, self.instances, self.capacity, hosts, retry_ms)
        return moves, GroupUpdates(self.store, self.networks.security_groups, self.instances, retry_ms)

    def _leases(self) -> Leases:
        wait = self.config.hosts
        return Leases(
            self.store,
            self.hosts,
            lease_ms=wait.lease_ms,
            margin_ms=wait.lease_margin_ms,
            silence_ms=wait.silence_ms,
            fenced=partial(self.audit.record_own, "host.fence"),
        )

    def _remote(self, name: str) -> RemoteHost:
        config = self.config.hosts
        return RemoteHypervisor(
            name,
            lease_ms=config.lease_ms,
            silence_ms=config.silence_ms,
            now_ms=self.store.now_ms,
            renewed=self.leases.renewed,
            certify=self.authority.issue,
        )

    def _reachable(self, name: str) -> bool:
        """As `Leases.reachable`. The leases know the hosts, so they are made after them."""
        return self.leases.reachable(name)

    def _host_admission(self) -> HostAdmission:
        agent = self.agent
        return HostAdmission(self.store, self.hosts, self.leases, join=agent.join, resume=agent.host_renamed)

    def _host_verbs(self) -> HostService:
        agent, shared = self.agent, self.shared_roots
        return HostService(
            self.store,
            self.leases,
            self.hosts,
            self.capacity,
            self.host_admission,
            self.callers.bind,
            self.callers.rename_host,
            agent.join,
            agent.catch_up,
            shared,
            own_in_any=self.config.hosts.own_in_any,
            own_networks=lambda: networks_of(self.hypervisor),
        )

    def _image_tool(self) -> ImageTool:
        config = self.config
        return ImageTool(
            users=self._users, timeout_ms=config.image_conversion_timeout_ms, bytes_max=config.image_bytes_max
        )

    def _policies(self, configured: ConfiguredPolicy, prover: PolicyVerifier | None) -> Policies:
        config = self.config
        return Policies(
            self.store,
            self.in_force,
            configured,
            prover or PolicyVerifier(PERFORMS, config.policy_check_ms_max, config.policy_memory_mib_max, self._users),
            performs=PERFORMS,
            explore_ms=config.policy_explore_ms,
            explore_ms_max=config.policy_explore_ms_max,
            wake=self.agent.wake,
            reachable=self.leases.reachable,
            trusted_keys=config.policy_keys,
        )

    def _with_windows(self, policy: CompiledPolicy) -> CompiledPolicy:
        now_ms = self.store.now_ms()
        return resolved(policy, now_ms, self.store.shown_ms(now_ms) - now_ms)

    @property
    def policy(self) -> CompiledPolicy:
        """The active policy."""
        return self.in_force.compiled

    async def open(self) -> None:
        """Run `begin`, then wait until every guest of this host has been inspected.

        Raises:
            StoreError, Unavailable, PolicyError: nothing is left open.
        """
        await self.begin()
        try:
            await self.agent.adopted()
        except BaseException:
            await self.close()
            raise

    async def begin(self) -> None:
        """Open all parts, create the first admin token, and start to inspect the guests.

        Then requests are accepted; each is served once its guest has been inspected.

        Raises:
            StoreError, PolicyError: nothing is left open.
        """
        make_data_folder(self.folder)
        await self.store.open()
        try:
            await self.capacity.open()
            await self.networks.open()
            await self.projects.open()
            await self.policies.open()
            self.policies.listen(self.metrics.set_policy)
            self.metrics.begin(*await self.instances.census())
            self.instances.listen(self.metrics.on_events)
            await self.inventory.sweep()
            self.image_downloads.sweep(self.store.now_ms())
            self.shared_roots.open(shared_markers(self.store.tallies(Tally.SHARED), self.config.hosts.shared_dir or ""))
            await self.agent.open()
            await self.leases.open()
            self.clock_watch.open()
            self.disk_space.open()
            await self.host_admission.open()
            await self.moves.open()
            await self.group_updates.open()
            await self.image_copies.open()
            await self.callers.open()
            await self._first_token()
        except BaseException:
            await self.close()
            raise
        self.accepting = True

    @property
    def readiness(self) -> Readiness:
        """The readiness check."""
        return Readiness(self.store, lambda: self.accepting, lambda: self.agent.unseen)

    async def close(self) -> None:
        """Stop serving and close all parts; the guests keep running."""
        self.accepting = False
        for reloading in self._reloading:
            reloading.cancel()
        await asyncio.gather(*self._reloading, return_exceptions=True)
        self.instances.close()
        self.audit.close()
        self.feed.close()
        await self.moves.close()
        await self.group_updates.close()
        await self.image_fetches.close()
        await self.image_copies.close()
        await self.leases.close()
        await self.agent.close()
        await self.clock_watch.close()
        await self.disk_space.close()
        await self.callers.close()
        await self.store.close()

    def app(self) -> Application:
        """Return the ASGI application."""
        parts = ApiParts(
            instances=self.instances,
            capacity=self.capacity,
            accelerator=lambda: self.hypervisor.accelerator if isinstance(self.hypervisor, QemuHypervisor) else None,
            protections=lambda: protections_of(self.hypervisor),
            host_networks=lambda: networks_of(self.hypervisor),
            inventory=self.inventory,
            image_fetches=self.image_fetches,
            consoles=ConsoleService(self.instances, self._hypervisor_of),
            dumps=Dumps(self.instances, self.dump_files),
            policies=self.policies,
            audit=self.audit,
            callers=self.callers,
            tokens=self.tokens,
            projects=self.projects,
            networks=self.networks,
            config=self.config,
            accepting=lambda: self.accepting,
            disk_space=self.disk_space,
            readiness=self.readiness,
            clock=self.clock_watch,
            version=__version__,
            metrics=self.metrics,
            hosts=self.other_hosts,
            enrolment=self.enrolment,
            moves=self.moves,
            feed=self.feed,
            load=self.load,
        )
        return create_app(parts)

    async def serve(self, started: asyncio.Event | None = None) -> None:
        """Open, listen, and serve until a signal or `stop`; sets `started` when it listens.

        Raises:
            StoreError, Unavailable: it cannot be opened, or the address is not available.
        """
        await self.begin()
        adopting = asyncio.create_task(self._adopt(), name="inspect the guests")
        try:
            # Usually enough; guests that do not respond must not delay the start.
            await asyncio.wait({adopting}, timeout=_HEAD_START_S)
            if adopting.done():
                adopting.result()
            with bind(self.config.listen_host, self.config.listen_port) as listening:
                await self._listen(listening, started)
            if adopting.done():
                adopting.result()
        finally:
            adopting.cancel()
            (self.folder / SERVER_FILE).unlink(missing_ok=True)
            await self.close()

    async def _adopt(self) -> None:
        """Wait until the guests of this host have been inspected; stop the server if that fails."""
        try:
            await self.agent.adopted()
        except Exception:
            self.stop()
            raise
        self._log_accelerator()
        log_protections(self.hypervisor)

    def _hypervisor_of(self, host: str) -> Hypervisor:
        """Return the hypervisor of a host. Raises `NotResponding` while its guests are being looked for."""
        found = self.hosts.of(host)
        if found is self.hypervisor and self.agent.unseen is None:
            raise NotResponding(
                "The server has just started and is still looking for its guests.", remedy="Retry in a moment."
            )
        return found

    def _log_accelerator(self) -> None:
        if isinstance(self.hypervisor, QemuHypervisor):
            why_not_kvm = {"why_not_kvm": self.hypervisor.why_not_kvm} if self.hypervisor.why_not_kvm else {}
            _LOG.info("accelerator selected", accelerator=self.hypervisor.accelerator, **why_not_kvm)

    def reload(self) -> None:
        """Reload the configured policy and the certificate of the HTTP server; the results are logged."""
        if self._http is not None:
            self._http.reload_tls()
        task = asyncio.create_task(self.policies.reload(), name="reload the policy")
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)

    def stop(self) -> None:
        """End `serve`; long polls return the present state."""
        self.instances.watch.close()
        self.feed.close()
        self._stopping = True
        if self._http is not None:
            self._http.should_exit = True

    async def _listen(self, listening: socket.socket, started: asyncio.Event | None) -> None:
        config = self.config
        self._http = HttpServer(
            self.app(),
            config.http,
            partial(server_tls, config, self.authority) if config.tls else None,
            self.metrics.count_refusal,
            ws_max_size=FRAME_BYTES_MAX,
            timeout_graceful_shutdown=max(1, config.driver.drain_ms // 1000),
        )
        self._http.should_exit = self._stopping
        self.url = url_of(listening, tls=config.tls)
        renewal_s = config.hosts.certificate_ms / 3000
        self._reloading.add(asyncio.create_task(self._http.reload_tls_every(renewal_s), name="renew the certificate"))
        with self._signal_handlers():
            self._announce(started)
            await self._http.serve_on(listening)

    def _announce(self, started: asyncio.Event | None) -> None:
        """Write the URL to the log and the server file. From now on it gets requests and signals."""
        self._write_server_file()
        _LOG.info("serving", url=self.url, folder=str(self.folder), policy=self.policy.policy.name)
        # Objects created so far live until the end; keep the garbage collector from traversing them.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_ALLOCATIONS)
        if started is not None:
            started.set()

    def _write_server_file(self) -> None:
        """Write the server's URL for the command line; a full disk must not keep it from serving."""
        ca = str(self.config.certificates / CA_FILE) if self.config.tls_names else None
        path, text = self.folder / SERVER_FILE, json.dumps({"url": self.url, "pid": os.getpid(), "ca": ca})
        try:
            write_or_overwrite(path, text, mode=0o644)
        except OSError as error:
            _LOG.warning(
                "failed to write the server file: set INTERLOCK_URL and INTERLOCK_TOKEN for the command line",
                url=self.url,
                file=str(path),
                why=error.strerror,
            )

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handlers = {signal.SIGINT: self.stop, signal.SIGTERM: self.stop, signal.SIGHUP: self.reload}
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    async def _first_token(self) -> None:
        """Create an admin token for the command line if there is no token at all."""
        path = self.folder / ADMIN_TOKEN
        if self.callers.empty:
            secret = new_secret()
            write_atomically(path, secret + "\n", mode=0o600)
            await make_admin(self.callers, self.store, new_id(), "admin", secret)
            await self.audit.record_own("token.create", "admin", role="admin")
        elif not path.exists():
            _LOG.warning("admin token file not found; `interlock token recover` creates one", file=str(path))


def _store(config: Config, clock: Clock | None) -> SqliteStore:
    return SqliteStore(
        config.folder / DATABASE,
        clock,
        config.disk_reserve_mib,
        jump_ms=config.clock.jump_ms,
        grace_ms=config.clock.grace_ms,
    )
