"""The HTTP server: uvicorn's, with connections accepted, and those of agents served, in a thread of their own.

The event loop of the API serves clients and everything else that a server does. The thread does little: it counts and
accepts connections, hands those of clients over to the loop as soon as they have sent something, and has the WebSockets
of agents, whose lease renewals it grants (`ports.hosts.ThreadedLink`). So no load on the API costs a host its lease.

What both use is thread-safe by itself (`ConnectionSlots`, `SessionLease`) or is passed on by `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import structlog
import uvicorn
from uvicorn.server import ServerState

from interlock.api.http import problems
from interlock.api.http.listener import PEEK_BYTES_MAX, ConnectionSlots, connection_slots, is_agent
from interlock.api.http.loop_relay import LoopRelay
from interlock.api.http.protocol import HttpProtocol, WebSocketProtocol, refusal
from interlock.config import HttpConfig
from interlock.core.errors import Unavailable

_LOG = structlog.get_logger(__name__)
_ACCEPTED_AT_ONCE: Final = 64
_FAILED_PAUSE_S: Final = 0.1
"""How long no connection is accepted after that has failed, in seconds."""
_LINGER_S: Final = 0.5
_LINGERING_MAX: Final = 64
"""For how long, and how many, refused connections are kept until the client has read the answer."""
_EXCESS_MAX: Final = 256
_EXCESS_PER_CLIENT_MAX: Final = 8
_EXCESS_S: Final = 1.0
"""How many connections beyond the limits are looked at, of one client, and for how long: one may be of an agent."""
_REFUSALS_LOGGED_S: Final = 60.0
RETRY_AFTER_S: Final = 1

Release = Callable[[], None]


class HttpServer(uvicorn.Server):
    """The HTTP server of an application.

    Args:
        application: an ASGI application.
        limits: of connections and requests.
        tls: returns the settings of TLS, now and again for each `reload_tls`; None: without TLS.
        on_refused: called, in any thread, with the name of the problem for which one is refused.
        more: other settings of uvicorn.

    Raises:
        Unavailable, OSError: as `tls`.
    """

    def __init__(
        self,
        application: Any,
        limits: HttpConfig,
        tls: Callable[[], ssl.SSLContext] | None = None,
        on_refused: Callable[[str], None] = lambda _: None,
        **more: Any,
    ) -> None:
        self._tls = tls
        context = None if tls is None else tls()
        self._settings: dict[str, Any] = {
            "ws": WebSocketProtocol,
            "http": HttpProtocol,
            "proxy_headers": False,
            "log_config": None,
            "access_log": False,
            "server_header": False,
            "lifespan": "off",
            "ssl_context_factory": None if context is None else lambda _config, _default: context,
            **more,
        }
        super().__init__(uvicorn.Config(application, **self._settings))
        self._application = application
        self._limits = limits
        self._on_refused = on_refused
        self._thread: ConnectionThread | None = None
        self._arriving: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn's handlers would end the process before the store is closed."""
        yield

    def reload_tls(self) -> None:
        """Use the present certificate for new connections, if there is TLS; the result is logged."""
        if self._tls is None or self._thread is None:
            return
        try:
            context = self._tls()
        except (Unavailable, OSError) as error:
            _LOG.warning("certificate of the server not reloaded", why=str(error))
            return
        # Replaced as a whole: another thread may be using the former settings.
        self.config.ssl = context
        self._thread.use_tls(context)
        _LOG.info("certificate of the server reloaded")

    async def reload_tls_every(self, interval_s: float) -> None:
        """As `reload_tls`, periodically, so that a certificate is replaced before it expires."""
        while True:
            await asyncio.sleep(interval_s)
            self.reload_tls()

    async def serve_on(self, listening: socket.socket) -> None:
        """Serve the connections of a listening socket until `should_exit`."""
        self.config.load()
        loop = asyncio.get_running_loop()
        relay = uvicorn.Config(LoopRelay(self._application, loop), **self._settings)
        relay.load()
        self._thread = ConnectionThread(
            listening,
            self._limits,
            relay,
            lambda connection, release: loop.call_soon_threadsafe(self._arrive, connection, release),
            self._on_refused,
        )
        self._thread.start()
        await self.serve(sockets=[])

    def _arrive(self, connection: socket.socket, release: Release) -> None:
        protocol = partial(
            HttpProtocol,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            limits=self._limits,
            on_lost=release,
            on_refused=self._on_refused,
        )
        task = asyncio.create_task(connect(connection, protocol, self.config.ssl, self._limits, release))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        assert self._thread is not None
        closing = asyncio.create_task(self._thread.close(self.config.timeout_graceful_shutdown or 0))
        await super().shutdown(sockets)
        await closing


async def connect(
    connection: socket.socket,
    protocol: Callable[[], asyncio.Protocol],
    tls: ssl.SSLContext | None,
    limits: HttpConfig,
    release: Release,
) -> None:
    """Serve an accepted connection by a protocol; `release` if that does not come about."""
    timeout_s = limits.header_timeout_ms / 1000
    try:
        await asyncio.get_running_loop().connect_accepted_socket(
            protocol, connection, ssl=tls, ssl_handshake_timeout=timeout_s if tls is not None else None
        )
    except (OSError, ValueError) as error:  # ValueError: closed by the client meanwhile
        _LOG.debug("connection failed", why=str(error))
        release()
        connection.close()


class ConnectionThread:
    """The thread that accepts connections, and serves those of agents.

    Args:
        listening: the listening socket.
        limits: of connections and requests.
        settings: of uvicorn, with the application of agents.
        hand_over: called with the connection of another client, and what counts its end.
        on_refused: called with the name of the problem for which a connection is refused.
    """

    def __init__(
        self,
        listening: socket.socket,
        limits: HttpConfig,
        settings: uvicorn.Config,
        hand_over: Callable[[socket.socket, Release], object],
        on_refused: Callable[[str], None],
    ) -> None:
        self._listening = listening
        self._limits = limits
        self._settings = settings
        self._hand_over = hand_over
        self._on_refused = on_refused
        self._slots, self._agent_slots = connection_slots(limits)
        self._excess_slots = ConnectionSlots(_EXCESS_MAX, _EXCESS_PER_CLIENT_MAX)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="connections", daemon=True)
        self._state = ServerState()
        self._stopping = asyncio.Event()
        self._drain_s = 0.0
        self._arrivals: set[_Arrival] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lingering: set[socket.socket] = set()
        self._refused = 0

    def start(self) -> None:
        self._thread.start()

    def use_tls(self, context: ssl.SSLContext) -> None:
        """Use these settings for new connections. Called from another thread."""
        self._settings.ssl = context

    async def close(self, drain_s: float) -> None:
        """Accept no more connections, close those of agents, and wait for their sessions, for `drain_s` at most."""
        self._drain_s = drain_s
        self._loop.call_soon_threadsafe(self._stopping.set)
        await asyncio.to_thread(self._thread.join)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._run())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()

    async def _run(self) -> None:
        self._listening.setblocking(False)
        self._loop.add_reader(self._listening, self._accept)
        await self._stopping.wait()
        self._loop.remove_reader(self._listening)
        for arrival in tuple(self._arrivals):
            arrival.end()
        for connection in tuple(self._lingering):
            self._close(connection)
        for link in tuple(self._state.connections):
            link.shutdown()
        pending = self._tasks | self._state.tasks
        if pending:
            await asyncio.wait(pending, timeout=self._drain_s)
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)
        for link in tuple(self._state.connections):
            link.transport.abort()
        # A transport closes its socket in the next turns of the loop.
        for _ in range(3):
            await asyncio.sleep(0)

    # ---------------------------------------------------------------------------------------------- accepting

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, address = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # too many open files, no memory
                _LOG.warning("connection not accepted", why=error.strerror)
                self._loop.remove_reader(self._listening)
                self._loop.call_later(_FAILED_PAUSE_S, self._accept_again)
                return
            connection.setblocking(False)
            self._admit(connection, address[0])

    def _admit(self, connection: socket.socket, address: str) -> None:
        """Look at a connection, also for a moment at one that is too many: agents are admitted beside clients."""
        taken = self._slots.take(address)
        release = taken or self._excess_slots.take(address)
        if release is None:
            self._refuse(connection)
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        arrival = _Arrival(self, connection, address, release, excess=taken is None)
        self._arrivals.add(arrival)
        arrival.look()

    def _accept_again(self) -> None:
        if not self._stopping.is_set():
            self._loop.add_reader(self._listening, self._accept)

    def _refuse(self, connection: socket.socket) -> None:
        """Answer with 503 at once, without TLS; log it from time to time."""
        self._on_refused("overloaded")
        if not self._refused:
            self._loop.call_later(_REFUSALS_LOGGED_S, self._log_refusals)
            _LOG.warning("connections refused: too many", connections_max=self._limits.connections_max)
        self._refused += 1
        if self._settings.is_ssl or len(self._lingering) >= _LINGERING_MAX:
            connection.close()
            return
        with contextlib.suppress(OSError):
            connection.send(_TOO_MANY_CONNECTIONS)
            connection.shutdown(socket.SHUT_WR)
        # Closing it with unread data would reset it, and the client would not see the answer.
        self._lingering.add(connection)
        self._loop.call_later(_LINGER_S, self._close, connection)

    def _log_refusals(self) -> None:
        if self._refused > 1:
            _LOG.warning("connections refused", count=self._refused, seconds=_REFUSALS_LOGGED_S)
        self._refused = 0

    def _close(self, connection: socket.socket) -> None:
        self._lingering.discard(connection)
        connection.close()

    # ------------------------------------------------------------------------------------------------ arrivals

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    @property
    def tls(self) -> bool:
        return self._settings.is_ssl

    def patience_s(self, *, excess: bool) -> float:
        """Return how long a connection may send nothing at first, in seconds."""
        return _EXCESS_S if excess else self._limits.header_timeout_ms / 1000

    def forget(self, arrival: _Arrival) -> None:
        self._arrivals.discard(arrival)

    def sort(self, connection: socket.socket, address: str, release: Release, *, agent: bool, excess: bool) -> None:
        """Serve a connection here, if it is of an agent, or hand it over, or refuse it if it is too many."""
        if not agent and not excess:
            self._hand_over(connection, release)
            return
        release()
        if not agent:
            self._refuse(connection)
            return
        own_release = self._agent_slots.take(address)
        if own_release is None:
            self._refuse(connection)
            return
        protocol = partial(
            HttpProtocol,
            config=self._settings,
            server_state=self._state,
            app_state={},
            limits=self._limits,
            on_lost=own_release,
            on_refused=self._on_refused,
        )
        serving = connect(connection, protocol, self._settings.ssl, self._limits, own_release)
        task = self._loop.create_task(serving)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


_TOO_MANY_CONNECTIONS: Final = refusal(
    problems.response(
        problems.HTTP_PROBLEM_TYPES["overloaded"],
        "The server has too many connections.",
        "",
        remedy="Retry later, and use a connection for several requests.",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )
)


class _Arrival:
    """A connection of which not enough has been received to know whose it is. What it has sent is not read yet."""

    def __init__(
        self, thread: ConnectionThread, connection: socket.socket, address: str, release: Release, *, excess: bool
    ) -> None:
        self._excess = excess
        self._thread = thread
        self._connection = connection
        self._address = address
        self._release = release
        self._seen = 0
        thread.loop.add_reader(connection, self.look)
        self._timer = thread.loop.call_later(thread.patience_s(excess=excess), self.end)

    def look(self) -> None:
        """Look at what has been received, and sort the connection if that is enough."""
        try:
            seen = self._connection.recv(PEEK_BYTES_MAX, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            seen = b""
        if not seen:
            self.end()
            return
        agent = is_agent(seen, tls=self._thread.tls)
        if agent is None and len(seen) > self._seen:
            self._seen = len(seen)
            # Readable only with more than that.
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(seen) + 1)
            return
        self._stop()
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        self._thread.sort(self._connection, self._address, self._release, agent=bool(agent), excess=self._excess)

    def end(self) -> None:
        """Close the connection."""
        self._stop()
        self._release()
        self._connection.close()

    def _stop(self) -> None:
        self._timer.cancel()
        self._thread.loop.remove_reader(self._connection)
        self._thread.forget(self)
