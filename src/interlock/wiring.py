"""The composition root: the only place where adapters are chosen and put together.

What a server is made of, in which order it opens, and what it leaves in its folder for the command line to find.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import platform
import secrets
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import structlog
import uuid_utils
import uvicorn
from starlette.applications import Starlette

from interlock import __version__
from interlock.api.app import ApiParts, create_app
from interlock.api.metrics import Metrics
from interlock.config import Config
from interlock.core.errors import StoreError, Unavailable
from interlock.core.policy import CompiledPolicy
from interlock.driver.agent import Agent
from interlock.driver.hosts import Hosts
from interlock.driver.image_copies import ImageCopies
from interlock.driver.leases import Leases
from interlock.driver.operations import PERFORMS
from interlock.driver.upkeep import Upkeep
from interlock.driver.work import Means
from interlock.hypervisors.choice import hypervisor_of
from interlock.hypervisors.dumps import DumpFolder
from interlock.hypervisors.durable_files import write_whole
from interlock.hypervisors.image_tool import ImageTool
from interlock.hypervisors.images import ImageFolder
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.remote.adapter import RemoteHypervisor
from interlock.hypervisors.remote.wire import FRAME_BYTES_MAX
from interlock.hypervisors.shared_folder import shared_roots_of
from interlock.hypervisors.volumes import VolumeFolder
from interlock.policies.in_force import PolicyInForce
from interlock.ports import Clock, Hypervisor, RemoteHost
from interlock.service.callers import Callers
from interlock.service.capacity import Capacity, limits_of
from interlock.service.configured_policy import ConfiguredPolicy
from interlock.service.dumps import Dumps
from interlock.service.hosts import HostVerbs
from interlock.service.instances import Instances
from interlock.service.inventory import Inventory
from interlock.service.passwords import PasswordBox
from interlock.service.policies import Policies
from interlock.service.proving import Prover
from interlock.service.seeing import Seeing
from interlock.stores.sqlite import SqliteStore

DATABASE = "interlock.db"
ADMIN_TOKEN = "admin.token"  # noqa: S105 - a file's name
GC_ALLOCATIONS = 50_000
"""After how many new containers the collector of cycles looks at the young ones; Python's own default is 700."""
SERVER_FILE = "server.json"
"""Where a server that listens says so: its URL and process id, for the command line."""

_LOG = structlog.get_logger(__name__)


def new_id() -> str:
    """A new id: a UUID of version 7, so that ids sort by the time they were made."""
    return str(uuid_utils.uuid7())


def new_secret() -> str:
    """A new token's secret: 256 random bits, with a prefix by which leaked ones can be found."""
    return f"ilk_{secrets.token_urlsafe(32)}"


def upgrade_database(config: Config) -> None:
    """Bring the database to this version's schema. Raises `StoreError`."""
    from interlock.stores.schema import upgrade

    upgrade(config.folder / DATABASE)


async def recover_admin_token(config: Config) -> Path:
    """Make another admin token and put it where the command line finds it; the file that it is in.

    For whoever may write the data folder, while no server runs on it: the way back when no admin's token is left.

    Raises:
        StoreError: the database cannot be opened; `StoreBusy` if a server runs.
    """
    store = SqliteStore(config.folder / DATABASE)
    await store.open()
    try:
        callers = Callers(store, new_id, new_secret)
        await callers.open()
        secret = new_secret()
        write_whole(config.folder / ADMIN_TOKEN, secret + "\n", mode=0o600)
        await callers.make_admin(f"admin-{new_id()[-12:]}", secret)
    finally:
        await store.close()
    return config.folder / ADMIN_TOKEN


class Server:
    """Everything that runs in one server process: the store, the agent of this host, and the HTTP door."""

    def __init__(
        self,
        config: Config,
        hypervisor: Hypervisor | None = None,
        clock: Clock | None = None,
        prover: Prover | None = None,
    ) -> None:
        """Put the parts together; nothing is touched before `open`. A test may bring parts of its own."""
        self.config = config
        self.folder = config.folder
        self.store = SqliteStore(self.folder / DATABASE, clock)
        self.hypervisor = hypervisor or hypervisor_of(config)
        configured = ConfiguredPolicy(config.policy)
        self.in_force = PolicyInForce(CompiledPolicy(configured.at_first, PERFORMS))
        host = config.host or platform.node() or "localhost"
        self.hosts = Hosts(host, self.hypervisor, self._remote)
        wait = config.hosts
        self.leases = Leases(
            self.store, self.hosts, lease_ms=wait.lease_ms, margin_ms=wait.lease_margin_ms, silence_ms=wait.silence_ms
        )
        self.callers = Callers(self.store, new_id, new_secret)
        tool = ImageTool(timeout_ms=config.image_conversion_timeout_ms, bytes_max=config.image_bytes_max)
        self.image_files = ImageFolder(self.folder / "images", cache=self.folder / "packages", tool=tool)
        volume_files = VolumeFolder(self.folder / "volumes")
        self.dump_files = DumpFolder(self.folder / "dumps")
        self.passwords = PasswordBox()
        self.means = Means(
            store=self.store,
            hosts=self.hosts,
            images=self.image_files,
            dumps=self.dump_files,
            passwords=self.passwords,
            config=config.driver,
        )
        self.agent = Agent(self.means, self.in_force, Upkeep(self.store, self.in_force, config.upkeep, new_id))
        self.capacity = Capacity(self.store, host, self.folder, lambda: limits_of(config, self.folder), self.leases)
        self.shared_roots = shared_roots_of(config)
        self.other_hosts = self._host_verbs()
        self.inventory = Inventory(
            self.store, self.image_files, volume_files, new_id, self.capacity, config.volume_gib_max
        )
        self.instances = Instances(
            self.store,
            self.in_force,
            self.other_hosts,
            self.inventory,
            self.passwords,
            new_id,
            self.capacity,
            config.instance_memory_mib_max,
        )
        self.image_copies = ImageCopies(self.store, self.hosts, config.hosts.image_unused_ms)
        self.policies = self._policies(configured, prover)
        self.metrics = Metrics()
        self.ready = False
        self.url = ""
        """Where it listens, once it does."""
        self._http: uvicorn.Server | None = None
        self._reloading: set[asyncio.Task[None]] = set()

    def _remote(self, name: str) -> RemoteHost:
        config = self.config.hosts
        return RemoteHypervisor(
            name,
            lease_ms=config.lease_ms,
            silence_ms=config.silence_ms,
            now_ms=self.store.now_ms,
            renewed=self.leases.renewed,
        )

    def _host_verbs(self) -> HostVerbs:
        agent, shared = self.agent, self.shared_roots
        return HostVerbs(self.store, self.leases, self.hosts, self.capacity, agent.join, agent.catch_up, shared)

    def _policies(self, configured: ConfiguredPolicy, prover: Prover | None) -> Policies:
        config = self.config
        return Policies(
            self.store,
            self.in_force,
            configured,
            prover or Prover(PERFORMS, config.policy_check_ms_max, config.policy_memory_mib_max),
            performs=PERFORMS,
            explore_ms=config.policy_explore_ms,
            explore_ms_max=config.policy_explore_ms_max,
            wake=self.agent.wake,
        )

    @property
    def policy(self) -> CompiledPolicy:
        """The policy in force at this moment."""
        return self.in_force.compiled

    async def open(self) -> None:
        """Open what it is made of, inspect before serving, and see that there is an admin token.

        Raises:
            StoreError, Unavailable, PolicyError: with what to do about it; nothing is left open.
        """
        make_folder(self.folder)
        await self.store.open()
        try:
            await self.capacity.open()
            await self.policies.open()
            self.policies.listen(self.metrics.note_policy)
            self.metrics.begin(*await self.instances.census())
            self.instances.listen(self.metrics.hear)
            await self.inventory.sweep()
            self.shared_roots.open()
            await self.agent.open()
            self._tell_accelerator()
            await self.leases.open()
            self.inventory.image_deleted = self.image_copies.ring
            await self.image_copies.open()
            await self.callers.open()
            await self._first_token()
        except BaseException:
            await self.store.close()
            raise
        self.ready = True

    async def close(self) -> None:
        """Stop serving and let go of everything; the VMs go on."""
        self.ready = False
        for reloading in self._reloading:
            reloading.cancel()
        await asyncio.gather(*self._reloading, return_exceptions=True)
        self.instances.close()
        await self.image_copies.close()
        await self.leases.close()
        await self.agent.close()
        await self.store.close()

    def app(self) -> Starlette:
        """The ASGI application."""
        parts = ApiParts(
            instances=self.instances,
            capacity=self.capacity,
            accelerator=lambda: self.hypervisor.accelerator if isinstance(self.hypervisor, QemuHypervisor) else None,
            inventory=self.inventory,
            seeing=Seeing(self.instances, self.hosts.of),
            dumps=Dumps(self.instances, self.dump_files),
            policies=self.policies,
            callers=self.callers,
            config=self.config,
            ready=lambda: self.ready,
            version=__version__,
            metrics=self.metrics,
            hosts=self.other_hosts,
        )
        return create_app(parts)

    async def serve(self, started: asyncio.Event | None = None) -> None:
        """Open, listen, and serve until a signal or `stop`; sets `started` when it listens.

        Raises:
            StoreError, Unavailable: it cannot be opened, or the address cannot be listened on.
        """
        await self.open()
        try:
            with self._bind() as listening:
                await self._listen(listening, started)
        finally:
            (self.folder / SERVER_FILE).unlink(missing_ok=True)
            await self.close()

    def _tell_accelerator(self) -> None:
        if isinstance(self.hypervisor, QemuHypervisor):
            why_not_kvm = {"why_not_kvm": self.hypervisor.why_not_kvm} if self.hypervisor.why_not_kvm else {}
            _LOG.info("guests run", accelerator=self.hypervisor.accelerator, **why_not_kvm)

    def reload(self) -> None:
        """Have the policy read again that the configuration names; what becomes of it is logged."""
        task = asyncio.create_task(self.policies.reload(), name="reload the policy")
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)

    def stop(self) -> None:
        """Have `serve` come to its end; those who wait for news are answered with what there is."""
        self.instances.watch.close()
        if self._http is not None:
            self._http.should_exit = True

    def _bind(self) -> socket.socket:
        host, port = self.config.listen_host, self.config.listen_port
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, port), family=family, backlog=2048)
        except OSError as error:
            raise Unavailable(
                f"Cannot listen on {host}:{port}: {os.strerror(error.errno) if error.errno else error}.",
                remedy="Stop what listens there, or choose another address with --listen or listen_port.",
            ) from None

    async def _listen(self, listening: socket.socket, started: asyncio.Event | None) -> None:
        config = self.config
        settings = uvicorn.Config(
            self.app(),
            ssl_certfile=config.tls_certificate or None,
            ssl_keyfile=config.tls_key or None,
            http="httptools",
            ws="websockets-sansio",
            ws_max_size=FRAME_BYTES_MAX,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=max(1, config.driver.drain_ms // 1000),
        )
        self._http = _Http(settings)
        self.url = _url(listening, tls=bool(config.tls_certificate))
        with self._heeding_signals():
            self._announce(started)
            await self._http.serve(sockets=[listening])

    def _announce(self, started: asyncio.Event | None) -> None:
        """Say where the server listens. From now on it gets requests, and signals."""
        self._leave_url()
        _LOG.info("serving", url=self.url, folder=str(self.folder), policy=self.policy.policy.name)
        # What was made until now stays; looking through it again and again would hold up everyone who asks.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_ALLOCATIONS)
        if started is not None:
            started.set()

    def _leave_url(self) -> None:
        """Leave where the server listens for the command line to find; a full disk does not keep it from serving."""
        path = self.folder / SERVER_FILE
        try:
            write_whole(path, json.dumps({"url": self.url, "pid": os.getpid()}), mode=0o644)
        except OSError as error:
            # What a server that was killed left there would lead elsewhere.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            _LOG.warning(
                "the command line does not find this server by itself: set INTERLOCK_URL and INTERLOCK_TOKEN",
                url=self.url,
                file=str(path),
                why=error.strerror,
            )

    @contextlib.contextmanager
    def _heeding_signals(self) -> Iterator[None]:
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
        """Make the admin token that the command line finds by itself, if nobody could ask for anything otherwise."""
        path = self.folder / ADMIN_TOKEN
        if self.callers.empty:
            secret = new_secret()
            write_whole(path, secret + "\n", mode=0o600)
            await self.callers.make_admin("admin", secret)
        elif not path.exists():
            _LOG.warning("there is no admin token file; `interlock token recover` makes one", file=str(path))


class _Http(uvicorn.Server):
    """uvicorn's server without its own handling of signals, which would end the process before the store is closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _url(listening: socket.socket, *, tls: bool) -> str:
    host, port = listening.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def make_folder(folder: Path) -> None:
    """Make the server's folder. Others may pass through it (QEMU runs as another user), but not look around."""
    try:
        folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"The data folder {folder} cannot be made: {error.strerror}.",
            remedy="Choose another with INTERLOCK_DATA_DIR, or make it writable.",
        ) from None
